"""What the actor asks of an inference engine. `vllm_engine.py` is the real one, `fake_engine.py` serves tests.

Knows nothing of sockets, tickets or rewards; `rollout.py` and `loop.py` call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protocol.messages import Manifest, Sampling, Welcome


@dataclass(frozen=True)
class Generated:
    """One completion as the engine drew it."""

    token_ids: list[int]
    """All sampled tokens, the end-of-sequence token included."""
    logprobs: list[float]
    """Natural-log probability of each sampled token after temperature, as long as `token_ids`."""
    spans: tuple[tuple[int, int], ...]
    """(version, first token index), in order."""
    finish_reason: str
    text: str


class Engine(Protocol):
    """Prompt in, completion out; weights replaced between two engine steps.

    Any exception out of `load` condemns the engine (its layers are replaced one by one): the caller exits and is
    restarted. `EngineFailed` out of any method means the same and carries the engine's own error.
    """

    @property
    def version(self) -> int:
        """Version being served; 0 before the first `load`."""
        ...

    async def start(self, welcome: Welcome) -> None:
        """Build the engine with meaningless weights. Raises EngineFailed with the engine's own error."""
        ...

    async def generate(
        self, request_id: str, prompt_ids: tuple[int, ...], sampling: Sampling, seed: int, cache_salt: str
    ) -> Generated:
        """Draw one completion. Cancelling the coroutine aborts the request inside the engine."""
        ...

    async def load(self, manifest: Manifest, staged: Path) -> float:
        """Swap in the staged version (a safetensors file): pause in place, load, resume.

        Returns the seconds that generation stood still. Every parameter must be written, or EngineFailed."""
        ...

    async def checksum(self) -> str:
        """Digest of the engine's own checksums of the weights it computes with; "" where it has none that mean much.

        Engines of one kind that serve one version have the same."""
        ...

    def metrics(self) -> str:
        """What the engine says of itself, in Prometheus' text format; "" for nothing. Called from a thread."""
        ...

    async def stop(self) -> None:
        """End the engine and its child processes."""
        ...
