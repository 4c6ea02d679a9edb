"""Supervised fine-tuning: what it takes from demonstrations. The loss itself is asked for in `learner/step.py`.

Knows no tokenizer, no model and no clock; called by the loop for a warm start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from learner.batch import Batch, Minibatch, Row, Sample

Demonstration = tuple[Sequence[int], Sequence[int]]
"""(prompt_ids, response_ids): only the response is trained on, its end-of-sequence token included."""


def make_batch(demonstrations: Sequence[Demonstration], step: int) -> Batch:
    """One optimizer update over these demonstrations.

    Raises ValueError for a demonstration without a response, naming its place in the sequence.
    """
    for index, (_, response) in enumerate(demonstrations):
        if not len(response):
            raise ValueError(f"demonstration {index}: found an empty response, expected at least one token")
    rows = tuple(Row(tuple(prompt), (_sample(response),)) for prompt, response in demonstrations)
    num_tokens = sum(len(response) for _, response in demonstrations)
    return Batch(step=step, minibatches=(Minibatch(rows, num_tokens, len(rows)),), stats={})


def batches(demonstrations: Sequence[Demonstration], batch_size: int, epochs: int, seed: int) -> Iterator[Batch]:
    """`epochs` passes in batches of `batch_size` (the last of a pass may be smaller), steps counted from 0.

    Each pass has an order of its own that depends on (seed, pass) only, so a run that starts again sees the same ones.
    """
    step = 0
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(demonstrations))
        for start in range(0, len(order), batch_size):
            yield make_batch([demonstrations[i] for i in order[start : start + batch_size]], step)
            step += 1


def _sample(response: Sequence[int]) -> Sample:
    length = len(response)
    return Sample(
        token_ids=np.asarray(response, np.int32),
        engine_logprobs=np.zeros(length, np.float32),
        mask=np.ones(length, bool),
        advantage=1.0,
        lag=np.zeros(length, np.int32),
    )
