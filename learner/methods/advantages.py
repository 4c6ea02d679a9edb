"""Rewards of groups -> advantages of their completions. Pure tensor functions: no config, no tokens, no masks.

Called by `methods/grpo.py`; docs/algorithms.md has the equations. Shapes: rewards [groups, group_size] in, advantages
of the same shape out. `soft_overlong_punishment` is what a length adds to a reward before that;
`group_normalized_rewards` begins at the texts and stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

RewardFunction = Callable[[str, str], Mapping[str, float]]
"""(response, answer) -> named scores, among them "reward"."""


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


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the others' rewards = n / (n - 1) x (r_i - mean(r)).

    RLOO (Ahmadian et al. 2024, "Back to Basics"): a baseline that does not depend on the sample itself, so the
    gradient is unbiased. [groups, group_size >= 2] -> the same.
    """
    size = rewards.shape[1]
    return group_mean(rewards) * (size / (size - 1))


def batch_normalized(rewards: Tensor, std_eps: float) -> Tensor:
    """A_i = (r_i - mean) / (std + std_eps) over all rewards of the batch, sample standard deviation.

    REINFORCE++ (Hu et al. 2025, global advantage normalization): no baseline of a group's own, so it works with one
    completion a prompt, and a prompt's difficulty stays in the advantage. A batch of equal rewards gets exactly 0.
    [groups, group_size], at least two rewards -> the same.
    """
    flat = rewards.reshape(1, -1)
    return (group_mean(flat) / (flat.std() + std_eps)).reshape(rewards.shape)


def soft_overlong_punishment(lengths: Tensor, max_tokens: int, buffer: int, penalty: float) -> Tensor:
    """What a completion's length adds to its reward: 0 to max_tokens - buffer, then linear to -penalty at max_tokens.

    DAPO (Yu et al. 2025, eq. 13, whose penalty is 1), so that a completion that is cut off is not punished out of the
    blue. `lengths` in tokens, any shape -> float32 in [-penalty, 0], the same shape. 1 <= buffer.
    """
    assert buffer >= 1, f"found a buffer of {buffer} tokens, expected at least 1"
    return penalty * ((max_tokens - buffer - lengths).float() / buffer).clamp(min=-1.0, max=0.0)


def group_normalized_rewards(
    reward_function: RewardFunction,
    responses: Sequence[str],
    answers: Sequence[str],
    group_size: int,
    std_eps: float = 1e-6,
    normalize_by_std: bool = True,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Grade responses and compare each with its group: the first `group_size` responses are one group, and so on.

    Returns (advantages [N], raw rewards [N], figures: mean, std, min and max of the rewards, and the means of the other
    named scores). `normalize_by_std` False: Dr. GRPO's advantage. Raises ValueError for lengths that do not fit.
    """
    if not responses or len(responses) != len(answers) or group_size < 1 or len(responses) % group_size:
        raise ValueError(
            f"responses: found {len(responses)} for {len(answers)} answers in groups of {group_size}, allowed: one"
            " answer each, whole groups, at least one"
        )
    scores = [reward_function(response, answer) for response, answer in zip(responses, answers, strict=True)]
    rewards = torch.tensor([float(score["reward"]) for score in scores])
    grouped = rewards.reshape(-1, group_size)
    advantages = group_mean_std(grouped, std_eps) if normalize_by_std and group_size > 1 else group_mean(grouped)
    figures = {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
    }
    for name in sorted({name for score in scores for name in score} - {"reward"}):
        figures[f"{name}_mean"] = sum(float(score.get(name, 0.0)) for score in scores) / len(scores)
    return advantages.reshape(-1), rewards, figures
