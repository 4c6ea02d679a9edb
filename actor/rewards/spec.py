"""The grammar of grader specs: a grader's name, or a weighted sum of graders' scores. Knows names, not what they do.

spec    = [sign] term { sign term }          sign = "+" | "-"
term    = [number "*"] ( score | length )
score   = grader [ "." score name ]          without a name: its "reward"
length  = "length:" N                        min(1, characters of the response / N)
grader  = name | "reasoning_gym:" task | module ":" function
"""

from __future__ import annotations

from typing import NamedTuple

import regex as re

MAX_CHARS = 2000
GRAMMAR = (
    'a grader, or a weighted sum such as "0.8*r1_zero.answer_reward + 0.2*r1_zero.format_reward - 0.1*length:2000"'
)
LENGTH = "length"
GYM = "reasoning_gym"

_TERM = re.compile(
    r"\s*(?P<sign>[-+]?)\s*(?:(?P<weight>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*\*\s*)?"
    r"(?P<name>[A-Za-z_]\w*(?:(?:\.[A-Za-z_]\w*)*:\w+)?)(?:\.(?P<score>[A-Za-z_]\w*))?\s*",
    re.ASCII,
)


class Term(NamedTuple):
    """One summand."""

    weight: float
    grader: str
    score: str
    """Which of its scores; "" for `length:N`, which is a figure by itself."""

    @property
    def label(self) -> str:
        """Its name among the sum's scores."""
        return f"{self.grader}.{self.score}" if self.score else self.grader


class Spec(NamedTuple):
    """A parsed spec."""

    terms: tuple[Term, ...]
    plain: bool
    """The spec is a grader's name and nothing else: its scores are passed on as they are."""

    @property
    def graders(self) -> tuple[str, ...]:
        """The graders to run, each once, in the order of the spec."""
        return tuple(dict.fromkeys(term.grader for term in self.terms if term.score))


def parse_spec(spec: str) -> Spec:
    """Read a spec. Raises ValueError with what was found and what is allowed; names are not looked up."""
    if len(spec) > MAX_CHARS:
        raise ValueError(f"grader: found {len(spec)} characters, allowed: at most {MAX_CHARS}")
    terms: list[Term] = []
    position, plain = 0, False
    while position < len(spec) or not terms:
        match = _TERM.match(spec, position)
        if match is None or (terms and not match["sign"]):
            where = f" at {spec[position : position + 20]!r}" if position else ""
            raise ValueError(f"grader: found {spec[:80]!r}{where}, allowed: {GRAMMAR}")
        terms.append(_read_term(match))
        plain = match[0].strip() == match["name"]
        position = match.end()
    if all(not term.score for term in terms):
        raise ValueError(f"grader: found {spec[:80]!r}, allowed: a sum with at least one grader beside {LENGTH}:N")
    return Spec(tuple(terms), plain and len(terms) == 1)


def _read_term(match: re.Match[str]) -> Term:
    weight = float(match["weight"] or 1.0) * (-1.0 if match["sign"] == "-" else 1.0)
    if not abs(weight) < float("inf"):
        raise ValueError(f"grader: found the weight {match['weight']}, allowed: a finite number")
    name, score = match["name"], match["score"]
    family, _, argument = name.partition(":")
    if family == LENGTH:
        if score or not argument.isdigit() or len(argument) > 12 or not int(argument):
            raise ValueError(f'grader: found "{match[0].strip()}", allowed: {LENGTH}:N with N characters, at least 1')
        return Term(weight, name, "")
    return Term(weight, name, score or "reward")


def is_user_function(name: str) -> bool:
    """Whether a grader's name is of the form module:function, and of no built-in family."""
    return ":" in name and name.partition(":")[0] not in (GYM, LENGTH)


def user_functions_of(spec: str) -> tuple[str, ...]:
    """The user functions (module:function) that a spec names. Raises ValueError as `parse_spec`."""
    return tuple(name for name in parse_spec(spec).graders if is_user_function(name))
