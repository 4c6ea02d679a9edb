"""The intake on real sockets with whole actors: every ticket trained exactly once, whatever happens to the actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from actor.fake_engine import EOS, FakeEngine, completion_length, draw
from actor.rollout import completion_seed
from learner.intake.journal import read_groups, read_steps
from protocol.messages import (
    Drain,
    Failed,
    Group,
    Ticket,
    Welcome,
)
from tests.actor_harness import DEADLINE_S, ActorThread, Puppet, begin, indices, train, until
from tests.intake_harness import GROUP_SIZE, Intake, bury, eval_ticket, group_of, locked, make_ticket


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
        begin(intake)
        until(lambda: locked(intake, intake.dispatcher.holders), "leases")
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
        Intake(tmp_path) as intake,
        ActorThread(intake.address, "actor-0", FakeEngine(token_s=60)) as doomed,
    ):
        begin(intake)
        until(lambda: len(intake.dispatcher.leases_of("actor-0")) >= 4, "leases")
        doomed.die()
        lost = len(locked(intake, lambda: intake.dispatcher.leases_of("actor-0")))
        until(lambda: bury(intake, {doomed.loop.incarnation}), "a funeral")
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
        begin(intake)
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


def test_whole_run_outlives_a_straggling_actor(tmp_path: Path) -> None:
    with (
        Intake(tmp_path, straggler_s=0.5) as intake,
        ActorThread(intake.address, "actor-0", FakeEngine(token_s=60)) as slow,
    ):
        begin(intake)
        until(lambda: slow.engine.started, "work at the slow actor")
        with ActorThread(intake.address, "actor-1"):
            until(lambda: len([p for p in intake.server.peers.values() if p.version]) == 2, "both actors to serve")
            slow.engine.token_s = 0.0  # only what it began stays slow
            batches = train(intake, 4)
        assert_trained_exactly_once(intake, batches, 16)
        assert len(slow.engine.aborted) >= GROUP_SIZE, "its engine was told to stop"
        assert intake.dispatcher.counts()["reissued"] > 0
