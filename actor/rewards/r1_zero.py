"""The grader `r1_zero`: reasoning and answer in tags, the prompt format of DeepSeek-R1-Zero."""

from __future__ import annotations

from actor.rewards.base import Scores, make_scores
from actor.rewards.equality import answers_equal, read_reference
from actor.rewards.text import MAX_TAIL_CHARS, find_last_box, find_tagged_answer, has_box, has_hedge, has_numeral


def grade_r1_zero(response: str, answer: str) -> Scores:
    r"""Reward 1 for `[<think>] reasoning </think> <answer> the right answer </answer>`.

    Each tag stands once, in this order; only blanks may stand before `<think>` (which the prompt may hold instead),
    between `</think>` and `<answer>`, and after `</answer>`. Repeated, nested or misplaced tags earn nothing. The
    answer block is compared as a whole (`answers_equal`), or what its one `\boxed{}` holds.

    Scores: "format_reward" = this form, with an answer that is not blank; "answer_reward" = this form and the right
    answer, so a right answer in another form has none; "reward" = the same as "answer_reward".
    Raises ValueError where the reference answer is blank.
    """
    reference = read_reference(answer)
    found = find_tagged_answer(response)
    if not found:
        return make_scores(0.0, 0.0, 0.0)
    right = (candidate := unbox(found)) is not None and answers_equal(candidate, reference)
    return make_scores(reward=right, format_reward=1.0, answer_reward=right)


def unbox(text: str) -> str | None:
    r"""An answer without its `\boxed{}`; None where the box is broken, or a choice or another box is beside it."""
    if len(text) > MAX_TAIL_CHARS or not has_box(text):
        return text
    box = find_last_box(text)
    if box is None:
        return None
    before, after = text[: box.start], text[box.end :]
    if has_box(before) or has_hedge(before + after):
        return None
    if has_numeral(before + after):
        return f"{before}{box.content}{after}"
    return box.content
