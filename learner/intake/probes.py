"""Which actor is asked for a probe of its weights, and when: at its first version, then every so many.

A probe is a few fresh random prompts; `learner/parity.py` compares the logprobs that come back with the learner's own
of that very version, whose snapshot is kept until then. Plain bookkeeping, called by `server.py` under its lock.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass

import numpy as np

from protocol.messages import Probe, Probed
from protocol.weights import Snapshot

PROMPTS = 4
PROMPT_TOKENS = 12
MAX_TOKENS = 16


@dataclass(frozen=True)
class ProbeResult:
    """An actor's answer, and what it is to be compared with."""

    actor: str
    probe: Probe
    probed: Probed
    snapshot: Snapshot


class Probes:
    """Of one run. Holds at most one snapshot beyond those that the hub serves: one version is probed at a time."""

    def __init__(self, every: int, seed: int, vocabulary: int, max_model_len: int) -> None:
        """`every`: versions that an actor loads from one probe to the next; 0: no probes at all."""
        self.every, self.seed, self.vocabulary = every, seed, vocabulary
        self.prompt_tokens = max(1, min(PROMPT_TOKENS, max_model_len // 2))
        self.max_tokens = max(1, min(MAX_TOKENS, max_model_len - self.prompt_tokens))
        self.results: deque[ProbeResult] = deque()
        self.answers = 0
        self._loaded: dict[str, list[int]] = {}
        """Incarnation -> the version of its last probe, and those that it has confirmed since."""
        self._pending: dict[str, tuple[Probe, Snapshot]] = {}

    def confirmed(self, incarnation: str, version: int, snapshots: list[Snapshot]) -> Probe | None:
        """An actor serves `version`; the probe to send it, if one is due and the learner still has that version."""
        if not self.every or not version:
            return None
        if (pending := self._pending.get(incarnation)) and pending[0].version != version:
            del self._pending[incarnation]  # it has gone on: an answer would be of a mixture
        since = self._loaded.get(incarnation)
        if since is not None and version not in since:
            since.append(version)
        if (since is not None and len(since) <= self.every) or incarnation in self._pending:
            return None
        snapshot = next((one for one in snapshots if one.manifest.version == version), None)
        if snapshot is None or any(other.version != version for other, _ in self._pending.values()):
            return None
        probe = self._probe(incarnation, version)
        self._pending[incarnation] = probe, snapshot
        return probe

    def answered(self, actor: str, incarnation: str, probed: Probed) -> bool:
        """Take in an answer; False if nobody asked for it, or it does not answer what was asked."""
        probe, snapshot = self._pending.get(incarnation, (None, None))
        if probe is None or snapshot is None or probed.version != probe.version or not self._fits(probe, probed):
            return False
        del self._pending[incarnation]
        self._loaded[incarnation] = [probe.version]
        self.answers += 1
        self.results.append(ProbeResult(actor, probe, probed, snapshot))
        return True

    def gone(self, incarnation: str) -> None:
        """The actor has left or died."""
        self._pending.pop(incarnation, None)
        self._loaded.pop(incarnation, None)

    def _fits(self, probe: Probe, probed: Probed) -> bool:
        tokens = np.frombuffer(probed.token_ids, "<i4")
        return (
            len(probed.num_tokens) == len(probe.prompts)
            and all(0 < count <= probe.max_tokens for count in probed.num_tokens)
            and bool(((tokens >= 0) & (tokens < self.vocabulary)).all())
        )

    def _probe(self, incarnation: str, version: int) -> Probe:
        """Prompts that no cache can hold: random tokens, others for each actor and version."""
        draw = np.random.default_rng((self.seed, version, zlib.crc32(incarnation.encode())))
        prompts = draw.integers(0, self.vocabulary, (PROMPTS, self.prompt_tokens)).tolist()
        return Probe(version, tuple(tuple(prompt) for prompt in prompts), self.max_tokens, int(draw.integers(1 << 31)))
