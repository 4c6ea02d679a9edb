"""The commands as a user meets them, with the fake engine: help, refusals, Ctrl-C, resume, and by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.intake.journal import read_steps
from protocol.keys import allow, load_actor_keys, make_keys
from protocol.rundir import RunDir, read_json, read_jsonl, replace_file
from protocol.scaling import read_members
from tests.run_harness import TANDEM, Command, Terminal, left_behind, open_to_the_network, secrets_shown, status
from tests.tiny_model import make_tiny_model

RECIPE = """
name = "cli"
steps = 400
[model]
path = "MODEL"
dtype = "float32"
max_model_len = 128
[task]
max_operand = 5
[rollout]
groups_per_step = 2
group_size = 2
max_tokens = 8
[eval]
prompts = 2
samples = 2
[checkpoint]
every_steps = 5
[actor]
engine = "fake"
fake_token_s = 0.01
max_running = 8
[wire]
heartbeat_s = 0.2
dead_after_s = 10.0
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("cli"))


def write_recipe(directory: Path) -> Path:
    """The recipe of these tests, with a tiny model beside it."""
    path = directory / "recipe.toml"
    path.write_text(RECIPE.replace("MODEL", str(make_tiny_model(directory / "tiny"))))
    return path


def tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What a command says on a machine without a GPU."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*TANDEM, *arguments], env=env, capture_output=True, text=True, timeout=120, check=False)


def assert_refused(result: subprocess.CompletedProcess[str], complaint: str) -> None:
    """One message, as an error that the user can mend, without a traceback."""
    assert result.returncode == 2
    assert complaint in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr


def reached(run: RunDir, step: int) -> Callable[[], bool]:
    return lambda: status(run).get("step", 0) >= step


def assert_in_order(run: RunDir, steps: int) -> None:
    """The last word of the journal on every step: its tickets, in order, none twice and none left out."""
    last = {step["step"]: [index for _, index in step["ids"]] for step in read_steps(run.journal)}
    assert sorted(last) == list(range(1, steps + 1))
    assert [index for step in sorted(last) for index in last[step]] == list(range(2 * steps))


def assert_trained_once_each(run: RunDir, steps: int) -> None:
    assert_in_order(run, steps)
    tickets = read_json(run.summary)["tickets"]
    assert tickets["issued"] == tickets["trained"] == 2 * steps


def test_help_loads_nothing_heavy() -> None:
    check = (
        "import sys, deploy.cli; from typer.testing import CliRunner;"
        "result = CliRunner().invoke(deploy.cli.app, ['--help']); assert 'demo' in result.output;"
        "sys.exit(str({'torch', 'ray', 'vllm', 'transformers', 'zmq', 'pydantic'} & set(sys.modules) or ''))"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr.strip() == ""


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("rollout.group_sise=4", "rollout.group_sise: unknown key; allowed here: "),
        ('steps="many"', "steps: found 'many'"),
        ("rollout.group_size=1", "rollout.group_size: found 1, allowed: at least 2"),
        ("rollout.max_tokens=128", "rollout.max_tokens: found 128, allowed: less than model.max_model_len"),
        ("model.max_model_len=100000", "model.max_model_len: found 100000, allowed: at most 512"),
        ('model.path="/nowhere/model"', "model.path: "),
        ('task.name="jsonl"', "task.train: found"),
        ('learner.device="cuda"', "learner.device: found"),
        ("learner.processes=2", "learner.processes: found 2, allowed here: 1, since no GPU is visible"),
        ('wire.host="0.0.0.0"', "wire.host: found '0.0.0.0', allowed: \"auto\""),
    ],
)
def test_train_refuses_a_wrong_recipe_before_anything_starts(
    recipe: Path, tmp_path: Path, override: str, complaint: str
) -> None:
    assert_refused(tandem("train", str(recipe), "--runs", str(tmp_path), "--set", override), complaint)
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_train_refuses_a_missing_dataset_file(recipe: Path, tmp_path: Path) -> None:
    arguments = ["--set", 'task.name="jsonl"', "--set", f'task.train="{tmp_path}/none.jsonl"']
    result = tandem("train", str(recipe), "--runs", str(tmp_path / "runs"), *arguments)
    assert result.returncode == 2
    assert "task.train: found" in result.stderr
    assert "allowed: an existing JSONL file" in result.stderr.replace("\n", " ")


def test_train_refuses_a_port_in_use(recipe: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = tandem("train", str(recipe), "--runs", str(tmp_path), "--set", f"wire.port={port}")
    assert result.returncode == 2
    assert f"wire.port: found {port}, which cannot be bound" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("127.0.0.1:1", "nobody listens at 127.0.0.1:1"),
        ("ray://127.0.0.1:10001", "found 'ray://127.0.0.1:10001', allowed: HOST:PORT"),
        ("somewhere", "found 'somewhere', allowed: HOST:PORT"),
    ],
)
def test_train_refuses_a_ray_address_where_no_cluster_is(
    recipe: Path, tmp_path: Path, address: str, complaint: str
) -> None:
    result = tandem("train", str(recipe), "--runs", str(tmp_path), "--ray-address", address)
    assert_refused(result, f"--ray-address: {complaint}")
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_error_message_is_no_markup(recipe: Path, tmp_path: Path) -> None:
    result = tandem("train", str(recipe), "--runs", str(tmp_path), "--set", 'rollout.stop="[/INST]"')
    assert result.returncode == 2
    assert "rollout.stop: found '[/INST]'" in result.stderr.replace("\n", " ")


def test_resume_refuses_a_run_that_is_alive(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run").create()
    run.recipe.write_text(recipe.read_text())
    for role in ("launcher", "learner"):
        with run.lock(role):
            result = tandem("train", "--resume", str(run.path))
        assert result.returncode == 2
        assert f"this run is in use by process {os.getpid()}" in result.stderr.replace("\n", " ")
    with run.lock("learner"):
        learner = [sys.executable, "-m", "learner", "--run", str(run.path), "--model", "none"]
        ended = subprocess.run(learner, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "in use by process" in ended.stderr
    assert not run.journal.exists()
    assert not run.status.exists(), "it is the other process's to write"


def test_resume_refuses_what_may_not_change(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(recipe.read_text())
    result = tandem("train", "--resume", str(run), "--set", "rollout.group_size=4")
    assert result.returncode == 2
    assert "rollout.group_size: the run has 2, found 4" in result.stderr.replace("\n", " ")
    assert "It may change: steps" in result.stderr.replace("\n", " ")


@pytest.mark.timeout(400)
def test_ctrl_c_checkpoints_and_resume_completes_the_run(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "cli")
    with Command(["train", str(recipe), "--runs", str(run.path.parent)], tmp_path / "first.log") as first:
        first.until(reached(run, 3), "third step", 120)
        assert open_to_the_network(first.process.pid) == []
        assert secrets_shown(run, first.process.pid) == []
        first.process.send_signal(signal.SIGINT)
        assert first.wait(60) == 3, first.output()
        assert f"tandem train --resume {run.path}" in first.output()
        assert first.left_running() == []
        assert left_behind(run, first.process.pid) == []
    stopped_at = read_json(run.summary)["steps"]
    assert stopped_at >= 3

    too_few = tandem("train", "--resume", str(run.path), "--set", "steps=1")
    assert too_few.returncode == 2
    assert f"steps: found 1, allowed: at least {stopped_at}, already done" in too_few.stderr.replace("\n", " ")

    steps = stopped_at + 7
    port = int(read_json(run.endpoint)["work"].rpartition(":")[2])
    with (
        socket.create_server(("127.0.0.1", port)),
        Command(["train", "--resume", str(run.path), "--set", f"steps={steps}"], tmp_path / "second.log") as second,
    ):
        assert second.wait(120) == 0, second.output()
        assert second.left_running() == []
        assert left_behind(run, second.process.pid) == []
    assert_trained_once_each(run, steps)
    assert [row["step"] for row in read_jsonl(run.metrics)] == list(range(1, steps + 1))
    versions = [row["version"] for row in read_jsonl(run.versions)]
    assert versions == list(range(1, len(versions) + 1)), "numbers only grow, also across the resume"
    assert (run.model / "model.safetensors").exists()
    assert not run.endpoint.exists(), "nobody listens there any more"
    assert secrets_shown(run) == []


def hung_up_at_step_six(recipe: Path, run: RunDir, terminal: Terminal, override: str, within_s: float) -> int:
    """Exit code of a training run whose terminal is closed; nothing is left of it."""
    arguments = ["train", str(recipe), "--runs", str(run.path.parent), "--set", override]
    with Command(arguments, run.path.parent.parent / "log", terminal=terminal) as command:
        command.until(reached(run, 6), "sixth step", 120)
        terminal.hang_up()
        code = command.wait(within_s)
        assert command.left_running() == []
        assert left_behind(run, command.process.pid) == []
    return code


@pytest.mark.timeout(300)
def test_closed_terminal_stops_the_run_with_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "cli")
    with Terminal() as terminal:
        assert hung_up_at_step_six(recipe, run, terminal, "checkpoint.every_steps=0", 60) == 3
    assert "tandem · cli" in terminal.shown, "the live view was on"
    assert run.checkpoint_steps()[-1] >= 6
    assert status(run)["phase"] == "stopped"


@pytest.mark.timeout(300)
def test_actor_that_is_not_allowed_says_what_to_do_and_goes_on_when_it_is(recipe: Path, tmp_path: Path) -> None:
    """The whole way, in processes: a key of another run, refused and named on both sides, then allowed."""
    run = RunDir(tmp_path / "runs" / "cli")
    make_keys(tmp_path / "other")
    other = load_actor_keys(tmp_path / "other" / "actor.json")
    learner = ["learner", str(recipe), "--runs", str(run.path.parent), "--set", "steps=3"]
    with Command(learner, tmp_path / "learner.log") as left:
        left.until(run.endpoint.exists, "endpoint", 120)
        mixed = tmp_path / "mixed.json"
        pair = read_json(tmp_path / "other" / "actor.json")
        replace_file(mixed, json.dumps(pair | {"learner": read_json(run.actor_keys)["learner"]}), mode=0o600)
        address = read_json(run.endpoint)["work"]
        with Command(["actor", address, "--key", str(mixed)], tmp_path / "actor.log") as right:
            right.until(lambda: f"put its public key {other.own.public} into" in right.output(), "the refusal", 60)
            left.until(lambda: f"key {other.own.public[:8]}… is not on the allow-list" in left.output(), "its name", 60)
            allow(run.keys / "allowed", "other", other.own.public)
            assert left.wait(120) == 0, left.output()
            assert right.wait(60) == 0, right.output()
        assert secrets_shown(run) == []
    summary = read_json(run.summary)
    assert summary["connections_refused"]["rejected"] >= 1
    assert list(summary["peers_rejected"]) == [f"127.0.0.1, key {other.own.public[:8]}…"]
    assert_trained_once_each(run, 3)


@pytest.mark.timeout(120)
def test_learner_without_keys_does_not_start(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run").create()
    shutil.copy(recipe, run.recipe)
    learner = [sys.executable, "-m", "learner", "--run", str(run.path), "--model", model_of(recipe)]
    ended = subprocess.run(learner, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2, ended.stderr
    assert f"{run.keys / 'learner.json'}: no such file; allowed: the keys that the launcher" in ended.stderr


@pytest.mark.timeout(300)
def test_both_sides_by_hand(recipe: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "cli")
    learner = ["learner", str(recipe), "--runs", str(run.path.parent), "--set", "steps=3"]
    with Command(learner, tmp_path / "learner.log") as left:
        left.until(run.endpoint.exists, "endpoint", 120)
        key = tmp_path / "copy.json"
        shutil.copy(run.actor_keys, key)  # with its mode
        address = read_json(run.endpoint)["work"]
        with Command(["actor", address, "--key", str(key)], tmp_path / "actor.log") as right:
            assert secrets_shown(run, left.process.pid) == secrets_shown(run, right.process.pid) == []
            assert left.wait(120) == 0, left.output()
            assert right.wait(60) == 0, right.output()
        assert f"tandem actor {run.endpoint}" in left.output()
    assert_trained_once_each(run, 3)


def model_of(recipe: Path) -> str:
    return str(recipe.parent / "tiny")


def members(run: RunDir) -> dict[str, str]:
    """What each actor does, as the launcher sees it."""
    return {member.name: member.phase or member.state for member in read_members(run)}


@pytest.mark.timeout(240)
def test_scale_changes_the_number_of_actors_of_a_running_run(recipe: Path, tmp_path: Path) -> None:
    """1 -> 2 -> 3, of which there is room for two -> 0 -> 1, and every ticket is trained on once."""
    run = RunDir(tmp_path / "cli")
    half = max(os.cpu_count() or 1, 2) / 2
    arguments = ["train", str(recipe), "--runs", str(tmp_path), "--set", f"actor.cpus={half}"]

    def scale(count: int, *options: str) -> str:
        result = tandem("scale", str(count), "--runs", str(tmp_path), *options)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    with Command([*arguments, "--set", "actor.fake_token_s=0.02"], tmp_path / "log") as command:
        command.until(reached(run, 2), "step 2", 120)
        said = scale(2, "--wait")
        assert "cli: 1 -> 2 actors" in said
        assert "actor-1 serving on 127.0.0.1" in said
        said = scale(3)
        assert "actor-2 pending: it needs" in said
        assert members(run)["actor-2"] == "pending"
        pending = f"actor-2 is pending: it needs {half:g} CPU"
        command.until(lambda: pending in command.output(), pending, 30)
        scale(0, "--wait")
        command.until(lambda: "no actor is wanted" in status(run).get("waiting_for", ""), "a learner that waits", 30)
        assert members(run) == {}
        at = status(run)["step"]
        assert "actor-0 serving on 127.0.0.1" in scale(1, "--wait")
        command.until(reached(run, at + 5), "further steps", 60)
        command.process.send_signal(signal.SIGINT)
        assert command.wait(60) == 3
        assert command.left_running() == []
    steps = read_json(run.summary)["steps"]
    assert_in_order(run, steps)
    tickets = read_json(run.summary)["tickets"]
    assert (tickets["trained"], tickets["failed"], tickets["dropped"]) == (2 * steps, 0, 0)
    assert_refused(tandem("scale", "2", "--runs", str(tmp_path)), "are running, expected one or a name")
