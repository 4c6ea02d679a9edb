"""The dispatcher, rule by rule: order of issue, leases, staleness, replay, filtering, going back."""

from __future__ import annotations

import msgspec

from learner.intake.dispatcher import TICKET_STATES, Dispatcher
from protocol.messages import Ticket, TicketId
from tests.intake_harness import group_of, make_dispatcher, make_ticket


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
        dispatcher.receive(group_of(ticket))
    assert dispatcher.issue("a", 1, 0.0) is None
    assert [group.id.index for group in dispatcher.take() or []] == [0, 1]
    assert dispatcher.issue("a", 1, 0.0) is None, "a batch in training still counts"
    dispatcher.published(1, 2)
    dispatcher.commit()
    assert [ticket.id.index for ticket in issue_all(dispatcher, version=2)] == [4, 5]


def test_ticket_waits_for_the_version_that_keeps_it_within_max_lag() -> None:
    dispatcher = make_dispatcher(groups_per_step=1, max_lag=0, steps=3)
    (ticket,) = issue_all(dispatcher)
    dispatcher.receive(group_of(ticket))
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
        dispatcher.receive(group_of(tickets[index]))
    assert dispatcher.take() is None
    assert dispatcher.missing() == [TicketId(0, 0)]
    dispatcher.receive(group_of(tickets[0]))
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
    assert dispatcher.receive(group_of(first))
    assert dispatcher.wanted(second.id) is None
    assert not dispatcher.receive(group_of(second))
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
    dispatcher.give_back(issued[0].id, "a", "no", issued[0].attempt)
    assert dispatcher.issue("a", 1, 0.0) is not None, "issued again"
    for ticket in reversed(issued):
        assert dispatcher.receive(group_of(ticket))
    assert not dispatcher.receive(group_of(issued[0])), "a duplicate"
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
    dispatcher.receive(group_of(tickets[0]))
    dispatcher.receive(group_of(tickets[1]))
    dispatcher.take()
    dispatcher.published(1, 2)
    dispatcher.commit()
    issue_all(dispatcher, version=2)
    state = dispatcher.state()
    assert state["unfinished"] == [2, 3, 4, 5]

    resumed = make_dispatcher(groups_per_step=2, max_lag=1, steps=5)
    journaled = [group_of(make_ticket(index)) for index in (0, 2, 3, 6)]  # 0 was trained, 6 came after the checkpoint
    assert resumed.restore(state, journaled, version=9) == [2, 3, 6]
    assert resumed.counts()["trained"] == 2
    assert [group.id.index for group in resumed.take() or []] == [2, 3]
    resumed.published(2, 10)
    resumed.commit()
    again = issue_all(resumed, version=10)
    assert [(ticket.id.index, ticket.min_version) for ticket in again] == [(4, 9), (5, 9), (7, 10)]
    assert TicketId(0, 6) in resumed.train.queued, "its journaled group needs no actor"


def test_a_resumed_run_counts_what_was_done_anew_in_all_and_by_this_process() -> None:
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=1, steps=5)
    for ticket in issue_all(dispatcher)[:3]:
        dispatcher.give_back(ticket.id, "a", "lost")
    dispatcher.receive(group_of(make_ticket(0)))
    dispatcher.receive(group_of(make_ticket(0)))
    assert dispatcher.redone() == {"duplicates": 1, "reissued": 3}

    resumed = make_dispatcher(groups_per_step=2, max_lag=1, steps=5)
    resumed.restore(dispatcher.state(), [], version=2)
    assert resumed.redone() == {"duplicates": 0, "reissued": 0}
    resumed.published(0, 2)
    resumed.give_back(issue_all(resumed, version=2)[0].id, "a", "lost")
    assert resumed.redone() == {"duplicates": 0, "reissued": 1}
    assert {name: resumed.counts()[name] for name in resumed.redone()} == {"duplicates": 1, "reissued": 4}
    resumed.roll_back(resumed.state(), 1, 3)
    assert resumed.redone() == {"duplicates": 0, "reissued": 1}, "a rollback is no new process"


def test_restore_keeps_the_place_of_a_ticket_that_failed_after_the_checkpoint() -> None:
    dispatcher = make_dispatcher(groups_per_step=2, max_lag=0, max_attempts=1)
    state = dispatcher.state()
    tickets = issue_all(dispatcher)
    dispatcher.give_back(tickets[0].id, "a", "no")
    assert dispatcher.newly_failed == [(TicketId(0, 0), "no")]
    assert [ticket.id.index for ticket in issue_all(dispatcher)] == [2]

    resumed = make_dispatcher(groups_per_step=2, max_lag=0)
    journaled = [group_of(make_ticket(index)) for index in (1, 2)]
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
    dispatcher.receive(group_of(others[0]))
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
    assert dispatcher.receive(group_of(first)), "accepted, hence acknowledged and journaled once"
    assert dispatcher.holds(0), "its figures are those of the batch that is still to come"
    (third,) = issue_all(dispatcher)
    assert (third.id.index, dispatcher.counts()["filtered"]) == (2, 1)
    dispatcher.receive(group_of(second))
    dispatcher.receive(group_of(third))
    (fourth,) = issue_all(dispatcher)
    dispatcher.receive(group_of(fourth))
    assert [group.id.index for group in dispatcher.take() or []] == [1, 3], "two filtered in one step are the limit"
    assert [group.id.index for group in dispatcher.filtered_before] == [0, 2]
    dispatcher.published(1, 2)
    dispatcher.commit()
    assert dispatcher.counts()["filtered"] == 2
    assert not dispatcher.receive(group_of(first)), "a duplicate of a filtered group"


def test_filtering_leaves_evaluations_alone() -> None:
    dispatcher = make_dispatcher(is_filtered=lambda group: True, max_filtered_per_step=100)
    dispatcher.start_evaluation([msgspec.structs.replace(make_ticket(0), id=TicketId(-1, 0), kind="eval")])
    ticket = dispatcher.issue("a", 1, 0.0)
    assert ticket is not None
    dispatcher.receive(group_of(ticket))
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
        dispatcher.receive(group_of(ticket))
    dispatcher.take()
    dispatcher.published(1, 2)
    dispatcher.commit()
    state = dispatcher.state()  # step 1: two trained, 2 and 3 leased
    for ticket in [*tickets[2:], *issue_all(dispatcher, version=2)]:
        dispatcher.receive(group_of(ticket, version=2))
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
    old, new = group_of(tickets[2], version=2), group_of(again[0], version=4)
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
