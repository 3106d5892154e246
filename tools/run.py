"""Execute the notebooks, each in a kernel of its own, several at a time, and keep what they made."""

import argparse
import ast
import io
import json
import math
import operator
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import psutil
from filelock import FileLock, Timeout
from nbformat import NotebookNode
from tqdm import tqdm

from helpers.catalog import DEFAULT_MODEL, checkpoints, resolve, slug
from helpers.results import write_text
from tools.cluster import workers
from tools.convert import ensure
from tools.freshness import fingerprint, model_digest, model_files
from tools.kernels import ROOT, Outcome, declared_parameters, execute, kernel_environment, n_cores, read_notebook
from tools.report import OWN_PARAMETERS, write_report

NOTEBOOKS = ROOT / "notebooks"
# What the comment of a parameter may say of its values, as in `# prompts, at least 2`.
RANGES = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}
# What one kernel needs: the libraries, and for a model its weights, their folded copy, and the activations of a sweep.
KERNEL_BYTES, TIMES_WEIGHTS = 2**30, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME", help="also a path, or NAME@all")
    parser.add_argument("--notebooks", nargs="+", metavar="NN", help="numbers or names; all by default")
    parser.add_argument("--seeds", type=seed_range, metavar="A..B", help="once for every seed from A to B")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--small", action="store_true", help="smaller batches, for models that are large for a CPU")
    parser.add_argument("--resume", action="store_true", help="only what is missing or was made from something else")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, metavar="N", help="notebooks at a time; default: as cores and memory allow")
    where.add_argument("--gpus", type=int, metavar="N", help="give each notebook one of N GPUs of this machine")
    where.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="run on the workers of this Dask scheduler")
    parser.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebooks; may be repeated",
    )  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {arguments.jobs}")
    models, notebooks = every_model(arguments.model), find_notebooks(arguments.notebooks)
    jobs = plan(models, notebooks, arguments.out, dict(arguments.parameters), arguments.small, arguments.seeds)
    outcomes = run_jobs(jobs, arguments.resume, arguments.jobs, arguments.gpus, arguments.scheduler).values()
    left_out, failed = sum(bool(end.not_applicable) for end in outcomes), sum(bool(end.error) for end in outcomes)
    text = f"{len(outcomes) - left_out - failed} of {len(outcomes)} notebooks done, {left_out} not applicable"
    print(f"{text}, {failed} failed, {len(jobs) - len(outcomes)} up to date; see {arguments.out}/*/report.md")
    return int(failed > 0)


# ---- plan ----


@dataclass(frozen=True)
class Job:
    """One notebook on one model, whose outputs go into `folder`."""

    notebook: Path
    model: str
    parameters: dict
    folder: Path

    @property
    def place(self) -> Path:
        return self.folder / self.notebook.stem

    @property
    def label(self) -> str:
        return f"{self.notebook.stem} on {self.folder.name}"


def every_model(names: list[str]) -> list[str]:
    """The names, with NAME@all as NAME@... for each checkpoint of a model, in the order of training.

    Raises:
        ValueError: it is not known which checkpoints the model has.
    """
    models = []
    for name in names:
        model, _, revision = name.partition("@")
        labels = list(checkpoints(model))
        if model.startswith("pythia-"):  # as EleutherAI published them
            labels = [f"step{n}" for n in (0, *(2**k for k in range(10)), *range(1000, 143001, 1000))]
        if revision == "all" and not labels:
            raise ValueError(f"which checkpoints {model} has is not known; name them one by one, as {model}@step1000")
        models += [f"{model}@{label}" for label in labels] if revision == "all" else [name]
    return models


def seed_range(text: str) -> list[int]:
    """The seeds of `3` or `0..7`, both ends included.

    Raises:
        ValueError: it is neither, or has none.
    """
    first, last = text.split("..") if ".." in text else (text, text)
    found = list(range(int(first), int(last) + 1))
    if not found:
        raise ValueError(f"no seed lies in {text}")
    return found


def find_notebooks(wanted: list[str] | None = None, folder: Path | None = None) -> list[Path]:
    """Notebooks by number or by name, each once; all of them, in order, by default.

    Raises:
        ValueError: a number or name matches no notebook.
    """
    present = sorted((folder or NOTEBOOKS).glob("[0-9][0-9]_*.ipynb"))
    chosen = []
    for name in wanted or [path.stem for path in present]:
        matches = [path for path in present if name.zfill(2) in (path.stem, path.stem[:2])]
        if not matches:
            raise ValueError(f"no notebook {name!r}; there are {', '.join(path.stem for path in present)}")
        chosen += matches
    return list(dict.fromkeys(chosen))


def check_parameters(path: Path, values: dict[str, str]) -> dict:
    """The values as the types of the notebook's own parameters, within the ranges that it declares.

    Raises:
        ValueError: the notebook has no such parameter, or the value is not of its type or range.
    """
    known = {k: v for k, v in declared_parameters(read_notebook(path)).items() if k not in OWN_PARAMETERS}
    checked = {}
    for name, text in values.items():
        if name not in known:
            raise ValueError(f"{path.stem} has no parameter {name!r} to set; it has {', '.join(known)}")
        default, comment = known[name]
        try:
            value = text if isinstance(default, str) else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = None
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default) or value in (math.inf, -math.inf):
            raise ValueError(f"parameter {name} is of type {type(default).__name__} (default {default}), not {text!r}")
        for words, bound in re.findall(rf"\b({'|'.join(RANGES)}) (-?\d+(?:\.\d+)?)", comment):
            if not RANGES[words](value, float(bound)):
                raise ValueError(f"parameter {name} ({comment}) must be {words} {bound}, not {value}")
        checked[name] = value
    return checked


def plan(
    models: list[str], notebooks: list[Path], out: Path, parameters: dict[str, str], small: bool = False,
    seeds: list[int] | None = None,
) -> list[Job]:  # fmt: skip
    """Every notebook on every model and seed, each once, checked before anything runs.

    With `small`, sizes are those of `notebooks/small.json`, for models that are large for a CPU.

    Raises:
        ValueError: an unknown model or parameter, a value that is none, or seeds for a notebook that has none.
    """
    if seeds and "seed" in parameters:
        raise ValueError("give either --seeds or -p seed, not both")
    parameters = parameters | ({"seed": str(seeds[0])} if seeds else {})
    sizes = json.loads((NOTEBOOKS / "small.json").read_text()) if small else {}
    checked = {path: sizes.get(path.stem, {}) | check_parameters(path, parameters) for path in notebooks}
    jobs = []
    for model in models:
        name = slug(model)
        if resolve(model).kind in ("folder", "nanogpt"):
            model = str(Path(model).expanduser().resolve())
        for seed in seeds or [None]:
            # No name of a model has a tilde in its slug: it may stand neither in a hub id nor in a revision.
            own, ending = ({}, "") if seed is None else ({"seed": seed}, f"~seed{seed}")
            jobs += [Job(path, model, checked[path] | own, out.resolve() / (name + ending)) for path in notebooks]
    return list({job.place: job for job in jobs}.values())


# ---- run ----


def run_jobs(
    jobs: list[Job], resume: bool = False, n_parallel: int | None = None, n_gpus: int | None = None,
    scheduler: str | None = None,
) -> dict[str, Outcome]:  # fmt: skip
    """Execute all jobs, or with `resume` those that are out of date, here or on a scheduler's workers.

    What a notebook made is moved into place when it has finished, so an interrupted or failed run leaves the earlier
    results alone. Returns label -> how it ended.

    Raises:
        ValueError, ModelUnavailable, OSError: outputs cannot be written; or a model, GPU or worker is not there.
    """
    models, out, outcomes = list(dict.fromkeys(job.model for job in jobs)), jobs[0].folder.parent, {}
    with claimed(out, {job.folder for job in jobs}) as staging:
        here = None if scheduler else _this_machine(models, len(jobs), n_parallel, n_gpus, staging)
        with here or workers(scheduler, models) as (digests, submit):
            futures = {}
            for job in longest_first(jobs):
                notebook = read_notebook(job.notebook)
                made_from = fingerprint(notebook, job.parameters, digests[job.model])
                if not (resume and _is_current(job, made_from)):
                    futures[submit(notebook, {"model_name": job.model} | job.parameters)] = job, made_from
            try:
                for future in tqdm(as_completed(futures), total=len(futures), unit="notebook", disable=None):
                    job, made_from = futures.pop(future)  # and with it the files that came home
                    outcomes[job.label] = _collect(job, future, made_from, staging)
            finally:
                for folder in {job.folder for job in jobs if job.label in outcomes and job.folder.exists()}:
                    write_report(folder)
    return outcomes


def _last(job: Job) -> dict:
    """The summary that a job left last; empty where there is none or it is damaged."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((job.place / "summary.json").read_text(encoding="utf-8")))
    return {}


def _is_current(job: Job, made_from: dict[str, str]) -> bool:
    """Whether there are outputs of a job, made from the same notebook, helpers, parameters and model."""
    return _last(job).get("fingerprint") == made_from and (job.folder / job.notebook.name).exists()


def longest_first(jobs: list[Job]) -> list[Job]:
    """The jobs by the seconds that they took last; one without any comes before all."""
    return sorted(reversed(jobs), key=lambda job: _last(job).get("wall_time_s", math.inf), reverse=True)


@contextmanager
def claimed(out: Path, folders: set[Path]) -> Iterator[Path]:
    """The outputs for one run alone: gives a staging folder in it, after clearing what killed runs left.

    Raises:
        ValueError: another run is writing there, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(out / ".lock", blocking=False))
            for folder in filter(Path.exists, folders):
                tempfile.TemporaryFile(dir=folder).close()
        except Timeout:
            other = f"another run is writing into {out}"
            raise ValueError(f"{other}; let it end, or name another folder with --out") from None
        except OSError as error:
            raise ValueError(f"cannot write into {out} ({error}); name another folder with --out") from error
        for left in out.glob(".staging-*"):
            for old in left.glob("replaced/*/*"):  # had only been moved away
                if not (place := out / old.relative_to(left / "replaced")).exists():
                    old.rename(place)
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".staging-", ignore_cleanup_errors=True) as staging:
            yield Path(staging)


@contextmanager
def _this_machine(
    models: list[str], n_jobs: int, n_parallel: int | None, n_gpus: int | None, staging: Path
) -> Iterator[tuple[dict[str, str], Callable]]:
    """The digests of models, seen to be loadable, and the function that submits a notebook to a thread of its own."""
    names = gpus(n_gpus) if n_gpus is not None else []
    for model in models:
        ensure(model)
    for model in {model.partition("@")[0]: model for model in models}.values():
        if resolve(model).kind in ("folder", "nanogpt", "hub"):  # else shipped, or converted and checked by its hash
            from helpers.models import read  # not at the top: it takes seconds

            read(model)
    n_parallel = min(len(names) or n_parallel or fitting(models), n_jobs)  # one notebook alone has all cores
    free, stop = SimpleQueue(), Event()
    for place in range(n_parallel):
        free.put(kernel_environment(n_parallel) | ({"CUDA_VISIBLE_DEVICES": names[place]} if names else {}))

    def in_turn(notebook: NotebookNode, parameters: dict) -> Outcome:
        environment, title = free.get(), notebook.cells[0].source.splitlines()[0].strip("# ")
        n_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        bar = tqdm(total=n_cells, desc=f"{title} on {parameters['model_name']}", unit="cell", leave=False, disable=None)

        def wanted(done: int) -> bool:
            bar.update(done - bar.n)
            return not stop.is_set()

        try:
            return execute(notebook, parameters, environment, wanted, staging)
        finally:
            bar.close()
            free.put(environment)

    pool = ThreadPoolExecutor(n_parallel)
    try:
        yield {model: model_digest(model) for model in models}, lambda *job: pool.submit(in_turn, *job)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def gpus(wanted: int) -> list[str]:
    """Names of so many of the GPUs that this process may use.

    Raises:
        ValueError: fewer than 1 are wanted, or there are not so many.
    """
    from torch.cuda import device_count  # not at the top: it takes seconds, and only this needs it

    there = device_count()
    if not 1 <= wanted <= there:
        raise ValueError(f"--gpus must be at least 1 and at most the {there} GPUs of this machine, not {wanted}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(there)])[:wanted]


def fitting(models: list[str]) -> int:
    """How many kernels with any of the models this machine has cores and free memory for, at least one."""
    largest = max(sum(path.stat().st_size for path in model_files(model)) for model in models)
    return max(1, min(n_cores(), psutil.virtual_memory().available // (KERNEL_BYTES + TIMES_WEIGHTS * largest)))


def _collect(job: Job, future: Future, made_from: dict[str, str], staging: Path) -> Outcome:
    """Keep what a finished job made, and say how it ended."""
    outcome = Outcome()
    try:
        outcome = future.result()
        _keep(job, outcome, made_from, staging)
    except CancelledError:
        outcome = Outcome(error="the scheduler, which went away; the same command with --resume runs it again")
    except Exception as failure:  # no kernel, a dead one, a full disk: the other notebooks still run
        outcome = replace(outcome, error=outcome.error or f"{type(failure).__name__}: {failure}")
    how = f"done in {outcome.seconds:.0f} s" + (f", and warned: {outcome.warnings}" if outcome.warnings else "")
    if outcome.not_applicable:
        how = f"left out: {outcome.not_applicable}"
    if outcome.error:
        how = f"failed at {outcome.error}"
    tqdm.write(f"{job.label} {how}", file=sys.stderr if outcome.error else sys.stdout)
    sys.stdout.flush()
    return replace(outcome, executed="", files=b"")


def _keep(job: Job, outcome: Outcome, made_from: dict[str, str], staging: Path) -> None:
    """Move what a job made into place; of a failed one only the notebook, under another name."""
    executed, failed = job.folder / job.notebook.name, job.folder / f"{job.notebook.stem}.failed.ipynb"
    if outcome.error:
        write_text(failed, outcome.executed)
        return
    made = staging / job.label
    if outcome.not_applicable:  # what an earlier run made, from something else, must not stand for this one
        executed.unlink(missing_ok=True)
    else:
        with zipfile.ZipFile(io.BytesIO(outcome.files)) as files:
            files.extractall(made)  # which writes nothing outside of it
        for path in made.glob("outputs/*/*/summary.json"):
            summary = json.loads(path.read_text(encoding="utf-8")) | {"fingerprint": made_from}
            write_text(path, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        # The notebook first, for the outputs carry the fingerprint by which a later run takes both to be done.
        write_text(executed, outcome.executed)
    if job.place.exists():
        old = staging / "replaced" / job.folder.name / job.place.name
        old.parent.mkdir(parents=True, exist_ok=True)
        job.place.rename(old)
    for place in made.glob(f"outputs/*/{job.place.name}"):
        place.rename(job.place)
    failed.unlink(missing_ok=True)
