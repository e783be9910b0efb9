"""What a run reports while it trains.

    RunningMeans   the loss and its parts, averaged between two lines of log.jsonl
    Progress       how far the run is: a bar on a terminal, plain lines in a log file
"""

import math
import sys
import time

import torch
from torch import Tensor
from tqdm import tqdm

from .command import Distributed

PAUSE = 600                                                  # seconds without a plain line


class RunningMeans:
    """Means of the loss and its parts, over the steps since the last log line and all processes.

    The sums stay on the device, so that no step waits for a GPU. A checkpoint holds the sums: a
    run that is resumed between two log lines logs the same means as a run that never stopped."""

    def __init__(self, world: Distributed):
        self.world = world
        self.names = []
        self.sums = torch.zeros(0, device=world.device)      # of each part, and the number of steps

    def add(self, record: dict[str, Tensor]) -> None:
        """Adds a step. All processes take part.

        A step is left out if its loss is not finite on some process."""
        self.names = list(record)
        parts = torch.stack([value.detach().float() for value in record.values()])
        values = self.world.all_reduce_mean(parts)
        step = torch.cat([values, torch.ones_like(values[:1])])
        if len(self.sums) != len(step):  # the first step, or resumed with other parts
            self.sums = torch.zeros_like(step)
        finite = torch.isfinite(values[self.names.index("loss")])
        self.sums = self.sums + torch.where(finite, step, 0)

    def take(self) -> dict[str, float | None]:
        """The means, None if no step was finite. Starts new sums. Waits for the device."""
        *sums, steps = self.sums.tolist()
        self.sums = torch.zeros_like(self.sums)
        means = {}
        for name, total in zip(self.names, sums):
            means[name] = round(total / steps, 6) if steps and math.isfinite(total) else None
        return means

    def state_dict(self) -> dict:
        return {"sums": self.sums.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self.sums = state["sums"].to(self.world.device)


class Progress:
    """How far a run is, on stderr of rank 0.

    A terminal shows a bar. A log file gets a plain line after every epoch, at the end of the run,
    and after ten minutes without a line."""

    def __init__(self, world: Distributed, plan, done: int):
        """plan: the run's checkpointer.StepPlan. done: steps that were made before this start."""
        self.world, self.plan, self.done = world, plan, done
        terminal = sys.stderr.isatty()
        hidden = world.rank != 0 or not terminal
        self.bar = tqdm(total=plan.total, initial=done, unit="step", disable=hidden)
        self.plain = world.rank == 0 and not terminal
        self.first, self.began = done, time.time()
        self.shown, self.shown_at = self.first, self.began   # at the last plain line
        self.losses = []                                     # (mean, steps) of each log line since
        self.held_out = None                                 # (step, loss) of the last evaluation

    def update(self) -> None:
        """After every step."""
        self.done += 1
        self.bar.update()
        if self.plain and not self.epoch_ends() and time.time() - self.shown_at > PAUSE:
            self.write()

    def show(self, loss: float | None, lr: float, images_per_s: float, steps: int) -> None:
        """After every log line: the mean loss of its `steps`, None if it was not finite."""
        self.bar.set_postfix(loss=loss, lr=f"{lr:.1e}", images_per_s=f"{images_per_s:.0f}")
        if loss is not None:
            self.losses.append((loss, steps))
        if self.plain and self.epoch_ends():
            self.write()

    def epoch_ends(self) -> bool:
        return self.done % self.plan.per_epoch == 0 or self.done == self.plan.total

    def write(self) -> None:
        """One plain line. Loss and images/s are means since the line before."""
        plan, now = self.plan, time.time()
        steps = sum(count for _, count in self.losses)
        loss = sum(mean * count for mean, count in self.losses) / steps if steps else math.nan
        speed = (self.done - self.shown) * plan.global_batch / max(now - self.shown_at, 1e-9)
        left = (plan.total - self.done) * (now - self.began) / max(self.done - self.first, 1)
        parts = [
            time.strftime("%Y-%m-%d %H:%M:%S"),
            f"epoch {self.done / plan.per_epoch:.4g}/{plan.total / plan.per_epoch:.4g}",
            f"step {self.done}/{plan.total}",
            f"loss {loss:.4f}",
        ]
        if self.held_out:
            step, held_out = self.held_out
            parts.append(f"held-out {held_out:.4f} (step {step})")
        parts += [f"{speed:.0f} images/s", f"{tqdm.format_interval(left)} left"]
        self.world.print0("  ".join(parts))
        self.shown, self.shown_at, self.losses = self.done, now, []

    def close(self) -> None:
        self.bar.close()
