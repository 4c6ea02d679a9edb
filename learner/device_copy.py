"""The last published weights on the model's device: what changed since is found there, and only that comes to the host.

One copy of the model in its published types, on the device. Called by `publish.py` for a model that is not on the CPU,
where the host compares faster than it could copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.deltas import MOST_PLACES

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


Change = tuple[Tensor | None, Tensor]
"""Of one tensor, flat and on the host: int64 indices of its changed elements and their new bits; None and all bits."""


class DeviceCopy:
    """Empty until the first `advance`."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}

    def advance(self, state: dict[str, Tensor]) -> dict[str, Change]:
        """What changed in each tensor since the state before; the new one is kept, and must not be written to.

        All bits of a tensor are copied to the host if it was not there before or looked otherwise, and if too much of
        it has changed (MOST_PLACES)."""
        last, self._last = self._last, state
        return {name: _change(tensor, last.get(name)) for name, tensor in state.items()}


def _change(tensor: Tensor, last: Tensor | None) -> Change:
    new = _bits(tensor)
    if last is not None and (last.dtype, last.shape) == (tensor.dtype, tensor.shape):
        indices = (new != _bits(last)).nonzero()[:, 0]
        if len(indices) <= MOST_PLACES * len(new):
            return indices.to("cpu"), new[indices].to("cpu")
    return None, new.to("cpu")


def write(change: Change, part: Tensor) -> None:
    """Bring a host copy of the tensor before, flat uint8, up to date."""
    indices, bits = change
    host = part.view(bits.dtype)
    if indices is None:
        host.copy_(bits)
    else:
        host[indices] = bits


def _bits(tensor: Tensor) -> Tensor:
    """Flat view of the stored bits. They are compared, not values: NaN differs from itself, and 0 equals -0."""
    return tensor.contiguous().reshape(-1).view(BITS[tensor.element_size()])
