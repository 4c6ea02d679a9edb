"""The intake on real sockets with whole actors: every ticket trained exactly once, whatever happens to the actors."""

from __future__ import annotations

import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from actor.fake_engine import EOS, FakeEngine, completion_length, draw
from actor.rollout import completion_seed
from learner.intake.journal import Journal, read_failed, read_groups, read_groups_with_offsets, read_steps
from learner.intake.server import FATAL_FAILURES, unlike
from learner.intake.source import FATAL_TICKETS, Interrupted, TicketsFail
from protocol.errors import DeadlineExceeded, EngineFailed
from protocol.messages import (
    Ack,
    Beat,
    Cancel,
    Drain,
    Failed,
    Group,
    Heartbeat,
    Hello,
    ManifestRequest,
    Refused,
    Rehello,
    Sampling,
    Ticket,
    TicketId,
    Welcome,
)
from tests.actor_harness import DEADLINE_S, ActorThread, Puppet, group_of, indices, train, until
from tests.intake_harness import GROUP_SIZE, Intake, make_ticket

FIRST, SECOND = TicketId(0, 0), TicketId(0, 1)


def journal_of(directory: Path) -> list[Group]:
    return list(read_groups(directory / "groups.journal"))


def assert_trained_exactly_once(intake: Intake, batches: list[list[Group]], tickets: int) -> None:
    """Batches in ticket order without gap or repetition, the accounting and the journal say the same."""
    assert indices(batches) == list(range(tickets))
    counts = intake.dispatcher.counts()
    assert counts["issued"] == counts["trained"] == tickets
    assert sum(counts[state] for state in ("failed", "queued", "leased", "in_training", "dropped", "abandoned")) == 0
    journaled = [group.id.index for group in read_groups(intake.journal.path)]
    assert sorted(journaled) == list(range(tickets))


def assert_is_what_the_engine_drew(group: Group) -> None:
    """Token by token: the fake engine's draw for (prompt, seed of the completion, version of the span, position)."""
    ticket = make_ticket(group.id.index)
    tokens: list[int] = []
    logprobs: list[float] = []
    for number, completion in enumerate(group.completions):
        seed = completion_seed(ticket.seed, number)
        assert completion.num_tokens == completion_length(ticket.prompt_ids, ticket.sampling, seed)
        for index in range(completion.num_tokens):
            version = max(version for version, start in completion.spans if start <= index)
            token, logprob = draw(ticket.prompt_ids, seed, version, index)
            ends = completion.finish_reason == "stop" and index == completion.num_tokens - 1
            tokens.append(EOS if ends else token)
            logprobs.append(logprob)
    assert group.prompt_ids == ticket.prompt_ids
    assert np.frombuffer(group.token_ids, "<i4").tolist() == tokens
    assert np.frombuffer(group.logprobs, "<f4").tolist() == np.float32(logprobs).tolist()
    assert group.mask == b"\1" * len(tokens)


# --- whole runs ---


def test_run_trains_every_ticket_once_with_the_tokens_that_the_engine_drew(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, ActorThread(intake.address):
        intake.publish(0)
        batches = train(intake, 4)
        assert_trained_exactly_once(intake, batches, 16)
        for group in (group for batch in batches for group in batch):
            assert (group.actor, len(group.completions)) == ("actor-0", GROUP_SIZE)
            assert_is_what_the_engine_drew(group)
        steps = list(read_steps(intake.journal.path))
        assert [(row["step"], row["version"]) for row in steps] == [(1, 2), (2, 3), (3, 4), (4, 5)]
        assert [index for row in steps for _, index in row["ids"]] == list(range(16))
        assert intake.server.rollout_tokens == sum(group.num_tokens for batch in batches for group in batch)
        assert (intake.server.totals.started, intake.server.totals.restarted, intake.server.totals.max) == (1, 0, 1)


def test_two_actors_share_the_work(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, steps=6, token_s=0.005) as intake,
        ActorThread(intake.address, "actor-0"),
        ActorThread(intake.address, "actor-1"),
    ):
        intake.publish(0)
        until(lambda: len([p for p in intake.server.peers.values() if p.version]) == 2, "both actors to serve")
        batches = train(intake, 6)
        assert_trained_exactly_once(intake, batches, 24)
        assert {group.actor for batch in batches for group in batch} == {"actor-0", "actor-1"}
        assert intake.server.totals.max == 2


def test_actor_that_joins_late_gets_the_newest_version_and_work(tmp_path: Path) -> None:
    with Intake(tmp_path, steps=8, token_s=0.005) as intake, ActorThread(intake.address, "actor-0"):
        intake.publish(0)
        batches = train(intake, 3)
        with ActorThread(intake.address, "actor-1") as late:
            until(lambda: late.loop.phase == "serving", "the late actor to serve")
            batches += train(intake, 8)
            assert_trained_exactly_once(intake, batches, 32)
            assert late.engine.loaded[0][0] >= 4, "versions that are history are not fetched"
        assert "actor-1" in {group.actor for batch in batches for group in batch}


def test_drained_actors_leave_and_give_back_what_they_hold(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, token_s=0.5) as intake,
        ActorThread(intake.address, "actor-0") as one,
        ActorThread(intake.address, "actor-1") as two,
    ):
        intake.publish(0)
        intake.source.wait_for_actor(1, DEADLINE_S)
        intake.source.resume_training()
        until(lambda: intake.dispatcher.holders(), "leases")
        intake.source.pause_training()
        intake.server.drain("enough for today")
        assert intake.source.wait_until_left(DEADLINE_S)
        for actor in (one, two):
            actor.join()
            assert (actor.reason, actor.error) == ("enough for today", None)
        assert intake.dispatcher.holders() == {}
        assert intake.server.totals.failures == []
        with Puppet(intake.address) as puppet:
            puppet.hello()
            (drain,) = puppet.next(Drain)
            assert drain.reason == "enough for today", "also who comes later is sent away"
            assert puppet.tickets == []


def test_leases_of_a_dead_actor_are_issued_again(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, dead_after_s=0.4) as intake,
        ActorThread(intake.address, "actor-0", FakeEngine(token_s=60)) as doomed,
    ):
        intake.publish(0)
        intake.source.wait_for_actor(1, DEADLINE_S)
        intake.source.resume_training()
        until(lambda: len(intake.dispatcher.leases_of("actor-0")) >= 4, "leases")
        lost = len(intake.dispatcher.leases_of("actor-0"))
        doomed.die()
        with ActorThread(intake.address, "actor-1"):
            batches = train(intake, 4)
        assert_trained_exactly_once(intake, batches, 16)
        assert {group.actor for batch in batches for group in batch} == {"actor-1"}
        assert intake.dispatcher.counts()["reissued"] == lost


def test_restarted_actor_is_known_at_once_by_its_incarnation(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, dead_after_s=600) as intake,
        ActorThread(intake.address, "actor-0", FakeEngine(token_s=60)) as doomed,
    ):
        intake.publish(0)
        intake.source.wait_for_actor(1, DEADLINE_S)
        intake.source.resume_training()
        until(lambda: intake.dispatcher.leases_of("actor-0"), "leases")
        doomed.die()
        with ActorThread(intake.address, "actor-0"):
            batches = train(intake, 4)
        assert_trained_exactly_once(intake, batches, 16)
        assert (intake.server.totals.started, intake.server.totals.restarted) == (1, 1)


def test_lag_stays_within_the_bound_and_is_used(tmp_path: Path) -> None:
    with Intake(tmp_path, steps=6, max_lag=2, token_s=0.01) as intake, ActorThread(intake.address):
        intake.publish(0)  # version v carries the weights of step v - 1
        batches = train(intake, 6)
        assert_trained_exactly_once(intake, batches, 24)
        lags = [
            step - (completion.spans[0][0] - 1)
            for step, batch in enumerate(batches)
            for group in batch
            for completion in group.completions
        ]
        assert min(lags) >= 0
        assert 0 < max(lags) <= 2


def test_strictly_on_policy_run_is_reproducible(tmp_path: Path) -> None:
    def run(directory: Path) -> list[list[Group]]:
        with Intake(directory, max_lag=0) as intake, ActorThread(intake.address):
            intake.publish(0)
            return train(intake, 4)

    first, second = run(tmp_path / "1"), run(tmp_path / "2")
    for step, batch in enumerate(first):
        versions = {span[0] for group in batch for completion in group.completions for span in completion.spans}
        assert versions == {step + 1}, "every token is of the weights that the step begins with"

    def without_times(batches: list[list[Group]]) -> list[Any]:
        return [msgspec.structs.replace(g, generate_s=0.0, grade_s=0.0, attempt=1) for batch in batches for g in batch]

    assert without_times(first) == without_times(second)


def test_evaluation_with_training_paused_measures_exactly_one_version(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, steps=8, token_s=0.005) as intake,
        ActorThread(intake.address, "actor-0"),
        ActorThread(intake.address, "actor-1"),
    ):
        intake.publish(0)
        batches = train(intake, 3)
        intake.source.pause_training()
        version = intake.publish(3)
        issued = intake.dispatcher.counts()["issued"]
        tickets = [eval_ticket(i, version) for i in range(20)]
        groups, failed = intake.source.evaluate(tickets, DEADLINE_S)
        assert failed == {}
        assert [group.prompt_ids for group in groups] == [ticket.prompt_ids for ticket in tickets]
        assert {group.kind for group in groups} == {"eval"}
        spans = {completion.spans for group in groups for completion in group.completions}
        assert spans == {((version, 0),)}
        assert intake.dispatcher.counts()["issued"] == issued, "no train ticket was issued meanwhile"
        batches += train(intake, 8)
        assert indices(batches) == list(range(32))


def test_evaluation_reports_tickets_that_failed_for_good(tmp_path: Path) -> None:
    with Intake(tmp_path, max_attempts=2) as intake, Puppet(intake.address) as puppet:
        intake.publish(0)
        puppet.hello()
        puppet.next(Welcome)
        with intake.server.lock:
            intake.dispatcher.start_evaluation([eval_ticket(0, 1), eval_ticket(1, 1)])
        good, bad = puppet.next(Ticket, 2)
        puppet.send(group_of(good))
        puppet.send(Failed(bad.id, 1, "no"))
        (again,) = puppet.next(Ticket)
        assert (again.id, again.attempt) == (bad.id, 2)
        puppet.send(Failed(bad.id, 2, "never"))
        groups, failed = until(lambda: locked(intake, intake.dispatcher.finish_evaluation), "the evaluation")
        assert [group.id for group in groups] == [good.id]
        assert failed == {bad.id: "actor-9: never"}


def eval_ticket(index: int, version: int) -> Ticket:
    return msgspec.structs.replace(
        make_ticket(100 + index), id=TicketId(-version, index), kind="eval", min_version=version
    )


def locked(intake: Intake, function: Any) -> Any:
    with intake.server.lock:
        return function()


# --- one actor, frame by frame ---


def leased(intake: Intake, puppet: Puppet, count: int) -> list[Ticket]:
    """Tickets that the intake hands to a puppet which introduced itself just now."""
    intake.publish(0)
    puppet.hello()
    puppet.next(Welcome)
    intake.source.resume_training()
    return puppet.next(Ticket, count)


def test_tickets_fill_the_slots_in_order_and_no_more(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address, slots=3) as puppet:
        tickets = leased(intake, puppet, 3)
        assert [ticket.id.index for ticket in tickets] == [0, 1, 2]
        puppet.settle(tuple(ticket.id for ticket in tickets))
        assert len(puppet.tickets) == 3
        puppet.send(group_of(tickets[1]))
        (fourth,) = puppet.next(Ticket)
        assert fourth.id.index == 3


def test_actor_without_weights_or_slots_gets_no_work(tmp_path: Path) -> None:
    with (
        Intake(tmp_path) as intake,
        Puppet(intake.address, "actor-1") as starting,
        Puppet(intake.address, "actor-2", slots=0) as busy,
    ):
        intake.publish(0)
        starting.hello(version=0)
        busy.hello()
        intake.source.resume_training()
        for puppet in (starting, busy):
            puppet.beat(version=0 if puppet is starting else 1)
            puppet.next(Beat, 1)
            assert puppet.tickets == []
        starting.beat(version=1)
        starting.next(Ticket)


def test_acknowledgement_follows_the_journal_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        on_disk: list[bool] = []
        send = intake.hub.send

        def watched(peer: bytes, message: Any) -> bool:
            if isinstance(message, Ack):
                on_disk.extend(ticket_id in [group.id for group in journal_of(tmp_path)] for ticket_id in message.ids)
            return send(peer, message)

        monkeypatch.setattr(intake.hub, "send", watched)
        tickets = leased(intake, puppet, 4)
        for ticket in tickets:
            puppet.send(group_of(ticket))
        assert {ticket_id for ack in puppet.next(Ack, 4) for ticket_id in ack.ids} == {t.id for t in tickets}
        assert on_disk == [True] * 4


def test_group_is_not_acknowledged_when_the_journal_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake = Intake(tmp_path)
    intake.server.start()
    with Puppet(intake.address) as puppet:
        (ticket, *_) = leased(intake, puppet, 1)

        def full(group: Group) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(intake.journal, "append_group", full)
        puppet.send(group_of(ticket))
        with pytest.raises(RuntimeError, match=r"the intake thread died: OSError.*No space left"):
            intake.source.take(DEADLINE_S)
        intake.server.stop()
        intake.journal.close()
        assert Ack not in {type(message) for message in puppet.rest()}


def test_duplicate_is_acknowledged_and_dropped(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        tickets = leased(intake, puppet, 4)
        group = group_of(tickets[0])
        for _ in range(3):
            puppet.send(group)
        assert [ack.ids for ack in puppet.next(Ack, 3)] == [(FIRST,)] * 3
        puppet.send(group_of(make_ticket(77)))  # never issued
        assert puppet.next(Ack)[0].ids == (TicketId(0, 77),)
        assert journal_of(tmp_path) == [group]
        assert intake.dispatcher.counts()["duplicates"] == 3
        assert intake.dispatcher.counts()["queued"] == 1


def test_stranger_is_asked_to_say_hello_and_changes_nothing(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        intake.publish(0)
        intake.source.resume_training()
        puppet.send(group_of(make_ticket(0)))
        puppet.beat()
        assert len(puppet.next(Rehello, 2)) == 2
        assert journal_of(tmp_path) == []
        puppet.hello()
        (welcome,) = puppet.next(Welcome)
        assert (welcome.bulk, welcome.news) == (intake.hub.bulk_endpoint, intake.hub.news_endpoint)
        puppet.send(ManifestRequest())  # on the wrong socket
        puppet.next(Ticket)
        puppet.settle()
        assert intake.hub.faults.counts["malformed"] == 1


def test_lease_is_issued_again_after_two_beats_that_do_not_list_it(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, heartbeat_s=0.2) as intake,
        Puppet(intake.address, "actor-1", slots=2) as forgetful,
        Puppet(intake.address, "actor-2", slots=0) as other,
    ):
        first, second = leased(intake, forgetful, 2)
        forgetful.settle()
        forgetful.settle()
        forgetful.settle()
        assert len(forgetful.tickets) == 2, "tickets may have crossed with these heartbeats"
        assert set(intake.dispatcher.leases_of("actor-1")) == {first.id, second.id}

        def forgotten() -> bool:
            forgetful.settle((second.id,))
            return len(forgetful.tickets) == 3

        until(forgotten, "the lease to be issued again")
        assert (forgetful.tickets[2].id, forgetful.tickets[2].attempt) == (first.id, 2)
        assert intake.dispatcher.counts()["reissued"] == 1
        assert other.tickets == []


def test_actor_that_lists_what_it_has_no_lease_for_is_corrected(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address, slots=2) as puppet:
        first, second = leased(intake, puppet, 2)
        puppet.send(group_of(first))
        puppet.next(Ack)
        (third,) = puppet.next(Ticket)
        answers = puppet.settle(held=(second.id, third.id, TicketId(0, 50)), unacked=(first.id,))
        assert {message.ids for message in answers if isinstance(message, Cancel)} == {(TicketId(0, 50),)}
        assert {message.ids for message in answers if isinstance(message, Ack)} == {(first.id,)}


def test_failed_ticket_is_issued_again_and_then_left_out(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, groups_per_step=1, max_lag=0, steps=1, max_attempts=2) as intake,
        Puppet(intake.address, slots=1) as puppet,
    ):
        (ticket,) = leased(intake, puppet, 1)
        puppet.send(Failed(ticket.id, 1, "prompt on fire"))
        (again,) = puppet.next(Ticket)
        assert (again.id, again.attempt) == (ticket.id, 2)
        puppet.send(Failed(ticket.id, 2, "still on fire"))
        (replacement,) = puppet.next(Ticket)
        assert replacement.id.index == 1
        assert intake.dispatcher.train.failed == {FIRST: "actor-9: still on fire"}
        puppet.send(group_of(replacement))
        assert indices(train(intake, 1)) == [1]


def test_straggler_is_cancelled_and_issued_again(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, groups_per_step=1, max_lag=0, steps=1, straggler_s=0.3) as intake,
        Puppet(intake.address, slots=1) as slow,
    ):
        (ticket,) = leased(intake, slow, 1)
        (cancel,) = slow.next(Cancel)
        assert cancel.ids == (ticket.id,)
        (again,) = slow.next(Ticket)
        assert (again.id, again.attempt) == (ticket.id, 2)
        slow.send(group_of(ticket))  # the first attempt completes after all
        assert indices(train(intake, 1)) == [0]
        assert intake.dispatcher.counts()["reissued"] >= 1


def test_whole_run_outlives_a_straggling_actor(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, straggler_s=0.5) as intake,
        ActorThread(intake.address, "actor-0", FakeEngine(token_s=60)) as slow,
    ):
        intake.publish(0)
        intake.source.wait_for_actor(1, DEADLINE_S)
        intake.source.resume_training()
        until(lambda: slow.engine.started, "work at the slow actor")
        with ActorThread(intake.address, "actor-1"):
            until(lambda: len([p for p in intake.server.peers.values() if p.version]) == 2, "both actors to serve")
            slow.engine.token_s = 0.0  # only what it began stays slow
            batches = train(intake, 4)
        assert_trained_exactly_once(intake, batches, 16)
        assert len(slow.engine.aborted) >= GROUP_SIZE, "its engine was told to stop"
        assert intake.dispatcher.counts()["reissued"] > 0


def test_silent_actor_is_buried_and_its_late_group_still_counts_once(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, groups_per_step=1, max_lag=0, steps=1, dead_after_s=0.3) as intake,
        Puppet(intake.address, "actor-1", slots=1) as silent,
    ):
        (ticket,) = leased(intake, silent, 1)
        until(lambda: not intake.server.peers, "the funeral")
        assert intake.dispatcher.holders() == {}
        with Puppet(intake.address, "actor-2", slots=1) as heir:
            heir.hello()
            (again,) = heir.next(Ticket)
            assert (again.id, again.attempt) == (ticket.id, 2)
            silent.send(group_of(ticket, "actor-1"))
            silent.next(Rehello)
            silent.hello(unacked=(ticket.id,))
            silent.next(Welcome)
            silent.send(group_of(ticket, "actor-1"))
            assert silent.next(Ack)[0].ids == (ticket.id,)
            assert heir.next(Cancel)[0].ids == (ticket.id,), "its work is not needed any more"
            heir.send(group_of(again, "actor-2"))
            assert heir.next(Ack)[0].ids == (ticket.id,)
        (batch,) = train(intake, 1)
        assert [group.actor for group in batch] == ["actor-1"]
        assert intake.dispatcher.counts()["duplicates"] == 1


def test_beats_keep_a_working_actor_alive(tmp_path: Path) -> None:
    with Intake(tmp_path, dead_after_s=0.4) as intake, ActorThread(intake.address, engine=FakeEngine(token_s=0.15)):
        intake.publish(0)
        intake.source.wait_for_actor(1, DEADLINE_S)
        train(intake, 1)  # one group takes longer than dead_after_s
        assert intake.dispatcher.counts()["reissued"] == 0


def test_new_incarnation_gets_the_leases_of_the_one_before_anew(tmp_path: Path) -> None:
    with Intake(tmp_path, heartbeat_s=10, dead_after_s=600) as intake, Puppet(intake.address, slots=2) as puppet:
        first, second = leased(intake, puppet, 2)
        puppet.incarnation = "p2"
        puppet.connect()
        puppet.hello()
        again = puppet.next(Ticket, 2)
        assert [(ticket.id, ticket.attempt) for ticket in again] == [(first.id, 2), (second.id, 2)]
        assert (intake.server.totals.started, intake.server.totals.restarted) == (1, 1)


def test_reconnected_actor_keeps_its_leases(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address, slots=2) as puppet:
        first, second = leased(intake, puppet, 2)
        puppet.connect()
        puppet.hello(held=(first.id, second.id))
        puppet.next(Welcome)
        puppet.settle(held=(first.id, second.id))
        assert len(puppet.tickets) == 2, "nothing was issued again"
        assert len(intake.server.peers) == 1
        puppet.send(group_of(second))
        assert puppet.next(Ack)[0].ids == (second.id,)


def test_actor_of_another_protocol_is_refused_in_words(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        puppet._sock.send(b"TNDM\x07whatever")
        (refusal,) = puppet.next(Refused)
        assert "version 7" in refusal.reason


# --- waits of the learner ---


def test_engine_that_fails_at_start_ends_the_run_with_its_own_words(tmp_path: Path) -> None:
    words = "CUDA error: no kernel image is available for execution on the device"
    with Intake(tmp_path) as intake, ActorThread(intake.address, engine=FakeEngine(start_error=words)) as actor:
        intake.publish(0)
        with pytest.raises(EngineFailed, match=f"actor-0: {words}"):
            intake.source.wait_for_actor(1, DEADLINE_S)
        actor.join()
        assert isinstance(actor.error, EngineFailed)
        assert str(actor.error) == words


def test_engines_that_keep_failing_end_the_run_but_one_failure_does_not(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address, "actor-1") as puppet:
        intake.publish(0)
        intake.source.resume_training()
        for failure in range(FATAL_FAILURES):
            intake.source._check_engines()  # fewer than that are no reason to give up
            puppet.incarnation = f"p{failure}"
            puppet.connect()
            puppet.hello()
            (ticket, *_) = puppet.next(Ticket)
            if failure == 0:
                puppet.send(group_of(ticket))
                puppet.next(Ack)
            puppet.goodbye(error=f"illegal memory access {failure}")
            until(lambda n=failure: len(intake.server.totals.failures) == n + 1, "the failure to be known")
        with pytest.raises(EngineFailed, match=f"actor-1: illegal memory access {FATAL_FAILURES - 1}"):
            intake.source.take(DEADLINE_S)


def test_take_names_what_it_waits_for_when_the_deadline_passes(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake:
        with pytest.raises(DeadlineExceeded, match=r"waited \d+ s for 4 groups: no actor is connected"):
            intake.source.take(0.01)
        with Puppet(intake.address, slots=3) as puppet:
            tickets = leased(intake, puppet, 3)
            puppet.settle(tuple(ticket.id for ticket in tickets))
            with pytest.raises(DeadlineExceeded, match=r"3 groups: actor-9 serving"):
                intake.source.take(0.01)
            intake.stop_requested.set()
            with pytest.raises(Interrupted):
                intake.source.take(DEADLINE_S)


def test_only_the_newest_of_two_actors_with_one_name_takes_part(tmp_path: Path) -> None:
    """The one that joined first is told, and no lease goes to and fro."""
    with Intake(tmp_path, max_attempts=2) as intake, Puppet(intake.address) as first:
        leased(intake, first, 4)
        with Puppet(intake.address, incarnation="p2") as second:
            second.hello()
            second.next(Welcome)
            tickets = second.next(Ticket, 4)
            for _ in range(5):
                first.hello()
                assert "another actor is called actor-9" in first.next(Refused)[0].reason
            assert len(intake.server.peers) == 1
            for ticket in tickets:
                second.send(group_of(ticket))
            assert indices([intake.source.take(DEADLINE_S)]) == [0, 1, 2, 3]
            assert intake.server.totals.restarted == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"pause_s": math.nan}, "figures"),
        ({"busy_s": math.inf}, "figures"),
        ({"phase_s": -1.0}, "figures"),
        ({"version": 2}, "serves version 2, this run has announced 1"),
        ({"version": -1}, "serves version -1"),
        ({"held": tuple(TicketId(0, n) for n in range(10_001))}, "10001 tickets listed, allowed: 10000"),
    ],
)
def test_heartbeat_that_cannot_be_true_is_counted_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], fault: str
) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        tickets = leased(intake, puppet, 4)
        sound = Heartbeat(tuple(t.id for t in tickets), (), 4, 1, "serving", 0.0, swaps=5, pause_s=0.5)
        puppet.send(msgspec.structs.replace(sound, **change))
        puppet.send(sound)
        puppet.next(Beat)
        assert intake.hub.faults.counts == {"malformed": 1}
        assert fault in caplog.text
        assert locked(intake, lambda: list(intake.server.swap_pauses)) == [0.5]
        assert all(peer.version == 1 for peer in intake.server.peers.values())


def test_actor_that_serves_what_this_run_never_announced_is_refused(tmp_path: Path) -> None:
    """It comes from another run, or from a run of this name that was begun anew."""
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        intake.publish(0)
        puppet.hello(version=3)
        assert puppet.next(Refused)[0].reason == "serves version 3, this run has announced 1"
        assert intake.server.peers == {}


def test_run_gives_up_with_the_cause_when_every_ticket_fails(tmp_path: Path) -> None:
    with Intake(tmp_path, max_attempts=1, steps=20) as intake, Puppet(intake.address) as puppet:
        (ticket, *_) = leased(intake, puppet, 1)
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(intake.source.take, DEADLINE_S)
            for _ in range(FATAL_TICKETS):
                puppet.send(Failed(ticket.id, 1, "ValueError: no such grader" + "!" * 10_000))
                (ticket,) = [t for t in puppet.tickets if t.id.index == ticket.id.index + 1] or puppet.next(Ticket)
            with pytest.raises(TicketsFail, match=r"8 tickets in a row failed .* actor-9: ValueError: no such grader!"):
                taking.result(DEADLINE_S)
        assert all(len(why) < 2_100 for why in intake.dispatcher.train.failed.values())
    failed = dict(read_failed(intake.journal.path))
    assert [ticket_id.index for ticket_id in failed] == list(range(FATAL_TICKETS)), "a replay must know of them"


def test_deadline_of_a_wait_starts_again_with_each_group(tmp_path: Path) -> None:
    """40 problems at two at a time take 20 x as long as one, and no deadline passes that one keeps."""
    with Intake(tmp_path, token_s=0.01) as intake, ActorThread(intake.address):
        version = intake.publish(0)
        intake.source.wait_for_actor(version, DEADLINE_S)
        began = time.monotonic()
        groups, failed = intake.source.evaluate([eval_ticket(i, version) for i in range(300)], 1.0)
        assert (len(groups), failed) == (300, {})
        assert time.monotonic() - began > 1.0, "otherwise this shows nothing"


def test_report_of_a_wait_is_made_outside_the_lock(tmp_path: Path) -> None:
    """It writes a file; heartbeats are answered meanwhile."""
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        leased(intake, puppet, 1)
        answered: list[bool] = []

        def slow_disk(what: str, waited: float) -> None:
            puppet.beat()
            puppet.next(Beat)
            answered.append(True)
            intake.stop_requested.set()

        intake.source.report = slow_disk
        with pytest.raises(Interrupted):
            intake.source.take(DEADLINE_S)
        assert answered == [True]


# --- a learner that comes back ---


def test_learner_restarted_on_the_same_port_loses_nothing_and_trains_nothing_twice(tmp_path: Path) -> None:
    first = Intake(tmp_path, steps=6, token_s=0.005)
    port = int(first.address.rpartition(":")[2])
    with ActorThread(first.address, "actor-0") as one, ActorThread(first.address, "actor-1") as two:
        with first:
            first.publish(0)
            surviving = train(first, 2)
            with first.server.lock:  # the checkpoint after step 2
                state, offset = first.dispatcher.state(), first.source.replay_offset()
            lost_steps = train(first, 4)
            kept = {group.id.index: group for group in read_groups(tmp_path / "groups.journal", offset)}
        # killed here: steps 3 and 4 are lost, groups are under way, the actors keep running
        second = Intake(tmp_path, steps=6, token_s=0.005, port=port, version=first.version)
        version = second.version + 1
        second.dispatcher.restore(state, read_groups(tmp_path / "groups.journal", offset), version)
        with second:
            second.publish(2)
            batches = train(second, 6)
            assert indices(surviving + batches) == list(range(24))
            assert indices(lost_steps) == indices(batches)[:8]
            for group in batches[0]:
                assert group == kept[group.id.index], "taken from the journal, not generated again"
            counts = second.dispatcher.counts()
            assert counts["issued"] == counts["trained"] == 24
            journaled = Counter(group.id.index for group in read_groups(tmp_path / "groups.journal"))
            assert set(journaled) == set(range(24))
            assert second.server.totals.failures == []
            assert one.alive and two.alive
            assert {peer.name for peer in second.server.peers.values()} == {"actor-0", "actor-1"}
            for actor in (one, two):
                until(lambda actor=actor: actor.engine.version == second.version, "the newest version")
                numbers = [number for number, _ in actor.engine.loaded]
                assert all(before < after for before, after in pairwise(numbers))


def test_second_crash_costs_no_group_that_the_first_resume_had_not_reached(tmp_path: Path) -> None:
    """Killed, resumed, and killed again after a checkpoint in between: what waits for its step stays in the journal."""
    journal = Journal(tmp_path / "groups.journal")
    offsets = [journal.append_group(group_of(make_ticket(index))) for index in range(6)]
    journal.close()
    fresh = Intake(tmp_path, groups_per_step=2, max_lag=0, version=1)
    state = fresh.dispatcher.state()
    fresh.hub.close()
    fresh.journal.close()
    resumed = Intake(tmp_path, groups_per_step=2, max_lag=0, version=1)
    found = list(read_groups_with_offsets(tmp_path / "groups.journal", 0))
    kept = resumed.dispatcher.restore(state, [group for _, group in found], 2)
    assert kept == [0, 1, 2, 3, 4, 5]
    resumed.server.offsets = {group.id.index: offset for offset, group in found}
    with resumed, Puppet(resumed.address) as puppet:
        resumed.publish(0)
        puppet.hello(version=2)
        resumed.source.resume_training()
        assert indices([resumed.source.take(DEADLINE_S)]) == [0, 1]
        resumed.source.commit(1, resumed.publish(1))
        assert resumed.source.replay_offset() == offsets[2]


def test_group_that_was_not_acknowledged_is_sent_again_to_the_restarted_learner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Intake(tmp_path, steps=1, groups_per_step=1, max_lag=0)
    port = int(first.address.rpartition(":")[2])
    engine = FakeEngine()
    with ActorThread(first.address, engine=engine) as actor:
        with first:
            monkeypatch.setattr(first.server, "_group", lambda peer, group: None)  # killed before it could journal
            first.publish(0)
            first.source.wait_for_actor(1, DEADLINE_S)
            first.source.resume_training()
            until(lambda: actor.loop.unacked, "a group")
            state = locked(first, first.dispatcher.state)
        second = Intake(tmp_path, steps=1, groups_per_step=1, max_lag=0, port=port, version=1)
        second.dispatcher.restore(state, journal_of(tmp_path), second.version)
        with second:
            second.source.resume_training()
            assert indices(train(second, 1)) == [0]
            until(lambda: not actor.loop.unacked, "the acknowledgement")
        assert [group.id for group in journal_of(tmp_path)] == [FIRST]
    assert len(engine.started) == GROUP_SIZE, "it was sent again, not generated again"


def test_actor_says_hello_once_for_many_frames_that_a_restarted_learner_does_not_know(tmp_path: Path) -> None:
    first = Intake(tmp_path, heartbeat_s=0.02)
    port = int(first.address.rpartition(":")[2])
    with ActorThread(first.address) as actor:
        with first:
            first.publish(0)
            first.source.wait_for_actor(1, DEADLINE_S)
        silent_since = actor.loop.phase_since
        until(lambda: actor.loop._heartbeat().phase_s > 0.5 or silent_since != actor.loop.phase_since, "silence")
        second = Intake(tmp_path, heartbeat_s=0.5, dead_after_s=5, port=port, version=1)
        hellos: list[bytes] = []
        receive = second.server._receive

        def counted(peer: bytes, message: Any, now: float) -> None:
            hellos.extend([peer] if isinstance(message, Hello) else [])
            receive(peer, message, now)

        second.server._receive = counted  # type: ignore[method-assign]
        with second:
            second.publish(0)
            batches = train(second, 2)
            assert indices(batches) == list(range(8))
            assert 1 <= len(hellos) <= 5


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"prompt_ids": (9,)}, "another prompt"),
        ({"temperature": 0.7}, "temperature 0.7, expected 1.0"),
        ({"completions": ()}, "0 completions, expected 2"),
        ({"kind": "eval"}, "kind eval, expected train"),
        ({"token_ids": np.array([1, -5], "<i4").tobytes()}, "token ids -5..1, expected 0..9"),
        ({"token_ids": np.array([1, 10], "<i4").tobytes()}, "token ids 1..10, expected 0..9"),
        ({"logprobs": np.array([np.nan, -1], "<f4").tobytes()}, "logprobs nan..nan, expected finite ones of at most 0"),
        ({"logprobs": np.array([0.5, -1], "<f4").tobytes()}, "logprobs -1.0..0.5, expected finite ones of at most 0"),
    ],
)
def test_unlike_names_what_in_a_group_does_not_answer_its_ticket(changes: dict[str, Any], fault: str) -> None:
    ticket = make_ticket(3)
    assert unlike(msgspec.structs.replace(group_of(ticket), **changes), ticket, 10, {1: 0}.get, 0) == fault


@pytest.mark.parametrize(("version", "sound"), [(3, False), (4, True), (5, True), (6, True), (7, False), (999, False)])
def test_unlike_refuses_tokens_of_versions_that_are_too_old_or_were_never_announced(version: int, sound: bool) -> None:
    """Tokens may be of step 2 or later; versions 4 and 5 are of that step, version 7 was lost in a crash."""
    ticket = msgspec.structs.replace(make_ticket(3), min_version=5)
    fault = unlike(group_of(ticket, version=version), ticket, 10, {3: 1, 4: 2, 5: 2, 6: 3}.get, 2)
    assert fault == ("" if sound else f"tokens of version {version}, expected announced ones of step 2 or later")
    evaluated = msgspec.structs.replace(ticket, kind="eval", id=TicketId(-5, 0))
    assert (unlike(group_of(evaluated, version=version), evaluated, 10, {4: 2, 5: 2, 6: 3}.get, 0) == "") == (
        version == 5
    )


def test_unlike_refuses_completions_longer_than_the_ticket_allows() -> None:
    ticket = make_ticket(3)
    shorter = msgspec.structs.replace(ticket, sampling=Sampling(max_tokens=0))
    assert "expected at most 0" in unlike(group_of(ticket), shorter, 10, {1: 0}.get, 0)
