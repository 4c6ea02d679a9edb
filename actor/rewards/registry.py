"""Names -> graders: the built-in table, sums of scores, the lazily loaded families, and what a spec may name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping

from actor.rewards.base import SCORE_NAMES, Grader, Scores
from actor.rewards.boxed import grade_math, grade_question_only
from actor.rewards.equality import load_math
from actor.rewards.exact import grade_exact
from actor.rewards.gsm8k import grade_gsm8k
from actor.rewards.gym import make_gym_grader
from actor.rewards.integer import grade_integer
from actor.rewards.r1_zero import grade_r1_zero
from actor.rewards.spec import GYM, Spec, is_user_function, parse_spec

GRADERS: Mapping[str, Grader] = {
    "exact": grade_exact,
    "gsm8k": grade_gsm8k,
    "integer": grade_integer,
    "math": grade_math,
    "question_only": grade_question_only,
    "r1_zero": grade_r1_zero,
}
_LOADS: Mapping[str, Callable[[], object]] = {"math": load_math, "question_only": load_math, "r1_zero": load_math}
"""What a grader imports at its first use; `prepare_grader` does it outside of any sample's time limit."""


def find_grader(spec: str, graders: Mapping[str, Grader] = GRADERS) -> Grader:
    """The grader that a spec describes. Raises ValueError with what was found and what is allowed.

    `graders`: the built-in ones and, under module:function, the user functions that this process was started with.
    """
    if spec in graders:
        return graders[spec]
    parsed = parse_spec(spec)
    found = {name: _find_one(name, graders) for name in parsed.graders}
    _check_scores(parsed)
    return found[parsed.graders[0]] if parsed.plain else _make_sum(parsed, found)


def prepare_grader(spec: str, graders: Mapping[str, Grader] = GRADERS) -> None:
    """Import what the graders of a spec import at their first use. Faults are left to `find_grader`."""
    with contextlib.suppress(ValueError, ImportError):
        for name in parse_spec(spec).graders:
            if name in _LOADS:
                _LOADS[name]()
            elif name not in graders:
                _find_one(name, graders)


def check_grader(spec: str, user_functions: Collection[str] | None = None) -> None:
    """Raise ValueError unless a spec is sound: its grammar, every name, every score name of a built-in grader.

    `user_functions`: those allowed; None: any of the form module:function. They are not imported here.
    """
    parsed = parse_spec(spec)
    for name in parsed.graders:
        allowed = is_user_function(name) and (user_functions is None or name in user_functions)
        if not allowed:
            _find_one(name, GRADERS)
    _check_scores(parsed)


def _find_one(name: str, graders: Mapping[str, Grader]) -> Grader:
    if name in graders:
        return graders[name]
    family, _, argument = name.partition(":")
    if family == GYM and argument:
        try:
            return make_gym_grader(argument)
        except ImportError as error:
            raise ValueError(f"grader: found {name!r}, allowed: where the package reasoning-gym is: {error}") from None
    allowed = f"{', '.join(sorted(graders))}, {GYM}:NAME"
    if is_user_function(name):
        raise ValueError(
            f"grader: found {name!r}, allowed: {allowed}; no user function was given to this actor by that name"
        )
    raise ValueError(f"grader: found {name!r}, allowed: {allowed}, or a user's module:function")


def _check_scores(spec: Spec) -> None:
    for term in spec.terms:
        if term.score and not is_user_function(term.grader) and term.score not in SCORE_NAMES:
            raise ValueError(
                f"grader: found the score {term.score!r} of {term.grader}, allowed: {', '.join(sorted(SCORE_NAMES))}"
            )


def _make_sum(spec: Spec, graders: Mapping[str, Grader]) -> Grader:
    """The weighted sum of a spec as a grader: "reward" is the sum, the other two are those of the first grader, and
    every part is there by its own name."""

    def grade(response: str, answer: str) -> Scores:
        results = {name: grader(response, answer) for name, grader in graders.items()}
        parts = {}
        for term in spec.terms:
            if not term.score:
                parts[term.label] = min(1.0, len(response) / int(term.grader.partition(":")[2]))
            elif term.score in results[term.grader]:
                parts[term.label] = float(results[term.grader][term.score])
            else:
                found = ", ".join(sorted(map(str, results[term.grader])))
                raise ValueError(f"grader: found no score {term.score!r} of {term.grader}, allowed: {found}")
        total = sum(term.weight * parts[term.label] for term in spec.terms)
        first = results[spec.graders[0]]
        named = {name: first[name] for name in SCORE_NAMES if name in first}
        return {**named, "reward": total, **parts}

    return grade
