"""How many actors a run should have, from the measured waiting of both sides. Pure: figures in, proposals out.

The learner waits for groups while there are too few actors; actors stand idle, held back by `rollout.max_lag`, while
there are too many. How much work there is for actors is the advisor's arithmetic (`learner/telemetry/advisor.py`).
`crew.py` asks once a step and writes the wish.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from learner.telemetry.advisor import load
from protocol.sections import AutoscaleConfig

TARGET_BUSY = 0.9
"""Share of the time that actors are meant to be busy: groups are of uneven length."""
UP_WAIT = 0.1
"""Share of its time that the learner must wait before more actors are proposed."""
DOWN_BUSY = 0.8
"""Fewer are proposed only if they would then be busy for no more than this: less than what asks for more again."""
SHORTEST_WORK = 1e-3
GROWTH = 2
"""At most so many times as many actors by one proposal: what is measured far away from the goal is inexact."""


@dataclass(frozen=True)
class StepTimes:
    """One step as both sides saw it."""

    step: int
    step_s: float
    wait_s: float
    """Of `step_s`, the learner waited for groups."""
    busy_share: float
    """Of the time that actors served, they had requests in their engines."""
    serving: int
    """Actors that served at its end."""

    @classmethod
    def of(cls, status: Mapping[str, Any]) -> StepTimes | None:
        """Out of the learner's status.json; None before the first step."""
        try:
            return cls(
                int(status["step"]), float(status["step_s"]), float(status["wait_s"]),
                float(status["actors_busy_share"]), int(status["actors_serving"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True)
class Proposal:
    actors: int
    reason: str


class Autoscaler:
    """Sees one step after another. Hysteresis: a window of steps, the same answer several times, a gap between the
    load that asks for more actors and the one that asks for fewer; after a change it begins anew."""

    def __init__(self, config: AutoscaleConfig) -> None:
        self.config = config
        self._window: deque[StepTimes] = deque(maxlen=config.window_steps)
        self._answers: deque[int] = deque(maxlen=config.patience)
        """Directions of the last answers: -1, 0, 1."""
        self._last_step = -1

    def see(self, times: StepTimes, wanted: int) -> Proposal | None:
        """A proposal, if this step gives reason for one. While not all `wanted` actors serve, nothing is measured."""
        if times.step == self._last_step:
            return None
        self._last_step = times.step
        if times.serving != wanted or not wanted:
            self._begin_anew()
            return None
        self._window.append(times)
        if len(self._window) < self.config.window_steps:
            return None
        proposal = self._propose(wanted)
        self._answers.append((proposal.actors > wanted) - (proposal.actors < wanted))
        if abs(sum(self._answers)) < self.config.patience:
            return None
        self._begin_anew()
        return proposal

    def _begin_anew(self) -> None:
        self._window.clear()
        self._answers.clear()

    def _propose(self, actors: int) -> Proposal:
        step_s = sum(times.step_s for times in self._window)
        waited = sum(times.wait_s for times in self._window) / max(step_s, SHORTEST_WORK)
        busy = sum(times.busy_share * times.step_s for times in self._window) / max(step_s, SHORTEST_WORK)
        work = load(actors, busy, waited)
        wanted = math.ceil(work / TARGET_BUSY - 1e-9)
        if wanted > actors and waited > UP_WAIT:
            wanted = min(wanted, GROWTH * actors)
        elif wanted < actors and work <= DOWN_BUSY * (actors - 1):
            wanted = max(wanted, math.ceil(work / DOWN_BUSY - 1e-9))
        else:
            wanted = actors
        wanted = min(max(wanted, self.config.min_actors), self.config.max_actors)
        return Proposal(
            wanted,
            f"in {len(self._window)} steps the learner waited {waited:.0%} of the time and the actors were busy"
            f" {busy:.0%}: work for {work:.1f} actors",
        )
