"""Runs a notebook without Jupyter, by nbclient.

    python extras/run_notebook.py extras/demo.ipynb                     runs it, changes no file
    python extras/run_notebook.py extras/demo.ipynb --out new.ipynb     stores it with its outputs

Prints one line as each cell begins. Without --out the outputs are discarded. The notebook runs in
its own folder, as in Jupyter. Needs nbclient and ipykernel: pip install -r extras/requirements.txt
"""

import base64
import io
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.command import Failed, Distributed, command_line
from engine.files import printable
from engine.flags import Parser, defaults, path
from extras.output import check_file, writing

try:
    import ipykernel
    import nbclient
    import nbformat
except ImportError:                                          # see `run`
    nbclient = None


def read_notebook(file: Path):
    """The notebook of a file. Raises ValueError if the file is no notebook."""
    name = printable(str(file))
    if not file.is_file():                                   # a pipe would be waited for
        raise ValueError(f"{name}: no such file, or no regular file; give a notebook such as "
                         f"extras/demo.ipynb")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name}: cannot be read as a notebook: it is not JSON") from None
    if not isinstance(content, dict) or content.get("nbformat") != 4:
        raise ValueError(f"{name}: is no notebook of format 4; give a notebook such as "
                         f"extras/demo.ipynb")
    try:
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:                               # nbformat has no one type for this
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: is a damaged notebook ({printable(reason)[:100]}); give a "
                         f"notebook such as extras/demo.ipynb") from None
    return notebook


def execute(notebook, folder: Path) -> None:
    """Runs all code cells in `folder`; their outputs are put into the notebook.

    Raises Failed if a cell does, with its number and line."""
    code_cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3",
                                     resources=resources, coalesce_streams=True,
                                     extra_arguments=["--log-level=ERROR"])
    with client.setup_kernel():
        for number, i in enumerate(code_cells, 1):
            cell = notebook.cells[i]
            first = next((line for line in cell.source.splitlines() if line.strip()), "(empty)")
            print(f"cell {number} of {len(code_cells)}: {printable(first)}", flush=True)
            try:
                client.execute_cell(cell, i, execution_count=number)
            except nbclient.exceptions.CellExecutionError as error:
                raise Failed(f"cell {number}, {summary_of(error)}") from None
            except nbclient.exceptions.DeadKernelError:
                raise Failed(f"cell {number}: Python was killed (by the system, if memory ran "
                             f"out)") from None
            cell.metadata.pop("execution", None)             # the times of this run
            shrink_pictures(cell)


def shrink_pictures(cell) -> None:
    """Pillow gives each picture as PNG and as JPEG. The PNG stays, as small as it gets."""
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            data.pop("image/jpeg", None)
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
            smaller = io.BytesIO()
            picture.save(smaller, "PNG", optimize=True)
            data["image/png"] = base64.b64encode(smaller.getvalue()).decode()


def summary_of(error) -> str:
    """An error of a cell in one line: which line of the cell, and what went wrong."""
    traceback = re.sub(r"\x1b\[[\d;]*m", "", error.traceback)              # without colours
    line = re.search(r"Cell In\[\d+\], line (\d+)", traceback)
    text = (error.evalue.splitlines() or [""])[0]
    return f"line {line[1] if line else 1}: {error.ename}: {printable(text)}"


# ---- the command ----

def run(args: SimpleNamespace, world: Distributed) -> None:
    """Runs the notebook; writes it if asked.

    Raises ValueError for a mistake, Failed if a cell fails."""
    if nbclient is None:
        raise ValueError("nbclient or ipykernel is missing; "
                         "pip install -r extras/requirements.txt")
    file = Path(args.notebook)
    notebook = read_notebook(file)
    out = Path(args.out) if args.out else None
    if out:
        check_file(out, (".ipynb",))
    began = time.time()
    execute(notebook, file.absolute().parent)
    print(f"{time.time() - began:.0f} seconds")
    if not out:
        print("the outputs are not stored; --out FILE.ipynb stores them")
        return

    beside = out.with_name(out.name + ".tmp")
    text = nbformat.writes(notebook) + "\n"
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
    parser.add_argument("notebook", metavar="NOTEBOOK", help="a file such as extras/demo.ipynb")
    return SimpleNamespace(**{**defaults(FLAGS), **vars(parser.parse_args(argv))})


def main(argv: list[str] | None = None) -> None:
    command_line("run_notebook.py", parse, run, argv)


if __name__ == "__main__":
    main()
