"""What one hub takes in: groups and completion tokens a second of 1 to 512 simulated actors, its CPU, acks and memory.

python -m benchmarks.scale [--actors 1,8,64,512] [--ways curve,plain,fsync] [--tokens-per-s 2500]

The learner's process is a real one but for the training: hub, dispatcher and journal in their thread, real sockets
(`scale_learner.py`). It samples itself once a second and is scraped as often, unless `--no-telemetry`. The actors speak
the real protocol over real links (`scale_actors.py`); their groups, of 8 completions of 256 tokens on average, are
prepared beforehand (`scale_groups.py`), so that the senders are not what is measured. With two cores or more the
learner has the first one for all of its threads and the actors have the second, so that they burn none of its CPU; but
on loopback the kernel does a part of receiving in the sender's name.

For each number of actors, one after the other: nothing to do but heartbeats (`idle`), groups at the pace of engines of
`--tokens-per-s` each (`paced`), every ticket answered at once (`saturating`). `capacity` is groups for a CPU second of
the learner's whole process: what one core can take in, whether or not the senders can fill it. A group counts when it
is journaled; how long its acknowledgement takes is measured by the actor that sent it, so it includes the queue.
Medians over windows, with quartiles. `no core` is the share of the time in which the intake thread had work and no
core: what of it is not the learner's other threads' says how busy the machine was with something else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.run import machine
from benchmarks.scale_actors import act
from benchmarks.scale_learner import SLOTS, learn

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = ("curve", "plain", "fsync")
"""curve: as every run is. plain: without keys. fsync: with keys, and a journal that survives the machine."""
PER_PROCESS = 128
WINDOWS = {"idle": 3, "paced": 3, "saturating": 7}
TIMEOUT_S = 120.0
SCRAPE_EVERY_S = 1.0


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


@contextlib.contextmanager
def _scraping(place: str) -> Iterator[None]:
    """Within: a page of the learner's metrics is asked for every second, where there is one."""
    ending = threading.Event()

    def scrape() -> None:
        while not ending.wait(SCRAPE_EVERY_S):
            with urlopen(f"http://{place}/metrics", timeout=TIMEOUT_S) as page:
                page.read()

    with contextlib.ExitStack() as stack:
        if place:
            pool = stack.enter_context(ThreadPoolExecutor(1))
            stack.callback(pool.submit(scrape).result)
            stack.callback(ending.set)
        yield


def measure(
    actors: int, way: str, tokens_per_s: float, window_s: float, directory: Path | None, telemetry: bool
) -> dict[str, Any]:
    """All modes for a number of actors."""
    cpus = sorted(os.sched_getaffinity(0))
    first, second = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    names = [f"actor-{i}" for i in range(actors)]
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix="scale-"))
        learner = stack.enter_context(_process(learn, run, actors, way != "plain", way == "fsync", telemetry, first))
        endpoint, keys, metrics, rss_before = _heard(learner, "the learner")
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
        stack.enter_context(_scraping(metrics))
        found: dict[str, list[dict[str, Any]]] = {}
        for mode, windows in WINDOWS.items():
            if mode != "idle":
                for swarm in swarms:
                    swarm.send(mode)  # they begin as paced
                learner.send("train")
                _heard(learner, "the learner")
            time.sleep(window_s)  # until it goes evenly
            found[mode] = [_window(learner, swarms, window_s) for _ in range(windows)]
    described = {"actors": actors, "way": way, "telemetry": telemetry}
    memory = {"rss_mb_before": rss_before / 1e6, "rss_mb_alone": rss_alone / 1e6}
    return described | memory | {mode: _summary(rows) for mode, rows in found.items()}


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
    latencies = [1e3 * latency for _, tally, *_ in told for latency in tally["latencies_s"]]
    p50, p99 = np.percentile(latencies, [50, 99]).tolist() if latencies else (None, None)
    return {
        "groups_per_s": groups / wall,
        "tokens_per_s": (after["tokens"] - before["tokens"]) / wall,
        "capacity": groups / sum(cpu.values()),
        "cpu_share": sum(cpu.values()) / wall,
        **{f"{name}_cpu_share": spent / wall for name, spent in cpu.items()},
        "intake_waiting_share": (after["waited_s"] - before["waited_s"]) / wall,
        "actors_cpu_share": (sum(spent for *_, spent in told) - acted) / wall,
        "ack_p50_ms": p50,
        "ack_p99_ms": p99,
        "rss_mb": after["rss"] / 1e6,
        "actors_rss_mb": sum(rss for _, _, rss, _ in told) / 1e6,
        "journal_mb_per_s": (after["journal"] - before["journal"]) / wall / 1e6,
        "versions_per_s": (after["versions"] - before["versions"]) / wall,
        "reissued_per_s": (after["reissued"] - before["reissued"]) / wall,
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure -> [lower quartile, median, upper quartile] over the windows that have it."""
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {
        name: statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        for name, values in columns.items()
        if values
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
            "zmq": ("zmq_cpu_share", ".3f"), "no core": ("intake_waiting_share", ".2f"),
            "actors' CPU": ("actors_cpu_share", ".2f"), "ack p50 ms": ("ack_p50_ms", ".2f"),
            "p99": ("ack_p99_ms", ".2f"), "RSS MB": ("rss_mb", ".0f"),
        }  # fmt: skip
        if mode == "idle":
            columns = {name: column for name, column in columns.items() if "s/s" not in name and "ack" not in name}
            del columns["p99"], columns["groups per CPU s"]
        for name in ("actors", "way", *columns):
            table.add_column(name, justify="right")
        for row in rows:
            cells = [_cell(row[mode].get(key), form) for key, form in columns.values()]
            table.add_row(str(row["actors"]), row["way"], *cells)
        console.print(table)
    for way, cost in idle_costs(rows).items():
        cpu, rss = cost["cpu_percent"], cost["rss_kb"]
        console.print(f"each further idle actor ({way}): {cpu:.4f} % of a core, {rss:.0f} kB")


def _cell(quartiles: list[float] | None, form: str) -> str:
    if quartiles is None:
        return ""
    low, median, high = (format(value, form) for value in quartiles)
    return median if low == high else f"{median} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", default="1,8,64,512")
    parser.add_argument("--ways", default=",".join(WAYS), help="of curve, plain, fsync")
    parser.add_argument("--tokens-per-s", type=float, default=2_500.0, help="of each actor's engine, where paced")
    parser.add_argument("--window-s", type=float, default=2.0)
    parser.add_argument("--directory", type=Path, help="where the journal is written; default: as temporary files")
    parser.add_argument("--no-telemetry", action="store_true", help="without sampler and scrapes")
    parser.add_argument("--no-file", action="store_true", help="store no result")
    options = parser.parse_args()
    if unknown := set(options.ways.split(",")) - set(WAYS):
        parser.error(f"--ways: found {', '.join(sorted(unknown))}, allowed: {', '.join(WAYS)}")
    console = Console(width=None if sys.stdout.isatty() else 190)
    rows = []
    for way in options.ways.split(","):
        for actors in map(int, options.actors.split(",")):
            telemetry = not options.no_telemetry
            rows.append(measure(actors, way, options.tokens_per_s, options.window_s, options.directory, telemetry))
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
