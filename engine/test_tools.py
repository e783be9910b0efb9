"""Facts about what surrounds a run: TensorBoard, gradient checkpointing, tables of the docs.

    pytest engine/test_tools.py        from the root; pip install tensorboard for its tests
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune
import pretrain
from engine.board import Board
from engine.command import Distributed
from engine.files import read_lines
from engine.testing import resolved
from model import (A2MIM, ARCHS, Classifier, build_encoder, choose_mask_size_and_stage,
                   settings_for_size)

SMALL = ("--data shapes --arch resnet18 --image-size 64 --mask-size 16 --token-stage 2 "
         "--batch-size 4 --workers 0 --val 0.002 --log-every 1 --tensorboard").split()


def complaint(main, capsys, *argv: str) -> str:
    """The one line that a command with a mistake prints. Its exit code is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([*argv])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1, said
    return said


# ---- --tensorboard ----

def events(folder: Path):
    """What TensorBoard's own reader finds in the folder."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = module.EventAccumulator(str(folder), size_guidance={"images": 0})
    return reader.Reload()


def curve(reader, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in reader.Scalars(name)]


def test_tensorboard_shows_the_numbers_of_the_log_and_the_pictures_and_survives_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    pretrain.main([*SMALL, "--epochs", "0.002", "--sheets", "2", "--out", str(out)])
    board = out / "tensorboard"
    checked = 0
    for more in ([], ["--resume", "--epochs", "0.003"]):
        if more:                                             # as after a crash: a step is lost
            settings = resolved(pretrain, *SMALL, "--out", out)
            lost = Board(settings, Distributed(), 0)
            lost.add_line(dict(step=6, epoch=0.0, time=1e9, loss=77.0))
            lost.close()
            pretrain.main(["--out", str(out), *more])
        reader = events(board)
        lines = read_lines(out / "log.jsonl")
        for name in ("loss", "lr", "spatial", "held_out", "images_per_s"):
            logged = [(line["step"], line[name]) for line in lines if name in line]
            shown = curve(reader, name)
            assert [step for step, _ in shown] == [step for step, _ in logged]
            assert [value for _, value in shown] == pytest.approx([value for _, value in logged])
            checked += len(logged)
        assert "step" not in reader.Tags()["scalars"]
        shown = [image.step for image in reader.Images("reconstruction")]
        assert shown == ([0, 5, 8] if more else [0, 5])
    assert checked > 30 and lines[-1]["step"] == 8


def test_without_the_flag_nothing_is_written_for_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)        # as if it were missing
    flags = [flag for flag in SMALL if flag != "--tensorboard"]
    pretrain.main([*flags, "--epochs", "0.001", "--sheets", "0", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_tensorboard_gets_one_line_that_says_what_to_install(tmp_path, monkeypatch,
                                                                       capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)        # the import fails
    said = complaint(pretrain.main, capsys, *SMALL, "--out", str(tmp_path / "run"))
    assert "--tensorboard: the package tensorboard is missing; run pip install tensorboard" in said
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fails_under_tensorboard_ends_no_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    settings = resolved(pretrain, *SMALL, "--out", tmp_path)
    board = Board(settings, Distributed(), 0)
    for step in (1, 2):
        board.add_line(dict(step=step, epoch=0.0, time=1e9, loss=1.0))
    board.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the run continues without it" in said


def test_fine_tuning_shows_its_accuracy_and_confusion_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    flags = "--data shapes --init scratch --arch resnet18 --image-size 32 --labels 2/class"
    flags += " --epochs 2 --workers 0 --eval-every 2 --tensorboard"
    finetune.main([*flags.split(), "--out", str(tmp_path)])
    reader = events(tmp_path / "tensorboard")
    result = json.loads((tmp_path / "result.json").read_text())
    assert curve(reader, "top1")[-1][1] == pytest.approx(result["top1"], abs=1e-5)
    assert len(reader.Images("confusion")) == 1


# ---- tables of the docs ----

def test_the_table_of_backbones_is_what_the_program_builds_and_chooses(capsys, monkeypatch):
    """Parameters, strides and smallest sides, and --help names the page."""
    for slow in ("trunc_normal_", "kaiming_normal_", "kaiming_uniform_"):    # values do not matter
        monkeypatch.setattr(nn.init, slow, lambda tensor, *args, **more: tensor)
    page = (ROOT / "docs/recipes.md").read_text()
    found = re.findall(r"^\| `(\w+)` \| ([\d.]+) M \| (\d+)(?:, below 64 px (\d+))? \| (\d+) px \|",
                       page, re.MULTILINE)
    assert [row[0] for row in found] == list(ARCHS)
    for arch, millions, stride, small_stride, smallest in found:
        count = sum(p.numel() for p in build_encoder(arch).parameters())
        assert f"{count / 1e6:.1f}" == millions, arch
        if arch in ("resnet101", "resnet152", "resnet200", "convnext_large", "vit_large"):
            continue                                         # as their smaller relatives
        sensible = []
        for side in (32, 64, 96):
            settings = settings_for_size(arch, side)
            encoder = build_encoder(arch, side, **settings)
            unit = settings.get("patch_size", 8)
            size, stage = choose_mask_size_and_stage(encoder, (side, side), unit)
            model = A2MIM(encoder, side, size, stage)
            assert model.stride == int(small_stride if side < 64 and small_stride else stride)
            if (side // size) ** 2 >= 9 and side // model.stride >= 2:
                sensible.append(side)
        assert sensible[0] == int(smallest), arch
    for main in (pretrain.main, finetune.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "docs/recipes.md" in " ".join(capsys.readouterr().out.split())


# ---- --grad-checkpoint ----

def step(model: nn.Module, *inputs: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """One forward and backward pass: (bytes that autograd kept in between, the gradients)."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)                                     # stochastic depth
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*inputs).square().mean()
    loss.backward()
    return sum(kept.values()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("arch, size", [
    ("deit_tiny", 64), ("convnext_tiny", 64), ("swin_tiny", 64), ("vgg11", 64)])
def test_gradients_are_the_same_with_recomputed_stages_and_less_is_kept(arch, size):
    """In training mode with stochastic depth, whose random numbers are drawn again."""
    torch.manual_seed(1)
    drop = 0.0 if arch == "vgg11" else 0.3
    encoder = build_encoder(arch, size, drop)
    model = A2MIM(encoder, size, mask_size=32, token_stage=1)
    if arch == "vgg11":                                      # its maps are large until the end
        model = A2MIM(encoder, size, mask_size=32)
    model.train()
    images = torch.randn(2, 3, size, size)
    mask = torch.tensor([[[1, 0], [0, 1]]], dtype=torch.bool).expand(2, 2, 2)
    kept, plain = step(model, images, mask)
    encoder.checkpoint_gradients()
    kept_now, recomputed = step(model, images, mask)
    assert len(plain) == len(recomputed) > 10
    for a, b in zip(plain, recomputed):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7 * max(1.0, a.abs().max().item()))
    assert kept_now < 0.6 * kept


def test_a_run_with_recomputed_stages_logs_the_same_losses(tmp_path):
    flags = "--data shapes --arch deit_tiny --image-size 64 --mask-size 16 --batch-size 4"
    flags += " --workers 0 --epochs 0.001 --sheets 0 --val 0 --amp off --log-every 1"
    losses = []
    for name, more in (("plain", []), ("recomputed", ["--grad-checkpoint"])):
        pretrain.main([*flags.split(), *more, "--out", str(tmp_path / name)])
        losses.append([line["loss"] for line in read_lines(tmp_path / name / "log.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) > 1


def test_grad_checkpoint_is_refused_where_it_would_change_the_result(tmp_path, capsys):
    flags = ["--data", "shapes", "--image-size", "64", "--grad-checkpoint", "--workers", "0"]
    out = ["--out", str(tmp_path / "run")]
    said = complaint(pretrain.main, capsys, *flags, *out, "--arch", "resnet18")
    assert "--grad-checkpoint: this net has BatchNorm" in said
    scratch = ["--init", "scratch", "--arch"]
    said = complaint(finetune.main, capsys, *flags, *out, *scratch, "resnet18")
    assert "--grad-checkpoint: this net has BatchNorm" in said
    said = complaint(finetune.main, capsys, *flags, *out, *scratch, "vgg11")
    assert "--grad-checkpoint: vgg11 is fine-tuned as torchvision's whole net" in said
    assert not (tmp_path / "run").exists()

    encoder = build_encoder("convnext_tiny")                 # fine-tuned stage by stage
    encoder.checkpoint_gradients()
    assert Classifier("convnext_tiny", encoder, 3).encoder.recompute
