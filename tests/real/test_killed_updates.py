"""Actors killed with SIGKILL in the middle of weight updates: they come back, serve the right version, lose no ticket.

Twenty times with the fake engine in real processes, and twice with vLLM under Ray.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from actor.slots import Held, Slots
from deploy.launch import remove_left_over
from protocol.messages import Group
from protocol.rundir import RunDir, read_json, read_jsonl
from protocol.weights import layout, make_snapshot
from tests.actor_harness import DEADLINE_S, indices, until
from tests.intake_harness import Intake, journal_of
from tests.run_harness import Command, left_behind
from tests.test_cli import RECIPE, assert_trained_once_each
from tests.test_processes import SHARED_MEMORY, Actors, serving
from tests.tiny_model import make_tiny_model

KILLS = 20
VLLM_STEPS = 40
"""Of a tenth of a second: enough that each engine confirms several versions before the run ends."""
LONGEST_UPDATE_S = 0.25
"""From a version's announcement to its confirmation, with time to spare."""
TENSORS, TENSOR_ELEMENTS = 16, 1 << 18


class Publishing(Intake):
    """An intake whose versions are 8 MB that change by half a percent, every fifth of them without a delta."""

    def __init__(self, directory: Path, **options: object) -> None:
        super().__init__(directory, **options)  # type: ignore[arg-type]
        self.server.welcome = msgspec.structs.replace(self.server.welcome, chunk_bytes=1 << 18)
        self._draw = np.random.default_rng(0)
        self._values = self._draw.integers(0, 1 << 16, TENSORS * TENSOR_ELEMENTS, dtype="<u2")
        self.digests: dict[int, str] = {}

    def publish(self, step: int) -> int:
        self.version += 1
        self._values = self._values.copy()
        self._values[self._draw.integers(0, len(self._values), len(self._values) // 200)] += 1
        specs = layout((f"t{i}", "bfloat16", (TENSOR_ELEMENTS,)) for i in range(TENSORS))
        self.server.reserved(step, self.version)
        last, self._last = self._last, make_snapshot(self.version, step, specs, self._values.view(np.uint8).data)
        self.digests[self.version] = self._last.manifest.digest
        delta = self._coder.encode(last, self._last) if last and self.version % 5 else None
        self.server.offer(self._last, delta)
        return self.version


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    run = RunDir(tmp_path / "run").create()
    yield run
    remove_left_over(run)


@pytest.mark.timeout(400)
def test_actor_killed_at_twenty_moments_of_updates_comes_back_right(tmp_path: Path, run: RunDir) -> None:
    chance = random.Random(7)
    batches: list[list[Group]] = []
    ending = threading.Event()
    with (
        Publishing(tmp_path, steps=100_000, token_s=0.005, dead_after_s=1.0, run=run.label) as intake,
        Actors(intake.address, tmp_path) as actors,
    ):
        victim = actors.start("actor-0")
        intake.publish(0)
        until(serving(intake, "actor-0"), "the actor")

        def train() -> None:
            """Until told to end: steps, each with a version of its own."""
            intake.source.resume_training()
            while not ending.is_set():
                batches.append(intake.source.take(2 * DEADLINE_S))
                intake.source.commit(len(batches), intake.publish(len(batches)))

        training = threading.Thread(target=train, daemon=True)
        training.start()
        for kill in range(1, KILLS + 1):
            version = intake.version
            until(lambda v=version: intake.version > v, "the next version")
            time.sleep(chance.uniform(0, LONGEST_UPDATE_S))  # the point of this test: any moment will do
            victim.kill()
            victim.wait(DEADLINE_S)
            victim = actors.start("actor-0")
            until(lambda n=kill: intake.server.totals.restarted == n, "the restarted actor")
            until(serving(intake, "actor-0"), "a version in service again")
        ending.set()
        training.join(2 * DEADLINE_S)
        assert not training.is_alive(), intake.dispatcher.counts()
        newest = intake.version

        def confirmed() -> bool:
            with intake.server.lock:
                return [peer.version for peer in intake.server.peers.values()] == [newest]

        until(confirmed, f"version {newest} to be confirmed")
        directory = SHARED_MEMORY / f"tandem-{run.label}-weights"
        _, held = Slots(directory).newest() or (0, Held(0, ""))
        assert held == Held(newest, intake.digests[newest]), "checked tensor by tensor before it is in the record"
        assert indices(batches) == list(range(4 * len(batches))), "in order, each once"
        trained = {index for batch in batches for index in (group.id.index for group in batch)}
        assert trained <= {group.id.index for group in journal_of(tmp_path)}
        assert intake.dispatcher.counts()["failed"] == 0
        found = actors.log("actor-0").count(": found, ") + actors.log("actor-0").count(": delta, ")
        assert found > KILLS, "a restarted actor finds the versions of the killed one"
        intake.server.drain("done")
        assert victim.wait(DEADLINE_S) == 0


@pytest.mark.real_engine
@pytest.mark.timeout(600)
def test_vllm_actor_killed_in_two_updates_comes_back_right(tmp_path: Path) -> None:
    """Under Ray, which starts it anew. The parity gate of the run compares what every engine computes."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("MODEL", str(make_tiny_model(tmp_path / "tiny"))))
    run = RunDir(tmp_path / "runs" / "cli")
    overrides = ['actor.engine="vllm"', "actor.kv_cache_gib=0.25", f"steps={VLLM_STEPS}", "checkpoint.every_steps=0"]
    overrides += ["weights.parity_every=1", "weights.parity_nats=0.001", "wire.dead_after_s=5"]
    arguments = ["train", str(recipe), "--runs", str(run.path.parent)]
    for override in overrides:
        arguments += ["--set", override]
    chance = random.Random(3)

    def state() -> dict:
        return read_json(run.status) or {}

    killed: set[int] = set()

    def at_work(step: int) -> int:
        """Process of the actor that draws for a step from `step` on, and was not killed; else 0."""
        found = state()
        pid = found.get("actors", {}).get("actor-0", 0)
        return pid if found.get("step", 0) >= step and pid not in killed else 0

    with Command(arguments, tmp_path / "log") as command:
        for step in (3, 8):
            victim = command.until(lambda s=step: at_work(s), f"step {step}", 200)
            time.sleep(chance.uniform(0, 0.5))  # the version of that step is on its way
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        assert command.wait(400) == 0, command.output()
        assert command.left_running() == []
        assert left_behind(run, command.process.pid) == []
    assert_trained_once_each(run, VLLM_STEPS)
    summary = read_json(run.summary)
    assert summary["actors"] == {"started": 1, "restarted": 2, "max": 1}
    assert summary["parity"]["checks"] >= 3, "each engine at least at its first version"
    assert summary["parity"]["worst_nats"] < 1e-4
    assert [row["step"] for row in read_jsonl(run.metrics)] == list(range(1, VLLM_STEPS + 1))
