"""Flags: a table {group: {name: (default, kind, help)}} says all about them, in one place.

    number, path, how_often   kinds of flags: what is allowed, and one clear line for the rest
    SIDES, pair, told_size    an image size: one number is a square, two are height and width
    DATA_FLAGS, RUN_FLAGS     what both stages have
    Parser                    argparse, made from such a table
    remembered                flags from the args.json that lies beside a file of weights
"""

import argparse
import json
import math
from pathlib import Path
from typing import Sequence

import torch

from .files import printable

OLD_NAMES = {"mask_size": ["--mask-cell"], "token_stage": ["--mask-stage"]}  # of flags
MAX_SIDE, MAX_EPOCHS = 8192, 100_000                         # more is a slip of the keyboard
SWITCH = object()                                            # a kind of flag: one without a value
SIDES = object()  # and one of one or two: 224, or 192 256 (height, width)
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def number(kind: type, low: float, high: float = math.inf):
    """A kind of flag: an int or float from `low` to `high`."""
    def read(text: str):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= high or value == math.inf:
            what = "an integer" if kind is int else "a number"
            most = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{printable(text)}: must be {what} {most}")
        return value
    read.metavar = "N" if kind is int else "X"
    return read


def path(metavar: str):
    """A kind of flag: any text but an empty one, which is what an unset shell variable leaves."""
    def read(text: str) -> str:
        if not text.strip():
            raise argparse.ArgumentTypeError("is empty (an unset shell variable?); give a value, or leave the flag out")
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
    if not text.removesuffix("m").isdecimal() or int(text.removesuffix("m")) == 0:
        raise argparse.ArgumentTypeError(f"{printable(text)}: must be a number of steps such as 200, or of minutes "
                                         f"such as 10m")
    return text


how_often.metavar = "N"


class Sides(argparse.Action):
    """SIDES as an int, or as a list [H, W], which args.json and a checkpoint can hold."""

    def __call__(self, parser, args, values, option=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"{' '.join(map(str, values))}: must be one side of a square, or two "
                                               f"sides, height and width")
        setattr(args, self.dest, values[0] if len(values) == 1 else values)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of an image size; one number is a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def format_size(size: int | Sequence[int]) -> str:
    H, W = height_width(size)
    return f"{H} px" if H == W else f"{H} x {W} px"


DATA_FLAGS = {  # what both stages have
    "data_root": ("datasets", path("DIR"), "where torchvision's datasets are kept"),
    "download": (False, SWITCH, "fetch a torchvision dataset that is not there yet"),
    "workers": (None, number(int, 0, 256), "loader processes per process (cores per process - 1, 1 to 8)"),
    "max_bad": (0.01, number(float, 0, 1), "stop if more than this share of the images cannot be read"),
}
RUN_FLAGS = {
    "out": (None, path("DIR"), "where everything is written (runs/<data>-<arch>..., numbered if taken)"),
    "resume": (False, SWITCH, "go on from checkpoint.pt in --out; its flags are remembered"),
    "seed": (0, number(int, 0), "fixes all randomness: weights, order, augmentation, masks"),
    "device": (None, ("cpu", "cuda", "mps", "xpu"), "where it runs (the accelerator that is there, else the CPU)"),
    "amp": (None, tuple(AMP), "mixed precision (bf16 if the device has it; else CUDA fp16, the rest off)"),
    "compile": (False, bool, "torch.compile the model"),
    "channels_last": (True, bool, "memory format of CNNs"),
    "log_every": (10, number(int, 1), "steps between lines of log.jsonl"),
    "save_every": ("10m", how_often, "steps, or minutes such as 10m, between checkpoints; after each epoch too"),
}


class Parser(argparse.ArgumentParser):
    """argparse, but a complaint is one line, and rank 0 alone says it (see `command_line`)."""

    def __init__(self, program: str, usage: str, doc: str, flags: dict, recipes: dict):
        told = {name: "  ".join(f"{k}={v}" for k, v in row.items()) for name, row in recipes.items()}
        rows = "\n".join(f"  {name:9} {row}" for name, row in told.items())
        super().__init__(prog=program, usage=usage, description=doc, epilog=f"recipes (a flag overrides):\n{rows}",
                         argument_default=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.flags = flags
        by_recipe = {name for row in recipes.values() for name in row}
        for title, group in flags.items():
            g = self.add_argument_group(title)
            for name, (default, kind, text) in group.items():
                shown = ["yes" if default else "no"] if kind is bool else [] if default is None else [str(default)]
                shown = ([] if kind is SWITCH else shown) + ["by recipe"] * (name in by_recipe)
                more = dict(help=f"{text} ({', '.join(shown)})" if shown else text)
                if kind is bool:
                    more["action"] = argparse.BooleanOptionalAction
                elif kind is SWITCH:
                    more["action"] = "store_true"
                elif kind is SIDES:
                    more |= dict(action=Sides, nargs="+", type=number(int, 1, MAX_SIDE), metavar=("H", "W"))
                elif isinstance(kind, tuple):
                    more["choices"] = kind
                else:
                    more |= dict(type=kind, metavar=kind.metavar)
                names = ["--" + name.replace("_", "-"), *OLD_NAMES.get(name, [])]
                g.add_argument(*names, dest=name, **more)

    def error(self, message: str):
        most = 1000  # a value of any length may be quoted in it
        told = message if len(message) <= most else message[:most] + "..."
        raise ValueError(f"{told}; see --help")


def defaults(flags: dict) -> dict:
    return {name: default for group in flags.values() for name, (default, *_) in group.items()}


def remembered(weights: str | None, parser: Parser, names: tuple[str, ...]) -> dict:
    """Flags of the run that left `weights`, from args.json beside them; {} if there is none.

    Raises ValueError if that file is no such record, or holds a value that the flag of that name
    would refuse."""
    beside = Path(weights or "").parent / "args.json"
    if not weights or not beside.is_file():
        return {}
    try:
        made = json.loads(beside.read_text())
        kept = {name: made[name] for name in names if made.get(name) is not None}
    except (ValueError, OSError, AttributeError, RecursionError):
        raise ValueError(f"{beside}: cannot be read as the settings of a run; move it away and give --arch") from None
    for name, value in kept.items():
        if not accepts(parser.flags, name, value):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{beside}: {name} is {value!r}, which {flag} would refuse; repair it, or move the file "
                             f"away and give the flags")
    return kept


def accepts(flags: dict, name: str, value) -> bool:
    """Could the flag `name` have this value? For settings that come from a file."""
    found = [row[name] for row in flags.values() if name in row]
    if not found:                                            # what a recipe alone can set
        return value is None or type(value) in (str, int, float, bool, list, tuple)
    default, kind, _ = found[0]
    if value is None:
        return True
    if kind in (bool, SWITCH):
        return type(value) is bool
    if isinstance(kind, tuple):
        return value in kind
    if kind is SIDES:
        sides = value if type(value) is list else [value]
        return len(sides) in (1, 2) and all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)
    if type(value) not in (str, int, float):
        return False
    try:                                                     # as if it were typed
        return kind(str(value)) == value
    except (ValueError, argparse.ArgumentTypeError):
        return False
