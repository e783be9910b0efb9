"""Detection: Mask R-CNN on pre-trained weights. On drawn scenes, or a folder in COCO's format; AP as COCO counts it.

    python extras/detect.py                                                       the built-in demo, minutes on a CPU
    torchrun --nproc_per_node=8 extras/detect.py --weights backbone.pt --data /path/to/coco          FPN, 12 epochs
    torchrun --nproc_per_node=8 extras/detect.py --weights backbone.pt --data /path/to/coco --recipe c4_2x

Recipes: RECIPES below, after the released configs. Leaves in --out: args.json, log.jsonl, checkpoint.pt (the last
state), best.pt (the detector of the best epoch), result.json (AP of boxes and masks, per class too), loss.png,
detections.png (image | truth | prediction).
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
from data import (every_image_once, ImageDataset, make_loader, NAMED, ResumableBatchSampler, seed_for)
from engine.command import Failed, Distributed, command_line
from engine.files import load_checked, printable, write_text_atomically
from engine.flags import (DATA_FLAGS, MAX_EPOCHS, MAX_SIDE, RUN_FLAGS, SWITCH, Parser, defaults,
                          number, path, remembered)
from engine.images import UnreadableImages
from engine.checkpointer import Checkpointer, StepPlan, make_folder, open_run
from engine.pictures import save_sheet
from engine.weights import load_backbone, summary_of
from extras.coco import Coco, judge, summarise
from extras.dense import (OPTIM_FLAGS, Scenes, left_out, listed, optimizer_for, plan,
                          rate, some_usable, wrapped)
from extras.mask_rcnn import detector
from model import build_encoder, get_family

# ---- recipes: every value has a flag of the same name, but for the milestones; lr is per 16 images of a step ----

SGD = dict(optimizer="sgd", lr=0.02, weight_decay=1e-4, schedule="steps", epochs=12, milestones=(8 / 12, 11 / 12))
RECIPES = {
    "1x":     dict(SGD, warmup=500),                         # a folder in COCO's format, any backbone but a ViT
    "c4_2x":  dict(SGD, warmup=1000, epochs=24, milestones=(16 / 24, 22 / 24), neck="c4"),   # the paper's, for ResNet
    "vit":    dict(SGD, warmup=500, milestones=(9 / 12, 11 / 12), optimizer="adamw", lr=3e-4, weight_decay=0.05,
                   drop_path=0.2, image_size=512),
    # drawn scenes of 128 px: small anchors, narrow heads
    "shapes": dict(optimizer="adamw", lr=4e-3, weight_decay=0.05, schedule="cosine", global_batch=8, epochs=0.4,
                   warmup=50, eval_every=10, image_size=128, smallest=128, longest=128, anchor=8, width=64,
                   convs=2, proposals=100, rois=64, detections=20),
}
DEMO = dict(data="shapes", arch="resnet18", log_every=5)
DEMO_WEIGHTS = "runs/shapes-resnet18/backbone.pt"            # of the demo of pretrain.py

# ---- one step ----

@dataclass
class Run:
    """What a step and an evaluation work on."""
    steps: StepPlan | None                                      # None: evaluation only
    classes: list[str]                                       # without the ground
    loader: DataLoader | None
    val_loader: DataLoader
    model: MaskRCNN                                          # the weights, under their plain names
    net: nn.Module                                           # what a step calls: the model, wrapped by DDP if need be
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    broken: UnreadableImages


def train_step(step: int, batches, args: SimpleNamespace, world: Distributed, run: Run) -> dict[str, Tensor]:
    """One optimiser step; returns this process's mean losses, on the device. Randomness comes from (seed, step)."""
    torch.manual_seed(seed_for(args.seed, step, world.rank))     # stochastic depth, sizes, samples of anchors, regions
    record = {}
    for part in range(args.accum):
        images, targets, _, broken = next(batches)
        run.broken.note(broken)
        images = [as_float(image, world) for image in images]    # (3, H, W) each
        targets = [{name: target[name].as_subclass(Tensor).to(world.device) for name in ("boxes", "labels", "masks")}
                   for target in targets]
        sync_now = part == args.accum - 1 or world.size == 1     # processes average their gradients once a step
        with contextlib.nullcontext() if sync_now else run.net.no_sync():
            losses = run.net(images, targets)                # of proposals: 2, of their boxes and classes: 2, masks: 1
            losses = {"loss": sum(losses.values()), **losses}
            run.scaler.scale(losses["loss"] / args.accum).backward()
        record = {name: record.get(name, 0) + value.detach() / args.accum for name, value in losses.items()}
    if args.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad)
    run.scaler.step(run.optimizer)                           # not made if a gradient is not finite
    run.scaler.update(None if args.amp == "fp16" else 1.0)   # the scale of fp16 adapts, else it stays 1
    run.optimizer.zero_grad(set_to_none=True)
    return record


def as_float(image: Tensor, world: Distributed) -> Tensor:
    """uint8 (3, H, W) -> float32 in [0, 1] on the device; the detector normalises by itself."""
    return image.as_subclass(Tensor).to(world.device, non_blocking=world.on_cuda).float().div_(255)


# ---- the run ----

def train(args: SimpleNamespace, world: Distributed) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as Checkpointer does."""
    world.set_device(args.device)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group(world.backend, store=world.rendezvous_store(), rank=world.rank, world_size=world.size)
    kind = "eval" if args.eval_only else args.recipe + ("-scratch" if args.init else "")
    name = f"{Path(args.data or '').resolve().name}-{args.arch}-detect-{kind}"
    args, saved = open_run(args, world, own=DEFAULTS, name=name, flags=FLAGS)
    args.amp = args.amp or world.default_amp()
    if args.demo:
        hint = "" if Path(DEMO_WEIGHTS).is_file() else f"; python pretrain.py makes {DEMO_WEIGHTS}"
        world.print0(f"no --data given: running the demo on drawn scenes, from {args.weights or 'random weights'}{hint}")
    run = prepare(args, world, saved)
    world.print0(f"{args.arch}, {args.neck}, {args.init or args.weights}; {args.data}: {len(run.classes)} classes, "
              f"{len(run.val_loader.dataset)} images for validation\n"
              f"{'evaluation only' if args.eval_only else f'recipe {args.recipe}'}; {world.size} x "
              f"{world.device.type}, amp {args.amp}; writing {args.out}/")
    if args.eval_only:
        make_folder(args, world, 0)
        return report(evaluate(run.model, args, world, run), args, world, run)

    steps, peak, best, result = run.steps, args.lr * run.steps.global_batch / args.lr_batch, finetune.BestEpoch(AP=-2.0), {}
    keep = dict(model=run.model, optimizer=run.optimizer, scaler=run.scaler, broken=run.broken, best=best)
    checkpointer = Checkpointer(args, world, steps, keep, saved)
    world.print0(f"{len(run.loader.dataset)} images, global batch {steps.global_batch}, peak lr {peak:.2e}, "
              f"{args.epochs:g} x {steps.per_epoch} steps")

    def evaluate_after(done: int) -> None:
        """At the end of every --eval-every epochs, and of the run."""
        epoch, inside = divmod(done, steps.per_epoch)
        if done == 0 or done < steps.total and (inside or epoch % args.eval_every):
            return
        result.update(evaluate(run.model, args, world, run))
        world.print0(f"epoch {done / steps.per_epoch:g}: box {percent(result['box'], 'AP')}, "
                  f"mask {percent(result['mask'], 'AP')}")
        checkpointer.keep_best(best, "AP", result["box"]["AP"], run.model.state_dict())

    run.model.train()
    batches = iter(run.loader)
    with checkpointer:
        evaluate_after(steps.start)                          # a checkpoint is written before its evaluation
        for step in checkpointer.steps():
            for group in run.optimizer.param_groups:
                group["lr"] = rate(step, steps, peak * group["scale"], args)
            record = train_step(step, batches, args, world, run)
            checkpointer.after(step, record)                      # undoes a non-finite step, logs, saves, stops on a signal
            evaluate_after(step + 1)
    checkpointer.finish("best.pt")                                # raises Failed if a file that was promised is not there
    report(result, args, world, run, best_AP=best["AP"], best_epoch=best.get("epoch"))


def open_scenes(args: SimpleNamespace, split: str):
    """--data -> images with their objects: len(), .read(index) -> (image, {boxes, labels, masks, ...}), .classes."""
    if args.data == "shapes":
        return Scenes(split, (args.image_size, args.image_size))
    if args.data in NAMED or not Path(args.data).is_dir():
        what = "has no boxes" if args.data in NAMED else "no such folder"
        raise ValueError(f"--data {args.data}: {what}; give a folder in COCO's format, or shapes")
    longest = args.image_size if get_family(args.arch).name == "vit" else args.longest
    return Coco(Path(args.data), split, longest)


def prepare(args: SimpleNamespace, world: Distributed, saved: dict | None) -> Run:
    """Data, model, weights and optimiser. Raises ValueError if they do not fit."""
    size = args.image_size                                   # as released: 640 to 800, at most 1333
    args.smallest = min(args.smallest or round(size * 0.8), size)
    args.longest = max(args.longest or size * 5 // 3, size)
    val = open_scenes(args, "val")
    source = val if args.eval_only else open_scenes(args, "train")
    some_usable(val, "images for validation", args, world)
    if not args.eval_only:
        some_usable(source, "images for training", args, world)
    if source.classes != val.classes:
        raise ValueError(f"--data {args.data}: the annotations of train and val list different classes")
    classes, batches = val.classes[args.data == "shapes":], []           # scenes count the ground among them
    steps = None if args.eval_only else plan(args, world, len(source), saved)
    if steps:
        batches = ResumableBatchSampler(len(source), steps.batch, args.accum, world.size, world.rank, args.seed, steps.start,
                          steps.total)
    flip = v2.RandomHorizontalFlip(0.5)                      # image, boxes and masks together
    loader = make_loader(ImageDataset(source, flip, args.seed), batches, args.workers, world, listed) if steps else None
    val_once = every_image_once(len(val), 8 if size < 256 else 1, world)
    val_loader = make_loader(ImageDataset(val, nn.Identity(), args.seed), val_once, args.workers, world, listed)

    torch.manual_seed(seed_for(args.seed))                   # every process starts from the same heads
    encoder = build_encoder(args.arch, size, args.drop_path, args.patch_size, args.window,
                            args.stem)
    if args.weights and not saved and not args.eval_only:
        world.print0(f"{args.weights}: " + summary_of(load_backbone(encoder, args.weights)))
    model = detector(encoder, len(classes) + 1, args, world)
    if args.eval_only:
        load_detector(model, args.weights)
    model, net = wrapped(model, args, world)
    optimizer = optimizer_for(model, args, "backbone.maps.encoder.backbone.")
    # without fp16 the scale stays 1, and the scaler does one thing: it skips a step with a gradient that is not finite
    scaler = torch.amp.GradScaler(world.device.type, **({} if args.amp == "fp16" else dict(init_scale=1.0)))
    broken = UnreadableImages(source, args.max_bad, args.out)
    return Run(steps, classes, loader, val_loader, model, net, optimizer, scaler, broken)


def load_detector(model: MaskRCNN, file: str) -> None:
    """best.pt of a run into the same detector. Raises ValueError if it is none, or does not fit."""
    try:
        model.load_state_dict(load_checked(file))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except Exception:                                        # torch.load has no one type for a broken file
        raise ValueError(f"{file}: does not hold this detector; --eval-only needs best.pt, with args.json of its run "
                         f"beside it or the run's own flags, and the same classes") from None


# ---- evaluation ----

def truth_of(target: dict[str, Tensor]) -> dict:
    """Objects as `judge` takes them; those of drawn scenes have no crowds, and the area of their masks."""
    masks = target["masks"].bool()
    more = dict(crowd=torch.zeros(len(masks), dtype=torch.bool), area=masks.sum((1, 2)).double())
    return {name: value.numpy() for name, value in {**more, **target, "masks": masks}.items()}


@torch.no_grad()
def evaluate(model: MaskRCNN, args: SimpleNamespace, world: Distributed, run: Run) -> dict:
    """Exact AP over the whole validation set, on any number of processes: see `summarise`; and the number of images."""
    training, records, missing = model.training, {}, []
    model.eval()
    world.broadcast_buffers(model)
    for images, targets, index, broken in run.val_loader:
        missing += broken[broken >= 0].tolist()
        good = [i for i in range(len(images)) if broken[i] < 0]
        outputs = model([as_float(images[i], world) for i in good]) if good else []
        for i, found in zip(good, outputs):
            found["masks"] = found["masks"][:, 0] > 0.5      # (D, H, W) at the image's own size
            found = {name: value.cpu().numpy() for name, value in found.items()}
            records[int(index[i])] = judge(found, truth_of(targets[i]))
    model.train(training)
    parts = [records] * world.size
    if world.size > 1:                                       # AP is not the mean of the processes' APs
        dist.all_gather_object(parts, parts[0])
    records = {index: record for part in parts for index, record in part.items()}
    left_out(run.val_loader.dataset.source, missing, world)
    if not records:
        raise Failed(f"--data {args.data}: no image for validation can be read")
    return {**summarise([records[index] for index in sorted(records)], run.classes), "images": len(records)}


def percent(ap: dict, *names: str) -> str:
    """The named APs in per cent; "-" where there is no object, which `summarise` marks by -1."""
    told = {name: f"{100 * ap[name]:.1f}" if ap[name] >= 0 else "-" for name in names}
    return ", ".join(f"{name} {value}" for name, value in told.items())


def report(result: dict, args: SimpleNamespace, world: Distributed, run: Run, **more) -> None:
    """Says the result, writes result.json and detections.png."""
    for kind in ("box", "mask"):
        world.print0(f"{kind}: " + percent(result[kind], "AP", "AP50", "AP75", "S", "M", "L", "any class"))
    if world.rank == 0:
        more |= {"weights": args.weights or args.init}
        write_text_atomically(Path(args.out) / "result.json", json.dumps({**result, **more}, indent=1) + "\n")
        save_detections(Path(args.out) / "detections.png", args, world, run)


@torch.no_grad()
def save_detections(file: Path, args: SimpleNamespace, world: Distributed, run: Run, side: int = 256) -> None:
    """The first six images for validation: image | truth | prediction, of scores above a half."""
    samples, model, columns = run.val_loader.dataset, run.model.eval(), {"image": [], "truth": [], "prediction": []}
    for k in range(min(6, len(samples))):
        (image, truth), *_ = samples[0, k]
        found = {name: value.cpu() for name, value in model([as_float(image, world)])[0].items()}
        sure = found.pop("scores") > 0.5
        found = {name: value[sure] for name, value in found.items()}
        H, W = image.shape[1:]
        h, w = (max(1, round(n * side / max(H, W))) for n in (H, W))
        image = tvf.resize(image.as_subclass(Tensor), [h, w], antialias=True)
        for title, objects in zip(columns, (None, truth, found)):
            drawn = image
            if objects is not None and len(objects["boxes"]):
                masks = objects["masks"].as_subclass(Tensor).float().view(-1, 1, H, W)
                masks = F.interpolate(masks, (h, w), mode="bilinear")[:, 0] > 0.5
                boxes = objects["boxes"].as_subclass(Tensor).float() * torch.tensor([w / W, h / H] * 2)
                labels = objects["labels"].tolist()
                colours = [COLOURS[label % len(COLOURS)] for label in labels]
                drawn = draw_segmentation_masks(image, masks, 0.5, colours)
                names = [printable(run.classes[label - 1]) for label in labels]
                drawn = draw_bounding_boxes(drawn, boxes, names, colours, label_colors="white")
            columns[title].append(F.pad(drawn.float() / 255, (0, side - w, 0, side - h), value=1))
    save_sheet(file, {title: torch.stack(images) for title, images in columns.items()})


COLOURS = ("#d43f3a", "#2e86de", "#27ae60", "#f39c12", "#8e44ad", "#16a2b8", "#e056fd", "#b7950b", "#ff7979", "#34495e")


def main(argv: list[str] | None = None) -> None:
    command_line("detect.py", parse, train, argv)


# ---- flags: name -> (default, kind, help); a recipe overrides the default, what is typed overrides both ----

count, side = number(int, 1, 100_000), number(int, 32, MAX_SIDE)
FLAGS = {
    "data": {
        "data": (None, path("DIR"), "a folder in COCO's format, or shapes (drawn scenes); none: the demo"),
        "image_size": (800, side, "shorter side at evaluation; ViT: of the padded square"),
        "smallest": (None, side, "shorter side in training: from this to --image-size, in steps of 32 (4/5 of it)"),
        "longest": (None, side, "most for the longer side (5/3 of --image-size)"),
        **{name: flag for name, flag in DATA_FLAGS.items() if name in ("workers", "max_bad")}},
    "model": {
        **finetune.FLAGS["model"],
        "neck": ("fpn", ("fpn", "c4"), "feature pyramid, or ResNet's stage 4 as the head (50 layers or more)"),
        "width": (256, number(int, 1, 4096), "channels of the pyramid and of its heads"),
        "convs": (4, number(int, 1, 100), "convolutions in the heads of boxes and of masks"),
        "anchor": (32, number(int, 1, MAX_SIDE),
                   "side of the smallest of five anchors, px, each twice the last"),
        "proposals": (1000, count, "regions per image for the second stage"),
        "rois": (512, count, "of them trained on, per image"),
        "detections": (100, count, "most per image")},
    "optimiser": {
        "recipe": (None, tuple(RECIPES), "the table below (drawn scenes: shapes, a ViT: vit, else 1x)"),
        **OPTIM_FLAGS},
    "run": {
        **{name: flag for name, flag in RUN_FLAGS.items() if name != "compile"},
        "eval_every": (1, number(int, 1, MAX_EPOCHS),
                       "epochs between evaluations; the last epoch is always evaluated"),
        "eval_only": (False, SWITCH, "evaluate --weights best.pt of a run, and stop")},
}
DETECTOR = ["recipe", "image_size", "longest", "neck", "width", "convs", "anchor", "proposals", "detections"]
DEFAULTS = {**defaults(FLAGS), "global_batch": 16, "milestones": (), "warmup_epochs": None, "compile": False}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe; `given` holds what was typed. Raises ValueError for a value that is off."""
    parser = Parser("detect.py", "%(prog)s --weights FILE --data DIR [options]", __doc__, FLAGS, RECIPES)
    given = vars(parser.parse_args(argv))
    demo = dict(DEMO) if not {"data", "eval_only"} & set(given) else {}
    if demo and not {"weights", "init", "arch"} & set(given):
        demo |= {"weights": DEMO_WEIGHTS} if Path(DEMO_WEIGHTS).is_file() else {"init": "scratch"}
    names = ["arch", "patch_size", "window", "stem"]                 # as pre-trained; to evaluate, the whole detector
    names += DETECTOR if "eval_only" in given else []
    known = {**demo, **remembered(given.get("weights", demo.get("weights")), parser, names), **given}
    kind = "vit" if known.get("arch") and get_family(known["arch"]).name == "vit" else "1x"
    recipe = known.get("recipe") or ("shapes" if known.get("data") == "shapes" else kind)
    known = {**DEFAULTS, **RECIPES[recipe], **known, "recipe": recipe}
    args = SimpleNamespace(**known, program="detect.py", given=given, demo=bool(demo))
    if args.resume and args.out:                             # the rest is remembered
        return args
    if args.data is None:
        raise ValueError("--data is missing: a folder in COCO's format, or shapes")
    if (args.weights is None) == (args.init is None):
        raise ValueError("give --weights FILE, or --init scratch to train from random weights")
    if args.eval_only and args.init:
        raise ValueError("--eval-only: needs --weights, best.pt of a run")
    if args.arch is None:
        raise ValueError("--arch is missing: no args.json beside the weights names it; try --arch resnet50")
    return args


if __name__ == "__main__":
    main()
