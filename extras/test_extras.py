"""Facts about the scripts of this folder.

    pytest        from the root: these, and the tests of the method
"""

import base64
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.testing import complaint
from extras import bench, chart, faults, figure, reconstruct, run_notebook
from extras.output import check_folder, free_name
from extras.testing import png, short_run
from model import A2MIM, build_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def answer(main, capsys, *argv: str) -> tuple[int, str]:
    """The exit code of a program, and the one line that it printed on stderr."""
    capsys.readouterr()
    code, message = complaint(capsys, *argv, main=main)
    assert message.count("\n") == 1 and "Traceback" not in message, message
    return code, message


def began(*_):
    """In the place of a program's work."""
    pytest.fail("the work began")


# ---- reconstruct.py and figure.py ----

ARCHS = {
    "resnet18": "--arch resnet18 --mask-size 16 --token-stage 3",
    "deit_tiny": "--arch deit_tiny --mask-size 16",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Of a run of pretrain.py: two steps of a small CNN at 64 px."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    return short_run(out, "--arch shufflenet_v2_x0_5 --mask-size 32")


@pytest.mark.parametrize("arch", ["resnet18", "deit_tiny"])
def test_reconstruct_takes_any_size_and_a_mask_drawn_by_hand(arch, tmp_path, capsys):
    checkpoint = short_run(tmp_path / "run", ARCHS[arch])
    Image.effect_noise((150, 100), 80).save(tmp_path / "wide.jpg")
    call = [checkpoint, str(tmp_path / "wide.jpg"), "--out", str(tmp_path / "reconstructed")]
    reconstruct.main([*call, "--mask", ".#/##"])
    printed = capsys.readouterr().out
    assert "24 of 24" not in printed and "18 of 24 mask units hidden, 96 x 64 px" in printed
    sheet = Image.open(tmp_path / "reconstructed" / "reconstructed-wide.png")
    assert sheet.width > 5 * 96                              # five columns
    reconstruct.main([*call, "--mask-ratio", "0.25"])
    assert "6 of 24 mask units hidden" in capsys.readouterr().out
    for flag, value, words in (
            ("--mask", "#x/..", "must be rows of . and #"),
            ("--mask", "#" * 9, "finer than the 4 x 6"),
            ("--mask-ratio", "2", "--mask-ratio: 2: must be a number from 0 to 1"),
            ("--mask-ratio", "1", "mask ratio 1.0: must lie between 0 and 1")):
        code, message = answer(reconstruct.main, capsys, *call, flag, value)
        assert code == 2 and words in message


def test_a_vit_of_another_grid_is_the_model_that_was_saved(tmp_path):
    """At its own size the model of a checkpoint has the saved weights, bit by bit."""
    checkpoint = short_run(tmp_path / "run", f"{ARCHS['deit_tiny']} --amp off")
    state = torch.load(checkpoint, weights_only=True)["model"]
    model, _ = reconstruct.load_model(checkpoint)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    wide, _ = reconstruct.load_model(checkpoint, (64, 96))
    assert wide.grid == (4, 6)
    for name, value in wide.state_dict().items():            # all but the position tables
        assert value.shape != state[name].shape or torch.equal(value, state[name]), name
    images, mask = torch.randn(1, 3, 64, 96), torch.ones(1, 4, 6)
    assert wide(images, mask).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("arch, size, words", [
    ("resnet18", "32", "notes.txt: cannot be read as an image"),
    ("resnet18", "32 64", "of 32 x 64 px; the figure has square pictures"),
    ("deit_tiny", "32", "the figure shows the feature maps of a CNN"),
    ("resnet18", "32 --fill zero", "a run with --fill zero; the figure shows A2MIM's mean colour")])
def test_the_figure_answers_a_mistake_in_one_line(arch, size, words, tmp_path, capsys):
    checkpoint = short_run(tmp_path / "run", f"{ARCHS[arch]} --image-size {size}")
    (tmp_path / "notes.txt").write_text("no picture")
    code, message = answer(figure.main, capsys, "--checkpoint", checkpoint,
                           "--image", str(tmp_path / "notes.txt"))
    assert code == 2 and words in message


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder of files that are no photographs, or of a shape that cannot be used."""
    (tmp_path / "bomb.png").write_bytes(png(50_000, 50_000, 8, 2, b"\0"))
    Image.new("RGB", (1, 60_000)).save(tmp_path / "thin.png")
    Image.new("RGB", (80, 60)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("flags, words", [
    ("{run} {odd}/bomb.png",
     "bomb.png: cannot be read as an image (Image size (2500000000 pixels)"),
    ("{run} {odd}/thin.png", "thin.png: 1 x 60000 pixels are too narrow; crop the image"),
    ("{run} {odd}/text.png", "text.png: cannot be read as an image"),
    ("{run} {odd}/pipe", "pipe: cannot be read as an image (not a regular file)"),
    ("{run} {odd}", "cannot be read as an image (not a regular file)"),
    ("{run} {odd}/gone.png", "gone.png: no such file"),
    ("{odd}/pipe {odd}/good.png", "pipe: no such file, or no regular file; give the checkpoint.pt"),
    ("{odd}/gone.pt {odd}/good.png", "gone.pt: no such file, or no regular file"),
    ("{odd}/text.png {odd}/good.png", "text.png: not a checkpoint.pt of pretrain.py"),
    ("{odd}/args.pt {odd}/good.png", "args.pt: not a checkpoint.pt of this version of pretrain.py"),
    ("{odd}/old.pt {odd}/good.png", "its run has --alpha 0.5, which is no longer supported"),
    ("{run} {odd}/good.png --out {empty}", "--out: is empty"),
    ("{run} {odd}/good.png --mask {empty}", "--mask: is empty"),
    ("{run} {odd}/good.png --out /proc", "--out /proc: cannot be written"),
    ("{run} {odd}/good.png --out {odd}/text.png/x", "cannot be written"),
    ("{run} {odd}/good.png --out {odd}/text.png/x.png", "cannot be written"),
    ("{run} {odd}/good.png --seed 99999999999999999999999",
     "--seed: 99999999999999999999999: must be an integer"),
    ("{run}", "the following arguments are required: IMAGE")])
def test_reconstruct_answers_a_mistake_in_one_line(flags, words, checkpoint, odd, capsys,
                                                   monkeypatch):
    monkeypatch.chdir(odd)
    other = dict(args={"arch": "resnet18"}, model={"mask_token.token": torch.zeros(1)})
    torch.save(other, odd / "args.pt")
    torch.save(dict(other, args={"arch": "resnet18", "alpha": 0.5}), odd / "old.pt")
    before = {*odd.iterdir()}
    places = dict(run=checkpoint, odd=odd, empty="")
    argv = [word.format(**places) for word in flags.split()]
    code, message = answer(reconstruct.main, capsys, *argv)
    assert code == 2 and words in message and {*odd.iterdir()} == before


@pytest.mark.parametrize("width", [66, 100, 128])
def test_a_drawn_mask_lies_on_the_photograph_and_not_on_what_is_added_to_it(width):
    """Whole tiles of 64 px are wider than the photograph; the right half is hidden all the same."""
    net = A2MIM(build_encoder("resnet18"), 64, 8, 2)
    photo = torch.randint(0, 256, (3, 70, width), dtype=torch.uint8)
    seen = reconstruct.tiled(photo, SimpleNamespace(mask=".#"), net, 0.6)["seen"]
    changed = (seen.int() - photo.int()).abs().amax((0, 1)) > 2              # of each column
    first = int(changed.int().argmax())
    assert changed[first:].all() and abs(first - width / 2) <= 8


def test_a_photograph_is_shown_at_the_side_of_pre_training(tmp_path, capsys):
    file = short_run(tmp_path / "run", "--arch resnet18 --image-size 48 --stem small --mask-size 8")
    Image.effect_noise((100, 80), 80).save(tmp_path / "photo.png")
    reconstruct.main([file, str(tmp_path / "photo.png"), "--out", str(tmp_path / "reconstructed")])
    assert "of 42 mask units hidden, 56 x 48 px" in capsys.readouterr().out


def test_reconstruct_overwrites_nothing_and_its_panels_are_as_large_as_the_photograph(
        checkpoint, tmp_path, monkeypatch, capsys):
    for folder, size in (("a", (300, 200)), ("b", (1200, 600))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", size, "green").save(tmp_path / folder / "photo.jpg")
    photos = [str(tmp_path / folder / "photo.jpg") for folder in "ab"]
    monkeypatch.chdir(tmp_path)
    reconstruct.main([checkpoint, *photos])
    first = Path("reconstructed-photo.png").read_bytes()
    reconstruct.main([checkpoint, photos[0]])
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"reconstructed-photo{number}.png" for number in ("", "-2", "-3")]
    assert Path("reconstructed-photo.png").read_bytes() == first

    # a panel is at least as wide as the photograph, or as the bound of 512 pixels
    small, large = (Image.open(name).width / 5 for name in names[:2])        # five columns
    assert 300 < small < 2 * 300 and 512 < large < 2 * 512

    for _ in range(2):
        reconstruct.main([checkpoint, photos[0], "--out", "new/one.png"])          # not a folder
    assert sorted(os.listdir("new")) == ["one-2.png", "one.png"]


def test_a_photograph_whose_name_is_not_text_is_reconstructed_and_named(checkpoint, tmp_path,
                                                                        capsys):
    file = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    Image.new("RGB", (64, 64)).save(io.FileIO(file, "w"), "PNG")
    reconstruct.main([checkpoint, os.fsdecode(file), "--out", str(tmp_path)])
    assert "reconstructed-\\xff.png: " in capsys.readouterr().out
    assert b"reconstructed-\xff.png" in os.listdir(os.fsencode(tmp_path))


@pytest.mark.parametrize("flags, words", [
    ("--out {odd}/a.abc", "a.abc: must be a file name that ends in"),
    ("--out {empty}", "--out: is empty"),
    ("--out {odd}", "must be a file name that ends in"),
    ("--out /proc/a.png", "--out /proc: cannot be written"),
    ("--out {odd}/text.png/a.png", "cannot be written"),
    ("--out {odd}/folder.png", "folder.png: is no regular file"),
    ("--index 2000", "--index: 2000: must be an integer from 0 to 1999"),
    ("--index -1", "--index: -1: must be an integer from 0 to 1999"),
    ("--image {odd}/bomb.png", "bomb.png: cannot be read as an image"),
    ("--image {odd}/thin.png", "thin.png: 1 x 60000 pixels are too narrow"),
    ("--image {odd}/gone.png", "gone.png: no such file"),
    ("--image {odd}/pipe", "pipe: cannot be read as an image (not a regular file)"),
    ("--checkpoint {odd}/pipe", "pipe: no such file, or no regular file"),
    ("--checkpoint {odd}/gone.pt", "gone.pt: no such checkpoint; run python pretrain.py first"),
    ("--checkpoint {odd}/text.png", "text.png: not a checkpoint.pt of pretrain.py")])
def test_the_figure_checks_its_flags_and_files_first(flags, words, checkpoint, odd, capsys,
                                                     monkeypatch):
    monkeypatch.chdir(odd)
    (odd / "folder.png").mkdir()
    monkeypatch.setattr(figure, "moves", began)
    before = {*odd.iterdir()}
    argv = [word.format(odd=odd, empty="") for word in flags.split()]
    code, message = answer(figure.main, capsys, "--checkpoint", checkpoint, *argv)
    assert code == 2 and words in message and {*odd.iterdir()} == before


def test_the_figure_states_which_patches_are_hidden_and_replaces_only_a_file_that_was_named(
        checkpoint, tmp_path, monkeypatch):
    """The pale ones: a hidden pixel of a black image is lighter than a visible one. Only --out
    replaces a file."""
    mask = torch.tensor([[[True, False], [False, False]]])
    shown = figure.outline(Image.new("RGB", (64, 64)), mask)
    hidden = shown.getpixel((figure.BIG // 4,) * 2)[0]
    visible = shown.getpixel((3 * figure.BIG // 4,) * 2)[0]
    words, write = [], ImageDraw.ImageDraw.multiline_text

    def listen(draw, at, text, *more, **named):
        words.append(text)
        write(draw, at, text, *more, **named)

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", listen)
    monkeypatch.chdir(tmp_path)
    for more in ([], [], ["--out", "new/figure.pdf"], ["--out", "method.png", "--index", "5"]):
        old = Path("method.png").read_bytes() if Path("method.png").exists() else b""
        figure.main(["--checkpoint", checkpoint, *more])
        is_replaced = Path("method.png").read_bytes() != old
        assert not old or is_replaced == ("method.png" in more)
    assert hidden > visible == 0 and "the pale patches\nare hidden" in words
    files = {str(file) for file in Path().rglob("*.p*")}
    assert files == {"method.png", "method-2.png", "new/figure.pdf"}


# ---- run_notebook.py ----

def notebook(*sources: str) -> str:
    """A notebook of one heading, then code cells."""
    cells = [dict(cell_type="markdown", metadata={}, source=["# A heading"])]
    for source in sources:
        cells.append(dict(cell_type="code", metadata={}, outputs=[], execution_count=None,
                          source=[source]))
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4))


needs_nbclient = pytest.mark.skipif(run_notebook.nbclient is None,
                                    reason="nbclient or ipykernel is missing")
CELLS = b'{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": '


@needs_nbclient
@pytest.mark.parametrize("content, code, words", [
    (b"", 2, "cannot be read as a notebook: it is not JSON"),
    (b"\xff\x00\x01", 2, "it is not JSON"),
    (b"x = 1", 2, "it is not JSON"),
    (b"[" * 100_000, 2, "it is not JSON"),
    (b"[]", 2, "is no notebook of format 4"),
    (b"{}", 2, "is no notebook of format 4"),
    (b'{"cells": [], "nbformat": 3}', 2, "is no notebook of format 4"),
    (CELLS + b"5}", 2, "is a damaged notebook"),
    (CELLS + b"[5]}", 2, "is a damaged notebook"),
    (CELLS + b'[{"cell_type": "code"}]}', 2, "is a damaged notebook"),
    (CELLS + b'[{"cell_type": "code", "source": [1]}]}', 2, "is a damaged notebook"),
    (notebook("1 +").encode(), 1, "cell 1, line 1: SyntaxError: invalid syntax"),
    (notebook("x = 1", "y = 2\n\nx / 0\nz = 3").encode(), 1,
     "cell 2, line 3: ZeroDivisionError: division by zero"),
    (notebook("def f():\n    raise OSError('a\\nb')", "f()").encode(), 1,
     "cell 2, line 1: OSError: a"),
    (notebook("import sys; sys.exit(0)").encode(), 1, "cell 1, line 1: SystemExit: 0"),
    (None, 2, "no such file, or no regular file; give a notebook")])
def test_a_notebook_that_does_not_run_is_answered_in_one_line(content, code, words, tmp_path,
                                                              capsys):
    file = tmp_path / "book.ipynb"
    if content is None:
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    out = str(tmp_path / "new.ipynb")
    found, message = answer(run_notebook.main, capsys, str(file), "--out", out)
    assert found == code and words in message
    assert os.listdir(tmp_path) == ["book.ipynb"]


@needs_nbclient
def test_a_notebook_prints_a_line_per_cell_and_is_stored_only_where_asked(tmp_path, monkeypatch,
                                                                          capsys):
    file = tmp_path / "book.ipynb"
    out = tmp_path / "new" / "out.ipynb"
    picture = "from PIL import Image; Image.new('RGB', (8, 4), 'red')"
    sources = ("\n# a comment\nimport os", "os.chdir('/'); print('hello'); 6 * 7", picture)
    file.write_text(notebook(*sources))
    before = file.read_bytes()
    monkeypatch.chdir(tmp_path)
    run_notebook.main(["book.ipynb"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:3]] == [f"cell {i} of 3" for i in (1, 2, 3)]
    assert printed[0] == "cell 1 of 3: # a comment"
    assert printed[-1].startswith("the outputs are not stored")
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["book.ipynb"]

    run_notebook.main(["book.ipynb", "--out", "new/out.ipynb"])
    cells = json.loads(out.read_text())["cells"]
    assert [cell.get("execution_count") for cell in cells] == [None, 1, 2, 3]
    stream, value = cells[2]["outputs"]
    assert stream["text"] == ["hello\n"] and value["data"]["text/plain"] == ["42"]
    [shown] = cells[3]["outputs"]
    png = base64.b64decode(shown["data"]["image/png"])
    assert Image.open(io.BytesIO(png)).getpixel((0, 0)) == (255, 0, 0)
    assert "image/jpeg" not in shown["data"]                 # one picture is enough
    assert file.read_bytes() == before and os.listdir(out.parent) == ["out.ipynb"]


@needs_nbclient
@pytest.mark.parametrize("out, words", [
    ("book.txt", "must be a file name that ends in .ipynb"),
    ("/proc/a.ipynb", "cannot be written")])
def test_a_notebook_checks_its_out_before_it_runs(out, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "book.ipynb").write_text(notebook("1"))
    monkeypatch.setattr(run_notebook, "execute", began)
    file = str(tmp_path / "book.ipynb")
    code, message = answer(run_notebook.main, capsys, file, "--out", out)
    assert code == 2 and words in message


def test_without_nbclient_one_line_names_what_to_install(tmp_path, monkeypatch, capsys):
    (tmp_path / "book.ipynb").write_text(notebook("1"))
    monkeypatch.setattr(run_notebook, "nbclient", None)
    code, message = answer(run_notebook.main, capsys, str(tmp_path / "book.ipynb"))
    assert code == 2 and "pip install -r extras/requirements.txt" in message


def test_without_matplotlib_a_program_that_draws_stops_before_it_begins(tmp_path, monkeypatch,
                                                                        capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "ROWS", dict.fromkeys(bench.ROWS, began))
    code, message = answer(bench.main, capsys)
    assert code == 2 and "matplotlib is missing" in message
    assert "pip install -r extras/requirements.txt" in message and not os.listdir(tmp_path)


# ---- where scripts write ----

@pytest.mark.parametrize("out, good", [
    ("new/deep", True), (".", True), ("nowhere/../y", True),
    ("file", False), ("file/x", False), ("/proc/x", False), ("x" * 300, False)])
def test_a_folder_is_tried_and_nothing_is_left(out, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    if good:
        check_folder(Path(out))
    else:
        with pytest.raises(ValueError, match="cannot be written"):
            check_folder(Path(out))
    assert os.listdir() == ["file"]


def test_a_name_that_is_taken_gets_the_next_number(tmp_path):
    (tmp_path / "a.b.png").write_text("")
    (tmp_path / "a.b-2.png").symlink_to("nowhere")           # taken: its target would be written
    (tmp_path / "folder").mkdir()
    names = [free_name(tmp_path / name).name for name in ("new.png", "a.b.png", "folder")]
    assert names == ["new.png", "a.b-3.png", "folder-2"]


# ---- bench.py and faults.py ----

@pytest.mark.parametrize("main, flags, words", [
    (bench.main, "--rounds 0", "--rounds: 0: must be an integer of at least 1"),
    (bench.main, "--rounds x", "--rounds: x: must be an integer of at least 1"),
    (bench.main, "--batch-size -1", "--batch-size: -1: must be an integer of at least 1"),
    (bench.main, "--image-size 100", "not a multiple of the 32-pixel mask unit; use 96 or 128"),
    (bench.main, "--image-size 32", "hides all of 1 mask units"),
    (bench.main, "--rows loader --data nowhere", "--data nowhere: no such folder"),
    (bench.main, "--rows loader --data .", "--data .: no images below it"),
    (bench.main, "--rows sleep", "invalid choice: 'sleep'"),
    (bench.main, "--arch resnet19", "did you mean resnet18"),
    (bench.main, "--out file", "--out file: cannot be written"),
    (faults.main, "--kills 0", "--kills: 0: must be an integer of at least 1"),
    (faults.main, "--only sleep", "invalid choice: 'sleep'"),
    (faults.main, "--out file", "--out file: cannot be written")])
def test_a_long_program_checks_its_flags_before_it_begins(main, flags, words, tmp_path,
                                                          monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(bench, "ROWS", dict.fromkeys(bench.ROWS, began))
    monkeypatch.setattr(faults, "PARTS", dict.fromkeys(faults.PARTS, began))
    code, message = answer(main, capsys, *flags.split())
    assert code == 2 and words in message and os.listdir() == ["file"]


def test_the_memory_that_a_call_allocates_is_counted_at_its_peak():
    def three_then_two_megabytes():
        first = torch.empty(3 * 2**20, dtype=torch.uint8)
        del first
        second = torch.empty(2 * 2**20, dtype=torch.uint8)
        return second

    assert bench.allocated(three_then_two_megabytes) == pytest.approx(3, abs=0.1)


def test_the_benchmark_takes_turns_and_shows_the_median_ratio(capsys):
    calls = []
    a, b = bench.in_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3, warm=1)
    assert calls == ["a", "b"] * 4 and len(a) == len(b) == 3
    found = bench.row("one", "the other", [1.0, 6.0, 4.0], [1.0, 2.0, 2.0], "s")
    assert (found["ratio"], found["low"], found["high"]) == (2, 1, 3)
    assert capsys.readouterr().out == "| one | the other | 2 (1 to 3) | 4 against 2 s |\n"


def test_the_benchmark_measures_real_steps_and_writes_a_row_for_each(tmp_path):
    tiny = "--arch shufflenet_v2_x0_5 --image-size 64 --batch-size 2 --rounds 1"
    bench.main([*f"--rows memory fourier {tiny} --out".split(), str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    memory, *shares = rows
    assert memory["ratio"] > 1                               # a decoder is more than a linear head
    assert len(shares) == 2 and all(0 < share["ratio"] < 1 for share in shares)
    table = (tmp_path / "table.md").read_text()
    assert all(row["what"] in table for row in rows)
    assert sorted(os.listdir(tmp_path)) == ["results.json", "table.md"]
