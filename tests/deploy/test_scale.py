"""Which run `tandem scale` means, and what it says; a launcher is a lock and two files here. Runs: test_cli.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.runs import running_runs
from deploy.scale import LocalRun, describe, find_run, follow
from protocol import rundir
from protocol.errors import RecipeError
from protocol.rundir import RunDir
from protocol.scaling import Member, Wish, read_wish, write_members, write_wish
from tests.actor_harness import until


def make_run(runs: Path, name: str, wanted: int | None = 1) -> RunDir:
    run = RunDir((runs / name).resolve()).create()
    run.recipe.write_text("")
    if wanted is not None:
        write_wish(run, Wish(wanted, "the recipe"))
    return run


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunDir]:
    """A run with a launcher, beside one that has ended."""
    make_run(tmp_path, "ended")
    run = make_run(tmp_path, "alive")
    with run.lock("launcher"):
        yield run


def test_find_run_takes_a_name_a_path_or_the_only_one(running: RunDir, tmp_path: Path) -> None:
    for name in ("", "alive", str(running.path)):
        assert find_run(name, tmp_path) == running
    assert running_runs(tmp_path) == [running]


def test_find_run_names_what_runs_when_it_is_not_clear(running: RunDir, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no run 'demo' under .* \(running: alive\)"):
        find_run("demo", tmp_path)
    with pytest.raises(RecipeError, match=r"ended is not running: nobody would start its actors \(running: alive\)"):
        find_run("ended", tmp_path)
    with (
        make_run(tmp_path, "other").lock("launcher"),
        pytest.raises(RecipeError, match=r"2 runs under .* are running, expected one or a name \(running: alive, oth"),
    ):
        find_run("", tmp_path)


def test_find_run_says_that_none_is_running(tmp_path: Path) -> None:
    make_run(tmp_path, "ended")
    with pytest.raises(RecipeError, match=r"0 runs under .* \(none is running\)"):
        find_run("", tmp_path)


def test_asking_who_runs_does_not_keep_a_launcher_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_held` takes the lock for a moment: a launcher that starts then waits for it instead of giving up."""
    monkeypatch.setattr(rundir, "ASKED_S", 5.0)  # here somebody asks without a pause
    run = make_run(tmp_path, "starting")
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            run.is_held("launcher")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(50):
            with run.lock("launcher"):
                assert run.is_held("launcher")
    finally:
        stop.set()
        asking.join()
    with run.lock("launcher"), pytest.raises(RecipeError, match="in use by process"), run.lock("launcher"):
        pass


def test_wish_of_a_local_run_is_written_and_the_one_before_told(running: RunDir) -> None:
    assert LocalRun(running).leave_wish(Wish(3, "tandem scale")) == 1
    assert read_wish(running) == Wish(3, "tandem scale")


def test_run_that_draws_nothing_is_not_scaled(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", wanted=None)
    with pytest.raises(RecipeError, match="sft has no rollout actors"):
        LocalRun(run).leave_wish(Wish(2, "tandem scale"))


def test_describe_says_where_an_actor_is_and_what_it_waits_for() -> None:
    assert describe(Member("actor-0", "running", "10.0.0.1", phase="loading weights")) == (
        "actor-0 loading weights on 10.0.0.1"
    )
    assert describe(Member("actor-1", "pending", why="no room")) == "actor-1 pending: no room"


@contextlib.contextmanager
def following(run: RunDir, count: int, until_served: bool) -> Iterator[tuple[list[str], list[bool]]]:
    """`follow` in a thread: the lines that it has said so far, and its result."""
    lines: list[str] = []
    result: list[bool] = []
    thread = threading.Thread(
        target=lambda: result.append(follow(LocalRun(run), count, lines.append, until_served, 30.0))
    )
    thread.start()
    yield lines, result
    thread.join(60)
    assert not thread.is_alive()


def test_follow_ends_when_all_serve_and_the_surplus_is_gone(running: RunDir) -> None:
    serving = Member("actor-0", "running", "10.0.0.1", phase="serving")
    write_members(running, [serving, Member("actor-1", "leaving", "10.0.0.1")])
    with following(running, 1, until_served=True) as (lines, result):
        until(lambda: len(lines) == 2)
        assert lines == ["actor-0 serving on 10.0.0.1", "actor-1 leaving on 10.0.0.1"]
        write_members(running, [serving])
    assert lines[2:] == ["actor-1: gone"]
    assert result == [True]


def test_follow_does_not_wait_for_room_unless_told(running: RunDir) -> None:
    write_members(running, [Member("actor-0", "pending", why="it needs 1 GPU")])
    with following(running, 1, until_served=False) as (lines, result):
        pass
    assert lines == ["actor-0 pending: it needs 1 GPU"]
    assert result == [False]
    with following(running, 1, until_served=True) as (lines, result):
        until(lambda: lines)
        write_members(running, [Member("actor-0", "running", "10.0.0.1", phase="serving")])
    assert lines[1:] == ["actor-0 serving on 10.0.0.1"]
    assert result == [True]
