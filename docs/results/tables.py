"""The tables and the curve of docs/results.md, from the result files below this folder.

    python docs/results/tables.py

Writes table.md beside this file and assets/schedules.png. What the names of the files mean is in
docs/results.md.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
RESNET18, RESNET50 = FOLDER / "imagenette96-resnet18", FOLDER / "imagenette96-resnet50"
sys.path.insert(0, str(ROOT))

from extras.chart import Panel, charts
from extras.scores import by_pretraining, difference, mean_and_spread

PRETRAININGS = 3                                             # label seed s has number s mod 3
# column -> first and last part of the file names, score in the file
COLUMNS = {
    "10 % of labels (947)": ("ten", "l", "", "top1"),
    "1 % (9 of each class)": ("one", "l", "", "top1"),
    "linear probe, 10 %": ("lin", "s", "", "top1"),
    "20-NN, all labels": ("knn", "s", "", "top1"),
    "CamVid, test": ("camvid", "s", "-test", "miou"),
    "CamVid, val": ("camvid", "s", "", "best_miou"),
}
ARMS = {"a2mim": "A2MIM", "simmim": "SimMIM",
        "scratch": "random weights (probes: random features)"}
PROBES = ("lin", "knn")
# one pre-training each, or two: title -> folder, first part of the names, score in the file
MORE = {
    "ResNet-50, 10 % of labels": (RESNET50, "ten", ("top1",)),
    "ResNet-50, linear probe, 10 %": (RESNET50, "lin", ("top1",)),
    "ResNet-50, 20-NN, all labels": (RESNET50, "knn", ("top1",)),
    "ResNet-18, all labels": (RESNET18, "all", ("top1",)),
    "ResNet-18, 10 % of labels, the same compute": (RESNET18, "ten-long", ("top1",)),
    "BCCD, test, box AP": (RESNET18, "bccd", ("box", "AP")),
    "BCCD, test, box AP50": (RESNET18, "bccd", ("box", "AP50")),
}
Scores = dict[int, float]                                    # seed -> percent


def percent(file: Path, *keys: str) -> float:
    found = json.loads(file.read_text())
    for key in keys:
        found = found[key]
    return 100 * found


def scores_of(column: str, arm: str) -> Scores:
    """Of the main table."""
    kind, letter, end, key = COLUMNS[column]
    if arm == "scratch" and kind in PROBES:
        arm = "random-branches"
    return scores_in(RESNET18, f"{kind}-{arm}-{letter}", end, key)


def scores_in(folder: Path, start: str, end: str, *keys: str) -> Scores:
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
    """In points, with 95 % intervals; bold if the interval excludes 0."""
    lines = head(["difference", *COLUMNS])
    for arm, other in (("a2mim", "scratch"), ("simmim", "scratch"), ("a2mim", "simmim")):
        short = ARMS[other].split(" (")[0]
        cells = [f"{ARMS[arm]} minus {short}"]
        for column in COLUMNS:
            gain = difference(scores_of(column, arm), scores_of(column, other), PRETRAININGS)
            mean = f"{gain.mean:+.1f}"
            if gain.low > 0 or gain.high < 0:
                mean = f"**{mean}**"
            cells.append(f"{mean} ({gain.low:.1f} to {gain.high:.1f})")
        lines.append(row(cells))
    return lines


def more_table() -> list[str]:
    """What has fewer than three pre-trainings: each run, and no interval."""
    lines = head(["what", "A2MIM", "random weights, or random features"])
    for title, (folder, kind, keys) in MORE.items():
        cells = [title]
        for arm in ("a2mim", "scratch"):
            start = f"{kind}-{arm}"
            if kind == "ten-long":                           # A2MIM has its usual length
                start = "ten-a2mim" if arm == "a2mim" else "ten-scratch-long"
            elif arm == "scratch" and kind in PROBES:
                start = f"{kind}-random-branches"
            found = scores_in(folder, f"{start}-l", "", *keys)
            found = found or scores_in(folder, f"{start}-s", "", *keys)
            cells.append(", ".join(f"{score:.1f}" for score in found.values()) or "-")
        lines.append(row(cells))
    return lines


def run_table() -> list[str]:
    """Every result file: a row each."""
    lines = head(["file", "labels", "score, percent"])
    for file in sorted(FOLDER.glob("*/*.json")):
        result = json.loads(file.read_text())
        keys = [key for key in ("top1", "best_miou", "miou") if key in result] or ["box", "AP50"]
        keys = keys[:1] if keys[0] != "box" else keys
        name = f"{file.parent.name}/{file.stem}"
        lines.append(row([name, str(result.get("labels", "")), f"{percent(file, *keys):.2f}"]))
    return lines


def all_tables() -> str:
    tables = (score_table(), difference_table(), more_table(), run_table())
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


def curve(kind: str, start: str, end: str, key: str = "top1") -> list[tuple[int, float]]:
    """(epochs of pre-training, percent). start: the file of random weights."""
    names = {0: start, 60: f"{kind}-a2mim-{end}"}
    for epochs in (5, 15, 30):
        names[epochs] = f"{kind}-a2mim-e{epochs}-{end}"
    return [(epochs, percent(RESNET18 / f"{names[epochs]}.json", key)) for epochs in sorted(names)]


def draw_schedules(file: Path) -> None:
    few = {f"10 %, label seed {seed}": curve("ten", f"ten-scratch-l{seed}", f"l{seed}")
           for seed in (0, 3)}
    few["1 %"] = curve("one", "one-scratch-l0", "l0")
    frozen = {"linear probe": curve("lin", "lin-random-branches-s0", "s0"),
              "20-NN": curve("knn", "knn-random-branches-s0", "s0")}
    camvid = {"val": curve("camvid", "camvid-scratch-s0", "s0", "best_miou"),
              "test": curve("camvid", "camvid-scratch-s0-test", "s0-test", "miou")}
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
