"""Rates and shares between two samples of a run. Pure; used by `deploy/status.py` and the dashboard.

A count that is smaller than before belongs to a process that was started again: it began at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from learner.telemetry.sample import ActorSample, Sample, parts_of_serving

NEVER = ActorSample("gone")


def grown(before: float, now: float) -> float:
    """How much a count has grown."""
    return now - before if now >= before else now


@dataclass(frozen=True)
class Rates:
    """What happened between two samples. Rates are per second."""

    seconds: float
    groups: float
    """Groups accepted."""
    drawn_tokens: float
    """Completion tokens that all actors together drew."""
    accepted_tokens: float
    trained_tokens: float
    weight_bytes: float
    learner: dict[str, float]
    """What the learner did (LearnerPhase) -> share of its time."""
    actors: dict[str, float]
    """"generating", "updating", "waiting" -> share of the time that actors served."""
    tokens_of: dict[str, float]
    """Actor -> completion tokens that it drew."""

    @classmethod
    def between(cls, before: Sample, now: Sample) -> Rates:
        """`before` is the earlier one; nothing at all happened between a sample and itself."""
        seconds = max(now.t - before.t, 1e-9)
        same = {
            name: (before.actors.get(name, NEVER), actor) for name, actor in now.actors.items() if actor.state != "gone"
        }
        tokens_of = {name: grown(old.tokens, new.tokens) / seconds for name, (old, new) in same.items()}
        served, busy, paused = (
            sum(grown(getattr(old, what), getattr(new, what)) for old, new in same.values())
            for what in ("serving_s", "busy_s", "paused_s")
        )
        spent = parts_of_serving(served, busy, paused)
        return cls(
            seconds=seconds,
            groups=grown(before.groups, now.groups) / seconds,
            drawn_tokens=sum(tokens_of.values()),
            accepted_tokens=grown(before.tokens, now.tokens) / seconds,
            trained_tokens=grown(before.trained_tokens, now.trained_tokens) / seconds,
            weight_bytes=grown(before.weights_bytes, now.weights_bytes) / seconds,
            learner=_shares(
                {name: grown(before.phases.get(name, 0.0), spent) for name, spent in now.phases.items()}
                if before.process == now.process
                else now.phases
            ),
            actors=_shares(spent),
            tokens_of=tokens_of,
        )


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Parts of a time -> parts of 1; those that are nothing are left out."""
    total = sum(seconds.values())
    return {name: part / total for name, part in seconds.items() if part > 0} if total else {}


def over_time(samples: Sequence[Sample], points: int) -> list[Rates]:
    """Rates over at most `points` stretches of equal length of the time that the samples cover, oldest first."""
    if len(samples) < 2:
        return []
    length = (samples[-1].t - samples[0].t) / points
    found, begin = [], samples[0]
    for sample in samples[1:]:
        if sample.t - begin.t >= length * (1 - 1e-6):
            found.append(Rates.between(begin, sample))
            begin = sample
    return found


def lately(samples: Sequence[Sample], seconds: float) -> Rates | None:
    """Rates over the last so many seconds; None without two samples."""
    recent = list(_backwards(samples, seconds))
    return Rates.between(recent[-1], recent[0]) if len(recent) > 1 else None


def _backwards(samples: Sequence[Sample], seconds: float) -> Iterable[Sample]:
    """From the newest one on, until one is older than so many seconds; that one, too."""
    for sample in reversed(samples):
        yield sample
        if samples[-1].t - sample.t >= seconds:
            return
