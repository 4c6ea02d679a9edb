"""One training step: a batch -> optimizer updates -> metrics. All of the learner's mathematics meets here.

Of several ranks each computes its share of the microbatches, of the same plan that one process would follow; the
denominators are those of the whole update, and gradients and sums are added over the ranks.

Called by `trainer.py`. Knows no socket, no file and no clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from learner.batch import Batch, Line, Minibatch, PackedBatch, Row, pack, pack_lines, plan_microbatches
from learner.methods import losses, packed_losses
from learner.methods.kl import kl_loss
from learner.methods.sft import response_sample
from learner.model import LogprobOutput, PolicyModel
from learner.optim import Optimizer
from learner.ranks import ALONE, Ranks
from protocol.config import Recipe

MicrobatchLoss = Callable[[PackedBatch, LogprobOutput], tuple[Tensor, losses.Metrics]]
SeeLogprobs = Callable[[PackedBatch, Tensor], None]
"""Given each microbatch of this rank once, and [N] the logprobs before the step's first update, without gradient."""
Share = Sequence[PackedBatch | None]
"""A rank's microbatches; None is a pass that computes nothing, beside one of another rank that does."""


def train_step(
    model: PolicyModel,
    optimizer: Optimizer,
    batch: Batch,
    recipe: Recipe,
    lr: float,
    ranks: Ranks = ALONE,
    see: SeeLogprobs | None = None,
) -> dict[str, float]:
    """`batch.passes` passes of one optimizer update for each minibatch. Returns the step's metrics, `batch.stats` too.

    With more than one update, the old logprobs (the proximal policy of the clip) come from one forward pass before the
    first. With exactly one they are the current ones, detached: ratio 1, no second forward pass.

    A minibatch in which every advantage is 0 has no gradient. Its update is left out and counted in `skipped_updates`:
    Adam would move the weights by its momentum and weight decay all the same.

    Entropy, KL, gap and importance are means over the tokens that were trained on: `trained_token_share` of all. With
    `grpo.skip_zero_advantage` these are the groups that still disagree, so their entropy is above the policy's.

    `see`: for a policy loss, what the importance weights are computed from, at no cost but a reference to it.

    All ranks call it with the same batch, and all return the same figures. Raises FloatingPointError, naming step and
    update, before a loss or gradient that is not finite reaches the weights: on all ranks or on none.
    """
    optimizer.set_lr(lr)
    pulled_by_kl = recipe.grpo.kl_coef > 0 and recipe.grpo.kl_in == "loss"
    wants_advantage = batch.loss == "policy" and not pulled_by_kl
    minibatches = [m for m in batch.minibatches if _has_signal(m, wants_advantage)]
    microbatches = [_pack(m.rows, recipe, batch.loss != "dpo", ranks) for m in minibatches]
    old: list[list[Tensor | None]] = [[None] * len(packed) for packed in microbatches]
    if batch.loss == "policy" and batch.passes * len(minibatches) > 1:
        old = old_logprobs(model, microbatches)

    sums: Counter[str] = Counter()
    for number in range(batch.passes):
        for minibatch, packed, before in zip(minibatches, microbatches, old, strict=True):
            loss_of = _loss_of(batch, minibatch, before, recipe, see if number == 0 else None)
            what = f"step {batch.step}, update {int(sums['updates']) + 1}"
            sums.update(update(model, optimizer, packed, loss_of, recipe.optim.max_grad_norm, what, ranks))
    sums["skipped_updates"] = batch.passes * (len(batch.minibatches) - len(minibatches))
    sampled = batch.passes * sum(minibatch.num_tokens for minibatch in batch.minibatches)
    return batch.stats | {"lr": lr, "trained_token_share": sums["tokens"] / max(sampled, 1)} | summarize(sums)


def old_logprobs(model: PolicyModel, microbatches: Sequence[Share]) -> list[list[Tensor | None]]:
    """The learner's logprobs of every microbatch before the step's first update, without gradients."""
    with torch.no_grad(), model.compute():
        return [
            [model.logprobs(packed or idle(), with_entropy=False).logprobs for packed in group]
            for group in microbatches
        ]


def with_reference(
    model: PolicyModel,
    weights: dict[str, Tensor],
    rows: Sequence[Row],
    recipe: Recipe,
    split: bool = True,
    ranks: Ranks = ALONE,
) -> list[Row]:
    """The rows with the logprobs of the reference (`PolicyModel.frozen_copy`) in every sample that has tokens.

    All ranks call it with the same rows."""
    trainable = [replace(row, samples=tuple(s for s in row.samples if s.num_tokens)) for row in rows]
    plan = _plan([row for row in trainable if row.samples], recipe, split)
    samples = [[sample for line in lines for row in line for sample in row.samples] for lines in plan]
    ends = list(accumulate(sum(sample.num_tokens for sample in microbatch) for microbatch in samples))
    merged = torch.zeros(ends[-1] if ends else 0)
    for number in ranks.share(range(len(plan))):
        logprobs = model.frozen_logprobs(weights, idle() if number is None else pack_lines(plan[number])).cpu()
        if number is not None:
            merged[ends[number] - len(logprobs) : ends[number]] = logprobs
    values = ranks.merge(merged).numpy()
    found, start = {}, 0
    for sample in (sample for microbatch in samples for sample in microbatch):
        found[id(sample)] = values[start : start + sample.num_tokens]
        start += sample.num_tokens
    return [
        replace(row, samples=tuple(replace(s, reference_logprobs=found.get(id(s))) for s in row.samples))
        for row in rows
    ]


def update(
    model: PolicyModel,
    optimizer: Optimizer,
    microbatches: Share,
    loss_of: MicrobatchLoss,
    max_grad_norm: float,
    what: str,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Accumulate the gradients of all microbatches of all ranks, clip, and move the weights once.

    Returns sums to be added over updates: the losses' metrics, "loss", "grad_norm" (before clipping), "updates",
    "positions" and "microbatches". Raises FloatingPointError, naming `what`, instead of stepping on what is not finite.
    """
    sums: dict[str, Tensor] = {}
    with model.compute():
        for packed in microbatches:
            if packed is None:
                (model.logprobs(idle(), with_entropy=False).logprobs.sum() * 0.0).backward()
                continue
            packed = packed.to(model.device)
            output = model.logprobs(packed, with_entropy=True)
            loss, metrics = loss_of(packed, output)
            loss.backward()
            assert output.entropy is not None
            metrics |= {"loss": loss.detach(), "entropy": losses.masked_sum(output.entropy, packed.mask)}
            metrics |= {"tokens": packed.mask.sum().float()}
            sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
    grad_norm = optimizer.clip(max_grad_norm)
    own = [packed for packed in microbatches if packed is not None]
    counts = {"positions": sum(packed.num_positions for packed in own), "microbatches": len(own)}
    totals = ranks.sum({name: float(value) for name, value in sums.items()} | counts)
    if not (math.isfinite(totals["loss"]) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise FloatingPointError(
            f"{what}: found loss {totals['loss']} and gradient norm {grad_norm}, expected finite numbers;"
            " the weights were left as they were"
        )
    optimizer.step()
    return totals | {"grad_norm": grad_norm, "updates": 1}


def summarize(sums: Counter[str]) -> dict[str, float]:
    """Sums over a step -> what is logged: means over updates, trained tokens, pairs, or all response tokens."""
    updates, tokens = max(sums["updates"], 1), max(sums["tokens"], 1)
    metrics = {
        name: float(sums[name]) for name in ("updates", "skipped_updates", "microbatches", "positions", "tokens")
    }
    metrics |= {name: sums[name] / updates for name in ("loss", "grad_norm")}
    names = {
        "entropy": "entropy", "nll": "nll", "engine_gap": "engine_gap", "kl_k1": "kl_k1", "kl_k3": "kl_k3",
        "importance": "importance_mean", "truncated": "importance_truncated_share", "clipped": "clipped_share",
        "ratio": "ratio_mean", "reference_kl_k1": "reference_kl_k1", "reference_kl_k3": "reference_kl_k3",
    }  # fmt: skip
    metrics |= {name: sums[key] / tokens for key, name in names.items() if key in sums}
    if "ratio" in sums:
        metrics["ratio_std"] = math.sqrt(max(sums["ratio_squared"] / tokens - metrics["ratio_mean"] ** 2, 0.0))
    if "pairs" in sums:
        per_pair = ("accuracy", "margin", "chosen_reward", "rejected_reward")
        metrics |= {f"dpo_{name}": sums[name] / max(sums["pairs"], 1) for name in per_pair}
    return metrics


# --- which loss -------------------------------------------------------------------------------------------------------


def _loss_of(
    batch: Batch, minibatch: Minibatch, old: Sequence[Tensor | None], recipe: Recipe, see: SeeLogprobs | None
) -> MicrobatchLoss:
    if batch.loss == "policy":
        return _policy_loss(minibatch, old, recipe, see)
    return _sft_loss(minibatch, recipe) if batch.loss == "sft" else _dpo_loss(minibatch, recipe)


def _policy_loss(
    minibatch: Minibatch, old: Iterable[Tensor | None], recipe: Recipe, see: SeeLogprobs | None
) -> MicrobatchLoss:
    grpo = recipe.grpo
    before = iter(old)

    def loss_of(packed: PackedBatch, output: LogprobOutput) -> tuple[Tensor, losses.Metrics]:
        learner = next(before)
        if learner is None:
            learner = output.logprobs.detach()
        if see is not None:
            see(packed, learner)
        engine_is_proximal = grpo.proximal == "engine"
        importance, outside = packed_losses.importance_weights(
            learner, packed.engine_logprobs, packed.mask, packed.sequence_index,
            cap=0.0 if engine_is_proximal else grpo.importance_cap, floor=grpo.importance_floor,
            level=grpo.importance_level, mode=grpo.importance_mode,
        )  # fmt: skip
        weights = packed_losses.token_weights(
            grpo.aggregation, packed.mask, packed.sequence_tokens, minibatch.num_tokens, minibatch.num_sequences,
            recipe.rollout.max_tokens,
        )  # fmt: skip
        proximal = packed.engine_logprobs if engine_is_proximal else learner
        loss, metrics = packed_losses.packed_policy_loss(
            grpo.loss, output.logprobs, proximal, packed.advantages, importance, weights, packed.sequence_index,
            grpo.clip_low, grpo.clip_high,
        )  # fmt: skip
        metrics |= packed_losses.policy_metrics(learner, packed.engine_logprobs, importance, packed.mask, outside)
        if grpo.kl_coef and grpo.kl_in == "loss":
            kl, kl_metrics = kl_loss(grpo.kl_estimator, output.logprobs, packed.reference_logprobs, weights)
            loss, metrics = loss + grpo.kl_coef * kl, metrics | kl_metrics
        return loss, metrics

    return loss_of


def _sft_loss(minibatch: Minibatch, recipe: Recipe) -> MicrobatchLoss:
    def loss_of(packed: PackedBatch, output: LogprobOutput) -> tuple[Tensor, losses.Metrics]:
        weights = packed_losses.token_weights(
            recipe.sft.aggregation, packed.mask, packed.sequence_tokens, minibatch.num_tokens, minibatch.num_sequences,
            recipe.sft.constant,
        )  # fmt: skip
        return packed_losses.sft(output.logprobs, weights)

    return loss_of


def _dpo_loss(minibatch: Minibatch, recipe: Recipe) -> MicrobatchLoss:
    def loss_of(packed: PackedBatch, output: LogprobOutput) -> tuple[Tensor, losses.Metrics]:
        return packed_losses.packed_dpo_loss(
            output.logprobs, packed.reference_logprobs, packed.mask, packed.sequence_index, len(minibatch.rows),
            recipe.dpo.beta, recipe.dpo.label_smoothing,
        )  # fmt: skip

    return loss_of


# --- microbatches -----------------------------------------------------------------------------------------------------


def _plan(rows: Sequence[Row], recipe: Recipe, split: bool) -> list[list[Line]]:
    return plan_microbatches(rows, recipe.learner.microbatch_tokens, recipe.learner.packing, split)


def _pack(rows: Sequence[Row], recipe: Recipe, split: bool, ranks: Ranks) -> Share:
    """This rank's share of the plan. It begins with the longest, so that what the ranks do at once is of a size."""
    return [None if lines is None else pack_lines(lines) for lines in ranks.share(_plan(rows, recipe, split))]


def idle() -> PackedBatch:
    """The smallest microbatch there is, for a pass whose result nobody wants."""
    return pack([Row((0,), (response_sample([0]),))])


def _has_signal(minibatch: Minibatch, wants_advantage: bool) -> bool:
    """Whether anything in it has a gradient."""
    samples = [sample for row in minibatch.rows for sample in row.samples]
    return any(sample.mask.any() and (sample.advantage != 0.0 or not wants_advantage) for sample in samples)
