"""Forks: each row of docs/forks.md, as a run that learns. Two hold a state, which is resumed."""

import math
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tvf

import data
import finetune
import masking
import model
import pretrain
from engine import checkpointer
from engine.optim import MovingAverage
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


def test_fork_with_a_backbone_of_its_own(few_images, tmp_path, monkeypatch):
    """Pre-training and fine-tuning know it by its name."""
    class MyNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
            self.stage1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
            self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())

    def build(arch, *more, **rest):
        if arch != "mynet":
            return model.build_encoder(arch, *more, **rest)
        return model.Encoder(MyNet(), [["stem"], ["stage1"], ["stage2"]], token_stage=2)

    families = [*model.FAMILIES, model.Family("mynet", ("mynet",), "head")]
    monkeypatch.setattr(model, "FAMILIES", families)
    monkeypatch.setitem(pretrain.RECIPES, "mynet", pretrain.RECIPES["resnet"])
    for program in (pretrain, finetune):
        monkeypatch.setattr(program, "build_encoder", build)
    flags = "--data shapes --image-size 32 --batch-size 8 --workers 0 --amp off --epochs 4"
    before = ["--arch", "mynet", "--out", str(tmp_path / "run"), "--lr", "1", "--log-every", "1"]
    pretrain.main([*flags.split(), *before])
    losses = [line["loss"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0]
    weights = ["--weights", str(tmp_path / "run" / "backbone.pt")]
    finetune.main([*flags.split(), *weights, "--out", str(tmp_path / "tuned")])
    best = torch.load(tmp_path / "tuned" / "best.pt", weights_only=True)
    assert {*best} == {*MyNet().state_dict(), "head.weight", "head.bias"}


def test_fork_fill_with_the_mirrored_image(few_images, tmp_path, monkeypatch):
    fill = masking.fill_hidden

    def fill_or_mirror(images, mask, name="mean", generator=None):
        if name != "mirror":
            return fill(images, mask, name, generator)
        hidden = masking.resize_mask(mask, images.shape[-2:])
        return torch.where(hidden, images.flip(3), images)

    monkeypatch.setattr(model, "fill_hidden", fill_or_mirror)
    names = (*masking.FILLS, "mirror")
    monkeypatch.setitem(pretrain.FLAGS["masking"], "fill", ("mean", names, ""))
    fork(tmp_path / "run", "--fill", "mirror")
    images, mask = torch.randn(2, 3, 32, 32), checkerboard(2, 4, 4)
    filled = fill_or_mirror(images, mask, "mirror")
    assert torch.equal(filled[0, :, 0, 0], images[0, :, 0, 31])              # hidden
    assert torch.equal(filled[0, :, 0, 8], images[0, :, 0, 8])


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
    drawn = data.Shapes("train", (40, 40))
    (tmp_path / "set").mkdir()
    for i in range(len(drawn)):
        image = drawn.read(i)                                # uint8 (3, 40, 40)
        four = torch.cat([image, 255 - image[:1]])
        Image.fromarray(four.permute(1, 2, 0).numpy()).save(tmp_path / "set" / f"{i}.png")

    def read_four(path, min_side=None):
        with Image.open(path) as file:
            return tvf.pil_to_tensor(file)

    monkeypatch.setattr(data, "MEAN", (*data.MEAN, 0.5))
    monkeypatch.setattr(data, "STD", (*data.STD, 0.25))
    monkeypatch.setattr(data, "read_image", read_four)
    build = partial(pretrain.build_encoder, channels=4)
    monkeypatch.setattr(pretrain, "build_encoder", build)
    data.mean_and_std.cache_clear()
    try:
        state = fork(tmp_path / "run", "--data", str(tmp_path / "set"), "--val", "0")["model"]
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
    state = fork(tmp_path / "run", "--fourier-weight", "0")["model"]
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

    def with_teacher(self, encoder, image_size, mask_size, *more):
        init(self, encoder, image_size, mask_size, *more)
        width = self.decoder[0].in_channels
        self.teacher = MovingAverage(self.encoder, decay=0.9, ramp=2).requires_grad_(False)
        self.pixels = max(1, self.stride // mask_size)
        self.decoder = model.build_decoder(width, width, self.pixels)

    def features(images, model):
        with torch.no_grad():
            z = model.to_map(model.teacher.module.eval()(images)).float()    # (B, 512, 1, 1)
        return nn.functional.interpolate(z, scale_factor=model.pixels)       # (B, 512, 4, 4)

    def step_and_follow(at, batches, settings, world, state):
        record = step(at, batches, settings, world, state)
        state.model.teacher.update_parameters(state.model.encoder)
        return record

    monkeypatch.setattr(A2MIM, "__init__", with_teacher)
    monkeypatch.setattr(pretrain, "make_target", features)
    monkeypatch.setattr(pretrain, "train_step", step_and_follow)
    flags = ["--fourier-weight", "0", "--val", "0"]
    state = fork(tmp_path / "run", *flags)["model"]
    slow = state["teacher.module.backbone.layer4.0.conv1.weight"]
    fast = state["encoder.backbone.layer4.0.conv1.weight"]
    assert not torch.equal(slow, fast) and state["teacher.n_averaged"] == 5

    monkeypatch.setattr(pretrain, "train_step", failing_at(2, step_and_follow))
    with pytest.raises(SystemExit):
        fork(tmp_path / "cut", *flags, "--save-every", "1")
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


@pytest.mark.parametrize("target, message", [
    # 2 x 2 places, the mask has 4 x 4
    (lambda images, model: nn.functional.avg_pool2d(images, 16),
     "make_target gives maps of 2x2, the mask has 4x4 units"),
    # one channel would be broadcast to three
    (lambda images, model: images.mean(1, keepdim=True),
     "make_target gives maps (1, 32, 32), the decoder (3, 32, 32)"),
])
def test_a_target_that_does_not_fit_mask_and_decoder_gets_one_line(
        few_images, tmp_path, monkeypatch, capsys, target, message):
    monkeypatch.setattr(pretrain, "make_target", target)
    code, said = complaint(capsys, *FORK.split(), "--out", tmp_path / "run")
    assert code == 2 and message in said


def test_a_bug_inside_the_training_step_keeps_its_traceback(
        few_images, tmp_path, monkeypatch, capsys):
    """A ValueError before the first step is a mistake in flags or files: one line, exit code 2."""
    def with_a_bug(pred, *given, **more):
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(pretrain, "a2mim_loss", with_a_bug)
    code, said = complaint(capsys, *FORK.split(), "--out", tmp_path / "run")
    assert code == 1 and "in with_a_bug" in said and "not enough values to unpack" in said


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
