"""What the learner has to give of its weights: the newest snapshot, an older one being pulled, a window of deltas.

Owned by the hub (`hub.py`), which answers requests with it; knows no socket. Its memory is bounded: at most two
snapshots, and deltas of at most one snapshot's bytes together, since a longer chain is larger than a snapshot. Who
pulls a snapshot while another, older one is being pulled loses it to the next version.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from protocol.messages import ChunkRequest, Delta, Update, UpdateRequest
from protocol.weights import Snapshot, part

INLINE_BYTES = 1 << 20
"""Deltas up to this size travel inside the `Update` that announces them: nobody has to ask."""
MAX_DELTAS = 64
"""Of the window: a longer chain takes as long to apply as a snapshot to pull, however small its deltas are."""
HELD_S = 15.0
"""An older snapshot is kept for so long after the last request for its bytes."""


class Shelf:
    """See the module's docstring."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.latest: Snapshot | None = None
        self._held: Snapshot | None = None
        self._asked: dict[int, float] = {}
        """Version of a snapshot kept -> when its bytes were last asked for."""
        self._deltas: dict[int, tuple[Delta, bytes]] = {}
        """By version made, oldest first: each leads to the next, the last one to `latest`."""
        self._clock = clock

    def put(self, snapshot: Snapshot, delta: tuple[Delta, bytes] | None) -> None:
        """A new version; `delta` leads to it from the one before."""
        if delta is None or self.latest is None or delta[0].base_digest != self.latest.manifest.digest:
            self._deltas.clear()
        if delta is not None and self.latest is not None:
            self._deltas[snapshot.manifest.version] = delta
        allowed = snapshot.manifest.total_bytes
        while len(self._deltas) > MAX_DELTAS or sum(one.nbytes for one, _ in self._deltas.values()) > allowed:
            del self._deltas[next(iter(self._deltas))]
        if not self._is_pulled(self._held):
            self._held = self.latest
        self.latest = snapshot
        kept = {one.manifest.version for one in self.snapshots}
        self._asked = {version: at for version, at in self._asked.items() if version in kept}

    @property
    def version(self) -> int:
        """Newest version; 0: none."""
        return self.latest.manifest.version if self.latest else 0

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those that are kept, the newest first."""
        return [one for one in (self.latest, self._held) if one]

    def news(self) -> Update:
        """What is published with a new version: the delta to it, if there is one."""
        assert self.latest is not None
        newest = self._deltas.get(self.version)
        return _update(self.latest, [newest] if newest else [])

    def answer(self, request: UpdateRequest) -> Update | None:
        """The way from what an actor has to the newest version; None if there is no version yet.

        Who has nothing is sent to the snapshot that others are pulling, if a chain leads on from it: it asks again.
        """
        if self.latest is None:
            return None
        if request.base_digest == self.latest.manifest.digest:
            return Update(self.latest.manifest)
        if chain := self._chain(request.base, request.base_digest):
            return _update(self.latest, chain)
        held = self._held
        if held and self._is_pulled(held) and self._chain(held.manifest.version, held.manifest.digest):
            return Update(held.manifest)
        return Update(self.latest.manifest)

    def chunk(self, request: ChunkRequest) -> memoryview | None:
        """The bytes that a request names; None if they are not kept, or lie outside."""
        if request.form == "delta":
            _, payload = self._deltas.get(request.version, (None, b""))
            return part(memoryview(payload), request.offset, request.length)
        for snapshot in self.snapshots:
            if snapshot.manifest.version == request.version:
                self._asked[request.version] = self._clock()
                return snapshot.chunk(request.offset, request.length)
        return None

    def _chain(self, base: int, digest: str) -> list[tuple[Delta, bytes]]:
        """The deltas from a version on; [] if they do not reach back so far."""
        chain = [found for version, found in self._deltas.items() if version > base]
        return chain if chain and chain[0][0].base_digest == digest else []

    def _is_pulled(self, snapshot: Snapshot | None) -> bool:
        return snapshot is not None and self._clock() - self._asked.get(snapshot.manifest.version, -HELD_S) < HELD_S


def _update(newest: Snapshot, chain: list[tuple[Delta, bytes]]) -> Update:
    payload = b""
    if sum(delta.nbytes for delta, _ in chain) <= INLINE_BYTES:
        payload = b"".join(data for _, data in chain)
    return Update(newest.manifest, tuple(delta for delta, _ in chain), payload)
