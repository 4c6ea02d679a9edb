"""The learner of `benchmarks/scale.py`: hub, dispatcher and journal as in a run, a consumer in the training's place.

The consumer takes every batch, publishes a version of a kilobyte and commits, all in no time. What is measured are the
counters of `Learner.sample`: CPU seconds are the kernel's, thread by thread. With telemetry the learner samples itself
once a second and answers Prometheus, as every run does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from benchmarks.scale_groups import GROUP_SIZE, MAX_TOKENS, PROMPT, VOCABULARY
from learner.intake.dispatcher import Dispatcher
from learner.intake.journal import Journal
from learner.intake.server import IntakeServer
from learner.intake.source import Interrupted, Source
from learner.telemetry.telemetry import Telemetry
from protocol.config import load_recipe
from protocol.hub import Hub
from protocol.keys import load_learner_keys, make_keys
from protocol.messages import Sampling, Ticket, TicketId, Welcome
from protocol.rundir import RunDir, read_json
from protocol.sections import WireConfig
from protocol.weights import layout, make_snapshot

SLOTS = 8
"""Tickets that an actor works on at once: 64 completions, `actor.max_running`'s default, in groups of 8."""
LEAST_GROUPS_PER_STEP, MAX_LAG = 512, 4
"""So that tickets wait neither for a batch nor for a version."""
TAKE_TIMEOUT_S = 120.0
VERSION_BYTES = 1_024
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.toml"
"""For the settings of its telemetry."""


class Learner:
    """Context manager: the intake of a run without a model, and a thread that takes its batches."""

    def __init__(
        self,
        directory: Path,
        actors: int,
        keys: bool,
        fsync: bool,
        heartbeat_s: float = 1.0,
        telemetry: bool = True,
    ) -> None:
        self.keys = directory / "keys" / "actor.json" if keys else None
        if keys:
            make_keys(directory / "keys")
        self._hub = Hub("127.0.0.1", 0, keys=load_learner_keys(directory / "keys") if keys else None)
        self.endpoint = self._hub.work_endpoint
        self.journal = Journal(directory / "groups.journal", fsync)
        wire = WireConfig(heartbeat_s=heartbeat_s)
        welcome = Welcome(
            run=f"scale-{os.getpid()}", model="none", dtype="bfloat16", max_model_len=2_048,
            bulk=self._hub.bulk_endpoint, news=self._hub.news_endpoint, heartbeat_s=heartbeat_s,
            dead_after_s=wire.dead_after_s, seed=0, group_size=GROUP_SIZE,
        )  # fmt: skip
        dispatcher = Dispatcher(
            make_ticket, groups_per_step=max(LEAST_GROUPS_PER_STEP, actors * SLOTS), max_lag=MAX_LAG, steps=1_000_000,
            max_attempts=5,
        )  # fmt: skip
        self.server = IntakeServer(self._hub, dispatcher, self.journal, welcome, wire, 120.0, VOCABULARY)
        self._stopping = threading.Event()
        self.source = Source(self.server, lambda what, waited: None, self._stopping.is_set)
        self._version = 0
        self._run = RunDir(directory / "run").create()
        self._telemetry = self._watching() if telemetry else None
        self._training = threading.Thread(target=self._train, name="consumer")

    def _watching(self) -> Telemetry:
        """The telemetry of a run, which looks at the hub and at two figures of the publisher."""
        telemetry = Telemetry(load_recipe(RECIPE), self._run, lambda: self.server.dispatcher.step, lambda: "training")
        self._published = SimpleNamespace(published=0, bytes_dense=VERSION_BYTES)
        watched: Any = SimpleNamespace(server=self.server, source=self.source, publisher=self._published)
        telemetry.actors(watched)
        return telemetry

    @property
    def metrics(self) -> str:
        """HOST:PORT where Prometheus is answered; "": nowhere."""
        return str(read_json(self._run.scrape_targets)[0]["targets"][0]) if self._telemetry else ""

    def __enter__(self) -> Learner:
        if self._telemetry:
            self._telemetry.__enter__()
        self.server.start()
        self._publish(0)
        self._training.start()
        return self

    def _publish(self, step: int) -> None:
        """The next version: a number to the dispatcher, a kilobyte to the actors."""
        self._version += 1
        if self._telemetry:
            self._published.published = self._version
        self.server.reserved(step, self._version)
        data = memoryview(self._version.to_bytes(8, "little") * (VERSION_BYTES // 8))
        self.server.offer(make_snapshot(self._version, step, layout([("weights", "uint8", (VERSION_BYTES,))]), data))

    def _train(self) -> None:
        """Steps that take no time."""
        with contextlib.suppress(Interrupted):
            while True:
                self.source.take(TAKE_TIMEOUT_S)
                step = self.server.dispatcher.step + 1
                self._publish(step)
                self.source.commit(step, self._version)

    def accepted(self) -> tuple[int, int]:
        """(groups, completion tokens) journaled so far."""
        with self.server.lock:
            counts = self.server.dispatcher.counts()
            groups = sum(counts[state] for state in ("trained", "in_training", "queued"))
            return groups, self.server.rollout_tokens

    def sample(self) -> dict[str, Any]:
        """Counters of this moment: what was accepted, CPU seconds by thread, memory."""
        groups, tokens = self.accepted()
        names = {self.server.native_id: "intake", self._training.native_id: "consumer"}
        cpu = {"intake": 0.0, "consumer": 0.0, "zmq": 0.0}
        intake_waited = 0.0
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                name = names.get(int(task.name)) or ("zmq" if "ZMQ" in (task / "comm").read_text() else "other")
                ran, waited, _ = map(int, (task / "schedstat").read_text().split())
                if name in cpu:
                    cpu[name] += ran / 1e9
                intake_waited += waited / 1e9 if name == "intake" else 0.0
        cpu["other"] = time.process_time() - sum(cpu.values())  # every scrape is a thread that has ended
        return {
            "at": time.perf_counter(), "groups": groups, "tokens": tokens, "cpu_s": cpu, "waited_s": intake_waited,
            "rss": psutil.Process().memory_info().rss, "journal": self.journal.end,
            "faults": dict(self._hub.faults.counts), "versions": self._version,
            "reissued": self.server.dispatcher.reissued,
            "crash": repr(self.server.crash or ""),
        }  # fmt: skip

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._training.join(TAKE_TIMEOUT_S)
        if self._telemetry:
            self._telemetry.__exit__(None)
        self.server.stop()
        self.journal.close()


def make_ticket(ticket_id: TicketId) -> Ticket:
    return Ticket(
        id=ticket_id, kind="train", attempt=1, prompt_ids=PROMPT, answer="7", grader="integer", group_size=GROUP_SIZE,
        sampling=Sampling(max_tokens=MAX_TOKENS), seed=ticket_id.index, min_version=1,
    )  # fmt: skip


def learn(directory: str, actors: int, keys: bool, fsync: bool, telemetry: bool, cpu: int | None, pipe: Any) -> None:
    """The learner's process: answers "sample", begins to issue tickets on "train", ends on "end"."""
    os.setsid()  # Linux schedules sessions as groups: one with 512 actors' threads leaves little to a learner in it
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    logging.basicConfig(level=logging.ERROR)  # faults are counted and looked at
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # as `python -m learner` does
    before = psutil.Process().memory_info().rss
    with Learner(Path(directory), actors, keys, fsync, telemetry=telemetry) as learner:
        pipe.send((learner.endpoint, str(learner.keys) if learner.keys else None, learner.metrics, before))
        while (what := pipe.recv()) != "end":
            if what == "train":
                learner.source.resume_training()
            pipe.send(learner.sample())
