"""A learner's intake on real sockets without a model: hub, dispatcher and journal in their thread, tiny weights.

Used by tests that run actors (`ActorLoop` with the fake engine) against it. Not a test itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from learner.intake.dispatcher import Dispatcher
from learner.intake.journal import Journal, read_groups
from learner.intake.scaling import ScaleWatch
from learner.intake.server import IntakeServer
from learner.intake.source import Source
from protocol.deltas import DeltaCoder
from protocol.hub import Hub
from protocol.messages import Completion, Group, Sampling, Ticket, TicketId, Welcome
from protocol.sections import WireConfig
from protocol.weights import Snapshot, layout, make_snapshot

GROUP_SIZE = 2
RUN = f"test-{os.getpid()}"
"""Actors of a run share a directory, those of tests that run side by side must not."""


def make_ticket(index: int, branch: int = 0) -> Ticket:
    """Train ticket of an index, as a recipe would make it."""
    return Ticket(
        id=TicketId(branch, index), kind="train", attempt=1, prompt_ids=(1, 2, index), answer="7", grader="integer",
        group_size=GROUP_SIZE, sampling=Sampling(max_tokens=6), seed=index, min_version=1,
    )  # fmt: skip


def ticket_of(ticket_id: TicketId) -> Ticket:
    """What a dispatcher asks for."""
    return make_ticket(ticket_id.index, ticket_id.epoch)


class Intake:
    """Context manager: a running `IntakeServer` and its `Source`."""

    def __init__(
        self,
        directory: Path,
        *,
        steps: int = 4,
        groups_per_step: int = 4,
        max_lag: int = 1,
        max_attempts: int = 5,
        straggler_s: float = 60.0,
        heartbeat_s: float = 0.05,
        dead_after_s: float = 60.0,
        port: int = 0,
        token_s: float = 0.0,
        run: str = RUN,
        version: int = 0,
        scale: ScaleWatch | None = None,
    ) -> None:
        """`version`: the last one of an earlier process of this run, whose actors may be alive.

        Nobody is buried for the pauses of a busy machine, or for those of a full garbage collection; see `bury`."""
        self.hub = Hub("127.0.0.1", port)
        self.dispatcher = Dispatcher(
            ticket_of, groups_per_step=groups_per_step, max_lag=max_lag, steps=steps, max_attempts=max_attempts
        )
        self.journal = Journal(directory / "groups.journal")
        welcome = Welcome(
            run=run, model="none", dtype="float32", max_model_len=64, bulk=self.hub.bulk_endpoint,
            news=self.hub.news_endpoint, heartbeat_s=heartbeat_s, dead_after_s=dead_after_s, seed=0,
            group_size=GROUP_SIZE, chunk_bytes=64,
            engine={"engine": "fake", "max_running": 8, "fake_token_s": token_s, "grader_workers": 1},
        )  # fmt: skip
        wire = WireConfig(heartbeat_s=heartbeat_s, dead_after_s=dead_after_s)
        self.server = IntakeServer(
            self.hub, self.dispatcher, self.journal, welcome, wire, straggler_s, 1000, scale=scale
        )
        self.stop_requested = threading.Event()
        self.source = Source(self.server, lambda what, waited: None, self.stop_requested.is_set)
        self.version = self.server.newest_before = version
        self._last: Snapshot | None = None
        self._coder = DeltaCoder(1)

    @property
    def address(self) -> str:
        return self.hub.work_endpoint

    def publish(self, step: int) -> int:
        """Announce the next version: 1 KB of weights whose bytes are the version number, and its delta."""
        self.version += 1
        specs = layout([("a.weight", "float32", (16, 8)), ("b.weight", "bfloat16", (256,))])
        data = memoryview(bytes([self.version]) * (16 * 8 * 4 + 512))
        self.server.reserved(step, self.version)
        last, self._last = self._last, make_snapshot(self.version, step, specs, data)
        self.server.offer(self._last, self._coder.encode(last, self._last) if last else None)
        return self.version

    def __enter__(self) -> Intake:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.journal.close()
        assert self.server.crash is None, f"the intake thread died: {self.server.crash!r}"


def journal_of(directory: Path) -> list[Group]:
    return list(read_groups(directory / "groups.journal"))


def eval_ticket(index: int, version: int) -> Ticket:
    return msgspec.structs.replace(
        make_ticket(100 + index), id=TicketId(-version, index), kind="eval", min_version=version
    )


def locked(intake: Intake, function: Any) -> Any:
    with intake.server.lock:
        return function()


def bury(intake: Intake, incarnations: Collection[str]) -> bool:
    """Let actors' silence be too long. Whether the intake has found that, and none of them is left; to be repeated."""
    with intake.server.lock:
        found = [peer for peer in intake.server.peers.values() if peer.hello.incarnation in incarnations]
        for peer in found:
            peer.last_seen -= intake.server.wire.dead_after_s
    intake.hub.wake()
    return not found


def make_dispatcher(
    *, groups_per_step: int = 2, max_lag: int = 1, steps: int = 5, max_attempts: int = 3, **filtering: Any
) -> Dispatcher:
    dispatcher = Dispatcher(
        ticket_of,
        groups_per_step=groups_per_step,
        max_lag=max_lag,
        steps=steps,
        max_attempts=max_attempts,
        **filtering,
    )
    dispatcher.published(0, 1)
    dispatcher.training_enabled = True
    return dispatcher


def group_of(ticket: Ticket, actor: str = "actor-9", version: int = 1) -> Group:
    """A group that fits a ticket: one token a completion."""
    completion = Completion(1, ((version, 0),), "stop", {"reward": 1.0})
    return Group(
        id=ticket.id, kind=ticket.kind, attempt=ticket.attempt, actor=actor, prompt_ids=ticket.prompt_ids,
        temperature=1.0, completions=(completion, completion), token_ids=bytes(8), logprobs=bytes(8), mask=b"\1\1",
    )  # fmt: skip
