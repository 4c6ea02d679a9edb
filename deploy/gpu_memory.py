"""Whether both sides fit the one GPU that they share, computed before anything starts. Arithmetic: docs/operations.md.

vLLM takes its share of a GPU whatever it needs; what the learner needs must fit beside it, and the engine's weights and
keys and values into the share. Estimates: they find what cannot work, not the last gigabyte.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.config import Recipe
from protocol.errors import RecipeError

STATE_BYTES = 20
"""A parameter of the learner: master weight 4, moments 8, gradient 4, rounded weight 2, version published last 2."""
REFERENCE_BYTES = 2
ACTIVATION_BYTES = 34
"""A token, layer and hidden unit, in 16 bits without attention's quadratic part (Korthikanti et al. 2022, equation 2),
which PyTorch's attention does not keep."""
KEPT_BYTES = 2
"""The same with gradient checkpointing: a layer's input alone."""
HEAD_BYTES = 1 << 30
"""Logits that backward keeps, and one chunk's in work: bounded whatever the batch (`learner/model.py`)."""
PROCESS_BYTES = 1 << 30
"""CUDA's context, libraries and workspaces of one process."""
GIB = 1 << 30


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on."""

    parameters: int
    layers: int
    hidden: int
    kv_width: int
    """Key-value heads times their size."""

    @classmethod
    def of(cls, model: Path) -> ModelShape:
        """Of a Hugging Face directory with config.json and safetensors."""
        config: dict[str, Any] = json.loads((model / "config.json").read_text())
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        size = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return cls(count_parameters(model), int(config["num_hidden_layers"]), hidden, kv_heads * size)


def count_parameters(model: Path) -> int:
    """Elements of all tensors of a directory's safetensors files, from their headers."""
    count = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def learner_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """What the learner needs at its largest, in the middle of a step."""
    reference = recipe.method == "dpo" or (recipe.method == "grpo" and recipe.grpo.kl_coef > 0)
    state = (STATE_BYTES + reference * REFERENCE_BYTES) * shape.parameters
    kept = KEPT_BYTES if recipe.learner.gradient_checkpointing else ACTIVATION_BYTES
    tokens = recipe.learner.microbatch_tokens
    activations = tokens * shape.hidden * (kept * shape.layers + ACTIVATION_BYTES)
    return state + activations + HEAD_BYTES + PROCESS_BYTES


def engine_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """What an engine must have to start: its weights, and keys and values of one completion of full length."""
    width = 4 if recipe.model.dtype == "float32" else 2
    one_completion = recipe.model.max_model_len * shape.layers * 2 * shape.kv_width * width
    return width * shape.parameters + one_completion + PROCESS_BYTES


def check_shared_gpu(recipe: Recipe, shape: ModelShape, total_bytes: int) -> None:
    """Raise RecipeError unless the learner and all actors fit one GPU of `total_bytes` bytes."""
    actor, key = recipe.actor, "actor.gpu_memory_utilization"
    part = min(actor.gpus, 1.0) * total_bytes
    each = actor.gpu_memory_utilization * part
    learner, engine = learner_bytes(recipe, shape), engine_bytes(recipe, shape)
    left = total_bytes - each * actor.count
    if engine > each:
        raise RecipeError(
            f"{key}: found {actor.gpu_memory_utilization:g} of {actor.gpus:g} of a GPU, which is {_gib(each)} of"
            f" {_gib(total_bytes)} for each engine; allowed: at least {_gib(engine)}, its weights and the keys and"
            " values of one completion. A larger actor.gpus gives it more"
        )
    if learner > left:
        most = math.floor(100 * (total_bytes - learner) / actor.count / part) / 100
        allowed = f"at most {most:.2f}" if most * part > engine else "a smaller model"
        raise RecipeError(
            f"{key}: found {actor.gpu_memory_utilization:g}, with which {actor.count} engines take"
            f" {_gib(each * actor.count)} of this machine's only GPU and leave {_gib(left)} of {_gib(total_bytes)};"
            f" the learner needs {_gib(learner)} ({shape.parameters / 1e9:.2f} billion parameters); allowed:"
            f" {allowed}, or fewer learner.microbatch_tokens, learner.gradient_checkpointing, or a second GPU"
        )


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
