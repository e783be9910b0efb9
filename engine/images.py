"""Data that cannot be read, and torchvision's datasets by name.

    reason, name_some, print_once   why an image cannot be read, in one line
    TorchvisionSet                  a dataset of torchvision, downloaded if asked for
    UnreadableImages                the images of a run that could not be read
"""

import contextlib
import functools
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets as tvd
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from .command import Distributed, Failed
from .files import printable


# what reading an image raises; Pillow has no one type for damage
UNREADABLE = (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError)


def reason(error: BaseException) -> str:
    """The message of an exception, in one line."""
    lines = (getattr(error, "strerror", None) or str(error)).splitlines()
    return printable(lines[0] if lines else type(error).__name__)


@functools.cache
def print_once(text: str) -> None:
    """Prints a text on rank 0, the first time that it comes."""
    Distributed().print0(text)


# ---- torchvision's datasets ----

class TorchvisionSet:
    """A dataset of torchvision by name, in the form of data.Folder.

    split: 'train' or 'val'. If no labels are needed, stl10 includes its 100,000 unlabelled images.
    Raises ValueError if the dataset is not in `root` or cannot be read."""

    def __init__(self, name: str, split: str, root: Path, download: bool, labelled: bool):
        shown = printable(str(root))
        try:
            if download:
                root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--data-root {shown}: cannot be written ({error.strerror})") from None
        try:
            self.data = open_torchvision(name, split, root, download, labelled)
        except RuntimeError:
            if download:
                raise ValueError(f"--data {name}: the files in --data-root {shown} are damaged; "
                                 f"remove them, and give the command again") from None
            raise ValueError(f"--data {name}: not found in --data-root {shown}; add --download to "
                             f"fetch it") from None
        except OSError as error:                             # also if the network does not answer
            doing = "fetched into" if download else "read from"
            raise ValueError(f"--data {name}: cannot be {doing} --data-root {shown} "
                             f"({reason(error)})") from None
        # Imagenette has several names for a class
        self.classes = [c if isinstance(c, str) else c[0] for c in self.data.classes]
        self.labels = np.array(labels_of(self.data))

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> Tensor:
        """The image, uint8 (3, H, W)."""
        image, _ = self.data[index]
        return tvf.pil_to_tensor(image.convert("RGB"))


def open_torchvision(name: str, split: str, root: Path, download: bool, labelled: bool):
    """The dataset object of torchvision. Raises RuntimeError if the files are not there."""
    if name in ("cifar10", "cifar100"):
        kind = tvd.CIFAR10 if name == "cifar10" else tvd.CIFAR100
        return kind(root, train=split == "train", download=download)
    if name == "stl10":
        part = "test"
        if split == "train":
            part = "train" if labelled else "train+unlabeled"
        return tvd.STL10(root, split=part, download=download)
    is_there = (root / "imagenette2").is_dir()               # torchvision refuses a second download
    return tvd.Imagenette(root, split=split, size="full", download=download and not is_there)


def labels_of(dataset) -> list[int]:
    """The labels of all images. Each class of torchvision keeps them in its own place."""
    for name in ("targets", "labels"):                       # CIFAR, STL10
        if getattr(dataset, name, None) is not None:
            return getattr(dataset, name)
    return [label for _, label in dataset._samples]          # Imagenette


# ---- images that cannot be read ----

def name_some(source, indices: list[int]) -> str:
    """The names of the first three of some unreadable images, with reasons: 'a.png (damaged)'."""
    texts = []
    for index in indices[:3]:
        name = printable(source.name(index))
        if not name.endswith(")"):                           # some sources give the reason
            try:
                source.read(index)
            except Exception as error:
                name += f" ({reason(error)})"
        texts.append(name)
    others = len(indices) - len(texts)
    return ", ".join(texts) + (f" and {others} more" if others else "")


class UnreadableImages:
    """The images that could not be read, of all processes together."""

    def __init__(self, source, share: float, out: str | Path):
        """share: of all images; if more cannot be read, the run fails. out: of broken.txt."""
        self.source = source
        self.limit = share * len(source)
        self.out = Path(out)
        self.new = []                                        # of this process, not exchanged yet
        self.untold = set()                                  # of all processes, not named yet
        self.seen = set()                                    # of all processes, named

    def state_dict(self) -> dict:
        """Of this process alone, unless `exchange` came before."""
        untold = sorted({*self.untold, *self.new} - self.seen)
        return dict(seen=sorted(self.seen), untold=untold, images=len(self.source))

    def load_state_dict(self, state: dict) -> None:
        """If images were added or removed since, the indices mean others and are dropped."""
        if state.get("images", len(self.source)) == len(self.source):
            self.seen = set(state["seen"])
            self.untold = set(state.get("untold", ()))

    def note(self, broken: Tensor) -> None:
        """broken (B,): the index of an image that could not be read, or -1."""
        self.new += broken[broken >= 0].tolist()

    def exchange(self, world: Distributed) -> None:
        """Tells all processes of the new ones. All processes take part."""
        if world.all_reduce_max(len(self.new))[0]:
            new = world.all_gather(torch.tensor(self.new, dtype=torch.long))
            self.untold |= set(new.tolist()) - self.seen
        self.new = []

    def tell(self, world: Distributed) -> None:
        """Names the first new ones, and lists all in broken.txt. All processes take part.

        Raises Failed if there are too many."""
        self.exchange(world)
        if not self.untold:
            return
        new = sorted(self.untold)
        self.untold = set()
        if len(self.seen) < 3 and world.rank == 0:
            names = name_some(self.source, new)
            world.print0(f"cannot be read, the next image is taken instead: {names}")
        self.seen.update(new)
        if world.rank == 0:
            with contextlib.suppress(OSError):               # on a full disk: the next time
                self.write_list()
        if len(self.seen) > self.limit:
            count = len(self.source)
            raise Failed(f"{len(self.seen)} of {count} images cannot be read, listed in "
                         f"{self.out}/broken.txt; repair or remove them, or allow more with "
                         f"--max-bad (now {self.limit / count:g})")

    def write_list(self) -> None:
        names = [self.source.name(index) for index in sorted(self.seen)]
        text = "".join(f"{name}\n" for name in names)
        (self.out / "broken.txt").write_text(text, encoding="utf-8")
