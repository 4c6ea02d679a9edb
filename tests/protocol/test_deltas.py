"""Deltas of tensors: every bit comes back, whatever the type and however much changed; what is damaged is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import deltas
from protocol.deltas import SAMPLE, apply, changed, encode, encode_delta
from protocol.errors import WeightsError

SIZES = st.sampled_from([0, 1, 3, 4, 5, 8, 63, 1000, 4097])


def applied(base: bytes, encoding: str, payload: bytes, itemsize: int) -> bytes:
    target = bytearray(base)
    apply(encoding, memoryview(payload), memoryview(target), itemsize)
    return bytes(target)


def bf16(values: np.ndarray) -> np.ndarray:
    """Upper halves of float32, as uint16."""
    return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2")


def step(seed: int, size: int = 200_000, lr: float = 1e-6, zeros: float = 0.0) -> tuple[bytes, bytes]:
    """bfloat16 weights before and after an update of the same size for each element, as Adam's first ones are.

    `zeros`: share of the weights that were exactly 0, as in a model that was quantized once."""
    rng = np.random.default_rng(seed)
    master = np.where(rng.random(size) < zeros, 0, rng.normal(0, 0.05, size)).astype("<f4")
    return bf16(master).tobytes(), bf16(master + lr * rng.choice([-1, 1], size).astype("<f4")).tobytes()


@settings(max_examples=150, deadline=None)
@given(
    itemsize=st.sampled_from([1, 2, 4, 8]), size=SIZES, seed=st.integers(0, 1000),
    density=st.sampled_from([0.0, 0.001, 0.02, 0.3, 0.9, 1.0]), spread=st.sampled_from([1, 3, 200, 2**62]),
)  # fmt: skip
def test_every_bit_comes_back(itemsize: int, size: int, seed: int, density: float, spread: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, size * itemsize, np.uint8).view(f"<u{itemsize}")
    moves = rng.integers(-spread, spread + 1, size).astype(np.int64).view("<u8").astype(f"<u{itemsize}")
    new = np.where(rng.random(size) < density, base + moves, base).astype(f"<u{itemsize}")
    encoding, payload = encode(base.tobytes(), new.tobytes(), itemsize)
    assert applied(base.tobytes(), encoding, payload, itemsize) == new.tobytes()
    assert len(payload) <= new.nbytes
    delta = encode_delta(memoryview(base.tobytes()), memoryview(new.tobytes()), itemsize)
    assert applied(base.tobytes(), "delta", delta, itemsize) == new.tobytes()


def test_bits_are_compared_and_not_values() -> None:
    nan, other_nan, zero, minus_zero = 0x7FC0, 0x7FC1, 0x0000, 0x8000
    base = np.array([nan, zero, nan, minus_zero], "<u2")
    new = np.array([other_nan, minus_zero, nan, zero], "<u2")
    assert changed(base, new).tolist() == [0, 1, 3]
    assert applied(base.tobytes(), *encode(base.tobytes(), new.tobytes(), 2), 2) == new.tobytes()


@pytest.mark.parametrize("tail", range(5))
def test_changes_are_found_in_whole_words_and_behind_the_last_one(tail: int) -> None:
    base = np.zeros(1000 + tail, "<u2")
    new = base.copy()
    new[[0, 5, 997, len(new) - 1]] = 1
    assert changed(base, new).tolist() == sorted({0, 5, 997, len(new) - 1})


def test_unchanged_tensor_is_an_empty_delta() -> None:
    base, _ = step(0)
    assert encode(base, base, 2) == ("delta", b"")
    assert applied(base, "delta", b"", 2) == base


@pytest.mark.parametrize(("lr", "zeros", "gain"), [(1e-6, 0.0, 0.9), (1e-5, 0.0, 0.95), (1e-6, 0.02, 0.7)])
def test_places_of_small_and_large_weights_are_cheaper_apart(
    lr: float, zeros: float, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = step(1, lr=lr, zeros=zeros)
    apart = encode_delta(memoryview(base), memoryview(new), 2)
    assert applied(base, "delta", apart, 2) == new
    monkeypatch.setattr(deltas, "_choose_threshold", lambda *_: 0)
    together = encode_delta(memoryview(base), memoryview(new), 2)
    assert applied(base, "delta", together, 2) == new
    assert len(apart) < gain * len(together) < 0.07 * len(new)


def test_smallest_encoding_is_taken() -> None:
    rng = np.random.default_rng(0)
    noise, other = rng.bytes(4000), rng.bytes(4000)
    assert encode(noise, other, 2) == ("dense", other), "nothing to be won"
    constant = bytes(4000)
    encoding, payload = encode(noise, constant, 2)
    assert encoding == "zstd" and len(payload) < 100
    assert applied(noise, encoding, payload, 2) == constant


def test_chain_of_fifty_versions() -> None:
    rng = np.random.default_rng(3)
    master = rng.normal(0, 0.05, 5000).astype("<f4")
    held = bf16(master).tobytes()
    for _ in range(50):
        before = bf16(master).tobytes()
        master += 1e-4 * rng.standard_normal(5000).astype("<f4")
        after = bf16(master).tobytes()
        held = applied(held, *encode(before, after, 2), 2)
        assert held == after


def test_threshold_comes_from_a_sample_and_survives_a_wrong_one() -> None:
    """All that changed lies between the sampled elements, where the magnitudes are others."""
    base = np.full(3 * SAMPLE, 0x3F80, "<u2")
    base[1::3] = np.arange(SAMPLE) % 7
    new = base.copy()
    new[1::3] += 1
    assert applied(base.tobytes(), *encode(base.tobytes(), new.tobytes(), 2), 2) == new.tobytes()


def test_damage_is_refused_or_shows_in_the_bytes() -> None:
    """A digest of the tensor finds the rest; nothing but WeightsError may come of it, and no memory be asked for."""
    base, new = step(2, size=3000, lr=1e-4)
    payload = encode_delta(memoryview(base), memoryview(new), 2)
    for place in range(len(payload)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[place] ^= flip
            try:
                assert len(applied(base, "delta", bytes(damaged), 2)) == len(new)
            except WeightsError:
                continue
    for end in range(1, len(payload)):
        with pytest.raises(WeightsError):
            applied(base, "delta", payload[:end], 2)
    with pytest.raises(WeightsError, match="1 bytes too many"):
        applied(base, "delta", payload + b"x", 2)


@pytest.mark.parametrize(("encoding", "payload"), [("dense", b"123"), ("zip", b""), ("zstd", b""), ("delta", b"\0")])
def test_what_is_no_payload_is_refused(encoding: str, payload: bytes) -> None:
    with pytest.raises(WeightsError):
        applied(bytes(8), encoding, payload, 2)


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="8 and 6 bytes"):
        encode(bytes(8), bytes(6), 2)
    with pytest.raises(ValueError, match="in elements of 4"):
        encode(bytes(6), bytes(6), 4)
