"""A version of the weights as its difference from the one before. Over byte buffers; no torch, no socket.

For each tensor the smallest of four encodings is taken:

    delta   where elements' bits changed, and by how much (`coding.py`); many tensors of one type share one such part
    moves   by how much every element's bits changed: for a tensor of which most did
    zstd    all bytes, compressed
    dense   the bytes as they are

It is lossless, and means something to one base only: `Delta` names that base and the version it makes by the digests of
their manifests. Used by the publisher (`encode`) and by actors (`decode`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from protocol import coding
from protocol.coding import SmallElements
from protocol.errors import WeightsError
from protocol.messages import Delta, DeltaPart, TensorSpec
from protocol.tensors import item_bytes, nbytes
from protocol.threads import num_threads, side_by_side
from protocol.weights import Snapshot

RUN_BYTES = 16 << 20
"""Tensors of one type that follow each other are coded together up to about so many bytes."""
SURELY_SMALLEST = 1 / 8
"""Share of changed elements up to which nothing but a delta is tried: it takes a fifth of the dense bytes at most."""
MOST_PLACES = 1 / 4
"""Share of changed elements up to which a delta is tried: bounds the memory for indices."""

REMEMBERED_SHARE = 1 / 8
"""Of a run's bytes: larger indices are not kept, it is copied as a whole."""

Bytes = bytes | memoryview


@dataclass(frozen=True)
class Run:
    """Tensors [first, first + count) of a version, all of one type: bytes [start, stop)."""

    first: int
    count: int
    start: int
    stop: int
    itemsize: int

    def bits(self, data: memoryview) -> np.ndarray:
        """The elements of the run in a version's buffer, as unsigned integers."""
        return np.frombuffer(data[self.start : self.stop], f"<u{self.itemsize}")


Coded = list[tuple[DeltaPart, Bytes]]
Changes = list[tuple[Run, np.ndarray | None, np.ndarray | None]]
"""Of runs of tensors the indices of elements that differ between two versions, and their new bits; None: any may."""


class DeltaCoder:
    """Encodes or decodes deltas, one after the other along the versions; the work is shared out to threads.

    It remembers where the small elements of the version are that it saw last, which spares a pass over everything.
    """

    def __init__(self, threads: int = 0) -> None:
        """`threads`: 0 for as many as are of use."""
        self.threads = threads or num_threads()
        self._small: dict[tuple[int, int], SmallElements] = {}
        self._at = ""
        """Manifest digest of the version that `_small` is of."""

    def encode(
        self, base: Snapshot, new: Snapshot, changed: Sequence[np.ndarray | None] | None = None
    ) -> tuple[Delta, bytes] | None:
        """The delta from one version to another and its payload; None if the tensors are not the same ones, or if it
        would be as large as a snapshot.

        `changed`, if the caller knows: of each tensor the ascending indices of its changed elements, or None for one
        of which more than MOST_PLACES have changed.
        """
        specs = new.manifest.tensors
        if [(s.name, s.dtype, s.shape) for s in base.manifest.tensors] != [(s.name, s.dtype, s.shape) for s in specs]:
            return None
        self._go_to(base.manifest.digest, new.manifest.digest)
        try:
            found = side_by_side(
                lambda run: self._encode_run(run, specs, base.data, new.data, changed), list(runs(specs)), self.threads
            )
        except BaseException:
            self._at = ""
            raise
        coded = [part for run in found for part in run]
        self._keep(part for part, _ in coded)
        payload = b"".join(data for _, data in coded)
        if len(payload) >= new.manifest.total_bytes:
            return None
        delta = Delta(
            version=new.manifest.version,
            base=base.manifest.version,
            base_digest=base.manifest.digest,
            digest=new.manifest.digest,
            parts=tuple(part for part, _ in coded),
            nbytes=len(payload),
            payload_digest=payload_digest(payload),
        )
        return delta, payload

    def decode(self, delta: Delta, payload: Bytes, specs: Sequence[TensorSpec], target: memoryview) -> Changes:
        """Make `target`, the bytes of `delta.base`, those of `delta.version`, in place; returns what has changed.

        Raises WeightsError for a payload that does not have the delta's digest (then nothing was written) or cannot be
        one of these tensors (then `target` may be anything). Whoever calls it knows by `delta.base_digest` that
        `target` is the base, and compares the digests of all tensors afterwards.
        """
        payload = memoryview(payload)
        check_payload(delta, payload)
        self._go_to(delta.base_digest, delta.digest)
        try:
            work = list(_parts(delta, payload, specs))
            found = side_by_side(lambda item: self._decode_part(item[0], item[1], item[2], target), work, self.threads)
            self._keep(delta.parts)
        except BaseException:
            self._at = ""
            raise
        return [change for changes in found for change in changes]

    def _go_to(self, base: str, new: str) -> None:
        if self._at != base:
            self._small.clear()
        self._at = new

    def _keep(self, parts: Iterable[DeltaPart]) -> None:
        """Forget what was not followed: the classes of all runs but those that `parts` has as deltas."""
        first, kept = 0, {}
        for part in parts:
            if part.encoding == "delta":
                kept[first, part.tensors] = self._small_of(first, part.tensors)
            first += part.tensors
        self._small = kept

    # --- one run of tensors ---

    def _encode_run(
        self,
        run: Run,
        specs: Sequence[TensorSpec],
        base: memoryview,
        new: memoryview,
        changed: Sequence[np.ndarray | None] | None,
    ) -> Coded:
        """The run as one delta; its tensors one by one if too much of any has changed."""
        old, now = run.bits(base), run.bits(new)
        if changed is None:
            indices = coding.changed(old, now, at_most=int(MOST_PLACES * len(old)))
        else:
            indices = _joined(run, specs, changed)
        if indices is not None and _is_sparse(run, specs, indices):
            return [self._delta_part(run, old, now, indices)]
        if run.count > 1:
            singles = (_run(specs, first, 1) for first in _tensors(run))
            return [part for single in singles for part in self._encode_run(single, specs, base, new, changed)]
        return [self._smallest(run, old, now, indices, new[run.start : run.stop])]

    def _delta_part(self, run: Run, old: np.ndarray, now: np.ndarray, indices: np.ndarray) -> tuple[DeltaPart, Bytes]:
        payload = coding.encode_changes(old, now, indices, self._small_of(run.first, run.count))
        return DeltaPart(run.count, "delta", len(payload)), payload

    def _smallest(
        self, run: Run, old: np.ndarray, now: np.ndarray, indices: np.ndarray | None, dense: memoryview
    ) -> tuple[DeltaPart, Bytes]:
        """The smallest encoding of one tensor, by measured size."""
        found: dict[str, Bytes] = {
            "dense": dense,
            "zstd": coding.pack(coding.planes(now)),
            "moves": coding.pack(coding.planes(coding.zigzag(now - old))),
        }
        if indices is not None:
            found["delta"] = self._delta_part(run, old, now, indices)[1]
        encoding = min(found, key=lambda name: len(found[name]))
        return DeltaPart(1, encoding, len(found[encoding])), found[encoding]

    def _decode_part(self, run: Run, encoding: str, payload: memoryview, target: memoryview) -> Changes:
        bits = run.bits(target)
        if encoding == "delta":
            found = coding.apply_changes(payload, bits, self._small_of(run.first, run.count))
            if sum(indices.nbytes for indices, _ in found) <= REMEMBERED_SHARE * bits.nbytes:
                return [(run, indices, after) for indices, after in found]
            return [(run, None, None)]
        if encoding == "dense" and len(payload) == bits.nbytes:
            bits[:] = np.frombuffer(payload, bits.dtype)
        elif encoding in ("zstd", "moves"):
            planes, rest = coding.unpack(payload, run.itemsize, len(bits))
            coding.end(rest)
            values = coding.join(planes, bits.dtype, len(bits))
            bits[:] = values if encoding == "zstd" else bits + coding.unzigzag(values)
        else:
            raise WeightsError(f"{len(payload)} bytes of encoding {encoding!r} for {bits.nbytes} bytes of tensors")
        return [(run, None, None)]

    def _small_of(self, first: int, count: int) -> SmallElements:
        return self._small.setdefault((first, count), SmallElements())


def payload_digest(payload: Bytes) -> str:
    """xxh3-128 of a delta's payload, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(payload)


def check_payload(delta: Delta, payload: Bytes) -> None:
    """Raise WeightsError unless these are the bytes that the delta describes."""
    if len(payload) != delta.nbytes or payload_digest(payload) != delta.payload_digest:
        raise WeightsError(f"delta of version {delta.version}: {len(payload)} bytes with a wrong digest")


def runs(specs: Sequence[TensorSpec]) -> Iterator[Run]:
    """All tensors of a version in runs of one type and about RUN_BYTES; a larger tensor is a run of its own."""
    first = 0
    while first < len(specs):
        count, size = 1, nbytes(specs[first])
        for spec in specs[first + 1 :]:
            if spec.dtype != specs[first].dtype or size + nbytes(spec) > RUN_BYTES:
                break
            count, size = count + 1, size + nbytes(spec)
        yield _run(specs, first, count)
        first += count


def _run(specs: Sequence[TensorSpec], first: int, count: int) -> Run:
    last = specs[first + count - 1]
    return Run(first, count, specs[first].offset, last.offset + nbytes(last), item_bytes(last))


def _joined(run: Run, specs: Sequence[TensorSpec], changed: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Indices within the run from those within its tensors; None if those of any tensor are too many to be known."""
    found = [np.zeros(0, np.int64)]
    for n in _tensors(run):
        indices = changed[n]
        if indices is None:
            return None
        found.append(indices + (specs[n].offset - run.start) // run.itemsize)
    return np.concatenate(found)


def _is_sparse(run: Run, specs: Sequence[TensorSpec], indices: np.ndarray) -> bool:
    """Whether no tensor of the run has more changed elements than a delta is surely the smallest for."""
    ends = [(specs[n].offset + nbytes(specs[n]) - run.start) // run.itemsize for n in _tensors(run)]
    counts = np.diff(np.searchsorted(indices, ends), prepend=0)
    sizes = np.diff(ends, prepend=0)
    return bool((counts <= SURELY_SMALLEST * sizes).all())


def _tensors(run: Run) -> range:
    return range(run.first, run.first + run.count)


def _parts(delta: Delta, payload: memoryview, specs: Sequence[TensorSpec]) -> Iterator[tuple[Run, str, memoryview]]:
    """(run of tensors, encoding, its bytes). Raises WeightsError unless the parts cover all tensors and all bytes."""
    first, where = 0, 0
    for part in delta.parts:
        chosen = specs[first : first + part.tensors]
        if part.tensors < 1 or len(chosen) < part.tensors or len({spec.dtype for spec in chosen}) > 1:
            raise WeightsError(f"delta of version {delta.version}: a part of {part.tensors} tensors at tensor {first}")
        if not 0 <= part.nbytes <= len(payload) - where:
            raise WeightsError(f"delta of version {delta.version}: a part of {part.nbytes} bytes at byte {where}")
        yield _run(specs, first, part.tensors), part.encoding, payload[where : where + part.nbytes]
        first, where = first + part.tensors, where + part.nbytes
    if (first, where) != (len(specs), len(payload)):
        raise WeightsError(
            f"delta of version {delta.version}: parts up to tensor {first} of {len(specs)}, byte {where}"
        )
