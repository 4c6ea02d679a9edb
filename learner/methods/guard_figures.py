"""What the guard needs to know of a step's groups, as far as the other metrics do not say it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from protocol.messages import Group


def guard_figures(groups: Sequence[Group]) -> dict[str, float]:
    """What the guard needs to know of a step's groups beside its other metrics; each is a metric of its own, too.

    `sampled_entropy` is the mean of -logprob over all completion tokens, trained on or not: an unbiased estimate of the
    entropy of what was sampled, in nats a token; absent if there is no token. `reward_error` is the standard error of
    the mean reward, from the means of the groups: completions of one prompt are no independent draws.
    """
    completions = [completion for group in groups for completion in group.completions]
    logprobs = np.concatenate([np.frombuffer(group.logprobs, "<f4") for group in groups] or [np.zeros(0, np.float32)])
    graded = [[c.scores["reward"] for c in group.completions if not c.grader_error] for group in groups]
    figures = {
        "groups": float(len(groups)),
        "completions": float(len(completions)),
        "duplicate_share": duplicate_share([[c.text for c in group.completions] for group in groups]),
        "reward_error": standard_error([rewards for rewards in graded if rewards]),
    }
    if logprobs.size:
        figures["sampled_entropy"] = float(-logprobs.mean(dtype=np.float64))
    return figures


def duplicate_share(texts_by_prompt: Sequence[Sequence[str]]) -> float:
    """Share of the prompts that have the commonest completion among theirs; 0 where there are fewer than two prompts.

    A text counts once for each prompt, so equal completions of one easy prompt are nothing, and one template as the
    answer to everything is 1.
    """
    if len(texts_by_prompt) < 2:
        return 0.0
    prompts_of = Counter(text for texts in texts_by_prompt for text in set(texts))
    return max(prompts_of.values(), default=0) / len(texts_by_prompt)


def standard_error(rewards_by_group: Sequence[Sequence[float]]) -> float:
    """Standard error of the mean of all rewards, the groups being what was drawn; 0 where there are fewer than two."""
    if len(rewards_by_group) < 2:
        return 0.0
    means = [fmean(rewards) for rewards in rewards_by_group]
    return float(np.std(means, ddof=1)) / math.sqrt(len(means))
