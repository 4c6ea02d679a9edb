"""Tiny random models, random groups, and the slow mathematics that the learner's tests compare with. No test itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from learner.batch import Row, Sample
from learner.model import PolicyModel
from protocol.messages import Completion, Group, TicketId
from protocol.sections import LearnerConfig, ModelConfig

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_network(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """Random weights, large enough that attention and temperature matter. "qwen2" has tied embeddings and biases."""
    torch.manual_seed(0)
    if kind == "qwen2":
        network: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"tie_word_embeddings": True} | changes))
    else:
        network = LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": False} | changes))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:  # biases start at 0 and norms at 1, where mistakes do not show
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return network.eval()


def policy(
    kind: str = "llama", dtype: str = "float32", attention: str = "sdpa", checkpointing: bool = False, **changes: Any
) -> PolicyModel:
    network = tiny_network(kind, attn_implementation=attention, **changes)
    learner = LearnerConfig(device="cpu", gradient_checkpointing=checkpointing)
    return PolicyModel(network, ModelConfig(dtype=dtype, attention=attention), learner)


def tiny_directory(path: Path, kind: str = "llama", **changes: Any) -> Path:
    tiny_network(kind, **changes).save_pretrained(path)
    return path


def foreign_directory(path: Path) -> Path:
    """A model of a family that nothing here was written for: parallel residual, partial rotary, untied head."""
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).save_pretrained(path)
    return path


def random_sample(random: np.random.Generator, length: int, advantage: float | None = None) -> Sample:
    return Sample(
        token_ids=random.integers(0, VOCABULARY, length, dtype=np.int32),
        engine_logprobs=random.normal(-4.0, 1.0, length).astype(np.float32),
        mask=random.random(length) < 0.8,
        advantage=float(random.normal()) if advantage is None else advantage,
        lag=random.integers(0, 3, length, dtype=np.int32),
    )


def random_rows(temperature: float = 0.7, seed: int = 0) -> tuple[Row, ...]:
    """Prompts and completions of many lengths, among them single tokens."""
    random = np.random.default_rng(seed)
    lengths = ((5, (4, 1, 6)), (11, (3, 3)), (1, (2, 5, 7, 1)), (8, (9,)))

    def row(prompt: int, completions: tuple[int, ...]) -> Row:
        ids = tuple(random.integers(0, VOCABULARY, prompt).tolist())
        return Row(ids, tuple(random_sample(random, n) for n in completions), temperature)

    return tuple(row(prompt, completions) for prompt, completions in lengths)


def plain_distributions(network: PreTrainedModel, row: Row, sample: Sample) -> Tensor:
    """[T, V] log-probabilities of one completion: the model's own forward over this sequence alone."""
    tokens = torch.tensor([[*row.prompt_ids, *sample.token_ids.tolist()]])
    logits = network(input_ids=tokens, use_cache=False).logits[0].float()
    return torch.log_softmax(logits / row.temperature, -1)[len(row.prompt_ids) - 1 : -1]


def plain_logprobs(network: PreTrainedModel, row: Row, sample: Sample) -> Tensor:
    """[T] of one completion, one sequence at a time."""
    tokens = torch.from_numpy(sample.token_ids.astype(np.int64))
    return plain_distributions(network, row, sample).gather(-1, tokens[:, None])[:, 0]


def make_group(
    rewards: list[float], lengths: list[int], spans: list[tuple[tuple[int, int], ...]] | None = None, index: int = 0,
    temperature: float = 1.0, seed: int = 0,
) -> Group:  # fmt: skip
    """A group as it comes over the wire, its buffers random, its last completion cut off by length."""
    random = np.random.default_rng([seed, index])
    total = sum(lengths)
    spans = spans or [((1, 0),)] * len(lengths)
    reasons = ["stop"] * (len(lengths) - 1) + ["length"]
    return Group(
        id=TicketId(0, index), kind="train", attempt=1, actor="actor-0", temperature=temperature,
        prompt_ids=tuple(random.integers(0, VOCABULARY, 4 + index).tolist()),
        completions=tuple(
            Completion(n, span, reason, {"reward": reward})
            for n, span, reason, reward in zip(lengths, spans, reasons, rewards, strict=True)
        ),
        token_ids=random.integers(0, VOCABULARY, total).astype("<i4").tobytes(),
        logprobs=random.normal(-4.0, 0.5, total).astype("<f4").tobytes(),
        mask=np.ones(total, np.uint8).tobytes(),
    )  # fmt: skip
