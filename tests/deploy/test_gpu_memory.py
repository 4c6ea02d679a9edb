"""What both sides need of one GPU, and what is said when they do not fit; figures of real models, no GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy import preflight
from deploy.gpu_memory import GIB, ModelShape, check_shared_gpu, count_parameters, engine_bytes, learner_bytes
from protocol.config import Recipe, parse_recipe
from protocol.errors import RecipeError
from tests.tiny_model import make_tiny_model

QWEN_HALF = ModelShape(494_032_768, 24, 896, 128)
"""Qwen2.5-0.5B: 2 key-value heads of 64."""
QWEN_7B = ModelShape(7_615_616_512, 28, 3584, 512)


def recipe(grpo: dict[str, object] | None = None, learner: dict[str, object] | None = None, **actor: object) -> Recipe:
    actor = {"gpus": 0.5} | actor
    return parse_recipe({"actor": actor, "grpo": grpo or {}, "learner": learner or {}}, "test")


def test_shape_is_read_from_a_models_directory(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory = make_tiny_model(tmp_path / "tiny")
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    shape = ModelShape.of(directory)
    assert shape.parameters == count_parameters(directory) == sum(p.numel() for p in network.parameters())
    assert (shape.layers, shape.hidden) == (network.config.num_hidden_layers, network.config.hidden_size)
    attention = network.model.layers[0].self_attn
    assert shape.kv_width == attention.k_proj.weight.shape[0]


def test_learner_needs_twenty_bytes_a_parameter_and_activations() -> None:
    plain = learner_bytes(recipe(), QWEN_HALF)
    activations = 2048 * 896 * (34 * 24 + 34)
    assert plain == 20 * QWEN_HALF.parameters + activations + 2 * GIB
    assert learner_bytes(recipe({"kl_coef": 0.1}), QWEN_HALF) == plain + 2 * QWEN_HALF.parameters
    less = learner_bytes(recipe(learner={"gradient_checkpointing": True}), QWEN_HALF)
    assert plain - less == 2048 * 896 * 32 * 24


def test_engine_needs_its_weights_and_one_completions_keys_and_values() -> None:
    per_token = 24 * 2 * 128 * 2
    assert per_token == 12_288
    assert engine_bytes(recipe(), QWEN_HALF) == 2 * QWEN_HALF.parameters + 256 * per_token + GIB


def test_small_model_fits_a_shared_gpu() -> None:
    check_shared_gpu(recipe(), QWEN_HALF, 24 * GIB)
    check_shared_gpu(recipe(count=2, gpus=0.25), QWEN_HALF, 40 * GIB)


def test_learner_that_does_not_fit_beside_the_engines_is_refused_with_what_would() -> None:
    with pytest.raises(
        RecipeError, match=r"found 0\.85, with which 1 engines take 6\.8 GiB .* leave 9\.2 GiB"
    ) as caught:
        check_shared_gpu(recipe(), QWEN_HALF, 16 * GIB)
    assert "the learner needs 12.7 GiB (0.49 billion parameters); allowed: at most 0.41" in str(caught.value)
    check_shared_gpu(recipe(gpu_memory_utilization=0.41), QWEN_HALF, 16 * GIB)
    with pytest.raises(RecipeError, match="allowed: a smaller model, or"):
        check_shared_gpu(recipe(), QWEN_7B, 80 * GIB)


def test_engine_that_cannot_hold_its_model_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"0\.85 of 0\.1 of a GPU, which is 6\.8 GiB of 80\.0 GiB for each engine"):
        check_shared_gpu(recipe(gpus=0.1), QWEN_7B, 80 * GIB)
    check_shared_gpu(recipe(gpus=0.1), replace(QWEN_7B, parameters=10**9), 80 * GIB)


@pytest.mark.parametrize(
    ("learner", "actors", "count", "refused"),
    [(["0"], ["0"], 1, True), (["1"], ["0"], 1, False), ([], [], 1, False), (["0"], ["0"], 0, False)],
)
def test_memory_is_checked_where_both_sides_have_the_same_gpu(
    learner: list[str], actors: list[str], count: int, refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setattr(preflight, "gpu_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=GIB))
    check = partial(preflight.check_gpu_memory, recipe(count=count), make_tiny_model(tmp_path / "tiny"))
    if refused:
        with pytest.raises(RecipeError, match=r"which is 0\.4 GiB of 1\.0 GiB for each engine"):
            check(learner, actors)
    else:
        check(learner, actors)
