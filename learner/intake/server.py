"""The thread that owns the hub, the dispatcher and the journal. It imports no torch and never waits for the learner.

A training step of forty seconds never delays a heartbeat: torch releases the interpreter lock while it computes, and
this thread only ever waits for sockets. The learner's side of it is `source.py`; both share one lock, held for
microseconds.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from learner.intake.dispatcher import Dispatcher, is_train
from learner.intake.journal import Journal
from learner.intake.probes import Probes
from learner.intake.rooms import Rooms
from learner.intake.scaling import ScaleWatch
from protocol.engine_text import MAX_PACKED_BYTES
from protocol.hub import Hub
from protocol.messages import (
    Ack,
    Beat,
    Cancel,
    Delta,
    Drain,
    EngineMetrics,
    Failed,
    Goodbye,
    Group,
    Heartbeat,
    Hello,
    Message,
    Probed,
    Refused,
    Rehello,
    Ticket,
    TicketId,
    Welcome,
)  # fmt: skip
from protocol.sections import WireConfig
from protocol.sockets import FaultCounter
from protocol.weights import Snapshot

log = logging.getLogger(__name__)

POLL_S = 0.1
LOGPROB_ROUNDING = 1e-3
MAX_ERROR_CHARACTERS = 2_000
MAX_LISTED = 10_000
"""Tickets that one actor may list; a message with more is no heartbeat."""
FATAL_FAILURES = 3
"""Engine failures in a row, without one group in between, after which the run gives up."""


@dataclass
class Peer:
    """One connection of one actor."""

    id: bytes
    hello: Hello
    last_seen: float
    connected_at: float
    beat: Heartbeat | None = None
    beat_at: float = 0.0
    """When it came; before the first: when the connection was made."""
    drain: Drain | None = None
    """What it was told when it was sent home."""
    drained_at: float = 0.0
    engine_text: bytes = b""
    """What it said last of its engine (`protocol.engine_text`)."""

    @property
    def name(self) -> str:
        return self.hello.actor

    @property
    def version(self) -> int:
        return self.beat.version if self.beat else self.hello.version


@dataclass
class ActorsSeen:
    """Actors as they were last heard of, so that one that outlives the learner is not counted anew."""

    incarnations: dict[str, str] = field(default_factory=dict)
    """Name -> the incarnation that takes part."""
    worked: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Incarnation -> (tokens, busy seconds) that it has reported so far."""
    replaced: dict[str, list[str]] = field(default_factory=dict)
    """Name -> incarnations that a later one has replaced, or that were sent home and left: not let in again."""

    def replace(self, actor: str, incarnation: str) -> None:
        self.replaced.setdefault(actor, []).append(incarnation)


@dataclass
class ActorTotals:
    """What is known of actors over the whole run, the ones that are gone included."""

    started: int = 0
    restarted: int = 0
    max: int = 0
    generated_tokens: int = 0
    busy_s: float = 0.0
    """Seconds in which an engine had requests, over all actors."""
    serving_s: float = 0.0
    """Seconds in which an actor served a version, over all actors, as their heartbeats tell."""
    serving_actor_s: float = 0.0
    """How many actors served, summed over time: actor-seconds."""
    served_s: float = 0.0
    """Seconds in which any actor served."""
    failures: list[str] = field(default_factory=list)
    """Errors that actors reported, newest last; emptied when a group arrives."""


def unlike(
    group: Group,
    ticket: Ticket,
    vocabulary: int,
    step_of: Callable[[int], int | None],
    oldest_step: int,
    pinned: bool = True,
) -> str:
    """What in a group does not answer its ticket; "" if all of it does.

    `step_of(version)`: training steps behind a version that was announced and not lost with a crash, else None.
    `oldest_step`: the least of them that keeps the ticket within max_lag. `pinned`: an evaluation's tokens must be of
    exactly the version that it asks for.
    """
    if group.kind != ticket.kind:
        return f"kind {group.kind}, expected {ticket.kind}"
    if group.prompt_ids != ticket.prompt_ids:
        return "another prompt"
    if len(group.completions) != ticket.group_size:
        return f"{len(group.completions)} completions, expected {ticket.group_size}"
    if group.temperature != ticket.sampling.temperature:
        return f"temperature {group.temperature}, expected {ticket.sampling.temperature}"
    longest = max([completion.num_tokens for completion in group.completions])
    if longest > ticket.sampling.max_tokens:
        return f"a completion of {longest} tokens, expected at most {ticket.sampling.max_tokens}"
    token_ids, logprobs = np.frombuffer(group.token_ids, "<i4"), np.frombuffer(group.logprobs, "<f4")
    if token_ids.size:
        low, high = token_ids.min(), token_ids.max()
        if low < 0 or high >= vocabulary:
            return f"token ids {low}..{high}, expected 0..{vocabulary - 1}"
        least, most = logprobs.min(), logprobs.max()  # both are nan if one logprob is
        if not (-np.inf < least and most <= LOGPROB_ROUNDING):
            return f"logprobs {least}..{most}, expected finite ones of at most 0"
    for version in {version for completion in group.completions for version, _ in completion.spans}:
        step = step_of(version)
        if ticket.kind == "eval" and pinned and version != ticket.min_version:
            return f"tokens of version {version}, expected {ticket.min_version}"
        if step is None or step < oldest_step:
            return f"tokens of version {version}, expected announced ones of step {oldest_step} or later"
    return ""


class IntakeServer(threading.Thread):
    """Serves actors until `stop`. Everything public is safe to call from the learner's thread."""

    def __init__(
        self,
        hub: Hub,
        dispatcher: Dispatcher,
        journal: Journal,
        welcome: Welcome,
        wire: WireConfig,
        straggler_s: float,
        vocabulary: int,
        probes: Probes | None = None,
        scale: ScaleWatch | None = None,
    ) -> None:
        super().__init__(name="intake", daemon=True)
        self.scale = scale or ScaleWatch()
        self.probes = probes or Probes(0, 0, vocabulary, 1)
        self.hub = hub
        self.dispatcher = dispatcher
        self.journal = journal
        self.welcome = welcome
        self.wire = wire
        self.straggler_s = straggler_s
        self.vocabulary = vocabulary
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        """Notified when a group arrived, an actor changed its state, or the thread died."""
        self.peers: dict[bytes, Peer] = {}
        self.totals = ActorTotals()
        self.newest_before = 0
        """Newest version that an earlier process of this run announced: actors that outlived it may serve it."""
        self.incidents = FaultCounter("incident")
        self.rollout_tokens = self.groups_accepted = 0
        self.crash: BaseException | None = None
        self.offsets: dict[int, int] = {}
        """Journal offset of the groups of open train tickets, by index: a checkpoint's replay begins at the least."""
        self.swap_pauses: deque[float] = deque(maxlen=1000)
        self.swap_fetches: deque[float] = deque(maxlen=1000)
        self.known = ActorsSeen()
        self._acks: dict[bytes, list[TicketId]] = {}
        """By connection, what is acknowledged at the end of this turn."""
        self._named: dict[str, Peer] = {}
        """The peers by actor: each has one connection that counts."""
        self._rooms = Rooms()
        self._looked = -math.inf
        """When `_look_around` ran last."""
        self._swaps: dict[str, int] = {}
        self._offers: deque[tuple[Snapshot, tuple[Delta, bytes] | None]] = deque()
        self._drain: Drain | None = None
        self._turned_at = time.monotonic()
        self._stopping = threading.Event()

    # --- for the learner's thread ---

    def reserved(self, step: int, version: int) -> None:
        """Version `version` will carry the weights of `step`: new tickets may ask for it, and wait for it."""
        with self.lock:
            self.dispatcher.published(step, version)

    def offer(self, snapshot: Snapshot, delta: tuple[Delta, bytes] | None = None) -> None:
        """Announce a version: done by the thread at once, sockets belong to it. `delta`: from the version before."""
        with self.lock:
            self._offers.append((snapshot, delta))
        self.hub.wake()

    def drain(self, reason: str) -> None:
        """Ask every actor to leave, also those that say hello from now on."""
        with self.lock:
            self._drain = Drain(reason)
            self._looked = -math.inf
        self.hub.wake()

    def engine_texts(self) -> dict[str, bytes]:
        """Actor -> what it said last of its engine, unread; of those that are connected and have."""
        with self.lock:
            return {peer.name: peer.engine_text for peer in self.peers.values() if peer.engine_text}

    def drop_engine_text(self, actor: str, why: str) -> None:
        """What it said is no text that can be read."""
        with self.lock:
            self.hub.faults("engine metrics", f"{actor}: {why}")
            for peer in self.peers.values():
                peer.engine_text = b"" if peer.name == actor else peer.engine_text

    def stop(self) -> None:
        """End the thread and close its sockets."""
        self._stopping.set()
        self.hub.wake()
        self.join(timeout=10)

    # --- the thread ---

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except BaseException as error:
            log.exception("the intake thread died")
            self.crash = error
        finally:
            with self.changed:
                self.changed.notify_all()
            self.hub.close()

    def _turn(self) -> None:
        """Take in what arrived, look for the silent now and then, hand out what is free."""
        arrived = False
        for peer_id, message in self.hub.poll(POLL_S):
            with self.lock:
                self._receive(peer_id, message, time.monotonic())
            arrived = True
        self._acknowledge()
        with self.changed:
            now = time.monotonic()
            self._count_serving(now)
            while self._offers:
                self.hub.announce(*self._offers.popleft())
            if now - self._looked >= POLL_S:
                self._look_around(now)
            self._journal_failures()
            self._hand_out(now)
            if arrived:
                self.changed.notify_all()

    def _acknowledge(self) -> None:
        """Acknowledge the groups of a turn, once the journal has them for good: one sync for all, outside the lock."""
        if not self._acks:
            return
        self.journal.commit()
        for peer_id, ids in self._acks.items():
            self.hub.send(peer_id, Ack(tuple(ids)))
        self._acks.clear()

    def _look_around(self, now: float) -> None:
        """What goes through all actors and is not due at every turn."""
        self._looked = now
        self.scale.look(now)
        for peer in self.peers.values():
            self._send_home(peer, now)
        self._bury_silent(now)
        self._cancel_stragglers(now)

    def serving(self) -> int:
        """Actors that serve a version and take tickets. With the lock held."""
        return sum(peer.version > 0 and peer.drain is None for peer in self.peers.values())

    def _count_serving(self, now: float) -> None:
        passed, self._turned_at = now - self._turned_at, now
        if serving := self.serving():
            self.totals.serving_actor_s += serving * passed
            self.totals.served_s += passed

    def _receive(self, peer_id: bytes, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            self._hello(peer_id, message, now)
            return
        peer = self.peers.get(peer_id)
        if peer is None:
            self.hub.send(peer_id, Rehello())
            return
        peer.last_seen = now
        if isinstance(message, Heartbeat):
            if fault := self._impossible(message):
                self.hub.faults("malformed", f"heartbeat of {peer.name}: {fault}")
            else:
                self._heartbeat(peer, message, now)
        elif isinstance(message, Group):
            self._group(peer, message)
        elif isinstance(message, Failed):
            why = message.error[:MAX_ERROR_CHARACTERS]
            self.incidents("ticket", f"{peer.name} could not complete {message.id}: {why}")
            self.dispatcher.give_back(message.id, peer.name, f"{peer.name}: {why}", message.attempt)
        elif isinstance(message, Probed):
            if not self.probes.answered(peer.name, peer.hello.incarnation, message):
                self.hub.faults("stray probe", f"{peer.name}, version {message.version}")
        elif isinstance(message, EngineMetrics):
            if (size := len(message.text)) > MAX_PACKED_BYTES:
                self.hub.faults("engine metrics", f"{peer.name}: {size} bytes, allowed: {MAX_PACKED_BYTES}")
            else:
                peer.engine_text = bytes(message.text)
        elif isinstance(message, Goodbye):
            self._goodbye(peer, message)
        else:
            self.hub.faults("malformed", f"{type(message).__name__} on the work socket")

    def _hello(self, peer_id: bytes, hello: Hello, now: float) -> None:
        """A new connection: of a new actor, of a restarted one (new incarnation) or of one that reconnected."""
        if fault := self._impossible(hello):
            self.hub.faults("malformed", f"hello of {hello.actor}: {fault}")
            self.hub.send(peer_id, Refused(fault))
            return
        if hello.incarnation in self.known.replaced.get(hello.actor, ()):
            reason = f"another actor is called {hello.actor} and joined later; names must be unique in a run"
            log.warning("refused %s (incarnation %s): %s", hello.actor, hello.incarnation, reason)
            self.hub.send(peer_id, Refused(reason))
            return
        before = self.known.incarnations.get(hello.actor)
        if before != hello.incarnation:
            lost = self.dispatcher.actor_gone(hello.actor, "the actor was restarted")
            self.totals.started += before is None
            self.totals.restarted += before is not None
            if before is not None:
                self.known.replace(hello.actor, before)
                self.probes.gone(before)  # it will not answer, and would keep everybody else from being asked
                log.warning("%s is back as incarnation %s; %d leases go back", hello.actor, hello.incarnation, lost)
            else:
                log.info("%s joined from %s", hello.actor, hello.host or "somewhere", extra={"event": "actor"})
        self.known.incarnations[hello.actor] = hello.incarnation
        peer = Peer(peer_id, hello, now, now, beat_at=now)
        for other in (self._named.get(hello.actor), self.peers.get(peer_id)):
            if other is None or self.peers.get(other.id) is not other:
                continue
            self._forget(other)
            if (other.name, other.hello.incarnation) == (peer.name, hello.incarnation):  # sent home: it stays so
                peer.drain, peer.drained_at = other.drain, other.drained_at
        self.peers[peer_id] = self._named[hello.actor] = peer
        self.dispatcher.room_changed[peer.name] = None
        self.totals.max = max(self.totals.max, len(self.peers))
        self.hub.send(peer_id, self.welcome)
        self._compare(peer_id, hello.actor, hello, now)
        self._send_home(peer, now)

    def _forget(self, peer: Peer) -> None:
        """This connection is no actor's any more."""
        del self.peers[peer.id], self._named[peer.name]
        self.dispatcher.room_changed[peer.name] = None

    def _heartbeat(self, peer: Peer, beat: Heartbeat, now: float) -> None:
        if peer.version:
            self.totals.serving_s += now - peer.beat_at
        if beat.version != peer.version:
            self.dispatcher.room_changed[peer.name] = None
        peer.beat, peer.beat_at = beat, now
        self.hub.send(peer.id, Beat(self.hub.shelf.version))
        self._compare(peer.id, peer.name, beat, now)
        if beat.swaps > self._swaps.get(peer.hello.incarnation, 0):
            self._swaps[peer.hello.incarnation] = beat.swaps
            if beat.swaps > 1:  # the first load has nothing to pause
                self.swap_pauses.append(beat.pause_s)
                self.swap_fetches.append(beat.fetch_s)
        if probe := self.probes.confirmed(peer.hello.incarnation, beat.version, self.hub.shelf.snapshots):
            self.hub.send(peer.id, probe)
        before = self.known.worked.get(peer.hello.incarnation, (0, 0.0))
        self.totals.generated_tokens += max(0, beat.generated_tokens - before[0])
        self.totals.busy_s += max(0.0, beat.busy_s - before[1])
        self.known.worked[peer.hello.incarnation] = (beat.generated_tokens, beat.busy_s)

    def _impossible(self, state: Hello | Heartbeat) -> str:
        """What no actor of this run can say; "" if it may all be true."""
        if len(state.held) + len(state.unacked) > MAX_LISTED:
            return f"{len(state.held) + len(state.unacked)} tickets listed, allowed: {MAX_LISTED}"
        newest = max(self.newest_before, self.dispatcher.newest_version)
        if not 0 <= state.version <= newest:
            return f"serves version {state.version}, this run has announced {newest}"
        if isinstance(state, Heartbeat):
            figures = (
                state.phase_s, state.busy_s, state.fetch_s, state.pause_s, state.running_s, state.paused_s,
                state.serving_s,
            )  # fmt: skip
            if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
                return f"figures {figures}, expected finite ones"
        return ""

    def _compare(self, peer_id: bytes, actor: str, state: Hello | Heartbeat, now: float) -> None:
        """Compare an actor's absolute state with its leases.

        A lease younger than a heartbeat counts as listed: the ticket may have crossed with this message. So does one
        that is older only since this message has waited here, behind more than this thread could take; nothing is
        thought to wait for as long as an actor may be silent.
        """
        sent_at = max(self.hub.emptied_at, now - self.wire.dead_after_s)  # or later
        may_have_crossed = min(now, sent_at) - self.wire.heartbeat_s
        young = [
            ticket_id
            for ledger in (self.dispatcher.train, self.dispatcher.eval)
            for ticket_id, lease in ledger.leases_of(actor).items()
            if lease.issued_at > may_have_crossed
        ]
        stray = self.dispatcher.beat(actor, [*state.held, *state.unacked, *young])
        self._settle_strays(peer_id, stray, state.unacked)

    def _settle_strays(self, peer_id: bytes, stray: list[TicketId], unacked: tuple[TicketId, ...]) -> None:
        """An actor lists tickets that it has no lease for: stop work on them, forget groups that nobody waits for.

        A group that is still wanted is left alone: the actor sends it again, and the first one journaled counts.
        """
        if not stray:
            return
        sent, journaled_now = set(unacked), set[TicketId]().union(*self._acks.values())
        done = tuple(
            ticket_id
            for ticket_id in stray
            if ticket_id in sent and ticket_id not in journaled_now and not self.dispatcher.wanted(ticket_id)
        )
        cancelled = tuple(ticket_id for ticket_id in stray if ticket_id not in sent)
        if done:
            self.hub.send(peer_id, Ack(done))
        if cancelled:
            self.hub.send(peer_id, Cancel(cancelled))

    def _group(self, peer: Peer, group: Group) -> None:
        """Journal first, acknowledge at the end of the turn. Duplicates and latecomers are acknowledged and dropped."""
        ticket = self.dispatcher.wanted(group.id)
        fault = ticket and unlike(
            group,
            ticket,
            self.vocabulary,
            self.dispatcher.step_of,
            self.dispatcher.oldest_step(group.id),
            self.dispatcher.eval_pinned,
        )
        if fault:
            self.hub.faults("group unlike its ticket", f"{group.id} of {peer.name}: {fault}")
            self.dispatcher.give_back(group.id, peer.name, fault, group.attempt)
        elif ticket is not None:
            holder = self.dispatcher.holder(group.id)
            offset = self.journal.append_group(group, self.hub.frames)
            self.rollout_tokens += group.num_tokens
            self.groups_accepted += 1
            self.totals.failures.clear()
            self.dispatcher.receive(group)
            if is_train(group.id):
                self.offsets[group.id.index] = offset
            if self.dispatcher.is_filtered_out(group.id):
                self.journal.append_filtered((group.id.epoch, group.id.index))
            if holder is not None and holder != peer.name:
                self._cancel(holder, group.id)
        else:
            self.dispatcher.receive(group)
        self._acks.setdefault(peer.id, []).append(group.id)

    def _goodbye(self, peer: Peer, message: Goodbye) -> None:
        self.probes.gone(peer.hello.incarnation)
        lost = self.dispatcher.actor_gone(peer.name, message.error or message.reason, excused=not message.error)
        self._forget(peer)
        if message.error:
            why = message.error[:MAX_ERROR_CHARACTERS]
            log.error("%s failed: %s", peer.name, why)
            self.totals.failures.append(f"{peer.name}: {why}")
        else:
            log.info("%s left (%s), %d leases go back", peer.name, message.reason, lost, extra={"event": "actor"})
            if peer.drain is not None:  # whoever comes under this name is no restart of it
                self.known.replace(peer.name, peer.hello.incarnation)
                self.known.incarnations.pop(peer.name, None)

    def _bury_silent(self, now: float) -> None:
        for peer in list(self.peers.values()):
            silence = now - peer.last_seen
            if silence > self.wire.dead_after_s:
                self._forget(peer)
                self.probes.gone(peer.hello.incarnation)
                lost = self.dispatcher.actor_gone(peer.name, f"silent for {silence:.0f} s")
                log.warning("%s was silent for %.0f s: %d leases go back", peer.name, silence, lost)
                self.changed.notify_all()

    def _cancel_stragglers(self, now: float) -> None:
        for ticket_id, actor in self.dispatcher.stragglers(now, self.straggler_s):
            log.warning("ticket %s has kept the next batch waiting at %s: cancelled, issued again", ticket_id, actor)
            self.dispatcher.give_back(ticket_id, actor, f"straggled at {actor}")
            self._cancel(actor, ticket_id)

    def _journal_failures(self) -> None:
        """Before anything takes the place of a ticket that failed for good, the journal says that it did."""
        for ticket_id, why in self.dispatcher.newly_failed:
            log.error("ticket %s failed for good: %.300s", ticket_id, why)
            if is_train(ticket_id):
                self.journal.append_failed((ticket_id.epoch, ticket_id.index), why)
        self.dispatcher.newly_failed.clear()

    def _cancel(self, actor: str, ticket_id: TicketId) -> None:
        if (peer := self._named.get(actor)) is not None:
            self.hub.send(peer.id, Cancel((ticket_id,)))

    def _hand_out(self, now: float) -> None:
        """One ticket at a time to the actor with the most room, so that the oldest tickets spread first.

        Room is counted in completions: an evaluation's tickets may hold more or fewer of them than training's."""
        unreachable: list[str] = []
        too_old = 0
        self._note_rooms()
        while (actor := self._rooms.most(above=too_old)) is not None:
            peer = self._named[actor]
            ticket = self.dispatcher.issue(actor, peer.version, now)
            if ticket is None:
                too_old = peer.version  # what this version may not begin, an older one may not either
            elif not self.hub.send(peer.id, ticket):
                self.dispatcher.give_back(ticket.id, actor, "its pipe is full", excused=True)
                self.dispatcher.room_changed.pop(actor, None)
                self._rooms.put(actor, peer.version, 0)
                unreachable.append(actor)
            self._note_rooms()
        self.dispatcher.room_changed |= dict.fromkeys(unreachable)  # to be tried again at the next turn

    def _note_rooms(self) -> None:
        """Compute anew what room those have for whom it may have changed."""
        for actor in self.dispatcher.room_changed:
            peer = self._named.get(actor)
            room, version = 0, 0
            if peer is not None and peer.version and peer.drain is None:
                version = peer.version
                room = peer.hello.slots * self.welcome.group_size - self.dispatcher.completions_of(actor)
            self._rooms.put(actor, version, room)
        self.dispatcher.room_changed.clear()

    def _send_home(self, peer: Peer, now: float) -> None:
        """Tell an actor to leave: everybody at the end, the surplus at any time."""
        order = self._drain or self.scale.order(peer.name, peer.drain, now - peer.drained_at)
        if order is not None and order != peer.drain and self.hub.send(peer.id, order):
            log.info("%s is sent home: %s", peer.name, order.reason, extra={"event": "actor"})
            peer.drain, peer.drained_at = order, now
            self.dispatcher.room_changed[peer.name] = None
