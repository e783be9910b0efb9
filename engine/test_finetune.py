"""Fine-tuning: its images and their augmentation, targets, recipes, the classifier, the probes."""

import json
import math
import re
import shutil
import statistics
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

import data
import finetune
import model
from engine import optim, weights
from engine.command import Distributed
from engine.description import describe
from engine.testing import (SMALL, assert_settings, complaint, flat, labelled_folder, paint,
                            prepared, randomised, read_log, resolved, torchrun, tune)
from model import build_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
close = torch.testing.assert_close


# ---- which images ----

def test_every_fifth_image_of_a_class_is_held_out_and_not_trained_on(tmp_path):
    for name, count in (("cat", 12), ("dog", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i:02}.png").touch()
    names = []
    for split in ("train", "val"):
        source = data.open_images(str(tmp_path), split, (32, 32), labelled=True)
        names.append([source.name(i).removeprefix(f"{tmp_path}/") for i in range(len(source))])
    trained_on, held_out = names
    assert held_out == ["cat/04.png", "cat/09.png", "dog/04.png"]
    assert source.labels.tolist() == [0, 0, 1]
    assert len(trained_on) == 14 and not {*trained_on} & {*held_out}


def evaluated(out, folder, *flags):
    """The result of --eval-only, of a net with random weights and two classes."""
    torch.manual_seed(0)
    file = out.parent / "net.pth"
    torch.save(tv.resnet18(num_classes=2).state_dict(), file)
    return tune(out, "--data", folder, "--weights", file, "--arch", "resnet18", "--stem",
                "imagenet", "--eval-only", *flags)


def test_an_evaluation_sees_the_part_that_is_asked_for(tmp_path, capsys):
    labelled_folder(tmp_path / "cut", {"train": (3, 2), "val": (2, 1), "Test": (4, 1)})
    counts = {}
    for part in (None, "train", "Test", "all"):
        flags = ["--split-val", part] if part else []
        counts[part] = evaluated(tmp_path / f"run-{part}", tmp_path / "cut", *flags)["images"]
    assert counts == {None: 3, "train": 5, "Test": 5, "all": 13}
    shutil.rmtree(tmp_path / "cut" / "train")                # only a part to evaluate is there
    assert evaluated(tmp_path / "no-train", tmp_path / "cut")["images"] == 3

    labelled_folder(tmp_path, {"uncut": (10, 5)})
    capsys.readouterr()
    assert evaluated(tmp_path / "fifth", tmp_path / "uncut")["images"] == 3
    assert "3 images for validation (every fifth of a class)" in capsys.readouterr().err
    assert evaluated(tmp_path / "all", tmp_path / "uncut", "--split-val", "all")["images"] == 15
    code, said = complaint(capsys, "--data", tmp_path, "--weights", "best.pt", "--eval-only",
                           "--labels", "0.1", main=finetune.main)
    assert code == 2 and "--labels: chooses the images to train on" in said


def test_a_linear_probe_has_one_linear_layer(few_images, tmp_path, capsys):
    """A MobileNet's own head has two, with a nonlinearity between them."""
    flags = ["--data", "shapes", "--init", "scratch", "--arch", "mobilenet_v3_small"]
    code, said = complaint(capsys, *flags, "--image-size", 64, "--recipe", "linear", "--out",
                           tmp_path / "run", main=finetune.main)
    assert code == 2 and "the head of mobilenet_v3_small has 2 linear layers" in said


def test_folders_that_are_no_classes_are_refused(tmp_path, capsys):
    def refusal(folder):
        return complaint(capsys, "--data", folder, "--init", "scratch", "--arch", "resnet18",
                         "--image-size", 32, "--out", tmp_path / "run", main=finetune.main)[1]
    for part in ("Training", "Testing"):
        labelled_folder(tmp_path / "kaggle", {part: (2, 2)})
    said = refusal(tmp_path / "kaggle")
    assert "its folders (Testing, Training) look like parts of a set" in said
    labelled_folder(tmp_path, {"set": (5, 5)})
    paint(tmp_path / "set" / "cover.png")
    assert "set/cover.png lies in no class folder" in refusal(tmp_path / "set")
    labelled_folder(tmp_path, {"four": (4, 4)})
    said = refusal(tmp_path / "four")
    assert "0 validation images are too few for 1 process; every fifth image of" in said


def test_a_classifier_is_not_scored_on_classes_of_other_names(tmp_path, capsys):
    labelled_folder(tmp_path, {"set": (5, 5)})               # c0 and c1
    about = SimpleNamespace(arch="resnet18", patch_size=16, window=7, stem="imagenet")
    for classes in (["c0", "c1"], ["c1", "c0"]):
        content = describe("classifier", about, classes, 32, data.MEAN, data.STD)
        (tmp_path / "model.json").write_text(json.dumps(content))
        if classes == ["c0", "c1"]:
            assert evaluated(tmp_path / "run", tmp_path / "set")["images"] == 2
    code, said = complaint(capsys, "--data", tmp_path / "set", "--weights", tmp_path / "net.pth",
                           "--arch", "resnet18", "--image-size", 32, "--eval-only",
                           "--out", tmp_path / "again", main=finetune.main)
    assert code == 2
    assert f"its classes (c0, c1) are not those of {tmp_path}/net.pth (c1, c0)" in said


def test_a_label_subset_is_balanced_and_fixed_by_the_seed():
    source = data.Shapes("train", (32, 32))
    for labels, each in (("0.05", 50), ("20/class", 20), (".0001", 1), ("1", 1000)):
        part = data.some_labels(source, labels, seed=0)
        assert np.bincount(part.labels).tolist() == [each] * 10
        assert all(part.labels == source.labels[part.indices])
        assert len(set(part.indices)) == 10 * each

    def pick(labels, seed):
        return data.some_labels(source, labels, seed).indices.tolist()

    assert pick("20/class", 0) == pick("20/class", 0) != pick("20/class", 1)
    # with more labels the images of fewer labels are still among them
    assert set(pick("20/class", 0)) < set(pick("40/class", 0))
    for wrong in ("0", "1.5", "0/class", "many", "-0.1", "2000/class"):
        with pytest.raises(ValueError, match=f"--labels {wrong}: "):
            data.some_labels(source, wrong, 0)


def test_repeated_augmentation_shows_a_third_of_the_images_three_times_each():
    batches = flat(data.ResumableBatchSampler(60, 12, 1, 1, 0, seed=0, start=0, stop=10, repeats=3))
    for batch in batches[:5]:
        images = [i for _, i in batch]
        assert len(set(images)) == 4 and all(images.count(i) == 3 for i in images)
        assert len(set(batch)) == 12                         # other crops of the same image
    first = {draw for batch in batches[:5] for draw in batch}
    second = {draw for batch in batches[5:] for draw in batch}
    assert len({i for _, i in first}) == 20                  # a third of the set in an epoch
    assert not first & second                                # and never the same draw


# ---- the settings of a step ----

def test_each_setting_of_fine_tuning_reaches_the_step(few_images, tmp_path):
    settings = ["", "--erasing 1", "--mixup 1", "--cutmix 1", "--loss bce", "--smoothing 0",
                "--repeats 2", "--randaug 9", "--jitter 0.5", "--crop-min 0.1", "--drop-path 0.5"]
    gradients = []
    for i, more in enumerate(settings):
        tune(tmp_path / str(i), "--init", "scratch", "--arch", "resnet18", "--epochs", "0.25",
             *more.split())
        state = torch.load(tmp_path / str(i) / "checkpoint.pt", weights_only=True)
        # the first moment of AdamW after a step: a tenth of the gradient
        moments = [moment["exp_avg"].norm() for moment in state["optimizer"]["state"].values()]
        gradients.append(torch.stack(moments).norm().item())
    assert len(set(gradients)) == len(settings)


def test_layer_decay_and_the_largest_gradient_norm_act(few_images, tmp_path):
    """AdamW's first step moves a weight by the lr, however large its gradient is. With a layer
    decay of a half the stem of a ResNet, five levels below the head, has lr / 32."""
    weights_after = {}
    for name, more in (("still", "--lr 0"), ("decayed", "--layer-decay 0.5"),
                       ("clipped", "--clip-grad 1e-12")):
        tune(tmp_path / name, "--init", "scratch", "--arch", "resnet18", "--epochs", "0.25",
             "--lr-batch", "8", "--lr", "0.01", "--warmup-epochs", "0", "--weight-decay", "0",
             *more.split())
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        weights_after[name] = state["model"]
    for layer, expected in (("head.weight", 0.01), ("encoder.backbone.conv1.weight", 0.01 / 32)):
        start = weights_after["still"][layer]
        moved = (weights_after["decayed"][layer] - start).abs()
        assert moved.median().item() == pytest.approx(expected, rel=0.01)
        assert (weights_after["clipped"][layer] - start).abs().max() < 1e-5


# ---- RandAugment ----

def test_randaugment_changes_images_and_keeps_their_form():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    change = data.RandAugment(9.0)
    out = [change(image) for _ in range(50)]
    assert all(o.shape == image.shape and o.dtype == torch.uint8 for o in out)
    assert any(not torch.equal(o, image) for o in out)


def test_randaugment_makes_one_operation_on_average_whose_magnitude_scatters_by_a_half():
    change = data.RandAugment(5.0)                           # far from both ends, 0 and 10
    bins = []

    def noting(number):
        def operation(picture):
            bins.append(number)
            return picture
        return operation

    change.by_bin = [noting(number) for number in range(31)]
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    for _ in range(2000):
        change(image)
    assert len(bins) / 2000 == pytest.approx(1, abs=0.08)    # two, each with probability 0.5
    assert statistics.mean(bins) / 3 == pytest.approx(5, abs=0.06)           # 31 bins for 0 to 10
    assert statistics.stdev(bins) / 3 == pytest.approx(0.51, abs=0.04)       # 0.5, and rounding


def test_randaugment_turns_bicubically_and_fills_corners_with_the_released_colour():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    change = data.RandAugment(9.0).by_bin[20]                # 20 of 30 bins: 20 degrees
    change._AUGMENTATION_SPACE = {"Rotate": change._AUGMENTATION_SPACE["Rotate"]}
    got = np.asarray(change(image))
    by_pillow = [
        np.asarray(image.rotate(angle, Image.BICUBIC, fillcolor=(104, 116, 124)))
        for angle in (20, -20)
    ]
    assert any(np.array_equal(got, turned) for turned in by_pillow)


# ---- mixed images and their targets ----

def test_mixed_targets_weigh_classes_as_the_images_were_mixed():
    labels = torch.tensor([0, 1, 2, 3])
    # image i is i everywhere
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 64, 64).contiguous()
    for mixup, cutmix in ((0.5, 0.0), (0.0, 1.0)):
        for _ in range(5):
            mixed, targets = finetune.mix_batch(images, labels, 5, mixup, cutmix)
            assert targets.shape == (4, 5) and torch.allclose(targets.sum(1), torch.ones(4))
            # the share of image b, from the pixels
            close(mixed.mean((1, 2, 3)), targets @ torch.arange(5.0), atol=1e-4, rtol=0)
            if cutmix:
                assert set(mixed.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    mixed, targets = finetune.mix_batch(images, labels, 5, 0.0, 0.0)
    assert torch.equal(mixed, images) and targets.argmax(1).tolist() == [0, 1, 2, 3]


def test_mixup_or_cutmix_with_even_odds_and_always_one():
    images, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    pasted = 0
    for _ in range(400):
        mixed, _ = finetune.mix_batch(images, labels, 2, 1.0, 1.0)
        # cutmix copies pixels, mixup blends them
        pasted += bool(((mixed == images) | (mixed == images.flip(0))).all())
    assert 150 < pasted < 250                                # 5 standard deviations


def test_bce_of_mixed_targets_is_the_mean_over_classes_of_two_logs():
    logits = torch.randn(3, 4)
    targets = torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 1, 0], [0.5, 0, 0, 0.5]])
    total = 0.0
    for i, c in product(range(3), range(4)):
        p, t = 1 / (1 + math.exp(-logits[i, c].item())), targets[i, c].item()
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    got = finetune.class_loss(logits, targets, "bce", 0.1)
    assert got.item() == pytest.approx(total / 12, rel=1e-5)


def test_smoothed_cross_entropy_mixes_in_the_uniform_target():
    logits, targets = torch.randn(3, 4), torch.eye(4)[:3]
    expected = -((0.9 * targets + 0.1 / 4) * logits.log_softmax(1)).sum(1).mean()
    close(finetune.class_loss(logits, targets, "ce", 0.1), expected)


# ---- random erasing ----

def boxes_of(images: Tensor) -> Tensor:
    """Images of 7 with boxes of noise -> (top, left, height, width) of each, int (n, 4), n <= B."""
    found = []
    for image in images:
        hit = (image != 7).all(0)
        assert torch.equal(hit, (image != 7).any(0))         # all colours
        if not hit.any():
            continue
        rows, columns = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
        assert hit.sum() == len(rows) * len(columns)         # one whole rectangle
        found.append([rows[0], columns[0], len(rows), len(columns)])
    return torch.tensor(found)


def largest_gap(a: Tensor, b: Tensor) -> float:
    """The Kolmogorov-Smirnov distance of two samples: between their distribution functions."""
    values = torch.cat([a, b]).double().sort().values
    below = [torch.searchsorted(x.double().sort().values, values, right=True) / len(x)
             for x in (a, b)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("size", [(40, 40), (24, 56)])       # the second one refuses many boxes
def test_erasing_has_the_distribution_of_torchvision(size):
    n = 3000
    images = torch.full((n, 3, *size), 7.0)
    theirs = v2.RandomErasing(1.0, value="random")
    a = boxes_of(finetune.erase(images, 1.0))
    b = boxes_of(torch.stack([theirs(image) for image in images]))
    assert len(a) == len(b) == n
    H, W = size
    limit = 1.95 * math.sqrt(2 / n)                          # exceeded once in 1,000
    measures = [lambda box: box[:, 2] * box[:, 3] / (H * W),                 # share of the area
                lambda box: (box[:, 2] / box[:, 3]).log(),   # aspect
                lambda box: box[:, 2],
                lambda box: box[:, 3],
                lambda box: box[:, 0] / (H - box[:, 2]).clamp(min=1),        # place
                lambda box: box[:, 1] / (W - box[:, 3]).clamp(min=1)]
    for measure in measures:
        assert largest_gap(measure(a), measure(b)) < limit
    assert a[:, 2].max() < H and a[:, 3].max() < W


def test_erasing_takes_its_share_of_images_and_fills_them_with_normal_noise():
    images = torch.full((2000, 3, 32, 32), 7.0)
    erased = finetune.erase(images, 0.25)
    count = (erased != 7).flatten(1).any(1).sum().item()
    assert abs(count - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)
    noise = erased[erased != 7]
    assert noise.mean().abs() < 0.01 and abs(noise.std() - 1) < 0.01
    assert (images == 7).all() and finetune.erase(images, 0.0) is images


# ---- the recipes ----

def test_published_fine_tuning_recipes_come_out():
    def recipe(name, arch="resnet50", *flags):
        given = ["--data", "x", "--init", "scratch", "--arch", arch, "--recipe", name]
        return resolved(finetune, *given, *flags)

    for name, lr, batch, epochs, warmup, decay, size in (
        ("rsb_a3", 8e-3, 2048, 100, 5, 0.02, 160),
        ("rsb_a2", 5e-3, 2048, 300, 5, 0.02, 224),
        ("vit", 2.5e-3, 1024, 100, 20, 0.05, 224),
    ):
        settings = recipe(name)
        assert settings.lr * batch / settings.lr_batch == pytest.approx(lr)
        assert_settings(settings, epochs=epochs, warmup_epochs=warmup, weight_decay=decay,
                        image_size=size)
    rsb = dict(optimizer="lamb", loss="bce", mixup=0.1, cutmix=1, test_size=224, test_crop=0.95,
               crop_min=0.08)
    assert_settings(recipe("rsb_a3"), **rsb, ema=0, repeats=1, randaug=6, drop_path=0)
    assert_settings(recipe("rsb_a2"), **rsb, ema=0.9999, repeats=3, randaug=7, drop_path=0.05)
    # the released configs have jitter beside RandAugment, where it has no effect
    strong = dict(optimizer="adamw", loss="ce", smoothing=0.1, mixup=0.8, cutmix=1, randaug=9,
                  erasing=0.25, jitter=0, crop_min=0.08)
    assert_settings(recipe("vit"), **strong, layer_decay=0.65, clip_grad=5, ema=0.99996,
                    drop_path=0.1)
    assert_settings(recipe("convnext"), **strong, warmup_epochs=5, lr_batch=4096, ema=0.9999)
    assert_settings(recipe("small"), epochs=60, crop_min=0.2, cutmix=1, lr=1e-3)
    assert_settings(recipe("linear"), frozen=True, smoothing=0, weight_decay=0, epochs=100)

    for name, arch, expected in (                            # the exceptions of some nets
        ("rsb_a2", "resnet101", dict(ema=0, drop_path=0.1)),
        ("rsb_a2", "resnet152", dict(ema=0, drop_path=0.15)),
        ("rsb_a2", "resnet200", dict(ema=0, drop_path=0.2)),
        ("vit", "deit_small", dict(lr=4e-3, lr_batch=512, warmup_epochs=5, ema=0)),
        ("vit", "vit_small", dict(ema=0)),
        ("vit", "vit_base", dict(ema=0.99996, repeats=1)),
        ("vit", "vit_large", dict(repeats=3, ema=0.99996)),
        ("convnext", "convnext_base", dict(drop_path=0.5, lr=4e-3, layer_decay=1)),
        ("convnext", "convnext_small", dict(drop_path=0.4, epochs=300)),
        ("convnext", "convnext_tiny", dict(layer_decay=0.7, lr=4e-4, epochs=400,
                                           weight_decay=0.01, drop_path=0.1)),
    ):
        assert_settings(recipe(name, arch), **expected)
    assert recipe("vit", "vit_small", "--ema", "0.5").ema == 0.5


def test_images_are_trained_on_at_one_size_and_tested_at_another(tmp_path):
    flags = f"{' '.join(SMALL)} --init scratch --arch resnet18 --test-size 48 --out {tmp_path}"
    _, state = prepared(finetune, flags, Distributed())
    sizes = [next(iter(loader))[0].shape[-2:] for loader in (state.loader, state.val_loader)]
    assert sizes == [(32, 32), (48, 48)]


def test_best_pt_holds_the_moving_average_of_the_weights(few_images, tmp_path):
    tune(tmp_path / "run", *"--init scratch --arch resnet18 --ema 0.9 --epochs 1".split())
    best = torch.load(tmp_path / "run" / "best.pt")["conv1.weight"]
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert torch.equal(best, state["ema"]["module.encoder.backbone.conv1.weight"])
    assert not torch.equal(best, state["model"]["encoder.backbone.conv1.weight"])


def test_a_moving_average_that_is_longer_than_the_run_is_warned_of(few_images, tmp_path, capsys):
    """0.9 averages over 1 / (1 - 0.9) = 10 steps."""
    flags = "--init scratch --arch resnet18".split()
    for ema, said in (("0.9", True), ("0.5", False)):
        tune(tmp_path / ("a" if said else "b"), *flags, "--ema", ema)
        assert ("warning: --ema 0.9 averages the weights of about 10 steps" in
                capsys.readouterr().err) == said


def test_rsb_cosine_moves_once_an_epoch_under_a_ramp_per_iteration():
    def lr(step):
        return optim.lr_at(step, 1000, 50, 8e-3, 1e-6, "cosine-by-epoch", per_epoch=10)

    def cosine(epoch):
        return 1e-6 + (8e-3 - 1e-6) * (1 + math.cos(math.pi * epoch / 100)) / 2

    assert lr(0) == pytest.approx(1e-5 * 8e-3)
    assert lr(25) == pytest.approx((1e-5 + 0.5 * (1 - 1e-5)) * cosine(2), rel=1e-9)
    assert lr(50) == lr(59) == pytest.approx(cosine(5))
    assert lr(60) == pytest.approx(cosine(6))


def test_convnexts_cosine_counts_from_step_0_under_a_linear_ramp():
    def one_parameter(lr):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)

    ramp = torch.optim.lr_scheduler.LinearLR(one_parameter(1.0), 1e-5, total_iters=50)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(one_parameter(4e-3), 1000, eta_min=1e-6)
    for step in range(1000):
        expected = ramp.get_last_lr()[0] * cosine.get_last_lr()[0]
        assert optim.lr_at(step, 1000, 50, 4e-3, 1e-6, "cosine-from-0") == pytest.approx(expected)
        for scheduler in (ramp, cosine):
            scheduler.optimizer.step()
            scheduler.step()


def test_a_probe_drops_its_lr_to_a_tenth_at_60_and_at_80_percent():
    probe = [optim.lr_at(step, 1000, 0, 30.0, 0.0, "probe") for step in (0, 599, 600, 799, 800)]
    assert probe == pytest.approx([30, 30, 3, 3, 0.3])


def test_each_fine_tuning_recipe_has_its_schedule():
    for recipe, schedule in (
        ("rsb_a3", "cosine-by-epoch"),
        ("convnext", "cosine-from-0"),
        ("linear", "probe"),
    ):
        flags = ["--data", "x", "--init", "scratch", "--arch", "resnet50", "--recipe", recipe]
        assert resolved(finetune, *flags).schedule == schedule


def depth_of(arch, name):
    """How many levels lie between a parameter and the head, from the parameter's name alone."""
    if name.startswith(("head.", "classifier.0.")):
        return 0                                             # classifier.0: a norm after the mean
    if arch == "resnet18":
        return 5 - int(name[5]) if name.startswith("layer") else 5

    if arch == "deit_tiny":
        if name.startswith("norm."):
            return 0                                         # it too comes after the mean
        if name.startswith("blocks."):
            return 12 - int(name.split(".")[1])              # 0.65^(L + 1 - j), j = i + 1, L = 12
        return 13                                            # patches and positions: j = 0

    if arch.startswith("convnext"):
        # level 0: stem; 1, 2: stages with what leads to them; then groups of three blocks; the
        # last level: stage 4
        groups = {"convnext_tiny": 3, "convnext_small": 9}[arch]
        part, block = name.split(".")[1:3]
        if part == "5":
            level = 3 + int(block) // 3
        else:
            level = {"0": 0, "1": 1, "2": 2, "3": 2, "4": 3, "6": 3 + groups, "7": 3 + groups}[part]
        return 4 + groups - level

    if name.startswith("norm."):
        return 1
    return 5 - (int(name.split(".")[1]) + 1) // 2            # features.0 | 1, 2 | 3, 4 | 5, 6 | 7


@pytest.mark.parametrize("arch, decay, levels", [
    ("resnet18", 0.75, 6),
    ("convnext_tiny", 0.7, 8),
    ("convnext_small", 0.7, 14),
    ("deit_tiny", 0.65, 14),
    ("swin_tiny", 0.9, 6),
])
def test_layer_decay_scales_each_parameter_by_its_depth(arch, decay, levels):
    net = model.Classifier(arch, build_encoder(arch, 64), 10)
    names = {p: n.removeprefix("encoder.backbone.") for n, p in net.named_parameters()}
    scales = {}
    for group in optim.layer_groups(net, 0.05, decay):
        for p in group["params"]:
            name = names[p]
            scales[name] = group["scale"]
            assert group["scale"] == pytest.approx(decay ** depth_of(arch, name)), name
            free = p.ndim <= 1 or "bias" in name
            free = free or name.endswith(("pos_embed", "cls_token", "layer_scale"))
            assert group["weight_decay"] == (0 if free else 0.05), name
    assert set(scales) == set(names.values())
    assert {depth_of(arch, name) for name in scales} == set(range(levels))
    if arch == "convnext_tiny":
        assert round(scales["features.0.0.weight"], 3) == 0.082              # 0.7^7


# ---- the network ----

@pytest.mark.parametrize("arch, std", [
    ("resnet18", 0.01),
    ("deit_tiny", 0.01),
    ("convnext_tiny", 0.02),
])
def test_the_head_starts_as_released(arch, std):
    head = model.Classifier(arch, build_encoder(arch, 64), 1000).head
    assert head.weight.std().item() == pytest.approx(std, rel=0.02)
    assert head.bias.abs().max() == 0


def test_classifiers_keep_torchvisions_names_and_outputs():
    images = torch.randn(2, 3, 64, 64)
    for arch in ("resnet18", "convnext_tiny", "swin_tiny"):
        net = randomised(model.Classifier(arch, build_encoder(arch, 64), 1000))
        reference = getattr(tv, arch.replace("swin_tiny", "swin_t"))().eval()
        reference.load_state_dict(net.torchvision_state_dict())
        close(net(images), reference(images), atol=1e-4, rtol=1e-4)


def test_a_vit_takes_a_batch_without_images():
    """Such as the last one of an evaluation, if its only image cannot be read."""
    classifier = model.Classifier("deit_tiny", build_encoder("deit_tiny", 64), 3)
    with torch.no_grad():
        assert classifier(torch.zeros(0, 3, 64, 64)).shape == (0, 3)


def test_a_vit_classifier_averages_patches_under_a_fresh_norm():
    encoder = build_encoder("deit_tiny", 64)
    with torch.no_grad():
        encoder.backbone.norm.bias.fill_(7)                  # pre-training's norm is not used
    net = model.Classifier("deit_tiny", encoder, 10).eval()
    backbone, images = encoder.backbone, torch.randn(2, 3, 64, 64)
    x = backbone.blocks(backbone.embed_position(backbone.patch_embed(images)))
    mean = sum(x[:, i] for i in range(1, 17)) / 16           # without the class token
    x = nn.functional.layer_norm(mean, (192,), eps=1e-6)
    close(net(images), x @ net.head.weight.T + net.head.bias, atol=1e-5, rtol=1e-4)


def test_stochastic_depth_of_resnet_drops_residual_branches_only_in_training():
    images = torch.randn(2, 3, 64, 64)
    for arch in ("resnet50", "resnet18"):                    # Bottleneck and BasicBlock
        plain = randomised(build_encoder(arch))              # otherwise each branch starts at 0
        net = build_encoder(arch, drop_path=0.99).eval()
        net.backbone.load_state_dict(plain.backbone.state_dict())
        assert torch.equal(plain(images), net(images))
    rates = [m.p for m in net.modules() if isinstance(m, StochasticDepth)]
    close(rates, np.linspace(0, 0.99, 8).tolist())
    last, z = net.backbone.layer4[1].train(), torch.rand(500, 512, 2, 2)
    nn.init.ones_(last.bn2.weight)
    dropped = (last(z) == z).flatten(1).all(1).sum().item()  # x + 0, and x >= 0 already
    assert 480 <= dropped < 500  # 0.99 of 500, within 7 standard deviations


# ---- probes ----

def test_a_linear_probe_leaves_the_backbone_bit_equal(few_images, backbone, tmp_path):
    flags = ["--weights", backbone, "--arch", "resnet18", "--recipe", "linear", "--epochs", "2"]
    tune(tmp_path / "probe", *flags)
    before, after = torch.load(backbone), torch.load(tmp_path / "probe" / "best.pt")
    trained = torch.load(tmp_path / "probe" / "checkpoint.pt")["model"]
    for name, value in before.items():
        if not name.startswith("fc."):
            # weights, and BatchNorm's statistics and counters
            assert torch.equal(value, after[name]), name
            assert torch.equal(value, trained[f"encoder.backbone.{name}"]), name
    assert trained["head.bias"].abs().max() > 0              # it starts at 0: the head was trained


def test_a_linear_probe_on_few_images_is_stable_and_its_optimiser_can_be_typed(
    few_images, tmp_path, capsys
):
    torch.manual_seed(0)
    state = tv.resnet18().state_dict()
    for name, value in state.items():                        # |z|^2 = 200, as after pre-training
        if re.fullmatch(r"layer4\.1\.bn2\.(weight|bias)", name):
            value.fill_(2.0 if name.endswith("weight") else 0.0)
    torch.save(state, tmp_path / "w.pth")
    probe = ["--weights", tmp_path / "w.pth", "--arch", "resnet18", "--recipe", "linear"]
    probe += ["--crop-min", "1"]
    worst = {}
    for name, more in (("few", []), ("released", ["--optimizer", "sgd"])):
        tune(tmp_path / name, *probe, "--epochs", "4", "--eval-every", "4", *more)
        losses = [line["loss"] for line in read_log(tmp_path / name)]
        worst[name] = max(losses)
        if name == "few":
            assert statistics.mean(losses[-4:]) < losses[0]
    assert worst["few"] < 2 * math.log(10) < worst["released"]       # log(10): a guess
    assert "peak lr 1.00e-02" in capsys.readouterr().err
    last = torch.load(tmp_path / "few" / "best.pt", weights_only=True)
    assert not tv.resnet18(num_classes=10).load_state_dict(last).missing_keys

    for images, more, batch, peak, optimizer in (
        (300, [], 15, 1e-2, "adamw"),                        # ten steps an epoch, of 2 x 15 images
        (99_999, [], 256, 1e-2, "adamw"),
        (99_999, ["--batch-size", "64"], 64, 1e-2, "adamw"),
        (100_000, [], 256, 30 * 512 / 256, "sgd"),
        (300, ["--lr", "0.3"], 256, 0.3 * 512 / 256, "sgd"),
        (300, ["--epochs", "5"], 15, 1e-2, "adamw"),
    ):
        given = "--data shapes --init scratch --arch resnet18 --recipe linear".split()
        settings = resolved(finetune, *given, *more, images=images, size=2, on_gpu=True)
        assert settings.batch_size == batch and settings.peak_lr == pytest.approx(peak)
        assert settings.optimizer == optimizer


def test_knn_votes_as_counted_by_hand(tmp_path):
    labelled_folder(tmp_path / "set", {"train": (5, 5), "val": (6, 5)})
    torch.save(tv.resnet18().state_dict(), tmp_path / "w.pth")
    flags = ["--data", tmp_path / "set", "--weights", tmp_path / "w.pth", "--arch", "resnet18",
             "--recipe", "knn", "--neighbours", "3"]
    result = tune(tmp_path / "knn", *flags)
    net = build_encoder("resnet18")
    weights.load_backbone(net, tmp_path / "w.pth")
    net.eval()
    crop = data.eval_transform((32, 32))

    @torch.no_grad()
    def features(split):
        """(unit vectors, labels) of all images of a split."""
        source = data.open_images(str(tmp_path / "set"), split, (32, 32), labelled=True)
        found = []
        for i in range(len(source)):
            image = data.normalise(crop(source.read(i))[None])               # (1, 3, 32, 32)
            z = net(image).mean((2, 3))[0].double()                          # (512,)
            found.append(z / z.norm())
        return found, source.labels

    bank, bank_labels = features("train")
    right = 0
    for z, label in zip(*features("val")):
        cosines = [((z @ v).item(), y) for v, y in zip(bank, bank_labels)]
        votes = [0.0, 0.0]
        for cosine, y in sorted(cosines)[-3:]:
            votes[y] += math.exp(cosine / 0.07)
        right += votes.index(max(votes)) == label
    assert result["top1"] == pytest.approx(right / 11)


def test_a_near_neighbour_outvotes_two_that_are_farther_away(monkeypatch):
    """exp(1 / 0.07) > 2 exp(0.9 / 0.07): a majority would give class 0."""
    side = math.sqrt(1 - 0.9**2)
    bank = torch.tensor([[1, 0], [0.9, side], [0.9, -side]])
    sets = iter([(bank, torch.tensor([1, 0, 0])), (torch.tensor([[2.0, 0]]), torch.tensor([1]))])
    monkeypatch.setattr(finetune, "outputs", lambda *given: next(sets))
    state = SimpleNamespace(classes=["a", "b"], loader=None, labels=None, val_loader=None,
                            val_labels=None)
    net = nn.Identity()
    net.features = None
    settings = SimpleNamespace(neighbours=3)
    assert finetune.neighbours(net, settings, Distributed(), state)["top1"] == 1


def test_features_are_torchvisions_before_its_head_of_every_image_in_order(
    backbone, capsys, tmp_path
):
    """In folders of every layout. Two processes write what one writes, and an image that cannot
    be read is left out."""
    labelled_folder(tmp_path / "cut", {"train": (3, 2), "val": (2,), "test": (1,)})
    (tmp_path / "flat").mkdir()
    for i in range(5):
        paint(tmp_path / "flat" / f"{i}.png", colour=(50 * i, 90, 200), size=(60 + i, 40))
    net = tv.resnet18()
    net.load_state_dict(torch.load(backbone))
    net.eval().fc = nn.Identity()                            # what is left is pooled
    bicubic = tvf.InterpolationMode.BICUBIC
    # frozen features are those of the test size
    flags = ["--weights", str(backbone), "--image-size", "96", "--test-size", "48", "32"]
    flags += "--arch resnet18 --recipe features --workers 0 --amp off".split()
    for name, labels, classes in (
        # test/c0/0.png, train/c0/0.png ... val/c0/1.png
        ("cut", [0, 0, 0, 0, 1, 1, 0, 0], ["c0", "c1"]),
        ("flat", [-1] * 5, []),
    ):
        out = tmp_path / f"{name}-out"
        finetune.main([*flags, "--data", str(tmp_path / name), "--out", str(out)])
        found = np.load(out / "features.npz")
        paths = (tmp_path / name).rglob("*.png")
        files = sorted(str(path.relative_to(tmp_path / name)) for path in paths)
        assert f"wrote {out}/features.npz: {len(files)} x 512" in capsys.readouterr().err
        assert found["files"].tolist() == files
        assert found["labels"].tolist() == labels
        assert found["classes"].tolist() == classes
        assert found["features"].dtype == np.float32
        assert found["labels"].dtype == np.int64
        for file, row in zip(files, found["features"]):
            image = tvf.pil_to_tensor(Image.open(tmp_path / name / file).convert("RGB"))
            # images are 40 px high and 40 or more wide: the height sets the scale, 48 / 0.875 = 55
            image = tvf.center_crop(tvf.resize(image, 55, bicubic, antialias=True), (48, 32))
            image = image.float() / 255
            image = tvf.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            with torch.no_grad():
                close(torch.from_numpy(row), net(image[None])[0], atol=1e-4, rtol=1e-4)
        assert {p.name for p in out.iterdir()} == {"features.npz", "args.json", ".lock"}
    (tmp_path / "flat" / "2.png").write_bytes(b"no image")
    again = [*flags, "--data", tmp_path / "flat", "--out", tmp_path / "flat-out"]
    code, said = complaint(capsys, *again, main=finetune.main)
    assert code == 2 and "holds features.npz, and no run" in said
    done = torchrun("finetune.py", *flags, "--data", tmp_path / "flat", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert f"1 images cannot be read and are left out: {tmp_path}/flat/2.png" in done.stderr
    one, two = (np.load(tmp_path / name / "features.npz") for name in ("flat-out", "two"))
    assert two["files"].tolist() == ["0.png", "1.png", "3.png", "4.png"]
    np.testing.assert_allclose(two["features"], one["features"][[0, 1, 3, 4]], rtol=1e-4, atol=1e-5)
