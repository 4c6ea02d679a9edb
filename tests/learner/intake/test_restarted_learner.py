"""A learner that comes back: actors find it again, nothing is lost, nothing is trained on twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from actor.fake_engine import FakeEngine
from learner.intake.journal import Journal, read_groups, read_groups_with_offsets
from learner.intake.server import ActorsSeen
from protocol.messages import (
    Hello,
    Refused,
    TicketId,
    Welcome,
)
from tests.actor_harness import DEADLINE_S, ActorThread, Puppet, begin, indices, train, until
from tests.intake_harness import GROUP_SIZE, Intake, group_of, journal_of, locked, make_ticket

FIRST, SECOND = TicketId(0, 0), TicketId(0, 1)


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
            until(
                lambda: {peer.name for peer in second.server.peers.values()} == {"actor-0", "actor-1"},
                "both to be back",
            )
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
            begin(first)
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


def test_zombie_does_not_displace_its_successor_at_a_restarted_learner(tmp_path: Path) -> None:
    """Who was replaced is known from the checkpoint: the last hello would win otherwise, and the successor give up."""
    with Intake(tmp_path) as first:
        with Puppet(first.address, incarnation="old") as zombie, Puppet(first.address, incarnation="new") as successor:
            for puppet in (zombie, successor):
                puppet.hello(version=0)
                puppet.next(Welcome)
        state = locked(first, first.dispatcher.state)
        known = json.loads(json.dumps(asdict(first.server.known)))
    second = Intake(tmp_path, version=1)
    second.dispatcher.restore(state, [], 2)
    second.server.known = ActorsSeen(**known)
    with second:
        for before in ("", "new"):
            with Puppet(second.address, incarnation="old") as zombie:
                zombie.hello(version=0)
                assert "joined later" in zombie.next(Refused)[0].reason, f"after {before}"
            with Puppet(second.address, incarnation="new") as successor:
                successor.hello(version=0)
                successor.next(Welcome)
        assert second.server.totals.restarted == 0
