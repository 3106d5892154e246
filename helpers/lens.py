"""The residual stream read as predictions: the logit lens and direct logit attribution.

Logits go through TransformerLens's own `logit_readout` (the real final norm, W_U and b_U, a
few rows at a time). Its `logit_lens` and `direct_logit_attribution` are not used: the first
runs the unembedding at every position, the second refuses a final norm that was not folded
and, in Gemma 3, reads heads before the norm that follows attention.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

from helpers.prompts import Prompts
from helpers.stats import head_name, progress


@dataclass(frozen=True)
class Stream:
    """The residual stream at its stops, the places where the lens reads."""

    stops: list[str]  # "embedding", "L0", ..., after each layer; with `mid`, "L0 attention" before it
    values: Float[Tensor, "stop batch pos d_model"]

    def thinned(self, at_most: int) -> "Stream":
        """At most this many stops, evenly spaced, the first and the last among them."""
        n = len(self.stops)
        keep = [round(i * (n - 1) / (at_most - 1)) for i in range(at_most)] if n > at_most else list(range(n))
        return Stream([self.stops[i] for i in keep], self.values[keep])


@dataclass(frozen=True)
class Reading:
    """What the lens gives one token per prompt and position, at every stop."""

    stops: list[str]
    log_prob: Float[Tensor, "stop *batch_pos"]  # nats
    rank: Int[Tensor, "stop *batch_pos"]  # 0 = the lens's first choice
    entropy: Float[Tensor, "stop *batch_pos"]  # nats, of the lens's whole distribution


@dataclass(frozen=True)
class Attribution:
    """A logit as the sum of what each part of the model writes in its direction.

    Part names: "embed", "pos_embed", heads as `L1H3`, "L1 bias" (of the attention's output),
    "L1 MLP", and "final bias" (of the final norm and the unembedding).
    """

    labels: list[str]
    parts: Float[Tensor, "batch part"]
    logit: Float[Tensor, "batch"]  # the model's own, which the parts sum to
    heads: Float[Tensor, "batch layer head"]

    def grouped(self) -> dict[str, Float[Tensor, "batch"]]:
        """The parts summed into embedding, heads by layer, MLP by layer, and all biases."""
        groups: dict[str, Tensor] = {}
        for label, part in zip(self.labels, self.parts.T):
            groups[_group(label)] = groups.get(_group(label), 0) + part
        return groups


def _group(label: str) -> str:
    if "bias" in label:
        return "biases"
    if "embed" in label:
        return "embedding"
    return label if label.endswith("MLP") else f"{label.split('H')[0]} heads"


# ---- the stream ----


def stops(model: TransformerBridge, mid: bool = False) -> dict[str, str]:
    """Name and hook of every stop; `mid` adds the stop between attention and MLP, where there is one."""
    hooks = {"embedding": "blocks.0.hook_resid_pre"}
    # Parallel blocks (GPT-NeoX) and blocks without an MLP have no point in between.
    mid = mid and "blocks.0.hook_resid_mid" in model.hook_dict
    for layer in range(model.cfg.n_layers):
        if mid:
            hooks[f"L{layer} attention"] = f"blocks.{layer}.hook_resid_mid"
        hooks[f"L{layer}"] = f"blocks.{layer}.hook_resid_post"
    return hooks


def _capture(model, tokens, names, positions: slice) -> tuple[dict[str, Tensor], Tensor]:
    """Activations at the positions asked for, and the model's logits at the first of them."""
    found: dict[str, Tensor] = {}

    def keep(name):
        def hook(activation, hook):
            found[name] = activation[:, positions].clone()

        return name, hook

    def first_only(x, hook):
        return x[:, positions][:, :1]

    # The unembedding of every position would be the largest tensor of the whole run.
    hooks = [keep(name) for name in names] + [("unembed.hook_in", first_only)]
    with torch.inference_mode():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return found, logits[:, 0]


def _positions(tokens: Tensor, position: int | None) -> slice:
    if tokens.numel() == 0:
        raise ValueError(f"empty batch of shape {tuple(tokens.shape)}")
    n = tokens.shape[1]
    if position is None:
        return slice(0, n)
    if not -n <= position < n:
        raise ValueError(f"position {position} is outside prompts of {n} tokens")
    return slice(position % n, position % n + 1)


def stream(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], position: int | None = None, mid: bool = False
) -> Stream:
    """The residual stream at every stop, at one position (kept as an axis) or at all of them.

    Raises:
        ValueError: the batch is empty or the position is outside it.
    """
    hooks = stops(model, mid)
    found, _ = _capture(model, tokens, hooks.values(), _positions(tokens, position))
    return Stream(list(hooks), torch.stack([found[name] for name in hooks.values()]))


# ---- the lens ----


def explicit_logits(
    model: TransformerBridge, resid: Float[Tensor, "*rest pos d_model"]
) -> Float[Tensor, "*rest pos d_vocab"]:
    """ln_final(resid) @ W_U + b_U, the lens in one line: the oracle for everything else here."""
    return model.ln_final(resid) @ model.W_U + model.b_U


def read_tokens(model: TransformerBridge, at: Stream, tokens: Int[Tensor, "batch pos"]) -> Reading:
    """Log-probability and rank that the lens gives `tokens` at every stop.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Raises:
        ValueError: there is not one token per prompt and position.
    """
    if tokens.shape != at.values.shape[1:3]:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} for a stream over {tuple(at.values.shape[1:3])}")
    read = logit_readout(model, at.values, targets=tokens, return_type="log_probs")
    return Reading(at.stops, read.values[..., 0], read.target_ranks[..., 0], read.entropy)


def read_answers(model: TransformerBridge, prompts: Prompts, mid: bool = False, chunk: int = 16) -> Reading:
    """The lens on each prompt's answer, at the position that predicts it: `Reading` over [stop, batch]."""
    parts = [
        read_tokens(model, stream(model, tokens, -2, mid), answers[:, None])
        for tokens, answers in progress([*zip(prompts.tokens.split(chunk), prompts.answers.split(chunk))], "lens")
    ]
    joined = (torch.cat([getattr(p, name)[..., 0] for p in parts], 1) for name in ("log_prob", "rank", "entropy"))
    return Reading(parts[0].stops, *joined)


def top_tokens(
    model: TransformerBridge, at: Stream, k: int = 1
) -> tuple[Int[Tensor, "stop batch pos k"], Float[Tensor, "stop batch pos k"]]:
    """The lens's `k` first choices at every stop and their probabilities."""
    read = logit_readout(model, at.values, top_k=k, return_type="probs")
    return read.top_ids, read.values


def wins(rank: Int[Tensor, "stop batch"]) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
    """The stop where the answer first ranks first, and the one from which it stays first.

    Both are counted from 0; the number of stops means never.
    """
    first = (rank == 0).int()
    never_yet = (first.cummax(0).values == 0).sum(0)
    for_good = len(first) - first.flip(0).cummin(0).values.sum(0)
    return never_yet, for_good


def affine_translator(
    source: Float[Tensor, "n d_model"], target: Float[Tensor, "n d_model"], ridge: float = 1e-3
) -> Float[Tensor, "d_model_1 d_model"]:
    """Least-squares affine map from one stop's stream to another's; the last row is the offset.

    A cheap relative of the tuned lens (Belrose et al. 2023), which is trained on the loss.
    `ridge` is relative to the mean square of the source.
    """
    x = torch.cat([source, torch.ones_like(source[:, :1])], 1).double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ target.double()).to(source.dtype)


def translate(
    values: Float[Tensor, "*rest d_model"], translator: Float[Tensor, "d_model_1 d_model"]
) -> Float[Tensor, "*rest d_model"]:
    """Apply an `affine_translator`."""
    return values @ translator[:-1] + translator[-1]


# ---- direct logit attribution ----


def attribute(
    model: TransformerBridge,
    tokens: Int[Tensor, "batch pos"],
    answers: Int[Tensor, "batch"],
    against: Int[Tensor, "batch"] | None = None,
    position: int = -2,
) -> Attribution:
    """The logit of `answers` (less that of `against`, if given), split by head, MLP, embedding, bias.

    The scales of the final norm and of norms between a head and the stream are those of the
    run, so that every part is linear in what it writes and the parts sum to the logit.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    Raises:
        ValueError: the batch is empty, or the parts do not sum to the logit, as where a model
            caps its logits or scales what its layers write.
    """
    found, logits = _capture(model, tokens, _part_hooks(model), _positions(tokens, position))
    found = {name: activation[:, 0] for name, activation in found.items()}
    direction, bias = model.W_U.T[answers], model.b_U[answers]
    logit = logits.gather(1, answers[:, None])[:, 0]
    if against is not None:
        direction, bias = direction - model.W_U.T[against], bias - model.b_U[against]
        logit = logit - logits.gather(1, against[:, None])[:, 0]
    labels, parts, heads = _split(model, found, direction, bias)
    _require_sum(model, parts, logit)
    return Attribution(labels, parts, logit, heads)


def _part_hooks(model) -> list[str]:
    names = ["blocks.0.hook_resid_pre", "hook_pos_embed", "ln_final.hook_scale"]
    for layer in range(model.cfg.n_layers):
        names += [f"blocks.{layer}.{name}" for name in ("attn.hook_z", "ln1_post.hook_scale", "hook_mlp_out")]
    return [name for name in names if name in model.hook_dict]


def _before_norm(norm, direction: Tensor, scale: Tensor | None) -> Tensor:
    """The direction that, before a norm of this scale, reads what `direction` reads after it."""
    weight = getattr(norm, "weight", None)
    if weight is not None:
        direction = direction * (1 + weight if norm.uses_weight_offset else weight)
    if scale is None:  # a model without norms
        return direction
    if not norm.uses_rms_norm:
        direction = direction - direction.mean(-1, keepdim=True)
    return direction / scale


def _split(model, found, direction, bias) -> tuple[list[str], Tensor, Tensor]:
    final = getattr(model.ln_final, "bias", None)
    parts = {"final bias": bias if final is None else bias + direction @ final}
    direction = _before_norm(model.ln_final, direction, found.get("ln_final.hook_scale"))
    embed, pos = found["blocks.0.hook_resid_pre"], found.get("hook_pos_embed")
    if pos is not None:
        embed, parts["pos_embed"] = embed - pos, (pos * direction).sum(-1)
    parts["embed"] = (embed * direction).sum(-1)
    heads = []
    for layer, block in enumerate(model.blocks):
        heads.append(_add_layer(parts, found, block, layer, direction))
    return list(parts), torch.stack(list(parts.values()), 1), torch.stack(heads, 1)


def _add_layer(parts, found, block, layer, direction) -> Tensor:
    at = f"blocks.{layer}."
    # Gemma 3 norms the sum of its heads before adding it to the stream.
    scale = found.get(at + "ln1_post.hook_scale")
    written = direction if scale is None else _before_norm(block.ln1_post, direction, scale)
    heads = torch.einsum("bhd,hdm,bm->bh", found[at + "attn.hook_z"], block.attn.W_O, written)
    parts |= {head_name(layer, head): part for head, part in enumerate(heads.T)}
    if block.attn.b_O is not None:
        parts[f"L{layer} bias"] = written @ block.attn.b_O
    if at + "hook_mlp_out" in found:
        parts[f"L{layer} MLP"] = (found[at + "hook_mlp_out"] * direction).sum(-1)
    return heads


def _require_sum(model, parts: Tensor, logit: Tensor) -> None:
    error = (parts.sum(1) - logit).abs() / parts.abs().sum(1)
    if (error > 1e-3).any():
        raise ValueError(
            f"the parts of {model.cfg.model_name} do not sum to its logits (off by {float(error.max()):.1e} "
            "of their size); a model that caps its logits or scales its layers cannot be split so"
        )
