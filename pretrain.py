"""Pre-training: A2MIM on any backbone, on a CPU, one GPU, or many.

    python pretrain.py                                                      the built-in demo, minutes on a CPU
    torchrun --nproc_per_node=8 pretrain.py --data /path/to/imagenet        the paper's run (ResNet-50, 300 epochs)

Recipes as released by the authors (Li et al., ICML 2023): RECIPES below. Leaves in --out: args.json, log.jsonl,
checkpoint.pt, backbone.pt (the encoder alone, under torchvision's names), loss.png, reconstruction-*.png.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import masking
from data import (NAMED, Batches, CropAndFlip, Samples, append_line, eval_transform, make_loader, mix, normalise, open_source, peak_memory_mb, read_checkpoint,
                  save_atomically, save_curve, save_sheet, steps_per_epoch, trim_log)
from loss import SPECTRA, STAND_INS, a2mim_loss, lr_at, parameter_groups
from masking import hidden_count, mask_grid, random_mask
from model import A2MIM, ARCHS, build_encoder, family

warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")       # a 1x1 convolution fits both

# ---- recipes: every value has a flag of the same name; lr is per 512 images of the global batch ----

CNN = dict(image_size=224, crop_min=0.8, epochs=300, lr=3e-4, schedule="cosine", clip_grad=0.0, token_lr=0.1,
           token="gamma", focal_pixels=True)
TRANSFORMER = dict(image_size=224, crop_min=0.67, epochs=800, lr=1e-4, schedule="step", clip_grad=5.0, token_lr=1.0,
                   token="add", focal_pixels=False, visible_weight=0.0)
RECIPES = {
    "resnet":   dict(CNN, fourier_weight=0.5, visible_weight=1e-3),
    "convnext": dict(CNN, fourier_weight=0.0, visible_weight=0.0),
    "vit":      dict(TRANSFORMER, fourier_weight=0.1),
    "swin":     dict(TRANSFORMER, fourier_weight=0.5, image_size=192),
}
EXCEPTIONS = {  # as released
    "resnet101": dict(fourier_weight=0.1, fourier_focal=False, spectrum="image"),
    "resnet152": dict(fourier_weight=0.0),
    "resnet200": dict(fourier_weight=0.0),
    "deit_small": dict(image_size=192, lr=2e-4, schedule="cosine", mask_stage=8),        # before the eighth block
    "deit_tiny": dict(image_size=192, lr=2e-4, schedule="cosine"),
}
COMMON = dict(program="pretrain.py", arch="resnet50", mask_ratio=0.6, mask_cell=32, mask_stage=None, fill="mean", drop_path=None, patch_size=16, window=7,
              fourier_focal=True, stand_in="mixed", spectrum="batch", alpha=1.0, log_weight=True,
              weight_decay=0.05, warmup_epochs=None, min_lr=1e-5, accum=1, batch_size=None, global_batch=None, seed=0, amp=None, compile=False,
              channels_last=True, data_root="datasets", download=False, workers=None, out=None, resume=False, baseline=None,
              log_every=10, save_every="10m", max_bad=0.01, sheets=5)
SIMMIM = dict(token="replace", mask_stage=1, fill="zero", fourier_weight=0.0, focal_pixels=False)    # the paper's comparison, any backbone
MAX_SIDE, MAX_EPOCHS = 8192, 100_000                         # more is a slip of the keyboard
DEMO = dict(data="shapes", arch="resnet18", image_size=96, epochs=1, global_batch=16, lr=0.032, spectrum="image", log_every=5)
DEMO_RESNET = dict(lr=0.096, mask_cell=8, mask_stage=3)                              # it has two minutes: a high lr, small cells


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, said by rank 0 alone (see `main`)."""

    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: an int or float from `low` to `high`."""
    def read(text: str):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= high or value == math.inf:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: must be {what} " + (f"from {low} to {high}" if high < math.inf else f"of at least {low}"))
        return value
    return read


def filled(text: str) -> str:
    """An argparse type: any text but none at all, which is what an unset shell variable leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (an unset shell variable?); give a value, or leave the flag out")
    return text


def how_often(text: str) -> str:
    """An argparse type: '200' is every 200 steps, '10m' every ten minutes."""
    if not text.removesuffix("m").isdecimal() or int(text.removesuffix("m")) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of steps such as 200, or of minutes such as 10m")
    return text


def data_flags(parser: argparse.ArgumentParser, data: str) -> argparse._ArgumentGroup:
    """The flags about data that both stages have."""
    g = parser.add_argument_group("data")
    g.add_argument("--data", type=filled, metavar="DIR", help=data)
    g.add_argument("--data-root", type=filled, metavar="DIR", help="where torchvision's datasets are kept (datasets)")
    g.add_argument("--download", action="store_true", help="fetch a torchvision dataset that is not there yet")
    g.add_argument("--image-size", type=number(int, 1, MAX_SIDE), metavar="PX", help="side of the square crop (by recipe)")
    g.add_argument("--workers", type=number(int, 0, 256), metavar="N", help="loader processes per process (cores per process - 1, 1 to 8)")
    g.add_argument("--max-bad", type=number(float, 0, 1), metavar="R", help="stop where more than this share of the images cannot be read (0.01)")
    return g


def run_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags about the run that both stages have."""
    g = parser.add_argument_group("run")
    g.add_argument("--out", type=filled, metavar="DIR", help="where everything is written (runs/<data>-<arch>..., numbered if taken)")
    g.add_argument("--resume", action="store_true", help="go on from checkpoint.pt in --out; its flags are remembered")
    g.add_argument("--seed", type=number(int, 0), metavar="N", help="fixes all randomness: weights, order, augmentation, masks (0)")
    g.add_argument("--amp", choices=["off", "bf16", "fp16"], help="mixed precision (bf16 where the device has it; else GPU fp16, CPU off)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (no)")
    g.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="memory format of CNNs (yes)")
    g.add_argument("--log-every", type=number(int, 1), metavar="N", help="steps between lines of log.jsonl (10)")
    g.add_argument("--save-every", type=how_often, metavar="N", help="steps, or minutes such as 10m, between checkpoints; after each epoch too (10m)")
    return g


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe of the backbone; `given` holds what was typed. Raises ValueError for a value that is off."""
    table = "\n".join(f"  {name:9} " + "  ".join(f"{k}={v}" for k, v in row.items()) for name, row in RECIPES.items())
    parser = Parser(
        prog="pretrain.py", usage="%(prog)s [--data DIR] [--arch NAME] [options]", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog=f"recipes (a flag overrides; resnet101, 152 and 200 differ in the Fourier loss, as released):\n{table}")
    yes_no, whole, real = argparse.BooleanOptionalAction, number(int, 1), number(float, 0)
    g = data_flags(parser, f"folder of images (ImageNet's train/, class folders, or any), or {', '.join(NAMED)}; none: the demo")
    g.add_argument("--crop-min", type=number(float, 0.01, 1), metavar="S", help="smallest area of the random crop, 0.01 to 1 (by recipe)")
    g = parser.add_argument_group("masking")
    g.add_argument("--mask-ratio", type=float, metavar="R", help="share of cells hidden per image, 0 < R < 1 (0.6)")
    g.add_argument("--mask-cell", type=whole, metavar="PX", help="side of a hidden square, at least the stride at the token (32)")
    g.add_argument("--mask-stage", type=number(int, 0), metavar="K", help="token enters before stage K: 1 = after stem or patch embedding "
                   "(ViT: block K), 4 = before the last stage of a CNN (ResNet, ConvNeXt 4; ViT, Swin 1)")
    g.add_argument("--token", choices=masking.TOKENS, help="how the token joins the features (by recipe)")
    g.add_argument("--fill", choices=masking.FILLS, help="colour of hidden pixels at the input (mean)")
    g.add_argument("--baseline", choices=["simmim"], help="run SimMIM instead: token replaces after the stem, zero fill, no Fourier loss")
    g = parser.add_argument_group("model")
    g.add_argument("--arch", choices=ARCHS, metavar="NAME", help=f"one of {', '.join(ARCHS)} (resnet50)")
    g.add_argument("--drop-path", type=number(float, 0, 0.99), metavar="P", help="stochastic depth of the deepest block (ViT 0.1, else 0)")
    g.add_argument("--patch-size", type=whole, metavar="PX", help="ViT only (16)")
    g.add_argument("--window", type=whole, metavar="N", help="Swin only (7, as torchvision's weights; the authors use 6 at 192 px)")
    g = parser.add_argument_group("loss")
    g.add_argument("--fourier-weight", type=real, metavar="W", help="lambda, 0 = pixels only (by recipe)")
    g.add_argument("--stand-in", choices=STAND_INS, help="what visible pixels show the Fourier loss: mixed as released, prediction as in the paper (mixed)")
    g.add_argument("--visible-weight", type=number(float, 0, 1), metavar="U", help="share of gradient that visible pixels keep in it, 0 to 1 (by recipe)")
    g.add_argument("--spectrum", choices=SPECTRA, help="one spectrum of the batch's mean as released, or one per image as in the paper (batch)")
    g.add_argument("--fourier-focal", action=yes_no, help="focal frequency loss, or plain mean |D| (yes)")
    g.add_argument("--alpha", type=real, metavar="A", help="exponent of the frequency weight (1)")
    g.add_argument("--log-weight", action=yes_no, help="log(1 + |D|^alpha) as frequency weight (yes)")
    g.add_argument("--focal-pixels", action=yes_no, help="focal L1 over pixels, or plain L1 (by recipe)")
    g = parser.add_argument_group("optimiser")
    g.add_argument("--epochs", type=number(float, 0.001, MAX_EPOCHS), metavar="N", help="passes over the data; a fraction such as 0.5 too (by recipe)")
    g.add_argument("--batch-size", type=whole, metavar="N", help="images per process and forward pass (GPU 256, CPU 32)")
    g.add_argument("--accum", type=whole, metavar="N", help="forward passes per optimiser step (1)")
    g.add_argument("--lr", type=real, metavar="LR", help="AdamW's, per 512 images of the global batch (by recipe)")
    g.add_argument("--token-lr", type=real, metavar="X", help="lr of mask token and gamma, times the lr (by recipe)")
    g.add_argument("--min-lr", type=real, metavar="LR", help="floor of the cosine, absolute (1e-5)")
    g.add_argument("--schedule", choices=["cosine", "step"], help="after warm-up: cosine, or constant and x0.1 for the last eighth (by recipe)")
    g.add_argument("--warmup-epochs", type=real, metavar="N", help="(10, or a tenth of a run shorter than 100)")
    g.add_argument("--weight-decay", type=real, metavar="WD", help="(0.05)")
    g.add_argument("--clip-grad", type=real, metavar="G", help="largest gradient norm, 0 = none (by recipe)")
    g = run_flags(parser)
    g.add_argument("--sheets", type=number(int, 0, 1000), metavar="N", help="pictures over the run, first and last included (5)")
    given = vars(parser.parse_args(argv))

    demo = "data" not in given
    arch = given.get("arch", (DEMO if demo else COMMON)["arch"])
    baseline = SIMMIM if given.get("baseline") == "simmim" else {}
    quick = {**DEMO, **(DEMO_RESNET if family(arch) == "resnet" else {})} if demo else {}
    recipe = {**COMMON, **RECIPES[family(arch)], **EXCEPTIONS.get(arch, {}), **quick, **baseline}
    return SimpleNamespace(**{**recipe, **given}, given=given, demo=demo)


# ---- processes: one, or as many as torchrun started ----

@dataclass
class Processes:
    """Who we are among the processes of torchrun: rank of world, on `device`. Without torchrun: rank 0 of 1."""
    world: int = int(os.environ.get("WORLD_SIZE", 1))
    rank: int = int(os.environ.get("RANK", 0))
    local: int = int(os.environ.get("LOCAL_RANK", 0))
    local_world: int = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def __post_init__(self):
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local) if self.on_gpu else torch.device("cpu")

    def start(self) -> None:
        """Joins the process group. Raises ValueError where there are more processes than GPUs."""
        if self.on_gpu:
            if self.local_world > torch.cuda.device_count():
                raise ValueError(f"--nproc_per_node={self.local_world}: this machine has {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1 and not dist.is_initialized():
            store, rank, world = next(dist.rendezvous("env://"))
            if self.local_world == world:                    # on a restart torchrun's store still holds the addresses of the dead
                store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if self.on_gpu else "gloo"        # small agreements do not wait for the GPU
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def agree(self, decide):
        """Rank 0 decides; every rank gets its answer, or its ValueError."""
        answer = [None, None]
        if self.rank == 0:
            try:
                answer[0] = decide()
            except (ValueError, OSError) as error:
                answer[1] = str(error)
        if self.world > 1:
            dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def mean(self, values: Tensor) -> Tensor:
        """Average over the processes; all take part."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over the processes."""
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def share_buffers(self, model: nn.Module) -> None:
        """Every process takes rank 0's BatchNorm statistics, those that are saved: without SyncBN each has gathered its own."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The rows of all processes, in the order of their ranks, on every one; each may have its own number."""
        if self.world == 1:
            return rows
        parts = [None] * self.world
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts, dim).to(self.device)


def open_out(args: SimpleNamespace, name: str) -> Path:
    """Chooses the output folder, and tries whether it can be made and written. By default runs/<name>, numbered if taken;
    --resume takes the newest of them. It leaves nothing behind: a command that is refused makes no folder."""
    if args.out is None:
        taken = [n for n in range(1, 1000) if any((numbered(name, n) / file).exists() for file in ("log.jsonl", "result.json"))]
        args.out = str(numbered(name, max(taken, default=1) if args.resume else max(taken, default=0) + 1))
    out = Path(args.out)
    if not args.resume and (out / "log.jsonl").exists():
        raise ValueError(f"--out {out}: already holds a run; add --resume to continue it, or choose another folder")
    if (out / "result.json").exists() and not (args.resume and (out / "log.jsonl").exists()):
        raise ValueError(f"--out {out}: already holds a result.json; choose another folder")
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        for folder in made:
            folder.rmdir()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from None
    return out


def make_out(args: SimpleNamespace, me: Processes, run: SimpleNamespace, out: Path) -> None:
    """The output folder, with args.json in it: all settings as they came out, and the versions."""
    if me.rank == 0:
        used = dict(amp=run.amp, global_batch=run.global_batch, torch=torch.__version__, torchvision=torchvision.__version__, world=me.world, device=me.device.type)
        out.mkdir(parents=True, exist_ok=True)
        (out / "args.json").write_text(json.dumps({**settings(args), **used}, indent=1) + "\n")


def settings(args: SimpleNamespace) -> dict:
    """What a checkpoint and args.json remember of the flags."""
    return {k: v for k, v in vars(args).items() if k not in ("given", "demo", "resume", "download")}


def numbered(name: str, n: int) -> Path:
    return Path("runs") / (name if n == 1 else f"{name}-{n}")


# ---- what both stages share ----

def begin(args: SimpleNamespace, me: Processes, defaults: dict, name: str) -> tuple[SimpleNamespace, Path, dict | None]:
    """Joins the processes, opens the output folder, and with --resume brings back the run's own flags: (args, out, saved)."""
    me.start()
    out = Path(me.agree(lambda: str(open_out(args, name))))
    saved = read_checkpoint(out) if args.resume else None
    step = saved["step"] if saved else -1
    if me.largest(step, -step) != [step, -step]:
        raise ValueError(f"--resume: the processes see different checkpoints in {out}; --out must be one folder that all nodes share")
    if saved:                                                # the run's own settings, then what was typed now
        if saved["args"]["program"] != defaults["program"]:
            raise ValueError(f"{saved['path']}: of another model, made by {saved['args']['program']}; choose another --out")
        args = SimpleNamespace(**{**defaults, **saved["args"], **args.given}, given=args.given, demo=False)
        me.say(f"going on from {saved['path']}, step {step}")
    elif args.resume:
        if "data" not in args.given:
            raise ValueError(f"--resume: no checkpoint in {out}; give --data and the flags of the run to start it")
        me.say(f"{out}: no checkpoint yet, starting from the beginning")
    args.out = str(out)
    if args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
        if "warmup_epochs" in args.given:
            raise ValueError(f"--warmup-epochs {args.warmup_epochs:g}: must be less than --epochs {args.epochs:g}")
        args.warmup_epochs = None                            # a short run of a long recipe: a tenth of it
    return args, out, saved


def plan(run: SimpleNamespace, args: SimpleNamespace, me: Processes, images: int, saved: dict | None) -> None:
    """Batch, steps and workers of this run, into `run`. Raises ValueError where the data set is smaller than one step."""
    if args.global_batch and not args.batch_size and args.global_batch % me.world:
        raise ValueError(f"{me.world} processes do not divide the global batch of {args.global_batch}; give --batch-size, images per process")
    run.batch = args.batch_size or (args.global_batch // me.world if args.global_batch else 256 if me.on_gpu else 32)
    run.global_batch = run.batch * args.accum * me.world
    run.images, run.per_epoch = images, steps_per_epoch(images, run.global_batch)
    run.total, run.start, run.saved = max(1, round(run.per_epoch * args.epochs)), 0, saved
    if saved:
        run.start = min(run.total, math.floor(saved["step"] / saved["per_epoch"] * run.per_epoch + 1e-6))        # its place in epochs
        if saved["world"] != me.world or saved["per_epoch"] != run.per_epoch:
            me.say(f"the checkpoint is of {saved['world']} processes and {saved['per_epoch']} steps an epoch, this is {me.world} and {run.per_epoch}: "
                   f"the schedule goes on at epoch {run.start / run.per_epoch:.2f}, but not bit by bit as it would have")
    run.warmup = round(run.per_epoch * (min(10, args.epochs / 10) if args.warmup_epochs is None else args.warmup_epochs))
    run.workers = min(8, max(1, (os.cpu_count() or 1) // me.local_world - 1)) if args.workers is None else args.workers


def place(run: SimpleNamespace, model: nn.Module, args: SimpleNamespace, me: Processes) -> None:
    """The model onto its device, in its memory format and precision: run.model keeps the plain names, run.net is what a step calls."""
    model = model.to(me.device)
    run.memory_format = torch.channels_last if args.channels_last and family(args.arch) in ("resnet", "convnext") else torch.contiguous_format
    model = model.to(memory_format=run.memory_format)
    if me.world > 1 and me.on_gpu:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.compile()
    run.model, run.net = model, model
    if me.world > 1:
        run.net = DDP(model, device_ids=[me.local] if me.on_gpu else None, gradient_as_bucket_view=True)
    run.amp = args.amp or default_amp(me)
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.amp]
    run.autocast = lambda: torch.autocast(me.device.type, dtype, enabled=run.amp != "off")
    # without fp16 the scale stays 1 (see `update`), and the scaler does one thing: it skips a step with a gradient that is not finite
    run.scaler = torch.amp.GradScaler(me.device.type, **({} if run.amp == "fp16" else dict(init_scale=1.0)))


def default_amp(me: Processes) -> str:
    """bf16 where the device computes in it natively; else fp16 on a GPU, off on a CPU."""
    if me.on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "off"


def load_run(saved: dict, run: SimpleNamespace, out: Path) -> None:
    """Puts a checkpoint back into run.keeps. Raises ValueError where it belongs to another model."""
    typed = [(group["scale"], group["weight_decay"]) for group in run.optimizer.param_groups]            # the flags of now
    try:
        for name, keeper in run.keeps.items():
            keeper.load_state_dict(saved[name])
        for group, (scale, weight_decay) in zip(run.optimizer.param_groups, typed):
            group.update(scale=scale, weight_decay=weight_decay)
    except (RuntimeError, ValueError, KeyError):
        raise ValueError(f"{out}/checkpoint.pt: of another model ({saved['args'].get('arch')} at {saved['args'].get('image_size')} px); "
                         f"resume with the run's own flags, or choose another --out") from None


class Failed(Exception):
    """The run cannot go on: exit code 1."""


class Stopped(Exception):
    """A signal came, and the run was saved: exit code 128 + the signal."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


class Signals:
    """Notes SIGTERM and Ctrl-C, so that the step can be finished and saved. A second Ctrl-C ends the process at once."""
    number = 0

    def __enter__(self) -> "Signals":
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        if self.number and number == signal.SIGINT:
            os._exit(130)
        self.number = number

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Broken:
    """The images that could not be read, on all processes together."""

    def __init__(self, source, share: float, out: Path):
        self.source, self.most, self.out, self.seen, self.new = source, share * len(source), out, set(), []

    def state_dict(self) -> dict:
        return dict(seen=sorted({*self.seen, *self.new}))

    def load_state_dict(self, state: dict) -> None:
        self.seen = set(state["seen"])

    def note(self, broken: Tensor) -> None:
        self.new += broken[broken >= 0].tolist()

    def tell(self, me: Processes) -> None:
        """All processes take part. Names the first few; raises Failed where there are too many, with the list in broken.txt."""
        if not me.largest(len(self.new))[0]:
            return
        fresh = sorted(set(me.gather(torch.tensor(self.new, dtype=torch.long)).tolist()) - self.seen)
        names, self.new = [self.source.name(i) for i in fresh], []
        if len(self.seen) < 3 and fresh:
            me.say(f"cannot be read, the next image is taken instead: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
        self.seen.update(fresh)
        if me.rank == 0 and fresh:
            with contextlib.suppress(OSError):               # on a full disk the list waits
                (self.out / "broken.txt").write_text("".join(f"{self.source.name(i)}\n" for i in sorted(self.seen)))
        if len(self.seen) > self.most:
            raise Failed(f"{len(self.seen)} of {len(self.source)} images cannot be read, listed in {self.out}/broken.txt; "
                         f"repair or remove them, or allow more with --max-bad (now {self.most / len(self.source):g})")


def fit(args: SimpleNamespace, me: Processes, run: SimpleNamespace, out: Path, one_step, after_step, on_save) -> None:
    """The loop: optimiser steps, lines of log.jsonl, checkpoints. Raises Failed where the run cannot go on, Stopped after a signal.

    one_step(step, stream, args, me, run) -> {'loss': ..., its parts}; after_step(done, write) runs on every rank, on_save() on rank 0."""
    log, every = out / "log.jsonl", int(args.save_every.removesuffix("m"))
    if me.rank == 0:
        trim_log(log, run.saved["step"] / run.saved["per_epoch"] if run.saved else 0.0)
    count = lambda n: torch.tensor(n, device=me.device)
    in_a_row, skipped, last = count(0), count(run.saved["skipped"] if run.saved else 0), "none yet"
    statistics = [b for b in run.model.buffers() if b.is_floating_point()]   # BatchNorm's
    stream, saved_at, logged_at, logged = iter(run.loader), time.time(), time.time(), run.start
    bar = tqdm(total=run.total, initial=run.start, unit="step", disable=me.rank != 0)

    def write(what: str, action, *given) -> None:
        """A full disk does not end the run: the files of before are kept."""
        try:
            action(*given)
        except OSError as error:
            me.say(f"step {done}: {what} not written ({error}); going on")

    def save() -> None:
        state = {name: keeper.state_dict() for name, keeper in run.keeps.items()}
        state |= dict(step=done, per_epoch=run.per_epoch, world=me.world, args=settings(args) | {"amp": run.amp}, skipped=int(skipped))
        save_atomically(state, out / "checkpoint.pt", keep_previous=True)
        on_save()
        save_curve(out / "loss.png", log)

    done = run.start
    if run.saved:                                            # the checkpoint is written before an evaluation, so that no signal has to wait for one
        after_step(done, write)
    with Signals() as signals:
        for step in range(run.start, run.total):
            before = [b.clone() for b in statistics]
            record, done = one_step(step, stream, args, me, run), step + 1
            bad = ~torch.isfinite(record["loss"])            # the scaler has skipped this step; its statistics go too
            for now, old in zip(statistics, before):
                now.copy_(torch.where(bad, old, now))
            in_a_row, skipped = (in_a_row + bad) * bad, skipped + bad
            bar.update()
            epoch_ends = done % run.per_epoch == 0 or done == run.total
            logs = done % args.log_every == 0 or epoch_ends or done == 1
            stop, streak = me.largest(signals.number, int(in_a_row) if logs or not me.on_gpu else 0)      # a GPU is waited for only when logging
            if streak >= 10:
                kept = f"{out}/checkpoint.pt is kept" if (out / "checkpoint.pt").exists() else "there is no checkpoint yet"
                raise Failed(f"loss is not finite, {streak} times in a row at step {done} (lr {largest_lr(run):.1e}, amp {run.amp}, last finite loss {last}); "
                             f"{kept}; try a lower --lr" + (" or --amp bf16" if run.amp == "fp16" else ""))
            if logs:
                run.broken.tell(me)
                values = {k: round(v, 6) if math.isfinite(v) else None for k, v in zip(record, me.mean(torch.stack(list(record.values()))).tolist())}
                last = values["loss"] or last
                if me.rank == 0:
                    speed = (done - logged) * run.global_batch / max(time.time() - logged_at, 1e-9)
                    line = dict(step=done, epoch=round(done / run.per_epoch, 4), lr=largest_lr(run), **values, **({"skipped": int(skipped)} if skipped else {}),
                                **({"broken": len(run.broken.seen)} if run.broken.seen else {}), images_per_s=round(speed, 1), peak_memory_mb=peak_memory_mb(me.device))
                    write("log.jsonl", append_line, log, line)
                    bar.set_postfix(loss=values["loss"], lr=f"{line['lr']:.1e}", images_per_s=f"{speed:.0f}")
                    logged_at, logged = time.time(), done
            due = done % every == 0 if args.save_every.isdecimal() else time.time() - saved_at > 60 * every
            if me.rank == 0 and (epoch_ends or due or stop) and not int(in_a_row):
                write("checkpoint", save)
                saved_at = time.time()
            if stop:
                bar.close()
                raise Stopped(stop, f"stopped by {signal.Signals(stop).name} after step {done} of {run.total}; go on with --out {out} --resume")
            after_step(done, write)
    bar.close()


def largest_lr(run: SimpleNamespace) -> float:
    return max(group["lr"] for group in run.optimizer.param_groups)


def main(argv: list[str] | None = None) -> None:
    command_line("pretrain.py", parse, train, argv)


def command_line(program: str, parse, train, argv: list[str] | None) -> None:
    """Runs train(parse(argv), processes). What went wrong is one line on stderr; exit code 2 for a mistake, 1 for a failed run."""
    me, code, message = Processes(), 0, ""
    try:
        train(parse(argv), me)
    except ValueError as error:
        message, code = f"error: {str(error).splitlines()[-1]}", 2           # the last line, where a loader worker sends its traceback along
    except (Failed, OSError, torch.OutOfMemoryError) as error:
        message, code = str(error).splitlines()[0], 1
    except Stopped as error:
        message, code = str(error), error.code
    except KeyboardInterrupt:
        message, code = "stopped by Ctrl-C", 130
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "Unable to allocate" in str(error):      # a CPU's, here or in a worker
            message = f"not enough memory ({str(error).splitlines()[-1].strip() or 'no more is said'}); use a smaller --image-size or --batch-size"
        elif me.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            message = "lost another process (killed, or ended by an error of its own); --resume goes on from the last checkpoint"
        elif "BackendCompilerFailed" in (kind.__name__ for kind in type(error).__mro__):         # such as no C++ compiler
            message = f"--compile: {str(error).splitlines()[0]}; repair that, or run without it"
        else:
            traceback.print_exc()                            # a bug: told whole, here, so that its frames let go of the loader and its deaf workers
        code = 1
    failed = code in (1, 2)
    if failed and me.rank:                                   # rank 0 alone speaks; where it has nothing to say, it is not gone by then
        time.sleep(10)
        message = message and f"rank {me.rank}: {message}"
    if message and (failed or not me.rank):
        print(f"{program}: {message}", file=sys.stderr, flush=True)
    if failed and me.world > 1:
        os._exit(code)                                       # the others may be waiting for us: leave at once, the launcher ends them
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()                                         # DDP holds on to the group, whose threads must end before Python does
    if code:
        sys.exit(code)


# ---- pre-training ----

def prepare(args: SimpleNamespace, me: Processes, saved: dict | None) -> SimpleNamespace:
    """Data, model and optimiser, checked against each other before anything long starts. Raises ValueError."""
    run, size = SimpleNamespace(), (args.image_size, args.image_size)
    run.hidden = hidden_count(math.prod(mask_grid(size, args.mask_cell)), args.mask_ratio)

    if args.download:                                        # one process fetches for all
        me.agree(lambda: len(open_source(args.data, "train", size, args.data_root, download=True)))
    source = open_source(args.data, "train", size, args.data_root)
    plan(run, args, me, len(source), saved)
    batches = Batches(len(source), run.batch, args.accum, me.world, me.rank, args.seed, run.start, run.total)
    run.loader = make_loader(Samples(source, CropAndFlip(size, args.crop_min), args.seed), batches, run.workers, me.on_gpu)

    torch.manual_seed(mix(args.seed))                        # every process starts from the same weights
    encoder = build_encoder(args.arch, size, args.drop_path, args.patch_size, args.window)
    place(run, A2MIM(encoder, size, args.mask_cell, args.mask_stage, args.token, args.fill), args, me)
    run.peak = args.lr * run.global_batch / 512
    groups = parameter_groups(run.model, args.weight_decay, args.token_lr)
    run.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    run.broken = Broken(source, args.max_bad, Path(args.out))
    run.keeps = dict(model=run.model, optimizer=run.optimizer, scaler=run.scaler, broken=run.broken)
    preview = Samples(source, eval_transform(size), args.seed)
    run.preview = torch.stack([preview[0, i * len(source) // 6][0] for i in range(6)])   # the same images in every picture
    return run


def train_step(step: int, stream, args: SimpleNamespace, me: Processes, run: SimpleNamespace) -> dict[str, Tensor]:
    """One optimiser step; returns this process's mean loss and its parts, still on the device.

    All randomness comes from (seed, step), so a run that stops and goes on is the run that never stopped."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr_at(step, run.total, run.warmup, run.peak * group["scale"], args.min_lr, args.schedule)
    torch.manual_seed(mix(args.seed, step, me.rank))         # stochastic depth, and the random fill
    draw = torch.Generator(me.device).manual_seed(mix(args.seed, step))
    masks = random_mask(run.global_batch, run.model.grid, args.mask_ratio, me.device, draw)
    masks = masks.view(args.accum, me.world, run.batch, *run.model.grid)[:, me.rank]     # every process draws all, takes its own
    record = {}
    for part, mask in enumerate(masks):
        images, _, broken = next(stream)
        run.broken.note(broken)
        images = normalise(images, me.device).contiguous(memory_format=run.memory_format)               # (B, 3, H, W)
        meet = part == args.accum - 1 or me.world == 1       # processes average their gradients once a step
        with contextlib.nullcontext() if meet else run.net.no_sync():
            with run.autocast():
                painted = run.net(images, mask)              # (B, 3, H, W)
            loss, parts = a2mim_loss(painted, images, mask, fourier_weight=args.fourier_weight, stand_in=args.stand_in,
                                     u=args.visible_weight, spectrum=args.spectrum, alpha=args.alpha, log_weight=args.log_weight,
                                     focal_pixels=args.focal_pixels, focal_fourier=args.fourier_focal)
            run.scaler.scale(loss / args.accum).backward()
        for name, value in {"loss": loss.detach(), **parts}.items():
            record[name] = record.get(name, 0) + value / args.accum
    update(run, args.clip_grad)
    return record


def update(run: SimpleNamespace, clip_grad: float) -> None:
    """The optimiser's part of a step: clip, step, forget the gradients."""
    if clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update(None if run.amp == "fp16" else 1.0)
    run.optimizer.zero_grad(set_to_none=True)


def train(args: SimpleNamespace, me: Processes) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as `fit`."""
    name = f"{Path(args.data).resolve().name}-{args.arch}" + (f"-{args.baseline}" if args.baseline else "")
    args, out, saved = begin(args, me, COMMON, name)
    if args.demo:
        me.say("no --data given: running the demo on drawn shapes; the paper's run is\n"
               "  torchrun --nproc_per_node=8 pretrain.py --data /path/to/imagenet")
    run = prepare(args, me, saved)
    if saved:
        load_run(saved, run, out)
    me.say(f"{args.arch}: {sum(p.numel() for p in run.model.encoder.parameters()) / 1e6:.1f} M parameters, token before stage "
           f"{run.model.mask_stage}\n{args.data}: {run.images} images at {args.image_size} px, {run.hidden} of {math.prod(run.model.grid)} cells "
           f"hidden\n{me.world} x {me.device.type}, amp {run.amp}, {run.workers} workers each; global batch {run.global_batch}, peak lr "
           f"{run.peak:.2e}, {args.epochs:g} epochs of {run.per_epoch} steps" + (f", from step {run.start}" if saved else "") + f"\nwriting {out}/")

    preview = normalise(run.preview, me.device)
    look = random_mask(len(preview), run.model.grid, args.mask_ratio, generator=torch.Generator().manual_seed(mix(args.seed))).to(me.device)
    sheets = {round(i / max(1, args.sheets - 1) * run.total) for i in range(args.sheets)}

    def picture(done: int, write) -> None:
        if me.rank == 0 and done in sheets:
            titles = ("image", "encoder sees", "reconstruction", "hidden cells pasted")
            columns = dict(zip(titles, (preview, *run.model.reconstruct(preview, look))))
            write("a picture", save_sheet, out / f"reconstruction-{done:06d}.png", columns)

    make_out(args, me, run, out)
    if not saved:
        picture(0, lambda what, save, *given: save(*given))
    run.model.train()
    fit(args, me, run, out, train_step, picture, lambda: save_atomically(run.model.encoder.backbone.state_dict(), out / "backbone.pt"))
    me.say(f"done: {out}/backbone.pt holds the encoder, {out}/reconstruction-*.png show what it paints")


if __name__ == "__main__":
    main()
