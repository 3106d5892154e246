"""The runner: good outputs survive failures, runs do not disturb each other, and a re-run changes nothing."""

import json
import os

import nbformat
import pytest
from examination import PATHS
from tiny_series import contents, good, write_notebook

from helpers import catalog
from tools import run
from tools.__main__ import COMMANDS, main


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_good", good("01_good"))
    write_notebook(folder, "02_bad", "print('before')\n1 / 0")
    return folder


def run_them(notebooks, out, wanted=None, parameters=None, n_parallel=1, models=("induction-2l",)):
    jobs = run.plan(list(models), run.find_notebooks(wanted, notebooks), out, parameters or {})
    return run.run(jobs, n_parallel)


def test_a_failure_is_named_and_the_others_run(notebooks, tmp_path):
    out = tmp_path / "out"
    errors = run_them(notebooks, out, parameters={"size": "7"}, n_parallel=2)
    assert list(errors) == ["02_bad on induction-2l"] and "ZeroDivisionError" in errors["02_bad on induction-2l"]
    kept = out / "induction-2l"
    assert {p.name for p in kept.iterdir()} == {"01_good", "01_good.ipynb", "02_bad.failed.ipynb", "report.md"}
    report = (kept / "report.md").read_text()
    assert "0.500 [0.400, 0.600]" in report and "| L0H1 | 0.500 |" in report and "| size | 7 |" in report
    assert not list(out.glob(".staging*"))
    assert str(tmp_path) not in (kept / "01_good.ipynb").read_text()


def test_a_failed_run_leaves_the_earlier_good_one(notebooks, tmp_path):
    assert not run_them(notebooks, tmp_path / "out", ["01"])
    before = contents(tmp_path / "out")
    write_notebook(notebooks, "01_good", good("01_good") + "\nraise RuntimeError('at the end')")
    assert run_them(notebooks, tmp_path / "out", ["01"])
    assert contents(tmp_path / "out").items() >= before.items()


def test_a_run_of_the_same_again_changes_no_byte(notebooks, tmp_path):
    noisy = good("01_good") + "\nimport warnings, sys\nwarnings.warn('a path of this machine')\nobject()"
    write_notebook(notebooks, "01_good", noisy)
    assert not run_them(notebooks, tmp_path / "out", ["01"])
    before = contents(tmp_path / "out")
    assert not run_them(notebooks, tmp_path / "out", ["01"])
    assert contents(tmp_path / "out") == before
    stored = run.read_notebook(tmp_path / "out/induction-2l/01_good.ipynb")
    assert set(stored.metadata) == {"kernelspec"} and "warn" not in str([cell.outputs for cell in stored.cells])
    assert [dict(cell.metadata) for cell in stored.cells] == [
        {"tags": ["parameters"]}, {"tags": ["injected-parameters"]}, {}
    ]  # fmt: skip


def test_ids_and_addresses_are_made_steady_and_widget_state_goes():
    view = {"text/html": "circuits-vis-1dfe32ec-52ea circuits-vis-7ea3f73a-0c80 circuits-vis-1dfe32ec-52ea"}
    outputs = [
        nbformat.v4.new_output("display_data", view | {"text/plain": "<Html at 0x7f2f3e5df6d0>"}),
        nbformat.v4.new_output("stream", name="stderr", text="careful"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])
    assert run.tidy(notebook) == "careful"
    (shown,) = notebook.cells[0].outputs
    assert shown.data["text/html"] == "circuits-vis-1 circuits-vis-2 circuits-vis-1"
    assert shown.data["text/plain"] == "<Html>"


def test_the_next_run_restores_and_clears_what_a_killed_one_left(notebooks, tmp_path):
    assert not run_them(notebooks, tmp_path / "out", ["01"])
    before = contents(tmp_path / "out")
    # Killed between two renames: the earlier outputs are in the staging folder, the new ones not in their place.
    moved = tmp_path / "out/.staging-x/replaced/induction-2l/01_good"
    moved.parent.mkdir(parents=True)
    (tmp_path / "out/induction-2l/01_good").rename(moved)
    with run.claimed(tmp_path / "out", set()):
        assert contents(tmp_path / "out") == before
        with pytest.raises(ValueError, match="another run is writing"):
            run_them(notebooks, tmp_path / "out", ["01"])
    assert not list((tmp_path / "out").glob(".staging*"))


def test_the_runner_leaves_its_own_environment_alone(notebooks, tmp_path):
    before = dict(os.environ)
    write_notebook(notebooks, "01_good", good("01_good") + "\nimport os\nprint(os.environ['TQDM_DISABLE'])")
    assert not run_them(notebooks, tmp_path / "out", ["01"], n_parallel=2)
    assert os.environ == before


def test_two_models_never_share_a_folder(notebooks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder / "model").mkdir(parents=True)
    names = ["a/model", "b/model", "a/ckpt.pt", "b/ckpt.pt", "owner/model", "other/model", "induction-2l"]
    slugs = [catalog.slug(name) for name in names]
    assert len(set(slugs)) == len(names) and not any("/" in slug for slug in slugs)
    assert slugs[0].startswith("model-") and slugs[2].startswith("a-ckpt-") and slugs[-1] == "induction-2l"
    assert catalog.slug("./a/model") == slugs[0] == catalog.slug(str(tmp_path / "a/model"))
    once = run.find_notebooks(["1", "01", "01_good"], notebooks)
    assert len(run.plan(["a/model", "./a/model", "b/model"], once, tmp_path, {})) == 2


def test_parameters_are_checked_before_anything_runs(notebooks):
    path = notebooks / "01_good.ipynb"
    assert run.check_parameters(path, {"size": "4", "rate": "2"}) == {"size": 4, "rate": 2.0}
    for name, value, message in (
        ("sise", "1", "no parameter 'sise'"), ("size", "x", "int"), ("size", "1.5", "int"), ("size", "0", "at least 1"),
        ("size", "51", "at most 50"), ("rate", "0", "above 0"), ("rate", "1e999", "float"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run.check_parameters(path, {name: value})


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_values_that_a_notebook_declares_are_within_its_ranges(path):
    parameters = {}
    exec(run.read_notebook(path).cells[run.parameters_cell(run.read_notebook(path))].source, parameters)
    values = {k: str(v) for k, v in parameters.items() if k not in ("__builtins__", *run.OWN_PARAMETERS)}
    assert run.check_parameters(path, values) == {name: parameters[name] for name in values}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_small_sizes_are_of_parameters_and_within_their_ranges(path):
    sizes = json.loads((run.NOTEBOOKS / "small.json").read_text()).get(path.stem, {})
    assert run.check_parameters(path, {name: str(value) for name, value in sizes.items()}) == sizes


def test_notebooks_are_found_by_number_or_name_and_once(notebooks):
    assert [p.stem for p in run.find_notebooks(["2", "01_good", "02"], notebooks)] == ["02_bad", "01_good"]
    with pytest.raises(ValueError, match="09"):
        run.find_notebooks(["09"], notebooks)
    with pytest.raises(ValueError, match="no notebooks"):
        run.find_notebooks(folder=notebooks / "none")


def test_every_command_is_a_module_and_says_what_it_takes(capsys):
    modules = (run.ROOT / "tools").glob("[a-z]*.py")
    assert set(COMMANDS) == {path.stem for path in modules if "\ndef add_arguments(" in path.read_text()}
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0 and f"python -m tools {name}" in capsys.readouterr().out
