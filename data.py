"""Data: images from a folder, a torchvision dataset or the built-in `shapes`, as uint8 batches in a reproducible order.

Two rules keep a run the same for any number of workers, and let it go on where it stopped: the order of samples depends
on (seed, epoch) alone, the augmentation of a sample on (seed, epoch, index) alone. Images stay uint8 until `normalise`.
"""

import functools
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from engine.command import Failed
from engine.files import printable
from engine.flags import pair
from engine.images import (SUFFIXES, TorchvisionSet, centre, list_images, name_some, read_image,
                           split_folder)
from engine.journal import steps_per_epoch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # ImageNet's, one number per channel
NAMED = ("shapes", "cifar10", "cifar100", "stl10", "imagenette")


def seed_for(*numbers: int) -> int:
    """One well-mixed 64-bit seed from several small numbers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@functools.cache
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Both (C, 1, 1), moved to the device once."""
    return tuple(torch.tensor(v, device=device).view(-1, 1, 1) for v in (MEAN, STD))


def normalise(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, 3, H, W) -> float32 on `device`, with MEAN and STD."""
    mean, std = (255 * v for v in mean_and_std(torch.device(device)))
    return images.to(device, non_blocking=mean.is_cuda).float().sub_(mean).div_(std)


def denormalise(images: Tensor) -> Tensor:
    """The way back, for pictures: normalised (B, 3, H, W) -> [0, 1], clamped."""
    mean, std = mean_and_std(images.device)
    return (images * std + mean).clamp(0, 1)


# ---- folders ----

class Folder:
    """Images below `root`, cut as ImageNet is (train/, val/, in any capitals), or in class folders, or just there.

    For `split` 'train' and 'val', root/split is read if root/train exists, else all of root, as for 'all'. `labels` are
    the indices of the first-level folders ('all': of those in train/ and val/) in sorted order; a flat folder is one.
    `least`: see read_image. Raises ValueError if there is no image."""

    def __init__(self, root: Path, split: str, least: int | None = None):
        shown = printable(str(root))
        if not root.is_dir():
            raise ValueError(f"--data {shown}: no such folder; give a folder of images or one of "
                             f"{', '.join(NAMED)}")
        cut = split_folder(root, "train") is not None
        if cut and split != "all":
            if (inside := split_folder(root, split)) is None:
                raise ValueError(f"--data {shown}: has train/ but no {split}/; expected "
                                 f"{shown}/{split}/<class>/*.jpg")
            root, cut = inside, False
            shown = printable(str(root))
        if not (names := list_images(root)):
            raise ValueError(f"--data {shown}: no images below it; expected files ending in "
                             f"{', '.join(SUFFIXES)}")
        folders = [name.split(os.sep)[cut:-1] for name in names]
        folders = [inside[0] if inside else "" for inside in folders]
        classes = sorted(set(folders))
        self.classes = [printable(name, None) for name in classes]
        self.root, self.least = root, least
        # arrays, not lists: a million strings would be copied into every worker as their reference counts are touched
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.searchsorted(classes, folders)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def name(self, index: int) -> str:
        """The path in one harmless line, however long it is: for lists of files too."""
        return printable(self.path(index), None)

    def read(self, index: int) -> Tensor:
        return read_image(self.path(index), self.least)


# ---- shapes: the built-in set, drawn on the fly ----

def _star(u, v):
    angle = np.abs((np.arctan2(v, u) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)     # folded onto half a point
    r = np.hypot(u, v)
    return 0.83 * (r * np.cos(angle) - 1) + 1.19 * r * np.sin(angle)     # the line from a tip (1, 0) to the next notch


SHAPES = {  # name -> f(u, v), negative inside, about one unit of distance per unit outside; radius about 1
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.24,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "triangle": lambda u, v: np.maximum(-v, np.abs(u) * 0.866 + v * 0.5) - 0.52,
    "cross": lambda u, v: np.minimum(np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.3),
                                     np.maximum(np.abs(u) - 0.3, np.abs(v) - 0.95)),
    "star": _star,
    "heart": lambda u, v: 0.45 * ((1.2 * u) ** 2 + (1.2 * v) ** 2 - 1 - np.abs(1.2 * u) ** 0.667 * 1.2 * v),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v)),
    "half": lambda u, v: np.maximum(np.hypot(u, v + 0.4) - 1.0, -v - 0.4),
    "arrow": lambda u, v: np.minimum(np.maximum(np.abs(v) - 0.2, np.abs(u + 0.3) - 0.65),
                                     np.maximum(0.1 - u, 0.707 * (np.abs(v) + u) - 0.67)),
}


def texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Stripes, checks, dots or a soft shade, around `colour`; x, y in image sides. (3, h, w)"""
    a, f, p, q = rng.uniform(0, np.pi), rng.uniform(25, 60), rng.uniform(0, 6.3), rng.uniform(0, 6.3)
    s, t = np.sin(f * (x * np.cos(a) + y * np.sin(a)) + p), np.sin(f * (y * np.cos(a) - x * np.sin(a)) + q)
    wave = (lambda: np.tanh(3 * s), lambda: np.tanh(5 * s * t), lambda: np.tanh(4 * (s + t - 0.8)),
            lambda: np.sin(f / 10 * (x * np.cos(a) + y * np.sin(a)) + p))[rng.integers(4)]
    return colour[:, None, None] + rng.uniform(-0.06, 0.06, (3, 1, 1)) * wave()


def draw_shape(canvas: np.ndarray, rng: np.random.Generator, kind: int, radius: float, cx: float, cy: float, ground):
    """Paints outline `kind`, turned, lighter than `ground`, on (3, H, W); in image sides. Gives alpha, rows, cols."""
    side, half = min(canvas.shape[1:]), 1.3 * radius         # draw within the object's own square only
    turn = rng.uniform(-np.pi / 6, np.pi / 6)
    colour = rng.uniform(0.05, 0.95, 3)
    while colour.mean() < ground.mean() + 0.2:               # a light object: it stands out, and is not like a hole
        colour = rng.uniform(0.05, 0.95, 3)
    rows, cols = (slice(max(0, int((c - half) * side)), min(most, max(0, int((c + half) * side) + 1)))
                  for c, most in ((cy, canvas.shape[1]), (cx, canvas.shape[2])))
    y, x = np.mgrid[rows, cols].astype(np.float32) / side
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    alpha = np.clip(0.5 - list(SHAPES.values())[kind](u, v) * radius * side, 0, 1)       # one pixel of soft edge
    canvas[:, rows, cols] += alpha * (texture(rng, x, y, colour) - canvas[:, rows, cols])
    return alpha, rows, cols


class Shapes:
    """An object on a ground, both faintly textured, drawn from (seed, split, index) alone; nothing is stored.

    The label is the object's outline, one of ten; half of the images have a smaller object with an outline of its own
    behind it. An object is lighter than its ground and stands near the middle. Colour, texture, place, size and turn do
    not depend on the label, so neither a colour nor a local texture gives it away: the outline has to be followed."""

    def __init__(self, split: str, size: tuple[int, int], seed: int = 0):
        self.key = (seed, 0 if split == "train" else 1)
        self.size, self.count = size, 10_000 if split == "train" else 2_000
        self.classes = list(SHAPES)
        self.labels = np.arange(self.count) % len(SHAPES)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int, mask: bool = False) -> Tensor:
        rng = np.random.default_rng((*self.key, index))
        (H, W), side = self.size, min(self.size)
        y, x = np.mgrid[:H, :W].astype(np.float32) / side
        ground = rng.uniform(0.1, 0.6, 3)
        canvas = texture(rng, x, y, ground)
        for main in (False, True) if rng.random() < 0.5 else (True,):
            kind = self.labels[index] if main else rng.integers(len(SHAPES))
            radius = rng.uniform(0.30, 0.42) if main else rng.uniform(0.09, 0.16)
            reach = 0.1 if main else 0.5                     # from the middle, in image sides
            cx, cy = W / side / 2 + rng.uniform(-reach, reach), H / side / 2 + rng.uniform(-reach, reach)
            alpha, rows, cols = draw_shape(canvas, rng, kind, radius, cx, cy, ground)
        if mask:                                             # of the object, drawn last: (1, H, W), 255 inside
            canvas = np.zeros((1, H, W))
            canvas[:, rows, cols] = alpha
        return torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8))


# ---- one door to all of them ----

def open_images(data: str, split: str, image_size: tuple[int, int], root: str | Path = "datasets",
                download: bool = False, labelled: bool = False, crop_min: float | None = None):
    """`--data` -> images with len(), .read(index) -> uint8 (3, H, W), .labels and .classes. split: see Folder.

    data: a folder (see Folder) or one of NAMED. With `labelled`, a folder needs two classes, and one without train/ and
    val/ is split: of each class every fifth image is held out. With `crop_min`, the smallest area of a crop, files may
    be decoded smaller; a crop of 3:4 keeps twice image_size. Raises ValueError if it is not there or not labelled."""
    if data == "shapes":
        return Shapes(split, image_size)
    if data in NAMED:
        return TorchvisionSet(data, split, Path(root), download, labelled)
    source = Folder(Path(data), split, crop_min and math.ceil(2 * max(image_size) / math.sqrt(0.75 * crop_min)))
    if labelled:
        folders = sorted(f.name for f in os.scandir(source.root) if f.is_dir() and not f.name.startswith("."))
        folders = [printable(folder, None) for folder in folders]
        if empty := [folder for folder in folders if folder not in source.classes]:
            shown = printable(str(source.root))
            raise ValueError(f"--data {shown}: the class folder {printable(empty[0])}/ holds no "
                             f"images; fill or remove it")
    if labelled and (len(source.classes) < 2 or "" in source.classes):
        shown = printable(data)
        raise ValueError(f"--data {shown}: needs a folder for each class, at least two; expected "
                         f"{shown}/train/<class>/*.jpg or {shown}/<class>/*.jpg")
    if labelled and not split_folder(Path(data), "train"):
        held_out = np.zeros(len(source), bool)
        for label in range(len(source.classes)):
            held_out[np.flatnonzero(source.labels == label)[4::5]] = True
        return Subset(source, np.flatnonzero(held_out if split == "val" else ~held_out))
    return source


def hold_out(source, args: SimpleNamespace, size: tuple[int, int]):
    """(images to train on, images held out) in pre-training: 16 to 2,000, of val/ if it is there, else by the seed."""
    count = min(max(16, round(args.val * len(source))), 2000, len(source) // 4) if args.val else 0
    if count == 0:
        return source, None
    apart = args.data in NAMED or all(split_folder(Path(args.data), split) for split in ("train", "val"))
    others = open_images(args.data, "val", size, args.data_root, crop_min=args.crop_min) if apart else source
    order = np.random.default_rng((args.seed, len(others))).permutation(len(others))
    return source if apart else Subset(source, np.sort(order[count:])), Subset(others, np.sort(order[:count]))


class Subset:
    """Some images of a source: those at `indices`."""

    def __init__(self, source, indices: np.ndarray):
        self.source, self.indices, self.classes, self.labels = source, indices, source.classes, source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))


class CropAndFlip(v2.RandomResizedCrop):
    """torchvision's random crop of at least `scale` of the area, 3/4 to 4/3 of the shape asked for, resized, flipped.

    uint8 (3, H, W) in and out. Antialiased; bilinear in pre-training, bicubic in fine-tuning, as released. The flip
    comes before the resize: the part is copied anyway, into the memory order that the uint8 resize is fast in."""

    def __init__(self, image_size: tuple[int, int], scale: float, interpolation=InterpolationMode.BILINEAR):
        wide = image_size[1] / image_size[0]
        super().__init__(image_size, (scale, 1.0), (3 / 4 * wide, 4 / 3 * wide), interpolation, antialias=True)

    def forward(self, image: Tensor) -> Tensor:
        part = tvf.crop(image, **self.make_params([image]))  # (3, h, w), a view
        part = part.flip(-1) if torch.rand(1) < 0.5 else part
        part = part[None].contiguous(memory_format=torch.channels_last)      # (1, 3, h, w)
        return tvf.resize(part, self.size, self.interpolation, antialias=True)[0]


def eval_transform(image_size: tuple[int, int], crop: float = 0.875):
    """The centre of an image that was resized to just cover (H, W) / crop: nothing is padded. uint8 in and out."""
    return functools.partial(centre, image_size, tuple(round(side / crop) for side in image_size))


class Samples(Dataset):
    """source + transform, indexed by (visit, index): gives (image, index of that image, broken).

    visit: how often the image was seen before; the epoch, if there are no repeats. The transform's randomness comes
    from (seed, visit, index) and nothing else. An image that cannot be read gives way to the next one that can;
    `broken` is then the index of the bad one, else -1.
    Raises Failed after 100 in a row: the disk may be gone."""

    def __init__(self, source, transform: v2.Transform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        visit, index = key
        image, broken = None, -1
        tries = min(100, len(self))
        for used in ((index + i) % len(self) for i in range(tries)):
            try:
                image = self.source.read(used)
                break
            except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError):   # as Pillow raises
                broken = index
        if image is None:
            first = name_some(self.source, [index])
            raise Failed(f"{tries} images in a row cannot be read, the first is {first}")
        with torch.random.fork_rng(devices=[]):              # leaves the caller's random numbers alone (workers = 0)
            torch.default_generator.manual_seed(seed_for(self.seed, visit, index))
            return self.transform(image), used, broken


class Batches(Sampler):
    """This process's part of every optimiser step from `start` to `stop`, as lists of (visit, index), `accum` a step.

    The permutation of an epoch is the same everywhere; step i of it takes the next accum * world * batch samples, cut
    into `accum` parts of `world` batches: two processes, or two accumulated halves, see the images one process sees.
    The last incomplete step of an epoch is left out. With `repeats` R a step holds R augmentations of each of its
    images (Hoffer et al. 2020), far apart, and an epoch passes over 1/R of the images.
    Raises ValueError if the data set is smaller than one step."""

    def __init__(self, count: int, batch: int, accum: int, world: int, rank: int, seed: int, start: int, stop: int,
                 repeats: int = 1):
        self.count, self.batch, self.accum, self.world, self.rank, self.seed = count, batch, accum, world, rank, seed
        self.start, self.stop, self.repeats = start, stop, repeats
        self.per_epoch = steps_per_epoch(count, batch * accum * world)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accum

    def __iter__(self):
        shuffled = -1
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, self.per_epoch)
            if epoch != shuffled:
                generator, shuffled = torch.Generator().manual_seed(seed_for(self.seed, epoch)), epoch
                order = torch.randperm(self.count, generator=generator).tolist()
            together = self.batch * self.accum * self.world
            unique = math.ceil(together / self.repeats)      # images of this step
            for part in range(self.accum):
                first = (part * self.world + self.rank) * self.batch
                yield [(epoch * self.repeats + p // unique, order[i * unique + p % unique])
                       for p in range(first, first + self.batch)]


# ---- for fine-tuning: fewer labels, more augmentation ----

def some_labels(source, labels: str | None, seed: int):
    """A class-balanced part of the source, fixed by the seed: a share ('0.1', one per class at least) or '20/class'.

    Raises ValueError if that cannot be read, or a class has too few images."""
    if labels is None:
        return source
    count, share = re.fullmatch(r"(\d+)/class", labels), re.fullmatch(r"0?\.\d+|1(\.0*)?", labels)
    if not (count and int(count[1]) or share and float(labels) > 0):
        raise ValueError(f"--labels {labels}: must be a share such as 0.1, or a count such as 20/class")
    chosen = []
    for label in range(len(source.classes)):
        members = np.flatnonzero(source.labels == label)
        k = int(count[1]) if count else max(1, round(float(labels) * len(members)))
        if k > len(members):
            name = printable(source.classes[label])
            raise ValueError(f"--labels {labels}: class {name} has {len(members)} images")
        chosen.append(np.random.default_rng((seed, label)).permutation(members)[:k])
    return Subset(source, np.sort(np.concatenate(chosen)))


class RandAugment(nn.Module):
    """Two operations, each with probability 0.5 and a magnitude of N(m, 0.5) in [0, 10], bicubic, as released.

    Released: timm's 'rand-m<m>-mstd0.5-inc1'. The operations here are torchvision's, which grow with the magnitude too:
    without timm's Invert and SolarizeAdd, with Identity; magnitudes in 31 bins. Corners are filled with the colour."""

    def __init__(self, magnitude: float):
        super().__init__()
        self.magnitude = magnitude
        how = dict(num_ops=1, interpolation=InterpolationMode.BICUBIC, fill=[104, 116, 124])
        self.by_bin = [v2.RandAugment(magnitude=b, **how) for b in range(31)]

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(2):
            if torch.rand(()) < 0.5:
                m = self.magnitude + 0.5 * torch.randn(())
                image = tvf.to_pil_image(image)              # of tensors, torchvision has no bicubic turn
                image = tvf.pil_to_tensor(self.by_bin[round(3 * float(m.clamp(0, 10)))](image))
        return image


def augment(args: SimpleNamespace) -> v2.Transform:
    """Training augmentation of one image, uint8 in and out: crop, flip, RandAugment, colour jitter."""
    steps = [CropAndFlip(pair(args.image_size), args.crop_min, InterpolationMode.BICUBIC)]
    if args.randaug:
        steps.append(RandAugment(args.randaug))
    if args.jitter:
        steps.append(v2.ColorJitter(args.jitter, args.jitter, args.jitter))
    return v2.Compose(steps)
