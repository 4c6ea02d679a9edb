"""The directory of a node and run: private, shared by its actors, gone with the last of them."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from actor import staging as staging_module
from actor.locks import FileLock
from tests.hub_harness import DEADLINE_S
from tests.staging_harness import ALL_FILES, SIZE, VERSIONS, Bench, assert_is, refused

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
