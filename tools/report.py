"""Pages made from summaries and tables alone: the report of one model, and the atlas that compares several."""

import argparse
import json
from pathlib import Path

import pandas as pd

from helpers.results import write_atomically, write_text

SCORES, ABLATION, PATCHING, LENS, WEIGHTS = (
    "02_attention_visualization", "03_head_ablation", "04_activation_patching", "05_logit_lens", "07_circuit_weights",
)  # fmt: skip

# What a row shows: (text, notebook, keys of the recorded results, joined by a space).
ROWS = [
    ("strongest induction head and its score", SCORES, ("top_induction_head", "top_induction_score")),
    ("its depth, as a share of all layers", SCORES, ("top_induction_depth",)),
    ("heads with an induction score above 0.3", SCORES, ("heads_above_0_3",)),
    ("strongest previous-token head and its score", SCORES, ("top_previous_token_head", "top_previous_token_score")),
    ("its depth", SCORES, ("top_previous_token_depth",)),
    ("head whose removal costs most (nats on the second copy)", ABLATION, ("top_head", "top_delta_loss_nats")),
    ("heads whose removal costs something, of all", ABLATION, ("heads_positive_beyond_interval", "heads_total")),
    ("induction heads: attend and matter", ABLATION, ("induction_heads",)),
    ("attend, without an effect", ABLATION, ("attend_without_effect",)),
    ("heads that patching picks at the last position", PATCHING, ("heads_picked_by_patching",)),
    ("what they recover together", PATCHING, ("recovery_of_picked_heads_together",)),
    ("stop where the answer usually first wins", LENS, ("usual_first_win",)),
    ("answer's probability at the end", LENS, ("probability_at_the_end",)),
    ("share of the logit difference that induction heads write", LENS, ("induction_share_of_logit_difference",)),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", metavar="NAME", help="all that have outputs by default")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")


def main(arguments: argparse.Namespace) -> int:
    runs = write_runs(arguments.outputs)
    if runs is None or arguments.model or whole_models(arguments.outputs):
        print(f"see {write_atlas(arguments.outputs, arguments.model)}")
    if runs:
        print(f"see {runs}, and all numbers in {runs.with_suffix('.csv')}")
    return 0


# ---- what a summary holds ----


def read_summaries(model_folder: Path) -> dict[str, dict]:
    """The summaries of one model's notebooks, by notebook, in order."""
    return {path.parent.name: _read_json(path) for path in sorted(model_folder.glob("*/summary.json"))}


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged; run its notebook again ({error})") from None


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
        return ", ".join(as_text(item) for item in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown_table(rows: pd.DataFrame) -> list[str]:
    """The lines of a table in Markdown."""
    header = ["| " + " | ".join(rows.columns) + " |", "|" + "---|" * len(rows.columns)]
    return header + ["| " + " | ".join(as_text(v) for v in row) + " |" for row in rows.itertuples(index=False)]


# ---- one model ----


def write_report(model_folder: Path) -> Path | None:
    """Gather the summaries of one model's notebooks into `report.md`, with tables and figures."""
    summaries = list(read_summaries(model_folder).values())
    if not summaries:
        return None
    lines = [f"# {model_folder.name}: what the series found", ""]
    lines += ["Every number below is read from the `summary.json` and the tables beside it.", ""]
    for summary in summaries:
        lines += _report_section(summary, model_folder / summary["notebook"])
    versions = ", ".join(f"{name} {number}" for name, number in summaries[-1]["versions"].items())
    return write_text(model_folder / "report.md", "\n".join([*lines, "", f"Made with {versions}.", ""]))


def _report_section(summary: dict, folder: Path) -> list[str]:
    name = summary["notebook"]
    lines = ["", f"## [{name}]({name}.ipynb)", "", "| result | value |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {as_text(value)} |" for key, value in summary["results"].items()]
    for table in summary["tables"]:
        rows = pd.read_csv(folder / f"{table}.csv").head(10)
        lines += ["", f"{table.replace('_', ' ')}", "", *markdown_table(rows)]
    for figure in sorted((folder / "figures").glob("*.png")):
        lines += ["", f"![{figure.stem}]({name}/figures/{figure.name})"]
    return lines


# ---- several models ----


def write_atlas(outputs: Path, models: list[str] | None = None) -> Path:
    """Write `atlas.md`, `atlas.csv` and `atlas.png` into the outputs folder; returns the page.

    Raises:
        ValueError: no model has outputs, or one that was asked for has none.
    """
    present = whole_models(outputs)
    missing = {name for name in models or [] if not (outputs / name / SCORES / "summary.json").exists()}
    if missing or not (present or models):
        names = ", ".join(sorted(missing)) or "any model"
        raise ValueError(f"no outputs of {names} in {outputs}; type `python -m tools run --model NAME` first")
    found = {name: read_summaries(outputs / name) for name in models or present}
    texts = [text for text, *_ in ROWS] + ["copying score of the strongest induction head, from its weights"]
    columns = {name: [*_column(s), _copying(outputs / name, s)] for name, s in found.items()}
    table = pd.DataFrame({"": texts} | columns)
    write_atomically(outputs / "atlas.csv", lambda path: table.to_csv(path, index=False))
    scores = {name: pd.read_csv(outputs / name / SCORES / "induction_scores.csv") for name in found}
    figure = depth_figure(scores, {name: s[SCORES]["results"]["layout"] for name, s in found.items()})
    write_atomically(outputs / "atlas.png", lambda path: figure.savefig(path, format="png"))
    lines = ["# Atlas: the same questions, several models", "", _TEXT, "", *markdown_table(table)]
    lines += ["", "![Induction score of every head by depth](atlas.png)", "", "## How attention is laid out", ""]
    lines += [f"- {_layout(name, summaries)}" for name, summaries in found.items()]
    lines += ["", *(f"[Report of {name}]({name}/report.md)  " for name in found)]
    return write_text(outputs / "atlas.md", "\n".join([*lines, ""]))


def whole_models(outputs: Path) -> list[str]:
    """The models with scores of their heads, without those of one checkpoint or one seed."""
    names = [path.parent.parent.name for path in sorted(outputs.glob(f"*/{SCORES}/summary.json"))]
    return [name for name in names if not is_one_of_many(name)]


_TEXT = """Made by `python -m tools report` from the summaries and tables of each model; brackets are 95 % intervals.
Depth 0 is the first layer, 1 the last. Sizes of the prompt sets differ between models and are in each summary,
so compare which heads and how strong, not the width of intervals."""


def _column(summaries: dict[str, dict]) -> list[str]:
    return [_cell(summaries.get(notebook, {}).get("results", {}), keys) for _, notebook, keys in ROWS]


def _cell(results: dict, keys: tuple[str, ...]) -> str:
    if not all(key in results for key in keys):
        return "not run"
    joint = " of " if keys[-1].endswith("_total") else " "
    return joint.join(as_text(results[key]) for key in keys) or "none"


def _copying(folder: Path, summaries: dict[str, dict]) -> str:
    table = folder / WEIGHTS / "copying_scores.csv"
    if not table.exists():
        return "not run"
    scores = pd.read_csv(table).set_index("head")["copying_score"]
    return as_text(float(scores[summaries[SCORES]["results"]["top_induction_head"]]))


def _layout(name: str, summaries: dict[str, dict]) -> str:
    """Sliding windows and grouped queries of one model, in a sentence or two."""
    results = summaries[SCORES]["results"]
    layout = results["layout"]
    text = f"**{name}**: {layout['n_layers']} layers of {layout['n_heads']} heads"
    if layout["n_key_value_heads"] == layout["n_heads"]:
        text += ", each with keys and values of its own."
    else:
        text += f", {layout['n_heads'] // layout['n_key_value_heads']} of which share keys and values."
    if mates := results.get("score_of_heads_sharing_keys_with_a_strong_one"):
        text += f" Heads that share their key with one above 0.3 have a mean induction score of {as_text(mates)}."
    if kinds := results.get("best_head_of_a_layer"):
        text += (
            f" Of its {results['heads_above_0_3']} heads above 0.3, {results['heads_above_0_3_in_global_layers']} "
            f"sit in the {len(layout['global_layers'])} global layers; the best head of a layer scores "
            f"{as_text(kinds['global'])} in a global one and {as_text(kinds['sliding'])} in one with a sliding window."
        )
    return text


def depth_figure(scores: dict[str, pd.DataFrame], layouts: dict[str, dict]) -> "Figure":
    """Every head's induction score against its depth, one panel a model; layers without a window are marked."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    from helpers import plots

    plots.use_style()
    figure, axes = plt.subplots(1, len(scores), figsize=(1.5 + 3.6 * len(scores), 3.8), sharey=True, squeeze=False)
    for axis, (name, table) in zip(axes[0], scores.items()):
        layout = layouts[name]
        depth = table.layer / max(1, layout["n_layers"] - 1)
        everywhere = table.layer.isin(layout["global_layers"])
        windows = not everywhere.all()
        kinds = [(~everywhere, 0, "o", "sliding layers"), (everywhere, 3, "D", "global layers")]
        for mask, colour, marker, label in kinds if windows else [(everywhere, 0, "o", None)]:
            part, spread = table[mask], (table.induction_score - table.low, table.high - table.induction_score)
            axis.errorbar(
                depth[mask], part.induction_score, yerr=[side[mask] for side in spread], fmt=marker, ms=4,
                color=plots.PALETTE[colour], lw=1, label=label,
            )  # fmt: skip
        for x, (_, row) in zip(depth, table.head(3).iterrows()):
            spot = (x, row.induction_score)
            axis.annotate(row["head"], spot, xytext=(-5, 3), textcoords="offset points", ha="right", size=9)
        axis.set(title=name, xlabel="depth (share of layers)", xlim=(-0.08, 1.08), ylim=(-0.03, 1.08))
        if windows:
            axis.legend(frameon=False, fontsize=9)
    axes[0, 0].set_ylabel("induction score")
    sns.despine(figure)
    plt.close(figure)  # it lives on, but nothing shows it unasked
    return figure


# ---- one model at many checkpoints, or with many seeds ----


def is_one_of_many(folder: str) -> bool:
    """Whether the outputs in a folder of this name are of one checkpoint or of one seed."""
    return "@" in folder or "~seed" in folder


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
    columns = ["model", "checkpoint", "step", "seed", "folder", "notebook", "quantity", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _numbers(results: dict, prefix: str = "") -> list[dict]:
    """The recorded values as rows; those inside a dict are named after both."""
    rows = []
    for key, value in results.items():
        if is_estimate(value):
            rows.append({"quantity": prefix + key, "value": value["mean"], "low": value["low"], "high": value["high"]})
        elif isinstance(value, dict):
            rows += _numbers(value, f"{prefix}{key}: ")
        else:
            rows.append({"quantity": prefix + key, "value": as_text(value) if isinstance(value, list) else value})
    return rows


def write_runs(outputs: Path) -> Path | None:
    """Write `runs.md` and `runs.csv`: what each notebook found along training and across seeds; None without any."""
    runs = read_runs(outputs)
    many = runs[runs.folder.map(is_one_of_many)]
    if many.empty:
        return None
    runs = runs[runs.model.isin(many.model) & runs.notebook.isin(many.notebook)]
    write_atomically(outputs / "runs.csv", lambda path: runs.to_csv(path, index=False, float_format="%.6g"))
    lines = ["# Along training and across seeds", "", _MANY]
    for (model, notebook), part in runs.groupby(["model", "notebook"]):
        lines += ["", f"## {notebook} on {model}", "", *markdown_table(_along_training(part))]
    return write_text(outputs / "runs.md", "\n".join([*lines, ""]))


_MANY = """Made by `python -m tools report` from the summaries of all runs on checkpoints (`--model NAME@all`) and with
several seeds (`--seeds 0..7`). With one seed brackets are that run's own 95 % interval, over prompts; with several they
are the interval over seeds of the runs' means. A text that differs between seeds has the number of seeds after it."""


def _along_training(part: pd.DataFrame) -> pd.DataFrame:
    """One row a checkpoint, in the order of training, one column a quantity."""
    order = part.sort_values("step", na_position="last").checkpoint.unique()
    # A run without a seed of its own says again what the seed by default says.
    several = part[part.seed != ""].checkpoint.unique()
    part = part[(part.seed != "") | ~part.checkpoint.isin(several)]
    rows = []
    for checkpoint in order:
        here = part[part.checkpoint == checkpoint]
        cells = {quantity: _over_seeds(rows_of) for quantity, rows_of in here.groupby("quantity", sort=False)}
        rows.append({"checkpoint": checkpoint, "seeds": here.seed.nunique()} | cells)
    return pd.DataFrame(rows).fillna("not run")


def _over_seeds(rows: pd.DataFrame) -> str:
    from helpers.stats import estimate

    values = rows.value.tolist()
    if len(values) > 1 and all(type(value) in (int, float) for value in values):
        return as_text(estimate([float(value) for value in values]))
    if len(values) == 1 and pd.notna(rows.low.iloc[0]):
        return as_text({"mean": values[0], "low": rows.low.iloc[0], "high": rows.high.iloc[0]})
    counts = rows.value.map(as_text).value_counts()
    return "; ".join(counts.index if len(values) == 1 else (f"{text} ({n})" for text, n in counts.items()))
