"""Scores against hand-made patterns whose values are known exactly, and against TransformerLens."""

import pytest
import torch
from torch.nn.functional import one_hot

from helpers import attention, prompts

L = 6
N = 2 * L + 1
QUERIES = torch.arange(N)


def look(keys):
    """A pattern [1, 1, N, N] whose query q puts all attention on keys[q]."""
    return one_hot(torch.as_tensor(keys).clamp_min(0), N).float()[None, None]


INDUCTION = look(torch.where(QUERIES > L, QUERIES - (L - 1), 0))
PREVIOUS = look(QUERIES - 1)
RESTING = look(torch.zeros(N, dtype=torch.long))
UNIFORM = (torch.ones(N, N).tril() / torch.arange(1, N + 1)[:, None])[None, None]


@pytest.mark.parametrize(
    "pattern, induction, previous",
    # Whoever rests on BOS looks one back at query 1.
    [(INDUCTION, 1, 1 / (N - 1)), (PREVIOUS, 0, 1), (RESTING, 0, 1 / (N - 1))],
)
def test_perfect_heads_score_exactly(pattern, induction, previous):
    assert attention.induction_score(pattern, L).item() == induction
    assert attention.previous_token_score(pattern).item() == pytest.approx(previous)


def test_uniform_attention_scores_its_harmonic_mean():
    expected = sum(1 / (q + 1) for q in range(L + 1, N)) / L
    assert attention.induction_score(UNIFORM, L).item() == pytest.approx(expected)


def test_a_mixture_scores_its_share():
    mixed = 0.3 * INDUCTION + 0.7 * PREVIOUS
    assert attention.induction_score(mixed, L).item() == pytest.approx(0.3)
    assert attention.previous_token_score(mixed).item() == pytest.approx(0.7 + 0.3 / (N - 1))


def test_heads_and_prompts_stay_apart():
    stacked = torch.cat([torch.cat([INDUCTION, PREVIOUS], 1), torch.cat([RESTING, INDUCTION], 1)])
    assert attention.induction_score(stacked, L).tolist() == [[1, 0], [0, 1]]


def test_previous_token_score_agrees_with_detect_head(two_layers):
    from transformer_lens.head_detector import detect_head

    text = "def load(path):\n    return read(path)\n"
    tokens = two_layers.to_tokens(text)
    theirs = detect_head(two_layers, text, "previous_token_head")
    ours = attention.score_heads(two_layers, tokens, attention.previous_token_score)[0]
    n = tokens.shape[1]
    torch.testing.assert_close(ours, theirs.float() * n / (n - 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["shortformer", "gpt2", "gpt-neox", "llama", "gemma3"])
def test_score_heads_equals_the_cache(architecture, tiny):
    model = tiny(architecture)
    tokens = prompts.repeated_tokens(model, length=9, batch=5, seed=0)
    found = attention.score_heads(model, tokens, lambda p: attention.induction_score(p, 9))
    _, cache = model.run_with_cache(tokens)
    expected = torch.stack([attention.induction_score(cache["pattern", i], 9) for i in range(model.cfg.n_layers)], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_samples_pool_prompts_over_seeds(two_layers):
    samples = attention.induction_samples(two_layers, seeds=(3, 4), length=10, batch=2)
    assert samples.shape == (4, 2, 8)
    alone = attention.induction_samples(two_layers, seeds=(4,), length=10, batch=2)
    torch.testing.assert_close(samples[2:], alone)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="13 tokens"):
        attention.induction_score(INDUCTION, L + 1)
