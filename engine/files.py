"""Everything a run writes: its folder and the lock on it, checkpoints, log lines.

    lock_folder         one run at a time in a folder
    check_folder        can files be written into a folder?
    load_checked        torch.load for files that may be damaged
    replace_atomically  a file is the old one or the new one, never half of either
    read_checkpoint     the last checkpoint that is whole
    append_line         log.jsonl
    printable           text from outside in one harmless line
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Iterator

try:
    import fcntl                                             # not on Windows
except ImportError:
    fcntl = None

import torch

# ---- the output folder ----

WRITTEN = ("args.json", "backbone.pt", "best.pt", "broken.txt", "checkpoint.pt",
           "checkpoint-previous.pt", "confusion.png", "detections.png", "features.npz", ".lock",
           "log.jsonl", "loss.png", "model.json", "predictions.json", "predictions-masks.json",
           "result.json", "segmentation.png")
locks = {}                                                   # folder -> its lock file, kept open


def make_and_lock(out: Path) -> None:
    """Makes the folder if there is none, then locks it. Raises ValueError as lock_folder does."""
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)


def lock_folder(out: Path) -> None:
    """Locks the folder until `release_locks`, or until this process ends.

    Raises ValueError if another process has the lock. The kernel releases the lock of a process
    that was killed. Loader workers do not inherit a lock of `lockf`, so they cannot keep it."""
    key = os.path.realpath(out)
    if fcntl is None or key in locks:
        return
    file = open(out / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        shown = printable(str(out))
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"--out {shown}: another run is writing there; wait for its end, or "
                             f"choose another --out") from None
        print(f"warning: {shown} cannot be locked ({error.strerror}); do not start two runs in it",
              file=sys.stderr)
        return
    locks[key] = file


def check_folder(out: Path) -> None:
    """Makes the folder, writes into it, and removes both again. Raises ValueError if that fails."""
    made = []
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out {printable(str(out))}: cannot be written ({error.strerror}); "
                         "choose another folder") from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def release_locks() -> None:
    while locks:
        _, file = locks.popitem()
        file.close()


def refuse_odd_files(out: Path) -> None:
    """Raises ValueError if a folder, a pipe or a device stands where a run writes a file."""
    for path in (*(out / name for name in WRITTEN), *out.glob("reconstruction-*.png")):
        if path.exists() and not path.is_file():
            kind = "folder" if path.is_dir() else "pipe or device"
            raise ValueError(f"{printable(str(path))}: is a {kind}, a run writes a file of this "
                             f"name; move it away, or choose another --out")


# ---- files that are whole ----

@contextlib.contextmanager
def replace_atomically(path: Path, fix: str = "", keep_previous: bool = False) -> Iterator[Path]:
    """Gives the path of a temporary file to write, which then replaces `path` in one step.

        with replace_atomically(path) as beside:
            beside.write_text(text)

    After a kill at any moment, or on a full disk, `path` is the old file or the new one. The
    temporary file is flushed to the disk before it is renamed.

    fix            what to do once there is room, for the message
    keep_previous  the old file is kept as <stem>-previous.pt

    Raises OSError, in one line with the file and the reason, if the file cannot be written."""
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            keep_as_previous(path)
        os.replace(beside, path)
    except OSError as error:
        reason = disk_error(error, path.parent)
        if fix:
            raise OSError(f"{path}: not written ({reason}); {cure_of(error)}, then {fix}") from None
        failure = OSError(f"{path} not written: {reason}")
        failure.errno = error.errno                          # for cure_of
        raise failure from None
    finally:
        with contextlib.suppress(OSError):                   # after an error; else it is renamed
            beside.unlink(missing_ok=True)


def keep_as_previous(path: Path) -> None:
    """Gives the file a second name, <stem>-previous.pt, so that it is kept when it is replaced."""
    previous = path.with_stem(path.stem + "-previous")
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:                                          # a file system without links
        shutil.copyfile(path, previous)


def cure_of(error: OSError) -> str:
    """What to do about a file that could not be written."""
    kinds = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    return "repair that" if error.errno in kinds else "make room"


def disk_error(error: OSError, folder: Path) -> str:
    """The reason why a file could not be written. Torch reports a full disk as "unexpected pos"."""
    if error.strerror:
        return error.strerror
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < 2**20:
            return "no space left on the disk"
    first_line = str(error).splitlines()[0]
    return "the disk is full, or it failed" if "enforce fail" in first_line else first_line


def write_text_atomically(path: Path, text: str, fix: str = "") -> None:
    """Writes a text by `replace_atomically`."""
    with replace_atomically(path, fix) as beside:
        beside.write_text(text, encoding="utf-8")


def save_atomically(state: dict, path: Path, keep_previous: bool = False) -> None:
    """torch.save by `replace_atomically`."""
    with (replace_atomically(path, keep_previous=keep_previous) as beside,
          open(beside, "wb") as file):
        try:
            torch.save(state, file)
        except RuntimeError as error:                        # torch wraps the errors of the disk
            raise OSError(str(error)) from None


# ---- checkpoints ----

def load_checked(path: str | Path):
    """torch.load of plain values: nothing in the file is executed.

    A `.pt` is a zip file with checksums, which torch.load does not check (files of torch before 1.6
    have none). Raises OSError if the file is no regular file (reading a pipe would wait forever),
    or if a checksum does not fit."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path}: is not a regular file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise OSError(f"{path}: {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Torch reports it as a RuntimeError, too. The file is not to blame."""
    return isinstance(error, MemoryError) or "allocate" in str(error)


def checkpoints_in(out: Path) -> list[Path]:
    """Those of checkpoint.pt and checkpoint-previous.pt that exist."""
    both = [out / "checkpoint.pt", out / "checkpoint-previous.pt"]
    return [path for path in both if os.path.exists(path)]


def read_checkpoint(out: Path) -> dict | None:
    """checkpoint.pt of a run, or checkpoint-previous.pt if that is broken; None if there is none.

    `path`, the file that was read, is added to the state. Raises ValueError if no file can be
    read."""
    paths = checkpoints_in(out)
    for path in paths:
        try:
            state = load_checked(path)
            is_whole = is_checkpoint(state)
        except Exception as error:                           # torch.load raises many types
            if is_out_of_memory(error):
                raise
            if isinstance(error, PermissionError):
                raise ValueError(f"{printable(str(path))}: cannot be opened ({error.strerror})"
                                 ) from None
            is_whole = False
        if is_whole:
            return dict(state, args=with_new_names(state["args"]), path=str(path))
    if paths:
        files = " and ".join(printable(str(path)) for path in paths)
        raise ValueError(f"{files}: cannot be read as a checkpoint of this program (damaged, of "
                         f"another program, or with weights that are NaN); move it away to start "
                         f"from the beginning")
    return None


RENAMED = {"mask_cell": "mask_size", "mask_stage": "token_stage"}            # old name -> new name
REMOVED = {"alpha": 1.0, "log_weight": True}                 # name -> the value of every run now


def with_new_names(args: dict) -> dict:
    """The settings of a run, perhaps of an older version, under today's names.

    Raises ValueError for a value that is no longer supported."""
    for name, value in REMOVED.items():
        if args.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"checkpoint.pt: its run has {flag} {args[name]}, which is no longer "
                             f"supported; resume it with the version of the program that began it")
    args = {RENAMED.get(name, name): value for name, value in args.items() if name not in REMOVED}
    if "typed" not in args:                                  # global_batch was the recipe's
        of_recipe = args.pop("global_batch", None)
        args["recipe_batch"] = None if args.get("batch_size") else of_recipe
    return args


def is_checkpoint(state: dict) -> bool:
    """Does the state hold what every run saves, in the right types, with finite weights?

    Raises KeyError, TypeError or AttributeError for other states."""
    counters = {"step": 0, "per_epoch": 1, "world": 1, "skipped": 0}         # name -> minimum
    for name, minimum in counters.items():
        if type(state[name]) is not int or state[name] < minimum:
            return False
    args = state["args"]
    if not isinstance(args, dict) or not isinstance(args["program"], str):
        return False
    return all_finite(state["model"])


def all_finite(state: dict) -> bool:
    """Is there no NaN and no infinity in any tensor of a state dict?"""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return all(bool(value.isfinite().all()) for value in tensors if value.is_floating_point())


# ---- log lines ----

def append_line(log: Path, line: dict) -> None:
    """Adds a line to log.jsonl. If a full disk has cut the last line, that line is ended."""
    with open(log, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            is_whole = file.read(1) == b"\n"
            file.write(b"" if is_whole else b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(log: Path) -> list[dict]:
    """The lines of log.jsonl. Lines that are cut short, or not of this program, are left out."""
    if not log.exists():
        return []
    lines = []
    for text in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if is_log_line(line):
                lines.append(line)
    return lines


def is_log_line(line) -> bool:
    """Is it a dict with the numbers that are read again?"""
    def is_number(value) -> bool:
        return type(value) in (int, float) and abs(value) < 1e15             # NaN is not

    if not isinstance(line, dict):
        return False
    losses = [line.get(name) for name in ("loss", "held_out", "mean_colour", "blur")]
    numbers = [line.get("step"), line.get("epoch")]
    numbers += [value for value in losses if value is not None]
    return all(is_number(value) for value in numbers)


def trim_log(log: Path, step: int, per_epoch: int) -> None:
    """Drops the lines after `step`, where the run is resumed: these steps are made again.

    The epoch of a line is rounded. It decides only where a line is of an earlier start with other
    steps per epoch."""
    def is_before(line: dict) -> bool:
        if abs(line["step"] / per_epoch - line["epoch"]) < 1e-4:
            return line["step"] <= step
        return line["epoch"] <= step / per_epoch + 5e-5

    if log.exists():
        kept = [line for line in read_lines(log) if is_before(line)]
        write_text_atomically(log, "".join(json.dumps(line) + "\n" for line in kept))


# ---- text from outside ----

UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"                                    # controls: ESC, line breaks, tabs, NUL
    "\u2028\u2029"                                           # line and paragraph separators
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"           # marks that turn the direction of text
    "\ud800-\udfff]"                                         # half characters, bytes not in UTF-8
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
    """One character as a backslash escape. Python reads a byte that is no UTF-8 as a character from
    U+DC80 to U+DCFF, which is shown as that byte."""
    number = ord(match[0])
    if 0xDC80 <= number <= 0xDCFF:
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


# ---- memory ----

def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far, in MiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type in ("cuda", "xpu"):
        peak = getattr(torch, device.type).max_memory_allocated(device)
        return round(peak / 2**20, 1)
    try:
        import resource                                      # not on Windows
    except ImportError:
        return 0.0
    units_per_mb = 2**20 if sys.platform == "darwin" else 2**10              # bytes, or KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mb, 1)
