"""KL(policy || reference), estimated from tokens that the policy drew. Pure tensor functions, in nats.

With logprobs of the same tokens under both, of the same tempered distribution, and d = log p_ref - log p
(Schulman 2020, "Approximating KL Divergence"):

    k1 = -d                  unbiased; single tokens may be negative
    k3 = exp(d) - 1 - d      unbiased, never negative, of lower variance where the two are close

These hold for the *value*. As a loss, differentiated through log p, neither has the gradient of KL(policy || reference)
(Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"). On-policy, in every context:

- k1's is the mean of grad log p, which is 0: as a loss it only adds noise. It belongs in the reward (`sequence_kl`),
  where the policy gradient makes it the right one (RLHF as of Ziegler et al. 2019, Ouyang et al. 2022).
- k3's is (1 - p_ref / p) grad log p, whose mean is the gradient of KL(reference || policy): the other direction, biased
  for this one, but of low variance and 0 at the same point. GRPO adds it to the loss (Shao et al. 2024, eq. 4).

As a loss of single tokens both leave out that a token leads to other contexts; in the reward that counts. Nothing here
corrects for tokens that an older policy drew. Called by `learner/step.py` and `methods/grpo.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.methods.losses import Metrics, masked_sum

Estimator = Literal["k1", "k3"]


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log p - log p_ref of each token, differentiable in both. Any shapes that broadcast."""
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = log p_ref - log p, of each token, differentiable in both. Any shapes that broadcast."""
    difference = reference - logprobs
    return difference.expm1() - difference


def kl_estimate(estimator: Estimator, logprobs: Tensor, reference: Tensor) -> Tensor:
    """`kl_k1` or `kl_k3`. Raises ValueError for any other name."""
    if estimator not in ("k1", "k3"):
        raise ValueError(f"estimator: found {estimator!r}, allowed: k1, k3")
    return (kl_k1 if estimator == "k1" else kl_k3)(logprobs, reference)


def kl_loss(estimator: Estimator, logprobs: Tensor, reference: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """Sum over tokens of weight x estimate: all [N], scalar out, to be multiplied by the coefficient.

    `weights` from `packed_losses.token_weights` hold the update's denominators; tokens of weight 0 add nothing, and
    nothing to the gradient, whatever they hold. Metrics, sums over the others: "reference_kl_k1", "reference_kl_k3".
    """
    mask = weights > 0
    logprobs = logprobs.masked_fill(~mask, 0.0)
    reference = reference.detach().masked_fill(~mask, 0.0)
    loss = (kl_estimate(estimator, logprobs, reference) * weights).sum()
    held = logprobs.detach()
    return loss, {
        "reference_kl_k1": masked_sum(kl_k1(held, reference), mask),
        "reference_kl_k3": masked_sum(kl_k3(held, reference), mask),
    }


def sequence_kl(
    estimator: Estimator,
    engine_logprobs: Tensor | NDArray[Any],
    reference_logprobs: Tensor | NDArray[Any],
    mask: Tensor | NDArray[Any],
) -> float:
    """Estimate of one completion's KL(engine || reference) in nats: the sum over its masked tokens, all [T].

    Times the coefficient it is taken off the completion's reward, before the advantages. The engine's logprobs, since
    the engine drew the tokens. No gradient; 0 for a completion without masked tokens. Computed in float64.
    """
    engine, reference = (_tensor(x).double() for x in (engine_logprobs, reference_logprobs))
    return masked_sum(kl_estimate(estimator, engine, reference), _tensor(mask)).item()


def _tensor(values: Tensor | NDArray[Any]) -> Tensor:
    """A detached tensor; of an array a copy, since it may be read-only."""
    return values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
