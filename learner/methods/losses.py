"""Losses over response tokens. Pure tensor functions: tensors in, (loss, metrics) out, mask and denominator explicit.

All per-token tensors have shape [N], the response tokens of one microbatch. A loss is the weighted sum of per-token
losses, where the weights (`token_weights`) already hold the denominator of the whole optimizer update: summing over
microbatches gives exactly the loss, and the gradient, of the update computed at once.

Metrics are sums (never means), detached, so that they too can be added over microbatches. Knows no model and no config
file; called by `learner/step.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
Metrics = dict[str, Tensor]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum where the mask is True; what lies outside may be NaN or infinite. [N], [N] bool -> scalar."""
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where the mask is True; 0 where it is True nowhere. [N], [N] bool -> scalar."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def token_weights(
    aggregation: Aggregation,
    mask: Tensor,
    sequence_tokens: Tensor,
    num_tokens: int,
    num_sequences: int,
    max_tokens: int,
) -> Tensor:
    """What each token's loss counts for in the loss of the update: [N] float32, 0 outside the mask.

    token_mean: 1 / num_tokens (DAPO, Yu et al. 2025, eq. 8).
    sequence_mean: 1 / (own sequence's tokens x num_sequences) (GRPO, Shao et al. 2024, eq. 3).
    constant: 1 / (max_tokens x num_sequences), independent of lengths (Dr. GRPO, Liu et al. 2025, section 3).

    `num_tokens` (trainable) and `num_sequences` are those of the whole update; `sequence_tokens` [N] is the number of
    trainable tokens of each token's own sequence. A sequence without trainable tokens counts as one of loss 0.
    """
    if aggregation == "token_mean":
        weights = torch.full(mask.shape, 1.0 / max(num_tokens, 1), device=mask.device)
    elif aggregation == "sequence_mean":
        weights = 1.0 / (sequence_tokens.clamp(min=1).float() * max(num_sequences, 1))
    elif aggregation == "constant":
        weights = torch.full(mask.shape, 1.0 / (max_tokens * max(num_sequences, 1)), device=mask.device)
    else:
        raise ValueError(f"aggregation: found {aggregation!r}, allowed: token_mean, sequence_mean, constant")
    return weights.masked_fill(~mask, 0.0)


def importance_weights(old: Tensor, engine: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: min(exp(old - engine), cap), detached. [N] -> [N]; all ones where cap is 0.

    Corrects for tokens drawn by older weights and by the engine's different arithmetic; the truncation bounds the
    variance (Ionides 2008; Espeholt et al. 2018, "IMPALA", rho-bar).
    """
    if cap == 0:
        return torch.ones_like(old)
    return (old.detach() - engine).exp().clamp(max=cap)


def grpo_clip(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    importance: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Metrics]:
    """Clipped policy gradient: sum of w x importance x -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(logp - old).

    PPO (Schulman et al. 2017, eq. 7), with bounds of their own on either side (DAPO, Yu et al. 2025, eq. 10). `old` is
    the proximal policy: the learner's own logprobs before the step's first update. All [N]. `weights` from
    `token_weights`; tokens of weight 0 add nothing. Metrics: "ratio", "ratio_squared", "clipped" (tokens whose clipped
    term was the smaller one, so that their gradient is 0).
    """
    mask = weights > 0
    ratio = (logprobs - old.detach()).masked_fill(~mask, 0.0).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = masked_sum(-torch.minimum(unclipped, clipped) * importance * weights, mask)
    metrics = {
        "ratio": masked_sum(ratio, mask),
        "ratio_squared": masked_sum(ratio.square(), mask),
        "clipped": masked_sum((clipped < unclipped).float(), mask),
    }
    return loss, _detached(metrics)


def reinforce(logprobs: Tensor, advantages: Tensor, importance: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """Policy gradient without clipping: sum of w x importance x -A logp (Williams 1992). All [N]."""
    mask = weights > 0
    logprobs = logprobs.masked_fill(~mask, 0.0)  # here, too: 0 x NaN outside the mask would be a NaN gradient
    return masked_sum(-advantages * logprobs * importance * weights, mask), {}


def sft(logprobs: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the response tokens: sum of w x -logp. [N], [N] -> scalar."""
    mask = weights > 0
    return masked_sum(-logprobs * weights, mask), _detached({"nll": masked_sum(-logprobs, mask)})


def policy_metrics(old: Tensor, engine: Tensor, importance: Tensor, mask: Tensor, cap: float) -> Metrics:
    """How far the learner's policy is from the one that drew the tokens, as sums over the mask. All [N].

    "kl_k1" and "kl_k3" estimate KL(engine || learner) per token from the engine's samples: with d = old - engine they
    are -d and exp(d) - 1 - d (Schulman 2020, "Approximating KL Divergence"). "engine_gap" is |d|. "importance" is the
    weight itself, "truncated" counts the weights that the cap cut.
    """
    difference = (old.detach() - engine).masked_fill(~mask, 0.0)
    truncated = difference.exp() > cap if cap else torch.zeros_like(mask)
    return _detached(
        {
            "tokens": mask.sum().float(),
            "engine_gap": masked_sum(difference.abs(), mask),
            "kl_k1": masked_sum(-difference, mask),
            "kl_k3": masked_sum(difference.expm1() - difference, mask),
            "importance": masked_sum(importance, mask),
            "truncated": masked_sum(truncated.float(), mask),
        }
    )


def _detached(metrics: Metrics) -> Metrics:
    return {name: value.detach() for name, value in metrics.items()}
