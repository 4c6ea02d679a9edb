"""Append-only log of accepted groups: an acknowledgement follows the write, a resumed run reads it back.

One file of records. Record: b"TJ", kind (one byte), payload length (uint32), xxh3-64 of the payload (uint64), xxh32 of
these four (uint32), payload; all little-endian. The head has a digest of its own since a damaged length would make the
rest of the file look like a torn tail. A torn tail (the process died in mid-write) is cut off when the journal is
opened; a damaged record before the end is an error. Knows no socket; `server.py` writes, the learner's loop reads on
resume.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import xxhash

from protocol import codec
from protocol.messages import Group

log = logging.getLogger(__name__)

MAGIC = b"TJ"
HEAD = struct.Struct("<2sBIQ")
HEAD_DIGEST = struct.Struct("<I")
KINDS: dict[int, Literal["group", "step"]] = {1: "group", 2: "step"}


class JournalError(ValueError):
    """The journal is damaged before its end."""


class Journal:
    """The open journal of a run. One writer."""

    def __init__(self, path: Path, fsync: bool = False) -> None:
        """Open or create; cuts a torn tail. Raises JournalError if the file is damaged before its end."""
        self.path = path
        self.fsync = fsync
        path.parent.mkdir(parents=True, exist_ok=True)
        end = _sound_end(path) if path.exists() else 0
        self._file = open(path, "ab")  # noqa: SIM115 - open for the life of the run
        if self._file.tell() > end:
            log.warning("journal %s: cut a torn record of %d bytes at its end", path, self._file.tell() - end)
            self._file.truncate(end)
            self._file.seek(end)

    def append_group(self, group: Group) -> int:
        """Write a group; returns the offset of its record. When this returns, the group survives the process."""
        return self._append(1, codec.join_frames(codec.encode(group)))

    def append_step(self, step: int, version: int, ids: list[tuple[int, int]]) -> int:
        """Write the composition of a batch that became step `step`, published as `version`."""
        return self._append(2, json.dumps({"step": step, "version": version, "ids": ids}).encode())

    def _append(self, kind: int, payload: bytes) -> int:
        offset = self._file.tell()
        head = HEAD.pack(MAGIC, kind, len(payload), xxhash.xxh3_64_intdigest(payload))
        self._file.write(head + HEAD_DIGEST.pack(xxhash.xxh32_intdigest(head)) + payload)
        self._file.flush()
        if self.fsync:
            os.fsync(self._file.fileno())
        return offset

    @property
    def end(self) -> int:
        """Offset of the next record."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _records(path: Path, start: int) -> Iterator[tuple[int, int, bytes]]:
    """(offset after the record, kind, payload) from `start` on; stops before a torn tail. Raises JournalError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(start)
        offset = start
        while offset < size:
            head, head_digest = file.read(HEAD.size), file.read(HEAD_DIGEST.size)
            if len(head_digest) < HEAD_DIGEST.size:
                return
            magic, kind, length, digest = HEAD.unpack(head)
            sound = HEAD_DIGEST.unpack(head_digest) == (xxhash.xxh32_intdigest(head),)
            if not sound or magic != MAGIC or kind not in KINDS:
                raise JournalError(f"journal {path}: no record at byte {offset}")
            payload = file.read(length)
            if len(payload) < length:
                return
            offset += HEAD.size + HEAD_DIGEST.size + length
            if xxhash.xxh3_64_intdigest(payload) != digest:
                if offset == size:
                    return
                raise JournalError(f"journal {path}: damaged record before byte {offset}")
            yield offset, kind, payload


def _sound_end(path: Path) -> int:
    end = 0
    for end, _, _ in _records(path, 0):  # noqa: B007 - the last offset is what counts
        pass
    return end


def read_groups(path: Path, start: int = 0) -> Iterator[Group]:
    """Groups journaled from byte `start` on, the first of each ticket only. Raises JournalError if damaged."""
    seen = set()
    for _, kind, payload in _records(path, start) if path.exists() else ():
        if KINDS[kind] == "group":
            group = codec.decode_from_actor(codec.split_frames(payload))
            if group.id not in seen:
                seen.add(group.id)
                yield group


def read_steps(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Batch compositions {"step", "version", "ids"} journaled from byte `start` on."""
    for _, kind, payload in _records(path, start) if path.exists() else ():
        if KINDS[kind] == "step":
            yield json.loads(payload)
