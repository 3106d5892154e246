"""Runs that are interrupted, told to end, or killed: what was there stays, and no kernel does."""

import signal
import time

import pytest
from examination import failures
from tiny_series import at_work_in, contents, good, sleeping, start, wait_for, write_notebook

from tools import run

NAMES = ("01_waits", "02_slow", "03_slow", "04_quick")
# When to end the run: its kernels start; two notebooks are in work; one is done and two are in work.
MOMENTS = {
    "kernels start": lambda out: any(out.glob(".staging-*/*")),
    "two in work": lambda out: (out / "02_slow.started").exists() and (out / "03_slow.started").exists(),
    "one is done": lambda out: (out / "04_quick.started").exists() and (out / "02_slow.started").exists(),
}


@pytest.fixture
def earlier(tmp_path):
    """Outputs of all four notebooks, made before; the notebooks then take their time."""
    for name in NAMES:
        write_notebook(tmp_path / "notebooks", name, good(name))
    notebooks, out = run.find_notebooks(folder=tmp_path / "notebooks"), tmp_path / "out"
    assert not failures(run.plan(["induction-2l"], notebooks, out, {}), 2)
    for name in NAMES:
        write_notebook(tmp_path / "notebooks", name, sleeping(name))
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["SIGKILL", *(pytest.param(s, marks=pytest.mark.ci) for s in ("SIGINT", "SIGTERM"))])
def test_earlier_outputs_stay_no_kernel_does_and_the_next_run_succeeds(earlier, tmp_path, how, moment):
    notebooks, out = tmp_path / "notebooks", tmp_path / "out"
    if moment == "one is done":
        write_notebook(notebooks, "04_quick", sleeping("04_quick").replace("time.sleep(60)", ""))
    elif moment == "two in work":
        (notebooks / "04_quick.ipynb").unlink()
    process = start(notebooks, "run", "--jobs", "2", "--out", str(out))
    assert wait_for(lambda: MOMENTS[moment](out), 90)
    began = time.monotonic()
    process.send_signal(getattr(signal, how))
    if how != "SIGKILL":
        time.sleep(0.2)
        process.send_signal(getattr(signal, how))  # by an impatient user, who must not make it worse
    _, error = process.communicate(timeout=30)
    if how == "SIGKILL":
        assert wait_for(lambda: not at_work_in(out), 10)
    else:
        assert time.monotonic() - began < 3 and process.returncode == 130
        assert error.count("\n") == 1 and "interrupted" in error and "untouched" in error, error
        assert not at_work_in(out) and not list(out.glob(".staging-*"))
    assert not (out / "01_waits.started").exists()
    now = contents(out)
    # What was done was kept; the rest is as it was.
    done = ("04_quick.ipynb", "04_quick/summary.json", "report.md") if moment == "one is done" else ()
    changed = {path.relative_to(out / "induction-2l").as_posix() for path in earlier if now[path] != earlier[path]}
    assert changed <= set(done)

    for name in NAMES:
        write_notebook(notebooks, name, good(name))
    assert not failures(run.plan(["induction-2l"], run.find_notebooks(folder=notebooks), out, {}), 2)
    assert not list(out.glob(".staging-*"))
    assert contents(out).keys() >= earlier.keys() and not list(out.rglob("*.failed.ipynb"))
