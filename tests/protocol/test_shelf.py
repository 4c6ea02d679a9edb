"""What can be had of the learner's weights, by which way, and that it is never more than two snapshots' memory."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import ChunkRequest, Delta, Update, UpdateRequest
from protocol.shelf import HELD_S, INLINE_BYTES, Shelf
from protocol.weights import Snapshot, check_chain
from tests.hub_harness import delta, snapshot

SIZE = 100
"""Bytes of a snapshot."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Shelved:
    """A shelf with a clock of the test's own, and versions that lead on from each other by deltas of ten bytes."""

    def __init__(self, num_versions: int, delta_bytes: int = 10) -> None:
        self.clock = Clock()
        self.shelf = Shelf(self.clock)
        self.versions: dict[int, Snapshot] = {}
        for _ in range(num_versions):
            self.put(delta_bytes)

    def put(self, delta_bytes: int | None = 10) -> tuple[Delta, bytes] | None:
        """The next version, by a delta or without one."""
        number = len(self.versions) + 1
        self.versions[number] = snapshot(number, SIZE)
        has_delta = delta_bytes is not None and number > 1
        made = delta(self.versions[number - 1], self.versions[number], delta_bytes or 0) if has_delta else None
        self.shelf.put(self.versions[number], made)
        return made

    def pull(self, version: int) -> bytes | None:
        """Some of a snapshot's bytes."""
        data = self.shelf.chunk(ChunkRequest(version, 20, 30))
        assert data is None or data == self.versions[version].data[20:50]
        return None if data is None else bytes(data)

    def pullable(self) -> list[int]:
        """Versions of which there is a snapshot; asking for what lies outside does not hold it."""
        found = [one for one in (self.shelf.latest, self.shelf._held) if one]
        return sorted(one.manifest.version for one in found)

    def ask(self, base: int = 0, digest: str | None = None) -> Update:
        """What an actor is told that has this version."""
        known = self.versions[base].manifest.digest if base and digest is None else digest or ""
        update = self.shelf.answer(UpdateRequest(base, known))
        assert update is not None
        return update

    def way(self, base: int = 0, digest: str | None = None) -> tuple[int, list[int]]:
        """(version that an actor is sent to, versions of the deltas that lead there)."""
        update = self.ask(base, digest)
        return update.manifest.version, [one.version for one in update.chain]


def test_shelf_without_a_version_has_nothing() -> None:
    shelf = Shelf(Clock())
    assert (shelf.version, shelf.latest) == (0, None)
    assert shelf.answer(UpdateRequest()) is None
    assert shelf.chunk(ChunkRequest(0, 0, 1)) is None
    assert shelf.chunk(ChunkRequest(0, 0, 1, "delta")) is None


# --- snapshots ---


def test_shelf_gives_the_newest_snapshot_and_the_one_before() -> None:
    shelved = Shelved(4)
    assert shelved.shelf.version == 4
    assert [version for version in range(6) if shelved.shelf.chunk(ChunkRequest(version, 0, 1))] == [3, 4]
    for offset, length in ((-1, 2), (0, SIZE + 1), (SIZE, 1), (5, 0)):
        assert shelved.shelf.chunk(ChunkRequest(4, offset, length)) is None


def test_shelf_keeps_a_snapshot_being_pulled_through_many_versions() -> None:
    shelved = Shelved(2)
    for number in range(3, 40):
        assert shelved.pull(2)
        shelved.put()
        assert shelved.pullable() == [2, number]
        shelved.clock.now += HELD_S - 0.01
    assert shelved.pull(2)


def test_shelf_lets_a_snapshot_go_some_time_after_the_last_request() -> None:
    shelved = Shelved(2)
    assert shelved.pull(2)
    shelved.put()
    shelved.clock.now += HELD_S
    assert shelved.pullable() == [2, 3], "with the next version, not before: until then there is no other use for it"
    shelved.put()
    assert shelved.pullable() == [3, 4]
    assert shelved.pull(2) is None


def test_shelf_keeps_the_one_before_if_nobody_pulls() -> None:
    shelved = Shelved(2)
    shelved.put()
    assert shelved.pullable() == [2, 3]
    assert shelved.pull(1) is None


def test_shelf_lets_the_one_before_go_while_an_older_one_is_pulled() -> None:
    shelved = Shelved(2)
    assert shelved.pull(1)
    assert shelved.pull(2)
    shelved.put()
    assert shelved.pullable() == [1, 3]


def test_shelf_forgets_requests_for_what_it_let_go() -> None:
    shelved = Shelved(2)
    for _ in range(50):
        assert shelved.pull(len(shelved.versions))
        shelved.put()
        shelved.clock.now += HELD_S
    assert len(shelved.shelf._asked) <= 2


def test_shelf_sends_newcomers_to_the_snapshot_being_pulled_and_on_from_there() -> None:
    shelved = Shelved(2)
    assert shelved.way() == (2, []), "nobody pulls the older one"
    assert shelved.pull(2)
    shelved.put()
    shelved.put()
    assert shelved.way() == (2, [])
    assert shelved.way(2) == (4, [3, 4])
    shelved.clock.now += HELD_S
    assert shelved.way() == (4, []), "its pull has ended"
    assert shelved.pull(2)
    assert shelved.way() == (2, []), "it went on after all"
    shelved.put(None)
    assert shelved.pullable() == [2, 5]
    assert shelved.way() == (5, []), "no delta leads on from the older one"


# --- deltas ---


def test_shelf_answers_with_the_chain_from_any_base_that_deltas_reach_back_to() -> None:
    shelved = Shelved(6)
    for base in range(1, 6):
        update = shelved.ask(base)
        assert update.manifest == shelved.versions[6].manifest
        assert [(one.base, one.version) for one in update.chain] == list(pairwise(range(base, 7)))
        assert update.chain[0].base_digest == shelved.versions[base].manifest.digest
        assert update.payload == b"".join(
            delta(*pair, 10)[1] for pair in pairwise(list(shelved.versions.values())[base - 1 :])
        )
        check_chain(update.manifest, update.chain)
    assert shelved.ask(6) == Update(shelved.versions[6].manifest), "it is the newest already"


@pytest.mark.parametrize(
    ("base", "digest"),
    [(0, ""), (3, ""), (3, "0" * 32), (3, "of 4"), (6, "of 5"), (7, "0" * 32), (-1, ""), (2**60, "of 3")],
)
def test_shelf_sends_who_has_something_else_to_a_snapshot(base: int, digest: str) -> None:
    shelved = Shelved(6)
    if digest.startswith("of "):
        digest = shelved.versions[int(digest[3:])].manifest.digest
    assert shelved.way(base, digest) == (6, [])


def test_shelf_knows_the_newest_by_its_digest_alone() -> None:
    shelved = Shelved(3)
    assert shelved.ask(1, shelved.versions[3].manifest.digest) == Update(shelved.versions[3].manifest)


def test_shelf_keeps_deltas_of_one_snapshot_in_all() -> None:
    """A longer chain is larger than the snapshot; the oldest go first."""
    shelved = Shelved(11, delta_bytes=SIZE // 10)
    assert shelved.way(1) == (11, list(range(2, 12))), "exactly a snapshot's bytes"
    shelved.put(1)
    assert shelved.way(1) == (12, [])
    assert shelved.way(2) == (12, list(range(3, 13)))
    shelved.put(SIZE - 21)
    assert shelved.way(8) == (13, [])
    assert shelved.way(9) == (13, [10, 11, 12, 13])
    shelved.put(SIZE + 1)
    assert [shelved.way(base) for base in range(1, 14)] == [(14, [])] * 13, "one that is larger by itself is not kept"
    assert shelved.shelf.news() == Update(shelved.versions[14].manifest)
    shelved.put(SIZE)
    assert shelved.way(14) == (15, [15])


def test_shelf_gives_the_payloads_of_its_deltas_in_pieces() -> None:
    shelved = Shelved(3)
    payload = delta(shelved.versions[2], shelved.versions[3])[1]
    assert shelved.shelf.chunk(ChunkRequest(3, 2, 5, "delta")) == payload[2:7]
    assert shelved.shelf.chunk(ChunkRequest(3, 0, 10, "delta")) == payload
    for version, offset, length in ((3, 0, 11), (3, -1, 2), (3, 10, 1), (3, 0, 0), (1, 0, 1), (4, 0, 1)):
        assert shelved.shelf.chunk(ChunkRequest(version, offset, length, "delta")) is None
    shelved.put(SIZE - 10)
    assert shelved.shelf.chunk(ChunkRequest(2, 0, 1, "delta")) is None, "out of the window"
    assert shelved.shelf.chunk(ChunkRequest(3, 0, 1, "delta")) == payload[:1]


def test_shelf_does_not_hold_a_snapshot_for_those_who_pull_its_delta() -> None:
    shelved = Shelved(2)
    shelved.shelf.chunk(ChunkRequest(2, 0, 5, "delta"))
    shelved.put()
    shelved.put()
    assert shelved.pullable() == [3, 4]


def test_shelf_forgets_all_deltas_at_one_that_does_not_lead_on() -> None:
    shelved = Shelved(4)
    stray = delta(shelved.versions[2], snapshot(5, SIZE))
    shelved.versions[5] = snapshot(5, SIZE)
    shelved.shelf.put(shelved.versions[5], stray)
    assert [shelved.way(base) for base in (1, 3, 4)] == [(5, [])] * 3
    assert shelved.way(2) == (5, [5]), "whoever has its base can use it all the same"
    shelved.put()
    assert shelved.way(5) == (6, [6])


@pytest.mark.parametrize("first", [True, False])
def test_shelf_forgets_all_deltas_at_a_version_without_one(first: bool) -> None:
    shelved = Shelved(0 if first else 4)
    if first:  # its base was a killed learner's
        shelved.versions |= {1: snapshot(1, SIZE), 2: snapshot(2, SIZE)}
        shelved.shelf.put(shelved.versions[2], delta(shelved.versions[1], shelved.versions[2]))
    else:
        shelved.put(None)
    newest = shelved.shelf.version
    assert [shelved.way(base) for base in range(1, newest)] == [(newest, [])] * (newest - 1)
    assert shelved.shelf.news() == Update(shelved.versions[newest].manifest)
    shelved.put()
    assert shelved.way(newest) == (newest + 1, [newest + 1])


# --- what travels inside ---


def test_shelf_publishes_the_newest_delta_alone() -> None:
    shelved = Shelved(1)
    assert shelved.shelf.news() == Update(shelved.versions[1].manifest)
    for number in (2, 3, 4):
        made = shelved.put()
        assert made is not None
        assert shelved.shelf.news() == Update(shelved.versions[number].manifest, (made[0],), made[1])


def test_shelf_sends_small_payloads_at_once_and_has_large_ones_pulled() -> None:
    """It is the sum that counts."""
    shelf = Shelf(Clock())
    versions = [snapshot(number, 2 * INLINE_BYTES + 10) for number in (1, 2, 3, 4)]
    sizes = [INLINE_BYTES - 5, 5, INLINE_BYTES + 1]
    shelf.put(versions[0], None)
    for base, new, size, is_inline in zip(versions, versions[1:], sizes, (True, True, False), strict=False):
        shelf.put(new, delta(base, new, size))
        assert len(shelf.news().payload) == (size if is_inline else 0)
        assert [one.nbytes for one in shelf.news().chain] == [size]
        if new is versions[2]:
            update = shelf.answer(UpdateRequest(1, versions[0].manifest.digest))
            assert update is not None
            assert [one.nbytes for one in update.chain] == sizes[:2]
            assert update.payload == delta(*versions[:2], sizes[0])[1] + delta(*versions[1:3], sizes[1])[1]
    update = shelf.answer(UpdateRequest(2, versions[1].manifest.digest))
    assert update is not None
    assert ([one.nbytes for one in update.chain], update.payload) == (sizes[1:], b"")
    assert shelf.chunk(ChunkRequest(3, 0, 5, "delta")) == delta(*versions[1:3], 5)[1]


def test_shelf_sends_the_chain_of_unchanged_versions_without_payload() -> None:
    shelved = Shelved(4, delta_bytes=0)
    assert shelved.way(1) == (4, [2, 3, 4])
    assert shelved.ask(1).payload == b""


# --- whatever happens ---


ACTIONS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from([None, 0, 10, 30, SIZE, SIZE + 1])),
    st.tuples(st.just("pull"), st.integers(0, 3)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, HELD_S / 2, HELD_S])),
)


@settings(max_examples=100)
@given(st.lists(ACTIONS, min_size=1, max_size=40))
def test_shelf_promises_what_it_has_and_keeps_two_snapshots(actions: list[tuple[str, float | None]]) -> None:
    """Whoever does as told arrives at the newest version, whatever was put and pulled before."""
    shelved = Shelved(0)
    alive: list[weakref.ref[Snapshot]] = []
    manifests = {}
    for action, value in actions:
        if action == "put":
            shelved.put(None if value is None else int(value))
            newest = shelved.shelf.version
            alive.append(weakref.ref(shelved.versions[newest]))
            manifests[newest] = shelved.versions[newest].manifest
            shelved.versions = {
                number: snapshot(number, SIZE) for number in shelved.versions
            }  # the shelf's are its own
        elif action == "pull":
            shelved.pull(shelved.shelf.version - int(value or 0))
        else:
            shelved.clock.now += value or 0.0
        assert sum(one() is not None for one in alive) <= 2
        assert sum(len(data) for _, data in shelved.shelf._deltas.values()) <= SIZE
        for base in manifests:
            first = shelved.ask(base)
            second = first if first.chain or first.manifest == manifests[base] else shelved.ask(first.manifest.version)
            for update in (first, second):
                check_chain(update.manifest, update.chain)
                assert not update.chain or update.manifest.version == shelved.shelf.version
                assert all(shelved.shelf._deltas[one.version][0] == one for one in update.chain)
                assert update.chain or update.manifest.version in shelved.pullable()
            assert second.manifest.version == shelved.shelf.version
