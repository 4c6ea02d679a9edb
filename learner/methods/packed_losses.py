"""What `learner/step.py` asks of one packed microbatch: all tensors [N], its response tokens, in order of sequences.

A loss is a weighted sum over tokens (or pairs), where the weights (`token_weights`) hold the denominator of the whole
optimizer update: summing over microbatches gives exactly the loss, and the gradient, of the update computed at once.
Metrics are detached sums, so that they too can be added over microbatches. The per-token mathematics is in `losses.py`,
the KL to a reference in `kl.py`; docs/algorithms.md has the equations.

`mask` is True where a token may be trained on; `sequence_index` says which completion of the microbatch a token is of,
from 0 (a completion is never split over microbatches). Pure functions; know no config file.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from learner.methods.kl import kl_k1, kl_k3
from learner.methods.losses import Metrics, PolicyLoss, cispo, dpo, grpo_clip, gspo, masked_sum, policy_gradient

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
ImportanceLevel = Literal["token", "sequence"]
ImportanceMode = Literal["truncate", "mask"]


# --- what a token counts for ------------------------------------------------------------------------------------------


def token_weights(
    aggregation: Aggregation,
    mask: Tensor,
    sequence_tokens: Tensor,
    num_tokens: int,
    num_sequences: int,
    constant: float,
) -> Tensor:
    """What each token's loss counts for in the loss of the update: [N] float32, 0 outside the mask.

    token_mean: 1 / num_tokens (DAPO, Yu et al. 2025, eq. 8).
    sequence_mean: 1 / (own sequence's tokens x num_sequences) (GRPO, Shao et al. 2024, eq. 3).
    constant: 1 / (constant x num_sequences), independent of lengths (Dr. GRPO, Liu et al. 2025, section 3, with the
    longest possible completion for the constant, in tokens).

    `num_tokens` (trainable) and `num_sequences` are those of the whole update; `sequence_tokens` [N] is the number of
    trainable tokens of each token's own sequence. A sequence without trainable tokens counts as one of loss 0.
    """
    if aggregation == "token_mean":
        weights = torch.full(mask.shape, 1.0 / max(num_tokens, 1), device=mask.device)
    elif aggregation == "sequence_mean":
        weights = 1.0 / (sequence_tokens.clamp(min=1).float() * max(num_sequences, 1))
    elif aggregation == "constant":
        weights = torch.full(mask.shape, 1.0 / (constant * max(num_sequences, 1)), device=mask.device)
    else:
        raise ValueError(f"aggregation: found {aggregation!r}, allowed: token_mean, sequence_mean, constant")
    return weights.masked_fill(~mask, 0.0)


def importance_weights(
    old: Tensor,
    engine: Tensor,
    mask: Tensor,
    sequence_index: Tensor,
    *,
    cap: float,
    floor: float = 0.0,
    level: ImportanceLevel = "token",
    mode: ImportanceMode = "truncate",
) -> tuple[Tensor, Tensor]:
    """(weights [N] float32, outside [N] bool): how much likelier `old` finds the tokens than the engine that drew them.

    w = exp(old - engine) of the token ("token"), or the product of these over the masked tokens of its completion, at
    every token of it ("sequence"). Then "truncate": min(w, cap); "mask": w where floor <= w <= cap, and 0 elsewhere.
    `outside`: masked tokens whose weight was cut or made 0. With cap 0 there is no correction: all ones, none outside.
    Weights outside the mask mean nothing, but are finite. A token left out by "mask" stays in the denominators of
    `token_weights`: it is a weight of 0 in a mean over the tokens drawn, and the denominators are known beforehand. No
    gradient flows.

    Corrects for tokens drawn by older weights and by the engine's different arithmetic; the bound is what keeps the
    variance finite (Ionides 2008). Truncated: Espeholt et al. 2018, "IMPALA" (rho-bar); Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training" (TIS). Masked: Ling Team 2025, "Every Step
    Evolves" (IcePop, by token); Liu et al. 2025, "When Speed Kills Stability" (MIS, by sequence too).
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level: found {level!r}, allowed: token, sequence")
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode: found {mode!r}, allowed: truncate, mask")
    if cap == 0:
        return torch.ones_like(old.detach()), torch.zeros_like(mask)
    log_weights = (old.detach() - engine).masked_fill(~mask, 0.0)
    if level == "sequence":
        sequences = _count(sequence_index)
        log_weights = sequence_sums(log_weights.double(), mask, sequence_index, sequences)[sequence_index]
    weights = log_weights.exp().float()  # may be infinite, which is above the cap: it is replaced, never multiplied
    outside = weights > cap
    if mode == "truncate":
        return weights.clamp(max=cap), outside & mask
    outside |= weights < floor
    return weights.masked_fill(outside, 0.0), outside & mask


# --- losses -----------------------------------------------------------------------------------------------------------


def packed_policy_loss(
    kind: PolicyLoss,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    importance: Tensor,
    weights: Tensor,
    sequence_index: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Metrics]:
    """Sum over tokens of weight x importance x per-token loss; all [N], scalar out.

    `old` is the proximal policy, that which the ratio compares with and the clip holds on to. The learner's own before
    the step's first update, with `importance` from it to the engine: decoupled PPO (Hilton et al. 2021, "Batch
    size-invariance for policy optimization"; Fu et al. 2025, "AReaL"). The engine's, with an importance of 1: PPO.

    `weights` from `token_weights`; tokens of weight 0 add nothing, and nothing to the gradient, whatever they hold.
    Metrics, for the kinds with a ratio: sums of "ratio", "ratio_squared" and "clipped".
    """
    mask = weights > 0
    logprobs = logprobs.masked_fill(~mask, 0.0)  # here, too: 0 x NaN outside the mask would be a NaN gradient
    old = old.detach().masked_fill(~mask, 0.0)
    metrics: Metrics = {}
    if kind in ("no_baseline", "reinforce_with_baseline"):
        per_token = policy_gradient(advantages, logprobs)
    elif kind == "gspo":
        mean = sequence_means((logprobs - old).detach(), mask, sequence_index)
        per_token, metrics = gspo(advantages, logprobs, mean, clip_low, clip_high)
    else:
        per_token, metrics = (grpo_clip if kind == "grpo_clip" else cispo)(
            advantages, logprobs, old, clip_low, clip_high
        )
    if metrics:
        metrics |= {"ratio_squared": metrics["ratio"].square()}
    loss = masked_sum(per_token * importance * weights, mask)
    return loss, {name: masked_sum(value, mask) for name, value in metrics.items()}


def sft(logprobs: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the response tokens: sum of w x -logp. [N], [N] -> scalar."""
    mask = weights > 0
    return masked_sum(-logprobs * weights, mask), {"nll": masked_sum(-logprobs.detach(), mask)}


def packed_dpo_loss(
    logprobs: Tensor,
    reference: Tensor,
    mask: Tensor,
    sequence_index: Tensor,
    num_pairs: int,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """`losses.dpo` of the microbatch's pairs, summed and divided by `num_pairs`, those of the whole update.

    Sequences 2i are the chosen, 2i + 1 the rejected responses, so no pair may be split over microbatches. Sums of
    logprobs are in float64: the loss is of differences between them that are far smaller. Metrics: as `losses.dpo`'s,
    and "pairs".
    """
    sequences = _count(sequence_index)
    assert sequences % 2 == 0, f"found {sequences} sequences, expected pairs"
    policy = sequence_sums(logprobs.double(), mask, sequence_index, sequences)
    held = sequence_sums(reference.detach().double(), mask, sequence_index, sequences)
    loss, metrics = dpo(policy[0::2], policy[1::2], held[0::2], held[1::2], beta, label_smoothing)
    pairs = torch.tensor(float(sequences // 2), device=logprobs.device)
    return (loss.sum() / num_pairs).to(logprobs.dtype), metrics | {"pairs": pairs}


# --- over sequences ---------------------------------------------------------------------------------------------------


def sequence_sums(values: Tensor, mask: Tensor, sequence_index: Tensor, sequences: int) -> Tensor:
    """Sum over each sequence's masked tokens: [N] -> [sequences]; 0 for a sequence without any. Differentiable."""
    kept = values.masked_fill(~mask, 0.0)
    return torch.zeros(sequences, dtype=values.dtype, device=values.device).index_add(0, sequence_index, kept)


def sequence_means(values: Tensor, mask: Tensor, sequence_index: Tensor) -> Tensor:
    """Mean over each sequence's masked tokens, at every one of its tokens: [N] -> [N]; 0 for a sequence without any."""
    sequences = _count(sequence_index)
    totals = sequence_sums(values, mask, sequence_index, sequences)
    counts = sequence_sums(mask.to(values.dtype), mask, sequence_index, sequences)
    return (totals / counts.clamp(min=1))[sequence_index]


def _count(sequence_index: Tensor) -> int:
    return int(sequence_index.max()) + 1 if len(sequence_index) else 0


# --- metrics ----------------------------------------------------------------------------------------------------------


def policy_metrics(old: Tensor, engine: Tensor, importance: Tensor, mask: Tensor, outside: Tensor) -> Metrics:
    """How far the learner's policy is from the one that drew the tokens, as sums over the mask. All [N].

    "kl_k1" and "kl_k3" estimate KL(engine || learner) per token from the engine's samples (`kl.py`); "engine_gap" is
    |old - engine|. `old` is the learner's own policy, whatever the proximal one is. "importance" is the weight itself;
    "truncated" counts the tokens of `importance_weights`' `outside`.
    """
    old = old.detach()
    return {
        "tokens": mask.sum().float(),
        "engine_gap": masked_sum((old - engine).abs(), mask),
        "kl_k1": masked_sum(kl_k1(engine, old), mask),
        "kl_k3": masked_sum(kl_k3(engine, old), mask),
        "importance": masked_sum(importance, mask),
        "truncated": masked_sum(outside.float(), mask),
    }
