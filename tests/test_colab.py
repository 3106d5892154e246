"""The notebooks where nothing of this project is installed, and torch, numpy and the others are Colab's own."""

import asyncio
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from examination import PATHS
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from tools.kernels import read_notebook

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# Colab's on 2026-08-19 (github.com/googlecolab/backend-info, pip-freeze.txt), when it went over to Python 3.13.
# Not its torch, 2.11.0, which an index gives as a file of several gigabytes.
COLAB = {
    "accelerate": "1.14.0", "datasets": "4.0.0", "huggingface_hub": "1.27.0", "ipykernel": "6.17.1",
    "ipython": "7.34.0", "matplotlib": "3.10.0", "numpy": "2.1.3", "pandas": "2.2.3", "protobuf": "5.29.6",
    "pyarrow": "18.1.0", "scipy": "1.16.3", "seaborn": "0.13.2", "tokenizers": "0.22.2", "torch": "2.13.0",
    "transformers": "5.15.0", "wandb": "0.28.1",
}  # fmt: skip
AFTER = f"""
from importlib.metadata import version
from importlib.util import find_spec
assert find_spec("tools") is None
now = {{name: version(name).partition("+")[0] for name in {list(COLAB)}}}
replaced = {{name: number for name, number in now.items() if number != {COLAB}[name]}}
assert not replaced, replaced
"""


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """The Python of an environment that holds what Colab holds."""
    if sys.version_info >= (3, 14):
        pytest.skip("Colab's versions are older than this Python")
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pins = [f"{name}=={number}" for name, number in COLAB.items()]
    done = subprocess.run([python, "-m", "pip", "install", "-q", *pins], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return python


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository as a stranger would get it, without what lies about in this folder."""
    folder = tmp_path_factory.mktemp("repository") / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", ROOT.as_uri(), str(folder)], check=True)
    return folder


def run_on(python: Path, notebook, folder: Path):
    """Execute a notebook with a kernel of another Python, in a folder that holds nothing."""
    kernel = AsyncKernelManager()
    kernel.kernel_spec.argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    client = NotebookClient(notebook, km=kernel, timeout=600, resources={"metadata": {"path": str(folder)}})
    asyncio.run(client.async_execute(env=env))
    return notebook


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("path", PATHS[:5], ids=lambda path: path.stem)
def test_a_notebook_runs_on_colab_from_its_setup_cell_on(colab, clone, tmp_path, path):
    notebook = read_notebook(path)
    setup = notebook.cells[1]
    assert f"git+{ADDRESS}" in setup.source
    setup.source = setup.source.replace(f"git+{ADDRESS}", clone.as_uri())  # pip takes git+file:// by no name
    notebook.cells.append(new_code_cell(AFTER))  # nothing of Colab's was replaced
    run_on(colab, notebook, tmp_path)
    assert (tmp_path / "outputs/induction-2l" / path.stem / "summary.json").exists()


def test_every_notebook_has_the_same_first_lines():
    setups = {tuple(read_notebook(path).cells[1].source.splitlines()[:3]) for path in PATHS}
    assert len(setups) == 1
