"""The real thing, small: Ray, vLLM on a tiny random model, real sockets, a learner; the actor is killed in mid-run.

One run serves all tests of this file: two engine starts, the second of them by Ray after the kill.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.intake.journal import read_groups, read_steps
from protocol.rundir import RunDir, read_json, read_jsonl
from tests.run_harness import Command, left_behind, open_to_the_network, status
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.real_engine

STEPS = 24
GROUPS_PER_STEP = 4
GAP_BOUND_NATS = 1e-3
"""Engine and learner, both fp32, strictly on-policy: all that may remain is the order of summation."""

RECIPE = f"""
name = "end-to-end"
steps = {STEPS}
[model]
path = "MODEL"
dtype = "float32"
max_model_len = 128
[task]
max_operand = 3
[warm_start]
examples = 6
epochs = 40
batch_size = 6
lr = 3e-3
[rollout]
groups_per_step = {GROUPS_PER_STEP}
group_size = 4
max_tokens = 14
max_lag = 0
[optim]
lr = 1e-3
[eval]
prompts = 2
samples = 4
[actor]
max_running = 16
kv_cache_gib = 0.25
[wire]
heartbeat_s = 0.25
dead_after_s = 30.0
"""


@dataclass
class Finished:
    run: RunDir
    summary: dict[str, Any]
    output: str
    left_running: list[Any]
    left_behind: list[Path]
    exposed: list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run whose actor was killed with SIGKILL after its second step."""
    directory = tmp_path_factory.mktemp("end-to-end")
    model = make_tiny_model(directory / "tiny")
    recipe = directory / "recipe.toml"
    recipe.write_text(RECIPE.replace("MODEL", str(model)))
    run = RunDir(directory / "runs" / "end-to-end")
    with Command(["train", str(recipe), "--runs", str(run.path.parent)], directory / "log") as command:
        command.until(lambda: status(run).get("step", 0) >= 2, "second step", 240)
        exposed = open_to_the_network(command.process.pid)
        os.kill(status(run)["actors"]["actor-0"], signal.SIGKILL)
        code = command.wait(240)
        assert code == 0, command.output() + (run.logs / "learner.log").read_text()[-4000:]
        left = (command.left_running(), left_behind(run, command.process.pid))
        return Finished(run, read_json(run.summary), command.output(), *left, exposed)


@pytest.mark.timeout(600)
def test_run_completes_and_trains_on_every_ticket_exactly_once(finished: Finished) -> None:
    tickets = finished.summary["tickets"]
    assert tickets["issued"] == tickets["trained"] == STEPS * GROUPS_PER_STEP
    assert finished.summary["actors"] == {"started": 1, "restarted": 1, "max": 1}
    trained = [index for step in read_steps(finished.run.journal) for _, index in step["ids"]]
    assert trained == list(range(STEPS * GROUPS_PER_STEP))
    journaled = [group.id.index for group in read_groups(finished.run.journal) if group.kind == "train"]
    assert sorted(journaled) == sorted(trained)


def test_run_is_strictly_on_policy_and_both_sides_agree_on_every_version(finished: Finished) -> None:
    """max_lag = 0 and fp32: the engine's logprobs are the learner's, step after step, with real updates in between."""
    rows = read_jsonl(finished.run.metrics)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["lag_max"] == 0 for row in rows)
    versions = [row["version"] for row in rows]
    assert versions == sorted(set(versions))
    trained = [row for row in rows if row["updates"]]
    assert len(trained) >= 3, "the tiny model must earn some rewards, or nothing is tested"
    assert all(row["engine_gap"] < GAP_BOUND_NATS for row in trained)
    assert all(0.999 < row["importance_mean"] < 1.001 for row in trained)


def test_groups_name_the_versions_that_drew_them(finished: Finished) -> None:
    """Version 1 is the model as it came, version 2 the warm start; step s (from 0) is drawn by version s + 2."""
    for group in read_groups(finished.run.journal):
        versions = {version for completion in group.completions for version, _ in completion.spans}
        if group.kind == "train":
            assert versions == {2 + group.id.index // GROUPS_PER_STEP}


def test_evaluations_measure_one_version_each_on_the_same_prompts(finished: Finished) -> None:
    results = {name: read_json(finished.run.eval / f"{name}.json") for name in ("before", "after_warm_start", "after")}
    assert [list(result["version_tokens"]) for result in results.values()] == [["1"], ["2"], [str(STEPS + 2)]]
    prompts = [[row["prompt"] for row in read_jsonl(finished.run.eval / f"{name}_responses.jsonl")] for name in results]
    assert prompts[0] == prompts[1] == prompts[2]


def test_exported_model_loads_in_transformers(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished.run.model)
    tokenizer = AutoTokenizer.from_pretrained(finished.run.model)
    assert tokenizer.chat_template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 + 1?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        assert torch.isfinite(model(**prompt).logits).all()


def test_run_opens_no_port_to_the_network(finished: Finished) -> None:
    assert finished.exposed == []


def test_run_leaves_its_files_and_nothing_else(finished: Finished) -> None:
    run = finished.run
    assert finished.left_running == []
    assert finished.left_behind == []
    assert "serves version" in (run.logs / "actor-0.log").read_text()
    assert run.curve.stat().st_size > 10_000
    assert list(run.tensorboard.glob("events.*"))
    assert "finished in" in finished.output
    for line in finished.run.versions.read_text().splitlines():
        assert set(json.loads(line)) == {"version", "step", "branch"}
