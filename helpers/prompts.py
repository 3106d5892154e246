"""Token batches. Every batch is a tensor of token ids that starts with BOS; strings are never
passed to a model, because tokenisers and TransformerLens differ in how they treat BOS."""

import hashlib
import random
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from string import ascii_uppercase

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, each ending in its answer, which the model predicts at position -2."""

    tokens: Int[Tensor, "batch pos"]

    @property
    def answers(self) -> Int[Tensor, "batch"]:
        """The last token of every prompt."""
        return self.tokens[:, -1]


@dataclass(frozen=True)
class Pair:
    """Clean and corrupted prompts that differ only where the corruption was made."""

    clean: Prompts
    corrupted: Prompts


def bos_id(model: TransformerBridge) -> int:
    """The id put at position 0: BOS, else end of text, else token 0."""
    ids = [getattr(model.tokenizer, f"{role}_token_id", None) for role in ("bos", "eos")]
    return next((i for i in ids if i is not None and i < model.cfg.d_vocab), 0)


def ordinary_tokens(model: TransformerBridge) -> Int[Tensor, "n_ordinary"]:
    """Ids of the tokens that are not special and that decode, alone, to printable text.

    A model without a tokenizer offers its whole vocabulary but token 0.
    """
    if model.tokenizer is None:
        return torch.arange(1, model.cfg.d_vocab)
    n = min(model.cfg.d_vocab, len(model.tokenizer))
    special = {bos_id(model), *model.tokenizer.all_special_ids}
    special |= {i for i, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    texts = [text.strip() for text in token_strings(model, torch.arange(n))]
    plain = [i for i, text in enumerate(texts) if text and text.isprintable() and "\ufffd" not in text]
    return torch.tensor([i for i in plain if i not in special])


def fitting(model: TransformerBridge, length: int, copies: int = 2) -> int:
    """The length asked for, or the largest at which BOS and `copies` copies fit a tiny model.

    They must fit the context, and the vocabulary must hold as many different tokens, which the
    unrepeated control draws. Raises ValueError where not even two tokens fit.
    """
    n_ctx, n_ordinary = model.cfg.n_ctx, len(ordinary_tokens(model))
    length = min(length, (n_ctx - 1) // copies, n_ordinary // copies)
    if length < 2:
        raise ValueError(f"{copies} copies of 2 tokens do not fit {n_ctx} positions and {n_ordinary} ordinary tokens")
    return length


def derangement(n: int, seed: int | torch.Generator) -> Int[Tensor, "n"]:
    """Another prompt for each of `n`: the next one along a random cycle through all of them."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def with_bos(model: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos_1"]:
    """Prepend BOS and move to the model's device. Raises ValueError where the batch is empty or exceeds the context."""
    if tokens.numel() == 0:
        raise ValueError(f"empty batch of shape {tuple(tokens.shape)}")
    if tokens.shape[1] + 1 > model.cfg.n_ctx:
        raise ValueError(f"{tokens.shape[1] + 1} tokens do not fit the context of {model.cfg.n_ctx}")
    bos = torch.full((len(tokens), 1), bos_id(model), dtype=torch.long)
    return torch.cat([bos, tokens.cpu()], dim=1).to(model.cfg.device)


def random_tokens(model: TransformerBridge, length: int, batch: int, seed: int) -> Int[Tensor, "batch length"]:
    """Ordinary tokens, uniform, without replacement within a row."""
    vocab = ordinary_tokens(model)
    if length > len(vocab):
        raise ValueError(f"length {length} exceeds the {len(vocab)} ordinary tokens")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([vocab[torch.randperm(len(vocab), generator=generator)[:length]] for _ in range(batch)])


def repeated_tokens(model: TransformerBridge, length=50, batch=8, seed=0, copies=2) -> Int[Tensor, "batch pos"]:
    """[BOS, r, r] with |r| = length: the sequences on which induction is scored.

    After Olsson et al. 2022, "In-context Learning and Induction Heads", appendix, who write a shorter r four times.
    """
    return with_bos(model, random_tokens(model, length, batch, seed).repeat(1, copies))


def letters_task(model: TransformerBridge, n_prompts: int = 64) -> Prompts:
    """A B n1 .. n32 A -> B over A to Z, with a leading space if the tokenizer needs it; no noise is A or B.

    Raises ValueError where neither form of the letters is 26 different single tokens that the tokenizer knows.
    """
    for prefix in (" ", ""):
        ids = [encode(model, prefix + letter) for letter in ascii_uppercase]
        known = {i[0] for i in ids if len(i) == 1} - {model.tokenizer.unk_token_id}
        if len(known) == 26:
            break
    else:
        raise ValueError(f"A to Z are not 26 single tokens for {model.cfg.model_name}; skip the letters task")
    rng, rows = random.Random(42), []  # as for the published numbers
    for _ in range(n_prompts):
        a, b, *others = rng.sample([i for (i,) in ids], 26)
        rows.append([a, b, *rng.choices(others, k=32), a, b])
    return Prompts(with_bos(model, torch.tensor(rows)))


def repeat_task(model: TransformerBridge, length: int = 30, k: int = 1, batch: int = 32, seed: int = 0) -> Pair:
    """[BOS, r, r[:k]] -> r[k], |r| = length, against the same with another token for r[k] in the first copy.

    Only position 1 + k differs; r[k] occurs nowhere else in the corrupted prompt, whose other
    token stands at `corrupted.tokens[:, 1 + k]`. With k = 1 the task is A B n1 .. A -> B.
    Raises ValueError where k is not within 1 .. length - 1.
    """
    if not 1 <= k < length:
        raise ValueError(f"k = {k} is not within 1 to {length - 1}, so [BOS, r, r[:k]] does not ask for r[k]")
    drawn = random_tokens(model, length + 1, batch, seed)
    r = torch.cat([drawn[:, : k + 1], drawn[:, k + 2 :]], 1)
    other = r.clone()
    other[:, k] = drawn[:, k + 1]
    return Pair(*(Prompts(with_bos(model, torch.cat([first, r[:, : k + 1]], 1))) for first in (r, other)))


def encode(model: TransformerBridge, text: str) -> list[int]:
    """Token ids of a text, without any special token. Raises ValueError where the model has no tokenizer."""
    if model.tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer, so it cannot read text")
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def token_strings(model: TransformerBridge, tokens: Int[Tensor, "pos"]) -> list[str]:
    """What each token of one sequence reads as, alone; the id where there is no tokenizer."""
    if model.tokenizer is None:
        return [str(i) for i in tokens.tolist()]
    return model.tokenizer.batch_decode([[i] for i in tokens.tolist()])


def source_files(packages: tuple[str, ...]) -> list[str]:
    """Texts of the Python files of installed packages, without repeats, ordered by content hash."""
    texts = {}
    for package in packages:
        for path in Path(import_module(package).__path__[0]).rglob("*.py"):
            data = path.read_bytes()
            if 400 < len(data) < 100_000:
                texts[hashlib.sha256(data).hexdigest()] = data
    return [texts[key].decode("utf-8", errors="replace") for key in sorted(texts)]


def python_source(
    model: TransformerBridge, n_texts: int = 16, length: int = 512, seed: int = 0,
    packages: tuple[str, ...] = ("pandas", "seaborn"),
) -> Int[Tensor, "n_texts length"]:  # fmt: skip
    """Natural text: a stretch of each of several files of packages that the embedded models never saw.

    Each row is BOS and `length - 1` tokens from the start of a line, file and line chosen by
    the seed. (Openings of files would be mostly licences and imports.)
    Raises ValueError where too few files are long enough.
    """
    files, rows, rng = source_files(packages), [], random.Random(seed)
    rng.shuffle(files)
    for text in files:
        start = text.find("\n", rng.randrange(max(1, len(text) - 4 * length))) + 1
        ids = encode(model, text[start : start + 12 * length])
        if len(ids) >= length - 1:
            rows.append(ids[: length - 1])
        if len(rows) == n_texts:
            return with_bos(model, torch.tensor(rows))
    raise ValueError(f"only {len(rows)} of {n_texts} files have {length - 1} tokens")
