"""What detection and segmentation share.

    Maps      an Encoder as the bottom of a dense head: four maps (B, C, h, w), strides 4, 8, 16, 32
    Scenes    pictures of several objects with masks and classes, drawn from (seed, split, index)
    resume_or_start, plan_steps, rate, start_encoder, layout_for
              a run counted in iterations, as the released recipes are
    some_usable, left_out, read_state, load_state, describe_recipe
              what both programs check and print
"""

import re
import sys
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import masks_to_boxes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import default_workers
from engine.shapes import SHAPES, draw_shape, texture
from engine.command import Distributed
from engine.files import load_checked, printable
from engine.flags import MAX_EPOCHS, NONNEGATIVE, height_width, number
from engine.images import UNREADABLE, reason
from engine.checkpointer import StepPlan, open_run, steps_per_epoch
from engine.optim import lr_at
from engine.settings import resolve_batch, resumed
from engine.step import memory_format
from engine.weights import load_backbone, summary_of
from model import STEMS, Encoder, build_encoder, get_family

# ---- four maps of any encoder ----

class Maps(nn.Module):
    """Four feature maps of an encoder, finest first, with `channels`, at strides 4, 8, 16 and 32 of
    the image.

    They are what the last module at each stride gives: layer1 to layer4 of a ResNet, the odd
    `features` of ConvNeXt and Swin. A backbone that ends in a LayerNorm has one per map instead.
    All blocks of a ViT have the stride of its patches: four of them are taken, and brought to four
    strides by deconvolution and pooling (mmsegmentation's Feature2Pyramid). With patches of 8 px
    these are 2, 4, 8 and 16.
    Load weights before: a final norm leaves the encoder. Raises ValueError if the four strides are
    not there."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.vit = hasattr(encoder.backbone, "grid")
        last = encoder.stages[-1][-1]
        final = attrgetter(last)(encoder.backbone)
        if isinstance(final, nn.LayerNorm):
            encoder.stages[-1].remove(last)
            encoder.backbone.set_submodule(last, nn.Identity())
        taps = self.find_taps()                              # name -> channels
        self.taps = list(taps)
        self.channels = list(taps.values())
        self.turn = nn.ModuleList(nn.Identity() for _ in taps)
        if self.vit:
            self.turn = pyramid(self.channels[0])
        elif isinstance(final, nn.LayerNorm):
            self.turn = nn.ModuleList(LayerNorm2d(C, eps=1e-6) for C in self.channels)
            self.turn[-1].load_state_dict(final.state_dict())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> four maps (B, C, H/4, W/4) to (B, C, H/32, W/32)."""
        z, found = images, []
        for stage in self.encoder.stages:
            for name in stage:
                module = attrgetter(name)(self.encoder.backbone)
                z = self.encoder.recomputed(module, z)
                if name in self.taps:
                    found.append(self.to_map(z))             # (B, C, h, w)
        return [turn(z) for turn, z in zip(self.turn, found)]

    def to_map(self, z: Tensor) -> Tensor:
        """Features in the encoder's layout -> (B, C, h, w); a class token is dropped."""
        if z.dim() == 3:
            h, w = self.encoder.backbone.grid
            return z[:, -h * w:].transpose(1, 2).unflatten(2, (h, w))
        return z.permute(0, 3, 1, 2) if self.encoder.layout == "nhwc" else z

    @torch.no_grad()
    def find_taps(self) -> dict[str, int]:
        """The names of the four modules that are tapped, with their channels."""
        encoder, found = self.encoder, {}
        if self.vit:                                         # blocks 4, 6, 8, 12 of 12: as released
            depth = len(encoder.backbone.blocks)
            C = encoder.backbone.cls_token.shape[-1]
            return {f"blocks.{round(k * depth / 12) - 1}": C for k in (4, 6, 8, 12)}
        training = encoder.training
        side = 128
        z = torch.zeros(1, encoder.channels, side, side)
        encoder.eval()                                       # BatchNorm statistics stay as they are
        try:
            names = [name for stage in encoder.stages for name in stage]
            for name in names:
                z = attrgetter(name)(encoder.backbone)(z)
                found[side // self.to_map(z).shape[2]] = (name, self.to_map(z).shape[1])
        except RuntimeError:                                 # of one image size, as MaxViT is
            found = {}
        encoder.train(training)
        if not {4, 8, 16, 32} <= set(found):
            raise ValueError("this backbone has no maps at strides 4, 8, 16 and 32 for images of "
                             "any size; use --arch resnet50, convnext_tiny, swin_tiny or vit_base, "
                             "and of a ResNet --stem imagenet")
        return dict(found[stride] for stride in (4, 8, 16, 32))


def pyramid(C: int) -> nn.ModuleList:
    """A map of stride 16 -> 4, 8, 16, 32. LayerNorm, as in ViTDet, where mmsegmentation has
    SyncBN."""
    def up():
        return nn.ConvTranspose2d(C, C, 2, stride=2)

    finest = nn.Sequential(up(), LayerNorm2d(C, eps=1e-6), nn.GELU(), up())
    return nn.ModuleList([finest, up(), nn.Identity(), nn.MaxPool2d(2)])


# ---- scenes: the built-in dense set ----

class Scenes:
    """1 to 4 of the ten outlines of `shapes` on a faintly textured ground, anywhere, drawn from
    (seed, split, index).

    Later objects cover earlier ones; one with fewer than 16 visible pixels is left out. Class 0 is
    the ground."""

    def __init__(self, split: str, size: tuple[int, int], seed: int = 0):
        self.key = (seed, 2 if split == "train" else 3)      # `shapes` has 0 and 1
        self.size = size
        self.count = 10_000 if split == "train" else 500
        self.classes = ["ground", *SHAPES]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"scene {index}"

    def draw(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """image uint8 (3, H, W), disjoint masks bool (n, H, W), labels int64 (n,) from 1 to 10; n
        may be 0."""
        rng = np.random.default_rng((*self.key, index))
        H, W = self.size
        side = min(H, W)
        y, x = np.mgrid[:H, :W].astype(np.float32) / side
        ground = rng.uniform(0.1, 0.6, 3)
        canvas = texture(rng, x, y, ground)
        masks, labels = [], []
        for _ in range(rng.integers(1, 5)):
            kind = rng.integers(len(SHAPES))
            radius = rng.uniform(0.10, 0.28)
            cx = rng.uniform(0.08, W / side - 0.08)          # some reach over the edge
            cy = rng.uniform(0.08, H / side - 0.08)
            alpha, rows, cols = draw_shape(canvas, rng, kind, radius, cx, cy, ground)
            mask = np.zeros((H, W), bool)
            mask[rows, cols] = alpha >= 0.5
            masks = [below & ~mask for below in masks] + [mask]
            labels.append(int(kind) + 1)
        seen = [i for i, mask in enumerate(masks) if mask.sum() >= 16]
        if seen:
            masks = np.stack([masks[i] for i in seen])
        else:
            masks = np.zeros((0, H, W), bool)
        image = torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8))
        labels = torch.tensor([labels[i] for i in seen], dtype=torch.long)
        return image, torch.from_numpy(masks), labels

    def read(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """For detection: the image, and its objects: boxes (n, 4), x1 y1 x2 y2 with excluded ends,
        labels, masks."""
        image, masks, labels = self.draw(index)
        boxes = masks_to_boxes(masks).float().view(-1, 4)
        boxes[:, 2:] += 1                                    # torchvision's ends are included
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.size)
        target = dict(boxes=boxes, labels=labels, masks=tv_tensors.Mask(masks.byte()))
        return tv_tensors.Image(image), target


class Semantic(Scenes):
    """The same scenes with one class per pixel."""

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """For segmentation: the image, and the class of every pixel, uint8 (H, W)."""
        image, masks, labels = self.draw(index)
        # the masks are disjoint: at most one number is not 0
        classes = (masks * labels[:, None, None]).sum(0, dtype=torch.uint8)
        return tv_tensors.Image(image), tv_tensors.Mask(classes)

    def label_name(self, index: int) -> str:
        """As of pixels.Pairs: the file of a label picture."""
        return f"scene-{index:05}.png"


def stacked(samples: list) -> list:
    """Batches for segmentation: images (B, 3, H, W), classes (B, H, W), index (B,), broken (B,)."""
    plain = []
    for (image, classes), index, broken in samples:
        plain.append((image.as_subclass(Tensor), classes.as_subclass(Tensor), index, broken))
    return default_collate(plain)


def listed(samples: list) -> list:
    """Batches for detection, whose images differ in size: two lists, index (B,), broken (B,)."""
    images, targets = zip(*(pair for pair, *_ in samples))
    return [list(images), list(targets), *default_collate([tuple(rest) for _, *rest in samples])]


# ---- images that cannot be used ----

def name_and_reason(source, index: int, file: str) -> str:
    """The file of an image, and what is wrong with it: it is read again to find out."""
    try:
        source.read(index)
        return printable(file)
    except Exception as error:
        return f"{printable(file)} ({reason(error)})"


def some_usable(source, what: str, args: SimpleNamespace, world: Distributed) -> None:
    """Reads images until one can be used. Raises ValueError if the first hundred cannot.

    what: the set in words, such as "images for training".
    The loader would find the same, but only in a worker and after the run has begun."""
    def first_reason() -> str:
        for index in range(min(100, len(source))):
            try:
                source.read(index)
                return ""
            except UNREADABLE:
                continue
        return source.name(0)

    if complaint := world.broadcast_from_rank0(first_reason):
        first = "first hundred " if len(source) > 100 else ""
        others = " and the others" if len(source) > 1 else ""
        raise ValueError(f"--data {args.data}: none of the {first}{what} can be used: {complaint}"
                         f"{others}")


def left_out(source, indices: list[int], world: Distributed) -> None:
    """Prints which images an evaluation left out, and why. All processes take part.

    indices: of the images that this process left out."""
    mine = torch.tensor(indices, dtype=torch.long)
    if missing := sorted(world.all_gather(mine).tolist()):
        names = ", ".join(source.name(index) for index in missing[:3])
        names += ", ..." if len(missing) > 3 else ""
        world.print0(f"{len(missing)} images cannot be read and are left out of the count: {names}")


def evenly_spaced(count: int, most: int) -> list[int]:
    """Up to `most` positions in a list of `count` things, evenly spaced: for a sheet of pictures.
    Neighbours in a list may be frames of one film."""
    some = min(count, most)
    return [i * count // some for i in range(some)]


def same_size(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (3, h, w) in [0, 1], stacked to (N, 3, H, W): white beside the smaller ones."""
    H = max(picture.shape[1] for picture in pictures)
    W = max(picture.shape[2] for picture in pictures)
    padded = []
    for picture in pictures:
        right, bottom = W - picture.shape[2], H - picture.shape[1]
        padded.append(F.pad(picture, (0, right, 0, bottom), value=1.0))
    return torch.stack(padded)


def check_part(name: str) -> None:
    """Raises ValueError unless a name can be a part of file names."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{printable(name)}: must be a name such as test: letters, digits, '.', "
                         f"'_' and '-'")


def read_state(file: str, wrong: str) -> dict[str, Tensor]:
    """The state dict in best.pt of a run. Raises ValueError, with the reason `wrong`, if the file
    holds none."""
    try:
        state = load_checked(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except Exception:                                        # of a broken file, any type
        raise ValueError(f"{file}: {wrong}") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file}: {wrong}")
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], file: str, wrong: str) -> None:
    """Raises ValueError, with the reason `wrong`, if the state is of another model."""
    try:
        model.load_state_dict(state)
    except Exception:                                        # any type, if values are no tensors
        raise ValueError(f"{file}: {wrong}") from None


# ---- a run counted in iterations ----

STEM = (None, STEMS, "ResNet only (as pre-trained; from scratch: imagenet)")
FEW_IMAGES = 2000                                            # to train on: see the recipes `small`
MOST_STEPS, MOST_IMAGES = 10**9, 10**6                       # more is a slip of the keyboard
OPTIM_FLAGS = {
    "optimizer": ("adamw", ("adamw", "sgd"), "SGD with momentum 0.9"),
    "epochs": (20, number(float, 0.001, MAX_EPOCHS),
               "passes over the training images; a fraction too"),
    "iterations": (None, number(int, 1, MOST_STEPS), "steps, in place of --epochs"),
    "batch_size": (None, number(int, 1, MOST_IMAGES),
                   "images per process and forward pass (by recipe: 8 or 16 in all)"),
    "accum": (1, number(int, 1, MOST_IMAGES), "forward passes per optimiser step"),
    "lr": (1e-4, NONNEGATIVE, "per --lr-batch images of the global batch"),
    "lr_batch": (16, number(int, 1, MOST_IMAGES), "see --lr"),
    "layer_decay": (1.0, number(float, 0.01, 1),
                    "lr of each stage (ViT: block), times that of the next"),
    "weight_decay": (0.05, number(float, 0, 1000), "of weights, not of norms and biases"),
    "clip_grad": (0.0, NONNEGATIVE, "largest gradient norm, 0 = none"),
    "schedule": ("cosine", ("cosine", "poly", "steps"),
                 "steps: x0.1 at two milestones of the recipe"),
    "power": (1.0, number(float, 0, 100), "exponent of the poly schedule"),
    "warmup": (0, number(int, 0, MOST_STEPS),
               "steps of linear warm-up, at most a tenth of the run"),
    "min_lr": (0.0, NONNEGATIVE, "floor of cosine and poly"),
}


def resume_or_start(args: SimpleNamespace, world: Distributed, own: dict, name: str,
                    flags: dict) -> tuple[SimpleNamespace, dict | None]:
    """(settings, checkpoint): opens the output folder (engine.checkpointer.open_run).

    own: the program's default settings. A resumed run has its own settings, then what was typed."""
    args.out, checkpoint = open_run(args.given, world, args.program, name, flags)
    if checkpoint:
        recent = dict(given=args.given, demo=False, out=args.out)
        args = SimpleNamespace(**{**resumed(own, checkpoint["args"], args.given), **recent})
    args.amp = args.amp or world.default_amp()
    if args.workers is None:
        args.workers = default_workers(world)
    return args, checkpoint


def plan_steps(args: SimpleNamespace, world: Distributed, images: int,
               checkpoint: dict | None) -> StepPlan:
    """StepPlan.plan for a run that may be given in iterations, and with a warm-up in iterations.

    Sets the batch sizes in `args`. What was typed last counts: --epochs or --iterations."""
    vars(args).update(resolve_batch(vars(args), world))
    typed = args.given if {"epochs", "iterations"} & {*args.given} else args.typed
    if "epochs" in typed and "iterations" not in typed:
        args.iterations = None
    epochs = args.epochs
    if args.iterations:
        epochs = args.iterations / steps_per_epoch(images, args.global_batch)
    args.warmup_epochs = 0.0                                 # it is counted in iterations
    plan = StepPlan.plan(SimpleNamespace(**{**vars(args), "epochs": epochs}), world, images,
                         checkpoint)
    plan.warmup = min(args.warmup, plan.total // 10)
    return plan


def rate(step: int, steps: StepPlan, base: float, args: SimpleNamespace) -> float:
    """lr of one parameter group at a step, as released (mmcv).

    t = step, T = all steps, W = steps of the warm-up:

    poly     floor + (base - floor) (1 - t/T)^power
    steps    base, x0.1 at each of args.milestones, shares of the run
    cosine   engine.optim.lr_at
    In the warm-up the lr of poly and steps is multiplied by r + (1 - r) t/W. r is 1e-6 for poly
    (mmsegmentation) and 0.001 for steps (mmdetection, detectron2)."""
    T, W = steps.total, steps.warmup
    floor = min(args.min_lr, base)
    if args.schedule == "cosine":
        return lr_at(step, T, W, base, floor, "cosine")
    first = 1e-6 if args.schedule == "poly" else 0.001
    ramp = first + (1 - first) * min(1.0, step / W) if W else 1.0
    if args.schedule == "poly":
        return ramp * (floor + (base - floor) * (1 - step / T) ** args.power)
    return ramp * base * 0.1 ** sum(step >= share * T for share in args.milestones)


def describe_recipe(args: SimpleNamespace) -> str:
    """The recipe, and whether it was chosen for the number of images."""
    if args.eval_only:
        return "evaluation only"
    chosen = args.recipe == "small" and "recipe" not in args.typed and not args.resume
    return f"recipe {args.recipe}" + (f" (under {FEW_IMAGES:,} images)" if chosen else "")


def start_encoder(args: SimpleNamespace, world: Distributed, checkpoint: dict | None) -> Encoder:
    """The encoder, with --weights unless they come later: with a checkpoint, or to be evaluated."""
    encoder = build_encoder(args.arch, height_width(args.image_size), args.drop_path,
                            args.patch_size, args.window, args.stem)
    if args.grad_checkpoint:
        encoder.checkpoint_gradients()
    if args.weights and not checkpoint and not args.eval_only:
        found = load_backbone(encoder, args.weights)
        world.print0(f"{args.weights}: {summary_of(found)}")
    return encoder


def layout_for(args: SimpleNamespace, world: Distributed) -> torch.memory_format:
    return memory_format(args, world, get_family(args.arch).convolutional)
