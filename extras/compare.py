"""How much does pre-training help? Pre-trains, fine-tunes and probes with several seeds.

    python extras/compare.py                            ResNet-18 on `shapes`, an hour on 2 CPU cores
    python extras/compare.py --arch deit_tiny           a small Transformer
    python extras/compare.py --data /path/to/classes    real images: train/<class>/, val/<class>/
    python extras/compare.py --task segment             a class per pixel, on drawn scenes
    python extras/compare.py --task detect              boxes and masks, on drawn scenes
    python extras/compare.py --quick                    the same in small, under 5 minutes

Four starts get the same fine-tuning:

    A2MIM
    SimMIM         `--baseline simmim`
    scratch        random weights
    scratch-long   random weights; the compute of pre-training is added to fine-tuning

They are fine-tuned with few labels and with all labels. A linear probe and k-NN measure the frozen
features. Differences are paired by seed and have a 95 % interval. Then follow the paper's
ablations, one change at a time. With --task, pre-training sees scenes without labels, and there is
no scratch-long.

Writes table.md, results.json and plot.png into --out (with --task as a prefix). Every run has its
own folder. If the command is started again, it runs only what is missing.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
import pretrain
from data import NAMED, open_images, split_folder
from engine.command import Failed, Distributed, command_line
from engine.files import printable
from engine.flags import (SIDES, SWITCH, Parser, checked, defaults, format_size, height_width,
                          number, path)
from extras import detect, segment
from extras.chart import bars, check_matplotlib
from extras.dense import Scenes
from extras.output import check_folder, writing
from model import ARCHS, build_encoder, get_family

# ---- what is run ----

PRETRAIN = {  # on shapes, the same for A2MIM and SimMIM; lr per 512 images
    "resnet": "--recipe imagenet --mask-size 8 --spectrum image --lr 0.032 --token-lr 1",
    "convnext": "--recipe imagenet --mask-size 16 --spectrum image --lr 0.032 --token-lr 1",
    "vit": "--recipe imagenet --patch-size 16 --mask-size 16 --spectrum image --lr 0.016 --schedule cosine "
           "--drop-path 0",
    "swin": "--recipe imagenet --mask-size 16 --spectrum image --lr 0.016 --schedule cosine",
}
SMALL = "--recipe small --crop-min 0.35"                     # and on real images: any backbone
TUNE = "--crop-min 0.8 --batch-size 16 --lr-batch 16 --layer-decay 1 --eval-every 1000000"  # the same for every arm
TUNE_SMALL = "--recipe small --batch-size 16 --eval-every 1000000"
PROBE = ("--recipe linear --crop-min 0.8 --optimizer adamw --lr 0.01 --lr-batch 64 --batch-size 64 --schedule cosine "
         "--epochs 20 --eval-every 1000000")
# images seen in pre-training, in that of an ablation, and in fine-tuning; a Transformer learns slower, and is faster
BUDGETS = {
    "resnet": (10_000, 5_000, 3_200),
    "convnext": (10_000, 5_000, 3_200),
    "vit": (24_000, 12_000, 9_600),
    "swin": (12_000, 6_000, 9_600),
}
REAL = (48_000, 24_000, 6_400)
SCENES = (12_800, 0, 0)                                      # then the demo of extras/segment.py or extras/detect.py
BASE = "none"
ABLATIONS = {  # title -> flags over the A2MIM of the first rows
    "token at stage 1": "--token-stage 1",
    "token at stage 2": "--token-stage 2",
    "token at stage 3": "--token-stage 3",
    "token at stage 4, mask units of 32 px": "--token-stage 4 --mask-size 32",
    "fill zero": "--fill zero",
    "fill random": "--fill random",
    "no Fourier term": "--fourier-weight 0",
    "Fourier, the paper's stand-in": "--stand-in prediction",
    "Fourier, batch spectrum": "--spectrum batch",
    "token gamma": "--token gamma",
    "token add": "--token add",
    "token replace": "--token replace",
}
OWN = {  # what A2MIM has here already
    "resnet": ("token at stage 3", "token gamma"), "convnext": ("token at stage 3", "token gamma"),
    "vit": ("token at stage 1", "token add"), "swin": ("token at stage 1", "token add"),
}
PROGRAMS = {"pretrain": pretrain, "finetune": finetune, "segment": segment, "detect": detect}
# column of the table -> folder of the runs, keys of their result.json
COLUMNS = {
    "segment": {"mIoU": ("segment", "miou"), "pixel accuracy": ("segment", "pixel_accuracy"),
                "IoU of any object": ("segment", "found")},
    "detect": {"box AP50": ("detect", "box", "AP50"), "box AP": ("detect", "box", "AP"),
               "box AP, any class": ("detect", "box", "any class"), "mask AP50": ("detect", "mask", "AP50"),
               "mask AP": ("detect", "mask", "AP")},
}


def slug(title: str) -> str:
    return title.replace("the paper's", "paper").replace(",", "").replace(" ", "-")


def plan_dense(args: SimpleNamespace) -> list[list[tuple[str, str, str]]]:
    """As `plan`, for --task: pre-training on pictures of scenes, then segmentation or detection in scenes."""
    out = shlex.quote(str(args.out))                         # run_one splits flags as a shell does
    both, chains = f"--arch {args.arch} --workers {args.workers} --log-every 50", []
    dense = f"{both} --data shapes" + " --epochs 0.08" * args.quick
    for seed in range(args.seeds):
        for name, flags in (("a2mim", ""), ("simmim", "--baseline simmim")):
            pre = (f"pretrained/{name}-{seed}", "pretrain",
                   f"{both} --data {out}/scenes --image-size {' '.join(map(str, height_width(args.image_size)))} "
                   f"--recipe small --batch-size 16 --sheets 2 --val 0 "
                   f"--epochs {args.pretrain_images / args.scenes:.4f} --seed {seed} {flags}")
            start = f"--weights {out}/{pre[0]}/backbone.pt"
            chains.append([pre, (f"{args.task}/{name}-{seed}", args.task, f"{dense} {start} --seed {seed}")])
        chains.append([(f"{args.task}/scratch-{seed}", args.task, f"{dense} --init scratch --seed {seed}")])
    return chains


def draw_scenes(folder: Path, count: int, size: tuple[int, int]) -> None:
    """The first scenes of the training split as files without labels, for pretrain.py."""
    part = folder.with_name(folder.name + ".part")
    if not folder.exists():
        part.mkdir(parents=True, exist_ok=True)
        scenes = Scenes("train", size)
        for i in tqdm(range(count), desc="drawing scenes", unit="scene"):
            image = Image.fromarray(scenes.draw(i)[0].permute(1, 2, 0).numpy())
            image.save(part / f"{i:05d}.png", compress_level=1)
        part.rename(folder)


def plan(args: SimpleNamespace) -> list[list[tuple[str, str, str]]]:
    """Chains of runs (name, program, flags). A run may need an earlier run of its chain."""
    data = shlex.quote(args.data)                            # run_one splits flags as a shell does
    out = shlex.quote(str(args.out))
    named = printable(args.data)
    if args.data not in NAMED and not Path(args.data).is_dir():
        raise ValueError(f"--data {named}: no such folder; give a folder of images or one of "
                         f"{', '.join(NAMED)}")
    if args.data not in NAMED and not split_folder(Path(args.data), "train"):
        raise ValueError(f"--data {named}: needs train/<class>/ and val/<class>/; pre-training must not see what "
                         "is tested on")
    unlabelled, images = (len(open_images(args.data, "train", height_width(args.image_size), labelled=labelled))
                          for labelled in (False, True))
    few = max(1, round(args.few * images)) / images
    kind = get_family(args.arch).name
    size = " ".join(str(side) for side in dict.fromkeys(height_width(args.image_size)))          # '64', or '48 64'
    both = f"--data {data} --image-size {size} --workers {args.workers} --log-every 50"
    arch = f"--arch {args.arch}" + (" --patch-size 16" if kind == "vit" else "")
    token = "--token-stage 3" if kind in ("resnet", "convnext") and args.drawn else ""

    def pre(name: str, flags: str, seed: int, count: int) -> tuple:
        return (
            f"pretrained/{name}-{seed}",
            "pretrain",
            f"{both} --arch {args.arch} {PRETRAIN[kind] if args.drawn else SMALL} --batch-size 32 --sheets 2 --val 0 "
            f"--epochs {count / unlabelled:.4f} --seed {seed} {flags}",
        )

    def tune(labels: str, name: str, start: str, seed: int, count: int) -> tuple:
        share = few if labels == "few" else 1.0
        return (
            f"{labels}/{name}-{seed}",
            "finetune",
            f"{both} {start} {TUNE if args.drawn else TUNE_SMALL} --lr {args.tune_lr} --labels {share:.6f} "
            f"--epochs {count / (share * images):.4f} --seed {seed}",
        )

    chains = []
    for seed in range(args.seeds):
        for name, first in (
            ("a2mim", pre("a2mim", token, seed, args.pretrain_images)),
            ("simmim", pre("simmim", "--baseline simmim", seed, args.pretrain_images)),
            ("scratch", (f"pretrained/scratch-{seed}", "random", f"{args.arch} {size} {seed}")),
        ):
            start = f"--weights {out}/pretrained/{name}-{seed}/backbone.pt {arch}"
            probes = ((f"{probe}/{name}-{seed}", "finetune", f"{both} {start} {flags} --labels {few:.6f} --seed {seed}")
                      for probe, flags in (("linear", PROBE), ("knn", "--recipe knn")))
            tuned = (tune(labels, name, start, seed, args.finetune_images) for labels in ("few", "all"))
            chains.append([first, *tuned, *probes])
        long = args.finetune_images + args.pretrain_images
        kinds = ("few", "all") if args.drawn else ("few",)
        chains += [[tune(labels, "scratch-long", f"--init scratch {arch}", seed, long)] for labels in kinds]
    for seed in range(args.ablation_seeds):
        for title, flags in {BASE: "", **ABLATIONS}.items():
            if title not in OWN[kind]:
                first = pre(slug(title), f"{token} {flags}", seed, args.ablation_images)
                start = f"--weights {out}/{first[0]}/backbone.pt {arch}"
                chains.append([first, tune("few", slug(title), start, seed, args.finetune_images)])
    return chains


def run_one(planned: tuple[str, str, str], out: Path, jobs: int) -> None:
    """Makes one run in the folder <name>.part, which is renamed to <name> when the run is complete.

    A run that was stopped is continued."""
    name, program, flags = planned
    done, part = out / name, out / f"{name}.part"
    if done.exists():
        before = done / "flags.txt"
        if not before.is_file() or before.read_text() != flags:
            raise SystemExit(f"{done}: was run with other flags; remove it, or choose another --out")
        return
    if jobs > 1:
        torch.set_num_threads(1)
    part.mkdir(parents=True, exist_ok=True)
    (part / "flags.txt").write_text(flags)
    with open(part / "said.txt", "a") as said, contextlib.redirect_stderr(said):
        if program == "random":                              # an untrained backbone, for the probes
            arch, *size, seed = shlex.split(flags)
            torch.manual_seed(int(seed))
            torch.save(build_encoder(arch, height_width([*map(int, size)])).backbone.state_dict(), part / "backbone.pt")
        else:
            resume = ["--resume"] if (part / "checkpoint.pt").exists() else []
            for left in ("result.json",) if resume else ("log.jsonl", "result.json"):
                (part / left).unlink(missing_ok=True)
            PROGRAMS[program].main([*shlex.split(flags), "--out", str(part), *resume])
    part.rename(done)


def run_chain(job: tuple) -> tuple[int, str | None]:
    """(number of runs, None), or the name of the run that failed and the last line it printed."""
    chain, out, jobs = job
    for planned in chain:
        name = planned[0]
        try:
            run_one(planned, out, jobs)
        except SystemExit as exit:
            if exit.code in (130, 143):                      # Ctrl-C: the run has been saved
                os._exit(exit.code)
            said = out / f"{name}.part" / "said.txt"
            words = said.read_text().splitlines() if isinstance(exit.code, int) else [exit.code]
            return len(chain), f"{name}: {words[-1] if words else 'failed'}"
        except OSError as error:                             # such as a full disk
            return len(chain), f"{name}: {printable(str(error))}"
    return len(chain), None


# ---- what came out ----

def collect(out: Path, rows: list[str], folder: str, *keys: str) -> dict[str, list[float]]:
    """Row -> that number of every seed's result.json, in percent."""
    read = lambda row: [
        100 * functools.reduce(dict.get, keys, json.loads(f.read_text()))
        for f in sorted(out.glob(f"{folder}/{row}-[0-9]*/result.json"))
    ]
    return {row: values for row in rows if (values := read(row))}


def say(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)       # Student's t, 97.5 %, for 1 to 9 degrees of freedom


def interval(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of a - b, paired by seed: a 95 % interval by Student's t. Without pairs it has no ends."""
    gains = [x - y for x, y in zip(a, b)]
    mean, pairs = statistics.mean(gains), len(gains)
    half = T95[min(pairs, 10) - 2] * statistics.stdev(gains) / math.sqrt(pairs) if pairs > 1 else math.inf
    return mean, mean - half, mean + half


def verdict(name: str, a: list[float], b: list[float], other: str) -> str:
    """One plain sentence: is `a` above `b`? Only if the interval of the difference excludes 0."""
    gain, low, high = interval(a, b)
    other = other.split(";")[0]
    word = "better than" if low > 0 else "worse than" if high < 0 else "not clearly different from"
    return f"- {name}: {word} {other} ({gain:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, {len(a)} seeds)"


def summary(args: SimpleNamespace, out: Path) -> str:
    arms = {
        "a2mim": "A2MIM",
        "simmim": "SimMIM",
        "scratch": "scratch; probes: random features",
        "scratch-long": "scratch, compute of both stages",
    }
    few, seeds = f"{100 * args.few:g} %", f"in percent, mean ± standard deviation of {args.seeds} seeds"
    columns = COLUMNS.get(args.task) or {
        f"{few} of labels": ("few", "top1"),
        "all labels": ("all", "top1"),
        f"linear probe, {few}": ("linear", "top1"),
        "20-NN": ("knn", "top1"),
    }
    about = f"{args.arch} on {printable(args.data)}, {format_size(args.image_size)}: "
    about += f"pre-training {args.pretrain_images:,} images, "
    if args.task == "classify":
        about += f"fine-tuning {args.finetune_images:,}; top-1 {seeds}"
    else:
        arms = dict(list(arms.items())[:2], scratch="scratch")
        about += f"then python extras/{args.task}.py --data shapes; {seeds}"
    got = {column: collect(out, list(arms), *where) for column, where in columns.items()}
    lines = [about, "", "| start | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {title} | " + " | ".join(say(values[arm]) if arm in values else "-" for values in got.values()) + " |"
        for arm, title in arms.items()
    ]
    lines += ["", *(verdict(f"{column}, A2MIM", values["a2mim"], values[arm], arms[arm])
                    for column, values in got.items() for arm in list(arms)[1:] if {"a2mim", arm} <= set(values))]
    found = {title: values for title in (BASE, *ABLATIONS)
             for values in collect(out, [slug(title)], "few", "top1").values()}
    if BASE in found:
        lines += [
            "",
            f"Ablations: pre-training {args.ablation_images:,} images, {few} of labels, "
            f"{args.ablation_seeds} seed{'s' * (args.ablation_seeds > 1)}",
            "",
            "| change | top-1 | against none |",
            "|---|---|---|",
        ]
        own = ", ".join(OWN[get_family(args.arch).name])
        here = f"{BASE} ({own}, fill mean, Fourier mixed with the image spectrum)"
        lines += [
            f"| {here if title == BASE else title} | {say(values)} | "
            + ("" if title == BASE else f"{statistics.mean(values) - statistics.mean(found[BASE]):+.1f}")
            + " |"
            for title, values in found.items()
        ]
    task = f"{args.task}-" * (args.task != "classify")
    (out / f"{task}results.json").write_text(json.dumps(dict(args=vars(args), **got, ablations=found), indent=1) + "\n")
    groups = {}
    for column, values in got.items():
        groups[column] = {arms[arm]: of_seeds for arm, of_seeds in values.items()}
    groups["ablations"] = found
    picture = bars(groups, about.split(";")[0], "percent; a bar is the mean, a dot is one seed")
    picture.save(out / f"{task}plot.png")
    (out / f"{task}table.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


# ---- the command ----

def known_arch(text: str) -> None:
    """Raises ValueError unless BUDGETS has the family of this backbone."""
    if text not in ARCHS:
        raise ValueError(f"{printable(text)}: must be one of {', '.join(ARCHS)}")


some = number(int, 1, 10**9)
FLAGS = {
    "what is compared": {
        "arch": ("resnet18", checked("NAME", known_arch), "backbone"),
        "data": ("shapes", path("DIR"), f"a folder of class folders, or one of {', '.join(NAMED)}"),
        "task": ("classify", ("classify", *COLUMNS), "what comes after pre-training"),
        "image_size": (None, SIDES, "of pre-training, and of classes (64; --task: 96)"),
        "few": (None, number(float, 1e-6, 1),
                "share of labels that is few (shapes 0.05, else 0.1)"),
        "seeds": (None, number(int, 1, 1000), "runs of each arm (5; --task: 3)")},
    "how long": {
        "pretrain_images": (None, some, "images seen in pre-training (real 48,000; scenes 12,800; "
                            "shapes: ViT 24,000, Swin 12,000, CNN 10,000)"),
        "finetune_images": (None, some, "images seen in fine-tuning (real images 6,400; "
                            "shapes: CNN 3,200, Transformer 9,600)"),
        "ablation_images": (None, some,
                            "images seen in pre-training of an ablation (half of that)"),
        "ablation_seeds": (None, number(int, 0, 1000), "0: none (shapes 1, else 0)"),
        "tune_lr": (None, number(float, 1e-12, 1e6),
                    "of fine-tuning, every arm (CNN 1e-3, Transformer 5e-4)"),
        "quick": (False, SWITCH, "one seed and an eighth of the images, to see that it works")},
    "run": {
        "jobs": (None, number(int, 1, 1024), "runs at a time (a CPU core each; 1 on a GPU)"),
        "workers": (0, number(int, 0, 256), "loader processes of a run"),
        "out": (None, path("DIR"), "runs/compare-<data>-<arch>[-quick]")},
}


def compare(args: SimpleNamespace, world: Distributed) -> None:
    """Makes all runs that are missing, and writes the tables.

    Raises ValueError for a mistake, Failed if a run fails."""
    out, dense = Path(args.out), args.task != "classify"
    check_folder(out)
    chains = plan_dense(args) if dense else plan(args)
    check_matplotlib()
    jobs = args.jobs or (1 if torch.accelerator.is_available() else os.cpu_count() or 1)
    if dense:
        with writing(out / "scenes"):
            draw_scenes(out / "scenes", args.scenes, height_width(args.image_size))
    failed, work = 0, [(chain, out, jobs) for chain in chains]
    bar = tqdm(total=sum(map(len, chains)), unit="run")
    with multiprocessing.get_context("spawn").Pool(jobs) as pool, bar:
        for count, complaint in pool.imap_unordered(run_chain, work):
            bar.update(count)
            if complaint:
                failed += 1
                bar.write(complaint, file=sys.stderr)
    with writing(out / "table.md"):
        print(summary(args, out))
    if failed:
        raise Failed(f"{failed} of {len(chains)} chains of runs failed, see above; the same "
                     "command runs what is missing")


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags, and what follows from them. Raises ValueError for a value that is off."""
    usage = "%(prog)s [--arch NAME] [--data DIR | --task segment|detect] [--quick]"
    parser = Parser("compare.py", usage, __doc__, FLAGS, {})
    parser.epilog = None
    args = SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})
    dense = args.task != "classify"
    if dense and args.data != "shapes":
        raise ValueError(f"--data {printable(args.data)}: --task {args.task} has drawn scenes "
                         "alone; leave --data away")
    args.drawn = args.data == "shapes" and not dense
    budget = SCENES if dense else BUDGETS[get_family(args.arch).name] if args.drawn else REAL
    for name, images in zip(("pretrain_images", "ablation_images", "finetune_images"), budget):
        asked = getattr(args, name) or images
        setattr(args, name, max(1, asked // 8) if args.quick else asked)
    args.seeds = 1 if args.quick else args.seeds or (3 if dense else 5)
    args.image_size = args.image_size or (96 if dense else 64)
    args.scenes = min(10_000, args.pretrain_images)          # different ones
    args.few = args.few or (0.05 if args.drawn else 0.1)
    args.ablation_seeds = int(args.drawn) if args.ablation_seeds is None else args.ablation_seeds
    args.tune_lr = args.tune_lr or (5e-4 if get_family(args.arch).name in ("vit", "swin") else 1e-3)
    args.data = "scenes" if dense else args.data
    about = f"{Path(args.data).absolute().name}-{args.arch}" + "-quick" * args.quick
    args.out = args.out or f"runs/compare-{about}"
    return args


def main(argv: list[str] | None = None) -> None:
    command_line("compare.py", parse, compare, argv)


if __name__ == "__main__":
    main()
