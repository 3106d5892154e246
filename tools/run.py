"""Execute the notebooks, each in a kernel of its own, several at a time, and keep what they made."""

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
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from helpers.catalog import DEFAULT_MODEL, checkpoints, model_folder, resolve, slug
from helpers.results import write_text
from tools.cluster import Cluster, SchedulerGone
from tools.convert import ensure
from tools.freshness import WEIGHT_FILES, fingerprint, model_digest, sign, what_changed
from tools.kernels import (
    ROOT,
    Outcome,
    declared_parameters,
    execute,
    kernel_environment,
    n_code_cells,
    n_cores,
    read_notebook,
)
from tools.progress import Progress
from tools.report import OWN_PARAMETERS, write_report

NOTEBOOKS = ROOT / "notebooks"
# What the comment of a parameter may say of its values, as in `# prompts, at least 2`.
RANGES = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME",
        help="names, folders or hub ids; NAME@all for every checkpoint",
    )  # fmt: skip
    parser.add_argument("--notebooks", nargs="+", metavar="NN", help="numbers or names; all by default")
    parser.add_argument("--seeds", metavar="A..B", help="once for every seed from A to B, where notebooks have one")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--small", action="store_true", help="smaller batches, for models that are large for a CPU")
    parser.add_argument("--resume", action="store_true", help="only what is missing or was made from something else")
    parser.add_argument("--jobs", type=int, metavar="N", help="notebooks at a time; default: as cores and memory allow")
    parser.add_argument("--gpus", type=int, metavar="N", help="give each notebook one of N GPUs of this machine")
    parser.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="run on the workers of this Dask scheduler")
    parser.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebooks; may be repeated",
    )  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {arguments.jobs}")
    if arguments.scheduler and (arguments.jobs, arguments.gpus) != (None, None):
        raise ValueError(
            "--jobs and --gpus are for this machine; a worker takes one notebook at a time, on the GPU that it was "
            "started with, as in `CUDA_VISIBLE_DEVICES=0 dask worker ...`"
        )
    models, notebooks = every_model(arguments.model), find_notebooks(arguments.notebooks)
    seeds = parse_seeds(arguments.seeds)
    jobs = plan(models, notebooks, arguments.out, dict(arguments.parameters), arguments.small, seeds)
    with claimed(jobs[0].out, {job.folder for job in jobs}):
        pass  # a folder that cannot be written is found out before anything that takes long
    machine = Cluster(arguments.scheduler) if arguments.scheduler else ThisMachine(arguments.jobs, gpus(arguments.gpus))
    machine.prepare(list(dict.fromkeys(job.model for job in jobs)))
    wanted = [job for job in jobs if not arguments.resume or is_outdated(job, machine.digest(job.model))]
    if len(wanted) < len(jobs):
        print(f"{len(jobs) - len(wanted)} of {len(jobs)} notebooks are up to date", flush=True)
    return _summarise(run_on(machine, wanted) if wanted else {}, wanted, arguments.out)


def _summarise(outcomes: dict[str, Outcome], jobs: list["Job"], out: Path) -> int:
    """Print how a run ended; returns the exit code."""
    for label, outcome in outcomes.items():
        if outcome.error:
            print(f"{label} failed at {outcome.error}", file=sys.stderr)
    left_out = sum(bool(outcome.not_applicable) for outcome in outcomes.values())
    done = [job for job in jobs if not (outcomes[job.label].error or outcomes[job.label].not_applicable)]
    pages = list(dict.fromkeys(str(out / job.folder.name / "report.md") for job in done))
    if len(pages) > 3:
        pages = [f"{len(pages)} reports in {out}", "or type `python -m tools report` for one page"]
    text = f"{len(done)} of {len(jobs)} notebooks done"
    text += f", {left_out} not applicable" if left_out else ""
    print(text + (f"; see {', '.join(pages)}" if done else ""))
    return 1 if any(outcome.error for outcome in outcomes.values()) else 0


# ---- plan ----


@dataclass(frozen=True)
class Job:
    """One notebook on one model, and one seed where several are wanted."""

    notebook: Path
    model: str
    parameters: dict
    out: Path
    seed: int | None = None

    @property
    def folder(self) -> Path:
        # No name of a model has a tilde in its slug: it may stand neither in a hub id nor in a revision.
        return self.out / (slug(self.model) + ("" if self.seed is None else f"~seed{self.seed}"))

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
        models += [f"{model}@{label}" for label in _all_checkpoints(model)] if revision == "all" else [name]
    return models


def _all_checkpoints(model: str) -> list[str]:
    source = resolve(model)
    if source.kind == "embedded" and (labels := list(checkpoints(model))):
        return labels
    if model.startswith("pythia-") and source.kind == "hub":  # as EleutherAI published them
        return [f"step{n}" for n in (0, *(2**k for k in range(10)), *range(1000, 143001, 1000))]
    raise ValueError(f"which checkpoints {model} has is not known; name them one by one, as in {model}@step1000")


def parse_seeds(text: str | None) -> list[int] | None:
    """The seeds of `3` or `0..7`, both ends included.

    Raises:
        ValueError: it is neither, or has none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    seeds = list(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else []
    if not seeds:
        raise ValueError(f"--seeds is written 3 or 0..7, the lower first, not {text!r}")
    return seeds


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


def check_parameters(path: Path, values: dict[str, str]) -> dict:
    """The values as the types of the notebook's own parameters, within the ranges that it declares.

    Raises:
        ValueError: the notebook has no such parameter, or the value is not of its type or range.
    """
    known = declared_parameters(read_notebook(path))
    settable = [name for name in known if name not in OWN_PARAMETERS]
    checked = {}
    for name, text in values.items():
        if name not in settable:
            raise ValueError(f"{path.stem} has no parameter {name!r} to set; it has {', '.join(settable)}")
        default, comment = known[name]
        checked[name] = _as_type_of(default, text, name)
        _check_range(checked[name], comment, name)
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
    models: list[str], notebooks: list[Path], out: Path, parameters: dict[str, str], small: bool = False,
    seeds: list[int] | None = None,
) -> list[Job]:  # fmt: skip
    """Every notebook on every model and seed, each once, checked before anything runs.

    With `small`, sizes are those of `notebooks/small.json`, for models that are large for a CPU. With `seeds`,
    notebooks without a parameter `seed` are left out.

    Raises:
        ValueError: an unknown model or parameter, a value that is none, or seeds for notebooks that have none.
    """
    if seeds and "seed" in parameters:
        raise ValueError("give either --seeds or -p seed, not both")
    if seeds:
        notebooks = [path for path in notebooks if "seed" in declared_parameters(read_notebook(path))]
        if not notebooks:
            raise ValueError("none of these notebooks has a parameter 'seed'; leave out --seeds")
    sizes = json.loads((NOTEBOOKS / "small.json").read_text()) if small else {}
    checked = {path: sizes.get(path.stem, {}) | check_parameters(path, parameters) for path in notebooks}
    jobs = []
    for model in models:
        is_path = resolve(model).kind in ("folder", "nanogpt")
        name = str(Path(model).expanduser().resolve()) if is_path else model
        for seed in seeds or [None]:
            own = {} if seed is None else {"seed": seed}
            jobs += [Job(path, name, checked[path] | own, out.resolve(), seed) for path in notebooks]
    return list({(job.notebook, job.folder): job for job in jobs}.values())


def is_outdated(job: Job, digest: str) -> bool:
    """Whether there are no outputs of a job, or they were made from another notebook, helper, parameter or model."""
    text = job.notebook.read_text(encoding="utf-8")
    changed = what_changed(job.place, fingerprint(text, job.parameters, digest))
    return bool(changed) or not (job.folder / job.notebook.name).exists()


def longest_first(jobs: list[Job]) -> list[Job]:
    """The jobs in the order in which they end soonest: those that took long before, or are new, come first."""
    shipped = ROOT / "outputs" / DEFAULT_MODEL

    def seconds(job: Job) -> float:
        return wall_time(job.place) or wall_time(shipped / job.notebook.stem) or math.inf

    return sorted(jobs, key=seconds, reverse=True)


def wall_time(place: Path) -> float | None:
    """Seconds that a notebook took whose outputs are in `place`; None if there are none."""
    try:
        return float(json.loads((place / "summary.json").read_text(encoding="utf-8"))["wall_time_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- where notebooks run ----


# What one kernel needs: the libraries, and for a model its weights, their folded copy, and the activations of a sweep.
KERNEL_BYTES, TIMES_WEIGHTS = 2**30, 4


class ThisMachine:
    """Kernels on this machine, so many at a time; as many as cores and memory allow, or one a GPU, by default."""

    def __init__(self, n_parallel: int | None = None, gpus: Sequence[str] = ()):
        self.n_parallel, self.gpus = n_parallel or len(gpus) or None, gpus

    def prepare(self, models: list[str]) -> None:
        """See that every model can be loaded, before the notebooks start.

        Raises:
            ValueError, ModelUnavailable: one cannot; says why.
        """
        for model in models:
            ensure(model)
        for model in {model.partition("@")[0]: model for model in models}.values():
            try_loading(model)
        self.n_parallel = self.n_parallel or fitting(max(map(weight_bytes, models)))

    def digest(self, model: str) -> str:
        """The digest of a model."""
        return model_digest(model)

    @asynccontextmanager
    async def ready(self, n_jobs: int) -> AsyncIterator[Callable[..., Awaitable[Outcome]]]:
        """Gives the function that executes a notebook here, when there is room."""
        free: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        n_parallel = min(self.n_parallel, n_jobs)  # one notebook alone has all cores
        for place in range(n_parallel):
            own = {"CUDA_VISIBLE_DEVICES": self.gpus[place % len(self.gpus)]} if self.gpus else {}
            free.put_nowait(kernel_environment(n_parallel) | own)

        async def in_turn(text: str, parameters: dict, folder: Path, on_cell: Callable) -> Outcome:
            environment = await free.get()
            try:
                on_cell(0)
                return await execute(text, parameters, folder, environment, on_cell)
            finally:
                free.put_nowait(environment)

        yield in_turn


def gpus(wanted: int | None) -> list[str]:
    """Names of so many of the GPUs that this process may use; none where none are wanted.

    Raises:
        ValueError: fewer than 1 are wanted, or there are not so many.
    """
    if wanted is None:
        return []
    from torch.cuda import device_count  # not at the top: it takes seconds, and only this needs it

    there = device_count()
    if not 1 <= wanted <= there:
        raise ValueError(f"--gpus must be at least 1 and at most the {there} GPUs of this machine, not {wanted}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(there)])[:wanted]


def fitting(n_bytes: int) -> int:
    """How many kernels with a model of so many bytes this machine has cores and free memory for, at least one."""
    need = KERNEL_BYTES + TIMES_WEIGHTS * n_bytes
    return max(1, min(n_cores(), psutil.virtual_memory().available // need))


def weight_bytes(model: str) -> int:
    """The size of a model's weights on disk."""
    source = resolve(model)
    if source.kind == "nanogpt":
        return Path(source.repo).stat().st_size
    folder = model_folder(model, source)
    return sum(path.stat().st_size for pattern in WEIGHT_FILES for path in folder.glob(pattern))


def try_loading(model: str) -> None:
    """Load a model from a folder, a file or the hub, in a process of its own, before the notebooks start.

    Raises:
        ValueError: it cannot be loaded, with the loader's reason.
    """
    if resolve(model).kind not in ("folder", "nanogpt", "hub"):
        return  # shipped, or converted and checked by its hash
    code = "import sys; from helpers.models import load; load(sys.argv[1])"
    command = [sys.executable, "-c", code, model]
    ended = subprocess.run(command, env=kernel_environment(), capture_output=True, text=True)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or [f"its loading ended with exit code {ended.returncode}"])[-1]
        raise ValueError(re.sub(r"^[\w.]+: ", "", reason))


# ---- run ----


def run_on(machine: "ThisMachine | Cluster", jobs: list[Job]) -> dict[str, Outcome]:
    """Execute all jobs; returns label -> how it ended.

    A notebook works in a staging folder beside the outputs, or on another machine. What it made is moved into
    place when it has finished, so an interrupted or failed run leaves the earlier results alone.

    Raises:
        ValueError: the folder for the outputs cannot be written, another run is writing there, or the scheduler
            has gone.
        KeyboardInterrupt: interrupted or told to end, with what is done by then.
    """
    outcomes: dict[str, Outcome] = {}
    with claimed(jobs[0].out, {job.folder for job in jobs}) as staging:
        try:
            asyncio.run(_run_all(jobs, machine, staging, outcomes))
        except asyncio.CancelledError:
            text = f"{_how_far(outcomes, jobs)}; the earlier results of the others are untouched"
            raise KeyboardInterrupt(f"interrupted after {text}") from None
        except SchedulerGone as error:
            text = f"{_how_far(outcomes, jobs)}; those are kept, and the same command with --resume runs the rest"
            raise ValueError(f"{error} after {text}") from None
        finally:
            for folder in {job.folder for job in jobs if job.label in outcomes and job.folder.exists()}:
                try:
                    write_report(folder)
                except (OSError, ValueError, KeyError) as error:
                    outcomes[f"the report of {folder.name}"] = Outcome(error=f"{type(error).__name__}: {error}")
    return outcomes


def _how_far(outcomes: dict[str, Outcome], jobs: list[Job]) -> str:
    return f"{sum(not outcome.error for outcome in outcomes.values())} of {len(jobs)} notebooks"


@contextmanager
def claimed(out: Path, folders: set[Path]) -> Iterator[Path]:
    """The outputs for one run alone: gives a staging folder in it, after clearing what killed runs left."""
    lock = FileLock(out / ".lock", blocking=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        for left in out.glob(".staging-*"):
            _clear(left)
        for folder in filter(Path.exists, folders):
            tempfile.TemporaryFile(dir=folder).close()
        staging = tempfile.TemporaryDirectory(dir=out, prefix=".staging-", ignore_cleanup_errors=True)
    except Timeout:
        raise ValueError(f"another run is writing into {out}; let it end, or name another folder with --out") from None
    except OSError as error:
        lock.release()
        place = error.filename or out
        raise ValueError(f"cannot write into {place} ({error.strerror}); name another folder with --out") from None
    try:
        with staging as folder:
            yield Path(folder)
    finally:
        lock.release()


def _clear(left: Path) -> None:
    """Remove the staging folder of a killed run, after putting back what it had only moved away."""
    for old in left.glob("replaced/*/*"):
        place = left.parent / old.relative_to(left / "replaced")
        place.parent.mkdir(exist_ok=True)
        if not place.exists():
            old.rename(place)
    shutil.rmtree(left, ignore_errors=True)


async def _run_all(
    jobs: list[Job], machine: "ThisMachine | Cluster", staging: Path, outcomes: dict[str, Outcome]
) -> None:
    _end_on_signals(asyncio.get_running_loop(), asyncio.current_task())
    async with Progress() as progress, machine.ready(len(jobs)) as execute_there:

        async def whole(job: Job) -> None:
            outcomes[job.label] = await _run_job(job, machine.digest, execute_there, staging, progress)

        await asyncio.gather(*map(whole, longest_first(jobs)))


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


async def _run_job(
    job: Job, digest_of: Callable, execute_there: Callable, staging: Path, progress: Progress
) -> Outcome:
    outcome, began = Outcome(), time.monotonic()

    def on_cell(n_done: int) -> None:
        nonlocal began
        if n_done:
            progress.at(job.label, n_done)
        else:
            began = time.monotonic()
            progress.begin(job.label, n_cells, wall_time(job.place))

    try:
        workplace = Path(tempfile.mkdtemp(dir=staging))
        n_cells = n_code_cells(read_notebook(job.notebook))
        text = job.notebook.read_text(encoding="utf-8")
        made_from = fingerprint(text, job.parameters, digest_of(job.model))
        outcome = await execute_there(text, {"model_name": job.model} | job.parameters, workplace, on_cell)
        _keep(job, outcome, made_from, workplace, staging)
    except SchedulerGone:  # there is no use in going on
        raise
    except Exception as failure:  # no kernel, a dead one, a full disk: the other notebooks still run
        outcome = replace(outcome, error=outcome.error or f"{type(failure).__name__}: {failure}")
    progress.end(job.label, _how_it_ended(job, outcome, time.monotonic() - began))
    if outcome.warnings and not outcome.error:
        progress.say(f"{job.label} warned: {outcome.warnings}", sys.stderr)
    return outcome


def _how_it_ended(job: Job, outcome: Outcome, seconds: float) -> str:
    if outcome.error:
        return f"FAILED  {job.label}\n        {outcome.error}"
    if outcome.not_applicable:
        return f"left out  {job.label}: {outcome.not_applicable}"
    return f"done    {job.label} in {seconds:.0f} s"


def _keep(job: Job, outcome: Outcome, made_from: dict[str, str], workplace: Path, staging: Path) -> None:
    """Move what a job made into place; of a failed one only the notebook, under another name."""
    failed, target = job.folder / f"{job.notebook.stem}.failed.ipynb", job.place
    if outcome.not_applicable:  # what an earlier run made, from something else, must not stand for this one
        _set_aside(job, staging)
        for left in (failed, job.folder / job.notebook.name):
            left.unlink(missing_ok=True)
        return
    # Where space may be wanting, before anything is replaced.
    executed = write_text(workplace / job.notebook.name, outcome.executed)
    job.folder.mkdir(exist_ok=True)
    if outcome.error:
        executed.replace(failed)
        return
    places = list(workplace.glob(f"outputs/*/{job.notebook.stem}"))
    for made in places:
        sign(made, made_from)
    # The notebook first, for the outputs carry the fingerprint by which a later run takes both to be done.
    executed.replace(job.folder / job.notebook.name)
    for made in places:
        _set_aside(job, staging)
        made.rename(target)
    failed.unlink(missing_ok=True)


def _set_aside(job: Job, staging: Path) -> None:
    """Move what an earlier run of a job made out of its place."""
    if job.place.exists():
        old = staging / "replaced" / job.folder.name / job.notebook.stem
        old.parent.mkdir(parents=True, exist_ok=True)
        job.place.rename(old)
