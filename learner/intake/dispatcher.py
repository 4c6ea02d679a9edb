"""Which ticket goes to whom, and what became of each: a state machine without socket or thread.

Time comes in as an argument. `server.py` calls it for actors, `source.py` for the learner, both under one lock. Every
transition ends in `check`: each train ticket ever issued is in exactly one state,

    issued = trained + filtered + failed + dropped + abandoned + in training + queued + leased

where "leased" includes tickets that wait to be issued again. Staleness is bounded by admission: live tickets (leased,
queued, in training) never exceed (max_lag + 1) x groups_per_step, and a ticket for step s may only begin on weights of
step s - max_lag or later. Evaluation tickets have a ledger of their own (epochs below zero).

The epoch of a train ticket is the branch of the run. `roll_back` opens a new one: what lies behind the checkpoint is
"abandoned" and issued again under ids of the new branch, so that nothing of the old one can answer for it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from learner.intake.ledger import Ledger
from protocol.messages import Group, Ticket, TicketId

FIRST_BRANCH = 0
TICKET_STATES = (
    "issued", "trained", "filtered", "failed", "dropped", "abandoned", "in_training", "queued", "leased", "duplicates",
    "reissued",
)  # fmt: skip
"""What `Dispatcher.counts` counts, all of train tickets."""
MISSED_BEATS = 2
"""Heartbeats in a row that do not list a lease until it is issued again."""

TicketMaker = Callable[[TicketId], Ticket]
"""The train ticket of an id; the dispatcher fills in attempt and min_version."""


def is_train(ticket_id: TicketId) -> bool:
    """Evaluation tickets have epochs below zero."""
    return ticket_id.epoch >= FIRST_BRANCH


class Dispatcher:
    """Tickets of a run. Not thread-safe."""

    def __init__(
        self,
        make_ticket: TicketMaker,
        *,
        groups_per_step: int,
        max_lag: int,
        steps: int,
        max_attempts: int,
        is_filtered: Callable[[Group], bool] = lambda _: False,
        max_filtered_per_step: int = 0,
    ) -> None:
        """`is_filtered`: whether a group is worth nothing, so that another prompt takes its place (dynamic sampling);
        answered so at most `max_filtered_per_step` times for one step."""
        self.make_ticket = make_ticket
        self.is_filtered = is_filtered
        self.max_filtered_per_step = max_filtered_per_step
        self.filtered_groups: dict[TicketId, Group] = {}
        """Those filtered since the last batch was taken."""
        self.filtered_before: list[Group] = []
        """Those filtered between the batch in hand and the one before."""
        self.branch = FIRST_BRANCH
        self.groups_per_step = groups_per_step
        self.max_lag = max_lag
        self.steps = steps
        self.max_attempts = max_attempts
        self.step = 0
        self.next_index = 0
        self.step_versions: dict[int, int] = {}
        """Version that carries the weights of a step; empty until the first publication."""
        self.newest_version = 0
        """Of those; 0 before the first."""
        self._published_steps: list[int] = []
        """The steps of `step_versions`, in order."""
        self._steps: dict[int, int] = {}
        """Step whose weights a version carries, for every version that a group may name."""
        self.training_enabled = False
        """Train tickets are issued only between `resume_training` and the end: evaluations want idle engines."""
        self.eval_pinned = True
        """Every token of the evaluation must be of one version."""
        self.eval_share = 1.0
        """Leases that an evaluation beside training may have, of all."""
        self.room_changed: dict[str, None] = {}
        """Actors whose leases have changed since `server.py` looked last; it empties this."""
        self.train, self.eval = self._ledger_of(), self._ledger_of()
        self._line: list[int] = []
        """Indices of the open train tickets (waiting, leased or queued), in order."""
        self._first_missing = 0
        """A place in line before which all are queued: how far `_is_complete` has come."""
        self.in_training: dict[TicketId, Group] = {}
        self._replay: dict[int, Group] = {}
        """Journaled groups of tickets that a resumed run has not reached again."""
        self._replay_failed: dict[int, str] = {}
        """Likewise, of tickets that failed for good."""
        self._replay_filtered: set[int] = set()
        """Which of the journaled groups were filtered. The others were not, whatever would be decided now."""
        self.failed_in_a_row = 0
        """Train tickets that actors reported as failed, for good, since the last group arrived."""
        self.newly_failed: list[tuple[TicketId, str]] = []
        """Tickets that failed for good and are not in the journal yet."""
        self.trained = self.filtered = self.dropped = self.abandoned = 0
        self.duplicates = self.reissued = 0
        self._redone_before = {"duplicates": 0, "reissued": 0}
        """The same two as earlier processes of the run left them."""

    # --- towards actors ---

    def issue(self, actor: str, version: int, now: float) -> Ticket | None:
        """Next ticket for an actor whose engine serves `version`; None if there is none for it now."""
        if version <= 0:
            return None
        kinds = [self._issue_eval, self._issue_train]
        leases = len(self.train.leased) + len(self.eval.leased)
        if self.training_enabled and len(self.eval.leased) >= self.eval_share * (leases + 1):
            kinds.reverse()  # the evaluation has its share: it takes what training leaves
        ticket = kinds[0](actor, version, now) or kinds[1](actor, version, now)
        self.check()
        return ticket

    def _issue_eval(self, actor: str, version: int, now: float) -> Ticket | None:
        return self.eval.issue(actor, version, now)

    def _issue_train(self, actor: str, version: int, now: float) -> Ticket | None:
        if not self.training_enabled:
            return None
        ticket = self.train.issue(actor, version, now)
        while ticket is None and self._may_admit():
            self._admit()
            ticket = self.train.issue(actor, version, now)
        return ticket

    def live(self) -> int:
        """Train tickets that count against the staleness bound."""
        return len(self.train) + len(self.in_training)

    def _most_live(self) -> int:
        """Train tickets that may be live at once: for the staleness bound, and for the steps that are left."""
        wanted = (self.steps - self.step) * self.groups_per_step
        return min((self.max_lag + 1) * self.groups_per_step, wanted)

    def _may_admit(self) -> bool:
        return self.live() < self._most_live()

    def backlog(self) -> int:
        """Train tickets that may be issued now, or admitted and issued, and that nobody has: for want of room."""
        return max(0, self._most_live() - self.live()) + len(self.train.waiting) if self.training_enabled else 0

    def _admit(self) -> None:
        """Add the next ticket of the run. Its position among the live ones says which step will train on it."""
        due_step = self.step + self.live() // self.groups_per_step
        oldest_step = max(0, due_step - self.max_lag)
        self._open(self.next_index, self.version_of_step(oldest_step))
        self.next_index += 1

    def _open(self, index: int, min_version: int) -> None:
        """Make a ticket live: to be issued, or queued at once if the journal of an earlier process has its group."""
        ticket_id = TicketId(self.branch, index)
        group = self._replay.pop(index, None)
        if group is not None and index in self._replay_filtered:
            self._count_filtered(group)
        elif group is not None:
            self.train.queued[ticket_id] = group
            self._line.append(index)
        elif index in self._replay_failed:
            self.train.failed[ticket_id] = self._replay_failed.pop(index)
        else:
            self.train.add(msgspec.structs.replace(self.make_ticket(ticket_id), min_version=min_version))
            self._line.append(index)

    def _leave_line(self, index: int) -> None:
        """An open ticket is none any more, out of turn: those behind it move up."""
        place = bisect_left(self._line, index)
        assert place >= self._first_missing, f"ticket {index} was queued for a batch"
        del self._line[place]

    def _filter(self, group: Group) -> None:
        """Dynamic sampling: free the slot of a queued group that is worth nothing, so that another is admitted."""
        if is_train(group.id) and len(self.filtered_groups) < self.max_filtered_per_step and self.is_filtered(group):
            del self.train.queued[group.id]
            self._leave_line(group.id.index)
            self._count_filtered(group)

    def _count_filtered(self, group: Group) -> None:
        self.filtered += 1
        self.filtered_groups[group.id] = group

    def receive(self, group: Group) -> bool:
        """Take in a journaled group. False: duplicate, late or unknown; acknowledge it and forget it."""
        accepted = self._ledger(group.id).receive(group)
        self.duplicates += is_train(group.id) and not accepted
        if accepted:
            self.failed_in_a_row = 0
            self._filter(group)
        self.check()
        return accepted

    def wanted(self, ticket_id: TicketId) -> Ticket | None:
        """The ticket, if a group for it would be accepted: only then is a group journaled."""
        return self._ledger(ticket_id).wanted(ticket_id)

    def give_back(self, ticket_id: TicketId, actor: str, why: str, attempt: int = 0, excused: bool = False) -> None:
        """A lease is lost: the ticket is issued again, or failed after `max_attempts`.

        `attempt`: the actor's own word on that attempt, which counts if the lease is still of it; 0: nobody's word.
        `excused`: nothing speaks against the ticket, so this attempt does not count.
        """
        ledger = self._ledger(ticket_id)
        lease = ledger.leased.get(ticket_id)
        if lease is not None and lease.actor == actor and attempt in (0, lease.ticket.attempt):
            ledger.excused[ticket_id] += excused
            if ledger.give_back(ticket_id, self.max_attempts, why):
                self.reissued += is_train(ticket_id)
            else:
                if is_train(ticket_id):
                    self._leave_line(ticket_id.index)
                self.newly_failed.append((ticket_id, why))
                self.failed_in_a_row += bool(attempt) and is_train(ticket_id)
        self.check()

    def beat(self, actor: str, listed: Iterable[TicketId]) -> list[TicketId]:
        """Compare an actor's absolute state with its leases. Returns tickets that it holds without a lease.

        A lease that two heartbeats in a row do not list is issued again: the ticket, or the group, was lost.
        """
        listed_ids = set(listed)
        for ledger in (self.train, self.eval):
            for ticket_id, lease in list(ledger.leases_of(actor).items()):
                if ticket_id in listed_ids:
                    lease.missed_beats = 0
                else:
                    lease.missed_beats += 1
                    if lease.missed_beats >= MISSED_BEATS:
                        self.give_back(ticket_id, actor, f"{actor} does not list it")
        return [ticket_id for ticket_id in listed_ids if self.holder(ticket_id) != actor]

    def actor_gone(self, actor: str, why: str, excused: bool = False) -> int:
        """Take back all leases of an actor; returns how many."""
        lost = self.leases_of(actor)
        for ticket_id in lost:
            self.give_back(ticket_id, actor, why, excused=excused)
        return len(lost)

    def stragglers(self, now: float, older_than_s: float) -> list[tuple[TicketId, str]]:
        """Leases (ticket, actor) that have kept the next batch, or an evaluation that is waited for, for too long."""
        behind = self._line[self.groups_per_step : self.groups_per_step + 1]
        late = [
            lease
            for lease in self.train.leased_before(now - older_than_s)
            if not behind or lease.ticket.id.index < behind[0]
        ]
        if self.eval_pinned:
            late += self.eval.leased_before(now - older_than_s)
        return [(lease.ticket.id, lease.actor) for lease in late]

    def leases_of(self, actor: str) -> list[TicketId]:
        return [*self.train.leases_of(actor), *self.eval.leases_of(actor)]

    def completions_of(self, actor: str) -> int:
        """Completions that an actor is to draw for its leases."""
        leases = [*self.train.leases_of(actor).values(), *self.eval.leases_of(actor).values()]
        return sum(lease.ticket.group_size for lease in leases)

    def recall(self) -> None:
        """Take back the train tickets in the actors' hands: training has ended. They would be issued again."""
        for ticket_id, lease in list(self.train.leased.items()):
            self.give_back(ticket_id, lease.actor, "training has ended", excused=True)

    def holder(self, ticket_id: TicketId) -> str | None:
        """Who has the lease of a ticket."""
        lease = self._ledger(ticket_id).leased.get(ticket_id)
        return lease.actor if lease else None

    def holders(self) -> dict[TicketId, str]:
        """Who has which lease."""
        return self.train.holders() | self.eval.holders()

    # --- towards the learner ---

    def take(self) -> list[Group] | None:
        """The batch of the next step, if complete: the oldest `groups_per_step` live tickets, all of them queued."""
        if not self._is_complete():
            return None
        batch = [self.train.queued.pop(ticket_id) for ticket_id in self._oldest_ids()]
        del self._line[: len(batch)]
        self._first_missing = 0
        self.in_training = {group.id: group for group in batch}
        self.filtered_before, self.filtered_groups = [*self.filtered_groups.values()], {}
        self.check()
        return batch

    def _is_complete(self) -> bool:
        """Whether the next batch is there. A place that was found queued is not looked at again before it is taken: a
        queued ticket leaves the line with its batch, or is filtered the moment that it arrives."""
        wanted = min(self.groups_per_step, len(self._line))
        while self._first_missing < wanted and (
            TicketId(self.branch, self._line[self._first_missing]) in self.train.queued
        ):
            self._first_missing += 1
        return self._first_missing >= self.groups_per_step

    def holds(self, index: int) -> bool:
        """Whether the group of a train index is here and not part of a batch: a checkpoint's replay must find it."""
        ticket_id = TicketId(self.branch, index)
        return ticket_id in self.train.queued or index in self._replay or self.is_filtered_out(ticket_id)

    def is_filtered_out(self, ticket_id: TicketId) -> bool:
        """Whether the group of a ticket has been filtered since the last batch was taken."""
        return ticket_id in self.filtered_groups

    def missing(self) -> list[TicketId]:
        """What `take` waits for."""
        return [ticket_id for ticket_id in self._oldest_ids() if ticket_id not in self.train.queued]

    def _oldest_ids(self) -> list[TicketId]:
        return [TicketId(self.branch, index) for index in self._line[: self.groups_per_step]]

    def commit(self) -> None:
        """The batch in training became a step of the run."""
        self.trained += len(self.in_training)
        self.in_training = {}
        self.step += 1
        self.check()

    def published(self, step: int, version: int) -> None:
        """Version `version` carries the weights of `step`, and may be asked of actors from now on.

        Versions grow with steps; one step may be published again."""
        if step not in self.step_versions:
            insort(self._published_steps, step)
        self.step_versions[step] = version
        self.newest_version = max(self.newest_version, version)
        self._steps[version] = step

    def step_of(self, version: int) -> int | None:
        """Training steps that a version has seen, if this process has published it, else None.

        After a restart, also those that the process before had announced up to the checkpoint's step: the rest belongs
        to steps that are lost.
        """
        return self._steps.get(version)

    def oldest_step(self, ticket_id: TicketId) -> int:
        """Least training steps behind the weights of a ticket's tokens: by max_lag and its place in line; what an
        evaluation asked for."""
        if not is_train(ticket_id):
            ticket = self.wanted(ticket_id)
            return (self.step_of(ticket.min_version) or 0) if ticket else 0
        place = bisect_left(self._line, ticket_id.index)
        return max(0, self.step + (len(self.in_training) + place) // self.groups_per_step - self.max_lag)

    def version_of_step(self, step: int) -> int:
        """Smallest published version with the weights of `step` or later: what a ticket may ask of an engine."""
        place = bisect_left(self._published_steps, step)
        if place == len(self._published_steps):
            return self.newest_version or 1
        return self.step_versions[self._published_steps[place]]

    def start_evaluation(self, tickets: list[Ticket], pinned: bool = True, share: float = 1.0) -> None:
        """Queue evaluation tickets. While training goes on they get `share` of the leases, and what is left over.

        `pinned`: groups must be of exactly the tickets' `min_version`; otherwise that one or later."""
        assert not len(self.eval), "one evaluation at a time"
        assert all(not is_train(ticket.id) and ticket.kind == "eval" for ticket in tickets)
        self.eval = self._ledger_of(tickets)
        self.eval_pinned, self.eval_share = pinned, share

    def finish_evaluation(self) -> tuple[list[Group], dict[TicketId, str]] | None:
        """Groups in ticket order and failures, once no ticket of the evaluation is open; else None."""
        if self.eval.waiting or self.eval.leased:
            return None
        groups = [self.eval.queued[ticket_id] for ticket_id in sorted(self.eval.queued)]
        failed, self.eval = self.eval.failed, self._ledger_of()
        return groups, failed

    # --- accounting ---

    def _ledger(self, ticket_id: TicketId) -> Ledger:
        return self.train if is_train(ticket_id) else self.eval

    def _ledger_of(self, waiting: Iterable[Ticket] = ()) -> Ledger:
        return Ledger(waiting, self.room_changed)

    def counts(self) -> dict[str, int]:
        """The `tickets` field of summary.json."""
        return {
            "issued": self.next_index + self.abandoned,
            "trained": self.trained,
            "filtered": self.filtered,
            "failed": len(self.train.failed),
            "dropped": self.dropped,
            "abandoned": self.abandoned,
            "in_training": len(self.in_training),
            "queued": len(self.train.queued),
            "leased": len(self.train.leased) + len(self.train.waiting),
            "duplicates": self.duplicates,
            "reissued": self.reissued,
        }

    def redone(self) -> dict[str, int]:
        """ "duplicates" and "reissued" of this process alone; `counts` has them of the whole run."""
        return {name: getattr(self, name) - before for name, before in self._redone_before.items()}

    def check(self) -> None:
        """Assert the accounting of both kinds and the staleness bound. A violation is a bug, no state to go on from."""
        live = len(self.train) + len(self.in_training)
        finished = self.trained + self.filtered + len(self.train.failed) + self.dropped
        assert self.next_index == finished + live, f"tickets do not add up: {self.counts()}"
        assert self.eval.opened == len(self.eval) + len(self.eval.failed), "evaluation tickets do not add up"
        assert live <= (self.max_lag + 1) * self.groups_per_step, (
            f"more live tickets than max_lag allows: {self.counts()}"
        )
        assert len(self._line) == len(self.train), f"{len(self._line)} in line, {len(self.train)} open"

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two steps: finished ids as a high-water mark and the sparse rest, and counters."""
        assert not self.in_training, "checkpoints are taken between steps"
        return {
            "branch": self.branch,
            "step": self.step,
            "next_index": self.next_index,
            "unfinished": [*self._line],
            "failed": {str(ticket_id.index): why for ticket_id, why in self.train.failed.items()},
            "filtered_since_batch": [ticket_id.index for ticket_id in self.filtered_groups],
            "trained": self.trained,
            "filtered": self.filtered,
            "dropped": self.dropped,
            "abandoned": self.abandoned,
            "duplicates": self.duplicates,
            "reissued": self.reissued,
        }

    def restore(
        self,
        state: dict[str, Any],
        journaled: Iterable[Group],
        version: int,
        failed: Iterable[tuple[TicketId, str]] = (),
        versions: Mapping[int, int] = MappingProxyType({}),
        filtered: Iterable[TicketId] = (),
    ) -> list[int]:
        """Take up a run at a checkpoint, with the groups, failures and filterings that the journal holds.

        `versions`: step of every version announced before; `version`: the one that will carry the checkpoint's weights.
        Returns the indices of the tickets whose groups need not be drawn again, queued already or to be reached later.

        A ticket that was unfinished at the checkpoint is queued if its group was journaled, and else issued again, on
        weights of `version` or later. Later tickets, of steps that are lost now, are admitted again one by one; those
        whose group was journaled need no actor.
        """
        self._take_up(state, state.get("branch", FIRST_BRANCH), version, versions)
        self._redone_before = {name: state[name] for name in self._redone_before}
        open_ = set(state["unfinished"])
        known = {group.id.index: group for group in journaled if group.id.epoch == self.branch}
        self._replay = {i: group for i, group in known.items() if i in open_ or i >= self.next_index}
        self._replay_failed = {id_.index: why for id_, why in failed if id_.epoch == self.branch}
        self._replay_filtered = {id_.index for id_ in filtered if id_.epoch == self.branch}
        filtered_before = [known[i] for i in state.get("filtered_since_batch", ()) if i in known]
        self.filtered_groups = {group.id: group for group in filtered_before}
        replayed = [*self._replay, *(group.id.index for group in filtered_before)]
        for index in state["unfinished"]:
            self._open(index, version)
        self.check()
        return replayed

    def roll_back(self, state: dict[str, Any], branch: int, version: int) -> None:
        """Go back to a checkpoint's `state` on a new branch; `version` will carry its weights.

        Every ticket issued since, and every one that was unfinished then, counts as abandoned, whatever became of it,
        and is issued again under an id of the new branch. A running evaluation is given up: its tickets name versions
        of the old branch.
        """
        finished = sum(state[name] for name in ("trained", "filtered", "dropped")) + len(state["failed"])
        abandoned = self.next_index + self.abandoned - finished
        duplicates, reissued = self.duplicates, self.reissued
        self.room_changed |= dict.fromkeys(self.holders().values())
        self.train, self.eval, self.in_training = self._ledger_of(), self._ledger_of(), {}
        self._line, self._first_missing = [], 0
        self._replay, self._replay_failed, self._replay_filtered = {}, {}, set()
        self.newly_failed, self.filtered_groups = [], {}
        self._take_up(state, branch, version, self._steps)
        self.abandoned, self.duplicates, self.reissued = abandoned, duplicates, reissued
        for index in state["unfinished"]:
            self._open(index, version)
        self.check()

    def _take_up(self, state: dict[str, Any], branch: int, version: int, versions: Mapping[int, int]) -> None:
        """The counters of a checkpoint; `version` carries its weights, later ones than its step are lost."""
        self.branch, self.step, self.next_index = branch, state["step"], state["next_index"]
        for name in ("trained", "filtered", "dropped", "abandoned", "duplicates", "reissued"):
            setattr(self, name, state[name])
        self.train.failed = {TicketId(branch, int(index)): why for index, why in state["failed"].items()}
        self.step_versions, self._published_steps = {self.step: version}, [self.step]
        self.newest_version = version
        self._steps = {old: step for old, step in versions.items() if step <= self.step} | {version: self.step}
