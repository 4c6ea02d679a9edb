"""What every grader is: a pure function of (response, reference answer) that returns named scores."""

from __future__ import annotations

from collections.abc import Callable

Scores = dict[str, float]
Grader = Callable[[str, str], Scores]

SCORE_NAMES = ("reward", "format_reward", "answer_reward")
"""What each built-in grader returns. A user's function returns "reward" at least."""


def make_scores(reward: float, format_reward: float, answer_reward: float) -> Scores:
    """The three scores, as floats: what is trained on; whether the form is as asked; whether the answer is right."""
    return {"reward": float(reward), "format_reward": float(format_reward), "answer_reward": float(answer_reward)}
