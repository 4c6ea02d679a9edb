"""State dict -> versions. Takes an immutable copy and returns; digests and announcement happen behind it.

A version number is reserved on disk before anybody hears of it, so that no number ever names two sets of bytes,
not even across a crash. Called by `loop.py` between two steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from protocol.errors import DeadlineExceeded
from protocol.rundir import cut_torn_line, read_jsonl
from protocol.tensors import dtype_name, tensor_view
from protocol.weights import Snapshot, layout, make_snapshot

if TYPE_CHECKING:
    from learner.model import PolicyModel

ANNOUNCE_S = 120.0
"""Longest that digests and the announcement of one version may take."""


class Versions:
    """The run's version numbers, reserved in a file, and the step that each one carries.

    The first version of a new branch carries the step that the run went back to; versions of later steps before it
    belong to nothing any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        cut_torn_line(path)
        self._steps: dict[int, int] = {}
        self._branch = 0
        self._surviving: set[int] = set()
        for row in read_jsonl(path):
            self._add(row["version"], row["step"], row.get("branch", 0))

    def reserve(self, step: int, branch: int = 0) -> int:
        """Next number, on disk when this returns."""
        version = self.next
        with open(self._path, "a") as file:
            file.write(json.dumps({"version": version, "step": step, "branch": branch}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._add(version, step, branch)
        return version

    def _add(self, version: int, step: int, branch: int) -> None:
        if branch != self._branch:
            self._branch = branch
            self._surviving = {earlier for earlier in self._surviving if self._steps[earlier] <= step}
        self._steps[version] = step
        self._surviving.add(version)

    @property
    def next(self) -> int:
        """The number that `reserve` will give."""
        return max(self._steps, default=0) + 1

    @property
    def steps(self) -> dict[int, int]:
        """Step of every version that is of the surviving branch."""
        return {version: self._steps[version] for version in sorted(self._surviving)}

    def step_of(self, version: int) -> int:
        """Training steps that a version has seen. Raises KeyError for a number that was never reserved."""
        return self._steps[version]

    def __len__(self) -> int:
        return len(self._steps)


def flatten(state: dict[str, torch.Tensor]) -> tuple[tuple, torch.Tensor]:
    """Specs and one flat uint8 CPU buffer with a copy of every tensor, in order."""
    specs = layout((name, dtype_name(tensor), tuple(tensor.shape)) for name, tensor in state.items())
    buffer = torch.empty(sum(tensor.nbytes for tensor in state.values()), dtype=torch.uint8)
    for spec, tensor in zip(specs, state.values(), strict=True):
        tensor_view(spec, buffer).copy_(tensor)
    return specs, buffer


class Publisher:
    """Announces the model's weights as versions through `announce`."""

    def __init__(
        self, versions: Versions, reserve: Callable[[int, int], None], announce: Callable[[Snapshot], None]
    ) -> None:
        """`reserve(step, version)` tells the dispatcher at once, `announce(snapshot)` sends it when it is ready."""
        self.versions = versions
        self._reserve = reserve
        self._announce = announce
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._pending: Future[None] | None = None
        self.published = 0
        self.bytes_dense = 0
        """Bytes of one dense version."""

    def publish(self, model: PolicyModel, step: int, branch: int = 0) -> int:
        """Publish the weights after `step` steps; returns the version. The model may be changed when this returns.

        Raises what the publication before this one raised behind the caller's back.
        """
        self.wait()
        version = self.versions.reserve(step, branch)
        specs, buffer = flatten(model.published_state())
        self.bytes_dense = buffer.numel()
        self._reserve(step, version)
        self._pending = self._worker.submit(self._finish, version, step, branch, specs, buffer)
        self.published += 1
        return version

    def _finish(self, version: int, step: int, branch: int, specs: tuple, buffer: torch.Tensor) -> None:
        self._announce(make_snapshot(version, step, specs, buffer.numpy().data, branch))

    def wait(self) -> None:
        """Wait until the last version is announced; raises what went wrong with it."""
        if self._pending is not None:
            try:
                self._pending.result(timeout=ANNOUNCE_S)
            except TimeoutError:
                raise DeadlineExceeded(f"the announcement of version {self.versions.next - 1}", ANNOUNCE_S) from None
            self._pending = None

    def close(self) -> None:
        """Let the last announcement end, if it does in time."""
        if self._pending is not None:
            wait([self._pending], timeout=ANNOUNCE_S)
        self._worker.shutdown(wait=False, cancel_futures=True)
