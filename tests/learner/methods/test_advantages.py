"""Advantages against statistics computed by hand."""

import statistics

import pytest
import torch

from learner.methods.advantages import group_mean, group_mean_std

REWARDS = [[1.0, 0.0, 0.0, 0.0], [0.3, 0.9, -2.0, 4.0], [0.1, 0.1, 0.1, 0.1]]


def test_group_mean_subtracts_each_groups_own_mean() -> None:
    expected = [[r - statistics.fmean(group) for r in group] for group in REWARDS]
    torch.testing.assert_close(group_mean(torch.tensor(REWARDS)), torch.tensor(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_group_mean_std_divides_by_the_sample_deviation(eps: float) -> None:
    expected = [
        [(r - statistics.fmean(group)) / (statistics.stdev(group) + eps) for r in group] for group in REWARDS[:2]
    ]
    torch.testing.assert_close(group_mean_std(torch.tensor(REWARDS[:2]), eps), torch.tensor(expected))


def test_group_mean_std_is_exactly_zero_for_equal_rewards() -> None:
    rewards = torch.full((1, 7), 0.1)  # the mean of seven times 0.1 is not 0.1 in float32
    assert group_mean_std(rewards, 1e-8).eq(0).all()
    assert group_mean(rewards).eq(0).all()
