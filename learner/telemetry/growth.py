"""By how much actors' counts have grown from one sample to the next. Pure; used by `rates.py` and the dashboard.

An actor's counts are its process's own, and the incarnation alone says which process that is. One that was silent, or
that has outlived its learner, goes on where it was. One that is seen for the first time is counted from zero if it has
begun to serve since the sample before, and else from now: nobody saw when it drew the rest.
"""

from __future__ import annotations

from typing import NamedTuple

from learner.telemetry.sample import ActorSample, Sample, has_counts

COUNTED = ("tokens", "serving_s", "busy_s", "paused_s")
"""Counts of an `ActorSample` whose growth is told."""
NOTHING = ActorSample("starting")


class Growth(NamedTuple):
    """Of one actor."""

    since: float
    """Unix time of the sample from which on it has grown."""
    counts: dict[str, float]
    """Name in `COUNTED` -> by how much; never below zero."""


class ActorGrowth:
    """Sees one sample after another. Not for several threads."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, ActorSample]] = {}
        """Actor -> when its counts were known last, and those."""
        self._seen_at: float | None = None

    def see(self, sample: Sample) -> dict[str, Growth]:
        """Growth of each actor whose counts this sample knows, since they were known last."""
        seen_at = sample.t if self._seen_at is None else self._seen_at
        found = {}
        for name, actor in sample.actors.items():
            if not has_counts(actor):
                continue
            since, before = self._known.get(name, (seen_at, None))
            if before is None or before.incarnation != actor.incarnation:
                since, before = seen_at, NOTHING if actor.serving_s <= sample.t - seen_at else actor
            found[name] = Growth(since, {what: _grown(before, actor, what) for what in COUNTED})
            self._known[name] = sample.t, actor
        self._seen_at = sample.t
        return found


def _grown(before: ActorSample, now: ActorSample, what: str) -> float:
    return max(0.0, float(getattr(now, what)) - float(getattr(before, what)))
