"""What a run leaves on the disk: its folder, checkpoints that survive a kill, log lines.

    load_checked     torch.load for files that may be damaged
    save_atomically  a file is the old one or the new one, never half of either
    read_checkpoint  the last one that is whole
"""

import contextlib
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision

from .command import World

# ---- the output folder ----

def make_folder(args: SimpleNamespace, world: World, global_batch: int) -> None:
    """The output folder, and args.json in it: every setting as it came out, and the versions."""
    if world.rank == 0:
        used = dict(global_batch=global_batch, torch=torch.__version__, torchvision=torchvision.__version__,
                    world=world.size, device=world.device.type)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "args.json").write_text(json.dumps({**settings(args), **used}, indent=1) + "\n")


def settings(args: SimpleNamespace) -> dict:
    """What args.json and a checkpoint remember of the flags."""
    return {k: v for k, v in vars(args).items() if k not in ("given", "demo", "resume", "download", "device")}


# ---- checkpoints ----

def load_checked(path: str | Path):
    """torch.load of plain values: nothing in the file is executed. Raises OSError if a byte of it has flipped.

    A `.pt` is a zip file with checksums, and torch.load does not look at them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise OSError(f"{path}: {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_atomically(state: dict, path: Path, keep_previous: bool = False) -> None:
    """Write beside, flush to the disk, rename: a kill at any moment, or a full disk, leaves the old or the new file.

    With `keep_previous` the old one stays as <stem>-previous.pt. Raises OSError if the file cannot be written."""
    beside, previous = path.with_name(path.name + ".tmp"), path.with_stem(path.stem + "-previous")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():                  # a second name for the old file: one is always there
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:                                  # a file system without links
                shutil.copyfile(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                 # torch wraps the errors of the disk
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} not written: {str(error).splitlines()[0]}") from None


def read_checkpoint(out: Path) -> dict | None:
    """checkpoint.pt of a run, or the one before it if that is broken; None if there is none yet.

    Raises ValueError if no file can be read."""
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint-previous.pt") if path.exists()]
    for path in paths:
        with contextlib.suppress(Exception):                 # torch.load has no one type for a broken file
            state = load_checked(path)
            if {"step", "per_epoch", "world", "args", "skipped"} <= set(state):
                return dict(state, path=str(path))
    if paths:
        raise ValueError(f"{paths[0]}: cannot be read; is it whole, and a checkpoint of this program? "
                         f"Move it away to start anew")
    return None


# ---- log lines ----

def append_line(log: Path, line: dict) -> None:
    """Adds a line to log.jsonl, behind a whole one: the last may be cut if the disk was full."""
    with open(log, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(log: Path) -> list[dict]:
    """The lines of log.jsonl that are whole."""
    lines = []
    for text in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def trim_log(log: Path, epoch: float) -> None:
    """Drops the lines after `epoch`: these steps are about to be made again."""
    if log.exists():
        beside = log.with_name(log.name + ".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in read_lines(log) if line["epoch"] <= epoch + 5e-5))
        os.replace(beside, log)


UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"                                   # controls: ESC, line breaks, tabs, NUL
    "\u2028\u2029"                                          # line and paragraph separators
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"         # marks that turn the direction of text
    "\ud800-\udfff]"                                        # half characters, and bytes that are no UTF-8
)


def printable(text: str, longest: int | None = 200) -> str:
    """Text from outside, such as a file name, to be printed or written: always one harmless line.

    Characters that would steer a terminal become backslash escapes. Text of more than `longest`
    characters loses its middle: the end of a path is its file name. The function leaves its own
    result unchanged."""
    text = UNPRINTABLE.sub(escape, text)
    if longest is None or len(text) <= longest:
        return text
    head = (longest - 3) // 2
    tail = longest - 3 - head
    return text[:head] + "..." + text[len(text) - tail:]


def escape(match: re.Match) -> str:
    """One character as a backslash escape. Python keeps a byte that is no UTF-8 as U+DC80 to U+DCFF."""
    number = ord(match[0])
    if 0xDC80 <= number <= 0xDCFF:
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process."""
    if device.type in ("cuda", "xpu"):
        return round(getattr(torch, device.type).max_memory_allocated(device) / 2**20, 1)
    try:
        import resource                                      # not on Windows
    except ImportError:
        return 0.0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)
