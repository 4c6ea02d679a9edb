"""`max_lag = 0` is strictly on-policy, and with the fake engine reproducible: whole runs with Ray and real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.rundir import RunDir, read_json, read_jsonl
from tests.run_harness import Command
from tests.test_cli import RECIPE
from tests.tiny_model import make_tiny_model

STEPS = 8
OF_TIME_ALONE = ("_s", "tokens_per_s", "_busy_share", "_serving")


def trained(tmp_path: Path, name: str, *overrides: str) -> RunDir:
    recipe = tmp_path / f"{name}.toml"
    recipe.write_text(RECIPE.replace("MODEL", str(tmp_path / "tiny")))
    arguments = ["train", str(recipe), "--runs", str(tmp_path / "runs"), "--name", name]
    for override in (f"steps={STEPS}", 'task.grader="integer - 0.1*length:4"', "optim.lr=1e-3", *overrides):
        arguments += ["--set", override]
    with Command(arguments, tmp_path / f"{name}.log") as command:
        assert command.wait(200) == 0, command.output()
    return RunDir(tmp_path / "runs" / name)


def figures(run: RunDir) -> list[dict[str, float]]:
    rows = read_jsonl(run.metrics)
    return [{key: value for key, value in row.items() if not key.endswith(OF_TIME_ALONE)} for row in rows]


@pytest.mark.timeout(600)
def test_runs_without_lag_are_the_same_to_the_last_bit_whatever_the_number_of_actors(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny")
    one = trained(tmp_path, "one", "rollout.max_lag=0")
    two = trained(tmp_path, "two", "rollout.max_lag=0", "actor.count=2")
    assert [row["lag_max"] for row in figures(one)] == [0.0] * STEPS
    assert sum(row["grad_norm"] > 0 for row in figures(one)) >= STEPS // 2, "there is something to learn from"
    assert figures(one) == figures(two)
    assert (one.model / "model.safetensors").read_bytes() == (two.model / "model.safetensors").read_bytes()
    assert (one.model / "model.safetensors").read_bytes() != (tmp_path / "tiny" / "model.safetensors").read_bytes()
    assert set(read_json(one.summary)["lag_tokens"]) == {"0"}

    lagging = trained(tmp_path, "lagging", "rollout.max_lag=2")
    tokens = read_json(lagging.summary)["lag_tokens"]
    assert set(tokens) <= {"0", "1", "2"} and sum(tokens.values()) == read_json(lagging.summary)["rollout_tokens"]
    assert tokens.get("1", 0) + tokens.get("2", 0) > 0
