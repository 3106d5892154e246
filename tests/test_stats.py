"""Intervals that cover, tables in order, losses against the definition."""

import numpy as np
import pytest
import torch

from helpers import stats


def test_head_names_count_from_zero():
    assert stats.head_name(5, 1) == "L5H1"


def test_a_95_percent_interval_covers_the_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        _, low, high = stats.bootstrap_interval(rng.normal(2.0, 1.0, 40), seed=trial)
        hits += low <= 2.0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_bootstrap_is_seeded_and_keeps_shape():
    values = np.random.default_rng(0).normal(size=(20, 3, 4))
    mean, low, high = stats.bootstrap_interval(values)
    assert mean.shape == low.shape == high.shape == (3, 4) and (low <= mean).all() and (mean <= high).all()
    assert np.array_equal(low, stats.bootstrap_interval(values)[1])
    assert stats.estimate([1.0, 1.0, 1.0]) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 3, "values": [1.0] * 3}


@pytest.mark.parametrize("n", [5, 6, 12, 19])
def test_small_samples_are_clear_of_zero_by_chance_five_times_in_100(n):
    values = np.random.default_rng(n).normal(size=(n, 4000))
    _, low, high = stats.bootstrap_interval(values)
    assert 0.035 <= ((low > 0) | (high < 0)).mean() <= 0.065


def test_under_five_samples_show_themselves():
    assert stats.estimate([3.0, 1.0]) == {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 2, "values": [3.0, 1.0]}
    assert "values" not in stats.estimate([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("n", [12, 48])
def test_a_familywise_interval_is_seldom_clear_of_zero_anywhere(n):
    rng, clear = np.random.default_rng(n), 0
    for trial in range(200):
        _, low, high = stats.familywise_interval(rng.normal(size=(n, 4, 10)), seed=trial)
        clear += ((low > 0) | (high < 0)).any()
    assert clear / 200 <= 0.10
    with pytest.raises(ValueError, match="4 samples are too few"):
        stats.familywise_interval(np.zeros((4, 3)))


@pytest.mark.parametrize("n", [12, 24])
def test_a_familywise_interval_finds_what_is_there(n):
    values = np.random.default_rng(0).normal(size=(n, 50))
    values[:, 7] += 3
    mean, low, _ = stats.familywise_interval(values)
    assert (low > 0).nonzero()[0].tolist() == [7] and mean[7] == pytest.approx(values[:, 7].mean())


def test_q_values_hold_the_share_of_false_discoveries():
    values = np.random.default_rng(0).normal(size=(30, 20, 50))
    assert (stats.q_values(values) <= 0.05).sum() <= 2
    values[:, 3, :20] += 2
    found = stats.q_values(values, above=0.5) <= 0.05
    assert found[3, :20].all() and found.sum() - 20 <= 3
    assert stats.q_values(np.zeros((6, 3))).tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad, message", [([], "no samples"), ([1.0, np.nan], "1 of 2"), ([np.inf], "1 of 1")])
def test_bad_samples_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        stats.bootstrap_interval(np.array(bad))


def test_head_table_ranks_heads():
    samples = torch.zeros(4, 2, 3)
    samples[:, 1, 2], samples[:, 0, 1] = 0.9, 0.4
    table = stats.head_table(samples, "score")
    assert table["head"].tolist()[:2] == ["L1H2", "L0H1"] and table["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["score"][0] == pytest.approx(0.9)


@pytest.mark.parametrize("architecture", ["shortformer", "gpt2", "gpt-neox", "llama", "gemma3"])
def test_token_losses_are_minus_log_p(architecture, tiny):
    model = tiny(architecture)
    tokens = torch.randint(0, 50, (100, 12), generator=torch.Generator().manual_seed(0))
    expected = -model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(stats.token_losses(model, tokens), expected, atol=1e-5, rtol=1e-5)


def test_in_context_score_reads_the_named_tokens():
    losses = torch.arange(1.0, 512.0)[None]  # the loss on token i is i
    assert stats.in_context_score(losses).item() == 450
    assert stats.in_context_score(losses, window=10).item() == 450
    with pytest.raises(ValueError, match="no token 500"):
        stats.in_context_score(losses[:, :100])
    with pytest.raises(ValueError, match="or -2"):
        stats.in_context_score(losses[:, :64], early=8, late=50, window=10)
