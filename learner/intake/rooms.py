"""Which actor has the most room for tickets. `server.py` says what room each has, and asks at every turn.

Knows no ticket and no socket. Neither call looks at all actors.
"""

from __future__ import annotations

import heapq
from itertools import count


class Rooms:
    """Room of actors, by the version that they serve. Actors without room are not in it."""

    def __init__(self) -> None:
        self._numbers = count()
        self._lines: dict[int, list[tuple[int, int, str]]] = {}
        """Version -> heap of (-room, number of the entry, actor); an entry that is not its actor's last is void."""
        self._last: dict[str, int] = {}
        """Actor -> number of its last entry."""

    def put(self, actor: str, version: int, room: int) -> None:
        """An actor that serves `version` has room from now on; 0 or less: none."""
        if room <= 0:
            self._last.pop(actor, None)
            return
        self._last[actor] = number = next(self._numbers)
        heapq.heappush(self._lines.setdefault(version, []), (-room, number, actor))

    def most(self, above: int) -> str | None:
        """The actor with the most room among those that serve a version beyond `above`; of equals, who has it longest.
        None: nobody has any."""
        first: list[tuple[int, int, str]] = []
        for version, line in list(self._lines.items()):  # few: actors follow the newest
            while line and self._last.get(line[0][2]) != line[0][1]:
                heapq.heappop(line)
            if not line:
                del self._lines[version]
            elif version > above and (not first or line[0] < first[0]):
                first = line
        return first[0][2] if first else None
