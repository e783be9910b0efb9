"""Facts about runs: exact resume, several processes, signals, faults, and what is saved when."""

import errno
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image

import data
import finetune
import model
import pretrain
from engine import checkpointer, command, files, progress, results, weights
from engine.settings import resumed
from engine.testing import (HERE, QUICK, SMALL, TINY, complaint, failing_at, flip_a_byte,
                            labelled_folder, paint, prepared, read_log, run, run_code,
                            same_weights, settings_of, torchrun, tune, verdict_of)
from model import build_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
close = torch.testing.assert_close


# ---- the same run again, cut, resumed ----

def test_the_same_run_twice_and_with_workers_gives_the_same_log_and_weights(few_images, tmp_path):
    flags = ["--epochs", "2", "--drop-path", "0.2"]
    log, final = run(tmp_path / "a", *flags)
    for name, workers in (("b", "0"), ("c", "2")):
        again, repeated = run(tmp_path / name, *flags, "--workers", workers)
        assert again == log
        same_weights(final, repeated)
    other, _ = run(tmp_path / "d", *flags, "--seed", "1")
    assert other != log
    assert [line["step"] for line in log] == list(range(1, 9)) and log[-1]["epoch"] == 2


@pytest.mark.parametrize("arch", ["deit_tiny", "resnet18"])
def test_a_run_that_was_cut_resumes_into_the_uninterrupted_run(
    arch, few_images, tmp_path, monkeypatch, capsys
):
    flags = ["--epochs", "2", "--arch", arch, "--drop-path", "0.1", "--save-every", "3"]
    log, final = run(tmp_path / "whole", *flags)
    step = pretrain.train_step
    # in the middle of the second epoch
    monkeypatch.setattr(pretrain, "train_step", failing_at(6, step))
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", *flags)
    # an unforeseen failure is printed in full
    assert "the power fails" in capsys.readouterr().err
    monkeypatch.setattr(pretrain, "train_step", step)
    # the checkpoint remembers the other flags
    pretrain.main(["--data", "shapes", "--out", str(tmp_path / "cut"), "--resume"])
    assert read_log(tmp_path / "cut") == log
    same_weights(final, torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True))


def test_fine_tuning_resumes_into_the_uninterrupted_run(few_images, tmp_path, monkeypatch, capsys):
    flags = ("--init scratch --arch resnet18 --mixup 0.8 --cutmix 1 --ema 0.9 --randaug 9 "
             "--erasing 0.25 --repeats 2 --drop-path 0.2 --optimizer lamb --save-every 3 "
             "--eval-every 1").split()
    whole = tune(tmp_path / "whole", *flags)
    step = finetune.train_step
    monkeypatch.setattr(finetune, "train_step", failing_at(6, step))
    with pytest.raises(SystemExit):
        tune(tmp_path / "cut", *flags)
    assert "PowerFailure" in capsys.readouterr().err
    monkeypatch.setattr(finetune, "train_step", step)
    finetune.main(["--out", str(tmp_path / "cut"), "--resume"])
    assert json.loads((tmp_path / "cut" / "result.json").read_text()) == whole
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")
    a, b = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    same_weights(a, b)
    for name, value in a["ema"].items():
        assert torch.equal(value, b["ema"][name]), name


@pytest.mark.parametrize("flags, words", [
    ("--optimizer sgd", "--optimizer sgd: a resumed run keeps what it began with, adamw"),
    ("--recipe linear", "--recipe linear: a resumed run keeps what it began with, default"),
    ("--weights w.pth", "--weights w.pth: a resumed run keeps what it began with, none"),
    ("--ema 0.9", "--ema 0.9: the run began with --ema 0")])
def test_a_resumed_run_keeps_its_recipe_optimiser_and_start(flags, words, few_images, capsys,
                                                            tmp_path):
    tune(tmp_path / "run", "--init", "scratch", "--arch", "resnet18")
    before = (tmp_path / "run" / "args.json").read_text()
    again = ["--out", tmp_path / "run", "--resume"]
    code, said = complaint(capsys, *again, *flags.split(), main=finetune.main)
    assert code == 2 and words in said
    assert (tmp_path / "run" / "args.json").read_text() == before
    if "sgd" in flags:                                       # the same values may be typed again
        same = "--optimizer adamw --init scratch --epochs 3"
        finetune.main([*map(str, again), *same.split()])


@pytest.mark.parametrize("flags, words", [
    ("--token-lr 1", "--token-lr 1: the run began with 0.2,"),
    ("--weight-decay 0", "--weight-decay 0: the run began with 0.05,")])
def test_a_resumed_run_keeps_its_parameter_groups(flags, words, few_images, capsys, tmp_path):
    """Pre-training has a group for each pair of weight decay and factor on the lr, which is 1 but
    for the token."""
    run(tmp_path / "run", "--epochs", "1", "--token-lr", "0.2")
    again = ["--out", tmp_path / "run", "--resume"]
    code, said = complaint(capsys, *again, *flags.split())
    assert code == 2 and words in said
    _, state = run(tmp_path / "run", *"--resume --epochs 2 --token-lr 0.3".split(),
                   "--weight-decay", "0.01", base=[])        # within the groups they may change
    groups = state["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.01, 0.0}
    assert {group["scale"] for group in groups} == {1.0, 0.3}


@pytest.mark.parametrize("arch, more", [("resnet18", ["--token-stage", "3"]), ("deit_tiny", [])])
def test_images_that_are_not_square_are_pre_trained_on_resumed_and_fine_tuned(
    arch, more, few_images, tmp_path, monkeypatch, capsys
):
    flags = ["--arch", arch, "--image-size", "64", "96", "--epochs", "1", "--val", "0.5", *more]
    log, final = run(tmp_path / "whole", *flags, "--sheets", "2")
    assert final["args"]["image_size"] == [64, 96] and log[-1]["held_out"] > 0
    said = capsys.readouterr().err
    assert "images at 64 x 96 px, 15 of 24 mask units hidden" in said        # ceil(0.6 * 24)
    # 6 rows of 5 pictures, 2 px apart, enlarged by 2, titles above and a note below
    sheet = Image.open(tmp_path / "whole" / "reconstruction-000004.png")
    assert sheet.size == (2 * (5 * 98 + 2), 2 * (6 * 66 + 2) + 22 + 20)
    assert np.asarray(sheet)[-20:].min() < 128               # the note is there

    step = pretrain.train_step
    monkeypatch.setattr(pretrain, "train_step", failing_at(2, step))
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", *flags, "--save-every", "1")
    monkeypatch.setattr(pretrain, "train_step", step)
    _, resumed = run(tmp_path / "cut", "--resume", base=[])
    same_weights(final, resumed)

    weights_file = tmp_path / "whole" / "backbone.pt"
    monkeypatch.setattr(finetune, "EXCEPTIONS", {})
    common = "--data shapes --workers 0 --amp off".split()
    tuned, evaluated = tmp_path / "tuned", tmp_path / "eval"
    train = [*common, "--batch-size", "8", "--epochs", "0.5"]
    finetune.main([*train, "--weights", str(weights_file), "--out", str(tuned)])
    assert json.loads((tuned / "args.json").read_text())["image_size"] == [64, 96]
    assert "labelled images at 64 x 96 px" in capsys.readouterr().err
    best = str(tuned / "best.pt")
    finetune.main([*common, "--weights", best, "--eval-only", "--out", str(evaluated)])
    top1 = [json.loads((out / "result.json").read_text())["top1"] for out in (tuned, evaluated)]
    assert top1[0] == top1[1]

    code, said = complaint(capsys, "--out", tmp_path / "whole", "--resume", "--arch", "deit_small")
    assert code == 2 and f"of another model ({arch} at 64 x 96 px)" in said
    if arch == "deit_tiny":
        turned = ["--weights", weights_file, "--data", "shapes", "--test-size", "96", "64"]
        code, said = complaint(capsys, *turned, main=finetune.main)
        assert code == 2
        assert "--test-size of 96 x 64 px: the positions of deit_tiny have one size" in said


def test_another_global_batch_goes_on_at_the_same_epoch(few_images, capsys, tmp_path):
    run(tmp_path / "run", *FLAGS, "--epochs", "3")           # 4 steps an epoch
    lines, _ = run(tmp_path / "run", "--resume", "--batch-size", "16", "--epochs", "5", base=[])
    assert "continues at epoch 3.00, and will not be bit-identical" in capsys.readouterr().err
    found = [(line["step"], line["epoch"]) for line in lines]
    assert found[-4:] == [(7, 3.5), (8, 4.0), (9, 4.5), (10, 5.0)]
    # the lines of the run before are kept
    assert max(step for step, _ in found[:-4]) == 12


def test_a_checkpoint_with_a_setting_of_a_fork_gets_one_line(few_images, capsys, tmp_path):
    run(tmp_path / "run", *FLAGS)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state["args"]["decay_of_the_teacher"] = 0.996
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    code, said = complaint(capsys, "--out", tmp_path / "run", "--resume", "--epochs", "3")
    assert code == 2 and "which has a setting decay_of_the_teacher" in said


def test_a_run_of_an_older_version_keeps_its_batch_and_lr():
    """Such a checkpoint has global_batch, the recipe's; batch_size is None unless it was typed."""
    old = dict(program="pretrain.py", recipe="small", batch_size=None, peak_lr=3e-3, lr=0.048)
    world = SimpleNamespace(size=2, on_gpu=False, local_size=1, default_amp=lambda: "off")

    def again(**saved):
        own = {**pretrain.DEFAULTS, **pretrain.DEFAULTS_OF_OLD_RUNS}
        asked = resumed(own, files.with_new_names({**old, **saved}), {"resume": True})
        return pretrain.resolve(asked, 9_469, world, is_resumed=True)

    default = again(global_batch=None)
    demo = again(global_batch=16)
    typed = again(global_batch=16, batch_size=4)
    assert [made.batch_size for made in (default, demo, typed)] == [32, 8, 4]
    assert [made.global_batch for made in (default, demo, typed)] == [64, 16, 8]
    assert [made.peak_lr for made in (default, demo, typed)] == pytest.approx([3e-3] * 3)
    assert again(peak_lr=None, global_batch=None).lr == 0.048        # typed: per 512 images


def test_a_resumed_small_run_keeps_its_peak_lr_at_another_batch(
    few_images, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrain, "SMALL_STEPS", 2)
    flags = "--data shapes --arch resnet18 --stem imagenet --image-size 32 --batch-size 8"
    settings_of(capsys, tmp_path / "run", *flags.split())
    flags = "--resume --batch-size 4 --epochs 0.75"
    made, said = settings_of(capsys, tmp_path / "run", *flags.split())
    assert made["lr"] * 4 / 512 == pytest.approx(3e-3) and "peak lr 3.00e-03" in said
    flags = "--resume --batch-size 8 --epochs 1 --lr 0.1"
    made, said = settings_of(capsys, tmp_path / "run", *flags.split())
    # a typed lr is per 512 images: 0.1 * 8 / 512
    assert made["lr"] == 0.1 and "peak lr 1.56e-03" in said


@pytest.mark.parametrize("made, resumed", [
    ("--channels-last", "--no-channels-last"),
    ("--no-channels-last", "--channels-last"),
])
def test_a_run_is_resumed_in_the_other_memory_format(made, resumed, few_images, tmp_path):
    flags = ["--arch", "shufflenet_v2_x0_5", "--mask-size", "32", "--token-stage", "1", made]
    for name in ("same", "other"):
        _, start = run(tmp_path / name, *flags, "--epochs", "1")
    _, same = run(tmp_path / "same", "--resume", "--epochs", "2", base=[])
    _, other = run(tmp_path / "other", "--resume", "--epochs", "2", resumed, base=[])

    def distance(a, b):
        total = 0.0
        for name, value in a["model"].items():
            if value.is_floating_point() and "running" not in name:
                total += (value - b["model"][name]).abs().sum().item()
        return total

    # sums differ in their order only; moments of the wrong weights give about 0.4
    assert distance(same, other) < 0.05 * distance(same, start)


def test_a_bf16_run_that_is_resumed_in_fp16_scales_its_gradients(few_images, tmp_path):
    _, state = run(tmp_path, "--epochs", "0.25", "--amp", "bf16")
    assert state["scaler"]["scale"] == 1.0
    _, state = run(tmp_path, "--epochs", "0.5", "--resume", "--amp", "fp16", base=[])
    assert state["scaler"]["scale"] > 1.0 and state["step"] == 2


# ---- several processes ----

def test_two_processes_train_the_same_weights_as_one(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(21):          # 5 of them are held out: one of two processes has 3, the other 2
        paint(tmp_path / "images" / f"{i}.png", colour=(12 * i, 255 - 12 * i, 40), size=(64, 64))
    flags = [*TINY, "--data", str(tmp_path / "images")]
    flags += "--epochs 2 --fourier-weight 1 --spectrum image --val 0.02".split()
    _, one = run(tmp_path / "one", base=flags)
    halves = ["--batch-size", 2, "--accum", 2]
    done = torchrun("pretrain.py", *flags, *halves, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    *numbers_of_one, words_of_one = verdict_of(capsys.readouterr().err)
    *numbers_of_two, words_of_two = verdict_of(done.stderr)
    assert words_of_one == words_of_two
    assert numbers_of_one == pytest.approx(numbers_of_two, abs=0.011, rel=1e-6)

    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=1e-5)
    held_out = []
    for log in logs:
        measured = [line for line in log if "held_out" in line]
        assert len(measured) == 1
        held_out.append([measured[0]["held_out"], measured[0]["blur"]])
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-3)
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    same_weights(one, two, atol=2e-5, rtol=1e-3)


def test_top_5_counts_the_label_among_the_five_likeliest_classes():
    likeliest = torch.tensor([[3, 1, 2, 0, 4]] * 4)
    labels = torch.tensor([3, 0, 4, 9])                      # at place 1, 4, 5, and absent
    found = results.score(likeliest, labels, 10, command.Distributed())
    assert (found["top1"], found["top5"], found["images"]) == (0.25, 0.75, 4)


THREE_RUNS = """
import os, sys
sys.path.insert(0, {here!r})
import finetune, torch
def evaluate(model, args, world, run, real=finetune.evaluate):
    result = real(model, args, world, run)
    torch.save(list(model.buffers()), os.path.join({out!r}, f"evaluated-{{i}}-{{world.rank}}.pt"))
    return result
finetune.evaluate = evaluate
for i, command in enumerate({commands}):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)        # each has a process group of its own
    finetune.main(command)
    if sys.platform == "linux":
        # a thread of the group that outlives the run may abort the process at its exit
        threads = os.listdir("/proc/self/task")
        names = [open(f"/proc/self/task/{{thread}}/comm").read() for thread in threads]
        assert not [name for name in names if "gloo" in name]
"""


def test_two_processes_count_every_validation_image_once_and_agree_with_one(tmp_path):
    counts = (30, 26, 15)                                    # 71 images, batches of 64
    labelled_folder(tmp_path / "set", {"train": (8, 8, 8), "val": counts})
    flags = [*SMALL, "--data", tmp_path / "set", "--stem", "imagenet"]
    best = tmp_path / "tuned" / "best.pt"
    train = "--batch-size 4 --epochs 4 --init scratch --arch resnet18".split()
    evaluations = {
        "default": ["--weights", best, "--recipe", "default", "--eval-only"],
        "knn": ["--weights", best, "--recipe", "knn", "--neighbours", "4"],
    }
    commands = [[*flags, *train, "--out", tmp_path / "tuned"]]
    for recipe, more in evaluations.items():
        commands.append([*flags, *more, "--out", tmp_path / f"{recipe}2"])
    commands = [[*map(str, command)] for command in commands]
    code = THREE_RUNS.format(here=str(HERE), out=str(tmp_path), commands=commands)
    (tmp_path / "run.py").write_text(code)
    done = torchrun(tmp_path / "run.py")
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"evaluated-0-{rank}.pt") for rank in (0, 1))
    # both processes have BatchNorm's saved statistics
    assert all(map(torch.equal, one, two))

    net = model.Classifier("resnet18", build_encoder("resnet18"), 3)
    weights.load_backbone(net.encoder, best)
    weights.load_head(net, best)
    net.eval()
    right = [0, 0, 0]
    source = data.open_images(str(tmp_path / "set"), "val", (32, 32), labelled=True)
    for i in range(len(source)):                             # one image at a time
        image = data.normalise(data.eval_transform((32, 32))(source.read(i))[None])
        label = source.labels[i]
        right[label] += int(net(image).argmax(1).item() == label)
    expected = {"top1": sum(right) / 71, "top5": 1.0, "images": 71, "per_class": {}}
    for label, (n, count) in enumerate(zip(right, counts)):
        expected["per_class"][f"c{label}"] = round(n / count, 4)

    for recipe, more in evaluations.items():
        finetune.main([*map(str, flags), *map(str, more), "--out", str(tmp_path / f"{recipe}1")])
        one, two = (
            json.loads((tmp_path / f"{recipe}{n}" / "result.json").read_text()) for n in (1, 2)
        )
        assert one == two
        if recipe == "default":
            assert {name: one[name] for name in expected} == expected


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {here!r})
import pretrain
from engine import command
right = pretrain.train_step
def train_step(step, *rest):
    if step == 1 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return right(step, *rest)
pretrain.train_step = train_step
right_clear = command.clear_frames
def clear_frames(error):
    time.sleep(1)                                            # torchrun's SIGTERM comes meanwhile
    right_clear(error)
command.clear_frames = clear_frames
pretrain.main()
"""


def test_the_other_processes_print_a_line_if_rank_0_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED.format(here=str(HERE)))
    flags = ("--data shapes --arch shufflenet_v2_x0_5 --image-size 64 --batch-size 4 --workers 0 "
             "--amp off --val 0")
    done = torchrun(tmp_path / "killed.py", *flags.split(), "--out", tmp_path / "run")
    lines = [line for line in done.stderr.splitlines() if line.startswith("pretrain.py: ")]
    assert done.returncode == 1
    assert len(lines) == 1
    assert lines[0].startswith("pretrain.py: rank 1: lost another process")


# ---- devices that are not here ----

@pytest.fixture
def pretend(monkeypatch):
    """Makes torch see an accelerator, or none. Nothing can run on it."""
    def see(kind):
        device = torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind != "cpu")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *given, **more: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        if kind != "cpu":
            module = getattr(torch, kind)
            monkeypatch.setattr(module, "set_device", lambda device: None, raising=False)
        return command.Distributed()
    return see


@pytest.mark.parametrize("kind, backend", [
    ("cuda", "cpu:gloo,cuda:nccl"),
    ("xpu", "cpu:gloo,xpu:xccl"),
    ("mps", "gloo"),
    ("cpu", "gloo"),
])
def test_the_accelerator_that_is_there_is_used_without_what_it_may_lack(
    kind, backend, pretend, few_images, tmp_path
):
    world = pretend(kind)
    world.set_device()
    assert world.device == (torch.device("cpu") if kind == "cpu" else torch.device(kind, 0))
    assert (world.on_gpu, world.backend) == (kind != "cpu", backend)
    if kind in ("mps", "xpu"):
        assert world.default_amp() == "off"
    # the switches for this kind of accelerator, on the CPU that is here
    world.device = torch.device("cpu")
    flags = f"--arch resnet18 --out {tmp_path}"
    _, run = prepared(pretrain, f"{' '.join(TINY)} {flags} --mask-size 32", world)
    assert run.optimizer.defaults["fused"] == (kind != "mps")
    assert run.loader.pin_memory == (kind == "cuda")
    assert run.memory_format == (torch.contiguous_format if kind == "mps" else torch.channels_last)
    _, tuned = prepared(finetune, f"{' '.join(SMALL)} {flags} --init scratch", world)
    assert tuned.optimizer.defaults["fused"] == (kind != "mps")
    assert tuned.val_loader.pin_memory == (kind == "cuda")
    world.use(kind)
    world.set_device("cpu")                                  # as asked for with --device
    assert not world.on_gpu
    assert world.device == torch.device("cpu") and world.backend == "gloo"


def test_a_device_that_cannot_be_used_gets_one_line(
    pretend, few_images, capsys, monkeypatch, tmp_path
):
    for here, asked, more, words in (
        ("cpu", "cuda", {},
         "--device cuda: torch sees no accelerator on this machine; use --device cpu"),
        ("mps", "cuda", {},
         "--device cuda: torch sees mps on this machine; use --device mps"),
        ("mps", None, dict(size=2),
         "2 processes on mps: one only; start it without torchrun, or use --device cpu"),
        ("xpu", None, dict(size=3, local_size=3),
         "--nproc_per_node=3: this machine has 2 GPUs"),
    ):
        world = pretend(here)
        vars(world).update(more)
        with pytest.raises(ValueError, match=re.escape(words)):
            world.set_device(asked)
    monkeypatch.setattr(torch, "__version__", "2.7.1+old")
    message = "--device mps: needs torch 2.8, this is 2.7.1+old"
    with pytest.raises(ValueError, match=re.escape(message)):
        pretend("mps").set_device()
    pretend("mps").set_device("cpu")
    pretend("cpu")
    code, said = complaint(capsys, *TINY, "--device", "xpu", "--out", tmp_path / "run")
    assert code == 2 and "--device xpu: torch sees no accelerator" in said and said.count("\n") == 1
    error = RuntimeError("MPS backend out of memory (MPS allocated: 8 GB, max allowed: 9 GB). "
                         "Tried to allocate 2 GB")
    code, line = command.explain(error, command.Distributed())
    assert code == 1 and line.startswith("not enough memory (MPS backend out of memory")


def test_the_device_is_not_remembered(few_images, tmp_path):
    """A run can be resumed on another device: args.json has the device, the checkpoint has not."""
    _, checkpoint = run(tmp_path / "run", "--epochs", "1", "--device", "cpu")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["device"] == "cpu"
    assert "device" not in checkpoint["args"]


# ---- loader workers ----

@pytest.mark.parametrize("batch", [5, 40])
def test_batches_stay_as_they_are_though_workers_reuse_their_memory(batch):
    """The batches of two workers, compared after all have come, equal the batches made here."""
    crop = data.CropAndFlip((32, 32), 0.5)
    samples = data.ImageDataset(data.Shapes("train", (32, 32)), crop, seed=0)
    # 203 images: the last batch is smaller
    keys = data.every_image_once(203, batch, SimpleNamespace(rank=0, size=1))
    world = SimpleNamespace(on_cuda=False)
    here, there = (list(data.make_loader(samples, keys, workers, world)) for workers in (0, 2))
    assert len(here) == len(there) == math.ceil(203 / batch)
    for a, b in zip(here, there):
        assert all(map(torch.equal, a, b))
        assert a[0].stride() == b[0].stride() and a[0].stride(1) == 1
        assert not b[0].is_shared()                          # copied out of the workers' memory


BUG = """
import sys
import pretrain
def bug(*given, **more):
    raise RuntimeError("a bug of a fork")
pretrain.a2mim_loss = bug
pretrain.main(sys.argv[1:])
"""


def test_a_bug_ends_the_run_at_once_with_its_traceback_though_workers_ignore_sigterm(tmp_path):
    flags = ("--data shapes --arch deit_tiny --image-size 64 --mask-size 16 --batch-size 8 "
             "--epochs 1 --sheets 0 --workers 2")
    done = run_code(BUG, *flags.split(), "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "in bug" in done.stderr and "RuntimeError: a bug of a fork" in done.stderr


def in_workers(monkeypatch, act):
    """Makes a loader worker run act() before it reads an image; the main process only reads."""
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
    assert code == 1 and "Traceback" not in said
    assert "a loader worker was killed" in last and "--workers 0" in last


def test_a_full_shared_memory_gets_one_line_that_names_the_cure():
    world = command.Distributed()
    for error in (
        "unable to allocate shared memory(shm) for file </torch_7>: No space left on device",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory.",
    ):
        code, line = command.explain(RuntimeError(error), world)
        assert code == 1
        for cure in ("/dev/shm", "--workers 0", "--shm-size", "--ipc=host"):
            assert cure in line


WORKER_RAISES = """
import os, sys
import data, pretrain
main, right = os.getpid(), data.Shapes.read
def read(self, index, **more):
    if os.getpid() != main:
        raise TypeError("the label is odd")
    return right(self, index, **more)
data.Shapes.read = read
pretrain.main(sys.argv[1:])
"""


def test_a_process_whose_worker_raised_ends_after_its_line(tmp_path):
    """torch raises the error again from a frame that holds the loader, and with it the workers,
    which ignore SIGTERM: they must not keep the process alive."""
    flags = ("--data shapes --arch shufflenet_v2_x0_5 --image-size 64 --batch-size 8 --workers 1 "
             "--val 0")
    done = run_code(WORKER_RAISES, *flags.split(), "--out", tmp_path)
    assert done.returncode == 1 and "the label is odd" in done.stderr


def test_a_mistake_found_by_a_worker_is_printed_without_the_workers_name():
    error = ValueError("Caught ValueError in DataLoader worker process 0.\n"
                       "Traceback:\n  x\nValueError: a: b is odd")
    assert command.explain(error, command.Distributed()) == (2, "error: a: b is odd")


def test_a_loader_that_fails_during_a_run_is_a_failed_run_that_can_be_resumed(
    few_images, capsys, tmp_path, monkeypatch
):
    log, final = run(tmp_path / "whole", *FLAGS)
    step = pretrain.train_step

    def gone(at, *rest):
        if at == 5:
            raise command.Failed("the data are gone")
        return step(at, *rest)

    monkeypatch.setattr(pretrain, "train_step", gone)
    code, said = complaint(capsys, *TINY, *FLAGS, "--save-every", "100", "--out", tmp_path / "cut")
    advice = f"(stopped after step 5; go on with --out {tmp_path / 'cut'} --resume)"
    assert code == 1 and said.splitlines()[-1] == f"pretrain.py: the data are gone {advice}"
    monkeypatch.setattr(pretrain, "train_step", step)
    again, repeated = run(tmp_path / "cut", *FLAGS, "--resume")
    assert again == log
    same_weights(final, repeated)


# ---- the learning rate of a run ----

def test_each_step_has_the_lr_of_its_schedule(few_images, tmp_path):
    flags = "--epochs 2 --warmup-epochs 0.5 --min-lr 1e-5 --schedule cosine"
    log, _ = run(tmp_path / "pre", *flags.split())
    peak, floor = 0.03 * 8 / 512, 1e-5                       # TINY: --lr 0.03, 8 images a step
    expected = []
    for t in range(8):                                       # two of them warm up
        cosine = floor + (peak - floor) / 2 * (1 + math.cos(math.pi * (t - 2) / 6))
        expected.append(min(1, t / 2) * cosine)
    assert [line["lr"] for line in log] == pytest.approx(expected)

    flags = ("--init scratch --arch resnet18 --schedule cosine-by-epoch --warmup-epochs 0 "
             "--min-lr 0 --lr 1e-3")
    tune(tmp_path / "tuned", *flags.split())
    rates = [line["lr"] for line in read_log(tmp_path / "tuned")]
    assert rates == pytest.approx([5e-4] * 4 + [2.5e-4] * 4)   # 1e-3 x 8 / 16; half in epoch 2 of 2


# ---- faults: signals, disks, checkpoints ----

FLAGS = ["--epochs", "2", "--drop-path", "0.1", "--save-every", "1"]


@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 143),
    (signal.SIGINT, 130),
    (signal.SIGHUP, 129),
])
def test_a_signal_finishes_the_step_saves_and_the_resumed_run_is_the_uninterrupted_one(
    number, code, few_images, capsys, tmp_path, monkeypatch
):
    if number == signal.SIGHUP:                              # nohup ignores it, and that is kept
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
    assert got == code
    advice = f"go on with --out {tmp_path / 'cut'} --resume"
    assert f"stopped by {number.name} after step 3 of 8; {advice}" in said
    monkeypatch.setattr(pretrain, "train_step", step)
    pretrain.main(["--data", "shapes", "--out", str(tmp_path / "cut"), "--resume"])
    assert read_log(tmp_path / "cut") == log
    same_weights(final, torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True))
    assert signal.getsignal(number) == before                # the handler is restored


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


def with_nan(path):
    state = torch.load(path, weights_only=True)
    state["model"]["decoder.0.bias"][0] = math.nan
    torch.save(state, path)


@pytest.mark.parametrize("spoil", [truncate, flip_a_byte, with_nan])
def test_the_checkpoint_before_is_used_if_the_last_one_is_broken(
    spoil, few_images, capsys, tmp_path
):
    log, final = run(tmp_path / "run", *FLAGS)
    spoil(tmp_path / "run" / "checkpoint.pt")
    assert torch.load(tmp_path / "run" / "checkpoint-previous.pt", weights_only=True)["step"] == 7
    again, repeated = run(tmp_path / "run", *FLAGS, "--resume")
    assert "checkpoint-previous.pt, step 7" in capsys.readouterr().err
    assert again == log
    same_weights(final, repeated)


def test_a_disk_that_is_full_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    files.save_atomically({"step": 1}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file may grow beyond 100 kB: EFBIG instead of ENOSPC
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint.pt not written"):
            state = {"step": 2, "big": torch.zeros(10**6)}
            files.save_atomically(state, path, keep_previous=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cause, cure", [(errno.ENOSPC, "make room"), (errno.EROFS, "repair that")])
def test_a_run_whose_last_checkpoint_is_not_written_fails_and_can_be_resumed(
    cause, cure, few_images, capsys, tmp_path, monkeypatch
):
    log, final = run(tmp_path / "whole", *FLAGS)
    save = checkpointer.save_atomically
    capsys.readouterr()

    def full(state, path, **more):
        if path.name == "checkpoint.pt" and state["step"] == final["step"]:
            with files.replace_atomically(path):
                raise OSError(cause, os.strerror(cause))
        save(state, path, **more)

    monkeypatch.setattr(checkpointer, "save_atomically", full)
    code, said = complaint(capsys, *TINY, *FLAGS, "--out", tmp_path / "cut")
    assert code == 1
    assert f"{cure}, then go on with --out {tmp_path / 'cut'} --resume" in said
    assert "done:" not in said
    monkeypatch.setattr(checkpointer, "save_atomically", save)
    again, repeated = run(tmp_path / "cut", *FLAGS, "--resume")
    assert again == log and (tmp_path / "cut" / "backbone.pt").is_file()
    same_weights(final, repeated)


def test_a_broken_checkpoint_never_replaces_the_whole_one_before_it(
    few_images, tmp_path, monkeypatch
):
    run(tmp_path, *FLAGS)
    (tmp_path / "checkpoint.pt").write_bytes(b"garbage")
    before = (tmp_path / "checkpoint-previous.pt").read_bytes()
    replace = os.replace

    def killed(old, new):
        if Path(new).name == "checkpoint.pt":
            raise KeyboardInterrupt      # where a SIGKILL would hurt: before the file gets its name
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        run(tmp_path, "--resume", "--epochs", "3", "--save-every", "1")
    assert (tmp_path / "checkpoint-previous.pt").read_bytes() == before


HOLD = """
import sys
from pathlib import Path
from engine.files import lock_folder
lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()                                             # until it is killed
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(
    few_images, capsys, tmp_path
):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=HERE, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    refusal = "another run is writing there; wait for its end, or choose another --out"
    try:
        assert other.stdout.readline() == "locked\n"
        for more in ([], ["--resume"]):
            code, said = complaint(capsys, *TINY, "--epochs", "1", "--out", tmp_path, *more)
            assert code == 2 and refusal in said and said.count("\n") == 1
            assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    finally:
        other.kill()
        other.wait()
    run(tmp_path, "--epochs", "1")       # the kernel has released the lock of the killed process


@pytest.mark.parametrize("name", [
    "checkpoint.pt", "checkpoint-previous.pt", "backbone.pt", "log.jsonl", "args.json",
])
@pytest.mark.parametrize("make, kind", [
    (os.mkdir, "is a folder"),
    (os.mkfifo, "is a pipe or device"),
])
def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_refused_at_the_start(
    name, make, kind, few_images, capsys, tmp_path
):
    make(tmp_path / name)
    code, said = complaint(capsys, *TINY, "--out", tmp_path, "--resume")
    assert code == 2 and f"{tmp_path / name}: {kind}, a run writes a file of this name" in said
    assert said.count("\n") == 1


def test_best_pt_that_cannot_be_written_fails_the_run_and_resume_writes_it(
    few_images, capsys, tmp_path
):
    flags = ("--init scratch --arch shufflenet_v2_x0_5 --image-size 32 --data shapes --epochs 1 "
             "--batch-size 8 --workers 0 --amp off")
    (tmp_path / "best.pt.tmp").mkdir()
    code, said = complaint(capsys, *flags.split(), "--out", tmp_path, main=finetune.main)
    last = said.splitlines()[-1]
    assert code == 1 and "best.pt not written" in last and "--resume" in last
    assert not (tmp_path / "result.json").exists()
    (tmp_path / "best.pt.tmp").rmdir()
    finetune.main(["--out", str(tmp_path), "--resume"])
    assert (tmp_path / "best.pt").is_file() and (tmp_path / "result.json").is_file()


def test_a_disk_that_fails_during_an_evaluation_ends_the_run_with_one_line(
    few_images, capsys, tmp_path, monkeypatch
):
    def fails(*given):
        raise OSError("the disk of the validation images is gone")

    monkeypatch.setattr(finetune, "evaluate", fails)
    flags = [*SMALL, "--init", "scratch", "--arch", "resnet18", "--out", tmp_path / "run"]
    code, said = complaint(capsys, *flags, main=finetune.main)
    assert code == 1
    assert said.splitlines()[-1] == "finetune.py: the disk of the validation images is gone"
    assert "not written" not in said


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

    def limit_files(*given):                 # from here on no file may grow beyond `room` bytes
        found = outputs(*given)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        return found

    if file == "result.json":                                # it is smaller than the picture
        monkeypatch.setattr(results, "save_confusion", lambda path, *given: path.touch())
    monkeypatch.setattr(finetune, "outputs", limit_files)
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


LIMITED = """
import resource, sys
import pretrain
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (2 << 30)           # 2 GB more than now
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
pretrain.main(sys.argv[1:])
"""


def test_an_image_size_beyond_memory_gets_one_line(tmp_path):
    flags = ("--data shapes --arch resnet18 --image-size 8192 --batch-size 16 --workers 0 "
             "--amp off --sheets 0")
    done = run_code(LIMITED, *flags.split(), "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "pretrain.py: not enough memory" in done.stderr
    assert "use a smaller --image-size" in done.stderr
    assert "Traceback" not in done.stderr


CRAFTED = {                                                  # key, or (key, key in it) -> value
    "step": "x",
    "per_epoch": 0,
    "world": 0,
    "skipped": "a",
    "args": [],
    "model": [],
    "broken": 5,
    "optimizer": 7,
    ("args", "program"): None,
    ("args", "workers"): "a",
    ("args", "image_size"): [],
    ("args", "lr"): "nan",
    ("args", "arch"): "resnet51",
    ("args", "amp"): "fp8",
    ("args", "epochs"): {},
    ("args", "save_every"): "soon",
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
    assert code == 2 and "Traceback" not in said
    assert f"{tmp_path / 'checkpoint.pt'}: " in said.splitlines()[-1]


def test_a_checkpoint_with_weights_that_are_nan_is_not_resumed(few_images, capsys, tmp_path):
    run(tmp_path, "--epochs", "0.25")
    with_nan(tmp_path / "checkpoint.pt")
    code, said = complaint(capsys, "--out", tmp_path, "--resume")
    assert code == 2 and "weights that are NaN" in said


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").touch()
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(files, "load_checked", Mock(side_effect=refused))
    with pytest.raises(ValueError, match="checkpoint.pt: cannot be opened .Permission denied."):
        files.read_checkpoint(tmp_path)


# ---- faults: losses and weights that are not finite ----

def test_a_step_that_another_process_cannot_make_is_counted_here_too(
        few_images, tmp_path, monkeypatch):
    """DDP averages the gradients, so one that is not finite stops the update of all."""
    reduce = command.Distributed.all_reduce_sum
    steps = []

    def with_a_second_process(self, values):
        if values.dtype == torch.int32:                      # is the loss not finite, 0 or 1
            steps.append(int(values))
            return values + (len(steps) == 3)
        return reduce(self, values)

    monkeypatch.setattr(command.Distributed, "all_reduce_sum", with_a_second_process)
    log, _ = run(tmp_path / "run", *FLAGS, "--epochs", "1")
    assert steps == [0, 0, 0, 0]
    assert [line.get("skipped", 0) for line in log] == [0, 0, 1, 1]


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(few_images, tmp_path, monkeypatch):
    right = pretrain.a2mim_loss
    calls = []

    def once_nan(*args, **kwargs):
        calls.append(1)
        total, parts = right(*args, **kwargs)
        return (total * math.nan if len(calls) == 3 else total), parts

    saved = {}                                               # step -> weights, of each checkpoint
    save = checkpointer.save_atomically

    def note_and_save(state, path, **more):
        weights_now = {name: value.clone() for name, value in state.get("model", {}).items()}
        saved[state.get("step")] = weights_now
        save(state, path, **more)

    monkeypatch.setattr(pretrain, "a2mim_loss", once_nan)
    monkeypatch.setattr(checkpointer, "save_atomically", note_and_save)
    log, _ = run(tmp_path / "run", *FLAGS, "--epochs", "1")
    assert [line["loss"] is None for line in log] == [False, False, True, False]
    assert [line.get("skipped", 0) for line in log] == [0, 0, 1, 1]
    assert set(saved) == {None, 1, 2, 4}                     # None: backbone.pt; no step 3
    assert all(value.isfinite().all() for value in saved[4].values())
    assert not torch.equal(saved[2]["decoder.0.bias"], saved[4]["decoder.0.bias"])

    calls.clear()
    more = ["--epochs", "1", "--log-every", "4", "--save-every", "100"]
    seldom, _ = run(tmp_path / "seldom", *FLAGS, *more)
    assert [line["step"] for line in seldom] == [1, 4]
    mean = (log[1]["loss"] + log[3]["loss"]) / 2             # of steps 2 and 4
    assert seldom[1]["loss"] == pytest.approx(mean, abs=2e-6)


def test_a_step_that_overflows_leaves_no_trace_in_batchnorm(few_images, tmp_path, monkeypatch):
    right, calls = pretrain.normalise, []

    def once_inf(images, device):
        if len(images) == 8:                                 # a batch, not the six pictures
            calls.append(1)
        return right(images, device) * (math.inf if len(calls) == 3 else 1)

    monkeypatch.setattr(pretrain, "normalise", once_inf)
    log, final = run(tmp_path / "run", *FLAGS, "--epochs", "1", "--arch", "resnet18")
    assert [line.get("skipped", 0) for line in log] == [0, 0, 1, 1]
    for name, value in final["model"].items():
        assert not value.is_floating_point() or value.isfinite().all(), name
    assert final["scaler"]["scale"] == 1


@pytest.mark.parametrize("main, name", [(pretrain.main, "a2mim_loss"),
                                        (finetune.main, "class_loss")])
def test_gradients_that_are_not_finite_stop_the_run_although_the_loss_is_finite(
    main, name, few_images, capsys, tmp_path, monkeypatch
):
    """The square root of 0 has an infinite slope: a mistake that a fork makes easily."""
    module = sys.modules[main.__module__]
    right = getattr(module, name)

    def with_a_root(pred, *rest, **more):
        found = right(pred, *rest, **more)
        zero = (pred - pred.detach()).square().sum().sqrt()
        return (found[0] + zero, found[1]) if name == "a2mim_loss" else found + zero

    monkeypatch.setattr(module, name, with_a_root)
    base = TINY if main is pretrain.main else [*SMALL, "--init", "scratch", "--stem", "imagenet"]
    code, said = complaint(capsys, *base, "--arch", "resnet18", "--epochs", "5",
                           "--out", tmp_path / "run", main=main)
    assert code == 1 and "loss or gradient is not finite, 10 times in a row at step 10" in said
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_moving_average_keeps_finite_statistics_after_a_bad_step(few_images, tmp_path,
                                                                   monkeypatch):
    right, calls = finetune.normalise, []
    keep = checkpointer.Checkpointer.keep_best
    are_finite = []

    def once_nan(images, device):
        calls.append(1)
        return right(images, device) * (math.nan if len(calls) == 4 else 1)

    def note_and_keep(self, best, name, value, weights, *rest):
        are_finite.append(all(bool(tensor.isfinite().all()) for tensor in weights.values()))
        keep(self, best, name, value, weights, *rest)

    monkeypatch.setattr(finetune, "normalise", once_nan)
    monkeypatch.setattr(checkpointer.Checkpointer, "keep_best", note_and_keep)
    tune(tmp_path / "run", "--init", "scratch", "--arch", "resnet18", "--ema", "0.9",
         "--eval-every", "1")                                # the last step of an epoch is bad
    assert are_finite == [True, True]


def test_a_loss_that_is_not_finite_stops_the_run_with_exit_code_1_and_keeps_the_checkpoint(
    few_images, capsys, tmp_path, monkeypatch
):
    run(tmp_path / "run", "--epochs", "1")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    right = pretrain.a2mim_loss

    def nan(*given, **more):
        total, parts = right(*given, **more)
        return total * math.nan, parts

    monkeypatch.setattr(pretrain, "a2mim_loss", nan)
    flags = ["--data", "shapes", "--out", tmp_path / "run", "--epochs", "5", "--save-every", "1"]
    code, said = complaint(capsys, *flags, "--resume")
    assert code == 1 and "loss or gradient is not finite, 10 times in a row at step 14" in said
    assert "checkpoint.pt is kept" in said
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_run_whose_weights_are_not_finite_is_not_called_done(few_images, capsys, tmp_path):
    for name, epochs in (
        ("short", "1"),                                      # 4 steps, 3 of them are bad
        ("step", "0.25"),                                    # 1 step, which looks good
    ):
        out = tmp_path / name
        code, said = complaint(capsys, *TINY, "--lr", "1e308", "--epochs", epochs, "--out", out)
        assert code == 1 and "not finite" in said and "lower --lr" in said
        assert "done" not in said
        assert not (out / "checkpoint.pt").exists()
        assert not (out / "backbone.pt").exists()


def test_a_run_whose_last_steps_are_not_finite_is_not_called_done(
    few_images, capsys, tmp_path, monkeypatch
):
    right = pretrain.train_step

    def bad_at_the_end(step, *rest):
        record = right(step, *rest)
        return {name: value * (math.nan if step >= 6 else 1) for name, value in record.items()}

    monkeypatch.setattr(pretrain, "train_step", bad_at_the_end)
    code, said = complaint(capsys, *TINY, *FLAGS, "--out", tmp_path)
    assert code == 1 and "loss or gradient is not finite, 2 times in a row at step 8" in said
    assert "done" not in said
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6


def test_a_step_that_is_not_finite_on_one_process_is_left_out_of_the_means_of_all():
    others = torch.tensor([[5.0], [7.0], [math.nan], [3.0], [1.0]])          # of the other process
    cpu = torch.device("cpu")
    world = SimpleNamespace(device=cpu, all_reduce_mean=lambda values: (values + others) / 2)
    means = progress.RunningMeans(world)
    for mine in (1.0, 2.0, 3.0, math.inf, 4.0):
        means.add({"spatial": torch.tensor(9.0), "loss": torch.tensor(mine)})
    expected = {"spatial": (14 + 16 + 10) / 6, "loss": (6 + 9 + 5) / 6}      # of steps 1, 2 and 5
    assert means.take() == pytest.approx(expected, abs=1e-6)
    world.all_reduce_mean = lambda values: values * math.nan
    means.add({"spatial": torch.tensor(9.0), "loss": torch.tensor(1.0)})
    assert means.take() == {"spatial": None, "loss": None}


# ---- the log ----

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
            mean = statistics.mean(one[name] for one in since)
            assert line[name] == pytest.approx(mean, abs=2e-6)
        before = line["step"]

    step = pretrain.train_step
    monkeypatch.setattr(pretrain, "train_step", failing_at(5, step))
    with pytest.raises(SystemExit):                          # between the lines of steps 4 and 6
        run(tmp_path / "cut", *flags, "--log-every", "3", "--save-every", "5")
    shutil.copytree(tmp_path / "cut", tmp_path / "old")
    monkeypatch.setattr(pretrain, "train_step", step)
    assert run(tmp_path / "cut", "--resume", base=[])[0] == log
    saved = torch.load(tmp_path / "old" / "checkpoint.pt", weights_only=True)
    del saved["means"]                                       # a checkpoint of an older version
    torch.save(saved, tmp_path / "old" / "checkpoint.pt")
    old, _ = run(tmp_path / "old", "--resume", base=[])
    assert old[:3] == log[:3] and old[4] == log[4]
    assert old[3]["loss"] == each[5]["loss"]                 # of step 6 alone: step 5 is not known


def test_a_log_file_gets_a_plain_line_an_epoch(few_images, capsys, tmp_path):
    started = time.time()
    log, _ = run(tmp_path / "run", *QUICK, "--epochs", "2", "--val", "0.5")
    said = capsys.readouterr().err
    form = (r"^(\S+ \S+)  epoch (\d)/2  step (\d)/8  loss ([\d.]+)  "
            r"(.*)(\d+) images/s  00:\d\d left$")
    lines = re.findall(form, said, re.M)
    assert [line[1:3] for line in lines] == [("1", "4"), ("2", "8")]
    assert "\r" not in said and "it/s" not in said
    losses = [line["loss"] for line in log if "loss" in line]
    means = [statistics.mean(part) for part in (losses[:4], losses[4:])]
    assert [float(line[3]) for line in lines] == pytest.approx(means, abs=6e-5)
    page = (HERE / "docs" / "robustness.md").read_text()
    for line in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()):
        assert started - 1 < line["time"] < time.time() + 1
        assert all(f"`{key}`" in page for key in line)


def test_a_long_epoch_gets_a_plain_line_every_ten_minutes_and_a_terminal_a_bar(capsys, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime)
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

    silent = progress.Progress(world, plan, done=0)
    for done in range(101):                                  # with no log line so far
        now[0] += 6
        silent.update()
    assert re.fullmatch(r"\S+ \S+  epoch 0.101/2  step 101/2000  1 images/s  \S+ left\n",
                        capsys.readouterr().err)

    walk(progress.Progress(world, plan, done=0))
    lines = capsys.readouterr().err.splitlines()
    steps = [int(re.search(r"step (\d+)/2000", line)[1]) for line in lines]
    assert steps == [*range(101, 1000, 101), 1000]           # the first step beyond 600 s
    assert "loss 0.0750  1 images/s  3:09:54 left" in lines[0]       # (0.05 + 0.1) / 2; 1899 x 6 s
    assert "held-out" not in lines[3] and "held-out 0.2500 (step 500)" in lines[5]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    walk(progress.Progress(world, plan, done=0))
    bar = terminal.getvalue()
    assert "\r" in bar and "1000/2000" in bar and " left" not in bar


def test_a_stderr_that_cannot_be_written_ends_no_run(few_images, tmp_path):
    code = "import pretrain, sys; pretrain.main(sys.argv[1:])"
    flags = ("--data shapes --arch shufflenet_v2_x0_5 --image-size 64 --batch-size 8 --workers 0 "
             "--amp off --epochs 0.002")
    call = [sys.executable, "-c", code, *flags.split(), "--out", tmp_path]
    with open("/dev/full", "w") as full:
        done = subprocess.run(call, cwd=HERE, stderr=full, timeout=240)
    assert done.returncode == 0 and (tmp_path / "backbone.pt").is_file()


@pytest.mark.parametrize("line", [
    "5", '{"note": 1}', "[1, 2]", '{"step": "x", "epoch": 1}', "\xff\xfe broken",
])
def test_a_log_with_odd_lines_is_resumed_without_them(line, few_images, tmp_path):
    run(tmp_path, "--epochs", "1")
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    log, _ = run(tmp_path, "--resume", "--epochs", "2", base=[])
    assert [entry["step"] for entry in log] == list(range(1, 9))
