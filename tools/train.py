"""Train the embedded models on Python source and log what the notebook on training shows.

The corpus is the source of packages that every install of this project has, so nothing is
downloaded; pandas and seaborn are held out. In three files of four the frequent identifiers are
renamed to invented words, consistently within the file: a name that was never seen before can
only be predicted by copying it. One batch in ten holds random tokens with repeated segments.
"""

import argparse
import builtins
import copy
import keyword
import random
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from helpers.attention import induction_score, previous_token_score, score_heads
from helpers.catalog import DEFAULT_MODEL, WEIGHTS_FOLDER
from helpers.nanogpt import shipped_tokenizer
from helpers.prompts import ordinary_tokens, python_source, repeated_tokens, source_files
from helpers.results import write_atomically, write_text
from helpers.shortformer import ShortformerModel, build_shortformer, shortformer_config
from helpers.stats import in_context_score, progress, token_losses
from tools.convert import sign

Tokens = Int[Tensor, "batch pos"]
Vocabulary = Int[Tensor, "n_ordinary"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the training of an embedded model; its config repeats it."""

    n_layers: int
    seed: int = 0
    steps: int = 5000
    n_ctx: int = 512
    d_model: int = 256
    n_heads: int = 8
    d_vocab: int = 1024
    matrix_lr: float = 0.02
    other_lr: float = 2e-3
    warmup: int = 100
    decay_from: float = 0.6
    tokens_per_batch: int = 4096
    short_ctx: int = 256
    rename_share: float = 0.75
    packages: tuple[str, ...] = ("torch", "transformers", "sympy", "networkx", "numpy", "matplotlib")
    checkpoints: tuple[int, ...] = ()  # readings of which the weights are kept


RECIPES = {
    # Between its checkpoints the strongest induction score rises by about even steps.
    "induction-2l": Recipe(n_layers=2, checkpoints=(0, 1749, 1909, 2084, 2274, 2482, 4581)),
    "induction-1l": Recipe(n_layers=1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m tools train`."""
    parser.add_argument("name", choices=RECIPES)


def main(arguments: argparse.Namespace) -> int:
    """Train a model in `training-runs/`; returns 0."""
    folder = Path("training-runs") / arguments.name
    train(arguments.name, folder)
    print(f"done; `python -m tools run --model {folder}` runs the series on it")
    return 0


# ---- corpus ----

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{3,}")
_LICENCE = re.compile(r"\A(?:#.*\n|\s*\n)+")
_KEEP = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"self"}


def invented_word(rng: random.Random) -> str:
    """Two to four syllables that no corpus holds often."""
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    syllables = [rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.randint(2, 4))]
    return "".join(s + rng.choice(consonants) if rng.random() < 0.4 else s for s in syllables)


def rename_identifiers(text: str, rng: random.Random, min_count: int = 3) -> str:
    """Give every frequent identifier of one file an invented name, the same throughout."""
    counts = Counter(_IDENTIFIER.findall(text))
    names = {}
    for name, count in counts.items():
        if count >= min_count and name not in _KEEP:
            word = invented_word(rng)
            names[name] = word.capitalize() if name[0].isupper() else word
    return _IDENTIFIER.sub(lambda match: names.get(match[0], match[0]), text)


def corpus(recipe: Recipe) -> list[str]:
    """The training files in a seeded order, without their licence headers, part of them renamed."""
    texts = [_LICENCE.sub("", text) for text in source_files(recipe.packages)]
    rng = random.Random(recipe.seed)
    rng.shuffle(texts)
    return [rename_identifiers(t, rng) if rng.random() < recipe.rename_share else t for t in texts]


def train_tokenizer(texts: list[str], d_vocab: int):
    """Byte-level BPE with `<|bos|>` as token 0, digits apart: the pipeline of the shipped tokenizer, trained anew."""
    shipped = shipped_tokenizer(tokenizer_file=str(WEIGHTS_FOLDER / DEFAULT_MODEL / "tokenizer.json"))
    return shipped.train_new_from_iterator(texts, d_vocab)


def token_stream(texts: list[str], tokenizer, n_tokens: int) -> Int[Tensor, "n_tokens"]:
    """Files one after another, each opened by BOS, until there are `n_tokens`; a ValueError where there are fewer."""
    files = ([tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in texts)
    return torch.from_numpy(np.fromiter(chain.from_iterable(files), np.int16, n_tokens))


# ---- batches ----


def repeated_segments(vocab: Vocabulary, batch: int, length: int, generator: torch.Generator) -> Tokens:
    """Random tokens, some segments of which are copies of earlier ones.

    A copy starts about as often as chance would repeat a token, so that "seen before" alone
    predicts little: only what followed the earlier occurrence does.
    """
    rows = []
    for _ in range(batch):
        order = vocab[torch.randperm(len(vocab), generator=generator)].tolist()
        row, n_new = order[:16], 16
        while len(row) < length:
            run = int(torch.randint(8, 25, (), generator=generator))
            seen = n_new / len(vocab)
            if torch.rand((), generator=generator) < 1.8 * seen / (1 + 0.8 * seen):
                start = int(torch.randint(0, max(1, len(row) - run), (), generator=generator))
                row += row[start : start + run]
            else:
                row += order[n_new : n_new + run]
                n_new += run
        rows.append(row[:length])
    return torch.tensor(rows)


def batch_at(step: int, stream: Int[Tensor, "n_tokens"], vocab: Vocabulary, recipe: Recipe) -> Tokens:
    """The batch of a step, a pure function of its arguments, so that a run can be resumed.

    Of ten steps eight hold Python at the short context, one at the full context, and one
    holds random tokens with repeated segments.
    """
    context = recipe.n_ctx if step % 10 >= 8 else recipe.short_ctx
    batch = recipe.tokens_per_batch // context
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    if step % 10 == 9:
        body = repeated_segments(vocab, batch, context - 1, generator)
    else:
        starts = torch.randint(0, len(stream) - context, (batch,), generator=generator)
        body = torch.stack([stream[s : s + context - 1] for s in starts.tolist()]).long()
    return torch.cat([torch.zeros(batch, 1, dtype=torch.long), body], dim=1)


# ---- model, optimisers, one step ----


def model_config(recipe: Recipe) -> dict:
    """The recipe with the fields by which the loader knows a shortformer."""
    return asdict(recipe) | {"d_head": recipe.d_model // recipe.n_heads, "shortformer_pos": True, "normalization": "LN"}


def new_model(recipe: Recipe) -> ShortformerModel:
    """A model at step 0: normal weights, no attention biases, positions as sines and cosines.

    Positions start at unit amplitude because they are added after the norm, whose output has
    unit variance: small ones leave the model without a previous-token head for long.
    Source of the positions: Vaswani et al. 2017, section 3.5.
    """
    model = ShortformerModel(shortformer_config(model_config(recipe)))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
    generator = torch.Generator().manual_seed(recipe.seed)
    for weight in model.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.05, generator=generator)
    angles = torch.arange(recipe.n_ctx)[:, None] * 10_000 ** (-torch.arange(0, recipe.d_model, 2) / recipe.d_model)
    model.pos.weight.data.copy_(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))
    return model.train()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, all matrices as one batch; they must be square and of one shape.

    Not torch's, which is of half precision: the shipped models were trained with this one.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers".
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(weights, dict(lr=lr, momentum=momentum))
        self.state[weights[0]]["buffer"] = torch.zeros(len(weights), *weights[0].shape)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        weights, momentum = group["params"], group["momentum"]
        gradient = torch.stack([w.grad for w in weights])
        buffer = self.state[weights[0]]["buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum)
        update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):  # Newton-Schulz
            square = update @ update.mT
            update = 3.4445 * update + (2.0315 * square @ square - 4.775 * square) @ update
        torch._foreach_add_(weights, list(update), alpha=-group["lr"])


def optimisers(model: ShortformerModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the attention matrices, AdamW for embeddings, positions, norms and unembedding."""
    matrices = [w for w in model.layers.parameters() if w.ndim == 2]
    others = [w for w in model.parameters() if w.requires_grad and all(w is not m for m in matrices)]
    return [
        Muon(matrices, recipe.matrix_lr),
        torch.optim.AdamW(others, recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear decay to a twentieth."""
    decay = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return min((step + 1) / recipe.warmup, 1.0, max(0.05, decay))


def train_step(model: ShortformerModel, optimisers_, tokens: Tokens, factor: float) -> float:
    """One update at `factor` times the learning rates; returns the mean loss in nats."""
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for optimiser in optimisers_:
        optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * factor
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


# ---- readings ----


def legacy_state(model: ShortformerModel) -> dict[str, Tensor]:
    """The weights in the legacy layout, float32, without the attention biases, which are zero."""
    bridge = build_bridge_from_module(
        copy.deepcopy(model), "TransformerLensNative", tl_config=model.cfg, tokenizer=None, model_name="trained"
    )
    weights = {key: weight.detach().contiguous() for key, weight in bridge.tl_named_parameters()}
    return {key: weight for key, weight in weights.items() if ".b_" not in key and ".mlp." not in key}


def readings(bridge: TransformerBridge, n_texts: int = 32, length: int = 50) -> dict:
    """What is logged at a step, on held-out Python and on repeated random tokens, the same at every step.

    Losses are in nats, scores lists over heads by layer.
    """
    texts, copies = python_source(bridge, n_texts, seed=7), repeated_tokens(bridge, length, n_texts, seed=7)
    natural, repeated = token_losses(bridge, texts), token_losses(bridge, copies)
    induction = score_heads(bridge, copies, lambda p: induction_score(p, length)).mean(0)
    previous = score_heads(bridge, texts[:, :256], previous_token_score).mean(0)
    return {
        "validation_loss": natural.mean().item(),
        "loss_token_50": natural[:, 49].mean().item(),
        "loss_token_500": natural[:, 499].mean().item(),
        "in_context_score": in_context_score(natural, window=10).mean().item(),
        "first_copy_loss": repeated[:, :length].mean().item(),
        # The first token of the second copy cannot be predicted by induction.
        "second_copy_loss": repeated[:, length + 1 :].mean().item(),
        "induction_score": induction.tolist(),
        "previous_token_score": previous.tolist(),
        "token_losses": natural[0, :200].tolist(),
    }


def reading_steps(steps: int, n: int = 72) -> list[int]:
    """Step 0, then log-spaced steps up to the last, at least 60 where there are that many."""
    return sorted({0, steps} | {round(s) for s in np.geomspace(10, steps, n)})


# ---- the run ----


def train(name: str, folder: Path) -> None:
    """Train a model of `RECIPES` into a folder that can be loaded; a killed run goes on from its last reading.

    Beside the model the folder then holds log.json, the checkpoints of the recipe, and resume.pt.
    """
    recipe, config = RECIPES[name], model_config(RECIPES[name])
    texts = corpus(recipe)
    tokenizer = train_tokenizer(texts[::4], recipe.d_vocab)
    stream = token_stream(texts, tokenizer, int(recipe.steps * recipe.tokens_per_batch * 0.9))
    model, log = new_model(recipe), []
    optimisers_ = optimisers(model, recipe)
    if (folder / "resume.pt").exists():
        log, *states = torch.load(folder / "resume.pt", weights_only=True)
        for part, state in zip((model, *optimisers_), states):
            part.load_state_dict(state)
    began = time.monotonic() - (log[-1]["seconds"] if log else 0)

    def bridge() -> TransformerBridge:
        return build_shortformer(config, legacy_state(model), name, tokenizer)

    def keep(file: str) -> None:
        half = {key: weight.half() for key, weight in legacy_state(model).items()}
        write_atomically(folder / file, partial(save_file, half))

    def read(step: int) -> None:
        """Log a reading, and write its checkpoint and what a killed run goes on from."""
        head = {"step": step, "tokens": step * recipe.tokens_per_batch, "seconds": time.monotonic() - began}
        log.append(head | readings(bridge()))
        if step in recipe.checkpoints:
            keep(f"checkpoints/step{step}.safetensors")
        saved = [log, *(part.state_dict() for part in (model, *optimisers_))]
        write_atomically(folder / "resume.pt", partial(torch.save, saved))

    if not log:
        read(0)
    due, vocab = reading_steps(recipe.steps), ordinary_tokens(bridge())
    for step in progress(range(log[-1]["step"], recipe.steps), name):
        tokens = batch_at(step, stream, vocab, recipe)
        train_step(model, optimisers_, tokens, learning_rate_factor(step, recipe))
        if step + 1 in due:
            read(step + 1)

    keep("model.safetensors")
    write_atomically(folder / "tokenizer.json", lambda path: tokenizer.backend_tokenizer.save(str(path)))
    write_text(folder / "log.json", pd.DataFrame(log).to_json(orient="records", double_precision=4))
    sign(folder, config)
