"""Problems and their split: held out, demonstrated, trained on. Text only; `data.py` makes tokens of it.

Held-out problems are never trained on and never demonstrated. Demonstrations (the warm start's) come out of the
training problems and are trained on like the others. Called by the modules that read or generate a task's problems.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from learner.intake.shuffle import permuted
from protocol.config import Recipe
from protocol.errors import RecipeError

logger = logging.getLogger(__name__)

Message = Mapping[str, str]
"""One chat message: "role" and "content"."""


@dataclass(frozen=True)
class Problem:
    """One prompt and what is known about good responses to it."""

    prompt: str | tuple[Message, ...]
    answer: str
    """The reference as the grader gets it; "": there is none, the problem cannot be graded."""
    solution: str = ""
    """The response to demonstrate, final answer included; "": there is none."""
    answer_text: str = ""
    """The reference for people, where the grader's is not for them; "": it is `answer`."""
    chosen: str = ""
    rejected: str = ""
    """A preference: of two responses the better and the worse one; "": there is none."""

    @property
    def text(self) -> str:
        """The prompt for people."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """What is asked, whatever its form: (role, content) of each message, white space evened out."""
        messages = ({"role": "user", "content": self.prompt},) if isinstance(self.prompt, str) else self.prompt
        return tuple((message["role"], " ".join(message["content"].split())) for message in messages)


@dataclass(frozen=True)
class ProblemSet:
    """A task's problems, split."""

    train: Sequence[Problem]
    heldout: tuple[Problem, ...]
    demonstrations: tuple[Problem, ...]
    digest: str
    """xxh3-128 of everything the problems were made of, hexadecimal."""


def demonstration(reasoning: str, answer: str, plain: str, solution_format: str) -> str:
    """A response to demonstrate: `plain`, or reasoning and answer between the tags of R1-Zero."""
    if solution_format == "plain":
        return plain
    thought = f"<think> {reasoning} </think>" if reasoning else "<think> </think>"
    return f"{thought} <answer> {answer} </answer>"


def split_problems(
    recipe: Recipe, train: Sequence[Problem], apart: Sequence[Problem] | None, key: str, found: str
) -> ProblemSet:
    """`eval.prompts` held-out problems out of `apart`, or split off `train` by seed; demonstrations out of the rest.

    A prompt that is held out is taken out of the training problems wherever it appears again, also as a list with one
    message or with other white space; `data.py` looks once more, at the tokens. Of `apart` every prompt is held out,
    drawn or not. Errors name `key`, the recipe's for the training problems, and what was `found` there.
    """
    seed = recipe.seed
    candidates = [problem for problem in (train if apart is None else apart) if problem.answer]
    of_their_own = apart is not None or recipe.method == "eval"
    allowed = "here: a number, or held-out problems of their own (task.heldout, task.heldout_split)"
    wanted = heldout_wanted(recipe, max(len(candidates), 1) if of_their_own else None, allowed)
    if wanted > len(candidates):
        where = key if apart is None else "task.heldout"
        raise RecipeError(
            f"eval.prompts: found {wanted}, allowed: at most the {len(candidates)} problems of {where} that have an"
            " answer"
        )
    heldout = _draw(candidates, wanted, f"jsonl/{seed}/heldout")
    unseen = {problem.asked for problem in (heldout if apart is None else apart)}
    kept = [problem for problem in train if problem.asked not in unseen]
    if repeated := len(train) - len(kept) - (wanted if apart is None else 0):
        logger.warning("%s: %d problems left out of training, their prompts are held out", found, repeated)
    if not kept and recipe.method != "eval":
        raise RecipeError(f"{key}: found {found}, all of whose {len(train)} prompts are held out; allowed: others too")
    demonstrations = draw_demonstrations(recipe, kept, found)
    return ProblemSet(kept, heldout, demonstrations, digest([*train, *(apart or [])]))


def heldout_wanted(recipe: Recipe, available: int | None, allowed: str) -> int:
    """`eval.prompts` as a number; "all" are those `available`. None: none are set apart, RecipeError says `allowed`."""
    if recipe.eval.prompts != "all":
        return recipe.eval.prompts
    if available is None:
        raise RecipeError(f'eval.prompts: found "all", allowed {allowed}')
    return available


def draw_demonstrations(recipe: Recipe, problems: Sequence[Problem], found: str) -> tuple[Problem, ...]:
    """`warm_start.examples` of the problems that have a solution, by seed. Raises RecipeError if they are too few."""
    solved = [problem for problem in problems if problem.solution]
    if recipe.warm_start.examples > len(solved):
        raise RecipeError(
            f"warm_start.examples: found {recipe.warm_start.examples}, allowed: at most the {len(solved)} problems of"
            f' {found} with a "solution" that are not held out and fit into model.max_model_len'
        )
    return _draw(solved, recipe.warm_start.examples, f"jsonl/{recipe.seed}/demonstrations")


def digest(problems: Sequence[Problem]) -> str:
    """xxh3-128 of everything in these problems, in their order."""
    hasher = xxhash.xxh3_128()
    for problem in problems:
        hasher.update(json.dumps(vars(problem), sort_keys=True).encode() + b"\n")
    return hasher.hexdigest()


def _draw(problems: Sequence[Problem], count: int, key: str) -> tuple[Problem, ...]:
    return tuple(problems[permuted(place, len(problems), key)] for place in range(count))
