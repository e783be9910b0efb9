"""gpu_check.py on the CPU: it runs at tiny sizes, and a line that fails is seen."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extras import gpu_check

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.mark.skipif("GPU_CHECK" not in os.environ, reason="a minute long; GPU_CHECK=1 runs it")
def test_it_tries_itself_on_a_cpu_and_every_line_passes(tmp_path, capsys):
    gpu_check.main(["--out", str(tmp_path / "check")])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "check" / "result.json").read_text())
    lines = [line for line in said.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(lines) == len(result["facts"]) >= 15
    assert all(fact["passed"] for fact in result["facts"].values())
    assert result["device"] == "CPU, tiny sizes"
    for word in ("against CPU float32", "of the bare backbone", "collectives", "2 x 16 images",
                 "per worker", "stopped and resumed", "LAMB, EMA"):
        assert sum(word in line for line in lines) >= 1, word


def test_a_line_that_fails_and_a_part_that_breaks_end_in_exit_code_1(tmp_path, capsys, monkeypatch):
    def is_wrong(args, world, report):
        report.fact("a fact", False, "3 in place of 4")

    def breaks(args, world, report):
        raise RuntimeError("CUDA error: misaligned address")

    def is_right(args, world, report):
        report.fact("another fact", True, "4")
    parts = dict(wrong=is_wrong, broken=breaks, right=is_right)
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    with pytest.raises(SystemExit) as exit:
        gpu_check.main(["--out", str(tmp_path)])
    said = capsys.readouterr()
    assert exit.value.code == 1
    assert "2 of 3 lines failed" in said.err and "a fact, broken" in said.err
    assert "FAIL" in said.out and "misaligned address" in said.out
    facts = json.loads((tmp_path / "result.json").read_text())["facts"]
    assert {name: fact["passed"] for name, fact in facts.items()} == {
        "a fact": False, "broken": False, "another fact": True}


@pytest.mark.parametrize("words, expected", [
    ("--only speed colour", "invalid choice: 'colour'"),
    ("--data nowhere", "--data nowhere: no such folder"),
    ("--limit 0", "--limit: 0: must be an integer of at least 1"),
])
def test_a_mistake_gets_one_line(words, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        gpu_check.main([*words.split(), "--out", str(tmp_path / "check")])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and expected in said and said.count("\n") == 1
