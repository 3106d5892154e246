"""One notebook in a kernel of its own: its parameters, its cells in turn, and only what another run would repeat."""

import ast
import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from tools.captions import describe

ROOT = Path(__file__).resolve().parents[1]
# Else glibc gives the memory of large activations back and fetches it anew, block after block: up to a quarter of the
# seconds of a sweep. The second is the most that it takes.
MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**28), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


@dataclass(frozen=True)
class Outcome:
    """How a notebook ended: with an error, with the reason why it does not apply to its model, or with neither."""

    error: str = ""
    not_applicable: str = ""
    warnings: str = ""
    executed: str = ""  # the notebook with its outputs, as the text of a file


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


def declared_parameters(notebook: NotebookNode) -> dict[str, tuple]:
    """Name -> (default, comment) of what the cell tagged `parameters` sets.

    Raises:
        ValueError: there is no such cell.
    """
    source = notebook.cells[parameters_cell(notebook)].source
    lines = source.splitlines()
    return {
        statement.targets[0].id: (ast.literal_eval(statement.value), lines[statement.lineno - 1].partition("  # ")[2])
        for statement in ast.parse(source).body
    }


def n_code_cells(notebook: NotebookNode) -> int:
    """How many cells are executed, with the one that sets the parameters."""
    return 1 + sum(cell.cell_type == "code" for cell in notebook.cells)


def with_parameters(notebook: NotebookNode, parameters: dict) -> NotebookNode:
    """The notebook with a cell that sets the parameters, after the one that declares them."""
    notebook.metadata.pop("widgets", None)  # with which GitHub does not render a notebook
    source = "\n".join(["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())])
    cell = nbformat.v4.new_code_cell(source, id="injected", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(parameters_cell(notebook) + 1, cell)
    return notebook


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kernel_environment(n_parallel: int = 1) -> dict[str, str]:
    """The environment of a kernel: this one, with its share of the cores and this clone's helpers."""
    environment = MEMORY | os.environ
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["TQDM_DISABLE"] = "1"  # every step of a bar would be kept as output
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm again, wherever it is imported
    if n_parallel > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, n_cores() // n_parallel))
    return environment


async def execute(
    text: str, parameters: dict, folder: Path, environment: dict[str, str], on_cell: Callable[[int], object]
) -> Outcome:
    """Execute the text of a notebook with `folder` as its working folder, where its cells leave what they make.

    `on_cell` is told how many cells are done, after each. Here or on another machine: it is the same function.

    Raises:
        DeadKernelError: the kernel died.
    """
    notebook = with_parameters(nbformat.reads(text, as_version=4), parameters)
    failure = await _run_cells(notebook, folder, environment, on_cell)
    if failure is None:
        warnings = tidy(notebook)
        return Outcome(warnings=warnings, executed=nbformat.writes(describe(notebook)) + "\n")
    number, name, message = failure
    if name in ("NotApplicable", "NoGap"):  # of helpers.results, and of helpers.metrics where a model lacks the skill
        return Outcome(not_applicable=message)
    return Outcome(error=f"cell {number}: {name}: {message}", executed=nbformat.writes(describe(notebook)) + "\n")


async def _run_cells(
    notebook: NotebookNode, folder: Path, environment: dict[str, str], on_cell: Callable[[int], object]
) -> tuple[int, str, str] | None:
    """Run every cell; returns number, name and message of the first error. Whatever happens, no kernel is left."""
    kernel = AsyncKernelManager(kernel_name=notebook.metadata.get("kernelspec", {}).get("name", "python3"))
    client = NotebookClient(notebook, km=kernel, record_timing=False)
    try:
        # ipykernel warns of its own transport at every start.
        await kernel.start_kernel(cwd=str(folder), env=environment, extra_arguments=["--log-level=ERROR"])
        await client.async_start_new_kernel_client()
        for index, cell in enumerate(notebook.cells):
            await client.async_execute_cell(cell, index, execution_count=client.code_cells_executed + 1)
            if cell.cell_type == "code":
                on_cell(client.code_cells_executed)
    except CellExecutionError as failure:
        return client.code_cells_executed, failure.ename, failure.evalue
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
