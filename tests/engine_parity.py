"""Compares a real engine with transformers, in float32, on models of random weights, for the tests that start vLLM.

`BOUND` is what "the same" means: both sides compute in float32, and the largest difference seen is 3e-6 nats. Weights
of different seeds differ by whole nats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from actor.engine import Generated
from actor.vllm_engine import VLLMEngine
from protocol.messages import Manifest, Sampling, Welcome

BOUND = 1e-4
"""Nats a token."""
MAX_MODEL_LEN = 192
PROMPTS = tuple(tuple(range(3 + 7 * i, 9 + 10 * i)) for i in range(6))
ENGINE = {"kv_cache_gib": 0.25, "max_running": 16, "enforce_eager": True, "threads": 0}


def welcome_for(model: Path, **changes: Any) -> Welcome:
    fields: dict[str, Any] = {
        "run": "test", "model": str(model), "dtype": "float32", "max_model_len": MAX_MODEL_LEN, "bulk": "", "news": "",
        "heartbeat_s": 1.0, "dead_after_s": 15.0, "seed": 0, "group_size": 8, "engine": ENGINE,
    }  # fmt: skip
    return Welcome(**(fields | changes))


def manifest_of(version: int) -> Manifest:
    """All that `VLLMEngine.load` reads of a manifest."""
    return Manifest(version=version, step=version, tensors=(), total_bytes=0, digest="")


def random_model(directory: Path, seed: int) -> Any:
    """A model of the directory's architecture with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
        with torch.no_grad():  # norms start as ones: a stale one would not show
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 2.0)
    return model.eval()


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Names as `save_pretrained` writes them: a tied head has no tensor of its own."""
    tied = model.config.tie_word_embeddings
    state = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


async def load(engine: VLLMEngine, tensors: dict[str, torch.Tensor], directory: Path) -> int:
    """Stage tensors as the next version and swap it in; return its number."""
    version = engine.version + 1
    staged = directory / f"staged-{version}.safetensors"
    save_file(tensors, staged)
    await engine.load(manifest_of(version), staged)
    return version


async def generate_all(engine: VLLMEngine, temperature: float, max_tokens: int = 12, seed: int = 0) -> list[Generated]:
    """One completion of every fixed prompt, all at once."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    requests = (
        engine.generate(f"v{engine.version}-{temperature}-{seed}-{i}", prompt, sampling, seed + i, str(engine.version))
        for i, prompt in enumerate(PROMPTS)
    )
    return list(await asyncio.gather(*requests))


@torch.no_grad()
def reference_logprobs(model: Any, prompt: Sequence[int], token_ids: Sequence[int], temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) of the given tokens, [len(token_ids)]."""
    logits = model(torch.tensor([[*prompt, *token_ids]])).logits[0].float()
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def differences(model: Any, generated: Sequence[Generated], temperature: float) -> torch.Tensor:
    """|engine - reference| of every token of the fixed prompts' completions, in nats."""
    parts = [
        torch.tensor(one.logprobs) - reference_logprobs(model, prompt, one.token_ids, temperature)
        for prompt, one in zip(PROMPTS, generated, strict=True)
    ]
    return torch.cat(parts).abs()


def spans_with_ends(one: Generated) -> list[tuple[int, int, int]]:
    """(version, first token, token after the last) of each span."""
    ends = [*(start for _, start in one.spans[1:]), len(one.token_ids)]
    return [(version, start, end) for (version, start), end in zip(one.spans, ends, strict=True)]


def span_difference(model: Any, prompt: Sequence[int], one: Generated, start: int, end: int) -> float:
    """Largest |engine - reference| at temperature 1 over tokens [start, end)."""
    expected = reference_logprobs(model, prompt, one.token_ids, 1.0)
    return float((torch.tensor(one.logprobs) - expected)[start:end].abs().max())


async def updates_while_generating(
    engine: VLLMEngine, directory: Path, staging: Path, seed: int, max_tokens: int
) -> tuple[dict[int, Any], list[Generated]]:
    """Swap in random versions for as long as a batch of completions runs. Returns version -> model, and the batch."""
    models: dict[int, Any] = {}

    async def next_version() -> None:
        model = random_model(directory, seed + len(models))
        models[await load(engine, tensors_of(model), staging)] = model

    await next_version()
    running = asyncio.ensure_future(generate_all(engine, 1.0, max_tokens))
    while not running.done():
        await next_version()
    return models, await running
