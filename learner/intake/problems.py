"""The problems of a task and their split: held out, demonstrated, trained on; and the generated task "arithmetic".

Text only: `data.py` makes tokens of it, `jsonl.py` reads problems from files. Held-out problems are never trained on
and never demonstrated. Demonstrations (the warm start's) come out of the training problems and are trained on like the
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import overload

import xxhash

from learner.intake.shuffle import permuted
from protocol.config import Recipe
from protocol.errors import RecipeError

Message = Mapping[str, str]
"""One chat message: "role" and "content"."""


@dataclass(frozen=True)
class Problem:
    """One prompt and its reference answer."""

    prompt: str | tuple[Message, ...]
    answer: str
    solution: str = ""
    """The response to demonstrate, final answer included; "": there is none."""

    @property
    def text(self) -> str:
        """The prompt for people."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


@dataclass(frozen=True)
class ProblemSet:
    """A task's problems, split."""

    train: Sequence[Problem]
    heldout: tuple[Problem, ...]
    demonstrations: tuple[Problem, ...]
    digest: str
    """xxh3-128 of everything the problems were made of, hexadecimal."""


class ArithmeticPairs(Sequence[Problem]):
    """ "What is a + b?" for the unordered pairs {a, b} at places `first` and later of the split's permutation.

    Place p of a pair gives items 2 p (the smaller operand first) and 2 p + 1 (the larger first).
    """

    def __init__(self, max_operand: int, seed: int, first: int, response_is_answer: bool) -> None:
        self._pairs = count_pairs(max_operand)
        self._first = first
        self._key = f"arithmetic/{seed}/split"
        self._response_is_answer = response_is_answer

    def __len__(self) -> int:
        return 2 * (self._pairs - self._first)

    @overload
    def __getitem__(self, item: int) -> Problem: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[Problem]: ...
    def __getitem__(self, item: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        if not 0 <= item < len(self):
            raise IndexError(f"item: found {item}, allowed: 0..{len(self) - 1}")
        a, b = unordered_pair(permuted(self._first + item // 2, self._pairs, self._key))
        return make_sum(*((b, a) if item % 2 else (a, b)), self._response_is_answer)

    def one_of_each(self, count: int) -> tuple[Problem, ...]:
        """The first `count` pairs, every other one turned round."""
        return tuple(self[2 * place + place % 2] for place in range(count))


def make_sum(a: int, b: int, response_is_answer: bool = False) -> Problem:
    """The response to demonstrate restates the sum, unless the grader wants the bare answer."""
    answer = str(a + b)
    return Problem(f"What is {a} + {b}?", answer, answer if response_is_answer else f"{a} + {b} = {answer}")


def make_arithmetic(recipe: Recipe) -> ProblemSet:
    """Sums of two operands. A pair is held out as an unordered one: with 3 + 4 goes 4 + 3."""
    task, heldout, demonstrated = recipe.task, recipe.eval.prompts, recipe.warm_start.examples
    pairs = count_pairs(task.max_operand)
    if heldout + demonstrated > pairs or heldout == pairs:
        raise RecipeError(
            f"task.max_operand: found {task.max_operand}, which makes {pairs} pairs of operands, allowed: enough for"
            f" eval.prompts = {heldout} + warm_start.examples = {demonstrated} different pairs, and one to train on"
        )
    exact = task.grader == "exact"
    everything = ArithmeticPairs(task.max_operand, recipe.seed, 0, exact)
    train = ArithmeticPairs(task.max_operand, recipe.seed, heldout, exact)
    digest = xxhash.xxh3_128_hexdigest(f"arithmetic {task.max_operand} {task.grader}".encode())
    return ProblemSet(train, everything.one_of_each(heldout), train.one_of_each(demonstrated), digest)


def count_pairs(max_operand: int) -> int:
    """Unordered pairs of operands 0..max_operand."""
    return (max_operand + 1) * (max_operand + 2) // 2


def unordered_pair(rank: int) -> tuple[int, int]:
    """The pair a <= b at this place of (0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2), (0, 3), …"""
    b = (isqrt(8 * rank + 1) - 1) // 2
    return rank - b * (b + 1) // 2, b
