"""Histories of joins, drains, deaths, zombies, duplicates and restarts, on real sockets with whole actors: tickets are
first issued in the order 0, 1, 2, … and trained in it, whatever the actors do.

A zombie is an actor that the cluster believes dead and that still answers. Silence is made and not waited for: a dead
actor is buried by setting back when it was last heard.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import actor.loop
from actor.loop import LearnerRefused
from learner.intake import scaling
from learner.intake.journal import KINDS, _records, read_groups_with_offsets
from protocol import codec
from protocol.messages import Ack, Beat, Group, Hello, Refused, Rehello, Ticket, TicketId, Welcome
from protocol.rundir import RunDir
from protocol.scaling import SCALED_DOWN, Wish, actor_name, actor_number, write_wish
from tests.actor_harness import DEADLINE_S, Puppet, until
from tests.history_harness import Actor, GraderInProcess, HonestPuppet, Watch
from tests.intake_harness import RUN, Intake, bury, eval_ticket, group_of, locked, make_ticket

STEPS = 12
MOST_ACTORS = 4
FOR_EVER_S = 3600.0
"""Nobody is buried for being slow on a busy machine."""
ZOMBIE = "zombie"
"""Whom a group says that it is of when it was sent by one that had been replaced."""
RUNS = count()

which = st.integers(0, 5)
numbers = st.integers(0, 2)


def journaled(path: Path) -> list[Group]:
    """All groups on disk, repetitions included."""
    records = [payload for _, _, kind, payload in _records(path, 0) if KINDS[kind] == "group"]
    groups = [codec.decode_from_actor(codec.split_frames(payload)) for payload in records]
    return [group for group in groups if isinstance(group, Group)]


class Histories(RuleBasedStateMachine):
    """What the cluster, the network and the learner do to actors. Each rule ends with a handshake, and what a rule may
    choose from never hangs on time, so that a history can be repeated."""

    @initialize(
        groups_per_step=st.integers(1, 3), max_lag=st.integers(0, 2), wish=st.integers(1, 3), held=st.booleans()
    )
    def begin(self, groups_per_step: int, max_lag: int, wish: int, held: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(actor.loop, "GraderPool", GraderInProcess)
        self.patch.setattr(scaling, "LOOK_S", 0.0)
        self.threads_before = set(threading.enumerate())
        self.directory = tempfile.TemporaryDirectory()
        self.run = RunDir(Path(self.directory.name) / "run").create()
        self.shape: dict[str, Any] = {
            "steps": STEPS, "groups_per_step": groups_per_step, "max_lag": max_lag, "max_attempts": 1000,
            "dead_after_s": FOR_EVER_S, "straggler_s": FOR_EVER_S, "run": f"{next(RUNS)}-{RUN}",
        }  # fmt: skip
        self.watch = Watch()
        self.everybody: list[Actor] = []
        self.actors: list[Actor] = []
        """Those that take part, as far as anybody knows."""
        self.frozen: list[Actor] = []
        self.dead: list[Actor] = []
        """Those whose death the learner has not noticed."""
        self.leaving: list[Actor] = []
        """Sent home; they end when they have done what they hold."""
        self.puppets: dict[str, HonestPuppet] = {}
        self.zombies: list[HonestPuppet] = []
        self.names = count()
        self.trained: list[Group] = []
        self.step_of_version: dict[int, int] = {}
        self.surviving: dict[int, int] = {}
        """The same without versions of steps that were lost with a learner."""
        self.evaluated: set[int] = set()
        self.intake = self.new_intake()
        self.intake.server.start()
        self.publish(0)
        self.scale_to(wish)
        self.start_actor(actor_name(0), held, confirmed=True)
        self.checkpoint = self.state()
        self.intake.source.resume_training()

    # --- the learner ---

    def new_intake(self, **options: Any) -> Intake:
        watch = scaling.ScaleWatch(self.run, FOR_EVER_S)
        intake = Intake(Path(self.directory.name), scale=watch, **options, **self.shape)
        self.watch.attach(intake)
        return intake

    def publish(self, step: int) -> int:
        self.step_of_version[self.intake.version + 1] = self.surviving[self.intake.version + 1] = step
        return self.intake.publish(step)

    def state(self) -> tuple[Any, ...]:
        """What a checkpoint holds: of the tickets, of the journal, of actors."""
        server = self.intake.server
        tickets, offset = locked(self.intake, lambda: (server.dispatcher.state(), self.intake.source.replay_offset()))
        return tickets, offset, copy.deepcopy(server.known), len(self.trained)

    @precondition(lambda self: self.actors)
    @rule(save=st.booleans())
    def train(self, save: bool) -> None:
        """A step: take a batch, commit it, publish the next version."""
        if self.intake.dispatcher.step == STEPS:
            return
        self.bury(*self.dead, *(one for one in self.frozen if not one.sent_home))
        self.dead.clear()
        until(self.batch_is_there, "a batch")
        dispatcher, step = self.intake.dispatcher, self.intake.dispatcher.step
        batch = self.intake.source.take(DEADLINE_S)
        for version, _ in (span for group in batch for completion in group.completions for span in completion.spans):
            assert 0 <= step - self.step_of_version[version] <= dispatcher.max_lag
        self.trained += batch
        self.intake.source.commit(step + 1, self.publish(step + 1))
        if save:
            self.checkpoint = self.state()

    def batch_is_there(self) -> bool:
        """Whether it is; if not, whoever keeps it waiting works. If nobody works, all do."""
        dispatcher = self.intake.dispatcher
        ids, missing, holders = locked(
            self.intake, lambda: (dispatcher._oldest_ids(), dispatcher.missing(), dispatcher.holders())
        )
        waited_for = {holders.get(ticket_id) for ticket_id in missing}
        everybody_held = all(one.engine.held for one in self.actors)
        for one in (*self.actors, *self.leaving):
            one.engine.held &= not (everybody_held or one.name in waited_for)
        self.bury(*(one for one in self.frozen if one.name in waited_for))
        for puppet in self.puppets.values():
            puppet.confirm(self.intake.version if puppet.claim else 0)
            puppet.answer(missing)
        return len(ids) == dispatcher.groups_per_step and not missing

    @rule()
    def restart_learner(self) -> None:
        """Killed, and back at its last checkpoint. Silent ones that this does not name end here: of two incarnations of
        which it knows neither, the last to say hello takes part, and that may be the older one."""
        port, version = int(self.intake.address.rpartition(":")[2]), self.intake.version
        tickets, offset, known, trained = self.checkpoint
        for zombie in [one for one in self.zombies if one.incarnation not in known.replaced.get(one.name, ())]:
            self.zombies.remove(zombie)
            zombie.__exit__()
        for one in list(self.frozen):
            expected = known.replaced.get(one.name, ()) if self.successor(one) else known.incarnations.values()
            if one.incarnation not in expected:
                self.frozen.remove(one)
                self.kill(one)
        self.intake.__exit__()
        del self.trained[trained:]
        self.intake = self.new_intake(port=port, version=version)
        self.surviving = {old: step for old, step in self.surviving.items() if step <= tickets["step"]}
        found = list(read_groups_with_offsets(self.intake.journal.path, offset))
        kept = self.intake.dispatcher.restore(
            tickets, [group for _, group in found], version + 1, versions=self.surviving
        )
        offsets = {group.id.index: at for at, group in found}
        server = self.intake.server
        server.offsets = {index: offsets[index] for index in kept if self.intake.dispatcher.holds(index)}
        server.known = copy.deepcopy(known)
        server.start()
        self.publish(tickets["step"])
        self.intake.source.resume_training()
        self.dead.clear()
        for one in self.frozen:
            one.buried = True
        for one in self.actors:
            until(lambda one=one: one.incarnation in self.watch.welcomed, f"{one.name} at the new learner")
        for one in self.leaving:
            until(lambda one=one: one.incarnation in self.watch.welcomed or not one.alive, f"{one.name} at it, too")
        for puppet in self.puppets.values():
            puppet.introduce()

    @rule()
    def evaluate(self) -> None:
        """Two tickets beside training; the one before has to be over."""
        version, dispatcher = self.intake.version, self.intake.dispatcher
        finished = self.intake.source.finished_evaluation()
        assert finished is None or not finished[1]
        if version not in self.evaluated and not locked(self.intake, lambda: len(dispatcher.eval)):
            self.evaluated.add(version)
            self.intake.source.start_evaluation([eval_ticket(0, version), eval_ticket(1, version)], share=0.5)

    @rule(wanted=st.integers(0, 3))
    def scale_to(self, wanted: int) -> None:
        """Who is surplus is told so before this ends, and leaves as soon as it holds nothing."""
        write_wish(self.run, Wish(wanted, "the test"))
        server, dead = self.intake.server, {one.incarnation for one in self.dead}

        def told() -> bool:
            self.intake.hub.wake()
            with server.lock:
                living = [peer for peer in server.peers.values() if peer.hello.incarnation not in dead]
                surplus = [peer for peer in living if self.is_surplus(peer.name, wanted)]
                return server.scale.wanted == wanted and all(peer.drain for peer in surplus)

        until(told, f"a wish of {wanted}")
        self.wanted = wanted
        for one in self.frozen:
            one.sent_home |= not one.buried and self.is_surplus(one.name, wanted)
        for one in [one for one in self.actors if self.is_surplus(one.name, wanted)]:
            self.actors.remove(one)
            self.leave(one)

    @staticmethod
    def is_surplus(name: str, wanted: int) -> bool:
        number = actor_number(name)
        return number is not None and number >= wanted

    @precondition(lambda self: self.actors)
    @rule(which=which, frozen=st.booleans())
    def send_home_a_busy_one(self, which: int, frozen: bool) -> None:
        """It is held up while it finishes what it holds; with `frozen` it has nothing, and does not hear of it."""
        one = self.actors[which % len(self.actors)]
        number = actor_number(one.name)
        if number is None:
            return
        if frozen:
            self.freeze(self.actors.index(one), busy=False, buried=False)
        else:
            self.make_busy(one)
        self.scale_to(number)
        if frozen and self.actors:
            self.train(save=False)

    def make_busy(self, one: Actor) -> None:
        """It is held, and has been given some of the next tickets, if there are any."""
        if len(self.actors) == 1:
            self.join_by_hand(held=False, confirmed=True)
        one.engine.held = True
        self.train(save=False)
        beats = self.watch.beats[one.incarnation]
        until(lambda: self.watch.beats[one.incarnation] > beats + 2, f"{one.name}'s beats")

    def bury(self, *actors: Actor | HonestPuppet) -> None:
        """The learner finds that it has not heard of them for too long."""
        incarnations = {one.incarnation for one in actors}
        for one in actors:
            one.buried = True
        until(lambda: bury(self.intake, incarnations), "a funeral")

    # --- actors ---

    def start_actor(self, name: str, held: bool, confirmed: bool) -> Actor:
        """A new process of that name, whoever else has it; ends when the learner has let it in, or `confirmed`."""
        older = [one for one in (*self.actors, *self.leaving, *self.frozen, *self.dead) if one.name == name]
        leases = self.leases_of_puppets()
        one = Actor(self.intake.address, name, held)
        self.watch.engines[one.incarnation] = one.engine
        self.everybody.append(one)
        one.__enter__()
        until(lambda: one.incarnation in self.watch.welcomed, f"{name} to be let in")
        if confirmed and not self.is_surplus(name, self.wanted):
            until(lambda: one.engine.version and self.watch.beats[one.incarnation] > 1, f"{name} to serve")
        after, queued = self.leases_of_puppets(), locked(self.intake, lambda: set(self.intake.dispatcher.train.queued))
        taken = [i for i, lease in leases.items() if after.get(i) != lease and i not in queued]
        assert not taken, f"{name} disturbs those who have {taken}"
        for before in older:
            self.replaced(before)
        if self.is_surplus(name, self.wanted):
            self.leave(one)
            assert not one.loop.generated_tokens
        else:
            self.actors.append(one)
        return one

    def leases_of_puppets(self) -> dict[TicketId, tuple[str, int]]:
        """Of train tickets: who has them, at which attempt."""
        with self.intake.server.lock:
            leased = self.intake.dispatcher.train.leased
            return {
                i: (lease.actor, lease.ticket.attempt) for i, lease in leased.items() if lease.actor in self.puppets
            }

    def replaced(self, one: Actor) -> None:
        """It is refused, if it lives to hear it."""
        if one in self.dead:
            self.dead.remove(one)
        if one in self.frozen:
            one.buried = True
            return
        for living in (self.actors, self.leaving):
            if one in living:
                living.remove(one)
                self.refused(one)

    def refused(self, one: Actor) -> None:
        """It ends because it is told so, unless it has been told before that it is not needed."""
        one.join()
        if not (one.sent_home and one.reason.startswith(SCALED_DOWN)):
            assert isinstance(one.error, LearnerRefused), f"{one.name} ended: {one.reason} {one.error}"

    def leave(self, one: Actor) -> None:
        """It was sent home: it ends by itself, unless it is held up."""
        one.sent_home = True
        self.leaving.append(one)
        if not one.engine.held:
            self.see_off()

    @rule()
    def see_off(self) -> None:
        """Who was sent home finishes what it holds."""
        for one in self.leaving:
            one.engine.held = False
        while self.leaving:
            one = self.leaving.pop()
            one.join()
            assert (one.reason[: len(SCALED_DOWN)], one.error) == (SCALED_DOWN, None)

    def successor(self, one: Actor) -> Actor | None:
        later = self.everybody[self.everybody.index(one) + 1 :]
        return next((other for other in later if other.name == one.name), None)

    def kill(self, one: Actor) -> None:
        one.thaw()
        one.die()

    @precondition(lambda self: len(self.actors) < MOST_ACTORS)
    @rule(number=numbers, held=st.booleans(), confirmed=st.booleans())
    def join(self, number: int, held: bool, confirmed: bool) -> None:
        """Also beyond the wish, and in the place of one that is leaving, frozen or dead. A living one is left alone."""
        if actor_name(number) not in {one.name for one in self.actors}:
            self.start_actor(
                actor_name(number), held and not self.is_surplus(actor_name(number), self.wanted), confirmed
            )

    @precondition(lambda self: len(self.actors) < MOST_ACTORS)
    @rule(held=st.booleans(), confirmed=st.booleans())
    def join_by_hand(self, held: bool, confirmed: bool) -> None:
        self.start_actor(f"by-hand-{next(self.names)}", held, confirmed)

    @precondition(lambda self: self.actors)
    @rule(which=which, killed=st.booleans(), held=st.booleans())
    def restart(self, which: int, killed: bool, held: bool) -> None:
        """A new incarnation: of one that was killed, or that goes on working and is a zombie from now on."""
        one = self.actors[which % len(self.actors)]
        if killed:
            self.actors.remove(one)
            self.kill(one)
            self.dead.append(one)
        self.start_actor(one.name, held, confirmed=True)

    @precondition(lambda self: self.actors)
    @rule(which=which, noticed=st.booleans())
    def die(self, which: int, noticed: bool) -> None:
        one = self.actors.pop(which % len(self.actors))
        self.kill(one)
        if noticed:
            self.bury(one)
        else:
            self.dead.append(one)

    @precondition(lambda self: self.actors)
    @rule(which=which)
    def stop(self, which: int) -> None:
        """As SIGTERM: it says goodbye."""
        one = self.actors.pop(which % len(self.actors))
        one.cancel()
        one.join()

    @precondition(lambda self: self.actors)
    @rule(which=which, held=st.booleans())
    def hold(self, which: int, held: bool) -> None:
        """Its engine begins nothing, or goes on."""
        self.actors[which % len(self.actors)].engine.held = held

    @precondition(lambda self: self.actors)
    @rule(which=which, busy=st.booleans(), buried=st.booleans())
    def freeze(self, which: int, busy: bool, buried: bool) -> None:
        """It is silent from now on, with all that it holds."""
        one = self.actors[which % len(self.actors)]
        if busy:
            self.make_busy(one)
        self.actors.remove(one)
        newest = self.intake.version
        until(lambda: one.engine.version == newest, f"{one.name} to serve {newest}")
        until(lambda: one.loop.weights.swaps == len(one.engine.loaded), "its slot to be free")  # it would keep the lock
        one.freeze()
        self.frozen.append(one)
        if buried:
            self.bury(one)

    @precondition(lambda self: self.frozen)
    @rule(which=which, held=st.booleans())
    def thaw(self, which: int, held: bool) -> None:
        """It was only late, or it is a zombie: it sends what it has, for tickets that it has lost meanwhile."""
        one = self.frozen.pop(which % len(self.frozen))
        one.engine.held = held and not self.successor(one)
        beats = self.watch.beats[one.incarnation]
        one.thaw()
        if self.successor(one):
            self.refused(one)
        elif one.sent_home or self.is_surplus(one.name, self.wanted):
            self.leave(one)
        else:
            self.actors.append(one)
            until(lambda: self.watch.beats[one.incarnation] > beats + 2, f"{one.name} to be back")

    @rule()
    def heartbeats(self) -> None:
        beats = {one: self.watch.beats[one.incarnation] for one in self.actors}
        for one, before in beats.items():
            until(lambda one=one, before=before: self.watch.beats[one.incarnation] > before + 2, f"{one.name}'s beats")

    # --- puppets ---

    def puppet_of(self, number: int) -> HonestPuppet:
        """The puppet of a number, which joins if it is not there, and has confirmed no version then."""
        name = f"puppet-{number % 2}"
        if name not in self.puppets:
            puppet = self.puppets[name] = HonestPuppet(self.intake.address, name, f"p{next(self.names)}")
            puppet.__enter__()
            puppet.introduce()
            puppet.confirm(0)
            assert not puppet.open
        return self.puppets[name]

    @rule(number=numbers, answers=st.integers(0, 2))
    def puppet_works(self, number: int, answers: int) -> None:
        puppet = self.busy_puppet(number)
        puppet.answer(list(puppet.open)[:answers])

    def busy_puppet(self, number: int) -> HonestPuppet:
        """It serves the newest version, and has been given tickets of the next step, if there are any."""
        puppet = self.puppet_of(number)
        puppet.confirm(self.intake.version)
        if self.actors:
            self.train(save=False)
        for _ in range(2):  # what it is given for the first comes before the second's answer
            puppet.confirm(self.intake.version)
        return puppet

    @rule(number=numbers)
    def puppet_repeats_itself(self, number: int) -> None:
        """Groups that were acknowledged, and one that nobody asked for: all are acknowledged and dropped."""
        puppet = self.busy_puppet(number)
        puppet.answer(list(puppet.open)[:1])
        unasked = group_of(make_ticket(1000), puppet.name)
        groups = [group for group in puppet.answered if group.id.epoch == 0 and not self.is_open(group.id)]
        before = journaled(self.intake.journal.path)
        for group in (*groups, unasked):
            puppet.ask(group, Ack)
        after = journaled(self.intake.journal.path)
        assert [group.id for group in after[len(before) :] if group.actor == puppet.name] == []

    def is_open(self, ticket_id: TicketId) -> bool:
        """Whether a group for it would be taken: it may have been lost with a learner."""
        return locked(self.intake, lambda: self.intake.dispatcher.wanted(ticket_id)) is not None

    @rule(number=numbers)
    def puppet_goes(self, number: int) -> None:
        """Dead without a word; the next of this name is another incarnation."""
        if puppet := self.puppets.pop(f"puppet-{number % 2}", None):
            puppet.__exit__()
            self.bury(puppet)

    @rule(number=numbers)
    def puppet_is_replaced(self, number: int) -> None:
        """Its successor joins, and the old incarnation does not listen to what it is told."""
        zombie = self.busy_puppet(number)
        del self.puppets[zombie.name]
        self.zombies.append(zombie)
        self.puppet_of(number)
        self.zombies_speak()

    @rule()
    def zombies_speak(self) -> None:
        """They send groups for all that they have ever held, and knock again: they are turned away each time."""
        for zombie in self.zombies:
            tickets = [make_ticket(0), *zombie.open.values()]
            for ticket in tickets:
                group = group_of(ticket, ZOMBIE, self.intake.version)
                assert isinstance(zombie.ask(group, Rehello, Ack), Rehello)
            assert isinstance(zombie.ask(zombie.state(), Rehello, Beat), Rehello)
            hello = Hello(zombie.name, zombie.incarnation, 8, tuple(zombie.open), (), self.intake.version)
            assert isinstance(zombie.ask(hello, Refused, Welcome), Refused)

    # --- what holds at any time ---

    @invariant()
    def accounts(self) -> None:
        assert self.intake.server.crash is None
        with self.intake.server.lock:
            dispatcher = self.intake.dispatcher
            dispatcher.check()
            assert dispatcher.live() <= (dispatcher.max_lag + 1) * dispatcher.groups_per_step
        assert self.watch.faults == []
        assert [ticket_id.index for ticket_id in self.watch.issued] == list(range(len(self.watch.issued)))
        assert [group.id for group in self.trained] == [TicketId(0, index) for index in range(len(self.trained))]

    def teardown(self) -> None:
        if not hasattr(self, "patch"):
            return
        try:
            if sys.exc_info()[0] is None:  # the history went well so far
                self.finish()
        finally:
            self.close()

    def finish(self) -> None:
        """One healthy actor is enough to end the run from any state."""
        while self.frozen:
            self.thaw(0, held=False)
        self.start_actor("by-hand-last", held=False, confirmed=True)
        while self.intake.dispatcher.step < STEPS:
            self.train(save=False)
        self.accounts()
        issued = STEPS * self.shape["groups_per_step"]
        assert len(self.trained) == len(self.watch.issued) == issued
        counts = locked(self.intake, self.intake.dispatcher.counts)
        assert (counts["issued"], counts["trained"]) == (issued, issued)
        idle = ("filtered", "failed", "dropped", "abandoned", "in_training", "queued", "leased")
        assert {state: counts[state] for state in idle} == dict.fromkeys(idle, 0)
        groups = [group for group in journaled(self.intake.journal.path) if group.id.epoch == 0]
        assert set(Counter(group.id for group in groups).values()) == {1}
        assert {group.id: group for group in groups} == {group.id: group for group in self.trained}
        assert ZOMBIE not in {group.actor for group in groups}
        self.finish_evaluation()
        for puppet in self.puppets.values():
            puppet.goodbye()
        self.see_off()
        self.intake.server.drain("the history is over")
        self.bury(*self.dead)
        assert self.intake.source.wait_until_left(DEADLINE_S)
        for one in self.actors:
            one.join()
            assert (one.reason, one.error) == ("the history is over", None)

    def finish_evaluation(self) -> None:
        for one in (*self.actors, *self.leaving):
            one.engine.held = False
        if not locked(self.intake, lambda: len(self.intake.dispatcher.eval)):
            return
        for puppet in self.puppets.values():
            puppet.confirm(self.intake.version if puppet.claim else 0)
            puppet.answer(list(puppet.open))
        groups, failed = self.intake.source.finish_evaluation(DEADLINE_S)
        assert ([group.id.index for group in groups], failed) == ([0, 1], {})

    def close(self) -> None:
        """Nothing is left: no thread, no socket, no file."""
        try:
            for one in self.everybody:
                one.thaw()
                one.__exit__()
            for puppet in (*self.puppets.values(), *self.zombies):
                puppet.__exit__()
            self.intake.__exit__()
            assert all(one.loop.link._context.closed for one in self.everybody)
            assert self.intake.hub._context.closed
            assert {thread.name for thread in threading.enumerate() if thread not in self.threads_before} == set()
        finally:
            self.directory.cleanup()
            self.patch.undo()


Histories.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=12,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # no shrinking: a history is short, and takes its time
)
TestHistories = Histories.TestCase


# --- histories that every run goes through, and what they leave out ---


def sent_home_and_forgotten(history: Histories) -> None:
    """The learner that told an actor to leave is killed, and the next one wants more actors."""
    history.join(1, held=False, confirmed=True)
    history.join(2, held=False, confirmed=True)
    history.train(save=True)
    history.busy_puppet(0)
    history.freeze(2, busy=False, buried=False)
    history.scale_to(2)
    history.puppet_goes(0)  # what it had is for others than the one that was sent home
    history.heartbeats()
    history.scale_to(3)
    history.send_home_a_busy_one(1, frozen=False)
    history.scale_to(3)
    history.restart_learner()
    history.join(1, held=False, confirmed=False)
    history.thaw(0, held=False)
    history.train(save=True)


def late_and_replaced(history: Histories) -> None:
    """Two actors are silent with tickets in hand. One was only late, the other finds its successor there."""
    history.join(1, held=False, confirmed=True)
    history.freeze(0, busy=True, buried=True)
    history.freeze(0, busy=True, buried=False)
    history.join(1, held=True, confirmed=True)
    history.evaluate()
    history.train(save=False)
    history.thaw(1, held=False)
    history.thaw(0, held=True)
    history.restart(0, killed=False, held=False)
    history.train(save=True)


def repeated_and_lost(history: Histories) -> None:
    """Groups that come again, from a puppet and from its own zombie, before and after the learner lost steps."""
    history.puppet_repeats_itself(0)
    history.busy_puppet(0)
    history.join(1, held=False, confirmed=True)
    history.puppet_is_replaced(0)
    history.train(save=True)
    history.puppet_repeats_itself(1)
    history.zombies_speak()
    history.train(save=False)
    history.restart_learner()
    history.puppet_repeats_itself(1)
    history.die(0, noticed=False)
    history.join(0, held=False, confirmed=False)
    history.puppet_goes(1)
    history.train(save=False)


@pytest.mark.parametrize("script", [sent_home_and_forgotten, late_and_replaced, repeated_and_lost])
def test_history_with_a_script_trains_on_all_tickets_in_order(script: Callable[[Histories], None]) -> None:
    history = Histories()
    try:
        history.begin(groups_per_step=3, max_lag=1, wish=3, held=False)
        script(history)
        history.accounts()
    finally:
        history.teardown()


def test_ticket_fails_for_good_by_deaths_and_never_by_departures(tmp_path: Path) -> None:
    """Why the histories above allow a thousand attempts: an actor that dies may have died of its ticket."""
    with Intake(tmp_path, groups_per_step=1, max_lag=0, steps=1, max_attempts=2) as intake:
        intake.publish(0)
        intake.source.resume_training()
        for attempt in range(1, 6):
            with Puppet(intake.address, slots=1, incarnation=f"p{attempt}") as puppet:
                puppet.hello()
                (ticket,) = puppet.next(Ticket)
                assert (ticket.id, ticket.attempt) == (TicketId(0, 0), attempt)
                if attempt <= 3:
                    puppet.goodbye()
                    until(lambda: not intake.server.peers, "the goodbye")
                else:
                    until(lambda: bury(intake, {puppet.incarnation}), "a funeral")
        (why,) = locked(intake, lambda: dict(intake.dispatcher.train.failed)).values()
        assert why.startswith("silent for")
        with HonestPuppet(intake.address, "actor-9", "p6") as puppet:
            puppet.introduce()
            until(lambda: puppet.confirm(1) or puppet.open, "the next ticket")
            puppet.answer(puppet.open)
            assert [group.id.index for group in intake.source.take(DEADLINE_S)] == [1]
