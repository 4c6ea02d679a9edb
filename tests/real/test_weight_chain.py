"""A real engine through ten delta versions computes what one does that was started on the learner's checkpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from actor.gate import EngineGate
from actor.probing import answer
from actor.staging import Staged, Staging
from actor.vllm_engine import VLLMEngine
from learner.intake.probes import Probes
from learner.model import PolicyModel, load_model
from learner.parity import ParityGate, ParityLost
from learner.publish import Publisher, Versions
from learner.tensor_files import write_tensors
from protocol.link import Link
from protocol.messages import Welcome
from protocol.sections import LearnerConfig, ModelConfig, WeightsConfig
from protocol.tensors import tensor_view
from protocol.weights import Snapshot
from tests.engine_parity import generate_all, manifest_of, welcome_for
from tests.hub_harness import RunningHub
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.real_engine

VERSIONS = 10


@pytest.fixture(autouse=True)
def float32_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are in bfloat16, both sides compute with them in float32, also where the CPU has instructions for
    bfloat16: there the two sides' rounding would hide what is looked for."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("learner.model.FAST_BF16_CPU", ())


@pytest.fixture
def model(tmp_path: Path) -> PolicyModel:
    path = make_tiny_model(tmp_path / "tiny", tied=True)
    return load_model(path, ModelConfig(path=str(path), max_model_len=192), LearnerConfig())


class Chain:
    """A publisher's versions through a real hub into a staging directory."""

    def __init__(self, running: RunningHub, link: Link, welcome: Welcome, model: PolicyModel, directory: Path) -> None:
        self.running, self.link, self.welcome, self.model = running, link, welcome, model
        self.staging = Staging("chain", directory)
        hub = running.hub
        self.publisher = Publisher(
            Versions(directory / "versions.jsonl"), lambda *_: None,
            lambda *offer: running.run(lambda: hub.announce(*offer)),
        )  # fmt: skip

    async def next(self, serving: int) -> Staged:
        version = self.publisher.publish(self.model, serving)
        self.publisher.wait()
        staged = await self.staging.bring(self.link, self.welcome, None, version, serving)
        assert staged is not None
        return staged


@pytest.fixture
async def chain(model: PolicyModel, tmp_path: Path) -> AsyncIterator[Chain]:
    with RunningHub() as running:
        link = Link(running.hub.work_endpoint, "actor-0", "i")
        link.open_weights(running.hub.bulk_endpoint, running.hub.news_endpoint)
        welcome = welcome_for(tmp_path / "tiny", dtype="bfloat16")
        made = Chain(running, link, welcome, model, tmp_path)
        yield made
        made.staging.leave()
        link.close()


def update(model: PolicyModel, seed: int) -> None:
    """Moves every weight a little, as Adam does: some of them are rounded to other bits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter += 2e-4 * torch.sign(torch.randn(parameter.shape, generator=generator))


@pytest.mark.timeout(500)
async def test_engine_after_ten_deltas_is_as_one_started_from_the_checkpoint(
    chain: Chain, model: PolicyModel, tmp_path: Path
) -> None:
    engine = VLLMEngine()
    await engine.start(chain.welcome)
    forms: list[str] = []
    try:
        for number in range(VERSIONS + 1):
            staged = await chain.next(engine.version)
            forms.append(staged.form)
            await engine.load(staged.manifest, staged.path)
            staged.release()
            if number == 0:
                first = await generate_all(engine, 1.0)
            update(model, number)
        served = engine.version
        after_chain = await generate_all(engine, 1.0, seed=5)
        again = await generate_all(engine, 1.0, seed=5)
        for slot in (0, 1):  # what an engine has loaded is its own: the slots are written over under it
            path = staged.path.with_name(f"slot-{slot}.safetensors")
            with open(path, "r+b") as file:
                file.seek(path.stat().st_size // 4)
                file.write(np.random.default_rng(0).bytes(path.stat().st_size // 2))
        overwritten = await generate_all(engine, 1.0, seed=5)
        stale = "model.layers.1.mlp.down_proj.weight"
        await assert_gate_sees(engine, chain, model, tmp_path, stale)
    finally:
        await engine.stop()
    assert forms == ["snapshot", *["delta"] * VERSIONS]
    assert served == VERSIONS + 1

    checkpoint = tmp_path / "checkpoint.safetensors"
    write_tensors(last_published(chain), checkpoint)
    fresh_engine = VLLMEngine()
    await fresh_engine.start(chain.welcome)
    try:
        await fresh_engine.load(manifest_of(served), checkpoint)
        fresh = await generate_all(fresh_engine, 1.0, seed=5)
    finally:
        await fresh_engine.stop()
    noise = difference(after_chain, again)
    assert tokens(after_chain) == tokens(fresh) == tokens(overwritten)
    assert difference(after_chain, fresh) <= max(noise, 1e-5), f"run-to-run noise is {noise:.2g} nats"
    assert difference(after_chain, overwritten) <= max(noise, 1e-5), "the engine still reads the staged file"
    assert tokens(first) != tokens(fresh) or difference(first, fresh) > 1e-3, "the updates do change something"


def last_published(chain: Chain) -> dict[str, torch.Tensor]:
    snapshot = chain.publisher._last
    assert snapshot is not None
    buffer = torch.frombuffer(snapshot.data, dtype=torch.uint8)
    return {spec.name: tensor_view(spec, buffer) for spec in snapshot.manifest.tensors}


async def assert_gate_sees(engine: VLLMEngine, chain: Chain, model: PolicyModel, directory: Path, stale: str) -> None:
    """The gate passes the engine with the learner's weights, and trips over one with a single tensor of another."""
    gate = ParityGate(model, WeightsConfig(parity_nats=0.002))
    snapshot = chain.publisher._last
    assert snapshot is not None
    sound = last_published(chain)
    wrong = sound | {stale: sound[stale] + 0.05 * torch.randn_like(sound[stale].float()).to(torch.bfloat16)}
    for number, state in enumerate((sound, wrong)):
        version = engine.version + 1
        path = directory / f"probed-{number}.safetensors"
        write_tensors(state, path)
        await engine.load(manifest_of(version), path)
        manifest = msgspec.structs.replace(snapshot.manifest, version=version)
        probes = Probes(1, 0, model.vocabulary, 192)
        probe = probes.confirmed("i", version, [Snapshot(manifest, snapshot.data)])
        assert probe is not None
        probed = await answer(engine, EngineGate(8), probe)
        assert probed is not None and probes.answered("actor-0", "i", probed)
        if state is sound:
            found = gate.check(probes.results[0], 0)
            assert found is not None and found.mean < 1e-4
        else:
            with pytest.raises(ParityLost, match="actor-0 serves version"):
                gate.check(probes.results[0], 0)


def tokens(generated: Any) -> list[list[int]]:
    return [one.token_ids for one in generated]


def difference(one: Any, other: Any) -> float:
    """Largest difference of a logprob, in nats."""
    pairs = zip(one, other, strict=True)
    return max(abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=True))
