"""GRPO and its relatives: what they take from the groups. The loss itself is asked for in `learner/step.py`.

Turns journaled groups into a batch: rewards, shaped by length and KL, into advantages, and minibatches of whole groups.
Knows no model, no socket and no clock; called by the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch

from learner.batch import Batch, Drawn, Minibatch, Row
from learner.methods import advantages as estimators
from learner.methods.kl import kl_k3, sequence_kl
from learner.methods.rollouts import StepOfVersion, group_row, group_stats
from protocol.config import Recipe
from protocol.messages import Group
from protocol.sections import GrpoConfig

AddReference = Callable[[list[Row]], list[Row]]
"""Gives every sample the reference's logprobs."""


def make_batch(
    groups: Sequence[Group],
    recipe: Recipe,
    step_of_version: StepOfVersion,
    step: int,
    add_reference: AddReference | None = None,
    filtered: Sequence[Group] = (),
) -> Batch:
    """One step's batch of whole groups, in the order given, divided evenly over `optim.minibatches`.

    `step_of_version`, `step`: see `group_row`. `add_reference` is asked for with `grpo.kl_coef` only. `filtered`: the
    groups that dynamic sampling replaced, for the figures.

    With `grpo.skip_zero_advantage`, completions of advantage exactly 0 are left out of the rows, since their gradient
    is 0, but not out of the denominators: the gradient is the same either way. (With a KL in the loss they have one and
    stay.) Completions without a trainable token are always left out in this way.

    Raises ValueError, naming the ticket, for a group whose buffers, spans or rewards make no sense.
    """
    if not groups:
        raise ValueError("groups: found none, expected at least one")
    config = recipe.grpo
    places = accumulate((group.num_tokens for group in groups), initial=0)
    rows = [
        group_row(group, [0.0] * len(group.completions), step_of_version, step, place)
        for group, place in zip(groups, places, strict=False)
    ]
    if config.overlong == "mask":
        rows = [_without_cut(group, row) for group, row in zip(groups, rows, strict=True)]
    if config.max_token_lag >= 0:
        rows = [_without_old(row, config.max_token_lag) for row in rows]
    if config.kl_coef:
        assert add_reference is not None, "grpo.kl_coef wants a reference"
        rows = add_reference(rows)
    advantages = batch_advantages(groups, config, reward_shaping(rows, recipe))
    rows = [_with_advantages(row, values) for row, values in zip(rows, advantages, strict=True)]
    skip = config.skip_zero_advantage and not (config.kl_coef and config.kl_in == "loss")
    size = -(-len(rows) // recipe.optim.minibatches)
    minibatches = tuple(_minibatch(rows[start : start + size], skip) for start in range(0, len(rows), size))
    stats = group_stats(groups, rows, filtered) | _reference_stats(rows)
    drawn = _drawn(groups, advantages)
    return Batch(step, minibatches, stats, loss="policy", passes=recipe.optim.epochs, drawn=drawn)


def reward_shaping(rows: Sequence[Row], recipe: Recipe) -> list[list[float]]:
    """What length and KL add to each completion's reward before the advantages: 0 or less for length."""
    config = recipe.grpo
    shaping = [[0.0] * len(row.samples) for row in rows]
    if config.overlong == "penalty":
        for row, values in zip(rows, shaping, strict=True):
            lengths = torch.tensor([sample.num_tokens for sample in row.samples])
            punished = estimators.soft_overlong_punishment(
                lengths, recipe.rollout.max_tokens, config.overlong_buffer, config.overlong_penalty
            )
            values[:] = punished.tolist()
    if config.kl_coef and config.kl_in == "reward":
        for row, values in zip(rows, shaping, strict=True):
            for index, sample in enumerate(row.samples):
                if sample.reference_logprobs is not None:
                    kl = sequence_kl(
                        config.kl_estimator, sample.engine_logprobs, sample.reference_logprobs, sample.mask
                    )
                    values[index] -= config.kl_coef * kl
    return shaping


def equal_rewards(group: Group) -> bool:
    """Whether the graded completions of a group all have the same reward: dynamic sampling's question (DAPO)."""
    return len({c.scores["reward"] for c in group.completions if not c.grader_error}) <= 1


def batch_advantages(
    groups: Sequence[Group], config: GrpoConfig, shaping: Sequence[Sequence[float]] | None = None
) -> list[list[float]]:
    """Advantages of every completion of every group, from the rewards and what `shaping` adds to each of them.

    A completion whose grader failed has no reward: it is no part of any baseline and gets advantage 0.
    """
    graded = [[not completion.grader_error for completion in group.completions] for group in groups]
    added = shaping or [[0.0] * len(group.completions) for group in groups]
    rewards = [
        torch.tensor([r + more for r, more, sound in zip(group.rewards, extra, kept, strict=True) if sound])
        for group, extra, kept in zip(groups, added, graded, strict=True)
    ]
    for group, values in zip(groups, rewards, strict=True):
        if not values.isfinite().all():
            raise ValueError(f"group {group.id}: found rewards {values.tolist()}, expected finite numbers")
    if config.advantage == "none":
        estimated = rewards
    elif config.advantage == "batch_normalized":
        every = torch.cat(rewards)[None]
        normalized = (
            estimators.batch_normalized(every, config.std_eps) if every.numel() > 1 else torch.zeros_like(every)
        )
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


def _without_cut(group: Group, row: Row) -> Row:
    """The row with the completions masked that reached `rollout.max_tokens` (DAPO's overlong filtering)."""
    samples = zip(row.samples, group.completions, strict=True)
    return replace(
        row,
        samples=tuple(
            replace(sample, mask=np.zeros_like(sample.mask)) if completion.finish_reason == "length" else sample
            for sample, completion in samples
        ),
    )


def _without_old(row: Row, max_lag: int) -> Row:
    """The row with the tokens masked whose weights lay more than `max_lag` steps back."""
    return replace(row, samples=tuple(replace(s, mask=s.mask & (s.lag <= max_lag)) for s in row.samples))


def _with_advantages(row: Row, advantages: Sequence[float]) -> Row:
    pairs = zip(row.samples, advantages, strict=True)
    return replace(row, samples=tuple(replace(sample, advantage=advantage) for sample, advantage in pairs))


def _drawn(groups: Sequence[Group], advantages: Sequence[Sequence[float]]) -> Drawn:
    return Drawn(
        ids=tuple((group.id.epoch, group.id.index) for group in groups),
        lengths=tuple(tuple(completion.num_tokens for completion in group.completions) for group in groups),
        advantages=tuple(tuple(values) for values in advantages),
    )


def _reference_stats(rows: Sequence[Row]) -> dict[str, float]:
    """Mean k3 estimate of KL(engine || reference), nats a token, over every token drawn."""
    pairs = [
        (sample.engine_logprobs, sample.reference_logprobs)
        for row in rows
        for sample in row.samples
        if sample.reference_logprobs is not None
    ]
    if not pairs:
        return {}
    engine, reference = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*pairs, strict=True))
    return {"kl_reference": kl_k3(engine, reference).mean().item()}


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
