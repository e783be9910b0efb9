"""Pre-training: A2MIM on any backbone, on a CPU, one GPU, or many.

    python pretrain.py                                                    the built-in demo, minutes on a CPU
    torchrun --nproc_per_node=8 pretrain.py --data /path/to/imagenet      the paper's run (ResNet-50, 300 epochs)

Recipes as released by the authors (Li et al., ICML 2023): RECIPES below. Leaves in --out: args.json, log.jsonl,
checkpoint.pt, backbone.pt (the encoder alone, under torchvision's names), loss.png, reconstruction-*.png.
"""

import contextlib
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

import masking
from data import (NAMED, Batches, CropAndFlip, Samples, denormalise, eval_transform, hold_out, normalise, open_images,
                  seed_for)
from engine.command import World, command_line
from engine.flags import (AMP, DATA_FLAGS, MAX_EPOCHS, RUN_FLAGS, SIDES, Parser, checked, defaults, number, pair,
                          path, told_size)
from engine.images import Broken, every_image_once, make_loader
from engine.journal import Journal, Steps, open_run
from engine.optim import lr_at, parameter_groups
from engine.pictures import save_sheet
from engine.weights import load_backbone, told
from loss import SPECTRA, STAND_INS, a2mim_loss, skill, spatial_loss
from masking import fill_hidden, hidden_count, mask_grid, random_mask
from model import FEW_UNITS, STEMS, A2MIM, Encoder, build_encoder, family, fit_cell, for_small_images

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
    "torchvision": dict(CNN, fourier_weight=0.5, visible_weight=1e-3),       # its other nets take the ResNet's
}
EXCEPTIONS = {  # as released
    "resnet101": dict(fourier_weight=0.1, fourier_focal=False, spectrum="image"),
    "resnet152": dict(fourier_weight=0.0),
    "resnet200": dict(fourier_weight=0.0),
    "deit_small": dict(image_size=192, lr=2e-4, schedule="cosine", mask_stage=8),        # before the eighth block
    "deit_tiny": dict(image_size=192, lr=2e-4, schedule="cosine"),
}
# --baseline simmim, the paper's comparison, differs from A2MIM in these five settings
SIMMIM = dict(token="replace", mask_stage=1, fill="zero", fourier_weight=0.0, focal_pixels=False)
# and on a CNN in these as well, as released; with --recipe small both train alike
SIMMIM_CNN = dict(lr=2e-4, token_lr=1.0, crop_min=0.67)

# --recipe small, for fewer than FEW_IMAGES images (no paper's; found on photographs and clip art). The released lr
# shrinks with the batch and would come to nothing, so this one is a peak lr for any batch. The mean residual over a
# small batch says little, so each image has its own spectrum.
FEW_IMAGES = 100_000
SMALL = dict(spectrum="image", token_lr=1.0, schedule="cosine")
SMALL_STEPS = 1500
SMALL_PEAK = 1e-3                                            # three times as much for a ResNet

DEMO = dict(data="shapes", arch="resnet18", image_size=96, recipe="small", epochs=1, global_batch=16, log_every=5)


# ---- one step ----

@dataclass
class Run:
    """What a step works on."""
    steps: Steps
    loader: DataLoader
    model: A2MIM                                             # the weights, under their plain names
    net: nn.Module                                           # what a step calls: the model, wrapped by DDP if need be
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    memory_format: torch.memory_format
    broken: Broken


def target_of(images: Tensor) -> Tensor:
    """What is to be painted, (B, C, H, W): the pixels themselves."""
    return images


def draw_masks(count: int, grid: tuple[int, int], args: SimpleNamespace, device: torch.device, *seed: int) -> Tensor:
    """Which cells are hidden, (count, gh, gw): a function of the seed alone."""
    return random_mask(count, grid, args.mask_ratio, device, torch.Generator(device).manual_seed(seed_for(*seed)))


def train_step(step: int, batches, args: SimpleNamespace, world: World, run: Run) -> dict[str, Tensor]:
    """One optimiser step; returns this process's mean loss and its parts, still on the device.

    All randomness comes from (seed, step), so a run that stops and goes on is the run that never stopped."""
    torch.manual_seed(seed_for(args.seed, step, world.rank))                 # stochastic depth, and the random fill
    # every process draws the masks of all, and takes its own: (accum, batch, gh, gw)
    masks = draw_masks(run.steps.global_batch, run.model.grid, args, world.device, args.seed, step)
    masks = masks.view(args.accum, world.size, run.steps.batch, *run.model.grid)[:, world.rank]
    record = {}
    for part, mask in enumerate(masks):                      # --accum forward passes
        images, _, broken = next(batches)
        run.broken.note(broken)
        images = normalise(images, world.device).contiguous(memory_format=run.memory_format)         # (B, 3, H, W)
        target = target_of(images)
        sync_now = part == args.accum - 1 or world.size == 1     # processes average their gradients once a step
        with contextlib.nullcontext() if sync_now else run.net.no_sync():
            with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
                painted = run.net(images, mask)              # (B, 3, H, W)
            loss, parts = a2mim_loss(                        # in float32
                painted, target, mask, fourier_weight=args.fourier_weight, stand_in=args.stand_in,
                visible_weight=args.visible_weight, spectrum=args.spectrum, alpha=args.alpha,
                log_weight=args.log_weight, focal_pixels=args.focal_pixels, focal_fourier=args.fourier_focal)
            run.scaler.scale(loss / args.accum).backward()
        for name, value in {"loss": loss.detach(), **parts}.items():
            record[name] = record.get(name, 0) + value / args.accum
    if args.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad)
    run.scaler.step(run.optimizer)                           # not made if a gradient is not finite
    run.scaler.update(None if args.amp == "fp16" else 1.0)   # the scale of fp16 adapts, else it stays 1
    run.optimizer.zero_grad(set_to_none=True)
    return record


# ---- what a loss is worth: images held out, and two baselines ----

UNTRAINED = "visible patches carry no loss: their reconstruction is not trained"


@dataclass
class HeldOut:
    """Images that are not trained on, with their masks; this process's part of them."""
    images: Tensor                                           # (n, 3, H, W), uint8
    masks: Tensor                                            # (n, gh, gw), always the same
    count: int                                               # of all processes
    mean_colour: Tensor | None = None                        # (count,) pixel loss of the mean colour,
    blur: Tensor | None = None                               # and of a blur of the visible pixels


@torch.no_grad()
def held_out_loss(reconstruct, held: HeldOut, args: SimpleNamespace, world: World) -> Tensor:
    """The pixel loss of reconstruct(images, masks) on each held-out image: (count,), on the CPU.

    All processes take part. Each gets the losses of all images, always in the same order."""
    losses = []
    for first in range(0, len(held.images), 64):
        images, mask = (part[first:first + 64].to(world.device) for part in (held.images, held.masks))
        images = normalise(images, world.device)             # (B, 3, H, W)
        target, found = target_of(images), reconstruct(images, mask)
        for i in range(len(images)):
            one = slice(i, i + 1)
            losses.append(spatial_loss(found[one], target[one], mask[one], args.focal_pixels))
    mine = torch.stack(losses) if losses else torch.zeros(0)
    return world.gather(mine).cpu().double()


def evaluation_interval(steps: Steps, held_out: int) -> int:
    """Steps between two evaluations: an epoch, or a tenth of the run if that is shorter.

    It is longer where all evaluations together would take more than a tenth of the training time.
    For each image an evaluation is a forward pass, about a third of a training step."""
    affordable = int(0.1 * steps.total * steps.global_batch / (held_out / 3))
    often = min(steps.per_epoch, max(1, steps.total // 10))
    return max(often, math.ceil(steps.total / max(affordable, 1)))


def next_step(better: bool, args: SimpleNamespace) -> str:
    """What to do after pre-training. better: the model's reconstructions are better than a blur."""
    if not better:
        return "next: train longer (--epochs) or use larger mask units (--mask-cell)"
    weights = shlex.quote(f"{args.out}/backbone.pt")
    if args.data not in NAMED:
        return (f"next: python finetune.py --weights {weights} --data DIR\n"
                f"      (DIR: labelled images, in a folder for each class)")
    data = args.data
    if args.data_root != DEFAULTS["data_root"]:
        data += f" --data-root {shlex.quote(args.data_root)}"
    return f"next: python finetune.py --weights {weights} --data {data}"


# ---- the run ----

def train(args: SimpleNamespace, world: World) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as Journal does."""
    world.take_gpu(args.device)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group(world.backend, store=world.meeting_place(), rank=world.rank, world_size=world.size)
    name = f"{Path(args.data).resolve().name}-{args.arch}" + (f"-{args.baseline}" if args.baseline else "")
    args, saved = open_run(args, world, own={**DEFAULTS, **OLD}, name=name, flags=FLAGS)
    args.amp = args.amp or world.default_amp()
    if args.demo:
        world.say("no --data given: running the demo on drawn shapes; the paper's run is\n"
                  "  torchrun --nproc_per_node=8 pretrain.py --data /path/to/imagenet")
    run, held, previews = prepare(args, world, saved)
    model, steps, peak = run.model, run.steps, args.lr * run.steps.global_batch / 512
    keep = dict(model=model, optimizer=run.optimizer, scaler=run.scaler, broken=run.broken)
    journal = Journal(args, world, steps, keep, saved, export={"backbone.pt": model.encoder.backbone.state_dict})

    if peak * steps.total < 0.1:                             # about as far as AdamW can move a weight
        cure = "raise --lr (per 512 images) or --epochs"
        cure += ", or use --recipe small" if args.recipe != "small" else ""
        world.say(f"peak lr {peak:.1e} x {steps.total} steps = {peak * steps.total:.1g}: no weight moves further, so "
                  f"little will be learned; {cure}")
    millions, cells = sum(p.numel() for p in model.encoder.parameters()) / 1e6, math.prod(model.grid)
    small_stem = ", small stem (3x3, stride 1)" if args.stem == "small" else ""
    patches = f", patches of {args.patch_size} px" if family(args.arch).name == "vit" else ""
    world.say(f"{args.arch}: {millions:.1f} M parameters{small_stem}{patches}, token before stage {model.mask_stage}\n"
              f"{args.data}: {len(run.broken.source)} images at {told_size(args.image_size)}, "
              f"{hidden_count(cells, args.mask_ratio)} of {cells} cells hidden ({args.mask_cell} px)\n"
              f"{world.size} x {world.device.type}, amp {args.amp}, {run.loader.num_workers} workers each; global "
              f"batch {steps.global_batch}, peak lr {peak:.2e}, {args.epochs:g} epochs of {steps.per_epoch} steps"
              + f", from step {steps.start}" * bool(saved) + f"\nrecipe {args.recipe}"
              + f" (small: under {FEW_IMAGES:,} images)" * ("recipe" not in args.given) + f"; writing {args.out}/")
    preview_masks = draw_masks(len(previews), model.grid, args, world.device, args.seed)
    picture_steps = {round(i / max(1, args.sheets - 1) * steps.total) for i in range(args.sheets)}

    def picture(done: int) -> None:
        """The same images and masks, as the model paints them after `done` steps."""
        if world.rank == 0 and done in picture_steps:
            titles = ("image", "encoder sees", "reconstruction", "hidden cells pasted", "a blur of what is seen")
            blurred = fill_hidden(previews, preview_masks, "blur")
            columns = (denormalise(x) for x in (previews, *model.reconstruct(previews, preview_masks), blurred))
            file = journal.out / f"reconstruction-{done:06d}.png"
            note = UNTRAINED if args.visible_weight < 0.01 else ""
            journal.write("a picture", save_sheet, file, dict(zip(titles, columns)), note)

    def measure(done: int) -> None:
        """The loss on held-out images, beside the two baselines; after the last step, in words."""
        if not held or not done:
            return
        if done < steps.total and done % evaluation_interval(steps, held.count):
            return
        model.eval()
        world.share_buffers(model)
        losses = held_out_loss(model, held, args, world)     # of each image
        model.train()
        loss, mean_colour, blur = (x.mean().item() for x in (losses, held.mean_colour, held.blur))
        journal.note(held_out=loss, mean_colour=mean_colour, blur=blur)
        if done == steps.total:
            # standard error of the mean difference; one image alone says nothing
            count, difference = len(losses), losses - held.blur
            error = difference.std().item() / math.sqrt(count) if count > 1 else math.inf
            verdict = skill(loss, mean_colour, blur, error)
            better = verdict.endswith("better than a blur")
            world.say(f"hidden pixels of {count} held-out images: {verdict}\n"
                      f"{next_step(better, args)}")

    model.train()
    batches = iter(run.loader)
    with journal:
        picture(steps.start)
        if not journal.has("held_out"):                      # it was stopped between a step and its measure
            measure(steps.start)
        for step in journal.steps():
            for group in run.optimizer.param_groups:
                base = peak * group["scale"]
                group["lr"] = lr_at(step, steps.total, steps.warmup, base, args.min_lr, args.schedule)
            record = train_step(step, batches, args, world, run)
            journal.after(step, record)                      # undoes a non-finite step, logs, saves, stops on a signal
            picture(step + 1)
            measure(step + 1)
    journal.finish()                                         # raises Failed if a file that was promised is not there
    pictures = f", {args.out}/reconstruction-*.png show its reconstructions" if args.sheets else ""
    after = "" if held else f"\n{next_step(True, args)}"     # else it was told with the held-out loss
    world.say(f"done: {args.out}/backbone.pt holds the encoder{pictures}{after}")


def choose_recipe(args: SimpleNamespace, images: int, steps: Steps, encoder: Encoder) -> None:
    """--recipe, if none was typed, and into args what `small` and small images have and nobody typed.

    Raises ValueError if no mask size was typed and none fits the image."""
    if args.recipe is None:
        args.recipe = "small" if images < FEW_IMAGES else "imagenet"
    kept = {*args.given, *(DEMO if args.demo else {}), *(SIMMIM if args.baseline else {})}
    few_units = math.prod(mask_grid_or_none(args) or (0,)) < FEW_UNITS and "mask_cell" not in kept
    chosen = {}
    if args.recipe == "small":
        kind = family(args.arch).name
        peak = SMALL_PEAK * (3 if kind == "resnet" else 1)
        args.peak_lr = None if "lr" in kept else peak
        chosen = dict(SMALL, lr=peak * 512 / steps.global_batch, min_lr=peak / 100, crop_min=RECIPES[kind]["crop_min"],
                      epochs=SMALL_STEPS / steps.per_epoch)
    if args.recipe == "small" or few_units:
        unit = args.patch_size if family(args.arch).name == "vit" else 8
        cell, stage = fit_cell(encoder, pair(args.image_size), unit, args.given.get("mask_cell"))
        chosen |= dict(mask_cell=cell, mask_stage=stage)
    vars(args).update({name: value for name, value in chosen.items() if name not in kept})


def mask_grid_or_none(args: SimpleNamespace) -> tuple[int, int] | None:
    """The grid of mask cells; None if the image is not a multiple of the cell."""
    with contextlib.suppress(ValueError):
        return mask_grid(pair(args.image_size), args.mask_cell)


def prepare(args: SimpleNamespace, world: World, saved: dict | None) -> tuple[Run, HeldOut | None, Tensor]:
    """Data, model and optimiser; images held out; six for pictures. Raises ValueError if they do not fit together."""
    size = pair(args.image_size)                             # (H, W)
    if args.download:                                        # one process fetches for all
        world.agree(lambda: len(open_images(args.data, "train", size, args.data_root, download=True)))
    source, others = hold_out(open_images(args.data, "train", size, args.data_root, crop_min=args.crop_min), args, size)
    steps = Steps.plan(args, world, len(source), saved)
    torch.manual_seed(seed_for(args.seed))                   # every process starts from the same weights
    encoder = build_encoder(args.arch, size, args.drop_path, args.patch_size, args.window, args.stem)
    if not saved:
        choose_recipe(args, len(source), steps, encoder)
        steps = Steps.plan(args, world, len(source), saved)
    elif "lr" in args.given:
        args.peak_lr = None
    elif args.peak_lr:                                       # of the small recipe: the same at any batch
        args.lr = args.peak_lr * 512 / steps.global_batch
    cells = math.prod(mask_grid(size, args.mask_cell))
    hidden_count(cells, args.mask_ratio)                     # raises if they do not fit
    if cells < FEW_UNITS:
        world.say(f"warning: {cells} mask cells of {args.mask_cell} px are too few to learn much from; use a smaller "
                  f"--mask-cell or a larger --image-size")
    batches = Batches(len(source), steps.batch, args.accum, world.size, world.rank, args.seed, steps.start, steps.total)
    loader = make_loader(Samples(source, CropAndFlip(size, args.crop_min), args.seed), batches, args.workers, world)

    if args.weights and not saved:
        world.say(f"{args.weights}: {told(load_backbone(encoder, args.weights))}")
    model = A2MIM(encoder, image_size=size, mask_cell=args.mask_cell, mask_stage=args.mask_stage, token=args.token,
                  fill=args.fill).to(world.device)
    channels_last = args.channels_last and family(args.arch).convolutional and not world.on_mps  # faster on a CNN
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = net = model.to(memory_format=memory_format)
    if world.size > 1 and world.on_cuda:
        model = net = nn.SyncBatchNorm.convert_sync_batchnorm(model)         # statistics over all GPUs, as released
    if args.compile:
        model.compile()
    if world.size > 1:
        net = DDP(model, device_ids=[world.local_rank] if world.on_gpu else None, gradient_as_bucket_view=True)
    groups = parameter_groups(model, args.weight_decay, args.token_lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=not world.on_mps)
    # without fp16 the scale stays 1, and the scaler does one thing: it skips a step with a gradient that is not finite
    scaler = torch.amp.GradScaler(world.device.type, **({} if args.amp == "fp16" else dict(init_scale=1.0)))
    broken = Broken(source, args.max_bad, args.out)

    centred, held = Samples(others or source, eval_transform(size), args.seed), None
    previews = torch.stack([centred[0, i * len(centred) // 6][0] for i in range(6)])
    if others:
        mine = every_image_once(len(others), 64, world)
        images = [part[broken < 0] for part, _, broken in make_loader(centred, mine, args.workers, world)]
        images = torch.cat([previews[:0], *images])          # more processes than images: some have none
        masks = draw_masks(len(others), model.grid, args, world.device, args.seed, 1)[world.rank::world.size]
        held = HeldOut(images, masks[:len(images)], len(others))
        filled = lambda fill: lambda x, mask: target_of(fill_hidden(x, mask, fill))
        held.mean_colour, held.blur = (held_out_loss(filled(fill), held, args, world) for fill in ("mean", "blur"))
    run = Run(steps, loader, model, net, optimizer, scaler, memory_format, broken)
    return run, held, normalise(previews, world.device)


def main(argv: list[str] | None = None) -> None:
    command_line("pretrain.py", parse, train, argv)


# ---- flags: name -> (default, kind, help); a recipe overrides the default, what is typed overrides both ----

yes_no, share, positive, count = bool, number(float, 0, 1), number(float, 0), number(int, 1)
FLAGS = {
    "data": {
        "data": (None, path("DIR"), "folder of images (ImageNet's train/, class folders, or any), or "
                 f"{', '.join(NAMED)}; none: the demo"),
        "image_size": (224, SIDES, "side of the square crop, or its height and width"),
        "val": (0.02, number(float, 0, 0.5), "share of images held out (of val/ if it is there) for the yardstick"),
        "crop_min": (0.8, number(float, 0.01, 1), "smallest area of the random crop, 0.01 to 1"),
        **DATA_FLAGS},
    "masking": {
        "mask_ratio": (0.6, number(float, -math.inf), "share of cells hidden per image, above 0 and below 1"),
        "mask_cell": (32, count, "side of a hidden square in pixels, at least the stride at the token"),
        "mask_stage": (None, number(int, 0), "token enters before stage N: 1 = after stem or patch embedding (ViT: "
                       "before block N), 4 = before the last stage of a CNN (ResNet, ConvNeXt 4; ViT, Swin 1)"),
        "token": ("gamma", masking.TOKENS, "how the token joins the features"),
        "fill": ("mean", masking.FILLS, "colour of hidden pixels at the input"),
        "baseline": (None, ("simmim",), "SimMIM: token replaces features after the stem, zero fill, L1, no Fourier")},
    "model": {
        "arch": ("resnet50", checked("NAME", family), "a backbone of the paper, or any of torchvision's"),
        "weights": (None, path("FILE"), "start from backbone.pt, checkpoint.pt, torchvision's or a released file"),
        "drop_path": (None, number(float, 0, 0.99), "stochastic depth of the deepest block (ViT 0.1, else 0)"),
        "patch_size": (16, count, "ViT only; 4 for images below 64 px"),
        "stem": (None, STEMS, "ResNet only: imagenet (7x7, stride 2, pooling), or small (3x3, stride 1), which is the "
                 "default below 64 px"),
        "window": (7, count, "Swin only; 7 as in torchvision's weights, the authors use 6 at 192 px")},
    "loss": {
        "fourier_weight": (0.5, positive, "lambda, 0 = pixels only"),
        "stand_in": ("mixed", STAND_INS, "what visible pixels show it: mixed as released, prediction as in the paper"),
        "visible_weight": (0.0, share, "share of gradient that visible pixels keep in it, 0 to 1"),
        "spectrum": ("batch", SPECTRA, "one spectrum of the batch's mean as released, or one per image as the paper"),
        "fourier_focal": (True, yes_no, "focal frequency loss, or mean focal L1 of |D|"),
        "alpha": (1.0, positive, "exponent of the frequency weight"),
        "log_weight": (True, yes_no, "log(1 + |D|^alpha) as frequency weight"),
        "focal_pixels": (True, yes_no, "focal L1 over pixels, or plain L1")},
    "optimiser": {
        "recipe": (None, ("imagenet", "small"), f"as released, or for few images (< {FEW_IMAGES:,})"),
        "epochs": (300, number(float, 0.001, MAX_EPOCHS), "passes over the data; a fraction such as 0.5 too"),
        "batch_size": (None, count, "images per process and forward pass (GPU 256, CPU 32)"),
        "accum": (1, count, "forward passes per optimiser step"),
        "lr": (3e-4, positive, "AdamW's, per 512 images of the global batch"),
        "token_lr": (0.1, positive, "lr of mask token and gamma, times the lr"),
        "min_lr": (1e-5, positive, "floor of the cosine, absolute"),
        "schedule": ("cosine", ("cosine", "step"), "after warm-up: cosine, or constant and x0.1 for the last eighth"),
        "warmup_epochs": (None, positive, "10, or a tenth of a run shorter than 100"),
        "weight_decay": (0.05, number(float, 0, 1000), "AdamW's"),
        "clip_grad": (0.0, positive, "largest gradient norm, 0 = none")},
    "run": {**RUN_FLAGS, "sheets": (5, number(int, 0, 1000), "pictures over the run, first and last included")},
}
# What a flag or a recipe can set. peak_lr: of the small recipe, None if --lr was typed
DEFAULTS = {**defaults(FLAGS), "global_batch": None, "peak_lr": None}
OLD = dict(val=0.0, recipe="imagenet", stem="imagenet")      # of runs that were begun before these flags


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe of the backbone; `given` holds what was typed. Raises ValueError for a wrong value."""
    parser = Parser("pretrain.py", "%(prog)s [--data DIR] [--arch NAME] [options]", __doc__, FLAGS, RECIPES)
    given = vars(parser.parse_args(argv))
    demo = DEMO if "data" not in given else {}
    arch = given.get("arch", demo.get("arch", DEFAULTS["arch"]))
    baseline = {}
    if "baseline" in given:
        baseline = {**SIMMIM, **(SIMMIM_CNN if family(arch).convolutional else {})}
    recipe = {**RECIPES[family(arch).name], **EXCEPTIONS.get(arch, {}), **demo, **baseline}
    image_size = given.get("image_size", recipe["image_size"])
    settings = {**DEFAULTS, "arch": arch, **recipe, **for_small_images(arch, image_size), **given}
    return SimpleNamespace(**settings, program="pretrain.py", given=given, demo=bool(demo))


if __name__ == "__main__":
    main()
