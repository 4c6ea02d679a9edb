"""`tandem scale`: finds a running run, says how many actors it is to have, and shows what becomes of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from deploy.runs import named_run, running_runs
from protocol.errors import RecipeError
from protocol.rundir import RunDir
from protocol.scaling import Member, Wish, actor_number, read_members, read_wish, write_wish

MAX_ACTORS = 4096
"""More is a slip of the keyboard: each would be a process."""
POLL_S = 0.2
SETTLE_S = 4.0
"""Longer than a launcher takes to notice a wish and to see whether there is room."""


class RunningRun(Protocol):
    """What `tandem scale` needs of a run, wherever it is."""

    name: str

    def leave_wish(self, wish: Wish) -> int:
        """Returns how many actors were wanted before."""

    def members(self) -> list[Member] | None:
        """None when the run has ended."""


def find_run(name: str, runs: Path) -> RunDir:
    """The running run of a name or path, or the only one that is running under `runs`.

    Raises RecipeError, naming the runs that there are, if it is none or not one.
    """
    if name:
        run = named_run(name, runs)
        if run is None:
            raise RecipeError(f"scale: no run {name!r} under {runs}{_running(runs)}")
        if not run.is_held("launcher"):
            raise RecipeError(f"scale: {run.path} is not running: nobody would start its actors{_running(runs)}")
        return run
    found = running_runs(runs)
    if len(found) != 1:
        raise RecipeError(f"scale: {len(found)} runs under {runs} are running, expected one or a name{_running(runs)}")
    return found[0]


def _running(runs: Path) -> str:
    names = ", ".join(run.path.name for run in running_runs(runs))
    return f" (running: {names})" if names else " (none is running)"


class LocalRun:
    """A run whose directory this machine sees."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.name = run, run.path.name

    def leave_wish(self, wish: Wish) -> int:
        """Write the wish; returns how many actors were wanted before. Raises RecipeError for a run without actors."""
        before = read_wish(self.run)
        if before is None:
            raise RecipeError(f"scale: {self.run.path} has no rollout actors: its method draws nothing from the model")
        write_wish(self.run, wish)
        return before.actors

    def members(self) -> list[Member] | None:
        """None when the run has ended."""
        return read_members(self.run) if self.run.is_held("launcher") else None


@contextlib.contextmanager
def running_run(name: str, runs: Path, ray_address: str) -> Iterator[RunningRun]:
    """A run that goes on: of a directory, or with an address of a Ray cluster. Raises as `find_run`."""
    if ray_address:
        from deploy.desk import remote_run

        with remote_run(ray_address, name) as run:
            yield run
    else:
        yield LocalRun(find_run(name, runs))


def follow(run: RunningRun, count: int, say: Callable[[str], None], until_served: bool, timeout_s: float) -> bool:
    """Say what becomes of each actor, until all that are wanted are placed (`until_served`: serve) and the surplus is
    gone; without `until_served` also when it is known that there is no room. Returns whether that was reached."""
    began = time.monotonic()
    said: dict[str, str] = {}
    while True:
        waited = time.monotonic() - began
        members = run.members()
        if members is None or waited > timeout_s:
            return False
        for line in _news(members, said):
            say(line)
        if _reached(count, members, until_served):
            return True
        if waited > SETTLE_S and not until_served and all(_known(member, count) for member in members):
            return False
        time.sleep(POLL_S)


def _news(members: Iterable[Member], said: dict[str, str]) -> Iterator[str]:
    """Lines for what has changed since `said`, which is brought up to date."""
    now = {member.name: describe(member) for member in members if member.state != "pending" or member.why}
    now |= {name: f"{name}: gone" for name in said if name not in {member.name for member in members}}
    for name, line in now.items():
        if said.get(name) != line:
            said[name] = line
            yield line


def describe(member: Member) -> str:
    """One line: state, or what it does if it runs, place, and what it waits for."""
    where = f" on {member.node}" if member.node else ""
    why = f": {member.why}" if member.why else ""
    return f"{member.name} {member.phase if member.state == 'running' else member.state}{where}{why}"


def _reached(count: int, members: Iterable[Member], until_served: bool) -> bool:
    found = {actor_number(member.name): member for member in members}
    if set(found) != set(range(count)):
        return False
    if until_served:
        return all(member.serves for member in found.values())
    return all(member.state in ("starting", "running") for member in found.values())


def _known(member: Member, count: int) -> bool:
    """Whether nothing more is to be expected of an actor soon."""
    return member.state != "leaving" and (actor_number(member.name) or 0) < count
