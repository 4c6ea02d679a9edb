"""Tensor <-> (spec, buffer), without a copy. Loads torch only when a function that needs it is called."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocol.messages import TensorSpec

if TYPE_CHECKING:
    import torch

DTYPES: dict[str, tuple[int, str]] = {
    "bfloat16": (2, "BF16"),
    "float16": (2, "F16"),
    "float32": (4, "F32"),
    "float64": (8, "F64"),
    "int64": (8, "I64"),
    "int32": (4, "I32"),
    "int16": (2, "I16"),
    "int8": (1, "I8"),
    "uint8": (1, "U8"),
    "bool": (1, "BOOL"),
}
"""Name on the wire (as torch spells it) -> (bytes of one element, name in a safetensors header)."""


def item_bytes(spec: TensorSpec) -> int:
    """Bytes of one element. Raises ValueError for an unknown dtype."""
    if spec.dtype not in DTYPES:
        raise ValueError(f"tensor {spec.name}: dtype {spec.dtype!r}, allowed: {', '.join(DTYPES)}")
    return DTYPES[spec.dtype][0]


def nbytes(spec: TensorSpec) -> int:
    """Bytes of the tensor's buffer. Raises ValueError for an unknown dtype."""
    return math.prod(spec.shape) * item_bytes(spec)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype on the wire."""
    return str(dtype).removeprefix("torch.")


def tensor_view(spec: TensorSpec, buffer: torch.Tensor) -> torch.Tensor:
    """The tensor that `spec` describes inside a flat uint8 buffer, sharing its memory."""
    import torch

    flat = buffer[spec.offset : spec.offset + nbytes(spec)]
    return flat.view(getattr(torch, spec.dtype)).view(spec.shape)


def safetensors_header(tensors: Sequence[TensorSpec]) -> bytes:
    """Head of a safetensors file whose data part is the snapshot itself, offsets unchanged.

    Format: uint64 length (little-endian), JSON, padded with spaces so that the data is aligned to 8 bytes
    (https://github.com/huggingface/safetensors, "Format").
    """
    entries = {
        spec.name: {
            "dtype": DTYPES[spec.dtype][1],
            "shape": list(spec.shape),
            "data_offsets": [spec.offset, spec.offset + nbytes(spec)],
        }
        for spec in tensors
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
