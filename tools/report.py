"""Pages made from summaries and tables alone: the report of one model, and the atlas that compares several."""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pandas as pd
from nbformat import NotebookNode

from helpers.catalog import slug
from helpers.results import write_atomically, write_text

SCORES, WEIGHTS = "attention_visualization", "circuit_weights"
OWN_PARAMETERS = ("model_name", "output_dir")  # the runner sets these itself; they say nothing of an experiment

# What a row shows: (text, name of the notebook without its number, names of the recorded results, joined by a space).
# A row that no model has is left out.
ROWS = [
    ("loss on the second copy (nats)", "prompt_construction", ("second_copy_loss_nats",)),
    ("gain from the order of the first copy (nats)", "prompt_construction", ("gain_from_order_nats",)),
    ("head with the clearest induction stripe, and its score", SCORES, ("top_induction_head", "top_induction_score")),
    ("heads with an induction score above 0.3", SCORES, ("heads_above_0_3",)),
    ("strongest previous-token head and its score", SCORES, ("top_previous_token_head", "top_previous_token_score")),
    ("the same head on text: attention where it matches", SCORES, ("prefix_matching_of_top_head",)),
    ("and at places that match in another text", SCORES, ("prefix_matching_baseline_of_top_head",)),
    ("head whose removal loses most copying (nats)", "head_ablation", ("top_head", "top_copying_lost_nats")),
    ("heads whose removal raises the loss, of all", "head_ablation", ("heads_positive_beyond_interval", "heads_total")),
    ("induction heads: attend and matter", "head_ablation", ("induction_heads",)),
    ("attend, effect not shown", "head_ablation", ("attend_effect_not_shown",)),
    ("heads that patching picks at the last position", "activation_patching", ("heads_picked_by_patching",)),
    ("what they recover together", "activation_patching", ("recovery_of_picked_heads_together",)),
    ("stop where the answer usually first wins", "logit_lens", ("usual_first_win",)),
    ("answer's probability at the end", "logit_lens", ("probability_at_the_end",)),
    ("what induction heads write of the logit difference", "logit_lens", ("induction_heads_write",)),
    ("strongest edge into an induction head's key", "path_analysis", ("strongest_key_edge",)),
    ("heads that make the circuit", "path_analysis", ("circuit_heads",)),
    ("loss recovered when only they are kept", "path_analysis", ("circuit_kept",)),
    ("harm to repeats in text without induction heads (nats)", "in_the_wild", ("harm_on_repeats_nats",)),
    ("share of the gain from context lost with them", "in_the_wild", ("share_of_gain_lost: induction heads",)),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", metavar="NAME", help="all that have outputs by default")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--readme", action="store_true", help="put the measured numbers into README.md instead")


def main(arguments: argparse.Namespace) -> int:
    if arguments.readme:
        from tools.readme import write_readme

        print(f"see {write_readme(arguments.outputs)}")
        return 0
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


def results_of(summaries: dict[str, dict], name: str) -> dict:
    """What the notebook of a name without its number recorded; empty if it was not run."""
    found = [summary["results"] for notebook, summary in summaries.items() if notebook.partition("_")[2] == name]
    return found[0] if found else {}


def folder_of(model_folder: Path, name: str) -> Path:
    """The outputs of the notebook of a name without its number; a folder that is not there if it was not run."""
    return next(iter(sorted(model_folder.glob(f"[0-9][0-9]_{name}/"))), model_folder / name)


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
    """The lines of a table in Markdown; what is missing is an empty cell."""
    header = ["| " + " | ".join(rows.columns) + " |", "|" + "---|" * len(rows.columns)]
    cells = rows.convert_dtypes().astype(object).where(rows.notna(), "")  # counts are whole numbers again
    return header + ["| " + " | ".join(map(_in_a_cell, row)) + " |" for row in cells.itertuples(index=False)]


def _in_a_cell(value) -> str:
    # Names of tokens, as <|endoftext|>, would end a cell or vanish as a tag.
    return as_text(value).replace("|", "\\|").replace("<", "&lt;")


# ---- one model ----


def write_report(model_folder: Path) -> Path | None:
    """Gather the summaries of one model's notebooks into `report.md`, with tables and figures."""
    summaries = list(read_summaries(model_folder).values())
    if not summaries:
        return None
    lines = [f"# {model_folder.name}: what the series found", ""]
    lines += [
        "Every number below is read from a `summary.json` or a table beside it, and has the name that it has there.",
        "What it means, and what it does not show, is said in its notebook.", "",
    ]  # fmt: skip
    for summary in summaries:
        lines += _report_section(summary, model_folder / summary["notebook"])
    versions = ", ".join(f"{name} {number}" for name, number in summaries[-1]["versions"].items())
    return write_text(model_folder / "report.md", "\n".join([*lines, "", f"Made with {versions}.", ""]))


def _report_section(summary: dict, folder: Path) -> list[str]:
    name = summary["notebook"]
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
    texts = _captions(folder.with_suffix(".ipynb"))
    for figure in sorted((folder / "figures").glob("*.png")):
        text = f"{figure.stem.replace('_', ' ')}: {texts.get(figure.stem, 'figure')}"
        lines += ["", f"![{text}]({name}/figures/{figure.name})"]
    return lines


def _captions(executed: Path) -> dict[str, str]:
    """What every figure shows that an executed notebook keeps, by the figure's name."""
    if not executed.exists():
        return {}
    notebook = nbformat.read(executed, as_version=4)
    found = zip(notebook.cells, captions(notebook))
    return {name: text for cell, text in found for name in re.findall(r'\.keep\(\s*"(\w+)"', cell.source)}


# ---- several models ----


def write_atlas(outputs: Path, models: list[str] | None = None) -> Path:
    """Write `atlas.md`, `atlas.csv` and `atlas.png` into the outputs folder; returns the page.

    Raises:
        ValueError: no model has outputs, or one that was asked for has none.
    """
    present = whole_models(outputs)
    models = models and list(map(_folder_name, models))
    missing = {name for name in models or [] if not (folder_of(outputs / name, SCORES) / "summary.json").exists()}
    if missing or not (present or models):
        names = ", ".join(sorted(missing)) or "any model"
        raise ValueError(f"no outputs of {names} in {outputs}; type `python -m tools run --model NAME` first")
    found = {name: read_summaries(outputs / name) for name in models or present}
    scores = {name: pd.read_csv(folder_of(outputs / name, SCORES) / "induction_scores.csv") for name in found}
    layouts = {name: _layout(scores[name], results_of(s, SCORES)) for name, s in found.items()}
    table = _atlas_table(outputs, found, layouts)
    write_atomically(outputs / "atlas.csv", lambda path: table.to_csv(path, index=False))
    figure = depth_figure(scores, layouts)
    write_atomically(outputs / "atlas.png", lambda path: figure.savefig(path, metadata={"Software": None}))
    lines = ["# Atlas: the same questions, several models", "", _TEXT, "", *markdown_table(table)]
    lines += ["", "![Induction score of every head by depth](atlas.png)", "", "## How attention is laid out", ""]
    lines += [f"- {_layout_text(name, layouts[name], results_of(s, SCORES))}" for name, s in found.items()]
    lines += ["", *(f"[Report of {name}]({name}/report.md)  " for name in found)]
    return write_text(outputs / "atlas.md", "\n".join([*lines, ""]))


def _folder_name(model: str) -> str:
    """The name of a model's folder; that of one seed's, which names no model, is itself."""
    try:
        return slug(model)
    except ValueError:
        return model


def whole_models(outputs: Path) -> list[str]:
    """The models with scores of their heads, without those of one checkpoint or one seed."""
    names = [path.parent.parent.name for path in sorted(outputs.glob(f"*/[0-9][0-9]_{SCORES}/summary.json"))]
    return [name for name in names if not is_one_of_many(name)]


_TEXT = """Made by `python -m tools report` from the summaries and tables of each model; brackets are 95 % intervals.
Depth 0 is the first layer, 1 the last. A dash: the notebook was not run, or does not apply to the model. Sizes of the
prompt sets differ between models and are in each summary, so compare which heads and how strong, not the width of
intervals."""

NOTHING = "–"


def _atlas_table(outputs: Path, found: dict[str, dict], layouts: dict[str, dict]) -> pd.DataFrame:
    rows = {text: [_cell(results_of(s, notebook), keys) for s in found.values()] for text, notebook, keys in ROWS}
    for kind in ("induction", "previous_token"):
        text = f"depth of the strongest {kind.replace('_', '-')} head, as a share of all layers"
        heads = [results_of(s, SCORES).get(f"top_{kind}_head") for s in found.values()]
        rows[text] = [_depth(head, layouts[name]) for head, name in zip(heads, found)]
    rows["copying score of the strongest induction head, from its weights"] = [
        _copying(folder_of(outputs / name, WEIGHTS) / "copying_scores.csv", results_of(s, SCORES))
        for name, s in found.items()
    ]
    rows = {text: row for text, row in rows.items() if set(row) != {NOTHING}}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(found)).reset_index(names="")


def _cell(results: dict, keys: tuple[str, ...]) -> str:
    if not all(key in results for key in keys):
        return NOTHING
    joint = " of " if keys[-1].endswith("_total") else " "
    return joint.join(as_text(results[key]) for key in keys) or "none"


def _depth(head: str | None, layout: dict) -> str:
    if head is None:
        return NOTHING
    return as_text(int(head[1:].split("H")[0]) / max(1, layout["n_layers"] - 1))


def _copying(table: Path, scores: dict) -> str:
    if not table.exists():
        return NOTHING
    by_head = pd.read_csv(table).set_index("head")
    column = [name for name in by_head.columns if name in ("copying_score", "copying")]
    head = scores.get("top_induction_head")
    return as_text(float(by_head[column[0]][head])) if column and head in by_head.index else NOTHING


def _layout(scores: pd.DataFrame, results: dict) -> dict:
    """Layers, heads, and which layers see everything: as recorded, else as far as the table of scores tells."""
    n_layers = int(scores.layer.max()) + 1
    told = {"n_layers": n_layers, "n_heads": int(scores["index"].max()) + 1, "global_layers": list(range(n_layers))}
    return told | results.get("layout", {})


def _layout_text(name: str, layout: dict, results: dict) -> str:
    """Sliding windows and grouped queries of one model, in a sentence or two, as far as they were recorded."""
    text = f"**{name}**: {layout['n_layers']} layers of {layout['n_heads']} heads"
    keys = layout.get("n_key_value_heads", 0)
    if keys == layout["n_heads"]:
        text += ", each with keys and values of its own"
    elif keys:
        text += f", {layout['n_heads'] // keys} of which share keys and values"
    text += "."
    inside, n_global = results.get("heads_above_0_3_in_global_layers"), len(layout["global_layers"])
    if inside is not None and n_global < layout["n_layers"]:
        text += f" Of its {results['heads_above_0_3']} heads above 0.3, {inside} sit in the {n_global} global layers."
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
    several = part[part.seed != ""].checkpoint.unique()
    part = part[(part.seed != "") | ~part.checkpoint.isin(several)]
    columns = {}
    for checkpoint in every:
        here = part[part.checkpoint == checkpoint]
        cells = {quantity: _over_seeds(rows_of) for quantity, rows_of in here.groupby("quantity", sort=False)}
        columns[checkpoint] = {"seeds": str(here.seed.nunique())} | cells if cells else {}
    table = pd.DataFrame(columns).rename_axis("quantity").fillna(NOTHING)
    changes = part.value.map(as_text).groupby(part.quantity).nunique() > 1
    return table[table.index.map(lambda quantity: changes.get(quantity, True))].reset_index()  # and the row of seeds


def _over_seeds(rows: pd.DataFrame) -> str:
    from helpers.stats import estimate

    values = rows.value.tolist()
    if len(values) > 1 and all(type(value) in (int, float) for value in values):
        return as_text(estimate([float(value) for value in values]))
    if len(values) == 1 and pd.notna(rows.low.iloc[0]):
        return as_text({"mean": values[0], "low": rows.low.iloc[0], "high": rows.high.iloc[0]})
    counts = rows.value.map(as_text).value_counts()
    return "; ".join(counts.index if len(values) == 1 else (f"{text} ({n})" for text, n in counts.items()))


def captions(notebook: NotebookNode) -> list[str]:
    """What the figures of each cell show, for readers who cannot see them: kinds, labels, and section."""
    found, section = [], "the notebook"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            section = (re.findall(r"^#+ (.+)$", cell.source, flags=re.M) or [section])[-1]
        drawn = re.findall(r'\b(?:plots|diagrams)\.(?!visible)(\w+)\(|, "([^"]+)"(?=[,)])', cell.source)
        words = dict.fromkeys(kind.replace("_", " ") or label for kind, label in drawn)
        found.append(f"{', '.join(words) or 'figure'}. Section: {section}")
    return found
