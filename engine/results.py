"""What an evaluation writes: accuracies, their files, and features.

    score             the predictions of all processes -> accuracies
    report            prints them; result.json and confusion.png
    write_features    features.npz
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .command import Distributed
from .files import replace_atomically, write_text_atomically
from .pictures import save_confusion


def score(best: Tensor, labels: Tensor, classes: int, world: Distributed) -> dict:
    """The predictions of all processes together -> {'top1', 'top5', 'images', 'confusion'}.

    best       (N, 5), the likeliest class of each image first
    labels     (N,)
    confusion  (C, C), number of images by true class (row) and predicted class (column)

    All processes take part, each with its own images."""
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes**2)
    in_top5 = (best == labels[:, None]).sum()
    counts = torch.cat([confusion, in_top5[None]]).cpu()     # (C * C + 1,)
    counts = world.all_reduce_sum(counts)
    confusion = counts[:-1].view(classes, classes)
    images = confusion.sum().item()
    top1 = confusion.diag().sum().item() / images
    top5 = counts[-1].item() / images
    return dict(top1=top1, top5=top5, images=images, confusion=confusion)


def report(result: dict, settings, world: Distributed, state, **more) -> None:
    """Prints the result of `score`, and writes confusion.png and result.json.

    state  finetune.TrainState
    more   further entries of result.json

    The accuracy of a class without validation images is None. Raises OSError if a file cannot be
    written."""
    out = Path(settings.out)
    confusion = result.pop("confusion").double()             # (C, C)
    images = confusion.sum(1)                                # of each class
    shares = confusion / images[:, None].clamp(min=1)        # rows sum to 1
    per_class = {}
    for name, share, count in zip(state.classes, shares.diag().tolist(), images.tolist()):
        per_class[name] = round(share, 4) if count else None

    world.print0(f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} % "
                 f"of {result['images']} images")
    if len(state.classes) <= 20:
        texts = []
        for name, share in per_class.items():
            texts.append(f"{name} -" if share is None else f"{name} {100 * share:.0f}")
        world.print0("per class: " + ", ".join(texts))
    if world.rank:
        return

    more["weights"] = settings.weights or settings.init
    if not settings.eval_only:
        more["labels"] = len(state.labels)
    text = json.dumps({**result, **more, "per_class": per_class}, indent=1) + "\n"
    was_trained = (out / "checkpoint.pt").exists()
    fix = f"go on with --out {out} --resume" if was_trained else "give the same command again"
    with replace_atomically(out / "confusion.png", fix) as beside:
        save_confusion(beside, shares, state.classes)
    # last, because a folder with a result.json is refused when the command is given again
    write_text_atomically(out / "result.json", text, fix)


def write_features(z: Tensor, index: Tensor, settings, world: Distributed,
                   source) -> None:
    """Writes features.npz. All processes take part, each with its own images.

    z       (n, D), features of this process's images
    index   (n,), the positions of these images in `source`
    source  labels, classes, and name(i) of all N images

    The file holds features (N, D) float32, labels (N,) int64, files (N,) below --data, and classes
    (C,). An image in no folder of a class has the label -1. Each image stands there once, in the
    order of the source; unreadable images are left out.
    Raises OSError if the file cannot be written."""
    features = is_there = None
    if world.rank == 0:
        features = np.zeros((len(source), z.shape[1]), np.float32)
        is_there = np.zeros(len(source), bool)
    longest = world.all_reduce_max(len(z))[0]
    for first in range(0, longest, 4096):                    # rank 0 alone holds all features
        some = slice(first, first + 4096)
        rows = world.all_gather(z[some]).cpu().numpy()
        places = world.all_gather(index[some]).cpu().numpy()
        if world.rank == 0:
            features[places] = rows
            is_there[places] = True
    if world.rank:
        return

    used = np.flatnonzero(is_there)
    names = [source.name(int(i)) for i in used]
    if os.path.isdir(settings.data):
        names = [os.path.relpath(name, settings.data) for name in names]
    labels = source.labels[used].astype(np.int64)
    classes = list(source.classes)
    if classes[0] == "":                                     # files beside the folders of classes
        labels, classes = labels - 1, classes[1:]
    path = Path(settings.out) / "features.npz"
    with (replace_atomically(path, "give the same command again") as beside,
          open(beside, "wb") as file):
        np.savez(file, features=features[used], labels=labels, files=np.array(names, dtype=str),
                 classes=np.array(classes, dtype=str))
    world.print0(f"wrote {path}: {len(used)} x {z.shape[1]}")
