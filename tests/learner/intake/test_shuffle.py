"""Permutations by formula: that they are permutations, that they mix, and that they never change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.intake.shuffle import permuted


@given(st.integers(1, 300), st.text(max_size=5))
def test_permutation_takes_every_place_once(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_permutation_never_changes():
    assert [permuted(index, 10, "golden") for index in range(10)] == [2, 4, 0, 6, 7, 5, 8, 3, 9, 1]
    assert permuted(0, 10**18, "golden") == 100_397_203_837_502_043


def test_permutation_moves_the_first_place_evenly():
    counts = [0] * 7
    for key in range(7000):
        counts[permuted(0, 7, str(key))] += 1
    assert all(850 < count < 1150 for count in counts)  # 1000 expected, standard deviation 29


def test_permutation_keeps_no_order_of_neighbours():
    ascents = sum(permuted(i, 1000, "k") < permuted(i + 1, 1000, "k") for i in range(999))
    assert 440 < ascents < 560  # 499.5 expected, standard deviation 9


@pytest.mark.parametrize("index", [-1, 5])
def test_permutation_refuses_what_is_outside(index):
    with pytest.raises(IndexError, match=r"allowed: 0\.\.4"):
        permuted(index, 5, "k")
