"""Runs a notebook without Jupyter and stores its outputs in it; its cells must be plain Python.

    python extras/run_notebook.py extras/demo.ipynb
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path


def execute(notebook: dict) -> dict:
    """Runs all code cells in one namespace, which is returned; their outputs are put into the notebook.

    An output is what was printed, then the value of a last line that is an expression: a picture if it has
    `_repr_png_`, else its text."""
    space, number = {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        tree, printed, value = ast.parse("".join(cell["source"])), io.StringIO(), None
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), space)
            if last:
                value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), space)
        cell["execution_count"], cell["outputs"] = number, []
        if text := printed.getvalue():
            cell["outputs"].append(dict(output_type="stream", name="stdout", text=text.splitlines(keepends=True)))
        if value is not None:
            png = getattr(value, "_repr_png_", lambda: None)()
            data = {"image/png": base64.b64encode(png).decode()} if png else {}
            data["text/plain"] = ["a picture" if png else repr(value)]
            cell["outputs"].append(dict(output_type="execute_result", data=data, metadata={}, execution_count=number))
    return space


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("run_notebook.py: error: give one notebook, such as extras/demo.ipynb", file=sys.stderr)
        sys.exit(2)
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text())
    execute(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
