"""Data. This file follows one image: it is listed, read, cropped, sampled, batched and loaded.

Two rules make a run the same for any number of workers, and a resumed run exact:
the order of the images depends on (seed, epoch) alone, and the augmentation of an image depends on
(seed, epoch, index) alone. Images stay uint8 until `normalise`, on the device.
"""

import contextlib
import functools
import io
import math
import os
import re
import signal
import stat
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from engine.checkpointer import steps_per_epoch
from engine.command import Distributed, Failed
from engine.files import printable
from engine.flags import height_width
from engine.images import UNREADABLE, TorchvisionSet, name_some, print_once, reason
from engine.shapes import Shapes

warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of Torch")
warnings.filterwarnings("ignore", message="Palette images with Transparency expressed in bytes")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # ImageNet's, one number per channel
NAMED = ("shapes", "cifar10", "cifar100", "stl10", "imagenette")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# counted and named, but not read
OTHER_SUFFIXES = (".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
MAX_WORKERS = 16                                             # of a process, by default
MAX_PIXELS = 2**27                                           # more is a decompression bomb
MAX_RATIO = 100                                              # of an image's sides


def seed_for(*numbers: int) -> int:
    """One well-mixed 64-bit seed from several small numbers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---- 1. listed ----

def open_images(data: str, split: str, image_size: tuple[int, int],
                root: str | Path = "datasets", download: bool = False, labelled: bool = False,
                crop_min: float | None = None):
    """`--data` -> a source: len(), .read(index) -> uint8 (3, H, W), .name(index), .labels,
    .classes.

    data      a folder (see Folder) or one of NAMED
    split     'train', 'val', 'all', or another folder below `data`, such as 'test'
    labelled  a folder then needs at least two class folders. If it has no train/ and val/, 'val'
              is every fifth image of a class, and 'train' the others
    crop_min  smallest area of a crop. Large JPEG files are then decoded at a reduced size, at
              which the smallest crop still has twice image_size

    Raises ValueError if the data are not there, or not labelled."""
    if data == "shapes":
        return Shapes(split, image_size)
    if data in NAMED:
        return TorchvisionSet(data, split, Path(root), download, labelled)
    min_side = None
    if crop_min:                                             # a crop may have the shape 3:4
        min_side = math.ceil(2 * max(image_size) / math.sqrt(0.75 * crop_min))
    source = Folder(Path(data), split, min_side)
    if not labelled:
        return source
    check_classes(source, data)
    if split not in ("train", "val") or source.root != Path(data):
        return source                                        # 'all', or a folder below data
    held_out = np.zeros(len(source), bool)
    for label in range(len(source.classes)):
        members = np.flatnonzero(source.labels == label)
        held_out[members[4::5]] = True
    return Subset(source, np.flatnonzero(held_out if split == "val" else ~held_out))


class Folder:
    """The images below `root`: in ImageNet's layout (train/, val/), in class folders, or unsorted.

    split  'all'    all of root
           'train'  root/train if it is there, otherwise all of root
           'val'    root/val if it is there, otherwise all of root unless there is a root/train
           another  root/<split>

    `labels` are the indices of the first-level folders in sorted order ('all': of the folders
    inside train/ and val/); a flat folder is one class. min_side: see read_image. Raises ValueError
    if the split is not there, or holds no image."""

    def __init__(self, root: Path, split: str, min_side: int | None = None):
        shown = printable(str(root))
        if not root.is_dir():
            raise ValueError(f"--data {shown}: no such folder; give a folder of images or one of "
                             f"{', '.join(NAMED)}")
        has_train = split_folder(root, "train") is not None
        folder = split_folder(root, split) if split != "all" else None
        needs_folder = split not in ("train", "val", "all") or (split == "val" and has_train)
        if folder is None and needs_folder:
            there = "train/ but no" if has_train else "no"
            raise ValueError(f"--data {shown}: has {there} {split}/; expected "
                             f"{shown}/{split}/<class>/*.jpg")
        below_splits = has_train and folder is None          # names begin with train/ or val/
        root = folder or root
        names = list_images(root)
        if not names:
            raise ValueError(f"--data {printable(str(root))}: no images below it; expected files "
                             f"ending in {', '.join(SUFFIXES)}")
        folders = []                                         # of the class of each image
        for name in names:
            parts = name.split(os.sep)[:-1]
            if below_splits:
                parts = parts[1:]
            folders.append(parts[0] if parts else "")
        classes = sorted(set(folders))
        self.classes = [printable(name, None) for name in classes]
        self.labels = np.searchsorted(classes, folders)
        self.root = root
        self.min_side = min_side
        # An array: every worker would get its own copy of a million strings in a list, because
        # reading a string changes its reference count.
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def name(self, index: int) -> str:
        """The path as one harmless line, however long it is."""
        return printable(self.path(index), None)

    def read(self, index: int) -> Tensor:
        """The image, uint8 (3, H, W). Raises OSError as read_image does, and for an image so slim
        that it would be enlarged enormously."""
        image = read_image(self.path(index), self.min_side)
        H, W = image.shape[1:]
        if max(H, W) > MAX_RATIO * min(H, W):
            raise OSError(f"{W} x {H} pixels are too slim")
        return image


class Subset:
    """Some images of a source: those at `indices`."""

    def __init__(self, source, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.classes = source.classes
        self.labels = source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))


def list_images(root: Path) -> list[str]:
    """Every image file below `root`, sorted, relative to it.

    Links are followed. A folder that is reached twice, such as by a loop of links, is read once. If
    there are image files of other kinds, such as TIFF, their number is printed once."""
    def tell(error: OSError) -> None:
        print_once(f"{printable(str(error.filename))}: cannot be read ({error.strerror}); its "
                   f"images are left out")

    found, others, seen = [], Counter(), set()
    for folder, folders, files in os.walk(root, onerror=tell, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)               # once a folder is 3 times as fast
        inside = "" if inside == "." else inside
        for name in files:
            kind = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if kind in SUFFIXES:
                found.append(os.path.join(inside, name))
            elif kind in OTHER_SUFFIXES:
                others[kind] += 1
    if others:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        print_once(f"{printable(str(root))}: {counts} files are not read; convert them to JPEG or "
                   f"PNG")
    return sorted(found)


def split_folder(root: Path, split: str) -> Path | None:
    """root/<split> in any capitals (Train/, VAL/); None if there is none. Raises ValueError for a
    folder that cannot be read."""
    try:
        entries = [*os.scandir(root)]
    except OSError as error:
        raise ValueError(f"--data {printable(str(root))}: cannot be read ({error.strerror})"
                         ) from None
    found = [entry.path for entry in entries
             if entry.name.lower() == split.lower() and entry.is_dir()]
    return Path(max(found)) if found else None               # of train/ and Train/ the former


def check_classes(source: Folder, data: str) -> None:
    """Raises ValueError unless there are two class folders, each with images."""
    shown = printable(data)
    is_whole_set = split_folder(source.root, "train") is not None            # split 'all'
    entries = [] if is_whole_set else os.scandir(source.root)
    for entry in sorted(entries, key=lambda entry: entry.name):
        name = printable(entry.name, None)
        if entry.is_dir() and not entry.name.startswith(".") and name not in source.classes:
            raise ValueError(f"--data {printable(str(source.root))}: the class folder "
                             f"{printable(name)}/ holds no images; fill or remove it")
    if set(map(str.lower, source.classes)) <= SPLITS:
        raise ValueError(f"--data {shown}: its folders ({', '.join(source.classes)}) look like "
                         f"parts of a set; name them train/ and val/")
    if len(source.classes) > 2 and "" in source.classes:
        stray = source.name(source.labels.tolist().index(source.classes.index("")))
        raise ValueError(f"--data {shown}: {stray} lies in no class folder; move or remove it")
    if len(source.classes) < 2 or "" in source.classes:
        raise ValueError(f"--data {shown}: needs a folder for each class, at least two; expected "
                         f"{shown}/train/<class>/*.jpg or {shown}/<class>/*.jpg")


def check_outside(out: str, source) -> None:
    """Raises ValueError if --out lies inside the folder of the images: the next run would read the
    pictures of this one as images."""
    while isinstance(source, Subset):
        source = source.source
    if isinstance(source, Folder) and Path(out).resolve().is_relative_to(source.root.resolve()):
        raise ValueError(f"--out {out}: lies inside the folder of the images, "
                         f"{printable(str(source.root))}; choose a folder outside of it")


def hold_out(source, asked: dict):
    """For pre-training: (images to train on, held-out images, or None if --val is 0).

    16 to 2,000 images are held out, but at most a quarter of a small set. They are taken from val/
    if train/ and val/ are there, and otherwise out of the training images. The seed chooses them.
    asked: the settings of the run, as a dict."""
    data, val, seed = asked["data"], asked["val"], asked["seed"]
    count = 0
    if val:
        count = min(max(16, round(val * len(source))), 2000, len(source) // 4)
    if count == 0:
        return source, None
    has_val = data in NAMED or all(
        split_folder(Path(data), split) for split in ("train", "val"))
    pool = source                                            # to take them from
    if has_val:
        pool = open_images(data, "val", height_width(asked["image_size"]), asked["data_root"],
                           crop_min=asked["crop_min"])
    order = np.random.default_rng((seed, len(pool))).permutation(len(pool))
    held_out = Subset(pool, np.sort(order[:count]))
    if has_val:
        return source, held_out
    return Subset(source, np.sort(order[count:])), held_out


def some_labels(source, labels: str | None, seed: int):
    """For fine-tuning: a class-balanced part of the source, fixed by the seed.

    labels: a share such as '0.1' (at least one image per class), or a count such as '20/class'.
    Raises ValueError for another text, or if a class has too few images."""
    if labels is None:
        return source
    count = re.fullmatch(r"(\d+)/class", labels)
    share = re.fullmatch(r"0?\.\d+|1(\.0*)?", labels)
    amount = 0.0
    if count:
        amount = int(count[1])
    elif share:
        amount = float(labels)
    if amount <= 0:
        raise ValueError(f"--labels {printable(labels)}: must be a share such as 0.1, or a count "
                         f"such as 20/class")
    chosen = []
    for label, name in enumerate(source.classes):
        members = np.flatnonzero(source.labels == label)
        k = amount if count else max(1, round(amount * len(members)))
        if k > len(members):
            raise ValueError(f"--labels {labels}: class {printable(name)} has {len(members)} "
                             f"images")
        chosen.append(np.random.default_rng((seed, label)).permutation(members)[:k])
    return Subset(source, np.sort(np.concatenate(chosen)))


# ---- 2. read ----

def read_image(path: str, min_side: int | None = None) -> Tensor:
    """A JPEG, PNG, WebP or BMP file as RGB, uint8 (3, H, W), upright.

    Gray, palette, CMYK and alpha are converted. Images of more than 8 bits per channel are refused,
    because the file does not say which value is white: 65535, or the 4095 of a 12-bit camera?

    min_side: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side still has at
    least so many pixels. Raises OSError, in one line, for a file that cannot be opened, that holds
    no image or a damaged one, or one of more than MAX_PIXELS."""
    if not stat.S_ISREG(os.stat(path).st_mode):              # a pipe would be waited for
        raise OSError("not a regular file")
    content = np.fromfile(path, np.uint8)
    try:
        return decode(content, min_side)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise OSError("not an image, or of an unknown kind") from None
    except Exception as error:                               # Pillow has no one type for damage
        raise OSError(reason(error)) from None


def decode(content: np.ndarray, min_side: int | None) -> Tensor:
    """The bytes of a file, uint8 (n,) -> uint8 (3, H, W). See read_image."""
    with Image.open(io.BytesIO(content)) as file:            # the header alone
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels, at most {MAX_PIXELS} are read")
        if is_deep(file):
            raise ValueError("more than 8 bits per channel, the value of white is unknown; "
                             "convert it to 8 bits")
        whole = file.size
        if min_side:
            file.draft(None, (min_side, min_side))           # libjpeg drops high frequencies
        # torchvision decodes only JPEG here. It is faster, but a damaged PNG would crash it.
        if file.format in ("JPEG", "MPO") and file.size == whole:
            data = torch.from_numpy(content)
            with contextlib.suppress(RuntimeError):          # rare variants: Pillow knows more
                return decode_jpeg(data, ImageReadMode.RGB, apply_exif_orientation=True)
        file.load()
        with contextlib.suppress(Exception):                 # damaged EXIF data: as it is stored
            ImageOps.exif_transpose(file, in_place=True)
        return tvf.pil_to_tensor(file.convert("RGB"))


def is_deep(file: Image.Image) -> bool:
    """Has a file that is open, but not yet decoded, more than 8 bits per channel?"""
    if file.mode.startswith(("I", "F")):                     # gray: 16-bit, 32-bit or float
        return True
    # Pillow would keep the upper 8 bits of 16-bit colour. It calls that decoder 'RGB;16B'.
    return file.format in ("PNG", "TIFF") and ";16" in str(file.tile)


# ---- 3. cropped ----

class CropAndFlip(v2.RandomResizedCrop):
    """torchvision's random crop, resized to (H, W) and flipped; uint8 (3, h, w) -> (3, H, W).

    A crop has at least `scale` of the area; its width / height is 3/4 to 4/3 of W / H. Bilinear in
    pre-training, bicubic in fine-tuning, as released. We flip before resizing: the crop must be
    copied to channels_last for the fast uint8 resize anyway, so the flip is free."""

    def __init__(self, image_size: tuple[int, int], scale: float,
                 interpolation=InterpolationMode.BILINEAR):
        wide = image_size[1] / image_size[0]
        super().__init__(image_size, (scale, 1.0), (3 / 4 * wide, 4 / 3 * wide), interpolation,
                         antialias=True)

    def forward(self, image: Tensor) -> Tensor:
        crop = tvf.crop(image, **self.make_params([image]))  # (3, h, w), a view
        if torch.rand(1) < 0.5:
            crop = crop.flip(-1)
        crop = crop[None].contiguous(memory_format=torch.channels_last)      # (1, 3, h, w)
        return tvf.resize(crop, self.size, self.interpolation, antialias=True)[0]


def eval_transform(image_size: tuple[int, int], crop: float = 0.875):
    """The centre (H, W) of an image that just covers (H, W) / crop: nothing is padded. uint8."""
    cover = tuple(round(side / crop) for side in image_size)
    return functools.partial(centre, image_size, cover)


def centre(size: tuple[int, int], cover: tuple[int, int], image: Tensor) -> Tensor:
    """Resizes an image (3, h, w) until it just covers `cover`, and cuts `size` from its middle."""
    (h, w), (H, W) = image.shape[-2:], cover
    shape = [H, H * w // h] if H * w >= W * h else [W * h // w, W]
    resized = tvf.resize(image, shape, InterpolationMode.BICUBIC, antialias=True)
    return tvf.center_crop(resized, list(size))


class RandAugment(nn.Module):
    """Two operations, each with probability 0.5 and magnitude N(m, 0.5) in [0, 10]; bicubic.

    Released: timm's 'rand-m<m>-mstd0.5-inc1'. The operations here are torchvision's, which grow
    with the magnitude too. They lack Invert and SolarizeAdd, have Identity, and 31 magnitudes.
    Corners are filled with (104, 116, 124), as released: the mean colour with red and blue
    exchanged."""

    def __init__(self, magnitude: float):
        super().__init__()
        self.magnitude = magnitude
        how = dict(num_ops=1, interpolation=InterpolationMode.BICUBIC, fill=[104, 116, 124])
        self.by_bin = [v2.RandAugment(magnitude=b, **how) for b in range(31)]

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(2):
            if torch.rand(()) < 0.5:
                m = self.magnitude + 0.5 * torch.randn(())
                operation = self.by_bin[round(3 * float(m.clamp(0, 10)))]
                picture = tvf.to_pil_image(image)            # tensors rotate without bicubic
                image = tvf.pil_to_tensor(operation(picture))
        return image


def augment(settings) -> v2.Transform:
    """For fine-tuning, uint8 in and out: crop, flip, RandAugment, colour jitter."""
    size = height_width(settings.image_size)
    steps = [CropAndFlip(size, settings.crop_min, InterpolationMode.BICUBIC)]
    if settings.randaug:
        steps.append(RandAugment(settings.randaug))
    if settings.jitter:
        steps.append(v2.ColorJitter(settings.jitter, settings.jitter, settings.jitter))
    return v2.Compose(steps)


# ---- 4. sampled ----

class ImageDataset(Dataset):
    """source + transform, indexed by (visit, index): (image, index of that image, broken).

    visit is the epoch; with repeats it is epoch x repeats + the number of the repeat.
    The randomness of the transform comes from (seed, visit, index) alone. An image that cannot be
    read is replaced by the next one that can; `broken` is then its index, and otherwise -1.
    Raises Failed after 100 unreadable images in a row: the disk may be gone."""

    def __init__(self, source, transform: v2.Transform, seed: int):
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        visit, index = key
        image, broken = None, -1
        tries = min(100, len(self))
        for i in range(tries):
            used = (index + i) % len(self)
            try:
                image = self.source.read(used)
                break
            except UNREADABLE:
                broken = index
        if image is None:
            first = name_some(self.source, [index])
            raise Failed(f"{tries} images in a row cannot be read, the first is {first}")
        # without workers this runs in the training process, whose random state must not change
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, visit, index))
            return self.transform(image), used, broken


# ---- 5. batched ----

class ResumableBatchSampler(Sampler):
    """This process's batches from optimiser step `start` to `stop`, as lists of (visit, index).

    The permutation of an epoch is the same on all processes. Step i takes the next accum * world *
    batch images of it, cut into `accum` parts of `world` batches. So the images of a step do not
    depend on how they are divided among processes and forward passes. The last incomplete step of
    an epoch is left out.
    With `repeats` R a step holds R augmentations of each of its images (Hoffer et al. 2020), far
    apart, and an epoch passes over 1/R of the images.
    Raises ValueError if the data set is smaller than one step."""

    def __init__(self, count: int, batch: int, accum: int, world: int, rank: int, seed: int,
                 start: int, stop: int, repeats: int = 1):
        self.count = count
        self.batch = batch
        self.accum = accum
        self.world = world
        self.rank = rank
        self.seed = seed
        self.start = start
        self.stop = stop
        self.repeats = repeats
        self.per_epoch = steps_per_epoch(count, batch * accum * world)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accum

    def __iter__(self):
        permutation_of = -1
        together = self.batch * self.accum * self.world      # places of a step
        unique = math.ceil(together / self.repeats)          # images of a step
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, self.per_epoch)
            if epoch != permutation_of:
                generator = torch.Generator().manual_seed(seed_for(self.seed, epoch))
                order = torch.randperm(self.count, generator=generator)
                permutation_of = epoch
            for part in range(self.accum):
                first = (part * self.world + self.rank) * self.batch
                keys = []
                for place in range(first, first + self.batch):
                    repeat, image = divmod(place, unique)
                    keys.append((epoch * self.repeats + repeat, int(order[i * unique + image])))
                yield keys


def every_image_once(count: int, batch: int, world: Distributed) -> list[list[tuple[int, int]]]:
    """Batches that pass once over a set: this process takes every world-th image."""
    mine = [(0, i) for i in range(world.rank, count, world.size)]
    return [mine[i:i + batch] for i in range(0, len(mine), batch)]


# ---- 6. loaded ----

def default_workers(world: Distributed) -> int:
    """Loader processes of each process: its share of the cores that it may use, less one."""
    return min(MAX_WORKERS, max(1, usable_cores() // world.local_size - 1))


def make_loader(samples: Dataset, batches, workers: int | None, world: Distributed,
                collate=None, persistent: bool = False) -> DataLoader:
    """One loader for the whole run: workers start once, and there is no pause between epochs.

    It gives [images (B, 3, H, W), index (B,), broken (B,)]. `collate` makes a batch of samples
    that are more than an image and two numbers. persistent: the workers wait for another pass."""
    if workers is None:
        workers = default_workers(world)
    ahead = 4                                                # batches that wait, of each worker
    kind = DataLoader
    if collate is None:
        kind, collate = CopyingLoader, ChannelsLastCollate(ahead + 1)
    return kind(samples, batch_sampler=batches, num_workers=workers, pin_memory=world.on_cuda,
                collate_fn=collate, prefetch_factor=ahead if workers else None,
                worker_init_fn=ignore_signals, persistent_workers=persistent and workers > 0)


def usable_cores() -> int:
    """The cores that this process may use: a job's or a container's, rather than the machine's."""
    if hasattr(os, "sched_getaffinity"):                     # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ChannelsLastCollate:
    """Stacks images to (B, 3, H, W) in channels_last, the memory order of decoded JPEG files.

    A worker reuses shared-memory buffers. It runs at most `ahead` batches ahead, and CopyingLoader
    copies each batch on arrival, so `ahead + 1` buffers suffice. Fresh shared memory for every
    batch takes about a tenth more CPU time of the loader (96 px photographs, and 224 px crops)."""

    def __init__(self, count: int):
        self.buffers = [torch.empty(0, dtype=torch.uint8)] * count
        self.turn = -1

    def __call__(self, samples: list[tuple[Tensor, int, int]]) -> tuple[Tensor, np.ndarray]:
        images, *numbers = zip(*samples)
        images = [image.permute(1, 2, 0) for image in images]                # (H, W, 3)
        out = None
        if get_worker_info():
            shape = (len(images), *images[0].shape)
            self.turn = (self.turn + 1) % len(self.buffers)
            if self.buffers[self.turn][:len(images)].shape != shape:
                self.buffers[self.turn] = torch.empty(shape, dtype=torch.uint8).share_memory_()
            out = self.buffers[self.turn][:len(images)]
        return torch.stack(images, out=out).permute(0, 3, 1, 2), np.array(numbers)


class CopyingLoader(DataLoader):
    """Copies each batch out of the worker's buffer, as ChannelsLastCollate needs it."""

    def __iter__(self):
        return map(self.copy, super().__iter__())

    def copy(self, batch: tuple[Tensor, np.ndarray]) -> list[Tensor]:
        images, numbers = batch
        if self.num_workers and not self.pin_memory:         # pinning has already copied it
            images = images.clone()
        return [images, *torch.from_numpy(numbers)]


def ignore_signals(worker: int) -> None:
    """Workers leave Ctrl-C and SIGTERM to their process: it needs images for its last step."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)


# ---- 7. normalised, on the device ----

@functools.cache
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Both (C, 1, 1), moved to the device once."""
    return tuple(torch.tensor(values, device=device).view(-1, 1, 1) for values in (MEAN, STD))


def normalise(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, 3, H, W) -> float32 on `device`, with MEAN and STD."""
    mean, std = mean_and_std(torch.device(device))
    if images.shape[1] != len(MEAN):
        raise ValueError(f"images have {images.shape[1]} channels, MEAN and STD (data.py) "
                         f"{len(MEAN)}; the reader and these two must agree")
    images = images.to(device, non_blocking=mean.is_cuda).float()
    return images.sub_(255 * mean).div_(255 * std)


def denormalise(images: Tensor) -> Tensor:
    """The way back, for pictures: normalised (B, 3, H, W) -> [0, 1], clamped."""
    mean, std = mean_and_std(images.device)
    return (images * std + mean).clamp(0, 1)
