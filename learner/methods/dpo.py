"""Direct preference optimization: what it takes from pairs of answers. The loss is asked for in `learner/step.py`.

Rafailov et al. 2023. Knows no tokenizer, no model and no clock; called by the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from learner.batch import Batch, Minibatch, Row
from learner.methods.grpo import AddReference
from learner.methods.sft import response_sample

Preference = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""(prompt_ids, chosen_ids, rejected_ids), both answers with their end-of-sequence token."""


def make_batch(preferences: Sequence[Preference], step: int, add_reference: AddReference) -> Batch:
    """One optimizer update over these pairs: a row holds the prompt, the chosen and the rejected answer.

    Raises ValueError for a pair with an empty answer, naming its place in the sequence.
    """
    for index, (_, chosen, rejected) in enumerate(preferences):
        if not (len(chosen) and len(rejected)):
            raise ValueError(f"preference {index}: found an empty answer, expected at least one token in both")
    rows = add_reference(
        [
            Row(tuple(prompt), (response_sample(chosen), response_sample(rejected)))
            for prompt, chosen, rejected in preferences
        ]
    )
    num_tokens = sum(len(chosen) + len(rejected) for _, chosen, rejected in preferences)
    return Batch(step=step, minibatches=(Minibatch(tuple(rows), num_tokens, 2 * len(rows)),), stats={}, loss="dpo")
