"""What outputs were made from, as digests that are the same on every machine, so that a run can be continued."""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import nbformat

from helpers.catalog import TEXT_FILES, checkpoints, model_folder, resolve
from helpers.results import write_text
from tools.kernels import ROOT, declared_parameters

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


def fingerprint(text: str, parameters: dict, model_digest: str) -> dict[str, str]:
    """Digests of what outputs are made from: a notebook's cells, the helpers, its parameters and the model.

    `text` is the notebook's file. Neither the model's name nor any path of this machine takes part, nor do the
    versions of libraries, so that outputs made on another machine count as made.
    """
    notebook = nbformat.reads(text, as_version=4)
    defaults = {name: value for name, (value, _) in declared_parameters(notebook).items()}
    values = {name: v for name, v in (defaults | parameters).items() if name not in ("model_name", "output_dir")}
    cells = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]
    digests = {"notebook": _of_values(cells), "helpers": source_digest("helpers"), "parameters": _of_values(values)}
    return digests | {"model": model_digest}


def what_changed(place: Path, now: dict[str, str]) -> list[str]:
    """Which parts of the fingerprint differ from that of the outputs in `place`; all of them if there are none."""
    try:
        before = json.loads((place / "summary.json").read_text(encoding="utf-8"))["fingerprint"]
        return [part for part in now if before.get(part) != now[part]]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return list(now)


def sign(made: Path, fingerprint: dict[str, str]) -> None:
    """Put the fingerprint into the summary of outputs that are not yet in their place."""
    path = made / "summary.json"
    if path.exists():
        summary = json.loads(path.read_text(encoding="utf-8")) | {"fingerprint": fingerprint}
        write_text(path, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def source_digest(package: str) -> str:
    """The digest of the source of `helpers` or `tools`."""
    return _of_files([*(ROOT / package).glob("*.py"), *(ROOT / package).glob("*.json")])


def model_digest(name: str) -> str:
    """The digest of a model's weights, configuration and tokenizer, wherever they lie.

    Raises:
        ModelUnavailable: it is not on this machine.
        ValueError: the name is of no model.
    """
    source = resolve(name)
    if source.kind == "nanogpt":
        return _of_files([Path(source.repo)])
    folder = model_folder(name, source)
    weights = [path for pattern in WEIGHT_FILES for path in folder.glob(pattern)]
    if source.kind == "embedded" and source.revision:
        weights = [path for label, path in checkpoints(name.partition("@")[0]).items() if label == source.revision]
    return _of_files([*weights, *(path for pattern in TEXT_FILES for path in folder.glob(pattern))])


def _of_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        found = path.stat()
        digest.update(path.name.encode() + _of_file(path, found.st_size, found.st_mtime_ns))
    return digest.hexdigest()[:16]


@lru_cache
def _of_file(path: Path, size: int, changed_ns: int) -> bytes:
    """The digest of a file, read once for as long as it stays the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _of_values(values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
