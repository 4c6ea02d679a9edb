"""Locks between processes: shared or exclusive, freed by the kernel, and every wait has a deadline and a name."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from actor.locks import FileLock, remove_unused
from protocol.errors import DeadlineExceeded
from tests.hub_harness import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from actor.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
print(lock.try_to(share=sys.argv[2] == "shared"), flush=True)
sys.stdin.read()
"""


class Holder:
    """Context manager: another process that holds a lock until it is killed."""

    def __init__(self, path: Path, share: bool) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), "shared" if share else "exclusive"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Holder:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "True\n"
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=DEADLINE_S)

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


@pytest.fixture
def locks(path: Path) -> Iterator[tuple[FileLock, FileLock, FileLock]]:
    """Three who want the same lock."""
    made = (FileLock(path), FileLock(path), FileLock(path))
    yield made
    for lock in made:
        lock.release()


def test_shared_lock_keeps_out_an_exclusive_one_alone(locks: tuple[FileLock, FileLock, FileLock]) -> None:
    first, second, third = locks
    assert first.try_to(share=True)
    assert second.try_to(share=True)
    assert not third.try_to(share=False)
    first.release()
    assert not third.try_to(share=False)
    second.release()
    assert third.try_to(share=False)


def test_exclusive_lock_keeps_out_all_others(locks: tuple[FileLock, FileLock, FileLock]) -> None:
    first, second, third = locks
    assert first.try_to(share=False)
    assert not second.try_to(share=True)
    assert not third.try_to(share=False)
    first.release()
    first.release()
    assert third.try_to(share=False)


def test_exclusive_lock_is_turned_into_a_shared_one(locks: tuple[FileLock, FileLock, FileLock]) -> None:
    first, second, third = locks
    assert first.try_to(share=False)
    assert first.try_to(share=True)
    assert second.try_to(share=True)
    assert not third.try_to(share=False)


def test_shared_lock_that_cannot_be_made_exclusive_is_lost(locks: tuple[FileLock, FileLock, FileLock]) -> None:
    """The kernel lets go of the one before it tries for the other: whoever needs the shared lock takes it again."""
    first, second, third = locks
    assert first.try_to(share=True)
    assert second.try_to(share=True)
    assert not first.try_to(share=False)
    second.release()
    assert third.try_to(share=False)


@pytest.mark.parametrize("share", [True, False])
def test_lock_of_a_killed_process_is_free(path: Path, share: bool) -> None:
    lock = FileLock(path)
    with Holder(path, share) as holder:
        assert not lock.try_to(share=False)
        assert lock.try_to(share=True) == share
        holder.kill()
        assert lock.try_to(share=False)
    lock.release()


def test_lock_is_not_passed_on_to_a_child(path: Path) -> None:
    """Else an engine's or a grader's process would hold it when the actor has been killed."""
    lock = FileLock(path)
    assert lock.try_to(share=False)
    child = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, close_fds=False,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        lock.release()
        other = FileLock(path)
        assert other.try_to(share=False)
        other.release()
    finally:
        child.kill()
        child.communicate(timeout=DEADLINE_S)


async def test_take_waits_until_the_lock_is_free(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, lock, other = FileLock(path), FileLock(path), FileLock(path)
    assert holder.try_to(share=False)
    answers: list[bool] = []
    refused, try_to = asyncio.Event(), lock.try_to

    def spy(share: bool) -> bool:
        answers.append(try_to(share))
        refused.set()
        return answers[-1]

    monkeypatch.setattr(lock, "try_to", spy)
    taking = asyncio.create_task(lock.take(False, "the holder", DEADLINE_S))
    await asyncio.wait_for(refused.wait(), DEADLINE_S)
    assert answers == [False]
    holder.release()
    await asyncio.wait_for(taking, DEADLINE_S)
    assert answers[-1]
    assert not other.try_to(share=True)
    for one in (lock, other):
        one.release()


async def test_take_gives_up_after_its_deadline_and_names_what_it_waited_for(path: Path) -> None:
    with Holder(path, share=True):
        lock = FileLock(path)
        await lock.take(True, "a share", 0.0)
        with pytest.raises(DeadlineExceeded, match=r"waited 0 s for the last reader \(.*/a\.lock\)"):
            await lock.take(False, "the last reader", 0.03)
        assert not lock.is_current, "whoever gives up has let go of the file"


def test_lock_file_is_made_for_this_user_and_its_content_is_kept(path: Path) -> None:
    before = os.umask(0)
    try:
        FileLock(path).release()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("a slot's tensors")
    FileLock(path).release()
    assert path.read_text() == "a slot's tensors"


def test_lock_is_current_while_its_file_is_under_its_name(path: Path) -> None:
    lock = FileLock(path)
    assert lock.is_current
    path.unlink()
    assert not lock.is_current
    path.touch()
    assert not lock.is_current, "another file of that name"
    again = FileLock(path)
    assert again.is_current
    again.release()
    assert not again.is_current
    lock.release()


def test_remove_unused_leaves_what_somebody_else_uses(tmp_path: Path) -> None:
    directory = tmp_path / "slots"
    directory.mkdir()
    (directory / "slot").touch()
    mine, theirs = FileLock(directory / "users"), FileLock(directory / "users")
    assert theirs.try_to(share=True)
    assert not remove_unused(directory, mine)
    assert (directory / "slot").exists()
    theirs.release()
    assert remove_unused(directory, mine)
    assert list(tmp_path.iterdir()) == []
    directory.mkdir()  # somebody's who came afterwards
    (directory / "users").touch()
    assert not remove_unused(directory, mine)
    assert (directory / "users").exists()
    mine.release()


def test_remove_unused_keeps_newcomers_out_from_the_first_moment(tmp_path: Path) -> None:
    """Who joins while it is being removed makes a directory of its own, which stays."""
    directory = tmp_path / "slots"
    directory.mkdir()
    mine = FileLock(directory / "users")

    def join(gone: Path, **_: object) -> None:
        directory.mkdir()
        FileLock(directory / "users").release()
        rmtree(gone)

    rmtree = shutil.rmtree
    with mock.patch.object(shutil, "rmtree", join):
        assert remove_unused(directory, mine)
    assert [path.name for path in tmp_path.rglob("*")] == ["slots", "users"]
    mine.release()
