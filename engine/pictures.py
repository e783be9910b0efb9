"""Pictures of a run: PNG files, drawn with Pillow.

    sheet, save_sheet    rows of images, titled columns
    save_curve           the loss over steps
    save_confusion       which class is taken for which
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid

from .files import read_lines


def save_sheet(path: Path, columns: dict[str, Tensor]) -> None:
    """The page of `sheet` as a PNG."""
    sheet(columns).save(path)


def sheet(columns: dict[str, Tensor]) -> Image.Image:
    """A page with one row per image and one titled column per entry, each (N, 3, H, W) in [0, 1]."""
    images = torch.stack(list(columns.values()), 1).flatten(0, 1).cpu()      # (N * columns, 3, H, W)
    grid = tvf.to_pil_image(make_grid(images, nrow=len(columns), padding=2, pad_value=1))
    zoom = max(1, round(160 * len(columns) / grid.width))
    grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.NEAREST)
    page = Image.new("RGB", (grid.width, grid.height + 22), "white")
    page.paste(grid, (0, 22))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, title in enumerate(columns):
        draw.text(((i + 0.5) * grid.width / len(columns), 11), title, "black", font, anchor="mm")
    return page


def save_curve(path: Path, log: Path) -> None:
    """The loss over steps, from log.jsonl: every line in gray, their running mean in blue; held-out images in orange.

    Held out, it is the pixel loss; two lines say what painting the mean colour, and a blur of what is seen, costs."""
    lines = read_lines(log)
    drawn = [(r["step"], r["loss"]) for r in lines if r.get("loss") is not None]
    held_out = [(r["step"], r["held_out"]) for r in lines if r.get("held_out") is not None]
    levels = next(({k: r[k] for k in ("mean_colour", "blur")} for r in lines if "mean_colour" in r), {})
    if len(drawn) < 2:
        return
    W, H, left, right, top, bottom = 720, 400, 60, 20, 30, 40
    first, last, shown = drawn[0][0], drawn[-1][0], [v for _, v in drawn + held_out] + list(levels.values())
    low, high = min(shown), max(max(shown), min(shown) + 1e-9)
    page = Image.new("RGB", (W, H), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)

    def at(step, loss):
        return (left + (step - first) / (last - first) * (W - left - right),
                H - bottom - (loss - low) / (high - low) * (H - top - bottom))

    for i in range(5):
        step, loss = first + i / 4 * (last - first), low + i / 4 * (high - low)
        draw.line([at(first, loss), at(last, loss)], "#dddddd")
        draw.text((left - 6, at(step, loss)[1]), f"{loss:.3f}", "black", font, anchor="rm")
        draw.text((at(step, loss)[0], H - bottom + 12), f"{step:.0f}", "black", font, anchor="mm")
    for name, level in levels.items():
        draw.line([at(first, level), at(last, level)], "#e08a2c")
        draw.text((W - right, at(last, level)[1] - 7), name.replace("_", " "), "#e08a2c", font, anchor="rm")
    half, losses = max(1, len(drawn) // 40), [loss for _, loss in drawn]
    smooth = [sum(part) / len(part) for part in (losses[max(0, i - half):i + half + 1] for i in range(len(losses)))]
    draw.line([at(*p) for p in drawn], "#bbbbbb", 1)
    draw.line([at(step, loss) for (step, _), loss in zip(drawn, smooth)], "#1f5fbf", 3)
    if len(held_out) > 1:
        draw.line([at(*p) for p in held_out], "#e08a2c", 3)
    title = "loss over optimiser steps" + "; orange: pixel loss on held-out images" * bool(held_out)
    draw.text((W / 2, 14), title, "black", font, anchor="mm")
    page.save(path)


def save_confusion(path: Path, shares: Tensor, classes: list[str]) -> None:
    """shares (C, C), rows sum to 1: of each true class (row) the share taken for each class (column), darker = more."""
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
