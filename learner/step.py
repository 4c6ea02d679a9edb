"""One training step: a batch -> optimizer updates -> metrics. All of the learner's mathematics meets here.

Called by the loop. Knows no socket, no file and no clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learner.batch import Batch, Minibatch, PackedBatch, pack, plan_microbatches
from learner.methods import losses
from learner.model import LogprobOutput, PolicyModel
from learner.optim import Optimizer, lr_at
from protocol.config import Recipe

MicrobatchLoss = Callable[[PackedBatch, LogprobOutput], tuple[Tensor, losses.Metrics]]


def train_step(model: PolicyModel, optimizer: Optimizer, batch: Batch, recipe: Recipe) -> dict[str, float]:
    """`optim.epochs` passes of one optimizer update for each minibatch. Returns the step's metrics, `batch.stats` too.

    With more than one update, the old logprobs (the proximal policy of the clip) come from one forward pass before the
    first. With exactly one they are the current ones, detached: ratio 1, no second forward pass.

    A minibatch in which every advantage is 0 has no gradient. Its update is left out and counted in `skipped_updates`:
    Adam would move the weights by its momentum and weight decay all the same.

    Entropy, KL, gap and importance are means over the tokens that were trained on: `trained_token_share` of all. With
    `grpo.skip_zero_advantage` these are the groups that still disagree, so their entropy is above the policy's.

    Raises FloatingPointError, naming step and update, before a loss or gradient that is not finite reaches the weights.
    """
    lr = lr_at(batch.step, recipe.optim, recipe.steps)
    optimizer.set_lr(lr)
    minibatches = [m for m in batch.minibatches if _has_signal(m)]
    microbatches = [_pack(m, recipe.learner.microbatch_tokens) for m in minibatches]
    old: list[list[Tensor | None]] = [[None] * len(packed) for packed in microbatches]
    if recipe.optim.epochs * len(minibatches) > 1:
        old = old_logprobs(model, microbatches)

    sums: Counter[str] = Counter()
    for _ in range(recipe.optim.epochs):
        for minibatch, packed, before in zip(minibatches, microbatches, old, strict=True):
            loss_of = _policy_loss(minibatch, packed, before, recipe)
            what = f"step {batch.step}, update {int(sums['updates']) + 1}"
            sums.update(update(model, optimizer, packed, loss_of, recipe.optim.max_grad_norm, what))
    sums["skipped_updates"] = recipe.optim.epochs * (len(batch.minibatches) - len(minibatches))
    sampled = recipe.optim.epochs * sum(minibatch.num_tokens for minibatch in batch.minibatches)
    return batch.stats | {"lr": lr, "trained_token_share": sums["tokens"] / max(sampled, 1)} | summarize(sums)


def sft_step(model: PolicyModel, optimizer: Optimizer, batch: Batch, recipe: Recipe) -> dict[str, float]:
    """One optimizer update for each minibatch of demonstrations, at `warm_start.lr`: mean loss over response tokens.

    Raises FloatingPointError as `train_step` does.
    """
    optimizer.set_lr(recipe.warm_start.lr)
    sums: Counter[str] = Counter()
    for index, minibatch in enumerate(batch.minibatches):
        packed = _pack(minibatch, recipe.learner.microbatch_tokens)
        what = f"warm start, step {batch.step}, update {index + 1}"
        sums.update(update(model, optimizer, packed, _sft_loss(minibatch), recipe.optim.max_grad_norm, what))
    return {"lr": recipe.warm_start.lr} | summarize(sums)


def old_logprobs(model: PolicyModel, microbatches: Sequence[Sequence[PackedBatch]]) -> list[list[Tensor | None]]:
    """The proximal policy's logprobs of every microbatch, without gradients."""
    with torch.no_grad(), model.compute():
        return [[model.logprobs(packed, with_entropy=False).logprobs for packed in group] for group in microbatches]


def update(
    model: PolicyModel,
    optimizer: Optimizer,
    microbatches: Sequence[PackedBatch],
    loss_of: MicrobatchLoss,
    max_grad_norm: float,
    what: str,
) -> dict[str, float]:
    """Accumulate the gradients of all microbatches, clip, and move the weights once.

    Returns sums to be added over updates: the losses' metrics, "loss", "grad_norm" (before clipping), "updates",
    "positions" and "microbatches". Raises FloatingPointError, naming `what`, instead of stepping on what is not finite.
    """
    sums: dict[str, Tensor] = {}
    with model.compute():
        for packed in microbatches:
            packed = packed.to(model.device)
            output = model.logprobs(packed, with_entropy=True)
            loss, metrics = loss_of(packed, output)
            loss.backward()
            assert output.entropy is not None
            metrics |= {"loss": loss.detach(), "entropy": losses.masked_sum(output.entropy, packed.mask)}
            sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
    totals = {name: float(value) for name, value in sums.items()}
    grad_norm = optimizer.clip(max_grad_norm)
    if not (math.isfinite(totals["loss"]) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise FloatingPointError(
            f"{what}: found loss {totals['loss']} and gradient norm {grad_norm}, expected finite numbers;"
            " the weights were left as they were"
        )
    optimizer.step()
    counts = {"positions": sum(p.num_positions for p in microbatches), "microbatches": len(microbatches)}
    return totals | counts | {"grad_norm": grad_norm, "updates": 1}


def summarize(sums: Counter[str]) -> dict[str, float]:
    """Sums over a step -> what is logged: means over updates, trained tokens, or all response tokens."""
    updates, tokens = max(sums["updates"], 1), max(sums["tokens"], 1)
    metrics = {
        name: float(sums[name]) for name in ("updates", "skipped_updates", "microbatches", "positions", "tokens")
    }
    metrics |= {name: sums[name] / updates for name in ("loss", "grad_norm")}
    names = {
        "entropy": "entropy", "nll": "nll", "engine_gap": "engine_gap", "kl_k1": "kl_k1", "kl_k3": "kl_k3",
        "importance": "importance_mean", "truncated": "importance_truncated_share", "clipped": "clipped_share",
        "ratio": "ratio_mean",
    }  # fmt: skip
    metrics |= {name: sums[key] / tokens for key, name in names.items() if key in sums}
    if "ratio" in sums:
        metrics["ratio_std"] = math.sqrt(max(sums["ratio_squared"] / tokens - metrics["ratio_mean"] ** 2, 0.0))
    return metrics


def _policy_loss(
    minibatch: Minibatch, microbatches: Sequence[PackedBatch], old: Sequence[Tensor | None], recipe: Recipe
) -> MicrobatchLoss:
    grpo = recipe.grpo
    before = iter(old)

    def loss_of(packed: PackedBatch, output: LogprobOutput) -> tuple[Tensor, losses.Metrics]:
        proximal = next(before)
        if proximal is None:
            proximal = output.logprobs.detach()
        importance = losses.importance_weights(proximal, packed.engine_logprobs, grpo.importance_cap)
        weights = losses.token_weights(
            grpo.aggregation, packed.mask, packed.sequence_tokens, minibatch.num_tokens, minibatch.num_sequences,
            recipe.rollout.max_tokens,
        )  # fmt: skip
        loss, metrics = losses.packed_policy_loss(
            grpo.loss, output.logprobs, proximal, packed.advantages, importance, weights, packed.sequence_index,
            grpo.clip_low, grpo.clip_high,
        )  # fmt: skip
        return loss, metrics | losses.policy_metrics(
            proximal, packed.engine_logprobs, importance, packed.mask, grpo.importance_cap
        )

    return loss_of


def _sft_loss(minibatch: Minibatch) -> MicrobatchLoss:
    def loss_of(packed: PackedBatch, output: LogprobOutput) -> tuple[Tensor, losses.Metrics]:
        weights = losses.token_weights(
            "token_mean", packed.mask, packed.sequence_tokens, minibatch.num_tokens, minibatch.num_sequences, 1
        )
        loss, metrics = losses.sft(output.logprobs, weights)
        return loss, metrics | {"tokens": packed.mask.sum().float()}

    return loss_of


def _pack(minibatch: Minibatch, budget_tokens: int) -> list[PackedBatch]:
    return [pack(rows) for rows in plan_microbatches(minibatch.rows, budget_tokens)]


def _has_signal(minibatch: Minibatch) -> bool:
    return any(sample.advantage != 0.0 and sample.mask.any() for row in minibatch.rows for sample in row.samples)
