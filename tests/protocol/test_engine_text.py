"""Text that actors send: whole, or refused before it fills the memory."""

from __future__ import annotations

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from protocol.engine_text import MAX_PACKED_BYTES, MAX_TEXT_BYTES, pack, unpack
from protocol.errors import MalformedFrame


def streamed(data: bytes, window_log: int) -> bytes:
    """A frame that does not say its size: it is read with the whole window."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


@given(st.text(max_size=200))
def test_text_round_trips(text: str) -> None:
    assert unpack(memoryview(pack(text))) == text


@given(st.binary(max_size=200))
def test_bytes_that_are_no_text_are_malformed(data: bytes) -> None:
    try:
        unpack(data)
    except MalformedFrame:
        pass
    else:
        assert unpack(data) == ""  # a frame that ends before its first block


def test_text_beyond_the_limit_is_neither_packed_nor_unpacked() -> None:
    assert unpack(pack("x" * MAX_TEXT_BYTES)) == "x" * MAX_TEXT_BYTES
    with pytest.raises(ValueError, match=f"found {MAX_TEXT_BYTES + 1} bytes of metrics, allowed: {MAX_TEXT_BYTES}"):
        pack("x" * (MAX_TEXT_BYTES + 1))
    bomb = streamed(bytes(64 << 20), window_log=18)
    assert len(bomb) < MAX_PACKED_BYTES
    with pytest.raises(MalformedFrame, match="more than"):
        unpack(bomb)
    noise = "".join(random.Random(0).choices("0123456789abcdef", k=MAX_TEXT_BYTES))
    with pytest.raises(ValueError, match=f"compressed metrics, allowed: {MAX_PACKED_BYTES}"):
        pack(noise)


def test_a_frame_that_asks_for_much_memory_is_refused() -> None:
    assert unpack(streamed(b"x" * 100, window_log=20)) == "x" * 100
    with pytest.raises(MalformedFrame, match="too much memory"):
        unpack(streamed(b"x" * 100, window_log=27))
