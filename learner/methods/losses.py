"""Losses over response tokens. Pure tensor functions: tensors in, tensors out, mask and denominator explicit.

Three layers, each usable alone; docs/algorithms.md has the equations and their papers.

1. From logits: `token_entropy`, `response_logprobs`; over a mask: `masked_sum`, `masked_mean`, `masked_normalize`.
2. Per-token policy losses (`policy_gradient`, `grpo_clip`, `gspo`, `cispo`): any shapes that broadcast, for example
   logprobs [batch, seq] and advantages [batch, 1]; no mask and no mean. `dpo` is one per pair. `sft_microbatch_step`,
   `grpo_microbatch_step` make a whole accumulated backward pass of padded tensors from them, for those who study or
   write their own loop.
3. `packed_losses.py`: what `learner/step.py` uses, on the response tokens of a packed microbatch.

Masks may be of any type; nothing that lies outside one reaches a value or a gradient, not even NaN. Metrics are
detached. Knows no config file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PolicyLoss = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip", "gspo", "cispo"]
Metrics = dict[str, Tensor]


# --- over a mask, and from logits -------------------------------------------------------------------------------------


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum where the mask is True; what lies outside may be NaN or infinite. Over `dim`, or over all.

    The mask broadcasts to the values' shape, here and in the two below.
    """
    kept = values.masked_fill(~mask.bool(), 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean where the mask is True; 0 where it is True nowhere. Over `dim`, or over all."""
    mask = mask.bool().expand_as(values)
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_normalize(values: Tensor, mask: Tensor, constant: float, dim: int | None = None) -> Tensor:
    """Sum where the mask is True, divided by a constant. Over `dim`, or over all."""
    return masked_sum(values, mask, dim) / constant


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution in nats: [..., vocabulary] -> [...]. Stable for logits of any size.

    H = -sum p log p, from a log-softmax in float32. Where p is 0 the product is 0, too: log p is made finite for that,
    since a logit may be -inf (a token that is forbidden).
    """
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


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


# --- pairs ------------------------------------------------------------------------------------------------------------


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), the margin m = beta (chosen log-ratio - rejected log-ratio).

    DPO (Rafailov et al. 2023, "Direct Preference Optimization", eq. 7); e = `label_smoothing` is the assumed share of
    pairs that are the wrong way round (conservative DPO: Mitchell 2023, "A note on DPO with noisy preferences").

    Inputs [P]: the log-probability in nats of each whole response, summed over its tokens, not averaged; the
    reference's carry no gradient. Returns the losses [P] and sums over the pairs: "chosen_reward" and
    "rejected_reward", the implicit rewards beta (log p - log p_ref), "margin", their difference, and "accuracy", pairs
    of a margin above 0 (none where the policy is still the reference).
    """
    chosen = beta * (policy_chosen - reference_chosen.detach())
    rejected = beta * (policy_rejected - reference_rejected.detach())
    margin = chosen - rejected
    loss = -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return loss, _detached(
        {
            "accuracy": (margin > 0).float().sum(),
            "margin": margin.sum(),
            "chosen_reward": chosen.sum(),
            "rejected_reward": rejected.sum(),
        }
    )


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

    `no_baseline` wants `raw_rewards`, the others `advantages`; the three with a ratio want `old` [batch, seq]. The loss
    outside the mask means nothing, and no gradient comes from there. Raises ValueError for what is missing.
    """
    logprobs = logprobs.masked_fill(~mask.bool(), 0.0)
    if kind not in get_args(PolicyLoss):
        raise ValueError(f"kind: found {kind!r}, allowed: {', '.join(get_args(PolicyLoss))}")
    signal = raw_rewards if kind == "no_baseline" else advantages
    if signal is None:
        name = "raw_rewards" if kind == "no_baseline" else "advantages"
        raise ValueError(f"{name}: found nothing, allowed with {kind}: a tensor [batch, 1]")
    if signal.ndim != logprobs.ndim:  # [batch] would silently go along the tokens where batch == seq
        raise ValueError(f"{kind}: found rewards or advantages of shape {list(signal.shape)}, allowed: [batch, 1]")
    if kind in ("no_baseline", "reinforce_with_baseline"):
        return policy_gradient(signal, logprobs), {}
    if old is None:
        raise ValueError(f"old: found nothing, allowed with {kind}: a tensor [batch, seq]")
    if kind == "gspo":
        mean = masked_mean(logprobs.detach() - old, mask, dim=-1)[..., None]
        return gspo(signal, logprobs, mean, clip_low, clip_high)
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


def _detached(metrics: Metrics) -> Metrics:
    return {name: value.detach() for name, value in metrics.items()}
