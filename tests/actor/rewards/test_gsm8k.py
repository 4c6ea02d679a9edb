"""The grader `gsm8k`: the last number, and only one that the response commits to."""

import pytest

from actor.rewards import grade_gsm8k

ALL = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}

RIGHT = {
    "18": ["18", "18.", "18.00", "$18", "$18.00", "18 dollars", "€18", "18%", "18 %", "The answer is 18.", "= 18",
           "#### 18",
           "**18**", "Answer: **18**", "\\boxed{18}", "$\\boxed{18}$", "(18)", "16 - 3 - 4 = 9\n9 * 2 = $18\n#### 18",
           "9 * 2 = <<9*2=18>>18", "18 eggs per day.", "So she makes $18 every day.", "It is 18, so we are done.",
           "x = 18", "=> 18", "≈ 18", "36/2", "\\frac{36}{2}", "18km", "<answer>18</answer>", "18\n18\n18", "+18",
           "She ate 3 or 4 eggs. In total that makes 18.", "18 cm^2", "The area is 18 m^2.", "$18\\text{ cm}^2$",
           "18 feet^3", "18-dollar", "an 18-dollar bill", "18 cm-wide", "= (18)", "-(-18)", "Half of 36 is 18.",
           "So the number of people who do not like pizza is 18.", "He does not work on Sunday so he earns $18.",
           "18 dollars and no change", "It was 17. No, it is 18.", "a square of side 18", "18 ten-dollar bills",
           "half: 18", "She had 18 baths in 18 months."],
    "1000": ["1,000", "1000", "$1,000.00", "1{,}000", "1\\,000", "That is 1,000 in all."],
    "0.75": ["3/4", "0.75", ".75", "\\frac{3}{4}", "\\dfrac{3}{4}", "0.750", "75/100"],
    "3.5": ["3 1/2", "3.5", "7/2", "3\\frac{1}{2}", "it takes 3 1/2 hours"],
    "50": ["50%", "50 percent", "50\\%"],
    "-5": ["-(5)", "−(5)", "x = -(5)", "-5", "−5", "= -5", "-$5", "$-5", "x = -5.", "It is -5 degrees."],
}  # fmt: skip

NOT_18 = ["", " ", "eighteen", "18 or 19", "19 or 18", "18, 19", "19, 18", "19,18", "17\n18", "17 18",
          "either 17 or 18",
          "17 dollars or 18 dollars", "17 dollars, 18 dollars", "17 and 18", "not 18", "It isn't 18", "18 is wrong",
          "18 is not the answer", "18?", "is it 18?", "maybe 18", "18 or so", "17 = 18", "19", "-18", "−18", "- 18",
          "--18",
          "±18", "\\pm 18", "≠ 18", "x != 18", "< 18", "> 18", "\\le 18", "36 - 18", "36-18", "2^18", "9**18", "18!",
          "18²",
          "18^2", "x18", "18x", "f(18)", "18:18", "7:18", "18/1/2024", "18/0", "18 million", "18 hundred", "18 dozen",
          "18 and a half", "1,8", "1.8.0", "0x18", "1e18", "١٨", "１８", "½", "18.0000001", "1" * 5000 + "18",
          "9**9**9",
          "\\boxed{9^{9^{9}}}", "nan", "inf", "NaN", "\x00", "\ud800", "18\n19", "The answer is 18. No, it is 19.",
          " ".join(str(i) for i in range(19)), ", ".join(str(i) for i in range(19)), "\\frac{\\sqrt{3}}{18}",
          "minus 18",
          "negative 18", "less than 18", "between 17 and 18", "18 plus", "twice 18", "18 squared",
          "-(18)", "- (18)", "x = -(18)", "10 - (18)", "2(18)", "(18)²", "(18)^2", "(18)!", "(18) million", "(18)x",
          "18⁻¹", "18 ⁻¹", "**18**²", "18 ½", "18 x", "18-x", "18-ab", "18-sin(x)", "18-fold", "18-plus", "18 x^2",
          "18 \\alpha^2", "18^2 cm", "18 quadrillion", "18 quintillionths", "18 lakh", "18 crore", "18 gross",
          "18 doubled", "18 halved", "18 trillionths", "18 twentieths", "18 tens", "18 multiplied by two", "18 twice",
          "I doubt it is 18", "I doubt that the answer is 18", "wrong: 18", "It can't be 18", "It cant be 18",
          "It is no longer 18", "not equal to 18", "I don't think that it is 18", "It is unlikely to be 18",
          "It is not the case that it is 18.", "half of 18", "two thirds of the 18", "50% of 18", "1/2 of 18",
          "3 out of 18", "the square root of 18", "the opposite of 18", "log 18", "maybe it is 18"]  # fmt: skip


@pytest.mark.parametrize(("answer", "response"), [(answer, text) for answer, texts in RIGHT.items() for text in texts])
def test_gsm8k_accepts_the_forms_of_a_number(answer, response):
    assert grade_gsm8k(response, answer) == ALL


@pytest.mark.parametrize("response", NOT_18)
def test_gsm8k_rewards_no_other_number_and_no_hedge(response):
    scores = grade_gsm8k(response, "18")
    assert (scores["reward"], scores["answer_reward"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("response", "answer"), [("50%", "0.5"), ("0.5", "50%"), ("0.333", "1/3"), ("18", "#### 1,8 18")]
)
def test_gsm8k_neither_converts_percent_nor_rounds(response, answer):
    if answer == "#### 1,8 18":
        with pytest.raises(ValueError, match='allowed for the grader "gsm8k": a number'):
            grade_gsm8k(response, answer)
    else:
        assert grade_gsm8k(response, answer) == {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}


def test_gsm8k_reads_the_reference_solution():
    assert grade_gsm8k("18", "She sells 9 * 2 = $<<9*2=18>>18.\n#### 18") == ALL
    assert grade_gsm8k("1234", "#### 1,234") == ALL


@pytest.mark.parametrize("answer", ["", "many", "18 or 19", "#### ", "x^2"])
def test_gsm8k_refuses_a_reference_that_is_no_number(answer):
    with pytest.raises(ValueError, match=r"^answer: found"):
        grade_gsm8k("18", answer)
