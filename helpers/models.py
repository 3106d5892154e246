"""One function, `load`: every model as a TransformerLens `TransformerBridge`, in evaluation mode, gradients off.

Models are put into compatibility mode (layer norms folded, writing weights centred, value biases folded), because
the published numbers were taken so, as far as that leaves their log-probabilities as they were: `bridge.folded`
names what was done. Shortformer models are not, because positions are added after the norm.
"""

import hashlib
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge

from helpers.catalog import DEFAULT_MODEL, ModelUnavailable, Source, checkpoints, model_folder, resolve
from helpers.folding import fold, wrap
from helpers.hugging_face import read_hugging_face, read_json, read_tokenizer
from helpers.nanogpt import read_nanogpt, shipped_tokenizer
from helpers.shortformer import build_shortformer, dequantise


def pick_device(device: str | None = None) -> str:
    """The device asked for, else cuda where there is one, else cpu.

    Raises:
        ValueError: there is no such device here.
    """
    # Never mps unasked: TransformerLens refuses it too, because of wrong results.
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {device!r} here ({str(error).splitlines()[0]}); leave it out") from error
    return device


def load(name: str = DEFAULT_MODEL, device: str | None = None) -> TransformerBridge:
    """Load a model by table name, local folder, nanoGPT checkpoint, or hub id `owner/name`.

    A training checkpoint is written `induction-2l@step0`, `pythia-70m@step1000` or, by the number in
    its file's name, `attn-only-2l@1234`. One name on one device is one object, shared by all who ask for
    it until four others were loaded; sweeps leave it as it was, and so must hooks that you add.

    Raises:
        ValueError: the name is neither in the table, nor a path to a model, nor a hub id; or there is a model that
            is damaged, not a decoder with attention, or not the same in TransformerLens and in transformers.
        ModelUnavailable: the weights cannot be had here now, or fail their hash.
    """
    return _shared(name, pick_device(device))


def read(name: str, device: str = "cpu") -> TransformerBridge:
    """What `load` gives, but an object of the caller's own."""
    source = resolve(name)
    if source.kind == "nanogpt":
        return fold(lambda: wrap(*read_nanogpt(Path(source.repo)), name, device))
    return _read_folder(model_folder(name, source), name, device, source)


_shared = lru_cache(maxsize=4)(read)


def layout(model: TransformerBridge) -> dict:
    """How attention is laid out: how many heads and keys a layer has, and which layers see the whole prompt."""
    cfg, config = model.cfg, getattr(model.original_model, "config", None)
    window = getattr(config, "sliding_window", None) or cfg.n_ctx
    every = ["sliding_attention" if window < cfg.n_ctx else "full_attention"] * cfg.n_layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or every
    return {
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "n_key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
        "d_vocab": cfg.d_vocab,
        "global_layers": [layer for layer, kind in enumerate(kinds) if kind in ("full_attention", "global")],
    }


def _read_folder(folder: Path, name: str, device: str, source: Source) -> TransformerBridge:
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json, so it is not a model folder")
    config, weights = read_json(folder / "config.json"), folder / "model.safetensors"
    if "sha256" in config:
        _check_hash(weights, config["sha256"], name if source.kind != "embedded" else None)
    ours = "sha256" in config or "shortformer_pos" in config  # shipped, converted, or trained here
    tokenizer = _our_tokenizer(folder, source.bos) if ours else read_tokenizer(folder)
    if "shortformer_pos" not in config:
        return fold(lambda: wrap(read_hugging_face(folder), tokenizer, name, device))
    if source.kind == "embedded" and source.revision:
        known = checkpoints(folder.name)
        if source.revision not in known:
            raise ValueError(f"{folder.name} has no checkpoint {source.revision!r}; it has {', '.join(known)}")
        weights = known[source.revision]
    make = partial(build_shortformer, config, dequantise(load_file(weights)), name, tokenizer, device)
    return make() if config["shortformer_pos"] else fold(make)


def _check_hash(path: Path, expected: str, converted: str | None) -> None:
    """Hold a file to its SHA-256; `converted` names the model that `tools convert` can write again."""
    if path.exists():
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == expected:
                return
    remedy = f"type `python -m tools convert {converted}`" if converted else "reinstall the package"
    raise ModelUnavailable(f"{path} is {'damaged' if path.exists() else 'missing'}; {remedy}")


def _our_tokenizer(folder: Path, bos: str):
    """The tokenizer of a shipped or converted model; `bos` is the token that stands first, where not its own."""
    from transformers import PreTrainedTokenizerFast

    file, roles = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not roles.exists():
        return shipped_tokenizer(tokenizer_file=str(file)) if file.exists() else None
    # Not AutoTokenizer, which reads the 33 MB of Gemma's vocabulary several times over.
    special = read_json(roles) | ({"bos_token": bos} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_file=str(file), name_or_path=str(folder), **special)
