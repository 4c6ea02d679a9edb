"""Manifest, digests and chunks of a version of the weights. Pure functions over byte buffers; no torch, no socket.

A snapshot is one flat buffer: every tensor's bytes one after the other, in the manifest's order. `deltas.py` makes the
difference of two of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import xxhash

from protocol.errors import WeightsError
from protocol.messages import Delta, Manifest, TensorSpec
from protocol.tensors import item_bytes, nbytes
from protocol.threads import num_threads, side_by_side

SHARED_OUT_BYTES = 1 << 20
"""A version of fewer bytes is not worth a thread."""


@dataclass(frozen=True)
class Snapshot:
    """An immutable version: its manifest and its bytes."""

    manifest: Manifest
    data: memoryview

    def chunk(self, offset: int, length: int) -> memoryview | None:
        """Bytes [offset, offset + length) without a copy; None if the range lies outside."""
        return part(self.data, offset, length)


def part(data: memoryview, offset: int, length: int) -> memoryview | None:
    """Bytes [offset, offset + length) without a copy; None if the range lies outside."""
    if offset < 0 or length <= 0 or offset + length > len(data):
        return None
    return data[offset : offset + length]


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    """Specs with offsets for (name, dtype, shape) in order, larger elements first; digests still empty.

    That order aligns every tensor to its elements, as in a safetensors file. A model in one type keeps its order.
    """
    specs, offset = [], 0
    for spec in sorted((TensorSpec(*tensor) for tensor in tensors), key=item_bytes, reverse=True):
        specs.append(msgspec.structs.replace(spec, offset=offset))
        offset += nbytes(spec)
    return tuple(specs)


def tensor_digest(data: bytes | memoryview) -> str:
    """xxh3-128 of a tensor's bytes, hexadecimal. Detects corruption and mix-ups; it is no signature."""
    return xxhash.xxh3_128_hexdigest(data)


def digests(specs: Sequence[TensorSpec], data: memoryview) -> list[str]:
    """Digest of every tensor, several at a time."""

    def one(spec: TensorSpec) -> str:
        return tensor_digest(data[spec.offset : spec.offset + nbytes(spec)])

    return side_by_side(one, specs, num_threads() if len(data) >= SHARED_OUT_BYTES else 1)


def manifest_digest(manifest: Manifest) -> str:
    """xxh3-128 over every field but the digest itself, as canonical JSON (keys sorted, no spaces)."""
    fields = msgspec.to_builtins(msgspec.structs.replace(manifest, digest=""))
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


def make_snapshot(
    version: int, step: int, specs: tuple[TensorSpec, ...], data: memoryview, branch: int = 0
) -> Snapshot:
    """Digest every tensor of a flat buffer laid out by `layout` and wrap it up. Takes about 0.1 s a gigabyte."""
    digested = tuple(
        msgspec.structs.replace(spec, digest=digest) for spec, digest in zip(specs, digests(specs, data), strict=True)
    )
    manifest = Manifest(
        version=version,
        step=step,
        branch=branch,
        tensors=digested,
        total_bytes=len(data),
        digest="",
    )
    return Snapshot(msgspec.structs.replace(manifest, digest=manifest_digest(manifest)), data)


def check_manifest(manifest: Manifest) -> None:
    """Raise WeightsError unless the digest fits, types are known, offsets have no gaps and the sizes add up."""
    if manifest.digest != manifest_digest(manifest):
        raise WeightsError(f"manifest of version {manifest.version}: its digest does not fit its fields")
    offset = 0
    for spec in manifest.tensors:
        if spec.offset != offset:
            raise WeightsError(f"manifest of version {manifest.version}: {spec.name} at {spec.offset}, not {offset}")
        if min(spec.shape, default=0) < 0:
            raise WeightsError(f"manifest of version {manifest.version}: {spec.name} of shape {spec.shape}")
        try:
            offset += nbytes(spec)
        except ValueError as error:
            raise WeightsError(f"manifest of version {manifest.version}: {error}") from error
    if offset != manifest.total_bytes:
        raise WeightsError(f"manifest of version {manifest.version}: {offset} bytes, not {manifest.total_bytes}")


def check_data(manifest: Manifest, data: memoryview) -> None:
    """Raise WeightsError naming the first tensor whose bytes do not have the manifest's digest."""
    if len(data) != manifest.total_bytes:
        raise WeightsError(f"version {manifest.version}: {len(data)} bytes, expected {manifest.total_bytes}")
    for spec, digest in zip(manifest.tensors, digests(manifest.tensors, data), strict=True):
        if digest != spec.digest:
            raise WeightsError(f"version {manifest.version}: wrong digest of tensor {spec.name}")


def check_chain(manifest: Manifest, chain: Sequence[Delta]) -> None:
    """Raise WeightsError unless each delta of a chain leads to the next one, and the last one to the manifest, and
    together they are no larger than a snapshot."""
    made = [(delta.version, delta.digest) for delta in chain]
    named = [*((delta.base, delta.base_digest) for delta in chain[1:]), (manifest.version, manifest.digest)]
    if chain and made != named:
        raise WeightsError(f"version {manifest.version}: a chain of deltas that makes {made}, expected {named}")
    sizes = [delta.nbytes for delta in chain]
    if min(sizes, default=0) < 0 or sum(sizes) > manifest.total_bytes:
        raise WeightsError(f"version {manifest.version}: deltas of {sizes} bytes, of {manifest.total_bytes}")


def chunk_ranges(total_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the chunks of a version, in order."""
    for offset in range(0, total_bytes, chunk_bytes):
        yield offset, min(chunk_bytes, total_bytes - offset)
