"""The model: an encoder cut into stages, a mask token between two of them, a linear decoder.

    A2MIM          the whole forward pass of pre-training
    build_decoder  features -> pixels, one linear layer
    Encoder        any backbone as a list of stages
    Classifier     an encoder with a linear head, for fine-tuning
    build_encoder  a backbone by its name
    ViT            the Transformer of the released code, which torchvision lacks
"""

from __future__ import annotations  # A2MIM comes first, and names classes from further down

import math
from collections import OrderedDict
from difflib import get_close_matches
from operator import attrgetter
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from engine.chain import drop_residuals, split_into_stages
from engine.flags import height_width
from masking import MaskToken, expand_mask, fill_hidden, mask_grid, resize_mask

# ---- A2MIM ----

class A2MIM(nn.Module):
    """Masked image modeling with any encoder: fill, encode with a mask token inside, decode.

    encoder      an Encoder, or a plain list of nn.Module stages
    image_size   pixels, one side or (H, W); every stride and the mask size must divide it
    mask_size    side of a mask unit in pixels; at least the stride where the token enters
    token_stage  the token enters before this stage of the encoder
                     0     the image itself
                     1     after the stem or the patch embedding
                     4     before the last stage of a CNN
                     None  encoder.token_stage: ResNet and ConvNeXt 4, ViT and Swin 1, as released;
                           a list of modules: the last
    token, fill  see masking.MaskToken and masking.fill_hidden

    Raises ValueError if the sizes do not fit. Source: paper, Fig. 3."""

    def __init__(self, encoder: Encoder | Sequence[nn.Module],
                 image_size: int | tuple[int, int] = 224, mask_size: int = 32,
                 token_stage: int | None = None, token: str = "gamma", fill: str = "mean",
                 layout: str = "nchw"):
        super().__init__()
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder, layout=layout)
        self.token_stage = self.encoder.token_stage if token_stage is None else token_stage
        if not 0 <= self.token_stage < len(self.encoder.stages):
            last = len(self.encoder.stages) - 1
            raise ValueError(f"token stage {token_stage}: this encoder has stages 0 to {last}")
        self.image_size = height_width(image_size)
        self.mask_size = mask_size
        self.fill = fill
        self.grid = mask_grid(self.image_size, mask_size)    # (gh, gw)

        shapes = self.encoder.shapes(self.image_size)
        before_token, last = shapes[self.token_stage], shapes[-1]
        token_layout = "nchw" if self.token_stage == 0 else self.encoder.layout
        no_mask = torch.zeros(1, *self.grid)
        # raises if the mask does not fit there
        expand_mask(no_mask, torch.empty(before_token), token_layout)
        self.mask_token = MaskToken(channels_of(before_token, token_layout), token, token_layout)

        self.stride = self.find_stride(last)
        width = channels_of(last, self.encoder.layout)
        self.decoder = build_decoder(width, self.encoder.channels, self.stride)

    def forward(self, images: Tensor, mask: Tensor,
                generator: torch.Generator | None = None) -> Tensor:
        """images (B, 3, H, W), normalised; mask (B, gh, gw), True = hidden. Returns reconstructions
        (B, 3, H, W). The generator is for the fill 'random'."""
        # idea 1: hidden pixels take the image's mean colour
        z = fill_hidden(images, mask, self.fill, generator)  # (B, 3, H, W)
        for stage in range(len(self.encoder.stages)):
            if stage == self.token_stage:                    # ResNet: before stage 4, at stride 16
                # idea 2: the mask token joins the features at hidden places
                z = self.mask_token(z, mask)                 # (B, C, h, w)
            z = self.encoder.run_stage(stage, z)
        z = self.to_map(z)                                   # (B, C, H/s, W/s), s = 32, ViT 16
        return self.decoder(z)                               # (B, 3, H, W): s x s pixels a feature

    def to_map(self, z: Tensor) -> Tensor:
        """Features in the encoder's layout -> (B, C, h, w). A class token is dropped."""
        if z.dim() == 3:
            h, w = (side // self.stride for side in self.image_size)
            return z[:, -h * w:].transpose(1, 2).unflatten(2, (h, w))
        return z.permute(0, 3, 1, 2) if self.encoder.layout == "nhwc" else z

    def find_stride(self, last: torch.Size) -> int:
        """Pixels per feature of the encoder's output. Raises ValueError unless it is one whole
        number for both sides."""
        H, W = self.image_size
        if len(last) == 3:                                   # (1, N, C), perhaps a class token
            for patches in (last[1], last[1] - 1):
                s = math.isqrt(H * W // max(patches, 1))
                if s and H % s == 0 and W % s == 0 and (H // s) * (W // s) == patches:
                    return s
        elif len(last) == 4:
            h, w = last[1:3] if self.encoder.layout == "nhwc" else last[2:]
            if H % h == 0 and W % w == 0 and H // h == W // w:
                return H // h
        raise ValueError(f"image size {H}x{W}: the encoder turns it into features "
                         f"{tuple(last[1:])}, which do not tile it; use sides that are multiples "
                         f"of the encoder's stride")

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For pictures, in eval mode: (the filled input, the reconstruction, the image with hidden
        patches replaced). Raises ValueError if the model was trained for another target."""
        def new_generator():                                 # the fill 'random': twice the same
            return torch.Generator(images.device).manual_seed(0)

        training = self.training
        self.eval()
        # forward, because self(...) may be compiled for another batch size
        reconstruction = self.forward(images, mask, new_generator()).float()
        self.train(training)
        if reconstruction.shape != images.shape:
            raise ValueError(f"this model reconstructs maps {tuple(reconstruction.shape[1:])}, and "
                             f"no image {tuple(images.shape[1:])}")
        pasted = torch.where(resize_mask(mask, self.image_size), reconstruction, images)
        seen = fill_hidden(images, mask, self.fill, new_generator())
        return seen, reconstruction, pasted


def channels_of(shape: torch.Size, layout: str) -> int:
    """The channels of features (B, C, h, w), (B, h, w, C) or (B, N, C)."""
    return shape[1] if len(shape) == 4 and layout == "nchw" else shape[-1]


def build_decoder(width: int, channels: int, stride: int) -> nn.Module:
    """One linear layer, (B, width, h, w) -> (B, channels, h stride, w stride): each feature fills
    its own square."""
    linear = nn.Conv2d(width, channels * stride**2, 1)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.PixelShuffle(stride))


# ---- a backbone as a list of stages ----

class Encoder(nn.Module):
    """A backbone as `stages` that run one after another; a mask token may enter before any of them.

    backbone     holds the parameters under its own names: `backbone.pt` is its state dict
    stages       for each stage, the names of the modules or methods of `backbone` that it runs.
                 Stage 0 is the stem or the patch embedding
    token_stage  where the token enters unless A2MIM is told otherwise
    layout       of the features: 'nchw', or 'nhwc' for Swin
    levels       for layer-wise lr decay, groups of modules that share a learning rate, from input
                 to output (default: one group per stage)
    head_name    attribute of torchvision's net that holds its head, which Classifier restores;
                 '' = Classifier adds a linear head

    A list of modules instead of a backbone makes each module a stage: Encoder([stem, block1,
    block2])."""

    def __init__(self, backbone: nn.Module | Sequence[nn.Module],
                 stages: list[list[str]] | None = None, token_stage: int = -1,
                 layout: str = "nchw", head_name: str = "",
                 levels: list[list[str]] | None = None):
        super().__init__()
        if stages is None:
            backbone = nn.Sequential(*backbone)
            stages = [[str(i)] for i in range(len(backbone))]
        self.backbone = backbone
        self.stages = stages
        self.token_stage = token_stage % len(stages)
        self.layout = layout
        self.head_name = head_name
        self.levels = levels or stages
        self.recompute = False                               # see checkpoint_gradients

    @property
    def channels(self) -> int:
        """Of the images that it takes: the input channels of its first convolution, or 3."""
        return next((m.in_channels for m in self.modules() if isinstance(m, nn.Conv2d)), 3)

    def run_stage(self, stage: int, z: Tensor) -> Tensor:
        return self.recomputed(self.run_modules, stage, z)

    def recomputed(self, function, *given) -> Tensor:
        """function(*given). After `checkpoint_gradients` the backward pass runs it again."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *given, use_reentrant=False)
        return function(*given)

    def run_modules(self, stage: int, z: Tensor) -> Tensor:
        for name in self.stages[stage]:
            # found by name at each call, because SyncBN or a fork may have replaced the module
            z = attrgetter(name)(self.backbone)(z)
        return z

    def forward(self, images: Tensor) -> Tensor:
        """The plain backbone: normalised images (B, 3, H, W) -> features in the backbone's own
        layout."""
        z = images
        for stage in range(len(self.stages)):
            z = self.run_stage(stage, z)
        return z

    def checkpoint_gradients(self) -> None:
        """From now on only the inputs of the stages are stored, and the backward pass computes the
        rest again: less memory, about a third more time, the same gradients.

        Raises ValueError for a net with BatchNorm: its running statistics would be updated
        twice."""
        if any(isinstance(module, _BatchNorm) for module in self.modules()):
            raise ValueError("--grad-checkpoint: this net has BatchNorm, whose statistics would be "
                             "updated twice a step; use a ConvNeXt, a ViT or a Swin, or a smaller "
                             "--batch-size with --accum")
        self.recompute = True

    @torch.no_grad()
    def shapes(self, image_size: tuple[int, int]) -> list[torch.Size]:
        """The shape of what enters each stage for one image (H, W), and last of what leaves the
        encoder.

        Raises ValueError if the image does not fit the encoder."""
        training = self.training
        z = next(self.parameters()).new_zeros(1, self.channels, *image_size)
        shapes = [z.shape]
        self.eval()                                          # BatchNorm statistics stay as they are
        try:
            for stage in range(len(self.stages)):
                z = self.run_stage(stage, z)
                shapes.append(z.shape)
        except RuntimeError as error:
            if "allocate" in str(error):                     # out of memory
                raise
            H, W = image_size
            reason = str(error).splitlines()[0]
            raise ValueError(f"image size {H}x{W}: does not fit this encoder ({reason})") from None
        finally:
            self.train(training)
        return shapes


FEW_UNITS = 9                                                # with fewer, a run learns little


def choose_mask_size_and_stage(encoder: Encoder, image_size: tuple[int, int], unit: int = 8,
                               mask_size: int | None = None) -> tuple[int, int]:
    """(mask size, token stage) for small images. Our heuristic, not from a paper.

    The mask size is the multiple of `unit` pixels that is closest to a sixth of the shorter side
    and cuts the image into at least FEW_UNITS mask units. The token stage is the deepest one at
    which a mask unit still covers 2 x 2 features (CNN), or the one after the patch embedding
    (Transformer). Raises ValueError if no size fits."""
    H, W = image_size
    if mask_size is None:
        divisors = [n for n in range(unit, min(H, W), unit) if H % n == W % n == 0]
        fits = [n for n in divisors if H * W // n**2 >= FEW_UNITS]
        if not fits:
            mask_grid(image_size, 32)                        # raises if 32 px do not divide them
            raise ValueError(f"image size {H}x{W}: no mask unit of whole {unit}-pixel blocks "
                             f"divides it into at least {FEW_UNITS}; use another --image-size, or "
                             f"give --mask-size with --token-stage (for a ViT: --patch-size, for "
                             f"a ResNet: --stem small)")
        mask_size = min(fits, key=lambda n: abs(math.log(6 * n / min(H, W))))

    shapes = encoder.shapes(image_size)
    if encoder.layout != "nchw" or len(shapes[-1]) != 4:     # a Transformer
        return mask_size, encoder.token_stage
    maps = shapes[:-1]                                       # (1, C, h, w) each
    two_features = [2 * H // shape[2] for shape in maps]     # their side in pixels
    stages = [k for k, side in enumerate(two_features) if side <= mask_size]
    if not stages:
        raise ValueError(f"mask size {mask_size}: must be at least {min(two_features)} pixels")
    return mask_size, stages[-1]


# ---- a classifier, for fine-tuning ----

class Classifier(nn.Module):
    """Encoder, mean over positions, linear head.

    ViT        the mean of the patch tokens, then a new LayerNorm; the LayerNorm of pre-training is
               dropped
    ConvNeXt   its own final LayerNorm comes after the mean
    others of torchvision, outside the paper: their own head

    frozen: only the head is trained, and the encoder stays in eval mode.

    Raises ValueError for --grad-checkpoint on a net that is not run stage by stage."""

    def __init__(self, arch: str, encoder: Encoder, classes: int, frozen: bool = False):
        super().__init__()
        self.family = get_family(arch)
        self.encoder = encoder
        self.frozen = frozen
        self.norm = nn.Identity()
        if encoder.head_name and encoder.recompute:
            raise ValueError(f"--grad-checkpoint: {arch} is fine-tuned as torchvision's whole net, "
                             f"not stage by stage; leave the flag out")
        if encoder.head_name:
            head = getattr(tv.get_model(arch, num_classes=classes), encoder.head_name)
            setattr(encoder.backbone, encoder.head_name, head)
            self.__dict__["head"] = head  # an alias outside _modules, so that it is saved once
        else:
            self.make_head(encoder, classes)
        if frozen:
            encoder.requires_grad_(False)
            self.norm.requires_grad_(False)
            self.head.requires_grad_(True)

    def make_head(self, encoder: Encoder, classes: int) -> None:
        kind = self.family.name
        image_size = encoder.backbone.image_size if kind == "vit" else (224, 224)
        width = channels_of(encoder.shapes(image_size)[-1], encoder.layout)
        if kind == "vit":
            encoder.stages[-1].remove("norm")
            encoder.backbone.norm = nn.Identity()
            self.norm = nn.LayerNorm(width, eps=1e-6)
        elif kind == "convnext":
            encoder.stages[-1].remove("classifier.0")
        self.head = nn.Linear(width, classes)
        if kind == "convnext":                               # as released
            nn.init.trunc_normal_(self.head.weight, std=0.02)
        else:
            nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()                              # BatchNorm statistics stay as they are
            self.head.train(mode)
        return self

    def features(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> mean-pooled features, (B, C): what a linear head
        sees."""
        z = self.encoder(images)
        if self.family.name == "vit":
            return self.norm(z[:, 1:].mean(1))
        z = z.mean((1, 2)) if self.encoder.layout == "nhwc" else z.mean((2, 3))
        if self.family.name == "convnext":
            return self.encoder.backbone.classifier[0](z[:, :, None, None]).flatten(1)
        return z

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, classes)."""
        if self.encoder.head_name:
            return self.encoder.backbone(images)
        return self.head(self.features(images))

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """All weights under torchvision's names, head included (ViT: BEiT's names, `fc_norm` and
        `head`)."""
        state = self.encoder.backbone.state_dict()
        if self.encoder.head_name:
            return state
        for prefix, module in (("fc_norm", self.norm), (self.family.head, self.head)):
            for name, value in module.state_dict().items():
                state[f"{prefix}.{name}"] = value
        return state


# ---- backbones by name ----

VITS = {  # width, depth, heads, MLP width; "vit_small" is the authors' own: wide and shallow
    "vit_small": (768, 8, 8, 2304),
    "vit_base": (768, 12, 12, 3072),
    "vit_large": (1024, 24, 16, 4096),
    "deit_tiny": (192, 12, 3, 768),
    "deit_small": (384, 12, 6, 1536),
}
SWINS = {  # width of the first stage, blocks of each stage
    "swin_tiny": (96, (2, 2, 6, 2)),
    "swin_small": (96, (2, 2, 18, 2)),
    "swin_base": (128, (2, 2, 18, 2)),
}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
STEMS = ("imagenet", "small")


class Family(NamedTuple):
    """What the backbones of one family have in common."""
    name: str                                                # also its key in pretrain.RECIPES
    archs: tuple[str, ...]
    head: str  # the classification head in torchvision's names
    layout: str = "nchw"
    convolutional: bool = True                               # faster in channels_last


FAMILIES = [
    Family("resnet", RESNETS, "fc"),
    Family("convnext", CONVNEXTS, "classifier.2"),
    Family("vit", tuple(VITS), "head", convolutional=False),
    Family("swin", tuple(SWINS), "head", "nhwc", convolutional=False),
]
ARCHS = tuple(arch for kind in FAMILIES for arch in kind.archs)


def get_family(arch: str) -> Family:
    """The family of a backbone, 'torchvision' for its other nets. Raises ValueError for an unknown
    name."""
    others = tuple(tv.list_models(module=tv))
    is_transformer = arch.startswith(("swin", "maxvit"))
    rest = Family("torchvision", others, "", convolutional=not is_transformer)
    for kind in (*FAMILIES, rest):
        if arch in kind.archs:
            return kind
    close = get_close_matches(arch, (*ARCHS, *others), 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"arch {arch!r}: must be one of {', '.join(ARCHS)}, or a net of "
                     f"torchvision{hint}")


def settings_for_size(arch: str, image_size: int | Sequence[int]) -> dict:
    """The settings of build_encoder that suit an image: below 64 px the small stem of a ResNet,
    patches of 4 px."""
    is_small = min(height_width(image_size)) < 64
    if get_family(arch).name == "resnet":
        return {"stem": "small" if is_small else "imagenet"}
    if get_family(arch).name == "vit":
        return {"patch_size": 4 if is_small else 16}
    return {}


def build_encoder(arch: str, image_size: int | tuple[int, int] = 224,
                  drop_path: float | None = None, patch_size: int = 16, window: int = 7,
                  stem: str | None = None, channels: int = 3) -> Encoder:
    """A backbone by name, with random weights and without a classification head. Names as in
    torchvision (ViT: BEiT).

    image_size  (H, W), matters to ViT and MaxViT only
    drop_path   deepest rate of stochastic depth; by default 0.1 for ViT and 0 otherwise, as
                released
    patch_size  ViT's
    window      Swin's, 7 as in torchvision; the authors train at 192 px with 6
    stem        a ResNet's: 'imagenet' (7x7, stride 2, pooling; also if None) or 'small' (3x3,
                stride 1, no pooling), as usual for CIFAR. All weights but conv1.weight fit
                torchvision's ResNet
    channels    of the images

    Raises ValueError for an unknown name, a net that cannot be cut, or an image that does not
    fit."""
    kind = get_family(arch)
    size = height_width(image_size)
    if stem == "small" and kind.name != "resnet":
        raise ValueError(f"--stem small: {arch} has no such stem; it is one of ResNets "
                         f"({', '.join(RESNETS)})")
    if kind.name == "resnet":
        encoder = resnet(arch, drop_path or 0.0, stem)
    elif kind.name == "convnext":
        encoder = convnext(arch, drop_path or 0.0)
    elif kind.name == "vit":
        encoder = vit(arch, size, patch_size, 0.1 if drop_path is None else drop_path)
    elif kind.name == "swin":
        encoder = swin(arch, window, drop_path or 0.0)
    else:
        encoder = Encoder(*split_into_stages(arch, size, drop_path or 0.0))
    if channels != 3:
        change_input_channels(encoder, channels)
    return encoder


def change_input_channels(encoder: Encoder, channels: int) -> None:
    """Replaces the first convolution by a new one for `channels`; the weights of the others
    stay."""
    modules = encoder.backbone.named_modules()
    name, first = next((n, m) for n, m in modules if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(channels, first.out_channels, first.kernel_size, first.stride, first.padding,
                    bias=first.bias is not None)
    encoder.backbone.set_submodule(name, new)


def resnet(arch: str, drop_path: float, stem: str | None) -> Encoder:
    """torchvision's ResNet; the last BatchNorm of each block starts at 0."""
    if arch == "resnet200":                                  # torchvision has its blocks alone
        net = tv.ResNet(tv.resnet.Bottleneck, [3, 24, 36, 3], zero_init_residual=True)
    else:
        net = getattr(tv, arch)(zero_init_residual=True)
    net.fc = nn.Identity()
    if stem == "small":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        # starts as torchvision's convolutions do
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    if drop_path:
        drop_residuals(net, drop_path)
    stages = [["conv1", "bn1", "relu", "maxpool"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    return Encoder(net, stages, token_stage=4)


def four_stages() -> list[list[str]]:
    """The stages of ConvNeXt and Swin. A downsampling is the last module of a stage, so that the
    next stage begins at its own resolution."""
    middle = [[f"features.{i}", f"features.{i + 1}"] for i in (1, 3, 5)]
    return [["features.0"], *middle, ["features.7"]]


def convnext(arch: str, drop_path: float) -> Encoder:
    net = getattr(tv, arch)(stochastic_depth_prob=drop_path)
    net.classifier[2] = nn.Identity()
    stages = four_stages()
    stages[4].append("classifier.0")  # the final LayerNorm; torchvision keeps it beside the head

    # levels as released: a downsampling goes with the stage that it opens, and stage 3 is cut into
    # groups of three
    depth = len(net.features[5])
    groups = [[f"features.5.{i}" for i in range(first, first + 3)] for first in range(0, depth, 3)]
    groups[0].insert(0, "features.4")
    before = [["features.0"], ["features.1"], ["features.2", "features.3"]]
    levels = [*before, *groups, ["features.6", "features.7"]]
    return Encoder(net, stages, token_stage=4, levels=levels)


def swin(arch: str, window: int, drop_path: float) -> Encoder:
    dim, depths = SWINS[arch]
    heads = [dim // 32 * 2**i for i in range(4)]
    net = tv.SwinTransformer([4, 4], dim, list(depths), heads, [window, window],
                             stochastic_depth_prob=drop_path)
    net.head = nn.Identity()
    stages = four_stages()
    stages[4].append("norm")
    return Encoder(net, stages, token_stage=1, layout="nhwc")


def vit(arch: str, image_size: tuple[int, int], patch_size: int, drop_path: float) -> Encoder:
    dim, depth, heads, mlp = VITS[arch]
    net = ViT(image_size, dim, depth, heads, mlp, patch_size, drop_path)
    stages = [["patch_embed"], *([f"blocks.{i}"] for i in range(depth))]
    # after the token: a hidden patch keeps its position
    stages[1].insert(0, "embed_position")
    stages[-1].append("norm")
    return Encoder(net, stages, token_stage=1)


# ---- ViT, with BEiT's block. torchvision lacks its relative position bias and LayerScale ----

class ViT(nn.Module):
    """The released ViT: a class token, learned absolute positions, and BEiT blocks. Parameter names
    are BEiT's.

    Raises ValueError if the patch does not divide the image (H, W)."""

    def __init__(self, image_size: tuple[int, int], dim: int, depth: int, heads: int, mlp: int,
                 patch: int = 16, drop_path: float = 0.1):
        super().__init__()
        H, W = image_size
        if H % patch or W % patch:
            raise ValueError(f"image size {H}x{W}: not a multiple of the {patch}-pixel patch")
        self.image_size = image_size
        self.grid = grid = (H // patch, W // patch)
        self.patch_embed = PatchEmbed(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        rates = torch.linspace(0, drop_path, depth).tolist()  # deeper blocks are dropped more often
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp, grid, rate) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for weight in (self.cls_token, self.pos_embed, *(linear.weight for linear in linears)):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in linears:
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def embed_position(self, x: Tensor) -> Tensor:           # (B, N, C) -> (B, 1 + N, C)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        return torch.cat([cls_token, x], dim=1) + self.pos_embed


class PatchEmbed(nn.Module):
    """One linear map per p x p patch: (B, 3, H, W) -> (B, N, C), N = HW / p^2."""

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """x + gamma_1 * attention(norm(x)), then x + gamma_2 * mlp(norm(x)); each branch is dropped
    with rate `drop`."""

    def __init__(self, dim: int, heads: int, mlp: int, grid: tuple[int, int], drop: float,
                 layer_scale: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, grid)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, mlp), act=nn.GELU(), fc2=nn.Linear(mlp, dim)))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = StochasticDepth(drop, mode="row")

    def forward(self, x: Tensor) -> Tensor:                  # (B, 1 + N, C) -> same
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Self-attention with a learned bias per head and relative position of query and key. q and v
    have biases, k none.

    The bias table is ((2h-1)(2w-1) + 3, heads) and starts at 0; its last three rows serve the pairs
    class-to-patch, patch-to-class and class-to-class. Source: BEiT; one table per block, as in the
    released ViT."""

    def __init__(self, dim: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        h, w = grid
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        rows = (2 * h - 1) * (2 * w - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.proj = nn.Linear(dim, dim)
        index = relative_position_index(h, w)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:                  # (B, 1 + N, C) -> same
        B, N, C = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # each (B, heads, 1 + N, C / heads)
        position = self.relative_position_bias_table[self.relative_position_index]
        position = position.permute(2, 0, 1).to(q.dtype)     # (heads, 1 + N, 1 + N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=position[None])
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def relative_position_index(h: int, w: int) -> Tensor:
    """(1 + hw, 1 + hw): the table row of each (query, key) pair, (dr + h-1)(2w-1) + (dc + w-1),
    query minus key."""
    row = torch.arange(h).repeat_interleave(w)
    col = torch.arange(w).repeat(h)
    dr = row[:, None] - row[None]
    dc = col[:, None] - col[None]
    index = F.pad((dr + h - 1) * (2 * w - 1) + (dc + w - 1), (1, 0, 1, 0))
    pairs = (2 * h - 1) * (2 * w - 1)
    index[0, :] = pairs                                      # class-to-patch
    index[:, 0] = pairs + 1                                  # patch-to-class
    index[0, 0] = pairs + 2                                  # class-to-class
    return index
