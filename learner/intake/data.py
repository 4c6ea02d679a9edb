"""The task as the learner sees it: tokenized examples by number, in an order that depends on the seed alone.

`load_task` is called once, by the learner's `__main__` (and by the preflight check, for its errors); the dispatcher
then asks for `train(0), train(1), …` as it issues tickets, and the methods that learn from a data set for its pairs.
Knows no ticket, actor or tensor.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import xxhash

from learner.intake import pairs
from learner.intake.arithmetic import largest_sum, make_arithmetic
from learner.intake.gym import make_reasoning_gym
from learner.intake.jsonl import read_jsonl_task
from learner.intake.problems import Problem, ProblemSet, draw_demonstrations
from learner.intake.prompts import Prompter
from learner.intake.shuffle import permuted
from learner.intake.templates import PromptTemplate, load_template
from protocol.config import OFFLINE_METHODS, ROLLOUT_METHODS, Recipe
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
    """The reference, as the grader gets it."""
    solution: str = ""
    """A response to demonstrate, without the end of the turn; "": there is none."""
    answer_text: str = ""
    """The reference for people, where it is another; see `shown_answer`."""

    @property
    def shown_answer(self) -> str:
        """The reference as people read it."""
        return self.answer_text or self.answer


class Task:
    """Examples to train on, without end, and the two fixed lists: held out and demonstrated."""

    def __init__(
        self, recipe: Recipe, problems: ProblemSet, prompter: Prompter, template: PromptTemplate | None = None
    ) -> None:
        self._seed = recipe.seed
        self._problems = problems
        self._prompter = prompter
        self._template = template
        self._cached_example = lru_cache(_CACHED_EXAMPLES)(lambda item: self._example(problems.train[item]))
        self._sft_pairs = pairs.sft_pairs(problems.train, prompter)
        self._preference_pairs = pairs.preference_pairs(problems.train, prompter)
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

    def sft_pairs(self) -> Sequence[pairs.Pair]:
        """(prompt ids, response ids) of every training problem that has a solution, in the order of the data set.

        Tokenized on access; of a generated task there may be more than fit into memory.
        """
        return self._sft_pairs

    def preference_pairs(self) -> Sequence[pairs.Preference]:
        """(prompt ids, chosen ids, rejected ids) of every training problem that has them, likewise."""
        return self._preference_pairs

    def demonstration_tokens(self, example: Example) -> pairs.Pair:
        """(prompt ids, response ids) for supervised training; the response ends with the end of the turn."""
        return example.prompt_ids, self._prompter.response_ids(example.solution)

    def text(self, ids: tuple[int, ...]) -> str:
        """What the model sees, as text with its special tokens: for people."""
        return self._prompter.text(ids)

    def fingerprint(self) -> str:
        """xxh3-128, hexadecimal, of the problems, their split, the prompt template and the held-out prompts' tokens.

        A resumed run compares it with its checkpoint's: another one means that the data, the seed, a template or the
        tokenizer has changed.
        """
        hasher = xxhash.xxh3_128(f"{self._problems.digest} {self._seed} {self.train_size}\n".encode())
        if self._template:
            hasher.update(f"{self._template.text!r}\n".encode())
        first = [self.train(0)] if self.train_size else []
        for example in [*self.heldout, *self.demonstrations, *first]:
            hasher.update(f"{example.prompt_ids} {example.answer!r} {example.solution!r}\n".encode())
        return hasher.hexdigest()

    def _example(self, problem: Problem) -> Example:
        ids = self._prompter.prompt_ids(problem.prompt)
        return Example(problem.text, ids, problem.answer, problem.solution, problem.answer_text)


def load_task(recipe: Recipe, tokenizer: Any) -> Task:
    """Read or make the task's problems and tokenize them with the model's tokenizer (of transformers).

    Raises RecipeError for a file that is missing or wrong, for more held-out problems or demonstrations than there
    are, for a method that finds nothing to learn from, and for prompts that leave no room for a completion: nothing is
    ever cut.
    """
    template = load_template(recipe.task.template)
    problems = _problems(recipe)
    prompter = Prompter(tokenizer, recipe.task.system_prompt, template)
    if _may_leave_out(recipe):
        problems = _without_heldout_prompts(problems, prompter)
    if _leaves_out(recipe):
        problems = _without_over_long(recipe, problems, prompter)
    task = Task(recipe, problems, prompter, template)
    _check_pairs(recipe, task)
    _check_lengths(recipe, task, problems, prompter)
    return task


def _problems(recipe: Recipe) -> ProblemSet:
    if recipe.task.name == "arithmetic":
        return make_arithmetic(recipe)
    return make_reasoning_gym(recipe) if recipe.task.name == "reasoning_gym" else read_jsonl_task(recipe)


def _may_leave_out(recipe: Recipe) -> bool:
    """Whether training problems can be looked at one by one: generated sums are too many."""
    return recipe.task.name != "arithmetic" and recipe.method != "eval"


def _leaves_out(recipe: Recipe) -> bool:
    return _may_leave_out(recipe) and recipe.task.over_long == "leave_out"


def _without_heldout_prompts(problems: ProblemSet, prompter: Prompter) -> ProblemSet:
    """The problem set without training problems and demonstrations whose prompt is a held-out one to the model.

    What counts is the token ids: a system message may stand in a record or in the recipe. They are looked at where the
    last message is a held-out one's.
    """
    heldout = {prompter.prompt_ids(problem.prompt) for problem in problems.heldout}
    asked = {problem.asked[-1] for problem in problems.heldout}
    train = [p for p in problems.train if p.asked[-1] not in asked or prompter.prompt_ids(p.prompt) not in heldout]
    if len(train) == len(problems.train):
        return problems
    log.warning("%d problems left out of training, their prompts are held out", len(problems.train) - len(train))
    if not train:
        raise RecipeError("task.train: found only problems whose prompts are held out, allowed: others too")
    demonstrations = [p for p in problems.demonstrations if prompter.prompt_ids(p.prompt) not in heldout]
    if len(demonstrations) < len(problems.demonstrations):
        raise RecipeError("task.train: found problems with a solution whose prompts are held out in another form")
    return dataclasses.replace(problems, train=train)


def _check_pairs(recipe: Recipe, task: Task) -> None:
    """Raise RecipeError if a method that learns from a data set has nothing to learn from."""
    names = {"sft": "prompt and solution", "dpo": "prompt, chosen and rejected"}
    found = {"sft": task.sft_pairs, "dpo": task.preference_pairs}
    if recipe.method not in found or len(found[recipe.method]()):
        return
    where = recipe.task.train or recipe.task.dataset
    raise RecipeError(
        f"task.train: found none of {task.train_size} records ({recipe.task.name} {where}) to learn from, allowed with"
        f' method = "{recipe.method}": records with {names[recipe.method]} (task.fields says what they are called)'
    )


def _check_lengths(recipe: Recipe, task: Task, problems: ProblemSet, prompter: Prompter) -> None:
    """Raise RecipeError if a prompt and its completion, or a response to learn from, do not fit into the context."""
    if not _leaves_out(recipe):  # else all that is learnt from fits, it was looked at one by one
        _check_learned_lengths(recipe, task, problems, prompter)
    heldout = [len(example.prompt_ids) for example in task.heldout]
    _check_fit(heldout, recipe.model.max_model_len, recipe.eval_sampling_tokens, "held-out prompts")


def _check_learned_lengths(recipe: Recipe, task: Task, problems: ProblemSet, prompter: Prompter) -> None:
    room = recipe.model.max_model_len
    advice = ', or task.over_long = "leave_out"' if _may_leave_out(recipe) else ""
    bounding = _bounding_problems(recipe, problems)
    if recipe.method in ROLLOUT_METHODS:
        prompts = [_learned_length(recipe, problem, prompter) for problem in bounding]
        _check_fit(prompts, room, recipe.rollout.max_tokens, "training prompts", advice)
    demonstrations = [sum(map(len, task.demonstration_tokens(example))) for example in task.demonstrations]
    _check_fit(demonstrations, room, 0, "demonstrations", advice)
    if recipe.method in OFFLINE_METHODS:
        learned = [problem for problem in bounding if _responses(recipe, problem)]
        lengths = [_learned_length(recipe, problem, prompter) for problem in learned]
        _check_fit(lengths, room, 0, "pairs of prompt and response", advice)


def _without_over_long(recipe: Recipe, problems: ProblemSet, prompter: Prompter) -> ProblemSet:
    """The problem set without training problems that do not fit; says how many they were. Demonstrations are drawn of
    those that fit."""
    context = recipe.model.max_model_len
    room = context - (recipe.rollout.max_tokens if recipe.method in ROLLOUT_METHODS else 0)
    train = [problem for problem in problems.train if _learned_length(recipe, problem, prompter) <= room]
    if left_out := len(problems.train) - len(train):
        log.warning(
            "%d of %d training problems left out, they have more than %d tokens", left_out, len(problems.train), room
        )
    if not train:
        beside = f" beside a completion of rollout.max_tokens = {context - room}" if room < context else ""
        raise RecipeError(
            f"model.max_model_len: found {context}, allowed: more, no training problem fits into that{beside}"
        )
    demonstrations = problems.demonstrations
    if recipe.warm_start.examples:

        def fits(problem: Problem) -> bool:
            return len(prompter.prompt_ids(problem.prompt)) + len(prompter.response_ids(problem.solution)) <= context

        demonstrable = [problem for problem in problems.train if problem.solution and fits(problem)]
        demonstrations = draw_demonstrations(recipe, demonstrable, recipe.task.train or recipe.task.dataset)
    return dataclasses.replace(problems, train=train, demonstrations=demonstrations)


def _learned_length(recipe: Recipe, problem: Problem, prompter: Prompter) -> int:
    """Tokens of the prompt, and of the longest response that the method learns from."""
    responses = [len(prompter.response_ids(response)) for response in _responses(recipe, problem)]
    return len(prompter.prompt_ids(problem.prompt)) + max(responses, default=0)


def _responses(recipe: Recipe, problem: Problem) -> list[str]:
    """What a method that learns from a data set has of a problem."""
    found = {"sft": [problem.solution], "dpo": [problem.chosen, problem.rejected]}
    return [response for response in found.get(recipe.method, []) if response]


def _bounding_problems(recipe: Recipe, problems: ProblemSet) -> Sequence[Problem]:
    """All training problems; of a generated task the one with the longest text, and as many as one can look at."""
    if recipe.task.name == "arithmetic":
        return [largest_sum(recipe), *problems.train[:_GENERATED_LENGTHS_CHECKED]]
    return problems.train


def _check_fit(lengths: Sequence[int], room: int, max_tokens: int, what: str, advice: str = "") -> None:
    too_long = [length for length in lengths if length + max_tokens > room]
    if too_long:
        completion = f" beside a completion of {max_tokens}" if max_tokens else ""
        raise RecipeError(
            f"model.max_model_len: found {room}, which leaves {room - max_tokens} tokens{completion}; {len(too_long)}"
            f" of {len(lengths)} {what} have more, up to {max(too_long)}. Allowed: at least"
            f" {max(too_long) + max_tokens}, or shorter {what}{advice}"
        )
