"""What every method that learns from rollouts takes from the groups: rows of tokens with masks and lags, and figures.

Knows no reward but as a figure, no advantage, no model, no socket and no clock; called by `grpo.py` and
`expert_iteration.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from learner.batch import Row, Sample
from learner.methods.guard_figures import guard_figures
from protocol.messages import Group

StepOfVersion = Callable[[int], int]
LAG_TOKENS = "lag_tokens_"
"""Beginning of the figures' names that count the tokens of each lag, in steps: lag_tokens_0, lag_tokens_1, ..."""


def group_row(
    group: Group, advantages: Sequence[float], step_of_version: StepOfVersion, step: int, place: int = -1
) -> Row:
    """A group with its advantages and lags, every completion included, in order.

    `step_of_version` tells the training steps that a version's weights had seen; `step` is the number of steps finished
    so far, so a token's lag is step - step_of_version(version). `place`: of the group's first token among those of all
    groups, as `Sample.place`. Completions that the grader failed on are masked.

    Raises ValueError, naming the ticket, for a group whose buffers or spans make no sense.
    """
    token_ids = _buffer(group, "token_ids", group.token_ids, "<i4")
    logprobs = _buffer(group, "logprobs", group.logprobs, "<f4")
    mask = _buffer(group, "mask", group.mask, "u1").astype(bool)  # a copy: ours to change
    samples: list[Sample] = []
    start = 0
    for index, (completion, advantage) in enumerate(zip(group.completions, advantages, strict=True)):
        part = slice(start, start + completion.num_tokens)
        lag = token_lags(completion.spans, completion.num_tokens, step_of_version, step)
        if lag is None:
            raise ValueError(
                f"group {group.id}, completion {index}: found version spans {completion.spans} for"
                f" {completion.num_tokens} tokens at step {step}, expected growing starts from 0 and no later version"
            )
        if completion.grader_error:
            mask[part] = False
        known = place + start if place >= 0 else -1
        samples.append(Sample(token_ids[part], logprobs[part], mask[part], advantage, lag, place=known))
        start += completion.num_tokens
    return Row(group.prompt_ids, tuple(samples), group.temperature)


def token_lags(
    spans: tuple[tuple[int, int], ...], num_tokens: int, step_of_version: StepOfVersion, step: int
) -> NDArray[np.int32] | None:
    """[num_tokens] steps between the weights that drew each token and `step`; None if the spans make no sense."""
    if num_tokens == 0:
        return np.zeros(0, np.int32)
    edges = [start for _, start in spans] + [num_tokens]
    if edges[0] != 0 or any(start >= end for start, end in pairwise(edges)):
        return None
    lags = np.zeros(num_tokens, np.int32)
    for version, start in spans:
        lags[start:] = step - step_of_version(version)
    return None if (lags < 0).any() else lags


def group_stats(groups: Sequence[Group], rows: Sequence[Row], filtered: Sequence[Group] = ()) -> dict[str, float]:
    """What the groups say about themselves, trained on or not. Lags are in steps, over tokens.

    Rewards are those of completions that were graded; a step in which none was has reward 0 and says `grader_errors`.
    `filtered`: groups that dynamic sampling took out meanwhile. They count in all that is said of what was sampled;
    `trained_reward_mean` is without them. `completion_tokens` and lags are of what is trained on.
    """
    sampled = [*groups, *filtered]
    completions = [completion for group in sampled for completion in group.completions]
    graded = [[c.scores["reward"] for c in group.completions if not c.grader_error] for group in sampled]
    rewards = np.array([reward for group in graded for reward in group] or [0.0])
    lags = np.concatenate([sample.lag for row in rows for sample in row.samples])
    stats = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "zero_variance_share": float(np.mean([len(set(group)) <= 1 for group in graded])),
        "completion_tokens": float(sum(group.num_tokens for group in groups)),
        "sampled_tokens": float(sum(group.num_tokens for group in sampled)),
        "completion_tokens_mean": float(np.mean([completion.num_tokens for completion in completions])),
        "truncated_completions_share": float(np.mean([c.finish_reason == "length" for c in completions])),
        "grader_errors": float(sum(bool(completion.grader_error) for completion in completions)),
        "lag_mean": float(lags.mean()) if lags.size else 0.0,
        "lag_max": float(lags.max()) if lags.size else 0.0,
    }
    for lag, count in zip(*np.unique(lags, return_counts=True), strict=True):
        stats[f"{LAG_TOKENS}{lag}"] = float(count)
    for name in sorted({name for c in completions for name in c.scores} - {"reward"}):
        stats[f"{name}_mean"] = float(np.mean([c.scores.get(name, 0.0) for c in completions]))
    if filtered:
        kept = [reward for group in graded[: len(groups)] for reward in group]
        stats |= {"filtered_groups": float(len(filtered)), "trained_reward_mean": float(np.mean(kept or [0.0]))}
    return stats | guard_figures(sampled)


def _buffer(group: Group, name: str, data: bytes, dtype: str) -> NDArray:
    expected = group.num_tokens * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise ValueError(
            f"group {group.id}, {name}: found {len(data)} bytes, expected {expected} for {group.num_tokens} tokens"
        )
    return np.frombuffer(data, dtype)
