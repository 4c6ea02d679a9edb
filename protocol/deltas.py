"""A tensor's bytes as its difference from a base. Pure functions over byte buffers; no torch, no socket.

Three encodings, of which the smallest is sent for each tensor:

    delta   which elements' bits changed, as gaps between their places, and how far their bits moved
    zstd    all bytes, cut into planes (all first bytes, all second ones, ...)
    dense   the bytes as they are

Gaps and moves are cut into planes too, and zstandard codes each plane by entropy. Bits are compared, not values: NaNs,
their payloads and the sign of zero are kept. A move is the difference of two bit patterns as integers, modulo their
width; it means something to one base only, and who applies it must know by digest that it has that base.

An update of a size that hardly depends on the weight (Adam's) changes nearly every small float and hardly any large
one, whose neighbours lie further apart. So the elements are two classes, below and above a threshold of magnitude, and
places are counted within each: both sides have the base, and with it the classes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
import zstandard

from protocol.errors import WeightsError

LEVEL = 1
"""Of zstandard: what can be won here is entropy, which every level codes alike; higher ones look for repetitions."""
BLOCK_BYTES = 1 << 20
"""Looked at once: bounds the memory for indices, and stays in the cache."""
SAMPLE = 1 << 14
"""Elements of a tensor from which its distribution of magnitudes is estimated."""
WORTH_SHARE = 0.8
"""Share of the estimated bytes below which a second class is worth the pass over all elements."""
SURELY_SMALLEST = 1 / 8
"""Share of the dense bytes up to which a delta is taken without measuring what zstandard makes of all bytes."""
PART = struct.Struct("<QBB")
"""Elements, planes of gaps, planes of moves."""
LENGTH = struct.Struct("<Q")

Bytes = bytes | memoryview


def encode(base: memoryview, new: memoryview, itemsize: int) -> tuple[str, Bytes]:
    """(encoding, payload) of a tensor's `new` bytes. An unchanged tensor is an empty delta.

    Raises ValueError if the two are not as long, or not whole elements.
    """
    if len(base) != len(new) or len(new) % itemsize:
        raise ValueError(f"{len(base)} and {len(new)} bytes, expected as many, in elements of {itemsize}")
    delta = encode_delta(base, new, itemsize)
    if len(delta) <= SURELY_SMALLEST * len(new):
        return "delta", delta
    found: dict[str, Bytes] = {"delta": delta, "dense": new, "zstd": _pack(_planes(_bits(new, itemsize)))}
    encoding = min(found, key=lambda name: len(found[name]))
    return encoding, found[encoding]


def apply(encoding: str, payload: memoryview, target: memoryview, itemsize: int) -> None:
    """Make `target`, which holds the base's bytes, the new ones, in place.

    Raises WeightsError for what cannot be a payload of this tensor; `target` may be anything then.
    """
    bits = _bits(target, itemsize)
    if encoding == "dense" and len(payload) == len(target):
        target[:] = payload
    elif encoding == "zstd":
        planes, rest = _unpack(payload, itemsize, len(bits))
        _end(rest)
        bits[:] = _join(planes, bits.dtype, len(bits))
    elif encoding == "delta":
        _apply_delta(payload, bits)
    else:
        raise WeightsError(f"{len(payload)} bytes of encoding {encoding!r} for a tensor of {len(target)}")


# --- delta ---


def encode_delta(base: memoryview, new: memoryview, itemsize: int) -> bytes:
    """threshold, then a part for each class: [count, planes] and the planes of gaps and moves."""
    old, now = _bits(base, itemsize), _bits(new, itemsize)
    indices = changed(old, now)
    if not len(indices):
        return b""
    before = old[indices]
    moves = _zigzag(now[indices] - before)
    threshold = _choose_threshold(old, before)
    is_small = (before << 1) < threshold
    places = np.searchsorted(_small(old, threshold), indices[is_small])
    small = _encode_part(places, moves[is_small])
    return LENGTH.pack(threshold) + small + _encode_part(indices[~is_small], moves[~is_small])


def _apply_delta(payload: memoryview, bits: np.ndarray) -> None:
    if not payload:
        return
    threshold, rest = _take(LENGTH, payload)
    small = _small(bits, threshold[0])
    places, small_moves, rest = _decode_part(rest, len(small), bits.dtype)
    indices, moves, rest = _decode_part(rest, len(bits), bits.dtype)
    _end(rest)
    bits[small[places]] += small_moves
    bits[indices] += moves


def changed(old: np.ndarray, now: np.ndarray) -> np.ndarray:
    """[changed] int64, ascending: indices of the elements whose bits differ."""
    found = [start + _changed(old[part], now[part]) for start, part in _blocks(old)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _changed(old: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Of one block: words of eight bytes are compared first, then the elements of those that differ."""
    per_word = 8 // old.itemsize
    whole = len(old) // per_word * per_word
    words = np.flatnonzero(old[:whole].view("<u8") != now[:whole].view("<u8"))
    if len(words) > whole // per_word // 4:
        return np.flatnonzero(old != now)
    inside = (words[:, None] * per_word + np.arange(per_word)).ravel()
    candidates = np.concatenate([inside, np.arange(whole, len(old))])
    return candidates[old[candidates] != now[candidates]]


def _small(bits: np.ndarray, threshold: int) -> np.ndarray:
    """Ascending indices of the elements whose bits without the sign, times 2, lie below the threshold."""
    if not threshold:
        return np.zeros(0, np.int64)
    return np.concatenate([start + np.flatnonzero((bits[part] << 1) < threshold) for start, part in _blocks(bits)])


def _choose_threshold(old: np.ndarray, before: np.ndarray) -> int:
    """The threshold that makes the places of the changed elements cheapest, by an estimate; 0: one class.

    `before`: what the changed elements were. For a float the upper eight bits behind the sign are its exponent.
    """
    shift = 8 * old.itemsize - 8
    sample = old[:: max(1, len(old) // SAMPLE)]
    total = np.bincount((sample << 1) >> shift, minlength=256) * (len(old) / len(sample))
    hits = np.bincount((before << 1) >> shift, minlength=256)
    total = np.maximum(total, hits)
    below, hits_below = np.cumsum(total), np.cumsum(hits)
    cost = _place_bits(below, hits_below) + _place_bits(below[-1] - below, hits_below[-1] - hits_below)
    best = int(np.argmin(cost[:-1]))
    return (best + 1) << shift if cost[best] < WORTH_SHARE * cost[-1] else 0


def _place_bits(total: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Bits that name `hits` of `total` places: total x the entropy of their share."""
    share = np.clip(hits / np.maximum(total, 1), 1e-12, 1 - 1e-12)
    return -total * (share * np.log2(share) + (1 - share) * np.log2(1 - share))


def _encode_part(places: np.ndarray, moves: np.ndarray) -> bytes:
    gap_planes = _used(_planes(np.diff(places, prepend=-1) - 1))
    move_planes = _used(_planes(moves))
    return PART.pack(len(places), len(gap_planes), len(move_planes)) + _pack([*gap_planes, *move_planes])


def _decode_part(data: memoryview, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, memoryview]:
    """(places in a class of `size`, moves, what follows)."""
    (count, gap_planes, move_planes), data = _take(PART, data)
    if count > size or gap_planes > 8 or move_planes > dtype.itemsize:
        raise WeightsError(f"delta of {count} elements in {gap_planes} + {move_planes} planes, of {size}")
    planes, data = _unpack(data, gap_planes + move_planes, count)
    gaps = _join(planes[:gap_planes], np.dtype("<u8"), count)
    if count and gaps.max() >= size:
        raise WeightsError(f"delta with a gap of {gaps.max()}, the tensor has {size} elements there")
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if count and places[-1] >= size:
        raise WeightsError(f"delta of element {places[-1]}, the tensor has {size} there")
    return places, _unzigzag(_join(planes[gap_planes:], dtype, count)), data


def _zigzag(moves: np.ndarray) -> np.ndarray:
    """Differences modulo 2^w -> small numbers for small ones of either sign: 0, -1, 1, -2 become 0, 1, 2, 3."""
    signed = moves.view(f"<i{moves.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * moves.itemsize - 1))).view(moves.dtype)


def _unzigzag(coded: np.ndarray) -> np.ndarray:
    return (coded >> 1) ^ (~(coded & 1) + 1)


# --- planes of bytes ---


def _bits(data: memoryview, itemsize: int) -> np.ndarray:
    return np.frombuffer(data, f"<u{itemsize}")


def _blocks(bits: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(start, slice) of blocks of about BLOCK_BYTES."""
    step = BLOCK_BYTES // bits.itemsize
    for start in range(0, len(bits), step):
        yield start, slice(start, start + step)


def _planes(values: np.ndarray) -> list[np.ndarray]:
    """[n] integers -> their lowest bytes, their second ones, ..., each [n]."""
    table = values.view(np.uint8).reshape(len(values), values.itemsize)
    return [table[:, place] for place in range(values.itemsize)]


def _used(planes: list[np.ndarray]) -> list[np.ndarray]:
    """Without the upper planes that are all zero."""
    return planes[: max((place + 1 for place, plane in enumerate(planes) if plane.any()), default=0)]


def _join(planes: Sequence[np.ndarray], dtype: np.dtype, count: int) -> np.ndarray:
    """[count] integers of `dtype` from their planes; those that are missing are zero."""
    table = np.zeros((count, dtype.itemsize), np.uint8)
    for place, plane in enumerate(planes):
        table[:, place] = plane
    return table.reshape(-1).view(dtype)


def _pack(planes: Sequence[np.ndarray]) -> bytes:
    """Each plane with its length in front, by zstandard where that is smaller."""
    coder = zstandard.ZstdCompressor(LEVEL, write_content_size=False)
    parts: list[bytes] = []
    for plane in planes:
        raw = plane.tobytes()
        packed = coder.compress(raw)
        part = packed if len(packed) < len(raw) else raw
        parts += (LENGTH.pack(len(part)), part)
    return b"".join(parts)


def _unpack(data: memoryview, planes: int, count: int) -> tuple[list[np.ndarray], memoryview]:
    """(planes of `count` bytes, what follows them)."""
    coder, found = zstandard.ZstdDecompressor(), []
    for _ in range(planes):
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


def _end(rest: memoryview) -> None:
    if rest:
        raise WeightsError(f"payload with {len(rest)} bytes too many")
