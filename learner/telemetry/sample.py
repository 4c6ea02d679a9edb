"""A sample: what a run is doing at one moment. One line of timeline.jsonl each; exporter, advisor and pages read it.

Counts and seconds are absolute and only grow while the process lives that they are of; whoever wants a rate subtracts
two samples, whichever are left (`timeline.py` thins them out). A restarted learner (`Sample.process`) or actor
(`ActorSample.incarnation`) begins at zero; an actor that outlives its learner goes on. Pure data.
"""

from __future__ import annotations

from typing import Literal

import msgspec

ActorState = Literal["starting", "generating", "updating", "waiting", "draining", "gone"]
LearnerPhase = Literal["starting", "waiting", "training", "publishing", "evaluating", "saving", "finished", "other"]
ACTOR_STATES: tuple[ActorState, ...] = ("starting", "generating", "updating", "waiting", "draining", "gone")
SERVING: tuple[ActorState, ...] = ("generating", "updating", "waiting")
"""States of an actor that takes tickets."""
LEARNER_PHASES: tuple[LearnerPhase, ...] = (
    "starting", "waiting", "training", "publishing", "evaluating", "saving", "finished", "other",
)  # fmt: skip

CONNECTING = "connecting"
"""`ActorSample.phase` of one that is connected and has sent no heartbeat: its counts are not known."""
INCARNATION_CHARACTERS = 16
"""What a sample keeps of an incarnation: an actor may call itself whatever it likes."""


class ActorSample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One actor as its last heartbeat told. Counts are since its process started."""

    state: ActorState
    """What it did for most of the time since the sample before; "gone" for one that was there and is not."""
    phase: str = ""
    """In its own words (`Heartbeat.phase`)."""
    version: int = 0
    held: int = 0
    """Tickets in hand."""
    running: int = 0
    """Requests inside the engine, of `room` that fit."""
    room: int = 0
    """Completions that the engine takes at once."""
    tokens: int = 0
    """Completion tokens drawn."""
    serving_s: float = 0.0
    """Seconds since it served its first version, also those without a learner; the next three are parts of it."""
    busy_s: float = 0.0
    """Seconds with at least one request in the engine."""
    running_s: float = 0.0
    """Completions in the engine, summed over time: completion-seconds."""
    paused_s: float = 0.0
    """Seconds that generation was paused for updates."""
    pause_s: float = 0.0
    """Of the last update."""
    fetch_s: float = 0.0
    """Seconds of the last fetch, check and staging."""
    swaps: int = 0
    grader_errors: int = 0
    rss_bytes: int = 0
    incarnation: str = ""
    """Of its process: another one means that it was started again, and all counts with it. "" in older timelines."""


class Advice(msgspec.Struct, frozen=True, omit_defaults=True):
    """The advisor's verdict (`advisor.py`)."""

    side: Literal["rollout", "lag", "learner", "weights", "balanced", "unknown"]
    """"unknown": nothing is measured yet, the text says what is missing, and the figures mean nothing."""
    text: str
    """One line for people."""
    waiting_share: float = 0.0
    """Of the learner's time, for groups."""
    busy_share: float = 0.0
    """Of the actors' time."""
    actors: int = 0
    """How many there should be."""
    speedup: float = 1.0
    """Throughput with as many, divided by today's."""


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """The whole run."""

    t: float
    """Unix time, seconds."""
    process: int
    """Process id of the learner: another one means that it was restarted, and all counts with it."""
    step: int = 0
    version: int = 0
    """Newest version that was announced."""
    phase: LearnerPhase = "starting"
    doing: str = ""
    """The phase in words, as status.json has it."""
    phases: dict[str, float] = {}
    """LearnerPhase -> seconds."""
    waits: dict[str, float] = {}
    """What the learner waited for ("groups", "actors", "evaluation", "probe") -> seconds."""
    groups: int = 0
    """Groups accepted, evaluations' included."""
    tokens: int = 0
    """Their completion tokens."""
    trained_tokens: int = 0
    """Tokens that went through forward and backward."""
    tickets: dict[str, int] = {}
    """`Dispatcher.counts`, of the whole run."""
    reissued: int = 0
    """Tickets issued again by this process, of those in `tickets`."""
    duplicates: int = 0
    """Groups that came to this process twice or too late, likewise."""
    backlog: int = 0
    """Tickets that may be issued and that no actor has room for."""
    versions: int = 0
    """Published by this process."""
    weights_bytes: int = 0
    """Bytes of weights given to the sockets."""
    dense_bytes: int = 0
    """Of one version."""
    wanted: int | None = None
    """Actors that are wished for; None for a run by hand."""
    started: int = 0
    restarted: int = 0
    actors: dict[str, ActorSample] = {}
    dropped: dict[str, int] = {}
    """Reason -> frames and connections."""
    memory: dict[str, int] = {}
    """"resident", "gpu_allocated", "gpu_reserved" -> bytes of the learner's first process."""
    advice: Advice | None = None


def has_counts(actor: ActorSample) -> bool:
    """Whether a heartbeat has told of it: the zeros of one that is gone, or back and not heard of yet, are none."""
    return actor.state != "gone" and actor.phase != CONNECTING


def parts_of_serving(serving_s: float, busy_s: float, paused_s: float) -> dict[str, float]:
    """State in `SERVING` -> seconds in it. A pause is told when it is over, and requests may wait in the engine or not
    meanwhile: no part is below zero."""
    generating = max(0.0, busy_s - paused_s)
    return {"generating": generating, "updating": paused_s, "waiting": max(0.0, serving_s - generating - paused_s)}
