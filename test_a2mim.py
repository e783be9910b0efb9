"""Each test states a fact about A2MIM and checks it against an independent derivation.

    python -m pytest -q test_a2mim.py

In the order of the files: masking, model, loss, data, pretrain. The tests of fine-tuning are in
engine/test_finetune.py, those of the engine (checkpoints, processes, files, messages) and of forks
in the other engine/test_*.py.
"""

import json
import math
import statistics
import time
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

import data
import loss
import masking
import model
import pretrain
from engine import checkpointer, optim, pictures
from engine.testing import (HERE, TINY, assert_settings, checkerboard, complaint, flat, pixels,
                            randomised, read_log, resolved, run, same_weights, settings_of,
                            verdict_of)
from model import A2MIM, build_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
close = torch.testing.assert_close


# ---- masking: which patches ----

def test_224_px_have_49_mask_units_of_which_30_are_hidden():
    mask = masking.random_mask(500, masking.mask_grid((224, 224), 32), 0.6)
    assert mask.shape == (500, 7, 7) and mask.dtype == torch.bool
    assert mask.sum((1, 2)).unique().tolist() == [30]        # ceil(0.6 * 49) = ceil(29.4)


@pytest.mark.parametrize("units, ratio, hidden", [
    (16, 0.6, 10),
    (36, 0.75, 27),
    (100, 0.55, 55),                                         # 0.55 * 100 = 55.000000000000007
    (10, 0.7, 7),
    (2, 0.01, 1),
    (49, 0.5, 25),
    (49, 1e-9, 1),                                           # at least one
])
def test_hidden_count_is_the_ceiling_and_floating_point_does_not_add_one(units, ratio, hidden):
    assert masking.hidden_count(units, ratio) == hidden


def test_every_subset_of_mask_units_is_equally_likely():
    mask = masking.random_mask(40_000, (2, 3), 0.5).flatten(1)
    subsets = (mask.long() * 2 ** torch.arange(6)).sum(1).bincount(minlength=64)
    subsets = subsets[subsets > 0].double()
    assert len(subsets) == 20                                # 3 of 6 hidden
    chi2 = ((subsets - 2000) ** 2 / 2000).sum()
    assert chi2 < 43.8                   # with 19 degrees of freedom, exceeded once in 1,000 draws


def test_masks_come_from_the_generator_alone():
    def draw(seed):
        return masking.random_mask(8, (4, 6), generator=torch.Generator().manual_seed(seed))

    first = draw(1)
    torch.manual_seed(99)
    assert torch.equal(first, draw(1)) and not torch.equal(first, draw(2))
    assert len(first.flatten(1).unique(dim=0)) == 8          # each image has its own


def test_a_pixel_is_hidden_when_its_mask_unit_is():
    mask = masking.random_mask(2, (2, 3), 0.5)
    big = masking.resize_mask(mask, (64, 96))
    for b, y, x in product(range(2), (0, 31, 32, 63), (0, 31, 32, 63, 64, 95)):
        assert big[b, 0, y, x] == mask[b, y // 32, x // 32]


def test_a_grid_that_the_mask_units_do_not_divide_is_resized_by_nearest():
    mask = masking.random_mask(2, (7, 7), 0.6)
    odd = masking.resize_mask(mask, (10, 12))
    for y, x in product(range(10), range(12)):
        assert torch.equal(odd[:, 0, y, x], mask[:, y * 7 // 10, x * 7 // 12])


# ---- masking: the fill ----

def test_the_fill_is_the_mean_of_the_whole_image_and_visible_pixels_stay_bit_equal():
    x, mask = torch.randn(2, 3, 64, 96), masking.random_mask(2, (2, 3), 0.5)
    seen = masking.fill_hidden(x, mask)
    for b, r, c in product(range(2), range(2), range(3)):
        patch = np.s_[b, :, 32 * r:32 * r + 32, 32 * c:32 * c + 32]
        if mask[b, r, c]:
            mean = x[b].double().reshape(3, -1).mean(1).float()      # hidden pixels included
            close(seen[patch], mean[:, None, None].expand(3, 32, 32))
        else:
            assert torch.equal(seen[patch], x[patch])


def test_the_other_fills_are_zero_and_one_random_colour_per_image():
    x, mask = torch.randn(2, 3, 4, 4), checkerboard(2)
    hidden = masking.resize_mask(mask, (4, 4)).expand_as(x)
    assert masking.fill_hidden(x, mask, "zero")[hidden].unique().tolist() == [0]
    filled = masking.fill_hidden(x, mask, "random", torch.Generator().manual_seed(3))
    assert len(filled[hidden].unique()) == 6                 # 2 images x 3 channels
    assert torch.equal(filled[~hidden], x[~hidden])


def reflect(i, n):
    """The index of 0 ... n - 1 that a padded index i mirrors."""
    if i < 0:
        return -i
    if i >= n:
        return 2 * (n - 1) - i
    return i


def test_far_from_all_visible_pixels_the_blur_is_the_mean_colour():
    x = torch.randn(1, 2, 72, 72)
    mask = torch.ones(1, 9, 9, dtype=torch.bool)
    mask[0, 0, 0] = False
    blurred = masking.fill_hidden(x, mask, "blur")
    close(blurred[..., 71, 71], x.mean((2, 3)))


@pytest.mark.parametrize("H, W", [(24, 24), (16, 24), (24, 8)])
def test_a_blur_of_the_visible_pixels_is_their_weighted_mean(H, W):
    x = torch.randn(1, 2, H, W, dtype=torch.double)
    mask = checkerboard(1, H // 8, W // 8)                   # mask units of 8 px: sigma 6
    blurred = masking.fill_hidden(x, mask, "blur")
    hidden = masking.resize_mask(mask, (H, W))[0, 0]
    reach_down, reach_across = min(18, H - 1), min(18, W - 1)        # three sigma, or the image
    down = range(-reach_down, reach_down + 1)
    across = range(-reach_across, reach_across + 1)
    for r, c in ((0, 0), (3, 4), (12, 12), (23, 20)):
        if r >= H or c >= W or not hidden[r, c]:
            continue
        total, weight = torch.zeros(2, dtype=torch.double), 0.0
        for dr, dc in product(down, across):
            y, z = reflect(r + dr, H), reflect(c + dc, W)
            if not hidden[y, z]:
                w = math.exp(-(dr**2 + dc**2) / (2 * 6**2))
                total += w * x[0, :, y, z]
                weight += w
        close(blurred[0, :, r, c], total / weight)
    same = torch.full((1, 3, 32, 32), 7.0)
    # the blur of one colour is that colour
    close(masking.fill_hidden(same, checkerboard(1, 4, 4), "blur"), same)


def test_hidden_pixels_reach_the_network_only_through_the_mean_colour():
    net = A2MIM(build_encoder("resnet18"), 64).eval()
    x = torch.randn(1, 3, 64, 64)
    mask = torch.tensor([[[True, False], [False, True]]])    # top left is hidden
    y = x.clone()
    y[..., :32, :32] = x[..., :32, :32].flip(-1)             # the same colours, mirrored
    close(net(x, mask), net(y, mask))
    # where the patch is visible, the output has to differ
    assert not torch.allclose(net(x, ~mask), net(y, ~mask))


# ---- masking: the token ----

def test_token_forms_by_hand():
    z = torch.tensor([[[[2.0, 3.0]]]])                       # (1, 1, 1, 2)
    mask = torch.tensor([[[True, False]]])                   # left hidden
    for form, left in (("gamma", 0.25 * 2 + 7), ("add", 2 + 7), ("replace", 7)):
        token = masking.MaskToken(1, form)
        nn.init.constant_(token.token, 7)
        if form == "gamma":
            nn.init.constant_(token.gamma, 0.25)
        assert token(z, mask).flatten().tolist() == [left, 3]


def test_gamma_starts_at_a_millionth_so_a_hidden_feature_starts_as_the_token():
    token = masking.MaskToken(512)
    assert token.gamma.unique().tolist() == [pytest.approx(1e-6)]
    assert 0.015 < token.token.std() < 0.025                 # random, std 0.02
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


# ---- model: encoder, token, decoder ----

FAMILIES = ["resnet18", "resnet50", "convnext_tiny", "swin_tiny", "vit_small", "deit_tiny"]


@pytest.mark.parametrize("arch, size", [*product(FAMILIES, [(64, 64), (64, 128)])])
def test_every_family_reconstructs_the_whole_image_and_the_token_enters_where_it_should(arch, size):
    net = A2MIM(build_encoder(arch, size), size).eval()
    entered = []

    def note_shape(module, inputs, output):
        entered.append(tuple(output.shape))

    net.mask_token.register_forward_hook(note_shape)
    reconstruction = net(torch.randn(2, 3, *size), masking.random_mask(2, net.grid))
    H, W = size
    assert reconstruction.shape == (2, 3, H, W)
    assert net.grid == (H // 32, W // 32)
    released = {                                             # where the token enters
        "resnet18": (2, 256, H // 16, W // 16),
        "resnet50": (2, 1024, H // 16, W // 16),
        "convnext_tiny": (2, 768, H // 32, W // 32),
        "swin_tiny": (2, H // 4, W // 4, 96),
        "vit_small": (2, H * W // 256, 768),
        "deit_tiny": (2, H * W // 256, 192),
    }
    assert entered == [released[arch]]


def test_each_patch_of_a_vit_gives_the_pixels_of_its_own_square():
    """With all branches off, a block is the identity: a change of one patch stays in its place,
    though a class token stands before the patches."""
    size = (64, 96)
    net = A2MIM(build_encoder("deit_tiny", size), size, mask_size=16).eval()
    for name, parameter in net.named_parameters():
        if name.endswith(("gamma_1", "gamma_2")):
            nn.init.zeros_(parameter)
    all_visible = torch.zeros(1, 4, 6, dtype=torch.bool)
    x = torch.randn(1, 3, *size)
    changed = x.clone()
    changed[..., 16:32, 64:80] += torch.randn(3, 16, 16)
    difference = (net(changed, all_visible) - net(x, all_visible)).abs()
    assert difference[..., 16:32, 64:80].min() > 0
    difference[..., 16:32, 64:80] = 0
    assert difference.max() < 1e-6


def test_a_new_model_is_in_training_mode():
    """Its feature maps are measured in eval mode, which BatchNorm needs."""
    assert all(module.training for module in A2MIM(build_encoder("resnet18"), 64).modules())


def test_the_token_can_enter_before_any_stage():
    x = torch.randn(1, 3, 64, 64)
    for arch, stages in (("resnet18", 5), ("deit_tiny", 13), ("swin_tiny", 5)):
        for stage in range(stages):
            net = A2MIM(build_encoder(arch, 64), 64, token_stage=stage, token="add").eval()
            mask = masking.random_mask(1, net.grid, 0.5)
            before = net(x, mask)
            nn.init.constant_(net.mask_token.token, 1.0)
            assert not torch.allclose(before, net(x, mask)), (arch, stage)


def test_each_feature_gives_the_pixels_of_its_own_square():
    """PixelShuffle lays the 3 s^2 outputs of feature (i, j) over the pixels of square (i, j)."""
    net = A2MIM(build_encoder("resnet18"), (64, 96))
    z = torch.zeros(1, 512, 2, 3)
    z[0, :, 1, 2] = 1.0
    nn.init.constant_(net.decoder[0].weight, 0.5)
    image = net.decoder(z)
    assert image[..., 32:, 64:].unique().tolist() == [256]   # 512 * 0.5
    assert image.sum() == 256 * 3 * 32 * 32                  # all other pixels are 0


def test_reconstruct_pastes_into_hidden_patches_only_and_leaves_the_model_as_it_was():
    net = A2MIM(build_encoder("resnet18"), 64).train()
    running_mean = net.encoder.backbone.bn1.running_mean.clone()
    x, mask = torch.randn(2, 3, 64, 64), checkerboard(2)
    seen, reconstruction, pasted = net.reconstruct(x, mask)
    hidden = masking.resize_mask(mask, (64, 64)).expand_as(x)
    assert torch.equal(pasted[hidden], reconstruction[hidden])
    assert torch.equal(pasted[~hidden], x[~hidden])
    assert torch.equal(seen, masking.fill_hidden(x, mask))
    assert net.training
    assert torch.equal(net.encoder.backbone.bn1.running_mean, running_mean)


def test_the_picture_of_a_random_fill_is_what_the_encoder_sees():
    net = A2MIM(build_encoder("resnet18"), 64, fill="random")
    inputs = []
    net.encoder.backbone.conv1.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    seen, *_ = net.reconstruct(torch.randn(2, 3, 64, 64), checkerboard(2))
    assert torch.equal(seen, inputs[0])


class Transposed(nn.Module):
    """(B, C, N) -> (B, N, C)."""

    def forward(self, z):
        return z.transpose(1, 2)


def test_any_list_of_modules_is_an_encoder():
    efficientnet = list(tv.efficientnet_b0().features)
    mobilenet = list(tv.mobilenet_v3_small().features)
    for stages, token_stage in ((efficientnet, 6), (mobilenet, 9)):
        net = A2MIM(stages, image_size=128, token_stage=token_stage)
        x, mask = torch.randn(2, 3, 128, 128), masking.random_mask(2, net.grid)
        total, _ = loss.a2mim_loss(net(x, mask), x, pixels(mask, x))
        total.backward()
        assert net.grid == (4, 4)
        assert all(p.grad is not None for p in net.parameters())
    # an encoder that ends in a sequence (B, 64, 8), not in a map
    tokens = [nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2)), Transposed()]
    assert A2MIM(tokens, 64, token_stage=0).stride == 8


# ---- model: the backbones ----

def test_parameter_counts_are_the_published_ones():
    """In millions, with the classification head.

    Source: the authors' table, and torchvision's table for the names that torchvision has too.
    """
    for arch, head, published, tolerance in (
        ("vit_small", 768, 48.8, 0.06),
        ("vit_base", 768, 86.7, 0.06),
        ("resnet50", 2048, 25.6, 0.06),
        ("resnet200", 2048, 64.7, 0.06),
        ("convnext_small", 768, 50.2, 0.06),
        ("deit_small", 384, 22.1, 0.2),
    ):
        encoder = sum(p.numel() for p in build_encoder(arch).parameters())
        count = encoder + 1000 * (head + 1)
        assert count / 1e6 == pytest.approx(published, abs=tolerance), arch


def test_initial_values_that_the_recipes_rely_on():
    resnet = build_encoder("resnet50").backbone
    # each block starts as its shortcut
    assert all(block.bn3.weight.abs().max() == 0 for block in resnet.layer2)
    vit = build_encoder("deit_tiny", 224).backbone
    block = vit.blocks[3]
    for gamma in (block.gamma_1, block.gamma_2):
        assert gamma.unique().tolist() == [pytest.approx(0.1)]
    table = block.attn.relative_position_bias_table
    assert table.shape == (732, 3) and table.abs().max() == 0
    rates = [round(block.drop_path.p, 4) for block in vit.blocks]
    assert rates == [round(0.1 * i / 11, 4) for i in range(12)]


def test_relative_position_rows_pair_by_pair():
    h, w = 3, 4
    index = model.relative_position_index(h, w)
    n = (2 * h - 1) * (2 * w - 1)
    for query, key in product(range(h * w), repeat=2):
        dr, dc = query // w - key // w, query % w - key % w
        assert index[1 + query, 1 + key] == (dr + h - 1) * (2 * w - 1) + dc + w - 1
    assert (index[0, 1:] == n).all() and (index[1:, 0] == n + 1).all()
    assert index[0, 0] == n + 2


def test_attention_is_softmax_of_scaled_products_plus_position_bias():
    attention = model.Attention(12, 3, (2, 2)).double()
    for p in attention.parameters():
        nn.init.normal_(p)
    x = torch.randn(1, 5, 12, dtype=torch.double)
    weight = attention.qkv.weight.view(3, 3, 4, 12)          # (qkv, head, channel, in)
    table = attention.relative_position_bias_table
    index = attention.relative_position_index
    out = []
    for head in range(3):
        q = x[0] @ weight[0, head].T + attention.q_bias.view(3, 4)[head]
        k = x[0] @ weight[1, head].T                         # no bias
        v = x[0] @ weight[2, head].T + attention.v_bias.view(3, 4)[head]
        bias = torch.zeros(5, 5, dtype=torch.double)
        for i, j in product(range(5), range(5)):
            bias[i, j] = table[index[i, j], head]
        out.append(torch.softmax(q @ k.T / math.sqrt(4) + bias, -1) @ v)
    close(attention(x)[0], attention.proj(torch.cat(out, 1)))


def test_a_resnet_with_the_small_stem_is_torchvisions_but_for_its_first_convolution():
    encoder = build_encoder("resnet18", 32, stem="small")
    sizes = [tuple(shape[2:]) for shape in encoder.shapes((32, 32))]
    assert sizes == [(32, 32), (32, 32), (32, 32), (16, 16), (8, 8), (4, 4)]
    plain, state = tv.resnet18(), encoder.backbone.state_dict()
    assert state.pop("conv1.weight").shape == (64, 3, 3, 3)
    found = plain.load_state_dict(state, strict=False)
    assert found.missing_keys == ["conv1.weight", "fc.weight", "fc.bias"]
    assert not found.unexpected_keys
    # as documented
    plain.conv1 = encoder.backbone.conv1
    plain.maxpool = nn.Identity()
    plain.fc = nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    close(plain.eval()(images), encoder.eval()(images).mean((2, 3)))


@pytest.mark.parametrize("arch, plain, head", [
    ("resnet18", tv.resnet18, "fc"),
    ("resnet50", tv.resnet50, "fc"),
    ("convnext_tiny", tv.convnext_tiny, "classifier.2"),
    ("swin_tiny", tv.swin_t, "head"),
])
def test_backbone_weights_load_into_plain_torchvision_with_only_the_head_missing(
    arch, plain, head, tmp_path
):
    encoder = randomised(build_encoder(arch))
    torch.save(encoder.backbone.state_dict(), tmp_path / "backbone.pt")
    net = plain().eval()
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    found = net.load_state_dict(state, strict=False)
    assert found.missing_keys == [f"{head}.weight", f"{head}.bias"]
    assert not found.unexpected_keys

    x = torch.randn(1, 3, 64, 64)
    z = encoder(x)
    z = z.mean((1, 2)) if encoder.layout == "nhwc" else z.mean((2, 3))
    pooled = []                                              # what torchvision's own head is given

    def note_input(module, inputs, output):
        pooled.append(inputs[0])

    net.get_submodule(head).register_forward_hook(note_input)
    net(x)
    if arch == "convnext_tiny":
        # torchvision averages before the final norm; our map has the norm in it
        pooled = [net.classifier[0](net.features(x)).mean((2, 3))]
    close(z, pooled[0])


# ---- loss: pixels ----

def test_focal_l1_is_its_formula():
    d = torch.linspace(-4, 4, 33)
    by_hand = [abs(v) * (2 / (1 + math.exp(-0.2 * abs(v))) - 1) for v in d.tolist()]
    close(loss.focal_l1(d), torch.tensor(by_hand))


@pytest.mark.parametrize("focal", [True, False])
def test_the_spatial_loss_is_the_mean_error_of_hidden_pixels(focal):
    pred, image = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12)
    mask = masking.random_mask(2, (2, 3), 0.6)
    error = 0.0
    for b, r, c in mask.nonzero().tolist():
        d = (pred - image)[b, :, 4 * r:4 * r + 4, 4 * c:4 * c + 4].double().abs()
        error += (d * (2 * torch.sigmoid(0.2 * d) - 1) if focal else d).sum().item()
    expected = error / (mask.sum().item() * 16 * 3)          # 16 pixels of 3 channels each
    got = loss.spatial_loss(pred, image, pixels(mask, image), focal)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_visible_pixels_get_no_gradient_from_the_pixel_loss_and_a_share_from_the_fourier_loss():
    image, mask = torch.randn(2, 3, 8, 8), checkerboard(2)
    visible = ~masking.resize_mask(mask, (8, 8)).expand_as(image)

    def gradient(fn, **options):
        generator = torch.Generator().manual_seed(1)
        pred = torch.randn(2, 3, 8, 8, generator=generator).requires_grad_()
        return torch.autograd.grad(fn(pred, image, pixels(mask, image), **options), pred)[0]

    assert gradient(loss.spatial_loss)[visible].abs().max() == 0
    assert gradient(loss.spatial_loss)[~visible].abs().min() > 0
    assert gradient(loss.fourier_loss, visible_weight=0.0)[visible].abs().max() == 0
    full = gradient(loss.fourier_loss, visible_weight=1.0)
    share = gradient(loss.fourier_loss, visible_weight=0.25, stand_in="prediction")
    # the value is the same, as the constant at visible pixels is the prediction
    close(share[visible], 0.25 * full[visible])


# ---- loss: frequencies ----

def dft(x):
    """Orthonormal 2-D Fourier transform of a real (H, W) array, as the sum that defines it.

    Returns (cosine part, sine part).
    """
    H, W = x.shape
    real, imag = np.zeros((H, W)), np.zeros((H, W))
    for u, v, y, z in product(range(H), range(W), range(H), range(W)):
        angle = 2 * math.pi * (u * y / H + v * z / W)
        real[u, v] += x[y, z] * math.cos(angle)
        imag[u, v] -= x[y, z] * math.sin(angle)
    return real / math.sqrt(H * W), imag / math.sqrt(H * W)


@pytest.mark.parametrize("spectrum, stand_in, focal, width", [
    ("batch", "mixed", True, 6),
    ("image", "prediction", True, 6),
    ("image", "mixed", True, 5),
    ("batch", "prediction", True, 5),
    ("image", "mixed", False, 5),
    ("batch", "prediction", False, 6),
])
def test_the_fourier_loss_is_the_sum_of_sines_and_cosines_that_defines_it(
    spectrum, stand_in, focal, width
):
    pred, image = torch.randn(2, 2, 4, width), torch.randn(2, 2, 4, width)
    mask, u = torch.tensor([[[True], [False]], [[False], [True]]]), 0.125
    P, X = pred.double().numpy(), image.double().numpy()
    hidden = np.zeros_like(P)
    hidden[0, :, :2], hidden[1, :, 2:] = 1, 1
    stand = {"prediction": P, "mixed": (P + X) / 2}[stand_in]
    w = hidden + (1 - hidden) * u
    p = P * w + stand * (1 - w)
    spectra = np.zeros((2, 2, 2, 4, width))                  # (B, C, cosine and sine, H, W)
    for b, c in product(range(2), range(2)):
        spectra[b, c] = np.array(dft(p[b, c])) - np.array(dft(X[b, c]))
    if spectrum == "batch":
        spectra = spectra.mean(0, keepdims=True)             # the spectra are averaged, as released
    modulus = np.sqrt(spectra[:, :, 0] ** 2 + spectra[:, :, 1] ** 2)         # (B or 1, C, H, W)
    if focal:
        weight = np.log(1 + modulus)
        weight = weight / weight.max(axis=None if spectrum == "batch" else (2, 3), keepdims=True)
        expected = (weight * modulus**2).mean()
    else:
        # the pixel criterion again, on the full plane
        expected = (modulus * (2 / (1 + np.exp(-0.2 * modulus)) - 1)).mean()
    got = loss.fourier_loss(pred, image, pixels(mask, image), stand_in=stand_in, visible_weight=u,
                            spectrum=spectrum, focal=focal)
    assert got.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (15, 21), (8, 13)])
def test_the_weight_of_a_frequency_has_no_gradient(size):
    pred, image = torch.randn(5, 3, *size, requires_grad=True), torch.randn(5, 3, *size)
    D = (torch.fft.fft2(pred, norm="ortho") - torch.fft.fft2(image, norm="ortho")).mean(0)
    weight = torch.log(1 + D.abs()).detach()
    expected = (weight / weight.max() * D.abs() ** 2).mean()
    got = loss.fourier_loss(pred, image, torch.ones(5, 1, *size, dtype=torch.bool))
    close(torch.autograd.grad(got, pred)[0], torch.autograd.grad(expected, pred)[0])


@pytest.mark.parametrize("spectrum", loss.SPECTRA)
def test_parseval_with_weight_one_the_fourier_loss_is_the_pixel_mse(spectrum):
    """An error in one pixel has the same modulus at every frequency, so that every weight is 1."""
    image, d = torch.randn(3, 3, 14, 9), torch.zeros(3, 3, 14, 9)
    d[:, :, 5, 2] = 0.7
    hidden = torch.ones(3, 1, 14, 9, dtype=torch.bool)
    got = loss.fourier_loss(image + d, image, hidden, spectrum=spectrum)
    close(got, d.square().mean(), atol=1e-6, rtol=1e-4)


def test_the_batch_spectrum_sees_only_the_mean_residual():
    """A trait of the released code: errors of different images cancel, and what is left falls
    as 1/B."""
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


# ---- loss: the total ----

@pytest.mark.parametrize("spectrum, focal", [*product(loss.SPECTRA, (True, False))])
def test_a_perfect_prediction_costs_nothing_and_its_gradient_is_zero_not_nan(spectrum, focal):
    image = torch.randn(2, 3, 8, 8)
    pred = image.clone().requires_grad_()
    hidden = pixels(checkerboard(2), image)
    total, parts = loss.a2mim_loss(pred, image, hidden, spectrum=spectrum, focal_fourier=focal)
    total.backward()
    assert total == 0 and parts["fourier"] == 0
    assert pred.grad.abs().max() == 0


def test_the_total_is_spatial_plus_lambda_fourier_and_lambda_zero_leaves_the_transform_out():
    pred, image, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), checkerboard(2)
    total, parts = loss.a2mim_loss(pred, image, pixels(mask, image), fourier_weight=0.5)
    close(total, parts["spatial"] + 0.5 * parts["fourier"])
    total, parts = loss.a2mim_loss(pred, image, pixels(mask, image), fourier_weight=0)
    assert list(parts) == ["spatial"] and total == parts["spatial"]


def test_the_loss_is_float32_inside_autocast():
    pred, image = (torch.randn(2, 3, 8, 8).bfloat16() for _ in range(2))
    hidden = pixels(checkerboard(2), image)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = loss.a2mim_loss(pred, image, hidden)
    assert inside.dtype == torch.float32
    close(inside, loss.a2mim_loss(pred.float(), image.float(), hidden)[0])


@pytest.mark.parametrize("pixel_loss, blur, error, verdict", [
    (0.0600, 0.02, 0.0001, "not clearly better than the mean colour: it has learned nothing yet"),
    (0.0576, 0.07, 0.0001, "not clearly better than the mean colour: it has learned nothing yet"),
    (0.0564, 0.07, 0.0001, "clearly better than a blur"),    # 0.94 of the mean colour's error
    (0.0300, 0.02, 0.0001, "worse than a blur: it does not reconstruct objects yet"),
    (0.0184, 0.02, 0.0009, "level with a blur"),             # 0.92 +/- 0.09 of the blur's
    (0.0216, 0.02, 0.0009, "level with a blur"),
    (0.0100, 0.02, 0.0060, "level with a blur"),             # half the error, with a large scatter
    (0.0100, 0.02, math.inf, "level with a blur"),           # one image
    (0.0184, 0.02, 0.0007, "better than a blur"),
    (0.0171, 0.02, 0.0001, "better than a blur"),
    (math.nan, 0.02, 0.0001, "not clearly better than the mean colour: it has learned nothing yet"),
    (0.0169, 0.02, 0.0001, "clearly better than a blur"),
])
def test_the_verdict_says_better_only_beyond_the_scatter(pixel_loss, blur, error, verdict):
    said, is_better = loss.skill(pixel_loss, 0.06, blur, error)
    assert is_better == (verdict in ("better than a blur", "clearly better than a blur"))
    assert said.startswith(f"{pixel_loss / 0.06:.2f} of the mean colour's error")
    assert said.endswith(f"of a blur's: {verdict}")
    scatter = f" +/- {2 * error / blur:.2f}" if error < math.inf else ""     # one image has none
    assert f", {pixel_loss / blur:.2f}{scatter} of a blur's" in said


# ---- data: drawn shapes ----

def test_shapes_come_from_seed_and_index_and_every_class_is_equally_common():
    train = data.Shapes("train", (64, 64))
    again = data.Shapes("train", (64, 64))
    val = data.Shapes("val", (64, 64))
    other_seed = data.Shapes("train", (64, 64), seed=1)
    image = train.read(17)
    assert torch.equal(image, again.read(17))
    assert not torch.equal(image, val.read(17))
    assert not torch.equal(image, other_seed.read(17))
    assert np.bincount(train.labels).tolist() == [1000] * 10
    assert np.bincount(val.labels).tolist() == [200] * 10
    assert train.read(3).shape == (3, 64, 64)
    assert data.Shapes("val", (48, 80)).read(0).shape == (3, 48, 80)


def test_shapes_are_not_told_apart_by_colour():
    """A nearest-centroid classifier on the mean and spread of colours stays near chance, 10 %."""
    source = data.Shapes("train", (48, 48))
    features = []
    for i in range(1200):
        x = source.read(i).float()
        features.append(torch.cat([x.mean((1, 2)), x.std((1, 2))]))
    features = torch.stack(features)
    labels = torch.from_numpy(source.labels[:1200])
    centroids = torch.stack([features[:800][labels[:800] == c].mean(0) for c in range(10)])
    accuracy = (torch.cdist(features[800:], centroids).argmin(1) == labels[800:]).float().mean()
    assert accuracy < 0.2


# ---- data: crops ----

def test_normalise_is_to_tensor_then_normalize():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    close(data.normalise(images), reference(images))
    close(data.denormalise(data.normalise(images)) * 255, images.float())


def test_crop_and_flip_is_torchvisions_crop_then_its_flip():
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    settings = SimpleNamespace(image_size=48, crop_min=0.2, randaug=0, jitter=0)
    for ours, mode in (                                      # the modes as released
        (data.CropAndFlip((48, 48), 0.2), InterpolationMode.BILINEAR),
        (data.augment(settings), InterpolationMode.BICUBIC),
    ):
        crop = v2.RandomResizedCrop((48, 48), (0.2, 1.0), interpolation=mode, antialias=True)
        theirs = v2.Compose([crop, v2.RandomHorizontalFlip()])
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


@pytest.mark.parametrize("size, crop", [
    ((48, 64), 0.875),
    ((64, 48), 0.95),
    ((32, 96), 1.0),
    ((40, 40), 0.875),
])
def test_the_test_crop_is_the_centre_of_an_image_that_covers_it_and_never_padded(size, crop):
    transform = data.eval_transform(size, crop)
    for h, w in product((31, 60, 100), (37, 90, 233)):
        whole = transform(ramps(h, w))
        assert whole.shape == (2, *size)
        down, across = whole[0].mean(1), whole[1].mean(0)    # the ramps
        ends = (down[-1] - down[0], across[-1] - across[0])
        # the share of the source image that one pixel covers, down and across
        step = [end.item() / (side - 1) for end, side in zip(ends, size)]
        source_pixels = [share * side for share, side in zip(step, (h, w))]
        assert source_pixels[0] == pytest.approx(source_pixels[1], rel=0.05)         # not stretched
        shown = [share * side for share, side in zip(step, size)]
        assert max(shown) == pytest.approx(crop, abs=0.02)   # as much as fits, and no more
        close(whole.mean((1, 2)), torch.full((2,), 0.5), atol=0.03, rtol=0)  # of the middle
        white = transform(torch.full((3, h, w), 255, dtype=torch.uint8))
        assert (white == 255).all()                          # padding would be black
        if size[0] == size[1]:                               # the released rule, by torchvision
            image = torch.randint(256, (3, h, w), dtype=torch.uint8)
            side = round(size[0] / crop)
            resized = tvf.resize(image, side, tvf.InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(transform(image), tvf.center_crop(resized, size))


def test_a_random_crop_of_another_shape_stretches_by_a_third_at_most_either_way():
    ratios = []
    transform = data.CropAndFlip((32, 64), 0.3)
    for seed in range(60):
        torch.manual_seed(seed)
        part = transform(ramps(100, 200))
        # how many source pixels 16 pixels cover
        down = 100 * (part[0, 24] - part[0, 8]).mean().abs()
        across = 200 * (part[1, :, 48] - part[1, :, 32]).mean().abs()
        ratios.append((across / down).item())
    assert 0.72 < min(ratios) < 0.85 and 1.18 < max(ratios) < 1.39


# ---- data: which images, in which order ----

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
    assert torch.equal(torch.get_rng_state(), state)         # the caller's generator is untouched


def test_processes_and_accumulation_cut_the_same_steps():
    def make(batch, accum, world, rank, start=0):
        sampler = data.ResumableBatchSampler(50, batch, accum, world, rank, seed=3, start=start,
                                             stop=9)
        return flat(sampler)

    whole = make(12, 1, 1, 0)                                # 4 steps an epoch
    assert len(whole) == 9
    epochs = [epoch for batch in whole for epoch, _ in batch]
    assert epochs == [0] * 48 + [1] * 48 + [2] * 12
    first, second = ([i for batch in whole[k:k + 4] for _, i in batch] for k in (0, 4))
    assert len(set(first)) == 48                             # no image twice in an epoch
    assert first != sorted(first) and first != second        # shuffled, differently in each epoch
    assert [a + b for a, b in zip(make(6, 1, 2, 0), make(6, 1, 2, 1))] == whole
    halves = make(6, 2, 1, 0)
    assert [halves[i] + halves[i + 1] for i in range(0, 18, 2)] == whole
    assert make(12, 1, 1, 0, start=5) == whole[5:]           # resuming is starting later
    with pytest.raises(ValueError, match="there are 50 images to train on, and one step takes 64"):
        flat(data.ResumableBatchSampler(50, 32, 1, 2, 0, 0, 0, 1))


def test_held_out_images_are_never_trained_on_and_their_number_has_bounds(tmp_path):
    for folder, count in (("flat", 100), ("many", 10_000), ("cut/train", 40), ("cut/val", 30)):
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
        ("many", 0.5, 8000, 2000),
    ):
        folder = tmp_path / given if given != "shapes" else given
        asked = pretrain.asked_for(pretrain.parse(["--data", str(folder), "--val", str(share)]))
        source, others = pretrain.hold_out(pretrain.open_source(asked), asked)
        assert len(source) == train, given
        assert (len(others) if others else 0) == held, given
        if others:
            trained_on, held_out = ({s.name(i) for i in range(len(s))} for s in (source, others))
            if given != "shapes":
                assert not trained_on & held_out
            if given == "cut":
                assert all("/val/" in name for name in held_out)
    names = []
    for seed in (0, 1):
        asked = {**asked, "data": str(tmp_path / "flat"), "val": 0.2, "seed": seed}
        _, others = pretrain.hold_out(pretrain.open_source(asked), asked)
        names.append({others.name(i) for i in range(len(others))})
    assert names[0] != names[1]                              # chosen by the seed


# ---- pretrain: the released recipes ----

OF_CNNS = dict(image_size=224, crop_min=0.8, token="gamma", focal_pixels=True, epochs=300,
               token_lr=0.1, schedule="cosine", clip_grad=0, peak_lr=1.2e-3)
OF_TRANSFORMERS = dict(image_size=224, crop_min=0.67, token="add", focal_pixels=False, epochs=800,
                       token_lr=1, schedule="step", clip_grad=5, peak_lr=4e-4, visible_weight=0)


@pytest.mark.parametrize("arch, expected", [
    ("resnet50", dict(OF_CNNS, fourier_weight=0.5, visible_weight=1e-3)),
    ("resnet101", dict(OF_CNNS, fourier_weight=0.1, visible_weight=1e-3, fourier_focal=False,
                       spectrum="image")),
    ("resnet152", dict(OF_CNNS, fourier_weight=0, visible_weight=1e-3)),
    ("resnet200", dict(OF_CNNS, fourier_weight=0, visible_weight=1e-3)),
    ("convnext_tiny", dict(OF_CNNS, fourier_weight=0, visible_weight=0)),
    ("vit_base", dict(OF_TRANSFORMERS, fourier_weight=0.1)),
    ("swin_tiny", dict(OF_TRANSFORMERS, fourier_weight=0.5, image_size=192)),
])
def test_the_released_recipes_on_eight_gpus_with_256_images_each(arch, expected):
    of_all = dict(global_batch=2048, mask_ratio=0.6, mask_size=32, fill="mean", weight_decay=0.05,
                  min_lr=1e-5, warmup_epochs=10, stand_in="mixed", fourier_focal=True,
                  spectrum="batch")
    settings = resolved(pretrain, "--data", "x", "--arch", arch, size=8, local_size=8, on_gpu=True)
    assert_settings(settings, **{**of_all, **expected})
    assert checkpointer.steps_per_epoch(1_281_167, 2048) == 625              # ImageNet


def test_simmim_replaces_the_token_fills_with_zero_and_has_plain_l1_on_every_backbone():
    simmim = resolved(pretrain, "--data", "x", "--baseline", "simmim", "--lr", "1")
    assert_settings(simmim, token="replace", token_stage=1, fill="zero", fourier_weight=0, lr=1)
    for arch in ("resnet50", "convnext_tiny", "vit_base", "swin_tiny"):
        simmim = resolved(pretrain, "--data", "x", "--baseline", "simmim", "--arch", arch)
        assert not simmim.focal_pixels


def test_the_released_deits_have_192_px_and_the_small_one_a_token_in_the_middle():
    for arch, stage in (("deit_small", 8), ("deit_tiny", 1)):
        deit = resolved(pretrain, "--data", "x", "--arch", arch)
        assert_settings(deit, image_size=192, lr=2e-4, min_lr=1e-5, schedule="cosine", epochs=800,
                        clip_grad=5.0, crop_min=0.67)
        encoder = build_encoder(arch, 192)
        net = A2MIM(encoder, 192, deit.mask_size, deit.token_stage, deit.token)
        assert net.token_stage == stage
        assert net.grid == (6, 6)                            # on 12 x 12 patches
        assert encoder.stages[8] == ["blocks.7"]             # the eighth block


def test_cosine_schedule_at_the_recipes_numbers():
    """ResNet, 300 epochs, 10 of warm-up, base 1.2e-3, floor 1e-5; epochs stand for iterations."""
    def lr(t, base=1.2e-3):
        return optim.lr_at(t, 300, 10, base, 1e-5, "cosine")

    assert lr(0) == 0
    assert lr(10) == pytest.approx(1.2e-3)
    assert lr(300) == pytest.approx(1e-5)
    assert lr(155) == pytest.approx((1.2e-3 + 1e-5) / 2)
    cosine = 1e-5 + 1.19e-3 * (1 + math.cos(math.pi * -5 / 290)) / 2
    assert lr(5) == pytest.approx(0.5 * cosine)              # the ramp times the cosine
    # a second route, after warm-up
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 290, eta_min=1e-5)
    for t in range(10, 300):
        assert lr(t) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    # the floor is absolute for the mask token's group too, and never raises a small lr
    assert lr(300, 1.2e-4) == pytest.approx(1e-5)
    assert all(lr(t, 4e-6) <= 4e-6 for t in range(301))


def test_a_warm_up_of_most_of_the_run_rises_all_the_time():
    lr = [optim.lr_at(t, 25, 20, 1.0, 0.0, "cosine") for t in range(26)]
    assert lr[:21] == pytest.approx([t / 20 for t in range(21)])
    assert lr[23] == pytest.approx((1 + math.cos(math.pi * 3 / 5)) / 2) and lr[25] < 1e-9


def test_step_schedule_of_the_vit_recipe():
    lr = [optim.lr_at(t, 800, 10, 4e-4, 1e-5, "step") for t in (0, 5, 10, 699, 700, 799)]
    assert lr == pytest.approx([0, 2e-4, 4e-4, 4e-4, 4e-5, 4e-5])


NOT_DECAYED = ("mask_token.token", "mask_token.gamma", "layer_scale", "gamma_1", "gamma_2",
               "pos_embed", "cls_token")


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "deit_tiny", "swin_tiny"])
def test_what_decays_and_what_does_not(arch):
    net = A2MIM(build_encoder(arch, 64), 64)
    names = {p: n for n, p in net.named_parameters()}
    norms = set()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            norms.update(module.parameters())
    seen = set()
    for group in optim.parameter_groups(net, 0.05, 0.1):
        for p in group["params"]:
            name = names[p]
            seen.add(p)
            free = p in norms or "bias" in name or name.endswith(NOT_DECAYED)
            assert group["weight_decay"] == (0 if free else 0.05), name
            of_token = name in ("mask_token.token", "mask_token.gamma")
            assert group["scale"] == (0.1 if of_token else 1.0), name
    assert seen == set(names)


CNNS = ["resnet18", "convnext_tiny", "efficientnet_b0"]


@pytest.mark.parametrize("arch", [*CNNS, "deit_tiny", "swin_tiny"])
@pytest.mark.parametrize("images, batch", [(9_469, 64), (9_469, 8), (1_281_167, 2048)])
def test_simmim_and_a2mim_differ_in_at_most_five_settings_and_on_imagenet_in_simmims_own_recipe(
    arch, images, batch
):
    size = 64 if images < 100_000 else 192
    both = []
    for more in ([], ["--baseline", "simmim"]):
        flags = ["--data", "x", "--arch", arch, "--image-size", size, "--batch-size", batch, *more]
        both.append(vars(resolved(pretrain, *flags, images=images)))
    a2mim, simmim = both
    different = {name for name in a2mim if a2mim[name] != simmim[name]}
    different -= {"typed", "baseline"}
    expected = {"token", "fill"}
    if a2mim["token_stage"] != 1:
        expected.add("token_stage")
    expected |= {name for name in ("focal_pixels", "fourier_weight") if a2mim[name]}
    assert (simmim["token"], simmim["fill"], simmim["token_stage"]) == ("replace", "zero", 1)
    assert not simmim["fourier_weight"] and not simmim["focal_pixels"]
    if images < 100_000 or arch not in CNNS:
        assert different == expected
    else:                                                    # the released SimMIM of ResNet-50
        assert different == expected | {"lr", "peak_lr", "token_lr", "crop_min"}
        assert (simmim["lr"], simmim["token_lr"], simmim["crop_min"]) == (2e-4, 1.0, 0.67)
        assert (a2mim["lr"], a2mim["token_lr"], a2mim["crop_min"]) == (3e-4, 0.1, 0.8)
    if images < 100_000:
        assert simmim["peak_lr"] == pytest.approx(3e-3 if arch == "resnet18" else 1e-3)


# ---- pretrain: the small recipe ----

def test_few_images_get_the_small_recipe_and_its_lr_ignores_the_batch(
    few_images, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrain, "SMALL_STEPS", 2)

    def made_by(name, flags):
        common = "--data shapes --arch resnet18 --image-size 96"
        return settings_of(capsys, tmp_path / name, *common.split(), *flags.split())

    peaks = []
    for batch in (4, 8):
        made, said = made_by(f"{batch}", f"--batch-size {batch}")
        assert made["recipe"] == "small"
        assert "recipe small (small: under 100,000 images); writing" in said
        assert made["epochs"] * (32 // batch) == 2           # counted in steps
        peaks.append(made["lr"] * batch / 512)
    assert peaks == pytest.approx([3e-3, 3e-3])

    typed = "--batch-size 8 --lr 0.1 --mask-size 32 --spectrum batch --epochs 0.25"
    made, _ = made_by("typed", typed)
    assert made["recipe"] == "small"
    assert made["lr"] == 0.1 and made["mask_size"] == 32
    assert made["spectrum"] == "batch" and made["epochs"] == 0.25
    assert made["token_stage"] == 4                 # as deep as half a typed mask unit allows

    released = resolved(pretrain, "--data", "x", "--arch", "resnet18")
    made, _ = made_by("released", "--recipe imagenet --batch-size 8 --epochs 0.25")
    for name in ("lr", "mask_size", "token_stage", "spectrum", "min_lr", "token_lr"):
        assert made[name] == getattr(released, name), name

    made, _ = made_by("simmim", "--baseline simmim --batch-size 8")
    assert made["token_stage"] == 1 and made["token"] == "replace"
    assert made["mask_size"] == 16                           # the mask units of A2MIM


def test_a_step_of_the_small_recipe_has_64_images_over_all_processes():
    flags = "--data x --arch resnet18 --image-size 64 --accum 2".split()
    for processes, each in ((1, 32), (4, 8)):
        made = resolved(pretrain, *flags, images=9_469, size=processes)
        assert (made.batch_size, made.global_batch) == (each, 64)


def test_the_command_of_the_readme_has_the_settings_of_its_table():
    """On Imagenette, against all flags typed."""
    command = ("python pretrain.py --data /path/to/imagenette96 --arch resnet18 --image-size 64 "
               "--epochs 60")
    assert f"`{command}`" in (HERE / "README.md").read_text()
    flags = command.split()[2:]
    common = ("--recipe small --batch-size 64 --lr 0.024 --min-lr 3e-5 --token-lr 1 "
              "--crop-min 0.8 --mask-size 8 --spectrum image --schedule cosine --warmup-epochs 6")
    for baseline, typed in (("", f"{common} --token-stage 2"), ("--baseline simmim", common)):
        flags_of = [*flags, *baseline.split()]
        short = vars(resolved(pretrain, *flags_of, images=9_469))
        long = vars(resolved(pretrain, *flags_of, *typed.split(), images=9_469))
        assert {name for name in short if short[name] != long[name]} == {"typed"}


@pytest.mark.parametrize("arch, side", [("resnet18", 240), ("resnet18", 48), ("swin_tiny", 72),
                                        ("convnext_tiny", 72), ("mobilenet_v3_small", 240)])
def test_sides_that_the_features_do_not_tile_are_refused(arch, side, few_images, capsys, tmp_path):
    """240 / 2 / 2 / 2 / 2 = 15, and a half of it is rounded up to 8."""
    stem = ["--stem", "imagenet"] if side == 48 else []
    code, said = complaint(capsys, "--data", "shapes", "--arch", arch, "--image-size", side, *stem,
                           "--recipe", "small", "--out", tmp_path / "run")
    assert code == 2
    assert f"--image-size {side} px: both sides must be multiples of 32, the stride of" in said


def test_an_encoder_without_convolutions_takes_images_of_three_channels():
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, 32)

        def forward(self, images):                           # (B, 3, H, W) -> (B, N, 32)
            return self.linear(nn.functional.unfold(images, 8, stride=8).transpose(1, 2))

    net = A2MIM([Embed(), nn.Linear(32, 32)], image_size=32, mask_size=8)
    mask = masking.random_mask(2, net.grid, 0.5)
    assert net(torch.rand(2, 3, 32, 32), mask).shape == (2, 3, 32, 32)


def test_the_floor_of_the_cosine_follows_a_typed_lr_of_the_small_recipe():
    for lr in ("0.024", "3e-4"):
        flags = ["--data", "x", "--arch", "resnet18", "--image-size", "64", "--lr", lr]
        settings = resolved(pretrain, *flags, images=9469)
        assert settings.min_lr == pytest.approx(settings.peak_lr / 100)


def test_a_short_run_on_few_images_says_how_long_a_useful_one_takes_here(capsys):
    flags = ["--data", "x", *"--arch shufflenet_v2_x0_5 --image-size 32 --batch-size 8".split()]
    settings = resolved(pretrain, *flags, images=600)
    assert settings.epochs * 75 == pytest.approx(1500)       # 20 epochs of 75 steps
    plan = pretrain.StepPlan.plan(settings, SimpleNamespace(size=1), 600, None)
    world = SimpleNamespace(print0=print)
    for step in range(30):
        # 20 steps take 40 s: 1,500 take 50 minutes
        pretrain.print_length(step, settings, world, plan, began=time.monotonic() - 40)
    said = capsys.readouterr().out
    assert said.count("1500 steps take about 50 minutes here: a first look") == 1
    assert "60 epochs, about 150 minutes here: --epochs 60" in said          # 4,500 steps
    settings = resolved(pretrain, *flags, "--epochs", 30, images=600)
    pretrain.print_length(19, settings, world, plan, 0)
    assert not capsys.readouterr().out                       # a length that was typed is not judged


@pytest.mark.parametrize("per_epoch, images, recipe", [
    (499, 20_000, "small"),
    (12_499, 99_999, "small"),
    (500, 100_000, "imagenet"),
    (300, 1_281_167, "imagenet"),
])
def test_the_number_of_images_alone_decides_whether_a_run_is_small(per_epoch, images, recipe):
    batch = images // per_epoch
    settings = resolved(pretrain, "--data", "x", "--arch", "resnet18", "--batch-size", batch,
                        images=images)
    assert settings.recipe == recipe


@pytest.mark.parametrize("size, mask_size", [
    ((64, 64), 8),
    ((96, 96), 16),
    ((128, 128), 16),
    ((192, 192), 32),
    ((224, 224), 32),
    ((96, 160), 16),
])
@pytest.mark.parametrize("arch", [*CNNS, "deit_tiny", "swin_tiny"])
def test_mask_units_and_token_of_the_small_recipe_fit_the_image(arch, size, mask_size):
    encoder = build_encoder(arch, size)
    unit = 16 if arch == "deit_tiny" else 8
    got, stage = model.choose_mask_size_and_stage(encoder, size, unit=unit)
    assert got == max(mask_size, unit)
    A2MIM(encoder, image_size=size, mask_size=got, token_stage=stage)        # raises if they do not
    if arch in CNNS:
        # features there are at most half a mask unit wide, those of the next stage are wider
        strides = [size[0] / shape[2] for shape in encoder.shapes(size)]
        assert strides[stage] <= got / 2
        assert all(stride > got / 2 for stride in strides[stage + 1:-1])
    else:
        assert stage == encoder.token_stage


@pytest.mark.parametrize("arch, size, flags, units, stage", [
    ("resnet18", 32, "", 16, 4),                             # small stem: stride 4 before stage 4
    ("resnet18", 32, "--stem imagenet", 16, 2),              # stride 4 before stage 2, 8 before 3
    ("deit_tiny", 32, "", 64, 1),                            # patches and mask units of 4 px
    ("convnext_tiny", 32, "", 16, 1),
    ("resnet18", 64, "--recipe imagenet", 64, 2),            # 32 px would be 4 mask units
    ("vit_base", 64, "--recipe imagenet", 16, 1),
    ("resnet50", 96, "--recipe imagenet", 9, 4),             # 32 px: as released
])
def test_small_images_have_at_least_nine_mask_units(arch, size, flags, units, stage):
    settings = resolved(pretrain, "--data", "x", "--arch", arch, "--image-size", size,
                        *flags.split(), images=50_000)
    encoder = build_encoder(arch, size, patch_size=settings.patch_size, stem=settings.stem)
    net = A2MIM(encoder, size, settings.mask_size, settings.token_stage)
    assert (math.prod(net.grid), net.token_stage) == (units, stage)


# ---- pretrain: the training step and the loop ----

def test_two_halves_accumulate_to_one_batch_with_the_image_spectrum_but_not_with_the_batch_spectrum(
    few_images, tmp_path
):
    for spectrum in loss.SPECTRA:
        flags = ["--epochs", "1", "--fourier-weight", "1", "--spectrum", spectrum]
        log, whole = run(tmp_path / f"{spectrum}1", *flags)
        halves_flags = ["--batch-size", "4", "--accum", "2"]
        halves_log, halves = run(tmp_path / f"{spectrum}2", *flags, *halves_flags)
        fourier, fourier_halves = log[0]["fourier"], halves_log[0]["fourier"]
        if spectrum == "image":
            assert fourier_halves == pytest.approx(fourier, rel=1e-4)
            same_weights(whole, halves, atol=2e-5, rtol=1e-3)
        else:
            assert fourier_halves > 1.05 * fourier           # half the images, less cancelling


def test_each_setting_of_the_method_reaches_the_step(few_images, tmp_path):
    settings = ["", "--stand-in prediction", "--visible-weight 0.5", "--no-fourier-focal",
                "--focal-pixels", "--spectrum batch", "--fourier-weight 1", "--fill zero",
                "--token replace", "--mask-ratio 0.5", "--crop-min 0.2"]
    gradients = []
    for i, more in enumerate(settings):
        _, state = run(tmp_path / str(i), "--epochs", "0.25", *more.split())
        # the first moment of AdamW after a step: a tenth of the gradient
        moments = [moment["exp_avg"].norm() for moment in state["optimizer"]["state"].values()]
        gradients.append(torch.stack(moments).norm().item())
    assert len(set(gradients)) == len(settings)


def test_each_step_and_each_image_has_its_own_mask(few_images, tmp_path, monkeypatch):
    draw, drawn = pretrain.random_mask, []

    def noted(*given):
        drawn.append(draw(*given))
        return drawn[-1]

    monkeypatch.setattr(pretrain, "random_mask", noted)
    run(tmp_path / "run", "--epochs", "1")                   # 4 steps of 8 images
    masks = torch.cat([mask for mask in drawn if len(mask) == 8]).flatten(1)
    assert len(masks) == 32 and len(masks.unique(dim=0)) > 28


def test_the_tokens_own_learning_rate_and_the_largest_gradient_norm_act(few_images, tmp_path):
    _, still = run(tmp_path / "still", "--epochs", "1", "--lr", "0")
    _, fixed = run(tmp_path / "fixed", "--epochs", "1", "--token-lr", "0")
    token, decoder = "mask_token.token", "decoder.0.weight"
    assert torch.equal(fixed["model"][token], still["model"][token])
    assert (fixed["model"][decoder] - still["model"][decoder]).abs().max() > 1e-5
    # AdamW divides by the gradient's size, but adds 1e-8 to it
    _, clipped = run(tmp_path / "clipped", "--epochs", "1", "--clip-grad", "1e-12",
                     "--weight-decay", "0")
    same_weights(still, clipped, atol=1e-6, rtol=0)
    # fp16's gradients are scaled up, and clipped at their true size; the first moment of AdamW is a
    # tenth of the gradient
    _, scaled = run(tmp_path / "fp16", "--epochs", "0.25", "--amp", "fp16", "--clip-grad", "0.001")
    moments = [moment["exp_avg"].norm() for moment in scaled["optimizer"]["state"].values()]
    assert torch.stack(moments).norm().item() == pytest.approx(1e-4, rel=0.01)


def test_bf16_stays_close_to_fp32(few_images, tmp_path):
    exact, _ = run(tmp_path / "off", "--epochs", "1")
    rough, _ = run(tmp_path / "bf16", "--epochs", "1", "--amp", "bf16")
    for a, b in zip(exact, rough):
        assert a != b and b["loss"] == pytest.approx(a["loss"], rel=0.02)


def test_the_loss_falls_and_every_output_is_there(few_images, tmp_path):
    out = tmp_path / "run"
    flags = ("--epochs 15.5 --sheets 3 --arch resnet18 --batch-size 16 --lr 0.1 --val 0.25 "
             "--save-every 20")
    log, _ = run(out, *flags.split())
    # 8 held-out images, 31 steps of 16: every second step costs a tenth of the training
    measured = [line["step"] for line in log if "held_out" in line]
    assert measured == [*range(2, 31, 2), 31]
    log = [line for line in log if "loss" in line]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert {p.name for p in out.iterdir()} == {
        ".lock", "args.json", "log.jsonl", "loss.png",
        "checkpoint.pt", "checkpoint-previous.pt", "backbone.pt",
        "reconstruction-000000.png", "reconstruction-000016.png", "reconstruction-000031.png",
    }
    # the curve that the run drew has the last line of the log in it
    pictures.save_curve(tmp_path / "again.png", out / "log.jsonl")
    assert (out / "loss.png").read_bytes() == (tmp_path / "again.png").read_bytes()

    first = np.asarray(Image.open(out / "reconstruction-000000.png"))
    last = np.asarray(Image.open(out / "reconstruction-000031.png"))
    width = last.shape[1] // 5                               # of one of the five columns
    assert np.array_equal(last[:, :2 * width], first[:, :2 * width])         # same images and masks
    assert not np.array_equal(last[:, 2 * width:3 * width], first[:, 2 * width:3 * width])
    image, _, reconstruction, pasted, _ = np.split(last[:, :5 * width], 5, axis=1)
    is_of_one = ((pasted == image) | (pasted == reconstruction)).all(2)
    assert is_of_one.mean() > 0.9                            # all but the titles
    assert json.loads((out / "args.json").read_text())["arch"] == "resnet18"
    backbone = torch.load(out / "backbone.pt", weights_only=True)
    found = tv.resnet18().load_state_dict(backbone, strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"]


def test_the_held_out_loss_is_that_of_each_image_and_so_are_the_two_baselines(
    few_images, tmp_path, capsys
):
    out = tmp_path / "run"
    # 8 of the 32 validation images. In training mode blocks would be dropped
    flags = [*TINY, "--val", "0.5", "--epochs", "1", "--drop-path", "0.5"]
    run(out, base=flags)
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    noted = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in noted] == [4]

    net = A2MIM(build_encoder("deit_tiny", 64, 0.0), 64, mask_size=16, token="add").eval()
    net.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    val, crop = data.Shapes("val", (64, 64)), data.eval_transform((64, 64))
    masks = pretrain.draw_masks(8, (4, 4), 0.6, torch.device("cpu"), 0, 1)
    asked = pretrain.asked_for(pretrain.parse(flags))
    _, others = pretrain.hold_out(pretrain.open_source(asked), asked)
    chosen = others.indices                                  # any 8 of the 32, but always the same
    errors = {"held_out": [], "mean_colour": [], "blur": []}                 # of each image
    for index, mask in zip(chosen, masks.split(1)):
        x = data.normalise(crop(val.read(int(index)))[None])                 # (1, 3, 64, 64)
        hidden = masking.resize_mask(mask, (64, 64))[0, 0]
        with torch.no_grad():
            reconstructions = {
                "held_out": net(x, mask),
                "mean_colour": x.mean((2, 3), keepdim=True).expand_as(x),
                "blur": masking.fill_hidden(x, mask, "blur"),
            }
        for name, reconstruction in reconstructions.items():
            error = (reconstruction - x)[0, :, hidden].abs().mean()          # a ViT: plain L1
            errors[name].append(error.item())
    mean = {name: statistics.mean(each) for name, each in errors.items()}
    assert {name: noted[-1][name] for name in mean} == pytest.approx(mean, rel=1e-4)

    differences = [a - b for a, b in zip(errors["held_out"], errors["blur"])]
    scatter = 2 * statistics.stdev(differences) / math.sqrt(8) / mean["blur"]
    of_mean = mean["held_out"] / mean["mean_colour"]
    of_blur = mean["held_out"] / mean["blur"]
    assert verdict_of(said)[:3] == pytest.approx((of_mean, of_blur, scatter), abs=0.0051)
    assert "hidden pixels of 8 held-out images" in said
    before = read_log(out)
    pretrain.main(["--data", "shapes", "--out", str(out), "--resume"])
    assert read_log(out) == before                           # nothing is measured twice


@pytest.mark.parametrize("per_epoch, epochs, batch, held_out, often", [
    (3, 8, 8, 189, 24),                                      # 189 images: once, at the end
    (625, 1, 16, 200, 62),                                   # the demo: a tenth of the run
    (150, 10, 32, 200, 150),                                 # every epoch
    (1, 1, 8, 2000, 1),
    (10, 3, 64, 100, 6),
])
def test_evaluations_cost_a_tenth_of_the_training(
    per_epoch, epochs, batch, held_out, often
):
    total = per_epoch * epochs
    steps = checkpointer.StepPlan(batch, batch, per_epoch, total, 0, 0)
    interval = pretrain.evaluation_interval(steps, held_out)
    assert interval == often
    evaluations = total // interval
    trained = 3 * total * batch                              # forward, and a backward of twice that
    assert evaluations == 1 or evaluations * held_out <= 0.1 * trained
