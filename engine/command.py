"""From torchrun's processes to the exit code, with errors of one line.

A mistake of the user (ValueError) ends a run with exit code 2, a failed run (Failed, no memory)
with 1, a signal with 128 + its number. Each is told in one line: what was given, what is allowed,
how to fix it. """

import contextlib
import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from .files import printable, release_locks

# a 1x1 convolution: both
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

# ---- processes: one, or as many as torchrun started ----

@dataclass
class Distributed:
    """Who we are among the processes of torchrun: `rank` of `size`, on `device`. Without torchrun:
    rank 0 of 1.

    The device is the accelerator that torch sees, else the CPU. Nobody has run this on Apple's mps
    or Intel's xpu yet, so what they may lack is left out there. on_mps: no fused AdamW (it makes
    the step that GradScaler skips), no channels_last, one process. Not on_cuda: no pinned memory,
    no copy that does not wait (on mps it comes out wrong), no SyncBatchNorm, no mixed precision
    unless asked for. float64 stays on the CPU."""
    size: int = int(os.environ.get("WORLD_SIZE", 1))
    rank: int = int(os.environ.get("RANK", 0))
    local_rank: int = int(os.environ.get("LOCAL_RANK", 0))
    local_size: int = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    store = None  # where the processes meet, once they do

    def __post_init__(self):
        self.use(torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")

    def use(self, kind: str) -> None:
        self.on_gpu, self.on_cuda, self.on_mps = kind != "cpu", kind == "cuda", kind == "mps"
        self.device = torch.device(kind, self.local_rank) if self.on_gpu else torch.device("cpu")
        # gloo, too: what CPUs agree on does not wait for the GPU
        self.backend = {"cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}.get(kind, "gloo")

    def set_device(self, asked: str | None = None) -> None:
        """This process's own GPU becomes the current one, or the CPU if `asked`. Raises ValueError
        if the device asked for is not there, there are more processes than GPUs, or torch is too
        old for it."""
        here = self.device.type
        if asked not in (None, here, "cpu"):
            has = "no accelerator" if here == "cpu" else here
            raise ValueError(f"--device {asked}: torch sees {has} on this machine; use --device {here}")
        self.use(asked or here)
        if self.on_mps and self.size > 1:
            raise ValueError(f"{self.size} processes on mps: one only; start it without torchrun, or use --device cpu")
        # no GradScaler before
        if self.on_mps and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
            raise ValueError(f"--device mps: needs torch 2.8, this is {torch.__version__}; update it, or use "
                             f"--device cpu")
        if self.on_gpu and not self.on_mps:
            if self.local_size > torch.accelerator.device_count():
                has = torch.accelerator.device_count()
                raise ValueError(f"--nproc_per_node={self.local_size}: this machine has {has} GPUs")
            getattr(torch, self.device.type).set_device(self.device)
            torch.set_float32_matmul_precision("high")

    def rendezvous_store(self):
        """The store where the processes meet. A restart by torchrun has its own, without the
        addresses of the dead."""
        store, *_ = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.store = dist.PrefixStore(f"attempt-{attempt}", store) if self.local_size == self.size else store
        return self.store

    def tells_the_end(self) -> None:
        """Notes, for `end_was_told` of the other processes, that this one is about to say why the
        run ends."""
        with contextlib.suppress(Exception):  # the store may be gone with the process that kept it
            if self.store:
                self.store.set("told", "1")

    def end_was_told(self) -> bool:
        try:
            return self.store is not None and self.store.check(["told"])
        except Exception:  # the store is gone: nobody can have told it there
            return False

    def default_amp(self) -> str:
        """bf16 if the device computes in it natively; else fp16 on an NVIDIA GPU, off on what is
        left."""
        if self.on_gpu and not self.on_cuda:
            return "off"
        if self.on_cuda:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "off"

    def print0(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def broadcast_from_rank0(self, decide):
        """Rank 0 decides; every rank gets its answer, or its ValueError."""
        answer = [None, None]
        if self.rank == 0:
            try:
                answer[0] = decide()
            except (ValueError, OSError) as error:
                answer[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Average over the processes; all take part."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The largest of each number over the processes."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Every process takes rank 0's BatchNorm statistics, which are saved: without SyncBN each
        has its own."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def all_gather(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The rows of all processes, in the order of their ranks, on every one; each may have its
        own number."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts, dim).to(self.device)


# ---- the end of a run ----

class Failed(Exception):
    """The run cannot go on: exit code 1."""


class Stopped(Exception):
    """A signal came, and the run was saved: exit code 128 + the signal."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


class Signals:
    """Notes Ctrl-C, SIGTERM and SIGHUP (a closed terminal), so that the step can be finished and
    saved.

    A second Ctrl-C ends the run at once. SIGHUP stays ignored under nohup."""
    number = 0                                               # of the last one, 0 = none yet

    def __enter__(self) -> "Signals":
        noted = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            noted.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.note) for number in noted}
        return self

    def note(self, number: int, frame) -> None:
        if self.number and number == signal.SIGINT:
            os._exit(130)
        self.number = number

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Unbreakable:
    """A text stream whose write errors are dropped: a closed terminal, or a log on a full disk,
    ends no run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError):                        # ValueError: the stream was closed
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


WORKER_KILLED = "DataLoader worker"                          # in torch's message if one was killed
NO_SHARED_MEMORY = ("shared memory", "Bus error")
NO_MEMORY = ("can't allocate memory", "Unable to allocate", "MPS backend out of memory")


def explain(error: BaseException, world: Distributed) -> tuple[int, str] | None:
    """An exception as (exit code, one line); None for a bug, which needs its traceback."""
    text = str(error)
    lines = text.splitlines() or [""]
    first, last = lines[0].strip(), lines[-1].strip()
    in_worker = text.startswith("Caught ")  # a loader worker sends its whole traceback
    if isinstance(error, Stopped):
        return error.code, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by Ctrl-C"
    if any(words in text for words in NO_SHARED_MEMORY) and isinstance(error, (OSError, RuntimeError)):
        return 1, ("no shared memory is left for the loader (/dev/shm); use --workers 0, or give a container more: "
                   "docker run --shm-size=32g, or --ipc=host")
    if isinstance(error, RuntimeError) and WORKER_KILLED in text and not in_worker:
        return 1, ("a loader worker was killed (by the system, if memory ran out); use fewer --workers, --workers 0, "
                   "or a smaller --batch-size")
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return 1, f"not enough memory ({last or 'no more is said'}); use a smaller --image-size or --batch-size"
    if in_worker and isinstance(error, (Failed, ValueError)):
        text = last.split(": ", 1)[-1]                       # behind the exception's name
    if isinstance(error, ValueError):
        return 2, f"error: {printable(text, None)}"
    if world.size > 1 and (isinstance(error, dist.DistError) or "gloo" in text):
        return 1, (f"lost another process, or could not reach it ({printable(first)}); --resume goes on from the "
                   f"checkpoint")
    if isinstance(error, (Failed, OSError, torch.OutOfMemoryError)):
        return 1, printable(text if isinstance(error, Failed) else first, None)
    # such as no C++ compiler
    if any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__):
        return 1, f"--compile: {first}; repair that, or run without it"
    return None


def clear_frames(error: BaseException | None) -> None:
    """Empties the frames of an exception and of those that led to it.

    One of them may hold the loader, whose workers ignore SIGTERM: Python would wait for them at its
    end."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def command_line(program: str, parse, train, argv: list[str] | None) -> None:
    """Runs train(parse(argv), world), and turns what went wrong into one line on stderr and an exit
    code."""
    world, code, message = Distributed(), 0, ""
    stderr, sys.stderr = sys.stderr, Unbreakable(sys.stderr)
    try:
        train(parse(argv), world)
    except (Exception, KeyboardInterrupt) as error:
        if known := explain(error, world):
            code, message = known
        else:
            code = 1
            traceback.print_exception(error)
        clear_frames(error)
    finally:
        release_locks()
    failed = code in (1, 2)
    if failed and world.rank:
        wait_for_rank_0(world)
        message = message and f"rank {world.rank}: {message}"
    if message and (failed or not world.rank):
        world.tells_the_end()
        print(f"{program}: {message}", file=sys.stderr, flush=True)
    sys.stderr = stderr
    if failed and world.size > 1:
        os._exit(code)  # the others may be waiting for us; the launcher ends them
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # DDP keeps the group; its threads must end before Python
    if code:
        sys.exit(code)


def wait_for_rank_0(world: Distributed) -> None:
    """Rank 0 tells what went wrong, for all. If it was killed it cannot: torchrun then ends the
    others by SIGTERM, and this process speaks; so it does if nobody has ended it after 10
    seconds."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    if ended.wait(10) and world.end_was_told():
        os._exit(1)
