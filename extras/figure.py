"""The method in one picture: its three ideas on one image, by a trained model.

    python pretrain.py                       the demo, minutes on a CPU: writes the checkpoint
    python extras/figure.py                  writes method.png, or method-2.png if that is taken
    python extras/figure.py --image FILE     a photograph, instead of a held-out drawn image
    python extras/figure.py --out assets/method.png      replaces the picture of the README
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import SUFFIXES, denormalise, eval_transform, normalise
from engine.command import Distributed, command_line
from engine.files import printable
from engine.flags import Parser, defaults, number, path, format_size
from engine.shapes import Shapes
from extras.output import check_file, free_name, writing
from extras.paint import load_model, read_photo
from loss import residual
from masking import fill_hidden, random_mask, resize_mask
from model import A2MIM, get_family

WIDTH, HEIGHT, MARGIN, GAP, MIDDLE = 1200, 376, 18, 30, 180  # the page, and the height of the arrows on it
BIG, SMALL = 168, 120                                        # sides of pictures
INK, GRAY, BLUE = "#1b1f24", "#59636e", "#1f5fbf"
PALETTE = np.array([(20, 20, 60), (48, 70, 140), (33, 144, 141), (122, 205, 90), (253, 231, 90)])    # low to high


@torch.no_grad()
def moves(model: A2MIM, run: SimpleNamespace, image: Tensor, mask: Tensor) -> dict[str, Image.Image]:
    """The seven pictures. image (1, 3, H, W), normalised; mask (1, gh, gw), True = hidden."""
    seen = z = fill_hidden(image, mask, model.fill)          # idea 1
    for stage in range(model.token_stage):
        z = model.encoder.run_stage(stage, z)
    before = z[0]                                            # idea 2: (C, h, w), without the token
    after = model.mask_token(z, mask)[0]
    reconstruction = model(image, mask)
    # both maps along the first principal axis of the one before, turned so that the token is dark
    middle = before.mean((1, 2), keepdim=True)
    axis = torch.linalg.svd((before - middle).flatten(1), full_matrices=False).U[:, 0]
    maps = torch.einsum("c,nchw->nhw", axis, torch.stack([before, after]) - middle)
    maps = maps * (-1 if maps[1].mean() > maps[0].mean() else 1)
    # idea 3, as in loss.fourier_loss; of the spectrum the middle half is shown, as the rest is dark
    hidden = resize_mask(mask, image.shape[-2:])             # (1, 1, H, W)
    r = residual(reconstruction, image, hidden, run.stand_in, run.visible_weight)
    D = torch.fft.fft2(r[0], norm="ortho").abs()
    weight = torch.log1p(D)
    weight = weight / weight.amax((1, 2), keepdim=True)
    half = [side // 2 for side in model.image_size]
    amplitude, weight = (tvf.center_crop(torch.fft.fftshift(x.mean(0)), half) for x in (torch.log(D + 1e-6), weight))

    low, high = maps.quantile(torch.tensor([0.02, 0.98]))
    image, seen, reconstruction = [tvf.to_pil_image(denormalise(x)[0])
                                   for x in (image, seen, reconstruction)]
    return dict(image=outline(image, mask), seen=seen, reconstruction=reconstruction,
                before=colour(maps[0], low, high), after=colour(maps[1], low, high),
                amplitude=colour(amplitude, *amplitude.aminmax()), weight=colour(weight, 0, 1))


def colour(x: Tensor, low: float, high: float) -> Image.Image:
    """(h, w) -> a picture: dark blue at `low`, yellow at `high`."""
    place = ((x - low) / (high - low)).numpy() * (len(PALETTE) - 1)
    channels = [np.interp(place, range(len(PALETTE)), channel) for channel in PALETTE.T]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def outline(image: Image.Image, mask: Tensor) -> Image.Image:
    """The image with its hidden patches under a thin veil, and a white line around them."""
    hidden = Image.fromarray(mask[0].byte().mul(255).numpy()).resize((BIG, BIG), Image.NEAREST)
    edge = ImageChops.subtract(hidden, hidden.filter(ImageFilter.MinFilter(5)))      # 2 pixels wide
    shade = ImageChops.lighter(edge, hidden.point(lambda v: v // 4))
    return Image.composite(Image.new("RGB", (BIG, BIG), "white"), image.resize((BIG, BIG), Image.LANCZOS), shade)


def draw_page(pictures: dict[str, Image.Image], stage: int) -> Image.Image:
    """All of them in a row, with titles, arrows and words; the token enters before `stage`."""
    page, x = Image.new("RGB", (WIDTH, HEIGHT), "white"), MARGIN
    draw = ImageDraw.Draw(page)

    def write(x: float, y: float, text: str, size: int, ink: str, bold: float = 0) -> None:
        draw.multiline_text((x, y), text, ink, ImageFont.load_default(size), "ma", 7, "center", stroke_width=bold)
    parts = [                                                # names: of pictures, a word under each
        ("", "image", "the pale patches\nare hidden", {"image": ""}),
        ("idea 1", "what goes in", "hidden patches take the\nimage's mean colour", {"seen": ""}),
        ("idea 2", "the token enters in the middle",
         f"between encoder stages {stage - 1} and {stage}:\n+ token at hidden patches",
         {"before": "before", "after": "after"}),
        ("", "reconstruction", "by a decoder of\none linear layer", {"reconstruction": ""}),
        ("idea 3", "what the Fourier loss sees",
         "spectrum of the error:\nthe larger, the more it counts",
         {"amplitude": "log amplitude", "weight": "weight"}),
    ]
    for idea, title, below, names in parts:
        side = BIG if len(names) == 1 else SMALL
        centre = x + (len(names) * (side + GAP) - GAP) / 2
        write(centre, 16, idea, 20, BLUE, 0.5)
        write(centre, 45, title, 19, INK, 0.5)
        write(centre, 306, below, 18, GRAY)
        for name, word in names.items():
            if x > MARGIN:                                   # an arrow, from the picture on the left
                draw.line([(x - GAP + 3, MIDDLE), (x - 11, MIDDLE)], GRAY, 3)
                draw.polygon([(x - 3, MIDDLE), (x - 15, MIDDLE - 7), (x - 15, MIDDLE + 7)], GRAY)
            how = Image.NEAREST if pictures[name].width <= 24 else Image.LANCZOS     # a feature map keeps its squares
            page.paste(pictures[name].resize((side, side), how), (x, MIDDLE - side // 2))
            write(x + side / 2, MIDDLE + side / 2 + 8, word, 17, GRAY)
            x += side + GAP
    return page


# ---- the command ----

ENDINGS = (*SUFFIXES, ".pdf")
FLAGS = {
    "what is shown": {
        "checkpoint": ("runs/shapes-resnet18/checkpoint.pt", path("FILE"),
                       "of a CNN, made by pretrain.py"),
        "image": (None, path("FILE"), "a photograph (a drawn image)"),
        "index": (4, number(int, 0, len(Shapes("val", (32, 32))) - 1), "which drawn image")},
    "where it goes": {
        "out": (None, path("FILE"), f"ends in {', '.join(ENDINGS)}; a file of this name is "
                "replaced (method.png, numbered if taken)")},
}


def draw(args: SimpleNamespace, world: Distributed) -> None:
    """Writes the picture. Raises ValueError for a mistake."""
    out = Path(args.out) if args.out else free_name(Path("method.png"))
    check_file(out, ENDINGS)
    checkpoint = printable(args.checkpoint)
    if not Path(args.checkpoint).exists():
        raise ValueError(f"{checkpoint}: no such checkpoint; run python pretrain.py first")
    model, run = load_model(args.checkpoint)
    if not get_family(run.arch).convolutional:
        raise ValueError(f"{checkpoint}: holds {run.arch}; the figure shows the feature maps "
                         "of a CNN")
    if len({*model.image_size}) > 1:
        raise ValueError(f"{checkpoint}: of {format_size(model.image_size)}; the figure has square "
                         "pictures")

    if args.image:
        image = eval_transform(model.image_size)(read_photo(args.image))
    else:
        image = Shapes("val", model.image_size).read(args.index)
    mask = random_mask(1, model.grid, run.mask_ratio, generator=torch.Generator().manual_seed(0))
    page = draw_page(moves(model, run, normalise(image[None]), mask), model.token_stage)
    with writing(out):
        page.save(out, optimize=True)
    print(f"{printable(str(out))}: {page.width} x {page.height} px")


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Raises ValueError for a value that is off."""
    parser = Parser("figure.py", "%(prog)s [--image FILE] [options]", __doc__, FLAGS, {})
    parser.epilog = None
    return SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("figure.py", parse, draw, argv)


if __name__ == "__main__":
    main()
