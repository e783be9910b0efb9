"""Pre-training with A2MIM, for any backbone, on a CPU, one GPU or many.

    python pretrain.py                                                 the demo, minutes on a CPU
    torchrun --nproc_per_node=8 pretrain.py --data /path/to/imagenet   the released ResNet-50 run

In the order of this file: the recipes, one training step, the loop, the held-out loss, the set-up,
the flags, the settings. A run writes to --out: args.json, log.jsonl, loss.png, checkpoint.pt,
backbone.pt (the encoder, under torchvision's names) and reconstruction-*.png.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Container

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

import masking
from data import (NAMED, CropAndFlip, ImageDataset, ResumableBatchSampler, check_outside,
                  default_workers, denormalise, eval_transform, every_image_once, hold_out,
                  make_loader, normalise, open_images, seed_for)
from engine.checkpointer import Checkpointer, StepPlan, open_run, steps_per_epoch
from engine.command import Distributed, command_line
from engine.flags import (AMP, COUNT, DATA_FLAGS, FRACTION, MAX_EPOCHS, NONNEGATIVE, RUN_FLAGS,
                          SIDES, STAGE_FLAGS, SWITCH, Parser, checked, format_size, height_width,
                          number, path)
from engine.images import UnreadableImages
from engine.optim import lr_at, nan_unless_finite, parameter_groups
from engine.pictures import save_sheet
from engine.settings import (all_defaults, resolve_batch, resolve_warmup, resumed,
                             settings_class)
from engine.weights import load_backbone, summary_of
from loss import SPECTRA, STAND_INS, a2mim_loss, skill, spatial_loss
from masking import fill_hidden, hidden_count, mask_grid, random_mask, resize_mask
from model import (FEW_UNITS, STEMS, A2MIM, build_encoder, choose_mask_size_and_stage,
                   get_family, settings_for_size)

# ---- recipes. Every value has a flag of the same name. Peak lr = lr x global batch / 512 ----

CNN = dict(image_size=224, crop_min=0.8, epochs=300, lr=3e-4, schedule="cosine", clip_grad=0.0,
           token_lr=0.1, token="gamma", focal_pixels=True)
TRANSFORMER = dict(image_size=224, crop_min=0.67, epochs=800, lr=1e-4, schedule="step",
                   clip_grad=5.0, token_lr=1.0, token="add", focal_pixels=False,
                   visible_weight=0.0)
RECIPES = {  # as released; other nets of torchvision take the ResNet's
    "resnet":      dict(CNN, fourier_weight=0.5, visible_weight=1e-3),
    "convnext":    dict(CNN, fourier_weight=0.0, visible_weight=0.0),
    "vit":         dict(TRANSFORMER, fourier_weight=0.1),
    "swin":        dict(TRANSFORMER, fourier_weight=0.5, image_size=192),
    "torchvision": dict(CNN, fourier_weight=0.5, visible_weight=1e-3),
}
DEIT = dict(image_size=192, lr=2e-4, schedule="cosine")
EXCEPTIONS = {  # as released
    "resnet101": dict(fourier_weight=0.1, fourier_focal=False, spectrum="image"),
    "resnet152": dict(fourier_weight=0.0),
    "resnet200": dict(fourier_weight=0.0),
    "deit_small": dict(DEIT, token_stage=8),                 # before the eighth block
    "deit_tiny": DEIT,
}

# --baseline simmim, the paper's comparison, differs from A2MIM in these five settings.
SIMMIM = dict(token="replace", token_stage=1, fill="zero", fourier_weight=0.0, focal_pixels=False)
# On a CNN the released SimMIM also differs in these. With --recipe small it shares A2MIM's.
SIMMIM_CNN = dict(lr=2e-4, token_lr=1.0, crop_min=0.67)

# --recipe small is ours, for fewer than FEW_IMAGES images; it was tuned on photographs and clip
# art. The lr is a peak for any batch size, because scaling it with a small batch makes it vanish.
# One spectrum per image: in the batch's mean error, the errors of single images cancel.
# SMALL_STEPS are a first look. Weights that are worth fine-tuning took LONG_EPOCHS.
FEW_IMAGES = 100_000
SMALL = dict(spectrum="image", token_lr=1.0, schedule="cosine")
SMALL_BATCH = 64                                             # images of a step
SMALL_STEPS = 1500
LONG_EPOCHS = 60
SMALL_PEAK = 1e-3                                            # three times as much for a ResNet

DEMO = dict(data="shapes", arch="resnet18", image_size=96, recipe="small", epochs=1,
            recipe_batch=16, log_every=5)
# --quick: the first run of a fork, to see its loss fall
QUICK = dict(DEMO, image_size=64, epochs=0.16, sheets=2)     # 100 steps


# ---- one training step ----

@dataclass
class TrainState:
    """What a step works on. For an object of your own, add a field here, fill it in `prepare`, and
    add it to `saved` in `train`, so that it is saved and resumed."""
    plan: StepPlan
    loader: DataLoader
    model: A2MIM                                             # without DDP and its 'module.' prefix
    net: nn.Module                                           # with several processes: DDP(model)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    memory_format: torch.memory_format
    unreadable: UnreadableImages


def make_target(images: Tensor, model: A2MIM) -> Tensor:
    """What is reconstructed, (B, C, H, W): the normalised pixels themselves.

    `model` is for forks whose target is a feature, such as that of an EMA teacher inside of it."""
    return images


def draw_masks(count: int, grid: tuple[int, int], ratio: float, device: torch.device,
               *seed: int) -> Tensor:
    """Which patches are hidden, (count, gh, gw): a function of the seed alone."""
    generator = torch.Generator(device).manual_seed(seed_for(*seed))
    return random_mask(count, grid, ratio, device, generator)


def train_step(step: int, batches, settings: Settings, world: Distributed,
               state: TrainState) -> dict[str, Tensor]:
    """One optimiser step. Returns the loss and its parts, of this process and on the device.

    All randomness comes from (seed, step), so a resumed run equals one that never stopped."""
    plan, model = state.plan, state.model
    torch.manual_seed(seed_for(settings.seed, step, world.rank))                 # stochastic depth
    # Every process draws the masks of all processes and takes its own: (accum, batch, gh, gw)
    masks = draw_masks(plan.global_batch, model.grid, settings.mask_ratio, world.device,
                       settings.seed, step)
    masks = masks.view(settings.accum, world.size, plan.batch, *model.grid)[:, world.rank]
    record = {}
    for i, mask in enumerate(masks):                         # --accum forward passes
        images, _, broken = next(batches)
        state.unreadable.note(broken)
        images = normalise(images, world.device)             # (B, 3, H, W)
        images = images.contiguous(memory_format=state.memory_format)
        is_last = i == settings.accum - 1
        average_gradients = is_last or world.size == 1       # over the processes, once a step
        with contextlib.nullcontext() if average_gradients else state.net.no_sync():
            with torch.autocast(world.device.type, AMP[settings.amp], settings.amp != "off"):
                target = make_target(images, model)
                pred = state.net(images, mask)               # (B, 3, H, W)
            hidden = resize_mask(mask, target.shape[-2:])    # (B, 1, H, W)
            loss, parts = a2mim_loss(                        # in float32
                pred, target, hidden,
                fourier_weight=settings.fourier_weight, focal_fourier=settings.fourier_focal,
                focal_pixels=settings.focal_pixels, stand_in=settings.stand_in,
                visible_weight=settings.visible_weight, spectrum=settings.spectrum)
            state.scaler.scale(loss / settings.accum).backward()
        for name, value in {"loss": loss.detach(), **parts}.items():
            record[name] = record.get(name, 0) + value / settings.accum

    # In fp16 a gradient overflows now and then, and GradScaler skips the step. Otherwise a gradient
    # that is not finite is a fault, which Checkpointer counts.
    if settings.amp != "fp16":
        record["loss"] = nan_unless_finite(record["loss"], model)
    if settings.clip_grad:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
    state.scaler.step(state.optimizer)                       # skipped if a gradient is not finite
    state.scaler.update(None if settings.amp == "fp16" else 1.0)             # adapts for fp16 only
    state.optimizer.zero_grad(set_to_none=True)
    # a fork updates its EMA of the weights here
    return record


# ---- the loop ----

def train(typed: dict, world: Distributed) -> None:
    """The whole run, from the flags that were typed.

    Raises ValueError for a mistake, before it starts; Failed and Stopped as Checkpointer does."""
    settings, checkpoint, source, held_out = start(typed, world)
    state, held, previews = prepare(settings, world, checkpoint, source, held_out)
    model, plan = state.model, state.plan
    # Any object with state_dict and load_state_dict in `saved` is saved and resumed exactly.
    saved = dict(model=model, optimizer=state.optimizer, scaler=state.scaler,
                 broken=state.unreadable)
    exports = {"backbone.pt": model.encoder.backbone.state_dict}
    checkpointer = Checkpointer(settings, world, plan, saved, checkpoint, exports)
    print_start(settings, world, state, from_step=plan.start if checkpoint else None)

    batches = checkpointer.timed(state.loader)
    model.train()
    began = time.monotonic()
    with checkpointer:
        save_reconstructions(plan.start, settings, world, state, previews, checkpointer)
        if not checkpointer.has("held_out"):                 # the run stopped before its evaluation
            evaluate(plan.start, settings, world, state, held, checkpointer)
        for step in checkpointer.steps():
            for group in state.optimizer.param_groups:
                peak = settings.peak_lr * group["scale"]
                group["lr"] = lr_at(step, plan.total, plan.warmup, peak, settings.min_lr,
                                    settings.schedule)
            record = train_step(step, batches, settings, world, state)
            checkpointer.after(step, record)                 # logs, saves, stops on a signal
            print_length(step, settings, world, plan, began)
            save_reconstructions(step + 1, settings, world, state, previews, checkpointer)
            evaluate(step + 1, settings, world, state, held, checkpointer)
    checkpointer.finish()                                    # raises Failed if a file is missing
    has_pictures = previews is not None and "a picture" not in checkpointer.not_written
    print_end(settings, world, held, has_pictures)


def main(argv: list[str] | None = None) -> None:
    command_line("pretrain.py", parse, train, argv)


# ---- what the loss on held-out images says ----

UNTRAINED = "visible patches carry practically no loss: their reconstruction is not trained"


@dataclass
class HeldOut:
    """Images that are not trained on, with their masks: n of them in this process, `count` in all.

    mean_colour, blur  the loss of two baselines that learn nothing, one number for each image that
                       can be read. None if the target has another shape than the image
    first_loss         the model's at the first evaluation since the program was started"""
    images: Tensor                                           # (n, 3, H, W), uint8
    masks: Tensor                                            # (n, gh, gw), always the same
    count: int
    mean_colour: Tensor | None = None
    blur: Tensor | None = None
    first_loss: float | None = None


@torch.no_grad()
def held_out_loss(reconstruct, held: HeldOut, settings: Settings, world: Distributed,
                  model: A2MIM) -> Tensor:
    """The pixel loss of reconstruct(images, mask) on each held-out image: a vector on the CPU.

    All processes take part. Each gets the losses of all images, always in the same order."""
    losses = []
    for first in range(0, len(held.images), 64):
        images = normalise(held.images[first:first + 64].to(world.device), world.device)
        mask = held.masks[first:first + 64].to(world.device)
        target = make_target(images, model)
        pred = reconstruct(images, mask)                     # (B, 3, H, W)
        hidden = resize_mask(mask, target.shape[-2:])
        for i in range(len(images)):
            one = slice(i, i + 1)
            losses.append(spatial_loss(pred[one], target[one], hidden[one], settings.focal_pixels))
    mine = torch.stack(losses) if losses else torch.zeros(0)
    return world.all_gather(mine).cpu().double()


def evaluation_interval(plan: StepPlan, held_out: int) -> int:
    """Steps between two evaluations: an epoch, or a tenth of the run if that is shorter.

    It is longer where all evaluations together would take more than a tenth of the training time.
    For each image an evaluation is a forward pass, about a third of a training step."""
    affordable = int(0.1 * plan.total * plan.global_batch / (held_out / 3))
    often = min(plan.per_epoch, max(1, plan.total // 10))
    return max(often, math.ceil(plan.total / max(affordable, 1)))


def evaluate(done: int, settings: Settings, world: Distributed, state: TrainState,
             held: HeldOut | None, checkpointer: Checkpointer) -> None:
    """Logs the held-out loss beside its baselines; after the last step, says what it means."""
    is_last = done == state.plan.total
    if not held or not done:
        return
    if not is_last and done % evaluation_interval(state.plan, held.count):
        return
    state.model.eval()
    world.broadcast_buffers(state.model)
    torch.manual_seed(seed_for(settings.seed, done))         # the fill 'random', after a resume too
    # by forward: model(...) may be compiled, for the size of a training batch
    losses = held_out_loss(state.model.forward, held, settings, world, state.model)
    state.model.train()
    loss = losses.mean().item()
    if held.blur is None:
        checkpointer.note(held_out=loss)
        before = held.first_loss
        held.first_loss = loss if before is None else before
        if is_last:
            change = "" if before is None else f"{before:.4f} -> "
            world.print0(f"loss of {len(losses)} held-out images: {change}{loss:.4f} "
                         f"(no baselines for this target)\n"
                         f"{next_step(before is None or loss < before, settings)}")
        return
    mean_colour, blur = held.mean_colour.mean().item(), held.blur.mean().item()
    checkpointer.note(held_out=loss, mean_colour=mean_colour, blur=blur)
    if is_last:
        # standard error of the mean difference; one image alone says nothing
        difference = losses - held.blur
        error = math.inf
        if len(losses) > 1:
            error = difference.std().item() / math.sqrt(len(losses))
        verdict, is_better = skill(loss, mean_colour, blur, error)
        world.print0(f"hidden pixels of {len(losses)} held-out images: {verdict}\n"
                     f"{next_step(is_better, settings)}")


def next_step(better: bool, settings: Settings) -> str:
    """What to do after pre-training. better: the held-out loss says that something was learned."""
    if not better:
        return "next: train longer (--epochs) or use larger mask units (--mask-size)"
    weights = shlex.quote(f"{settings.out}/backbone.pt")
    if settings.data not in NAMED:
        return (f"next: python finetune.py --weights {weights} --data DIR\n"
                f"      (DIR: labelled images, in a folder for each class)")
    data = settings.data
    if settings.data_root != DEFAULTS["data_root"]:
        data += f" --data-root {shlex.quote(settings.data_root)}"
    return f"next: python finetune.py --weights {weights} --data {data}"


def save_reconstructions(done: int, settings: Settings, world: Distributed, state: TrainState,
                         previews: Tensor | None, checkpointer: Checkpointer) -> None:
    """--sheets times in a run, a picture of the same images under the same masks."""
    gaps = max(1, settings.sheets - 1)
    # from the last step back, so that a single picture is of the end
    steps = {round((gaps - i) / gaps * state.plan.total) for i in range(settings.sheets)}
    if world.rank or previews is None or done not in steps:
        return
    model = state.model
    mask = draw_masks(len(previews), model.grid, settings.mask_ratio, world.device, settings.seed)
    seen, reconstruction, pasted = model.reconstruct(previews, mask)
    columns = {"image": previews, "encoder sees": seen, "reconstruction": reconstruction,
               "hidden patches pasted": pasted,
               "a blur of what is seen": fill_hidden(previews, mask, "blur")}
    columns = {title: denormalise(images) for title, images in columns.items()}
    note = UNTRAINED if settings.visible_weight < 0.01 else ""
    file = checkpointer.out / f"reconstruction-{done:06d}.png"
    checkpointer.write("a picture", save_sheet, file, columns, note)
    checkpointer.board.add_picture("reconstruction", file, done)


# ---- set-up ----

def start(typed: dict, world: Distributed) -> tuple:
    """Joins the processes, opens the output folder and the data.

    Returns (settings, checkpoint to resume from, images to train on, held-out images)."""
    world.set_device(typed.get("device"))
    world.join()
    asked = asked_for(typed)
    name = f"{Path(asked['data']).resolve().name}-{asked['arch']}"
    name += f"-{asked['baseline']}" if asked["baseline"] else ""
    name += "-quick" if asked["quick"] else ""
    out, checkpoint = open_run(typed, world, "pretrain.py", name, FLAGS)
    if checkpoint:
        asked = resumed({**DEFAULTS, **DEFAULTS_OF_OLD_RUNS}, checkpoint["args"], typed)
        check_parameter_groups(asked, checkpoint["args"])
    elif "data" not in typed and not asked["quick"]:
        world.print0("no --data given: running the demo on drawn shapes; the released run is\n"
                     "  torchrun --nproc_per_node=8 pretrain.py --data /path/to/imagenet")
    asked["out"] = out

    if asked["download"]:                                    # one process fetches for all
        world.broadcast_from_rank0(lambda: len(open_source(asked, download=True)))
    source, held_out = hold_out(open_source(asked), asked)
    check_outside(out, source)
    check_outside(out, held_out)
    settings = resolve(asked, len(source), world, is_resumed=checkpoint is not None)
    if settings.crop_min != asked["crop_min"]:               # large files are decoded to fit it
        source, held_out = hold_out(open_source(vars(settings)), vars(settings))
    return settings, checkpoint, source, held_out


def check_parameter_groups(asked: dict, before: dict) -> None:
    """Raises ValueError if a resumed run would have other parameter groups than it began with.

    Parameters with the same weight decay and the same factor on the lr form one group."""
    special = (("token_lr", "--token-lr", 1.0), ("weight_decay", "--weight-decay", 0.0))
    for name, flag, value in special:
        old = before.get(name, asked[name])
        if (asked[name] == value) != (old == value):
            raise ValueError(f"{flag} {asked[name]:g}: the run began with {old:g}, and a change "
                             f"from or to {value:g} would change the optimiser's parameter groups; "
                             f"leave {flag} out, or begin a new run")


def open_source(asked: dict, download: bool = False):
    """All images of --data, before some of them are held out."""
    return open_images(asked["data"], "train", height_width(asked["image_size"]),
                       asked["data_root"], download, crop_min=asked["crop_min"])


def prepare(settings: Settings, world: Distributed, checkpoint: dict | None, source, held_out
            ) -> tuple[TrainState, HeldOut | None, Tensor | None]:
    """Model, optimiser and loader; held-out images; six images for pictures, (6, 3, H, W).

    Raises ValueError if they do not fit together."""
    size = height_width(settings.image_size)                 # (H, W)
    plan = StepPlan.plan(settings, world, len(source), checkpoint)
    warn_of_few_units(settings, world)

    torch.manual_seed(seed_for(settings.seed))               # all processes: the same weights
    encoder = build_encoder(settings.arch, size, settings.drop_path, settings.patch_size,
                            settings.window, settings.stem)
    if settings.grad_checkpoint:
        encoder.checkpoint_gradients()
    if settings.weights and not checkpoint:
        found = load_backbone(encoder, settings.weights)
        world.print0(f"{settings.weights}: {summary_of(found)}")
    model = A2MIM(encoder, size, settings.mask_size, settings.token_stage, settings.token,
                  settings.fill)
    check_tiling(model, settings)
    model = model.to(world.device)

    batches = ResumableBatchSampler(len(source), plan.batch, settings.accum, world.size, world.rank,
                                    settings.seed, plan.start, plan.total)
    samples = ImageDataset(source, CropAndFlip(size, settings.crop_min), settings.seed)
    loader = make_loader(samples, batches, settings.workers, world)

    is_cnn = get_family(settings.arch).convolutional         # channels_last is faster on a CNN
    channels_last = settings.channels_last and is_cnn and not world.on_mps
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = net = model.to(memory_format=memory_format)
    if world.size > 1 and world.on_cuda:                     # statistics of all GPUs, as released
        model = net = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if settings.compile:
        model.compile(dynamic=False)                         # a training batch has one size
    if world.size > 1:
        devices = [world.local_rank] if world.on_gpu else None
        # rank 0's BatchNorm statistics are saved, and shared before each evaluation
        net = DDP(model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)
    groups = parameter_groups(model, settings.weight_decay, settings.token_lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=not world.on_mps)
    # Without fp16 the scale stays 1; the scaler then only skips steps with non-finite gradients.
    scale = {} if settings.amp == "fp16" else {"init_scale": 1.0}
    scaler = torch.amp.GradScaler(world.device.type, **scale)
    unreadable = UnreadableImages(source, settings.max_bad, settings.out)
    state = TrainState(plan, loader, model, net, optimizer, scaler, memory_format, unreadable)

    centred = ImageDataset(held_out or source, eval_transform(size), settings.seed)
    previews = torch.stack([centred[0, i * len(centred) // 6][0] for i in range(6)])
    previews = normalise(previews, world.device)
    target = target_of_previews(previews, model)
    held = None
    if held_out:
        has_baselines = target.shape == previews.shape
        held = read_held_out(centred, settings, world, model, has_baselines)
    # other targets and four channels are no pictures
    is_picture = torch.equal(target, previews) and previews.shape[1] == 3
    return state, held, previews if is_picture else None


@torch.no_grad()
def target_of_previews(previews: Tensor, model: A2MIM) -> Tensor:
    """make_target(previews). Raises ValueError if it does not fit the mask and the decoder."""
    gh, gw = model.grid
    all_visible = torch.zeros(len(previews), gh, gw, dtype=torch.bool, device=previews.device)
    model.eval()                                             # a teacher's BatchNorm stays as it is
    target = make_target(previews, model)
    pred = model.forward(previews, all_visible)
    model.train()
    h, w = target.shape[-2:]
    if h % gh or w % gw:
        raise ValueError(f"make_target gives maps of {h}x{w}, the mask has {gh}x{gw} units; "
                         f"interpolate the target, or use a larger --mask-size")
    if pred.shape != target.shape:
        raise ValueError(f"make_target gives maps {tuple(target.shape[1:])}, the decoder "
                         f"{tuple(pred.shape[1:])}; give build_decoder (model.py) the target's "
                         f"channels and its pixels per feature")
    return target


def read_held_out(samples: ImageDataset, settings: Settings, world: Distributed, model: A2MIM,
                  with_baselines: bool) -> HeldOut:
    """This process's part of the held-out images, and what two baselines that learn nothing get."""
    mine = every_image_once(len(samples), 64, world)
    images = [torch.zeros(0, *samples[0, 0][0].shape, dtype=torch.uint8)]    # a process may have 0
    for batch, _, broken in make_loader(samples, mine, settings.workers, world):
        images.append(batch[broken < 0])
    images = torch.cat(images)
    masks = draw_masks(len(samples), model.grid, settings.mask_ratio, world.device,
                       settings.seed, 1)
    masks = masks[world.rank::world.size][:len(images)]
    held = HeldOut(images, masks, len(samples))
    if with_baselines:
        def mean_colour(images, mask):
            return make_target(fill_hidden(images, mask, "mean"), model)

        def blur(images, mask):
            return make_target(fill_hidden(images, mask, "blur"), model)
        held.mean_colour = held_out_loss(mean_colour, held, settings, world, model)
        held.blur = held_out_loss(blur, held, settings, world, model)
    return held


def check_tiling(model: A2MIM, settings: Settings) -> None:
    """Raises ValueError if the features of a CNN or a Swin do not tile the image.

    These nets halve the image again and again, and round: 240 px become 8 features in a ResNet, as
    256 px do. A square of 30 px of the decoder would then not lie where its feature looks."""
    is_power_of_2 = math.log2(model.stride).is_integer()
    kind = get_family(settings.arch).name
    halves = kind in ("resnet", "convnext", "swin", "torchvision")
    if settings.arch.startswith("squeezenet"):               # not padded: it has no fixed stride
        halves = False
    if halves and not is_power_of_2:
        stride = 8 if settings.stem == "small" else 32
        raise ValueError(f"--image-size {format_size(settings.image_size)}: both sides must be "
                         f"multiples of {stride}, the stride of {settings.arch}")


def warn_of_few_units(settings: Settings, world: Distributed) -> None:
    units = math.prod(mask_grid(height_width(settings.image_size), settings.mask_size))
    if units < FEW_UNITS:
        world.print0(f"warning: {units} mask units of {settings.mask_size} px are too few to learn "
                     f"much from; use a smaller --mask-size or a larger --image-size")


def print_start(settings: Settings, world: Distributed, state: TrainState,
                from_step: int | None) -> None:
    """What is trained, on what, and how. from_step: of a resumed run."""
    model, plan = state.model, state.plan
    peak = settings.peak_lr
    # the sum of the learning rates is about as far as AdamW moves a weight
    if peak * plan.total < 0.1 and not settings.quick:
        cure = "raise --lr (per 512 images) or --epochs"
        cure += ", or use --recipe small" if settings.recipe != "small" else ""
        world.print0(f"warning: peak lr {peak:.1e} x {plan.total} steps = "
                     f"{peak * plan.total:.1g}: the weights will hardly change; {cure}")

    millions = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    stem = ", small stem (3x3, stride 1)" if settings.stem == "small" else ""
    is_vit = get_family(settings.arch).name == "vit"
    patches = f", patches of {settings.patch_size} px" if is_vit else ""
    units = math.prod(model.grid)
    mask = draw_masks(1, model.grid, settings.mask_ratio, world.device, settings.seed)
    images = len(state.unreadable.source)
    resume = f", from step {from_step}" if from_step is not None else ""
    is_chosen = settings.recipe == "small" and "recipe" not in settings.typed
    reason = f" (small: under {FEW_IMAGES:,} images)" if is_chosen else ""
    world.print0(
        f"{settings.arch}: {millions:.1f} M parameters{stem}{patches}, "
        f"token before stage {model.token_stage}\n"
        f"{settings.data}: {images} images at {format_size(settings.image_size)}, "
        f"{int(mask.sum())} of {units} mask units hidden ({settings.mask_size} px)\n"
        f"{world.size} x {world.device.type}, amp {settings.amp}, {settings.workers} workers each; "
        f"global batch {settings.global_batch}, peak lr {peak:.2e}, {settings.epochs:g} epochs of "
        f"{plan.per_epoch} steps{resume}\n"
        f"recipe {settings.recipe}{reason}; writing {settings.out}/")


def print_length(step: int, settings: Settings, world: Distributed, plan: StepPlan,
                 began: float) -> None:
    """After 20 steps of the small recipe: how long its default length takes here, and what a
    longer one takes."""
    steps = step + 1 - plan.start
    is_default = settings.recipe == "small" and "epochs" not in settings.typed
    if steps != 20 or not is_default or settings.data == "shapes":
        return
    minutes = (time.monotonic() - began) / steps / 60        # of a step
    longer = LONG_EPOCHS * plan.per_epoch
    if longer <= plan.total:
        return
    world.print0(f"{plan.total} steps take about {plan.total * minutes:.0f} minutes here: a first "
                 f"look. Weights that are worth fine-tuning took {LONG_EPOCHS} epochs, about "
                 f"{longer * minutes:.0f} minutes here: --epochs {LONG_EPOCHS}")


def print_end(settings: Settings, world: Distributed, held: HeldOut | None,
              has_pictures: bool) -> None:
    pictures = ""
    if settings.sheets and has_pictures:
        pictures = f", {settings.out}/reconstruction-*.png show reconstructions"
    after = "" if held else f"\n{next_step(True, settings)}"
    world.print0(f"done: {settings.out}/backbone.pt holds the encoder{pictures}{after}")


# ---- flags: name -> (default, kind, help). A recipe overrides a default, a typed flag both ----

FLAGS = {
    "data": {
        "data": (None, path("DIR"), "folder of images (ImageNet's train/, class folders, or any), "
                 f"or {', '.join(NAMED)}; none: the demo"),
        "image_size": (224, SIDES, "side of the square crop, or its height and width"),
        "val": (0.02, number(float, 0, 0.5), "number of held-out images as a share of the training "
                "images, 16 to 2,000, from val/ if it is there; their loss is compared with two "
                "baselines; 0 = none"),
        "crop_min": (0.8, number(float, 0.01, 1), "smallest area of the random crop, 0.01 to 1"),
        **DATA_FLAGS},
    "masking": {
        "mask_ratio": (0.6, number(float, -math.inf), "share of hidden mask units, above 0 and "
                       "below 1"),
        "mask_size": (32, COUNT, "side of a mask unit in pixels, at least the stride at the token; "
                      "small: about a sixth of the shorter side"),
        "token_stage": (None, number(int, 0), "the token enters before stage N (of a ViT: block "
                        "N); 1 = after the stem or patch embedding, 4 = before the last stage of a "
                        "CNN (default: ResNet, ConvNeXt 4; ViT, Swin 1; deit_small 8; small: as "
                        "deep as a mask unit covers 2 x 2 features)"),
        "token": ("gamma", masking.TOKENS, "how the token joins the features"),
        "fill": ("mean", masking.FILLS, "what fills hidden pixels at the input"),
        "baseline": (None, ("simmim",), "SimMIM: token replaces features after the stem, zero "
                     "fill, L1, no Fourier loss; on a CNN its lr and crop, too")},
    "model": {
        "arch": ("resnet50", checked("NAME", get_family), "a backbone of the paper (table: "
                 "docs/recipes.md), or most others of torchvision"),
        "weights": (None, path("FILE"), "start from backbone.pt, checkpoint.pt, torchvision's or "
                    "a released file"),
        "drop_path": (None, number(float, 0, 0.99), "stochastic depth of the deepest block (ViT "
                      "0.1, otherwise 0)"),
        "patch_size": (16, COUNT, "ViT only; 4 for images below 64 px"),
        "stem": (None, STEMS, "ResNet only: imagenet (7x7, stride 2, pooling), or small (3x3, "
                 "stride 1), the default below 64 px"),
        "window": (7, COUNT, "Swin only; 7 as in torchvision's weights, the authors use 6 at 192 "
                   "px"),
        **STAGE_FLAGS},
    "loss": {
        "fourier_weight": (0.5, NONNEGATIVE, "weight of the Fourier loss, 0 = pixels only"),
        "stand_in": ("mixed", STAND_INS, "stand-in for visible pixels in the Fourier loss: "
                     "mixed as released, prediction as in the paper"),
        "visible_weight": (0.0, FRACTION, "share of the Fourier loss's gradient that visible "
                           "pixels keep"),
        "spectrum": ("batch", SPECTRA, "one spectrum of the batch's mean as released, or one per "
                     "image as in the paper"),
        "fourier_focal": (True, bool, "weigh frequencies by their error; no: focal L1 of their "
                          "amplitudes"),
        "focal_pixels": (True, bool, "focal L1 over pixels; no: plain L1")},
    "optimiser": {
        "recipe": (None, ("imagenet", "small"), "as released, or for few images (< "
                   f"{FEW_IMAGES:,})"),
        "epochs": (300, number(float, 0.001, MAX_EPOCHS), "passes over the data; a fraction such "
                   f"as 0.5 too; small: {SMALL_STEPS} steps"),
        "batch_size": (None, COUNT, "images per process and forward pass (GPU 256, CPU 32; "
                       f"small: {SMALL_BATCH} over all processes)"),
        "accum": (1, COUNT, "forward passes per optimiser step"),
        "lr": (3e-4, NONNEGATIVE, "AdamW's, per 512 images of the global batch; small: a peak of "
               "3e-3 for a ResNet, of 1e-3 for others"),
        "token_lr": (0.1, NONNEGATIVE, "factor on the lr of mask token and gamma"),
        "min_lr": (1e-5, NONNEGATIVE, "floor of the cosine, absolute; small: a hundredth of the "
                   "peak"),
        "schedule": ("cosine", ("cosine", "step"), "after warm-up: cosine, or constant and x0.1 "
                     "for the last eighth"),
        "warmup_epochs": (None, NONNEGATIVE, "10, or a tenth of a run shorter than 100"),
        "weight_decay": (0.05, number(float, 0, 1000), "of weights, not of norms and biases"),
        "clip_grad": (0.0, NONNEGATIVE, "largest gradient norm, 0 = none")},
    "run": {
        **RUN_FLAGS,
        "quick": (False, SWITCH, "100 steps on drawn shapes in under a minute, to try a change"),
        "sheets": (5, number(int, 0, 1000), "pictures over the run, the first step and the last "
                   "included; 1 = the last")},
}
Settings = settings_class(FLAGS)                             # frozen, with a field for each flag
DEFAULTS = all_defaults("pretrain.py", FLAGS)
# of runs that were begun before these flags were there
DEFAULTS_OF_OLD_RUNS = dict(val=0.0, recipe="imagenet", stem="imagenet")


def parse(argv: list[str] | None) -> dict:
    """The flags that were typed, with their values. Raises ValueError for a wrong one."""
    parser = Parser("pretrain.py", "%(prog)s [--data DIR] [--arch NAME] [options]", __doc__, FLAGS,
                    {**RECIPES, "small": SMALL})
    typed = vars(parser.parse_args(argv))
    if "quick" in typed and "data" in typed:
        raise ValueError("--quick runs on drawn shapes; leave out --data, or leave out --quick")
    return typed


# ---- settings: resolved once, before the run begins ----

def asked_for(typed: dict) -> dict:
    """The settings of a new run, as far as they do not depend on the number of images. Each
    overrides those before it: defaults, recipe of the backbone, exceptions, the demo, the baseline,
    stem or patch of small images, what was typed."""
    demo = demo_of(typed)
    arch = typed.get("arch", demo.get("arch", DEFAULTS["arch"]))
    family = get_family(arch)
    baseline = {}
    if "baseline" in typed:
        baseline = {**SIMMIM, **(SIMMIM_CNN if family.convolutional else {})}
    recipe = {**RECIPES[family.name], **EXCEPTIONS.get(arch, {}), **demo, **baseline}
    image_size = typed.get("image_size", recipe["image_size"])
    sized = settings_for_size(arch, image_size)
    return {**DEFAULTS, "arch": arch, **recipe, **sized, **typed, "typed": sorted(typed)}


def demo_of(typed: Container[str]) -> dict:
    """The settings of the demo if no data were typed, otherwise {}."""
    if "data" in typed:
        return {}
    return QUICK if "quick" in typed else DEMO


def resolve(asked: dict, images: int, world: Distributed, is_resumed: bool = False) -> Settings:
    """The settings of a run. asked: from `asked_for` or `resumed`; images: their number.

    Nothing changes them afterwards. Raises ValueError if the mask does not fit the image."""
    values = dict(asked)
    if values["recipe"] is None:
        values["recipe"] = "small" if images < FEW_IMAGES else "imagenet"
    has_batch = values["batch_size"] or values["recipe_batch"]
    if values["recipe"] == "small" and not has_batch and not is_resumed:
        forward_passes = values["accum"] * world.size
        values["batch_size"] = max(1, min(SMALL_BATCH, images) // forward_passes)
    values |= resolve_batch(values, world)
    values["amp"] = values["amp"] or world.default_amp()
    if values["workers"] is None:
        values["workers"] = default_workers(world)
    if not is_resumed:
        kept = {*values["typed"], *demo_of(values["typed"])}
        if values["baseline"]:
            kept |= {*SIMMIM}
        for name, value in chosen_for(values, images).items():
            if name not in kept:
                values[name] = value
    # resumed, perhaps with another batch: the peak of the small recipe stays
    elif values["recipe"] == "small" and values["peak_lr"] and "lr" not in values["typed"]:
        values["lr"] = values["peak_lr"] * 512 / values["global_batch"]
    values["warmup_epochs"] = resolve_warmup(values)
    values["peak_lr"] = values["lr"] * values["global_batch"] / 512
    units = math.prod(mask_grid(height_width(values["image_size"]), values["mask_size"]))
    hidden_count(units, values["mask_ratio"])                # raises if none is hidden or visible
    return Settings(**values)


def chosen_for(values: dict, images: int) -> dict:
    """What the recipe `small` and small images set, unless it was typed.

    Raises ValueError if no mask size was typed and none fits the image."""
    is_small = values["recipe"] == "small"
    kind = get_family(values["arch"]).name
    chosen = {}
    if is_small:
        peak = SMALL_PEAK * (3 if kind == "resnet" else 1)
        if "lr" in values["typed"]:
            peak = values["lr"] * values["global_batch"] / 512
        per_epoch = steps_per_epoch(images, values["global_batch"])
        chosen = dict(SMALL, lr=peak * 512 / values["global_batch"], min_lr=peak / 100,
                      crop_min=RECIPES[kind]["crop_min"], epochs=SMALL_STEPS / per_epoch)
    typed_size = values["mask_size"] if "mask_size" in values["typed"] else None
    does_not_fit = typed_size is None and has_few_units(values)
    if is_small or does_not_fit:
        size = height_width(values["image_size"])
        encoder = build_encoder(values["arch"], size, 0.0, values["patch_size"], values["window"],
                                values["stem"])
        unit = values["patch_size"] if kind == "vit" else 8  # pixels
        mask_size, stage = choose_mask_size_and_stage(encoder, size, unit, typed_size)
        chosen |= dict(mask_size=mask_size, token_stage=stage)
    return chosen


def has_few_units(values: dict) -> bool:
    """Has the image fewer than FEW_UNITS mask units, or no whole number of them?"""
    try:
        grid = mask_grid(height_width(values["image_size"]), values["mask_size"])
    except ValueError:
        return True
    return math.prod(grid) < FEW_UNITS


if __name__ == "__main__":
    main()
