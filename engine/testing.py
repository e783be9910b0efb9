"""What several files of tests use: small runs, what they wrote and printed, masks, image files.

The fixtures are in conftest.py.
"""

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import finetune
import masking
import pretrain
from engine.flags import height_width
from engine.shapes import Shapes

HERE = Path(__file__).parent.parent
close = torch.testing.assert_close


# ---- the flags of small runs ----

TINY = ("--data shapes --arch deit_tiny --image-size 64 --mask-size 16 --batch-size 8 --workers 0 "
        "--amp off --log-every 1 --sheets 0 --drop-path 0 --lr 0.03 --val 0").split()
QUICK = ["--arch", "shufflenet_v2_x0_5", "--image-size", "32"]   # where any net will do
SMALL = ("--data shapes --image-size 32 --batch-size 8 --workers 0 --amp off --log-every 1 "
         "--epochs 2").split()


# ---- runs ----

def run(out, *flags, base=TINY):
    """Pre-trains in this process; returns (log lines without the clock, checkpoint)."""
    pretrain.main([*base, "--out", str(out), *flags])
    return read_log(out), torch.load(out / "checkpoint.pt", weights_only=True)


def tune(out, *flags):
    stem = ["--stem", "imagenet"] if "--init" in flags else []       # four times faster at 32 px
    finetune.main([*SMALL, "--out", str(out), *stem, *map(str, flags)])
    return json.loads((out / "result.json").read_text())


def settings_of(capsys, out, *flags):
    """(args.json, what was printed) of a short run."""
    pretrain.main([*flags, "--out", str(out), *"--workers 0 --amp off --sheets 0".split()])
    return json.loads((out / "args.json").read_text()), capsys.readouterr().err


def resolved(stage, *flags, images=1_281_167, **processes):
    """The settings of a run of pretrain or finetune with so many images."""
    one_process = dict(size=1, local_size=1, on_gpu=False, default_amp=lambda: "off")
    world = SimpleNamespace(**{**one_process, **processes})
    typed = stage.parse([*map(str, flags)])
    return stage.resolve(stage.asked_for(typed), images, world)


def assert_settings(settings, **expected):
    assert {name: getattr(settings, name) for name in expected} == expected


class PowerFailure(Exception):
    pass


def failing_at(number, step):
    """A train_step that raises at step `number`."""
    def until_then(at, *rest):
        if at == number:
            raise PowerFailure("the power fails")
        return step(at, *rest)
    return until_then


def prepared(stage, flags: str, world):
    """(settings, state) of a run of pretrain or finetune on drawn shapes, before its first step."""
    settings = resolved(stage, *flags.split(), images=10_000)
    images = Shapes("train", height_width(settings.image_size))
    if stage is pretrain:
        state, *_ = pretrain.prepare(settings, world, None, images, None)
        return settings, state
    return settings, finetune.prepare(settings, world, None, images, images)


def complaint(capsys, *flags, main=pretrain.main):
    """Runs main with flags that must be refused; returns (exit code, stderr)."""
    with pytest.raises(SystemExit) as exit:
        main([*map(str, flags)])
    return exit.value.code, capsys.readouterr().err


def run_code(code, *arguments, **options):
    """Runs Python code in a process of its own, in the repository."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE,
                          capture_output=True, text=True, timeout=240, **options)


def torchrun(*arguments, processes=2, **options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc_per_node={processes}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240,
                          env=environment, **options)


# ---- what a run wrote and printed ----

CLOCK = ("time", "images_per_s", "data_wait", "peak_memory_mb")           # differ from run to run


def read_log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def same_weights(a, b, **tolerance):
    tolerance = tolerance or dict(atol=0, rtol=0)
    for name, value in a["model"].items():
        close(value, b["model"][name], **tolerance, msg=lambda text: f"{name}: {text}")


def verdict_of(said):
    """What pretrain.py printed: (share of the mean colour's error, of the blur's, +/-, words)."""
    number = r"([\d.]+)"
    form = rf"{number} of the mean colour's error, {number} \+/- {number} of a blur's: (.*)"
    found = re.search(form, said)
    return *map(float, found.groups()[:3]), found[4]


# ---- networks ----

def randomised(net: nn.Module) -> nn.Module:
    """The net with random weights, in eval mode: none of them is what it starts with."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return net.eval()


# ---- masks and batches ----

def pixels(mask, image):
    """The mask at the size of the pixels, (B, 1, H, W), as both losses take it."""
    return masking.resize_mask(mask, image.shape[-2:])


def checkerboard(batch=1, gh=2, gw=2):
    """A mask (batch, gh, gw) that hides every other mask unit."""
    sums = torch.arange(gh)[:, None] + torch.arange(gw)[None]
    return sums.remainder(2).eq(0).expand(batch, gh, gw)


def flat(batches):
    return [list(b) for b in batches]


# ---- files ----

def paint(path, mode="RGB", colour=(200, 40, 90), size=(40, 30), **options):
    """Writes a one-colour image; returns its path as text."""
    image = Image.new("RGB", size, colour)
    if mode == "P":
        image = image.quantize(4)
    else:
        image = image.convert(mode)
    image.save(path, **options)
    return str(path)


def labelled_folder(root, sizes):
    """Writes root/<split>/<class>/*.png: noise, brighter from class to class."""
    rng = np.random.default_rng(0)
    for split, counts in sizes.items():
        for label, count in enumerate(counts):
            (root / split / f"c{label}").mkdir(parents=True)
            for i in range(count):
                darkest = 60 * label
                noise = rng.integers(darkest, darkest + 100, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / f"c{label}" / f"{i}.png")


def spoil(folder):
    """Writes one good image and six files that are no images; returns the names of the six."""
    good = paint(folder / "good.jpg", size=(64, 64))
    (folder / "cut.jpg").write_bytes(Path(good).read_bytes()[:400])
    (folder / "empty.png").touch()
    (folder / "text.jpeg").write_text("not an image")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(folder / "bomb.png")
    header = bytearray((folder / "bomb.png").read_bytes())
    header[16:24] = (60_000).to_bytes(4, "big") * 2          # 3.6 gigapixels, in a file of 67 bytes
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(header)
    os.mkfifo(folder / "pipe.jpg")                           # reading it would wait for ever
    return {"cut.jpg", "empty.png", "text.jpeg", "gone.png", "bomb.png", "pipe.jpg"}


def flip_a_byte(path):
    """Damages a torch.save file in the middle, where its tensors are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
