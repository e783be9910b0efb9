"""Everything a run writes: its folder and the lock on it, checkpoints, log lines.

    lock_folder      one run at a time in a folder
    load_checked     torch.load for files that may be damaged
    save_atomically  a file is the old one or the new one, never half of either
    read_checkpoint  the last one that is whole
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

try:
    import fcntl                                             # not on Windows
except ImportError:
    fcntl = None

import torch

# ---- the output folder ----

WRITTEN = ("args.json", "backbone.pt", "best.pt", "broken.txt", "checkpoint.pt", "checkpoint-previous.pt",
           "confusion.png", "features.npz", ".lock", "log.jsonl", "loss.png", "result.json")
locks = {}  # folder -> the open lock file of this process


def make_and_lock(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)


def lock_folder(out: Path) -> None:
    """Takes the folder for this process until `release_locks` or its end. Raises ValueError if
    another has it.

    The kernel releases the lock when the process dies, however it dies. A lock of `lockf` is not
    inherited by loader workers, so they cannot hold it after their parent was killed."""
    key = os.path.realpath(out)
    if fcntl is None or key in locks:
        return
    file = open(out / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"--out {printable(str(out))}: another run is writing there; wait for its end, or choose "
                             f"another --out") from None
        print(f"warning: {printable(str(out))} cannot be locked ({error.strerror}); do not start two runs in it",
              file=sys.stderr)
        return
    locks[key] = file


def release_locks() -> None:
    while locks:
        locks.popitem()[1].close()


def refuse_odd_files(out: Path) -> None:
    """Raises ValueError if a folder, a pipe or a device stands where a run writes a file."""
    for name in WRITTEN:
        path = out / name
        if path.exists() and not path.is_file():
            kind = "folder" if path.is_dir() else "pipe or device"
            raise ValueError(f"{printable(str(path))}: is a {kind}, a run writes a file of this name; move it away, or "
                             f"choose another --out")


def settings(args: SimpleNamespace) -> dict:
    """What args.json and a checkpoint remember of the flags."""
    return {k: v for k, v in vars(args).items() if k not in ("given", "demo", "resume", "download", "device")}


# ---- checkpoints ----

def load_checked(path: str | Path):
    """torch.load of plain values: nothing in the file is executed.

    Raises OSError if it is no regular file (a pipe would be waited for), or if a byte of it has
    flipped: a `.pt` is a zip file with checksums, and torch.load does not look at them."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path}: is not a regular file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise OSError(f"{path}: {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_atomically(state: dict, path: Path, keep_previous: bool = False) -> None:
    """Write beside, flush to the disk, rename: a kill at any moment, or a full disk, leaves the old
    or the new file.

    With `keep_previous` the old one stays as <stem>-previous.pt. Raises OSError if the file cannot
    be written."""
    beside, previous = path.with_name(path.name + ".tmp"), path.with_stem(path.stem + "-previous")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():  # a second name for the old file: one is always there
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:                                  # a file system without links
                shutil.copyfile(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                 # torch wraps the errors of the disk
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OSError(f"{path} not written: {disk_error(error, path.parent)}") from None


def write_text_atomically(path: Path, text: str) -> None:
    """The same for a text. Raises OSError that names the file and the reason."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OSError(f"{path} not written: {disk_error(error, path.parent)}") from None


def disk_error(error: Exception, folder: Path) -> str:
    """The reason why a file could not be written, in words of a user: torch says "unexpected pos"
    for a full disk."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < 2**20:
            return "no space left on the disk"
    first = str(error).splitlines()[0]
    return "the disk is full, or it failed" if "enforce fail" in first else first


def read_checkpoint(out: Path) -> dict | None:
    """checkpoint.pt of a run, or the one before it if that is broken; None if there is none yet.

    `path` is added to the state: the file that it came from. Raises ValueError if no file can be
    read."""
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint-previous.pt") if path.exists()]
    for path in paths:
        try:
            state = load_checked(path)
            is_whole = is_checkpoint(state)
        except Exception:  # torch.load has no one type for a broken file
            is_whole = False
        if is_whole:
            return dict(state, args=with_new_names(state["args"]), path=str(path))
    if paths:
        raise ValueError(f"{printable(str(paths[0]))}: cannot be read as a checkpoint of this program (damaged, of "
                         f"another program, or with weights that are NaN); move it away to start from the beginning")
    return None


RENAMED = {"mask_cell": "mask_size", "mask_stage": "token_stage"}  # settings of older runs
REMOVED = {"alpha": 1.0, "log_weight": True}                 # and those that every run has now


def with_new_names(args: dict) -> dict:
    """The settings of a run, as an older version may have saved them, under the names of now.

    Raises ValueError for a value that is no longer supported."""
    for name, value in REMOVED.items():
        if args.get(name, value) != value:
            raise ValueError(f"this run has --{name.replace('_', '-')} {args[name]}, which is no longer supported")
    return {RENAMED.get(name, name): value for name, value in args.items() if name not in REMOVED}


def is_checkpoint(state: dict) -> bool:
    """Are the values there that every run saves, of their types, and all weights finite?"""
    counters = {"step": 0, "per_epoch": 1, "world": 1, "skipped": 0}  # name -> smallest value
    if not all(type(state[name]) is int and state[name] >= least for name, least in counters.items()):
        return False
    args = state["args"]
    return isinstance(args, dict) and isinstance(args["program"], str) and all_finite(state["model"])


def all_finite(state: dict) -> bool:
    """Is there no NaN and no infinity in any tensor of a state dict?"""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return all(bool(value.isfinite().all()) for value in tensors if value.is_floating_point())


# ---- log lines ----

def append_line(log: Path, line: dict) -> None:
    """Adds a line to log.jsonl, behind a whole one: the last may be cut if the disk was full."""
    with open(log, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(log: Path) -> list[dict]:
    """The lines of log.jsonl that are whole, and of this program: what else is in the file is
    passed over."""
    lines = []
    for text in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and all(type(line.get(name)) in (int, float) for name in ("step", "epoch")):
                lines.append(line)
    return lines


def trim_log(log: Path, epoch: float) -> None:
    """Drops the lines after `epoch`: these steps are about to be made again."""
    if log.exists():
        kept = [line for line in read_lines(log) if line["epoch"] <= epoch + 5e-5]
        write_text_atomically(log, "".join(json.dumps(line) + "\n" for line in kept))


UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"                                   # controls: ESC, line breaks, tabs, NUL
    "\u2028\u2029"                                          # line and paragraph separators
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"         # marks that turn the direction of text
    "\ud800-\udfff]"  # half characters, and bytes that are no UTF-8
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
    """One character as a backslash escape. Python keeps a byte that is no UTF-8 as U+DC80 to
    U+DCFF."""
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
