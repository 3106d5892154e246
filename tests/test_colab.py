"""The setup cell where nothing of this project is installed, and torch, numpy and pandas are the place's own."""

import json
import os
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest
from examination import PATHS

from tools.run import find_notebooks, read_notebook

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
KEPT = ("torch", "numpy", "pandas")
# Not this project's own versions, so that a replaced one is seen.
COLAB = ["torch==2.13.0", "numpy==2.2.6", "pandas==2.3.3", "ipython", "ipykernel"]

BEFORE = """
import sys, json, importlib.util, numpy, pandas, torch
from importlib.metadata import version
kept = {name: version(name) for name in %r}
assert "helpers" not in sys.modules
"""
AFTER = """
after = {name: version(name) for name in kept}
assert after == kept == {"torch": torch.__version__, "numpy": numpy.__version__, "pandas": pandas.__version__}, after
from helpers import models, attention
from helpers.catalog import WEIGHTS_FOLDER
assert importlib.util.find_spec("tools") is None
score = attention.induction_samples(models.load(), seeds=(0,), batch=2).mean(0).max().item()
print("RESULT", json.dumps({"score": score, "logs": (WEIGHTS_FOLDER / "induction-2l/log.json").exists()}))
"""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The Python of an environment that holds what Colab holds."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", *COLAB], capture_output=True, text=True)
    if done.returncode and not os.environ.get("REQUIRE_ALL"):
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert not done.returncode, done.stderr
    return python


@pytest.mark.slow
def test_the_setup_cell_installs_from_nothing_and_leaves_the_large_packages_alone(scratch, tmp_path):
    setup = read_notebook(find_notebooks(["02"])[0]).cells[1].source
    assert f"git+{ADDRESS}" in setup
    # The repository as a stranger would get it, without what lies about in this folder.
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    script = "\n".join([BEFORE % (KEPT,), setup.replace(f"git+{ADDRESS}", clone.as_uri()), AFTER])
    (tmp_path / "notebook.ipy").write_text(script)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [scratch, "-m", "IPython", "notebook.ipy"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.split("RESULT")[1])
    assert found["score"] > 0.5 and found["logs"]


def test_every_notebook_has_the_same_first_lines():
    setups = {tuple(read_notebook(path).cells[1].source.splitlines()[:3]) for path in PATHS}
    assert len(setups) == 1
