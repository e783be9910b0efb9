"""The paper's analyses, for several weights side by side.

    python extras/analyze.py fourier --weights a=FILE b=FILE     frequencies of features, by depth
    python extras/analyze.py interactions --weights ...          interactions of two patches
    python extras/analyze.py occlusion --weights ...             top-1 with patches hidden, shuffled
    python extras/analyze.py mim --weights run=checkpoint.pt     the loss at the start and the end

`random` as a FILE is random weights. Interactions and occlusion need classifiers: the best.pt of
finetune.py. The images are of the validation set, the same for all weights. Writes table.md,
results.json and plot.png into --out, and replaces files of these names. Runs as one process or
under torchrun. The measures and their sources are in inside.py.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import NAMED, normalise, seed_for
from engine.command import Failed, Distributed, command_line
from engine.files import printable
from engine.flags import (RUN_FLAGS, SIDES, SWITCH, Parser, checked, defaults, format_size,
                          height_width, number, path, remembered)
from extras import inside
from extras.chart import Panel, charts, check_matplotlib
from extras.output import check_folder, free_name, writing
from extras.paint import build_model, load_model
from loss import residual
from masking import fill_hidden, mask_grid, random_mask, resize_mask
from model import STEMS, get_family

# orders of an interaction: how many of the other patches are seen, as a share
ORDERS = (0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1)
SEEDS = 3                                                    # of an occlusion
IMAGES = {"fourier": 200, "interactions": 24, "occlusion": 200, "mim": 64}
BATCH = 128                                                  # images per forward pass

# of an analysis: lines of table.md, results.json, the plot
Result = tuple[list[str], dict, list[Panel]]


# ---- fourier ----

@torch.no_grad()
def fourier(args: SimpleNamespace, world: Distributed) -> Result:
    """Log amplitude along the diagonal, and variance over positions, at every depth of the encoder."""
    size = height_width(args.image_size)
    if size[0] != size[1]:
        raise ValueError(f"--image-size {size[0]} {size[1]}: the diagonal is that of square maps; give one number")
    data, found = inside.load_images(args, size, args.images, labelled=False), {}
    mine = list(range(world.rank, len(data.images), world.size))
    for name, file in args.weights.items():
        encoder, rows, depths = inside.load(file, args, size, world), [], []
        for first in tqdm(range(0, max(1, len(mine)), 16), name, unit="batch", disable=args.quiet):
            seen, part = [], mine[first:first + 16]

            def see(title: str, z: Tensor) -> None:          # z (B, C, h, w)
                variance = z.float().var((2, 3)).mean(1, keepdim=True)
                seen.append((title, min(z.shape[2:]), torch.cat([inside.log_amplitude(z), variance], 1)))

            with inside.tapped(encoder, see):  # no image of its own: one, for the titles
                encoder(normalise(data.images[part or [0]], world.device))
            depths = [(title, side) for title, side, _ in seen]
            rows += torch.cat([row for *_, row in seen], 1).unbind() if part else []
        values, found[name] = iter(inside.gather(rows, len(data.images), world).mean(0).tolist()), []
        for title, side in depths:
            curve = [(2 * k / side, next(values)) for k in range(math.ceil(side / 2))]
            found[name].append(dict(depth=title, side=side, curve=curve, variance=next(values)))
    lines = ["| weights | depth | side of map | highest frequency | log amplitude there, less that at 0 | variance |",
             "|---|---|---|---|---|---|"]
    for name, depths in found.items():
        for d in depths:
            frequency, high = d["curve"][-1]
            shown = f"{frequency:.3f} pi | {high:.2f}" if d["side"] > 3 else "- | -"
            lines.append(f"| {name} | {d['depth']} | {d['side']} | {shown} | {d['variance']:.3g} |")
    lines += ["", f"{len(data.images)} images. Maps of 3 x 3 and less are left out of the curves. The highest "
              "frequency depends on a map's side: where that changes with depth, different frequencies are compared."]
    panels = [Panel(f"{name}, by depth", "frequency on the diagonal, in pi", "log amplitude less that at 0",
                    {d["depth"]: d["curve"] for d in depths if d["side"] > 3}, ramp=True)
              for name, depths in found.items()]

    def over_depth(value) -> dict:
        return {name: [(i / max(1, len(depths) - 1), value(d)) for i, d in enumerate(depths) if d["side"] > 3]
                for name, depths in found.items()}
    depth = "depth, 0 = first, 1 = last"
    panels += [Panel("at the highest frequency", depth, "log amplitude less that at 0",
                     over_depth(lambda d: d["curve"][-1][1])),
               Panel("variance over positions", depth, "log10 of the variance, mean over channels",
                     over_depth(lambda d: math.log10(d["variance"] + 1e-12)))]
    return lines, found, panels


# ---- interactions ----

def grid_of(args: SimpleNamespace) -> tuple[int, int]:
    """--grid square patches along the shorter side.

    Raises ValueError if they do not divide the image."""
    low, high = sorted(height_width(args.image_size))
    fit = [g for g in range(2, low + 1) if low % g == 0 and high % (low // g) == 0]
    if args.grid not in fit:
        fit = ", ".join(str(g) for g in fit if g < 17)
        raise ValueError(f"--grid {args.grid}: does not divide a side of {format_size(args.image_size)}; use one of "
                         f"{fit}")
    return mask_grid(height_width(args.image_size), low // args.grid)


@torch.no_grad()
def interactions(args: SimpleNamespace, world: Distributed) -> Result:
    """J by order, on images that all weights but random ones classify correctly. Cells not seen are ImageNet's mean.

    The order m of a share r of the other n - 2 patches is round((n - 2) r). The released code
    truncates, int((n - 2) r): with n = 64, three of the nine ORDERS (0.35, 0.8 and 0.95) have one
    patch less there."""
    size, grid = height_width(args.image_size), grid_of(args)
    patches, data = math.prod(grid), inside.load_images(args, size, 10 * args.images)
    nets = {name: inside.load(file, args, size, world, data.classes) for name, file in args.weights.items()}
    right = torch.ones(len(data.labels), dtype=torch.bool)
    for name, net in nets.items():  # random weights are right by chance: they have no vote
        if args.weights[name] != "random":
            guess = torch.cat([net(normalise(x, world.device)).argmax(1).cpu() for x in data.images.split(BATCH)])
            right &= guess == data.labels
    chosen = right.nonzero()[:, 0].tolist()[:args.images]
    if not chosen:
        raise Failed(f"none of {len(right)} images is classified correctly by all of {', '.join(nets)}")
    orders = [round(share * (patches - 2)) for share in ORDERS]
    mine = chosen[world.rank::world.size]
    orders, rows = sorted(set(orders)), {}
    bar = tqdm(total=len(nets) * len(mine), unit="image", disable=args.quiet)
    for name, net in nets.items():
        rows[name] = []
        for i in mine:
            image, label = normalise(data.images[i, None], world.device), data.labels[i, None]

            def v(kept: Tensor) -> Tensor:                   # (B, patches) -> (B,)
                odds = []
                for part in kept.to(world.device).view(-1, *grid).split(BATCH):
                    logits = net(fill_hidden(image.expand(len(part), -1, -1, -1), ~part, "zero"))
                    odds.append(inside.log_odds(logits.cpu().double(), label.expand(len(part))))
                return torch.cat(odds)

            # the same pairs and contexts for all weights
            key, found = (args.seed, data.indices[i]), []
            pairs = inside.near_pairs(grid, args.pairs, np.random.default_rng(key))
            for m in orders:
                rng = np.random.default_rng((*key, m))
                of = inside.interactions_of(v, patches, pairs, m, args.contexts, rng)
                found.append(torch.stack([of[:, 0].abs().mean(), (of[:, 1] * of[:, 2]).mean()]))
            rows[name].append(torch.stack(found))            # (orders, 2)
            bar.update()
    bar.close()
    # (images, orders, 2)
    rows = {name: inside.gather(row, len(chosen), world) for name, row in rows.items()}
    shares = [m / (patches - 2) for m in orders]
    about = (f"{len(chosen)} of the {int(right.sum())} images (of {len(right)}) that all weights but random ones "
             f"classify correctly; {grid[0]} x {grid[1]} patches; {args.pairs} pairs, "
             f"{args.contexts} contexts; ranges: 95 % of a bootstrap over images")
    return compared(rows, shares, about, args.seed)


def compared(rows: dict[str, Tensor], shares: list[float], about: str, seed: int) -> Result:
    """The tables and plots of J, with a bootstrap over images that draws the same ones for all weights."""
    count, first, ends = len(rows[next(iter(rows))]), next(iter(rows)), torch.tensor([0.025, 0.975]).double()
    again = torch.randint(count, (1000, count), generator=torch.Generator().manual_seed(seed))
    # (1000, orders, 2)
    drawn = {name: inside.relative_strength(row[again]) for name, row in rows.items()}
    middle = torch.tensor([0.15 < share < 0.85 for share in shares])
    lines, found, panels = [about], {}, []
    for k, kind in enumerate(("as released: mean |I|", "unbiased: root of the product of two halves of the contexts")):
        lines += ["", f"J, {kind}", "", "| weights, at m/(n-2) = | " + " | ".join(f"{s:.2f}" for s in shares)
                  + f" | middle: 0.2 to 0.8 | less that of {first} |", "|---" * (len(shares) + 3) + "|"]
        found[kind.split(":")[0]] = series = {}
        for name, row in rows.items():
            j, bars = inside.relative_strength(row)[:, k], drawn[name][..., k].quantile(ends, 0)
            series[name] = list(zip(shares, j.tolist(), *bars.tolist()))
            mean = lambda x: x[..., middle, k].mean(-1)
            low, high = mean(drawn[name]).quantile(ends).tolist()
            entry = f"{j[middle].mean():.2f} ({low:.2f} to {high:.2f})"
            low, high = (mean(drawn[name]) - mean(drawn[first])).quantile(ends).tolist()
            less = (mean(inside.relative_strength(row)) - mean(inside.relative_strength(rows[first]))).item()
            less = "" if name == first else f"{less:+.2f} ({low:+.2f} to {high:+.2f})"
            strengths = " | ".join(f"{x:.2f}" for x in j)
            lines.append(f"| {name} | {strengths} | {entry} | {less} |")
        panels.append(Panel(f"interactions, {kind.split(':')[0]}",
                            "order: share of the other patches that are seen",
                            "J: strength, over its mean over orders", series, floor=0.0))
    return lines, found, panels


# ---- occlusion ----

def occlusion(args: SimpleNamespace, world: Distributed) -> Result:
    """Top-1 with a share of the patches filled (at random, the object's first, or the object's
    last), and with pieces shuffled."""
    size, grid = height_width(args.image_size), grid_of(args)
    patches, data = math.prod(grid), inside.load_images(args, size, args.images)
    counts = [k * patches // 10 for k in range(10)]
    cuts = [g for g in (1, 2, 4, 8) if not any(side % g for side in size)]
    nets = {name: inside.load(file, args, size, world, data.classes) for name, file in args.weights.items()}
    if args.saliency_from not in (None, *nets):
        typed = printable(args.saliency_from)
        raise ValueError(f"--saliency-from {typed}: must be one of {', '.join(nets)}")
    judge = args.saliency_from or (next(iter(nets)) if data.covered is None else None)
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), world.device)
    mine, rows = list(range(world.rank, len(data.images), world.size)), {name: [] for name in nets}
    parts = [mine[first:first + BATCH] for first in range(0, len(mine), BATCH)]
    bar = tqdm(total=len(parts) * (1 + SEEDS * (3 * len(counts[1:]) + len(cuts[1:]))), unit="batch", disable=args.quiet)
    for part in parts:
        images, labels = normalise(data.images[part], world.device), data.labels[part].to(world.device)
        matter = (inside.relevance(images, labels, grid, nets[judge]) if judge else
                  inside.per_patch(data.covered[part], grid))             # (B, patches)
        hits = {name: torch.zeros(len(part), 4, SEEDS, len(counts)) for name in nets}

        @torch.no_grad()
        def see(x: Tensor, kind: int | slice, seed: int | slice, step: int) -> None:
            for name, net in nets.items():                   # the same images for all weights
                hit = (net(x).argmax(1) == labels).float().cpu()
                hits[name][:, kind, seed, step] = hit[:, None, None] if isinstance(kind, slice) else hit
            bar.update()

        def noise(seed: int, count: int) -> Tensor:          # of an image and a seed: (B, count)
            of = lambda i: torch.Generator().manual_seed(seed_for(args.seed, seed, count, data.indices[i]))
            return torch.stack([torch.rand(count, generator=of(i)) for i in part])

        see(images, slice(None), slice(None), 0)             # nothing taken away, nothing moved
        for seed in range(SEEDS):
            orders = inside.patch_orders(matter, noise(seed, patches))
            for kind, order in enumerate(orders.values()):
                for step, count in enumerate(counts[1:], 1):
                    mask = inside.hidden_first(order, count, grid).to(world.device)
                    see(torch.where(resize_mask(mask, size), black, images) if args.fill == "black"
                        else fill_hidden(images, mask, args.fill), kind, seed, step)
            for step, g in enumerate(cuts[1:], 1):
                see(inside.shuffled(images, g, noise(seed, g * g)), 3, seed, step)
        for name in nets:
            rows[name] += hits[name].unbind()
    bar.close()
    by_seed = {name: 100 * inside.gather(row, len(data.images), world).mean(0)  # (4, seeds, 10)
               for name, row in rows.items()}
    shares = [count / patches for count in counts]
    by = "the object's pixels" if judge is None else f"{judge}'s gradient"
    lines = [f"top-1 in percent of {len(data.images)} images, {grid[0]} x {grid[1]} patches, "
             f"hidden ones filled with {args.fill}; mean of {SEEDS} seeds; patches ranked by {by}; "
             f"area: mean of the curve over its shares"]
    found, panels = {}, []
    kinds = ("random patches", "salient patches first", "the rest first", "shuffled")
    for k, kind in enumerate(kinds):
        xs, what = shares, "share of patches hidden"
        if kind == "shuffled":
            xs, what = list(range(len(cuts))), "pieces a side"
        lines += ["", f"| {kind}: {what} | " + " | ".join(f"{s:.2f}" for s in shares) + " | area |" if k < 3 else
                  f"| {kind}: {what} | " + " | ".join(map(str, cuts)) + " |", "|---" * (len(xs) + 1 + (k < 3)) + "|"]
        found[kind] = {}
        for name, top1 in by_seed.items():
            mean, std = top1[k].mean(0)[:len(xs)], top1[k].std(0)[:len(xs)]
            area = torch.trapezoid(mean, torch.tensor(xs).double()).item() / xs[-1]
            found[kind][name] = dict(top1=mean.tolist(), std=std.tolist(), x=xs if k < 3 else cuts, area=area)
            lines.append(f"| {name} | " + " | ".join(f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, std))
                         + f" | {area:.1f} |" * (k < 3) + " |" * (k == 3))
        series = {name: [(x, m, m - s, m + s) for x, m, s in zip(xs, f["top1"], f["std"])]
                  for name, f in found[kind].items()}
        panels.append(Panel(kind, what, "top-1, percent", series, floor=0.0,
                            ticks=dict(zip(xs, map(str, cuts))) if k == 3 else {}))
    return lines, found, panels


# ---- mim ----

def mim(args: SimpleNamespace, world: Distributed) -> Result:
    """The spectrum of the residual, and how hard the terms of the loss pull: by frequency, and on the decoder."""
    runs = {"start": "random"} | {name: file for name, file in args.weights.items() if file != "random"}
    run = load_model(list(runs.values())[-1])[1]             # every process does the same
    data, found, panels = inside.load_images(args, height_width(run.image_size), args.images, labelled=False), {}, []
    batches = [b for b in (4, 16, 64, 256) if b <= len(data.images)] or [len(data.images)]
    terms = ("pixels", "Fourier, per image", "Fourier, of the batch")
    lines = ["| weights | images in a batch | power of their mean residual, over that of each | "
             + " | ".join(f"pull of {term}" for term in terms) + " |", "|---" * 6 + "|"]
    for name, file in tqdm(runs.items(), "mim", disable=args.quiet):
        torch.manual_seed(seed_for(run.seed))  # `random`: what the run itself started from
        model, own = (build_model(run), run) if file == "random" else load_model(file)
        if height_width(own.image_size) != height_width(run.image_size):
            sizes = f"of {format_size(own.image_size)}, the last of {format_size(run.image_size)}"
            raise ValueError(f"--weights: {printable(file)}: {sizes}; give one size")
        model, images = model.to(world.device).train(), normalise(data.images, world.device)
        generator = torch.Generator().manual_seed(args.seed)
        mask = random_mask(len(images), model.grid, own.mask_ratio, generator=generator).to(world.device)
        with torch.no_grad():                                # (N, 3, H, W)
            hidden = resize_mask(mask, images.shape[-2:])    # (N, 1, H, W)
            r = residual(model(images, mask), images, hidden, own.stand_in, own.visible_weight)
        frequency, each, total = inside.bands(inside.spectrum(r))
        log = lambda values: list(zip(frequency, values.clamp(min=1e-20).log10().tolist()))
        power, norms = {"each image": log(each)}, []
        for b in batches:
            pairs = list(zip(images.split(b), mask.split(b)))[:len(images) // b]
            of_mean = inside.bands(inside.spectrum(r[:len(pairs) * b].unflatten(0, (-1, b)).mean(1)))
            power[f"mean of {b}"] = log(of_mean[1])
            pulls = [inside.pulls(model, own, *pair) for pair in pairs]
            norms.append([sum(pull[k][0] for pull in pulls) / len(pulls) for k in range(3)])
            by_frequency = {term: log(inside.bands(inside.spectrum(torch.cat([pull[k][1] for pull in pulls])))[1])
                            for k, term in enumerate(terms)}
            lines.append(f"| {name} | {b} | {of_mean[2].sum() / total.sum():.3f} | "
                         + " | ".join(f"{norm:.3g}" for norm in norms[-1]) + " |")
        found[name] = dict(log10_power=power, log10_pull=by_frequency, batches=batches, pull_on_decoder=norms)
        panels += [Panel(f"{name}: power of the residual", "|frequency|, in pi", "log10 of the power", power),
                   Panel(f"{name}: pull on the reconstructions, batch {b}", "|frequency|, in pi",
                         "log10 of the gradient's power", by_frequency),
                   Panel(f"{name}: pull on the decoder", "images in a batch", "log10 of the gradient's norm",
                         {term: [(i, math.log10(max(n[k], 1e-20))) for i, n in enumerate(norms)]
                          for k, term in enumerate(terms)}, ticks=dict(enumerate(map(str, batches))))]
    lines += ["", f"{len(data.images)} images. Of independent residuals the mean of B has 1/B of the power. Pulls: "
              "norms of the gradients on the decoder, weighted as in the run."]
    return lines, found, [panel for kind in range(3) for panel in panels[kind::3]]


# ---- the command ----

def analyse(args: SimpleNamespace, world: Distributed) -> None:
    """Runs one analysis; rank 0 writes. Raises ValueError for a mistake."""
    world.set_device(args.device)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group(world.backend, store=world.rendezvous_store(), rank=world.rank, world_size=world.size)
    args.quiet = world.rank > 0
    out = Path(world.broadcast_from_rank0(lambda: choose_folder(args)))
    lines, found, panels = ANALYSES[args.what](args, world)
    if world.rank == 0:
        print("\n".join(lines))
        settings = {k: v for k, v in vars(args).items() if k not in ("settings", "quiet")}
        results = json.dumps(dict(args=settings, found=found), indent=1)
        with writing(out / "table.md"):
            (out / "table.md").write_text("\n".join(lines) + "\n")
            (out / "results.json").write_text(results + "\n")
            charts(panels).save(out / "plot.png", optimize=True)
        world.print0(f"written to {printable(str(out))}/: table.md, results.json, plot.png")


def choose_folder(args: SimpleNamespace) -> str:
    """--out, or runs/analyze-<what>, numbered if taken.

    Raises ValueError if nothing can be written there, or no plot can be drawn."""
    out = Path(args.out) if args.out else free_name(Path("runs") / f"analyze-{args.what}")
    check_folder(out)
    check_matplotlib()
    return str(out)


ANALYSES = {f.__name__: f for f in (fourier, interactions, occlusion, mim)}
count = number(int, 1)
FLAGS = {
    "what is looked at": {
        "data": ("shapes", path("DIR"), f"a folder of images (a folder per class), or one of {', '.join(NAMED)}"),
        "data_root": ("datasets", path("DIR"), "where torchvision's datasets are kept"),
        "images": (None, number(int, 2), "how many: " + ", ".join(f"{name} {n}" for name, n in IMAGES.items())),
        "image_size": (None, SIDES, "side in pixels, or height and width (of the first weights, else 96)"),
        "arch": (None, checked("NAME", get_family), "backbone (from args.json beside the weights)"),
        "patch_size": (None, count, "ViT only (as trained)"),
        "window": (None, count, "Swin only (as trained)"),
        "stem": (None, STEMS, "ResNet only (as trained)")},
    "interactions and occlusion": {
        "grid": (8, number(int, 2, 64), "patches along the shorter side"),
        "pairs": (6, count, "pairs of patches of an image"),
        "contexts": (10, number(int, 2), "sets of other patches, of a pair and order"),
        "fill": ("black", ("black", "zero", "mean"), "of hidden patches; A2MIM has seen "
                 "mean in pre-training"),
        "saliency_from": (None, path("NAME"), "weights whose gradient ranks the patches (the "
                          "object of a drawn image, otherwise the first)")},
    "run": {
        "device": RUN_FLAGS["device"],
        "quick": (False, SWITCH, "an eighth of the images: shows that it works"),
        "seed": (0, number(int, 0, 2**63 - 1),
                 "fixes images, pairs, contexts, masks, random weights"),
        "out": (None, path("DIR"), "runs/analyze-<what>, numbered if taken")},
}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags, and the settings of every file of weights. Raises ValueError for a value that is off."""
    parser = Parser("analyze.py", "%(prog)s {fourier,interactions,occlusion,mim} --weights NAME=FILE ... [options]",
                    __doc__, FLAGS, {})
    parser.epilog = None
    parser.add_argument("what", choices=ANALYSES)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="files, or random")
    given = vars(parser.parse_args(argv))
    args = SimpleNamespace(**{**defaults(FLAGS), **given})
    split = [text.partition("=")[::2] for text in args.weights]
    named = [(printable(name), file) for name, file in split]    # names stand in every table
    if not all(name and file for name, file in named) or len(dict(named)) < len(named):
        typed = printable(" ".join(args.weights))
        raise ValueError(f"--weights {typed}: must be different names with a file each, "
                         "as in a=FILE")
    args.weights = dict(named)
    files = [f for f in args.weights.values() if f != "random"]
    names = ("arch", "patch_size", "window", "stem", "image_size")
    if args.what == "mim" and not files:
        raise ValueError("--weights: mim needs a checkpoint.pt of pretrain.py; `random`, its start, comes by itself")
    typed = {name: given[name] for name in names if name in given}
    # it takes one flag, without what else must be there
    alone = Parser("analyze.py", "", "", FLAGS, {})
    args.settings = {f: dict(patch_size=16, window=7, stem=None) | remembered(f, alone, names) | typed for f in files}
    first = args.settings[files[0]] if files else dict(arch="resnet18", patch_size=16, window=7, stem=None) | typed
    args.settings["random"] = first
    args.image_size = first.get("image_size", 96)
    for file, own in args.settings.items():
        if file != "random" and not Path(file).is_file():
            raise ValueError(f"--weights: {printable(file)}: no such file, or no regular file")
        if "arch" not in own and args.what != "mim":
            raise ValueError(f"--arch is missing: no args.json beside {printable(file)} names it; "
                             "try --arch resnet18")
    args.images = args.images or max(4, IMAGES[args.what] // (8 if args.quick else 1))
    return args


def main(argv: list[str] | None = None) -> None:
    command_line("analyze.py", parse, analyse, argv)


if __name__ == "__main__":
    main()
