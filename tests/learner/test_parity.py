"""The parity gate: an engine that computes with other weights than the learner's is found; noise is called noise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.batch import Row, pack
from learner.intake.probes import ProbeResult, Probes
from learner.methods.sft import response_sample
from learner.model import PolicyModel, load_model
from learner.parity import ParityGate, ParityLost
from learner.publish import flatten
from protocol.messages import Probed
from protocol.sections import LearnerConfig, ModelConfig, WeightsConfig
from protocol.weights import Snapshot, make_snapshot
from tests.tiny_model import make_tiny_model

FLOAT32 = WeightsConfig(parity_nats=0.002)


@pytest.fixture
def model(tmp_path: Path) -> PolicyModel:
    path = make_tiny_model(tmp_path)
    return load_model(path, ModelConfig(path=str(path), max_model_len=64), LearnerConfig())


def snapshot_of(model: PolicyModel, version: int = 1) -> Snapshot:
    specs, buffer = flatten(model.published_state())
    return make_snapshot(version, version, specs, buffer.numpy().data)


def probed(
    model: PolicyModel, snapshot: Snapshot, wrong: Callable[[dict[str, torch.Tensor]], None] = lambda weights: None,
    noise: float = 0.0, checksum: str = "", actor: str = "actor-0",
) -> ProbeResult:  # fmt: skip
    """What an engine answers that computes with `snapshot`, after `wrong` has changed its weights."""
    probes = Probes(1, 0, model.vocabulary, 64)
    probe = probes.confirmed(actor, snapshot.manifest.version, [snapshot])
    assert probe is not None
    draw = np.random.default_rng(1)
    tokens = [draw.integers(0, model.vocabulary, 5 + i).astype(np.int32) for i in range(len(probe.prompts))]
    rows = [
        Row(prompt, (response_sample(ids),), temperature=1.0) for prompt, ids in zip(probe.prompts, tokens, strict=True)
    ]
    weights = model.frozen_copy()
    wrong(weights)
    logprobs = model.frozen_logprobs(weights, pack(rows)).numpy()
    logprobs = logprobs + noise * draw.standard_normal(len(logprobs)).astype(np.float32)
    answer = Probed(
        snapshot.manifest.version, tuple(len(ids) for ids in tokens), checksum,
        np.concatenate(tokens).tobytes(), logprobs.astype("<f4").tobytes(),
    )  # fmt: skip
    assert probes.answered(actor, actor, answer)
    return probes.results[0]


def stale(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """One tensor as it was some updates ago: off by a hundredth of its spread."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        tensor = weights[name].float()
        torch.manual_seed(0)
        weights[name] = (tensor + 0.05 * tensor.abs().mean() * torch.randn_like(tensor)).to(weights[name].dtype)

    return change


def test_same_weights_pass(model: PolicyModel) -> None:
    found = ParityGate(model, FLOAT32).check(probed(model, snapshot_of(model)), 0)
    assert found is not None
    assert found.mean < 1e-6 and found.worst < 1e-5
    assert (found.actor, found.version, found.effect, found.sees) == ("actor-0", 1, None, None)
    assert found.figures == {"parity_nats": found.mean, "parity_max_nats": found.worst}


def test_one_stale_tensor_trips_the_gate(model: PolicyModel) -> None:
    snapshot = snapshot_of(model)
    names = [name for name, _ in model.named_parameters()]
    matrices = [name for name in names if name.endswith(("q_proj.weight", "down_proj.weight", "embed_tokens.weight"))]
    assert len(matrices) >= 3
    for name in matrices:
        with pytest.raises(ParityLost, match=r"actor-0 serves version 1, but its logprobs are .*weights.parity_nats"):
            ParityGate(model, FLOAT32).check(probed(model, snapshot, stale(name)), 0)


def test_warning_policy_goes_on(model: PolicyModel, caplog: pytest.LogCaptureFixture) -> None:
    gate = ParityGate(model, WeightsConfig(parity_nats=0.002, parity="warn"))
    name = next(name for name, _ in model.named_parameters() if name.endswith("down_proj.weight"))
    with caplog.at_level(logging.WARNING, "learner.parity"):
        found = gate.check(probed(model, snapshot_of(model), stale(name)), 0)
    assert found is not None and found.mean > 0.002
    assert "parity lost: actor-0 serves version 1" in caplog.text


def test_version_is_compared_and_not_the_weights_of_now(model: PolicyModel) -> None:
    """The learner trains on while a probe is under way."""
    result = probed(model, snapshot_of(model))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.mul_(1.05)
    found = ParityGate(model, FLOAT32).check(result, 2)
    assert found is not None
    assert found.mean < 1e-6
    assert found.effect is not None and found.effect > 0.002, "of one of the two updates since"
    assert found.sees is True


def test_noise_that_hides_an_update_is_said(model: PolicyModel, caplog: pytest.LogCaptureFixture) -> None:
    result = probed(model, snapshot_of(model), noise=0.04)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.mul_(1.0001)
    with caplog.at_level(logging.INFO, "learner.parity"):
        found = ParityGate(model, WeightsConfig()).check(result, 1)
    assert found is not None
    assert found.sees is False
    assert 0.02 < found.mean < 0.06
    assert "too little to be seen through that, the digests carry the proof" in caplog.text


def test_engines_whose_own_checksums_differ_are_found(model: PolicyModel) -> None:
    gate, snapshot = ParityGate(model, FLOAT32), snapshot_of(model)
    gate.check(probed(model, snapshot, checksum="aa"), 0)
    gate.check(probed(model, snapshot, checksum="aa", actor="actor-1"), 0)
    with pytest.raises(ParityLost, match="another one than that of actor-0"):
        gate.check(probed(model, snapshot, checksum="bb", actor="actor-2"), 0)


def test_model_with_other_names_on_disk_is_left_out_once(model: PolicyModel, caplog: pytest.LogCaptureFixture) -> None:
    gate, result = ParityGate(model, FLOAT32), probed(model, snapshot_of(model))
    gate._names = {"another.weight"}
    with caplog.at_level(logging.WARNING, "learner.parity"):
        assert gate.check(result, 0) is None
        assert gate.check(result, 0) is None
    assert caplog.text.count("the parity gate is off") == 1
