"""Tiny random models of many architectures, each through `tools check`, and the page that says what was found."""

import tempfile
from contextlib import chdir
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from helpers.models import read
from helpers.results import write_text
from helpers.stats import progress
from tools import check
from tools.report import markdown_table

# Every configuration takes what it knows of these.
SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=64, head_dim=8, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_routed_experts=4,
    first_k_dense_replace=0, n_group=1, topk_group=1, rotary_dim=4, sliding_window=8, window_size=8, state_size=4,
    shared_expert_intermediate_size=24, d_model=32, d_ff=48, d_kv=8, ffn_dim=48, num_heads=4, num_layers=2,
    n_heads=4, n_layers=2, max_seq_len=64, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, kv_lora_rank=8,
    q_lora_rank=8, logits_scaling=4.0, residual_multiplier=0.5,
)  # fmt: skip
KINDS = (
    "afmoe apertus arcee bert bitnet bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 falcon "
    "gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe "
    "hunyuan_v1_dense jais2 jamba llama mamba minimax_m2 ministral3 mistral mixtral mpt nanochat nemotron olmo olmo2 "
    "olmo3 olmoe openai-gpt opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss "
    "smollm3 stablelm starcoder2 t5 vaultgemma xglm"
).split()
OTHER = {
    "deepseek_v2": dict(num_key_value_heads=4, head_dim=4),
    "deepseek_v3": dict(num_key_value_heads=4, head_dim=4),
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"]),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
}


def build(kind: str, folder: Path) -> None:
    """A model of a kind, every weight, gain and bias of it random, written to a folder."""
    default = AutoConfig.for_model(kind)
    settable = {k for k in SIZES if hasattr(default, k) and not isinstance(getattr(type(default), k, None), property)}
    config = AutoConfig.for_model(kind, **{k: SIZES[k] for k in settable} | OTHER.get(kind, {}))
    torch.manual_seed(0)
    model = (AutoModel if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    for weight in model.parameters():
        # The usual small weights leave attention almost even, so that a wrong head would go unnoticed.
        weight.data = torch.randn_like(weight) * 0.3 + (weight.ndim < 2) * weight.data
    model.save_pretrained(folder)


def findings(kind: str) -> list[check.Finding]:
    """What `tools check` finds about a model of a kind, or the one sentence with which loading refuses it."""
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        build(kind, Path("it"))  # which sentences about it then call it
        try:
            return check.examine(read("it"), "it")
        except ValueError as error:
            return [check.Finding("refused when loaded", str(error))]


def write_page(file: Path) -> int:
    """The page of all kinds, a row each; returns 1 when something on it is wrong."""
    rows = []
    for kind in progress(KINDS, "architectures"):
        found = findings(kind)[-7:]  # what is folded, and the checks
        rows.append({"model_type": kind} | {one.what: one.found + " WRONG" * (one.good is False) for one in found})
    what = (
        "Tiny models with random weights, gains and biases, written to disk, loaded and put through "
        "`python -m tools check`. Made by `python -m tools check --architectures`."
    )
    page = "\n".join(["# Architectures", "", what, "", *markdown_table(pd.DataFrame(rows)), ""])
    write_text(file, page)
    return int("WRONG" in page)
