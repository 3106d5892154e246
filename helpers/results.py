"""What a notebook leaves on disk: figures, tables and one `summary.json`, written atomically."""

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import numpy as np
import pandas as pd

from helpers.catalog import slug

VERSIONS_OF = ("torch", "transformer-lens", "transformers", "circuitsvis", "numpy")


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary name beside `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class NotApplicable(Exception):
    """A notebook's whole experiment is not defined on its model: the message says why, and nothing is written."""


class Results:
    """The outputs of one notebook: `outputs/<model>/<notebook>/`; also gives figures the series' look.

    `namespace` is the notebook's `globals()`, made right after its parameters: the plain values
    in it are kept as the parameters of the run.
    """

    def __init__(self, notebook: str, namespace: dict):
        from helpers.plots import use_style  # not at the top: the runner needs only the writers above

        use_style()
        # Capitals and underscores are IPython's own: In, Out, _dh, _i1.
        plain = {k: v for k, v in namespace.items() if k[0].islower() and isinstance(v, str | int | float | list)}
        self.notebook, self.parameters = notebook, plain
        self.folder = Path(plain["output_dir"]) / slug(plain["model_name"]) / notebook
        self.numbers: dict = {}
        self.tables: list[str] = []
        self.started = time.monotonic()

    def keep(self, name: str, value):
        """Save a figure as PNG, a table as CSV, samples as an estimate, anything else as it is; give it back.

        Samples are a tensor, an array or a list of floats, one a prompt; what is given back is
        their estimate. A dict may hold samples. Raises ValueError where the value holds NaN, has more
        than one sample a prompt, or JSON cannot hold it.
        """
        if hasattr(value, "savefig"):
            options = {"format": "png", "metadata": {"Software": None}}
            write_atomically(self.folder / "figures" / f"{name}.png", lambda path: value.savefig(path, **options))
        elif isinstance(value, pd.DataFrame):
            self.tables.append(name)
            options = {"index": value.index.name is not None, "float_format": "%.6g"}
            write_atomically(self.folder / f"{name}.csv", lambda path: value.to_csv(path, **options))
        else:
            if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
                value = np.array(value)
            value = self.numbers[name] = _strict_json(name, _estimated(name, value))
        return value

    def finish(self, published: dict[str, tuple] | None = None) -> pd.DataFrame:
        """Write `summary.json` and return "What we found": each estimate with its interval and n.

        `published` is `{name: (value, source)}`; its names may also be of kept plain values.
        Raises ValueError where such a name was never kept.
        """
        published = published or {}
        if missing := published.keys() - self.numbers.keys():
            raise ValueError(f"published for {', '.join(sorted(missing))}, which this notebook never kept")
        columns = ["quantity", "mean", "low", "high", "n"] + (["published", "source"] if published else [])
        rows = [_found(name, value, *published.get(name, ())) for name, value in self.numbers.items()]
        table = self.keep("headline", pd.DataFrame(filter(None, rows), columns=columns))
        summary = {
            "notebook": self.notebook,
            "parameters": self.parameters,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS_OF},
            "wall_time_s": round(time.monotonic() - self.started, 1),
            "results": self.numbers,
            "tables": list(dict.fromkeys(self.tables)),
        }
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        return table.map(lambda item: round(item, 3) if isinstance(item, float) else item)


def _estimated(name: str, value):
    """Samples as estimates, also inside a dict; single numbers of numpy and torch as Python's."""
    if isinstance(value, dict):
        return {key: _estimated(f"{name}[{key!r}]", item) for key, item in value.items()}
    if not hasattr(value, "ndim"):
        return value
    if value.ndim > 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; keep one sample a prompt, so take means first")
    from helpers.stats import estimate

    return estimate(value) if value.ndim else value.item()


def _strict_json(name: str, value):
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} cannot stand in summary.json ({error}); keep finite numbers, text or lists") from None


def _found(name: str, value, published=None, source: str | None = None) -> dict | None:
    if not (isinstance(value, dict) and {"mean", "low", "high"} <= value.keys()):
        if published is None:
            return None
        value = {"mean": ", ".join(map(str, value)) if isinstance(value, list) else value}
    return {"quantity": name, "published": published, "source": source} | value
