"""The residual stream taken as a prediction (the logit lens), and a logit taken apart (direct logit attribution).

Logits go through TransformerLens's own `logit_readout` (the real final norm, W_U and b_U, a
few rows at a time). Its `logit_lens` and `direct_logit_attribution` are not used: the first
runs the unembedding at every position, the second refuses a final norm that was not folded
and, in Gemma 3, takes heads before the norm that follows attention.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

from helpers.prompts import Prompts
from helpers.stats import head_name, progress

Stream = Float[Tensor, "stop batch place d_model"]  # place: all positions, or the one asked for


@dataclass(frozen=True)
class Prediction:
    """What the lens predicts of one token per prompt and position, at every stop."""

    log_prob: Float[Tensor, "stop *batch_pos"]  # nats
    rank: Int[Tensor, "stop *batch_pos"]  # 0 = the lens's first choice


@dataclass(frozen=True)
class Attribution:
    """A logit as the sum of what each component of the model writes in its direction.

    Components: "embed", "pos_embed", heads as `L1H3`, "L1 bias" (of the attention's output),
    "L1 MLP", and "final bias" (of the final norm and the unembedding).
    """

    written: dict[str, Float[Tensor, "batch"]]
    heads: Float[Tensor, "batch layer head"]
    logit: Float[Tensor, "batch"]  # the model's own, which all that is written sums to

    def by_group(self) -> dict[str, Float[Tensor, "batch"]]:
        """Summed into embedding, heads by layer, MLP by layer, and all biases."""
        groups: dict[str, Tensor] = {}
        for name, values in self.written.items():
            group = "biases" if "bias" in name else "embedding" if "embed" in name else name
            group = group if " " in group or "H" not in group else f"{group.split('H')[0]} heads"
            groups[group] = groups.get(group, 0) + values
        return groups


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


def predict_tokens(model: TransformerBridge, resid: Stream, tokens: Int[Tensor, "batch pos"]) -> Prediction:
    """Log-probability (nats) and rank that the lens gives `tokens` at every stop.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Raises:
        ValueError: there is not one token per prompt and position.
    """
    if tokens.shape != resid.shape[1:3]:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} for a stream over {tuple(resid.shape[1:3])}")
    out = logit_readout(model, resid, targets=tokens, return_type="log_probs")
    return Prediction(out.values[..., 0], out.target_ranks[..., 0])


def predict_answers(model: TransformerBridge, prompts: Prompts, mid: bool = False, chunk: int = 16) -> Prediction:
    """The lens on each prompt's answer, at the position that predicts it: over [stop, batch]."""
    batches = [*zip(prompts.tokens.split(chunk), prompts.answers.split(chunk))]
    out = [
        predict_tokens(model, stream(model, tokens, -2, mid), answers[:, None])
        for tokens, answers in progress(batches, "lens")
    ]
    return Prediction(*(torch.cat([getattr(p, name)[..., 0] for p in out], 1) for name in ("log_prob", "rank")))


def top_tokens(
    model: TransformerBridge, resid: Stream, k: int = 1
) -> tuple[Int[Tensor, "stop batch pos k"], Float[Tensor, "stop batch pos k"]]:
    """The lens's `k` first choices at every stop and their probabilities."""
    out = logit_readout(model, resid, top_k=k, return_type="probs")
    return out.top_ids, out.values


def _capture(model, tokens, names, position: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Activations at the position asked for, and the model's logits at the first of them."""
    n = tokens.shape[1]
    if tokens.numel() == 0:
        raise ValueError(f"empty batch of shape {tuple(tokens.shape)}")
    if position is not None and not -n <= position < n:
        raise ValueError(f"position {position} is outside prompts of {n} tokens")
    there = slice(0, n) if position is None else slice(position % n, position % n + 1)
    found: dict[str, Tensor] = {}

    def keep(name):  # by the name asked for: an alias's hook point goes by another
        return name, lambda x, hook: found.update({name: x[:, there].clone()})

    # The unembedding of every position would be the largest tensor of the whole run.
    hooks = [keep(name) for name in names] + [("unembed.hook_in", lambda x, hook: x[:, there][:, :1])]
    with torch.inference_mode():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return found, logits[:, 0]


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
    run, so that every component is linear in what it writes and all sum to the logit.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    Raises:
        ValueError: the batch is empty, or the components do not sum to the logit, as where a
            model caps its logits or scales what its layers write.
    """
    names = ["blocks.0.hook_resid_pre", "hook_pos_embed", "ln_final.hook_scale"]
    for layer in range(model.cfg.n_layers):
        names += [f"blocks.{layer}.{name}" for name in ("attn.hook_z", "ln1_post.hook_scale", "hook_mlp_out")]
    found, logits = _capture(model, tokens, [name for name in names if name in model.hook_dict], position)
    found = {name: activation[:, 0] for name, activation in found.items()}
    direction, bias = model.W_U.T[answers], model.b_U[answers]
    logit = logits.gather(1, answers[:, None])[:, 0]
    if against is not None:
        direction, bias = direction - model.W_U.T[against], bias - model.b_U[against]
        logit = logit - logits.gather(1, against[:, None])[:, 0]
    result = Attribution(*_split(model, found, direction, bias), logit)
    _require_sum(model, torch.stack(list(result.written.values())), logit)
    return result


def _before_norm(norm, direction: Tensor, scale: Tensor | None) -> Tensor:
    """The direction that, before a norm of this scale, takes what `direction` takes after it."""
    weight = getattr(norm, "weight", None)
    if weight is not None:
        direction = direction * (1 + weight if norm.uses_weight_offset else weight)
    if scale is None:  # a model without norms
        return direction
    if not norm.uses_rms_norm:
        direction = direction - direction.mean(-1, keepdim=True)
    return direction / scale


def _split(model, found, direction, bias) -> tuple[dict[str, Tensor], Tensor]:
    final = getattr(model.ln_final, "bias", None)
    written = {"final bias": bias if final is None else bias + direction @ final}
    direction = _before_norm(model.ln_final, direction, found.get("ln_final.hook_scale"))
    embed, pos = found["blocks.0.hook_resid_pre"], found.get("hook_pos_embed")
    if pos is not None:
        embed, written["pos_embed"] = embed - pos, (pos * direction).sum(-1)
    written["embed"] = (embed * direction).sum(-1)
    heads = [_add_layer(written, found, block, layer, direction) for layer, block in enumerate(model.blocks)]
    return written, torch.stack(heads, 1)


def _add_layer(written, found, block, layer, direction) -> Tensor:
    at = f"blocks.{layer}."
    # Gemma 3 norms the sum of its heads before adding it to the stream.
    scale = found.get(at + "ln1_post.hook_scale")
    before = direction if scale is None else _before_norm(block.ln1_post, direction, scale)
    heads = torch.einsum("bhd,hdm,bm->bh", found[at + "attn.hook_z"], block.attn.W_O, before)
    written |= {head_name(layer, head): values for head, values in enumerate(heads.T)}
    if block.attn.b_O is not None:
        written[f"L{layer} bias"] = before @ block.attn.b_O
    if at + "hook_mlp_out" in found:
        written[f"L{layer} MLP"] = (found[at + "hook_mlp_out"] * direction).sum(-1)
    return heads


def _require_sum(model, written: Float[Tensor, "component batch"], logit: Float[Tensor, "batch"]) -> None:
    error = (written.sum(0) - logit).abs() / written.abs().sum(0)
    if (error > 1e-3).any():
        raise ValueError(
            f"what is written in {model.cfg.model_name} does not sum to its logits (off by {float(error.max()):.1e} "
            "of its size); a model that caps its logits or scales its layers cannot be split so"
        )
