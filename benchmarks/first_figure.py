"""Seconds from starting a notebook's kernel to its first figure, and where they go.

    python -m benchmarks.first_figure

Writes outputs/benchmarks/first_figure.json: per notebook, seconds of the kernel's start, of the setup cell
(the imports), of loading the model, and of everything from there to the first figure.
"""

import json
import tempfile
import time
from pathlib import Path

from nbclient import NotebookClient

from helpers.results import write_text
from tools.run import find_notebooks, read_notebook

OUT = Path("outputs/benchmarks/first_figure.json")


def measure(path: Path) -> dict[str, float]:
    """Run a notebook up to its first figure."""
    notebook = read_notebook(path)
    parts = {"kernel": 0.0, "imports": 0.0, "model": 0.0, "rest": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, resources={"metadata": {"path": folder}}, timeout=600)
        start = time.perf_counter()
        with client.setup_kernel():
            parts["kernel"] = time.perf_counter() - start
            for index, cell in enumerate(notebook.cells):
                began = time.perf_counter()
                client.execute_cell(cell, index)
                parts[part_of(cell, parts)] += time.perf_counter() - began
                if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                    break
    return {name: round(value, 2) for name, value in parts.items()} | {"total": round(sum(parts.values()), 2)}


def part_of(cell, parts: dict[str, float]) -> str:
    """Which part of the wait a cell belongs to."""
    if not parts["imports"] and "from helpers import" in cell.source:
        return "imports"
    return "model" if not parts["model"] and "models.load(" in cell.source else "rest"


def main():
    found = {path.stem: measure(path) for path in find_notebooks()}
    for name, parts in found.items():
        print(f"{name:28}", "  ".join(f"{part} {seconds:5.1f}" for part, seconds in parts.items()))
    slowest = max(found, key=lambda name: found[name]["total"])
    write_text(OUT, json.dumps(found | {"slowest": found[slowest]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
