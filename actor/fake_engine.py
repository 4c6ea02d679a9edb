"""An engine in memory: the actor's whole loop runs on it in milliseconds, with faults on demand.

Completions follow from (seed, prompt, version) alone, cross weight updates as real ones do, and take `token_s` a token,
asleep. A load reads the staged file and compares it with its manifest. `actor.loop` starts it when the recipe says
`actor.engine = "fake"`; tests and the overlap benchmark use it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from actor.engine import Generated
from protocol.errors import EngineFailed
from protocol.messages import Manifest, Sampling, TensorSpec, Welcome
from protocol.tensors import DTYPES

EOS = 0
FIRST_DIGIT = 10
"""Token ids 10..19 stand for the digits, `EOS` for the end; nothing else is ever drawn."""


class FakeEngine:
    """See `actor.engine.Engine`. What happened is left in `loaded`, `started` and `aborted` for tests to read.

    `fail_on_version`: `load` of that version raises EngineFailed and condemns the engine. `fail_on_request`: so does
    `generate` with a request id that contains it. `start_error`: what `start` fails with. `pause_s`: how long a load
    stands still at least.
    """

    def __init__(
        self,
        *,
        token_s: float = 0.0,
        pause_s: float = 0.0,
        start_error: str = "",
        fail_on_version: int = 0,
        fail_on_request: str = "",
    ) -> None:
        self.token_s = token_s
        self.pause_s = pause_s
        self.start_error = start_error
        self.fail_on_version = fail_on_version
        self.fail_on_request = fail_on_request
        self.loaded: list[tuple[int, str]] = []
        """(version, manifest digest) of every load, in order."""
        self.started: list[tuple[str, str]] = []
        """(request id, cache salt) of every request, in order."""
        self.aborted: list[str] = []
        self._version = 0
        self._condemned = "the engine was not started"
        self._running = asyncio.Event()

    @property
    def version(self) -> int:
        return self._version

    async def start(self, welcome: Welcome) -> None:
        if self.start_error:
            raise EngineFailed(self.start_error)
        self.token_s = float(welcome.engine.get("fake_token_s", 0.0)) or self.token_s
        self._condemned = ""
        self._running.set()

    async def generate(
        self, request_id: str, prompt_ids: tuple[int, ...], sampling: Sampling, seed: int, cache_salt: str
    ) -> Generated:
        self._check_alive()
        assert self._version, "generate before the first load"
        if self.fail_on_request and self.fail_on_request in request_id:
            raise self._condemn(f"injected: request {request_id}")
        self.started.append((request_id, cache_salt))
        length = completion_length(prompt_ids, sampling, seed)
        token_ids: list[int] = []
        logprobs: list[float] = []
        spans: list[tuple[int, int]] = []
        try:
            for index in range(length):
                if self.token_s or not self._running.is_set():
                    await asyncio.sleep(self.token_s)
                    await self._running.wait()  # until the load that paused the engine has resumed it
                    self._check_alive()
                if not spans or spans[-1][0] != self._version:
                    spans.append((self._version, index))
                token, logprob = draw(prompt_ids, seed, self._version, index)
                token_ids.append(token)
                logprobs.append(logprob)
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        stopped = length < sampling.max_tokens
        if stopped:
            token_ids[-1] = EOS
        return Generated(token_ids, logprobs, tuple(spans), "stop" if stopped else "length", detokenize(token_ids))

    async def load(self, manifest: Manifest, staged: Path) -> float:
        self._check_alive()
        began = time.perf_counter()
        self._running.clear()
        try:
            if manifest.version == self.fail_on_version:
                raise EngineFailed(f"injected: version {manifest.version}")
            check_staged(manifest.tensors, staged)
            await asyncio.sleep(self.pause_s)
        except BaseException as error:
            self._condemn(str(error))
            if isinstance(error, (ValueError, OSError)):
                raise EngineFailed(f"loading version {manifest.version} failed: {error}") from error
            raise
        finally:  # whoever waits goes on, or learns that the engine is condemned
            self._running.set()
        self._version = manifest.version
        self.loaded.append((manifest.version, manifest.digest))
        return time.perf_counter() - began

    async def checksum(self) -> str:
        return ""

    def metrics(self) -> str:
        return (
            "# HELP fake:requests_total Requests that were begun.\n# TYPE fake:requests_total counter\n"
            f"fake:requests_total {len(self.started)}.0\n"
            "# HELP fake:loads Versions that were loaded.\n# TYPE fake:loads gauge\n"
            f'fake:loads{{model_name="fake"}} {len(self.loaded)}.0\n'
        )

    async def stop(self) -> None:
        self._condemned = self._condemned or "the engine was stopped"
        self._running.set()

    def _check_alive(self) -> None:
        if self._condemned:
            raise EngineFailed(self._condemned)

    def _condemn(self, reason: str) -> EngineFailed:
        self._condemned = self._condemned or reason
        return EngineFailed(self._condemned)


# --- completions ----------------------------------------------------------------------------------------------------


def completion_length(prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> int:
    """Tokens of the completion, the end token included, between 1 and `max_tokens`. The same under every version."""
    return 1 + int(_uniform("length", *prompt_ids, seed) * sampling.max_tokens)


def draw(prompt_ids: Sequence[int], seed: int, version: int, index: int) -> tuple[int, float]:
    """(token id, logprob) of one position: a digit, with a logprob between log(0.1) and 0."""
    chance = _uniform("token", *prompt_ids, seed, version, index)
    return FIRST_DIGIT + int(chance * 10), math.log(0.1 + 0.9 * (chance * 10 % 1))


def detokenize(token_ids: Sequence[int]) -> str:
    return "".join(str(token - FIRST_DIGIT) for token in token_ids if token != EOS)


def _uniform(*key: object) -> float:
    """A number in [0, 1) that is the same for the same key in every process."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / (1 << 56)


# --- the staged file ------------------------------------------------------------------------------------------------


def check_staged(tensors: Sequence[TensorSpec], staged: Path) -> None:
    """Compare a safetensors file with a manifest by its header. Raises ValueError naming what differs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(staged, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{staged}: not a whole safetensors file: {error}") from None
    wanted = {spec.name: (DTYPES[spec.dtype][1], spec.shape) for spec in tensors}
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is not in the manifest" for name in found if name not in wanted]
    faults += [
        f"{name}: found {found[name]}, manifest says {expected}"
        for name, expected in wanted.items()
        if found.get(name, expected) != expected
    ]
    if faults:
        raise ValueError(f"{staged}: {'; '.join(faults)}")
