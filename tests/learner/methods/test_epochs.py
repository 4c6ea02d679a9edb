"""Which examples a step learns from."""

import pytest

from learner.methods.epochs import Epochs


def test_every_example_is_seen_once_a_pass_in_an_order_of_its_own() -> None:
    epochs = Epochs(list("abcdefghij"), batch_size=4, epochs=2, seed=3)
    found = [epochs[step] for step in range(epochs.steps)]
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4, 2]
    first, second = ([item for batch in half for item in batch] for half in (found[:3], found[3:]))
    assert sorted(first) == sorted(second) == list("abcdefghij")
    assert first != second


def test_a_step_number_is_a_whole_cursor() -> None:
    def order(seed: int) -> list[list[int]]:
        epochs = Epochs(range(10), batch_size=4, epochs=3, seed=seed)
        return [epochs[step] for step in (8, 0, 5)]  # in any order, as after a resume

    assert order(3) == order(3) != order(4)


def test_there_is_no_step_behind_the_last() -> None:
    epochs = Epochs(range(5), batch_size=2, epochs=2, seed=0)
    assert epochs.steps == 6
    with pytest.raises(IndexError, match=r"found 6, allowed: 0\.\.5"):
        epochs[6]
    with pytest.raises(ValueError, match="found none"):
        Epochs([], batch_size=2, epochs=1, seed=0)
