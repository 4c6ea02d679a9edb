r"""Where in a response the answer stands: \boxed{}, tags, the tail. All in time linear in the text."""

from __future__ import annotations

from typing import NamedTuple

import regex as re

MAX_TAIL_CHARS = 100_000
"""Of a longer response only the end is searched for a box or a number."""
MAX_LEAD_CHARS = 200
"""Of what is said before a number only the end is searched for words that take it back."""

_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]*+\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_CLAUSE_END = re.compile(r"[.,;!?#\n]")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?+")
_JOINTS = frozenset({"or", "and", "nor", "not", "either", "maybe", "perhaps", "possibly", "then", "also", "to"})
"""Words between the members of a list of candidates."""

DOUBTS = frozenset(
    {"not", "no", "never", "nor", "neither", "cannot", "doubt", "doubts", "doubted", "doubtful", "wrong", "wrongly"}
    | {"incorrect", "incorrectly", "false", "falsely", "untrue", "mistaken", "mistakenly", "unlikely", "impossible"}
    | {"hardly", "scarcely", "barely", "unsure", "uncertain", "maybe", "perhaps", "possibly"}
)
"""Words that deny what they are said of, or leave it open. So do those that end in n't."""
HEDGES = DOUBTS | {"or", "either", "between", "unless", "except"}
"""Words that take an answer back or set another one beside it."""
_NOT = re.compile(r".*n't|(?:are|ca|could|did|do|does|had|has|have|is|should|was|were|wo|would)nt")
_FILLERS = frozenset(
    {"a", "an", "the", "it", "it's", "that", "that's", "this", "he", "she", "they", "there", "i", "we", "you", "my"}
    | {"be", "been", "is", "are", "was", "were", "have", "has", "had", "can", "could", "may", "might", "must", "shall"}
    | {"should", "will", "would", "equal", "equals", "to", "as", "of", "if", "whether", "think", "believe", "say"}
    | {"sure", "answer", "result", "number", "total", "sum", "value", "solution", "case", "way", "final", "correct"}
    | {"right", "true", "exactly", "really", "actually", "definitely", "quite", "simply", "just", "longer", "possible"}
)
"""Words across which a doubt reaches the number: "I doubt that it is 18", and not "who do not like pizza: 18"."""

_CHANGERS = frozenset(
    {"minus", "plus", "times", "negative", "point", "over", "root", "sqrt", "log", "ln", "sin", "cos", "tan"}
    | {"factorial", "twice", "thrice"}
)
_SCALE = re.compile(
    r"(?:hal(?:f|ves)|quarter|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth"
    r"|(?:ten|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)tie)(?=th|s)"
    r"|hundred|thousand|lakh|lac|crore|\w*illion|\w*illiard|bn|mn|dozen|gross|grand|myriad)(?:th)?s?"
)
_SCALED = re.compile(r"(?:doubl|tripl|quadrupl|halv|squar|cub|multipli|divid|negat|invert)ed")
_DETERMINERS = frozenset({"the", "all", "these", "those", "that", "this", "his", "her", "its", "their"})
_CHANGERS_BEFORE = frozenset(
    {"double", "triple", "quadruple", "square", "cube", "reciprocal", "inverse", "opposite", "multiple", "fraction"}
    | {"part", "share", "percent"}
)
"""Words that make another number of the one after them ("double 18", "a share of 18"), besides `changes_number`."""


class Box(NamedTuple):
    """The last box of a text."""

    content: str
    start: int
    end: int
    """Where `\\boxed` begins, and where what follows the closing brace begins."""


def cut_tail(text: str) -> str:
    """The last MAX_TAIL_CHARS characters, without the word that the cut went through."""
    if len(text) <= MAX_TAIL_CHARS:
        return text
    tail = text[-MAX_TAIL_CHARS:]
    blank = re.search(r"\s", tail)
    return tail[blank.end() :] if blank else ""


def has_box(text: str) -> bool:
    """Whether a box is opened, closed or not."""
    return _BOX.search(text) is not None


def find_last_box(text: str) -> Box | None:
    r"""The last `\boxed{…}` (or `\fbox{…}`), None where there is none, it is never closed, or boxes list candidates.

    Candidates are listed where nothing but blanks, signs and words like "or" stands between the last two boxes and
    their contents differ.
    """
    before, last = None, None
    for match in _BOX.finditer(text):
        before, last = last, match
    if last is None:
        return None
    end = _find_closing(text, last.end())
    if end is None:
        return None
    box = Box(text[last.end() : end - 1].strip(), last.start(), end)
    if before is not None:
        before_end = _find_closing(text, before.end())
        if before_end is not None and before_end <= box.start:
            earlier = text[before.end() : before_end - 1].strip()
            if earlier != box.content and only_joins(text[before_end : box.start]):
                return None
    return box


def _find_closing(text: str, start: int) -> int | None:
    """The index after the brace that closes the one before `start`; an escaped brace is a character like any other."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if not depth:
                return match.end()
    return None


def only_joins(gap: str) -> bool:
    """Whether a text between two answers is only what stands between members of a list."""
    gap = _TAG.sub(" ", gap)
    if any(mark in gap for mark in ("=", ":", "#", "→", "->", "=>")):
        return False
    return len(gap) <= 200 and all(word in _JOINTS for word in words_of(gap))


def words_of(text: str) -> list[str]:
    """Words in small letters, with their apostrophes."""
    return [word.casefold().replace("’", "'") for word in _WORD.findall(text)]


def has_hedge(text: str) -> bool:
    """Whether a word takes something back or offers a choice: "or", "not", "isn't"."""
    return any(word in HEDGES or _NOT.fullmatch(word) for word in words_of(text))


def is_doubt(word: str) -> bool:
    """Whether a word of `words_of` denies, or leaves open, what it is said of."""
    return word in DOUBTS or _NOT.fullmatch(word) is not None


def changes_number(word: str) -> bool:
    """Whether a word of `words_of` beside a number makes another one of it: "minus", "half", "quadrillion"."""
    return word in _CHANGERS or _SCALE.fullmatch(word) is not None or _SCALED.fullmatch(word) is not None


def is_doubted(lead: str) -> bool:
    """Whether what is said before a number denies or doubts it: "it can't be", "I doubt that it is", "wrong:"."""
    words = words_of(_CLAUSE_END.split(lead[-MAX_LEAD_CHARS:].rstrip(" \t,:"))[-1])
    said = next((word for word in reversed(words) if word not in _FILLERS), "")
    return is_doubt(said)


def is_changed(lead: str) -> bool:
    """Whether what is said before a number makes another one of it: "minus", "half of the"."""
    words = words_of(re.split("[=:]", lead[-MAX_LEAD_CHARS:])[-1])
    if words and words[-1] in _DETERMINERS:
        words.pop()
    if words and words[-1] == "of":
        words.pop()
    return bool(words) and (words[-1] in _CHANGERS_BEFORE or changes_number(words[-1]))


def has_numeral(text: str) -> bool:
    """Digits of any script, fractions and superscripts included."""
    return any(character.isnumeric() for character in text)


def find_tagged_answer(response: str) -> str | None:
    """What stands in the answer block of `[<think>] … </think> <answer> … </answer>`; None for any other form.

    Each tag once, in this order, nothing but blanks before `<think>`, between the blocks and at the end.
    """
    if any(response.count(tag) != 1 for tag in ("</think>", "<answer>", "</answer>")):
        return None
    if response.count("<think>") > 1 or ("<think>" in response and not response.lstrip().startswith("<think>")):
        return None
    rest = response.partition("</think>")[2].strip()
    if not rest.startswith("<answer>") or not rest.endswith("</answer>"):
        return None
    return rest.removeprefix("<answer>").removesuffix("</answer>").strip()
