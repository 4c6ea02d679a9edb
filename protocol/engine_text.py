"""An engine's own metrics on their way to the learner: text of a bounded size, compressed. Pure.

The text is Prometheus' exposition format, but nothing here reads it: `learner/telemetry/engines.py` does, and trusts
none of it.
"""

from __future__ import annotations

import zstandard

from protocol.errors import MalformedFrame

MAX_TEXT_BYTES = 1 << 20
MAX_PACKED_BYTES = 1 << 17
"""The learner keeps one such for each actor."""
MAX_WINDOW_BYTES = 1 << 20
"""Memory that a frame may ask for to be read."""
LEVEL = 3


def pack(text: str) -> bytes:
    """Compress a text. Raises ValueError for one that is too large to be sent."""
    data = text.encode()
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"found {len(data)} bytes of metrics, allowed: {MAX_TEXT_BYTES}")
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(data)
    if len(packed) > MAX_PACKED_BYTES:
        raise ValueError(f"found {len(packed)} bytes of compressed metrics, allowed: {MAX_PACKED_BYTES}")
    return packed


def unpack(packed: bytes | memoryview) -> str:
    """Inverse of `pack`. Raises MalformedFrame for what is no such text, or would become too large."""
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(bytes(packed))
    try:
        data = reader.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise MalformedFrame(f"metrics of more than {MAX_TEXT_BYTES} bytes")
        return data.decode()
    except (zstandard.ZstdError, UnicodeDecodeError) as error:
        raise MalformedFrame(f"compressed metrics: {error}") from None
