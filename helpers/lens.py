"""The residual stream taken as a prediction (the logit lens), and a logit taken apart (direct logit attribution).

TransformerLens's own `logit_lens` and `direct_logit_attribution` are not used: the first runs the
unembedding at every position, the second refuses a final norm that was not folded and, in
Gemma 3, takes heads before the norm that follows attention.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.circuits import fold
from helpers.metrics import final_logits, position_in, scale_and_cap
from helpers.stats import progress

Stream = Float[Tensor, "stop batch place d_model"]  # place: all positions, or the one asked for


# ---- the lens ----


def stops(model: TransformerBridge, mid: bool = False) -> dict[str, str]:
    """Name and hook of every place where the lens is put: "embedding", "L0", ...

    `mid` adds "L0 attention", between attention and MLP, where a model has such a point.
    """
    hooks = {"embedding": "blocks.0.hook_resid_pre"}
    # Parallel blocks (GPT-NeoX) and blocks without an MLP have no point in between.
    mid = mid and "blocks.0.hook_resid_mid" in model.hook_dict
    for layer in range(model.cfg.n_layers):
        if mid:
            hooks[f"L{layer} attention"] = f"blocks.{layer}.hook_resid_mid"
        hooks[f"L{layer}"] = f"blocks.{layer}.hook_resid_post"
    return hooks


def stream(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], position: int | None = None, mid: bool = False
) -> Stream:
    """The residual stream at every stop, at one position (an axis of length 1) or at all of them.

    Raises:
        ValueError: the batch is empty or the position is outside it.
    """
    hooks = list(stops(model, mid).values())
    found, _ = _capture(model, tokens, hooks, position)
    return torch.stack([found[name] for name in hooks])


def log_probs_and_ranks(
    model: TransformerBridge, resid: Stream, tokens: Int[Tensor, "batch place"]
) -> tuple[Float[Tensor, "stop batch place"], Int[Tensor, "stop batch place"]]:
    """Log-probability (nats) that the lens gives `tokens` at every stop, and their rank (0 is its first choice).

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Raises:
        ValueError: there is not one token per prompt and position.
    """
    if tokens.shape != resid.shape[1:3]:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} for a stream over {tuple(resid.shape[1:3])}")
    targets = tokens.expand(resid.shape[:3]).flatten()[:, None]

    def of(log_probs, rows):
        target = log_probs.gather(1, targets[rows])
        return target[:, 0], (log_probs > target).sum(1)

    return _read(model, resid, of)


def top_tokens(
    model: TransformerBridge, resid: Stream, k: int = 1
) -> tuple[Float[Tensor, "stop batch place k"], Int[Tensor, "stop batch place k"]]:
    """Log-probabilities (nats) and ids of the lens's `k` first choices at every stop."""
    return _read(model, resid, lambda log_probs, rows: log_probs.topk(k))


@torch.inference_mode()
def _read(model, resid: Stream, of: Callable) -> tuple[Tensor, Tensor]:
    """`of(log_probs[row, d_vocab], rows)`, a pair, for a few rows at a time: a vocabulary is wide."""
    everywhere = resid.flatten(0, 2)
    rows = torch.arange(len(everywhere), device=resid.device).split(64)
    parts = [of(final_logits(model, everywhere[None, part])[0].log_softmax(-1), part) for part in progress(rows, "lens")]
    return tuple(torch.cat(each).unflatten(0, resid.shape[:3]) for each in zip(*parts))


def _capture(model, tokens, names, position: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Activations at the position asked for, and the model's logits at the first of them."""
    if tokens.numel() == 0:
        raise ValueError(f"empty batch of shape {tuple(tokens.shape)}")
    first = None if position is None else position_in(tokens, position, "the lens is put at")
    there = slice(first, None if first is None else first + 1)
    found: dict[str, Tensor] = {}

    def keep(name):  # by the name asked for: an alias's hook point goes by another
        return name, lambda x, hook: found.update({name: x[:, there].clone()})

    # The unembedding of every position would be the largest tensor of the whole run.
    hooks = [keep(name) for name in names] + [("unembed.hook_in", lambda x, hook: x[:, there][:, :1])]
    with torch.inference_mode():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return found, logits[:, 0]


# ---- direct logit attribution ----


@dataclass(frozen=True)
class Attribution:
    """A logit, or the difference of two, as the sum of what each part of the model writes along it."""

    embedding: Float[Tensor, "batch"]  # with positions, where they enter the stream
    heads: Float[Tensor, "batch layer head"]
    mlps: Float[Tensor, "batch layer"]
    biases: Float[Tensor, "batch"]  # of attention's outputs, the final norm and the unembedding
    logit: Float[Tensor, "batch"]  # the model's own

    def total(self) -> Float[Tensor, "batch"]:
        """The sum of all parts, which equals `logit` up to rounding."""
        return self.embedding + self.heads.sum((1, 2)) + self.mlps.sum(1) + self.biases


def attribute(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], answers: Int[Tensor, "batch"],
    against: Int[Tensor, "batch"] | None = None, position: int = -2,
) -> Attribution:  # fmt: skip
    """The logit of `answers` (less that of `against`, if given), split by head, MLP, embedding and bias.

    The scales of the final norm and of norms between a head and the stream are those of the
    run, so that every part is linear in what it writes and all sum to the logit.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    Raises:
        ValueError: the model caps its logits, so that none is a sum; or the parts do not sum to the logit.
    """
    scale, cap = scale_and_cap(model)
    if cap:
        raise ValueError(f"{model.cfg.model_name} caps its logits at {cap}, so that a logit is no sum of parts")
    names = ["blocks.0.hook_resid_pre", "ln_final.hook_scale"]
    for layer in range(model.cfg.n_layers):
        names += [f"blocks.{layer}.{name}" for name in ("attn.hook_z", "ln1_post.hook_scale", "hook_mlp_out")]
    found, logits = _capture(model, tokens, [name for name in names if name in model.hook_dict], position)

    def difference(of):
        return of(answers) if against is None else of(answers) - of(against)

    column, bias = scale * difference(lambda ids: model.W_U[:, ids]), scale * difference(lambda ids: model.b_U[ids])
    logit = difference(lambda ids: logits.gather(1, ids[:, None])[:, 0])
    result = Attribution(*_split(model, {name: x[:, 0] for name, x in found.items()}, column, bias), logit)
    size = result.embedding.abs() + result.heads.abs().sum((1, 2)) + result.mlps.abs().sum(1) + result.biases.abs()
    if (error := float(((result.total() - logit).abs() / size).max())) > 1e-3:
        raise ValueError(f"what {model.cfg.model_name} writes does not sum to its logits: off by {error:.1e} of its size")
    return result


def _split(model, found, column: Float[Tensor, "d_model batch"], bias: Float[Tensor, "batch"]) -> tuple[Tensor, ...]:
    """Embedding, heads, MLPs and biases along a column of the unembedding that is read after the final norm."""

    def before(norm, column, scale):  # a model without norms has no scale
        return column if scale is None else fold(norm, column) / scale.T

    if getattr(model.ln_final, "bias", None) is not None:
        bias = bias + model.ln_final.bias @ column
    column = before(model.ln_final, column, found.get("ln_final.hook_scale"))
    # Granite's layers write this many times what their attention and MLP give.
    times, heads, mlps = getattr(getattr(model.original_model, "config", None), "residual_multiplier", 1), [], []
    for layer, block in enumerate(model.blocks):
        part = {name.split(".", 2)[2]: x for name, x in found.items() if name.startswith(f"blocks.{layer}.")}
        # Gemma 3 norms the sum of its heads before adding it to the stream.
        read = times * before(getattr(block, "ln1_post", None), column, part.get("ln1_post.hook_scale"))
        heads.append(torch.einsum("bhd,hdm,mb->bh", part["attn.hook_z"], block.attn.W_O, read))
        mlps.append(times * torch.einsum("bm,mb->b", part["hook_mlp_out"], column) if "hook_mlp_out" in part else 0 * bias)
        bias = bias if block.attn.b_O is None else bias + block.attn.b_O @ read
    embedding = (found["blocks.0.hook_resid_pre"].T * column).sum(0)
    return embedding, torch.stack(heads, 1), torch.stack(mlps, 1), bias
