"""Every second of the learner is counted, into one phase."""

from __future__ import annotations

from contextlib import suppress

import pytest

from learner.telemetry import clock as module
from learner.telemetry.clock import PhaseClock


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_clock_counts_into_the_phase_that_was_entered_last(time: list[float]) -> None:
    clock = PhaseClock()
    time[0] += 2
    with clock.of("waiting"):
        time[0] += 3
        with clock.of("publishing"):
            time[0] += 5
        time[0] += 7
    time[0] += 11
    assert clock.seconds == {"starting": 13.0, "waiting": 10.0, "publishing": 5.0}
    assert clock.phase == "starting"


def test_clock_goes_back_after_an_error(time: list[float]) -> None:
    clock = PhaseClock()
    clock.enter("other")
    with suppress(ValueError), clock.of("training"):
        time[0] += 1
        raise ValueError
    assert clock.phase == "other"
    assert clock.seconds == {"training": 1.0}
