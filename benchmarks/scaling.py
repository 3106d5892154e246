"""How the cost of one sweep grows: python -m benchmarks.scaling [--device cuda] [--named SHAPE ...]

Every head of a model with random weights is ablated at all positions and the loss is read at the last one. Layers,
heads, prompts and tokens of a Llama vary one at a time; --named adds published shapes. Beside the seconds stand
the stock loop's (some heads, scaled to all), the multiply-adds of both, and the most that the sweep holds at once.
Writes outputs/benchmarks/scaling-DEVICE.csv and .png, and scaling.md from the tables of every device there is.
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
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

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
N_LOOP = 4  # heads that the stock loop runs


# ---- models ----


def llama(layers: int, heads: int, d_head: int = 64, d_mlp: int | None = None, vocab: int = 8192) -> LlamaConfig:
    """A Llama whose width follows from its heads."""
    return LlamaConfig(
        vocab_size=vocab, hidden_size=heads * d_head, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=d_mlp or 3 * heads * d_head, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def named() -> dict[str, PreTrainedConfig]:
    """Published shapes, from the models' configurations."""
    return {
        "500 M Llama": llama(layers=24, heads=20),
        "Pythia-410M": GPTNeoXConfig(
            vocab_size=50304, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            rotary_pct=0.25, architectures=["GPTNeoXForCausalLM"],
        ),
        "Gemma 3 1B": Gemma3TextConfig(
            vocab_size=262144, hidden_size=1152, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
            head_dim=256, intermediate_size=6912, sliding_window=512, architectures=["Gemma3ForCausalLM"],
        ),
        "Llama 7B": llama(layers=32, heads=32, d_head=128, d_mlp=11008, vocab=32000),
    }  # fmt: skip


def random_model(config: PreTrainedConfig, device: str) -> TransformerBridge:
    """A bridge around random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    bridge = build_bridge_from_module(model, config.architectures[0], hf_config=config, model_name="random")
    return bridge.eval().requires_grad_(False)


# ---- measuring ----


def multiply_adds(block: int, unembed: int, layers: int, heads: int, prompts: int, tokens: int) -> tuple[float, float]:
    """Of the stock loop and of an exact sweep; `block` and `unembed` are the weights that one token meets."""
    loop = layers * heads * tokens * (layers * block + unembed)
    sweep = heads * tokens * block * layers * (layers + 1) / 2 + layers * heads * unembed
    return prompts * loop, prompts * sweep


def seconds(run, device: str) -> float:
    """The faster of two calls, or the first where it takes more than a minute."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if times[0] > 60:
            break
    return min(times)


def held(run, device: str) -> float:
    """The most that a call holds at once beyond what was held before it, in MiB."""
    if device == "cpu":
        return oracles.peak_bytes(run) / 2**20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(varied: str, config: PreTrainedConfig, prompts: int, tokens: int, device: str) -> dict:
    """One row of the table.

    Raises:
        RuntimeError: the sweep's effects are not the stock loop's.
    """
    model = random_model(config, device)
    cfg, block = model.cfg, sum(w.numel() for w in model.original_model.parameters() if w.ndim == 2)
    sizes = {"layers": cfg.n_layers, "heads": cfg.n_heads, "prompts": prompts, "tokens": tokens}
    unembed = cfg.d_model * cfg.d_vocab
    tables = unembed * (1 if config.tie_word_embeddings else 2)
    row = {"varied": varied, **sizes, "weights_millions": (block - tables + unembed) / 1e6}
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(1, cfg.d_vocab, (prompts, tokens), generator=generator).to(device)
    cross_entropy = torch.nn.functional.cross_entropy
    metric = Metric((-1,), lambda logits, rows: cross_entropy(logits[:, 0], batch[rows, 0], reduction="none"))
    some = [(layer, 0) for layer in np.linspace(0, cfg.n_layers - 1, N_LOOP).astype(int).tolist()]
    effects = ablate_heads(model, batch, metric)
    stock = oracles.ablation_loop(model, batch, metric, "zero", heads=some)
    for layer, head in some:
        error = float((effects[:, layer, head].cpu() - stock[:, layer, head].cpu()).abs().max())
        if error > 1e-3:
            raise RuntimeError(f"{varied}: head {layer}.{head} differs from the stock loop by {error:.1e} nats")
    row["sweep_s"] = seconds(lambda: ablate_heads(model, batch, metric), device)
    loop = seconds(lambda: oracles.ablation_loop(model, batch, metric, "zero", heads=some), device)
    row["loop_s"] = loop * cfg.n_layers * cfg.n_heads / len(some)
    counts = multiply_adds((block - tables) // cfg.n_layers, unembed, **sizes)
    row["loop_multiply_adds"], row["sweep_multiply_adds"] = counts
    row["peak_mb"] = held(lambda: ablate_heads(model, batch, metric), device)
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


# ---- showing ----


def figure(table: pd.DataFrame) -> Figure:
    """Seconds of the sweep and of the loop against each size, on logarithmic axes."""
    chart, axes = plots.subplots(1, len(STEPS), figsize=(14, 3.8), sharey=True)
    for axis, varied in zip(axes, STEPS):
        rows = table[table["varied"] == varied]
        axis.plot(rows[varied], rows["loop_s"], "s--", color=plots.PALETTE[3], label="stock loop")
        axis.plot(rows[varied], rows["sweep_s"], "o-", color=plots.PALETTE[0], label="sweep")
        axis.set(xscale="log", yscale="log", xlabel=varied)
        axis.set_xticks(STEPS[varied], map(str, STEPS[varied]))
        axis.minorticks_off()
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    return chart


def section(table: pd.DataFrame, device: str) -> list[str]:
    """One device's table, and its estimate for a model of seven thousand million weights."""
    largest = table.loc[table[table["varied"] != "Llama 7B"]["weights_millions"].idxmax()]
    rate = largest["sweep_multiply_adds"] / largest["sweep_s"]
    config = named()["Llama 7B"]
    block = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    unembed = config.hidden_size * config.vocab_size
    _, big = multiply_adds(block, unembed, config.num_hidden_layers, config.num_attention_heads, 8, 32)
    shown = table.assign(bound=table["loop_multiply_adds"] / table["sweep_multiply_adds"])
    shown = shown.assign(times_faster=table["loop_s"] / table["sweep_s"])
    shown = shown.drop(columns=["loop_multiply_adds", "sweep_multiply_adds", "machine"])
    name = f"{largest['weights_millions']:.0f} million weights"
    return [
        f"## {table['machine'].iloc[0]}", "", *markdown_table(shown.round(3)), "",
        f"The model of {name} runs at {rate / 1e9:,.0f} thousand million multiply-adds a second. At that rate a sweep "
        f"over a 7 B model (32 layers of 32 heads of 128; 8 prompts of 32 tokens; {big:.1e} multiply-adds) takes "
        f"{big / rate / 60:,.1f} minutes on this machine.", "",
        f"![Seconds of a sweep and of the stock loop against layers, heads, prompts and tokens](scaling-{device}.png)",
        "",
    ]  # fmt: skip


def write_page() -> Path:
    """The page of all devices whose tables are there."""
    lines = [
        "# How the cost of a sweep grows", "",
        "Every head ablated at all positions, loss read at the last one, random weights in single precision; "
        "seconds of the faster of two runs, or of one that takes more than a minute. Made by "
        f"`python -m benchmarks.scaling`. The stock loop runs {N_LOOP} heads and is scaled to all; its effects and the "
        "sweep's are the same to 1e-3 nats. `bound` is how "
        "many times fewer multiply-adds an exact sweep needs; `peak_mb` is what it holds beside the weights, in MiB.",
        "",
    ]  # fmt: skip
    for path in sorted(OUT.glob("scaling-*.csv")):
        lines += section(pd.read_csv(path), path.stem.removeprefix("scaling-"))
    return write_text(OUT / "scaling.md", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--named", nargs="*", default=["500 M Llama"], choices=list(named()), metavar="SHAPE")
    arguments = parser.parse_args()
    device = arguments.device
    cpu = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
    machine = cpu if device == "cpu" else torch.cuda.get_device_name()
    sizes = [(varied, BASE | {varied: n}) for varied, steps in STEPS.items() for n in steps]
    runs = [(varied, llama(s["layers"], s["heads"]), s["prompts"], s["tokens"]) for varied, s in sizes]
    runs += [(name, named()[name], BASE["prompts"], BASE["tokens"]) for name in arguments.named]
    table = pd.DataFrame([measure(*run, device) for run in runs]).assign(machine=machine)
    plots.use_style()
    stem = OUT / f"scaling-{device}"
    write_atomically(stem.with_suffix(".csv"), lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    write_atomically(stem.with_suffix(".png"), lambda path: figure(table).savefig(path, format="png"))
    print(f"see {write_page()}")


if __name__ == "__main__":
    main()
