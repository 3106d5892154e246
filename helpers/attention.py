"""Scores of attention heads from their patterns: pattern[batch, head, query, key]."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.prompts import python_source, repeated_tokens

Pattern = Float[Tensor, "batch head query key"]
Score = Float[Tensor, "batch head"]
Samples = Float[Tensor, "sample layer head"]


def induction_score(pattern: Pattern, length: int) -> Score:
    """Mean attention from the second copy to the token after the query's earlier occurrence.

    For [BOS, r, r] with |r| = length: mean of A[q, q - (length - 1)] over q in the second copy.
    Olsson et al. 2022, appendix, prefix matching (with the +1 erratum), for one repetition.
    Raises ValueError where the pattern is not that of [BOS, r, r].
    """
    if pattern.shape[-1] != 2 * length + 1:
        raise ValueError(f"a pattern over {pattern.shape[-1]} tokens is not one of [BOS, r, r], |r| = {length}")
    return offset_score(pattern, length - 1, first_query=length + 1)


def offset_score(pattern: Pattern, offset: int, first_query: int | None = None) -> Score:
    """Mean of A[q, q - offset] over queries from `first_query` (default: all that have such a key)."""
    diagonal = pattern.diagonal(-offset, -2, -1)
    first_key = 0 if first_query is None else first_query - offset
    return diagonal[..., first_key:].mean(-1)


def previous_token_score(pattern: Pattern) -> Score:
    """Mean of A[q, q - 1] over all queries but the first."""
    return offset_score(pattern, 1)


def score_heads(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], score: Callable[[Pattern], Score]
) -> Samples:
    """`score(pattern)` of every head; patterns are reduced inside the hook, so that one layer's are held at a time."""
    found: dict[str, Score] = {}
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    hooks = [(name, lambda pattern, hook: found.update({hook.name: score(pattern).float().cpu()})) for name in names]
    hooks.append(("unembed.hook_in", lambda resid, hook: resid[:, :1]))  # half of Gemma's time is unembedding
    with torch.inference_mode():
        model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    return torch.stack([found[name] for name in names], dim=1)


def strongest(samples: Samples) -> tuple[int, int]:
    """Layer and head, counted from zero, of the largest mean."""
    return divmod(int(samples.mean(0).argmax()), samples.shape[2])


def induction_samples(model: TransformerBridge, seeds=(0, 1, 2), length: int = 50, batch: int = 8) -> Samples:
    """Induction scores on repeated random tokens, one sample per prompt, all seeds together."""
    prompts = (repeated_tokens(model, length, batch, seed) for seed in seeds)
    return torch.cat([score_heads(model, tokens, lambda p: induction_score(p, length)) for tokens in prompts])


def previous_token_samples(model: TransformerBridge, seeds=(0, 1, 2), length: int = 128, batch: int = 8) -> Samples:
    """Previous-token scores on natural text, one sample per text, all seeds together."""
    texts = (python_source(model, batch, length, seed) for seed in seeds)
    return torch.cat([score_heads(model, tokens, previous_token_score) for tokens in texts])
