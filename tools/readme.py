"""The block of measured numbers in README.md: between its two markers nothing is written by hand."""

import json
from pathlib import Path

import pandas as pd

from helpers.catalog import DEFAULT_MODEL
from helpers.results import write_text
from tools.report import NOTHING, PROMPTS, SCORES, compare, markdown_table, whole_models

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- measured: written by `python -m tools report --readme` -->"
END = "<!-- end of measured -->"
ROWS = [
    ("head with the clearest induction stripe", SCORES, "top_induction_head"),
    ("its attention on the token to copy", SCORES, "top_induction_score"),
    ("loss of an even guess (nats)", SCORES, "even_guess_nats"),
    ("loss on random tokens (nats)", PROMPTS, "first_copy_loss_nats"),
    ("the same tokens, second time", PROMPTS, "second_copy_loss_nats"),
]
# Of the benchmarks `fresh_clone` and `first_figure`.
DURATIONS = """
A fresh clone on {cores} shared cores: {install_minutes:.1f} minutes to install, then {run_minutes:.1f} for `make run`
and {test_minutes:.1f} for `make test`. From starting a notebook to its first figure: at most {total:.0f} seconds, \
{imports:.0f} of them imports.
Real models run with `--small`: fewer and shorter prompts. Seconds of each notebook, imports apart:
"""


def write_readme(outputs: Path, readme: Path = README) -> Path:
    """Put the measured block made from the outputs into README.md.

    Raises:
        ValueError: README has lost a marker, or there are no outputs of the shipped model.
    """
    before, begun, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"README.md has lost a marker; put back the lines {BEGIN!r} and {END!r}")
    return write_text(readme, f"{before}{BEGIN}\n{measured(outputs)}\n\n{END}{after}")


def measured(outputs: Path) -> str:
    """The block: what was found on each model, how long a clone takes, and the seconds of every notebook.

    Raises:
        ValueError: there are no outputs of the shipped model.
    """
    models = whole_models(outputs)
    if DEFAULT_MODEL not in models:
        raise ValueError(f"no outputs of {DEFAULT_MODEL} in {outputs}; type `make run` first")
    models = {DEFAULT_MODEL: models.pop(DEFAULT_MODEL)} | models
    clone = json.loads((outputs / "benchmarks/fresh_clone.json").read_text(encoding="utf-8"))
    first = json.loads((outputs / "benchmarks/first_figure.json").read_text(encoding="utf-8"))["slowest"]
    seconds = {
        name: {notebook[:2]: f"{summary['wall_time_s']:.0f}" for notebook, summary in summaries.items()}
        for name, summaries in models.items()
    }
    table = pd.DataFrame.from_dict(seconds, orient="index").sort_index(axis="columns").fillna(NOTHING)
    lines = [*markdown_table(compare(models, ROWS)), DURATIONS.format(**clone, **first)]
    return "\n".join([*lines, *markdown_table(table.reset_index(names="model"))])
