"""Staging when bytes are wrong, there is no room, or somebody is interrupted: the old version is left alone."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from actor.locks import FileLock
from actor.slots import SlotFile, Slots
from protocol import shelf
from protocol.deltas import DeltaCoder
from protocol.errors import WeightsError
from protocol.link import Link
from protocol.messages import Delta, Update
from protocol.weights import Snapshot, layout, make_snapshot
from tests.hub_harness import DEADLINE_S
from tests.staging_harness import SIZE, SPECS, VERSIONS, WELCOME, Bench, assert_holds, assert_is, differing, flip

# --- wrong bytes ---


async def test_damaged_delta_is_refused_and_the_old_version_kept(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    bench.announce(2)
    news = await actor.news_of(2)
    damaged = bytearray(news.payload)
    damaged[10] ^= 1
    with pytest.raises(WeightsError, match=r"delta of version 2: .* with a wrong digest"):
        await actor.bring(2, 1, msgspec.structs.replace(news, payload=bytes(damaged)))
    assert actor.held == {0: 1}
    assert_is(first, 1, "snapshot", 0)
    assert_is(await actor.stage(2), 2, "delta", 1)


async def test_damaged_base_is_found_out_and_a_snapshot_pulled(bench: Bench) -> None:
    """What a delta was applied to is checked by what came of it; then nothing on this node is trusted."""
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    flip(first.path, 100)
    bench.announce(2)
    with pytest.raises(WeightsError, match="version 2: wrong digest of tensor w"):
        await actor.bring(2, 1, await actor.news_of(2))
    assert actor.held == {}
    before = bench.bytes_sent
    assert_is(await actor.stage(2), 2, "snapshot", 0)
    assert bench.bytes_sent == before + SIZE


async def test_damaged_older_slot_is_found_out_after_a_patch(bench: Bench) -> None:
    """A byte that no delta touches: the patch takes the older slot for what the record says it holds."""
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    bench.announce(2)
    await actor.stage(2)
    unchanged = next(byte for byte in range(32, SIZE) if byte not in differing(1, 3))
    flip(first.path, SIZE - unchanged)
    bench.announce(3)
    with pytest.raises(WeightsError, match="version 3: wrong digest of tensor w"):
        await actor.stage(3)
    assert actor.held == {}
    assert_is(await actor.stage(3), 3, "snapshot", 0)


async def test_damaged_slot_of_another_actor_is_not_found(bench: Bench) -> None:
    first, second = bench.actor(), bench.actor()
    bench.announce(1)
    flip((await first.stage(1)).path, 1)
    with pytest.raises(WeightsError, match="version 1: wrong digest of tensor w"):
        await second.stage(1)
    assert first.held == {}
    assert_is(await second.stage(1), 1, "snapshot", 0)


@pytest.mark.parametrize("damage", ["missing", "of another size", "of other tensors"])
async def test_slot_that_is_not_as_recorded_is_staged_anew(bench: Bench, damage: str) -> None:
    first, second = bench.actor(), bench.actor()
    bench.announce(1)
    path = (await first.stage(1)).path
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "of another size" else data.replace(b"scale", b"other"))
    with pytest.raises(WeightsError, match="its tensors are not those of version 1"):
        await second.stage(1)
    assert_is(await second.stage(1), 1, "snapshot", 0)


@pytest.mark.parametrize(
    ("touched", "message"), [(False, "wrong digest of tensor w"), (True, "small elements among the others")]
)
async def test_deltas_after_a_damaged_base_start_from_a_clean_sheet(bench: Bench, touched: bool, message: str) -> None:
    """The decoder remembers which elements are small. Here it saw them in the damaged base of a version.

    A large element becomes a small one: one that no delta touches, or one that the first does."""
    specs, chance, coder = layout([("w", "bfloat16", (1 << 16,))]), torch.Generator().manual_seed(0), DeltaCoder(1)
    weights = 0.02 * torch.randn(1 << 16, generator=chance)
    versions: list[Snapshot] = []
    deltas: list[tuple[Delta, bytes] | None] = []
    for version in (1, 2, 3):
        weights = weights + 2e-6 * torch.randn(1 << 16, generator=chance)
        data = weights.bfloat16().view(torch.uint8).numpy().data
        versions.append(make_snapshot(version, version, specs, data))
        deltas.append(coder.encode(versions[-2], versions[-1]) if version > 1 else None)
    (small,) = coder._small.values()
    assert small.threshold, "two classes of elements"
    actor = bench.actor()
    actor.welcome = msgspec.structs.replace(WELCOME, chunk_bytes=1 << 14)
    bench.offer(versions[0])
    first = await actor.stage(1)
    one, *others = (np.frombuffer(version.data, "<u2") for version in versions)
    large = (one << 1) >= small.threshold
    fits = one != others[0] if touched else (one == others[0]) & (one == others[1])
    with open(first.path, "r+b") as file:
        file.seek(2 * int(np.flatnonzero(large & fits)[0]) - (1 << 17), os.SEEK_END)
        file.write(bytes(2))
    bench.offer(versions[1], deltas[1])
    with pytest.raises(WeightsError, match=message):
        await actor.stage(2)
    assert actor.held == {}
    assert (await actor.stage(2)).form == "snapshot"
    bench.offer(versions[2], deltas[2])
    third = await actor.stage(3)
    assert third.form == "delta"
    assert_holds(third, versions[2])


async def test_damaged_chunk_is_refused_and_pulled_again(bench: Bench) -> None:
    good = VERSIONS[1][0]
    damaged = bytearray(good.data)
    damaged[123] ^= 1
    actor = bench.actor()
    bench.offer(Snapshot(good.manifest, memoryview(damaged)))
    with pytest.raises(WeightsError, match="version 1: wrong digest of tensor w"):
        await actor.stage(1)
    assert actor.held == {}
    damaged[123] ^= 1
    assert_is(await actor.stage(1), 1, "snapshot", 0)


async def test_bytes_lost_on_the_way_to_the_file_are_found_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests are checked on what lies in the file: what came from the socket was right."""
    fetch = Link.fetch

    async def forgetful(link: Link, version: int, total: int, chunk: int, window: int, write: Any) -> None:
        def all_but_the_last(offset: int, data: memoryview) -> None:
            if offset + len(data) < total:
                write(offset, data)

        await fetch(link, version, total, chunk, window, all_but_the_last)

    monkeypatch.setattr(Link, "fetch", forgetful)
    bench.announce(1)
    actor = bench.actor()
    with pytest.raises(WeightsError, match="version 1: wrong digest of tensor w"):
        await actor.stage(1)
    assert actor.held == {}


async def test_news_for_another_base_is_not_applied_but_asked_about(bench: Bench) -> None:
    """One version was missed; and one of the same number but of other bytes is here."""
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2, 3)
    news = await actor.news_of(3)
    assert [delta.base for delta in news.chain] == [2]
    assert_is(await actor.stage(3, news), 3, "delta", 1)
    impostor = make_snapshot(4, 4, SPECS, VERSIONS[1][0].data)
    bench.offer(impostor)
    await actor.stage(4)
    bench.announce(4, 5)
    news = await actor.news_of(5)
    assert news.chain[0].base == 4
    assert_is(await actor.stage(5, news), 5, "snapshot", 1)


async def test_chain_from_what_is_not_here_is_refused(bench: Bench) -> None:
    """A learner that answers beside the question."""
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2, 3)
    bench.running.hub.shelf.answer = lambda request: bench.running.hub.shelf.news()  # type: ignore[method-assign]
    with pytest.raises(WeightsError, match="deltas from 2 on, this node has version 1"):
        await actor.stage(3)
    assert actor.held == {0: 1}


async def test_chain_from_nothing_is_refused(bench: Bench) -> None:
    snapshot, delta = VERSIONS[2]
    assert delta is not None
    baseless = msgspec.structs.replace(delta[0], base=0, base_digest="")
    news = Update(snapshot.manifest, (baseless,), delta[1])
    actor = bench.actor()
    bench.announce(1)
    bench.announce(2)
    assert_is(await actor.stage(2, news), 2, "snapshot", 0)
    bench.running.hub.shelf.answer = lambda request: news  # type: ignore[method-assign]
    other = bench.actor("another")
    with pytest.raises(WeightsError, match="deltas from 0 on, this node has version 0"):
        await other.stage(2)


async def test_delta_is_never_applied_twice(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    news = await actor.news_of(2)
    assert_is(await actor.stage(2, news), 2, "delta", 1)
    assert_is(await actor.stage(2, news), 2, "found", 1)
    assert await actor.bring(2, 2, news) is None


@pytest.mark.parametrize("form", ["snapshot", "delta"])
async def test_chunk_that_is_gone_ends_the_attempt(bench: Bench, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(shelf, "INLINE_BYTES", 0)
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.offer(VERSIONS[2][0], VERSIONS[2][1] if form == "delta" else None)
    with monkeypatch.context() as patch:
        patch.setattr(bench.running.hub.shelf, "chunk", lambda request: None)
        with pytest.raises(WeightsError, match=f"the {form} of version 2 is gone, version 2 can be had"):
            await actor.stage(2)
    assert actor.held == {0: 1}
    assert_is(await actor.stage(2), 2, form, 1)


async def test_unreadable_record_is_as_good_as_none(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    (first.path.parent / "slots.json").write_text('{"0": {"vers')
    bench.announce(2)
    assert_is(await actor.stage(2, await actor.news_of(2)), 2, "snapshot", 0)
    assert actor.held == {0: 2}


# --- no room, and interruptions ---


def no_room(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["posix_fallocate", "pwrite"])
async def test_failed_write_leaves_the_old_version_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    bench.offer(VERSIONS[2][0])
    with monkeypatch.context() as patch:
        patch.setattr(os, name, no_room)
        with pytest.raises(OSError, match="No space left"):
            await actor.stage(2)
    assert actor.held == {0: 1}
    assert_is(first, 1, "snapshot", 0)
    assert_is(await actor.stage(2), 2, "snapshot", 1)


async def test_slot_that_could_not_be_made_is_not_left_as_a_hole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is reserved before anything is mapped: a store into a page that cannot be had would kill the actor."""
    bench.announce(1)
    actor = bench.actor()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(OSError, match="No space left"):
            await actor.stage(1)
    assert actor.files == ["slots.json", "users.lock", "writing.lock"]
    staged = await actor.stage(1)
    assert staged.path.stat().st_blocks * 512 >= staged.path.stat().st_size


async def test_version_that_cannot_be_recorded_is_not_staged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "record", no_room)
        with pytest.raises(OSError, match="No space left"):
            await actor.stage(2)
    assert actor.held == {0: 1}
    assert_is(await actor.stage(2), 2, "delta", 1)


async def test_version_is_in_no_record_before_it_is_checked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that is killed during the check leaves nothing that anybody takes for a version."""
    actor, seen, check = bench.actor(), [], SlotFile.check

    def noted(file: SlotFile) -> None:
        seen.append(actor.held)
        check(file)

    monkeypatch.setattr(SlotFile, "check", noted)
    for version in (1, 2):
        bench.announce(version)
        await actor.stage(version)
    assert seen == [{}, {0: 1}]


async def test_interrupted_pull_is_in_no_record_and_in_nobodys_way(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, other = bench.actor(), bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    await actor.stage(2)
    bench.offer(VERSIONS[3][0])
    begun = asyncio.Event()

    async def stuck(version: int, total: int, chunk_bytes: int, window: int, write: Any, form: str = "") -> None:
        write(0, memoryview(bytes(chunk_bytes)))
        begun.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(actor.link, "fetch", stuck)
        task = asyncio.create_task(actor.stage(3))
        await asyncio.wait_for(begun.wait(), DEADLINE_S)
        assert actor.held == {1: 2}, "not to be taken for a version even if the actor is killed now"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert actor.held == {1: 2}
    assert_is(await other.stage(3), 3, "snapshot", 0)


async def test_cancelled_actor_waits_for_its_thread_that_still_writes(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    bench.announce(2)
    begun, go, done = threading.Event(), threading.Event(), threading.Event()

    def slow(delta: Delta, payload: bytes, specs: Any, target: memoryview) -> list[Any]:
        begun.set()
        assert go.wait(DEADLINE_S)
        target[:4] = b"half"
        done.set()
        return []

    actor.staging._coder.decode = slow  # type: ignore[method-assign]
    task = asyncio.create_task(actor.stage(2))
    assert await asyncio.to_thread(begun.wait, DEADLINE_S)
    task.cancel()
    await asyncio.wait([task], timeout=0.05)
    assert not task.done()
    writing = FileLock(first.path.with_name("writing.lock"))
    assert not writing.try_to(share=True), "nobody else may write yet"
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, DEADLINE_S)
    assert done.is_set()
    assert writing.try_to(share=True)
    writing.release()
    assert actor.held == {0: 1}
    actor.staging._coder = DeltaCoder(1)
    assert_is(await actor.stage(2), 2, "delta", 1)
