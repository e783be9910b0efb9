"""From torchrun's processes to the exit code, with errors of one line.

    Distributed    this process among those of torchrun: rank, device, collectives
    Signals        notes Ctrl-C and SIGTERM, so that a step can be finished
    explain        an exception as an exit code and one line
    command_line   runs a program

Exit codes: 2 for a mistake of the user (ValueError), 1 for a failed run (Failed, no memory), and
128 + its number for a signal. Each is explained in one line: what was given, what is allowed, how
to fix it.
"""

import contextlib
import gc
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from .files import printable, release_locks

# DDP warns about the strides of 1x1 convolutions, which are the same in both memory formats
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
# its new name, forward_sync_buffers, is not in torch 2.6
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")

# ---- processes: one, or as many as torchrun started ----

@dataclass
class Distributed:
    """This process among those of torchrun: `rank` of `size`, on `device`. Without torchrun: rank 0
    of 1.

    The device is the accelerator that torch sees, or the CPU if there is none. Apple's mps and
    Intel's xpu are untested, so a run does without what they may lack:

    on_mps       no fused AdamW (it makes the step that GradScaler skips), no channels_last, one
                 process
    not on_cuda  no pinned memory, no copies that overlap (on mps they come out wrong), no
                 SyncBatchNorm, mixed precision only if asked for

    float64 stays on the CPU."""
    size: int = int(os.environ.get("WORLD_SIZE", 1))
    rank: int = int(os.environ.get("RANK", 0))
    local_rank: int = int(os.environ.get("LOCAL_RANK", 0))
    local_size: int = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    store = None                                             # shared by the processes, once joined
    was_terminated = False                                   # SIGTERM was noted

    def __post_init__(self):
        if torch.accelerator.is_available():
            self.use(torch.accelerator.current_accelerator().type)
        else:
            self.use("cpu")

    def use(self, kind: str) -> None:
        """Sets the device and what follows from it."""
        self.on_gpu = kind != "cpu"
        self.on_cuda = kind == "cuda"
        self.on_mps = kind == "mps"
        self.device = torch.device(kind, self.local_rank) if self.on_gpu else torch.device("cpu")
        # gloo beside the GPU's backend, so that collectives of CPU tensors do not wait for the GPU
        backends = {"cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
        self.backend = backends.get(kind, "gloo")

    def set_device(self, asked: str | None = None, fixed_sizes: bool = True) -> None:
        """Makes this process's own GPU the current one.

        asked        the kind of device by --device
        fixed_sizes  all batches have one size: cuDNN may try which of its algorithms is the fastest

        Raises ValueError if there is no such device, if there are more processes than GPUs, or if
        torch is too old for it."""
        found = self.device.type
        if asked not in (None, found, "cpu"):
            sees = "no accelerator" if found == "cpu" else found
            raise ValueError(f"--device {asked}: torch sees {sees} on this machine; use --device "
                             f"{found}")
        self.use(asked or found)
        if self.on_mps and self.size > 1:
            raise ValueError(f"{self.size} processes on mps: one only; start it without torchrun, "
                             f"or use --device cpu")
        if self.on_mps:
            major, minor = torch.__version__.split(".")[:2]
            if (int(major), int(minor)) < (2, 8):            # older ones have no GradScaler
                raise ValueError(f"--device mps: needs torch 2.8, this is {torch.__version__}; "
                                 f"update it, or use --device cpu")
        if self.on_gpu and not self.on_mps:
            count = torch.accelerator.device_count()
            if self.local_size > count:
                raise ValueError(f"--nproc_per_node={self.local_size}: this machine has {count} "
                                 f"GPUs")
            getattr(torch, self.device.type).set_device(self.device)
            torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = self.on_cuda and fixed_sizes

    def join(self) -> None:
        """Joins the processes of torchrun. Does nothing for a process alone."""
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group(self.backend, store=self.rendezvous_store(), rank=self.rank,
                                    world_size=self.size)
            os.register_at_fork(before=let_threads_finish)

    def rendezvous_store(self):
        """The store in which the processes find one another.

        Each restart by torchrun uses names of its own, so that no process reads the address of one
        that has ended."""
        self.store, *_ = next(dist.rendezvous("env://"))
        if self.local_size == self.size:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            self.store = dist.PrefixStore(f"attempt-{attempt}", self.store)
        return self.store

    def note_end_told(self) -> None:
        """Notes in the store that this process is about to print why the run ends."""
        with contextlib.suppress(Exception):                 # its process may be gone
            if self.store:
                self.store.set("told", "1")

    def end_was_told(self) -> bool:
        """Has a process noted that it prints why the run ends?"""
        try:
            return self.store is not None and self.store.check(["told"])
        except Exception:                                    # the store's process is gone
            return False

    def default_amp(self) -> str:
        """bf16 if the device computes in it natively; otherwise fp16 on an NVIDIA GPU, off
        elsewhere."""
        if self.on_cuda:
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return "bf16" if has_bf16 else "fp16"
        if self.on_gpu:
            return "off"
        if not hasattr(torch.cpu, "get_capabilities"):
            return "off"
        cpu = torch.cpu.get_capabilities()
        return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "off"

    def print0(self, text: str) -> None:
        """Prints on stderr of rank 0, above the progress bar."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def broadcast_from_rank0(self, decide):
        """Calls decide() on rank 0; every rank returns its result, or raises its ValueError. An
        OSError becomes a ValueError."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = decide()
            except (ValueError, OSError) as raised:
                error = str(raised)
        if self.size > 1:
            both = [result, error]
            dist.broadcast_object_list(both, src=0, device=torch.device("cpu"))
            result, error = both
        if error is not None:
            raise ValueError(error)
        return result

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place. All take part."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """The mean over the processes; `values` then holds the sum. All take part."""
        return self.all_reduce_sum(values) / self.size

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The maximum of each number over the processes. All take part."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copies rank 0's BatchNorm statistics, which are saved, to every process. Without SyncBN
        the processes have different ones."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def all_gather(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The rows of all processes in the order of their ranks, on every process. Each process may
        have another number of rows."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts, dim).to(self.device)


def let_threads_finish() -> None:
    """Lets gloo's threads release the tensors of the last collective, for which they need the GIL.

    Before a fork: in Python before 3.11.10 a loader worker hangs for ever in its first lines if one
    of them begins to wait for the GIL at that moment (CPython's gh-112275). Before the end: DDP may
    hold the GIL while it waits for these threads."""
    time.sleep(0.05)


# ---- the end of a run ----

class Failed(Exception):
    """The run cannot continue: exit code 1."""


class Stopped(Exception):
    """The run was stopped and saved after a signal: exit code 128 + its number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


class Signals:
    """Notes Ctrl-C, SIGTERM and SIGHUP (a closed terminal), so that the step can be finished and
    saved.

    A Ctrl-C after another signal ends the run at once. Under nohup SIGHUP is still ignored."""
    number = 0                                               # of the last signal, 0 = none yet

    def __init__(self, world: Distributed):
        self.world = world

    def __enter__(self) -> "Signals":
        noted = [signal.SIGINT, signal.SIGTERM]
        has_hangup = hasattr(signal, "SIGHUP")               # not on Windows
        if has_hangup and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            noted.append(signal.SIGHUP)
        self.handlers_before = {number: signal.signal(number, self.note) for number in noted}
        return self

    def note(self, number: int, frame) -> None:
        if self.number and number == signal.SIGINT:
            os._exit(130)
        self.number = number
        self.world.was_terminated |= number == signal.SIGTERM

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and self.world.size > 1:
            return                     # torchrun's SIGTERM must not come before the error's line
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)


class Unbreakable:
    """A text stream that ignores errors of writing, so that a closed terminal or a log on a full
    disk does not end a run."""

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
    # a loader worker sends its whole traceback as the text of the exception
    from_worker = text.startswith("Caught ")

    if isinstance(error, Stopped):
        return error.code, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by Ctrl-C"

    no_shared_memory = any(words in text for words in NO_SHARED_MEMORY)
    if no_shared_memory and isinstance(error, (OSError, RuntimeError)):
        return 1, ("no shared memory is left for the loader (/dev/shm); use --workers 0, or give a "
                   "container more: docker run --shm-size=32g, or --ipc=host")
    if isinstance(error, RuntimeError) and WORKER_KILLED in text and not from_worker:
        return 1, ("a loader worker was killed (by the system, if memory ran out); use fewer "
                   "--workers, --workers 0, or a smaller --batch-size")
    no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if no_memory or any(words in text for words in NO_MEMORY):
        return 1, (f"not enough memory ({last or 'no details'}); use a smaller --image-size or "
                   f"--batch-size")

    if from_worker and isinstance(error, (Failed, ValueError)):
        text = last.split(": ", 1)[-1]                       # without the name of the exception
    if isinstance(error, ValueError):
        return 2, f"error: {printable(text, None)}"
    of_gloo = isinstance(error, RuntimeError) and "gloo" in text
    if world.size > 1 and (isinstance(error, dist.DistError) or of_gloo):
        return 1, (f"lost another process, or could not reach it ({printable(first)}); give the "
                   f"command again, a training with --resume")
    if isinstance(error, Failed):
        return 1, printable(text, None)
    if isinstance(error, OSError):
        return 1, printable(first, None)

    names = [kind.__name__ for kind in type(error).__mro__]
    if "BackendCompilerFailed" in names:                     # such as no C++ compiler
        return 1, f"--compile: {first}; repair that, or run without it"
    return None


def clear_frames(error: BaseException | None) -> None:
    """Empties the frames of an exception and of the exceptions that led to it.

    A frame may hold the loader, whose workers ignore SIGTERM. Python would wait for these workers
    when it ends."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def command_line(program: str, parse, train, argv: list[str] | None) -> None:
    """Runs train(parse(argv), world). An error becomes one line on stderr and an exit code."""
    world = Distributed()
    code, message = 0, ""
    stderr = sys.stderr                                      # None if it was closed (2>&-)
    sys.stderr = Unbreakable(stderr or open(os.devnull, "w"))
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
        world.note_end_told()
        print(f"{program}: {message}", file=sys.stderr, flush=True)
    sys.stderr = stderr

    if failed and world.size > 1:
        # not by sys.exit, which may wait for the others; torchrun ends them
        os._exit(code)
    if dist.is_initialized():
        let_threads_finish()
        dist.destroy_process_group()
        # DDP still holds the group, whose threads must end before Python does
        gc.collect()
    if code:
        sys.exit(code)


def wait_for_rank_0(world: Distributed) -> None:
    """Lets rank 0 print the error for all processes. Returns if this process has to print its own.

    Torchrun ends the other processes by SIGTERM when rank 0 has ended. If rank 0 has printed
    nothing by then, or if no SIGTERM comes within 10 seconds, this process prints."""
    signal.signal(signal.SIGTERM, Signals(world).note)       # it may have come before
    deadline = time.monotonic() + 10
    while not world.was_terminated and time.monotonic() < deadline:
        time.sleep(0.05)
    # without a store the mistake was in the flags, which are the same for all processes
    if world.was_terminated and (world.store is None or world.end_was_told()):
        os._exit(1)
