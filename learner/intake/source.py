"""The learner's side of the intake: batches of groups, evaluations and waits, each with a name and a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

from learner.intake.server import FATAL_FAILURES, IntakeServer
from protocol.errors import DeadlineExceeded, EngineFailed
from protocol.messages import Group, Ticket, TicketId

WaitReporter = Callable[[str, float], None]
"""Called about once a second during a wait with what is waited for, and for how many seconds so far."""


class Interrupted(Exception):
    """The run was asked to stop while it waited."""


class Source:
    """What the training loop sees of the actors."""

    def __init__(self, server: IntakeServer, report: WaitReporter, should_stop: Callable[[], bool]) -> None:
        self.server = server
        self.report = report
        self.should_stop = should_stop
        self.waited_s = 0.0
        """Seconds that the learner has waited for groups in all."""

    def wait_for_actor(self, version: int, timeout_s: float) -> None:
        """Wait until one actor serves `version`. Raises EngineFailed (the engine's own error) or DeadlineExceeded."""

        def serving() -> bool:
            return any(peer.version >= version for peer in self.server.peers.values())

        self._wait(serving, lambda: f"an actor that serves version {version}: {self._actor_phases()}", timeout_s)

    def take(self, timeout_s: float) -> list[Group]:
        """Groups of the next step: the oldest `groups_per_step` tickets, all journaled.

        Raises DeadlineExceeded naming the missing tickets, EngineFailed if actors cannot go on, Interrupted.
        """
        dispatcher = self.server.dispatcher
        began = time.monotonic()
        batch: list[Group] | None = None

        def complete() -> bool:
            nonlocal batch
            batch = dispatcher.take()
            return batch is not None

        def missing() -> str:
            return f"{len(dispatcher.missing()) or dispatcher.groups_per_step} groups: {self._actor_phases()}"

        self._wait(complete, missing, timeout_s)
        assert batch is not None
        self.waited_s += time.monotonic() - began
        self.server.hub.wake()
        return batch

    def commit(self, step: int, version: int) -> None:
        """The batch became step `step`: journal its composition, free its slots."""
        with self.server.lock:
            ids = list(self.server.dispatcher.in_training)
            self.server.journal.append_step(step, version, [(i.epoch, i.index) for i in ids])
            self.server.dispatcher.commit()
            for ticket_id in ids:
                self.server.offsets.pop(ticket_id.index, None)
        self.server.hub.wake()

    def resume_training(self) -> None:
        """Let train tickets be issued."""
        with self.server.lock:
            self.server.dispatcher.training_enabled = True
        self.server.hub.wake()

    def pause_training(self) -> None:
        """Issue no train tickets: those in the actors' hands are finished."""
        with self.server.lock:
            self.server.dispatcher.training_enabled = False

    def evaluate(self, tickets: list[Ticket], timeout_s: float) -> tuple[list[Group], dict[TicketId, str]]:
        """Run evaluation tickets through the actors; groups in order, and failures. Raises as `take`."""
        dispatcher = self.server.dispatcher
        with self.server.lock:
            dispatcher.start_evaluation(tickets)
        self.server.hub.wake()
        result: tuple[list[Group], dict[TicketId, str]] | None = None

        def finished() -> bool:
            nonlocal result
            result = dispatcher.finish_evaluation()
            return result is not None

        def progress() -> str:
            done = len(dispatcher.eval.queued)
            return f"evaluation, {done} of {len(tickets)} problems: {self._actor_phases()}"

        self._wait(finished, progress, timeout_s)
        assert result is not None
        return result

    def wait_until_left(self, timeout_s: float) -> bool:
        """Wait until every actor has said goodbye; False if some have not."""
        try:
            self._wait(lambda: not self.server.peers, lambda: "actors to leave", timeout_s, interruptible=False)
        except (DeadlineExceeded, EngineFailed):
            return False
        return True

    def replay_offset(self) -> int:
        """Journal offset from which a resume must read, given the groups queued now."""
        return min(self.server.offsets.values(), default=self.server.journal.end)

    def _wait(
        self, condition: Callable[[], bool], what: Callable[[], str], timeout_s: float, interruptible: bool = True
    ) -> None:
        began = time.monotonic()
        reported = 0.0
        with self.server.changed:
            while not condition():
                waited = time.monotonic() - began
                if self.server.crash is not None:
                    raise RuntimeError(f"the intake thread died: {self.server.crash!r}") from self.server.crash
                if interruptible and self.should_stop():
                    raise Interrupted(what())
                self._check_engines()
                if waited > timeout_s:
                    raise DeadlineExceeded(what(), waited)
                if waited - reported > 0.5:
                    reported = waited
                    self.report(what(), waited)
                self.server.changed.wait(0.5)

    def _check_engines(self) -> None:
        """Give up when engines fail over and over, or fail before any of them ever worked."""
        failures = self.server.totals.failures
        never_worked = not self.server.rollout_tokens and not any(p.version for p in self.server.peers.values())
        if failures and (never_worked or len(failures) >= FATAL_FAILURES):
            raise EngineFailed(failures[-1])

    def _actor_phases(self) -> str:
        peers = self.server.peers.values()
        if not peers:
            return "no actor is connected"
        return ", ".join(
            f"{peer.name} {peer.beat.phase} ({peer.beat.phase_s:.0f} s)" if peer.beat else f"{peer.name} connecting"
            for peer in peers
        )
