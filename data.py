"""Data: images in, from a folder, a torchvision dataset or the built-in `shapes`, as uint8 batches in a reproducible order;
pictures, checkpoints and log lines out.

Two rules keep a run the same for any number of workers, and let it stop and go on anywhere:
the order of samples depends on (seed, epoch) alone, the augmentation of a sample on (seed, epoch, index) alone.
Images stay uint8 until `normalise`, on the device: a quarter of the bytes to move.
"""

import contextlib
import functools
import io
import json
import math
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets as tvd
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.io import ImageReadMode, decode_image       # to move to TorchCodec one day; fast and here today
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid

from model import load_checked

warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision are deprecated")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS = 2**27                                           # 134 million: more is a mistake, or a decompression bomb
NAMED = ("shapes", "cifar10", "cifar100", "stl10", "imagenette")


def mix(*numbers: int) -> int:
    """One well-mixed 64-bit seed from several small numbers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@functools.cache
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Both (3, 1, 1), moved to the device once."""
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


def normalise(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, 3, H, W) -> float32 on `device`, with the ImageNet mean and std."""
    images = images.to(device, non_blocking=True).float()
    mean, std = (v * 255 for v in mean_and_std(images.device))
    return images.sub_(mean).div_(std)


def denormalise(images: Tensor) -> Tensor:
    """The way back, for pictures: normalised (B, 3, H, W) -> [0, 1], clamped."""
    mean, std = mean_and_std(images.device)
    return (images * std + mean).clamp(0, 1)


# ---- folders ----

def read_image(path: str) -> Tensor:
    """A JPEG, PNG, WebP or BMP file as RGB, uint8 (3, H, W), upright. Gray, palette, CMYK and alpha are converted.

    Raises OSError, RuntimeError or ValueError for a file that holds no image, or one of more than MAX_PIXELS."""
    if not os.path.isfile(path):                             # a pipe or a socket would be waited for
        raise OSError("not a regular file")
    content = np.fromfile(path, np.uint8)
    with Image.open(io.BytesIO(content)) as file:            # the header alone
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels")
        try:
            image = decode_image(torch.from_numpy(content), ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:                                 # BMP and rarer variants: Pillow knows more, and is slower
            image = tvf.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
    return tvf.to_dtype(image if image.dim() == 3 else image[0], torch.uint8, scale=True)      # 16-bit PNG, animations


def list_images(root: Path) -> list[str]:
    """Every image file below `root`, sorted, relative to it. Links are followed, a loop of links is entered once."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files
                  if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    return sorted(found)


def split_folder(root: Path, split: str) -> Path | None:
    """root/<split>, in whatever capitals (Train/, VAL/); None where there is none."""
    found = sorted(f.path for f in os.scandir(root) if f.name.lower() == split and f.is_dir())
    return Path(found[-1]) if found else None                # sorted: train/ comes after Train/, and is taken first


def printable(name: str) -> str:
    """A file name to be said or written: bytes that are no UTF-8 as backslash escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


class Folder:
    """Images below `root`, which is cut as ImageNet is (train/, val/, in any capitals), or holds class folders, or just images.

    For `split` 'train' and 'val', root/split is read where root/train exists, else all of root. `labels` are the indices of
    the first-level folders in sorted order; a flat folder is one class. Raises ValueError where there is nothing to read."""

    def __init__(self, root: Path, split: str):
        if not root.is_dir():
            raise ValueError(f"--data {root}: no such folder; give a folder of images or one of {', '.join(NAMED)}")
        if split_folder(root, "train"):
            inside = split_folder(root, split)
            if inside is None:
                raise ValueError(f"--data {root}: has train/ but no {split}/; expected {root / split}/<class>/*.jpg")
            root = inside
        names = list_images(root)
        if not names:
            raise ValueError(f"--data {root}: no images below it; expected files ending in {', '.join(SUFFIXES)}")
        folders = [name.split(os.sep)[0] if os.sep in name else "" for name in names]
        classes = sorted(set(folders))
        self.classes = [printable(name) for name in classes]
        self.root = root
        # arrays, not lists: a million strings would be copied into every worker as their reference counts are touched
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.searchsorted(classes, folders)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def read(self, index: int) -> Tensor:
        return read_image(self.path(index))


# ---- torchvision's datasets ----

class Library:
    """A dataset of torchvision by name. Without need of labels, 'stl10' trains on its 100,000 unlabelled images too."""

    def __init__(self, name: str, split: str, root: Path, download: bool, labelled: bool):
        train = split == "train"
        try:
            if download:
                root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--data-root {root}: cannot be written ({error.strerror})") from None
        try:
            if name in ("cifar10", "cifar100"):
                self.data = getattr(tvd, name.upper())(root, train=train, download=download)
            elif name == "stl10":
                self.data = tvd.STL10(root, split="test" if not train else "train" if labelled else "train+unlabeled", download=download)
            else:
                ready = (root / "imagenette2").is_dir()      # torchvision refuses to download it twice
                self.data = tvd.Imagenette(root, split=split, size="full", download=download and not ready)
        except RuntimeError:
            raise ValueError(f"--data {name}: not found in --data-root {root}; add --download to fetch it") from None
        except OSError as error:                             # a network that does not answer is one too
            raise ValueError(f"--data {name}: cannot be {'fetched into' if download else 'read from'} --data-root {root} ({error})") from None
        self.classes = [c if isinstance(c, str) else c[0] for c in self.data.classes]
        labels = getattr(self.data, "targets", getattr(self.data, "labels", None))
        self.labels = np.array([label for _, label in self.data._samples] if labels is None else labels)     # Imagenette

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> Tensor:
        return tvf.pil_to_tensor(self.data[index][0].convert("RGB"))


# ---- shapes: the built-in set, drawn on the fly ----

def _star(u, v):
    angle = np.abs((np.arctan2(v, u) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)          # folded onto half a point
    r = np.hypot(u, v)
    return 0.83 * (r * np.cos(angle) - 1) + 1.19 * r * np.sin(angle)       # the line from a tip (1, 0) to the next notch


SHAPES = {  # name -> f(u, v), negative inside, about one unit of distance per unit outside; radius about 1
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.24,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "triangle": lambda u, v: np.maximum(-v, np.abs(u) * 0.866 + v * 0.5) - 0.52,
    "cross": lambda u, v: np.minimum(np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.3), np.maximum(np.abs(u) - 0.3, np.abs(v) - 0.95)),
    "star": _star,
    "heart": lambda u, v: 0.45 * ((1.2 * u) ** 2 + (1.2 * v) ** 2 - 1 - np.abs(1.2 * u) ** 0.667 * 1.2 * v),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v)),
    "half": lambda u, v: np.maximum(np.hypot(u, v + 0.4) - 1.0, -v - 0.4),
    "arrow": lambda u, v: np.minimum(np.maximum(np.abs(v) - 0.2, np.abs(u + 0.3) - 0.65),
                                     np.maximum(0.1 - u, 0.707 * (np.abs(v) + u) - 0.67)),
}


def _texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Stripes, checks, dots or a soft shade, around `colour`; x, y in image sides. (3, h, w)"""
    a, f, p, q = rng.uniform(0, np.pi), rng.uniform(25, 60), rng.uniform(0, 6.3), rng.uniform(0, 6.3)
    s, t = np.sin(f * (x * np.cos(a) + y * np.sin(a)) + p), np.sin(f * (y * np.cos(a) - x * np.sin(a)) + q)
    kind = rng.integers(4)
    if kind == 0:
        wave = np.tanh(3 * s)
    elif kind == 1:
        wave = np.tanh(5 * s * t)
    elif kind == 2:
        wave = np.tanh(4 * (s + t - 0.8))
    else:
        wave = np.sin(f / 10 * (x * np.cos(a) + y * np.sin(a)) + p)
    return colour[:, None, None] + rng.uniform(-0.06, 0.06, (3, 1, 1)) * wave


class Shapes:
    """An object on a ground, both faintly textured, drawn from (seed, split, index) alone; nothing is stored.

    The label is the object's outline, one of ten; half of the images have a smaller object with an outline of its own
    behind it. An object is lighter than its ground and stands near the middle. Colour, texture, place, size and turn are
    drawn without regard to the label, so neither a colour nor a local texture gives it away: the outline has to be followed."""

    def __init__(self, split: str, size: tuple[int, int], seed: int = 0):
        self.key = (seed, 0 if split == "train" else 1)
        self.size, self.count = size, 10_000 if split == "train" else 2_000
        self.classes = list(SHAPES)
        self.labels = np.arange(self.count) % len(SHAPES)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> Tensor:
        rng = np.random.default_rng((*self.key, index))
        H, W = self.size
        side = min(H, W)
        y, x = np.mgrid[:H, :W].astype(np.float32) / side
        ground = rng.uniform(0.1, 0.6, 3)
        canvas = _texture(rng, x, y, ground)
        for main in (False, True) if rng.random() < 0.5 else (True,):
            kind = self.labels[index] if main else rng.integers(len(SHAPES))
            radius = rng.uniform(0.30, 0.42) if main else rng.uniform(0.09, 0.16)
            reach = 0.1 if main else 0.5                     # from the middle, in image sides
            cx, cy = W / side / 2 + rng.uniform(-reach, reach), H / side / 2 + rng.uniform(-reach, reach)
            turn = rng.uniform(-np.pi / 6, np.pi / 6)
            colour = rng.uniform(0.05, 0.95, 3)
            while colour.mean() < ground.mean() + 0.2:       # a light object: it stands out, and can be told from a hole
                colour = rng.uniform(0.05, 0.95, 3)
            half = 1.3 * radius                              # draw within the object's own square only
            rows = slice(max(0, int((cy - half) * side)), max(0, int((cy + half) * side) + 1))
            cols = slice(max(0, int((cx - half) * side)), max(0, int((cx + half) * side) + 1))
            dx, dy = (x[rows, cols] - cx) / radius, (y[rows, cols] - cy) / radius
            outline = list(SHAPES.values())[kind](dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn))
            alpha = np.clip(0.5 - outline * radius * side, 0, 1)             # one pixel of soft edge
            paint = _texture(rng, x[rows, cols], y[rows, cols], colour)
            canvas[:, rows, cols] += alpha * (paint - canvas[:, rows, cols])
        return torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8))


# ---- one door to all of them ----

def open_source(data: str, split: str, image_size: tuple[int, int], root: str | Path = "datasets", download: bool = False,
                labelled: bool = False):
    """`--data` -> a source with len(), .read(index) -> uint8 (3, H, W), .labels and .classes. split: 'train' or 'val'.

    data: a folder (see Folder) or one of NAMED. With `labelled`, a folder needs two classes, and one without train/ and
    val/ is split: of each class every fifth image is held out. Raises ValueError where it is not there, or not labelled."""
    if data == "shapes":
        return Shapes(split, image_size)
    if data in NAMED:
        return Library(data, split, Path(root), download, labelled)
    source = Folder(Path(data), split)
    if labelled:
        for folder in sorted(printable(f.name) for f in os.scandir(source.root) if f.is_dir() and not f.name.startswith(".")):
            if folder not in source.classes:
                raise ValueError(f"--data {source.root}: the class folder {folder}/ holds no images; fill it or remove it")
    if labelled and (len(source.classes) < 2 or "" in source.classes):
        raise ValueError(f"--data {data}: needs a folder for each class, at least two; expected {data}/train/<class>/*.jpg or {data}/<class>/*.jpg")
    if labelled and not split_folder(Path(data), "train"):
        held_out = np.zeros(len(source), bool)
        for label in range(len(source.classes)):
            held_out[np.flatnonzero(source.labels == label)[4::5]] = True
        return Part(source, np.flatnonzero(held_out if split == "val" else ~held_out))
    return source


class Part:
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
    """torchvision's random crop of at least `scale` of the area, resized, and flipped with even odds. uint8 (3, H, W) in and out.

    Antialiased; bilinear in pre-training, bicubic in fine-tuning, as released. The flip comes before the resize: the part cut out is copied anyway, into the order of colours that the uint8 resize is fast in."""

    def __init__(self, image_size: tuple[int, int], scale: float, interpolation: InterpolationMode = InterpolationMode.BILINEAR):
        super().__init__(image_size, (scale, 1.0), interpolation=interpolation, antialias=True)

    def forward(self, image: Tensor) -> Tensor:
        part = tvf.crop(image, **self.make_params([image]))  # (3, h, w), a view
        part = part.flip(-1) if torch.rand(1) < 0.5 else part
        return tvf.resize(part[None].contiguous(memory_format=torch.channels_last), self.size, self.interpolation, antialias=True)[0]


def eval_transform(image_size: tuple[int, int], crop: float = 0.875) -> v2.Transform:
    """The centre, `crop` of the shorter side once resized. uint8 in and out."""
    short = round(max(image_size) / crop)
    return v2.Compose([v2.Resize(short, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(image_size)])


class Samples(Dataset):
    """source + transform, indexed by (draw, index), where draw is the epoch: gives (image, index of that image, broken).

    The transform draws from (seed, draw, index) and nothing else. An image that cannot be read gives way to the next one
    that can; `broken` is then the index of the bad one, else -1."""

    def __init__(self, source, transform: v2.Transform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        draw, index = key
        image, broken = None, -1
        for used in ((index + i) % len(self) for i in range(min(100, len(self)))):
            try:
                image = self.source.read(used)
                break
            except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError):       # Pillow's for a broken PNG
                broken = index
        if image is None:
            raise ValueError(f"many images in a row cannot be read, from {self.source.name(index)} on; is the disk there?")
        with torch.random.fork_rng(devices=[]):              # leaves the caller's random numbers alone (workers = 0)
            torch.default_generator.manual_seed(mix(self.seed, draw, index))
            return self.transform(image), used, broken


class Batches(Sampler):
    """This process's part of every optimiser step from `start` to `stop`, as lists of (draw, index), `accum` lists a step.

    The permutation of an epoch is the same everywhere; step i of it takes the next accum * world * batch samples, cut
    into `accum` parts of `world` batches: two processes, or two accumulated halves, see the images one process sees.
    The last incomplete step of an epoch is left out. With `repeats` R a step holds R augmentations of each of its images
    (Hoffer et al. 2020), far apart, and an epoch passes over 1/R of the images.
    Raises ValueError where the data set is smaller than one step."""

    def __init__(self, count: int, batch: int, accum: int, world: int, rank: int, seed: int, start: int, stop: int, repeats: int = 1):
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
                order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mix(self.seed, epoch))).tolist()
                shuffled = epoch
            together = self.batch * self.accum * self.world
            unique = math.ceil(together / self.repeats)      # images of this step
            for part in range(self.accum):
                first = (part * self.world + self.rank) * self.batch
                yield [(epoch * self.repeats + p // unique, order[i * unique + p % unique]) for p in range(first, first + self.batch)]


def steps_per_epoch(count: int, global_batch: int) -> int:
    if count < global_batch:
        raise ValueError(f"the data set has {count} images, one step takes {global_batch} "
                         f"(--batch-size x --accum x processes); use a smaller --batch-size")
    return count // global_batch


def make_loader(samples: Samples, batches: Sampler, workers: int, on_gpu: bool) -> DataLoader:
    """One loader for the whole run: no pause between epochs, and workers that start once."""
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=on_gpu, collate_fn=colours_last,
                      prefetch_factor=4 if workers else None, worker_init_fn=deaf)


def colours_last(samples: list[tuple[Tensor, int, int]]) -> list[Tensor]:
    """A batch (B, 3, H, W) in the memory order of decoded JPEG files and of fast convolutions: nothing has to be turned."""
    images, *rest = default_collate([(image.permute(1, 2, 0), *rest) for image, *rest in samples])
    return [images.permute(0, 3, 1, 2), *rest]


def deaf(worker: int) -> None:
    """Loader workers leave Ctrl-C and SIGTERM to the process they work for: it still wants the images of its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---- pictures ----

def save_sheet(path: Path, columns: dict[str, Tensor]) -> None:
    """A PNG with one row per image and one titled column per entry, each (N, 3, H, W), normalised."""
    images = torch.stack([denormalise(x) for x in columns.values()], 1).flatten(0, 1).cpu()         # (N * columns, 3, H, W)
    sheet = tvf.to_pil_image(make_grid(images, nrow=len(columns), padding=2, pad_value=1))
    zoom = max(1, round(160 * len(columns) / sheet.width))
    sheet = sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.NEAREST)
    page = Image.new("RGB", (sheet.width, sheet.height + 22), "white")
    page.paste(sheet, (0, 22))
    for i, title in enumerate(columns):
        ImageDraw.Draw(page).text(((i + 0.5) * sheet.width / len(columns), 11), title, "black", ImageFont.load_default(13), anchor="mm")
    page.save(path)


def save_curve(path: Path, log: Path) -> None:
    """The loss over steps, from log.jsonl: every line in gray, their running mean in blue."""
    lines = [line for line in read_lines(log) if line["loss"] is not None]
    steps, losses = [r["step"] for r in lines], [r["loss"] for r in lines]
    if len(steps) < 2:
        return
    W, H, left, right, top, bottom = 720, 400, 60, 20, 30, 40
    low, high = min(losses), max(max(losses), min(losses) + 1e-9)
    page = Image.new("RGB", (W, H), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)

    def at(step, loss):
        return (left + (step - steps[0]) / (steps[-1] - steps[0]) * (W - left - right),
                H - bottom - (loss - low) / (high - low) * (H - top - bottom))

    for i in range(5):
        step, loss = steps[0] + i / 4 * (steps[-1] - steps[0]), low + i / 4 * (high - low)
        draw.line([at(steps[0], loss), at(steps[-1], loss)], "#dddddd")
        draw.text((left - 6, at(step, loss)[1]), f"{loss:.3f}", "black", font, anchor="rm")
        draw.text((at(step, loss)[0], H - bottom + 12), f"{step:.0f}", "black", font, anchor="mm")
    half = max(1, len(losses) // 40)
    smooth = [sum(part) / len(part) for part in (losses[max(0, i - half):i + half + 1] for i in range(len(losses)))]
    draw.line([at(*p) for p in zip(steps, losses)], "#bbbbbb", 1)
    draw.line([at(*p) for p in zip(steps, smooth)], "#1f5fbf", 3)
    draw.text((W / 2, 14), "loss over optimiser steps", "black", font, anchor="mm")
    page.save(path)


def save_confusion(path: Path, shares: Tensor, classes: list[str]) -> None:
    """(C, C), rows sum to 1: the share of each true class (row) that was taken for each class (column), darker = more."""
    C = len(shares)
    cell = max(1, min(28, 560 // C))
    left, top = (90, 24) if C <= 20 else (10, 24)
    page = Image.new("RGB", (left + C * cell + 10, top + C * cell + 10), "white")
    shade = (255 * (1 - shares.clamp(0, 1).sqrt())).round().byte().numpy()
    page.paste(Image.fromarray(shade).resize((C * cell, C * cell), Image.NEAREST), (left, top))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    draw.text((left, 12), "true class (row) taken for (column, same order)", "black", font, anchor="lm")
    for i, name in enumerate(classes if C <= 20 else ()):
        draw.text((left - 6, top + (i + 0.5) * cell), str(name)[:12], "black", font, anchor="rm")
    page.save(path)


# ---- checkpoints and logs ----

def save_atomically(state: dict, path: Path, keep_previous: bool = False) -> None:
    """Write beside, flush to the disk, rename: a kill at any moment, or a full disk, leaves the old file or the new one.

    With `keep_previous` the old one stays as <stem>-previous.pt. Raises OSError where the file cannot be written."""
    beside, previous = path.with_name(path.name + ".tmp"), path.with_stem(path.stem + "-previous")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():                  # a second name for the old file: there is always one to go on from
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:                                  # a file system without links
                shutil.copyfile(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                 # torch wraps the errors of the disk
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} not written: {str(error).splitlines()[0]}") from None


def read_checkpoint(out: Path) -> dict | None:
    """checkpoint.pt of a run, or the one before it where that is broken; None where there is none yet.

    Nothing in the file is executed. Raises ValueError where no file can be read."""
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint-previous.pt") if path.exists()]
    for path in paths:
        try:
            state = load_checked(path)
            if {"step", "per_epoch", "world", "args", "skipped"} <= set(state):
                return dict(state, path=str(path))
        except Exception:                                    # torch.load has no one type for a broken file
            pass
    if paths:
        raise ValueError(f"{paths[0]}: cannot be read; is it whole, and a checkpoint of this program? Move it away to start anew")
    return None


def append_line(log: Path, line: dict) -> None:
    """Adds a line to log.jsonl, behind a whole one: the last may be cut where the disk was full."""
    with open(log, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(log: Path) -> list[dict]:
    """The lines of log.jsonl that are whole."""
    lines = []
    for text in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def trim_log(log: Path, epoch: float) -> None:
    """Drops the lines after `epoch`: they are about to be lived again."""
    if log.exists():
        beside = log.with_name(log.name + ".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in read_lines(log) if line["epoch"] <= epoch + 5e-5))
        os.replace(beside, log)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource                                      # not on Windows
    except ImportError:
        return 0.0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)
