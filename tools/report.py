"""Pages made from summaries and tables alone: the report of a model, the atlas over models, and runs along training."""

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pandas as pd

from helpers.results import write_atomically, write_text
from tools.captions import captions

PROMPTS, SCORES, ABLATION, PATCHING = (
    "01_prompt_construction", "02_attention_visualization", "03_head_ablation", "04_activation_patching",
)  # fmt: skip
LENS, PATHS, WILD = "05_logit_lens", "06_path_analysis", "10_in_the_wild"
OWN_PARAMETERS = ("model_name", "output_dir")  # the runner sets these itself; they say nothing of an experiment
NOTHING = "–"

# What a row of the atlas shows: (text, notebook, names of its recorded results).
ROWS = [
    ("layers and heads", SCORES, "layers_and_heads"),
    ("loss on the second copy (nats)", PROMPTS, "second_copy_loss_nats"),
    ("gain from the order of the first copy (nats)", PROMPTS, "gain_from_order_nats"),
    ("head with the clearest induction stripe, and its score", SCORES, "top_induction_head", "top_induction_score"),
    ("heads with an induction score above 0.3", SCORES, "heads_above_0_3"),
    ("of these in global layers", SCORES, "heads_above_0_3_in_global_layers"),
    ("strongest previous-token head and its score", SCORES, "top_previous_token_head", "top_previous_token_score"),
    ("the same head on text: attention where it matches", SCORES, "prefix_matching_of_top_head"),
    ("and at places that match in another text", SCORES, "prefix_matching_baseline_of_top_head"),
    ("head whose removal loses most copying (nats)", ABLATION, "top_head", "top_copying_lost_nats"),
    ("heads whose removal raises the loss", ABLATION, "heads_positive_beyond_interval"),
    ("induction heads: attend and matter", ABLATION, "induction_heads"),
    ("attend, effect not shown", ABLATION, "attend_effect_not_shown"),
    ("heads that patching picks at the last position", PATCHING, "heads_picked_by_patching"),
    ("what they recover together", PATCHING, "recovery_of_picked_heads_together"),
    ("stop where the answer usually first wins", LENS, "usual_first_win"),
    ("answer's probability at the end", LENS, "probability_at_the_end"),
    ("what induction heads write of the logit difference", LENS, "induction_heads_write"),
    ("strongest edge into an induction head's key", PATHS, "strongest_key_edge"),
    ("heads that make the circuit", PATHS, "circuit_heads"),
    ("loss recovered when only they are kept", PATHS, "circuit_kept"),
    ("harm to repeats in text without induction heads (nats)", WILD, "harm_on_repeats_nats"),
    ("share of the gain from context lost with them", WILD, "share_of_gain_lost: induction heads"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--readme", action="store_true", help="put the measured numbers into README.md instead")


def main(arguments: argparse.Namespace) -> int:
    if arguments.readme:
        from tools.readme import write_readme

        pages = [write_readme(arguments.outputs)]
    else:
        pages = [page for page in (write_atlas(arguments.outputs), write_runs(arguments.outputs)) if page]
    if not pages:
        raise ValueError(f"no outputs in {arguments.outputs}; type `python -m tools run --model NAME` first")
    print(f"see {' and '.join(map(str, pages))}")
    return 0


# ---- what a summary holds ----


def read_summaries(model_folder: Path) -> dict[str, dict]:
    """The summaries of one model's notebooks, by notebook, in order.

    Raises:
        ValueError: a file is damaged.
    """
    summaries = {}
    for path in sorted(model_folder.glob("*/summary.json")):
        try:
            summaries[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged; run its notebook again ({error})") from None
    return summaries


def whole_models(outputs: Path) -> dict[str, dict]:
    """The summaries of all models with scores of their heads, without those of one checkpoint or one seed."""
    found = {path.name: read_summaries(path) for path in sorted(outputs.glob("*/")) if not re.search("@|~", path.name)}
    models = {name: summaries for name, summaries in found.items() if SCORES in summaries}
    for results in (summaries[SCORES]["results"] for summaries in models.values()):
        if "layout" in results:  # which the first edition did not record
            results["layers_and_heads"] = _in_words(**results["layout"])
            results["even_guess_nats"] = math.log(results["layout"]["d_vocab"])
    return models


def _in_words(n_layers: int, n_heads: int, n_key_value_heads: int, global_layers: list[int], **_) -> str:
    windows = f", {len(global_layers)} of the layers global" if len(global_layers) < n_layers else ""
    shared = f" ({n_key_value_heads} of keys and values)" if n_key_value_heads < n_heads else ""
    return f"{n_layers} of {n_heads}{shared}{windows}"


def is_estimate(value) -> bool:
    """Whether a recorded value is a mean with its interval."""
    return isinstance(value, dict) and {"mean", "low", "high"} <= value.keys()


def as_text(value) -> str:
    """A recorded value for a table: an estimate with its interval, floats to three digits."""
    if is_estimate(value):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {as_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(as_text(item) for item in value) or "none"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def compare(models: dict[str, dict], rows: list[tuple]) -> pd.DataFrame:
    """A column for each model, by its summaries, and a row as in ROWS where a model has its results."""
    table = {}
    for text, notebook, *names in rows:
        results = [summaries.get(notebook, {}).get("results", {}) for summaries in models.values()]
        cells = [" ".join(as_text(found[name]) for name in names if name in found) for found in results]
        if any(cells):
            table[text] = [cell or NOTHING for cell in cells]
    return pd.DataFrame.from_dict(table, orient="index", columns=list(models)).reset_index(names="")


def markdown_table(rows: pd.DataFrame) -> list[str]:
    """The lines of a table in Markdown; what is missing is an empty cell."""
    header = ["| " + " | ".join(rows.columns) + " |", "|" + "---|" * len(rows.columns)]
    cells = rows.convert_dtypes().astype(object).where(rows.notna(), "")  # counts are whole numbers again
    # Names of tokens, as <|endoftext|>, would end a cell or vanish as a tag.
    cells = cells.map(lambda value: as_text(value).replace("|", "\\|").replace("<", "&lt;"))
    return header + ["| " + " | ".join(row) + " |" for row in cells.itertuples(index=False)]


# ---- one model ----


def write_report(model_folder: Path) -> Path | None:
    """Gather the summaries of one model's notebooks into `report.md`, with tables and figures."""
    summaries = read_summaries(model_folder)
    if not summaries:
        return None
    lines = [f"# {model_folder.name}: what the series found", ""]
    lines += [
        "Every number below is read from a `summary.json` or a table beside it, and has the name that it has there.",
        "What it means, and what it does not show, is said in its notebook.", "",
    ]  # fmt: skip
    for name, summary in summaries.items():
        lines += _report_section(summary, model_folder / name)
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return write_text(model_folder / "report.md", "\n".join([*lines, "", f"Made with {versions}.", ""]))


def _report_section(summary: dict, folder: Path) -> list[str]:
    name = folder.name
    parameters = summary.get("parameters", {}).items()
    sizes = ", ".join(f"{key} {as_text(value)}" for key, value in parameters if key not in OWN_PARAMETERS)
    lines = ["", f"## [{name}]({name}.ipynb)", "", *([f"With {sizes}.", ""] if sizes else [])]
    kept = [(f"`{key}`", as_text(value)) for key, value in summary["results"].items()]
    lines += markdown_table(pd.DataFrame(kept, columns=["result", "value"]))
    for table in summary["tables"]:
        rows = pd.read_csv(folder / f"{table}.csv")
        if table != "headline":  # the numbers above once more
            some = f" (first 10 of {len(rows)} rows)" if len(rows) > 10 else ""
            lines += ["", f"`{table}`{some}", "", *markdown_table(rows.head(10))]
    executed = folder.with_suffix(".ipynb")
    texts = captions(nbformat.read(executed, as_version=4)) if executed.exists() else {}
    for figure in sorted((folder / "figures").glob("*.png")):
        text = texts.get(figure.stem, figure.stem).translate(str.maketrans("[]", "()"))
        lines += ["", f"![{text}]({name}/figures/{figure.name})"]
    return lines


# ---- several models ----


def write_atlas(outputs: Path) -> Path | None:
    """Write `atlas.md`, `atlas.csv` and `atlas.png` into the outputs folder; None if no model has scores."""
    models = whole_models(outputs)
    if not models:
        return None
    table = compare(models, ROWS)
    write_atomically(outputs / "atlas.csv", lambda path: table.to_csv(path, index=False))
    figure = depth_figure(outputs, models)
    write_atomically(outputs / "atlas.png", lambda path: figure.savefig(path, metadata={"Software": None}))
    lines = ["# Atlas: the same questions, several models", "", _TEXT, "", *markdown_table(table)]
    lines += ["", "![Induction score of every head by depth](atlas.png)", ""]
    lines += [f"[Report of {name}]({name}/report.md)  " for name in models]
    return write_text(outputs / "atlas.md", "\n".join([*lines, ""]))


_TEXT = """Made by `python -m tools report` from the summaries and tables of each model; brackets are 95 % intervals.
Depth 0 is the first layer, 1 the last. A dash: the notebook was not run, or does not apply to the model. Sizes of the
prompt sets differ between models and are in each summary, so compare which heads and how strong, not the width of
intervals."""


def depth_figure(outputs: Path, models: dict[str, dict]) -> "Figure":
    """Every head's induction score against its depth, one panel a model; layers without a window are marked."""
    from helpers import plots  # which takes seconds to import

    plots.use_style()
    figure, axes = plots.subplots(1, len(models), figsize=(1.5 + 3.6 * len(models), 3.8), sharey=True, squeeze=False)
    for axis, (name, summaries) in zip(axes[0], models.items()):
        table = pd.read_csv(outputs / name / SCORES / "induction_scores.csv")
        table["depth"] = table.layer / max(1, table.layer.max())
        layout = summaries[SCORES]["results"].get("layout", {})  # which the first edition did not record
        sliding = ~table.layer.isin(layout.get("global_layers", table.layer))
        kinds = [("sliding layers", sliding, "o", 0), ("global layers", ~sliding, "D", 3)]
        for label, mask, marker, colour in kinds if sliding.any() else [(None, ~sliding, "o", 0)]:
            part = table[mask]
            reach = [part.induction_score - part.low, part.high - part.induction_score]
            style = {"fmt": marker, "ms": 4, "color": plots.PALETTE[colour], "lw": 1}
            axis.errorbar(part.depth, part.induction_score, yerr=reach, label=label, **style)
        for row in table.head(3).itertuples():
            place = {"xytext": (-5, 3), "textcoords": "offset points", "ha": "right", "size": 9}
            axis.annotate(row.head, (row.depth, row.induction_score), **place)
        axis.set(title=name, xlabel="depth (share of layers)", xlim=(-0.08, 1.08), ylim=(-0.03, 1.08))
        axis.spines[["top", "right"]].set_visible(False)
        if sliding.any():
            axis.legend(frameon=False, fontsize=9)
    axes[0, 0].set_ylabel("induction score")
    return figure


# ---- one model at many checkpoints, or with many seeds ----


def read_runs(outputs: Path) -> pd.DataFrame:
    """One row for each number, text or list that a notebook kept, of every model, checkpoint and seed.

    The mean of an estimate is its value; `step` is the checkpoint's number, which the finished model has not.
    """
    rows = []
    for folder in sorted(path for path in outputs.glob("*") if path.is_dir()):
        name, _, seed = folder.name.partition("~seed")
        model, _, checkpoint = name.partition("@")
        step = int(checkpoint.removeprefix("step")) if checkpoint.removeprefix("step").isdigit() else None
        same = {"model": model, "checkpoint": checkpoint or "final", "step": step, "seed": seed, "folder": folder.name}
        for notebook, summary in read_summaries(folder).items():
            rows += [same | {"notebook": notebook} | row for row in _numbers(summary["results"])]
    columns = ["model", "checkpoint", "step", "seed", "folder", "notebook", "quantity", "value", "low", "high", "text"]
    return pd.DataFrame(rows, columns=columns)


def _numbers(results: dict, prefix: str = "") -> list[dict]:
    """The recorded values as rows; those inside a dict are named after both."""
    rows = []
    for key, value in results.items():
        row = {"quantity": prefix + key, "text": as_text(value)}
        if is_estimate(value):
            rows.append(row | {"value": value["mean"], "low": value["low"], "high": value["high"]})
        elif isinstance(value, dict):
            rows += _numbers(value, f"{prefix}{key}: ")
        else:
            rows.append(row | {"value": row["text"] if isinstance(value, list) else value})
    return rows


def write_runs(outputs: Path) -> Path | None:
    """Write `runs.md` and `runs.csv`: what each notebook found along training and across seeds; None without any."""
    runs = read_runs(outputs)
    many = runs[runs.folder.str.contains("@|~")]
    if many.empty:
        return None
    runs = runs[runs.model.isin(many.model) & runs.notebook.isin(many.notebook)]
    table = runs.drop(columns="text")
    write_atomically(outputs / "runs.csv", lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    lines = ["# Along training and across seeds", "", _MANY]
    for (model, notebook), part in runs.groupby(["model", "notebook"]):
        every = runs[runs.model == model].sort_values("step", na_position="last").checkpoint.unique()
        lines += ["", f"## {notebook} on {model}", "", *markdown_table(_along_training(part, every))]
    return write_text(outputs / "runs.md", "\n".join([*lines, ""]))


_MANY = """Made by `python -m tools report` from the summaries of all runs on checkpoints (`--model NAME@all`) and with
several seeds (`--seeds 0..7`); the first row says how many. With one seed brackets are that run's own 95 % interval,
over prompts; with several they are the interval over seeds of the runs' means (fewer than 5: the smallest and the
largest). A text that differs between seeds has the number of seeds after it. A dash: the notebook does not apply to
the checkpoint, which cannot do the task yet, or was not run. What is the same everywhere stands in `runs.csv` alone."""


def _along_training(part: pd.DataFrame, every: Iterable[str]) -> pd.DataFrame:
    """One row a quantity, one column for `every` checkpoint in the order of training."""
    # A run without a seed of its own says again what the seed by default says.
    part = part[(part.seed != "") | (part.groupby("checkpoint").seed.transform("max") == "")]
    seeds = part.groupby("checkpoint").seed.nunique().astype(str).rename("seeds").to_frame().T
    changing = part[part.groupby("quantity").text.transform("nunique") > 1]
    cells = {key: _over_seeds(rows) for key, rows in changing.groupby(["quantity", "checkpoint"], sort=False)}
    table = pd.concat([seeds, pd.Series(cells, dtype=object).unstack(sort=False)]) if cells else seeds
    return table.reindex(columns=every).fillna(NOTHING).reset_index(names="quantity")


def _over_seeds(rows: pd.DataFrame) -> str:
    from helpers.stats import estimate  # which takes seconds to import

    if len(rows) == 1:
        return rows.text.iloc[0]
    if all(type(value) in (int, float) for value in rows.value):
        return as_text(estimate(rows.value.to_numpy(float)))
    return "; ".join(f"{text} ({n})" for text, n in rows.text.value_counts().items())
