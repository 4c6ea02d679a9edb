"""What the intake thread makes of the wish for actors: who is surplus, and whether an absence is anybody's fault.

Reads the run directory's two files (`protocol/scaling.py`) now and then. Knows no socket: `server.py` sends surplus
actors home, `source.py` lets no deadline pass while nobody can come.
"""

from __future__ import annotations

import contextlib

from protocol.messages import Drain
from protocol.rundir import RunDir
from protocol.scaling import SCALED_DOWN, Member, actor_number, read_members, read_wish

LOOK_S = 0.25


class ScaleWatch:
    """The wish as it was read last. Without a run directory, or without a wish in it, nobody is surplus."""

    def __init__(self, run: RunDir | None = None, drain_s: float = 60.0) -> None:
        """`drain_s`: seconds in which a surplus actor may finish what it holds."""
        self.run, self.drain_s = run, drain_s
        self.wanted: int | None = None
        self.members: list[Member] = []
        self._looked = 0.0

    def look(self, now: float) -> None:
        """Read both files, at most every LOOK_S. What cannot be read leaves the wish as it was."""
        if self.run is None or now - self._looked < LOOK_S:
            return
        self._looked = now
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            wish = read_wish(self.run)
            self.wanted = wish.actors if wish else None
            self.members = read_members(self.run) if wish else []

    def order(self, actor: str, given: Drain | None, given_s: float) -> Drain | None:
        """What a connected actor is to be told: nothing, to finish and leave, or to leave at once.

        `given`: what it was told last, `given_s` seconds ago. Nobody is called back who was sent home: a new process
        takes the place."""
        if given is not None:
            late = given.finish and given_s > self.drain_s
            return Drain(f"{given.reason}, and not done after {self.drain_s:g} s") if late else given
        number = actor_number(actor)
        if self.wanted is None or number is None or number < self.wanted:
            return None
        return Drain(f"{SCALED_DOWN} to {self.wanted} actors", finish=True)

    def excuse(self) -> str:
        """Why no actor is there, if that is as it has to be; "" if one should come."""
        if self.wanted == 0:
            return "no actor is wanted; `tandem scale N` brings some"
        if not self.members or any(member.state in ("starting", "running") for member in self.members):
            return ""
        return "; ".join(f"{member.name} is {member.state}: {member.why}" for member in self.members)
