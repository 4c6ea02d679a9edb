"""The dispatcher under random schedules: every ticket in one state, none lost, none trained twice, lag bounded."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.messages import Group, Ticket, TicketId
from tests.intake_harness import group_of, make_dispatcher

ACTORS = ("a", "b", "c")


class RandomSchedules(RuleBasedStateMachine):
    """Actors join, die, fail, duplicate, delay and lose groups in any order; the learner takes and commits when it can,
    filters some groups, writes checkpoints, goes back to one, crashes and comes back with its journal."""

    @initialize(
        groups_per_step=st.integers(1, 3),
        max_lag=st.integers(0, 3),
        steps=st.integers(1, 6),
        max_attempts=st.sampled_from([1, 2, 1000]),
        filter_every=st.sampled_from([1000, 3, 2]),
        max_filtered=st.integers(0, 3),
    )
    def start(
        self, groups_per_step: int, max_lag: int, steps: int, max_attempts: int, filter_every: int, max_filtered: int
    ) -> None:
        self.shape: dict[str, Any] = {
            "groups_per_step": groups_per_step, "max_lag": max_lag, "steps": steps, "max_attempts": max_attempts,
            "is_filtered": lambda group: group.id.index % filter_every == 1, "max_filtered_per_step": max_filtered,
        }  # fmt: skip
        self.dispatcher = make_dispatcher(**self.shape)
        self.steps, self.max_lag = steps, max_lag
        self.journal: list[Group] = []
        self.journal_failed: list[tuple[TicketId, str]] = []
        self.journal_filtered: list[TicketId] = []
        self.compositions: dict[tuple[int, int], list[int]] = {}
        """(branch, step) -> the batch it was trained on, also by a process that crashed since."""
        self.checkpoint = (self.dispatcher.state(), 0)
        self.version = 1
        self.step_of_version = {1: 0}
        self.surviving = {1}
        """Versions of the branch that the run is on."""
        self.engine = dict.fromkeys(ACTORS, 1)
        self.holding: list[tuple[str, Ticket, int]] = []
        """(actor, ticket, version at its start): what actors work on, whether or not they still have the lease."""
        self.sent: list[Group] = []
        self.trained: list[int] = []
        self.largest_lag = 0

    @rule(actor=st.sampled_from(ACTORS))
    def issue(self, actor: str) -> None:
        ticket = self.dispatcher.issue(actor, self.engine[actor], 0.0)
        if ticket is not None:
            assert ticket.min_version <= self.engine[actor]
            self.holding.append((actor, ticket, self.engine[actor]))

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        actor, ticket, version = self.holding.pop(data.draw(st.integers(0, len(self.holding) - 1)))
        self.arrive(actor, group_of(ticket, version=version))

    def arrive(self, actor: str, group: Group) -> None:
        """As the server does it: a group of lost or too old weights is refused, a good one journaled."""
        wanted, step = self.dispatcher.wanted(group.id), self.dispatcher.step_of(group.completions[0].spans[0][0])
        if wanted is not None and (step is None or step < self.dispatcher.oldest_step(group.id)):
            self.dispatcher.give_back(group.id, actor, "lost weights", group.attempt)
        elif wanted is not None:
            self.journal.append(group)
            self.sent.append(group)
            assert self.dispatcher.receive(group)
            if self.dispatcher.is_filtered_out(group.id):
                self.journal_filtered.append(group.id)
        else:
            assert not self.dispatcher.receive(group)

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        actor, ticket, _ = self.holding.pop(data.draw(st.integers(0, len(self.holding) - 1)))
        self.dispatcher.give_back(ticket.id, actor, "no", ticket.attempt)

    @rule()
    def save(self) -> None:
        self.checkpoint = (self.dispatcher.state(), len(self.trained))

    @rule()
    def crash(self) -> None:
        """The learner comes back at its checkpoint. Actors go on with their tickets and the weights they serve."""
        state, trained = self.checkpoint
        del self.trained[trained:]
        self.dispatcher = make_dispatcher(**self.shape)
        first_groups = {group.id: group for group in reversed(self.journal)}.values()
        known = {version: self.step_of_version[version] for version in self.surviving}
        self.dispatcher.restore(
            state, first_groups, self.version + 1, self.journal_failed, known, self.journal_filtered
        )
        self.publish(state["step"])

    def publish(self, step: int) -> None:
        self.version += 1
        self.step_of_version[self.version] = step
        self.surviving.add(self.version)
        self.dispatcher.published(step, self.version)

    @rule()
    def roll_back(self) -> None:
        """The guard saw a collapse: back to the checkpoint on a new branch, which gets a checkpoint at once."""
        state, trained = self.checkpoint
        del self.trained[trained:]
        self.surviving = {version for version in self.surviving if self.step_of_version[version] <= state["step"]}
        self.dispatcher.roll_back(state, self.dispatcher.branch + 1, self.version + 1)
        self.publish(state["step"])
        self.save()

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        wanted_before = self.dispatcher.counts()["queued"]
        group = data.draw(st.sampled_from(self.sent))
        if self.dispatcher.wanted(group.id) is not None:
            return  # lost with a crash, and to be drawn again
        assert not self.dispatcher.receive(group)
        assert self.dispatcher.counts()["queued"] == wanted_before

    @rule(actor=st.sampled_from(ACTORS), still_working=st.booleans())
    def die(self, actor: str, still_working: bool) -> None:
        """With `still_working` only the learner believes it: its groups may arrive later."""
        self.dispatcher.actor_gone(actor, "died")
        if not still_working:
            self.holding = [held for held in self.holding if held[0] != actor]

    @rule(actor=st.sampled_from(ACTORS))
    def beat(self, actor: str) -> None:
        stray = self.dispatcher.beat(actor, [ticket.id for holder, ticket, _ in self.holding if holder == actor])
        self.holding = [held for held in self.holding if held[0] != actor or held[1].id not in stray]

    @rule(actor=st.sampled_from(ACTORS))
    def lose_everything(self, actor: str) -> None:
        """The actor forgot its tickets: two heartbeats tell."""
        self.holding = [held for held in self.holding if held[0] != actor]
        self.dispatcher.beat(actor, [])
        self.dispatcher.beat(actor, [])
        assert self.dispatcher.leases_of(actor) == []

    @rule(actor=st.sampled_from(ACTORS))
    def update_engine(self, actor: str) -> None:
        self.engine[actor] = self.version

    @rule()
    def train(self) -> None:
        batch = self.dispatcher.take()
        if batch is None:
            return
        step = self.dispatcher.step
        indices = [group.id.index for group in batch]
        assert self.compositions.setdefault((self.dispatcher.branch, step), indices) == indices, "a replay diverged"
        for group in batch:
            version = group.completions[0].spans[0][0]
            assert version in self.surviving and group.id.epoch == self.dispatcher.branch, "of an abandoned branch"
            lag = step - self.step_of_version[version]
            assert lag >= 0, "tokens of weights that are still to come"
            self.largest_lag = max(self.largest_lag, lag)
            self.trained.append(group.id.index)
        self.publish(step + 1)
        self.dispatcher.commit()

    @invariant()
    def accounts(self) -> None:
        if hasattr(self, "dispatcher"):
            self.dispatcher.check()
            self.compare_with_looking_through_everything()
            self.journal_failed += self.dispatcher.newly_failed
            self.dispatcher.newly_failed.clear()
            assert len(self.trained) == len(set(self.trained)), "a ticket was trained on twice"
            assert self.trained == sorted(self.trained), "batches are in ticket order"
            assert self.largest_lag <= self.max_lag

    def compare_with_looking_through_everything(self) -> None:
        """What is kept up to date piece by piece is what a look at all tickets finds."""
        dispatcher, train = self.dispatcher, self.dispatcher.train
        line = sorted([*train.waiting, *train.leased, *train.queued])
        oldest = line[: dispatcher.groups_per_step]
        assert dispatcher.state()["unfinished"] == [ticket_id.index for ticket_id in line]
        assert dispatcher.missing() == [ticket_id for ticket_id in oldest if ticket_id not in train.queued]
        assert dispatcher._is_complete() == (len(oldest) == dispatcher.groups_per_step and not dispatcher.missing())
        for place, ticket_id in enumerate(line):
            due = dispatcher.step + (len(dispatcher.in_training) + place) // dispatcher.groups_per_step
            assert dispatcher.oldest_step(ticket_id) == max(0, due - self.max_lag)
        for actor in ACTORS:
            leases = [lease for lease in train.leased.values() if lease.actor == actor]
            assert dispatcher.leases_of(actor) == [lease.ticket.id for lease in leases]
            assert dispatcher.completions_of(actor) == sum(lease.ticket.group_size for lease in leases)
        for step in range(dispatcher.step + 1):
            versions = [version for published, version in dispatcher.step_versions.items() if published >= step]
            assert dispatcher.version_of_step(step) == min(versions)

    def teardown(self) -> None:
        """From any state a run can be completed: nothing is lost for good."""
        if not hasattr(self, "dispatcher"):
            return
        for actor in ACTORS:
            self.lose_everything(actor)
        for _ in range(20 * self.steps * self.dispatcher.groups_per_step):
            self.update_engine("a")
            self.issue("a")
            for actor, ticket, version in self.holding:
                self.arrive(actor, group_of(ticket, version=version))
            self.holding.clear()
            self.train()
        counts, failed = self.dispatcher.counts(), {ticket_id.index for ticket_id in self.dispatcher.train.failed}
        assert len(self.trained) == counts["trained"] == self.steps * self.dispatcher.groups_per_step
        finished = {*self.trained, *failed}
        assert finished <= set(range(counts["issued"] - counts["abandoned"])), "no index twice, none left out"
        assert len(finished) + counts["filtered"] == counts["issued"] - counts["abandoned"]
        assert not {*self.trained} & failed


RandomSchedules.TestCase.settings = settings(max_examples=120, stateful_step_count=60)
TestRandomSchedules = RandomSchedules.TestCase
