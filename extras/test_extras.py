"""Facts about the scripts of this folder.

    pytest        from the root: these, and the tests of the method
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain
from extras import compare, paint

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


def test_a_vit_of_another_grid_paints_as_the_one_it_was_trained_as(tmp_path):
    """At its own size the model of a checkpoint is the model that was saved, bit by bit."""
    flags = "--data shapes --arch deit_tiny --image-size 64 --mask-cell 16 --batch-size 4 --epochs 0.001 --workers 0"
    pretrain.main([*flags.split(), "--sheets", "0", "--val", "0", "--amp", "off", "--out", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    model, _ = paint.load_model(str(tmp_path / "run" / "checkpoint.pt"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    wide, _ = paint.load_model(str(tmp_path / "run" / "checkpoint.pt"), (64, 96))
    assert wide.grid == (4, 6) and wide(torch.randn(1, 3, 64, 96), torch.ones(1, 4, 6)).shape == (1, 3, 64, 96)
