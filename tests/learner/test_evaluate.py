"""Evaluations: the same tickets each time, and figures that are means of what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from msgspec.structs import replace

from learner.evaluate import eval_tickets, summarize, write_responses
from learner.intake.data import Example
from protocol.config import parse_recipe
from protocol.rundir import read_jsonl
from tests.learner.reference import make_group

HELDOUT = [Example(f"What is {n}?", (1, n), str(n)) for n in range(3)]


def test_tickets_differ_between_evaluations_in_version_alone() -> None:
    recipe = parse_recipe({"seed": 7, "eval": {"samples": 5, "temperature": 0.5, "prompts": 3}}, "test")
    before, after = eval_tickets(recipe, HELDOUT, 1), eval_tickets(recipe, HELDOUT, 9)
    assert [ticket.prompt_ids for ticket in before] == [(1, 0), (1, 1), (1, 2)]
    assert {(t.kind, t.group_size, t.sampling.temperature, t.min_version) for t in before} == {("eval", 5, 0.5, 1)}
    assert len({ticket.seed for ticket in before}) == 3
    assert [replace(t, id=b.id, min_version=1) for t, b in zip(after, before, strict=True)] == before
    assert not {ticket.id for ticket in before} & {ticket.id for ticket in after}, "no late group answers the other"


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
    assert result.reward_ci95 == pytest.approx(1.96 * math.sqrt(0.25 / 3))  # of means 0.5, 1, 0
    assert (result.problems, result.samples, result.failed, result.grader_errors) == (3, 2, 1, 1)
    assert (result.tokens, result.tokens_per_s, result.length_mean) == (12, 3.0, 2.0)
    assert result.version_tokens == {"3": 10, "4": 2}


def test_responses_are_written_with_their_problems(tmp_path: Path) -> None:
    write_responses(tmp_path / "r.jsonl", [make_group([1.0, 0.0], [4, 2], index=1)], HELDOUT)
    rows = read_jsonl(tmp_path / "r.jsonl")
    assert [(row["problem"], row["prompt"], row["answer"], row["reward"]) for row in rows] == [
        (1, "What is 1?", "1", 1.0), (1, "What is 1?", "1", 0.0),
    ]  # fmt: skip
