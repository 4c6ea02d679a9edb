"""What an actor is said to do between two samples; a sample of a whole intake with an actor."""

from __future__ import annotations

import pytest

from learner.telemetry.sample import ActorSample
from learner.telemetry.sampler import actor_state


def at(serving_s: float = 0.0, busy_s: float = 0.0, paused_s: float = 0.0, running: int = 0, version: int = 1):  # type: ignore[no-untyped-def]
    return ActorSample("starting", "serving", version, running=running, serving_s=serving_s, busy_s=busy_s,
                       paused_s=paused_s)  # fmt: skip


@pytest.mark.parametrize(
    ("now", "state"),
    [
        (at(10, 9, 0), "generating"),
        (at(10, 2, 0), "waiting"),
        (at(10, 9, 7), "updating"),
        (at(10, 6, 3), "waiting"),
        (at(10, 9, 0, version=0), "starting"),
    ],
)
def test_actor_state_is_what_it_did_for_most_of_the_time(now: ActorSample, state: str) -> None:
    assert actor_state(at(), now, draining=False) == state


def test_actor_state_without_an_earlier_sample_is_what_it_does_now() -> None:
    assert actor_state(None, at(running=3), draining=False) == "generating"
    assert actor_state(None, at(), draining=False) == "waiting"


def test_actor_state_of_one_that_was_sent_home() -> None:
    assert actor_state(at(), at(10, 9), draining=True) == "draining"
