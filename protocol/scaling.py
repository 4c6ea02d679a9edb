"""How many actors a run wants, and how each of them gets on: two files of the run directory, and who reads them.

`scale.json` is the wish: written by the launcher at the start, by `tandem scale` and by autoscaling. The learner reads
it and drains the actors beyond it, the launcher reads it and has actors started and removed. `actors.json` is what the
launcher sees of each: the learner reads there why nobody comes, people read it through `tandem scale`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from protocol.rundir import RunDir, read_json, write_json

ACTOR_PREFIX = "actor-"
SCALED_DOWN = "scaled down"
"""How the reason of a `Drain` begins that sends a surplus actor home: one that left for it may be started again."""

SERVING = "serving"
MemberState = Literal["pending", "starting", "running", "leaving", "refused", "failed"]
"""pending: the cluster has no room; starting: placed, its process does not answer yet; running: its process answers
(the learner says what it does); leaving: it finishes what it holds, or has done so; refused: by the learner; failed:
its process cannot even start."""


@dataclass(frozen=True)
class Wish:
    """How many actors are wanted, and who said so."""

    actors: int
    by: str


@dataclass(frozen=True)
class Member:
    """One actor of the launcher's, as it is seen from outside."""

    name: str
    state: MemberState
    node: str = ""
    """Address of the machine that it is on; "" while it is on none."""
    why: str = ""
    """What it waits for, or why it was refused or failed."""
    phase: str = ""
    """What it does, by its own word (`Heartbeat.phase`)."""

    @property
    def serves(self) -> bool:
        """Whether it has loaded weights, and so may be given tickets."""
        return self.state == "running" and self.phase == SERVING


def actor_name(number: int) -> str:
    """Name of the launcher's actor of a number, which counts from 0."""
    return f"{ACTOR_PREFIX}{number}"


def actor_number(name: str) -> int | None:
    """Number of one of the launcher's actors; None for a name that somebody else has given."""
    digits = name.removeprefix(ACTOR_PREFIX)
    return int(digits) if digits != name and digits.isdecimal() and digits.isascii() else None


def write_wish(run: RunDir, wish: Wish) -> None:
    write_json(run.scale, asdict(wish))


def read_wish(run: RunDir) -> Wish | None:
    """None where nobody manages the run's actors: they are started by hand."""
    found = read_json(run.scale)
    return Wish(int(found["actors"]), str(found["by"])) if found else None


def write_members(run: RunDir, members: Iterable[Member]) -> None:
    write_json(run.actors, [asdict(member) for member in members])


def read_members(run: RunDir) -> list[Member]:
    return [Member(**entry) for entry in read_json(run.actors) or ()]
