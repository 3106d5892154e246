"""How the cost of one sweep grows: python -m benchmarks.scaling [--device cuda] [--large]

Every head of a random Llama is ablated, all positions, the loss read at the last one; layers, heads, prompts and
tokens vary one at a time. Beside the seconds stand the stock loop's (some heads, scaled to all), the multiply-adds
of both, and the most that the sweep holds at once. Writes outputs/benchmarks/scaling.csv, .md and .png.
"""

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers import plots
from helpers.interventions import ablate_heads
from helpers.metrics import Metric
from helpers.results import write_atomically, write_text
from tests import oracles
from tools.report import markdown_table

OUT = Path("outputs/benchmarks")
BASE = dict(layers=6, heads=8, prompts=8, tokens=32)
STEPS = {
    "layers": (2, 4, 6, 12, 24), "heads": (2, 4, 8, 16), "prompts": (2, 4, 8, 16, 32), "tokens": (8, 16, 32, 64, 128),
}  # fmt: skip
LARGE = [dict(layers=24, heads=16, prompts=8, tokens=32), dict(layers=28, heads=20, prompts=8, tokens=32)]
D_HEAD, D_VOCAB, N_LOOP = 64, 8192, 4


def model_of(layers: int, heads: int, device: str) -> TransformerBridge:
    """A random Llama whose width follows from its heads of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=D_VOCAB, hidden_size=heads * D_HEAD, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=3 * heads * D_HEAD, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device)
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=config, model_name="random-llama")
    return bridge.eval().requires_grad_(False)


def multiply_adds(layers: int, heads: int, prompts: int, tokens: int) -> tuple[float, float]:
    """Of the stock loop and of an exact sweep, as section "bound" of benchmarks/sweeps.py counts them."""
    d_model = heads * D_HEAD
    block, unembed = 4 * d_model**2 + 9 * d_model**2, d_model * D_VOCAB
    loop = layers * heads * tokens * (layers * block + unembed)
    sweep = heads * tokens * block * layers * (layers + 1) / 2 + layers * heads * unembed
    return prompts * loop, prompts * sweep


def seconds(run, device: str) -> float:
    """The faster of two calls."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(varied: str, sizes: dict, device: str) -> dict:
    """One row of the table."""
    model = model_of(sizes["layers"], sizes["heads"], device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, D_VOCAB, (sizes["prompts"], sizes["tokens"]), generator=generator).to(device)
    cross_entropy = torch.nn.functional.cross_entropy
    metric = Metric((-1,), lambda logits, rows: cross_entropy(logits[:, 0], tokens[rows, 0], reduction="none"))
    heads = [(layer, 0) for layer in np.linspace(0, sizes["layers"] - 1, N_LOOP).astype(int).tolist()]
    weights = sum(weight.numel() for weight in model.original_model.parameters())
    row = {"varied": varied, **sizes, "weights_millions": weights / 1e6}
    row["sweep_s"] = seconds(lambda: ablate_heads(model, tokens, metric), device)
    loop = seconds(lambda: oracles.ablation_loop(model, tokens, metric, "zero", heads=heads), device)
    row["loop_s"] = loop * sizes["layers"] * sizes["heads"] / len(heads)
    row["loop_multiply_adds"], row["sweep_multiply_adds"] = multiply_adds(**sizes)
    if device == "cpu":
        row["peak_mb"] = oracles.peak_bytes(lambda: ablate_heads(model, tokens, metric)) / 2**20
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def figure(table: pd.DataFrame) -> Figure:
    """Seconds of the sweep and of the loop against each size, on logarithmic axes."""
    chart, axes = plots.subplots(1, len(STEPS), figsize=(14, 3.8), sharey=True)
    for axis, varied in zip(axes, STEPS):
        rows = table[table["varied"] == varied]
        axis.plot(rows[varied], rows["loop_s"], "s--", color=plots.PALETTE[3], label="stock loop")
        axis.plot(rows[varied], rows["sweep_s"], "o-", color=plots.PALETTE[0], label="sweep")
        axis.set(xscale="log", yscale="log", xlabel=varied)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    return chart


def page(table: pd.DataFrame, machine: str) -> str:
    """The table for readers, with the estimate for a model of seven thousand million weights."""
    rate = (table["sweep_multiply_adds"] / table["sweep_s"]).median()
    big = multiply_adds(layers=32, heads=64, prompts=8, tokens=32)[1]  # 32 layers of width 4096, as 7 B models have
    shown = table.assign(times_faster=table["loop_s"] / table["sweep_s"])
    shown = shown.drop(columns=["loop_multiply_adds", "sweep_multiply_adds"])
    lines = [
        "# How the cost of a sweep grows", "",
        f"Every head ablated, loss read at the last position, random Llamas; {machine}. Made by",
        "`python -m benchmarks.scaling`. The loop runs some heads and is scaled to all.", "",
        *markdown_table(shown.round(3)), "",
        f"The median rate is {rate / 1e9:.1f} thousand million multiply-adds a second. At that rate a sweep over a 7 B "
        f"model (32 layers of width 4,096, 8 prompts of 32 tokens, {big:.1e} multiply-adds) takes "
        f"{big / rate / 3600:.1f} hours on this machine; divide by the ratio of speeds for another.", "",
        "![seconds against size](scaling.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="also models of some 400 and 800 million weights")
    arguments = parser.parse_args()
    sizes = [(varied, BASE | {varied: n}) for varied, steps in STEPS.items() for n in steps]
    sizes += [("large", large) for large in LARGE if arguments.large]
    table = pd.DataFrame([measure(varied, size, arguments.device) for varied, size in sizes])
    on_cpu = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
    machine = on_cpu if arguments.device == "cpu" else torch.cuda.get_device_name()
    plots.use_style()
    write_atomically(OUT / "scaling.csv", lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    write_atomically(OUT / "scaling.png", lambda path: figure(table).savefig(path, format="png"))
    write_text(OUT / "scaling.md", page(table, machine))


if __name__ == "__main__":
    main()
