"""Rewards of a group -> advantages of its completions. Pure tensor functions: no config, no tokens, no masks.

Called by `methods/grpo.py`. Shapes: rewards [groups, group_size] in, advantages of the same shape out.
"""

from __future__ import annotations

from torch import Tensor


def group_mean(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r): the group's mean reward is the baseline.

    Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3): without the division by the standard
    deviation, which weighs very easy and very hard prompts more. [groups, group_size] -> the same.

    A group of equal rewards gets exactly 0, also where the mean of equal floats is not exactly their value.
    """
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(equal, 0.0)


def group_mean_std(rewards: Tensor, std_eps: float) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + std_eps), the sample standard deviation (n - 1).

    GRPO with outcome supervision (Shao et al. 2024, "DeepSeekMath", section 4.1.2). A group of equal rewards
    gets exactly 0. [groups, group_size >= 2] -> the same.
    """
    return group_mean(rewards) / (rewards.std(dim=1, keepdim=True) + std_eps)
