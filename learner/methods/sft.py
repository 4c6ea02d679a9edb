"""Supervised fine-tuning: what it takes from pairs of prompt and response. The loss is asked for in `learner/step.py`.

Knows no tokenizer, no model and no clock; called by the loop, for `method = "sft"` and for a warm start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.batch import Batch, Minibatch, Row, Sample

Pair = tuple[Sequence[int], Sequence[int]]
"""(prompt_ids, response_ids): only the response is trained on, its end-of-sequence token included."""


def make_batch(pairs: Sequence[Pair], step: int) -> Batch:
    """One optimizer update over these pairs.

    Raises ValueError for a pair without a response, naming its place in the sequence.
    """
    for index, (_, response) in enumerate(pairs):
        if not len(response):
            raise ValueError(f"demonstration {index}: found an empty response, expected at least one token")
    rows = tuple(Row(tuple(prompt), (response_sample(response),)) for prompt, response in pairs)
    num_tokens = sum(len(response) for _, response in pairs)
    return Batch(step=step, minibatches=(Minibatch(rows, num_tokens, len(rows)),), stats={}, loss="sft")


def response_sample(response: Sequence[int]) -> Sample:
    """A response that nobody drew: every token counts, with advantage 1."""
    length = len(response)
    return Sample(
        token_ids=np.asarray(response, np.int32),
        engine_logprobs=np.zeros(length, np.float32),
        mask=np.ones(length, bool),
        advantage=1.0,
        lag=np.zeros(length, np.int32),
    )
