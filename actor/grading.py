"""Runs graders in worker processes under a time limit, so that a grader that hangs, throws or crashes costs one sample.

Called by `rollout.py`; knows scores, but neither tickets nor what a grader does. The workers are plain children
(`grading_worker.py`) on socket pairs and not `multiprocessing`, because a Ray actor's `__main__` must not be imported
again and nothing is to be unpickled. The pool installs no signal handler and works in any thread that runs an event
loop; that thread's end is the workers' end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from actor.grading_worker import HEADER_BYTES, READY, Reply, Request, describe, encode_frame
from actor.rewards import Scores
from protocol.errors import DeadlineExceeded

WORKER_COMMAND = (sys.executable, "-P", "-m", "actor.grading_worker")
"""Starts a worker; the number of its socket, our process id and the user functions are appended. -P: a directory named
`actor` in the working directory is not taken for this package."""
START_TIMEOUT_S = 60.0
"""For a worker to come up, user functions included, and for what a grader imports at its first use."""
MAX_PREPARED = 1000
MAX_REPLY_BYTES = 1 << 20

Graded = tuple[Scores, str]
"""Scores and "", or {"reward": 0.0} and why the grader gave none."""


class GraderPool:
    """`async with GraderPool(workers=1, timeout_s=5.0) as pool: scores, error = await pool.grade("exact", "7", "7")`.

    A worker grades one response at a time. A call first waits for a free worker; it is freed by the call that holds
    it, at the latest when that call's time limit has passed. What a grader imports at its first use in a worker is not
    part of any sample's time.

    `user_functions` (module:function) are all that the workers import besides the built-in graders, whatever a request
    names; modules are also looked for in `user_path`.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        command: Sequence[str] = WORKER_COMMAND,
        user_functions: Sequence[str] = (),
        user_path: str = "",
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: found {workers}, allowed: at least 1")
        self._timeout_s = timeout_s
        arguments = (user_path, *user_functions) if user_functions else ()
        self._workers = [_Worker(command, arguments) for _ in range(workers)]
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()

    async def __aenter__(self) -> GraderPool:
        """Start the workers. Raises ValueError for a user function that cannot be imported, OSError or DeadlineExceeded
        if a worker does not come up."""
        try:
            await asyncio.gather(*(worker.start() for worker in self._workers))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        for worker in self._workers:
            self._free.put_nowait(worker)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(worker.close() for worker in self._workers))

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that run."""
        return tuple(worker.pid for worker in self._workers if worker.pid)

    async def grade(self, grader: str, response: str, answer: str) -> Graded:
        """Grade one response. Raises nothing that a grader or a response could cause."""
        try:
            frame = encode_frame(Request(grader, response, answer))
        except UnicodeEncodeError as error:
            return {"reward": 0.0}, describe(error)
        async with self._take() as worker:
            reply = await self._ask(worker, grader, frame)
        return ({"reward": 0.0} if reply.error else reply.scores), reply.error

    async def grade_group(self, grader: str, responses: Sequence[str], answer: str) -> list[Graded]:
        """`grade` for each response, each with its own time limit, spread over the free workers; in order."""
        return await asyncio.gather(*(self.grade(grader, response, answer) for response in responses))

    @contextlib.asynccontextmanager
    async def _take(self) -> AsyncIterator[_Worker]:
        worker = await self._free.get()
        try:
            yield worker
        finally:
            self._free.put_nowait(worker)

    async def _ask(self, worker: _Worker, grader: str, frame: bytes) -> Reply:
        """One request and its reply. Whatever goes wrong, no worker is left with half an exchange."""
        try:
            await worker.start()
            await worker.prepare(grader)
        except (OSError, EOFError, ValueError, msgspec.MsgspecError, DeadlineExceeded) as error:
            await worker.kill()
            return Reply({}, f"no grading process: {describe(error)}")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await worker.ask(frame)
        except TimeoutError:
            await worker.kill()
            return Reply({}, f"time limit of {self._timeout_s:g} s")
        except (OSError, EOFError, msgspec.MsgspecError):
            return Reply({}, _describe_death(await worker.kill()))
        except BaseException:  # cancelled: the reply that is still to come belongs to nobody
            worker.abandon()
            raise


class _Worker:
    """One worker process, started again when it is needed after it has ended."""

    def __init__(self, command: Sequence[str], arguments: Sequence[str]) -> None:
        self._command = command
        self._arguments = arguments
        self._prepared: set[str] = set()
        """Graders that this process has been asked to import for."""
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._closed = False

    @property
    def pid(self) -> int:
        """0: not running."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    async def start(self) -> None:
        """Unless it runs, start the process and wait until it is ready. Raises OSError, DeadlineExceeded or, for a
        user function that cannot be imported, ValueError."""
        if self.pid and self._writer:
            return
        await self.kill()
        if self._closed:
            raise OSError("the pool is closed")
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(sock=self._spawn())
            async with asyncio.timeout(START_TIMEOUT_S):
                said = (await self._receive()).error
            if said != READY:
                raise ValueError(said.removeprefix("ValueError: "))
        except TimeoutError:
            await self.kill()
            raise DeadlineExceeded("a grading process to start", START_TIMEOUT_S) from None
        except EOFError:
            raise OSError(_describe_death(await self.kill()) + " at its start") from None
        except BaseException:
            self.abandon()
            raise

    def _spawn(self) -> socket.socket:
        """Start the process, in this very thread (the kernel ties its life to it). Returns our end of the socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*self._command, str(theirs.fileno()), str(os.getpid()), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # graders may print; their errors show in our log
                    pass_fds=(theirs.fileno(),),
                    env=_with_packages_on_path(os.environ),
                )
            except BaseException:
                ours.close()
                raise
        return ours

    async def prepare(self, grader: str) -> None:
        """Have the process import what a grader needs, once. Raises DeadlineExceeded, and as `ask` does."""
        if grader in self._prepared:
            return
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self.ask(encode_frame(Request(grader, "", "", prepare=True)))
        except TimeoutError:
            raise DeadlineExceeded("a grader's imports", START_TIMEOUT_S) from None
        except BaseException:
            self.abandon()
            raise
        if len(self._prepared) < MAX_PREPARED:
            self._prepared.add(grader)

    async def ask(self, frame: bytes) -> Reply:
        """Waits for the worker to read and to answer; the caller's time limit bounds both. Raises OSError, EOFError."""
        if self._writer is None:
            raise EOFError("the pool was closed meanwhile")
        self._writer.write(frame)
        await self._writer.drain()
        return await self._receive()

    async def _receive(self) -> Reply:
        size = int.from_bytes(await self._reader.readexactly(HEADER_BYTES), "little")
        if size > MAX_REPLY_BYTES:
            raise EOFError(f"reply of {size} bytes, allowed: {MAX_REPLY_BYTES}")
        return msgspec.json.decode(await self._reader.readexactly(size), type=Reply)

    def abandon(self) -> None:
        """Kill without waiting for the end; the next `start` or `close` does."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None:
            self._process.kill()

    async def kill(self) -> int:
        """Kill, and wait for the end. Returns the exit status (negative: the signal) that it died with."""
        self.abandon()
        process, self._process = self._process, None
        self._prepared.clear()
        return await asyncio.to_thread(process.wait) if process else 0  # SIGKILL cannot be refused

    async def close(self) -> None:
        """`kill`, for good."""
        self._closed = True
        await self.kill()


def check_user_functions(names: Sequence[str], directory: str) -> None:
    """Import user functions in a new process, as a worker does. Raises ValueError with what is wrong with one."""
    try:
        tried = subprocess.run(
            [*WORKER_COMMAND, "--check", directory, *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_with_packages_on_path(os.environ),
            timeout=START_TIMEOUT_S,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"grader: found {', '.join(names)}, allowed: what is imported within {START_TIMEOUT_S:g} s"
        ) from None
    if tried.returncode:
        lines = tried.stderr.strip().splitlines() or [_describe_death(tried.returncode)]
        raise ValueError(lines[-1].removeprefix("ValueError: "))


def _with_packages_on_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a worker finds these packages, installed or not."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = environment.get("PYTHONPATH", "")
    return {**environment, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root}


def _describe_death(status: int) -> str:
    cause = f"signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"status {status}"
    return f"the grading process ended with {cause}"
