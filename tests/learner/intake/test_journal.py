"""The journal: what was appended is read back, a torn tail is cut off, damage before the end is an error."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from learner.intake import journal as journal_module
from learner.intake.journal import (
    Journal,
    JournalError,
    read_failed,
    read_groups,
    read_groups_with_offsets,
    read_steps,
)
from protocol import codec
from protocol.messages import Completion, Group, TicketId


def group(index: int, epoch: int = 0) -> Group:
    tokens = index % 3 + 1
    completion = Completion(tokens, ((1, 0),), "stop", {"reward": index / 4}, "text")
    return Group(
        id=TicketId(epoch, index), kind="train" if epoch == 0 else "eval", attempt=1, actor="a", prompt_ids=(1, index),
        temperature=0.7, completions=(completion,), token_ids=bytes(range(4 * tokens)), logprobs=bytes(4 * tokens),
        mask=b"\1" * tokens,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal" / "groups.journal"


def write(path: Path, *groups: Group) -> list[int]:
    """Append groups; offsets of their records and of the end."""
    log = Journal(path)
    offsets = [log.append_group(one) for one in groups]
    offsets.append(log.end)
    log.close()
    return offsets


def test_journal_gives_back_groups_and_steps_as_they_were(path: Path) -> None:
    log = Journal(path)
    log.append_group(group(0))
    log.append_group(group(1))
    log.append_step(1, 2, [(0, 0), (0, 1)])
    log.append_group(group(2))
    log.append_step(2, 3, [(0, 2)])
    log.close()
    assert list(read_groups(path)) == [group(0), group(1), group(2)]
    assert list(read_steps(path)) == [
        {"step": 1, "version": 2, "ids": [[0, 0], [0, 1]]},
        {"step": 2, "version": 3, "ids": [[0, 2]]},
    ]


def test_journal_says_how_far_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = write(path, group(0), group(1), group(2))
    monkeypatch.setattr("learner.intake.journal.PROGRESS_EVERY_S", -1.0)
    told: list[tuple[int, int]] = []
    Journal(path, progress=lambda *read: told.append(read)).close()
    assert told == [(end, offsets[-1]) for end in offsets[1:]]


def test_journal_that_does_not_exist_is_empty(path: Path) -> None:
    assert list(read_groups(path)) == list(read_steps(path)) == []


def test_group_is_on_disk_when_append_returns(path: Path) -> None:
    log = Journal(path)
    log.append_group(group(0))
    assert list(read_groups(path)) == [group(0)], "read by another descriptor, before any close"
    log.close()


@pytest.mark.parametrize("fsync", [False, True])
def test_journal_syncs_what_is_committed_if_the_recipe_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(journal_module.os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    log = Journal(path, fsync=fsync)
    ends = []
    for index in range(2):
        log.append_group(group(index))
        assert len(sizes) == index * fsync, "groups are committed together"
        log.commit()
        ends.append(log.end)
    for append in (lambda: log.append_step(1, 1, [(0, 0)]), lambda: log.append_failed((0, 2), "no")):
        append()
        ends.append(log.end)
    assert sizes == (ends if fsync else []), "synced after it was written"
    log.close()


def test_group_is_kept_as_it_came(path: Path) -> None:
    """A newer actor's fields, too, which this learner does not know."""
    head, *buffers = codec.encode(group(0))
    fields = {**msgspec.msgpack.decode(bytes(head)[codec.PREAMBLE_BYTES :]), "later": "addition"}
    frames = [bytes(head)[: codec.PREAMBLE_BYTES] + msgspec.msgpack.encode(fields), *buffers]
    log = Journal(path)
    log.append_group(codec.decode_from_actor(frames), frames)
    log.close()
    assert list(read_groups(path)) == [group(0)]
    assert b"addition" in path.read_bytes()


@pytest.mark.parametrize("at_once", [1, 20, 21, 40, 90])
def test_record_is_whole_though_the_disk_takes_a_part_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    write_some = os.write
    monkeypatch.setattr(
        journal_module.os, "writev", lambda descriptor, parts: write_some(descriptor, b"".join(parts)[:at_once])
    )
    monkeypatch.setattr(journal_module.os, "write", lambda descriptor, data: write_some(descriptor, data[:at_once]))
    log = Journal(path)
    offsets = [log.append_group(group(index)) for index in range(2)]
    assert log.end == path.stat().st_size
    log.close()
    assert [offset for offset, _ in read_groups_with_offsets(path)] == offsets
    assert list(read_groups(path)) == [group(0), group(1)]


def test_journal_is_continued_not_overwritten(path: Path) -> None:
    _, end = write(path, group(0))
    start, _ = write(path, group(1))
    assert start == end
    assert list(read_groups(path)) == [group(0), group(1)]


def test_replay_starts_at_an_offset(path: Path) -> None:
    groups = [group(index) for index in range(4)]
    offsets = write(path, *groups)
    for position, offset in enumerate(offsets):
        assert list(read_groups(path, offset)) == groups[position:]


def test_replay_gives_the_first_of_each_ticket(path: Path) -> None:
    again = msgspec.structs.replace(group(0), attempt=2)
    write(path, group(0), group(1), again, group(1, epoch=-1))
    assert list(read_groups(path)) == [group(0), group(1), group(1, epoch=-1)]


def test_torn_tail_is_cut_at_every_byte_of_the_last_record(path: Path, tmp_path: Path) -> None:
    _, start, end = write(path, group(0), group(1))
    whole = path.read_bytes()
    assert len(whole) == end
    for cut in range(start, end):
        torn = tmp_path / "torn.journal"
        torn.write_bytes(whole[:cut])
        assert list(read_groups(torn)) == [group(0)], "readable as it is"
        log = Journal(torn)
        assert log.end == start
        assert log.append_group(group(2)) == start
        log.close()
        assert list(read_groups(torn)) == [group(0), group(2)]
        assert torn.read_bytes()[:start] == whole[:start]


def test_damaged_byte_before_the_last_record_is_an_error_wherever_it_is(path: Path, tmp_path: Path) -> None:
    _, start, _ = write(path, group(0), group(1))
    whole = path.read_bytes()
    for position in range(start):
        for mask in (0x01, 0x80):
            damaged = tmp_path / "damaged.journal"
            data = bytearray(whole)
            data[position] ^= mask
            damaged.write_bytes(data)
            with pytest.raises(JournalError, match=r"damaged\.journal: (damaged between bytes|no record at byte 0)"):
                list(read_groups(damaged))
            with pytest.raises(JournalError):
                Journal(damaged)
            assert damaged.read_bytes() == data, "nothing was cut away"


def test_damaged_last_record_is_a_torn_tail(path: Path) -> None:
    """After a power loss the last bytes may be anything, also with a record that is there in full length."""
    _, start, end = write(path, group(0), group(1))
    whole = path.read_bytes()
    for position in range(start, end):
        data = bytearray(whole)
        data[position] ^= 0x10
        path.write_bytes(data)
        assert list(read_groups(path)) == [group(0)]


@pytest.mark.parametrize("records", [0, 2])
def test_zeros_that_were_never_written_over_are_a_torn_tail(path: Path, records: int) -> None:
    end = write(path, *(group(index) for index in range(records)))[-1]
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert list(read_groups(path)) == [group(index) for index in range(records)]
    log = Journal(path)
    assert log.end == end
    log.close()


def test_failures_are_read_back_and_are_no_groups(path: Path) -> None:
    log = Journal(path)
    log.append_failed((0, 7), "the grader is on fire")
    offset = log.append_group(group(1))
    log.append_failed((0, 8), "so is this one")
    log.close()
    assert list(read_failed(path)) == [(TicketId(0, 7), "the grader is on fire"), (TicketId(0, 8), "so is this one")]
    assert list(read_failed(path, offset)) == [(TicketId(0, 8), "so is this one")]
    assert list(read_groups_with_offsets(path)) == [(offset, group(1))]


def test_journal_that_ends_before_a_checkpoint_is_refused(path: Path) -> None:
    end = write(path, group(0))[-1]
    with pytest.raises(JournalError, match=rf"ends at byte {end}, but a checkpoint reads it from byte {end + 1} on"):
        list(read_groups(path, end + 1))
    assert list(read_groups(path, end)) == []


def test_file_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"%PDF-1.7 this is no journal at all")
    with pytest.raises(JournalError, match="no record at byte 0"):
        Journal(path)
