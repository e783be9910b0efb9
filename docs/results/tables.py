"""The tables and the curve of docs/results.md, and a table of docs/analysis.md, from the result
files below this folder.

    python docs/results/tables.py

Writes table.md beside this file and assets/schedules.png. What the names of the files mean is in
docs/results.md.
"""

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
RESNET18, RESNET50 = FOLDER / "imagenette96-resnet18", FOLDER / "imagenette96-resnet50"
sys.path.insert(0, str(ROOT))

from extras.chart import Panel, charts
from extras.scores import Difference, by_pretraining, difference, mean_and_spread

PRETRAININGS = 3                                             # label seed s has number s mod 3


class Column(NamedTuple):
    """Of the main table. A file is <kind>-<arm>-<letter><seed><end>.json."""
    kind: str
    letter: str                                              # l: label seed, s: pre-training seed
    end: str
    keys: tuple[str, ...]                                    # of the score in the file


COLUMNS = {
    "10 % of labels (947)": Column("ten", "l", "", ("top1",)),
    "1 % (9 of each class)": Column("one", "l", "", ("top1",)),
    "all labels": Column("all", "s", "", ("top1",)),
    "linear probe, 10 %": Column("lin", "s", "", ("top1",)),
    "20-NN, all labels": Column("knn", "s", "", ("top1",)),
    "CamVid, test": Column("camvid", "s", "-test", ("miou",)),
    "CamVid, val": Column("camvid", "s", "", ("best_miou",)),
    "BCCD, AP": Column("bccd", "s", "", ("box", "AP")),
    "BCCD, AP50": Column("bccd", "s", "", ("box", "AP50")),
}
ARMS = {"a2mim": "A2MIM", "simmim": "SimMIM",
        "scratch": "random weights (probes: random features)"}
PROBES = ("lin", "knn")

# of the ResNet-50, with one pre-training: title -> the files of A2MIM and of random weights
LARGER = {
    "10 % of labels": ("ten-a2mim-l", "ten-scratch-l"),
    "linear probe, 10 %": ("lin-a2mim-s", "lin-random-branches-s"),
    "20-NN, all labels": ("knn-a2mim-s", "knn-random-branches-s"),
}
# on the same draws of labels: title -> files
SAME_COMPUTE = {
    "random weights, 60 epochs": "ten-scratch-l",
    "A2MIM, 60 epochs": "ten-a2mim-l",
    "random weights, 660 epochs": "ten-scratch-long-l",
}
Scores = dict[int, float]                                    # seed -> percent

# of docs/analysis.md: the results.json of extras/analyze.py, <analysis>-s<seed>.json
ANALYSES = RESNET18 / "analysis"
NETS = ("supervised", "A2MIM", "random")


def percent(file: Path, *keys: str) -> float:
    found = json.loads(file.read_text())
    for key in keys:
        found = found[key]
    return 100 * found


def scores_of(column: str, arm: str) -> Scores:
    """Of the main table."""
    about = COLUMNS[column]
    if arm == "scratch" and about.kind in PROBES:
        arm = "random-branches"
    return scores_in(RESNET18, f"{about.kind}-{arm}-{about.letter}", about.end, about.keys)


def scores_in(folder: Path, start: str, end: str, keys: tuple[str, ...]) -> Scores:
    """Of the files <start><seed><end>.json."""
    found = {}
    for seed in range(4):
        file = folder / f"{start}{seed}{end}.json"
        if file.exists():
            found[seed] = percent(file, *keys)
    return found


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def head(cells: list[str]) -> list[str]:
    return [row(cells), "|---" * len(cells) + "|"]


def score_table() -> list[str]:
    """Mean ± standard deviation over the pre-trainings: a row for each arm."""
    lines = head(["start", *COLUMNS])
    for arm, title in ARMS.items():
        cells = [title]
        for column in COLUMNS:
            means = by_pretraining(scores_of(column, arm), PRETRAININGS)
            cells.append(mean_and_spread(means))
        lines.append(row(cells))
    return lines


def difference_table() -> list[str]:
    """In points, with 95 % intervals."""
    lines = head(["difference", *COLUMNS])
    for arm, other in (("a2mim", "scratch"), ("simmim", "scratch"), ("a2mim", "simmim")):
        short = ARMS[other].split(" (")[0]
        cells = [f"{ARMS[arm]} minus {short}"]
        for column in COLUMNS:
            gain = difference(scores_of(column, arm), scores_of(column, other), PRETRAININGS)
            cells.append(with_interval(gain))
        lines.append(row(cells))
    return lines


def with_interval(gain: Difference, digits: int = 1) -> str:
    """The difference and its interval; bold if the interval excludes 0."""
    mean = f"{round(gain.mean, digits) + 0.0:+.{digits}f}"   # no -0.0
    if gain.low > 0 or gain.high < 0:
        mean = f"**{mean}**"
    return f"{mean} ({gain.low:.{digits}f} to {gain.high:.{digits}f})"


def larger_table() -> list[str]:
    """The ResNet-50: each run, and no interval."""
    lines = head(["ResNet-50", "A2MIM", "random weights, or random features"])
    for title, starts in LARGER.items():
        cells = [title]
        for start in starts:
            found = scores_in(RESNET50, start, "", ("top1",))
            cells.append(", ".join(f"{score:.1f}" for score in found.values()))
        lines.append(row(cells))
    return lines


def compute_table() -> list[str]:
    """Training from random weights with the compute of both stages: a column for each draw of
    labels, and the difference to A2MIM."""
    scores = {}                                              # title -> draw -> percent
    for title, start in SAME_COMPUTE.items():
        found = scores_in(RESNET18, start, "", ("top1",))
        scores[title] = {draw: found[draw] for draw in range(3)}
    lines = head(["start, fine-tuning", "draw 0", "draw 1", "draw 2", "minus A2MIM"])
    for title, found in scores.items():
        gain = difference(found, scores["A2MIM, 60 epochs"], PRETRAININGS)
        is_a2mim = title.startswith("A2MIM")
        cells = [title, *(f"{score:.1f}" for score in found.values())]
        cells.append("" if is_a2mim else with_interval(gain))
        lines.append(row(cells))
    return lines


def found_by(analysis: str, seed: int) -> dict:
    return json.loads((ANALYSES / f"{analysis}-s{seed}.json").read_text())["found"]


def strength_in_the_middle(version: str, seed: int, net: str) -> float:
    """J, the mean over the orders from 0.2 to 0.8, as extras/analyze.py prints it."""
    points = found_by("interactions", seed)[version][net]    # (order, J, low, high) each
    return statistics.mean(j for order, j, *_ in points if 0.15 < order < 0.85)


def top1_of_whole_images(seed: int, net: str) -> float:
    return found_by("occlusion", seed)["random patches"][net]["top1"][0]


def relative_area(order: str, seed: int, net: str) -> float:
    """Below the curve of top-1 over the share of hidden patches, relative to whole images."""
    found = found_by("occlusion", seed)[order][net]
    return found["area"] / found["top1"][0]


MEASURES = {                                                 # title -> (function, digits)
    "J in the middle, unbiased": (partial(strength_in_the_middle, "unbiased"), 2),
    "J in the middle, as released": (partial(strength_in_the_middle, "as released"), 2),
    "top-1, nothing hidden": (top1_of_whole_images, 1),
    "relative area, random patches": (partial(relative_area, "random patches"), 2),
    "salient first": (partial(relative_area, "salient patches first"), 2),
    "the rest first": (partial(relative_area, "the rest first"), 2),
}


def analysis_table() -> list[str]:
    """Interactions and occlusion: mean ± standard deviation over the seeds, and A2MIM less
    supervised. The untrained net is the same for all seeds, so it has no deviation."""
    values = {}                                              # (title, net) -> seed -> value
    for title, (measure, _) in MEASURES.items():
        for net in NETS:
            values[title, net] = {seed: measure(seed, net) for seed in range(PRETRAININGS)}

    lines = head(["weights", *MEASURES])
    for net in NETS:
        cells = ["untrained" if net == "random" else net]
        for title, (_, digits) in MEASURES.items():
            found = list(values[title, net].values())
            if net == "random":
                found = [statistics.mean(found)]
            cells.append(mean_and_spread(found, digits))
        lines.append(row(cells))
    cells = ["A2MIM minus supervised"]
    for title, (_, digits) in MEASURES.items():
        gain = difference(values[title, "A2MIM"], values[title, "supervised"], PRETRAININGS)
        cells.append(with_interval(gain, digits))
    return [*lines, row(cells)]


def run_table() -> list[str]:
    """Every result file: a row each."""
    lines = head(["file", "labels", "score, percent"])
    for file in sorted(FOLDER.glob("*/*.json")):
        result = json.loads(file.read_text())
        name = f"{file.parent.name}/{file.stem}"
        score = percent(file, *score_keys(result))
        lines.append(row([name, str(result.get("labels", "")), f"{score:.2f}"]))
    return lines


def score_keys(result: dict) -> tuple[str, ...]:
    """The keys of the score in a result file: top-1, mIoU, or the AP50 of boxes."""
    for key in ("top1", "best_miou", "miou"):
        if key in result:
            return (key,)
    return ("box", "AP50")


def all_tables() -> str:
    tables = (score_table(), difference_table(), compute_table(), larger_table(),
              analysis_table(), run_table())
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


def curve(kind: str, start: str, end: str, key: str = "top1") -> list[tuple[int, float]]:
    """(epochs of pre-training, percent). start: the file of random weights."""
    files = {0: RESNET18 / f"{start}.json"}
    for epochs in (5, 15, 30, 60):
        files[epochs] = RESNET18 / f"{kind}-a2mim-e{epochs}-{end}.json"
    if not files[60].exists():                               # the run of the main table
        files[60] = RESNET18 / f"{kind}-a2mim-{end}.json"
    return [(epochs, percent(file, key)) for epochs, file in files.items()]


def draw_schedules(file: Path) -> None:
    few = {f"10 %, label seed {seed}": curve("ten", f"ten-scratch-l{seed}", f"l{seed}")
           for seed in (0, 3)}
    few["1 %"] = curve("one", "one-scratch-l0", "l0")
    frozen = {"linear probe": curve("lin", "lin-random-branches-s0", "s0"),
              "20-NN": curve("knn", "knn-random-branches-s0", "s0")}
    camvid = {"val": curve("camvid", "camvid-scratch-e0-s0", "s0", "best_miou"),
              "test": curve("camvid", "camvid-scratch-e0-s0-test", "s0-test", "miou")}
    x = "epochs of pre-training"
    panels = [Panel("Imagenette, fine-tuning", x, "top-1 (%)", few),
              Panel("frozen features", x, "top-1 (%)", frozen),
              Panel("CamVid", x, "mIoU (%)", camvid)]
    charts(panels, columns=3).save(file)


def main() -> None:
    text = all_tables()
    (FOLDER / "table.md").write_text(text)
    print(text, end="")
    draw_schedules(ROOT / "assets/schedules.png")


if __name__ == "__main__":
    main()
