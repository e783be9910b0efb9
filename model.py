"""The model: a backbone cut into stages, a mask token between two of them, a linear decoder behind the last.

    Encoder        any backbone as a list of stages, run in a plain loop
    build_encoder  the paper's backbones by name: ResNet, ConvNeXt, Swin (torchvision's, untouched), ViT and DeiT (below)
    A2MIM          the whole pre-training forward pass
    load_backbone  weights in: our files, torchvision's, the authors' released checkpoints
"""

import math
import re
import zipfile
from collections import OrderedDict
from operator import attrgetter
from pathlib import Path
from types import MethodType
from typing import Sequence

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

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
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=position)                     # (B, heads, 1 + N, C / heads)
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
    """One linear map per p x p patch: (B, 3, H, W) -> (B, N, C), N = HW / p^2."""

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """The released ViT: a class token, learned absolute positions, and BEiT blocks. Parameter names are BEiT's.

    Raises ValueError where the patch does not divide the image (H, W)."""

    def __init__(self, image_size: tuple[int, int], dim: int, depth: int, heads: int, mlp: int,
                 patch: int = 16, drop_path: float = 0.1):
        super().__init__()
        if image_size[0] % patch or image_size[1] % patch:
            raise ValueError(f"image size {image_size[0]}x{image_size[1]}: not a multiple of the {patch}-pixel patch")
        self.image_size = image_size
        self.grid = grid = (image_size[0] // patch, image_size[1] // patch)
        self.patch_embed = PatchEmbed(dim, patch)
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
    levels      groups of module names that share a learning rate under layer decay, from the image on; the stages unless told otherwise
    Hand over a list of modules as `backbone`, and each is a stage: Encoder([stem, block1, block2])."""

    def __init__(self, backbone: nn.Module | Sequence[nn.Module], stages: list[list[str]] | None = None,
                 mask_stage: int = -1, layout: str = "nchw", levels: list[list[str]] | None = None):
        super().__init__()
        if stages is None:
            backbone = nn.Sequential(*backbone)
            stages = [[str(i)] for i in range(len(backbone))]
        self.backbone, self.stages, self.layout, self.levels = backbone, stages, layout, levels or stages
        self.mask_stage = mask_stage % len(stages)

    def run(self, stage: int, z: Tensor) -> Tensor:
        for name in self.stages[stage]:                      # by name, so that SyncBN or a fork may swap a module
            z = attrgetter(name)(self.backbone)(z)
        return z

    def forward(self, images: Tensor) -> Tensor:
        """The plain backbone: normalised images (B, 3, H, W) -> features in the backbone's own layout."""
        z = images
        for stage in range(len(self.stages)):
            z = self.run(stage, z)
        return z

    @torch.no_grad()
    def shapes(self, image_size: tuple[int, int]) -> list[torch.Size]:
        """The shape of what enters each stage for one image (H, W), and last of what leaves the encoder."""
        training, z = self.training, next(self.parameters()).new_zeros(1, 3, *image_size)
        self.eval()
        shapes = [z.shape]
        for stage in range(len(self.stages)):
            z = self.run(stage, z)
            shapes.append(z.shape)
        self.train(training)
        return shapes


VITS = {  # width, depth, heads, MLP width; "small" is the authors' own, wide and shallow
    "vit_small": (768, 8, 8, 2304), "vit_base": (768, 12, 12, 3072), "vit_large": (1024, 24, 16, 4096),
    "deit_tiny": (192, 12, 3, 768), "deit_small": (384, 12, 6, 1536),
}
SWINS = {"swin_tiny": (96, (2, 2, 6, 2)), "swin_small": (96, (2, 2, 18, 2)), "swin_base": (128, (2, 2, 18, 2))}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
ARCHS = (*RESNETS, *CONVNEXTS, *VITS, *SWINS)


def family(arch: str) -> str:
    """'resnet', 'convnext', 'swin' or 'vit' (DeiT too). Raises ValueError for an architecture not in ARCHS."""
    if arch not in ARCHS:
        raise ValueError(f"arch {arch!r}: must be one of {', '.join(ARCHS)}")
    return "vit" if arch in VITS else arch.rstrip("0123456789").split("_")[0]


def build_encoder(arch: str, image_size: int | tuple[int, int] = 224, drop_path: float | None = None,
                  patch_size: int = 16, window: int = 7) -> Encoder:
    """A backbone of the paper by name, random weights, no classification head; names as in torchvision (ViT: BEiT).

    image_size (H, W) matters to ViT alone (position tables). drop_path: the deepest rate of stochastic depth; by default
    0.1 for ViT and 0 elsewhere, as released. window: Swin's, 7 as in torchvision; the authors train at 192 px with 6.
    Raises ValueError for an unknown name or, for ViT, an image that the patch does not divide."""
    kind = family(arch)
    if kind == "resnet":                                     # last BatchNorm of each block starts at 0
        if arch == "resnet200":                              # torchvision has the blocks, not the name
            net = tv.ResNet(tv.resnet.Bottleneck, [3, 24, 36, 3], zero_init_residual=True)
        else:
            net = getattr(tv, arch)(zero_init_residual=True)
        net.fc = nn.Identity()
        if drop_path:
            drop_residuals(net, drop_path)
        return Encoder(net, [["conv1", "bn1", "relu", "maxpool"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]], mask_stage=4)
    if kind == "vit":
        dim, depth, heads, mlp = VITS[arch]
        net = ViT(pair(image_size), dim, depth, heads, mlp, patch_size, 0.1 if drop_path is None else drop_path)
        stages = [["patch_embed"], *([f"blocks.{i}"] for i in range(depth))]
        stages[1].insert(0, "embed_position")                # after the token: a hidden patch keeps its position
        stages[-1].append("norm")
        return Encoder(net, stages, mask_stage=1)
    # ConvNeXt and Swin: each downsampling closes the stage before it, so that stage k opens at its own resolution
    stages = [["features.0"], ["features.1", "features.2"], ["features.3", "features.4"], ["features.5", "features.6"], ["features.7"]]
    if kind == "convnext":
        net = getattr(tv, arch)(stochastic_depth_prob=drop_path or 0.0)
        net.classifier[2] = nn.Identity()
        stages[4].append("classifier.0")                     # the final LayerNorm, which torchvision keeps beside the head
        # levels as released: a downsampling goes with what it leads to, and the long third stage is cut into groups of three blocks
        groups = [[f"features.5.{i}" for i in range(first, first + 3)] for first in range(0, len(net.features[5]), 3)]
        groups[0].insert(0, "features.4")
        levels = [["features.0"], ["features.1"], ["features.2", "features.3"], *groups, ["features.6", "features.7"]]
        return Encoder(net, stages, mask_stage=4, levels=levels)
    dim, depths = SWINS[arch]
    net = tv.SwinTransformer([4, 4], dim, list(depths), [dim // 32 * 2**i for i in range(4)], [window, window],
                             stochastic_depth_prob=drop_path or 0.0)
    net.head = nn.Identity()
    stages[4].append("norm")
    return Encoder(net, stages, mask_stage=1, layout="nhwc")


def drop_residuals(net: tv.ResNet, drop_path: float) -> None:
    """Stochastic depth for torchvision's ResNet, which has none: on each block's residual branch, 0 to `drop_path` over depth."""
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        z = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
        if hasattr(block, "conv3"):
            z = block.bn3(block.conv3(block.relu(z)))
        return block.relu(block.drop_path(z) + (x if block.downsample is None else block.downsample(x)))
    blocks = [block for block in net.modules() if isinstance(block, (tv.resnet.BasicBlock, tv.resnet.Bottleneck))]
    for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist()):
        block.drop_path, block.forward = StochasticDepth(rate, mode="row"), MethodType(forward, block)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# ---- A2MIM ----

class A2MIM(nn.Module):
    """Masked image modeling for any encoder (paper, Fig. 3): fill, encode with the token in the middle, decode linearly.

    encoder     an Encoder, or a plain list of nn.Module stages
    image_size  pixels, one side or (H, W); every stride and the mask cell must divide it
    mask_cell   side of a hidden square, pixels; at least the stride where the token enters
    mask_stage  the token enters before encoder stage k: 1 = after the stem or patch embedding (ViT's "layer 0"),
                4 = before the last stage of a CNN; 0 = into the image itself; None = the backbone's released place
    token, fill as in masking.MaskToken and masking.fill_hidden
    Raises ValueError where sizes do not fit, before anything is trained."""

    def __init__(self, encoder: Encoder | Sequence[nn.Module], image_size: int | tuple[int, int] = 224, mask_cell: int = 32,
                 mask_stage: int | None = None, token: str = "gamma", fill: str = "mean", layout: str = "nchw"):
        super().__init__()
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder, layout=layout)
        self.mask_stage = self.encoder.mask_stage if mask_stage is None else mask_stage
        if not 0 <= self.mask_stage < len(self.encoder.stages):
            raise ValueError(f"mask stage {mask_stage}: this encoder has stages 0 to {len(self.encoder.stages) - 1}")
        self.image_size, self.mask_cell, self.fill = pair(image_size), mask_cell, fill
        self.grid = mask_grid(self.image_size, mask_cell)

        shapes = self.encoder.shapes(self.image_size)
        here, last, layout = shapes[self.mask_stage], shapes[-1], "nchw" if self.mask_stage == 0 else self.encoder.layout
        spread_mask(torch.zeros(1, *self.grid), torch.empty(here), layout)    # raises where the mask does not fit
        channels = here[1] if len(here) == 4 and layout == "nchw" else here[-1]
        self.mask_token = MaskToken(channels, token, layout)

        self.stride = self.find_stride(last)
        width = last[1] if len(last) == 4 and self.encoder.layout == "nchw" else last[-1]
        self.decoder = nn.Sequential(nn.Conv2d(width, 3 * self.stride**2, 1), nn.PixelShuffle(self.stride))
        nn.init.trunc_normal_(self.decoder[0].weight, std=0.02)
        nn.init.zeros_(self.decoder[0].bias)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """images (B, 3, H, W), normalised; mask (B, gh, gw), True = hidden. Returns the painted images (B, 3, H, W)."""
        z = fill_hidden(images, mask, self.fill)             # (B, 3, H, W)     move 1: hidden pixels := mean colour
        for stage in range(len(self.encoder.stages)):
            if stage == self.mask_stage:                     # (B, C_l, h, w)   ResNet: after stage 3, stride 16
                z = self.mask_token(z, mask)                 #                  move 2: the token, at hidden places
            z = self.encoder.run(stage, z)
        z = self.to_map(z)                                   # (B, C, H/s, W/s) s = 32 (CNN, Swin), 16 (ViT)
        return self.decoder(z)                               # (B, 3, H, W)     each feature paints its s x s pixels

    def to_map(self, z: Tensor) -> Tensor:
        """Features in the encoder's layout -> (B, C, h, w); a class token is dropped."""
        if z.dim() == 3:
            h, w = (side // self.stride for side in self.image_size)
            return z[:, -h * w:].transpose(1, 2).unflatten(2, (h, w))
        return z.permute(0, 3, 1, 2) if self.encoder.layout == "nhwc" else z

    def find_stride(self, last: torch.Size) -> int:
        """Pixels per feature of the encoder's output; ValueError where it is not one whole number in both directions."""
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
        raise ValueError(f"image size {H}x{W}: the encoder turns it into features {tuple(last[1:])}, which do not tile it; "
                         f"use sides that are multiples of the encoder's stride")

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For pictures, in eval mode: (what the encoder sees, the painted image, the true image with hidden cells painted)."""
        training = self.training
        self.eval()
        painted = self(images, mask).float()
        self.train(training)
        return fill_hidden(images, mask, self.fill), painted, torch.where(resize_mask(mask, self.image_size), painted, images)


# ---- weights in ----

RENAMES = [  # the authors' names -> torchvision's (ConvNeXt) and BEiT's (ViT); their ResNet has torchvision's already
    (r"^downsample_layers\.(\d)\.", lambda m: f"features.{2 * int(m[1])}."),
    (r"^stages\.(\d)\.(\d+)\.gamma$", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.layer_scale"),
    (r"^stages\.(\d)\.(\d+)\.(depthwise_conv|norm|pointwise_conv1|pointwise_conv2)\.", lambda m: "features.{}.{}.block.{}.".format(
        2 * int(m[1]) + 1, m[2], {"depthwise_conv": 0, "norm": 2, "pointwise_conv1": 3, "pointwise_conv2": 5}[m[3]])),
    (r"^norm3\.", "classifier.0."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
]


def load_checked(path: str | Path):
    """torch.load of plain values alone; a `.pt` is a zip, whose checksums torch.load never looks at: a flipped byte raises here."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise OSError(f"{path}: {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A file of weights -> {plain backbone name: tensor}, whatever it was wrapped in.

    Takes `backbone.pt`, `checkpoint.pt`, a torchvision state dict, or a released checkpoint (`state_dict`, `module.`,
    `backbone.`, the authors' names). Nothing in the file is executed. Raises ValueError where it holds no weights, or damaged ones."""
    try:
        state = load_checked(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception:                                        # torch.load has no one type for a broken file
        raise ValueError(f"{path}: not a file of weights (truncated, damaged, another format, or holding code to run)") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no weights; expected a state dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: holds a tensor under {name!r}; expected a state dict with names as keys")
        if isinstance(tensor, Tensor) and (tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex()):
            raise ValueError(f"{path}: {name} is no plain tensor (meta, sparse, quantized or complex); save the weights as dense real numbers")
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; these weights are of no use, take an earlier file")
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for prefix in ("module.", "encoder.", "backbone."):
        if any(name.startswith(prefix) for name in state):   # the others are decoder, token, head: keep their names
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for pattern, replacement in RENAMES:
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


def load_backbone(encoder: Encoder, path: str | Path) -> dict[str, list[str]]:
    """Loads what fits from `path` into encoder.backbone; returns names: {'used', 'resized', 'skipped', 'missing'}.

    resized: position tables of another image size (bicubic), used too; skipped: in the file, not in the backbone (heads,
    decoder, token) or of another shape; missing: in the backbone, not in the file. Raises ValueError as `read_weights`
    does, or where less than nine tenths of the backbone's parameters are found."""
    state, own = read_weights(path), encoder.backbone.state_dict()
    used, resized = {}, []
    for name, tensor in state.items():
        if name not in own:
            continue
        if tensor.squeeze().shape != own[name].squeeze().shape and name.endswith(("pos_embed", "relative_position_bias_table")):
            tensor = resize_positions(name, tensor, encoder.backbone)
            resized.append(name)
        if tensor is not None and tensor.squeeze().shape == own[name].squeeze().shape:
            used[name] = tensor.reshape(own[name].shape)     # (C) for (C, 1, 1), 1x1 convolution for linear
    parameters = [name for name, _ in encoder.backbone.named_parameters()]
    found = sum(name in used for name in parameters)
    if found < 0.9 * len(parameters):
        raise ValueError(f"{path}: fits {found} of this backbone's {len(parameters)} parameters; is it another architecture?")
    encoder.backbone.load_state_dict(used, strict=False)
    return {"used": sorted(used), "resized": [n for n in resized if n in used], "skipped": sorted(set(state) - set(used)),
            "missing": sorted(set(own) - set(used))}


def resize_positions(name: str, table: Tensor, backbone: nn.Module) -> Tensor | None:
    """A position table of one image size, bicubically resized to the backbone's; None where the old grid was not square.

    pos_embed (1, 1 + hw, C), class token first; ViT's bias table ((2h-1)(2w-1) + 3, heads), class pairs last; Swin's has no extras."""
    if not isinstance(backbone, ViT):
        new, first, last = (math.isqrt(len(backbone.state_dict()[name])),) * 2, 0, 0
    elif name.endswith("pos_embed"):
        table, new, first, last = table[0], backbone.grid, 1, 0
    else:
        new, first, last = (2 * backbone.grid[0] - 1, 2 * backbone.grid[1] - 1), 0, 3
    middle = table[first:len(table) - last]
    side = math.isqrt(len(middle))
    if side * side != len(middle):
        return None
    middle = middle.T.reshape(1, -1, side, side).float()     # (1, C, side, side)
    middle = F.interpolate(middle, new, mode="bicubic", align_corners=False)[0].flatten(1).T.to(table.dtype)
    table = torch.cat([table[:first], middle, table[len(table) - last:]])
    return table[None] if name.endswith("pos_embed") else table
