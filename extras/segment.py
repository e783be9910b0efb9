"""Semantic segmentation: what pre-trained weights are worth for a class per pixel. FCN and UPerNet,
and evaluation.

    python extras/segment.py                                 the demo: drawn scenes, after the
                                                             README's demo
    torchrun --nproc_per_node=4 extras/segment.py --weights backbone.pt --data
    /path/to/ADEChallengeData2016

Recipes: RECIPES below. Leaves in --out: args.json, log.jsonl, checkpoint.pt (the last state),
best.pt (the best epoch's weights, for --eval-only), result.json (IoU per class), segmentation.png,
loss.png, confusion.png. """

import colorsys
import contextlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
from data import (every_image_once, ImageDataset, make_loader, normalise, ResumableBatchSampler, seed_for)
from engine.command import Failed, Distributed, command_line
from engine.files import printable, write_text_atomically
from engine.flags import (AMP, DATA_FLAGS, MAX_EPOCHS, MAX_SIDE, RUN_FLAGS, SWITCH, Parser,
                          defaults, number, path, remembered)
from engine.images import UnreadableImages
from engine.checkpointer import Checkpointer, StepPlan, make_folder, open_run
from engine.pictures import save_confusion, save_sheet
from engine.weights import load_backbone, read_weights, summary_of
from extras.dense import (OPTIM_FLAGS, left_out, memory_format, optimizer_for, plan,
                          rate, some_usable, stacked, wrapped)
from extras.pixels import IGNORED, ScaleCropFlip, Segmenter, open_pairs, resize, whole
from model import build_encoder, get_family

# ---- recipes: every value has a flag of the same name; lr is per `lr_batch` images of the global
# batch ----

ADE = dict(global_batch=16, iterations=160_000, warmup=1500, schedule="poly")  # as released
SGD = dict(optimizer="sgd", lr=0.01, weight_decay=5e-4, power=0.9, min_lr=1e-4, warmup=0)
RECIPES = {
    "fcn":     dict(ADE, **SGD, head="fcn"),  # the released one for ResNet: output stride 8
    "upernet": dict(ADE, head="upernet"),
    "shapes":  dict(head="upernet", width=64, aux=0.0, image_size=96, scale_min=1.0, scale_max=1.0, distort=False,
                    global_batch=8, lr_batch=8, lr=2e-3, iterations=800, warmup=50),
}
EXCEPTIONS = {  # (recipe, family) -> what differs
    ("upernet", "resnet"): SGD,
    ("upernet", "vit"): dict(width=768, layer_decay=0.65, drop_path=0.1, inference="slide"),
    ("upernet", "convnext"): dict(drop_path=0.4),
    ("upernet", "swin"): dict(drop_path=0.3),
    ("shapes", "vit"): dict(inference="slide"),
}
DEMO = Path("runs/shapes-resnet18/backbone.pt")              # what `python pretrain.py` leaves

# ---- one step ----

@dataclass
class Run:
    """What a step and an evaluation work on."""
    steps: StepPlan
    classes: list[str]
    loader: DataLoader
    val_loader: DataLoader
    model: Segmenter                                         # the weights, under their plain names
    net: nn.Module  # what a step calls: the model, wrapped by DDP if need be
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    broken: UnreadableImages


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels whose class is known; 0 if there is none.

    logits are resized to the size of labels (B, H, W). (mmsegmentation divides by the number of all
    pixels, ignored and padded ones too.)"""
    logits = resize(logits.float(), labels.shape[-2:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def train_step(step: int, batches, args: SimpleNamespace, world: Distributed, run: Run) -> dict[str, Tensor]:
    """One optimiser step; returns this process's mean loss, still on the device. Randomness comes
    from (seed, step)."""
    torch.manual_seed(seed_for(args.seed, step, world.rank))  # stochastic depth, dropout
    record = 0.0
    for part in range(args.accum):
        images, labels, _, broken = next(batches)
        run.broken.note(broken)
        images = normalise(images, world.device)             # (B, 3, H, W)
        images = images.contiguous(memory_format=memory_format(args, world))
        labels = labels.to(world.device, non_blocking=world.on_cuda).long()  # (B, H, W)
        # processes average their gradients once a step
        sync_now = part == args.accum - 1 or world.size == 1
        with contextlib.nullcontext() if sync_now else run.net.no_sync():
            with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
                outputs = run.net(images)  # of the head, and of the second one: (B, classes, h, w)
            losses = [pixel_loss(logits, labels) for logits in outputs]
            loss = losses[0] + sum(args.aux * extra for extra in losses[1:])
            run.scaler.scale(loss / args.accum).backward()
        record = record + loss.detach() / args.accum
    if args.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad)
    run.scaler.step(run.optimizer)                           # not made if a gradient is not finite
    # the scale of fp16 adapts, else it stays 1
    run.scaler.update(None if args.amp == "fp16" else 1.0)
    run.optimizer.zero_grad(set_to_none=True)
    return {"loss": record}


# ---- the run ----

def train(args: SimpleNamespace, world: Distributed) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as
    Checkpointer does."""
    world.set_device(args.device, fixed_sizes=False)         # images of any size are evaluated
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group(world.backend, store=world.rendezvous_store(), rank=world.rank, world_size=world.size)
    kind = "-eval" if args.eval_only else "-scratch" if args.init else ""
    name = f"{Path(args.data or '').resolve().name}-{args.arch}-segment{kind}"
    args, saved = open_run(args, world, own=DEFAULTS, name=name, flags=FLAGS)
    args.amp = args.amp or world.default_amp()
    run = prepare(args, world, saved)
    steps, best, result = run.steps, finetune.BestEpoch(miou=-1.0), {}
    peak = args.lr * steps.global_batch / args.lr_batch
    images = len(run.broken.source)
    world.print0(f"{args.arch}, {args.init or args.weights}; {args.data}: {images} images for training, "
              f"{len(run.classes)} classes, {len(run.val_loader.dataset)} images for validation\n"
              f"{'evaluation only' if args.eval_only else f'recipe {args.recipe}'}, {args.head}, {args.image_size} px; "
              f"{world.size} x {world.device.type}, amp {args.amp}; writing {args.out}/")
    if args.demo and not args.weights:
        world.print0(f"no {DEMO} (python pretrain.py makes it): from random weights")
    if args.eval_only:
        make_folder(args, world, steps.global_batch)
        return report(evaluate(args, world, run), args, world, run)
    keep = dict(model=run.model, optimizer=run.optimizer, scaler=run.scaler, broken=run.broken, best=best)
    checkpointer = Checkpointer(args, world, steps, keep, saved)
    world.print0(f"global batch {steps.global_batch}, peak lr {peak:.2e}, {steps.total} steps, "
                 f"{steps.per_epoch} an epoch")

    def evaluate_after(done: int) -> None:
        """At the end of every --eval-every epochs, and of the run."""
        epoch, inside = divmod(done, steps.per_epoch)
        if done == 0 or done < steps.total and (inside or epoch % args.eval_every):
            return
        result.update(evaluate(args, world, run))
        world.print0(f"epoch {done / steps.per_epoch:g}: mIoU {100 * result['miou']:.2f} %")
        checkpointer.keep_best(best, "miou", result["miou"], run.model.state_dict())

    run.model.train()
    batches = checkpointer.timed(run.loader)
    with checkpointer:
        evaluate_after(steps.start)  # a checkpoint is written before its evaluation
        for step in checkpointer.steps():
            for group in run.optimizer.param_groups:
                group["lr"] = rate(step, steps, peak * group["scale"], args)
            record = train_step(step, batches, args, world, run)
            # undoes a non-finite step, logs, saves, stops on a signal
            checkpointer.after(step, record)
            evaluate_after(step + 1)
    checkpointer.finish("best.pt")  # raises Failed if a file that was promised is not there
    report(result, args, world, run, best_miou=best["miou"], best_epoch=best.get("epoch"))


def prepare(args: SimpleNamespace, world: Distributed, saved: dict | None) -> Run:
    """Data, model, weights and optimiser. Raises ValueError if they do not fit."""
    if args.download and args.data == "voc":                 # one process fetches for all, once
        world.broadcast_from_rank0(lambda: len(open_pairs(args, "train", world)))
    args.download = False
    source = open_pairs(args, "train", world)
    val = open_pairs(args, "val", world, source.classes)
    if len(val) < world.size:
        raise ValueError(f"--data {args.data}: {len(val)} validation images are too few for {world.size} processes")
    some_usable(val, "images for validation", args, world)
    if not args.eval_only:
        some_usable(source, "images for training", args, world)
    args.batch_size = 1 if args.eval_only else args.batch_size
    steps = plan(args, world, len(source), saved)
    if steps.batch < 2 and args.head == "upernet" and not args.eval_only:
        raise ValueError(f"--batch-size {steps.batch}: UPerNet's BatchNorm needs at least 2 images per process")
    batches = ResumableBatchSampler(len(source), steps.batch, args.accum, world.size, world.rank,
                                    args.seed, steps.start, steps.total)
    loader = make_loader(ImageDataset(source, ScaleCropFlip(args), args.seed), batches, args.workers, world, stacked)
    val_once = every_image_once(len(val), 32 if args.data == "shapes" else 1, world)
    val_samples = ImageDataset(val, partial(whole, side=args.image_size), args.seed)
    val_loader = make_loader(val_samples, val_once, args.workers, world, stacked,
                             persistent=not args.eval_only)

    torch.manual_seed(seed_for(args.seed))  # every process starts from the same head
    encoder = build_encoder(args.arch, args.image_size, args.drop_path, args.patch_size, args.window,
                            args.stem)
    if args.weights and not saved and not args.eval_only:
        world.print0(f"{args.weights}: " + summary_of(load_backbone(encoder, args.weights)))
    model = Segmenter(encoder, args.head, args.width, len(source.classes), args.dropout, args.aux > 0)
    if args.eval_only:
        load_all(model, args.weights)
    model, net = wrapped(model, args, world)
    optimizer = optimizer_for(model, args, "maps.encoder.backbone.")
    # without fp16 the scale stays 1, and the scaler does one thing: it skips a step with a gradient
    # that is not finite
    scaler = torch.amp.GradScaler(world.device.type, **({} if args.amp == "fp16" else dict(init_scale=1.0)))
    return Run(steps, source.classes, loader, val_loader, model, net, optimizer, scaler,
               UnreadableImages(source, args.max_bad, args.out))


def load_all(model: Segmenter, file: str) -> None:
    """best.pt of a run, every tensor of it. Raises ValueError if it is of another model."""
    try:
        model.load_state_dict(read_weights(file, model.state_dict()))
    except RuntimeError:
        raise ValueError(f"{file}: does not hold this backbone and head for these classes; --eval-only needs best.pt "
                         f"of a run of this script, with its args.json beside it") from None


# ---- evaluation ----

def slide(f, images: Tensor, side: int) -> Tensor:
    """Logits (B, C, H, W) of images (B, 3, H, W): f's of square windows every 2/3 of their side,
    averaged.

    The first starts at 0, the last ends at the border. A smaller image is padded with the mean
    colour."""
    H, W = images.shape[-2:]
    images, step = F.pad(images, (0, max(0, side - W), 0, max(0, side - H))), max(1, side * 2 // 3)
    rows, cols = ([*range(0, length - side, step), length - side] for length in images.shape[-2:])
    total = count = 0.0
    for y in rows:
        for x in cols:
            place = (x, images.shape[-1] - side - x, y, images.shape[-2] - side - y)
            part = f(images[..., y:y + side, x:x + side])    # (B, C, side, side)
            total, count = total + F.pad(part, place), count + F.pad(torch.ones_like(part[:1, :1]), place)
    return (total / count)[..., :H, :W]


def predict(images: Tensor, size: tuple[int, int], args: SimpleNamespace, world: Distributed, run: Run) -> Tensor:
    """uint8 (B, 3, h, w) -> the likeliest class of every pixel (B, *size), whole or by windows."""
    images = normalise(images, world.device).contiguous(memory_format=memory_format(args, world))
    # by forward, because model(...) may be compiled, for a training batch
    f = lambda x: resize(run.model.forward(x)[0].float(), x.shape[-2:])
    with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
        logits = slide(f, images, args.image_size) if args.inference == "slide" else f(images)
    return resize(logits, size).argmax(1)


@torch.no_grad()
def evaluate(args: SimpleNamespace, world: Distributed, run: Run) -> dict:
    """Exact scores over the whole validation set, on any number of processes, and a sheet. See
    `score`."""
    run.model.eval()
    world.broadcast_buffers(run.model)
    C, missing = len(run.classes), []
    # pixels of each (class, prediction), and behind them the number of images
    counts = torch.zeros(C * C + 1, dtype=torch.long, device=world.device)
    for images, labels, _, broken in run.val_loader:
        images, labels = images[broken < 0], labels[broken < 0]
        missing += broken[broken >= 0].tolist()
        if len(images):
            predicted, labels = predict(images, labels.shape[-2:], args, world, run), labels.to(world.device).long()
            known = labels != IGNORED
            counts[:-1] += torch.bincount(labels[known] * C + predicted[known], minlength=C * C)
            counts[-1] += len(images)
    left_out(run.val_loader.dataset.source, missing, world)
    counts = (world.all_reduce_mean(counts.cpu().double()) * world.size).round()
    if not counts[:-1].any():
        raise Failed(f"--data {args.data}: no image for validation has a pixel of a known class")
    if world.rank == 0:
        save_pictures(args, world, run)
    run.model.train()
    return {**score(counts[:-1].view(C, C), run.classes), "images": int(counts[-1])}


def score(confusion: Tensor, classes: list[str]) -> dict:
    """confusion (C, C): pixels of each class (row) by prediction (column). IoU of a class: both
    over either.

    miou is the mean over the classes that occur in either, as in mmsegmentation: a class without a
    labelled pixel counts as 0 if it is predicted somewhere. Where class 0 is a ground, `found` is
    the IoU of all others taken as one: where objects are, whatever they are. Without any: nan."""
    hit, true, said = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hit / (true + said - hit)                          # nan for a class that does not occur
    result = dict(miou=iou.nanmean().item(), pixel_accuracy=(hit.sum() / true.sum()).item(),
                  class_accuracy=(hit / true).nanmean().item(), iou=iou, confusion=confusion)
    if classes[0] in ("ground", "background"):
        result["found"] = (confusion[1:, 1:].sum() / (confusion.sum() - confusion[0, 0])).item()
    return result


def save_pictures(args: SimpleNamespace, world: Distributed, run: Run, side: int = 160) -> None:
    """segmentation.png: image | label | prediction of the first six validation images. White is not
    asked for."""
    colours = torch.tensor([colorsys.hsv_to_rgb(i * 0.618 % 1, 0.5 + i * 0.29 % 0.5, 1 - i * 0.17 % 0.4)
                            for i in range(256)])
    colours[0], colours[IGNORED] = 0.2, 1.0
    # (1, H, W) -> (1, 3, H, W)
    paint = lambda labels: colours[labels.long().cpu()].permute(0, 3, 1, 2)
    rows = []
    for i in range(min(6, len(run.val_loader.dataset))):
        images, labels, _, broken = stacked([run.val_loader.dataset[0, i]])
        if broken[0] < 0:
            predicted = predict(images, labels.shape[1:], args, world, run)
            h, w = (max(1, round(side * s / max(labels.shape[1:]))) for s in labels.shape[1:])
            row = (F.interpolate(x, (h, w)) for x in (images / 255, paint(labels), paint(predicted)))
            rows.append([F.pad(x[0], (0, side - w, 0, side - h), value=1.0) for x in row])
    if rows:
        columns = zip(("image", "label", "prediction"), zip(*rows))
        with contextlib.suppress(OSError):                   # a full disk does not end the run
            save_sheet(Path(args.out) / "segmentation.png", {title: torch.stack(part) for title, part in columns})


def report(result: dict, args: SimpleNamespace, world: Distributed, run: Run, **more) -> None:
    """Says the result, writes result.json (IoU per class too) and confusion.png."""
    confusion, iou = result.pop("confusion"), result.pop("iou").tolist()
    labelled = (confusion.sum(1) > 0).tolist()
    rows = list(zip(run.classes, iou, labelled))
    per_class = {name: round(share, 4) if there else None for name, share, there in rows}
    miou, accuracy = percent(result["miou"], 2), percent(result["pixel_accuracy"], 2)
    found = percent(result.get("found"), 2)
    where = f"; any object, as one class, {found} %" if "found" in result else ""
    world.print0(f"mIoU {miou} %, pixel accuracy {accuracy} %{where}")
    if len(run.classes) <= 21:
        told = [f"{printable(name)} {percent(share)}" for name, share in per_class.items()]
        note = "" if all(labelled) else " (-: in no label picture for validation)"
        world.print0("IoU: " + ", ".join(told) + note)
    zeros = [printable(name) for name, share, there in rows if share == 0 and not there]
    if zeros:
        others = f" and {len(zeros) - 3} more classes" if len(zeros) > 3 else ""
        world.print0("in no label picture for validation but predicted, so that mIoU counts it as 0: "
                  + ", ".join(zeros[:3]) + others)
    if world.rank == 0:
        # json has no nan
        content = {name: value if value == value else None for name, value in result.items()}
        content |= {**more, "weights": args.weights or args.init, "recipe": args.recipe}
        content["per_class"] = per_class
        write_text_atomically(Path(args.out) / "result.json", json.dumps(content, indent=1) + "\n")
        save_confusion(Path(args.out) / "confusion.png", confusion / confusion.sum(1, keepdim=True).clamp(min=1),
                       run.classes)


def percent(share: float | None, digits: int = 0) -> str:
    """A share in per cent; "-" where nothing was there to count (None or nan)."""
    return "-" if share is None or share != share else f"{100 * share:.{digits}f}"


def main(argv: list[str] | None = None) -> None:
    command_line("segment.py", parse, train, argv)


# ---- flags: name -> (default, kind, help); a recipe overrides the default, what is typed overrides
# both ----

FLAGS = {
    "data": {
        "data": (None, path("DIR"), "images/ and annotations/ with train*/ and val*/ (ADE20K), voc, or shapes: scenes"),
        "image_size": (512, number(int, 32, MAX_SIDE), "side of the crop, and shorter side in tests"),
        "scale_min": (0.5, number(float, 0.05, 10), "least shorter side before the crop, times --image-size"),
        "scale_max": (2.0, number(float, 0.05, 10), "most"),
        "same_class": (0.75, number(float, 0, 1), "a crop with a larger share of one class is drawn anew"),
        "distort": (True, bool, "change brightness, contrast, saturation and hue"),
        "zero_is_other": (None, bool, "class 0 is not asked for, the others count from 1; yes for ADE20K"),
        **DATA_FLAGS},
    "model": {
        **finetune.FLAGS["model"],
        "head": ("upernet", ("fcn", "upernet"), "fcn: on a dilated ResNet"),
        "width": (512, number(int, 1, 4096), "channels of the head"),
        "dropout": (0.1, number(float, 0, 0.99), "of the head's last features"),
        "aux": (0.4, number(float, 0, 1000), "weight of the second head's loss; 0 = no such head")},
    "optimiser": {
        "recipe": (None, tuple(RECIPES), "the table below (for shapes shapes, for ResNet fcn, else upernet)"),
        **OPTIM_FLAGS,
        "schedule": ("cosine", ("cosine", "poly"), "see extras/dense.py, rate")},
    "run": {
        **RUN_FLAGS,
        "inference": ("whole", ("whole", "slide"), "slide: by windows of --image-size, as a ViT needs"),
        "eval_every": (10, number(int, 1, MAX_EPOCHS),
                       "epochs between evaluations; the last epoch is always evaluated"),
        "eval_only": (False, SWITCH, "evaluate --weights best.pt, and stop")},
}
# and what a recipe alone can set
DEFAULTS = {**defaults(FLAGS), "global_batch": 16, "warmup_epochs": None}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe; `given` holds what was typed. Raises ValueError for a value that is
    off."""
    parser = Parser("segment.py", "%(prog)s --weights FILE --data DIR [options]", __doc__, FLAGS, RECIPES)
    given = vars(parser.parse_args(argv))
    if "resume" in given and "out" in given and "data" not in given:  # the rest is remembered
        return SimpleNamespace(**{**DEFAULTS, **given}, program="segment.py", given=given, demo=False)
    start, demo = {}, "data" not in given
    if demo:
        start = dict(data="shapes", arch="resnet18")
        if not {"weights", "init"} & set(given):
            start |= dict(weights=str(DEMO)) if DEMO.exists() else dict(init="scratch")
    weights = given.get("weights", start.get("weights"))
    names = ["arch", "patch_size", "window", "stem"]
    names += ["recipe", "head", "width", "aux", "image_size", "inference"] if "eval_only" in given else []
    start = {**start, **remembered(weights, parser, names), **given}
    if (weights is None) == ("init" not in start):
        raise ValueError("give --weights FILE, or --init scratch to train from random weights")
    if "arch" not in start:
        raise ValueError("--arch is missing: no args.json beside the weights names it; try --arch resnet50")
    kind = get_family(start["arch"]).name
    start.setdefault("recipe", "shapes" if start["data"] == "shapes" else "fcn" if kind == "resnet" else "upernet")
    recipe = {**DEFAULTS, **RECIPES[start["recipe"]], **EXCEPTIONS.get((start["recipe"], kind), {})}
    args = SimpleNamespace(**{**recipe, **start}, program="segment.py", given=given, demo=demo)
    if args.scale_min > args.scale_max:
        raise ValueError(f"--scale-min {args.scale_min:g}: must not be above --scale-max {args.scale_max:g}")
    if kind == "vit" and args.inference == "whole":
        raise ValueError(f"--inference whole: {args.arch} has one grid of positions; use slide")
    if args.eval_only and args.init:
        raise ValueError("--eval-only: needs --weights, such as best.pt of a run")
    return args


if __name__ == "__main__":
    main()
