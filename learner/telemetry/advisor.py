"""Says which side holds a run up, and what to change: out of samples, by what both sides waited for. Pure.

If n actors were busy for a share b of a time in which the learner waited for groups for a share w, then

    load = n * b / (1 - w)

actors that never rest would keep a learner that never waits supplied, and m actors would make the run

    speedup(m) = 1 / max(1 - w, n * b / m + r)

times as fast. r is what actors rest for although the learner waits, 1 - b: both sides wait in turn then, as with
`rollout.max_lag = 0`, and that stays whoever comes. Of a learner that does not wait r is 0: there actors rest because
they are too fast. All this holds as long as tickets wait for room in the actors. Where actors have room and no ticket
may be issued, more of them would only share the same tickets: then that is what is said.

Of a part of a step all this says nothing: while both sides work in turn, each of them is all there is for half the
time. So only whole steps are measured (`Window`). Called by `telemetry.py`; `deploy/autoscale.py` uses the same
arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from learner.telemetry.sample import SERVING, ActorSample, Advice, Sample

WINDOW_S = 120.0
"""How far back is looked, or WHOLE_STEPS, whichever is longer."""
SHORTEST_WINDOW_S = 5.0
WHOLE_STEPS = 2
"""Fewest that are measured. One alone may be the odd one, of a checkpoint or a straggler; and with `rollout.max_lag`
long and short waits can take turns. No more: of steps of ten minutes these are twenty until there is advice."""
SHORTEST_SAMPLES = 10
"""Fewest samples that a window consists of. A step's end is known as the first sample behind it, so both ends of the
window may be off by the time between two of them."""
KEPT = 24
"""About so many ends of steps are kept of a window that has more: a sample of 512 actors is 150 kB."""
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
    def between(cls, first: Sample, last: Sample, backlog: float, held: float) -> Shares:
        """What counts and seconds have grown by; levels are means over the samples between."""
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
            backlog=backlog,
            held=held,
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


@dataclass(frozen=True)
class _Mark:
    """The first sample behind the end of a step, and sums over all samples of the window up to it."""

    sample: Sample
    samples: int
    backlog: int
    held: int


class Window:
    """The last whole steps: from the end of one to the end of another. Not for several threads."""

    def __init__(self, longest_s: float = WINDOW_S) -> None:
        """`longest_s`: as WINDOW_S."""
        self.longest_s = longest_s
        self.shares: Shares | None = None
        """Of the steps that it holds; None until they are enough."""
        self._marks: deque[_Mark] = deque()
        self.clear()

    def clear(self) -> None:
        """Begin anew, with the first step that begins from now on."""
        self._marks.clear()
        self._newest: Sample | None = None
        self._sums = (0, 0, 0)
        self.shares = None

    @property
    def steps(self) -> int:
        """Whole steps that it holds."""
        return self._marks[-1].sample.step - self._marks[0].sample.step if self._marks else 0

    @property
    def overdue(self) -> bool:
        """Whether the step under way takes longer than all that the window holds: nothing is as it was any more."""
        if self._newest is None or not self._marks:
            return False
        first, last = self._marks[0].sample, self._marks[-1].sample
        return _seconds(last, self._newest) > max(self.longest_s, _seconds(first, last))

    def see(self, sample: Sample) -> None:
        """The next sample, of the same actors."""
        before, self._newest = self._newest, sample
        held = sum(actor.held for actor in sample.actors.values())
        self._sums = (self._sums[0] + 1, self._sums[1] + sample.backlog, self._sums[2] + held)
        if before is not None and sample.step != before.step:
            self._mark(_Mark(sample, *self._sums))

    def _mark(self, mark: _Mark) -> None:
        """A step has ended: the window does, too, and begins as late as it may."""
        marks = self._marks
        if len(marks) > 1 and _seconds(marks[-2].sample, mark.sample) < self.longest_s / KEPT:
            marks.pop()
        marks.append(mark)
        while len(marks) > 2 and self._is_whole(marks[1], mark, self.longest_s):
            marks.popleft()
        first = marks[0]
        if self._is_whole(first, mark, min(self.longest_s, SHORTEST_WINDOW_S)):
            samples = mark.samples - first.samples
            backlog, held = (mark.backlog - first.backlog) / samples, (mark.held - first.held) / samples
            self.shares = Shares.between(first.sample, mark.sample, backlog, held)

    @staticmethod
    def _is_whole(first: _Mark, last: _Mark, seconds: float) -> bool:
        """Whether what is between two ends of steps is enough to be measured."""
        return (
            last.sample.step - first.sample.step >= WHOLE_STEPS
            and last.samples - first.samples >= SHORTEST_SAMPLES
            and _seconds(first.sample, last.sample) >= seconds
        )


class Advisor:
    """Sees one sample after another. Where actors come or go it begins anew, with those that are there."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        """`window_s`: as WINDOW_S."""
        self.window = Window(window_s)
        self._before: Sample | None = None
        self._last: Advice | None = None

    def see(self, sample: Sample) -> Advice | None:
        """The verdict on the last whole steps, or that ("unknown") they are still being measured. None while no actor
        serves, or nothing is trained."""
        if sample.phase in ("evaluating", "finished"):
            self.window.clear()
            return self._last  # of a run that has ended it is the last word
        before, self._before = self._before, sample
        if sample.phase == "starting" or not _serving(sample):
            self.window.clear()
            return None
        if before is not None and not _comparable(before, sample):
            self.window.clear()
            self._last = None
        self.window.see(sample)
        return self._verdict()

    def _verdict(self) -> Advice:
        window = self.window
        if window.overdue:
            return Advice("unknown", f"no advice: this step takes longer than the last {window.steps} together")
        if window.shares is not None:
            self._last = advise(window.shares)
        return self._last or Advice(
            "unknown",
            f"measuring: advice takes {WHOLE_STEPS} whole steps with the same actors,"
            f" {min(window.steps, WHOLE_STEPS)} so far",
        )


def _seconds(before: Sample, now: Sample) -> float:
    """Of the learner's own clock, which nobody sets."""
    return sum(now.phases.values()) - sum(before.phases.values())


def _comparable(before: Sample, now: Sample) -> bool:
    """Whether the same processes were at work at both times, on one branch of the run."""

    def serving(sample: Sample) -> dict[str, ActorSample]:
        return {name: actor for name, actor in sample.actors.items() if actor.state in SERVING}

    old, new = serving(before), serving(now)
    restarted = any(new[name].serving_s < old[name].serving_s for name in old.keys() & new.keys())
    return before.process == now.process and old.keys() == new.keys() and not restarted and now.step >= before.step
