r"""The graders `math` and `question_only`: the last `\boxed{}`."""

import pytest

from actor.rewards import grade_math, grade_question_only
from actor.rewards.text import find_last_box

ALL = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}
NO_BOX = {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}
FORM_ONLY = {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}
DEEP = "\\frac{\\frac{a}{\\sqrt{b}}}{\\left\\{c\\right\\}}"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{7}", "7"),
        ("\\boxed {7} or so", "7"),
        ("\\fbox{7}", "7"),
        (f"so $\\boxed{{{DEEP}}}$", DEEP),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{6} no, it must be \\boxed{7}", "7"),
        ("\\boxed{7}, that is, \\boxed{7}", "7"),
        ("\\boxed{x = \\boxed{7}}", "7"),
        ("\\boxed{}", ""),
    ],
)
def test_last_box_is_found_with_balanced_braces(text, content):
    box = find_last_box(text)
    assert box is not None
    assert box.content == content


@pytest.mark.parametrize(
    "text",
    ["", "boxed{7}", "\\boxed 7", "\\boxed{7", "\\boxed{{7}", "\\boxed{7\\}", "\\boxed{6} \\boxed{7}",
     "\\boxed{6}, \\boxed{7}",
     "\\boxed{6} or \\boxed{7}", "\\boxed{6}\n\\boxed{7}", "\\boxed{7} \\boxed{8", "\\boxed{1}" * 2000 + "\\boxed{2}"],
)  # fmt: skip
def test_no_box_where_it_is_broken_or_lists_candidates(text):
    assert find_last_box(text) is None


@pytest.mark.parametrize(
    ("content", "answer"),
    [("7", "7"), ("\\frac{3}{4}", "0.75"), ("2\\sqrt{2}", "\\sqrt{8}"), ("(x+1)^2", "x^2 + 2x + 1"), ("5", "x = 5"),
     ("\\text{Evelyn}", "Evelyn"), ("(1, 2)", "\\left(1,2\\right)"), ("2, 1", "1, 2"), ("1{,}000", "1000"),
     ("[0.5,3)", "[\\frac12,3)"), ("\\text{18}", "18"), ("0.\\overline{3}", "\\frac13"), ("\\pm 2", "2,-2"),
     ("\\dfrac{1}{2}", "so it is $\\boxed{\\frac12}$"), ("90^\\circ", "90"), ("\\$5", "5"), ("5\\text{ cm}^2", "5")],
)  # fmt: skip
def test_math_accepts_equal_answers(content, answer):
    assert grade_math(f"we get $\\boxed{{{content}}}$.", answer) == ALL


@pytest.mark.parametrize("response", ["7", "", "\\boxed{7", "\\boxed{7} or \\boxed{8}", "\\boxed{" * 3000 + "7"])
def test_math_wants_a_box(response):
    assert grade_math(response, "7") == NO_BOX


@pytest.mark.parametrize(
    "content", ["8", "6, 7", "6 \\text{ or } 7", "9^{9^{9}}", "nan", "3 + 4", "7 \\pm 1", "7 = 6", "\\{7\\}"]
)
def test_math_scores_the_box_around_a_wrong_answer(content):
    assert grade_math(f"\\boxed{{{content}}}", "7") == FORM_ONLY


def test_math_takes_the_last_of_thousands_of_boxes():
    text = "".join(f"\\boxed{{{i}}} is wrong. " for i in range(3000))
    assert grade_math(text, "7") == FORM_ONLY
    assert grade_math(f"{text} It is \\boxed{{7}}.", "7") == ALL


@pytest.mark.parametrize(
    ("response", "scores"),
    [
        ("\\boxed{7}", ALL),
        ("so 6 is \\boxed{7}, not 8", ALL),
        ("The answer is 7.", {"reward": 1.0, "format_reward": 0.0, "answer_reward": 1.0}),
        ("7", {"reward": 1.0, "format_reward": 0.0, "answer_reward": 1.0}),
        ("6 or 7", NO_BOX),
        ("\\boxed{6} 7", FORM_ONLY),
        ("\\boxed{7", NO_BOX),
        ("\\boxed{6} or \\boxed{7}", NO_BOX),
        ("\\boxed{} 7", NO_BOX),
        ("", NO_BOX),
    ],
)
def test_question_only_reads_the_box_or_else_the_last_number(response, scores):
    assert grade_question_only(response, "7") == scores


def test_question_only_compares_no_number_with_a_reference_that_is_none():
    assert grade_question_only("it is 2", "\\sqrt{2}") == NO_BOX
    assert grade_question_only("\\boxed{\\sqrt{2}}", "\\sqrt{2}") == ALL
