"""Staging: a version lies next to the engine whole and checked; one copy for all actors of a node."""

from __future__ import annotations

import asyncio
import shutil
import threading
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from actor import staging as staging_module
from actor.locks import FileLock
from actor.slots import SlotFile
from protocol import shelf
from protocol.deltas import DeltaCoder
from protocol.errors import DeadlineExceeded, WeightsError
from protocol.messages import ChunkRequest
from protocol.weights import Snapshot, make_snapshot
from tests.hub_harness import DEADLINE_S
from tests.staging_harness import (
    ALL_FILES,
    SIZE,
    SPECS,
    VERSIONS,
    WELCOME,
    Bench,
    assert_holds,
    assert_is,
    bytes_of,
    differing,
    nbytes,
    refused,
    spied_copies,
)

# --- how a version comes ---


async def test_snapshot_is_staged_bit_for_bit(bench: Bench) -> None:
    bench.announce(1)
    actor = bench.actor()
    staged = await actor.bring(1)
    assert staged is not None
    assert_is(staged, 1, "snapshot", 0)
    assert staged.path.parent == actor.staging.directory == bench.root / "tandem-r-weights"
    assert actor.held == {0: 1}
    assert actor.files == ["slot-0.safetensors", "slots.json", "users.lock", "writing.lock"]
    assert bench.bytes_sent == SIZE


async def test_delta_inside_the_news_needs_no_question(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    monkeypatch.setattr(actor.link, "fetch_update", None)
    monkeypatch.setattr(actor.link, "fetch", None)
    staged = await actor.stage(2, await actor.news_of(2))
    assert_is(staged, 2, "delta", 1)
    assert actor.held == {0: 1, 1: 2}
    assert actor.files == ALL_FILES
    assert bench.bytes_sent == SIZE + nbytes(2)


async def test_delta_too_large_for_the_news_is_pulled_in_chunks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "INLINE_BYTES", 0)
    actor = bench.actor()
    actor.welcome = msgspec.structs.replace(WELCOME, chunk_bytes=7)
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    news = await actor.news_of(2)
    assert (len(news.payload), len(news.chain)) == (0, 1)
    assert_is(await actor.stage(2, news), 2, "delta", 1)
    assert bench.bytes_sent == SIZE + nbytes(2)


@pytest.mark.parametrize("inline_bytes", [1 << 20, 0])
async def test_chain_of_deltas_leads_on_for_one_that_missed_some(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    monkeypatch.setattr(shelf, "INLINE_BYTES", inline_bytes)
    copies = spied_copies(monkeypatch)
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2, 3, 4)
    news = await actor.news_of(4)
    before = bench.bytes_sent
    assert_is(await actor.stage(4, news), 4, "delta", 1)
    assert bench.bytes_sent == before + nbytes(2, 3, 4)
    bench.announce(5)
    assert_is(await actor.stage(5, await actor.news_of(5)), 5, "delta", 0)
    assert copies[0] is None
    assert copies[1] is not None
    assert bytes_of(copies[1]) >= differing(1, 4), "all that the three deltas changed"


async def test_snapshot_is_pulled_where_no_chain_leads_on(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.offer(VERSIONS[2][0])
    bench.announce(3)
    before = bench.bytes_sent
    assert_is(await actor.stage(3, await actor.news_of(3)), 3, "snapshot", 1)
    assert bench.bytes_sent == before + SIZE


async def test_version_that_changes_nothing_is_staged_all_the_same(bench: Bench) -> None:
    first = VERSIONS[1][0]
    second = make_snapshot(2, 2, SPECS, first.data)
    delta = DeltaCoder(1).encode(first, second)
    assert delta is not None
    assert delta[0].nbytes == 0
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.offer(second, delta)
    staged = await actor.stage(2, await actor.news_of(2))
    assert staged.form == "delta"
    assert_holds(staged, second)


async def test_stages_of_a_version_are_timed_apart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks when it is looked at: begun, slot at hand, slot filled, slot checked."""
    ticks = iter(range(100))
    monkeypatch.setattr(staging_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    actor, other = bench.actor(), bench.actor()
    bench.announce(1)
    assert (await actor.stage(1)).seconds == {"fetch": 2, "decode": 0, "check": 1}
    bench.announce(2)
    assert (await actor.stage(2)).seconds == {"fetch": 1, "decode": 1, "check": 1}
    assert (await other.stage(2)).seconds == {"check": 1}


# --- two slots ---


async def test_third_version_is_patched_over_the_first_by_what_changed_since(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = spied_copies(monkeypatch)
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    inode = first.path.stat().st_ino
    for version in (2, 3, 4, 5):
        bench.announce(version)
        assert_is(await actor.stage(version, await actor.news_of(version)), version, "delta", (version + 1) % 2)
        assert set(actor.held.values()) == {version - 1, version}
    assert first.path.stat().st_ino == inode, "written in place"
    assert copies[0] is None
    for changed, version in zip(copies[1:], (2, 3, 4), strict=True):
        assert changed is not None
        whole_b = set(range(28)) if version % 2 == 0 else set()
        covered = bytes_of(changed)
        assert covered >= differing(version - 1, version)
        assert len(covered - whole_b) == 5 * 2, "five elements of w"


async def test_slot_is_copied_in_full_where_a_chain_changed_too_much(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long chain's indices would take more memory than the version itself."""
    monkeypatch.setattr(staging_module, "REMEMBERED_SHARE", 1 / 8)  # six elements
    copies = spied_copies(monkeypatch)
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    await actor.stage(2)
    bench.announce(3)
    await actor.stage(3)
    bench.announce(4, 5)
    await actor.stage(5)
    bench.announce(6)
    assert_is(await actor.stage(6), 6, "delta", 0)
    assert [changes is None for changes in copies] == [True, False, False, True]


async def test_slot_that_another_actor_has_filled_is_copied_in_full(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = spied_copies(monkeypatch)
    actor, other = bench.actor(), bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    await actor.stage(2)
    bench.announce(3)
    await other.stage(3)
    bench.announce(4)
    assert_is(await actor.stage(4), 4, "delta", 1)
    assert copies == [None, None, None], "the one knows what changed from 1 to 2, the other from 2 to 3"
    bench.announce(5)
    assert_is(await actor.stage(5), 5, "delta", 0)
    assert copies[3] is not None


async def test_slot_is_copied_in_full_from_another_version_than_the_remembered_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = spied_copies(monkeypatch)
    actor, other = bench.actor(), bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    await actor.stage(2)
    actor.staging._slots.forget(1)  # somebody found it damaged
    bench.announce(3)
    assert_is(await other.stage(3), 3, "delta", 1)
    assert actor.held == {0: 1, 1: 3}, "the older slot is as it was when the one beside it held version 2"
    bench.announce(4)
    assert_is(await actor.stage(4), 4, "delta", 0)
    assert copies == [None, None, None]


async def test_slot_that_holds_nothing_is_copied_in_full(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = spied_copies(monkeypatch)
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    bench.announce(2)
    await actor.stage(2)
    actor.staging._slots.forget(0)
    first.path.write_bytes(b"what an interrupted write has left")
    bench.announce(3)
    assert_is(await actor.stage(3), 3, "delta", 0)
    assert copies == [None, None]


# --- several actors ---


async def test_second_actor_finds_what_the_first_has_staged(bench: Bench) -> None:
    first, second = bench.actor(), bench.actor()
    bench.announce(1)
    await first.stage(1)
    assert_is(await second.stage(1), 1, "found", 0)
    assert bench.bytes_sent == SIZE
    bench.announce(2)
    sent = bench.bytes_sent
    news = [await actor.news_of(2) for actor in (first, second)]
    staged = [await actor.stage(2, heard) for actor, heard in zip((first, second), news, strict=True)]
    assert [one.form for one in staged] == ["delta", "found"]
    assert_is(staged[1], 2, "found", 1)
    assert bench.bytes_sent == sent


async def test_actor_finds_what_a_killed_one_has_staged_and_goes_on_by_delta(bench: Bench) -> None:
    killed, next_one = bench.actor(), bench.actor()
    bench.announce(1)
    await killed.stage(1)
    killed.die()
    assert_is(await next_one.stage(1), 1, "found", 0)
    assert bench.bytes_sent == SIZE
    bench.announce(2)
    assert_is(await next_one.stage(2), 2, "delta", 1)


async def test_two_actors_at_once_pull_a_version_once(bench: Bench) -> None:
    actors = [bench.actor(), bench.actor()]
    bench.announce(1)
    staged = await asyncio.gather(*(actor.stage(1) for actor in actors))
    assert sorted(one.form for one in staged) == ["found", "snapshot"]
    assert bench.bytes_sent == SIZE
    for one in staged:
        assert_holds(one, VERSIONS[1][0])


async def test_actors_check_what_they_find_at_the_same_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them meet in the middle of their checks, and a fourth stages the next version meanwhile."""
    first, *others, fourth = [bench.actor() for _ in range(5)]
    bench.announce(1)
    await first.stage(1)
    arrived, meeting, check = threading.Semaphore(0), threading.Barrier(4, timeout=DEADLINE_S), SlotFile.check

    def meet(file: SlotFile) -> None:
        if file.manifest.version == 1:
            arrived.release()
            meeting.wait()
        check(file)

    monkeypatch.setattr(SlotFile, "check", meet)
    checking = [asyncio.ensure_future(other.stage(1)) for other in others]
    for _ in others:
        assert await asyncio.to_thread(arrived.acquire, timeout=DEADLINE_S)
    bench.announce(2)
    assert_is(await fourth.stage(2), 2, "delta", 1)
    await asyncio.to_thread(meeting.wait)
    assert [(await staged).form for staged in checking] == ["found"] * 3


async def test_slot_that_an_engine_loads_from_is_not_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = bench.actor(), bench.actor()
    bench.announce(1)
    loading = await slow.bring(1)
    assert loading is not None
    bench.announce(2)
    await fast.stage(2)
    bench.announce(3)
    waits = refused(monkeypatch, "slot-0.safetensors")
    third = asyncio.create_task(fast.stage(3))
    await asyncio.wait_for(waits.wait(), DEADLINE_S)
    assert_is(loading, 1, "snapshot", 0)
    assert fast.held == {0: 1, 1: 2}
    loading.release()
    assert_is(await asyncio.wait_for(third, DEADLINE_S), 3, "delta", 0)


async def test_slot_is_loaded_by_several_engines_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "STAGE_TIMEOUT_S", 0.05)
    bench.announce(1)
    loading = [await bench.actor().bring(1) for _ in range(3)]
    assert [one and one.form for one in loading] == ["snapshot", "found", "found"]


async def test_found_slot_is_in_use_as_much_as_a_written_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = bench.actor(), bench.actor()
    bench.announce(1)
    await first.stage(1)
    loading = await second.bring(1)
    assert loading is not None
    assert loading.form == "found"
    bench.announce(2)
    await first.stage(2)
    bench.announce(3)
    monkeypatch.setattr(staging_module, "STAGE_TIMEOUT_S", 0.05)
    with pytest.raises(DeadlineExceeded, match=r"an engine of this node to have loaded its weights \(.*/slot-0\."):
        await first.stage(3)
    assert_is(loading, 1, "found", 0)
    loading.release()
    assert_is(await first.stage(3), 3, "delta", 0)


async def test_actor_does_not_wait_for_ever_for_another_that_stages(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = bench.actor()
    bench.announce(1)
    staged = await actor.stage(1)
    writer = FileLock(staged.path.with_name("writing.lock"))
    assert writer.try_to(share=False)
    monkeypatch.setattr(staging_module, "STAGE_TIMEOUT_S", 0.05)
    bench.announce(2)
    with pytest.raises(DeadlineExceeded, match=r"another actor of this node to stage a version \(.*/writing\.lock"):
        await actor.stage(2)
    writer.release()
    assert_is(await actor.stage(2), 2, "delta", 1)


# --- which version ---


@pytest.fixture
def long_pulls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of which bytes were asked for counts as being pulled from then on."""
    monkeypatch.setattr(shelf, "HELD_S", 1000.0)


@pytest.mark.usefixtures("long_pulls")
async def test_joiner_takes_the_snapshot_being_pulled_and_the_deltas_since(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "STAGE_TIMEOUT_S", 0.05)
    first, joiner = bench.actor(), bench.actor("another-node")
    bench.announce(1)
    await first.stage(1)
    bench.announce(2, 3)
    before = bench.bytes_sent
    staged = await joiner.bring(3, 0, await joiner.news_of(3))
    assert staged is not None
    assert_is(staged, 3, "delta", 1)
    assert joiner.held == {0: 1, 1: 3}
    assert bench.bytes_sent == before + SIZE + nbytes(2, 3)
    bench.announce(4)
    assert_is(await joiner.stage(4, await joiner.news_of(4)), 4, "delta", 0)


@pytest.mark.usefixtures("long_pulls")
async def test_joiner_goes_on_if_versions_are_made_while_it_pulls(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshot has become an older one by then, which is kept for it."""
    joiner = bench.actor()
    bench.announce(1)
    fetch = joiner.link.fetch

    async def slow(*arguments: Any) -> None:
        if arguments[0] == 1:
            hub = bench.running.hub
            bench.running.run(lambda: hub.shelf.chunk(ChunkRequest(1, 0, 1)))  # the first one, say
            bench.announce(2, 3)
        await fetch(*arguments)

    monkeypatch.setattr(joiner.link, "fetch", slow)
    staged = await joiner.bring(1)
    assert staged is not None
    assert_is(staged, 1, "snapshot", 0)
    staged.release()
    staged = await joiner.bring(3, 1)
    assert staged is not None
    assert_is(staged, 3, "delta", 1)


@pytest.mark.usefixtures("long_pulls")
async def test_actor_whose_slots_are_lost_takes_the_older_snapshot_as_a_base(bench: Bench) -> None:
    """It serves version 2 and is sent to version 1, which others are pulling: of use for the deltas since."""
    actor, other = bench.actor(), bench.actor("another-node")
    bench.announce(1)
    await other.stage(1)
    bench.announce(2)
    staged = await actor.stage(2)
    shutil.rmtree(staged.path.parent)
    bench.announce(3)
    again = await actor.bring(3, 2, await actor.news_of(3))
    assert again is not None
    assert_is(again, 3, "delta", 1)
    assert actor.held == {0: 1, 1: 3}


async def test_announced_version_that_never_comes_is_named(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    with pytest.raises(WeightsError, match="version 3 was announced, 1 can be had"):
        await actor.bring(3)
    bench.announce(2)
    await actor.stage(2)
    sent = bench.bytes_sent
    with pytest.raises(WeightsError, match="version 3 was announced, 2 can be had"):
        await actor.bring(3, 2)
    assert bench.bytes_sent == sent


async def test_later_version_than_the_announced_one_will_do(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    news = await actor.news_of(2)
    bench.announce(3)
    assert_is(await actor.stage(2, news), 2, "delta", 1)
    staged = await actor.bring(2, 1)
    assert staged is not None
    assert_is(staged, 3, "delta", 0)


async def test_old_news_do_not_hide_a_later_version(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    news = await actor.news_of(2)
    bench.announce(3)
    assert_is(await actor.stage(3, news), 3, "delta", 1)


async def test_nothing_is_staged_where_nothing_is_newer(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    sent = bench.bytes_sent
    assert await actor.bring(1, 1) is None
    assert await actor.bring(1, 1, await actor.news_of(1)) is None
    assert bench.bytes_sent == sent


async def test_learner_without_weights_is_said_to_have_none(bench: Bench) -> None:
    actor = bench.actor()
    with pytest.raises(WeightsError, match="the learner has no weights yet"):
        await actor.bring(1)
    assert list(bench.root.iterdir()) == []


async def test_manifest_that_does_not_fit_itself_is_never_staged(bench: Bench) -> None:
    good = VERSIONS[1][0]
    bench.offer(Snapshot(msgspec.structs.replace(good.manifest, total_bytes=SIZE + 1), good.data))
    with pytest.raises(WeightsError, match="digest does not fit"):
        await bench.actor().stage(1)
    assert list(bench.root.iterdir()) == []
