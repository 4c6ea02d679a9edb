"""Advantages against statistics computed by hand."""

import statistics

import pytest
import torch

from learner.methods.advantages import (
    batch_normalized,
    group_mean,
    group_mean_std,
    group_normalized_rewards,
    leave_one_out,
    soft_overlong_punishment,
)

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


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    expected = [
        [reward - statistics.fmean(group[:i] + group[i + 1 :]) for i, reward in enumerate(group)] for group in REWARDS
    ]
    torch.testing.assert_close(leave_one_out(torch.tensor(REWARDS)), torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_batch_normalized_knows_no_groups() -> None:
    flat = [reward for group in REWARDS for reward in group]
    mean, deviation = statistics.fmean(flat), statistics.stdev(flat)
    expected = [[(reward - mean) / (deviation + 0.1) for reward in group] for group in REWARDS]
    torch.testing.assert_close(batch_normalized(torch.tensor(REWARDS), 0.1), torch.tensor(expected))
    assert batch_normalized(torch.full((3, 1), 0.1), 1e-8).eq(0).all()


def test_soft_overlong_punishment_grows_over_the_buffer() -> None:
    lengths = torch.tensor([[0, 11, 12, 13], [14, 15, 16, 20]])
    expected = torch.tensor([[0.0, 0.0, 0.0, -0.5], [-1.0, -1.5, -2.0, -2.0]])
    torch.testing.assert_close(soft_overlong_punishment(lengths, 16, buffer=4, penalty=2.0), expected)
    assert soft_overlong_punishment(torch.tensor(15), 16, 1, 1.0).item() == 0.0
    with pytest.raises(AssertionError, match="found a buffer of 0"):
        soft_overlong_punishment(lengths, 16, 0, 1.0)


def test_group_normalized_rewards_of_single_completions_say_nothing() -> None:
    advantages, rewards, figures = group_normalized_rewards(lambda r, a: {"reward": 1.0}, ["1"], ["1"], 1)
    assert (advantages.tolist(), rewards.tolist(), figures["reward_std"]) == ([0.0], [1.0], 0.0)
    with pytest.raises(ValueError, match="found 0 for 0 answers"):
        group_normalized_rewards(lambda r, a: {"reward": 1.0}, [], [], 2)


@pytest.mark.parametrize("by_std", [True, False])
def test_group_normalized_rewards_grades_and_compares_within_groups(by_std: bool) -> None:
    def grade(response: str, answer: str) -> dict[str, float]:
        return {"reward": float(response == answer), "format": 1.0}

    responses, answers = ["1", "2", "3", "3", "5", "5"], ["1", "1", "3", "3", "5", "6"]
    advantages, rewards, figures = group_normalized_rewards(grade, responses, answers, 2, 1e-6, by_std)
    assert rewards.tolist() == [1, 0, 1, 1, 1, 0]
    half = 0.5 / (statistics.stdev([1, 0]) + 1e-6) if by_std else 0.5
    assert advantages.tolist() == pytest.approx([half, -half, 0, 0, half, -half])
    assert figures == pytest.approx(
        {"reward_mean": 2 / 3, "reward_std": statistics.stdev(rewards.tolist()), "reward_min": 0.0, "reward_max": 1.0,
         "format_mean": 1.0}
    )  # fmt: skip
    with pytest.raises(ValueError, match="found 6 for 6 answers in groups of 4"):
        group_normalized_rewards(grade, responses, answers, 4)
