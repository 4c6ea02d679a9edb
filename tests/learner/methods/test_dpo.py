"""Preferences -> batches."""

from dataclasses import replace

import numpy as np
import pytest

from learner.batch import Row
from learner.methods.dpo import make_batch

PAIRS = [((1, 2), (3, 4, 5), (6, 7)), ((8,), (9,), (10, 11, 12))]


def with_zeros(rows: list[Row]) -> list[Row]:
    return [
        replace(
            row, samples=tuple(replace(s, reference_logprobs=np.zeros(s.num_tokens, np.float32)) for s in row.samples)
        )
        for row in rows
    ]


def test_a_row_holds_prompt_chosen_and_rejected_in_this_order() -> None:
    batch = make_batch(PAIRS, step=3, add_reference=with_zeros)
    (minibatch,) = batch.minibatches
    assert batch.loss == "dpo" and batch.step == 3
    assert [row.prompt_ids for row in minibatch.rows] == [(1, 2), (8,)]
    answers = [[s.token_ids.tolist() for s in row.samples] for row in minibatch.rows]
    assert answers == [[[3, 4, 5], [6, 7]], [[9], [10, 11, 12]]]
    assert all(s.reference_logprobs is not None for row in minibatch.rows for s in row.samples)
    assert (minibatch.num_tokens, minibatch.num_sequences) == (9, 4)


def test_an_empty_answer_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match="preference 1"):
        make_batch([PAIRS[0], ((8,), (), (1,))], step=0, add_reference=with_zeros)
