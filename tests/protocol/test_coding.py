"""Changes of elements <-> bytes: every bit comes back, whatever changed; what is damaged is refused or shows."""

from __future__ import annotations

import tracemalloc
from unittest import mock

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import coding
from protocol.coding import LENGTH, PART, SmallElements, apply_changes, choose_threshold, encode_changes
from protocol.errors import WeightsError

SIZES = st.sampled_from([1, 2, 3, 4, 5, 8, 63, 1000, 4097])
ITEM_BYTES = st.sampled_from([1, 2, 4, 8])
SEEDS = st.integers(0, 2**32 - 1)


def bf16(values: np.ndarray) -> np.ndarray:
    """Upper halves of float32, as uint16."""
    return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2")


def step(seed: int, size: int = 200_000, lr: float = 1e-6, zeros: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 weights before and after an update of the same size for each element, as Adam's first ones are.

    `zeros`: share of the weights that were exactly 0, as in a model that was quantized once."""
    rng = np.random.default_rng(seed)
    master = np.where(rng.random(size) < zeros, 0, rng.normal(0, 0.05, size)).astype("<f4")
    return bf16(master), bf16(master + lr * rng.choice([-1, 1], size).astype("<f4"))


def random_step(itemsize: int, size: int, density: float, spread: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements of any bits, and the same with a share of them moved by up to `spread` in either direction."""
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, size * itemsize, np.uint8).view(f"<u{itemsize}")
    moves = rng.integers(-spread, spread + 1, size).view("<u8").astype(old.dtype)
    return old, np.where(rng.random(size) < density, old + moves, old).astype(old.dtype)


def encoded(old: np.ndarray, now: np.ndarray, small: SmallElements | None = None) -> bytes:
    return encode_changes(old, now, np.flatnonzero(old != now), small or SmallElements())


def applied(old: np.ndarray, payload: bytes, small: SmallElements | None = None) -> np.ndarray:
    bits = old.copy()
    apply_changes(memoryview(payload), bits, small or SmallElements())
    return bits


# --- round trips ---


@settings(max_examples=150)
@given(
    itemsize=ITEM_BYTES, size=SIZES, seed=SEEDS, density=st.sampled_from([0.0, 0.001, 0.02, 0.3, 0.9, 1.0]),
    spread=st.sampled_from([1, 3, 200, 2**62]),
)  # fmt: skip
def test_changes_come_back_bit_by_bit(itemsize: int, size: int, seed: int, density: float, spread: int) -> None:
    old, now = random_step(itemsize, size, density, spread, seed)
    payload, bits = encoded(old, now), old.copy()
    changes = apply_changes(memoryview(payload), bits, SmallElements())
    assert bits.tobytes() == now.tobytes()
    assert sorted(n for indices, _ in changes for n in indices.tolist()) == np.flatnonzero(old != now).tolist()
    assert all(after.tolist() == now[indices].tolist() for indices, after in changes)


def test_changes_are_of_bits_and_not_of_values() -> None:
    nan, other_nan, zero, minus_zero = 0x7FC0, 0x7FC1, 0x0000, 0x8000
    old = np.array([nan, zero, nan, minus_zero], "<u2")
    now = np.array([other_nan, minus_zero, nan, zero], "<u2")
    assert coding.changed(old, now, 4).tolist() == [0, 1, 3]
    assert applied(old, encoded(old, now)).tolist() == now.tolist()


def test_changes_of_nothing_are_an_empty_payload() -> None:
    old, _ = step(0, 1000)
    assert encoded(old, old) == b""
    assert applied(old, b"").tolist() == old.tolist()
    assert encoded(old[:0], old[:0]) == b""


@pytest.mark.parametrize(("lr", "zeros", "gain"), [(1e-6, 0.0, 0.9), (1e-5, 0.0, 0.95), (1e-6, 0.02, 0.72)])
def test_changes_are_cheaper_in_two_classes(lr: float, zeros: float, gain: float) -> None:
    old, now = step(1, lr=lr, zeros=zeros)
    apart = encoded(old, now)
    assert LENGTH.unpack_from(apart) > (0,)
    assert applied(old, apart).tobytes() == now.tobytes()
    with mock.patch.object(coding, "choose_threshold", return_value=0):
        together = encoded(old, now)
    assert LENGTH.unpack_from(together) == (0,)
    assert applied(old, together).tobytes() == now.tobytes()
    assert len(apart) < gain * len(together) < 0.07 * now.nbytes


def test_moves_are_cheaper_side_by_side_with_those_of_their_exponent() -> None:
    old, now = step(2, lr=1e-5, zeros=0.01)
    sorted_moves = encoded(old, now)
    with mock.patch.object(coding, "_by_exponent", lambda before: np.arange(len(before))):
        as_they_come = encoded(old, now)
        assert applied(old, as_they_come).tobytes() == now.tobytes()
    assert applied(old, sorted_moves).tobytes() == now.tobytes()
    assert len(sorted_moves) < 0.98 * len(as_they_come)


# --- what changed ---


@settings(max_examples=100)
@given(
    itemsize=ITEM_BYTES, size=st.integers(0, 300), seed=SEEDS, density=st.sampled_from([0, 0.01, 0.1, 0.5, 1]),
    block_bytes=st.sampled_from([8, 64, 1 << 20]),
)  # fmt: skip
def test_changed_finds_what_differs(itemsize: int, size: int, seed: int, density: float, block_bytes: int) -> None:
    old, now = random_step(itemsize, size, density, 1, seed)
    expected = np.flatnonzero(old != now).tolist()
    with mock.patch.object(coding, "BLOCK_BYTES", block_bytes):
        found = coding.changed(old, now, len(expected))
        assert found is not None
        assert (found.tolist(), found.dtype) == (expected, np.int64)
        if expected:
            assert coding.changed(old, now, len(expected) - 1) is None


@pytest.mark.parametrize("tail", range(5))
def test_changed_looks_at_whole_words_and_behind_the_last_one(tail: int) -> None:
    old = np.zeros(1000 + tail, "<u2")
    now = old.copy()
    now[[0, 5, 997, len(now) - 1]] = 1
    assert coding.changed(old, now, 10).tolist() == sorted({0, 5, 997, len(now) - 1})


# --- the threshold ---


def chosen(bits: np.ndarray, threshold: int) -> list[int]:
    small = SmallElements()
    small.choose(bits, threshold)
    return small.indices.tolist()


def test_threshold_is_between_the_small_and_the_large() -> None:
    """A tenth of the elements is small, and all that changes is small: the class holds these and nothing else."""
    old = bf16(np.where(np.arange(50_000) % 10 == 3, 1e-6, 1.0))
    assert chosen(old, choose_threshold(old, old[3::20], 0)) == list(range(3, 50_000, 10))


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("density", [0.03, 0.5, 1.0])
def test_threshold_is_none_where_changes_do_not_depend_on_magnitude(itemsize: int, density: float) -> None:
    old, now = random_step(itemsize, 20_000, density, 3, 0)
    assert choose_threshold(old, old[old != now], 0) == 0


def test_threshold_in_use_is_kept_while_it_is_nearly_as_good() -> None:
    old, now = step(3)
    before = old[old != now]
    best = choose_threshold(old, before, 0)
    one_exponent = 1 << 8
    assert choose_threshold(old, before, best) == best
    kept = [used for used in range(one_exponent, 1 << 16, one_exponent) if choose_threshold(old, before, used) == used]
    assert best in kept
    assert 1 < len(kept) < 20
    assert {choose_threshold(old, before, used) for used in {one_exponent, best + 20 * one_exponent}} == {best}


def test_threshold_bounds_the_share_of_small_elements() -> None:
    """Two fifths are small, and change: one class all the same, for the memory that indices take."""
    for share, expected in ((0.4, False), (0.2, True)):
        size = 50_000
        old = bf16(np.where(np.arange(size) < share * size, 1e-6, 1.0))
        threshold = choose_threshold(old, old[: int(share * size) : 2], 0)
        assert (threshold > 0) is expected
        assert len(chosen(old, threshold)) == (share * size if expected else 0)


def test_threshold_comes_from_a_sample_and_survives_a_wrong_one() -> None:
    """All that changed lies between the sampled elements, where the magnitudes are others."""
    old = np.full(3 * coding.SAMPLE, 0x3F80, "<u2")
    old[1::3] = np.arange(coding.SAMPLE) % 7
    now = old.copy()
    now[1::3] += 1
    assert applied(old, encoded(old, now)).tolist() == now.tolist()


# --- the remembered class ---


def fresh(bits: np.ndarray, threshold: int) -> list[int]:
    """The class by its definition."""
    without_sign = bits & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)
    return [i for i, value in enumerate(without_sign.tolist()) if 2 * value < threshold]


@settings(max_examples=100)
@given(
    itemsize=ITEM_BYTES, size=st.integers(0, 200), seed=SEEDS, share=st.integers(0, 255),
    block_bytes=st.sampled_from([16, 1 << 20]),
)  # fmt: skip
def test_small_elements_are_those_below_the_threshold(
    itemsize: int, size: int, seed: int, share: int, block_bytes: int
) -> None:
    old, _ = random_step(itemsize, size, 0, 1, seed)
    small = SmallElements()
    for threshold in (share, 255 - share, share // 2, 0, share):
        threshold <<= 8 * itemsize - 8
        with mock.patch.object(coding, "BLOCK_BYTES", block_bytes):
            small.choose(old, threshold)
        assert small.indices.tolist() == fresh(old, threshold)
        assert small.bits.tolist() == old[small.indices].tolist()


def test_small_elements_look_at_everything_only_for_a_higher_threshold() -> None:
    old, _ = step(1)
    small = SmallElements()
    small.choose(old, 0x7000)
    with mock.patch.object(coding, "blocks", side_effect=AssertionError("a pass over all elements")):
        for threshold in (0x7000, 0x6F00, 0x6F00, 0x6000):
            small.choose(old, threshold)
            assert small.indices.tolist() == fresh(old, threshold)
        with pytest.raises(AssertionError, match="a pass"):
            small.choose(old, 0x6100)


@settings(max_examples=150)
@given(
    itemsize=ITEM_BYTES, size=st.integers(1, 300), seed=SEEDS, density=st.sampled_from([0.02, 0.3, 1.0]),
    share=st.integers(0, 255), spread=st.sampled_from([1, 2**62]),
)  # fmt: skip
def test_small_elements_follow_what_crosses_the_threshold(
    itemsize: int, size: int, seed: int, density: float, share: int, spread: int
) -> None:
    """Three versions long: whoever remembers has the same as who looks at all elements again."""
    small, threshold = SmallElements(), share << 8 * itemsize - 8
    now, _ = random_step(itemsize, size, 0, 1, seed)
    small.choose(now, threshold)
    for number in range(3):
        _, moved = random_step(itemsize, size, density, spread, seed + number)
        old, now = now, moved
        indices = np.flatnonzero(old != now)
        is_inside = np.isin(indices, small.indices)
        places = np.searchsorted(small.indices, indices[is_inside])
        others = indices[~is_inside]
        small.follow(places, now[small.indices[places]], others, now[others])
        assert small.indices.tolist() == (fresh(now, threshold) if threshold else [])
        assert small.bits.tolist() == now[small.indices].tolist()


def test_small_elements_are_the_same_on_both_sides() -> None:
    sent, received = SmallElements(), SmallElements()
    rng = np.random.default_rng(4)
    master = rng.normal(0, 0.05, 30_000).astype("<f4")
    held = bf16(master)
    thresholds = set()
    for lr in (1e-6, 1e-6, 1e-5, 1e-3, 1e-6):
        old = bf16(master)
        master += lr * rng.choice([-1, 1], len(master)).astype("<f4")
        now = bf16(master)
        held = applied(held, encoded(old, now, sent), received)
        assert held.tobytes() == now.tobytes()
        assert sent.threshold == received.threshold
        assert sent.indices.tolist() == received.indices.tolist() == (fresh(now, sent.threshold))
        thresholds.add(sent.threshold)
    assert len(thresholds) > 2, "the class was not only followed but chosen anew"


# --- integers and planes ---


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_zigzag_puts_small_numbers_of_either_sign_first(width: int) -> None:
    dtype = np.dtype(f"<u{width // 8}")
    top = 2**width - 1
    moves = np.array([0, top, 1, top - 1, 2, top // 2, top // 2 + 1], dtype)  # 0, -1, 1, -2, 2, the largest ones
    assert coding.zigzag(moves).tolist() == [0, 1, 2, 3, 4, top - 1, top]
    assert coding.unzigzag(coding.zigzag(moves)).tolist() == moves.tolist()


def test_zigzag_is_undone_for_every_number_of_sixteen_bits() -> None:
    everything = np.arange(1 << 16).astype("<u2")
    assert sorted(coding.zigzag(everything).tolist()) == everything.tolist()
    assert coding.unzigzag(coding.zigzag(everything)).tolist() == everything.tolist()


def test_planes_are_the_bytes_of_one_place_each() -> None:
    values = np.array([0x0102, 0x0304, 0xFF00], "<u2")
    assert [plane.tolist() for plane in coding.planes(values)] == [[2, 4, 0], [1, 3, 255]]
    assert coding.join(coding.planes(values), values.dtype, 3).tolist() == values.tolist()
    assert coding.join(coding.planes(values)[:1], np.dtype("<u4"), 3).tolist() == [2, 4, 0]
    assert coding.join([], np.dtype("<u2"), 2).tolist() == [0, 0]


def test_planes_are_packed_where_that_is_smaller() -> None:
    noise, constant = np.frombuffer(np.random.default_rng(0).bytes(5000), np.uint8), np.zeros(5000, np.uint8)
    data = coding.pack([noise, constant, noise[:0]])
    assert data[: 8 + 5000] == LENGTH.pack(5000) + noise.tobytes()
    assert len(data) < 5000 + 3 * 8 + 30
    found, rest = coding.unpack(memoryview(data)[:-8], 2, 5000)
    assert [plane.tobytes() for plane in found] == [noise.tobytes(), constant.tobytes()]
    assert not rest


def test_planes_of_zeros_above_the_last_one_in_use_are_left_out() -> None:
    old = np.zeros(5000, "<u8")
    now = old.copy()
    now[::300] = 5
    payload = encoded(old, now)
    (threshold,) = LENGTH.unpack_from(payload)
    assert threshold == 0
    assert PART.unpack_from(payload, LENGTH.size) == (0, 0, 0), "no small class"
    assert PART.unpack_from(payload, LENGTH.size + PART.size) == (17, 2, 1), "gaps of 299, moves of 10"


# --- what is damaged ---


def test_damage_is_refused_or_shows_in_the_bytes() -> None:
    """A digest of the tensor finds the rest; nothing but WeightsError may come of it, and nothing be half applied."""
    old, now = step(2, size=1500, lr=1e-4)
    payload = encoded(old, now)
    refused = 0
    for place in range(len(payload)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[place] ^= flip
            bits = old.copy()
            try:
                apply_changes(memoryview(damaged), bits, SmallElements())
            except WeightsError:
                refused += 1
                assert bits.tobytes() == old.tobytes()
    assert refused > len(payload) / 2
    for end in range(1, len(payload)):
        with pytest.raises(WeightsError):
            applied(old, payload[:end])
    with pytest.raises(WeightsError, match="1 bytes too many"):
        applied(old, payload + b"x")


def frame(data: bytes, window_log: int = 19) -> bytes:
    """A plane as zstandard packs it, with its length."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    coder = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = coder.compress(data) + coder.flush()
    return raw(*packed)


def raw(*values: int) -> bytes:
    """A plane as it is, with its length."""
    return LENGTH.pack(len(values)) + bytes(values)


def part(count: int, gaps: list[bytes], moves: list[bytes]) -> bytes:
    return PART.pack(count, len(gaps), len(moves)) + b"".join([*gaps, *moves])


NO_SMALL = LENGTH.pack(0) + part(0, [], [])
NAMES_ITS_SIZE = zstandard.ZstdCompressor(1).compress(bytes(600))
NAMES_ANOTHER = b"\x28\xb5\x2f\xfd\xe0" + (2**50).to_bytes(8, "little") + bytes([3, 0, 0, 7])
HOSTILE = {
    "no threshold": (b"\0", "7 bytes too early"),
    "no parts": (LENGTH.pack(0), "10 bytes too early"),
    "one part": (NO_SMALL, "10 bytes too early"),
    "more elements than there are": (
        NO_SMALL + part(1001, [], []),
        r"delta of 1001 elements in 0 \+ 0 planes, of 1000",
    ),
    "more than any number": (NO_SMALL + PART.pack(2**64 - 1, 8, 2), "delta of 18446744073709551615 elements"),
    "more in the class than it has": (LENGTH.pack(2) + part(1001, [], []), "delta of 1001 elements"),
    "an element of an empty class": (LENGTH.pack(0) + part(1, [], []), r"delta of 1 elements in 0 \+ 0 planes, of 0"),
    "nine planes of gaps": (NO_SMALL + part(1, [raw(0)] * 9, []), r"in 9 \+ 0 planes"),
    "three planes of moves": (NO_SMALL + part(1, [], [raw(0)] * 3), r"in 0 \+ 3 planes"),
    "a gap beyond the end": (NO_SMALL + part(1, [raw(0xE8), raw(3)], []), "a gap of 1000, there are 1000"),
    "the largest gap": (NO_SMALL + part(1, [raw(255)] * 8, []), "a gap of 18446744073709551615"),
    "gaps that add up to more": (NO_SMALL + part(2, [raw(0xE7, 0), raw(3, 0)], []), "element 1000, there are 1000"),
    "a plane without a length": (NO_SMALL + PART.pack(1, 0, 1), "8 bytes too early"),
    "a plane cut off": (NO_SMALL + PART.pack(3, 0, 1) + raw(1, 2, 3)[:-1], "a plane of 2 bytes, expected 3"),
    "a plane too long": (NO_SMALL + part(3, [], [raw(1, 2, 3, 4)]), "a plane of 4 bytes, expected 3"),
    "a plane of any length": (NO_SMALL + PART.pack(3, 0, 1) + b"\xff" * 8, "a plane of 0 bytes, expected 3"),
    "no frame": (NO_SMALL + part(600, [], [raw(1, 2, 3)]), "zstandard cannot read"),
    "an empty frame": (NO_SMALL + part(600, [], [raw()]), "zstandard cannot read"),
    "a frame with too little": (NO_SMALL + part(600, [], [frame(bytes(599))]), "a plane of 599 bytes, expected 600"),
    "a frame with too much": (NO_SMALL + part(600, [], [frame(bytes(10**6))]), "zstandard cannot read"),
    "a frame that names its size": (NO_SMALL + part(600, [], [raw(*NAMES_ITS_SIZE)]), "names its own size"),
    "a frame that names a petabyte": (NO_SMALL + part(600, [], [raw(*NAMES_ANOTHER)]), "names its own size"),
    "a frame that asks for memory": (NO_SMALL + part(600, [], [frame(bytes(600), window_log=27)]), "too much memory"),
    "more behind the end": (NO_SMALL + part(0, [], []) + b"..", "2 bytes too many"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_payload_is_refused_untouched_and_takes_no_memory(case: str) -> None:
    payload, complaint = HOSTILE[case]
    bits = np.arange(1000).astype("<u2")
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=complaint):
            apply_changes(memoryview(payload), bits, SmallElements())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bits.tolist() == list(range(1000))
    assert peak < 200_000


def test_payload_spelled_out() -> None:
    """Byte by byte, for people who write a second decoder: threshold, then (count, planes, planes) of each class."""
    payload = (4).to_bytes(8, "little")  # small: twice the bits without the sign are below 4
    payload += b"\1\0\0\0\0\0\0\0" + b"\1\1" + raw(1) + raw(1)  # the second small one moves by -1
    payload += b"\2\0\0\0\0\0\0\0" + b"\1\1" + raw(2, 1) + raw(2, 3)  # elements 2 and 4 by 1 and -2
    bits, small = np.array([5, 0, 6, 0x8001, 7, 1], "<u2"), SmallElements()
    changes = [(indices.tolist(), after.tolist()) for indices, after in apply_changes(memoryview(payload), bits, small)]
    assert changes == [([3], [0x8000]), ([2, 4], [7, 5])]
    assert bits.tolist() == [5, 0, 7, 0x8000, 5, 1]
    assert small.indices.tolist() == [1, 3, 5]
    with mock.patch.object(coding, "choose_threshold", return_value=4):
        assert encoded(np.array([5, 0, 6, 0x8001, 7, 1], "<u2"), bits) == payload
