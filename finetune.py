"""Fine-tuning: what pre-trained weights bring on a labelled set. Also probes and features.

    python finetune.py --weights runs/shapes-resnet18/backbone.pt --data shapes --labels 0.05
    torchrun --nproc_per_node=8 finetune.py --weights backbone.pt --data IMAGENET --recipe rsb_a2

In the order of this file: the recipes, one training step, the loop, the evaluation, the set-up,
the flags. A run writes to --out: args.json, log.jsonl, loss.png, checkpoint.pt (the last state),
best.pt (the best epoch's weights under torchvision's names, head included), result.json
(accuracies, also per class) and confusion.png. The recipe `features` writes features.npz.
"""

import contextlib
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from data import (NAMED, ImageDataset, ResumableBatchSampler, augment, eval_transform,
                  every_image_once, make_loader, normalise, open_images, seed_for, some_labels)
from engine.checkpointer import Checkpointer, StepPlan, make_folder, open_run
from engine.command import Distributed, command_line
from engine.flags import (AMP, DATA_FLAGS, MAX_EPOCHS, RUN_FLAGS, SIDES, STAGE_FLAGS, SWITCH,
                          Parser, checked, defaults, format_size, height_width, number, path,
                          remembered)
from engine.images import UnreadableImages, name_some
from engine.optim import Lamb, MovingAverage, layer_groups, lr_at
from engine.results import report, score, write_features
from engine.weights import load_backbone, load_head, summary_of
from model import STEMS, Classifier, build_encoder, get_family, settings_for_size

# ---- recipes. Every value has a flag of the same name; lr is per `lr_batch` images of a step ----

LONG = dict(global_batch=None, eval_every=1, crop_min=0.08)
RSB = dict(LONG, optimizer="lamb", lr_batch=2048, weight_decay=0.02, schedule="cosine-by-epoch",
           warmup_epochs=5, loss="bce", mixup=0.1, cutmix=1.0, test_size=224, test_crop=0.95)
STRONG = dict(LONG, image_size=224, warmup_epochs=20, mixup=0.8, cutmix=1.0, randaug=9.0,
              erasing=0.25)
RECIPES = {
    # few labels, a short run, any backbone
    "default": {},
    # a hundred to a few thousand labels: longer and more regularised, so that it overfits less
    "small": dict(epochs=60, crop_min=0.2, cutmix=1.0),
    "rsb_a3": dict(RSB, image_size=160, epochs=100, lr=8e-3, randaug=6.0),
    "rsb_a2": dict(RSB, image_size=224, epochs=300, lr=5e-3, randaug=7.0, ema=0.9999, repeats=3,
                   drop_path=0.05),
    # the lr is SimMIM's; the released ViT config has four times as much
    "vit": dict(STRONG, epochs=100, lr=1.25e-3, lr_batch=512, layer_decay=0.65, clip_grad=5.0,
                ema=0.99996, drop_path=0.1),
    "convnext": dict(STRONG, epochs=300, lr=4e-3, lr_batch=4096, ema=0.9999, drop_path=0.4,
                     schedule="cosine-from-0", warmup_epochs=5),
    "linear": dict(LONG, frozen=True, epochs=100, optimizer="sgd", lr=30.0, lr_batch=256,
                   weight_decay=0.0, schedule="probe", warmup_epochs=0, smoothing=0.0),
    "knn": dict(frozen=True),
    "features": dict(frozen=True),
}
EXCEPTIONS = {  # as released: (recipe, arch) -> what differs
    ("rsb_a2", "resnet101"): dict(ema=0.0, drop_path=0.1),
    ("rsb_a2", "resnet152"): dict(ema=0.0, drop_path=0.15),
    ("rsb_a2", "resnet200"): dict(ema=0.0, drop_path=0.2),
    # 8e-3 at a global batch of 1024
    ("vit", "deit_small"): dict(lr=4e-3, warmup_epochs=5, ema=0.0),
    ("vit", "vit_small"): dict(ema=0.0),
    ("vit", "vit_large"): dict(repeats=3),
    ("convnext", "convnext_tiny"): dict(epochs=400, lr=4e-4, weight_decay=0.01, layer_decay=0.7,
                                        drop_path=0.1),
    ("convnext", "convnext_base"): dict(drop_path=0.5),
}
# The released linear probe is for ImageNet. Its lr of 30 is too large for few images: on 300 the
# loss rises above 200. AdamW with a warm-up is stable for small and for large features. Its lr is
# the peak at every batch size.
LINEAR_SMALL = dict(optimizer="adamw", lr=1e-2, schedule="cosine", warmup_epochs=None)
FEW_IMAGES = 100_000


# ---- one training step ----

class BestEpoch(dict):
    """The best epoch so far: its accuracy and its number. A dict that a checkpoint can hold."""
    state_dict, load_state_dict = dict.copy, dict.update


@dataclass
class TrainState:
    """What a step and an evaluation work on."""
    plan: StepPlan
    classes: list[str]
    loader: DataLoader
    labels: Tensor                                           # (N,) of the training images
    val_loader: DataLoader
    val_labels: Tensor
    model: Classifier                                        # the weights, under their own names
    net: nn.Module                                           # model, inside DDP if there is more
    optimizer: torch.optim.Optimizer                         # than one process
    scaler: torch.amp.GradScaler
    memory_format: torch.memory_format
    unreadable: UnreadableImages
    ema: MovingAverage | None

    @property
    def evaluated(self) -> Classifier:
        """The model that is evaluated and kept: the moving average if there is one."""
        return self.ema.module if self.ema else self.model


def train_step(step: int, batches, args: SimpleNamespace, world: Distributed,
               state: TrainState) -> dict[str, Tensor]:
    """One optimiser step. Returns the loss of this process, on the device.

    All randomness comes from (seed, step): stochastic depth, erasing, mixup, cutmix."""
    torch.manual_seed(seed_for(args.seed, step, world.rank))
    total = 0.0
    for i in range(args.accum):                              # forward passes
        images, index, broken = next(batches)
        state.unreadable.note(broken)
        images = erase(normalise(images, world.device), args.erasing)        # (B, 3, H, W)
        labels = state.labels[index].to(world.device, non_blocking=world.on_cuda)        # (B,)
        images, targets = mix_batch(images, labels, len(state.classes), args.mixup, args.cutmix)
        images = images.contiguous(memory_format=state.memory_format)
        is_last = i == args.accum - 1
        average_gradients = is_last or world.size == 1       # over the processes, once a step
        with contextlib.nullcontext() if average_gradients else state.net.no_sync():
            with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
                logits = state.net(images)                   # (B, classes)
            loss = class_loss(logits.float(), targets, args.loss, args.smoothing)
            state.scaler.scale(loss / args.accum).backward()
        total = total + loss.detach() / args.accum

    if args.clip_grad:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), args.clip_grad)
    state.scaler.step(state.optimizer)                       # skipped if a gradient is not finite
    state.scaler.update(None if args.amp == "fp16" else 1.0)                 # adapts for fp16 only
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema:
        state.ema.update_parameters(state.model)
    return {"loss": total}


def mix_batch(images: Tensor, labels: Tensor, classes: int, mixup: float,
              cutmix: float) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W), (B,) -> mixed images, targets (B, classes) = lam onehot(a) + (1-lam) onehot(b).

    With both alphas: mixup or cutmix with even odds per batch. cutmix's lam is the share of the
    area that was pasted."""
    choices = []
    for mix, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)):
        if alpha:
            choices.append(mix(alpha=alpha, num_classes=classes))
    if not choices:
        return images, F.one_hot(labels, classes).float()
    return choices[int(torch.randint(len(choices), ()))](images, labels)


def class_loss(logits: Tensor, targets: Tensor, loss: str, smoothing: float) -> Tensor:
    """logits, targets (B, classes) -> scalar.

    'ce'   cross-entropy with label smoothing
    'bce'  binary cross-entropy, the mean over classes and images as in the RSB paper and timm (the
           released code sums over classes)"""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def erase(images: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020) of normalised images (B, 3, H, W): a box of noise."""
    if not probability:
        return images
    one = v2.RandomErasing(probability, value="random")
    return torch.stack([one(image) for image in images])


# ---- the loop ----

def train(args: SimpleNamespace, world: Distributed) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as
    Checkpointer does."""
    args, checkpoint = start(args, world)
    state = prepare(args, world, checkpoint)
    print_start(args, world, state)
    if not is_training(args):
        evaluate_only(args, world, state)
        return

    plan = state.plan
    peak = args.lr * plan.global_batch / args.lr_batch
    best = BestEpoch(top1=-1.0)
    saved = dict(model=state.model, optimizer=state.optimizer, scaler=state.scaler,
                 broken=state.unreadable, best=best)
    if state.ema:
        saved["ema"] = state.ema
    checkpointer = Checkpointer(args, world, plan, saved, checkpoint)
    world.print0(f"global batch {plan.global_batch}, peak lr {peak:.2e}, "
                 f"{args.epochs:g} x {plan.per_epoch} steps")

    batches = iter(state.loader)
    state.model.train()
    with checkpointer:
        # a checkpoint is written before the evaluation of its step
        result = evaluate_epoch(plan.start, args, world, state, best, checkpointer)
        for step in checkpointer.steps():
            for group in state.optimizer.param_groups:
                group["lr"] = lr_at(step, plan.total, plan.warmup, peak * group["scale"],
                                    args.min_lr, args.schedule, plan.per_epoch)
            record = train_step(step, batches, args, world, state)
            checkpointer.after(step, record)                 # logs, saves, stops on a signal
            result = evaluate_epoch(step + 1, args, world, state, best, checkpointer)
    checkpointer.finish("best.pt")                           # raises Failed if a file is missing
    report(result, args, world, state, best_top1=best["top1"], best_epoch=best["epoch"])
    checkpointer.board.add_picture("confusion", checkpointer.out / "confusion.png", plan.total)
    world.print0(f"done: {args.out}/best.pt holds the weights of the best epoch\n"
                 f"next: {evaluation_command(args)}")


def main(argv: list[str] | None = None) -> None:
    command_line("finetune.py", parse, train, argv)


def is_training(args: SimpleNamespace) -> bool:
    return not args.eval_only and args.recipe not in ("knn", "features")


def evaluation_command(args: SimpleNamespace) -> str:
    """The command that evaluates best.pt of this run."""
    words = ["python", "finetune.py", "--weights", f"{args.out}/best.pt", "--data", args.data]
    if args.data_root != DEFAULTS["data_root"]:
        words += ["--data-root", args.data_root]
    return shlex.join([*words, "--eval-only"])


# ---- evaluation ----

def evaluate_epoch(done: int, args: SimpleNamespace, world: Distributed, state: TrainState,
                   best: BestEpoch, checkpointer: Checkpointer) -> dict | None:
    """At the end of every --eval-every epochs and of the run: the accuracies; keeps best.pt."""
    plan = state.plan
    epoch, inside = divmod(done, plan.per_epoch)
    is_due = inside == 0 and epoch % args.eval_every == 0
    if done == 0 or done < plan.total and not is_due:
        return None
    result = evaluate(state.evaluated, args, world, state)
    world.print0(f"epoch {done / plan.per_epoch:g}: top-1 {100 * result['top1']:.2f} %")
    weights = state.evaluated.torchvision_state_dict()
    checkpointer.keep_best(best, "top1", result["top1"], weights)
    return result


def evaluate_only(args: SimpleNamespace, world: Distributed, state: TrainState) -> None:
    """--eval-only and the recipes knn and features: no training."""
    make_folder(args, world, state.plan.global_batch)
    model = state.evaluated
    if args.recipe == "features":
        write_all_features(model, args, world, state)
        return
    measure = evaluate if args.eval_only else neighbours
    report(measure(model, args, world, state), args, world, state)


def outputs(f, loader: DataLoader, labels: Tensor, args: SimpleNamespace, world: Distributed,
            state: TrainState) -> tuple[Tensor, Tensor]:
    """f(images) in float32, (N, C), and the labels, (N,), of this process's part of a set.

    Unreadable images are left out and named."""
    parts, bad = [], [torch.zeros(0, dtype=torch.long)]
    for images, index, broken in loader:
        is_read = broken < 0
        images, index = images[is_read], index[is_read]
        bad.append(broken[~is_read])
        images = normalise(images, world.device).contiguous(memory_format=state.memory_format)
        with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
            z = f(images)
        parts.append((z.float(), labels[index].to(world.device)))
    bad = sorted(world.all_gather(torch.cat(bad)).tolist())
    if bad:
        names = name_some(loader.dataset.source, bad)
        world.print0(f"{len(bad)} images cannot be read and are left out: {names}")
    return tuple(torch.cat(column) for column in zip(*parts))


@torch.no_grad()
def evaluate(model: Classifier, args: SimpleNamespace, world: Distributed,
             state: TrainState) -> dict:
    """Exact accuracies over the whole validation set, on any number of processes. See `score`."""
    training = model.training
    model.eval()
    world.broadcast_buffers(model)
    logits, labels = outputs(model, state.val_loader, state.val_labels, args, world, state)
    model.train(training)
    likeliest = logits.topk(min(5, logits.shape[1])).indices                 # (N, 5)
    return score(likeliest, labels, logits.shape[1], world)


@torch.no_grad()
def neighbours(model: Classifier, args: SimpleNamespace, world: Distributed, state: TrainState,
               temperature: float = 0.07) -> dict:
    """Weighted k-nearest-neighbour accuracy on frozen, mean-pooled features.

    A neighbour votes with exp(cosine / temperature). Every process searches its own part of the
    training images for the neighbours of all validation images. See `score`. Source: Wu et al.
    2018."""
    model.eval()
    bank, bank_labels = outputs(model.features, state.loader, state.labels, args, world, state)
    own = outputs(model.features, state.val_loader, state.val_labels, args, world, state)
    queries, labels = (world.all_gather(column) for column in own)
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    k, classes = args.neighbours, len(state.classes)

    near = []                                                # of this process's part of the bank
    for some in queries.split(256):
        values, index = (some @ bank.T).topk(min(k, len(bank)))              # (256, k)
        near.append(torch.stack([values, bank_labels[index].float()]))
    near = torch.cat(near, dim=1)                            # (2, N, k)
    values, votes_for = world.all_gather(near, dim=2)        # (N, k * processes) each
    values, index = values.topk(min(k, values.shape[1]))
    votes = torch.zeros(len(queries), classes, device=world.device)
    classes_of = votes_for.gather(1, index).long()
    votes.scatter_add_(1, classes_of, (values / temperature).exp())
    mine = slice(world.rank, None, world.size)               # each process reports a part
    return score(votes.topk(min(5, classes)).indices[mine], labels[mine], classes, world)


@torch.no_grad()
def write_all_features(model: Classifier, args: SimpleNamespace, world: Distributed,
                       state: TrainState) -> None:
    """The mean-pooled features of every image of --data, as for knn, into features.npz."""
    model.eval()
    positions = torch.arange(len(state.labels))
    z, index = outputs(model.features, state.loader, positions, args, world, state)
    write_features(z, index, args, world, state.unreadable.source)


# ---- set-up ----

def start(args: SimpleNamespace, world: Distributed) -> tuple[SimpleNamespace, dict | None]:
    """Joins the processes and opens the output folder: (settings, checkpoint to resume from)."""
    world.set_device(args.device)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group(world.backend, store=world.rendezvous_store(), rank=world.rank,
                                world_size=world.size)
    kind = "eval" if args.eval_only else args.recipe + ("-scratch" if args.init else "")
    name = f"{Path(args.data or '').resolve().name}-{args.arch}-{kind}"
    args, checkpoint = open_run(args, world, own=DEFAULTS, name=name, flags=FLAGS)
    args.amp = args.amp or world.default_amp()
    return args, checkpoint


def prepare(args: SimpleNamespace, world: Distributed, checkpoint: dict | None) -> TrainState:
    """Data, model, weights and optimiser. Raises ValueError if they do not fit."""
    size = height_width(args.image_size)                     # (H, W)
    test_size = height_width(args.test_size or args.image_size)
    source, val = open_data(args, world, size, test_size)
    if not checkpoint:
        choose_linear(args, len(source), world)
    if not is_training(args):
        args.batch_size = 1  # no steps: any number of images will do
    elif args.global_batch and not args.batch_size:
        args.global_batch = min(args.global_batch, len(source))
    plan = StepPlan.plan(args, world, len(source), checkpoint)

    at_once = 256 if world.on_gpu else 64                    # images of an evaluation's batch
    if is_training(args):
        batches = ResumableBatchSampler(len(source), plan.batch, args.accum, world.size,
                                        world.rank, args.seed, plan.start, plan.total,
                                        args.repeats)
        transform = augment(args)
    else:
        batches = every_image_once(len(source), at_once, world)
        transform = eval_transform(size, args.test_crop)
    loader = make_loader(ImageDataset(source, transform, args.seed), batches, args.workers, world)
    val_batches = every_image_once(len(val), at_once, world)
    val_samples = ImageDataset(val, eval_transform(test_size, args.test_crop), args.seed)
    val_loader = make_loader(val_samples, val_batches, args.workers, world)

    torch.manual_seed(seed_for(args.seed))                   # all processes: the same head
    encoder = build_encoder(args.arch, size if is_training(args) else test_size, args.drop_path,
                            args.patch_size, args.window, args.stem)
    if args.grad_checkpoint:
        encoder.checkpoint_gradients()
    model = Classifier(args.arch, encoder, len(source.classes), args.frozen)
    head = set()                                             # the names of a loaded head
    if args.eval_only:
        head = load_head(model, args.weights)
    elif args.recipe == "features":
        head = None                                          # none is needed
    if args.weights and not checkpoint:
        found = load_backbone(encoder, args.weights)
        world.print0(f"{args.weights}: {summary_of(found, head)}")
        if args.eval_only and found["missing"]:
            names = ", ".join(found["missing"][:3])
            raise ValueError(f"{args.weights}: lacks {names}; evaluate it with the --arch, --stem "
                             f"and --patch-size that it was trained with")

    is_cnn = get_family(args.arch).convolutional             # channels_last is faster on a CNN
    channels_last = args.channels_last and is_cnn and not world.on_mps
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = net = model.to(world.device).to(memory_format=memory_format)
    if world.size > 1 and world.on_cuda:                     # statistics of all GPUs, as released
        model = net = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.compile()
    if world.size > 1:
        devices = [world.local_rank] if world.on_gpu else None
        net = DDP(model, device_ids=devices, gradient_as_bucket_view=True)

    groups = layer_groups(model, args.weight_decay, args.layer_decay)
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-8, fused=not world.on_mps)
    sgd = partial(torch.optim.SGD, momentum=0.9)
    optimizer = {"lamb": Lamb, "sgd": sgd, "adamw": adamw}[args.optimizer](groups, lr=0.0)
    # Without fp16 the scale stays 1; the scaler then only skips steps with non-finite gradients.
    scale = {} if args.amp == "fp16" else {"init_scale": 1.0}
    scaler = torch.amp.GradScaler(world.device.type, **scale)
    ema = MovingAverage(model, args.ema, 20 * plan.per_epoch) if args.ema else None
    unreadable = UnreadableImages(source, args.max_bad, args.out)
    labels = torch.from_numpy(source.labels).long()
    val_labels = torch.from_numpy(val.labels).long()
    return TrainState(plan, source.classes, loader, labels, val_loader, val_labels, model, net,
                      optimizer, scaler, memory_format, unreadable, ema)


def open_data(args: SimpleNamespace, world: Distributed, size: tuple[int, int],
              test_size: tuple[int, int]) -> tuple:
    """(images to train on, images for validation). `features` has one set, labelled or not.

    Raises ValueError if they do not fit each other or the flags."""
    one_set = args.recipe == "features"
    is_named = args.data in NAMED
    opened = partial(open_images, args.data, root=args.data_root, labelled=is_named or not one_set)
    if args.download:                                        # one process fetches for all
        world.broadcast_from_rank0(lambda: len(opened("train", size, download=True)))
    smallest_crop = args.crop_min if is_training(args) else args.test_crop**2
    split = "all" if one_set and not is_named else "train"
    source = opened(split, size, crop_min=smallest_crop)
    val = source
    if not one_set:
        val = opened("val", test_size, crop_min=args.test_crop**2)

    different = sorted(set(source.classes) ^ set(val.classes))
    if different:
        more = ", ..." if len(different) > 3 else ""
        raise ValueError(f"--data {args.data}: train/ and val/ hold different classes "
                         f"({', '.join(different[:3])}{more})")
    one_grid = get_family(args.arch).name == "vit" or args.arch.startswith("maxvit")
    if test_size != size and one_grid and is_training(args):
        raise ValueError(f"--test-size of {format_size(test_size)}: {args.arch} has one grid of "
                         f"positions; use that of --image-size, {format_size(size)}")
    if len(val) < world.size:
        kind = "" if one_set else "validation "
        raise ValueError(f"--data {args.data}: {len(val)} {kind}images are too few for "
                         f"{world.size} processes")
    return some_labels(source, args.labels, args.seed), val


def choose_linear(args: SimpleNamespace, images: int, world: Distributed) -> None:
    """Puts LINEAR_SMALL into args for a linear probe on few images.

    The optimiser stays the released one if its name or its lr was typed. The batch is at most a
    tenth of the images, so that an epoch has at least ten steps."""
    typed = {"optimizer", "lr", "lr_batch"} & set(args.given)
    if args.recipe != "linear" or not is_training(args) or images >= FEW_IMAGES or typed:
        return
    if not args.batch_size:
        tenth = images // (10 * args.accum * world.size)
        args.batch_size = max(1, min(256 if world.on_gpu else 32, tenth))
    settings = dict(LINEAR_SMALL, lr_batch=args.batch_size * args.accum * world.size)
    for name, value in settings.items():
        if name not in args.given:
            setattr(args, name, value)
    world.print0(f"linear probe on fewer than {FEW_IMAGES:,} images: AdamW with a peak lr of "
                 f"{args.lr:g}, instead of the released SGD")


def print_start(args: SimpleNamespace, world: Distributed, state: TrainState) -> None:
    if args.recipe == "features":
        size = format_size(args.test_size or args.image_size)
        data = f"{len(state.labels)} images at {size}"
    else:
        labelled = f"{len(state.labels)} labelled images at {format_size(args.image_size)}, "
        data = "" if args.eval_only else labelled
        data += f"{len(state.classes)} classes, {len(state.val_labels)} images for validation"
    how = "evaluation only" if args.eval_only else f"recipe {args.recipe}"
    world.print0(f"{args.arch}, {args.init or args.weights}; {args.data}: {data}\n"
                 f"{how}; {world.size} x {world.device.type}, amp {args.amp}; "
                 f"writing {args.out}/")


# ---- flags: name -> (default, kind, help). A recipe overrides a default, a typed flag both ----

yes_no, share, positive, count = bool, number(float, 0, 1), number(float, 0), number(int, 1)
FLAGS = {
    "data": {
        "data": (None, path("DIR"), "labelled images (train/ and val/, or class folders), or "
                 f"{', '.join(NAMED)}"),
        "labels": (None, path("N"), "train on some labels only: a share such as 0.1, or a count "
                   "such as 20/class"),
        "image_size": (None, SIDES, "side of the square crop, or its height and width (as "
                       "pre-trained, otherwise 224)"),
        "test_size": (None, SIDES, "the same of the test crop (--image-size)"),
        "test_crop": (0.875, number(float, 0.1, 1), "test crop over the resized image, which "
                      "covers it"),
        **DATA_FLAGS},
    "augmentation": {
        "crop_min": (0.5, number(float, 0.01, 1), "smallest area of the random crop"),
        "randaug": (0.0, number(float, 0, 10), "RandAugment magnitude of 10, 2 ops, 0 = none"),
        "jitter": (0.0, share, "colour jitter, 0 to 1"),
        "erasing": (0.0, share, "probability of random erasing, by noise"),
        "mixup": (0.0, positive, "alpha of mixup, 0 = none; with --cutmix too, one of the two per "
                  "batch"),
        "cutmix": (0.0, positive, "alpha of cutmix, 0 = none"),
        "repeats": (1, count, "augmentations of each image in a batch")},
    "model": {
        "weights": (None, path("FILE"), "backbone.pt, checkpoint.pt, best.pt, torchvision's or a "
                    "released checkpoint"),
        "init": (None, ("scratch",), "train the same thing from random weights"),
        "arch": (None, checked("NAME", get_family), "backbone, table: docs/recipes.md (from "
                 "args.json beside the weights)"),
        "drop_path": (0.0, number(float, 0, 0.99), "stochastic depth of the deepest block"),
        "patch_size": (16, count, "ViT only (as pre-trained)"),
        "window": (7, count, "Swin only (as pre-trained)"),
        "stem": (None, STEMS, "ResNet only (as pre-trained; from scratch: small below 64 px, "
                 "otherwise imagenet)"),
        **STAGE_FLAGS},
    "optimiser": {
        "recipe": ("default", tuple(RECIPES), "the table below; to judge frozen features, take knn "
                   "for a quick look (one pass, nothing is trained), and linear for the accuracy "
                   "to compare (all its 100 epochs)"),
        "optimizer": ("adamw", ("adamw", "lamb", "sgd"), "LAMB for large batches, SGD for linear "
                      "probes on ImageNet"),
        "epochs": (20, number(float, 0.001, MAX_EPOCHS), "passes over the labelled images; a "
                   "fraction too"),
        "batch_size": (None, count, "images per process and forward pass (default recipe: 16 in "
                       "all; GPU 256, CPU 32)"),
        "accum": (1, count, "forward passes per optimiser step"),
        "lr": (1e-3, positive, "per --lr-batch images of the global batch"),
        "lr_batch": (16, count, "see --lr"),
        "layer_decay": (1.0, number(float, 0.01, 1), "lr of each stage (ViT: block), times that of "
                        "the next"),
        "weight_decay": (0.05, number(float, 0, 1000), "of weights, not of norms and biases"),
        "clip_grad": (0.0, positive, "largest gradient norm, 0 = none"),
        "schedule": ("cosine", ("cosine", "cosine-by-epoch", "cosine-from-0", "probe"), "see "
                     "engine/optim.py, lr_at"),
        "warmup_epochs": (None, positive, "10, or a tenth of a run shorter than 100"),
        "min_lr": (1e-6, positive, "floor of the cosine"),
        "loss": ("ce", ("ce", "bce"), "cross-entropy, or binary cross-entropy per class"),
        "smoothing": (0.1, share, "label smoothing of ce"),
        "ema": (0.0, share, "decay of the weights' moving average, which is evaluated and saved; "
                "0 = none"),
        "frozen": (False, yes_no, "train the head alone"),
        "neighbours": (20, count, "of the knn recipe")},
    "run": {
        **RUN_FLAGS,
        "eval_every": (10, count, "epochs between evaluations; the last epoch is always evaluated"),
        "eval_only": (False, SWITCH, "evaluate --weights that hold a head (best.pt), and stop")},
}
DEFAULTS = {**defaults(FLAGS), "global_batch": 16}           # and what a recipe alone can set


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe; `given` holds what was typed. Raises ValueError for a wrong value."""
    parser = Parser("finetune.py", "%(prog)s --weights FILE --data DIR [options]", __doc__, FLAGS,
                    RECIPES)
    given = vars(parser.parse_args(argv))
    recipe = {**DEFAULTS, **RECIPES[given.get("recipe", "default")]}
    as_pre_trained = ["arch", "patch_size", "window", "stem"]
    if not recipe["image_size"]:
        as_pre_trained.append("image_size")
    if "eval_only" in given:
        as_pre_trained += ["test_size", "test_crop"]
    recipe |= remembered(given.get("weights"), parser, as_pre_trained)
    arch = given.get("arch", recipe["arch"])
    recipe |= EXCEPTIONS.get((given.get("recipe"), arch), {})
    settings = {**recipe, **given}
    args = SimpleNamespace(**settings, program="finetune.py", given=given, demo=False)
    if args.resume and args.out:                             # the rest is in the checkpoint
        return args
    if args.data is None:
        raise ValueError(f"--data is missing: a folder of labelled images, or one of "
                         f"{', '.join(NAMED)}")
    if (args.weights is None) == (args.init is None):
        raise ValueError("give --weights FILE, or --init scratch to train from random weights")
    if args.arch is None:
        raise ValueError("--arch is missing: no args.json beside the weights names it; try "
                         "--arch resnet18")
    args.image_size = args.image_size or 224
    if args.init:
        for name, value in settings_for_size(args.arch, args.image_size).items():
            if name not in given:
                setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
