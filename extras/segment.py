"""Semantic segmentation: what pre-trained weights are worth for a class per pixel.

    python extras/segment.py                              the demo: drawn scenes, minutes on a CPU
    python extras/segment.py --weights backbone.pt --data /path/to/set
    torchrun --nproc_per_node=4 extras/segment.py --weights backbone.pt \\
        --data /path/to/ADEChallengeData2016

Layouts: part_folders in extras/pixels.py. Recipes: RECIPES below; fcn and upernet are after the
released configs. Writes into --out:

    args.json, log.jsonl, loss.png
    checkpoint.pt        the last state, for --resume
    best.pt, model.json  the net of the best epoch, for --eval-only and extras/predict.py
    result.json          mIoU, and the IoU of each class
    segmentation.png     image | label | prediction
    confusion.png        which class is taken for which
    predictions/         with --save-predictions: PNG files of class numbers, named as the labels
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
from data import (MEAN, STD, ImageDataset, ResumableBatchSampler, every_image_once, make_loader,
                  normalise, seed_for)
from engine.checkpointer import (Checkpointer, StepPlan, check_resumes_training, is_remembered,
                                 make_folder)
from engine.command import Distributed, Failed, command_line
from engine.description import check_classes, describe
from engine.files import printable, replace_atomically, write_text_atomically
from engine.flags import (AMP, DATA_FLAGS, FRACTION, MAX_EPOCHS, RUN_FLAGS, SIDES, SWITCH, Parser,
                          Several, checked, defaults, format_size, height_width, number, path,
                          remembered)
from engine.images import UnreadableImages
from engine.optim import layer_groups, make_optimizer
from engine.pictures import save_confusion, sheet
from engine.step import is_evaluated, make_scaler, take_step, wrap
from extras.dense import (FEW_IMAGES, OPTIM_FLAGS, STEM, check_part, describe_recipe,
                          evenly_spaced, layout_for, left_out, load_state, plan_steps, rate,
                          read_state, resume_or_start, same_size, some_usable, stacked,
                          start_encoder)
from extras.pixels import (IGNORED, ScaleCropFlip, Segmenter, colours_of, has_few_images, legend,
                           open_pairs, resize, save_labels, whole)
from model import get_family

# ---- recipes: every value but recipe_batch has a flag of the same name; lr is per `lr_batch`
# images of a step ----

ADE = dict(recipe_batch=16, iterations=160_000, warmup=1500, schedule="poly")  # as released
SGD = dict(optimizer="sgd", lr=0.01, weight_decay=5e-4, power=0.9, min_lr=1e-4, warmup=0)
NARROW = dict(head="upernet", width=64, aux=0.0, image_size=96, recipe_batch=8, lr_batch=8,
              lr=2e-3, warmup=50)
RECIPES = {
    "fcn":     dict(ADE, **SGD, head="fcn"),                 # for a ResNet: output stride 8
    "upernet": dict(ADE, head="upernet"),
    # Fewer than FEW_IMAGES images to train on: a narrow head, small images, few steps. It is of no
    # paper.
    "small":   dict(NARROW, iterations=1000, scale_min=1.0, scale_max=2.0, eval_every=5),
    "shapes":  dict(NARROW, iterations=800, scale_min=1.0, scale_max=1.0, distort=False),
}
EXCEPTIONS = {  # (recipe, family) -> what differs
    ("upernet", "resnet"): SGD,
    ("upernet", "vit"): dict(width=768, layer_decay=0.65, drop_path=0.1, inference="slide"),
    ("upernet", "convnext"): dict(drop_path=0.4),
    ("upernet", "swin"): dict(drop_path=0.3),
    ("small", "vit"): dict(inference="slide"),
    ("shapes", "vit"): dict(inference="slide"),
}
DEMO = Path("runs/shapes-resnet18/backbone.pt")              # what `python pretrain.py` writes


# ---- one training step ----

@dataclass
class TrainState:
    """What a step and an evaluation work on."""
    plan: StepPlan | None                                    # None: evaluation only
    classes: list[str]
    loader: DataLoader | None
    val_loader: DataLoader
    model: Segmenter                                         # the weights, under their own names
    net: nn.Module                                           # with several processes: DDP(model)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    unreadable: UnreadableImages
    colours: np.ndarray                                      # (256, 3), of the classes

    @property
    def val(self):
        """The images for validation."""
        return self.val_loader.dataset.source


def train_step(step: int, batches, args: SimpleNamespace, world: Distributed,
               state: TrainState) -> dict[str, Tensor]:
    """One optimiser step. Returns the mean loss of this process, on the device.

    All randomness comes from (seed, step): stochastic depth, dropout."""
    torch.manual_seed(seed_for(args.seed, step, world.rank))
    total = 0.0
    for part in range(args.accum):                           # forward passes
        images, labels, _, broken = next(batches)
        state.unreadable.note(broken)
        images = normalise(images, world.device)             # (B, 3, H, W)
        images = images.contiguous(memory_format=layout_for(args, world))
        labels = labels.to(world.device, non_blocking=world.on_cuda).long()  # (B, H, W)
        is_last = part == args.accum - 1
        average_gradients = is_last or world.size == 1       # over the processes, once a step
        with contextlib.nullcontext() if average_gradients else state.net.no_sync():
            with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
                outputs = state.net(images)                  # of each head: (B, classes, h, w)
            losses = [pixel_loss(logits, labels) for logits in outputs]
            loss = losses[0] + sum(args.aux * extra for extra in losses[1:])
            state.scaler.scale(loss / args.accum).backward()
        total = total + loss.detach() / args.accum

    record = {"loss": total}
    take_step(state, args, record)
    return record


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels whose class is known; 0 if there is none.

    logits are resized to the size of labels (B, H, W). (mmsegmentation divides by the number of all
    pixels, ignored and padded ones too.)"""
    logits = resize(logits.float(), labels.shape[-2:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


# ---- the run ----

def train(args: SimpleNamespace, world: Distributed) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as
    Checkpointer does."""
    world.set_device(args.device, fixed_sizes=False)         # images of any size are evaluated
    world.join()
    # With --resume --out alone the recipe is not known yet. The name is then not used.
    kind = "eval" if args.eval_only else f"{args.recipe}" + ("-scratch" if args.init else "")
    name = f"{Path(args.data or '').resolve().name}-{args.arch}-segment-{kind}"
    args, checkpoint = resume_or_start(args, world, DEFAULTS, name, FLAGS)
    state = prepare(args, world, checkpoint)
    print_start(args, world, state)
    if args.eval_only:
        make_folder(args, world)
        report(evaluate(args, world, state, is_last=True), args, world, state)
        return

    plan = state.plan
    best, result = finetune.BestEpoch(miou=-1.0), {}
    saved = dict(model=state.model, optimizer=state.optimizer, scaler=state.scaler,
                 broken=state.unreadable, best=best)
    checkpointer = Checkpointer(args, world, plan, saved, checkpoint)
    peak = args.lr * plan.global_batch / args.lr_batch
    world.print0(f"global batch {plan.global_batch}, peak lr {peak:.2e}, {plan.total} steps, "
                 f"{plan.per_epoch} an epoch: {plan.total / plan.per_epoch:.3g} epochs")
    description = description_of(args, state)

    def evaluate_after(done: int) -> None:
        if not is_evaluated(done, plan, args.eval_every):
            return
        result.update(evaluate(args, world, state, is_last=done == plan.total))
        miou = result["miou"]
        world.print0(f"epoch {done / plan.per_epoch:g}: mIoU {100 * miou:.2f} %")
        checkpointer.keep_best(best, "miou", miou, state.model.state_dict(), description)

    state.model.train()
    batches = checkpointer.timed(state.loader)
    with checkpointer:
        evaluate_after(plan.start)                           # if the run stopped just before it
        for step in checkpointer.steps():
            for group in state.optimizer.param_groups:
                group["lr"] = rate(step, plan, peak * group["scale"], args)
            record = train_step(step, batches, args, world, state)
            checkpointer.after(step, record)                 # logs, saves, stops on a signal
            evaluate_after(step + 1)
    checkpointer.finish("best.pt", "model.json")             # raises Failed if a file is missing
    report(result, args, world, state, best_miou=best["miou"], best_epoch=best.get("epoch"))


def print_start(args: SimpleNamespace, world: Distributed, state: TrainState) -> None:
    images = "" if args.eval_only else f"{len(state.loader.dataset)} images for training, "
    world.print0(f"{args.arch}, {args.init or args.weights}; {args.data}: {images}"
                 f"{len(state.classes)} classes, {len(state.val)} images for validation\n"
                 f"{describe_recipe(args)}, {args.head}, {format_size(args.image_size)}; "
                 f"{world.size} x {world.device.type}, amp {args.amp}; writing {args.out}/")
    if args.demo and not args.weights:
        world.print0(f"no {DEMO} (python pretrain.py makes it): from random weights")


def prepare(args: SimpleNamespace, world: Distributed, checkpoint: dict | None) -> TrainState:
    """Data, model, weights and optimiser. Raises ValueError if they do not fit."""
    weights = read_state(args.weights, NO_SEGMENTER) if args.eval_only else {}
    source, val = open_data(args, world, weights)
    classes = val.classes
    has_names = not all(name.isdigit() for name in classes)
    if args.eval_only and has_names:
        check_classes(classes, args.weights, args.data)
    plan = loader = None
    if not args.eval_only:
        plan = plan_steps(args, world, len(source), checkpoint)
        has_sync_norm = world.on_cuda and world.size > 1     # statistics of all processes
        if plan.batch < 2 and args.head == "upernet" and not has_sync_norm:
            raise ValueError(f"--batch-size {plan.batch}: UPerNet's BatchNorm needs at least 2 "
                             f"images per process")
        batches = ResumableBatchSampler(len(source), plan.batch, args.accum, world.size,
                                        world.rank, args.seed, plan.start, plan.total)
        samples = ImageDataset(source, ScaleCropFlip(args), args.seed)
        loader = make_loader(samples, batches, args.workers, world, stacked)
    at_once = 32 if args.data == "shapes" else 1             # other images differ in size
    val_batches = every_image_once(len(val), at_once, world)
    resized = partial(whole, side=min(height_width(args.image_size)))
    val_samples = ImageDataset(val, resized, args.seed)
    val_loader = make_loader(val_samples, val_batches, args.workers, world, stacked,
                             persistent=not args.eval_only)

    torch.manual_seed(seed_for(args.seed))                   # all processes: the same head
    encoder = start_encoder(args, world, checkpoint)
    model = Segmenter(encoder, args.head, args.width, len(classes), args.dropout, args.aux > 0)
    if args.eval_only:
        load_state(model, weights, args.weights, NO_SEGMENTER)
    model, net = wrap(model, args, world, layout_for(args, world))
    groups = layer_groups(model, args.weight_decay, args.layer_decay, "maps.encoder.backbone.")
    optimizer = make_optimizer(args.optimizer, groups, world)
    scaler = make_scaler(args, world)
    unreadable = UnreadableImages(source, args.max_bad, args.out)
    colours = colours_of(classes, getattr(val, "code", None))
    return TrainState(plan, classes, loader, val_loader, model, net, optimizer, scaler, unreadable,
                      colours)


def open_data(args: SimpleNamespace, world: Distributed, weights: dict[str, Tensor]) -> tuple:
    """(images to train on, images for validation). In an evaluation both are the latter.

    weights: to evaluate. Raises ValueError if the data cannot be used."""
    if args.download and args.data == "voc":                 # one process fetches for all
        world.broadcast_from_rank0(lambda: len(open_pairs(args, "train", world)))
    args.download = False
    if args.eval_only:
        source = val = open_pairs(args, "val", world, count=class_count(weights, args.weights))
    else:
        source = open_pairs(args, "train", world)
        val = open_pairs(args, "val", world, getattr(source, "code", None))
    if len(val) < world.size:
        raise ValueError(f"--data {args.data}: {len(val)} validation images are too few for "
                         f"{world.size} processes")
    some_usable(val, "images for validation", args, world)
    if args.eval_only:
        return source, val
    some_usable(source, "images for training", args, world)
    if args.split_val and set(val.images.tolist()) & set(source.images.tolist()):
        raise ValueError(f"--split-val {args.split_val}: these images are trained on; choose "
                         f"another part, or add --eval-only")
    return source, val


NO_SEGMENTER = ("does not hold this backbone and head for these classes; --eval-only needs best.pt "
                "of a run of this script, with its args.json beside it")
LAST_BIAS = "head.1.1.bias"                                  # (classes,)


def class_count(weights: dict[str, Tensor], file: str) -> int:
    """The number of classes of a trained segmenter. Raises ValueError for other weights."""
    bias = weights.get(LAST_BIAS)
    if not isinstance(bias, Tensor) or bias.dim() != 1:
        raise ValueError(f"{file}: {NO_SEGMENTER}")
    return len(bias)


def description_of(args: SimpleNamespace, state: TrainState) -> dict:
    """The content of model.json. numbers: of each class, in a label picture."""
    head = dict(head=args.head, width=args.width, aux=args.aux > 0, inference=args.inference)
    colours = state.colours[:len(state.classes)].tolist()
    return describe("segmenter", args, state.classes, args.image_size, MEAN, STD, **head,
                    numbers=numbers_of(state), colours=colours)


def numbers_of(state: TrainState) -> list[int]:
    """The number that stands for each class in the label pictures."""
    code = getattr(state.val, "code", None)
    return code.numbers if code else list(range(len(state.classes)))


# ---- evaluation ----

def slide(f: Callable, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, C, H, W) of images (B, 3, H, W): the mean over windows of `size`, every two thirds
    of their sides.

    The first window starts at 0, the last one ends at the border. A smaller image is padded with
    the mean colour."""
    h, w = size
    H, W = images.shape[-2:]
    images = F.pad(images, (0, max(0, w - W), 0, max(0, h - H)))
    padded_H, padded_W = images.shape[-2:]
    rows = [*range(0, padded_H - h, max(1, h * 2 // 3)), padded_H - h]
    columns = [*range(0, padded_W - w, max(1, w * 2 // 3)), padded_W - w]
    total = count = 0.0
    for y in rows:
        for x in columns:
            part = f(images[..., y:y + h, x:x + w])          # (B, C, h, w)
            place = (x, padded_W - w - x, y, padded_H - h - y)
            total = total + F.pad(part, place)
            count = count + F.pad(torch.ones_like(part[:1, :1]), place)
    return (total / count)[..., :H, :W]


SMALLEST = 32                                                # px: the largest stride of a backbone


def predict(model: Segmenter, images: Tensor, size: tuple[int, int], args: SimpleNamespace,
            world: Distributed) -> Tensor:
    """uint8 (B, 3, h, w) -> the likeliest class of every pixel (B, *size), whole or by windows."""
    images = normalise(images, world.device)
    images = images.contiguous(memory_format=layout_for(args, world))

    def logits_of(x: Tensor) -> Tensor:
        # by forward, because model(...) may be compiled, for a training batch
        return resize(model.forward(x)[0].float(), x.shape[-2:])

    with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
        if args.inference == "slide":
            logits = slide(logits_of, images, height_width(args.image_size))
        else:
            H, W = images.shape[-2:]
            padding = (0, max(0, SMALLEST - W), 0, max(0, SMALLEST - H))     # of a slim image
            logits = logits_of(F.pad(images, padding))[..., :H, :W]
    return likeliest(logits, size)


def likeliest(logits: Tensor, size: tuple[int, int], most: int = 2**27) -> Tensor:
    """logits (B, C, h, w) -> the largest class at each pixel, once resized to `size`: (B, *size).

    So many classes at a time that their logits are at most `most` numbers: all 150 of ADE20K at 12
    megapixels would take 7 GB."""
    B, C = logits.shape[:2]
    at_once = max(1, most // (B * size[0] * size[1]))
    best, label = resize(logits[:, :at_once], size).max(1)
    for first in range(at_once, C, at_once):
        values, index = resize(logits[:, first:first + at_once], size).max(1)
        label = torch.where(values > best, index + first, label)
        best = torch.maximum(values, best)
    return label


@torch.no_grad()
def evaluate(args: SimpleNamespace, world: Distributed, state: TrainState,
             is_last: bool = False) -> dict:
    """Exact scores over the whole validation set, on any number of processes, and a sheet. See
    `score`.

    is_last: with --save-predictions, the predictions are written, too."""
    state.model.eval()
    world.broadcast_buffers(state.model)
    C, missing = len(state.classes), []
    numbers = numbers_of(state)
    folder = Path(args.out) / "predictions"
    # pixels of each (class, prediction), and behind them the number of images
    counts = torch.zeros(C * C + 1, dtype=torch.long, device=world.device)
    for images, labels, index, broken in state.val_loader:
        missing += broken[broken >= 0].tolist()
        is_read = broken < 0
        images, labels, index = images[is_read], labels[is_read], index[is_read]
        if len(images) == 0:
            continue
        predicted = predict(state.model, images, labels.shape[-2:], args, world)
        labels = labels.to(world.device).long()
        known = labels != IGNORED
        pairs = labels[known] * C + predicted[known]
        counts[:-1] += torch.bincount(pairs, minlength=C * C)
        counts[-1] += len(images)
        if is_last and args.save_predictions:
            for i, classes in zip(index.tolist(), predicted):
                save_labels(folder / state.val.label_name(i), classes, numbers, state.colours)
    left_out(state.val, missing, world)
    counts = world.all_reduce_sum(counts.cpu()).double()
    if not counts[:-1].any():
        raise Failed(f"--data {args.data}: no image for validation has a pixel of a known class")
    if world.rank == 0:
        save_pictures(args, world, state)
    state.model.train()
    return {**score(counts[:-1].view(C, C), state.classes), "images": int(counts[-1])}


def score(confusion: Tensor, classes: list[str]) -> dict:
    """confusion (C, C): pixels by class (row) and prediction (column) -> the scores.

    iou       of each class: pixels that are both in the class and predicted, over pixels that are
              either; nan for a class that does not occur
    accuracy  of each class: the share of its pixels that is predicted right
    miou      the mean over the classes that occur in either, as in mmsegmentation: a class without
              a labelled pixel counts as 0 if it is predicted somewhere
    found     where class 0 is a ground: the IoU of all others taken as one, which is where objects
              are, whatever they are; nan without any"""
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = right / (labelled + predicted - right)
    accuracy = right / labelled
    result = dict(miou=iou.nanmean().item(),
                  pixel_accuracy=(right.sum() / labelled.sum()).item(),
                  class_accuracy=accuracy.nanmean().item(),
                  iou=iou, accuracy=accuracy, confusion=confusion)
    if classes[0] in ("ground", "background"):
        objects = confusion[1:, 1:].sum()
        result["found"] = (objects / (confusion.sum() - confusion[0, 0])).item()
    return result


# ---- what is written ----

def save_pictures(args: SimpleNamespace, world: Distributed, state: TrainState,
                  side: int = 160) -> None:
    """segmentation.png: image | label | prediction of six validation images, evenly spaced, and a
    legend of their classes. Pixels without a class are white."""
    colours = torch.from_numpy(state.colours).float() / 255

    def in_colours(labels: Tensor) -> Tensor:                # (1, H, W) -> (1, 3, H, W)
        return colours[labels.long().cpu()].permute(0, 3, 1, 2)

    rows, seen = [], set()
    for i in evenly_spaced(len(state.val), 6):
        images, labels, _, broken = stacked([state.val_loader.dataset[0, i]])
        if broken[0] >= 0:
            continue
        predicted = predict(state.model, images, labels.shape[1:], args, world)
        seen |= {*labels.unique().tolist(), *predicted.unique().tolist()}
        longest = max(labels.shape[1:])
        h, w = (max(1, round(side * s / longest)) for s in labels.shape[1:])
        rows.append([F.interpolate(images / 255, (h, w), mode="area")[0],
                     F.interpolate(in_colours(labels), (h, w))[0],
                     F.interpolate(in_colours(predicted), (h, w))[0]])
    if not rows:
        return
    images, labels, predictions = zip(*rows)
    page = sheet({"image": same_size(images), "label": same_size(labels),
                  "prediction": same_size(predictions)})
    names = legend(state.classes, state.colours, sorted(seen - {IGNORED}), page.width)
    whole_page = Image.new("RGB", (page.width, page.height + names.height), "white")
    whole_page.paste(page, (0, 0))
    whole_page.paste(names, (0, page.height))
    with contextlib.suppress(OSError):                       # a full disk does not end the run
        whole_page.save(Path(args.out) / "segmentation.png")


def report(result: dict, args: SimpleNamespace, world: Distributed, state: TrainState,
           **more) -> None:
    """Prints the result, and writes result.json and confusion.png."""
    confusion = result.pop("confusion")
    iou, accuracy = result.pop("iou").tolist(), result.pop("accuracy").tolist()
    labelled = (confusion.sum(1) > 0).tolist()
    per_class, accuracies = {}, {}
    for name, share, right, is_there in zip(state.classes, iou, accuracy, labelled):
        per_class[name] = round(share, 4) if is_there else None
        accuracies[name] = round(right, 4) if is_there else None

    world.print0(class_table(per_class, accuracies))
    if not all(labelled):
        world.print0("-: in no label picture for validation")
    found = ""
    if "found" in result:
        found = f"; any object, as one class, {percent(result['found'], 2)} %"
    world.print0(f"mIoU {percent(result['miou'], 2)} %, pixel accuracy "
                 f"{percent(result['pixel_accuracy'], 2)} %{found}")
    zeros = [printable(name) for name, share, is_there in zip(state.classes, iou, labelled)
             if share == 0 and not is_there]
    if zeros:
        others = f" and {len(zeros) - 3} more classes" if len(zeros) > 3 else ""
        world.print0("in no label picture for validation but predicted, so that mIoU counts it as "
                     "0: " + ", ".join(zeros[:3]) + others)
    if world.rank:
        return
    # json has no nan
    content = {name: value if value == value else None for name, value in result.items()}
    content |= {**more, "weights": args.weights or args.init, "recipe": args.recipe}
    content |= {"per_class": per_class, "per_class_accuracy": accuracies}
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)         # rows sum to 1
    with replace_atomically(Path(args.out) / "confusion.png") as beside:
        save_confusion(beside, shares, state.classes)
    # last, because a folder with a result.json is refused when the command is given again
    write_text_atomically(Path(args.out) / "result.json", json.dumps(content, indent=1) + "\n")


def class_table(iou: dict, accuracy: dict, most: int = 50) -> str:
    """A line for each of up to `most` classes: its IoU and its accuracy, in per cent."""
    names = {name: printable(name) for name in iou}
    width = max(map(len, ["class", *names.values()]))
    lines = ["class".ljust(width) + f"{'IoU':>7}{'accuracy':>10}"]
    for name, shown in list(names.items())[:most]:
        lines.append(f"{shown.ljust(width)}{percent(iou[name], 1):>7}"
                     f"{percent(accuracy[name], 1):>10}")
    if len(names) > most:
        lines.append(f"and {len(names) - most} more classes, see result.json")
    return "\n".join(lines)


def percent(share: float | None, digits: int = 0) -> str:
    """A share in per cent; "-" where nothing was there to count (None or nan)."""
    return "-" if share is None or share != share else f"{100 * share:.{digits}f}"


def main(argv: list[str] | None = None) -> None:
    command_line("segment.py", parse, train, argv)


# ---- flags: name -> (default, kind, help). A recipe overrides a default, a typed flag both ----

FLAGS = {
    "data": {
        "data": (None, path("DIR"), "a folder in ADE20K's layout (images/ and annotations/) or "
                 "CamVid's (train/ and trainannot/), voc, or shapes: drawn scenes"),
        "split_val": (None, checked("NAME", check_part),
                      "the part to evaluate on, such as test (val; without val: test)"),
        "ignore": ((), Several(number(int, 0, IGNORED - 1)),
                   "class numbers that count as unlabelled, beside 255"),
        "image_size": (512, SIDES, "side of the square crop, or its height and width; the shorter "
                       "one is the shorter side in tests"),
        "scale_min": (0.5, number(float, 0.05, 10),
                      "smallest shorter side before the crop, as a multiple of --image-size's"),
        "scale_max": (2.0, number(float, 0.05, 10), "the largest"),
        "same_class": (0.75, FRACTION,
                       "a crop with a larger share of one class is drawn again"),
        "distort": (True, bool, "change brightness, contrast, saturation and hue"),
        "zero_is_other": (None, bool,
                          "label 0 is no class, and the classes count from 1; yes for ADE20K"),
        **DATA_FLAGS},
    "model": {
        **finetune.FLAGS["model"],
        "stem": STEM,
        "head": ("upernet", ("fcn", "upernet"), "fcn: on a dilated ResNet"),
        "width": (512, number(int, 1, 4096), "channels of the head"),
        "dropout": (0.1, number(float, 0, 0.99), "of the head's last features"),
        "aux": (0.4, number(float, 0, 1000), "weight of the second head's loss; 0 = no such head")},
    "optimiser": {
        "recipe": (None, tuple(RECIPES), f"the table below (drawn scenes: shapes; under "
                   f"{FEW_IMAGES:,} images: small; a ResNet: fcn; else upernet)"),
        **OPTIM_FLAGS,
        "schedule": ("cosine", ("cosine", "poly"), "see extras/dense.py, rate")},
    "run": {
        **RUN_FLAGS,
        "inference": ("whole", ("whole", "slide"),
                      "slide: by windows of --image-size, as a ViT needs"),
        "eval_every": (10, number(int, 1, MAX_EPOCHS),
                       "epochs between evaluations; the last epoch is always evaluated"),
        "eval_only": (False, SWITCH, "evaluate --weights best.pt, and stop"),
        "save_predictions": (False, SWITCH, "write predictions/*.png: the predicted class numbers "
                             "of the last evaluation")},
}
# and what a recipe alone can set
DEFAULTS = {**defaults(FLAGS), "recipe_batch": 16, "warmup_epochs": None}
SEGMENTER = ["recipe", "head", "width", "aux", "image_size", "inference", "ignore", "zero_is_other"]


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe; `given` holds what was typed. Raises ValueError for a wrong value."""
    recipes = dict(RECIPES)
    for (recipe, kind), values in EXCEPTIONS.items():
        recipes[f"{recipe}, {kind}"] = values
    parser = Parser("segment.py", "%(prog)s --weights FILE --data DIR [options]", __doc__, FLAGS,
                    recipes)
    given = vars(parser.parse_args(argv))
    check_resumes_training(given, trains="eval_only" not in given)
    about = dict(program="segment.py", given=given, typed=sorted(given))
    if is_remembered(given):                                 # the rest is in the checkpoint
        settings = {**DEFAULTS, **given}
        return SimpleNamespace(**settings, **about, demo=False)
    start, demo = {}, not {"data", "eval_only"} & set(given)
    if demo:
        start = dict(data="shapes", arch="resnet18")
        if not {"weights", "init", "arch"} & set(given):
            start |= dict(weights=str(DEMO)) if DEMO.exists() else dict(init="scratch")
    weights = given.get("weights", start.get("weights"))
    names = ["arch", "patch_size", "window", "stem"]         # as pre-trained; to evaluate, all
    names += SEGMENTER if "eval_only" in given else []
    start = {**start, **remembered(weights, FLAGS, names), **given}
    if (weights is None) == ("init" not in start):
        raise ValueError("give --weights FILE, or --init scratch to train from random weights")
    if "data" not in start:
        raise ValueError("--data is missing: a folder of images and label pictures, or one of "
                         "shapes, voc")
    if "arch" not in start:
        raise ValueError("--arch is missing: no args.json beside the weights names it; try --arch "
                         "resnet50")
    kind = get_family(start["arch"]).name
    recipe = start.setdefault("recipe", default_recipe(start["data"], kind))
    settings = {**DEFAULTS, **RECIPES[recipe], **EXCEPTIONS.get((recipe, kind), {}), **start}
    args = SimpleNamespace(**settings, **about, demo=demo)
    if min(height_width(args.image_size)) < SMALLEST:
        raise ValueError(f"--image-size {format_size(args.image_size)}: both sides must be at "
                         f"least {SMALLEST} px")
    if args.scale_min > args.scale_max:
        raise ValueError(f"--scale-min {args.scale_min:g}: must not be above --scale-max "
                         f"{args.scale_max:g}")
    if kind == "vit" and args.inference == "whole":
        raise ValueError(f"--inference whole: {args.arch} has one grid of positions; use slide")
    if args.eval_only and args.init:
        raise ValueError("--eval-only: needs --weights, such as best.pt of a run")
    return args


def default_recipe(data: str, family: str) -> str:
    if data == "shapes":
        return "shapes"
    if data != "voc" and has_few_images(Path(data)):
        return "small"
    return "fcn" if family == "resnet" else "upernet"


if __name__ == "__main__":
    main()
