"""Commands as a user meets them, with the fake engine: those of `tests/test_cli.py` that take longest."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from protocol.rundir import RunDir, read_json, read_jsonl
from tests.run_harness import Command, Terminal, left_behind, open_to_the_network, status
from tests.test_cli import (
    assert_trained_once_each,
    hung_up_at_step_six,
    members,
    model_of,
    reached,
    tandem,
    write_recipe,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("cli"))


@pytest.mark.timeout(400)
def test_learner_of_two_processes_survives_a_killed_one_and_goes_on_as_one(recipe: Path, tmp_path: Path) -> None:
    """The kill costs the steps since the last checkpoint; Ctrl-C stops both processes after the same step."""
    run = RunDir(tmp_path / "runs" / "cli")
    two = ["--set", 'learner.device="cpu"', "--set", "learner.processes=2"]
    with Command(["train", str(recipe), "--runs", str(run.path.parent), *two], tmp_path / "two.log") as first:
        first.until(reached(run, 6), "a step behind the first checkpoint", 120)
        assert open_to_the_network(first.process.pid) == []
        ranks = first.running("--rank")
        assert len(ranks) == 1, "rank 0 has started one other"
        ranks[0].kill()
        first.until(lambda: "resumed at step" in (run.logs / "learner.log").read_text(), "the restart", 120)
        before, _, after = (run.logs / "learner.log").read_text().partition("resumed at step ")
        assert re.search(r"RankLost: (rank 0 of 2, waiting for .*: )?rank 1 has ended with -9", before)
        wanted = f"step {int(after.split()[0]) + 2}/"
        first.until(
            lambda: wanted in (run.logs / "learner.log").read_text().partition("resumed at step ")[2],
            "steps after the restart",
            120,
        )
        first.process.send_signal(signal.SIGINT)
        assert first.wait(60) == 3, first.output()
        assert first.left_running() == [] and not run.ranks.exists()
    steps = read_json(run.summary)["steps"] + 3
    one = ["--set", f"steps={steps}", "--set", "learner.processes=1"]
    with Command(["train", "--resume", str(run.path), *one], tmp_path / "one.log") as second:
        assert second.wait(120) == 0, second.output()
    assert "learner.processes: 2 -> 1" in second.output()
    assert [row["step"] for row in read_jsonl(run.metrics)] == list(range(1, steps + 1))
    assert_trained_once_each(run, steps)


def test_run_without_actors_gets_them_by_scaling(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cli")
    arguments = ["train", str(recipe), "--runs", str(tmp_path), "--set", "actor.count=0", "--set", "steps=4"]
    with Command(arguments, tmp_path / "log") as command:
        command.until(lambda: "no actor is wanted" in status(run).get("waiting_for", ""), "a learner that waits", 120)
        assert tandem("scale", "1", "cli", "--runs", str(tmp_path)).returncode == 0
        assert command.wait(120) == 0, command.output()
        assert command.left_running() == []
    assert_trained_once_each(run, 4)


def test_autoscaling_brings_an_actor_to_a_learner_that_waits(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cli")
    half = max(os.cpu_count() or 1, 2) / 2
    autoscale = {"enabled": "true", "max_actors": 2, "window_steps": 2, "patience": 1}
    changed = {f"autoscale.{key}": value for key, value in autoscale.items()} | {"actor.cpus": half}
    settings = [f"{key}={value}" for key, value in (changed | {"actor.fake_token_s": 0.1, "steps": 30}).items()]
    arguments = ["train", str(recipe), "--runs", str(tmp_path)]
    with Command([*arguments, *(part for text in settings for part in ("--set", text))], tmp_path / "log") as command:
        command.until(lambda: members(run).get("actor-1") == "serving", "a second actor", 120)
        said = [line for line in command.output().splitlines() if "autoscale" in line]
        assert len(said) == 1
        assert "1 -> 2 actors (autoscale: in 2 steps the learner waited" in said[0]
        command.process.send_signal(signal.SIGINT)
        assert command.wait(60) in (0, 3)


@pytest.mark.timeout(300)
def test_ctrl_c_twice_leaves_a_run_that_can_go_on(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "cli")
    with Command(["train", str(recipe), "--runs", str(run.path.parent)], tmp_path / "log") as command:
        command.until(reached(run, 6), "sixth step", 120)
        command.process.send_signal(signal.SIGINT)
        command.process.send_signal(signal.SIGINT)
        assert command.wait(60) == 3, command.output()
        assert re.search(rf"stopped with a checkpoint of step \d+\. Go on with:\n  tandem train --resume {run.path}",
                         command.output())  # fmt: skip
        assert command.left_running() == []
        assert left_behind(run, command.process.pid) == []


@pytest.mark.timeout(300)
def test_run_that_ignores_the_hangup_goes_on_without_its_terminal(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "cli")
    with Terminal(ignored=True) as terminal:
        assert hung_up_at_step_six(recipe, run, terminal, "steps=30", 120) == 0
    assert read_json(run.summary)["steps"] == 30
    assert status(run)["phase"] == "finished"


@pytest.mark.timeout(400)
def test_killed_learner_is_restarted_and_replays_its_journal(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "cli")
    arguments = ["train", str(recipe), "--runs", str(run.path.parent), "--set", "steps=60"]
    with Command(arguments, tmp_path / "log") as command:
        command.until(reached(run, 8), "eighth step", 120)
        (learner,) = command.running("learner")
        learner.kill()
        sent_before = read_json(run.summary)["weights"]["bytes_sent"]
        assert command.wait(200) == 0, command.output()
        assert "restarting it from its last checkpoint" in command.output()
        assert command.left_running() == []
    assert_trained_once_each(run, 60)
    rows, summary = read_jsonl(run.metrics), read_json(run.summary)
    assert [row["step"] for row in rows] == list(range(1, 61)), "steps that were done twice are written once"
    assert summary["rollout_tokens"] == sum(row["completion_tokens"] for row in rows)
    assert summary["reward_first"] == rows[0]["reward_mean"]
    assert summary["lag_mean"] == pytest.approx(sum(row["lag_mean"] for row in rows) / 60)
    assert summary["actors"] == {"started": 1, "restarted": 0, "max": 1}, "it outlived the learner"
    assert summary["weights"]["bytes_sent"] > sent_before > 0, "of both processes"
    replayed = re.search(
        r"(\d+) groups of unfinished tickets come from the journal", (run.logs / "learner.log").read_text()
    )
    assert replayed and int(replayed[1]) > 0


@pytest.mark.timeout(300)
def test_stopped_evaluation_goes_on_and_grades_with_the_users_function(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(response, answer):\n    return {'reward': 0.25 * (answer != '')}\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    run = RunDir(tmp_path / "runs" / "mine")
    arguments = ["eval", model_of(recipe), "--recipe", str(recipe), "--name", "mine", "--runs", str(run.path.parent)]
    arguments += ["--grader", "mine:score", "--prompts", "20", "--set", "actor.fake_token_s=0.3"]
    with Command(arguments, tmp_path / "first.log", PYTHONPATH=path) as first:
        first.until(lambda: "of 20 problems" in status(run).get("waiting_for", ""), "the evaluation", 120)
        first.process.send_signal(signal.SIGINT)
        assert first.wait(60) == 3, first.output()
        assert f"tandem train --resume {run.path}" in first.output()
    assert not (run.eval / "eval.json").exists()
    with Command(["train", "--resume", str(run.path)], tmp_path / "second.log", PYTHONPATH=path) as second:
        assert second.wait(120) == 0, second.output()
        assert second.left_running() == []
    result = read_json(run.eval / "eval.json")
    assert (result["problems"], result["samples"], result["grader_errors"]) == (20, 2, 0)
    assert result["reward"] == 0.25, "the function that the launcher allowed its actors to import"
