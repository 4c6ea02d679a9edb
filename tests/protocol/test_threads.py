from __future__ import annotations

import threading

import pytest

from protocol.threads import side_by_side

DEADLINE_S = 30.0
ITEMS = 1_000_000
"""More than a thread gets through while another one raises."""


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("number", [0, 1, 2, 100])
def test_results_come_in_the_order_of_the_items(number: int, threads: int) -> None:
    assert side_by_side(lambda item: -item, range(number), threads) == [-item for item in range(number)]


def test_items_are_worked_on_at_the_same_time() -> None:
    """Two of them wait for each other; the third is done by whoever comes first."""
    meeting = threading.Barrier(2, timeout=DEADLINE_S)

    def meet(item: int) -> int:
        return threading.get_ident() if item == 2 else meeting.wait() * 0 + threading.get_ident()

    first, second, third = side_by_side(meet, [0, 1, 2], 2)
    assert first != second
    assert third in (first, second)


@pytest.mark.parametrize("threads", [1, 2])
def test_exception_ends_it(threads: int) -> None:
    """It is raised, and nobody begins another item."""
    begun: list[int] = []
    has_failed = threading.Event()

    def fail(item: int) -> None:
        begun.append(item)
        if item == 0:
            has_failed.set()
            raise MemoryError("no room for item 0")
        assert has_failed.wait(DEADLINE_S)

    with pytest.raises(MemoryError, match="no room for item 0"):
        side_by_side(fail, range(ITEMS), threads)
    assert len(begun) < ITEMS
