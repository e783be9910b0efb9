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
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import NAMED, normalise, seed_for
from engine.command import Failed, Distributed, command_line
from engine.files import printable
from engine.flags import (COUNT, RUN_FLAGS, SIDES, SWITCH, Parser, checked, defaults,
                          format_size, height_width, number, path, remembered)
from extras import inside
from extras.chart import Panel, charts, check_matplotlib
from extras.output import check_folder, free_name, writing
from extras.reconstruct import build_model, load_model
from loss import residual
from masking import fill_hidden, mask_grid, random_mask, resize_mask
from model import STEMS, get_family

# orders of an interaction: how many of the other patches are seen, as a share
ORDERS = (0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1)
SEEDS = 3                                                    # of an occlusion
IMAGES = {"fourier": 200, "interactions": 24, "occlusion": 200, "mim": 64}
BATCH = 128                                                  # images per forward pass

Result = tuple[list[str], dict, list[Panel]]                 # lines of table.md, results.json, plot


def table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table_head(cells: list[str]) -> list[str]:
    return [table_row(cells), "|---" * len(cells) + "|"]


# ---- fourier ----

@torch.no_grad()
def fourier(args: SimpleNamespace, world: Distributed) -> Result:
    """The log amplitude along the diagonal and the variance over positions, at every depth."""
    size = height_width(args.image_size)
    if size[0] != size[1]:
        raise ValueError(f"--image-size {size[0]} {size[1]}: the diagonal is that of square maps; "
                         f"give one number")
    data = inside.load_images(args, size, args.images, labelled=False)
    mine = list(range(world.rank, len(data.images), world.size))
    found = {}
    for name, file in args.weights.items():
        encoder = inside.load(file, args, size, world)
        rows = []                                            # of an image: the values of all depths
        for first in tqdm(range(0, max(1, len(mine)), 16), name, unit="batch", disable=args.quiet):
            part = mine[first:first + 16]
            seen = []

            def see(title: str, z: Tensor) -> None:          # z (B, C, h, w)
                positions = z.shape[2] * z.shape[3]          # of a single one the variance is 0
                variance = z.float().var((2, 3), correction=int(positions > 1))
                variance = variance.mean(1, keepdim=True)    # (B, 1)
                values = torch.cat([inside.log_amplitude(z), variance], 1)
                seen.append((title, min(z.shape[2:]), values))

            # a process without an image of its own takes the first, to know the depths
            with inside.tapped(encoder, see):
                encoder(normalise(data.images[part or [0]], world.device))
            depths = [(title, side) for title, side, _ in seen]
            if part:
                rows += torch.cat([values for *_, values in seen], 1).unbind()
        means = iter(inside.gather(rows, len(data.images), world).mean(0).tolist())
        found[name] = []
        for title, side in depths:
            curve = [(2 * k / side, next(means)) for k in range(math.ceil(side / 2))]
            found[name].append(dict(depth=title, side=side, curve=curve, variance=next(means)))
    return fourier_report(found, len(data.images))


def fourier_report(found: dict[str, list[dict]], count: int) -> Result:
    """Table and plots of the depths of each net: depth, side, curve and variance."""
    lines = table_head(["weights", "depth", "side of map", "highest frequency",
                        "log amplitude there, less that at 0", "variance"])
    for name, depths in found.items():
        for d in depths:
            frequency, high = d["curve"][-1]
            shown = [f"{frequency:.3f} pi", f"{high:.2f}"] if d["side"] > 3 else ["-", "-"]
            cells = [name, d["depth"], str(d["side"]), *shown, f"{d['variance']:.3g}"]
            lines.append(table_row(cells))
    lines += ["", f"{count} images. Maps of 3 x 3 and less are left out of the curves. The highest "
              "frequency depends on a map's side: where that changes with depth, different "
              "frequencies are compared."]

    amplitude, variance = {}, {}                             # name -> (depth in [0, 1], value)
    panels = []
    for name, depths in found.items():
        large = [(i, d) for i, d in enumerate(depths) if d["side"] > 3]
        curves = {d["depth"]: d["curve"] for _, d in large}
        panels.append(Panel(f"{name}, by depth", "frequency on the diagonal, in pi",
                            "log amplitude less that at 0", curves, ramp=True))
        deepest = max(1, len(depths) - 1)
        amplitude[name] = [(i / deepest, d["curve"][-1][1]) for i, d in large]
        variance[name] = [(i / deepest, math.log10(d["variance"] + 1e-12)) for i, d in large]
    depth = "depth, 0 = first, 1 = last"
    panels.append(Panel("at the highest frequency", depth, "log amplitude less that at 0",
                        amplitude))
    panels.append(Panel("variance over positions", depth,
                        "log10 of the variance, mean over channels", variance))
    return lines, found, panels


# ---- interactions ----

def grid_of(args: SimpleNamespace) -> tuple[int, int]:
    """--grid square patches along the shorter side.

    Raises ValueError if they do not divide the image."""
    low, high = sorted(height_width(args.image_size))
    fit = [g for g in range(2, low + 1) if low % g == 0 and high % (low // g) == 0]
    if args.grid not in fit:
        few = ", ".join(str(g) for g in fit if g < 17)
        cure = f"use one of {few}" if few else "use another --image-size"
        raise ValueError(f"--grid {args.grid}: does not divide a side of "
                         f"{format_size(args.image_size)}; {cure}")
    return mask_grid(height_width(args.image_size), low // args.grid)


@torch.no_grad()
def interactions(args: SimpleNamespace, world: Distributed) -> Result:
    """J by order, on images that all weights but random ones classify correctly.

    Patches that are not seen have ImageNet's mean colour. The order m of a share r of the other
    n - 2 patches is round((n - 2) r). The released code truncates, int((n - 2) r): with n = 64,
    three of the nine ORDERS (0.35, 0.8 and 0.95) have one patch less there."""
    size, grid = height_width(args.image_size), grid_of(args)
    patches = math.prod(grid)
    data = inside.load_images(args, size, 10 * args.images)
    nets = {}
    for name, file in args.weights.items():
        nets[name] = inside.load(file, args, size, world, data.classes)
    right = torch.ones(len(data.labels), dtype=torch.bool)
    for name, net in nets.items():
        if args.weights[name] == "random":
            continue                                         # right by chance only
        guesses = []
        for batch in data.images.split(BATCH):
            guesses.append(net(normalise(batch, world.device)).argmax(1).cpu())
        right &= torch.cat(guesses) == data.labels
    chosen = right.nonzero()[:, 0].tolist()[:args.images]
    if not chosen:
        raise Failed(f"none of {len(right)} images is classified correctly by all of "
                     f"{', '.join(nets)}")
    orders = sorted({round(share * (patches - 2)) for share in ORDERS})
    mine = chosen[world.rank::world.size]
    rows = {}
    bar = tqdm(total=len(nets) * len(mine), unit="image", disable=args.quiet)
    for name, net in nets.items():
        rows[name] = []
        for i in mine:
            image = normalise(data.images[i, None], world.device)            # (1, 3, H, W)
            label = data.labels[i, None]                     # (1,)

            def v(kept: Tensor) -> Tensor:                   # (B, patches) -> (B,)
                odds = []
                for part in kept.to(world.device).view(-1, *grid).split(BATCH):
                    shown = fill_hidden(image.expand(len(part), -1, -1, -1), ~part, "zero")
                    logits = net(shown).cpu().double()
                    odds.append(inside.log_odds(logits, label.expand(len(part))))
                return torch.cat(odds)

            # the same pairs and contexts for all weights
            key = (args.seed, data.indices[i])
            pairs = inside.near_pairs(grid, args.pairs, np.random.default_rng(key))
            found = []
            for m in orders:
                rng = np.random.default_rng((*key, m))
                of = inside.interactions_of(v, patches, pairs, m, args.contexts, rng)
                found.append(torch.stack([of[:, 0].abs().mean(), (of[:, 1] * of[:, 2]).mean()]))
            rows[name].append(torch.stack(found))            # (orders, 2)
            bar.update()
    bar.close()
    for name in rows:
        rows[name] = inside.gather(rows[name], len(chosen), world)           # (images, orders, 2)
    shares = [m / (patches - 2) for m in orders]
    about = (f"{len(chosen)} of the {int(right.sum())} images (of {len(right)}) that all weights "
             f"but random ones classify correctly; {grid[0]} x {grid[1]} patches; {args.pairs} "
             f"pairs, {args.contexts} contexts; ranges: 95 % of a bootstrap over images")
    return compared(rows, shares, about, args.seed)


def compared(rows: dict[str, Tensor], shares: list[float], about: str, seed: int) -> Result:
    """Tables and plots of J, with a bootstrap that draws the same images for all weights.

    rows: name -> (images, orders, 2), the means over pairs of |I| and of the product of halves."""
    first = next(iter(rows))
    count = len(rows[first])
    ends = torch.tensor([0.025, 0.975]).double()
    again = torch.randint(count, (1000, count), generator=torch.Generator().manual_seed(seed))
    strength, drawn = {}, {}
    for name, row in rows.items():
        strength[name] = inside.relative_strength(row)                       # (orders, 2)
        drawn[name] = inside.relative_strength(row[again])                   # (1000, orders, 2)
    middle = torch.tensor([0.15 < share < 0.85 for share in shares])

    lines, found, panels = [about], {}, []
    for k, (kind, how) in enumerate((
        ("as released", "mean |I|"),
        ("unbiased", "root of the product of two halves of the contexts"),
    )):
        def in_the_middle(j: Tensor) -> Tensor:              # (..., orders, 2) -> (...)
            return j[..., middle, k].mean(-1)

        head = ["weights, at m/(n-2) =", *(f"{share:.2f}" for share in shares),
                "middle: 0.2 to 0.8", f"less that of {first}"]
        lines += ["", f"J, {kind}: {how}", "", *table_head(head)]
        series = {}
        for name in rows:
            j = strength[name][:, k]
            lowest, highest = drawn[name][..., k].quantile(ends, 0).tolist()
            series[name] = list(zip(shares, j.tolist(), lowest, highest))
            low, high = in_the_middle(drawn[name]).quantile(ends).tolist()
            entry = f"{j[middle].mean():.2f} ({low:.2f} to {high:.2f})"
            less = ""
            if name != first:
                difference = in_the_middle(strength[name]) - in_the_middle(strength[first])
                of_drawn = in_the_middle(drawn[name]) - in_the_middle(drawn[first])
                low, high = of_drawn.quantile(ends).tolist()
                less = f"{difference.item():+.2f} ({low:+.2f} to {high:+.2f})"
            lines.append(table_row([name, *(f"{x:.2f}" for x in j), entry, less]))
        found[kind] = series
        panels.append(Panel(f"interactions, {kind}",
                            "order: share of the other patches that are seen",
                            "J: strength, over its mean over orders", series, floor=0.0))
    return lines, found, panels


# ---- occlusion ----

def occlusion(args: SimpleNamespace, world: Distributed) -> Result:
    """Top-1 with a share of the patches filled (at random, the object's first, or the object's
    last), and with pieces shuffled."""
    size, grid = height_width(args.image_size), grid_of(args)
    patches = math.prod(grid)
    data = inside.load_images(args, size, args.images)
    counts = [k * patches // 10 for k in range(10)]
    cuts = [g for g in (1, 2, 4, 8) if not any(side % g for side in size)]
    nets = {}
    for name, file in args.weights.items():
        nets[name] = inside.load(file, args, size, world, data.classes)
    if args.saliency_from not in (None, *nets):
        typed = printable(args.saliency_from)
        raise ValueError(f"--saliency-from {typed}: must be one of {', '.join(nets)}")
    judge = args.saliency_from
    if judge is None and data.covered is None:
        judge = next(iter(nets))
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), world.device)
    mine = list(range(world.rank, len(data.images), world.size))
    rows = {name: [] for name in nets}
    parts = [mine[first:first + BATCH] for first in range(0, len(mine), BATCH)]
    passes = 1 + SEEDS * (3 * len(counts[1:]) + len(cuts[1:]))
    bar = tqdm(total=len(parts) * passes, unit="batch", disable=args.quiet)
    for part in parts:
        images = normalise(data.images[part], world.device)
        labels = data.labels[part].to(world.device)
        if judge is None:
            matter = inside.per_patch(data.covered[part], grid)              # (B, patches)
        else:
            matter = inside.relevance(images, labels, grid, nets[judge])     # (B, patches)
        hits = {name: torch.zeros(len(part), 4, SEEDS, len(counts)) for name in nets}

        @torch.no_grad()
        def is_right(net, x: Tensor) -> Tensor:              # (B,)
            return (net(x).argmax(1) == labels).float().cpu()

        def see(x: Tensor, kind: int, seed: int, step: int) -> None:
            for name, net in nets.items():                   # the same images for all weights
                hits[name][:, kind, seed, step] = is_right(net, x)
            bar.update()

        def noise(seed: int, count: int) -> Tensor:
            """(B, count), fixed by the image and the seed."""
            drawn = []
            for i in part:
                key = seed_for(args.seed, seed, count, data.indices[i])
                generator = torch.Generator().manual_seed(key)
                drawn.append(torch.rand(count, generator=generator))
            return torch.stack(drawn)

        def filled(mask: Tensor) -> Tensor:
            if args.fill == "black":
                return torch.where(resize_mask(mask, size), black, images)
            return fill_hidden(images, mask, args.fill)

        # nothing hidden, nothing moved: the same for all kinds and seeds
        for name, net in nets.items():
            hits[name][:, :, :, 0] = is_right(net, images)[:, None, None]
        bar.update()
        for seed in range(SEEDS):
            orders = inside.patch_orders(matter, noise(seed, patches))
            for kind, order in enumerate(orders.values()):
                for step, count in enumerate(counts[1:], 1):
                    mask = inside.hidden_first(order, count, grid).to(world.device)
                    see(filled(mask), kind, seed, step)
            for step, g in enumerate(cuts[1:], 1):
                see(inside.shuffled(images, g, noise(seed, g * g)), 3, seed, step)
        for name in nets:
            rows[name] += hits[name].unbind()
    bar.close()
    by_seed = {}
    for name, row in rows.items():
        by_seed[name] = 100 * inside.gather(row, len(data.images), world).mean(0)  # (4, seeds, 10)
    by = "the object's pixels" if judge is None else f"{judge}'s gradient"
    about = (f"top-1 in percent of {len(data.images)} images, {grid[0]} x {grid[1]} patches, "
             f"hidden ones filled with {args.fill}; mean of {SEEDS} seeds; patches ranked by {by}; "
             f"area: mean of the curve over its shares")
    return occlusion_report(by_seed, [count / patches for count in counts], cuts, about)


def occlusion_report(by_seed: dict[str, Tensor], shares: list[float], cuts: list[int],
                     about: str) -> Result:
    """Tables and plots of top-1.

    by_seed: name -> (4, seeds, 10), top-1 of each kind, seed and share (or cut, for `shuffled`)."""
    lines, found, panels = [about], {}, []
    kinds = ("random patches", "salient patches first", "the rest first", "shuffled")
    for k, kind in enumerate(kinds):
        is_shuffled = kind == "shuffled"
        if is_shuffled:
            xs, what = list(range(len(cuts))), "pieces a side"
            head = [f"{kind}: {what}", *map(str, cuts)]
        else:
            xs, what = shares, "share of patches hidden"
            head = [f"{kind}: {what}", *(f"{share:.2f}" for share in shares), "area"]
        lines += ["", *table_head(head)]
        found[kind], series = {}, {}
        for name, top1 in by_seed.items():
            mean, std = top1[k].mean(0)[:len(xs)], top1[k].std(0)[:len(xs)]
            found[kind][name] = dict(top1=mean.tolist(), std=std.tolist(),
                                     x=cuts if is_shuffled else xs)
            cells = [name, *(f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, std))]
            if not is_shuffled:                              # the cuts are no quantity
                area = torch.trapezoid(mean, torch.tensor(xs).double()).item() / xs[-1]
                found[kind][name]["area"] = area
                cells.append(f"{area:.1f}")
            lines.append(table_row(cells))
            series[name] = [(x, m, m - s, m + s)
                            for x, m, s in zip(xs, mean.tolist(), std.tolist())]
        ticks = dict(zip(xs, map(str, cuts))) if is_shuffled else {}
        panels.append(Panel(kind, what, "top-1, percent", series, floor=0.0, ticks=ticks))
    return lines, found, panels


# ---- mim ----

def mim(args: SimpleNamespace, world: Distributed) -> Result:
    """The spectrum of the residual, and the gradients of the terms of the loss: by frequency, and
    on the decoder."""
    runs = {"start": "random"}
    runs |= {name: file for name, file in args.weights.items() if file != "random"}
    last = list(runs.values())[-1]
    _, run = load_model(last)                                # every process does the same
    data = inside.load_images(args, height_width(run.image_size), args.images, labelled=False)
    images = normalise(data.images, world.device)            # (N, 3, H, W)
    batches = [b for b in (4, 16, 64, 256) if b <= len(images)] or [len(images)]
    terms = ("pixels", "Fourier, per image", "Fourier, of the batch")
    lines = table_head(["weights", "images in a batch",
                        "power of their mean residual, over that of each",
                        *(f"pull of {term}" for term in terms)])
    found, panels = {}, []
    for name, file in tqdm(runs.items(), "mim", disable=args.quiet):
        torch.manual_seed(seed_for(run.seed))                # `random`: as pretrain.py draws them
        model, own = (build_model(run), run) if file == "random" else load_model(file)
        if height_width(own.image_size) != height_width(run.image_size):
            sizes = f"of {format_size(own.image_size)}, the last of {format_size(run.image_size)}"
            raise ValueError(f"--weights: {printable(file)}: {sizes}; give one size")
        model = model.to(world.device).train()
        generator = torch.Generator().manual_seed(args.seed)
        mask = random_mask(len(images), model.grid, own.mask_ratio, generator=generator)
        mask = mask.to(world.device)
        with torch.no_grad():
            hidden = resize_mask(mask, images.shape[-2:])    # (N, 1, H, W)
            r = residual(model(images, mask), images, hidden, own.stand_in, own.visible_weight)
        frequency, each, total = inside.bands(inside.spectrum(r))

        def by_frequency(values: Tensor) -> list[tuple[float, float]]:
            return list(zip(frequency, values.clamp(min=1e-20).log10().tolist()))

        power, norms = {"each image": by_frequency(each)}, []
        for b in batches:
            pairs = list(zip(images.split(b), mask.split(b)))[:len(images) // b]
            mean_residual = r[:len(pairs) * b].unflatten(0, (-1, b)).mean(1)
            _, of_mean, total_of_mean = inside.bands(inside.spectrum(mean_residual))
            power[f"mean of {b}"] = by_frequency(of_mean)
            pulls = [inside.pulls(model, own, *pair) for pair in pairs]
            norms.append([])
            pull_by_frequency = {}                           # of the largest batch, in the end
            for k, term in enumerate(terms):
                norms[-1].append(sum(pull[k][0] for pull in pulls) / len(pulls))
                gradients = torch.cat([pull[k][1] for pull in pulls])
                _, mean, _ = inside.bands(inside.spectrum(gradients))
                pull_by_frequency[term] = by_frequency(mean)
            share = total_of_mean.sum() / total.sum()
            pulls_shown = [f"{norm:.3g}" for norm in norms[-1]]
            lines.append(table_row([name, str(b), f"{share:.3f}", *pulls_shown]))
        found[name] = dict(log10_power=power, log10_pull=pull_by_frequency, batches=batches,
                           pull_on_decoder=norms)

        on_decoder = {}
        for k, term in enumerate(terms):
            of_term = [max(norm[k], 1e-20) for norm in norms]
            on_decoder[term] = [(i, math.log10(norm)) for i, norm in enumerate(of_term)]
        panels += [
            Panel(f"{name}: power of the residual", "|frequency|, in pi", "log10 of the power",
                  power),
            Panel(f"{name}: pull on the reconstructions, batch {batches[-1]}",
                  "|frequency|, in pi", "log10 of the gradient's power", pull_by_frequency),
            Panel(f"{name}: pull on the decoder", "images in a batch",
                  "log10 of the gradient's norm", on_decoder,
                  ticks=dict(enumerate(map(str, batches)))),
        ]
    lines += ["", f"{len(images)} images. Of independent residuals the mean of B has 1/B of the "
              "power. Pulls: norms of the gradients on the decoder, weighted as in the run (by 0.5 "
              "if the run has no Fourier loss)."]
    return lines, found, [panel for kind in range(3) for panel in panels[kind::3]]


# ---- the command ----

def analyse(args: SimpleNamespace, world: Distributed) -> None:
    """Runs one analysis; rank 0 writes. Raises ValueError for a mistake."""
    world.set_device(args.device)
    world.join()
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
FLAGS = {
    "what is looked at": {
        "data": ("shapes", path("DIR"),
                 f"a folder of images (a folder per class), or one of {', '.join(NAMED)}"),
        "data_root": ("datasets", path("DIR"), "where torchvision's datasets are kept"),
        "images": (None, number(int, 2),
                   "how many: " + ", ".join(f"{name} {n}" for name, n in IMAGES.items())),
        "image_size": (None, SIDES,
                       "side in pixels, or height and width (of the first weights, else 96)"),
        "arch": (None, checked("NAME", get_family), "backbone (from args.json beside the weights)"),
        "patch_size": (None, COUNT, "ViT only (as trained)"),
        "window": (None, COUNT, "Swin only (as trained)"),
        "stem": (None, STEMS, "ResNet only (as trained)"),
    },
    "interactions and occlusion": {
        "grid": (8, number(int, 2, 64), "patches along the shorter side"),
        "pairs": (6, COUNT, "interactions: pairs of patches of an image"),
        "contexts": (10, number(int, 2), "interactions: sets of other patches, per pair and order"),
        "fill": ("black", ("black", "zero", "mean"),
                 "occlusion: of hidden patches; A2MIM has seen mean in pre-training"),
        "saliency_from": (None, path("NAME"),
                          "occlusion: weights whose gradient ranks the patches (the object of a "
                          "drawn image, otherwise the first)"),
    },
    "run": {
        "device": RUN_FLAGS["device"],
        "quick": (False, SWITCH, "an eighth of the images: shows that it works"),
        "seed": (0, number(int, 0, 2**63 - 1),
                 "fixes images, pairs, contexts, masks, random weights"),
        "out": (None, path("DIR"), "runs/analyze-<what>, numbered if taken"),
    },
}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """The flags, and the settings of every file of weights. Raises ValueError for a mistake."""
    usage = ("%(prog)s {fourier,interactions,occlusion,mim} --weights NAME=FILE ... "
             "[options]")
    parser = Parser("analyze.py", usage, __doc__, FLAGS, {})
    parser.add_argument("what", choices=ANALYSES)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE",
                        help="files, or random")
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
    if args.what == "mim" and "start" in args.weights:
        raise ValueError("--weights start=...: `start` is the name of the random weights that mim "
                         "adds; choose another name")
    if args.what == "mim" and not files:
        raise ValueError("--weights: mim needs a checkpoint.pt of pretrain.py; `random`, its "
                         "start, comes by itself")
    typed = {name: given[name] for name in names if name in given}
    by_default = dict(patch_size=16, window=7, stem=None)
    args.settings = {}
    for file in files:
        args.settings[file] = by_default | remembered(file, FLAGS, names) | typed
    if files:
        first = args.settings[files[0]]
    else:
        first = dict(arch="resnet18") | by_default | typed
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
