"""What has been read of a run so far, for every page that looks: files are read once, whoever asks. For threads."""

from __future__ import annotations

import threading
from typing import Any

from deploy.dashboard.history import History
from deploy.dashboard.lanes import STATES
from deploy.dashboard.overview import present
from deploy.dashboard.steps import StepsReader
from learner.telemetry.timeline import TimelineReader
from protocol.rundir import RunDir

POINTS = (20, 2000)
"""Fewest and most that a page may ask for."""


class Readers:
    """The readers of one run, behind a lock."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._timeline, self._history = TimelineReader(run.timeline), History()
        self._steps = StepsReader(run)

    def _read(self) -> History:
        """Bring the history up to date. Of a file that was thinned out it knows the rest already."""
        for sample in self._timeline.new():
            self._history.see(sample)
        return self._history

    def now(self) -> dict[str, Any]:
        """As `overview.present`."""
        with self._lock:
            return present(self.run, self._read())

    def timeline(self, since: float, points: int, have: float = 0.0) -> dict[str, Any]:
        """Series from `since` on (0: all; below 0: so many seconds before the last sample), and first and last time.

        `have`: the last time of what the page already has; if nothing is new, {"unchanged": True}.
        """
        with self._lock:
            history = self._read()
            first, last = (history.times[0], history.times[-1]) if history.times else (None, None)
            if last is not None and have == last:
                return {"unchanged": True}
            found = history.series(_start(history, since), _clamped(points))
            return found | {"first": first, "last": last}

    def lanes(self, since: float, cells: int, have: float = 0.0) -> dict[str, Any]:
        """{"states": names, "since", "until": Unix time, "lanes": as `Lanes.between`}; `since` and `have` as above."""
        with self._lock:
            history = self._read()
            if not history.times:
                return {"states": STATES, "since": None, "until": None, "lanes": []}
            if have == history.times[-1]:
                return {"unchanged": True}
            start, until = _start(history, since), history.times[-1]
            lanes = history.lanes.between(start, until, _clamped(cells))
            return {"states": STATES, "since": start, "until": until, "lanes": lanes}

    def steps(self, since: int) -> dict[str, Any]:
        """As `StepsReader.columns`, with the evaluations."""
        with self._lock:
            found = self._steps.columns(since)
            return found | {"evaluations": self._steps.evaluations()}


def _start(history: History, since: float) -> float:
    if not history.times:
        return 0.0
    return max(history.times[0], since if since >= 0 else history.times[-1] + since)


def _clamped(points: int) -> int:
    return min(max(points, POINTS[0]), POINTS[1])
