"""The runner: good outputs survive failures, runs do not disturb each other, and a re-run changes nothing."""

import io
import json
import os
import shutil
import sys

import nbformat
import pytest
from examination import PATHS, failures
from tiny_series import PARAMETERS, contents, good, relative, write_notebook

from helpers import catalog
from tools import freshness, kernels, run
from tools.__main__ import COMMANDS, main


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_good", good("01_good"))
    write_notebook(folder, "02_bad", "print('before')\n1 / 0")
    return folder


def run_them(notebooks, out, wanted=None, parameters=None, n_parallel=1, models=("induction-2l",)):
    jobs = run.plan(list(models), run.find_notebooks(wanted, notebooks), out, parameters or {})
    return failures(jobs, n_parallel)


def test_a_failure_is_named_and_the_others_run(notebooks, tmp_path, capsys):
    out = tmp_path / "out"
    errors = run_them(notebooks, out, parameters={"size": "7"}, n_parallel=2)
    said = capsys.readouterr()
    assert "01_good on induction-2l done in" in said.out and "02_bad on induction-2l failed at cell 3" in said.err
    assert list(errors) == ["02_bad on induction-2l"] and "ZeroDivisionError" in errors["02_bad on induction-2l"]
    kept = out / "induction-2l"
    assert {p.name for p in kept.iterdir()} == {"01_good", "01_good.ipynb", "02_bad.failed.ipynb", "report.md"}
    report = (kept / "report.md").read_text()
    assert "0.500 [0.400, 0.600]" in report and "| L0H1 | 0.500 |" in report and "| `size` | 7 |" in report
    assert not list(out.glob(".staging*"))
    assert str(tmp_path) not in (kept / "01_good.ipynb").read_text()


def test_the_longest_of_the_last_run_comes_first_and_a_new_one_before_all(tmp_path):
    jobs = [run.Job(tmp_path / f"{name}.ipynb", "induction-2l", {}, tmp_path) for name in ("01_a", "02_b", "03_c")]
    for job, seconds in zip(jobs, (5, 50)):
        job.place.mkdir(parents=True)
        (job.place / "summary.json").write_text(json.dumps({"wall_time_s": seconds}))
    assert [job.notebook.stem for job in run.longest_first(jobs)] == ["03_c", "02_b", "01_a"]


def test_a_terminal_has_a_live_bar_for_each_notebook_and_a_log_plain_lines(notebooks, tmp_path, monkeypatch, capsys):
    terminal, log = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for error, out in ((terminal, "a"), (log, "b")):
        monkeypatch.setattr(sys, "stderr", error)
        run.run_jobs(run.plan(["induction-2l"], run.find_notebooks(["01"], notebooks), tmp_path / out, {}))
    assert "A title on induction-2l: " in terminal.getvalue() and "/2 [" in terminal.getvalue()
    assert not log.getvalue() and capsys.readouterr().out.count("01_good on induction-2l done in") == 2


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
    assert set(stored.metadata) == {"kernelspec"} and "warn" not in str([cell.get("outputs") for cell in stored.cells])
    assert [dict(cell.metadata) for cell in stored.cells] == [
        {}, {"tags": ["parameters"]}, {"tags": ["injected-parameters"]}, {}
    ]  # fmt: skip


def test_ids_and_addresses_are_made_steady_and_widget_state_goes():
    view = {"text/html": "circuits-vis-1dfe32ec-52ea circuits-vis-7ea3f73a-0c80 circuits-vis-1dfe32ec-52ea"}
    outputs = [
        nbformat.v4.new_output("display_data", view | {"text/plain": "<Html at 0x7f2f3e5df6d0>"}),
        nbformat.v4.new_output("stream", name="stderr", text="careful"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])
    text, warnings = kernels.tidy(notebook)
    assert warnings == "careful"
    (shown,) = nbformat.reads(text, as_version=4).cells[0].outputs
    assert shown.data["text/html"] == "circuits-vis-1 circuits-vis-2 circuits-vis-1"
    assert shown.data["text/plain"] == "<Html>"


def test_the_next_run_restores_and_clears_what_a_killed_one_left(notebooks, tmp_path):
    assert not run_them(notebooks, tmp_path / "out", ["01"])
    before = contents(tmp_path / "out")
    # Killed between two renames: the earlier outputs are in the staging folder, the new ones not in their place.
    moved = tmp_path / "out/.staging-x/replaced/induction-2l/01_good"
    moved.parent.mkdir(parents=True)
    (tmp_path / "out/induction-2l/01_good").rename(moved)
    with run.claimed(tmp_path / "out", set()) as staging:
        assert not any(staging.iterdir())
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
    notebook = run.read_notebook(path)
    exec(notebook.cells[kernels.parameters_cell(notebook)].source, parameters)
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


def test_every_command_is_a_module_and_says_what_it_takes(capsys):
    modules = (run.ROOT / "tools").glob("[a-z]*.py")
    assert set(COMMANDS) == {path.stem for path in modules if "\ndef add_arguments(" in path.read_text()}
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0 and f"python -m tools {name}" in capsys.readouterr().out


# ---- several at a time ----


def test_as_many_at_a_time_as_cores_and_memory_allow(monkeypatch, tmp_path):
    memory = type("Memory", (), {"available": 10 * 2**30})
    monkeypatch.setattr(run, "n_cores", lambda: 8)
    monkeypatch.setattr(run.psutil, "virtual_memory", lambda: memory)
    found = []
    for n_bytes in (10**6, 2**30, 2**40):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(n_bytes)
        found.append(run.fitting(["induction-2l", str(tmp_path)]))
    assert found == [8, 2, 1]
    monkeypatch.setattr(kernels, "n_cores", lambda: 8)
    assert [kernels.kernel_environment(n)["OMP_NUM_THREADS"] for n in (4, 9)] == ["2", "1"]


# ---- to go on where a run ended ----


def test_outputs_are_out_of_date_when_what_made_them_changed(notebooks, tmp_path, monkeypatch):
    def changed(model="induction-2l", **parameters):
        (job,) = run.plan([model], run.find_notebooks(["01"], notebooks), tmp_path / "out", parameters)
        notebook, digest = run.read_notebook(job.notebook), freshness.model_digest(model)
        now = freshness.fingerprint(notebook, job.parameters, digest)
        before = json.loads((tmp_path / "out/induction-2l/01_good/summary.json").read_text())["fingerprint"]
        return [part for part in now if now[part] != before[part]]

    assert not run_them(notebooks, tmp_path / "out", ["01"])
    assert changed() == [] == changed(size="3")
    assert changed(size="4") == ["parameters"]
    assert changed("induction-2l@step0") == ["model"] and changed("induction-1l") == ["model"]
    assert str(tmp_path) not in (tmp_path / "out/induction-2l/01_good/summary.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(freshness, "source_digest", lambda package: "other")
        assert changed() == ["helpers"]
    write_notebook(notebooks, "01_good", good("01_good") + "\n1")
    assert changed() == ["notebook"]


def test_a_model_has_the_same_digest_wherever_it_lies(model_folder, tmp_path):
    shutil.copytree(model_folder["gpt2"], tmp_path / "elsewhere")
    digest = freshness.model_digest(str(model_folder["gpt2"]))
    assert digest == freshness.model_digest(str(tmp_path / "elsewhere"))
    weights = tmp_path / "elsewhere/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert digest != freshness.model_digest(str(tmp_path / "elsewhere"))
    config = tmp_path / "other/config.json"
    shutil.copytree(model_folder["gpt2"], config.parent)
    config.write_text(config.read_text() + " ")
    assert digest != freshness.model_digest(str(config.parent))


def test_a_run_that_is_resumed_gives_the_files_of_one_run(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "NOTEBOOKS", notebooks)
    resume = ["run", "--resume", "--out", str(tmp_path / "out")]
    assert main(resume) == 1  # 02 fails
    write_notebook(notebooks, "02_bad", good("02_bad"))
    capsys.readouterr()
    assert main(resume) == 0
    shown = capsys.readouterr().out
    assert "1 up to date" in shown and "02_bad on" in shown and "01_good on" not in shown
    assert main(resume) == 0 and "2 up to date" in capsys.readouterr().out
    assert main(["run", "--out", str(tmp_path / "once")]) == 0
    assert relative(tmp_path / "out") == relative(tmp_path / "once")
    (tmp_path / "out/induction-2l/01_good.ipynb").unlink()
    assert main(resume) == 0 and (tmp_path / "out/induction-2l/01_good.ipynb").exists()


@pytest.mark.parametrize("source, name", [("results", "NotApplicable"), ("metrics", "NoGap")])
def test_a_notebook_that_does_not_apply_says_so_and_is_no_failure(
    notebooks, tmp_path, monkeypatch, capsys, source, name
):
    code = good("02_bad") + f"\nfrom helpers.{source} import {name}\nraise {name}('induction-1l has one layer')"
    write_notebook(notebooks, "02_bad", code)
    monkeypatch.setattr(run, "NOTEBOOKS", notebooks)
    assert main(["run", "--notebooks", "02", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "02_bad on induction-2l left out: induction-1l has one layer\n" in shown.out and not shown.err
    assert "0 of 1 notebooks done, 1 not applicable" in shown.out and not contents(tmp_path / "out")


def test_what_no_longer_applies_leaves_nothing_of_an_earlier_run(notebooks, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "NOTEBOOKS", notebooks)
    command = ["run", "--notebooks", "01", "--out", str(tmp_path / "out")]
    assert main(command) == 0 and (tmp_path / "out/induction-2l/01_good/summary.json").exists()
    code = "from helpers.results import NotApplicable\nraise NotApplicable('not this one')"
    write_notebook(notebooks, "01_good", code)
    assert main(command) == 0
    assert not [path for path in (tmp_path / "out/induction-2l").iterdir() if path.name.startswith("01_good")]


def test_one_notebook_alone_has_all_cores(notebooks, tmp_path, monkeypatch):
    seen = []

    def execute(notebook, parameters, environment, wanted, place):
        seen.append(environment.get("OMP_NUM_THREADS"))
        return run.Outcome(not_applicable="only looked at")

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(kernels, "n_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    jobs = run.plan(["induction-2l"], run.find_notebooks(folder=notebooks), tmp_path / "out", {})
    run.run_jobs(jobs[:1], n_parallel=2)
    run.run_jobs(jobs[:2], n_parallel=2)
    assert seen == [None, "4", "4"]


# ---- checkpoints and seeds ----


def test_all_checkpoints_of_a_model_in_the_order_of_training():
    steps = run.every_model(["induction-2l@all", "gpt2"])
    assert steps[0] == "induction-2l@step0" and steps[-2:] == ["induction-2l@step4581", "gpt2"] and len(steps) == 8
    pythia = run.every_model(["pythia-70m@all"])
    assert len(pythia) == 154 and pythia[:3] == ["pythia-70m@step0", "pythia-70m@step1", "pythia-70m@step2"]
    for name in ("induction-1l@all", "attn-only-2l@all", "owner/name@all"):
        with pytest.raises(ValueError, match="one by one"):
            run.every_model([name])


def test_seeds_are_read_and_refused():
    assert run.seed_range("0..7") == list(range(8)) and run.seed_range("3") == [3]
    for text in ("7..0", "a", "0..", "0-7", "1..2..3"):
        with pytest.raises(ValueError):
            run.seed_range(text)


def test_every_seed_has_a_folder_of_its_own(notebooks, tmp_path):
    write_notebook(notebooks, "03_seeded", good("03_seeded") + "\nprint(seed)", PARAMETERS + "\nseed = 0  # of prompts")
    models = ["induction-2l", "induction-2l@step0", "owner/name", "owner/name@v1"]
    jobs = run.plan(models, run.find_notebooks(["03"], notebooks), tmp_path / "out", {}, seeds=[0, 1])
    assert len({job.folder for job in jobs}) == 8 == len(jobs)
    assert len({job.folder.name for job in jobs} | set(map(catalog.slug, models))) == 12
    assert not failures(jobs[:2], 2)
    for seed in (0, 1):
        stored = (tmp_path / f"out/induction-2l~seed{seed}/03_seeded.ipynb").read_text()
        assert f"seed = {seed}" in stored
    with pytest.raises(ValueError, match="01_good has no parameter 'seed'"):
        run.plan(models, run.find_notebooks(["01"], notebooks), tmp_path, {}, seeds=[0])
    with pytest.raises(ValueError, match="not both"):
        run.plan(models, run.find_notebooks(["03"], notebooks), tmp_path, {"seed": "1"}, seeds=[0])


def test_every_notebook_gets_a_gpu_of_its_own(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert run.gpus(1) == ["4"]
    mark = f"\nimport os, pathlib; pathlib.Path({str(tmp_path)!r}, os.environ['CUDA_VISIBLE_DEVICES']).touch()"
    for name in ("01_good", "02_bad"):  # both wait until the other has begun, so they are on different ones
        wait = f"\nwhile len(list(pathlib.Path({str(tmp_path)!r}).glob('[0-9]'))) < 2: pass"
        write_notebook(notebooks, name, good(name) + mark + wait)
    jobs = run.plan(["induction-2l"], run.find_notebooks(None, notebooks), tmp_path / "out", {})
    assert not any(outcome.error for outcome in run.run_jobs(jobs, n_gpus=2).values())
    assert main(["run", "--gpus", "3", "--out", str(tmp_path / "out")]) == 2
    assert "at most the 2 GPUs of this machine, not 3" in capsys.readouterr().err
