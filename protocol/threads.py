"""Work on a whole version of the weights, shared out to the cores. Used by `weights.py` and `deltas.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

MAX_THREADS = 8

T = TypeVar("T")
R = TypeVar("R")


def num_threads() -> int:
    """The cores that this process may use, at most MAX_THREADS."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def side_by_side(function: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """[function(item)], several at a time. Raises what the function raised, after the others' current items.

    A thread takes the next item by itself: handing out each one as a task takes longer than a small tensor's digest.
    """
    threads = min(threads, len(items))
    if threads < 2:
        return [function(item) for item in items]
    results: dict[int, R] = {}
    numbers = count()
    failed = False

    def work() -> None:
        nonlocal failed
        while (number := next(numbers)) < len(items) and not failed:
            try:
                results[number] = function(items[number])
            except BaseException:
                failed = True
                raise

    with ThreadPoolExecutor(threads) as pool:
        for worker in [pool.submit(work) for _ in range(threads)]:
            worker.result()
    return [results[number] for number in range(len(items))]
