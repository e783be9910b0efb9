"""Flags: a program's table {group: {name: (default, kind, help)}} holds everything about them.

    number, path, checked, how_often, Several
                                        kinds of flags; a wrong value gives an error of one line
    SIDES, height_width, format_size    an image size: one side of a square, or height and width
    DATA_FLAGS, STAGE_FLAGS, RUN_FLAGS  the flags of both stages
    Parser                              argparse, made from such a table
    remembered                          flags from the args.json beside a file of weights
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Sequence

import torch

from .files import printable

OLD_NAMES = {"mask_size": ["--mask-cell"], "token_stage": ["--mask-stage"]}  # still accepted
MAX_SIDE = 8192                                              # a larger number is a typing error
MAX_EPOCHS = 100_000
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- kinds of flags. bool: --flag and --no-flag; a tuple: one of its values ----

SWITCH = object()                                            # a flag without a value
SIDES = object()                                             # 224, or 192 256 (height and width)


def number(kind: type, low: float, high: float = math.inf):
    """A kind of flag: an int or float from `low` to `high`."""
    def read(text: str):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= high or value == math.inf:
            what = "an integer" if kind is int else "a number"
            limits = f" of at least {low}" if low > -math.inf else ""
            if high < math.inf:
                limits = f" from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{printable(text)}: must be {what}{limits}")
        return value
    read.metavar = "N" if kind is int else "X"
    return read


def path(metavar: str):
    """A kind of flag: any text that is not empty."""
    def read(text: str) -> str:
        if not text.strip():
            raise argparse.ArgumentTypeError("is empty (an unset shell variable?); give a value, "
                                             "or leave the flag out")
        return text
    read.metavar = metavar
    return read


def checked(metavar: str, check):
    """A kind of flag: text for which check(text) raises no ValueError."""
    def read(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text
    read.metavar = metavar
    return read


def how_often(text: str) -> str:
    """A kind of flag: '200' is every 200 steps, '10m' every ten minutes."""
    every = text.removesuffix("m")
    if not every.isdecimal() or int(every) == 0:
        raise argparse.ArgumentTypeError(f"{printable(text)}: must be a number of steps such as "
                                         f"200, or of minutes such as 10m")
    return text


how_often.metavar = "N"


class Several:
    """A kind of flag: one value or more of another kind, as a list."""

    def __init__(self, kind):
        self.kind = kind


class Sides(argparse.Action):
    """Reads SIDES as an int, or as a list [H, W], which args.json and a checkpoint can hold."""

    def __call__(self, parser, args, values, option=None):
        if len(values) > 2:
            typed = " ".join(map(str, values))
            raise argparse.ArgumentError(self, f"{typed}: must be one side of a square, or two "
                                               f"sides, height and width")
        setattr(args, self.dest, values[0] if len(values) == 1 else values)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of an image size; one number is a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def format_size(size: int | Sequence[int]) -> str:
    """An image size in words: '224 px', or '192 x 256 px' (height x width)."""
    H, W = height_width(size)
    return f"{H} px" if H == W else f"{H} x {W} px"


# ---- the flags of both stages ----

COUNT = number(int, 1)
FRACTION = number(float, 0, 1)
NONNEGATIVE = number(float, 0)

DATA_FLAGS = {
    "data_root": ("datasets", path("DIR"), "where torchvision's datasets are kept"),
    "download": (False, SWITCH, "fetch a torchvision dataset that is not there yet"),
    "workers": (None, number(int, 0, 256), "loader processes per process (cores per process - 1, "
                "1 to 16)"),
    "max_bad": (0.01, FRACTION, "stop if more than this share of the images cannot be "
                "read"),
}
STAGE_FLAGS = {
    "grad_checkpoint": (False, bool, "less memory, more time: the backward pass runs each stage of "
                        "the encoder again (nets without BatchNorm)"),
}
RUN_FLAGS = {
    "out": (None, path("DIR"), "folder for all files of the run (runs/<data>-<arch>..., numbered "
            "if taken)"),
    "resume": (False, SWITCH, "continue from checkpoint.pt in --out, with the flags of its run"),
    "seed": (0, number(int, 0), "fixes all randomness: weights, order, augmentation, masks"),
    "device": (None, ("cpu", "cuda", "mps", "xpu"), "where to compute (the accelerator of this "
               "machine, or the CPU if there is none)"),
    "amp": (None, tuple(AMP), "mixed precision (bf16 if the device has it; otherwise CUDA fp16, "
            "others off)"),
    "compile": (False, bool, "torch.compile for training steps; of little use for a ResNet on "
                "several GPUs, where SyncBatchNorm breaks the graph at every layer of the model"),
    "channels_last": (True, bool, "memory format of CNNs"),
    "tensorboard": (False, bool, "write the numbers of log.jsonl and the pictures for TensorBoard, "
                    "too"),
    "log_every": (10, COUNT, "steps between lines of log.jsonl"),
    "save_every": ("10m", how_often, "steps, or minutes such as 10m, between checkpoints; the run "
                   "ends with a checkpoint, too"),
}


# ---- the command line ----

class Parser(argparse.ArgumentParser):
    """argparse, made from a table of flags. A mistake raises ValueError with one line."""

    def __init__(self, program: str, usage: str, doc: str, flags: dict, recipes: dict):
        super().__init__(prog=program, usage=usage, description=doc, epilog=recipe_help(recipes),
                         argument_default=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.flags = flags
        by_recipe = {name for values in recipes.values() for name in values}
        for title, rows in flags.items():
            group = self.add_argument_group(title)
            for name, (default, kind, text) in rows.items():
                notes = default_notes(default, kind)
                if name in by_recipe:
                    notes.append("by recipe")
                if notes:
                    text = f"{text} ({', '.join(notes)})"
                options = dict(dest=name, **argparse_options(kind))
                group.add_argument("--" + name.replace("_", "-"), help=text, **options)
                for old in OLD_NAMES.get(name, []):
                    group.add_argument(old, help=argparse.SUPPRESS, **options)

    def error(self, message: str):
        """Raises ValueError with the message, which may quote a value of any length."""
        limit = 1000
        shown = message if len(message) <= limit else message[:limit] + "..."
        raise ValueError(f"{shown}; see --help")


def recipe_help(recipes: dict) -> str | None:
    """The end of --help: one line per recipe, with the flags that it sets."""
    if not recipes:
        return None
    lines = ["values by recipe or family of backbones (a typed flag overrides):"]
    width = max(len(recipe) for recipe in recipes)
    for recipe, values in recipes.items():
        texts = [f"{name}={value}" for name, value in values.items() if name != "recipe_batch"]
        lines.append(f"  {recipe:{width}}  {'  '.join(texts)}")
    return "\n".join(lines)


def default_notes(default, kind) -> list[str]:
    """What --help shows of a default, in parentheses."""
    if kind is SWITCH:
        return []
    if kind is bool:
        return ["yes" if default else "no"]
    return [] if default in (None, ()) else [str(default)]


def argparse_options(kind) -> dict:
    """A kind of flag as the arguments of add_argument."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is SWITCH:
        return {"action": "store_true"}
    if kind is SIDES:
        return {"action": Sides, "nargs": "+", "type": number(int, 1, MAX_SIDE),
                "metavar": ("H", "W")}
    if isinstance(kind, tuple):
        return {"choices": kind}
    if isinstance(kind, Several):
        return {"type": kind.kind, "nargs": "+", "metavar": kind.kind.metavar}
    return {"type": kind, "metavar": kind.metavar}


def defaults(flags: dict) -> dict:
    """Flag -> default, of a table of flags."""
    values = {}
    for rows in flags.values():
        for name, (default, *_) in rows.items():
            values[name] = default
    return values


def remembered(weights: str | None, flags: dict, names: Sequence[str]) -> dict:
    """The flags `names` of the run that wrote `weights`, from args.json beside the file.

    flags: the program's table. {} if there is no args.json. Raises ValueError if it cannot be read,
    or if it holds a value that the flag would refuse."""
    file = Path(weights or "").parent / "args.json"
    if not weights or not os.path.isfile(file):
        return {}
    try:
        settings = json.loads(file.read_text())
        found = {name: settings[name] for name in names if settings.get(name) is not None}
    except (ValueError, OSError, AttributeError, RecursionError):
        raise ValueError(f"{file}: cannot be read as the settings of a run; move it away and give "
                         f"--arch") from None
    for name, value in found.items():
        if not accepts(flags, name, value):
            flag = "--" + name.replace("_", "-")
            by = printable(str(settings.get("program", "another program")))
            raise ValueError(f"{file}: {name} is {printable(repr(value))}, which {flag} would "
                             f"refuse; it was written by {by}: give weights that fit, or move the "
                             f"file away and give the flags")
    return found


def accepts(flags: dict, name: str, value) -> bool:
    """Could the flag `name` have this value? For settings that come from a file."""
    tables = [rows for rows in flags.values() if name in rows]
    if not tables:                                           # what a recipe alone can set
        return value is None or type(value) in (str, int, float, bool, list, tuple)
    _, kind, _ = tables[0][name]
    if value is None:
        return True
    if kind in (bool, SWITCH):
        return type(value) is bool
    if isinstance(kind, tuple):
        return value in kind
    if kind is SIDES:
        sides = value if type(value) is list else [value]
        are_sides = [type(side) is int and 1 <= side <= MAX_SIDE for side in sides]
        return len(sides) in (1, 2) and all(are_sides)
    if isinstance(kind, Several):
        return type(value) in (list, tuple) and all(fits(kind.kind, one) for one in value)
    return fits(kind, value)


def fits(kind, value) -> bool:
    """Does a kind of flag that reads a text give this value?"""
    if type(value) not in (str, int, float):
        return False
    try:                                                     # as if it were typed
        return kind(str(value)) == value
    except (ValueError, argparse.ArgumentTypeError):
        return False
