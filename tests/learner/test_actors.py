"""What the learner makes of the work that actors tell of."""

from __future__ import annotations

import threading
from collections import deque
from types import SimpleNamespace

from learner.actors import RATE_STEPS, Actors
from learner.intake.server import ActorTotals
from learner.state import RunState
from learner.summary import process_totals, run_summary
from tests.learner.test_loop import recipe_of


def actors_with(totals: ActorTotals, serving: list[int]) -> Actors:
    """What `work_since_last` looks at."""
    actors = object.__new__(Actors)
    actors.server = SimpleNamespace(lock=threading.Lock(), totals=totals, serving=lambda: serving[-1])  # type: ignore[assignment]
    actors._worked = deque([(0.0, 0.0, 0.0)], maxlen=RATE_STEPS + 1)
    return actors


def test_rate_of_a_step_is_of_the_actors_that_serve_now() -> None:
    totals, serving = ActorTotals(max=8), [2]
    actors = actors_with(totals, serving)
    assert actors.work_since_last()["rollout_tokens_per_s"] == 0.0, "nobody has drawn anything"
    totals.generated_tokens, totals.busy_s, totals.serving_s = 1000, 10.0, 20.0
    assert actors.work_since_last() == {
        "rollout_tokens_per_s": 2 * 100.0, "actors_serving": 2.0, "actors_busy_share": 0.5,
    }  # fmt: skip
    serving.append(4)
    totals.generated_tokens, totals.busy_s, totals.serving_s = 1600, 14.0, 24.0
    assert actors.work_since_last()["rollout_tokens_per_s"] == 4 * 1600 / 14, "tokens come in lumps: over both steps"
    serving.append(1)
    found = actors.work_since_last()
    assert found["rollout_tokens_per_s"] == 1600 / 14, "no heartbeat since: by what was told before"
    assert found["actors_busy_share"] == 0.0
    for _ in range(RATE_STEPS):
        totals.generated_tokens, totals.busy_s = totals.generated_tokens + 50, totals.busy_s + 1.0
        found = actors.work_since_last()
    assert found["rollout_tokens_per_s"] == 50.0, "what was long ago no longer counts"


def test_rate_of_a_run_is_of_the_actors_that_served_on_average() -> None:
    """Not of the most that there ever were: eight for a moment are not eight throughout."""
    earlier = {"generated_tokens": 500, "busy_s": 5.0, "serving_actor_s": 30.0, "served_s": 10.0, "max": 8}
    state = RunState(earlier=earlier)
    totals = process_totals(state, None)
    assert (totals["serving_actor_s"], totals["served_s"], totals["max"]) == (30.0, 10.0, 8)
    summary = run_summary(recipe_of(), state, None, [])  # type: ignore[arg-type]  # of the versions only their number
    assert summary["rollout_tokens_per_s"] == 100.0 * 3.0
    old = RunState(earlier={"generated_tokens": 500, "busy_s": 5.0, "max": 8})
    assert run_summary(recipe_of(), old, None, [])["rollout_tokens_per_s"] is None  # type: ignore[arg-type]
