"""The CPU recipes on the real engine: the bundled model, vLLM under Ray, two steps each and a few held-out problems."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from protocol.config import OFFLINE_METHODS, ROLLOUT_METHODS, Recipe, load_recipe
from protocol.rundir import RunDir, read_json, read_jsonl
from tests.run_harness import Command, left_behind
from tests.test_recipes import CPU, FIGURES, identify, sets, versions_of

pytestmark = pytest.mark.real_engine

PROBLEMS, SAMPLES = 4, 2
GAP_BOUND_NATS = 0.1
"""Mean difference of the two sides' logprobs: 0.04 was measured with a bfloat16 engine."""
SMALL = (
    f"eval.prompts={PROBLEMS}", f"eval.samples={SAMPLES}", "rollout.groups_per_step=2", "rollout.group_size=4",
    "actor.max_running=16", "actor.kv_cache_gib=0.5", "warm_start.batch_size=4", "warm_start.epochs=1",
)  # fmt: skip


def overrides_of(recipe: Recipe) -> tuple[str, ...]:
    if recipe.method == "eval":
        return SMALL
    warm = ("warm_start.examples=8",) if recipe.warm_start.examples else ()
    return (*SMALL, *warm, "steps=2", "sft.batch_size=4", "dpo.batch_size=4")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", CPU, ids=identify)
def test_cpu_recipe_runs_with_the_real_engine(path: Path, tmp_path: Path) -> None:
    overrides = overrides_of(load_recipe(path))
    run = RunDir(tmp_path / "runs" / load_recipe(path).name)
    arguments = ["train", str(path), "--runs", str(run.path.parent), *sets(overrides)]
    with Command(arguments, tmp_path / "log") as command:
        assert command.wait(500) == 0, command.output()
        assert command.left_running(30) == []
        assert left_behind(run, command.process.pid) == []
    recipe, rows, summary = load_recipe(run.recipe), read_jsonl(run.metrics), read_json(run.summary)
    assert [row["step"] for row in rows] == ([] if recipe.method == "eval" else [1, 2])
    assert [row["step"] for row in read_jsonl(run.versions)] == versions_of(recipe)
    last = len(versions_of(recipe))
    log = (run.logs / "actor-0.log").read_text()
    assert f"serves version {last}" in log
    assert_measured(recipe, run, last)
    for row in rows:
        assert row.keys() >= FIGURES[recipe.method]
        assert None not in row.values(), "a figure that is not finite"
    if recipe.method in ROLLOUT_METHODS:
        assert summary["tickets"]["trained"] == 4
        assert all(0.0 <= row["format_reward_mean"] <= 1.0 for row in rows)
    if recipe.method == "grpo":
        assert all(row["engine_gap"] < GAP_BOUND_NATS for row in rows if row["updates"])
    if recipe.method in OFFLINE_METHODS:
        assert all(row["updates"] == 1 and row["grad_norm"] > 0 for row in rows)
    if recipe.method != "eval":
        assert (run.model / "model.safetensors").is_file()


def assert_measured(recipe: Recipe, run: RunDir, last: int) -> None:
    """Finite figures of the version that was asked for, and responses as the engine was told to end them."""
    evals: dict[str, Any] = {file.stem: read_json(file) for file in run.eval.glob("*.json")}
    first = "eval" if recipe.method == "eval" else "before"
    assert (evals[first]["version_first"], evals[first]["version_last"]) == (1, 1)
    if recipe.method != "eval":
        assert list(evals["after"]["version_tokens"]) == [str(last)]
    for name, result in evals.items():
        assert math.isfinite(result["reward"])
        assert 0.0 <= result["accuracy"] <= 1.0
        assert result["format_rate"] is not None
        assert (result["problems"], result["samples"], result["grader_errors"]) == (PROBLEMS, SAMPLES, 0)
        responses = read_jsonl(run.eval / f"{name}_responses.jsonl")
        assert len(responses) == PROBLEMS * SAMPLES
        for row in responses:
            assert 1 <= row["tokens"] <= recipe.eval_sampling_tokens
            for stop in recipe.rollout.stop:
                assert not row["response"].partition(stop)[2], "generation ends with the stop string"
