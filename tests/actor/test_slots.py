"""The two slots of a node: what the record says of them, their files, and how one is made the other's equal."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actor.slots import Held, SlotFile, Slots, copy
from protocol.deltas import Changes, runs
from protocol.errors import WeightsError
from protocol.tensors import safetensors_header
from protocol.weights import Snapshot, layout, make_snapshot

SPECS = layout([("w", "bfloat16", (6, 10)), ("b", "float32", (7,)), ("flags", "bool", (3,))])
SIZE = 6 * 10 * 2 + 7 * 4 + 3
HEAD = len(safetensors_header(SPECS))


def version(number: int) -> Snapshot:
    data = np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8)
    return make_snapshot(number, number, SPECS, data.data)


def filled(slots: Slots, slot: int, snapshot: Snapshot) -> SlotFile:
    file = slots.allocate(slot, snapshot.manifest)
    file.data[:] = snapshot.data
    return file


def data_of(file: SlotFile) -> bytes:
    return bytes(file.data)


# --- the record ---


def test_record_names_what_is_held_across_processes(tmp_path: Path) -> None:
    first, second = version(1).manifest, version(2).manifest
    slots = Slots(tmp_path)
    assert (slots.held(), slots.newest(), slots.oldest()) == ({}, None, 0)
    slots.record(0, first)
    assert (slots.newest(), slots.oldest()) == ((0, Held(1, first.digest)), 1)
    slots.record(1, second)
    assert (slots.newest(), slots.oldest()) == ((1, Held(2, second.digest)), 0)
    assert Slots(tmp_path).held() == {0: Held(1, first.digest), 1: Held(2, second.digest)}
    slots.record(0, version(3).manifest)
    assert (slots.newest(), slots.oldest()) == ((0, Held(3, version(3).manifest.digest)), 1)
    assert stat.S_IMODE((tmp_path / "slots.json").stat().st_mode) == 0o600


def test_forgotten_slot_is_the_next_to_be_written(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    slots.record(0, version(1).manifest)
    slots.record(1, version(2).manifest)
    slots.forget(1)
    assert (slots.held(), slots.oldest()) == ({0: Held(1, version(1).manifest.digest)}, 1)
    slots.forget(0, 1)
    assert (slots.held(), slots.oldest()) == ({}, 0)


@pytest.mark.parametrize(
    "text", [b"", b'{"0": {"version": 1', b'{"0": {"version": "one", "digest": "d"}}', b"[]", b"\xff\xfe", None]
)
def test_unreadable_record_is_as_good_as_none(tmp_path: Path, text: bytes | None) -> None:
    slots = Slots(tmp_path)
    if text is None:
        (tmp_path / "slots.json").mkdir()
    else:
        (tmp_path / "slots.json").write_bytes(text)
    assert (slots.held(), slots.newest(), slots.oldest()) == ({}, None, 0)


# --- files ---


def test_allocated_file_has_its_header_and_all_its_room(tmp_path: Path) -> None:
    slots, manifest = Slots(tmp_path), version(1).manifest
    file = slots.allocate(1, manifest)
    status = file.path.stat()
    assert file.path == tmp_path / "slot-1.safetensors"
    assert file.path.read_bytes() == safetensors_header(SPECS) + bytes(SIZE)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= status.st_size, "no hole"
    assert (len(file.data), file.manifest) == (SIZE, manifest)


def test_allocated_file_of_the_right_size_is_kept_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, first = Slots(tmp_path), version(1)
    file = filled(slots, 0, first)
    with open(file.path, "r+b") as opened:
        opened.write(b"x" * HEAD)
    monkeypatch.delattr(os, "posix_fallocate")
    again = slots.allocate(0, version(2).manifest)
    assert again.path.read_bytes() == safetensors_header(SPECS) + bytes(first.data), "header anew, tensors as they were"


@pytest.mark.parametrize("size", [1, 10_000])
def test_allocated_file_of_another_size_is_made_anew(tmp_path: Path, size: int) -> None:
    (tmp_path / "slot-0.safetensors").write_bytes(b"x" * size)
    file = Slots(tmp_path).allocate(0, version(1).manifest)
    assert file.path.read_bytes() == safetensors_header(SPECS) + bytes(SIZE)


@pytest.mark.parametrize("function", ["posix_fallocate", "pwrite"])
def test_file_that_finds_no_room_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, no_room)
    with pytest.raises(OSError, match="No space left"):
        Slots(tmp_path).allocate(0, version(1).manifest)
    assert list(tmp_path.iterdir()) == []


def test_open_takes_only_a_file_with_the_manifests_tensors(tmp_path: Path) -> None:
    slots, first = Slots(tmp_path), version(1)
    path = filled(slots, 0, first).path
    assert data_of(slots.open(0, first.manifest)) == bytes(first.data)
    other = make_snapshot(2, 2, layout([("v", "uint8", (SIZE,))]), first.data)
    with pytest.raises(WeightsError, match=r"slot-0\.safetensors: its tensors are not those of version 2"):
        slots.open(0, other.manifest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="its tensors are not those of version 1"):
        slots.open(0, first.manifest)
    with pytest.raises(WeightsError, match=r"slot-1\.safetensors: .*No such file"):
        slots.open(1, first.manifest)


def test_check_names_the_first_wrong_tensor(tmp_path: Path) -> None:
    first = version(1)
    file = filled(Slots(tmp_path), 0, first)
    file.check()
    for byte, tensor in ((SIZE - 1, "flags"), (28, "w")):
        file.data[byte] ^= 1
        with pytest.raises(WeightsError, match=f"version 1: wrong digest of tensor {tensor}"):
            file.check()


def test_slot_stays_mapped_until_its_file_is_another_one(tmp_path: Path) -> None:
    slots, first = Slots(tmp_path), version(1)
    file = filled(slots, 0, first)
    assert slots.open(0, first.manifest).data.obj is file.data.obj
    assert slots.allocate(0, first.manifest).data.obj is file.data.obj
    content = file.path.read_bytes()
    file.path.unlink()
    file.path.write_bytes(content)
    again = slots.open(0, first.manifest)
    again.data[0] ^= 1
    assert file.path.read_bytes() != content, "what is written reaches the file that has the name now"


# --- from slot to slot ---


def changes(*elements: tuple[int, dict[int, int] | None]) -> Changes:
    """[(number of a run, its changed elements and their bits)]"""
    made: Changes = []
    for n, found in elements:
        run = list(runs(SPECS))[n]
        keys, values = list(found or ()), list((found or {}).values())
        bits = None if found is None else np.array(values, f"<u{run.itemsize}")
        made.append((run, None if found is None else np.array(keys, np.int64), bits))
    return made


def test_copy_makes_the_target_the_sources_equal(tmp_path: Path) -> None:
    slots, first, second = Slots(tmp_path), version(1), version(2)
    source, target = filled(slots, 0, first), filled(slots, 1, second)
    copy(source, target, None)
    assert (data_of(source), data_of(target)) == (bytes(first.data), bytes(first.data))


def test_copy_of_what_changed_touches_nothing_else(tmp_path: Path) -> None:
    """Elements 2 and 5 of the float32 run, 2 twice, none of bfloat16, all of the last one."""
    assert [(run.start, run.stop, run.itemsize) for run in runs(SPECS)] == [(0, 28, 4), (28, 148, 2), (148, 151, 1)]
    slots, first, second = Slots(tmp_path), version(1), version(2)
    source, target = filled(slots, 0, first), filled(slots, 1, second)
    expected = bytearray(second.data)
    expected[8:12], expected[20:24] = (0x01020304).to_bytes(4, "little"), (7).to_bytes(4, "little")
    expected[148:151] = first.data[148:151]
    copy(source, target, changes((0, {2: 5, 5: 7}), (1, {}), (2, None), (0, {2: 0x01020304})))
    assert data_of(target) == bytes(expected), "the bits that are named, the later ones last"
    assert data_of(source) == bytes(first.data)
    copy(source, target, [])
    assert data_of(target) == bytes(expected)
