"""Shares of a gap: what they are, and when there is none."""

import numpy as np
import pytest
import torch

from helpers.metrics import by_class, mean_loss, recovery
from helpers.stats import bootstrap_interval


def test_recovery_is_the_ratio_of_means_and_an_effect_equal_to_the_gap_is_one_for_every_prompt():
    gap = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    effect = torch.stack([gap, 0.5 * gap, gap.flip(0)], 1)
    share = recovery(effect, gap)
    assert share.mean(0).tolist() == pytest.approx([1, 0.5, 1])
    assert share[:, :2].std(0).max() < 1e-6 and share[:, 2].std() > 0.1


@pytest.mark.parametrize("n", [2, 6, 24])  # the interval is the smallest and largest value, a t, or a bootstrap one
def test_recovery_refuses_a_gap_whose_interval_contains_zero(n):
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean()
    just_above = noise - float(bootstrap_interval(noise.numpy())[1]) + 0.01
    assert recovery(just_above, just_above).mean() == pytest.approx(1)
    assert recovery(-just_above, -just_above).mean() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"\[-.*\], an interval that contains zero.*take prompts on which"):
        recovery(just_above - 0.02, just_above - 0.02)


def test_recovery_refuses_prompts_that_do_not_differ():
    with pytest.raises(ValueError, match="an interval that contains zero"):
        recovery(torch.ones(2), torch.zeros(2))


def test_a_class_has_the_mean_of_its_tokens_and_needs_enough_texts():
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(12, 30, generator=generator), np.where(np.arange(360).reshape(12, 30) % 7, "a", "b")
    labels[0, :5] = "rare"
    found = by_class(values, labels, ["a", "b", "rare"])
    assert found.keys() == {"a", "b"}
    for name, samples in found.items():
        assert len(samples) == 12
        torch.testing.assert_close(samples.mean(), values[torch.from_numpy(labels == name)].mean())


@pytest.mark.parametrize("first", [0, -1, 6])
def test_a_loss_that_nothing_predicts_is_refused(first):
    with pytest.raises(ValueError, match=f"position {first} on of prompts of 6 tokens; the first is at 1"):
        mean_loss(torch.ones(2, 6, dtype=torch.long), first)
