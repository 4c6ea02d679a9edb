"""Append-only log of accepted groups: an acknowledgement follows the write, a resumed run reads it back.

One file of records. Record: b"TJ", kind (one byte), payload length (uint32), xxh3-64 of the payload (uint64), xxh32 of
these four (uint32), payload; all little-endian. The head has a digest of its own since a damaged length would make the
rest of the file look like a torn tail. A torn tail (the process died in mid-write, or the machine did and left bytes
that were never written) is cut off when the journal is opened; damage with a sound record behind it is an error. Knows
no socket; `server.py` writes, the learner's loop reads on resume. The dashboard reads beside the writer, heads alone
(`read_index`), and single groups by their places.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from protocol import codec
from protocol.messages import Group, TicketId

log = logging.getLogger(__name__)

MAGIC = b"TJ"
HEAD = struct.Struct("<2sBIQ")
HEAD_DIGEST = struct.Struct("<I")
KINDS: dict[int, Literal["group", "step", "failed", "filtered"]] = {1: "group", 2: "step", 3: "failed", 4: "filtered"}


HEAD_BYTES = HEAD.size + HEAD_DIGEST.size
PROGRESS_EVERY_S = 0.5
Progress = Callable[[int, int], None]
"""Told about twice a second how many bytes of how many are read."""


class JournalError(ValueError):
    """The journal is damaged before its end."""


class Journal:
    """The open journal of a run. One writer."""

    def __init__(self, path: Path, fsync: bool = False, progress: Progress = lambda read, size: None) -> None:
        """Open or create; cuts a torn tail. What is there is read once, which takes minutes for some hundred GB:
        `progress` is told of it. Raises JournalError if the file is damaged before its end."""
        self.path = path
        self.fsync = fsync
        path.parent.mkdir(parents=True, exist_ok=True)
        end = _sound_end(path, progress) if path.exists() else 0
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the life of the run
        if self._file.tell() > end:
            log.warning("journal %s: cut a torn record of %d bytes at its end", path, self._file.tell() - end)
            self._file.truncate(end)
        self.end = end
        """Offset of the next record."""

    def append_group(self, group: Group, frames: Sequence[codec.Frame] = ()) -> int:
        """Write a group; returns the offset of its record. When this returns, the group survives the process, after the
        next `commit` the machine, too, if that is asked for. `frames`: the group as it came, if they are at hand."""
        frames = frames or codec.encode(group)
        return self._append(1, codec.frame_lengths(frames), *frames)

    def append_step(self, step: int, version: int, ids: list[tuple[int, int]]) -> int:
        """Write, and commit, the composition of a batch that became step `step`, published as `version`."""
        offset = self._append(2, json.dumps({"step": step, "version": version, "ids": ids}).encode())
        self.commit()
        return offset

    def append_failed(self, ids: tuple[int, int], why: str) -> int:
        """Write, and commit, that a ticket has failed for good: without it, a replay would hand its place in line to
        the next."""
        offset = self._append(3, json.dumps({"id": ids, "why": why}).encode())
        self.commit()
        return offset

    def append_filtered(self, ids: tuple[int, int]) -> int:
        """Write that a ticket's group was filtered: it hung on what had arrived before, so a replay cannot tell."""
        return self._append(4, json.dumps({"id": ids}).encode())

    def commit(self) -> None:
        """Before groups are acknowledged: with `fsync`, all records so far survive the machine when this returns."""
        if self.fsync:
            self.sync()

    def sync(self) -> None:
        """All records so far survive the machine when this returns: before a checkpoint names an offset."""
        os.fsync(self._file.fileno())

    def _append(self, kind: int, *parts: codec.Frame) -> int:
        """One record, whose payload is the parts one after the other: written as they are, without a copy."""
        offset, length, digest = self.end, sum(map(len, parts)), xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        head = HEAD.pack(MAGIC, kind, length, digest.intdigest())
        head += HEAD_DIGEST.pack(xxhash.xxh32_intdigest(head))
        written = os.writev(self._file.fileno(), [head, *parts])
        if written < len(head) + length:  # a signal, or a disk that is all but full
            rest = memoryview(b"".join([head, *parts]))
            while written < len(rest):
                written += os.write(self._file.fileno(), rest[written:])
        self.end += written
        return offset

    def close(self) -> None:
        self._file.close()


def _record_at(data: bytes | mmap.mmap, offset: int) -> tuple[int, int, bytes] | None:
    """(offset after the record, kind, payload) of the record at `offset`; None if there is no sound and whole one."""
    begin = offset + HEAD_BYTES
    if (head := _parse_head(bytes(data[offset:begin]))) is None:
        return None
    kind, length, digest = head
    payload = bytes(data[begin : begin + length])
    if len(payload) < length or xxhash.xxh3_64_intdigest(payload) != digest:
        return None
    return begin + length, kind, payload


def _records(path: Path, start: int) -> Iterator[tuple[int, int, int, bytes]]:
    """(offset, offset after it, kind, payload) of every record from `start` on; stops before a torn tail.

    Raises JournalError for damage that a sound record follows, and for a file that ends before `start`."""
    size = path.stat().st_size if path.exists() else 0
    if start > size:
        raise JournalError(f"journal {path}: ends at byte {size}, but a checkpoint reads it from byte {start} on")
    if size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        offset = start
        while offset < size:
            record = _record_at(data, offset)
            if record is None:
                if offset == 0 and any(data[: len(MAGIC)]) and data[: len(MAGIC)] != MAGIC[: len(data)]:
                    raise JournalError(f"journal {path}: no record at byte 0, something else is in this file")
                later = offset
                while (later := data.find(MAGIC, later + 1)) >= 0:
                    if _record_at(data, later):
                        raise JournalError(f"journal {path}: damaged between bytes {offset} and {later}")
                return
            yield offset, *record
            offset = record[0]


def _sound_end(path: Path, progress: Progress) -> int:
    end, size, told_at = 0, path.stat().st_size, time.monotonic()
    for _, end, _, _ in _records(path, 0):
        if (now := time.monotonic()) - told_at > PROGRESS_EVERY_S:
            told_at = now
            progress(end, size)
    return end


def read_groups(path: Path, start: int = 0) -> Iterator[Group]:
    """Groups journaled from byte `start` on, the first of each ticket only. Raises JournalError if damaged."""
    return (group for _, group in read_groups_with_offsets(path, start))


def read_groups_with_offsets(path: Path, start: int = 0) -> Iterator[tuple[int, Group]]:
    """(offset of its record, group) as `read_groups`."""
    seen = set()
    for offset, _, kind, payload in _records(path, start):
        if KINDS[kind] == "group":
            group = codec.decode_from_actor(codec.split_frames(payload))
            if group.id not in seen:
                seen.add(group.id)
                yield offset, group


def read_steps(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Batch compositions {"step", "version", "ids"} journaled from byte `start` on."""
    return (json.loads(payload) for _, _, kind, payload in _records(path, start) if KINDS[kind] == "step")


def read_failed(path: Path, start: int = 0) -> Iterator[tuple[TicketId, str]]:
    """(ticket, why) of tickets that failed for good, journaled from byte `start` on."""
    for _, _, kind, payload in _records(path, start):
        if KINDS[kind] == "failed":
            row = json.loads(payload)
            yield TicketId(*row["id"]), row["why"]


def read_filtered(path: Path, start: int = 0) -> Iterator[TicketId]:
    """Tickets whose groups dynamic sampling took out, journaled from byte `start` on."""
    for _, _, kind, payload in _records(path, start):
        if KINDS[kind] == "filtered":
            yield TicketId(*json.loads(payload)["id"])


# --- beside the writer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A record without what is large in it."""

    offset: int
    end: int
    """Offset of the next record."""
    kind: Literal["group", "step", "failed", "filtered"]
    head: bytes
    """HEAD_BYTES; tells whether the same record is still there."""
    group: TicketId | None
    """Of a group."""
    step: dict[str, Any] | None
    """Of a step: {"step", "version", "ids"}."""


def read_index(path: Path, start: int = 0) -> Iterator[Entry]:
    """Records from byte `start` on, of groups their first bytes alone: the digests of their payloads are not checked.

    Ends before the first record that is not whole (yet), or damaged; nothing is raised for it. The file may grow
    meanwhile.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        while start + HEAD_BYTES <= size:
            data = os.pread(descriptor, HEAD_BYTES + codec.JOINED_ID_BYTES, start)
            head, first = data[:HEAD_BYTES], data[HEAD_BYTES:]
            if (found := _parse_head(head)) is None or (end := start + HEAD_BYTES + found[1]) > size:
                return
            kind, length = KINDS[found[0]], found[1]
            group = codec.joined_group_id(first[:length]) if kind == "group" else None
            step: dict[str, Any] | None = None
            if kind == "step" or (kind == "group" and group is None):
                payload = os.pread(descriptor, length, start + HEAD_BYTES)
                if xxhash.xxh3_64_intdigest(payload) != found[2]:
                    return
                if kind == "step":
                    step = json.loads(payload)
                else:
                    group = codec.decode_from_actor(codec.split_frames(payload)).id
            yield Entry(start, end, kind, head, group, step)
            start = end


def read_group_at(path: Path, offset: int) -> Group:
    """The group whose record begins at `offset`. Raises JournalError if there is none, or a damaged one."""
    with open(path, "rb", buffering=0) as file:
        found = _parse_head(os.pread(file.fileno(), HEAD_BYTES, offset))
        if found is not None and KINDS[found[0]] == "group":
            payload = os.pread(file.fileno(), found[1], offset + HEAD_BYTES)
            if len(payload) == found[1] and xxhash.xxh3_64_intdigest(payload) == found[2]:
                group: Group = codec.decode_from_actor(codec.split_frames(payload))
                return group
    raise JournalError(f"journal {path}: no sound group at byte {offset}")


def _parse_head(head: bytes) -> tuple[int, int, int] | None:
    """(kind, bytes of the payload, its digest) of a record's head; None if it is none."""
    if len(head) < HEAD_BYTES or HEAD_DIGEST.unpack(head[HEAD.size :]) != (xxhash.xxh32_intdigest(head[: HEAD.size]),):
        return None
    magic, kind, length, digest = HEAD.unpack(head[: HEAD.size])
    return (kind, length, digest) if magic == MAGIC and kind in KINDS else None
