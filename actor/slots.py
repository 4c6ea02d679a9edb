"""The two files in which a node keeps the weights of a run, one version each. Used by `staging.py`, which guards them.

A slot is one safetensors file, allocated once and then overwritten in place. Knows no socket and no lock.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from protocol.deltas import Changes
from protocol.errors import WeightsError
from protocol.messages import Manifest
from protocol.rundir import replace_file
from protocol.tensors import safetensors_header
from protocol.weights import check_data

SLOTS = 2


class Held(msgspec.Struct, frozen=True):
    """What a slot holds, whole and checked."""

    version: int
    digest: str
    """Of the version's manifest."""


class Slots:
    """The slots of a directory, and the record of what they hold.

    A slot that is being written is not in the record: whatever happens meanwhile, nobody takes it for a version.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._record = directory / "slots.json"
        self._mapped: dict[int, tuple[int, int, memoryview]] = {}
        """Slot -> (inode, bytes, the file in memory)."""

    def path(self, slot: int) -> Path:
        return self.directory / f"slot-{slot}.safetensors"

    def held(self) -> dict[int, Held]:
        """Slot -> what it holds; empty if there is no record, or one that cannot be read."""
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=dict[int, Held])
        except (OSError, msgspec.MsgspecError):
            return {}

    def forget(self, *slots: int) -> None:
        """Take slots out of the record."""
        self._write({slot: held for slot, held in self.held().items() if slot not in slots})

    def record(self, slot: int, manifest: Manifest) -> None:
        """Say that a slot holds this version."""
        self._write(self.held() | {slot: Held(manifest.version, manifest.digest)})

    def _write(self, held: dict[int, Held]) -> None:
        replace_file(self._record, msgspec.json.encode(held), mode=0o600)

    def newest(self) -> tuple[int, Held] | None:
        """(slot, what it holds) of the newest version."""
        return max(self.held().items(), key=lambda item: item[1].version, default=None)

    def oldest(self) -> int:
        """The slot to be overwritten: one that holds nothing, else the older version."""
        held = self.held()
        return min(range(SLOTS), key=lambda slot: held[slot].version if slot in held else 0)

    def allocate(self, slot: int, manifest: Manifest) -> SlotFile:
        """The slot's file with the manifest's header and room for its tensors. Raises OSError where there is none."""
        head, path = safetensors_header(manifest.tensors), self.path(slot)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            size = len(head) + manifest.total_bytes
            if os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, 0)
                os.posix_fallocate(descriptor, 0, size)  # a hole that cannot be filled would kill whoever maps the file
            os.pwrite(descriptor, head, 0)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return SlotFile(path, manifest, self._map(slot)[len(head) :])

    def open(self, slot: int, manifest: Manifest) -> SlotFile:
        """A slot's file that is there already. Raises WeightsError if its tensors are not the manifest's."""
        head, path = safetensors_header(manifest.tensors), self.path(slot)
        try:
            mapped = self._map(slot) if path.stat().st_size else memoryview(b"")  # nothing can be mapped of nothing
        except OSError as error:
            raise WeightsError(f"{path}: {error}") from error
        if len(mapped) != len(head) + manifest.total_bytes or mapped[: len(head)] != head:
            raise WeightsError(f"{path}: its tensors are not those of version {manifest.version}")
        return SlotFile(path, manifest, mapped[len(head) :])

    def _map(self, slot: int) -> memoryview:
        """The slot's file in memory. It stays mapped: finding every page again would cost more than a delta."""
        with open(self.path(slot), "r+b") as file:
            status = os.fstat(file.fileno())
            found = self._mapped.get(slot)
            if found is None or found[:2] != (status.st_ino, status.st_size):
                found = status.st_ino, status.st_size, memoryview(mmap.mmap(file.fileno(), 0))
                self._mapped[slot] = found
        return found[2]


@dataclass(frozen=True)
class SlotFile:
    """A safetensors file of a version's size."""

    path: Path
    manifest: Manifest
    data: memoryview
    """Its tensors' bytes, mapped for writing."""

    def check(self) -> None:
        """Compare the digests of what really lies in the file. Raises WeightsError naming the first wrong tensor."""
        check_data(self.manifest, self.data)


def copy(source: SlotFile, target: SlotFile, changes: Changes | None) -> None:
    """Make the target's tensors the source's; `changes`: all that made them of the target's, one after the other, None:
    unknown. The bits that they name are written as they are; the source need not be looked up for them."""
    if changes is None:
        np.copyto(np.frombuffer(target.data, np.uint8), np.frombuffer(source.data, np.uint8))
        return
    for run, indices, after in changes:
        if indices is None:
            run.bits(target.data)[:] = run.bits(source.data)
        else:
            run.bits(target.data)[indices] = after
