"""Gradient estimates of what `interventions.ablate_heads` measures: a few runs for all heads instead of one for each.

An estimate follows the metric's slope: (new z - z) . gradient. It is exact where the metric is linear in what is
edited, and far off where the metric, or a softmax on the way to it, is flat. Sources: Nanda 2023, "Attribution
patching"; Syed et al. 2023, "Attribution patching outperforms automated circuit discovery".
"""

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.blocks import PARTS, by_head, hooked
from helpers.interventions import Model, check_ablation, replacement, written
from helpers.metrics import Metric, Tokens
from helpers.sweep import Sweep


def attribute_heads(
    model: Model, tokens: Tokens, metric: Metric, how: str = "mean",
    shares: tuple[float, ...] = (0.0,), recompute: bool = False, seed: int = 0,
) -> Float[Tensor, "prompt layer head"]:  # fmt: skip
    """Estimated effect of ablating each head alone, at all positions; `how` is "zero", "mean" or "resample".

    Gradients are averaged over runs in which the z of all heads has moved the given `shares` of the way to its
    replacement: 0 alone is attribution patching; the midpoints of a few steps are integrated gradients (Hanna et
    al. 2024, "Have faith in faithfulness"). With `recompute`, what a head does to the patterns of later layers
    directly is computed, and only what follows from there is a gradient; that these patterns also hear it by way
    of other heads and MLPs is left out (after Kramár et al. 2024, "AtP*", which does so for queries and keys).

    Raises:
        ValueError: as `interventions.ablate_heads`, and for an ablation that keeps patterns.
    """
    check_ablation(how, tokens)
    if how == "pattern-preserving":
        raise ValueError("'pattern-preserving' has no replacement to move to; estimate 'zero' instead")
    with torch.no_grad():
        sweep = Sweep(model, tokens, metric, parts=("pattern",) if recompute else ())
        z = sweep.record["z"]
        change = [replacement(of_layer, how, seed) - of_layer for of_layer in z]
    slopes = [_slopes(sweep, change, share, "z", frozen=recompute) for share in shares]
    slopes = [sum(of_layer) / len(shares) for of_layer in zip(*slopes)]
    effects = torch.stack([(moved * slope).sum((1, 3)) for moved, slope in zip(change, slopes)], 1)
    if recompute:
        slopes = [_slopes(sweep, change, share, "pattern") for share in shares]
        effects += _by_patterns(sweep, z, change, [sum(of_layer) / len(shares) for of_layer in zip(*slopes)])
    return effects.cpu()


def _slopes(sweep, change, share, part, frozen=False) -> list[Tensor]:
    """Slope of the metric by a part of each layer, with z moved a share of the way; `frozen` patterns carry none."""
    found = []

    def follow(x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        x.retain_grad()
        found.append(x)
        return x

    def move(layer):
        moved = share * change[layer]
        return lambda _, __, z: (follow if part == "z" else torch.clone)(z + moved.view(z.shape))

    def pattern(_, __, out):
        return follow(out) if part == "pattern" else out.detach() if frozen else out

    hooks = [(block.get_submodule(PARTS["z"]), move(layer)) for layer, block in enumerate(sweep.blocks)]
    hooks += [(block.get_submodule(PARTS["pattern"]), pattern) for block in sweep.blocks]
    hooks.append((sweep.model.unembed.hook_in, lambda _, __, resid: resid[:, sweep.read]))
    with torch.enable_grad(), hooked(hooks):
        sweep.metric.of(sweep.model(sweep.tokens), sweep.prompts).sum().backward()
    return [by_head(sweep.model, x.grad, part, sweep.n) for x in found]


@torch.no_grad()
def _by_patterns(sweep, z, change, slopes) -> Tensor:
    """Change of every later pattern that hears one head's new z, times the metric's slope by it."""
    heads = torch.arange(change[0].shape[2], device=z[0].device)
    effects = torch.zeros(sweep.n, len(z), len(heads), device=z[0].device)
    for sender in range(len(z)):
        wrote = written(sweep, sender, z[sender] + change[sender], heads)
        for layer in range(sender + 1, len(z)):
            new = sweep.inner(layer, sweep.rows("resid", layer, len(heads)) + wrote, "pattern")
            moved = new.unflatten(0, (len(heads), sweep.n)) - sweep.record["pattern"][layer]
            effects[:, sender] += (moved * slopes[layer]).sum((2, 3, 4)).T
    return effects
