"""Train the embedded models on Python source and log what the notebook on training shows.

The corpus is the source of packages that every install of this project has, so nothing is
downloaded; pandas and seaborn are held out. In three files of four the frequent identifiers are
renamed to invented words, consistently within the file: a name that was never seen before can
only be predicted by copying it. One batch in ten holds random tokens with repeated segments.
"""

import argparse
import builtins
import copy
import hashlib
import json
import keyword
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from helpers.attention import induction_score, previous_token_score, score_heads
from helpers.catalog import DEFAULT_MODEL, WEIGHTS_FOLDER, checkpoints
from helpers.nanogpt import shipped_tokenizer
from helpers.prompts import ordinary_tokens, python_source, repeated_tokens, source_files
from helpers.results import write_atomically, write_text
from helpers.shortformer import ShortformerModel, build_shortformer, shortformer_config
from helpers.stats import in_context_score, token_losses


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


RECIPES = {"induction-2l": Recipe(n_layers=2), "induction-1l": Recipe(n_layers=1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--folder", type=Path, default=Path("training-runs"), metavar="DIR")
    parser.add_argument("--ship", action="store_true", help="put the result into the package")


def main(arguments: argparse.Namespace) -> int:
    folder = arguments.folder / arguments.name
    train(arguments.name, folder)
    print(f"done; `python -m tools run --model {folder}` runs the series on it")
    if arguments.ship:
        ship(arguments.name, folder)
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
    """Byte-level BPE with `<|bos|>` as token 0, digits apart; returns a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab, special_tokens=["<|bos|>"], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return shipped_tokenizer(tokenizer_object=tokenizer)


def token_stream(texts: list[str], tokenizer, n_tokens: int) -> Int[Tensor, "n_tokens"]:
    """Files one after another, each opened by BOS, until there are `n_tokens`.

    Raises:
        ValueError: the texts hold fewer tokens than asked for.
    """
    parts, total = [], 0
    for start in range(0, len(texts), 128):
        for ids in tokenizer(texts[start : start + 128], add_special_tokens=False)["input_ids"]:
            parts.append(np.array([tokenizer.bos_token_id, *ids], dtype=np.int16))
            total += len(parts[-1])
        if total >= n_tokens:
            return torch.from_numpy(np.concatenate(parts)[:n_tokens])
    raise ValueError(f"the corpus holds {total} tokens, {n_tokens} are needed; install more packages or train less")


# ---- batches ----


def repeated_segments(
    vocab: Int[Tensor, "n_ordinary"], batch: int, length: int, generator: torch.Generator
) -> Int[Tensor, "batch length"]:
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


def batch_at(
    step: int, stream: Int[Tensor, "n_tokens"], vocab: Int[Tensor, "n_ordinary"], recipe: Recipe
) -> Int[Tensor, "batch pos"]:
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
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, weight in model.named_parameters():
        if name.endswith("bias") and "ln" not in name:
            weight.data.zero_()
            weight.requires_grad_(False)
        elif "ln" not in name:
            weight.data.normal_(0, 0.05, generator=generator)
    angles = torch.arange(recipe.n_ctx)[:, None] * 10_000 ** (-torch.arange(0, recipe.d_model, 2) / recipe.d_model)
    model.pos.weight.data.copy_(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))
    return model


def optimisers(model: ShortformerModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the attention matrices, AdamW for embeddings, positions, norms and unembedding.

    The shipped models were trained with a Muon of single precision; torch's is of half, and its results drift by 1 %.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers".
    """
    matrices = [w for w in model.layers.parameters() if w.ndim == 2]
    others = [w for w in model.parameters() if w.requires_grad and all(w is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, recipe.matrix_lr, weight_decay=0),
        torch.optim.AdamW(others, recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear decay to a twentieth."""
    decay = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return min((step + 1) / recipe.warmup, 1.0, max(0.05, decay))


def losses_by_step(
    model: ShortformerModel, stream, vocab, recipe: Recipe, optimisers_, start: int = 0
) -> Iterator[tuple[int, float]]:
    """Train from step `start`, giving (number of updates made, training loss in nats) after each."""
    for step in range(start, recipe.steps):
        tokens = batch_at(step, stream, vocab, recipe)
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        for optimiser in optimisers_:
            optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * learning_rate_factor(step, recipe)
            optimiser.step()
            optimiser.zero_grad()
        yield step + 1, loss.item()


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

    Beside the model the folder then holds log.json, a checkpoint for every reading, and resume.pt.
    """
    recipe, config = RECIPES[name], model_config(RECIPES[name])
    texts = corpus(recipe)
    tokenizer = train_tokenizer(texts[::4], recipe.d_vocab)
    stream = token_stream(texts, tokenizer, int(recipe.steps * recipe.tokens_per_batch * 0.9))
    model = new_model(recipe).train()
    optimisers_ = optimisers(model, recipe)
    log = resume(model, optimisers_, folder)
    began = time.monotonic() - (log[-1]["seconds"] if log else 0)

    def bridge() -> TransformerBridge:
        return build_shortformer(config, legacy_state(model), name, tokenizer)

    def read(step: int) -> None:
        head = {"step": step, "tokens": step * recipe.tokens_per_batch, "seconds": time.monotonic() - began}
        log.append(head | readings(bridge()))
        save_reading(folder, model, optimisers_, log)

    if not log:
        read(0)
    start, due = log[-1]["step"], reading_steps(recipe.steps)
    steps = losses_by_step(model, stream, ordinary_tokens(bridge()), recipe, optimisers_, start)
    for step, _ in tqdm(steps, name, total=recipe.steps, initial=start, mininterval=10):
        if step in due:
            read(step)

    half = {key: weight.half() for key, weight in legacy_state(model).items()}
    weights = write_atomically(folder / "model.safetensors", lambda p: save_file(half, p))
    write_atomically(folder / "tokenizer.json", lambda p: tokenizer.backend_tokenizer.save(str(p)))
    config["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    table = pd.DataFrame(log)
    write_atomically(folder / "log.json", lambda p: table.to_json(p, orient="records", double_precision=4))


def resume(model: ShortformerModel, optimisers_, folder: Path) -> list[dict]:
    """Restore the killed run of a folder, if there is one, and return its log."""
    if not (folder / "resume.pt").exists():
        return []
    saved = torch.load(folder / "resume.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    for optimiser, state in zip(optimisers_, saved["optimisers"]):
        optimiser.load_state_dict(state)
    return saved["log"]


def save_reading(folder: Path, model: ShortformerModel, optimisers_, log: list[dict]) -> None:
    """Write the checkpoint of the last reading and the state to resume from, each atomically."""
    packed = quantise(legacy_state(model))
    write_atomically(folder / f"checkpoints/step{log[-1]['step']}.safetensors", lambda p: save_file(packed, p))
    saved = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers_], "log": log}
    write_atomically(folder / "resume.pt", lambda p: torch.save(saved, p))


def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eight bits a weight, with one half-precision scale for each row of the last axis."""
    packed = {}
    for key, value in state.items():
        scale = (value.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 127).half()
        packed[key] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8)
        packed[key + ".scale"] = scale
    return packed


# ---- shipping ----


def steps_to_ship(log: list[dict], n: int = 10) -> list[int]:
    """Step 0 and the readings nearest to even levels of the strongest induction score, which resolve its rise.

    The last reading is not among them: it is the shipped model itself.
    """
    scores = np.array([np.max(reading["induction_score"]) for reading in log[:-1]])
    levels = np.linspace(scores[0], scores.max(), n)
    return sorted({0} | {log[int(np.abs(scores - level).argmin())]["step"] for level in levels[1:]})


def ship(name: str, folder: Path) -> None:
    """Put a finished run into the package, where its CARD.md, written by hand, is held to its log by a test."""
    files = ["config.json", "tokenizer.json", "model.safetensors", "log.json"]
    if name == DEFAULT_MODEL:
        log = json.loads((folder / "log.json").read_text())
        files += [f"checkpoints/step{step}.safetensors" for step in steps_to_ship(log)]
    target = WEIGHTS_FOLDER / name
    shipped = [write_atomically(target / file, partial(shutil.copyfile, folder / file)) for file in files]
    for left in set(checkpoints(name).values()).difference(shipped):  # of another training
        left.unlink()
