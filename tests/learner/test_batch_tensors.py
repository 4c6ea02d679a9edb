"""A batch survives the way to another rank, bit for bit."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from learner.batch import Batch, Drawn, Minibatch, Row
from learner.batch_tensors import decode_batch, decode_rows, encode_batch, encode_rows
from tests.learner.reference import random_rows


def assert_same_rows(found: list[Row], expected: list[Row]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.prompt_ids, a.temperature, len(a.samples)) == (b.prompt_ids, b.temperature, len(b.samples))
        for one, other in zip(a.samples, b.samples, strict=True):
            for field in fields(other):
                x, y = getattr(one, field.name), getattr(other, field.name)
                np.testing.assert_array_equal(x, y, err_msg=field.name)
                assert getattr(x, "dtype", None) == getattr(y, "dtype", None), field.name


def rows() -> list[Row]:
    """Some with a reference, one without samples."""
    first, *rest = random_rows(temperature=0.3)
    referred = replace(
        first,
        samples=tuple(replace(s, reference_logprobs=s.engine_logprobs - 1, place=5) for s in first.samples[:2])
        + first.samples[2:],
    )
    return [referred, Row((3, 1), ()), *rest]


def test_rows_come_back_bit_for_bit() -> None:
    assert_same_rows(decode_rows(encode_rows(rows())), rows())
    assert decode_rows(encode_rows([])) == []


@pytest.mark.parametrize("loss", ["policy", "sft", "dpo"])
def test_batch_comes_back_with_its_denominators(loss: str) -> None:
    every = rows()
    minibatches = (Minibatch(tuple(every[:2]), 17, 5), Minibatch((), 3, 1), Minibatch(tuple(every[2:]), 40, 8))
    drawn = Drawn(((0, 4), (1, 2)), ((3, 1), (2,)), ((0.1, -1 / 3), (0.0,))) if loss == "policy" else None
    batch = Batch(7, minibatches, {"reward_mean": 0.5}, loss, passes=3, drawn=drawn)  # type: ignore[arg-type]
    head, tensors = encode_batch(batch)
    found = decode_batch(json.loads(json.dumps(head)), tensors)
    assert found.drawn == drawn
    assert (found.step, found.loss, found.passes, found.stats) == (7, loss, 3, {})
    for one, other in zip(found.minibatches, minibatches, strict=True):
        assert (one.num_tokens, one.num_sequences) == (other.num_tokens, other.num_sequences)
        assert_same_rows(list(one.rows), list(other.rows))
