"""Rates and shares between samples of a run. Pure; used by `deploy/status.py`.

A count of the learner's that is smaller than before belongs to a process that was started again: it began at zero. Of
actors `growth.py` knows that. Where the clock was set back nothing can be said: only samples since then are looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from learner.telemetry.growth import ActorGrowth
from learner.telemetry.sample import Sample, parts_of_serving


def grown(before: float, now: float) -> float:
    """How much a count of the learner's has grown."""
    return now - before if now >= before else now


@dataclass(frozen=True)
class Rates:
    """What happened from a first sample to a last one. Rates are per second."""

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
    def between(cls, *samples: Sample) -> Rates:
        """From the first to the last, oldest first. Those between tell more of actors that came and went meanwhile.
        Nothing at all happened between a sample and itself."""
        before, now = samples[0], samples[-1]
        seconds = max(now.t - before.t, 1e-9)
        actors, drawn, whole = ActorGrowth(), defaultdict[str, float](float), defaultdict[str, float](float)
        for sample in samples:
            for name, growth in actors.see(sample).items():
                drawn[name] += growth.counts["tokens"]
                for what, count in growth.counts.items():
                    whole[what] += count
        spent = parts_of_serving(whole["serving_s"], whole["busy_s"], whole["paused_s"])
        return cls(
            seconds=seconds,
            groups=grown(before.groups, now.groups) / seconds,
            drawn_tokens=whole["tokens"] / seconds,
            accepted_tokens=grown(before.tokens, now.tokens) / seconds,
            trained_tokens=grown(before.trained_tokens, now.trained_tokens) / seconds,
            weight_bytes=grown(before.weights_bytes, now.weights_bytes) / seconds,
            learner=_shares(
                {name: grown(before.phases.get(name, 0.0), spent) for name, spent in now.phases.items()}
                if before.process == now.process
                else now.phases
            ),
            actors=_shares(spent),
            tokens_of={name: drawn[name] / seconds for name, actor in now.actors.items() if actor.state != "gone"},
        )


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Parts of a time -> parts of 1; those that are nothing are left out."""
    total = sum(seconds.values())
    return {name: part / total for name, part in seconds.items() if part > 0} if total else {}


def over_time(samples: Sequence[Sample], points: int) -> list[Rates]:
    """Rates over at most `points` stretches of equal length of the time that the samples cover, oldest first."""
    samples = unbroken(samples)
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
    recent = list(_backwards(unbroken(samples), seconds))
    return Rates.between(*reversed(recent)) if len(recent) > 1 else None


def unbroken(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The newest samples, back to where the clock was set back, or the file was read anew."""
    for index in range(len(samples) - 1, 0, -1):
        if samples[index].t <= samples[index - 1].t:
            return list(samples)[index:]
    return samples


def _backwards(samples: Sequence[Sample], seconds: float) -> Iterable[Sample]:
    """From the newest one on, until one is older than so many seconds; that one, too."""
    for sample in reversed(samples):
        yield sample
        if samples[-1].t - sample.t >= seconds:
            return
