"""The runner: good outputs survive failures and kills, and mistakes are named before anything runs."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from helpers import series
from helpers.__main__ import main

GOOD = """
from pathlib import Path
import json
folder = Path(output_dir) / model_name / "01_good"
(folder / "figures").mkdir(parents=True)
(folder / "table.csv").write_text("head,loss_nats\\nL0H1,0.5\\n")
summary = {"notebook": "01_good", "wall_time_s": 1.0, "versions": {"torch": "x"}, "tables": ["table"],
           "results": {"size": size, "score": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}}}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def write_notebook(folder: Path, name: str, code: str) -> Path:
    parameters = (
        'model_name = "induction-2l"  # model\nsize = 3  # size\nrate = 0.5  # rate\noutput_dir = "outputs"  # out'
    )
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(code)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder, "01_good", GOOD)
    write_notebook(folder, "02_bad", "print('before')\n1 / 0")
    return folder


def test_a_failure_is_named_and_the_others_run(notebooks, tmp_path):
    out = tmp_path / "out"
    jobs = series.plan(["induction-2l"], series.find_notebooks(folder=notebooks), out, {"size": "7"})
    errors = series.run(jobs, n_parallel=2)
    assert list(errors) == ["02_bad on induction-2l"] and "ZeroDivisionError" in errors["02_bad on induction-2l"]
    kept = out / "induction-2l"
    assert {p.name for p in kept.iterdir()} == {"01_good", "01_good.ipynb", "02_bad.failed.ipynb", "report.md"}
    report = (kept / "report.md").read_text()
    assert "0.500 [0.400, 0.600]" in report and "| L0H1 | 0.500 |" in report and "| size | 7 |" in report
    assert not list(out.glob(".staging*"))
    text = (kept / "01_good.ipynb").read_text()
    assert str(tmp_path) not in text and '"papermill"' not in text


def test_a_failed_run_leaves_the_earlier_good_one(notebooks, tmp_path):
    out = tmp_path / "out"
    find = series.find_notebooks
    assert not series.run(series.plan(["induction-2l"], find(["01"], notebooks), out, {}))
    good = {p: p.read_bytes() for p in (out / "induction-2l").rglob("*") if p.is_file() and p.name != "report.md"}
    write_notebook(notebooks, "01_good", GOOD + "\nraise RuntimeError('at the end')")
    assert series.run(series.plan(["induction-2l"], find(["01"], notebooks), out, {}))
    assert all(p.read_bytes() == content for p, content in good.items())


def at_work_in(folder: Path) -> list[str]:
    """Processes whose working folder lies in `folder`, where the system tells."""
    places = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            places.append(os.readlink(link))
    return [place for place in places if Path(place).is_relative_to(folder)]


def test_a_killed_run_leaves_no_half_written_file_and_no_kernel(notebooks, tmp_path):
    out = tmp_path / "out"
    assert not series.run(series.plan(["induction-2l"], series.find_notebooks(["01"], notebooks), out, {}))
    good = {p: p.read_bytes() for p in (out / "induction-2l").rglob("*") if p.is_file()}
    write_notebook(notebooks, "01_good", GOOD + "\nimport time\nPath('../../started').touch()\ntime.sleep(60)")
    code = (
        "import sys; from pathlib import Path; from helpers import series; notebooks, out = map(Path, sys.argv[1:]); "
        "series.run(series.plan(['induction-2l'], series.find_notebooks(['01'], notebooks), out, {}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, notebooks, out], start_new_session=True)
    for _ in range(300):
        if (out / "started").exists():
            break
        time.sleep(0.2)
    assert (out / "started").exists()
    process.kill()
    process.wait()
    for _ in range(50):
        if not (left := at_work_in(out)):
            break
        time.sleep(0.2)
    assert not left
    now = {p: p.read_bytes() for p in (out / "induction-2l").rglob("*") if p.is_file()}
    assert now == good


def test_parameters_are_checked_before_anything_runs(notebooks):
    path = notebooks / "01_good.ipynb"
    assert series.check_parameters(path, {"size": "4", "rate": "2"}) == {"size": 4, "rate": 2.0}
    for name, value, message in (("sise", "1", "no parameter 'sise'"), ("size", "x", "int"), ("size", "1.5", "int")):
        with pytest.raises(ValueError, match=message):
            series.check_parameters(path, {name: value})


def test_notebooks_are_found_by_number_or_name(notebooks):
    assert [p.stem for p in series.find_notebooks(["2", "01_good"], notebooks)] == ["02_bad", "01_good"]
    with pytest.raises(ValueError, match="09"):
        series.find_notebooks(["09"], notebooks)
    with pytest.raises(ValueError, match="no notebooks"):
        series.find_notebooks(folder=notebooks / "none")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--model", "gpt-2"], "unknown model 'gpt-2'"),
        (["run", "--notebooks", "77"], "no notebook '77'"),
        (["run", "-p", "nothing", "1"], "no parameter 'nothing'"),
        (["run", "--jobs", "0"], "--jobs"),
        (["train", "induction-9l"], "unknown recipe"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_models_command_lists_names_and_states(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out
    assert "induction-2l" in lines and "ready" in lines and "EleutherAI/pythia-70m" in lines


def test_widget_state_is_stripped(tmp_path):
    path = tmp_path / "n.ipynb"
    nbformat.write(new_notebook(metadata={"widgets": {"x": {}}, "papermill": {"input_path": "/x"}}), path)
    series.clean_metadata(path)
    assert json.loads(path.read_text())["metadata"] == {}
