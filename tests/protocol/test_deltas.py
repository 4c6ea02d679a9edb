"""Deltas of whole versions: every bit comes back along any chain, and what is damaged is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import coding, deltas
from protocol.coding import SmallElements
from protocol.deltas import DeltaCoder, payload_digest, runs
from protocol.errors import WeightsError
from protocol.messages import Delta, DeltaPart
from protocol.tensors import DTYPES, nbytes
from protocol.weights import Snapshot, check_chain, check_data, layout, make_snapshot

Tensors = Sequence[tuple[str, tuple[int, ...]]]
"""(dtype, shape) of each."""


def bf16(values: np.ndarray) -> np.ndarray:
    """Upper halves of float32, as uint16."""
    return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2")


def version(number: int, bits: Sequence[np.ndarray], dtype: str = "bfloat16") -> Snapshot:
    """One-dimensional tensors of one type."""
    specs = layout((f"w{n}", dtype, (len(one),)) for n, one in enumerate(bits))
    return make_snapshot(number, number, specs, memoryview(b"".join(one.tobytes() for one in bits)))


def random_step(tensors: Tensors, density: float, spread: int, seed: int) -> tuple[Snapshot, Snapshot]:
    """Tensors of any bits, and the same with a share of the elements moved by up to `spread` in either direction."""
    rng = np.random.default_rng(seed)
    specs = layout((f"w{n}", dtype, shape) for n, (dtype, shape) in enumerate(tensors))
    size = sum(int(np.prod(shape)) * DTYPES[dtype][0] for dtype, shape in tensors)
    old = bytearray(rng.bytes(size))
    now = bytearray(old)
    for run in runs(specs):
        bits = run.bits(memoryview(now))
        moves = rng.integers(-spread, spread + 1, len(bits)).view("<u8").astype(bits.dtype)
        bits += np.where(rng.random(len(bits)) < density, moves, 0).astype(bits.dtype)
    return make_snapshot(1, 1, specs, memoryview(old)), make_snapshot(2, 2, specs, memoryview(now))


def decoded(coder: DeltaCoder, delta: Delta, payload: bytes, base: Snapshot, new: Snapshot) -> bytes:
    """What the coder makes of the base; the changes that it returns lead there, too."""
    target = bytearray(base.data)
    changed = coder.decode(delta, payload, new.manifest.tensors, memoryview(target))
    copied = bytearray(base.data)
    for run, indices, after in changed:
        bits = run.bits(memoryview(copied))
        if indices is None:
            bits[:] = run.bits(memoryview(target))
        else:
            bits[indices] = after
    assert copied == target
    return bytes(target)


def remembered(coder: DeltaCoder) -> dict[tuple[int, int], tuple[int, list[int]]]:
    return {key: (small.threshold, small.indices.tolist()) for key, small in coder._small.items()}


def computed(coder: DeltaCoder, held: Snapshot) -> dict[tuple[int, int], tuple[int, list[int]]]:
    """What `remembered` must be: the small elements of the version, by the thresholds in use."""
    specs, found = held.manifest.tensors, {}
    for (first, count), small in coder._small.items():
        bits = deltas._run(specs, first, count).bits(held.data)
        (anew := SmallElements()).choose(bits, small.threshold)
        found[first, count] = small.threshold, anew.indices.tolist()
    return found


class Learner:
    """Weights whose versions differ by updates of one size for each element, as Adam's first ones do."""

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights = [self.rng.normal(0, 0.05, size).astype("<f4") for size in sizes]
        self.number = 0

    def step(self, lr: float, tensors: Sequence[int] | None = None) -> Snapshot:
        """The version after an update of these tensors, or of all."""
        for n in range(len(self.weights)) if tensors is None else tensors:
            self.weights[n] += np.float32(lr) * self.rng.choice([-1, 1], len(self.weights[n])).astype("<f4")
        self.number += 1
        return version(self.number, [bf16(one) for one in self.weights])


def encode(base: Snapshot, new: Snapshot, coder: DeltaCoder | None = None) -> tuple[Delta, bytes]:
    found = (coder or DeltaCoder(1)).encode(base, new)
    assert found is not None
    return found


# --- round trips ---


DTYPE = st.sampled_from(sorted(DTYPES))
SHAPE = st.sampled_from([(), (0,), (1,), (3,), (7, 3), (0, 4), (5, 1, 13), (64, 16), (1001,)])


@settings(max_examples=100)
@given(
    tensors=st.lists(st.tuples(DTYPE, SHAPE), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.002, 0.05, 0.2, 0.6, 1.0]), spread=st.sampled_from([1, 3, 200, 2**62]),
    run_bytes=st.sampled_from([1, 300, 16 << 20]), block_bytes=st.sampled_from([64, 4 << 20]),
)  # fmt: skip
def test_delta_of_any_tensors_gives_every_bit(
    tensors: Tensors, seed: int, density: float, spread: int, run_bytes: int, block_bytes: int
) -> None:
    base, new = random_step(tensors, density, spread, seed)
    with mock.patch.multiple(deltas, RUN_BYTES=run_bytes), mock.patch.multiple(coding, BLOCK_BYTES=block_bytes):
        found = DeltaCoder(1).encode(base, new)
    if found is None:
        assert density > 0.1 or len(new.data) < 2000, "nothing was to be won"
        return
    delta, payload = found
    assert decoded(DeltaCoder(1), delta, payload, base, new) == new.data
    assert len(payload) == delta.nbytes == sum(part.nbytes for part in delta.parts) < max(1, len(new.data))
    assert sum(part.tensors for part in delta.parts) == len(tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_delta_keeps_every_bit_pattern_of_sixteen_bits(dtype: str) -> None:
    """Among them all NaNs with their payloads, infinities, subnormals and both zeros."""
    patterns = np.arange(1 << 16).astype("<u2")
    for number, other in enumerate((patterns ^ 0x8000, patterns + 1, patterns[::-1], np.roll(patterns, 77)), 2):
        now = np.where(np.arange(1 << 16) % 3, patterns, other).astype("<u2")
        base, new = version(1, [patterns], dtype), version(number, [now], dtype)
        assert decoded(DeltaCoder(1), *encode(base, new), base, new) == new.data


def test_delta_names_both_versions_by_their_digests() -> None:
    learner = Learner([100])
    base, new = learner.step(0), learner.step(1e-4)
    delta, payload = encode(base, new)
    assert (delta.base, delta.base_digest) == (1, base.manifest.digest)
    assert (delta.version, delta.digest) == (2, new.manifest.digest)
    assert (delta.nbytes, delta.payload_digest) == (len(payload), payload_digest(payload))
    check_chain(new.manifest, [delta])


def test_delta_of_an_unchanged_version_is_empty() -> None:
    learner = Learner([1000, 50])
    base, new = learner.step(0), learner.step(0)
    delta, payload = encode(base, new)
    assert (payload, delta.parts) == (b"", (DeltaPart(2, "delta", 0),))
    assert decoded(DeltaCoder(1), delta, payload, base, new) == new.data == base.data


@pytest.mark.parametrize(
    ("specs", "data"),
    [
        ([("w0", "bfloat16", (4,)), ("w1", "bfloat16", (2,))], bytes(12)),
        ([("w0", "bfloat16", (5,))], bytes(10)),
        ([("w0", "float16", (6,))], bytes(12)),
        ([("w0", "bfloat16", (3, 2))], bytes(12)),
        ([("other", "bfloat16", (6,))], bytes(12)),
        ([], b""),
    ],
)
def test_delta_to_other_tensors_is_none(specs: list[tuple[str, str, tuple[int, ...]]], data: bytes) -> None:
    base = version(1, [np.zeros(6, "<u2")])
    other = make_snapshot(2, 2, layout(specs), memoryview(data))
    assert DeltaCoder(1).encode(base, other) is None
    assert DeltaCoder(1).encode(other, base) is None


def test_delta_as_large_as_a_snapshot_is_none_and_the_next_one_is_right() -> None:
    rng = np.random.default_rng(0)
    coder = DeltaCoder(1)
    first, second = (version(n, [np.frombuffer(rng.bytes(20_000), "<u2").copy()]) for n in (1, 2))
    assert coder.encode(first, second) is None
    bits = np.frombuffer(second.data, "<u2").copy()
    bits[::40] += 1
    third = version(3, [bits])
    delta, payload = encode(second, third, coder)
    assert decoded(DeltaCoder(1), delta, payload, second, third) == third.data


# --- encodings ---


def sizes(base: Snapshot, new: Snapshot) -> dict[str, int]:
    """Bytes of a version of one tensor in each encoding."""
    (run,) = runs(new.manifest.tensors)
    old, now = run.bits(base.data), run.bits(new.data)
    return {
        "delta": len(coding.encode_changes(old, now, np.flatnonzero(old != now), SmallElements())),
        "moves": len(coding.pack(coding.planes(coding.zigzag(now - old)))),
        "zstd": len(coding.pack(coding.planes(now))),
        "dense": len(new.data),
    }


def noise(seed: int, size: int = 20_000) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(2 * size), "<u2").copy()


def moved(bits: np.ndarray, share: float, seed: int = 9) -> np.ndarray:
    """A share of the elements is one higher or one lower."""
    rng = np.random.default_rng(seed)
    moves = rng.choice([-1, 1], len(bits)).astype("<i2").view("<u2")
    return np.where(rng.random(len(bits)) < share, bits + moves, bits).astype("<u2")


@pytest.mark.parametrize(
    ("encoding", "old", "now"),
    [
        ("delta", noise(0), moved(noise(0), 0.01)),
        ("delta", noise(0), moved(noise(0), 0.12)),
        ("delta", noise(0), moved(noise(0), 0.2)),
        ("moves", noise(0), moved(noise(0), 0.9)),
        ("zstd", noise(0), noise(1) % 50),
        ("zstd", noise(0), np.zeros(20_000, "<u2")),
        ("zstd", np.where(np.arange(20_000) % 5, 0, noise(0)).astype("<u2"), np.zeros(20_000, "<u2")),
        ("dense", noise(0), noise(1)),
    ],
)
def test_delta_takes_the_smallest_encoding(encoding: str, old: np.ndarray, now: np.ndarray) -> None:
    same = np.zeros(1000, "<u2")  # so that a dense tensor is not a whole version
    base, new = version(1, [old, same]), version(2, [now, same])
    delta, payload = encode(base, new)
    measured = sizes(version(1, [old]), version(2, [now]))
    assert min(measured, key=measured.__getitem__) == encoding
    assert delta.parts[0].encoding == encoding
    assert delta.nbytes == measured[encoding]
    assert decoded(DeltaCoder(1), delta, payload, base, new) == new.data


def test_delta_has_one_part_for_many_sparse_tensors_and_one_each_if_any_is_not() -> None:
    learner = Learner([3000, 20, 3000])
    base = learner.step(0)
    sparse = learner.step(1e-6)
    assert [(part.tensors, part.encoding) for part in encode(base, sparse)[0].parts] == [(3, "delta")]
    learner.weights[1] *= 2
    mixed = learner.step(1e-6)
    delta, payload = encode(sparse, mixed)
    assert [part.tensors for part in delta.parts] == [1, 1, 1]
    assert [part.encoding for part in delta.parts][::2] == ["delta", "delta"]
    assert decoded(DeltaCoder(1), delta, payload, sparse, mixed) == mixed.data


def test_runs_are_of_one_type_and_of_a_bounded_size() -> None:
    tensors = [("float32", 4), ("float32", 4), ("int32", 4), ("bfloat16", 8), ("bfloat16", 8), ("bfloat16", 40)]
    specs = layout((f"w{n}", dtype, (size,)) for n, (dtype, size) in enumerate(tensors))
    with mock.patch.object(deltas, "RUN_BYTES", 32):
        found = list(runs(specs))
    assert [(run.first, run.count, run.start, run.stop, run.itemsize) for run in found] == [
        (0, 2, 0, 32, 4),
        (2, 1, 32, 48, 4),
        (3, 2, 48, 80, 2),
        (5, 1, 80, 160, 2),
    ]
    assert list(runs([])) == []


def differing(base: Snapshot, new: Snapshot) -> list[np.ndarray]:
    """Of each tensor the indices of its changed elements."""
    sides = [
        [np.frombuffer(one.data[spec.offset :][: nbytes(spec)], "<u2") for spec in one.manifest.tensors]
        for one in (base, new)
    ]
    return [np.flatnonzero(old != now) for old, now in zip(*sides, strict=True)]


def test_delta_is_the_same_if_the_caller_knows_what_changed() -> None:
    """As the publisher with a model on a GPU does: indices of each tensor, None where they are too many."""
    learner = Learner([4000, 10, 0, 3000, 2000], seed=5)
    base = learner.step(0)
    learner.weights[3] *= 2
    learner.weights[4][::6] *= 2
    mixed = learner.step(1e-6)
    found = differing(base, mixed)
    shares = [len(one) / size for one, size in zip(found, (4000, 10, 1, 3000, 2000), strict=True)]
    assert shares[0] < deltas.SURELY_SMALLEST < shares[4] < deltas.MOST_PLACES < shares[3]
    changed = [None if share > deltas.MOST_PLACES else one for share, one in zip(shares, found, strict=True)]
    told = DeltaCoder(1).encode(base, mixed, changed)
    assert told == encode(base, mixed)
    assert [part.tensors for part in told[0].parts] == [1] * 5
    sparse = learner.step(1e-6)
    told = DeltaCoder(1).encode(mixed, sparse, differing(mixed, sparse))
    assert told == encode(mixed, sparse)
    assert [part.tensors for part in told[0].parts] == [5]
    assert all(len(one) for one in differing(mixed, sparse)[3:])
    assert decoded(DeltaCoder(1), *told, mixed, sparse) == sparse.data


def test_delta_is_the_same_by_any_number_of_threads() -> None:
    with mock.patch.object(deltas, "RUN_BYTES", 5000):
        learner = Learner([2000] * 10 + [20_000])
        coders = [DeltaCoder(threads) for threads in (1, 4)]
        held = learner.step(0)
        for lr in (1e-6, 1e-6, 1e-2, 1e-6):
            base, held = held, learner.step(lr)
            first, second = (encode(base, held, coder) for coder in coders)
            assert first == second
            assert len(first[0].parts) > 5
            for threads in (1, 4):
                assert decoded(DeltaCoder(threads), *first, base, held) == held.data


# --- chains ---


def test_chain_of_fifty_versions_with_one_encoder_and_one_decoder() -> None:
    """The small class is followed on both sides and rarely computed again; others join on the way."""
    learner = Learner([10_000, 2000, 40_000], seed=3)
    encoder, decoder, late, absent = (DeltaCoder(1) for _ in range(4))
    held = learner.step(0)
    num_followed, thresholds = 0, set()
    for number in range(2, 52):
        base, held = held, learner.step(6e-6 if number % 20 > 10 else 3e-7)
        before = remembered(encoder)
        with (
            mock.patch.object(coding, "blocks", side_effect=coding.blocks) as passes,
            mock.patch.object(coding, "changed", side_effect=coding.changed) as searches,
        ):
            delta, payload = encode(base, held, encoder)
        after = remembered(encoder)
        assert decoded(decoder, delta, payload, base, held) == held.data
        assert after == remembered(decoder) == computed(encoder, held)
        has_new_threshold = {key: one[0] for key, one in before.items()} != {key: one[0] for key, one in after.items()}
        assert passes.call_count - searches.call_count == has_new_threshold
        num_followed += not has_new_threshold and before != after
        thresholds |= {threshold for threshold, _ in after.values()}
        if number > 25:  # joins with a snapshot of version 25
            assert decoded(late, delta, payload, base, held) == held.data
            assert remembered(late) == after
        if not 20 < number < 30:  # misses these, and goes on from a snapshot
            assert decoded(absent, delta, payload, base, held) == held.data
            assert remembered(absent) == after
    assert num_followed > 20
    assert len(thresholds) > 1


def test_chain_over_versions_coded_in_other_parts_remembers_nothing_old() -> None:
    """A large update of one tensor makes single parts of what was one; the one's small class was not followed then."""
    learner = Learner([5000, 5000], seed=6)
    for weights in learner.weights:
        weights[::40] = 0  # so that two classes are worth it
    encoder, decoder = DeltaCoder(1), DeltaCoder(1)
    held = learner.step(0)
    parts = []
    for number in range(12):
        base, held = held, learner.step(1e-6) if number % 3 else learner.step(1e-2, [0])
        delta, payload = encode(base, held, encoder)
        parts.append([part.tensors for part in delta.parts])
        assert decoded(decoder, delta, payload, base, held) == held.data
        assert decoded(DeltaCoder(1), delta, payload, base, held) == held.data
        assert remembered(encoder) == remembered(decoder) == computed(decoder, held)
    assert parts == [[1, 1], [2], [2]] * 4


def test_chain_is_left_out_for_a_snapshot_and_the_old_memory_with_it() -> None:
    """The decoder's target is another version than the one that it saw last."""
    learner = Learner([20_000], seed=7)
    encoder, decoder = DeltaCoder(1), DeltaCoder(1)
    versions = [learner.step(1e-5) for _ in range(6)]
    made = [encode(base, new, encoder) for base, new in pairwise(versions)]
    for number in (0, 1, 4, 0, 2, 3):
        base, new = versions[number : number + 2]
        assert decoded(decoder, *made[number], base, new) == new.data
        assert remembered(decoder) == computed(decoder, new)
        assert remembered(decoder)


# --- what is damaged ---


@pytest.fixture(scope="module")
def mixed() -> tuple[Snapshot, Snapshot, Delta, bytes]:
    """A small version with a part of every encoding."""
    rng = np.random.default_rng(1)
    weights = bf16(rng.normal(0, 0.05, 400))
    words = np.frombuffer(rng.bytes(160), "<u2").copy()
    old = [weights, words, words, words]
    new = [moved(weights, 0.05), moved(words, 1.0), words % 3, np.frombuffer(rng.bytes(160), "<u2").copy()]
    base, made = version(1, old), version(2, new)
    delta, payload = encode(base, made)
    assert [part.encoding for part in delta.parts] == ["delta", "moves", "zstd", "dense"]
    assert decoded(DeltaCoder(1), delta, payload, base, made) == made.data
    return base, made, delta, payload


Mixed = tuple[Snapshot, Snapshot, Delta, bytes]


def test_damage_of_any_byte_of_a_payload_is_found_before_anything_is_written(mixed: Mixed) -> None:
    base, new, delta, payload = mixed
    target, damaged, refused = bytearray(base.data), bytearray(payload), 0
    coder = DeltaCoder(1)
    for place, right in enumerate(payload):
        for value in range(256):
            damaged[place] = value
            try:
                if value != right:
                    coder.decode(delta, damaged, new.manifest.tensors, memoryview(target))
            except WeightsError:
                refused += 1
        damaged[place] = right
    assert refused == 255 * len(payload)
    for other in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(WeightsError, match=f"delta of version 2: {len(other)} bytes with a wrong digest"):
            coder.decode(delta, other, new.manifest.tensors, memoryview(target))
    assert target == base.data
    coder.decode(delta, memoryview(payload), new.manifest.tensors, memoryview(target))
    assert target == new.data


def test_damage_under_a_digest_that_fits_is_refused_or_found_in_the_tensors(mixed: Mixed) -> None:
    """Somebody who makes payloads, and no mere accident: a wrong tensor is never taken for the right one."""
    base, new, delta, payload = mixed
    refused = found = 0
    for place in range(len(payload)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[place] ^= flip
            forged = msgspec.structs.replace(delta, payload_digest=payload_digest(bytes(damaged)))
            target = bytearray(base.data)
            try:
                DeltaCoder(1).decode(forged, bytes(damaged), new.manifest.tensors, memoryview(target))
            except WeightsError:
                refused += 1
                continue
            if target != new.data:
                found += 1
                with pytest.raises(WeightsError, match="version 2: wrong digest of tensor w"):
                    check_data(new.manifest, memoryview(target))
    assert refused > 100
    assert found > 500


def test_delta_on_another_base_is_found_in_the_tensors() -> None:
    """Whoever applies it knows better by `base_digest`; this is what would come of it."""
    learner = Learner([3000])
    versions = [learner.step(1e-5) for _ in range(3)]
    delta, payload = encode(*versions[1:])
    assert delta.base_digest not in (versions[0].manifest.digest, versions[2].manifest.digest)

    def apply(base: Snapshot) -> None:
        target = bytearray(base.data)
        DeltaCoder(1).decode(delta, payload, versions[2].manifest.tensors, memoryview(target))
        check_data(versions[2].manifest, memoryview(target))

    apply(versions[1])
    for other in (versions[0], versions[2]):
        with pytest.raises(WeightsError):
            apply(other)


def forged(delta: Delta, payload: bytes, *parts: DeltaPart) -> Delta:
    return msgspec.structs.replace(
        delta, parts=parts, nbytes=len(payload), payload_digest=payload_digest(payload)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "payload", "complaint"),
    [
        ([], b"", "parts up to tensor 0 of 3, byte 0"),
        ([(2, "delta", 0)], b"", "parts up to tensor 2 of 3, byte 0"),
        ([(2, "delta", 0), (1, "delta", 0), (1, "delta", 0)], b"", "a part of 1 tensors at tensor 3"),
        ([(3, "delta", 0)], b"", "a part of 3 tensors at tensor 0"),  # not all of one type
        ([(1, "delta", 0), (2, "delta", 0)], b"", "a part of 2 tensors at tensor 1"),
        ([(2, "delta", 0), (2, "delta", 0)], b"", "a part of 2 tensors at tensor 2"),
        ([(2, "delta", 0), (2**62, "delta", 0)], b"", "a part of 4611686018427387904 tensors at tensor 2"),
        ([(0, "delta", 0), (2, "delta", 0), (1, "delta", 0)], b"", "a part of 0 tensors at tensor 0"),
        ([(-1, "delta", 0), (2, "delta", 0), (1, "delta", 0)], b"", "a part of -1 tensors at tensor 0"),
        ([(2, "delta", 0), (1, "delta", 1)], b"", "a part of 1 bytes at byte 0"),
        ([(2, "dense", 12), (1, "dense", 4)], bytes(15), "a part of 4 bytes at byte 12"),
        ([(2, "dense", 12), (1, "dense", 2)], bytes(16), "parts up to tensor 3 of 3, byte 14"),
        ([(2, "dense", 2**62), (1, "dense", 4)], bytes(16), "a part of 4611686018427387904 bytes at byte 0"),
        ([(2, "dense", -4), (1, "dense", 4)], b"", "a part of -4 bytes at byte 0"),
        ([(2, "dense", 12), (1, "dense", -12)], bytes(12), "a part of -12 bytes at byte 12"),
        ([(2, "dense", 11), (1, "delta", 0)], bytes(11), "11 bytes of encoding 'dense' for 12 bytes of tensors"),
        ([(2, "zip", 12), (1, "delta", 0)], bytes(12), "12 bytes of encoding 'zip' for 12 bytes of tensors"),
        ([(2, "", 0), (1, "delta", 0)], b"", "0 bytes of encoding '' for 12 bytes of tensors"),
        ([(2, "zstd", 0), (1, "delta", 0)], b"", "payload ends 8 bytes too early"),
        ([(2, "moves", 7), (1, "delta", 0)], bytes(7), "payload ends 1 bytes too early"),
        ([(2, "delta", 1), (1, "delta", 0)], bytes(1), "payload ends 7 bytes too early"),
    ],
)  # fmt: skip
def test_delta_whose_parts_are_not_the_tensors_is_refused(
    parts: list[tuple[int, str, int]], payload: bytes, complaint: str
) -> None:
    specs = layout([("a", "float32", (2,)), ("b", "float32", ()), ("c", "int32", ())])
    base = make_snapshot(1, 1, specs, memoryview(bytes(range(16))))
    new = make_snapshot(2, 2, specs, base.data)
    target = bytearray(base.data)
    delta = forged(encode(base, new)[0], payload, *(DeltaPart(*part) for part in parts))
    with pytest.raises(WeightsError, match=complaint):
        DeltaCoder(1).decode(delta, payload, specs, memoryview(target))
    assert target == base.data


@pytest.mark.parametrize("encoding", ["delta", "moves", "zstd"])
@pytest.mark.parametrize("size", [2**20, 2**40, 2**60])
def test_delta_takes_no_more_memory_than_its_tensors(encoding: str, size: int) -> None:
    """Whatever sizes a payload speaks of."""
    frame = b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + bytes([3, 0, 0, 7])
    plane = coding.LENGTH.pack(len(frame)) + frame
    payload = plane * 2
    if encoding == "delta":
        none = coding.LENGTH.pack(0) + coding.PART.pack(0, 0, 0)
        payload = none + coding.PART.pack(1000, 0, 1) + plane
    learner = Learner([1000])
    base, new = learner.step(0), learner.step(1e-6)
    delta = forged(encode(base, new)[0], payload, DeltaPart(1, encoding, len(payload)))
    target = bytearray(base.data)
    coder = DeltaCoder(1)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match="names its own size"):
            coder.decode(delta, payload, new.manifest.tensors, memoryview(target))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("damage", ["payload", "parts", "second part"])
def test_delta_that_fails_leaves_no_memory_of_the_version_it_did_not_make(damage: str) -> None:
    learner = Learner([20_000, 300], seed=8)
    versions = [learner.step(1e-5) for _ in range(4)]
    specs = versions[0].manifest.tensors
    encoder, decoder = DeltaCoder(1), DeltaCoder(1)
    with mock.patch.object(deltas, "RUN_BYTES", 10_000):  # a part for each tensor
        made = [encode(base, new, encoder) for base, new in pairwise(versions)]
    assert decoded(decoder, *made[0], versions[0], versions[1]) == versions[1].data
    delta, payload = made[1]
    if damage == "payload":
        payload = payload[:-1] + bytes([payload[-1] ^ 1])
    elif damage == "parts":
        delta = forged(delta, payload, *delta.parts[:-1])
    else:
        payload = payload[:-1] + b"\xff\xff"
        first, second = delta.parts
        delta = forged(delta, payload, first, msgspec.structs.replace(second, nbytes=second.nbytes + 1))
    target = bytearray(versions[1].data)
    with pytest.raises(WeightsError):
        decoder.decode(delta, payload, specs, memoryview(target))
    assert (target == versions[1].data) is (damage != "second part")
    for number in (2, 1, 2):  # what the version in vain would have led to, then once more from the right base
        base, new = versions[number : number + 2]
        assert decoded(decoder, *made[number], base, new) == new.data
        assert remembered(decoder) == computed(decoder, new)


def test_encoding_that_fails_leaves_no_memory_of_the_version_it_did_not_make() -> None:
    learner = Learner([20_000, 300], seed=8)
    versions = [learner.step(1e-5) for _ in range(4)]
    encoder = DeltaCoder(1)
    encode(versions[0], versions[1], encoder)
    with mock.patch.object(SmallElements, "follow", side_effect=MemoryError), pytest.raises(MemoryError):
        encoder.encode(versions[1], versions[2])
    for number in (2, 1):
        base, new = versions[number : number + 2]
        assert encode(base, new, encoder) == encode(base, new)
