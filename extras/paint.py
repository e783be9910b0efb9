"""Paint my image: what a pre-trained model makes of photographs whose parts are hidden.

    python extras/paint.py runs/shapes-resnet18/checkpoint.pt photo.jpg another.png
    python extras/paint.py runs/x/checkpoint.pt photo.jpg --mask "..../.##./.##./...."      a mask drawn by hand

Writes painted-<name>.png for each: image, what the encoder sees, reconstruction, reconstruction in hidden cells, and a
blur of the visible pixels, which is what mere interpolation paints. The shorter side becomes that of pre-training, and
both become multiples of what the model needs; the image need not be square.
"""

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import denormalise, normalise
from engine.files import load_checked
from engine.flags import pair
from engine.images import read_image
from engine.pictures import save_sheet
from engine.weights import load_backbone
from masking import fill_hidden, random_mask, resize_mask
from model import A2MIM, build_encoder

TITLES = ("image", "encoder sees", "reconstruction", "hidden cells pasted", "a blur of what is seen")


def load_model(path: str, size: tuple[int, int] | None = None) -> tuple[A2MIM, SimpleNamespace]:
    """The model of a checkpoint, and its settings; for images of `size` (H, W), or of its own size.

    Raises ValueError if the file is no checkpoint of pre-training, or the size does not fit."""
    try:
        state = load_checked(path)
        run, weights = SimpleNamespace(**state["args"]), state["model"]
        form = {name: value for name, value in weights.items() if not name.startswith("encoder.")}
        assert "mask_token.token" in form
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception:                                        # torch.load has no one type for a broken file
        raise ValueError(f"{path}: not a checkpoint.pt of pretrain.py") from None
    model = build_model(run, size)
    load_backbone(model.encoder, path, run.image_size)       # position tables take another size
    model.load_state_dict(form, strict=False)
    return model.eval(), run


def build_model(run: SimpleNamespace, size: tuple[int, int] | None = None) -> A2MIM:
    """The model of a run's settings, with random weights: as the run itself makes it."""
    size = size or pair(run.image_size)
    encoder = build_encoder(run.arch, size, run.drop_path, run.patch_size, run.window)
    return A2MIM(encoder, image_size=size, mask_cell=run.mask_cell, mask_stage=run.mask_stage, token=run.token,
                 fill=run.fill)


def fitted(image: Tensor, side: int, unit: int) -> Tensor:
    """(3, h, w) -> the shorter side `side`, both multiples of `unit`: as much of the middle as fits."""
    scale = side / min(image.shape[-2:])
    h, w = (max(unit, round(s * scale)) for s in image.shape[-2:])
    image = tvf.resize(image, [h, w], antialias=True)
    return tvf.center_crop(image, [h // unit * unit, w // unit * unit])


def drawn(text: str, grid: tuple[int, int]) -> Tensor:
    """'..##/.##.' -> a mask (1, gh, gw), True = hidden where there is a #; a coarser drawing is enlarged.

    Raises ValueError if it is no drawing, or finer than the grid."""
    rows = text.strip("/").split("/")
    if {*text} - {*"#./"} or len({len(row) for row in rows}) != 1 or "#" not in text:
        raise ValueError(f"--mask {text}: must be rows of . and # of one length with / between them, such as ..##/.##.")
    if len(rows) > grid[0] or len(rows[0]) > grid[1]:
        raise ValueError(f"--mask {text}: is finer than the {grid[0]} x {grid[1]} cells of this image")
    return resize_mask(torch.tensor([[[c == "#" for c in row] for row in rows]]), grid)[:, 0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint.pt of pretrain.py")
    parser.add_argument("images", nargs="+", help="JPEG, PNG, WebP or BMP files")
    parser.add_argument("--mask-ratio", type=float, metavar="R", help="share of cells hidden (as in pre-training)")
    parser.add_argument("--mask", metavar="TEXT", help="a mask drawn by hand: rows of . and #, # is hidden")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random mask (0)")
    parser.add_argument("--out", default=".", metavar="DIR", help="where the pictures go (here)")
    args = parser.parse_args(argv)
    try:
        plain, run = load_model(args.checkpoint)
        unit = math.lcm(run.mask_cell, plain.stride, 32)     # 32: what every backbone can take
        for name in args.images:
            try:
                image = fitted(read_image(name), min(pair(run.image_size)), unit)
            except (OSError, RuntimeError, SyntaxError) as error:
                raise ValueError(f"{name}: cannot be read as an image ({str(error).splitlines()[0]})") from None
            model, _ = load_model(args.checkpoint, tuple(image.shape[-2:]))
            generator = torch.Generator().manual_seed(args.seed)
            ratio = run.mask_ratio if args.mask_ratio is None else args.mask_ratio
            mask = drawn(args.mask, model.grid) if args.mask else random_mask(1, model.grid, ratio, generator=generator)
            image = normalise(image[None])                   # (1, 3, H, W)
            columns = (image, *model.reconstruct(image, mask), fill_hidden(image, mask, "blur"))
            Path(args.out).mkdir(parents=True, exist_ok=True)
            file = Path(args.out) / f"painted-{Path(name).stem}.png"
            save_sheet(file, {title: denormalise(x) for title, x in zip(TITLES, columns)})
            print(f"{file}: {int(mask.sum())} of {mask.numel()} cells hidden, {image.shape[-2]} x {image.shape[-1]} px")
    except (ValueError, OSError) as error:
        print(f"paint.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
