"""Where the learner's time goes: seconds by what it does, always counted into exactly one phase. Knows nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from learner.telemetry.sample import LEARNER_PHASES, LearnerPhase


class PhaseClock:
    """Counts time into the phase that was entered last. Read from other threads, too."""

    def __init__(self) -> None:
        self.phase: LearnerPhase = "starting"
        self._since = time.monotonic()
        self._seconds = dict.fromkeys(LEARNER_PHASES, 0.0)
        self._lock = threading.Lock()

    def enter(self, phase: LearnerPhase) -> LearnerPhase:
        """The time from now on belongs to `phase`. Returns the one before."""
        with self._lock:
            now = time.monotonic()
            self._seconds[self.phase] += now - self._since
            before, self.phase, self._since = self.phase, phase, now
            return before

    @contextmanager
    def of(self, phase: LearnerPhase) -> Iterator[None]:
        """Within: time belongs to `phase`; afterwards again to what it belonged to before."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds so far, the present one included; phases that never were are left out."""
        with self._lock:
            found = self._seconds | {self.phase: self._seconds[self.phase] + time.monotonic() - self._since}
        return {phase: seconds for phase, seconds in found.items() if seconds}
