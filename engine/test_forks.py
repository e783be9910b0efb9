"""Forks: each row of "Change it" in the README, as a run that learns, is saved and is resumed."""

import copy
import math

import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as tvf

import data
import masking
import model
import pretrain
from engine.testing import checkerboard, read_log
from model import A2MIM

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
close = torch.testing.assert_close


FORK = ("--recipe imagenet --data shapes --arch resnet18 --stem imagenet --image-size 32 --mask-size 8 "
        "--token-stage 2 --batch-size 8 --workers 0 --amp off")


def fork(out, *flags):
    """The run of a fork: an epoch of four steps, in which it learns. Returns its checkpoint."""
    pretrain.main([*FORK.split(), *"--epochs 1 --log-every 1 --lr 0.05".split(), "--out", str(out), *flags])
    log = [line for line in read_log(out) if "loss" in line]
    assert len(log) == 4 and log[-1]["loss"] < log[0]["loss"]
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_fork_masks_in_one_block(few_images, tmp_path, monkeypatch):
    """The cells nearest to a random centre, instead of cells anywhere: one function of pretrain.py."""
    def block_mask(batch, grid, ratio, device, generator):
        cells = torch.cartesian_prod(*map(torch.arange, grid)).float().to(device)  # (cells, 2)
        centres = torch.rand(batch, 2, device=device, generator=generator) * torch.tensor(grid, device=device)
        hidden = torch.cdist(centres, cells, p=math.inf).argsort(1)[:, : masking.hidden_count(len(cells), ratio)]
        none = torch.zeros(batch, len(cells), dtype=torch.bool, device=device)
        return none.scatter_(1, hidden, True).view(batch, *grid)

    monkeypatch.setattr(pretrain, "random_mask", block_mask)
    fork(tmp_path / "run")
    masks = pretrain.draw_masks(200, (8, 8), 0.5, torch.device("cpu"), 0)
    assert masks.sum((1, 2)).unique().tolist() == [32]
    touching = (masks[:, 1:] == masks[:, :-1]).float().mean()
    assert touching > 0.8  # a block: most neighbours are alike (at random, half are)


def test_fork_fill_with_a_blur_of_the_visible_pixels(few_images, tmp_path, monkeypatch):
    def blurred(images, mask, fill="blur"):
        hidden = masking.resize_mask(mask, images.shape[-2:])
        blur = lambda x: tvf.gaussian_blur(x, [31, 31], [6.0, 6.0])
        seen = (~hidden).float().expand_as(images)
        return torch.where(hidden, blur(images * seen) / blur(seen).clamp(min=1e-3), images)

    monkeypatch.setattr(model, "fill_hidden", blurred)
    fork(tmp_path / "run")
    images, mask = torch.full((1, 3, 32, 32), 7.0), checkerboard(1, 4, 4)
    close(blurred(images, mask), images)                     # the blur of one colour is that colour


def test_fork_decoder_of_two_layers(few_images, tmp_path, monkeypatch):
    build = model.build_decoder
    monkeypatch.setattr(model, "build_decoder", lambda width, channels, stride: nn.Sequential(
        nn.Conv2d(width, width, 1), nn.GELU(), *build(width, channels, stride)))
    assert fork(tmp_path / "run")["model"]["decoder.0.weight"].shape == (512, 512, 1, 1)


def test_fork_images_of_four_channels(few_images, tmp_path, monkeypatch):
    """A fourth channel, as of satellites: the reader, its mean and std, and the first convolution; the rest follows."""
    read, build = data.Shapes.read, pretrain.build_encoder
    monkeypatch.setattr(data, "MEAN", (*data.MEAN, 0.5))
    monkeypatch.setattr(data, "STD", (*data.STD, 0.25))
    monkeypatch.setattr(data.Shapes, "read", lambda self, i: torch.cat([read(self, i), 255 - read(self, i)[:1]]))
    monkeypatch.setattr(pretrain, "build_encoder", lambda *given: build(*given, channels=4))
    data.mean_and_std.cache_clear()
    try:
        state = fork(tmp_path / "run")["model"]
    finally:  # the tests after this one have three again
        data.mean_and_std.cache_clear()
    assert state["encoder.backbone.conv1.weight"].shape[1] == 4 and state["decoder.0.weight"].shape[0] == 4 * 32**2


def test_fork_reconstructs_gradient_orientations(few_images, tmp_path, monkeypatch, capsys):
    """A HOG-like target, 9 orientations per pixel: what is reconstructed, and the decoder's channels."""
    def orientations(images, model=None):
        gray = images.mean(1, keepdim=True)
        dx, dy = gray - gray.roll(1, -1), gray - gray.roll(1, -2)
        bins = (torch.atan2(dy, dx) % math.pi / math.pi * 9).long().clamp(max=8)  # (B, 1, H, W)
        return torch.zeros_like(gray).repeat(1, 9, 1, 1).scatter_(1, bins, torch.hypot(dx, dy))

    build = model.build_decoder
    monkeypatch.setattr(pretrain, "make_target", orientations)
    monkeypatch.setattr(model, "build_decoder", lambda width, channels, stride: build(width, 9, stride))
    assert fork(tmp_path / "run")["model"]["decoder.0.weight"].shape[0] == 9 * 32**2
    # such a target is no picture: there are no sheets, and it is not compared with the mean colour and a blur
    assert not list((tmp_path / "run").glob("reconstruction-*.png"))
    assert "mean_colour" not in read_log(tmp_path / "run")[-1] and "a blur" not in capsys.readouterr().err
    slope = torch.arange(8.0).expand(1, 3, 8, 8)  # grows to the right: orientation 0, strength 1
    assert orientations(slope)[0, :, 2:, 2:].amax((1, 2)).tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_fork_reconstructs_the_features_of_an_ema_teacher(few_images, tmp_path, monkeypatch):
    """The teacher is a submodule, so that it is saved and resumed; it follows after every step."""
    init, step = A2MIM.__init__, pretrain.train_step

    def with_teacher(self, *given, **more):
        init(self, *given, **more)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def features(images, model):
        with torch.no_grad():
            return model.teacher(images).float()             # (B, 512, 4, 4)

    def step_and_follow(at, batches, args, world, state):
        record = step(at, batches, args, world, state)
        with torch.no_grad():
            for slow, fast in zip(state.model.teacher.parameters(), state.model.encoder.parameters()):
                slow.lerp_(fast, 0.1)
        return record

    monkeypatch.setattr(A2MIM, "__init__", with_teacher)
    monkeypatch.setattr(model, "build_decoder", lambda width, channels, stride: nn.Conv2d(width, width, 1))
    monkeypatch.setattr(pretrain, "make_target", features)
    monkeypatch.setattr(pretrain, "train_step", step_and_follow)
    state = fork(tmp_path / "run", "--stem", "small")["model"]
    slow, fast = (state[f"{name}.backbone.layer4.0.conv1.weight"] for name in ("teacher", "encoder"))
    assert not torch.equal(slow, fast)
    monkeypatch.setattr(pretrain, "train_step", lambda at, *rest: step_and_follow(at, *rest) if at < 2 else 1 / 0)
    with pytest.raises(SystemExit):
        fork(tmp_path / "cut", "--stem", "small", "--save-every", "1")
    monkeypatch.setattr(pretrain, "train_step", step_and_follow)
    pretrain.main(["--out", str(tmp_path / "cut"), "--resume"])
    again = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in state.items())


class RatioSchedule:
    """A mask ratio that grows by a twentieth a step: an object with a state of its own."""
    ratio = 0.3

    def state_dict(self):
        return {"ratio": self.ratio}

    def load_state_dict(self, state):
        self.ratio = state["ratio"]


def test_fork_mask_ratio_with_a_schedule_is_resumed_exactly(few_images, tmp_path, monkeypatch):
    """In the code: one more entry of `saved` in train, and schedule.ratio in train_step."""
    step, draw, real = pretrain.train_step, pretrain.draw_masks, pretrain.Checkpointer
    schedule, shares = RatioSchedule(), []

    def draw_by_schedule(count, grid, ratio, *rest):
        return draw(count, grid, schedule.ratio, *rest)

    def step_and_grow(at, *rest):
        record = step(at, *rest)
        shares.append(schedule.ratio)
        schedule.ratio += 0.05
        return record

    monkeypatch.setattr(pretrain, "draw_masks", draw_by_schedule)
    monkeypatch.setattr(pretrain, "train_step", step_and_grow)
    monkeypatch.setattr(pretrain, "Checkpointer", lambda args, world, plan, saved, *rest: real(
        args, world, plan, {**saved, "ratio": schedule}, *rest))
    flags = ["--val", "0", "--sheets", "0"]
    whole = fork(tmp_path / "whole", *flags)["model"]
    assert shares == pytest.approx([0.3, 0.35, 0.4, 0.45])
    schedule.ratio = 0.3
    monkeypatch.setattr(pretrain, "train_step", lambda at, *rest: step_and_grow(at, *rest) if at < 2 else 1 / 0)
    with pytest.raises(SystemExit):
        fork(tmp_path / "cut", *flags, "--save-every", "1")
    schedule.ratio = 0.9                                     # a new process would not know it
    monkeypatch.setattr(pretrain, "train_step", step_and_grow)
    pretrain.main(["--out", str(tmp_path / "cut"), "--resume"])
    again = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
