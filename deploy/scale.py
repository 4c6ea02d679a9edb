"""`tandem scale`: finds a running run, says how many actors it is to have, and shows what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from protocol.errors import RecipeError
from protocol.rundir import RunDir
from protocol.scaling import Member, Wish, actor_number, read_members, read_wish, write_wish

POLL_S = 0.2
SETTLE_S = 4.0
"""Longer than a launcher takes to notice a wish and to see whether there is room."""


def find_run(name: str, runs: Path) -> RunDir:
    """The running run of a name or path, or the only one that is running under `runs`.

    Raises RecipeError, naming the runs that there are, if it is none or not one.
    """
    if name:
        run = next((RunDir(path.resolve()) for path in (runs / name, Path(name)) if path.is_dir()), None)
        if run is None:
            raise RecipeError(f"scale: no run {name!r} under {runs}{_running(runs)}")
        if not run.is_held("launcher"):
            raise RecipeError(f"scale: {run.path} is not running: nobody would start its actors{_running(runs)}")
        return run
    found = running_runs(runs)
    if len(found) != 1:
        raise RecipeError(f"scale: {len(found)} runs under {runs} are running, expected one or a name{_running(runs)}")
    return found[0]


def running_runs(runs: Path) -> list[RunDir]:
    """Runs whose launcher is alive, by name."""
    candidates = [RunDir(path.resolve()) for path in sorted(runs.glob("*/")) if (path / "recipe.toml").is_file()]
    return [run for run in candidates if run.is_held("launcher")]


def _running(runs: Path) -> str:
    names = ", ".join(run.path.name for run in running_runs(runs))
    return f" (running: {names})" if names else " (none is running)"


def scale(name: str, runs: Path, count: int) -> tuple[RunDir, int]:
    """Write the wish of a running run (see `find_run`); returns it, and how many actors it wanted before.

    Raises RecipeError for a run that draws nothing from its model."""
    run = find_run(name, runs)
    before = read_wish(run)
    if before is None:
        raise RecipeError(f"scale: {run.path} has no rollout actors: its method draws nothing from the model")
    write_wish(run, Wish(count, "tandem scale"))
    return run, before.actors


def start_line(run: RunDir, before: int, count: int) -> str:
    return f"{run.path.name}: {before} -> {count} actors"


def follow(run: RunDir, count: int, say: Callable[[str], None], until_served: bool, timeout_s: float) -> bool:
    """Say what becomes of each actor, until all that are wanted are placed (`until_served`: serve) and the surplus is
    gone; without `until_served` also when it is known that there is no room. Returns whether that was reached."""
    began = time.monotonic()
    said: dict[str, str] = {}
    while True:
        members = {member.name: member for member in read_members(run)}
        lines = {name: describe(member) for name, member in members.items()}
        lines |= {name: f"{name}: gone" for name in said if name not in members}
        for name, line in lines.items():
            silent = name in members and members[name].state == "pending" and not members[name].why
            if said.get(name) != line and not silent:
                said[name] = line
                say(line)
        waited = time.monotonic() - began
        if _reached(count, members.values(), until_served):
            return True
        settled = waited > SETTLE_S and not until_served and all(_known(m, count) for m in members.values())
        if settled or waited > timeout_s or not run.is_held("launcher"):
            return False
        time.sleep(POLL_S)


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
