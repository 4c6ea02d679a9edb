"""Actors as processes of their own, killed in mid-run: the run completes, every ticket is trained exactly once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.launch import remove_left_over
from learner.intake.journal import read_groups
from protocol.rundir import RunDir
from tests.actor_harness import DEADLINE_S, indices, train, until
from tests.intake_harness import Intake

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def run_name(tmp_path: Path) -> Iterator[str]:
    """Label of a run that no other test has; nothing of it is left in shared memory, whatever the test did."""
    run = RunDir(tmp_path / "run").create()
    yield run.label
    remove_left_over(run)


class Actors:
    """Context manager: `python -m actor` processes by name; all that it started have ended when it is left."""

    def __init__(self, learner: str, directory: Path) -> None:
        self.learner, self.directory = learner, directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.workers: set[psutil.Process] = set()
        """Grading processes that were seen below an actor."""

    def start(self, name: str) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{name}.log", "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "actor", self.learner, "--name", name, "--lost-learner-s", "60"],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def note_workers(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                self.workers |= set(psutil.Process(process.pid).children(recursive=True))

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait(DEADLINE_S)

    def workers_are_gone(self) -> bool:
        return not [w for w in self.workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]


def serving(intake: Intake, *names: str) -> Callable[[], bool]:
    def condition() -> bool:
        with intake.server.lock:
            return set(names) <= {peer.name for peer in intake.server.peers.values() if peer.version}

    return condition


def staged(run: str) -> list[str]:
    """Directories with weights of a run."""
    return sorted(path.name for path in SHARED_MEMORY.glob(f"tandem-{run}-*"))


@pytest.mark.parametrize("seed", [0, 1])
def test_run_completes_exactly_once_though_actors_are_killed_at_random(
    tmp_path: Path, run_name: str, seed: int
) -> None:
    """One actor is killed three times, at moments drawn from the seed, while training goes on; another joins."""
    chance = random.Random(seed)
    steps, groups_per_step = 12, 4
    with (
        Intake(
            tmp_path, steps=steps, groups_per_step=groups_per_step, token_s=0.01, dead_after_s=1.0, run=run_name
        ) as intake,
        Actors(intake.address, tmp_path) as actors,
    ):
        victim = actors.start("actor-0")
        intake.publish(0)
        until(serving(intake, "actor-0"), "the first actor")
        batches: list = []
        trained = threading.Thread(target=lambda: batches.extend(train(intake, steps)), daemon=True)
        trained.start()
        for kill in range(3):
            until(lambda: intake.dispatcher.leases_of("actor-0") or not trained.is_alive(), "work to disturb")
            time.sleep(chance.uniform(0, 0.15))  # the point of this test: any moment will do
            actors.note_workers()
            victim.kill()
            victim.wait(DEADLINE_S)
            victim = actors.start("actor-0")
            if kill == 0:
                actors.start("actor-1")
            restarts = kill + 1
            until(lambda n=restarts: intake.server.totals.restarted == n, "the restarted actor")
        assert staged(run_name) == [f"tandem-{run_name}-weights"]
        trained.join(2 * DEADLINE_S)
        assert not trained.is_alive(), intake.dispatcher.counts()
        assert indices(batches) == list(range(steps * groups_per_step))
        counts = intake.dispatcher.counts()
        assert counts["issued"] == counts["trained"] == steps * groups_per_step
        assert counts["failed"] == 0
        journaled = [group.id.index for group in read_groups(tmp_path / "groups.journal")]
        assert sorted(journaled) == list(range(steps * groups_per_step))
        intake.server.drain("done")
        for process in actors.processes.values():
            assert process.wait(DEADLINE_S) == 0
        until(actors.workers_are_gone, "grading processes of killed actors to end")
        assert len(actors.workers) >= 3
    assert staged(run_name) == [], "the last one to leave takes it along, whoever was killed before"


def test_restarted_actor_finds_the_weights_of_the_killed_one_and_goes_on_by_delta(
    tmp_path: Path, run_name: str
) -> None:
    with Intake(tmp_path, dead_after_s=600, run=run_name) as intake, Actors(intake.address, tmp_path) as actors:
        killed = actors.start("actor-0")
        intake.publish(0)
        until(serving(intake, "actor-0"), "the actor")
        killed.kill()
        killed.wait(DEADLINE_S)
        assert staged(run_name) == [f"tandem-{run_name}-weights"], "nobody was left to remove it"
        sent = intake.hub.bytes_sent
        process = actors.start("actor-0")
        until(lambda: "serves version 1: found" in actors.log("actor-0"), "the actor's successor")
        assert intake.hub.bytes_sent == sent
        intake.publish(1)
        until(lambda: "serves version 2: delta" in actors.log("actor-0"), "the second version")
        intake.server.drain("done")
        assert process.wait(DEADLINE_S) == 0
    assert staged(run_name) == []


def test_sigterm_makes_an_actor_leave_in_good_order(tmp_path: Path, run_name: str) -> None:
    with (
        Intake(tmp_path, token_s=0.5, dead_after_s=600, run=run_name) as intake,
        Actors(intake.address, tmp_path) as actors,
    ):
        process = actors.start("actor-0")
        intake.publish(0)
        until(serving(intake, "actor-0"), "the actor")
        intake.source.resume_training()
        until(lambda: intake.dispatcher.leases_of("actor-0"), "leases")
        actors.note_workers()
        assert actors.workers
        assert staged(run_name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 130
        until(lambda: not intake.server.peers, "the goodbye: silence would take 600 s")
        assert intake.dispatcher.holders() == {}
        assert intake.server.totals.failures == []
        assert staged(run_name) == []
        until(actors.workers_are_gone, "the grading process to end")
        assert "actor-0 leaves" in actors.log("actor-0")


def test_actor_finds_a_learner_that_writes_its_address_later_and_moves_with_it(tmp_path: Path, run_name: str) -> None:
    endpoint = tmp_path / "endpoint.json"
    with Actors(str(endpoint), tmp_path) as actors:
        process = actors.start("actor-0")
        state, offset, batches = {}, 0, []
        with Intake(tmp_path, heartbeat_s=0.1, dead_after_s=0.5, run=run_name) as first:
            endpoint.write_text(json.dumps({"work": first.address}))
            first.publish(0)
            batches += train(first, 2)
            with first.server.lock:
                state, offset = first.dispatcher.state(), first.source.replay_offset()
        second = Intake(tmp_path, heartbeat_s=0.1, dead_after_s=0.5, run=run_name)  # on another port
        second.version = first.version
        second.dispatcher.restore(state, read_groups(tmp_path / "groups.journal", offset), second.version + 1)
        endpoint.write_text(json.dumps({"work": second.address}))
        with second:
            second.publish(2)
            batches += train(second, 4)
            second.server.drain("done")
            assert process.wait(DEADLINE_S) == 0, actors.log("actor-0")
    assert indices(batches) == list(range(16))


def test_actor_that_knocks_at_an_old_address_finds_the_new_one(tmp_path: Path, run_name: str) -> None:
    """The file of a run that was stopped names a port where nobody listens; resumed, it writes another."""
    endpoint = tmp_path / "endpoint.json"
    endpoint.write_text(json.dumps({"work": "tcp://127.0.0.1:1"}))
    with Actors(str(endpoint), tmp_path) as actors:
        process = actors.start("actor-0")
        until(lambda: "looks for the learner at tcp://127.0.0.1:1" in actors.log("actor-0"), "the first knock")
        with Intake(tmp_path, run=run_name) as intake:
            endpoint.write_text(json.dumps({"work": intake.address}))
            intake.publish(0)
            assert indices(train(intake, 4)) == list(range(16))
            intake.server.drain("done")
            assert process.wait(DEADLINE_S) == 0, actors.log("actor-0")


@pytest.mark.parametrize(
    ("address", "message"),
    [("tcp://127.0.0.1:1", "no word from the learner"), ("tcp://127.0.0.1:x", "learner address: found")],
)
def test_actor_without_a_learner_ends_with_the_cause(address: str, message: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "actor", address, "--name", "actor-0", "--lost-learner-s", "0.5"],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert ended.returncode == 1
    assert f"actor-0 failed: {message}" in ended.stderr
    assert "Traceback" not in ended.stderr
