"""Means with bootstrap intervals, tidy tables, and the one formatter of head names."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge


def head_name(layer: int, head: int) -> str:
    """`L5H1`: layer and head, both counted from zero."""
    return f"L{layer}H{head}"


def bootstrap_interval(
    values: Shaped[np.ndarray, "n *rest"], level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean over the first axis and the ends of its percentile bootstrap interval.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Raises:
        ValueError: there is no sample, or a sample is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no samples to take the mean of")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} samples are not finite")
    # Multinomial counts are resampling with replacement, as one matrix product.
    counts = np.random.default_rng(seed).multinomial(len(values), [1 / len(values)] * len(values), n_resamples)
    means = np.tensordot(counts / len(values), values, axes=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(values.mean(0)), np.asarray(low), np.asarray(high)


def estimate(values, **kwargs) -> dict[str, float]:
    """`{"mean", "low", "high", "n"}` of a list of samples, for `summary.json`."""
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    values = np.asarray(values, dtype=np.float64).ravel()
    mean, low, high = bootstrap_interval(values, **kwargs)
    return {"mean": float(mean), "low": float(low), "high": float(high), "n": len(values)}


def show(result: dict[str, float], digits: int = 3) -> str:
    """`0.912 [0.901, 0.923]`: an estimate as text."""
    return "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(d=digits, **result)


def head_table(samples: Float[Tensor, "sample layer head"], value: str, seed: int = 0) -> pd.DataFrame:
    """One row per head, best first: rank, head, layer, index, mean of `value` and its interval."""
    mean, low, high = bootstrap_interval(samples.cpu().numpy(), seed=seed)
    layers, heads = (index.ravel().tolist() for index in np.indices(mean.shape))
    table = pd.DataFrame(
        {
            "head": [head_name(layer, head) for layer, head in zip(layers, heads)],
            "layer": layers,
            "index": heads,
            value: mean.flat,
            "low": low.flat,
            "high": high.flat,
        }
    ).sort_values(value, ascending=False, ignore_index=True)
    table.insert(0, "rank", table.index + 1)
    return table


def progress(steps: Iterable, what: str) -> Iterable:
    """The steps, with a bar once they have taken three seconds; where TQDM_DISABLE is set, without."""
    return tqdm(steps, desc=what, delay=3, leave=False)


def token_losses(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], chunk: int | None = None
) -> Float[Tensor, "batch pos_1"]:
    """-log p of every token but the first, in nats; entry i is the loss on token i + 1."""
    with torch.inference_mode():
        parts = [
            model(part, return_type="loss", loss_per_token=True)
            for part in progress(tokens.split(chunk or rows_at_a_time(tokens)), "losses")
        ]
    return torch.cat(parts)


def rows_at_a_time(tokens: Int[Tensor, "batch pos"], budget: int = 1024) -> int:
    """How many prompts to run together: larger activations are slower, each being allocated anew."""
    return max(1, budget // tokens.shape[1])


def in_context_score(
    losses: Float[Tensor, "batch pos_1"], early: int = 50, late: int = 500, window: int = 0
) -> Float[Tensor, "batch"]:
    """Loss at token `late` minus loss at token `early`, in nats; negative is learning in context.

    With a window, each end is the mean over that many tokens to either side: a single token of
    a few texts is mostly noise. Source: Olsson et al. 2022, "Models' in-context learning score".

    Raises:
        ValueError: the texts end before token `late + window`.
    """
    if losses.shape[1] < late + window:
        raise ValueError(f"texts of {losses.shape[1] + 1} tokens have no token {late + window}")

    def around(token):
        return losses[:, token - 1 - window : token + window].mean(1)

    return around(late) - around(early)
