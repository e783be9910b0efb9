"""What masked image modeling costs beside its backbone.

    python extras/bench.py                              on a CPU or the GPU
    python extras/bench.py --data /path/to/photos       the loader on your own JPEG files
    python extras/bench.py --rows steps memory          some rows only

    steps       a pre-training step, against a supervised step of the bare backbone
    memory      peak memory of both
    fourier     the Fourier loss, as a share of the pre-training step
    loader      images per second on one core, against decoding the files alone
    shrunk      the loader on files that extras/shrink.py has made, against the files as they are
    processes   two processes of one thread, against one process of two threads
    scaling     images per second by batch size, image side and depth

Two things take turns, A B A B ..., after a warm-up. A row shows the median of the ratios of
neighbours, and their range. Writes table.md, results.json and scaling.png into --out.
"""

import contextlib
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")              # the profiler prints otherwise

import torch
import torch.nn.functional as F
import torchvision
from torchvision.io import ImageReadMode, decode_image, write_jpeg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune
import pretrain
from data import CropAndFlip, Folder, ImageDataset, make_loader, normalise
from engine.command import Distributed, Failed, command_line
from engine.files import printable
from engine.flags import AMP, COUNT, MAX_SIDE, Parser, checked, defaults, number, path
from engine.shapes import Shapes
from extras.chart import bars, check_matplotlib
from extras.output import check_folder, free_name, writing
from extras.shrink import shrink_file
from loss import fourier_loss
from masking import mask_grid, random_mask, resize_mask
from model import build_encoder, get_family

WORLD = Distributed()


# ---- two things in turns ----

def clock(f) -> float:
    """Seconds of one call, the GPU's work included."""
    if WORLD.on_gpu:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    f()
    if WORLD.on_gpu:
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def in_turns(a, b, rounds: int, warm: int = 2) -> tuple[list[float], list[float]]:
    """Seconds of a and of b, called A B A B ... after `warm` rounds that do not count."""
    for _ in range(warm):
        a()
        b()
    pairs = [(clock(a), clock(b)) for _ in range(rounds)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def row(what: str, against: str, a: list[float], b: list[float], unit: str) -> dict:
    """A row of the table: the ratio a / b, and both values. It is printed, too."""
    ratios = [x / y for x, y in zip(a, b)]
    note = f"{short(statistics.median(a))} against {short(statistics.median(b))} {unit}"
    found = dict(what=what, against=against, ratio=statistics.median(ratios), low=min(ratios),
                 high=max(ratios), note=note)
    print(line(found), flush=True)
    return found


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def line(r: dict) -> str:
    ratio = f"{r['ratio']:.3g} ({r['low']:.3g} to {r['high']:.3g})"
    return f"| {r['what']} | {r['against']} | {ratio} | {r['note']} |"


# ---- whole steps ----

def endless(batch: int, size: int):
    """A loader of one batch, laid out as make_loader does: uint8 images, indices, none broken."""
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    images = images.permute(0, 3, 1, 2)                      # channels_last
    if WORLD.on_cuda:
        images = images.pin_memory()
    return itertools.repeat((images, torch.arange(batch), torch.full((batch,), -1)))


def prepared(program, flags: str, world: Distributed) -> tuple:
    """(settings, state) of a run of pretrain or finetune, before its first step."""
    asked = program.asked_for(program.parse(flags.split()))
    if program is pretrain:
        source = pretrain.open_source(asked)
        settings = pretrain.resolve(asked, len(source), world)
        state, *_ = pretrain.prepare(settings, world, None, source, None)
    else:
        source, val = finetune.open_data(asked, world)
        settings = finetune.resolve(asked, len(source), world)
        state = finetune.prepare(settings, world, None, source, val)
    state.model.train()
    return settings, state


def a2mim_step(args: SimpleNamespace, arch: str, batch: int, size: int):
    """The step of pretrain.py, as a function without arguments."""
    flags = (f"--arch {arch} --image-size {size} --batch-size {batch} --recipe imagenet "
             f"--data shapes --workers 0 --amp {args.amp} --val 0 --epochs 1 --out unused")
    settings, state = prepared(pretrain, flags, WORLD)
    batches = endless(batch, size)
    numbers = itertools.count()
    return lambda: pretrain.train_step(next(numbers), batches, settings, WORLD, state)


def bare_step(args: SimpleNamespace, arch: str, batch: int, size: int):
    """A supervised step of the same backbone: features, linear head, cross-entropy, AdamW."""
    net = finetune.Classifier(arch, build_encoder(arch, size), 1000).to(WORLD.device).train()
    channels_last = get_family(arch).convolutional and not WORLD.on_mps
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=not WORLD.on_mps)
    scaler = torch.amp.GradScaler(WORLD.device.type, enabled=args.amp == "fp16")
    labels = torch.randint(1000, (batch,), device=WORLD.device)
    batches = endless(batch, size)

    def step():
        images = normalise(next(batches)[0], WORLD.device).contiguous(memory_format=layout)
        with torch.autocast(WORLD.device.type, AMP[args.amp], enabled=args.amp != "off"):
            logits = net(images)
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def steps(args: SimpleNamespace) -> list[dict]:
    rows = []
    for arch in dict.fromkeys((args.arch, "vit_base")):
        batch = args.batch_size if arch == args.arch else max(1, args.batch_size // 2)
        whole = a2mim_step(args, arch, batch, args.image_size)
        bare = bare_step(args, arch, batch, args.image_size)
        a, b = in_turns(whole, bare, args.rounds)
        rows.append(row(f"whole A2MIM step, {arch}, batch {batch}", f"bare {arch} step", a, b, "s"))
    return rows


def fourier(args: SimpleNamespace) -> list[dict]:
    B, side = args.batch_size, args.image_size
    image, pred = torch.randn(2, B, 3, side, side, device=WORLD.device).unbind()
    pred.requires_grad_()
    mask = random_mask(B, mask_grid((side, side), 32), device=WORLD.device)
    hidden = resize_mask(mask, (side, side))                 # (B, 1, H, W)
    whole = a2mim_step(args, args.arch, B, side)
    rows = []
    for spectrum in ("batch", "image"):
        def loss():
            pred.grad = None
            fourier_loss(pred, image, hidden, spectrum=spectrum).backward()

        a, b = in_turns(loss, whole, args.rounds)
        rows.append(row(f"Fourier loss, {spectrum} spectrum, forward + backward",
                        f"whole A2MIM step, {args.arch}, batch {B}", a, b, "s"))
    return rows


def memory(args: SimpleNamespace) -> list[dict]:
    """What torch has allocated at the peak of two steps: weights, optimiser, activations."""

    def two_steps(make):
        step = make(args, args.arch, args.batch_size, args.image_size)
        step()
        step()

    a = allocated(lambda: two_steps(a2mim_step))
    b = allocated(lambda: two_steps(bare_step))
    return [row("peak memory of the step, allocated by torch", "bare step", [a], [b], "MB")]


def allocated(f) -> float:
    """The most memory that a call allocates at once, in MB. NaN on mps: torch counts none there."""
    gc.collect()                                             # or it would be freed during the call
    if WORLD.on_mps:
        return math.nan
    if WORLD.on_gpu:
        gpu = getattr(torch, WORLD.device.type)
        before = gpu.memory_allocated()
        gpu.reset_peak_memory_stats()
        f()
        return (gpu.max_memory_allocated() - before) / 2**20
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        f()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort()                                           # by time; freed memory is negative
    return max(itertools.accumulate(size for _, size in changes)) / 2**20


# ---- loader, processes, sizes ----

@contextlib.contextmanager
def jpeg_files(folder: str | None, size: tuple[int, int] = (256, 256)):
    """The JPEG files of a folder as a data.Folder, or 320 drawn ones of a size (H, W)."""
    if folder:
        yield Folder(Path(folder), "train"), "files"
        return
    with tempfile.TemporaryDirectory() as temporary:
        drawn = Shapes("train", size)
        for i in range(320):
            write_jpeg(drawn.read(i), f"{temporary}/{i}.jpg", quality=90)
        yield Folder(Path(temporary), "train"), "drawn JPEG files"


def one_pass(source, count: int):
    """A function that loads `count` images in this process, cropped to 224 px."""
    samples = ImageDataset(source, CropAndFlip((224, 224), 0.8), seed=0)
    keys = [(0, i) for i in range(count)]
    batches = [keys[i:i + 32] for i in range(0, count, 32)]
    batches_in_this_process = make_loader(samples, batches, 0, WORLD)

    def load():
        for _ in batches_in_this_process:
            pass

    return load


def images_per_second(a, b, count: int, rounds: int) -> tuple[list[float], list[float]]:
    """Speeds of a and of b, in turns, with one thread as in a loader worker.

    Each call of a or b reads `count` images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = in_turns(a, b, rounds, warm=1)
    torch.set_num_threads(threads)
    a, b = ([count / seconds for seconds in side] for side in times)
    return a, b


def loader(args: SimpleNamespace) -> list[dict]:
    with jpeg_files(args.data) as (source, kind):
        count = min(320, len(source))
        files = [source.path(i) for i in range(count)]

        def decode():
            for file in files:
                decode_image(file, ImageReadMode.RGB)

        a, b = images_per_second(one_pass(source, count), decode, count, args.rounds)
    return [row(f"loader on one core, {count} {kind}, crop 224", "decoding the files alone", a, b,
                "images/s")]


def shrunk(args: SimpleNamespace) -> list[dict]:
    with jpeg_files(args.data, (375, 500)) as (source, kind), \
            tempfile.TemporaryDirectory() as out:
        count = min(320, len(source))
        for name in source.names[:count]:
            shrink_file(os.fsdecode(name), str(source.root), out, side=256, quality=90)
        small = Folder(Path(out), "train")
        a, b = images_per_second(one_pass(small, count), one_pass(source, count), count,
                                 args.rounds)
    return [row(f"loader on one core, {count} {kind} shrunk to 256 px, crop 224",
                "the files as they are", a, b, "images/s")]


def processes(args: SimpleNamespace) -> list[dict]:
    """pretrain.py itself, started by torchrun; the speed is from its log."""
    arch, batch, size = "resnet18", 32, 128                  # on the CPU: one GPU is no two

    def rate(world: int) -> float:
        with tempfile.TemporaryDirectory() as out:
            call = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={world}", "pretrain.py", "--recipe", "imagenet",
                    "--data", "shapes", "--arch", arch, "--image-size", str(size),
                    "--batch-size", str(batch // world), "--epochs", str(12 * batch / 10_000),
                    "--log-every", "2", "--val", "0", "--sheets", "2", "--workers", "0",
                    "--amp", args.amp, "--device", "cpu", "--out", out]
            environment = os.environ | {"OMP_NUM_THREADS": str(2 // world)}
            done = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True, cwd=ROOT, env=environment)
            if done.returncode:
                said = (done.stdout.strip().splitlines() or ["no output"])[-1]
                raise Failed(f"pretrain.py ended with exit code {done.returncode}: {said}")
            records = (Path(out) / "log.jsonl").read_text().splitlines()
        after_warm_up = [json.loads(record) for record in records[3:]]
        return statistics.median(r["images_per_s"] for r in after_warm_up if "images_per_s" in r)

    pairs = [(rate(2), rate(1)) for _ in range(args.rounds)]
    a = [two for two, _ in pairs]
    b = [one for _, one in pairs]
    return [row(f"2 processes x 1 thread on the CPU, {arch}, {size} px, global batch {batch}",
                "1 process x 2 threads", a, b, "images/s")]


def scaling(args: SimpleNamespace) -> dict[str, dict[str, list[float]]]:
    """What grows -> its value -> [images per second]. ResNet-18, batch 16 and 128 px otherwise."""

    def rate(arch: str = "resnet18", batch: int = 16, size: int = 128) -> list[float]:
        step = a2mim_step(args, arch, batch, size)
        step()
        return [batch / statistics.median(clock(step) for _ in range(5))]

    depths = ("resnet18", "resnet34", "resnet50", "resnet101")
    return {
        "batch (resnet18, 128 px)": {str(n): rate(batch=n) for n in (4, 16, 64)},
        "image side, px (resnet18, batch 16)": {str(n): rate(size=n) for n in (64, 128, 256)},
        "depth (128 px, batch 16)": {arch: rate(arch) for arch in depths},
    }


# ---- the command ----

ROWS = {f.__name__: f for f in (steps, memory, fourier, loader, shrunk, processes, scaling)}
FLAGS = {
    "what is measured": {
        "data": (None, path("DIR"), "a folder of JPEG files for the loader (drawn ones)"),
        "arch": ("resnet50", checked("NAME", get_family), "backbone"),
        "batch_size": (None, COUNT, "images per step (CPU 16, GPU 128)"),
        "image_size": (224, number(int, 32, MAX_SIDE), "side in pixels"),
        "amp": ("off", tuple(AMP), "mixed precision of both sides"),
        "rounds": (7, COUNT, "turns that count")},
    "where it goes": {
        "out": (None, path("DIR"),
                "files in this folder are replaced (runs/bench, numbered if taken)")},
}


def device_name() -> str:
    if WORLD.on_cuda:
        return torch.cuda.get_device_name()
    if WORLD.on_gpu:
        return WORLD.device.type
    return f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()})"


def bench(args: SimpleNamespace, world: Distributed) -> None:
    """Measures, prints, writes. Raises ValueError for a mistake."""
    out = Path(args.out) if args.out else free_name(Path("runs/bench"))
    check_folder(out)
    random_mask(1, mask_grid((args.image_size, args.image_size), 32))        # raises if too small
    if args.data and not Path(args.data).is_dir():
        raise ValueError(f"--data {printable(args.data)}: no such folder")
    if args.data and {"loader", "shrunk"} & set(args.rows):
        Folder(Path(args.data), "train")
    if "scaling" in args.rows:
        check_matplotlib()
    args.batch_size = args.batch_size or (128 if WORLD.on_gpu else 16)
    WORLD.set_device()

    began = time.time()
    rows, speeds, failed = [], {}, []
    for name in args.rows:
        try:
            if name == "scaling":
                speeds = scaling(args)
            else:
                rows += ROWS[name](args)
        except Exception as error:                           # what was measured is still written
            if not isinstance(error, Failed):
                traceback.print_exc()
            failed.append(f"{name} ({printable(str(error))})")
    about = (f"{device_name()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
             f"amp {args.amp}, {args.image_size} px, {args.rounds} turns; "
             f"{(time.time() - began) / 60:.0f} minutes")
    lines = [about]
    if rows:
        lines += ["", "| row | measured against | ratio: median (range) | values |",
                  "|---|---|---|---|", *map(line, rows)]
    if speeds:
        lines += ["", "| what grows | value | images/s |", "|---|---|---|"]
    for grows, values in speeds.items():
        lines += [f"| {grows} | {value} | {speed:.1f} |" for value, [speed] in values.items()]
    print("\n".join(lines))
    with writing(out / "table.md"):
        if speeds:
            bars(speeds, "A2MIM step by size", "images per second").save(out / "scaling.png")
        (out / "table.md").write_text("\n".join(lines) + "\n")
        results = json.dumps(dict(rows=rows, scaling=speeds), indent=1)
        (out / "results.json").write_text(results + "\n")
    print(f"written to {out}/")
    if failed:
        raise Failed(f"not measured: {', '.join(failed)}")


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Raises ValueError for a value that is off."""
    usage = "%(prog)s [--data DIR] [--rows NAME ...] [options]"
    parser = Parser("bench.py", usage, __doc__, FLAGS, {})
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME",
                        help=f"some of {', '.join(ROWS)} (all)")
    return SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("bench.py", parse, bench, argv)


if __name__ == "__main__":
    main()
