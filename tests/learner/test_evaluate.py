"""Evaluations: the same tickets each time, and figures that are means of what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from msgspec.structs import replace

from learner.eval_figures import (
    answer_score,
    classify,
    clustered_wilson,
    ks_of,
    paired_interval,
    pass_at_k,
    t_quantile,
    wilson,
)
from learner.evaluate import eval_row, eval_tickets, summarize, write_responses, write_result
from learner.intake.data import Example
from protocol.config import parse_recipe
from protocol.messages import Group
from protocol.rundir import read_json, read_jsonl
from tests.learner.reference import make_group

HELDOUT = [Example(f"What is {n}?", (1, n), str(n)) for n in range(3)]


def graded(index: int, *scores: tuple[float, float], spans: list[tuple[tuple[int, int], ...]] | None = None) -> Group:
    """A group whose completions have these (format_reward, answer_reward); reward 1 where both are 1. 2 tokens each."""
    group = make_group([form * answer for form, answer in scores], [2] * len(scores), spans, index=index)
    completions = tuple(
        replace(completion, scores={**completion.scores, "format_reward": form, "answer_reward": answer})
        for completion, (form, answer) in zip(group.completions, scores, strict=True)
    )
    return replace(group, completions=completions)


# --- tickets --------------------------------------------------------------------------------------------------------


def test_tickets_differ_between_evaluations_in_version_alone() -> None:
    recipe = parse_recipe({"seed": 7, "eval": {"samples": 5, "temperature": 0.5, "prompts": 3}}, "test")
    before, after = eval_tickets(recipe, HELDOUT, 1), eval_tickets(recipe, HELDOUT, 9)
    assert [ticket.prompt_ids for ticket in before] == [(1, 0), (1, 1), (1, 2)]
    assert {(t.kind, t.group_size, t.sampling.temperature, t.min_version) for t in before} == {("eval", 5, 0.5, 1)}
    assert len({ticket.seed for ticket in before}) == 3
    assert [replace(t, id=b.id, min_version=1) for t, b in zip(after, before, strict=True)] == before
    assert not {ticket.id for ticket in before} & {ticket.id for ticket in after}, "no late group answers the other"


# --- figures --------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_chance_of_one_success_among_k_drawn() -> None:
    assert pass_at_k(4, 2, 1) == 0.5
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # one of six pairs has none of the two
    assert pass_at_k(4, 2, 3) == 1.0
    assert [pass_at_k(4, 0, k) for k in (1, 4)] == [0.0, 0.0]
    assert [pass_at_k(8, 1, k) for k in (1, 2, 4, 8)] == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1.0])
    with pytest.raises(ValueError, match="k: found 5, allowed: 1 to 4"):
        pass_at_k(4, 2, 5)


def test_pass_at_k_is_reported_for_powers_of_two_and_all_samples() -> None:
    assert [ks_of(samples) for samples in (0, 1, 2, 6, 8)] == [[], [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize(
    ("scores", "error", "expected"),
    [
        ({"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}, "", "right"),
        ({"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}, "", "wrong_answer"),
        ({"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}, "", "wrong_format"),
        ({"reward": 0.0, "format_reward": 0.0, "answer_reward": 1.0}, "", "wrong_format"),
        ({"reward": 1.0}, "", "right"),  # a grader that knows no form
        ({"reward": 0.4}, "", "wrong_answer"),
        ({"reward": 0.0}, "time limit", "ungraded"),
    ],
)
def test_class_of_a_response(scores: dict[str, float], error: str, expected: str) -> None:
    assert classify(scores, error) == expected


def test_answer_score_prefers_the_answers_own() -> None:
    assert answer_score({"reward": 0.0, "answer_reward": 1.0}) == 1.0
    assert answer_score({"reward": 1.0, "answer_reward": 0.25}) == 0.25
    assert [answer_score({"reward": reward}) for reward in (0.49, 0.5, 7.0)] == [0.0, 1.0, 1.0]
    assert answer_score({"reward": 3.0, "answer_reward": 3.0}) == 1.0, "a share, whatever the grader's scale"


def test_wilson_interval_is_the_published_one() -> None:
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe, 1998, table I
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1.0, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)  # 1 - (0, 0.1170) of 0 / 29
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_interval_over_problems_lies_between_independent_and_equal_samples() -> None:
    assert clustered_wilson([1.0, 0.0, 1.0, 1.0], 1) == wilson(0.75, 4), "one sample a problem"
    alike = clustered_wilson([1.0, 0.0] * 8, 4)
    assert alike == pytest.approx(wilson(0.5, 16)), "samples of a problem that are all alike add nothing"
    assert clustered_wilson([0.5] * 16, 4) == pytest.approx(wilson(0.5, 64)), "no problem is harder than another"
    assert clustered_wilson([1.0] * 16, 4) == wilson(1.0, 16), "not known: as if all were alike"
    # variance of the means 1/12, by 4 problems: 1/48; independent draws: 0.25 / 8 = 1/32; the ratio is below 1
    assert clustered_wilson([0.5, 0.5, 0.5, 1.0], 2) == wilson(0.625, 8)
    # variance 1/3 by 4: 1/12; (0.5 x 0.5) / 12 = 1/48; design effect 4, at most 3 samples
    assert clustered_wilson([0.0, 0.0, 1.0, 1.0], 3) == wilson(0.5, 4)
    assert clustered_wilson([], 1) == (0.0, 1.0)


def test_t_quantile_is_the_table_s() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980, 1000: 1.962}
    assert {degrees: round(t_quantile(degrees), 3) for degrees in table} == table
    assert t_quantile(4, inside=0.99) == pytest.approx(4.604, abs=5e-4)


def test_paired_interval_by_hand() -> None:
    # mean 0.5, variance (0.25 + 0.25 + 0.25 + 0.25) / 3 = 1/3, standard error sqrt(1/12)
    half = 3.182446 * math.sqrt(1 / 12)
    assert paired_interval([0.0, 1.0, 0.0, 1.0]) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-6)
    assert paired_interval([0.1, 0.1, 0.1]) is None, "their spread is not known"
    assert paired_interval([0.3]) is None
    assert paired_interval([]) is None


# --- results --------------------------------------------------------------------------------------------------------


def test_figures_of_an_evaluation() -> None:
    groups = [
        make_group([1.0, 0.0], [4, 2], [((3, 0),), ((3, 0),)], index=0),
        make_group([1.0, 1.0], [3, 1], [((3, 0), (4, 2)), ((4, 0),)], index=1),
        make_group([0.0, 0.0], [1, 1], [((3, 0),), ((3, 0),)], index=2),
    ]
    failed_grader = replace(groups[2].completions[0], grader_error="time limit")
    groups[2] = replace(groups[2], completions=(failed_grader, groups[2].completions[1]))
    result = summarize("after", groups, failed=1, seconds=4.0)
    assert result.reward == pytest.approx(0.5)
    assert result.reward_ci95 == pytest.approx(1.959964 * math.sqrt(0.25 / 3))  # of means 0.5, 1, 0
    assert (result.problems, result.samples, result.failed, result.grader_errors) == (3, 2, 1, 1)
    assert (result.tokens, result.tokens_per_s, result.length_mean) == (12, 3.0, 2.0)
    assert (result.length_median, result.length_max) == (1.5, 4)
    assert result.truncated_share == 0.5, "the last of each group"
    assert result.version_tokens == {"3": 10, "4": 2}
    assert result.version_shares == pytest.approx({"3": 10 / 12, "4": 2 / 12})
    assert (result.version_first, result.version_last) == (3, 4)
    assert result.pass_at_k == pytest.approx({"1": 0.5, "2": 2 / 3})
    assert result.accuracy == 0.5
    assert result.classes == {"right": 3, "wrong_answer": 2, "wrong_format": 0, "ungraded": 1}
    assert result.format_rate is None, "the grader looked at no form"


def test_accuracy_and_form_come_from_the_grader_s_scores() -> None:
    groups = [graded(0, (1.0, 1.0), (1.0, 0.0)), graded(1, (0.0, 1.0), (0.0, 0.0))]
    result = summarize("eval", groups, failed=0, seconds=1.0)
    assert (result.reward, result.accuracy, result.format_rate) == (0.25, 0.5, 0.5)
    assert (result.accuracy_low, result.accuracy_high) == wilson(0.5, 4)
    assert result.classes == {"right": 1, "wrong_answer": 1, "wrong_format": 2, "ungraded": 0}
    assert result.pass_at_k == {"1": 0.25, "2": 0.5}


def test_reward_a_rounding_error_below_one_solves_the_problem() -> None:
    result = summarize("eval", [make_group([0.1 + 0.2 + 0.7 - 2e-16, 0.999], [1, 1])], failed=0, seconds=1.0)
    assert result.pass_at_k == {"1": 0.5, "2": 1.0}


def test_interval_does_not_vanish_where_all_is_wrong() -> None:
    result = summarize("eval", [make_group([0.0], [2], index=index) for index in range(20)], failed=0, seconds=1.0)
    assert (result.reward, result.reward_ci95, result.accuracy) == (0.0, 0.0, 0.0)
    assert (result.accuracy_low, result.accuracy_high) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_evaluation_in_the_background_spans_versions() -> None:
    groups = [
        make_group([1.0, 0.0], [4, 4], [((7, 0), (8, 1)), ((8, 0), (10, 3))], index=0),
        make_group([1.0, 0.0], [4, 4], [((10, 0),), ((10, 0),)], index=2),
    ]
    result = summarize("step-00010", groups, failed=0, seconds=2.0)
    assert result.name == "step-00010"
    assert list(result.version_tokens.items()) == [("7", 1), ("8", 6), ("10", 9)], "in the order of the numbers"
    assert result.version_shares == {"7": 1 / 16, "8": 6 / 16, "10": 9 / 16}
    assert (result.version_first, result.version_last) == (7, 10)


def test_row_for_the_metrics_has_numbers_only() -> None:
    row = eval_row(summarize("step-00010", [graded(0, (1.0, 1.0), (1.0, 0.0))], failed=0, seconds=2.0))
    assert row["eval_reward"] == row["eval_accuracy"] == row["eval_pass_at_1"] == 0.5
    assert (row["eval_pass_at_2"], row["eval_format_rate"], row["eval_tokens_per_s"]) == (1.0, 1.0, 2.0)
    assert all(name.startswith("eval_") and isinstance(value, int | float) for name, value in row.items())
    assert "eval_format_rate" not in eval_row(summarize("x", [make_group([1.0], [1])], failed=0, seconds=1.0))


def test_evaluation_without_a_group_has_figures() -> None:
    result = summarize("after", [], failed=2, seconds=1.0)
    assert (result.reward, result.accuracy_low, result.accuracy_high, result.pass_at_k) == (0.0, 0.0, 1.0, {})


# --- files ----------------------------------------------------------------------------------------------------------


def test_responses_are_written_with_their_problems(tmp_path: Path) -> None:
    group = graded(1, (1.0, 1.0), (1.0, 0.0), spans=[((3, 0),), ((3, 0), (4, 1))])
    group = replace(group, completions=(replace(group.completions[0], text="1"), group.completions[1]))
    write_responses(tmp_path / "r.jsonl", [group], HELDOUT)
    first, second = read_jsonl(tmp_path / "r.jsonl")
    assert first == {
        "problem": 1, "sample": 0, "prompt": "What is 1?", "answer": "1", "response": "1", "finish_reason": "stop",
        "tokens": 2, "class": "right", "reward": 1.0, "grader_error": "", "versions": [[3, 0]],
        "scores": {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0},
    }  # fmt: skip
    assert (second["sample"], second["class"], second["finish_reason"]) == (1, "wrong_answer", "length")
    assert second["versions"] == [[3, 0], [4, 1]]


def test_result_is_written_as_json(tmp_path: Path) -> None:
    write_result(tmp_path / "eval.json", summarize("eval", [graded(0, (1.0, 1.0))], failed=0, seconds=2.0))
    found = read_json(tmp_path / "eval.json")
    assert (found["name"], found["accuracy"], found["pass_at_k"]) == ("eval", 1.0, {"1": 1.0})
