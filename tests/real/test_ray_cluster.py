"""A cluster that somebody else started: a run joins it with its token, works in it, and leaves it as it was."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.rundir import RunDir, read_json
from protocol.scaling import read_members
from tests.run_harness import TANDEM, Command, left_behind, status
from tests.test_cli import RECIPE
from tests.tiny_model import make_tiny_model

START_S = 60


@dataclass
class Cluster:
    address: str
    token: Path

    def environment(self, token: Path | None = None) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token or self.token)}


def make_token(path: Path) -> Path:
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`ray start --head`, with a token, on a port that Ray picks; ended by its own process id."""
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    token = make_token(directory / "token")
    ray = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--port=0",
        "--num-cpus=4",
        "--num-gpus=2",
    ]
    flags = ["--include-dashboard=false", "--object-store-memory=100000000", f"--temp-dir={directory}/ray"]
    environment = os.environ | Cluster("", token).environment() | {"RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [*ray, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:  # ends with the process, at the latest with the test's time limit
            lines.append(line)
            if found := re.search(r"ray start --address='([\d.:]+)'", line):
                yield Cluster(found[1], token)
                break
        else:
            pytest.fail("ray start said no address:\n" + "".join(lines))
    finally:
        process.terminate()
        process.wait(START_S)
        process.stdout.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("joined")
    path = directory / "recipe.toml"
    path.write_text(RECIPE.replace("MODEL", str(make_tiny_model(directory / "tiny"))))
    return path


@pytest.mark.timeout(300)
def test_two_runs_after_another_work_in_a_cluster_and_leave_it(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = RunDir(tmp_path / name)
        arguments = ["train", str(recipe), "--runs", str(tmp_path), "--name", name, "--set", "steps=6"]
        arguments += ["--ray-address", cluster.address]
        with Command(arguments, tmp_path / "log", **cluster.environment()) as command:
            assert command.wait(120) == 0, command.output()
            assert command.left_running() == []
            assert left_behind(run, command.process.pid) == []
        assert read_json(run.summary)["tickets"]["trained"] == 12
        assert "serves version" in (run.logs / "actor-0.log").read_text()


@pytest.mark.timeout(300)
def test_actors_that_never_fit_are_refused(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", str(recipe), "--runs", str(tmp_path / "runs"), "--ray-address", cluster.address]
    with Command([*arguments, "--set", "actor.count=5"], tmp_path / "log", **cluster.environment()) as command:
        assert command.wait(120) == 2
        assert "actor.count: found 5 actors of 1 CPU each; this Ray cluster has" in command.output()
        assert "allowed: actor.count of at most 4, or actor.wait_for_room = true" in command.output()
        assert command.left_running() == []
    assert not (tmp_path / "runs").exists(), "a refused recipe leaves no run directory"


@pytest.mark.timeout(300)
def test_learner_gets_gpus_of_its_own_in_the_cluster(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """The node only says that it has two GPUs: what is looked at is whom Ray gives them."""
    run = RunDir(tmp_path / "runs" / "cli")
    arguments = ["train", str(recipe), "--runs", str(tmp_path / "runs"), "--ray-address", cluster.address]
    arguments += ["--set", "actor.gpus=1", "--set", "actor.count=2", "--set", "actor.wait_for_room=true"]
    with Command(arguments, tmp_path / "log", **cluster.environment()) as command:
        command.until(lambda: status(run).get("step", 0) >= 2, "steps", 120)
        states = {"actor-0": "running", "actor-1": "pending"}  # one of the two GPUs is the learner's
        command.until(lambda: {member.name: member.state for member in read_members(run)} == states, str(states), 60)
        (learner,) = command.running("learner")
        assert learner.environ()["CUDA_VISIBLE_DEVICES"] in ("0", "1")
        command.process.send_signal(signal.SIGINT)
        assert command.wait(90) == 3, command.output()
    refused = subprocess.run(
        [*TANDEM, *arguments, "--set", "learner.processes=3"], env=os.environ | cluster.environment(), text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "learner.processes: found 3, allowed here: at most 2" in refused.stderr


@pytest.mark.timeout(300)
def test_cluster_with_another_token_is_refused(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", str(recipe), "--runs", str(tmp_path / "runs"), "--ray-address", cluster.address]
    wrong = cluster.environment(make_token(tmp_path / "token"))
    result = subprocess.run([*TANDEM, *arguments], env=os.environ | wrong, capture_output=True, text=True, timeout=200)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "--ray-address" in result.stderr
    assert "cannot be joined" in result.stderr
