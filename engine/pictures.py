"""Pictures of a run: PNG files, drawn with Pillow.

    sheet, save_sheet    one row per image, titled columns
    save_curve           the losses over steps
    save_confusion       how often each class is taken for each class
"""

import itertools
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid

from .files import read_lines, replace_atomically


def save_sheet(path: Path, columns: dict[str, Tensor], note: str = "") -> None:
    """Saves the page of `sheet`. Raises OSError if the file cannot be written."""
    with replace_atomically(path) as beside:
        sheet(columns, note).save(beside, "PNG")


def sheet(columns: dict[str, Tensor], note: str = "") -> Image.Image:
    """A page with one row per image and one titled column per entry.

    columns: title -> images (N, 3, H, W) in [0, 1]. note: small text below the images."""
    images = torch.stack(list(columns.values()), dim=1)      # (N, columns, 3, H, W)
    images = images.flatten(0, 1).cpu()                      # (N * columns, 3, H, W)
    grid = tvf.to_pil_image(make_grid(images, nrow=len(columns), padding=2, pad_value=1))
    zoom = max(1, round(160 * len(columns) / grid.width))    # a column is about 160 px wide
    grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.NEAREST)

    below = 20 if note else 0
    page = Image.new("RGB", (grid.width, grid.height + 22 + below), "white")
    page.paste(grid, (0, 22))
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    for i, title in enumerate(columns):
        middle = (i + 0.5) * grid.width / len(columns)
        draw.text((middle, 11), title, "black", font, anchor="mm")
    if note:
        small = ImageFont.load_default(12)
        draw.text((4, page.height - below / 2), note, "#555555", small, anchor="lm")
    return page


# ---- curves ----

PANEL = (720, 270)                                           # pixels: width and height
FINE = 2                                                     # drawn larger, then reduced: smooth
COLOURS = {
    "each log line": "#b8bcc4",
    "smoothed": "#1f5fbf",
    "model": "#12805c",
    "mean-colour baseline": "#d9662b",
    "blur baseline": "#7d4fb3",
}


def save_curve(path: Path, log: Path) -> None:
    """The losses over steps, from log.jsonl, in one panel or two.

    training         the total loss of every log line, and its mean over a twentieth of the run
    held-out images  the pixel loss of the model, the mean-colour baseline and the blur baseline

    Draws nothing if there are fewer than two log lines. Raises OSError if the file cannot be
    written."""
    lines = read_lines(log)
    training = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    measured = [line for line in lines if line.get("held_out") is not None]
    if len(training) < 2:
        return
    model = [(line["step"], line["held_out"]) for line in measured]
    first = training[0][0]
    last = max(step for step, _ in training + model)
    smooth = running_mean(training, max(1, len(training) // 40))
    panels = {"training loss": {"each log line": training, "smoothed": smooth}}
    if measured:
        curves = {"model": model}
        for name, key in (("mean-colour baseline", "mean_colour"), ("blur baseline", "blur")):
            loss = measured[-1].get(key)                     # none if the target is no image
            if loss is not None:
                curves[name] = [(first, loss), (last, loss)]
        panels["pixel loss on held-out images"] = curves

    width, height = (FINE * side for side in PANEL)
    page = Image.new("RGB", (width, height * len(panels)), "white")
    for i, (title, curves) in enumerate(panels.items()):
        page.paste(panel(title, curves, first, last), (0, i * height))
    with replace_atomically(path) as beside:
        page.reduce(FINE).save(beside, "PNG")


def running_mean(points: list[tuple[int, float]], half: int) -> list[tuple[int, float]]:
    """Each (x, y) with the mean of y over itself and `half` points before and after it."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]                # of the first k
    means = []
    for i, (x, _) in enumerate(points):
        first, end = max(0, i - half), min(len(points), i + half + 1)
        means.append((x, (sums[end] - sums[first]) / (end - first)))
    return means


def panel(title: str, curves: dict[str, list], first: int, last: int) -> Image.Image:
    """One plot, FINE times as large as it is shown.

    curves: name (see COLOURS) -> (step, loss) pairs. first, last: the ends of the horizontal
    axis."""
    W, H = (FINE * side for side in PANEL)
    left, right, top, bottom = (FINE * margin for margin in (66, 62, 46, 44))
    low, high = axis_range([loss for points in curves.values() for _, loss in points])
    page = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(12 * FINE)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (step - first) / max(last - first, 1) * (W - left - right)
        y = H - bottom - (loss - low) / (high - low) * (H - top - bottom)
        return x, y

    # the axes
    for loss in ticks(low, high, 5):
        x, y = at(first, loss)
        draw.line([(x, y), at(last, loss)], "#e4e6ea", FINE)
        draw.text((x - 6 * FINE, y), f"{loss:.4g}", "black", font, anchor="rm")
    for step in ticks(first, last, 6):
        x, y = at(step, low)
        draw.line([(x, y), (x, y + 4 * FINE)], "black", FINE)
        draw.text((x, y + 13 * FINE), f"{step:g}", "black", font, anchor="mm")
    draw.line([at(first, high), at(first, low), at(last, low)], "black", FINE)
    draw.text((W / 2, H - 10 * FINE), "optimiser step", "black", font, anchor="mm")
    name = Image.new("L", (H, 16 * FINE), 0)                 # turned to stand beside the axis
    ImageDraw.Draw(name).text((H / 2, 8 * FINE), "loss", 255, font, anchor="mm")
    page.paste("black", (2 * FINE, 0), name.rotate(90, expand=True))
    draw.text((left, 12 * FINE), title, "black", ImageFont.load_default(14 * FINE), anchor="lm")

    # the curves: line, entry in the legend, last value
    x = left                                                 # of the next legend entry
    y_legend = 32 * FINE
    heights = []                                             # of the values at the right
    for name, points in curves.items():
        colour = COLOURS[name]
        line = [at(step, loss) for step, loss in points]
        is_thin = name == "each log line"
        draw.line(line, colour, (1 if is_thin else 2) * FINE)
        if name == "model":                                  # shows a single evaluation, too
            draw_dots(draw, line, 3 * FINE, colour)
        draw.line([(x, y_legend), (x + 18 * FINE, y_legend)], colour, 3 * FINE)
        draw.text((x + 24 * FINE, y_legend), name, "black", font, anchor="lm")
        x += 24 * FINE + draw.textlength(name, font) + 22 * FINE
        if not is_thin:
            y = free_place(line[-1][1], heights, 13 * FINE)
            heights.append(y)
            draw.text((W - right + 6 * FINE, y), f"{points[-1][1]:.4f}", colour, font, anchor="lm")
    return page


def draw_dots(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], radius: float,
              colour: str) -> None:
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def axis_range(values: list[float]) -> tuple[float, float]:
    """The range of the values, widened by a twentieth at both ends."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1e-9
    return low - margin, high + margin


def ticks(low: float, high: float, limit: int) -> list[float]:
    """At most `limit` round numbers from low to high: multiples of 1, 2 or 5 powers of ten."""
    size = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    for step in (size / 10, size / 5, size / 2, size, 2 * size, 5 * size, 10 * size):
        multiples = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(multiples) <= limit:
            break
    return [n * step for n in multiples]


def free_place(y: float, taken: list[float], distance: float) -> float:
    """The height nearest to y that keeps `distance` from all heights taken, so that no texts
    overlap."""
    candidates = [y]
    for other in taken:
        candidates += [other - distance, other + distance]
    free = []
    for height in candidates:
        if all(abs(height - other) >= distance - 1e-6 for other in taken):
            free.append(height)
    return min(free, key=lambda height: abs(height - y))


# ---- tables ----

def save_confusion(path: Path, shares: Tensor, classes: list[str]) -> None:
    """A table of shares (C, C) as grey squares: row i is true class i, column j the share of its
    images (of its pixels, in segmentation) that were taken for class j. Rows sum to 1; darker is
    more. Up to 20 classes have their names and their shares in per cent.

    Raises OSError if the file cannot be written."""
    C = len(shares)
    side = max(1, min(28, 560 // C))                         # of a square, in pixels
    has_names = C <= 20
    left = 90 if has_names else 10
    top = 24
    page = Image.new("RGB", (left + C * side + 10, top + C * side + 10), "white")
    shade = (255 * (1 - shares.clamp(0, 1).sqrt())).round().byte().numpy()
    table = Image.fromarray(shade).resize((C * side, C * side), Image.NEAREST)
    page.paste(table, (left, top))

    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(12)
    draw.text((left, 12), "true class (row) taken for (column, same order)", "black", font,
              anchor="lm")
    if has_names:
        for i, name in enumerate(classes):
            draw.text((left - 6, top + (i + 0.5) * side), str(name)[:12], "black", font,
                      anchor="rm")
        small = ImageFont.load_default(10)
        for i, row in enumerate(shares.tolist()):
            for j, share in enumerate(row):
                place = (left + (j + 0.5) * side, top + (i + 0.5) * side)
                colour = "white" if share > 0.25 else "black"
                if share >= 0.005:
                    draw.text(place, f"{100 * share:.0f}", colour, small, anchor="mm")
    page.save(path, "PNG")                                   # whatever the path ends in
