"""A packed microbatch of four completions, one without trainable tokens, and its loss as a loop would have it."""

import numpy as np
import torch

from learner.methods import losses, packed_losses

LENGTHS = [3, 1, 5, 2]
N = sum(LENGTHS)
MAX_TOKENS = 6


def data(seed: int = 0) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    mask = random.random(N) < 0.75
    mask[3] = False  # the one token of the second sequence: a sequence without trainable tokens
    index = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    old = random.normal(-2, 0.5, N)
    return {
        "logprobs": torch.tensor(old + random.normal(0, 0.4, N), dtype=torch.float32, requires_grad=True),
        "old": torch.tensor(old, dtype=torch.float32),
        "engine": torch.tensor(old + random.normal(0, 0.6, N), dtype=torch.float32),
        "advantages": torch.tensor(random.normal(0, 1, len(LENGTHS))[index], dtype=torch.float32),
        "mask": torch.tensor(mask),
        "sequence_index": torch.tensor(index),
        "sequence_tokens": torch.tensor([mask[index == i].sum() for i in index]),
    }


def weights_of(d: dict[str, torch.Tensor], aggregation: packed_losses.Aggregation) -> torch.Tensor:
    return packed_losses.token_weights(
        aggregation, d["mask"], d["sequence_tokens"], int(d["mask"].sum()), len(LENGTHS), MAX_TOKENS
    )


def packed(
    kind: losses.PolicyLoss, d: dict[str, torch.Tensor], importance: torch.Tensor,
    aggregation: packed_losses.Aggregation, low: float = 0.2, high: float = 0.2,
) -> tuple[torch.Tensor, losses.Metrics]:  # fmt: skip
    return packed_losses.packed_policy_loss(
        kind, d["logprobs"], d["old"], d["advantages"], importance, weights_of(d, aggregation), d["sequence_index"],
        low, high,
    )  # fmt: skip


def aggregate(per_token: list[float], d: dict[str, torch.Tensor], aggregation: str) -> float:
    """Sequence by sequence, token by token."""
    kept = [
        [per_token[n] for n in range(N) if int(d["sequence_index"][n]) == s and d["mask"][n]]
        for s in range(len(LENGTHS))
    ]
    if aggregation == "token_mean":
        return sum(map(sum, kept)) / sum(map(len, kept))
    if aggregation == "sequence_mean":
        return sum(sum(k) / len(k) for k in kept if k) / len(kept)
    return sum(map(sum, kept)) / MAX_TOKENS / len(kept)
