"""The page that compares models says what their summaries hold, and refuses what was never run."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tools import report
from tools.__main__ import main

OUTPUTS = Path(__file__).resolve().parents[2] / "outputs"


@pytest.fixture
def outputs(tmp_path):
    """Two models: the committed one, and one of which only notebook 02 was run."""
    for name in ("induction-2l", "other"):
        shutil.copytree(OUTPUTS / "induction-2l" / report.SCORES, tmp_path / name / report.SCORES)
    shutil.copytree(OUTPUTS / "induction-2l" / report.ABLATION, tmp_path / "induction-2l" / report.ABLATION)
    path = tmp_path / "other" / report.SCORES / "summary.json"
    summary = json.loads(path.read_text())
    summary["results"]["layout"] |= {"n_key_value_heads": 4, "global_layers": [1]}
    summary["results"] |= {"heads_above_0_3_in_global_layers": 2}
    values = {"global": 0.5, "sliding": 0.25}
    exact = {kind: {"mean": value, "low": value, "high": value, "n": 3} for kind, value in values.items()}
    summary["results"]["best_head_of_a_layer"] = exact
    path.write_text(json.dumps(summary))
    return tmp_path


def test_the_page_is_made_from_the_summaries(outputs):
    page = report.write_atlas(outputs).read_text()
    table = pd.read_csv(outputs / "atlas.csv", index_col=0)
    assert list(table.columns) == ["induction-2l", "other"]
    ablation = json.loads((outputs / "induction-2l" / report.ABLATION / "summary.json").read_text())["results"]
    row = table.loc["head whose removal costs most (nats on the second copy)"]
    assert row["induction-2l"].startswith(ablation["top_head"]) and row["other"] == "not run"
    assert "2 of which share keys" in page and "2 sit in the 1 global layers" in page
    assert "0.500 [0.500, 0.500]" in page and (outputs / "atlas.png").exists()


def test_every_row_of_the_page_is_something_that_its_notebook_records():
    for text, notebook, keys in report.ROWS:
        results = json.loads((OUTPUTS / "induction-2l" / notebook / "summary.json").read_text())["results"]
        assert set(keys) <= results.keys(), text


def test_models_can_be_chosen_and_missing_ones_are_named(outputs, capsys):
    assert main(["report", "--outputs", str(outputs), "--model", "other"]) == 0
    assert list(pd.read_csv(outputs / "atlas.csv", index_col=0).columns) == ["other"]
    assert main(["report", "--outputs", str(outputs), "--model", "gpt2"]) == 2
    assert "no outputs of gpt2" in capsys.readouterr().err
    assert main(["report", "--outputs", str(outputs / "none")]) == 2
    assert "tools run --model" in capsys.readouterr().err


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
    rows = [line for line in page if line.startswith("| step") or line.startswith("| final")]
    assert [row.split(" | ")[0] for row in rows] == ["| step5", "| step40", "| final"]
    assert "| 3 | 6.500 [5.500, 7.500] | L0H1 (3) |" in rows[0] and "| 1 | 0.500 [0.400, 0.600] | L0H1 |" in rows[2]


def test_the_atlas_leaves_checkpoints_and_seeds_to_the_other_page(outputs):
    for variant in ("induction-2l@step0", "induction-2l~seed3"):
        shutil.copytree(outputs / "induction-2l", outputs / variant)
    report.write_atlas(outputs)
    assert list(pd.read_csv(outputs / "atlas.csv", index_col=0).columns) == ["induction-2l", "other"]
    assert report.write_runs(outputs).exists()
