"""The grader `r1_zero`: the form to the letter, then the answer."""

import pytest

from actor.rewards import grade_r1_zero

NOTHING = {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}
FORM_ONLY = {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}
ALL = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}


@pytest.mark.parametrize(
    "response",
    [
        "3 and 4 </think> <answer> 7 </answer>",
        "<think>3 and 4</think><answer>7</answer>",
        " \n<think>\n3 and 4\n</think>\n\n<answer>\n7\n</answer>\n",
        "</think> <answer>7</answer>",
        "first 6, no, 7</think> <answer>\\boxed{7}</answer>",
        "x</think> <answer>The answer is $\\boxed{7}$.</answer>",
        "x</think> <answer>$7$</answer>",
        "x</think> <answer>x = 7</answer>",
        "x</think> <answer>3 + 4 = 7</answer>",
        "x</think> <answer>$3 + 4 = \\boxed{7}$</answer>",
        "x</think> <answer>The answer is 7.</answer>",
        "x</think> <answer>7.00</answer>",
        "x</think> <answer>7 apples</answer>",
        "x</think> <answer>\\frac{14}{2}</answer>",
    ],
)
def test_r1_zero_accepts_the_form_with_the_right_answer(response):
    assert grade_r1_zero(response, "7") == ALL


@pytest.mark.parametrize(
    "answer", ["8", "-7", "6 or 7", "7 or 6", "6, 7", "6 7", "1 2 3 4 5 6 7 8 9", "not 7", "7?", "seven", "3 + 4",
               "6 = 7",
               "7\\%7", "\\boxed{6} or \\boxed{7}", "\\boxed{6}\\boxed{7}", "6 \\boxed{7}", "not \\boxed{7}",
               "\\boxed{7",
               "I doubt it is 7", "wrong: 7", "Wrong answer: 7", "never: 7", "It is unlikely to be 7", "7⁻¹", "-(7)",
               "7 quadrillion", "7 lakh", "7 gross", "7 doubled", "7 apples halved", "7 trillionths", "7 ab",
               "7 is wrong", "nan", "9**9**9", "٧", "7\x00", "7²", "7x", "--7", "\\pm 7", "<b>7</b>"]
)  # fmt: skip
def test_r1_zero_gives_the_form_alone_for_a_wrong_or_hedged_answer(answer):
    assert grade_r1_zero(f"thoughts</think> <answer>{answer}</answer>", "7") == FORM_ONLY


@pytest.mark.parametrize(
    "response",
    [
        "",
        "7",
        "<answer>7</answer>",
        "<think>x <answer>7</answer>",
        "x</think> 7",
        "x</think> <answer>7",
        "x</think> 7</answer>",
        "x</think> <answer></answer>",
        "x</think> <answer> \n </answer>",
        "x</think> so <answer>7</answer>",
        "x</think> <answer>7</answer> so 7",
        "x</think> <answer>7</answer>.",
        "x</think> <answer>7</answer><answer>7</answer>",
        "x</think> <answer>6</answer> <answer>7</answer>",
        "x</think> <answer><answer>7</answer></answer>",
        "x</think></think> <answer>7</answer>",
        "<think><think>x</think> <answer>7</answer>",
        "x<think>y</think> <answer>7</answer>",
        "x</think> <answer>7<think></answer>",
        "<answer>7</answer> x</think>",
        "</answer>7<answer> x</think>",
        "x</think> </answer>7<answer>",
        "<answer>x</think> 7</answer>",
        "x</think> <Answer>7</Answer>",
        "x</think> <answer >7</answer >",
        "x</think>\x00<answer>7</answer>",
        "<answer>7</answer>" * 5000,
        "</think> <answer>7</answer>" * 5000,
    ],
)
def test_r1_zero_earns_nothing_in_another_form(response):
    assert grade_r1_zero(response, "7") == NOTHING


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("He has 6 * 7 = 42.\n#### 42", "42"),
        ("#### 1,234", "1234"),
        ("so $x = \\boxed{\\frac{3}{4}}$.", "0.75"),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ],
)
def test_r1_zero_reads_the_reference_in_its_usual_forms(reference, answer):
    assert grade_r1_zero(f"x</think> <answer>{answer}</answer>", reference) == ALL


def test_r1_zero_refuses_a_blank_reference():
    with pytest.raises(ValueError, match="answer: found a blank one"):
        grade_r1_zero("x", " ")
