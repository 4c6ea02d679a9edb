"""Live tickets of one kind: who has which, which groups are there, what failed. The dispatcher keeps two of them.

Plain bookkeeping without rules of its own: which tickets there are, and who may have them when, is `dispatcher.py`'s.
Nothing here takes longer for more tickets or more actors than a look into a heap does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType

import msgspec

from protocol.messages import Group, Ticket, TicketId

NO_LEASES: Mapping[TicketId, Lease] = MappingProxyType({})


@dataclass
class Lease:
    """A ticket in an actor's hands."""

    ticket: Ticket
    actor: str
    issued_at: float
    missed_beats: int = 0


class Ledger:
    """Live tickets of one kind. Orders issue, keeps leases and finished groups that nobody has taken yet."""

    def __init__(self, waiting: Iterable[Ticket] = (), room_changed: dict[str, None] | None = None) -> None:
        """`waiting`: tickets to begin with. `room_changed` gets the actors whose leases change as its keys."""
        self.waiting: dict[TicketId, Ticket] = {}
        self.leased: dict[TicketId, Lease] = {}
        """In order of issue."""
        self.queued: dict[TicketId, Group] = {}
        self.failed: dict[TicketId, str] = {}
        self.excused: Counter[TicketId] = Counter()
        """Attempts that ended without the ticket's fault: the actor left in good order, or could not be reached."""
        self._lines: dict[int, list[TicketId]] = {}
        """By the version that they ask for, a heap of the tickets that wait; and of some that no longer do."""
        self._leases: dict[str, dict[TicketId, Lease]] = {}
        self._room_changed = {} if room_changed is None else room_changed
        for ticket in waiting:
            self.add(ticket)
        self.opened = len(self.waiting)
        """evaluation: tickets that it began with, each of which is waiting, leased, queued or failed."""

    def __len__(self) -> int:
        return len(self.waiting) + len(self.leased) + len(self.queued)

    def add(self, ticket: Ticket) -> None:
        """A ticket waits to be issued."""
        self.waiting[ticket.id] = ticket
        heapq.heappush(self._lines.setdefault(ticket.min_version, []), ticket.id)

    def issue(self, actor: str, version: int, now: float) -> Ticket | None:
        """Lease the first waiting ticket that an engine at `version` may begin. `now` never goes back."""
        first: list[TicketId] = []
        for min_version, line in list(self._lines.items()):  # few: those between the oldest step allowed and the newest
            while line and line[0] not in self.waiting:
                heapq.heappop(line)
            if not line:
                del self._lines[min_version]
            elif min_version <= version and (not first or line[0] < first[0]):
                first = line
        if not first:
            return None
        ticket = self.waiting.pop(heapq.heappop(first))
        lease = self.leased[ticket.id] = Lease(ticket, actor, now)
        self._leases.setdefault(actor, {})[ticket.id] = lease
        self._room_changed[actor] = None
        return ticket

    def _end_lease(self, ticket_id: TicketId) -> Lease:
        lease = self.leased.pop(ticket_id)
        leases = self._leases[lease.actor]
        del leases[ticket_id]
        if not leases:
            del self._leases[lease.actor]
        self._room_changed[lease.actor] = None
        return lease

    def give_back(self, ticket_id: TicketId, max_attempts: int, why: str) -> bool:
        """Return a lease to its place in line; False if it has failed for good."""
        ticket = self._end_lease(ticket_id).ticket
        if ticket.attempt - self.excused[ticket_id] >= max_attempts:
            self.failed[ticket_id] = why
            return False
        self.add(msgspec.structs.replace(ticket, attempt=ticket.attempt + 1))
        return True

    def receive(self, group: Group) -> bool:
        """Keep a group if its ticket is still open, whoever holds it: the first one journaled counts."""
        if group.id in self.leased:
            self._end_lease(group.id)
        elif group.id in self.waiting:
            del self.waiting[group.id]
        else:
            return False
        self.excused.pop(group.id, None)
        self.queued[group.id] = group
        return True

    def wanted(self, ticket_id: TicketId) -> Ticket | None:
        """The ticket, if a group for it would be kept."""
        lease = self.leased.get(ticket_id)
        return lease.ticket if lease else self.waiting.get(ticket_id)

    def leases_of(self, actor: str) -> Mapping[TicketId, Lease]:
        return self._leases.get(actor, NO_LEASES)

    def leased_before(self, time_s: float) -> Iterator[Lease]:
        """Leases from before a time, oldest first."""
        return takewhile(lambda lease: lease.issued_at < time_s, self.leased.values())

    def holders(self) -> dict[TicketId, str]:
        return {ticket_id: lease.actor for ticket_id, lease in self.leased.items()}
