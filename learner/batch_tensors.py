"""A batch as flat tensors and JSON, and back: what the learner's other ranks need of it to train on it.

The rows themselves are sent, not their packed form, whose masks are far larger: every rank plans and packs them in the
same way. Called by `trainer.py`. Knows no rank and no socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.batch import Batch, Drawn, Minibatch, Row, Sample


def encode_batch(batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON, tensors) of a batch. Its `stats` stay behind: they are figures for the log."""
    minibatches = [[len(m.rows), m.num_tokens, m.num_sequences] for m in batch.minibatches]
    head: dict[str, Any] = {"step": batch.step, "loss": batch.loss, "passes": batch.passes, "minibatches": minibatches}
    if (drawn := batch.drawn) is not None:
        head["drawn"] = [drawn.ids, drawn.lengths, drawn.advantages]
    return head, encode_rows([row for minibatch in batch.minibatches for row in minibatch.rows])


def decode_batch(head: dict[str, Any], tensors: dict[str, Tensor]) -> Batch:
    """The batch of `encode_batch`."""
    rows = iter(decode_rows(tensors))
    minibatches = tuple(
        Minibatch(tuple(next(rows) for _ in range(count)), num_tokens, num_sequences)
        for count, num_tokens, num_sequences in head["minibatches"]
    )
    drawn = Drawn(*(tuple(map(tuple, part)) for part in head["drawn"])) if "drawn" in head else None
    return Batch(head["step"], minibatches, {}, head["loss"], head["passes"], drawn)


def encode_rows(rows: Sequence[Row]) -> dict[str, Tensor]:
    """P tokens of prompts, S samples of T tokens in all, in order of rows, and how many belong to which."""
    samples = [sample for row in rows for sample in row.samples]

    def numbers(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    def joined(arrays: list[Any], dtype: Any) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype))

    return {
        "prompt_lengths": numbers([len(row.prompt_ids) for row in rows]),
        "prompt_ids": numbers([token for row in rows for token in row.prompt_ids]),
        "temperatures": numbers([row.temperature for row in rows], torch.float64),
        "samples": numbers([len(row.samples) for row in rows]),
        "lengths": numbers([sample.num_tokens for sample in samples]),
        "advantages": numbers([sample.advantage for sample in samples], torch.float64),
        "places": numbers([sample.place for sample in samples]),
        "has_reference": numbers([sample.reference_logprobs is not None for sample in samples], torch.bool),
        "token_ids": joined([sample.token_ids for sample in samples], np.int32),
        "engine_logprobs": joined([sample.engine_logprobs for sample in samples], np.float32),
        "mask": joined([sample.mask for sample in samples], np.bool_),
        "lag": joined([sample.lag for sample in samples], np.int32),
        "reference_logprobs": joined(
            [s.reference_logprobs for s in samples if s.reference_logprobs is not None], np.float32
        ),
    }


def decode_rows(tensors: dict[str, Tensor]) -> list[Row]:
    """The rows of `encode_rows`, bit for bit."""
    prompts = _parts(tensors["prompt_ids"], tensors["prompt_lengths"])
    samples = _samples(tensors)
    return [
        Row(tuple(prompt.tolist()), tuple(next(samples) for _ in range(count)), temperature)
        for prompt, count, temperature in zip(
            prompts, tensors["samples"].tolist(), tensors["temperatures"].tolist(), strict=True
        )
    ]


def _samples(tensors: dict[str, Tensor]) -> Iterator[Sample]:
    lengths = tensors["lengths"]
    per_token = [_parts(tensors[name], lengths) for name in ("token_ids", "engine_logprobs", "mask", "lag")]
    has_reference = tensors["has_reference"]
    references = iter(_parts(tensors["reference_logprobs"], lengths[has_reference]))
    per_sample = [tensors[name].tolist() for name in ("advantages", "has_reference", "places")]
    for ids, logprobs, mask, lag, advantage, referred, place in zip(*per_token, *per_sample, strict=True):
        yield Sample(ids, logprobs, mask, advantage, lag, next(references) if referred else None, place)


def _parts(flat: Tensor, lengths: Tensor) -> list[Any]:
    return [part.numpy() for part in flat.split(lengths.tolist())] if len(lengths) else []
