"""What a run prints and logs while it trains.

    RunningMeans   the loss and its parts, averaged between two lines of log.jsonl
    TimedBatches   the batches of a loader, and how long the steps wait for them
    Progress       how far the run is: a bar on a terminal, plain lines in a log file
"""

import math
import sys
import time

import torch
from torch import Tensor
from tqdm import tqdm

from .command import Distributed

MOST_WAITING = 0.1                                           # of the time, before a run warns
MAX_PAUSE = 600                                              # seconds between two plain lines


class RunningMeans:
    """Means of the loss and its parts, over the steps since the last log line and all processes.

    The values of each step stay on the device until `reduce`, so that no step waits for a GPU or
    for the other processes. A checkpoint holds the sums, so that a run resumed between two log
    lines logs the same means as a run that never stopped."""

    def __init__(self, world: Distributed):
        self.world = world
        self.names = []                                      # of the parts
        self.steps = []                                      # (parts,) of each step, not summed yet
        self.sums = torch.zeros(0)                           # of each part; last, number of steps

    def add(self, record: dict[str, Tensor]) -> None:
        """Notes a step. record: this process's 'loss' and its parts, scalars on the device."""
        if list(record) != self.names:                       # the first step, or other parts
            self.names = list(record)
            self.steps = []
        self.steps.append(torch.stack([value.detach().float() for value in record.values()]))

    def reduce(self, alone: bool = False) -> None:
        """Adds the noted steps to the sums, as means over the processes. Waits for the device.

        A step whose loss is not finite on some process is left out. All processes take part, unless
        `alone`: then the other processes are lost, and the values of this process must do."""
        if not self.steps:
            return
        values = torch.stack(self.steps)                     # (steps, parts)
        if not alone:
            values = self.world.all_reduce_mean(values)
        self.steps = []
        ones = torch.ones(len(values), 1)
        rows = torch.cat([values.cpu(), ones], dim=1)        # (steps, parts + 1)
        if len(self.sums) != rows.shape[1]:                  # the first step, or other parts
            self.sums = torch.zeros(rows.shape[1])
        finite = torch.isfinite(rows[:, self.names.index("loss")])
        # row by row, so that a checkpoint in between does not change how the sums are rounded
        for row in rows[finite]:
            self.sums = self.sums + row

    def take(self) -> dict[str, float | None]:
        """The mean of each part, None if no step was finite. Resets the sums. All processes take
        part. Waits for the device."""
        self.reduce()
        *sums, steps = self.sums.tolist()
        self.sums = torch.zeros_like(self.sums)
        means = {}
        for name, total in zip(self.names, sums):
            means[name] = round(total / steps, 6) if steps and math.isfinite(total) else None
        return means

    def state_dict(self) -> dict:
        """To be called after `reduce`."""
        return {"sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        self.sums = state["sums"].cpu()


class TimedBatches:
    """The batches of a loader. Measures how long the device has nothing to do until a batch comes.

    The host runs ahead of a CUDA GPU, and may wait for a batch while the GPU still computes. So
    there the time counts between two events on the GPU, one before and one after the batch."""

    def __init__(self, loader, world: Distributed):
        self.batches = iter(loader)
        self.world = world
        self.workers = loader.num_workers
        self.seconds = 0.0                                   # since the last `take`
        self.events = []                                     # (before, after), not read yet
        # for the warning; the first line, with the start of the workers, does not count
        self.lines = 0
        self.steps = 0
        self.waited = 0.0
        self.elapsed = 0.0
        self.has_warned = False
        self.is_waiting = False                              # for a batch

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self):
        self.is_waiting = True                               # also after an error of the loader
        batch = self.next_batch()
        self.is_waiting = False
        return batch

    def next_batch(self):
        if self.world.on_cuda:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            batch = next(self.batches)
            after.record()
            self.events.append((before, after))
            return batch
        start = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - start
        return batch

    def take(self, elapsed: float, steps: int) -> float:
        """The share of the last `elapsed` seconds that was waited for data, 0 to 1.

        steps: since the last call. Warns once, if the steps of a run wait too long."""
        for before, after in self.events:
            after.synchronize()
            self.seconds += before.elapsed_time(after) / 1000
        waited, self.seconds, self.events = self.seconds, 0.0, []
        if self.lines:
            self.steps += steps
            self.waited += waited
            self.elapsed += elapsed
        self.lines += 1
        share = self.waited / max(self.elapsed, 1e-9)
        if share > MOST_WAITING and self.steps >= 100 and not self.has_warned:
            self.has_warned = True
            self.world.print0(f"warning: {share:.0%} of the time the steps wait for data; raise "
                              f"--workers (now {self.workers} per process), or shrink the files by "
                              f"extras/shrink.py")
        return min(1.0, waited / max(elapsed, 1e-9))


class Progress:
    """How far a run is, on stderr of rank 0.

    A terminal shows a bar. A log file gets a plain line after every epoch, at the end of the run,
    and after ten minutes without a line."""

    def __init__(self, world: Distributed, plan, done: int):
        """plan: the run's checkpointer.StepPlan. done: steps that were made before this start."""
        self.world = world
        self.plan = plan
        self.done = done
        has_bar = world.rank == 0 and sys.stderr.isatty()
        self.bar = tqdm(total=plan.total, initial=done, unit="step", disable=not has_bar)
        self.has_lines = world.rank == 0 and not has_bar
        self.first_step = done
        self.started_at = time.monotonic()
        self.held_out = None                                 # (step, loss) of the last evaluation

        # since the last plain line
        self.shown_step = done
        self.shown_at = self.started_at
        self.losses = []                                     # (mean, steps) of each log line

    def update(self) -> None:
        """After every step."""
        self.done += 1
        self.bar.update()
        is_late = time.monotonic() - self.shown_at > MAX_PAUSE
        if self.has_lines and is_late and not self.epoch_ends():
            self.write()

    def show(self, loss: float | None, lr: float, images_per_s: float, steps: int) -> None:
        """After every log line. loss: the mean over its `steps`, None if none was finite."""
        self.bar.set_postfix(loss=loss, lr=f"{lr:.1e}", images_per_s=f"{images_per_s:.0f}")
        if loss is not None:
            self.losses.append((loss, steps))
        if self.has_lines and self.epoch_ends():
            self.write()

    def epoch_ends(self) -> bool:
        return self.done % self.plan.per_epoch == 0 or self.done == self.plan.total

    def write(self) -> None:
        """Prints a plain line. Loss and images/s are means since the last plain line."""
        plan = self.plan
        now = time.monotonic()
        steps = sum(count for _, count in self.losses)
        total = sum(mean * count for mean, count in self.losses)
        images = (self.done - self.shown_step) * plan.global_batch
        speed = images / max(now - self.shown_at, 1e-9)
        seconds_per_step = (now - self.started_at) / max(self.done - self.first_step, 1)
        left = (plan.total - self.done) * seconds_per_step
        parts = [
            time.strftime("%Y-%m-%d %H:%M:%S"),
            f"epoch {self.done / plan.per_epoch:.4g}/{plan.total / plan.per_epoch:.4g}",
            f"step {self.done}/{plan.total}",
        ]
        if steps:                                            # a log line came in between
            parts.append(f"loss {total / steps:.4f}")
        if self.held_out:
            step, held_out = self.held_out
            parts.append(f"held-out {held_out:.4f} (step {step})")
        parts += [f"{speed:.0f} images/s", f"{tqdm.format_interval(left)} left"]
        self.world.print0("  ".join(parts))
        self.shown_step = self.done
        self.shown_at = now
        self.losses = []

    def close(self) -> None:
        self.bar.close()
