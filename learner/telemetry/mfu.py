"""Model FLOPs utilization: what the learner's GPUs did for the model, as a share of what they could have done. Pure.

    FLOPs a token, forward and backward = 6 N + 12 L H Q T

(Chowdhery et al. 2022, "PaLM", appendix B): N parameters in matrix products, L layers, H heads of Q dimensions, T
tokens that are attended to, causal or not. What is not the model's own is not counted: padding, recomputation in
backward, prompts that are computed once more because a row was split, the forward passes for old and reference
logprobs. So the figure is the lower for each of them. Called by `learner/step.py` and `trainer.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learner.batch import Row

TERA = 1e12

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    # NVIDIA's data sheets and architecture white papers, November 2026; half of what they give "with sparsity"
    ("B200", 2250.0),  # HGX B200
    ("GH200", 990.0),
    ("H200 NVL", 835.5),
    ("H200", 989.5),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.5),  # SXM: torch calls it "NVIDIA H100 80GB HBM3"
    ("H800", 989.5),
    ("A100", 312.0),  # SXM and PCIe
    ("A800", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.05),
    ("L40", 181.05),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.25),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),  # GeForce: with accumulation in float32, half of that in float16
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
"""Words in a GPU's name, as torch reports it -> dense bfloat16 TFLOP/s of its tensor cores. The first that fits."""


@dataclass(frozen=True)
class MatmulShape:
    """Of a model, what its FLOPs depend on."""

    parameters: int
    """That take part in matrix products: a table that is only looked up does not, a tied head does."""
    layers: int
    attention_width: int
    """Heads times their dimensions."""
    known: bool = True
    """False for a mixture of experts, of which a token sees a part, and for a model without attention."""

    @classmethod
    def of(cls, network: Any) -> MatmulShape:
        """Of a causal language model of transformers, unsharded."""
        config, table = network.config.get_text_config(), network.get_input_embeddings().weight
        head = network.get_output_embeddings()
        tied = head is not None and head.weight is table
        heads = getattr(config, "num_attention_heads", 0)
        return cls(
            parameters=sum(p.numel() for p in network.parameters()) - (0 if tied else table.numel()),
            layers=config.num_hidden_layers,
            attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0,
            known=bool(heads) and not getattr(config, "num_experts_per_tok", 0),
        )


def training_flops(shape: MatmulShape, rows: Iterable[Row]) -> float:
    """FLOPs of one forward and backward pass over rows, each prompt once; NaN where the formula does not hold."""
    if not shape.known:
        return math.nan
    positions = attended = 0
    for row in rows:
        prompt = len(row.prompt_ids)
        inputs = [sample.num_tokens - 1 for sample in row.samples]  # nothing is predicted from the last token
        positions += prompt + sum(inputs)
        attended += prompt * prompt + sum(own * (prompt + own) for own in inputs)
    return 6.0 * shape.parameters * positions + 12.0 * shape.layers * shape.attention_width * attended


def peak_flops(gpu: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name; None for one that is not known, or for a slice of one (MIG)."""
    if re.search(r"\bMIG\b", gpu):
        return None
    for words, tera in PEAK_TFLOPS:
        if re.search(rf"\b{words}\b", gpu, re.IGNORECASE):
            return tera * TERA
    return None


def utilization(flops: float, seconds: float, gpu: str, gpus: int) -> float | None:
    """Share of the peak of `gpus` GPUs of one name; None where it is not known."""
    peak = peak_flops(gpu)
    return flops / (seconds * gpus * peak) if peak and seconds > 0 and math.isfinite(flops) else None
