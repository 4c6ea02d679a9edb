"""Who did what when: for the learner and each actor the pieces of time that it spent in one state. Pure.

A sample's state is of most of the time since the sample before. Of time without samples, and of the time between two
processes of the learner, nothing is said. Fed by `history.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from learner.telemetry.sample import ACTOR_STATES, LEARNER_PHASES, Sample

LEARNER = "learner"
STATES = tuple(dict.fromkeys((*LEARNER_PHASES, *ACTOR_STATES)))
"""Of both sides; segments name them by number."""
_NUMBER: dict[str, int] = {name: number for number, name in enumerate(STATES)}

Segment = tuple[float, float, int]
"""From, to (Unix time), number of the state."""


def learner_state(before: Sample, now: Sample) -> str:
    """The phase that most of the time between two samples of one process went into."""
    spent = {name: seconds - before.phases.get(name, 0.0) for name, seconds in now.phases.items()}
    return max(spent, key=lambda name: spent[name], default=now.phase) if now.phase != "finished" else "finished"


class Lanes:
    """Grows with every sample."""

    def __init__(self) -> None:
        self._segments: dict[str, list[Segment]] = {LEARNER: []}

    def see(self, sample: Sample, before: Sample | None) -> None:
        """The next sample, and the one before it, if there was one."""
        if before is None or before.process != sample.process:
            return
        states = {name: str(actor.state) for name, actor in sample.actors.items()}
        for name, state in ({LEARNER: learner_state(before, sample)} | states).items():
            segments = self._segments.setdefault(name, [])
            number = _NUMBER[state]
            if segments and segments[-1][2] == number and segments[-1][1] == before.t:
                segments[-1] = (segments[-1][0], sample.t, number)
            else:
                segments.append((before.t, sample.t, number))

    def cut(self, until: float) -> None:
        """Forget what was from then on."""
        for name, segments in self._segments.items():
            self._segments[name] = [(start, min(end, until), state) for start, end, state in segments if start < until]

    def between(self, since: float, until: float, cells: int) -> list[dict[str, Any]]:
        """[{"name", "segments": [[from, to, state], …]}], the learner first, then actors by number; times in seconds
        after `since`. Where there are more segments than can be seen, a cell has the state of most of its time."""
        found = []
        for name in sorted(self._segments, key=_order):
            segments = self._segments[name]
            first = max(0, bisect_right(segments, (since, since, 0)) - 1)
            seen = [
                (max(start, since), min(end, until), state)
                for start, end, state in segments[first:]
                if end > since and start < until
            ]
            if len(seen) > cells:
                seen = _coarse(seen, since, (until - since) / cells)
            if seen or name == LEARNER:
                rows = [[round(start - since, 1), round(end - since, 1), state] for start, end, state in seen]
                found.append({"name": name, "segments": rows})
        return found


def _order(name: str) -> tuple[bool, str, int, str]:
    """The learner first; actor-2 before actor-10."""
    head = name.rstrip("0123456789")
    return name != LEARNER, head, int(name[len(head) :] or -1), name


def _coarse(segments: list[Segment], since: float, width: float) -> list[Segment]:
    """In cells of a width, each with the state of most of its time; neighbours of one state become one."""
    cells: dict[int, dict[int, float]] = {}
    for start, end, state in segments:
        for cell in range(int((start - since) / width), int((end - since) / width) + 1):
            left = since + cell * width
            inside = min(end, left + width) - max(start, left)
            if inside > 0:
                spent = cells.setdefault(cell, {})
                spent[state] = spent.get(state, 0.0) + inside
    merged: list[Segment] = []
    for cell in sorted(cells):
        state = max(cells[cell], key=lambda found: cells[cell][found])
        left = since + cell * width
        if merged and merged[-1][2] == state and left - merged[-1][1] < width / 2:
            merged[-1] = (merged[-1][0], left + width, state)
        else:
            merged.append((left, left + width, state))
    return merged
