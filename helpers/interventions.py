"""Edits whose effect on a metric is measured for every head, position or edge: ablations and patches.

Effects are edited minus unedited metric, one for each prompt, on the CPU. All of them run on the one engine of
`helpers.sweep`, and equal running the whole model once for each edit. All raise ValueError, before any work,
where the batch is empty or too long, or a head, a position or the kind of edit does not exist; and where
logits are nan.
"""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from helpers.blocks import residual_multiplier
from helpers.metrics import Metric, Tokens, position_in
from helpers.prompts import derangement
from helpers.stats import head_name, progress
from helpers.sweep import Sweep

ABLATIONS = ("zero", "mean", "resample", "pattern-preserving")
Position = int | str | None
Model = TransformerBridge
Sets = list[list[tuple[int, int]]]  # of (layer, head)


# ---- ablations ----


@torch.no_grad()
def ablate_heads(
    model: Model, tokens: Tokens, metric: Metric, how: str = "zero", position: Position = None, seed: int = 0
) -> Float[Tensor, "prompt layer head *pos"]:
    """Effect of ablating each head alone; `position` as in `patch_heads`.

    `how`: "zero"; "mean" over the batch, per position; "resample" from another prompt, by one
    derangement fixed by `seed`; "pattern-preserving": zero, with every pattern frozen as it
    was. Source of the last: Olsson et al. 2022, "pattern-preserving ablations".
    """
    check_ablation(how, tokens)
    at = _resolve(position, tokens, metric)
    sweep = Sweep(model, tokens, metric, first=at if isinstance(at, int) else None, frozen=how == ABLATIONS[3])
    return _each_head(sweep, "z", partial(replacement, how=how, seed=seed), at, tokens.shape[1])


@torch.no_grad()
def ablate_together(
    model: Model, tokens: Tokens, metric: Metric, sets: Sets, how: str = "zero", seed: int = 0
) -> Float[Tensor, "prompt set"]:
    """Effect of ablating each set of heads at once, at all positions; `how` as in `ablate_heads`."""
    check_ablation(how, tokens)
    _check_heads(model, [head for heads in sets for head in heads])
    sweep = Sweep(model, tokens, metric, frozen=how == ABLATIONS[3])
    return _together(sweep, sets, {"z": partial(replacement, how=how, seed=seed)})


def check_ablation(how: str, tokens: Tokens) -> None:
    """Refuse a kind of ablation that there is not, or that has no other prompt to take from."""
    if how not in ABLATIONS:
        raise ValueError(f"unknown ablation {how!r}; known: {', '.join(ABLATIONS)}")
    if how in ("mean", "resample") and len(tokens) == 1:
        raise ValueError(f"{how} ablation takes other prompts of the batch, and there is only 1")


def replacement(z: Float[Tensor, "prompt pos head d_head"], how: str, seed: int) -> Float[Tensor, "... d_head"]:
    """What an ablation puts in the place of z: the same for all prompts, or one for each."""
    if how == "mean":
        return z.mean(0, keepdim=True)
    if how == "resample":
        return z[derangement(len(z), seed).to(z.device)]
    return torch.zeros_like(z[:1])


# ---- patches ----


@torch.no_grad()
def patch_heads(
    model: Model, corrupted: Tokens, clean: Tokens, metric: Metric, what: str = "z", position: Position = None
) -> Float[Tensor, "prompt layer head *pos"]:
    """Effect on the corrupted prompts of giving each head what it has in the clean ones.

    `what`: z, q, k, v or pattern. `position`: all (None), one, the "last" that is read, or
    "each" alone, which adds an axis. Under grouped-query attention a key or value belongs to
    a group of query heads, so that for k and v the head axis counts groups.
    """
    _check_part(what, ("z", "q", "k", "v", "pattern"))
    at = _resolve(position, corrupted, metric)
    sweep = _patching(model, corrupted, clean, metric, (what,), at if isinstance(at, int) else None)
    return _each_head(sweep, what, _of_clean(sweep), at, corrupted.shape[1])


@torch.no_grad()
def patch_resid(
    model: Model, corrupted: Tokens, clean: Tokens, metric: Metric, what: str = "resid"
) -> Float[Tensor, "prompt layer pos"]:
    """Effect of giving one position what it has in the clean prompts.

    `what`: "resid", entering the block; "attn", its attention's output; "mlp", its MLP's.
    """
    _check_part(what, ("resid", "attn") if model.cfg.attn_only else ("resid", "attn", "mlp"))
    sweep = _patching(model, corrupted, clean, metric, () if what == "resid" else (what,))
    if what == "mlp" and torch.equal(sweep.record["mlp"][0], sweep.record["out"][0]):
        raise ValueError(f"the MLP of {model.cfg.architecture} adds the residual stream; patch 'resid' or 'attn'")
    return _each_head(sweep, what, _of_clean(sweep), "each", corrupted.shape[1]).squeeze(2)


@torch.no_grad()
def patch_edges(
    model: Model, corrupted: Tokens, clean: Tokens, metric: Metric, receiver: tuple[int, int], through: str = "q"
) -> Float[Tensor, "prompt layer head"]:
    """Effect of each head of the layers below on `receiver` alone, through its q, k or v: direct paths.

    What the sender writes, clean minus corrupted, reaches that input alone. Where a group of heads shares k and v,
    only the pattern or z that the receiver makes of them is kept.
    Source: Wang et al. 2022, "Interpretability in the Wild", path patching.
    """
    _check_part(through, ("q", "k", "v"))
    _check_heads(model, [receiver])
    (layer, head), n_heads = receiver, model.cfg.n_heads
    n_inputs = n_heads if through == "q" else model.cfg.n_key_value_heads or n_heads
    sweep = _patching(model, corrupted, clean, metric, ())
    index = torch.tensor([head * n_inputs // n_heads, head], device=sweep.baseline.device)
    alone = None if n_inputs == n_heads else _one_of(n_heads, index[1:])
    edge = partial(_edge, sweep, layer, through, _one_of(n_inputs, index[:1]), alone)
    effects = sweep.effects((layer, n_heads, partial(edge, sender)) for sender in range(layer))
    return effects.unflatten(1, (layer, n_heads))


@torch.no_grad()
def patch_together(
    model: Model, corrupted: Tokens, clean: Tokens, metric: Metric, sets: Sets, mlps: bool = False
) -> Float[Tensor, "prompt set"]:
    """Effect of patching z of each set of heads at once, with every MLP's output if `mlps`."""
    _check_heads(model, [head for heads in sets for head in heads])
    parts = ("z", "mlp") if mlps and not model.cfg.attn_only else ("z",)
    sweep = _patching(model, corrupted, clean, metric, parts)
    return _together(sweep, sets, dict.fromkeys(parts, _of_clean(sweep)))


def _check_part(what, known):
    if what not in known:
        raise ValueError(f"cannot patch {what!r} here; known: {', '.join(known)}")


def _check_heads(model, heads):
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"head {head_name(layer, head)} is not one of {n_layers} layers of {n_heads} heads")


def _patching(model, corrupted, clean, metric, parts, first=None):
    if corrupted.shape != clean.shape:
        raise ValueError(f"prompts do not pair up: {tuple(corrupted.shape)} corrupted, {tuple(clean.shape)} clean")
    return Sweep(model, torch.cat([corrupted, clean]), metric, len(corrupted), first, parts=parts)


def _of_clean(sweep):
    return lambda part: part[sweep.n :]


# ---- edits: `where[item, 1, pos, head, 1]` says what is replaced ----


def _one_of(n_heads, heads):
    return (heads[:, None] == torch.arange(n_heads, device=heads.device))[:, None, None, :, None]


def _each_head(sweep, part, replacement, at, n_tokens):
    """Effect of `replacement(part)` in every head alone: [prompt, layer, head], "each" position on a further axis."""
    n_layers, (_, n_pos, n_heads, _) = len(sweep.blocks), sweep.record[part][0].shape
    items = torch.arange(n_heads * (n_pos if at == "each" else 1), device=sweep.baseline.device)
    places = torch.arange(sweep.length - n_pos, sweep.length, device=items.device)
    heads, there = (items // n_pos, places[items % n_pos]) if at == "each" else (items, items.new_tensor([at or 0]))
    where = _one_of(n_heads, heads)
    if at is not None:
        where = where & (there[:, None] == places)[:, None, :, None, None]

    def edit(layer, chosen):
        return sweep.replaced(layer, part, replacement(sweep.record[part][layer])[None], where[chosen])

    layers = progress(range(n_layers), "layers")
    effects = sweep.effects((layer, len(items), partial(edit, layer)) for layer in layers)
    if at != "each":
        return effects.unflatten(1, (n_layers, n_heads))
    # Nothing reaches the metric from positions after the last that is read.
    return nn.functional.pad(effects.unflatten(1, (n_layers, n_heads, n_pos)), (0, n_tokens - sweep.length))


def written(
    sweep: Sweep, layer: int, new: Float[Tensor, "#prompt pos head d_head"], heads: Int[Tensor, "item"]
) -> Float[Tensor, "row pos d_model"]:
    """Change of what a layer's attention adds to the residual stream when one head of it, an item, has z `new`."""
    block, z = sweep.blocks[layer], sweep.record["z"][layer][: sweep.n]
    mixed = torch.where(_one_of(z.shape[2], heads), new, z)
    after, before = block.attn.o(mixed.flatten(0, 1).flatten(2)), sweep.rows("attn", layer, len(heads))
    if "ln1_post" in block.submodules:
        after, before = block.ln1_post(after), block.ln1_post(before)
    return (after - before) * residual_multiplier(sweep.model)


def _edge(sweep, layer, through, inputs, alone, sender, heads):
    """Rows in which `inputs` of a layer, or what head `alone` makes of them, are as if one sender were clean."""
    rows = (len(heads), sweep.n)
    resid = sweep.rows("resid", layer, len(heads))
    heard = resid + written(sweep, sender, sweep.record["z"][sender][sweep.n :], heads)
    new = sweep.inner(layer, heard, through).unflatten(0, rows)
    edit = sweep.swap(layer, through, new, inputs)
    if alone is not None:
        through = "z" if through == "v" else "pattern"
        made = sweep.inner(layer, resid, through, [edit]).unflatten(0, rows)
        edit = sweep.swap(layer, through, made, alone)
    return sweep.through(layer, resid, [edit])


def _together(sweep, sets, replacements):
    """Effect of replacing z of each set's heads, and every MLP's output where one is given: [prompt, set]."""
    cfg, device = sweep.model.cfg, sweep.baseline.device
    members = torch.zeros(cfg.n_layers, len(sets), 1, 1, cfg.n_heads, 1, dtype=torch.bool, device=device)
    for index, heads in enumerate(sets):
        for layer, head in heads:
            members[layer, index, :, :, head] = True
    # Below its lowest head a set changes nothing, so its rows start there.
    lowest = members.flatten(2).any(2).int().argmax(0) * ("mlp" not in replacements)
    by_layer = lowest.argsort(stable=True).split(lowest.bincount(minlength=cfg.n_layers).tolist())

    def edit(start, chosen, items):
        rows = sweep.rows("resid", start, len(items))
        for layer in range(start, cfg.n_layers):
            where = {"z": members[layer, chosen[items]], "mlp": members.new_ones(len(items), 1, 1, 1, 1)}
            new = {part: replacement(sweep.record[part][layer])[None] for part, replacement in replacements.items()}
            rows = sweep.through(layer, rows, [sweep.swap(layer, part, new[part], where[part]) for part in new])
        return rows

    effects = sweep.effects((cfg.n_layers - 1, len(c), partial(edit, start, c)) for start, c in enumerate(by_layer))
    return effects[:, torch.cat(by_layer).argsort().cpu()]


def _resolve(position, tokens, metric):
    if position in (None, "each"):
        return position
    if position == "last":
        return max(position_in(tokens, read, "the metric reads") for read in metric.positions)
    if isinstance(position, str):
        raise ValueError(f"unknown position {position!r}; known: a number, 'last', 'each' or None for all")
    return position_in(tokens, position, "an edit is asked for at")
