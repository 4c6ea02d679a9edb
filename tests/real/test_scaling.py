"""A run with vLLM that is scaled 1 -> 2 -> 1 while it goes on, on a tiny random model."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from learner.intake.journal import read_groups, read_steps
from protocol.rundir import RunDir, read_json
from protocol.scaling import read_members
from tests.run_harness import TANDEM, Command, left_behind, status
from tests.test_end_to_end import GROUPS_PER_STEP, RECIPE
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.real_engine

STEPS = 100_000
"""More than it ever gets to: it is stopped."""


def scale(run: RunDir, count: int) -> str:
    command = [*TANDEM, "scale", str(count), "--runs", str(run.path.parent), "--wait", "--timeout", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=320, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)
def test_second_engine_joins_works_and_leaves_and_no_ticket_is_lost(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("MODEL", str(make_tiny_model(tmp_path / "tiny"))))
    run = RunDir(tmp_path / "runs" / "end-to-end")
    settings = {"steps": STEPS, "rollout.max_lag": 1, "eval.prompts": 0, "warm_start.examples": 0, "actor.threads": 1}
    arguments = ["train", str(recipe), "--runs", str(run.path.parent)]
    arguments += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with Command(arguments, tmp_path / "log") as command:

        def further(steps: int) -> None:
            at = status(run)["step"]
            command.until(lambda: status(run).get("step", 0) >= at + steps, f"{steps} further steps", 240)

        command.until(lambda: status(run).get("step", 0) >= 3, "the first steps", 300)
        assert "actor-1 serving" in scale(run, 2)
        before = {group.actor for group in read_groups(run.journal)}
        assert before <= {"actor-0", "actor-1"}
        command.until(lambda: "actor-1" in {group.actor for group in read_groups(run.journal)}, "its work", 120)
        further(3)
        assert "actor-1: gone" in scale(run, 1)
        further(3)
        assert [member.name for member in read_members(run)] == ["actor-0"]
        command.process.send_signal(signal.SIGINT)
        assert command.wait(120) == 3, command.output()
        assert command.left_running() == []
        assert left_behind(run, command.process.pid) == []
    summary = read_json(run.summary)
    last = {step["step"]: [index for _, index in step["ids"]] for step in read_steps(run.journal)}
    trained = [index for step in sorted(last) for index in last[step]]
    assert trained == list(range(GROUPS_PER_STEP * summary["steps"]))
    assert (summary["tickets"]["failed"], summary["tickets"]["dropped"]) == (0, 0)
    assert summary["actors"] == {"started": 2, "restarted": 0, "max": 2}
    assert summary["lag_max"] <= 1
    assert summary["parity"]["checks"] >= 2, "both engines were compared with the model"
    phases = re.findall(r"actor-1: (.*)", (run.logs / "actor-1.log").read_text())
    assert phases[:4] == ["starting engine", "waiting for weights", "loading weights", "serving"]
    assert "draining" in phases
    versions = {version for group in read_groups(run.journal) for c in group.completions for version, _ in c.spans
                if group.actor == "actor-1"}  # fmt: skip
    assert min(versions) >= 1
