"""`tandem eval` and `tandem compare` as a user meets them, with the fake engine under Ray."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from protocol.config import load_recipe
from protocol.rundir import RunDir, read_json, read_jsonl
from tests.run_harness import TANDEM, Command, left_behind
from tests.tiny_model import make_tiny_model

FAKE = ("actor.engine=fake", "model.dtype=float32", "wire.heartbeat_s=0.2", "wire.dead_after_s=10.0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def arguments(model: Path, runs: Path, *more: str) -> list[str]:
    settings = [part for setting in FAKE for part in ("--set", setting)]
    return ["eval", str(model), "--runs", str(runs), "--prompts", "4", "--n", "3", *more, *settings]


def tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TANDEM, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.timeout(300)
def test_eval_measures_a_model_and_compare_compares_it(model: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run = RunDir(runs / "eval-tiny")
    with Command(arguments(model, runs, "--max-tokens", "2"), tmp_path / "log") as command:
        assert command.wait(200) == 0, command.output()
        assert command.left_running() == []
        assert left_behind(run, command.process.pid) == []
    recipe = load_recipe(run.recipe)
    assert (recipe.method, recipe.steps, recipe.eval_sampling_tokens) == ("eval", 0, 2)
    result, rows = read_json(run.eval / "eval.json"), read_jsonl(run.eval / "eval_responses.jsonl")
    assert (result["name"], result["problems"], result["samples"], result["failed"]) == ("eval", 4, 3, 0)
    assert [(row["problem"], row["sample"]) for row in rows] == [(problem, n) for problem in range(4) for n in range(3)]
    assert sum(row["tokens"] for row in rows) == result["tokens"]
    assert (result["version_first"], result["version_last"]) == (1, 1)
    assert sum(result["classes"].values()) == 12
    assert result["classes"]["ungraded"] == 0
    assert result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"]
    assert list(result["pass_at_k"]) == ["1", "2", "3"]
    shown = command.output()
    for text in ("accuracy", "pass@3", "wrong format", "4 problems of arithmetic, 3 samples each", "What is "):
        assert text in shown, text
    assert not list(run.checkpoints.glob("step-*")), "there is nothing to go on with"
    assert "accuracy" in tandem("report", str(run.path)).stdout

    compared = tandem("compare", str(run.path), str(run.eval / "eval.json"), "--json", str(tmp_path / "c.json"))
    assert compared.returncode == 0, compared.stderr
    assert "4 problems that both have (A has 4, B has 4)" in compared.stdout
    assert read_json(tmp_path / "c.json")["equal"] == 4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--task", "mmlu"], "task.name: found 'mmlu'"),
        (["--max-tokens", "600"], "eval.max_tokens: found 600, allowed: less than model.max_model_len = 512"),
        (["--temperature", "-1"], "eval.temperature: found -1.0, allowed: "),
        (["--recipe", "/nowhere.toml"], "/nowhere.toml: no such file"),
        (["--set", "steps=3"], "steps: found 3, allowed with method"),
        (["--task", "jsonl", "--data", "/nowhere.jsonl"], "task.train: found '/nowhere.jsonl'"),
    ],
)
def test_eval_refuses_what_cannot_be(model: Path, tmp_path: Path, options: list[str], complaint: str) -> None:
    result = tandem(*arguments(model, tmp_path / "runs", *options))
    assert result.returncode == 2, result.stderr
    assert complaint in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists(), "nothing was started"


def test_compare_refuses_a_directory_without_evaluation(tmp_path: Path) -> None:
    result = tandem("compare", str(tmp_path), str(tmp_path))
    assert result.returncode == 2
    assert "found no evaluation there" in result.stderr.replace("\n", " ")
