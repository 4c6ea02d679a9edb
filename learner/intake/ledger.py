"""Live tickets of one kind: who has which, which groups are there, what failed. The dispatcher keeps two of them.

Plain bookkeeping without rules of its own: which tickets there are, and who may have them when, is `dispatcher.py`'s.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from protocol.messages import Group, Ticket, TicketId


@dataclass
class Lease:
    """A ticket in an actor's hands."""

    ticket: Ticket
    actor: str
    issued_at: float
    missed_beats: int = 0


@dataclass
class Ledger:
    """Live tickets of one kind. Orders issue, keeps leases and finished groups that nobody has taken yet."""

    opened: int = 0
    """evaluation: tickets that it began with, each of which is waiting, leased, queued or failed."""
    waiting: deque[Ticket] = field(default_factory=deque)
    leased: dict[TicketId, Lease] = field(default_factory=dict)
    queued: dict[TicketId, Group] = field(default_factory=dict)
    failed: dict[TicketId, str] = field(default_factory=dict)
    excused: Counter[TicketId] = field(default_factory=Counter)
    """Attempts that ended without the ticket's fault: the actor left in good order, or could not be reached."""

    def __len__(self) -> int:
        return len(self.waiting) + len(self.leased) + len(self.queued)

    def issue(self, actor: str, version: int, now: float) -> Ticket | None:
        """Lease the first waiting ticket that an engine at `version` may begin."""
        for position, ticket in enumerate(self.waiting):
            if ticket.min_version <= version:
                del self.waiting[position]
                self.leased[ticket.id] = Lease(ticket, actor, now)
                return ticket
        return None

    def give_back(self, ticket_id: TicketId, max_attempts: int, why: str) -> bool:
        """Return a lease to the front of the line, in ticket order; False if it has failed for good."""
        ticket = self.leased.pop(ticket_id).ticket
        if ticket.attempt - self.excused[ticket_id] >= max_attempts:
            self.failed[ticket_id] = why
            return False
        again = msgspec.structs.replace(ticket, attempt=ticket.attempt + 1)
        self.waiting = deque(sorted([*self.waiting, again], key=lambda waiting: waiting.id))
        return True

    def receive(self, group: Group) -> bool:
        """Keep a group if its ticket is still open, whoever holds it: the first one journaled counts."""
        if group.id in self.leased:
            del self.leased[group.id]
        elif any(ticket.id == group.id for ticket in self.waiting):
            self.waiting = deque(ticket for ticket in self.waiting if ticket.id != group.id)
        else:
            return False
        self.excused.pop(group.id, None)
        self.queued[group.id] = group
        return True

    def holders(self) -> dict[TicketId, str]:
        return {ticket_id: lease.actor for ticket_id, lease in self.leased.items()}
