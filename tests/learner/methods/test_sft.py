"""Demonstrations -> batches."""

import pytest

from learner.methods.sft import batches, make_batch

DEMONSTRATIONS = [((1, 2, i), (10 + i, 50)[: 1 + i % 2]) for i in range(10)]


def prompts(batch) -> list[int]:
    return [row.prompt_ids[-1] for row in batch.minibatches[0].rows]


def test_batches_see_every_demonstration_once_a_pass() -> None:
    found = list(batches(DEMONSTRATIONS, batch_size=4, epochs=2, seed=3))
    assert [len(prompts(batch)) for batch in found] == [4, 4, 2, 4, 4, 2]
    assert [batch.step for batch in found] == [0, 1, 2, 3, 4, 5]
    first, second = ([i for batch in half for i in prompts(batch)] for half in (found[:3], found[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_batches_depend_on_the_seed_only() -> None:
    def order(seed: int) -> list[list[int]]:
        return [prompts(batch) for batch in batches(DEMONSTRATIONS, 4, 2, seed)]

    assert order(3) == order(3) != order(4)


def test_make_batch_trains_on_the_response_only() -> None:
    minibatch = make_batch(DEMONSTRATIONS[:4], step=0).minibatches[0]
    assert (minibatch.num_tokens, minibatch.num_sequences) == (6, 4)
    row = minibatch.rows[1]
    assert (row.prompt_ids, row.samples[0].token_ids.tolist()) == ((1, 2, 1), [11, 50])
    assert row.samples[0].mask.all()


def test_make_batch_refuses_an_empty_response() -> None:
    with pytest.raises(ValueError, match="demonstration 1"):
        make_batch([((1,), (2,)), ((1,), ())], step=0)
