"""What guards the data: images that cannot be read, and torchvision's named sets.

    reason, name_some, print_once   why an image cannot be read, in one line
    TorchvisionSet                  a data set of torchvision, fetched if asked for
    UnreadableImages                the images of a run that could not be read
"""

import contextlib
import functools
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets as tvd
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from .command import Distributed, Failed
from .files import printable


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = (getattr(error, "strerror", None) or str(error)).splitlines()
    return printable(lines[0] if lines else type(error).__name__)


@functools.cache
def print_once(text: str) -> None:
    Distributed().print0(text)


# ---- torchvision's datasets ----

class TorchvisionSet:
    """A dataset of torchvision by name. If no labels are needed, 'stl10' has its 100,000 unlabelled
    images too."""

    def __init__(self, name: str, split: str, root: Path, download: bool, labelled: bool):
        train, shown = split == "train", printable(str(root))
        try:
            if download:
                root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--data-root {shown}: cannot be written ({error.strerror})") from None
        try:
            if name in ("cifar10", "cifar100"):
                self.data = getattr(tvd, name.upper())(root, train=train, download=download)
            elif name == "stl10":
                part = "test" if not train else "train" if labelled else "train+unlabeled"
                self.data = tvd.STL10(root, split=part, download=download)
            else:
                ready = (root / "imagenette2").is_dir()  # torchvision refuses to download it twice
                self.data = tvd.Imagenette(root, split=split, size="full", download=download and not ready)
        except RuntimeError:
            raise ValueError(f"--data {name}: not found in --data-root {shown}; add --download to "
                             f"fetch it") from None
        except OSError as error:  # a network that does not answer is one too
            doing = "fetched into" if download else "read from"
            raise ValueError(f"--data {name}: cannot be {doing} --data-root {shown} "
                             f"({reason(error)})") from None
        self.classes = [c if isinstance(c, str) else c[0] for c in self.data.classes]
        labels = getattr(self.data, "targets", getattr(self.data, "labels", None))
        self.labels = np.array(labels if labels is not None else [label for _, label in self.data._samples])

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> Tensor:
        return tvf.pil_to_tensor(self.data[index][0].convert("RGB"))


# ---- images that cannot be read ----

def name_some(source, indices: list[int]) -> str:
    """The first three of some images that cannot be read, each with the reason: 'a.png
    (damaged)'."""
    told = []
    for index in indices[:3]:
        name = printable(source.name(index))
        if not name.endswith(")"):                           # else the source has given the reason
            try:
                source.read(index)
            except Exception as error:
                name += f" ({reason(error)})"
        told.append(name)
    more = len(indices) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")


class UnreadableImages:
    """The images that could not be read, on all processes together."""

    def __init__(self, source, share: float, out: str | Path):
        self.source, self.most, self.out, self.seen, self.new = source, share * len(source), Path(out), set(), []

    def state_dict(self) -> dict:
        return dict(seen=sorted({*self.seen, *self.new}))

    def load_state_dict(self, state: dict) -> None:
        self.seen = set(state["seen"])

    def note(self, broken: Tensor) -> None:
        """broken (B,): the index of an image that could not be read, or -1."""
        self.new += broken[broken >= 0].tolist()

    def tell(self, world: Distributed) -> None:
        """All take part. Names the first few, lists all in broken.txt; raises Failed if there are
        too many."""
        if not world.all_reduce_max(len(self.new))[0]:
            return
        fresh = sorted(set(world.all_gather(torch.tensor(self.new, dtype=torch.long)).tolist()) - self.seen)
        self.new = []
        if len(self.seen) < 3 and fresh and world.rank == 0:
            told = name_some(self.source, fresh)
            world.print0(f"cannot be read, the next image is taken instead: {told}")
        self.seen.update(fresh)
        if world.rank == 0 and fresh:
            with contextlib.suppress(OSError):               # on a full disk the list waits
                (self.out / "broken.txt").write_text("".join(f"{self.source.name(i)}\n" for i in sorted(self.seen)))
        if len(self.seen) > self.most:
            now = self.most / len(self.source)
            bad = f"{len(self.seen)} of {len(self.source)} images cannot be read"
            raise Failed(f"{bad}, listed in {self.out}/broken.txt; repair or remove them, or allow more with "
                         f"--max-bad (now {now:g})")
