"""Image files in, batches to the device.

    read_image, list_images    every kind of image file, and every one below a folder
    centre                     the middle of an image, for evaluation
    make_loader                batches from worker processes
    TorchvisionSet             a data set of torchvision, fetched if asked for
    Broken                     the images that could not be read
"""

import contextlib
import functools
import io
import os
import signal
import stat
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets as tvd
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg        # to move to TorchCodec one day; fast and here today
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from .command import Failed, World
from .files import printable

warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision are deprecated")
warnings.filterwarnings("ignore", message="Palette images with Transparency expressed in bytes")      # read without it

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# counted and told, but not read
OTHER_SUFFIXES = (".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng")
MAX_PIXELS = 2**27                                           # 134 million: more is a mistake, or a decompression bomb

# ---- files ----

def read_image(path: str, least: int | None = None) -> Tensor:
    """A JPEG, PNG, WebP or BMP file as RGB, uint8 (3, H, W), upright. Gray, palette, CMYK and alpha are converted.

    Images of more than 8 bits per channel (16-bit PNG, float TIFF) are refused. The file does not
    say which value is white: 65535, or the 4095 of a 12-bit camera? A wrong guess would give black
    images without a word.

    With `least`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its sides if the shorter one keeps that many pixels.
    Raises OSError, in one line, for a file that cannot be opened, that holds no image or a damaged one, or
    one of more than MAX_PIXELS."""
    regular = stat.S_ISREG(os.stat(path).st_mode)            # a pipe or a socket would be waited for
    if not regular:
        raise OSError("not a regular file")
    content = np.fromfile(path, np.uint8)
    try:
        return decode(content, least)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise OSError("not an image, or of an unknown kind") from None
    except Exception as error:                               # Pillow has no one type for damage
        raise OSError(reason(error)) from None


def decode(content: np.ndarray, least: int | None) -> Tensor:
    """The bytes of a file, uint8 (n,) -> uint8 (3, H, W). See read_image."""
    with Image.open(io.BytesIO(content)) as file:            # the header alone
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels")
        if is_deep(file):
            raise ValueError("more than 8 bits per channel, the value of white is unknown; convert it "
                             "to 8 bits")
        whole = file.size
        if least:
            file.draft(None, (least, least))                 # libjpeg leaves out the high frequencies of each block
        # torchvision decodes JPEG alone. It is faster there, but a damaged PNG would crash it.
        if file.format in ("JPEG", "MPO") and file.size == whole:
            data = torch.from_numpy(content)
            with contextlib.suppress(RuntimeError):          # rarer variants: Pillow knows more
                return decode_jpeg(data, ImageReadMode.RGB, apply_exif_orientation=True)
        file.load()
        with contextlib.suppress(Exception):                 # damaged EXIF data: as it is stored
            ImageOps.exif_transpose(file, in_place=True)
        return tvf.pil_to_tensor(file.convert("RGB"))


def is_deep(file: Image.Image) -> bool:
    """Whether a file that is open, but not yet decoded, has more than 8 bits per channel."""
    if file.mode.startswith(("I", "F")):                     # gray: 16-bit, 32-bit or float
        return True
    # Pillow would keep the upper 8 bits of 16-bit colour. It calls that decoder 'RGB;16B' or alike.
    return file.format in ("PNG", "TIFF") and ";16" in str(file.tile)


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = (getattr(error, "strerror", None) or str(error)).splitlines()
    return printable(lines[0] if lines else type(error).__name__)


def list_images(root: Path) -> list[str]:
    """Every image file below `root`, sorted, relative to it. Links are followed, a loop of links is entered once.

    If there are image files of other kinds, such as TIFF, their number is printed once."""
    found, others, seen = [], Counter(), set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [f for f in folders if not f.startswith(".")]
        inside = os.path.relpath(folder, root)
        inside = "" if inside == "." else inside
        for name in files:
            kind = os.path.splitext(name)[1].lower()
            if kind in SUFFIXES and not name.startswith("."):
                found.append(os.path.join(inside, name))
            elif kind in OTHER_SUFFIXES and not name.startswith("."):
                others[kind] += 1
    if others:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        shown = printable(str(root))
        say_once(f"{shown}: {counts} files are not read; convert them to JPEG or PNG")
    return sorted(found)


@functools.cache
def say_once(text: str) -> None:
    World().say(text)


def split_folder(root: Path, split: str) -> Path | None:
    """root/<split>, in whatever capitals (Train/, VAL/); None if there is none."""
    found = sorted(f.path for f in os.scandir(root) if f.name.lower() == split and f.is_dir())
    return Path(found[-1]) if found else None                # sorted: train/ comes after Train/, and is taken first


def centre(size: tuple[int, int], cover: tuple[int, int], image: Tensor) -> Tensor:
    """(3, h, w) -> the middle `size` of the image, resized to just cover `cover`, at least `size`: no padding."""
    (h, w), (H, W) = image.shape[-2:], cover
    shape = [H, H * w // h] if H * w >= W * h else [W * h // w, W]
    return tvf.center_crop(tvf.resize(image, shape, InterpolationMode.BICUBIC, antialias=True), list(size))


# ---- torchvision's datasets ----

class TorchvisionSet:
    """A dataset of torchvision by name. If no labels are needed, 'stl10' has its 100,000 unlabelled images too."""

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
                ready = (root / "imagenette2").is_dir()      # torchvision refuses to download it twice
                self.data = tvd.Imagenette(root, split=split, size="full", download=download and not ready)
        except RuntimeError:
            raise ValueError(f"--data {name}: not found in --data-root {shown}; add --download to "
                             f"fetch it") from None
        except OSError as error:                             # a network that does not answer is one too
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
    """The first three of some images that cannot be read, each with the reason: 'a.png (damaged)'."""
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


class Broken:
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

    def tell(self, world: World) -> None:
        """All take part. Names the first few, lists all in broken.txt; raises Failed if there are too many."""
        if not world.largest(len(self.new))[0]:
            return
        fresh = sorted(set(world.gather(torch.tensor(self.new, dtype=torch.long)).tolist()) - self.seen)
        self.new = []
        if len(self.seen) < 3 and fresh and world.rank == 0:
            told = name_some(self.source, fresh)
            world.say(f"cannot be read, the next image is taken instead: {told}")
        self.seen.update(fresh)
        if world.rank == 0 and fresh:
            with contextlib.suppress(OSError):               # on a full disk the list waits
                (self.out / "broken.txt").write_text("".join(f"{self.source.name(i)}\n" for i in sorted(self.seen)))
        if len(self.seen) > self.most:
            now = self.most / len(self.source)
            bad = f"{len(self.seen)} of {len(self.source)} images cannot be read"
            raise Failed(f"{bad}, listed in {self.out}/broken.txt; repair or remove them, or allow more with "
                         f"--max-bad (now {now:g})")


# ---- batches ----

def make_loader(samples: Dataset, batches, workers: int | None, world: World, collate=None) -> DataLoader:
    """One loader for the whole run: no pause between epochs, and workers that start once.

    collate: makes a batch of samples that are more than an image and two numbers."""
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 1) // world.local_size - 1))
    ahead = 4                                                # batches that wait, of each worker
    make, collate = (DataLoader, collate) if collate else (Loader, ColoursLast(ahead + 1))
    return make(samples, batch_sampler=batches, num_workers=workers, pin_memory=world.on_cuda, collate_fn=collate,
                prefetch_factor=ahead if workers else None, worker_init_fn=ignore_signals)


def every_image_once(count: int, batch: int, world: World) -> list[list[tuple[int, int]]]:
    """Batches that pass once over all of a set: this process takes every world-th image, and none is taken twice."""
    mine = [(0, i) for i in range(world.rank, count, world.size)]
    return [mine[i:i + batch] for i in range(0, len(mine), batch)]


class ColoursLast:
    """A batch (B, 3, H, W) in the memory order of decoded JPEG files and of fast convolutions: nothing is turned.

    A worker writes into shared memory that it has used before: fresh pages would cost more than the images' resize. A
    worker is `ahead` batches in front at most, and Loader copies a batch as it comes: one buffer more, and none is
    written while it is read."""

    def __init__(self, count: int):
        self.buffers, self.turn = [torch.empty(0, dtype=torch.uint8)] * count, -1

    def __call__(self, samples: list[tuple[Tensor, int, int]]) -> tuple[Tensor, np.ndarray]:
        images, *rest = zip(*samples)
        images, out = [image.permute(1, 2, 0) for image in images], None
        if get_worker_info():
            self.turn = (self.turn + 1) % len(self.buffers)
            if self.buffers[self.turn][:len(images)].shape != (len(images), *images[0].shape):
                self.buffers[self.turn] = torch.empty(len(images), *images[0].shape, dtype=torch.uint8).share_memory_()
            out = self.buffers[self.turn][:len(images)]
        return torch.stack(images, out=out).permute(0, 3, 1, 2), np.array(rest)


class Loader(DataLoader):
    """Gives [images (B, 3, H, W), two numbers (B,) of each]: a batch in memory of its own."""

    def __iter__(self):
        return map(self.own, super().__iter__())

    def own(self, batch: tuple[Tensor, np.ndarray]) -> list[Tensor]:
        images, rest = batch
        if self.num_workers and not self.pin_memory:         # to pin it was to copy it
            images = images.clone()
        return [images, *torch.from_numpy(rest)]


def ignore_signals(worker: int) -> None:
    """Loader workers leave Ctrl-C and SIGTERM to the process they work for: it still wants images for its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
