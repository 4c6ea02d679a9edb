r"""The graders `question_only` and `math`: the answer is in the last `\boxed{}`."""

from __future__ import annotations

from actor.rewards.base import Scores, make_scores
from actor.rewards.equality import answers_equal, read_reference
from actor.rewards.numerals import find_last_number, read_quantity
from actor.rewards.text import cut_tail, find_last_box, has_box


def grade_math(response: str, answer: str) -> Scores:
    r"""Reward 1 where the last `\boxed{}` of the response equals the reference (`answers_equal`), as in the set MATH.

    The reference is an answer, or a solution whose last box holds it. Boxes that list different candidates
    ("\boxed{1} or \boxed{2}"), and a last box that is never closed, are no answer.

    Scores: "format_reward" = there is such a box; "reward" and "answer_reward" = it holds the right answer.
    Raises ValueError where the reference answer is blank.
    """
    reference = read_reference(answer)
    box = find_last_box(cut_tail(response))
    right = box is not None and answers_equal(box.content, reference)
    return make_scores(reward=right, format_reward=box is not None and bool(box.content), answer_reward=right)


def grade_question_only(response: str, answer: str) -> Scores:
    r"""Reward 1 where the last `\boxed{}` or, in a response without any box, the last number is the right answer.

    A box is read as by `math`, a number as by `gsm8k`. A box that is broken or one of a list is not replaced
    by a number.

    Scores: "format_reward" = there is a boxed answer; "reward" and "answer_reward" = the answer is right, boxed or not.
    Raises ValueError where the reference answer is blank.
    """
    text = cut_tail(response)
    if has_box(text):
        return grade_math(response, answer)
    expected = read_quantity(read_reference(answer))
    number = find_last_number(text)
    right = expected is not None and number == expected.value
    return make_scores(reward=right, format_reward=0.0, answer_reward=right)
