"""The course of a run: where it starts, what happens around every step, how it stops and goes on.

    open_run         the output folder, and with --resume the run that is in it
    Steps            how many steps there are, and where this start begins
    Journal          what happens around every step: count, log, save, stop
"""

import json
import math
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision
from torch import Tensor

from .command import Failed, Signals, Stopped, World, explain
from .files import (all_finite, append_line, lock_folder, make_and_lock, peak_memory_mb, printable, read_checkpoint,
                    read_lines, refuse_odd_files, save_atomically, settings, trim_log, write_text_atomically)
from .flags import accepts, told_size
from .pictures import save_curve
from .progress import Progress, RunningMeans

# ---- the start of a run ----

def open_run(args: SimpleNamespace, world: World, own: dict, name: str, flags: dict
             ) -> tuple[SimpleNamespace, dict | None]:
    """The output folder into args.out, and with --resume the checkpoint in it and the flags it was made with.

    own: the program's default flags; flags: its table of them (engine/flags.py). Raises ValueError if the folder is
    taken, not writable or of another program, or if the checkpoint holds settings that the flags would refuse."""
    args.out = world.agree(lambda: choose_folder(args, name))
    saved = read_checkpoint(Path(args.out)) if args.resume else None
    step = saved["step"] if saved else -1
    if world.largest(step, -step) != [step, -step]:
        raise ValueError(f"--resume: the processes see different checkpoints in {args.out}; --out must be one folder "
                         f"that all nodes share")
    if saved:                                                # the run's own settings, then what was typed now
        if (made_by := saved["args"]["program"]) != args.program:
            raise ValueError(f"{saved['path']}: of another model, made by {printable(made_by)}; choose another --out")
        for setting, value in saved["args"].items():
            if not accepts(flags, setting, value):
                raise ValueError(f"{saved['path']}: its setting {printable(setting)} is {printable(repr(value))}, "
                                 f"which no run of this program has saved; move the file away to start from the "
                                 f"beginning")
        more = dict(given=args.given, demo=False, out=args.out)
        args = SimpleNamespace(**{**own, **saved["args"], **args.given, **more})
        world.say(f"going on from {saved['path']}, step {step}")
    elif args.resume:
        if "data" not in args.given:
            raise ValueError(f"--resume: no checkpoint in {args.out}; give the run's folder with --out, or --data and "
                             f"the flags of the run to start it")
        world.say(f"{args.out}: no checkpoint yet, starting from the beginning")
    return args, saved


def choose_folder(args: SimpleNamespace, name: str) -> str:
    """--out, by default runs/<name>, numbered if taken; --resume takes the newest. Tries to write there, and leaves
    nothing: a refused command makes no folder."""
    results = ("result.json", "features.npz")                # of probes, which keep no log
    numbered = lambda n: Path("runs") / (name if n == 1 else f"{name}-{n}")
    if args.out is None:
        taken = [n for n in range(1, 1000) if any((numbered(n) / f).exists() for f in ("log.jsonl", *results))]
        args.out = str(numbered(max(taken, default=1) if args.resume else max(taken, default=0) + 1))
    out = Path(os.path.normpath(args.out))                   # "new/../runs" makes no folder "new"
    if out.is_dir():
        refuse_odd_files(out)
        lock_folder(out)
    begun = (out / "log.jsonl").exists()
    if begun and not args.resume:
        raise ValueError(f"--out {out}: already holds a run; add --resume to continue it, or choose another folder")
    if not begun and (there := [name for name in results if (out / name).exists()]):
        raise ValueError(f"--out {out}: already holds a {there[0]}; choose another folder")
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        for folder in made:
            folder.rmdir()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from None
    return str(out)


def make_folder(args: SimpleNamespace, world: World, global_batch: int) -> None:
    """Makes and locks the output folder. Writes every setting and the versions to args.json.

    All processes take part. Raises ValueError if another run writes there."""
    world.agree(lambda: make_and_lock(Path(args.out)))
    if world.rank == 0:
        used = dict(global_batch=global_batch, torch=torch.__version__, torchvision=torchvision.__version__,
                    world=world.size, device=world.device.type)
        text = json.dumps({**settings(args), **used}, indent=1) + "\n"
        write_text_atomically(Path(args.out) / "args.json", text)


@dataclass
class Steps:
    """The steps of a run: `start` (0, or from the checkpoint) to `total`, `per_epoch` of them an epoch."""
    batch: int                                               # images per process and forward pass
    global_batch: int                                        # images per step: batch x accum x processes
    per_epoch: int
    total: int
    start: int                                               # 0, or where the checkpoint is
    warmup: int

    @classmethod
    def plan(cls, args: SimpleNamespace, world: World, images: int, saved: dict | None) -> "Steps":
        """From the flags and the number of images. Raises ValueError if the data set is smaller than one step."""
        if args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
            if "warmup_epochs" in args.given:
                raise ValueError(f"--warmup-epochs {args.warmup_epochs:g}: must be less than --epochs {args.epochs:g}")
            args.warmup_epochs = None                        # a short run of a long recipe: a tenth of it
        if args.global_batch and not args.batch_size and args.global_batch % world.size:
            raise ValueError(f"{world.size} processes do not divide the global batch of {args.global_batch}; give "
                             "--batch-size, images per process")
        shared = args.global_batch and args.global_batch // world.size
        batch = args.batch_size or shared or (256 if world.on_gpu else 32)
        global_batch = batch * args.accum * world.size
        per_epoch = steps_per_epoch(images, global_batch)
        total, start = max(1, round(per_epoch * args.epochs)), 0
        if saved:                                            # at its place in epochs
            start = min(total, math.floor(saved["step"] / saved["per_epoch"] * per_epoch + 1e-6))
            if saved["world"] != world.size or saved["per_epoch"] != per_epoch:
                world.say(f"the checkpoint is of {saved['world']} processes and {saved['per_epoch']} steps an epoch, "
                          f"this is {world.size} and {per_epoch}: the schedule goes on at epoch "
                          f"{start / per_epoch:.2f}, but not bit by bit as it would have")
        epochs = min(10, args.epochs / 10) if args.warmup_epochs is None else args.warmup_epochs
        return cls(batch, global_batch, per_epoch, total, start, round(per_epoch * epochs))


def steps_per_epoch(images: int, global_batch: int) -> int:
    if images < global_batch:
        raise ValueError(f"the data set has {images} images, one step takes {global_batch} "
                         f"(--batch-size x --accum x processes); use a smaller --batch-size")
    return images // global_batch


# ---- during the run ----

NOT_FINITE = "the weights are not finite"


class Journal:
    """What happens around every step of a run: it is counted, logged, saved, and stopped if a signal came.

        with Journal(...) as journal:
            for step in journal.steps():
                journal.after(step, {"loss": ..., and its parts})

    A step whose loss is not finite is undone: GradScaler has skipped its update, BatchNorm's statistics are put back.
    Raises Failed if the run cannot go on, Stopped after a signal. If the loader fails (the data are gone, a worker was
    killed), the last whole step is saved first. After the loop, `finish` makes sure that all is on the disk."""

    def __init__(self, args, world: World, plan: Steps, keep: dict, saved: dict | None, export: dict | None = None):
        """keep: name -> what a checkpoint holds (model, optimizer, broken, ...), filled from `saved` to resume.
        export: file name -> a function that gives what this file holds; written beside every checkpoint."""
        self.args, self.world, self.plan, self.keep, self.export = args, world, plan, keep, export or {}
        self.out, self.log, self.done = Path(args.out), Path(args.out) / "log.jsonl", plan.start
        self.means = RunningMeans(world)
        self.keep = {**keep, "means": self.means}
        self.saved_step = None                               # of the last checkpoint that this start has written
        self.not_written = {}                                # file -> why its last writing failed
        # a broken checkpoint.pt must not replace the whole one before it
        self.checkpoint_is_whole = bool(saved) and Path(saved["path"]).name == "checkpoint.pt"
        self.in_step = False
        if saved:                                            # older checkpoints have no means
            self.load({"means": self.means.state_dict(), **saved})
        make_folder(args, world, plan.global_batch)
        if world.rank == 0:
            trim_log(self.log, saved["step"] / saved["per_epoch"] if saved else 0.0)
        self.in_a_row, self.skipped = torch.tensor([0, saved["skipped"] if saved else 0], device=world.device)
        self.saved_at = self.logged_at = time.time()
        self.logged, self.signals, self.last_loss = self.done, Signals(), "none yet"

    def __enter__(self) -> "Journal":
        self.signals.__enter__()
        self.bar = Progress(self.world, self.plan, self.done)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.signals.__exit__()
        self.bar.close()
        if self.in_step and isinstance(error, Exception):
            self.save_whole_steps(error)

    def save_whole_steps(self, error: Exception) -> None:
        """After an error inside a step: saves the steps before it, if the model was not to blame, and says so.

        The loader's errors come before the optimiser's step, so the weights are those of the last whole step."""
        code, line = explain(error, self.world) or (0, "")
        if code != 1 or self.world.rank:
            return
        for now, old in self.statistics_before:
            now.copy_(old)
        if self.done > self.plan.start and self.saved_step != self.done and not int(self.in_a_row):
            self.write("checkpoint.pt", self.save)
        if (self.out / "checkpoint.pt").exists() and "--resume" not in line:
            raise Failed(f"{line} (stopped after step {self.done}; {self.how_to_go_on()})") from error

    def steps(self):
        """The numbers of the steps to make. Before each, BatchNorm's statistics are set aside."""
        statistics = [b for b in self.keep["model"].buffers() if b.is_floating_point()]
        for step in range(self.plan.start, self.plan.total):
            self.statistics_before = [(b, b.clone()) for b in statistics]
            self.in_step = True
            yield step

    def after(self, step: int, record: dict[str, Tensor]) -> None:
        """After a step. record: this process's 'loss' and its parts, still on the device."""
        args, plan, done = self.args, self.plan, step + 1
        self.in_step = False
        bad, self.done = ~torch.isfinite(record["loss"]), done
        for now, old in self.statistics_before:
            now.copy_(torch.where(bad, old, now))
        self.in_a_row, self.skipped = (self.in_a_row + bad) * bad, self.skipped + bad    # a good step ends the row
        self.means.add(record)
        self.bar.update()
        epoch_ends = done % plan.per_epoch == 0 or done == plan.total
        logs = done % args.log_every == 0 or epoch_ends or done == 1
        streak = int(self.in_a_row) if logs or not self.world.on_gpu else 0  # a GPU is waited for only when logging
        stop, streak = self.world.largest(self.signals.number, streak)
        if streak >= 10:
            raise Failed(self.not_finite(streak))
        if logs:
            self.write_line()
        every = int(args.save_every.removesuffix("m"))
        due = done % every == 0 if args.save_every.isdecimal() else time.time() - self.saved_at > 60 * every
        if self.world.rank == 0 and (epoch_ends or due or stop) and not int(self.in_a_row):
            self.write("checkpoint.pt", self.save)
            self.saved_at = time.time()
        if stop:
            raise Stopped(stop, f"stopped by {signal.Signals(stop).name} after step {done} of {plan.total}; "
                                + self.how_to_go_on())

    def how_to_go_on(self) -> str:
        """The end of a line about a run that stops here."""
        if not (self.out / "checkpoint.pt").exists():
            return "there is no checkpoint yet"
        reason = self.not_written.get("checkpoint.pt")
        lost = f"its last steps are lost ({reason}); make room, and " if reason else ""
        return f"{lost}go on with --out {self.out} --resume"

    def write(self, what: str, action, *given) -> bool:
        """Writes the file `what` by action(*given). A full disk does not end the run: the old file is kept, True is
        returned, and `finish` fails unless the file is written later."""
        try:
            action(*given)
        except OSError as error:
            self.world.say(f"step {self.done}: {what} not written ({error})")
            self.not_written[what] = str(error)
            return True
        self.not_written.pop(what, None)
        return False

    def keep_best(self, best: dict, name: str, value: float, state: dict) -> None:
        """Writes `state` as best.pt if `value` beats best[name], or if there is no best.pt.

        All processes take part. `best` changes only once the file is on the disk: it goes into the checkpoint, and a
        resumed run has to know that the file is still to be written."""
        file = self.out / "best.pt"
        missing = self.world.agree(lambda: not file.is_file())
        if value <= best[name] and not missing:
            return
        failed = self.world.rank == 0 and self.write("best.pt", save_atomically, state, file)
        if not any(self.world.largest(int(failed))):
            best.update({name: value, "epoch": self.done / self.plan.per_epoch})

    def finish(self, *promised: str) -> None:
        """Before a program says "done": checkpoint.pt, all of `export` and the `promised` files are on the disk.

        All processes take part. Raises Failed, with the reason and what to do, if one is not."""
        reason = self.world.agree(lambda: self.what_is_missing(promised))
        if reason:
            raise Failed(reason)

    def what_is_missing(self, promised: tuple[str, ...]) -> str | None:
        if int(self.in_a_row):
            return self.not_finite(int(self.in_a_row))
        for name in ("checkpoint.pt", *self.export, *promised):
            path = self.out / name
            there = path.is_file() and path.stat().st_size > 0
            if name in self.not_written or not there:
                reason = self.not_written.get(name, f"{path} is not there")
                cure = "choose a lower --lr" if NOT_FINITE in reason else "make room"
                return f"{reason}; {cure}, then go on with --out {self.out} --resume"
        return None

    def write_line(self) -> None:
        """A line of log.jsonl: means over the steps since the last line. All processes take part."""
        self.keep["broken"].tell(self.world)
        means = self.means.take()
        self.last_loss = means["loss"] or self.last_loss
        if self.world.rank == 0:
            now, steps = time.time(), self.done - self.logged
            speed = steps * self.plan.global_batch / max(now - self.logged_at, 1e-9)
            line = self.place() | dict(lr=self.lr(), **means)
            counts = dict(skipped=int(self.skipped), broken=len(self.keep["broken"].seen))
            line |= {name: count for name, count in counts.items() if count}
            line |= dict(images_per_s=round(speed, 1), peak_memory_mb=peak_memory_mb(self.world.device))
            self.write("log.jsonl", append_line, self.log, line)
            self.bar.show(means["loss"], line["lr"], speed, steps)
            self.logged_at, self.logged = now, self.done

    def note(self, **values: float) -> None:
        """A line of its own in log.jsonl, such as the loss on held-out images. Updates loss.png."""
        if self.world.rank == 0:
            line = self.place()
            for name, value in values.items():
                line[name] = round(value, 6) if math.isfinite(value) else None
            self.write("log.jsonl", append_line, self.log, line)
            self.write("loss.png", save_curve, self.out / "loss.png", self.log)
            if "held_out" in values:
                self.bar.held_out = (self.done, values["held_out"])

    def place(self) -> dict:
        """What every line of log.jsonl begins with. `time` is in seconds since 1970."""
        epoch = round(self.done / self.plan.per_epoch, 4)
        return dict(step=self.done, epoch=epoch, time=round(time.time(), 1))

    def has(self, name: str) -> bool:                        # is it noted of this step? rank 0 looks
        return self.world.agree(lambda: any(name in r and r["step"] == self.done for r in read_lines(self.log)))

    def lr(self) -> float:
        return max(group["lr"] for group in self.keep["optimizer"].param_groups)

    def not_finite(self, streak: int) -> str:
        kept = f"{file} is kept" if (file := self.out / "checkpoint.pt").exists() else "there is no checkpoint yet"
        return (f"loss is not finite, {streak} times in a row at step {self.done} (lr {self.lr():.1e}, amp "
                f"{self.args.amp}, last finite loss {self.last_loss}); {kept}; try a lower --lr"
                + (" or --amp bf16" if self.args.amp == "fp16" else ""))

    def save(self) -> None:
        state = {name: keeper.state_dict() for name, keeper in self.keep.items()}
        state |= dict(step=self.done, per_epoch=self.plan.per_epoch, world=self.world.size, args=settings(self.args),
                      skipped=int(self.skipped))
        if not all_finite(state["model"]):
            raise OSError(NOT_FINITE)
        for name, content in self.export.items():            # first: a resumed run makes what comes after it
            save_atomically(content(), self.out / name)
        save_atomically(state, self.out / "checkpoint.pt", keep_previous=self.checkpoint_is_whole)
        self.checkpoint_is_whole, self.saved_step = True, self.done
        self.write("loss.png", save_curve, self.out / "loss.png", self.log)

    def load(self, saved: dict) -> None:
        """Puts a checkpoint back. lr scale and weight decay are the flags' of now."""
        typed = [(group["scale"], group["weight_decay"]) for group in self.keep["optimizer"].param_groups]
        try:
            for name, keeper in self.keep.items():
                # a scale that was fixed at 1 for bf16 would let the gradients of fp16 underflow
                if name != "scaler" or saved["args"].get("amp") == self.args.amp:
                    keeper.load_state_dict(saved[name])
            put_moments_in_memory_order(self.keep["optimizer"])
            for group, (scale, weight_decay) in zip(self.keep["optimizer"].param_groups, typed):
                group.update(scale=scale, weight_decay=weight_decay)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            made = saved["args"]
            made = f"{made.get('arch')} at {told_size(made.get('image_size', 0))}"
            raise ValueError(f"{self.out}/checkpoint.pt: of another model ({made}); resume with the run's own flags, "
                             f"or choose another --out") from None


def put_moments_in_memory_order(optimizer: torch.optim.Optimizer) -> None:
    """Lays each moment of the optimiser out in memory as its weight is.

    A checkpoint may be of the other memory format (--channels-last). Fused optimisers walk through raw memory, and
    would put the moments of one weight to another."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
