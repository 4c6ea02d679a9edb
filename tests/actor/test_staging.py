"""Staging: a version lies next to the engine whole and checked, or not at all; one copy for all actors of a node."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import threading
from collections import namedtuple
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actor import slots as slots_module
from actor import staging as staging_module
from actor.locks import FileLock
from actor.slots import SlotFile, Slots
from actor.staging import Staged, Staging
from protocol import shelf
from protocol.deltas import DeltaCoder
from protocol.errors import DeadlineExceeded, WeightsError
from protocol.messages import ChunkRequest, Delta, TensorSpec, Update, Welcome
from protocol.sockets import Link
from protocol.weights import Snapshot, layout, make_snapshot
from tests.hub_harness import DEADLINE_S, RunningHub

WELCOME = Welcome(
    run="r", model="m", dtype="bfloat16", max_model_len=64, bulk="", news="", heartbeat_s=1.0, dead_after_s=15.0,
    seed=0, group_size=2, chunk_bytes=50, window=2,
)  # fmt: skip
SPECS = layout([("w", "bfloat16", (10, 20)), ("b", "float32", (7,)), ("scale", "float32", ())])
SIZE = 10 * 20 * 2 + 7 * 4 + 4
ALL_FILES = ["slot-0.safetensors", "slot-1.safetensors", "slots.json", "users.lock", "writing.lock"]

Version = tuple[Snapshot, tuple[Delta, bytes] | None]


def make_line(count: int, specs: tuple[TensorSpec, ...] = SPECS) -> dict[int, Version]:
    """Versions 1 to `count`: each changes five elements of `w`, every second one all of `b` as well."""
    chance, coder = np.random.default_rng(0), DeltaCoder(1)
    data = chance.integers(0, 256, SIZE, dtype=np.uint8)
    versions: dict[int, Version] = {1: (make_snapshot(1, 1, specs, data.data), None)}
    for version in range(2, count + 1):
        data = data.copy()
        data[32 + 2 * chance.choice(200, 5, replace=False)] ^= 1
        if version % 2 == 0:
            data[:28] = chance.integers(0, 256, 28, dtype=np.uint8)
        new = make_snapshot(version, version, specs, data.data)
        versions[version] = new, coder.encode(versions[version - 1][0], new)
    return versions


VERSIONS = make_line(6)


def nbytes(*versions: int) -> int:
    """Of the payloads of these versions' deltas."""
    return sum(delta[0].nbytes for version in versions if (delta := VERSIONS[version][1]))


@dataclass
class Actor:
    """What an actor has of it: a link and a staging."""

    staging: Staging
    link: Link
    welcome: Welcome = WELCOME

    async def bring(self, newest: int, serving: int = 0, news: Update | None = None) -> Staged | None:
        return await self.staging.bring(self.link, self.welcome, news, newest, serving)

    async def stage(self, newest: int, news: Update | None = None) -> Staged:
        """Bring a version, and have an engine load it at once."""
        staged = await self.bring(newest, newest - 1, news)
        assert staged is not None
        staged.release()
        return staged

    async def news_of(self, version: int) -> Update:
        while (news := await asyncio.wait_for(self.link.news(), DEADLINE_S)).manifest.version != version:
            pass
        return news

    @property
    def held(self) -> dict[int, int]:
        """Slot -> version, by the record."""
        return {slot: held.version for slot, held in self.staging._slots.held().items()}

    @property
    def files(self) -> list[str]:
        assert self.staging.directory is not None
        return sorted(path.name for path in self.staging.directory.iterdir())

    def die(self) -> None:
        """As kill -9 does: nothing is put in order, the kernel closes the files."""
        assert self.staging._users is not None
        self.staging._users.release()


class Bench:
    """A hub, and actors of one node under a root of the test's own."""

    def __init__(self, running: RunningHub, root: Path) -> None:
        self.running, self.root = running, root
        self.links: list[Link] = []

    def actor(self, run: str = "r") -> Actor:
        hub, name = self.running.hub, f"actor-{len(self.links)}"
        self.links.append(link := Link(hub.work_endpoint, name, "abc"))
        link.open_weights(hub.bulk_endpoint, hub.news_endpoint)
        self.running.until(lambda: hub._subscribers == len(self.links))
        return Actor(Staging(run, self.root), link)

    def offer(self, snapshot: Snapshot, delta: tuple[Delta, bytes] | None = None) -> None:
        self.running.run(lambda: self.running.hub.announce(snapshot, delta))

    def announce(self, *versions: int) -> None:
        for version in versions:
            self.offer(*VERSIONS[version])

    @property
    def bytes_sent(self) -> int:
        return self.running.run(lambda: self.running.hub.bytes_sent)  # not before the hub has counted all it sent


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(shelf, "HELD_S", 0.0)  # nobody is sent to an older snapshot
    root = tmp_path / "shm"
    root.mkdir()
    with RunningHub() as running:
        bench = Bench(running, root)
        yield bench
        for link in bench.links:
            link.close()


def assert_holds(staged: Staged, snapshot: Snapshot) -> None:
    """Bit for bit, by safetensors' own reader."""
    assert staged.manifest == snapshot.manifest
    loaded = load_file(staged.path)
    assert set(loaded) == {spec.name for spec in snapshot.manifest.tensors}
    for spec in snapshot.manifest.tensors:
        assert tuple(loaded[spec.name].shape) == spec.shape
        data = loaded[spec.name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data == bytes(snapshot.data[spec.offset : spec.offset + len(data)]), spec.name


def assert_is(staged: Staged, version: int, form: str, slot: int) -> None:
    """Staged.form says how it came; bit for bit."""
    assert (staged.manifest.version, staged.form, staged.path.name) == (version, form, f"slot-{slot}.safetensors")
    assert_holds(staged, VERSIONS[version][0])


def spied_copies(monkeypatch: pytest.MonkeyPatch) -> list[slots_module.Changed | None]:
    """What changed between the slots as far as is known, for every copy of one to the other."""
    seen: list[slots_module.Changed | None] = []
    copy = staging_module.copy

    def spy(source: Any, target: Any, changed: slots_module.Changed | None) -> None:
        seen.append(changed)
        copy(source, target, changed)

    monkeypatch.setattr(staging_module, "copy", spy)
    return seen


def bytes_of(changed: slots_module.Changed) -> set[int]:
    """Bytes of a version that the runs' elements cover."""
    found: set[int] = set()
    for run, indices in changed:
        elements = range((run.stop - run.start) // run.itemsize) if indices is None else indices.tolist()
        found |= {run.start + run.itemsize * n + byte for n in elements for byte in range(run.itemsize)}
    return found


def differing(first: int, second: int) -> set[int]:
    """Bytes that differ between two versions."""
    old, new = (np.frombuffer(VERSIONS[version][0].data, np.uint8) for version in (first, second))
    return set(np.flatnonzero(old != new).tolist())


def refused(monkeypatch: pytest.MonkeyPatch, name: str) -> asyncio.Event:
    """Set once somebody had to wait for the lock on the file of that name."""
    event, try_to = asyncio.Event(), FileLock.try_to

    def spy(lock: FileLock, share: bool) -> bool:
        taken = try_to(lock, share)
        if not taken and lock.path.name == name:
            event.set()
        return taken

    monkeypatch.setattr(FileLock, "try_to", spy)
    return event


def flip(path: Path, byte: int) -> None:
    """Damage a byte of a file, counted from its end."""
    data = bytearray(path.read_bytes())
    data[-byte] ^= 1
    with open(path, "r+b") as file:
        file.write(data)


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


# --- the directory ---


async def test_directory_and_its_files_are_private(bench: Bench) -> None:
    actor = bench.actor()
    before = os.umask(0)
    try:
        bench.announce(1)
        await actor.stage(1)
        bench.announce(2)
        await actor.stage(2)
    finally:
        os.umask(before)
    assert actor.staging.directory is not None
    assert stat.S_IMODE(actor.staging.directory.stat().st_mode) == 0o700
    assert actor.files == ALL_FILES
    assert {stat.S_IMODE(path.stat().st_mode) for path in actor.staging.directory.iterdir()} == {0o600}


async def test_directory_that_others_can_write_is_refused(bench: Bench) -> None:
    """Its name can be guessed, and others may write where it lies."""
    foreign = bench.root / "tandem-r-weights"
    foreign.mkdir()
    foreign.chmod(0o777)
    bench.announce(1)
    with pytest.raises(OSError, match="tandem-r-weights is not this user's alone"):
        await bench.actor().stage(1)


@pytest.mark.parametrize("run", ["../escaped", "/etc", "a/b", ".."])
async def test_name_from_the_wire_never_leads_out_of_the_root(bench: Bench, run: str) -> None:
    bench.announce(1)
    staged = await bench.actor(run).stage(1)
    assert [path.name for path in bench.root.parent.iterdir()] == ["shm"]
    assert list(bench.root.iterdir()) == [staged.path.parent]


async def test_directory_goes_with_the_last_who_leaves(bench: Bench) -> None:
    first, second = bench.actor(), bench.actor()
    bench.announce(1)
    staged = await first.stage(1)
    await second.stage(1)
    first.staging.leave()
    assert first.staging.directory is None
    assert_is(staged, 1, "snapshot", 0)
    first.staging.leave()
    assert_is(await second.stage(1), 1, "found", 0)
    second.staging.leave()
    assert list(bench.root.iterdir()) == []
    second.staging.leave()
    assert_is(await first.stage(1), 1, "snapshot", 0)


async def test_actor_whose_directory_was_removed_leaves_that_of_others_alone(bench: Bench) -> None:
    first, second = bench.actor(), bench.actor()
    bench.announce(1)
    staged = await first.stage(1)
    shutil.rmtree(staged.path.parent)
    assert_is(await second.stage(1), 1, "snapshot", 0)
    first.staging.leave()
    assert second.held == {0: 1}
    assert_is(await first.stage(1), 1, "found", 0)


async def test_last_who_leaves_takes_nothing_from_one_who_joins(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    last, joiner = bench.actor(), bench.actor()
    bench.announce(1)
    await last.stage(1)
    manifest, remove = VERSIONS[1][0].manifest, shutil.rmtree

    def removed_while_one_joins(path: Path, **options: Any) -> None:
        joining = joiner.staging._open(manifest)
        with pytest.raises(StopIteration):
            joining.send(None)  # it has nothing to wait for
        joiner.staging._slots.record(0, manifest)
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", removed_while_one_joins)
        last.staging.leave()
    assert joiner.files == ["slots.json", "users.lock"]
    assert joiner.held == {0: 1}
    assert [path.name for path in bench.root.iterdir()] == ["tandem-r-weights"]


async def test_actor_that_leaves_keeps_no_removed_file_in_memory(bench: Bench) -> None:
    """Else the room for the two slots would still be taken when it looks for some."""
    actor = bench.actor()
    bench.announce(1)
    await actor.stage(1)
    bench.announce(2)
    await actor.stage(2)
    maps = Path("/proc/self/maps")
    assert f"{bench.root}/tandem-r-weights/slot-1.safetensors" in maps.read_text()
    actor.staging.leave()
    assert str(bench.root) not in maps.read_text()


async def test_directory_that_somebody_removed_is_made_again(bench: Bench) -> None:
    actor = bench.actor()
    bench.announce(1)
    first = await actor.stage(1)
    shutil.rmtree(first.path.parent)
    bench.announce(2)
    second = await actor.stage(2, await actor.news_of(2))
    assert_is(second, 2, "snapshot", 0)
    assert second.path.parent == first.path.parent
    actor.staging.leave()
    assert list(bench.root.iterdir()) == []


async def test_directory_that_goes_while_one_joins_is_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: before the joiner has opened the lock, and while it waits for it."""
    directory = bench.root / "tandem-r-weights"
    directory.mkdir(mode=0o700)
    leaver = FileLock(directory / "users.lock")
    assert leaver.try_to(share=False)
    waits = refused(monkeypatch, "users.lock")
    opened: list[Path] = []

    class FileLockTooLate(FileLock):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            if len(opened) == 2:
                shutil.rmtree(directory)
            super().__init__(path)

    monkeypatch.setattr(staging_module, "FileLock", FileLockTooLate)
    bench.announce(1)
    actor = bench.actor()
    joining = asyncio.create_task(actor.stage(1))
    await asyncio.wait_for(waits.wait(), DEADLINE_S)
    shutil.rmtree(directory)
    leaver.release()
    assert_is(await asyncio.wait_for(joining, DEADLINE_S), 1, "snapshot", 0)
    assert [path.name for path in opened[:3]] == ["users.lock"] * 3
    assert actor.staging._users is not None
    assert actor.staging._users.is_current


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What is taken where shared memory is too small: another temporary directory than the test's own."""
    monkeypatch.setattr(staging_module.tempfile, "gettempdir", lambda: str(tmp_path / "plain"))
    (tmp_path / "plain").mkdir()
    return tmp_path / "plain"


def small_disk(monkeypatch: pytest.MonkeyPatch, small: Path, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free if path == small else 1 << 40))


async def test_small_shared_memory_is_left_for_a_plain_directory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, plain: Path
) -> None:
    small_disk(monkeypatch, bench.root, 2 * SIZE)  # two versions just do not fit
    bench.announce(1)
    staged = await bench.actor().stage(1)
    assert staged.path.parent == plain / "tandem-r-weights"
    assert list(bench.root.iterdir()) == []
    assert_is(staged, 1, "snapshot", 0)


async def test_missing_shared_memory_is_replaced_by_a_plain_directory(bench: Bench, plain: Path) -> None:
    bench.root.rmdir()
    bench.announce(1)
    assert (await bench.actor().stage(1)).path.parent == plain / "tandem-r-weights"


async def test_directory_of_another_actor_is_joined_wherever_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, plain: Path
) -> None:
    """Shared memory that has room by now, and shared memory that has none left because the weights lie there."""
    first, second = bench.actor(), bench.actor()
    bench.announce(1)
    with monkeypatch.context() as patch:
        small_disk(patch, bench.root, 0)
        staged = await first.stage(1)
    assert staged.path.parent.parent == plain
    assert (await second.stage(1)).path == staged.path
    third, fourth = bench.actor("other"), bench.actor("other")
    staged = await third.stage(1)
    assert staged.path.parent.parent == bench.root
    small_disk(monkeypatch, bench.root, 0)
    assert (await fourth.stage(1)).path == staged.path
    assert bench.bytes_sent == 2 * SIZE


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
