"""The grader `gsm8k`: the last number of the response, as with the grade-school problems of GSM8K."""

from __future__ import annotations

from actor.rewards.base import Scores, make_scores
from actor.rewards.equality import read_reference
from actor.rewards.numerals import find_last_number, read_quantity


def grade_gsm8k(response: str, answer: str) -> Scores:
    """Reward 1 where the last number of the response, and the one it commits to, is that of the reference.

    The reference is a number, or GSM8K's solution with "#### number" at its end. Numbers are compared by their exact
    values: 18.00 = 18, 3/4 = 0.75, 1,000 = 1000; currency signs, percent signs and units are left out and never
    convert: "50%" is 50 and not 0.5. `find_last_number` says what is no commitment, such as "18 or 19".

    Scores: "format_reward" = the response commits to a number; "reward" and "answer_reward" = it is the right one.
    Raises ValueError where the reference is no number.
    """
    reference = read_reference(answer)
    expected = read_quantity(reference)
    if expected is None:
        raise ValueError(f'answer: found {reference[:40]!r}, allowed for the grader "gsm8k": a number')
    number = find_last_number(response)
    right = number == expected.value
    return make_scores(reward=right, format_reward=number is not None, answer_reward=right)
