"""The dispatcher under random schedules: every ticket in one state, none lost, none trained twice, lag bounded."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from learner.intake.dispatcher import TICKET_STATES, Dispatcher
from protocol.messages import Completion, Group, Ticket, TicketId
from tests.intake_harness import make_ticket, ticket_of

ACTORS = ("a", "b", "c")


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


def make_group(ticket: Ticket, version: int = 1) -> Group:
    completion = Completion(1, ((version, 0),), "stop", {"reward": 1.0})
    return Group(
        id=ticket.id, kind=ticket.kind, attempt=ticket.attempt, actor="a", prompt_ids=ticket.prompt_ids,
        temperature=1.0,
        completions=(completion,), token_ids=b"\0\0\0\0", logprobs=b"\0\0\0\0", mask=b"\1",
    )  # fmt: skip


def issue_all(dispatcher: Dispatcher, actor: str = "a", version: int = 1, now: float = 0.0) -> list[Ticket]:
    tickets = []
    while ticket := dispatcher.issue(actor, version, now):
        tickets.append(ticket)
    return tickets


def test_issue_stops_at_the_admission_bound_and_goes_on_after_a_commit() -> None:
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=1)
    tickets = issue_all(dispatcher)
    assert [ticket.id.index for ticket in tickets] == [0, 1, 2, 3]
    for ticket in tickets[:2]:
        dispatcher.receive(make_group(ticket))
    assert dispatcher.issue("a", 1, 0.0) is None
    assert [group.id.index for group in dispatcher.take() or []] == [0, 1]
    assert dispatcher.issue("a", 1, 0.0) is None, "a batch in training still counts"
    dispatcher.published(1, 2)
    dispatcher.commit()
    assert [ticket.id.index for ticket in issue_all(dispatcher, version=2)] == [4, 5]


def test_ticket_waits_for_the_version_that_keeps_it_within_max_lag() -> None:
    dispatcher = make_dispatcher(groups_per_step=1, max_lag=0, steps=3)
    (ticket,) = issue_all(dispatcher)
    dispatcher.receive(make_group(ticket))
    dispatcher.take()
    dispatcher.published(1, 7)
    dispatcher.commit()
    assert dispatcher.issue("a", 1, 0.0) is None, "an engine on version 1 may not begin a ticket of step 1"
    ticket = dispatcher.issue("a", 7, 0.0)
    assert ticket is not None
    assert ticket.min_version == 7


def test_batch_is_the_oldest_tickets_whatever_arrives_first() -> None:
    dispatcher = make_dispatcher(groups_per_step=2)
    tickets = issue_all(dispatcher)
    for index in (3, 2, 1):
        dispatcher.receive(make_group(tickets[index]))
    assert dispatcher.take() is None
    assert dispatcher.missing() == [TicketId(0, 0)]
    dispatcher.receive(make_group(tickets[0]))
    assert [group.id.index for group in dispatcher.take() or []] == [0, 1]


def test_issue_ends_with_the_last_step() -> None:
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=5, steps=2)
    assert len(issue_all(dispatcher)) == 4


def test_lost_lease_is_issued_again_first_and_fails_after_max_attempts() -> None:
    dispatcher = make_dispatcher(max_attempts=2)
    tickets = issue_all(dispatcher, "a")
    dispatcher.actor_gone("a", "died")
    again = issue_all(dispatcher, "b")
    assert [(ticket.id.index, ticket.attempt) for ticket in again] == [(0, 2), (1, 2), (2, 2), (3, 2)]
    dispatcher.give_back(tickets[0].id, "b", "grader on fire")
    counts = dispatcher.counts()
    assert counts["failed"] == 1
    assert counts["reissued"] == 4
    assert [ticket.id.index for ticket in issue_all(dispatcher, "b")] == [4], "a failed ticket is replaced"


def test_failure_of_an_earlier_attempt_leaves_the_new_lease_alone() -> None:
    dispatcher = make_dispatcher(groups_per_step=1, max_lag=0)
    (first,) = issue_all(dispatcher, "a")
    dispatcher.give_back(first.id, "a", "straggled")
    (second,) = issue_all(dispatcher, "a")
    dispatcher.give_back(first.id, "a", "late word", attempt=first.attempt)
    assert dispatcher.leases_of("a") == [second.id]
    dispatcher.give_back(second.id, "a", "really", attempt=second.attempt)
    assert dispatcher.leases_of("a") == []


def test_two_beats_without_a_lease_issue_it_again_one_does_not() -> None:
    dispatcher = make_dispatcher(groups_per_step=1, max_lag=0)
    (ticket,) = issue_all(dispatcher)
    dispatcher.beat("a", [])
    dispatcher.beat("a", [ticket.id])
    dispatcher.beat("a", [])
    assert dispatcher.leases_of("a") == [ticket.id]
    dispatcher.beat("a", [])
    assert dispatcher.leases_of("a") == []
    assert dispatcher.beat("a", [ticket.id]) == [ticket.id], "what it lists now is no longer its own"


def test_late_group_counts_if_it_is_the_first_and_is_a_duplicate_otherwise() -> None:
    dispatcher = make_dispatcher(groups_per_step=1, max_lag=0)
    (first,) = issue_all(dispatcher, "a")
    dispatcher.actor_gone("a", "silent")
    (second,) = issue_all(dispatcher, "b")
    assert dispatcher.wanted(first.id) is not None
    assert dispatcher.receive(make_group(first))
    assert dispatcher.wanted(second.id) is None
    assert not dispatcher.receive(make_group(second))
    assert dispatcher.counts()["duplicates"] == 1


def test_evaluation_tickets_go_first_and_have_a_ledger_of_their_own() -> None:
    dispatcher = make_dispatcher()
    before = dispatcher.counts()
    dispatcher.training_enabled = False
    tickets = [msgspec.structs.replace(make_ticket(i), id=TicketId(-1, i), kind="eval") for i in range(3)]
    dispatcher.start_evaluation(tickets)
    issued = issue_all(dispatcher)
    assert [ticket.id for ticket in issued] == [TicketId(-1, 0), TicketId(-1, 1), TicketId(-1, 2)]
    assert dispatcher.finish_evaluation() is None
    for ticket in reversed(issued):
        dispatcher.receive(make_group(ticket))
    groups, failed = dispatcher.finish_evaluation() or ([], {})
    assert [group.id.index for group in groups] == [0, 1, 2]
    assert failed == {}
    assert dispatcher.counts() == before


def test_straggler_is_reported_only_when_it_blocks_the_next_batch() -> None:
    dispatcher = make_dispatcher(groups_per_step=1, max_lag=1)
    issue_all(dispatcher, now=0.0)
    assert dispatcher.stragglers(now=100.0, older_than_s=60.0) == [(TicketId(0, 0), "a")]
    assert dispatcher.stragglers(now=50.0, older_than_s=60.0) == []


def test_restore_queues_journaled_groups_and_issues_the_rest_again() -> None:
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=1, steps=5)
    tickets = issue_all(dispatcher)
    dispatcher.receive(make_group(tickets[0]))
    dispatcher.receive(make_group(tickets[1]))
    dispatcher.take()
    dispatcher.published(1, 2)
    dispatcher.commit()
    issue_all(dispatcher, version=2)
    state = dispatcher.state()
    assert state["unfinished"] == [2, 3, 4, 5]

    resumed = make_dispatcher(groups_per_step=2, max_lag=1, steps=5)
    journaled = [make_group(make_ticket(index)) for index in (0, 2, 3, 6)]  # 0 was trained, 6 came after the checkpoint
    assert resumed.restore(state, journaled, version=9) == [2, 3, 6]
    assert resumed.counts()["trained"] == 2
    assert [group.id.index for group in resumed.take() or []] == [2, 3]
    resumed.published(2, 10)
    resumed.commit()
    again = issue_all(resumed, version=10)
    assert [(ticket.id.index, ticket.min_version) for ticket in again] == [(4, 9), (5, 9), (7, 10)]
    assert TicketId(0, 6) in resumed.train.queued, "its journaled group needs no actor"


def test_restore_keeps_the_place_of_a_ticket_that_failed_after_the_checkpoint() -> None:
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=0, max_attempts=1)
    state = dispatcher.state()
    tickets = issue_all(dispatcher)
    dispatcher.give_back(tickets[0].id, "a", "no")
    assert dispatcher.newly_failed == [(TicketId(0, 0), "no")]
    assert [ticket.id.index for ticket in issue_all(dispatcher)] == [2]

    resumed = make_dispatcher(groups_per_step=2, max_lag=0)
    journaled = [make_group(make_ticket(index)) for index in (1, 2)]
    resumed.restore(state, journaled, version=2, failed=dispatcher.newly_failed)
    assert issue_all(resumed, version=2) == [], "tickets 1 and 2 are the first batch again, and nothing else is drawn"
    assert [group.id.index for group in resumed.take() or []] == [1, 2]
    assert resumed.counts()["failed"] == 1


def test_excused_attempts_do_not_count_against_a_ticket() -> None:
    dispatcher = make_dispatcher(groups_per_step=1, max_lag=0, max_attempts=2)
    for _ in range(10):
        issue_all(dispatcher)
        dispatcher.actor_gone("a", "scaled down", excused=True)
    issue_all(dispatcher)
    dispatcher.actor_gone("a", "died")
    assert dispatcher.counts()["failed"] == 0
    issue_all(dispatcher)
    dispatcher.actor_gone("a", "died again")
    assert dispatcher.counts()["failed"] == 1


def test_only_train_tickets_that_actors_report_make_the_run_give_up() -> None:
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=1, max_attempts=1)
    tickets = issue_all(dispatcher)
    dispatcher.give_back(tickets[0].id, "a", "a: no", attempt=1)
    assert dispatcher.failed_in_a_row == 1
    dispatcher.actor_gone("a", "died with all its leases")
    assert dispatcher.counts()["failed"] == 4
    assert dispatcher.failed_in_a_row == 1
    dispatcher.start_evaluation([msgspec.structs.replace(make_ticket(0), id=TicketId(-1, 0), kind="eval")])
    ticket, *others = issue_all(dispatcher)
    dispatcher.give_back(ticket.id, "a", "a: no", attempt=1)
    assert dispatcher.failed_in_a_row == 1, "an evaluation has a limit of its own"
    dispatcher.receive(make_group(others[0]))
    assert dispatcher.failed_in_a_row == 0


def test_group_of_a_resumed_ticket_may_be_as_old_as_its_place_in_line_allows() -> None:
    """Restored tickets ask for the newest weights; what an actor finished before the crash is good all the same."""
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=1)
    issue_all(dispatcher)
    state = dispatcher.state() | {"step": 3, "next_index": 10, "unfinished": [6, 7, 8, 9], "trained": 6}
    resumed = make_dispatcher(groups_per_step=2, max_lag=1)
    resumed.restore(state, [], version=9, versions={5: 2, 6: 3, 7: 4})
    assert [resumed.oldest_step(TicketId(0, index)) for index in (6, 7, 8, 9)] == [2, 2, 3, 3]
    assert [resumed.step_of(version) for version in (5, 6, 7, 9)] == [2, 3, None, 3], "step 4 is lost"


def test_filtered_group_is_counted_and_replaced_by_the_next_prompt() -> None:
    dispatcher = make_dispatcher(
        groups_per_step=2, max_lag=0, is_filtered=lambda group: group.id.index in (0, 2, 3), max_filtered_per_step=2
    )
    first, second = issue_all(dispatcher)
    assert dispatcher.receive(make_group(first)), "accepted, hence acknowledged and journaled once"
    assert dispatcher.holds(0), "its figures are those of the batch that is still to come"
    (third,) = issue_all(dispatcher)
    assert (third.id.index, dispatcher.counts()["filtered"]) == (2, 1)
    dispatcher.receive(make_group(second))
    dispatcher.receive(make_group(third))
    (fourth,) = issue_all(dispatcher)
    dispatcher.receive(make_group(fourth))
    assert [group.id.index for group in dispatcher.take() or []] == [1, 3], "two filtered in one step are the limit"
    assert [group.id.index for group in dispatcher.filtered_before] == [0, 2]
    dispatcher.published(1, 2)
    dispatcher.commit()
    assert dispatcher.counts()["filtered"] == 2
    assert not dispatcher.receive(make_group(first)), "a duplicate of a filtered group"


def test_filtering_leaves_evaluations_alone() -> None:
    dispatcher = make_dispatcher(is_filtered=lambda group: True, max_filtered_per_step=100)
    dispatcher.start_evaluation([msgspec.structs.replace(make_ticket(0), id=TicketId(-1, 0), kind="eval")])
    ticket = dispatcher.issue("a", 1, 0.0)
    assert ticket is not None
    dispatcher.receive(make_group(ticket))
    groups, _ = dispatcher.finish_evaluation() or ([], {})
    assert len(groups) == 1 and dispatcher.counts()["filtered"] == 0


def test_evaluation_beside_training_has_its_share_and_what_training_leaves() -> None:
    dispatcher = make_dispatcher(groups_per_step=3, max_lag=1, steps=9)
    tickets = [msgspec.structs.replace(make_ticket(i), id=TicketId(-1, i), kind="eval") for i in range(8)]
    dispatcher.start_evaluation(tickets, pinned=False, share=0.25)
    order = [ticket.kind for ticket in issue_all(dispatcher)]
    assert order[:8] == ["eval", "train", "train", "train", "eval", "train", "train", "train"]
    assert order[8:] == ["eval"] * 6, "admission is exhausted: idle engines take the rest"


def test_unpinned_evaluation_takes_later_versions_and_no_earlier_ones() -> None:
    dispatcher = make_dispatcher()
    dispatcher.published(1, 2)
    ticket = msgspec.structs.replace(make_ticket(0), id=TicketId(-2, 0), kind="eval", min_version=2)
    dispatcher.start_evaluation([ticket], pinned=False, share=0.5)
    assert dispatcher.oldest_step(ticket.id) == 1


def test_roll_back_abandons_what_lies_behind_the_checkpoint_and_issues_it_again() -> None:
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=1, steps=5)
    tickets = issue_all(dispatcher)
    for ticket in tickets[:2]:
        dispatcher.receive(make_group(ticket))
    dispatcher.take()
    dispatcher.published(1, 2)
    dispatcher.commit()
    state = dispatcher.state()  # step 1: two trained, 2 and 3 leased
    for ticket in [*tickets[2:], *issue_all(dispatcher, version=2)]:
        dispatcher.receive(make_group(ticket, version=2))
    dispatcher.take()
    dispatcher.published(2, 3)
    dispatcher.commit()  # a second step, which is given up now

    dispatcher.roll_back(state, branch=1, version=4)
    dispatcher.published(1, 4)
    assert dispatcher.counts() == state_counts(issued=8, trained=2, abandoned=4, leased=2)
    assert (dispatcher.step, dispatcher.step_of(1), dispatcher.step_of(3), dispatcher.step_of(4)) == (1, 0, None, 1)
    assert dispatcher.wanted(tickets[2].id) is None, "what the old branch drew answers nothing"
    assert issue_all(dispatcher, version=3) == [], "nor does an engine with its weights get a ticket"
    again = issue_all(dispatcher, version=4)
    assert [(ticket.id, ticket.min_version) for ticket in again[:3]] == [
        (TicketId(1, 2), 4), (TicketId(1, 3), 4), (TicketId(1, 4), 4)
    ]  # fmt: skip
    assert dispatcher.counts()["abandoned"] == 4
    resumed = make_dispatcher(groups_per_step=2, max_lag=1, steps=5)
    old, new = make_group(tickets[2], 2), make_group(again[0], 4)
    assert resumed.restore(dispatcher.state(), [old, new], 5) == [2]
    assert resumed.train.queued == {TicketId(1, 2): new}


def state_counts(**changed: int) -> dict[str, int]:
    return dict.fromkeys(TICKET_STATES, 0) | changed


def test_roll_back_gives_up_a_running_evaluation() -> None:
    dispatcher = make_dispatcher()
    state = dispatcher.state()
    dispatcher.start_evaluation([msgspec.structs.replace(make_ticket(0), id=TicketId(-1, 0), kind="eval")])
    assert dispatcher.issue("a", 1, 0.0) is not None
    dispatcher.roll_back(state, branch=1, version=2)
    assert dispatcher.beat("a", [TicketId(-1, 0)]) == [TicketId(-1, 0)], "its holder is told to stop"
    dispatcher.start_evaluation([msgspec.structs.replace(make_ticket(0), id=TicketId(-2, 0), kind="eval")])


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
        self.arrive(actor, make_group(ticket, version))

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
            self.journal_failed += self.dispatcher.newly_failed
            self.dispatcher.newly_failed.clear()
            assert len(self.trained) == len(set(self.trained)), "a ticket was trained on twice"
            assert self.trained == sorted(self.trained), "batches are in ticket order"
            assert self.largest_lag <= self.max_lag

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
                self.arrive(actor, make_group(ticket, version))
            self.holding.clear()
            self.train()
        counts, failed = self.dispatcher.counts(), {ticket_id.index for ticket_id in self.dispatcher.train.failed}
        assert len(self.trained) == counts["trained"] == self.steps * self.dispatcher.groups_per_step
        finished = {*self.trained, *failed}
        assert finished <= set(range(counts["issued"] - counts["abandoned"])), "no index twice, none left out"
        assert len(finished) + counts["filtered"] == counts["issued"] - counts["abandoned"]
        assert not {*self.trained} & failed


RandomSchedules.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestRandomSchedules = RandomSchedules.TestCase
