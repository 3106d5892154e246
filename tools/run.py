"""Execute the notebooks, each in a kernel of its own, and keep what they made."""

import argparse
import ast
import asyncio
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nbformat
from filelock import FileLock, Timeout
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

from helpers.catalog import DEFAULT_MODEL, resolve, slug
from helpers.results import write_text
from tools.report import write_report

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
# The runner sets these itself.
OWN_PARAMETERS = ("model_name", "output_dir")
# What the comment of a parameter may say of its values, as in `# prompts, at least 2`.
RANGES = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}


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
    for model in arguments.model if find_spec("tools.convert") else []:
        from tools.convert import ensure

        ensure(model)
    notebooks = find_notebooks(arguments.notebooks)
    jobs = plan(arguments.model, notebooks, arguments.out, dict(arguments.parameters), arguments.small)
    for model in dict.fromkeys(job.model for job in jobs):
        try_loading(model)
    errors = run(jobs, arguments.jobs)
    for label, error in errors.items():
        print(f"{label} failed at {error}", file=sys.stderr)
    done = [job for job in jobs if job.label not in errors]
    pages = ", ".join(dict.fromkeys(str(arguments.out / job.folder.name / "report.md") for job in done))
    print(f"{len(done)} of {len(jobs)} notebooks done" + (f"; see {pages}" if done else ""))
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
        return self.out / slug(self.model)

    @property
    def label(self) -> str:
        return f"{self.notebook.stem} on {slug(self.model)}"


def find_notebooks(wanted: list[str] | None = None, folder: Path | None = None) -> list[Path]:
    """Notebooks by number or by name, each once; all of them, in order, by default.

    Raises:
        ValueError: a number or name matches no notebook, or there are none.
    """
    folder = folder or NOTEBOOKS
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
    """A notebook of format 4.

    Raises:
        ValueError: the file is none.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, KeyError, AttributeError, nbformat.ValidationError) as error:
        raise ValueError(f"{path} is damaged or no notebook; restore it, or make it anew ({error})") from None


def parameters_cell(notebook: NotebookNode) -> int:
    """The index of the cell tagged `parameters`.

    Raises:
        ValueError: there is none.
    """
    for index, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", []):
            return index
    raise ValueError("a notebook has no cell tagged 'parameters'; tag the one that sets model_name and the sizes")


def check_parameters(path: Path, values: dict[str, str]) -> dict:
    """The values as the types of the notebook's own parameters, within the ranges that it declares.

    Raises:
        ValueError: the notebook has no such parameter, or the value is not of its type or range.
    """
    notebook = read_notebook(path)
    source = notebook.cells[parameters_cell(notebook)].source
    known = {statement.targets[0].id: statement for statement in ast.parse(source).body}
    settable = [name for name in known if name not in OWN_PARAMETERS]
    checked = {}
    for name, text in values.items():
        if name not in settable:
            raise ValueError(f"{path.stem} has no parameter {name!r} to set; it has {', '.join(settable)}")
        checked[name] = _as_type_of(ast.literal_eval(known[name].value), text, name)
        _check_range(checked[name], source.splitlines()[known[name].lineno - 1].partition("  # ")[2], name)
    return checked


def _as_type_of(default, text: str, name: str):
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"parameter {name} is of type {type(default).__name__} (default {default}), not {text!r}")
    return value


def _check_range(value, comment: str, name: str) -> None:
    for words, bound in re.findall(rf"\b({'|'.join(RANGES)}) (-?\d+(?:\.\d+)?)", comment):
        if not RANGES[words](value, float(bound)):
            raise ValueError(f"parameter {name} ({comment}) must be {words} {bound}, not {value}")


def plan(
    models: list[str], notebooks: list[Path], out: Path, parameters: dict[str, str], small: bool = False
) -> list[Job]:
    """Every notebook on every model, each once, checked before anything runs.

    With `small`, sizes are those of `notebooks/small.json`, for models that are large for a CPU.
    """
    sizes = json.loads((NOTEBOOKS / "small.json").read_text()) if small else {}
    checked = {path: sizes.get(path.stem, {}) | check_parameters(path, parameters) for path in notebooks}
    jobs = []
    for model in models:
        is_path = resolve(model).kind in ("folder", "nanogpt")
        name = str(Path(model).expanduser().resolve()) if is_path else model
        jobs += [Job(path, name, checked[path], out.resolve()) for path in notebooks]
    return list({(job.notebook, job.folder): job for job in jobs}.values())


def try_loading(model: str) -> None:
    """Load a model that is not shipped, in a process of its own, before the notebooks start.

    Raises:
        ValueError: it cannot be loaded, with the loader's reason.
    """
    if resolve(model).kind == "embedded":
        return
    code = "import sys; from helpers.models import load; load(sys.argv[1])"
    command = [sys.executable, "-c", code, model]
    ended = subprocess.run(command, env=kernel_environment(), capture_output=True, text=True)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or [f"its loading ended with exit code {ended.returncode}"])[-1]
        raise ValueError(re.sub(r"^[\w.]+: ", "", reason))


# ---- run ----


def run(jobs: list[Job], n_parallel: int = 1) -> dict[str, str]:
    """Execute all jobs; returns label -> error of those that failed.

    A notebook works in a staging folder beside the outputs. What it made is moved into place
    when it has finished, so an interrupted or failed run leaves the earlier results alone.

    Raises:
        ValueError: the folder for the outputs cannot be written, or another run is writing there.
        KeyboardInterrupt: interrupted or told to end, with what is done by then.
    """
    errors: dict[str, str | None] = {}
    with claimed(jobs[0].out, {job.folder for job in jobs}) as staging:
        try:
            asyncio.run(_run_all(jobs, n_parallel, staging, errors))
        except asyncio.CancelledError:
            done = sum(error is None for error in errors.values())
            text = f"interrupted after {done} of {len(jobs)} notebooks; the earlier results of the others are untouched"
            raise KeyboardInterrupt(text) from None
        finally:
            for folder in {job.folder for job in jobs if job.label in errors}:
                try:
                    write_report(folder)
                except OSError as error:
                    errors[f"the report of {folder.name}"] = f"{type(error).__name__}: {error}"
    return {label: error for label, error in errors.items() if error}


@contextmanager
def claimed(out: Path, folders: set[Path]) -> Iterator[Path]:
    """The outputs for one run alone: gives a staging folder in it, after clearing what killed runs left."""
    lock = FileLock(out / ".lock", blocking=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        for left in out.glob(".staging-*"):
            for old in left.glob("replaced/*/*"):  # a run was killed between two renames
                if not (out / old.relative_to(left / "replaced")).exists():
                    old.rename(out / old.relative_to(left / "replaced"))
            shutil.rmtree(left, ignore_errors=True)
        for folder in filter(Path.exists, folders):
            tempfile.TemporaryFile(dir=folder).close()
        staging = tempfile.TemporaryDirectory(dir=out, prefix=".staging-", ignore_cleanup_errors=True)
    except Timeout:
        raise ValueError(f"another run is writing into {out}; let it end, or name another folder with --out") from None
    except OSError as error:
        lock.release()
        place = error.filename or out
        raise ValueError(f"cannot write into {place} ({error.strerror}); name another folder with --out") from None
    with staging as folder:
        try:
            yield Path(folder)
        finally:
            lock.release()


async def _run_all(jobs: list[Job], n_parallel: int, staging: Path, errors: dict[str, str | None]) -> None:
    _end_on_signals(asyncio.get_running_loop(), asyncio.current_task())
    places = asyncio.Semaphore(n_parallel)
    environment = kernel_environment(n_parallel)
    n_cells = sum(len(read_notebook(job.notebook).cells) + 1 for job in jobs)
    with tqdm(total=n_cells, unit="cell", disable=None) as bar:

        async def in_turn(job: Job) -> None:
            async with places:
                errors[job.label] = await _run_job(job, staging, environment, bar)

        await asyncio.gather(*map(in_turn, jobs))


def _end_on_signals(loop: asyncio.AbstractEventLoop, task: asyncio.Task) -> None:
    """Cancel the task at the first interrupt or order to end; later ones must not disturb what ends the kernels."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def end():
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        task.cancel()

    for number in signals:
        with suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, end)


def kernel_environment(n_parallel: int = 1) -> dict[str, str]:
    """The environment of a kernel: this one, with its share of the cores and this clone's helpers."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["TQDM_DISABLE"] = "1"  # every step of a bar would be kept as output
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm again, wherever it is imported
    if n_parallel > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_parallel))
    return environment


async def _run_job(job: Job, staging: Path, environment: dict[str, str], bar: tqdm) -> str | None:
    error = None
    try:
        workplace = Path(tempfile.mkdtemp(dir=staging))
        notebook = with_parameters(read_notebook(job.notebook), {"model_name": job.model} | job.parameters)
        error = await _execute(notebook, workplace, environment, bar)
        if not error and (warnings := tidy(notebook)):
            bar.write(f"{job.label} warned: {warnings}", file=sys.stderr)
        _keep(job, notebook, workplace, staging, error)
    except Exception as failure:  # no kernel, a dead one, a full disk: the other notebooks still run
        error = error or f"{type(failure).__name__}: {failure}"
    bar.write(f"{'FAILED' if error else 'done'}  {job.label}" + (f"\n        {error}" if error else ""))
    sys.stdout.flush()
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


def tidy(notebook: NotebookNode) -> str:
    """Take from the stored outputs what another run would have otherwise; returns the warnings among it."""
    warnings, views = [], {}

    def steady(text: str) -> str:
        text = re.sub(r" at 0x[0-9a-f]{6,}>", ">", text)
        # CircuitsVis gives every view an id of its own at random.
        name = r"circuits-vis-[0-9a-f]+-[0-9a-f-]+"
        return re.sub(name, lambda match: views.setdefault(match[0], f"circuits-vis-{len(views) + 1}"), text)

    for cell in filter(lambda cell: cell.cell_type == "code", notebook.cells):
        warnings += [output.text for output in cell.outputs if output.get("name") == "stderr"]
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for data in (output.get("data", {}) for output in cell.outputs):
            data |= {kind: steady(data[kind]) for kind in ("text/plain", "text/html") if kind in data}
    return "".join(warnings).strip()


def _keep(job: Job, notebook: NotebookNode, workplace: Path, staging: Path, error: str | None) -> None:
    """Move what a job made into place; of a failed one only the notebook, under another name."""
    failed, target = job.folder / f"{job.notebook.stem}.failed.ipynb", job.folder / job.notebook.stem
    # Where space may be wanting, before anything is replaced.
    executed = write_text(workplace / job.notebook.name, nbformat.writes(notebook) + "\n")
    job.folder.mkdir(exist_ok=True)
    if error:
        executed.replace(failed)
        return
    for made in workplace.glob(f"outputs/*/{job.notebook.stem}"):
        if target.exists():
            old = staging / "replaced" / job.folder.name / job.notebook.stem
            old.parent.mkdir(parents=True, exist_ok=True)
            target.rename(old)
        made.rename(target)
    executed.replace(job.folder / job.notebook.name)
    failed.unlink(missing_ok=True)
