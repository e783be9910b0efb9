"""Smaller files, which the loader decodes faster: the shorter side of each image becomes 256 px.

    python extras/shrink.py /path/to/imagenet /path/to/imagenet-256
    python pretrain.py --data /path/to/imagenet-256

Every image of FOLDER is written below OUT, in the same subfolders: as JPEG of quality 90, upright
and in RGB. An image whose shorter side is not longer than --side is copied as it is. A file keeps
its name; one that was no JPEG becomes name.png.jpg. All cores work. The same command again goes on
where it was stopped, and files that are in OUT already are passed over. Files that cannot be read
are left out, and listed in OUT/unreadable.txt.
"""

import contextlib
import os
import shutil
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torchvision.io import encode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import list_images, read_image, usable_cores
from engine.command import Distributed, Failed, Signals, Stopped, command_line
from engine.files import printable
from engine.flags import MAX_SIDE, Parser, defaults, number
from engine.images import reason

# read_image has a limit of its own
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---- one image ----

def shrink_file(name: str, folder: str, out: str, side: int, quality: int) -> tuple[str, str]:
    """Writes FOLDER/name below OUT. Returns what was done, and the reason of a failure:

    'there'       the file was in OUT already
    'shrunk'      written with the shorter side of `side` pixels
    'copied'      the image is small enough
    'unreadable'  no image, or a damaged one
    'unwritable'  the disk is full, for example"""
    source = os.path.join(folder, name)
    shrunk = os.path.join(out, shrunk_name(name))
    copied = os.path.join(out, name)
    if is_whole(shrunk) or is_whole(copied):
        return "there", ""
    try:
        image = read_image(source, min_side=2 * side)        # uint8 (3, h, w)
    except Exception as error:                               # Pillow has no one type for damage
        return "unreadable", reason(error)
    try:
        if min(image.shape[-2:]) <= side:
            write(copied, partial(shutil.copyfile, source))
            return "copied", ""
        write(shrunk, partial(write_jpeg, smaller(image, side), quality))
        return "shrunk", ""
    except OSError as error:
        return "unwritable", reason(error)


def shrunk_name(name: str) -> str:
    """a.jpg stays a.jpg, and a.png becomes a.png.jpg."""
    is_jpeg = name.lower().endswith((".jpg", ".jpeg"))
    return name if is_jpeg else f"{name}.jpg"


def is_whole(file: str) -> bool:
    """Is a file there that is not empty? A crash of the machine may leave an empty one."""
    return os.path.isfile(file) and os.path.getsize(file) > 0


def smaller(image: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (3, h, w) -> the same image with a shorter side of `side` pixels; bicubic."""
    h, w = image.shape[-2:]
    size = [round(length * side / min(h, w)) for length in (h, w)]
    return tvf.resize(image, size, InterpolationMode.BICUBIC, antialias=True)


def write_jpeg(image: torch.Tensor, quality: int, file: str) -> None:
    encode_jpeg(image.contiguous(), quality).numpy().tofile(file)


def write(file: str, action) -> None:
    """Writes `file` by action(path of another file), which then gets the name in one step.

    A name that begins with a dot is no image for the loader, should this process be killed."""
    folder, name = os.path.split(file)
    os.makedirs(folder, exist_ok=True)
    beside = os.path.join(folder, f".{name}.tmp")
    try:
        action(beside)
        os.replace(beside, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


# ---- all images ----

def start_worker() -> None:
    """Each core works on its own image. Signals are left to the main process, which ends the
    workers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def shrink(args: SimpleNamespace, world: Distributed) -> None:
    """Raises ValueError for a mistake; Failed if nothing can be read or written."""
    folder, out = Path(args.folder), Path(args.out)
    check(folder, out)
    names = list_images(folder)
    if not names:
        raise ValueError(f"{printable(args.folder)}: no images below it; expected JPEG, PNG, WebP "
                         f"or BMP files")
    check_names(names)
    work = partial(shrink_file, folder=str(folder), out=str(out), side=args.side,
                   quality=args.quality)
    counts = dict.fromkeys(("shrunk", "copied", "there", "unreadable"), 0)
    unreadable = []
    workers = min(args.workers or usable_cores(), len(names))
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    with Signals(world) as signals:
        try:
            found = pool.map(work, names, chunksize=8)
            for name, (kind, why) in zip(names, tqdm(found, total=len(names), unit="image")):
                if signals.number:
                    raise Stopped(signals.number, "stopped; the same command does what is missing")
                if kind == "unwritable":
                    raise Failed(f"{printable(str(out / name))}: not written ({why}); make room, "
                                 f"or repair it, and run the same command again")
                counts[kind] += 1
                if kind == "unreadable":
                    unreadable.append(f"{printable(name, None)} ({why})")
        except BrokenProcessPool:
            raise Failed("a process was killed (by the system, if memory ran out); use fewer "
                         "--workers; the same command does what is missing") from None
        finally:
            pool.shutdown(cancel_futures=True)
    tell(counts, unreadable, out)


def check(folder: Path, out: Path) -> None:
    """Raises ValueError if there is no FOLDER, or if OUT cannot be used."""
    shown = printable(str(out))
    if not folder.is_dir():
        raise ValueError(f"{printable(str(folder))}: no such folder; give a folder of images")
    inside, outside = out.resolve(), folder.resolve()
    if inside == outside or outside in inside.parents:
        raise ValueError(f"{shown}: lies inside {printable(str(folder))}, and would be read as "
                         f"well; choose another folder for the result")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{shown}: cannot be written ({error.strerror}); choose another "
                         f"folder") from None


def check_names(names: list[str]) -> None:
    """Raises ValueError if two images would have the same name: a.png becomes a.png.jpg."""
    own = {*names}
    for name in names:
        if shrunk_name(name) != name and shrunk_name(name) in own:
            raise ValueError(f"{printable(name)}: would become {printable(shrunk_name(name))}, "
                             f"which is there; rename one of them")


def tell(counts: dict[str, int], unreadable: list[str], out: Path) -> None:
    """Prints what was done. Raises Failed if no image could be read."""
    listed = out / "unreadable.txt"
    listed.unlink(missing_ok=True)                           # of an earlier start
    if unreadable:
        listed.write_text("".join(f"{line}\n" for line in unreadable))
        some = ", ".join(unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
        print(f"{len(unreadable)} files cannot be read and are left out, listed in "
              f"{printable(str(listed))}: {some}", file=sys.stderr)
    if counts["unreadable"] == sum(counts.values()):
        raise Failed("none of the images can be read")
    print(f"{counts['shrunk']} images shrunk, {counts['copied']} copied as they are, "
          f"{counts['there']} were there: {printable(str(out))}")


# ---- the command ----

FLAGS = {
    "how": {
        "side": (256, number(int, 1, MAX_SIDE), "the shorter side in pixels; at least 1.14 times "
                 "--image-size, for the crop of the evaluation"),
        "quality": (90, number(int, 1, 100), "of the JPEG files"),
        "workers": (None, number(int, 1, 1024), "processes (all cores)")},
}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Raises ValueError for a wrong value."""
    parser = Parser("shrink.py", "%(prog)s FOLDER OUT [options]", __doc__, FLAGS, {})
    parser.add_argument("folder", metavar="FOLDER", help="images, in any subfolders")
    parser.add_argument("out", metavar="OUT", help="a folder for the result")
    return SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("shrink.py", parse, shrink, argv)


if __name__ == "__main__":
    main()
