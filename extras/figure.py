"""The method in pictures, by a trained model.

    python pretrain.py                       the demo, minutes on a CPU: writes the checkpoint
    python extras/figure.py                  the three ideas on one drawn image: method.png
    python extras/figure.py --figure why     what goes wrong without them, on a photograph: why.png
    python extras/figure.py runs/x/checkpoint.pt --image FILE    another run, another photograph
    python extras/figure.py runs/x/checkpoint.pt --measure DIR   why.png's numbers, on 100 images
    python extras/figure.py --out assets/method.png      replaces the picture of the README

A name that is taken gets a number (method-2.png), unless --out gives it.
"""

import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import SUFFIXES, Folder, denormalise, eval_transform, normalise
from engine.command import Distributed, command_line
from engine.files import printable
from engine.flags import Parser, defaults, number, path, format_size
from engine.shapes import Shapes
from extras.output import check_file, free_name, writing
from extras.reconstruct import choose_masks, load_model, read_photo
from loss import residual
from masking import fill_hidden, random_mask, resize_mask
from model import A2MIM, get_family

INK, GRAY, BLUE, ORANGE = "#1b1f24", "#59636e", "#1f5fbf", "#f28c1e"
PALETTE = np.array(                                          # low to high
    [(20, 20, 60), (48, 70, 140), (33, 144, 141), (122, 205, 90), (253, 231, 90)])


def write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, ink: str,
          bold: float = 0, anchor: str = "ma") -> None:
    """Text below (x, y): centred, or left of it with anchor "la"."""
    align = "left" if anchor == "la" else "center"
    font = ImageFont.load_default(size)
    draw.multiline_text((x, y), text, ink, font, anchor, 7, align, stroke_width=bold)


# ---- feature maps in colour ----

def in_colour(maps: list[Tensor], image: Tensor) -> list[Tensor]:
    """Feature maps (C, h, w) -> pictures (3, h, w) in [0, 1], by one principal component analysis
    of the features of all maps together.

    The first component becomes brightness, the second warm or cold, the third magenta or green.
    Each is turned so that, in the first map, it goes with that property of the `image` (3, H, W):
    so the picture of a map resembles the image."""
    features = torch.cat([z.flatten(1) for z in maps], 1)    # (C, N)
    middle = features.mean(1, keepdim=True)
    axes = torch.linalg.svd(features - middle, full_matrices=False).U[:, :3]
    mixing = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [0.5, -1.0, 0.5]])
    strength = torch.tensor([[0.36], [0.30], [0.22]])

    looks = mixing @ tvf.resize(image, list(maps[0].shape[1:]), antialias=True).flatten(1)
    first = axes.T @ (maps[0].flatten(1) - middle)           # (3, h w)
    agreement = ((looks - looks.mean(1, keepdim=True)) * first).sum(1)
    axes = axes * torch.where(agreement < 0, -1.0, 1.0)

    scores = axes.T @ (features - middle)                    # (3, N)
    largest = scores.abs().quantile(0.98, dim=1, keepdim=True).clamp(min=1e-12)
    colours = 0.5 + mixing.T @ (strength * (scores / largest).clamp(-1.2, 1.2))
    pictures, start = [], 0
    for z in maps:
        n = z[0].numel()
        pictures.append(colours[:, start:start + n].clamp(0, 1).view(3, *z.shape[1:]))
        start += n
    return pictures


def picture(x: Tensor, side: int) -> Image.Image:
    """(3, h, w) in [0, 1] -> a square picture. A feature map keeps its squares."""
    how = Image.NEAREST if x.shape[-1] <= 64 else Image.LANCZOS
    return tvf.to_pil_image(x).resize((side, side), how)


def edges(mask: Tensor, side: int, width: int = 2) -> tuple[Image.Image, Image.Image]:
    """(hidden, edge): two black-and-white pictures of a mask (1, gh, gw). The edge is inside."""
    hidden = Image.fromarray(mask[0].byte().mul(255).numpy()).resize((side, side), Image.NEAREST)
    return hidden, ImageChops.subtract(hidden, hidden.filter(ImageFilter.MinFilter(2 * width + 1)))


# ---- method.png: the three ideas on one image ----

WIDTH, HEIGHT, MARGIN, GAP = 1200, 376, 18, 30
MIDDLE = 180                                                 # the height of the arrows on the page
BIG, SMALL = 168, 120                                        # sides of pictures


@torch.no_grad()
def moves(model: A2MIM, run: SimpleNamespace, image: Tensor,
          mask: Tensor) -> dict[str, Image.Image]:
    """The seven pictures. image (1, 3, H, W), normalised; mask (1, gh, gw), True = hidden."""
    seen = z = fill_hidden(image, mask, model.fill)          # idea 1
    for stage in range(model.token_stage):
        z = model.encoder.run_stage(stage, z)
    before = z[0]                                            # idea 2: (C, h, w), without the token
    after = model.mask_token(z, mask)[0]
    reconstruction = model(image, mask)
    maps = in_colour([before, after], denormalise(seen)[0])
    maps[1] = stamp(maps[1], after, model.mask_token.token)
    # idea 3, as in loss.fourier_loss with one spectrum per image; its middle half, the rest is dark
    hidden = resize_mask(mask, image.shape[-2:])             # (1, 1, H, W)
    r = residual(reconstruction, image, hidden, run.stand_in, run.visible_weight)
    D = torch.fft.fft2(r[0], norm="ortho").abs()
    weight = torch.log1p(D)
    weight = weight / weight.amax((1, 2), keepdim=True)
    half = [side // 2 for side in model.image_size]
    amplitude = tvf.center_crop(torch.fft.fftshift(torch.log(D + 1e-6).mean(0)), half)
    weight = tvf.center_crop(torch.fft.fftshift(weight.mean(0)), half)

    image, seen, reconstruction = [tvf.to_pil_image(denormalise(x)[0])
                                   for x in (image, seen, reconstruction)]
    return dict(image=outline(image, mask), seen=seen, reconstruction=reconstruction,
                before=tvf.to_pil_image(maps[0]), after=tvf.to_pil_image(maps[1]),
                amplitude=colour(amplitude, *amplitude.aminmax()), weight=colour(weight, 0, 1))


def stamp(shown: Tensor, z: Tensor, token: Tensor) -> Tensor:
    """The picture (3, h, w) of features z (C, h, w), orange where they are the token.

    A feature is fully orange at the token itself, and not at all from a quarter of the features'
    usual distance to the token on."""
    distance = (z - token[:, None, None]).norm(dim=0)        # (h, w)
    share = (1 - 4 * distance / distance.quantile(0.9)).clamp(0, 1) ** 0.5
    orange = torch.tensor([int(ORANGE[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    return shown * (1 - share) + orange[:, None, None] * share


def colour(x: Tensor, low: float, high: float) -> Image.Image:
    """(h, w) -> a picture: dark blue at `low`, yellow at `high`."""
    place = ((x - low) / (high - low)).numpy() * (len(PALETTE) - 1)
    channels = [np.interp(place, range(len(PALETTE)), channel) for channel in PALETTE.T]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def outline(image: Image.Image, mask: Tensor) -> Image.Image:
    """The image with its hidden patches under a thin veil, and a white line around them."""
    hidden, edge = edges(mask, BIG)
    shade = ImageChops.lighter(edge, hidden.point(lambda v: v // 4))
    large = image.resize((BIG, BIG), Image.LANCZOS)
    return Image.composite(Image.new("RGB", (BIG, BIG), "white"), large, shade)


def draw_page(pictures: dict[str, Image.Image], stage: int) -> Image.Image:
    """All of them in a row, with titles, arrows and words; the token enters before `stage`."""
    page, x = Image.new("RGB", (WIDTH, HEIGHT), "white"), MARGIN
    draw = ImageDraw.Draw(page)
    parts = [                                                # names: of pictures, a word under each
        ("", "image", "the pale patches\nare hidden", {"image": ""}),
        ("idea 1", "what goes in", "hidden patches take the\nimage's mean colour", {"seen": ""}),
        ("idea 2", "the token enters in the middle",
         f"before encoder stage {stage} the token\n(orange) enters at hidden places",
         {"before": "before", "after": "after"}),
        ("", "reconstruction", "by a decoder of\none linear layer", {"reconstruction": ""}),
        ("idea 3", "what the Fourier loss sees",
         "spectrum of the error:\nthe larger, the more it counts",
         {"amplitude": "log amplitude", "weight": "weight"}),
    ]
    for idea, title, below, names in parts:
        side = BIG if len(names) == 1 else SMALL
        centre = x + (len(names) * (side + GAP) - GAP) / 2
        write(draw, centre, 16, idea, 20, BLUE, 0.5)
        write(draw, centre, 45, title, 19, INK, 0.5)
        write(draw, centre, 306, below, 18, GRAY)
        for name, word in names.items():
            if x > MARGIN:                                   # an arrow from the picture before
                draw.line([(x - GAP + 3, MIDDLE), (x - 11, MIDDLE)], GRAY, 3)
                draw.polygon([(x - 3, MIDDLE), (x - 15, MIDDLE - 7), (x - 15, MIDDLE + 7)], GRAY)
            is_map = pictures[name].width <= 24              # a feature map keeps its squares
            how = Image.NEAREST if is_map else Image.LANCZOS
            page.paste(pictures[name].resize((side, side), how), (x, MIDDLE - side // 2))
            write(draw, x + side / 2, MIDDLE + side / 2 + 8, word, 17, GRAY)
            x += side + GAP
    return page


# ---- why.png: what goes wrong without the method ----

PHOTO = ROOT / "assets" / "dogs.jpg"
STAGES = (1, 2, 3, 4)
WHY_SIDE, WHY_GAP, WHY_LEFT, WHY_TOP = 168, 14, 262, 52      # pixels on the page
WHY_ROWS = (196, 228, 228, 228)                              # heights of the rows
ROWS = {  # title -> what a newcomer should see
    "nothing hidden": "What each stage makes of the whole image.",
    "black squares": "The squares have hard edges. Convolutions respond to them and spread the "
                     "response: visible parts no longer look as in the first row.",
    "mean colour": "Weaker edges: visible parts stay much closer to the first row. But a hidden "
                   "place now looks like any flat part of the image.",
    "mean colour and\nlate mask token": "In the frame all hidden places become nearly one "
                                        "vector, the token. It tells the next stages which "
                                        "places to fill in.",
}


@torch.no_grad()
def stages_of(model: A2MIM, image: Tensor, mask: Tensor) -> list[list[Tensor]]:
    """For each of ROWS: the input (3, H, W), and the features (C, h, w) after each of STAGES.

    image (1, 3, H, W), normalised. The token joins the features that enter the token stage."""
    hidden = resize_mask(mask, image.shape[-2:])
    black = normalise(torch.zeros_like(image))
    mean = fill_hidden(image, mask, "mean")
    rows = []
    black_squares = torch.where(hidden, black, image)
    inputs = [(image, False), (black_squares, False), (mean, False), (mean, True)]
    for z, has_token in inputs:
        maps = []
        for stage in range(len(model.encoder.stages)):
            if has_token and stage == model.token_stage:
                z = model.mask_token(z, mask)
                if stage:
                    maps[-1] = z[0]                          # shown with the token
            if not stage:
                maps.append(z[0])
            z = model.encoder.run_stage(stage, z)
            maps.append(z[0])
        rows.append([maps[0], *(maps[stage + 1] for stage in STAGES)])
    return rows


def change(z: Tensor, whole: Tensor, places: Tensor) -> float:
    """How far features z (C, h, w) are from those of the whole image at the places (h, w).

    Root mean square of the distance, as a share of the spread of the whole image's features: 0 is
    no change, and 1 is as far as the mean of all features is from a feature."""
    error = (z - whole)[:, places].square().sum(0).mean()
    spread = (whole - whole.mean((1, 2), keepdim=True)).square().sum(0).mean()
    return (error / spread).sqrt().item()


def share_of_mask(z: Tensor, hidden: Tensor) -> float:
    """The share of the variance of features z (C, h, w) that lies between hidden and visible
    places, 0 to 1. hidden (h, w)."""
    middle = z.mean((1, 2), keepdim=True)
    between = torch.zeros_like(z)
    for part in (hidden, ~hidden):
        between[:, part] = z[:, part].mean(1, keepdim=True)
    explained = (between - middle).square().sum()
    return (explained / (z - middle).square().sum()).item()


def draw_why(model: A2MIM, image: Tensor, mask: Tensor) -> Image.Image:
    """The page: four rows, the input and the features after four stages. image: normalised."""
    rows = stages_of(model, image, mask)
    shown = denormalise(image)[0]
    columns = [[denormalise(row[0][None])[0] for row in rows]]
    for k in range(len(STAGES)):
        columns.append(in_colour([row[k + 1] for row in rows], shown))

    step = WHY_SIDE + WHY_GAP
    width = WHY_LEFT + len(columns) * step
    height = WHY_TOP + sum(WHY_ROWS) + 92
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    titles = ["input", *(f"after stage {stage}" for stage in STAGES)]
    for k, title in enumerate(titles):
        write(draw, WHY_LEFT + k * step + WHY_SIDE / 2, 18, title, 20, INK, 0.5)

    hidden, inside = edges(mask, WHY_SIDE, 1)
    outside = ImageChops.subtract(hidden.filter(ImageFilter.MaxFilter(3)), hidden)
    for r, (title, text) in enumerate(ROWS.items()):
        y = WHY_TOP + sum(WHY_ROWS[:r])
        write(draw, MARGIN, y - 3, title, 20, BLUE, 0.5, "la")
        below = y + 26 * len(title.splitlines())
        write(draw, MARGIN, below, textwrap.fill(text, 29), 16, GRAY, 0, "la")
        for k, column in enumerate(columns):
            x = WHY_LEFT + k * step
            panel = picture(column[r], WHY_SIDE)
            if r and k:
                panel.paste("white", mask=inside)
                panel.paste("black", mask=outside)
            if r == 3 and k == model.token_stage - 1:
                draw.rectangle([x - 5, y - 5, x + WHY_SIDE + 4, y + WHY_SIDE + 4], BLUE)
            page.paste(panel, (x, y))
            if r and k:
                z, whole = rows[r][k], rows[0][k]
                places = resize_mask(mask, z.shape[-2:])[0, 0]           # hidden
                words = (f"visible parts off by {change(z, whole, ~places):.0%}\n"
                         f"mask explains {share_of_mask(z, places):.0%}")
                write(draw, x + WHY_SIDE / 2, y + WHY_SIDE + 6, words, 15, GRAY)

    notes = (
        "One encoder, trained by A2MIM, in all rows. Colours: the first three principal components "
        "of the features, one fit for each column.\n"
        "Off by: distance to the features of the first row, relative to their spread over the "
        "image. White lines: the mask.\n"
        "Mask explains: the share of the features' variance that lies between hidden and visible "
        "places.")
    write(draw, MARGIN, height - 82, notes, 16, INK, 0, "la")
    return page


# ---- the command ----

ENDINGS = (*SUFFIXES, ".pdf")
FLAGS = {
    "what is shown": {
        "figure": ("method", ("method", "why"), "the three ideas, or what goes wrong without them"),
        "checkpoint": ("runs/shapes-resnet18/checkpoint.pt", path("FILE"),
                       "of a CNN, made by pretrain.py"),
        "image": (None, path("FILE"), "a photograph (method: a drawn image; why: assets/dogs.jpg)"),
        "index": (4, number(int, 0, len(Shapes("val", (32, 32))) - 1), "which drawn image"),
        "seed": (0, number(int, 0, 2**63 - 1), "of the random mask"),
        "measure": (None, path("DIR"), "print a table over the images of a folder (its val/ if it "
                    "has train/), and draw nothing")},
    "where it goes": {
        "out": (None, path("FILE"), f"ends in {', '.join(ENDINGS)}; a file of this name is "
                "replaced (method.png or why.png, numbered if taken)")},
}


def make_figure(args: SimpleNamespace, world: Distributed) -> None:
    """Writes the picture. Raises ValueError for a mistake."""
    out = Path(args.out) if args.out else free_name(Path(f"{args.figure}.png"))
    check_file(out, ENDINGS)
    checkpoint = printable(args.checkpoint)
    if not Path(args.checkpoint).exists():
        raise ValueError(f"{checkpoint}: no such checkpoint; run python pretrain.py first")
    model, run = load_model(args.checkpoint)
    if not get_family(run.arch).convolutional:
        raise ValueError(f"{checkpoint}: holds {run.arch}; the figure shows the feature maps "
                         "of a CNN")
    if model.fill != "mean":
        raise ValueError(f"{checkpoint}: a run with --fill {model.fill}; the figure shows A2MIM's "
                         f"mean colour")
    if len({*model.image_size}) > 1:
        raise ValueError(f"{checkpoint}: of {format_size(model.image_size)}; the figure has square "
                         "pictures")

    if args.measure:
        check_stages(args, run)
        print(measure(args, model, run))
        return
    if args.figure == "why":
        page = why(args, model, run)
    else:
        page = method(args, model, run)
    with writing(out):
        page.save(out, optimize=True)
    print(f"{printable(str(out))}: {page.width} x {page.height} px")


def method(args: SimpleNamespace, model: A2MIM, run: SimpleNamespace) -> Image.Image:
    """method.png, of a drawn image or of --image."""
    if args.image:
        image = eval_transform(model.image_size)(read_photo(args.image))
    else:
        image = Shapes("val", model.image_size).read(args.index)
    mask = choose_masks(args, run.mask_ratio, 1, model.grid)
    return draw_page(moves(model, run, normalise(image[None]), mask), model.token_stage)


def why(args: SimpleNamespace, model: A2MIM, run: SimpleNamespace) -> Image.Image:
    """The grid of mask units is that of pre-training. A unit gets as many pixels as the encoder's
    stride, so that it is one feature of the last stage."""
    check_stages(args, run)
    model, size = model_for_larger_image(args, model)
    image = eval_transform(size)(read_photo(args.image or PHOTO))
    mask = choose_masks(args, run.mask_ratio, 1, model.grid)
    return draw_why(model, normalise(image[None]), mask)


def check_stages(args: SimpleNamespace, run: SimpleNamespace) -> None:
    if get_family(run.arch).name not in ("resnet", "convnext"):
        raise ValueError(f"{printable(args.checkpoint)}: holds {run.arch}; --figure why and "
                         f"--measure need the four stages of a ResNet or a ConvNeXt")
    if args.figure == "why" and run.token_stage is not None and run.token_stage < 2:
        raise ValueError(f"{printable(args.checkpoint)}: its token enters before stage "
                         f"{run.token_stage}; --figure why shows a token before stage 2, 3 or 4")


def model_for_larger_image(args: SimpleNamespace, model: A2MIM
                           ) -> tuple[A2MIM, tuple[int, int]]:
    """The model for an image in which a mask unit is one feature of the last stage, and its
    (H, W)."""
    size = tuple(units * model.stride for units in model.grid)
    model, _ = load_model(args.checkpoint, size, mask_size=model.stride)
    return model, size


# ---- the numbers of why.png on many images ----

def measure(args: SimpleNamespace, model: A2MIM, run: SimpleNamespace) -> str:
    """A table of the means over 100 images of --measure (all, if it has fewer), evenly spaced,
    each under a random mask of its own. Raises ValueError if the folder has no images."""
    if not Path(args.measure).is_dir():
        raise ValueError(f"--measure {printable(args.measure)}: no such folder")
    model, size = model_for_larger_image(args, model)
    source = Folder(Path(args.measure), "val")
    indices = np.linspace(0, len(source) - 1, min(100, len(source))).round().astype(int)
    generator = torch.Generator().manual_seed(args.seed)
    masks = random_mask(len(indices), model.grid, run.mask_ratio, generator=generator)
    found = []                                               # (images, measures, 3 rows, stages)
    for index, mask in zip(tqdm(indices, unit="image"), masks):
        image = normalise(eval_transform(size)(source.read(int(index)))[None])
        whole, *others = (row[1:] for row in stages_of(model, image, mask[None]))
        off_by, explained = [], []
        for row in others:
            hidden = [resize_mask(mask[None], z.shape[-2:])[0, 0] for z in row]
            off_by.append([change(z, w, ~at) for z, w, at in zip(row, whole, hidden)])
            explained.append([share_of_mask(z, at) for z, at in zip(row, hidden)])
        found.append([off_by, explained])
    means = np.array(found).mean(0)
    lines = ["| after stage | " + " | ".join(map(str, STAGES)) + " |", "|---" * 5 + "|"]
    titles = [title.replace("\n", " ") for title in ROWS][1:]
    for name, of_rows in zip(("visible parts off by", "mask explains"), means):
        for title, values in zip(titles, of_rows):
            numbers = " | ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {name}: {title} | {numbers} |")
    return "\n".join([f"means over {len(found)} images", "", *lines])


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Raises ValueError for a value that is off."""
    parser = Parser("figure.py", "%(prog)s [CHECKPOINT] [--figure why] [options]", __doc__,
                    FLAGS, {})
    parser.add_argument("file", metavar="CHECKPOINT", nargs="?", help="as --checkpoint")
    given = vars(parser.parse_args(argv))
    if "file" in given and "checkpoint" in given:
        raise ValueError("CHECKPOINT and --checkpoint: give one of them")
    if "file" in given:
        given["checkpoint"] = given.pop("file")
    return SimpleNamespace(**{**defaults(FLAGS), **given})


def main(argv: list[str] | None = None) -> None:
    command_line("figure.py", parse, make_figure, argv)


if __name__ == "__main__":
    main()
