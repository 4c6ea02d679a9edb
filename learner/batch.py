"""Packs prompts and their completions into tensors: each prompt once, its completions behind it under a block mask.

A row is one prompt followed by several completions. A completion's tokens see the prompt and their own past, never each
other's completions, and position ids restart behind the prompt, so a row means exactly what its sequences mean one at
a time. Compared with one padded line for each completion this leaves out the repeated prompts and most of the padding,
and lets the vocabulary head run at response positions only (2-3 times faster on the whole). A line of the tensors holds
one row, or with packing as many as fit, which do not see each other either.

Knows nothing of rewards, losses or models. `methods/` build rows; `step.py` packs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PROMPT_SEGMENT = 0
PADDING = -1


@dataclass(frozen=True)
class Sample:
    """One completion, as long as `token_ids` says (T >= 1)."""

    token_ids: NDArray[np.int32]
    """[T] sampled tokens, the end-of-sequence token included."""
    engine_logprobs: NDArray[np.float32]
    """[T] of the engine, after temperature; zeros for demonstrations."""
    mask: NDArray[np.bool_]
    """[T] True where a token may be trained on."""
    advantage: float
    lag: NDArray[np.int32]
    """[T] steps by which the weights that drew each token were behind."""
    reference_logprobs: NDArray[np.float32] | None = None
    """[T] of the reference policy, where the method has one."""
    place: int = -1
    """Of its first token among all tokens of the step's groups (`Drawn`); -1: it is of none of them."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def places(self) -> NDArray[np.int64]:
        """[T] of every token, as `place`."""
        return np.arange(self.place, self.place + self.num_tokens) if self.place >= 0 else np.full(self.num_tokens, -1)


@dataclass(frozen=True)
class Row:
    """A prompt and the completions that are computed behind it."""

    prompt_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    temperature: float = 1.0

    @property
    def packed_length(self) -> int:
        """Input positions of the row: nothing is predicted from a completion's last token, so it is not an input."""
        return len(self.prompt_ids) + sum(sample.num_tokens - 1 for sample in self.samples)


Line = tuple[Row, ...]
"""Rows that share one line of the tensors."""


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer update is computed from. The counts are its denominators, whatever the rows leave out."""

    rows: tuple[Row, ...]
    num_tokens: int
    """Trainable tokens of all completions of the update, those left out of `rows` (advantage 0) included."""
    num_sequences: int
    """Completions of the update, counted in the same way."""


@dataclass(frozen=True)
class Drawn:
    """The groups that a step was made of, those left out of its rows included: for who looks at them later."""

    ids: tuple[tuple[int, int], ...]
    """(epoch, index) of each group, in the order of the batch."""
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each completion of each group."""
    advantages: tuple[tuple[float, ...], ...]
    """Of each completion of each group."""

    @property
    def num_tokens(self) -> int:
        """What `Sample.place` counts."""
        return sum(sum(group) for group in self.lengths)


@dataclass(frozen=True)
class Batch:
    """One step's worth of updates."""

    step: int
    """Steps finished before this one; sets the learning rate and names the step in errors."""
    minibatches: tuple[Minibatch, ...]
    stats: dict[str, float]
    """What the method has to say about the groups, for the metrics."""
    loss: Literal["policy", "sft", "dpo"] = "policy"
    """dpo: every row has two samples, the chosen and the rejected one, and is never split."""
    passes: int = 1
    """Times that the minibatches are gone through."""
    drawn: Drawn | None = None
    """policy: what it was made of."""


@dataclass(frozen=True)
class PackedBatch:
    """One microbatch. R lines, L positions (the longest line), N response tokens, in order of rows and samples."""

    input_ids: Tensor
    """[R, L] int64; 0 in the padding."""
    position_ids: Tensor
    """[R, L] int64; restarts behind the prompt for every completion."""
    attention: Tensor
    """[R, 1, L, L] bool: True where the query (third axis) sees the key (fourth)."""
    predict_index: Tensor
    """[N] int64: flat index into R*L of the hidden state that predicts the token."""
    target_ids: Tensor
    """[N] int64."""
    engine_logprobs: Tensor
    """[N] float32."""
    reference_logprobs: Tensor
    """[N] float32; zeros where the method has no reference."""
    advantages: Tensor
    """[N] float32, the same for all tokens of a sequence."""
    mask: Tensor
    """[N] bool: may be trained on."""
    temperature: Tensor
    """[N] float32."""
    lag: Tensor
    """[N] int64, steps."""
    sequence_index: Tensor
    """[N] int64: which completion of this microbatch, from 0."""
    sequence_tokens: Tensor
    """[N] int64: trainable tokens of the token's own completion (a completion is never split)."""
    places: Tensor
    """[N] int64: which of all tokens of the step's groups; -1: none of them."""

    @property
    def num_tokens(self) -> int:
        """Response tokens, N."""
        return self.target_ids.numel()

    @property
    def num_positions(self) -> int:
        """R * L: what the forward pass computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PackedBatch:
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def tokenize_prompt_and_output(prompts: Sequence[str], outputs: Sequence[str], tokenizer: Any) -> dict[str, Tensor]:
    """Prompts and outputs -> {"input_ids", "labels", "response_mask"}, each [batch, longest - 1].

    The two texts are tokenized apart and joined, so that no token crosses their border. Lines are padded to the longest
    first (with the tokenizer's pad token, else its end-of-sequence token); then the ids lose their last column and the
    labels their first, and the mask is True where a label is a token of the output, by recorded lengths. This is the
    plain form, for those who study or write their own loop; the learner packs instead (`pack`).
    """
    if not prompts:
        raise ValueError("prompts: found none, expected at least one")
    pairs = [
        (
            tokenizer(prompt, add_special_tokens=False)["input_ids"],
            tokenizer(output, add_special_tokens=False)["input_ids"],
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    longest = max(len(prompt) + len(output) for prompt, output in pairs)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(pairs), longest), padding, dtype=torch.int64)
    response = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for line, (prompt, output) in enumerate(pairs):
        end = len(prompt) + len(output)
        ids[line, :end] = torch.tensor([*prompt, *output])
        response[line, len(prompt) : end] = True
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": response[:, 1:]}


def plan_microbatches(
    rows: Iterable[Row], budget_tokens: int, packing: bool = False, split: bool = True
) -> list[list[Line]]:
    """Put rows of similar length together until lines x longest reaches `budget_tokens`, padding included.

    A row over the budget is split: prompt repeated, completions divided (unless `split` is False). What exceeds it all
    the same gets a microbatch of its own, since it cannot be made smaller. Longest first, so that memory peaks at once.

    `packing`: a line takes further rows as long as it stays no longer than the first, the longest one of its
    microbatch: less padding at the same attention cost.
    """
    pieces = [piece for row in rows for piece in (split_row(row, budget_tokens) if split else [row])]
    pieces.sort(key=lambda row: row.packed_length, reverse=True)
    plan: list[list[Line]] = []
    longest = 0
    space: list[int] = []  # of the microbatch in hand: its longest line, and what is left in each
    for row in pieces:
        length = row.packed_length
        place = next((i for i, left in enumerate(space) if packing and length <= left), None)
        if place is not None:
            plan[-1][place] = (*plan[-1][place], row)
            space[place] -= length
        elif plan and (len(plan[-1]) + 1) * longest <= budget_tokens:
            plan[-1].append((row,))
            space.append(longest - length)
        else:
            plan.append([(row,)])
            longest, space = length, [0]
    return plan


def split_row(row: Row, budget_tokens: int) -> list[Row]:
    """Divide a row's completions over as few rows as the budget allows, in order. Empty rows vanish."""
    pieces: list[Row] = []
    held: list[Sample] = []
    for sample in row.samples:
        if held and replace(row, samples=(*held, sample)).packed_length > budget_tokens:
            pieces.append(replace(row, samples=tuple(held)))
            held = []
        held.append(sample)
    if held:
        pieces.append(replace(row, samples=tuple(held)))
    return pieces


def pack(rows: Sequence[Row]) -> PackedBatch:
    """`pack_lines` with one row a line."""
    return pack_lines([(row,) for row in rows])


def pack_lines(lines: Sequence[Line]) -> PackedBatch:
    """Lay out lines of rows as one microbatch on the CPU. Raises ValueError for an empty prompt or completion."""
    rows = [row for line in lines for row in line]
    for row in rows:
        if not row.prompt_ids:
            raise ValueError(
                "found a row with an empty prompt, expected at least one token (nothing predicts the first)"
            )
        if not all(sample.num_tokens for sample in row.samples):
            raise ValueError("found a completion without tokens, expected them to be left out before packing")
    length = max(sum(row.packed_length for row in line) for line in lines)
    input_ids = np.zeros((len(lines), length), np.int64)
    position_ids = np.zeros((len(lines), length), np.int64)
    row_numbers = np.full((len(lines), length), PADDING, np.int64)
    segments = np.full((len(lines), length), PADDING, np.int64)
    predict_index: list[NDArray[np.int64]] = []
    for r, line in enumerate(lines):
        start = 0
        for number, row in enumerate(line):
            begin, start = start, start + len(row.prompt_ids)
            row_numbers[r, begin : begin + row.packed_length] = number
            input_ids[r, begin:start] = row.prompt_ids
            position_ids[r, begin:start] = np.arange(start - begin)
            segments[r, begin:start] = PROMPT_SEGMENT
            prompt_end = start
            for k, sample in enumerate(row.samples):
                end = start + sample.num_tokens - 1
                input_ids[r, start:end] = sample.token_ids[:-1]
                position_ids[r, start:end] = len(row.prompt_ids) + np.arange(end - start)
                segments[r, start:end] = PROMPT_SEGMENT + 1 + k
                predict_index.append(r * length + np.concatenate(([prompt_end - 1], np.arange(start, end))))
                start = end
    samples = [(row, sample) for row in rows for sample in row.samples]
    counts = np.array([sample.num_tokens for _, sample in samples])
    trainable = np.array([sample.mask.sum() for _, sample in samples])

    def per_token(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values), counts)).to(dtype)

    def joined(arrays: list[NDArray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(dtype)

    def reference(sample: Sample) -> NDArray[np.float32]:
        return (
            np.zeros(sample.num_tokens, np.float32) if sample.reference_logprobs is None else sample.reference_logprobs
        )

    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        attention=block_mask(torch.from_numpy(row_numbers), torch.from_numpy(segments)),
        predict_index=joined(predict_index, torch.int64),
        target_ids=joined([s.token_ids for _, s in samples], torch.int64),
        engine_logprobs=joined([s.engine_logprobs for _, s in samples], torch.float32),
        reference_logprobs=joined([reference(s) for _, s in samples], torch.float32),
        advantages=per_token([s.advantage for _, s in samples], torch.float32),
        mask=joined([s.mask for _, s in samples], torch.bool),
        temperature=per_token([row.temperature for row, _ in samples], torch.float32),
        lag=joined([s.lag for _, s in samples], torch.int64),
        sequence_index=per_token(range(len(samples)), torch.int64),
        sequence_tokens=per_token(trainable.tolist(), torch.int64),
        places=joined([s.places for _, s in samples], torch.int64),
    )


def block_mask(row_numbers: Tensor, segments: Tensor) -> Tensor:
    """Who sees whom: two [R, L] of numbers (row in its line; 0 for its prompt, 1, 2, … for its completions)
    -> [R, 1, L, L] bool.

    A position sees earlier positions (and itself) of its row's prompt and of its own segment. Padding sees padding, so
    that no query is without keys (a softmax over nothing is NaN); nothing else sees it.
    """
    length = segments.shape[1]
    own_row = row_numbers[:, :, None] == row_numbers[:, None, :]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (causal & own_row & ((key == PROMPT_SEGMENT) | (key == query)))[:, None]
