"""Image files in, batches to the device, pictures out.

    read_image, list_images    every kind of image file, and every one below a folder
    make_loader                batches from worker processes
    Broken                     the images that could not be read
    sheet, save_sheet, save_curve, save_confusion    pictures, drawn with Pillow
"""

import contextlib
import io
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.io import ImageReadMode, decode_image       # to move to TorchCodec one day; fast and here today
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid

from .command import Failed, World
from .files import read_lines

warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision are deprecated")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS = 2**27                                           # 134 million: more is a mistake, or a decompression bomb

# ---- files ----

def read_image(path: str) -> Tensor:
    """A JPEG, PNG, WebP or BMP file as RGB, uint8 (3, H, W), upright. Gray, palette, CMYK and alpha are converted.

    Raises OSError, RuntimeError or ValueError for a file that holds no image, or one of more than MAX_PIXELS."""
    if not os.path.isfile(path):                             # a pipe or a socket would be waited for
        raise OSError("not a regular file")
    content = np.fromfile(path, np.uint8)
    with Image.open(io.BytesIO(content)) as file:            # the header alone
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels")
        try:
            image = decode_image(torch.from_numpy(content), ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:                                 # BMP and rarer variants: Pillow knows more, and is slower
            image = tvf.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
    return tvf.to_dtype(image if image.dim() == 3 else image[0], torch.uint8, scale=True)      # 16-bit PNG, animations


def list_images(root: Path) -> list[str]:
    """Every image file below `root`, sorted, relative to it. Links are followed, a loop of links is entered once."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files
                  if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    return sorted(found)


def split_folder(root: Path, split: str) -> Path | None:
    """root/<split>, in whatever capitals (Train/, VAL/); None if there is none."""
    found = sorted(f.path for f in os.scandir(root) if f.name.lower() == split and f.is_dir())
    return Path(found[-1]) if found else None                # sorted: train/ comes after Train/, and is taken first


class Broken:
    """The images that could not be read, on all processes together."""

    def __init__(self, source, share: float, out: str | Path):
        self.source, self.most, self.out, self.seen, self.new = source, share * len(source), Path(out), set(), []

    def state_dict(self) -> dict:
        return dict(seen=sorted({*self.seen, *self.new}))

    def load_state_dict(self, state: dict) -> None:
        self.seen = set(state["seen"])

    def note(self, broken: Tensor) -> None:
        """broken (B,): the index of an image that could not be read, or -1."""
        self.new += broken[broken >= 0].tolist()

    def tell(self, world: World) -> None:
        """All take part. Names the first few, lists all in broken.txt; raises Failed if there are too many."""
        if not world.largest(len(self.new))[0]:
            return
        fresh = sorted(set(world.gather(torch.tensor(self.new, dtype=torch.long)).tolist()) - self.seen)
        names, self.new = [self.source.name(i) for i in fresh], []
        if len(self.seen) < 3 and fresh:
            world.say(f"cannot be read, the next image is taken instead: {', '.join(names[:3])}"
                      + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
        self.seen.update(fresh)
        if world.rank == 0 and fresh:
            with contextlib.suppress(OSError):               # on a full disk the list waits
                (self.out / "broken.txt").write_text("".join(f"{self.source.name(i)}\n" for i in sorted(self.seen)))
        if len(self.seen) > self.most:
            now = self.most / len(self.source)
            bad = f"{len(self.seen)} of {len(self.source)} images cannot be read"
            raise Failed(f"{bad}, listed in {self.out}/broken.txt; repair or remove them, or allow more with "
                         f"--max-bad (now {now:g})")


# ---- batches ----

def make_loader(samples: Dataset, batches, workers: int | None, world: World) -> DataLoader:
    """One loader for the whole run: no pause between epochs, and workers that start once."""
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 1) // world.local_size - 1))
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=world.on_gpu,
                      collate_fn=colours_last, prefetch_factor=4 if workers else None, worker_init_fn=ignore_signals)


def every_image_once(count: int, batch: int, world: World) -> list[list[tuple[int, int]]]:
    """Batches that pass once over all of a set: this process takes every world-th image, and none is taken twice."""
    mine = [(0, i) for i in range(world.rank, count, world.size)]
    return [mine[i:i + batch] for i in range(0, len(mine), batch)]


def colours_last(samples: list[tuple[Tensor, int, int]]) -> list[Tensor]:
    """A batch (B, 3, H, W) in the memory order of decoded JPEG files and of fast convolutions: nothing is turned."""
    images, *rest = default_collate([(image.permute(1, 2, 0), *rest) for image, *rest in samples])
    return [images.permute(0, 3, 1, 2), *rest]


def ignore_signals(worker: int) -> None:
    """Loader workers leave Ctrl-C and SIGTERM to the process they work for: it still wants images for its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---- pictures ----

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
