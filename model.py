"""The model: a backbone cut into stages, a mask token between two of them, a linear decoder behind the last.

    Encoder        any backbone as a list of stages, run in a plain loop
    build_encoder  a backbone by name: any of torchvision's, the paper's among them, or a ViT or DeiT from below
    A2MIM          the whole pre-training forward pass
    Classifier     the encoder with a linear head, for fine-tuning
"""

import math
from collections import OrderedDict
from difflib import get_close_matches
from functools import partial
from operator import attrgetter
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from engine.chain import cut, drop_residuals
from engine.flags import pair
from masking import MaskToken, fill_hidden, mask_grid, resize_mask, spread_mask


# ---- ViT: the BEiT block, which torchvision lacks (relative position bias, LayerScale, no k bias) ----

class Attention(nn.Module):
    """Self-attention with a learned bias per head and relative position of query and key; q and v have biases, k none.

    The bias table is ((2h-1)(2w-1) + 3, heads), zero at the start; its last three rows serve the pairs
    class-to-patch, patch-to-class and class-to-class. Source: BEiT; one table per layer, as in the released ViT."""

    def __init__(self, dim: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        h, w = grid
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + 3, heads))
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("relative_position_index", relative_position_index(h, w), persistent=False)

    def forward(self, x: Tensor) -> Tensor:                  # (B, 1 + N, C) -> same
        B, N, C = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        position = self.relative_position_bias_table.T.index_select(1, self.relative_position_index.flatten())
        position = position.view(1, self.heads, N, N).to(q.dtype)                           # (1, heads, 1 + N, 1 + N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=position)      # (B, heads, 1 + N, C / heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def relative_position_index(h: int, w: int) -> Tensor:
    """(1 + hw, 1 + hw): the table row of each (query, key) pair, (dr + h-1)(2w-1) + (dc + w-1), query minus key."""
    row, col = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    dr, dc = row[:, None] - row[None], col[:, None] - col[None]
    n = (2 * h - 1) * (2 * w - 1)
    index = F.pad((dr + h - 1) * (2 * w - 1) + (dc + w - 1), (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = n, n + 1, n + 2
    return index


class Block(nn.Module):
    """x + gamma_1 * attention(norm(x)), then x + gamma_2 * mlp(norm(x)), each dropped at random with rate `drop`."""

    def __init__(self, dim: int, heads: int, mlp: int, grid: tuple[int, int], drop: float, layer_scale: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, grid)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, mlp), act=nn.GELU(), fc2=nn.Linear(mlp, dim)))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = StochasticDepth(drop, mode="row")

    def forward(self, x: Tensor) -> Tensor:                  # (B, 1 + N, C) -> same
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """One linear map per p x p patch: (B, channels, H, W) -> (B, N, C), N = HW / p^2."""

    def __init__(self, dim: int, patch: int, channels: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """The released ViT: a class token, learned absolute positions, and BEiT blocks. Parameter names are BEiT's.

    Raises ValueError if the patch does not divide the image (H, W)."""

    def __init__(self, image_size: tuple[int, int], dim: int, depth: int, heads: int, mlp: int,
                 patch: int = 16, drop_path: float = 0.1, channels: int = 3):
        super().__init__()
        if image_size[0] % patch or image_size[1] % patch:
            raise ValueError(f"image size {image_size[0]}x{image_size[1]}: not a multiple of the {patch}-pixel patch")
        self.image_size = image_size
        self.grid = grid = (image_size[0] // patch, image_size[1] // patch)
        self.patch_embed = PatchEmbed(dim, patch, channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        rates = torch.linspace(0, drop_path, depth).tolist()                 # deeper blocks are dropped more often
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp, grid, rate) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for weight in (self.cls_token, self.pos_embed, *(m.weight for m in self.modules() if isinstance(m, nn.Linear))):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear) and m.bias is not None):
            nn.init.zeros_(linear.bias)

    def embed_position(self, x: Tensor) -> Tensor:           # (B, N, C) -> (B, 1 + N, C)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed


# ---- a backbone as a list of stages ----

class Encoder(nn.Module):
    """`stages`, run one after another. Stage 0 is the stem or patch embedding; the token may enter before any stage.

    backbone    holds the parameters under its own names; `encoder.backbone.state_dict()` is what `backbone.pt` keeps
    stages      for each stage, the names of the modules (or methods) of `backbone` that it runs, in order
    mask_stage  where the token enters unless told otherwise; layout as in masking.spread_mask
    levels      groups of module names that share a learning rate under layer decay, from the image on; else the stages
    head_name   where fine-tuning puts torchvision's own head back; "" = it makes a linear one
    Hand over a list of modules as `backbone`, and each is a stage: Encoder([stem, block1, block2])."""

    def __init__(self, backbone: nn.Module | Sequence[nn.Module], stages: list[list[str]] | None = None,
                 mask_stage: int = -1, layout: str = "nchw", head_name: str = "",
                 levels: list[list[str]] | None = None):
        super().__init__()
        if stages is None:
            backbone = nn.Sequential(*backbone)
            stages = [[str(i)] for i in range(len(backbone))]
        self.backbone, self.stages, self.layout, self.levels = backbone, stages, layout, levels or stages
        self.mask_stage, self.head_name = mask_stage % len(stages), head_name

    @property
    def channels(self) -> int:
        """Of the images it takes: those of its first convolution."""
        return next(m.in_channels for m in self.modules() if isinstance(m, nn.Conv2d))

    def run_stage(self, stage: int, z: Tensor) -> Tensor:
        for name in self.stages[stage]:                      # by name, so that SyncBN or a fork may swap a module
            z = attrgetter(name)(self.backbone)(z)
        return z

    def forward(self, images: Tensor) -> Tensor:
        """The plain backbone: normalised images (B, 3, H, W) -> features in the backbone's own layout."""
        z = images
        for stage in range(len(self.stages)):
            z = self.run_stage(stage, z)
        return z

    @torch.no_grad()
    def shapes(self, image_size: tuple[int, int]) -> list[torch.Size]:
        """The shape of what enters each stage for one image (H, W), and last of what leaves the encoder."""
        training, z = self.training, next(self.parameters()).new_zeros(1, self.channels, *image_size)
        self.eval()
        shapes = [z.shape]
        try:
            for stage in range(len(self.stages)):
                z = self.run_stage(stage, z)
                shapes.append(z.shape)
        except RuntimeError as error:
            if "allocate" in str(error):
                raise
            H, W = image_size
            raise ValueError(f"image size {H}x{W}: does not fit this encoder ({str(error).splitlines()[0]})") from None
        self.train(training)
        return shapes


VITS = {  # width, depth, heads, MLP width; "small" is the authors' own, wide and shallow
    "vit_small": (768, 8, 8, 2304), "vit_base": (768, 12, 12, 3072), "vit_large": (1024, 24, 16, 4096),
    "deit_tiny": (192, 12, 3, 768), "deit_small": (384, 12, 6, 1536),
}
SWINS = {"swin_tiny": (96, (2, 2, 6, 2)), "swin_small": (96, (2, 2, 18, 2)), "swin_base": (128, (2, 2, 18, 2))}


class Family(NamedTuple):
    """What the backbones of one family have in common."""
    name: str                                                # of its recipe, too
    archs: tuple[str, ...]
    mask_stage: int                                          # where the token enters, as released
    head: str                                                # the classification head in torchvision's names
    layout: str = "nchw"
    convolutional: bool = True                               # faster in channels_last


FAMILIES = [
    Family("resnet", ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"), 4, "fc"),
    Family("convnext", ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"), 4, "classifier.2"),
    Family("vit", tuple(VITS), 1, "head", convolutional=False),
    Family("swin", tuple(SWINS), 1, "head", "nhwc", convolutional=False),
]
ARCHS = tuple(arch for kind in FAMILIES for arch in kind.archs)


def family(arch: str) -> Family:
    """The family of a backbone, 'torchvision' for its other nets. Raises ValueError for an unknown name."""
    others = tuple(tv.list_models(module=tv))
    rest = Family("torchvision", others, -1, "", convolutional=not arch.startswith(("swin", "maxvit")))
    for kind in (*FAMILIES, rest):
        if arch in kind.archs:
            return kind
    near = get_close_matches(arch, (*ARCHS, *others), 1)
    raise ValueError(f"arch {arch!r}: must be one of {', '.join(ARCHS)}, or a net of torchvision"
                     + (f"; did you mean {near[0]}?" if near else ""))


STEMS = ("imagenet", "small")


def for_small_images(arch: str, image_size: int | Sequence[int]) -> dict:
    """The settings of build_encoder that suit an image: below 64 px a ResNet's small stem and patches of 4 px."""
    below = min(pair(image_size)) < 64
    if family(arch).name == "resnet":
        return {"stem": "small" if below else "imagenet"}
    if family(arch).name == "vit":
        return {"patch_size": 4 if below else 16}
    return {}


def build_encoder(arch: str, image_size: int | tuple[int, int] = 224, drop_path: float | None = None,
                  patch_size: int = 16, window: int = 7, stem: str | None = None) -> Encoder:
    """A backbone by name, random weights, no classification head; names as in torchvision (ViT: BEiT).

    image_size (H, W) matters to ViT and MaxViT alone. drop_path: the deepest rate of stochastic depth; by default 0.1
    for ViT and 0 elsewhere, as released. window: Swin's, 7 as in torchvision; the authors train at 192 px with 6.
    stem: a ResNet's, 'imagenet' (7x7, stride 2, pooling; also if None) or 'small' (3x3, stride 1, no pooling), as
    usual for CIFAR: all weights but conv1.weight fit torchvision's ResNet.
    Raises ValueError for an unknown name, a net that cannot be cut, or an image that does not fit."""
    kind = family(arch)
    if stem == "small" and kind.name != "resnet":
        raise ValueError(f"--stem small: {arch} has no such stem; it is one of ResNets "
                         f"({', '.join(FAMILIES[0].archs)})")
    if kind.name == "torchvision":
        return Encoder(*cut(arch, pair(image_size), drop_path or 0.0))
    if kind.name == "resnet":                                 # last BatchNorm of each block starts at 0
        deepest = partial(tv.ResNet, tv.resnet.Bottleneck, [3, 24, 36, 3])   # torchvision has the blocks, not the name
        net = (deepest if arch == "resnet200" else getattr(tv, arch))(zero_init_residual=True)
        net.fc = nn.Identity()
        if stem == "small":
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")   # as torchvision's
            net.maxpool = nn.Identity()
        if drop_path:
            drop_residuals(net, drop_path)
        stages = [["conv1", "bn1", "relu", "maxpool"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
        return Encoder(net, stages, kind.mask_stage)
    if kind.name == "vit":
        dim, depth, heads, mlp = VITS[arch]
        net = ViT(pair(image_size), dim, depth, heads, mlp, patch_size, 0.1 if drop_path is None else drop_path)
        stages = [["patch_embed"], *([f"blocks.{i}"] for i in range(depth))]
        stages[1].insert(0, "embed_position")                # after the token: a hidden patch keeps its position
        stages[-1].append("norm")
        return Encoder(net, stages, kind.mask_stage)
    # ConvNeXt and Swin: each downsampling closes the stage before it, so that stage k opens at its own resolution
    stages = [["features.0"], *([f"features.{i}", f"features.{i + 1}"] for i in (1, 3, 5)), ["features.7"]]
    if kind.name == "convnext":
        net = getattr(tv, arch)(stochastic_depth_prob=drop_path or 0.0)
        net.classifier[2] = nn.Identity()
        stages[4].append("classifier.0")                     # the final LayerNorm; torchvision keeps it beside the head
        # levels as released: a downsampling goes with what it leads to, and the third stage is cut into groups of three
        groups = [[f"features.5.{i}" for i in range(first, first + 3)] for first in range(0, len(net.features[5]), 3)]
        groups[0].insert(0, "features.4")
        levels = [["features.0"], ["features.1"], ["features.2", "features.3"], *groups, ["features.6", "features.7"]]
        return Encoder(net, stages, kind.mask_stage, levels=levels)
    dim, depths = SWINS[arch]
    net = tv.SwinTransformer([4, 4], dim, list(depths), [dim // 32 * 2**i for i in range(4)], [window, window],
                             stochastic_depth_prob=drop_path or 0.0)
    net.head = nn.Identity()
    stages[4].append("norm")
    return Encoder(net, stages, kind.mask_stage, kind.layout)


# ---- A2MIM ----

def build_decoder(width: int, channels: int, stride: int) -> nn.Module:
    """One linear layer, (B, width, h, w) -> (B, channels, h stride, w stride): each feature paints its own square."""
    paint = nn.Conv2d(width, channels * stride**2, 1)
    nn.init.trunc_normal_(paint.weight, std=0.02)
    nn.init.zeros_(paint.bias)
    return nn.Sequential(paint, nn.PixelShuffle(stride))


class A2MIM(nn.Module):
    """Masked image modeling for any encoder (paper, Fig. 3): fill, encode with a token in the middle, decode linearly.

    encoder     an Encoder, or a plain list of nn.Module stages
    image_size  pixels, one side or (H, W); every stride and the mask cell must divide it
    mask_cell   side of a hidden square, pixels; at least the stride where the token enters
    mask_stage  the token enters before encoder stage k: 1 = after the stem or patch embedding (ViT's "layer 0"),
                4 = before the last stage of a CNN; 0 = into the image itself; None = the backbone's released place
    token, fill as in masking.MaskToken and masking.fill_hidden
    Raises ValueError if sizes do not fit, before anything is trained."""

    def __init__(self, encoder: Encoder | Sequence[nn.Module], image_size: int | tuple[int, int] = 224,
                 mask_cell: int = 32, mask_stage: int | None = None, token: str = "gamma", fill: str = "mean",
                 layout: str = "nchw"):
        super().__init__()
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder, layout=layout)
        self.mask_stage = self.encoder.mask_stage if mask_stage is None else mask_stage
        if not 0 <= self.mask_stage < len(self.encoder.stages):
            raise ValueError(f"mask stage {mask_stage}: this encoder has stages 0 to {len(self.encoder.stages) - 1}")
        self.image_size, self.mask_cell, self.fill = pair(image_size), mask_cell, fill
        self.grid = mask_grid(self.image_size, mask_cell)

        shapes = self.encoder.shapes(self.image_size)
        here, last = shapes[self.mask_stage], shapes[-1]
        layout = "nchw" if self.mask_stage == 0 else self.encoder.layout
        spread_mask(torch.zeros(1, *self.grid), torch.empty(here), layout)    # raises if the mask does not fit
        channels = here[1] if len(here) == 4 and layout == "nchw" else here[-1]
        self.mask_token = MaskToken(channels, token, layout)

        self.stride = self.find_stride(last)
        width = last[1] if len(last) == 4 and self.encoder.layout == "nchw" else last[-1]
        self.decoder = build_decoder(width, self.encoder.channels, self.stride)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """images (B, 3, H, W), normalised; mask (B, gh, gw), True = hidden. Returns the painted images (B, 3, H, W)."""
        z = fill_hidden(images, mask, self.fill)             # (B, 3, H, W)     move 1: hidden pixels := mean colour
        for stage in range(len(self.encoder.stages)):
            if stage == self.mask_stage:                     # (B, C_l, h, w)   ResNet: after stage 3, stride 16
                z = self.mask_token(z, mask)                 #                  move 2: the token, at hidden places
            z = self.encoder.run_stage(stage, z)
        z = self.to_map(z)                                   # (B, C, H/s, W/s) s = 32 (CNN, Swin), 16 (ViT)
        return self.decoder(z)                               # (B, 3, H, W)     each feature paints its s x s pixels

    def to_map(self, z: Tensor) -> Tensor:
        """Features in the encoder's layout -> (B, C, h, w); a class token is dropped."""
        if z.dim() == 3:
            h, w = (side // self.stride for side in self.image_size)
            return z[:, -h * w:].transpose(1, 2).unflatten(2, (h, w))
        return z.permute(0, 3, 1, 2) if self.encoder.layout == "nhwc" else z

    def find_stride(self, last: torch.Size) -> int:
        """Pixels per feature of the encoder's output; ValueError if it is not one whole number in both directions."""
        H, W = self.image_size
        if len(last) == 3:                                   # (1, N, C), perhaps with one class token
            for patches in (last[1], last[1] - 1):
                s = math.isqrt(H * W // max(patches, 1))
                if s and H % s == 0 and W % s == 0 and (H // s) * (W // s) == patches:
                    return s
        elif len(last) == 4:
            h, w = last[1:3] if self.encoder.layout == "nhwc" else last[2:]
            if H % h == 0 and W % w == 0 and H // h == W // w:
                return H // h
        raise ValueError(f"image size {H}x{W}: the encoder turns it into features {tuple(last[1:])}, which do not tile "
                         f"it; use sides that are multiples of the encoder's stride")

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For pictures, in eval mode: (what the encoder sees, what it paints, the image with hidden cells painted)."""
        training = self.training
        self.eval()
        painted = self(images, mask).float()
        self.train(training)
        pasted = torch.where(resize_mask(mask, self.image_size), painted, images)
        return fill_hidden(images, mask, self.fill), painted, pasted


FEW_UNITS = 9                                                # with fewer mask cells there is little to learn


def fit_cell(encoder: Encoder, image_size: tuple[int, int], unit: int = 8, cell: int | None = None) -> tuple[int, int]:
    """For small images (no paper's): (mask cell, mask stage).

    The cell is the multiple of `unit` pixels that is nearest to a sixth of the shorter side, with at least FEW_UNITS of
    them in the image. The token enters a CNN as deep as features are at most half a cell wide, a Transformer at its
    released place. Raises ValueError if no cell fits."""
    H, W = image_size
    shapes = encoder.shapes(image_size)
    if cell is None:
        fits = [n for n in range(unit, min(H, W), unit) if H % n == W % n == 0 and H * W // n**2 >= FEW_UNITS]
        if not fits:
            mask_grid(image_size, 32)                        # raises, with sides that fit, if 32 px do not divide it
            raise ValueError(f"image size {H}x{W}: no mask cell of whole {unit}-pixel blocks divides it into at least "
                             f"{FEW_UNITS}; use another --image-size, or give --mask-cell with --mask-stage (for a "
                             f"ViT: --patch-size, for a ResNet: --stem small)")
        cell = min(fits, key=lambda n: abs(math.log(6 * n / min(H, W))))
    if encoder.layout != "nchw" or len(shapes[-1]) != 4:
        return cell, encoder.mask_stage
    fine = [k for k, shape in enumerate(shapes[:-1]) if len(shape) == 4 and 2 * H // shape[2] <= cell]
    return cell, max(fine)


# ---- a classifier, for fine-tuning ----

class Classifier(nn.Module):
    """Encoder, mean over positions, linear head. `frozen`: the head alone learns, the encoder stays in eval mode.

    ViT: the mean of the patch tokens (no class token), then a fresh LayerNorm; the pre-training one is dropped.
    ConvNeXt: its own final norm comes after the mean. torchvision's other nets: their own head, in its place."""

    def __init__(self, arch: str, encoder: Encoder, classes: int, frozen: bool = False):
        super().__init__()
        self.family, self.encoder, self.frozen, self.norm = family(arch), encoder, frozen, nn.Identity()
        if encoder.head_name:
            head = getattr(tv.get_model(arch, num_classes=classes), encoder.head_name)
            setattr(encoder.backbone, encoder.head_name, head)
            self.__dict__["head"] = head                     # a second name, not a second module: it is saved once
        else:
            self.make_head(encoder, classes)
        if frozen:
            encoder.requires_grad_(False)
            self.norm.requires_grad_(False)
            self.head.requires_grad_(True)

    def make_head(self, encoder: Encoder, classes: int) -> None:
        kind = self.family.name
        width = encoder.shapes((224, 224) if kind != "vit" else encoder.backbone.image_size)[-1]
        width = width[1] if kind in ("resnet", "convnext") else width[-1]
        if kind == "vit":
            encoder.stages[-1].remove("norm")
            encoder.backbone.norm, self.norm = nn.Identity(), nn.LayerNorm(width, eps=1e-6)
        elif kind == "convnext":
            encoder.stages[-1].remove("classifier.0")
        self.head = nn.Linear(width, classes)
        if kind == "convnext":                               # as released
            nn.init.trunc_normal_(self.head.weight, std=0.02)
        else:
            nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()                              # BatchNorm statistics stay as they are
            self.head.train(mode)
        return self

    def features(self, images: Tensor) -> Tensor:            # (B, 3, H, W) -> (B, C)
        z = self.encoder(images)
        if self.family.name == "vit":
            return self.norm(z[:, 1:].mean(1))
        z = z.mean((1, 2)) if self.encoder.layout == "nhwc" else z.mean((2, 3))
        if self.family.name == "convnext":
            return self.encoder.backbone.classifier[0](z[:, :, None, None]).flatten(1)
        return z

    def forward(self, images: Tensor) -> Tensor:             # (B, 3, H, W) -> (B, classes)
        return self.encoder.backbone(images) if self.encoder.head_name else self.head(self.features(images))

    def plain_state(self) -> dict[str, Tensor]:
        """All weights under torchvision's names, head included (ViT: BEiT's names, `fc_norm` and `head`)."""
        if self.encoder.head_name:
            return self.encoder.backbone.state_dict()
        state = self.encoder.backbone.state_dict() | {f"fc_norm.{k}": v for k, v in self.norm.state_dict().items()}
        return state | {f"{self.family.head}.{k}": v for k, v in self.head.state_dict().items()}
