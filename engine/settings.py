"""Settings: what a run does. They are resolved once; after that they are frozen.

    settings_class    a program's frozen dataclass: a field for each flag, and those below
    resolve_batch     images of a step, from what was asked, the device and the processes
    resolve_warmup    epochs of warm-up
    resumed           the settings of a resumed run
    to_save           what args.json and a checkpoint hold
"""

from dataclasses import make_dataclass
from pathlib import Path

from .command import Distributed
from .files import printable
from .flags import defaults

# Fields that are no flags. A recipe can set recipe_batch; the others are computed.
RESOLVED = {
    "program": "the program of the run, such as pretrain.py",
    "typed": "the flags that were typed, when the run began or was resumed",
    "recipe_batch": "images of a forward pass over all processes, fixed by the recipe; or None",
    "global_batch": "images of a step: batch_size x accum x processes",
    "peak_lr": "the highest learning rate of the schedule",
}
# a resumed run must not change these: they made the state that it continues
KEPT = ("recipe", "baseline", "optimizer", "weights", "init")
# a resumed run does not take these over
OF_THIS_START = ("resume", "download", "device", "given", "demo")


def settings_class(flags: dict) -> type:
    """A frozen dataclass: a field for each flag of a program's table, and those of RESOLVED.

    Its docstring has a line for each field."""
    docs = dict(RESOLVED)
    for rows in flags.values():
        for name, (_, _, text) in rows.items():
            docs[name] = text
    made = make_dataclass("Settings", docs, frozen=True)
    made.__doc__ = "\n".join(f"{name}: {text}" for name, text in docs.items())
    return made


def all_defaults(program: str, flags: dict, **more) -> dict:
    """Field -> default value, before a recipe or the user has set any. more: other fields."""
    resolved = dict.fromkeys(RESOLVED)
    return {**resolved, **defaults(flags), "program": program, "typed": [], **more}


def resolve_batch(asked: dict, world: Distributed) -> dict:
    """batch_size, recipe_batch and global_batch of a run.

    A batch size that was typed overrides the recipe's. Raises ValueError if the processes do not
    divide the recipe's."""
    batch, of_recipe = asked["batch_size"], asked["recipe_batch"]
    if "batch_size" in asked["typed"]:
        of_recipe = None
    if of_recipe:
        if of_recipe % world.size:
            raise ValueError(f"{world.size} processes do not divide the global batch of "
                             f"{of_recipe}; give --batch-size, images per process")
        batch = of_recipe // world.size
    elif not batch:
        batch = 256 if world.on_gpu else 32
    global_batch = batch * asked["accum"] * world.size
    return dict(batch_size=batch, recipe_batch=of_recipe, global_batch=global_batch)


def resolve_warmup(asked: dict) -> float:
    """Epochs of warm-up: 10 by default, or a tenth of a run that is shorter than 100 epochs.

    The same holds if the recipe's warm-up does not fit into the run. Raises ValueError if the
    warm-up was typed and does not fit."""
    epochs, warmup = asked["epochs"], asked["warmup_epochs"]
    if warmup is not None and warmup < epochs:
        return warmup
    if warmup is not None and "warmup_epochs" in asked["typed"]:
        raise ValueError(f"--warmup-epochs {warmup:g}: must be less than --epochs {epochs:g}")
    return min(10, epochs / 10)


def resumed(own: dict, saved: dict, typed: dict) -> dict:
    """The settings of a resumed run. Each overrides those before it: the program's `own` defaults,
    what the run was saved with, what is typed now.

    Raises ValueError for a saved setting that the program does not have, such as a fork's, and if a
    setting of KEPT would change."""
    unknown = sorted({*saved} - {*own, *RESOLVED})
    if unknown:
        raise ValueError(f"checkpoint.pt: of another version of the program, which has a setting "
                         f"{printable(unknown[0])}; resume it with that version")
    for name in KEPT:
        old, new = saved.get(name), typed.get(name)
        if name == "weights" and old and new:                # of one file there are many names
            old, new = Path(old).resolve(), Path(new).resolve()
        if name in typed and new != old:
            raise ValueError(f"--{name} {new}: a resumed run keeps what it began with, "
                             f"{old or 'none'}; leave --{name} out, or choose another --out")
    names = sorted({*saved.get("typed", []), *typed})
    return {**own, **saved, **typed, "typed": names}


def to_save(settings) -> dict:
    """The settings that a resumed run takes over. The number of workers is one of them only if it
    was typed, because the run may be resumed on another machine."""
    values = vars(settings)
    left_out = {*OF_THIS_START}
    if "workers" not in values["typed"]:
        left_out.add("workers")
    return {name: value for name, value in values.items() if name not in left_out}
