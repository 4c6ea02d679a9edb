"""Says which side holds a run up, and what to change: out of samples, by what both sides waited for. Pure.

If n actors were busy for a share b of a time in which the learner waited for groups for a share w, then

    load = n * b / (1 - w)

actors that never rest would keep a learner that never waits supplied, and m actors would make the run

    speedup(m) = 1 / max(1 - w, n * b / m + r)

times as fast. r is what actors rest for although the learner waits, 1 - b: both sides wait in turn then, as with
`rollout.max_lag = 0`, and that stays whoever comes. Of a learner that does not wait r is 0: there actors rest because
they are too fast. All this holds as long as tickets wait for room in the actors. Where actors have room and no ticket
may be issued, more of them would only share the same tickets: then that is what is said. Called by `telemetry.py`;
`deploy/autoscale.py` uses the same arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from learner.telemetry.sample import SERVING, ActorSample, Advice, Sample

WINDOW_S = 120.0
"""How far back is looked at most."""
SHORTEST_WINDOW_S = 5.0
WAITS = 0.1
"""Share of its time that the learner must wait before it is said to wait."""
RESTS = 0.8
"""Busy share of the actors below which they are said to rest."""
PAUSES = 0.15
"""Share of its time that the side which holds the run up spends on weights, from which on these are the bottleneck."""
GROWTH = 2
"""At most so many times as many actors are advised: what is measured far away from the goal is inexact."""
SMALLEST_SHARE = 1e-3
ROUNDING = 0.1
"""An actor more is not advised for less than this share of its work."""


def load(actors: float, busy: float, waiting: float) -> float:
    """Actors that never rest and would keep a learner that never waits supplied."""
    return actors * busy / max(1.0 - waiting, SMALLEST_SHARE)


def speedup(actors: float, busy: float, waiting: float, more: float) -> float:
    """Throughput with `more` actors in all, divided by that with `actors`, which were `busy` for that share."""
    resting = 1.0 - busy if waiting > WAITS else 0.0
    return 1.0 / max(1.0 - waiting, actors * busy / more + resting, SMALLEST_SHARE) if more else 0.0


@dataclass(frozen=True)
class Shares:
    """What two samples of the same actors say of the time between them."""

    seconds: float
    """Of the learner's time, evaluations and the like left out."""
    actors: int
    """That served all the time."""
    waiting: float
    """Share of the learner's time, for groups."""
    publishing: float
    """Share of the learner's time."""
    busy: float
    """Share of the actors' time, with requests in the engine."""
    paused: float
    """Share of the actors' time, for updates."""
    backlog: float
    """Tickets that waited for room, mean."""
    held: float
    """Tickets in the actors' hands, mean."""

    @classmethod
    def of(cls, samples: deque[Sample]) -> Shares:
        """The first against the last; levels are means over all."""
        first, last = samples[0], samples[-1]
        spent = {name: seconds - first.phases.get(name, 0.0) for name, seconds in last.phases.items()}
        seconds = sum(spent.get(name, 0.0) for name in ("waiting", "training", "publishing", "saving", "other"))
        names = [name for name in _serving(last) if name in first.actors]
        served = sum(_passed(first, last, name, "serving_s") for name in names)
        waited = last.waits.get("groups", 0.0) - first.waits.get("groups", 0.0)

        def of_actors(what: str) -> float:
            return min(1.0, sum(_passed(first, last, name, what) for name in names) / served) if served > 0 else 0.0

        return cls(
            seconds=seconds,
            actors=len(names),
            waiting=min(1.0, waited / seconds) if seconds > 0 else 0.0,
            publishing=min(1.0, spent.get("publishing", 0.0) / seconds) if seconds > 0 else 0.0,
            busy=of_actors("busy_s"),
            paused=of_actors("paused_s"),
            backlog=sum(sample.backlog for sample in samples) / len(samples),
            held=sum(actor.held for sample in samples for actor in sample.actors.values()) / len(samples),
        )


def _serving(sample: Sample) -> list[str]:
    return [name for name, actor in sample.actors.items() if actor.state in SERVING]


def _passed(first: Sample, last: Sample, actor: str, what: str) -> float:
    before, after = (float(getattr(sample.actors[actor], what)) for sample in (first, last))
    return max(0.0, after - before)


def advise(shares: Shares) -> Advice:
    """What these shares mean, in one line, with what a change would bring."""
    n, waiting, busy = shares.actors, shares.waiting, shares.busy
    if (shares.paused if waiting > WAITS else shares.publishing) > PAUSES:
        return _advice("weights", shares, _weights_text(shares))
    if waiting > WAITS:
        useful = math.floor(n * (1 + shares.backlog / max(shares.held, 1.0)) + ROUNDING)
        more = min(math.ceil(load(n, busy, waiting) - ROUNDING), GROWTH * n, useful)
        if more <= n:
            return _advice("lag", shares, _lag_text(shares))
        gain = speedup(n, busy, waiting, more)
        what = f"{more - n} more actor{'s' if more - n > 1 else ''} would help, about {gain:.1f}×"
        return _advice("rollout", shares, f"rollout-bound {waiting:.0%}: {what}", more, gain)
    if busy < RESTS:
        enough = max(1, math.ceil(load(n, busy, waiting)))
        spare = f"{enough} of {n} actors would do" if enough < n else "the learner's speed is what counts"
        text = f"learner-bound {1 - waiting:.0%}: actors rest {1 - busy:.0%} of the time, {spare}"
        return _advice("learner", shares, text, enough, speedup(n, busy, waiting, enough))
    return _advice("balanced", shares, f"balanced: the learner waits {waiting:.0%}, the actors rest {1 - busy:.0%}")


def _lag_text(shares: Shares) -> str:
    return (
        f"rollout-bound {shares.waiting:.0%}, but no ticket waits for an actor: more of them would only share the same"
        " tickets; a larger rollout.max_lag or rollout.groups_per_step gives them more"
    )


def _weights_text(shares: Shares) -> str:
    return (
        f"weights-bound: training stands still for {shares.publishing:.0%} of the time to publish versions, generation"
        f" for {shares.paused:.0%} to load them; larger steps (rollout.groups_per_step) need fewer"
    )


def _advice(side: str, shares: Shares, text: str, actors: int = 0, gain: float = 1.0) -> Advice:
    return Advice(side, text, shares.waiting, shares.busy, actors or shares.actors, gain)  # type: ignore[arg-type]


class Advisor:
    """Sees one sample after another. While actors come or go, or evaluations run, it measures nothing: it begins anew
    with the actors that are there."""

    def __init__(self) -> None:
        self._window: deque[Sample] = deque()
        self._last: Advice | None = None

    def see(self, sample: Sample) -> Advice | None:
        """The verdict on the last while; None before there is one."""
        if sample.phase in ("starting", "evaluating", "finished") or not _serving(sample):
            self._window.clear()
            return self._last  # of a run that has ended it is the last word
        if self._window and not _comparable(self._window[-1], sample):
            self._window.clear()
            self._last = None
        self._window.append(sample)
        while sample.t - self._window[0].t > WINDOW_S:
            self._window.popleft()
        shares = Shares.of(self._window)
        if shares.seconds >= SHORTEST_WINDOW_S and shares.actors:
            self._last = advise(shares)
        return self._last


def _comparable(before: Sample, now: Sample) -> bool:
    """Whether the same processes were at work at both times."""

    def swaps(sample: Sample) -> dict[str, ActorSample]:
        return {name: actor for name, actor in sample.actors.items() if actor.state in SERVING}

    old, new = swaps(before), swaps(now)
    restarted = any(new[name].serving_s < old[name].serving_s for name in old.keys() & new.keys())
    return before.process == now.process and old.keys() == new.keys() and not restarted
