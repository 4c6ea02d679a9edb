"""Manifest, digests and chunks of a version of the weights. Pure functions over byte buffers; no torch, no socket.

A version travels as one flat buffer: every tensor's bytes one after the other, in the manifest's order. `base` and
`sent_bytes` in the manifest leave room for deltas; today every version is a snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import xxhash

from protocol.errors import WeightsError
from protocol.messages import Manifest, TensorSpec
from protocol.tensors import nbytes


@dataclass(frozen=True)
class Snapshot:
    """An immutable version: its manifest and its bytes."""

    manifest: Manifest
    data: memoryview

    def chunk(self, offset: int, length: int) -> memoryview | None:
        """Bytes [offset, offset + length) without a copy; None if the range lies outside."""
        if offset < 0 or length <= 0 or offset + length > len(self.data):
            return None
        return self.data[offset : offset + length]


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    """Specs with offsets for (name, dtype, shape) in order; digests still empty."""
    specs, offset = [], 0
    for name, dtype, shape in tensors:
        spec = TensorSpec(name, dtype, shape, offset)
        specs.append(spec)
        offset += nbytes(spec)
    return tuple(specs)


def tensor_digest(data: bytes | memoryview) -> str:
    """xxh3-128 of a tensor's bytes, hexadecimal. Detects corruption and mix-ups; it is no signature."""
    return xxhash.xxh3_128_hexdigest(data)


def manifest_digest(manifest: Manifest) -> str:
    """xxh3-128 over every field but the digest itself, as canonical JSON (keys sorted, no spaces)."""
    fields = msgspec.to_builtins(msgspec.structs.replace(manifest, digest=""))
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


def make_snapshot(
    version: int, step: int, specs: tuple[TensorSpec, ...], data: memoryview, branch: int = 0
) -> Snapshot:
    """Digest every tensor of a flat buffer laid out by `layout` and wrap it up. Takes about 0.1 s a gigabyte."""
    digested = tuple(
        msgspec.structs.replace(spec, digest=tensor_digest(data[spec.offset : spec.offset + nbytes(spec)]))
        for spec in specs
    )
    manifest = Manifest(
        version=version,
        step=step,
        branch=branch,
        tensors=digested,
        total_bytes=len(data),
        sent_bytes=len(data),
        digest="",
    )
    return Snapshot(msgspec.structs.replace(manifest, digest=manifest_digest(manifest)), data)


def check_manifest(manifest: Manifest) -> None:
    """Raise WeightsError unless the digest fits, offsets have no gaps and the sizes add up."""
    if manifest.digest != manifest_digest(manifest):
        raise WeightsError(f"manifest of version {manifest.version}: its digest does not fit its fields")
    offset = 0
    for spec in manifest.tensors:
        if spec.offset != offset:
            raise WeightsError(f"manifest of version {manifest.version}: {spec.name} at {spec.offset}, not {offset}")
        offset += nbytes(spec)
    if offset != manifest.total_bytes:
        raise WeightsError(f"manifest of version {manifest.version}: {offset} bytes, not {manifest.total_bytes}")


def check_data(manifest: Manifest, data: memoryview) -> None:
    """Raise WeightsError naming the first tensor whose bytes do not have the manifest's digest."""
    if len(data) != manifest.total_bytes:
        raise WeightsError(f"version {manifest.version}: {len(data)} bytes, expected {manifest.total_bytes}")
    for spec in manifest.tensors:
        if tensor_digest(data[spec.offset : spec.offset + nbytes(spec)]) != spec.digest:
            raise WeightsError(f"version {manifest.version}: wrong digest of tensor {spec.name}")


def chunk_ranges(total_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the chunks of a version, in order."""
    for offset in range(0, total_bytes, chunk_bytes):
        yield offset, min(chunk_bytes, total_bytes - offset)
