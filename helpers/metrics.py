"""What is measured: metrics of a model's logits, and shares of a gap between two of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from helpers.prompts import Prompts
from helpers.stats import bootstrap_interval

Tokens = Int[Tensor, "prompt pos"]


@dataclass(frozen=True)
class Metric:
    """One number for each prompt, from the logits at `positions` (negative: from the end).

    `of(logits[row, read, d_vocab], prompt[row])` gives one number for each row.
    """

    positions: tuple[int, ...]
    of: Callable[[Float[Tensor, "row read d_vocab"], Int[Tensor, "row"]], Float[Tensor, "row"]]


def answer_loss(prompts: Prompts) -> Metric:
    """-log p(answer) where the model predicts the last token, in nats."""

    def of(logits, rows):
        return nn.functional.cross_entropy(logits[:, 0], prompts.answers[rows], reduction="none")

    return Metric((-2,), of)


def answer_margin(right: Prompts, wrong: Prompts) -> Metric:
    """Logit of the right answer minus that of the wrong one, where the last token is predicted."""

    def of(logits, rows):
        answers = torch.stack([wrong.answers[rows], right.answers[rows]], 1)
        return logits[:, 0].gather(1, answers).diff().squeeze(1)

    return Metric((-2,), of)


def mean_loss(tokens: Tokens, first: int = 1) -> Metric:
    """Mean of -log p(token) over the tokens from position `first` on, in nats.

    Raises ValueError where nothing predicts the first of these tokens, or there is none.
    """
    if not 1 <= first < tokens.shape[1]:
        raise ValueError(f"no loss from position {first} on of prompts of {tokens.shape[1]} tokens; the first is at 1")

    def of(logits, rows):
        targets = tokens[rows, first:]
        # Flat, because a softmax over an axis that is not the last one is slow with a large vocabulary.
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)

    return Metric(tuple(range(first - 1, tokens.shape[1] - 1)), of)


def evaluate(model: TransformerBridge, tokens: Tokens, metric: Metric, chunk: int = 8) -> Float[Tensor, "prompt"]:
    """The metric of the unedited model, on the CPU as all that is measured."""
    read = positions_read(model, tokens, metric)
    read_only = ("unembed.hook_in", lambda resid, hook: resid[:, read])  # with a large vocabulary most of the time

    def measured(rows):
        return metric.of(model.run_with_hooks(tokens[rows], fwd_hooks=[read_only]), rows)

    with torch.no_grad():
        rows = torch.arange(len(tokens), device=tokens.device).split(chunk)
        return torch.cat([measured(part) for part in rows]).cpu()


class NoGap(ValueError):
    """Clean and corrupted prompts do not differ beyond chance: this model does not do the task."""


def recovery(effect: Float[Tensor, "prompt *rest"], gap: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt *rest"]:
    """Effects as a share of `gap`, the clean minus the corrupted metric, by `share`.

    Raises:
        NoGap: the 95 % interval of the mean gap contains zero.
    """
    mean, low, high = map(float, bootstrap_interval(gap))
    if low <= 0 <= high:
        raise NoGap(
            f"clean and corrupted metrics differ by {mean:.2g} [{low:.2g}, {high:.2g}], an interval that contains "
            "zero: nothing is a share of that, so take prompts on which the model does the task"
        )
    return share(effect, gap)


def share(effect: Float[Tensor, "prompt *rest"], gap: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt *rest"]:
    """Effects as a share of a gap that is known to be one: 1 is all of it.

    The mean over prompts is mean effect / mean gap. One prompt's value is its part in that
    ratio, linearised, so that an interval over prompts is one of the ratio: prompts whose gaps
    differ do not widen it, and an effect equal to the gap is 1 for each of them.
    """
    mean = gap.mean()
    ratio = effect.mean(0) / mean
    return ratio + (effect - ratio * gap.view(-1, *[1] * ratio.ndim)) / mean


def by_class(
    values: Float[Tensor, "text pos"], labels: Shaped[np.ndarray, "text pos"], wanted: Iterable, least: int = 10
) -> dict[object, Float[Tensor, "text"]]:
    """Mean of `values` over the tokens of each label that at least `least` texts have, by `share`: a sample a text."""
    masks = {label: torch.from_numpy(labels == label).to(values.device) for label in wanted}
    masks = {label: mask for label, mask in masks.items() if mask.any(1).sum() >= least}
    return {label: share((values * mask).sum(1), mask.sum(1).float()) for label, mask in masks.items()}


def final_logits(model: TransformerBridge, resid: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_vocab"]:
    """Logits of a residual stream that left the last block: final norm, unembedding, and what the model does after.

    After it Cohere multiplies its logits, Granite divides them, and Gemma 2 caps them.
    """
    if hasattr(model, "ln_final"):  # the blocks of GPT-1 end in norms of their own
        resid = model.ln_final(resid)
    return model.adapter.apply_output_logits_transform(model.unembed(resid))


def positions_read(model: TransformerBridge, tokens: Tokens, metric: Metric) -> list[int]:
    """The positions that a metric reads, counted from 0; see `Sweep` for what is refused."""
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"empty batch of shape {tuple(tokens.shape)}")
    if tokens.shape[1] > model.cfg.n_ctx:
        raise ValueError(f"prompts of {tokens.shape[1]} tokens do not fit the context of {model.cfg.n_ctx}")
    return [position_in(tokens, position, "the metric reads") for position in metric.positions]


def position_in(tokens: Tokens, position: int, who: str) -> int:
    """A position counted from 0.

    Raises:
        ValueError: the prompts have no such position; `who` opens the message.
    """
    length = tokens.shape[1]
    if not -length <= position < length:
        raise ValueError(f"{who} position {position} of prompts that have {length} tokens")
    return position % length
