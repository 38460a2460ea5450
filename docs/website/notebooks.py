"""Notebooks of docs/notebooks: `python docs/website/notebooks.py [NAME ...]` runs them and stores what they print and draw.

Jupyter runs them as well; this needs none. As an MkDocs hook it turns each into a page of the site.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import inspect
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def source(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The same notebook with the outputs of running its cells in this process, top-level `await` included."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    with asyncio.Runner() as runner:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                cell = cell | {"execution_count": count, "outputs": _run_cell(source(cell), namespace, runner, count)}
            cells.append(cell)
    return notebook | {"cells": cells}


def _run_cell(code: str, namespace: dict[str, Any], runner: asyncio.Runner, count: int) -> list[dict[str, Any]]:
    tree, printed, value = ast.parse(code), io.StringIO(), None
    shown = tree.body and isinstance(tree.body[-1], ast.Expr) and not code.rstrip().endswith(";")
    last = tree.body.pop() if shown else None

    def execute(part: ast.AST, mode: str) -> Any:
        result = eval(compile(part, f"<cell {count}>", mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace)
        return runner.run(result) if inspect.iscoroutine(result) else result

    with contextlib.redirect_stdout(printed):
        execute(tree, "exec")
        if last is not None:
            value = execute(ast.Expression(last.value), "eval")  # type: ignore[attr-defined]
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return outputs + [
        {"output_type": "display_data", "metadata": {}, "data": {"image/png": png, "text/plain": ["<Figure>"]}}
        for png in _figures()
    ]


def _figures() -> list[str]:
    """PNGs of the open figures in base64, which are closed."""
    plt: Any = sys.modules.get("matplotlib.pyplot")
    images = []
    for number in plt.get_fignums() if plt else ():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", dpi=80, bbox_inches="tight")
        plt.close(number)
        images.append(base64.b64encode(file.getvalue()).decode())
    return images


def page(notebook: dict[str, Any], name: str) -> str:
    """The notebook as a Markdown page."""
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(source(cell))
            continue
        parts.append(f"```python\n{source(cell)}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                parts.append(f'<img alt="what the cell draws" src="data:image/png;base64,{data["image/png"]}">')
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join([*parts, f"[This page as a notebook]({name}.ipynb)"])


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks for the files of the site: adds a page for each notebook."""
    from mkdocs.structure.files import File

    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page(notebook, path.stem)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs is about to render a page: links to notebooks lead to their pages, which a repository shows by itself."""
    return re.sub(r"\((notebooks/\w+)\.ipynb", r"(\1.md", markdown)


def main(names: list[str]) -> None:
    """Runs the notebooks and writes them with their outputs."""
    import matplotlib

    matplotlib.use("agg")
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            done = run(json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"written: {path.relative_to(FOLDER.parent.parent)}")


if __name__ == "__main__":
    main(sys.argv[1:])
