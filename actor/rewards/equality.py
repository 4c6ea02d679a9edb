"""Whether an answer equals a reference: as text, as a number, and only then by mathematics (the package math-verify).

math-verify is imported when it is first needed. Its own time limits work by signals and are off: the process that runs
graders is bounded in time by its parent (`actor/grading.py`). Only its LaTeX parser is used; the one for plain
expressions is an `eval`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable

from actor.rewards.numerals import normalize_latex, read_quantity, strip_marks
from actor.rewards.text import find_last_box, has_hedge

MAX_CHARS = 300
"""Longer texts are compared as text alone."""
MAX_DEPTH = 20
MATCHING_DECIMALS = 12
"""Decimals to which a decimal number must agree with an irrational one, such as pi."""

_UNWRAP = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ ,.'’-]+[^\W\d_]+)*")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_SYMBOL = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?(?:\([A-Za-z]\))?")
_LOOSE_BLANK = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
_TOWER = re.compile(r"\^\s*(?:\{[^{}]*\^|\S\s*\^|\{?[-+]?[0-9]{4,})|\*\*|!\s*!|[0-9]{4,}\s*!")
_CHOICES = ("\\lor", "\\vee", "\\pm", "\\mp", "?")


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
    multiple choice is compared as text. All others are compared by math-verify, up to MAX_CHARS characters; an answer
    that offers a choice ("or", ±), tells a chain of equations or builds towers of powers equals nothing there.
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
    found, reference = (strip_marks(normalize_latex(strip_marks(text))) for text in (found, reference))
    if _squeeze(found) == _squeeze(reference):
        return True
    if _CHOICE.fullmatch(plain := _UNWRAP.sub(r"\1", reference).strip()):
        choice = _CHOICE.fullmatch(_UNWRAP.sub(r"\1", found).strip())
        return choice is not None and choice[1] == plain.strip("()")
    if _is_words(reference) or _is_words(found):
        return _fold(found) == _fold(reference)
    return _may_be_compared(found, reference) and load_math()(reference, found)


def _squeeze(text: str) -> str:
    """Without the blanks that LaTeX ignores; those inside words and numbers stay, made one."""
    return _LOOSE_BLANK.sub("", " ".join(text.split()))


def _fold(text: str) -> str:
    return " ".join(_UNWRAP.sub(r"\1", text).split()).casefold()


def _is_words(text: str) -> bool:
    """Whether it is language, and not a product of symbols."""
    plain = _UNWRAP.sub(r"\1", text).strip()
    wrapped = plain != text.strip()
    return _WORDS.fullmatch(plain) is not None and (wrapped or any(len(word) > 2 for word in plain.split()))


def _may_be_compared(found: str, reference: str) -> bool:
    """Whether math-verify may judge: it is lenient where it could be asked to guess."""
    if _enclosure(found) != _enclosure(reference):
        return False
    for text in (found, reference):
        if not text.isprintable() or not text.isascii() or not _is_shallow(text) or _TOWER.search(text):
            return False
    if not has_hedge(reference) and has_hedge(found):
        return False
    if any(sign in found and sign not in reference for sign in _CHOICES):
        return False
    extra = found.count("=") - reference.count("=")
    lead = found.partition("=")[0].strip()
    return extra <= 0 or (extra == 1 and _SYMBOL.fullmatch(lead) is not None)


def _enclosure(text: str) -> str:
    """The outer brackets of a pair, a point or an interval, which say if order counts and the ends belong to it."""
    text = text.rpartition("=")[2].rpartition("\\in")[2].strip()
    return text[0] + text[-1] if "," in text and text[0] in "([" and text[-1] in ")]" else ""


def _is_shallow(text: str) -> bool:
    """Whether braces and brackets match in number, and nest no deeper than MAX_DEPTH."""
    depth = 0
    for opening, closing in ("{}", "()"):
        depth = 0
        for character in text:
            depth += (character == opening) - (character == closing)
            if not 0 <= depth <= MAX_DEPTH:
                return False
        if depth and opening == "{":
            return False
    return True


@functools.cache
def load_math() -> Callable[[str, str], bool]:
    """`(reference, found) -> equal` by math-verify. The first call imports it, and sympy with it: about a second."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time limits are off
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list[object]:
        box = f"\\boxed{{{text}}}"
        return parse(box, config, fallback_mode="no_fallback", parsing_timeout=None)

    def equal(reference: str, found: str) -> bool:
        expected, given = read(reference), read(found)
        if not expected or not given:
            return False
        return verify(expected, given, float_rounding=MATCHING_DECIMALS, timeout_seconds=None)

    equal("x^2", "x \\times x")  # builds the parser's tables
    return equal
