"""Line charts with Pillow: panels on a page, as wide as a README shows them.

    charts([Panel(title, x, y, {name: [(x, y), ...]})]) -> PIL.Image
"""

import math
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f5fbf", "#e08a2c", "#2e8b57", "#b0413e", "#7a5aa6", "#59636e", "#c2a400", "#17828f")
WIDTH, HEIGHT = 430, 340                                     # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 84, 44                    # room around the axes


@dataclass
class Panel:
    """One chart. series: name -> points (x, y), or (x, y, low, high) with a bar from low to high."""
    title: str
    x: str                                                   # what the axes mean
    y: str
    series: dict[str, list[tuple[float, ...]]]
    ramp: bool = False                                       # one colour from dark to light: series are depths
    floor: float | None = None                               # the y axis starts here
    ticks: dict[float, str] = field(default_factory=dict)    # words instead of numbers on the x axis


def round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """At most `count` + 1 round numbers within [low, high], evenly spaced."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def charts(panels: list[Panel], columns: int = 2) -> Image.Image:
    """All panels on one page, row by row."""
    columns = min(columns, len(panels))
    page = Image.new("RGB", (columns * WIDTH, math.ceil(len(panels) / columns) * HEIGHT), "white")
    for i, panel in enumerate(panels):
        page.paste(drawn(panel), (i % columns * WIDTH, i // columns * HEIGHT))
    return page


def drawn(panel: Panel) -> Image.Image:
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font, bold = ImageDraw.Draw(page), ImageFont.load_default(13), ImageFont.load_default(15)
    points = [p for line in panel.series.values() for p in line if all(map(math.isfinite, p))]
    xs, ys = [p[0] for p in points] or [0.0], [v for p in points for v in p[1:]] or [0.0]
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    low = low if panel.floor is None else panel.floor
    right, high = max(right, left + 1e-9), max(high, low + 1e-9)
    high, low = high + 0.04 * (high - low), low - 0.04 * (high - low) * (panel.floor is None)

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM))

    draw.text((WIDTH / 2, 14), panel.title, "black", bold, "mm")
    draw.text((8, 36), panel.y, "#59636e", font, "lm")
    for y in round_numbers(low, high):
        draw.line([at(left, y), at(right, y)], "#dddddd")
        draw.text((LEFT - 6, at(left, y)[1]), f"{y:g}", "black", font, "rm")
    for x, word in (panel.ticks or {x: f"{x:g}" for x in round_numbers(left, right)}).items():
        draw.text((at(x, low)[0], HEIGHT - BOTTOM + 11), word, "black", font, "mm")
    draw.text((WIDTH / 2, HEIGHT - 13), panel.x, "#59636e", font, "mm")
    place, row = LEFT, 54
    for i, (name, line) in enumerate(panel.series.items()):
        share = i / max(1, len(panel.series) - 1)
        ramp = tuple(round(a + share * (b - a)) for a, b in zip((20, 20, 90), (240, 170, 40)))
        colour = ramp if panel.ramp else COLOURS[i % len(COLOURS)]
        line = [p for p in line if all(map(math.isfinite, p))]
        for x, y, *bar in line:
            if bar:
                draw.line([at(x, bar[0]), at(x, bar[1])], colour, 1)
            (cx, cy), r = at(x, y), 2 if panel.ramp else 3
            draw.ellipse([cx - r, cy - r, cx + r, cy + r], colour)
        draw.line([at(*p[:2]) for p in line], colour, 2, "curve")
        if not panel.ramp or share in (0, 1):                # of a ramp, its two ends are named
            word = name if not panel.ramp or share == 1 else f"{name} to"
            if place > LEFT and place + draw.textlength(word, font) > WIDTH:
                place, row = LEFT, row + 16
            draw.text((place, row), word, colour, font, "lm")
            place += draw.textlength(word, font) + (5 if panel.ramp else 14)
    return page
