"""Weights in: our own files, torchvision's, the authors' released checkpoints.

    read_weights    a file as {plain backbone name: tensor}, whatever it was wrapped in
    load_backbone   what fits of it, into an encoder; and what did not
    load_head       the classification head
"""

import contextlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Container, Iterable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import load_checked, printable
from .flags import height_width

# where other programs keep the weights in a checkpoint; SparK: module, DINO and iBOT: teacher
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "teacher")
BLOCK = {"depthwise_conv": 0, "norm": 2, "pointwise_conv1": 3, "pointwise_conv2": 5}
# the authors' names -> torchvision's (ConvNeXt) and BEiT's (ViT); their ResNet has torchvision's
# already
RENAMES = [
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
    (r"(\.denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2."),  # torchvision's own files of DenseNet
]


def read_weights(path: str | Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of weights -> {plain backbone name: tensor}, whatever it was wrapped in.

    Takes `backbone.pt`, `checkpoint.pt`, a torchvision state dict, and a released checkpoint
    (`state_dict`, the authors' names). A prefix before the names (`module.`, `encoder_q.`) is taken
    off. own: the state dict of the net; a name that is in it stays as it is (MNASNet's layers.0).
    Nothing in the file is executed. Raises ValueError if it holds no weights, or damaged ones."""
    return read_stored(path, own).state


class Stored(NamedTuple):
    """The weights of a file, and how they lay in it."""
    state: dict[str, Tensor]                                 # by plain backbone name
    names: dict[str, str]  # plain backbone name -> name in the file
    prefix: str  # before the backbone's names in the file
    keys: list[str]                                          # that led to the state dict


def read_stored(path: str | Path, own: dict[str, Tensor]) -> Stored:
    """See read_weights."""
    stored, keys = open_weights(path)
    prefix = common_prefix(stored, own)
    names = plain_names(stored, own, prefix)
    state = {plain: stored[name] for plain, name in names.items()}
    for name in own.keys() & state.keys():
        check_kind(path, name, state[name], own[name])
    return Stored(state, names, prefix, keys)


def open_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """A file of weights -> (its state dict, the keys that led to it). Raises ValueError: see
    read_weights."""
    shown = printable(str(path), None)
    try:
        state = load_checked(path)
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file") from None
    except Exception as error:                               # torch.load has no one type for damage
        said = "not a file of weights (truncated, damaged, another format, or holding code to run)"
        # it cannot be opened: a folder, no permission
        if isinstance(error, OSError) and error.filename:
            said = error.strerror
        elif str(error).startswith(f"{path}: "):             # load_checked's own words
            said = printable(str(error).removeprefix(f"{path}: "))
        raise ValueError(f"{shown}: {said}") from None

    keys = []
    while len(keys) < len(WRAPPERS) and (key := wrapper_of(state)):
        state = state[key]
        keys.append(key)
    no_weights = f"{shown}: holds no weights; expected a state dict of tensors, found"
    if not isinstance(state, dict):
        raise ValueError(f"{no_weights} {type(state).__name__}")
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{no_weights} the keys {some_names(map(str, state)) or '(none)'}")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{shown}: holds a tensor under {printable(repr(name))}; expected a state "
                             f"dict with names as keys")
        if isinstance(tensor, Tensor):
            check_numbers(path, name, tensor)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}, keys


def wrapper_of(state) -> str | None:
    """The key of a checkpoint that leads to its weights."""
    if not isinstance(state, dict):
        return None
    for key in WRAPPERS:
        inner = state.get(key)
        if isinstance(inner, dict) and any(isinstance(v, (Tensor, dict)) for v in inner.values()):
            return key
    return None


def check_numbers(path: str | Path, name: str, tensor: Tensor) -> None:
    """Raises ValueError if a tensor of a file cannot be used by any net."""
    where = f"{printable(str(path), None)}: {printable(name)}"
    strided = tensor.layout == torch.strided
    if tensor.is_meta or not strided or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"{where} is no plain tensor (meta, sparse, quantized or complex); save the "
                         f"weights as dense real numbers")
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where} is {tensor.dtype}, which is not used here; save it as float32")
    if not tensor.float().isfinite().all():                  # in float32, in which they are used
        raise ValueError(f"{where} holds NaN or infinity; these weights are of no use, take an earlier "
                         f"file")


def check_kind(path: str | Path, name: str, tensor: Tensor, own: Tensor) -> None:
    """Raises ValueError for integers in place of weights: a quantized net has their scale
    elsewhere."""
    if own.is_floating_point() and not tensor.is_floating_point():
        shown = printable(str(path), None)
        raise ValueError(f"{shown}: {name} is {tensor.dtype}, expected real numbers; save it as float32")


def common_prefix(names: Iterable[str], own: Container[str]) -> str:
    """What stands before the names of a net in a file, such as 'module.encoder_q.', or ''.

    With it the most names of the net are found. Of several such prefixes the shortest is taken,
    then the first in the file."""
    counts = Counter()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if rename(".".join(parts[i:]), own) in own:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def plain_names(names: Iterable[str], own: Container[str], prefix: str) -> dict[str, str]:
    """{plain backbone name: name in the file}. Names outside the backbone lose the parts of the
    prefix that they have, and keep the rest: module.neck.x becomes neck.x."""
    inside, outside = {}, {}
    for name in names:
        plain = name
        for part in prefix.split(".")[:-1]:
            plain = plain.removeprefix(part + ".")
        found = inside if name.startswith(prefix) else outside
        found[rename(plain, own)] = name
    return {**outside, **inside}                             # the backbone's own take precedence


def rename(name: str, own: Container[str]) -> str:
    """A name of the authors' as ours; a name in `own` stays."""
    for pattern, replacement in RENAMES:
        if name not in own:
            name = re.sub(pattern, replacement, name)
    return name


def some_names(names: Iterable[str], most: int = 4) -> str:
    """The first few names, in one harmless line."""
    names = [printable(name, 60) for name in names]
    more = ", ..." if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_backbone(encoder: nn.Module, path: str | Path, made_at: int | Sequence[int] | None = None
                  ) -> dict[str, list[str]]:
    """Loads what fits from `path` into encoder.backbone; returns names: {'used', 'resized',
    'skipped', 'missing'}.

    taken_off: what stood around the names in the file: ["under 'teacher'", "prefix 'backbone.'
    taken off"]. resized: position tables of another image size (bicubic), used too; skipped: in the
    file, not in the backbone (heads, decoder, token) or of another shape; missing: in the backbone,
    not in the file. made_at: the image size of these tables, by default as in args.json beside the
    file, else a square. Raises ValueError as `read_weights` does, or if less than nine tenths of
    the backbone's parameters are found."""
    full, head = encoder.backbone.state_dict(), (f"{encoder.head_name}.",) if encoder.head_name else ()
    own = {name: tensor for name, tensor in full.items() if not name.startswith(head)}
    stored = read_stored(path, own)
    state, used, resized = stored.state, {}, []
    made_at = made_at or beside(path)
    for name, tensor in state.items():
        if name not in own:
            continue
        if name.endswith(("pos_embed", "relative_position_bias_table")):
            table = resize_positions(name, tensor, encoder.backbone, made_at)
            if table is not tensor:
                tensor, resized = table, [*resized, name]
        if tensor is not None and tensor.squeeze().shape == own[name].squeeze().shape:
            # (C) for (C, 1, 1), 1x1 convolution for linear
            used[name] = tensor.reshape(own[name].shape)
    parameters = [name for name, _ in encoder.backbone.named_parameters() if name in own]
    found = sum(name in used for name in parameters)
    if found < 0.9 * len(parameters):
        shown = printable(str(path), None)
        raise ValueError(f"{shown}: fits {found} of this backbone's {len(parameters)} parameters; is it "
                         f"another architecture? {side_by_side(stored, own, used)}")
    taken_off = [f"under {key!r}" for key in stored.keys[-1:]]
    if stored.prefix:
        taken_off.append(f"prefix {printable(stored.prefix)!r} taken off")
    full.update(used)  # keeps the version notes that MNASNet asks for
    encoder.backbone.load_state_dict(full)
    return {"used": sorted(used), "resized": [n for n in resized if n in used],
            "skipped": sorted(set(state) - set(used)), "missing": sorted(set(own) - set(used)),
            "taken_off": taken_off}


def side_by_side(stored: Stored, own: dict[str, Tensor], used: Container[str]) -> str:
    """How a file that does not fit differs: one tensor of it beside one of the backbone."""
    ours = next(name for name in own if name not in used)
    if ours in stored.state:
        shape = tuple(stored.state[ours].shape)
        return f"{ours} is {shape} in the file, {tuple(own[ours].shape)} here"
    left = [name for plain, name in stored.names.items() if plain not in used]
    return f"The file has {printable(left[0]) if left else 'no other'}, this backbone {ours}"


def beside(path: str | Path) -> int | list[int] | None:
    """The image size in the args.json beside a file of weights; None if there is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        size = json.loads((Path(path).parent / "args.json").read_text()).get("image_size")
        sides = size if type(size) is list else [size]
        return size if len(sides) in (1, 2) and all(type(side) is int for side in sides) else None


def resize_positions(name: str, table: Tensor, backbone: nn.Module, made_at: int | Sequence[int] | None
                     ) -> Tensor | None:
    """A position table of one image size, bicubically resized to the backbone's; the same object if
    that is its own size; None if the old grid is not known: it does not follow from made_at, and is
    not square.

    pos_embed (1, 1 + hw, C), class token first; ViT's bias table ((2h-1)(2w-1) + 3, heads), class
    pairs last; Swin's has no extras."""
    whole = table
    if not hasattr(backbone, "grid"):                       # Swin: one table per window
        new, first, last, old = (math.isqrt(len(backbone.state_dict()[name])),) * 2, 0, 0, None
    else:
        patch = backbone.patch_embed.proj.stride[0]
        new, old = backbone.grid, [side // patch for side in height_width(made_at)] if made_at else None
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


def summary_of(found: dict[str, list[str]], head: set[str] | None = None) -> str:
    """What load_backbone found in a file, in one line. head: the names of the head's weights that
    were taken, {} if a fresh one is made; None if none is wanted."""
    new = ["head"] * (head is not None and not head) + found["missing"]
    unused = [name for name in found["skipped"] if name not in (head or ())]
    odd = [name for name in unused if not name.startswith(("decoder.", "mask_token.", "neck."))]
    taken_off = f" ({', '.join(found['taken_off'])})" if found["taken_off"] else ""
    return (f"{len(found['used'])} tensors loaded{taken_off}" + (", and the head" if head else "")
            + (f", {len(found['resized'])} of them resized" if found["resized"] else "")
            + f"; new: {', '.join(new[:4]) or 'none'}; not used: {len(unused)}"
            + (f" ({', '.join(map(printable, odd[:4]))})" if odd else ""))


def load_head(model: nn.Module, path: str | Path) -> set[str]:
    """The head of a Classifier (ViT: and its norm) from best.pt, torchvision's or a released file;
    its names there.

    Raises ValueError if the file holds no head, or one for another number of classes."""
    shown = printable(str(path), None)
    state = read_weights(path, model.encoder.backbone.state_dict())
    heads = (model.encoder.head_name or model.family.head, "head", "head.fc")
    found = {(own, k): next((f"{name}.{k}" for name in names if f"{name}.{k}" in state), None)
             for own, names in ((model.head, heads), (model.norm, ("fc_norm", "norm"))) for k in own.state_dict()}
    if None in found.values():
        raise ValueError(f"{shown}: holds no classification head; give weights that have one, such as "
                         f"best.pt of a fine-tuned run")
    last, mine = [(k, w) for k, w in model.head.state_dict().items() if k.endswith("weight")][-1]
    weight = state[found[model.head, last]]
    if weight.dim() == mine.dim() and len(weight) != len(mine):
        raise ValueError(f"{shown}: its head tells {len(weight)} classes apart, the data has "
                         f"{len(mine)}")
    if any(state[name].shape != own.state_dict()[k].shape for (own, k), name in found.items()):
        raise ValueError(f"{shown}: holds a classification head of another shape; is it another "
                         f"architecture?")
    for (own, k), name in found.items():
        check_kind(path, name, state[name], own.state_dict()[k])
    for own in (model.head, model.norm):
        own.load_state_dict({k: state[found[own, k]] for k in own.state_dict()})
    return set(found.values())
