"""Facts about dense.py, pixels.py and segment.py.

    pytest extras/test_dense.py        under a minute on one CPU core
"""

import colorsys
import contextlib
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image
from torch import nn
from torchvision import tv_tensors

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import data
from data import make_loader
from engine import testing
from engine.command import Distributed
from engine.description import describe
from engine.optim import layer_groups
from engine.testing import close, read_log, same_weights, torchrun
from extras import dense, pixels, segment
from extras.dense import Maps, Scenes, Semantic
from extras.testing import (SMALL_NET, camvid, interrupted, limit_scenes, miou_by_numpy,
                            noise, numbers, png)
from model import Classifier, build_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


# ---- four maps of any encoder ----

@pytest.mark.parametrize(
    "arch", ["resnet18", "convnext_tiny", "swin_tiny", "deit_tiny", "regnet_y_400mf"])
def test_four_maps_have_strides_4_8_16_32_and_come_off_where_torchvision_ends_its_stages(arch):
    encoder = build_encoder(arch, (64, 96))
    norm = {"convnext_tiny": "classifier.0", "swin_tiny": "norm"}.get(arch)
    final = encoder.backbone.get_submodule(norm) if norm else None
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    maps = Maps(encoder)
    # the forward pass that finds the maps changes no statistics
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    assert maps.training and encoder.training

    net = maps.eval().encoder.backbone
    x = torch.randn(2, 3, 64, 96)
    found = maps(x)
    expected = [(2, C, 64 // s, 96 // s) for C, s in zip(maps.channels, (4, 8, 16, 32))]
    assert [tuple(z.shape) for z in found] == expected
    if arch == "resnet18":
        z = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for layer, got in zip((net.layer1, net.layer2, net.layer3, net.layer4), found):
            z = layer(z)
            close(got, z)
    elif arch == "regnet_y_400mf":
        close(found[3], net.trunk_output(net.stem(x)))
    elif arch == "deit_tiny":
        z = net.embed_position(net.patch_embed(x))
        for block in net.blocks[:8]:
            z = block(z)
        assert maps.taps == ["blocks.3", "blocks.5", "blocks.7", "blocks.11"]
        # the third map is the patch tokens of a block: row 1, column 2 of 4 x 6, after the class
        # token
        close(found[2][:, :, 1, 2], z[:, 1 + 1 * 6 + 2])
    else:                                                    # the encoder's final norm is map 4's
        channels_last = arch == "swin_tiny"
        last = final(net.features(x))
        last = last.permute(0, 3, 1, 2) if channels_last else last
        close(found[3], last, rtol=1e-4, atol=1e-4)
        shallow = net.features[:4](x)
        shallow = shallow.permute(0, 3, 1, 2) if channels_last else shallow
        spread = shallow.std(1, correction=0, keepdim=True)
        close(found[1], (shallow - shallow.mean(1, True)) / spread, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("arch, taps", [
    ("deit_tiny", (3, 5, 7, 11)),
    ("vit_small", (2, 3, 4, 7))])
def test_a_vit_is_tapped_at_a_third_a_half_two_thirds_and_its_end(arch, taps):
    assert Maps(build_encoder(arch, 32)).taps == [f"blocks.{i}" for i in taps]


def test_a_backbone_without_the_four_strides_is_refused_in_one_line():
    with pytest.raises(ValueError, match="has no maps at strides 4, 8, 16 and 32"):
        Maps(build_encoder("squeezenet1_1", 48))


def test_every_parameter_of_every_family_gets_a_gradient_as_ddp_needs():
    for arch in ("resnet18", "convnext_tiny", "swin_tiny", "deit_tiny"):
        model = pixels.Segmenter(build_encoder(arch, 64), "upernet", 8, 3, 0.0, aux=True)
        main, extra = model(torch.randn(2, 3, 64, 64))
        (main.square().sum() + extra.square().sum()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def parameters_by_scale(groups):
    """Learning rate scale -> number of parameters."""
    counts = Counter()
    for group in groups:
        counts[group["scale"]] += sum(p.numel() for p in group["params"])
    return counts


def test_levels_of_learning_rates_are_found_wherever_the_encoder_sits():
    classifier = Classifier("deit_tiny", build_encoder("deit_tiny", 32), 5)
    model = pixels.Segmenter(build_encoder("deit_tiny", 32), "upernet", 8, 5, 0.0, aux=True)
    flat = parameters_by_scale(layer_groups(classifier, 0.05, 0.65))
    deep = parameters_by_scale(layer_groups(model, 0.05, 0.65, "maps.encoder.backbone."))
    assert set(deep) == set(flat) == {0.65**k for k in range(14)}
    head = sum(p.numel() for name, p in model.named_parameters()
               if not name.startswith("maps.encoder."))
    assert deep[1.0] == head
    del deep[1.0], flat[1.0]
    assert deep == flat


# ---- scenes ----

def test_shapes_are_drawn_as_they_always_were():
    """Sums over an image, from the code before the drawing of one shape became a function.

    Not a hash: another CPU's sine may round one pixel in a million differently. Another order of
    draws changes the sums by far more."""
    sums = {
        (96, 96, 0, "train"): (146286360, 155595680, 194046085, 145127193, 180440264, 165027070),
        (64, 112, 3, "val"): (79339832, 126652200, 106366600, 124662739, 120850533, 64876581)}
    for (H, W, seed, split), expected in sums.items():
        source = data.Shapes(split, (H, W), seed)
        weights = torch.arange(3 * H * W).view(3, H, W) % 97  # a shifted object changes the sum
        for i, value in enumerate(expected):
            assert abs(int((source.read(i).long() * weights).sum()) - value) < 1000


def test_masks_are_disjoint_boxes_are_tight_and_the_label_lies_under_each_mask():
    objects, semantic = Scenes("train", (64, 80)), Semantic("train", (64, 80))
    for i in range(60):
        image, target = objects.read(i)
        _, classes = semantic.read(i)
        masks, boxes, labels = (target[k] for k in ("masks", "boxes", "labels"))
        assert image.shape == (3, 64, 80) and image.dtype == torch.uint8
        assert masks.dtype == classes.dtype == torch.uint8
        assert masks.sum(0).max() <= 1 and len(masks) == len(boxes) == len(labels) <= 4
        for mask, (x1, y1, x2, y2), label in zip(masks, boxes.int().tolist(), labels):
            assert 1 <= label <= 10 and (classes[mask.bool()] == label).all() and mask.sum() >= 16
            assert mask[y1:y2, x1:x2].sum() == mask.sum()    # nothing outside
            edges = mask[y1, :], mask[y2 - 1, :], mask[:, x1], mask[:, x2 - 1]
            assert all(edge.any() for edge in edges)
            ground = image[:, classes == 0].float().mean()
            assert image[:, mask.bool()].float().mean() > ground             # lighter
        assert (classes[~masks.bool().any(0)] == 0).all()

    image = objects.read(7)[0]
    assert torch.equal(image, Scenes("train", (64, 80)).read(7)[0])          # by the index alone
    assert not torch.equal(image, Scenes("val", (64, 80)).read(7)[0])
    assert not torch.equal(image, objects.read(8)[0])


@pytest.mark.parametrize("scenes, collate", [(Scenes, dense.listed), (Semantic, dense.stacked)])
def test_a_batch_of_scenes_crosses_a_worker_as_plain_tensors(scenes, collate):
    source = scenes("train", (32, 32))
    samples = data.ImageDataset(source, nn.Identity(), 0)
    loader = make_loader(samples, [[(0, 3), (0, 5)]], 1, Distributed(), collate)
    images, targets, index, broken = next(iter(loader))
    assert index.tolist() == [3, 5] and broken.tolist() == [-1, -1]
    for k, i in enumerate((3, 5)):
        image, target = source.read(i)
        assert torch.equal(images[k], image)
        if isinstance(targets[k], dict):
            assert torch.equal(targets[k]["boxes"], target["boxes"])
        else:
            assert torch.equal(targets[k], target)


# ---- the schedules ----

def test_learning_rates_as_released():
    steps = SimpleNamespace(total=160_000, warmup=1500)
    poly = segment.parse(["--data", "ade", "--init", "scratch", "--arch", "resnet50"])
    assert (poly.lr, poly.iterations, poly.warmup) == (0.01, 160_000, 0)     # FCN's
    assert dense.rate(0, steps, 0.01, poly) == pytest.approx(1e-8)           # mmsegmentation: 1e-6
    held = SimpleNamespace(schedule="steps", milestones=(), min_lr=0.0)
    assert dense.rate(0, steps, 0.02, held) == pytest.approx(2e-5)           # mmdetection: 0.001
    assert dense.rate(80_000, steps, 0.01, poly) == pytest.approx(1e-4 + 0.0099 * 0.5**0.9)
    assert dense.rate(160_000, steps, 0.01, poly) == pytest.approx(1e-4)
    line = SimpleNamespace(schedule="poly", power=1.0, min_lr=0.0)
    half_way = (1 - 0.5 * (1 - 1e-6)) * (1 - 750 / 160_000)
    assert dense.rate(750, steps, 1.0, line) == pytest.approx(half_way)
    tenths = SimpleNamespace(schedule="steps", milestones=(8 / 12, 11 / 12), min_lr=0.0)
    twelve = SimpleNamespace(total=12, warmup=0)
    rates = [round(dense.rate(t, twelve, 1.0, tenths), 6) for t in range(12)]
    assert rates == [1.0] * 8 + [0.1] * 3 + [0.01]


def test_iterations_are_iterations_and_typed_epochs_beat_those_of_a_recipe():
    flags = dict(recipe_batch=16, batch_size=None, accum=1, warmup_epochs=None, epochs=20,
                 iterations=160_000, warmup=1500, given={})
    steps = dense.plan_steps(SimpleNamespace(**flags, typed=[]), Distributed(), 20_210, None)
    assert (steps.total, steps.per_epoch, steps.warmup) == (160_000, 1263, 1500)
    typed = SimpleNamespace(**flags, typed=["epochs"])
    steps = dense.plan_steps(typed, Distributed(), 20_210, None)
    assert (steps.total, steps.warmup) == (20 * 1263, 1500)
    flags["iterations"] = 50
    short = SimpleNamespace(**flags, typed=[])
    assert dense.plan_steps(short, Distributed(), 20_210, None).warmup == 5
    # begun with --iterations 50, resumed with --epochs 2: what was typed last counts
    flags |= dict(epochs=2, given={"epochs": 2})
    resumed = SimpleNamespace(**flags, typed=["epochs", "iterations"])
    assert dense.plan_steps(resumed, Distributed(), 20_210, None).total == 2 * 1263
    # few images: 3,000 epochs of 16 images, which no flag accepts, are not saved
    flags |= dict(iterations=160_000, epochs=20, given={})
    few = SimpleNamespace(**flags, typed=[])
    assert dense.plan_steps(few, Distributed(), 16, None).total == 160_000 and few.epochs == 20


# ---- the heads ----

def test_upernet_of_known_weights_gives_the_sum_that_a_pencil_gives():
    """Width 1, every kernel has a one in its middle, the four maps are constant.

    The levels are d, c + d, b + c + d and a + b + c + d, and the head adds them."""
    head = pixels.UPerNet([1, 1, 1, 1], 1).eval()
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            middle = module.kernel_size[0] // 2
            nn.init.zeros_(module.weight)
            module.weight.data[:, :, middle, middle] = 1.0
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    head.pooled[0].weight.data[:, 1:] = 0                    # the map itself, without its pools
    a, b, c, d = 1.0, 10.0, 100.0, 1000.0
    maps = [torch.full((2, 1, 16 // s, 24 // s), value)
            for s, value in zip((1, 2, 4, 8), (a, b, c, d))]
    close(head(maps), torch.full((2, 1, 16, 24), a + 2 * b + 3 * c + 4 * d))

    # the first pool alone: the mean of the coarsest map
    head.pooled[0].weight.data[:] = 0
    head.pooled[0].weight.data[:, 1, 1, 1] = 1.0
    maps = [torch.zeros_like(z) for z in maps]
    maps[3] = torch.rand(2, 1, 2, 3)
    close(head(maps), 4 * maps[3].mean((2, 3), keepdim=True).expand(2, 1, 16, 24))


def test_upernet_of_a_resnet50_for_ade20k_has_40_6_million_parameters():
    w = 512
    pools = 4 * (2048 * w + 2 * w)                           # 1x1; 2w: of BatchNorm
    pooled = (2048 + 4 * w) * w * 9 + 2 * w                  # 3x3
    laterals = (256 + 512 + 1024) * w + 3 * 2 * w            # 1x1
    smooth = 3 * (9 * w * w + 2 * w)                         # 3x3
    fuse = 4 * w * w * 9 + 2 * w                             # 3x3
    last = 150 * w + 150                                     # 1x1, to the classes
    by_hand = pools + pooled + laterals + smooth + fuse + last
    with torch.device("meta"):
        head = nn.Sequential(pixels.UPerNet([256, 512, 1024, 2048], w), nn.Conv2d(w, 150, 1))
    assert sum(p.numel() for p in head.parameters()) == by_hand
    assert round(by_hand / 1e6, 1) == 40.6


def test_the_dilated_resnet_is_torchvisions_with_the_same_weights():
    encoder = build_encoder("resnet50")
    model = pixels.Segmenter(encoder, "fcn", 8, 5, 0.0, aux=True).eval()
    other = tv.resnet50(replace_stride_with_dilation=[False, True, True], zero_init_residual=True)
    other.fc = nn.Identity()
    other.load_state_dict(encoder.backbone.state_dict())
    x, net = torch.randn(1, 3, 64, 64), other.eval()
    z = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))
    third, fourth = net.layer3(z), net.layer4(net.layer3(z))
    assert fourth.shape == (1, 2048, 8, 8)                   # stride 8
    found = model.maps(x)
    close(found[2], third)
    close(found[3], fourth)
    assert model(x)[0].shape == (1, 5, 8, 8)
    # the second head is for training alone
    assert len(model(x)) == 1 and len(model.train()(torch.randn(2, 3, 64, 64))) == 2


def test_a_narrow_head_learns_the_classes_of_8_scenes_by_heart_in_20_steps():
    """If its last weights start with the released std of 0.01, it finds 13 % of the objects'
    pixels by then."""
    model = pixels.Segmenter(build_encoder("resnet18"), "upernet", 64, 11, 0.0, aux=False)
    scenes = Semantic("train", (64, 64))
    images, classes, *_ = dense.stacked([(scenes.read(i), i, -1) for i in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(20):
        logits = model(data.normalise(images))[0]
        segment.pixel_loss(logits, classes.long()).backward()
        optimizer.step()
        optimizer.zero_grad()
    right = segment.resize(logits, (64, 64)).argmax(1) == classes
    assert right[classes > 0].float().mean() > 0.6


# ---- loss and score ----

def test_the_loss_is_the_mean_over_known_pixels_and_0_without_any():
    logits, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(3, (2, 4, 4))
    labels[:, 1:3] = 255
    known = [(b, y, x) for b in range(2) for y in (0, 3) for x in range(4)]
    by_hand = [-logits[b, :, y, x].log_softmax(0)[labels[b, y, x]] for b, y, x in known]
    close(segment.pixel_loss(logits, labels), torch.stack(by_hand).mean())
    nothing = segment.pixel_loss(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()            # cross_entropy's own mean is nan here


def test_miou_against_counting_pixels_one_by_one():
    labels = torch.randint(4, (6, 8, 9))                     # class 4 never occurs
    predicted = torch.randint(4, (6, 8, 9))
    labels[torch.rand(6, 8, 9) < 0.2] = 255
    both = zip(labels.flatten().tolist(), predicted.flatten().tolist())
    pairs = [(t, g) for t, g in both if t != 255]            # truth and guess of a known pixel
    confusion = torch.zeros(5, 5, dtype=torch.double)
    for t, g in pairs:
        confusion[t, g] += 1
    ious, accuracies = [], []
    for c in range(4):
        right = sum(t == g == c for t, g in pairs)
        ious.append(right / sum(t == c or g == c for t, g in pairs))
        accuracies.append(right / sum(t == c for t, _ in pairs))
    right = sum(t == g for t, g in pairs)
    object_in_both = sum(t > 0 and g > 0 for t, g in pairs)
    object_in_either = sum(t + g > 0 for t, g in pairs)

    result = segment.score(confusion, ["ground", "a", "b", "c", "d"])
    assert result["miou"] == pytest.approx(sum(ious) / 4) and math.isnan(result["iou"][4])
    assert result["pixel_accuracy"] == pytest.approx(right / len(pairs))
    assert result["class_accuracy"] == pytest.approx(sum(accuracies) / 4)
    assert result["found"] == pytest.approx(object_in_both / object_in_either)
    assert "found" not in segment.score(confusion, list("abcde"))


@pytest.mark.parametrize("size", [(32, 32), (32, 100), (61, 75), (20, 50), (9, 7)])
def test_windows_cover_every_pixel_and_overlaps_are_averaged(size):
    x, shapes = torch.randn(2, 3, *size), []

    def identity(window):
        shapes.append(window.shape)
        return window

    close(segment.slide(identity, x, (32, 32)), x)
    assert set(shapes) == {(2, 3, 32, 32)}
    # as mmsegmentation counts windows
    rows, columns = (max(side - 32 + 21 - 1, 0) // 21 + 1 for side in size)
    assert len(shapes) == rows * columns

    order = iter(range(100))

    def number(window):
        return torch.full_like(window[:, :1], next(order))

    got = segment.slide(number, torch.zeros(1, 3, 32, 53), (32, 32))         # windows at 0 and 21
    close(got[0, 0, 5], torch.tensor([0.0] * 21 + [0.5] * 11 + [1.0] * 21))


# ---- files ----

def test_class_numbers_from_gray_palette_and_16_bit_pngs(tmp_path):
    values = np.arange(12).reshape(3, 4)
    values[0, 0] = 255
    for mode in ("L", "P"):
        numbers(tmp_path / f"{mode}.png", values, mode)
        assert np.array_equal(pixels.read_labels(str(tmp_path / f"{mode}.png")), values)
    palette = Image.open(tmp_path / "P.png")
    # the gray of its colour is another number
    assert palette.mode == "P" and palette.convert("L").getpixel((1, 0)) != 1
    values[0, 0] = 65535
    numbers(tmp_path / "deep.png", values, "I;16")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    found = pixels.read_labels(str(tmp_path / "deep.png"))
    assert found.flatten().tolist() == [255, *range(1, 12)]

    values[0, 0] = 300
    numbers(tmp_path / "large.png", values, "I;16")
    Image.new("RGB", (4, 3)).save(tmp_path / "rgb.png")
    for name, words in (("large", "class 300; the most is 254"),
                        ("rgb", "RGB, 4 x 3; expected one channel of class")):
        with pytest.raises(ValueError, match=words):
            pixels.read_labels(str(tmp_path / f"{name}.png"))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_class_numbers_of_a_gray_png_of_few_bits_are_read_as_they_are(bits, tmp_path):
    """The file follows the PNG specification: rows of a filter byte 0 and packed numbers."""
    values = (np.arange(16).reshape(2, 8) % 2**bits).astype(np.uint8)
    rows = b""
    for row in values:
        digits = "".join(f"{number:0{bits}b}" for number in row)     # 8 numbers are `bits` bytes
        rows += b"\0" + int(digits, 2).to_bytes(bits)
    (tmp_path / "gray.png").write_bytes(png(8, 2, bits, 0, rows))
    assert np.array_equal(pixels.read_labels(str(tmp_path / "gray.png")), values)


def test_hue_turns_by_up_to_a_tenth_of_the_circle():
    """mmsegmentation: 18 of OpenCV's 180 steps. Orange has the hue 1/12."""
    orange = torch.tensor([200, 125, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    distort, turns = pixels.Distort(), []
    for _ in range(300):
        r, g, b = (distort(tv_tensors.Image(orange))[:, 0, 0] / 255).tolist()
        turns.append((colorsys.rgb_to_hsv(r, g, b)[0] - 1 / 12 + 0.5) % 1 - 0.5)
    assert -0.11 < min(turns) < -0.08 and 0.08 < max(turns) < 0.11


def test_image_and_classes_are_cropped_and_flipped_together():
    args = SimpleNamespace(image_size=20, scale_min=1.0, scale_max=1.0, same_class=1.0,
                           distort=False)
    labels = torch.arange(20 * 60).view(20, 60).remainder(11).to(torch.uint8)
    image = (20 * labels).expand(3, -1, -1).contiguous()
    pair = tv_tensors.Image(image), tv_tensors.Mask(labels)
    flipped = set()
    for i in range(20):
        torch.manual_seed(i)
        got, classes = pixels.ScaleCropFlip(args)(pair)
        assert got.shape == (3, 20, 20)
        assert torch.equal(got[0], 20 * classes)             # each pixel kept its class
        flipped.add(bool((classes[0, 1].long() - classes[0, 0].long()) % 11 == 10))
    assert flipped == {True, False}

    high = tuple(part.transpose(-1, -2) for part in pair)    # 60 x 20: other rows
    rows = set()
    for i in range(20):
        torch.manual_seed(i)
        got, classes = pixels.ScaleCropFlip(args)(high)
        assert got.shape == (3, 20, 20) and torch.equal(got[0], 20 * classes)
        rows.add(int(classes[0, 0]))
    assert len(rows) > 4                                     # flips alone would give two

    args.scale_min = args.scale_max = 0.5                    # 10 x 30, padded to 20 x 20
    got, classes = pixels.ScaleCropFlip(args)(pair)
    assert (classes[10:] == 255).all() and (classes[:10] != 255).all()
    assert data.normalise(got[None])[0, :, 10:].abs().max() < 0.02           # the mean colour


def test_the_scale_of_a_crop_is_drawn_between_its_bounds():
    """Columns numbered by their places: at scale s, neighbours of a crop are 1 / s apart."""
    places = torch.arange(80, dtype=torch.uint8).expand(80, 80).contiguous()
    pair = (tv_tensors.Image(torch.zeros(3, 80, 80, dtype=torch.uint8)), tv_tensors.Mask(places))
    args = SimpleNamespace(image_size=40, scale_min=1.0, scale_max=2.0, same_class=1.0,
                           distort=False)
    spans = []
    for i in range(60):
        torch.manual_seed(i)
        _, classes = pixels.ScaleCropFlip(args)(pair)
        spans.append(int(classes[0].max()) - int(classes[0].min()))
    assert 38 <= min(spans) < 44 and 72 < max(spans) <= 79   # 40 columns at scale 2, 80 at scale 1


def test_labels_are_resized_by_the_centres_of_pixels_as_images_are():
    """Each column's number is its own place: after the resize they are the places of the new
    columns. By the corners of pixels they would be 1.4 less."""
    places = torch.arange(240, dtype=torch.uint8).expand(240, 240).contiguous()
    pair = (tv_tensors.Image(torch.zeros(3, 240, 240, dtype=torch.uint8)),
            tv_tensors.Mask(places))
    args = SimpleNamespace(image_size=64, scale_min=1.0, scale_max=1.0, same_class=1.0,
                           distort=False)
    _, got = pixels.ScaleCropFlip(args)(pair)
    expected = (torch.arange(64) + 0.5) * 240 / 64 - 0.5
    difference = got[0].float().sort().values - expected     # sorted: it may be flipped
    assert difference.abs().max() <= 0.5 and difference.mean().abs() < 0.2


def test_padding_is_the_mean_colour_whatever_the_photometric_changes():
    image = torch.full((3, 10, 40), 200, dtype=torch.uint8)
    pair = tv_tensors.Image(image), tv_tensors.Mask(torch.zeros(10, 40, dtype=torch.uint8))
    args = SimpleNamespace(image_size=20, scale_min=0.5, scale_max=0.5, same_class=1.0,
                           distort=True)
    for seed in range(5):
        torch.manual_seed(seed)
        got, classes = pixels.ScaleCropFlip(args)(pair)
        padded = data.normalise(got[None])[0][:, classes == 255]
        assert padded.numel() and padded.abs().max() < 0.02


def test_the_photometric_changes_do_not_depend_on_the_padding():
    """Contrast blends with the mean gray of the image, in which padding has no part."""
    image = torch.randint(0, 256, (3, 20, 40), dtype=torch.uint8)
    pair = tv_tensors.Image(image), tv_tensors.Mask(torch.zeros(20, 40, dtype=torch.uint8))
    seen = {}
    for height in (20, 60):                                  # without padding, and with
        args = SimpleNamespace(image_size=(height, 40), scale_min=20 / min(height, 40),
                               scale_max=20 / min(height, 40), same_class=1.0, distort=True)
        torch.manual_seed(3)
        seen[height] = pixels.ScaleCropFlip(args)(pair)[0]
    assert not torch.equal(seen[20], image) and seen[60].shape == (3, 60, 40)
    assert torch.equal(seen[20], seen[60][:, :20])


def test_an_image_so_slim_that_no_feature_would_be_left_is_padded():
    args = SimpleNamespace(head="upernet", inference="whole", image_size=96, amp="off",
                           channels_last=False, arch="convnext_tiny")
    net = segment.Segmenter(build_encoder("convnext_tiny"), "upernet", 8, 3, 0.0, False).eval()
    images = torch.zeros(1, 3, 30, 384, dtype=torch.uint8)
    with torch.no_grad():
        found = segment.predict(net, images, (100, 1300), args, Distributed())
    assert found.shape == (1, 100, 1300)


def test_a_crop_of_one_class_is_drawn_again():
    """3 of the 61 crops of 20 x 20 show both classes. Ten draws find one of them more often."""
    labels = torch.zeros(20, 80, dtype=torch.uint8)
    labels[:, :3] = 1
    args = SimpleNamespace(image_size=20, scale_min=1.0, scale_max=1.0, distort=False)
    image = torch.zeros(3, 20, 80, dtype=torch.uint8)
    pair = tv_tensors.Image(image), tv_tensors.Mask(labels)

    def crops_of_both_classes(same_class):
        args.same_class = same_class
        crops = [pixels.ScaleCropFlip(args)(pair)[1] for _ in range(200)]
        return sum(len(crop.unique()) == 2 for crop in crops)

    # 200 (1 - (58/61)^10) = 79, give or take 7; and 200 * 3/61 = 10, give or take 3
    assert crops_of_both_classes(0.99) > 50 > 25 > crops_of_both_classes(1.0)


def test_the_longer_side_is_at_most_four_times_the_short_one_that_is_asked_for():
    assert pixels.fitted(torch.zeros(3, 100, 300), 50).shape == (3, 50, 150)
    assert pixels.fitted(torch.zeros(3, 1000, 100), 50).shape == (3, 200, 20)


# ---- lists of classes ----

def labelled_set(root, train, val=None, size=(40, 48)):
    """A folder with one image per entry: its label picture holds these numbers, in columns."""
    rng = np.random.default_rng(0)
    for split, pictures in (("train", train), ("val", train if val is None else val)):
        for i, held in enumerate(pictures):
            noise(root / "images" / split / f"{i}.png", size, rng)
            values = np.resize(np.array(held), size[1])
            numbers(root / "annotations" / split / f"{i}.png", np.tile(values, (size[0], 1)))
    return root


def opened(root, **flags):
    settings = dict(data=str(root), zero_is_other=None, split_val=None, ignore=()) | flags
    return pixels.open_pairs(SimpleNamespace(**settings), "train", Distributed())


def test_a_label_picture_without_a_known_pixel_counts_no_class(tmp_path):
    root = labelled_set(tmp_path / "set", [(255,), (0, 1, 3)])
    assert opened(root).classes == ["0", "1", "2", "3"]
    assert (opened(root).read(0)[1] == 255).all()


def test_classes_that_no_label_picture_holds_are_named(tmp_path, capsys):
    root = labelled_set(tmp_path / "set", [(0, 4), (255, 2)])
    (root / "classes.txt").write_text("sky\nroad\ncar\ntree\nsign\ndog\ncat\ncow\n")
    assert len(opened(root).classes) == 8
    printed, folder = capsys.readouterr().err, root / "annotations" / "train"
    named = "1 (road), 3 (tree), 5 (dog) and 2 more classes"
    assert f"no label picture in {folder} holds class {named}" in printed
    args = SimpleNamespace(data=str(root), zero_is_other=None, split_val=None, ignore=())
    trained = pixels.open_pairs(args, "val", Distributed(), count=8)         # knows its classes
    assert len(trained.classes) == 8 and capsys.readouterr().err == ""


@pytest.mark.parametrize("content, names", [
    ("sky\nroad\n".encode("utf-8-sig"), ["sky", "road"]),
    ("\r\n sky \r\n\r\nWeiß\r\n".encode(), ["sky", "Weiß"])])
def test_classes_txt_with_a_byte_order_mark_or_blank_lines(content, names, tmp_path):
    root = labelled_set(tmp_path / "set", [(0, 1)])
    (root / "classes.txt").write_bytes(content)
    assert opened(root).classes == names


@pytest.mark.parametrize("content, words", [
    ("sky\nWeiß\n".encode("latin-1"), "classes.txt: is not UTF-8 text; save it as UTF-8"),
    ("sky\nroad\n".encode("utf-16"), "classes.txt: is not UTF-8 text; save it as UTF-8"),
    ("sky\nroad\n".encode("utf-16-le"), "classes.txt: is not UTF-8 text; save it as UTF-8"),
    (b"", "classes.txt: lists no classes; expected 2 to 255"),
    (b"\xef\xbb\xbf\n", "classes.txt: lists no classes; expected 2 to 255"),
    (b"road\n", "classes.txt: lists 1 class; expected 2 to 255"),
    (b"road\n" * 256, "classes.txt: lists 256 classes; expected 2 to 255"),
    (b"background\nroad\n", "hold class 0 alone; none holds class 1 (road); expected PNG")])
def test_lists_of_classes_that_cannot_be_used_get_one_line(content, words, tmp_path, capsys):
    root = labelled_set(tmp_path / "set", [(0, 255), (255, 0)])   # masks in which 255 is the object
    (root / "classes.txt").write_bytes(content)
    code, printed = complaint(capsys, *SMALL_NET, "--data", root, "--out", tmp_path / "run")
    assert code == 2 and printed.startswith("segment.py: error: ") and words in printed
    assert not (tmp_path / "run").exists()


ONE_STEP = ("--init scratch --arch resnet18 --width 16 --image-size 64 --workers 0 --amp off "
            "--head fcn --batch-size 1 --iterations 1").split()


def test_a_class_without_a_validation_pixel_is_a_dash_and_null(tmp_path, capsys, monkeypatch):
    """A third of the pixels is class 0, the rest class 2. All but one are taken for class 2."""
    root = labelled_set(tmp_path / "set", [(0, 1, 2, 3)], [(0, 2, 2)])
    (root / "classes.txt").write_text("background\nroad\ncar\ntree\n")

    def predict(model, images, size, *rest):
        classes = torch.full((1, *size), 2)
        classes[:, 0, 0] = 1
        return classes

    monkeypatch.setattr(segment, "predict", predict)
    result = run(tmp_path / "run", *ONE_STEP, "--data", root)
    printed, car = capsys.readouterr().err, pytest.approx(2 / 3, abs=1e-3)
    table = [line.split() for line in printed.splitlines()]
    rows = [["class", "IoU", "accuracy"], ["background", "0.0", "0.0"], ["road", "-", "-"],
            ["car", "66.7", "100.0"], ["tree", "-", "-"]]
    assert all(row in table for row in rows)
    assert "-: in no label picture for validation" in printed
    assert "predicted, so that mIoU counts it as 0: road" in printed
    assert result["per_class"] == {"background": 0, "road": None, "car": car, "tree": None}
    assert result["miou"] == pytest.approx(2 / 3 / 3, abs=1e-3)              # background, road, car


def test_without_any_object_their_iou_is_a_dash_and_null(tmp_path, capsys, monkeypatch):
    root = labelled_set(tmp_path / "set", [(0, 1)], [(0,)])
    (root / "classes.txt").write_text("background\nroad\n")

    def no_object(model, images, size, *rest):
        return torch.zeros(1, *size, dtype=torch.long)

    monkeypatch.setattr(segment, "predict", no_object)
    result = run(tmp_path / "run", *ONE_STEP, "--data", root)
    assert "any object, as one class, - %" in capsys.readouterr().err
    assert result["found"] is None
    for file in (root / "annotations" / "val").iterdir():
        numbers(file, np.full((40, 48), 255))
    code, printed = complaint(capsys, *ONE_STEP, "--data", root, "--out", tmp_path / "unknown")
    assert code == 1 and "no image for validation has a pixel of a known class" in printed


# ---- whole runs ----

@pytest.fixture
def few_scenes(monkeypatch):
    limit_scenes(monkeypatch, train=16, val=6)


def test_recomputed_modules_give_the_same_gradients():
    gradients = []
    for flags in ([], ["--grad-checkpoint"]):
        args = segment.parse(["--data", "shapes", "--init", "scratch", "--arch", "convnext_tiny",
                              "--image-size", "64", *flags])
        torch.manual_seed(0)
        encoder = dense.start_encoder(args, Distributed(), None)
        maps = dense.Maps(encoder)
        calls = []
        encoder.backbone.features[1].register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)                                 # of stochastic depth
        features = maps(torch.ones(1, 3, 64, 64))
        sum(z.square().sum() for z in features).backward()
        assert len(calls) == (2 if flags else 1)             # the backward pass runs it again
        gradients.append([p.grad for p in encoder.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_recomputing_is_refused_for_a_net_with_batchnorm(capsys, tmp_path):
    code, said = testing.complaint(
        capsys, "--data", "shapes", "--init", "scratch", "--arch", "resnet18", "--grad-checkpoint",
        "--out", tmp_path / "run", main=segment.main)
    assert code == 2 and "--grad-checkpoint: this net has BatchNorm" in said


def run(out, *flags):
    segment.main([*map(str, flags), "--out", str(out)])
    return json.loads((out / "result.json").read_text())


def evaluated(out, weights, data):
    """The result of --eval-only. The run remembers head, width, size and windows."""
    return run(out, "--weights", weights, "--data", data, "--eval-only", "--workers", 0,
               "--amp", "off")


def complaint(capsys, *flags):
    """(exit code, last line of stderr) of segment.py with flags that must be refused."""
    code, printed = testing.complaint(capsys, *flags, main=segment.main)
    return code, printed.strip().splitlines()[-1]


def ade(root, count=8):
    """ADE20K's layout: classes 1 to 150, 0 is other; here 3 of them are drawn."""
    rng = np.random.default_rng(0)
    for part, short in (("training", "train"), ("validation", "val")):
        for i in range(count):
            size = (70 + i, 90 - i)
            noise(root / "images" / part / f"ADE_{short}_{i:08}.jpg", size, rng)
            values = rng.integers(0, 4, size)
            numbers(root / "annotations" / part / f"ADE_{short}_{i:08}.png", values)
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    lines += [f"{i}\t0.1\t1\t1\tclass {i}, thing" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")


def test_ade20k_trains_on_150_classes_and_its_0_is_ignored(tmp_path, capsys):
    ade(tmp_path / "ade")
    source = opened(tmp_path / "ade")
    raw = np.array(Image.open(tmp_path / "ade/annotations/training/ADE_train_00000003.png"))
    image, labels = source.read(3)
    assert image.shape[1:] == labels.shape == (73, 87) and source.classes[0] == "class 1, thing"
    is_other = raw == 0
    assert (labels.numpy()[is_other] == 255).all()
    assert (labels.numpy()[~is_other] == raw[~is_other] - 1).all()
    result = run(tmp_path / "run", *SMALL_NET, "--data", tmp_path / "ade", "--recipe", "fcn",
                 "--iterations", 2, "--inference", "slide")
    assert len(result["per_class"]) == 150 and result["recipe"] == "fcn"
    assert Image.open(tmp_path / "run" / "segmentation.png").height > 6 * 160
    again = evaluated(tmp_path / "eval", tmp_path / "run" / "best.pt", tmp_path / "ade")
    assert again["miou"] == result["miou"] and again["per_class"] == result["per_class"]


def test_labels_that_cannot_be_used_are_skipped_named_and_counted(tmp_path, capsys):
    ade(tmp_path / "ade")
    labels, rng = tmp_path / "ade" / "annotations" / "training", np.random.default_rng(1)
    (labels / "ADE_train_00000001.png").unlink()
    numbers(labels / "ADE_train_00000002.png", rng.integers(0, 4, (10, 12)))
    numbers(labels / "ADE_train_00000003.png", np.full((73, 87), 151))
    (tmp_path / "ade/annotations/validation/ADE_val_00000000.png").unlink()
    run(tmp_path / "run", *SMALL_NET, "--data", tmp_path / "ade", "--epochs", 2)
    listed = (tmp_path / "run" / "broken.txt").read_text().splitlines()
    assert len(listed) == 3 and read_log(tmp_path / "run")[-1]["broken"] == 3
    assert "ADE_train_00000001.jpg (no label picture" in listed[0]
    assert "its label picture has 12 x 10 pixels, the image 88 x 72" in listed[1]
    assert "its label picture holds class 151; there are 150 classes" in listed[2]
    assert "1 images cannot be read and are left out of the count" in capsys.readouterr().err
    code, printed = complaint(capsys, *SMALL_NET, "--data", tmp_path / "ade", "--epochs", 2,
                              "--max-bad", 0.1, "--out", tmp_path / "strict")
    assert code == 1 and re.search("[123] of 8 images cannot be read", printed)


@pytest.mark.parametrize("split, words", [("train", "training"), ("val", "validation")])
def test_a_set_without_a_usable_image_is_refused_with_its_reason(split, words, tmp_path, capsys):
    root = labelled_set(tmp_path / "set", [(0, 1)] * 4)
    for file in (root / "annotations" / split).iterdir():
        numbers(file, np.array([[0, 1]]))
    code, printed = complaint(capsys, *SMALL_NET, "--data", root, "--out", tmp_path / "run")
    reason = "(its label picture has 2 x 1 pixels, the image 48 x 40) and the others"
    unusable = f"none of the images for {words} can be used"
    assert code == 2 and f"{unusable}: {root}/images/{split}/0.png {reason}" in printed
    assert not (tmp_path / "run").exists()


def test_validation_images_that_are_left_out_are_named_and_not_counted(tmp_path, capsys):
    root = labelled_set(tmp_path / "set", [(0, 1)] * 4)
    (root / "annotations" / "val" / "2.png").unlink()
    result = run(tmp_path / "run", *SMALL_NET, "--data", root, "--iterations", 1)
    printed = capsys.readouterr().err
    assert result["images"] == 3
    assert re.search("1 images cannot be read and are left out .*/2.png .no label picture", printed)


TWO_EPOCHS = [*SMALL_NET, "--data", "shapes", "--batch-size", 8, "--epochs", 2, "--eval-every", 1]


def test_training_goes_on_in_training_mode_after_an_evaluation(few_scenes, tmp_path, monkeypatch):
    step, modes = segment.train_step, []

    def noted(number, batches, args, world, state):
        modes.append(state.model.training)
        return step(number, batches, args, world, state)

    monkeypatch.setattr(segment, "train_step", noted)
    run(tmp_path / "run", *TWO_EPOCHS)
    assert len(modes) > 1 and all(modes)


def test_a_step_uses_the_lr_of_its_batch_its_layer_and_its_schedule(few_scenes, tmp_path,
                                                                    monkeypatch):
    """The head has lr x 8 / 4, the stem half of it for each of the five levels above it; poly with
    power 1 falls by a half over the first half."""
    step, rates = segment.train_step, []

    def noted(number, batches, args, world, state):
        rates.append([group["lr"] for group in state.optimizer.param_groups])
        return step(number, batches, args, world, state)

    monkeypatch.setattr(segment, "train_step", noted)
    run(tmp_path / "run", *SMALL_NET, "--data", "shapes", "--batch-size", 8, "--iterations", 4,
        "--lr", 0.01, "--lr-batch", 4, "--layer-decay", 0.5, "--schedule", "poly", "--power", 1,
        "--warmup", 0, "--min-lr", 0)
    assert max(rates[0]) == pytest.approx(0.02) and min(rates[0]) == pytest.approx(0.02 / 2**5)
    assert rates[2] == pytest.approx([rate / 2 for rate in rates[0]])


def same_score(monkeypatch):
    """Every evaluation gives a mIoU of one half."""
    evaluate = segment.evaluate

    def half(*given, **more):
        return evaluate(*given, **more) | {"miou": 0.5}
    monkeypatch.setattr(segment, "evaluate", half)


def test_best_pt_that_could_not_be_written_is_made_by_resume(few_scenes, tmp_path, monkeypatch):
    """A folder is in the place of the temporary file. The second score is no better."""
    same_score(monkeypatch)
    out = tmp_path / "run"
    (out / "best.pt.tmp").mkdir(parents=True)
    with contextlib.suppress(SystemExit):
        run(out, *TWO_EPOCHS)
    assert (out / "checkpoint.pt").is_file() and not (out / "best.pt").exists()
    (out / "best.pt.tmp").rmdir()
    result = run(out, "--resume")
    assert (out / "best.pt").is_file() and (result["best_miou"], result["best_epoch"]) == (0.5, 2)


def test_best_pt_that_is_gone_is_made_again(few_scenes, tmp_path, monkeypatch):
    """The checkpoint knows the first epoch's score, and the resumed run finds no better one."""
    same_score(monkeypatch)
    out = tmp_path / "run"
    run(out, *TWO_EPOCHS)
    (out / "best.pt").unlink()
    run(out, "--resume")
    assert (out / "best.pt").is_file()


def test_names_from_files_are_made_printable(tmp_path, capsys, monkeypatch):
    """A class name may move the cursor, and a file name may not be UTF-8."""
    def marked(text):
        return "<" + os.fsencode(text).decode("ascii", "backslashreplace") + ">"

    for module in (dense, pixels, segment):
        monkeypatch.setattr(module, "printable", marked, raising=False)
    root = labelled_set(tmp_path / "set", [(0, 1)] * 3)
    (root / "classes.txt").write_text("sky\nr\x1b[2Koad\nsea\n")
    os.rename(root / "annotations/val/1.png", root / "annotations/val/other.png")
    os.rename(root / "images/val/1.png", os.fsencode(root / "images/val") + b"/\xff.png")
    run(tmp_path / "run", *SMALL_NET, "--data", root, "--iterations", 1, "--batch-size", 2)
    printed = capsys.readouterr().err
    assert "holds class 2 (<sea>)" in printed and "<sky>" in printed and "<r\x1b[2Koad>" in printed
    assert f"<{root}/images/val/\\xff.png> (no label picture <" in printed
    assert printed.count("\x1b[2K") == printed.count("<r\x1b[2Koad>")


def test_voc_is_read_through_torchvision_with_its_border_ignored(tmp_path):
    root, rng = tmp_path / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in (("train", range(8)), ("val", range(8, 12))):
        (lists / f"{split}.txt").write_text("".join(f"2007_{i:06}\n" for i in names))
        for i in names:
            noise(root / "JPEGImages" / f"2007_{i:06}.jpg", (50, 60), rng)
            values = np.where(rng.random((50, 60)) < 0.1, 255, rng.integers(0, 21, (50, 60)))
            numbers(root / "SegmentationClass" / f"2007_{i:06}.png", values, "P")
    flags = ["--data", "voc", "--data-root", tmp_path, "--iterations", 2]
    result = run(tmp_path / "run", *SMALL_NET, *flags)
    assert list(result["per_class"]) == pixels.VOC and len(pixels.VOC) == 21 and "found" in result
    assert result["images"] == 4


def test_a_folder_without_names_counts_its_classes_and_other_archs_take_upernet(tmp_path):
    root, rng = tmp_path / "set", np.random.default_rng(0)
    for split in ("Train2020", "val"):
        for i in range(4):
            file = Path(split) / "deep" / f"{i}.png"
            noise(root / "images" / file, (40, 48), rng)
            numbers(root / "annotations" / file, rng.integers(0, 7, (40, 48)))
    flags = [*SMALL_NET, "--data", root, "--recipe", "upernet", "--iterations", 1]
    flags[flags.index("resnet18")] = "deit_tiny"
    result = run(tmp_path / "run", *flags)
    assert list(result["per_class"]) == list("0123456") and result["recipe"] == "upernet"
    assert json.loads((tmp_path / "run" / "args.json").read_text())["layer_decay"] == 0.65


def test_a_run_that_was_cut_resumes_into_the_uninterrupted_run(few_scenes, tmp_path, capsys):
    flags = [*SMALL_NET, "--data", "shapes", "--iterations", 6, "--save-every", 1,
             "--log-every", 1, "--dropout", 0.3]
    whole = run(tmp_path / "whole", *flags)
    with interrupted(segment, at=3):
        run(tmp_path / "cut", *flags)
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert run(tmp_path / "cut", "--resume") == whole
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
            for name in ("whole", "cut"))
    same_weights(a, b)


def test_two_processes_train_and_score_as_one_with_two_halves(tmp_path):
    """BatchNorm of a half is BatchNorm of a process, so that accumulation gives the gradients of
    two processes."""
    ade(tmp_path / "ade")
    # 7 images: two processes have 4 and 3
    (tmp_path / "ade/annotations/validation/ADE_val_00000002.png").unlink()
    flags = [*SMALL_NET, "--data", tmp_path / "ade", "--iterations", 2, "--dropout", 0,
             "--log-every", 1, "--optimizer", "sgd", "--lr", 0.1, "--warmup", 0]
    flags[flags.index("--batch-size") + 1] = "2"
    done = torchrun("extras/segment.py", *flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", *flags, "--accum", 2)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
            for name in ("one", "two"))
    for name, value in a.items():
        # BatchNorm's statistics are of one process, or of both halves
        if "running" not in name and "tracked" not in name:
            close(value, b[name], rtol=1e-3, atol=1e-5)
    again = evaluated(tmp_path / "eval", tmp_path / "two" / "best.pt", tmp_path / "ade")
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    # exact: every pixel counts once
    assert again["miou"] == two["miou"] and again["per_class"] == two["per_class"]


def test_without_data_it_is_the_demo_and_prints_what_it_starts_from(few_scenes, tmp_path,
                                                                    monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--iterations", "1", "--width", "8", "--workers", "0", "--amp", "off"]
    run(tmp_path / "scratch", *flags)
    printed = capsys.readouterr().err
    assert f"no {segment.DEMO} (python pretrain.py makes it): from random weights" in printed
    segment.DEMO.parent.mkdir(parents=True)
    torch.save(build_encoder("resnet18").backbone.state_dict(), segment.DEMO)
    run(tmp_path / "tuned", *flags)
    assert f"{segment.DEMO}: 120 tensors loaded" in capsys.readouterr().err


HUGE = "9" * 21
LIMITED = ("iterations epochs batch-size accum lr-batch warmup power weight-decay width aux "
           "eval-every").split()


@pytest.mark.parametrize("flags, words", [
    ("--data nowhere --init scratch --arch resnet18",
     "--data nowhere: no such folder; give one with images/ and"),
    ("--data empty --init scratch --arch resnet18",
     "no folder empty/images/train*; expected empty/images/train/x.jpg"),
    ("--data voc --init scratch --arch resnet18",
     "--data voc: no datasets/VOCdevkit/VOC2012/; give the folder that holds VOCdevkit/ as "
     "--data-root, or add --download to fetch it into datasets/"),
    ("--data shapes --arch resnet18", "give --weights FILE, or --init scratch"),
    ("--weights best.pt --arch resnet18 --eval-only", "--data is missing"),
    ("--data shapes --init scratch", "--arch is missing"),
    ("--resume --out new --data shapes --arch resnet18", "give --weights FILE, or --init scratch"),
    ("--data shapes --init scratch --arch convnext_tiny --head fcn",
     "--head fcn: is for ResNet alone"),
    ("--data shapes --init scratch --arch deit_tiny --inference whole",
     "--inference whole: deit_tiny has one grid"),
    ("--data shapes --init scratch --arch resnet18 --batch-size 1",
     "--batch-size 1: UPerNet's BatchNorm needs at"),
    ("--data shapes --init scratch --arch resnet18 --scale-min 3",
     "--scale-min 3: must not be above --scale-max 1"),
    ("--data shapes --init scratch --arch resnet18 --eval-only", "--eval-only: needs --weights"),
    ("--data shapes --weights text.pt --arch resnet18", "text.pt: not a file of weights"),
    ("--data shapes --weights other.pt --arch resnet18 --eval-only",
     "does not hold this backbone and head"),
    ("--data shapes --init scratch --arch resnet18 --image-size 8",
     "--image-size 8 px: both sides must be at least"),
    ("--data alike --init scratch --arch resnet18",
     "in alike/annotations/train hold class 0 alone"),
    ("--data shapes --init scratch --arch resnet18 --ignore 3",
     "--ignore: is for a folder, not for"),
    ("--data voc --init scratch --arch resnet18 --split-val test", "--split-val: is for a folder"),
    ("--data x --init scratch --ignore 255", "--ignore: 255: must be an integer from 0 to 254"),
    *((f"--{name} {HUGE}", f"--{name}: {HUGE}: must be ") for name in LIMITED),
    ("--weight-decay 1e308", "--weight-decay: 1e308: must be a number from 0 to 1000"),
    ("--iterations 1000000001", "must be an integer from 1 to 1000000000"),
])
def test_mistakes_are_answered_in_one_line_and_leave_no_folder(flags, words, tmp_path,
                                                               monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.pt").write_text("no weights")
    torch.save(build_encoder("resnet18").backbone.state_dict(), "other.pt")
    for split in ("train", "val"):
        noise(Path("alike/images") / split / "1.jpg", (8, 8), np.random.default_rng(0))
        numbers(Path("alike/annotations") / split / "1.png", np.zeros((8, 8)))
    code, printed = complaint(capsys, *flags.split(), "--workers", 0)
    assert code == 2 and printed.startswith("segment.py: error: ") and words in printed, printed
    assert not Path("runs").exists()


# ---- CamVid's layout, ignored numbers, colours ----

def test_camvids_folders_are_read_as_they_are_and_a_number_is_ignored(tmp_path):
    root = camvid(tmp_path / "CamVid")
    source = opened(root, ignore=[11])
    raw = np.array(Image.open(root / "trainannot" / "train-3.png"))
    assert len(source) == 8 and source.classes == ["0", "1", "2"]
    assert source.name(3) == f"{root}/train/train-3.png"
    assert np.array_equal(source.read(3)[1], np.where(raw == 11, 255, raw))
    assert opened(root).classes[-1] == "11"                  # without the flag it is a class
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    assert opened(root, ignore=[11]).classes == ["sky", "road", "car"]
    reason = "its label picture holds class 11; there are 3 classes; if it means unlabelled, give "
    assert reason + "--ignore 11" in opened(root).name(3)


def test_the_other_classes_keep_their_names_if_one_in_the_middle_is_ignored(tmp_path):
    root = labelled_set(tmp_path / "set", [(0, 1, 2, 3)])
    (root / "classes.txt").write_text("void\nsky\nroad\ncar\n")
    source = opened(root, ignore=[0, 2])
    assert source.classes == ["sky", "car"] and source.code.numbers == [1, 3]
    assert source.read(0)[1][0, :4].tolist() == [255, 0, 255, 1]
    (root / "classes.txt").write_text("sky\nroad\ncar\n")   # without void
    other = opened(root, ignore=[2], zero_is_other=True)
    assert other.classes == ["sky", "car"]
    assert other.read(0)[1][0, :4].tolist() == [255, 0, 255, 1]


def test_a_net_is_not_scored_on_classes_in_another_order(tmp_path, capsys):
    root = labelled_set(tmp_path / "set", [(0, 1, 2)] * 4)
    about = SimpleNamespace(arch="resnet18", patch_size=16, window=7, stem="imagenet")
    content = describe("segmenter", about, ["sky", "road", "car"], 64, data.MEAN, data.STD)
    (tmp_path / "model.json").write_text(json.dumps(content))
    torch.save({segment.LAST_BIAS: torch.zeros(3)}, tmp_path / "best.pt")
    (root / "classes.txt").write_text("road\nsky\ncar\n")
    code, said = complaint(capsys, "--data", root, "--arch", "resnet18", "--eval-only",
                           "--weights", tmp_path / "best.pt", "--out", tmp_path / "run")
    assert code == 2
    assert f"its classes (road, sky, car) are not those of {tmp_path}/best.pt (sky, road, " in said


def test_another_part_to_evaluate_on_and_evaluation_without_training_images(tmp_path, capsys):
    """The part for validation has 8 images, the one for tests 5."""
    root = camvid(tmp_path / "CamVid")
    for file in sorted((root / "test").iterdir())[5:]:
        file.unlink()
    flags = ["--data", root, "--ignore", 11]
    result = run(tmp_path / "run", *SMALL_NET, *flags, "--iterations", 2)
    printed = capsys.readouterr().err
    assert result["images"] == 8 and "recipe small (under 2,000 images), upernet, 64 px" in printed
    code, printed = complaint(capsys, *SMALL_NET, *flags, "--split-val", "train",
                              "--out", tmp_path / "no")
    assert code == 2 and "--split-val train: these images are trained on; choose another" in printed
    for name in ("train", "trainannot"):
        (root / name).rename(tmp_path / f"{name}-away")
    alone = ["--weights", tmp_path / "run" / "best.pt", "--data", root, "--eval-only",
             "--workers", 0, "--amp", "off"]                 # --ignore is remembered
    again = run(tmp_path / "val", *alone)
    assert again["miou"] == result["miou"] and again["per_class"] == result["per_class"]
    assert run(tmp_path / "test", *alone, "--split-val", "test")["images"] == 5
    for name in ("val", "valannot"):
        (root / name).rename(tmp_path / f"{name}-away")
    assert run(tmp_path / "without", *alone)["images"] == 5  # without val: test
    code, printed = complaint(capsys, *alone, "--split-val", "holiday", "--out", tmp_path / "no")
    assert code == 2 and f"no folder {root}/holiday*; expected {root}/holiday/x.jpg and" in printed
    assert "choose another part with --split-val" in printed and not (tmp_path / "no").exists()


def test_saved_predictions_have_the_same_miou_by_numpy(tmp_path):
    root = camvid(tmp_path / "CamVid")
    result = run(tmp_path / "run", *SMALL_NET, "--data", root, "--ignore", 1, 11, "--iterations", 3,
                 "--save-predictions")
    saved = tmp_path / "run" / "predictions"
    found = [np.array(Image.open(file)) for file in sorted(saved.iterdir())]
    assert {picture.shape for picture in found} == {(40, 48)}
    assert set(np.unique(found)) <= {0, 2}                   # the set's numbers, not 0 and 1
    miou = miou_by_numpy(root / "valannot", saved, [0, 2], [1, 11])
    assert result["miou"] == pytest.approx(miou, abs=1e-9)
    assert Image.open(saved / "val-0.png").mode == "P"       # shown in colours


def test_pictures_in_colours_are_read_by_the_colours_of_classes_txt(tmp_path):
    """A road has two colours. What has no listed colour is unlabelled."""
    root, rng = tmp_path / "set", np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "classes.txt").write_text("sky\t128 128 128\nroad 128,64,128\nroad 0 0 9\n"
                                      "traffic light, 255, 0, 0\n")
    colours = np.array([(128, 128, 128), (128, 64, 128), (0, 0, 9), (255, 0, 0), (0, 0, 0),
                        (128, 64, 129)], np.uint8)
    wanted = np.array([0, 1, 1, 2, 255, 255])
    for split in ("val", "train"):                           # `chosen` is then of the last one
        for i in range(2):
            chosen = rng.integers(0, 6, (40, 48))
            noise(root / "images" / split / f"{i}.jpg", (40, 48), rng)
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(colours[chosen])
            picture = picture.convert("RGBA") if i else picture
            picture.save(root / "annotations" / split / f"{i}.png")
    source = opened(root)
    assert source.classes == ["sky", "road", "traffic light"]
    assert np.array_equal(source.read(1)[1], wanted[chosen])
    shown = pixels.colours_of(source.classes, source.code)
    assert shown[:3].tolist() == [[128, 128, 128], [128, 64, 128], [255, 0, 0]]
    with pytest.raises(ValueError, match="--ignore: is for numbers, but .* lists colours"):
        opened(root, ignore=[2])
    by_number = pixels.LabelCode(["a", "b"], [0, 1])
    pairs = pixels.Pairs(source.images.tolist(), source.labels.tolist(), by_number)
    reason = "expected one channel of class numbers, or the colours of the classes in classes.txt"
    assert reason in pairs.name(0)


@pytest.mark.parametrize("text, words", [
    ("sky 1 2 3\nroad 4 5 6\ncar\n", "has colours, but not in the line car; write"),
    ("sky 1 2 3\nroad 4 5 300\n", "road 4 5 300: red, green and blue must be 0 to 255"),
    ("sky 1 2 3\nroad 1 2 3\n", "lists a colour twice; every colour means one class"),
    ("sky 1 2 3\nsky 4 5 6\n", "lists 1 class; expected 2 to 255"),
    ("sky 1 2 3\nroad 4 5 6\n", "hold no class; none holds class 0 (sky), 1 (road); expected PNG "
                                "files of the colours that classes.txt lists")])
def test_colours_that_cannot_be_used_get_one_line(text, words, tmp_path):
    root = labelled_set(tmp_path / "set", [(0, 1)])
    (root / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        opened(root)


def test_an_image_size_of_two_sides(tmp_path):
    """32 x 64 windows of an image that is 40 x 48, resized to 32 x 38."""
    root = camvid(tmp_path / "CamVid")
    args = SimpleNamespace(image_size=[32, 64], scale_min=1.0, scale_max=1.0, same_class=1.0,
                           distort=False)
    image, labels = pixels.ScaleCropFlip(args)(opened(root, ignore=[11]).read(0))
    assert image.shape == (3, 32, 64) and labels.shape == (32, 64)
    flags = [*SMALL_NET, "--data", root, "--ignore", 11, "--iterations", 1, "--inference", "slide"]
    flags[flags.index("--image-size"):flags.index("--image-size") + 2] = ["--image-size", 32, 64]
    flags[flags.index("resnet18")] = "deit_tiny"
    assert run(tmp_path / "run", *flags)["images"] == 8
    about = json.loads((tmp_path / "run" / "model.json").read_text())
    assert about["image_size"] == [32, 64] and about["numbers"] == [0, 1, 2]
    rows, columns = [], []

    def seen(window):
        rows.append(window.shape[-2])
        columns.append(window.shape[-1])
        return window

    picture = torch.randn(1, 3, 50, 100)
    close(segment.slide(seen, picture, (32, 64)), picture)
    assert set(rows) == {32} and set(columns) == {64} and len(rows) == 2 * 2


def test_a_small_set_has_a_recipe_of_its_own(tmp_path, monkeypatch):
    root = camvid(tmp_path / "CamVid")
    flags = ["--data", str(root), "--init", "scratch", "--arch", "resnet18"]
    args = segment.parse(flags)
    assert (args.recipe, args.head, args.width, args.image_size) == ("small", "upernet", 64, 96)
    assert segment.parse([*flags, "--recipe", "fcn"]).recipe == "fcn"
    assert segment.parse([*flags, "--lr", "1"]).lr == 1
    monkeypatch.setattr(pixels, "FEW_IMAGES", 8)
    assert segment.parse(flags).recipe == "fcn"


def test_the_sheet_shows_evenly_spaced_images():
    assert dense.evenly_spaced(101, 6) == [0, 16, 33, 50, 67, 84]
    assert dense.evenly_spaced(7, 6) == [0, 1, 2, 3, 4, 5]
    assert dense.evenly_spaced(3, 6) == [0, 1, 2]


# ---- other people's code ----

def test_torchvisions_deeplab_takes_backbone_pt_with_only_the_head_missing(tmp_path):
    """The README's lines for people with their own training code."""
    torch.save(build_encoder("resnet50").backbone.state_dict(), tmp_path / "backbone.pt")
    model = tv.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21)
    found = model.backbone.load_state_dict(torch.load(tmp_path / "backbone.pt"), strict=False)
    assert found.missing_keys == [] and found.unexpected_keys == []
    full = tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=21)
    state = {f"backbone.{k}": v for k, v in torch.load(tmp_path / "backbone.pt").items()}
    missing = full.load_state_dict(state, strict=False).missing_keys
    assert missing and all(name.startswith("classifier.") for name in missing)
