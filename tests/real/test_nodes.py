"""A run over several "machines": namespaces of this one, with addresses, process trees, shared memory and run directory
of their own, real Rays with a token between them, and a firewall that admits the table of ports alone.

The learner is on one node, actors (fake engine) on others; a node is killed, another is added, the run is scaled from a
node that has no run directory, and a run is submitted as a Ray job.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.ports import TANDEM_PORT, in_cluster, ray_start_flags
from learner.intake.journal import read_steps
from protocol.rundir import RunDir, read_json
from protocol.scaling import Member, read_members
from tests.node_harness import NETWORK, entering, files_of, firewall, listening, missing, networks, on_node
from tests.run_harness import TANDEM
from tests.test_cli import RECIPE
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(580)]

RAY = str(Path(sys.executable).with_name("ray"))
HEAD = f"{NETWORK}.1:6379"


class Cluster:
    """A head with the learner's CPUs and none for actors, and workers with room for one actor each."""

    def __init__(self, directory: Path, names: list[str], stack: contextlib.ExitStack) -> None:
        self.directory, self.names, self.stack = directory, names, stack
        self.private = Path(f"/tmp/td-{os.getpid()}")
        token = directory / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = kept | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(self.private),
            "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": str(self.private),
        }  # fmt: skip
        self.nodes: dict[int, subprocess.Popen[str]] = {}

    def add(self, number: int) -> None:
        """Start node `number`, which counts from 1: the head."""
        role = ["--head", "--num-cpus=0"] if number == 1 else [f"--address={HEAD}", "--num-cpus=1"]
        flags = [*ray_start_flags("head" if number == 1 else "worker"), "--object-store-memory=100000000"]
        command = [RAY, "start", "--block", *role, f"--node-ip-address={NETWORK}.{number}", *flags]
        log = self.directory / f"node-{number}.log"
        self.nodes[number] = self.stack.enter_context(
            on_node(self.names[number - 1], self.private, command, self.environment, log)
        )
        self.until(lambda: "Ray runtime started" in log.read_text(), f"Ray on node {number}", 90)

    def kill(self, number: int) -> None:
        """All processes of a node at once, as when its power fails."""
        node = self.nodes.pop(number)
        node.kill()
        node.wait(30)

    def command(self, number: int, arguments: list[str], log: Path) -> subprocess.Popen[str]:
        """Start a command on a node; it is ended with the cluster."""
        with log.open("a") as output:
            process = subprocess.Popen(
                entering(self.nodes[number], arguments), env=self.environment, cwd=self.directory, text=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.stack.callback(process.wait, 60)
        self.stack.callback(process.kill)
        return process

    def run(self, number: int, arguments: list[str]) -> str:
        """Output of a command on a node, which must succeed."""
        done = subprocess.run(
            entering(self.nodes[number], arguments), env=self.environment, cwd=self.directory, text=True,
            capture_output=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            logs = "".join(f"\n--- {log.name}\n{log.read_text()[-3000:]}" for log in self.directory.glob("*.log"))
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s{logs}"
            time.sleep(0.2)
        return value

    def run_directory(self, name: str) -> RunDir:
        """A run on the head's own disk, seen from outside."""
        return RunDir(files_of(self.nodes[1], self.private / "runs" / name))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    ports = ", ".join(port.numbers for port in in_cluster())
    with networks(4, firewall(ports)) as names, contextlib.ExitStack() as stack:
        found = Cluster(tmp_path, names, stack)
        try:
            for number in (1, 2, 3):
                found.add(number)
            home = files_of(found.nodes[1], found.private)
            make_tiny_model(home / "tiny")  # the model is on the head only
            (home / "recipe.toml").write_text(RECIPE.replace("MODEL", str(found.private / "tiny")))
            yield found
        finally:
            stack.close()
            with contextlib.suppress(OSError):
                found.private.rmdir()


def members(run: RunDir) -> dict[str, Member]:
    return {member.name: member for member in read_members(run)}


def assert_all_trained_in_order(run: RunDir, steps: int) -> None:
    last = {step["step"]: [index for _, index in step["ids"]] for step in read_steps(run.journal)}
    assert [index for step in sorted(last) for index in last[step]] == list(range(2 * steps))
    tickets = read_json(run.summary)["tickets"]
    assert tickets["trained"] == tickets["issued"] == 2 * steps
    assert (tickets["failed"], tickets["dropped"]) == (0, 0)


def test_run_on_nodes_that_come_and_go(cluster: Cluster, tmp_path: Path) -> None:
    run, steps = cluster.run_directory("cli"), 600
    train = [*TANDEM, "train", str(cluster.private / "recipe.toml"), "--runs", str(cluster.private / "runs")]
    settings = {"actor.count": 2, "actor.fake_token_s": 0.02, "steps": steps, "wire.port": TANDEM_PORT}
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    process = cluster.command(1, [*train, *given, "--ray-address", HEAD], tmp_path / "train.log")

    def until(condition: Callable[[], Any], what: str, timeout_s: float = 90.0) -> Any:
        return cluster.until(lambda: condition() or process.poll() is not None, what, timeout_s)

    def serving(*nodes: int) -> Callable[[], bool]:
        wanted = sorted(f"{NETWORK}.{number}" for number in nodes)
        return lambda: sorted(member.node for member in members(run).values() if member.serves) == wanted

    def step() -> int:
        return int((read_json(run.status) or {}).get("step", 0))

    until(serving(2, 3), "actors on both workers", 150)
    until(lambda: step() >= 5, "steps")
    endpoint = read_json(run.endpoint)
    assert endpoint == {"work": f"tcp://{NETWORK}.1:{TANDEM_PORT}", "keys": True}
    wire = {(f"{NETWORK}.1", TANDEM_PORT + number) for number in range(3)}
    assert wire <= listening(cluster.names[0])

    # from a node that sees no run directory
    scale = [*TANDEM, "scale", "--ray-address", HEAD, "--wait", "--timeout", "120"]
    assert "cli: 2 -> 1 actors" in cluster.run(3, [*scale, "1", "cli"])
    (left,) = members(run).values()
    assert f"actor-0 serving on {left.node}" in cluster.run(2, [*scale, "1"])
    cluster.run(3, [*scale, "2"])
    assert serving(2, 3)()

    # a node loses its power; another one is added
    before = step()
    cluster.kill(2)
    until(lambda: any(member.state == "pending" for member in members(run).values()), "an actor without room")
    until(lambda: step() >= before + 5, "steps with the other actor")
    cluster.add(4)
    until(serving(3, 4), "an actor on the new node", 150)
    before = step()
    until(lambda: step() >= before + 5, "steps with both")
    cluster.until(lambda: process.poll() is not None, "the end of the run", 200)
    assert process.wait(10) == 0, (tmp_path / "train.log").read_text()
    assert_all_trained_in_order(run, steps)
    assert "secret" not in json.dumps(read_json(run.summary))


def test_run_as_a_ray_job(cluster: Cluster) -> None:
    train = [*TANDEM, "train", str(cluster.private / "recipe.toml"), "--runs", str(cluster.private / "runs")]
    settings = ["--set", "steps=10", "--set", "actor.count=2", "--set", f"wire.port={TANDEM_PORT}"]
    submit = [RAY, "job", "submit", "--address", "http://127.0.0.1:8265", "--entrypoint-num-cpus", "0", "--"]
    cluster.run(1, [*submit, *train, *settings])
    run = cluster.run_directory("cli")
    assert_all_trained_in_order(run, 10)
    assert read_json(run.summary)["actors"]["max"] == 2
