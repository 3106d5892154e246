"""Notebooks of a title and two cells, with which the runner is tried."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys; from pathlib import Path; from tools import run; from tools.__main__ import main
run.NOTEBOOKS = Path(sys.argv[1]); sys.exit(main(sys.argv[2:]))
"""

PARAMETERS = """model_name = "induction-2l"  # model
size = 3  # size, at least 1, at most 50
rate = 0.5  # rate, above 0
flag = True  # a choice
output_dir = "outputs"  # where outputs go"""

GOOD = """
from pathlib import Path
import json
folder = Path(output_dir) / model_name / "{name}"
(folder / "figures").mkdir(parents=True)
(folder / "table.csv").write_text("head,loss_nats\\nL0H1,0.5\\n")
summary = {{"notebook": "{name}", "wall_time_s": 1.0, "versions": {{"torch": "x"}}, "tables": ["table"],
           "results": {{"size": size, "score": {{"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}}}}}}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def good(name: str) -> str:
    return GOOD.format(name=name)


def sleeping(name: str) -> str:
    """Says that it has started, beside the staging folder, and then takes a minute."""
    return good(name) + f"import time\nPath('../../{name}.started').touch()\ntime.sleep(60)"


def write_notebook(folder: Path, name: str, code: str, parameters: str | None = PARAMETERS) -> Path:
    folder.mkdir(exist_ok=True)
    cells = [new_markdown_cell("# A title"), new_code_cell(code)]
    if parameters:
        cells.insert(1, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder; not its lock, nor what is only staged."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.relative_to(folder).parts[0][0] == "."]
    return {path: path.read_bytes() for path in files}


def relative(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path within, for two folders to be compared."""
    return {path.relative_to(folder).as_posix(): content for path, content in contents(folder).items()}


def at_work_in(folder: Path) -> list[str]:
    """Processes whose working folder lies in `folder`, where the system tells."""
    places = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            places.append(os.readlink(link).removesuffix(" (deleted)"))
    return [place for place in places if Path(place).is_relative_to(folder)]


def start(notebooks: Path, *typed: str) -> subprocess.Popen:
    """The command line in a process of its own, with other notebooks in place of the series."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(notebooks), *typed], cwd=ROOT, **pipes)


def wait_for(condition, seconds: float = 300) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())
