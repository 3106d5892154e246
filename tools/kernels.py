"""One notebook in a kernel of its own: its parameters, its cells in turn, and only what another run would repeat."""

import ast
import asyncio
import io
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
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
    seconds: float = 0.0
    executed: str = ""  # the notebook with its outputs, as the text of a file
    files: bytes = b""  # what its cells left in their working folder, as a zip file


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


def execute(
    notebook: NotebookNode, parameters: dict, environment: dict[str, str], wanted: Callable[[int], bool],
    place: Path | None = None,
) -> Outcome:  # fmt: skip
    """Execute a notebook in a kernel whose working folder is a new one in `place`, for as long as it is wanted.

    `wanted` is asked twice a second, with the number of code cells done.

    Raises:
        DeadKernelError: the kernel died, or was ended because it is no longer wanted.
    """
    began, metadata = time.monotonic(), dict(notebook.metadata)
    lines = ["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())]
    cell = nbformat.v4.new_code_cell("\n".join(lines), id="injected", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(parameters_cell(notebook) + 1, cell)
    # ipykernel warns of its own transport at every start.
    options = {"record_timing": False, "shutdown_kernel": "immediate", "extra_arguments": ["--log-level=ERROR"]}
    client = NotebookClient(notebook, **options)
    with tempfile.TemporaryDirectory(prefix="induction-heads-", dir=place, ignore_cleanup_errors=True) as folder:
        try:
            asyncio.run(_run_cells(client, wanted, cwd=folder, env=environment))
        except CellExecutionError as failure:
            if failure.ename in ("NotApplicable", "NoGap"):  # of helpers.results and helpers.metrics
                return Outcome(not_applicable=failure.evalue)
            error = f"cell {client.code_cells_executed}: {failure.ename}: {failure.evalue}"
            return Outcome(error=error, executed=nbformat.writes(notebook) + "\n")
        files = io.BytesIO()
        with zipfile.ZipFile(files, "w") as archive:
            for path in Path(folder).rglob("*"):
                archive.write(path, path.relative_to(folder))
    notebook.metadata = metadata  # without the state of widgets, with which GitHub does not render a notebook
    executed, warnings = tidy(describe(notebook))
    return Outcome("", "", warnings, time.monotonic() - began, executed, files.getvalue())


async def _run_cells(client: NotebookClient, wanted: Callable[[int], bool], **start) -> None:
    """Run every cell; whatever happens, no kernel is left."""
    kernel = client.create_kernel_manager()
    cells = asyncio.create_task(client.async_execute(**start))
    try:
        while not cells.done() and wanted(client.code_cells_executed):
            await asyncio.wait({cells}, timeout=0.5)
        cells.cancel()  # no effect on what is done
        await cells
    finally:
        if kernel.has_kernel:  # it was just being started
            await kernel.shutdown_kernel(now=True)


def tidy(notebook: NotebookNode) -> tuple[str, str]:
    """The file of an executed notebook without what another run would have otherwise, and the warnings among it."""
    warnings, views = [], {}
    for outputs in (cell.outputs for cell in notebook.cells if cell.cell_type == "code"):
        warnings += [output.text for output in outputs if output.get("name") == "stderr"]
        outputs[:] = [output for output in outputs if output.get("name") != "stderr"]
    text = re.sub(r" at 0x[0-9a-f]{6,}>", ">", nbformat.writes(notebook) + "\n")
    # CircuitsVis gives every view an id of its own at random.
    name = r"circuits-vis-[0-9a-f]+-[0-9a-f-]+"
    text = re.sub(name, lambda match: views.setdefault(match[0], f"circuits-vis-{len(views) + 1}"), text)
    return text, "".join(warnings).strip()
