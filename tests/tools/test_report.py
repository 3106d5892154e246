"""Pages made from summaries say what these hold, bear what notebooks record anew, and refuse what was not run."""

import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools import readme, report
from tools.__main__ import main

OUTPUTS = Path(__file__).resolve().parents[2] / "outputs"
SCORE = {"mean": 0.912, "low": 0.9, "high": 0.92, "n": 24}
LAYOUT = {"n_layers": 2, "n_heads": 2, "n_key_value_heads": 1, "d_vocab": 50, "global_layers": [1]}
RESULTS = {
    "01_prompt_construction": {"first_copy_loss_nats": SCORE | {"mean": 7.0}, "second_copy_loss_nats": SCORE},
    "02_attention_visualization": {
        "top_induction_head": "L1H0", "top_induction_score": SCORE, "heads_above_0_3": 2,
        "heads_above_0_3_in_global_layers": 1, "layout": LAYOUT,
    },
    "03_head_ablation": {
        "top_head": "L0H1", "top_copying_lost_nats": SCORE, "something_new": "told", "induction_heads": [],
    },
}  # fmt: skip


def write_summary(folder: Path, notebook: str, results: dict) -> None:
    (folder / notebook / "figures").mkdir(parents=True)
    sizes = {"model_name": folder.name, "length": 9}
    summary = {"notebook": notebook, "parameters": sizes, "results": results, "tables": []}
    summary |= {"versions": {"torch": "2"}, "wall_time_s": 12.4}
    (folder / notebook / "summary.json").write_text(json.dumps(summary))
    if notebook.endswith(report.SCORES):
        rows = [(f"L{i}H{j}", i, j, i * 0.5 + j * 0.1) for i in (1, 0) for j in (0, 1)]
        table = pd.DataFrame(rows, columns=["head", "layer", "index", "induction_score"])
        table.assign(low=table.induction_score, high=table.induction_score).to_csv(
            folder / notebook / "induction_scores.csv", index=False
        )


@pytest.fixture
def outputs(tmp_path):
    """The shipped model, and another of which only notebook 02 was run, with windows and shared keys."""
    for notebook, results in RESULTS.items():
        write_summary(tmp_path / "induction-2l", notebook, results)
    write_summary(tmp_path / "a", "02_attention_visualization", RESULTS["02_attention_visualization"])
    (tmp_path / "benchmarks").mkdir()
    clone = {"cores": 2, "install_minutes": 2.6, "run_minutes": 2.4, "test_minutes": 4.9}
    (tmp_path / "benchmarks/fresh_clone.json").write_text(json.dumps(clone))
    (tmp_path / "benchmarks/first_figure.json").write_text('{"slowest": {"total": 6.2, "imports": 4.1}}')
    return tmp_path


def test_the_atlas_is_made_from_the_summaries(outputs):
    page = report.write_atlas(outputs).read_text()
    table = pd.read_csv(outputs / "atlas.csv", index_col=0)
    assert list(table.columns) == ["a", "induction-2l"]
    row = table.loc["head whose removal loses most copying (nats)"]
    assert row["induction-2l"] == "L0H1 0.912 [0.900, 0.920]" and row["a"] == report.NOTHING
    assert "2 of 2 (1 of keys and values), 1 of the layers global" in page
    assert "| induction heads: attend and matter | – | none |" in page
    assert not any("patching" in text for text in table.index)  # nobody ran it
    assert (outputs / "atlas.png").exists()


def test_every_row_of_the_atlas_is_something_that_its_notebook_records():
    summaries = report.whole_models(OUTPUTS)["induction-2l"]
    for text, notebook, *names in [*report.ROWS, *readme.ROWS]:
        assert set(names) <= summaries[notebook]["results"].keys(), text


def test_where_nothing_was_run_the_command_says_what_to_type(tmp_path, capsys):
    assert main(["report", "--outputs", str(tmp_path / "none")]) == 2
    assert "tools run --model" in capsys.readouterr().err


def test_a_report_shows_what_was_kept_and_describes_its_figures(outputs):
    folder, name = outputs / "induction-2l", "02_attention_visualization"
    (folder / name / "figures/scores.png").write_bytes(b"")
    (folder / name / "figures/other.png").write_bytes(b"")
    source = 'results.keep("scores", plots.head_grid(s, "induction score [share]"))'
    notebook = new_notebook(cells=[new_markdown_cell("## 1. Every head"), new_code_cell(source)])
    nbformat.write(notebook, folder / f"{name}.ipynb")
    page = report.write_report(folder).read_text()
    assert "| `something_new` | told |" in page and "| `top_induction_score` | 0.912 [0.900, 0.920] |" in page
    assert "With length 9." in page  # the model's name stands at the top
    assert "![Scores: map of all heads, and the strongest with intervals (induction score (share)). Section: 1." in page
    assert f"![other]({name}/figures/other.png)" in page


def test_the_measured_block_holds_what_the_outputs_hold(outputs):
    block = readme.measured(outputs)
    assert "| its attention on the token to copy | 0.912 [0.900, 0.920] | 0.912 [0.900, 0.920] |" in block
    assert "| the same tokens, second time | 0.912 [0.900, 0.920] | – |" in block
    assert "2.6 minutes to install, then 2.4 for `make run`" in block and "at most 6 seconds, 4 of them" in block
    assert "| induction-2l | 12 | 12 | 12 |" in block and "| a | – | 12 | – |" in block
    page = outputs / "README.md"
    page.write_text(f"# Title\n\n{readme.BEGIN}\nold\n\n{readme.END}\nrest\n")
    readme.write_readme(outputs, page)
    assert page.read_text() == f"# Title\n\n{readme.BEGIN}\n{block}\n\n{readme.END}\nrest\n"


@pytest.fixture
def many(tmp_path):
    """One notebook at two checkpoints with three seeds each, and once without."""
    for folder, shift in (("x", 0), *((f"x@step{n}~seed{seed}", n + seed) for n in (5, 40) for seed in (0, 1, 2))):
        score = {"mean": 0.5 + shift, "low": 0.4 + shift, "high": 0.6 + shift, "n": 3}
        results = {"score": score, "top": "L0H1", "pair": {"a": 1, "b": shift}, "heads": ["L1H1"], "same": shift % 2}
        path = tmp_path / folder / "01_good/summary.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"notebook": "01_good", "results": results, "tables": []}))
    return tmp_path


def test_runs_along_training_and_over_seeds_stand_on_one_page(many, capsys):
    assert main(["report", "--outputs", str(many)]) == 0
    shown = capsys.readouterr().out
    assert "runs.md" in shown and "atlas" not in shown  # no model has scores
    table = pd.read_csv(many / "runs.csv")
    assert len(table) == 7 * 6 and set(table.quantity) == {"score", "top", "pair: a", "pair: b", "heads", "same"}
    page = (many / "runs.md").read_text().splitlines()
    assert "| quantity | step5 | step40 | final |" in page and "| seeds | 3 | 3 | 1 |" in page
    found = "| score | 6.500 [5.500, 7.500] | 41.500 [40.500, 42.500] | 0.500 [0.400, 0.600] |"
    assert found in page and not any("L0H1" in line for line in page)  # is everywhere


def test_a_run_that_is_missing_is_a_dash_and_what_never_changes_is_left_out(many):
    shutil.rmtree(many / "x/01_good")
    for seed in (1, 2):
        shutil.rmtree(many / f"x@step40~seed{seed}")
    shutil.copytree(many / "x@step5~seed0", many / "x@step5")  # the seed by default, run before
    (many / "x@step90/02_other").mkdir(parents=True)
    other = {"notebook": "02_other", "results": {"more": 1}, "tables": []}
    (many / "x@step90/02_other/summary.json").write_text(json.dumps(other))
    page = report.write_runs(many).read_text()
    assert "| seeds | 3 | 1 | – |" in page and "| pair: b | 6.000 [5.000, 7.000] | 40 | – |" in page
    assert "| pair: a |" not in page


def test_tables_bear_bars_tags_counts_and_gaps():
    rows = pd.DataFrame({"token": ["<|bos|>", "a"], "n": [5.0, None], "mean": [0.5, 1.0], "source": [None, "b"]})
    assert report.markdown_table(rows)[2:] == ["| &lt;\\|bos\\|> | 5 | 0.500 |  |", "| a |  | 1.000 | b |"]


def test_the_atlas_leaves_checkpoints_and_seeds_to_the_other_page(outputs):
    for variant in ("induction-2l@step0", "induction-2l~seed3"):
        shutil.copytree(outputs / "induction-2l", outputs / variant)
    report.write_atlas(outputs)
    assert list(pd.read_csv(outputs / "atlas.csv", index_col=0).columns) == ["a", "induction-2l"]
    assert report.write_runs(outputs).exists()
