"""The residual stream taken as a prediction (the logit lens), and a logit taken apart (direct logit attribution)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.blocks import residual_multiplier
from helpers.circuits import fold
from helpers.metrics import final_logits, position_in
from helpers.stats import progress

Stream = Float[Tensor, "stop batch place d_model"]  # place: all positions, or the one asked for


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

    Raises ValueError where the batch is empty or the position is outside it.
    """
    hooks = list(stops(model, mid).values())
    found, _ = _capture(model, tokens, hooks, position)
    return torch.stack([found[name] for name in hooks])


def log_probs_and_ranks(
    model: TransformerBridge, resid: Stream, tokens: Int[Tensor, "_batch _place"]
) -> tuple[Float[Tensor, "stop batch place"], Int[Tensor, "stop batch place"]]:
    """Log-probability (nats) that the lens gives `tokens` at every stop, and their rank (0 is its first choice).

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Raises ValueError where there is not one token for each prompt and position.
    """
    if tokens.shape != resid.shape[1:3]:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} for a stream over {tuple(resid.shape[1:3])}")
    found, rows = [], zip(resid.flatten(0, 2).split(64), tokens.expand(resid.shape[:3]).flatten().split(64))
    with torch.inference_mode():
        for part, targets in progress([*rows], "lens"):  # a few rows at a time: a vocabulary is wide
            log_probs = final_logits(model, part[None])[0].log_softmax(-1)
            target = log_probs.gather(1, targets[:, None])
            found.append((target[:, 0].cpu(), (log_probs > target).sum(1).cpu()))
    return tuple(torch.cat(each).view(resid.shape[:3]) for each in zip(*found))


def _capture(model, tokens, names, position: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Activations at the position asked for, or all, and the model's logits at the first of them."""
    if tokens.numel() == 0:
        raise ValueError(f"empty batch of shape {tuple(tokens.shape)}")
    first = None if position is None else position_in(tokens, position, "the lens is put at")
    there = slice(first, None if first is None else first + 1)
    # The unembedding of every position would be the largest tensor of the whole run.
    read_only = ("unembed.hook_in", lambda x, hook: x[:, there][:, :1])
    with torch.inference_mode(), model.hooks([read_only]):
        logits, cache = model.run_with_cache(tokens, names_filter=names)
    return {name: cache[name][:, there] for name in names}, logits[:, 0]


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
    against: Int[Tensor, "batch"],
) -> Attribution:  # fmt: skip
    """The logit of `answers` less that of `against` at position -2, split by head, MLP, embedding and bias.

    The scales of the final norm and of norms between a head and the stream are those of the
    run, so that every part is linear in what it writes and all sum to the difference.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". (TransformerLens's own
    refuses norms that were not folded, and misses Gemma's after attention.)
    Raises ValueError where the model caps its logits, or its parts do not sum to them.
    """
    scale, far = model.adapter.apply_output_logits_transform(torch.tensor([1.0, 1e4])).tolist()
    if far < 0.99e4 * scale:
        raise ValueError(f"{model.cfg.model_name} caps its logits, so that none is a sum of parts; patch instead")
    names = ["blocks.0.hook_resid_pre", "ln_final.hook_scale"]
    for layer in range(model.cfg.n_layers):
        names += [f"blocks.{layer}.{name}" for name in ("attn.hook_z", "ln1_post.hook_scale", "hook_mlp_out")]
    found, logits = _capture(model, tokens, [name for name in names if name in model.hook_dict], -2)
    logit = logits.gather(1, torch.stack([against, answers], 1)).diff().squeeze(1)

    def before(module, norm: str, column):
        """What reads before a norm as `column` reads after it: the same where there is no such norm."""
        scale = found.get(norm + ".hook_scale")
        return column if scale is None else fold(module, column) / scale[:, 0].T

    column = scale * (model.W_U[:, answers] - model.W_U[:, against])
    biases = scale * (model.b_U[answers] - model.b_U[against])
    ln_final = getattr(model, "ln_final", None)
    if getattr(ln_final, "bias", None) is not None:
        biases = biases + ln_final.bias @ column
    column = before(ln_final, "ln_final", column)  # [d_model, batch]
    heads, mlps = [], []
    for at, block in ((f"blocks.{layer}.", block) for layer, block in enumerate(model.blocks)):
        # Gemma 3 norms the sum of its heads before adding it to the stream.
        read = residual_multiplier(model) * before(getattr(block, "ln1_post", None), at + "ln1_post", column)
        W_O = block.attn.W_O
        z = found[at + "attn.hook_z"].flatten(1).unflatten(1, W_O.shape[:2])
        heads.append(torch.einsum("bhd,hdm,mb->bh", z, W_O, read))
        mlp = found.get(at + "hook_mlp_out")
        mlps.append(torch.zeros_like(biases) if mlp is None else (mlp[:, 0].T * column).sum(0))
        biases = biases if block.attn.b_O is None else biases + block.attn.b_O @ read
    embedding = (found["blocks.0.hook_resid_pre"][:, 0].T * column).sum(0)
    parts = (embedding, torch.stack(heads, 1), torch.stack(mlps, 1), biases, logit)
    result = Attribution(*(part.cpu() for part in parts))
    error = float(((result.total() - result.logit).abs() / (1 + result.heads.abs().sum((1, 2)))).max())
    if error > 1e-3:
        raise ValueError(f"what {model.cfg.model_name} writes does not sum to its logits: off by {error:.1e} of it")
    return result
