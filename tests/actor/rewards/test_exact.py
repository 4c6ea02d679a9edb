"""The grader `exact`."""

import pytest

from actor.rewards import grade_exact


@pytest.mark.parametrize(
    ("response", "right", "form"),
    [(" Paris\n", 1.0, 1.0), ("paris", 0.0, 1.0), ("Paris.", 0.0, 1.0), ("", 0.0, 0.0), (" \n", 0.0, 0.0), ("\x00",
     0.0, 1.0)],
)  # fmt: skip
def test_exact_grader_compares_stripped_text(response, right, form):
    assert grade_exact(response, "Paris") == {"reward": right, "format_reward": form, "answer_reward": right}
