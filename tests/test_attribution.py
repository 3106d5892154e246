"""Gradient estimates against the exact sweep: equal where the metric is linear, close for small edits, exact in sum."""

import pytest
import torch
from conftest import SHORTFORMER, shortformer_state

from helpers import attribution, interventions, metrics, models
from helpers.metrics import Metric

MIDPOINTS = tuple((step + 0.5) / 40 for step in range(40))


def some_tokens(n=4, length=9):
    return torch.randint(1, 50, (n, length), generator=torch.Generator().manual_seed(0))


def logits_of(tokens):
    """Sum of the logits of the tokens that stand there: linear in the final residual stream."""
    read = tuple(range(4, tokens.shape[1] - 1))

    def of(logits, rows):
        return logits.gather(2, tokens[rows][:, 5:, None]).sum((1, 2))

    return Metric(read, of)


def linear_model(state):
    return models.build_shortformer({**SHORTFORMER, "normalization_type": None}, state, "linear").eval()


def without_norms():
    return {key: value for key, value in shortformer_state(SHORTFORMER).items() if "ln" not in key}


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_heads_of_the_last_layer_of_a_linear_model_are_exact(how):
    model, tokens = linear_model(without_norms()), some_tokens()
    exact = interventions.ablate_heads(model, tokens, logits_of(tokens), how)
    for recompute in (False, True):
        estimate = attribution.attribute_heads(model, tokens, logits_of(tokens), how, recompute=recompute)
        torch.testing.assert_close(estimate[:, -1], exact[:, -1], atol=2e-4, rtol=1e-4)


def test_recomputed_patterns_are_exact_where_a_head_acts_through_patterns_alone():
    """Layer-0 heads write to dimensions that only layer 1's queries and keys read."""
    state = without_norms()
    state["blocks.0.attn.W_O"][:, :, :16] = 0
    state["blocks.1.attn.W_V"][:, 16:] = state["unembed.W_U"][16:] = 0
    model, tokens = linear_model(state), some_tokens()
    exact = interventions.ablate_heads(model, tokens, logits_of(tokens), "mean")
    repaired = attribution.attribute_heads(model, tokens, logits_of(tokens), "mean", recompute=True)
    torch.testing.assert_close(repaired, exact, atol=2e-4, rtol=1e-4)
    plain = attribution.attribute_heads(model, tokens, logits_of(tokens), "mean")
    assert (plain - exact)[:, 0].abs().max() > 0.05


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", ["shortformer", "gpt2", "gpt-neox", "llama", "gemma3"])
def test_small_edits_are_estimated_well(tiny, architecture, recompute, monkeypatch):
    """A hundredth of the way to the mean: the exact effect is a slope, except by way of heads and MLPs to patterns."""
    model, tokens = tiny(architecture), some_tokens()
    metric, small = metrics.mean_loss(tokens, 4), 0.01

    def nearly(z, how, seed):
        return z + small * (z.mean(0, keepdim=True) - z)

    for module in (interventions, attribution):
        monkeypatch.setattr(module, "replacement", nearly)
    exact = interventions.ablate_heads(model, tokens, metric, "mean") / small
    estimate = attribution.attribute_heads(model, tokens, metric, "mean", recompute=recompute) / small
    last = slice(-2, None) if recompute else slice(None)  # from there on nothing stands between
    if recompute and not model.cfg.attn_only:
        last = slice(-1, None)
    scale = exact[:, last].abs().max()
    assert (estimate - exact)[:, last].abs().max() < 0.08 * scale


def test_integrated_gradients_add_up_to_the_effect_of_all_heads_together(tiny):
    """Moving z of all heads at once by what replaces them: the estimates of the heads are its parts."""
    model, tokens = tiny("shortformer"), some_tokens()
    metric, names = metrics.mean_loss(tokens, 4), [f"blocks.{layer}.attn.hook_z" for layer in range(2)]
    _, cache = model.run_with_cache(tokens)
    hooks = [(name, lambda z, hook, clean=cache[name]: z + clean.mean(0) - clean) for name in names]
    with torch.no_grad():
        moved = metric.of(model.run_with_hooks(tokens, fwd_hooks=hooks)[:, metric.positions], torch.arange(4))
    together = moved - metrics.evaluate(model, tokens, metric)
    estimate = attribution.attribute_heads(model, tokens, metric, "mean", MIDPOINTS).sum((1, 2))
    torch.testing.assert_close(estimate, together, atol=5e-3, rtol=5e-3)


def test_what_cannot_be_estimated_is_refused_and_the_model_stays_as_it_was(tiny):
    model, tokens = tiny("gpt2"), some_tokens()
    metric, before = metrics.mean_loss(tokens, 4), model(tokens)
    attribution.attribute_heads(model, tokens, metric, recompute=True)
    assert torch.equal(model(tokens), before)
    assert all(weight.grad is None for weight in model.parameters())
    with pytest.raises(ValueError, match="no replacement"):
        attribution.attribute_heads(model, tokens, metric, "pattern-preserving")
    with pytest.raises(ValueError, match="only 1"):
        attribution.attribute_heads(model, tokens[:1], metrics.mean_loss(tokens[:1], 4), "mean")
