"""What the guard is told of a step's groups."""

from __future__ import annotations

import numpy as np
import pytest

from learner.methods.guard_figures import duplicate_share, guard_figures, standard_error
from protocol.messages import Completion, Group, TicketId


@pytest.mark.parametrize(("texts", "share"), [
    ([["a", "a"]], 0.0),
    ([], 0.0),
    ([["a", "a"], ["b", "c"]], 0.5),
    ([["t", "t"], ["t", "t"], ["t", "t"]], 1.0),
    ([["t", "x"], ["y", "t"], ["z", "w"], ["v", "u"]], 0.5),
    ([["", ""], ["", "a"]], 1.0),
    ([[], []], 0.0),
])  # fmt: skip
def test_duplicate_share_counts_a_text_once_a_prompt(texts: list[list[str]], share: float) -> None:
    assert duplicate_share(texts) == share


def test_standard_error_takes_groups_for_the_draws() -> None:
    assert standard_error([[1, 1, 1, 1], [0, 0, 0, 0]]) == pytest.approx(0.5)  # deviation 0.7071 of two means
    assert standard_error([[1, 0], [0, 1], [1, 0]]) == 0.0
    assert standard_error([[1, 0]]) == 0.0


def group(index: int, rewards: list[float], texts: list[str], logprobs: list[float], errors: str = "") -> Group:
    """Completions of two tokens each; `errors`: those whose grader failed."""
    completions = tuple(
        Completion(2, ((1, 0),), "stop", {"reward": reward}, text, "timeout" if str(i) in errors else "")
        for i, (reward, text) in enumerate(zip(rewards, texts, strict=True))
    )
    data = np.array(logprobs, "<f4").tobytes()
    return Group(TicketId(0, index), "train", 1, "actor-0", (1, 2), 1.0, completions, logprobs=data)


def test_guard_figures_of_two_groups() -> None:
    groups = [
        group(0, [1.0, 0.0], ["5", "6"], [-1.0, -2.0, -3.0, -4.0], errors="1"),
        group(1, [0.0, 0.0], ["6", "6"], [0.0, 0.0, -1.0, -1.0]),
    ]
    assert guard_figures(groups) == pytest.approx(
        {"groups": 2, "completions": 4, "duplicate_share": 1.0, "reward_error": 0.5, "sampled_entropy": 1.5}
    )


def test_guard_figures_without_tokens_have_no_entropy() -> None:
    assert "sampled_entropy" not in guard_figures([group(0, [], [], [])])
