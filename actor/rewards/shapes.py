r"""Takes an answer in LaTeX apart: lists, sets, points, intervals, unions, inequalities. Used by `equality.py`.

Knows brackets and separators, not what stands between them. Every function takes time linear in the text.
"""

from __future__ import annotations

from typing import NamedTuple

import regex as re

MAX_DEPTH = 20

SYMBOL = r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?(?:\([A-Za-z]\))?"
"""What a value may be given for: "x" in "x = 5"."""

_NAMED = re.compile(rf"\s*({SYMBOL}|\((?:{SYMBOL}\s*,\s*)+{SYMBOL}\s*\))\s*(?:=|\\in(?![A-Za-z]))")
_PART = re.compile(
    r"(?P<open>\\(?:begin|langle|lbrace)(?![A-Za-z])|\\\{|[({\[])"
    r"|(?P<close>\\(?:end|rangle|rbrace)(?![A-Za-z])|\\\}|[)}\]])"
    r"|(?P<comma>[,;]?\s*+(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\(?:lor|vee)(?![A-Za-z]))|[,;])"
    r"|(?P<cup>\\cup(?![A-Za-z]))"
    r"|\\(?:[A-Za-z]+|.)",
    re.DOTALL,
)
_SET = re.compile(r"\\(?:\{|lbrace(?![A-Za-z]))(.*)\\(?:\}|rbrace)", re.DOTALL)
_EITHER_SIGN = re.compile(r"\\pm(?![A-Za-z])\s*")
_LIMIT = r"((?:[^A-Za-z<>=,;\\]|\\(?!(?:[lg]t|[lg]eq?|[lg]eqslant|neq?)(?![a-z]))[a-z]+)++)"
_RELATION = r"(<|>|\\[lg]t(?![a-z])|\\[lg]eq?(?:slant)?(?![a-z]))"
_INEQUALITY = re.compile(rf"(?:{_LIMIT}{_RELATION}\s*)?({SYMBOL})\s*(?:{_RELATION}{_LIMIT})?")


class Shape(NamedTuple):
    """An answer taken apart."""

    kind: str
    """ "[)" and so on: an interval, a point or a vector, whose members are in order; "<>": an open interval that was
    told as an inequality, so that it is no point; ",": a list or a set; "∪": a union; "": a single term."""
    name: str
    """What it is the value of, "" where that is not said: "x" in `x \\in [1,2)`. A list's members have their own."""
    members: tuple[str, ...]

    @property
    def is_ordered(self) -> bool:
        return len(self.kind) == 2


def is_balanced(text: str) -> bool:
    """Whether brackets of all kinds, one closing another as in `[1,2)`, match and nest no deeper than MAX_DEPTH."""
    depth = 0
    for part in _PART.finditer(text):
        depth += (part["open"] is not None) - (part["close"] is not None)
        if not 0 <= depth <= MAX_DEPTH:
            return False
    return not depth


def take_apart(text: str) -> Shape:
    """The shape of a balanced text. A member with one ± is two: `1\\pm\\sqrt2` is a list."""
    members = _list_members(text)
    if len(members) > 1:
        return Shape(",", "", members)
    name, body = split_name(text)
    pieces = _cut(body, "cup")
    if len(pieces) > 1:
        return Shape("∪", name, pieces)
    if _is_enclosed(body):
        inside = _SET.fullmatch(body)
        if inside:
            members = _list_members(inside[1])
            return Shape("," if len(members) > 1 else "", name, members)
        members = _cut(body[1:-1], "comma")
        if len(members) > 1 and body[0] in "([" and body[-1] in ")]":
            return Shape(body[0] + body[-1], name, members)
        if not name and body[0] + body[-1] == "()":
            return take_apart(members[0])  # brackets around what has some, or needs none
    return Shape("", "", (text,))


def read_inequality(text: str) -> Shape | None:
    """A symbol between two numbers, or beside one, as an interval: `-1 < x \\le 2` is (-1, 2] for x."""
    match = _INEQUALITY.fullmatch(text.strip())
    if match is None:
        return None
    low, first, name, second, high = match.groups()
    if not (first or second) or (first and second and _is_less(first) != _is_less(second)):
        return None
    if not _is_less(first or second):
        low, first, second, high = high, second, first, low
    brackets = ("[" if first and _may_equal(first) else "(") + ("]" if second and _may_equal(second) else ")")
    if brackets == "()" and first and second:
        brackets = "<>"
    return Shape(brackets, name, (low.strip() if first else "-\\infty", high.strip() if second else "\\infty"))


def split_name(text: str) -> tuple[str, str]:
    """(the symbol before "=" or "∈", "" where there is none; the rest)."""
    match = _NAMED.match(text)
    return (re.sub(r"\s", "", match[1]), text[match.end() :].strip()) if match else ("", text.strip())


def _list_members(text: str) -> tuple[str, ...]:
    members = []
    for member in _cut(text, "comma"):
        either = len(_EITHER_SIGN.findall(member)) == 1 and "\\mp" not in member
        members += [_EITHER_SIGN.sub(sign, member) for sign in "+-"] if either else [member]
    return tuple(members)


def _cut(text: str, separator: str) -> tuple[str, ...]:
    """The pieces between the separators that stand outside of all brackets."""
    pieces, depth, start = [], 0, 0
    for part in _PART.finditer(text):
        depth += (part["open"] is not None) - (part["close"] is not None)
        if not depth and part.lastgroup == separator:
            pieces.append(text[start : part.start()].strip())
            start = part.end()
    return (*pieces, text[start:].strip())


def _is_enclosed(text: str) -> bool:
    """Whether the bracket that the text begins with is closed at its end, and not before."""
    depth = 0
    for part in _PART.finditer(text):
        depth += (part["open"] is not None) - (part["close"] is not None)
        if not depth:
            return part["close"] is not None and part.end() == len(text)
        if part.start() and depth == 1 and part["open"]:
            return False
    return False


def _is_less(relation: str) -> bool:
    return relation == "<" or relation.startswith("\\l")


def _may_equal(relation: str) -> bool:
    return "e" in relation
