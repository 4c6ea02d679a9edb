"""What a run is and what it does now: its recipe, status, actors, wish, advice, events. Plain data out of small files.

Shows no file whole but the recipe; nothing of `keys/` is ever opened. Called by `app.py`.
"""

from __future__ import annotations

import time
import tomllib
from typing import Any

import msgspec

from deploy.dashboard.history import History
from deploy.progress import ENDS, describe_end, describe_phase
from learner.telemetry.events import read_events
from protocol.rundir import RunDir, read_json
from protocol.scaling import Member, Wish, read_members, read_wish

EVENTS = 100
"""So many of the newest are shown."""
SHOWN_RECIPE = (
    "seed", "rollout.groups_per_step", "rollout.group_size", "rollout.max_tokens", "rollout.temperature",
    "rollout.max_lag", "task.name", "optim.lr", "actor.engine",
)  # fmt: skip
"""Keys of the recipe that the page names."""


def run_card(run: RunDir) -> dict[str, Any]:
    """What does not change while a run goes on: {"name", "method", "model", "steps", "draws", "recipe", "path"}."""
    try:
        recipe = tomllib.loads(run.recipe.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        recipe = {}
    method = str(recipe.get("method", "grpo"))
    shown = {key: value for key in SHOWN_RECIPE if (value := _at(recipe, key)) is not None}
    return {
        "name": str(recipe.get("name") or run.path.name),
        "directory": run.path.name,
        "method": method,
        "model": str(_at(recipe, "model.path") or ""),
        "steps": int(recipe.get("steps") or 0),
        "draws": method not in ("sft", "dpo"),
        "recipe": shown,
    }


def _at(recipe: dict[str, Any], key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def present(run: RunDir, history: History) -> dict[str, Any]:
    """What goes on now. "alive": a process of the run lives; "scalable": a launcher reads the wish."""
    status, newest = _read(run, "status") or {}, history.newest
    launcher, learner = run.is_held("launcher"), run.is_held("learner")
    wish = _wish(run)
    return {
        "now": time.time(),
        "alive": launcher or learner,
        "scalable": launcher and wish is not None,
        "status": _status(status),
        "wish": {"actors": wish.actors, "by": wish.by} if wish else None,
        "actors": actor_rows(history, _members(run) if launcher else []),
        "advice": msgspec.to_builtins(newest.advice) if newest and newest.advice else None,
        "sampled": newest.t if newest else None,
        "version": newest.version if newest else status.get("version"),
        "tickets": newest.tickets if newest else {},
        "dropped": newest.dropped if newest else {},
        "restarted": newest.restarted if newest else 0,
        "events": read_events(run.events, EVENTS)[::-1],
        "summary": _read(run, "summary"),
    }


def _status(status: dict[str, Any]) -> dict[str, Any]:
    """The learner's status.json in the words of the terminal's view. "ended": it has said its last word; "end": how the
    run has ended, if none of its processes lives."""
    kept = ("step", "steps", "left_s", "waiting_for", "waited_s", "doing", "error", "guard", "rollbacks", "written_at")
    found = {key: status[key] for key in kept if status.get(key) not in (None, "")}
    return found | {
        "phase": describe_phase(status),
        "ended": status.get("phase") in ENDS,
        "end": describe_end(status),
        "started_at": status.get("started_at"),
        "pending": status.get("actors_pending") or {},
    }


def actor_rows(history: History, members: list[Member]) -> list[dict[str, Any]]:
    """A row for each actor that is connected, that was, or that the launcher would start; by name."""
    sample, rates = history.newest, history.actor_rates()
    known = {member.name: member for member in members}
    seen = sample.actors if sample else {}
    rows = []
    for name in sorted(known.keys() | seen.keys(), key=lambda name: (len(name), name)):
        member, actor = known.get(name), seen.get(name)
        row: dict[str, Any] = {"name": name, "state": actor.state if actor else "starting"}
        if member is not None:
            row |= {"node": member.node, "why": member.why}
            if actor is None or actor.state == "gone" or member.state in ("refused", "failed", "leaving"):
                row["state"] = {"running": row["state"], "leaving": "draining"}.get(member.state, member.state)
        if actor is not None and actor.state != "gone":
            row |= {
                "version": actor.version, "held": actor.held, "running": actor.running, "room": actor.room,
                "memory": actor.rss_bytes, "swaps": actor.swaps, "pause_s": actor.pause_s, "fetch_s": actor.fetch_s,
                "grader_errors": actor.grader_errors, "tokens_per_s": round(rates.get(name, 0.0), 1),
            }  # fmt: skip
        rows.append(row)
    return rows


def _read(run: RunDir, name: str) -> dict[str, Any] | None:
    try:
        found = read_json(getattr(run, name))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _wish(run: RunDir) -> Wish | None:
    try:
        return read_wish(run)
    except (ValueError, KeyError, TypeError):
        return None


def _members(run: RunDir) -> list[Member]:
    try:
        return read_members(run)
    except (ValueError, TypeError):
        return []
