"""Whole runs with vLLM that `make test` has no engine starts left for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from protocol.rundir import RunDir
from protocol.sections import LearnerConfig, ModelConfig
from tests.run_harness import Command, left_behind
from tests.test_cli import RECIPE
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.real_engine

BOUND = 1e-4
"""Nats: float32 on both sides."""


@pytest.mark.timeout(400)
def test_engine_that_cannot_start_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("MODEL", str(make_tiny_model(tmp_path / "tiny"))))
    run = RunDir(tmp_path / "runs" / "cli")
    overrides = ["--set", 'actor.engine="vllm"', "--set", "actor.kv_cache_gib=1e-6"]
    with Command(["train", str(recipe), "--runs", str(run.path.parent), *overrides], tmp_path / "log") as command:
        assert command.wait(300) == 4, command.output()
        assert "No available memory for the cache blocks" in command.output().replace("\n", " ")
        assert "Engine core initialization failed" not in command.output()
        assert command.left_running() == []
        assert left_behind(run, command.process.pid) == []


@pytest.mark.timeout(400)
def test_ctrl_c_while_the_engine_starts_leaves_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("MODEL", str(make_tiny_model(tmp_path / "tiny"))))
    run = RunDir(tmp_path / "runs" / "cli")
    arguments = ["train", str(recipe), "--runs", str(run.path.parent), "--set", 'actor.engine="vllm"']
    with Command(arguments, tmp_path / "log") as command:
        command.until(lambda: "EngineCore" in " ".join(command.names()), "engine core", 200)
        command.process.send_signal(signal.SIGINT)
        assert command.wait(90) == 3, command.output()
        assert "stopped before its first checkpoint" in command.output()
        assert command.left_running(30) == []
        assert left_behind(run, command.process.pid) == []


PLAIN_VLLM = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=128, enforce_eager=True)
    sampling = SamplingParams(max_tokens=12, logprobs=0, seed=1)
    (output,) = llm.generate(TokensPrompt(prompt_token_ids=[5, 6, 7, 8]), sampling)
    tokens = list(output.outputs[0].token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens)]
    print(json.dumps({"tokens": tokens, "logprobs": logprobs}))
"""


@pytest.mark.timeout(400)
def test_exported_model_loads_in_vllm_with_the_learners_weights(tmp_path: Path) -> None:
    """A plain vLLM, without anything of ours, gives the logprobs of the model that the learner exported."""
    from transformers import AutoTokenizer

    from learner.model import load_model

    source = make_tiny_model(tmp_path / "tiny", seed=3)
    exported = tmp_path / "exported"
    model = load_model(source, ModelConfig(dtype="float32", max_model_len=128), LearnerConfig())
    model.export(exported, AutoTokenizer.from_pretrained(source))
    script = tmp_path / "plain.py"
    script.write_text(PLAIN_VLLM)
    plain = subprocess.run(
        [sys.executable, str(script), str(exported)], capture_output=True, text=True, timeout=300, check=False
    )
    assert plain.returncode == 0, plain.stderr[-3000:]
    drawn = json.loads(next(line for line in plain.stdout.splitlines() if line.startswith("{")))  # vLLM logs there, too
    tokens = torch.tensor([[5, 6, 7, 8, *drawn["tokens"]]])
    with torch.no_grad():
        logits = model.network(input_ids=tokens).logits[0, 3:-1].float()
    expected = logits.log_softmax(-1).gather(-1, tokens[0, 4:, None])[:, 0]
    assert torch.allclose(torch.tensor(drawn["logprobs"]), expected, atol=BOUND)
