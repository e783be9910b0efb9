"""Detection: Mask R-CNN, or Faster R-CNN where there are no outlines, on pre-trained weights.

    python extras/detect.py                              the built-in demo, minutes on a CPU
    python extras/detect.py --weights backbone.pt --data /path/to/set        COCO's or VOC's layout
    torchrun --nproc_per_node=8 extras/detect.py --weights backbone.pt --data /path/to/coco
    torchrun --nproc_per_node=8 extras/detect.py --weights backbone.pt --data /path/to/coco \\
        --recipe c4_2x

Needs pycocotools: pip install -r extras/requirements.txt. Layouts: open_objects in extras/coco.py.
Recipes: RECIPES below; 1x, c4_2x and vit are after the released configs. Writes into --out:

    args.json, log.jsonl, loss.png
    checkpoint.pt        the last state, for --resume
    best.pt, model.json  the detector of the best epoch, for --eval-only and extras/predict.py
    result.json          AP of boxes and masks, of each class too
    detections.png       image | truth | prediction
    predictions.json     with --save-predictions: COCO's results (predictions-masks.json: of masks)
"""

import contextlib
import itertools
import json
import sys
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import draw_segmentation_masks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
from data import (MEAN, NAMED, STD, ImageDataset, ResumableBatchSampler, every_image_once,
                  make_loader, seed_for)
from engine.checkpointer import (Checkpointer, StepPlan, check_resumes_training, is_remembered,
                                 make_folder)
from engine.command import Distributed, Failed, command_line
from engine.description import check_classes, describe
from engine.files import printable, write_text_atomically
from engine.flags import (DATA_FLAGS, MAX_EPOCHS, MAX_SIDE, RUN_FLAGS, SWITCH, Parser, checked,
                          defaults, number, path, remembered)
from engine.images import UnreadableImages
from engine.optim import layer_groups, make_optimizer
from engine.pictures import save_sheet
from engine.step import is_evaluated, make_scaler, take_step, wrap
from extras.coco import (average_precision, check_installed, has_few_images, open_objects,
                         results_of, truth_of)
from extras.dense import (FEW_IMAGES, OPTIM_FLAGS, STEM, Scenes, check_part, describe_recipe,
                          evenly_spaced, layout_for, left_out, listed, load_state, plan_steps,
                          rate, read_state, resume_or_start, same_size, some_usable,
                          start_encoder)
from extras.mask_rcnn import detector
from model import get_family

# ---- recipes: every value but recipe_batch and milestones has a flag of the same name; lr is per
# `lr_batch` images of a step ----

SGD = dict(optimizer="sgd", lr=0.02, weight_decay=1e-4, schedule="steps", epochs=12,
           milestones=(8 / 12, 11 / 12))
RECIPES = {
    # a folder in COCO's format, any backbone but a ViT
    "1x":     dict(SGD, warmup=500),
    # the paper's, for a ResNet
    "c4_2x":  dict(SGD, warmup=1000, epochs=24, milestones=(16 / 24, 22 / 24), neck="c4"),
    "vit":    dict(SGD, warmup=500, milestones=(9 / 12, 11 / 12), optimizer="adamw", lr=3e-4,
                   weight_decay=0.05, drop_path=0.2, image_size=512),
    # Fewer than FEW_IMAGES images to train on: smaller steps and images, more epochs. No paper's.
    # Four epochs of ResNet-18 on 205 images of blood cells (BCCD) at 128 px, one seed: box AP 17
    # with lr 1.6e-3, 9 with lr 4e-4, and 1 by recipe 1x.
    "small":  dict(optimizer="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine",
                   recipe_batch=8, epochs=60, warmup=100, eval_every=5, image_size=480),
    # drawn scenes of 128 px: small anchors, narrow heads
    "shapes": dict(optimizer="adamw", lr=4e-3, weight_decay=0.05, schedule="cosine",
                   recipe_batch=8, epochs=0.4, warmup=50, eval_every=10, image_size=128,
                   smallest=128, longest=128, anchor=8, width=64, convs=2, proposals=100, rois=64,
                   detections=20),
}
DEMO = dict(data="shapes", arch="resnet18", log_every=5)
DEMO_WEIGHTS = "runs/shapes-resnet18/backbone.pt"            # of the demo of pretrain.py

# ---- one step ----

@dataclass
class TrainState:
    """What a step and an evaluation work on."""
    plan: StepPlan | None                                    # None: evaluation only
    classes: list[str]                                       # without the background
    with_masks: bool                                         # Mask R-CNN, or Faster R-CNN
    loader: DataLoader | None
    val_loader: DataLoader
    model: FasterRCNN                                        # the weights, under their own names
    net: nn.Module                                           # with several processes: DDP(model)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    unreadable: UnreadableImages

    @property
    def val(self):
        """The images for validation."""
        return self.val_loader.dataset.source


def train_step(step: int, batches, args: SimpleNamespace, world: Distributed,
               state: TrainState) -> dict[str, Tensor]:
    """One optimiser step. Returns the mean losses of this process, on the device.

    All randomness comes from (seed, step): stochastic depth, sizes, samples of anchors and
    regions."""
    torch.manual_seed(seed_for(args.seed, step, world.rank))
    record = {}
    for part in range(args.accum):
        images, targets, _, broken = next(batches)
        state.unreadable.note(broken)
        images = [as_float(image, world) for image in images]    # (3, H, W) each
        targets = [to_learn(target, world) for target in targets]
        is_last = part == args.accum - 1
        average_gradients = is_last or world.size == 1       # over the processes, once a step
        with contextlib.nullcontext() if average_gradients else state.net.no_sync():
            # five losses: objectness and box of the proposals; class and box of the regions; masks
            losses = state.net(images, targets)
            losses = {"loss": sum(losses.values()), **losses}
            state.scaler.scale(losses["loss"] / args.accum).backward()
        for name, value in losses.items():
            record[name] = record.get(name, 0) + value.detach() / args.accum
    take_step(state, args, record)
    return record


def to_learn(target: dict[str, Tensor], world: Distributed) -> dict[str, Tensor]:
    """What the detector learns from, on the device; masks only if the set has outlines."""
    names = [name for name in ("boxes", "labels", "masks") if name in target]
    return {name: target[name].as_subclass(Tensor).to(world.device) for name in names}


def as_float(image: Tensor, world: Distributed) -> Tensor:
    """uint8 (3, H, W) -> float32 in [0, 1] on the device; the detector normalises by itself."""
    return image.as_subclass(Tensor).to(world.device, non_blocking=world.on_cuda).float().div_(255)


# ---- the run ----

def train(args: SimpleNamespace, world: Distributed) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as
    Checkpointer does."""
    check_installed()
    world.set_device(args.device, fixed_sizes=False)         # images of any size are evaluated
    world.join()
    kind = "eval" if args.eval_only else args.recipe + ("-scratch" if args.init else "")
    name = f"{Path(args.data or '').resolve().name}-{args.arch}-detect-{kind}"
    args, checkpoint = resume_or_start(args, world, DEFAULTS, name, FLAGS)
    args = with_sides(args)                                  # again: --resume may change them
    if args.demo:
        hint = "" if Path(DEMO_WEIGHTS).is_file() else f"; python pretrain.py makes {DEMO_WEIGHTS}"
        start = args.weights or "random weights"
        world.print0(f"no --data given: running the demo on drawn scenes, from {start}{hint}")
    state = prepare(args, world, checkpoint)
    world.print0(f"{args.arch}, {args.neck}, {args.init or args.weights}; {args.data}: "
                 f"{len(state.classes)} classes, {len(state.val)} images for validation\n"
                 f"{describe_recipe(args)}; {world.size} x {world.device.type}, amp {args.amp}; "
                 f"writing {args.out}/")
    if args.eval_only:
        make_folder(args, world)
        result, found = evaluate(state.model, args, world, state)
        return report(result, found, args, world, state)

    plan = state.plan
    peak = args.lr * plan.global_batch / args.lr_batch
    best, result = finetune.BestEpoch(AP=-2.0), {}
    found = []
    saved = dict(model=state.model, optimizer=state.optimizer, scaler=state.scaler,
                 broken=state.unreadable, best=best)
    checkpointer = Checkpointer(args, world, plan, saved, checkpoint)
    world.print0(f"{len(state.loader.dataset)} images, global batch {plan.global_batch}, "
                 f"peak lr {peak:.2e}, {plan.total} steps, {plan.per_epoch} an epoch")
    description = description_of(args, state)

    def evaluate_after(done: int) -> None:
        if not is_evaluated(done, plan, args.eval_every):
            return
        now, found[:] = evaluate(state.model, args, world, state)
        result.update(now)
        scores = [f"{kind} AP {percent(result[kind]['AP'])}" for kind in kinds(result)]
        world.print0(f"epoch {done / plan.per_epoch:g}: " + ", ".join(scores))
        checkpointer.keep_best(best, "AP", result["box"]["AP"], state.model.state_dict(),
                               description)

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
    report(result, found, args, world, state, best_AP=best["AP"], best_epoch=best.get("epoch"))


def open_scenes(args: SimpleNamespace, split: str):
    """--data -> images with objects: len(), .classes, .read(index) -> (image, {boxes, ...})."""
    if args.data == "shapes":
        if args.split_val:
            raise ValueError("--split-val: drawn scenes have one part for validation; leave it out")
        return Scenes(split, (args.image_size, args.image_size))
    if args.data in NAMED or not Path(args.data).is_dir():
        what = "has no boxes" if args.data in NAMED else "no such folder"
        raise ValueError(f"--data {args.data}: {what}; give a folder in COCO's or Pascal VOC's "
                         f"layout, or shapes")
    return open_objects(Path(args.data), split, args.split_val, longest_side(args))


def longest_side(args: SimpleNamespace) -> int:
    """Pixels that the longer side of an image has at most in the detector. A ViT's is a square."""
    return args.image_size if get_family(args.arch).name == "vit" else args.longest


def tell_outlines(source, what: str, world: Distributed) -> None:
    """Prints how many objects have no outline, if some have none. what: is without them."""
    count, outlines = getattr(source, "count", 0), getattr(source, "outlines", 0)
    if outlines < count:
        world.print0(f"{count - outlines} of {count} objects have no outline and are not used "
                     f"for {what}")


def share_images(source, val) -> bool:
    files = [{part.file(i) for i in range(len(part))} for part in (source, val)]
    return not files[0].isdisjoint(files[1])


def open_data(args: SimpleNamespace, world: Distributed) -> tuple:
    """(images to train on, images for validation). In an evaluation both are the latter.

    Raises ValueError if the data cannot be used."""
    val = open_scenes(args, "val")
    source = val if args.eval_only else open_scenes(args, "train")
    for part in dict.fromkeys((source, val)):
        for note in getattr(part, "notes", ()):
            world.print0(note)
    some_usable(val, "images for validation", args, world)
    if args.eval_only:
        return source, val
    some_usable(source, "images for training", args, world)
    if args.split_val and share_images(source, val):
        raise ValueError(f"--split-val {args.split_val}: these images are trained on; choose "
                         f"another part, or add --eval-only")
    if source.classes != val.classes:
        raise ValueError(f"--data {args.data}: the annotations of train and val list different "
                         f"classes")
    return source, val


def prepare(args: SimpleNamespace, world: Distributed, checkpoint: dict | None) -> TrainState:
    """Data, model, weights and optimiser. Raises ValueError if they do not fit."""
    source, val = open_data(args, world)
    classes = val.classes
    if args.data == "shapes":                                # scenes count the background
        classes = classes[1:]
    if args.eval_only:
        check_classes(classes, args.weights, args.data)
    plan = loader = None
    if not args.eval_only:
        plan = plan_steps(args, world, len(source), checkpoint)
        flip = v2.RandomHorizontalFlip(0.5)                  # image, boxes and masks together
        batches = ResumableBatchSampler(len(source), plan.batch, args.accum, world.size,
                                        world.rank, args.seed, plan.start, plan.total)
        samples = ImageDataset(source, flip, args.seed)
        loader = make_loader(samples, batches, args.workers, world, listed)
    # photographs differ in size: in a batch they would be padded, which changes what is found
    at_once = 8 if args.data == "shapes" else 1
    val_batches = every_image_once(len(val), at_once, world)
    val_samples = ImageDataset(val, nn.Identity(), args.seed)
    val_loader = make_loader(val_samples, val_batches, args.workers, world, listed,
                             persistent=not args.eval_only)

    torch.manual_seed(seed_for(args.seed))                   # all processes: the same heads
    encoder = start_encoder(args, world, checkpoint)
    weights = read_state(args.weights, NO_DETECTOR) if args.eval_only else {}
    with_masks = bool(getattr(source, "outlines", True))
    if args.eval_only:                                       # as the detector was trained
        with_masks = has_masks(weights)
    model = detector(encoder, len(classes) + 1, args, world, with_masks)
    if args.eval_only:
        load_state(model, weights, args.weights, NO_DETECTOR)
    if not with_masks:
        world.print0("no outlines: Faster R-CNN, boxes only")
    else:
        tell_outlines(val, "the AP of masks", world)
    if with_masks and not args.eval_only:
        tell_outlines(source, "the loss of masks", world)
    model, net = wrap(model, args, world, layout_for(args, world))
    groups = layer_groups(model, args.weight_decay, args.layer_decay,
                          "backbone.maps.encoder.backbone.")
    optimizer = make_optimizer(args.optimizer, groups, world)
    scaler = make_scaler(args, world)
    unreadable = UnreadableImages(source, args.max_bad, args.out)
    return TrainState(plan, classes, with_masks, loader, val_loader, model, net, optimizer, scaler,
                      unreadable)


NO_DETECTOR = ("does not hold this detector; --eval-only needs best.pt, with args.json of its run "
               "beside it or the run's own flags, and the same classes")


def has_masks(weights: dict[str, Tensor]) -> bool:
    """Is it a Mask R-CNN?"""
    return any(name.startswith("roi_heads.mask_") for name in weights)


HEAD = ("neck", "width", "convs", "anchor", "proposals", "rois", "detections", "smallest",
        "longest")


def description_of(args: SimpleNamespace, state: TrainState) -> dict:
    """The content of model.json. class_ids: of the annotations, one for each class."""
    head = {name: getattr(args, name) for name in HEAD}
    class_ids = getattr(state.val, "class_ids", list(range(1, len(state.classes) + 1)))
    return describe("detector", args, state.classes, args.image_size, MEAN, STD, **head,
                    class_ids=class_ids)


# ---- evaluation ----

@torch.no_grad()
def evaluate(model: FasterRCNN, args: SimpleNamespace, world: Distributed,
             state: TrainState) -> tuple[dict, list[dict]]:
    """Returns (AP, results). AP is over the whole validation set, on any number of processes, and
    has the number of images.

    On rank 0, `results` has all detections in COCO's form: the image_id is the index in the set,
    the category_id the label."""
    training = model.training
    model.eval()
    world.broadcast_buffers(model)
    images, truth, found, missing = [], [], [], []
    for batch, targets, index, broken in state.val_loader:
        missing += broken[broken >= 0].tolist()
        good = [i for i in range(len(batch)) if broken[i] < 0]
        outputs = model([as_float(batch[i], world) for i in good]) if good else []
        for i, output in zip(good, outputs):
            if "masks" in output:
                output["masks"] = output["masks"][:, 0] > 0.5    # (D, H, W), the image's size
            image = int(index[i])
            H, W = batch[i].shape[-2:]
            images.append({"id": image, "height": H, "width": W})
            truth += truth_of(targets[i], image)
            found += results_of(output, image)
    model.train(training)

    left_out(state.val, missing, world)
    images, truth, found = gather_lists((images, truth, found), world)
    found.sort(key=itemgetter("image_id"))                   # the same for any number of processes
    count = world.broadcast_from_rank0(lambda: len(images))
    if not count:
        raise Failed(f"--data {args.data}: no image for validation can be read")
    result = world.broadcast_from_rank0(
        lambda: average_precision(images, truth, found, state.classes, state.with_masks))
    return {**result, "images": count}, found


def gather_lists(lists: tuple[list, ...], world: Distributed) -> tuple[list, ...]:
    """Each list joined over the processes, on rank 0; the other processes keep their own."""
    parts = [lists]
    if world.size > 1:
        parts = [None] * world.size if world.rank == 0 else None
        dist.gather_object(lists, parts, dst=0)
    if world.rank:
        return lists
    joined = []
    for pieces in zip(*parts):
        joined.append(list(itertools.chain.from_iterable(pieces)))
    return tuple(joined)


def kinds(result: dict) -> list[str]:
    """'box', and of Mask R-CNN 'mask'."""
    return [kind for kind in ("box", "mask") if kind in result]


def percent(ap: float) -> str:
    """An AP in per cent; "-" where there is no object, which is marked by -1."""
    return f"{100 * ap:.1f}" if ap >= 0 else "-"


def class_table(result: dict, classes: list[str]) -> str:
    """A line for each class: its AP of boxes, and of masks."""
    names = [printable(name) for name in classes]
    width = max(map(len, ["class", *names]))
    lines = ["class".ljust(width) + "".join(f"{kind + ' AP':>9}" for kind in kinds(result))]
    for name, shown in zip(classes, names):
        values = [percent(result[kind]["per class"][name]) for kind in kinds(result)]
        lines.append(shown.ljust(width) + "".join(f"{value:>9}" for value in values))
    return "\n".join(lines)


def report(result: dict, found: list[dict], args: SimpleNamespace, world: Distributed,
           state: TrainState, **more) -> None:
    """Prints the result, writes result.json, detections.png and, if asked for, predictions.json."""
    world.print0(class_table(result, state.classes))
    for kind in kinds(result):
        names = ("AP", "AP50", "AP75", "S", "M", "L", "any class")
        world.print0(f"{kind}: " + ", ".join(f"{n} {percent(result[kind][n])}" for n in names))
    if world.rank == 0:
        if args.save_predictions:
            save_predictions(found, Path(args.out), state)
        with contextlib.suppress(OSError):                   # a full disk does not end the run
            save_detections(Path(args.out) / "detections.png", args, world, state)
        # last, because a folder with a result.json is refused when the command is given again
        more |= {"weights": args.weights or args.init}
        text = json.dumps({**result, **more}, indent=1) + "\n"
        write_text_atomically(Path(args.out) / "result.json", text)


def save_predictions(found: list[dict], out: Path, state: TrainState) -> None:
    """predictions.json of boxes, predictions-masks.json of masks; ids are those of the annotations.

    They are two files: where there is a `bbox`, pycocotools takes its area for S, M and L."""
    source = state.val
    has_ids = hasattr(source, "class_ids")                   # drawn scenes have none
    image_ids, boxes, masks = {}, [], []
    for one in found:
        image, label = one["image_id"], one["category_id"]
        if image not in image_ids:
            image_ids[image] = source.record(image)["id"] if has_ids else image
        named = {"image_id": image_ids[image], "score": one["score"],
                 "category_id": source.class_ids[label - 1] if has_ids else label}
        boxes.append(named | {"bbox": one["bbox"]})
        if "segmentation" in one:
            masks.append(named | {"segmentation": one["segmentation"]})
    write_text_atomically(out / "predictions.json", json.dumps(boxes) + "\n")
    if state.with_masks:
        write_text_atomically(out / "predictions-masks.json", json.dumps(masks) + "\n")


@torch.no_grad()
def save_detections(file: Path, args: SimpleNamespace, world: Distributed,
                    state: TrainState) -> None:
    """Six images for validation, evenly spaced: image | truth | prediction (scores above 0.5)."""
    samples, model = state.val_loader.dataset, state.model.eval()
    columns = {"image": [], "truth": [], "prediction": []}
    for k in evenly_spaced(len(samples), 6):
        (image, truth), *_ = samples[0, k]
        [found] = model([as_float(image, world)])
        found = sure_of(found, 0.5)
        image = image.as_subclass(Tensor)
        for title, objects in zip(columns, ({}, truth, found)):
            columns[title].append(drawn(image, objects, state.classes))
    columns = {title: same_size(pictures) for title, pictures in columns.items()}
    save_sheet(file, columns)


def sure_of(found: dict[str, Tensor], least: float) -> dict[str, Tensor]:
    """What a detector found with a score above `least`, on the CPU."""
    sure = found["scores"] > least
    return {name: value[sure].cpu() for name, value in found.items()}


def drawn(image: Tensor, objects: dict[str, Tensor], classes: list[str], side: int = 320) -> Tensor:
    """uint8 (3, H, W), its objects drawn on it -> (3, h, w), 0 to 1; the longer side is `side`."""
    H, W = image.shape[1:]
    h, w = (max(1, round(n * side / max(H, W))) for n in (H, W))
    picture = tvf.resize(image, [h, w], antialias=True)
    labels = objects["labels"].tolist() if objects else []
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    if labels and "masks" in objects:
        masks = objects["masks"].as_subclass(Tensor).float().view(-1, 1, H, W)
        masks = F.interpolate(masks, (h, w), mode="bilinear")[:, 0] > 0.5
        for mask, colour in zip(masks, colours):             # one by one: overlaps are not black
            picture = draw_segmentation_masks(picture, mask, 0.5, colour)
    names = [printable(classes[label - 1]) for label in labels]
    if "scores" in objects:
        scores = objects["scores"].tolist()
        names = [f"{name} {100 * score:.0f}" for name, score in zip(names, scores)]

    page = tvf.to_pil_image(picture)
    font, line = ImageFont.load_default(max(11, side // 60)), max(2, side // 300)
    draw = ImageDraw.Draw(page)
    boxes = objects["boxes"].tolist() if objects else []
    for (x1, y1, x2, y2), name, colour in zip(boxes, names, colours):
        x1, y1, x2, y2 = x1 * w / W, y1 * h / H, x2 * w / W, y2 * h / H
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour,
                       width=line)
        draw.text((x1 + 3, y1 + 1), name, "white", font, stroke_width=1, stroke_fill=colour)
    return tvf.to_dtype(tvf.to_image(page).as_subclass(Tensor), torch.float32, scale=True)


COLOURS = ("#d43f3a", "#2e86de", "#27ae60", "#f39c12", "#8e44ad", "#16a2b8", "#e056fd", "#b7950b",
           "#ff7979", "#34495e")


def main(argv: list[str] | None = None) -> None:
    command_line("detect.py", parse, train, argv)


# ---- flags: name -> (default, kind, help); a recipe overrides the default, what is typed overrides
# both ----

UP_TO_100_000 = number(int, 1, 100_000)
SIDE = number(int, 32, MAX_SIDE)
FLAGS = {
    "data": {
        "data": (None, path("DIR"),
                 "a folder in COCO's or Pascal VOC's layout, or shapes (drawn scenes); "
                 "none: the demo"),
        "split_val": (None, checked("NAME", check_part),
                      "the part to evaluate on, such as test (val; VOC without val: test)"),
        "image_size": (800, SIDE, "shorter side at evaluation; ViT: of the padded square"),
        "smallest": (None, SIDE, "shorter side in training: from this to --image-size, in steps of "
                     "32 (4/5 of it)"),
        "longest": (None, SIDE, "largest longer side (5/3 of --image-size)"),
        "workers": DATA_FLAGS["workers"],
        "max_bad": DATA_FLAGS["max_bad"]},
    "model": {
        **finetune.FLAGS["model"],
        "stem": STEM,
        "neck": ("fpn", ("fpn", "c4"), "feature pyramid, or ResNet's stage 4 as the head (50 "
                 "layers or more)"),
        "width": (256, number(int, 1, 4096), "channels of the pyramid and of its heads"),
        "convs": (4, number(int, 1, 100), "convolutions in the heads of boxes and of masks"),
        "anchor": (32, number(int, 1, MAX_SIDE),
                   "side of the smallest of five anchors, px, each twice the last"),
        "proposals": (1000, UP_TO_100_000, "proposed regions per image for the second stage"),
        "rois": (512, UP_TO_100_000, "proposals per image that the heads are trained on"),
        "detections": (100, UP_TO_100_000, "largest number of detections per image")},
    "optimiser": {
        "recipe": (None, tuple(RECIPES),
                   f"the table below (drawn scenes: shapes; under {FEW_IMAGES:,} images: small; "
                   f"a ViT: vit; else 1x)"),
        **OPTIM_FLAGS},
    "run": {
        **{name: flag for name, flag in RUN_FLAGS.items() if name != "compile"},
        "eval_every": (1, number(int, 1, MAX_EPOCHS),
                       "epochs between evaluations; the last epoch is always evaluated"),
        "eval_only": (False, SWITCH, "evaluate --weights best.pt of a run, and stop"),
        "save_predictions": (False, SWITCH,
                             "write predictions.json, and predictions-masks.json: COCO's results")},
}
DETECTOR = ["recipe", "image_size", "longest", "neck", "width", "convs", "anchor", "proposals",
            "detections"]
DEFAULTS = {**defaults(FLAGS), "recipe_batch": 16, "milestones": (8 / 12, 11 / 12),
            "warmup_epochs": None, "compile": False}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe; `given` holds what was typed. Raises ValueError for a value that is
    off."""
    parser = Parser("detect.py", "%(prog)s --weights FILE --data DIR [options]", __doc__, FLAGS,
                    RECIPES)
    given = vars(parser.parse_args(argv))
    check_resumes_training(given, trains="eval_only" not in given)
    about = dict(program="detect.py", given=given, typed=sorted(given))
    demo = dict(DEMO) if not {"data", "eval_only"} & set(given) else {}
    if demo and not {"weights", "init", "arch"} & set(given):
        demo |= {"weights": DEMO_WEIGHTS} if Path(DEMO_WEIGHTS).is_file() else {"init": "scratch"}
    # as pre-trained; to evaluate, the whole detector
    names = ["arch", "patch_size", "window", "stem"]
    names += DETECTOR if "eval_only" in given else []
    weights = given.get("weights", demo.get("weights"))
    of_weights = remembered(weights, FLAGS, names)
    if "image_size" in given:                                # the longer side follows it
        of_weights.pop("longest", None)
    known = {**demo, **of_weights, **given}
    recipe = known.get("recipe") or default_recipe(known.get("data"), known.get("arch"))
    known = {**DEFAULTS, **RECIPES[recipe], **known, "recipe": recipe}
    args = SimpleNamespace(**known, **about, demo=bool(demo))
    if is_remembered(given):                                 # the rest is in the checkpoint
        return args
    if args.data is None:
        raise ValueError("--data is missing: a folder in COCO's or Pascal VOC's layout, or shapes")
    if (args.weights is None) == (args.init is None):
        raise ValueError("give --weights FILE, or --init scratch to train from random weights")
    if args.eval_only and args.init:
        raise ValueError("--eval-only: needs --weights, best.pt of a run")
    if args.arch is None:
        raise ValueError("--arch is missing: no args.json beside the weights names it; try --arch "
                         "resnet50")
    return with_sides(args)


def with_sides(args: SimpleNamespace) -> SimpleNamespace:
    """The settings with `smallest` and `longest`. If they are neither typed nor in the recipe, they
    follow --image-size as released: 800 px gives 640 to 800, and at most 1333 for the longer side.

    Raises ValueError if they do not fit."""
    size = args.image_size
    sides = dict(smallest=args.smallest, longest=args.longest)
    if "image_size" in args.given:
        for name in {*sides} - {*args.typed, *args.given}:
            sides[name] = RECIPES[args.recipe].get(name)
    if "longest" in args.typed and args.longest < size:
        raise ValueError(f"--longest {args.longest}: is below --image-size {size}, the shorter "
                         f"side; choose a smaller --image-size, too")
    if "smallest" in args.typed and args.smallest > size:
        raise ValueError(f"--smallest {args.smallest}: is above --image-size {size}; choose a "
                         f"smaller one")
    smallest = min(sides["smallest"] or round(size * 0.8), size)
    longest = max(sides["longest"] or size * 5 // 3, size)
    return SimpleNamespace(**{**vars(args), "smallest": smallest, "longest": longest})


def default_recipe(data: str | None, arch: str | None) -> str:
    if data == "shapes":
        return "shapes"
    if data and has_few_images(Path(data)):
        return "small"
    return "vit" if arch and get_family(arch).name == "vit" else "1x"


if __name__ == "__main__":
    main()
