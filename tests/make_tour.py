"""Run the notebook docs/tour.ipynb, store its outputs in it, and write docs/tour.md from it.

    python -m tests.make_tour            after a change of the notebook's cells

The notebook is the source: edit its cells in Jupyter or as JSON. docs/tour.md has the same text,
code and outputs for readers who look at the repository without Jupyter. The test in
tests/test_tour.py runs the cells and compares the two files.
"""

import base64
import contextlib
import io
import json
import sys
from pathlib import Path

import matplotlib as mpl

DOCS = Path(__file__).parent.parent / "docs"
FIGURE = "tour.png"


def read(path: Path = DOCS / "tour.ipynb") -> dict:
    """Return the notebook as a dict of the nbformat 4 schema."""
    return json.loads(path.read_text(encoding="utf-8"))


def run(notebook: dict) -> None:
    """Execute the code cells in order and replace their outputs.

    A cell's output is what it prints, and the figure that it leaves open, as a PNG.
    """
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # only after the backend is chosen

    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source(cell), f"tour cell {number}", "exec"), namespace)

        cell["execution_count"] = number
        cell["outputs"] = []
        if printed.getvalue():
            text = printed.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": text})
        if plt.get_fignums():
            cell["outputs"].append(_image(plt.gcf()))
            plt.close("all")


def _image(figure) -> dict:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, bbox_inches="tight")
    encoded = base64.b64encode(picture.getvalue()).decode()
    data = {"image/png": encoded, "text/plain": ["<Figure>"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def code_cells(notebook: dict) -> list[dict]:
    """Return the code cells in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    """Return the text of a cell; nbformat stores a list of lines."""
    return "".join(cell["source"])


def markdown(notebook: dict) -> str:
    """Return the notebook as Markdown: text as it is, code and printed output in fences."""
    blocks = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            blocks.append(source(cell))
            continue
        blocks.append(f"```python\n{source(cell)}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                blocks.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                blocks.append(f"![the figure that this cell draws]({FIGURE})")
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    """Run the notebook and write docs/tour.ipynb, docs/tour.md and docs/tour.png."""
    notebook = read()
    run(notebook)
    (DOCS / "tour.ipynb").write_text(
        json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (DOCS / "tour.md").write_text(markdown(notebook), encoding="utf-8")
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            if output["output_type"] == "display_data":
                picture = base64.b64decode(output["data"]["image/png"])
                (DOCS / FIGURE).write_bytes(picture)


if __name__ == "__main__":
    sys.exit(main())
