"""What several files of tests in this folder use; more is in engine/testing.py."""

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pretrain
from extras import coco
from extras.dense import Scenes

needs_pycocotools = pytest.mark.skipif(
    coco.COCO is None, reason="needs pycocotools: pip install -r extras/requirements.txt")


# ---- runs ----

SHORT_RUN = ("--data shapes --image-size 64 --batch-size 4 --epochs 0.001 --workers 0 "
             "--sheets 0 --val 0").split()
SMALL_NET = ("--init scratch --arch resnet18 --width 16 --image-size 64 --batch-size 4 "
                   "--workers 0 --amp off --max-bad 1").split()


def short_run(out: Path, flags: str) -> str:
    """Pre-trains for one or two steps on drawn shapes of 64 px; returns the checkpoint's path."""
    pretrain.main([*SHORT_RUN, *flags.split(), "--out", str(out)])
    return str(out / "checkpoint.pt")


def limit_scenes(monkeypatch, train: int, val: int) -> None:
    """`shapes` with so many scenes for training and for validation."""
    init = Scenes.__init__

    def small(self, split, *rest, **more):
        init(self, split, *rest, **more)
        self.count = train if split == "train" else val

    monkeypatch.setattr(Scenes, "__init__", small)


@contextlib.contextmanager
def interrupted(module, at: int):
    """Around a run of segment or detect that must end with an error: its step `at` fails."""
    train_step = module.train_step

    def step(number, *rest):
        return train_step(number, *rest) if number < at else 1 / 0

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "train_step", step)
        yield


# ---- files ----

def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A file by the PNG specification. colour: 0 gray, 2 RGB; rows: a filter byte before each."""
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def noise(file: Path, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Saves a picture of random colours. size: height, width."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(file)


def numbers(file: Path, values: np.ndarray, mode: str = "L") -> None:
    """Saves values (H, W) as a gray (L), palette (P) or 16-bit (I;16) picture of class numbers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":                                          # colours unrelated to the numbers
        picture.putpalette([(37 * i) % 256 for i in range(768)])
    picture.save(file)


def camvid(root: Path, parts=("train", "val", "test"), count: int = 8) -> Path:
    """CamVid's layout: classes 0 to 2, and 11 where nothing is labelled."""
    rng = np.random.default_rng(0)
    for k, part in enumerate(parts):
        for i in range(count):
            name = f"{part}-{i}.png"
            noise(root / part / name, (40, 48), rng)
            values = rng.choice([0, 1, 2, 11], (40, 48))
            values[:k + 1] = k                               # each part has other labels
            numbers(root / f"{part}annot" / name, values)
    return root


def miou_by_numpy(labels: Path, predictions: Path, numbers, ignored) -> float:
    """The mIoU over all label pictures of a folder, counted by numpy.

    numbers: of the classes. A class that occurs nowhere is left out."""
    truth, guess = [], []
    for file in sorted(labels.iterdir()):
        truth.append(np.array(Image.open(file)).ravel())
        guess.append(np.array(Image.open(predictions / file.name)).ravel())
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    known = ~np.isin(truth, [*ignored, 255])
    truth, guess = truth[known], guess[known]
    ious = []
    for number in numbers:
        both = np.sum((truth == number) & (guess == number))
        either = np.sum((truth == number) | (guess == number))
        ious += [both / either] if either else []
    return np.mean(ious)
