"""What an actor is said to do between two samples; a sample of a whole intake with an actor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from learner.telemetry.clock import PhaseClock
from learner.telemetry.growth import ActorGrowth
from learner.telemetry.sample import CONNECTING, ActorSample, Sample, parts_of_serving
from learner.telemetry.sampler import Sampler, actor_state
from protocol.messages import Beat, Heartbeat
from tests.actor_harness import Puppet, until
from tests.intake_harness import Intake


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


# --- a whole intake ---------------------------------------------------------------------------------------------------

BEAT = Heartbeat((), (), 8, 1, "serving", 0.0, generated_tokens=9000, busy_s=400.0, paused_s=50.0, serving_s=500.0)


def sampler_of(intake: Intake) -> Sampler:
    sampler = Sampler(PhaseClock(), lambda: 0, lambda: "", dict)
    publisher = SimpleNamespace(published=0, bytes_dense=0)
    sampler.actors = SimpleNamespace(server=intake.server, publisher=publisher, source=intake.source)  # type: ignore[assignment]
    return sampler


def told(sampler: Sampler, puppet: Puppet, **changes: Any) -> Sample:
    """A sample after a heartbeat."""
    puppet.send(msgspec.structs.replace(BEAT, **changes))
    puppet.next(Beat)
    return sampler.take()


def test_an_actor_that_outlives_its_learner_goes_on_with_its_counts(tmp_path: Path) -> None:
    with Intake(tmp_path, dead_after_s=60.0, version=1) as intake, Puppet(intake.address) as puppet:
        puppet.hello()
        first = told(sampler_of(intake), puppet)
    with Intake(tmp_path, dead_after_s=60.0, version=1) as intake, Puppet(intake.address) as puppet:
        sampler = sampler_of(intake)
        puppet.hello()
        until(lambda: sampler.take().actors, "the actor")
        connected = sampler.take()
        second = told(sampler, puppet, generated_tokens=9100, busy_s=402.0, serving_s=510.0)
    growth = ActorGrowth()
    assert growth.see(first)["actor-9"].counts["tokens"] == 0
    assert connected.actors["actor-9"].phase == CONNECTING and growth.see(connected) == {}
    assert growth.see(second)["actor-9"].counts == {"tokens": 100, "serving_s": 10.0, "busy_s": 2.0, "paused_s": 0.0}
    waited = [
        parts_of_serving(actor.serving_s, actor.busy_s, actor.paused_s)["waiting"]
        for actor in (first.actors["actor-9"], second.actors["actor-9"])
    ]
    assert waited == [100.0, 108.0]


def test_an_actor_that_was_buried_comes_back_with_its_counts_and_a_new_process_with_none(tmp_path: Path) -> None:
    with Intake(tmp_path, dead_after_s=60.0, version=1) as intake, Puppet(intake.address) as puppet:
        sampler, growth = sampler_of(intake), ActorGrowth()
        puppet.hello()
        growth.see(told(sampler, puppet))
        with intake.server.lock:
            for peer in intake.server.peers.values():
                peer.last_seen -= 61.0
        until(lambda: sampler.take().actors["actor-9"] == ActorSample("gone"), "a funeral")
        growth.see(sampler.take())
        puppet.hello()
        back = told(sampler, puppet, generated_tokens=9050, serving_s=530.0)
        assert growth.see(back)["actor-9"].counts["tokens"] == 50
        assert growth.see(back)["actor-9"].counts["serving_s"] == 0
        puppet.incarnation = "p2"
        puppet.hello()
        new = told(sampler, puppet, generated_tokens=7, busy_s=0.0, paused_s=0.0, serving_s=0.0)
        assert growth.see(new)["actor-9"].counts["tokens"] == 7
        assert (back.actors["actor-9"].incarnation, new.actors["actor-9"].incarnation) == ("p1", "p2")


def test_a_sample_keeps_little_of_a_long_incarnation(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, dead_after_s=60.0, version=1) as intake,
        Puppet(intake.address, incarnation="p" * 100) as puppet,
    ):
        puppet.hello()
        assert told(sampler_of(intake), puppet).actors["actor-9"].incarnation == "p" * 16


def test_tickets_issued_again_by_earlier_processes_are_in_the_totals_alone(tmp_path: Path) -> None:
    earlier = Intake(tmp_path)
    earlier.dispatcher.reissued, earlier.dispatcher.duplicates = 5000, 40
    state = earlier.dispatcher.state()
    earlier.hub.close()
    earlier.journal.close()
    with Intake(tmp_path) as intake:
        intake.dispatcher.restore(state, [], 1)
        intake.dispatcher.reissued += 2
        sample = sampler_of(intake).take()
    assert (sample.reissued, sample.duplicates) == (2, 0)
    assert (sample.tickets["reissued"], sample.tickets["duplicates"]) == (5002, 40)
