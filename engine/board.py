"""--tensorboard: the numbers of log.jsonl and the pictures of a run, for TensorBoard.

    tensorboard --logdir runs        shows all runs that were made with the flag
"""

from pathlib import Path

import numpy as np
from PIL import Image

from .command import Distributed

PLACE = ("step", "epoch", "time")                            # of a log line: not shown as curves


class Board:
    """Writes to --out/tensorboard on rank 0. Without --tensorboard every call does nothing.

    start: the step where this start of the run begins. If it is above 0, TensorBoard hides the
    later points that an earlier start wrote. If the disk fails, one line is printed, and nothing
    more is written.

    Raises ValueError if the package tensorboard is missing."""

    def __init__(self, settings, world: Distributed, start: int):
        self.wanted = settings.tensorboard
        if not self.wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard: the package tensorboard is missing; run pip install "
                             "tensorboard, or leave the flag out") from None
        self.wanted = world.rank == 0
        self.world = world
        self.make_writer = SummaryWriter
        self.folder = Path(settings.out) / "tensorboard"
        self.purge = start + 1 if start else None
        self.writer = None                                   # opened by the first line

    def add_line(self, line: dict) -> None:
        """A line of log.jsonl: each number of it under its own name, at its step."""
        def add(writer) -> None:
            for name, value in line.items():
                if name not in PLACE and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, line["step"], walltime=line["time"])
        self.write(add)

    def add_picture(self, name: str, file: Path, step: int) -> None:
        """A picture that the run has written. A file that is not there is left out."""
        def add(writer) -> None:
            pixels = np.asarray(Image.open(file).convert("RGB"))             # (H, W, 3), uint8
            writer.add_image(name, pixels, step, dataformats="HWC")
        if self.wanted and file.is_file():
            self.write(add)

    def write(self, add) -> None:
        if not self.wanted:
            return
        try:
            if self.writer is None:
                self.writer = self.make_writer(str(self.folder), purge_step=self.purge)
                self.purge = None
            add(self.writer)
            self.writer.flush()
        except OSError as error:
            self.world.print0(f"{self.folder}: not written ({error.strerror or error}); the run "
                              f"continues without it")
            self.wanted = False

    def close(self) -> None:
        """Closes the file. A later call opens another one in the same folder."""
        if self.wanted and self.writer is not None:
            self.write(lambda writer: writer.close())
            self.writer = None
