"""Growth of actors' counts, over restarts of either side and silences."""

from __future__ import annotations

from learner.telemetry.growth import ActorGrowth, Growth
from learner.telemetry.sample import CONNECTING, ActorSample, Sample

GONE = ActorSample("gone")
BACK = ActorSample("starting", CONNECTING)


def actor(tokens: int, serving: float, incarnation: str = "p1") -> ActorSample:
    """One that is busy for half of its time, and pauses for a tenth."""
    return ActorSample(
        "generating", tokens=tokens, serving_s=serving, busy_s=serving / 2, paused_s=serving / 10,
        incarnation=incarnation,
    )  # fmt: skip


def growth(*actors: ActorSample | None, process: tuple[int, ...] = (), times: tuple[float, ...] = ()) -> list[object]:
    """What is told of an actor at each sample, a sample every ten seconds: since when, and tokens; None for nothing."""
    seen, found = ActorGrowth(), []
    for index, one in enumerate(actors):
        pid, t = process[index] if process else 1, times[index] if times else 10.0 * index
        told = seen.see(Sample(t=t, process=pid, actors={"a": one} if one else {})).get("a")
        found.append((told.since, told.counts["tokens"]) if told else None)
    return found


def test_growth_is_what_was_added_since_the_sample_before() -> None:
    seen = ActorGrowth()
    seen.see(Sample(t=0.0, process=1, actors={"a": actor(100, 10)}))
    assert seen.see(Sample(t=10.0, process=1, actors={"a": actor(400, 20)})) == {
        "a": Growth(0.0, {"tokens": 300, "serving_s": 10, "busy_s": 5, "paused_s": 1})
    }


def test_what_the_first_sample_knows_was_drawn_before() -> None:
    assert growth(actor(9000, 500)) == [(0.0, 0.0)]


def test_a_silent_actor_goes_on_where_it_was() -> None:
    assert growth(actor(9000, 500), GONE, BACK, actor(9300, 530), actor(9400, 540)) == [
        (0.0, 0.0), None, None, (0.0, 300.0), (30.0, 100.0)
    ]  # fmt: skip


def test_an_actor_that_outlives_its_learner_goes_on_where_it_was() -> None:
    found = growth(actor(9000, 500), None, BACK, actor(9300, 530), process=(1, 2, 2, 2))
    assert found == [(0.0, 0.0), None, None, (0.0, 300.0)]


def test_an_actor_that_nobody_has_seen_before_is_counted_from_then_on() -> None:
    assert growth(None, None, BACK, actor(9000, 500), actor(9100, 510)) == [
        None, None, None, (20.0, 0.0), (30.0, 100.0)
    ]  # fmt: skip


def test_a_new_process_is_counted_from_zero() -> None:
    assert growth(actor(900, 500), actor(70, 7, "p2")) == [(0.0, 0.0), (0.0, 70.0)]
    assert growth(None, actor(70, 7)) == [None, (0.0, 70.0)]
    assert growth(actor(50, 5), actor(70, 7, "p2"))[1] == (0.0, 70.0), "although its counts are larger"


def test_a_new_process_that_was_at_work_before_anybody_looked_is_not_counted_anew() -> None:
    assert growth(actor(900, 500), actor(7000, 700, "p2")) == [(0.0, 0.0), (0.0, 0.0)]


def test_in_a_timeline_without_incarnations_no_count_falls() -> None:
    found = growth(actor(900, 500, ""), actor(950, 510, ""), actor(10, 1, ""), actor(60, 6, ""))
    assert found == [(0.0, 0.0), (0.0, 50.0), (10.0, 0.0), (20.0, 50.0)]
