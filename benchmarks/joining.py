"""What the other actors lose while one joins: completion tokens a second of two, before and during a join.

A real hub with keys, dispatcher and journal in this process; real actor loops in processes of their own, with an engine
that sleeps instead of computing. The joiner is a node of its own: it pulls a snapshot of 269 MB and checks it, beside
the work of the others. Its process is there before, since a start of Python costs the cores here what it would cost
those of another machine there. A round is a quiet window, then a join, from its hello to its confirmed version, then
the same time beside a process that only burns the CPU seconds that the joiner took: those it would not take from here
if it were on another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from learner.intake.dispatcher import Dispatcher
from learner.intake.journal import Journal
from learner.intake.server import IntakeServer
from learner.intake.source import Source
from protocol.hub import Hub
from protocol.keys import load_learner_keys, make_keys
from protocol.messages import Sampling, Ticket, TicketId, Welcome
from protocol.sections import WireConfig
from protocol.weights import layout, make_snapshot

ROUNDS = 8
OTHERS = 2
DENSE_BYTES = 269_000_000
GROUP_SIZE, MAX_TOKENS, TOKEN_S = 8, 64, 0.01
"""A completion takes 0.64 s whatever runs beside it; 64 of them run at once in each actor."""
GROUPS_PER_STEP, STEPS = 16, 1_000_000
QUIET_S = 3.0
TIMEOUT_S = 60.0


def measure() -> dict[str, Any]:
    """Tokens a second of the others, and seconds of a join; medians, and quartiles of during / before."""
    with tempfile.TemporaryDirectory() as directory, _learner(Path(directory)) as source:
        server = source.server
        context = multiprocessing.get_context("spawn")
        with _actors(context, Path(directory), [f"actor-{i}" for i in range(OTHERS)], own_node=False):
            _until(lambda: sum(peer.version > 0 for peer in server.peers.values()) == OTHERS, "the others")
            source.resume_training()
            training = threading.Thread(target=_train, args=(source,), daemon=True)
            training.start()
            before, during, burning, seconds, first = [], [], [], [], []
            for number in range(ROUNDS):
                name = f"joiner-{number}"
                with _actors(context, Path(directory), [name], own_node=True) as (go,):
                    before.append(_tokens_per_s(source, QUIET_S))
                    joiner = psutil.Process(go.recv())
                    spent = sum(joiner.cpu_times()[:2])
                    go.send(True)
                    began, tokens = time.monotonic(), server.rollout_tokens
                    _until(lambda: _serves(server, name), f"{name} to serve")  # noqa: B023 - called at once
                    served = time.monotonic()
                    during.append((server.rollout_tokens - tokens) / (served - began))
                    seconds.append(served - began)
                    spent = sum(joiner.cpu_times()[:2]) - spent
                    _until(lambda: bool(server.dispatcher.leases_of(name)), f"a ticket of {name}")  # noqa: B023
                    first.append(time.monotonic() - served)
                with _burner(context, spent) as start:
                    start()
                    burning.append(_tokens_per_s(source, seconds[-1]))
            source.should_stop = lambda: True
            training.join(TIMEOUT_S)
    return {
        "others_tokens_per_s": statistics.median(before),
        "others_tokens_per_s_during": statistics.median(during),
        "others_tokens_per_s_beside_burning": statistics.median(burning),
        "during_over_before": _quartiles(during, before),
        "during_over_burning": _quartiles(during, burning),
        "join_s": statistics.median(seconds),
        "first_ticket_s": statistics.median(first),
        "snapshot_bytes": DENSE_BYTES,
        "rounds": ROUNDS,
    }


@contextlib.contextmanager
def _learner(directory: Path) -> Iterator[Source]:
    """Hub, dispatcher and journal of a run with one version, and the learner's view of them."""
    make_keys(directory / "keys")
    hub = Hub("127.0.0.1", 0, keys=load_learner_keys(directory / "keys"))
    dispatcher = Dispatcher(_ticket, groups_per_step=GROUPS_PER_STEP, max_lag=4, steps=STEPS, max_attempts=5)
    welcome = Welcome(
        run=f"joining-{os.getpid()}", model="none", dtype="bfloat16", max_model_len=256, bulk=hub.bulk_endpoint,
        news=hub.news_endpoint, heartbeat_s=0.25, dead_after_s=15.0, seed=0, group_size=GROUP_SIZE,
        engine={"engine": "fake", "max_running": 64, "fake_token_s": TOKEN_S, "grader_workers": 1},
    )  # fmt: skip
    journal = Journal(directory / "groups.journal")
    server = IntakeServer(hub, dispatcher, journal, welcome, WireConfig(heartbeat_s=0.25), 120.0, 50_000)
    specs = layout([("weights", "uint8", (DENSE_BYTES,))])
    server.start()
    try:
        server.reserved(0, 1)
        server.offer(make_snapshot(1, 0, specs, memoryview(os.urandom(1 << 20) * (DENSE_BYTES >> 20)
                                                           + bytes(DENSE_BYTES % (1 << 20)))))  # fmt: skip
        (directory / "address").write_text(hub.work_endpoint)
        yield Source(server, lambda what, waited: None, lambda: False)
    finally:
        server.stop()
        journal.close()


def _ticket(ticket_id: TicketId) -> Ticket:
    return Ticket(
        id=ticket_id, kind="train", attempt=1, prompt_ids=tuple(range(1, 41)), answer="7", grader="integer",
        group_size=GROUP_SIZE, sampling=Sampling(max_tokens=MAX_TOKENS), seed=ticket_id.index, min_version=1,
    )  # fmt: skip


def _train(source: Source) -> None:
    """Steps that take no time, so that the actors are never held back."""
    with contextlib.suppress(Exception):  # it is told to stop in the middle of a wait
        while True:
            source.take(TIMEOUT_S)
            step = source.server.dispatcher.step + 1
            source.commit(step, 1)
            source.server.reserved(step, 1)  # the only version stands for all steps


def _tokens_per_s(source: Source, seconds: float) -> float:
    tokens, began = source.server.rollout_tokens, time.monotonic()
    time.sleep(seconds)
    return (source.server.rollout_tokens - tokens) / (time.monotonic() - began)


def _quartiles(some: list[float], others: list[float]) -> list[float]:
    return statistics.quantiles([a / b for a, b in zip(some, others, strict=True)], n=4)


@contextlib.contextmanager
def _burner(context: Any, cpu_s: float) -> Iterator[Any]:
    """A process that spends so many CPU seconds when it is told to."""
    near, far = context.Pipe()
    process = context.Process(target=_burn, args=(cpu_s, far))
    process.start()
    near.recv()
    try:
        yield lambda: near.send(True)
    finally:
        process.join(TIMEOUT_S)


def _burn(cpu_s: float, pipe: Connection) -> None:
    pipe.send("ready")
    pipe.recv()
    began = time.process_time()
    while time.process_time() - began < cpu_s:
        pass


def _serves(server: IntakeServer, name: str) -> bool:
    return any(peer.name == name and peer.version > 0 for peer in list(server.peers.values()))


def _until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {TIMEOUT_S:g} s for {what}")
        time.sleep(0.002)


# --- actors ---


@contextlib.contextmanager
def _actors(context: Any, directory: Path, names: list[str], own_node: bool) -> Iterator[list[Connection]]:
    """Actors in processes of their own; those of a node of its own begin when they are told to."""
    pipes = [context.Pipe() for _ in names]
    arguments = [(str(directory), name, own_node, pipe[1]) for name, pipe in zip(names, pipes, strict=True)]
    processes = [context.Process(target=_act, args=given) for given in arguments]
    try:
        for process, pipe in zip(processes, pipes, strict=True):
            process.start()
            if not own_node:
                pipe[0].recv()
                pipe[0].send(True)
        yield [pipe[0] for pipe in pipes]
    finally:
        for process in processes:
            process.terminate()
            process.join(TIMEOUT_S)


def _act(directory: str, name: str, own_node: bool, pipe: Connection) -> None:
    from actor import staging
    from actor.fake_engine import FakeEngine
    from actor.finding import fixed
    from actor.loop import ActorLoop

    if own_node:  # shared memory that nobody else sees
        staging.SHARED_MEMORY = Path(tempfile.mkdtemp(prefix=f"{name}-", dir="/dev/shm"))  # type: ignore[misc]
    find = fixed((Path(directory) / "address").read_text(), str(Path(directory) / "keys" / "actor.json"))
    pipe.send(os.getpid())
    pipe.recv()

    async def work() -> None:
        task = asyncio.ensure_future(ActorLoop(find, name, engine=FakeEngine()).run())
        asyncio.get_running_loop().add_signal_handler(15, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(work())
    if own_node:
        import shutil

        shutil.rmtree(staging.SHARED_MEMORY, ignore_errors=True)
