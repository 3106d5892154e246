"""The runner: good outputs survive failures and kills, and mistakes are named before anything runs."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tools import run
from tools.__main__ import COMMANDS, main

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
    jobs = run.plan(["induction-2l"], run.find_notebooks(folder=notebooks), out, {"size": "7"})
    errors = run.run(jobs, n_parallel=2)
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
    find = run.find_notebooks
    assert not run.run(run.plan(["induction-2l"], find(["01"], notebooks), out, {}))
    good = {p: p.read_bytes() for p in (out / "induction-2l").rglob("*") if p.is_file() and p.name != "report.md"}
    write_notebook(notebooks, "01_good", GOOD + "\nraise RuntimeError('at the end')")
    assert run.run(run.plan(["induction-2l"], find(["01"], notebooks), out, {}))
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
    assert not run.run(run.plan(["induction-2l"], run.find_notebooks(["01"], notebooks), out, {}))
    good = {p: p.read_bytes() for p in (out / "induction-2l").rglob("*") if p.is_file()}
    write_notebook(notebooks, "01_good", GOOD + "\nimport time\nPath('../../started').touch()\ntime.sleep(60)")
    code = (
        "import sys; from pathlib import Path; from tools import run; notebooks, out = map(Path, sys.argv[1:]); "
        "run.run(run.plan(['induction-2l'], run.find_notebooks(['01'], notebooks), out, {}))"
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
    assert run.check_parameters(path, {"size": "4", "rate": "2"}) == {"size": 4, "rate": 2.0}
    for name, value, message in (("sise", "1", "no parameter 'sise'"), ("size", "x", "int"), ("size", "1.5", "int")):
        with pytest.raises(ValueError, match=message):
            run.check_parameters(path, {name: value})


def test_notebooks_are_found_by_number_or_name(notebooks):
    assert [p.stem for p in run.find_notebooks(["2", "01_good"], notebooks)] == ["02_bad", "01_good"]
    with pytest.raises(ValueError, match="09"):
        run.find_notebooks(["09"], notebooks)
    with pytest.raises(ValueError, match="no notebooks"):
        run.find_notebooks(folder=notebooks / "none")


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


def test_every_module_is_a_command_and_says_what_it_takes(capsys):
    present = {path.stem for path in (run.ROOT / "tools").glob("[a-z]*.py")}
    assert set(COMMANDS) == present
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0 and f"python -m tools {name}" in capsys.readouterr().out


def test_the_runner_leaves_its_own_environment_alone(notebooks, tmp_path):
    before = dict(os.environ)
    write_notebook(notebooks, "01_good", GOOD + "\nimport os\nprint(os.environ['TQDM_DISABLE'])")
    jobs = run.plan(["induction-2l"], run.find_notebooks(["01"], notebooks), tmp_path / "out", {})
    assert not run.run(jobs, n_parallel=2) and os.environ == before


def test_no_widget_state_and_no_times_are_stored(notebooks, tmp_path):
    path = notebooks / "01_good.ipynb"
    content = run.read_notebook(path)
    content.metadata["widgets"] = {"x": {}}
    nbformat.write(content, path)
    assert not run.run(run.plan(["induction-2l"], [path], tmp_path / "out", {}))
    stored = run.read_notebook(tmp_path / "out/induction-2l/01_good.ipynb")
    assert set(stored.metadata) == {"kernelspec"}
    assert [dict(cell.metadata) for cell in stored.cells] == [
        {"tags": ["parameters"]}, {"tags": ["injected-parameters"]}, {}
    ]  # fmt: skip
