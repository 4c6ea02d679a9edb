"""The advisor against hand-computed shares, and against a small simulation of both sides."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import pytest

from learner.telemetry.advisor import KEPT, WINDOW_S, Advisor, Shares, advise, load, speedup
from learner.telemetry.sample import ActorSample, ActorState, Advice, LearnerPhase, Sample


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


STEP_S = 2.0


def sample(t: float, *, wait: float, busy: float, actors: int = 2, process: int = 1, phase: LearnerPhase = "training",
           backlog: int = 4, step_s: float = STEP_S) -> Sample:  # fmt: skip
    """A run after t seconds of which the learner waited for a share, and the actors were busy for a share."""
    return Sample(
        t=1000 + t, process=process, step=int(t / step_s), phase=phase, backlog=backlog,
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


def is_measuring(advice: Advice | None, steps: int) -> bool:
    """Whether nothing is advised yet, after so many whole steps."""
    return (
        advice is not None
        and advice.side == "unknown"
        and advice.text == f"measuring: advice takes 2 whole steps with the same actors, {steps} so far"
    )


def test_advisor_measures_between_samples() -> None:
    found = seen(*(sample(t, wait=0.4, busy=1.0) for t in range(30)))
    assert found is not None
    assert (found.side, found.waiting_share, found.busy_share) == ("rollout", pytest.approx(0.4), pytest.approx(1.0))


def test_advisor_says_how_many_whole_steps_it_has_seen() -> None:
    assert is_measuring(seen(*(sample(t, wait=0.4, busy=1.0) for t in range(2))), 0)
    assert is_measuring(seen(*(sample(t, wait=0.4, busy=1.0) for t in range(4))), 0), "one end, no whole step yet"
    assert is_measuring(seen(*(sample(t, wait=0.4, busy=1.0) for t in range(5))), 1)


def test_advisor_wants_samples_enough_to_know_where_its_steps_end() -> None:
    """A sample a minute, of steps of 100 s: both ends of two of them could be off by a minute."""
    rare = [sample(60.0 * n, wait=0.4, busy=1.0, step_s=100.0) for n in range(30)]
    assert is_measuring(seen(*rare[:10]), 2)
    found = seen(*rare)
    assert found is not None and found.waiting_share == pytest.approx(0.4)


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


def test_advisor_keeps_few_samples_however_many_it_sees() -> None:
    advisor = Advisor()
    for t in range(2000):
        advisor.see(sample(t / 2, wait=0.4, busy=1.0, step_s=0.5))
        assert len(advisor.window._marks) <= 2 * KEPT
    assert advisor.window.shares is not None and WINDOW_S <= advisor.window.shares.seconds <= WINDOW_S * 1.1


@pytest.mark.parametrize("change", ["actors", "process", "restart", "rollback"])
def test_advisor_begins_anew_when_something_is_no_longer_the_same(change: str) -> None:
    before = [sample(t, wait=0.0, busy=0.5) for t in range(30)]
    changed = {"actors": {"actors": 3}, "process": {"process": 2}, "restart": {}, "rollback": {"step_s": 40.0}}[change]
    after = sample(3.0 if change == "restart" else 31, wait=0.0, busy=0.5, **changed)  # type: ignore[arg-type]
    assert is_measuring(seen(*before, msgspec.structs.replace(after, t=1031.0)), 0)


def test_advisor_leaves_out_the_step_in_which_actors_came() -> None:
    """It is of two runs. With 100 s a step a third actor comes at 150 s: whole steps are those from 200 s on."""
    advisor, found = Advisor(), {}
    for t in range(0, 420, 2):
        found[t] = advisor.see(sample(t, wait=0.4, busy=1.0, actors=2 if t < 150 else 3, step_s=100.0))
    assert all(is_measuring(found[t], 0) for t in range(150, 300, 2))
    assert all(is_measuring(found[t], 1) for t in range(300, 400, 2))
    last = found[400]
    assert last is not None and (last.side, last.actors) == ("rollout", 4)


def test_advisor_keeps_its_verdict_during_an_evaluation_and_counts_none_of_it() -> None:
    before = [sample(t, wait=0.4, busy=1.0) for t in range(30)]
    evaluating = [sample(30 + t, wait=0.4, busy=1.0, phase="evaluating") for t in range(30)]
    advisor = Advisor()
    for one in before:
        verdict = advisor.see(one)
    assert [advisor.see(one) for one in evaluating] == [verdict] * 30
    again = sample(61, wait=0.0, busy=1.0)
    assert advisor.see(again) == verdict, "too short to be measured"


def test_advisor_has_a_last_word_on_a_run_whose_actors_have_gone_home() -> None:
    advisor = Advisor()
    for t in range(30):
        verdict = advisor.see(sample(t, wait=0.4, busy=1.0))
    assert verdict is not None and verdict.side == "rollout"
    assert advisor.see(sample(31, wait=0.4, busy=1.0, actors=0)) is None, "nobody is there to be counted"
    assert advisor.see(sample(32, wait=0.4, busy=1.0, actors=0, phase="finished")) == verdict


def test_advisor_forgets_its_verdict_when_other_actors_come_after_all_have_died() -> None:
    advisor = Advisor()
    for t in range(30):
        advisor.see(sample(t, wait=0.4, busy=1.0))
    assert advisor.see(sample(31, wait=0.4, busy=1.0, actors=0)) is None
    assert is_measuring(advisor.see(sample(32, wait=0.4, busy=1.0)), 0)


def test_advisor_takes_back_its_verdict_where_a_step_does_not_end() -> None:
    advisor = Advisor()
    for t in range(0, 1000, 5):
        verdict = advisor.see(sample(t, wait=0.4, busy=1.0, step_s=200.0))
    assert verdict is not None and verdict.side == "rollout"
    stuck = {
        t: advisor.see(msgspec.structs.replace(sample(t, wait=0.4, busy=1.0), step=4)) for t in range(1000, 2000, 5)
    }
    assert all(stuck[t] == verdict for t in range(1000, 1200, 5)), "two steps of 200 s, at most as long as both"
    late = stuck[1995]
    assert late is not None
    assert (late.side, late.text) == ("unknown", "no advice: this step takes longer than the last 2 together")


def test_advisor_without_actors_says_nothing() -> None:
    assert seen(*(sample(t, wait=0.4, busy=1.0, actors=0) for t in range(30))) is None


# --- a simulation of both sides in turn (max_lag 0) -------------------------------------------------------------------


ROOM = 4
"""Tickets that an actor holds."""
GROUPS = 200
"""Of a step."""


def in_turn(actors: int, work_s: float, train_s: float, seconds: float, every_s: float) -> Iterator[Sample]:
    """A run whose steps take one actor `work_s` to generate and the learner `train_s` to train on, one after the
    other."""
    generate_s = work_s / actors
    step_s = generate_s + train_s
    for number in range(int(seconds / every_s)):
        t = number * every_s
        step, into = divmod(t, step_s)
        waited = step * generate_s + min(into, generate_s)
        left = math.ceil(GROUPS * max(0.0, 1 - into / generate_s))
        held = min(left, ROOM * actors)
        state: ActorState = "generating" if held else "waiting"
        actor = ActorSample(state, serving_s=t, busy_s=waited, held=held // actors)
        yield Sample(
            t=t, process=1, step=int(step), phase="waiting" if held else "training", waits={"groups": waited},
            phases={"waiting": waited, "training": t - waited}, backlog=left - held,
            actors={f"actor-{n}": actor for n in range(actors)},
        )  # fmt: skip


@pytest.mark.parametrize(("generate_s", "train_s"), [(400.0, 200.0), (240.0, 180.0), (100.0, 80.0), (3.0, 2.0)])
def test_advice_of_a_run_in_turn_does_not_hang_on_the_half_that_goes_on(generate_s: float, train_s: float) -> None:
    actors, step_s = 8, generate_s + train_s
    advisor, verdicts = Advisor(), []
    for one in in_turn(actors, actors * generate_s, train_s, max(6 * step_s, 300.0), 0.5 if step_s < 10 else 2.0):
        advice = advisor.see(one)
        assert advice is not None
        if advice.side == "unknown":
            assert not verdicts, "once there is advice, it stays"
        else:
            verdicts.append(advice)
    assert len(verdicts) > 10
    assert {advice.side for advice in verdicts} == {"rollout"}
    for advice in verdicts:
        assert advice.waiting_share == pytest.approx(generate_s / step_s, abs=0.05)
        truth = step_s / (generate_s * actors / advice.actors + train_s)
        assert advice.actors > actors and advice.speedup == pytest.approx(truth, rel=0.2)
