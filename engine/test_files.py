"""Facts about files: weights in and out, images whole or damaged, folders and names."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import unicodedata
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image
from torch import nn
from torch._utils import ExceptionWrapper

import data
import finetune
import model
import pretrain
from engine import command, files, images, weights
from engine.testing import (HERE, QUICK, TINY, complaint, flip_a_byte, labelled_folder, paint,
                            run, spoil, tune)
from model import build_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
close = torch.testing.assert_close


# ---- weights in ----

# our name -> the authors' name, a row for each rule of RENAMES in engine/weights.py
AUTHORS = {
    "convnext_tiny": {
        "features.0.0.weight": "downsample_layers.0.0.weight",
        "features.4.1.bias": "downsample_layers.2.1.bias",
        "features.5.8.block.0.weight": "stages.2.8.depthwise_conv.weight",
        "features.1.0.block.2.bias": "stages.0.0.norm.bias",
        "features.3.1.block.3.weight": "stages.1.1.pointwise_conv1.weight",
        "features.7.2.block.5.bias": "stages.3.2.pointwise_conv2.bias",
        "features.7.0.layer_scale": "stages.3.0.gamma",
        "classifier.0.weight": "norm3.weight",
    },
    "deit_tiny": {
        "patch_embed.proj.weight": "patch_embed.projection.weight",
        "blocks.4.gamma_1": "layers.4.gamma_1",
        "blocks.0.norm1.weight": "layers.0.ln1.weight",
        "blocks.11.norm2.bias": "layers.11.ln2.bias",
        "blocks.3.attn.q_bias": "layers.3.attn.q_bias",
        "blocks.3.attn.qkv.weight": "layers.3.attn.qkv.weight",
        "blocks.3.attn.relative_position_bias_table": "layers.3.attn.relative_position_bias_table",
        "blocks.7.mlp.fc1.weight": "layers.7.ffn.layers.0.0.weight",
        "blocks.7.mlp.fc2.bias": "layers.7.ffn.layers.1.bias",
        "norm.weight": "ln1.weight",
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
    },
    "resnet18": {
        "conv1.weight": "conv1.weight",
        "layer4.1.bn2.running_var": "layer4.1.bn2.running_var",
        "layer2.0.downsample.0.weight": "layer2.0.downsample.0.weight",
    },
}


@pytest.mark.parametrize("arch", AUTHORS)
def test_the_authors_checkpoints_load_by_their_own_names(arch, tmp_path):
    encoder, names = build_encoder(arch), AUTHORS[arch]
    prefix = "module.backbone."
    state = {}
    for ours, value in encoder.backbone.state_dict().items():
        if ours in names:
            state[prefix + names[ours]] = torch.randn_like(value)
        else:
            state[prefix + ours] = value
    state["module.neck.decoder_pred.0.weight"] = torch.randn(4, 4)
    not_ours = 1
    if arch == "convnext_tiny":                              # the authors keep LayerScale as (C,)
        gamma = prefix + "stages.3.0.gamma"
        state[gamma] = state[gamma].flatten()
    if arch == "deit_tiny":
        index = torch.zeros(197, 197, dtype=torch.long)
        state[prefix + "layers.3.attn.relative_position_index"] = index
        not_ours += 1
    torch.save({"meta": {"epoch": 300}, "state_dict": state}, tmp_path / "released.pth")
    report = weights.load_backbone(encoder, tmp_path / "released.pth")
    assert set(names) <= set(report["used"]) and not report["missing"]
    assert "neck.decoder_pred.0.weight" in report["skipped"]
    assert len(report["skipped"]) == not_ours
    loaded = encoder.backbone.state_dict()
    for ours, theirs in names.items():
        assert torch.equal(loaded[ours].flatten(), state[prefix + theirs].flatten()), ours


WRAPPED = {        # program -> (keys that lead to the weights, prefix, other names beside them)
    "torch.compile": ((), "_orig_mod.", ["_orig_mod.fc.weight"]),
    "DDP and torch.compile": (("model",), "module._orig_mod.", ["module._orig_mod.fc.weight"]),
    "Lightning": (("state_dict",), "model.", ["loss.weight"]),
    "MoCo": (("state_dict",), "module.encoder_q.",
             ["module.encoder_q.fc.0.weight", "module.queue"]),
    "SparK": (("module",), "", ["fc.weight"]),
    "SparK's whole model": (("module",), "sparse_encoder.sp_cnn.",
                            ["mask_tokens.0", "dense_decoder.proj.bias"]),
    "DINO": (("teacher",), "backbone.", ["head.mlp.0.weight"]),
    "DDP": (("model_state_dict",), "module.", ["module.fc.weight"]),
}


@pytest.mark.parametrize("program", WRAPPED)
def test_weights_are_found_under_the_keys_and_prefixes_of_other_programs_and_the_report_names_them(
    program, tmp_path
):
    keys, prefix, others = WRAPPED[program]
    encoder, donor = build_encoder("resnet18"), build_encoder("resnet18")
    state = {prefix + name: value for name, value in donor.backbone.state_dict().items()}
    state |= {name: torch.ones(2) for name in others}
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    if program == "MoCo":                                    # its second encoder, a moving average
        state |= {name.replace("encoder_q", "encoder_k"): value for name, value in zeros.items()}
    whole = state
    for key in keys:
        whole = {"epoch": 3, key: whole, "optimizer": {"state": {}, "param_groups": []}}
    if program == "DINO":
        student = {f"module.{name}": value for name, value in zeros.items()}
        whole = {"student": student, **whole}
    torch.save(whole, tmp_path / "w.pt")
    found = weights.load_backbone(encoder, tmp_path / "w.pt")
    assert not found["missing"]
    for name, value in donor.backbone.state_dict().items():
        assert torch.equal(encoder.backbone.state_dict()[name], value), name
    said = weights.summary_of(found)
    assert all(f"under {key!r}" in said for key in keys)
    assert f"prefix '{prefix}' taken off" in said if prefix else "prefix" not in said
    assert said.startswith("120 tensors loaded (")


def test_a_file_without_batch_counters_is_complete(tmp_path):
    """torchvision's first files have none, because BatchNorm did not count its batches then."""
    state = {name: tensor for name, tensor in tv.resnet18().state_dict().items()
             if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    encoder = build_encoder("resnet18")
    found = weights.load_backbone(encoder, tmp_path / "old.pth")
    assert found["missing"] == [] and found["skipped"] == ["fc.bias", "fc.weight"]
    assert torch.equal(encoder.backbone.bn1.weight, state["bn1.weight"])


@pytest.mark.parametrize("arch, block", [
    ("resnet18", "layer1.2"), ("swin_tiny", "features.5.10"), ("convnext_tiny", "features.5.10")])
def test_a_deeper_net_is_not_loaded_into_a_shallower_one(arch, block, tmp_path):
    """A ResNet-34 has layer1.2, which a ResNet-18 lacks."""
    encoder = build_encoder(arch, (224, 224))
    deeper = {**encoder.backbone.state_dict(), f"{block}.norm.weight": torch.ones(8)}
    torch.save(deeper, tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=f"holds {block}, which this backbone lacks"):
        weights.load_backbone(encoder, tmp_path / "deep.pth")


def test_torchvisions_file_of_densenet_has_old_names_and_loads(tmp_path):
    encoder = build_encoder("densenet121", 64)
    old = {}
    for name, value in encoder.backbone.state_dict().items():
        old_name = re.sub(r"(denselayer\d+\.\w+)([12])\.", r"\1.\2.", name)
        old[old_name] = torch.randn_like(value.float())
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    assert not weights.load_backbone(encoder, tmp_path / "densenet121.pth")["missing"]
    last = encoder.backbone.features.denseblock4.denselayer16
    assert torch.equal(last.conv2.weight, old["features.denseblock4.denselayer16.conv.2.weight"])


def test_positions_of_a_grid_that_is_not_square_are_resized_to_another_as_pictures_are(tmp_path):
    """4 x 6 patches are as many as 6 x 4: only the image size of pre-training tells which."""
    net = build_encoder("deit_tiny", (64, 96)).backbone
    column = torch.arange(6).repeat(4).float()               # the column of each patch
    offset = torch.arange(11).repeat(7).float()              # the columns between two patches, + 5
    with torch.no_grad():
        net.pos_embed[0, 1:] = column[:, None]
        for block in net.blocks:
            block.attn.relative_position_bias_table[:77] = offset[:, None]
    torch.save(net.state_dict(), tmp_path / "backbone.pt")

    def check(table, width, width_before):
        """A table of rows that all count 0, 1, ... width_before - 1 counts the same at its size."""
        columns = table[:, 0].view(-1, width)
        close(columns, columns[:1].expand_as(columns))       # all rows are still the same
        assert (columns[0].diff() > 0).all()
        assert columns[0].mean().item() == pytest.approx((width_before - 1) / 2, abs=0.01)

    for size, made_at, beside in (                           # beside: image_size in args.json
        ((96, 64), (64, 96), None),
        ((96, 64), None, [64, 96]),
        ((80, 80), None, [64, 96]),
    ):
        if beside:
            (tmp_path / "args.json").write_text(json.dumps(dict(image_size=beside)))
        again = build_encoder("deit_tiny", size)
        found = weights.load_backbone(again, tmp_path / "backbone.pt", made_at)
        assert len(found["resized"]) == 13 and not found["missing"]
        patches = size[1] // 16
        check(again.backbone.pos_embed[0, 1:], patches, 6)
        biases = again.backbone.blocks[3].attn.relative_position_bias_table
        check(biases[:-3], 2 * patches - 1, 11)
    (tmp_path / "args.json").unlink()
    same = build_encoder("deit_tiny", (64, 96))
    assert not weights.load_backbone(same, tmp_path / "backbone.pt")["resized"]
    close(same.backbone.pos_embed, net.pos_embed, atol=0, rtol=0)
    # the given size is believed if it has as many patches as the file
    square = build_encoder("deit_tiny", (80, 80))
    found = weights.load_backbone(square, tmp_path / "backbone.pt", (96, 64))
    assert len(found["resized"]) == 13


def test_weights_of_a_smaller_image_are_resized_and_the_report_says_so(
    few_images, capsys, tmp_path
):
    run(tmp_path / "pre", "--epochs", "1", "--patch-size", "8")
    out = tmp_path / "tuned"
    result = tune(out, "--weights", tmp_path / "pre" / "backbone.pt", "--image-size", "48",
                  "--epochs", "1")
    said = capsys.readouterr().err
    assert "4 of them resized" in said                       # 3 bias tables and the positions
    assert "new: head" in said and "not used: 2 (norm.bias, norm.weight)" in said
    # remembered from args.json beside the weights
    assert json.loads((out / "args.json").read_text())["patch_size"] == 8
    assert result["images"] == 32 and result["labels"] == 32
    assert 0 <= result["top1"] <= 1
    assert {p.name for p in out.iterdir()} == {
        ".lock", "args.json", "log.jsonl", "checkpoint.pt", "best.pt",
        "model.json", "loss.png", "result.json", "confusion.png",
    }


def test_pretraining_starts_from_weights_and_says_what_was_used(few_images, capsys, tmp_path):
    encoder, path = build_encoder("deit_tiny", 64), tmp_path / "backbone.pt"
    state = encoder.backbone.state_dict()
    torch.save(state, path)
    run(tmp_path / "run", "--weights", str(path), "--epochs", "1", "--lr", "0")
    said = capsys.readouterr().err
    assert f"backbone.pt: {len(state)} tensors loaded; new: none; not used: 0" in said
    left = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    assert all(torch.equal(value, left[name]) for name, value in state.items())
    code, said = complaint(capsys, *TINY, "--arch", "deit_small", "--weights", path)
    assert code == 2 and "is it another architecture?" in said


# ---- weights that are refused ----

class Evil:
    """An object whose pickle calls a function when it is read."""

    def __reduce__(self):
        return print, ("this must never run",)


def test_weights_that_cannot_be_used_get_one_line(tmp_path):
    encoder = build_encoder("resnet18")
    whole = tmp_path / "whole.pt"
    torch.save(encoder.backbone.state_dict(), whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:10_000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save({"a": 1}, tmp_path / "empty.pt")
    torch.save(build_encoder("deit_tiny").backbone.state_dict(), tmp_path / "vit.pt")
    for name, words in (
        ("gone.pt", "no such file"),
        ("cut.pt", "not a file of weights"),
        ("text.pt", "not a file of weights"),
        ("evil.pt", "code to run"),
        ("empty.pt", "holds no weights"),
        ("vit.pt", "of this backbone's 60 parameters; is it another architecture?"),
    ):
        with pytest.raises(ValueError) as error:
            weights.load_backbone(encoder, tmp_path / name)
        assert words in str(error.value) and "\n" not in str(error.value), name
    assert len(weights.load_backbone(encoder, whole)["missing"]) == 0


def test_too_little_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    """Torch raises a RuntimeError. The advice to move the checkpoint away would be wrong."""
    def load(path):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't "
                           "allocate memory: you tried to allocate 4096 bytes.")

    torch.save({}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(files, "load_checked", load)
    monkeypatch.setattr(weights, "load_checked", load)
    with pytest.raises(RuntimeError, match="can't allocate"):
        files.read_checkpoint(tmp_path)
    with pytest.raises(RuntimeError, match="can't allocate"):
        weights.load_backbone(build_encoder("resnet18"), tmp_path / "checkpoint.pt")


def test_a_file_that_could_not_be_written_leaves_nothing_beside(tmp_path):
    with pytest.raises(Exception, match="(?i)pickle"):
        files.save_atomically({"model": lambda: None}, tmp_path / "checkpoint.pt")
    assert not any(tmp_path.iterdir())


def test_lines_after_the_checkpoint_are_dropped_at_80_000_steps_an_epoch(tmp_path):
    """A line's epoch is rounded to four digits, eight steps here."""
    log = tmp_path / "log.jsonl"
    for step in range(1000, 1020):
        files.append_line(log, dict(step=step, epoch=round(step / 80_000, 4)))
    files.trim_log(log, 1004, 80_000)
    assert [line["step"] for line in files.read_lines(log)] == [*range(1000, 1005)]
    # 40,000 steps an epoch after a change of the batch size: these lines have another epoch
    files.trim_log(log, 501, 40_000)
    assert [line["step"] for line in files.read_lines(log)] == [*range(1000, 1004)]


def test_weights_that_are_damaged_get_one_line_that_says_what(tmp_path):
    encoder = build_encoder("resnet18")
    state = encoder.backbone.state_dict()
    torch.save(state, tmp_path / "flipped.pt")
    flip_a_byte(tmp_path / "flipped.pt")
    assert len(torch.load(tmp_path / "flipped.pt")) == len(state)            # torch reads it
    for name, key, value, words in (
        ("nan.pt", "layer2.0.conv1.weight", torch.full((128, 64, 3, 3), math.nan),
         "layer2.0.conv1.weight holds NaN or infinity"),
        ("inf.pt", "bn1.running_var", torch.full((64,), math.inf),
         "bn1.running_var holds NaN or infinity"),
        ("sparse.pt", "fc.bias", torch.eye(3).to_sparse(),
         "fc.bias is no plain tensor"),
        ("meta.pt", "bn1.bias", torch.zeros(64, device="meta"),
         "bn1.bias is no plain tensor"),
        ("keys.pt", 7, torch.zeros(1),
         "holds a tensor under 7; expected a state dict with names as keys"),
        ("float8.pt", "bn1.weight", torch.ones(64).to(torch.float8_e4m3fn),
         "bn1.weight is torch.float8_e4m3fn"),
        ("int.pt", "conv1.weight", torch.ones(64, 3, 7, 7, dtype=torch.int8),
         "conv1.weight is torch.int8, expected"),
        ("bool.pt", "bn1.running_var", torch.ones(64) > 0,
         "bn1.running_var is torch.bool, expected real numbers"),
        ("huge.pt", "bn1.bias", torch.full((64,), 1e300, dtype=torch.float64),
         "bn1.bias holds NaN or infinity"),
        ("name.pt", "a\n\x1b[2Jb", torch.full((1,), math.nan),
         "name.pt: a\\x0a\\x1b[2Jb holds NaN"),
        ("flipped.pt", None, None, " is damaged"),           # load_checked says which part of it
    ):
        if key is not None:
            torch.save({**state, key: value}, tmp_path / name)
        with pytest.raises(ValueError) as error:
            weights.load_backbone(encoder, tmp_path / name)
        assert words in str(error.value) and "\n" not in str(error.value), name
    net = model.Classifier("resnet18", encoder, 3)
    head = {"fc.weight": torch.ones(3, 512).int(), "fc.bias": torch.ones(3)}
    torch.save({**state, **head}, tmp_path / "head.pt")
    message = "head.pt: fc.weight is torch.int32, expected real numbers"
    with pytest.raises(ValueError, match=message):
        weights.load_head(net, tmp_path / "head.pt")


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_what_the_reader_of_files_refuses_is_passed_on_in_one_line(kind, tmp_path, monkeypatch):
    encoder, path = build_encoder("resnet18"), tmp_path / "pipe.pt"
    with pytest.raises(ValueError) as error:
        weights.load_backbone(encoder, tmp_path)
    assert str(error.value) == f"{tmp_path}: is not a regular file"

    def refuse(given):
        raise kind(f"{given}: not a regular file")

    monkeypatch.setattr(weights, "load_checked", refuse)
    with pytest.raises(ValueError) as error:
        weights.load_backbone(encoder, path)
    assert str(error.value) == f"{path}: not a regular file"


@pytest.mark.parametrize("state, words", [
    ({"blocks.0.qkv.weight": torch.ones(2)},
     "The file has blocks.0.qkv.weight, this backbone conv1.weight"),
    ({"a\x1b[2J\n.b": torch.ones(2)},
     "The file has a\\x1b[2J\\x0a.b, this backbone conv1.weight"),
    ({"net.conv1.weight": torch.ones(8, 3, 7, 7)},
     "conv1.weight is (8, 3, 7, 7) in the file, (64, 3, 7, 7) here"),
    ({"nets": {"conv1.weight": torch.ones(2)}, "epoch": 3, "a\nb": 1, "c": 2, "d": 3},
     "holds no weights; expected a state dict of tensors, found the keys "
     "nets, epoch, a\\x0ab, c, ..."),
    ([torch.ones(2)],
     "holds no weights; expected a state dict of tensors, found list"),
    ({},
     "found the keys (none)"),
])
def test_weights_that_do_not_fit_are_refused_with_a_name_of_the_file_and_a_name_of_the_net(
    state, words, tmp_path
):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError) as error:
        weights.load_backbone(build_encoder("resnet18"), tmp_path / "w.pt")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("[1, 2]", "cannot be read as the settings of a run"),
    ("{", "cannot be read as the settings of a run"),
    ("7", "cannot be read as the settings of a run"),
    ('{"image_size": "224"}', "image_size is '224', which --image-size would refuse"),
    ('{"image_size": [224, 192, 160]}',
     "image_size is [224, 192, 160], which --image-size would refuse"),
    ('{"image_size": [224, "192"]}', "image_size is [224, '192']"),
    ('{"image_size": []}', "image_size is []"),
    ('{"image_size": -5}', "image_size is -5"),
    ('{"image_size": 1e400}', "image_size is inf"),
    ('{"image_size": true}', "image_size is True"),
    ('{"arch": 3}', "arch is 3, which --arch would refuse"),
    ('{"arch": "resnet51"}', "arch is 'resnet51'"),
    ('{"window": {}}', "window is {}"),
])
def test_a_spoiled_args_json_beside_the_weights_gets_one_line(text, words, backbone, capsys):
    (backbone.parent / "args.json").write_text(text)
    code, said = complaint(capsys, "--data", "shapes", "--weights", backbone, main=finetune.main)
    assert code == 2 and words in said, said
    assert f"{backbone.parent}/args.json" in said and said.count("\n") == 1, said


@pytest.mark.parametrize("make", ["fifo", "zero"])
def test_weights_that_are_no_regular_file_are_refused_and_not_waited_for(
    make, few_images, capsys, tmp_path
):
    path = Path("/dev/zero")
    if make == "fifo":
        path = tmp_path / "pipe.pt"
        os.mkfifo(path)
    flags = [*TINY, "--epochs", "1", "--weights", path, "--out", tmp_path / "run"]
    code, said = complaint(capsys, *flags)
    assert code == 2 and str(path) in said and said.count("\n") == 1


# ---- images of every kind ----

@pytest.mark.parametrize("name, mode, colour", [
    ("a.jpg", "RGB", (200, 40, 90)),
    ("a.png", "RGB", (200, 40, 90)),
    ("a.webp", "RGB", (200, 40, 90)),
    ("a.bmp", "RGB", (200, 40, 90)),
    ("gray.png", "L", (93, 93, 93)),                         # 0.299 R + 0.587 G + 0.114 B = 93.5
    ("gray.jpg", "L", (93, 93, 93)),
    ("palette.png", "P", (200, 40, 90)),
    ("cmyk.jpg", "CMYK", (200, 40, 90)),
    ("alpha.png", "RGBA", (200, 40, 90)),
    ("alpha.webp", "RGBA", (200, 40, 90)),
    ("palette.bmp", "P", (200, 40, 90)),
    ("gray_alpha.png", "LA", (93, 93, 93)),
    ("one_bit.png", "1", None),
])
def test_every_kind_of_image_becomes_rgb(name, mode, colour, tmp_path):
    image = data.read_image(paint(tmp_path / name, mode))
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    if colour:
        close(image.float().mean((1, 2)), torch.tensor(colour).float(), atol=3.0, rtol=0)


UPRIGHT = {        # EXIF orientation -> the stored pixels as the standard wants them shown
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),                            # clockwise
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("name, options", [
    ("a.jpg", {"quality": 100, "subsampling": 0}),
    ("a.png", {}),
    ("a.webp", {"lossless": True}),
])
def test_a_photograph_taken_sideways_is_read_upright(name, options, tmp_path):
    rows, columns = np.mgrid[:30, :40]
    pixels = np.stack([5 * rows, 5 * columns, 2 * (rows + columns)], 2).astype(np.uint8)
    for orientation, seen in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **options)
        image = data.read_image(str(tmp_path / name)).permute(1, 2, 0).numpy()
        assert image.shape == seen(pixels).shape
        apart = np.abs(image.astype(int) - seen(pixels).astype(int)).max()
        assert apart <= (4 if name == "a.jpg" else 0), orientation


def photograph(path, mode="RGB", turn=1, size=(1600, 1200)):
    """Writes a JPEG of soft shades, waves of 63 pixels and noise; returns its path.

    turn is the EXIF orientation, as a camera that was turned would write it.
    """
    x, y = np.meshgrid(*map(np.arange, size))
    shade = [110 + 60 * np.sin(x / 300 + c) * np.cos(y / (200 + 40 * c)) for c in range(3)]
    pixels = np.stack(shade, -1) + 25 * (np.sin(x / 10) * np.sin(y / 10))[..., None]
    pixels += np.random.default_rng(0).uniform(-30, 30, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.convert(mode).save(path, quality=90, exif=exif)
    return str(path)


@pytest.mark.parametrize("mode, turn", [("RGB", 1), ("L", 1), ("CMYK", 1), ("RGB", 6)])
def test_a_large_jpeg_is_decoded_in_part_and_gives_the_same_crop(mode, turn, tmp_path):
    """The mean difference is less than 0.3 of 255 levels, the largest at most 2."""
    path = tmp_path / "a.jpg"
    photograph(path, mode, turn)
    whole, fast = (
        data.open_images(str(tmp_path), "train", (64, 64), crop_min=crop_min).read(0)
        for crop_min in (None, 0.5)
    )
    assert whole.shape == ((3, 1600, 1200) if turn == 6 else (3, 1200, 1600))
    # decoded at 1/4, the shorter side has 300 pixels; at 1/8 it would have only 150
    assert [4 * n for n in fast.shape[1:]] == list(whole.shape[1:])

    centre, crop = data.eval_transform((64, 64)), data.CropAndFlip((64, 64), 0.5)
    pairs = [[centre(whole), centre(fast)]]
    for seed in range(6):                                    # random crops, the same of both
        torch.manual_seed(seed)
        box = crop.make_params([fast])
        pair = []
        for image, scale in ((whole, 4), (fast, 1)):
            scaled = {name: scale * n for name, n in box.items()}
            crop.make_params = lambda _, scaled=scaled: scaled
            torch.manual_seed(seed)
            pair.append(crop(image))
        pairs.append(pair)
        del crop.make_params
    for a, b in pairs:
        difference = (a.float() - b.float()).abs()
        assert difference.mean() < 0.3 and difference.max() <= 2

    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])            # a truncated file
    for least in (None, 200):
        with pytest.raises((OSError, RuntimeError)):
            data.read_image(str(path), least)


def test_the_smallest_crop_of_a_photograph_decoded_in_part_has_twice_the_pixels(tmp_path):
    """What is not a JPEG, or too small for that, is decoded whole and bit by bit the same."""
    path = tmp_path / "a.jpg"
    for size, crop_min in product(((1200, 1600), (1999, 1501), (3000, 800)), (0.08, 0.5, 0.8, 1.0)):
        if crop_min == 0.08:
            photograph(path, size=size)
        source = data.open_images(str(tmp_path), "train", (64, 64), crop_min=crop_min)
        image, crop = source.read(0), data.CropAndFlip((64, 64), crop_min)
        boxes = [crop.make_params([image]) for _ in range(200)]
        sides = [min(box["height"], box["width"]) for box in boxes]
        assert min(sides) >= 127, (size, crop_min)           # 128, and rounding
        shorter = min(image.shape[1:])
        assert shorter >= 2 * round(64 / 0.875)              # for the centre crop
        assert shorter < 4 * 64 / math.sqrt(0.75 * crop_min) + 2 or shorter == min(size)
    small = photograph(tmp_path / "b.jpg", size=(300, 200))
    large = str(tmp_path / "c.png")
    Image.open(photograph(path)).save(large)
    for path, least in ((small, 101), (large, 50)):
        assert torch.equal(data.read_image(path), data.read_image(path, least))


def test_a_folder_of_results_inside_the_images_is_refused(tmp_path, capsys):
    labelled_folder(tmp_path, {"set": (5, 5)})
    for main, flags in ((pretrain.main, []), (finetune.main, ["--init", "scratch"])):
        code, said = complaint(capsys, *flags, "--data", tmp_path / "set", "--arch", "resnet18",
                               "--image-size", 64, "--out", tmp_path / "set" / "run", main=main)
        assert code == 2 and "set/run: lies inside the folder of the images" in said
    assert not (tmp_path / "set" / "run").exists()


def test_images_that_could_not_be_read_before_a_checkpoint_are_named_after_it(tmp_path, capsys):
    paint(tmp_path / "good.png")
    (tmp_path / "bad.png").touch()
    before = images.UnreadableImages(data.Folder(tmp_path, "all"), 0.5, tmp_path)
    before.note(torch.tensor([0, -1]))                       # then a checkpoint, before a log line
    before.exchange(command.Distributed())
    again = images.UnreadableImages(data.Folder(tmp_path, "all"), 0.5, tmp_path)
    again.load_state_dict(before.state_dict())
    again.tell(command.Distributed())
    assert "bad.png" in capsys.readouterr().err and again.seen == {0} and not again.untold
    assert (tmp_path / "broken.txt").read_text() == f"{tmp_path}/bad.png\n"


@pytest.mark.parametrize("line", [
    '{"step": 3, "epoch": 0.75, "loss": "x"}', '{"step": 3, "epoch": 0.75, "loss": [1]}',
    '{"step": 3, "epoch": 0.75, "loss": NaN}', '{"step": 3, "epoch": 0.75, "held_out": "x"}',
    '{"step": 1' + 400 * "0" + ', "epoch": 1}', 100_000 * "["])
def test_lines_of_the_log_that_are_no_numbers_are_left_out(line, tmp_path):
    good = '{"step": 1, "epoch": 0.25, "loss": 0.5}'
    (tmp_path / "log.jsonl").write_text(f"{good}\n{line}\n")
    assert files.read_lines(tmp_path / "log.jsonl") == [json.loads(good)]


def test_the_list_of_unreadable_images_is_dropped_if_images_were_removed(tmp_path):
    """It holds numbers of images, which mean other files then."""
    names = [paint(tmp_path / f"{i}.png") for i in range(4)]
    before = images.UnreadableImages(data.Folder(tmp_path, "all"), 1.0, tmp_path)
    before.note(torch.tensor([-1, 2]))
    again = images.UnreadableImages(data.Folder(tmp_path, "all"), 1.0, tmp_path)
    again.load_state_dict(before.state_dict())
    assert again.untold == {2} and again.seen == set()
    os.remove(names[2])
    after = images.UnreadableImages(data.Folder(tmp_path, "all"), 1.0, tmp_path)
    after.load_state_dict(before.state_dict())
    assert after.untold == after.seen == set()


def png_of_16_bits(path, pixels):
    """Writes a 16-bit PNG, uint16 (H, W) as gray or (H, W, 3) as colour, which Pillow cannot."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")

    height, width = pixels.shape[:2]
    colour_type = 2 if pixels.ndim == 3 else 0
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = size + bytes([16, colour_type, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_images_of_more_than_8_bits_are_refused_and_never_read_as_black_or_white(tmp_path, capsys):
    # 1456 to 2928, as of a 12-bit microscope
    gray = np.linspace(1456, 2928, 64 * 64).reshape(64, 64)
    folder = tmp_path / "images"
    folder.mkdir()
    paint(folder / "a.png", size=(64, 64))
    png_of_16_bits(folder / "gray.png", gray.astype(np.uint16))
    png_of_16_bits(folder / "rgb.png", np.stack([gray] * 3, 2).astype(np.uint16))
    for name, pixels in (                                    # TIFF files under the name of JPEG
        ("float", (gray / 4096).astype(np.float32)),
        ("short", gray.astype(np.uint16)),
        ("long", gray.astype(np.int32)),
    ):
        Image.fromarray(pixels).save(folder / f"{name}.jpg", format="TIFF")
    source = data.Folder(folder, "train")
    samples = data.ImageDataset(source, nn.Identity(), seed=0)
    broken = images.UnreadableImages(source, 1.0, tmp_path)
    for i in range(len(source)):
        image, used, bad = samples[0, i]
        broken.note(torch.tensor([bad]))
        assert Path(source.name(used)).name == "a.png"
        assert image.float().mean((1, 2)).tolist() == [200, 40, 90]
    broken.tell(command.Distributed())
    listed = [Path(line).name for line in (tmp_path / "broken.txt").read_text().splitlines()]
    assert listed == ["float.jpg", "gray.png", "long.jpg", "rgb.png", "short.jpg"]
    said = capsys.readouterr().err
    assert ("gray.png (more than 8 bits per channel, the value of white is unknown; "
            "convert it to 8 bits)") in said
    assert said.endswith(" and 2 more\n")


def test_image_files_of_other_kinds_are_counted_and_named_once(tmp_path, capsys):
    for name in ("a.jpg", "cat/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paint(tmp_path / name)
    for name in ("1.tif", "cat/2.TIF", "cat/3.tif", "4.heic", ".5.tif", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for split in ("train", "all"):
        assert len(data.Folder(tmp_path, split)) == 2
    line = f"{tmp_path}: 1 .heic, 3 .tif files are not read; convert them to JPEG or PNG\n"
    assert capsys.readouterr().err == line


# ---- images that cannot be read ----

def test_a_folder_that_may_not_be_read_is_named_and_its_images_are_left_out(
    tmp_path, monkeypatch, capsys
):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paint(tmp_path / name / "0.png")
    scan = os.scandir

    def refuse(folder):
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)
    monkeypatch.setattr(os, "scandir", refuse)
    assert data.list_images(tmp_path) == ["b/0.png"]
    said = capsys.readouterr().err
    assert said == f"{tmp_path}/a: cannot be read (Permission denied); its images are left out\n"


def test_an_image_so_slim_that_a_crop_would_enlarge_it_enormously_is_refused(tmp_path):
    Image.new("RGB", (2, 202)).save(tmp_path / "slim.png")
    Image.new("RGB", (2, 200)).save(tmp_path / "thin.png")
    source = data.Folder(tmp_path, "train")
    with pytest.raises(OSError, match="^2 x 202 pixels are too slim$"):
        source.read(0)
    assert source.read(1).shape == (3, 200, 2)


def test_whatever_is_wrong_with_an_image_is_an_oserror_of_one_line(tmp_path):
    said = {}
    for name in spoil(tmp_path):
        with pytest.raises(OSError) as error:
            data.read_image(str(tmp_path / name))
        said[name] = images.reason(error.value)
        assert said[name] and "\n" not in said[name]
    assert said["gone.png"] == "No such file or directory"
    assert said["pipe.jpg"] == "not a regular file"
    assert said["text.jpeg"] == said["empty.png"] == "not an image, or of an unknown kind"
    assert "truncated" in said["cut.jpg"].lower()
    assert "exceeds limit" in said["bomb.png"]               # Pillow's, from 179 million pixels on
    header = bytearray((tmp_path / "bomb.png").read_bytes())
    header[16:24] = (11_586).to_bytes(4, "big") * 2          # 134,235,396 > 2**27: ours
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "large.png").write_bytes(header)
    with pytest.raises(OSError, match="11586 x 11586 pixels, at most 134217728 are read"):
        data.read_image(str(tmp_path / "large.png"))


DAMAGE = """
import io, sys
import numpy as np
from PIL import Image
import data
from engine import command, images
from pathlib import Path

random, folder = np.random.default_rng(0), Path(sys.argv[1])
x = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3) + random.uniform(-20, 20, (48, 64, 3))
picture = Image.fromarray(x.clip(0, 255).astype(np.uint8))
kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "palette.png": "PNG",
         "gif.jpg": "GIF", "tif.png": "TIFF", "cmyk.jpg": "JPEG"}
for kind, format in kinds.items():
    whole = io.BytesIO()
    mode = {"palette.png": "P", "gif.jpg": "P", "cmyk.jpg": "CMYK"}.get(kind, "RGB")
    picture.convert(mode).save(whole, format)
    for i in range(60):
        content = bytearray(whole.getvalue())
        if i == 0:
            content[len(content) // 2] ^= 0x10
        elif i == 1:
            content = content[:len(content) // 2]
        else:                                                # every second one in the header
            last = min(len(content), 100) if i % 2 else len(content)
            for place in random.integers(last, size=1 + i % 3):
                content[place] ^= 1 << random.integers(8)
        (folder / f"{i}.{kind}").write_bytes(content)
picture.save(folder / "whole.png")
source, world = data.Folder(folder, "train"), command.Distributed()
samples = data.ImageDataset(source, data.eval_transform((32, 32)), 0)
loader = data.make_loader(samples, data.every_image_once(len(source), 16, world), 0, world)
broken = set()
for batch, used, bad in loader:
    assert batch.shape[1:] == (3, 32, 32)
    broken |= set(bad[bad >= 0].tolist())
names = [Path(source.name(i)).name for i in sorted(broken)]
for kind in kinds:
    print(kind, sum(name.split(".", 1)[1] == kind for name in names))
print("all", len(source))
"""


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_of_any_kind_is_read_or_counted_and_never_crashes(tmp_path):
    call = [sys.executable, "-c", DAMAGE, str(tmp_path)]
    done = subprocess.run(call, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr                 # -11: a segmentation fault
    count = {kind: int(number) for kind, number in map(str.split, done.stdout.splitlines())}
    assert count["all"] == 8 * 60 + 1
    # a PNG has checksums, so nearly all damage is found; other kinds cannot notice wrong pixels
    assert count["png"] >= 50
    assert 0 < count["bmp"] < 60 and 0 < count["jpg"] < 60


def test_images_that_cannot_be_read_are_replaced_by_the_next_and_counted(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(18):
        paint(folder / f"{i:02}.png", colour=(10 * i, 90, 200 - 10 * i), size=(64, 64))
    bad = spoil(folder)
    (folder / "loop").symlink_to(folder)
    source = data.open_images(str(folder), "train", (64, 64))
    samples = data.ImageDataset(source, data.eval_transform((64, 64)), seed=0)
    assert len(samples) == 25
    names = [Path(source.name(i)).name for i in range(25)]
    for i in range(25):
        _, used, broken = samples[0, i]
        assert (broken == i) == (names[i] in bad)
        following = [j % 25 for j in range(i, i + 25)]
        assert used == next(j for j in following if names[j] not in bad)

    flags = [*TINY, "--data", str(folder), "--epochs", "1", "--workers", "2"]
    log, _ = run(tmp_path / "run", "--max-bad", "0.5", base=flags)
    lines = (tmp_path / "run" / "broken.txt").read_text().splitlines()
    listed = {Path(line).name for line in lines}
    # three steps of 8 leave one image of the 25 out
    assert listed <= bad and log[-1]["broken"] == len(listed) >= 5
    warning = "cannot be read, the next image is taken instead"
    assert capsys.readouterr().err.count(warning) in (1, 2)  # until three are known
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("not an image, and not a name in UTF-8")
    run(tmp_path / "latin", "--max-bad", "0.5", "--batch-size", "26", base=flags)
    assert "caf\\xe9.png" in (tmp_path / "latin" / "broken.txt").read_text()
    (folder / os.fsdecode(b"caf\xe9.png")).unlink()
    code, said = complaint(capsys, *flags, "--out", tmp_path / "strict")
    assert code == 1 and "of 25 images cannot be read, listed in" in said
    assert "--max-bad (now 0.01)" in said


def test_images_that_vanish_during_a_run_fail_the_run_and_are_no_mistake_of_the_user(tmp_path):
    for name in ("a.png", "b.png"):
        paint(tmp_path / name)
    samples = data.ImageDataset(data.Folder(tmp_path, "train"), nn.Identity(), 0)
    assert samples[0, 1][1:] == (1, -1)
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    line = (f"2 images in a row cannot be read, the first is {tmp_path}/b.png "
            "(No such file or directory)")
    with pytest.raises(command.Failed) as error:
        samples[0, 1]
    assert str(error.value) == line
    sent = pickle.loads(pickle.dumps(ExceptionWrapper((command.Failed, error.value, error.tb))))
    with pytest.raises(command.Failed) as error:             # as torch raises what a worker raised
        sent.reraise()
    assert str(error.value).splitlines()[-1].endswith(line)


def test_a_run_whose_images_are_gone_ends_with_exit_code_1(tmp_path, capsys, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(16):
        paint(tmp_path / "images" / f"{i:02}.png", size=(64, 64))
    read, calls = data.Folder.read, []

    def fails(self, index):
        calls.append(index)
        if len(calls) > 20:
            raise OSError(5, "Input/output error")
        return read(self, index)

    monkeypatch.setattr(data.Folder, "read", fails)
    flags = [*TINY, "--data", tmp_path / "images", "--epochs", "9", "--max-bad", "1"]
    code, said = complaint(capsys, *flags, "--out", tmp_path / "run")
    assert code == 1 and "16 images in a row cannot be read, the first is" in said
    assert "Traceback" not in said
    reason = ".png (Input/output error) (stopped after step 1; go on with --out"
    assert reason in said.splitlines()[-1]


def test_validation_leaves_out_what_cannot_be_read(tmp_path):
    labelled_folder(tmp_path / "set", {"train": (8, 8), "val": (5, 4)})
    assert len(spoil(tmp_path / "set" / "val" / "c0")) == 6  # and it adds one good image
    flags = ["--data", tmp_path / "set", "--init", "scratch", "--arch", "resnet18"]
    assert tune(tmp_path / "tuned", *flags)["images"] == 5 + 4 + 1


def test_a_class_without_a_validation_image_has_no_accuracy(capsys, tmp_path):
    labelled_folder(tmp_path / "set", {"train": (4, 4, 4), "val": (4, 1, 4)})
    (tmp_path / "set" / "val" / "c1" / "0.png").write_text("not an image")
    result = tune(tmp_path / "run", "--data", tmp_path / "set", "--init", "scratch", *QUICK)
    assert result["per_class"]["c1"] is None and result["images"] == 8
    mean = (result["per_class"]["c0"] + result["per_class"]["c2"]) / 2
    assert mean == pytest.approx(result["top1"])
    assert re.search(r"^per class: c0 \d+, c1 -, c2 \d+$", capsys.readouterr().err, re.M)


# ---- folders and names ----

def test_folders_of_every_layout(tmp_path):
    layouts = {
        "imagenet": ["train/cat/1.jpg", "train/dog/2.JPEG", "val/cat/3.jpg"],
        "classes": ["cat/1.jpg", "dog/deep/er/2.png"],
        "flat": ["1.jpg", "2.bmp", "notes.txt", ".hidden.jpg"],
    }
    for layout, names in layouts.items():
        for file in names:
            path = tmp_path / layout / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("") if path.suffix == ".txt" else paint(path)
    imagenet = data.Folder(tmp_path / "imagenet", "train")
    assert len(imagenet) == 2
    assert imagenet.classes == ["cat", "dog"] and imagenet.labels.tolist() == [0, 1]
    assert len(data.Folder(tmp_path / "imagenet", "val")) == 1
    classes = data.Folder(tmp_path / "classes", "train")
    assert len(classes) == 2 and classes.classes == ["cat", "dog"]
    assert classes.read(1).shape == (3, 30, 40)
    assert len(data.Folder(tmp_path / "flat", "train")) == 2
    os.symlink(tmp_path / "flat", tmp_path / "flat" / "loop")
    assert len(data.Folder(tmp_path / "flat", "train")) == 2     # a loop of links is entered once
    for file in ("TRAIN/cat/1.jpg", "TRAIN/dog/2.jpg", "Val/cat/3.jpg", "Val/dog/4.jpg"):
        (tmp_path / "loud" / file).parent.mkdir(parents=True)
        paint(tmp_path / "loud" / file)
    for split in ("train", "val"):                           # splits, not classes, in any capitals
        loud = data.open_images(str(tmp_path / "loud"), split, (32, 32), labelled=True)
        assert loud.classes == ["cat", "dog"] and len(loud) == 2


def test_torchvision_datasets_open_by_name(tmp_path):
    """CIFAR-10 in its own file format, written here: five batches of one image each, and a test
    batch."""
    import hashlib
    from torchvision.datasets import CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(3072, dtype=np.uint8)[None]
    batch = {"data": pixels, "labels": [3]}
    contents = {f"data_batch_{i}": batch for i in range(1, 6)}
    contents["test_batch"] = batch
    contents["batches.meta"] = {"label_names": [str(i) for i in range(10)]}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    # only the checksums of the real files are replaced
    with pytest.MonkeyPatch.context() as patch:
        train_list = [[name, sums[name]] for name in sums if name.startswith("data")]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
        patch.setattr(CIFAR10, "train_list", train_list)
        patch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        patch.setattr(CIFAR10, "meta", meta)
        train, val = (
            data.open_images("cifar10", split, (32, 32), tmp_path) for split in ("train", "val")
        )
        assert len(train) == 5 and len(val) == 1
    assert torch.equal(train.read(2), torch.from_numpy(pixels).view(3, 32, 32))


def test_folders_that_cannot_be_used_get_one_line(few_images, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    _, said = complaint(capsys, "--data", tmp_path / "empty", "--out", tmp_path / "o")
    assert "no images below it; expected files ending in .jpg" in said
    run(tmp_path / "run", "--epochs", "1")
    code, said = complaint(capsys, *TINY, "--out", tmp_path / "run")
    assert code == 2 and "already holds a run; add --resume to continue it" in said
    resume = [*TINY, "--out", tmp_path / "run", "--resume"]
    code, said = complaint(capsys, *resume, "--arch", "deit_small")
    assert code == 2 and "checkpoint.pt: of another model (deit_tiny at 64 px)" in said
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    code, said = complaint(capsys, *resume)
    assert code == 2 and "checkpoint.pt: cannot be read" in said


def test_a_refused_folder_below_one_that_is_not_there_leaves_nothing(
    few_images, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pretrain.main([*TINY, "--epochs", "0.25", "--out", "nowhere/../run"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_character_of_unicode_steers_the_terminal_or_breaks_a_line():
    everything = files.printable("".join(map(chr, range(0x110000))), None)
    for character in set(everything):
        assert unicodedata.category(character) not in ("Cc", "Zl", "Zp", "Cs"), hex(ord(character))
        # the explicit marks: embedding, override, isolate
        turns = unicodedata.bidirectional(character)
        assert not re.fullmatch("LRE|RLE|LRO|RLO|PDF|LRI|RLI|FSI|PDI", turns), hex(ord(character))
    for text in ("plain.jpg", "Straße 日本 😀.png", "a b\\x41.png"):
        assert files.printable(text) == text
    assert files.printable("a\tb\0\x9b\u202ec\n") == "a\\x09b\\x00\\x9b\\u202ec\\x0a"
    assert files.printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    long = files.printable("/data/" + "x" * 5000 + "/0001.jpg")
    assert len(long) == 200
    assert long.startswith("/data/xxx") and "..." in long and long.endswith("xxx/0001.jpg")
    assert files.printable(long) == long


def test_names_of_files_and_classes_are_harmless_lines_wherever_they_are_printed_or_written(
    tmp_path, capsys
):
    evil = "\x1b[2J\ntop-1 100.00 %\u202e"
    safe = "\\x1b[2J\\x0atop-1 100.00 %\\u202e"
    root = tmp_path / f"set{evil}"
    for name in (f"cat{evil}/a.png", "dog/b.png"):
        (root / name).parent.mkdir(parents=True)
        paint(root / name)
    (root / f"cat{evil}" / f"bad{evil}.png").write_text("")
    (root / f"{evil}.tif").write_text("")
    source = data.open_images(str(root), "train", (32, 32), labelled=True)
    assert source.classes == [f"cat{safe}", "dog"]
    with pytest.raises(ValueError) as error:
        data.some_labels(source, "9/class", 0)
    broken = images.UnreadableImages(source, 1.0, tmp_path)
    broken.note(torch.tensor([1]))
    broken.tell(command.Distributed())
    listed = (tmp_path / "broken.txt").read_text()
    assert listed == f"{tmp_path}/set{safe}/cat{safe}/bad{safe}.png\n"
    (root / f"empty{evil}").mkdir()
    said = [capsys.readouterr().err, str(error.value) + "\n"]
    for call in (
        lambda: data.open_images(str(root), "train", (32, 32), labelled=True),
        lambda: data.Folder(root / f"empty{evil}", "train"),
        lambda: data.Folder(root / f"no{evil}", "train"),
        lambda: weights.load_backbone(build_encoder("resnet18"), root / f"no{evil}.pt"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value) + "\n")
    # the first text has a line about TIFF files and a line about a bad image
    assert [text.count("\n") for text in said] == [2, 1, 1, 1, 1, 1]
    for text in said:
        assert safe in text and "\x1b" not in text and "\u202e" not in text
