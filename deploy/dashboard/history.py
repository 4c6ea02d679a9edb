"""timeline.jsonl as columns: what the page draws over time. Rates by subtraction, whatever the number of samples. Pure.

Every column is a sum that only grows, so that a mean or a rate over any piece of time is one subtraction: of a count,
its increase; of a level, itself summed over samples. Counts begin anew with a learner's or an actor's process: each
is continued where it was, and no rate is given across two learner processes, nor across a clock that was set back.
Fed by `readers.py`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any

from deploy.dashboard.lanes import Lanes
from learner.telemetry.growth import ActorGrowth, Growth
from learner.telemetry.sample import LEARNER_PHASES, SERVING, Sample

RECENT_S = 20.0
"""An actor's tokens/s in the table are over so long."""
OVERDUE = 2.0
"""A count that comes in lumps (a step's tokens) says nothing of the time since the last one, until so many times the
interval of the last two has passed: then it stands still."""
SHORTEST_OVERDUE_S = 10.0
SMOOTH = 5
"""A point is the mean over so many distances between points: a step's rhythm would hide what it is about."""

LUMPS = ("rollout_tokens", "trained_tokens", "groups", "weights_bytes")
"""Counts that grow with each step, heartbeat, group or version: spread over the time since they grew last, or since
somebody began to work at them."""
OF_ACTORS = {"tokens": "rollout_tokens", "busy_s": "busy_s", "paused_s": "paused_s", "serving_s": "serving_s"}
"""Count of `growth.COUNTED` -> the column that has it of all actors together."""
COUNTS = (*LUMPS, "busy_s", "paused_s", "serving_s", *(f"phase_{name}" for name in LEARNER_PHASES))
LEVELS = (
    "queued", "leased", "backlog", "serving", "wanted", "version", "step", "lag", "fetch_s", "pause_s", "memory",
    "actors_memory",
)  # fmt: skip


def levels_of(sample: Sample) -> dict[str, float]:
    """What is so at the moment of a sample, by the names of `LEVELS`."""
    there = [actor for actor in sample.actors.values() if actor.state != "gone"]
    serving = [actor for actor in there if actor.state in (*SERVING, "draining")]
    return {
        "queued": sample.tickets.get("queued", 0),
        "leased": sample.tickets.get("leased", 0),
        "backlog": sample.backlog,
        "serving": len(serving),
        "wanted": sample.wanted if sample.wanted is not None else len(there),
        "version": sample.version,
        "step": sample.step,
        "lag": max((sample.version - actor.version for actor in serving if actor.version), default=0),
        "fetch_s": _mean([actor.fetch_s for actor in serving]),
        "pause_s": _mean([actor.pause_s for actor in serving]),
        "memory": sample.memory.get("resident", 0),
        "actors_memory": sum(actor.rss_bytes for actor in there),
    }


def _resting(sample: Sample, levels: dict[str, float]) -> Iterator[str]:
    """Counts of `LUMPS` that nobody works at: the time before somebody does has no part in the next lump."""
    if not levels["serving"]:
        yield from ("rollout_tokens", "groups")
    if sample.phase in ("starting", "evaluating"):
        yield "trained_tokens"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class History:
    """Samples in, columns out. Not for several threads."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.lanes = Lanes()
        self.newest: Sample | None = None
        self._columns: dict[str, list[float]] = {name: [] for name in (*COUNTS, *LEVELS)}
        self._breaks: list[int] = []
        """Indices of the first samples of later learner processes, and of those after a clock was set back."""
        self._grew: dict[str, list[int]] = {name: [0, 0] for name in LUMPS}
        """Count -> indices at which it grew last, and the time before."""
        self._actors = ActorGrowth()
        self._recent: deque[tuple[float, dict[str, Growth]]] = deque()
        """Time of each of the last samples, and how much every actor had grown by then."""

    def see(self, sample: Sample) -> None:
        """Take in the next sample, in the file's order. One of a time that is known is known (the file was thinned out,
        and is read anew). With any other that is not later than the last, the clock was set back: what is here of later
        times was of a clock that went wrong, and is forgotten."""
        if self.newest is not None and sample.t <= self.newest.t:
            if self._knows(sample.t):
                return
            self._forget_from(sample.t)
        index = len(self.times)
        if self.newest is not None and sample.process != self.newest.process:
            self._break_off()
        growth = self._actors.see(sample)
        increases = self._increases(sample, growth)
        levels = levels_of(sample)
        for name, column in self._columns.items():
            column.append((column[-1] if column else 0.0) + (increases[name] if name in increases else levels[name]))
        self.times.append(sample.t)
        resting = set(_resting(sample, levels))
        for name in LUMPS:
            if increases[name] > 0:
                self._spread(name, index)
            elif name in resting:
                self._grew[name] = [index, index]
        self.lanes.see(sample, self.newest)
        self._keep_recent(sample.t, growth)
        self.newest = sample

    def _knows(self, t: float) -> bool:
        place = bisect_left(self.times, t)
        return place < len(self.times) and self.times[place] == t

    def _forget_from(self, t: float) -> None:
        """Forget all samples of that time and later ones."""
        index = bisect_left(self.times, t)
        for column in (self.times, *self._columns.values()):
            del column[index:]
        self._breaks = [place for place in self._breaks if place < index]
        self.lanes.cut(self.times[-1] if self.times else t)
        self._actors, self.newest = ActorGrowth(), None
        self._break_off()

    def _break_off(self) -> None:
        """No line leads to the next sample."""
        index = len(self.times)
        self._breaks.append(index)
        self._grew = {name: [index, index] for name in LUMPS}
        self._recent.clear()

    def _increases(self, sample: Sample, actors: dict[str, Growth]) -> dict[str, float]:
        """By how much each count has grown, since the sample before."""
        grown = dict.fromkeys(COUNTS, 0.0)
        for growth in actors.values():
            for count, column in OF_ACTORS.items():
                grown[column] += self._share_out(column, growth.counts[count], growth.since, sample.t)
        if (before := self.newest) is not None and before.process == sample.process:
            for name in ("trained_tokens", "groups", "weights_bytes"):
                grown[name] = max(0, getattr(sample, name) - getattr(before, name))
            for phase, seconds in sample.phases.items():
                grown[f"phase_{phase}"] = max(0.0, seconds - before.phases.get(phase, 0.0))
        return grown

    def _share_out(self, name: str, increase: float, since: float, until: float) -> float:
        """Let an actor's count have grown evenly over samples that did not know it; returns what is the last one's."""
        column, first = self._columns[name], bisect_right(self.times, since)
        for between in range(first, len(self.times)):
            column[between] += increase * (self.times[between] - since) / (until - since)
        return increase * (until - self.times[-1]) / (until - since) if first < len(self.times) else increase

    def _spread(self, name: str, index: int) -> None:
        """Let a count that grew now have grown evenly since it grew last."""
        column, times, since = self._columns[name], self.times, self._grew[name][0]
        low, high, span = column[since], column[index], self.times[index] - self.times[since]
        for between in range(since + 1, index):
            column[between] = low + (high - low) * (times[between] - times[since]) / span
        self._grew[name] = [index, since]

    def _keep_recent(self, t: float, growth: dict[str, Growth]) -> None:
        self._recent.append((t, growth))
        while len(self._recent) > 2 and t - self._recent[0][0] > RECENT_S:
            self._recent.popleft()

    def actor_rates(self) -> dict[str, float]:
        """Actor -> tokens a second, over the last `RECENT_S`."""
        drawn: dict[str, float] = {}
        for until, actors in islice(self._recent, 1, None):
            for name, (since, counts) in actors.items():
                inside = (until - max(since, self._recent[0][0])) / (until - since)
                drawn[name] = drawn.get(name, 0.0) + counts["tokens"] * inside
        return {name: tokens / (self._recent[-1][0] - self._recent[0][0]) for name, tokens in drawn.items()}

    # --- what the page asks for ---

    def series(self, since: float, points: int) -> dict[str, Any]:
        """{"t": times from `since` on, at most about `points`, "series": name -> value over a while before each}.

        The first sample of a later process of the learner has None everywhere, so that lines are cut there.
        """
        found: dict[str, list[float | None]] = {name: [] for name in SERIES}
        ends: list[float] = []
        for first, last in self._pieces(since, points):
            ends.append(round(self.times[last], 2))
            piece = None if last in self._breaks else Piece(self, first, last)
            for name, values in found.items():
                values.append(None if piece is None else _short(SERIES[name](piece)))
        return {"t": ends, "series": found}

    def _pieces(self, since: float, points: int) -> Iterator[tuple[int, int]]:
        """(first, last) indices of pieces that end at about equal distances, `SMOOTH` of them long, of one process."""
        if len(self.times) < 2:
            return
        start = max(0, bisect_left(self.times, since) - 1)
        width = (self.times[-1] - self.times[start]) / max(1, points)
        cuts = {start, len(self.times) - 1}
        cuts |= {bisect_left(self.times, self.times[start] + number * width) for number in range(1, points)}
        cuts |= {index - back for index in self._breaks if index > start for back in (0, 1)}
        ordered = sorted(cut for cut in cuts if cut < len(self.times))
        for before, last in pairwise(ordered):
            lowest = self._breaks[found - 1] if (found := bisect_right(self._breaks, last)) else 0
            wide = bisect_left(self.times, self.times[last] - SMOOTH * width)
            yield (before if last == lowest else max(lowest, min(wide, before))), last

    def increase(self, name: str, first: int, last: int) -> float:
        return self._columns[name][last] - self._columns[name][first]

    def is_open(self, name: str, last: int) -> bool:
        """Whether what a lumpy count did up to a sample is not known yet."""
        if name not in LUMPS:
            return False
        grew, before = self._grew[name]
        patience = max(SHORTEST_OVERDUE_S, OVERDUE * (self.times[grew] - self.times[before]))
        return last > grew and self.times[-1] - self.times[grew] < patience


class Piece:
    """A piece of time between two samples of one learner process."""

    def __init__(self, history: History, first: int, last: int) -> None:
        self._history, self._first, self._last = history, first, last
        self.seconds = history.times[last] - history.times[first]

    def grown(self, name: str) -> float:
        return self._history.increase(name, self._first, self._last)

    def rate(self, name: str) -> float | None:
        """Of a count, a second; None where it is not known yet."""
        return None if self._history.is_open(name, self._last) else self.grown(name) / self.seconds

    def level(self, name: str) -> float:
        """Mean of a level."""
        return self.grown(name) / (self._last - self._first)

    def share(self, name: str, of: str) -> float | None:
        """Of two counts; None where the second did not grow."""
        whole = self.grown(of)
        return min(1.0, self.grown(name) / whole) if whole > 0 else None

    def of_time(self, name: str) -> float:
        """Share of the time that a count of seconds has grown in."""
        return min(1.0, self.grown(name) / self.seconds)


def _level(name: str) -> Callable[[Piece], float | None]:
    return lambda piece: piece.level(name)


SERIES: dict[str, Callable[[Piece], float | None]] = {
    "rollout_tokens_per_s": lambda piece: piece.rate("rollout_tokens"),
    "learner_tokens_per_s": lambda piece: piece.rate("trained_tokens"),
    "groups_per_s": lambda piece: piece.rate("groups"),
    "waiting_share": lambda piece: piece.of_time("phase_waiting"),
    "busy_share": lambda piece: piece.share("busy_s", "serving_s"),
    "paused_share": lambda piece: piece.share("paused_s", "serving_s"),
    "weights_bytes_per_s": lambda piece: piece.rate("weights_bytes"),
    **{name: _level(name) for name in LEVELS},
}
"""What is drawn over time -> its value in a piece: tokens and bytes a second, shares of time, mean levels."""


def _short(value: float | None) -> float | None:
    """Enough digits to draw, few to send."""
    return None if value is None else float(f"{value:.5g}")
