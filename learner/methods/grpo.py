"""GRPO and its relatives: what they take from the groups. The loss itself is asked for in `learner/step.py`.

Turns journaled groups into a batch: advantages from rewards, lag per token from version spans, minibatches of whole
groups, and what the groups say about themselves. Knows no model, no socket and no clock; called by the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from learner.batch import Batch, Minibatch, Row, Sample
from learner.methods import advantages as estimators
from protocol.config import GrpoConfig, Recipe
from protocol.messages import Group

StepOfVersion = Callable[[int], int]


def make_batch(groups: Sequence[Group], recipe: Recipe, step_of_version: StepOfVersion, step: int) -> Batch:
    """One step's batch of whole groups, in the order given, divided evenly over `optim.minibatches`.

    `step_of_version` tells the training steps that a version's weights had seen; `step` is the number of steps finished
    so far, so a token's lag is step - step_of_version(version).

    With `grpo.skip_zero_advantage`, completions of advantage exactly 0 are left out of the rows, since their gradient
    is 0, but not out of the denominators: the gradient is the same either way. Completions without a trainable token
    are always left out in this way.

    Raises ValueError, naming the ticket, for a group whose buffers, spans or rewards make no sense.
    """
    if not groups:
        raise ValueError("groups: found none, expected at least one")
    advantages = batch_advantages(groups, recipe.grpo)
    rows = [group_row(group, values, step_of_version, step) for group, values in zip(groups, advantages, strict=True)]
    size = -(-len(rows) // recipe.optim.minibatches)
    minibatches = tuple(
        _minibatch(rows[start : start + size], recipe.grpo.skip_zero_advantage) for start in range(0, len(rows), size)
    )
    return Batch(step=step, minibatches=minibatches, stats=group_stats(groups, rows))


def group_row(group: Group, advantages: Sequence[float], step_of_version: StepOfVersion, step: int) -> Row:
    """A group with its advantages and lags, every completion included, in order."""
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
        samples.append(Sample(token_ids[part], logprobs[part], mask[part], advantage, lag))
        start += completion.num_tokens
    return Row(group.prompt_ids, tuple(samples), group.temperature)


def batch_advantages(groups: Sequence[Group], config: GrpoConfig) -> list[list[float]]:
    """Advantages of every completion of every group, from the rewards alone.

    A completion whose grader failed has no reward: it is no part of any baseline and gets advantage 0.
    """
    graded = [[not completion.grader_error for completion in group.completions] for group in groups]
    rewards = [
        torch.tensor([r for r, sound in zip(group.rewards, kept, strict=True) if sound])
        for group, kept in zip(groups, graded, strict=True)
    ]
    for group, values in zip(groups, rewards, strict=True):
        if not values.isfinite().all():
            raise ValueError(f"group {group.id}: found rewards {group.rewards}, expected finite numbers")
    if config.advantage == "none":
        estimated = rewards
    elif config.advantage == "batch_normalized":
        every = torch.cat(rewards)[None]
        normalized = estimators.batch_normalized(every, config.std_eps) if every.numel() > 1 else torch.zeros(1, 1)
        estimated = list(normalized[0].split([len(values) for values in rewards]))
    else:
        estimated = [_group_advantages(values, config) for values in rewards]
    result = []
    for kept, values in zip(graded, estimated, strict=True):
        remaining = iter(values.tolist())
        result.append([next(remaining) if sound else 0.0 for sound in kept])
    return result


def _group_advantages(rewards: torch.Tensor, config: GrpoConfig) -> torch.Tensor:
    """[graded] rewards of one group -> the same; a group of one says nothing."""
    if len(rewards) < 2:
        return torch.zeros_like(rewards)
    group = rewards[None]
    if config.advantage == "group_mean_std":
        return estimators.group_mean_std(group, config.std_eps)[0]
    if config.advantage == "leave_one_out":
        return estimators.leave_one_out(group)[0]
    return estimators.group_mean(group)[0]


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


def group_stats(groups: Sequence[Group], rows: Sequence[Row]) -> dict[str, float]:
    """What the groups say about themselves, trained on or not. Lags are in steps, over tokens.

    Rewards are those of completions that were graded; a step in which none was has reward 0 and says `grader_errors`.
    """
    completions = [completion for group in groups for completion in group.completions]
    samples = [sample for row in rows for sample in row.samples]
    graded = [[c.scores["reward"] for c in group.completions if not c.grader_error] for group in groups]
    rewards = np.array([reward for group in graded for reward in group] or [0.0])
    lags = np.concatenate([sample.lag for sample in samples])
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "zero_variance_share": float(np.mean([len(set(group)) <= 1 for group in graded])),
        "completion_tokens": float(sum(completion.num_tokens for completion in completions)),
        "completion_tokens_mean": float(np.mean([completion.num_tokens for completion in completions])),
        "truncated_completions_share": float(np.mean([c.finish_reason == "length" for c in completions])),
        "grader_errors": float(sum(bool(completion.grader_error) for completion in completions)),
        "lag_mean": float(lags.mean()) if lags.size else 0.0,
        "lag_max": float(lags.max()) if lags.size else 0.0,
    }


def _minibatch(rows: Sequence[Row], skip_zero_advantage: bool) -> Minibatch:
    samples = [sample for row in rows for sample in row.samples]
    kept = (
        Row(
            row.prompt_ids,
            tuple(s for s in row.samples if s.mask.any() and not (skip_zero_advantage and s.advantage == 0.0)),
            row.temperature,
        )
        for row in rows
    )
    return Minibatch(
        rows=tuple(row for row in kept if row.samples),
        num_tokens=int(sum(sample.mask.sum() for sample in samples)),
        num_sequences=len(samples),
    )


def _buffer(group: Group, name: str, data: bytes, dtype: str) -> NDArray:
    expected = group.num_tokens * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise ValueError(
            f"group {group.id}, {name}: found {len(data)} bytes, expected {expected} for {group.num_tokens} tokens"
        )
    return np.frombuffer(data, dtype)
