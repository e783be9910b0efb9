"""Weights in: our own files, torchvision's, the authors' released checkpoints.

    read_weights    a file as {plain backbone name: tensor}, whatever it was wrapped in
    load_backbone   what fits of it, into an encoder; and what did not
    load_head       the classification head
"""

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Container, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import load_checked
from .flags import pair

BLOCK = {"depthwise_conv": 0, "norm": 2, "pointwise_conv1": 3, "pointwise_conv2": 5}
RENAMES = [  # the authors' names -> torchvision's (ConvNeXt) and BEiT's (ViT); their ResNet has torchvision's already
    (r"^downsample_layers\.(\d)\.", lambda m: f"features.{2 * int(m[1])}."),
    (r"^stages\.(\d)\.(\d+)\.gamma$", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.layer_scale"),
    (r"^stages\.(\d)\.(\d+)\.(depthwise_conv|norm|pointwise_conv1|pointwise_conv2)\.",
     lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.block.{BLOCK[m[3]]}."),
    (r"^norm3\.", "classifier.0."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"(\.denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2."),             # torchvision's own files of DenseNet
]


def read_weights(path: str | Path, own: Container[str] = ()) -> dict[str, Tensor]:
    """A file of weights -> {plain backbone name: tensor}, whatever it was wrapped in.

    Takes `backbone.pt`, `checkpoint.pt`, a torchvision state dict, or a released checkpoint (`state_dict`, `module.`,
    `backbone.`, the authors' names). Names in `own` stay as they are (MNASNet's layers.0). Nothing in it is executed.
    Raises ValueError if it holds no weights, or damaged ones."""
    try:
        state = load_checked(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception:                                        # torch.load has no one type for a broken file
        raise ValueError(f"{path}: not a file of weights (truncated, damaged, another format, or holding code to run)"
                         ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no weights; expected a state dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: holds a tensor under {name!r}; expected a state dict with names as keys")
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"{path}: {name} is no plain tensor (meta, sparse, quantized or complex); save the "
                             f"weights as dense real numbers")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; these weights are of no use, take an earlier file")
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for prefix in ("module.", "encoder.", "backbone."):
        if any(name.startswith(prefix) for name in state):   # the others are decoder, token, head: keep their names
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for pattern, replacement in RENAMES:
        state = {name if name in own else re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


def load_backbone(encoder: nn.Module, path: str | Path, made_at: int | Sequence[int] | None = None
                  ) -> dict[str, list[str]]:
    """Loads what fits from `path` into encoder.backbone; returns names: {'used', 'resized', 'skipped', 'missing'}.

    resized: position tables of another image size (bicubic), used too; skipped: in the file, not in the backbone
    (heads, decoder, token) or of another shape; missing: in the backbone, not in the file. made_at: the image size of
    these tables, by default as in args.json beside the file, else a square. Raises ValueError as `read_weights` does,
    or if less than nine tenths of the backbone's parameters are found."""
    full, head = encoder.backbone.state_dict(), (f"{encoder.head_name}.",) if encoder.head_name else ()
    own = {name: tensor for name, tensor in full.items() if not name.startswith(head)}
    state, used, resized = read_weights(path, own), {}, []
    made_at = made_at or beside(path)
    for name, tensor in state.items():
        if name not in own:
            continue
        if name.endswith(("pos_embed", "relative_position_bias_table")):
            table = resize_positions(name, tensor, encoder.backbone, made_at)
            if table is not tensor:
                tensor, resized = table, [*resized, name]
        if tensor is not None and tensor.squeeze().shape == own[name].squeeze().shape:
            used[name] = tensor.reshape(own[name].shape)     # (C) for (C, 1, 1), 1x1 convolution for linear
    parameters = [name for name, _ in encoder.backbone.named_parameters() if name in own]
    found = sum(name in used for name in parameters)
    if found < 0.9 * len(parameters):
        raise ValueError(f"{path}: fits {found} of this backbone's {len(parameters)} parameters; is it another "
                         f"architecture?")
    full.update(used)                                        # keeps the version notes that MNASNet asks for
    encoder.backbone.load_state_dict(full)
    return {"used": sorted(used), "resized": [n for n in resized if n in used],
            "skipped": sorted(set(state) - set(used)), "missing": sorted(set(own) - set(used))}


def beside(path: str | Path) -> int | list[int] | None:
    """The image size in the args.json beside a file of weights; None if there is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        size = json.loads((Path(path).parent / "args.json").read_text()).get("image_size")
        sides = size if type(size) is list else [size]
        return size if len(sides) in (1, 2) and all(type(side) is int for side in sides) else None


def resize_positions(name: str, table: Tensor, backbone: nn.Module, made_at: int | Sequence[int] | None
                     ) -> Tensor | None:
    """A position table of one image size, bicubically resized to the backbone's; the same object if that is its own
    size; None if the old grid is not known: it does not follow from made_at, and is not square.

    pos_embed (1, 1 + hw, C), class token first; ViT's bias table ((2h-1)(2w-1) + 3, heads), class pairs last; Swin's
    has no extras."""
    whole = table
    if not hasattr(backbone, "grid"):                       # Swin: one table per window
        new, first, last, old = (math.isqrt(len(backbone.state_dict()[name])),) * 2, 0, 0, None
    else:
        patch = backbone.patch_embed.proj.stride[0]
        new, old = backbone.grid, [side // patch for side in pair(made_at)] if made_at else None
        if name.endswith("pos_embed"):
            table, first, last = table[0], 1, 0
        else:
            (new, old), first, last = ([2 * side - 1 for side in grid] if grid else None for grid in (new, old)), 0, 3
    middle = table[first:len(table) - last]
    if not old or old[0] * old[1] != len(middle):            # not told, or of other patches
        old = new if len(middle) == new[0] * new[1] else [math.isqrt(len(middle))] * 2
    if [*old] == [*new]:
        return whole
    if old[0] * old[1] != len(middle):
        return None
    middle = middle.T.reshape(1, -1, *old).float()           # (1, C, h, w)
    middle = F.interpolate(middle, tuple(new), mode="bicubic", align_corners=False)[0].flatten(1).T.to(table.dtype)
    table = torch.cat([table[:first], middle, table[len(table) - last:]])
    return table[None] if name.endswith("pos_embed") else table


def told(found: dict[str, list[str]], head: set[str] | None = None) -> str:
    """What load_backbone found in a file, in one line. head: the names of the head's weights that were taken, {} if a
    fresh one is made; None if none is wanted."""
    new = ["head"] * (head is not None and not head) + found["missing"]
    unused = [name for name in found["skipped"] if name not in (head or ())]
    odd = [name for name in unused if not name.startswith(("decoder.", "mask_token.", "neck."))]
    return (f"{len(found['used'])} tensors loaded" + (", and the head" if head else "")
            + (f", {len(found['resized'])} of them resized" if found["resized"] else "")
            + f"; new: {', '.join(new[:4]) or 'none'}; not used: {len(unused)}"
            + (f" ({', '.join(odd[:4])})" if odd else ""))


def load_head(model: nn.Module, path: str | Path) -> set[str]:
    """The head of a Classifier (ViT: and its norm) from best.pt, torchvision's or a released file; its names there.

    Raises ValueError if the file holds no head, or one for another number of classes."""
    state = read_weights(path, model.encoder.backbone.state_dict())
    heads = (model.encoder.head_name or model.family.head, "head", "head.fc")
    found = {(own, k): next((f"{name}.{k}" for name in names if f"{name}.{k}" in state), None)
             for own, names in ((model.head, heads), (model.norm, ("fc_norm", "norm"))) for k in own.state_dict()}
    if None in found.values():
        raise ValueError(f"{path}: holds no classification head; give weights that have one, such as best.pt of a "
                         f"fine-tuned run")
    last, mine = [(k, w) for k, w in model.head.state_dict().items() if k.endswith("weight")][-1]
    weight = state[found[model.head, last]]
    if weight.dim() == mine.dim() and len(weight) != len(mine):
        raise ValueError(f"{path}: its head tells {len(weight)} classes apart, the data has {len(mine)}")
    if any(state[name].shape != own.state_dict()[k].shape for (own, k), name in found.items()):
        raise ValueError(f"{path}: holds a classification head of another shape; is it another architecture?")
    for own in (model.head, model.norm):
        own.load_state_dict({k: state[found[own, k]] for k in own.state_dict()})
    return set(found.values())
