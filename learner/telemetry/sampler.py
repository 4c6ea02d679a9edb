"""Looks at the run and says what it is doing: makes `Sample`s out of hub, dispatcher, publisher and clock.

Called about once a second by `telemetry.py`'s thread, beside the training. Holds the intake's lock for as long as it
takes to copy some numbers. Knows no file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from learner.telemetry.clock import PhaseClock
from learner.telemetry.sample import CONNECTING, INCARNATION_CHARACTERS, ActorSample, ActorState, Sample
from protocol.memory import resident_bytes

if TYPE_CHECKING:
    from learner.actors import Actors
    from learner.intake.server import Peer

MOSTLY = 0.5
"""Share of the time since the sample before from which on an actor's state is called by what it did."""


class Sampler:
    """Not for several threads."""

    def __init__(
        self,
        clock: PhaseClock,
        step: Callable[[], int],
        doing: Callable[[], str],
        memory: Callable[[], dict[str, int]],
    ) -> None:
        """`step()`: steps done. `doing()`: the phase in words. `memory()`: kind -> bytes of the learner's own memory,
        besides what is resident."""
        self.actors: Actors | None = None
        """Set once there are any."""
        self.trained_tokens = 0
        """By this process; a step adds to it."""
        self.clock, self.step, self.doing, self.memory = clock, step, doing, memory
        self._before: dict[str, ActorSample] = {}
        """Actor -> its part of the sample before."""

    def take(self) -> Sample:
        """The run as it is now."""
        fields = self._of(self.actors) if self.actors else {}
        return Sample(
            t=time.time(),
            process=os.getpid(),
            phase=self.clock.phase,
            doing=self.doing(),
            phases=_rounded(self.clock.seconds),
            memory={"resident": resident_bytes(), **self.memory()},
            step=self.step(),
            trained_tokens=self.trained_tokens,
            **fields,
        )

    def _of(self, actors: Actors) -> dict[str, Any]:
        """What hub, dispatcher and publisher know."""
        server, publisher, waits = actors.server, actors.publisher, actors.source.waits
        with server.lock:
            peers = {peer.name: peer for peer in server.peers.values()}
            room = int(server.welcome.engine.get("max_running", 0))
            present = {name: self._actor(peer, room) for name, peer in peers.items()}
            known = set(server.known.incarnations)
            fields: dict[str, Any] = {
                "version": server.hub.shelf.version,
                "waits": _rounded(waits),
                "groups": server.groups_accepted,
                "tokens": server.rollout_tokens,
                "tickets": server.dispatcher.counts(),
                **server.dispatcher.redone(),
                "backlog": server.dispatcher.backlog(),
                "versions": publisher.published,
                "weights_bytes": server.hub.bytes_sent,
                "dense_bytes": publisher.bytes_dense,
                "wanted": server.scale.wanted,
                "started": server.totals.started,
                "restarted": server.totals.restarted,
                "dropped": server.hub.faults.counts | server.hub.turned_away.counts,
            }
        gone = {name: ActorSample("gone") for name in sorted(known - present.keys())}
        self._before = present
        return fields | {"actors": present | gone}

    def _actor(self, peer: Peer, room: int) -> ActorSample:
        beat = peer.beat
        if beat is None:
            return ActorSample("starting", CONNECTING, room=room)
        sample = ActorSample(
            state="starting",
            phase=beat.phase,
            version=beat.version,
            held=len(beat.held),
            running=beat.running,
            room=room,
            tokens=beat.generated_tokens,
            serving_s=round(beat.serving_s, 3),
            busy_s=round(beat.busy_s, 3),
            running_s=round(beat.running_s, 3),
            paused_s=round(beat.paused_s, 3),
            pause_s=round(beat.pause_s, 4),
            fetch_s=round(beat.fetch_s, 4),
            swaps=beat.swaps,
            grader_errors=beat.grader_errors,
            rss_bytes=beat.rss_bytes,
            incarnation=peer.hello.incarnation[:INCARNATION_CHARACTERS],
        )
        before = self._before.get(peer.name)
        same = before if before is not None and before.incarnation == sample.incarnation else None
        return msgspec.structs.replace(sample, state=actor_state(same, sample, peer.drain is not None))


def actor_state(before: ActorSample | None, now: ActorSample, draining: bool) -> ActorState:
    """What an actor did for most of the time between two samples; without an earlier one, what it does now."""
    if draining:
        return "draining"
    if not now.version:
        return "starting"
    passed = now.serving_s - before.serving_s if before else 0.0
    if before and passed > 0:
        paused, busy = now.paused_s - before.paused_s, now.busy_s - before.busy_s
        if paused > MOSTLY * passed:
            return "updating"
        return "generating" if busy - paused > MOSTLY * passed else "waiting"
    return "generating" if now.running else "waiting"


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in list(seconds.items())}
