"""What an evaluation leaves: the counts of all processes as accuracies, and files.

    score             predictions into accuracies
    report            result.json and confusion.png
    write_features    features.npz
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from .command import World
from .pictures import save_confusion


def score(best: Tensor, labels: Tensor, classes: int, world: World) -> dict:
    """The counts of all processes, added up: {'top1', 'top5', 'images', 'confusion'}. best (N, 5), likeliest first.

    confusion (C, C): images of each class (row) by prediction (column)."""
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes**2)
    counts = torch.cat([confusion, (best == labels[:, None]).sum()[None]]).cpu().double()
    counts = (world.mean(counts) * world.size).round().long()
    confusion, images = counts[:-1].view(classes, classes), counts[:-1].sum().item()
    top1, top5 = confusion.diag().sum().item() / images, counts[-1].item() / images
    return dict(top1=top1, top5=top5, images=images, confusion=confusion)


def report(result: dict, args: SimpleNamespace, world: World, run, **more) -> None:
    """Says the result, writes result.json (per-class accuracy too) and confusion.png."""
    confusion, out = result.pop("confusion").double(), Path(args.out)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    per_class = {name: round(share, 4) for name, share in zip(run.classes, shares.diag().tolist())}
    world.say(f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} % of {result['images']} images")
    if len(run.classes) <= 20:
        world.say("per class: " + ", ".join(f"{name} {100 * share:.0f}" for name, share in per_class.items()))
    if world.rank == 0:
        more |= {"weights": args.weights or args.init} | ({} if args.eval_only else {"labels": len(run.labels)})
        (out / "result.json").write_text(json.dumps({**result, **more, "per_class": per_class}, indent=1) + "\n")
        save_confusion(out / "confusion.png", shares, run.classes)


def write_features(z: Tensor, index: Tensor, args: SimpleNamespace, world: World, source) -> None:
    """Writes features.npz from every process's part: z (n, D), of the images at `index` (n,) of the source.

    features (N, D) float32, labels (N,) int64, files (N,) below --data, classes: in the order of the source, each image
    once, without the unreadable ones. Raises OSError if it cannot be written."""
    if world.rank == 0:
        features, there = np.zeros((len(source), z.shape[1]), np.float32), np.zeros(len(source), bool)
    for first in range(0, world.largest(len(z))[0], 4096):   # in parts: rank 0 alone holds the whole
        rows, places = (world.gather(x[first:first + 4096]).cpu().numpy() for x in (z, index))
        if world.rank == 0:
            features[places], there[places] = rows, True
    if world.rank == 0:
        used, file = np.flatnonzero(there), Path(args.out) / "features.npz"
        inside = (lambda name: os.path.relpath(name, args.data)) if os.path.isdir(args.data) else str
        files = np.array([inside(source.name(int(i))) for i in used], dtype=str)
        beside = file.with_name("features.tmp.npz")          # renamed when it is whole
        np.savez(beside, features=features[used], labels=source.labels[used].astype(np.int64), files=files,
                 classes=np.array(source.classes, dtype=str))
        os.replace(beside, file)
        world.say(f"wrote {file}: {len(used)} x {z.shape[1]}")
