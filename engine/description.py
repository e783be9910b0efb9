"""model.json beside best.pt: what is needed to run a trained net on new pictures.

    describe             the content, from the settings of a run
    write_description    writes it
    read_description     reads it again, for extras/predict.py
    check_classes        are the classes of a set those that a net was trained on?
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Sequence

from .files import printable, write_text_atomically
from .flags import height_width
from .weights import some_names

KINDS = {"classifier": "finetune.py", "segmenter": "extras/segment.py",
         "detector": "extras/detect.py"}


def describe(kind: str, settings, classes: list[str], image_size, mean, std,
             **more) -> dict:
    """The content of model.json.

    kind        one of KINDS
    settings    of the run: arch, patch_size, window, stem
    image_size  in pixels, one side or (H, W), at which the net was evaluated
    mean, std   of the input in [0, 1], one number per channel
    more        what the kind needs beside: the test crop, or the settings of its head"""
    backbone = {name: getattr(settings, name) for name in ("arch", "patch_size", "window", "stem")}
    return {"kind": kind, **backbone, "classes": list(classes),
            "image_size": list(height_width(image_size)), "mean": list(mean), "std": list(std),
            **more}


def write_description(description: dict, out: Path) -> None:
    """Raises OSError if model.json cannot be written."""
    write_text_atomically(out / "model.json", json.dumps(description, indent=1) + "\n")


def read_description(weights: str) -> SimpleNamespace:
    """The content of the model.json beside a file of weights.

    Raises ValueError if it is not there, or not of this program."""
    file = Path(weights).parent / "model.json"
    shown = printable(str(file))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        about = SimpleNamespace(**content)
        height, width = about.image_size
        is_whole = (about.kind in KINDS and height > 0 and width > 0 and len(about.classes) > 0
                    and len(about.mean) == len(about.std) and isinstance(about.arch, str)
                    and all(isinstance(name, str) for name in about.classes))
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file; finetune.py, extras/segment.py and "
                         f"extras/detect.py write it beside best.pt, copy both") from None
    except OSError as error:
        raise ValueError(f"{shown}: cannot be opened ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{shown}: is damaged, or of another program; copy it again from the "
                         f"folder of the run")
    return about


def check_classes(classes: Sequence[str], weights: str, data: str) -> None:
    """Raises ValueError if the model.json beside the weights lists other classes, or another order.

    Nothing is checked without model.json, or if it has numbers in place of names."""
    if not (Path(weights).parent / "model.json").is_file():
        return
    trained_on = read_description(weights).classes
    has_names = not all(name.isdigit() for name in trained_on)
    if has_names and trained_on != list(classes):
        raise ValueError(f"--data {data}: its classes ({some_names(classes)}) are not those of "
                         f"{weights} ({some_names(trained_on)}); name them as model.json does")
