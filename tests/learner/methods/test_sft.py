"""Pairs -> batches."""

import pytest

from learner.methods.sft import make_batch

DEMONSTRATIONS = [((1, 2, i), (10 + i, 50)[: 1 + i % 2]) for i in range(10)]


def test_make_batch_trains_on_the_response_only() -> None:
    minibatch = make_batch(DEMONSTRATIONS[:4], step=0).minibatches[0]
    assert (minibatch.num_tokens, minibatch.num_sequences) == (6, 4)
    row = minibatch.rows[1]
    assert (row.prompt_ids, row.samples[0].token_ids.tolist()) == ((1, 2, 1), [11, 50])
    assert row.samples[0].mask.all()
    assert make_batch(DEMONSTRATIONS[:4], step=0).loss == "sft"


def test_make_batch_refuses_an_empty_response() -> None:
    with pytest.raises(ValueError, match="demonstration 1"):
        make_batch([((1,), (2,)), ((1,), ())], step=0)
