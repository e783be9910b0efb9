"""Runs a notebook without Jupyter; its cells must be plain Python.

    python extras/run_notebook.py extras/demo.ipynb                     runs it, changes no file
    python extras/run_notebook.py extras/demo.ipynb --out new.ipynb     stores it with its outputs

Prints a line as each cell begins. Without --out the outputs are discarded.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.command import Failed, Distributed, command_line
from engine.files import printable
from engine.flags import Parser, defaults, path
from extras.output import check_file, writing


def read_notebook(file: Path) -> dict:
    """The notebook of a file. Raises ValueError if it is none, with the reason."""
    name = printable(str(file))
    if not file.is_file():                                   # a pipe would be waited for
        raise ValueError(f"{name}: no such file, or no regular file; give a notebook such as "
                         "extras/demo.ipynb")
    try:
        notebook = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{name}: cannot be read as a notebook: it is not JSON") from None
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise ValueError(f"{name}: holds no list of cells; expected a notebook of format 4, "
                         "such as extras/demo.ipynb")
    for place, cell in enumerate(cells, 1):
        if not is_cell(cell):
            raise ValueError(f"{name}: item {place} of its cells has no cell_type, or a source "
                             "that is not text")
    return notebook


def is_cell(cell) -> bool:
    """A cell has a type, and a source: a string, or a list of strings."""
    if not isinstance(cell, dict) or not isinstance(cell.get("cell_type"), str):
        return False
    source = cell.get("source")
    lines = source if isinstance(source, list) else [source]
    return all(isinstance(line, str) for line in lines)


def execute(notebook: dict) -> dict:
    """Runs all code cells in one namespace, which is returned; their outputs are put into the notebook.

    An output is what was printed, then the value of a last line that is an expression: a picture if it has
    `_repr_png_`, else its text. Raises Failed if a cell does, with its number and line."""
    space = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        source = "".join(cell["source"])
        first = next((line for line in source.splitlines() if line.strip()), "(empty)")
        print(f"cell {number} of {len(cells)}: {printable(first)}", flush=True)
        try:
            printed, value = run_cell(source, f"cell {number}", space)
        except (Exception, SystemExit) as error:
            raise Failed(summary_of(error, f"cell {number}")) from None

        cell["execution_count"], cell["outputs"] = number, []
        if printed:
            lines = printed.splitlines(keepends=True)
            cell["outputs"].append(dict(output_type="stream", name="stdout", text=lines))
        if value is not None:
            png = getattr(value, "_repr_png_", lambda: None)()
            data = {"image/png": base64.b64encode(png).decode()} if png else {}
            data["text/plain"] = ["a picture" if png else repr(value)]
            cell["outputs"].append(dict(output_type="execute_result", data=data, metadata={}, execution_count=number))
    return space


def run_cell(source: str, name: str, space: dict) -> tuple[str, object]:
    """What a cell prints, and the value of its last line if that is an expression, else None."""
    tree = ast.parse(source, name)
    ends_in_value = tree.body and isinstance(tree.body[-1], ast.Expr)
    last = tree.body.pop() if ends_in_value else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), space)
        if last:
            value = eval(compile(ast.Expression(last.value), name, "eval"), space)
    return printed.getvalue(), value


def summary_of(error: BaseException, cell: str) -> str:
    """An error of a cell in one line: which cell, which line of it, what went wrong."""
    if isinstance(error, SyntaxError) and error.filename == cell:
        where = f"{cell}, line {error.lineno}"
        return f"{where}: {error.msg}; a cell must be plain Python, without % and ! commands"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == cell]
    text = (str(error).splitlines() or [""])[0]
    return f"{cell}, line {lines[-1] if lines else 1}: {type(error).__name__}: {printable(text)}"


# ---- the command ----

def run(args: SimpleNamespace, world: Distributed) -> None:
    """Runs the notebook; writes it if asked.

    Raises ValueError for a mistake, Failed if a cell fails."""
    notebook = read_notebook(Path(args.notebook))
    out = Path(args.out).absolute() if args.out else None    # a cell may change the current folder
    if out:
        check_file(out, (".ipynb",))
    began = time.time()
    execute(notebook)
    print(f"{time.time() - began:.0f} seconds")
    if not out:
        print("the outputs are not stored; --out FILE.ipynb stores them")
        return

    beside = out.with_name(out.name + ".tmp")
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    with writing(out):                                       # surrogates become JSON's \udc80
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, out)
    print(f"{printable(str(out))}: {out.stat().st_size / 1000:.0f} kB")


FLAGS = {
    "where it goes": {
        "out": (None, path("FILE"), "the notebook with its outputs; a file of this name is "
                "replaced, also the notebook itself (nothing is stored)")},
}


def parse(argv: list[str] | None) -> SimpleNamespace:
    """Raises ValueError for a value that is off."""
    parser = Parser("run_notebook.py", "%(prog)s NOTEBOOK [--out FILE]", __doc__, FLAGS, {})
    parser.epilog = None
    parser.add_argument("notebook", metavar="NOTEBOOK", help="a file such as extras/demo.ipynb")
    return SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("run_notebook.py", parse, run, argv)


if __name__ == "__main__":
    main()
