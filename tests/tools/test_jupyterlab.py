"""Notebooks in a real JupyterLab: run whole by its menu, as a student does, and looked at in a browser."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from browsing import check_heads, induction_head
from wrong_answers import WRONG

from tools import run
from tools.editions import exercises, solution_edition, student_edition

pytestmark = [pytest.mark.slow, pytest.mark.ci]


@pytest.fixture
def lab(tmp_path):
    """lab(notebook) -> the address at which a JupyterLab shows it; the file is `lesson.ipynb`."""
    settings = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    env = os.environ | {key: str(tmp_path / value) for key, value in settings.items()}
    env["PYTHONPATH"] = str(run.ROOT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--ip=localhost", "--IdentityProvider.token="]
    options += ["--no-browser", "--allow-root"]
    command = [sys.executable, "-m", "jupyterlab", *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **quiet) as server:
        try:
            wait_for(port, server)

            def show(notebook) -> str:
                nbformat.write(notebook, tmp_path / "lesson.ipynb")
                return f"http://localhost:{port}/lab/tree/lesson.ipynb"

            yield show
        finally:
            server.terminate()


def wait_for(port: int, server, seconds: float = 60):
    for _ in range(int(seconds / 0.5)):
        assert server.poll() is None, "JupyterLab ended"
        with socket.socket() as attempt:
            if attempt.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"JupyterLab did not answer within {seconds} s")


def run_all(page, file: Path, seconds: float = 300) -> list[str]:
    """Choose "Run All Cells" from the menu; returns what stopped the run, from the file as it is saved meanwhile."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page.wait_for_timeout(2_000)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1_000)
        try:
            cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
        except nbformat.reader.NotJSONError:  # read while it was written
            continue
        errors = [o.evalue for cell in cells for o in cell.outputs if o.output_type == "error"]
        counts = [cell.execution_count for cell in cells]
        # Of a second run the counts go on where the first one's ended, so they rise from cell to cell only at its end.
        if errors or (None not in counts and counts == sorted(counts)):
            return errors
    pytest.fail(f"the notebook did not run to its end within {seconds} s")


def come_into_sight(page, what):
    """Scroll down until it is there: JupyterLab renders cells as they come into sight."""
    panel = page.locator(".jp-WindowedPanel-outer, .jp-Notebook").first
    panel.evaluate("panel => panel.scrollTo(0, 0)")
    for _ in range(150):
        if what.count():
            break
        panel.evaluate("panel => panel.scrollBy(0, 400)")
        page.wait_for_timeout(250)
    what.first.scroll_into_view_if_needed()
    page.wait_for_timeout(3_000)  # a view is filled after it was attached


def test_the_second_notebook_runs_whole_and_its_view_is_drawn(visit, lab, tmp_path):
    opened = visit(lab(run.read_notebook(run.find_notebooks(["02"])[0])), offline=False)
    opened.page.locator("h1").first.wait_for(timeout=60_000)
    assert not run_all(opened.page, tmp_path / "lesson.ipynb")
    view = opened.page.locator("[id^=circuits-vis]")
    come_into_sight(opened.page, view)
    check_heads(view, induction_head())
    # The badge's picture is the one thing that the notebook itself names on another machine.
    assert all(url.endswith("/colab-badge.svg") for url in opened.outside())


def test_a_student_is_refused_with_a_wrong_answer_and_passes_with_a_right_one(visit, lab, tmp_path):
    path = run.find_notebooks(["01"])[0]
    source, file = run.read_notebook(path), tmp_path / "lesson.ipynb"
    notebook, solutions = student_edition(source), solution_edition(source)
    name, wrong, word = WRONG[path.stem][0]
    at, check = exercises(source)[0]
    opened = visit(lab(notebook), offline=False)
    opened.page.locator("h1").first.wait_for(timeout=60_000)
    for answer, refused in ((wrong, True), (solutions.cells[at].source, False)):
        stub = opened.page.locator(".jp-CodeCell .cm-content", has_text=f"def {name}")
        come_into_sight(opened.page, stub)
        stub.first.click()
        opened.page.keyboard.press("Control+a")
        opened.page.keyboard.insert_text(answer.strip())
        errors = run_all(opened.page, file)
        assert [word in error for error in errors] == [True] * refused
    done = nbformat.read(file, as_version=4).cells[check].outputs
    assert "check passed" in "".join(output.get("text", "") for output in done)
    assert (tmp_path / "outputs/induction-2l" / path.stem / "summary.json").exists()
