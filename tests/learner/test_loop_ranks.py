"""Whole runs of a learner of two processes, each beside the same run of one: the second rank follows everywhere.

Figures agree up to the order of float32 sums (tests/learner/test_trainer.py says more); the fake engine draws the same
tokens in both runs, since they depend on the tickets alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from learner.loop import Learner
from protocol.config import Recipe
from protocol.rundir import RunDir, read_json, read_jsonl
from tests.learner.test_loop import learn, recipe_of
from tests.ranks_harness import two_ranks
from tests.tiny_model import make_tiny_model

TOLERANCE = 1e-4
SAME = ("loss", "grad_norm", "entropy", "tokens", "microbatches", "positions", "lr", "branch", "reward_mean")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("loop-ranks") / "tiny")


def both(recipe: Recipe, path: Path, model: Path, watch: Any = None) -> tuple[RunDir, RunDir]:
    """The run of one process and that of two; their common figures agree."""
    one = learn(recipe, path / "one", model, watch=watch)
    with two_ranks(recipe, RunDir(path / "two"), model) as ranks:
        two = learn(recipe, path / "two", model, watch=watch, ranks=ranks)
    assert one[0] and two[0]
    rows = [read_jsonl(run.metrics) for _, run in (one, two)]
    assert len(rows[0]) == len(rows[1])
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for name in SAME:
            assert b.get(name) == pytest.approx(a.get(name), rel=TOLERANCE, abs=TOLERANCE), (a["step"], name)
    return one[1], two[1]


def test_grpo_with_warm_start_reference_and_rollback(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(
        steps=4,
        warm_start={"examples": 6, "batch_size": 4},
        grpo={"kl_coef": 0.1},
        optim={"lr": 1e-4, "minibatches": 2, "epochs": 2},
        guard={"policy": "rollback", "lr_factor": 0.5, "window": 1},
        checkpoint={"every_steps": 1},
        learner={"threads": 1, "microbatch_tokens": 64},
    )

    def collapse_once(learner: Learner) -> None:
        see = learner.guard.see

        def seeing(step: int, figures: dict[str, float], last: bool) -> Any:
            collapsed = step == 3 and not learner.state.rollbacks
            calm = {"kl_k3": 9.0 if collapsed else 0.0, "updates": 1.0, "duplicate_share": 0.0, "kl_reference": 0.0}
            return see(step, figures | calm, last)

        learner.guard.see = seeing  # type: ignore[method-assign, assignment]

    runs = both(recipe, tmp_path, model, collapse_once)
    for path in sorted(runs[0].rollouts.glob("*.safetensors")):
        one, two = (load_file(run.rollouts / path.name) for run in runs)
        assert one.keys() == two.keys() and np.isfinite(one["logprobs"]).any()
        for name, values in one.items():
            np.testing.assert_allclose(two[name], values, rtol=0, atol=1e-3, err_msg=f"{path.name}: {name}")
    assert len(list(runs[1].rollouts.glob("*.safetensors"))) == 4
    for run in runs:
        summary, rows = read_json(run.summary), read_jsonl(run.metrics)
        assert (summary["rollbacks"], summary["branch"], summary["lr_scale"]) == (1, 1, 0.5)
        assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["branch"] == 1
        assert rows[0]["updates"] == 4 and rows[-1]["reference_kl_k3"] > 0
        versions = [row["version"] for row in read_jsonl(run.versions)]
        assert versions == sorted(set(versions)), "each published once"


def test_expert_iteration(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(
        method="expert_iteration",
        steps=3,
        expert_iteration={"batch_size": 3, "epochs": 2},
        learner={"threads": 1, "microbatch_tokens": 32},
    )
    runs = both(recipe, tmp_path, model)
    assert any(row["kept_completions"] for row in read_jsonl(runs[1].metrics))
