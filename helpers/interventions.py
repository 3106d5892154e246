"""Edits whose effect on a metric is measured for every head, position or edge: ablations and patches.

Effects are edited minus unedited metric, one for each prompt. All of them run on the one
engine of `helpers.sweep`, and equal running the whole model once for each edit.
"""

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from helpers.prompts import Prompts
from helpers.sweep import Metric, Sweep, Tokens, check, finite, position_in, sweeping

ABLATIONS = ("zero", "mean", "resample", "pattern-preserving")
_PARTS = {"z": "attn.o.hook_in", "q": "attn.q", "k": "attn.k", "v": "attn.v", "pattern": "attn.hook_pattern"}
Head = tuple[int, int]  # layer and head


# ---- metrics ----


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
    """Mean of -log p(token) over the tokens from position `first` on, in nats."""

    def of(logits, rows):
        targets = tokens[rows, first:]
        # Flat, because a softmax over an axis that is not the last one is slow with a large vocabulary.
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)

    return Metric(tuple(range(first - 1, tokens.shape[1] - 1)), of)


def evaluate(model: TransformerBridge, tokens: Tokens, metric: Metric, chunk: int = 8) -> Float[Tensor, "prompt"]:
    """The metric of the unedited model."""
    read = check(model, tokens, metric)
    everyone = torch.arange(len(tokens), device=tokens.device)
    with torch.no_grad():
        parts = [metric.of(finite(model(tokens[rows])[:, read]), rows) for rows in everyone.split(chunk)]
    return torch.cat(parts)


def recovery(effect: Float[Tensor, "prompt *rest"], gap: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt *rest"]:
    """Effects as a share of `gap`, the clean minus the corrupted metric: 1 is all of it.

    The mean over prompts is mean effect / mean gap. One prompt's value is its part in that
    ratio, linearised, so that an interval over prompts is one of the ratio: prompts whose gaps
    differ do not widen it, and an effect equal to the gap is 1 for each of them.

    Raises:
        ValueError: clean and corrupted prompts do not differ.
    """
    if abs(mean := float(gap.mean())) < 1e-6:
        raise ValueError(f"clean and corrupted metrics differ by {mean:.1e} on average; nothing is a share of that")
    ratio = effect.mean(0) / mean
    return ratio + (effect - ratio * gap.view(-1, *[1] * ratio.ndim)) / mean


# ---- ablations ----


def ablate_heads(
    model: TransformerBridge,
    tokens: Tokens,
    metric: Metric,
    how: str = "zero",
    position: int | str | None = None,
    seed: int = 0,
    budget: int | None = None,
) -> Float[Tensor, "prompt layer head *pos"]:
    """Effect of ablating each head alone; `position` as in `patch_heads`.

    `how`: "zero"; "mean" over the batch, per position; "resample" from another prompt, by one
    derangement fixed by `seed`; "pattern-preserving": zero, with every pattern frozen as it
    was. Source of the last: Olsson et al. 2022, "pattern-preserving ablations".

    Raises:
        ValueError: `how` or a position is unknown, the batch is empty or too long, or logits are nan.
    """
    _check_ablation(how, tokens)
    at = _resolve(position, tokens, metric)
    with sweeping(model, tokens, metric, first=_first(at), frozen=how == ABLATIONS[3], budget=budget) as sweep:
        for layer in sweep.layers():
            _replace_z(sweep, layer, _replacement(layer.seen["z"], how, seed), at)
        return _stack(sweep, model.cfg.n_heads, at, tokens.shape[1])


def ablate_together(
    model: TransformerBridge,
    tokens: Tokens,
    metric: Metric,
    sets: list[list[Head]],
    how: str = "zero",
    seed: int = 0,
    budget: int | None = None,
) -> Float[Tensor, "prompt set"]:
    """Effect of ablating each set of heads at once, at all positions; `how` as in `ablate_heads`.

    Raises:
        ValueError: as `ablate_heads`, or a head does not exist.
    """
    _check_ablation(how, tokens)
    _check_heads(model, [head for heads in sets for head in heads])
    with sweeping(model, tokens, metric, frozen=how == ABLATIONS[3], budget=budget) as sweep:
        new = {layer.index: _replacement(layer.seen["z"], how, seed) for layer in sweep.layers()}
        return _together(sweep, sets, new)


def derangement(n: int, seed: int) -> Int[Tensor, "n"]:
    """Another prompt for each of `n`: the next one along a random cycle through all of them."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def _check_ablation(how, tokens):
    if how not in ABLATIONS:
        raise ValueError(f"unknown ablation {how!r}; known: {', '.join(ABLATIONS)}")
    if how == "resample" and len(tokens) == 1:
        raise ValueError("resampling takes another prompt of the batch, and there is only 1")


def _check_heads(model, heads):
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"head L{layer}H{head} is not one of {n_layers} layers of {n_heads} heads")


def _replacement(z, how, seed):
    if how == "mean":
        return z.mean(0, keepdim=True).expand_as(z)
    if how == "resample":
        return z[derangement(len(z), seed).to(z.device)]
    return torch.zeros_like(z)


# ---- patches ----


def patch_heads(
    model: TransformerBridge,
    corrupted: Tokens,
    clean: Tokens,
    metric: Metric,
    what: str = "z",
    position: int | str | None = None,
    budget: int | None = None,
) -> Float[Tensor, "prompt layer head *pos"]:
    """Effect on the corrupted prompts of giving each head what it has in the clean ones.

    `what`: z, q, k, v or pattern. `position`: all (None), one, the "last" that is read, or
    "each" alone, which adds an axis. Under grouped-query attention a key or value belongs to
    a group of query heads, so that for k and v the head axis counts groups.

    Raises:
        ValueError: as `ablate_heads`, or the prompts do not pair up.
    """
    _check_part(what, _PARTS)
    at = _resolve(position, corrupted, metric)
    with _patching(model, corrupted, clean, metric, at, budget) as sweep:
        for layer in sweep.layers(**{} if what == "z" else {what: _PARTS[what]}):
            n_heads = _patch_layer(sweep, layer, what, at)
        return _stack(sweep, n_heads, at, corrupted.shape[1])


def patch_resid(
    model: TransformerBridge,
    corrupted: Tokens,
    clean: Tokens,
    metric: Metric,
    what: str = "resid",
    budget: int | None = None,
) -> Float[Tensor, "prompt layer pos"]:
    """Effect of giving one position what it has in the clean prompts.

    `what`: "resid", entering the block; "attn", its attention's output; "mlp", its MLP's.

    Raises:
        ValueError: as `patch_heads`, or the model has no MLP.
    """
    _check_part(what, ("resid", "attn") if model.cfg.attn_only else ("resid", "attn", "mlp"))
    with _patching(model, corrupted, clean, metric, None, budget) as sweep:
        for layer in sweep.layers(**{"mlp": "hook_mlp_out"} if what == "mlp" else {}):
            _patch_streams(sweep, layer, what)
        return _stack(sweep, 1, "each", corrupted.shape[1]).squeeze(2)


def patch_edges(
    model: TransformerBridge,
    corrupted: Tokens,
    clean: Tokens,
    metric: Metric,
    receiver: Head,
    through: str = "q",
    budget: int | None = None,
    shared: bool = False,
) -> Float[Tensor, "prompt layer head"]:
    """Effect of each earlier head on `receiver` alone, through its q, k or v: direct paths.

    What the sender writes, clean minus corrupted, reaches only the receiver's input; every
    other reader sees the corrupted one. The result has the layers below the receiver's. Where k
    and v are shared by a group of heads, `shared` makes the receiver's whole group the reader.
    Source: Wang et al. 2022, "Interpretability in the Wild", path patching.

    Raises:
        ValueError: as `patch_heads`, or k and v are shared by a group of heads and `shared` is not set.
    """
    _check_part(through, ("q", "k", "v"))
    _check_heads(model, [receiver])
    groups = model.cfg.n_key_value_heads or model.cfg.n_heads
    if through != "q" and groups != model.cfg.n_heads and not shared:
        raise ValueError(f"{through!r} of one head is not defined: {model.cfg.n_heads} heads share {groups} of it")
    with _patching(model, corrupted, clean, metric, None, budget) as sweep:
        senders = []
        for layer in sweep.layers():
            if layer.index < receiver[0]:
                senders.append(replace(layer, resid=layer.resid[:0], out=layer.out[:0]))
                sweep.kept += 2 * layer.seen["z"].numel()
            elif layer.index == receiver[0]:
                n_readers = sweep.n_heads if through == "q" else groups
                edit = _edge_edit(sweep, senders, layer, receiver[1] * n_readers // sweep.n_heads, n_readers, through)
                sweep.measure(layer.index, len(senders) * sweep.n_heads, edit, sweep.width(layer.index))
        return (sweep.values()[0] - sweep.baseline[:, None]).unflatten(1, (len(senders), sweep.n_heads))


def patch_together(
    model: TransformerBridge,
    corrupted: Tokens,
    clean: Tokens,
    metric: Metric,
    sets: list[list[Head]],
    mlps: bool = False,
    budget: int | None = None,
) -> Float[Tensor, "prompt set"]:
    """Effect of patching z of each set of heads at once, with every MLP's output if `mlps`.

    Raises:
        ValueError: as `patch_heads`, or a head does not exist.
    """
    _check_heads(model, [head for heads in sets for head in heads])
    mlps = mlps and not model.cfg.attn_only
    with _patching(model, corrupted, clean, metric, None, budget) as sweep:
        z, mlp = {}, {}
        for layer in sweep.layers(**{"mlp": "hook_mlp_out"} if mlps else {}):
            z[layer.index] = layer.seen["z"][sweep.n :]
            if mlps:
                mlp[layer.index] = layer.seen["mlp"][sweep.n :]
        return _together(sweep, sets, z, mlp)


def _check_part(what, known):
    if what not in known:
        raise ValueError(f"cannot patch {what!r} here; known: {', '.join(known)}")


def _patching(model, corrupted, clean, metric, at, budget) -> AbstractContextManager[Sweep]:
    if corrupted.shape != clean.shape:
        raise ValueError(f"prompts do not pair up: {tuple(corrupted.shape)} corrupted, {tuple(clean.shape)} clean")
    return sweeping(model, torch.cat([corrupted, clean]), metric, n=len(corrupted), first=_first(at), budget=budget)


# ---- edits: from which items, at which positions, in which rows, to streams that leave the block ----


def _replace_z(sweep, layer, new, at):
    _each_head(sweep, layer, layer.seen["z"], at, _z_edit(sweep, layer, new), sweep.attention_ends_block)


def _patch_layer(sweep, layer, what, at):
    """Ask for one part of every head of a layer, and say how many heads have one of their own."""
    tensor, n = _by_head(layer.seen[what], what, sweep.model.cfg.d_head), sweep.n
    if what == "z":
        _replace_z(sweep, layer, tensor[n:], at)
    else:
        _each_head(sweep, layer, tensor, at, _part_edit(sweep, layer, what, tensor[n:]))
    return tensor.shape[2]


def _patch_streams(sweep, layer, what):
    tensor = layer.resid if what == "resid" else layer.seen[what]
    _each_head(sweep, layer, tensor[:, :, None], "each", _resid_edit(sweep, layer, what, tensor))


def _z_edit(sweep, layer, new):
    """z of a head becomes `new[prompt, pos, head, d_head]`."""

    def edit(heads, at, rows):
        return sweep.from_attention(layer, _attention(sweep, layer, new, heads, at, rows), rows)

    return edit


def _attention(sweep, layer, new, heads, at, rows):
    """What attention gives where z of one head in each row is `new`."""
    z, row = layer.seen["z"].index_select(0, rows), torch.arange(len(rows), device=rows.device)
    mixed = new[rows, :, heads]
    if at is not None:
        mixed = torch.where(_chosen(at, z)[..., None], mixed, z[row, :, heads])
    z[row, :, heads] = mixed
    # Not the change through W_O alone: what a large head writes cancels, and rounds badly.
    return sweep.blocks[layer.index].attn.o(z.flatten(2))


def _part_edit(sweep, layer, what, source):
    """Part `what` of a head becomes `source[prompt, pos, head, width]`."""
    module = sweep.blocks[layer.index].get_submodule(_PARTS[what])
    every = torch.arange(source.shape[2], device=source.device)

    def edit(heads, at, rows):
        mask = _chosen(at, source)[..., None] & (heads[:, None] == every)[:, None]
        hooks = [(module, _swap(what, source[rows], mask))]
        return sweep.through(layer.index, layer.resid[rows], rows, hooks)

    return edit


def _swap(what, new, mask):
    """Hook that puts `new[row, pos, head, width]` where `mask[row, pos, head]`."""

    def hook(_, __, out):
        old = _by_head(out, what, new.shape[3])
        tail = new[:, -old.shape[1] :, :, -old.shape[3] :]
        mixed = torch.where(mask[:, -old.shape[1] :, :, None], tail, old)
        return mixed.transpose(1, 2) if what == "pattern" else mixed.flatten(2)

    return hook


def _by_head(tensor, what, d_head):
    """View as [row, pos, head, width]."""
    if what == "pattern":
        return tensor.transpose(1, 2)
    return tensor if tensor.ndim == 4 else tensor.unflatten(2, (-1, d_head))


def _resid_edit(sweep, layer, what, tensor):
    """What enters the block, or what its attention or its MLP gives, becomes that of the clean prompts."""

    def edit(_, at, rows):
        delta = (tensor[sweep.n + rows] - tensor[rows]) * _chosen(at, tensor)[..., None]
        if what == "attn":
            return sweep.from_attention(layer, tensor[rows] + delta, rows)
        if what == "resid":
            return sweep.through(layer.index, tensor[rows] + delta, rows)
        return layer.out[rows] + delta

    return edit


def _edge_edit(sweep, senders, layer, receiver, n_readers, through):
    """Input `through` of one of `n_readers` becomes what it would be if one sender were clean."""
    module, n = sweep.blocks[layer.index].get_submodule(_PARTS[through]), sweep.n_heads
    only = torch.arange(n_readers, device=sweep.tokens.device).eq(receiver)[None, None]

    def edit(items, rows):
        resid = layer.resid[rows]
        for sender in senders:
            mine = items // n == sender.index
            if mine.any():
                resid[mine] += _contribution(sweep, sender, items[mine] % n, rows[mine])
        new = sweep.part(layer.index, resid, rows, module).unflatten(2, (n_readers, -1))
        hooks = [(module, _swap(through, new, only))]
        return sweep.through(layer.index, layer.resid[rows], rows, hooks)

    return edit


def _contribution(sweep, layer, heads, rows):
    """What heads add to the residual stream, clean minus corrupted: after any norm of their sum."""
    block, before = sweep.blocks[layer.index], layer.seen["attn"][rows]
    after = _attention(sweep, layer, layer.seen["z"][sweep.n :], heads, None, rows)
    if "ln1_post" not in block.submodules:
        return after - before
    return block.ln1_post(after) - block.ln1_post(before)


def _together(sweep, sets, z, mlp=()):
    """Effect of replacing z of each set's heads, and every MLP's output, by layer."""
    members = torch.zeros(sweep.n_layers, len(sets), 1, sweep.n_heads, dtype=torch.bool)
    for index, heads in enumerate(sets):
        for layer, head in heads:
            members[layer, index, 0, head] = True
    members = members.to(sweep.tokens.device)

    def hooks(layer, items, rows):
        block = sweep.blocks[layer]
        pairs = [(block.attn.o.hook_in, _swap("z", z[layer][rows], members[layer, items]))]
        if mlp:
            pairs.append((block.hook_mlp_out, lambda _, __, out: mlp[layer][rows][:, -out.shape[1] :]))
        return pairs

    def edit(items, rows):
        resid = sweep.embed[rows]
        for layer in range(sweep.n_layers):
            resid = sweep.through(layer, resid, rows, hooks(layer, items, rows))
        return resid

    sweep.measure(sweep.n_layers - 1, len(sets), edit, sweep.width(0))
    return sweep.values()[0] - sweep.baseline[:, None]


# ---- positions ----


def _resolve(position, tokens, metric):
    if position in (None, "each"):
        return position
    if position == "last":
        return max(position_in(tokens, read, "the metric reads") for read in metric.positions)
    if isinstance(position, str):
        raise ValueError(f"unknown position {position!r}; known: a number, 'last', 'each' or None for all")
    return position_in(tokens, position, "an edit is asked for at")


def _first(at):
    return at if isinstance(at, int) else None


def _chosen(at, tensor):
    """Which positions of [row, pos, ...] are edited: [row, pos], or [1, pos] where rows agree."""
    if at is None:
        return torch.ones(1, tensor.shape[1], dtype=torch.bool, device=tensor.device)
    return at[:, None] == torch.arange(-tensor.shape[1], 0, device=tensor.device)


def _each_head(sweep, layer, tensor, at, edit, light=False):
    """Measure `edit(heads, at, rows)`, `at` counting positions from the end, None for all; `light` runs no block."""
    length, n_heads = tensor.shape[1:3]
    stream = length * sweep.model.cfg.d_model
    width = 5 * stream if light else 2 * stream + sweep.width(layer.index)
    if at == "each":
        n_items, each = n_heads * length, lambda i, rows: edit(i // length, i % length - length, rows)
    else:
        where = None if at is None else torch.tensor([at - sweep.length], device=sweep.tokens.device)
        n_items, each = n_heads, lambda heads, rows: edit(heads, where, rows)
    sweep.measure(layer.index, n_items, each, width)


def _stack(sweep, n_heads, at, length):
    """Layers on axis 1, minus the baseline; 0 at positions from which nothing reaches the metric."""
    effects = [values - sweep.baseline[:, None] for values in sweep.values()]
    if at == "each":
        after = length - sweep.length
        effects = [part.unflatten(1, (n_heads, -1)) for part in effects]
        effects = [nn.functional.pad(part, (sweep.length - part.shape[2], after)) for part in effects]
    return torch.stack(effects, 1)
