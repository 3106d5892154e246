"""A real scheduler with workers as processes: results come home, and what goes wrong there is one sentence here."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client
from tiny_series import at_work_in, good, relative, start, wait_for, write_notebook

from tools import cluster, run
from tools.__main__ import main

# Takes a minute where it comes first, and no time where it comes again; says which worker it is on.
ONCE_SLOW = """
import os, time
from pathlib import Path
mark = Path({mark!r})
first = not mark.exists()
mark.write_text(str(os.getppid()))
time.sleep(60 if first else 0)
"""


@contextmanager
def processes(tmp_path: Path, n_workers: int, folder: Path = run.ROOT, **environment):
    """A scheduler and its workers, in processes that end with the test; gives its address and all of them."""
    started, place = [], tmp_path / "scheduler.json"
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(folder), "TMPDIR": str(tmp_path / "tmp")} | environment
    options = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def begin(module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"distributed.cli.{module}", "--scheduler-file", str(place), "--no-dashboard"]
        started.append(subprocess.Popen([*command, *arguments], **options))

    try:
        begin("dask_scheduler", "--port", "0", "--host", "127.0.0.1")
        assert wait_for(lambda: place.exists() and place.read_text().endswith("}"))
        address = json.loads(place.read_text())["address"]
        for _ in range(n_workers):
            begin("dask_worker", "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path / "tmp"))
        with Client(address) as client:
            client.wait_for_workers(n_workers, timeout=300)
        yield address, started
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_good", good("01_good"))
    monkeypatch.setattr(run, "NOTEBOOKS", folder)
    return folder


def command(tmp_path: Path, address: str, *more: str) -> list[str]:
    return ["run", "--scheduler", address, "--out", str(tmp_path / "out"), *more]


@pytest.mark.slow
def test_what_a_killed_worker_had_in_hand_is_run_again_and_all_comes_home_as_from_here(notebooks, tmp_path, capsys):
    mark = tmp_path / "mark"
    write_notebook(notebooks, "02_slow", good("02_slow") + ONCE_SLOW.format(mark=str(mark)))
    write_notebook(notebooks, "03_bad", "1 / 0")
    with processes(tmp_path, n_workers=2) as (address, started):
        runner = start(notebooks, *command(tmp_path, address))
        assert wait_for(lambda: mark.exists() and mark.read_text())
        worker = int(mark.read_text())
        assert worker in {process.pid for process in started[1:]}
        os.kill(worker, signal.SIGKILL)
        out, error = runner.communicate(timeout=300)
        assert runner.returncode == 1 and int(mark.read_text()) != worker
        assert "2 of 3 notebooks done" in out and "03_bad on induction-2l failed at cell 3: ZeroDivisionError" in error
        assert wait_for(lambda: not at_work_in(tmp_path / "tmp"), 60)
    assert main(["run", "--out", str(tmp_path / "here")]) == 1
    assert relative(tmp_path / "here") == relative(tmp_path / "out")
    assert main(["run", "--resume", "--notebooks", "1", "2", "--out", str(tmp_path / "out")]) == 0
    assert "2 up to date" in capsys.readouterr().out


@pytest.mark.slow
def test_when_the_scheduler_goes_away_what_is_done_is_kept_and_resumed(notebooks, tmp_path, capsys):
    mark = tmp_path / "mark"
    write_notebook(notebooks, "00_slow", good("00_slow") + ONCE_SLOW.format(mark=str(mark)))
    with processes(tmp_path, n_workers=1) as (address, started):
        runner = start(notebooks, *command(tmp_path, address))
        assert wait_for(mark.exists)
        assert (tmp_path / "out/induction-2l/01_good.ipynb").exists()
        started[0].kill()
        _, error = runner.communicate(timeout=300)
    assert runner.returncode == 1 and error.count("\n") == 1, error
    assert "00_slow on induction-2l failed at the scheduler, which went away" in error
    assert "--resume" in error and not list((tmp_path / "out").glob(".staging-*"))
    assert main(["run", "--resume", "--out", str(tmp_path / "out")]) == 0
    assert "1 up to date" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_caller_leaves_no_kernel_on_a_worker(notebooks, tmp_path):
    mark = tmp_path / "mark"
    write_notebook(notebooks, "01_good", good("01_good") + ONCE_SLOW.format(mark=str(mark)))
    with processes(tmp_path, n_workers=1) as (address, _):
        runner = start(notebooks, *command(tmp_path, address))
        assert wait_for(mark.exists)
        runner.send_signal(signal.SIGINT)
        _, error = runner.communicate(timeout=300)
        assert runner.returncode == 130 and error.count("\n") == 1 and "interrupted" in error, error
        assert wait_for(lambda: not list((tmp_path / "tmp").glob("induction-heads-*")), 60)


@pytest.mark.slow
def test_a_worker_without_the_model_is_named_with_it(notebooks, tmp_path, capsys):
    with processes(tmp_path, n_workers=1, XDG_CACHE_HOME=str(tmp_path / "empty")) as (address, _):
        assert main(command(tmp_path, address, "--model", "smollm2-135m")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: worker tcp://127.0.0.1:") and error.count("\n") == 1
    assert "smollm2-135m must be converted once" in error and "tools convert" in error


@pytest.mark.slow
def test_a_worker_outside_of_a_clone_and_no_worker_at_all_are_refused(notebooks, tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    with processes(tmp_path, 1, tmp_path / "elsewhere") as (address, started):
        assert main(command(tmp_path, address)) == 2
        error = capsys.readouterr().err
        assert "No module named" in error and "in a clone of this commit" in error and error.count("\n") == 1
        started[1].kill()
        started[1].wait()
        monkeypatch.setattr(cluster, "SECONDS", 2)
        assert main(command(tmp_path, address)) == 2
    assert "0/1 workers" in capsys.readouterr().err


def test_a_scheduler_that_is_not_there_is_one_sentence(notebooks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "SECONDS", 1)
    for address in ("tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1:1"):
        assert main(command(tmp_path, address)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and address.partition(":")[0] in error and error.count("\n") == 1, error
    for option in ("--jobs", "--gpus"):
        with pytest.raises(SystemExit):
            main(command(tmp_path, "tcp://127.0.0.1:1", option, "2"))
        assert f"{option}: not allowed with argument --scheduler" in capsys.readouterr().err


def test_a_difference_between_machines_is_a_sentence():
    ours = {"torch": "2", "helpers": "a", "x": "1"}
    cluster.check_same("w", ours, ours)
    for name in ours:
        with pytest.raises(ValueError, match=f"worker w has {name} 3 and others have {ours[name]}; give all machines"):
            cluster.check_same("w", ours | {name: "3"}, ours)
