"""What segmentation is made of: its heads, and images with a class for every pixel.

    Segmenter     Maps, UPerNet or FCN on top, and a small second head for training
    open_pairs    ADE20K, VOC, a folder with images/ and annotations/, or drawn scenes
    ScaleCropFlip, whole    what is done to an image and its classes in training, and in tests
"""

import contextlib
import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets as tvd
import torchvision.models as tv
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.command import Distributed
from engine.files import printable
from data import MAX_PIXELS, list_images, read_image
from extras.dense import Maps, Semantic, name_and_reason
from model import Encoder

IGNORED = 255                                                # a pixel whose class is not known, or not asked for

# ---- the heads ----

def conv(inside: int, outside: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outside),
                         nn.ReLU(inplace=True))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest map, its result added top-down to the finer ones, all four put together.

    Source: Xiao et al. 2018, as in mmsegmentation."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(bins), conv(channels[-1], width, 1))
                                   for bins in (1, 2, 3, 6))
        self.pooled = conv(channels[-1] + 4 * width, width, 3)
        self.laterals = nn.ModuleList(conv(C, width, 1) for C in channels[:-1])
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in channels[:-1])
        self.fuse = conv(4 * width, width, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps (B, C, h, w), finest first -> (B, width, h, w) of the finest."""
        last = maps[-1]
        z = self.pooled(torch.cat([last, *(resize(pool(last), last.shape[-2:]) for pool in self.pools)], 1))
        levels = [z]
        for lateral, finer in zip(reversed(self.laterals), reversed(maps[:-1])):
            z = lateral(finer) + resize(z, finer.shape[-2:])
            levels.insert(0, z)
        levels[:-1] = [smooth(z) for smooth, z in zip(self.smooth, levels)]
        return self.fuse(torch.cat([resize(z, levels[0].shape[-2:]) for z in levels], 1))


class FCN(nn.Module):
    """Two 3x3 convolutions on the last map, then a third one over their input and result together. As released."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        self.convs = nn.Sequential(conv(channels[-1], width, 3), conv(width, width, 3))
        self.fuse = conv(channels[-1] + width, width, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.fuse(torch.cat([maps[-1], self.convs(maps[-1])], 1))


class Segmenter(nn.Module):
    """Maps of an encoder, a head, and with `aux` a small second head on the third map, for training alone.

    fcn: layer3 and layer4 of a ResNet are dilated, so that their maps have stride 8."""

    def __init__(self, encoder: Encoder, head: str, width: int, classes: int, dropout: float, aux: bool):
        super().__init__()
        self.maps = Maps(encoder)
        channels = self.maps.channels
        if head == "fcn":
            dilate(encoder.backbone)
        out = lambda C: nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(C, classes, 1))
        self.head = nn.Sequential((UPerNet if head == "upernet" else FCN)(channels, width), out(width))
        self.aux = nn.Sequential(conv(channels[2], 256, 3), out(256)) if aux else None
        for last in (self.head[-1][-1], *([self.aux[-1][-1]] if aux else [])):
            # as released; in a narrow head 0.01 hands the backbone next to no gradient, and a short run learns no class
            nn.init.normal_(last.weight, std=0.01 if last.in_channels >= 256 else last.in_channels**-0.5)
            nn.init.zeros_(last.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> logits [(B, classes, h, w)], of stride 4 (fcn: 8); in training the second head's, too."""
        maps = self.maps(images)
        return [self.head(maps), *([self.aux(maps[2])] if self.aux and self.training else [])]


def dilate(net: nn.Module) -> None:
    """Strides 1, 2, 1, 1 and dilations 1, 1, 2, 4 of the layers, a layer's first block still with the one before's."""
    if not isinstance(net, tv.ResNet):
        raise ValueError("--head fcn: is for ResNet alone; use --recipe upernet")
    for layer, first, rest in ((net.layer3, 1, 2), (net.layer4, 2, 4)):
        for i, block in enumerate(layer):
            for m in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
                m.stride, d = (1, 1), rest if i else first
                if m.kernel_size == (3, 3):
                    m.padding = m.dilation = (d, d)


# ---- data: images with a class for every pixel ----

VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
       "pottedplant sheep sofa train tvmonitor").split()


class Pairs:
    """Image files, and for each a picture of class numbers. As arrays: see data.Folder.

    zero_is_other: class 0 is not asked for, and the others count from 1, as in ADE20K."""

    def __init__(self, images: list, labels: list, classes: list[str], zero_is_other: bool = False):
        self.images, self.labels = (np.array([os.fsencode(name) for name in names]) for names in (images, labels))
        self.classes, self.zero_is_other = classes, zero_is_other

    def __len__(self) -> int:
        return len(self.images)

    @functools.cache
    def name(self, index: int) -> str:
        """The file, and what is wrong with it, if something is."""
        return name_and_reason(self, index, os.fsdecode(self.images[index]))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, H, W) and (H, W). Raises OSError, RuntimeError or ValueError if they cannot be used."""
        image = read_image(os.fsdecode(self.images[index]))
        labels = read_labels(os.fsdecode(self.labels[index]))
        if labels.shape != image.shape[1:]:
            (h, w), (H, W) = labels.shape, image.shape[1:]
            raise ValueError(f"its label picture has {w} x {h} pixels, the image {W} x {H}")
        labels = labels - 1 if self.zero_is_other else labels                # uint8: 0 becomes 255, which is ignored
        known = labels[labels != IGNORED]
        if len(known) and (most := int(known.max())) >= len(self.classes):
            raise ValueError(f"its label picture holds class {most + self.zero_is_other}; there are "
                             f"{len(self.classes)} classes")
        return tv_tensors.Image(image), tv_tensors.Mask(labels)


def read_labels(file: str) -> Tensor:
    """A gray, palette or 16-bit PNG of class numbers -> uint8 (H, W). Raises OSError or ValueError."""
    if not os.path.isfile(file):
        raise OSError(f"no label picture {printable(file)}")
    with Image.open(file) as picture:
        if picture.width * picture.height > MAX_PIXELS or picture.mode not in ("L", "P", "1", "I;16", "I"):
            raise ValueError(f"its label picture is {picture.mode}, {picture.width} x {picture.height}; expected one "
                             f"channel of class numbers")
        numbers = np.array(picture).astype(np.int64)         # of a palette: the indices, not the colours
    if (step := gray_step(file)) > 1:
        numbers //= step
    numbers[numbers == 65535] = IGNORED
    if numbers.max() > 255:
        raise ValueError(f"its label picture holds class {numbers.max()}; the most is 254")
    return torch.from_numpy(numbers.astype(np.uint8))


def gray_step(file: str) -> int:
    """By how much Pillow multiplies the numbers of a PNG to fill 0 to 255.

    It is 85 for gray of 2 bits, 17 for gray of 4 bits, 1 for all else.
    Source: PNG specification. The bit depth is byte 24, the colour type byte 25; type 0 is gray."""
    with open(file, "rb") as opened:
        head = opened.read(26)
    if not head.startswith(b"\x89PNG\r\n\x1a\n") or head[25] != 0:
        return 1
    return {2: 85, 4: 17}.get(head[24], 1)


def open_pairs(args: SimpleNamespace, split: str, world: Distributed, classes: list[str] | None = None):
    """`--data` -> scenes, VOC, or a folder's Pairs. split: 'train' or 'val'. Raises ValueError if it is not there."""
    if args.data == "shapes":
        return Semantic(split, (args.image_size, args.image_size))
    if args.data == "voc":
        try:
            voc = tvd.VOCSegmentation(args.data_root, "2012", split, download=args.download)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--data voc: not found as {args.data_root}/VOCdevkit/VOC2012 "
                             f"({printable(str(error))}); name that folder with --data-root, or "
                             f"add --download to fetch it") from None
        return Pairs(voc.images, voc.masks, VOC)
    root, kinds = Path(args.data), ("images", "annotations")
    if not root.is_dir():
        raise ValueError(f"--data {root}: no such folder; give one with images/ and annotations/, or voc, or shapes")
    found = [sorted(f for f in (root / kind).glob("*") if f.is_dir() and f.name.lower().startswith(split))
             for kind in kinds]
    if [] in found:
        raise ValueError(f"--data {root}: no folder {root / kinds[found.index([])]}/{split}*; expected "
                         f"{root}/images/{split}/x.jpg and {root}/annotations/{split}/x.png")
    images, labels = (folders[0] for folders in found)
    names = list_images(images)
    if not names:
        raise ValueError(f"--data {root}: no images below {images}")
    files = [labels / Path(name).with_suffix(".png") for name in names]
    if args.zero_is_other is None:
        args.zero_is_other = (root / "objectInfo150.txt").exists() or root.name.startswith("ADEChallenge")
    if not classes:
        classes, absent = world.broadcast_from_rank0(lambda: classes_of(root, files, args))
        if absent:
            told = told_classes(absent, classes, args.zero_is_other)
            world.print0(f"no label picture in {printable(str(labels))} holds class {told}")
    return Pairs([images / name for name in names], files, classes, args.zero_is_other)


def classes_of(root: Path, labels: list[Path],
               args: SimpleNamespace) -> tuple[list[str], list[int]]:
    """The names of the classes, and the numbers of those that no label picture holds.

    To evaluate, these are not looked for. Raises ValueError unless the pictures hold two classes:
    with one there is nothing to tell apart."""
    names = listed_classes(root)
    if names and getattr(args, "eval_only", False):
        return names, []
    first = int(args.zero_is_other)                          # the first class's number in a picture
    held = numbers_in(labels, range(first, first + len(names)) if names else None)
    names = names or [str(number) for number in range(first, max(held, default=-1) + 1)]
    numbers = range(first, first + len(names))
    held, absent = [n for n in numbers if n in held], [n for n in numbers if n not in held]
    if len(held) < 2:
        what = f"hold class {held[0]} alone" if held else "hold no class"
        missing = f"; none holds class {told_classes(absent, names, first)}" if absent else ""
        raise ValueError(f"--data {root}: the label pictures in {printable(str(labels[0].parent))} "
                         f"{what}{missing}; expected PNG files of two or more class numbers, named "
                         f"as the images; 255 is ignored")
    return names, absent


def told_classes(numbers: list[int], names: list[str], first: int) -> str:
    """The first three of some classes, as "1 (road), ...". first: the number of names[0]."""
    told = ", ".join(f"{number} ({printable(names[number - first])})" for number in numbers[:3])
    return told + (f" and {len(numbers) - 3} more classes" if len(numbers) > 3 else "")


def numbers_in(labels: list[Path], wanted: range | None) -> set[int]:
    """The numbers that the label pictures hold, without 255; read until `wanted` are found."""
    found = set()
    for file in labels:
        with contextlib.suppress(OSError, ValueError, SyntaxError):          # named as broken later
            numbers = read_labels(str(file))
            found |= set(numbers[numbers != IGNORED].unique().tolist())
        if wanted is not None and found.issuperset(wanted):
            break
    return found


def listed_classes(root: Path) -> list[str] | None:
    """From classes.txt (a line each) or ADE20K's objectInfo150.txt; None if neither is there.

    Raises ValueError if the file is not UTF-8, lists less than two classes, or more than a picture
    can hold."""
    files = [root / "classes.txt", root / "objectInfo150.txt"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")          # drops Windows' byte order mark
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:                                         # every second byte of UTF-16 may be 0
        raise ValueError(f"{file}: is not UTF-8 text; save it as UTF-8, one class name a line")
    lines = text.splitlines()
    if file.name == "objectInfo150.txt":
        lines = [line.split("\t")[-1] for line in lines[1:]]
    names = [line.strip() for line in lines if line.strip()]
    if not 2 <= len(names) <= IGNORED:
        count = "1 class" if len(names) == 1 else f"{len(names) or 'no'} classes"
        raise ValueError(f"{file}: lists {count}; expected 2 to {IGNORED}, one name a line")
    return names


class ScaleCropFlip:
    """Resized by a random share of --image-size, cropped to it, flipped. Colours (uint8) and classes together.

    A crop is drawn anew up to ten times while one class holds more than `same` of its known pixels. As released."""

    def __init__(self, args: SimpleNamespace):
        self.side, self.low, self.high, self.same = args.image_size, args.scale_min, args.scale_max, args.same_class
        self.distort = Distort() if args.distort else nn.Identity()

    def __call__(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        share = self.low + (self.high - self.low) * float(torch.rand(()))
        image, labels = fitted(pair[0], self.side * share), pair[1]
        labels = tvf.resize(labels, image.shape[-2:], InterpolationMode.NEAREST)
        right, bottom = (max(0, self.side - side) for side in (image.shape[-1], image.shape[-2]))
        image = tvf.pad(image, [0, 0, right, bottom], [124, 116, 104])       # the mean colour, which becomes 0
        labels = tvf.pad(labels, [0, 0, right, bottom], IGNORED)
        for _ in range(10):
            y, x = (int(torch.randint(side - self.side + 1, ())) for side in labels.shape)
            part = labels[y:y + self.side, x:x + self.side]
            counts = part[part != IGNORED].long().bincount()
            if len(counts) and counts.max() <= self.same * counts.sum():
                break
        image = image[:, y:y + self.side, x:x + self.side]
        if torch.rand(()) < 0.5:
            image, part = image.flip(-1), part.flip(-1)
        return self.distort(tv_tensors.Image(image)), part


class Distort(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue at random, without torchvision's swap of channels.

    Hue turns by up to 0.1 of the circle, not torchvision's 0.05.
    Source: mmsegmentation, 18 of OpenCV's 180 steps."""

    def __init__(self):
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list) -> dict:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def fitted(image: Tensor, short: float) -> Tensor:
    """The shorter side becomes `short`, or the longer 4 short, whichever is less.

    As released: 512 and 2048. Antialiased, where the released code (mmcv, with OpenCV) is not."""
    H, W = image.shape[-2:]
    scale = min(short / min(H, W), 4 * short / max(H, W))
    return tvf.resize(image, [max(1, round(H * scale)), max(1, round(W * scale))], antialias=True)


def whole(pair: tuple[Tensor, Tensor], side: int) -> tuple[Tensor, Tensor]:
    """For tests: the image resized, its classes at their own size."""
    return fitted(pair[0], side), pair[1]
