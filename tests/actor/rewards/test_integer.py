"""The grader `integer` against a table of honest, sloppy and hostile responses."""

import pytest

from actor.rewards import grade_integer

ACCEPTED = [
    "7",
    "7.",
    "  7 \n",
    "\n7",
    "007",
    "3 + 4 = 7",
    "3+4=7",
    "3 + 4 = 7.",
    "-3 + 10 = 7",
    "14 ÷ 2 = 7",
    "3 plus 4 equals 7",
    "3 and 4 makes 7.",
    "The sum of 3 and 4 is 7.",
    "The answer is 7.",
    "The answer is 3 + 4 = 7.",
    "Answer: 7",
    "Answer: $7",
    "#### 7",
    "x = 7",
    "Sure!\n7",
    "No, it is 7",
    "Those who do not like it: 7",
    "Twice 3 + 1 = 7",
    "That makes a total of 7",
    "She has 5 apples, buys 4 and eats 2.\nThat leaves 7.",
    "5 + 4 = 9\n9 - 2 = 7\n#### 7",
]

WELL_FORMED_BUT_WRONG = [
    "8",
    "-7",
    "−7",
    "70",
    "17",
    "3 + 4 = 8",
    "The answer is -7",
    "7,000",
    "0",
    "7\nThe answer is 8.",
]

HEDGED_OR_MALFORMED = [
    "",
    " \n ",
    ".",
    "-",
    "seven",
    "6 or 7",
    "six or 7",
    "6, 7",
    "7 8 9",
    "6 7",
    "6 and 7",
    "7 or 8",
    "6\n7",
    "7\n7",
    "5 6 8 9\n7",
    "It is 6 or it is 7",
    "It is 6.\nIt is 7.",
    "It is 6.\n it  IS 7",
    "3 + 4 = 6\n3 + 4 = 7",
    "3 + 4 = 7 = 7",
    "6 = 7",
    "3 + 4 7",
    "not 7",
    "The answer is not 7",
    "x != 7",
    "x ≠ 7",
    "less than 7",
    "The answer is not equal to 7.",
    "never 7",
    "It is never 7",
    "It can't be 7",
    "I doubt that it is 7",
    "maybe it is 7",
    "wrong: 7",
    "No, 7",
    "it isn't 3 + 4 = 7",
    "half of 7",
    "a third of the 7",
    "twice 7",
    "double 7",
    "the square root of 7",
    "nearly 7",
    "<7",
    "> 7",
    "about 7",
    "minus 7",
    "- 7",
    "3 + 4 = - 7",
    "x7",
    "x-7",
    "\\pm 7",
    "x \\neq 7",
    "7-7",
    "3/7",
    ".7",
    "3.7",
    "7.0",
    "7..",
    "7!",
    "7?",
    "7%",
    "7 apples",
    "**7**",
    "\\boxed{7}",
    "1,7",
    "6,7",
    "7,",
    ",7",
    "٧",
    "７",
    "٧ is 7",
    "2² is 7",
    "½ or 7",
    "7\n8 9",
    "3 + 4 =\n7",
    "\x007\x00",
]


@pytest.mark.parametrize("response", ACCEPTED)
def test_integer_grader_accepts_one_committed_answer(response):
    assert grade_integer(response, "7") == {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}


@pytest.mark.parametrize("response", WELL_FORMED_BUT_WRONG)
def test_integer_grader_scores_the_form_of_a_wrong_answer(response):
    assert grade_integer(response, "7") == {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}


@pytest.mark.parametrize("response", HEDGED_OR_MALFORMED)
def test_integer_grader_rewards_no_hedge(response):
    scores = grade_integer(response, "7")
    assert (scores["reward"], scores["format_reward"]) == (0.0, 0.0)


def test_integer_grader_scores_the_last_integer_of_a_malformed_response():
    assert grade_integer("6 or 7", "7")["answer_reward"] == 1.0
    assert grade_integer("7 or 6", "7")["answer_reward"] == 0.0
    assert grade_integer("it is -7!", "-7")["answer_reward"] == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [("1,234", "1234"), ("1234", "1,234"), ("1,234,567.", "1234567"), ("−12", "-12"), ("-12", "−12"), ("= -12", "-12"),
     ("0", "-0"), ("1000000 + 234567 = 1,234,567", "1234567"), ("9" * 5000, "9" * 5000)],
)  # fmt: skip
def test_integer_grader_reads_commas_signs_and_long_numbers(response, answer):
    assert grade_integer(response, answer)["reward"] == 1.0


@pytest.mark.parametrize("response", ["12,34", "1,23", "1234,567", "1,,234", "0,1,2", "1,2345"])
def test_integer_grader_refuses_misplaced_commas(response):
    assert grade_integer(response, response.replace(",", ""))["reward"] == 0.0


@pytest.mark.parametrize("answer", ["", "seven", "3.5", "7 or 8", "٧"])
def test_integer_grader_refuses_a_reference_that_is_no_integer(answer):
    with pytest.raises(ValueError, match="allowed for the grader"):
        grade_integer("7", answer)


@pytest.mark.timeout(60)  # quadratic time would be hours
@pytest.mark.parametrize(
    "response",
    ["1" * 10**6, "1" * 10**6 + "x", " " * 10**6 + "x", "3 + 4 " + " " * 10**6 + "x7", "3" + " + 4" * 250_000 + " x 7",
     "1," * 500_000, "1,111" * 200_000, "7\n" * 500_000, "It is 6.\n" * 100_000 + "It is 7", "#" * 10**6 + "7",
     "=" * 10**6 + " 7", "-" * 10**6 + "7", "or " * 300_000 + "7", "3 and " * 200_000 + "7", "\u2028" * 10**6 + "7 7"],
    ids=lambda response: repr(response[:8]),
)  # fmt: skip
def test_integer_grader_takes_a_hostile_megabyte(response):
    assert grade_integer(response, "7")["reward"] == 0.0


def test_integer_grader_takes_an_honest_megabyte():
    assert grade_integer("a line of thought with 5 and 6\n" * 30_000 + "So the answer is 7.", "7")["reward"] == 1.0
