"""What an evaluation leaves: the counts of all processes as accuracies, and files.

    score             predictions into accuracies
    report            result.json and confusion.png
    write_features    features.npz
"""

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from .command import Distributed
from .pictures import save_confusion


def score(best: Tensor, labels: Tensor, classes: int, world: Distributed) -> dict:
    """The counts of all processes, added up: {'top1', 'top5', 'images', 'confusion'}. best (N, 5),
    likeliest first.

    confusion (C, C): images of each class (row) by prediction (column)."""
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes**2)
    counts = torch.cat([confusion, (best == labels[:, None]).sum()[None]]).cpu().double()
    counts = (world.all_reduce_mean(counts) * world.size).round().long()
    confusion, images = counts[:-1].view(classes, classes), counts[:-1].sum().item()
    top1, top5 = confusion.diag().sum().item() / images, counts[-1].item() / images
    return dict(top1=top1, top5=top5, images=images, confusion=confusion)


def report(result: dict, args: SimpleNamespace, world: Distributed, run, **more) -> None:
    """Prints the result, writes result.json (with the accuracy of each class) and confusion.png.

    The accuracy of a class without a validation image is None.
    Raises OSError if a file cannot be written."""
    confusion, out = result.pop("confusion").double(), Path(args.out)
    images = confusion.sum(1)                                # of each class
    shares = confusion / images[:, None].clamp(min=1)
    per_class = {}
    for name, share, count in zip(run.classes, shares.diag().tolist(), images.tolist()):
        per_class[name] = round(share, 4) if count else None
    world.print0(f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} % of {result['images']} images")
    if len(run.classes) <= 20:
        told = []
        for name, share in per_class.items():
            told.append(f"{name} -" if share is None else f"{name} {100 * share:.0f}")
        world.print0("per class: " + ", ".join(told))
    if world.rank == 0:
        more |= {"weights": args.weights or args.init} | ({} if args.eval_only else {"labels": len(run.labels)})
        text = json.dumps({**result, **more, "per_class": per_class}, indent=1) + "\n"
        trained = (out / "checkpoint.pt").exists()
        fix = f"go on with --out {out} --resume" if trained else "give the same command again"
        with whole_or_nothing(out / "confusion.png", fix) as beside:
            save_confusion(beside, shares, run.classes)
        with whole_or_nothing(out / "result.json", fix) as beside:
            beside.write_text(text)  # last: where it is, the command is refused


@contextlib.contextmanager
def whole_or_nothing(path: Path, fix: str):
    """Gives the name of a file beside `path`, which is renamed when it is whole.

    If the file cannot be written, no part of it is left, and OSError is raised: one line with the
    file and `fix`."""
    beside = path.with_stem(path.stem + ".tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OSError(f"{path}: not written ({reason}); make room, then {fix}") from None


def write_features(z: Tensor, index: Tensor, args: SimpleNamespace, world: Distributed, source) -> None:
    """Writes features.npz from every process's part: z (n, D), of the images at `index` (n,) of the
    source.

    features (N, D) float32, labels (N,) int64, files (N,) below --data, classes: in the order of
    the source, each image once, without the unreadable ones. Raises OSError if it cannot be
    written."""
    if world.rank == 0:
        features, there = np.zeros((len(source), z.shape[1]), np.float32), np.zeros(len(source), bool)
    # in parts: rank 0 alone holds the whole
    for first in range(0, world.all_reduce_max(len(z))[0], 4096):
        rows, places = (world.all_gather(x[first:first + 4096]).cpu().numpy() for x in (z, index))
        if world.rank == 0:
            features[places], there[places] = rows, True
    if world.rank == 0:
        used, file = np.flatnonzero(there), Path(args.out) / "features.npz"
        inside = (lambda name: os.path.relpath(name, args.data)) if os.path.isdir(args.data) else str
        files = np.array([inside(source.name(int(i))) for i in used], dtype=str)
        labels, classes = source.labels[used].astype(np.int64), np.array(source.classes, dtype=str)
        with whole_or_nothing(file, "give the same command again") as beside:
            np.savez(beside, features=features[used], labels=labels, files=files, classes=classes)
        world.print0(f"wrote {file}: {len(used)} x {z.shape[1]}")
