"""The grader `exact`: equal text."""

from __future__ import annotations

from actor.rewards.base import Scores, make_scores


def grade_exact(response: str, answer: str) -> Scores:
    """Reward 1 where response and answer are equal once blanks at both ends are gone.

    Scores: "reward" and "answer_reward" = equal; "format_reward" = the response is not blank.
    """
    equal = response.strip() == answer.strip()
    return make_scores(reward=equal, format_reward=bool(response.strip()), answer_reward=equal)
