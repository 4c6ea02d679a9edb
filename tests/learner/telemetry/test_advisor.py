"""The advisor against hand-computed shares, and against a small simulation of both sides."""

from __future__ import annotations

import msgspec
import pytest

from learner.telemetry.advisor import Advisor, Shares, advise, load, speedup
from learner.telemetry.sample import ActorSample, Advice, LearnerPhase, Sample


def shares(**changes: float) -> Shares:
    base = {
        "seconds": 60.0, "actors": 4, "waiting": 0.0, "publishing": 0.0, "busy": 1.0, "paused": 0.0,
        "backlog": 8.0, "held": 8.0,
    }  # fmt: skip
    return Shares(**(base | changes))  # type: ignore[arg-type]


def test_load_is_what_a_learner_that_never_waits_would_take() -> None:
    assert load(4, 1.0, 0.5) == pytest.approx(8.0)
    assert load(4, 0.5, 0.0) == pytest.approx(2.0)


def test_speedup_ends_where_the_learner_no_longer_waits() -> None:
    assert speedup(4, 1.0, 0.62, 6) == pytest.approx(1.5)
    assert speedup(4, 1.0, 0.62, 100) == pytest.approx(1 / 0.38)
    assert speedup(4, 0.5, 0.0, 2) == pytest.approx(1.0)
    assert speedup(2, 0.6, 0.6, 4) == pytest.approx(1 / 0.7), "both sides in turn: 0.4 of training, 0.3 of generation"
    assert speedup(4, 1.0, 0.0, 2) == pytest.approx(0.5)


def test_advice_rollout_bound_names_actors_and_speedup() -> None:
    found = advise(shares(waiting=0.33, backlog=12.0))
    assert (found.side, found.actors) == ("rollout", 6)
    assert found.text == "rollout-bound 33%: 2 more actors would help, about 1.5×"
    assert found.speedup == pytest.approx(1 / 0.67)


def test_advice_one_more_actor_is_singular() -> None:
    assert "1 more actor would help, about 2.0×" in advise(shares(actors=1, waiting=0.5)).text


def test_advice_at_most_doubles() -> None:
    assert advise(shares(waiting=0.9, backlog=100.0)).actors == 8


def test_advice_is_bounded_by_the_tickets_that_wait_for_room() -> None:
    """8 tickets in 4 actors, 2 more wait: a fifth actor takes them, a sixth would find nothing."""
    found = advise(shares(waiting=0.5, backlog=2.0))
    assert (found.side, found.actors) == ("rollout", 5)
    assert found.speedup == pytest.approx(1.25)


def test_advice_without_waiting_tickets_is_lag() -> None:
    found = advise(shares(waiting=0.5, backlog=0.0))
    assert (found.side, found.actors, found.speedup) == ("lag", 4, 1.0)
    assert "rollout.max_lag" in found.text


def test_advice_learner_bound_says_how_many_would_do() -> None:
    found = advise(shares(busy=0.4))
    assert (found.side, found.actors) == ("learner", 2)
    assert found.text == "learner-bound 100%: actors rest 60% of the time, 2 of 4 actors would do"
    assert found.speedup == pytest.approx(1.0)


def test_advice_weights_bound_where_they_hold_up_the_side_that_counts() -> None:
    assert advise(shares(paused=0.2, waiting=0.3)).side == "weights"
    assert advise(shares(publishing=0.2)).side == "weights"
    assert advise(shares(paused=0.2, busy=0.5)).side == "learner", "actors have the time"
    assert advise(shares(publishing=0.2, waiting=0.3)).side == "rollout", "the learner has the time"


def test_advice_balanced() -> None:
    assert advise(shares(waiting=0.05, busy=0.9)).side == "balanced"


def sample(t: float, *, wait: float, busy: float, actors: int = 2, process: int = 1, phase: LearnerPhase = "training",
           backlog: int = 4) -> Sample:  # fmt: skip
    """A run after t seconds of which the learner waited for a share, and the actors were busy for a share."""
    return Sample(
        t=1000 + t, process=process, phase=phase, backlog=backlog,
        phases={"waiting": wait * t, "training": (1 - wait) * t}, waits={"groups": wait * t},
        actors={
            f"actor-{n}": ActorSample("generating", serving_s=t, busy_s=busy * t, held=4) for n in range(actors)
        },
    )  # fmt: skip


def seen(*samples: Sample) -> Advice | None:
    advisor, last = Advisor(), None
    for one in samples:
        last = advisor.see(one)
    return last


def test_advisor_measures_between_samples() -> None:
    found = seen(*(sample(t, wait=0.4, busy=1.0) for t in range(30)))
    assert found is not None
    assert (found.side, found.waiting_share, found.busy_share) == ("rollout", pytest.approx(0.4), pytest.approx(1.0))


def test_advisor_says_nothing_at_once() -> None:
    assert seen(*(sample(t, wait=0.4, busy=1.0) for t in range(4))) is None


def test_advisor_forgets_what_is_long_ago() -> None:
    early = [sample(t, wait=0.0, busy=0.5) for t in range(100)]
    late = [
        msgspec.structs.replace(
            sample(t, wait=0.0, busy=1.0), waits={"groups": t - 100.0}, phases={"waiting": t - 100.0, "training": 100.0}
        )
        for t in range(100, 400)
    ]
    found = seen(*early, *late)
    assert found is not None and found.waiting_share == pytest.approx(1.0)


@pytest.mark.parametrize("change", ["actors", "process", "restart"])
def test_advisor_begins_anew_when_something_is_no_longer_the_same(change: str) -> None:
    before = [sample(t, wait=0.0, busy=0.5) for t in range(30)]
    changed = {"actors": {"actors": 3}, "process": {"process": 2}, "restart": {}}[change]
    after = sample(3.0 if change == "restart" else 31, wait=0.0, busy=0.5, **changed)  # type: ignore[arg-type]
    assert seen(*before, msgspec.structs.replace(after, t=1031.0)) is None


def test_advisor_keeps_its_verdict_during_an_evaluation_and_counts_none_of_it() -> None:
    before = [sample(t, wait=0.4, busy=1.0) for t in range(30)]
    evaluating = [sample(30 + t, wait=0.4, busy=1.0, phase="evaluating") for t in range(30)]
    advisor = Advisor()
    for one in before:
        verdict = advisor.see(one)
    assert [advisor.see(one) for one in evaluating] == [verdict] * 30
    again = sample(61, wait=0.0, busy=1.0)
    assert advisor.see(again) == verdict, "too short to be measured"


def test_advisor_keeps_its_verdict_when_all_have_gone_home() -> None:
    before = [sample(t, wait=0.4, busy=1.0) for t in range(30)]
    verdict = seen(*before)
    assert seen(*before, sample(31, wait=0.4, busy=1.0, actors=0)) == verdict is not None


def test_advisor_without_actors_says_nothing() -> None:
    assert seen(*(sample(t, wait=0.4, busy=1.0, actors=0) for t in range(30))) is None
