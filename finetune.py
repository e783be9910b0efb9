"""Fine-tuning: what pre-trained weights bring on a labelled set. Also probes and features.

    python finetune.py --weights runs/shapes-resnet18/backbone.pt --data shapes --labels 0.05
    torchrun --nproc_per_node=8 finetune.py --weights FILE --arch vit_base --data DIR --recipe vit

In the order of this file: the recipes, one training step, the loop, the evaluation, the set-up,
the flags, the settings. A run writes to --out: args.json, log.jsonl, loss.png, checkpoint.pt (the
last state), best.pt (the best epoch's weights under torchvision's names, head included),
model.json (what is needed to run best.pt on new images), result.json (accuracies, also per class)
and confusion.png. The recipe `features` writes features.npz.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from data import (MEAN, NAMED, STD, ImageDataset, ResumableBatchSampler, Subset, augment,
                  check_outside, default_workers, eval_transform, every_image_once, make_loader,
                  normalise, open_images, seed_for, some_labels)
from engine.checkpointer import (Checkpointer, StepPlan, check_resumes_training, is_remembered,
                                 make_folder, open_run)
from engine.command import Distributed, command_line
from engine.description import check_classes, describe
from engine.flags import (AMP, COUNT, DATA_FLAGS, FRACTION, MAX_EPOCHS, NONNEGATIVE, RUN_FLAGS,
                          SIDES, STAGE_FLAGS, SWITCH, Parser, checked, format_size, height_width,
                          number, path, remembered)
from engine.images import UnreadableImages, name_some
from engine.optim import MovingAverage, layer_groups, lr_at, make_optimizer
from engine.results import report, score, write_features
from engine.settings import (all_defaults, resolve_batch, resolve_warmup, resumed,
                             settings_class)
from engine.step import is_evaluated, make_scaler, memory_format, take_step, wrap
from engine.weights import load_backbone, load_head, summary_of
from model import STEMS, Classifier, build_encoder, get_family, settings_for_size

# ---- recipes. Values have flags of the same name; lr is per `lr_batch` images of a step ----

LONG = dict(recipe_batch=None, eval_every=1, crop_min=0.08)
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
EMA_RAMP = 20                                                # epochs, as released


# ---- one training step ----

class BestEpoch(dict):
    """The best epoch so far: its accuracy and its number. A dict that a checkpoint can hold."""

    def state_dict(self) -> dict:
        return self.copy()

    def load_state_dict(self, state: dict) -> None:
        self.update(state)


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
    net: nn.Module                                           # with several processes: DDP(model)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    memory_format: torch.memory_format
    unreadable: UnreadableImages
    ema: MovingAverage | None

    @property
    def evaluated(self) -> Classifier:
        """The model that is evaluated and kept: the moving average if there is one."""
        return self.ema.module if self.ema else self.model


def train_step(step: int, batches, settings: Settings, world: Distributed,
               state: TrainState) -> dict[str, Tensor]:
    """One optimiser step. Returns the loss of this process, on the device.

    All randomness comes from (seed, step): stochastic depth, erasing, mixup, cutmix."""
    torch.manual_seed(seed_for(settings.seed, step, world.rank))
    total = 0.0
    for i in range(settings.accum):                              # forward passes
        images, index, broken = next(batches)
        state.unreadable.note(broken)
        images = erase(normalise(images, world.device), settings.erasing)        # (B, 3, H, W)
        labels = state.labels[index].to(world.device, non_blocking=world.on_cuda)        # (B,)
        images, targets = mix_batch(images, labels, len(state.classes), settings.mixup,
                                    settings.cutmix)
        images = images.contiguous(memory_format=state.memory_format)
        is_last = i == settings.accum - 1
        average_gradients = is_last or world.size == 1       # over the processes, once a step
        with contextlib.nullcontext() if average_gradients else state.net.no_sync():
            with torch.autocast(world.device.type, AMP[settings.amp], settings.amp != "off"):
                logits = state.net(images)                   # (B, classes)
            loss = class_loss(logits.float(), targets, settings.loss, settings.smoothing)
            state.scaler.scale(loss / settings.accum).backward()
        total = total + loss.detach() / settings.accum

    record = {"loss": total}
    take_step(state, settings, record)
    if state.ema:
        state.ema.update_parameters(state.model)
    return record


def mix_batch(images: Tensor, labels: Tensor, classes: int, mixup: float,
              cutmix: float) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W), (B,) -> mixed images, targets (B, classes) = lam onehot(a) + (1-lam) onehot(b).

    a is the image's own class, b the class of the image that is mixed in. cutmix's lam is the share
    of the area that is kept. With both alphas: mixup or cutmix with even odds per batch."""
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
    """Random erasing (Zhong et al. 2020) of normalised images (B, 3, H, W): a box of noise.

    A box has 2 to 33 % of the area, and height / width is log-uniform from 0.3 to 3.3. It must be
    smaller than the image on both sides. After ten boxes that are not, the image stays as it is.
    This is the distribution of torchvision's RandomErasing, for all images at once. Everything is
    drawn on the device, so that no step waits for a GPU."""
    if not probability:
        return images
    B, _, H, W = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape, device=images.device).uniform_(low, high)
    area = H * W * uniform(0.02, 0.33, 10, B)                # of ten boxes for each image
    ratio = uniform(math.log(0.3), math.log(3.3), 10, B).exp()
    h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (h < H) & (w < W)
    first = fits.int().argmax(0, keepdim=True)               # (1, B), the first box that fits
    h, w = h.gather(0, first)[0], w.gather(0, first)[0]      # (B,)
    top = (uniform(0, 1, B) * (H - h + 1)).floor()           # 0 to H - h
    left = (uniform(0, 1, B) * (W - w + 1)).floor()
    is_erased = (uniform(0, 1, B) < probability) & fits.any(0)

    top, left, h, w, is_erased = (x[:, None] for x in (top, left, h, w, is_erased))
    y = torch.arange(H, device=images.device)
    x = torch.arange(W, device=images.device)
    rows = (y >= top) & (y < top + h) & is_erased            # (B, H)
    columns = (x >= left) & (x < left + w)                   # (B, W)
    box = rows[:, None, :, None] & columns[:, None, None, :]                 # (B, 1, H, W)
    return torch.where(box, torch.randn_like(images), images)


# ---- the loop ----

def train(typed: dict, world: Distributed) -> None:
    """The whole run, from the flags that were typed.

    Raises ValueError for a mistake, before it starts; Failed and Stopped as Checkpointer does."""
    settings, checkpoint, source, val = start(typed, world)
    state = prepare(settings, world, checkpoint, source, val)
    print_start(settings, world, state)
    if not is_training(settings):
        evaluate_only(settings, world, state)
        return

    plan = state.plan
    best = BestEpoch(top1=-1.0)
    saved = dict(model=state.model, optimizer=state.optimizer, scaler=state.scaler,
                 broken=state.unreadable, best=best)
    if state.ema:
        saved["ema"] = state.ema
    checkpointer = Checkpointer(settings, world, plan, saved, checkpoint)
    world.print0(f"global batch {settings.global_batch}, peak lr {settings.peak_lr:.2e}, "
                 f"{settings.epochs:g} epochs of {plan.per_epoch} steps")

    batches = checkpointer.timed(state.loader)
    state.model.train()
    with checkpointer:
        # the run may have stopped after the checkpoint of a step and before its evaluation
        result = evaluate_epoch(plan.start, settings, world, state, best, checkpointer)
        for step in checkpointer.steps():
            for group in state.optimizer.param_groups:
                peak = settings.peak_lr * group["scale"]
                group["lr"] = lr_at(step, plan.total, plan.warmup, peak, settings.min_lr,
                                    settings.schedule, plan.per_epoch)
            record = train_step(step, batches, settings, world, state)
            checkpointer.after(step, record)                 # logs, saves, stops on a signal
            result = evaluate_epoch(step + 1, settings, world, state, best, checkpointer)
    checkpointer.finish("best.pt", "model.json")             # raises Failed if a file is missing
    report(result, settings, world, state, best_top1=best["top1"], best_epoch=best["epoch"])
    checkpointer.board.add_picture("confusion", checkpointer.out / "confusion.png", plan.total)
    world.print0(f"done: {settings.out}/best.pt holds the weights of the best epoch\n"
                 f"next: {evaluation_command(settings)}")


def main(argv: list[str] | None = None) -> None:
    command_line("finetune.py", parse, train, argv)


def is_training(settings: Settings) -> bool:
    return trains(settings.recipe, settings.eval_only)


def trains(recipe: str | None, eval_only: bool | None) -> bool:
    """False if nothing is trained: with --eval-only, and for the recipes knn and features."""
    return not eval_only and recipe not in ("knn", "features")


def evaluation_command(settings: Settings) -> str:
    """The command that evaluates best.pt of this run."""
    words = ["python", "finetune.py", "--weights", f"{settings.out}/best.pt", "--data",
             settings.data]
    if settings.data_root != DEFAULTS["data_root"]:
        words += ["--data-root", settings.data_root]
    return shlex.join([*words, "--eval-only"])


# ---- evaluation ----

def evaluate_epoch(done: int, settings: Settings, world: Distributed, state: TrainState,
                   best: BestEpoch, checkpointer: Checkpointer) -> dict | None:
    """At the end of every --eval-every epochs and of the run: the accuracies; keeps best.pt."""
    plan = state.plan
    if not is_evaluated(done, plan, settings.eval_every):
        return None
    result = evaluate(state.evaluated, settings, world, state)
    world.print0(f"epoch {done / plan.per_epoch:g}: top-1 {100 * result['top1']:.2f} %")
    weights = state.evaluated.torchvision_state_dict()
    checkpointer.keep_best(best, "top1", result["top1"], weights,
                           description_of(settings, state))
    return result


def description_of(settings: Settings, state: TrainState) -> dict:
    """The content of model.json, with which extras/predict.py runs best.pt on new images."""
    size = settings.test_size or settings.image_size
    return describe("classifier", settings, state.classes, size, MEAN, STD,
                    test_crop=settings.test_crop)


def evaluate_only(settings: Settings, world: Distributed, state: TrainState) -> None:
    """--eval-only and the recipes knn and features: no training."""
    make_folder(settings, world)
    model = state.evaluated
    if settings.recipe == "features":
        write_all_features(model, settings, world, state)
        return
    measure = evaluate if settings.eval_only else neighbours
    report(measure(model, settings, world, state), settings, world, state)


def outputs(f, loader: DataLoader, labels: Tensor, settings: Settings, world: Distributed,
            state: TrainState) -> tuple[Tensor, Tensor]:
    """f(images) in float32, (N, C), and the labels, (N,), of this process's part of a set.

    Unreadable images are left out and named."""
    parts, bad = [], [torch.zeros(0, dtype=torch.long)]
    for images, index, broken in loader:
        is_read = broken < 0
        # Indexing makes a copy in ordinary memory, which goes to the GPU more slowly. So it is
        # done only where an image is missing.
        if not is_read.all():
            images, index = images[is_read], index[is_read]
        bad.append(broken[~is_read])
        images = normalise(images, world.device).contiguous(memory_format=state.memory_format)
        with torch.autocast(world.device.type, AMP[settings.amp], settings.amp != "off"):
            z = f(images)
        parts.append((z.float(), labels[index].to(world.device)))
    bad = sorted(world.all_gather(torch.cat(bad)).tolist())
    if bad:
        names = name_some(loader.dataset.source, bad)
        world.print0(f"{len(bad)} images cannot be read and are left out: {names}")
    return tuple(torch.cat(column) for column in zip(*parts))


@torch.no_grad()
def evaluate(model: Classifier, settings: Settings, world: Distributed,
             state: TrainState) -> dict:
    """Exact accuracies over the whole validation set, on any number of processes. See `score`."""
    training = model.training
    model.eval()
    world.broadcast_buffers(model)
    # by forward: model(...) may be compiled, for the size of a training batch
    logits, labels = outputs(model.forward, state.val_loader, state.val_labels, settings, world,
                             state)
    model.train(training)
    likeliest = logits.topk(min(5, logits.shape[1])).indices                 # (N, 5)
    return score(likeliest, labels, logits.shape[1], world)


@torch.no_grad()
def neighbours(model: Classifier, settings: Settings, world: Distributed, state: TrainState,
               temperature: float = 0.07) -> dict:
    """Weighted k-nearest-neighbour accuracy on frozen, mean-pooled features.

    A neighbour votes with exp(cosine / temperature). Every process searches its own part of the
    training images for the neighbours of all validation images. See `score`. Source: Wu et al.
    2018."""
    model.eval()
    bank, bank_labels = outputs(model.features, state.loader, state.labels, settings, world, state)
    own = outputs(model.features, state.val_loader, state.val_labels, settings, world, state)
    queries, labels = (world.all_gather(column) for column in own)
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    k, classes = settings.neighbours, len(state.classes)

    near = []                                                # of this process's part of the bank
    for some in queries.split(256):
        values, index = (some @ bank.T).topk(min(k, len(bank)))              # (256, k)
        near.append(torch.stack([values, bank_labels[index].float()]))
    near = torch.cat(near, dim=1)                            # (2, N, k)
    values, label_of = world.all_gather(near, dim=2)         # (N, k * processes) each
    values, index = values.topk(min(k, values.shape[1]))
    votes = torch.zeros(len(queries), classes, device=world.device)
    voted = label_of.gather(1, index).long()                 # (N, k), the neighbours' classes
    votes.scatter_add_(1, voted, (values / temperature).exp())
    mine = slice(world.rank, None, world.size)               # each process reports a part
    return score(votes.topk(min(5, classes)).indices[mine], labels[mine], classes, world)


@torch.no_grad()
def write_all_features(model: Classifier, settings: Settings, world: Distributed,
                       state: TrainState) -> None:
    """The mean-pooled features of every image of --data, as for knn, into features.npz."""
    model.eval()
    positions = torch.arange(len(state.labels))
    z, index = outputs(model.features, state.loader, positions, settings, world, state)
    write_features(z, index, settings, world, state.unreadable.source)


# ---- set-up ----

def start(typed: dict, world: Distributed) -> tuple:
    """Joins the processes, opens the output folder and the data.

    Returns (settings, checkpoint to resume from, images to train on, images for validation)."""
    world.set_device(typed.get("device"))
    world.join()
    asked = asked_for(typed)
    kind = "eval" if asked["eval_only"] else asked["recipe"]
    kind += "-scratch" if asked["init"] and not asked["eval_only"] else ""
    name = f"{Path(asked['data'] or '').resolve().name}-{asked['arch']}-{kind}"
    out, checkpoint = open_run(typed, world, "finetune.py", name, FLAGS)
    if checkpoint:
        asked = resumed(DEFAULTS, checkpoint["args"], typed)
        before = checkpoint["args"]["ema"]
        if bool(asked["ema"]) != bool(before):
            raise ValueError(f"--ema {asked['ema']:g}: the run began with --ema {before:g}; a "
                             f"moving average cannot begin or end in between")
    asked["out"] = out
    source, val = open_data(asked, world)
    check_outside(out, source)
    check_outside(out, val)
    settings = resolve(asked, len(source), world, is_resumed=checkpoint is not None)
    is_probe = settings.recipe == "linear" and settings.optimizer == "adamw"
    if is_probe and not checkpoint and "optimizer" not in settings.typed:
        world.print0(f"linear probe on fewer than {FEW_IMAGES:,} images: AdamW with a peak lr of "
                     f"{settings.peak_lr:g}, instead of the released SGD")
    return settings, checkpoint, source, val


def prepare(settings: Settings, world: Distributed, checkpoint: dict | None, source,
            val) -> TrainState:
    """Model, weights, optimiser and loaders. Raises ValueError if they do not fit."""
    size = height_width(settings.image_size)                 # (H, W)
    test_size = height_width(settings.test_size or settings.image_size)
    plan = StepPlan.plan(settings, world, len(source), checkpoint)

    at_once = 256 if world.on_gpu else 64                    # images of an evaluation's batch
    if is_training(settings):
        batches = ResumableBatchSampler(len(source), plan.batch, settings.accum, world.size,
                                        world.rank, settings.seed, plan.start, plan.total,
                                        settings.repeats)
        transform = augment(settings)
    else:
        batches = every_image_once(len(source), at_once, world)
        transform = eval_transform(test_size, settings.test_crop)
    samples = ImageDataset(source, transform, settings.seed)
    loader = make_loader(samples, batches, settings.workers, world)
    val_batches = every_image_once(len(val), at_once, world)
    val_samples = ImageDataset(val, eval_transform(test_size, settings.test_crop), settings.seed)
    val_loader = make_loader(val_samples, val_batches, settings.workers, world,
                             persistent=is_training(settings))

    torch.manual_seed(seed_for(settings.seed))               # all processes: the same head
    encoder = build_encoder(settings.arch, size if is_training(settings) else test_size,
                            settings.drop_path, settings.patch_size, settings.window,
                            settings.stem)
    sizes = {size, test_size} if is_training(settings) else {test_size}
    for height_and_width in sizes:
        encoder.shapes(height_and_width)                     # raises if it is too small
    if settings.grad_checkpoint:
        encoder.checkpoint_gradients()
    if settings.eval_only:
        check_classes(source.classes, settings.weights, settings.data)
    model = Classifier(settings.arch, encoder, len(source.classes), settings.frozen)
    layers = [module for module in model.head.modules() if isinstance(module, nn.Linear)]
    if settings.recipe == "linear" and len(layers) > 1:
        raise ValueError(f"--recipe linear: the head of {settings.arch} has {len(layers)} linear "
                         f"layers, so the probe would not be linear; use --recipe knn, or an "
                         f"--arch whose head is one layer")
    head = set()                                             # the names of a loaded head
    if settings.eval_only:
        head = load_head(model, settings.weights)
    elif settings.recipe == "features":
        head = None                                          # none is needed
    if settings.weights and not checkpoint:
        found = load_backbone(encoder, settings.weights)
        world.print0(f"{settings.weights}: {summary_of(found, head)}")
        if settings.eval_only and found["missing"]:
            names = ", ".join(found["missing"][:3])
            raise ValueError(f"{settings.weights}: lacks {names}; evaluate it with the --arch, "
                             f"--stem and --patch-size that it was trained with")

    layout = memory_format(settings, world, get_family(settings.arch).convolutional)
    model, net = wrap(model, settings, world, layout)

    groups = layer_groups(model, settings.weight_decay, settings.layer_decay)
    optimizer = make_optimizer(settings.optimizer, groups, world)
    ema = MovingAverage(model, settings.ema, EMA_RAMP * plan.per_epoch) if settings.ema else None
    unreadable = UnreadableImages(source, settings.max_bad, settings.out)
    labels = torch.from_numpy(source.labels).long()
    val_labels = torch.from_numpy(val.labels).long()
    return TrainState(plan, source.classes, loader, labels, val_loader, val_labels, model, net,
                      optimizer, make_scaler(settings, world), layout, unreadable, ema)


def open_data(asked: dict, world: Distributed) -> tuple:
    """(images to train on, images for validation). Both are one set if only one is needed.

    Raises ValueError if they do not fit each other or the flags."""
    data, test_crop = asked["data"], asked["test_crop"]
    if asked["split_val"] and data in NAMED:
        raise ValueError(f"--split-val: is for a folder, not for {data}; leave it out")
    size = height_width(asked["image_size"])                 # (H, W)
    test_size = height_width(asked["test_size"] or asked["image_size"])
    smallest_crop = asked["crop_min"]
    is_trained = trains(asked["recipe"], asked["eval_only"])
    if not is_trained:                                       # all images are seen as in tests
        size = test_size
        smallest_crop = test_crop**2

    arch = asked["arch"]
    has_one_grid = get_family(arch).name == "vit" or arch.startswith("maxvit")
    if test_size != size and has_one_grid:
        raise ValueError(f"--test-size of {format_size(test_size)}: the positions of {arch} have "
                         f"one size; use that of --image-size, {format_size(size)}")

    labelled = data in NAMED or asked["recipe"] != "features"
    opened = partial(open_images, data, root=asked["data_root"], labelled=labelled)
    if asked["download"]:                                    # one process fetches for all
        world.broadcast_from_rank0(lambda: len(opened("train", size, download=True)))
    train_split, val_split = splits_of(asked)
    source = val = opened(train_split, size, crop_min=smallest_crop)
    if val_split != train_split:
        val = opened(val_split, test_size, crop_min=test_crop**2)
    check_data(source, val, asked, world)

    chosen = some_labels(source, asked["labels"], asked["seed"])
    if not is_trained and len(chosen) < world.size:          # each process needs an image
        raise ValueError(f"--labels {asked['labels']}: {len(chosen)} images are too few for "
                         f"{world.size} processes")
    return chosen, val


def splits_of(asked: dict) -> tuple[str, str]:
    """The parts of --data to train on and to evaluate. --eval-only and the recipe features have one
    part."""
    if asked["eval_only"]:
        part = asked["split_val"] or "val"
        return part, part
    if asked["recipe"] == "features":
        part = "train" if asked["data"] in NAMED else "all"
        return part, part
    return "train", "val"


def check_data(source, val, asked: dict, world: Distributed) -> None:
    """Raises ValueError if both parts differ in their classes, or if there are too few images."""
    data = asked["data"]
    different = sorted(set(source.classes) ^ set(val.classes))
    if different:
        more = ", ..." if len(different) > 3 else ""
        raise ValueError(f"--data {data}: train/ and val/ hold different classes "
                         f"({', '.join(different[:3])}{more})")
    if len(val) < world.size:
        kind = "" if val is source else "validation "
        is_fifth = isinstance(val, Subset) and asked["split_val"] in (None, "val")
        cure = "; every fifth image of a class is held out" if is_fifth else ""
        raise ValueError(f"--data {data}: {len(val)} {kind}images are too few for {world.size} "
                         f"process{'es' if world.size > 1 else ''}{cure}")


def print_start(settings: Settings, world: Distributed, state: TrainState) -> None:
    if settings.recipe == "features":
        size = format_size(settings.test_size or settings.image_size)
        data = f"{len(state.labels)} images at {size}"
    else:
        labelled = f"{len(state.labels)} labelled images at {format_size(settings.image_size)}, "
        data = "" if settings.eval_only else labelled
        data += f"{len(state.classes)} classes, {len(state.val_labels)} images for validation"
        if isinstance(state.val_loader.dataset.source, Subset):
            others = "all but " if settings.split_val == "train" else ""
            data += f" ({others}every fifth of a class)"
    how = "evaluation only" if settings.eval_only else f"recipe {settings.recipe}"
    world.print0(f"{settings.arch}, {settings.init or settings.weights}; {settings.data}: {data}\n"
                 f"{how}; {world.size} x {world.device.type}, amp {settings.amp}; "
                 f"writing {settings.out}/")
    steps = round(1 / (1 - settings.ema)) if 0 < settings.ema < 1 else 0
    if is_training(settings) and steps > 0.3 * state.plan.total:
        world.print0(f"warning: --ema {settings.ema:g} averages the weights of about {steps} "
                     f"steps, and the run has {state.plan.total}: the average stays behind; use "
                     f"--ema 0 or a smaller one")


# ---- flags: name -> (default, kind, help). A recipe overrides a default, a typed flag both ----

FLAGS = {
    "data": {
        "data": (None, path("DIR"), "labelled images (train/ and val/, or class folders), or "
                 f"{', '.join(NAMED)}"),
        "labels": (None, path("N"), "train on some labels only: a share such as 0.1, or a count "
                   "such as 20/class"),
        "split_val": (None, path("NAME"), "--eval-only: the folder below --data to evaluate, such "
                      "as test, or all for all images (val; without train/ and val/: every fifth "
                      "of a class)"),
        "image_size": (None, SIDES, "side of the square crop, or its height and width (as "
                       "pre-trained, otherwise 224)"),
        "test_size": (None, SIDES, "side or sides of the test crop (--image-size)"),
        "test_crop": (0.875, number(float, 0.1, 1), "side of the test crop / shorter side of the "
                      "resized image"),
        **DATA_FLAGS},
    "augmentation": {
        "crop_min": (0.5, number(float, 0.01, 1), "smallest area of the random crop"),
        "randaug": (0.0, number(float, 0, 10), "RandAugment's magnitude, 0 to 10; 0 = none"),
        "jitter": (0.0, FRACTION, "colour jitter, 0 to 1"),
        "erasing": (0.0, FRACTION, "probability of random erasing, by noise"),
        "mixup": (0.0, NONNEGATIVE, "alpha of mixup, 0 = none; with --cutmix too, one of the two "
                  "per batch"),
        "cutmix": (0.0, NONNEGATIVE, "alpha of cutmix, 0 = none"),
        "repeats": (1, COUNT, "augmentations of each image in a batch")},
    "model": {
        "weights": (None, path("FILE"), "backbone.pt, checkpoint.pt, best.pt, torchvision's or a "
                    "released checkpoint"),
        "init": (None, ("scratch",), "train the same thing from random weights"),
        "arch": (None, checked("NAME", get_family), "backbone, table: docs/recipes.md (from "
                 "args.json beside the weights)"),
        "drop_path": (0.0, number(float, 0, 0.99), "stochastic depth of the deepest block"),
        "patch_size": (16, COUNT, "ViT only (as pre-trained)"),
        "window": (7, COUNT, "Swin only (as pre-trained)"),
        "stem": (None, STEMS, "ResNet only (as pre-trained; from scratch: small below 64 px, "
                 "otherwise imagenet)"),
        **STAGE_FLAGS},
    "optimiser": {
        "recipe": ("default", tuple(RECIPES), "the table below. Frozen features: knn is a quick "
                   "look, one pass without training; linear gives the accuracy to compare"),
        "optimizer": ("adamw", ("adamw", "lamb", "sgd"), "LAMB for large batches, SGD for linear "
                      "probes on ImageNet"),
        "epochs": (20, number(float, 0.001, MAX_EPOCHS), "passes over the labelled images; a "
                   "fraction too"),
        "batch_size": (None, COUNT, "images per process and forward pass (recipes default and "
                       "small: 16 over all processes; others: GPU 256, CPU 32)"),
        "accum": (1, COUNT, "forward passes per optimiser step"),
        "lr": (1e-3, NONNEGATIVE, "per --lr-batch images of the global batch"),
        "lr_batch": (16, COUNT, "see --lr"),
        "layer_decay": (1.0, number(float, 0.01, 1), "factor on the lr, from each stage (ViT: "
                        "block) to the one before it"),
        "weight_decay": (0.05, number(float, 0, 1000), "of weights, not of norms and biases"),
        "clip_grad": (0.0, NONNEGATIVE, "largest gradient norm, 0 = none"),
        "schedule": ("cosine", ("cosine", "cosine-by-epoch", "cosine-from-0", "probe"), "see "
                     "engine/optim.py, lr_at"),
        "warmup_epochs": (None, NONNEGATIVE, "10, or a tenth of a run shorter than 100"),
        "min_lr": (1e-6, NONNEGATIVE, "floor of the cosine"),
        "loss": ("ce", ("ce", "bce"), "cross-entropy, or binary cross-entropy per class"),
        "smoothing": (0.1, FRACTION, "label smoothing of ce"),
        "ema": (0.0, FRACTION, "decay of the weights' moving average, which is evaluated and "
                "saved; 0 = none"),
        "frozen": (False, bool, "train the head alone"),
        "neighbours": (20, COUNT, "of the knn recipe")},
    "run": {
        **RUN_FLAGS,
        "eval_every": (10, COUNT, "epochs between evaluations; the last epoch is always evaluated"),
        "eval_only": (False, SWITCH, "evaluate --weights that hold a head (best.pt), and stop")},
}
Settings = settings_class(FLAGS)                             # frozen, with a field for each flag
DEFAULTS = all_defaults("finetune.py", FLAGS, recipe_batch=16)


def parse(argv: list[str] | None) -> dict:
    """The flags that were typed, with their values. Raises ValueError for a wrong or missing
    one."""
    typed = vars(make_parser().parse_args(argv))
    check_resumes_training(typed, trains(typed.get("recipe"), typed.get("eval_only")))
    if is_remembered(typed):                                 # the rest is in the checkpoint
        return typed
    if "data" not in typed:
        raise ValueError(f"--data is missing: a folder of labelled images, or one of "
                         f"{', '.join(NAMED)}")
    if ("weights" in typed) == ("init" in typed):
        raise ValueError("give --weights FILE, or --init scratch to train from random weights")
    if "eval_only" in typed and "init" in typed:
        raise ValueError("--eval-only: needs --weights, such as best.pt of a run")
    if "eval_only" in typed and typed.get("recipe") in ("knn", "features"):
        raise ValueError(f"--recipe {typed['recipe']}: trains nothing in any case; leave "
                         f"--eval-only out")
    if "labels" in typed and "eval_only" in typed:
        raise ValueError("--labels: chooses the images to train on, and --eval-only trains "
                         "nothing; leave one of them out")
    if "split_val" in typed and "eval_only" not in typed:
        raise ValueError("--split-val: chooses what --eval-only evaluates; add --eval-only")
    if asked_for(typed)["arch"] is None:
        why = "no args.json beside the weights names it"
        if "init" in typed:
            why = "--init scratch needs one"
        raise ValueError(f"--arch is missing: {why}; try --arch resnet18")
    return typed


def make_parser() -> Parser:
    return Parser("finetune.py", "%(prog)s --weights FILE --data DIR [options]", __doc__, FLAGS,
                  RECIPES)


# ---- settings: resolved once, before the run begins ----

def asked_for(typed: dict) -> dict:
    """What is known of a new run before its images are counted. Each overrides those before it:
    defaults, the recipe, the settings of the run that wrote the weights, exceptions, what was
    typed."""
    recipe = typed.get("recipe", DEFAULTS["recipe"])
    values = {**DEFAULTS, **RECIPES[recipe]}
    as_pre_trained = ["arch", "patch_size", "window", "stem"]
    if not values["image_size"]:
        as_pre_trained.append("image_size")
    if "eval_only" in typed:
        as_pre_trained.append("test_crop")
        if "image_size" not in typed:
            as_pre_trained.append("test_size")
    values |= remembered(typed.get("weights"), FLAGS, as_pre_trained)
    arch = typed.get("arch", values["arch"])
    values |= EXCEPTIONS.get((recipe, arch), {})
    values |= typed
    values["image_size"] = values["image_size"] or 224
    if values["init"] and arch:
        values |= {**settings_for_size(arch, values["image_size"]), **typed}
    return {**values, "typed": sorted(typed)}


def resolve(asked: dict, images: int, world: Distributed, is_resumed: bool = False) -> Settings:
    """The settings of a run. asked: from `asked_for` or `resumed`; images: their number.

    Nothing changes them afterwards."""
    values = dict(asked)
    training = trains(values["recipe"], values["eval_only"])
    if not training:
        values |= dict(batch_size=1, recipe_batch=None)      # no steps: any number of images
    elif values["recipe_batch"]:
        values["recipe_batch"] = min(values["recipe_batch"], images)
    is_linear = values["recipe"] == "linear" and training and images < FEW_IMAGES
    if is_linear and not is_resumed:
        values |= choose_linear(values, images, world)
    values |= resolve_batch(values, world)
    values["amp"] = values["amp"] or world.default_amp()
    if values["workers"] is None:
        values["workers"] = default_workers(world)
    values["warmup_epochs"] = resolve_warmup(values)
    values["peak_lr"] = values["lr"] * values["global_batch"] / values["lr_batch"]
    return Settings(**values)


def choose_linear(asked: dict, images: int, world: Distributed) -> dict:
    """LINEAR_SMALL, for a linear probe on few images; {} to keep the released optimiser, if its
    name or its lr was typed.

    The batch is at most a tenth of the images, so that an epoch has at least ten steps."""
    typed = asked["typed"]
    if {"optimizer", "lr", "lr_batch"} & {*typed}:
        return {}
    batch = asked["batch_size"]
    if not batch:
        tenth = images // (10 * asked["accum"] * world.size)
        batch = max(1, min(256 if world.on_gpu else 32, tenth))
    chosen = dict(LINEAR_SMALL, batch_size=batch, lr_batch=batch * asked["accum"] * world.size)
    return {name: value for name, value in chosen.items() if name not in typed}


if __name__ == "__main__":
    main()
