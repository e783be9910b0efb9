"""The course of a run: where it starts, what happens around every step, how it stops and resumes.

    open_run        the output folder, and with --resume the run that is in it
    StepPlan        how many steps there are, and where this start begins
    Checkpointer    what happens around every step: count, log, save, stop
"""

import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from .board import Board
from .command import Distributed, Failed, Signals, Stopped, explain
from .description import write_description
from .files import (all_finite, append_line, check_folder, checkpoints_in, cure_of, lock_folder,
                    make_and_lock, peak_memory_mb, printable, read_checkpoint, read_lines,
                    refuse_odd_files, save_atomically, trim_log, write_text_atomically)
from .flags import accepts, format_size
from .images import reason
from .pictures import save_curve
from .progress import Progress, RunningMeans, TimedBatches
from .settings import to_save

# ---- the start of a run ----

def open_run(typed: dict, world: Distributed, program: str, name: str,
             flags: dict) -> tuple[str, dict | None]:
    """(output folder, checkpoint): with --resume the checkpoint in --out, if there is one.

    typed  the flags that were typed
    name   of the folder in runs/, if there is no --out
    flags  the program's table of flags (engine/flags.py)

    All processes take part. Raises ValueError if the folder is taken, not writable or of another
    program, or if the checkpoint holds settings that the flags would refuse."""
    is_resumed = typed.get("resume", False)
    out = world.broadcast_from_rank0(lambda: choose_folder(typed.get("out"), name, is_resumed))
    checkpoint = read_checkpoint(Path(out)) if is_resumed else None
    step = checkpoint["step"] if checkpoint else -1
    if world.all_reduce_max(step, -step) != [step, -step]:
        raise ValueError(f"--resume: the processes see different checkpoints in {out}; --out "
                         f"must be one folder that all nodes share")
    if checkpoint:
        check_settings(checkpoint, program, flags)
        world.print0(f"resuming from {checkpoint['path']}, step {step}")
    elif is_resumed:
        if "data" not in typed:
            raise ValueError(f"--resume: no checkpoint in {out}; give the run's folder with "
                             f"--out, or --data and the flags of the run to start it")
        world.print0(f"{out}: no checkpoint yet, starting from the beginning")
    return out, checkpoint


def is_remembered(typed: dict) -> bool:
    """Does a checkpoint hold the settings of a run, so that no flag has to be typed?

    True without --data, too: `open_run` then says that there is no checkpoint."""
    if not typed.get("resume") or "out" not in typed:
        return False
    return "data" not in typed or bool(checkpoints_in(Path(typed["out"])))


def check_resumes_training(typed: dict, trains: bool) -> None:
    """Raises ValueError for --resume in a command that trains nothing."""
    if typed.get("resume") and not trains:
        raise ValueError("--resume continues a training; leave it out, and give --weights FILE, "
                         "such as the run's best.pt")


def check_settings(checkpoint: dict, program: str, flags: dict) -> None:
    """Raises ValueError if a checkpoint is of another program, or its settings are no flags'."""
    made_by = checkpoint["args"]["program"]
    if made_by != program:
        raise ValueError(f"{checkpoint['path']}: of another model, made by {printable(made_by)}; "
                         f"choose another --out")
    for setting, value in checkpoint["args"].items():
        if not accepts(flags, setting, value):
            raise ValueError(f"{checkpoint['path']}: its setting {printable(setting)} is "
                             f"{printable(repr(value))}, which no run of this program has saved; "
                             f"move the file away to start from the beginning")


OF_A_RUN = ("log.jsonl", "checkpoint.pt", "checkpoint-previous.pt")
RESULTS = ("backbone.pt", "best.pt", "result.json", "features.npz")


def choose_folder(out: str | None, name: str, resume: bool) -> str:
    """--out; by default `default_folder`. A refused command makes no folder.

    Raises ValueError if the folder cannot be used."""
    out = Path(out or default_folder(name, resume))
    out = Path(os.path.normpath(out))                        # "new/../runs" makes no folder "new"
    check_folder(out)
    if out.is_dir():
        refuse_odd_files(out)
        lock_folder(out)
    results = present(out, RESULTS)
    if present(out, OF_A_RUN):
        if not resume:
            raise ValueError(f"--out {out}: already holds a run; add --resume to continue it, or "
                             f"choose another folder")
    elif results:
        raise ValueError(f"--out {out}: holds {results[0]}, and no run that could be resumed; "
                         f"choose another folder")
    return str(out)


def default_folder(name: str, resume: bool) -> Path:
    """runs/<name>, with a number if it is taken: the first free one, or the newest with
    --resume."""
    def numbered(n: int) -> Path:
        return Path("runs") / (name if n == 1 else f"{name}-{n}")

    newest = 0
    for n in range(1, 1000):
        if numbered(n).is_dir() and present(numbered(n), (*OF_A_RUN, *RESULTS)):
            newest = n
    return numbered(max(newest, 1) if resume else newest + 1)


def present(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Those of the files that are in the folder."""
    return [name for name in names if (folder / name).exists()]


def make_folder(settings, world: Distributed) -> None:
    """Makes and locks the output folder. Writes every setting and the versions to args.json.

    All processes take part. Raises ValueError if another run writes there."""
    out = Path(settings.out)
    world.broadcast_from_rank0(lambda: make_and_lock(out))
    # another start may have made, used and left it while this one prepared
    is_used = world.broadcast_from_rank0(
        lambda: any((out / file).exists() for file in ("log.jsonl", *RESULTS)))
    if is_used and not settings.resume:
        raise ValueError(f"--out {out}: another run has used it since this one began; choose "
                         f"another folder")
    if world.rank == 0:
        used = dict(workers=settings.workers, torch=torch.__version__,
                    torchvision=torchvision.__version__, world=world.size,
                    device=world.device.type)
        text = json.dumps({**to_save(settings), **used}, indent=1) + "\n"
        write_text_atomically(out / "args.json", text)


@dataclass
class StepPlan:
    """The steps of a run: from `start` to `total`, `per_epoch` of them an epoch."""
    batch: int                                               # images per process and forward pass
    global_batch: int                                        # per step: batch x accum x processes
    per_epoch: int
    total: int
    start: int                                               # 0, or where the checkpoint is
    warmup: int

    @classmethod
    def plan(cls, settings, world: Distributed, images: int,
             checkpoint: dict | None) -> "StepPlan":
        """From the settings and the number of images.

        Raises ValueError if the data set is smaller than one step."""
        per_epoch = steps_per_epoch(images, settings.global_batch)
        total = max(1, round(per_epoch * settings.epochs))
        start = cls.resume_step(checkpoint, per_epoch, total, world) if checkpoint else 0
        warmup = round(per_epoch * settings.warmup_epochs)
        return cls(settings.batch_size, settings.global_batch, per_epoch, total, start, warmup)

    @staticmethod
    def resume_step(checkpoint: dict, per_epoch: int, total: int, world: Distributed) -> int:
        """The checkpoint's step in the steps of this run: both are at the same epoch."""
        epochs = checkpoint["step"] / checkpoint["per_epoch"]
        start = min(total, math.floor(epochs * per_epoch + 1e-6))
        if checkpoint["world"] != world.size or checkpoint["per_epoch"] != per_epoch:
            world.print0(f"the checkpoint is of {checkpoint['world']} processes and "
                         f"{checkpoint['per_epoch']} steps an epoch, this is {world.size} and "
                         f"{per_epoch}: the run continues at epoch {start / per_epoch:.2f}, and "
                         f"will not be bit-identical to one that never stopped")
        return start


def steps_per_epoch(images: int, global_batch: int) -> int:
    """Whole steps in a pass over the images. Raises ValueError if there is none."""
    if images < global_batch:
        raise ValueError(f"there are {images} images to train on, and one step takes "
                         f"{global_batch} (--batch-size x --accum x processes); make one of these "
                         f"smaller")
    return images // global_batch


# ---- during the run ----

NOT_FINITE = "the weights are not finite"
# what a checkpoint holds beside the objects that a run saves
RESERVED = ("step", "per_epoch", "world", "args", "skipped", "means", "path")


class Checkpointer:
    """What happens around every step of a run: count, log, save, and stop if a signal came.

        with Checkpointer(...) as checkpointer:
            for step in checkpointer.steps():
                checkpointer.after(step, {"loss": ..., and its parts})
        checkpointer.finish()

    A step whose loss or gradient is not finite is undone: GradScaler has skipped its update, and
    BatchNorm's statistics are put back. Raises Failed if the run cannot go on, Stopped after a
    signal. If the loader fails (the data are gone, a worker was killed), the last whole step is
    saved first."""

    def __init__(self, settings, world: Distributed, plan: StepPlan, saved: dict,
                 checkpoint: dict | None, exports: dict | None = None):
        """saved    name -> an object with state_dict and load_state_dict that checkpoints hold.
                    'model', 'optimizer' and 'broken' (UnreadableImages) must be among them
        checkpoint  fills them, to resume
        exports     file name -> a function that gives its content, written with every checkpoint

        Raises ValueError if a name in `saved` is one of RESERVED."""
        taken = sorted({*saved} & {*RESERVED})
        if taken:
            raise ValueError(f"{taken[0]!r} is a name of the checkpoint's own (one of "
                             f"{', '.join(RESERVED)}); save the object under another name")
        self.settings = settings
        self.world = world
        self.plan = plan
        self.out = Path(settings.out)
        self.log = self.out / "log.jsonl"
        self.means = RunningMeans(world)
        self.batches = None                                  # of `timed`
        self.saved = {**saved, "means": self.means}
        self.exports = exports or {}
        self.signals = Signals(world)

        self.done = plan.start                               # steps
        self.in_step = False
        self.last_loss = "none yet"
        self.saved_step = None                               # of the last checkpoint of this start
        self.not_written = {}                    # file -> (why its last writing failed, the cure)
        # a broken checkpoint.pt must not replace the whole one before it
        self.checkpoint_is_whole = bool(checkpoint) and checkpoint["path"].endswith("checkpoint.pt")
        if checkpoint:                                       # older ones have no means
            self.load({"means": self.means.state_dict(), **checkpoint})
        self.board = Board(settings, world, plan.start)
        make_folder(settings, world)
        if world.rank == 0:
            before = checkpoint or dict(step=0, per_epoch=plan.per_epoch)
            trim_log(self.log, before["step"], before["per_epoch"])
        self.bad_in_a_row = torch.tensor(0, device=world.device)
        skipped = checkpoint["skipped"] if checkpoint else 0
        self.skipped = torch.tensor(skipped, device=world.device)            # non-finite steps
        self.saved_at = self.logged_at = time.monotonic()
        self.logged = self.done

    def __enter__(self) -> "Checkpointer":
        self.signals.__enter__()
        self.bar = Progress(self.world, self.plan, self.done)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.signals.__exit__(kind, error, trace)
        self.bar.close()
        self.board.close()
        if self.in_step and isinstance(error, Exception):
            self.save_whole_steps(error)
            if isinstance(error, ValueError) and not self.batches.is_waiting:
                # no mistake in flags or files, but a bug: its traceback is printed
                raise RuntimeError("the training step raised an error") from error

    def timed(self, loader) -> TimedBatches:
        """Iterates over the loader. The log then says how long the steps wait for its batches."""
        self.batches = TimedBatches(loader, self.world)
        return self.batches

    def steps(self):
        """The numbers of the steps to make. Before each, BatchNorm's statistics are kept."""
        modules = [kept for kept in self.saved.values() if isinstance(kept, nn.Module)]
        buffers = [b for module in modules for b in module.buffers()]        # of an EMA, too
        self.statistics = Snapshot([b for b in buffers if b.is_floating_point()])
        for step in range(self.plan.start, self.plan.total):
            self.statistics.take()
            self.in_step = True
            yield step

    def after(self, step: int, record: dict[str, Tensor]) -> None:
        """After a step. record: this process's 'loss' and its parts, still on the device."""
        plan = self.plan
        self.in_step = False
        self.done = step + 1
        # one process's gradient that is not finite undoes the step of all
        bad = self.world.all_reduce_sum((~torch.isfinite(record["loss"])).int()) > 0
        self.statistics.restore(bad)
        self.bad_in_a_row = (self.bad_in_a_row + bad) * bad  # a good step ends the row
        self.skipped = self.skipped + bad
        self.means.add(record)
        self.bar.update()

        epoch_ends = self.done % plan.per_epoch == 0 or self.done == plan.total
        is_logged = self.done % self.settings.log_every == 0 or epoch_ends or self.done == 1
        # the GPU is waited for only where a line is logged
        streak = int(self.bad_in_a_row) if is_logged or not self.world.on_gpu else 0
        # only rank 0 looks at its clock, so that all processes agree
        is_due = self.world.rank == 0 and self.is_due()
        stop, streak, save = self.world.all_reduce_max(self.signals.number, streak, int(is_due))
        if streak >= 10:
            raise Failed(self.describe_not_finite(streak))
        if is_logged:
            self.write_line()
        if save or stop or self.done == plan.total:
            self.means.reduce()
            self.saved["broken"].exchange(self.world)
            if self.world.rank == 0 and not int(self.bad_in_a_row):
                self.write("checkpoint.pt", self.save)
                self.saved_at = time.monotonic()
        if stop:
            name = signal.Signals(stop).name
            raise Stopped(stop, f"stopped by {name} after step {self.done} of {plan.total}; "
                                f"{self.how_to_go_on()}")

    def is_due(self) -> bool:
        """Is it time for a checkpoint by --save-every, steps ('200') or minutes ('10m')?"""
        every = int(self.settings.save_every.removesuffix("m"))
        if self.settings.save_every.isdecimal():
            return self.done % every == 0
        return time.monotonic() - self.saved_at > 60 * every

    # ---- files ----

    def write(self, name: str, action, *given) -> bool:
        """Writes the file `name` by action(*given). False if that failed.

        A full disk does not end the run: the old file is kept, and `finish` fails unless the file
        is written later."""
        try:
            action(*given)
        except OSError as error:
            self.world.print0(f"step {self.done}: {name} not written ({error})")
            cure = "choose a lower --lr" if str(error) == NOT_FINITE else cure_of(error)
            self.not_written[name] = (str(error), cure)
            return False
        self.not_written.pop(name, None)
        return True

    def save(self) -> None:
        """Writes `exports`, checkpoint.pt and loss.png. Raises OSError if that fails."""
        state = {name: kept.state_dict() for name, kept in self.saved.items()}
        state |= dict(step=self.done, per_epoch=self.plan.per_epoch, world=self.world.size,
                      args=to_save(self.settings), skipped=int(self.skipped))
        if not all_finite(state["model"]):
            raise OSError(NOT_FINITE)
        for name, content in self.exports.items():           # first: a resumed run writes the rest
            save_atomically(content(), self.out / name)
        save_atomically(state, self.out / "checkpoint.pt", keep_previous=self.checkpoint_is_whole)
        self.checkpoint_is_whole = True
        self.saved_step = self.done
        self.write("loss.png", save_curve, self.out / "loss.png", self.log)

    def load(self, checkpoint: dict) -> None:
        """Puts a checkpoint back. The scale of the lr, the weight decay and `fused` are those of
        this start, and not the checkpoint's."""
        optimizer = self.saved["optimizer"]
        of_this_start = []
        for group in optimizer.param_groups:
            names = [name for name in ("scale", "weight_decay", "fused") if name in group]
            of_this_start.append({name: group[name] for name in names})
        same_amp = checkpoint["args"].get("amp") == self.settings.amp
        for name, kept in self.saved.items():
            # a scale that was fixed at 1 for bf16 would let the gradients of fp16 underflow
            if name != "scaler" or same_amp:
                self.load_one(name, kept, checkpoint)
        try:
            put_moments_in_memory_order(optimizer)
            for group, values in zip(optimizer.param_groups, of_this_start):
                group.update(values)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(self.of_another_model(checkpoint)) from None

    def load_one(self, name: str, kept, checkpoint: dict) -> None:
        """Puts one object back. Raises ValueError, with its name, if that fails."""
        if name not in checkpoint:
            raise ValueError(f"{self.out}/checkpoint.pt: holds no {name!r}, which this program "
                             f"saves; it is of another version of the program, choose another "
                             f"--out")
        try:
            kept.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if name in ("model", "optimizer"):
                raise ValueError(self.of_another_model(checkpoint)) from None
            raise ValueError(f"{self.out}/checkpoint.pt: its {name!r} cannot be resumed "
                             f"({reason(error)}); choose another --out") from None

    def of_another_model(self, checkpoint: dict) -> str:
        made = checkpoint["args"]
        size = format_size(made.get("image_size", 0))
        return (f"{self.out}/checkpoint.pt: of another model ({made.get('arch')} at {size}); "
                f"resume with the run's own flags, or choose another --out")

    def keep_best(self, best: dict, name: str, value: float, weights: dict,
                  description: dict | None = None) -> None:
        """Writes `weights` as best.pt if `value` beats best[name], or if there is no best.pt.

        description: of the net (engine/description.py), for the model.json beside best.pt.
        All processes take part. `best` goes into the checkpoint. It is updated after the file is
        written, so that a resumed run repeats a writing that failed."""
        self.board.add_line(self.place() | {name: value})
        file = self.out / "best.pt"
        if description and self.world.rank == 0:
            self.write("model.json", write_description, description, self.out)
        is_missing = self.world.broadcast_from_rank0(lambda: not file.is_file())
        if value <= best[name] and not is_missing:
            return
        is_written = True
        if self.world.rank == 0:
            is_written = self.write("best.pt", save_atomically, weights, file)
        failures, = self.world.all_reduce_max(int(not is_written))
        if failures == 0:
            best.update({name: value, "epoch": self.done / self.plan.per_epoch})

    def save_whole_steps(self, error: Exception) -> None:
        """After an error of the loader inside a step: saves the steps before it, and says so.

        The loader's errors come before the optimiser's step: the weights are those of the last
        whole step. A bug of the model saves nothing."""
        code, line = explain(error, self.world) or (0, "")
        if code != 1 or self.world.rank:
            return
        self.statistics.restore(torch.tensor(True, device=self.world.device))
        is_new = self.done > self.plan.start and self.saved_step != self.done
        if is_new and not int(self.bad_in_a_row):
            self.means.reduce(alone=True)
            self.write("checkpoint.pt", self.save)
        if (self.out / "checkpoint.pt").exists() and "--resume" not in line:
            raise Failed(f"{line} (stopped after step {self.done}; "
                         f"{self.how_to_go_on()})") from error

    def finish(self, *promised: str) -> None:
        """Before a program says "done": checkpoint.pt, `exports` and `promised` are on the disk.

        All processes take part. Raises Failed, with the reason and what to do, if one is not."""
        reason = self.world.broadcast_from_rank0(lambda: self.what_is_missing(promised))
        if reason:
            raise Failed(reason)

    def what_is_missing(self, promised: tuple[str, ...]) -> str | None:
        if int(self.bad_in_a_row):
            return self.describe_not_finite(int(self.bad_in_a_row))
        for name, content in self.exports.items():           # one may have been moved since
            if (self.out / "checkpoint.pt").is_file() and not (self.out / name).is_file():
                self.write(name, save_atomically, content(), self.out / name)
        for name in ("checkpoint.pt", *self.exports, *promised):
            path = self.out / name
            is_there = path.is_file() and path.stat().st_size > 0
            if name in self.not_written or not is_there:
                is_gone = (f"{path} is not there", "put it back")
                reason, cure = self.not_written.get(name, is_gone)
                return f"{reason}; {cure}, then go on with --out {self.out} --resume"
        return None

    # ---- log lines ----

    def write_line(self) -> None:
        """A line of log.jsonl: means over the steps since the last line. All processes take
        part."""
        unreadable = self.saved["broken"]
        unreadable.tell(self.world)
        means = self.means.take()
        if means["loss"] is not None:
            self.last_loss = means["loss"]
        if self.world.rank:
            return
        now = time.monotonic()
        steps = self.done - self.logged
        speed = steps * self.plan.global_batch / max(now - self.logged_at, 1e-9)
        line = self.place() | dict(lr=self.lr(), **means)
        for name, count in (("skipped", int(self.skipped)), ("broken", len(unreadable.seen))):
            if count:
                line[name] = count
        line["images_per_s"] = round(speed, 1)
        if self.batches:
            line["data_wait"] = round(self.batches.take(now - self.logged_at, steps), 3)
        line["peak_memory_mb"] = peak_memory_mb(self.world.device)
        self.write("log.jsonl", append_line, self.log, line)
        self.board.add_line(line)
        self.bar.show(means["loss"], line["lr"], speed, steps)
        self.logged_at, self.logged = now, self.done

    def note(self, **values: float) -> None:
        """A line of its own in log.jsonl, such as the held-out loss. Draws loss.png again."""
        if self.world.rank:
            return
        line = self.place()
        for name, value in values.items():
            line[name] = round(value, 6) if math.isfinite(value) else None
        self.write("log.jsonl", append_line, self.log, line)
        self.board.add_line(line)
        self.write("loss.png", save_curve, self.out / "loss.png", self.log)
        if "held_out" in values:
            self.bar.held_out = (self.done, values["held_out"])

    def place(self) -> dict:
        """What every line of log.jsonl begins with. `time` is in seconds since 1970."""
        epoch = round(self.done / self.plan.per_epoch, 4)
        return dict(step=self.done, epoch=epoch, time=round(time.time(), 1))

    def has(self, name: str) -> bool:
        """Is there a log line with `name` for this step? Rank 0 looks."""
        def look() -> bool:
            lines = read_lines(self.log)
            return any(name in line and line["step"] == self.done for line in lines)
        return self.world.broadcast_from_rank0(look)

    def lr(self) -> float:
        return max(group["lr"] for group in self.saved["optimizer"].param_groups)

    # ---- words ----

    def how_to_go_on(self) -> str:
        """The end of a line about a run that stops here."""
        if not (self.out / "checkpoint.pt").exists():
            return "there is no checkpoint yet"
        lost = ""
        if "checkpoint.pt" in self.not_written:
            reason, cure = self.not_written["checkpoint.pt"]
            lost = f"its last steps are lost ({reason}); {cure}, and "
        return f"{lost}go on with --out {self.out} --resume"

    def describe_not_finite(self, streak: int) -> str:
        file = self.out / "checkpoint.pt"
        kept = f"{file} is kept" if file.exists() else "there is no checkpoint yet"
        cure = "try a lower --lr" + (" or --amp bf16" if self.settings.amp == "fp16" else "")
        return (f"loss or gradient is not finite, {streak} times in a row at step {self.done} "
                f"(lr {self.lr():.1e}, amp {self.settings.amp}, last finite loss "
                f"{self.last_loss}); {kept}; {cure}")


class Snapshot:
    """The values of some tensors at one time, such as BatchNorm's statistics.

    They are kept in one tensor: with one per statistic, the hundred of a ResNet-50 took a third of
    the kernels of a training step."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.sizes = [t.numel() for t in tensors]
        self.kept = None

    def take(self) -> None:
        if self.tensors:
            self.kept = torch.cat([t.flatten() for t in self.tensors])

    def restore(self, condition: Tensor) -> None:
        """Puts the values back where `condition`, a scalar on the device, is True."""
        if not self.tensors:
            return
        now = torch.cat([t.flatten() for t in self.tensors])
        chosen = torch.where(condition, self.kept, now).split(self.sizes)
        chosen = [part.view_as(t) for part, t in zip(chosen, self.tensors)]
        torch._foreach_copy_(self.tensors, chosen)


def put_moments_in_memory_order(optimizer: torch.optim.Optimizer) -> None:
    """Lays each moment of the optimiser out in memory as its weight is.

    A checkpoint may be of the other memory format (--channels-last). Fused optimisers walk through
    raw memory, and would combine the moments of one weight with another."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
