"""Token ids to learn from without the engine: demonstrations (SFT) and preferences (DPO), made when they are asked for.

Called by `data.py`; the training methods see plain sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar, overload

from learner.intake.arithmetic import ArithmeticPairs
from learner.intake.problems import Problem
from learner.intake.prompts import Prompter

Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]
"""(prompt ids, response ids), the end of the turn included."""
Preference = tuple[Ids, Ids, Ids]
"""(prompt ids, chosen ids, rejected ids), the end of the turn included."""
Made = TypeVar("Made")

_CACHED = 4096


class Lazy(Sequence[Made]):
    """One thing for each problem, in their order, made at the first access and kept for a while."""

    def __init__(self, problems: Sequence[Problem], make: Callable[[Problem], Made]) -> None:
        self._problems = problems
        self._make = lru_cache(_CACHED)(lambda item: make(problems[item]))

    def __len__(self) -> int:
        return len(self._problems)

    @overload
    def __getitem__(self, item: int) -> Made: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[Made]: ...
    def __getitem__(self, item: int | slice) -> Made | Sequence[Made]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        place = item + len(self) if item < 0 else item
        if not 0 <= place < len(self):
            raise IndexError(f"item: found {item}, allowed: 0..{len(self) - 1}")
        return self._make(place)


def sft_pairs(problems: Sequence[Problem], prompter: Prompter) -> Sequence[Pair]:
    """Of all problems that have a solution, in their order."""

    def make(problem: Problem) -> Pair:
        return prompter.prompt_ids(problem.prompt), prompter.response_ids(problem.solution)

    return Lazy(_those(problems, lambda problem: bool(problem.solution)), make)


def preference_pairs(problems: Sequence[Problem], prompter: Prompter) -> Sequence[Preference]:
    """Of all problems that have a preference, in their order."""

    def make(problem: Problem) -> Preference:
        chosen, rejected = prompter.response_ids(problem.chosen), prompter.response_ids(problem.rejected)
        return prompter.prompt_ids(problem.prompt), chosen, rejected

    return Lazy(_those(problems, lambda problem: bool(problem.chosen)), make)


def _those(problems: Sequence[Problem], wanted: Callable[[Problem], bool]) -> Sequence[Problem]:
    """Generated sums all have both, and may be more than can be looked at."""
    return problems if isinstance(problems, ArithmeticPairs) else [p for p in problems if wanted(p)]
