"""The block of measured numbers in README.md: between its two markers nothing is written by hand."""

import json
import math
from pathlib import Path

import pandas as pd

from helpers.catalog import DEFAULT_MODEL
from helpers.results import write_text
from tools.report import NOTHING, markdown_table, read_summaries, results_of

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- measured: written by `python -m tools report --readme` -->"
END = "<!-- end of measured -->"


def write_readme(outputs: Path, readme: Path = README) -> Path:
    """Put the measured block made from the outputs into README.md.

    Raises:
        ValueError: README has lost a marker, or there are no outputs of the shipped model.
    """
    before, _ = split(text := readme.read_text(encoding="utf-8"))
    after = text[text.index(END) :]
    return write_text(readme, f"{before}{BEGIN}\n{measured(outputs)}\n\n{after}")


def split(text: str) -> tuple[str, str]:
    """What stands before the block, and what stands in it.

    Raises:
        ValueError: a marker is missing.
    """
    before, found, rest = text.partition(BEGIN + "\n")
    block, ended, _ = rest.partition("\n\n" + END)
    if not found or not ended:
        raise ValueError(f"README.md has lost a marker; put back the lines {BEGIN!r} and {END!r}")
    return before, block


def measured(outputs: Path) -> str:
    """The block: what was found on the shipped model, how long it took, and the seconds of every notebook.

    Raises:
        ValueError: there are no outputs of the shipped model.
    """
    models = {path.name: read_summaries(path) for path in sorted(outputs.glob("*/"))}
    models = {name: summaries for name, summaries in models.items() if summaries}
    if DEFAULT_MODEL not in models:
        raise ValueError(f"no outputs of {DEFAULT_MODEL} in {outputs}; type `make run` first")
    models = {DEFAULT_MODEL: models.pop(DEFAULT_MODEL)} | models
    lines = [*markdown_table(_findings(models)), ""]
    lines += [*_durations(outputs / "benchmarks"), "", *markdown_table(_seconds(models))]
    return "\n".join(lines)


def _findings(models: dict[str, dict]) -> pd.DataFrame:
    scores = {name: results_of(summaries, "attention_visualization") for name, summaries in models.items()}
    losses = {name: results_of(summaries, "prompt_construction") for name, summaries in models.items()}
    rows = {
        "head with the clearest induction stripe": [s.get("top_induction_head", NOTHING) for s in scores.values()],
        "its attention on the token to copy": [_mean(found, "top_induction_score") for found in scores.values()],
        "loss of an even guess (nats)": [_even_guess(found) for found in scores.values()],
        "loss on random tokens, first time (nats)": [_mean(found, "first_copy_loss_nats") for found in losses.values()],
        "the same tokens, second time": [_mean(found, "second_copy_loss_nats") for found in losses.values()],
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(models)).reset_index(names="")


def _mean(results: dict, name: str) -> str:
    return f"{results[name]['mean']:.2f}" if name in results else NOTHING


def _even_guess(results: dict) -> str:
    return f"{math.log(results['layout']['d_vocab']):.2f}" if "layout" in results else NOTHING


def _durations(benchmarks: Path) -> list[str]:
    """Sentences on a fresh clone, and on the first figure."""
    clone = json.loads((benchmarks / "fresh_clone.json").read_text(encoding="utf-8"))
    first = json.loads((benchmarks / "first_figure.json").read_text(encoding="utf-8"))["slowest"]
    return [
        f"A fresh clone on {clone['cores']} shared cores: {clone['install_minutes']:.1f} minutes to install, then "
        f"{clone['run_minutes']:.1f} for `make run`",
        f"and {clone['test_minutes']:.1f} for `make test`. From starting a notebook to its first figure: at most "
        f"{first['total']:.0f} seconds, {first['imports']:.0f} of them imports.",
        "Real models run with `--small`: fewer and shorter prompts. Seconds of each notebook, imports apart:",
    ]


def _seconds(models: dict[str, dict]) -> pd.DataFrame:
    numbers = sorted({notebook[:2] for summaries in models.values() for notebook in summaries})
    rows = []
    for name, summaries in models.items():
        times = {notebook[:2]: f"{summary['wall_time_s']:.0f}" for notebook, summary in summaries.items()}
        rows.append([name, *(times.get(number, NOTHING) for number in numbers)])
    return pd.DataFrame(rows, columns=["model", *numbers])
