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
