"""Fine-tuning: what pre-trained weights are worth on a labelled set. Probes, features and plain evaluation, too.

    python finetune.py --weights runs/shapes-resnet18/backbone.pt --data shapes --labels 0.05      after the demo
    torchrun --nproc_per_node=8 finetune.py --weights backbone.pt --data /path/to/imagenet --recipe rsb_a2

Recipes: RECIPES below. Leaves in --out: args.json, log.jsonl, checkpoint.pt (the last state), best.pt (the best epoch's
weights under torchvision's names, head included), result.json (accuracies, per class too), loss.png, confusion.png;
recipe features: features.npz.
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
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from data import (NAMED, Batches, Samples, augment, eval_transform, normalise, open_images, seed_for,
                  some_labels)
from engine.command import World, command_line
from engine.flags import (AMP, DATA_FLAGS, MAX_EPOCHS, RUN_FLAGS, SIDES, SWITCH, Parser, checked, defaults, number,
                          pair, path, remembered, told_size)
from engine.images import Broken, every_image_once, make_loader, name_some
from engine.journal import Journal, Steps, make_folder, open_run
from engine.optim import Lamb, layer_groups, lr_at, moving_average
from engine.results import report, score, write_features
from engine.weights import load_backbone, load_head, told
from loss import class_loss, erase, mix_batch
from model import STEMS, Classifier, build_encoder, family, for_small_images

# ---- recipes: every value has a flag of the same name; lr is per `lr_batch` images of the global batch ----

LONG = dict(global_batch=None, eval_every=1, crop_min=0.08)
RSB = dict(LONG, optimizer="lamb", lr_batch=2048, weight_decay=0.02, schedule="cosine-by-epoch", warmup_epochs=5,
           loss="bce", mixup=0.1, cutmix=1.0, test_size=224, test_crop=0.95)
STRONG = dict(LONG, image_size=224, warmup_epochs=20, mixup=0.8, cutmix=1.0, randaug=9.0, erasing=0.25)
RECIPES = {
    "default":  {},                                          # few labels, a short run, any backbone
    "small":    dict(epochs=60, crop_min=0.2, cutmix=1.0),   # a hundred labels or a few thousand: longer, harder to fit
    "rsb_a3":   dict(RSB, image_size=160, epochs=100, lr=8e-3, randaug=6.0),
    "rsb_a2":   dict(RSB, image_size=224, epochs=300, lr=5e-3, randaug=7.0, ema=0.9999, repeats=3, drop_path=0.05),
    # the lr is SimMIM's; the released ViT config has four times as much
    "vit":      dict(STRONG, epochs=100, lr=1.25e-3, lr_batch=512, layer_decay=0.65, clip_grad=5.0, ema=0.99996,
                     drop_path=0.1),
    "convnext": dict(STRONG, epochs=300, lr=4e-3, lr_batch=4096, ema=0.9999, drop_path=0.4, schedule="cosine-from-0",
                     warmup_epochs=5),
    "linear":   dict(LONG, frozen=True, epochs=100, optimizer="sgd", lr=30.0, lr_batch=256, weight_decay=0.0,
                     schedule="probe", warmup_epochs=0, smoothing=0.0),
    "knn":      dict(frozen=True),
    "features": dict(frozen=True),
}
# The released linear probe is for ImageNet. Its lr of 30 is too large for few images: on 300 the loss
# rises above 200. AdamW with a warm-up is stable for small and for large features. Its lr is the peak
# at every batch size.
LINEAR_SMALL = dict(optimizer="adamw", lr=1e-2, schedule="cosine", warmup_epochs=None)
FEW_IMAGES = 100_000
EXCEPTIONS = {  # as released: (recipe, arch) -> what differs
    ("rsb_a2", "resnet101"): dict(ema=0.0, drop_path=0.1),
    ("rsb_a2", "resnet152"): dict(ema=0.0, drop_path=0.15),
    ("rsb_a2", "resnet200"): dict(ema=0.0, drop_path=0.2),
    ("vit", "deit_small"): dict(lr=4e-3, warmup_epochs=5, ema=0.0),          # 8e-3 at a global batch of 1024
    ("vit", "vit_small"): dict(ema=0.0),
    ("vit", "vit_large"): dict(repeats=3),
    ("convnext", "convnext_tiny"): dict(epochs=400, lr=4e-4, weight_decay=0.01, layer_decay=0.7, drop_path=0.1),
    ("convnext", "convnext_base"): dict(drop_path=0.5),
}

# ---- one step ----

class Best(dict):                                            # the best epoch so far, kept in the checkpoint
    state_dict, load_state_dict = dict.copy, dict.update


@dataclass
class Run:
    """What a step and an evaluation work on."""
    steps: Steps
    classes: list[str]
    loader: DataLoader
    labels: Tensor                                           # (N,) of the training images
    val_loader: DataLoader
    val_labels: Tensor
    model: Classifier                                        # the weights, under their plain names
    net: nn.Module                                           # what a step calls: the model, wrapped by DDP if need be
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    memory_format: torch.memory_format
    broken: Broken
    ema: AveragedModel | None

    @property
    def tested(self) -> Classifier:
        """What is evaluated and kept: the moving average if there is one."""
        return self.ema.module if self.ema else self.model


def train_step(step: int, batches, args: SimpleNamespace, world: World, run: Run) -> dict[str, Tensor]:
    """One optimiser step; returns this process's mean loss, still on the device. Randomness comes from (seed, step)."""
    torch.manual_seed(seed_for(args.seed, step, world.rank))                 # stochastic depth, erasing, mixup, cutmix
    record = 0.0
    for part in range(args.accum):
        images, index, broken = next(batches)
        run.broken.note(broken)
        images = erase(normalise(images, world.device), args.erasing)        # (B, 3, H, W)
        labels = run.labels[index].to(world.device, non_blocking=world.on_cuda)            # (B,)
        images, targets = mix_batch(images, labels, len(run.classes), args.mixup, args.cutmix)
        images = images.contiguous(memory_format=run.memory_format)
        sync_now = part == args.accum - 1 or world.size == 1     # processes average their gradients once a step
        with contextlib.nullcontext() if sync_now else run.net.no_sync():
            with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
                logits = run.net(images)                     # (B, classes)
            loss = class_loss(logits.float(), targets, args.loss, args.smoothing)
            run.scaler.scale(loss / args.accum).backward()
        record = record + loss.detach() / args.accum
    if args.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad)
    run.scaler.step(run.optimizer)                           # not made if a gradient is not finite
    run.scaler.update(None if args.amp == "fp16" else 1.0)   # the scale of fp16 adapts, else it stays 1
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update_parameters(run.model)
    return {"loss": record}


# ---- the run ----

def train(args: SimpleNamespace, world: World) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as Journal does."""
    world.take_gpu(args.device)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group(world.backend, store=world.meeting_place(), rank=world.rank, world_size=world.size)
    kind = "eval" if args.eval_only else args.recipe + ("-scratch" if args.init else "")
    name = f"{Path(args.data or '').resolve().name}-{args.arch}-{kind}"
    args, saved = open_run(args, world, own=DEFAULTS, name=name, flags=FLAGS)
    args.amp = args.amp or world.default_amp()
    run = prepare(args, world, saved)
    labelled = "" if args.eval_only else f"{len(run.labels)} labelled images at {told_size(args.image_size)}, "
    holds = f"{labelled}{len(run.classes)} classes, {len(run.val_labels)} images for validation"
    if args.recipe == "features":
        holds = f"{len(run.labels)} images at {told_size(args.test_size or args.image_size)}"
    how = "evaluation only" if args.eval_only else f"recipe {args.recipe}"
    world.say(f"{args.arch}, {args.init or args.weights}; {args.data}: {holds}\n"
              f"{how}; {world.size} x {world.device.type}, amp {args.amp}; writing {args.out}/")
    if not trains(args):
        make_folder(args, world, run.steps.global_batch)
        if args.recipe == "features":
            return features(run.tested, args, world, run)
        measure = evaluate if args.eval_only else neighbours
        return report(measure(run.tested, args, world, run), args, world, run)

    steps, peak, best, result = run.steps, args.lr * run.steps.global_batch / args.lr_batch, Best(top1=-1.0), {}
    keep = dict(model=run.model, optimizer=run.optimizer, scaler=run.scaler, broken=run.broken, best=best)
    keep |= {"ema": run.ema} if run.ema else {}
    journal = Journal(args, world, steps, keep, saved)
    world.say(f"global batch {steps.global_batch}, peak lr {peak:.2e}, {args.epochs:g} x {steps.per_epoch} steps")

    def evaluate_after(done: int) -> None:
        """At the end of every --eval-every epochs, and of the run."""
        epoch, inside = divmod(done, steps.per_epoch)
        if done == 0 or done < steps.total and (inside or epoch % args.eval_every):
            return
        result.update(evaluate(run.tested, args, world, run))
        world.say(f"epoch {done / steps.per_epoch:g}: top-1 {100 * result['top1']:.2f} %")
        journal.keep_best(best, "top1", result["top1"], run.tested.plain_state())

    run.model.train()
    batches = iter(run.loader)
    with journal:
        evaluate_after(steps.start)                          # a checkpoint is written before its evaluation
        for step in journal.steps():
            for group in run.optimizer.param_groups:
                base = peak * group["scale"]
                group["lr"] = lr_at(step, steps.total, steps.warmup, base, args.min_lr, args.schedule, steps.per_epoch)
            record = train_step(step, batches, args, world, run)
            journal.after(step, record)                      # undoes a non-finite step, logs, saves, stops on a signal
            evaluate_after(step + 1)
    journal.finish("best.pt")                                # raises Failed if a file that was promised is not there
    report(result, args, world, run, best_top1=best["top1"], best_epoch=best["epoch"])
    if (journal.out / "best.pt").exists():
        world.say(f"done: {args.out}/best.pt holds the weights of the best epoch\n"
                  f"next: {evaluation_command(args)}")


def evaluation_command(args: SimpleNamespace) -> str:
    """The command that evaluates best.pt of this run."""
    words = ["python", "finetune.py", "--weights", f"{args.out}/best.pt", "--data", args.data]
    if args.data_root != DEFAULTS["data_root"]:
        words += ["--data-root", args.data_root]
    return shlex.join([*words, "--eval-only"])


def choose_linear(args: SimpleNamespace, images: int, world: World) -> None:
    """Puts LINEAR_SMALL into args for a linear probe on few images.

    The optimiser stays the released one if its name or its lr was typed.
    The batch is at most a tenth of the images, so that an epoch has at least ten steps."""
    own = {"optimizer", "lr", "lr_batch"} & set(args.given)
    if args.recipe != "linear" or not trains(args) or images >= FEW_IMAGES or own:
        return
    if not args.batch_size:
        tenth = images // (10 * args.accum * world.size)
        args.batch_size = max(1, min(256 if world.on_gpu else 32, tenth))
    settings = dict(LINEAR_SMALL, lr_batch=args.batch_size * args.accum * world.size)
    for name, value in settings.items():
        if name not in args.given:
            setattr(args, name, value)
    world.say(f"linear probe on fewer than {FEW_IMAGES:,} images: AdamW with a peak lr of "
              f"{args.lr:g}, instead of the released SGD")


def trains(args: SimpleNamespace) -> bool:
    return not args.eval_only and args.recipe not in ("knn", "features")


def prepare(args: SimpleNamespace, world: World, saved: dict | None) -> Run:
    """Data, model, weights and optimiser. Raises ValueError if they do not fit."""
    size, test = pair(args.image_size), pair(args.test_size or args.image_size)          # (H, W)
    alone, named = args.recipe == "features", args.data in NAMED             # one set of images, labelled or not
    look = partial(open_images, args.data, root=args.data_root, labelled=named or not alone)
    if args.download:                                        # one process fetches for all
        world.agree(lambda: len(look("train", size, download=True)))
    part = args.crop_min if trains(args) else args.test_crop**2              # smallest area of a crop
    source = look("all" if alone and not named else "train", size, crop_min=part)
    val = source if alone else look("val", test, crop_min=args.test_crop**2)
    if odd := sorted(set(source.classes) ^ set(val.classes)):
        more = ", ..." if len(odd) > 3 else ""
        raise ValueError(f"--data {args.data}: train/ and val/ hold different classes ({', '.join(odd[:3])}{more})")
    if test != size and (family(args.arch).name == "vit" or args.arch.startswith("maxvit")) and trains(args):
        raise ValueError(f"--test-size of {told_size(test)}: {args.arch} has one grid of positions; use that of "
                         f"--image-size, {told_size(size)}")
    if len(val) < world.size:
        raise ValueError(f"--data {args.data}: {len(val)} {'' if alone else 'validation '}images are too few for "
                         f"{world.size} processes")
    source = some_labels(source, args.labels, args.seed)
    if not saved:
        choose_linear(args, len(source), world)
    labels, val_labels = torch.from_numpy(source.labels).long(), torch.from_numpy(val.labels).long()
    if not trains(args):
        args.batch_size = 1                                  # no steps are made: any number of images will do
    elif args.global_batch and not args.batch_size:
        args.global_batch = min(args.global_batch, len(source))
    steps = Steps.plan(args, world, len(source), saved)
    at_once = 256 if world.on_gpu else 64                    # images per forward pass of an evaluation
    batches, transform = every_image_once(len(source), at_once, world), eval_transform(size, args.test_crop)
    if trains(args):
        batches = Batches(len(source), steps.batch, args.accum, world.size, world.rank, args.seed, steps.start,
                          steps.total, args.repeats)
        transform = augment(args)
    loader = make_loader(Samples(source, transform, args.seed), batches, args.workers, world)
    val_once, val_crop = every_image_once(len(val), at_once, world), eval_transform(test, args.test_crop)
    val_loader = make_loader(Samples(val, val_crop, args.seed), val_once, args.workers, world)

    torch.manual_seed(seed_for(args.seed))                   # every process starts from the same head
    encoder = build_encoder(args.arch, size if trains(args) else test, args.drop_path, args.patch_size, args.window,
                            args.stem)
    model = Classifier(args.arch, encoder, len(source.classes), args.frozen)
    head = load_head(model, args.weights) if args.eval_only else None if alone else set()
    if args.weights and not saved:
        world.say(f"{args.weights}: " + told(load_backbone(encoder, args.weights), head))
    channels_last = args.channels_last and family(args.arch).convolutional and not world.on_mps  # faster on a CNN
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = net = model.to(world.device).to(memory_format=memory_format)
    if world.size > 1 and world.on_cuda:
        model = net = nn.SyncBatchNorm.convert_sync_batchnorm(model)         # statistics over all GPUs, as released
    if args.compile:
        model.compile()
    if world.size > 1:
        net = DDP(model, device_ids=[world.local_rank] if world.on_gpu else None, gradient_as_bucket_view=True)

    groups = layer_groups(model, args.weight_decay, args.layer_decay)
    make = {"lamb": Lamb, "sgd": partial(torch.optim.SGD, momentum=0.9),
            "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-8, fused=not world.on_mps)}
    optimizer = make[args.optimizer](groups, lr=0.0)         # the lr comes with each step
    # without fp16 the scale stays 1, and the scaler does one thing: it skips a step with a gradient that is not finite
    scaler = torch.amp.GradScaler(world.device.type, **({} if args.amp == "fp16" else dict(init_scale=1.0)))
    ema = moving_average(model, args.ema, 20 * steps.per_epoch) if args.ema else None
    broken = Broken(source, args.max_bad, args.out)
    return Run(steps, source.classes, loader, labels, val_loader, val_labels, model, net, optimizer, scaler,
               memory_format, broken, ema)


# ---- evaluation ----

def outputs(f, loader: DataLoader, labels: Tensor, args, world: World, run: Run) -> tuple[Tensor, Tensor]:
    """f(images) in float32 and the labels, over this process's part of a set, without unreadable ones: (N, C), (N,)."""
    parts, bad = [], [torch.zeros(0, dtype=torch.long)]
    for images, index, broken in loader:
        images, index, bad = images[broken < 0], index[broken < 0], [*bad, broken[broken >= 0]]
        with torch.autocast(world.device.type, AMP[args.amp], enabled=args.amp != "off"):
            z = f(normalise(images, world.device).contiguous(memory_format=run.memory_format))
        parts.append((z.float(), labels[index].to(world.device)))
    if bad := sorted(world.gather(torch.cat(bad)).tolist()):
        names = name_some(loader.dataset.source, bad)
        world.say(f"{len(bad)} images cannot be read and are left out: {names}")
    return tuple(torch.cat(part) for part in zip(*parts))


@torch.no_grad()
def evaluate(model: Classifier, args: SimpleNamespace, world: World, run: Run) -> dict:
    """Exact accuracies over the whole validation set, on any number of processes. See `score`."""
    training = model.training
    model.eval()
    world.share_buffers(model)
    logits, labels = outputs(model, run.val_loader, run.val_labels, args, world, run)
    model.train(training)
    return score(logits.topk(min(5, logits.shape[1])).indices, labels, logits.shape[1], world)


@torch.no_grad()
def neighbours(model: Classifier, args: SimpleNamespace, world: World, run: Run, temperature: float = 0.07) -> dict:
    """Weighted k-nearest-neighbour accuracy on frozen, mean-pooled features: votes exp(cosine / temperature).

    Every process searches its own part of the training images for the neighbours of all validation images. See `score`.
    Source: Wu et al. 2018."""
    model.eval()
    bank, bank_labels = outputs(model.features, run.loader, run.labels, args, world, run)
    own_part = outputs(model.features, run.val_loader, run.val_labels, args, world, run)
    queries, labels = (world.gather(part) for part in own_part)
    bank, near, k, classes = F.normalize(bank, dim=1), [], args.neighbours, len(run.classes)
    for part in F.normalize(queries, dim=1).split(256):
        values, index = (part @ bank.T).topk(min(k, len(bank)))              # (256, k)
        near.append(torch.stack([values, bank_labels[index].float()]))
    values, votes_for = world.gather(torch.cat(near, dim=1), dim=2)          # (2, N, k * processes)
    values, index = values.topk(min(k, values.shape[1]))
    votes = torch.zeros(len(queries), classes, device=world.device)
    votes.scatter_add_(1, votes_for.gather(1, index).long(), (values / temperature).exp())
    mine = slice(world.rank, None, world.size)               # all were counted by all: each reports a part
    return score(votes.topk(min(5, classes)).indices[mine], labels[mine], classes, world)


@torch.no_grad()
def features(model: Classifier, args: SimpleNamespace, world: World, run: Run) -> None:
    """The mean-pooled features of every image of --data, as the k-NN probe sees them, into features.npz."""
    model.eval()
    z, index = outputs(model.features, run.loader, torch.arange(len(run.labels)), args, world, run)
    write_features(z, index, args, world, run.broken.source)


def main(argv: list[str] | None = None) -> None:
    command_line("finetune.py", parse, train, argv)


# ---- flags: name -> (default, kind, help); a recipe overrides the default, what is typed overrides both ----

yes_no, share, positive, count = bool, number(float, 0, 1), number(float, 0), number(int, 1)
FLAGS = {
    "data": {
        "data": (None, path("DIR"), f"labelled images (train/ and val/, or class folders), or {', '.join(NAMED)}"),
        "labels": (None, path("N"), "train on some labels only: a share such as 0.1, or a count such as 20/class"),
        "image_size": (None, SIDES, "side of the square crop, or its height and width (as pre-trained, else 224)"),
        "test_size": (None, SIDES, "the same of the test crop (--image-size)"),
        "test_crop": (0.875, number(float, 0.1, 1), "test crop over the resized image, which covers it"),
        **DATA_FLAGS},
    "augmentation": {
        "crop_min": (0.5, number(float, 0.01, 1), "smallest area of the random crop"),
        "randaug": (0.0, number(float, 0, 10), "RandAugment magnitude of 10, 2 ops, 0 = none"),
        "jitter": (0.0, share, "colour jitter, 0 to 1"),
        "erasing": (0.0, share, "probability of random erasing, by noise"),
        "mixup": (0.0, positive, "alpha of mixup, 0 = none; with --cutmix too, one of the two per batch"),
        "cutmix": (0.0, positive, "alpha of cutmix, 0 = none"),
        "repeats": (1, count, "augmentations of each image in a batch")},
    "model": {
        "weights": (None, path("FILE"), "backbone.pt, checkpoint.pt, best.pt, torchvision's or a released checkpoint"),
        "init": (None, ("scratch",), "train the same thing from random weights"),
        "arch": (None, checked("NAME", family), "backbone (from args.json beside the weights)"),
        "drop_path": (0.0, number(float, 0, 0.99), "stochastic depth of the deepest block"),
        "patch_size": (16, count, "ViT only (as pre-trained)"),
        "window": (7, count, "Swin only (as pre-trained)"),
        "stem": (None, STEMS, "ResNet only (as pre-trained; from scratch: small below 64 px, else imagenet)")},
    "optimiser": {
        "recipe": ("default", tuple(RECIPES), "the table below; to judge frozen features, take knn for a "
                   "quick look (one pass, nothing is trained), and linear for the accuracy to compare "
                   "(all its 100 epochs)"),
        "optimizer": ("adamw", ("adamw", "lamb", "sgd"),
                      "LAMB for large batches, SGD for linear probes on ImageNet"),
        "epochs": (20, number(float, 0.001, MAX_EPOCHS), "passes over the labelled images; a fraction too"),
        "batch_size": (None, count, "images per process and forward pass (default recipe: 16 in all; GPU 256, CPU 32)"),
        "accum": (1, count, "forward passes per optimiser step"),
        "lr": (1e-3, positive, "per --lr-batch images of the global batch"),
        "lr_batch": (16, count, "see --lr"),
        "layer_decay": (1.0, number(float, 0.01, 1), "lr of each stage (ViT: block), times that of the next"),
        "weight_decay": (0.05, number(float, 0, 1000), "of weights, not of norms and biases"),
        "clip_grad": (0.0, positive, "largest gradient norm, 0 = none"),
        "schedule": ("cosine", ("cosine", "cosine-by-epoch", "cosine-from-0", "probe"), "see engine/optim.py, lr_at"),
        "warmup_epochs": (None, positive, "10, or a tenth of a run shorter than 100"),
        "min_lr": (1e-6, positive, "floor of the cosine"),
        "loss": ("ce", ("ce", "bce"), "cross-entropy, or binary cross-entropy per class"),
        "smoothing": (0.1, share, "label smoothing of ce"),
        "ema": (0.0, share, "decay of the weights' moving average, which is evaluated and saved; 0 = none"),
        "frozen": (False, yes_no, "train the head alone"),
        "neighbours": (20, count, "of the knn recipe")},
    "run": {
        **RUN_FLAGS,
        "eval_every": (10, count, "epochs between evaluations; the last epoch is always evaluated"),
        "eval_only": (False, SWITCH, "evaluate --weights that hold a head (best.pt), and stop")},
}
DEFAULTS = {**defaults(FLAGS), "global_batch": 16}               # and what a recipe alone can set


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe; `given` holds what was typed. Raises ValueError for a value that is off."""
    parser = Parser("finetune.py", "%(prog)s --weights FILE --data DIR [options]", __doc__, FLAGS, RECIPES)
    given = vars(parser.parse_args(argv))
    recipe = {**DEFAULTS, **RECIPES[given.get("recipe", "default")]}
    names = ["arch", "patch_size", "window", "stem"] + ["image_size"] * (not recipe["image_size"])   # as pre-trained
    names += ["test_size", "test_crop"] if "eval_only" in given else []
    recipe |= remembered(given.get("weights"), parser, names)
    recipe |= EXCEPTIONS.get((given.get("recipe"), given.get("arch", recipe["arch"])), {})
    args = SimpleNamespace(**{**recipe, **given}, program="finetune.py", given=given, demo=False)
    if args.resume and args.out:                             # the rest is remembered
        return args
    if args.data is None:
        raise ValueError(f"--data is missing: a folder of labelled images, or one of {', '.join(NAMED)}")
    if (args.weights is None) == (args.init is None):
        raise ValueError("give --weights FILE, or --init scratch to train from random weights")
    if args.arch is None:
        raise ValueError("--arch is missing: no args.json beside the weights names it; try --arch resnet18")
    args.image_size = args.image_size or 224
    if args.init:
        sized = for_small_images(args.arch, args.image_size)
        vars(args).update({name: value for name, value in sized.items() if name not in given})
    return args


if __name__ == "__main__":
    main()
