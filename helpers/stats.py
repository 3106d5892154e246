"""Means with their intervals, tests over many heads, tidy tables, losses, and the one formatter of head names."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from scipy import stats as tests
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

Samples = Shaped[np.ndarray, "n *rest"] | Shaped[Tensor, "n *rest"]
Mean = Float[np.ndarray, "*rest"]


def head_name(layer: int, head: int) -> str:
    """`L5H1`: layer and head, both counted from zero."""
    return f"L{layer}H{head}"


def bootstrap_weights(n: int, seed: int = 0) -> Float[np.ndarray, "draw n"]:
    """The share of each sample in each of 1,000 draws with replacement; a draw's mean is its row times the samples."""
    return np.random.default_rng(seed).multinomial(n, [1 / n] * n, 1000) / n


def bootstrap_interval(values: Samples, seed: int = 0) -> tuple[Mean, Mean, Mean]:
    """Mean over the first axis and the ends of its 95 % interval, of the kind that the number of samples allows.

    From 20 samples the percentile bootstrap (Efron & Tibshirani 1993, chapter 13); from 5 the t
    interval, since the bootstrap is too narrow there; below 5 the smallest and largest sample.
    Raises ValueError where there is no sample, or a sample is not finite.
    """
    values = _finite(values)
    n, mean = len(values), values.mean(0)
    if n < 5:
        low, high = values.min(0), values.max(0)
    elif n < 20:
        reach = tests.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5
        low, high = mean - reach, mean + reach
    else:
        draws = np.tensordot(bootstrap_weights(n, seed), values, axes=1)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return np.asarray(mean), np.asarray(low), np.asarray(high)


def familywise_interval(values: Samples, seed: int = 0) -> tuple[Mean, Mean, Mean]:
    """Means over the first axis and intervals that hold all of them at once with probability 0.95.

    From 20 samples the half-width is the quantile, over bootstrap draws, of the largest studentised
    error of any member (Westfall & Young 1993, "Resampling-Based Multiple Testing"); below 20, where
    that is too wide, the t interval at 0.05 over the number of members (Dunn 1961).
    Raises ValueError where there are fewer than 5 samples, or a sample is not finite.
    """
    values = _finite(values)
    n, mean, spread = len(values), values.mean(0), values.std(0)
    if n < 5:
        raise ValueError(f"{n} samples are too few for an interval over many members; use at least 5")
    if n < 20:
        reach = tests.t.ppf(1 - 0.025 / max(1, mean.size), n - 1) * spread / (n - 1) ** 0.5
        return mean, mean - reach, mean + reach
    weights, centred = bootstrap_weights(n, seed), values - mean
    shift, square = (np.tensordot(weights, power, axes=1) for power in (centred, centred**2))
    # The floor keeps draws of one sample over and over, which have no spread, from dividing by zero.
    error = np.abs(shift) / np.sqrt(np.maximum(square - shift**2, 1e-6 * spread**2 + 1e-30))
    reach = np.quantile(error.reshape(len(error), -1).max(1), 0.95) * spread
    return mean, mean - reach, mean + reach


def q_values(values: Samples, above: float = 0.0, alternative: str = "greater") -> Mean:
    """False-discovery-adjusted p-values, over all members, of the t test that a mean lies above `above`.

    Members with q <= 0.05 are named with at most 5 % false ones expected among them. Source:
    Benjamini & Hochberg 1995. `alternative` is scipy's: "greater", "less" or "two-sided".
    """
    p = tests.ttest_1samp(_finite(values), above, axis=0, alternative=alternative).pvalue
    p = np.nan_to_num(p, nan=1.0)  # no spread, and at `above`: no evidence
    return tests.false_discovery_control(p, axis=None).reshape(p.shape)


def _finite(values) -> np.ndarray:
    values = values.detach().cpu() if isinstance(values, Tensor) else values
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no samples to take the mean of")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} samples are not finite")
    return values


def estimate(values) -> dict:
    """`{"mean", "low", "high", "n"}` of samples, and the "values" themselves where they are fewer than 5."""
    values = _finite(values).ravel()
    mean, low, high = map(float, bootstrap_interval(values))
    few = {"values": values.tolist()} if len(values) < 5 else {}
    return {"mean": mean, "low": low, "high": high, "n": len(values)} | few


def head_table(samples: Float[Tensor, "sample layer head"], value: str, seed: int = 0) -> pd.DataFrame:
    """One row per head, best first: rank, head, layer, index, mean of `value` and its interval."""
    mean, low, high = bootstrap_interval(samples, seed=seed)
    layer, index = (i.ravel().tolist() for i in np.indices(mean.shape))
    names = [head_name(i, j) for i, j in zip(layer, index)]
    columns = {"layer": layer, "index": index, value: mean.flat, "low": low.flat, "high": high.flat}
    table = pd.DataFrame({"head": names} | columns).sort_values(value, ascending=False, ignore_index=True)
    table.insert(0, "rank", table.index + 1)
    return table


def progress(steps: Iterable, what: str) -> Iterable:
    """The steps, with a bar once they have taken three seconds; where TQDM_DISABLE is set, without."""
    return tqdm(steps, desc=what, delay=3, leave=False)


def token_losses(model: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_1"]:
    """-log p of every token but the first, in nats, on the CPU; entry i is the loss on token i + 1."""
    parts = progress(tokens.split(max(1, 1024 // tokens.shape[1])), "losses")  # logits of all tokens are large
    with torch.inference_mode():
        return torch.cat([model(part, return_type="loss", loss_per_token=True).cpu() for part in parts])


def in_context_score(losses: Float[Tensor, "batch pos_1"], early=50, late=500, window=0) -> Float[Tensor, "batch"]:
    """Loss at token `late` minus loss at token `early`, in nats; negative is learning in context.

    With a window, each end is the mean over that many tokens to either side: a single token of
    a few texts is mostly noise. Source: Olsson et al. 2022, "Models' in-context learning score".
    Raises ValueError where the texts end before token `late + window`, or begin after token `early - window`.
    """
    if losses.shape[1] < late + window or early <= window:
        raise ValueError(f"texts of {losses.shape[1] + 1} tokens have no token {late + window} or {early - window}")
    at_late, at_early = (losses[:, i - 1 - window : i + window].mean(1) for i in (late, early))
    return at_late - at_early
