"""The fake engine keeps the promises of `actor.engine.Engine` that the loop relies on."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actor.fake_engine import EOS, FakeEngine, detokenize
from protocol.errors import EngineFailed
from protocol.messages import Manifest, Sampling, TensorSpec, Welcome

PROMPT = (5, 6, 7)
SAMPLING = Sampling(max_tokens=16)
TENSORS = {"model.a": torch.zeros(2, 3, dtype=torch.bfloat16), "model.b": torch.ones(4)}
SPECS = (TensorSpec("model.a", "bfloat16", (2, 3)), TensorSpec("model.b", "float32", (4,)))


def welcome(**engine: float) -> Welcome:
    return Welcome(
        run="r", model="m", dtype="bfloat16", max_model_len=64, bulk="", news="", heartbeat_s=1.0, dead_after_s=15.0,
        seed=0, group_size=4, engine=dict(engine),
    )  # fmt: skip


def manifest(version: int, tensors: tuple[TensorSpec, ...] = SPECS) -> Manifest:
    return Manifest(version=version, step=version, tensors=tensors, total_bytes=28, digest=f"digest-{version}")


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    path = tmp_path / "staged.safetensors"
    save_file(TENSORS, path)
    return path


async def serving(staged: Path, version: int = 1, **faults: object) -> FakeEngine:
    engine = FakeEngine(**faults)  # type: ignore[arg-type]
    await engine.start(welcome())
    await engine.load(manifest(version), staged)
    return engine


async def test_completion_follows_from_seed_prompt_and_version(staged: Path) -> None:
    async def tokens(version: int, prompt: tuple[int, ...], seed: int) -> list[int]:
        engine = await serving(staged, version)
        return (await engine.generate("id", prompt, SAMPLING, seed, "salt")).token_ids

    base = [await tokens(1, PROMPT, seed) for seed in range(4)]
    assert base == [await tokens(1, PROMPT, seed) for seed in range(4)]
    assert base != [await tokens(2, PROMPT, seed) for seed in range(4)]
    assert base != [await tokens(1, (5, 6, 8), seed) for seed in range(4)]
    assert len({tuple(one) for one in base}) == 4


async def test_completion_is_well_formed(staged: Path) -> None:
    engine = await serving(staged)
    ends = set()
    for seed in range(40):
        one = await engine.generate(f"id-{seed}", PROMPT, SAMPLING, seed, "salt")
        assert 1 <= len(one.token_ids) == len(one.logprobs) <= SAMPLING.max_tokens
        assert all(math.log(0.1) <= value <= 0 for value in one.logprobs)
        assert one.spans == ((1, 0),)
        assert one.finish_reason == ("stop" if one.token_ids[-1] == EOS else "length")
        assert one.text == detokenize(one.token_ids)
        assert one.text == "" or one.text.isdigit()
        ends.add(one.finish_reason)
    assert ends == {"stop", "length"}
    assert engine.started[0] == ("id-0", "salt")


async def test_load_in_flight_pauses_and_shows_in_the_spans(staged: Path) -> None:
    engine = await serving(staged, token_s=0.001, pause_s=0.05)
    sampling = Sampling(max_tokens=400)
    running = [asyncio.ensure_future(engine.generate(f"id-{i}", PROMPT, sampling, i, "1")) for i in range(8)]
    await asyncio.sleep(0.01)
    load = asyncio.ensure_future(engine.load(manifest(2), staged))
    await asyncio.sleep(0.02)
    assert not load.done()
    done_before = sum(task.done() for task in running)
    assert await load >= 0.05
    assert sum(task.done() for task in running) == done_before  # nobody drew a token meanwhile
    generated = await asyncio.gather(*running)

    crossed = [one for one in generated if len(one.spans) == 2]
    assert crossed
    for one in crossed:
        (first, start), (second, at) = one.spans
        assert (first, start, second) == (1, 0, 2)
        assert 0 < at < len(one.token_ids)
    assert engine.version == 2
    assert engine.loaded == [(1, "digest-1"), (2, "digest-2")]


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ((*SPECS, TensorSpec("model.c", "float32", (1,))), r"model\.c is missing"),
        (SPECS[:1], r"model\.b is not in the manifest"),
        ((SPECS[0], TensorSpec("model.b", "float32", (5,))), r"model\.b: found"),
        ((SPECS[0], TensorSpec("model.b", "bfloat16", (4,))), r"model\.b: found"),
    ],
)
async def test_load_compares_the_file_with_the_manifest(
    staged: Path, tensors: tuple[TensorSpec, ...], complaint: str
) -> None:
    engine = await serving(staged)
    with pytest.raises(EngineFailed, match=complaint):
        await engine.load(manifest(2, tensors), staged)
    assert engine.version == 1
    with pytest.raises(EngineFailed, match=complaint):  # condemned
        await engine.generate("id", PROMPT, SAMPLING, 0, "salt")


async def test_load_refuses_a_file_cut_short(staged: Path) -> None:
    engine = await serving(staged)
    staged.write_bytes(staged.read_bytes()[:-1])
    with pytest.raises(EngineFailed, match="not a whole safetensors file"):
        await engine.load(manifest(2), staged)


async def test_injected_faults_condemn(staged: Path) -> None:
    with pytest.raises(EngineFailed, match="no such device"):
        await FakeEngine(start_error="no such device").start(welcome())

    engine = await serving(staged, fail_on_version=2, token_s=0.001)
    waiting = asyncio.ensure_future(engine.generate("id", PROMPT, Sampling(max_tokens=10_000), 0, "salt"))
    await asyncio.sleep(0)
    with pytest.raises(EngineFailed, match="version 2"):
        await engine.load(manifest(2), staged)
    with pytest.raises(EngineFailed, match="version 2"):
        await waiting

    engine = await serving(staged, fail_on_request="/7/")
    await engine.generate("run/6/0", PROMPT, SAMPLING, 0, "salt")
    with pytest.raises(EngineFailed, match="run/7/0"):
        await engine.generate("run/7/0", PROMPT, SAMPLING, 0, "salt")


async def test_cancelled_request_is_recorded_and_stop_ends_the_rest(staged: Path) -> None:
    engine = await serving(staged, token_s=0.001)
    sampling = Sampling(max_tokens=10_000)
    cancelled, stopped = (
        asyncio.ensure_future(engine.generate(name, PROMPT, sampling, 3, "salt")) for name in ("one", "two")
    )
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert engine.aborted == ["one"]
    await engine.stop()
    with pytest.raises(EngineFailed, match="stopped"):
        await stopped


async def test_seconds_a_token_come_from_the_recipe(staged: Path) -> None:
    engine = FakeEngine()
    await engine.start(welcome(fake_token_s=0.25))
    assert engine.token_s == 0.25
