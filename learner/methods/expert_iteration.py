"""Expert iteration: of what the policy drew, the completions that the grader accepts are what it learns from.

Anthony et al. 2017, "Thinking Fast and Slow with Deep Learning and Tree Search"; for language models Zelikman et al.
2022, "STaR", and Singh et al. 2023, "Beyond Human Data" (ReST-EM). Knows no model, no socket and no clock; called by
the loop. The loss is SFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from learner.batch import Batch, Minibatch, Row, Sample
from learner.eval_figures import REWARD_ROUNDING
from learner.methods.rollouts import StepOfVersion, group_row, group_stats
from protocol.config import Recipe
from protocol.messages import Group
from protocol.sections import ExpertIterationConfig


def make_batch(groups: Sequence[Group], recipe: Recipe, step_of_version: StepOfVersion, step: int) -> Batch:
    """`epochs` passes over the accepted completions, in updates of `batch_size`, each pass in an order of its own.

    No update at all, and `kept_completions` 0 in the figures, where nothing was accepted. Raises ValueError as
    `group_row` does.
    """
    config = recipe.expert_iteration
    rows = [group_row(group, [1.0] * len(group.completions), step_of_version, step) for group in groups]
    questions: dict[tuple[int, ...], list[Sample]] = {}  # one may have been drawn twice, where two passes meet
    kept = [
        (row, sample)
        for group, row in zip(groups, rows, strict=True)
        for sample in accepted(group, row, config, questions.setdefault(row.prompt_ids, []))
    ]
    minibatches: list[Minibatch] = []
    for epoch in range(config.epochs):
        order = np.random.default_rng([recipe.seed, step, epoch]).permutation(len(kept))
        for start in range(0, len(order), config.batch_size):
            chosen = sorted(order[start : start + config.batch_size])
            minibatches.append(_minibatch([kept[i] for i in chosen]))
    stats = group_stats(groups, rows) | {
        "kept_completions": float(len(kept)),
        "kept_questions": float(len({row.prompt_ids for row, _ in kept})),
        "kept_share": len(kept) / sum(len(group.completions) for group in groups),
    }
    return Batch(step=step, minibatches=tuple(minibatches), stats=stats, loss="sft")


def accepted(group: Group, row: Row, config: ExpertIterationConfig, so_far: list[Sample]) -> list[Sample]:
    """The completions of one group to learn from, in order: graded, of enough reward, whole, and no repetition.

    A completion that was cut off is never one: it would teach the model not to end. `so_far`: what has been kept of the
    same question; added to.
    """
    before = len(so_far)
    seen = {sample.token_ids.tobytes() for sample in so_far}
    least = config.min_reward - REWARD_ROUNDING
    for completion, sample in zip(group.completions, row.samples, strict=True):
        wanted = completion.scores.get("reward", 0.0) >= least and completion.finish_reason != "length"
        tokens = sample.token_ids.tobytes()
        if not wanted or not sample.mask.any() or (config.deduplicate and tokens in seen):
            continue
        if config.max_per_question and len(so_far) >= config.max_per_question:
            break
        seen.add(tokens)
        so_far.append(sample)
    return so_far[before:]


def _minibatch(kept: Sequence[tuple[Row, Sample]]) -> Minibatch:
    """Samples of one question share its row."""
    rows: dict[int, Row] = {}
    for row, sample in kept:
        known = rows.setdefault(id(row), replace(row, samples=(), temperature=1.0))
        rows[id(row)] = replace(known, samples=(*known.samples, sample))
    return Minibatch(
        rows=tuple(rows.values()),
        num_tokens=int(sum(sample.mask.sum() for _, sample in kept)),
        num_sequences=len(kept),
    )
