"""Surplus actors are sent home and nothing is lost by it; where nobody can come, no deadline passes. Real sockets."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from actor.fake_engine import FakeEngine
from learner.intake.scaling import LOOK_S, ScaleWatch
from protocol.errors import DeadlineExceeded
from protocol.messages import Drain, Group, Message, Ticket, Welcome
from protocol.rundir import RunDir
from protocol.scaling import Member, Wish, actor_number, read_members, read_wish, write_members, write_wish
from tests.actor_harness import ActorThread, Puppet, begin, indices, train, until
from tests.intake_harness import Intake, bury, locked


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


def wish(run: RunDir, actors: int) -> None:
    write_wish(run, Wish(actors, "the test"))


def settled(intake: Intake, actors: int) -> None:
    """Wait until the intake has read that wish."""
    until(lambda: intake.server.scale.wanted == actors, f"a wish of {actors}")


@pytest.mark.parametrize(
    ("name", "number"),
    [("actor-0", 0), ("actor-12", 12), ("actor-", None), ("actor--1", None), ("node-7-123", None), ("actor-٣", None)],
)
def test_actor_number_is_of_the_launchers_own_names(name: str, number: int | None) -> None:
    assert actor_number(name) == number


def test_wish_and_members_are_read_as_they_were_written(run: RunDir) -> None:
    assert read_wish(run) is None
    assert read_members(run) == []
    wish(run, 3)
    members = [Member("actor-0", "running", "10.0.0.1", phase="serving"), Member("actor-1", "pending", why="no room")]
    write_members(run, members)
    assert read_wish(run) == Wish(3, "the test")
    assert read_members(run) == members
    assert [member.serves for member in members] == [True, False]


def test_scale_watch_keeps_the_last_wish_while_the_file_is_no_wish(run: RunDir) -> None:
    watch = ScaleWatch(run)
    for text in ("{", "[1]", '{"actors": "many", "by": "x"}'):
        wish(run, 2)
        watch.look(watch._looked + LOOK_S)
        run.scale.write_text(text)
        watch.look(watch._looked + LOOK_S)
        assert watch.wanted == 2, text


def test_order_sends_the_surplus_home_and_becomes_stricter_once(run: RunDir) -> None:
    watch = ScaleWatch(run, drain_s=5.0)
    assert watch.order("actor-7", None, 0.0) is None, "nobody has wished anything"
    wish(run, 1)
    watch.look(LOOK_S)
    assert watch.order("actor-0", None, 0.0) is None
    assert watch.order("by-hand", None, 0.0) is None
    first = watch.order("actor-1", None, 0.0)
    assert first == Drain("scaled down to 1 actors", finish=True)
    assert watch.order("actor-1", first, 5.0) == first
    second = watch.order("actor-1", first, 5.1)
    assert second == Drain("scaled down to 1 actors, and not done after 5 s", finish=False)
    assert watch.order("actor-1", second, 1000.0) == second


def test_surplus_actor_finishes_what_it_holds_and_gets_nothing_new(run: RunDir, tmp_path: Path) -> None:
    with Intake(tmp_path, scale=ScaleWatch(run)) as intake, Puppet(intake.address, "actor-1", slots=2) as puppet:
        intake.publish(0)
        puppet.hello()
        until(lambda: intake.server.peers, "the puppet")
        intake.source.resume_training()
        held = puppet.next(Ticket, 2)
        wish(run, 1)
        assert puppet.next(Drain)[0].finish
        puppet.settle(held=(held[0].id,), unacked=())
        assert len(puppet.tickets) == 2, "it has a free slot, and gets no ticket"
        puppet.goodbye()
        until(lambda: not intake.server.peers, "its goodbye")
        assert locked(intake, lambda: intake.dispatcher.counts())["leased"] == 2
        assert not locked(intake, intake.dispatcher.holders), "its tickets wait for somebody else"
        assert locked(intake, lambda: intake.dispatcher.train.failed) == {}


def test_surplus_actor_that_is_not_done_in_time_drops_its_tickets(run: RunDir, tmp_path: Path) -> None:
    """An engine that takes an hour for each token: only the deadline ends it."""
    with Intake(tmp_path, token_s=3600.0, scale=ScaleWatch(run, drain_s=0.5)) as intake:
        wish(run, 1)
        with ActorThread(intake.address, "actor-0") as actor:
            begin(intake)
            until(lambda: actor.loop.held, "a ticket")
            wish(run, 0)
            actor.join()
            assert actor.reason == "scaled down to 0 actors, and not done after 0.5 s"
        until(lambda: not locked(intake, intake.dispatcher.holders), "its goodbye")


def train_until_it_works(intake: Intake, actor: ActorThread) -> list[list[Group]]:
    """Steps until an actor has drawn something."""
    batches = []
    while not actor.loop.generated_tokens:
        assert intake.dispatcher.step < intake.dispatcher.steps, "it never gets a ticket"
        batches += train(intake, intake.dispatcher.step + 1)
    return batches


def test_run_scaled_up_and_down_trains_on_all_tickets_in_order(run: RunDir, tmp_path: Path) -> None:
    wish(run, 1)
    scale = ScaleWatch(run)
    with Intake(tmp_path, steps=500, token_s=0.002, scale=scale) as intake, ActorThread(intake.address) as first:
        begin(intake)
        batches = train(intake, 2)
        wish(run, 2)
        settled(intake, 2)
        with ActorThread(intake.address, "actor-1") as second:
            batches += train_until_it_works(intake, second)
            wish(run, 1)
            second.join()
            assert second.reason == "scaled down to 1 actors"
        batches += train(intake, intake.dispatcher.step + 1)
        wish(run, 0)
        first.join()
        wish(run, 1)
        settled(intake, 1)
        with ActorThread(intake.address, "actor-0") as again:
            batches += train_until_it_works(intake, again)
        trained = intake.dispatcher.step * intake.dispatcher.groups_per_step
        assert indices(batches) == list(range(trained))
        counts = locked(intake, intake.dispatcher.counts)
        assert counts["trained"] == trained
        assert (counts["failed"], counts["dropped"]) == (0, 0)
        assert intake.server.totals.started == 3
        assert intake.server.totals.restarted == 0, "who was sent home was not restarted"


def test_actor_beyond_the_wish_is_sent_home_when_it_says_hello(run: RunDir, tmp_path: Path) -> None:
    """A zombie: Ray believes it dead, it has only just come back to the network."""
    wish(run, 1)
    with Intake(tmp_path, scale=ScaleWatch(run)) as intake:
        settled(intake, 1)
        with ActorThread(intake.address, "actor-1") as zombie:
            zombie.join()
            assert zombie.reason == "scaled down to 1 actors"
            assert zombie.loop.generated_tokens == 0


def test_actor_that_was_sent_home_is_not_called_back_by_saying_hello(run: RunDir, tmp_path: Path) -> None:
    with Intake(tmp_path, scale=ScaleWatch(run)) as intake, Puppet(intake.address, "actor-1") as puppet:
        intake.publish(0)
        puppet.hello()
        until(lambda: intake.server.peers, "the puppet")
        wish(run, 1)
        puppet.next(Drain)
        wish(run, 2)
        settled(intake, 2)
        puppet.connect()  # a new connection of the same process
        puppet.hello()
        intake.source.resume_training()
        puppet.settle()
        assert puppet.tickets == []


def test_wait_without_wanted_actors_has_no_deadline_and_says_why(run: RunDir, tmp_path: Path) -> None:
    wish(run, 0)
    said: list[str] = []
    with Intake(tmp_path, scale=ScaleWatch(run)) as intake:
        settled(intake, 0)
        intake.source.report = lambda what, waited: said.append(what)
        intake.publish(0)
        intake.source.should_stop = lambda: bool(said)  # type: ignore[assignment]
        with pytest.raises(Exception, match="no actor is wanted; `tandem scale N` brings some"):
            intake.source.wait_for_actor(1, timeout_s=0.2)
        assert "no actor is wanted" in said[-1]
        intake.source.should_stop = lambda: False  # type: ignore[assignment]
        wish(run, 1)
        settled(intake, 1)
        with pytest.raises(DeadlineExceeded, match="no actor is connected"):
            intake.source.wait_for_actor(1, timeout_s=0.2)


def test_wait_for_actors_that_are_pending_has_no_deadline(run: RunDir, tmp_path: Path) -> None:
    wish(run, 2)
    pending = Member("actor-0", "pending", why="it needs 1 GPU")
    write_members(run, [pending])
    with Intake(tmp_path, scale=ScaleWatch(run)) as intake:
        settled(intake, 2)
        intake.publish(0)
        began = time.monotonic()
        intake.source.should_stop = lambda: time.monotonic() - began > 1.0  # type: ignore[assignment]
        with pytest.raises(Exception, match="actor-0 is pending: it needs 1 GPU"):
            intake.source.wait_for_actor(1, timeout_s=0.2)
        intake.source.should_stop = lambda: False  # type: ignore[assignment]
        write_members(run, [pending, Member("actor-1", "starting", "10.0.0.2")])
        with pytest.raises(DeadlineExceeded):
            intake.source.wait_for_actor(1, timeout_s=1.0)


def test_engine_of_a_drained_actor_serves_the_versions_that_its_tickets_need(run: RunDir, tmp_path: Path) -> None:
    """A ticket may ask for a version that comes only after the drain: it is still finished."""
    with Intake(tmp_path, max_lag=0, steps=2, scale=ScaleWatch(run)) as intake:
        engine = FakeEngine()
        wish(run, 1)
        with ActorThread(intake.address, "actor-0", engine) as actor:
            begin(intake)
            train(intake, 1)
            until(lambda: actor.loop.generated_tokens, "work")
            wish(run, 0)
            actor.join()
            assert actor.error is None


def test_actor_on_its_way_home_gets_nothing_from_a_learner_that_has_forgotten_that(run: RunDir, tmp_path: Path) -> None:
    """Buried or restarted in between, the learner does not know of the drain, and the wish has grown meanwhile."""
    wish(run, 1)
    with Intake(tmp_path, token_s=3600.0, scale=ScaleWatch(run)) as intake:
        sent: list[Message] = []
        send = intake.hub.send
        with ActorThread(intake.address, "actor-0") as actor:
            begin(intake)
            until(lambda: actor.loop.held, "a ticket")
            wish(run, 0)
            until(lambda: actor.loop.phase == "draining", "the drain")
            wish(run, 1)
            settled(intake, 1)
            intake.hub.send = lambda peer, message: sent.append(message) or send(peer, message)  # type: ignore[func-returns-value,method-assign]
            until(lambda: bury(intake, {actor.loop.incarnation}), "a funeral")
            actor.join()
            assert actor.reason == "scaled down to 0 actors"
        assert [type(message) for message in sent if isinstance(message, (Welcome, Ticket))] == [Welcome]
        until(lambda: not locked(intake, intake.dispatcher.holders), "its goodbye")
