"""The generated task "arithmetic": "What is a + b?", with demonstrations and preferences, for as many sums as wanted.

Text only, and nothing is kept: every sum is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import overload

import xxhash

from learner.intake.problems import Problem, ProblemSet, demonstration, heldout_wanted
from learner.intake.shuffle import permuted
from protocol.config import Recipe
from protocol.errors import RecipeError

_LARGEST_ERROR = 10


@dataclass(frozen=True)
class SumStyle:
    """How the responses to a sum are written."""

    response_is_answer: bool = False
    """The bare answer, as the grader "exact" wants it; else the sum is restated."""
    solution_format: str = "plain"
    seed: int = 0
    """Of the wrong sums in the rejected responses."""

    @classmethod
    def of(cls, recipe: Recipe) -> SumStyle:
        """The style that a recipe asks for."""
        return cls(recipe.task.grader == "exact", recipe.task.solution_format, recipe.seed)

    def response(self, a: int, b: int, claimed: int) -> str:
        """A response that claims `claimed` to be a + b."""
        restated = f"{a} + {b} = {claimed}"
        plain = str(claimed) if self.response_is_answer else restated
        return demonstration(restated, str(claimed), plain, self.solution_format)

    def wrong_sum(self, a: int, b: int) -> int:
        """Not a + b, but at most 10 away from it and not negative; the same for b + a."""
        mixed = xxhash.xxh3_64_intdigest(f"arithmetic/{self.seed}/wrong/{min(a, b)}/{max(a, b)}".encode())
        distance = 1 + mixed % _LARGEST_ERROR
        below = mixed // _LARGEST_ERROR % 2 and a + b >= distance
        return a + b - distance if below else a + b + distance


class ArithmeticPairs(Sequence[Problem]):
    """ "What is a + b?" for the unordered pairs {a, b} at places `first` and later of the split's permutation.

    Place p of a pair gives items 2 p (the smaller operand first) and 2 p + 1 (the larger first).
    """

    def __init__(self, max_operand: int, seed: int, first: int, style: SumStyle) -> None:
        self._pairs = count_pairs(max_operand)
        self._first = first
        self._key = f"arithmetic/{seed}/split"
        self._style = style

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
        return make_sum(*((b, a) if item % 2 else (a, b)), self._style)

    def one_of_each(self, count: int) -> tuple[Problem, ...]:
        """The first `count` pairs, every other one turned round."""
        return tuple(self[2 * place + place % 2] for place in range(count))


def make_sum(a: int, b: int, style: SumStyle, wrong: int | None = None) -> Problem:
    """One sum; `wrong` is what the rejected response claims, None: what the style's seed says."""
    right = style.response(a, b, a + b)
    rejected = style.response(a, b, style.wrong_sum(a, b) if wrong is None else wrong)
    return Problem(f"What is {a} + {b}?", str(a + b), right, chosen=right, rejected=rejected)


def largest_sum(recipe: Recipe) -> Problem:
    """The problem with the longest texts."""
    largest = recipe.task.max_operand
    return make_sum(largest, largest, SumStyle.of(recipe), 2 * largest + _LARGEST_ERROR)


def make_arithmetic(recipe: Recipe) -> ProblemSet:
    """Sums of two operands. A pair is held out as an unordered one: with 3 + 4 goes 4 + 3."""
    task, demonstrated = recipe.task, recipe.warm_start.examples
    pairs = count_pairs(task.max_operand)
    all_pairs = pairs if recipe.method == "eval" else None
    heldout = heldout_wanted(recipe, all_pairs, 'with task.name = "arithmetic": a number')
    if heldout + demonstrated > pairs or (heldout == pairs and recipe.method != "eval"):
        raise RecipeError(
            f"task.max_operand: found {task.max_operand}, which makes {pairs} pairs of operands, allowed: enough for"
            f" eval.prompts = {heldout} + warm_start.examples = {demonstrated} different pairs, and one to train on"
        )
    style = SumStyle.of(recipe)
    everything = ArithmeticPairs(task.max_operand, recipe.seed, 0, style)
    train = ArithmeticPairs(task.max_operand, recipe.seed, heldout, style)
    written = "" if task.solution_format == "plain" else f" {task.solution_format}"
    digest = xxhash.xxh3_128_hexdigest(f"arithmetic {task.max_operand} {task.grader}{written}".encode())
    return ProblemSet(train, everything.one_of_each(heldout), train.one_of_each(demonstrated), digest)


def count_pairs(max_operand: int) -> int:
    """Unordered pairs of operands 0..max_operand."""
    return (max_operand + 1) * (max_operand + 2) // 2


def unordered_pair(rank: int) -> tuple[int, int]:
    """The pair a <= b at this place of (0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2), (0, 3), …"""
    b = (isqrt(8 * rank + 1) - 1) // 2
    return rank - b * (b + 1) // 2, b
