"""Facts about shrink.py: what is written, what is left as it is, and how a stopped run goes on."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import list_images
from extras import shrink

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning",
                                        "ignore:This process:DeprecationWarning")


def gradient(width: int, height: int) -> Image.Image:
    """Smooth colours, which survive JPEG and every kind of resize."""
    y, x = np.mgrid[:height, :width]
    colours = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return Image.fromarray(np.stack(colours, -1).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Two classes of photographs of all kinds; the path of their folder."""
    folder = tmp_path / "photos"
    for name in ("train/cat", "train/dog", "val/cat"):
        (folder / name).mkdir(parents=True)
    gradient(500, 375).save(folder / "train/cat/wide.jpg", quality=95)
    gradient(300, 900).save(folder / "train/cat/tall.JPEG", quality=95)
    gradient(400, 400).save(folder / "train/dog/square.png")
    gradient(200, 90).save(folder / "train/dog/small.png")
    gradient(256, 256).save(folder / "val/cat/fits.jpg")
    sideways = gradient(600, 300)
    exif = sideways.getexif()
    exif[0x0112] = 6                                         # to be turned by 90 degrees
    sideways.save(folder / "val/cat/sideways.jpg", exif=exif)
    (folder / "train/cat/damaged.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(capsys, *words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the program."""
    capsys.readouterr()
    code = 0
    try:
        shrink.main([*map(str, words), "--workers", "1"])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_each_image_gets_the_shorter_side_in_the_same_folders(photos, tmp_path, capsys):
    out = tmp_path / "small"
    code, said, warned = run(capsys, photos, out)
    assert code == 0 and "4 images shrunk, 2 copied as they are, 0 were there" in said
    sizes = {}
    for name in list_images(out):
        with Image.open(out / name) as image:
            sizes[name] = (image.format, *image.size)
    assert sizes == {
        "train/cat/wide.jpg": ("JPEG", 341, 256),            # 500 * 256 / 375 = 341.3
        "train/cat/tall.JPEG": ("JPEG", 256, 768),
        "train/dog/square.png.jpg": ("JPEG", 256, 256),
        "train/dog/small.png": ("PNG", 200, 90),             # as it was
        "val/cat/fits.jpg": ("JPEG", 256, 256),
        "val/cat/sideways.jpg": ("JPEG", 256, 512),          # upright
    }
    for name in ("train/dog/small.png", "val/cat/fits.jpg"):
        assert (out / name).read_bytes() == (photos / name).read_bytes()
    # Pillow's own way to the same picture
    expected = gradient(500, 375).resize((341, 256), Image.Resampling.BICUBIC)
    apart = np.asarray(expected, float) - np.asarray(Image.open(out / "train/cat/wide.jpg"), float)
    assert np.abs(apart).mean() < 1.5
    assert "1 files cannot be read" in warned and "train/cat/damaged.jpg (" in warned
    assert (out / "unreadable.txt").read_text().startswith("train/cat/damaged.jpg (")
    assert not list(out.rglob(".*"))                         # nothing half done is left


def test_the_same_command_goes_on_where_it_was_stopped(photos, tmp_path, capsys):
    out = tmp_path / "small"
    run(capsys, photos, out)
    kept, lost, empty = (out / "train" / name for name in
                         ("dog/small.png", "cat/wide.jpg", "cat/tall.JPEG"))
    before = kept.stat().st_mtime_ns
    content = lost.read_bytes()
    lost.unlink()
    os.truncate(empty, 0)                                    # as after a crash of the machine
    (lost.parent / f".{lost.name}.tmp").write_bytes(b"half")
    assert (out / "unreadable.txt").exists()
    gradient(80, 80).save(photos / "train/cat/damaged.jpg")
    code, said, _ = run(capsys, photos, out)
    assert not (out / "unreadable.txt").exists()             # the file was repaired
    assert code == 0 and "2 images shrunk, 1 copied as they are, 4 were there" in said
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    assert empty.stat().st_size > 0 and not list(out.rglob(".*"))


def test_side_and_quality_are_the_flags(photos, tmp_path, capsys):
    sizes = []
    for quality in (30, 95):
        out = tmp_path / f"q{quality}"
        run(capsys, photos, out, "--side", "64", "--quality", quality)
        file = out / "train/cat/wide.jpg"
        with Image.open(file) as image:
            assert image.size == (85, 64)
        sizes.append(file.stat().st_size)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("words, expected", [
    ("{photos} {photos}/small", "lies inside"),
    ("{photos} {photos}", "lies inside"),
    ("{photos}/none {out}", "no such folder"),
    ("{empty} {out}", "no images below it"),
    ("{photos} {photos}/notes.txt/x", "lies inside"),
    ("{photos} {empty}/file/x", "cannot be written"),
    ("{photos} {out} --side 0", "--side: 0: must be an integer from 1"),
    ("{twice} {out}", "a.png: would become a.png.jpg, which is there"),
])
def test_a_mistake_gets_one_line(words, expected, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    if "file" in words:
        (tmp_path / "empty" / "file").write_text("")
    (tmp_path / "twice").mkdir()
    for name in ("a.png", "a.png.jpg"):
        (tmp_path / "twice" / name).touch()
    places = dict(photos=photos, out=tmp_path / "out", empty=tmp_path / "empty",
                  twice=tmp_path / "twice")
    code, _, said = run(capsys, *words.format(**places).split())
    assert code == 2 and expected in said and said.count("\n") == 1 and "Traceback" not in said


def test_a_file_that_cannot_be_written_ends_it_in_one_line(photos, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    (tmp_path / "small/train").write_text("a file where a folder has to be")
    code, _, said = run(capsys, photos, tmp_path / "small")
    line = said.splitlines()[-1]
    assert code == 1 and "not written (" in line and "run the same command again" in line
    assert "Traceback" not in said
