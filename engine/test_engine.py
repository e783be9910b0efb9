"""Facts about the engine: flags and messages, torchvision's other nets, optimisers, imports.

Runs and their faults are in test_runs.py, weights and images in test_files.py.
"""

import ast
import json
import math
import os
import re
import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision.models as tv
from PIL import Image, ImageColor
from torch import nn
from torchvision.ops import StochasticDepth

import conftest
import finetune
import loss
import masking
import model
import pretrain
from engine import command, optim, pictures, weights
from engine.testing import (HERE, QUICK, SMALL, checkerboard, complaint, labelled_folder, paint,
                            pixels, read_log, resolved, run, settings_of, tune)
from model import A2MIM, build_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
close = torch.testing.assert_close


# ---- the shape of the code ----

def test_no_line_of_the_method_is_wider_than_100_columns():
    for file in [*HERE.glob("*.py"), *HERE.glob("engine/*.py"), *HERE.glob("extras/*.py")]:
        limit = 120 if file.parent.name == "extras" or file.name.startswith("test_") else 100
        assert max(map(len, file.read_text().splitlines()), default=0) <= limit, file


def test_the_engine_imports_nothing_from_the_stages_and_nobody_imports_extras():
    stages = {"masking", "model", "loss", "data", "pretrain", "finetune"}
    engine = [file for file in HERE.glob("engine/*.py") if not file.name.startswith("test")]
    for file in [*HERE.glob("*.py"), *engine]:
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
        assert "extras" not in imported and (file.parent == HERE or not imported & stages), file


def test_of_several_processes_each_test_is_run_by_one(tmp_path):
    first, second = (conftest.claim(range(50), tmp_path) for _ in range(2))
    taken = [next(first), next(second), next(second), next(first), *second, *first]
    assert taken[:4] == [0, 1, 2, 3] and sorted(taken) == list(range(50))


# ---- flags and mistakes ----

@pytest.mark.parametrize("flags, words", [
    ("--arch resnet51", "argument --arch: arch 'resnet51': must be one of resnet18"),
    ("--lr -1", "argument --lr: -1: must be a number of at least 0"),
    ("--lr nan", "argument --lr: nan: must be a number"),
    ("--mask-size 1", "mask size 1: must be at least 2 pixels"),
    ("--mask-ratio half", "argument --mask-ratio: half: must be a number; see --help"),
    ("--epochs 0", "argument --epochs: 0: must be a number from 0.001 to 100000"),
    ("--epochs 1e18", "argument --epochs: 1e18: must be a number from 0.001 to 100000"),
    ("--sheets 2000000000", "argument --sheets: 2000000000: must be an integer from 0 to 1000"),
    ("--image-size 1000000",
     "argument --image-size: 1000000: must be an integer from 1 to 8192"),
    ("--image-size 64 96 128",
     "argument --image-size: 64 96 128: must be one side of a square, or two"),
    ("--image-size 64 100",
     "image side 100: not a multiple of the 32-pixel mask unit; use 96 or 128"),
    ("--data ''", "argument --data: is empty (an unset shell variable?)"),
    ("--out ''", "argument --out: is empty"),
    ("--batch-size 2.5", "argument --batch-size: 2.5: must be an integer"),
    ("--crop-min 2", "argument --crop-min: 2: must be a number from 0.01 to 1"),
    ("--wings 2", "unrecognized arguments: --wings 2"),
    ("--mask-ratio 1.5", "mask ratio 1.5: must lie between 0 and 1"),
    ("--image-size 100", "image side 100: not a multiple of the 32-pixel mask unit; use 96 or 128"),
    ("--token-stage 9 --image-size 64", "token stage 9: this encoder has stages 0 to 4"),
    ("--mask-size 8 --token-stage 4 --image-size 64", "a mask unit is smaller than the stride"),
    ("--warmup-epochs 3 --epochs 2", "--warmup-epochs 3: must be less than --epochs 2"),
    ("--batch-size 20000", "there are 10000 images to train on, and one step takes 20000"),
    ("--data no/such/folder",
     "--data no/such/folder: no such folder; give a folder of images or one of shapes, cifar10"),
    ("--data cifar10",
     "--data cifar10: not found in --data-root datasets; add --download to fetch it"),
    ("--data cifar10 --download --data-root /dev/null/x",
     "--data-root /dev/null/x: cannot be written (Not a directory)"),
])
def test_a_mistake_on_the_command_line_gets_one_line_and_exit_code_2(
    flags, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = ["--data", "shapes", "--arch", "resnet18", *shlex.split(flags)]
    code, said = complaint(capsys, *given)
    assert code == 2
    assert words in said
    assert said.startswith("pretrain.py: error: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())                      # not even runs/ was made


ZEROS = torch.zeros(1, 3, 4, 4)
ALL_HIDDEN = torch.ones(1, 1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize("call, words", [
    (lambda: masking.mask_grid((100, 128), 32),
     "image side 100: not a multiple of the 32-pixel mask unit; use 96 or 128"),
    (lambda: masking.mask_grid((16, 16), 32),
     "image side 16: not a multiple of the 32-pixel mask unit; use 32"),
    (lambda: masking.random_mask(1, (2, 2), 0.0),
     "mask ratio 0.0: must lie between 0 and 1"),
    (lambda: masking.random_mask(1, (2, 2), 1.0),
     "mask ratio 1.0: must lie between 0 and 1"),
    (lambda: masking.resize_mask(checkerboard(1, 4, 4), (2, 2)),
     "smaller than the stride"),
    (lambda: masking.fill_hidden(ZEROS, checkerboard(), "grey"),
     "fill 'grey': must be one of mean, zero, random, blur"),
    (lambda: masking.MaskToken(3, "swap"),
     "mask token 'swap': must be one of gamma, add, replace"),
    (lambda: masking.expand_mask(checkerboard(), torch.zeros(1, 7, 3)),
     "7 tokens does not fit a mask of 2x2 units"),
    (lambda: loss.fourier_loss(ZEROS, ZEROS, ALL_HIDDEN, stand_in="none"),
     "stand-in 'none': must be one of"),
    (lambda: loss.fourier_loss(ZEROS, ZEROS, ALL_HIDDEN, spectrum="all"),
     "spectrum 'all': must be one of batch, image"),
    (lambda: build_encoder("resnet51"),
     "arch 'resnet51': must be one of resnet18"),
    (lambda: build_encoder("resnet51"),
     "or a net of torchvision; did you mean resnet50?"),
    (lambda: build_encoder("vit_b_16"),
     "arch 'vit_b_16': does not run its modules one after another, so a token cannot "
     "enter between them; use vit_base"),
    (lambda: build_encoder("googlenet"),
     "arch 'googlenet': does not run its modules one after another"),
    (lambda: build_encoder("inception_v3"),
     "use resnet50, or split it yourself: model.Encoder([...])"),
    (lambda: build_encoder("regnet_y_400mf", 64, 0.1),
     "has no stochastic depth; use --drop-path 0, not 0.1"),
    (lambda: build_encoder("maxvit_t", (64, 96)),
     "'maxvit_t' at 64x96 px: torchvision's MaxViT takes squares"),
    (lambda: build_encoder("maxvit_t", 64),
     "arch 'maxvit_t' at 64x64 px: Input size (16, 16) of block 0 is not divisible"),
    (lambda: A2MIM(build_encoder("squeezenet1_1"), 16, 16),
     "image size 16x16: does not fit this encoder"),
    (lambda: build_encoder("vit_base", 100),
     "image size 100x100: not a multiple of the 16-pixel patch"),
    (lambda: A2MIM(build_encoder("resnet18"), 64, token_stage=5),
     "token stage 5: this encoder has stages 0 to 4"),
    (lambda: A2MIM(build_encoder("resnet18"), 64, mask_size=8),
     "mask of 8x8 units on 4x4 features"),
    (lambda: A2MIM(build_encoder("resnet18"), 80, mask_size=16),
     "image size 80x80: the encoder turns it into features"),
])
def test_impossible_sizes_and_options_give_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_in_fine_tuning_get_one_line(few_images, backbone, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labelled_folder(tmp_path / "no_val", {"train": (2, 2)})
    labelled_folder(tmp_path / "odd", {"train": (2, 2), "val": (2, 2, 1)})
    (tmp_path / "flat").mkdir()
    paint(tmp_path / "flat" / "0.png")
    shapes = ["--data", "shapes"]
    resnet = ["--weights", backbone, "--arch", "resnet18"]
    for flags, words in (
        (shapes, "give --weights FILE, or --init scratch"),
        ([*shapes, "--weights", "", "--arch", "resnet18"],
         "argument --weights: is empty (an unset shell variable?)"),
        ([*shapes, *resnet, "--test-size", "10000"],
         "argument --test-size: 10000: must be an integer from 1 to 8192"),
        ([*shapes, "--init", "scratch"], "--arch is missing: --init scratch needs one"),
        (resnet, "--data is missing"),
        ([*shapes, *resnet, "--labels", "lots"],
         "--labels lots: must be a share such as 0.1, or a count such as 20/class"),
        ([*shapes, "--arch", "resnet50", "--weights", backbone], "is it another architecture?"),
        ([*shapes, "--arch", "resnet18", "--weights", "gone.pt"], "gone.pt: no such file"),
        (["--data", "no_val", *resnet], "has train/ but no val/"),
        (["--data", "odd", *resnet], "train/ and val/ hold different classes (c2)"),
        (["--data", "flat", *resnet], "needs a folder for each class, at least two"),
        ([*shapes, *resnet, "--eval-only"], "its head tells 1000 classes apart, the data has 10"),
        (["--resume"], "--data is missing"),
        (["--resume", "--out", "new", *shapes, "--arch", "resnet18"], "give --weights FILE"),
        ([*shapes, "--init", "scratch", "--arch", "resnet18", "--eval-only"],
         "--eval-only: needs --weights"),
        # a random net would be scored
        (["--resume", "--out", "run", "--recipe", "knn"], "--resume continues a training"),
        (["--resume", "--out", "run", "--eval-only"], "--resume continues a training"),
    ):
        code, said = complaint(capsys, *flags, main=finetune.main)
        assert code == 2, said
        assert words in said
        assert said.startswith("finetune.py: error: ") and said.count("\n") == 1, said
    assert not (tmp_path / "runs").exists() and not (tmp_path / "new").exists()


def test_help_gives_every_default(capsys):
    in_pretrain = [
        "per optimiser step (1)", "augmentation, masks (0)", "the model (no)",
        "format of CNNs (yes)", "largest gradient norm, 0 = none (0.0, by recipe)",
        "Fourier loss, 0 = pixels only (0.5, by recipe)",
    ]
    in_finetune = [
        "see --lr (16, by recipe)", "floor of the cosine (1e-06)", "head alone (no, by recipe)",
    ]
    for main, expected in ((pretrain.main, in_pretrain), (finetune.main, in_finetune)):
        with pytest.raises(SystemExit):
            main(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        for words in expected:
            assert words in said, said


def test_values_of_flags_are_shown_harmless_and_short(capsys):
    for value in ("1\n2", "\x1b[2J1", "9" * 5000 + "x"):
        code, said = complaint(capsys, "--data", "x", "--accum", value)
        assert code == 2 and "argument --accum: " in said
        assert said.count("\n") == 1 and len(said) < 1200
        assert said.rstrip("\n").isprintable()


def test_errors_of_memory_disk_and_gloo_are_told_apart():
    world = command.Distributed()
    world.size = 2
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "use a smaller --image-size or --batch-size" in command.explain(full, world)[1]
    full_disk = OSError("runs/igloo/args.json not written: No space left on device")
    assert command.explain(full_disk, world) == (1, str(full_disk))
    lost = RuntimeError("[enforce fail] gloo connectFullMesh failed")
    code, line = command.explain(lost, world)
    assert code == 1 and line.startswith("lost another process")
    # an evaluation has no checkpoint, so "--resume" alone would be no help
    assert line.endswith("give the command again, a training with --resume")


def test_a_thread_that_waits_for_the_gil_gets_it_before_a_worker_is_forked(monkeypatch):
    before_fork = []
    monkeypatch.setattr(os, "register_at_fork", lambda before: before_fork.append(before))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    world = command.Distributed(size=2)
    monkeypatch.setattr(world, "rendezvous_store", lambda: None)
    world.join()

    collective, released = threading.Lock(), threading.Event()
    collective.acquire()

    def thread_of_gloo():
        with collective:
            released.set()
    thread = threading.Thread(target=thread_of_gloo)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)                                # seconds: nobody takes it from us
    try:
        thread.start()
        collective.release()
        was_released = released.is_set()
        for hook in before_fork:
            hook()
        assert not was_released and released.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_a_mistake_has_exit_code_2_though_stderr_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)                 # as Python has it after 2>&-
    with pytest.raises(SystemExit) as end:
        pretrain.main(["--epochs", "banana"])
    assert end.value.code == 2


def test_resume_alone_says_which_flag_names_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = complaint(capsys, "--resume")
    assert code == 2 and "give the run's folder with --out" in said


# ---- what a run says ----

def test_a_run_ends_with_the_next_step(few_images, capsys, tmp_path, monkeypatch):
    out = tmp_path / "my runs"                               # a space, which a shell would split at
    run(out, *QUICK, "--val", "0.5", "--epochs", "1", "--lr", "0")
    advice = "next: train longer (--epochs) or use larger mask units (--mask-size)"
    assert advice in capsys.readouterr().err.splitlines()
    monkeypatch.setattr(pretrain, "skill", lambda *given: ("clearly better than a blur", True))
    more = ["--data-root", str(tmp_path / "my sets")]
    run(tmp_path / "better", *QUICK, "--val", "0.5", "--epochs", "1", *more)
    line, = re.findall("^next: python finetune.py (.*)$", capsys.readouterr().err, re.M)
    args = resolved(finetune, *shlex.split(line))
    assert args.weights == str(tmp_path / "better" / "backbone.pt") and args.arch == QUICK[1]
    assert args.data == "shapes" and args.data_root == str(tmp_path / "my sets")
    said = pretrain.next_step(True, SimpleNamespace(data="/photos", out=out))
    assert f"--weights '{out}/backbone.pt' --data DIR" in said


def test_a_peak_lr_that_moves_no_weight_gets_a_warning(few_images, capsys, tmp_path):
    run(tmp_path / "run", "--epochs", "1", "--lr", "1e-4")
    said = capsys.readouterr().err
    assert "peak lr 1.6e-06 x 4 steps = 6e-06: the weights will hardly change" in said
    run(tmp_path / "long", "--epochs", "1", "--lr", "2")     # 2 x 8 / 512 x 4 steps = 0.125
    assert "will hardly change" not in capsys.readouterr().err


def test_a_run_on_small_images_says_what_it_chose_and_fine_tuning_remembers_it(
    few_images, capsys, tmp_path
):
    flags = "--data shapes --arch resnet18 --image-size 32 --batch-size 8 --epochs 0.25".split()
    made, said = settings_of(capsys, tmp_path / "run", *flags)
    assert made["stem"] == "small" and "small stem (3x3, stride 1), token before stage 4" in said
    assert "10 of 16 mask units hidden (8 px)" in said
    tune(tmp_path / "tuned", "--weights", tmp_path / "run" / "backbone.pt", "--epochs", "0.25")
    assert "conv1.weight" not in capsys.readouterr().err     # it was loaded, not made new
    assert torch.load(tmp_path / "tuned" / "best.pt")["conv1.weight"].shape == (64, 3, 3, 3)
    alone = tmp_path / "best.pt"                             # without args.json beside it
    alone.write_bytes((tmp_path / "tuned" / "best.pt").read_bytes())
    flags = "--data shapes --arch resnet18 --image-size 32 --eval-only --workers 0".split()
    code, said = complaint(capsys, *flags, "--weights", alone, "--out", tmp_path / "eval",
                           main=finetune.main)
    assert code == 2 and "lacks conv1.weight; evaluate it with the --arch, --stem" in said


def test_few_mask_units_get_a_warning_and_one_is_refused(few_images, capsys, tmp_path):
    flags = "--data shapes --arch resnet18 --image-size 64 --mask-size 32 --batch-size 8"
    _, said = settings_of(capsys, tmp_path / "four", *flags.split(), "--epochs", "0.25")
    assert "warning: 4 mask units of 32 px are too few to learn much from" in said
    for flags, words in (
        ("--image-size 32 --mask-size 32", "mask ratio 0.6: hides all of 1 mask units"),
        ("--image-size 16", "image side 16: not a multiple of the 32-pixel mask unit; use 32"),
        ("--image-size 32 --arch deit_tiny --patch-size 16", "--patch-size"),
    ):
        given = ["--data", "shapes", "--arch", "resnet18", "--batch-size", "8", *flags.split()]
        code, said = complaint(capsys, *given, "--out", tmp_path / "x")
        assert code == 2 and words in said and said.count("\n") == 1


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


def test_probes_and_evaluations_leave_args_json_and_never_overwrite_a_result(
    few_images, backbone, capsys, tmp_path
):
    result = tune(tmp_path / "tuned", "--weights", backbone, "--arch", "resnet18", "--epochs", "1")
    best = tmp_path / "tuned" / "best.pt"
    for name, more in (("knn", ["--recipe", "knn"]), ("eval", ["--eval-only"])):
        tune(tmp_path / name, "--weights", best, *more)
        assert json.loads((tmp_path / name / "args.json").read_text())["arch"] == "resnet18"
        before = (tmp_path / name / "result.json").read_bytes()
        for out, holds in (name, "holds result.json, and no run"), ("tuned", "already holds a run"):
            flags = [*SMALL, "--weights", best, *more, "--out", tmp_path / out]
            code, said = complaint(capsys, *flags, main=finetune.main)
            assert code == 2 and holds in said
        assert (tmp_path / name / "result.json").read_bytes() == before
    assert json.loads((tmp_path / "tuned" / "result.json").read_text()) == result


def test_args_json_of_a_demo_holds_the_batch_it_ran_with(few_images, tmp_path):
    flags = "--batch-size 8 --image-size 32 --epochs 0.3 --workers 0 --sheets 0"
    pretrain.main([*flags.split(), "--out", str(tmp_path / "run")])
    settings = json.loads((tmp_path / "run" / "args.json").read_text())
    assert settings["global_batch"] == 8                     # the default of the demo is 16


# ---- torchvision's other nets ----

TORCHVISION = [                  # one of each kind: image size, mask size, what the token enters
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


@pytest.mark.parametrize("arch, size, mask_size, where", TORCHVISION)
def test_torchvisions_other_nets_learn_and_their_chain_is_torchvisions_forward(
    arch, size, mask_size, where, tmp_path
):
    encoder = build_encoder(arch, size)
    net = A2MIM(encoder, size, mask_size)
    entered = []

    def note_shape(module, inputs, output):
        entered.append(tuple(output.shape[1:]))

    net.mask_token.register_forward_hook(note_shape)
    x = torch.randn(1 if size == 224 else 2, 3, size, size)
    mask = masking.random_mask(len(x), net.grid)
    loss.a2mim_loss(net(x, mask), x, pixels(mask, x))[0].backward()
    assert entered == [where]
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    torch.optim.SGD(net.parameters(), lr=1e-3).step()

    torch.save(encoder.backbone.state_dict(), tmp_path / "backbone.pt")
    plain = tv.get_model(arch, num_classes=2).eval()
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    found = plain.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith(f"{encoder.head_name}.") for name in found.missing_keys)
    report = weights.load_backbone(encoder, tmp_path / "backbone.pt")
    assert not report["missing"] and not report["skipped"]

    handed = []                                              # what torchvision's own head is given

    def note_input(module, inputs):
        handed.append(inputs[0])

    plain.get_submodule(encoder.head_name).register_forward_pre_hook(note_input)
    encoder.eval()
    with torch.no_grad():
        plain(x)
        z = encoder(x).movedim(-1, 1) if encoder.layout == "nhwc" else encoder(x)
    # most nets pool before the head, the heads of SqueezeNet and MaxViT pool themselves
    pooled = handed[0].view(*z.shape[:2], -1).mean(2)
    close(z.mean((2, 3)) / z.std(), pooled / z.std(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", [
    "mnasnet0_5", "squeezenet1_1", "densenet121", "mobilenet_v3_small",
])
def test_torchvisions_other_nets_are_fine_tuned_with_their_own_head(arch, tmp_path):
    def classifier(classes=3, **options):
        return model.Classifier(arch, build_encoder(arch, 64), classes, **options)

    net, x = classifier(frozen=True), torch.randn(2, 3, 64, 64)
    learns = {name for name, p in net.named_parameters() if p.requires_grad}
    head = f"encoder.backbone.{net.encoder.head_name}."
    assert learns == {name for name, _ in net.named_parameters() if name.startswith(head)}
    assert learns == {name for name in net.state_dict() if name.startswith(head)}
    before = {name: p.clone() for name, p in net.state_dict().items()}
    finetune.class_loss(net.train()(x), torch.eye(3)[:2], "ce", 0.1).backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    after = net.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} <= learns
    learned = net.eval()(x)
    new_head = model.Classifier(arch, net.encoder, 3).eval()                 # replaces the head
    assert not torch.equal(learned, new_head(x))

    net = classifier().eval()
    assert optim.layer_groups(net, 0.05, 0.5)[-1]["scale"] == 1.0
    assert net.features(x).shape[0] == 2
    plain = tv.get_model(arch, num_classes=3).eval()
    plain.load_state_dict(net.torchvision_state_dict())
    assert torch.equal(net(x), plain(x))
    assert not torch.equal(plain(x), plain(x.flip(0)))
    torch.save(net.torchvision_state_dict(), tmp_path / "best.pt")

    again = classifier().eval()
    head = weights.load_head(again, tmp_path / "best.pt")
    report = weights.load_backbone(again.encoder, tmp_path / "best.pt")
    assert torch.equal(again(x), net(x))
    assert set(report["skipped"]) == head and not report["missing"]
    with pytest.raises(ValueError, match="its head tells 3 classes apart, the data has 4"):
        weights.load_head(classifier(4), tmp_path / "best.pt")
    # the head of the average is part of the average, not of the net
    average = optim.MovingAverage(net, 0.9, 10).module
    in_backbone = average.get_submodule(f"encoder.backbone.{net.encoder.head_name}")
    assert average.head is in_backbone is not net.head


def test_a_net_of_torchvision_is_pre_trained_and_fine_tuned_by_its_name(few_images, tmp_path):
    flags = "--data shapes --image-size 64 --batch-size 8 --workers 0 --amp off --epochs 1"
    flags = [*flags.split(), "--log-every", "1"]
    arch = ["--arch", "shufflenet_v2_x0_5", "--val", "0"]
    pretrain.main([*flags, *arch, "--lr", "0.03", "--sheets", "1", "--out", str(tmp_path / "pre")])
    log = read_log(tmp_path / "pre")
    pictures = [file.name for file in (tmp_path / "pre").glob("reconstruction-*")]
    assert len(log) == 4 and pictures == ["reconstruction-000004.png"]       # one: of the last step
    # args.json beside the weights names the net
    weights_file = ["--weights", str(tmp_path / "pre" / "backbone.pt")]
    finetune.main([*flags, *weights_file, "--eval-every", "1", "--out", str(tmp_path / "tuned")])
    best = torch.load(tmp_path / "tuned" / "best.pt", weights_only=True)
    tv.shufflenet_v2_x0_5(num_classes=10).load_state_dict(best)              # strictly
    tuned_file = ["--weights", str(tmp_path / "tuned" / "best.pt")]
    finetune.main([*flags, *tuned_file, "--eval-only", "--out", str(tmp_path / "eval")])
    tuned = json.loads((tmp_path / "tuned" / "result.json").read_text())
    again = json.loads((tmp_path / "eval" / "result.json").read_text())
    assert again["top1"] == tuned["best_top1"]


def test_of_a_frozen_vit_the_new_linear_layer_alone_is_trained():
    net = model.Classifier("deit_tiny", build_encoder("deit_tiny", 64), 3, frozen=True)
    learns = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert learns == {"head.weight", "head.bias"}


def test_stochastic_depth_of_torchvisions_nets_rises_to_the_rate_asked_for():
    def rates(arch, drop_path):
        modules = build_encoder(arch, 64, drop_path).backbone.modules()
        return [module.p for module in modules if isinstance(module, StochasticDepth)]

    for arch in ("efficientnet_b0", "resnext50_32x4d", "convnext_tiny", "swin_tiny"):
        found = rates(arch, 0.3)
        assert found == sorted(found), arch
        assert found[0] == 0 and found[-1] == pytest.approx(0.3), arch
        assert not any(rates(arch, None)), arch


def test_the_window_of_a_swin_is_the_one_asked_for():
    """A window of 6 x 6 patches has 11 x 11 relative positions."""
    for window, rows in ((6, 121), (7, 169)):
        state = build_encoder("swin_tiny", 192, window=window).backbone.state_dict()
        tables = [value for name, value in state.items() if name.endswith("bias_table")]
        assert {len(table) for table in tables} == {rows}


class More(tv.MobileNetV2):
    """A net whose forward does more than its children do."""

    def forward(self, x):
        z = self.features[18](self.features[:18](x))
        return self.classifier(z.relu().add(1).mean((2, 3)))


def test_a_net_that_is_not_its_chain_of_children_is_refused(monkeypatch):
    monkeypatch.setattr(tv, "get_model", lambda arch, **options: More())
    message = "arch 'mobilenet_v2': does not run its modules one after another"
    with pytest.raises(ValueError, match=message):
        build_encoder("mobilenet_v2", 64)


# ---- optimisers ----

def test_lamb_takes_the_steps_of_its_paper():
    """Two steps of its algorithm 2 in numpy, in float64.

    With NVIDIA's gradient normalisation and with bias correction.
    """
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
    tensors = {k: nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    groups = [
        {"params": [tensors["w"]], "weight_decay": 0.02},
        {"params": [tensors["b"]], "weight_decay": 0.0},
    ]
    lamb = optim.Lamb(groups, lr=0.1)
    p = {k: x.copy() for k, x in start.items()}
    m, v = dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
    for t, scale in ((1, 5.0), (2, 0.01)):                   # only a norm above 1 is scaled, to 1
        grads = {k: scale * rng.normal(size=x.shape) for k, x in start.items()}
        for k, g in grads.items():
            tensors[k].grad = torch.tensor(g)
        lamb.step()
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g / max(1, norm)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g**2
            r = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-6)
            if k == "w":                                     # the trust ratio, where weights decay
                r = r + 0.02 * p[k]
                r = r * np.linalg.norm(p[k]) / np.linalg.norm(r)
            p[k] = p[k] - 0.1 * r
            np.testing.assert_allclose(tensors[k].detach().numpy(), p[k], rtol=1e-6)


def test_lamb_moves_a_weight_of_zeros_with_ratio_one():
    w = nn.Parameter(torch.zeros(4))
    w.grad = torch.full((4,), 0.1)
    optim.Lamb([w], lr=0.5).step()
    # the first step of Adam has the size of the lr
    close(w.detach(), torch.full((4,), -0.5), atol=1e-4, rtol=0)


def test_moving_average_ramps_its_decay_and_leaves_batchnorm_statistics_to_the_model():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    ema = optim.MovingAverage(net, 0.99, ramp=4)
    expected = net[0].weight.item()
    for n, w in enumerate([3.0, 5.0, -1.0, 2.0, 0.5, 7.0]):
        with torch.no_grad():
            net[0].weight.fill_(w)
            net[1].running_mean.fill_(w)
        ema.update_parameters(net)
        d = 0.99 * (0.9 + 0.1 * min(1, n / 4))               # starts at 0.9 of the decay
        expected = d * expected + (1 - d) * w                # starts at the initial weight
        assert ema.module[0].weight.item() == pytest.approx(expected, rel=1e-5)
        assert ema.module[1].running_mean.item() == w


# ---- pictures ----

def test_the_curves_have_a_panel_for_held_out_images_and_their_last_point(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = []
    for step in range(1, 101):
        lines.append({"step": step, "epoch": step / 100, "loss": 2.0 - step / 100})
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
