"""Makes the actors of a run as many as are wanted, and says how each of them gets on.

`Fleet` knows numbers, states and deadlines, and no Ray: `deploy/ray_cluster.py` starts, looks at and removes actors for
it, a fake does in tests. The launcher calls `reconcile` a few times a second. Sending a surplus actor home is the
learner's part (`learner/intake/scaling.py`): here it is removed when it has left, or when it has not in time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from protocol.scaling import SCALED_DOWN, Member, MemberState, actor_name

Handle = TypeVar("Handle")

KILL_GRACE_S = 30.0
"""Beyond `actor.drain_s`: an actor that is told to drop everything needs this to stop its engine."""
RETRY_S = 30.0
"""After this an actor that was refused, or whose process cannot start, is tried again."""
LOOK_S = 0.5
PENDING_SAID_S = 3.0
"""A cluster with room places an actor sooner than this; only then is it worth a line that one waits."""


@dataclass(frozen=True)
class Sight:
    """What the cluster says of one actor now."""

    state: Literal["pending", "starting", "running", "left", "refused", "failed"]
    node: str = ""
    why: str = ""
    """What is missing, why it left, was refused or failed."""
    working: bool = False
    """Whether it has an engine, and so perhaps tickets."""
    phase: str = ""
    """What it does, by its own word."""


class Cluster(Protocol[Handle]):
    """Where actors run. No call waits."""

    def start(self, number: int) -> Handle: ...

    def look(self, handle: Handle) -> Sight: ...

    def remove(self, handle: Handle) -> None: ...


@dataclass
class _Entry(Generic[Handle]):
    handle: Handle
    started_at: float
    surplus_since: float = 0.0
    sight: Sight = Sight("pending")
    said: tuple[str, str] = ("", "")

    def replaceable(self, now: float) -> bool:
        """Whether a new one is to take its place: it was surplus for a moment, its process could not start, or the
        learner refused it, as a successor whom a zombie of its name has displaced after a crash of the learner."""
        if self.sight.state in ("failed", "refused"):
            return now - self.started_at > RETRY_S
        return self.sight.state == "left" and self.sight.why.startswith(SCALED_DOWN)


class Fleet(Generic[Handle]):
    """The launcher's actors, by number."""

    def __init__(self, cluster: Cluster[Handle], drain_s: float, note: Callable[[str], None]) -> None:
        """`note`: takes a line for people."""
        self.cluster, self.drain_s, self.note = cluster, drain_s, note
        self._entries: dict[int, _Entry[Handle]] = {}
        self._wanted = 0
        self._looked = 0.0

    def reconcile(self, wanted: int, now: float) -> bool:
        """Start what is missing, remove what has left. Returns whether anything was looked at."""
        if wanted == self._wanted and now - self._looked < LOOK_S:
            return False
        self._wanted, self._looked = wanted, now
        for number, entry in list(self._entries.items()):
            entry.sight = self.cluster.look(entry.handle)
            if number >= wanted:
                self._see_off(number, entry, now)
            else:
                entry.surplus_since = 0.0
                if entry.replaceable(now):
                    self._remove(number)
        for number in range(wanted):
            if number not in self._entries:
                self._entries[number] = _Entry(self.cluster.start(number), now)
        for number, entry in self._entries.items():
            self._say(number, entry, now)
        return True

    def _see_off(self, number: int, entry: _Entry[Handle], now: float) -> None:
        """Remove a surplus actor at once if it holds nothing, else when it has left or its time is over."""
        entry.surplus_since = entry.surplus_since or now
        waited_s = now - entry.surplus_since
        if entry.sight.state in ("left", "refused", "failed") or not entry.sight.working:
            self._remove(number)
            self.note(f"{actor_name(number)} is gone")
        elif waited_s > self.drain_s + KILL_GRACE_S:
            self._remove(number)
            self.note(f"{actor_name(number)} did not leave within {waited_s:.0f} s: killed, its tickets go back")

    def _remove(self, number: int) -> None:
        self.cluster.remove(self._entries.pop(number).handle)

    def _say(self, number: int, entry: _Entry[Handle], now: float) -> None:
        """One line when an actor begins to wait for room, when it was refused, and when a wait has ended."""
        sight, name = entry.sight, actor_name(number)
        key = (sight.state, sight.why)
        if key == entry.said or (sight.state == "pending" and now - entry.started_at < PENDING_SAID_S):
            return
        before, entry.said = entry.said[0], key
        if sight.state == "pending":
            self.note(f"{name} is pending: {sight.why}")
        elif sight.state in ("refused", "failed"):
            self.note(f"{name} {'was refused' if sight.state == 'refused' else 'failed'}: {sight.why}")
        elif before == "pending":
            self.note(f"{name} has found room on {sight.node}")

    def members(self) -> list[Member]:
        """All actors, in order of number."""
        return [self._member(number, entry) for number, entry in sorted(self._entries.items())]

    def _member(self, number: int, entry: _Entry[Handle]) -> Member:
        sight = entry.sight
        state: MemberState = "leaving" if entry.surplus_since or sight.state == "left" else sight.state
        return Member(actor_name(number), state, sight.node, sight.why, sight.phase)

    def close(self) -> None:
        """Remove all."""
        for number in list(self._entries):
            self._remove(number)
