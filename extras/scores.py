"""Scores of several seeds: read, averaged, compared.

Each label seed s starts from the pre-training seed s mod N. The label seeds of one pre-training
seed share its weights, so they are no independent runs. They are averaged first. Spread and
interval are then over the pre-training seeds.

    read_scores      the scores of an arm in a column of the table, by label seed
    by_pretraining   the mean of each pre-training seed
    difference       of two arms, with its 95 % interval
    sentence         a difference in words
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Column:
    """A column of the table: where its scores are."""
    title: str
    folder: str                                              # of the runs <arm>-<seed>
    keys: tuple[str, ...]                                    # of the score in result.json
    seeds: int                                               # label seeds 0 to seeds - 1


def read_scores(out: Path, column: Column, arm: str) -> dict[int, float]:
    """Label seed -> score in percent. Runs that are missing, or have no such score, are left out,
    and so is an AP of -1, which means that there is no object."""
    scores = {}
    for seed in range(column.seeds):
        file = out / column.folder / f"{arm}-{seed}" / "result.json"
        if not file.is_file():
            continue
        score = json.loads(file.read_text())
        for key in column.keys:
            score = score.get(key) if isinstance(score, dict) else None
        if score is not None and score >= 0:
            scores[seed] = 100 * score
    return scores


def by_pretraining(scores: dict[int, float], pretrain_seeds: int) -> list[float]:
    """Label seed -> score, as the mean score of each pre-training seed that has one."""
    groups = {}
    for seed in sorted(scores):
        groups.setdefault(seed % pretrain_seeds, []).append(scores[seed])
    return [statistics.mean(groups[seed]) for seed in sorted(groups)]


def mean_and_spread(means: list[float], digits: int = 1) -> str:
    """The mean ± standard deviation, as text; a single value has no deviation."""
    spread = f" ± {statistics.stdev(means):.{digits}f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):.{digits}f}{spread}"


# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom. With more than 10 seeds the last
# one is used, which makes the interval a little too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Difference:
    """An arm less another one, in points, with the ends of the 95 % interval."""
    mean: float
    low: float                                               # -inf with a single seed
    high: float
    seeds: int                                               # pre-training seeds


def difference(a: dict[int, float], b: dict[int, float], pretrain_seeds: int) -> Difference | None:
    """a - b, from label seed -> score of each. None if they have no label seed in common.

    The gains of the same label seed are averaged within a pre-training seed. With n pre-training
    seeds, whose mean gains have the standard deviation s, the interval is
    mean ± t(n - 1) s / sqrt(n)."""
    gains = {seed: a[seed] - b[seed] for seed in a if seed in b}
    means = by_pretraining(gains, pretrain_seeds)
    n = len(means)
    if n == 0:
        return None
    mean = statistics.mean(means)
    half = math.inf
    if n > 1:
        t = T975[min(n - 1, len(T975)) - 1]
        half = t * statistics.stdev(means) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def sentence(subject: str, gain: Difference, other: str) -> str:
    """Is the subject better than the other arm? Only if the interval excludes 0."""
    if gain.low > 0:
        word = "better than"
    elif gain.high < 0:
        word = "worse than"
    else:
        word = "not clearly different from"
    if gain.seeds == 1:
        reason = f"{gain.mean:+.1f} points; one pre-training seed gives no interval"
    else:
        reason = (f"{gain.mean:+.1f} points, 95 % interval {gain.low:+.1f} to {gain.high:+.1f}, "
                  f"{gain.seeds} pre-training seeds")
    return f"- {subject}: {word} {other} ({reason})"
