"""The graders `reasoning_gym:NAME`: the scorers of the package reasoning-gym, imported when one is first used.

Some of its scorers evaluate text as Python: the response's answer, and parts of the problem, which came over the wire.
For those tasks (`EVALUATED`) both may hold only what an honest answer needs, which suffices for no call of anything but
mathematics; anything else never reaches the scorer.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import regex as re

from actor.rewards.base import Grader, Scores, make_scores
from actor.rewards.text import has_numeral

FAMILY = "reasoning_gym"
MAX_ANSWER_CHARS = 20_000

_ARITHMETIC = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?|\*(?!\*)|[-+/() ])*+")
_LIST = re.compile(r"(?:[A-Za-z0-9_'\",\[\]\s-]|(?<=[0-9])\.(?=[0-9]))*+")
_FUNCTIONS = r"sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi|Abs"
_ALGEBRA = re.compile(
    rf"(?:[0-9]+(?:\.[0-9]+)?|(?<![A-Za-z_])(?:{_FUNCTIONS}|[A-Za-z])(?![A-Za-z_0-9])|[-+*/^() \n])*+"
)
_TOWER = re.compile(r"(?:\*\*|\^)[ (]*[-+]?(?:[0-9]{4,}|[0-9A-Za-z.]+[ )]*(?:\*\*|\^))")
"""Powers of powers, and large ones: evaluating them takes longer than anybody waits."""
_HEX = re.compile(r"(?:0x[0-9a-fA-F]+|[0-9]+|[-+*/<>&|^~() ])*+")
EVALUATED: Mapping[str, tuple[re.Pattern[str], tuple[str, ...]]] = {
    "binary_matrix": (_LIST, ()),
    "bitwise_arithmetic": (_HEX, ("metadata.problem",)),
    "countdown": (_ARITHMETIC, ()),
    "intermediate_integration": (_ALGEBRA, ("metadata.integrand",)),
    "n_queens": (_LIST, ()),
    "number_sorting": (_LIST, ("answer",)),
    "polynomial_multiplication": (_ALGEBRA, ("answer",)),
    "puzzle24": (_ARITHMETIC, ()),
    "simple_integration": (_ALGEBRA, ("metadata.integrand",)),
    "spiral_matrix": (_LIST, ()),
    "string_insertion": (_LIST, ()),
}
"""Task -> what text may consist of that its scorer evaluates, and the parts of the problem that are such text, too."""
_FORMS: Mapping[str, re.Pattern[str]] = {
    "fraction_simplification": re.compile(r"\$?(?:-?[0-9]+ ?/ ?[0-9]+|-?\\[dt]?frac\{-?[0-9]+\}\{[0-9]+\})\$?"),
    "gsm_symbolic": re.compile(r"[-+]?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?: ?%| [A-Za-z]+)?"),
}
"""Task -> what an answer must look like, where the package's scorer takes the first number of a text for the answer."""
_EXACT = ("game_of_life_halting",)
"""Tasks whose scorer takes any text for right: their answers are compared as text."""
_TUPLES = ("arc_agi", "rearc")
"""Tasks whose scorer compares with tuples, which JSON turns into lists."""

_PREFIX = re.compile(
    r"(?:(?:the|my|so|thus|therefore|final|answer|result),?\s+)*(?:answer|result)\s*(?:is|:|=)\s*:?\s*", re.I
)
_CALCULATION = re.compile(r"(?!\s*-?[0-9.]+/[0-9.]+\s*$)(?:[^=]*[0-9)]\s*[-+*/×÷^]\s*[-(]*[0-9][^=]*|\s*[A-Za-z]\s*)")
_NUMBER = re.compile(r"[-+]?\$?[0-9][0-9.,/]*%?")


def make_gym_grader(name: str) -> Grader:
    """The grader `reasoning_gym:NAME`. Raises ValueError for a name that the package does not know.

    The reference is the whole problem as JSON: {"question": …, "answer": …, "metadata": {…}}. The answer is what stands
    in the response's one `<answer>` block. A response without any such tag is an answer by itself, see `find_answer`.

    Scores: "reward" and "answer_reward" = the package's own figure, between 0 and 1 (some tasks give a little for
    a wrong answer of the right form); what it gives for merely containing the right answer is not given.
    "format_reward" = the block was there exactly once, at the end. The grader raises ValueError where the reference is
    no such JSON.
    """
    score = load_scorer(name)

    def grade(response: str, answer: str) -> Scores:
        problem = _read_problem(name, answer)
        expected = str(problem["answer"])
        tagged = find_answer_block(response)
        candidates = [tagged] if tagged is not None else find_answer(response, expected)
        figure = _best(score, name, candidates, problem, expected)
        return make_scores(reward=figure, format_reward=tagged is not None, answer_reward=figure)

    return grade


def find_answer_block(response: str) -> str | None:
    """What stands between `<answer>` and `</answer>`, where each is there exactly once; None for a blank.

    Thoughts may stand before the block, but `<think>` must be closed there; nothing may stand after it.
    """
    if response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return None
    thoughts, _, rest = response.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed or after.strip() or "<think>" in thoughts.rpartition("</think>")[2]:
        return None
    return answer.strip() or None


def find_answer(response: str, expected: str) -> list[str]:
    """What a response without tags may mean by its answer, the fullest reading first; empty where it is no answer.

    The whole response if it has as many lines as the expected answer, or fewer. Else, if the expected answer is one
    line, the last line, if it is introduced ("The answer is 7", "3 + 4 = 7") and no earlier line introduces another
    answer in the same way, or if it is a number and the earlier lines hold none: "6\\n7" is a list of candidates. Of a
    single line the introduction and a full stop are left out. "3 + 4 =" is one where the expected answer holds no "="
    and a number follows.
    """
    text = response.strip()
    if not text or "<answer>" in text or "</answer>" in text or len(text) > MAX_ANSWER_CHARS:
        return []
    *earlier, last = [line.strip() for line in text.splitlines() if line.strip()]
    size = len(expected.strip().splitlines())
    if len(earlier) >= size:
        if size > 1:
            return []
        text = last
        lead, answer = _split_lead(last, expected)
        if not lead and (not _NUMBER.fullmatch(answer) or has_numeral(" ".join(earlier))):
            return []
        if any(_split_lead(line, expected)[0] == lead != "" and line != last for line in earlier):
            return []
    readings = [text]
    if size <= 1:
        stem = _split_lead(text, expected)[1]
        readings += [stem, stem.removesuffix(".").strip()]
    return list(dict.fromkeys(reading for reading in readings if reading))


def _split_lead(line: str, expected: str) -> tuple[str, str]:
    """(what introduces the answer in a line, the answer)."""
    prefix = _PREFIX.match(line)
    stem = line[prefix.end() :] if prefix else line
    before, equals, after = stem.rpartition("=")
    if equals and "=" not in expected and _CALCULATION.fullmatch(before) and _NUMBER.fullmatch(after.strip(" .")):
        stem = after
    return line[: len(line) - len(stem)].casefold(), stem.strip()


def _best(
    score: Callable[[str, Any], float], name: str, candidates: list[str], problem: dict[str, Any], expected: str
) -> float:
    """1 if a reading of the answer is right in full, else the figure of the first reading."""
    figures = [_score(score, name, candidate, problem, expected) for candidate in candidates]
    return 1.0 if 1.0 in figures else next(iter(figures), 0.0)


def _score(
    score: Callable[[str, Any], float], name: str, candidate: str, problem: dict[str, Any], expected: str
) -> float:
    if len(candidate) > MAX_ANSWER_CHARS:
        return 0.0
    if expected.isascii() and any(character.isnumeric() and not character.isascii() for character in candidate):
        return 0.0  # Python reads digits of any script
    if name in EVALUATED and (not EVALUATED[name][0].fullmatch(candidate) or _TOWER.search(candidate)):
        return 0.0
    if name in _FORMS and not _FORMS[name].fullmatch(candidate):
        return 0.0
    if name == "puzzle24" and sorted(re.findall("[0-9]+", candidate)) != _numbers_of(problem):
        return 0.0  # the package's scorer takes any four numbers
    if name in _EXACT:
        return float(candidate == expected.strip())
    try:
        figure = float(score(candidate, problem))
    except Exception:
        score(expected, problem)  # raises, too, where the problem is at fault; else the scorer cannot read the answer
        return 0.0
    if not math.isfinite(figure):
        return 0.0
    figure = min(1.0, max(0.0, figure))
    wanted = expected.strip().removesuffix(".")
    if not wanted or wanted == candidate.removesuffix(".") or wanted not in candidate:
        return figure
    return figure if figure == 1.0 and (name in _FORMS or _is_same_with_marks(candidate, wanted)) else 0.0


def _numbers_of(problem: dict[str, Any]) -> list[str]:
    """Those that a puzzle24 gives."""
    metadata = problem["metadata"]
    return sorted(map(str, metadata.get("numbers", ()))) if isinstance(metadata, dict) else []


def _is_same_with_marks(candidate: str, wanted: str) -> bool:
    """Whether what stands beside the expected answer is but signs: "18.00", quotes; no word and no other answer."""
    rest = candidate.replace(wanted, "", 1)
    if any(character.isalpha() or ord(character) < 32 for character in rest):
        return False
    return not has_numeral(rest) or _NUMBER.fullmatch(candidate) is not None


def _read_problem(name: str, answer: str) -> dict[str, Any]:
    try:
        problem = json.loads(answer)
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or not {"question", "answer", "metadata"} <= set(problem):
        raise ValueError(
            f'answer: found {answer[:40]!r}, allowed for the grader "{FAMILY}:{name}": a JSON object with the keys'
            " question, answer and metadata"
        )
    pattern, parts = EVALUATED.get(name, (_ARITHMETIC, ()))
    for part in parts:
        text: Any = problem
        for key in part.split("."):
            text = text.get(key) if isinstance(text, dict) else None
        if not isinstance(text, str) or not pattern.fullmatch(text):
            raise ValueError(
                f"answer: found {part} = {str(text)[:40]!r}, which the scorer of {name!r} must not evaluate"
            )
    if name in _TUPLES and isinstance(problem["metadata"], dict):
        problem["metadata"] = {key: _as_tuples(value) for key, value in problem["metadata"].items()}
    return problem


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


@functools.cache
def load_scorer(name: str) -> Callable[[str, Any], float]:
    """The package's scorer of a task. The first call imports the package: two seconds. Raises ValueError."""
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.factory import DATASETS

    known = sorted(set(DATASETS) - {"composite"})
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        allowed = f"such as {', '.join(near)}" if near else f"one of {', '.join(known)}"
        raise ValueError(
            f'grader: found the task {name!r} in "{FAMILY}:{name}", allowed: a task of reasoning-gym, {allowed}'
        )
    return get_score_answer_fn(name)
