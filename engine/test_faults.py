"""What docs/robustness.md promises: signals, processes, disks, counters, content of a checkpoint.

    pytest engine/test_faults.py        about a minute on 1 CPU core

More tests of faults, with one process, are in test_runs.py.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import finetune
import pretrain
from engine import checkpointer, command, files
from engine.testing import (HERE, TINY, complaint, paint, read_log, run, run_code, same_weights,
                            torchrun, tune)

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

EIGHT_STEPS = ["--epochs", "2", "--drop-path", "0.1", "--save-every", "1"]
IN_A_PROCESS = ("--data shapes --arch shufflenet_v2_x0_5 --image-size 64 --batch-size 8 --val 0 "
                "--sheets 0 --amp off --log-every 1 --workers").split()


def started(code, *flags, **options):
    """Runs pretrain.py in a process of its own, with a train_step that `code` has changed."""
    code = f"{code}\npretrain.train_step = train_step\npretrain.main(sys.argv[1:])\n"
    return run_code(code, *flags, **options)


# ---- signals ----

TO_THE_GROUP = """
import os, signal, sys, time
import pretrain

def train_step(step, *rest, right=pretrain.train_step):
    if step == 1:
        os.killpg(0, signal.SIGTERM)
        time.sleep(1)                                        # torch would report a dead worker here
    return right(step, *rest)
"""


def test_a_signal_to_the_whole_group_as_from_a_terminal_leaves_the_workers_alive(tmp_path):
    done = started(TO_THE_GROUP, *IN_A_PROCESS, 2, "--out", tmp_path, start_new_session=True)
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM after step 2" in done.stderr


TWICE = """
import os, signal, sys, time
import pretrain

def train_step(*given, right=pretrain.train_step):
    for _ in range(20):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    return right(*given)
"""


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    done = started(TWICE, *IN_A_PROCESS, 0, "--out", tmp_path)
    assert done.returncode == 130 and "stopped by" not in done.stderr


TO_ONE_OF_TWO = """
import os, signal, sys
sys.path.insert(0, {here!r})
import pretrain

right = pretrain.train_step

def train_step(step, *rest):
    if step == 2 and os.environ["RANK"] == "1" and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    return right(step, *rest)

pretrain.train_step = train_step
pretrain.main()
"""


def test_a_signal_to_one_of_two_processes_stops_both_and_the_resumed_run_is_the_uninterrupted_one(
    tmp_path
):
    script = tmp_path / "stopped.py"
    script.write_text(TO_ONE_OF_TWO.format(here=str(HERE)))
    flags = [*IN_A_PROCESS, 0, "--batch-size", 4, "--epochs", 0.005]         # 6 steps
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = torchrun("pretrain.py", *flags, "--out", whole)
    assert done.returncode == 0, done.stderr
    done = torchrun(script, *flags, "--out", cut)
    assert done.returncode == 1
    assert done.stderr.count("stopped by SIGTERM after step 3 of 6") == 1
    done = torchrun(script, "--out", cut, "--resume")
    assert done.returncode == 0, done.stderr
    assert read_log(cut) == read_log(whole)
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, cut))
    same_weights(a, b)

    said = []
    one = SimpleNamespace(size=1, print0=said.append)
    saved = dict(step=6, per_epoch=4, world=2)
    assert checkpointer.StepPlan.resume_step(saved, 4, 8, one) == 6
    assert "of 2 processes" in said[0]


def test_a_mistake_of_two_processes_is_one_line(tmp_path):
    done = torchrun("pretrain.py", "--data", tmp_path / "gone", "--out", tmp_path / "x")
    lines = [line for line in done.stderr.splitlines() if line.startswith("pretrain.py: ")]
    assert done.returncode == 1 and len(lines) == 1 and "no such folder" in lines[0]


# ---- files and disks ----

def test_a_file_is_flushed_to_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        events.append(("flushed", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def named(old, new):
        events.append(("named", os.stat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    files.save_atomically({"step": 1}, tmp_path / "checkpoint.pt")
    inode = (tmp_path / "checkpoint.pt").stat().st_ino
    assert events == [("flushed", inode), ("named", inode)]


def test_a_log_line_that_a_full_disk_has_cut_is_ended_and_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "epo')
    files.append_line(log, {"step": 2, "epoch": 1})
    assert files.read_lines(log) == [{"step": 2, "epoch": 1}]


def test_a_disk_that_is_full_for_a_while_neither_ends_nor_changes_a_run(
    few_images, capsys, tmp_path, monkeypatch
):
    log, final = run(tmp_path / "whole", *EIGHT_STEPS)
    save = checkpointer.save_atomically

    def full(state, path, **more):
        if path.name == "checkpoint.pt" and state["step"] == 3:
            raise OSError("no space left on device")
        save(state, path, **more)

    monkeypatch.setattr(checkpointer, "save_atomically", full)
    again, repeated = run(tmp_path / "full", *EIGHT_STEPS)   # exit code 0
    said = capsys.readouterr().err
    assert "step 3: checkpoint.pt not written (no space left on device)" in said
    assert again == log
    same_weights(final, repeated)


def test_a_checkpoint_is_due_after_minutes_and_the_speed_is_images_over_time(
    few_images, tmp_path, monkeypatch
):
    now, written = [1e9], []
    step, save = pretrain.train_step, checkpointer.Checkpointer.save

    def slow(*given):
        now[0] += 25                                         # seconds
        return step(*given)

    def noted(self):
        written.append(self.done)
        save(self)

    clock = SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(checkpointer, "time", clock)
    monkeypatch.setattr(pretrain, "train_step", slow)
    monkeypatch.setattr(checkpointer.Checkpointer, "save", noted)
    run(tmp_path, *"--epochs 2 --save-every 1m --log-every 3".split())
    assert written == [3, 6, 8]                              # after 75 s each, and at the end
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    speeds = [line["images_per_s"] for line in lines]
    assert speeds == [pytest.approx(8 / 25, abs=0.05)] * len(lines)          # 8 images in 25 s


def test_weights_without_a_log_are_not_overwritten(few_images, tmp_path, capsys, monkeypatch):
    """Such as those fetched from a server."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", "--epochs", "1")
    (tmp_path / "run" / "log.jsonl").unlink()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    code, said = complaint(capsys, *TINY, "--out", tmp_path / "run")
    assert code == 2 and "already holds a run" in said
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before

    (tmp_path / "run" / "checkpoint.pt").unlink()
    (tmp_path / "run" / "checkpoint-previous.pt").unlink(missing_ok=True)
    before = (tmp_path / "run" / "backbone.pt").read_bytes()
    for more in ([], ["--resume"]):                          # there is nothing to resume
        code, said = complaint(capsys, *TINY, *more, "--out", tmp_path / "run")
        assert code == 2 and "holds backbone.pt, and no run that could be resumed" in said
    assert (tmp_path / "run" / "backbone.pt").read_bytes() == before


def test_a_folder_that_another_run_used_in_the_meantime_is_not_used_again(
        few_images, tmp_path, capsys, monkeypatch):
    prepare = pretrain.prepare

    def slow(*given):
        monkeypatch.setattr(pretrain, "prepare", prepare)
        run(tmp_path / "run", "--epochs", "1")               # begins later, and ends before
        return prepare(*given)

    monkeypatch.setattr(pretrain, "prepare", slow)
    code, said = complaint(capsys, *TINY, "--epochs", "2", "--out", tmp_path / "run")
    assert code == 2 and "another run has used it since this one began" in said
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4


def test_a_finished_run_writes_a_backbone_again_that_was_moved_away(few_images, tmp_path):
    run(tmp_path / "run", "--epochs", "1")
    before = (tmp_path / "run" / "backbone.pt").read_bytes()
    (tmp_path / "run" / "backbone.pt").unlink()
    pretrain.main(["--out", str(tmp_path / "run"), "--resume"])
    assert (tmp_path / "run" / "backbone.pt").read_bytes() == before


# ---- what a checkpoint holds ----

def test_best_pt_is_of_the_best_epoch_and_a_resumed_run_still_knows_it(
    few_images, tmp_path, monkeypatch
):
    evaluate, evaluated = finetune.evaluate, []
    # of epochs 1 to 4; of epoch 4 again, which a resumed run measures first; of epoch 5
    scores = iter([0.2, 0.6, 0.6, 0.4, 0.4, 0.5])

    def scored(model, *rest):
        evaluated.append(model.encoder.backbone.conv1.weight.detach().clone())
        return {**evaluate(model, *rest), "top1": next(scores)}

    monkeypatch.setattr(finetune, "evaluate", scored)
    out = tmp_path / "run"

    def check(last):
        result = json.loads((out / "result.json").read_text())
        assert (result["best_top1"], result["best_epoch"], result["top1"]) == (0.6, 2, last)
        best = torch.load(out / "best.pt")["conv1.weight"]
        assert torch.equal(best, evaluated[1]) and not torch.equal(best, evaluated[2])

    tune(out, *"--init scratch --arch resnet18 --epochs 4 --eval-every 1".split())
    check(last=0.4)
    finetune.main(["--out", str(out), "--resume", "--epochs", "5"])
    check(last=0.5)


def test_skipped_steps_are_counted_on_after_resume(few_images, tmp_path, monkeypatch):
    right, calls = pretrain.a2mim_loss, []

    def nan_at_2(*given, **more):
        calls.append(1)
        total, parts = right(*given, **more)
        return total * (math.nan if len(calls) == 2 else 1), parts

    monkeypatch.setattr(pretrain, "a2mim_loss", nan_at_2)
    run(tmp_path, "--epochs", "1")
    log, state = run(tmp_path, "--resume", "--epochs", "2", base=[])
    assert [line.get("skipped", 0) for line in log] == [0] + [1] * 7
    assert state["skipped"] == 1


def test_unreadable_images_are_remembered_after_resume(tmp_path):
    folder, out = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i in range(15):
        paint(folder / f"{i:02}.png", size=(64, 64))
    (folder / "bad.png").write_text("no image")
    flags = [*TINY, "--data", str(folder)]
    run(out, "--max-bad", "0.5", "--epochs", "1", base=flags)
    paint(folder / "bad.png", size=(64, 64))                 # repaired
    log, _ = run(out, "--resume", "--epochs", "2", base=[])
    assert log[-1]["broken"] == 1


def test_the_scale_of_fp16_is_resumed(few_images, tmp_path):
    _, state = run(tmp_path, "--epochs", "0.25", "--amp", "fp16")
    state["scaler"]["scale"] = 128.0
    torch.save(state, tmp_path / "checkpoint.pt")
    _, state = run(tmp_path, "--resume", "--epochs", "0.5", base=[])
    assert state["scaler"]["scale"] == 128.0


def test_a_loader_that_fails_between_two_forward_passes_leaves_no_trace(
    few_images, capsys, tmp_path, monkeypatch
):
    flags = [*EIGHT_STEPS, *"--arch resnet18 --batch-size 4 --accum 2".split()]
    log, final = run(tmp_path / "whole", *flags)
    step = pretrain.train_step

    def half(batches):
        yield next(batches)
        raise command.Failed("the data are gone")

    def gone(at, batches, *rest):
        return step(at, half(batches) if at == 5 else batches, *rest)

    monkeypatch.setattr(pretrain, "train_step", gone)
    code, _ = complaint(capsys, *TINY, *flags, "--save-every", "100", "--out", tmp_path / "cut")
    assert code == 1
    monkeypatch.setattr(pretrain, "train_step", step)
    again, repeated = run(tmp_path / "cut", "--resume", base=[])
    assert again == log
    for name, value in final["model"].items():
        if value.is_floating_point():                        # nothing reads BatchNorm's counters
            assert torch.equal(value, repeated["model"][name]), name


# ---- the folder of a run ----

def test_default_folders_are_numbered_and_resume_takes_the_newest(
    few_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    choose, name = checkpointer.choose_folder, "shapes-resnet18"
    assert choose(None, name, False) == f"runs/{name}" and not Path("runs").exists()
    for suffix in ("", "-2", "-10"):
        Path(f"runs/{name}{suffix}").mkdir(parents=True)
        Path(f"runs/{name}{suffix}/log.jsonl").touch()
    assert choose(None, name, False) == f"runs/{name}-11"
    assert choose(None, name, True) == f"runs/{name}-10"
    files.release_locks()
    run(tmp_path / "new", "--epochs", "0.25", "--resume")
    assert "no checkpoint yet, starting from the beginning" in capsys.readouterr().err

    names = []

    def noted(typed, world, program, name, flags):
        names.append(name)
        raise ValueError("enough")

    for stage, more in (
        (pretrain, ""),
        (pretrain, "--baseline simmim"),
        (finetune, "--init scratch"),
        (finetune, "--weights w.pt --recipe small"),
    ):
        monkeypatch.setattr(stage, "open_run", noted)
        flags = ["--data", "shapes", "--arch", "resnet18", *more.split()]
        complaint(capsys, *flags, main=stage.main)
    assert names == [name, f"{name}-simmim", f"{name}-default-scratch", f"{name}-small"]
