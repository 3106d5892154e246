"""Every notebook with its model on a device whose tensors the CPU cannot read: a GPU's faults, found without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.run import find_notebooks

TESTS = Path(__file__).resolve().parent
SMALLER = {
    "07": ["n_texts=24", "n_chosen=20", "n_pairings=1", "length=120", "n_corpus=60"],
    "09": ["n_texts=20", "n_models=5", "live_steps=60"],
}


def python(*arguments, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_a_notebook_runs_on_a_device_apart(path, tmp_path):
    smaller = SMALLER.get(path.stem[:2], [])
    done = python(TESTS / "pretend_gpu.py", path, tmp_path, *smaller, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "used: pretend" in done.stdout


TRIED = """
import numpy, torch, pretend_gpu
pretend_gpu.Device().__enter__()
x = torch.ones(3).to("pretend")
assert (x * 2 + x[torch.tensor([0, 2])].sum()).cpu().numpy().tolist() == [4.0, 4.0, 4.0]
weight = torch.nn.Parameter(x.clone())
(weight * x).sum().backward()
torch.optim.AdamW([weight]).step()
assert weight.grad.device.type == "pretend" and f"{x.sum():.1f}" == "3.0"
faults = {
    "mixed": lambda: x + torch.ones(3),
    "numpy": lambda: x.numpy(),
    "array": lambda: numpy.asarray(x),
    "index": lambda: torch.ones(3)[torch.arange(2, device="pretend")],
    "put": lambda: x.__setitem__(torch.tensor([0, 1]), torch.ones(2)),
    "generator": lambda: torch.randn(3, device="pretend", generator=torch.Generator()),
}
for name, fault in faults.items():
    try:
        fault()
    except (RuntimeError, TypeError):
        print(name)
"""


@pytest.mark.slow
def test_the_device_refuses_what_a_gpu_refuses(tmp_path):
    done = python("-c", TRIED, folder=tmp_path)
    assert done.stdout.split() == ["mixed", "numpy", "array", "index", "put", "generator"], done.stderr[-2000:]
