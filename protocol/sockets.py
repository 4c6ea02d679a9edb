"""What the sockets of both sides have in common: options, limits, routing ids, and the count of what goes wrong.

The learner's sockets are in `hub.py`, an actor's in `link.py`. Weight chunks have sockets of their own, so that
gigabytes never stand in front of a heartbeat; they are pulled through a window, so that nothing piles up.

With keys (`keys.py`) every connection is CURVE: encrypted, the learner proven to the actor and the actor to the learner
(`door.py`). Without, sockets are bound to loopback only, unless the recipe says that the network is trusted.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from typing import Any

import zmq

from protocol import codec
from protocol.handshakes import HANDSHAKE_MS

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 10_000
"""Messages a pipe holds before the hub counts the peer as full. Tickets are bounded by leases long before."""
NEWS_HIGH_WATER_MARK = 8
"""A version's news may carry its delta. A subscriber that reads none misses what comes after these, and asks later."""
LINGER_MS = 1_000
TRANSPORT_HEARTBEAT_MS = 5_000
HARD_LIMIT_FACTOR = 4
"""ZeroMQ itself cuts the connection at this multiple of the frame limit; up to there a frame is refused and counted."""


def peer_id(actor: str, incarnation: str) -> bytes:
    """Routing id of a new connection: a second DEALER with an id in use would be silently unheard, hence the nonce."""
    return f"{actor}.{incarnation}.{secrets.token_hex(4)}".encode()


def new_socket(context: Any, kind: int, limits: codec.Limits) -> Any:
    """A socket of a context, of pyzmq's blocking kind or its asyncio, with the options that all of ours have."""
    sock = context.socket(kind)
    high_water_mark = NEWS_HIGH_WATER_MARK if kind in (zmq.XPUB, zmq.SUB) else HIGH_WATER_MARK
    sock.setsockopt(zmq.LINGER, LINGER_MS)
    sock.setsockopt(zmq.SNDHWM, high_water_mark)
    sock.setsockopt(zmq.RCVHWM, high_water_mark)
    sock.setsockopt(zmq.MAXMSGSIZE, limits.max_frame_bytes * HARD_LIMIT_FACTOR)
    sock.setsockopt(zmq.HEARTBEAT_IVL, TRANSPORT_HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 4 * TRANSPORT_HEARTBEAT_MS)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    return sock


class FaultCounter:
    """Counts what goes wrong by kind and says so, of each kind at most once a second."""

    def __init__(self, what: str = "dropped a frame") -> None:
        self.what = what
        self.counts: Counter[str] = Counter()
        self._last_log: dict[str, float] = {}

    def __call__(self, fault: str, detail: object) -> None:
        self.counts[fault] += 1
        now = time.monotonic()
        if now - self._last_log.get(fault, -1.0) >= 1.0:
            self._last_log[fault] = now
            log.warning("%s (%s): %s; so far: %s", self.what, fault, detail, dict(self.counts))
