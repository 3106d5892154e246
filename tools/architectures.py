"""Tiny random models of many architectures, each through `tools check`, and the page that says what was found."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from helpers.results import write_text
from helpers.stats import progress
from tools import check

COLUMNS = (
    "folded, because exact", "log-probabilities against transformers", "attention patterns",
    "sweep: mean ablation of heads", "sweep: patching the stream", "logit attribution", "weights by head",
)  # fmt: skip
SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=64, head_dim=8, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_routed_experts=4,
    first_k_dense_replace=0, n_group=1, topk_group=1,
)  # fmt: skip
LATENT = dict(num_key_value_heads=4, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, kv_lora_rank=8,
              q_lora_rank=8, head_dim=4)  # fmt: skip
# model_type -> what it needs beside SIZES, of which it takes what it knows.
KINDS = {
    "afmoe": {}, "apertus": {}, "arcee": {}, "bitnet": {}, "bloom": {}, "codegen": dict(rotary_dim=4), "cohere": {},
    "cohere2": dict(sliding_window=8), "deepseek_v2": LATENT, "deepseek_v3": LATENT, "ernie4_5": {},
    "exaone4": dict(sliding_window=8), "falcon": {}, "gemma": {}, "gemma2": dict(sliding_window=8),
    "gemma3_text": dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"]), "glm": {}, "glm4": {},
    "gpt2": {}, "gpt_bigcode": {}, "gpt_neo": dict(
        num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "gpt_neox": {}, "gpt_oss": dict(sliding_window=8), "gptj": dict(rotary_dim=4),
    "granite": dict(logits_scaling=4.0, residual_multiplier=0.5), "granitemoe": {}, "hunyuan_v1_dense": {},
    "jais2": {}, "llama": {}, "minimax_m2": {}, "ministral3": {}, "mistral": dict(sliding_window=8), "mixtral": {},
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64), "nanochat": {}, "nemotron": {}, "olmo": {},
    "olmo2": {}, "olmo3": dict(sliding_window=8), "olmoe": {}, "openai-gpt": {}, "opt": dict(ffn_dim=48), "phi": {},
    "phi3": dict(sliding_window=8), "qwen2": {}, "qwen2_moe": dict(shared_expert_intermediate_size=24), "qwen3": {},
    "qwen3_moe": {}, "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": dict(sliding_window=8),
    "vaultgemma": dict(sliding_window=8), "xglm": dict(d_model=32, ffn_dim=48),
    "bert": {}, "jamba": {}, "mamba": dict(state_size=4), "qwen3_next": {}, "recurrent_gemma": {}, "rwkv": {},
    "t5": dict(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4),
}  # fmt: skip


def build(kind: str, folder: Path) -> Path:
    """A model of a kind, every weight, gain and bias of it random, written to a folder."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    default = AutoConfig.for_model(kind)
    settable = {k for k in SIZES if hasattr(default, k) and not isinstance(getattr(type(default), k, None), property)}
    config = AutoConfig.for_model(kind, **{k: SIZES[k] for k in settable} | KINDS[kind])
    torch.manual_seed(0)
    model = (AutoModel if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    for weight in model.parameters():
        # The usual small weights leave attention almost even, so that a wrong head would go unnoticed.
        weight.data = torch.randn_like(weight) * 0.3 + (weight.ndim < 2) * weight.data
    model.save_pretrained(folder)
    return folder


def findings(kind: str) -> list[check.Finding] | str:
    """What `tools check` finds about a model of a kind, or the sentence with which loading refuses it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = build(kind, Path(temporary) / kind)
        try:
            found = check.examine(str(folder))
        except ValueError as error:
            return str(error).replace(str(folder), "it")
        return [replace(finding, found=finding.found.replace(str(folder), "it")) for finding in found]


def write_page(file: Path) -> int:
    """The page of all kinds; returns 1 when something on it is wrong."""
    rows, refused, wrong = [], [], False
    for kind in progress(sorted(KINDS), "architectures"):
        found = findings(kind)
        if isinstance(found, str):
            refused.append(f"| {kind} | {found} |")
            continue
        cells = {finding.what: f"{finding.found}{' WRONG' * (finding.good is False)}" for finding in found}
        wrong |= any(finding.good is False for finding in found)
        rows.append(f"| {kind} | {' | '.join(cells[column] for column in COLUMNS)} |")
    text = [
        "# Architectures", "",
        "Tiny models with random weights, gains and biases, written to disk, loaded and put through "
        "`python -m tools check`. Made by `python -m tools check --architectures`.", "",
        f"| model_type | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|", *rows, "",
        "## Refused when loaded", "", "| model_type | sentence |", "|---|---|", *refused, "",
    ]  # fmt: skip
    write_text(file, "\n".join(text))
    print(f"{len(rows)} architectures checked, {len(refused)} refused; see {file}")
    return int(wrong)
