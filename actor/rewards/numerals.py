r"""Reads numbers as people and models write them, exactly: 1,000, $18, 18.00, 50%, 3/4 = 0.75, \frac{3}{4}, x = 5.

Numbers are fractions of integers, never floats: 0.333 is not 1/3. ASCII digits only. A unit is read beside the number
and never converts it: 50% has the value 50, so it is not 0.5. What reads as a list, a hedge, a sum or an algebraic term
has no value here. Two readings: `read_quantity` takes a text that is an answer as a whole, `find_last_number` looks for
the number at the end of a free text. Both know only text; which is used when is the graders' business.
"""

from __future__ import annotations

import unicodedata
from fractions import Fraction
from typing import NamedTuple

import regex as re

from actor.rewards.shapes import SYMBOL
from actor.rewards.text import (
    HEDGES,
    changes_number,
    cut_tail,
    has_hedge,
    has_numeral,
    is_changed,
    is_doubt,
    is_doubted,
    only_joins,
    words_of,
)

MAX_CHARS = 400
"""Longer texts are no quantity."""
MAX_DIGITS = 200
"""Longer numbers are not read: arithmetic on them is not linear."""
MAX_EXPONENT = 100

_CURRENCY = "$€£¥₹"
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?:\.[0-9]++)?+(?![0-9,])|[0-9]++(?:\.[0-9]*+)?+(?!,?[0-9])|\.[0-9]++)"
_FRAC = r"\\frac(?:\{(?P<fa>-?[0-9]++)\}\{(?P<fb>[0-9]++)\}|(?P<fc>[0-9])(?P<fd>[0-9]))"
_POWER = r"10(?:\^|\*\*)(?:\{(?P<pa>[-+]?[0-9]{1,3})\}|(?P<pb>[-+]?[0-9]{1,3})(?![0-9]))"
_NUMBER = re.compile(
    rf"(?:(?P<whole>[0-9]++)(?:[ ]*+(?={_FRAC.replace('?P<', '?P<look_')})|[ ]++(?=[0-9]++/)))?+"
    rf"(?:{_FRAC}"
    r"|(?P<ra>[0-9]*+\.[0-9]*+)\\(?:overline|bar)\{(?P<rb>[0-9]++)\}"
    r"|(?P<na>[0-9]++)/(?P<nb>[0-9]++)"
    rf"|(?P<decimal>{_DECIMAL})(?:[ ]*+(?:\\times|×|\*|x)[ ]*+{_POWER})?+)"
)
_SQUARED_UNIT = re.compile(
    r"([0-9][ -]?(?:\\(?:text|mathrm)\{[ ]?[a-z]++\}|cm|mm|km|m|ft|in|yd|mi|[a-z]{4,20}+))\^\{?([23])\}?(?![0-9])"
)
_TOKEN = re.compile(r"\\frac\{-?[0-9]++\}\{[0-9]++\}|\.?[0-9][0-9,./]*+")

_SPELLED = {
    "\\\\": "\\\\", "\\!": "", "\\,": "", "\\;": " ", "\\:": " ", "\\ ": " ", "\\$": "$", "\\%": "%",
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\cdot": "\\times", "\\degree": "°",
}  # fmt: skip
_COMMANDS = re.compile(r"\\\\|\\[!,;: $%]|\\(?:[dtc]frac|cdot|degree)(?![A-Za-z])")
_SIZES = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_SYMBOL = re.compile(SYMBOL)
_RESTATED = re.compile(rf"-?\(?{_DECIMAL}\)?(?: ?(?:[-+*/×÷]|\\times|\\div) ?-?\(?{_DECIMAL}\)?)++")
_VERDICT = re.compile(r"(?:.*\b(?:is|are|was|be|equals|makes)\b[ ]*:?|.*:|.*#{4})[ ]*", re.IGNORECASE)
_WRAPPER, _SQUARE = r"\\(?:text|mathrm|textrm|mbox|rm)", r"\^\{?[23]\}?"
UNWRAP = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
"""Words in LaTeX; group 1: without what marks them as such."""
_TEXT_UNIT = re.compile(rf"{_WRAPPER}\{{([^{{}}]*)\}}({_SQUARE})?")
_WORD_UNIT = re.compile(rf"([A-Za-z]+(?:[ /-][A-Za-z]+){{0,3}})({_SQUARE}|[²³])?")
_UNIT_AT_END = re.compile(
    rf"(.*\S)(\s*{_WRAPPER}\{{[^{{}}]*\}}(?:{_SQUARE})?"
    rf"|(?<=[0-9}})])\s*([A-Za-z]++)(?:[ /-][A-Za-z]++){{0,3}}(?:{_SQUARE})?)",
    re.DOTALL,
)
_BASED = re.compile(r"([0-9A-F]++)_\{?([0-9]{1,2})\}?")
_GLUED_UNITS = {"cm", "mm", "km", "kg", "mg", "ml", "lb", "lbs", "oz", "ft", "mi", "mph", "hr", "hrs", "min", "sec"}
_GLUED_UNITS |= {"st", "nd", "rd", "th"}
_SHORT_UNITS = {unit for unit in _GLUED_UNITS if len(unit) == 2}
_SHORT_UNITS |= {"in", "yd", "am", "pm", "dm", "cl", "dl", "cc", "ha", "gb", "mb", "kb", "hz", "rs"}
_SAME_UNIT = {"$": "$", "dollar": "$", "usd": "$", "percent": "%", "degree": "°", "°": "°", "%": "%"}
_SAME_UNIT |= {
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "kilometer": "km",
    "kilometre": "km", "foot": "ft", "feet": "ft", "inch": "in", "inche": "in", "mile": "mi", "yard": "yd", "gram": "g",
    "kilogram": "kg", "pound": "lb", "lbs": "lb", "ounce": "oz", "liter": "l", "litre": "l", "hour": "hr", "hrs": "hr",
    "minute": "min", "second": "sec",
}  # fmt: skip
"""In small letters and the singular, as far as an "s" at the end makes the plural."""
_ORDINALS = {"st", "nd", "rd", "th"}
_NOT_UNITS = HEDGES | {
    "and", "is", "are", "was", "be", "but", "if", "then", "than", "to", "so", "more", "less", "fewer", "choose", "mod",
    "modulo", "base", "score", "remainder", "pi", "equals", "makes", "positive", "power", "ish", "odd", "fold",
}  # fmt: skip
"""Words after a number that take it back, or begin another answer, besides those that change it."""
_GO_ON = {"is", "are", "was", "be", "so", "but", "if", "then", "to", "more", "less", "fewer"}
"""Those of them with which a sentence may go on after the number at the end of a free text."""
_WORDS_BEFORE = HEDGES | {"and", "than", "to", "by"}
"""Words directly before a number that take it back or set it beside another, besides those that change it."""
_OPENERS = frozenset("#:=(*\"'`[→≈~>" + _CURRENCY)
"""Signs that may touch a number's first digit in a free text. `>` only in an arrow."""
_ARROWS = ("->", "=>", ">>", "<answer>", "</think>")
"""What ends in `>` and compares nothing. ">>" ends the calculations in GSM8K's solutions: <<3*6=18>>18."""
_REFUSED_BEFORE = (
    "+", "*", "/", "×", "÷", "^", "<", "≤", "≥", "≠", "±", "∓", "!=", "<=", ">=", "-", "&", "|", "_", "\\",
)  # fmt: skip


class Quantity(NamedTuple):
    """A number with what stands around it, "" where nothing does."""

    value: Fraction
    unit: str
    name: str
    """The symbol that it is the value of: "x" in "x = 5"."""

    def agrees_with(self, other: Quantity) -> bool:
        """The same value; units and names that both have must be the same, too."""
        return (
            self.value == other.value
            and (not self.unit or not other.unit or self.unit == other.unit)
            and (not self.name or not other.name or self.name == other.name)
        )


def normalize_latex(text: str) -> str:
    """The text with LaTeX's ways to write blanks, signs and fractions made one. Linear."""
    text = _SIZES.sub("", text)
    text = _COMMANDS.sub(lambda found: _SPELLED[found[0]], text)
    for spelled, plain in (("{,}", ","), ("~", " "), ("−", "-"), ("–", "-"), ("^{\\circ}", "°"), ("^\\circ", "°")):
        text = text.replace(spelled, plain)
    return text


def strip_marks(text: str) -> str:
    r"""Without what only surrounds an answer: blanks, `$…$`, `\(…\)`, `**…**`, one full stop."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"), ("$", "$")):
        for body in (text, text.removesuffix(".")):
            if len(body) > len(opening) + len(closing) and body.startswith(opening) and body.endswith(closing):
                text = body[len(opening) : -len(closing)].strip()
                break
    return text.removesuffix(".").rstrip() if text[-2:-1] != "." else text


def normalize_answer(text: str) -> str:
    """An answer without what surrounds it, in LaTeX's one spelling."""
    return strip_marks(normalize_latex(strip_marks(text)))


def read_quantity(text: str) -> Quantity | None:
    """A text that is one number as a whole, or None.

    It may be written with a currency sign, a sign, thousands commas, decimals, as a fraction, mixed number or times a
    power of ten; a unit may follow; `x =`, "The answer is" or a restated sum ("3 + 4 =") may stand before it.
    """
    if len(text) > MAX_CHARS:
        return None
    text = normalize_answer(text)
    wrapped = UNWRAP.fullmatch(text)
    lead, body = _split_lead(wrapped[1].strip() if wrapped else text)
    name = _read_lead(lead)
    if name is None:
        return None
    body = strip_marks(body)
    head = re.match(rf"(?P<sign>[-+]?)(?P<currency>[{_CURRENCY}]?)(?P<sign_after>-?)", body)
    assert head is not None
    if head["sign"] and head["sign_after"]:
        return None
    number = _NUMBER.match(body, head.end())
    if number is None:
        return None
    value = _value(number)
    unit = _read_unit(body[number.end() :])
    if value is None or unit is None or (head["currency"] and unit not in ("", "$") and not unit.startswith("per ")):
        return None
    negative = head["sign"] == "-" or head["sign_after"] == "-"
    return Quantity(-value if negative else value, head["currency"] or unit, name)


def _split_lead(text: str) -> tuple[str, str]:
    """(what introduces the number, the rest)."""
    before, equals, after = text.rpartition("=")
    if equals:
        return before + equals, after
    verdict = _VERDICT.match(text)
    return (text[: verdict.end()], text[verdict.end() :]) if verdict else ("", text)


def _read_lead(lead: str) -> str | None:
    """The symbol that the lead names, "" where it names none; None for a lead that no number may follow."""
    if not lead:
        return ""
    body = lead.strip()
    if body.endswith("="):
        body = body[:-1].rstrip()
        if body.endswith(("=", "<", ">", "!", "\\", "≠", "\\not")):
            return None
        body = body.strip("$ ")
        if _SYMBOL.fullmatch(body):
            return body
        if _RESTATED.fullmatch(body):
            return ""
    if has_numeral(body) or has_hedge(body) or re.search(r"[\\^_+*/<>≠{}()\[\]|±-]", body):
        return None
    return "" if words_of(body) or body in ("####", "=", ":") else None


def split_unit(text: str) -> tuple[str, str | None]:
    """(a term in LaTeX without its unit, the unit), which is "" where there is none, None for text that is none.

    A unit stands in `\\text{}`, or is a usual abbreviation or a word of four letters: `r` and `ab` are factors. The
    base of a numeral (`11_6`) counts as one.
    """
    numeral = _BASED.fullmatch(text)
    if numeral:
        return numeral[1], f"_{numeral[2]}"
    found = _UNIT_AT_END.fullmatch(text)
    if found is None:
        return text, ""
    if found[3] is None:
        return found[1], _read_unit(found[2])
    known = found[3] in _GLUED_UNITS or (len(found[3]) > 3 and found[2] != found[2].lstrip())
    unit = _read_unit(found[2]) if known else None
    return (found[1], unit) if unit else (text, "")


def _read_unit(text: str) -> str | None:
    """The unit's one spelling, "" where there is none, None for what changes or follows up the number."""
    glued = bool(text) and not text[0].isspace()
    text = text.strip()
    if not text:
        return ""
    if text in _SAME_UNIT or text in _CURRENCY:
        return _SAME_UNIT.get(text, text)
    inside = _TEXT_UNIT.fullmatch(text)
    found = _WORD_UNIT.fullmatch(inside[1].strip()) if inside else _WORD_UNIT.fullmatch(text)
    if found is None:
        return None
    words = words_of(found[1])
    if any(word in _NOT_UNITS or is_doubt(word) or changes_number(word) for word in words):
        return None
    are_units = all(len(word) > 2 or word in _SHORT_UNITS for word in (words[0], words[-1]))  # "ab" is a product
    if not inside and (not are_units or (glued and found[1].casefold() not in _GLUED_UNITS)):
        return None
    if found[1].casefold() in _ORDINALS:
        return ""
    power = (inside[2] if inside else None) or found[2] or ""
    joined = re.sub(r"[ /-]+", " ", found[1].casefold())
    singular = " ".join(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in joined.split())
    return _SAME_UNIT.get(singular, singular) + power.translate(str.maketrans("²³", "23", "^{}"))


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that `_NUMBER` found; None where it is too long or divides by zero."""
    if match.end() - match.start() > MAX_DIGITS:
        return None
    if match["decimal"] is not None:
        value = Fraction(match["decimal"].replace(",", "").rstrip("."))
        power = match["pa"] or match["pb"]
        if power is not None:
            if abs(int(power)) > MAX_EXPONENT:
                return None
            value *= Fraction(10) ** int(power)
        return value
    if match["rb"] is not None:
        period = match["rb"]
        decimals = len(match["ra"].partition(".")[2])
        return Fraction("0" + match["ra"].rstrip(".")) + Fraction(int(period), (10 ** len(period) - 1) * 10**decimals)
    above = match["fa"] or match["fc"] or match["na"]
    below = match["fb"] or match["fd"] or match["nb"]
    if not int(below):
        return None
    whole = match["whole"]
    if whole is not None and above.startswith("-"):
        return None
    return Fraction(int(above), int(below)) + (int(whole) if whole is not None else 0)


# --- the number at the end of a free text ---


def find_last_number(text: str) -> Fraction | None:
    """The last number of a text, if the text commits to it: None where there is none, and where the last one

    - is a member of a list of candidates ("18, 19", "18 or 19", "17\\n18");
    - is taken back ("it can't be 18", "18 is wrong");
    - is a piece of an expression or of a word ("9**9", "10 - 18", "2^18", "x18", "18x", "18:30");
    - is compared ("< 18", "≠ 18"), changed ("half of 18") or counts something else than ones ("18 million");
    - is malformed ("1,2", "1.2.3", "1/0").

    A sign must touch its number or its brackets, a currency sign, percent sign or unit is left out.
    """
    text = _SQUARED_UNIT.sub(r"\1", normalize_latex(cut_tail(text)))
    before, last = None, None
    for match in _TOKEN.finditer(text):
        before, last = last, match
    if last is None:
        return None
    token = last[0].rstrip(",./")
    start, end = last.start(), last.start() + len(token)
    gap = text[before.end() : start] if before else ""
    if before and ((("/" in token and gap == " ") or ("frac" in token and not gap.strip())) and before[0].isdigit()):
        start, token = before.start(), f"{before[0]} {token}"  # a mixed number
        before = None
    value = _read_token(token)
    if value is None or not _may_follow(text[end : end + 80]):
        return None
    negative = _sign_before(text[max(0, start - 80) : start])
    if negative is None:
        return None
    if before and _is_rival(
        text[max(0, before.start() - 80) : before.start()], before[0], value, negative, gap, text[end : end + 40]
    ):
        return None
    return -value if negative else value


def _read_token(token: str) -> Fraction | None:
    match = _NUMBER.fullmatch(token) if len(token) <= MAX_DIGITS else None
    return _value(match) if match else None


def _is_rival(before: str, earlier: str, value: Fraction, negative: bool, gap: str, after: str) -> bool:
    """Whether the number before the last one stands beside it as another candidate."""
    other = _read_token(earlier.rstrip(",./"))
    if other is not None and other == value and not negative:
        return False
    gap = earlier[len(earlier.rstrip(",./")) :] + gap
    words = words_of(gap)
    if only_joins(gap):
        return True
    if gap.strip() == "=" and not before.rpartition("\n")[2].strip():
        return True  # "17 = 18": no calculation
    same_unit = len(words) <= 2 and words[:1] == words_of(after)[:1] and not set("=:#") & set(gap)
    return same_unit or any(word in ("or", "nor") for word in words[-3:])


def _sign_before(before: str) -> bool | None:
    """Whether a minus sign stands before the number; None where nothing may commit to a number after this text."""
    lead = before
    for box in ("\\boxed{", "\\fbox{", "\\text{", "\\textbf{", "\\mathbf{"):
        lead = lead.removesuffix(box) if lead.endswith(box) else lead
    in_braces = lead != before
    lead = lead.rstrip("*`\"'") if re.search(r"(?:^|[^*])(?:\*\*|[`\"'])$", lead) else lead
    lead = lead.removesuffix("$").removesuffix("\\") if lead.endswith("$") else lead.rstrip(_CURRENCY)
    negative = False
    if lead.endswith(("-", "+")):
        negative = lead.endswith("-")
        lead = lead[:-1]
        if lead.endswith(("-", "+")) or lead[-1:].isalnum() or lead[-1:] in (")", "}", "]", ".", "%", "_"):
            return None
        if re.search(r"[0-9)}\]]\s*$", lead) and not re.search(r"\n\s*$", lead):
            return None  # a difference, or a sum
        lead = lead.rstrip(_CURRENCY)
    touching = lead[-1:] if lead and not lead[-1].isspace() else ""
    stem = lead.rstrip(" \t")
    if touching and not in_braces:
        arrow = stem.endswith(_ARROWS)
        if (touching not in _OPENERS and not arrow) or (touching == ">" and not arrow):
            return None
        if touching == ":" and stem[-2:-1].isdigit():
            return None
    elif not touching and stem.endswith(
        (*_REFUSED_BEFORE, "\\times", "\\pm", "\\mp", "\\ne", "\\neq", "\\le", "\\leq")
    ):
        return None
    if stem.endswith(("<", "!=", "<=", ">=", "≠", "±", "∓", "^", "\\ge", "\\geq", "\\lt", "\\gt", "\\approx\\")):
        return None
    if stem.endswith("("):  # a function's argument, a factor, or what a sign before the bracket changes
        outer = _sign_before(stem[:-1])
        return None if outer is None else negative != outer
    if stem.endswith(">") and not stem.endswith(_ARROWS):
        return None
    last_line = stem.rpartition("\n")[2]
    words = words_of(re.split(r"[.=:#]", last_line)[-1])
    if (words and words[-1] in _WORDS_BEFORE) or is_doubted(last_line) or is_changed(last_line):
        return None
    if re.search(r"[0-9%][ ]*(?:out )?of(?: the)?$", last_line):
        return None  # "half of 18" in digits
    return negative


def _may_follow(after: str) -> bool:
    """Whether the text after the number lets it stand as it is."""
    closed = after.lstrip(")")
    if closed[:1] in ("^", "_", "!") and closed != after:
        return False
    after = closed
    head = after[:1]
    marked = after.lstrip("}]*$\"'` ")[:1]
    if marked and (marked.isnumeric() or unicodedata.decomposition(marked).startswith(("<super>", "<sub>"))):
        return False
    if head and (head.isnumeric() or head in "^_?/+×÷(!{["):
        return False
    if head == "\\" and not after.startswith(("\\)", "\\]", "\\text", "\\mathrm", "\\\\", "\\n")):
        return False
    if head == "*" and not re.match(r"\*\*(?!\s*[A-Za-z0-9(])", after):
        return False
    letters = re.match(r"-?([^\W\d_]+)", after)
    if letters and len(letters[1]) == 1:
        return False
    line = after.partition("\n")[0]
    sentence = re.split(r"(?<=[.;!])\s", line)[0]
    words = words_of(sentence)
    hyphenated = re.match(r"-[A-Za-z]+(?![A-Za-z(^_])", after)  # "an 18-dollar bill", no difference
    if hyphenated and (len(words[0]) > 2 or words[0] in _GLUED_UNITS):
        if words[0] in _NOT_UNITS:
            return False
    elif re.match(
        r"[ ]*(?:[-+*/×÷^<>=≠≤≥|]|[kx](?![A-Za-z])|\\(?:times|div|pm|cdot|sqrt|pi|frac))(?!\*)", after
    ) and not after.startswith(("**", "</answer>", "</think>")):
        return False
    if words and (words[0] in _NOT_UNITS - _GO_ON or changes_number(words[0]) or is_doubt(words[0])):
        return False
    if re.match(r"[ ]*\?", sentence) or sentence.rstrip().endswith("?"):
        return False
    return not any(word == "or" or (is_doubt(word) and word != "no") for word in words[:4])
