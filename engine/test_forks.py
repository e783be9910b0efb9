"""Forks: each row of docs/forks.md, as a run that learns, is saved and is resumed."""

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
from engine import checkpointer
from engine.testing import checkerboard, complaint, failing_at, read_log
from model import A2MIM

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
close = torch.testing.assert_close


FORK = ("--recipe imagenet --data shapes --arch resnet18 --stem imagenet --image-size 32 "
        "--mask-size 8 --token-stage 2 --batch-size 8 --workers 0 --amp off "
        "--epochs 1 --log-every 1 --lr 0.05")


def fork(out, *flags):
    """The run of a fork: an epoch of four steps, in which it learns. Returns its checkpoint."""
    pretrain.main([*FORK.split(), "--out", str(out), *flags])
    log = [line for line in read_log(out) if "loss" in line]
    assert len(log) == 4 and log[-1]["loss"] < log[0]["loss"]
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_fork_masks_in_one_block(few_images, tmp_path, monkeypatch):
    """The mask units nearest to a random centre are hidden: one function of pretrain.py."""
    def block_mask(batch, grid, ratio, device, generator):
        units = torch.cartesian_prod(*map(torch.arange, grid)).float().to(device)    # (units, 2)
        centres = torch.rand(batch, 2, device=device, generator=generator)
        centres = centres * torch.tensor(grid, device=device)
        nearest = torch.cdist(centres, units, p=math.inf).argsort(1)         # (B, units)
        hidden = nearest[:, :masking.hidden_count(len(units), ratio)]
        none = torch.zeros(batch, len(units), dtype=torch.bool, device=device)
        return none.scatter_(1, hidden, True).view(batch, *grid)

    monkeypatch.setattr(pretrain, "random_mask", block_mask)
    fork(tmp_path / "run")
    masks = pretrain.draw_masks(200, (8, 8), 0.5, torch.device("cpu"), 0)
    assert masks.sum((1, 2)).unique().tolist() == [32]
    # in a block most neighbours are alike, with random masks half of them
    alike = (masks[:, 1:] == masks[:, :-1]).float().mean()
    assert alike > 0.8


def test_fork_fill_with_a_blur_of_the_visible_pixels(few_images, tmp_path, monkeypatch):
    def blur(x):
        return tvf.gaussian_blur(x, [31, 31], [6.0, 6.0])

    used = []

    def blurred(images, mask, fill="blur"):
        used.append(len(images))
        hidden = masking.resize_mask(mask, images.shape[-2:])
        seen = (~hidden).float().expand_as(images)
        mean_of_visible = blur(images * seen) / blur(seen).clamp(min=1e-3)
        return torch.where(hidden, mean_of_visible, images)

    monkeypatch.setattr(model, "fill_hidden", blurred)
    fork(tmp_path / "run", "--val", "0", "--sheets", "0")
    assert used == [8] * 4                                   # the forward pass of each step
    images, mask = torch.full((1, 3, 32, 32), 7.0), checkerboard(1, 4, 4)
    close(blurred(images, mask), images)                     # the blur of one colour is that colour


def test_fork_decoder_of_two_layers(few_images, tmp_path, monkeypatch):
    build = model.build_decoder

    def two_layers(width, channels, stride):
        first = nn.Conv2d(width, width, 1)
        return nn.Sequential(first, nn.GELU(), *build(width, channels, stride))

    monkeypatch.setattr(model, "build_decoder", two_layers)
    state = fork(tmp_path / "run")["model"]
    assert state["decoder.0.weight"].shape == (512, 512, 1, 1)


def test_fork_images_of_four_channels(few_images, tmp_path, monkeypatch):
    """A fourth channel, as satellites have: the reader, its mean and std, the first convolution."""
    read, build = data.Shapes.read, pretrain.build_encoder

    def read_four(self, i):
        image = read(self, i)
        return torch.cat([image, 255 - image[:1]])

    def build_for_four(*given):
        return build(*given, channels=4)

    monkeypatch.setattr(data, "MEAN", (*data.MEAN, 0.5))
    monkeypatch.setattr(data, "STD", (*data.STD, 0.25))
    monkeypatch.setattr(data.Shapes, "read", read_four)
    monkeypatch.setattr(pretrain, "build_encoder", build_for_four)
    data.mean_and_std.cache_clear()
    try:
        state = fork(tmp_path / "run")["model"]
    finally:
        data.mean_and_std.cache_clear()                      # other tests have three channels
    assert state["encoder.backbone.conv1.weight"].shape[1] == 4
    assert state["decoder.0.weight"].shape[0] == 4 * 32**2


def test_fork_reconstructs_gradient_orientations(few_images, tmp_path, monkeypatch, capsys):
    """A target like HOG, 9 orientations per pixel: make_target, and the channels of the decoder."""
    def orientations(images, model=None):
        gray = images.mean(1, keepdim=True)
        dx, dy = gray - gray.roll(1, -1), gray - gray.roll(1, -2)
        angle = torch.atan2(dy, dx) % math.pi
        bins = (angle / math.pi * 9).long().clamp(max=8)     # (B, 1, H, W)
        zeros = torch.zeros_like(gray).repeat(1, 9, 1, 1)    # (B, 9, H, W)
        return zeros.scatter_(1, bins, torch.hypot(dx, dy))

    build = model.build_decoder

    def build_for_nine(width, channels, stride):
        return build(width, 9, stride)

    monkeypatch.setattr(pretrain, "make_target", orientations)
    monkeypatch.setattr(model, "build_decoder", build_for_nine)
    state = fork(tmp_path / "run")["model"]
    assert state["decoder.0.weight"].shape[0] == 9 * 32**2
    # the target is no picture: no sheets are drawn, and it is not compared with the two baselines
    assert not list((tmp_path / "run").glob("reconstruction-*.png"))
    assert "mean_colour" not in read_log(tmp_path / "run")[-1]
    assert "a blur" not in capsys.readouterr().err
    # an image that grows to the right by 1 per pixel: orientation 0, strength 1
    slope = torch.arange(8.0).expand(1, 3, 8, 8)
    strengths = orientations(slope)[0, :, 2:, 2:].amax((1, 2))
    assert strengths.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_fork_reconstructs_the_features_of_an_ema_teacher(few_images, tmp_path, monkeypatch):
    """The teacher is a submodule, so it is saved and resumed. It follows the encoder each step."""
    init, step = A2MIM.__init__, pretrain.train_step

    def with_teacher(self, *given, **more):
        init(self, *given, **more)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def features(images, model):
        with torch.no_grad():
            return model.teacher(images).float()             # (B, 512, 4, 4)

    def step_and_follow(at, batches, args, world, state):
        record = step(at, batches, args, world, state)
        teacher, encoder = state.model.teacher, state.model.encoder
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), encoder.parameters()):
                slow.lerp_(fast, 0.1)
        return record

    def one_layer(width, channels, stride):
        return nn.Conv2d(width, width, 1)

    monkeypatch.setattr(A2MIM, "__init__", with_teacher)
    monkeypatch.setattr(model, "build_decoder", one_layer)
    monkeypatch.setattr(pretrain, "make_target", features)
    monkeypatch.setattr(pretrain, "train_step", step_and_follow)
    state = fork(tmp_path / "run", "--stem", "small")["model"]
    slow = state["teacher.backbone.layer4.0.conv1.weight"]
    fast = state["encoder.backbone.layer4.0.conv1.weight"]
    assert not torch.equal(slow, fast)

    monkeypatch.setattr(pretrain, "train_step", failing_at(2, step_and_follow))
    with pytest.raises(SystemExit):
        fork(tmp_path / "cut", "--stem", "small", "--save-every", "1")
    monkeypatch.setattr(pretrain, "train_step", step_and_follow)
    pretrain.main(["--out", str(tmp_path / "cut"), "--resume"])
    again = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in state.items())


class RatioSchedule:
    """A mask ratio that grows by a twentieth each step: an object with a state of its own."""
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

    def with_schedule(args, world, plan, saved, *rest):
        return real(args, world, plan, {**saved, "ratio": schedule}, *rest)

    monkeypatch.setattr(pretrain, "draw_masks", draw_by_schedule)
    monkeypatch.setattr(pretrain, "train_step", step_and_grow)
    monkeypatch.setattr(pretrain, "Checkpointer", with_schedule)
    flags = ["--val", "0", "--sheets", "0"]
    whole = fork(tmp_path / "whole", *flags)["model"]
    assert shares == pytest.approx([0.3, 0.35, 0.4, 0.45])

    schedule.ratio = 0.3
    monkeypatch.setattr(pretrain, "train_step", failing_at(2, step_and_grow))
    with pytest.raises(SystemExit):
        fork(tmp_path / "cut", *flags, "--save-every", "1")
    schedule.ratio = 0.9                                     # a new process would not know it
    monkeypatch.setattr(pretrain, "train_step", step_and_grow)
    pretrain.main(["--out", str(tmp_path / "cut"), "--resume"])
    again = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_fork_normalised_patches_are_judged_by_baselines_with_the_same_target(
        few_images, tmp_path, monkeypatch, capsys):
    """MAE's target, in the shape of an image: each patch minus its mean, over its deviation."""
    def normalised(images, model=None):
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8)     # (B, C, gh, gw, 8, 8)
        patches = patches - patches.mean((4, 5), keepdim=True)
        patches = patches / (patches.square().mean((4, 5), keepdim=True) + 1e-6).sqrt()
        return patches.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)

    monkeypatch.setattr(pretrain, "make_target", normalised)
    fork(tmp_path / "run", "--val", "0.25", "--sheets", "2", "--fourier-weight", "0")
    line = [line for line in read_log(tmp_path / "run") if "held_out" in line][-1]
    # a patch of one colour is 0 after normalisation, and |x| (2 sigmoid(0.2 |x|) - 1) remains
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator).abs()
    of_zero = (x * (2 * torch.sigmoid(0.2 * x) - 1)).mean().item()
    assert 0.5 * of_zero < line["mean_colour"] < 2 * of_zero
    assert not list((tmp_path / "run").glob("reconstruction-*"))             # it is no picture
    assert "reconstruction" not in capsys.readouterr().err.split("done:")[1]


def test_a_target_that_is_coarser_than_the_mask_gets_one_line(few_images, tmp_path, monkeypatch,
                                                              capsys):
    def pooled(images, model=None):
        return nn.functional.avg_pool2d(images, 16)          # 2 x 2, the mask has 4 x 4

    monkeypatch.setattr(pretrain, "make_target", pooled)
    code, said = complaint(capsys, *FORK.split(), "--out", tmp_path / "run")
    assert code == 2 and "make_target gives maps of 2x2, the mask has 4x4 units" in said


class Counter:
    """An object of a fork, with a state."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_an_object_that_cannot_be_resumed_is_named(few_images, tmp_path, monkeypatch, capsys):
    init = checkpointer.Checkpointer.__init__

    def with_an_object(name):
        def saving(self, settings, world, plan, saved, *rest):
            init(self, settings, world, plan, {**saved, name: Counter()}, *rest)
        monkeypatch.setattr(checkpointer.Checkpointer, "__init__", saving)

    fork(tmp_path / "run")
    resume = ["--out", tmp_path / "run", "--resume", "--epochs", "2"]
    with_an_object("ratio")                                  # the checkpoint is from before
    code, said = complaint(capsys, *resume)
    assert code == 2 and "checkpoint.pt: holds no 'ratio'" in said
    with_an_object("skipped")                                # the checkpoint holds a number there
    code, said = complaint(capsys, *resume)
    assert code == 2 and "'skipped' is a name of the checkpoint's own" in said
