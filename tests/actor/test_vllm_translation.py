"""What goes into vLLM and what comes out of it, translated: no engine is started here."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actor.vllm_engine import (
    BATCHED_TOKENS,
    EngineSettings,
    compute_dtype,
    engine_arguments,
    environment,
    to_generated,
)
from protocol.errors import EngineFailed
from tests.engine_parity import welcome_for


@dataclass
class Span:
    version: str
    start: int
    end: int


@dataclass
class Logprob:
    logprob: float


@dataclass
class Completion:
    """The part of vLLM's `CompletionOutput` that is read."""

    token_ids: tuple[int, ...]
    logprobs: list[dict[int, Logprob]] | None
    weight_versions: list[Span] | None
    finish_reason: str = "stop"
    text: str = "ab"


def completion(**changes: Any) -> Completion:
    fields: dict[str, Any] = {
        "token_ids": (8, 9, 2),
        "logprobs": [{8: Logprob(-1.0)}, {9: Logprob(-2.0), 4: Logprob(-0.1)}, {2: Logprob(0.0)}],
        "weight_versions": [Span("3", 0, 1), Span("12", 1, 3)],
    }
    return Completion(**(fields | changes))


def test_completion_is_translated() -> None:
    one = to_generated("id", completion())
    assert one.token_ids == [8, 9, 2]
    assert one.logprobs == [-1.0, -2.0, 0.0]
    assert one.spans == ((3, 0), (12, 1))
    assert (one.finish_reason, one.text) == ("stop", "ab")


def test_empty_completion_has_no_spans() -> None:
    one = to_generated("id", completion(token_ids=(), logprobs=None, weight_versions=None, finish_reason="abort"))
    assert (one.token_ids, one.logprobs, one.spans) == ([], [], ())


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": None},
        {"logprobs": [{8: Logprob(-1.0)}, {9: Logprob(-1.0)}]},
        {"logprobs": [{8: Logprob(-1.0)}, {4: Logprob(-1.0)}, {2: Logprob(-1.0)}]},  # not the sampled token's
        {"logprobs": [{8: Logprob(-1.0)}, {9: Logprob(-math.inf)}, {2: Logprob(-1.0)}]},
        {"logprobs": [{8: Logprob(-1.0)}, {9: Logprob(math.nan)}, {2: Logprob(-1.0)}]},
        {"weight_versions": None},
        {"weight_versions": [Span("3", 0, 2)]},
        {"weight_versions": [Span("3", 1, 3)]},
        {"weight_versions": [Span("3", 0, 1), Span("4", 2, 3)]},
    ],
)
def test_completion_without_true_logprobs_and_versions_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(EngineFailed, match="request id"):
        to_generated("id", completion(**changes))


def test_settings_take_what_concerns_the_engine() -> None:
    settings = EngineSettings.of(welcome_for(Path("m"), engine={"max_running": 7, "kv_cache_gib": 0.5, "newer": 1}))
    assert (settings.max_running, settings.kv_cache_gib, settings.threads) == (7, 0.5, 0)


def test_cpu_engine_takes_its_cache_in_bytes_and_never_cuts_a_prompt() -> None:
    welcome = welcome_for(Path("m"), max_model_len=5000)
    arguments = engine_arguments(welcome, EngineSettings(kv_cache_gib=0.5), cuda=False, dtype="float32")
    assert arguments["kv_cache_memory_bytes"] == 1 << 29
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] == 5000 > BATCHED_TOKENS
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["load_format"] == "dummy"
    assert "gpu_memory_utilization" not in arguments


@pytest.mark.parametrize(
    ("gpus", "share", "parallel"), [(0.0, 0.8, None), (0.5, 0.4, None), (1.0, 0.8, None), (4.0, 0.8, 4)]
)
def test_gpu_engine_takes_its_share(gpus: float, share: float, parallel: int | None) -> None:
    settings = EngineSettings(gpu_memory_utilization=0.8, gpus=gpus)
    arguments = engine_arguments(welcome_for(Path("m")), settings, cuda=True, dtype="bfloat16")
    assert arguments["gpu_memory_utilization"] == pytest.approx(share)
    assert arguments.get("tensor_parallel_size") == parallel
    assert arguments.get("distributed_executor_backend") == ("mp" if parallel else None)
    assert "kv_cache_memory_bytes" not in arguments


def test_environment_names_the_actor_and_sets_threads_on_the_cpu_only() -> None:
    cpu = environment(EngineSettings(threads=3), cuda=False, errors=Path("/e"))
    assert cpu["OMP_NUM_THREADS"] == "3"
    assert cpu["TANDEM_ENGINE_PARENT"] == str(os.getpid())
    assert cpu["TANDEM_ENGINE_ERRORS"] == "/e"
    assert cpu["VLLM_RPC_BASE_PATH"] == "/", "vLLM's sockets go with the engine's directory"
    deep = environment(EngineSettings(), cuda=False, errors=Path("/", "d" * 66, "e"))
    assert "VLLM_RPC_BASE_PATH" not in deep, "a socket's path has at most 103 characters"
    assert environment(EngineSettings(), cuda=False, errors=Path())["OMP_NUM_THREADS"] == str(
        len(os.sched_getaffinity(0))
    )
    assert "OMP_NUM_THREADS" not in environment(EngineSettings(threads=3), cuda=True, errors=Path())


def test_bfloat16_is_widened_only_where_the_cpu_emulates_it() -> None:
    assert compute_dtype("bfloat16", cuda=False, native_bfloat16=False) == "float32"
    assert compute_dtype("bfloat16", cuda=False, native_bfloat16=True) == "bfloat16"
    assert compute_dtype("bfloat16", cuda=True, native_bfloat16=False) == "bfloat16"
    assert compute_dtype("float32", cuda=False, native_bfloat16=False) == "float32"
