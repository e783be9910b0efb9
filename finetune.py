"""Fine-tuning: what pre-trained weights are worth on a labelled set. Linear and k-NN probes, and plain evaluation, too.

    python finetune.py --weights runs/shapes-resnet18/backbone.pt --data shapes --labels 0.05                     after the demo
    torchrun --nproc_per_node=8 finetune.py --weights runs/imagenet-resnet50/backbone.pt --data /path/to/imagenet --recipe rsb_a2

Recipes: RECIPES below. Leaves in --out: args.json, log.jsonl, checkpoint.pt (the last state), best.pt (the best epoch's weights
under torchvision's names, head included), result.json (accuracies, per class too), loss.png, confusion.png.
"""

import argparse
import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from data import NAMED, Batches, CropAndFlip, Part, Samples, eval_transform, make_loader, mix, normalise, open_source, save_atomically, save_confusion
from loss import Lamb, layer_groups, lr_at, moving_average
from model import ARCHS, Encoder, build_encoder, family, load_backbone, read_weights
from pretrain import MAX_EPOCHS, MAX_SIDE, Broken, Parser, Processes, begin, command_line, data_flags, filled, fit, load_run, make_out, number, place, plan, run_flags, update

# ---- recipes: every value has a flag of the same name; lr is per `lr_batch` images of the global batch ----

COMMON = dict(
    program="finetune.py", data=None, weights=None, init=None, arch=None, patch_size=16, window=7, drop_path=0.0, frozen=False, labels=None,
    image_size=None, test_size=None, test_crop=0.875, crop_min=0.5, randaug=0.0, jitter=0.0, erasing=0.0, mixup=0.0, cutmix=0.0, repeats=1,
    epochs=20, batch_size=None, global_batch=16, accum=1, optimizer="adamw", lr=1e-3, lr_batch=16, layer_decay=1.0, weight_decay=0.05,
    clip_grad=0.0, schedule="cosine", warmup_epochs=None, min_lr=1e-6, loss="ce", smoothing=0.1, ema=0.0, neighbours=20,
    eval_only=False, eval_every=10, seed=0, amp=None, compile=False, channels_last=True, data_root="datasets", download=False, workers=None,
    out=None, resume=False, log_every=10, save_every="10m", max_bad=0.01)
LONG = dict(global_batch=None, eval_every=1, crop_min=0.08)
RSB = dict(LONG, optimizer="lamb", lr_batch=2048, weight_decay=0.02, schedule="cosine-by-epoch", warmup_epochs=5, loss="bce", mixup=0.1, cutmix=1.0,
           test_size=224, test_crop=0.95)
STRONG = dict(LONG, image_size=224, warmup_epochs=20, mixup=0.8, cutmix=1.0, randaug=9.0, erasing=0.25)  # their jitter of 0.4 does nothing beside RandAugment
RECIPES = {
    "default":  {},                                          # few labels, small data, any backbone
    "rsb_a3":   dict(RSB, image_size=160, epochs=100, lr=8e-3, randaug=6.0),
    "rsb_a2":   dict(RSB, image_size=224, epochs=300, lr=5e-3, randaug=7.0, ema=0.9999, repeats=3, drop_path=0.05),
    "vit":      dict(STRONG, epochs=100, lr=1.25e-3, lr_batch=512, layer_decay=0.65, clip_grad=5.0, ema=0.99996, drop_path=0.1),     # lr: SimMIM's;
    "convnext": dict(STRONG, epochs=300, lr=4e-3, lr_batch=4096, ema=0.9999, drop_path=0.4,      # the released ViT config has four times as much
                     schedule="cosine-from-0", warmup_epochs=5),
    "linear":   dict(LONG, frozen=True, epochs=100, optimizer="sgd", lr=30.0, lr_batch=256, weight_decay=0.0, schedule="probe", warmup_epochs=0, smoothing=0.0),
    "knn":      dict(frozen=True),
}


EXCEPTIONS = {  # as released: (recipe, arch) -> what differs
    ("rsb_a2", "resnet101"): dict(ema=0.0, drop_path=0.1),
    ("vit", "vit_small"): dict(ema=0.0),
    ("vit", "vit_large"): dict(repeats=3),
    ("convnext", "convnext_tiny"): dict(epochs=400, lr=4e-4, weight_decay=0.01, layer_decay=0.7, drop_path=0.1),
    ("convnext", "convnext_base"): dict(drop_path=0.5),
}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Flags over the recipe; `given` holds what was typed. Raises ValueError for a value that is off."""
    table = "\n".join(f"  {name:8} " + "  ".join(f"{k}={v}" for k, v in row.items()) for name, row in RECIPES.items())
    parser = Parser(
        prog="finetune.py", usage="%(prog)s --weights FILE --data DIR [--recipe NAME] [options]", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, epilog=f"recipes, over the default one (a flag overrides):\n{table}")
    yes_no, whole, real, share = argparse.BooleanOptionalAction, number(int, 1), number(float, 0), number(float, 0, 1)
    g = data_flags(parser, f"folder of labelled images (ImageNet's train/ and val/, or class folders), or {', '.join(NAMED)}")
    g.add_argument("--labels", metavar="N", help="train on some labels only: a share such as 0.1, or a count such as 20/class (all)")
    g.add_argument("--test-size", type=number(int, 1, MAX_SIDE), metavar="PX", help="side of the test crop (by recipe, else --image-size)")
    g.add_argument("--test-crop", type=number(float, 0.1, 1), metavar="C", help="test crop over the resized shorter side (0.875, RSB 0.95)")
    g = parser.add_argument_group("augmentation")
    g.add_argument("--crop-min", type=number(float, 0.01, 1), metavar="S", help="smallest area of the random crop (by recipe)")
    g.add_argument("--randaug", type=number(float, 0, 10), metavar="M", help="RandAugment magnitude of 10, 2 ops, 0 = none")
    g.add_argument("--jitter", type=share, metavar="J", help="colour jitter, 0 to 1")
    g.add_argument("--erasing", type=share, metavar="P", help="probability of random erasing, by noise")
    g.add_argument("--mixup", type=real, metavar="A", help="alpha of mixup, 0 = none; with --cutmix too, one of the two per batch")
    g.add_argument("--cutmix", type=real, metavar="A", help="alpha of cutmix, 0 = none")
    g.add_argument("--repeats", type=whole, metavar="R", help="augmentations of each image in a batch (1)")
    g = parser.add_argument_group("model")
    g.add_argument("--weights", type=filled, metavar="FILE", help="backbone.pt, checkpoint.pt, best.pt, torchvision's weights or a released checkpoint")
    g.add_argument("--init", choices=["scratch"], help="train the same thing from random weights")
    g.add_argument("--arch", choices=ARCHS, metavar="NAME", help="backbone (from args.json beside the weights)")
    g.add_argument("--drop-path", type=number(float, 0, 0.99), metavar="P", help="stochastic depth of the deepest block (by recipe)")
    g.add_argument("--patch-size", type=whole, metavar="PX", help="ViT only (as pre-trained, 16)")
    g.add_argument("--window", type=whole, metavar="N", help="Swin only (as pre-trained, 7)")
    g = parser.add_argument_group("optimiser")
    g.add_argument("--recipe", choices=RECIPES, help="the table below (default)")
    g.add_argument("--optimizer", choices=["adamw", "lamb", "sgd"])
    g.add_argument("--epochs", type=number(float, 0.001, MAX_EPOCHS), metavar="N", help="passes over the labelled images; a fraction too")
    g.add_argument("--batch-size", type=whole, metavar="N", help="images per process and forward pass (default recipe: 16 in all; else GPU 256, CPU 32)")
    g.add_argument("--accum", type=whole, metavar="N", help="forward passes per optimiser step (1)")
    g.add_argument("--lr", type=real, metavar="LR", help="per --lr-batch images of the global batch")
    g.add_argument("--lr-batch", type=whole, metavar="N")
    g.add_argument("--layer-decay", type=number(float, 0.01, 1), metavar="D", help="lr of each stage (ViT: block), times that of the next")
    g.add_argument("--weight-decay", type=real, metavar="WD")
    g.add_argument("--clip-grad", type=real, metavar="G", help="largest gradient norm, 0 = none")
    g.add_argument("--schedule", choices=["cosine", "cosine-by-epoch", "cosine-from-0", "probe"], help="cosine: after the warm-up; by-epoch, from-0: from the "
                   "first epoch or iteration on, under the warm-up; probe: x0.1 at 60 and 80 %% of the run")
    g.add_argument("--warmup-epochs", type=real, metavar="N")
    g.add_argument("--min-lr", type=real, metavar="LR", help="floor of the cosine (1e-6)")
    g.add_argument("--loss", choices=["ce", "bce"], help="cross-entropy, or binary cross-entropy per class")
    g.add_argument("--smoothing", type=share, metavar="S", help="label smoothing of ce")
    g.add_argument("--ema", type=share, metavar="M", help="decay of the weights' moving average, which is evaluated and saved; 0 = none")
    g.add_argument("--frozen", action=yes_no, help="train the head alone")
    g.add_argument("--neighbours", type=whole, metavar="K", help="of the knn recipe (20)")
    g = run_flags(parser)
    g.add_argument("--eval-every", type=whole, metavar="N", help="epochs between evaluations; the last epoch is always evaluated")
    g.add_argument("--eval-only", action="store_true", help="evaluate --weights that hold a head (best.pt), and stop")
    given = vars(parser.parse_args(argv))
    recipe = {"recipe": "default", **COMMON, **RECIPES[given.get("recipe", "default")]}
    wanted = ("arch", "patch_size", "window", *(() if recipe["image_size"] else ("image_size",)), *(("test_size", "test_crop") if "eval_only" in given else ()))
    recipe |= how_made(given.get("weights"), parser, wanted) # the backbone's own settings, and its image size where the recipe has none
    recipe |= EXCEPTIONS.get((given.get("recipe"), given.get("arch", recipe["arch"])), {})
    args = SimpleNamespace(**{**recipe, **given}, given=given, demo=False)
    if args.resume and args.out:                             # the rest is remembered
        return args
    if "data" not in given:
        raise ValueError(f"--data is missing: a folder of labelled images, or one of {', '.join(NAMED)}")
    if (args.weights is None) == (args.init is None):
        raise ValueError("give --weights FILE, or --init scratch to train from random weights")
    if args.arch is None:
        raise ValueError(f"--arch is missing: no args.json beside the weights names it; one of {', '.join(ARCHS)}")
    args.image_size = args.image_size or 224
    return args


def how_made(weights: str | None, parser: argparse.ArgumentParser, wanted: tuple[str, ...]) -> dict:
    """The `wanted` settings of the run that left `weights`, from args.json beside them; {} where there is none.

    Raises ValueError where that file is no such record, or holds a value that the flag of that name would refuse."""
    beside = Path(weights or "").parent / "args.json"
    if not weights or not beside.is_file():
        return {}
    try:
        made = json.loads(beside.read_text())
        kept = {key: made[key] for key in wanted if made.get(key) is not None}
    except (ValueError, OSError, AttributeError, RecursionError):
        raise ValueError(f"{beside}: cannot be read as the settings of a run; move it away and give --arch") from None
    for action in parser._actions:
        if action.dest in kept:
            value = kept[action.dest]
            try:
                right = value in action.choices if action.choices else type(value) in (int, float) and action.type(str(value)) == value
            except argparse.ArgumentTypeError:
                right = False
            if not right:
                raise ValueError(f"{beside}: {action.dest} is {value!r}, which {action.option_strings[0]} would refuse; repair it, or move the file away and give the flags")
    return kept


# ---- labels ----

def some_labels(source, labels: str | None, seed: int):
    """A class-balanced part of the source, fixed by the seed: a share ('0.1', at least one per class) or a count ('20/class').

    Raises ValueError where that cannot be read, or a class has too few images."""
    if labels is None:
        return source
    count, share = re.fullmatch(r"(\d+)/class", labels), re.fullmatch(r"0?\.\d+|1(\.0*)?", labels)
    if not (count and int(count[1]) or share and float(labels) > 0):
        raise ValueError(f"--labels {labels}: must be a share such as 0.1, or a count such as 20/class")
    chosen = []
    for label in range(len(source.classes)):
        members = np.flatnonzero(source.labels == label)
        k = int(count[1]) if count else max(1, round(float(labels) * len(members)))
        if k > len(members):
            raise ValueError(f"--labels {labels}: class {source.classes[label]} has {len(members)} images")
        chosen.append(np.random.default_rng((seed, label)).permutation(members)[:k])
    return Part(source, np.sort(np.concatenate(chosen)))


# ---- augmentation ----

class RandAugment(nn.Module):
    """Two operations, each with probability 0.5 and a magnitude of N(m, 0.5) in [0, 10], as timm's 'rand-m<m>-mstd0.5-inc1'.

    The operations are torchvision's, which grow with the magnitude too: without timm's Invert and SolarizeAdd, with
    Identity; magnitudes in 31 bins. Bicubic, and corners filled with (104, 116, 124), as released."""

    def __init__(self, magnitude: float):
        super().__init__()
        self.magnitude = magnitude
        self.by_bin = [v2.RandAugment(num_ops=1, magnitude=b, interpolation=InterpolationMode.BICUBIC, fill=[104, 116, 124]) for b in range(31)]

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(2):
            if torch.rand(()) < 0.5:
                m = self.magnitude + 0.5 * torch.randn(())
                image = self.by_bin[round(3 * float(m.clamp(0, 10)))](tvf.to_pil_image(image))       # torchvision turns tensors bilinearly alone
                image = tvf.pil_to_tensor(image)
        return image


def augment(args: SimpleNamespace) -> v2.Transform:
    """Training augmentation of one image, uint8 in and out: crop, flip, RandAugment, colour jitter. Erasing comes later, see `erase`."""
    steps = [CropAndFlip((args.image_size, args.image_size), args.crop_min, InterpolationMode.BICUBIC)]
    if args.randaug:
        steps.append(RandAugment(args.randaug))
    if args.jitter:
        steps.append(v2.ColorJitter(args.jitter, args.jitter, args.jitter))
    return v2.Compose(steps)


def erase(images: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020) of normalised images (B, 3, H, W): a rectangle of per-pixel normal noise, as released."""
    if not probability:
        return images
    one = v2.RandomErasing(probability, value="random")
    return torch.stack([one(image) for image in images])


def mix_batch(images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) and (B,) -> mixed images and targets (B, classes), lam * one_hot(a) + (1 - lam) * one_hot(b).

    With both alphas, mixup or cutmix with even odds per batch, always one; cutmix's lam is the share really pasted."""
    choices = [make(alpha=alpha, num_classes=classes) for make, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    if not choices:
        return images, F.one_hot(labels, classes).float()
    return choices[int(torch.randint(len(choices), ()))](images, labels)


def class_loss(logits: Tensor, targets: Tensor, loss: str, smoothing: float) -> Tensor:
    """'ce': cross-entropy with label smoothing. 'bce': binary cross-entropy against the mixed targets, mean over classes and
    samples as in the RSB paper and timm (the released code sums over classes). logits, targets (B, classes)."""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


# ---- the classifier ----

class Classifier(nn.Module):
    """Encoder, mean over positions, linear head. With `frozen` the head alone learns, and the encoder stays in eval mode.

    ViT: the mean of the patch tokens (no class token), then a fresh LayerNorm; the pre-training one is dropped. ConvNeXt: its
    own final norm comes after the mean, as in torchvision."""

    HEADS = {"resnet": "fc", "convnext": "classifier.2", "swin": "head", "vit": "head"}

    def __init__(self, arch: str, encoder: Encoder, classes: int, frozen: bool = False):
        super().__init__()
        self.kind, self.encoder, self.frozen, self.norm = family(arch), encoder, frozen, nn.Identity()
        width = encoder.shapes((224, 224) if self.kind != "vit" else encoder.backbone.image_size)[-1]
        width = width[1] if self.kind in ("resnet", "convnext") else width[-1]
        if self.kind == "vit":
            encoder.stages[-1].remove("norm")
            encoder.backbone.norm, self.norm = nn.Identity(), nn.LayerNorm(width, eps=1e-6)
        elif self.kind == "convnext":
            encoder.stages[-1].remove("classifier.0")
        self.head = nn.Linear(width, classes)
        if self.kind == "convnext":                          # as released
            nn.init.trunc_normal_(self.head.weight, std=0.02)
        else:
            nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if frozen:
            encoder.requires_grad_(False)
            self.norm.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()                              # BatchNorm statistics stay as they are
        return self

    def features(self, images: Tensor) -> Tensor:            # (B, 3, H, W) -> (B, C)
        z = self.encoder(images)
        if self.kind == "vit":
            return self.norm(z[:, 1:].mean(1))
        z = z.mean((1, 2)) if self.kind == "swin" else z.mean((2, 3))
        return self.encoder.backbone.classifier[0](z[:, :, None, None]).flatten(1) if self.kind == "convnext" else z

    def forward(self, images: Tensor) -> Tensor:             # (B, 3, H, W) -> (B, classes)
        return self.head(self.features(images))

    def plain_state(self) -> dict[str, Tensor]:
        """All weights under torchvision's names, head included (ViT: BEiT's names, `fc_norm` and `head`)."""
        state = self.encoder.backbone.state_dict() | {f"fc_norm.{k}": v for k, v in self.norm.state_dict().items()}
        return state | {f"{self.HEADS[self.kind]}.{k}": v for k, v in self.head.state_dict().items()}

    def load_head(self, path: str | Path) -> set[str]:
        """The head (ViT: and its norm) from best.pt, a checkpoint, torchvision's or a released file. Returns its names there.

        Raises ValueError where the file holds no head, or one for another number of classes."""
        state = read_weights(path)
        found = {(own, k): next((f"{name}.{k}" for name in names if f"{name}.{k}" in state), None)
                 for own, names in ((self.head, (self.HEADS[self.kind], "head", "head.fc")), (self.norm, ("fc_norm", "norm"))) for k in own.state_dict()}
        if None in found.values():
            raise ValueError(f"{path}: holds no classification head; --eval-only needs one, such as best.pt of a fine-tuned run")
        weight = state[found[self.head, "weight"]]
        if weight.dim() == 2 and len(weight) != self.head.out_features:
            raise ValueError(f"{path}: its head tells {len(weight)} classes apart, the data has {self.head.out_features}")
        if any(state[name].shape != own.state_dict()[k].shape for (own, k), name in found.items()):
            raise ValueError(f"{path}: holds a classification head of another shape; is it another architecture?")
        for own in (self.head, self.norm):
            own.load_state_dict({k: state[found[own, k]] for k in own.state_dict()})
        return set(found.values())


# ---- evaluation ----

def whole(count: int, batch: int, me: Processes) -> list[list[tuple[int, int]]]:
    """Batches that pass once over all of a set: this process takes every world-th image, and none is taken twice."""
    mine = [(0, i) for i in range(me.rank, count, me.world)]
    return [mine[i:i + batch] for i in range(0, len(mine), batch)]


def score(best: Tensor, labels: Tensor, classes: int, me: Processes) -> dict:
    """The counts of all processes, added up: {'top1', 'top5', 'images', 'confusion'}. best (N, 5) classes, likeliest first.

    confusion (C, C): images of each class (row) by prediction (column)."""
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes**2)
    counts = torch.cat([confusion, (best == labels[:, None]).sum()[None]]).double()
    counts = (me.mean(counts) * me.world).round().long().cpu()
    confusion, images = counts[:-1].view(classes, classes), counts[:-1].sum().item()
    return dict(top1=confusion.diag().sum().item() / images, top5=counts[-1].item() / images, images=images, confusion=confusion)


def outputs(f, loader, labels: Tensor, me: Processes, run: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """f(images) in float32 and the labels, over this process's part of a set: (N, C), (N,). Without images that cannot be read."""
    parts, left_out = [], 0
    for images, index, broken in loader:
        images, index, left_out = images[broken < 0], index[broken < 0], left_out + int((broken >= 0).sum())
        with run.autocast():
            z = f(normalise(images, me.device).contiguous(memory_format=run.memory_format))
        parts.append((z.float(), labels[index].to(me.device)))
    if left_out:
        me.say(f"{left_out} images cannot be read and are left out of the count")
    return tuple(torch.cat(part) for part in zip(*parts))


@torch.no_grad()
def evaluate(model: Classifier, me: Processes, run: SimpleNamespace) -> dict:
    """Exact accuracies over the whole validation set, on any number of processes. See `score`."""
    training = model.training
    model.eval()
    me.share_buffers(model)
    logits, labels = outputs(model, run.val_loader, run.val_labels, me, run)
    model.train(training)
    return score(logits.topk(min(5, logits.shape[1])).indices, labels, logits.shape[1], me)


@torch.no_grad()
def neighbours(model: Classifier, me: Processes, run: SimpleNamespace, k: int, temperature: float = 0.07) -> dict:
    """Weighted k-nearest-neighbour accuracy on frozen, mean-pooled features: votes exp(cosine / temperature) (Wu et al. 2018).

    Every process searches its own part of the training images for the neighbours of all validation images. See `score`."""
    model.eval()
    bank, bank_labels = outputs(model.features, run.loader, run.labels, me, run)
    queries, labels = (me.gather(part) for part in outputs(model.features, run.val_loader, run.val_labels, me, run))
    bank, near, classes = F.normalize(bank, dim=1), [], len(run.val.classes)
    for part in F.normalize(queries, dim=1).split(256):
        values, index = (part @ bank.T).topk(min(k, len(bank)))              # (256, k)
        near.append(torch.stack([values, bank_labels[index].float()]))
    values, votes_for = me.gather(torch.cat(near, dim=1), dim=2)             # (2, N, k * world)
    values, index = values.topk(min(k, values.shape[1]))
    votes = torch.zeros(len(queries), classes, device=me.device)
    votes.scatter_add_(1, votes_for.gather(1, index).long(), (values / temperature).exp())
    mine = slice(me.rank, None, me.world)                    # all were counted by all: each reports a part
    return score(votes.topk(min(5, classes)).indices[mine], labels[mine], classes, me)


def report(out: Path, result: dict, classes: list[str], me: Processes, **more) -> None:
    """Says the result, writes result.json (per-class accuracy too) and confusion.png."""
    confusion = result.pop("confusion").double()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    per_class = {name: round(share, 4) for name, share in zip(classes, shares.diag().tolist())}
    me.say(f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} % of {result['images']} images")
    if len(classes) <= 20:
        me.say("per class: " + ", ".join(f"{name} {100 * share:.0f}" for name, share in per_class.items()))
    if me.rank == 0:
        (out / "result.json").write_text(json.dumps({**result, **more, "per_class": per_class}, indent=1) + "\n")
        save_confusion(out / "confusion.png", shares, classes)


# ---- the run ----

def prepare(args: SimpleNamespace, me: Processes, saved: dict | None) -> SimpleNamespace:
    """Data, model, weights and optimiser. Raises ValueError."""
    run, size = SimpleNamespace(trains=not args.eval_only and args.recipe != "knn"), (args.image_size, args.image_size)
    test = (args.test_size or args.image_size,) * 2
    if args.download:
        me.agree(lambda: len(open_source(args.data, "train", size, args.data_root, download=True, labelled=True)))
    source, run.val = (open_source(args.data, split, s, args.data_root, labelled=True) for split, s in (("train", size), ("val", test)))
    if list(source.classes) != list(run.val.classes):
        odd = sorted(set(source.classes) ^ set(run.val.classes))
        raise ValueError(f"--data {args.data}: train/ and val/ hold different classes ({', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''})")
    if test != size and family(args.arch) == "vit" and run.trains:
        raise ValueError(f"--test-size {test[0]}: a ViT has one grid of positions; use the --image-size, {size[0]}")
    if len(run.val) < me.world:
        raise ValueError(f"--data {args.data}: {len(run.val)} validation images are too few for {me.world} processes")
    source = some_labels(source, args.labels, args.seed)
    run.labels, run.val_labels = torch.from_numpy(source.labels).long(), torch.from_numpy(run.val.labels).long()

    if not run.trains:
        args.batch_size = 1                                  # no step is too large where none is made
    elif args.global_batch and not args.batch_size:
        args.global_batch = min(args.global_batch, len(source))
    plan(run, args, me, len(source), saved)
    at_once = 256 if me.on_gpu else 64                       # images per forward pass of an evaluation
    batches = whole(len(source), at_once, me)
    if run.trains:
        batches = Batches(len(source), run.batch, args.accum, me.world, me.rank, args.seed, run.start, run.total, args.repeats)
    run.loader = make_loader(Samples(source, augment(args) if run.trains else eval_transform(size, args.test_crop), args.seed), batches, run.workers, me.on_gpu)
    run.val_loader = make_loader(Samples(run.val, eval_transform(test, args.test_crop), args.seed), whole(len(run.val), at_once, me), run.workers, me.on_gpu)

    torch.manual_seed(mix(args.seed))                        # every process starts from the same head
    encoder = build_encoder(args.arch, size if run.trains else test, args.drop_path, args.patch_size, args.window)
    model = Classifier(args.arch, encoder, len(source.classes), args.frozen)
    head = model.load_head(args.weights) if args.eval_only else set()
    if args.weights and not saved:
        found = load_backbone(encoder, args.weights)
        new = ["head"] * (not args.eval_only) + found["missing"]
        unused = [n for n in found["skipped"] if n not in head]
        odd = [n for n in unused if not n.startswith(("decoder.", "mask_token.", "neck."))]
        me.say(f"{args.weights}: {len(found['used'])} tensors loaded" + (", and the head" if head else "")
               + (f", {len(found['resized'])} of them resized" if found["resized"] else "")
               + f"; new: {', '.join(new[:4]) or 'none'}; not used: {len(unused)}" + (f" ({', '.join(odd[:4])})" if odd else ""))
    place(run, model, args, me)
    run.peak = args.lr * run.global_batch / args.lr_batch
    groups = layer_groups(run.model, args.weight_decay, args.layer_decay)
    if args.optimizer == "lamb":
        run.optimizer = Lamb(groups, lr=0.0)
    elif args.optimizer == "sgd":
        run.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    else:
        run.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    run.ema = moving_average(run.model, args.ema, 20 * run.per_epoch) if args.ema else None
    run.best, run.broken = Best(top1=-1.0), Broken(source, args.max_bad, Path(args.out))
    run.keeps = dict(model=run.model, optimizer=run.optimizer, scaler=run.scaler, broken=run.broken, best=run.best, **({"ema": run.ema} if args.ema else {}))
    return run


class Best(dict):
    """The best epoch so far, kept in the checkpoint beside the rest."""
    state_dict, load_state_dict = dict.copy, dict.update


def lr_of(step: int, base: float, args: SimpleNamespace, run: SimpleNamespace) -> float:
    """lr of a group at an iteration: loss.lr_at's cosine; RSB's, which moves once an epoch, and ConvNeXt's, which moves with every
    iteration, both counted from 0 under a ramp that rises from 1e-5, as released; or the linear probe's, x0.1 at 60 and 80 % of the run."""
    if args.schedule == "probe":
        return base * 0.1 ** sum(step >= share * run.total for share in (0.6, 0.8))
    if args.schedule in ("cosine-by-epoch", "cosine-from-0"):
        done = min(1.0, step / run.warmup) if run.warmup else 1.0
        at, total = (step // run.per_epoch, args.epochs) if args.schedule == "cosine-by-epoch" else (step, run.total)
        return (1e-5 + (1 - 1e-5) * done) * lr_at(at, total, 0, base, args.min_lr, "cosine")
    return lr_at(step, run.total, run.warmup, base, args.min_lr, "cosine")


def train_step(step: int, stream, args: SimpleNamespace, me: Processes, run: SimpleNamespace) -> dict[str, Tensor]:
    """One optimiser step; returns this process's mean loss, still on the device. Randomness comes from (seed, step)."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr_of(step, run.peak * group["scale"], args, run)
    torch.manual_seed(mix(args.seed, step, me.rank))         # stochastic depth, mixup, cutmix
    record = 0.0
    for part in range(args.accum):
        images, index, broken = next(stream)
        run.broken.note(broken)
        images, targets = mix_batch(erase(normalise(images, me.device), args.erasing), run.labels[index].to(me.device, non_blocking=True), len(run.val.classes), args.mixup, args.cutmix)
        meet = part == args.accum - 1 or me.world == 1       # processes average their gradients once a step
        with contextlib.nullcontext() if meet else run.net.no_sync():
            with run.autocast():
                logits = run.net(images.contiguous(memory_format=run.memory_format))     # (B, classes)
            loss = class_loss(logits.float(), targets, args.loss, args.smoothing)
            run.scaler.scale(loss / args.accum).backward()
        record = record + loss.detach() / args.accum
    update(run, args.clip_grad)
    if run.ema:
        run.ema.update_parameters(run.model)
    return {"loss": record}


def train(args: SimpleNamespace, me: Processes) -> None:
    """The whole run. Raises ValueError for a mistake, before it starts; Failed and Stopped as `fit`."""
    how = "eval" if args.eval_only else args.recipe + ("-scratch" if args.init else "")
    args, out, saved = begin(args, me, COMMON, f"{Path(args.data or '').resolve().name}-{args.arch}-{how}")
    run = prepare(args, me, saved)
    if saved:
        load_run(saved, run, out)
    me.say(f"{args.arch}, {args.init or args.weights}; {args.data}: " + ("" if args.eval_only else f"{len(run.labels)} labelled images at {args.image_size} px, ")
           + f"{len(run.val.classes)} classes, {len(run.val)} images for validation\n{'evaluation only' if args.eval_only else 'recipe ' + args.recipe}; {me.world} x {me.device.type}, amp {run.amp}; writing {out}/")
    tested = run.ema.module if run.ema else run.model
    make_out(args, me, run, out)
    if not run.trains:
        if args.eval_only:
            return report(out, evaluate(tested, me, run), run.val.classes, me, weights=args.weights)
        return report(out, neighbours(tested, me, run, args.neighbours), run.val.classes, me, labels=len(run.labels), weights=args.weights)
    me.say(f"global batch {run.global_batch}, peak lr {run.peak:.2e}, {args.epochs:g} epochs of {run.per_epoch} steps")

    def after_step(done: int, write) -> None:
        epoch, inside = divmod(done, run.per_epoch)
        if done < run.total and (inside or epoch % args.eval_every):
            return
        run.result = evaluate(tested, me, run)
        me.say(f"epoch {done / run.per_epoch:g}: top-1 {100 * run.result['top1']:.2f} %")
        if run.result["top1"] > run.best["top1"]:
            run.best.update(top1=run.result["top1"], epoch=done / run.per_epoch)
            if me.rank == 0:
                write("best.pt", save_atomically, tested.plain_state(), out / "best.pt")

    run.model.train()
    fit(args, me, run, out, train_step, after_step, lambda: None)
    report(out, run.result, run.val.classes, me, best_top1=run.best["top1"], best_epoch=run.best["epoch"], labels=len(run.labels), weights=args.weights or args.init)


def main(argv: list[str] | None = None) -> None:
    command_line("finetune.py", parse, train, argv)


if __name__ == "__main__":
    main()
