"""The parity gate: what an engine serves is compared with the learner, end to end, through logprobs of fresh probes.

The digests prove that the right bytes lay beside the engine; this shows that the engine computes with them. An actor's
logprobs of tokens that it drew itself are compared with the learner's of the same tokens, under the very version that
the actor serves. Arithmetic in bfloat16 alone makes about 0.04 nats a token: where an update changes the logprobs by
less, the gate says that it cannot see it.

Called by the loop between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from learner.batch import PackedBatch, Row, pack
from learner.intake.probes import ProbeResult
from learner.methods.sft import response_sample
from learner.model import LogprobOutput
from protocol.errors import EngineFailed
from protocol.sections import WeightsConfig
from protocol.tensors import tensor_view

log = logging.getLogger(__name__)


class ParityLost(EngineFailed):
    """An engine does not compute what the learner computes with the version that it claims to serve."""


@dataclass(frozen=True)
class Parity:
    """One comparison, in nats a token, over the tokens of a probe."""

    actor: str
    version: int
    mean: float
    worst: float
    effect: float | None
    """Mean difference that one version made to the learner's own logprobs; None if there is no later version yet."""

    @property
    def sees(self) -> bool | None:
        """Whether an engine one version behind would show; None if that is not known."""
        return None if self.effect is None else self.effect > 2 * self.mean

    @property
    def figures(self) -> dict[str, float]:
        """For the step's metrics."""
        effect = {} if self.effect is None else {"parity_effect_nats": self.effect}
        return {"parity_nats": self.mean, "parity_max_nats": self.worst, **effect}


class Policy(Protocol):
    """What the gate asks of a model: `PolicyModel`, or `Trainer`, which asks all ranks."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def frozen_logprobs(self, weights: dict[str, torch.Tensor], packed: PackedBatch) -> torch.Tensor: ...

    def logprobs(self, packed: PackedBatch, with_entropy: bool) -> LogprobOutput: ...


class ParityGate:
    """Compares probes with the model."""

    def __init__(self, model: Policy, config: WeightsConfig) -> None:
        self.model, self.config = model, config
        self._off = False
        self._checksums: dict[int, tuple[str, str]] = {}
        """Version -> (actor, checksum of the engine's own weights) of the first one that gave one."""
        self._names = {name for name, _ in model.named_parameters()}

    def check(self, result: ProbeResult, versions_since: int) -> Parity | None:
        """Compare one answer; `versions_since`: updates of the learner's weights since that version.

        None for a model whose tensors have other names on disk than in memory. Raises ParityLost beyond
        `weights.parity_nats`, unless the policy is to warn.
        """
        weights = _weights(result)
        if set(weights) != self._names:
            if not self._off:
                self._off = True
                log.warning("the parity gate is off: this model's tensors have other names on disk than in memory")
            return None
        packed = pack(_rows(result))
        ours = self.model.frozen_logprobs(weights, packed).cpu()
        difference = (ours - packed.engine_logprobs).abs()
        effect = None
        if versions_since:
            with torch.no_grad():
                effect = float((self.model.logprobs(packed, False).logprobs.cpu() - ours).abs().mean()) / versions_since
        found = Parity(result.actor, result.probe.version, float(difference.mean()), float(difference.max()), effect)
        self._judge(found, self._disagreement(result))
        return found

    def _judge(self, found: Parity, disagreement: str) -> None:
        where = f"{found.actor} serves version {found.version}"
        figures = f"{found.mean:.2g} nats a token from the learner (at most {found.worst:.2g})"
        if not found.mean <= self.config.parity_nats or disagreement:
            why = disagreement or f"allowed: {self.config.parity_nats:g} (weights.parity_nats)"
            message = f"parity lost: {where}, but its logprobs are {figures}; {why}"
            if self.config.parity == "stop":
                raise ParityLost(message)
            log.warning("%s", message)
        elif found.sees is False:
            log.info(
                "parity: %s, %s; one update changes the learner's by %.2g: too little to be seen through that, the"
                " digests carry the proof", where, figures, found.effect,
            )  # fmt: skip
        else:
            log.info("parity: %s, %s", where, figures)

    def _disagreement(self, result: ProbeResult) -> str:
        """What vLLM's own checksums of two engines say of one version, where they say anything."""
        if not result.probed.checksum:
            return ""
        first = self._checksums.setdefault(result.probe.version, (result.actor, result.probed.checksum))
        self._checksums = {v: seen for v, seen in self._checksums.items() if v > result.probe.version - 16}
        if first[1] == result.probed.checksum:
            return ""
        return f"and vLLM's checksum of its weights is another one than that of {first[0]}"


def _weights(result: ProbeResult) -> dict[str, torch.Tensor]:
    buffer = torch.frombuffer(result.snapshot.data, dtype=torch.uint8)
    return {spec.name: tensor_view(spec, buffer) for spec in result.snapshot.manifest.tensors}


def _rows(result: ProbeResult) -> list[Row]:
    """The probe's prompts, each with the tokens that the actor drew for it."""
    token_ids = np.frombuffer(result.probed.token_ids, "<i4")
    logprobs = np.frombuffer(result.probed.logprobs, "<f4")
    rows, start = [], 0
    for prompt, count in zip(result.probe.prompts, result.probed.num_tokens, strict=True):
        part = slice(start, start + count)
        sample = replace(response_sample(token_ids[part].tolist()), engine_logprobs=logprobs[part])
        rows.append(Row(prompt, (sample,), temperature=1.0))
        start += count
    return rows
