"""Seeded permutations of 0..size-1 that need no memory: the order in which examples are dealt out.

Knows only integers. Called by `problems.py` (splits) and `data.py` (the order of training).
"""

from __future__ import annotations

import xxhash

_ROUNDS = 6


def permuted(index: int, size: int, key: str) -> int:
    """Where `index` goes in the pseudo-random permutation of range(size) that `key` names.

    A balanced Feistel network over the next even number of bits, walked until it lands inside the range (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): under four rounds of it on average, whatever the size. Its
    round function is xxh3, so the order is the same on every machine and under every version of Python.
    """
    if not 0 <= index < size:
        raise IndexError(f"index: found {index}, allowed: 0..{size - 1}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for number in range(_ROUNDS):
            mixed = xxhash.xxh3_64_intdigest(f"{key}/{number}/{right}".encode())
            left, right = right, left ^ (mixed & mask)
        index = left << half_bits | right
        if index < size:
            return index
