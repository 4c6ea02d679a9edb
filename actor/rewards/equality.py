"""Whether an answer equals a reference: as text, as a number, and only then by mathematics (the package math-verify).

Lists, intervals and their like are taken apart (`shapes.py`) and compared part by part, because math-verify is lenient
with them. It is imported when it is first needed. Its own time limits work by signals and are off: the process that
runs graders is bounded in time by its parent (`actor/grading.py`). Only its LaTeX parser is used; the one for plain
expressions is an `eval`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import regex as re

from actor.rewards.numerals import UNWRAP, normalize_answer, read_quantity, split_unit
from actor.rewards.shapes import SYMBOL, is_balanced, read_inequality, split_name, take_apart
from actor.rewards.text import find_last_box, has_hedge

MAX_CHARS = 300
"""Longer texts are compared as text alone."""
MAX_UNORDERED = 12
"""Members of a list, beyond those with equal texts, that are compared each with each."""
MATCHING_DECIMALS = 12
"""Decimals to which a decimal number must agree with an irrational one, such as pi."""

_WORDS = re.compile(r"[^\W\d_]+(?:[ ,.'’-]+[^\W\d_]+)*")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_SYMBOL = re.compile(SYMBOL)
_LOOSE_BLANK = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
_BRACED_CHARACTER = re.compile(r"([_^])\{(\w)\}")
_TOWER = re.compile(r"\^\s*(?:\{[^{}]*\^|\S\s*\^|\{?[-+]?[0-9]{4,})|\*\*|!\s*!|[0-9]{4,}\s*!")
_MISREAD = re.compile(r"(?<!_)[0-9]\s+[0-9]|[0-9]\s*_|\\[lc]?dots|\.\.|[A-Z]\s*\^\s*\{?\s*(?:T|\\top)(?![A-Za-z])")
"""What math-verify takes for something else: "2 3" for 5, 11_6 for 11, A^T for A."""
_MIXED = re.compile(r"(?<![0-9.^_])([0-9]{1,9})\s*\\frac(?:\{([0-9]{1,9})\}\{([0-9]{1,9})\}|([0-9])([0-9]))(?!\s*\^)")
_CHOICES = ("\\lor", "\\vee", "\\mp", "?")


def read_reference(answer: str) -> str:
    """The final answer in a reference: what follows GSM8K's last `####`, else its last box, else all of it.

    Raises ValueError where that is blank.
    """
    if "####" in answer:
        answer = answer.rpartition("####")[2]
    elif box := find_last_box(answer):
        answer = box.content
    if not answer.strip():
        raise ValueError("answer: found a blank one, allowed: the reference answer")
    return answer.strip()


def answers_equal(found: str, reference: str) -> bool:
    """Whether an answer, taken from a response as a whole, equals the reference (`read_reference`).

    Equal texts are equal. A reference that is a number equals what reads as the same number, exactly, and nothing else:
    neither a list nor a calculation ("3 + 4" is no answer where 7 is expected). A reference of words or a letter of a
    multiple choice is compared as text. Lists, points and intervals are equal if they have the same brackets and as
    many members, each equal to one of the other side by these same rules; order counts within brackets. All others are
    compared by math-verify, up to MAX_CHARS characters; an answer that offers a choice ("or"), tells a chain of
    equations or builds towers of powers equals nothing there.
    """
    if not found.strip():
        return False
    if found.strip() == reference.strip():
        return True
    expected = read_quantity(reference)
    if expected is not None:
        quantity = read_quantity(found)
        return quantity is not None and quantity.agrees_with(expected)
    if max(len(found), len(reference)) > MAX_CHARS:
        return False
    found, reference = normalize_answer(found), normalize_answer(reference)
    plain_found, plain = (UNWRAP.sub(r"\1", text).strip() for text in (found, reference))
    if _squeeze(found) == _squeeze(reference) or _squeeze(plain_found) == _squeeze(plain):
        return True
    if _CHOICE.fullmatch(plain):
        choice = _CHOICE.fullmatch(plain_found)
        return choice is not None and choice[1] == plain.strip("()")
    if _is_words(reference, plain) or _is_words(found, plain_found):
        return _fold(plain_found) == _fold(plain)
    if has_hedge(found) and not has_hedge(reference):
        return False
    return is_balanced(found) and is_balanced(reference) and _have_equal_parts(found, reference)


def _have_equal_parts(found: str, reference: str) -> bool:
    given, expected = take_apart(found), take_apart(reference)
    given_span = given if given.is_ordered else read_inequality(found)
    expected_span = expected if expected.is_ordered else read_inequality(reference)
    if given_span and expected_span:
        given, expected = given_span, expected_span
    if {given.kind, expected.kind} == {"∪", ""}:
        return _are_equal_terms(found, reference)  # "(-∞,0)∪(0,∞)" and "ℝ∖{0}"
    is_same_kind = given.kind == expected.kind or (given.kind, expected.kind) == ("()", "<>")
    if not is_same_kind or len(given.members) != len(expected.members):
        return False
    if given.name and expected.name and given.name != expected.name:
        return False
    symbols = given.name.strip("()").split(",")
    if not expected.name and symbols != sorted(symbols):
        return False  # (y, x) = (1, 2) for the point (1, 2)
    if not given.kind:
        return _are_equal_terms(given.members[0], expected.members[0])
    names = [[split_name(member)[0] for member in shape.members] for shape in (given, expected)]
    named_apart = any(len(set(side) - {""}) > 1 for side in names) and not all(map(all, names))
    if named_apart and all(map(any, names)):
        return False  # "x = 1, 2" for "x = 1, y = 2"
    if named_apart or given.is_ordered:
        return all(map(answers_equal, given.members, expected.members))
    return _match_in_any_order(given.members, expected.members)


def _match_in_any_order(found: Sequence[str], reference: Sequence[str]) -> bool:
    """Whether each member equals one of the other side that no other one equals: "1, 2, 2" is not "1, 2"."""
    left, rest = list(reference), []
    for member in found:
        if member in left:
            left.remove(member)
        else:
            rest.append(member)
    if len(rest) > MAX_UNORDERED:
        return False
    for member in rest:
        twin = next((other for other in left if answers_equal(member, other)), None)
        if twin is None:
            return False
        left.remove(twin)
    return True


def _are_equal_terms(found: str, reference: str) -> bool:
    (given, given_unit), (expected, expected_unit) = split_unit(found), split_unit(reference)
    if given_unit is None or expected_unit is None or (given_unit and expected_unit and given_unit != expected_unit):
        return False
    if given_unit or expected_unit:
        return answers_equal(given, expected)
    if _squeeze(found).removeprefix("+") == _squeeze(reference).removeprefix("+"):
        return True
    return _may_be_compared(found, reference) and load_math()(reference, found)


def _squeeze(text: str) -> str:
    """Without the blanks and braces that LaTeX ignores; blanks inside words and numbers stay, made one."""
    return _BRACED_CHARACTER.sub(r"\1\2", _LOOSE_BLANK.sub("", " ".join(text.split())))


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()


def _is_words(text: str, plain: str) -> bool:
    """Whether it is language, and not a product of symbols. `plain`: the text without what marks words in LaTeX."""
    wrapped = plain != text.strip()
    return _WORDS.fullmatch(plain) is not None and (wrapped or any(len(word) > 2 for word in plain.split()))


def _may_be_compared(found: str, reference: str) -> bool:
    """Whether math-verify may judge: it is lenient where it could be asked to guess."""
    for text in (found, reference):
        if not text.isprintable() or not text.isascii() or _TOWER.search(text) or _MISREAD.search(text):
            return False
    if any(sign in found and sign not in reference for sign in _CHOICES):
        return False
    extra = found.count("=") - reference.count("=")
    lead = found.partition("=")[0].strip()
    return extra <= 0 or (extra == 1 and _SYMBOL.fullmatch(lead) is not None)


def _improper(mixed: re.Match[str]) -> str:
    """1\\frac{1}{2}, which math-verify takes for a product if a factor follows, as \\frac{3}{2}."""
    whole, above, below = int(mixed[1]), int(mixed[2] or mixed[4]), int(mixed[3] or mixed[5])
    return f"\\frac{{{whole * below + above}}}{{{below}}}" if 0 < above < below else mixed[0]


@functools.cache
def load_math() -> Callable[[str, str], bool]:
    """`(reference, found) -> equal` by math-verify. The first call imports it, and sympy with it: about a second."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time limits are off
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig  # type: ignore[import-untyped]
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from math_verify.parser import NormalizationConfig, latex2sympy, normalize_latex

    # Not its `parse`: that takes R for r, and drops what looks like a unit at the end, such as the m of \sqrt{2}m.
    spelling = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    meaning = ConversionConfig(lowercase_symbols=False)

    @functools.lru_cache(maxsize=64)
    def read(text: str) -> Any:
        latex = normalize_latex(_MIXED.sub(_improper, text), spelling)
        is_real = not should_treat_as_complex(latex)
        return latex2sympy(latex, is_real=is_real, normalization_config=None, conversion_config=meaning)

    def equal(reference: str, found: str) -> bool:
        try:
            expected, given = read(reference), read(found)
        except Exception:  # the parser's ways to say that it is none of its language
            return False
        return verify(expected, given, float_rounding=MATCHING_DECIMALS, timeout_seconds=None)

    equal("x^2", "x \\times x")  # builds the parser's tables
    return equal
