"""summary.json: the run's figures, written at every checkpoint and at the end. Fields are only ever added."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

from learner.intake.dispatcher import TICKET_STATES
from learner.intake.server import ActorsSeen, ActorTotals
from learner.state import RunState
from protocol.config import Recipe

if TYPE_CHECKING:
    from learner.actors import Actors
    from learner.intake.server import IntakeServer
    from learner.publish import Versions


def run_summary(recipe: Recipe, state: RunState, actors: Actors | None, versions: Versions) -> dict[str, Any]:
    """Figures of a run so far.

    `rollout_tokens` are the completion tokens of the groups that became steps, `budget_tokens` what counts against
    `token_budget` (those and filtered ones; of sft and dpo the trained ones), `tokens_per_s` is over the wall time of
    these steps: end to end. `rollout_tokens_per_s` is what the actors draw while they generate, as many as served on
    average while any did; `learner_tokens_per_s` what goes through forward and backward (`learner_tokens`; completions
    of zero advantage are left out) over the time inside gradient steps. Of a version `weights.publish_seconds_p50` is
    how long training stood still for it, `encode_seconds_p50` what digests and delta took behind that, `seconds_p50`
    an actor's fetch, decoding and check,
    `pause_seconds_p50` the time that its generation stood still. `lag_tokens`: lag in steps -> tokens trained on.
    `parity`: comparisons of engines with the model, in nats a token; `blind` ones could not have seen one update.
    Medians are of the present process; everything else is of the whole run, resumed or not. A run without actors has
    zeros and nulls there. `branch` counts the rollbacks that lie behind the surviving steps, `lr_scale` is what they
    have made of the learning rate.
    """
    evals, rewards, process = state.evals, state.rewards, process_totals(state, actors)
    server, publisher = (actors.server, actors.publisher) if actors else (None, None)
    reward = {name: result["reward"] for name, result in evals.items()}
    return {
        "name": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "steps": state.step,
        "wall_s": state.wall_s,
        "reward_first": rewards[0] if rewards else None,
        "reward_last": rewards[-1] if rewards else None,
        "rollbacks": state.rollbacks,
        "branch": state.branch,
        "lr_scale": state.lr_scale,
        "guard": state.guard_events,
        "eval": reward.get("eval"),
        "eval_before": reward.get("before"),
        "eval_after_warm_start": reward.get("after_warm_start"),
        "eval_after": reward.get("after"),
        "rollout_tokens": state.rollout_tokens,
        "budget_tokens": state.budget_tokens,
        "rollout_tokens_per_s": _rollout_rate(process),
        "tokens_per_s": _rate(state.rollout_tokens, state.training_s),
        "learner_tokens": state.learner_tokens,
        "learner_tokens_per_s": _rate(state.learner_tokens, state.train_s),
        "lag_mean": state.lag_sum / len(rewards) if rewards else None,
        "lag_max": state.lag_max,
        "lag_tokens": dict(sorted(state.lag_tokens.items(), key=lambda item: int(item[0]))),
        "parity": state.parity,
        "tickets": _tickets(server),
        "weights": {
            "versions": len(versions),
            "bytes_dense": publisher.bytes_dense if publisher else 0,
            "bytes_delta_p50": _median(publisher.delta_bytes if publisher else ()),
            "bytes_sent": process["bytes_sent"],
            "publish_seconds_p50": _median(publisher.publish_s if publisher else ()),
            "encode_seconds_p50": _median(publisher.encode_s if publisher else ()),
            "seconds_p50": _median(server.swap_fetches if server else ()),
            "pause_seconds_p50": _median(server.swap_pauses if server else ()),
        },
        "actors": {
            "started": process["started"],
            "restarted": process["restarted"],
            "max": process["max"],
        },
        "frames_dropped": dict(server.hub.faults.counts) if server else {},
        "connections_refused": dict(server.hub.turned_away.counts) if server else {},
        "peers_rejected": server.hub.rejected if server else {},
    }


def _tickets(server: IntakeServer | None) -> dict[str, int]:
    if server is None:
        return dict.fromkeys(TICKET_STATES, 0)
    with server.lock:
        return server.dispatcher.counts()


def process_totals(state: RunState, actors: Actors | None) -> dict[str, Any]:
    """What the hub counted, in this process and, by the checkpoint's word (`earlier`), in those before."""
    earlier = state.earlier
    totals = actors.server.totals if actors else ActorTotals()
    counted = {
        "bytes_sent": actors.server.hub.bytes_sent if actors else 0,
        "started": totals.started,
        "restarted": totals.restarted,
        "generated_tokens": totals.generated_tokens,
        "busy_s": totals.busy_s,
        "serving_actor_s": totals.serving_actor_s,
        "served_s": totals.served_s,
    }
    summed = {name: value + earlier.get(name, 0) for name, value in counted.items()}
    return summed | {
        "max": max(totals.max, earlier.get("max", 0)),
        "seen": asdict(actors.seen() if actors else ActorsSeen()),
    }


def _rollout_rate(process: Mapping[str, Any]) -> float | None:
    """Tokens that an actor draws a second while it has requests, times the actors that served on average."""
    serving = _rate(process["serving_actor_s"], process["served_s"])
    rate = _rate(process["generated_tokens"], process["busy_s"])
    return None if serving is None or rate is None else serving * rate


def _median(values: Collection[float]) -> float | None:
    return median(values) if values else None


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds else None
