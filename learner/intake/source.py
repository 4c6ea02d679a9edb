"""The learner's side of the intake: batches of groups, evaluations and waits, each with a name and a deadline."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from learner.intake.server import FATAL_FAILURES, IntakeServer
from protocol.errors import DeadlineExceeded, EngineFailed
from protocol.messages import Group, Ticket, TicketId

log = logging.getLogger(__name__)

EvalGroups = tuple[list[Group], dict[TicketId, str]]
"""Groups in ticket order, and why tickets failed for good."""
WaitReporter = Callable[[str, float], None]
"""Called about once a second during a wait with what is waited for, and for how many seconds so far."""


REPORT_EVERY_S = 0.5
FATAL_TICKETS = 8
"""Tickets in a row that fail for good, without one group in between, after which the run gives up."""


class StopFlag:
    """Set by a signal handler; read between steps and during waits."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, *_: object) -> None:
        self.is_set = True

    def __call__(self) -> bool:
        return self.is_set


class Interrupted(Exception):
    """The run was asked to stop while it waited."""


class TicketsFail(Exception):
    """Actors and engines work, but no ticket becomes a group. Carries the last cause."""


class Source:
    """What the training loop sees of the actors."""

    def __init__(self, server: IntakeServer, report: WaitReporter, should_stop: Callable[[], bool]) -> None:
        self.server = server
        self.report = report
        self.should_stop = should_stop
        self._eval_tickets = 0
        self.waited_s = 0.0
        """Seconds that the learner has waited for groups in all."""
        self.waits: dict[str, float] = defaultdict(float)
        """What was waited for ("groups", "actors", "evaluation", "probe") -> seconds, with those of a present wait."""

    def wait_for_actor(self, version: int, timeout_s: float) -> None:
        """Wait until one actor serves `version`. Raises EngineFailed (the engine's own error) or DeadlineExceeded."""

        def serving() -> bool:
            return any(peer.version >= version for peer in self.server.peers.values())

        what = f"an actor that serves version {version}"
        self._wait(serving, lambda: f"{what}: {self._actor_phases()}", timeout_s, kind="actors")

    def wait_for_probe(self, timeout_s: float) -> bool:
        """Wait until an actor has answered a probe of its weights, if any is asked; False if none did in time."""
        probes = self.server.probes
        try:
            self._wait(
                lambda: not probes.every or probes.answers > 0,
                lambda: "a probe of the weights",
                timeout_s,
                kind="probe",
            )
        except DeadlineExceeded as error:
            log.warning("%s: the run goes on, engines are compared later", error)
            return False
        return True

    def take(self, timeout_s: float) -> list[Group]:
        """Groups of the next step: the oldest `groups_per_step` tickets, all journaled.

        `timeout_s` is the longest time without a further group. Raises DeadlineExceeded naming the missing tickets,
        EngineFailed if actors cannot go on, TicketsFail if no ticket succeeds, Interrupted.
        """
        dispatcher = self.server.dispatcher
        began = time.monotonic()
        batch: list[Group] | None = None

        def complete() -> bool:
            nonlocal batch
            batch = dispatcher.take()
            return batch is not None

        def missing() -> str:
            count = len(dispatcher.missing()) or dispatcher.groups_per_step
            return f"{count} groups: {self._actor_phases()}{self._last_failure()}"

        def reached() -> int:
            return len(dispatcher.train.queued) + dispatcher.filtered

        self._wait(complete, missing, timeout_s, kind="groups", progress=reached)
        assert batch is not None
        self.waited_s += time.monotonic() - began
        self.server.hub.wake()
        return batch

    def commit(self, step: int, version: int) -> None:
        """The batch became step `step`: journal its composition, free its slots."""
        with self.server.lock:
            dispatcher = self.server.dispatcher
            self.server.journal.append_step(step, version, [(i.epoch, i.index) for i in dispatcher.in_training])
            dispatcher.commit()
            self._forget_offsets()
        self.server.hub.wake()

    def roll_back(self, tickets: dict[str, Any], branch: int, version: int) -> None:
        """Give up everything since the checkpoint with these `tickets`; `version` will carry its weights."""
        with self.server.lock:
            self.server.dispatcher.roll_back(tickets, branch, version)
            self._forget_offsets()

    def _forget_offsets(self) -> None:
        """Keep the journal offsets of groups that a resumed run would have to read."""
        held = {index: o for index, o in self.server.offsets.items() if self.server.dispatcher.holds(index)}
        self.server.offsets = held

    def resume_training(self) -> None:
        """Let train tickets be issued."""
        with self.server.lock:
            self.server.dispatcher.training_enabled = True
        self.server.hub.wake()

    def pause_training(self, recall: bool = False) -> None:
        """Issue no train tickets. Those in the actors' hands are finished, or with `recall` taken back."""
        with self.server.lock:
            self.server.dispatcher.training_enabled = False
            if recall:
                self.server.dispatcher.recall()

    def evaluate(self, tickets: list[Ticket], timeout_s: float) -> EvalGroups:
        """Run evaluation tickets through the actors; groups in order, and failures. Waits and raises as `take`."""
        self.start_evaluation(tickets)
        return self.finish_evaluation(timeout_s)

    def start_evaluation(self, tickets: list[Ticket], share: float | None = None) -> None:
        """Hand in evaluation tickets. With `share` they run beside training, on whatever version there is by then."""
        with self.server.lock:
            self.server.dispatcher.start_evaluation(tickets, share is None, 1.0 if share is None else share)
            self._eval_tickets = len(tickets)
        self.server.hub.wake()

    def finished_evaluation(self) -> EvalGroups | None:
        """What `start_evaluation` began, if it has ended."""
        with self.server.lock:
            return self.server.dispatcher.finish_evaluation()

    def finish_evaluation(self, timeout_s: float) -> EvalGroups:
        """Wait for what `start_evaluation` began. Raises as `take`."""
        dispatcher = self.server.dispatcher
        result: EvalGroups | None = None

        def finished() -> bool:
            nonlocal result
            result = dispatcher.finish_evaluation()
            return result is not None

        def done() -> int:
            return len(dispatcher.eval.queued)

        def state() -> str:
            return (
                f"evaluation, {done()} of {self._eval_tickets} problems: {self._actor_phases()}{self._last_failure()}"
            )

        self._wait(finished, state, timeout_s, kind="evaluation", progress=done)
        assert result is not None
        return result

    def wait_until_left(self, timeout_s: float) -> bool:
        """Wait until every actor has said goodbye; False if some have not."""
        try:
            self._wait(
                lambda: not self.server.peers, lambda: "actors to leave", timeout_s, kind="actors", interruptible=False
            )
        except DeadlineExceeded:
            return False
        return True

    def replay_offset(self) -> int:
        """Journal offset from which a resume must read, given the groups queued now."""
        return min(self.server.offsets.values(), default=self.server.journal.end)

    def filtered(self) -> list[Group]:
        """Groups that dynamic sampling took out since the batch before the one in hand."""
        with self.server.lock:
            return list(self.server.dispatcher.filtered_before)

    def _wait(
        self,
        condition: Callable[[], bool],
        what: Callable[[], str],
        timeout_s: float,
        kind: str,
        interruptible: bool = True,
        progress: Callable[[], int] = lambda: 0,
    ) -> None:
        """Wait for a condition, at most `timeout_s` beyond the last change of `progress`; all three run under the lock.

        The report, which writes a file, is made outside it."""
        began = changed_at = counted = time.monotonic()
        reported, before = began, -1
        while True:
            with self.server.changed:
                now = time.monotonic()
                self.waits[kind] += now - counted
                counted = now
                if condition():
                    return
                reached = progress()
                if reached != before:
                    before, changed_at = reached, now
                self._check_thread()
                if interruptible:
                    self._check()
                    if self.should_stop():
                        raise Interrupted(what())
                if not self.server.peers and self.server.scale.excuse():
                    changed_at = now  # nobody can come: no deadline passes meanwhile
                if now - changed_at > timeout_s:
                    raise DeadlineExceeded(what(), now - changed_at)
                report = what() if now - reported > REPORT_EVERY_S else ""
                if not report:
                    self.server.changed.wait(REPORT_EVERY_S)
            if report:
                reported = now
                self.report(report, now - began)

    def check(self) -> None:
        """Raise what a wait would raise now: RuntimeError, EngineFailed or TicketsFail."""
        with self.server.lock:
            self._check()

    def _check(self) -> None:
        self._check_thread()
        self._check_engines()
        self._check_tickets()

    def _check_thread(self) -> None:
        if self.server.crash is not None:
            raise RuntimeError(f"the intake thread died: {self.server.crash!r}") from self.server.crash

    def _check_tickets(self) -> None:
        """Give up when ticket after ticket fails and none succeeds: more of the same would only burn data."""
        dispatcher = self.server.dispatcher
        if dispatcher.failed_in_a_row >= FATAL_TICKETS:
            raise TicketsFail(f"{dispatcher.failed_in_a_row} tickets in a row failed for good{self._last_failure()}")

    def _last_failure(self) -> str:
        failures = [*self.server.dispatcher.train.failed.values(), *self.server.dispatcher.eval.failed.values()]
        return f"; {len(failures)} tickets failed for good, e.g. {failures[-1]}" if failures else ""

    def _check_engines(self) -> None:
        """Give up when engines fail over and over, or fail before any of them ever worked."""
        failures = self.server.totals.failures
        never_worked = not self.server.rollout_tokens and not any(p.version for p in self.server.peers.values())
        if failures and (never_worked or len(failures) >= FATAL_FAILURES):
            raise EngineFailed(failures[-1])

    def _actor_phases(self) -> str:
        peers = self.server.peers.values()
        if not peers:
            return self.server.scale.excuse() or "no actor is connected"
        return ", ".join(
            f"{peer.name} {peer.beat.phase} ({peer.beat.phase_s:.0f} s)" if peer.beat else f"{peer.name} connecting"
            for peer in peers
        )
