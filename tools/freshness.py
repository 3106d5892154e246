"""What outputs were made from, as digests that are the same on every machine, so that a run can be continued."""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from nbformat import NotebookNode

from helpers.catalog import TEXT_FILES, checkpoints, model_folder, resolve
from tools.kernels import ROOT, declared_parameters
from tools.report import OWN_PARAMETERS


def fingerprint(notebook: NotebookNode, parameters: dict, model_digest: str) -> dict[str, str]:
    """Digests of what outputs are made from: a notebook's cells, the helpers, its parameters and the model.

    Neither the model's name nor any path of this machine takes part, nor do the versions of libraries, so that
    outputs made on another machine count as made.
    """
    values = {name: default for name, (default, _) in declared_parameters(notebook).items()} | parameters
    values = {name: value for name, value in values.items() if name not in OWN_PARAMETERS}
    cells = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]
    helpers = source_digest("helpers")
    return {"notebook": _of_values(cells), "helpers": helpers, "parameters": _of_values(values), "model": model_digest}


def source_digest(package: str) -> str:
    """The digest of the source of `helpers` or `tools`."""
    return _of_files([*(ROOT / package).glob("*.py"), *(ROOT / package).glob("*.json")])


def model_files(name: str) -> list[Path]:
    """A model's weights, configuration and tokenizer, wherever they lie.

    Raises:
        ModelUnavailable: it is not on this machine.
        ValueError: the name is of no model.
    """
    source = resolve(name)
    if source.kind == "nanogpt":
        return [Path(source.repo)]
    folder = model_folder(name, source)
    weights = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    if source.kind == "embedded" and source.revision:
        weights = [path for label, path in checkpoints(folder.name).items() if label == source.revision]
    return [*weights, *(path for pattern in TEXT_FILES for path in folder.glob(pattern))]


def model_digest(name: str) -> str:
    """The digest of a model's files, whatever its name and folder are."""
    return _of_files(model_files(name))


def _of_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        found = path.stat()
        digest.update(path.name.encode() + _of_file(path, found.st_size, found.st_mtime_ns))
    return digest.hexdigest()[:16]


@lru_cache
def _of_file(path: Path, size: int, changed_ns: int) -> bytes:
    """The digest of a file, read once for as long as it stays the same: a worker asks before every notebook."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _of_values(values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
