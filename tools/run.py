"""Run the notebooks, keep their outputs, and gather them into one report per model."""

import ast
import json
import os
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import pandas as pd

from helpers.catalog import resolve
from helpers.results import as_text, markdown_table, read_summaries, write_text

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


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
    """Notebooks by number or by name, in order; all of them by default.

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
    return chosen


def check_parameters(notebook: Path, values: dict[str, str]) -> dict:
    """The values as the types of the notebook's own parameters; papermill itself would only warn.

    Raises:
        ValueError: the notebook has no such parameter, or the value is not of its type.
    """
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    checked = {}
    for name, text in values.items():
        if name not in known or name in ("model_name", "output_dir"):
            settable = [k for k in known if k not in ("model_name", "output_dir")]
            raise ValueError(f"{notebook.stem} has no parameter {name!r} to set; it has {', '.join(settable)}")
        checked[name] = _as_type_of(ast.literal_eval(known[name]["default"]), text, name)
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
    jobs = []
    for model in models:
        is_path = resolve(model).kind in ("folder", "nanogpt")
        name = str(Path(model).expanduser().resolve()) if is_path else model
        for path in notebooks:
            checked = sizes.get(path.stem, {}) | check_parameters(path, parameters)
            jobs.append(Job(path, name, checked, out.resolve()))
    return jobs


def run(jobs: list[Job], n_parallel: int = 1) -> dict[str, str]:
    """Execute all jobs; returns label -> error of those that failed.

    A notebook works in a staging folder beside the outputs. What it made is moved into place
    when it has finished, so an interrupted or failed run leaves the earlier results alone.
    """
    staging = jobs[0].out / f".staging-{os.getpid()}"
    if n_parallel > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_parallel))
    try:
        # Processes, because papermill changes the working folder of the whole process.
        spawn = get_context("spawn")
        with ProcessPoolExecutor(n_parallel, mp_context=spawn, initializer=_end_with_parent) as pool:
            errors = list(pool.map(_run_job, jobs, [staging] * len(jobs)))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for model_folder in {job.folder for job in jobs}:
        write_report(model_folder)
    return {job.label: error for job, error in zip(jobs, errors) if error}


def _end_with_parent() -> None:
    """A killed run would otherwise leave its notebooks running; their kernels end with this process."""

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_job(job: Job, staging: Path) -> str | None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # For the kernels, whose every step of a bar would be kept as output; papermill's own bar was imported before.
    os.environ["TQDM_DISABLE"] = "1"
    workplace = staging / f"{job.notebook.stem}-on-{Path(job.model).name}"
    workplace.mkdir(parents=True)
    executed = workplace / f"{job.notebook.stem}.ipynb"
    error = None
    try:
        papermill.execute_notebook(
            str(job.notebook),
            str(executed),
            parameters={"model_name": job.model} | job.parameters,
            cwd=str(workplace),
            progress_bar={"desc": job.label, "disable": None if sys.stderr.isatty() else True},
            log_output=False,
            extra_arguments=["--log-level=ERROR"],  # ipykernel warns of its own transport at every start
        )
    except PapermillExecutionError as failure:
        error = f"cell {failure.exec_count or failure.cell_index}: {failure.ename}: {failure.evalue}"
    except Exception as failure:  # a dead kernel, no kernel, a full disk: the other notebooks still run
        error = f"{type(failure).__name__}: {failure}"
    _keep(job, workplace, executed, error)
    print(f"{'FAILED' if error else 'done'}  {job.label}" + (f"\n        {error}" if error else ""), flush=True)
    return error


def _keep(job: Job, workplace: Path, executed: Path, error: str | None) -> None:
    """Move what a job made into place; of a failed one only the notebook, under another name."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if executed.exists():
        clean_metadata(executed)
        suffix = ".failed.ipynb" if error else ".ipynb"
        executed.replace(job.folder / (job.notebook.stem + suffix))
    made = workplace / "outputs" / Path(job.model).name / job.notebook.stem
    if error or not made.exists():
        return
    (job.folder / f"{job.notebook.stem}.failed.ipynb").unlink(missing_ok=True)
    target, old = job.folder / job.notebook.stem, workplace / "replaced"
    if target.exists():
        target.rename(old)
    made.rename(target)


def clean_metadata(notebook: Path) -> None:
    """Drop this machine's paths, and widget state, with which GitHub does not render a notebook."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    for key in ("widgets", "papermill"):
        content.metadata.pop(key, None)
    for cell in content.cells:
        cell.metadata.pop("papermill", None)
    write_text(notebook, nbformat.writes(content) + "\n")


# ---- report ----


def write_report(model_folder: Path) -> Path | None:
    """Gather the summaries of one model's notebooks into `report.md`, with tables and figures."""
    summaries = list(read_summaries(model_folder).values())
    if not summaries:
        return None
    lines = [f"# {model_folder.name}: what the series found", ""]
    lines += ["Every number below is read from the `summary.json` and the tables beside it.", ""]
    lines += ["| notebook | seconds |", "|---|---|"]
    lines += [f"| [{s['notebook']}]({s['notebook']}.ipynb) | {s['wall_time_s']} |" for s in summaries]
    for summary in summaries:
        lines += _report_section(summary, model_folder / summary["notebook"])
    versions = ", ".join(f"{name} {number}" for name, number in summaries[-1]["versions"].items())
    return write_text(model_folder / "report.md", "\n".join([*lines, "", f"Made with {versions}.", ""]))


def _report_section(summary: dict, folder: Path) -> list[str]:
    name = summary["notebook"]
    lines = ["", f"## {name}", "", "| result | value |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {as_text(value)} |" for key, value in summary["results"].items()]
    for table in summary["tables"]:
        rows = pd.read_csv(folder / f"{table}.csv").head(10)
        lines += ["", f"{table.replace('_', ' ')}", "", *markdown_table(rows)]
    for figure in sorted((folder / "figures").glob("*.png")):
        lines += ["", f"![{figure.stem}]({name}/figures/{figure.name})"]
    return lines
