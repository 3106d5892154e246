"""What outputs were made from, as digests that are the same on every machine, so that a run can be continued."""

import hashlib
import json
from collections.abc import Iterable
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
    folder, shipped = model_folder(name, source), checkpoints(name.partition("@")[0])
    files = [path for pattern in ("*.safetensors", "*.bin", *TEXT_FILES) for path in folder.glob(pattern)]
    return files + [path for label, path in shipped.items() if label == source.revision]


def model_digest(name: str) -> str:
    """The digest of a model's files, whatever its name and folder are, after the checkpoint that is meant."""
    return (resolve(name).revision or "") + _of_files(model_files(name))


def _of_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _of_values(values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
