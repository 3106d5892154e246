"""Execute the notebooks, each in a kernel of its own, and keep what they made."""

import argparse
import ast
import asyncio
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

from helpers.catalog import DEFAULT_MODEL, resolve
from helpers.results import write_text
from tools.report import write_report

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
# The runner sets these itself.
OWN_PARAMETERS = ("model_name", "output_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME", help="names, folders or hub ids")
    parser.add_argument("--notebooks", nargs="+", metavar="NN", help="numbers or names; all by default")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--small", action="store_true", help="smaller batches, for models that are large for a CPU")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time")
    parser.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebooks; may be repeated",
    )  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    if arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {arguments.jobs}")
    notebooks = find_notebooks(arguments.notebooks)
    for model in arguments.model if find_spec("tools.convert") else []:
        from tools.convert import ensure

        ensure(model)
    jobs = plan(arguments.model, notebooks, arguments.out, dict(arguments.parameters), arguments.small)
    errors = run(jobs, arguments.jobs)
    for label, error in errors.items():
        print(f"{label} failed at {error}", file=sys.stderr)
    print(f"{len(jobs) - len(errors)} of {len(jobs)} notebooks done; see {arguments.out}/<model>/report.md")
    return 1 if errors else 0


# ---- plan ----


@dataclass(frozen=True)
class Job:
    """One notebook on one model."""

    notebook: Path
    model: str
    parameters: dict
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / Path(self.model).name

    @property
    def label(self) -> str:
        return f"{self.notebook.stem} on {Path(self.model).name}"


def find_notebooks(wanted: list[str] | None = None, folder: Path = NOTEBOOKS) -> list[Path]:
    """Notebooks by number or by name, each once; all of them, in order, by default.

    Raises:
        ValueError: a number or name matches no notebook, or there are none.
    """
    present = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not present:
        raise ValueError(f"no notebooks in {folder}; run from a clone of the repository")
    chosen = []
    for name in wanted or [path.stem for path in present]:
        matches = [path for path in present if path.stem == name or path.stem.split("_")[0] == name.zfill(2)]
        if not matches:
            raise ValueError(f"no notebook {name!r}; there are {', '.join(path.stem for path in present)}")
        chosen += matches
    return list(dict.fromkeys(chosen))


def read_notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def parameters_cell(notebook: NotebookNode) -> int:
    """The index of the cell tagged `parameters`."""
    return next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))


def check_parameters(path: Path, values: dict[str, str]) -> dict:
    """The values as the types of the notebook's own parameters.

    Raises:
        ValueError: the notebook has no such parameter, or the value is not of its type.
    """
    notebook = read_notebook(path)
    statements = ast.parse(notebook.cells[parameters_cell(notebook)].source).body
    known = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}
    settable = {name: default for name, default in known.items() if name not in OWN_PARAMETERS}
    for name in values.keys() - settable.keys():
        raise ValueError(f"{path.stem} has no parameter {name!r} to set; it has {', '.join(settable)}")
    return {name: _as_type_of(settable[name], text, name) for name, text in values.items()}


def _as_type_of(default, text: str, name: str):
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"parameter {name} is of type {type(default).__name__} (default {default}), not {text!r}")
    return value


def plan(
    models: list[str], notebooks: list[Path], out: Path, parameters: dict[str, str], small: bool = False
) -> list[Job]:
    """Every notebook on every model, checked before anything runs.

    With `small`, sizes are those of `notebooks/small.json`, for models that are large for a CPU.
    """
    sizes = json.loads((NOTEBOOKS / "small.json").read_text()) if small else {}
    checked = {path: sizes.get(path.stem, {}) | check_parameters(path, parameters) for path in notebooks}
    jobs = []
    for model in models:
        is_path = resolve(model).kind in ("folder", "nanogpt")
        name = str(Path(model).expanduser().resolve()) if is_path else model
        jobs += [Job(path, name, checked[path], out.resolve()) for path in notebooks]
    return jobs


# ---- run ----


def run(jobs: list[Job], n_parallel: int = 1) -> dict[str, str]:
    """Execute all jobs; returns label -> error of those that failed.

    A notebook works in a staging folder beside the outputs. What it made is moved into place
    when it has finished, so an interrupted or failed run leaves the earlier results alone.
    """
    out = jobs[0].out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".staging-", ignore_cleanup_errors=True) as staging:
        errors = asyncio.run(_run_all(jobs, n_parallel, Path(staging)))
    for model_folder in {job.folder for job in jobs}:
        write_report(model_folder)
    return {job.label: error for job, error in zip(jobs, errors) if error}


async def _run_all(jobs: list[Job], n_parallel: int, staging: Path) -> list[str | None]:
    places = asyncio.Semaphore(n_parallel)
    n_cells = sum(len(read_notebook(job.notebook).cells) for job in jobs)
    environment = kernel_environment(n_parallel)
    with tqdm(total=n_cells, unit="cell", disable=None) as bar:

        async def in_turn(job: Job) -> str | None:
            async with places:
                return await _run_job(job, staging, environment, bar)

        return await asyncio.gather(*map(in_turn, jobs))


def kernel_environment(n_parallel: int = 1) -> dict[str, str]:
    """The environment of a kernel: this one, with its share of the cores and this clone's helpers."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["TQDM_DISABLE"] = "1"  # every step of a bar would be kept as output
    if n_parallel > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_parallel))
    return environment


async def _run_job(job: Job, staging: Path, environment: dict[str, str], bar: tqdm) -> str | None:
    workplace = Path(tempfile.mkdtemp(dir=staging))
    notebook = with_parameters(read_notebook(job.notebook), {"model_name": job.model} | job.parameters)
    try:
        error = await _execute(notebook, workplace, environment, bar)
        _keep(job, notebook, workplace, error)
    except Exception as failure:  # no kernel, a dead one, a full disk: the other notebooks still run
        error = f"{type(failure).__name__}: {failure}"
    bar.write(f"{'FAILED' if error else 'done'}  {job.label}" + (f"\n        {error}" if error else ""))
    return error


def with_parameters(notebook: NotebookNode, parameters: dict) -> NotebookNode:
    """The notebook with a cell that sets the parameters, after the one that declares them."""
    notebook.metadata.pop("widgets", None)  # with which GitHub does not render a notebook
    source = "\n".join(["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())])
    cell = nbformat.v4.new_code_cell(source, id="injected", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(parameters_cell(notebook) + 1, cell)
    return notebook


async def _execute(notebook: NotebookNode, folder: Path, environment: dict[str, str], bar: tqdm) -> str | None:
    """Run every cell; returns the first error of a cell. Whatever happens, no kernel is left."""
    kernel = AsyncKernelManager(kernel_name=notebook.metadata.get("kernelspec", {}).get("name", "python3"))
    client = NotebookClient(notebook, km=kernel, record_timing=False)
    try:
        # ipykernel warns of its own transport at every start.
        await kernel.start_kernel(cwd=str(folder), env=environment, extra_arguments=["--log-level=ERROR"])
        await client.async_start_new_kernel_client()
        for index, cell in enumerate(notebook.cells):
            await client.async_execute_cell(cell, index, execution_count=client.code_cells_executed + 1)
            bar.update()
    except CellExecutionError as failure:
        return f"cell {client.code_cells_executed}: {failure.ename}: {failure.evalue}"
    except DeadKernelError:
        if asyncio.current_task().cancelling():  # nbclient takes an interrupt for a dead kernel
            raise asyncio.CancelledError from None
        raise
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
        if kernel.has_kernel:
            await kernel.shutdown_kernel(now=True)


def _keep(job: Job, notebook: NotebookNode, workplace: Path, error: str | None) -> None:
    """Move what a job made into place; of a failed one only the notebook, under another name."""
    failed = job.folder / f"{job.notebook.stem}.failed.ipynb"
    write_text(failed if error else job.folder / job.notebook.name, nbformat.writes(notebook) + "\n")
    made = workplace / "outputs" / Path(job.model).name / job.notebook.stem
    if error or not made.exists():
        return
    failed.unlink(missing_ok=True)
    target = job.folder / job.notebook.stem
    if target.exists():
        target.rename(workplace / "replaced")
    made.rename(target)
