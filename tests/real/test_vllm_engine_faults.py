"""What `make test` has no engine starts left for: recomputed keys and values, failing loads, starts and processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from actor.vllm_engine import VLLMEngine
from protocol.errors import EngineFailed
from tests.engine_parity import (
    BOUND,
    ENGINE,
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

pytestmark = pytest.mark.real_engine
in_module_loop = pytest.mark.asyncio(loop_scope="module")  # the shared engine's

GONE_TIMEOUT_S = 60


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("untied"), tied=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model_dir: Path) -> AsyncIterator[VLLMEngine]:
    engine = VLLMEngine()
    await engine.start(welcome_for(model_dir, kv="recompute"))
    yield engine
    await engine.stop()


@in_module_loop
@pytest.mark.parametrize("stale", ["", "lm_head.weight", "model.embed_tokens.weight"])
async def test_untied_head_and_embedding_are_updated_apart(
    engine: VLLMEngine, model_dir: Path, tmp_path: Path, stale: str
) -> None:
    old, new = random_model(model_dir, 1), random_model(model_dir, 2)
    await load(engine, tensors_of(old), tmp_path)
    await load(engine, tensors_of(new) | ({stale: tensors_of(old)[stale]} if stale else {}), tmp_path)
    difference = differences(new, await generate_all(engine, 1.0), 1.0).max()
    assert difference > 100 * BOUND if stale else difference < BOUND


@in_module_loop
async def test_recompute_gives_every_token_the_logprob_of_its_version(
    engine: VLLMEngine, model_dir: Path, tmp_path: Path
) -> None:
    models, generated = await updates_while_generating(engine, model_dir, tmp_path, seed=21, max_tokens=80)

    assert max(len(one.spans) for one in generated) >= 2
    for prompt, one in zip(PROMPTS, generated, strict=True):
        for version, start, end in spans_with_ends(one):
            assert span_difference(models[version], prompt, one, start, end) < BOUND


@in_module_loop
async def test_load_with_missing_and_unknown_tensors_names_them_and_condemns(
    engine: VLLMEngine, model_dir: Path, tmp_path: Path
) -> None:
    """Last with this engine: nothing is drawn from a mixture of versions."""
    tensors = tensors_of(random_model(model_dir, 3))
    version = engine.version
    missing = (
        "lm_head.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    )
    unknown = "model.layers.0.self_attn.q_proj.bias"
    wrong = {name: tensor for name, tensor in tensors.items() if name not in missing}
    wrong[unknown] = tensors["model.norm.weight"].clone()

    with pytest.raises(EngineFailed) as failure:
        await load(engine, wrong, tmp_path)

    for name in (*missing, unknown):
        assert name in str(failure.value)
    assert "q_proj.weight" not in str(failure.value)
    assert engine.version == version
    with pytest.raises(EngineFailed, match=r"lm_head\.weight"):
        await generate_all(engine, 1.0)


@in_module_loop
@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"max_model_len": 100_000}, r"max_model_len \(100000\) is greater than"),
        ({"engine": ENGINE | {"kv_cache_gib": 1e-6}}, "No available memory for the cache blocks"),
    ],
    ids=["found-in-the-actors-process", "found-in-the-engine-core"],
)
async def test_start_that_fails_says_why_and_leaves_no_process(
    model_dir: Path, changes: dict[str, object], cause: str
) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(EngineFailed, match=cause) as failure:
        await VLLMEngine().start(welcome_for(model_dir, **changes))
    assert "root cause" not in str(failure.value)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not [child for child in left if "resource_tracker" not in " ".join(child.cmdline())]


STAND_IN_FOR_AN_ACTOR = """
import asyncio, json, sys
from pathlib import Path
import psutil
from actor.vllm_engine import VLLMEngine
from tests.engine_parity import generate_all, load, random_model, tensors_of, welcome_for

async def main(model, staging):
    engine = VLLMEngine()
    await engine.start(welcome_for(model))
    await load(engine, tensors_of(random_model(model, 1)), staging)
    print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)
    try:
        while True:
            await generate_all(engine, 1.0, 40)
    except BaseException as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
    await engine.stop()

if __name__ == "__main__":  # vLLM's children import this script
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def start_actor(model_dir: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A process with a serving engine, and the engine's processes."""
    script = tmp_path / "actor_stand_in.py"
    script.write_text(STAND_IN_FOR_AN_ACTOR)
    root = str(Path(__file__).parents[2])
    actor = subprocess.Popen(
        [sys.executable, str(script), str(model_dir), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    return actor, [psutil.Process(pid) for pid in next_json(actor)]


def next_json(actor: subprocess.Popen[str]) -> list[object]:
    assert actor.stdout is not None
    for line in actor.stdout:  # vLLM logs to the same stream
        if line.startswith("["):
            return json.loads(line)
    raise AssertionError(f"the stand-in ended with {actor.wait()}")


def test_engine_dies_with_its_actor_even_by_sigkill(model_dir: Path, tmp_path: Path) -> None:
    actor, children = start_actor(model_dir, tmp_path)
    assert engine_core(children)
    actor.send_signal(signal.SIGKILL)
    actor.wait(GONE_TIMEOUT_S)
    _, alive = psutil.wait_procs(children, timeout=GONE_TIMEOUT_S)
    for process in alive:
        process.kill()
    assert not alive


def engine_core(children: list[psutil.Process]) -> psutil.Process:
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


def test_engine_core_that_is_killed_fails_the_requests_in_flight(model_dir: Path, tmp_path: Path) -> None:
    actor, children = start_actor(model_dir, tmp_path)
    try:
        engine_core(children).kill()
        kind, message = next_json(actor)
        assert kind == "EngineFailed"
        assert "EngineCore" in str(message)
        assert actor.wait(GONE_TIMEOUT_S) == 0
        _, alive = psutil.wait_procs(children, timeout=GONE_TIMEOUT_S)
        assert not alive
    finally:
        actor.kill()


@in_module_loop
async def test_start_can_be_tried_again_after_a_failure(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed):
        await VLLMEngine().start(welcome_for(model_dir, max_model_len=100_000))
    engine = VLLMEngine()
    try:
        await asyncio.wait_for(engine.start(welcome_for(model_dir)), 300)
        model = random_model(model_dir, 5)
        await load(engine, tensors_of(model), tmp_path)
        assert differences(model, await generate_all(engine, 1.0), 1.0).max() < BOUND
    finally:
        await engine.stop()
