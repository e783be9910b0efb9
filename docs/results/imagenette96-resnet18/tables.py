"""The tables and the curve of docs/results.md, from the result files in this folder.

    python docs/results/imagenette96-resnet18/tables.py

Writes table.md beside this file and assets/schedules.png. What the names of the files mean is in
docs/results.md.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent.parent
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
Scores = dict[int, float]                                    # seed -> percent


def percent(name: str, key: str = "top1") -> float:
    return 100 * json.loads((FOLDER / f"{name}.json").read_text())[key]


def scores_of(column: str, arm: str) -> Scores:
    kind, letter, end, key = COLUMNS[column]
    if arm == "scratch" and kind in PROBES:
        arm = "random-branches"
    found = {}
    for seed in range(4):
        name = f"{kind}-{arm}-{letter}{seed}{end}"
        if (FOLDER / f"{name}.json").exists():
            found[seed] = percent(name, key)
    return found


def head(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]


def score_table() -> list[str]:
    """Mean ± standard deviation over the pre-trainings: a row for each arm."""
    lines = head(["start", *COLUMNS])
    for arm, title in ARMS.items():
        cells = [title]
        for column in COLUMNS:
            means = by_pretraining(scores_of(column, arm), PRETRAININGS)
            cells.append(mean_and_spread(means))
        lines += ["| " + " | ".join(cells) + " |"]
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
        lines += ["| " + " | ".join(cells) + " |"]
    return lines


def run_table() -> list[str]:
    """Every result file: a row each."""
    lines = head(["file", "labels", "score, percent"])
    for file in sorted(FOLDER.glob("*.json")):
        result = json.loads(file.read_text())
        keys = [key for key in ("top1", "best_miou", "miou") if key in result]
        if keys:
            labels = result.get("labels", "")
            lines += [f"| {file.stem} | {labels} | {percent(file.stem, keys[0]):.2f} |"]
    return lines


def curve(kind: str, start: str, end: str, key: str = "top1") -> list[tuple[int, float]]:
    """(epochs of pre-training, percent). start: the file of random weights."""
    names = {0: start, 60: f"{kind}-a2mim-{end}"}
    for epochs in (5, 15, 30):
        names[epochs] = f"{kind}-a2mim-e{epochs}-{end}"
    return [(epochs, percent(names[epochs], key)) for epochs in sorted(names)]


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


def all_tables() -> str:
    tables = (score_table(), difference_table(), run_table())
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


def main() -> None:
    text = all_tables()
    (FOLDER / "table.md").write_text(text)
    print(text, end="")
    draw_schedules(ROOT / "assets/schedules.png")


if __name__ == "__main__":
    main()
