"""A sample: what a run is doing at one moment. One line of timeline.jsonl each; exporter, advisor and pages read it.

Counts and seconds are absolute and only grow while the learner's process lives; whoever wants a rate subtracts two
samples, whichever are left (`timeline.py` thins them out). A restarted learner or actor begins at zero. Pure data.
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
    """Seconds in which it served a version, as the learner saw it; the next four are parts of it, by its own clock."""
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
    """`Dispatcher.counts`."""
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


def parts_of_serving(serving_s: float, busy_s: float, paused_s: float) -> dict[str, float]:
    """State in `SERVING` -> seconds in it. The three are of two clocks, so the parts are cut to fit the whole."""
    generating = max(0.0, busy_s - paused_s)
    return {"generating": generating, "updating": paused_s, "waiting": max(0.0, serving_s - generating - paused_s)}
