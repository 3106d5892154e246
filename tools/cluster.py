"""The same jobs on the workers of a Dask scheduler; needs `pip install distributed`, and a clone for each worker."""

import asyncio
import concurrent.futures
import logging
import platform
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from helpers.catalog import ModelUnavailable
from helpers.results import VERSIONS_OF
from tools.freshness import model_digest, source_digest
from tools.kernels import Outcome, execute, kernel_environment

TOPIC = "induction-heads-cells"  # on which workers tell how far they are
SECONDS = 10  # to wait for a scheduler's or a first worker's answer
RETRIES = 2  # of a notebook whose kernel died; one whose worker died is given to another besides


class SchedulerGone(Exception):
    """The connection to the scheduler is lost, and with it all that was not yet done."""


class Cluster:
    """The workers of one scheduler, which must all have this machine's versions and the same models."""

    def __init__(self, address: str):
        self.address, self.digests = address, {}

    def prepare(self, models: list[str]) -> None:
        """See that every worker is of this machine's versions and has every model.

        Raises:
            ValueError: distributed is not installed, the scheduler does not answer, it has no workers, or one of
                these has other versions or not the model.
        """
        asyncio.run(self._prepare(models))

    async def _prepare(self, models: list[str]) -> None:
        async with self._connected() as client:
            try:
                await client.wait_for_workers(1, timeout=SECONDS)
            except TimeoutError:
                raise ValueError(f"the scheduler at {self.address} has no workers; {_HOW_TO_START}") from None
            states = await client.run(state, models, on_error="return")
        for worker, theirs in states.items():
            if isinstance(theirs, Exception):
                raise ValueError(f"worker {worker} cannot import this project ({theirs}); {_HOW_TO_START}")
            if problem := complaint(worker, theirs, {"versions": state([])["versions"], "models": self.digests}):
                raise ValueError(problem)
            self.digests |= theirs["models"]

    def digest(self, model: str) -> str:
        """The digest of a model, the same on every worker."""
        return self.digests[model]

    @asynccontextmanager
    async def ready(self, n_jobs: int) -> AsyncIterator[Callable[..., Awaitable[Outcome]]]:
        """Gives the function that executes a notebook on a worker and brings back what it made."""
        listeners: dict[str, Callable[[int], object]] = {}

        def heard(event: tuple) -> None:
            _, (key, n_done) = event
            if key in listeners:
                listeners[key](n_done)

        async with self._connected() as client:
            client.subscribe_topic(TOPIC, heard)

            async def on_a_worker(text: str, parameters: dict, folder: Path, on_cell: Callable) -> Outcome:
                key = f"notebook-{uuid.uuid4().hex}"
                listeners[key] = on_cell
                model = parameters["model_name"]
                ours = {"versions": state([])["versions"], "models": {model: self.digests[model]}}
                future = client.submit(work, key, text, parameters, ours, key=key, retries=RETRIES)
                try:
                    outcome, files = await future
                except concurrent.futures.CancelledError:
                    raise SchedulerGone(f"the scheduler at {self.address} went away") from None
                finally:
                    del listeners[key]
                unpack(files, folder)
                return outcome

            yield on_a_worker

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator["distributed.Client"]:
        try:
            from distributed import Client
        except ImportError:
            raise ValueError("--scheduler needs Dask; type `pip install distributed`") from None
        log = logging.getLogger("distributed.client")
        async with AsyncExitStack() as stack:
            # A lost connection is one sentence of ours, not the traceback of each attempt to get it back.
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.CRITICAL + 1)
            try:
                client = Client(self.address, asynchronous=True, timeout=SECONDS)
                stack.push_async_callback(client.close)
                await client
            except (OSError, ValueError) as error:
                reason = f"no Dask scheduler answers at {self.address} ({type(error).__name__})"
                raise ValueError(f"{reason}; start one with `dask scheduler`, or leave out --scheduler") from None
            yield client


_HOW_TO_START = "start each in a clone of this commit, with `dask worker tcp://HOST:8786 --nthreads 1`"


# ---- on a worker ----


def state(models: list[str]) -> dict[str, dict[str, str]]:
    """What this process has: versions of libraries and helpers, digests of models, and why it lacks some."""
    versions = {name: version(name) for name in (*VERSIONS_OF, "distributed")}
    versions |= {"python": ".".join(platform.python_version_tuple()[:2])}
    versions |= {"helpers": source_digest("helpers"), "tools": source_digest("tools")}
    digests, missing = {}, {}
    for model in models:
        try:
            digests[model] = model_digest(model)
        except (ValueError, OSError, ModelUnavailable) as error:
            missing[model] = str(error)
    return {"versions": versions, "models": digests, "missing": missing}


def complaint(worker: str, theirs: dict, ours: dict) -> str | None:
    """Why a worker cannot be used, in a sentence; None if it can."""
    for model, reason in theirs["missing"].items():
        return f"worker {worker} does not have the model {model}: {reason}"
    for name, number in ours["versions"].items():
        if name in ("helpers", "tools") and theirs["versions"][name] != number:
            return f"worker {worker} has other {name} than this machine; check out the same commit there"
        if theirs["versions"][name] != number:
            there = theirs["versions"][name]
            return f"worker {worker} has {name} {there} and this machine {number}; install requirements.txt on both"
    for model, digest in ours["models"].items():
        if theirs["models"][model] != digest:
            return f"worker {worker} has another {model} than the others; give all workers the same files"
    return None


def work(key: str, text: str, parameters: dict, ours: dict) -> tuple[Outcome, dict[str, bytes]]:
    """Execute a notebook on this worker; returns how it ended, and every file that it made, by path.

    Raises:
        ValueError: the worker joined late and has other versions or not the model.
        DeadKernelError: the kernel died.
    """
    from distributed import get_worker

    worker = get_worker()
    if problem := complaint(worker.address, state(list(ours["models"])), ours):
        raise ValueError(problem)

    def tell(n_done: int) -> None:
        worker.log_event(TOPIC, (key, n_done))

    async def until_unwanted(folder: Path) -> Outcome:
        task = asyncio.create_task(execute(text, parameters, folder, kernel_environment(), tell))
        while not task.done():
            await asyncio.wait({task}, timeout=1)
            known = worker.state.tasks.get(key)
            if known is None or known.state == "cancelled":  # the caller has gone
                task.cancel()
        return await task

    tell(0)
    with tempfile.TemporaryDirectory(prefix="induction-heads-") as folder:
        outcome = asyncio.run(until_unwanted(Path(folder)))
        return outcome, pack(Path(folder))


def pack(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by its path with forward slashes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpack(files: dict[str, bytes], folder: Path) -> None:
    """Write packed files into a folder.

    Raises:
        ValueError: a path leads out of it.
    """
    for name, content in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"a worker sent a file for {name!r}, which is outside its folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
