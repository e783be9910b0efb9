"""Where a script writes. The place is checked before the work begins: no work is lost at its end.

    check_file     can this file be written, and has it one of these endings?
    free_name      a name that no file has yet
    writing        a file that cannot be written ends the run in one line
"""

import contextlib
import itertools
import os
from pathlib import Path
from typing import Sequence

from engine.command import Failed
from engine.files import check_folder, printable


def check_file(out: Path, endings: Sequence[str]) -> None:
    """Raises ValueError if `out` ends otherwise, is no regular file, or cannot be written."""
    if out.suffix.lower() not in endings:
        raise ValueError(f"--out {printable(str(out))}: must be a file name that ends in "
                         f"{', '.join(endings)}")
    check_folder(out.parent)
    if os.path.lexists(out) and not out.is_file():
        raise ValueError(f"--out {printable(str(out))}: is no regular file; choose another name")


def free_name(path: Path) -> Path:
    """The path itself, or the first of name-2, name-3, ... that does not exist."""
    numbered = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


@contextlib.contextmanager
def writing(path: Path):
    """Around the lines that write `path`: an error of the disk becomes Failed, with its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise Failed(f"{printable(str(path))}: not written ({error.strerror or error})") from None
