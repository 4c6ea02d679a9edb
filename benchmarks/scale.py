"""What one hub takes in: groups and completion tokens a second of 1 to 512 simulated actors, its CPU, acks and memory.

python -m benchmarks.scale [--actors 1,8,64,512] [--ways curve,plain,fsync] [--tokens-per-s 2500]

The learner's process is a real one but for the training: hub, dispatcher and journal in their thread
(`IntakeServer`), real sockets, a consumer that takes every batch, publishes a version and commits, all in no time. The
actors are those of `scale_actors.py`: the real protocol over real links, groups of 8 completions of 256 tokens on
average (log-normal) that are prepared beforehand, with 4 characters of text a token and a prompt of 200 tokens. With
two cores or more the learner has the first one for all of its threads and the actors have the second, so that the
senders burn none of its CPU; but on loopback the kernel does a part of receiving in the sender's name.

For each number of actors, one after the other: nothing to do but heartbeats (`idle`), groups at the pace of engines of
`--tokens-per-s` each (`paced`), every ticket answered at once (`saturating`). `capacity` is groups for a CPU second of
the learner's whole process: what one core can take in, whether or not the senders can fill it. A group counts when it
is journaled; how long its acknowledgement takes is measured by the actor that sent it, so it includes the queue.
Medians over windows, with quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.run import machine
from benchmarks.scale_actors import GROUP_SIZE, MAX_TOKENS, PROMPT, VOCABULARY, act
from learner.intake.dispatcher import Dispatcher
from learner.intake.journal import Journal
from learner.intake.server import IntakeServer
from learner.intake.source import Interrupted, Source
from protocol.hub import Hub
from protocol.keys import load_learner_keys, make_keys
from protocol.messages import Sampling, Ticket, TicketId, Welcome
from protocol.sections import WireConfig
from protocol.weights import layout, make_snapshot

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = ("curve", "plain", "fsync")
"""curve: as every run is. plain: without keys. fsync: with keys, and a journal that survives the machine."""
SLOTS = 8
"""Tickets that an actor works on at once: 64 completions, `actor.max_running`'s default, in groups of 8."""
LEAST_GROUPS_PER_STEP, MAX_LAG = 512, 4
PER_PROCESS = 128
WINDOWS = {"idle": 1, "paced": 3, "saturating": 7}
TIMEOUT_S = 120.0


class Learner:
    """Context manager: the intake of a run without a model, and a thread that takes its batches."""

    def __init__(self, directory: Path, actors: int, keys: bool, fsync: bool, heartbeat_s: float = 1.0) -> None:
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
        self._training = threading.Thread(target=self._train, name="consumer")

    def __enter__(self) -> Learner:
        self.server.start()
        self._publish(0)
        self._training.start()
        return self

    def _publish(self, step: int) -> None:
        """The next version: a number to the dispatcher, a kilobyte to the actors."""
        self._version += 1
        self.server.reserved(step, self._version)
        data = memoryview(self._version.to_bytes(8, "little") * 128)
        self.server.offer(make_snapshot(self._version, step, layout([("weights", "uint8", (1_024,))]), data))

    def _train(self) -> None:
        """Steps that take no time."""
        with contextlib.suppress(Interrupted):
            while True:
                self.source.take(TIMEOUT_S)
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
        cpu = {"intake": 0.0, "consumer": 0.0, "zmq": 0.0, "other": 0.0}
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                name = names.get(int(task.name)) or ("zmq" if "ZMQ" in (task / "comm").read_text() else "other")
                cpu[name] += int((task / "schedstat").read_text().split()[0]) / 1e9
        return {
            "at": time.perf_counter(), "groups": groups, "tokens": tokens, "cpu_s": cpu,
            "rss": psutil.Process().memory_info().rss, "journal": self.journal.end,
            "faults": dict(self._hub.faults.counts), "versions": self._version,
            "crash": repr(self.server.crash or ""),
        }  # fmt: skip

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._training.join(TIMEOUT_S)
        self.server.stop()
        self.journal.close()


def make_ticket(ticket_id: TicketId) -> Ticket:
    return Ticket(
        id=ticket_id, kind="train", attempt=1, prompt_ids=PROMPT, answer="7", grader="integer", group_size=GROUP_SIZE,
        sampling=Sampling(max_tokens=MAX_TOKENS), seed=ticket_id.index, min_version=1,
    )  # fmt: skip


def _learn(directory: str, actors: int, keys: bool, fsync: bool, cpu: int | None, pipe: Any) -> None:
    """The learner's process: answers "sample", begins to issue tickets on "train", ends on "end"."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    logging.basicConfig(level=logging.ERROR)  # faults are counted and looked at
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # as `python -m learner` does
    before = psutil.Process().memory_info().rss
    with Learner(Path(directory), actors, keys, fsync) as learner:
        pipe.send((learner.endpoint, str(learner.keys) if learner.keys else None, before))
        while (what := pipe.recv()) != "end":
            if what == "train":
                learner.source.resume_training()
            pipe.send(learner.sample())


@contextlib.contextmanager
def _process(target: Any, *arguments: Any) -> Iterator[Any]:
    """A process that is told to end when it is left; yields the pipe to it."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=target, args=(*arguments, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        yield pipe
    finally:
        with contextlib.suppress(OSError):
            pipe.send("end")
        child.join(TIMEOUT_S)


def _heard(pipe: Any, what: str) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"waited {TIMEOUT_S:g} s for {what}")
    return pipe.recv()


def measure(actors: int, way: str, tokens_per_s: float, window_s: float, directory: Path) -> dict[str, Any]:
    """All modes for a number of actors."""
    cpus = sorted(os.sched_getaffinity(0))
    first, second = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    names = [f"actor-{i}" for i in range(actors)]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix="scale-")))
        learner = stack.enter_context(_process(_learn, str(directory), actors, way != "plain", way == "fsync", first))
        endpoint, keys, rss_before = _heard(learner, "the learner")
        learner.send("sample")
        rss_alone = _heard(learner, "the learner")["rss"]
        swarms = []
        for start in range(0, actors, PER_PROCESS):
            arguments = names[start : start + PER_PROCESS], endpoint, keys and Path(keys), SLOTS, tokens_per_s, 1.0
            swarms.append(stack.enter_context(_process(act, arguments, second)))
        deadline = time.monotonic() + TIMEOUT_S
        while sum(serving for serving, *_ in _collect(swarms)) < actors:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all of {actors} actors serve a version")
            time.sleep(0.2)
        found: dict[str, list[dict[str, Any]]] = {}
        for mode, windows in WINDOWS.items():
            if mode != "idle":
                for swarm in swarms:
                    swarm.send(mode)  # they begin as paced
                learner.send("train")
                _heard(learner, "the learner")
            time.sleep(window_s)  # until it goes evenly
            found[mode] = [_window(learner, swarms, window_s) for _ in range(windows)]
    return {"actors": actors, "way": way, "rss_mb_before": rss_before / 1e6, "rss_mb_alone": rss_alone / 1e6} | {
        mode: _summary(rows) for mode, rows in found.items()
    }


def _collect(swarms: list[Any]) -> list[Any]:
    for swarm in swarms:
        swarm.send("collect")
    return [_heard(swarm, "simulated actors") for swarm in swarms]


def _window(learner: Any, swarms: list[Any], seconds: float) -> dict[str, Any]:
    """Figures of one window."""
    acted = sum(cpu for *_, cpu in _collect(swarms))
    learner.send("sample")
    before = _heard(learner, "the learner")
    time.sleep(seconds)
    learner.send("sample")
    after = _heard(learner, "the learner")
    told = _collect(swarms)
    assert after["crash"] == repr(""), f"the intake died: {after['crash']}"
    assert not after["faults"], f"frames were refused: {after['faults']}"
    wall, groups = after["at"] - before["at"], after["groups"] - before["groups"]
    cpu = {name: after["cpu_s"][name] - before["cpu_s"][name] for name in after["cpu_s"]}
    latencies = np.array([latency for _, tally, *_ in told for latency in tally["latencies_s"]] or [np.nan])
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "groups_per_s": groups / wall,
        "tokens_per_s": (after["tokens"] - before["tokens"]) / wall,
        "capacity": groups / sum(cpu.values()),
        "cpu_share": sum(cpu.values()) / wall,
        **{f"{name}_cpu_share": spent / wall for name, spent in cpu.items()},
        "actors_cpu_share": (sum(spent for *_, spent in told) - acted) / wall,
        "ack_p50_ms": 1e3 * p50,
        "ack_p99_ms": 1e3 * p99,
        "rss_mb": after["rss"] / 1e6,
        "actors_rss_mb": sum(rss for _, _, rss, _ in told) / 1e6,
        "journal_mb_per_s": (after["journal"] - before["journal"]) / wall / 1e6,
        "versions_per_s": (after["versions"] - before["versions"]) / wall,
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure -> [lower quartile, median, upper quartile] over windows."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: statistics.quantiles(values, n=4) if len(values) > 1 else values * 3 for name, values in columns.items()
    }


def idle_costs(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Way -> what each further idle actor costs the learner: the slope between the fewest and the most actors."""
    costs = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        of_way = [row for row in rows if row["way"] == way]
        some, most = (find(of_way, key=lambda row: row["actors"]) for find in (min, max))
        if most["actors"] > some["actors"]:
            more = most["actors"] - some["actors"]
            costs[way] = {
                "cpu_percent": 100 * (most["idle"]["cpu_share"][1] - some["idle"]["cpu_share"][1]) / more,
                "rss_kb": 1e3 * (most["idle"]["rss_mb"][1] - some["idle"]["rss_mb"][1]) / more,
            }
    return costs


def print_rows(console: Console, rows: list[dict[str, Any]], tokens_per_s: float) -> None:
    for mode, title in (
        ("saturating", "every ticket answered at once"),
        ("paced", f"engines of {tokens_per_s:g} tokens/s"),
        ("idle", "heartbeats alone"),
    ):
        table = Table(title=f"{title}; medians (quartiles)")
        columns = {
            "groups/s": ("groups_per_s", ".0f"), "tokens/s": ("tokens_per_s", ".0f"),
            "groups per CPU s": ("capacity", ".0f"), "CPU": ("cpu_share", ".3f"), "intake": ("intake_cpu_share", ".3f"),
            "zmq": ("zmq_cpu_share", ".3f"), "actors' CPU": ("actors_cpu_share", ".2f"),
            "ack p50 ms": ("ack_p50_ms", ".2f"), "p99": ("ack_p99_ms", ".2f"), "RSS MB": ("rss_mb", ".0f"),
        }  # fmt: skip
        if mode == "idle":
            columns = {name: column for name, column in columns.items() if "s/s" not in name and "ack" not in name}
            del columns["p99"], columns["groups per CPU s"]
        for name in ("actors", "way", *columns):
            table.add_column(name, justify="right")
        for row in rows:
            cells = [_cell(row[mode][key], form) for key, form in columns.values()]
            table.add_row(str(row["actors"]), row["way"], *cells)
        console.print(table)
    for way, cost in idle_costs(rows).items():
        cpu, rss = cost["cpu_percent"], cost["rss_kb"]
        console.print(f"each further idle actor ({way}): {cpu:.4f} % of a core, {rss:.0f} kB")


def _cell(quartiles: list[float], form: str) -> str:
    low, median, high = (format(value, form) for value in quartiles)
    return median if low == high else f"{median} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", default="1,8,64,512")
    parser.add_argument("--ways", default=",".join(WAYS), help="of curve, plain, fsync")
    parser.add_argument("--tokens-per-s", type=float, default=2_500.0, help="of each actor's engine, where paced")
    parser.add_argument("--window-s", type=float, default=2.0)
    parser.add_argument("--directory", type=Path, help="where the journal is written; default: as temporary files")
    parser.add_argument("--no-file", action="store_true", help="store no result")
    options = parser.parse_args()
    if unknown := set(options.ways.split(",")) - set(WAYS):
        parser.error(f"--ways: found {', '.join(sorted(unknown))}, allowed: {', '.join(WAYS)}")
    console = Console(width=None if sys.stdout.isatty() else 190)
    rows = []
    for way in options.ways.split(","):
        for actors in map(int, options.actors.split(",")):
            rows.append(measure(actors, way, options.tokens_per_s, options.window_s, options.directory))
            console.print(
                f"{way}, {actors} actors: {rows[-1]['saturating']['groups_per_s'][1]:.0f} groups/s, "
                f"{rows[-1]['saturating']['capacity'][1]:.0f} for a CPU second"
            )
    print_rows(console, rows, options.tokens_per_s)
    if options.no_file:
        return
    described = machine() | {"command": " ".join(["python -m benchmarks.scale", *sys.argv[1:]])}
    path = RESULTS / f"{described['date']}-{described['commit'] or 'uncommitted'}-scale.json"
    stored = {"machine": described, "tokens_per_s": options.tokens_per_s, "rows": rows, "idle": idle_costs(rows)}
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
