"""The task "reasoning_gym": problems that the package of that name generates, from one seed for training and another
for the held-out ones.

The grader (`reasoning_gym:NAME`) needs the whole entry, not only the answer: the reference is the entry as JSON. Text
only, like its neighbours; the package is imported when the task is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

import xxhash

from learner.intake.problems import Problem, ProblemSet, demonstration, heldout_wanted, split_problems
from protocol.config import OFFLINE_METHODS, Recipe
from protocol.errors import RecipeError

_NEAR_NAMES = 5
_SEEDS = 2**30
"""Entry i of a data set comes from seed + i: training seeds are below this, held-out ones are not."""
_TRIES_PER_HELDOUT = 20
_OWN_OPTIONS = ("seed", "size")
_ANY_ANSWER = "(any that the task's scorer accepts)"
_MADE_OF_OTHERS = "composite"
"""Its settings are tables, which `task.options` cannot hold."""


def make_reasoning_gym(recipe: Recipe) -> ProblemSet:
    """`task.size` training problems and `eval.prompts` others, no question among both.

    Raises RecipeError for a task or options that the package does not know, and for a grader that cannot read its
    references.
    """
    task = recipe.task
    _check_name(task.dataset)
    wanted = heldout_wanted(recipe, None, 'with task.name = "reasoning_gym": a number, they are generated')
    graded = recipe.method not in OFFLINE_METHODS or wanted
    tasks_graded = re.findall(r"reasoning_gym:(\w+)", task.grader)
    if graded and (":" not in task.grader or any(name != task.dataset for name in tasks_graded)):
        raise RecipeError(
            f'task.grader: found {task.grader!r}, allowed with task.name = "reasoning_gym":'
            f' "reasoning_gym:{task.dataset}" or a function of yours (module:function)'
        )
    if task.size >= _SEEDS:
        raise RecipeError(f"task.size: found {task.size}, allowed: less than {_SEEDS}")
    heldout: dict[str, dict[str, Any]] = {}
    if wanted:
        for entry in _entries(recipe, _SEEDS, wanted * _TRIES_PER_HELDOUT):
            heldout.setdefault(" ".join(entry["question"].split()), entry)
            if len(heldout) == wanted:
                break
    if len(heldout) < wanted:
        raise RecipeError(
            f"eval.prompts: found {wanted}, allowed: at most {len(heldout)}, so many different questions were found"
            f" in task.dataset = {task.dataset!r} with task.options = {task.options}"
        )
    apart = [_problem(entry, recipe) for entry in heldout.values()]
    train = [] if recipe.method == "eval" else [_problem(entry, recipe) for entry in _entries(recipe, 0, task.size)]
    return split_problems(recipe, train, apart if wanted else None, "task.dataset", task.dataset)


def _check_name(name: str) -> None:
    """Raise RecipeError for a task that the package does not have."""
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {_MADE_OF_OTHERS})
    if name not in names:
        near = difflib.get_close_matches(name, names, _NEAR_NAMES, cutoff=0.4) or names[:_NEAR_NAMES]
        raise RecipeError(
            f"task.dataset: found {name!r}, allowed: one of the {len(names)} tasks of reasoning_gym, such"
            f" as {', '.join(near)}"
        )


def _entries(recipe: Recipe, first_seed: int, size: int) -> Iterator[dict[str, Any]]:
    """The entries of a data set whose seed is drawn from the recipe's, at `first_seed` or above."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = recipe.task
    known = [field.name for field in dataclasses.fields(DATASETS[task.dataset][1]) if field.name not in _OWN_OPTIONS]
    if unknown := [name for name in task.options if name not in known]:
        raise RecipeError(
            f"task.options.{unknown[0]}: found for {task.dataset}, which has no such setting;"
            f" allowed: {', '.join(known)}"
        )
    seed = first_seed + xxhash.xxh3_64_intdigest(f"reasoning_gym/{recipe.seed}/{first_seed}".encode()) % (_SEEDS // 2)
    try:
        dataset = reasoning_gym.create_dataset(task.dataset, seed=seed, size=size, **task.options)
        _check_survives_json(dataset, task.dataset)
        for index in range(size):
            yield dataset[index]
    except RecipeError:
        raise
    except Exception as error:  # a task's own assertions and what it stumbles over
        cause = str(error) or type(error).__name__
        raise RecipeError(
            f"task.options: found {task.options}, which {task.dataset} refuses: {cause}. Allowed: settings of"
            f" reasoning_gym's {DATASETS[task.dataset][1].__name__}: {', '.join(known)}"
        ) from error


def _problem(entry: dict[str, Any], recipe: Recipe) -> Problem:
    answer = "" if entry["answer"] is None else str(entry["answer"])
    solution = demonstration("", answer, answer, recipe.task.solution_format) if answer else ""
    return Problem(entry["question"], json.dumps(_jsonable(entry)), solution, answer_text=answer or _ANY_ANSWER)


def _check_survives_json(dataset: Any, name: str) -> None:
    """Raise RecipeError for a task whose scorer needs tuples or objects, which the grader cannot have."""
    entry = dataset[0]
    sent = json.loads(json.dumps(_jsonable(entry)))
    if dataset.score_answer(entry["answer"], entry) != dataset.score_answer(entry["answer"], sent):
        raise RecipeError(
            f"task.dataset: found {name!r}, whose scorer does not recognise its own answer once the problem has"
            " crossed the wire as JSON; allowed: another task"
        )


def _jsonable(entry: dict[str, Any]) -> dict[str, Any]:
    """What the grader needs of an entry, without what is no JSON."""
    metadata = {key: value for key, value in (entry.get("metadata") or {}).items() if _is_json(value)}
    return {"question": entry["question"], "answer": entry["answer"], "metadata": metadata}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
