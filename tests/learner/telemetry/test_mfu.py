"""Model FLOPs against numbers computed by hand, and the table of peaks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.batch import Row, Sample
from learner.telemetry.mfu import PEAK_TFLOPS, MatmulShape, peak_flops, training_flops, utilization
from learner.trainer import Trainer
from protocol.rundir import RunDir
from tests.learner.test_loop import recipe_of
from tests.tiny_model import make_tiny_model


def row(prompt: int, *lengths: int) -> Row:
    zeros = [np.zeros(length) for length in lengths]
    return Row(tuple(range(prompt)), tuple(Sample(z, z, z.astype(bool), 0.0, z) for z in zeros))  # type: ignore[arg-type]


def test_shape_of_a_tied_model_counts_the_head_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "tied", tied=True))
    # a layer: q 64x128, k and v 64x64, o 128x64, three of 64x128 in the MLP, two norms of 64
    layer = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 128 + 2 * 64
    assert MatmulShape.of(network) == MatmulShape(259 * 64 + 2 * layer + 64, 2, 4 * 32)
    untied = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "untied", tied=False))
    assert MatmulShape.of(untied) == MatmulShape.of(network), "the table of embeddings is only looked up"


def test_flops_are_those_of_palms_appendix_b() -> None:
    shape = MatmulShape(parameters=1000, layers=2, attention_width=8)
    # one sequence of 10 positions: 6 N * 10 + 12 L H Q * 10 * 10
    assert training_flops(shape, [row(10, 1)]) == 6 * 1000 * 10 + 12 * 2 * 8 * 10 * 10
    # a prompt of 4 once, two completions of 3 and 6 tokens behind it, whose last ones are no inputs
    attended = 4 * 4 + 2 * (4 + 2) + 5 * (4 + 5)
    assert training_flops(shape, [row(4, 3, 6)]) == 6 * 1000 * (4 + 2 + 5) + 12 * 2 * 8 * attended
    assert training_flops(shape, [row(10, 1), row(4, 3, 6)]) == sum(
        training_flops(shape, [one]) for one in (row(10, 1), row(4, 3, 6))
    )
    assert math.isnan(training_flops(replace(shape, known=False), [row(10, 1)]))


@pytest.mark.parametrize(
    ("gpu", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.5), ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA L40S", 362.05), ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA RTX 6000 Ada Generation", 364.25), ("NVIDIA GH200 480GB", 990),
    ],
)  # fmt: skip
def test_peak_is_found_by_the_name_that_torch_reports(gpu: str, tera: float) -> None:
    assert peak_flops(gpu) == tera * 1e12


@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB MIG 3g.40gb", "Tesla T4", "AMD Instinct MI300X", ""])
def test_an_unknown_gpu_has_no_peak(gpu: str) -> None:
    assert peak_flops(gpu) is None and utilization(1e12, 1.0, gpu, 1) is None


def test_no_entry_of_the_table_hides_a_later_one() -> None:
    for words, tera in PEAK_TFLOPS:
        assert peak_flops(f"NVIDIA {words}") == tera * 1e12, words


def test_utilization_is_a_share_of_all_gpus() -> None:
    assert utilization(312e12, 2.0, "NVIDIA A100-SXM4-40GB", 1) == pytest.approx(0.5)
    assert utilization(312e12, 2.0, "NVIDIA A100-SXM4-40GB", 4) == pytest.approx(0.125)
    assert utilization(math.nan, 2.0, "NVIDIA A100-SXM4-40GB", 1) is None


def test_trainer_tells_it_on_known_gpus_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(recipe_of(), RunDir(tmp_path).create(), make_tiny_model(tmp_path / "tiny"))
    assert trainer.mfu(1e12, 1.0) == {}, "a CPU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    trainer.model.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    assert trainer.mfu(756.5e12, 2.0) == {}, "float32 has another peak"
    trainer.model.compute_dtype = torch.bfloat16
    assert trainer.mfu(756.5e12, 2.0) == {"mfu": pytest.approx(0.5)}
    trainer.ranks = SimpleNamespace(size=4)  # type: ignore[assignment]
    assert trainer.mfu(756.5e12, 2.0) == {"mfu": pytest.approx(0.125)}
