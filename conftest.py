"""Fixtures of all tests; and a loop that runs many tests in several processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torchvision.models as tv

import data
import model

pytest.register_assert_rewrite("engine.testing")             # a failed assert shows both sides

# ---- fixtures ----

@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def few_images(monkeypatch):
    """`shapes` with 32 images, an epoch of four steps; and a DeiT-T of three blocks, to be fast."""
    monkeypatch.setitem(model.VITS, "deit_tiny", (192, 3, 3, 384))
    init = data.Shapes.__init__

    def small(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.count, self.labels = 32, self.labels[:32]

    monkeypatch.setattr(data.Shapes, "__init__", small)


@pytest.fixture
def backbone(tmp_path):
    """A torchvision state dict saved by hand."""
    torch.save(tv.resnet18().state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


# ---- many tests: as many processes as cores ----

FOLDER = "TESTS_FOLDER"                                      # in the environment of a helper
REPORTS = "TESTS_REPORTS"


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Each process runs the tests that it is the first to claim. This one prints all reports.

    A few tests, one core, -x, --pdb and --lf: returns None, and pytest's own loop runs in one
    process."""
    config = session.config
    option = config.option
    is_helper = FOLDER in os.environ
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    count = min(cores, 8, len(session.items) // 25)
    one_by_one = ("collectonly", "maxfail", "usepdb", "lf", "failedfirst", "newfirst")
    wants_order = any(getattr(option, name, False) for name in one_by_one)
    if not is_helper and (count < 2 or wants_order):
        return None

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"                      # of the processes that tests start
    with tempfile.TemporaryDirectory() as new:
        folder = Path(os.environ.get(FOLDER, new))
        helpers = [] if is_helper else [Helper(config, folder, i) for i in range(1, count)]
        mine = claim(session.items, folder)
        item = next(mine, None)
        while item:
            following = next(mine, None)                     # pytest keeps what both need
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            item = following
            for helper in helpers:
                helper.print_reports()
        for helper in helpers:
            helper.finish()
    return True


def claim(items, folder):
    """Yields the tests that no other process has claimed; a file stands for a claim."""
    for i, item in enumerate(items):
        with contextlib.suppress(FileExistsError):
            (folder / str(i)).touch(exist_ok=False)
            yield item


def pytest_runtest_logreport(report):
    """A helper writes each report as a line of its file."""
    if REPORTS in os.environ:
        with open(os.environ[REPORTS], "a") as file:
            file.write(json.dumps(report._to_json()) + "\n")


class Helper:
    """A process of pytest beside this one. Its reports are printed as if the tests ran here."""

    def __init__(self, config, folder, number):
        self.config = config
        self.reports = folder / f"reports-{number}"
        self.output = folder / f"output-{number}"
        self.printed = 0                                     # lines
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
        environment = {**os.environ, FOLDER: str(folder), REPORTS: str(self.reports)}
        self.process = subprocess.Popen(
            [*command, "-p", "no:cacheprovider"], cwd=config.invocation_params.dir,
            env=environment, stdout=self.output.open("w"), stderr=subprocess.STDOUT)

    def print_reports(self):
        text = self.reports.read_text() if self.reports.exists() else ""
        lines = text.splitlines(keepends=True)
        for line in lines[self.printed:]:
            if not line.endswith("\n"):                      # not yet whole
                break
            report = pytest.TestReport._from_json(json.loads(line))
            self.config.hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            self.config.hook.pytest_runtest_logreport(report=report)
            self.printed += 1

    def finish(self):
        """Waits for the process. Ends this one too if a test killed it."""
        code = self.process.wait()
        self.print_reports()
        if code not in (0, 1):
            pytest.exit(f"a helper ended with {code}:\n{self.output.read_text()}", returncode=3)
