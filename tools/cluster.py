"""The same jobs on the workers of a Dask scheduler; needs `pip install distributed`, and a clone for each worker."""

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

from nbformat import NotebookNode

from helpers.results import VERSIONS_OF
from tools.freshness import model_digest, source_digest
from tools.kernels import Outcome, execute, kernel_environment

SECONDS = 10  # to wait for a scheduler's or a first worker's answer
HOW_TO_START = "start each in a clone of this commit, with `dask worker tcp://HOST:8786 --nthreads 1`"


@contextmanager
def workers(address: str, models: list[str]) -> Iterator[tuple[dict[str, str], Callable]]:
    """What the workers of a scheduler have, and the function that submits a notebook to them.

    Raises:
        ImportError: distributed is not installed.
        OSError: the scheduler does not answer, or it has no workers.
        ValueError: a worker has other versions than this machine, or not the same models as the others.
    """
    from distributed import Client  # not at the top: one may do without it

    # A lost connection is one sentence of ours, not the traceback of each attempt to get it back.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL + 1)
    with Client(address, timeout=SECONDS) as client:
        client.wait_for_workers(1, timeout=SECONDS)
        expected = state([])
        for worker, theirs in client.run(state, models, on_error="return").items():
            if isinstance(theirs, Exception):
                raise ValueError(f"worker {worker} cannot be used ({theirs}); {HOW_TO_START}")
            expected = theirs | expected  # models as on the first worker
            check_same(worker, theirs, expected)
        # A notebook whose kernel died is tried again; one whose worker died is given to another besides.
        yield expected, partial(client.get_executor(pure=False, retries=2).submit, work, expected)


def state(models: list[str]) -> dict[str, str]:
    """What this process has: versions of libraries, and digests of our own source and of models.

    Raises:
        ValueError, ModelUnavailable: it lacks one of the models; says why.
    """
    versions = {name: version(name) for name in (*VERSIONS_OF, "distributed")}
    versions["python"] = ".".join(platform.python_version_tuple()[:2])
    ours = {package: source_digest(package) for package in ("helpers", "tools")}
    return versions | ours | {model: model_digest(model) for model in models}


def check_same(worker: str, theirs: dict[str, str], expected: dict[str, str]) -> None:
    """See that a worker has what is expected.

    Raises:
        ValueError: it has something else; says what.
    """
    for name, value in theirs.items():
        if value != expected[name]:
            what = f"worker {worker} has {name} {value} and others have {expected[name]}"
            raise ValueError(f"{what}; give all machines the same commit, requirements.txt and models")


def work(expected: dict[str, str], notebook: NotebookNode, parameters: dict) -> Outcome:
    """Execute a notebook on this worker, until its caller has gone.

    Raises:
        ValueError: the worker joined late and has other versions or not the model.
        DeadKernelError: the kernel died.
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    check_same(worker.address, state([parameters["model_name"]]), expected)

    def wanted(_) -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state != "cancelled"

    return execute(notebook, parameters, kernel_environment(), wanted)
