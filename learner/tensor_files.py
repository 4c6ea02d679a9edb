"""Tensors in safetensors files of the run directory: written with a plain error, checked when they are read again.

Sharded tensors are put together one after the other as they are written: the other ranks take part (`sharding.gather`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.sharding import whole_of

READ_BYTES = 8 << 20


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Raises OSError, with what is needed and what is free, if the file cannot be written."""
    on_cpu = {name: whole_of(tensor).to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, path, metadata)
    except SafetensorError as error:
        needed = sum(tensor.nbytes for tensor in on_cpu.values())
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path}: cannot be written, {needed >> 20} MiB needed, {free >> 20} MiB free: {error}"
        ) from error


def read_tensors(path: Path, described: dict[str, Any] | None) -> dict[str, Tensor]:
    """Raises ValueError for a file that is missing, damaged or not the one that `describe` saw."""
    try:
        found = describe(path)
        if found != described:
            raise ValueError(f"{path}: found {found}, it was written with {described}: truncated or altered")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read whole: {error}") from error


def describe(path: Path) -> dict[str, Any]:
    """Size and digest of a file, to be compared when it is read again."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
