"""Facts about the analyses and the notebook.

    pytest extras/test_analyze.py
"""

import ast
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune
import pretrain
from engine.command import Distributed
from engine.shapes import Shapes
from extras import analyze, chart, inside, run_notebook
from extras.chart import Panel, bars, charts
from masking import fill_hidden
from model import A2MIM, Classifier, build_encoder

close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None,
                                      reason="matplotlib is missing")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- spectra of features ----

@pytest.mark.parametrize("side", [14, 7])
def test_a_circular_convolution_shifts_the_curve_by_the_log_of_its_transfer_function(side):
    z = torch.randn(2, 5, side, side, generator=generator())
    kernel = torch.rand(1, 1, 3, 3, generator=generator(1))
    padded = F.pad(z, (1, 1, 1, 1), mode="circular").flatten(0, 1)[:, None]
    blurred = F.conv2d(padded, kernel).view_as(z)
    expected = []
    for k in range(math.ceil(side / 2)):                     # H(k, k) by its definition
        transfer = 0.0
        for r, c in itertools.product((-1, 0, 1), repeat=2):
            wave = np.exp(2j * np.pi * k * (r + c) / side)
            transfer += wave * kernel[0, 0, r + 1, c + 1].item()
        expected.append(math.log(abs(transfer)))
    expected = torch.tensor(expected) - expected[0]
    shift = inside.log_amplitude(blurred) - inside.log_amplitude(z)
    close(shift, expected.float().expand(2, -1), atol=2e-4, rtol=0)


def test_white_noise_is_flat_but_for_its_real_zero_frequency():
    # |F|^2 / power is exponential where F is complex, and chi-squared of one degree where F is
    # real. The means of their logs differ by -gamma - (-gamma - ln 2) = ln 2, those of log |F| by
    # half of it.
    noise = torch.randn(4000, 10, 9, 9, generator=generator())
    curve = inside.log_amplitude(noise).mean(0)
    close(curve[1:], torch.full((4,), math.log(2) / 2), atol=0.03, rtol=0)
    assert curve[0] == 0


@pytest.mark.parametrize("arch, depths", [
    ("resnet18", 9),
    ("convnext_tiny", 19),
    ("swin_tiny", 25),
    ("deit_tiny", 25),
    ("swin_v2_t", 25),
    ("vgg11", None),
])
def test_every_depth_is_seen_as_the_net_computes_it(arch, depths):
    torch.manual_seed(0)
    encoder, x, seen = build_encoder(arch, 64).eval(), torch.randn(2, 3, 64, 64), {}
    with torch.no_grad(), inside.tapped(encoder, seen.__setitem__):
        z = encoder(x)
    assert depths in (None, len(seen))
    assert all(value.dim() == 4 and len(value) == 2 for value in seen.values())
    b, maps = encoder.backbone, list(seen.values())
    with torch.no_grad():
        if arch in ("resnet18", "vgg11"):
            close(maps[-1], z)
        elif arch == "convnext_tiny":
            close(b.classifier[0](maps[-1]), z)
        elif arch.startswith("swin"):
            # channels last; the last map comes before the final norm
            close(b.norm(maps[-1].permute(0, 2, 3, 1)), z)
            block, first = b.features[1][0], maps[0].permute(0, 2, 3, 1)
            if arch == "swin_v2_t":
                half = block.norm1(block.attn(first))
            else:
                half = block.attn(block.norm1(first))
            close(maps[1].permute(0, 2, 3, 1), first + half)
        else:
            tokens = maps[-1].flatten(2).transpose(1, 2)     # (B, 16, C), without the class token
            close(b.norm(tokens), z[:, 1:])
            tokens = b.embed_position(b.patch_embed(x))
            tokens = tokens + b.blocks[0].gamma_1 * b.blocks[0].attn(b.blocks[0].norm1(tokens))
            close(seen["blocks.0 attention"].flatten(2).transpose(1, 2), tokens[:, 1:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in b.modules())


# ---- interactions ----

ALL_PAIRS = list(itertools.combinations(range(9), 2))


def exact(v, patches: int, pairs) -> torch.Tensor:
    """Every I^(m)(i, j) over all contexts: (orders, pairs)."""
    count = math.comb(patches - 2, (patches - 2) // 2)
    rows = []
    for m in range(patches - 1):
        of = inside.interactions_of(v, patches, pairs, m, count, None)
        # nothing is estimated
        assert torch.equal(of[:, 0], of[:, 1]) and torch.equal(of[:, 0], of[:, 2])
        rows.append(of[:, 0])
    return torch.stack(rows)


def as_number(sets: torch.Tensor) -> torch.Tensor:
    """Sets of patches (B, patches) -> (B,): the binary number of each."""
    return (sets.long() << torch.arange(sets.shape[1])).sum(1)


class Game:
    """A function of sets of nine patches: a table of 512 values."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def __call__(self, sets: torch.Tensor) -> torch.Tensor:
        return self.table[as_number(sets)]


@pytest.mark.parametrize("game", ["random numbers", "resnet18"])
def test_interactions_of_all_orders_add_up_to_what_the_whole_says(game):
    """Efficiency: v(all) - v(none) = sum_i [v(i) - v(none)] + sum over ordered pairs and m of
    (n - 1 - m) / (n (n - 1)) I^(m)(i, j). Deng et al., ICLR 2022."""
    table = torch.randn(512, dtype=torch.double, generator=generator())
    if game == "resnet18":
        torch.manual_seed(0)
        net = Classifier("resnet18", build_encoder("resnet18", 48), 10).eval()
        image = torch.randn(1, 3, 48, 48)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.ones_(m.weight)
        # (512, 9): all sets of a 3 x 3 grid
        every = (torch.arange(512)[:, None] >> torch.arange(9)) % 2 == 1
        with torch.no_grad():
            images = fill_hidden(image.expand(512, -1, -1, -1), ~every.view(-1, 3, 3), "zero")
            z = net(images).double()
        table = inside.log_odds(z, torch.full((512,), 3))
        p = z.softmax(1)[:, 3]
        close(table, (p / (1 - p)).log())
    I = exact(Game(table), 9, ALL_PAIRS)                     # (8, 36)
    alone = sum(table[1 << i] - table[0] for i in range(9))
    weight = torch.tensor([(9 - 1 - m) / (9 * 8) for m in range(8)], dtype=torch.double)
    assert I.abs().max() > 1e-3
    close(table[-1] - table[0], alone + 2 * (weight @ I).sum(), atol=1e-10, rtol=1e-10)


def test_patches_that_only_add_do_not_interact_and_a_product_does_at_every_order():
    weight = torch.randn(9, dtype=torch.double, generator=generator())
    assert exact(lambda sets: sets.double() @ weight, 9, ALL_PAIRS).abs().max() < 1e-12
    I = exact(lambda sets: 2.5 * (sets[:, 1] & sets[:, 5]).double(), 9, ALL_PAIRS)
    expected = torch.tensor([2.5 * (pair == (1, 5)) for pair in ALL_PAIRS], dtype=torch.double)
    close(I, expected.expand(8, -1), atol=1e-12, rtol=0)


def test_two_halves_of_the_contexts_are_unbiased_where_the_released_strength_is_too_large():
    table = torch.randn(512, dtype=torch.double, generator=generator(5))
    v, rng, m = Game(table), np.random.default_rng(0), 3
    truth = exact(v, 9, ALL_PAIRS)[m]
    drawn = [inside.interactions_of(v, 9, ALL_PAIRS, m, 4, rng) for _ in range(300)]
    drawn = torch.stack(drawn)                               # (300, 36, 3)
    released, product = drawn[..., 0].abs().mean(1), (drawn[..., 1] * drawn[..., 2]).mean(1)
    assert abs(product.mean() - truth.square().mean()) < 4 * product.std() / 300**0.5
    assert released.mean() - truth.abs().mean() > 10 * released.std() / 300**0.5


def test_relative_strength_by_hand():
    rows = torch.tensor([                                    # (images, orders, 2)
        [[3.0, 4.0], [1.0, 16.0]],
        [[1.0, -2.0], [1.0, 2.0]],
    ])
    # the means over images are 2 and 1 of |I|, and 1 and 9 of the product, with roots 1 and 3
    close(inside.relative_strength(rows), torch.tensor([[4 / 3, 0.5], [2 / 3, 1.5]]))


def test_pairs_are_near_and_distinct_and_contexts_leave_them_out():
    rng = np.random.default_rng(0)
    pairs = inside.near_pairs((4, 5), 40, rng)
    assert len({frozenset(pair) for pair in pairs}) == 40
    assert all(i != j for i, j in pairs)
    assert all(max(abs(i // 5 - j // 5), abs(i % 5 - j % 5)) <= 2 for i, j in pairs)
    assert len(inside.near_pairs((2, 2), 100, rng)) == 6     # all there are
    sets = inside.contexts(9, (2, 6), 3, 30, rng)            # 30 are drawn, with 35 possible sets
    assert sets.shape == (30, 9)
    assert (sets.sum(1) == 3).all() and not sets[:, [2, 6]].any()
    sets = inside.contexts(9, (2, 6), 3, 35, rng)            # each of the 35 once
    assert len(set(as_number(sets).tolist())) == 35
    share = inside.contexts(20, (0, 1), 6, 3000, rng)[:, 2:].double().mean(0)
    close(share, torch.full((18,), 1 / 3).double(), atol=0.05, rtol=0)


# ---- occlusion ----

def test_patches_go_in_order_of_what_matters_and_as_many_as_asked():
    matter = torch.tensor([[0.0, 3.0, 0.0, 1.0, 2.0, 0.0]]).double()
    noise = torch.tensor([[0.5, 0.1, 0.2, 0.9, 0.3, 0.7]]).double()
    orders = inside.patch_orders(matter, noise)
    assert orders["random"].tolist() == [[1, 2, 4, 0, 5, 3]]
    assert orders["salient"].tolist() == [[1, 4, 3, 2, 0, 5]]
    assert orders["rest"].tolist() == [[2, 0, 5, 3, 4, 1]]
    for k in range(10):
        order = torch.randperm(49, generator=generator())[None]
        mask = inside.hidden_first(order, k * 49 // 10, (7, 7))
        hidden = mask.flatten().nonzero()[:, 0].tolist()
        assert mask.shape == (1, 7, 7) and hidden == sorted(order[0, :k * 49 // 10].tolist())


def test_shuffling_moves_whole_pieces():
    x, noise = torch.randn(3, 2, 9, 12), torch.rand(3, 9, generator=generator())
    y = inside.shuffled(x, 3, noise)
    corners = [(slice(r, r + 3), slice(c, c + 4)) for r in (0, 3, 6) for c in (0, 4, 8)]
    for b in range(3):
        order = noise[b].argsort().tolist()
        for corner, source in zip(corners, order):
            assert torch.equal(y[(b, slice(None), *corner)], x[(b, slice(None), *corners[source])])
    assert torch.equal(inside.shuffled(x, 1, noise[:, :1]), x)


def test_the_relevance_of_a_patch_to_a_linear_net_is_its_mean_weight():
    weight = torch.randn(2, 3, 8, 8, generator=generator())

    def net(x):
        return torch.einsum("bchw,kchw->bk", x, weight)

    labels = torch.tensor([0, 1, 1, 0, 1])
    found = inside.relevance(torch.randn(5, 3, 8, 8), labels, (2, 2), net)
    blocks = []
    for r, c in itertools.product((0, 4), (0, 4)):
        blocks.append(weight[:, :, r:r + 4, c:c + 4].abs().sum((1, 2, 3)) / 16)
    close(found, torch.stack(blocks, 1)[labels].double())


def test_a_drawn_image_differs_by_its_outline_only_inside_the_mask_of_its_object():
    for index, size in ((0, (64, 64)), (7, (64, 64)), (12, (48, 80))):
        images, masks = [], []
        for label in range(10):                              # the same image with another outline
            drawn = Shapes("val", size)
            drawn.labels[index] = label
            images.append(drawn.read(index).int())
            masks.append(drawn.read(index, mask=True))
        assert masks[0].shape == (1, *size) and masks[0].dtype == torch.uint8
        for a, b in itertools.combinations(range(10), 2):
            differs = (images[a] != images[b]).any(0)
            assert not differs[(masks[a][0] == 0) & (masks[b][0] == 0)].any()
            # inside one object alone nearly all pixels differ: objects are lighter
            assert differs[(masks[a][0] == 255) & (masks[b][0] == 0)].float().mean() > 0.99


# ---- what the loss sees ----

def test_bands_hold_all_the_power_and_a_wave_in_its_own():
    r = torch.randn(4, 3, 24, 32, generator=generator())
    _, mean, total = inside.bands(inside.spectrum(r))
    close(total.sum(), r.double().square().sum() / 12)
    # frequency 2 * 5 / 32 = 0.3125 pi
    wave = torch.cos(2 * math.pi * 5 * torch.arange(32) / 32).expand(1, 1, 24, 32)
    frequency, _, total = inside.bands(inside.spectrum(wave))
    close(total[3] / total.sum(), torch.tensor(1.0).double())
    assert math.isclose(frequency[3], 0.35)
    # independent errors cancel as 1/B
    noise = torch.randn(64, 3, 16, 16, generator=generator())
    left = inside.spectrum(noise.mean(0, keepdim=True)).mean() / inside.spectrum(noise).mean()
    close(left, torch.tensor(1 / 64).double(), rtol=0.1, atol=0)


def test_the_batch_spectrum_pulls_all_images_alike_and_pixels_pull_by_their_sign():
    torch.manual_seed(0)
    model = A2MIM(build_encoder("resnet18", 32), image_size=32, mask_size=8, token_stage=2)
    run = SimpleNamespace(fourier_weight=0.3, focal_pixels=False, stand_in="mixed",
                          visible_weight=0.0, fourier_focal=True)
    x, mask = torch.randn(4, 3, 32, 32), torch.ones(4, 4, 4, dtype=torch.bool)
    (_, pixels), (_, by_image), (norm, by_batch) = inside.pulls(model, run, x, mask)
    close(pixels, (model(x, mask) - x).sign() / x.numel(), atol=1e-9, rtol=1e-4)
    close(by_batch, by_batch[:1].expand_as(by_batch), atol=1e-9, rtol=1e-4)
    assert (by_image[0] - by_image[1]).abs().max() > 0.1 * by_image.abs().max()

    # the decoder by the chain rule: its output, unshuffled, is weight times feature plus bias
    features = []

    def note_input(module, inputs):
        features.append(inputs[0].detach())

    hook = model.decoder[0].register_forward_pre_hook(note_input)
    model(x, mask)
    hook.remove()
    outputs = F.pixel_unshuffle(by_batch, 32)
    on_weight = torch.einsum("bohw,bchw->oc", outputs, features[0])
    on_bias = outputs.sum((0, 2, 3))
    expected = (on_weight.square().sum() + on_bias.square().sum()).sqrt()
    assert math.isclose(norm, expected, rel_tol=1e-3)
    # a run without the term is measured as if its weight were 0.5
    run.fourier_weight = 0.0
    assert math.isclose(inside.pulls(model, run, x, mask)[2][0], 0.5 / 0.3 * norm, rel_tol=1e-3)


# ---- the commands ----

@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A folder of 2 x 20 images, with a classifier that finetune.py has trained and evaluated."""
    root = tmp_path_factory.mktemp("tuned")
    for i in range(40):
        (root / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise = Image.effect_noise((40, 40), 40 + 60 * (i % 2)).convert("RGB")
        noise.save(root / "data" / "ab"[i % 2] / f"{i:02}.png")
    flags = f"--data {root / 'data'} --image-size 32 --workers 0 --amp off --out {root}"
    train = "--init scratch --arch resnet18 --stem imagenet --epochs 3 --batch-size 8"
    finetune.main(f"{flags}/run {train}".split())
    finetune.main(f"{flags}/again --weights {root / 'run' / 'best.pt'} --eval-only".split())
    return root


def results(out: Path) -> dict:
    assert (out / "table.md").read_text().count("|") > 10
    assert Image.open(out / "plot.png").width >= 450         # at least one panel
    return json.loads((out / "results.json").read_text())["found"]


def test_an_image_of_odd_sides_is_in_one_piece_and_has_no_area_over_pieces():
    top1 = torch.rand(4, 3, 10).double()
    lines, found, _ = analyze.occlusion_report({"net": top1}, [k / 10 for k in range(10)], [1], "")
    assert found["shuffled"]["net"].keys() == {"top1", "std", "x"}
    assert "area" in found["random patches"]["net"]


@needs_matplotlib
def test_nothing_hidden_is_plain_accuracy_and_more_hidden_is_counted(tuned, tmp_path):
    weights = f"tuned={tuned / 'run' / 'best.pt'} chance=random"
    flags = f"--data {tuned / 'data'} --grid 4 --fill mean --out {tmp_path}"
    analyze.main(f"occlusion --weights {weights} {flags}".split())
    found = results(tmp_path)
    top1 = json.loads((tuned / "again" / "result.json").read_text())["top1"]
    for kind in found.values():
        assert math.isclose(kind["tuned"]["top1"][0], 100 * top1)
        assert kind["tuned"]["std"][0] == 0
    assert found["random patches"]["tuned"]["x"] == [k * 16 // 10 / 16 for k in range(10)]
    for curve in found["salient patches first"].values():    # the area by hand: trapezoids
        y, x = curve["top1"], curve["x"]
        area = sum((y[k] + y[k + 1]) / 2 * (x[k + 1] - x[k]) for k in range(9)) / x[-1]
        assert math.isclose(area, curve["area"], rel_tol=1e-9, abs_tol=1e-9)
    assert "tuned's gradient" in (tmp_path / "table.md").read_text()


@needs_matplotlib
def test_two_processes_find_what_one_finds(tmp_path):
    flags = "--weights a=random --image-size 32 --images 3 --pairs 2 --contexts 2 --grid 4 --out"
    analyze.main(["interactions", *flags.split(), str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "extras" / "analyze.py"), "interactions", *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "two")], check=True, capture_output=True,
                   env=environment, timeout=300)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    for kind in one:
        close(torch.tensor(one[kind]["a"]), torch.tensor(two[kind]["a"]), rtol=1e-3, atol=1e-4)
        strengths = [j for _, j, *_ in one[kind]["a"]]
        assert math.isclose(np.mean(strengths), 1, rel_tol=1e-6)             # J is over its mean
    # 16 patches, 14 others: 0.05 of them are 0.7, so 1; the released code truncates to 0
    orders = [round(14 * share) for share, *_ in one["as released"]["a"]]
    assert orders == [0, 1, 3, 5, 7, 9, 11, 13, 14]


def test_rows_of_images_come_back_in_their_order():
    rows = torch.arange(5.0)[:, None]
    parts = [rows[0::2], rows[1::2]]                         # of two processes
    world = SimpleNamespace(size=2, rank=1, all_gather=lambda own: torch.cat(parts))
    close(inside.gather(list(parts[1]), 5, world), rows.double())
    close(inside.gather(list(rows), 5, Distributed()), rows.double())


@needs_matplotlib
def test_fourier_takes_several_nets_and_mim_a_checkpoint(tmp_path, capsys):
    def analyse(flags: str, name: str) -> dict:
        analyze.main(f"{flags} --out {tmp_path / name}".split())
        return results(tmp_path / name)

    found = analyse("fourier --weights a=random b=random --images 4 --image-size 64", "f")
    assert found["a"] == found["b"]
    assert [d["side"] for d in found["a"]] == [16, 16, 16, 8, 8, 4, 4, 2, 2]
    highest = [d["curve"][-1][0] for d in found["a"]]
    assert highest[:6] == [14 / 16] * 3 + [6 / 8] * 2 + [2 / 4]

    run = tmp_path / "run"
    pretrain.main(("--data shapes --arch resnet18 --image-size 32 --mask-size 8 --token-stage 2 "
                   "--batch-size 4 --epochs 0.002 --workers 0 --sheets 0 --val 0 "
                   f"--out {run}").split())
    found = analyse(f"mim --weights end={run / 'checkpoint.pt'} --images 16", "m")
    assert set(found) == {"start", "end"} and found["start"] != found["end"]
    assert found["end"]["batches"] == [4, 16] and len(found["end"]["pull_on_decoder"][0]) == 3
    # the power of a mean is no larger than the mean of the powers
    for of_run in found.values():
        power = of_run["log10_power"]
        for each, mean in zip(power["each image"], power["mean of 16"]):
            assert each[1] >= mean[1]


@pytest.mark.parametrize("flags, words", [
    ("fourier --weights a", "--weights a: must be different names with a file each"),
    ("fourier --weights a=random a=random", "must be different names"),
    ("fourier --weights a=gone.pt --arch resnet18", "--weights: gone.pt: no such file"),
    ("fourier --weights a=random --data nowhere", "--data nowhere: no such folder"),
    ("fourier --weights a=random --arch resnet19", "did you mean resnet18"),
    ("interactions --weights a=random --image-size 32 --grid 5",
     "--grid 5: does not divide a side of 32 px; use one"),
    ("occlusion --weights a=random --image-size 32 --saliency-from b",
     "--saliency-from b: must be one of a"),
    ("mim --weights a=random", "mim needs a checkpoint.pt"),
    ("mim --weights a=README.md", "not a checkpoint.pt of pretrain.py"),
    ("zip --weights a=random", "invalid choice"),
])
def test_a_mistake_is_answered_in_one_line(flags, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(analyze, "check_matplotlib", lambda: None)
    with pytest.raises(SystemExit) as end:
        analyze.main([*flags.split(), "--images", "2", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.replace("\r", "\n")
    last = [line for line in said.splitlines() if line.strip()][-1]
    assert end.value.code == 2 and words in last and "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/proc/x", "file", "file/x"])
def test_a_folder_that_cannot_be_written_is_found_before_the_analysis(
    out, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(analyze.ANALYSES, "fourier", lambda *_: pytest.fail("the analysis began"))
    with pytest.raises(SystemExit) as end:
        analyze.main(["fourier", "--weights", "a=random", "--out", out])
    assert end.value.code == 2 and f"--out {out}: cannot be written" in capsys.readouterr().err


@needs_matplotlib
def test_results_without_a_folder_are_numbered_and_names_that_are_not_text_are_printed(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    found = {}, [Panel("t", "", "", {})]

    def analyse(args, world):
        return [*args.weights], *found

    monkeypatch.setitem(analyze.ANALYSES, "fourier", analyse)
    for _ in range(2):
        analyze.main(["fourier", "--weights", os.fsdecode(b"\xff=random")])
    assert capsys.readouterr().out == "\\xff\n" * 2
    tables = sorted(str(file) for file in Path("runs").glob("*/table.md"))
    assert tables == ["runs/analyze-fourier-2/table.md", "runs/analyze-fourier/table.md"]


def test_without_matplotlib_an_analysis_says_so_before_it_begins(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(analyze.ANALYSES, "fourier", lambda *_: pytest.fail("the analysis began"))
    with pytest.raises(SystemExit) as end:
        analyze.main(["fourier", "--weights", "a=random"])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1
    assert "pip install -r extras/requirements.txt" in message and not os.listdir(tmp_path)


# ---- charts, and the notebook ----

def shares_of(image: Image.Image, *colour: int) -> float:
    """The share of pixels that are near a colour."""
    near = np.abs(np.asarray(image).astype(int) - colour).max(-1) < 40
    return near.mean()


@needs_matplotlib
def test_a_chart_draws_each_series_and_leaves_out_points_that_are_not_finite():
    flat = {"flat": [(0, 1), (1, 1)]}
    with_gap = {"one": [(0.5, math.nan), (0.5, 2, 1, 3), (0.7, math.inf)]}
    page = charts([Panel("t", "x", "y", flat | with_gap)] * 3)
    one = charts([Panel("t", "x", "y", flat)])
    assert page.width == 2 * one.width and page.height == 2 * one.height     # 2 columns, 2 rows
    blue, orange = (31, 119, 180), (255, 127, 14)            # matplotlib's first two colours
    assert shares_of(page, *blue) > 0.001 and shares_of(page, *orange) > 0.0001
    assert shares_of(one, *orange) == 0
    assert charts([Panel("nothing", "x", "y", {})]).size == one.size


@needs_matplotlib
def test_a_bar_is_as_long_as_the_mean_of_its_values():
    def longest(values: list[float]) -> int:
        """The length in pixels of A2MIM's bar beside a gray bar of 100."""
        page = bars({"g": {"A2MIM": values, "other": [100.0]}}, "title", "x")
        blue = np.abs(np.asarray(page).astype(int) - (31, 95, 191)).max(-1) < 20
        return blue.sum(1).max()
    assert longest([40.0, 60.0]) == pytest.approx(longest([50.0]), abs=3)
    assert longest([80.0]) == pytest.approx(2 * longest([40.0]), abs=4)
    assert bars({}, "title", "x").width == 800


def test_the_notebook_has_stored_outputs_of_its_own_code():
    path = ROOT / "extras" / "demo.ipynb"
    cells = json.loads(path.read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    for cell in cells:
        ast.parse("".join(cell["source"]))                   # plain Python
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    assert not any(output["output_type"] == "error" for output in outputs)
    assert path.stat().st_size < 500_000


FACTS = """
assert len(losses) == 8 and sum(losses[-3:]) < sum(losses[:3])
assert reconstruction.shape == (2, 3, 96, 96) and own_mask.sum() == 2 * 13
assert set(accuracy) == {"random weights", "pre-trained"} and min(accuracy.values()) >= 0.03
"""


@needs_matplotlib
@pytest.mark.skipif(run_notebook.nbclient is None, reason="nbclient or ipykernel is missing")
def test_the_notebook_runs_and_its_variables_hold_what_its_text_says(monkeypatch):
    notebook = run_notebook.read_notebook(ROOT / "extras" / "demo.ipynb")
    stored = {}                                              # execution count -> types of outputs
    for cell in notebook.cells:
        if cell.cell_type == "code":
            stored[cell.execution_count] = [output.output_type for output in cell.outputs]
    facts = run_notebook.nbformat.v4.new_code_cell(FACTS)
    notebook.cells.append(facts)
    monkeypatch.setenv("DEMO_STEPS", "8")
    run_notebook.execute(notebook, ROOT / "extras")          # raises Failed if a fact is wrong
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell is not facts:
            assert [output.output_type for output in cell.outputs] == stored[cell.execution_count]
