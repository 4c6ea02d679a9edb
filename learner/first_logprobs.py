"""The learner's logprobs of a step's tokens before its first update, put back into the order of the groups.

They come from the passes that the step makes anyway (`step.SeeLogprobs`). Called by `trainer.py`. Knows no file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.batch import PackedBatch
from learner.ranks import Ranks


class FirstLogprobs:
    """Of one step: takes what this rank computes, in any order."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, packed: PackedBatch, logprobs: Tensor) -> None:
        """[N] logprobs of a microbatch. Only held until the step is over: a copy to the CPU would make a GPU wait."""
        self._parts.append((packed.places, packed.mask, logprobs))

    def of_step(self, num_tokens: int, ranks: Ranks) -> Tensor:
        """[num_tokens] float32 on the CPU, by `Sample.place`; NaN for tokens that were not trained on.

        All ranks call it; all return the same."""
        values, known = found = torch.zeros(2, num_tokens)
        for places, mask, logprobs in self._parts:
            trained = (mask & (places >= 0)).cpu()
            values[places.cpu()[trained]] = logprobs.float().cpu()[trained]
            known[places.cpu()[trained]] = 1.0
        ranks.merge(found)
        return values.masked_fill(known == 0, math.nan)
