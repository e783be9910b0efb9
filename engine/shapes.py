"""The built-in set `shapes`: an object on a ground, drawn from (seed, split, index). Nothing is
stored.

    SHAPES       ten outlines, as signed distances
    Shapes       images with labels, in the form of data.Folder
    draw_shape   one object on a canvas; the drawn scenes of extras/ use it, too
"""

import numpy as np
import torch
from torch import Tensor


def star(u, v):
    angle = np.arctan2(v, u)
    folded = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)       # onto half a point
    r = np.hypot(u, v)
    # the line from a tip (1, 0) to the next notch
    return 0.83 * (r * np.cos(folded) - 1) + 1.19 * r * np.sin(folded)


def cross(u, v):
    down = np.maximum(np.abs(u) - 0.3, np.abs(v) - 0.95)
    across = np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.3)
    return np.minimum(across, down)


def heart(u, v):
    u, v = 1.2 * u, 1.2 * v
    return 0.45 * (u ** 2 + v ** 2 - 1 - np.abs(u) ** 0.667 * v)


def arrow(u, v):
    shaft = np.maximum(np.abs(v) - 0.2, np.abs(u + 0.3) - 0.65)
    head = np.maximum(0.1 - u, 0.707 * (np.abs(v) + u) - 0.67)
    return np.minimum(shaft, head)


# name -> f(u, v): negative inside, about one unit of distance per unit outside; radius about 1
SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.24,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "triangle": lambda u, v: np.maximum(-v, np.abs(u) * 0.866 + v * 0.5) - 0.52,
    "cross": cross,
    "star": star,
    "heart": heart,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v)),
    "half": lambda u, v: np.maximum(np.hypot(u, v + 0.4) - 1.0, -v - 0.4),
    "arrow": arrow,
}


def texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray,
            colour: np.ndarray) -> np.ndarray:
    """Stripes, checks, dots or a soft shade around `colour`, (3, h, w). x, y in image sides."""
    angle = rng.uniform(0, np.pi)
    frequency = rng.uniform(25, 60)
    p = rng.uniform(0, 6.3)
    q = rng.uniform(0, 6.3)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    s = np.sin(frequency * along + p)
    t = np.sin(frequency * across + q)
    kind = rng.integers(4)
    strength = rng.uniform(-0.06, 0.06, (3, 1, 1))
    if kind == 0:
        wave = np.tanh(3 * s)                                # stripes
    elif kind == 1:
        wave = np.tanh(5 * s * t)                            # checks
    elif kind == 2:
        wave = np.tanh(4 * (s + t - 0.8))                    # dots
    else:
        wave = np.sin(frequency / 10 * along + p)            # a soft shade
    return colour[:, None, None] + strength * wave


def draw_shape(canvas: np.ndarray, rng: np.random.Generator, kind: int, radius: float, cx: float,
               cy: float, ground: np.ndarray) -> tuple[np.ndarray, slice, slice]:
    """Draws outline number `kind`, turned at random and lighter than `ground`, on (3, H, W).

    radius, cx, cy are in image sides. Returns the object's alpha (h, w) and its rows and
    columns."""
    H, W = canvas.shape[1:]
    side = min(H, W)
    half = 1.3 * radius                                      # only this square is drawn
    turn = rng.uniform(-np.pi / 6, np.pi / 6)
    colour = rng.uniform(0.05, 0.95, 3)
    while colour.mean() < ground.mean() + 0.2:               # light, so it stands out from any fill
        colour = rng.uniform(0.05, 0.95, 3)

    def reach(centre: float, limit: int) -> slice:
        first = max(0, int((centre - half) * side))
        return slice(first, min(limit, max(0, int((centre + half) * side) + 1)))
    rows = reach(cy, H)
    cols = reach(cx, W)
    y, x = np.mgrid[rows, cols].astype(np.float32) / side
    dx = (x - cx) / radius
    dy = (y - cy) / radius
    u = dx * np.cos(turn) + dy * np.sin(turn)
    v = dy * np.cos(turn) - dx * np.sin(turn)
    distance = list(SHAPES.values())[kind](u, v) * radius * side             # in pixels
    alpha = np.clip(0.5 - distance, 0, 1)                    # one pixel of soft edge
    part = canvas[:, rows, cols]
    part += alpha * (texture(rng, x, y, colour) - part)
    return alpha, rows, cols


class Shapes:
    """Images of one object on a ground, both faintly textured. 10,000 to train on, 2,000 for val.

    The label is the object's outline, one of ten. Half of the images have a second, smaller
    object behind it, of any outline. An object is lighter than its ground and stands near the
    middle. Colour, texture, place, size and turn do not depend on the label, so neither a colour
    nor a local texture gives it away: a network has to follow the outline."""

    def __init__(self, split: str, size: tuple[int, int], seed: int = 0):
        self.key = (seed, 0 if split == "train" else 1)
        self.size = size
        self.count = 10_000 if split == "train" else 2_000
        self.classes = list(SHAPES)
        self.labels = np.arange(self.count) % len(SHAPES)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int, mask: bool = False) -> Tensor:
        """The image, uint8 (3, H, W); with `mask` the main object, (1, H, W), 255 inside."""
        rng = np.random.default_rng((*self.key, index))
        H, W = self.size
        side = min(H, W)
        y, x = np.mgrid[:H, :W].astype(np.float32) / side
        ground = rng.uniform(0.1, 0.6, 3)
        canvas = texture(rng, x, y, ground)
        has_second = rng.random() < 0.5
        for main in ([False, True] if has_second else [True]):
            kind = self.labels[index] if main else rng.integers(len(SHAPES))
            radius = rng.uniform(0.30, 0.42) if main else rng.uniform(0.09, 0.16)
            reach = 0.1 if main else 0.5                     # from the middle, in image sides
            cx = W / side / 2 + rng.uniform(-reach, reach)
            cy = H / side / 2 + rng.uniform(-reach, reach)
            alpha, rows, cols = draw_shape(canvas, rng, kind, radius, cx, cy, ground)
        if mask:                                             # the main object is drawn last
            canvas = np.zeros((1, H, W))
            canvas[:, rows, cols] = alpha
        return torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8))
