"""Facts about the scripts of this folder.

    pytest        from the root: these, and the tests of the method
"""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain
from extras import clipart, compare, detect, figure, paint, segment
from extras.dense import Scenes

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.mark.parametrize("arch, cell", [("resnet18", 16), ("deit_tiny", 16)])
def test_paint_takes_any_size_and_a_mask_drawn_by_hand(arch, cell, tmp_path, capsys):
    flags = f"--data shapes --arch {arch} --image-size 64 --mask-cell {cell} --batch-size 4 --epochs 0.001 --workers 0"
    stage = ["--mask-stage", "3"] if arch == "resnet18" else []
    pretrain.main([*flags.split(), *stage, "--sheets", "0", "--val", "0", "--out", str(tmp_path / "run")])
    Image.effect_noise((150, 100), 80).save(tmp_path / "wide.jpg")
    call = [str(tmp_path / "run" / "checkpoint.pt"), str(tmp_path / "wide.jpg"), "--out", str(tmp_path / "painted")]
    paint.main([*call, "--mask", ".#/##"])
    assert "24 of 24" not in (said := capsys.readouterr().out) and "18 of 24 cells hidden, 64 x 96 px" in said
    assert Image.open(tmp_path / "painted" / "painted-wide.png").width > 5 * 96          # five columns
    paint.main([*call, "--mask-ratio", "0.25"])
    assert "6 of 24 cells hidden" in capsys.readouterr().out
    for more, words in ((["--mask", "#x/.."], "must be rows of . and #"), (["--mask", "#" * 9], "finer than the 4 x 6"),
                        (["--mask-ratio", "2"], "mask ratio 2.0: must lie between 0 and 1")):
        with pytest.raises(SystemExit) as exit:
            paint.main([*call, *more])
        assert exit.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("size, typed", [(64, "64"), ([48, 64], "48 64")])
def test_every_cell_of_the_comparison_is_made_at_the_image_size_asked_for(size, typed):
    args = SimpleNamespace(data="shapes", image_size=size, few=0.05, arch="resnet18", workers=0, seeds=1, out="x",
                           ablation_seeds=1, pretrain_images=100, ablation_images=100, finetune_images=100,
                           tune_lr=1e-3, drawn=True)
    cells = [cell for chain in compare.plan(args) for cell in chain]
    for _, program, flags in cells:
        if program == "pretrain":
            assert pretrain.parse(flags.split()).image_size == size
    assert f"resnet18 {typed} 0" in [flags for *_, flags in cells]               # the untrained one


@pytest.mark.parametrize("arch, size, words", [("resnet18", "32", "notes.txt: cannot be read as an image"),
                                               ("resnet18", "32 64", "of 32 x 64 px; the figure has square pictures"),
                                               ("deit_tiny", "32", "the figure shows the feature maps of a CNN")])
def test_the_figure_answers_a_mistake_in_one_line(arch, size, words, tmp_path, capsys):
    flags = f"--data shapes --arch {arch} --image-size {size} --mask-cell 16 --batch-size 4 --epochs 0.001 --workers 0"
    stage = ["--mask-stage", "3"] if arch == "resnet18" else []
    pretrain.main([*flags.split(), *stage, "--sheets", "0", "--val", "0", "--out", str(tmp_path / "run")])
    (tmp_path / "notes.txt").write_text("no picture")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        figure.main(["--checkpoint", str(tmp_path / "run" / "checkpoint.pt"), "--image", str(tmp_path / "notes.txt")])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and words in said and said.count("\n") == 1


def test_a_vit_of_another_grid_paints_as_the_one_it_was_trained_as(tmp_path):
    """At its own size the model of a checkpoint is the model that was saved, bit by bit."""
    flags = "--data shapes --arch deit_tiny --image-size 64 --mask-cell 16 --batch-size 4 --epochs 0.001 --workers 0"
    pretrain.main([*flags.split(), "--sheets", "0", "--val", "0", "--amp", "off", "--out", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    model, _ = paint.load_model(str(tmp_path / "run" / "checkpoint.pt"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    wide, _ = paint.load_model(str(tmp_path / "run" / "checkpoint.pt"), (64, 96))
    assert wide.grid == (4, 6) and wide(torch.randn(1, 3, 64, 96), torch.ones(1, 4, 6)).shape == (1, 3, 64, 96)


# ---- clipart.py and compare.py ----

def test_clip_art_becomes_class_folders_on_white_with_every_fifth_held_out(tmp_path, capsys):
    for i in range(12):                                      # half transparent, so that white shows through
        file = tmp_path / "png" / ("animals/birds" if i < 10 else "odd/music/old") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGBA", (150, 100), (0, 0, 0, 0))
        image.paste((200, 0, 0, 255), (0, 0, 75, 100))
        image.save(file)
    Image.new("RGBA", (10, 10)).save(tmp_path / "png" / "animals" / "tiny.png")
    (tmp_path / "png" / "animals" / "broken.png").write_bytes(b"no picture")
    clipart.main([str(tmp_path / "set"), "--source", str(tmp_path / "png")])
    count = {str(f.relative_to(tmp_path / "set")): len(list(f.iterdir())) for f in (tmp_path / "set").glob("*/*")}
    assert count == {"train/animals": 8, "val/animals": 2, "train/music": 2}
    with Image.open(tmp_path / "set/train/animals/000.jpg") as image:
        assert image.size == (144, 96) and min(image.getpixel((130, 48))) > 250 and image.getpixel((20, 48))[1] < 40
    with pytest.raises(SystemExit) as error:
        clipart.main([str(tmp_path / "other"), "--source", str(tmp_path / "none")])
    assert error.value.code == 2 and "apt install openclipart-png" in capsys.readouterr().err


def test_the_interval_of_a_difference_is_students_of_the_pairs():
    """Against a table: with 5 pairs the half width is 2.776 standard errors. What both seeds share drops out."""
    a, b = [60.0, 70.0, 65.0, 80.0, 75.0], [58.0, 69.0, 62.0, 76.0, 70.0]    # gains 2, 1, 3, 4, 5
    mean, low, high = compare.interval(a, b)
    assert mean == pytest.approx(3.0) and high - mean == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-3)
    assert mean - low == pytest.approx(high - mean)
    assert "better than scratch" in compare.verdict("x", a, b, "scratch")
    assert "not clearly different" in compare.verdict("x", a, [x + (-1) ** i for i, x in enumerate(a)], "scratch")
    assert "not clearly different" in compare.verdict("x", a[:1], b[:1], "scratch")          # one seed decides nothing


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(4000):
        low, high = compare.interval(list(rng.normal(1.0, 2.0, 5)), [0.0] * 5)[1:]
        hits += low < 1.0 < high
    assert 0.935 < hits / 4000 < 0.965


def test_real_images_are_judged_with_the_small_recipes_alike_for_every_arm(tmp_path):
    for i in range(40):
        file = tmp_path / "set" / ("val" if i % 4 == 0 else "train") / f"c{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    args = SimpleNamespace(data=str(tmp_path / "set"), image_size=[64], few=0.1, seeds=5, workers=0, arch="resnet18",
                           out="out", drawn=False, pretrain_images=300, finetune_images=100, ablation_seeds=0,
                           tune_lr=1e-3, ablation_images=0)
    cells = {name: (program, flags) for chain in compare.plan(args) for name, program, flags in chain}
    few = {name: flags for name, (_, flags) in cells.items() if name.startswith("few/") and name.endswith("-3")}
    assert sorted(few) == ["few/a2mim-3", "few/scratch-3", "few/scratch-long-3", "few/simmim-3"]
    rest = {re.sub(r"--weights \S+", "", few[f"few/{arm}-3"]) for arm in ("a2mim", "simmim", "scratch")}
    assert len(rest) == 1 and "--recipe small" in rest.pop()                 # the start is all that differs
    a, b = (cells[f"pretrained/{arm}-3"][1] for arm in ("a2mim", "simmim"))
    assert b.split() == [*a.split(), "--baseline", "simmim"] and "--recipe small" in a
    assert {"linear/scratch-0", "knn/scratch-0", "all/scratch-0"} <= set(cells)              # random features, too


@pytest.mark.parametrize("task, parse", [("segment", segment.parse), ("detect", detect.parse)])
def test_in_scenes_every_arm_has_the_same_training_and_only_its_start_differs(task, parse, tmp_path):
    args = SimpleNamespace(task=task, image_size=96, arch="resnet18", workers=0, seeds=2, out=str(tmp_path), scenes=100,
                           pretrain_images=200, quick=False)
    chains = compare.plan_dense(args)
    cells = {name: (program, flags.split()) for chain in chains for name, program, flags in chain}
    arms = {arm: vars(parse(cells[f"{task}/{arm}-1"][1])) for arm in ("a2mim", "simmim", "scratch")}
    for arm in arms.values():
        assert (arm.pop("init") == "scratch") == (arm.pop("weights") is None) and arm.pop("given")
    assert arms["a2mim"] == arms["simmim"] == arms["scratch"] and arms["scratch"]["recipe"] == "shapes"
    for chain in chains:                                     # what a start needs is made before it
        assert [program for _, program, _ in chain] in (["pretrain", task], [task])
        assert len(chain) == 1 or f"{chain[0][0]}/backbone.pt" in chain[1][2]
    a, b = (pretrain.parse(cells[f"pretrained/{arm}-0"][1]) for arm in ("a2mim", "simmim"))
    assert a.data == b.data == f"{tmp_path}/scenes" and a.epochs == b.epochs == 2.0
    assert (a.baseline, b.baseline) == (None, "simmim")


def test_the_unlabelled_scenes_are_those_of_the_training_split(tmp_path):
    compare.draw_scenes(tmp_path / "scenes", 3, (32, 32))
    files = sorted((tmp_path / "scenes").iterdir())
    for i, file in enumerate(files):
        assert np.array_equal(Image.open(file), Scenes("train", (32, 32)).draw(i)[0].permute(1, 2, 0))
    assert len(files) == 3 and not (tmp_path / "scenes.part").exists()


def test_the_table_of_a_task_holds_every_arms_mean_spread_and_difference(tmp_path, capsys):
    for arm, scores in (("a2mim", (0.5, 0.6)), ("simmim", (0.5, 0.58)), ("scratch", (0.1, 0.21))):
        for seed, score in enumerate(scores):
            (tmp_path / f"detect/{arm}-{seed}").mkdir(parents=True)
            ap = {"AP": score / 2, "AP50": score, "any class": 0.9}
            (tmp_path / f"detect/{arm}-{seed}/result.json").write_text(json.dumps({"box": ap, "mask": ap}))
    args = SimpleNamespace(task="detect", arch="resnet18", data="scenes", image_size=96, few=0.1, seeds=2,
                           pretrain_images=200)
    text = compare.summary(args, tmp_path)
    assert "| A2MIM | 55.0 ± 7.1 | 27.5 ± 3.5 | 90.0 ± 0.0 | 55.0 ± 7.1 | 27.5 ± 3.5 |" in text
    assert "box AP50, A2MIM: better than scratch (+39.5 points" in text and "both stages" not in text
    assert {f.name for f in tmp_path.iterdir()} == {"detect", "detect-table.md", "detect-results.json",
                                                    "detect-plot.png"}
