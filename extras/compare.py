"""How much does pre-training help? Pre-trains, fine-tunes and probes with several seeds.

    python extras/compare.py                            ResNet-18 on drawn shapes
    python extras/compare.py --arch deit_tiny           a small Transformer
    python extras/compare.py --data /path/to/classes    real images: train/<class>/, val/<class>/
    python extras/compare.py --task segment --data /path/to/set --weights-of runs/compare-...
                                                        a class per pixel, from weights of the line
                                                        above; also --task detect
    python extras/compare.py --task segment             the same on drawn scenes; also detect
    python extras/compare.py --quick                    one seed, in small

Four arms. The first three get the same fine-tuning:

    a2mim
    simmim         --baseline simmim
    scratch        random weights
    scratch-long   random weights; the compute of pre-training is added to fine-tuning

They are fine-tuned with some of the labels (--few). A linear probe and k-NN measure the frozen
features, beside those of random weights. A run on a folder has the recipe `small`, and pre-training
is `python pretrain.py --data DIR --arch NAME --image-size N --epochs X --seed N`. On drawn shapes
the paper's ablations follow, one change at a time.

Label seed s starts from pre-training seed s mod N. See extras/scores.py for means and intervals.
The score is that of the last epoch. At the start the command prints how long it will take.

Writes table.md, results.json and plot.png into --out. With --task the names begin with segment- or
detect-. Every run has its own folder. If the command is started again, it runs only what is
missing.
"""

import json
import math
import os
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import NAMED, usable_cores
from engine.command import Distributed, command_line
from engine.files import printable
from engine.flags import (MAX_EPOCHS, SIDES, SWITCH, Parser, Several, checked, defaults,
                          format_size, height_width, number, path)
from extras.chart import bars, check_matplotlib
from extras.dense import check_part
from extras.many_runs import Run, check_flags, in_words, make_all, seconds_of, time_steps
from extras.output import check_folder, writing
from extras.plans import (ABLATION_SHARE, ABLATIONS, ARMS, BASE, BUDGETS, FEW, OWN,
                          PRETRAIN_EPOCHS, SCENE_EPOCHS, SHAPES, TASKS, TUNE_EPOCHS,
                          TUNE_EPOCHS_OF_FEW, Settings, as_text, count_weights, draw_scenes,
                          first_settings, folder_of, from_scratch, plan, scene_count,
                          scenes_folder, slug, title_of)
from extras.scores import (Column, by_pretraining, difference, mean_and_spread, read_scores,
                           sentence)
from model import ARCHS, get_family

# ---- all runs, then the table ----

def compare(settings: Settings, world: Distributed) -> None:
    """Makes all runs that are missing, and writes the tables.

    Raises ValueError for a mistake, Failed if a run fails, Stopped after a signal."""
    out = Path(settings.out)
    check_folder(out)
    runs = plan(settings)
    check_flags(runs, out)
    check_matplotlib()
    if settings.is_dense and settings.is_drawn and not settings.weights_of:
        scenes = scenes_folder(settings)
        with writing(scenes):
            draw_scenes(scenes, scene_count(settings), height_width(settings.image_size))
    print_estimate(settings, runs, world)
    try:
        make_all(runs, out, settings.jobs, world)
    finally:
        if any(run.is_done(out) for run in runs):
            with writing(out / "table.md"):
                print(summarise(settings))


def print_estimate(settings: Settings, runs: list[Run], world: Distributed) -> None:
    """How many runs there are, and how long they take here, from some training steps of each
    program."""
    out = Path(settings.out)
    missing = [run for run in runs if not run.is_done(out)]
    world.print0(f"{len(runs)} runs in {printable(settings.out)}/, {len(missing)} to make, "
                 f"{settings.jobs} at a time")
    speeds = {}
    for program in dict.fromkeys(run.program for run in missing):
        first = next((run for run in runs if run.program == program and run.steps != 0), None)
        if first is None or program == "random":
            continue
        start = () if program == "pretrain" else from_scratch(settings)["start"]
        speed = time_steps(first, start, one_thread=settings.jobs > 1)
        if speed:
            speeds[program] = speed
            world.print0(f"a step of {program}: {speed.seconds:.3f} s")
    seconds = seconds_of(missing, speeds) / settings.jobs
    if seconds:
        more = ", and the evaluations" if settings.is_dense else ""
        world.print0(f"all missing runs: about {in_words(seconds)} here{more}")


# ---- what came out ----

def columns_of(settings: Settings) -> list[Column]:
    """The columns of the table."""
    if settings.is_dense:
        folder = settings.task + ("-test" if settings.split_test else "")
        return [Column(title, folder, keys, settings.seeds)
                for title, keys in TASKS[settings.task].items()]
    columns = [Column(title_of(amount), folder_of(amount), ("top1",), settings.seeds)
               for amount in settings.few]
    title = f"linear probe, {title_of(settings.few[0])}"
    columns.append(Column(title, "linear", ("top1",), settings.pretrain_seeds))
    columns.append(Column("20-NN", "knn", ("top1",), settings.pretrain_seeds))
    return columns


def arm_titles(settings: Settings) -> dict[str, str]:
    titles = {arm: ARMS[arm] for arm in settings.arms}
    if "scratch" in titles and not settings.is_dense:
        titles["scratch"] += "; probes: random features"
    return titles


def heading(settings: Settings) -> str:
    """What was compared, in one line."""
    data = printable(Path(settings.data).name)
    if settings.is_dense and settings.is_drawn:
        data = "drawn scenes"
    size = ""
    if settings.image_size:
        size = f", {format_size(settings.image_size)}"
        size += " in pre-training" if settings.is_dense and settings.is_drawn else ""
    return f"{settings.arch} on {data}{size}"


def explanation(settings: Settings) -> str:
    """What the numbers of the table are."""
    epochs = f"pre-training of {as_text(settings.pretrain_epochs)} epochs"
    if settings.weights_of:
        epochs = f"weights of {printable(settings.weights_of)}"
    score = "top-1 after the last epoch"
    if settings.is_dense:
        part = f" on {settings.split_val}" if settings.split_val else ""
        score = f"extras/{settings.task}.py, the last epoch{part}"
    if settings.split_test:
        score = f"extras/{settings.task}.py, the best epoch on {settings.split_val or 'val'}, "
        score += f"scored on {settings.split_test}"
    count, seeds = settings.pretrain_seeds, settings.seeds
    over = f"{count} pre-training seed" + ("s" if count > 1 else "")
    if seeds > count:
        over += f", each the mean of its label seeds ({seeds} in all)"
    return f"{epochs}; {score}; in percent, mean ± standard deviation over {over}"


def all_scores(settings: Settings) -> dict[str, dict[str, dict[int, float]]]:
    """Column -> arm -> label seed -> score in percent. What is missing is left out."""
    scores = {}
    for column in columns_of(settings):
        of_arms = {}
        for arm in settings.arms:
            found = read_scores(Path(settings.out), column, arm)
            if found:
                of_arms[arm] = found
        if of_arms or not settings.is_dense:                 # not every set has outlines
            scores[column.title] = of_arms
    return scores


def summarise(settings: Settings) -> str:
    """The table and what it says. Writes table.md, results.json and plot.png."""
    scores, ablations = all_scores(settings), read_ablations(settings)
    lines = [f"{heading(settings)}: {explanation(settings)}", "", *score_table(settings, scores)]
    sentences, rows = differences(settings, scores)
    lines += ["", *sentences]
    if ablations:
        lines += ["", *ablation_table(settings, ablations)]
    text = "\n".join(lines)

    prefix = f"{settings.task}-" if settings.is_dense else ""
    file = f"{settings.out}/{prefix}"
    content = dict(settings=asdict(settings), scores=scores, differences=rows, ablations=ablations)
    Path(f"{file}results.json").write_text(json.dumps(content, indent=1) + "\n")
    Path(f"{file}table.md").write_text(text + "\n")
    titles, groups = arm_titles(settings), {}
    for column, of_arms in scores.items():
        groups[column] = {titles[arm]: by_pretraining(found, settings.pretrain_seeds)
                          for arm, found in of_arms.items()}
    groups["ablations"] = ablations
    picture = bars(groups, heading(settings), "percent; a dot is one pre-training seed")
    picture.save(f"{file}plot.png")
    return text


def score_table(settings: Settings, scores: dict) -> list[str]:
    """Lines of the table: a row for each arm. scores: see all_scores."""
    lines = ["| start | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for arm, title in arm_titles(settings).items():
        cells = []
        for of_arms in scores.values():
            means = by_pretraining(of_arms.get(arm, {}), settings.pretrain_seeds)
            cells.append(mean_and_spread(means) if means else "-")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def differences(settings: Settings, scores: dict) -> tuple[list[str], list[dict]]:
    """The first arm less each of the others: as sentences, and as rows of results.json."""
    first, *others = settings.arms
    sentences, rows = [], []
    for column, of_arms in scores.items():
        for arm in others:
            a, b = of_arms.get(first, {}), of_arms.get(arm, {})
            gain = difference(a, b, settings.pretrain_seeds)
            if gain is None:
                continue
            sentences.append(sentence(f"{column}, {ARMS[first]}", gain, ARMS[arm]))
            row = dict(column=column, arm=first, other=arm, **asdict(gain))
            if math.isinf(gain.low):                         # JSON has no infinity
                row |= dict(low=None, high=None)
            rows.append(row)
    return sentences, rows


def read_ablations(settings: Settings) -> dict[str, list[float]]:
    """Title of an ablation -> scores of its seeds."""
    if not settings.ablation_seeds:
        return {}
    column = Column("", folder_of(settings.few[0]), ("top1",), settings.ablation_seeds)
    found = {}
    for title in (BASE, *ABLATIONS):
        scores = read_scores(Path(settings.out), column, slug(title))
        if scores:
            found[title] = list(scores.values())
    return found


def ablation_table(settings: Settings, found: dict[str, list[float]]) -> list[str]:
    """Lines of the table. found: see read_ablations."""
    seeds = settings.ablation_seeds
    epochs = as_text(settings.pretrain_epochs * ABLATION_SHARE)
    plural = "s" if seeds > 1 else ""
    lines = [f"Ablations: pre-training of {epochs} epochs, {title_of(settings.few[0])}, "
             f"{seeds} seed{plural}",
             "", "| change | top-1 | against none |", "|---|---|---|"]
    own = ", ".join(OWN[settings.family])
    for title, scores in found.items():
        shown, gain = title, ""
        if title == BASE:
            shown = f"{BASE} ({own}, fill mean, Fourier mixed with the image spectrum)"
        elif BASE in found:
            gain = f"{statistics.mean(scores) - statistics.mean(found[BASE]):+.1f}"
        lines.append(f"| {shown} | {mean_and_spread(scores)} | {gain} |")
    return lines


# ---- flags ----

def check_arm(name: str) -> None:
    if name not in ARMS:
        raise ValueError(f"{printable(name)}: must be one of {', '.join(ARMS)}")


def check_amount(text: str) -> None:
    """Raises ValueError unless it is an amount of labels."""
    share = re.fullmatch(r"0?\.\d+", text) and float(text) > 0
    count = re.fullmatch(r"[1-9]\d*/class", text)
    if not (share or count or text == "all"):
        raise ValueError(f"{printable(text)}: must be a share such as 0.1, a count such as "
                         f"9/class, or all")


SEEDS = number(int, 1, 1000)
EPOCHS = number(float, 0.001, MAX_EPOCHS)
FLAGS = {
    "what is compared": {
        "data": (None, path("DIR"), f"a folder with train/<class>/ and val/<class>/, or one of "
                 f"{', '.join(NAMED)} (shapes); --task: a set of extras/segment.py or "
                 f"extras/detect.py (drawn scenes)"),
        "arch": (None, checked("NAME", get_family), "backbone (resnet18; --weights-of: theirs)"),
        "arms": ((), Several(checked("NAME", check_arm)),
                 f"some of {', '.join(ARMS)}; the first is compared with each of the others "
                 f"(shapes: all; otherwise without scratch-long)"),
        "task": ("classify", ("classify", *TASKS), "what comes after pre-training"),
        "weights_of": (None, path("DIR"), "--task: the --out of a comparison that has pre-trained"),
        "split_val": (None, checked("NAME", check_part), "--task: the part to evaluate on"),
        "split_test": (None, checked("NAME", check_part), "--task: score the best epoch on this "
                       "part (none: the last epoch, on --split-val)"),
        "image_size": (None, SIDES, "of pre-training and fine-tuning (64); drawn scenes: of "
                       "pre-training alone (96); --weights-of: the recipe's"),
        "few": ((), Several(checked("X", check_amount)), "amounts of labels, each a share such as "
                "0.1, a count such as 9/class, or all; the linear probe has the first (0.1; "
                "shapes: 0.05 all)"),
        "seeds": (None, SEEDS, "label seeds (5; --task: 3)"),
        "pretrain_seeds": (None, SEEDS, "pre-training seeds (3; shapes: as many as --seeds; "
                           "--weights-of: all that are there)")},
    "how long": {
        "pretrain_epochs": (None, EPOCHS, f"of pre-training ({PRETRAIN_EPOCHS}; shapes: CNN 1, "
                            f"ViT 2.4, Swin 1.2; drawn scenes: {SCENE_EPOCHS})"),
        "tune_epochs": ((), Several(EPOCHS), f"of fine-tuning, one number or one for each of "
                        f"--few ({TUNE_EPOCHS}; with less than {FEW} of the labels "
                        f"{TUNE_EPOCHS_OF_FEW})"),
        "ablation_seeds": (None, number(int, 0, 1000), "shapes only, 0: no ablations (1)"),
        "quick": (False, SWITCH, "one seed and far fewer epochs, to see that it works")},
    "run": {
        "jobs": (None, number(int, 1, 1024), "runs at a time (a CPU core each; 1 on a GPU)"),
        "workers": (0, number(int, 0, 256), "loader processes of a run"),
        "out": (None, path("DIR"), "runs/compare-<data>-<arch>[-quick]")},
}


def parse(argv: list[str] | None) -> Settings:
    """The settings, from the flags. Raises ValueError for a wrong value."""
    usage = "%(prog)s [--data DIR] [--arch NAME] [--task segment|detect] [--quick]"
    parser = Parser("compare.py", usage, __doc__, FLAGS, {})
    return resolve(vars(parser.parse_args(argv)))


def folder_or_name(data: str) -> str:
    """--data, with DIR/ as DIR. But "shapes/" is a folder, and "shapes" the built-in set."""
    folder = os.path.normpath(data)
    is_name = folder in (*NAMED, "voc")
    return os.path.join(".", folder) if is_name and folder != data else folder


def resolve(typed: dict) -> Settings:
    """The settings of a comparison. Raises ValueError if the flags do not fit each other."""
    asked = {**defaults(FLAGS), **typed}
    asked["data"] = folder_or_name(asked["data"] or "shapes")
    is_dense, is_drawn = asked["task"] != "classify", asked["data"] == "shapes"
    is_shapes = is_drawn and not is_dense
    check_fit(asked, typed, is_dense, is_drawn)

    usual = tuple(ARMS) if is_shapes else ("a2mim", "simmim", "scratch")
    asked["arms"] = tuple(dict.fromkeys(asked["arms"] or usual))
    asked["arch"] = choose_arch(asked)
    family = get_family(asked["arch"]).name
    if is_shapes and family not in BUDGETS:
        raise ValueError(f"--arch {asked['arch']}: on drawn shapes must be one of "
                         f"{', '.join(ARCHS)}; choose one of them, or give --data DIR")
    asked |= choose_seeds(asked, is_dense, is_shapes)

    few = asked["few"] or (("0.05", "all") if is_drawn else ("0.1",))
    asked["few"] = tuple(dict.fromkeys(few))
    asked["tune_epochs"] = spread_over(asked["few"], asked["tune_epochs"])
    if not asked["pretrain_epochs"]:
        asked["pretrain_epochs"] = PRETRAIN_EPOCHS
        if is_drawn:
            asked["pretrain_epochs"] = SCENE_EPOCHS if is_dense else BUDGETS[family][0] / SHAPES
        if asked["quick"] and not (is_dense and is_drawn):   # there are fewer scenes
            asked["pretrain_epochs"] /= 8
    if asked["image_size"] is None and not asked["weights_of"]:
        asked["image_size"] = 96 if is_dense else 64
    if asked["ablation_seeds"] is None:
        asked["ablation_seeds"] = int(is_shapes)

    if asked["jobs"] is None:
        asked["jobs"] = 1 if torch.accelerator.is_available() else usable_cores()
    about = "scenes" if is_dense and is_drawn else Path(asked["data"]).absolute().name
    quick = "-quick" if asked["quick"] else ""
    asked["out"] = asked["out"] or f"runs/compare-{about}-{asked['arch']}{quick}"
    asked["out"] = os.path.normpath(asked["out"])
    return Settings(**asked)


def choose_arch(asked: dict) -> str:
    """The backbone. Raises ValueError if another one was typed than --weights-of has."""
    if not asked["weights_of"]:
        return asked["arch"] or "resnet18"
    count_weights(asked["weights_of"], asked["arms"])        # raises if there are none
    there = first_settings(asked["weights_of"], asked["arms"])["arch"]
    if asked["arch"] not in (None, there):
        raise ValueError(f"--arch {asked['arch']}: the weights in --weights-of are of {there}; "
                         f"leave --arch out")
    return there


def choose_seeds(asked: dict, is_dense: bool, is_shapes: bool) -> dict:
    """seeds and pretrain_seeds. Raises ValueError if there are more pre-training seeds than label
    seeds, or than --weights-of has."""
    seeds, asked_for = asked["seeds"], asked["pretrain_seeds"]
    if asked["quick"]:
        seeds = seeds or 1
        asked_for = asked_for or 1
    seeds = seeds or (3 if is_dense else 5)
    usual = seeds if is_shapes else 3
    if asked["weights_of"]:
        usual = count_weights(asked["weights_of"], asked["arms"])
        if asked_for and asked_for > usual:
            raise ValueError(f"--pretrain-seeds {asked_for}: --weights-of has {usual}; give at "
                             f"most {usual}")
    if asked_for and asked_for > seeds:
        raise ValueError(f"--pretrain-seeds {asked_for}: must be at most --seeds, {seeds}; a "
                         f"pre-training seed needs a label seed")
    return dict(seeds=seeds, pretrain_seeds=min(asked_for or usual, seeds))


def spread_over(few: tuple[str, ...], typed: list[float]) -> tuple[float, ...]:
    """--tune-epochs of each amount of labels; () if none was typed.

    Raises ValueError unless it is one number, or one for each amount."""
    if len(typed) == 1:
        return (typed[0],) * len(few)
    if typed and len(typed) != len(few):
        raise ValueError(f"--tune-epochs: {len(typed)} numbers for {len(few)} amounts of labels "
                         f"(--few {' '.join(few)}); give one number, or one for each")
    return tuple(typed)


def check_fit(asked: dict, typed: dict, is_dense: bool, is_drawn: bool) -> None:
    """Raises ValueError for a flag that has no meaning beside the others."""
    data, task = printable(asked["data"]), asked["task"]
    if is_dense and not is_drawn and not asked["weights_of"]:
        raise ValueError(f"--task {task} --data {data}: needs --weights-of DIR, the --out of a "
                         f"comparison that has pre-trained; without --data drawn scenes are used")
    of_task = {*typed} & {"weights_of", "split_val", "split_test"}
    of_classes = {*typed} & {"few", "tune_epochs", "ablation_seeds"}
    wrong = of_classes if is_dense else of_task
    if not wrong and not is_drawn and asked["ablation_seeds"]:
        wrong = {"ablation_seeds"}
    if not wrong and is_dense and is_drawn:
        wrong = {*typed} & {"split_val", "split_test"}
        if asked["weights_of"]:                              # the size is that of these weights
            wrong |= {*typed} & {"image_size"}
    if asked["weights_of"] and "pretrain_epochs" in typed:
        raise ValueError("--pretrain-epochs: has no effect beside --weights-of, whose weights are "
                         "trained already; leave it out")
    if wrong:
        flag = "--" + sorted(wrong)[0].replace("_", "-")
        raise ValueError(f"{flag}: has no effect on --task {task} --data {data}; leave it out")
    if is_dense and "scratch-long" in asked["arms"]:
        raise ValueError(f"--arms scratch-long: is not there for --task {task}; leave it out")


def main(argv: list[str] | None = None) -> None:
    command_line("compare.py", parse, compare, argv)


if __name__ == "__main__":
    main()
