"""Problems from files, one JSON object a line, checked whole before anything starts: "jsonl", and as what other data
sets reach the learner (`deploy/datasets.py` writes such files for "gsm8k" and "hub").

Text only; `records.py` reads a record, `data.py` makes tokens of the problems.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from learner.intake.problems import Problem, ProblemSet, split_problems
from learner.intake.records import Reading, read_problem, shown
from protocol.config import Recipe
from protocol.errors import RecipeError

logger = logging.getLogger(__name__)

MAX_FAULTS_SHOWN = 5


def read_jsonl_task(recipe: Recipe) -> ProblemSet:
    """Problems of `task.train`, held-out ones of `task.heldout` or split off by seed."""
    task = recipe.task
    if not task.train:
        fetch = "gsm8k" if task.name == "gsm8k" else task.dataset
        raise RecipeError(
            f'task.train: found "", allowed here: a file of problems; `tandem data fetch {fetch}` brings one, and'
            " `tandem train` puts its name into the recipe"
        )
    train = read_jsonl(Path(task.train), "task.train", Reading.of(recipe))
    if recipe.method == "dpo":
        train = _without_ties(train, task.train)
    apart = read_jsonl(Path(task.heldout), "task.heldout", Reading.of(recipe, heldout=True)) if task.heldout else None
    return split_problems(recipe, train, apart, "task.train", task.train)


def read_jsonl(path: Path, key: str, reading: Reading) -> list[Problem]:
    """One problem a line.

    Raises RecipeError that names `key` for a file that cannot be read, and file, line and field for what is wrong
    inside it.
    """
    try:
        lines = path.expanduser().read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{key}: found {path} ({cause}), allowed: a file of JSON lines in UTF-8") from None
    problems, faults = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                problems.append(parse_problem(line, reading))
            except ValueError as error:
                faults.append(f"{path}:{number}: {error}")
    if faults:
        more = [f"and {len(faults) - MAX_FAULTS_SHOWN} more lines"] if len(faults) > MAX_FAULTS_SHOWN else []
        raise RecipeError("\n".join(faults[:MAX_FAULTS_SHOWN] + more))
    if not problems:
        raise RecipeError(f"{key}: found {path} without a problem, allowed: at least one line")
    return problems


def parse_problem(line: str, reading: Reading) -> Problem:
    """One line of a file. Raises ValueError with the field, what was found and what is allowed."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found no JSON ({error}), allowed: one JSON object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"found {shown(record)}, allowed: a JSON object")
    return read_problem(record, reading)


def _without_ties(problems: list[Problem], name: str) -> list[Problem]:
    """A preference between two equal responses says nothing, but would be counted."""
    kept = [problem for problem in problems if problem.chosen != problem.rejected]
    if ties := len(problems) - len(kept):
        logger.warning("%d pairs left out, their chosen and rejected responses are the same (%s)", ties, name)
    if not kept:
        raise RecipeError(f"task.train: found {name}, whose chosen and rejected are the same in every line")
    return kept
