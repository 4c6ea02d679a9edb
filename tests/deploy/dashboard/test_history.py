"""Series and lanes out of samples whose rates and states are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.dashboard.history import SMOOTH, History
from deploy.dashboard.lanes import STATES, Lanes
from deploy.dashboard.readers import Readers
from learner.telemetry.sample import CONNECTING, ActorSample, Sample
from learner.telemetry.timeline import Timeline
from protocol.rundir import RunDir


def sample(t: float, drawn: int = 0, trained: int = 0, process: int = 1, **fields: Any) -> Sample:
    actors = fields.pop("actors", {"actor-0": ActorSample("generating", tokens=drawn, serving_s=t, busy_s=t / 2)})
    fields = {"phase": "training", "phases": {"training": t}} | fields
    return Sample(t=t, process=process, actors=actors, trained_tokens=trained, **fields)


def worker(tokens: int, serving: float, incarnation: str = "p1") -> ActorSample:
    """One that is busy for half of its time."""
    return ActorSample("generating", tokens=tokens, serving_s=serving, busy_s=serving / 2, incarnation=incarnation)


def history(*samples: Sample) -> History:
    made = History()
    for one in samples:
        made.see(one)
    return made


def values(found: dict[str, Any], name: str) -> list[float | None]:
    return found["series"][name]


@pytest.mark.parametrize("points", [20, 50, 400])
def test_rates_are_exact_however_few_points_are_asked_for(points: int) -> None:
    found = history(*(sample(1000 + t, 30 * t, version=t) for t in range(401))).series(0, points)
    assert len(found["t"]) == points
    assert found["t"][-1] == 1400
    assert values(found, "rollout_tokens_per_s") == [30.0] * points
    assert values(found, "busy_share") == [0.5] * points


def test_a_window_begins_where_it_is_asked_to() -> None:
    found = history(*(sample(1000 + t) for t in range(401))).series(1300, 100)
    assert found["t"][0] == pytest.approx(1300, abs=2)


def test_tokens_of_a_step_are_spread_over_the_time_since_the_step_before() -> None:
    steps = [sample(float(t), trained=400 * (t // 20)) for t in range(1, 201)]
    found = history(*steps).series(0, 200)
    assert {round(value, 3) for value in values(found, "learner_tokens_per_s")[40:] if value is not None} == {20.0}


def test_the_first_lump_is_not_spread_over_the_time_before_anybody_worked_at_it() -> None:
    def at(t: int) -> Sample:
        """An actor serves from 50 on and has drawn 110 tokens at 60; the learner trains from 70 on and on 420 by 90."""
        actor = ActorSample("generating" if t >= 50 else "starting", tokens=110 * (t >= 60), serving_s=max(0, t - 50))
        return sample(
            t, trained=420 * (t >= 90), actors={"actor-0": actor}, phase="training" if t >= 70 else "evaluating"
        )

    found = history(*map(at, range(1, 91))).series(0, 5000)
    assert len(found["t"]) == 89, "a point for each sample, a mean of no others"
    for side, began, ended, rate in (("rollout", 50, 60, 10.0), ("learner", 70, 90, 20.0)):
        rates = dict(zip(found["t"], values(found, f"{side}_tokens_per_s"), strict=True))
        assert {rates[t] for t in range(2, began)} == {0.0}, side
        assert [rates[t] for t in range(began, ended + 1)] == [pytest.approx(rate)] * (ended + 1 - began), side


def test_what_a_step_under_way_will_bring_is_not_told_as_zero() -> None:
    steps = [sample(float(t), trained=400 * (t // 20)) for t in range(1, 216)]
    found = history(*steps).series(0, 215)
    last = dict(zip(found["t"], values(found, "learner_tokens_per_s"), strict=True))
    assert last[200.0] == pytest.approx(20.0)
    assert set(values(found, "learner_tokens_per_s")[-15:]) == {None}
    assert last[215.0] is None, "the step that began at 200 has not ended"


def test_a_learner_that_makes_no_steps_any_more_is_told_so() -> None:
    steps = [sample(float(t), trained=min(4000, 400 * (t // 20))) for t in range(1, 400)]
    assert values(history(*steps).series(0, 200), "learner_tokens_per_s")[-1] == 0.0


def test_a_new_learner_process_cuts_the_lines_and_counts_from_zero() -> None:
    first = [sample(float(t), 100 + 10 * t, process=1) for t in range(1, 51)]
    second = [sample(100.0 + t, 10 * t, process=2) for t in range(1, 51)]
    found = history(*first, *second).series(0, 100)
    by_time = dict(zip(found["t"], values(found, "rollout_tokens_per_s"), strict=True))
    assert by_time[101.0] is None
    assert {value for time, value in by_time.items() if time != 101.0} == {10.0}


def test_a_restarted_actor_counts_on_from_where_it_was() -> None:
    before = [sample(float(t), actors={"a": worker(10 * t, t)}) for t in range(1, 31)]
    after = [sample(30.0 + t, actors={"a": worker(10 * t, t, "p2")}) for t in range(1, 31)]
    made = history(*before, *after)
    assert {round(v or 0, 3) for v in values(made.series(0, 60), "rollout_tokens_per_s")} == {10.0}
    assert made.actor_rates() == {"a": pytest.approx(10.0)}


def test_levels_are_means_over_the_time_before_a_point() -> None:
    made = history(*(sample(float(t), tickets={"queued": t % 2 * 8}) for t in range(1, 402)))
    assert values(made.series(0, 20), "queued")[-1] == pytest.approx(4.0, abs=8 / (20 * SMOOTH))


LIFETIME = 10_000_000


def at_work(t: int, process: int = 1, **others: ActorSample) -> Sample:
    """An actor that has been at work for long draws 1000 tokens a second."""
    return sample(float(t), process=process, actors={"a": worker(LIFETIME + 1000 * t, 9000 + t), **others})


def silent(t: int, actor: ActorSample, process: int = 1, **others: ActorSample) -> Sample:
    return sample(float(t), process=process, actors={"a": actor, **others})


CONNECTED = ActorSample("starting", CONNECTING)


def test_an_actor_that_was_buried_and_came_back_goes_on_where_it_was() -> None:
    made = history(
        *(at_work(t, b=worker(100 * t, t)) for t in range(1, 51)),
        *(silent(t, ActorSample("gone"), b=worker(100 * t, t)) for t in range(51, 80)),
        silent(80, CONNECTED, b=worker(8000, 80)),
        *(at_work(t, b=worker(100 * t, t)) for t in range(81, 121)),
    )
    found = made.series(0, 120)
    assert set(values(found, "rollout_tokens_per_s")) == {1100.0}, "what it drew in silence is spread over the silence"
    assert set(values(found, "busy_share")) == {0.5}
    assert made.increase("rollout_tokens", 0, -1) == pytest.approx(119 * 1100)
    assert made.actor_rates() == {"a": pytest.approx(1000), "b": pytest.approx(100)}


def test_an_actor_that_comes_back_shows_its_rate_at_once() -> None:
    made = history(at_work(1), *(silent(t, ActorSample("gone")) for t in range(2, 300)), at_work(300))
    assert made.actor_rates() == {"a": pytest.approx(1000)}


def test_an_actor_that_outlives_its_learner_goes_on_where_it_was() -> None:
    made = history(
        *(at_work(t) for t in range(1, 51)),
        silent(100, ActorSample("gone"), process=2),
        silent(101, CONNECTED, process=2),
        *(at_work(t, process=2) for t in range(102, 151)),
    )
    found = made.series(0, 150)
    by_time = dict(zip(found["t"], values(found, "rollout_tokens_per_s"), strict=True))
    assert by_time.pop(100.0) is None and set(by_time.values()) == {1000.0}
    assert set(values(found, "busy_share")) == {0.5, None}
    assert made.increase("rollout_tokens", 0, -1) == pytest.approx(149 * 1000)


def test_an_actor_of_which_no_earlier_sample_tells_is_counted_from_then_on() -> None:
    made = history(sample(1.0, actors={}), sample(2.0, actors={}), *(at_work(t) for t in range(3, 23)))
    assert made.increase("rollout_tokens", 0, -1) == 19_000


def test_after_a_clock_that_was_set_back_the_page_goes_on_at_once() -> None:
    made = history(*(sample(float(t), 10 * t) for t in range(1, 101)))
    for t in range(41, 61):
        made.see(sample(t + 0.5, 1000 + 30 * (t - 40), actors={"a": worker(1000 + 30 * (t - 40), 100 + t - 40)}))
        assert made.newest is not None and made.times[-1] == made.newest.t == t + 0.5
    assert made.times == [*map(float, range(1, 42)), *(t + 0.5 for t in range(41, 61))]
    found = made.series(0, 120)
    by_time = dict(zip(found["t"], values(found, "rollout_tokens_per_s"), strict=True))
    assert by_time.pop(41.5) is None, "no line leads there"
    assert {value for time, value in by_time.items() if time < 41.5} == {10.0}
    assert {value for time, value in by_time.items() if time > 41.5} == {30.0}
    learner = next(lane for lane in made.lanes.between(0.0, 60.5, 100) if lane["name"] == "learner")
    assert [(start, end) for start, end, _ in learner["segments"]] == [(1.0, 41.0), (41.5, 60.5)]


def test_a_clock_that_was_set_back_to_before_the_first_sample_leaves_nothing_of_before() -> None:
    made = history(*(sample(100.0 + t, 10 * t) for t in range(10)), *(sample(float(t), 90 + 20 * t) for t in range(5)))
    assert made.times == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert set(values(made.series(0, 20), "rollout_tokens_per_s")) == {20.0}


def test_a_file_that_is_read_anew_ends_as_it_did_also_where_the_clock_was_set_back() -> None:
    samples = [sample(t, round(10 * t)) for t in (*range(1, 41), *(20.5 + t for t in range(40)))]
    made = history(*samples)
    end = made.times[-1]
    for one in samples[1::2]:
        made.see(one)
    assert made.times[-1] == end and made.times == sorted(set(made.times))
    made.see(sample(61.0, 610))
    assert values(made.series(55, 20), "rollout_tokens_per_s")[-1] == pytest.approx(10.0, rel=0.2)


# --- lanes ------------------------------------------------------------------------------------------------------------


def lanes_of(*states: str, process: list[int] | None = None) -> list[dict[str, Any]]:
    """Lanes of an actor with a state a second."""
    made, before = Lanes(), None
    for t, state in enumerate(states):
        pid = process[t] if process else 1
        now = Sample(t=float(t), process=pid, phases={"waiting": t / 1}, actors={"actor-0": ActorSample(state)})  # type: ignore[arg-type]
        made.see(now, before)
        before = now
    return made.between(0.0, float(len(states) - 1), 100)


def named(lane: dict[str, Any]) -> list[tuple[float, float, str]]:
    return [(start, end, STATES[state]) for start, end, state in lane["segments"]]


def test_lanes_have_a_segment_for_each_stretch_in_one_state() -> None:
    learner, actor = lanes_of("starting", "starting", "generating", "generating", "updating", "gone")
    assert (learner["name"], named(learner)) == ("learner", [(0, 5, "waiting")])
    assert named(actor) == [(0, 1, "starting"), (1, 3, "generating"), (3, 4, "updating"), (4, 5, "gone")]


def test_lanes_say_nothing_of_the_time_between_two_learners() -> None:
    learner, _ = lanes_of("generating", "generating", "generating", "generating", process=[1, 1, 2, 2])
    assert named(learner) == [(0, 1, "waiting"), (2, 3, "waiting")]


def test_lanes_that_change_too_often_show_what_most_of_a_cell_was() -> None:
    _, actor = lanes_of(*(["generating"] * 3 + ["waiting"]) * 200)
    found = actor["segments"]
    assert len(found) <= 100
    generating = sum(end - start for start, end, state in named(actor) if state == "generating")
    assert generating > 0.7 * 799


def test_lanes_are_in_the_order_of_the_actors_numbers() -> None:
    made = Lanes()
    first = Sample(t=0.0, process=1, actors={f"actor-{n}": ActorSample("waiting") for n in (10, 2, 0)})
    made.see(Sample(t=1.0, process=1, actors=first.actors), first)
    assert [lane["name"] for lane in made.between(0, 1, 10)] == ["learner", "actor-0", "actor-2", "actor-10"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_readers_follow_a_timeline_that_grows_and_is_thinned_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path).create()
    readers = Readers(run)
    assert readers.timeline(0, 100) == {
        "t": [],
        "series": readers.timeline(0, 100)["series"],
        "first": None,
        "last": None,
    }
    timeline = Timeline(run.timeline, 0.2, max_bytes=20_000)
    for t in range(1, 21):
        timeline.write(sample(float(t), 30 * t), force=True)
    assert readers.timeline(0, 100)["last"] == 20.0
    assert readers.timeline(0, 100, have=20.0) == {"unchanged": True}
    for t in range(21, 301):
        timeline.write(sample(float(t), 30 * t), force=True)
        if t % 50 == 0:
            readers.timeline(0, 100)
    timeline.close()
    assert timeline.every_s > 0.2, "the file was thinned out meanwhile"
    found = readers.timeline(0, 100)
    assert set(found["series"]["rollout_tokens_per_s"]) == {30.0}
    assert found["t"] == sorted(set(found["t"]))
    assert readers._history.times[:20] == [float(t) for t in range(1, 21)], "what was read once is known"
