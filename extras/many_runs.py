"""Many runs of this project's programs, each in a folder of its own.

    Run            a run, with its program and flags
    check_flags    were the runs that are there made with these flags?
    time_steps     how fast is a run on this machine?
    make_all       makes the runs that are missing, several at a time, and shows a bar

A run is made in the folder <name>.part, which is renamed to <name> when the run is complete. A run
that was stopped is continued.
"""

import contextlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
import pretrain
from data import seed_for
from engine.checkpointer import RESULTS
from engine.command import Distributed, Failed, Signals, Stopped
from engine.files import checkpoints_in, printable, read_lines
from engine.flags import height_width
from extras import detect, segment
from extras.inside import open_residual_branches
from model import build_encoder


def save_random_backbone(flags: list[str]) -> None:
    """backbone.pt and args.json as of pretrain.py with these flags, before its first step, but
    with residual branches that compute: random features for the probes."""
    asked = pretrain.asked_for(pretrain.parse(flags))
    names = ("arch", "patch_size", "window", "stem", "image_size")
    settings = {name: asked[name] for name in names}
    size = height_width(asked["image_size"])
    torch.manual_seed(seed_for(asked["seed"]))
    encoder = build_encoder(asked["arch"], size, asked["drop_path"], asked["patch_size"],
                            asked["window"], asked["stem"])
    open_residual_branches(encoder)
    out = Path(asked["out"])
    torch.save(encoder.backbone.state_dict(), out / "backbone.pt")
    (out / "args.json").write_text(json.dumps(settings) + "\n")


WORKERS = re.compile(r"--workers \d+ ?")
PROGRAMS = {"pretrain": pretrain.main, "finetune": finetune.main, "segment": segment.main,
            "detect": detect.main, "random": save_random_backbone}
SCRIPTS = {"pretrain": pretrain.__file__, "finetune": finetune.__file__,
           "segment": segment.__file__, "detect": detect.__file__}


@dataclass(frozen=True)
class Run:
    """A run of a program, made in the folder <out>/<name>."""
    name: str                                                # such as labels-0.1/a2mim-0
    program: str                                             # one of PROGRAMS
    flags: tuple[str, ...]                                   # without its start and --out
    start: tuple[str, ...] = ()                              # --weights FILE, or --init scratch ...
    needs: str = ""                                          # the run that writes these weights
    # length in training steps of its program; None: not known yet
    steps: float | None = None

    @property
    def argv(self) -> list[str]:
        return [*self.flags, *self.start]

    def is_done(self, out: Path) -> bool:
        return (out / self.name).exists()


def check_flags(runs: list[Run], out: Path) -> None:
    """Raises ValueError if a run that is there, or was begun, has other flags. The number of
    workers may differ, because it changes no result."""
    for run in runs:
        for folder in (out / run.name, out / f"{run.name}.part"):
            file = folder / "flags.txt"
            if not file.is_file():
                continue
            before = file.read_text()
            now = shlex.join(run.argv)
            if WORKERS.sub("", before) != WORKERS.sub("", now):
                raise ValueError(f"{printable(str(folder))}: was made with other flags "
                                 f"({printable(before)}); remove it, or choose another --out")


# ---- one run ----

def make_run(run: Run, out: Path) -> str | None:
    """Makes a run, or continues it. Returns None, or in one line why it failed."""
    if run.is_done(out):
        return None
    part = out / f"{run.name}.part"
    printed = part / "printed.txt"
    try:
        part.mkdir(parents=True, exist_ok=True)
        (part / "flags.txt").write_text(shlex.join(run.argv))
        resume = ["--resume"] if checkpoints_in(part) else []
        # of a start that was cut short
        stale = ["result.json"] if resume else ["log.jsonl", *RESULTS]
        for name in stale:
            (part / name).unlink(missing_ok=True)
        with open(printed, "a") as file, contextlib.redirect_stderr(file):
            PROGRAMS[run.program]([*run.argv, "--out", str(part), *resume])
        part.rename(out / run.name)
    except SystemExit:                                       # the program has printed why
        lines = printed.read_text().splitlines()
        return f"{run.name}: {lines[-1] if lines else 'failed'}"
    except OSError as error:                                 # such as a full disk
        return f"{run.name}: {printable(str(error))}"
    return None


# ---- how long it takes ----

@dataclass(frozen=True)
class Speed:
    """What `time_steps` measured."""
    seconds: float                                           # of a training step
    steps: int                                               # of the whole run


def time_steps(run: Run, start: tuple[str, ...], one_thread: bool, longest: float = 30
               ) -> Speed | None:
    """Makes some training steps of a run, in a folder that is removed. None: it is too short.

    start     instead of the run's own, whose weights may not be there yet
    longest   seconds between the first step and the last

    Raises ValueError if the run refuses its flags, Failed if it ends with an error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, SCRIPTS[run.program], *run.flags, *start, "--log-every", "1",
                   "--out", str(out)]
        environment = dict(os.environ)
        if one_thread:
            environment["OMP_NUM_THREADS"] = "1"
        with open(Path(folder) / "printed.txt", "w+") as printed:
            process = subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)
            try:
                while process.poll() is None and not is_timed(step_times(out), longest):
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
            printed.seek(0)
            lines = printed.read().splitlines() or ["failed"]
        if process.returncode == 2:
            reason = lines[-1].removeprefix(f"{Path(command[1]).name}: error: ")
            raise ValueError(f"{run.program}: {reason}")
        if process.returncode == 1:
            raise Failed(f"{run.program}: {lines[-1]}")
        times = step_times(out)
        if len(times) < 2:
            return None
        settings = json.loads((out / "args.json").read_text())
        last = [line for line in read_lines(out / "log.jsonl") if "loss" in line][-1]
    total = settings.get("iterations")
    if not total:
        if not last["epoch"]:                                # the log rounds it to 4 digits
            return None
        total = round(settings["epochs"] * last["step"] / last["epoch"])
    first = min(2, len(times) - 2)                           # the first steps are slower
    seconds = (times[-1] - times[first]) / (len(times) - 1 - first)
    return Speed(seconds, max(1, total))


def step_times(out: Path) -> list[float]:
    """When each step of a run ended, in seconds."""
    return [line["time"] for line in read_lines(out / "log.jsonl") if "loss" in line]


def is_timed(times: list[float], longest: float) -> bool:
    """Are there enough steps? The log has tenths of seconds."""
    if len(times) < 3:
        return False
    span = times[-1] - times[0]
    return (len(times) >= 10 and span >= 3) or span > longest


def seconds_of(runs: list[Run], speeds: dict[str, Speed]) -> float:
    """How long the runs take one after the other. speeds: program -> what was measured."""
    total = 0.0
    for run in runs:
        if run.program in speeds:
            speed = speeds[run.program]
            steps = speed.steps if run.steps is None else run.steps
            total += steps * speed.seconds
    return total


def in_words(seconds: float) -> str:
    """A length of time: '40 seconds', '12 minutes', '3.4 hours'."""
    if seconds < 100:
        return f"{seconds:.2g} seconds"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"


# ---- all runs ----

def start_worker(one_thread: bool) -> None:
    """In each process that makes runs. A run itself notes Ctrl-C, and saves before it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if one_thread:
        torch.set_num_threads(1)


def make_all(runs: list[Run], out: Path, jobs: int, world: Distributed) -> None:
    """Makes the runs that are missing, in their order, `jobs` at a time.

    A run begins when the run that it needs is complete. A failed run is named, and the others are
    made all the same. Raises Failed if a run failed, and Stopped after a signal: the runs in
    progress are then saved."""
    waiting = [run for run in runs if not run.is_done(out)]
    failed = 0
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run")
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, start_worker, (jobs > 1,))
    running = {}                                             # future -> run
    with bar, Signals(world) as signals, pool:
        try:
            while True:
                ready = [run for run in waiting if not run.needs or (out / run.needs).exists()]
                for run in ready[:jobs - len(running)]:
                    waiting.remove(run)
                    running[pool.submit(make_run, run, out)] = run
                if not running:
                    break
                done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                if signals.number:
                    raise Stopped(signals.number, "stopped; the same command runs what is missing")
                for future in done:
                    complaint = future.result()
                    del running[future]
                    bar.update()
                    if complaint:
                        failed += 1
                        bar.write(complaint, file=sys.stderr)
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()                          # a run in progress saves and ends
            if isinstance(error, BrokenProcessPool):
                raise Failed("a run was killed (by the system, if memory ran out); use fewer "
                             "--jobs; the same command runs what is missing") from None
            raise
    if failed:
        rest = f", and {len(waiting)} that need them were not begun" if waiting else ""
        raise Failed(f"{failed} of {len(runs)} runs failed, see above{rest}; the same command "
                     f"runs what is missing")
