"""What a notebook leaves on disk: figures, tables and one `summary.json`, written atomically."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd

VERSIONS_OF = ("torch", "transformer-lens", "transformers", "circuitsvis", "numpy")


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary name beside `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def is_estimate(value) -> bool:
    """Whether a recorded value is a mean with its interval."""
    return isinstance(value, dict) and {"mean", "low", "high"} <= value.keys()


def read_summaries(model_folder: Path) -> dict[str, dict]:
    """The summaries of one model's notebooks, by notebook, in order."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(model_folder.glob("*/summary.json"))}


def as_text(value) -> str:
    """A recorded value for a table: an estimate with its interval, floats to three digits."""
    if is_estimate(value):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {as_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(as_text(item) for item in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown_table(rows: pd.DataFrame) -> list[str]:
    """The lines of a table in Markdown."""
    header = ["| " + " | ".join(rows.columns) + " |", "|" + "---|" * len(rows.columns)]
    return header + ["| " + " | ".join(as_text(v) for v in row) + " |" for row in rows.itertuples(index=False)]


class Results:
    """The outputs of one notebook: `outputs/<model>/<notebook>/`.

    `parameters` are the notebook's own, as run; they and the versions go into the summary.
    """

    def __init__(self, notebook: str, parameters: dict):
        from helpers.plots import use_style

        use_style()
        self.notebook, self.parameters = notebook, dict(parameters)
        model = Path(str(parameters["model_name"])).name
        self.folder = Path(parameters["output_dir"]) / model / notebook
        self.numbers: dict = {}
        self.tables: list[str] = []
        self.started = time.monotonic()

    def figure(self, figure, name: str) -> None:
        """Save a matplotlib figure as PNG; the notebook shows the same one inline."""
        path = self.folder / "figures" / f"{name}.png"
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))

    def table(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Save a table as CSV, whose first rows the report shows, and give it back."""
        self.tables.append(name)
        write_atomically(self.folder / f"{name}.csv", lambda temporary: table.to_csv(temporary, index=False))
        return table

    def record(self, **numbers) -> None:
        """Add headline numbers to the summary."""
        self.numbers.update(numbers)

    def headline(self) -> pd.DataFrame:
        """The recorded estimates as a table: quantity, mean, the interval's ends, number of samples."""
        rows = [{"quantity": name} | value for name, value in self.numbers.items() if is_estimate(value)]
        table = pd.DataFrame(rows, columns=["quantity", "mean", "low", "high", "n"])
        return self.table(table, "headline").round(3)

    def say(self, text: str) -> None:
        """Show a sentence whose numbers were rendered from results."""
        from IPython.display import Markdown, display

        display(Markdown(text))

    def finish(self) -> dict:
        """Write `summary.json` and return what it holds."""
        summary = {
            "notebook": self.notebook,
            "parameters": self.parameters,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS_OF},
            "wall_time_s": round(time.monotonic() - self.started, 1),
            "results": self.numbers,
            "tables": list(dict.fromkeys(self.tables)),
        }
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        return summary
