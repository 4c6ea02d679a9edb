"""Which examples of a data set a step learns from: passes in seeded orders, so that a step number is a whole cursor.

Called by the loop for `sft`, `dpo` and the warm start. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Epochs(Generic[T]):
    """`epochs` passes over `items` in batches of `batch_size` (the last of a pass may be smaller).

    Each pass has an order of its own that depends on (seed, pass) only, so a run that starts again sees the same ones.
    """

    def __init__(self, items: Sequence[T], batch_size: int, epochs: int, seed: int) -> None:
        if not len(items):
            raise ValueError("items: found none, expected at least one")
        self._items, self._batch_size, self._epochs = items, batch_size, epochs
        self._order = lru_cache(2)(lambda number: self._permutation(seed, number))

    @property
    def steps(self) -> int:
        """Batches in all."""
        return self._epochs * self._batches_a_pass

    def __getitem__(self, step: int) -> list[T]:
        """The examples of a step, from 0. Raises IndexError behind the last."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step: found {step}, allowed: 0..{self.steps - 1}")
        number, place = divmod(step, self._batches_a_pass)
        start = place * self._batch_size
        return [self._items[i] for i in self._order(number)[start : start + self._batch_size].tolist()]

    @property
    def _batches_a_pass(self) -> int:
        return -(-len(self._items) // self._batch_size)

    def _permutation(self, seed: int, number: int) -> NDArray[np.int64]:
        return np.random.default_rng([seed, number]).permutation(len(self._items))
