"""The stock way to every result of a sweep: TransformerLens's own hooks on the whole model, one edit at a time.

Tests and benchmarks hold the sweeps to these loops; nothing here is fast, and nothing uses `helpers.sweep`.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.profiler import profile
from transformer_lens import patching

from helpers.interventions import derangement


def cached(model, tokens: Tensor, name: str) -> list[Tensor]:
    """One activation of every layer; `name` has {} where the layer stands."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith(name.split("{}")[-1]))
    return [cache[name.format(layer)] for layer in range(model.cfg.n_layers)]


def measured(model, tokens: Tensor, metric, hooks=()) -> Tensor:
    """The metric of one whole run with hooks."""
    read, rows = [p % tokens.shape[1] for p in metric.positions], torch.arange(len(tokens))
    with torch.no_grad():
        return metric.of(model.run_with_hooks(tokens, fwd_hooks=list(hooks))[:, read], rows)


def loop(model, tokens: Tensor, metric, name: str, edit, indices: list, shape: tuple) -> Tensor:
    """Effects `[prompt, *shape]` at `indices`, one run each; `edit(activation, *index)` changes a copy in place."""

    def hook(activation, hook, index):
        return edit(activation.clone(), *index)

    effects, baseline = torch.zeros(len(tokens), *shape), measured(model, tokens, metric)
    for index in indices:
        hooks = [(name.format(index[0]), partial(hook, index=index))]
        effects[(slice(None), *index)] = measured(model, tokens, metric, hooks) - baseline
    return effects


def everywhere(shape: tuple) -> list:
    """Every index of a shape."""
    return torch.cartesian_prod(*map(torch.arange, shape)).tolist()


def ablation_loop(model, tokens, metric, how, position=slice(None), seed=0, heads=None) -> Tensor:
    """Effects [prompt, layer, head] of ablating heads one at a time; `heads` are all, or (layer, head) pairs."""
    z, other = cached(model, tokens, "blocks.{}.attn.hook_z"), derangement(len(tokens), seed)
    new = {"mean": lambda x: x.mean(0, keepdim=True).expand_as(x), "resample": lambda x: x[other]}
    new = [new.get(how, torch.zeros_like)(x) for x in z]

    def edit(activation, layer, head):
        activation[:, position, head] = new[layer][:, position, head]
        return activation

    frozen = cached(model, tokens, "blocks.{}.attn.hook_pattern") if how == "pattern-preserving" else []
    hooks = [(f"blocks.{i}.attn.hook_pattern", lambda _, hook, p=pattern: p) for i, pattern in enumerate(frozen)]
    shape = model.cfg.n_layers, model.cfg.n_heads
    with model.hooks(fwd_hooks=hooks):
        return loop(model, tokens, metric, "blocks.{}.attn.hook_z", edit, heads or everywhere(shape), shape)


def patch_loop(model, corrupted, clean, metric, what, position=slice(None), heads=None) -> Tensor:
    """Effects [prompt, layer, head] of giving heads the clean z, q, k, v or pattern, one at a time."""
    name = f"blocks.{{}}.attn.hook_{what}"
    source = cached(model, clean, name)

    def edit(activation, layer, head):
        at = (slice(None), head, position) if what == "pattern" else (slice(None), position, head)
        activation[at] = source[layer][at]
        return activation

    shape = model.cfg.n_layers, source[0].shape[1 if what == "pattern" else 2]
    return loop(model, corrupted, metric, name, edit, heads or everywhere(shape), shape)


def stream_loop(model, corrupted, clean, metric, name) -> Tensor:
    """Effects [prompt, layer, pos] of giving one position of an activation of width d_model its clean value."""
    source = cached(model, clean, name)

    def edit(activation, layer, position):
        flat, clean_flat = (x.view(len(corrupted), -1, x.shape[-1]) for x in (activation, source[layer]))
        flat[:, position] = clean_flat[:, position]
        return activation

    shape = model.cfg.n_layers, corrupted.shape[1]
    return loop(model, corrupted, metric, name, edit, everywhere(shape), shape)


def library_patch(model, corrupted, clean, metric, heads: list, last_only: bool):
    """A function that patches z of heads one at a time by TransformerLens's `patching` module: mean metrics [head]."""
    where = pd.DataFrame(heads, columns=["layer", "head"])
    setter = patching.layer_head_vector_patch_setter
    if last_only:
        where.insert(1, "pos", corrupted.shape[1] - 1)
        setter = patching.layer_pos_head_vector_patch_setter
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))
    read, everyone = [p % corrupted.shape[1] for p in metric.positions], torch.arange(len(corrupted))

    def mean_metric(logits):
        return metric.of(logits[:, read], everyone).mean()

    def run():
        with torch.no_grad():
            return patching.generic_activation_patch(
                model, corrupted, cache, mean_metric, setter, "z", index_df=where, verbose=False
            )  # fmt: skip

    return run


def peak_bytes(run) -> int:
    """Most bytes of tensors held at once during a call, beyond what was held before it."""
    with profile(profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return int(np.cumsum(sizes).max())
