"""The task as the learner sees it: tokenized examples by number, in an order that depends on the seed alone.

`load_task` is called once, by the learner's `__main__` (and by the preflight check, for its errors); the dispatcher
then asks for `train(0), train(1), …` as it issues tickets. Knows no ticket, actor or tensor.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import xxhash

from learner.intake.jsonl import read_jsonl_task
from learner.intake.problems import Problem, ProblemSet, make_arithmetic, make_sum
from learner.intake.prompts import Prompter
from learner.intake.shuffle import permuted
from protocol.config import Recipe
from protocol.errors import RecipeError

log = logging.getLogger(__name__)

_CACHED_EXAMPLES = 4096
_GENERATED_LENGTHS_CHECKED = 500


@dataclass(frozen=True)
class Example:
    """One problem, ready to become a ticket."""

    prompt: str
    """For people; the model reads `prompt_ids`."""
    prompt_ids: tuple[int, ...]
    """Token ids of the whole prompt, special tokens included."""
    answer: str
    solution: str = ""
    """A response to demonstrate, without the end of the turn; "": there is none."""


class Task:
    """Examples to train on, without end, and the two fixed lists: held out and demonstrated."""

    def __init__(self, recipe: Recipe, problems: ProblemSet, prompter: Prompter) -> None:
        self._seed = recipe.seed
        self._problems = problems
        self._prompter = prompter
        self._cached_example = lru_cache(_CACHED_EXAMPLES)(lambda item: self._example(problems.train[item]))
        self.heldout = [self._example(problem) for problem in problems.heldout]
        self.demonstrations = [self._example(problem) for problem in problems.demonstrations]

    @property
    def train_size(self) -> int:
        """Examples in one pass over the training problems."""
        return len(self._problems.train)

    def train(self, index: int) -> Example:
        """The example of position `index` = 0, 1, 2, … of the endless stream.

        Pass `index // train_size` deals every training problem once, in an order of its own. Depends on the seed, the
        task and `index`, and on nothing else: not on who asks, nor on what was asked before.
        """
        if index < 0:
            raise IndexError(f"index: found {index}, allowed: 0 or more")
        number, place = divmod(index, self.train_size)
        return self._cached_example(permuted(place, self.train_size, f"train/{self._seed}/{number}"))

    def demonstration_tokens(self, example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(prompt ids, response ids) for supervised training; the response ends with the end of the turn."""
        return example.prompt_ids, self._prompter.response_ids(example.solution)

    def fingerprint(self) -> str:
        """xxh3-128, hexadecimal, of the problems, their split and the held-out prompts' tokens.

        A resumed run compares it with its checkpoint's: another one means that the data, the seed, the chat template
        or the tokenizer has changed.
        """
        hasher = xxhash.xxh3_128(f"{self._problems.digest} {self._seed} {self.train_size}\n".encode())
        for example in [*self.heldout, *self.demonstrations, self.train(0)]:
            hasher.update(f"{example.prompt_ids} {example.answer!r} {example.solution!r}\n".encode())
        return hasher.hexdigest()

    def _example(self, problem: Problem) -> Example:
        return Example(problem.text, self._prompter.prompt_ids(problem.prompt), problem.answer, problem.solution)


def load_task(recipe: Recipe, tokenizer: Any) -> Task:
    """Read or make the task's problems and tokenize them with the model's tokenizer (of transformers).

    Raises RecipeError for a file that is missing or wrong, for more held-out problems or demonstrations than there
    are, and for prompts that leave no room for a completion: nothing is ever cut.
    """
    problems = make_arithmetic(recipe) if recipe.task.name == "arithmetic" else read_jsonl_task(recipe)
    prompter = Prompter(tokenizer, recipe.task.system_prompt)
    problems = _without_heldout_prompts(problems, prompter) if recipe.task.name == "jsonl" else problems
    task = Task(recipe, problems, prompter)
    _check_lengths(recipe, task, problems, prompter)
    return task


def _without_heldout_prompts(problems: ProblemSet, prompter: Prompter) -> ProblemSet:
    """The problem set without training problems and demonstrations whose prompt is a held-out one to the model.

    What counts is the token ids: a text and a list with one message of a user are the same prompt.
    """
    heldout = {prompter.prompt_ids(problem.prompt) for problem in problems.heldout}
    train = [problem for problem in problems.train if prompter.prompt_ids(problem.prompt) not in heldout]
    if len(train) == len(problems.train):
        return problems
    log.warning("%d problems left out of training, their prompts are held out", len(problems.train) - len(train))
    if not train:
        raise RecipeError("task.train: found only problems whose prompts are held out, allowed: others too")
    demonstrations = [p for p in problems.demonstrations if prompter.prompt_ids(p.prompt) not in heldout]
    if len(demonstrations) < len(problems.demonstrations):
        raise RecipeError("task.train: found problems with a solution whose prompts are held out in another form")
    return dataclasses.replace(problems, train=train)


def _check_lengths(recipe: Recipe, task: Task, problems: ProblemSet, prompter: Prompter) -> None:
    """Raise RecipeError if a prompt and its completion, or a demonstration, do not fit into the context."""
    room = recipe.model.max_model_len
    prompts = [len(prompter.prompt_ids(problem.prompt)) for problem in _bounding_problems(recipe, problems)]
    heldout = [len(example.prompt_ids) for example in task.heldout]
    demonstrations = [sum(map(len, task.demonstration_tokens(example))) for example in task.demonstrations]
    _check_fit(prompts, room, recipe.rollout.max_tokens, "training prompts")
    _check_fit(heldout, room, recipe.eval_sampling_tokens, "held-out prompts")
    _check_fit(demonstrations, room, 0, "demonstrations")


def _bounding_problems(recipe: Recipe, problems: ProblemSet) -> Sequence[Problem]:
    """All training problems; of a generated task the one with the longest text, and as many as one can look at."""
    if recipe.task.name == "arithmetic":
        largest = recipe.task.max_operand
        return [make_sum(largest, largest), *problems.train[:_GENERATED_LENGTHS_CHECKED]]
    return problems.train


def _check_fit(lengths: Sequence[int], room: int, max_tokens: int, what: str) -> None:
    too_long = [length for length in lengths if length + max_tokens > room]
    if too_long:
        completion = f" beside a completion of {max_tokens}" if max_tokens else ""
        raise RecipeError(
            f"model.max_model_len: found {room}, which leaves {room - max_tokens} tokens{completion}; {len(too_long)}"
            f" of {len(lengths)} {what} have more, up to {max(too_long)}. Allowed: at least"
            f" {max(too_long) + max_tokens}, or shorter {what}"
        )
