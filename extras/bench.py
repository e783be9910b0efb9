"""What masked image modeling costs beside its backbone: every figure is a ratio, measured side by side in one run.

    python extras/bench.py                              on a CPU or the GPU
    python extras/bench.py --data /path/to/photos       the loader on your own JPEG files (else: drawn ones)
    python extras/bench.py --rows fourier attention     some rows only

Two things take turns, A B A B ..., after a warm-up; a row says the median of the ratios of neighbours and their range,
and whether that meets the target. Writes table.md, results.json and scaling.png into --out.
The default is runs/bench, or runs/bench-2 if that is taken, and so on.
"""

import argparse
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
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")           # the profiler talks

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as tvf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune
import model
import pretrain
from data import (MEAN, STD, CropAndFlip, Folder, ImageDataset, make_loader,
                  normalise, open_images)
from engine.command import Distributed, command_line
from engine.flags import AMP, MAX_SIDE, Parser, checked, defaults, number, path
from extras.output import check_folder, free_name, writing
from loss import fourier_loss
from masking import mask_grid, random_mask, resize_mask
from model import ARCHS, Attention, build_encoder, get_family

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
    times = [(clock(a), clock(b)) for _ in range(warm + rounds)][warm:]
    return tuple(map(list, zip(*times)))


def seconds(t: float) -> str:
    return f"{t:.2f} s" if t >= 1 else f"{1000 * t:.3g} ms"


class Table:
    """Rows as they are measured: what, against what, the ratio with its range, the target."""

    def __init__(self):
        self.rows = []

    def add(
        self, what: str, against: str, ratios: list[float], target: tuple[str, float] | None, note: str = ""
    ) -> None:
        """target: ('<=', 1.15), ('>=', 4) or None. The ratio is told as it stands in the target: cost, or gain."""
        ratio = statistics.median(ratios)
        met = (
            ""
            if target is None
            else "yes"
            if (ratio <= target[1] if target[0] == "<=" else ratio >= target[1])
            else "NO"
        )
        row = dict(
            what=what,
            against=against,
            ratio=ratio,
            low=min(ratios),
            high=max(ratios),
            target="report" if target is None else f"{target[0]} {target[1]:g}",
            met=met,
            note=note,
        )
        self.rows.append(row)
        print(self.line(row), flush=True)

    @staticmethod
    def line(r: dict) -> str:
        ratio = f"{r['ratio']:.3g} ({r['low']:.3g} to {r['high']:.3g})"
        return f"| {r['what']} | {r['against']} | {ratio} | {r['target']} | {r['met']} | {r['note']} |"

    def text(self) -> str:
        return "\n".join(
            [
                "| row | measured against | ratio: median (range) | target | met | |",
                "|---|---|---|---|---|---|",
                *map(self.line, self.rows),
            ]
        )


def over(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b)]


# ---- the loss ----

def textbook_fourier(pred, image, hidden, spectrum: str, u: float = 1e-3):
    """The Fourier loss as the papers write it: the complex spectrum of every image; if asked, the batch average."""
    w = hidden.float()
    w = w + (1 - w) * u
    p = pred * w + (0.5 * pred.detach() + 0.5 * image) * (1 - w)
    P, X = torch.fft.fft2(p, norm="ortho"), torch.fft.fft2(image, norm="ortho")
    D = P.mean(0, keepdim=True) - X.mean(0, keepdim=True) if spectrum == "batch" else P - X
    power = D.real**2 + D.imag**2
    weight = torch.log(1 + power.sqrt()).detach()
    weight = weight / (weight.max() if spectrum == "batch" else weight.amax((2, 3), keepdim=True))
    return (torch.nan_to_num(weight).clamp(0, 1) * power).mean()


def fourier(table: Table, args) -> None:
    image, pred = torch.randn(2, 64, 3, 224, 224, device=WORLD.device).unbind()
    pred.requires_grad_()
    hidden = resize_mask(random_mask(64, (7, 7), device=WORLD.device), (224, 224))
    for spectrum, target in (("batch", 3.0), ("image", 0.9)):
        def ours():
            pred.grad = None
            ours.value = fourier_loss(pred, image, hidden, spectrum=spectrum)
            ours.value.backward()

        def theirs():
            pred.grad = None
            theirs.value = textbook_fourier(pred, image, hidden, spectrum)
            theirs.value.backward()
        b, a = in_turns(theirs, ours, args.rounds)
        apart = abs(ours.value.item() / theirs.value.item() - 1)
        assert apart < 1e-5, f"the two losses differ by {apart:.1e}"
        table.add(
            f"Fourier loss, {spectrum} spectrum, forward + backward, (64, 3, 224, 224)",
            "complex fft2 of every image",
            over(b, a),
            (">=", target),
            f"{seconds(statistics.median(a))} against {seconds(statistics.median(b))}; values {apart:.0e} apart",
        )


# ---- whole steps ----

def flags(args, arch: str, batch: int, *more: str) -> list[str]:
    return [
        "--arch",
        arch,
        "--image-size",
        str(args.image_size),
        "--batch-size",
        str(batch),
        "--recipe",
        "imagenet",
        "--data",
        "shapes",
        "--workers",
        "0",
        "--amp",
        args.amp,
        *more,
    ]


def forever(batch: int, size: int):
    """A loader that has the batch at hand: uint8 images, their indices, nothing broken."""
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    return itertools.repeat((images, torch.arange(batch), torch.full((batch,), -1)))


def a2mim_step(args, arch: str, batch: int, *more: str):
    """pretrain.py's own step, and its run."""
    settings = pretrain.parse(flags(args, arch, batch, *more))
    settings.out, settings.epochs, settings.amp = "unused", 1.0, settings.amp or WORLD.default_amp()
    settings.val = 0.0
    run, *_ = pretrain.prepare(settings, WORLD, None)
    run.model.train()
    stream, numbers = forever(batch, args.image_size), itertools.count()
    return lambda: pretrain.train_step(next(numbers), stream, settings, WORLD, run), run


def bare_step(args, arch: str, batch: int):
    """What a supervised step of the same backbone costs: its features, pooled, a linear head, cross-entropy, AdamW."""
    net = finetune.Classifier(arch, build_encoder(arch, args.image_size), 1000).to(WORLD.device)
    channels_last = get_family(arch).convolutional and not WORLD.on_mps
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=layout).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=not WORLD.on_mps)
    labels, stream = torch.randint(1000, (batch,), device=WORLD.device), forever(batch, args.image_size)
    scaler = torch.amp.GradScaler(WORLD.device.type, enabled=args.amp == "fp16")
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16

    def step():
        images = normalise(next(stream)[0], WORLD.device).contiguous(memory_format=layout)
        with torch.autocast(WORLD.device.type, dtype, enabled=args.amp != "off"):
            logits = net(images)
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return step


def steps(table: Table, args) -> None:
    for arch, target in ((args.arch, 1.15), ("vit_base", 1.06)):
        batch = args.batch_size if arch == args.arch else max(1, args.batch_size // 2)
        whole, run = a2mim_step(args, arch, batch)
        a, b = in_turns(whole, bare_step(args, arch, batch), args.rounds)
        table.add(
            f"whole A2MIM step, {arch}, batch {batch}",
            f"bare {arch} step",
            over(a, b),
            ("<=", target),
            f"{seconds(statistics.median(a))} against {seconds(statistics.median(b))}",
        )
        if arch == args.arch:
            with parts(run) as spent:
                shares = []
                for _ in range(2 + args.rounds):
                    spent.clear()
                    whole_time = clock(whole)
                    shares.append(sum(spent) / whole_time)
            table.add(
                "masks + fill + token + loss, forward + backward",
                "the whole step, timed inside it",
                shares[2:],
                ("<=", 0.02),
                seconds(sum(spent)),
            )


@contextlib.contextmanager
def parts(run):
    """While open, masks, fill, token and loss of a step append their seconds, forward and backward, to a list."""
    spent = []

    def now() -> float:
        if WORLD.on_gpu:
            torch.accelerator.synchronize()
        return time.perf_counter()

    def timed(f):
        def call(*given, **options):
            start = now()
            result = f(*given, **options)
            spent.append(now() - start)
            into, out = given[0], result[0] if isinstance(result, tuple) else result
            if (
                isinstance(into, torch.Tensor) and into.requires_grad
            ):  # backward: from the gradient of `out` to that of `into`
                begun = []
                out.register_hook(lambda grad: begun.append(now()))
                into.register_hook(lambda grad: spent.append(now() - begun[0]))
            return result
        return call
    with contextlib.ExitStack() as stack:
        for place, name in (
            (pretrain, "random_mask"),
            (model, "fill_hidden"),
            (run.model.mask_token, "forward"),
            (pretrain, "a2mim_loss"),
        ):
            stack.enter_context(patch.object(place, name, timed(getattr(place, name))))
        yield spent


def memory(table: Table, args) -> None:
    """What torch had allocated at the peak of building it and making two steps: weights, optimiser, activations."""

    def two(make):
        step = make()
        for _ in range(2):
            step()
    a = allocated(lambda: two(lambda: a2mim_step(args, args.arch, args.batch_size)[0]))
    b = allocated(lambda: two(lambda: bare_step(args, args.arch, args.batch_size)))
    table.add(
        "peak memory of the step, allocated by torch",
        "bare step",
        [a / b],
        ("<=", 1.12),
        f"{a:.0f} MB against {b:.0f} MB",
    )


def allocated(f) -> float:
    """The most memory that a call had allocated at once beyond what there was before, MB."""
    gc.collect()                                             # what is left over must not be freed meanwhile
    if WORLD.on_mps:
        return math.nan                                      # torch does not count it there
    if WORLD.on_gpu:
        gpu = getattr(torch, WORLD.device.type)
        before = gpu.memory_allocated()
        gpu.reset_peak_memory_stats()
        f()
        return (gpu.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 2**20


def tuning(table: Table, args) -> None:
    settings = finetune.parse(
        [
            *flags(args, args.arch, args.batch_size),
            "--recipe",
            "rsb_a2",
            "--repeats",
            "1",
            "--drop-path",
            "0",
            "--init",
            "scratch",
        ]
    )
    settings.out, settings.amp = "unused", settings.amp or WORLD.default_amp()
    run = finetune.prepare(settings, WORLD, None)
    run.model.train()
    stream, numbers = forever(args.batch_size, args.image_size), itertools.count()
    a, b = in_turns(
        lambda: finetune.train_step(next(numbers), stream, settings, WORLD, run),
        bare_step(args, args.arch, args.batch_size),
        args.rounds,
    )
    table.add(
        f"fine-tuning step, {args.arch}, mixup or cutmix, EMA, LAMB",
        "bare step with AdamW",
        over(a, b),
        ("<=", 1.10),
        f"{seconds(statistics.median(a))} against {seconds(statistics.median(b))}",
    )


def modes(table: Table, args) -> None:
    """Reported without a target: precision with memory format, and the compiler."""
    plain = argparse.Namespace(**{**vars(args), "amp": "off"})
    contiguous = a2mim_step(plain, args.arch, args.batch_size, "--no-channels-last")[0]
    low = "bf16" if not WORLD.on_cuda or torch.cuda.is_bf16_supported() else "fp16"
    fast = a2mim_step(argparse.Namespace(**{**vars(args), "amp": low}), args.arch, args.batch_size)[0]
    b, a = in_turns(contiguous, fast, args.rounds)
    table.add(
        f"{low} autocast + channels_last, {args.arch}",
        "fp32 contiguous",
        over(b, a),
        None,
        f"{seconds(statistics.median(a))} against {seconds(statistics.median(b))}",
    )
    eager, compiled = (
        a2mim_step(args, args.arch, args.batch_size)[0],
        a2mim_step(args, args.arch, args.batch_size, "--compile")[0],
    )
    try:
        b, a = in_turns(eager, compiled, args.rounds)
    except torch._dynamo.exc.BackendCompilerFailed as error:                 # such as no C++ compiler
        return print(f"--compile: not measured ({str(error).splitlines()[0]})")
    table.add(
        f"--compile, {args.arch}",
        "eager",
        over(b, a),
        None,
        f"{seconds(statistics.median(a))} against {seconds(statistics.median(b))}",
    )


# ---- attention ----

def explicit_attention(block: Attention, x):
    """The same block, its softmax written out."""
    B, N, C = x.shape
    bias = torch.cat([block.q_bias, torch.zeros_like(block.q_bias), block.v_bias])
    q, k, v = F.linear(x, block.qkv.weight, bias).view(B, N, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * (C // block.heads) ** -0.5 + block.relative_position_bias_table[
        block.relative_position_index
    ].permute(2, 0, 1)
    return block.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


def attention(table: Table, args) -> None:
    block = Attention(768, 12, (14, 14)).to(WORLD.device)
    x = torch.randn(8, 197, 768, device=WORLD.device, requires_grad=True)
    torch.testing.assert_close(block(x), explicit_attention(block, x), atol=1e-4, rtol=1e-4)
    theirs = lambda x: explicit_attention(block, x)
    for name, ours, textbook in (("training", lambda: block(x).sum().backward(), lambda: theirs(x).sum().backward()),
                                 ("evaluation", torch.no_grad()(lambda: block(x)), torch.no_grad()(lambda: theirs(x)))):
        b, a = in_turns(textbook, ours, 10 * args.rounds)
        table.add(
            f"relative-position attention of ViT-B, {name}",
            "explicit softmax",
            over(b, a),
            (">=", 1.0),
            f"{seconds(statistics.median(a))} against {seconds(statistics.median(b))}",
        )
        a, b = allocated(ours), allocated(textbook)
        table.add(
            f"the same, peak memory in {name}",
            "explicit softmax",
            [a / b],
            ("<=", 0.99),
            f"{a:.1f} MB against {b:.1f} MB",
        )


# ---- the loader ----

class Peers(Dataset):
    """The usual pipeline: Pillow, bilinear crop, flip, float tensor, normalise."""

    def __init__(self, files: list[str]):
        self.files = files
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(224, (0.8, 1.0)), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        with open(self.files[i], "rb") as file:
            return self.transform(Image.open(file).convert("RGB")), i


class Decoded(Dataset):
    """The files, decoded by torchvision, and nothing else."""

    def __init__(self, files: list[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> int:
        return int(decode_image(self.files[i], ImageReadMode.RGB)[0, 0, 0])


class Forever:
    """Batches of 32 keys, round and round."""

    def __init__(self, keys: list):
        self.keys = keys

    def __iter__(self):
        turn = itertools.cycle(self.keys)
        while True:
            yield list(itertools.islice(turn, 32))


def loader(table: Table, args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            drawn = Shapes("train", (256, 256))
            for i in range(320):
                torchvision.io.write_jpeg(drawn.read(i), f"{folder}/{i}.jpg", quality=90)
        source = Folder(Path(args.data or folder), "train")
        files = [source.name(i) for i in range(len(source))]
        kind = f"{len(files)} {'photographs' if args.data else 'drawn JPEG files'}"

        def drain(batches):
            """Seconds per image, 30 batches of 32 at a time, by one worker that has already started."""
            stream = iter(batches)
            while True:
                time.sleep(0.2)  # let it fill its queue, so that it is idle while another is timed
                yield clock(lambda: [next(stream) for _ in range(30)]) / 30 / 32

        def usual(dataset) -> DataLoader:
            order = Forever(list(range(len(files))))
            return DataLoader(dataset, batch_sampler=order, num_workers=1, prefetch_factor=4)

        samples, keys = ImageDataset(source, CropAndFlip((224, 224), 0.8), 0), [(0, i) for i in range(len(files))]
        ours = drain(make_loader(samples, Forever(keys), 1, WORLD))
        peers, bare = drain(usual(Peers(files))), drain(usual(Decoded(files)))
        times = [(next(ours), next(peers), next(bare)) for _ in range(args.rounds + 1)][1:]
    a, b, c = zip(*times)
    rates = f"{1 / statistics.median(a):.0f} images/s against"
    table.add(
        f"one loader worker, {kind}, crop 224",
        "Pillow, bilinear crop, flip, ToTensor, Normalize",
        over(b, a),
        (">=", 2.5),
        f"{rates} {1 / statistics.median(b):.0f}",
    )
    table.add(
        "one loader worker, the same",
        "decoding the files and nothing else",
        over(c, a),
        (">=", 0.4),
        f"{rates} {1 / statistics.median(c):.0f}",
    )
    large_photographs(table, args)


def large_photographs(table: Table, args) -> None:
    """Files as of a phone, decoded in part as pre-training does, against the whole, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(12):
            photo = tvf.resize(Shapes("train", (256, 256)).read(i), [3000, 4000])
            noise = torch.randn(3000, 4000).mul_(6).to(torch.int16)  # of a sensor: it fills the file
            torchvision.io.write_jpeg((photo + noise).clamp_(0, 255).byte(), f"{folder}/{i}.jpg", quality=90)
        megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 12e6
        crop = CropAndFlip((224, 224), 0.8)
        whole, part = (
            ImageDataset(open_images(folder, "train", (224, 224), crop_min=least), crop, 0) for least in (None, 0.8)
        )
        b, a = in_turns(*(lambda s=s: [s[0, i] for i in range(12)] for s in (whole, part)), args.rounds, warm=1)
    table.add(
        f"12 photographs of 4000 x 3000, {megabytes:.1f} MB each, crop 224",
        "decoding them whole",
        over(b, a),
        (">=", 1.5),
        f"{seconds(statistics.median(a) / 12)} against {seconds(statistics.median(b) / 12)} each",
    )


# ---- processes, sizes ----

def processes(table: Table, args) -> None:
    """Two processes of one thread against one of two, as torchrun starts them: pretrain.py itself, by its own log."""
    arch, batch, size = "resnet18" if not WORLD.on_gpu else args.arch, 32, 128

    def rate(world: int, folder: str) -> float:
        call = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={world}",
            "pretrain.py",
            "--recipe",
            "imagenet",
            "--data",
            "shapes",
            "--arch",
            arch,
            "--image-size",
            str(size),
            "--batch-size",
            str(batch // world),
            "--epochs",
            str(12 * batch / 10_000),
            "--log-every",
            "2",
            "--val",
            "0",
            "--sheets",
            "2",
            "--workers",
            "0",
            "--amp",
            args.amp,
            "--out",
            folder,
        ]
        subprocess.run(
            call, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(2 // world)}
        )
        return statistics.median(
            json.loads(line)["images_per_s"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()[3:]
        )

    with tempfile.TemporaryDirectory() as folder:
        pairs = [(rate(2, f"{folder}/two-{i}"), rate(1, f"{folder}/one-{i}")) for i in range(args.rounds)]
    table.add(
        f"2 processes x 1 thread by torchrun, {arch}, {size} px, global batch {batch}",
        "1 process x 2 threads",
        [a / b for a, b in pairs],
        (">=", 0.85),
        f"{statistics.median(a for a, _ in pairs):.1f} images/s against {statistics.median(b for _, b in pairs):.1f}",
    )


def scaling(table: Table, args) -> list[tuple[str, str, float]]:
    """images/s as one thing grows: [(what grows, value, images/s)]."""
    found = []
    def rate(grows: str, value, arch: str = "resnet18", batch: int = 16, size: int = 128) -> None:
        step, _ = a2mim_step(argparse.Namespace(**{**vars(args), "image_size": size}), arch, batch)
        step()
        found.append((grows, str(value), batch / statistics.median(clock(step) for _ in range(5))))
    for batch in (4, 16, 64):
        rate("batch (resnet18, 128 px)", batch, batch=batch)
    for size in (64, 128, 256):
        rate("image side, px (resnet18, batch 16)", size, size=size)
    for arch in ("resnet18", "resnet34", "resnet50", "resnet101"):
        rate("depth (128 px, batch 16)", arch, arch=arch)
    for size in (128, 256):
        rate("image side, px (deit_small, batch 16)", size, size=size, arch="deit_small")
    by = {(grows, value): speed for grows, value, speed in found}
    cost = by["image side, px (resnet18, batch 16)", "128"] / by["image side, px (resnet18, batch 16)", "256"]
    table.add(
        "seconds per image at 256 px, resnet18", "128 px, a quarter of the pixels", [cost], None, "linear in pixels: 4"
    )
    return found


def plot(path: Path, found: list[tuple[str, str, float]]) -> None:
    groups = list(dict.fromkeys(grows for grows, *_ in found))
    left, step, width = 110, 22, 560
    page = Image.new("RGB", (width, 20 + step * (len(found) + len(groups))), "white")
    draw, font, y, top = ImageDraw.Draw(page), ImageFont.load_default(13), 8, max(speed for *_, speed in found)
    for group in groups:
        draw.text((10, y + step / 2), f"images/s by {group}", "black", font, anchor="lm")
        y += step
        for _, value, speed in (f for f in found if f[0] == group):
            draw.text((left - 8, y + step / 2), value, "black", font, anchor="rm")
            draw.rectangle([left, y + 4, left + speed / top * (width - left - 70), y + step - 4], "#1f5fbf")
            draw.text(
                (left + speed / top * (width - left - 70) + 8, y + step / 2), f"{speed:.1f}", "black", font, anchor="lm"
            )
            y += step
    page.save(path)


ROWS = {f.__name__: f for f in (fourier, steps, memory, loader, attention, processes, tuning, modes, scaling)}


FLAGS = {
    "what is measured": {
        "data": (None, path("DIR"), "a folder of JPEG files for the loader (drawn ones)"),
        "arch": ("resnet50", checked("NAME", get_family), "backbone"),
        "batch_size": (None, number(int, 1), "images per step (CPU 16, GPU 128)"),
        "image_size": (224, number(int, 32, MAX_SIDE), "side in pixels"),
        "amp": ("off", tuple(AMP), "of both sides"),
        "rounds": (7, number(int, 1), "turns that count")},
    "where it goes": {
        "out": (None, path("DIR"),
                "files in this folder are replaced (runs/bench, numbered if taken)")},
}


def bench(args: argparse.Namespace, world: Distributed) -> None:
    """Measures, prints, writes. Raises ValueError for a mistake."""
    out = Path(args.out) if args.out else free_name(Path("runs/bench"))
    check_folder(out)
    mask_grid((args.image_size, args.image_size), 32)        # the recipe's cell
    if args.data and "loader" in args.rows:
        Folder(Path(args.data), "train")
    args.batch_size = args.batch_size or (128 if WORLD.on_gpu else 16)
    WORLD.set_device()
    table, found, began = Table(), [], time.time()
    for name in args.rows:
        found = ROWS[name](table, args) or found
    device = (
        torch.cuda.get_device_name()
        if WORLD.on_cuda
        else WORLD.device.type
        if WORLD.on_gpu
        else f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()})"
    )
    lines = [
        f"{device}, torch {torch.__version__}, torchvision {torchvision.__version__}, amp {args.amp}, "
        f"{args.image_size} px, {args.rounds} turns; {(time.time() - began) / 60:.0f} minutes",
        "",
        table.text(),
    ]
    if found:
        lines += [
            "",
            "| what grows | value | images/s |",
            "|---|---|---|",
            *(f"| {grows} | {value} | {speed:.1f} |" for grows, value, speed in found),
        ]
    print("\n".join(lines))
    with writing(out / "table.md"):
        if found:
            plot(out / "scaling.png", found)
        (out / "table.md").write_text("\n".join(lines) + "\n")
        results = dict(rows=table.rows, scaling=found)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {out}/")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for a value that is off."""
    usage = "%(prog)s [--data DIR] [--rows NAME ...] [options]"
    parser = Parser("bench.py", usage, __doc__, FLAGS, {})
    parser.epilog = None
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="NAME",
        help=f"some of {', '.join(ROWS)} (all)",
    )
    return argparse.Namespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("bench.py", parse, bench, argv)


if __name__ == "__main__":
    main()
