"""Every built-in grader against hostile text: an answer within the limit, never a crash, never a reward."""

import contextlib
import time

import pytest

from actor.grading import GraderPool
from actor.rewards import GRADERS, SCORE_NAMES, find_grader
from actor.rewards.equality import answers_equal

MEGABYTE = 10**6
TEXTS = {
    "empty": "",
    "digits": "1" * MEGABYTE,
    "commas": "1," * (MEGABYTE // 2),
    "slashes": "1/" * (MEGABYTE // 2),
    "points": ".1" * (MEGABYTE // 2),
    "blanks": " " * MEGABYTE,
    "lines": "\n" * MEGABYTE,
    "opened": "{" * MEGABYTE,
    "closed": "}" * MEGABYTE,
    "backslashes": "\\" * MEGABYTE,
    "dollars": "$" * MEGABYTE + "17",
    "stars": "*" * MEGABYTE + "17",
    "minuses": "-" * MEGABYTE + "18",
    "nulls": "\0" * MEGABYTE + "17",
    "surrogates": "\ud800" * MEGABYTE,
    "open tags": "<answer>" * (MEGABYTE // 8),
    "thoughts": "</think> <answer>" * (MEGABYTE // 17),
    "blocks": "</think> <answer>17</answer> <answer>18</answer>" * (MEGABYTE // 48),
    "boxes": "".join(f"\\boxed{{{i}}} " for i in range(50_000)),
    "open boxes": "\\boxed{" * (MEGABYTE // 7),
    "spaced boxes": "\\boxed" + " " * MEGABYTE,
    "fractions": "\\frac{1}{" * (MEGABYTE // 9),
    "sums": "1+" * (MEGABYTE // 2) + "1=17",
    "equations": "x=" * (MEGABYTE // 2) + "17",
    "choices": "17 or " * (MEGABYTE // 6) + "18",
    "words": "the answer is " * (MEGABYTE // 14) + "17",
    "candidates": "\n".join(str(i) for i in range(19)),
    "tower": "9**9**9",
    "LaTeX tower": "9^{9^{9}}",
    "nan": "nan",
    "inf": "inf",
    "arabic": "١٨",
    "wide": "１８",
    "both": "18 or 19",
    "both, the right one last": "19 or 18",
    "sign": "-18",
    "sign before brackets": "-(" * (MEGABYTE // 2) + "18",
    "brackets": "(" * MEGABYTE + "-18",
    "fillers": "I doubt that " + "the " * (MEGABYTE // 4) + "answer is 17",
    "denials": "n't " * (MEGABYTE // 4) + "18",
    "one word": "doub" + "t" * MEGABYTE + " 17",
    "unit": "18-" + "a" * MEGABYTE,
    "squared units": "17 cm^2 " * (MEGABYTE // 8),
    "signs": "--18",
    "double": "\\pm 18",
    "zero": "\\frac{18}{0}",
}
LIMIT_S = 5.0
"""Linear time takes a twentieth of this; quadratic time would be hours."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("grader", GRADERS)
def test_no_grader_is_slowed_down_or_taken_in(grader, text):
    for response in (
        text,
        f"x</think> <answer>{text}</answer>",
        f"\\boxed{{{text}}}",
        f"<answer>{text}</answer> {text}",
    ):
        began = time.monotonic()
        scores = find_grader(grader)(response, "18")
        assert time.monotonic() - began < LIMIT_S
        assert set(scores) == set(SCORE_NAMES)
        assert scores["reward"] == 0.0
        assert all(value in (0.0, 1.0) for value in scores.values())


LONG = {
    "list": ("a;" * 150, "b;" * 150),
    "roots": (",".join(f"\\sqrt{{{i}}}" for i in range(2, 40)), ",".join(f"{i}^{{1/2}}" for i in range(40, 2, -1))),
    "signs": ("\\pm," * 75, "\\pm2," * 50),
    "brackets": ("(" * 19 + "1,2" + ")" * 19, "(" * 19 + "1,3" + ")" * 19),
    "openings": ("\\{(" * 75, "\\{1,2\\}"),
    "unions": ("\\cup" * 75, "(1,2)\\cup(3,4)"),
    "relations": ("x<" * 150, "x<\\pi"),
    "limit": ("1" * 298 + "<", "x>2"),
    "names": ("(" + "x," * 148 + "x", "(x,y)=(1,2)"),
    "unit": ("3" + "a" * 290, "\\sqrt{2} cm"),
    "subscripts": ("x_{" * 100, "x_1"),
}


@pytest.mark.parametrize(("found", "reference"), LONG.values(), ids=LONG)
def test_long_answers_are_taken_apart_in_time(found, reference):
    for one, other in ((found, reference), (reference, found)):
        began = time.monotonic()
        assert not answers_equal(one, other)
        assert time.monotonic() - began < LIMIT_S


async def test_mathematics_that_does_not_end_costs_the_sample_alone():
    """What passes the cheap checks and keeps sympy busy is ended from outside."""
    endless = [
        "\\sum_{i=1}^{999} \\sin(i)^{999}",
        "9^{999}!^{999}",
        "\\prod_{k=1}^{999} k!",
        "\\int_0^{9} x^{99} \\sin(x)^{99} dx",
    ]
    async with GraderPool(1, 1.5) as pool:
        graded = await pool.grade_group("math", [f"\\boxed{{{text}}}" for text in endless], "\\sqrt{2}")
        assert [scores["reward"] for scores, _ in graded] == [0.0] * len(endless)
        assert all(error in ("", "time limit of 1.5 s") for _, error in graded)
        assert (await pool.grade("integer", "7", "7"))[0]["reward"] == 1.0


async def test_imports_of_a_grader_are_not_part_of_a_samples_time():
    problem = '{"question": "3 + 4", "answer": "7", "metadata": {}}'
    async with GraderPool(1, 0.7) as pool:
        assert (await pool.grade("reasoning_gym:chain_sum", "7", problem))[0]["reward"] == 1.0
        assert (await pool.grade("0.5*math + 0.5*r1_zero", "\\boxed{2\\sqrt{2}}", "\\sqrt{8}"))[0]["reward"] == 0.5


@pytest.mark.parametrize(
    "reference", ["", "\x00", "\ud800", "{" * 10_000, "\\boxed{" * 1000, "9" * MEGABYTE, "nan", "#### "]
)
@pytest.mark.parametrize("grader", GRADERS)
def test_hostile_references_are_errors_or_no_reward(grader, reference):
    """A grader either refuses the reference by name, or gives nothing."""
    with contextlib.suppress(ReferenceRefused), refusals_by_name():
        assert find_grader(grader)("x</think> <answer>18</answer>", reference)["reward"] == 0.0


class ReferenceRefused(Exception):
    """A ValueError that names the reference."""


@contextlib.contextmanager
def refusals_by_name():
    try:
        yield
    except ValueError as error:
        if str(error).startswith("answer: found"):
            raise ReferenceRefused from error
        raise
