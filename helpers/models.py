"""One function, `load`: every model as a TransformerLens `TransformerBridge`, in evaluation mode, gradients off.

Hugging Face models are put into compatibility mode (layer norms folded, writing weights centred, value
biases folded), because the published numbers were taken so. Shortformer models are not: folding the norm's
weights into Q and K is wrong where positions are added after the norm.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from helpers.catalog import DEFAULT_MODEL, ModelUnavailable, Source, checkpoints, model_folder, resolve
from helpers.nanogpt import read_nanogpt, shipped_tokenizer
from helpers.shortformer import build_shortformer, dequantise


def pick_device(device: str | None = None) -> str:
    """The device asked for, else cuda where there is one, else cpu."""
    # Never mps unasked: TransformerLens refuses it too, because of wrong results.
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def load(name: str = DEFAULT_MODEL, device: str | None = None) -> TransformerBridge:
    """Load a model by table name, local folder, nanoGPT checkpoint, or hub id `owner/name`.

    A training checkpoint is written `induction-2l@step0`, `pythia-70m@step1000` or, by the number in
    its file's name, `attn-only-2l@1234`. One name on one device is one object, shared by all who ask for
    it until four others were loaded; sweeps leave it as it was, and so must hooks that you add.
    `bridge.compatibility_mode` says whether weights were folded.

    Raises:
        ValueError: the name is neither in the table, nor a path to a model, nor a hub id.
        ModelUnavailable: the weights cannot be had here now, or fail their hash.
    """
    return _shared(name, pick_device(device))


@lru_cache(maxsize=4)
def _shared(name: str, device: str) -> TransformerBridge:
    return read(name, device)


def read(name: str, device: str = "cpu") -> TransformerBridge:
    """What `load` gives, but an object of the caller's own."""
    source = resolve(name)
    if source.kind == "nanogpt":
        bridge = _wrap(*read_nanogpt(Path(source.repo)), name, device)
    else:
        bridge = _read_folder(model_folder(name, source), name, device, source)
    return bridge.eval().requires_grad_(False)


def layout(model: TransformerBridge) -> dict:
    """How attention is laid out: how many heads and keys a layer has, and which layers see the whole prompt."""
    cfg, config = model.cfg, getattr(model.original_model, "config", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * cfg.n_layers
    return {
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "n_key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
        "d_vocab": cfg.d_vocab,
        "global_layers": [layer for layer, kind in enumerate(kinds) if kind == "full_attention"],
    }


def _read_folder(folder: Path, name: str, device: str, source: Source) -> TransformerBridge:
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json, so it is not a model folder")
    config, weights = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    if "sha256" in config:
        check_hash(weights, config["sha256"], name if source.kind != "embedded" else None)
    tokenizer = read_tokenizer(folder, "sha256" in config, source.bos)
    if "shortformer_pos" not in config:
        return _wrap(_read_hugging_face(folder), tokenizer, name, device)
    if source.kind == "embedded" and source.revision:
        weights = _checkpoint(folder.name, source.revision)
    bridge = build_shortformer(config, dequantise(load_file(weights)), name, tokenizer, device)
    if not config["shortformer_pos"]:
        bridge.enable_compatibility_mode()
    return bridge


def check_hash(path: Path, expected: str, converted: str | None) -> None:
    """Hold a file to its SHA-256; `converted` names the model that `tools convert` can write again.

    Raises:
        ModelUnavailable: the file is missing or another one.
    """
    remedy = f"type `python -m tools convert {converted}`" if converted else "reinstall the package"
    if not path.exists():
        raise ModelUnavailable(f"{path} is missing; {remedy}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelUnavailable(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {expected[:12]}…; {remedy}"
        )


def _checkpoint(model: str, label: str) -> Path:
    known = checkpoints(model)
    if label not in known:
        raise ValueError(f"{model} has no checkpoint {label!r}; it has {', '.join(known)}")
    return known[label]


def read_tokenizer(folder: Path, ours: bool = False, bos: str = ""):
    """The tokenizer in a model's folder, or None.

    `ours`: the folder is shipped or converted; `bos`: the token that stands first, where it is not its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file, roles = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not roles.exists():
        return shipped_tokenizer(tokenizer_file=str(file)) if file.exists() else None
    if not ours:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # AutoTokenizer reads the 33 MB of Gemma's vocabulary several times over.
    special = json.loads(roles.read_text()) | ({"bos_token": bos} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_file=str(file), name_or_path=str(folder), **special)


def _read_hugging_face(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    # Eager attention, because the bridge reads patterns; float32, because scores are compared.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def _wrap(model: torch.nn.Module, tokenizer, name: str, device: str) -> TransformerBridge:
    if tokenizer is not None:
        # Else TransformerLens reads it again from where it came, at another revision, perhaps over the network.
        tokenizer.init_kwargs["add_bos_token"] = True
    # Not `boot_transformers`: that looks for a tokenizer on the hub when there is none.
    bridge = build_bridge_from_module(
        model.to(device), type(model).__name__, hf_config=model.config, tokenizer=tokenizer, model_name=name
    )
    _fold(bridge)
    return bridge


def _fold(bridge: TransformerBridge) -> None:
    """Compatibility mode. One-shot and irreversible, so it belongs here and never in a notebook."""
    # Two of its steps copy every weight, a second or more for Gemma 3: the one is left out where there are no
    # biases to fold, the other, which only takes the mean token from the unembedding, is done in place.
    biases = any(name.endswith("bias") for name, _ in bridge.blocks.named_parameters())
    bridge.enable_compatibility_mode(center_unembed=False, fold_value_biases=biases)
    if (bridge.cfg.output_logits_soft_cap or 0) > 0:
        return  # a capped logit is not what it was after a shift
    with torch.no_grad():
        for name, weight in bridge.unembed.original_component.state_dict().items():
            weight -= weight.mean() if name.endswith("bias") else weight.mean(0)
