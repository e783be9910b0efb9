"""What segmentation is made of: its heads, and images with a class for every pixel.

    Segmenter       Maps, UPerNet or FCN on top, and a small second head for training
    open_pairs      ADE20K's or CamVid's layout, Pascal VOC, or drawn scenes
    LabelCode       how the label pictures of a set write its classes
    ScaleCropFlip, whole    what is done to an image and its classes in training, and in tests
    colours_of, save_labels, overlay, legend    classes in colours
"""

import colorsys
import contextlib
import functools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets as tvd
import torchvision.models as tv
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import MAX_PIXELS, list_images, read_image
from engine.command import Distributed
from engine.files import printable
from engine.flags import height_width
from engine.images import UNREADABLE
from extras.dense import FEW_IMAGES, Maps, Semantic, name_and_reason
from model import Encoder

IGNORED = 255                                                # a pixel whose class is not known

# ---- the heads ----

def conv(inside: int, outside: int, kernel: int) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU."""
    return Conv2dNormActivation(inside, outside, kernel)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest map. Its result is added top-down to the finer maps, and all
    four are put together.

    Source: Xiao et al. 2018, as in mmsegmentation."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        self.pools = nn.ModuleList()
        for bins in (1, 2, 3, 6):
            pool = nn.Sequential(nn.AdaptiveAvgPool2d(bins), conv(channels[-1], width, 1))
            self.pools.append(pool)
        self.pooled = conv(channels[-1] + 4 * width, width, 3)
        self.laterals = nn.ModuleList(conv(C, width, 1) for C in channels[:-1])
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in channels[:-1])
        self.fuse = conv(4 * width, width, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps (B, C, h, w), finest first -> (B, width, h, w) of the finest."""
        last = maps[-1]
        pools = [resize(pool(last), last.shape[-2:]) for pool in self.pools]
        z = self.pooled(torch.cat([last, *pools], 1))
        levels = [z]
        for lateral, finer in zip(reversed(self.laterals), reversed(maps[:-1])):
            z = lateral(finer) + resize(z, finer.shape[-2:])
            levels.insert(0, z)
        levels[:-1] = [smooth(z) for smooth, z in zip(self.smooth, levels)]
        return self.fuse(torch.cat([resize(z, levels[0].shape[-2:]) for z in levels], 1))


class FCN(nn.Module):
    """Two 3x3 convolutions on the last map, then a third one over their input and result together.

    As released."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        self.convs = nn.Sequential(conv(channels[-1], width, 3), conv(width, width, 3))
        self.fuse = conv(channels[-1] + width, width, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.fuse(torch.cat([maps[-1], self.convs(maps[-1])], 1))


class Segmenter(nn.Module):
    """Maps of an encoder, a head, and with `aux` a small second head on the third map, for training
    alone.

    fcn: layer3 and layer4 of a ResNet are dilated, so that their maps have stride 8."""

    def __init__(self, encoder: Encoder, head: str, width: int, classes: int, dropout: float,
                 aux: bool):
        super().__init__()
        self.maps = Maps(encoder)
        channels = self.maps.channels
        if head == "fcn":
            dilate(encoder.backbone)
        kind = UPerNet if head == "upernet" else FCN
        self.head = nn.Sequential(kind(channels, width), last_layer(width, classes, dropout))
        self.aux = None
        if aux:
            last = last_layer(256, classes, dropout)
            self.aux = nn.Sequential(conv(channels[2], 256, 3), last)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> logits [(B, classes, h, w)] of stride 4 (fcn: 8).

        In training the logits of the second head follow."""
        maps = self.maps(images)
        logits = [self.head(maps)]
        if self.aux and self.training:
            logits.append(self.aux(maps[2]))
        return logits


def last_layer(width: int, classes: int, dropout: float) -> nn.Sequential:
    """Dropout, and a 1x1 convolution from features to logits.

    Its weights start with std 0.01, as released. In a head narrower than 256 that would pass almost
    no gradient to the backbone, and a short run would learn no class: there the std is
    1 / sqrt(width)."""
    last = nn.Conv2d(width, classes, 1)
    nn.init.normal_(last.weight, std=0.01 if width >= 256 else width**-0.5)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Dropout2d(dropout), last)


def dilate(net: nn.Module) -> None:
    """Strides 1, 2, 1, 1 and dilations 1, 1, 2, 4 of the layers.

    The first block of a layer still has the dilation of the layer before."""
    if not isinstance(net, tv.ResNet):
        raise ValueError("--head fcn: is for ResNet alone; use --recipe upernet")
    for layer, first, rest in ((net.layer3, 1, 2), (net.layer4, 2, 4)):
        for i, block in enumerate(layer):
            d = rest if i else first
            convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
            for convolution in convolutions:
                convolution.stride = (1, 1)
                if convolution.kernel_size == (3, 3):
                    convolution.padding = convolution.dilation = (d, d)


# ---- data: images with a class for every pixel ----

VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
       "motorbike person pottedplant sheep sofa train tvmonitor").split()


@dataclass
class LabelCode:
    """How the label pictures of a set write its classes."""
    names: list[str]                                         # of the classes
    numbers: list[int]                                       # of each class, in a label picture
    ignored: Sequence[int] = ()                              # count as unlabelled, as 255 does
    colours: list[tuple[int, int]] | None = None             # (0xRRGGBB, class), if not by number

    def __post_init__(self):
        self.class_of = np.full(256, IGNORED, np.uint8)      # number in a picture -> class
        self.class_of[self.numbers] = np.arange(len(self.numbers))
        self.is_known = np.zeros(256, bool)
        self.is_known[[*self.numbers, *self.ignored, IGNORED]] = True

    def read(self, file: str) -> np.ndarray:
        """The classes of a label picture, uint8 (H, W); IGNORED where a pixel has none.

        Raises OSError or ValueError."""
        if self.colours:
            return self.from_colours(read_colours(file))
        numbers = read_labels(file)
        is_known = self.is_known[numbers]
        if not is_known.all():
            number = numbers[~is_known].max()
            raise ValueError(f"its label picture holds class {number}; there are "
                             f"{len(self.names)} classes; if it means unlabelled, give --ignore "
                             f"{number}")
        return self.class_of[numbers]

    def from_colours(self, picture: np.ndarray) -> np.ndarray:
        """RGB, uint8 (H, W, 3) -> classes (H, W). A colour that is not listed is IGNORED."""
        code = picture[..., 0].astype(np.int32)
        for channel in (1, 2):
            code = code * 256 + picture[..., channel]        # 0xRRGGBB
        listed, classes = (np.array(column) for column in zip(*sorted(self.colours)))
        place = np.searchsorted(listed, code).clip(max=len(listed) - 1)
        return np.where(listed[place] == code, classes[place], IGNORED).astype(np.uint8)


class Pairs:
    """Image files, and for each its label picture. As arrays: see data.Folder."""

    def __init__(self, images: list, labels: list, code: LabelCode):
        self.images = np.array([os.fsencode(name) for name in images])
        self.labels = np.array([os.fsencode(name) for name in labels])
        self.code = code
        self.classes = code.names

    def __len__(self) -> int:
        return len(self.images)

    @functools.cache
    def name(self, index: int) -> str:
        """The file, and what is wrong with it, if something is."""
        return name_and_reason(self, index, os.fsdecode(self.images[index]))

    @functools.cached_property
    def label_root(self) -> str:
        """The folder that holds all label pictures."""
        folders = {os.path.dirname(os.fsdecode(name)) for name in self.labels}
        return os.path.commonpath(folders)

    def label_name(self, index: int) -> str:
        """The path of a label picture below label_root."""
        return os.path.relpath(os.fsdecode(self.labels[index]), self.label_root)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, H, W) and (H, W). Raises OSError, RuntimeError or ValueError if they cannot be
        used."""
        image = read_image(os.fsdecode(self.images[index]))
        labels = self.code.read(os.fsdecode(self.labels[index]))
        if labels.shape != image.shape[1:]:
            (h, w), (H, W) = labels.shape, image.shape[1:]
            raise ValueError(f"its label picture has {w} x {h} pixels, the image {W} x {H}")
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(labels))


def read_labels(file: str) -> np.ndarray:
    """A gray, palette or 16-bit PNG of class numbers -> uint8 (H, W). Raises OSError or
    ValueError."""
    with open_label_picture(file) as picture:
        if picture.mode not in ("L", "P", "1", "I;16", "I"):
            raise ValueError(f"its label picture is {picture.mode}, {picture.width} x "
                             f"{picture.height}; expected one channel of class numbers, or the "
                             f"colours of the classes in classes.txt")
        numbers = np.array(picture)                          # of a palette: not its colours
    step = gray_step(file)
    if step > 1:
        numbers //= step
    if numbers.dtype.itemsize > 1:
        numbers[numbers == 65535] = IGNORED
        if numbers.max() > 255:
            raise ValueError(f"its label picture holds class {numbers.max()}; the most is 254")
    return numbers.astype(np.uint8, copy=False)


def read_colours(file: str) -> np.ndarray:
    """A colour-coded label picture -> uint8 (H, W, 3). Raises OSError or ValueError."""
    with open_label_picture(file) as picture:
        return np.array(picture.convert("RGB"))


def open_label_picture(file: str) -> Image.Image:
    if not os.path.isfile(file):
        raise OSError(f"no label picture {printable(file)}")
    picture = Image.open(file)
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"its label picture has {picture.width} x {picture.height} pixels, at "
                         f"most {MAX_PIXELS} are read")
    return picture


def gray_step(file: str) -> int:
    """By how much Pillow multiplies the numbers of a PNG to fill 0 to 255.

    It is 85 for gray of 2 bits, 17 for gray of 4 bits, 1 for all else.
    Source: PNG specification. The bit depth is byte 24, the colour type byte 25; type 0 is gray."""
    with open(file, "rb") as opened:
        head = opened.read(26)
    if not head.startswith(b"\x89PNG\r\n\x1a\n") or head[25] != 0:
        return 1
    return {2: 85, 4: 17}.get(head[24], 1)


# ---- a set: its layout ----

def open_pairs(args: SimpleNamespace, part: str, world: Distributed,
               code: LabelCode | None = None, count: int | None = None):
    """`--data` -> scenes, Pascal VOC, or the Pairs of a folder.

    part   'train', or 'val': the part to evaluate on, which --split-val may name
    code   of the training images; None: it is found, and missing classes are named
    count  the number of classes of trained weights, to evaluate them: no picture is searched

    Raises ValueError if the part is not there."""
    if args.data in ("shapes", "voc") and (args.split_val or args.ignore):
        flag = "--split-val" if args.split_val else "--ignore"
        raise ValueError(f"{flag}: is for a folder, not for --data {args.data}; leave it out")
    if args.data == "shapes":
        return Semantic(part, height_width(args.image_size))
    if args.data == "voc":
        voc = open_voc(args, part)
        return Pairs(voc.images, voc.masks, LabelCode(VOC, list(range(len(VOC)))))

    root = Path(args.data)
    images, labels = part_folders(root, part, args.split_val)
    names = list_images(images)
    if not names:
        raise ValueError(f"--data {root}: no images below {images}")
    files = [labels / Path(name).with_suffix(".png") for name in names]
    if args.zero_is_other is None:
        is_ade = (root / "objectInfo150.txt").exists() or root.name.startswith("ADEChallenge")
        args.zero_is_other = is_ade
    if code is None and count:
        code = trained_code(root, args, count)
    if code is None:
        code, absent = world.broadcast_from_rank0(lambda: find_code(root, files, args))
        if absent:
            told = describe_classes(code, absent)
            world.print0(f"no label picture in {printable(str(labels))} holds class {told}")
    return Pairs([images / name for name in names], files, code)


def open_voc(args: SimpleNamespace, part: str) -> tvd.VOCSegmentation:
    """Through torchvision. Raises ValueError if it is not there."""
    try:
        return tvd.VOCSegmentation(args.data_root, "2012", part, download=args.download)
    except (RuntimeError, OSError) as error:
        shown = printable(args.data_root)
        doing = f" ({printable(str(error))})" if args.download else ""
        raise ValueError(f"--data voc: no {shown}/VOCdevkit/VOC2012/{doing}; give the folder that "
                         f"holds VOCdevkit/ as --data-root, or add --download to fetch it "
                         f"into {shown}/") from None


def part_folders(root: Path, part: str, held_out: str | None = None) -> tuple[Path, Path]:
    """The folders of a part's images and of its label pictures, in one of two layouts:

    ADE20K   images/<part>*/ and annotations/<part>*/
    CamVid   <part>*/ and <part>*annot/

    part      'train', or 'val': then `held_out` if it is given, otherwise val, otherwise test
    Raises ValueError if the part is not there."""
    shown = printable(str(root))
    if not root.is_dir():
        raise ValueError(f"--data {shown}: no such folder; give one with images/ and annotations/, "
                         f"or voc, or shapes")
    images, labels = root / "images", root / "annotations"
    is_camvid = not images.is_dir() and any(root.glob("*annot"))
    if part == "train":
        asked = ["train"]
    else:
        asked = [held_out] if held_out else ["val", "test"]
    for name in asked:
        if is_camvid:
            found = [folder for folder in folders_named(root, name)
                     if folder.with_name(folder.name + "annot").is_dir()]
            if found:
                return found[0], found[0].with_name(found[0].name + "annot")
        else:
            found = folders_named(images, name)
            same = folders_named(labels, name)
            if found and same:
                return found[0], same[0]

    name = asked[0]
    if is_camvid:
        expected = f"{shown}/{name}/x.jpg and {shown}/{name}annot/x.png"
        missing = root / name
    else:
        expected = f"{shown}/images/{name}/x.jpg and {shown}/annotations/{name}/x.png"
        missing = labels / name if folders_named(images, name) else images / name
    hint = "; choose another part with --split-val" if part == "val" else ""
    raise ValueError(f"--data {shown}: no folder {printable(str(missing))}*; expected {expected}"
                     f"{hint}")


def folders_named(root: Path, name: str) -> list[Path]:
    """The folders whose names begin with `name`, in any capitals; the shortest name first."""
    found = [folder for folder in root.glob("*")
             if folder.is_dir() and folder.name.lower().startswith(name.lower())]
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def has_few_images(root: Path) -> bool:
    """Are there fewer than FEW_IMAGES to train on? False for a folder that cannot be used: opening
    it later gives the reason."""
    with contextlib.suppress(ValueError, OSError):
        images, _ = part_folders(root, "train")
        return len(list_images(images)) < FEW_IMAGES
    return False


# ---- a set: its classes ----

def find_code(root: Path, files: list[Path],
              args: SimpleNamespace) -> tuple[LabelCode, list[int]]:
    """How the label pictures write their classes, and the classes that no picture holds.

    Raises ValueError unless the pictures hold two classes or more."""
    code = listed_code(root, args)
    if code and code.colours:
        held = find_values(files, code.read, set(range(len(code.names))))
    else:
        wanted = set(code.numbers) if code else None
        found = find_values(files, read_labels, wanted) - set(args.ignore)
        first = int(args.zero_is_other)
        code = code or numbered_code(range(first, max(found, default=-1) + 1), args)
        held = {label for label, number in enumerate(code.numbers) if number in found}
    absent = [label for label in range(len(code.names)) if label not in held]
    if len(held) < 2:
        numbers = [code.numbers[label] for label in held]
        what = f"hold class {numbers[0]} alone" if held else "hold no class"
        missing = f"; none holds class {describe_classes(code, absent)}" if absent else ""
        expected = ("the colours that classes.txt lists" if code.colours else
                    "two or more class numbers, named as the images; 255 is ignored")
        raise ValueError(f"--data {root}: the label pictures in "
                         f"{printable(str(files[0].parent))} {what}{missing}; expected PNG files "
                         f"of {expected}")
    return code, absent


def trained_code(root: Path, args: SimpleNamespace, count: int) -> LabelCode:
    """For trained weights of `count` classes: no label picture is searched for classes."""
    first = int(args.zero_is_other)
    numbers = [number for number in range(first, IGNORED) if number not in args.ignore]
    return listed_code(root, args) or numbered_code(numbers[:count], args)


def numbered_code(numbers: Sequence[int], args: SimpleNamespace) -> LabelCode:
    """Of a set without names: its classes are called by their numbers."""
    numbers = [number for number in numbers if number not in args.ignore]
    return LabelCode([str(number) for number in numbers], numbers, ignored_numbers(args))


def ignored_numbers(args: SimpleNamespace) -> list[int]:
    """The numbers in a label picture that mean unlabelled, besides 255."""
    return [*args.ignore, 0] if args.zero_is_other else list(args.ignore)


def listed_code(root: Path, args: SimpleNamespace) -> LabelCode | None:
    """From classes.txt or ADE20K's objectInfo150.txt; None if neither is there."""
    listed = listed_classes(root)
    if listed is None:
        return None
    names, colours = listed
    first = int(args.zero_is_other)
    if colours:
        if args.ignore:
            raise ValueError(f"--ignore: is for numbers, but {root}/classes.txt lists colours; "
                             f"take the colour that means unlabelled off the list")
        return LabelCode(names, list(range(len(names))), (), colours)
    name_of = {number: name for number, name in enumerate(names, first)
               if number not in args.ignore}
    return LabelCode(list(name_of.values()), list(name_of), ignored_numbers(args))


def describe_classes(code: LabelCode, labels: list[int]) -> str:
    """The first three of these classes, as "1 (road), ..."."""
    texts = []
    for label in labels[:3]:
        name = printable(code.names[label])
        number = str(code.numbers[label])
        texts.append(number if name == number else f"{number} ({name})")
    others = f" and {len(labels) - 3} more classes" if len(labels) > 3 else ""
    return ", ".join(texts) + others


def find_values(files: list[Path], read: Callable, wanted: set[int] | None) -> set[int]:
    """The values in the label pictures, without 255. Reading stops when all `wanted` are found."""
    found = set()
    for file in files:
        with contextlib.suppress(*UNREADABLE):               # named as broken later
            counts = np.bincount(read(str(file)).ravel(), minlength=256)
            found |= set(np.flatnonzero(counts[:IGNORED]).tolist())
        if wanted is not None and found >= wanted:
            break
    return found


# a name, red, green and blue, separated by blanks, tabs or commas
COLOUR = re.compile(r"(?P<name>.*[^\s,])" + "".join(rf"[\s,]+(?P<{c}>\d{{1,3}})" for c in "rgb"))


def listed_classes(root: Path) -> tuple[list[str], list[tuple[int, int]] | None] | None:
    """(names, colours) from classes.txt, or from ADE20K's objectInfo150.txt; None if neither is
    there.

    classes.txt has a name a line, or a name and a colour: "road 128 64 128". A name may stand in
    several lines, one for each of its colours. colours: see LabelCode.
    Raises ValueError if the file is not UTF-8, has a line that it should not have, or lists less
    than two classes, or more than a picture can hold."""
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
    lines = [line.strip() for line in lines if line.strip()]

    matches = [COLOUR.fullmatch(line) for line in lines]
    names, colours = lines, None
    if matches and all(matches):
        names = list(dict.fromkeys(match["name"] for match in matches))
        colours = [colour_of(match, names, file) for match in matches]
        if len(dict(colours)) < len(colours):
            raise ValueError(f"{file}: lists a colour twice; every colour means one class")
    elif sum(map(bool, matches)) > 1:
        line = next(line for line, match in zip(lines, matches) if not match)
        raise ValueError(f"{file}: has colours, but not in the line {printable(line)}; write "
                         f"name, red, green and blue, such as road 128 64 128, in every line")
    if not 2 <= len(names) <= IGNORED:
        count = "1 class" if len(names) == 1 else f"{len(names) or 'no'} classes"
        raise ValueError(f"{file}: lists {count}; expected 2 to {IGNORED}, one name a line")
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{file}: lists {printable(twice)} twice; give each class a name of its "
                         f"own")
    return names, colours


def colour_of(match: re.Match, names: list[str], file: Path) -> tuple[int, int]:
    """(0xRRGGBB, class) of a line. Raises ValueError for a channel above 255."""
    r, g, b = (int(match[channel]) for channel in "rgb")
    if max(r, g, b) > 255:
        raise ValueError(f"{file}: {printable(match[0])}: red, green and blue must be 0 to 255")
    return (r * 256 + g) * 256 + b, names.index(match["name"])


# ---- what is done to an image and its classes ----

class ScaleCropFlip:
    """Resizes to a random multiple of --image-size, crops to --image-size, flips: colours (uint8)
    and classes together.

    Of at most ten crops the first is taken in which no class holds more than `same` of the known
    pixels, or else the tenth."""

    def __init__(self, args: SimpleNamespace):
        self.size = height_width(args.image_size)            # (H, W) of the crop
        self.low, self.high = args.scale_min, args.scale_max
        self.same = args.same_class
        self.distort = Distort() if args.distort else nn.Identity()

    def __call__(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        H, W = self.size
        share = self.low + (self.high - self.low) * float(torch.rand(()))
        image = fitted(pair[0], min(H, W) * share)
        # By the centres of pixels, as the image. NEAREST would shift the labels up and left, and
        # older versions of torchvision resize a Mask, though not a Tensor, by it in any case.
        labels = pair[1].as_subclass(Tensor)
        labels = tvf.resize(labels[None], image.shape[-2:], InterpolationMode.NEAREST_EXACT)[0]
        h, w = labels.shape
        for _ in range(10):
            y = int(torch.randint(max(0, h - H) + 1, ()))
            x = int(torch.randint(max(0, w - W) + 1, ()))
            part = labels[y:y + H, x:x + W]
            counts = part.flatten().bincount(minlength=256)[:IGNORED]
            if counts.max() and counts.max() <= self.same * counts.sum():
                break
        image = image[:, y:y + H, x:x + W]
        if torch.rand(()) < 0.5:
            image, part = image.flip(-1), part.flip(-1)
        image = self.distort(tv_tensors.Image(image)).as_subclass(Tensor)
        right, bottom = W - part.shape[1], H - part.shape[0]
        # padded by the mean colour, which normalisation makes 0
        image = tvf.pad(image, [0, 0, right, bottom], [124, 116, 104])
        return image, F.pad(part, (0, right, 0, bottom), value=IGNORED)


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
    """For tests: the image resized so that its shorter side is `side`, its classes at their own
    size."""
    return fitted(pair[0], side), pair[1]


# ---- classes in colours ----

def colours_of(classes: Sequence[str], code: LabelCode | None = None) -> np.ndarray:
    """A colour for each class, uint8 (256, 3): of the set if it lists some. IGNORED is white."""
    colours = np.full((256, 3), 255, np.uint8)
    for i in range(len(classes)):
        rgb = colorsys.hsv_to_rgb(i * 0.618 % 1, 0.5 + i * 0.29 % 0.5, 1 - i * 0.17 % 0.4)
        colours[i] = [round(255 * channel) for channel in rgb]
    if classes[0] in ("ground", "background"):
        colours[0] = 51
    if code and code.colours:
        for value, label in reversed(code.colours):          # the first of a class counts
            colours[label] = [value >> 16, value >> 8 & 255, value & 255]
    return colours


def save_labels(file: Path, predicted: Tensor, numbers: Sequence[int], colours: np.ndarray) -> None:
    """Classes (H, W) as a PNG of the set's own class numbers, which a palette shows in colours.

    numbers: of each class, in a label picture. Raises OSError if it cannot be written."""
    number_of = np.array(numbers, np.uint8)
    palette = np.full((256, 3), 255, np.uint8)
    palette[number_of] = colours[:len(numbers)]
    picture = Image.fromarray(number_of[predicted.cpu().numpy()])
    picture.putpalette(palette.tobytes())
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, "PNG")


def overlay(image: Tensor, predicted: Tensor, colours: np.ndarray) -> Tensor:
    """uint8 image (3, H, W) and classes (H, W) -> both in equal shares, uint8 (3, H, W)."""
    coloured = torch.from_numpy(colours)[predicted.cpu().long()].permute(2, 0, 1)
    return ((image.short() + coloured) // 2).byte()


def legend(classes: Sequence[str], colours: np.ndarray, labels: Sequence[int],
           width: int) -> Image.Image:
    """Squares in the colours of some classes with their names, `width` pixels wide."""
    font, line = ImageFont.load_default(12), 18
    names = [printable(classes[label])[:24] for label in labels]
    places, x, y = [], 4, 0
    for name in names:
        wide = 16 + round(font.getlength(name)) + 14
        if x > 4 and x + wide > width:
            x, y = 4, y + line
        places.append((x, y))
        x += wide
    page = Image.new("RGB", (width, y + line + 2), "white")
    draw = ImageDraw.Draw(page)
    for (x, y), label, name in zip(places, labels, names):
        draw.rectangle((x, y + 3, x + 12, y + 15), tuple(colours[label].tolist()), "#888888")
        draw.text((x + 17, y + 9), name, "black", font, anchor="lm")
    return page
