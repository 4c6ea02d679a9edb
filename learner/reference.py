"""The reference policy: the weights that KL and DPO hold on to, frozen at one moment and kept in the run directory.

Called by `trainer.py`. One copy of the model in `model.dtype`, on disk and in memory (divided over the ranks).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from learner.model import PolicyModel
from learner.sharding import gather, part_of
from learner.tensor_files import describe, read_tensors, write_tensors


class Reference:
    """Empty until `keep` has taken a copy, in this process or in one before it."""

    def __init__(self, model: PolicyModel, path: Path) -> None:
        self._model, self._path = model, path
        self.weights: dict[str, Tensor] = {}

    def keep(self) -> dict[str, Any]:
        """The model as it is now is the reference from here on. Returns the file's digest, for `load`."""
        self.freeze()
        partial = self._path.with_suffix(".part")
        write_tensors(self.weights, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        described = describe(partial)
        partial.replace(self._path)
        return described

    def freeze(self) -> None:
        """Take the copy, but write nothing."""
        self.weights = self._model.frozen_copy()

    def take_part(self) -> None:
        """Every rank but 0, while that one is in `keep`."""
        self.freeze()
        gather(self.weights.values())

    def load(self, described: dict[str, Any]) -> None:
        """Take up what an earlier process kept. Raises ValueError if it is not there, damaged or another one."""
        if self.weights:
            return
        loaded = read_tensors(self._path, described or describe(self._path))  # before 2026-11-22 runs kept no digest
        parameters = dict(self._model.named_parameters())
        self.weights = {
            name: part_of(tensor, parameters.get(name, tensor)).to(self._model.device)
            for name, tensor in loaded.items()
        }
