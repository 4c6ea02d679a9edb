"""Losses over response tokens. Pure tensor functions: tensors in, tensors out, mask and denominator explicit.

Three layers, each usable alone; docs/algorithms.md has the equations and their papers.

1. From logits: `token_entropy`, `response_logprobs`; over a mask: `masked_sum`, `masked_mean`, `masked_normalize`.
2. Per-token policy losses (`policy_gradient`, `grpo_clip`, `gspo`, `cispo`): any shapes that broadcast, for example
   logprobs [batch, seq] and advantages [batch, 1]; no mask and no mean. `sft_microbatch_step`, `grpo_microbatch_step`
   make a whole accumulated backward pass of padded tensors from them, for those who study or write their own loop.
3. What `learner/step.py` uses: all tensors [N], the response tokens of one packed microbatch. A loss is the weighted
   sum of per-token losses, where the weights (`token_weights`) hold the denominator of the whole optimizer update:
   summing over microbatches gives exactly the loss, and the gradient, of the update computed at once.

Metrics are detached; those of layer 3 are sums, so that they too can be added over microbatches. Knows no config file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
PolicyLoss = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip", "gspo", "cispo"]
Metrics = dict[str, Tensor]


# --- over a mask, and from logits -------------------------------------------------------------------------------------


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum where the mask is True; what lies outside may be NaN or infinite. Over `dim`, or over all."""
    kept = values.masked_fill(~mask.bool(), 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean where the mask is True; 0 where it is True nowhere. Over `dim`, or over all."""
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_normalize(values: Tensor, mask: Tensor, constant: float, dim: int | None = None) -> Tensor:
    """Sum where the mask is True, divided by a constant. Over `dim`, or over all."""
    return masked_sum(values, mask, dim) / constant


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution in nats: [..., vocabulary] -> [...]. Stable for logits of any size.

    H = -sum p log p, from a log-softmax in float32: where p is 0, log p is large but finite, and its product 0.
    """
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def response_logprobs(
    model: Callable[..., Any], input_ids: Tensor, labels: Tensor, with_entropy: bool = False
) -> dict[str, Tensor]:
    """{"log_probs": [batch, seq] log p(label), "token_entropy": [batch, seq] if asked for}, for every position.

    `model(input_ids).logits` is [batch, seq, vocabulary], as of transformers; labels are the ids one place further on
    (`learner.batch.tokenize_prompt_and_output`). Gradients flow if they are on. The learner's own forward (`model.py`)
    applies the vocabulary head at response positions only; this one is the plain form.
    """
    logits = model(input_ids).logits
    logprobs = logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return {"log_probs": logprobs} | ({"token_entropy": token_entropy(logits)} if with_entropy else {})


# --- per-token policy losses ------------------------------------------------------------------------------------------


def policy_gradient(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """-A log p (Williams 1992). With raw rewards for A it is REINFORCE without a baseline."""
    return -advantages * logprobs


def grpo_clip(
    advantages: Tensor, logprobs: Tensor, old: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Metrics]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log p - log p_old), and {"ratio", "clipped"} per token.

    PPO (Schulman et al. 2017, eq. 7), with bounds of their own on either side (DAPO, Yu et al. 2025, eq. 10). `old` is
    the proximal policy: the learner's own logprobs before the step's first update. "clipped": the clipped term was the
    smaller one, so the token has no gradient.
    """
    ratio = (logprobs - old.detach()).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(unclipped, clipped), _detached({"ratio": ratio, "clipped": (clipped < unclipped).float()})


def gspo(
    advantages: Tensor, logprobs: Tensor, mean_log_ratio: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Metrics]:
    """`grpo_clip` with the sequence's ratio s = exp(mean over its tokens of log p - log p_old) for every token's.

    GSPO (Zheng et al. 2025, "Group Sequence Policy Optimization"), in its per-token form (GSPO-token): the value of s,
    the gradient of log p. `mean_log_ratio`: that mean, at every token of its sequence. Averaged per sequence
    ("sequence_mean") the gradient is GSPO's. The bounds are far closer than PPO's: the paper has 3e-4 and 4e-4.
    """
    held = logprobs.detach()
    return grpo_clip(advantages, logprobs, held - mean_log_ratio.detach(), clip_low, clip_high)


def cispo(
    advantages: Tensor, logprobs: Tensor, old: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Metrics]:
    """-sg(clip(r, 1 - low, 1 + high)) A log p: the weight is clipped, and no token loses its gradient.

    CISPO (MiniMax 2025, "MiniMax-M1"; the paper leaves the lower bound off, which is clip_low = 1).
    """
    ratio = (logprobs - old).detach().exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -bounded * advantages * logprobs, {"ratio": ratio, "clipped": (bounded != ratio).float()}


# --- a whole microbatch of padded tensors -----------------------------------------------------------------------------


def policy_loss(
    kind: PolicyLoss,
    logprobs: Tensor,
    mask: Tensor,
    *,
    raw_rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    old: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Metrics]:
    """Per-token loss of one of the five kinds: logprobs and mask [batch, seq], rewards and advantages [batch, 1].

    `no_baseline` wants `raw_rewards`, the others `advantages`; the three with a ratio want `old` [batch, seq]. Raises
    ValueError for what is missing.
    """
    signal = raw_rewards if kind == "no_baseline" else advantages
    if signal is None:
        name = "raw_rewards" if kind == "no_baseline" else "advantages"
        raise ValueError(f"{name}: found nothing, allowed with {kind}: a tensor [batch, 1]")
    if kind in ("no_baseline", "reinforce_with_baseline"):
        return policy_gradient(signal, logprobs), {}
    if old is None:
        raise ValueError(f"old: found nothing, allowed with {kind}: a tensor [batch, seq]")
    if kind == "gspo":
        mean = masked_mean(logprobs.detach() - old, mask, dim=-1)[..., None]
        return gspo(signal, logprobs, mean, clip_low, clip_high)
    if kind not in ("grpo_clip", "cispo"):
        raise ValueError(f"kind: found {kind!r}, allowed: no_baseline, reinforce_with_baseline, grpo_clip, gspo, cispo")
    return (grpo_clip if kind == "grpo_clip" else cispo)(signal, logprobs, old, clip_low, clip_high)


def sft_microbatch_step(
    logprobs: Tensor, mask: Tensor, accumulation_steps: int, normalize_constant: float = 1.0
) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the response tokens of one of `accumulation_steps` microbatches, with backward pass.

    [batch, seq] logprobs and mask. Returns the loss, sum / normalize_constant / batch / accumulation_steps, detached.
    """
    loss = masked_normalize(-logprobs, mask, normalize_constant) / logprobs.shape[0] / accumulation_steps
    loss.backward()
    return loss.detach(), {"tokens": mask.sum()}


def grpo_microbatch_step(
    logprobs: Tensor,
    mask: Tensor,
    accumulation_steps: int,
    kind: PolicyLoss,
    *,
    normalize_constant: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, Metrics]:
    """`policy_loss` of one of `accumulation_steps` microbatches, and its backward pass.

    Each sequence's loss is the mean over its response tokens (GRPO), or their sum over `normalize_constant` (Dr. GRPO);
    the microbatch's is the mean over its sequences, divided by `accumulation_steps`. Returns it, detached, and the
    means of the loss's metrics over the mask.
    """
    per_token, metrics = policy_loss(kind, logprobs, mask, **arguments)
    if normalize_constant is None:
        per_sequence = masked_mean(per_token, mask, dim=-1)
    else:
        per_sequence = masked_normalize(per_token, mask, normalize_constant, dim=-1)
    loss = per_sequence.mean() / accumulation_steps
    loss.backward()
    return loss.detach(), {name: masked_mean(value, mask) for name, value in metrics.items()}


# --- packed microbatches ----------------------------------------------------------------------------------------------


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

    `weights` from `token_weights`; tokens of weight 0 add nothing, and nothing to the gradient, whatever they hold.
    `sequence_index`: which completion a token is of. Metrics, for the kinds with a ratio: sums of "ratio",
    "ratio_squared" and "clipped".
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


def sequence_means(values: Tensor, mask: Tensor, sequence_index: Tensor) -> Tensor:
    """Mean over each sequence's masked tokens, at every one of its tokens: [N] -> [N]; 0 for a sequence without any."""
    sequences = int(sequence_index.max()) + 1 if len(sequence_index) else 0
    totals = torch.zeros(sequences, device=values.device).index_add(0, sequence_index, values.masked_fill(~mask, 0.0))
    counts = torch.zeros(sequences, device=values.device).index_add(0, sequence_index, mask.float())
    return (totals / counts.clamp(min=1))[sequence_index]


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
