"""What changed in a run of elements <-> bytes. Pure functions over arrays of bits; used by `deltas.py` alone.

A changed element is its place and its move. Places are coded as gaps, moves as the difference of the two bit patterns
as integers (modulo their width, small ones of either sign first), in the order of the elements' exponents. Both are cut
into planes of bytes, and zstandard codes each plane by entropy. Bits are compared, not values: NaNs, their payloads and
the sign of zero are kept.

An update of a size that hardly depends on the weight (Adam's) changes most small floats and hardly any large one, whose
neighbours lie further apart. So elements are two classes, below and above a threshold of magnitude, and places are
counted within each: both sides have the base, and with it the classes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import zstandard

from protocol.errors import WeightsError

LEVEL = 1
"""Of zstandard: what can be won here is entropy, which every level codes alike; higher ones look for repetitions."""
BLOCK_BYTES = 4 << 20
"""Looked at once: bounds the memory for indices. Smaller blocks stay in the cache, but make threads wait."""
SAMPLE = 1 << 14
"""Elements of a run from which its distribution of magnitudes is estimated."""
WORTH_SHARE = 0.8
"""Share of the estimated bytes below which a second class is worth the pass over all elements."""
KEPT_SHARE = 1.15
"""Excess over the best threshold's bytes up to which the one in use is kept: another one costs that pass again."""
MAX_SMALL_SHARE = 1 / 4
"""Of all elements: bounds the memory for the indices of the small class."""
MAX_WINDOW_BYTES = 8 << 20
"""Memory that a frame may ask for to be read; those of this level ask for half a mebibyte."""
PART = struct.Struct("<QBB")
"""Elements, planes of gaps, planes of moves."""
LENGTH = struct.Struct("<Q")


# --- the small class ---


@dataclass
class SmallElements:
    """The elements whose bits without the sign, times 2, lie below a threshold: their ascending indices, their bits.

    Remembered from one version to the next: an update moves few elements across the threshold.
    """

    threshold: int = 0
    indices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    bits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    def choose(self, bits: np.ndarray, threshold: int) -> None:
        """Be the class of `bits` by this threshold, with a pass over all of them if it is higher than before."""
        if threshold < self.threshold:  # all of them are known
            kept = _below(self.bits, threshold)
            self.indices, self.bits = self.indices.compress(kept), self.bits.compress(kept)
        elif threshold > self.threshold:
            found = [start + np.flatnonzero(_below(bits[part], threshold)) for start, part in blocks(bits)]
            self.indices = np.concatenate(found) if found else np.zeros(0, np.int64)
            self.bits = bits.take(self.indices)
        self.threshold = threshold

    def follow(self, places: np.ndarray, after: np.ndarray, others: np.ndarray, others_after: np.ndarray) -> None:
        """The elements at `places` of the class and at the indices `others` outside it have new bits."""
        if not self.threshold:
            return
        self.bits[places] = after
        left = places.compress(~_below(after, self.threshold))
        if len(left):
            self.indices, self.bits = np.delete(self.indices, left), np.delete(self.bits, left)
        enter = _below(others_after, self.threshold)
        entered = others.compress(enter)
        if len(entered):
            where = np.searchsorted(self.indices, entered)
            self.indices = np.insert(self.indices, where, entered)
            self.bits = np.insert(self.bits, where, others_after.compress(enter))


def _below(bits: np.ndarray, threshold: int) -> np.ndarray:
    return (bits + bits) < threshold  # the sum drops the sign


def choose_threshold(old: np.ndarray, before: np.ndarray, in_use: int) -> int:
    """The threshold that makes the places of the changed elements cheapest, by an estimate; 0: one class.

    `before`: what the changed elements were. For a float the upper eight bits behind the sign are its exponent.
    """
    shift = 8 * old.itemsize - 8
    sample = old[:: max(1, len(old) // SAMPLE)]
    total = np.bincount(_exponents(sample), minlength=256) * (len(old) / len(sample))
    hits = np.bincount(_exponents(before), minlength=256)
    total = np.maximum(total, hits)
    below, hits_below = np.cumsum(total), np.cumsum(hits)
    cost = _place_bits(below, hits_below) + _place_bits(below[-1] - below, hits_below[-1] - hits_below)
    allowed = np.where(below[:-1] <= MAX_SMALL_SHARE * below[-1], cost[:-1], np.inf)
    best = int(np.argmin(allowed))
    if not allowed[best] < WORTH_SHARE * cost[-1]:
        return 0
    used = (in_use >> shift) - 1
    return in_use if in_use and allowed[used] <= KEPT_SHARE * allowed[best] else (best + 1) << shift


def _exponents(bits: np.ndarray) -> np.ndarray:
    """[n] uint8: the upper eight bits behind the sign."""
    return ((bits << 1) >> (8 * bits.itemsize - 8)).astype(np.uint8)


def _place_bits(total: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Bits that name `hits` of `total` places: total x the entropy of their share."""
    share = np.clip(hits / np.maximum(total, 1), 1e-12, 1 - 1e-12)
    return -total * (share * np.log2(share) + (1 - share) * np.log2(1 - share))


# --- changed elements <-> bytes ---


def encode_changes(old: np.ndarray, now: np.ndarray, indices: np.ndarray, small: SmallElements) -> bytes:
    """threshold, then a part for each class: [count, planes] and the planes of gaps and moves.

    `indices`: ascending, where `old` and `now` differ. `small` is of `old`, and of `now` afterwards.
    """
    if not len(indices):
        return b""
    before = old.take(indices)
    threshold = choose_threshold(old, before, small.threshold)
    small.choose(old, threshold)
    became = now.take(small.indices)
    places = np.flatnonzero(small.bits != became)
    was, became = small.bits.take(places), became.take(places)
    is_other = ~_below(before, threshold)
    others, before = indices.compress(is_other), before.compress(is_other)
    after = now.take(others)
    small.follow(places, became, others, after)
    return LENGTH.pack(threshold) + _encode_part(places, was, became) + _encode_part(others, before, after)


def apply_changes(payload: memoryview, bits: np.ndarray, small: SmallElements) -> list[tuple[np.ndarray, np.ndarray]]:
    """Make `bits`, the base's, the new ones in place; [(indices of what has changed, its bits)]. `small` follows.

    Raises WeightsError for what cannot be a payload of so many elements, before anything is written.
    """
    if not payload:
        return []
    (threshold,), rest = _take(LENGTH, payload)
    small.choose(bits, threshold)
    places, small_moves, rest = _decode_part(rest, len(small.indices), bits.dtype)
    others, moves, rest = _decode_part(rest, len(bits), bits.dtype)
    end(rest)
    before = bits.take(others)
    if _below(before, threshold).any():
        raise WeightsError("delta with small elements among the others")
    changed, was = small.indices.take(places), small.bits.take(places)
    became, after = _moved(was, small_moves), _moved(before, moves)
    bits[changed] = became
    bits[others] = after
    small.follow(places, became, others, after)
    return [(changed, became), (others, after)]


def changed(old: np.ndarray, now: np.ndarray, at_most: int) -> np.ndarray | None:
    """[changed] int64, ascending: indices of the elements whose bits differ; None if they are more than `at_most`."""
    found, count = [np.zeros(0, np.int64)], 0
    for start, part in blocks(old):
        found.append(start + _changed(old[part], now[part]))
        count += len(found[-1])
        if count > at_most:
            return None
    return np.concatenate(found)


def _changed(old: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Of one block: words of eight bytes are compared first, then the elements of those that differ."""
    shift = 4 - old.itemsize.bit_length()  # a word has 2^shift elements
    whole = len(old) >> shift << shift
    old_words, now_words = old[:whole].view("<u8"), now[:whole].view("<u8")
    words = _few_true(old_words != now_words)
    if len(words) > len(old_words) // 4:
        return np.flatnonzero(old != now)
    moved = (old_words.take(words) ^ now_words.take(words)).view(old.dtype)
    inside = np.flatnonzero(moved != 0)
    found = (words.take(inside >> shift) << shift) + (inside & ((1 << shift) - 1))
    return np.concatenate([found, whole + np.flatnonzero(old[whole:] != now[whole:])])


def _few_true(flags: np.ndarray) -> np.ndarray:
    """np.flatnonzero, faster where few of the flags are true: eight are looked at at once."""
    whole = len(flags) >> 3 << 3
    groups = flags[:whole].view("<u8")
    hits = np.flatnonzero(groups != 0)
    inside = np.flatnonzero(groups.take(hits).view(bool))
    return np.concatenate([(hits.take(inside >> 3) << 3) + (inside & 7), whole + np.flatnonzero(flags[whole:])])


def _encode_part(places: np.ndarray, before: np.ndarray, after: np.ndarray) -> bytes:
    gaps = places.copy()
    gaps[1:] -= places[:-1] + 1
    gap_planes = _used(gaps)
    move_planes = _used(zigzag((after - before).take(_by_exponent(before))))
    return PART.pack(len(places), len(gap_planes), len(move_planes)) + pack([*gap_planes, *move_planes])


def _decode_part(data: memoryview, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, memoryview]:
    """(places in a class of `size`, moves ordered `_by_exponent`, what follows)."""
    (count, gap_planes, move_planes), data = _take(PART, data)
    if count > size or gap_planes > 8 or move_planes > dtype.itemsize:
        raise WeightsError(f"delta of {count} elements in {gap_planes} + {move_planes} planes, of {size}")
    found, data = unpack(data, gap_planes + move_planes, count)
    gaps = join(found[:gap_planes], np.dtype("<u8"), count)
    if count and gaps.max() >= size:
        raise WeightsError(f"delta with a gap of {gaps.max()}, there are {size} elements")
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if count and places[-1] >= size:
        raise WeightsError(f"delta of element {places[-1]}, there are {size}")
    return places, unzigzag(join(found[gap_planes:], dtype, count)), data


def _by_exponent(before: np.ndarray) -> np.ndarray:
    """The order in which moves are coded: those of elements of one magnitude, which are alike, next to each other."""
    return np.argsort(_exponents(before), kind="stable")


def _moved(before: np.ndarray, coded: np.ndarray) -> np.ndarray:
    """What elements become by moves in the order of `_by_exponent`."""
    moves = np.empty_like(coded)
    moves[_by_exponent(before)] = coded
    return before + moves


def zigzag(moves: np.ndarray) -> np.ndarray:
    """Differences modulo 2^w -> small numbers for small ones of either sign: 0, -1, 1, -2 become 0, 1, 2, 3."""
    signed = moves.view(f"<i{moves.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * moves.itemsize - 1))).view(moves.dtype)


def unzigzag(coded: np.ndarray) -> np.ndarray:
    """Inverse of `zigzag`."""
    return (coded >> 1) ^ (~(coded & 1) + 1)


# --- planes of bytes ---


def blocks(bits: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(start, slice) of blocks of about BLOCK_BYTES."""
    step = BLOCK_BYTES // bits.itemsize
    for start in range(0, len(bits), step):
        yield start, slice(start, start + step)


def planes(values: np.ndarray) -> list[np.ndarray]:
    """[n] integers -> their lowest bytes, their second ones, ..., each [n]."""
    table = values.view(np.uint8).reshape(len(values), values.itemsize)
    return [table[:, place] for place in range(values.itemsize)]


def _used(values: np.ndarray) -> list[np.ndarray]:
    """The planes of [n] non-negative integers without the upper ones that are all zero."""
    number = (int(values.max(initial=0)).bit_length() + 7) // 8
    return planes(values)[:number]


def join(found: Sequence[np.ndarray], dtype: np.dtype, count: int) -> np.ndarray:
    """[count] integers of `dtype` from their planes; those that are missing are zero."""
    table = np.zeros((count, dtype.itemsize), np.uint8)
    for place, plane in enumerate(found):
        table[:, place] = plane
    return table.reshape(-1).view(dtype)


def pack(found: Sequence[np.ndarray]) -> bytes:
    """Each plane with its length in front, by zstandard where that is smaller."""
    coder = zstandard.ZstdCompressor(LEVEL, write_content_size=False)
    parts: list[bytes | memoryview] = []
    for plane in found:
        raw = np.ascontiguousarray(plane).data
        packed = coder.compress(raw)
        part = packed if len(packed) < len(raw) else raw
        parts += (LENGTH.pack(len(part)), part)
    return b"".join(parts)


def unpack(data: memoryview, number: int, count: int) -> tuple[list[np.ndarray], memoryview]:
    """(`number` planes of `count` bytes, what follows them)."""
    coder, found = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES), []
    for _ in range(number):
        (length,), data = _take(LENGTH, data)
        part, data = data[:length], data[length:]
        plane = np.frombuffer(part if length >= count else _decompress(coder, part, count), np.uint8)
        if len(plane) != count:
            raise WeightsError(f"a plane of {len(plane)} bytes, expected {count}")
        found.append(plane)
    return found, data


def _decompress(coder: zstandard.ZstdDecompressor, part: memoryview, count: int) -> bytes:
    try:
        if zstandard.frame_content_size(part) != -1:  # would be allocated whatever `max_output_size` says
            raise WeightsError("a plane that names its own size")
        return coder.decompress(part, max_output_size=count)
    except zstandard.ZstdError as error:
        raise WeightsError(f"a plane that zstandard cannot read: {error}") from error


def _take(layout: struct.Struct, data: memoryview) -> tuple[tuple[int, ...], memoryview]:
    """(the numbers at the beginning, what follows)."""
    if len(data) < layout.size:
        raise WeightsError(f"payload ends {layout.size - len(data)} bytes too early")
    return layout.unpack_from(data), data[layout.size :]


def end(rest: memoryview) -> None:
    """Raise WeightsError if anything is left of a payload."""
    if rest:
        raise WeightsError(f"payload with {len(rest)} bytes too many")
