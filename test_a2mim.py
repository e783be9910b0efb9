"""What A2MIM claims, checked: each test is a fact about the method or this code, against an independent derivation.

    pytest test_a2mim.py        6 to 8 minutes on 2 CPU cores
"""

import copy
import io
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import unicodedata
import zlib
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image, ImageColor
from torch import nn
from torch._utils import ExceptionWrapper
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import functional as tvf

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

import data
import finetune
import loss
import masking
import model
import pretrain
from engine import command, files, images, checkpointer, optim, pictures, progress, results, weights
from model import A2MIM, build_encoder

HERE = Path(__file__).parent
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pixels(mask, image):
    """The mask at the size of the pixels, (B, 1, H, W), as both losses take it."""
    return masking.resize_mask(mask, image.shape[-2:])


def checkerboard(batch=1, gh=2, gw=2):
    """A mask that hides every other cell."""
    return (torch.arange(gh)[:, None] + torch.arange(gw)[None]).remainder(2).eq(0).expand(batch, gh, gw)


# ---- masking: which cells ----

def test_224_px_have_49_cells_of_which_30_are_hidden():
    mask = masking.random_mask(500, masking.mask_grid((224, 224), 32), 0.6)
    assert mask.shape == (500, 7, 7) and mask.dtype == torch.bool
    assert mask.sum((1, 2)).unique().tolist() == [30]        # ceil(0.6 * 49) = ceil(29.4)


@pytest.mark.parametrize(
    "cells, ratio, hidden", [(16, 0.6, 10), (36, 0.75, 27), (100, 0.55, 55), (10, 0.7, 7), (2, 0.01, 1), (49, 0.5, 25)]
)
def test_hidden_count_is_the_ceiling_and_floating_point_does_not_add_one(cells, ratio, hidden):
    assert masking.hidden_count(cells, ratio) == hidden      # 0.55 * 100 = 55.000000000000007 must not become 56


def test_every_subset_of_cells_is_equally_likely():
    mask = masking.random_mask(40_000, (2, 3), 0.5).flatten(1)               # 3 of 6 hidden: 20 possible subsets
    subsets = (mask.long() * 2 ** torch.arange(6)).sum(1).bincount(minlength=64)
    subsets = subsets[subsets > 0].double()
    assert len(subsets) == 20
    chi2 = ((subsets - 2000) ** 2 / 2000).sum()              # 19 degrees of freedom: above 43.8 once in 1,000
    assert chi2 < 43.8


def test_masks_come_from_the_generator_alone():
    draw = lambda seed: masking.random_mask(8, (4, 6), generator=torch.Generator().manual_seed(seed))
    first = draw(1)
    torch.manual_seed(99)
    assert torch.equal(first, draw(1)) and not torch.equal(first, draw(2))
    assert len(first.flatten(1).unique(dim=0)) == 8          # each image has its own


def test_a_pixel_is_hidden_when_its_cell_is():
    mask = masking.random_mask(2, (2, 3), 0.5)
    big = masking.resize_mask(mask, (64, 96))
    for b, y, x in product(range(2), (0, 31, 32, 63), (0, 31, 32, 63, 64, 95)):
        assert big[b, 0, y, x] == mask[b, y // 32, x // 32]


def test_a_grid_that_the_cells_do_not_divide_is_resized_by_nearest():
    mask = masking.random_mask(2, (7, 7), 0.6)
    odd = masking.resize_mask(mask, (10, 12))
    for y, x in product(range(10), range(12)):
        assert torch.equal(odd[:, 0, y, x], mask[:, y * 7 // 10, x * 7 // 12])


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: masking.mask_grid((100, 128), 32),
            "image side 100: not a multiple of the 32-pixel mask unit; use 96 or 128",
        ),
        (lambda: masking.mask_grid((16, 16), 32), "image side 16: not a multiple of the 32-pixel mask unit; use 32"),
        (lambda: masking.random_mask(1, (2, 2), 0.0), "mask ratio 0.0: must lie between 0 and 1"),
        (lambda: masking.random_mask(1, (2, 2), 1.0), "mask ratio 1.0: must lie between 0 and 1"),
        (lambda: masking.resize_mask(checkerboard(1, 4, 4), (2, 2)), "smaller than the stride"),
        (
            lambda: masking.fill_hidden(torch.zeros(1, 3, 4, 4), checkerboard(), "grey"),
            "fill 'grey': must be one of mean, zero, random, blur",
        ),
        (lambda: masking.MaskToken(3, "swap"), "mask token 'swap': must be one of gamma, add, replace"),
        (
            lambda: masking.expand_mask(checkerboard(), torch.zeros(1, 7, 3)),
            "7 tokens does not fit a mask of 2x2 units",
        ),
        (
            lambda: loss.fourier_loss(*[torch.zeros(1, 3, 4, 4)] * 2, torch.ones(1, 1, 4, 4) > 0, stand_in="none"),
            "stand-in 'none': must be one of",
        ),
        (
            lambda: loss.fourier_loss(*[torch.zeros(1, 3, 4, 4)] * 2, torch.ones(1, 1, 4, 4) > 0, spectrum="all"),
            "spectrum 'all': must be one of batch, image",
        ),
        (lambda: build_encoder("resnet51"), "arch 'resnet51': must be one of resnet18"),
        (lambda: build_encoder("resnet51"), "or a net of torchvision; did you mean resnet50?"),
        (
            lambda: build_encoder("vit_b_16"),
            "arch 'vit_b_16': does not run its modules one after another, so a token cannot "
            "enter between them; use vit_base",
        ),
        (lambda: build_encoder("googlenet"), "arch 'googlenet': does not run its modules one after another"),
        (lambda: build_encoder("inception_v3"), "use resnet50, or split it yourself: model.Encoder([...])"),
        (lambda: build_encoder("regnet_y_400mf", 64, 0.1), "has no stochastic depth; use --drop-path 0, not 0.1"),
        (lambda: build_encoder("maxvit_t", (64, 96)), "'maxvit_t' at 64x96 px: torchvision's MaxViT takes squares"),
        (
            lambda: build_encoder("maxvit_t", 64),
            "arch 'maxvit_t' at 64x64 px: Input size (16, 16) of block 0 is not divisible",
        ),
        (lambda: A2MIM(build_encoder("squeezenet1_1"), 16, 16), "image size 16x16: does not fit this encoder"),
        (lambda: build_encoder("vit_base", 100), "image size 100x100: not a multiple of the 16-pixel patch"),
        (lambda: A2MIM(build_encoder("resnet18"), 64, token_stage=5), "token stage 5: this encoder has stages 0 to 4"),
        (lambda: A2MIM(build_encoder("resnet18"), 64, mask_size=8), "mask of 8x8 units on 4x4 features"),
        (
            lambda: A2MIM(build_encoder("resnet18"), 80, mask_size=16),
            "image size 80x80: the encoder turns it into features",
        ),
    ],
)
def test_impossible_sizes_and_options_give_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- masking: what is painted over them ----

def test_the_fill_is_the_mean_of_the_whole_image_and_visible_pixels_stay_bit_equal():
    x, mask = torch.randn(2, 3, 64, 96), masking.random_mask(2, (2, 3), 0.5)
    seen = masking.fill_hidden(x, mask)
    for b, r, c in product(range(2), range(2), range(3)):
        cell = np.s_[b, :, 32 * r:32 * r + 32, 32 * c:32 * c + 32]
        if mask[b, r, c]:
            mean = x[b].double().reshape(3, -1).mean(1).float()              # hidden pixels included
            close(seen[cell], mean[:, None, None].expand(3, 32, 32))
        else:
            assert torch.equal(seen[cell], x[cell])


def test_the_other_fills_are_zero_and_one_random_colour_per_image():
    x, mask = torch.randn(2, 3, 4, 4), checkerboard(2)
    hidden = masking.resize_mask(mask, (4, 4)).expand_as(x)
    assert masking.fill_hidden(x, mask, "zero")[hidden].unique().tolist() == [0]
    painted = masking.fill_hidden(x, mask, "random", torch.Generator().manual_seed(3))
    assert len(painted[hidden].unique()) == 6                # 2 images x 3 channels
    assert torch.equal(painted[~hidden], x[~hidden])


def test_hidden_pixels_reach_the_network_only_through_the_mean_colour():
    net = A2MIM(build_encoder("resnet18"), 64).eval()
    x, mask = torch.randn(1, 3, 64, 64), torch.tensor([[[True, False], [False, True]]])  # top left is hidden
    y = x.clone()
    y[..., :32, :32] = x[..., :32, :32].flip(-1)             # the same colours, elsewhere
    close(net(x, mask), net(y, mask))
    assert not torch.allclose(net(x, ~mask), net(y, ~mask))  # visible there: it must show


# ---- masking: the token ----

def test_token_forms_by_hand():
    z, mask = torch.tensor([[[[2.0, 3.0]]]]), torch.tensor([[[True, False]]])                # (1, 1, 1, 2), left hidden
    for form, left in (("gamma", 0.25 * 2 + 7), ("add", 2 + 7), ("replace", 7)):
        token = masking.MaskToken(1, form)
        nn.init.constant_(token.token, 7)
        if form == "gamma":
            nn.init.constant_(token.gamma, 0.25)
        assert token(z, mask).flatten().tolist() == [left, 3]


def test_gamma_starts_at_a_millionth_so_a_hidden_feature_starts_as_the_token():
    token = masking.MaskToken(512)
    assert token.gamma.unique().tolist() == [pytest.approx(1e-6)]
    assert 0.015 < token.token.std() < 0.025 and token.token.abs().max() < 2     # truncated normal, std 0.02
    hidden = token(torch.randn(1, 512, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))
    close(hidden, token.token.view(1, -1, 1, 1).expand(1, 512, 2, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", masking.TOKENS)
def test_maps_channels_last_maps_and_sequences_get_the_same_token(form):
    z, mask = torch.randn(2, 5, 4, 6), masking.random_mask(2, (2, 3), 0.5)
    token, swin = masking.MaskToken(5, form), masking.MaskToken(5, form, layout="nhwc")
    swin.load_state_dict(token.state_dict())
    expected = token(z, mask)                                # (B, C, h, w)
    close(swin(z.permute(0, 2, 3, 1), mask), expected.permute(0, 2, 3, 1))
    sequence = z.flatten(2).transpose(1, 2)                  # (B, N, C)
    close(token(sequence, mask), expected.flatten(2).transpose(1, 2))
    cls = torch.randn(2, 1, 5)
    with_class = token(torch.cat([cls, sequence], 1), mask)
    assert torch.equal(with_class[:, :1], cls)               # the class row is never hidden
    close(with_class[:, 1:], expected.flatten(2).transpose(1, 2))


# ---- loss: pixels ----

def test_focal_l1_is_its_formula():
    d = torch.linspace(-4, 4, 33)
    by_hand = [abs(v) * (2 / (1 + math.exp(-0.2 * abs(v))) - 1) for v in d.tolist()]
    close(loss.focal_l1(d), torch.tensor(by_hand))


@pytest.mark.parametrize("focal", [True, False])
def test_the_spatial_loss_is_the_mean_error_of_hidden_pixels(focal):
    pred, image, mask = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12), masking.random_mask(2, (2, 3), 0.6)
    error = 0.0
    for b, r, c in mask.nonzero().tolist():
        d = (pred - image)[b, :, 4 * r:4 * r + 4, 4 * c:4 * c + 4].double().abs()
        error += (d * (2 * torch.sigmoid(0.2 * d) - 1) if focal else d).sum().item()
    assert loss.spatial_loss(pred, image, pixels(mask, image), focal).item() == pytest.approx(
        error / (mask.sum().item() * 16) / 3, rel=1e-5
    )


def test_visible_pixels_get_no_gradient_from_pixels_and_a_share_u_from_frequencies():
    image, mask = torch.randn(2, 3, 8, 8), checkerboard(2)
    visible = ~masking.resize_mask(mask, (8, 8)).expand_as(image)

    def gradient(fn, **options):
        pred = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        return torch.autograd.grad(fn(pred, image, pixels(mask, image), **options), pred)[0]
    assert gradient(loss.spatial_loss)[visible].abs().max() == 0
    assert gradient(loss.spatial_loss)[~visible].abs().min() > 0
    assert gradient(loss.fourier_loss, visible_weight=0.0)[visible].abs().max() == 0
    full, share = (
        gradient(loss.fourier_loss, visible_weight=1.0),
        gradient(loss.fourier_loss, visible_weight=0.25, stand_in="prediction"),
    )
    close(share[visible], 0.25 * full[visible])              # the value is the same, as the stand-in is the prediction


# ---- loss: frequencies ----

def dft(x):
    """Orthonormal 2-D Fourier transform of a real (H, W) array as the sum that defines it: (cosine part, sine part)."""
    H, W = x.shape
    real, imag = np.zeros((H, W)), np.zeros((H, W))
    for u, v, y, z in product(range(H), range(W), range(H), range(W)):
        angle = 2 * math.pi * (u * y / H + v * z / W)
        real[u, v] += x[y, z] * math.cos(angle)
        imag[u, v] -= x[y, z] * math.sin(angle)
    return real / math.sqrt(H * W), imag / math.sqrt(H * W)


@pytest.mark.parametrize(
    "spectrum, stand_in, focal, width",
    [
        ("batch", "mixed", True, 6),
        ("image", "prediction", True, 6),
        ("image", "mixed", True, 5),
        ("batch", "prediction", True, 5),
        ("image", "mixed", False, 5),
        ("batch", "prediction", False, 6),
    ],
)
def test_the_fourier_loss_is_the_sum_of_sines_and_cosines_that_defines_it(spectrum, stand_in, focal, width):
    pred, image = torch.randn(2, 2, 4, width), torch.randn(2, 2, 4, width)
    mask, u = torch.tensor([[[True], [False]], [[False], [True]]]), 0.125
    P, X = pred.double().numpy(), image.double().numpy()
    hidden = np.zeros_like(P)
    hidden[0, :, :2], hidden[1, :, 2:] = 1, 1
    stand = {"prediction": P, "mixed": (P + X) / 2}[stand_in]
    w = hidden + (1 - hidden) * u
    p = P * w + stand * (1 - w)
    spectra = np.array([[dft(p[b, c]) for c in range(2)] for b in range(2)]) - np.array(
        [[dft(X[b, c]) for c in range(2)] for b in range(2)]
    )
    if spectrum == "batch":
        spectra = spectra.mean(0, keepdims=True)             # the spectra are averaged, as released
    modulus = np.sqrt(spectra[:, :, 0] ** 2 + spectra[:, :, 1] ** 2)         # (B or 1, C, H, W)
    if focal:
        weight = np.log(1 + modulus)
        weight = weight / weight.max(axis=None if spectrum == "batch" else (2, 3), keepdims=True)
        expected = (weight * modulus**2).mean()
    else:
        expected = (
            modulus * (2 / (1 + np.exp(-0.2 * modulus)) - 1)
        ).mean()  # the pixel criterion again, on the full plane
    got = loss.fourier_loss(pred, image, pixels(mask, image), stand_in=stand_in, visible_weight=u,
                            spectrum=spectrum, focal=focal)
    assert got.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (15, 21), (8, 13)])
def test_the_transform_of_the_mean_is_the_mean_of_the_transforms(size):
    """The spectrum of the batch's mean residual = the mean of all spectra, in value and in gradient."""
    pred, image = torch.randn(5, 3, *size, requires_grad=True), torch.randn(5, 3, *size)
    D = (torch.fft.fft2(pred, norm="ortho") - torch.fft.fft2(image, norm="ortho")).mean(0)
    weight = torch.log(1 + D.abs()).detach()
    expected = (weight / weight.max() * D.abs() ** 2).mean()
    got = loss.fourier_loss(pred, image, torch.ones(5, 1, *size, dtype=torch.bool))
    close(got, expected)
    close(torch.autograd.grad(got, pred)[0], torch.autograd.grad(expected, pred)[0])


@pytest.mark.parametrize("spectrum", loss.SPECTRA)
def test_parseval_with_weight_one_the_fourier_loss_is_the_pixel_mse(spectrum):
    """An error in one pixel has the same modulus at every frequency, so that every weight is 1."""
    image, d = torch.randn(3, 3, 14, 9), torch.zeros(3, 3, 14, 9)
    d[:, :, 5, 2] = 0.7
    hidden = torch.ones(3, 1, 14, 9, dtype=torch.bool)
    close(loss.fourier_loss(image + d, image, hidden, spectrum=spectrum), d.square().mean(), atol=1e-6, rtol=1e-4)


def test_the_batch_spectrum_sees_only_the_mean_residual():
    """The released code's least known trait: errors of different images cancel, and what is left falls as 1/B."""
    image, error = torch.randn(2, 3, 16, 16), torch.randn(1, 3, 16, 16)
    hidden = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    pred = image + torch.cat([error, -error])                # both are wrong, in opposite ways
    assert loss.fourier_loss(pred, image, hidden, spectrum="batch") < 1e-10
    assert loss.fourier_loss(pred, image, hidden, spectrum="image") > 0.1
    # one-pixel errors of random sign: every weight is 1, so that the law is exact in the mean
    d, hidden = torch.zeros(64, 3, 16, 16), torch.ones(64, 1, 16, 16, dtype=torch.bool)
    ratios = []
    for _ in range(200):
        d[:, :, 5, 2] = torch.randn(64, 1)
        one = loss.fourier_loss(d, 0 * d, hidden, spectrum="image")
        ratios.append((loss.fourier_loss(d, 0 * d, hidden) / one).item())
    assert statistics.mean(ratios) == pytest.approx(1 / 64, rel=0.3)         # standard error 10 %


@pytest.mark.parametrize("spectrum, focal", [*product(loss.SPECTRA, (True, False))])
def test_a_perfect_prediction_costs_nothing_and_its_gradient_is_zero_not_nan(spectrum, focal):
    image = torch.randn(2, 3, 8, 8)
    pred = image.clone().requires_grad_()
    total, parts = loss.a2mim_loss(pred, image, pixels(checkerboard(2), image), spectrum=spectrum, focal_fourier=focal)
    total.backward()
    assert total == 0 and parts["fourier"] == 0 and pred.grad.abs().max() == 0


def test_the_total_is_spatial_plus_lambda_fourier_and_lambda_zero_leaves_the_transform_out():
    pred, image, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), checkerboard(2)
    total, parts = loss.a2mim_loss(pred, image, pixels(mask, image), fourier_weight=0.5)
    close(total, parts["spatial"] + 0.5 * parts["fourier"])
    total, parts = loss.a2mim_loss(pred, image, pixels(mask, image), fourier_weight=0)
    assert list(parts) == ["spatial"] and total == parts["spatial"]


def test_the_loss_is_float32_inside_autocast():
    pred, image, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), checkerboard(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = loss.a2mim_loss(pred, image, pixels(mask, image))
    assert inside.dtype == torch.float32
    close(inside, loss.a2mim_loss(pred, image, pixels(mask, image))[0])


# ---- model ----

FAMILIES = ["resnet18", "resnet50", "convnext_tiny", "swin_tiny", "vit_small", "deit_tiny"]


@pytest.mark.parametrize("arch, size", [*product(FAMILIES, [(64, 64), (64, 128)])])
def test_every_family_paints_the_whole_image_and_the_token_enters_where_it_should(arch, size):
    net = A2MIM(build_encoder(arch, size), size).eval()
    entered = []
    net.mask_token.register_forward_hook(lambda module, inputs, output: entered.append(tuple(output.shape)))
    painted = net(torch.randn(2, 3, *size), masking.random_mask(2, net.grid))
    assert painted.shape == (2, 3, *size) and net.grid == (size[0] // 32, size[1] // 32)
    H, W = size                                              # the injection points of the released configs
    assert entered == [{"resnet18": (2, 256, H // 16, W // 16), "resnet50": (2, 1024, H // 16, W // 16),
                        "convnext_tiny": (2, 768, H // 32, W // 32), "swin_tiny": (2, H // 4, W // 4, 96),
                        "vit_small": (2, H * W // 256, 768), "deit_tiny": (2, H * W // 256, 192)}[arch]]


def test_the_token_can_enter_before_any_stage():
    x = torch.randn(1, 3, 64, 64)
    for arch, stages in (("resnet18", 5), ("deit_tiny", 13), ("swin_tiny", 5)):
        for stage in range(stages):
            net = A2MIM(build_encoder(arch, 64), 64, token_stage=stage, token="add").eval()
            mask = masking.random_mask(1, net.grid, 0.5)
            before = net(x, mask)
            nn.init.constant_(net.mask_token.token, 1.0)
            assert not torch.allclose(before, net(x, mask)), (arch, stage)


def test_each_feature_paints_its_own_square():
    """PixelShuffle lays the 3 s^2 outputs of feature (i, j) over the pixels of square (i, j)."""
    net = A2MIM(build_encoder("resnet18"), (64, 96))
    z = torch.zeros(1, 512, 2, 3)
    z[0, :, 1, 2] = 1.0
    nn.init.constant_(net.decoder[0].weight, 0.5)
    painted = net.decoder(z)
    assert painted[..., 32:, 64:].unique().tolist() == [256] and painted.sum() == 256 * 3 * 32 * 32


def test_parameter_counts_are_the_published_ones():
    """Millions, classification head included. Source: the authors' table; torchvision's for the names it shares."""
    for arch, head, published in (
        ("vit_small", 768, 48.8),
        ("vit_base", 768, 86.7),
        ("resnet50", 2048, 25.6),
        ("resnet200", 2048, 64.7),
        ("convnext_small", 768, 50.2),
        ("deit_small", 384, 22.1),
    ):
        count = sum(p.numel() for p in build_encoder(arch).parameters()) + 1000 * (head + 1)
        assert count / 1e6 == pytest.approx(published, abs=0.06 if arch != "deit_small" else 0.2), arch


def test_initial_values_that_the_recipes_rely_on():
    resnet = build_encoder("resnet50").backbone
    assert all(block.bn3.weight.abs().max() == 0 for block in resnet.layer2)     # each block starts as its shortcut
    vit = build_encoder("deit_tiny", 224).backbone
    block = vit.blocks[3]
    assert block.gamma_1.unique().tolist() == block.gamma_2.unique().tolist() == [pytest.approx(0.1)]
    assert (
        block.attn.relative_position_bias_table.shape == (732, 3)
        and block.attn.relative_position_bias_table.abs().max() == 0
    )
    assert [round(b.drop_path.p, 4) for b in vit.blocks] == [round(0.1 * i / 11, 4) for i in range(12)]


def test_relative_position_rows_pair_by_pair():
    h, w = 3, 4
    index, n = model.relative_position_index(h, w), (2 * h - 1) * (2 * w - 1)
    for query, key in product(range(h * w), repeat=2):
        dr, dc = query // w - key // w, query % w - key % w
        assert index[1 + query, 1 + key] == (dr + h - 1) * (2 * w - 1) + dc + w - 1
    assert (index[0, 1:] == n).all() and (index[1:, 0] == n + 1).all() and index[0, 0] == n + 2


def test_attention_is_softmax_of_scaled_products_plus_position_bias():
    attention = model.Attention(12, 3, (2, 2)).double()
    for p in attention.parameters():
        nn.init.normal_(p)
    x = torch.randn(1, 5, 12, dtype=torch.double)
    weight = attention.qkv.weight.view(3, 3, 4, 12)          # (qkv, head, channel, in)
    out = []
    for head in range(3):
        q = x[0] @ weight[0, head].T + attention.q_bias.view(3, 4)[head]
        k = x[0] @ weight[1, head].T                         # no bias
        v = x[0] @ weight[2, head].T + attention.v_bias.view(3, 4)[head]
        bias = torch.stack(
            [
                torch.stack(
                    [
                        attention.relative_position_bias_table[attention.relative_position_index[i, j], head]
                        for j in range(5)
                    ]
                )
                for i in range(5)
            ]
        )
        out.append(torch.softmax(q @ k.T / math.sqrt(4) + bias, -1) @ v)
    close(attention(x)[0], attention.proj(torch.cat(out, 1)))


def test_any_list_of_modules_is_an_encoder():
    for stages, stage in ((list(tv.efficientnet_b0().features), 6), (list(tv.mobilenet_v3_small().features), 9)):
        net = A2MIM(stages, image_size=128, token_stage=stage)
        x, mask = torch.randn(2, 3, 128, 128), masking.random_mask(2, net.grid)
        total, _ = loss.a2mim_loss(net(x, mask), x, pixels(mask, x))
        total.backward()
        assert net.grid == (4, 4) and all(p.grad is not None for p in net.parameters())
    tokens = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2)), nn.Module()
    tokens[1].forward = lambda z: z.transpose(1, 2)          # ends in a sequence (B, 64, 8), not a map
    assert A2MIM(list(tokens), 64, token_stage=0).stride == 8


def test_reconstruct_pastes_into_hidden_cells_only_and_leaves_the_model_as_it_was():
    net = A2MIM(build_encoder("resnet18"), 64).train()
    statistics = net.encoder.backbone.bn1.running_mean.clone()
    x, mask = torch.randn(2, 3, 64, 64), checkerboard(2)
    seen, painted, pasted = net.reconstruct(x, mask)
    hidden = masking.resize_mask(mask, (64, 64)).expand_as(x)
    assert torch.equal(pasted[hidden], painted[hidden]) and torch.equal(pasted[~hidden], x[~hidden])
    assert torch.equal(seen, masking.fill_hidden(x, mask))
    assert net.training and torch.equal(net.encoder.backbone.bn1.running_mean, statistics)


# ---- torchvision's other nets ----

TORCHVISION = [  # one of each kind: image, mask cell, what the token enters
    ("alexnet", 64, 32, (192, 7, 7)),
    ("vgg11", 64, 32, (512, 8, 8)),
    ("squeezenet1_1", 48, 16, (256, 5, 5)),
    ("densenet121", 64, 32, (1024, 4, 4)),
    ("mobilenet_v2", 64, 32, (96, 4, 4)),
    ("mobilenet_v3_small", 64, 32, (48, 4, 4)),
    ("mnasnet0_5", 64, 32, (48, 4, 4)),
    ("efficientnet_b0", 64, 32, (112, 4, 4)),
    ("regnet_y_400mf", 64, 32, (208, 4, 4)),
    ("shufflenet_v2_x0_5", 64, 32, (96, 4, 4)),
    ("resnext50_32x4d", 64, 32, (1024, 4, 4)),
    ("swin_v2_t", 64, 32, (16, 16, 96)),
    ("maxvit_t", 224, 32, (256, 14, 14)),
]


@pytest.mark.parametrize("arch, size, cell, where", TORCHVISION)
def test_torchvisions_other_nets_learn_and_their_chain_is_torchvisions_forward(arch, size, cell, where, tmp_path):
    encoder = build_encoder(arch, size)
    net, entered = A2MIM(encoder, size, cell), []
    net.mask_token.register_forward_hook(lambda module, inputs, output: entered.append(tuple(output.shape[1:])))
    x = torch.randn(1 if size == 224 else 2, 3, size, size)
    mask = masking.random_mask(len(x), net.grid)
    loss.a2mim_loss(net(x, mask), x, pixels(mask, x))[0].backward()
    assert entered == [where] and all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.optim.SGD(net.parameters(), lr=1e-3).step()
    torch.save(encoder.backbone.state_dict(), tmp_path / "backbone.pt")
    plain = tv.get_model(arch, num_classes=2).eval()
    report = plain.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True), strict=False)
    assert not report.unexpected_keys and all(name.startswith(f"{encoder.head_name}.") for name in report.missing_keys)
    report, handed = weights.load_backbone(encoder, tmp_path / "backbone.pt"), []
    assert not report["missing"] and not report["skipped"]
    plain.get_submodule(encoder.head_name).register_forward_pre_hook(lambda module, inputs: handed.append(inputs[0]))
    encoder.eval()
    with torch.no_grad():
        plain(x)
        z = encoder(x).movedim(-1, 1) if encoder.layout == "nhwc" else encoder(x)
    handed = handed[0].view(*z.shape[:2], -1).mean(2)  # pooled already, or not: SqueezeNet's and MaxViT's heads pool
    close(z.mean((2, 3)) / z.std(), handed / z.std(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["mnasnet0_5", "squeezenet1_1", "densenet121", "mobilenet_v3_small"])
def test_torchvisions_other_nets_are_fine_tuned_with_their_own_head(arch, tmp_path):
    net, x = model.Classifier(arch, build_encoder(arch, 64), 3, frozen=True), torch.randn(2, 3, 64, 64)
    learns = {name for name, p in net.named_parameters() if p.requires_grad}
    head = f"encoder.backbone.{net.encoder.head_name}."
    assert (
        learns
        == {name for name, _ in net.named_parameters() if name.startswith(head)}
        == {name for name in net.state_dict() if name.startswith(head)}
    )
    before = {name: p.clone() for name, p in net.state_dict().items()}
    finetune.class_loss(net.train()(x), torch.eye(3)[:2], "ce", 0.1).backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    assert {name for name, p in net.state_dict().items() if not torch.equal(p, before[name])} <= learns
    assert not torch.equal(
        net.eval()(x), model.Classifier(arch, net.encoder, 3).eval()(x)
    )  # it learnt, and another head is another
    net = model.Classifier(arch, build_encoder(arch, 64), 3).eval()
    assert optim.layer_groups(net, 0.05, 0.5)[-1]["scale"] == 1.0 and net.features(x).shape[0] == 2
    plain = tv.get_model(arch, num_classes=3).eval()
    plain.load_state_dict(net.torchvision_state_dict())
    assert torch.equal(net(x), plain(x)) and not torch.equal(plain(x), plain(x.flip(0)))
    torch.save(net.torchvision_state_dict(), tmp_path / "best.pt")
    again = model.Classifier(arch, build_encoder(arch, 64), 3).eval()
    head, report = (
        weights.load_head(again, tmp_path / "best.pt"),
        weights.load_backbone(again.encoder, tmp_path / "best.pt"),
    )
    assert torch.equal(again(x), net(x)) and set(report["skipped"]) == head and not report["missing"]
    with pytest.raises(ValueError, match="its head tells 3 classes apart, the data has 4"):
        weights.load_head(model.Classifier(arch, build_encoder(arch, 64), 4), tmp_path / "best.pt")
    copied = optim.MovingAverage(net, 0.9, 10).module        # the head of the average is the average's
    assert copied.head is copied.get_submodule(f"encoder.backbone.{net.encoder.head_name}") is not net.head


def test_a_net_of_torchvision_is_pre_trained_and_fine_tuned_by_its_name(few_images, tmp_path):
    flags = "--data shapes --image-size 64 --batch-size 8 --workers 0 --amp off --epochs 1 --log-every 1".split()
    arch = ["--arch", "shufflenet_v2_x0_5", "--val", "0"]
    pretrain.main([*flags, *arch, "--lr", "0.03", "--sheets", "1", "--out", str(tmp_path / "pre")])
    log = read_log(tmp_path / "pre")
    assert len(log) == 4 and (tmp_path / "pre" / "reconstruction-000000.png").exists()
    weights_file = ["--weights", str(tmp_path / "pre" / "backbone.pt")]      # args.json beside it names the net
    finetune.main([*flags, *weights_file, "--eval-every", "1", "--out", str(tmp_path / "tuned")])
    best = torch.load(tmp_path / "tuned" / "best.pt", weights_only=True)
    assert tv.shufflenet_v2_x0_5(num_classes=10).load_state_dict(best)
    tuned_file = ["--weights", str(tmp_path / "tuned" / "best.pt")]
    finetune.main([*flags, *tuned_file, "--eval-only", "--out", str(tmp_path / "eval")])
    tuned, again = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("tuned", "eval"))
    assert again["top1"] == tuned["best_top1"]


def test_torchvisions_file_of_densenet_has_old_names_and_loads(tmp_path):
    encoder = build_encoder("densenet121", 64)
    old = {
        re.sub(r"(denselayer\d+\.\w+)([12])\.", r"\1.\2.", name): torch.randn_like(t.float())
        for name, t in encoder.backbone.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    assert not weights.load_backbone(encoder, tmp_path / "densenet121.pth")["missing"]
    assert torch.equal(
        encoder.backbone.features.denseblock4.denselayer16.conv2.weight,
        old["features.denseblock4.denselayer16.conv.2.weight"],
    )


def test_stochastic_depth_of_torchvisions_nets_rises_to_the_rate_asked_for():
    rates = lambda arch, drop: [
        m.p for m in build_encoder(arch, 64, drop).backbone.modules() if isinstance(m, StochasticDepth)
    ]
    for arch in ("efficientnet_b0", "resnext50_32x4d"):
        found = rates(arch, 0.3)
        assert (
            found == sorted(found) and found[0] == 0 and found[-1] == pytest.approx(0.3) and not any(rates(arch, None))
        ), arch


def test_a_net_that_is_not_its_chain_of_children_is_refused(monkeypatch):
    class More(tv.MobileNetV2):                             # a forward that does more than its children
        def forward(self, x):
            return self.classifier(self.features[18](self.features[:18](x)).relu().add(1).mean((2, 3)))
    monkeypatch.setattr(tv, "get_model", lambda arch, **options: More())
    with pytest.raises(ValueError, match="arch 'mobilenet_v2': does not run its modules one after another"):
        build_encoder("mobilenet_v2", 64)


# ---- weights in and out ----

@pytest.mark.parametrize(
    "arch, plain, head",
    [
        ("resnet18", tv.resnet18, "fc"),
        ("resnet50", tv.resnet50, "fc"),
        ("convnext_tiny", tv.convnext_tiny, "classifier.2"),
        ("swin_tiny", tv.swin_t, "head"),
    ],
)
def test_backbone_weights_load_into_plain_torchvision_with_only_the_head_missing(arch, plain, head, tmp_path):
    encoder = build_encoder(arch).eval()
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.05)
    torch.save(encoder.backbone.state_dict(), tmp_path / "backbone.pt")
    net = plain().eval()
    report = net.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True), strict=False)
    assert report.missing_keys == [f"{head}.weight", f"{head}.bias"] and not report.unexpected_keys
    x = torch.randn(1, 3, 64, 64)
    z = encoder(x)
    z = z.mean((1, 2)) if encoder.layout == "nhwc" else z.mean((2, 3))
    pooled = []                                              # what torchvision's own head is given
    net.get_submodule(head).register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    net(x)
    if arch == "convnext_tiny":  # torchvision averages before the final norm, we paint from a map: compare there
        z, pooled = encoder.backbone.features(x).flatten(1), [net.features(x).flatten(1)]
    close(z, pooled[0])


AUTHORS = {  # our name -> the authors' (a row for each rule in METHOD: openmixup's MIMConvNeXt and SimMIMViT)
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
    state = {
        f"module.backbone.{theirs}": torch.randn_like(encoder.backbone.state_dict()[ours])
        for ours, theirs in names.items()
    }
    state |= {
        f"module.backbone.{name}": value for name, value in encoder.backbone.state_dict().items() if name not in names
    }
    if arch == "convnext_tiny":                              # the authors keep LayerScale as (C,)
        state["module.backbone.stages.3.0.gamma"] = state["module.backbone.stages.3.0.gamma"].flatten()
    state["module.neck.decoder_pred.0.weight"] = torch.randn(4, 4)
    if arch == "deit_tiny":
        state["module.backbone.layers.3.attn.relative_position_index"] = torch.zeros(197, 197, dtype=torch.long)
    torch.save({"meta": {"epoch": 300}, "state_dict": state}, tmp_path / "released.pth")
    report = weights.load_backbone(encoder, tmp_path / "released.pth")
    assert set(names) <= set(report["used"]) and not report["missing"]
    assert "neck.decoder_pred.0.weight" in report["skipped"] and len(report["skipped"]) == (
        2 if arch == "deit_tiny" else 1
    )
    own = encoder.backbone.state_dict()
    for ours, theirs in names.items():
        assert torch.equal(own[ours].flatten(), state[f"module.backbone.{theirs}"].flatten()), ours


# ---- data ----

def paint(path, mode="RGB", colour=(200, 40, 90), size=(40, 30), **options):
    """Writes a one-colour image; returns its path as text."""
    image = Image.new("RGB", size, colour)
    if mode == "P":
        image = image.quantize(4)
    else:
        image = image.convert(mode)
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize(
    "name, mode, colour",
    [
        ("a.jpg", "RGB", (200, 40, 90)),
        ("a.png", "RGB", (200, 40, 90)),
        ("a.webp", "RGB", (200, 40, 90)),
        ("a.bmp", "RGB", (200, 40, 90)),
        ("gray.png", "L", (93, 93, 93)),
        ("gray.jpg", "L", (93, 93, 93)),
        ("palette.png", "P", (200, 40, 90)),
        ("cmyk.jpg", "CMYK", (200, 40, 90)),
        ("alpha.png", "RGBA", (200, 40, 90)),
        ("alpha.webp", "RGBA", (200, 40, 90)),
        ("palette.bmp", "P", (200, 40, 90)),
        ("gray_alpha.png", "LA", (93, 93, 93)),
        ("one_bit.png", "1", None),
    ],
)
def test_every_kind_of_image_becomes_rgb(name, mode, colour, tmp_path):
    image = data.read_image(paint(tmp_path / name, mode))
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    if colour:                                               # luma of (200, 40, 90): 0.299 R + 0.587 G + 0.114 B = 93.5
        close(image.float().mean((1, 2)), torch.tensor(colour).float(), atol=3.0, rtol=0)


UPRIGHT = {  # EXIF orientation -> the stored pixels as they are to be seen, by the standard
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),                            # clockwise
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("name, options", [("a.jpg", {"quality": 100, "subsampling": 0}), ("a.png", {}),
                                           ("a.webp", {"lossless": True})])
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


def png_of_16_bits(path, pixels):
    """Writes a 16-bit PNG: uint16 (H, W) as gray, (H, W, 3) as colour. By hand: Pillow writes gray alone."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    height, width = pixels.shape[:2]
    colour_type = 2 if pixels.ndim == 3 else 0
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour_type, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_images_of_more_than_8_bits_are_refused_and_told_and_never_read_as_black_or_white(tmp_path, capsys):
    cells = np.linspace(1456, 2928, 64 * 64).reshape(64, 64)                 # of a 12-bit microscope
    folder = tmp_path / "images"
    folder.mkdir()
    paint(folder / "a.png", size=(64, 64))
    png_of_16_bits(folder / "gray.png", cells.astype(np.uint16))
    png_of_16_bits(folder / "rgb.png", np.stack([cells] * 3, 2).astype(np.uint16))
    for name, pixels in (("float", cells / 4096), ("short", cells.astype(np.uint16)), ("long", cells.astype(np.int32))):
        file = folder / f"{name}.jpg"
        Image.fromarray(pixels.astype(np.float32) if name == "float" else pixels).save(file, format="TIFF")
    source = data.Folder(folder, "train")
    samples = data.ImageDataset(source, nn.Identity(), seed=0)
    broken = images.UnreadableImages(source, 1.0, tmp_path)
    for i in range(len(source)):
        image, used, bad = samples[0, i]
        broken.note(torch.tensor([bad]))
        assert Path(source.name(used)).name == "a.png" and image.float().mean((1, 2)).tolist() == [200, 40, 90]
    broken.tell(command.Distributed())
    listed = [Path(line).name for line in (tmp_path / "broken.txt").read_text().splitlines()]
    assert listed == ["float.jpg", "gray.png", "long.jpg", "rgb.png", "short.jpg"]
    said = capsys.readouterr().err
    assert "gray.png (more than 8 bits per channel, the value of white is unknown; convert it to 8 bits)" in said
    assert said.endswith(" and 2 more\n")


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
kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "palette.png": "PNG", "gif.jpg": "GIF",
         "tif.png": "TIFF", "cmyk.jpg": "JPEG"}
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
            for place in random.integers(min(len(content), 100) if i % 2 else len(content), size=1 + i % 3):
                content[place] ^= 1 << random.integers(8)
        (folder / f"{i}.{kind}").write_bytes(content)
picture.save(folder / "whole.png")
source = data.Folder(folder, "train")
samples, world = data.ImageDataset(source, data.eval_transform((32, 32)), 0), command.Distributed()
broken = []
for batch, used, bad in data.make_loader(samples, data.every_image_once(len(source), 16, world), 0, world):
    assert batch.shape[1:] == (3, 32, 32)
    broken += bad[bad >= 0].tolist()
for kind in kinds:
    of_kind = [i for i in range(len(source)) if Path(source.name(i)).name.split(".", 1)[1] == kind]
    print(kind, len(set(broken) & set(of_kind)))
print("all", len(source))
"""


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_of_any_kind_is_read_or_counted_and_never_crashes(tmp_path):
    done = subprocess.run([sys.executable, "-c", DAMAGE, str(tmp_path)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr                 # -11: a segmentation fault
    count = {kind: int(number) for kind, number in map(str.split, done.stdout.splitlines())}
    assert count["all"] == 8 * 60 + 1
    assert count["png"] >= 50                                # a PNG has checksums: nearly all damage is found
    assert 0 < count["bmp"] < 60 and 0 < count["jpg"] < 60   # others cannot tell wrong pixels


def test_whatever_is_wrong_with_an_image_is_an_oserror_of_one_line(tmp_path):
    said = {}
    for name in spoil(tmp_path):
        with pytest.raises(OSError) as error:
            data.read_image(str(tmp_path / name))
        said[name] = images.reason(error.value)
        assert said[name] and "\n" not in said[name]
    assert said["gone.png"] == "No such file or directory" and said["pipe.jpg"] == "not a regular file"
    assert said["text.jpeg"] == said["empty.png"] == "not an image, or of an unknown kind"
    assert "truncated" in said["cut.jpg"].lower() and "exceeds limit" in said["bomb.png"]


def test_image_files_of_other_kinds_are_counted_and_told_once(tmp_path, capsys):
    for name in ("a.jpg", "cat/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paint(tmp_path / name)
    for name in ("1.tif", "cat/2.TIF", "cat/3.tif", "4.heic", ".5.tif", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for split in ("train", "all"):
        assert len(data.Folder(tmp_path, split)) == 2
    assert capsys.readouterr().err == f"{tmp_path}: 1 .heic, 3 .tif files are not read; convert them to JPEG or PNG\n"


def photograph(path, mode="RGB", turn=1, size=(1600, 1200)):
    """Writes a JPEG of soft shades, waves of 63 pixels and noise, as a camera that was turned would; its path."""
    x, y = np.meshgrid(*map(np.arange, size))
    shade = [110 + 60 * np.sin(x / 300 + c) * np.cos(y / (200 + 40 * c)) for c in range(3)]
    pixels = np.stack(shade, -1) + 25 * (np.sin(x / 10) * np.sin(y / 10))[..., None]
    pixels += np.random.default_rng(0).uniform(-30, 30, pixels.shape)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).convert(mode).save(path, quality=90, exif=exif)
    return str(path)


@pytest.mark.parametrize("mode, turn", [("RGB", 1), ("L", 1), ("CMYK", 1), ("RGB", 6)])
def test_a_large_jpeg_is_decoded_in_part_and_gives_the_same_crop(mode, turn, tmp_path):
    """Of 255 levels: less than 0.3 apart in the mean, 2 at most."""
    photograph(tmp_path / "a.jpg", mode, turn)
    whole, fast = (data.open_images(str(tmp_path), "train", (64, 64), crop_min=c).read(0) for c in (None, 0.5))
    assert whole.shape == ((3, 1600, 1200) if turn == 6 else (3, 1200, 1600))
    assert [4 * n for n in fast.shape[1:]] == list(whole.shape[1:])  # 1/4: the shorter side 300, at 1/8 only 150
    pairs, crop = [[data.eval_transform((64, 64))(x) for x in (whole, fast)]], data.CropAndFlip((64, 64), 0.5)
    for seed in range(6):                                    # the same part of both
        torch.manual_seed(seed)
        box = crop.make_params([fast])
        pairs.append([])
        for image, scale in ((whole, 4), (fast, 1)):
            crop.make_params = lambda _: {name: scale * n for name, n in box.items()}
            torch.manual_seed(seed)
            pairs[-1].append(crop(image))
        del crop.make_params
    for a, b in pairs:
        apart = (a.float() - b.float()).abs()
        assert apart.mean() < 0.3 and apart.max() <= 2, (apart.mean(), apart.max())
    content = (tmp_path / "a.jpg").read_bytes()               # cut off: broken as it was
    (tmp_path / "a.jpg").write_bytes(content[:len(content) // 2])
    for least in (None, 200):
        with pytest.raises((OSError, RuntimeError)):
            data.read_image(str(tmp_path / "a.jpg"), least)


def test_the_smallest_crop_of_a_photograph_decoded_in_part_has_twice_the_pixels(tmp_path):
    """And what is not a JPEG, or too small for that, is decoded whole, bit by bit as ever."""
    for size, crop_min in product(((1200, 1600), (1999, 1501), (3000, 800)), (0.08, 0.5, 0.8, 1.0)):
        if crop_min == 0.08:
            photograph(tmp_path / "a.jpg", size=size)
        source = data.open_images(str(tmp_path), "train", (64, 64), crop_min=crop_min)
        image, crop = source.read(0), data.CropAndFlip((64, 64), crop_min)
        sides = [min(p["height"], p["width"]) for p in (crop.make_params([image]) for _ in range(200))]
        assert min(sides) >= 127, (size, crop_min)           # 128, and rounding
        assert min(image.shape[1:]) >= 2 * round(64 / 0.875) # the centre crop's
        assert min(image.shape[1:]) < 4 * 64 / math.sqrt(0.75 * crop_min) + 2 or min(image.shape[1:]) == min(size)
    small = photograph(tmp_path / "b.jpg", size=(300, 200))
    large = str(tmp_path / "c.png")
    Image.open(photograph(tmp_path / "a.jpg")).save(large)
    for path, least in ((small, 101), (large, 50)):
        assert torch.equal(data.read_image(path), data.read_image(path, least))


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
    imagenet, val = (data.Folder(tmp_path / "imagenet", split) for split in ("train", "val"))
    assert (
        len(imagenet) == 2
        and imagenet.classes == ["cat", "dog"]
        and imagenet.labels.tolist() == [0, 1]
        and len(val) == 1
    )
    classes = data.Folder(tmp_path / "classes", "train")
    assert len(classes) == 2 and classes.classes == ["cat", "dog"] and classes.read(1).shape == (3, 30, 40)
    assert len(data.Folder(tmp_path / "flat", "train")) == 2
    os.symlink(tmp_path / "flat", tmp_path / "flat" / "loop")
    assert len(data.Folder(tmp_path / "flat", "train")) == 2     # a loop of links is entered once
    for file in ("TRAIN/cat/1.jpg", "TRAIN/dog/2.jpg", "Val/cat/3.jpg", "Val/dog/4.jpg"):
        (tmp_path / "loud" / file).parent.mkdir(parents=True)
        paint(tmp_path / "loud" / file)
    for split in ("train", "val"):                           # two splits, in any capitals, and not two classes
        loud = data.open_images(str(tmp_path / "loud"), split, (32, 32), labelled=True)
        assert loud.classes == ["cat", "dog"] and len(loud) == 2


def test_torchvision_datasets_open_by_name(tmp_path):
    """CIFAR-10 in its own file format, written here: five pickled batches of one image each, and a test batch."""
    import hashlib, pickle
    from torchvision.datasets import CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(3072, dtype=np.uint8)[None]
    sums = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        content = (
            {"label_names": [str(i) for i in range(10)]} if name == "batches.meta" else {"data": pixels, "labels": [3]}
        )
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:              # the real files' checksums are the only thing replaced
        patch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in sums if n.startswith("data")])
        patch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        patch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
        train = data.open_images("cifar10", "train", (32, 32), tmp_path)
        assert len(train) == 5 and len(data.open_images("cifar10", "val", (32, 32), tmp_path)) == 1
    assert torch.equal(train.read(2), torch.from_numpy(pixels).view(3, 32, 32))


def test_shapes_come_from_seed_and_index_and_every_class_is_equally_common():
    train, again, val = data.Shapes("train", (64, 64)), data.Shapes("train", (64, 64)), data.Shapes("val", (64, 64))
    assert torch.equal(train.read(17), again.read(17)) and not torch.equal(train.read(17), val.read(17))
    assert not torch.equal(train.read(17), data.Shapes("train", (64, 64), seed=1).read(17))
    assert np.bincount(train.labels).tolist() == [1000] * 10 and np.bincount(val.labels).tolist() == [200] * 10
    assert train.read(3).shape == (3, 64, 64) and data.Shapes("val", (48, 80)).read(0).shape == (3, 48, 80)


def test_shapes_are_not_told_apart_by_colour():
    """A nearest-centroid classifier on each image's colour mean and spread stays near chance, 10 %."""
    source = data.Shapes("train", (48, 48))
    features = torch.stack(
        [torch.cat([x.mean((1, 2)), x.std((1, 2))]) for x in (source.read(i).float() for i in range(1200))]
    )
    labels = torch.from_numpy(source.labels[:1200])
    centroids = torch.stack([features[:800][labels[:800] == c].mean(0) for c in range(10)])
    accuracy = (torch.cdist(features[800:], centroids).argmin(1) == labels[800:]).float().mean()
    assert accuracy < 0.2


def test_normalise_is_to_tensor_then_normalize():
    from torchvision.transforms import v2
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    reference = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    close(data.normalise(images), reference(images))
    close(data.denormalise(data.normalise(images)) * 255, images.float())


def test_crop_and_flip_is_torchvisions_crop_then_its_flip():
    from torchvision.transforms import InterpolationMode, v2
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    fine_tuning = data.augment(SimpleNamespace(image_size=48, crop_min=0.2, randaug=0, jitter=0))
    for ours, mode in (
        (data.CropAndFlip((48, 48), 0.2), InterpolationMode.BILINEAR),
        (fine_tuning, InterpolationMode.BICUBIC),
    ):  # as released
        theirs = v2.Compose(
            [v2.RandomResizedCrop((48, 48), (0.2, 1.0), interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
        )
        for seed in range(12):
            crops = []
            for transform in (theirs, ours):
                torch.manual_seed(seed)
                crops.append(transform(image))
            assert torch.equal(*crops)


def ramps(h, w):
    """An image (2, h, w) that says where its pixels came from: y / h and x / w of their centres."""
    y, x = (torch.arange(n) + 0.5 for n in (h, w))
    return torch.stack([(y / h)[:, None].expand(h, w), (x / w)[None].expand(h, w)])


@pytest.mark.parametrize("size, crop", [((48, 64), 0.875), ((64, 48), 0.95), ((32, 96), 1.0), ((40, 40), 0.875)])
def test_the_test_crop_is_the_centre_of_an_image_that_covers_it_and_never_padded(size, crop):
    for h, w in product((31, 60, 100), (37, 90, 233)):
        whole = data.eval_transform(size, crop)(ramps(h, w))
        assert whole.shape == (2, *size)
        ends = (whole[0, -1] - whole[0, 0]).mean(), (whole[1, :, -1] - whole[1, :, 0]).mean()
        step = [end / (side - 1) for end, side in zip(ends, size)]           # of the whole, per pixel
        scale = [share.item() * side for share, side in zip(step, (h, w))]   # source pixels per pixel, down and across
        assert scale[0] == pytest.approx(scale[1], rel=0.05)                 # nothing is stretched
        shown = [share.item() * side for share, side in zip(step, size)]     # of the whole, down and across
        assert max(shown) == pytest.approx(crop, abs=0.02)                   # as much as fits, and no more
        close(whole.mean((1, 2)), torch.full((2,), 0.5), atol=0.03, rtol=0)  # of the middle
        white = data.eval_transform(size, crop)(torch.full((3, h, w), 255, dtype=torch.uint8))
        assert (white == 255).all()                          # padding would be black
        if size[0] == size[1]:                               # the released rule, by torchvision
            image = torch.randint(256, (3, h, w), dtype=torch.uint8)
            resized = tvf.resize(image, round(size[0] / crop), tvf.InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(data.eval_transform(size, crop)(image), tvf.center_crop(resized, size))


def test_a_random_crop_of_another_shape_stretches_by_a_third_at_most_either_way():
    turns, transform = [], data.CropAndFlip((32, 64), 0.3)
    for seed in range(60):
        torch.manual_seed(seed)
        part = transform(ramps(100, 200))
        down = 100 * (part[0, 24] - part[0, 8]).mean().abs()                 # source pixels of 16 pixels
        across = 200 * (part[1, :, 48] - part[1, :, 32]).mean().abs()
        turns.append((across / down).item())
    assert 0.72 < min(turns) < 0.85 and 1.18 < max(turns) < 1.39


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    source = data.Shapes("train", (48, 48))
    crop = data.CropAndFlip((48, 48), 0.2)
    samples = data.ImageDataset(source, crop, seed=0)
    first, state = samples[0, 5][0], torch.get_rng_state()
    torch.rand(7)
    assert torch.equal(first, samples[0, 5][0]) and not torch.equal(first, samples[1, 5][0])
    assert not torch.equal(first, data.ImageDataset(source, crop, seed=1)[0, 5][0])
    torch.set_rng_state(state)
    samples[2, 2]
    assert torch.equal(torch.get_rng_state(), state)         # and it leaves the caller's random numbers alone


@pytest.mark.parametrize("batch", [5, 40])
def test_batches_are_kept_though_workers_write_into_the_same_memory_again(batch):
    """Every batch of two workers, looked at when all have come, is the batch made here."""
    samples = data.ImageDataset(data.Shapes("train", (32, 32)), data.CropAndFlip((32, 32), 0.5), seed=0)
    keys = data.every_image_once(203, batch, SimpleNamespace(rank=0, size=1))          # the last one is smaller
    world = SimpleNamespace(on_cuda=False)
    here, there = (list(data.make_loader(samples, keys, workers, world)) for workers in (0, 2))
    assert len(here) == len(there) == math.ceil(203 / batch)
    for a, b in zip(here, there):
        assert all(map(torch.equal, a, b)) and a[0].stride() == b[0].stride() and a[0].stride(1) == 1
        assert not b[0].is_shared()                          # the memory of the workers is theirs


def flat(batches):
    return [list(b) for b in batches]


def test_processes_and_accumulation_cut_the_same_steps():
    make = lambda batch, accum, world, rank, start=0: flat(
        data.ResumableBatchSampler(50, batch, accum, world, rank, seed=3, start=start, stop=9)
    )
    whole = make(12, 1, 1, 0)
    assert len(whole) == 9 and [k[0] for b in whole for k in b] == [0] * 48 + [1] * 48 + [2] * 12  # 4 steps an epoch
    assert len({i for b in whole[:4] for _, i in b}) == 48   # no image twice in an epoch
    assert [a + b for a, b in zip(make(6, 1, 2, 0), make(6, 1, 2, 1))] == whole
    halves = make(6, 2, 1, 0)
    assert [halves[i] + halves[i + 1] for i in range(0, 18, 2)] == whole
    assert make(12, 1, 1, 0, start=5) == whole[5:]           # resuming is starting later
    with pytest.raises(ValueError, match="the data set has 50 images, one step takes 64"):
        flat(data.ResumableBatchSampler(50, 32, 1, 2, 0, 0, 0, 1))


# ---- pre-training: optimiser ----

def test_cosine_schedule_at_the_recipes_numbers():
    """ResNet, 300 epochs, 10 of warm-up, base 1.2e-3, floor 1e-5; epochs stand for iterations."""
    lr = lambda t, base=1.2e-3: optim.lr_at(t, 300, 10, base, 1e-5, "cosine")
    assert (
        lr(0) == 0
        and lr(10) == pytest.approx(1.2e-3)
        and lr(300) == pytest.approx(1e-5)
        and lr(155) == pytest.approx((1.2e-3 + 1e-5) / 2)
    )
    assert lr(5) == pytest.approx(
        0.5 * (1e-5 + 1.19e-3 * (1 + math.cos(math.pi * -5 / 290)) / 2)
    )  # the ramp times the cosine
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.2e-3)   # a second route, after warm-up
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 290, eta_min=1e-5)
    for t in range(10, 300):
        assert lr(t) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert lr(300, 1.2e-4) == pytest.approx(1e-5)            # the floor is absolute for the mask token's group too
    assert all(lr(t, 4e-6) <= 4e-6 for t in range(301))      # and never lifts a small lr


def test_step_schedule_of_the_vit_recipe():
    lr = lambda t: optim.lr_at(t, 800, 10, 4e-4, 1e-5, "step")
    assert [lr(t) for t in (0, 5, 10, 699, 700, 799)] == pytest.approx([0, 2e-4, 4e-4, 4e-4, 4e-5, 4e-5])


def test_published_recipes_come_out_of_eight_gpus_with_256_images():
    for arch, lr, epochs, weight, clip in (
        ("resnet50", 1.2e-3, 300, 0.5, 0),
        ("vit_base", 4e-4, 800, 0.1, 5.0),
        ("convnext_tiny", 1.2e-3, 300, 0, 0),
        ("resnet101", 1.2e-3, 300, 0.1, 0),
        ("swin_tiny", 4e-4, 800, 0.5, 5.0),
        ("resnet200", 1.2e-3, 300, 0, 0),
    ):
        args = pretrain.parse(["--data", "x", "--arch", arch])
        assert (args.lr * 2048 / 512, args.epochs, args.fourier_weight, args.clip_grad) == (
            pytest.approx(lr),
            epochs,
            weight,
            clip,
        )
        assert (args.mask_ratio, args.mask_size, args.weight_decay, args.min_lr) == (0.6, 32, 0.05, 1e-5)
    simmim = pretrain.parse(["--data", "x", "--baseline", "simmim", "--lr", "1"])
    assert (simmim.token, simmim.token_stage, simmim.fill, simmim.fourier_weight, simmim.lr) == (
        "replace",
        1,
        "zero",
        0,
        1,
    )
    for arch in ("resnet50", "convnext_tiny", "vit_base", "swin_tiny"):      # plain L1 on every backbone
        assert not pretrain.parse(["--data", "x", "--baseline", "simmim", "--arch", arch]).focal_pixels
    r101 = pretrain.parse(["--data", "x", "--arch", "resnet101"])
    assert (r101.fourier_focal, r101.spectrum) == (False, "image")
    for arch, stage in (("deit_small", 8), ("deit_tiny", 1)):
        deit = pretrain.parse(["--data", "x", "--arch", arch])
        assert (deit.image_size, deit.lr, deit.schedule, deit.min_lr, deit.epochs, deit.clip_grad, deit.crop_min) == (
            192,
            2e-4,
            "cosine",
            1e-5,
            800,
            5.0,
            0.67,
        )
        net = A2MIM(
            build_encoder(arch, 192), 192, deit.mask_size, deit.token_stage, deit.token
        )  # 6 x 6 cells on 12 x 12 patches
        assert (
            net.token_stage == stage and net.grid == (6, 6) and net.encoder.stages[8] == ["blocks.7"]
        )  # the eighth block


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "deit_tiny", "swin_tiny"])
def test_what_decays_and_what_does_not(arch):
    net = A2MIM(build_encoder(arch, 64), 64)
    names = {p: n for n, p in net.named_parameters()}
    norms = {p for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)) for p in m.parameters()}
    seen = set()
    for group in optim.parameter_groups(net, 0.05, 0.1):
        for p in group["params"]:
            name = names[p]
            seen.add(p)
            free = (
                p in norms
                or "bias" in name
                or name.endswith(
                    (
                        "mask_token.token",
                        "mask_token.gamma",
                        "layer_scale",
                        "gamma_1",
                        "gamma_2",
                        "pos_embed",
                        "cls_token",
                    )
                )
            )
            assert group["weight_decay"] == (0 if free else 0.05), name
            assert group["scale"] == (0.1 if name in ("mask_token.token", "mask_token.gamma") else 1.0), name
    assert seen == set(names)


# ---- pre-training: whole runs ----

TINY = ("--data shapes --arch deit_tiny --image-size 64 --mask-size 16 --batch-size 8 --workers 0 "
        "--amp off --log-every 1 --sheets 0 --drop-path 0 --lr 0.03 --val 0").split()
QUICK = ["--arch", "shufflenet_v2_x0_5", "--image-size", "32"]   # where any net will do


@pytest.fixture
def few_images(monkeypatch):
    """`shapes` with 32 images, an epoch of four steps; and a DeiT-T of three blocks, so that it is fast."""
    monkeypatch.setitem(model.VITS, "deit_tiny", (192, 3, 3, 384))
    init = data.Shapes.__init__
    def small(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.count, self.labels = 32, self.labels[:32]
    monkeypatch.setattr(data.Shapes, "__init__", small)


def run(out, *flags, base=TINY):
    """Pre-trains in this process; returns (log lines without the clock, checkpoint)."""
    pretrain.main([*base, "--out", str(out), *flags])
    return read_log(out), torch.load(out / "checkpoint.pt", weights_only=True)


CLOCK = ("time", "images_per_s", "peak_memory_mb")           # differ from run to run


def read_log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def same_weights(a, b, **tolerance):
    for name, value in a["model"].items():
        close(value, b["model"][name], **(tolerance or dict(atol=0, rtol=0)), msg=lambda text: f"{name}: {text}")


def test_the_same_run_twice_and_with_workers_gives_the_same_log_and_weights(few_images, tmp_path):
    log, final = run(tmp_path / "a", "--epochs", "2", "--drop-path", "0.2")
    for name, workers in (("b", "0"), ("c", "2")):
        again, repeated = run(tmp_path / name, "--epochs", "2", "--drop-path", "0.2", "--workers", workers)
        assert again == log
        same_weights(final, repeated)
    other, _ = run(tmp_path / "d", "--epochs", "2", "--drop-path", "0.2", "--seed", "1")
    assert other != log
    assert [line["step"] for line in log] == list(range(1, 9)) and log[-1]["epoch"] == 2


@pytest.mark.parametrize("arch", ["deit_tiny", "resnet18"])
def test_a_run_that_was_cut_resumes_into_the_uninterrupted_run(arch, few_images, tmp_path, monkeypatch, capsys):
    flags = ["--epochs", "2", "--arch", arch, "--drop-path", "0.1", "--save-every", "1"]
    log, final = run(tmp_path / "whole", *flags)
    step, cut = pretrain.train_step, RuntimeError("the power fails")

    def until_six(number, *rest):                            # in the middle of the second epoch
        if number == 6:
            raise cut
        return step(number, *rest)
    monkeypatch.setattr(pretrain, "train_step", until_six)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", *flags)
    assert "the power fails" in capsys.readouterr().err      # a failure that nobody foresaw is told whole
    monkeypatch.setattr(pretrain, "train_step", step)
    pretrain.main(["--data", "shapes", "--out", str(tmp_path / "cut"), "--resume"])  # the other flags are remembered
    assert read_log(tmp_path / "cut") == log
    same_weights(final, torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True))


def test_a_log_line_holds_means_since_the_line_before_and_a_resumed_run_logs_the_same(
    few_images, tmp_path, monkeypatch
):
    flags = [*QUICK, "--epochs", "2"]
    each, _ = run(tmp_path / "each", *flags)                 # a line for every step
    log, _ = run(tmp_path / "whole", *flags, "--log-every", "3")
    assert [line["step"] for line in log] == [1, 3, 4, 6, 8]
    before = 0
    for line in log:
        since = each[before:line["step"]]
        for name in ("loss", "spatial", "fourier"):
            assert line[name] == pytest.approx(statistics.mean(one[name] for one in since), abs=2e-6)
        before = line["step"]

    step = pretrain.train_step

    def five(number, *rest):
        return step(number, *rest) if number < 5 else 1 / 0
    monkeypatch.setattr(pretrain, "train_step", five)
    with pytest.raises(SystemExit):                          # between the log lines of steps 4 and 6
        run(tmp_path / "cut", *flags, "--log-every", "3", "--save-every", "5")
    shutil.copytree(tmp_path / "cut", tmp_path / "old")
    monkeypatch.setattr(pretrain, "train_step", step)
    assert run(tmp_path / "cut", "--resume", base=[])[0] == log
    saved = torch.load(tmp_path / "old" / "checkpoint.pt", weights_only=True)
    del saved["means"]                                       # a checkpoint of an older version
    torch.save(saved, tmp_path / "old" / "checkpoint.pt")
    old, _ = run(tmp_path / "old", "--resume", base=[])
    assert old[:3] == log[:3] and old[4] == log[4]
    assert old[3]["loss"] == each[5]["loss"]                 # the mean of what is known: step 6


def test_a_step_that_is_not_finite_on_one_process_is_left_out_of_the_means_of_all():
    others = iter([5.0, 7.0, math.nan, 3.0, 1.0])            # what the other of two processes adds
    cpu = torch.device("cpu")
    world = SimpleNamespace(device=cpu, all_reduce_mean=lambda values: (values + next(others)) / 2)
    means = progress.RunningMeans(world)
    for mine in (1.0, 2.0, 3.0, math.inf, 4.0):
        means.add({"spatial": torch.tensor(9.0), "loss": torch.tensor(mine)})
    expected = {"spatial": (14 + 16 + 10) / 6, "loss": (6 + 9 + 5) / 6}      # of steps 1, 2 and 5
    assert means.take() == pytest.approx(expected, abs=1e-6)
    world.all_reduce_mean = lambda values: values * math.nan
    means.add({"spatial": torch.tensor(9.0), "loss": torch.tensor(1.0)})
    assert means.take() == {"spatial": None, "loss": None}


def test_a_log_file_gets_a_plain_line_an_epoch(few_images, capsys, tmp_path):
    started = time.time()
    log, _ = run(tmp_path / "run", *QUICK, "--epochs", "2", "--val", "0.5")
    said = capsys.readouterr().err
    form = r"^(\S+ \S+)  epoch (\d)/2  step (\d)/8  loss ([\d.]+)  (.*)(\d+) images/s  00:0\d left$"
    lines = re.findall(form, said, re.M)
    assert [line[1:3] for line in lines] == [("1", "4"), ("2", "8")]
    assert "\r" not in said and "it/s" not in said
    losses = [line["loss"] for line in log if "loss" in line]
    means = [statistics.mean(part) for part in (losses[:4], losses[4:])]
    assert [float(line[3]) for line in lines] == pytest.approx(means, abs=6e-5)
    readme = (HERE / "README.md").read_text()
    for line in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()):
        assert started - 1 < line["time"] < time.time() + 1
        assert all(f"`{key}`" in readme for key in line)


def test_a_long_epoch_gets_a_plain_line_every_ten_minutes_and_a_terminal_a_bar(capsys, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(time=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr(progress, "time", clock)
    plan = SimpleNamespace(per_epoch=1000, total=2000, global_batch=4)
    world = SimpleNamespace(rank=0, print0=command.Distributed().print0)

    def walk(shown):
        for done in range(1, 1001):                          # an hour and 40 minutes
            now[0] += 6
            shown.update()
            if done % 50 == 0:
                shown.show(loss=done / 1000, lr=0.1, images_per_s=1, steps=50)
            if done == 500:
                shown.held_out = (500, 0.25)
        shown.close()

    walk(progress.Progress(world, plan, done=0))
    lines = capsys.readouterr().err.splitlines()
    steps = [int(re.search(r"step (\d+)/2000", line)[1]) for line in lines]
    assert steps == [*range(101, 1000, 101), 1000]           # the first step beyond 600 s
    assert "loss 0.0750  1 images/s  3:09:54 left" in lines[0]       # (0.05 + 0.1) / 2; 1899 x 6 s
    assert "held-out" not in lines[3] and "held-out 0.2500 (step 500)" in lines[5]

    class Terminal(io.StringIO):
        isatty = lambda self: True
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    walk(progress.Progress(world, plan, done=0))
    bar = terminal.getvalue()
    assert "\r" in bar and "1000/2000" in bar and " left" not in bar


def test_the_curves_have_a_panel_for_held_out_images_and_their_last_point(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": step, "epoch": step / 100, "loss": 2.0 - step / 100} for step in range(1, 101)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures.save_curve(tmp_path / "one.png", log)
    W, H = pictures.PANEL
    assert Image.open(tmp_path / "one.png").size == (W, H)
    for step, held_out in ((20, 0.06), (60, 0.04), (100, 0.02)):
        measured = {"held_out": held_out, "mean_colour": 0.1, "blur": 0.05}
        lines.append({"step": step, "epoch": step / 100, **measured})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures.save_curve(tmp_path / "two.png", log)
    page = np.asarray(Image.open(tmp_path / "two.png")).astype(int)
    assert page.shape == (2 * H, W, 3)

    def found(name):
        """Rows and columns of the pixels of a curve's colour, below its legend."""
        rgb = np.array(ImageColor.getrgb(pictures.COLOURS[name]))
        rows, columns = np.nonzero(np.abs(page - rgb).max(2) < 12)
        below = rows % H > 44
        return rows[below], columns[below]

    assert len(set(pictures.COLOURS.values())) == len(pictures.COLOURS) == 5
    edge = W - 62                                            # where the axes end
    for name in ("model", "mean-colour baseline", "blur baseline"):
        rows, columns = found(name)
        assert len(rows) and rows.min() > H                  # in the second panel alone
        assert (columns >= edge - 1).any(), name             # up to the last step
    rows, columns = found("model")
    heights = [rows[np.abs(columns - x) <= 3].mean() for x in (columns.min() + 3, edge)]
    assert heights[0] < heights[1] - 40                      # it falls
    levels = []
    for name in ("mean-colour baseline", "blur baseline"):
        rows, columns = found(name)
        levels.append(rows[columns < edge])
        assert np.ptp(levels[-1]) <= 3                       # a level line
    assert levels[0].max() < levels[1].min()                 # the higher loss is above


@pytest.mark.parametrize("arch, more", [("resnet18", ["--token-stage", "3"]), ("deit_tiny", [])])
def test_images_that_are_not_square_are_pre_trained_on_resumed_and_fine_tuned(
    arch, more, few_images, tmp_path, monkeypatch, capsys
):
    flags = ["--arch", arch, "--image-size", "64", "96", "--epochs", "1", "--val", "0.5", *more]
    log, final = run(tmp_path / "whole", *flags, "--sheets", "2")
    assert final["args"]["image_size"] == [64, 96] and log[-1]["held_out"] > 0
    assert "images at 64 x 96 px, 15 of 24 mask units hidden" in capsys.readouterr().err      # ceil(0.6 * 24)
    sheet = Image.open(tmp_path / "whole" / "reconstruction-000004.png")     # 6 rows of 5, 2 px apart, 2 x enlarged
    assert sheet.size == (2 * (5 * 98 + 2), 2 * (6 * 66 + 2) + 22 + 20)      # titles above, a note below
    assert np.asarray(sheet)[-20:].min() < 128               # it is there
    step = pretrain.train_step
    monkeypatch.setattr(pretrain, "train_step", lambda number, *rest: step(number, *rest) if number < 2 else 1 / 0)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", *flags, "--save-every", "1")
    monkeypatch.setattr(pretrain, "train_step", step)
    _, resumed = run(tmp_path / "cut", "--resume", base=[])
    same_weights(final, resumed)
    weights_file = tmp_path / "whole" / "backbone.pt"
    monkeypatch.setattr(finetune, "EXCEPTIONS", {})
    finetune.main(f"--weights {weights_file} --data shapes --batch-size 8 --epochs 0.5 --workers 0 --amp off --out "
                  f"{tmp_path / 'tuned'}".split())
    made = json.loads((tmp_path / "tuned" / "args.json").read_text())
    assert made["image_size"] == [64, 96] and "labelled images at 64 x 96 px" in capsys.readouterr().err
    call = f"--weights {tmp_path / 'tuned' / 'best.pt'} --data shapes --workers 0 --amp off --eval-only --out"
    finetune.main([*call.split(), str(tmp_path / "eval")])
    top1 = [json.loads((tmp_path / name / "result.json").read_text())["top1"] for name in ("tuned", "eval")]
    assert top1[0] == top1[1]
    code, said = complaint(capsys, "--out", tmp_path / "whole", "--resume", "--arch", "deit_small")
    assert code == 2 and f"of another model ({arch} at 64 x 96 px)" in said
    if arch == "deit_tiny":
        code, said = complaint(capsys, "--weights", weights_file, "--data", "shapes", "--test-size", "96", "64",
                               main=finetune.main)
        assert code == 2 and "--test-size of 96 x 64 px: deit_tiny has one grid" in said


def test_positions_of_a_grid_that_is_not_square_are_turned_into_another_as_pictures_are(tmp_path):
    """4 x 6 patches and 6 x 4 are as many: without the size of then, one would be taken for the other."""
    net = build_encoder("deit_tiny", (64, 96)).backbone
    across = torch.arange(6).repeat(4).float()               # says in which column a patch is
    offset = torch.arange(11).repeat(7).float()              # and how far a pair lies apart in columns
    with torch.no_grad():
        net.pos_embed[0, 1:] = across[:, None]
        for block in net.blocks:
            block.attn.relative_position_bias_table[:77] = offset[:, None]
    torch.save(net.state_dict(), tmp_path / "backbone.pt")
    for turned, made_at, beside in (((96, 64), (64, 96), None), ((96, 64), None, [64, 96]), ((80, 80), None, [64, 96])):
        if beside:
            (tmp_path / "args.json").write_text(json.dumps(dict(image_size=beside)))
        again = build_encoder("deit_tiny", turned)
        found = weights.load_backbone(again, tmp_path / "backbone.pt", made_at)
        assert len(found["resized"]) == 13 and not found["missing"]
        for table, gw, were in ((again.backbone.pos_embed[0, 1:], turned[1] // 16, 6),
                                 (again.backbone.blocks[3].attn.relative_position_bias_table[:-3],
                                  2 * (turned[1] // 16) - 1, 11)):
            columns = table[:, 0].view(-1, gw)
            close(columns, columns[:1].expand_as(columns))   # every row the same, as it was
            assert (columns[0].diff() > 0).all()
            assert columns[0].mean().item() == pytest.approx((were - 1) / 2, abs=0.01)
    (tmp_path / "args.json").unlink()
    same = build_encoder("deit_tiny", (64, 96))
    assert not weights.load_backbone(same, tmp_path / "backbone.pt")["resized"]
    close(same.backbone.pos_embed, net.pos_embed, atol=0, rtol=0)
    wide = weights.load_backbone(build_encoder("deit_tiny", (80, 80)), tmp_path / "backbone.pt", (96, 64))
    assert len(wide["resized"]) == 13                        # as many patches as told: taken at their word


def test_accumulating_two_halves_is_one_batch_with_the_image_spectrum_and_not_with_the_batch_spectrum(
    few_images, tmp_path
):
    for spectrum in loss.SPECTRA:
        flags = ["--epochs", "1", "--fourier-weight", "1", "--spectrum", spectrum]
        log, whole = run(tmp_path / f"{spectrum}1", *flags)
        halves_log, halves = run(tmp_path / f"{spectrum}2", *flags, "--batch-size", "4", "--accum", "2")
        fourier, fourier_halves = log[0]["fourier"], halves_log[0]["fourier"]
        if spectrum == "image":
            assert fourier_halves == pytest.approx(fourier, rel=1e-4)
            same_weights(whole, halves, atol=2e-5, rtol=1e-3)
        else:
            assert fourier_halves > 1.05 * fourier           # half the images, less cancelling


def torchrun(*arguments, processes=2, **options):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            *map(str, arguments),
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_a_bug_ends_the_run_at_once_with_its_traceback_though_workers_are_deaf_to_sigterm(tmp_path):
    code = (
        "import pretrain\ndef bug(*given, **more): raise RuntimeError('a bug of a fork')\npretrain.a2mim_loss = bug\n"
        "pretrain.main('--data shapes --arch deit_tiny --image-size 64 --mask-size 16 --batch-size 8 --epochs 1 "
        "--sheets 0 --workers 2 --out %s'.split())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code % (tmp_path / "run")], cwd=HERE, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1 and "in bug" in done.stderr and "RuntimeError: a bug of a fork" in done.stderr


def verdict_of(said):
    """What pretrain.py printed: (share of the mean colour's error, of the blur's, +/-, words)."""
    number = r"([\d.]+)"
    form = rf"{number} of the mean colour's error, {number} \+/- {number} of a blur's: (.*)"
    found = re.search(form, said)
    return *map(float, found.groups()[:3]), found[4]


def test_two_processes_train_the_same_weights_as_one(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(21):                                      # 5 of them are held out: two processes have 3 and 2
        paint(tmp_path / "images" / f"{i}.png", colour=(12 * i, 255 - 12 * i, 40), size=(64, 64))
    flags = [*TINY, "--data", tmp_path / "images", "--epochs", "2", "--fourier-weight", "1", "--spectrum", "image"]
    flags += ["--val", "0.02"]
    _, one = run(tmp_path / "one", base=[*map(str, flags)])
    done = torchrun("pretrain.py", *flags, "--batch-size", 4, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    verdicts = [verdict_of(said) for said in (capsys.readouterr().err, done.stderr)]
    assert verdicts[0][3] == verdicts[1][3]
    assert verdicts[0][:3] == pytest.approx(verdicts[1][:3], abs=0.011, rel=1e-6)
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=1e-5)
    held_out = [[line[key] for line in log if "held_out" in line for key in ("held_out", "blur")] for log in logs]
    assert len(held_out[0]) == 2 and held_out[1] == pytest.approx(held_out[0], rel=1e-3)
    same_weights(one, torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True), atol=2e-5, rtol=1e-3)


def test_bf16_stays_close_to_fp32(few_images, tmp_path):
    exact, _ = run(tmp_path / "off", "--epochs", "1")
    rough, _ = run(tmp_path / "bf16", "--epochs", "1", "--amp", "bf16")
    for a, b in zip(exact, rough):
        assert a != b and b["loss"] == pytest.approx(a["loss"], rel=0.02)


def test_the_loss_falls_and_every_output_is_there(few_images, tmp_path):
    log, checkpoint = run(
        tmp_path / "run", "--epochs", "15", "--sheets", "3", "--arch", "resnet18", "--batch-size", "16", "--lr", "0.1",
        "--val", "0.25"
    )
    log = [line for line in log if "loss" in line]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock",
        "args.json",
        "log.jsonl",
        "checkpoint.pt",
        "checkpoint-previous.pt",
        "backbone.pt",
        "loss.png",
        "reconstruction-000000.png",
        "reconstruction-000015.png",
        "reconstruction-000030.png",
    }
    pictures.save_curve(tmp_path / "again.png", tmp_path / "run" / "log.jsonl")
    curves = [tmp_path / "run" / "loss.png", tmp_path / "again.png"]         # the last line is in it
    assert curves[0].read_bytes() == curves[1].read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "run" / "reconstruction-000030.png"))
    first = np.asarray(Image.open(tmp_path / "run" / "reconstruction-000000.png"))
    width = sheet.shape[1] // 5
    assert np.array_equal(sheet[:, : 2 * width], first[:, : 2 * width])      # same images, same masks
    assert not np.array_equal(sheet[:, 2 * width : 3 * width], first[:, 2 * width : 3 * width])
    assert json.loads((tmp_path / "run" / "args.json").read_text())["arch"] == "resnet18"
    assert tv.resnet18().load_state_dict(
        torch.load(tmp_path / "run" / "backbone.pt", weights_only=True), strict=False
    ).missing_keys == ["fc.weight", "fc.bias"]


# ---- forks: README, "Change it" ----

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
        cells = torch.cartesian_prod(*map(torch.arange, grid)).float().to(device)        # (cells, 2)
        centres = torch.rand(batch, 2, device=device, generator=generator) * torch.tensor(grid, device=device)
        hidden = torch.cdist(centres, cells, p=math.inf).argsort(1)[:, : masking.hidden_count(len(cells), ratio)]
        none = torch.zeros(batch, len(cells), dtype=torch.bool, device=device)
        return none.scatter_(1, hidden, True).view(batch, *grid)

    monkeypatch.setattr(pretrain, "random_mask", block_mask)
    fork(tmp_path / "run")
    masks = pretrain.draw_masks(200, (8, 8), 0.5, torch.device("cpu"), 0)
    assert masks.sum((1, 2)).unique().tolist() == [32]
    touching = (masks[:, 1:] == masks[:, :-1]).float().mean()
    assert touching > 0.8                                    # a block: most neighbours are alike (at random, half are)


def test_fork_reconstructs_gradient_orientations(few_images, tmp_path, monkeypatch, capsys):
    """A HOG-like target, 9 orientations per pixel: what is reconstructed, and the decoder's channels."""
    def orientations(images, model=None):
        gray = images.mean(1, keepdim=True)
        dx, dy = gray - gray.roll(1, -1), gray - gray.roll(1, -2)
        bins = (torch.atan2(dy, dx) % math.pi / math.pi * 9).long().clamp(max=8)         # (B, 1, H, W)
        return torch.zeros_like(gray).repeat(1, 9, 1, 1).scatter_(1, bins, torch.hypot(dx, dy))

    build = model.build_decoder
    monkeypatch.setattr(pretrain, "make_target", orientations)
    monkeypatch.setattr(model, "build_decoder", lambda width, channels, stride: build(width, 9, stride))
    assert fork(tmp_path / "run")["model"]["decoder.0.weight"].shape[0] == 9 * 32**2
    # such a target is no picture: there are no sheets, and it is not compared with the mean colour and a blur
    assert not list((tmp_path / "run").glob("reconstruction-*.png"))
    assert "mean_colour" not in read_log(tmp_path / "run")[-1] and "a blur" not in capsys.readouterr().err
    slope = torch.arange(8.0).expand(1, 3, 8, 8)             # grows to the right: orientation 0, strength 1
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
    finally:                                                 # the tests after this one have three again
        data.mean_and_std.cache_clear()
    assert state["encoder.backbone.conv1.weight"].shape[1] == 4 and state["decoder.0.weight"].shape[0] == 4 * 32**2


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


# ---- the shape of the code ----

def test_no_line_of_the_method_is_wider_than_100_columns():
    for file in [*HERE.glob("*.py"), *HERE.glob("engine/*.py"), *HERE.glob("extras/*.py")]:
        limit = 120 if file.parent.name == "extras" or file.name.startswith("test_") else 100
        assert max(map(len, file.read_text().splitlines()), default=0) <= limit, file


def test_the_engine_imports_nothing_from_the_stages_and_nobody_imports_extras():
    stages = {"masking", "model", "loss", "data", "pretrain", "finetune"}
    for file in [*HERE.glob("*.py"), *HERE.glob("engine/*.py")]:
        imported = set(re.findall(r"^(?:from|import) (\w+)", file.read_text(), re.M))
        assert "extras" not in imported and (file.parent == HERE or not imported & stages), file


# ---- pre-training: what a loss is worth ----

@pytest.mark.parametrize("H, W", [(24, 24), (16, 24), (24, 8)])
def test_a_blur_of_the_visible_pixels_is_their_weighted_mean(H, W):
    x, mask = torch.randn(1, 2, H, W, dtype=torch.double), checkerboard(1, H // 8, W // 8)   # cells of 8 px: sigma 6
    painted = masking.fill_hidden(x, mask, "blur")
    hidden = masking.resize_mask(mask, (H, W))[0, 0]
    reflect = lambda i, n: -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    down, across = (range(-min(18, n - 1), min(18, n - 1) + 1) for n in (H, W))          # three sigma, or the image
    for r, c in ((0, 0), (3, 4), (12, 12), (23, 20)):
        if r >= H or c >= W or not hidden[r, c]:
            continue
        total, weight = torch.zeros(2, dtype=torch.double), 0.0
        for dr, dc in product(down, across):
            y, z = reflect(r + dr, H), reflect(c + dc, W)
            if not hidden[y, z]:
                w = math.exp(-(dr**2 + dc**2) / (2 * 6**2))
                total, weight = total + w * x[0, :, y, z], weight + w
        close(painted[0, :, r, c], total / weight)
    same = torch.full((1, 3, 32, 32), 7.0)
    close(masking.fill_hidden(same, checkerboard(1, 4, 4), "blur"), same)    # the blur of one colour is that colour


def test_held_out_images_are_never_trained_on_and_their_number_has_bounds(tmp_path, monkeypatch):
    for folder, count in (("flat", 100), ("cut/train", 40), ("cut/val", 30)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            (tmp_path / folder / f"{i}.png").touch()
    for given, share, train, held in (
        ("flat", 0.02, 84, 16),
        ("flat", 0.2, 80, 20),
        ("flat", 0.5, 75, 25),
        ("flat", 0, 100, 0),
        ("cut", 0.02, 40, 10),
        ("shapes", 0.02, 10_000, 200),
        ("shapes", 0.5, 10_000, 2000),
    ):
        args = pretrain.parse(["--data", str(tmp_path / given) if given != "shapes" else given, "--val", str(share)])
        source, others = pretrain.hold_out(data.open_images(args.data, "train", (32, 32)), args, (32, 32))
        assert (len(source), len(others) if others else 0) == (train, held), given
        if others:
            names = [{s.name(i) for i in range(len(s))} for s in (source, others)]
            assert given == "shapes" or not names[0] & names[1]
            assert given != "cut" or all("/val/" in name for name in names[1])


def test_the_held_out_loss_is_that_of_each_image_and_so_are_the_two_baselines(few_images, tmp_path, capsys):
    flags = [*TINY, "--val", "0.5", "--epochs", "1"]         # 8 of the 32 validation images
    run(tmp_path / "run", base=flags)
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    noted = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in noted] == [4]
    net = A2MIM(build_encoder("deit_tiny", 64, 0.0), 64, mask_size=16, token="add").eval()
    net.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"])
    val, crop = data.Shapes("val", (64, 64)), data.eval_transform((64, 64))
    masks = masking.random_mask(8, (4, 4), 0.6, generator=torch.Generator().manual_seed(data.seed_for(0, 1)))
    chosen = sorted(np.random.default_rng((0, 32)).permutation(32)[:8])      # any 8 of the 32, but always the same
    total = dict(held_out=0.0, mean_colour=0.0, blur=0.0)
    differences = []
    for k in range(8):
        x = data.normalise(crop(val.read(int(chosen[k])))[None])
        hidden = masking.resize_mask(masks[k:k + 1], (64, 64))[0, 0]
        with torch.no_grad():
            painters = dict(held_out=net(x, masks[k:k + 1]), mean_colour=x.mean((2, 3), keepdim=True).expand_as(x),
                            blur=masking.fill_hidden(x, masks[k:k + 1], "blur"))
        for name, painted in painters.items():
            total[name] += (painted - x)[0, :, hidden].abs().mean().item() / 8           # a ViT: plain L1
        errors = [(painters[name] - x)[0, :, hidden].abs().mean().item() for name in ("held_out", "blur")]
        differences.append(errors[0] - errors[1])
    assert {name: noted[-1][name] for name in total} == pytest.approx(total, rel=1e-4)
    scatter = 2 * statistics.stdev(differences) / math.sqrt(8) / total["blur"]
    of_mean, of_blur = (total["held_out"] / total[name] for name in ("mean_colour", "blur"))
    assert verdict_of(said)[:3] == pytest.approx((of_mean, of_blur, scatter), abs=0.0051)
    assert "hidden pixels of 8 held-out images" in said
    before = read_log(tmp_path / "run")
    pretrain.main(["--data", "shapes", "--out", str(tmp_path / "run"), "--resume"])
    assert read_log(tmp_path / "run") == before              # nothing is measured twice


@pytest.mark.parametrize("pixel_loss, blur, error, verdict", [
    (0.0600, 0.02, 0.0001, "no better than the mean colour: it has learned nothing yet"),
    (0.0300, 0.02, 0.0001, "worse than a blur: it does not reconstruct objects yet"),
    (0.0184, 0.02, 0.0009, "level with a blur"),             # 0.92 +/- 0.09 of the blur's
    (0.0216, 0.02, 0.0009, "level with a blur"),
    (0.0100, 0.02, 0.0060, "level with a blur"),             # half the error, on images that differ wildly
    (0.0100, 0.02, math.inf, "level with a blur"),           # one image
    (0.0184, 0.02, 0.0007, "better than a blur"),
    (0.0171, 0.02, 0.0001, "better than a blur"),
    (math.nan, 0.02, 0.0001, "no better than the mean colour: it has learned nothing yet"),
    (0.0169, 0.02, 0.0001, "clearly better than a blur"),
])
def test_the_verdict_says_better_only_beyond_the_scatter(pixel_loss, blur, error, verdict):
    said = loss.skill(pixel_loss, 0.06, blur, error)
    assert said.startswith(f"{pixel_loss / 0.06:.2f} of the mean colour's error")
    assert said.endswith(f"of a blur's: {verdict}")
    assert f"{pixel_loss / blur:.2f} +/- {2 * error / blur:.2f} of a blur's" in said


def test_a_run_ends_with_the_next_step(few_images, capsys, tmp_path, monkeypatch):
    out = tmp_path / "my runs"                               # a space, which a shell would split at
    run(out, *QUICK, "--val", "0.5", "--epochs", "1", "--lr", "0")
    told = "next: train longer (--epochs) or use larger mask units (--mask-size)"
    assert told in capsys.readouterr().err.splitlines()
    monkeypatch.setattr(pretrain, "skill", lambda *given: "clearly better than a blur")
    more = ["--data-root", str(tmp_path / "my sets")]
    run(tmp_path / "better", *QUICK, "--val", "0.5", "--epochs", "1", *more)
    line, = re.findall("^next: python finetune.py (.*)$", capsys.readouterr().err, re.M)
    args = finetune.parse(shlex.split(line))
    assert args.weights == str(tmp_path / "better" / "backbone.pt") and args.arch == QUICK[1]
    assert args.data == "shapes" and args.data_root == str(tmp_path / "my sets")
    said = pretrain.next_step(True, SimpleNamespace(data="/photos", out=out))
    assert f"--weights '{out}/backbone.pt' --data DIR" in said


@pytest.mark.parametrize("per_epoch, epochs, batch, held_out, often", [
    (3, 8, 8, 189, 24),                                      # 24 steps on 189 images: once, at the end
    (625, 1, 16, 200, 62),                                   # the demo: a tenth of the run
    (150, 10, 32, 200, 150),                                 # every epoch
    (1, 1, 8, 2000, 1),
    (10, 3, 64, 100, 6),
])
def test_evaluations_cost_a_tenth_of_the_training_and_the_last_step_has_one(
    per_epoch, epochs, batch, held_out, often
):
    total = per_epoch * epochs
    steps = checkpointer.StepPlan(batch, batch, per_epoch, total, 0, 0)
    interval = pretrain.evaluation_interval(steps, held_out)
    assert interval == often
    measured = [done for done in range(1, total + 1) if done == total or done % interval == 0]
    forward_passes = len(measured) * held_out
    trained = 3 * total * batch                              # forward, and a backward that costs two
    assert len(measured) == 1 or forward_passes <= 0.1 * trained


def test_pretraining_starts_from_weights_and_says_what_was_used(few_images, capsys, tmp_path):
    encoder = build_encoder("deit_tiny", 64)
    torch.save(encoder.backbone.state_dict(), tmp_path / "backbone.pt")
    run(tmp_path / "run", "--weights", str(tmp_path / "backbone.pt"), "--epochs", "1", "--lr", "0")
    count = len(encoder.backbone.state_dict())
    assert f"backbone.pt: {count} tensors loaded; new: none; not used: 0" in capsys.readouterr().err
    left = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    assert all(torch.equal(value, left[name]) for name, value in encoder.backbone.state_dict().items())
    code, said = complaint(capsys, *TINY, "--arch", "deit_small", "--weights", tmp_path / "backbone.pt")
    assert code == 2 and "is it another architecture?" in said


def test_a_peak_lr_that_moves_no_weight_is_told_before_the_first_step(few_images, capsys, tmp_path):
    run(tmp_path / "run", "--epochs", "1", "--lr", "1e-4")
    assert "peak lr 1.6e-06 x 4 steps = 6e-06: no weight moves further" in capsys.readouterr().err
    run(tmp_path / "long", "--epochs", "1", "--lr", "2")     # 2 x 8 / 512 x 4 steps = 0.125
    assert "no weight moves further" not in capsys.readouterr().err


def test_adamw_moves_no_weight_further_than_the_sum_of_its_learning_rates():
    """What the line above says: with a gradient that never turns, a weight moves by the lr in every step."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(50):
        weight.grad = torch.tensor([1e-6, 1.0, 1e6])
        optimizer.step()
    assert weight.abs().max() <= 50 * 1e-3 + 1e-6 and weight.abs().min() > 0.9 * 50 * 1e-3


def settings_of(capsys, out, *flags):
    """(args.json, what was said) of a run of one step."""
    pretrain.main([*flags, "--out", str(out), *"--workers 0 --amp off --sheets 0".split()])
    return json.loads((out / "args.json").read_text()), capsys.readouterr().err


def test_few_images_get_the_small_recipe_and_its_lr_ignores_the_batch(few_images, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SMALL_STEPS", 8)
    common = "--data shapes --arch resnet18 --image-size 96".split()
    peaks = []
    for batch in (4, 8):
        made, said = settings_of(capsys, tmp_path / f"{batch}", *common, "--batch-size", str(batch))
        assert made["recipe"] == "small" and "recipe small (small: under 100,000 images); writing" in said
        assert made["epochs"] * (32 // batch) == 8           # counted in steps
        peaks.append(made["lr"] * batch / 512)
    assert peaks == pytest.approx([3e-3, 3e-3])
    made, said = settings_of(capsys, tmp_path / "typed", *common, *"--batch-size 8 --lr 0.1 --mask-size 32".split(),
                             *"--spectrum batch --epochs 0.25".split())
    assert (made["lr"], made["mask_size"], made["spectrum"], made["epochs"]) == (0.1, 32, "batch", 0.25)
    assert made["recipe"] == "small" and made["token_stage"] == 4             # as deep as half a typed cell allows
    released = pretrain.parse(["--data", "x", "--arch", "resnet18"])
    made, said = settings_of(capsys, tmp_path / "released", *common, *"--recipe imagenet --batch-size 8".split(),
                             *"--epochs 0.25".split())
    for name in ("lr", "mask_size", "token_stage", "spectrum", "min_lr", "token_lr"):
        assert made[name] == getattr(released, name), name
    made, _ = settings_of(capsys, tmp_path / "simmim", *common, *"--baseline simmim --batch-size 8".split())
    assert (made["token_stage"], made["token"], made["mask_size"]) == (1, "replace", 16)      # the same cells as A2MIM


def test_a_resumed_small_run_keeps_its_peak_lr_at_another_batch(few_images, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SMALL_STEPS", 8)
    flags = "--data shapes --arch resnet18 --image-size 32 --batch-size 8".split()
    settings_of(capsys, tmp_path / "run", *flags)
    made, said = settings_of(capsys, tmp_path / "run", "--resume", "--batch-size", "4", "--epochs", "3")
    assert made["lr"] * 4 / 512 == pytest.approx(3e-3) and "peak lr 3.00e-03" in said
    made, said = settings_of(capsys, tmp_path / "run", "--resume", "--batch-size", "8", "--epochs", "4", "--lr", "0.1")
    assert made["lr"] == 0.1 and "peak lr 1.56e-03" in said  # a typed lr is per 512 images: 0.1 * 8 / 512


DIFFERENCES = {"baseline", "token", "token_stage", "fill", "fourier_weight", "focal_pixels"}


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "efficientnet_b0", "deit_tiny", "swin_tiny"])
@pytest.mark.parametrize("images, batch", [(9_469, 64), (9_469, 8), (1_281_167, 2048)])
def test_simmim_and_a2mim_differ_in_five_settings_and_on_imagenet_in_simmims_own_recipe(arch, images, batch):
    size = 64 if images < 100_000 else 192
    resolved = []
    for more in ([], ["--baseline", "simmim"]):
        args = pretrain.parse(["--data", "x", "--arch", arch, "--image-size", str(size), *more])
        encoder = build_encoder(arch, size, patch_size=args.patch_size)
        steps = pretrain.StepPlan(batch, batch, images // batch, 1, 0, 0)
        pretrain.choose_recipe(args, images, steps, encoder)
        resolved.append(vars(args))
    a2mim, simmim = resolved
    different = {name for name in a2mim if a2mim[name] != simmim[name]} - {"given"}
    on_a_cnn = arch not in ("deit_tiny", "swin_tiny")
    if images < 100_000 or not on_a_cnn:
        assert different <= DIFFERENCES
        assert simmim["token"] == "replace" and simmim["fourier_weight"] == 0 and simmim["fill"] == "zero"
    else:                                                    # the released SimMIM of ResNet-50
        assert different <= DIFFERENCES | {"lr", "token_lr", "crop_min"}
        assert (simmim["lr"], simmim["token_lr"], simmim["crop_min"]) == (2e-4, 1.0, 0.67)
        assert (a2mim["lr"], a2mim["token_lr"], a2mim["crop_min"]) == (3e-4, 0.1, 0.8)
    if images < 100_000:
        peak = simmim["lr"] * batch / 512
        assert peak == pytest.approx(3e-3 if arch == "resnet18" else 1e-3)


@pytest.mark.parametrize("per_epoch, images, recipe", [(499, 20_000, "small"), (12_499, 99_999, "small"),
                                                       (500, 100_000, "imagenet"), (300, 1_281_167, "imagenet")])
def test_the_number_of_images_alone_decides_whether_a_run_is_small(per_epoch, images, recipe):
    args = pretrain.parse(["--data", "x", "--arch", "resnet18"])
    steps = pretrain.StepPlan(images // per_epoch, images // per_epoch, per_epoch, 1, 0, 0)
    pretrain.choose_recipe(args, images, steps, build_encoder("resnet18", 224))
    assert args.recipe == recipe


@pytest.mark.parametrize("size, cell", [((64, 64), 8), ((96, 96), 16), ((128, 128), 16), ((192, 192), 32),
                                        ((224, 224), 32), ((96, 160), 16)])
@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "swin_tiny", "deit_tiny", "efficientnet_b0"])
def test_cells_and_token_of_the_small_recipe_fit_the_image(arch, size, cell):
    encoder = build_encoder(arch, size)
    got, stage = model.choose_mask_size_and_stage(encoder, size, unit=16 if arch == "deit_tiny" else 8)
    assert got == (16 if (arch, cell) == ("deit_tiny", 8) else cell)
    A2MIM(encoder, image_size=size, mask_size=got, token_stage=stage)         # raises if they do not fit
    if arch in ("deit_tiny", "swin_tiny"):
        assert stage == encoder.token_stage
    else:                                                    # features there are at most half a cell wide, the next not
        strides = [size[0] / shape[2] for shape in encoder.shapes(size)]
        assert strides[stage] <= got / 2 and all(s > got / 2 for s in strides[stage + 1 : -1])


@pytest.mark.parametrize("arch, size, flags, cells, stage", [
    ("resnet18", 32, "", 16, 4),                             # the small stem: stride 4 before stage 4
    ("resnet18", 32, "--stem imagenet", 16, 2),              # stride 4 before stage 2, 8 before stage 3
    ("deit_tiny", 32, "", 64, 1),                            # patches and cells of 4 px
    ("convnext_tiny", 32, "", 16, 1),
    ("resnet18", 64, "--recipe imagenet", 64, 2),            # 32 px would be 4 cells
    ("vit_base", 64, "--recipe imagenet", 16, 1),
    ("resnet50", 96, "--recipe imagenet", 9, 4),             # 32 px: as released
])
def test_small_images_have_at_least_nine_cells(arch, size, flags, cells, stage):
    args = pretrain.parse(["--data", "x", "--arch", arch, "--image-size", str(size), *flags.split()])
    encoder = build_encoder(arch, size, patch_size=args.patch_size, stem=args.stem)
    pretrain.choose_recipe(args, 50_000, pretrain.StepPlan(32, 32, 1562, 1, 0, 0), encoder)
    net = A2MIM(encoder, size, args.mask_size, args.token_stage)
    assert (math.prod(net.grid), net.token_stage) == (cells, stage)


def test_a_resnet_with_the_small_stem_is_torchvisions_but_for_its_first_convolution():
    encoder = build_encoder("resnet18", 32, stem="small")
    assert [tuple(shape[2:]) for shape in encoder.shapes((32, 32))] == [(32, 32)] * 3 + [(16, 16), (8, 8), (4, 4)]
    plain, state = tv.resnet18(), encoder.backbone.state_dict()
    assert state.pop("conv1.weight").shape == (64, 3, 3, 3)
    found = plain.load_state_dict(state, strict=False)
    assert found.missing_keys == ["conv1.weight", "fc.weight", "fc.bias"] and not found.unexpected_keys
    plain.conv1, plain.maxpool, plain.fc = encoder.backbone.conv1, nn.Identity(), nn.Identity()    # the documented line
    images = torch.randn(2, 3, 32, 32)
    close(plain.eval()(images), encoder.eval()(images).mean((2, 3)))


def test_a_run_on_small_images_says_what_it_chose_and_fine_tuning_remembers_it(few_images, capsys, tmp_path):
    flags = "--data shapes --arch resnet18 --image-size 32 --batch-size 8 --epochs 0.25".split()
    made, said = settings_of(capsys, tmp_path / "run", *flags)
    assert made["stem"] == "small" and "small stem (3x3, stride 1), token before stage 4" in said
    assert "10 of 16 mask units hidden (8 px)" in said
    tune(tmp_path / "tuned", "--weights", tmp_path / "run" / "backbone.pt", "--epochs", "0.25")
    assert "conv1.weight" not in capsys.readouterr().err     # it was loaded, not made new
    assert torch.load(tmp_path / "tuned" / "best.pt")["conv1.weight"].shape == (64, 3, 3, 3)
    alone = tmp_path / "best.pt"                             # without args.json the stem is not known
    alone.write_bytes((tmp_path / "tuned" / "best.pt").read_bytes())
    flags = ["--weights", alone, "--data", "shapes", "--arch", "resnet18", "--image-size", "32", "--eval-only"]
    code, said = complaint(capsys, *flags, "--workers", "0", "--out", tmp_path / "eval", main=finetune.main)
    assert code == 2 and "lacks conv1.weight; evaluate it with the --arch, --stem" in said


def test_few_cells_get_a_warning_and_one_cell_is_refused(few_images, capsys, tmp_path):
    made, said = settings_of(capsys, tmp_path / "four", *"--data shapes --arch resnet18 --image-size 64".split(),
                             *"--mask-size 32 --batch-size 8 --epochs 0.25".split())
    assert "warning: 4 mask units of 32 px are too few to learn much from" in said
    for size, flags, words in ((32, ["--mask-size", "32"], "mask ratio 0.6: hides all of 1 mask units"),
                               (16, [], "image side 16: not a multiple of the 32-pixel mask unit; use 32"),
                               (32, ["--arch", "deit_tiny", "--patch-size", "16"], "--patch-size")):
        flags = ["--data", "shapes", "--arch", "resnet18", "--image-size", size, "--batch-size", 8, *flags]
        code, said = complaint(capsys, *flags, "--out", tmp_path / "x")
        assert code == 2 and words in said and said.count("\n") == 1


# ---- pre-training: the command line ----

def complaint(capsys, *flags, main=pretrain.main):
    """Runs main with flags that must be refused; returns (exit code, what stderr said)."""
    with pytest.raises(SystemExit) as exit:
        main([*map(str, flags)])
    return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--arch", "resnet51"], "argument --arch: arch 'resnet51': must be one of resnet18"),
        (["--lr", "-1"], "argument --lr: -1: must be a number of at least 0"),
        (["--lr", "nan"], "argument --lr: nan: must be a number"),
        (["--epochs", "0"], "argument --epochs: 0: must be a number from 0.001 to 100000"),
        (["--epochs", "1e18"], "argument --epochs: 1e18: must be a number from 0.001 to 100000"),
        (["--sheets", "2000000000"], "argument --sheets: 2000000000: must be an integer from 0 to 1000"),
        (["--image-size", "1000000"], "argument --image-size: 1000000: must be an integer from 1 to 8192"),
        (["--image-size", "64", "96", "128"], "argument --image-size: 64 96 128: must be one side of a square, or two"),
        (["--image-size", "64", "100"], "image side 100: not a multiple of the 32-pixel mask unit; use 96 or 128"),
        (["--data", ""], "argument --data: is empty (an unset shell variable?)"),
        (["--out", ""], "argument --out: is empty"),
        (["--batch-size", "2.5"], "argument --batch-size: 2.5: must be an integer"),
        (["--crop-min", "2"], "argument --crop-min: 2: must be a number from 0.01 to 1"),
        (["--wings", "2"], "unrecognized arguments: --wings 2"),
        (["--mask-ratio", "1.5"], "mask ratio 1.5: must lie between 0 and 1"),
        (["--image-size", "100"], "image side 100: not a multiple of the 32-pixel mask unit; use 96 or 128"),
        (["--token-stage", "9", "--image-size", "64"], "token stage 9: this encoder has stages 0 to 4"),
        (["--mask-size", "8", "--token-stage", "4", "--image-size", "64"], "a mask unit is smaller than the stride"),
        (["--warmup-epochs", "3", "--epochs", "2"], "--warmup-epochs 3: must be less than --epochs 2"),
        (["--batch-size", "20000"], "the data set has 10000 images, one step takes 20000"),
        (
            ["--data", "no/such/folder"],
            "--data no/such/folder: no such folder; give a folder of images or one of shapes, cifar10",
        ),
        (["--data", "cifar10"], "--data cifar10: not found in --data-root datasets; add --download to fetch it"),
        (
            ["--data", "cifar10", "--download", "--data-root", "/dev/null/x"],
            "--data-root /dev/null/x: cannot be written (Not a directory)",
        ),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_line_and_exit_code_2(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = complaint(capsys, "--data", "shapes", "--arch", "resnet18", *flags)
    assert code == 2 and words in said and said.startswith("pretrain.py: error: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())                      # a refused command leaves nothing, not even runs/


def test_help_tells_every_default(capsys):
    told = {
        pretrain.main: ["per optimiser step (1)", "augmentation, masks (0)", "the model (no)", "format of CNNs (yes)",
                        "largest gradient norm, 0 = none (0.0, by recipe)", "lambda, 0 = pixels only (0.5, by recipe)"],
        finetune.main: ["see --lr (16, by recipe)", "floor of the cosine (1e-06)", "head alone (no, by recipe)"],
    }
    for main, words in told.items():
        with pytest.raises(SystemExit):
            main(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert all(word in said for word in words), said


def test_folders_that_cannot_be_used_get_one_line(few_images, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (
        "no images below it; expected files ending in .jpg"
        in complaint(capsys, "--data", tmp_path / "empty", "--out", tmp_path / "o")[1]
    )
    run(tmp_path / "run", "--epochs", "1")
    code, said = complaint(capsys, *TINY, "--out", tmp_path / "run")
    assert code == 2 and "already holds a run; add --resume to continue it" in said
    code, said = complaint(capsys, *TINY, "--out", tmp_path / "run", "--resume", "--arch", "deit_small")
    assert code == 2 and "checkpoint.pt: of another model (deit_tiny at 64 px)" in said
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    code, said = complaint(capsys, *TINY, "--out", tmp_path / "run", "--resume")
    assert code == 2 and "checkpoint.pt: cannot be read" in said


def test_a_loss_that_is_not_finite_stops_the_run_with_exit_code_1_and_keeps_the_checkpoint(
    few_images, capsys, tmp_path
):
    run(tmp_path / "run", "--epochs", "1")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    code, said = complaint(
        capsys, "--data", "shapes", "--out", tmp_path / "run", "--resume", "--epochs", "5", "--lr", "1e30"
    )
    assert code == 1 and "loss is not finite, 10 times in a row at step 1" in said and "checkpoint.pt is kept" in said
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_weights_that_cannot_be_used_get_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("this must never run",)
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


def flip_a_byte(path):
    """In the largest tensor of a torch.save file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_weights_that_are_damaged_get_one_line_that_says_what(tmp_path):
    encoder = build_encoder("resnet18")
    state = encoder.backbone.state_dict()
    torch.save(state, tmp_path / "flipped.pt")
    flip_a_byte(tmp_path / "flipped.pt")
    assert len(torch.load(tmp_path / "flipped.pt")) == len(state)  # torch itself does not see it
    for name, changed, words in (
        (
            "nan.pt",
            {"layer2.0.conv1.weight": torch.full((128, 64, 3, 3), math.nan)},
            "layer2.0.conv1.weight holds NaN or infinity",
        ),
        ("inf.pt", {"bn1.running_var": torch.full((64,), math.inf)}, "bn1.running_var holds NaN or infinity"),
        ("sparse.pt", {"fc.bias": torch.eye(3).to_sparse()}, "fc.bias is no plain tensor"),
        ("meta.pt", {"bn1.bias": torch.zeros(64, device="meta")}, "bn1.bias is no plain tensor"),
        ("keys.pt", {7: torch.zeros(1)}, "holds a tensor under 7; expected a state dict with names as keys"),
        ("float8.pt", {"bn1.weight": torch.ones(64).to(torch.float8_e4m3fn)}, "bn1.weight is torch.float8_e4m3fn"),
        ("int.pt", {"conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}, "conv1.weight is torch.int8, expected"),
        ("bool.pt", {"bn1.running_var": torch.ones(64) > 0}, "bn1.running_var is torch.bool, expected real numbers"),
        ("huge.pt", {"bn1.bias": torch.full((64,), 1e300, dtype=torch.float64)}, "bn1.bias holds NaN or infinity"),
        ("name.pt", {"a\n\x1b[2Jb": torch.full((1,), math.nan)}, "name.pt: a\\x0a\\x1b[2Jb holds NaN"),
        ("flipped.pt", None, " is damaged"),                 # load_checked says which part of it
    ):
        if changed:
            torch.save({**state, **changed}, tmp_path / name)
        with pytest.raises(ValueError) as error:
            weights.load_backbone(encoder, tmp_path / name)
        assert words in str(error.value) and "\n" not in str(error.value), name
    net = model.Classifier("resnet18", encoder, 3)
    torch.save({**state, "fc.weight": torch.ones(3, 512).int(), "fc.bias": torch.ones(3)}, tmp_path / "head.pt")
    with pytest.raises(ValueError, match="head.pt: fc.weight is torch.int32, expected real numbers"):
        weights.load_head(net, tmp_path / "head.pt")


def test_what_the_reader_of_files_refuses_is_passed_on_in_one_line(tmp_path, monkeypatch):
    encoder, path = build_encoder("resnet18"), tmp_path / "pipe.pt"
    with pytest.raises(ValueError) as error:
        weights.load_backbone(encoder, tmp_path)
    assert str(error.value) == f"{tmp_path}: is not a regular file"
    for kind in (OSError, ValueError):
        def refuse(given, kind=kind):
            raise kind(f"{given}: not a regular file")
        monkeypatch.setattr(weights, "load_checked", refuse)
        with pytest.raises(ValueError) as error:
            weights.load_backbone(encoder, path)
        assert str(error.value) == f"{path}: not a regular file"


WRAPPED = {  # program -> (the keys that lead to the weights, the prefix, other names beside them)
    "torch.compile": ((), "_orig_mod.", ["_orig_mod.fc.weight"]),
    "DDP and torch.compile": (("model",), "module._orig_mod.", ["module._orig_mod.fc.weight"]),
    "Lightning": (("state_dict",), "model.", ["loss.weight"]),
    "MoCo": (("state_dict",), "module.encoder_q.", ["module.encoder_q.fc.0.weight", "module.queue"]),
    "SparK": (("module",), "", ["fc.weight"]),
    "SparK's whole model": (("module",), "sparse_encoder.sp_cnn.", ["mask_tokens.0", "dense_decoder.proj.bias"]),
    "DINO": (("teacher",), "backbone.", ["head.mlp.0.weight"]),
    "DDP": (("model_state_dict",), "module.", ["module.fc.weight"]),
}


@pytest.mark.parametrize("program", WRAPPED)
def test_weights_are_found_under_the_keys_and_prefixes_of_other_programs_and_that_is_told(program, tmp_path):
    keys, prefix, others = WRAPPED[program]
    encoder, donor = build_encoder("resnet18"), build_encoder("resnet18")
    state = {prefix + name: value for name, value in donor.backbone.state_dict().items()}
    state |= {name: torch.ones(2) for name in others}
    if program == "MoCo":                                    # a second net, slower, behind the first
        slow = {name.replace("encoder_q", "encoder_k"): torch.zeros_like(value) for name, value in state.items()}
        state |= slow
    whole = state
    for key in keys:
        whole = {"epoch": 3, key: whole, "optimizer": {"state": {}, "param_groups": []}}
    if program == "DINO":
        whole = {"student": {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}, **whole}
    torch.save(whole, tmp_path / "w.pt")
    found = weights.load_backbone(encoder, tmp_path / "w.pt")
    assert not found["missing"]
    for name, value in donor.backbone.state_dict().items():
        assert torch.equal(encoder.backbone.state_dict()[name], value), name
    said = weights.summary_of(found)
    assert all(f"under {key!r}" in said for key in keys)
    assert f"prefix '{prefix}' taken off" in said if prefix else "prefix" not in said
    assert said.startswith("120 tensors loaded (")


@pytest.mark.parametrize(
    "state, words",
    [
        ({"blocks.0.qkv.weight": torch.ones(2)}, "The file has blocks.0.qkv.weight, this backbone conv1.weight"),
        ({"a\x1b[2J\n.b": torch.ones(2)}, "The file has a\\x1b[2J\\x0a.b, this backbone conv1.weight"),
        ({"net.conv1.weight": torch.ones(8, 3, 7, 7)}, "conv1.weight is (8, 3, 7, 7) in the file, (64, 3, 7, 7) here"),
        ({"nets": {"conv1.weight": torch.ones(2)}, "epoch": 3, "a\nb": 1, "c": 2, "d": 3},
         "holds no weights; expected a state dict of tensors, found the keys nets, epoch, a\\x0ab, c, ..."),
        ([torch.ones(2)], "holds no weights; expected a state dict of tensors, found list"),
        ({}, "found the keys (none)"),
    ],
)
def test_weights_that_do_not_fit_are_told_by_a_name_of_theirs_beside_one_of_ours(state, words, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError) as error:
        weights.load_backbone(build_encoder("resnet18"), tmp_path / "w.pt")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1, 2]", "cannot be read as the settings of a run"),
        ("{", "cannot be read as the settings of a run"),
        ("7", "cannot be read as the settings of a run"),
        ('{"image_size": "224"}', "image_size is '224', which --image-size would refuse"),
        ('{"image_size": [224, 192, 160]}', "image_size is [224, 192, 160], which --image-size would refuse"),
        ('{"image_size": [224, "192"]}', "image_size is [224, '192']"),
        ('{"image_size": []}', "image_size is []"),
        ('{"image_size": -5}', "image_size is -5"),
        ('{"image_size": 1e400}', "image_size is inf"),
        ('{"image_size": true}', "image_size is True"),
        ('{"arch": 3}', "arch is 3, which --arch would refuse"),
        ('{"arch": "resnet51"}', "arch is 'resnet51'"),
        ('{"window": {}}', "window is {}"),
    ],
)
def test_a_spoiled_args_json_beside_the_weights_gets_one_line(text, words, backbone, capsys):
    (backbone.parent / "args.json").write_text(text)
    code, said = complaint(capsys, "--data", "shapes", "--weights", backbone, main=finetune.main)
    assert code == 2 and words in said and f"{backbone.parent}/args.json" in said and said.count("\n") == 1, said


def test_an_image_size_beyond_memory_gets_one_line(few_images, tmp_path):
    limited = (
        "import pretrain, resource\npages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * resource.getpagesize() + (2 << 30)         # 2 GB more than now\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "pretrain.main('--data shapes --arch resnet18 --image-size 8192 --batch-size 16 --workers 0 --amp off "
        "--sheets 0 --out %s'.split())"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited % (tmp_path / "run")], cwd=HERE, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 1
        and "pretrain.py: not enough memory" in done.stderr
        and "use a smaller --image-size" in done.stderr
    )
    assert "Traceback" not in done.stderr

# ---- fine-tuning: labels, batches, targets ----

def test_a_label_subset_is_balanced_and_fixed_by_the_seed():
    source = data.Shapes("train", (32, 32))
    for labels, each in (("0.05", 50), ("20/class", 20), (".0001", 1), ("1", 1000)):
        part = data.some_labels(source, labels, seed=0)
        assert np.bincount(part.labels).tolist() == [each] * 10
        assert all(part.labels == source.labels[part.indices]) and len(set(part.indices)) == 10 * each
    pick = lambda seed: data.some_labels(source, "20/class", seed).indices.tolist()
    assert pick(0) == pick(0) != pick(1)
    assert set(pick(0)) < set(
        data.some_labels(source, "40/class", 0).indices
    )  # more labels are the same ones and others
    for wrong in ("0", "1.5", "0/class", "many", "-0.1", "2000/class"):
        with pytest.raises(ValueError, match=f"--labels {wrong}: "):
            data.some_labels(source, wrong, 0)


def test_repeated_augmentation_shows_a_third_of_the_images_three_times_each():
    batches = flat(data.ResumableBatchSampler(60, 12, 1, 1, 0, seed=0, start=0, stop=10, repeats=3))
    for batch in batches[:5]:
        images = [i for _, i in batch]
        assert len(set(images)) == 4 and all(images.count(i) == 3 for i in images)
        assert len(set(batch)) == 12                         # as many draws: other crops of the same image
    first, second = ({key for batch in part for key in batch} for part in (batches[:5], batches[5:]))
    assert (
        len({i for _, i in first}) == 20 and not first & second
    )  # a third of the set an epoch, and never the same draw


def test_mixed_targets_weigh_classes_as_the_images_were_mixed():
    labels = torch.tensor([0, 1, 2, 3])
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 64, 64).contiguous()           # image i is i everywhere
    for mixup, cutmix in ((0.5, 0.0), (0.0, 1.0)):
        for _ in range(5):
            mixed, targets = finetune.mix_batch(images, labels, 5, mixup, cutmix)
            assert targets.shape == (4, 5) and torch.allclose(targets.sum(1), torch.ones(4))
            close(
                mixed.mean((1, 2, 3)), targets @ torch.arange(5.0), atol=1e-4, rtol=0
            )  # the share of b, from the pixels
            if cutmix:
                assert set(mixed.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    mixed, targets = finetune.mix_batch(images, labels, 5, 0.0, 0.0)
    assert torch.equal(mixed, images) and targets.argmax(1).tolist() == [0, 1, 2, 3]


def test_mixup_or_cutmix_with_even_odds_and_always_one():
    images, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    pasted = 0
    for _ in range(400):
        mixed, _ = finetune.mix_batch(images, labels, 2, 1.0, 1.0)
        pasted += bool(((mixed == images) | (mixed == images.flip(0))).all())  # cutmix copies pixels, mixup blends them
    assert 150 < pasted < 250                                # 5 standard deviations


def test_bce_of_mixed_targets_is_the_mean_over_classes_of_two_logs():
    logits, targets = torch.randn(3, 4), torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 1, 0], [0.5, 0, 0, 0.5]])
    total = 0.0
    for i, c in product(range(3), range(4)):
        p, t = 1 / (1 + math.exp(-logits[i, c].item())), targets[i, c].item()
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert finetune.class_loss(logits, targets, "bce", 0.1).item() == pytest.approx(total / 12, rel=1e-5)


def test_smoothed_cross_entropy_mixes_in_the_uniform_target():
    logits, targets = torch.randn(3, 4), torch.eye(4)[:3]
    expected = -((0.9 * targets + 0.1 / 4) * logits.log_softmax(1)).sum(1).mean()
    close(finetune.class_loss(logits, targets, "ce", 0.1), expected)


def test_randaugment_leaves_an_image_alone_at_least_a_quarter_of_the_time_and_keeps_its_form():
    image, change = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), data.RandAugment(9.0)
    out = [change(image) for _ in range(300)]
    assert all(o.shape == image.shape and o.dtype == torch.uint8 for o in out)
    same = sum(torch.equal(o, image) for o in out)
    assert 0.25 * 300 - 38 < same < 0.25 * 300 + 75          # both ops skipped, or one that changed nothing


def test_randaugment_turns_bicubically_and_fills_corners_with_the_released_colour():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    change, image = data.RandAugment(9.0).by_bin[20], Image.fromarray(pixels)
    change._AUGMENTATION_SPACE = {"Rotate": change._AUGMENTATION_SPACE["Rotate"]}        # 20 of 30 bins: 20 degrees
    by_pillow = [image.rotate(angle, Image.BICUBIC, fillcolor=(104, 116, 124)) for angle in (20, -20)]
    assert any(np.array_equal(np.asarray(change(image)), np.asarray(turned)) for turned in by_pillow)


def test_random_erasing_paints_a_rectangle_of_normal_noise():
    images = torch.full((60, 3, 64, 64), 7.0)
    erased, share = finetune.erase(images, 0.25), []
    assert finetune.erase(images, 0.0) is images
    for image in finetune.erase(images, 1.0):
        hit = (image != 7).all(0)
        rows, cols = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
        assert hit.sum() == len(rows) * len(cols) == (image != 7).any(0).sum()  # one whole rectangle, all colours
        share.append(image[:, hit])
    noise = torch.cat([s.flatten() for s in share])
    assert (
        abs(noise.mean()) < 0.02
        and noise.std() == pytest.approx(1, abs=0.02)
        and len(noise.unique()) > 0.9 * len(noise)
    )
    assert 5 <= (erased != 7).flatten(1).any(1).sum() <= 26  # 15 of 60 expected, 3.3 standard deviations


# ---- fine-tuning: optimiser ----

def test_lamb_takes_the_steps_of_its_paper():
    """Two steps of algorithm 2 in float64 by numpy, with NVIDIA's gradient normalisation and bias correction."""
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
    tensors = {k: nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    lamb = optim.Lamb(
        [dict(params=[tensors["w"]], weight_decay=0.02), dict(params=[tensors["b"]], weight_decay=0.0)], lr=0.1
    )
    p, m, v = {k: x.copy() for k, x in start.items()}, dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
    for t, scale in ((1, 5.0), (2, 0.01)):                   # a global norm above 1 is brought to 1, one below stays
        grads = {k: scale * rng.normal(size=x.shape) for k, x in start.items()}
        for k, g in grads.items():
            tensors[k].grad = torch.tensor(g)
        lamb.step()
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g / max(1, norm)
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            r = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-6)
            if k == "w":
                r = r + 0.02 * p[k]
                r = r * np.linalg.norm(p[k]) / np.linalg.norm(r)             # the trust ratio, where weights decay
            p[k] = p[k] - 0.1 * r
            np.testing.assert_allclose(tensors[k].detach().numpy(), p[k], rtol=1e-6)


def test_lamb_moves_a_weight_of_zeros_with_ratio_one():
    w = nn.Parameter(torch.zeros(4))
    w.grad = torch.full((4,), 0.1)
    optim.Lamb([w], lr=0.5).step()
    close(w.detach(), torch.full((4,), -0.5), atol=1e-4, rtol=0)             # Adam's first step is the sign


@pytest.mark.parametrize(
    "arch, decay",
    [("resnet18", 0.75), ("convnext_tiny", 0.7), ("convnext_small", 0.7), ("deit_tiny", 0.65), ("swin_tiny", 0.9)],
)
def test_layer_decay_scales_each_parameter_by_its_depth(arch, decay):
    net = model.Classifier(arch, build_encoder(arch, 64), 10)
    names = {p: n.removeprefix("encoder.backbone.") for n, p in net.named_parameters()}

    def depth(name):  # stages between a parameter and the head, told from its name alone
        if name.startswith(("head.", "classifier.0.")) or name.startswith("norm.") and arch == "deit_tiny":
            return 0                                         # with the head: the norms that come after the mean
        if arch == "resnet18":
            return 5 - int(name[5]) if name.startswith("layer") else 5
        if arch == "deit_tiny":  # 0.65^(L + 1 - j), j = i + 1 for block i, 0 for patches and positions
            return 13 - (int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0)
        if arch.startswith(
            "convnext"
        ):  # level 0: stem; 1, 2: stages with what leads to them; groups of three blocks; last stage
            part, block = int(name.split(".")[1]), name.split(".")[2]
            groups = {"convnext_tiny": 3, "convnext_small": 9}[arch]
            return (
                4
                + groups
                - (
                    3 + int(block) // 3
                    if part == 5
                    else {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 6: 3 + groups, 7: 3 + groups}[part]
                )
            )
        if name.startswith("norm."):
            return 1
        return 5 - (int(name.split(".")[1]) + 1) // 2        # features.0 | 1, 2 | 3, 4 | 5, 6 | 7
    seen = set()
    for group in optim.layer_groups(net, 0.05, decay):
        for p in group["params"]:
            seen.add(names[p])
            assert group["scale"] == pytest.approx(decay ** depth(names[p])), names[p]
            assert group["weight_decay"] == (
                0.05
                if p.ndim > 1
                and "bias" not in names[p]
                and not names[p].endswith(("pos_embed", "cls_token", "layer_scale"))
                else 0
            ), names[p]
    assert seen >= set(names.values()) and {depth(n) for n in seen} == set(
        range({"deit_tiny": 14, "convnext_tiny": 8, "convnext_small": 14}.get(arch, 6))
    )
    if arch == "convnext_tiny":
        stem = next(
            g["scale"]
            for g in optim.layer_groups(net, 0.05, decay)
            for p in g["params"]
            if names[p] == "features.0.0.weight"
        )
        assert round(stem, 3) == 0.082                       # 0.7^7


def test_moving_average_ramps_its_decay_and_leaves_batchnorm_statistics_to_the_model():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    ema, weights, expected = (
        optim.MovingAverage(net, 0.99, ramp=4),
        [3.0, 5.0, -1.0, 2.0, 0.5, 7.0],
        net[0].weight.item(),
    )
    for n, w in enumerate(weights):
        with torch.no_grad():
            net[0].weight.fill_(w)
            net[1].running_mean.fill_(w)
        ema.update_parameters(net)
        d = 0.99 * (0.9 + 0.1 * min(1, n / 4))
        expected = d * expected + (1 - d) * w                # it starts from the initial weights, with 0.9 of the decay
        assert ema.module[0].weight.item() == pytest.approx(expected, rel=1e-5)
        assert ema.module[1].running_mean.item() == w


def test_rsb_cosine_moves_once_an_epoch_under_a_ramp_per_iteration():
    lr = lambda step: optim.lr_at(step, 1000, 50, 8e-3, 1e-6, "cosine-by-epoch", per_epoch=10)
    cosine = lambda epoch: 1e-6 + (8e-3 - 1e-6) * (1 + math.cos(math.pi * epoch / 100)) / 2
    assert lr(25) == pytest.approx((1e-5 + 0.5 * (1 - 1e-5)) * cosine(2), rel=1e-9) and lr(0) == pytest.approx(
        1e-5 * 8e-3
    )
    assert lr(50) == lr(59) == pytest.approx(cosine(5)) and lr(60) == pytest.approx(cosine(6))
    for step in (0, 1, 25, 50, 51, 999):                     # ConvNeXt: counted from iteration 0, under the same ramp
        ramp = min(1, 1e-5 + (1 - 1e-5) * step / 50)
        expected = ramp * (1e-6 + (4e-3 - 1e-6) * (1 + math.cos(math.pi * step / 1000)) / 2)
        assert optim.lr_at(step, 1000, 50, 4e-3, 1e-6, "cosine-from-0") == pytest.approx(expected)
    probe = [optim.lr_at(step, 1000, 0, 30.0, 0.0, "probe") for step in (0, 599, 600, 799, 800)]
    assert probe == pytest.approx([30, 30, 3, 3, 0.3])
    for recipe, schedule in (("rsb_a3", "cosine-by-epoch"), ("convnext", "cosine-from-0"), ("linear", "probe")):
        args = finetune.parse(["--data", "x", "--init", "scratch", "--arch", "resnet50", "--recipe", recipe])
        assert args.schedule == schedule


def test_published_fine_tuning_recipes_come_out():
    parse = lambda name: finetune.parse(["--data", "x", "--init", "scratch", "--arch", "resnet50", "--recipe", name])
    for name, lr, batch, epochs, warmup, decay, size in (
        ("rsb_a3", 8e-3, 2048, 100, 5, 0.02, 160),
        ("rsb_a2", 5e-3, 2048, 300, 5, 0.02, 224),
        ("vit", 2.5e-3, 1024, 100, 20, 0.05, 224),
    ):
        args = parse(name)
        assert (
            args.lr * batch / args.lr_batch,
            args.epochs,
            args.warmup_epochs,
            args.weight_decay,
            args.image_size,
        ) == (pytest.approx(lr), epochs, warmup, decay, size)
    a3, a2, vit, convnext = map(parse, ("rsb_a3", "rsb_a2", "vit", "convnext"))
    assert (a3.optimizer, a3.loss, a3.mixup, a3.cutmix, a3.test_size, a3.ema, a3.repeats) == (
        "lamb",
        "bce",
        0.1,
        1.0,
        224,
        0,
        1,
    )
    assert (a2.ema, a2.repeats, a2.drop_path, a2.randaug) == (0.9999, 3, 0.05, 7)
    assert (
        vit.optimizer,
        vit.loss,
        vit.smoothing,
        vit.layer_decay,
        vit.clip_grad,
        vit.ema,
        vit.erasing,
        vit.jitter,
    ) == (
        "adamw",
        "ce",
        0.1,
        0.65,
        5,
        0.99996,
        0.25,
        0.0,
    )  # jitter: in the released configs, without effect beside RandAugment
    assert (convnext.warmup_epochs, convnext.schedule, convnext.jitter, convnext.erasing) == (
        5,
        "cosine-from-0",
        0,
        0.25,
    )
    special = lambda recipe, arch: finetune.parse(
        ["--data", "x", "--init", "scratch", "--arch", arch, "--recipe", recipe]
    )
    for recipe, arch, expected in (
        ("rsb_a2", "resnet101", dict(ema=0, drop_path=0.1)),
        ("vit", "vit_small", dict(ema=0)),
        ("vit", "vit_base", dict(ema=0.99996, repeats=1)),
        ("vit", "vit_large", dict(repeats=3, ema=0.99996)),
        ("convnext", "convnext_base", dict(drop_path=0.5, lr=4e-3, layer_decay=1)),
        ("convnext", "convnext_small", dict(drop_path=0.4, epochs=300)),
        ("convnext", "convnext_tiny", dict(layer_decay=0.7)),
    ):
        assert {k: getattr(special(recipe, arch), k) for k in expected} == expected, arch
    assert (
        special("convnext", "convnext_tiny").lr == 4e-4
        and finetune.parse(
            ["--data", "x", "--init", "scratch", "--arch", "vit_small", "--recipe", "vit", "--ema", "0.5"]
        ).ema
        == 0.5
    )


# ---- fine-tuning: the network ----

@pytest.mark.parametrize("arch, std", [("resnet18", 0.01), ("deit_tiny", 0.01), ("convnext_tiny", 0.02)])
def test_the_head_starts_as_released(arch, std):
    head = model.Classifier(arch, build_encoder(arch, 64), 1000).head
    assert head.weight.std().item() == pytest.approx(std, rel=0.02) and head.bias.abs().max() == 0


def test_classifiers_keep_torchvisions_names_and_outputs():
    images = torch.randn(2, 3, 64, 64)
    for arch in ("resnet18", "convnext_tiny", "swin_tiny"):
        net = model.Classifier(arch, build_encoder(arch, 64), 1000).eval()
        reference = getattr(tv, arch.replace("swin_tiny", "swin_t"))().eval()
        reference.load_state_dict(net.torchvision_state_dict())
        close(net(images), reference(images), atol=1e-4, rtol=1e-4)


def test_a_vit_classifier_averages_patches_under_a_fresh_norm():
    encoder = build_encoder("deit_tiny", 64)
    with torch.no_grad():
        encoder.backbone.norm.bias.fill_(7)                  # pre-training's norm must have no say
    net = model.Classifier("deit_tiny", encoder, 10).eval()
    backbone, images = encoder.backbone, torch.randn(2, 3, 64, 64)
    x = backbone.blocks(backbone.embed_position(backbone.patch_embed(images)))
    x = nn.functional.layer_norm(sum(x[:, i] for i in range(1, 17)) / 16, (192,), eps=1e-6)
    close(net(images), x @ net.head.weight.T + net.head.bias, atol=1e-5, rtol=1e-4)


def test_stochastic_depth_of_resnet_drops_residual_branches_in_training_alone():
    plain, net = build_encoder("resnet18"), build_encoder("resnet18", drop_path=0.99)
    net.backbone.load_state_dict(plain.backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.eval()(images), net.eval()(images))
    rates = [m.p for m in net.modules() if isinstance(m, StochasticDepth)]
    close(rates, np.linspace(0, 0.99, 8).tolist())
    last, z = net.backbone.layer4[1].train(), torch.rand(500, 512, 2, 2)
    nn.init.ones_(last.bn2.weight)
    dropped = (last(z) == z).flatten(1).all(1).sum().item()  # x + 0, and x >= 0 already
    assert 480 <= dropped < 500                              # 0.99 of 500, within 7 standard deviations


# ---- fine-tuning: whole runs ----

SMALL = "--data shapes --image-size 32 --batch-size 8 --workers 0 --amp off --log-every 1 --epochs 2".split()


def tune(out, *flags):
    stem = ["--stem", "imagenet"] if "--init" in flags else []               # four times faster at 32 px
    finetune.main([*SMALL, "--out", str(out), *stem, *map(str, flags)])
    return json.loads((out / "result.json").read_text())


@pytest.fixture
def backbone(tmp_path):
    """A torchvision state dict saved by hand."""
    torch.save(tv.resnet18().state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


def test_a_linear_probe_leaves_the_backbone_bit_equal(few_images, backbone, tmp_path):
    tune(tmp_path / "probe", "--weights", backbone, "--arch", "resnet18", "--recipe", "linear", "--epochs", "2")
    before, after = torch.load(backbone), torch.load(tmp_path / "probe" / "best.pt")
    for name, value in before.items():
        if not name.startswith("fc."):
            assert torch.equal(value, after[name]), name     # weights, and BatchNorm's statistics and counters
    trained = torch.load(tmp_path / "probe" / "checkpoint.pt")["model"]
    assert all(torch.equal(v, trained[f"encoder.backbone.{k}"]) for k, v in before.items() if not k.startswith("fc."))
    assert not torch.equal(
        trained["head.weight"], model.Classifier("resnet18", build_encoder("resnet18"), 10).head.weight
    )


def test_a_linear_probe_on_few_images_is_stable_and_its_optimiser_can_be_typed(few_images, tmp_path, capsys):
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
        assert name == "released" or statistics.mean(losses[-4:]) < losses[0]
    assert worst["few"] < 2 * math.log(10) < worst["released"]       # log(10): a guess
    assert "peak lr 1.00e-02" in capsys.readouterr().err
    last = torch.load(tmp_path / "few" / "best.pt", weights_only=True)
    assert not tv.resnet18(num_classes=10).load_state_dict(last).missing_keys

    world = SimpleNamespace(size=2, on_gpu=True, print0=lambda text: None)
    for images, more, batch, peak in (
        (300, [], 15, 1e-2),                                 # ten steps an epoch, of 2 x 15 images
        (99_999, [], 256, 1e-2),
        (99_999, ["--batch-size", "64"], 64, 1e-2),
        (100_000, [], None, 30 * 512 / 256),
        (300, ["--lr", "0.3"], None, 0.3 * 512 / 256),
        (300, ["--epochs", "5"], 15, 1e-2),
    ):
        given = "--data shapes --init scratch --arch resnet18 --recipe linear".split()
        args = finetune.parse([*given, *more])
        finetune.choose_linear(args, images, world)
        assert args.batch_size == batch and args.optimizer == ("sgd" if peak > 0.1 else "adamw")
        assert args.lr * 2 * (batch or 256) / args.lr_batch == pytest.approx(peak)


def test_fine_tuning_resumes_into_the_uninterrupted_run(few_images, tmp_path, monkeypatch, capsys):
    flags = [
        "--init",
        "scratch",
        "--arch",
        "resnet18",
        "--mixup",
        "0.8",
        "--cutmix",
        "1",
        "--ema",
        "0.9",
        "--randaug",
        "9",
        "--erasing",
        "0.25",
        "--repeats",
        "2",
        "--drop-path",
        "0.2",
        "--optimizer",
        "lamb",
        "--save-every",
        "1",
        "--eval-every",
        "1",
    ]
    whole = tune(tmp_path / "whole", *flags)
    step = finetune.train_step
    monkeypatch.setattr(finetune, "train_step", lambda number, *rest: step(number, *rest) if number < 6 else 1 / 0)
    with pytest.raises(SystemExit):
        tune(tmp_path / "cut", *flags)
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(finetune, "train_step", step)
    finetune.main(["--out", str(tmp_path / "cut"), "--resume"])
    assert json.loads((tmp_path / "cut" / "result.json").read_text()) == whole
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")
    a, b = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    same_weights(a, b)
    for name, value in a["ema"].items():
        assert torch.equal(value, b["ema"][name]), name


def labelled_folder(root, sizes):
    """root/<split>/<class>/*.png, noise in another brightness per class."""
    rng = np.random.default_rng(0)
    for split, counts in sizes.items():
        for label, count in enumerate(counts):
            (root / split / f"c{label}").mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(60 * label, 60 * label + 100, (40, 40, 3), dtype=np.uint8)).save(
                    root / split / f"c{label}" / f"{i}.png"
                )


def test_two_processes_count_every_validation_image_once_and_agree_with_one(tmp_path):
    labelled_folder(tmp_path / "set", {"train": (8, 8, 8), "val": (30, 26, 15)})         # 71 images, batches of 64
    flags = [*SMALL, "--data", tmp_path / "set", "--stem", "imagenet"]
    (tmp_path / "run.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import finetune, torch
def evaluate(model, args, world, run, real=finetune.evaluate):
    result = real(model, args, world, run)
    torch.save(list(model.buffers()), os.path.join({str(tmp_path)!r}, f"evaluated-{{world.rank}}.pt"))
    return result
finetune.evaluate = evaluate
finetune.main()
if sys.platform == "linux":  # a thread of the process group that outlives the run may abort the process at its exit
    assert not [t for t in os.listdir("/proc/self/task") if "gloo" in open(f"/proc/self/task/{{t}}/comm").read()]
""")
    done = torchrun(
        tmp_path / "run.py",
        *flags,
        "--batch-size",
        4,
        "--epochs",
        4,
        "--init",
        "scratch",
        "--arch",
        "resnet18",
        "--out",
        tmp_path / "tuned",
    )
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"evaluated-{rank}.pt") for rank in (0, 1))
    assert all(map(torch.equal, one, two))                   # BatchNorm's statistics are those saved, on both
    best = tmp_path / "tuned" / "best.pt"
    net = model.Classifier("resnet18", build_encoder("resnet18"), 3)
    weights.load_backbone(net.encoder, best)
    weights.load_head(net, best)
    net.eval()
    right, source = torch.zeros(3), data.open_images(str(tmp_path / "set"), "val", (32, 32), labelled=True)
    for i in range(len(source)):                             # one image at a time, by hand
        image = data.normalise(data.eval_transform((32, 32))(source.read(i))[None])
        right[source.labels[i]] += net(image).argmax(1).item() == source.labels[i]
    expected = dict(
        top1=right.sum().item() / 71,
        top5=1.0,
        images=71,
        per_class={f"c{i}": round(n.item() / m, 4) for i, (n, m) in enumerate(zip(right, (30, 26, 15)))},
    )
    for recipe in ("default", "knn"):
        more = [
            "--weights",
            best,
            "--recipe",
            recipe,
            *(["--eval-only"] if recipe == "default" else ["--neighbours", "4"]),
        ]
        finetune.main([*map(str, flags), *map(str, more), "--out", str(tmp_path / f"{recipe}1")])
        done = torchrun(tmp_path / "run.py", *flags, *more, "--out", tmp_path / f"{recipe}2")
        assert done.returncode == 0, done.stderr
        one, two = (json.loads((tmp_path / f"{recipe}{n}" / "result.json").read_text()) for n in (1, 2))
        assert one == two
        if recipe == "default":
            assert {k: one[k] for k in expected} == expected


def test_knn_votes_as_counted_by_hand(tmp_path):
    labelled_folder(tmp_path / "set", {"train": (5, 5), "val": (6, 5)})
    torch.save(tv.resnet18().state_dict(), tmp_path / "w.pth")
    result = tune(
        tmp_path / "knn",
        "--data",
        tmp_path / "set",
        "--weights",
        tmp_path / "w.pth",
        "--arch",
        "resnet18",
        "--recipe",
        "knn",
        "--neighbours",
        "3",
    )
    net = build_encoder("resnet18")
    weights.load_backbone(net, tmp_path / "w.pth")
    net.eval()

    def features(split):
        source = data.open_images(str(tmp_path / "set"), split, (32, 32), labelled=True)
        with torch.no_grad():
            z = [
                net(data.normalise(data.eval_transform((32, 32))(source.read(i))[None])).mean((2, 3))[0].double()
                for i in range(len(source))
            ]
        return [v / v.norm() for v in z], source.labels
    bank, bank_labels = features("train")
    right = 0
    for z, label in zip(*features("val")):
        cosines = sorted(((z @ v).item(), y) for v, y in zip(bank, bank_labels))[-3:]
        votes = [sum(math.exp(c / 0.07) for c, y in cosines if y == k) for k in (0, 1)]
        right += votes.index(max(votes)) == label
    assert result["top1"] == pytest.approx(right / 11)


def test_features_are_torchvisions_before_its_head_of_every_image_in_order(backbone, capsys, tmp_path):
    """Of folders of every layout; two processes write what one does; an image that cannot be read is left out."""
    labelled_folder(tmp_path / "cut", {"train": (3, 2), "val": (2,), "test": (1,)})
    (tmp_path / "flat").mkdir()
    for i in range(5):
        paint(tmp_path / "flat" / f"{i}.png", colour=(50 * i, 90, 200), size=(60 + i, 40))
    net = tv.resnet18()
    net.load_state_dict(torch.load(backbone))
    net.eval().fc = nn.Identity()                            # what is left is pooled
    crop = tvf.InterpolationMode.BICUBIC
    flags = f"--weights {backbone} --arch resnet18 --recipe features --image-size 48 32 --workers 0 --amp off".split()
    for name, labels, classes in (("cut", [0, 0, 0, 0, 1, 1, 0, 0], ["c0", "c1"]), ("flat", [0] * 5, [""])):
        out = tmp_path / f"{name}-out"
        finetune.main([*flags, "--data", str(tmp_path / name), "--out", str(out)])
        found = np.load(out / "features.npz")
        files = sorted(str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*.png"))
        assert f"wrote {out}/features.npz: {len(files)} x 512" in capsys.readouterr().err
        assert found["files"].tolist() == files and found["classes"].tolist() == classes
        assert found["features"].dtype == np.float32 and found["labels"].dtype == np.int64
        assert found["labels"].tolist() == labels            # cut: test/c0/0.png, train/c0/0.png ... val/c0/1.png
        for file, row in zip(files, found["features"]):      # of 40 x 40 px (flat: wider): height 48 / 0.875 = 55 binds
            image = tvf.pil_to_tensor(Image.open(tmp_path / name / file).convert("RGB"))
            image = tvf.center_crop(tvf.resize(image, 55, crop, antialias=True), (48, 32))
            image = tvf.normalize(image.float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            with torch.no_grad():
                close(torch.from_numpy(row), net(image[None])[0], atol=1e-4, rtol=1e-4)
        assert {p.name for p in out.iterdir()} == {"features.npz", "args.json", ".lock"}
    (tmp_path / "flat" / "2.png").write_bytes(b"no image")
    again = [*flags, "--data", tmp_path / "flat", "--out", tmp_path / "flat-out"]
    code, said = complaint(capsys, *again, main=finetune.main)
    assert code == 2 and "already holds a features.npz" in said
    done = torchrun("finetune.py", *flags, "--data", tmp_path / "flat", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert f"1 images cannot be read and are left out: {tmp_path}/flat/2.png" in done.stderr
    one, two = (np.load(tmp_path / name / "features.npz") for name in ("flat-out", "two"))
    assert two["files"].tolist() == ["0.png", "1.png", "3.png", "4.png"]
    np.testing.assert_allclose(two["features"], one["features"][[0, 1, 3, 4]], rtol=1e-4, atol=1e-5)


def test_weights_of_a_smaller_image_are_resized_and_the_report_says_so(few_images, capsys, tmp_path):
    run(tmp_path / "pre", "--epochs", "1", "--patch-size", "8")
    result = tune(
        tmp_path / "tuned", "--weights", tmp_path / "pre" / "backbone.pt", "--image-size", "48", "--epochs", "1"
    )
    said = capsys.readouterr().err
    assert (
        "4 of them resized" in said and "new: head" in said and "not used: 2 (norm.bias, norm.weight)" in said
    )  # 3 bias tables and the positions
    assert (
        json.loads((tmp_path / "tuned" / "args.json").read_text())["patch_size"] == 8
    )  # remembered from beside the weights
    assert result["images"] == 32 and result["labels"] == 32 and 0 <= result["top1"] <= 1
    assert {p.name for p in (tmp_path / "tuned").iterdir()} == {
        ".lock",
        "args.json",
        "log.jsonl",
        "checkpoint.pt",
        "best.pt",
        "model.json",
        "loss.png",
        "result.json",
        "confusion.png",
    }


def test_mistakes_in_fine_tuning_get_one_line(few_images, backbone, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labelled_folder(tmp_path / "no_val", {"train": (2, 2)})
    labelled_folder(tmp_path / "odd", {"train": (2, 2), "val": (2, 2, 1)})
    (tmp_path / "flat").mkdir()
    paint(tmp_path / "flat" / "0.png")
    resnet = ["--weights", backbone, "--arch", "resnet18"]
    for flags, words in (
        (["--data", "shapes"], "give --weights FILE, or --init scratch"),
        (
            ["--data", "shapes", "--weights", "", "--arch", "resnet18"],
            "argument --weights: is empty (an unset shell variable?)",
        ),
        (
            ["--data", "shapes", *resnet, "--test-size", "10000"],
            "argument --test-size: 10000: must be an integer from 1 to 8192",
        ),
        (["--data", "shapes", "--init", "scratch"], "--arch is missing"),
        (resnet, "--data is missing"),
        (
            ["--data", "shapes", *resnet, "--labels", "lots"],
            "--labels lots: must be a share such as 0.1, or a count such as 20/class",
        ),
        (["--data", "shapes", "--arch", "resnet50", "--weights", backbone], "is it another architecture?"),
        (["--data", "shapes", "--arch", "resnet18", "--weights", "gone.pt"], "gone.pt: no such file"),
        (["--data", "no_val", *resnet], "has train/ but no val/"),
        (["--data", "odd", *resnet], "train/ and val/ hold different classes (c2)"),
        (["--data", "flat", *resnet], "needs a folder for each class, at least two"),
        (["--data", "shapes", *resnet, "--eval-only"], "its head tells 1000 classes apart, the data has 10"),
        (["--resume"], "--data is missing"),
    ):
        code, said = complaint(capsys, *flags, main=finetune.main)
        assert code == 2 and words in said and said.startswith("finetune.py: error: ") and said.count("\n") == 1, said


# ---- devices that are not here ----

@pytest.fixture
def pretend(monkeypatch):
    """Makes torch see an accelerator, or none. Nothing can run on it."""
    def see(kind):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind != "cpu")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *given, **more: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        if kind != "cpu":
            monkeypatch.setattr(getattr(torch, kind), "set_device", lambda device: None, raising=False)
        return command.Distributed()
    return see


@pytest.mark.parametrize("kind, backend", [("cuda", "cpu:gloo,cuda:nccl"), ("xpu", "cpu:gloo,xpu:xccl"),
                                           ("mps", "gloo"), ("cpu", "gloo")])
def test_the_accelerator_that_is_there_is_used_without_what_it_may_lack(kind, backend, pretend, few_images, tmp_path):
    world = pretend(kind)
    world.set_device()
    assert world.device == torch.device(kind, 0) if kind != "cpu" else world.device == torch.device("cpu")
    assert (world.on_gpu, world.backend) == (kind != "cpu", backend)
    if kind in ("mps", "xpu"):
        assert world.default_amp() == "off"
    args = pretrain.parse([*TINY, "--arch", "resnet18", "--mask-size", "32", "--out", str(tmp_path)])
    args.amp, world.device = "off", torch.device("cpu")      # its switches, on what is here
    run, *_ = pretrain.prepare(args, world, None)
    assert run.optimizer.defaults["fused"] == (kind != "mps")
    assert run.loader.pin_memory == (kind == "cuda")
    assert run.memory_format == (torch.contiguous_format if kind == "mps" else torch.channels_last)
    tuning = finetune.parse([*SMALL, "--init", "scratch", "--arch", "resnet18", "--out", str(tmp_path)])
    tuned = finetune.prepare(tuning, world, None)
    assert tuned.optimizer.defaults["fused"] == (kind != "mps") and tuned.val_loader.pin_memory == (kind == "cuda")
    world.use(kind)
    world.set_device("cpu")                                    # asked for
    assert not world.on_gpu and world.device == torch.device("cpu") and world.backend == "gloo"


def test_a_device_that_cannot_be_used_gets_one_line(pretend, few_images, capsys, monkeypatch, tmp_path):
    for here, asked, more, words in (
        ("cpu", "cuda", {}, "--device cuda: torch sees no accelerator on this machine; use --device cpu"),
        ("mps", "cuda", {}, "--device cuda: torch sees mps on this machine; use --device mps"),
        ("mps", None, dict(size=2), "2 processes on mps: one only; start it without torchrun, or use --device cpu"),
        ("xpu", None, dict(size=3, local_size=3), "--nproc_per_node=3: this machine has 2 GPUs"),
    ):
        world = pretend(here)
        vars(world).update(more)
        with pytest.raises(ValueError, match=re.escape(words)):
            world.set_device(asked)
    monkeypatch.setattr(torch, "__version__", "2.7.1+old")
    with pytest.raises(ValueError, match=re.escape("--device mps: needs torch 2.8, this is 2.7.1+old")):
        pretend("mps").set_device()
    pretend("mps").set_device("cpu")
    pretend("cpu")
    code, said = complaint(capsys, *TINY, "--device", "xpu", "--out", tmp_path / "run")
    assert code == 2 and "--device xpu: torch sees no accelerator" in said and said.count("\n") == 1
    out_of = RuntimeError("MPS backend out of memory (MPS allocated: 8 GB, max allowed: 9 GB). Tried to allocate 2 GB")
    code, line = command.explain(out_of, command.Distributed())
    assert code == 1 and line.startswith("not enough memory (MPS backend out of memory")


def test_the_device_is_not_remembered(few_images, tmp_path):
    """A run may go on elsewhere: args.json says where it ran, the checkpoint does not ask for it again."""
    _, checkpoint = run(tmp_path / "run", "--epochs", "1", "--device", "cpu")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["device"] == "cpu"
    assert "device" not in checkpoint["args"]


# ---- faults ----

FLAGS = ["--epochs", "2", "--drop-path", "0.1", "--save-every", "1"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_the_resumed_run_is_the_uninterrupted_one(
    number, code, few_images, capsys, tmp_path, monkeypatch
):
    if number == signal.SIGHUP:                              # nohup would leave it ignored, as it should
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    log, final = run(tmp_path / "whole", *FLAGS)
    step = pretrain.train_step

    def interrupted(at, *rest):
        if at == 2:
            os.kill(os.getpid(), number)
        return step(at, *rest)
    monkeypatch.setattr(pretrain, "train_step", interrupted)
    got, said = complaint(capsys, *TINY, *FLAGS, "--save-every", "100", "--out", tmp_path / "cut")
    assert (
        got == code
        and f"stopped by {number.name} after step 3 of 8; go on with --out {tmp_path / 'cut'} --resume" in said
    )
    monkeypatch.setattr(pretrain, "train_step", step)
    pretrain.main(["--data", "shapes", "--out", str(tmp_path / "cut"), "--resume"])
    assert read_log(tmp_path / "cut") == log
    same_weights(final, torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True))
    assert signal.getsignal(number) == before                # and the handlers are gone again


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:5000]), flip_a_byte])
def test_a_broken_checkpoint_gives_way_to_the_one_before(spoil, few_images, capsys, tmp_path):
    log, final = run(tmp_path / "run", *FLAGS)
    spoil(tmp_path / "run" / "checkpoint.pt")
    assert torch.load(tmp_path / "run" / "checkpoint-previous.pt", weights_only=True)["step"] == 7
    again, repeated = run(tmp_path / "run", *FLAGS, "--resume")
    assert "checkpoint-previous.pt, step 7" in capsys.readouterr().err
    assert again == log
    same_weights(final, repeated)


def test_a_disk_that_is_full_leaves_the_old_checkpoint(tmp_path):
    files.save_atomically({"step": 1}, tmp_path / "checkpoint.pt")
    before, limits = (tmp_path / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # no file may grow beyond 100 kB: EFBIG instead of ENOSPC
    try:
        with pytest.raises(OSError, match="checkpoint.pt not written"):
            files.save_atomically(
                {"step": 2, "big": torch.zeros(10**6)}, tmp_path / "checkpoint.pt", keep_previous=True
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_run_whose_last_checkpoint_is_not_written_fails_and_goes_on_later(few_images, capsys, tmp_path, monkeypatch):
    log, final = run(tmp_path / "whole", *FLAGS)
    save = checkpointer.save_atomically
    capsys.readouterr()

    def full(state, path, **more):
        if path.name == "checkpoint.pt" and state["step"] == final["step"]:
            raise OSError("no space left on device")
        save(state, path, **more)
    monkeypatch.setattr(checkpointer, "save_atomically", full)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "cut", *FLAGS)
    said = capsys.readouterr().err
    assert exit.value.code == 1 and f"make room, then go on with --out {tmp_path / 'cut'} --resume" in said
    assert "done:" not in said
    monkeypatch.setattr(checkpointer, "save_atomically", save)
    again, repeated = run(tmp_path / "cut", *FLAGS, "--resume")
    assert again == log and (tmp_path / "cut" / "backbone.pt").is_file()
    same_weights(final, repeated)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(few_images, tmp_path, monkeypatch):
    right = pretrain.a2mim_loss
    calls = []

    def once_nan(*args, **kwargs):
        calls.append(1)
        total, parts = right(*args, **kwargs)
        return (total * math.nan if len(calls) == 3 else total), parts
    monkeypatch.setattr(pretrain, "a2mim_loss", once_nan)
    saved = {}
    save = checkpointer.save_atomically
    monkeypatch.setattr(
        checkpointer,
        "save_atomically",
        lambda state, path, **more: (
            saved.update({state.get("step"): {k: v.clone() for k, v in state.get("model", {}).items()}}),
            save(state, path, **more),
        ),
    )
    log, _ = run(tmp_path / "run", *FLAGS, "--epochs", "1")
    assert [line["loss"] is None for line in log] == [False, False, True, False]
    calls.clear()
    more = ["--epochs", "1", "--log-every", "4", "--save-every", "100"]
    seldom, _ = run(tmp_path / "seldom", *FLAGS, *more)
    assert [line["step"] for line in seldom] == [1, 4]
    mean = (log[1]["loss"] + log[3]["loss"]) / 2             # of steps 2 and 4
    assert seldom[1]["loss"] == pytest.approx(mean, abs=2e-6)
    assert [line.get("skipped", 0) for line in log] == [0, 0, 1, 1]
    assert set(saved) == {None, 1, 2, 4}  # nothing is saved in the middle of it
    assert all(v.isfinite().all() for v in saved[4].values()) and not torch.equal(
        saved[2]["decoder.0.bias"], saved[4]["decoder.0.bias"]
    )


def test_a_step_that_overflows_leaves_no_trace_in_batchnorm(few_images, tmp_path, monkeypatch):
    right, calls = pretrain.normalise, []

    def once_inf(images, device):
        calls.extend([1] * (len(images) == 8))               # a batch, not the six images of the pictures
        return right(images, device) * (math.inf if len(calls) == 3 else 1)
    monkeypatch.setattr(pretrain, "normalise", once_inf)
    log, final = run(tmp_path / "run", *FLAGS, "--epochs", "1", "--arch", "resnet18")
    assert [line.get("skipped", 0) for line in log] == [0, 0, 1, 1]
    assert (
        all(v.isfinite().all() for v in final["model"].values() if v.is_floating_point())
        and final["scaler"]["scale"] == 1
    )


def spoil(folder):
    """Five kinds of files that are no images, among good ones."""
    good = paint(folder / "good.jpg", size=(64, 64))
    (folder / "cut.jpg").write_bytes(Path(good).read_bytes()[:400])
    (folder / "empty.png").touch()
    (folder / "text.jpeg").write_text("not an image")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(folder / "bomb.png")
    header = bytearray((folder / "bomb.png").read_bytes())
    header[16:24] = (60_000).to_bytes(4, "big") * 2          # 3.6 gigapixels, in a file of 67 bytes
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(header)
    os.mkfifo(folder / "pipe.jpg")                           # reading it would wait for ever
    return {"cut.jpg", "empty.png", "text.jpeg", "gone.png", "bomb.png", "pipe.jpg"}


def test_images_that_cannot_be_read_give_way_to_the_next_and_are_counted(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(18):
        paint(folder / f"{i:02}.png", colour=(10 * i, 90, 200 - 10 * i), size=(64, 64))
    bad = spoil(folder)
    (folder / "loop").symlink_to(folder)
    source = data.open_images(str(folder), "train", (64, 64))
    samples = data.ImageDataset(source, data.eval_transform((64, 64)), seed=0)
    assert len(samples) == 25
    for i in range(25):
        image, used, broken = samples[0, i]
        assert (broken == i) == (Path(source.name(i)).name in bad) and Path(source.name(used)).name not in bad
        assert used == next(j % 25 for j in range(i, i + 25) if Path(source.name(j % 25)).name not in bad)
    flags = [*TINY, "--data", str(folder), "--epochs", "1", "--workers", "2"]
    log, _ = run(tmp_path / "run", "--max-bad", "0.5", base=flags)
    listed = {Path(line).name for line in (tmp_path / "run" / "broken.txt").read_text().splitlines()}
    assert listed <= bad and log[-1]["broken"] == len(listed) >= 5           # one image of 25 is not in the three steps
    assert capsys.readouterr().err.count("cannot be read, the next image is taken instead") in (1, 2)
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("not an image, and not a name in UTF-8")
    run(tmp_path / "latin", "--max-bad", "0.5", "--batch-size", "26", base=flags)
    assert "caf\\xe9.png" in (tmp_path / "latin" / "broken.txt").read_text()
    (folder / os.fsdecode(b"caf\xe9.png")).unlink()
    code, said = complaint(capsys, *flags, "--out", tmp_path / "strict")
    assert code == 1 and "of 25 images cannot be read, listed in" in said and "--max-bad (now 0.01)" in said


def test_images_that_are_gone_in_mid_run_fail_the_run_and_are_no_mistake_of_the_user(tmp_path):
    for name in ("a.png", "b.png"):
        paint(tmp_path / name)
    samples = data.ImageDataset(data.Folder(tmp_path, "train"), nn.Identity(), 0)
    assert samples[0, 1][1:] == (1, -1)
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    line = f"2 images in a row cannot be read, the first is {tmp_path}/b.png (No such file or directory)"
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
    flags = [*TINY, "--data", tmp_path / "images", "--epochs", "9", "--max-bad", "1", "--out", tmp_path / "run"]
    code, said = complaint(capsys, *flags)
    assert code == 1 and "16 images in a row cannot be read, the first is" in said and "Traceback" not in said
    assert ".png (Input/output error) (stopped after step 1; go on with --out" in said.splitlines()[-1]


def test_no_character_of_unicode_steers_the_terminal_or_breaks_a_line():
    everything = files.printable("".join(map(chr, range(0x110000))), None)
    for character in set(everything):
        assert unicodedata.category(character) not in ("Cc", "Zl", "Zp", "Cs"), hex(ord(character))
        turns = unicodedata.bidirectional(character)         # explicit marks: embedding, override, isolate
        assert not re.fullmatch("LRE|RLE|LRO|RLO|PDF|LRI|RLI|FSI|PDI", turns), hex(ord(character))
    for text in ("plain.jpg", "Straße 日本 😀.png", "a b\\x41.png"):
        assert files.printable(text) == text
    assert files.printable("a\tb\0\x9b\u202ec\n") == "a\\x09b\\x00\\x9b\\u202ec\\x0a"
    assert files.printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    long = files.printable("/data/" + "x" * 5000 + "/0001.jpg")
    assert len(long) == 200 and long.startswith("/data/xxx") and "..." in long and long.endswith("xxx/0001.jpg")
    assert files.printable(long) == long


def test_names_of_files_and_classes_are_harmless_lines_wherever_they_are_printed_or_written(tmp_path, capsys):
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
    for call in (lambda: data.open_images(str(root), "train", (32, 32), labelled=True),
                 lambda: data.Folder(root / f"empty{evil}", "train"), lambda: data.Folder(root / f"no{evil}", "train"),
                 lambda: weights.load_backbone(build_encoder("resnet18"), root / f"no{evil}.pt")):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value) + "\n")
    assert [text.count("\n") for text in said] == [2, 1, 1, 1, 1, 1]         # the first: TIFF files, and a bad image
    for text in said:
        assert safe in text and "\x1b" not in text and "\u202e" not in text


def test_a_disk_that_fails_in_an_evaluation_ends_the_run_with_one_line(few_images, capsys, tmp_path, monkeypatch):
    def fails(*given):
        raise OSError("the disk of the validation images is gone")
    monkeypatch.setattr(finetune, "evaluate", fails)
    code, said = complaint(
        capsys, *SMALL, "--init", "scratch", "--arch", "resnet18", "--out", tmp_path / "run", main=finetune.main
    )
    assert (
        code == 1
        and said.splitlines()[-1] == "finetune.py: the disk of the validation images is gone"
        and "not written" not in said
    )


def test_the_last_line_of_fine_tuning_is_the_command_that_evaluates_it(
    few_images, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "my runs"
    result = tune(out, "--init", "scratch", *QUICK, "--data-root", tmp_path / "my sets")
    *_, done, command = capsys.readouterr().err.splitlines()
    assert done == f"done: {out}/best.pt holds the weights of the best epoch"
    words = shlex.split(command.removeprefix("next: python finetune.py "))
    assert words[-1] == "--eval-only" and str(tmp_path / "my sets") in words
    finetune.main([*words, "--workers", "0", "--amp", "off", "--out", "again"])
    assert json.loads(Path("again/result.json").read_text())["top1"] == result["best_top1"]
    assert "done:" not in capsys.readouterr().err            # nothing was trained


def test_a_class_without_a_validation_image_has_no_accuracy(capsys, tmp_path):
    labelled_folder(tmp_path / "set", {"train": (4, 4, 4), "val": (4, 1, 4)})
    (tmp_path / "set" / "val" / "c1" / "0.png").write_text("not an image")
    result = tune(tmp_path / "run", "--data", tmp_path / "set", "--init", "scratch", *QUICK)
    assert result["per_class"]["c1"] is None and result["images"] == 8
    mean = (result["per_class"]["c0"] + result["per_class"]["c2"]) / 2
    assert mean == pytest.approx(result["top1"])
    assert re.search(r"^per class: c0 \d+, c1 -, c2 \d+$", capsys.readouterr().err, re.M)


@pytest.mark.parametrize("flags, room, file", [
    (["--eval-only"], 50, "confusion.png"),
    (["--eval-only"], 300, "result.json"),
    (["--recipe", "features"], 3000, "features.npz"),
])
def test_a_full_disk_at_the_end_names_the_file_and_leaves_none(
    flags, room, file, few_images, backbone, capsys, tmp_path, monkeypatch
):
    net = tv.resnet18(num_classes=10)
    torch.save(net.state_dict(), backbone)
    call = [*SMALL, "--weights", backbone, "--arch", "resnet18", *flags, "--out", tmp_path / "out"]
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), results.save_confusion
    outputs = finetune.outputs

    def last_work(*given):                                   # then no file may grow beyond `room` bytes
        found = outputs(*given)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        return found
    if file == "result.json":                                # which is smaller than the picture
        monkeypatch.setattr(results, "save_confusion", lambda path, *given: path.touch())
    monkeypatch.setattr(finetune, "outputs", last_work)
    try:
        code, said = complaint(capsys, *call, main=finetune.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fix = "not written (File too large); make room, then give the same command again"
    assert code == 1
    assert said.splitlines()[-1] == f"finetune.py: {tmp_path / 'out' / file}: {fix}"
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"args.json", ".lock"} | ({"confusion.png"} if file == "result.json" else set())
    monkeypatch.setattr(finetune, "outputs", outputs)
    monkeypatch.setattr(results, "save_confusion", save)
    finetune.main([*map(str, call)])                         # the same command again
    assert (tmp_path / "out" / file).stat().st_size > room


def test_probes_and_evaluations_leave_args_json_and_never_overwrite_a_result(few_images, backbone, capsys, tmp_path):
    result = tune(tmp_path / "tuned", "--weights", backbone, "--arch", "resnet18", "--epochs", "1")
    best = tmp_path / "tuned" / "best.pt"
    for name, more in (("knn", ["--recipe", "knn"]), ("eval", ["--eval-only"])):
        tune(tmp_path / name, "--weights", best, *more)
        assert json.loads((tmp_path / name / "args.json").read_text())["arch"] == "resnet18"
        before = (tmp_path / name / "result.json").read_bytes()
        for out in (tmp_path / name, tmp_path / "tuned"):
            code, said = complaint(capsys, *SMALL, "--weights", best, *more, "--out", out, main=finetune.main)
            assert code == 2 and "already holds a" in said
        assert (tmp_path / name / "result.json").read_bytes() == before
    assert json.loads((tmp_path / "tuned" / "result.json").read_text()) == result


def test_args_json_of_a_demo_holds_the_batch_it_ran_with(few_images, tmp_path):
    pretrain.main(
        [
            "--batch-size",
            "8",
            "--image-size",
            "32",
            "--epochs",
            "0.3",
            "--workers",
            "0",
            "--sheets",
            "0",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert json.loads((tmp_path / "run" / "args.json").read_text())["global_batch"] == 8  # the demo's own is 16


def test_validation_leaves_out_what_cannot_be_read(tmp_path):
    labelled_folder(tmp_path / "set", {"train": (8, 8), "val": (5, 4)})
    bad = len(spoil(tmp_path / "set" / "val" / "c0"))  # and one good image
    assert (
        tune(tmp_path / "tuned", "--data", tmp_path / "set", "--init", "scratch", "--arch", "resnet18")["images"] == 10
        and bad == 6
    )


def test_another_global_batch_goes_on_at_the_same_epoch(few_images, capsys, tmp_path):
    run(tmp_path / "run", *FLAGS, "--epochs", "3")           # 4 steps an epoch
    lines, _ = run(tmp_path / "run", "--resume", "--batch-size", "16", "--epochs", "5", base=[])
    assert "the schedule goes on at epoch 3.00, but not bit by bit" in capsys.readouterr().err
    assert [(line["step"], line["epoch"]) for line in lines[-4:]] == [(7, 3.5), (8, 4.0), (9, 4.5), (10, 5.0)]
    assert max(line["step"] for line in lines[:-4]) == 12    # the lines of before are kept


# ---- faults: nothing is called done that is not on the disk, and no checkpoint is lost ----

def test_a_run_whose_weights_are_not_finite_is_not_called_done(few_images, capsys, tmp_path):
    for name, epochs in (("short", "1"), ("step", "0.25")):  # 4 steps of which 3 are bad; 1 step, which looks good
        code, said = complaint(capsys, *TINY, "--lr", "1e308", "--epochs", epochs, "--out", tmp_path / name)
        assert code == 1 and "not finite" in said and "lower --lr" in said and "done" not in said
        assert not (tmp_path / name / "checkpoint.pt").exists() and not (tmp_path / name / "backbone.pt").exists()


def test_a_run_whose_last_steps_are_not_finite_is_not_called_done(few_images, capsys, tmp_path, monkeypatch):
    right = pretrain.train_step

    def bad_at_the_end(step, *rest):
        record = right(step, *rest)
        return {name: value * (math.nan if step >= 6 else 1) for name, value in record.items()}
    monkeypatch.setattr(pretrain, "train_step", bad_at_the_end)
    code, said = complaint(capsys, *TINY, *FLAGS, "--out", tmp_path)
    assert code == 1 and "loss is not finite, 2 times in a row at step 8" in said and "done" not in said
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6


HOLD = """
import sys, time
from pathlib import Path
from engine.files import lock_folder
lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(few_images, capsys, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=HERE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        for more in ([], ["--resume"]):
            code, said = complaint(capsys, *TINY, "--epochs", "1", "--out", tmp_path, *more)
            assert code == 2 and "another run is writing there; wait for its end, or choose another --out" in said
            assert said.count("\n") == 1 and {path.name for path in tmp_path.iterdir()} == {".lock"}
    finally:
        other.kill()
        other.wait()
    run(tmp_path, "--epochs", "1")                           # the kernel has released the lock of the dead


def test_a_broken_checkpoint_never_replaces_the_whole_one_before_it(few_images, tmp_path, monkeypatch):
    run(tmp_path, *FLAGS)
    (tmp_path / "checkpoint.pt").write_bytes(b"garbage")
    before = (tmp_path / "checkpoint-previous.pt").read_bytes()
    replace = os.replace

    def killed(old, new):
        if Path(new).name == "checkpoint.pt":
            raise KeyboardInterrupt                          # where a SIGKILL would hurt: before the new name is given
        replace(old, new)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        run(tmp_path, "--resume", "--epochs", "3", "--save-every", "1")
    assert (tmp_path / "checkpoint-previous.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint-previous.pt", "backbone.pt", "log.jsonl", "args.json"])
@pytest.mark.parametrize("make, kind", [(os.mkdir, "is a folder"), (os.mkfifo, "is a pipe or device")])
def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_refused_at_the_start(
    name, make, kind, few_images, capsys, tmp_path
):
    make(tmp_path / name)
    code, said = complaint(capsys, *TINY, "--out", tmp_path, "--resume")
    assert code == 2 and f"{tmp_path / name}: {kind}, a run writes a file of this name" in said
    assert said.count("\n") == 1


def test_best_pt_that_cannot_be_written_fails_the_run_and_resume_makes_it(few_images, capsys, tmp_path):
    flags = ["--init", "scratch", "--arch", "shufflenet_v2_x0_5", "--image-size", "32", "--data", "shapes"]
    flags += "--epochs 1 --batch-size 8 --workers 0 --amp off".split()
    (tmp_path / "best.pt.tmp").mkdir()
    code, said = complaint(capsys, *flags, "--out", tmp_path, main=finetune.main)
    assert code == 1 and "best.pt not written" in said.splitlines()[-1] and "--resume" in said.splitlines()[-1]
    assert not (tmp_path / "result.json").exists()
    (tmp_path / "best.pt.tmp").rmdir()
    finetune.main(["--out", str(tmp_path), "--resume"])
    assert (tmp_path / "best.pt").is_file() and (tmp_path / "result.json").is_file()


def test_a_log_that_cannot_be_written_ends_no_run(few_images, tmp_path):
    code = "import pretrain, sys; pretrain.main(sys.argv[1:])"
    flags = "--arch shufflenet_v2_x0_5 --image-size 64 --batch-size 8 --workers 0 --amp off --epochs 0.002".split()
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, "--data", "shapes", *flags, "--out", tmp_path], cwd=HERE,
                              stderr=full, timeout=120)
    assert done.returncode == 0 and (tmp_path / "backbone.pt").is_file()


def in_workers(monkeypatch, act):
    """Makes every image that a loader worker reads run act(); reads in the main process stay as they are."""
    right, main = data.Shapes.read, os.getpid()

    def read(self, index, **more):
        if os.getpid() != main:
            act()
        return right(self, index, **more)
    monkeypatch.setattr(data.Shapes, "read", read)


def test_a_loader_worker_that_is_killed_gets_one_line(few_images, capsys, tmp_path, monkeypatch):
    in_workers(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    code, said = complaint(capsys, *TINY, "--epochs", "1", "--workers", "1", "--out", tmp_path)
    last = said.splitlines()[-1]
    assert code == 1 and "a loader worker was killed" in last and "--workers 0" in last and "Traceback" not in said


def test_a_full_shared_memory_gets_one_line_that_names_the_cure():
    world = command.Distributed()
    for error in (RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device"),
                  RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                               "dataloader's workers are out of shared memory.")):
        code, line = command.explain(error, world)
        assert code == 1 and all(word in line for word in ("/dev/shm", "--workers 0", "--shm-size", "--ipc=host"))


def test_a_process_whose_worker_raised_ends_after_its_line(tmp_path):
    """torch raises a worker's error again from a frame that holds the loader: its deaf workers kept the process."""
    code = ("import data, pretrain, sys, os\n"
            "main, right = os.getpid(), data.Shapes.read\n"
            "def read(self, index, **more):\n"
            "    if os.getpid() != main: raise TypeError('the label is odd')\n"
            "    return right(self, index, **more)\n"
            "data.Shapes.read = read\n"
            "pretrain.main(sys.argv[1:])")
    flags = "--data shapes --arch shufflenet_v2_x0_5 --image-size 64 --batch-size 8 --workers 1 --val 0".split()
    done = subprocess.run([sys.executable, "-c", code, *flags, "--out", tmp_path], cwd=HERE, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1 and "the label is odd" in done.stderr


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import pretrain
right = pretrain.train_step
def train_step(step, *rest):
    if step == 1 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return right(step, *rest)
pretrain.train_step = train_step
pretrain.main()
"""


def test_the_others_say_so_if_rank_0_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED.format(here=str(HERE)))
    flags = "--data shapes --arch shufflenet_v2_x0_5 --image-size 64 --batch-size 4 --workers 0 --amp off --val 0"
    done = torchrun(tmp_path / "killed.py", *flags.split(), "--out", tmp_path / "run")
    told = [line for line in done.stderr.splitlines() if line.startswith("pretrain.py: ")]
    assert done.returncode == 1 and len(told) == 1 and told[0].startswith("pretrain.py: rank 1: lost another process")


def test_a_mistake_found_by_a_worker_is_told_without_the_workers_name(few_images, capsys, tmp_path, monkeypatch):
    error = ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback:\n  x\nValueError: a: b is odd")
    assert command.explain(error, command.Distributed()) == (2, "error: a: b is odd")


def test_a_loader_that_fails_in_mid_run_is_a_failed_run_that_can_go_on(few_images, capsys, tmp_path, monkeypatch):
    log, final = run(tmp_path / "whole", *FLAGS)
    step = pretrain.train_step

    def gone(at, *rest):
        if at == 5:
            raise command.Failed("the data are gone")
        return step(at, *rest)
    monkeypatch.setattr(pretrain, "train_step", gone)
    code, said = complaint(capsys, *TINY, *FLAGS, "--save-every", "100", "--out", tmp_path / "cut")
    told = f"the data are gone (stopped after step 5; go on with --out {tmp_path / 'cut'} --resume)"
    assert code == 1 and said.splitlines()[-1] == f"pretrain.py: {told}"
    monkeypatch.setattr(pretrain, "train_step", step)
    again, repeated = run(tmp_path / "cut", *FLAGS, "--resume")
    assert again == log
    same_weights(final, repeated)


@pytest.mark.parametrize("line", ["5", '{"note": 1}', "[1, 2]", '{"step": "x", "epoch": 1}', "\xff\xfe broken"])
def test_a_log_with_odd_lines_is_resumed_without_them(line, few_images, tmp_path):
    run(tmp_path, "--epochs", "1")
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    log, _ = run(tmp_path, "--resume", "--epochs", "2", base=[])
    assert [entry["step"] for entry in log] == list(range(1, 9))


CRAFTED = {
    "step": "x", "per_epoch": 0, "world": 0, "skipped": "a", "args": [], "model": [], "broken": 5, "optimizer": 7,
    ("args", "program"): None, ("args", "workers"): "a", ("args", "image_size"): [], ("args", "lr"): "nan",
    ("args", "arch"): "resnet51", ("args", "amp"): "fp8", ("args", "epochs"): {}, ("args", "save_every"): "soon",
}


@pytest.mark.parametrize("place", CRAFTED, ids=str)
def test_a_crafted_checkpoint_gets_one_line(place, few_images, capsys, tmp_path):
    run(tmp_path, "--epochs", "0.25")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if isinstance(place, tuple):
        state[place[0]][place[1]] = CRAFTED[place]
    else:
        state[place] = CRAFTED[place]
    torch.save(state, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    code, said = complaint(capsys, "--out", tmp_path, "--resume")
    assert code == 2 and f"{tmp_path / 'checkpoint.pt'}: " in said.splitlines()[-1] and "Traceback" not in said


def test_a_checkpoint_with_weights_that_are_nan_is_not_resumed(few_images, capsys, tmp_path):
    run(tmp_path, "--epochs", "0.25")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["model"]["decoder.0.bias"][0] = math.nan
    torch.save(state, tmp_path / "checkpoint.pt")
    code, said = complaint(capsys, "--out", tmp_path, "--resume")
    assert code == 2 and "weights that are NaN" in said


def test_values_of_flags_are_shown_harmless_and_short(capsys):
    for value in ("1\n2", "\x1b[2J1", "9" * 5000 + "x"):
        code, said = complaint(capsys, "--data", "x", "--accum", value)
        assert code == 2 and "argument --accum: " in said and said.count("\n") == 1 and len(said) < 1200
        assert said.rstrip("\n").isprintable()


@pytest.mark.parametrize("made, resumed", [("--channels-last", "--no-channels-last"),
                                           ("--no-channels-last", "--channels-last")])
def test_a_run_is_resumed_in_the_other_memory_format(made, resumed, few_images, tmp_path):
    flags = ["--arch", "shufflenet_v2_x0_5", "--mask-size", "32", "--token-stage", "1", made]
    for name in ("same", "other"):
        _, start = run(tmp_path / name, *flags, "--epochs", "1")
    _, same = run(tmp_path / "same", "--resume", "--epochs", "2", base=[])
    _, other = run(tmp_path / "other", "--resume", "--epochs", "2", resumed, base=[])

    def distance(a, b):
        names = [name for name, value in a["model"].items() if value.is_floating_point() and "running" not in name]
        return sum((a["model"][name] - b["model"][name]).abs().sum().item() for name in names)
    # sums in another order; moments that meet the wrong weights give about 0.4
    assert distance(same, other) < 0.05 * distance(same, start)


def test_a_bf16_run_that_is_resumed_in_fp16_scales_its_gradients(few_images, tmp_path):
    _, state = run(tmp_path, "--epochs", "0.25", "--amp", "bf16")
    assert state["scaler"]["scale"] == 1.0
    _, state = run(tmp_path, "--epochs", "0.5", "--resume", "--amp", "fp16", base=[])
    assert state["scaler"]["scale"] > 1.0 and state["step"] == 2


@pytest.mark.parametrize("make", ["fifo", "zero"])
def test_weights_that_are_no_regular_file_are_refused_and_not_waited_for(make, few_images, capsys, tmp_path):
    path = Path("/dev/zero")
    if make == "fifo":
        path = tmp_path / "pipe.pt"
        os.mkfifo(path)
    code, said = complaint(capsys, *TINY, "--epochs", "1", "--weights", path, "--out", tmp_path / "run")
    assert code == 2 and str(path) in said and said.count("\n") == 1


def test_resume_alone_says_which_flag_names_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = complaint(capsys, "--resume")
    assert code == 2 and "give the run's folder with --out" in said


def test_a_refused_folder_below_one_that_is_not_there_leaves_nothing(few_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain.main([*TINY, "--epochs", "0.25", "--out", "nowhere/../run"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
