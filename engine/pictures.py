"""Pictures of a run: PNG files, drawn with Pillow.

    sheet, save_sheet    rows of images, titled columns
    save_curve           the losses over steps
    save_confusion       which class is taken for which
"""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid

from .files import read_lines


def save_sheet(path: Path, columns: dict[str, Tensor], note: str = "") -> None:
    """The page of `sheet` as a PNG."""
    sheet(columns, note).save(path)


def sheet(columns: dict[str, Tensor], note: str = "") -> Image.Image:
    """A page with one row per image and one titled column per entry, each (N, 3, H, W) in [0, 1].

    note: a line of small text below the images."""
    images = torch.stack(list(columns.values()), 1).flatten(0, 1).cpu()  # (N * columns, 3, H, W)
    grid = tvf.to_pil_image(make_grid(images, nrow=len(columns), padding=2, pad_value=1))
    zoom = max(1, round(160 * len(columns) / grid.width))
    grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.NEAREST)
    below = 20 if note else 0
    page = Image.new("RGB", (grid.width, grid.height + 22 + below), "white")
    page.paste(grid, (0, 22))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, title in enumerate(columns):
        draw.text(((i + 0.5) * grid.width / len(columns), 11), title, "black", font, anchor="mm")
    if note:
        small = ImageFont.load_default(12)
        draw.text((4, page.height - below / 2), note, "#555555", small, anchor="lm")
    return page


# ---- curves ----

PANEL = (720, 270)                                           # pixels: width and height
FINE = 2  # drawn twice as large, then reduced: smooth lines
COLOURS = {
    "each log line": "#b8bcc4",
    "smoothed": "#1f5fbf",
    "model": "#12805c",
    "mean-colour baseline": "#d9662b",
    "blur baseline": "#7d4fb3",
}


def save_curve(path: Path, log: Path) -> None:
    """The losses over steps, from log.jsonl, in one panel or two.

    training         the total loss: of every log line, and smoothed over a twentieth of the run
    held-out images  the pixel loss of the model, the mean-colour baseline and the blur baseline"""
    lines = read_lines(log)
    training = [(r["step"], r["loss"]) for r in lines if r.get("loss") is not None]
    measured = [r for r in lines if r.get("held_out") is not None]
    if len(training) < 2:
        return
    model = [(r["step"], r["held_out"]) for r in measured]
    ends = (training[0][0], max(step for step, _ in training + model))
    smooth = smoothed(training, max(1, len(training) // 40))
    panels = [("training loss", {"each log line": training, "smoothed": smooth})]
    if measured:
        curves = {"model": model}
        baselines = {"mean_colour": "mean-colour baseline", "blur": "blur baseline"}
        for key, title in baselines.items():
            if key in measured[-1]:                          # a target that is no image has none
                curves[title] = [(step, measured[-1][key]) for step in ends]
        panels.append(("pixel loss on held-out images", curves))

    width, height = (FINE * side for side in PANEL)
    page = Image.new("RGB", (width, height * len(panels)), "white")
    for i, (title, curves) in enumerate(panels):
        page.paste(panel(title, curves, ends), (0, i * height))
    page.reduce(FINE).save(path)


def smoothed(points: list[tuple[int, float]], half: int) -> list[tuple[int, float]]:
    """The running mean over `half` points before and after each."""
    out = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half):i + half + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def panel(title: str, curves: dict[str, list], ends: tuple[int, int]) -> Image.Image:
    """One plot with title, axes, legend, and the last value of each curve beside its end.

    curves: name (see COLOURS) -> (step, loss) pairs. ends: the first and the last step."""
    W, H = (FINE * side for side in PANEL)
    left, right, top, bottom = (FINE * margin for margin in (66, 62, 46, 44))
    page = Image.new("RGB", (W, H), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12 * FINE)
    low, high = span([y for points in curves.values() for _, y in points])
    first, last = ends

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (step - first) / max(last - first, 1) * (W - left - right)
        y = H - bottom - (loss - low) / (high - low) * (H - top - bottom)
        return x, y

    for y in ticks(low, high, 5):
        draw.line([at(first, y), at(last, y)], "#e4e6ea", FINE)
        draw.text((left - 6 * FINE, at(first, y)[1]), f"{y:.4g}", "black", font, anchor="rm")
    for x in ticks(first, last, 6):
        draw.line([at(x, low), (at(x, low)[0], H - bottom + 4 * FINE)], "black", FINE)
        draw.text((at(x, low)[0], H - bottom + 13 * FINE), f"{x:g}", "black", font, anchor="mm")
    draw.line([at(first, high), at(first, low), at(last, low)], "black", FINE)
    draw.text((W / 2, H - 10 * FINE), "optimiser step", "black", font, anchor="mm")
    name = Image.new("L", (H, 16 * FINE), 0)                 # the vertical axis's, turned
    ImageDraw.Draw(name).text((H / 2, 8 * FINE), "loss", 255, font, anchor="mm")
    name = name.rotate(90, expand=True)
    page.paste("black", (2 * FINE, 0), name)

    draw.text((left, 12 * FINE), title, "black", ImageFont.load_default(14 * FINE), anchor="lm")
    x, taken = left, []
    for name, points in curves.items():
        colour = COLOURS[name]
        line = [at(*point) for point in points]
        draw.line(line, colour, (1 if name == "each log line" else 2) * FINE, joint="curve")
        draw.line([(x, 32 * FINE), (x + 18 * FINE, 32 * FINE)], colour, 3 * FINE)
        draw.text((x + 24 * FINE, 32 * FINE), name, "black", font, anchor="lm")
        x += 24 * FINE + draw.textlength(name, font) + 22 * FINE
        if name == "model":                                  # one evaluation alone is seen, too
            for cx, cy in line:
                r = 3 * FINE
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), colour)
        if name != "each log line":
            y = free_place(line[-1][1], taken, 13 * FINE)
            draw.text((W - right + 6 * FINE, y), f"{points[-1][1]:.4f}", colour, font, anchor="lm")
            taken.append(y)
    return page


def span(values: list[float]) -> tuple[float, float]:
    """The range of an axis: the values', and a twentieth more at both ends."""
    low, high = min(values), max(values)
    more = 0.05 * (high - low) or 0.05 * abs(high) or 1e-9
    return low - more, high + more


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers from low to high: multiples of 1, 2 or 5 powers of ten."""
    size = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    for step in (size / 10, size / 5, size / 2, size, 2 * size, 5 * size, 10 * size):
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(numbers) <= most:
            break
    return [n * step for n in numbers]


def free_place(y: float, taken: list[float], apart: float) -> float:
    """The height nearest to y that is `apart` from all heights taken: texts do not overlap."""
    heights = [y]
    for other in taken:
        heights += [other - apart, other + apart]
    free = []
    for height in heights:
        if all(abs(height - other) >= apart - 1e-6 for other in taken):
            free.append(height)
    return min(free, key=lambda height: abs(height - y))


# ---- tables ----

def save_confusion(path: Path, shares: Tensor, classes: list[str]) -> None:
    """shares (C, C), rows sum to 1: of each true class (row) the share taken for each class
    (column), darker = more."""
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
