"""Proposals for the number of actors, and a simulated run that they have to bring to rest."""

from __future__ import annotations

import pytest

from deploy.autoscale import Autoscaler, Proposal, StepTimes
from protocol.config import parse_recipe
from protocol.errors import RecipeError
from protocol.sections import AutoscaleConfig

CONFIG = AutoscaleConfig(enabled=True, min_actors=1, max_actors=16, window_steps=3, patience=2)


def see(scaler: Autoscaler, count: int, actors: int, first: int = 0, **times: float) -> list[Proposal]:
    """What `count` steps alike bring."""
    figures = {"step_s": 10.0, "wait_s": 0.0, "busy_share": 0.9} | times
    steps = [StepTimes(step, serving=actors, **figures) for step in range(first, first + count)]  # type: ignore[arg-type]
    return [proposal for times in steps if (proposal := scaler.see(times, actors))]


def test_learner_that_waits_gets_as_many_actors_as_its_work_needs() -> None:
    """Half the time waited for two actors that are always busy: work for four, and for five with room to breathe."""
    (proposal,) = see(Autoscaler(CONFIG), 4, actors=2, wait_s=5.0, busy_share=1.0)
    assert proposal.actors == 4, "at most twice as many at once"
    assert proposal.reason == (
        "in 3 steps the learner waited 50% of the time and the actors were busy 100%: work for 4.0 actors"
    )
    (proposal,) = see(Autoscaler(CONFIG), 4, actors=4, wait_s=2.0, busy_share=1.0)
    assert proposal.actors == 6


def test_idle_actors_are_given_up_as_far_as_the_rest_stays_below_what_asks_for_more() -> None:
    (proposal,) = see(Autoscaler(CONFIG), 4, actors=8, busy_share=0.25)
    assert proposal.actors == 3, "2 actors of work: three of them are busy for 67 %"
    assert see(Autoscaler(CONFIG), 10, actors=4, busy_share=0.62) == [], "three would be busy for 83 %"


def test_nothing_is_proposed_before_the_answer_was_the_same_often_enough() -> None:
    scaler = Autoscaler(AutoscaleConfig(enabled=True, window_steps=1, patience=3))
    slow = {"wait_s": 5.0, "busy_share": 1.0}
    assert see(scaler, 2, actors=2, **slow) == []
    assert see(scaler, 1, actors=2, first=2) == [], "another answer in between"
    assert see(scaler, 2, actors=2, first=3, **slow) == []
    assert len(see(scaler, 1, actors=2, first=5, **slow)) == 1


def test_nothing_is_proposed_before_the_window_is_full() -> None:
    scaler = Autoscaler(AutoscaleConfig(enabled=True, window_steps=3, patience=1))
    assert see(scaler, 2, actors=2, wait_s=5.0, busy_share=1.0) == []
    assert len(see(scaler, 1, actors=2, first=2, wait_s=5.0, busy_share=1.0)) == 1


def test_a_short_wait_is_no_reason() -> None:
    assert see(Autoscaler(CONFIG), 10, actors=2, wait_s=0.9, busy_share=1.0) == []


def test_nothing_is_measured_while_actors_come_or_go() -> None:
    scaler = Autoscaler(CONFIG)
    see(scaler, 3, actors=2, wait_s=5.0, busy_share=1.0)
    joining = StepTimes(3, 10.0, 5.0, 1.0, serving=2)
    assert scaler.see(joining, wanted=3) is None
    assert see(scaler, 3, actors=3, first=4, wait_s=5.0, busy_share=1.0) == []
    assert len(see(scaler, 1, actors=3, first=7, wait_s=5.0, busy_share=1.0)) == 1


def test_a_step_counts_once() -> None:
    scaler = Autoscaler(CONFIG)
    times = StepTimes(1, 10.0, 5.0, 1.0, serving=1)
    assert [scaler.see(times, 1) for _ in range(20)] == [None] * 20


def test_limits_hold() -> None:
    scaler = Autoscaler(AutoscaleConfig(enabled=True, min_actors=3, max_actors=4, window_steps=1, patience=1))
    assert see(scaler, 1, actors=3, wait_s=9.0, busy_share=1.0)[0].actors == 4
    assert see(scaler, 1, actors=4, first=1, busy_share=0.1)[0].actors == 3


def test_step_times_come_out_of_the_learners_status() -> None:
    status = {"step": 7, "step_s": 2.0, "wait_s": 0.5, "actors_busy_share": 0.75, "actors_serving": 3.0, "phase": "x"}
    assert StepTimes.of(status) == StepTimes(7, 2.0, 0.5, 0.75, 3)
    assert StepTimes.of({"phase": "loading the model"}) is None


@pytest.mark.parametrize("start", [1, 5, 16])
@pytest.mark.parametrize(("train_s", "work_s"), [(10.0, 46.0), (10.0, 3.0), (2.0, 60.0), (10.0, 88.0)])
def test_a_simulated_run_comes_to_rest_where_neither_side_waits_much(start: int, train_s: float, work_s: float) -> None:
    """`work_s`: seconds that one actor needs for a step's groups. Overlapped: the slower side decides."""
    scaler, actors, changes = Autoscaler(CONFIG), start, 0
    for step in range(200):
        step_s = max(train_s, work_s / actors)
        times = StepTimes(step, step_s, step_s - train_s, work_s / actors / step_s, serving=actors)
        if proposal := scaler.see(times, actors):
            actors, changes = proposal.actors, changes + (proposal.actors != actors)
            last = step
    assert changes <= 5
    assert changes == 0 or last < 60, "it has come to rest"
    waited = max(0.0, 1 - train_s / (work_s / actors)) if work_s / actors > train_s else 0.0
    assert waited <= 0.1 or actors == CONFIG.max_actors
    idle = 1 - min(1.0, work_s / actors / train_s)
    assert idle <= 0.6 or actors == CONFIG.min_actors


def test_recipe_refuses_limits_that_exclude_its_own_number() -> None:
    with pytest.raises(RecipeError, match=r"actor\.count: found 9, allowed with autoscale\.enabled: 1 to 8"):
        parse_recipe({"autoscale": {"enabled": True}, "actor": {"count": 9}}, "test")
    with pytest.raises(RecipeError, match=r"min_actors: found 5, allowed: at most max_actors = 4"):
        parse_recipe({"autoscale": {"min_actors": 5, "max_actors": 4}}, "test")
