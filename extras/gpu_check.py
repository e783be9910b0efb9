"""Is everything right and fast on this GPU? One command, under nine minutes, nothing to download:

    python extras/gpu_check.py --data /path/to/photos
    python extras/gpu_check.py --only speed nccl              some parts only

    closeness   loss and gradients of four backbones, against float32 on the CPU
    speed       images/s of a step against the bare backbone; what makes the host wait for the GPU
    nccl        every collective of a run, and DDP, on NCCL
    two         two processes on the one GPU, against one process with their batch
    loader      images per second that workers load from JPEG files
    runs        whole runs: again, in other precisions, killed and resumed, fine-tuned, dense tasks

Every line begins with PASS or FAIL. --out holds result.json and the runs. The exit code is 1 if
anything failed. Without a GPU the script tries itself at tiny sizes, and its figures mean nothing.
"""

import collections
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile
from torchvision.io import write_jpeg
from torchvision.transforms.v2 import functional as tvf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune
import pretrain
from data import (CropAndFlip, ImageDataset, ResumableBatchSampler, list_images, make_loader,
                  normalise, open_images, read_image, usable_cores)
from engine.checkpointer import Snapshot
from engine.command import Distributed, Failed, command_line
from engine.files import read_lines
from engine.flags import COUNT, Parser, defaults, path
from engine.progress import RunningMeans
from engine.shapes import Shapes
from extras.bench import bare_step, endless, prepared
from extras.inside import open_residual_branches
from extras.output import check_folder, free_name
from loss import a2mim_loss
from masking import random_mask, resize_mask
from model import A2MIM, build_encoder, get_family

# ---- the report ----


class Report:
    """Facts, each printed as a line and written to result.json."""

    def __init__(self, out: Path, world: Distributed):
        self.out = out
        self.world = world
        self.began = time.time()
        self.facts = {}
        self.failed = []
        self.device = "CPU, tiny sizes"
        if world.on_cuda:
            self.device = torch.cuda.get_device_name()

    def seconds(self) -> float:
        return time.time() - self.began

    def fact(self, name: str, passed: bool, value: str) -> None:
        """passed: is it as it should be? A figure without a bound has passed when it is there."""
        self.facts[name] = {"passed": bool(passed), "value": value}
        if not passed:
            self.failed.append(name)
        word = "PASS" if passed else "FAIL"
        print(f"{word} [{self.seconds():4.0f} s] {name}: {value}", flush=True)
        about = {"device": self.device, "torch": torch.__version__,
                 "torchvision": torchvision.__version__, "seconds": round(self.seconds())}
        text = json.dumps({**about, "facts": self.facts}, indent=1)
        (self.out / "result.json").write_text(text + "\n")


# ---- closeness: the numbers of the CPU ----

# name -> (autocast, float32 matmul precision, smallest cosine of the gradient, largest difference
# of the loss, relative)
PRECISIONS = {
    "fp32": (None, "highest", 0.999, 1e-4),
    "tf32": (None, "high", 0.95, 1e-3),
    "bf16": (torch.bfloat16, "high", 0.9, 1e-2),
    "fp16": (torch.float16, "high", 0.95, 5e-3),
}


def loss_and_gradient(model: A2MIM, images: Tensor, mask: Tensor, device: torch.device,
                      autocast: torch.dtype | None, focal: bool) -> tuple[float, Tensor]:
    """The loss, and the gradient of all parameters in one vector on the CPU, float64."""
    model = model.to(device).train()
    model.zero_grad()
    images, mask = images.to(device), mask.to(device)
    torch.manual_seed(0)
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        pred = model(images, mask)
    hidden = resize_mask(mask, images.shape[-2:])
    loss, _ = a2mim_loss(pred, images, hidden, spectrum="image", focal_pixels=focal)
    scale = 1024                                             # fp16 needs it
    (scale * loss).backward()
    parts = [p.grad.flatten().cpu().double() for p in model.parameters()]
    return loss.item(), torch.cat(parts) / scale


def closeness(args: SimpleNamespace, world: Distributed, report: Report) -> None:
    archs = ("resnet50", "convnext_tiny", "vit_small", "swin_tiny")
    if not world.on_cuda:
        archs = ("resnet18", "deit_tiny")
    for arch in archs:
        is_cnn = get_family(arch).convolutional
        side, count = (96, 16) if is_cnn else (224, 4)
        if not world.on_cuda:
            side, count = 64, 4
        torch.manual_seed(0)
        asked = pretrain.asked_for(pretrain.parse(["--data", "shapes", "--arch", arch]))
        encoder = build_encoder(arch, (side, side), 0.0)     # the two devices draw other depths
        model = A2MIM(encoder, side, token=asked["token"], fill=asked["fill"])
        open_residual_branches(model, 0.2)                   # else they would not be compared
        images, mask = torch.randn(count, 3, side, side), random_mask(count, model.grid)
        given = (images, mask)
        focal = asked["focal_pixels"]
        exact, exact_gradient = loss_and_gradient(model, *given, torch.device("cpu"), None, focal)
        if is_cnn:                                           # as in a run
            model = model.to(memory_format=torch.channels_last)
        precisions = PRECISIONS if world.on_cuda else {"fp32": PRECISIONS["fp32"]}
        for name, (autocast, matmul, least_cosine, most_apart) in precisions.items():
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = matmul == "high"
            loss, gradient = loss_and_gradient(model, *given, world.device, autocast, focal)
            apart = abs(loss / exact - 1)
            norms = gradient.norm() * exact_gradient.norm()
            cosine = (gradient @ exact_gradient / norms).item()
            report.fact(f"{arch} {name} against CPU float32",
                        apart < most_apart and cosine > least_cosine,
                        f"loss {apart:.1e} apart, cosine of the gradient {cosine:.5f}")
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


# ---- speed: a step against the bare backbone, and what it waits for ----

def whole_step(program, flags: str, batch: int, side: int, world: Distributed):
    """The step of pretrain or finetune with what Checkpointer does around it, as a function."""
    words = f"--data shapes --workers 0 --batch-size {batch} --image-size {side} --out unused"
    settings, state = prepared(program, f"{words} {flags}", world)
    statistics = Snapshot([b for b in state.model.buffers() if b.is_floating_point()])
    means = RunningMeans(world)
    batches = endless(batch, side)
    numbers = itertools.count(1)

    def step():
        statistics.take()
        record = program.train_step(next(numbers), batches, settings, world, state)
        statistics.restore(~torch.isfinite(record["loss"]))
        means.add(record)
    return step


def wait_for(world: Distributed) -> None:
    if world.on_cuda:
        torch.cuda.synchronize()


def images_per_s(step, batch: int, world: Distributed) -> float:
    rounds = 8 if world.on_cuda else 1
    for _ in range(2):
        step()
    wait_for(world)
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    wait_for(world)
    return batch * rounds / (time.perf_counter() - start)


def waits_of(step, world: Distributed) -> dict[str, int]:
    """The lines that make the host wait for the GPU, and how often: {'loss.py:90': 1}."""
    if not world.on_cuda:
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in seen
             if "synchroniz" in str(warning.message)]
    return dict(collections.Counter(lines))


def launches_of(step, world: Distributed) -> int:
    activities = [ProfilerActivity.CPU]
    if world.on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        step()
        wait_for(world)
    return sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key)


def speed(args: SimpleNamespace, world: Distributed, report: Report) -> None:
    batch, side = (256, 224) if world.on_cuda else (2, 64)
    imagenet = "--recipe imagenet --val 0 --amp bf16"
    scratch = "--init scratch --amp bf16"
    bench = SimpleNamespace(amp="bf16")
    # name, a function that makes a step, smallest share of the bare backbone's images/s, the files
    # that may wait: GradScaler reads a number for LAMB, which is not fused
    rows = [
        ("bare resnet50", lambda: bare_step(bench, "resnet50", batch, side), 0, ()),
        ("A2MIM resnet50",
         lambda: whole_step(pretrain, f"{imagenet} --arch resnet50", batch, side, world), 0.87, ()),
        ("fine-tuning resnet50, rsb_a2",
         lambda: whole_step(finetune, f"{scratch} --arch resnet50 --recipe rsb_a2 --repeats 1",
                            batch, side, world), 0, ("grad_scaler.py",)),
    ]
    if world.on_cuda:
        rows += [
            ("A2MIM resnet50 --compile",
             lambda: whole_step(pretrain, f"{imagenet} --arch resnet50 --compile", batch, side,
                                world), 0.87, ()),
            ("A2MIM vit_base",
             lambda: whole_step(pretrain, f"{imagenet} --arch vit_base", batch, side, world), 0,
             ()),
            ("fine-tuning vit_small, vit",
             lambda: whole_step(finetune, f"{scratch} --arch vit_small --recipe vit", batch, side,
                                world), 0, ()),
        ]
    bare = None
    for name, make, least, may_wait in rows:
        if world.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            step = make()
            found = images_per_s(step, batch, world)
            bare = bare or found
            waits, launches = waits_of(step, world), launches_of(step, world)
        except Exception as error:                           # such as a compiler that is not there
            report.fact(name, False, f"{type(error).__name__}: {str(error)[:300]}")
            continue
        memory = torch.cuda.max_memory_allocated() / 2**30 if world.on_cuda else 0
        is_fast = found >= least * bare or not world.on_cuda
        needless = [line for line in waits if not line.startswith(may_wait)]
        report.fact(name, is_fast and not needless,
                    f"{found:.0f} images/s = {found / bare:.2f} of the bare backbone, "
                    f"{memory:.1f} GiB, {launches} launches, waits {waits}")
        del step


# ---- nccl: the collectives of a run ----

def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def nccl(args: SimpleNamespace, world: Distributed, report: Report) -> None:
    """A group of one process, which believes that it is one of two: nothing is cut short."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0",
                      WORLD_SIZE="1")
    group = Distributed()
    group.set_device(world.device.type)
    dist.init_process_group(group.backend, store=group.rendezvous_store(), rank=0, world_size=1)
    group.size = 2
    x = torch.arange(3.0, device=world.device)
    results = {
        "broadcast_from_rank0": group.broadcast_from_rank0(lambda: 5) == 5,
        "all_reduce_max": group.all_reduce_max(3, -1) == [3, -1],
        "all_reduce_mean": torch.equal(group.all_reduce_mean(x.clone()) * 2, x),
    }
    net = nn.SyncBatchNorm.convert_sync_batchnorm(torchvision.models.resnet18())
    if not world.on_cuda:                                    # SyncBN is for GPUs
        net = torchvision.models.resnet18()
    net = net.to(world.device).to(memory_format=torch.channels_last)
    group.broadcast_buffers(net)
    devices = [0] if world.on_cuda else None
    ddp = DDP(net, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)
    images = torch.randn(4, 3, 64, 64, device=world.device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(world.device.type, torch.bfloat16):
        logits = ddp(images)
    logits.float().sum().backward()
    results["DDP"] = all(p.grad is not None for p in net.parameters())
    start = time.perf_counter()
    for _ in range(200):
        group.all_reduce_max(0, 0)
    cost = (time.perf_counter() - start) / 200
    dist.destroy_process_group()
    wrong = [name for name, is_right in results.items() if not is_right]
    report.fact(f"{group.backend}: collectives and DDP", not wrong,
                f"wrong: {', '.join(wrong) or 'none'}; all_reduce_max costs {cost * 1e6:.0f} us")


# ---- whole runs, as a user starts them ----

def start_and_wait(words: list[str], limit: float = 150, stop=None) -> tuple[int, str]:
    """Runs python with these words: (exit code, all that was printed).

    stop: a function; when it is true, the process gets SIGTERM."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
    if stop:
        while process.poll() is None and not stop():
            time.sleep(0.05)
        process.terminate()
    try:
        said = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0] + f"\nkilled after {limit:.0f} s"
    return process.returncode, said


def last_line(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1][:200]


def losses(folder: Path) -> dict[int, float]:
    """step -> loss, of log.jsonl; {} if there is none."""
    lines = read_lines(folder / "log.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    """Of the losses of two runs; infinite if they are of other steps."""
    if not a or set(a) != set(b):
        return math.inf
    return max(abs(a[step] - b[step]) for step in a)


def two(args: SimpleNamespace, world: Distributed, report: Report) -> None:
    """DDP and SyncBatchNorm. NCCL refuses two ranks on one GPU, so gloo carries their data."""
    arch, epochs = ("resnet18", "0.05") if world.on_cuda else ("deit_tiny", "0.01")
    flags = (f"--data shapes --arch {arch} --image-size 64 --epochs {epochs} --log-every 1 --val 0 "
             f"--recipe small --amp off --sheets 0 --workers 1").split()
    one, both = report.out / "one", report.out / "two"
    code, said = start_and_wait(["pretrain.py", *flags, "--batch-size", "32", "--out", str(one)])
    report.fact("one process", code == 0, f"exit {code}: {last_line(said)}")
    code, said = start_and_wait(["-m", "torch.distributed.run", "--standalone",
                                 "--nproc_per_node=2", __file__, ON_ONE_GPU, *flags,
                                 "--batch-size", "16", "--out", str(both)])
    report.fact("two processes", code == 0, f"exit {code}: {last_line(said)}")
    a, b = losses(one), losses(both)
    first = sorted(a)[:3]
    apart = [abs(a[step] - b.get(step, math.inf)) for step in first]
    report.fact("1 x 32 against 2 x 16 images, first losses", bool(apart) and max(apart) < 2e-3,
                f"apart by {', '.join(f'{x:.1e}' for x in apart)}")


ON_ONE_GPU = "pretrain-on-one-gpu"                           # an argument of this script, for `two`


def pretrain_on_one_gpu(argv: list[str]) -> None:
    """pretrain.py, but all processes of torchrun use the same GPU."""
    use = Distributed.use

    def use_first(self, kind: str) -> None:
        use(self, kind)
        self.local_size = 1
        if kind == "cuda":
            self.local_rank = 0
            self.device = torch.device("cuda", 0)
            self.backend = "gloo"
    Distributed.use = use_first
    pretrain.main(argv)


def runs(args: SimpleNamespace, world: Distributed, report: Report) -> None:
    out = report.out
    side, batch, epochs = (96, 64, 0.25) if world.on_cuda else (64, 8, 0.008)
    flags = (f"--data shapes --arch resnet18 --image-size {side} --epochs {epochs} --log-every 1 "
             f"--recipe small --val 0 --sheets 1").split()
    flags += [] if world.on_cuda else ["--workers", "1"]

    def pre(name: str, *more: str, **options) -> tuple[int, str]:
        return start_and_wait(["pretrain.py", *flags, *more, "--out", str(out / name)], **options)
    whole = ["--batch-size", str(batch)]
    halves = ["--batch-size", str(batch // 2), "--accum", "2"]
    variants = {"bf16": [*whole, "--amp", "bf16"], "again": [*whole, "--amp", "bf16"],
                "off": [*whole, "--amp", "off"], "accum": [*halves, "--amp", "bf16"]}
    if world.on_cuda:
        variants["fp16"] = [*whole, "--amp", "fp16"]
    for name, more in variants.items():
        code, said = pre(name, *more)
        last = list(losses(out / name).values())[-1:]
        report.fact(f"run {name}", code == 0 and bool(last),
                    f"exit {code}, last loss {last}" if code == 0 else last_line(said))
    first = losses(out / "bf16")
    apart = largest_difference(first, losses(out / "again"))
    report.fact("two equal runs", apart < 0.01 if world.on_cuda else apart == 0,
                f"losses at most {apart:.1e} apart")
    for name in ("off", "accum"):
        other = losses(out / name)
        ends = [list(found.values())[-1] if found else math.nan for found in (first, other)]
        report.fact(f"bf16 against {name}", abs(ends[0] / ends[1] - 1) < 0.1,
                    f"last losses {ends[0]:.4f} and {ends[1]:.4f}")

    stopped = out / "stopped"
    code, said = pre("stopped", *variants["bf16"],
                     stop=lambda: len(losses(stopped)) >= max(1, len(first) // 2))
    report.fact("SIGTERM", code == 143, f"exit {code}: {last_line(said)}")
    resume = ["pretrain.py", "--out", str(stopped), "--resume"]
    code, said = start_and_wait(resume)
    apart = largest_difference(first, losses(stopped))
    is_close = apart < 0.01 if world.on_cuda else apart == 0
    report.fact("stopped and resumed", code == 0 and is_close,
                f"exit {code}, losses at most {apart:.1e} from those of the whole run")
    if world.on_cuda:
        longer = str(epochs * 1.04)
        on_cpu = ["--epochs", longer, "--device", "cpu", "--amp", "off"]
        code, said = start_and_wait([*resume, *on_cpu])
        report.fact("that checkpoint goes on on the CPU", code == 0, last_line(said))

    weights = str(out / "bf16" / "backbone.pt")
    tuned = out / "tuned"
    code, said = start_and_wait(
        ["finetune.py", "--weights", weights, "--data", "shapes", "--labels", "0.02",
         "--epochs", "2" if world.on_cuda else "0.2", "--ema", "0.99", "--optimizer", "lamb",
         "--erasing", "0.5", "--workers", "1", "--out", str(tuned)])
    result = json.loads((tuned / "result.json").read_text()) if code == 0 else {}
    report.fact("fine-tuning with LAMB, EMA and erasing", code == 0 and "top1" in result,
                f"top-1 {result['top1']}" if result else last_line(said))
    for program in ("segment", "detect") if world.on_cuda else ():
        code, said = start_and_wait(
            [f"extras/{program}.py", "--iterations", "30", "--init", "scratch", "--arch",
             "resnet18", "--data", "shapes", "--out", str(out / program)])
        report.fact(f"extras/{program}.py, 30 steps", code == 0, last_line(said))


# ---- loader ----

def loader(args: SimpleNamespace, world: Distributed, report: Report) -> None:
    """Files of 500 x 375 px, ImageNet's usual size: from --data, or drawn."""
    count, seconds = (1000, 8) if world.on_cuda else (20, 1)
    folder = report.out / "jpeg"
    folder.mkdir(exist_ok=True)
    names = []
    if args.data:
        names = list_images(Path(args.data))[:count]
    drawn = Shapes("train", (375, 500))
    for i in range(len(names) or min(count, 320)):
        image = read_image(os.path.join(args.data, names[i])) if names else drawn.read(i)
        image = tvf.resize(image, [375, 500], antialias=True)
        write_jpeg(image.contiguous(), str(folder / f"{i}.jpg"), quality=95)
    source = open_images(str(folder), "train", (224, 224), crop_min=0.8)
    batch = min(256 if world.on_cuda else 4, len(source))
    cores = usable_cores()
    kind = "files of --data" if names else "drawn files"
    for workers in sorted({1, max(1, cores // 2), max(1, cores - 1)}):
        sampler = ResumableBatchSampler(len(source), batch, 1, 1, 0, 0, 0, 10**6)
        samples = ImageDataset(source, CropAndFlip((224, 224), 0.8), 0)
        batches = iter(make_loader(samples, sampler, workers, world))
        for _ in range(workers + 1):                         # they have started
            next(batches)
        loaded = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            normalise(next(batches)[0], world.device)
            loaded += batch
        wait_for(world)
        found = loaded / (time.perf_counter() - start)
        report.fact(f"loader, {workers} workers on {cores} cores, 500 x 375 px, {kind}", found > 0,
                    f"{found:.0f} images/s, {found / workers:.0f} per worker")
        del batches


# ---- the command ----

PARTS = {part.__name__: part for part in (closeness, speed, nccl, two, loader, runs)}
FLAGS = {
    "what is checked": {
        "data": (None, path("DIR"), "a folder of photographs for the loader (drawn ones)"),
        "limit": (500, COUNT, "seconds, after which no further part begins")},
    "where it goes": {
        "out": (None, path("DIR"), "result.json and the runs (runs/gpu-check, numbered if taken)")},
}


def check(args: SimpleNamespace, world: Distributed) -> None:
    """Raises ValueError for a mistake; Failed if a line says FAIL."""
    out = Path(args.out) if args.out else free_name(Path("runs/gpu-check"))
    check_folder(out)
    if args.data and not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data}: no such folder; give a folder of photographs")
    if (out / "one").exists() or (out / "bf16").exists():
        raise ValueError(f"--out {out}: already holds a check; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    if world.device.type not in ("cuda", "cpu"):
        world.use("cpu")
    world.set_device(world.device.type if world.on_cuda else "cpu")
    report = Report(out.resolve(), world)
    print(f"{report.device}, torch {torch.__version__}, {usable_cores()} cores", flush=True)
    for name in args.only or PARTS:
        if report.seconds() > args.limit:
            report.fact(name, False, f"not begun: {args.limit} s are over (--limit)")
            continue
        try:
            PARTS[name](args, world, report)
        except Exception:                                    # the other parts still count
            report.fact(name, False, traceback.format_exc()[-900:])
    if report.failed:
        raise Failed(f"{len(report.failed)} of {len(report.facts)} lines failed, written to "
                     f"{out}/result.json: {', '.join(report.failed)}")
    print(f"all {len(report.facts)} lines passed, written to {out}/result.json")


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Raises ValueError for a wrong value."""
    parser = Parser("gpu_check.py", "%(prog)s [--data DIR] [--only PART ...] [options]", __doc__,
                    FLAGS, {})
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART",
                        help=f"some of {', '.join(PARTS)} (all)")
    return SimpleNamespace(**{**defaults(FLAGS), "only": None, **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [ON_ONE_GPU]:
        pretrain_on_one_gpu(argv[1:])
    else:
        command_line("gpu_check.py", parse, check, argv)


if __name__ == "__main__":
    main()
