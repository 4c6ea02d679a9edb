"""Rates against hand-computed ones, over restarts of either side."""

from __future__ import annotations

import pytest

from learner.telemetry.rates import Rates, lately, over_time, unbroken
from learner.telemetry.sample import CONNECTING, ActorSample, Sample


def actor(tokens: int, serving: float, busy: float, paused: float = 0.0, incarnation: str = "p1") -> ActorSample:
    return ActorSample(
        "generating", tokens=tokens, serving_s=serving, busy_s=busy, paused_s=paused, incarnation=incarnation
    )


BEFORE = Sample(
    t=100, process=1, groups=10, tokens=1000, trained_tokens=500, weights_bytes=0,
    phases={"training": 5.0, "waiting": 5.0},
    actors={"a": actor(800, 10, 9, 1), "b": actor(200, 10, 2)},
)  # fmt: skip
AFTER = Sample(
    t=110, process=1, groups=30, tokens=3000, trained_tokens=2500, weights_bytes=4_000,
    phases={"training": 13.0, "waiting": 7.0},
    actors={"a": actor(2800, 20, 19, 2), "b": actor(200, 20, 2)},
)  # fmt: skip


def test_rates_between_two_samples() -> None:
    found = Rates.between(BEFORE, AFTER)
    assert (found.seconds, found.groups, found.accepted_tokens) == (10, 2, 200)
    assert (found.trained_tokens, found.weight_bytes, found.drawn_tokens) == (200, 400, 200)
    assert found.tokens_of == {"a": 200, "b": 0}
    assert found.learner == {"training": pytest.approx(0.8), "waiting": pytest.approx(0.2)}
    assert found.actors == {
        "generating": pytest.approx(9 / 20), "updating": pytest.approx(1 / 20), "waiting": pytest.approx(10 / 20)
    }  # fmt: skip


def test_rates_of_a_restarted_actor_count_from_zero() -> None:
    again = Sample(t=110, process=1, actors={"a": actor(50, 1, 1, incarnation="p2")})
    assert Rates.between(BEFORE, again).tokens_of == {"a": 5}


@pytest.mark.parametrize("process", [1, 2])
@pytest.mark.parametrize("silent", [ActorSample("gone"), ActorSample("starting", CONNECTING), None])
def test_rates_do_not_count_anew_what_an_actor_did_before_its_silence(silent: ActorSample | None, process: int) -> None:
    """It was buried, or its learner died; it has drawn ten million tokens, at a thousand a second."""
    lost = [Sample(t=100.0 + t, process=process, actors={"a": silent} if silent else {}) for t in range(11)]
    back = [
        Sample(t=111.0 + t, process=process, actors={"a": actor(10_000_000 + 1000 * t, 9000 + t, 9000 + t)})
        for t in range(20)
    ]
    found = lately([*lost, *back], 30.0)
    assert found is not None and (found.seconds, found.drawn_tokens) == (30, pytest.approx(19_000 / 30))
    assert found.tokens_of == {"a": pytest.approx(19_000 / 30)}
    assert found.actors == {"generating": 1.0}
    assert Rates.between(lost[0], back[-1]).drawn_tokens == 0, "nobody saw when"
    assert max(rates.drawn_tokens for rates in over_time([*lost, *back], 10)) <= 1000


def test_rates_over_a_silence_are_means_over_it() -> None:
    seen = Sample(t=0.0, process=1, actors={"a": actor(10_000_000, 9000, 4000)})
    gone = Sample(t=50.0, process=2, actors={"a": ActorSample("gone")})
    back = Sample(t=100.0, process=2, actors={"a": actor(10_100_000, 9100, 4050)})
    for samples in ((seen, gone, back), (seen, back)):
        found = Rates.between(*samples)
        assert found.drawn_tokens == 1000 and found.actors == {"generating": 0.5, "waiting": 0.5}


def test_rates_of_a_restarted_learner_count_from_zero() -> None:
    again = Sample(t=110, process=2, groups=5, phases={"starting": 4.0, "training": 1.0})
    found = Rates.between(BEFORE, again)
    assert found.groups == 0.5
    assert found.learner == {"starting": pytest.approx(0.8), "training": pytest.approx(0.2)}


def test_rates_leave_out_actors_that_are_gone() -> None:
    assert Rates.between(BEFORE, Sample(t=110, process=1, actors={"a": ActorSample("gone")})).tokens_of == {}


def test_rates_over_time_add_up_to_the_whole() -> None:
    samples = [Sample(t=float(t), process=1, groups=t * t) for t in range(101)]
    found = over_time(samples, 10)
    assert len(found) == 10
    assert sum(rates.groups * rates.seconds for rates in found) == pytest.approx(100 * 100)
    assert [rates.groups for rates in found] == sorted(rates.groups for rates in found)


def test_rates_lately_look_back_so_many_seconds() -> None:
    samples = [Sample(t=float(t), process=1, groups=max(0, t - 50)) for t in range(101)]
    found = lately(samples, 20)
    assert found is not None and (found.seconds, found.groups) == (20, 1.0)
    assert lately(samples[:1], 20) is None


def test_rates_begin_anew_where_the_clock_was_set_back() -> None:
    before = [Sample(t=3600.0 + t, process=1, groups=5 * t) for t in range(100)]
    after = [Sample(t=float(t), process=1, groups=500 + 2 * t) for t in range(1, 21)]
    samples = [*before, *after]
    found = lately(samples, 30)
    assert found is not None and (found.seconds, found.groups) == (19, 2)
    assert {rates.groups for rates in over_time(samples, 10)} == {2}
    assert sum(rates.seconds for rates in over_time(samples, 19)) == 19
    assert lately([*before, after[0]], 30) is None and over_time([*before, after[0]], 10) == []
    assert unbroken([before[0], before[0]]) == [before[0]], "two at one time say nothing of what was between"
