"""What a run leaves on the disk and what it takes from there: checkpoints that survive a kill, log lines, weights.

    load_checked     torch.load for files that may be damaged
    save_atomically  a file is the old one or the new one, never half of either
    read_checkpoint  the last one that is whole
    load_backbone    weights in: our files, torchvision's, the authors' released checkpoints
"""

import contextlib
import json
import math
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Container

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .command import World

# ---- the output folder ----

def make_folder(args: SimpleNamespace, world: World, global_batch: int) -> None:
    """The output folder, and args.json in it: every setting as it came out, and the versions."""
    if world.rank == 0:
        used = dict(global_batch=global_batch, torch=torch.__version__, torchvision=torchvision.__version__,
                    world=world.size, device=world.device.type)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "args.json").write_text(json.dumps({**settings(args), **used}, indent=1) + "\n")


def settings(args: SimpleNamespace) -> dict:
    """What args.json and a checkpoint remember of the flags."""
    return {k: v for k, v in vars(args).items() if k not in ("given", "demo", "resume", "download")}


# ---- checkpoints ----

def load_checked(path: str | Path):
    """torch.load of plain values: nothing in the file is executed. Raises OSError if a byte of it has flipped.

    A `.pt` is a zip file with checksums, and torch.load does not look at them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise OSError(f"{path}: {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_atomically(state: dict, path: Path, keep_previous: bool = False) -> None:
    """Write beside, flush to the disk, rename: a kill at any moment, or a full disk, leaves the old or the new file.

    With `keep_previous` the old one stays as <stem>-previous.pt. Raises OSError if the file cannot be written."""
    beside, previous = path.with_name(path.name + ".tmp"), path.with_stem(path.stem + "-previous")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():                  # a second name for the old file: one is always there
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:                                  # a file system without links
                shutil.copyfile(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                 # torch wraps the errors of the disk
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} not written: {str(error).splitlines()[0]}") from None


def read_checkpoint(out: Path) -> dict | None:
    """checkpoint.pt of a run, or the one before it if that is broken; None if there is none yet.

    Raises ValueError if no file can be read."""
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint-previous.pt") if path.exists()]
    for path in paths:
        with contextlib.suppress(Exception):                 # torch.load has no one type for a broken file
            state = load_checked(path)
            if {"step", "per_epoch", "world", "args", "skipped"} <= set(state):
                return dict(state, path=str(path))
    if paths:
        raise ValueError(f"{paths[0]}: cannot be read; is it whole, and a checkpoint of this program? "
                         f"Move it away to start anew")
    return None


# ---- log lines ----

def append_line(log: Path, line: dict) -> None:
    """Adds a line to log.jsonl, behind a whole one: the last may be cut if the disk was full."""
    with open(log, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(log: Path) -> list[dict]:
    """The lines of log.jsonl that are whole."""
    lines = []
    for text in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def trim_log(log: Path, epoch: float) -> None:
    """Drops the lines after `epoch`: these steps are about to be made again."""
    if log.exists():
        beside = log.with_name(log.name + ".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in read_lines(log) if line["epoch"] <= epoch + 5e-5))
        os.replace(beside, log)


def printable(name: str) -> str:
    """A file name to be said or written: bytes that are no UTF-8 as backslash escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource                                      # not on Windows
    except ImportError:
        return 0.0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)


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
    (r"(\.denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2."),             # torchvision's own files of DenseNet
]


def read_weights(path: str | Path, own: Container[str] = ()) -> dict[str, Tensor]:
    """A file of weights -> {plain backbone name: tensor}, whatever it was wrapped in.

    Takes `backbone.pt`, `checkpoint.pt`, a torchvision state dict, or a released checkpoint (`state_dict`, `module.`,
    `backbone.`, the authors' names). Names in `own` stay as they are (MNASNet's layers.0). Nothing in the file is executed.
    Raises ValueError if it holds no weights, or damaged ones."""
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
        state = {name if name in own else re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


def load_backbone(encoder: nn.Module, path: str | Path) -> dict[str, list[str]]:
    """Loads what fits from `path` into encoder.backbone; returns names: {'used', 'resized', 'skipped', 'missing'}.

    resized: position tables of another image size (bicubic), used too; skipped: in the file, not in the backbone (heads,
    decoder, token) or of another shape; missing: in the backbone, not in the file. Raises ValueError as `read_weights`
    does, or where less than nine tenths of the backbone's parameters are found."""
    full, head = encoder.backbone.state_dict(), (f"{encoder.head_name}.",) if encoder.head_name else ()
    own = {name: tensor for name, tensor in full.items() if not name.startswith(head)}
    state, used, resized = read_weights(path, own), {}, []
    for name, tensor in state.items():
        if name not in own:
            continue
        if tensor.squeeze().shape != own[name].squeeze().shape and name.endswith(("pos_embed", "relative_position_bias_table")):
            tensor = resize_positions(name, tensor, encoder.backbone)
            resized.append(name)
        if tensor is not None and tensor.squeeze().shape == own[name].squeeze().shape:
            used[name] = tensor.reshape(own[name].shape)     # (C) for (C, 1, 1), 1x1 convolution for linear
    parameters = [name for name, _ in encoder.backbone.named_parameters() if name in own]
    found = sum(name in used for name in parameters)
    if found < 0.9 * len(parameters):
        raise ValueError(f"{path}: fits {found} of this backbone's {len(parameters)} parameters; is it another architecture?")
    full.update(used)                                        # keeps the version notes that MNASNet asks for
    encoder.backbone.load_state_dict(full)
    return {"used": sorted(used), "resized": [n for n in resized if n in used], "skipped": sorted(set(state) - set(used)),
            "missing": sorted(set(own) - set(used))}


def resize_positions(name: str, table: Tensor, backbone: nn.Module) -> Tensor | None:
    """A position table of one image size, bicubically resized to the backbone's; None where the old grid was not square.

    pos_embed (1, 1 + hw, C), class token first; ViT's bias table ((2h-1)(2w-1) + 3, heads), class pairs last; Swin's has no extras."""
    if not hasattr(backbone, "grid"):                       # Swin: one table per window
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


def told(found: dict[str, list[str]], head: set[str]) -> str:
    """What load_backbone found in a file, in one line. head: the names of the head's weights, if they were taken."""
    new = ["head"] * (not head) + found["missing"]
    unused = [name for name in found["skipped"] if name not in head]
    odd = [name for name in unused if not name.startswith(("decoder.", "mask_token.", "neck."))]
    return (f"{len(found['used'])} tensors loaded" + (", and the head" if head else "")
            + (f", {len(found['resized'])} of them resized" if found["resized"] else "")
            + f"; new: {', '.join(new[:4]) or 'none'}; not used: {len(unused)}" + (f" ({', '.join(odd[:4])})" if odd else ""))
