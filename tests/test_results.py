"""Results on disk: one verb for figures, tables and numbers; strict JSON; nothing half written."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import plots
from helpers.results import Results, write_atomically


@pytest.fixture
def results(tmp_path):
    namespace = {"model_name": "owner/m", "seed": 3, "names": ["a"], "output_dir": str(tmp_path)}
    noise = {"In": [""], "_dh": ["/"], "__name__": "__main__", "torch": torch, "model": object()}
    return Results("99_test", noise | namespace | {"_i1": "x = 1"})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("good")

    def half_written(temporary):
        temporary.write_text("ba")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half_written)
    assert path.read_text() == "good" and list(tmp_path.iterdir()) == [path]


def test_everything_is_written_where_the_report_finds_it(results, tmp_path):
    figure = plots.matrices({"t": torch.eye(3)}, "key", "query", "attention")
    assert results.keep("eye", figure) is figure
    assert results.keep("losses", pd.DataFrame({"loss_nats": [1 / 3]})).shape == (1, 1)
    assert results.keep("score", torch.tensor([0.1, 0.2]))["values"] == pytest.approx([0.1, 0.2])
    assert results.keep("head", "L0H1") == "L0H1"
    found = results.finish()
    folder = tmp_path / "owner--m" / "99_test"
    assert {p.name for p in folder.iterdir()} == {"figures", "headline.csv", "losses.csv", "summary.json"}
    assert (folder / "losses.csv").read_text() == "loss_nats\n0.333333\n"
    assert found["quantity"].tolist() == ["score"] and list(found) == ["quantity", "mean", "low", "high", "n"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["parameters"] == {
        "model_name": "owner/m",
        "seed": 3,
        "names": ["a"],
        "output_dir": str(tmp_path),
    }
    assert summary["results"]["head"] == "L0H1" and "torch" in summary["versions"]
    assert summary["tables"] == ["losses", "headline"]


def test_what_is_kept_by_its_kind(results):
    assert results.keep("samples", [1.0, 2.0, 3.0])["n"] == 3
    assert results.keep("array", np.arange(30) / 29)["mean"] == pytest.approx(0.5)
    assert results.keep("first", torch.tensor([True, False]))["mean"] == 0.5
    assert results.keep("one", torch.tensor(2.0)) == 2 and results.keep("other", np.float64(0.5)) == 0.5
    assert results.keep("heads", ["L0H1", "L1H0"]) == ["L0H1", "L1H0"]
    assert results.keep("many", {"a": torch.ones(4), "b": 1})["a"]["n"] == 4
    again = results.keep("again", results.numbers["samples"])
    assert again == results.numbers["samples"]


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, object(), torch.zeros(2, 3)])
def test_what_json_cannot_hold_is_refused_by_name(results, value):
    with pytest.raises(ValueError, match="bad"):
        results.keep("bad", value)


def test_published_numbers_stand_beside_ours(results):
    results.keep("score", torch.rand(30))
    results.keep("heads", ["L5H1"])
    results.keep("seconds", 1.5)
    found = results.finish(published={"score": (0.9, "Olsson et al. 2022"), "heads": ("L5H1, L5H5", "ARENA")})
    assert found["quantity"].tolist() == ["score", "heads"]
    assert found["published"].tolist() == [0.9, "L5H1, L5H5"] and found["source"][1] == "ARENA"
    with pytest.raises(ValueError, match="published for loss"):
        results.finish(published={"loss": (1, "x")})


def test_the_same_figure_is_saved_as_the_same_bytes(results):
    for name in ("a", "b"):
        results.keep(name, plots.matrices({"t": torch.eye(3)}, "key", "query", "attention"))
    a, b = (results.folder / "figures" / f"{name}.png" for name in "ab")
    assert a.read_bytes() == b.read_bytes() and b"Software" not in a.read_bytes()
