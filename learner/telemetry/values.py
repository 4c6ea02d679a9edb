"""What a sample and a step's figures say, by metric: the numbers behind the names of `registry.py`. Pure.

Called by `exporter.py`. A metric of which nothing is known is left out, and so is a value that is no finite number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from learner.telemetry.registry import METRICS
from learner.telemetry.sample import (
    ACTOR_STATES,
    LEARNER_PHASES,
    SERVING,
    ActorSample,
    Sample,
    has_counts,
    parts_of_serving,
)

Values = dict[tuple[str, ...], float]
"""Values of the metric's labels, in their order -> value."""
SIDES = ("rollout", "lag", "learner", "weights", "balanced")
NO_STATES = ("duplicates", "reissued")
"""Of `Sample.tickets`: what is counted beside the states."""


def of_figures(figures: Mapping[str, float]) -> dict[str, Values]:
    """What a step says."""
    found: dict[str, Values] = {}
    for metric in METRICS:
        value = figures.get(metric.figure, figures.get(metric.or_figure)) if metric.figure else None
        if value is not None:
            found[metric.name] = {(): float(value)}
    return _finite(found)


def of_sample(sample: Sample, before: Sample | None = None) -> dict[str, Values]:
    """What the run is doing. `before`: the sample before this one, for what is a mean over the time between."""
    found: dict[str, Values] = {
        "tandem_sample_time_seconds": {(): sample.t},
        "tandem_learner_step": {(): sample.step},
        "tandem_learner_phase": {(phase,): phase == sample.phase for phase in LEARNER_PHASES},
        "tandem_learner_phase_seconds_total": {(phase,): seconds for phase, seconds in sample.phases.items()},
        "tandem_learner_wait_seconds_total": {(target,): seconds for target, seconds in sample.waits.items()},
        "tandem_learner_tokens_total": {(): sample.trained_tokens},
        "tandem_learner_memory_bytes": {(kind,): size for kind, size in sample.memory.items()},
    }
    if sample.tickets:  # else the run draws nothing from the model: there is no hub
        found |= _of_intake(sample) | _of_actors(sample, before)
    if (advice := sample.advice) is not None and advice.side in SIDES:  # else it is still being measured
        found |= {
            "tandem_bottleneck": {(side,): side == advice.side for side in SIDES},
            "tandem_learner_waiting_ratio": {(): advice.waiting_share},
            "tandem_actors_busy_ratio": {(): advice.busy_share},
            "tandem_advised_actors": {(): advice.actors},
            "tandem_advised_speedup_ratio": {(): advice.speedup},
        }
    return _finite(found)


def _of_intake(sample: Sample) -> dict[str, Values]:
    """Tickets, groups and versions."""
    tickets = sample.tickets
    found: dict[str, Values] = {
        "tandem_actors_connected": {(): sum(actor.state != "gone" for actor in sample.actors.values())},
        "tandem_actors_serving": {(): sum(actor.state in SERVING for actor in sample.actors.values())},
        "tandem_actors_started_total": {(): sample.started},
        "tandem_actor_restarts_total": {(): sample.restarted},
        "tandem_groups_accepted_total": {(): sample.groups},
        "tandem_accepted_tokens_total": {(): sample.tokens},
        "tandem_tickets": {(state,): count for state, count in tickets.items() if state not in NO_STATES},
        "tandem_tickets_reissued_total": {(): sample.reissued},
        "tandem_groups_duplicate_total": {(): sample.duplicates},
        "tandem_queue_groups": {(): tickets["queued"]},
        "tandem_leases": {(): tickets["leased"]},
        "tandem_backlog_tickets": {(): sample.backlog},
        "tandem_dropped_total": {(reason,): count for reason, count in sample.dropped.items()},
        "tandem_weight_version": {(): sample.version},
        "tandem_weight_versions_published_total": {(): sample.versions},
        "tandem_weight_sync_bytes_total": {(): sample.weights_bytes},
        "tandem_weight_dense_bytes": {(): sample.dense_bytes},
    }
    return found if sample.wanted is None else found | {"tandem_actors_wanted": {(): sample.wanted}}


def _of_actors(sample: Sample, before: Sample | None) -> dict[str, Values]:
    """Every actor's own. Of one that is gone, or back and not heard of yet, only that it is: zeros would be untrue."""
    found: dict[str, Values] = {}
    for name, actor in sample.actors.items():
        found.setdefault("tandem_actor_up", {})[name,] = actor.state != "gone"
        found.setdefault("tandem_actor_state", {}).update({(name, s): s == actor.state for s in ACTOR_STATES})
        if not has_counts(actor):
            continue
        for metric, values in _of_actor(actor).items():
            found.setdefault(metric, {}).update({(name, *labels): value for labels, value in values.items()})
        earlier = before.actors.get(name) if before else None
        if (share := occupancy(earlier, actor)) is not None:
            found.setdefault("tandem_actor_occupancy_ratio", {})[name,] = share
    return found


def _of_actor(actor: ActorSample) -> dict[str, Values]:
    spent = parts_of_serving(actor.serving_s, actor.busy_s, actor.paused_s)
    found: dict[str, Values] = {
        "tandem_actor_seconds_total": {(state,): seconds for state, seconds in spent.items()},
        "tandem_rollout_tokens_total": {(): actor.tokens},
        "tandem_actor_running_completions": {(): actor.running},
        "tandem_actor_tickets_held": {(): actor.held},
        "tandem_actor_weight_version": {(): actor.version},
        "tandem_grader_errors_total": {(): actor.grader_errors},
        "tandem_weight_pause_seconds_total": {(): actor.paused_s},
        "tandem_weight_swaps_total": {(): actor.swaps},
    }
    if actor.rss_bytes:
        found["tandem_actor_memory_bytes"] = {(): actor.rss_bytes}
    if actor.swaps:
        found["tandem_weight_fetch_seconds"] = {(): actor.fetch_s}
    if actor.swaps > 1:  # the first load has nothing to pause
        found["tandem_weight_pause_seconds"] = {(): actor.pause_s}
    return found


def occupancy(before: ActorSample | None, now: ActorSample) -> float | None:
    """Requests in the engine as a share of what fits, mean between two samples of a process; None if they are not."""
    if before is None or before.incarnation != now.incarnation or not now.room:
        return None
    passed, running = now.serving_s - before.serving_s, now.running_s - before.running_s
    return min(1.0, running / (passed * now.room)) if passed > 0 and running >= 0 else None


def _finite(found: dict[str, Values]) -> dict[str, Values]:
    kept = {name: {k: float(v) for k, v in values.items() if math.isfinite(v)} for name, values in found.items()}
    return {name: values for name, values in kept.items() if values}
