"""The one vLLM engine of `make test`'s own: weight updates reach every tensor, versions and logprobs are true."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from actor.vllm_engine import BATCHED_TOKENS, VLLMEngine
from learner.telemetry.engines import families_of
from protocol.engine_text import MAX_PACKED_BYTES, pack, unpack
from protocol.messages import Sampling
from tests.engine_parity import (
    BOUND,
    ENGINE,
    MAX_MODEL_LEN,
    PROMPTS,
    differences,
    generate_all,
    load,
    random_model,
    span_difference,
    spans_with_ends,
    tensors_of,
    updates_while_generating,
    welcome_for,
)
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.real_engine, pytest.mark.asyncio(loop_scope="module")]

STALE = (
    "model.embed_tokens.weight",  # the tied head, too
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tied=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model_dir: Path) -> AsyncIterator[VLLMEngine]:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    sockets = _sockets()
    engine = VLLMEngine()
    await engine.start(welcome_for(model_dir, engine_metrics_s=15.0))
    yield engine
    started = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    await engine.stop()
    left = [process for process in started if process.is_running() and "resource_tracker" not in _command(process)]
    assert not left, f"still running after stop: {[_command(process) for process in left]}"
    assert _sockets() <= sockets, "sockets of vLLM are left behind"


def _sockets() -> set[Path]:
    return {path for path in Path(tempfile.gettempdir()).iterdir() if path.is_socket()}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


async def test_logprobs_after_each_update_are_those_of_the_new_version(
    engine: VLLMEngine, model_dir: Path, tmp_path: Path
) -> None:
    previous: Any = None
    for seed in (1, 2, 3, 4):
        model = random_model(model_dir, seed)
        version = await load(engine, tensors_of(model), tmp_path)
        for temperature in (1.0, 0.7):
            generated = await generate_all(engine, temperature)
            assert differences(model, generated, temperature).max() < BOUND
            assert all(one.spans == ((version, 0),) for one in generated)
            if previous is not None:
                assert differences(previous, generated, temperature).mean() > 1000 * BOUND
            if temperature != 1.0:  # the logprobs are those after temperature
                assert differences(model, generated, 1.0).mean() > 1000 * BOUND
        previous = model


@pytest.mark.parametrize("name", STALE)
async def test_one_stale_tensor_moves_logprobs_beyond_the_bound(
    engine: VLLMEngine, model_dir: Path, tmp_path: Path, name: str
) -> None:
    old, new = random_model(model_dir, 11), random_model(model_dir, 12)
    await load(engine, tensors_of(new) | {name: tensors_of(old)[name]}, tmp_path)
    assert differences(new, await generate_all(engine, 1.0), 1.0).max() > 100 * BOUND
    await load(engine, tensors_of(new), tmp_path)
    assert differences(new, await generate_all(engine, 1.0), 1.0).max() < BOUND


async def test_updates_in_flight_leave_true_spans(engine: VLLMEngine, model_dir: Path, tmp_path: Path) -> None:
    models, generated = await updates_while_generating(engine, model_dir, tmp_path, seed=21, max_tokens=80)

    assert max(len(one.spans) for one in generated) >= 2
    for one in generated:
        versions, starts = zip(*one.spans, strict=True)
        assert starts[0] == 0
        assert list(starts) == sorted(set(starts))
        assert starts[-1] < len(one.token_ids)
        assert list(versions) == sorted(set(versions))
        assert set(versions) <= set(models)
    # What the first version drew is exact; later tokens attend to keys and values of older versions (kv = keep).
    for prompt, one in zip(PROMPTS, generated, strict=True):
        version, start, end = spans_with_ends(one)[0]
        assert span_difference(models[version], prompt, one, start, end) < BOUND


async def test_engine_tells_vllms_own_metrics(engine: VLLMEngine) -> None:
    def drawn(text: str) -> float:
        assert families_of(text, "actor-0"), "the learner takes it"
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= set(families)
        return sum(sample.value for sample in families["vllm:generation_tokens"].samples)

    before = drawn(engine.metrics())
    generated = await generate_all(engine, 1.0)
    text = engine.metrics()
    assert drawn(text) - before == sum(len(one.token_ids) for one in generated)
    assert all(line.startswith(("vllm:", "# HELP vllm:", "# TYPE vllm:")) for line in text.splitlines())
    assert len(pack(text)) < MAX_PACKED_BYTES / 8 and unpack(pack(text)) == text


async def test_generate_is_repeatable_and_ends_as_it_says(engine: VLLMEngine) -> None:
    first, second = await generate_all(engine, 1.0, 40, seed=5), await generate_all(engine, 1.0, 40, seed=5)
    assert [one.token_ids for one in first] == [one.token_ids for one in second]
    assert [one.token_ids for one in first] != [one.token_ids for one in await generate_all(engine, 1.0, 40, seed=6)]
    for one in first:
        ended = one.token_ids[-1] == 2  # "<|im_end|>" is among the tokens
        assert one.finish_reason == ("stop" if ended else "length")
        assert ended or len(one.token_ids) == 40


async def test_prompts_beyond_one_batch_keep_their_seeds(engine: VLLMEngine) -> None:
    """vLLM 0.32's CPU engine dies of a seeded request whose prompt is processed in two pieces."""
    prompts = [(7, *range(3, 153), i) for i in range(ENGINE["max_running"])]
    assert sum(map(len, prompts)) > BATCHED_TOKENS

    async def draw() -> list[list[int]]:
        requests = (engine.generate(f"{i}", one, Sampling(max_tokens=4), i, f"{i}") for i, one in enumerate(prompts))
        return [one.token_ids for one in await asyncio.gather(*requests)]

    assert await draw() == await draw()


async def test_generate_cancelled_aborts_inside_the_engine(engine: VLLMEngine) -> None:
    sampling = Sampling(max_tokens=150)
    task = asyncio.ensure_future(engine.generate("cancelled", PROMPTS[0], sampling, 0, "salt"))
    async with asyncio.timeout(60):
        while not engine._llm.get_num_unfinished_requests():  # noqa: ASYNC110 - vLLM tells nobody
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine._llm.get_num_unfinished_requests() == 0
    assert len(await generate_all(engine, 1.0)) == len(PROMPTS)


async def test_prompt_beyond_the_context_is_refused_and_the_engine_serves_on(engine: VLLMEngine) -> None:
    with pytest.raises(ValueError, match=str(MAX_MODEL_LEN)):
        await engine.generate("long", tuple([5] * (MAX_MODEL_LEN + 1)), Sampling(max_tokens=4), 0, "salt")
    assert len(await generate_all(engine, 1.0)) == len(PROMPTS)
