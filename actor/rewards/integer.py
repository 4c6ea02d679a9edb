"""The grader `integer`: one integer, committed to at the very end of the response. For arithmetic on small models."""

from __future__ import annotations

import regex as re

from actor.rewards.base import Scores, make_scores
from actor.rewards.text import has_numeral, is_changed, is_doubted

# Possessive quantifiers (++, *+) never backtrack, so a megabyte of digits or blanks costs one pass.
_INTEGER = r"[-−]?(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9,])|[0-9]++(?!,[0-9]))"
_OPERATOR = r"(?:[-−+*×/÷x]|and\b|plus\b|minus\b|times\b)"
_VERDICT = r"(?:=|is\b|are\b|equals\b|makes\b)"
_RESTATEMENT = re.compile(rf"{_INTEGER}(?:\s*+{_OPERATOR}\s*+{_INTEGER})++\s*+{_VERDICT}\s*+", re.IGNORECASE)
_WHOLE_INTEGER = re.compile(_INTEGER)

_HEDGES = {"or", "and", "either", "than", "about", "around", "approximately", "roughly", "almost", "nearly"}
_HEDGES |= {"\\pm", "\\mp", "\\ne", "\\neq"}
"""What leaves open, or changes, the integer that it stands directly before. `is_doubted`, `is_changed`: the rest."""
_SIGNS_BEFORE_ANSWER = frozenset({"", "=", ":", "$", ",", "####"})


def grade_integer(response: str, answer: str) -> Scores:
    """Reward 1 where the response commits to one integer, at its very end, and that is the answer.

    The last line must read `[words] [restatement] integer [.]`:

    - words hold no digit or other numeral, and end in no sign other than `= : $ , ####`, in no hedge ("6 or 7") and
      in nothing that denies, doubts or changes the integer ("not equal to 7", "I doubt it is 7", "half of 7");
    - a restatement is an expression of integers that ends in = or is/are/equals/makes: "3 + 4 =", "3 plus 4 equals",
      "the sum of 3 and 4 is". It is read, not checked: only the integer after it counts;
    - the integer is written in ASCII digits, with or without correct thousands commas and an attached minus sign.

    Earlier lines are reasoning and may say anything, but a last line that is a bare integer is then a list of
    candidates ("6\\n7") unless they hold no numeral at all, and a sentence may not be repeated with another integer
    ("It is 6.\\nIt is 7.").

    Scores: "reward" = well-formed and right; "format_reward" = well-formed; "answer_reward" = the last integer of the
    text is right, whatever its form. Raises ValueError where the reference answer is no integer.
    """
    expected = _canonical(answer.strip())
    if expected is None:
        raise ValueError(f'answer: found {answer[:40]!r}, allowed for the grader "integer": an integer')
    committed = _committed_integer(response)
    return make_scores(
        reward=committed == expected,
        format_reward=committed is not None,
        answer_reward=_last_integer(response) == expected,
    )


def _committed_integer(response: str) -> str | None:
    """The integer that a well-formed response ends with, in canonical form; None for any other response."""
    *reasoning, last = response.strip().splitlines() or [""]
    parsed = _split_answer_line(last)
    if parsed is None:
        return None
    lead, value = parsed
    if not lead:
        return None if any(has_numeral(line) for line in reasoning) else value
    for line in reasoning:
        earlier = _split_answer_line(line)
        if earlier and earlier[0] == lead and earlier[1] != value:
            return None
    return value


def _split_answer_line(line: str) -> tuple[str, str] | None:
    """(what stands before the integer, the integer in canonical form), or None for a line of another form."""
    line = line.strip().removesuffix(".")
    lead = line.rstrip("0123456789,")
    digits = line[len(lead) :]
    if lead.endswith(("-", "−")):
        lead, digits = lead[:-1], lead[-1] + digits
    value = _canonical(digits)
    if value is None or not _is_lead(lead):
        return None
    return " ".join(lead.casefold().split()), value


def _is_lead(lead: str) -> bool:
    """Whether an integer may follow: words without a numeral, or such words and then a restatement."""
    first = re.search(r"[-−]?[0-9]", lead)
    if first is not None:
        words, restatement = lead[: first.start()], lead[first.start() :]
        adjoined = words[-1:].isalnum() or words[-1:] in (".", "_")
        separated = restatement[-1] == "=" or restatement[-1].isspace()
        plain = not adjoined and not has_numeral(words) and not is_doubted(words)
        return bool(_RESTATEMENT.fullmatch(restatement)) and separated and plain
    words = lead.rstrip()
    stem = words.rstrip("=:$,#<>!~≈≠≤≥±+-−*/×÷.·°%&^_|\\'\"`()[]{}")
    if words[len(stem) :] not in _SIGNS_BEFORE_ANSWER:
        return False
    if lead and lead == stem:  # a letter stands directly before the integer, as in "x7"
        return False
    last_word = stem.rstrip(" \t,:").rsplit(None, 1)[-1:] or [""]
    if last_word[0].casefold().strip("(\"'*") in _HEDGES or has_numeral(words):
        return False
    return not is_doubted(words) and not is_changed(words)


def _canonical(text: str) -> str | None:
    """An integer without commas, leading zeros or "-0"; None for any other text.

    Compared as text: `int` is quadratic in the number of digits.
    """
    if not _WHOLE_INTEGER.fullmatch(text):
        return None
    digits = text.lstrip("-−").replace(",", "").lstrip("0")
    if not digits:
        return "0"
    return "-" + digits if text[0] in "-−" else digits


def _last_integer(text: str) -> str | None:
    """The last run of ASCII digits in a text as an integer, with the minus sign attached to it."""
    after = re.search(r"[0-9]", text[::-1])
    if after is None:
        return None
    upto = text[: len(text) - after.start()]
    lead = upto.rstrip("0123456789,")
    sign = "-" if lead.endswith(("-", "−")) else ""
    return _canonical(sign + upto[len(lead) :].lstrip(","))
