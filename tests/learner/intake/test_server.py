"""The intake with one actor, frame by frame, and the learner's waits, on real sockets."""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from actor.fake_engine import FakeEngine
from learner.intake.journal import read_failed
from learner.intake.probes import Probes
from learner.intake.server import FATAL_FAILURES
from learner.intake.source import FATAL_TICKETS, Interrupted, TicketsFail
from protocol.errors import DeadlineExceeded, EngineFailed
from protocol.messages import (
    Ack,
    Beat,
    Cancel,
    Failed,
    Group,
    Heartbeat,
    Hello,
    Message,
    Probe,
    Probed,
    Refused,
    Rehello,
    Ticket,
    TicketId,
    UpdateRequest,
    Welcome,
)
from protocol.sections import WireConfig
from tests.actor_harness import DEADLINE_S, ActorThread, Puppet, indices, train, until
from tests.intake_harness import Intake, bury, eval_ticket, group_of, journal_of, locked, make_ticket

FIRST, SECOND = TicketId(0, 0), TicketId(0, 1)
NO_TIME_S = 1e-9
"""Between heartbeats, for an intake that thinks every lease old."""


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
        assert set(puppet.acknowledged(4)) == {t.id for t in tickets}
        assert on_disk == [True] * 4


def test_groups_of_a_turn_are_acknowledged_after_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also towards a heartbeat that lists one of them in the same turn."""
    intake = Intake(tmp_path)
    server, sent, synced = intake.server, list[Message](), list[int]()
    monkeypatch.setattr(intake.hub, "send", lambda peer, message: sent.append(message) or True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    intake.journal.fsync = True
    server.reserved(0, 1)
    intake.dispatcher.training_enabled = True
    server._receive(b"p", Hello("a", "i", slots=3, version=1), 0.0)
    server._hand_out(0.0)
    tickets = [message for message in sent if isinstance(message, Ticket)]
    for ticket in tickets:
        server._receive(b"p", group_of(ticket), 1.0)
    server._receive(b"p", Heartbeat((), (tickets[0].id,), 0, 1, "serving", 0.0), 1.0)
    assert (synced, [message for message in sent if isinstance(message, Ack)]) == ([], [])
    server._acknowledge()
    assert synced == [intake.journal.end]
    assert [message for message in sent if isinstance(message, Ack)] == [Ack(tuple(t.id for t in tickets))]
    assert len(tickets) == 3
    server._acknowledge()
    assert len(synced) == 1, "nothing new"
    intake.hub.close()
    intake.journal.close()


def test_group_is_not_acknowledged_when_the_journal_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake = Intake(tmp_path)
    intake.server.start()
    with Puppet(intake.address) as puppet:
        (ticket, *_) = leased(intake, puppet, 1)

        def full(group: Group, frames: Any) -> int:
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
        assert puppet.acknowledged(3) == [FIRST] * 3
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
        puppet.send(UpdateRequest())  # on the wrong socket
        puppet.next(Ticket)
        puppet.settle()
        assert intake.hub.faults.counts["malformed"] == 1


def test_lease_is_issued_again_after_two_beats_that_do_not_list_it(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, heartbeat_s=10) as intake,
        Puppet(intake.address, "actor-1", slots=2) as forgetful,
        Puppet(intake.address, "actor-2", slots=0) as other,
    ):
        first, second = leased(intake, forgetful, 2)
        forgetful.settle()
        forgetful.settle()
        forgetful.settle()
        assert len(forgetful.tickets) == 2, "tickets may have crossed with these heartbeats"
        with intake.server.lock:  # a heartbeat is answered before its list is read
            assert set(intake.dispatcher.leases_of("actor-1")) == {first.id, second.id}
            intake.server.wire = WireConfig(heartbeat_s=NO_TIME_S, dead_after_s=60.0)
        issued_before = time.monotonic()
        until(lambda: intake.hub.emptied_at > issued_before, "a turn after that of the tickets")
        forgetful.beat((second.id,))
        forgetful.next(Beat)
        with intake.server.lock:
            leases = intake.dispatcher.train.leases_of("actor-1")
            assert {ticket_id: lease.ticket.attempt for ticket_id, lease in leases.items()} == {
                first.id: 1,
                second.id: 1,
            }
        forgetful.beat((second.id,))
        (again,) = forgetful.next(Ticket)
        assert (again.id, again.attempt) == (first.id, 2)
        assert intake.dispatcher.counts()["reissued"] == 1
        assert other.tickets == []


@pytest.mark.parametrize(
    ("emptied_at", "now", "reissued"),
    [
        (102.5, 108.0, False),  # the heartbeat may have been sent when the ticket was under way
        (103.5, 108.0, True),
        (0.0, 112.0, False),
        (0.0, 114.0, True),  # no message waits for longer than an actor may be silent
    ],
)
def test_lease_is_not_taken_back_by_heartbeats_that_waited_in_the_hubs_queue(
    tmp_path: Path, emptied_at: float, now: float, reissued: bool
) -> None:
    intake = Intake(tmp_path, heartbeat_s=3.0, dead_after_s=10.0)
    intake.server.reserved(0, 1)
    intake.dispatcher.training_enabled = True
    assert intake.dispatcher.issue("a", 1, 100.0) is not None
    intake.hub.emptied_at = emptied_at
    for _ in range(2):
        intake.server._compare(b"p", "a", Heartbeat((), (), 0, 1, "serving", 0.0), now)
    assert len(intake.dispatcher.leases_of("a")) == (not reissued)
    intake.hub.close()
    intake.journal.close()


def test_connection_that_takes_another_name_is_one_actor(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address, "actor-1") as puppet:
        for name in ("actor-1", "actor-2", "actor-1"):
            puppet.name = name
            puppet.hello(version=0)
            puppet.next(Welcome)
            assert [peer.name for peer in intake.server.peers.values()] == [*intake.server._named] == [name]
        puppet.goodbye()
        until(lambda: not intake.server.peers, "the goodbye")


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


def test_silent_actor_is_buried_and_its_late_group_still_counts_once(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, groups_per_step=1, max_lag=0, steps=1) as intake,
        Puppet(intake.address, "actor-1", slots=1) as silent,
    ):
        (ticket,) = leased(intake, silent, 1)
        until(lambda: bury(intake, {silent.incarnation}), "the funeral")
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
    with Intake(tmp_path, dead_after_s=2.0) as intake, ActorThread(intake.address, engine=FakeEngine(token_s=0.8)):
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
        ({"serving_s": -1.0}, "figures"),
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
        groups, failed = intake.source.evaluate([eval_ticket(i, version) for i in range(300)], 2.0)
        assert (len(groups), failed) == (300, {})
        assert time.monotonic() - began > 2.0, "otherwise this shows nothing"


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


# --- probes of the weights ---


def probing(tmp_path: Path) -> Intake:
    intake = Intake(tmp_path)
    intake.server.probes = Probes(2, 0, 1000, 64)
    return intake


def answer(probe: Probe, token: int = 7) -> Probed:
    count = 2 * len(probe.prompts)
    return Probed(
        probe.version, (2,) * len(probe.prompts), "", np.full(count, token, "<i4").tobytes(),
        np.full(count, -1, "<f4").tobytes(),
    )  # fmt: skip


def test_actor_that_confirms_its_first_version_is_probed_and_its_answer_kept(tmp_path: Path) -> None:
    with probing(tmp_path) as intake, Puppet(intake.address) as puppet:
        leased(intake, puppet, 1)
        puppet.beat()
        (probe,) = puppet.next(Probe)
        assert probe.version == 1
        assert not intake.source.wait_for_probe(0.01)
        puppet.send(answer(probe))
        assert intake.source.wait_for_probe(DEADLINE_S)
        (result,) = intake.server.probes.results
        assert (result.actor, result.probe, result.probed) == ("actor-9", probe, answer(probe))
        assert result.snapshot.manifest.version == 1
        puppet.settle()
        assert [type(message) for message in puppet.received].count(Probe) == 1


def test_answer_that_nobody_asked_for_is_counted_and_dropped(tmp_path: Path) -> None:
    with probing(tmp_path) as intake, Puppet(intake.address) as puppet:
        leased(intake, puppet, 1)
        puppet.beat()
        (probe,) = puppet.next(Probe)
        puppet.send(answer(probe, token=1000))
        puppet.send(answer(msgspec.structs.replace(probe, version=2)))
        puppet.settle()
        assert intake.hub.faults.counts["stray probe"] == 2
        assert not intake.server.probes.results


def test_actor_that_left_is_not_waited_for_with_a_snapshot(tmp_path: Path) -> None:
    with probing(tmp_path) as intake, Puppet(intake.address) as puppet:
        leased(intake, puppet, 1)
        puppet.beat()
        puppet.next(Probe)
        assert intake.server.probes._pending
        puppet.goodbye()
        until(lambda: not intake.server.peers, "the goodbye")
        assert not intake.server.probes._pending


def test_actor_killed_before_its_answer_keeps_nobody_from_being_probed(tmp_path: Path) -> None:
    """Its next incarnation is there long before its silence is noticed."""
    with probing(tmp_path) as intake, Puppet(intake.address) as puppet:
        leased(intake, puppet, 1)
        puppet.beat()
        puppet.next(Probe)
        intake.publish(1)
        puppet.incarnation = "p2"
        puppet.connect()
        puppet.hello(version=0)
        puppet.next(Welcome)
        puppet.beat(version=2)
        (probe,) = puppet.next(Probe)
        assert probe.version == 2


def test_run_without_probes_waits_for_none(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake:
        assert intake.source.wait_for_probe(0.01)


def test_actors_count_for_the_time_in_which_they_serve(tmp_path: Path) -> None:
    def served() -> tuple[float, float]:
        return locked(intake, lambda: (intake.server.totals.serving_actor_s, intake.server.totals.served_s))

    with (
        Intake(tmp_path) as intake,
        Puppet(intake.address, "actor-1") as one,
        Puppet(intake.address, "actor-2") as two,
    ):
        intake.publish(0)
        one.hello(version=0)
        one.beat(version=0)
        one.next(Beat)
        assert served() == (0.0, 0.0), "connected, and no version yet"
        one.hello()
        until(lambda: served()[1] > 0, "time in which it serves")
        actor_s, any_s = served()
        assert actor_s == any_s
        two.hello()
        two.next(Welcome)
        start = served()
        one.settle()
        until(lambda: served()[1] > start[1] + 0.05, "time in which both serve")
        both = [after - before for after, before in zip(served(), start, strict=True)]
        assert both[0] == pytest.approx(2 * both[1])
        one.goodbye()
        until(lambda: len(intake.server.peers) == 1, "the goodbye")
        start = served()
        until(lambda: served()[1] > start[1] + 0.05, "time in which one serves")
        alone = [after - before for after, before in zip(served(), start, strict=True)]
        assert alone[0] == pytest.approx(alone[1])
