"""State dict -> versions. Takes an immutable copy and returns; digests, delta and announcement happen behind it.

A version number is reserved on disk before anybody hears of it, so that no number ever names two sets of bytes,
not even across a crash. Called by `loop.py` between two steps.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from learner.device_copy import Change, DeviceCopy, write
from protocol.deltas import DeltaCoder
from protocol.errors import DeadlineExceeded
from protocol.messages import Delta, TensorSpec
from protocol.rundir import cut_torn_line, read_jsonl
from protocol.tensors import dtype_name, nbytes, tensor_view
from protocol.weights import Snapshot, layout, make_snapshot

if TYPE_CHECKING:
    from learner.model import PolicyModel

ANNOUNCE_S = 120.0
"""Longest that digests and the announcement of one version may take."""


Flat = tuple[tuple[TensorSpec, ...], torch.Tensor, list[np.ndarray | None] | None]
"""Specs, flat uint8 host buffer, and what changed in it since the last version, where that is known."""


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


def flatten(state: dict[str, torch.Tensor]) -> tuple[tuple[TensorSpec, ...], torch.Tensor]:
    """Specs and one flat uint8 CPU buffer with a copy of every tensor, in their order."""
    specs = layout((name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items())
    buffer = torch.empty(sum(map(nbytes, specs)), dtype=torch.uint8)
    fill(specs, buffer, state.items())
    return specs, buffer


def fill(specs: tuple[TensorSpec, ...], buffer: torch.Tensor, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy named tensors to their places in a flat uint8 buffer, rounded to the types that the specs name."""
    places = {spec.name: spec for spec in specs}
    for name, tensor in tensors:
        tensor_view(places.pop(name), buffer).copy_(tensor)
    assert not places, f"no tensors for {', '.join(places)}"


class Buffers:
    """Flat host buffers that are used again when nobody refers to a version's bytes any more, the network's threads
    included: fresh memory costs a page fault every 4 KiB, several times what copying the weights does."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self, size: int) -> torch.Tensor:
        """A flat uint8 buffer of `size` bytes with anything in it."""
        while self._free:
            if (buffer := self._free.pop()).numel() == size:
                return buffer
        return torch.empty(size, dtype=torch.uint8)

    def prepare(self, size: int) -> None:
        """Have a buffer ready for the next `take`, its pages found: called behind the training."""
        if not self._free:
            self._free.append(torch.empty(size, dtype=torch.uint8).zero_())

    def lend(self, buffer: torch.Tensor) -> memoryview:
        """The buffer's bytes. It comes back when they, and all parts of them, are gone."""
        array = buffer.numpy()
        weakref.finalize(array, self._free.append, buffer)
        return array.data


class Publisher:
    """Announces the model's weights as versions through `announce`.

    The last version is kept for the difference: one copy of the model in `model.dtype` on the host, which is also what
    snapshots are served from; of a model on one GPU another one there. A second copy is the version being made. Of a
    sharded model rank 0 alone has these copies; the others take part in putting its tensors together, one by one.
    """

    def __init__(
        self,
        versions: Versions,
        reserve: Callable[[int, int], None],
        announce: Callable[[Snapshot, tuple[Delta, bytes] | None], None],
        anchor_every: int = 0,
    ) -> None:
        """`reserve(step, version)` tells the dispatcher at once, `announce(snapshot, delta)` sends it when it is ready.

        `anchor_every`: every so many versions no delta is made, so that everybody pulls a snapshot; 0: never."""
        self.versions = versions
        self.anchor_every = anchor_every
        self._reserve = reserve
        self._announce = announce
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._pending: Future[None] | None = None
        self._coder = DeltaCoder()
        self._device = DeviceCopy()
        self._buffers = Buffers()
        self._last: Snapshot | None = None
        self.published = 0
        self.bytes_dense = 0
        """Bytes of one dense version."""
        self.delta_bytes: deque[int] = deque(maxlen=1000)
        """Of the payloads of the last deltas."""
        self.encode_s: deque[float] = deque(maxlen=1000)
        """Seconds that digests and delta of the last versions took, behind the training."""
        self.publish_s: deque[float] = deque(maxlen=1000)
        """Seconds that training stood still for the last versions."""

    def publish(self, model: PolicyModel, step: int, branch: int = 0) -> int:
        """Publish the weights after `step` steps; returns the version. The model may be changed when this returns.

        Raises what the publication before this one raised behind the caller's back.
        """
        began = time.perf_counter()
        self.wait()
        version = self.versions.reserve(step, branch)
        flat = self._copy(model)
        self._reserve(step, version)
        self._pending = self._worker.submit(self._finish, version, step, branch, flat)
        self.published += 1
        self.publish_s.append(time.perf_counter() - began)
        return version

    def _copy(self, model: PolicyModel) -> Callable[[], Flat]:
        """A function that gives the weights of this moment as one flat buffer, to be called behind the training."""
        on_device = model.device.type != "cpu" and not model.sharded
        state = model.published_state(model.device) if on_device else model.live_state()
        specs = layout(
            (name, dtype_name(model.published_dtype(tensor)), tuple(tensor.shape)) for name, tensor in state.items()
        )
        self.bytes_dense = sum(map(nbytes, specs))
        if on_device:
            changes = self._device.advance(state)
            return lambda: self._assemble(specs, changes)
        buffer = self._buffers.take(self.bytes_dense)
        fill(specs, buffer, model.whole_tensors())
        return lambda: (specs, buffer, None)

    def _assemble(self, specs: tuple[TensorSpec, ...], changes: dict[str, Change]) -> Flat:
        """The last version with what has changed on the device since."""
        buffer = self._buffers.take(self.bytes_dense)
        if self._last is not None and self._last.manifest.total_bytes == self.bytes_dense:
            buffer.copy_(torch.frombuffer(self._last.data, dtype=torch.uint8))
        for spec in specs:
            write(changes[spec.name], buffer[spec.offset : spec.offset + nbytes(spec)])
        found = [changes[spec.name][0] for spec in specs]
        return specs, buffer, [None if indices is None else indices.numpy() for indices in found]

    def _finish(self, version: int, step: int, branch: int, flat: Callable[[], Flat]) -> None:
        began = time.perf_counter()
        specs, buffer, changed = flat()
        snapshot = make_snapshot(version, step, specs, self._buffers.lend(buffer), branch)
        last, self._last = self._last, snapshot
        is_anchor = self.anchor_every and version % self.anchor_every == 0
        delta = self._coder.encode(last, snapshot, changed) if last and not is_anchor else None
        self.encode_s.append(time.perf_counter() - began)
        if delta:
            self.delta_bytes.append(len(delta[1]))
        self._announce(snapshot, delta)
        self._buffers.prepare(self.bytes_dense)

    @property
    def figures(self) -> dict[str, float]:
        """Of the newest version for the step's metrics; its delta is still being made, so that is the one before's."""
        figures = {"publish_s": self.publish_s[-1]}
        if self.delta_bytes:
            figures |= {"delta_bytes": float(self.delta_bytes[-1]), "encode_s": self.encode_s[-1]}
        return figures

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
