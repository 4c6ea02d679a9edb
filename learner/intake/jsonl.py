"""The task "jsonl": problems from files, one JSON object a line, checked whole before anything starts.

Text only; `data.py` makes tokens of it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from learner.intake.problems import Message, Problem, ProblemSet
from learner.intake.shuffle import permuted
from protocol.config import Recipe, TaskConfig
from protocol.errors import RecipeError

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
MAX_FAULTS_SHOWN = 5
_GSM8K_MARK = "####"
_INTEGER = re.compile(r"[-−]?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)")


def read_jsonl_task(recipe: Recipe) -> ProblemSet:
    """Problems of `task.train`, held-out ones of `task.heldout` or split off by seed.

    A prompt that is held out is taken out of the training problems wherever it appears again, also as a list with one
    message or with other white space; `data.py` looks once more, at the tokens.
    """
    task, wanted = recipe.task, recipe.eval.prompts
    train = read_jsonl(Path(task.train), "task.train", task)
    apart = read_jsonl(Path(task.heldout), "task.heldout", task) if task.heldout else None
    candidates = train if apart is None else apart
    if wanted > len(candidates):
        where = "task.heldout" if task.heldout else "task.train"
        raise RecipeError(f"eval.prompts: found {wanted}, allowed: at most the {len(candidates)} problems of {where}")
    heldout = _draw(candidates, wanted, f"jsonl/{recipe.seed}/heldout")
    unseen = {_asked(problem) for problem in (heldout if apart is None else apart)}
    kept = [problem for problem in train if _asked(problem) not in unseen]
    if repeated := len(train) - len(kept) - (wanted if apart is None else 0):
        logger.warning("%s: %d problems left out of training, their prompts are held out", task.train, repeated)
    if not kept:
        raise RecipeError(f"task.train: found {task.train}, all of whose {len(train)} prompts are held out")
    solved = [problem for problem in kept if problem.solution]
    if recipe.warm_start.examples > len(solved):
        raise RecipeError(
            f"warm_start.examples: found {recipe.warm_start.examples}, allowed: at most the {len(solved)} problems of"
            f' {task.train} with a "solution" that are not held out'
        )
    demonstrations = _draw(solved, recipe.warm_start.examples, f"jsonl/{recipe.seed}/demonstrations")
    return ProblemSet(kept, heldout, demonstrations, _digest([*train, *(apart or [])]))


def read_jsonl(path: Path, key: str, task: TaskConfig) -> list[Problem]:
    """One problem a line: {"prompt", "answer", "solution"} or GSM8K's {"question", "answer": "… #### 42"}.

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
                problems.append(parse_problem(line, task.grader))
            except ValueError as error:
                faults.append(f"{path}:{number}: {error}")
    if faults:
        more = [f"and {len(faults) - MAX_FAULTS_SHOWN} more lines"] if len(faults) > MAX_FAULTS_SHOWN else []
        raise RecipeError("\n".join(faults[:MAX_FAULTS_SHOWN] + more))
    if not problems:
        raise RecipeError(f"{key}: found {path} without a problem, allowed: at least one line")
    return problems


def parse_problem(line: str, grader: str) -> Problem:
    """One line of a file. Raises ValueError with the field, what was found and what is allowed."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found no JSON ({error}), allowed: one JSON object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"found {_shown(record)}, allowed: a JSON object")
    if "prompt" not in record and isinstance(record.get("question"), str):
        problem = _gsm8k_problem(record)
    else:
        problem = Problem(_prompt(record), _answer(record), _solution(record))
    if grader == "integer" and not _INTEGER.fullmatch(problem.answer):
        raise ValueError(f'answer: found {problem.answer[:40]!r}, allowed with task.grader = "integer": an integer')
    return problem


def _gsm8k_problem(record: dict[str, Any]) -> Problem:
    """Cobbe et al., 2021 (arXiv 2110.14168): worked solution, "####", answer. Calculator marks <<…>> are removed."""
    if not record["question"].strip():
        raise ValueError("question: found nothing, allowed: a text")
    worked, mark, answer = _answer(record).rpartition(_GSM8K_MARK)
    if not mark:
        raise ValueError(f'answer: found no "{_GSM8K_MARK}", allowed beside "question": "worked solution #### 42"')
    worked, answer = re.sub(r"<<[^<>]*>>", "", worked).strip(), answer.strip().replace(",", "")
    return Problem(record["question"], answer, f"{worked}\n{_GSM8K_MARK} {answer}" if worked else "")


def _prompt(record: dict[str, Any]) -> str | tuple[Message, ...]:
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        if prompt[-1]["role"] != "user":
            raise ValueError(f'prompt: found a last message of role "{prompt[-1]["role"]}", allowed: "user"')
        return tuple({"role": message["role"], "content": message["content"]} for message in prompt)
    raise ValueError(
        f"prompt: found {_shown(prompt)}, allowed: a text, or a list of messages"
        f' {{"role": {" or ".join(ROLES)}, "content": a text}}'
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)


def _answer(record: dict[str, Any]) -> str:
    answer = record.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, str) and answer.strip():
        return answer.strip()
    raise ValueError(f"answer: found {_shown(answer)}, allowed: a text or an integer")


def _solution(record: dict[str, Any]) -> str:
    solution = record.get("solution", "")
    if not isinstance(solution, str):
        raise ValueError(f"solution: found {_shown(solution)}, allowed: a text")
    return solution.strip()


def _asked(problem: Problem) -> tuple[tuple[str, str], ...]:
    """What a problem asks, whatever its form: (role, content) of each message, white space evened out."""
    prompt = problem.prompt
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return tuple((message["role"], " ".join(message["content"].split())) for message in messages)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]


def _draw(problems: Sequence[Problem], count: int, key: str) -> tuple[Problem, ...]:
    return tuple(problems[permuted(place, len(problems), key)] for place in range(count))


def _digest(problems: Sequence[Problem]) -> str:
    hasher = xxhash.xxh3_128()
    for problem in problems:
        hasher.update(json.dumps([problem.prompt, problem.answer, problem.solution], sort_keys=True).encode() + b"\n")
    return hasher.hexdigest()
