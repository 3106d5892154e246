"""Train the embedded models on Python source and log what the notebook on training shows.

The corpus is the source of packages that every install of this project has, so nothing is
downloaded; pandas and seaborn are held out. In three files of four the frequent identifiers are
renamed to invented words, consistently within the file: a name that was never seen before can
only be predicted by copying it. One batch in ten holds random tokens with repeated segments.
"""

import argparse
import builtins
import hashlib
import json
import keyword
import math
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

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
    parser.add_argument("name", help=", ".join(RECIPES))
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


def new_model(recipe: Recipe) -> ShortformerModel:
    """A model at step 0: normal weights, no attention biases, sinusoidal positions.

    Positions start at unit amplitude because they are added after the norm, whose output has
    unit variance: small ones leave the model without a previous-token head for long.
    """
    fields = {k: getattr(recipe, k) for k in ("d_model", "n_layers", "n_heads", "n_ctx", "d_vocab")}
    model = ShortformerModel(shortformer_config({**fields, "d_head": recipe.d_model // recipe.n_heads}))
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, weight in model.named_parameters():
        if name.endswith("bias") and "ln" not in name:
            weight.data.zero_()
            weight.requires_grad_(False)
        elif "ln" not in name:
            weight.data.normal_(0, 0.05, generator=generator)
    model.pos.weight.data.copy_(sinusoids(recipe.n_ctx, recipe.d_model))
    return model


def sinusoids(n_ctx: int, d_model: int, base: float = 10_000.0) -> Float[Tensor, "n_ctx d_model"]:
    """Unit-amplitude sine and cosine positions. Source: Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(-math.log(base) * torch.arange(0, d_model, 2) / d_model)
    angles = torch.arange(n_ctx)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, all matrices as one batch; they must be square and of one shape.

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
    adamw = torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return [Muon(matrices, recipe.matrix_lr), adamw]


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear decay to a twentieth."""
    decay = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return min((step + 1) / recipe.warmup, 1.0, max(0.05, decay))


def train_step(model, optimisers_, tokens: Int[Tensor, "batch pos"], factor: float) -> float:
    """One update at `factor` times the learning rates; returns the mean loss in nats."""
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for optimiser in optimisers_:
        for group in optimiser.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


# ---- readings ----


def legacy_state(model: ShortformerModel) -> dict[str, Tensor]:
    """The weights in the legacy layout, float32, without the attention biases, which are zero."""
    n_heads = model.cfg.n_heads
    state = {
        "embed.W_E": model.tok_embed.weight,
        "pos_embed.W_pos": model.pos.weight,
        "unembed.W_U": model.head.weight.T,
        "ln_final.w": model.ln_out.weight,
        "ln_final.b": model.ln_out.bias,
    }
    for i, block in enumerate(model.layers):
        state |= {f"blocks.{i}.ln1.w": block.ln1.weight, f"blocks.{i}.ln1.b": block.ln1.bias}
        for name, linear in (("Q", block.attn.q), ("K", block.attn.k), ("V", block.attn.v)):
            state[f"blocks.{i}.attn.W_{name}"] = linear.weight.unflatten(0, (n_heads, -1)).mT
        state[f"blocks.{i}.attn.W_O"] = block.attn.o.weight.T.unflatten(0, (n_heads, -1))
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


@dataclass(frozen=True)
class Probes:
    """The fixed tokens of every reading: held-out Python and repeated random tokens."""

    natural: Int[Tensor, "text pos"]
    repeated: Int[Tensor, "prompt pos"]
    length: int = 50

    @classmethod
    def of(cls, bridge: TransformerBridge, n_texts: int = 16) -> "Probes":
        return cls(python_source(bridge, n_texts, seed=7), repeated_tokens(bridge, cls.length, n_texts, seed=7))


def readings(bridge: TransformerBridge, probes: Probes) -> dict:
    """What is logged at a step; losses in nats, scores as lists over heads by layer."""
    natural, repeated = token_losses(bridge, probes.natural), token_losses(bridge, probes.repeated)
    induction = score_heads(bridge, probes.repeated, lambda p: induction_score(p, probes.length)).mean(0)
    previous = score_heads(bridge, probes.natural[:, :256], previous_token_score).mean(0)
    return {
        "validation_loss": natural.mean().item(),
        "loss_token_50": natural[:, 49].mean().item(),
        "loss_token_500": natural[:, 499].mean().item(),
        "in_context_score": in_context_score(natural, window=10).mean().item(),
        "first_copy_loss": repeated[:, : probes.length].mean().item(),
        # The first token of the second copy cannot be predicted by induction.
        "second_copy_loss": repeated[:, probes.length + 1 :].mean().item(),
        "induction_score": induction.tolist(),
        "previous_token_score": previous.tolist(),
        "token_losses": natural[0, :200].tolist(),
    }


def reading_steps(steps: int, n: int = 72) -> list[int]:
    """Step 0, then log-spaced steps up to the last, at least 60 where there are that many."""
    return sorted({0, steps} | {round(s) for s in np.geomspace(10, steps, n)})


# ---- the run ----


def prepare(recipe: Recipe) -> tuple[object, Int[Tensor, "n_tokens"]]:
    """Tokenizer and token stream of a recipe."""
    texts = corpus(recipe)
    tokenizer = train_tokenizer(texts[::4], recipe.d_vocab)
    n_tokens = int(recipe.steps * recipe.tokens_per_batch * 0.9)
    return tokenizer, token_stream(texts, tokenizer, n_tokens)


def losses_by_step(
    model: ShortformerModel, stream, vocab, recipe: Recipe, optimisers_, start: int = 0
) -> Iterator[tuple[int, float]]:
    """Train from step `start`, giving (number of updates made, training loss) after each."""
    model.train()
    for step in range(start, recipe.steps):
        tokens = batch_at(step, stream, vocab, recipe)
        yield step + 1, train_step(model, optimisers_, tokens, learning_rate_factor(step, recipe))


def train(name: str, folder: Path) -> list[dict]:
    """Train a named model and log it in `folder`; a killed run goes on from its last reading.

    `folder` then holds log.json, tokenizer.json, config.json, a half-precision checkpoint for
    every reading, and resume.pt.

    Raises:
        ValueError: the name is not one of `RECIPES`.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    tokenizer, stream = prepare(recipe)
    model = new_model(recipe)
    optimisers_ = optimisers(model, recipe)
    log = resume(model, optimisers_, folder / "resume.pt")
    config = model_config(recipe)
    bridge = build_shortformer(config, legacy_state(model), name, tokenizer).eval()
    probes, vocab = Probes.of(bridge), ordinary_tokens(bridge)
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    write_atomically(folder / "tokenizer.json", lambda p: tokenizer.backend_tokenizer.save(str(p)))

    def read(step: int, training_loss: float, seconds: float) -> None:
        now = build_shortformer(config, legacy_state(model), name, tokenizer).eval()
        head = {"step": step, "tokens": step * recipe.tokens_per_batch, "seconds": seconds}
        log.append(head | {"training_loss": training_loss} | readings(now, probes))
        save_reading(folder, model, optimisers_, log)

    start, began = (log[-1]["step"], time.monotonic() - log[-1]["seconds"]) if log else (0, time.monotonic())
    average = log[-1]["training_loss"] if log else math.log(recipe.d_vocab)
    if not log:
        read(0, average, 0.0)
    due = set(reading_steps(recipe.steps))
    bar = tqdm(total=recipe.steps, initial=start, desc=name, mininterval=10)
    for step, loss in losses_by_step(model, stream, vocab, recipe, optimisers_, start):
        average += 0.02 * (loss - average)
        bar.update()
        if step in due:
            read(step, average, time.monotonic() - began)
            bar.set_postfix_str(f"validation {log[-1]['validation_loss']:.3f} nats")
    finish(folder)
    return log


def model_config(recipe: Recipe) -> dict:
    """The recipe with the fields by which the loader knows a shortformer."""
    return asdict(recipe) | {
        "d_head": recipe.d_model // recipe.n_heads, "shortformer_pos": True, "normalization": "LN"
    }  # fmt: skip


def resume(model: ShortformerModel, optimisers_, state_file: Path) -> list[dict]:
    """Restore a killed run, if there is one, and return its log."""
    if not state_file.exists():
        return []
    saved = torch.load(state_file, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimiser, state in zip(optimisers_, saved["optimisers"]):
        optimiser.load_state_dict(state)
    return json.loads(saved["log"])


def save_reading(folder: Path, model: ShortformerModel, optimisers_, log: list[dict]) -> None:
    """Write the checkpoint, the log and the state to resume from, each atomically."""
    half = {key: value.half() for key, value in legacy_state(model).items()}
    saved = {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers_],
        "log": json.dumps(log),
    }
    checkpoint = folder / f"checkpoints/step{log[-1]['step']}.safetensors"
    write_atomically(checkpoint, lambda p: save_file(half, p))
    write_text(folder / "log.json", json.dumps(log) + "\n")
    write_atomically(folder / "resume.pt", lambda p: torch.save(saved, p))


# ---- shipping ----


def rounded(reading: dict, digits: int = 4) -> dict:
    """A reading with its numbers rounded, so that the log is small."""
    return json.loads(json.dumps(reading), parse_float=lambda text: round(float(text), digits))


def strongest_head(reading: dict, score: str) -> float:
    """The largest of one score over all heads at one reading."""
    return max(max(layer) for layer in reading[score])


def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eight bits a weight with one half-precision scale per row of the last axis; halves a checkpoint again."""
    packed = {}
    for key, value in state.items():
        scale = (value.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 127).half()
        packed[key] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8)
        packed[key + ".scale"] = scale
    return packed


def steps_to_ship(log: list[dict], n: int = 10) -> list[int]:
    """Step 0 and the readings nearest to even levels of the strongest induction score.

    They resolve the phase change; the last reading is the shipped model itself.
    """
    scores = np.array([strongest_head(reading, "induction_score") for reading in log[:-1]])
    levels = np.linspace(scores[0], scores.max(), n)
    return sorted({0} | {log[int(np.abs(scores - level).argmin())]["step"] for level in levels[1:]})


def ship(name: str, folder: Path) -> None:
    """Put a finished run into the package: weights, tokenizer, config, card, log, checkpoints."""
    target = WEIGHTS_FOLDER / name
    finish(folder)
    log = read_again(name, folder)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        write_atomically(target / file, lambda p, file=file: shutil.copyfile(folder / file, p))
    write_text(target / "CARD.md", model_card(name, json.loads((folder / "config.json").read_text()), log))
    earlier = set(checkpoints(name).values())
    for step in steps_to_ship(log) if name == DEFAULT_MODEL else []:
        state = load_file(folder / f"checkpoints/step{step}.safetensors")
        packed = quantise({key: value.float() for key, value in state.items()})
        place = target / f"checkpoints/step{step}.safetensors"
        earlier.discard(write_atomically(place, lambda p, s=packed: save_file(s, p)))
    for left in earlier:  # of another training; only now, so that a killed command leaves some
        left.unlink()
    write_text(target / "log.json", json.dumps([rounded(reading) for reading in log]) + "\n")


def read_again(name: str, folder: Path, n_texts: int = 32) -> list[dict]:
    """The log with every reading taken anew from its checkpoint, on more text than training can afford."""
    log, config = (json.loads((folder / file).read_text()) for file in ("log.json", "config.json"))
    tokenizer = shipped_tokenizer(tokenizer_file=str(folder / "tokenizer.json"))
    probes, read = None, []
    for reading in tqdm(log, desc=f"reading {name}", mininterval=10):
        state = load_file(folder / f"checkpoints/step{reading['step']}.safetensors")
        bridge = build_shortformer(config, state, name, tokenizer).eval()
        probes = probes or Probes.of(bridge, n_texts)
        read.append(reading | readings(bridge, probes))
    return read


def finish(folder: Path) -> None:
    """Make a finished run a model folder: the last checkpoint as its weights, their hash in its config."""
    log = json.loads((folder / "log.json").read_text())
    last = folder / f"checkpoints/step{log[-1]['step']}.safetensors"
    write_atomically(folder / "model.safetensors", lambda p: shutil.copyfile(last, p))
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256(last.read_bytes()).hexdigest()
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")


# The card of a shipped model, with places for its numbers.
_CARD = Path(__file__).with_name("card.md")


def model_card(name: str, config: dict, log: list[dict]) -> str:
    """The card of a model, with every number taken from its config and its log."""
    last = log[-1]
    width, layers = config["d_model"], config["n_layers"]
    embeddings = (2 * config["d_vocab"] + config["n_ctx"]) * width
    parameters = embeddings + layers * (4 * width**2 + 2 * width) + 2 * width
    return _CARD.read_text(encoding="utf-8").format(
        **{**config, "packages": ", ".join(config["packages"])},
        **{key: last[key] for key in last if key.endswith(("loss", "score", "_50", "_500"))},
        name=name,
        parameters=parameters,
        tokens=last["tokens"] / 1e6,
        minutes=last["seconds"] / 60,
        induction=strongest_head(last, "induction_score"),
        previous=strongest_head(last, "previous_token_score"),
    )
