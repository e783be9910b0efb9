"""Hides parts of my photographs and shows what a pre-trained model reconstructs.

    python extras/reconstruct.py runs/shapes-resnet18/checkpoint.pt photo.jpg another.png
    python extras/reconstruct.py runs/x/checkpoint.pt photo.jpg --mask "..../.##./.##./...."
                                                                    a mask drawn by hand
    python extras/reconstruct.py runs/x/checkpoint.pt photo.jpg --full-size tiled
                                                                    at the photograph's own size

Writes reconstructed-<name>.png for each photograph, a row of five panels: image, what the encoder
sees, reconstruction, image with only its hidden patches reconstructed, and a blur of the visible
pixels, a baseline that learns nothing. The shorter side is resized to the shorter side of
pre-training, and both sides become multiples of what the model needs. The image need not be square.
Each panel is then enlarged by a whole number, until its longer side reaches the photograph's or 512
pixels.

With --full-size there are three files for each photograph, all at its own size: -seen,
-reconstruction, and -pasted, which is the photograph with its hidden patches replaced.

    resized   The model sees the photograph at the size of pre-training. The reconstruction is
              enlarged, so it is blurry.
    tiled     The photograph is cut into tiles of the size of pre-training, and each tile has its
              own mask. Hidden patches are reconstructed from their own tile alone.

No file is overwritten: if the name is taken, a number is added, as in reconstructed-<name>-2.png.
"""

import itertools
import math
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import SUFFIXES, denormalise, normalise, read_image
from engine.command import Distributed, command_line
from engine.files import load_checked, printable, with_new_names
from engine.flags import FRACTION, Parser, defaults, height_width, number, path
from engine.images import reason
from engine.pictures import save_sheet
from engine.weights import load_backbone
from extras.output import check_file, check_folder, free_name, writing
from masking import fill_hidden, random_mask, resize_mask
from model import A2MIM, build_encoder

TITLES = ("image", "encoder sees", "reconstruction", "hidden patches pasted",
          "a blur of what is seen")
PANEL = 512                                                  # pixels, the longer side of a panel
MAX_RATIO = 10                                               # of a photograph's sides

# read_image has a limit of its own
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_model(path: str, size: tuple[int, int] | None = None,
               mask_size: int | None = None) -> tuple[A2MIM, SimpleNamespace]:
    """The model of a checkpoint, and its settings.

    size       (H, W) of the images, by default those of pre-training
    mask_size  side of a mask unit in pixels, by default that of pre-training

    Raises ValueError if the file is no checkpoint of pre-training, or the size does not fit."""
    name = printable(str(path))
    if not os.path.isfile(path):                             # opening a pipe would block
        raise ValueError(f"{name}: no such file, or no regular file; give the checkpoint.pt of a "
                         "run of pretrain.py")
    try:
        state = load_checked(path)
        args = dict(state["args"])
        weights = state["model"]
        beside_encoder = {key: value for key, value in weights.items()
                          if not key.startswith("encoder.")}
        beside_encoder["mask_token.token"]                   # raises KeyError if it is not there
    except Exception:                                        # a broken file may raise any type
        raise ValueError(f"{name}: not a checkpoint.pt of pretrain.py") from None
    run = SimpleNamespace(**with_new_names(args))
    try:
        model = build_model(run, size, mask_size)
        model.load_state_dict(beside_encoder, strict=False)
    except (AttributeError, TypeError, RuntimeError):        # settings that fit no weights
        raise ValueError(f"{name}: not a checkpoint.pt of this version of pretrain.py") from None
    load_backbone(model.encoder, path, run.image_size)       # position tables take another size
    return model.eval(), run


def read_photo(file: str) -> Tensor:
    """The photograph of a file, (3, h, w) uint8. Raises ValueError, which names the file."""
    name = printable(str(file))
    if not os.path.exists(file):
        raise ValueError(f"{name}: no such file")
    try:
        image = read_image(file)
    except MemoryError:
        raise
    except Exception as error:                               # a broken file may raise any type
        raise ValueError(f"{name}: cannot be read as an image ({reason(error)})") from None
    h, w = image.shape[-2:]
    if max(h, w) > MAX_RATIO * min(h, w):
        raise ValueError(f"{name}: {w} x {h} pixels are too narrow; crop the image, one side may "
                         f"be {MAX_RATIO} times the other at most")
    return image


def build_model(run: SimpleNamespace, size: tuple[int, int] | None = None,
                mask_size: int | None = None) -> A2MIM:
    """The model of a run's settings, with random weights, built as the run builds it."""
    size = size or height_width(run.image_size)
    encoder = build_encoder(run.arch, size, run.drop_path, run.patch_size, run.window,
                            getattr(run, "stem", None))         # older runs have no stem
    return A2MIM(encoder, size, mask_size or run.mask_size, run.token_stage, run.token, run.fill)


def fitted(image: Tensor, side: int, unit: int) -> Tensor:
    """(3, h, w) -> (3, H, W): the shorter side is resized to about `side`. Then the largest centre
    crop is taken whose sides are multiples of `unit`."""
    scale = side / min(image.shape[-2:])
    h, w = (max(unit, round(s * scale)) for s in image.shape[-2:])
    image = tvf.resize(image, [h, w], antialias=True)
    return tvf.center_crop(image, [h // unit * unit, w // unit * unit])


def drawn(text: str, grid: tuple[int, int]) -> Tensor:
    """'..##/.##.' -> a mask (1, gh, gw), True = hidden where there is a #.

    A drawing that is coarser than the grid is enlarged. Raises ValueError if the text is no
    drawing, or finer than the grid."""
    rows = text.strip("/").split("/")
    has_other_signs = bool({*text} - {*"#./"})
    is_rectangle = len({len(row) for row in rows}) == 1
    if has_other_signs or not is_rectangle or "#" not in text:
        raise ValueError(f"--mask {printable(text)}: must be rows of . and # of one length with / "
                         "between them, such as ..##/.##.")
    if len(rows) > grid[0] or len(rows[0]) > grid[1]:
        raise ValueError(f"--mask {printable(text)}: is finer than the {grid[0]} x {grid[1]} mask "
                         "units of this image")
    is_hidden = torch.tensor([[character == "#" for character in row] for row in rows])
    return resize_mask(is_hidden[None], grid)[:, 0]


def choose_masks(args: SimpleNamespace, ratio: float, count: int, grid: tuple[int, int]) -> Tensor:
    """Random masks (count, gh, gw) by the seed."""
    generator = torch.Generator().manual_seed(args.seed)
    return random_mask(count, grid, ratio, generator=generator)


def mask_for(args: SimpleNamespace, ratio: float, grid: tuple[int, int]) -> Tensor:
    """The mask (1, gh, gw) of an image: drawn by hand with --mask, otherwise random."""
    if args.mask:
        return drawn(args.mask, grid)
    return choose_masks(args, ratio, 1, grid)


def enlarged(panel: Tensor, photo: Tensor) -> Tensor:
    """(1, 3, H, W) -> (1, 3, n H, n W), every pixel repeated n x n times.

    n is the least number that reaches the photograph's longer side, or PANEL if that is less."""
    wanted = min(max(photo.shape[-2:]), PANEL)
    n = math.ceil(wanted / max(panel.shape[-2:]))
    return panel.repeat_interleave(n, 2).repeat_interleave(n, 3)


# ---- at the photograph's own size ----

AT_ONCE = 16                                                 # tiles of a forward pass


def resized(photo: Tensor, args: SimpleNamespace, run: SimpleNamespace, ratio: float,
            unit: int) -> dict[str, Tensor]:
    """photo (3, h, w) -> pictures (3, h, w) by their names, all uint8, in one forward pass.

    Both sides are resized to multiples of `unit`, so the image is stretched a little."""
    h, w = photo.shape[-2:]
    scale = min(height_width(run.image_size)) / min(h, w)
    size = tuple(max(unit, round(side * scale / unit) * unit) for side in (h, w))
    model, _ = load_model(args.checkpoint, size)
    if h < model.grid[0] or w < model.grid[1]:
        raise ValueError(f"--full-size resized: a photograph of {w} x {h} pixels is too small for "
                         f"a mask of {model.grid[1]} x {model.grid[0]} patches; leave the flag out")
    mask = mask_for(args, ratio, model.grid)
    image = normalise(tvf.resize(photo, list(size), antialias=True)[None])
    seen, reconstruction, _ = model.reconstruct(image, mask)
    fill = to_bytes(tvf.resize(denormalise(seen)[0], [h, w], InterpolationMode.NEAREST))
    reconstruction = tvf.resize(denormalise(reconstruction), [h, w],
                                InterpolationMode.BICUBIC, antialias=True)
    reconstruction = to_bytes(reconstruction[0])
    hidden = resize_mask(mask, (h, w))[0]                    # (1, h, w)
    return {"seen": torch.where(hidden, fill, photo), "reconstruction": reconstruction,
            "pasted": torch.where(hidden, reconstruction, photo)}


def tiled(photo: Tensor, args: SimpleNamespace, model: A2MIM, ratio: float) -> dict[str, Tensor]:
    """photo (3, h, w) -> pictures (3, h, w) by their names, all uint8, tile by tile.

    At the right and at the bottom the edge is repeated until whole tiles fit. What was added is cut
    off again."""
    h, w = photo.shape[-2:]
    H, W = model.image_size
    rows, columns = math.ceil(h / H), math.ceil(w / W)
    gh, gw = model.grid
    padded = tvf.pad(photo, [0, 0, columns * W - w, rows * H - h], padding_mode="edge")
    tiles = split_into_tiles(padded, rows, columns)          # (n, 3, H, W)
    if args.mask:
        units = math.ceil(h / model.mask_size), math.ceil(w / model.mask_size)
        masks = drawn(args.mask, units)                      # (1, gh, gw) of the whole photograph
        right, bottom = columns * gw - units[1], rows * gh - units[0]
        masks = F.pad(masks, (0, right, 0, bottom))          # what is cut off again is not hidden
        masks = split_into_tiles(masks, rows, columns)[:, 0]
    else:
        masks = choose_masks(args, ratio, len(tiles), model.grid)

    parts = []                                               # (seen, reconstruction, pasted)
    for first in range(0, len(tiles), AT_ONCE):
        images = normalise(tiles[first:first + AT_ONCE])
        three = model.reconstruct(images, masks[first:first + AT_ONCE])
        parts.append([to_bytes(denormalise(x)) for x in three])
    pictures = {}
    for name, batches in zip(("seen", "reconstruction", "pasted"), zip(*parts)):
        whole = torch.cat(batches).unflatten(0, (rows, columns))             # (r, c, 3, H, W)
        pictures[name] = whole.permute(2, 0, 3, 1, 4).reshape(3, rows * H, columns * W)[:, :h, :w]
    return pictures


def to_bytes(x: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return (255 * x.clamp(0, 1)).round().byte()


def split_into_tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """(C, rows H, columns W) -> (rows columns, C, H, W), row by row."""
    x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))               # (C, r, H, c, W)
    return x.permute(1, 3, 0, 2, 4).flatten(0, 1)


def save_full_size(pictures: dict[str, Tensor], wanted: Path) -> list[Path]:
    """Writes <wanted>-<name> for each picture. All get the same number if a name is taken."""
    for n in itertools.count(1):
        stem = wanted.stem if n == 1 else f"{wanted.stem}-{n}"
        files = [wanted.with_stem(f"{stem}-{name}") for name in pictures]
        if not any(os.path.lexists(file) for file in files):
            break
    for file, picture in zip(files, pictures.values()):
        with writing(file):
            tvf.to_pil_image(picture).save(file)
    return files


# ---- the command ----

def reconstruct(args: SimpleNamespace, world: Distributed) -> None:
    """Writes a picture for each image. Raises ValueError for a mistake."""
    out = Path(args.out)
    one_file = out.suffix.lower() in SUFFIXES and not out.is_dir()
    if one_file:
        check_file(out, SUFFIXES)
    else:
        check_folder(out)
    plain, run = load_model(args.checkpoint)
    ratio = run.mask_ratio if args.mask_ratio is None else args.mask_ratio
    unit = math.lcm(run.mask_size, plain.stride)
    if not any(side % 32 for side in height_width(run.image_size)):
        unit = math.lcm(unit, 32)                            # which every backbone accepts

    for name in args.images:
        photo = read_photo(name)
        wanted = out if one_file else out / f"reconstructed-{Path(name).stem}.png"
        if args.full_size:
            if args.full_size == "tiled":
                pictures = tiled(photo, args, plain, ratio)
            else:
                pictures = resized(photo, args, run, ratio, unit)
            files = save_full_size(pictures, wanted)
            names = ", ".join(printable(str(file)) for file in files)
            print(f"{names}: {photo.shape[-1]} x {photo.shape[-2]} px")
            continue
        image = fitted(photo, min(height_width(run.image_size)), unit)
        model, _ = load_model(args.checkpoint, tuple(image.shape[-2:]))
        mask = mask_for(args, ratio, model.grid)
        image = normalise(image[None])                       # (1, 3, H, W)
        columns = (image, *model.reconstruct(image, mask), fill_hidden(image, mask, "blur"))
        panels = {title: enlarged(denormalise(x), photo) for title, x in zip(TITLES, columns)}

        file = free_name(wanted)
        with writing(file):
            save_sheet(file, panels)
        hidden = f"{int(mask.sum())} of {mask.numel()} mask units hidden"
        print(f"{printable(str(file))}: {hidden}, {image.shape[-1]} x {image.shape[-2]} px")


FLAGS = {
    "what is hidden": {
        "mask_ratio": (None, FRACTION, "share of hidden mask units (as in "
                       "pre-training)"),
        "mask": (None, path("TEXT"), "a mask drawn by hand: rows of . and #, # is hidden"),
        "seed": (0, number(int, 0, 2**63 - 1), "of the random mask")},
    "where it goes": {
        "full_size": (None, ("resized", "tiled"), "three pictures at the photograph's own size"),
        "out": (".", path("PATH"),
                "a folder, or a file such as photo-2.png; a name that is taken gets a number")},
}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Raises ValueError for a value that is off."""
    usage = "%(prog)s CHECKPOINT IMAGE [IMAGE ...] [options]"
    parser = Parser("reconstruct.py", usage, __doc__, FLAGS, {})
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint.pt of pretrain.py")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="JPEG, PNG, WebP or BMP files")
    return SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("reconstruct.py", parse, reconstruct, argv)


if __name__ == "__main__":
    main()
