"""Weights from files: our own, torchvision's, the authors' released checkpoints.

    read_weights    a file as {backbone name: tensor}, whatever it is wrapped in
    load_backbone   loads what fits into an encoder, and reports what did not
    load_head       loads the classification head
    summary_of      the report in one line
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

from .files import is_out_of_memory, load_checked, printable
from .flags import height_width

# ---- names in other programs' files ----

# keys that lead to the weights in a checkpoint: SparK's is module, DINO's and iBOT's teacher
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "teacher")

BLOCK = {"depthwise_conv": 0, "norm": 2, "pointwise_conv1": 3, "pointwise_conv2": 5}


def convnext_stage(m: re.Match) -> str:
    return f"features.{2 * int(m[1]) + 1}.{m[2]}"


# the authors' names -> torchvision's (ConvNeXt) and BEiT's (ViT). Their ResNet has torchvision's
RENAMES = [
    (r"^downsample_layers\.(\d)\.", lambda m: f"features.{2 * int(m[1])}."),
    (r"^stages\.(\d)\.(\d+)\.gamma$", lambda m: f"{convnext_stage(m)}.layer_scale"),
    (r"^stages\.(\d)\.(\d+)\.(depthwise_conv|norm|pointwise_conv1|pointwise_conv2)\.",
     lambda m: f"{convnext_stage(m)}.block.{BLOCK[m[3]]}."),
    (r"^norm3\.", "classifier.0."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    # torchvision's own files of DenseNet
    (r"(\.denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2."),
]


def rename(name: str, own: Container[str]) -> str:
    """One of the authors' names as ours. A name in `own` stays."""
    for pattern, replacement in RENAMES:
        if name not in own:
            name = re.sub(pattern, replacement, name)
    return name


def common_prefix(names: Iterable[str], own: Container[str]) -> str:
    """The prefix of a net's names in a file, such as 'module.encoder_q.', or ''.

    It is the prefix with which most names of the net are found: of several the shortest, then the
    first in the file."""
    counts = Counter()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            rest = ".".join(parts[i:])
            if rename(rest, own) in own:
                prefix = name.removesuffix(rest)
                counts[prefix] += 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def plain_names(names: Iterable[str], own: Container[str], prefix: str) -> dict[str, str]:
    """{backbone name: name in the file}.

    A name outside the backbone loses those parts of the prefix that it starts with: beside
    module.backbone.x, module.neck.x becomes neck.x."""
    inside, outside = {}, {}
    for name in names:
        plain = name
        for part in prefix.split(".")[:-1]:
            plain = plain.removeprefix(part + ".")
        group = inside if name.startswith(prefix) else outside
        group[rename(plain, own)] = name
    return {**outside, **inside}                             # the backbone's names take precedence


def some_names(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, in one harmless line."""
    names = [printable(name, 60) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


# ---- reading a file ----

def read_weights(path: str | Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of weights -> {backbone name: tensor}, whatever it is wrapped in.

    Reads `backbone.pt`, `checkpoint.pt`, a state dict of torchvision, and released checkpoints
    (`state_dict`, the authors' names). A prefix before the names (`module.`, `encoder_q.`) is
    removed. Nothing in the file is executed.

    own: the state dict of the net. A name that is in it is kept (MNASNet has layers.0).

    Raises ValueError if the file holds no weights, or damaged ones."""
    return read_stored(path, own).state


class Stored(NamedTuple):
    """The weights of a file, and how they are named in it."""
    state: dict[str, Tensor]                                 # by backbone name
    names: dict[str, str]                                    # backbone name -> name in the file
    prefix: str                                              # of the backbone's names in the file
    keys: list[str]                                          # that led to the state dict


def read_stored(path: str | Path, own: dict[str, Tensor]) -> Stored:
    """See read_weights."""
    stored, keys = open_weights(path)
    prefix = common_prefix(stored, own)
    names = plain_names(stored, own, prefix)
    state = {plain: stored[name] for plain, name in names.items()}
    for name in own:
        if name in state:
            check_kind(path, name, state[name], own[name])
    return Stored(state, names, prefix, keys)


def open_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """A file of weights -> (its state dict, the keys that led to it).

    Raises ValueError as read_weights does."""
    shown = printable(str(path), None)
    try:
        state = load_checked(path)
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file") from None
    except Exception as error:                               # torch.load raises many types
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{shown}: {why_not_read(error, path)}") from None

    keys = []
    while len(keys) < len(WRAPPERS) and (key := wrapper_of(state)):
        state = state[key]
        keys.append(key)
    no_weights = f"{shown}: holds no weights; expected a state dict of tensors, found"
    if not isinstance(state, dict):
        raise ValueError(f"{no_weights} {type(state).__name__}")
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{no_weights} the keys {some_names(map(str, state)) or '(none)'}")

    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{shown}: holds a tensor under {printable(repr(name))}; expected a "
                             f"state dict with names as keys")
        if isinstance(value, Tensor):
            check_numbers(path, name, value)
            tensors[name] = value
    return tensors, keys


def why_not_read(error: Exception, path: str | Path) -> str:
    """The reason why load_checked has failed."""
    if isinstance(error, OSError) and error.filename:        # a folder, or no permission
        return error.strerror
    if str(error).startswith(f"{path}: "):                   # a message of load_checked itself
        return printable(str(error).removeprefix(f"{path}: "))
    return "not a file of weights (truncated, damaged, another format, or holding code to run)"


def wrapper_of(state) -> str | None:
    """The key of a checkpoint that leads to its weights, None if there is none."""
    if not isinstance(state, dict):
        return None
    for key in WRAPPERS:
        inner = state.get(key)
        if isinstance(inner, dict):
            if any(isinstance(value, (Tensor, dict)) for value in inner.values()):
                return key
    return None


def check_numbers(path: str | Path, name: str, tensor: Tensor) -> None:
    """Raises ValueError if no net can use a tensor of a file."""
    where = f"{printable(str(path), None)}: {printable(name)}"
    is_dense = tensor.layout == torch.strided and not tensor.is_meta
    if not is_dense or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"{where} is no plain tensor (meta, sparse, quantized or complex); save "
                         f"the weights as dense real numbers")
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where} is {tensor.dtype}, which is not used here; save it as float32")
    if not tensor.float().isfinite().all():                  # in float32, as the nets use it
        raise ValueError(f"{where} holds NaN or infinity; these weights are of no use, take an "
                         f"earlier file")


def check_kind(path: str | Path, name: str, tensor: Tensor, own: Tensor) -> None:
    """Raises ValueError for integers in place of weights: the scale of a quantized weight is stored
    elsewhere."""
    if own.is_floating_point() and not tensor.is_floating_point():
        shown = printable(str(path), None)
        raise ValueError(f"{shown}: {name} is {tensor.dtype}, expected real numbers; save it as "
                         f"float32")


# ---- the backbone ----

def load_backbone(encoder: nn.Module, path: str | Path,
                  made_at: int | Sequence[int] | None = None) -> dict[str, list[str]]:
    """Loads what fits from a file into encoder.backbone. Returns lists of names:

    used       loaded
    resized    used, after resizing: position tables of another image size
    skipped    in the file, but not in the backbone (head, decoder, mask token), or of another shape
    missing    in the backbone, but not loaded
    taken_off  what was removed from the names in the file: ["under 'teacher'", "prefix
               'backbone.' taken off"]

    made_at: the image size of the position tables. By default it is taken from args.json beside the
    file; without args.json the tables are taken as square.

    Raises ValueError as read_weights does, or if less than nine tenths of the backbone's parameters
    are found."""
    full = encoder.backbone.state_dict()
    own = full
    if encoder.head_name:
        head = f"{encoder.head_name}."
        own = {name: tensor for name, tensor in full.items() if not name.startswith(head)}
    stored = read_stored(path, own)
    made_at = made_at or image_size_beside(path)

    used, resized = {}, []
    for name, tensor in stored.state.items():
        if name not in own:
            continue
        if name.endswith(("pos_embed", "relative_position_bias_table")):
            table = resize_positions(name, tensor, encoder.backbone, made_at)
            if table is None:
                continue
            if table is not tensor:
                resized.append(name)
            tensor = table
        # shapes may differ by sides of 1: (C) and (C, 1, 1), a linear layer and a 1x1 convolution
        if tensor.squeeze().shape == own[name].squeeze().shape:
            used[name] = tensor.reshape(own[name].shape)

    parameters = [name for name, _ in encoder.backbone.named_parameters() if name in own]
    found = sum(name in used for name in parameters)
    if found < 0.9 * len(parameters):
        shown = printable(str(path), None)
        raise ValueError(f"{shown}: fits {found} of this backbone's {len(parameters)} parameters; "
                         f"is it another architecture? {side_by_side(stored, own, used)}")
    head = str(encoder.head_name).split(".")[0]
    unused = [name for name in stored.state.keys() - used.keys() if name.split(".")[0] != head]
    extra = deeper_block(unused, own)
    if extra:
        raise ValueError(f"{printable(str(path), None)}: holds {extra}, which this backbone lacks; "
                         f"is it a deeper one?")
    # this dict is updated, because it holds the version notes that MNASNet asks for
    full.update(used)
    encoder.backbone.load_state_dict(full)

    taken_off = [f"under {key!r}" for key in stored.keys[-1:]]
    if stored.prefix:
        taken_off.append(f"prefix {printable(stored.prefix)!r} taken off")
    return {
        "used": sorted(used),
        "resized": [name for name in resized if name in used],
        "skipped": sorted(stored.state.keys() - used.keys()),
        # files of old versions of torchvision have no such counters, and nothing uses them
        "missing": sorted(name for name in own.keys() - used.keys()
                          if not name.endswith("num_batches_tracked")),
        "taken_off": taken_off,
    }


def deeper_block(unused: Iterable[str], own: Iterable[str]) -> str | None:
    """A block among the unused names, such as layer1.2, whose neighbours the backbone has."""
    blocks = {prefix for name in own for prefix in numbered_prefixes(name)}
    neighbours = Counter(prefix.rpartition(".")[0] for prefix in blocks)
    for name in sorted(unused):
        for prefix in numbered_prefixes(name):
            # two at least: a norm beside the head, as ConvNeXt's classifier.0, is no list of blocks
            if prefix not in blocks and neighbours[prefix.rpartition(".")[0]] >= 2:
                return prefix
    return None


def numbered_prefixes(name: str) -> list[str]:
    """layer1.2.conv1.weight -> [layer1.2]; features.5.10.weight -> [features.5, features.5.10]."""
    parts = name.split(".")
    return [".".join(parts[:i + 1]) for i in range(1, len(parts)) if parts[i].isdigit()]


def side_by_side(stored: Stored, own: dict[str, Tensor], used: Container[str]) -> str:
    """How a file that does not fit differs: one tensor of it beside one of the backbone."""
    ours = next(name for name in own if name not in used)
    if ours in stored.state:
        shape = tuple(stored.state[ours].shape)
        return f"{ours} is {shape} in the file, {tuple(own[ours].shape)} here"
    others = [name for plain, name in stored.names.items() if plain not in used]
    return f"The file has {printable(others[0]) if others else 'no other'}, this backbone {ours}"


def image_size_beside(path: str | Path) -> int | list[int] | None:
    """The image size in the args.json beside a file of weights; None if it is not there."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        settings = json.loads((Path(path).parent / "args.json").read_text())
        size = settings.get("image_size")
        sides = size if type(size) is list else [size]
        if len(sides) in (1, 2) and all(type(side) is int for side in sides):
            return size
    return None


# ---- position tables ----

def resize_positions(name: str, table: Tensor, backbone: nn.Module,
                     made_at: int | Sequence[int] | None) -> Tensor | None:
    """A position table of one image size, resized to the backbone's grid (bicubic).

    pos_embed                     (1, 1 + hw, C), class token first
    relative_position_bias_table  ViT: ((2h-1)(2w-1) + 3, heads), the pairs with the class token
                                  last. Swin: ((2h-1)(2w-1), heads), for a square window

    Returns the same object if the grids are equal, and None if the old grid is unknown: it does not
    follow from `made_at`, and is not square."""
    is_embedding = name.endswith("pos_embed")
    if table.dim() != (3 if is_embedding else 2) or 0 in table.shape:        # of another program
        return None
    rows = table[0] if is_embedding else table               # (first + hw + last, C)
    old = None
    if hasattr(backbone, "grid"):                            # ViT
        first, last = (1, 0) if is_embedding else (0, 3)     # rows that are no position
        new = list(backbone.grid)
        if made_at:
            patch = backbone.patch_embed.proj.stride[0]
            old = [side // patch for side in height_width(made_at)]
        if not is_embedding:                                 # relative positions: -(h-1) to h-1
            new = [2 * side - 1 for side in new]
            old = old and [2 * side - 1 for side in old]
    else:                                                    # Swin: one table per window
        first, last = 0, 0
        new = [math.isqrt(len(backbone.state_dict()[name]))] * 2

    count = len(rows) - first - last
    if count <= 0:
        return None
    if not old or old[0] * old[1] != count:                  # not known, or of other patches
        old = new if count == new[0] * new[1] else [math.isqrt(count)] * 2
    if old == new:
        return table
    if old[0] * old[1] != count:
        return None
    positions = rows[first:first + count]                    # (hw, C)
    positions = positions.T.reshape(1, -1, *old).float()     # (1, C, h, w)
    positions = F.interpolate(positions, tuple(new), mode="bicubic", align_corners=False)
    positions = positions[0].flatten(1).T.to(table.dtype)    # (h'w', C)
    rows = torch.cat([rows[:first], positions, rows[first + count:]])
    return rows[None] if is_embedding else rows


# ---- the report, and the head ----

def summary_of(found: dict[str, list[str]], head: set[str] | None = None) -> str:
    """What load_backbone found in a file, in one line.

    head: the names that load_head found in the file; an empty set if a new head is made, None if
    the net has none."""
    new = list(found["missing"])
    if head is not None and not head:
        new.insert(0, "head")
    unused = [name for name in found["skipped"] if name not in (head or ())]
    expected = ("decoder.", "mask_token.", "neck.")          # parts of pre-training
    odd = [name for name in unused if not name.startswith(expected)]

    text = f"{len(found['used'])} tensors loaded"
    if found["taken_off"]:
        text += f" ({', '.join(found['taken_off'])})"
    if head:
        text += ", and the head"
    if found["resized"]:
        text += f", {len(found['resized'])} of them resized"
    names = some_names(new) or "none"
    if len(new) > 4:
        names = f"{len(new)} ({names})"
    text += f"; new: {names}; not used: {len(unused)}"
    if odd:
        text += f" ({some_names(odd)})"
    return text


def load_head(model: nn.Module, path: str | Path) -> set[str]:
    """Loads the head of a model.Classifier (ViT: and its norm) from best.pt, a file of torchvision
    or a released one. Returns the names of its tensors in the file.

    Raises ValueError if the file holds no head, or a head for another number of classes."""
    shown = printable(str(path), None)
    state = read_weights(path, model.encoder.backbone.state_dict())
    head_names = (model.encoder.head_name or model.family.head, "head", "head.fc")
    head = names_in_file(model.head, head_names, state)
    norm = names_in_file(model.norm, ("fc_norm", "norm"), state)
    if None in (*head.values(), *norm.values()):
        raise ValueError(f"{shown}: holds no classification head; give weights that have one, such "
                         f"as best.pt of a fine-tuned run")

    own = model.head.state_dict()
    last = [name for name in own if name.endswith("weight")][-1]             # (classes, C)
    weight = state[head[last]]
    if weight.dim() == own[last].dim() and len(weight) != len(own[last]):
        raise ValueError(f"{shown}: its head tells {len(weight)} classes apart, the data has "
                         f"{len(own[last])}")
    for module, names in ((model.head, head), (model.norm, norm)):
        loaded = {}
        for name, tensor in module.state_dict().items():
            stored = state[names[name]]
            if stored.shape != tensor.shape:
                raise ValueError(f"{shown}: holds a classification head of another shape; is it "
                                 f"another architecture?")
            check_kind(path, names[name], stored, tensor)
            loaded[name] = stored
        module.load_state_dict(loaded)
    return {*head.values(), *norm.values()}


def names_in_file(module: nn.Module, prefixes: Iterable[str],
                  state: Container[str]) -> dict[str, str | None]:
    """{name in the module: name in the file}, by the first prefix that fits; None if none does."""
    names = {}
    for name in module.state_dict():
        choices = [f"{prefix}.{name}" for prefix in prefixes]
        names[name] = next((choice for choice in choices if choice in state), None)
    return names
