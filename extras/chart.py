"""Line charts and bar charts with matplotlib.

    charts              [Panel(title, x, y, {name: [(x, y), ...]})] -> a picture of all panels
    bars                groups of horizontal bars -> a picture
    check_matplotlib    a program that draws at its end calls this at its start

Both return a PIL image: `.save(path)` writes it, and a notebook shows it.
"""

import importlib.util
import math
import statistics
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

DPI = 100


def check_matplotlib() -> None:
    """Raises ValueError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing, and the plots need it; "
                         "pip install -r extras/requirements.txt")


def new_figure(width: float, height: float):
    """An empty figure, sides in inches. It has its own canvas and needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_image(figure) -> Image.Image:
    """Draws a figure: a PIL image, RGB."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())         # (H, W, 4)
    return Image.fromarray(pixels[:, :, :3])


# ---- lines ----

@dataclass
class Panel:
    """One chart of lines.

    series  name -> points (x, y), or (x, y, low, high) with an error bar from low to high
    ramp    the series are depths: they are coloured from dark to light
    floor   the y axis starts here
    ticks   x -> the word that stands there instead of the number"""
    title: str
    x: str                                                   # what the axes mean
    y: str
    series: dict[str, list[tuple[float, ...]]]
    ramp: bool = False
    floor: float | None = None
    ticks: dict[float, str] = field(default_factory=dict)


def charts(panels: list[Panel], columns: int = 2) -> Image.Image:
    """All panels in one picture, row by row."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.5 * columns, 3.6 * rows)
    for i, panel in enumerate(panels):
        draw_panel(figure.add_subplot(rows, columns, i + 1), panel)
    return as_image(figure)


def draw_panel(axes, panel: Panel) -> None:
    """Draws one panel. Points that are not finite are left out."""
    from matplotlib import colormaps
    for i, (name, points) in enumerate(panel.series.items()):
        points = [point for point in points if all(map(math.isfinite, point))]
        share = i / max(1, len(panel.series) - 1)
        colour = colormaps["viridis"](0.9 * share) if panel.ramp else f"C{i}"
        xs = [point[0] for point in points]
        ys = [point[1] for point in points]
        axes.plot(xs, ys, color=colour, label=name, marker="o", markersize=3, linewidth=1.5)
        with_bar = [point for point in points if len(point) == 4]
        if with_bar:
            xs, _, lows, highs = zip(*with_bar)
            axes.vlines(xs, lows, highs, color=colour, linewidth=1)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(color="#dddddd", linewidth=0.6)
    if panel.floor is not None:
        axes.set_ylim(bottom=panel.floor)
    if panel.ticks:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
    add_legend(axes, panel)


def add_legend(axes, panel: Panel) -> None:
    """The names of the series. Of a ramp with many depths only some are named."""
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    if panel.ramp and len(names) > 5:
        chosen = [round(i * (len(names) - 1) / 4) for i in range(5)]
        handles = [handles[i] for i in chosen]
        names = [names[i] for i in chosen]
    axes.legend(handles, names, fontsize=8, framealpha=0.8)


# ---- bars ----

COLOURS = {"A2MIM": "#1f5fbf", "SimMIM": "#e08a2c"}          # other names are gray


def bars(groups: dict[str, dict[str, list[float]]], title: str, x: str) -> Image.Image:
    """One panel per group, one below the other. A bar is the mean of its values, a dot each value.

    groups: title of a panel -> name of a bar -> values. Panels without bars are left out."""
    groups = {name: rows for name, rows in groups.items() if rows}
    heights = [len(rows) + 1.5 for rows in groups.values()]
    figure = new_figure(8, 0.8 + 0.3 * sum(heights))
    figure.suptitle(title, fontsize=11)
    if not groups:
        return as_image(figure)

    all_axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (group, rows) in zip(all_axes[:, 0], groups.items()):
        axes.set_title(group, fontsize=10, loc="left")
        for y, (name, values) in enumerate(rows.items()):
            mean = statistics.mean(values)
            axes.barh(y, mean, height=0.7, color=COLOURS.get(name.split(",")[0], "#b8b8b8"))
            if len(values) > 1:
                axes.plot(values, [y] * len(values), "o", color="black", markersize=3)
            axes.annotate(f"{mean:.1f}", (max(values), y), (6, 0), textcoords="offset points",
                          va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.invert_yaxis()                                  # the first row on top
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel(x)
    return as_image(figure)
