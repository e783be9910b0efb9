"""Flags: a table {group: {name: (default, kind, help)}} says all about them, in one place.

    number, path, how_often   kinds of flags: what is allowed, and one clear line for the rest
    DATA_FLAGS, RUN_FLAGS     what both stages have
    Parser                    argparse, made from such a table
    remembered                flags from the args.json that lies beside a file of weights
"""

import argparse
import json
import math
from pathlib import Path

import torch

MAX_SIDE, MAX_EPOCHS = 8192, 100_000                         # more is a slip of the keyboard
SWITCH = object()                                            # a kind of flag: one without a value
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
            raise argparse.ArgumentTypeError(f"{text}: must be {what} {most}")
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
        raise argparse.ArgumentTypeError(f"{text}: must be a number of steps such as 200, or of minutes such as 10m")
    return text


how_often.metavar = "N"

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
    "amp": (None, tuple(AMP), "mixed precision (bf16 if the device has it; else GPU fp16, CPU off)"),
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
                elif isinstance(kind, tuple):
                    more["choices"] = kind
                else:
                    more |= dict(type=kind, metavar=kind.metavar)
                g.add_argument("--" + name.replace("_", "-"), **more)

    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def defaults(flags: dict) -> dict:
    return {name: default for group in flags.values() for name, (default, *_) in group.items()}


def remembered(weights: str | None, parser: Parser, names: tuple[str, ...]) -> dict:
    """Flags of the run that left `weights`, from args.json beside them; {} if there is none.

    Raises ValueError if that file is no such record, or holds a value that the flag of that name would refuse."""
    beside = Path(weights or "").parent / "args.json"
    if not weights or not beside.is_file():
        return {}
    try:
        made = json.loads(beside.read_text())
        kept = {name: made[name] for name in names if made.get(name) is not None}
    except (ValueError, OSError, AttributeError, RecursionError):
        raise ValueError(f"{beside}: cannot be read as the settings of a run; move it away and give --arch") from None
    for action in parser._actions:
        if action.dest in kept:
            value = kept[action.dest]
            try:
                right = type(value) in (int, float, str) and (
                    value in action.choices if action.choices else action.type(str(value)) == value)
            except argparse.ArgumentTypeError:
                right = False
            if not right:
                flag = action.option_strings[0]
                raise ValueError(f"{beside}: {action.dest} is {value!r}, which {flag} would refuse; repair it, or move "
                                 f"the file away and give the flags")
    return kept
