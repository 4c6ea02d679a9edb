"""Checkpoints: fp32 master weights, optimizer moments and the loop's own state, written whole or not at all.

A checkpoint is a directory of two safetensors files and `state.json`, which lists the files with sizes and digests.
Its name is `step-00000012`, on a branch that a roll-back has opened `step-00000012-b1`: it never takes the place of one
of an older branch, and the newest is that of the highest branch, and there of the highest step. It is written under a
temporary name, synced, then renamed, so a directory of the final name is complete unless the disk lost something, and
then `load` says so. No pickle. Training draws no random numbers (dropout is off, orders depend on seeds), so weights,
moments and the loop's state are all that a run consists of.

The files hold whole tensors, however many ranks the learner has: rank 0 writes them, and every rank takes its parts out
of them, so that a run may go on with another number of ranks.

Called by the loop (through `trainer.py`) between steps. Knows nothing of what the loop's state means.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from learner.model import PolicyModel
from learner.optim import Optimizer
from learner.sharding import gather, local, part_of
from learner.tensor_files import describe, read_tensors, write_tensors

FORMAT = 1
WEIGHTS, MOMENTS, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"step-(\d{8,})(?:-b(\d+))?")


def save(
    directory: Path,
    step: int,
    model: PolicyModel,
    optimizer: Optimizer,
    state: dict[str, Any],
    keep: int,
    good: bool = True,
    branch: int = 0,
    sound_step: int | None = None,
) -> Path:
    """Write the checkpoint of a step and leave only the newest `keep` checkpoints, and of the good ones those from the
    newest on that is of `sound_step` or before. What earlier branches have behind the beginning of `branch` is no part
    of the run any more, and goes.

    `state` is the loop's own, anything that JSON can hold. A checkpoint of the same step and branch is replaced.
    `good`: whether a run that went wrong may go back to it, as far as is known now. Returns the checkpoint's path.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _clean_up(directory)
    final = directory / (f"step-{step:08d}" + (f"-b{branch}" if branch else ""))
    temporary = directory / f".{final.name}"
    temporary.mkdir()
    weights, moments = _tensors(model, optimizer)
    write_tensors(weights, temporary / WEIGHTS)
    write_tensors(moments, temporary / MOMENTS)
    files = {name: describe(temporary / name) for name in (WEIGHTS, MOMENTS)}
    header = {"format": FORMAT, "step": step, "good": good, "files": files, "state": state}
    (temporary / STATE).write_text(json.dumps(header, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if final.exists():
        final.rename(directory / f".old-{final.name}")
    temporary.rename(final)
    _sync(directory)
    fork = min(step_of(path) for path in _checkpoints(directory) if _place(path)[0] == branch)
    for old in _checkpoints(directory):
        if _place(old)[0] < branch and step_of(old) > fork:
            shutil.rmtree(old)
    candidates = _good(directory)
    proven = _newest(candidates, sound_step)
    to_go_back_to = candidates[candidates.index(proven) :] if proven else []
    for old in _checkpoints(directory)[:-keep]:
        if old not in to_go_back_to:
            old.rename(directory / f".old-{old.name}")
    _clean_up(directory)
    return final


def take_part(model: PolicyModel, optimizer: Optimizer) -> None:
    """Every rank but 0, while that one is in `save`."""
    for tensors in _tensors(model, optimizer):
        gather(tensors.values())


def _tensors(model: PolicyModel, optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is written of weights and optimizer, in this order."""
    return dict(model.named_parameters()), optimizer.state_tensors()


def newest_good(directory: Path, at_most: int | None = None) -> Path | None:
    """The newest checkpoint that was written as a good one, of step `at_most` or before; the oldest good one if all are
    later, None if there is none at all."""
    return _newest(_good(directory), at_most)


def _newest(good: list[Path], at_most: int | None) -> Path | None:
    early = [path for path in good if at_most is None or step_of(path) <= at_most]
    return early[-1] if early else next(iter(good), None)


def _good(directory: Path) -> list[Path]:
    return [path for path in _checkpoints(directory) if _read_header(path).get("good", True)]


def _clean_up(directory: Path) -> None:
    """Remove what a `save` left that was cut short, and old checkpoints; one that nothing has replaced is put back."""
    for old in directory.glob(".old-step-*"):
        path = directory / old.name.removeprefix(".old-")
        if _place(path) > max(map(_place, _checkpoints(directory)), default=(-1, -1)):
            old.rename(path)
    for left_over in [*directory.glob(".old-step-*"), *directory.glob(".step-*")]:
        shutil.rmtree(left_over)


def load(path: Path, model: PolicyModel, optimizer: Optimizer) -> dict[str, Any]:
    """Put a checkpoint back into model and optimizer, bit for bit. Returns the loop's state.

    Everything is read and checked before anything is changed. Raises ValueError, naming the file, for a checkpoint
    that is incomplete, truncated, altered, of another format or of another model.
    """
    header = _read_header(path)
    tensors = {name: read_tensors(path / name, header["files"].get(name)) for name in (WEIGHTS, MOMENTS)}
    weights = tensors[WEIGHTS]
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        different = sorted(weights.keys() ^ parameters.keys())
        raise ValueError(f"{path / WEIGHTS}: holds another model: {', '.join(different[:5])} on one side only")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"{path / WEIGHTS}, {name}: found shape {list(weights[name].shape)}, expected {list(parameter.shape)}"
            )
    optimizer.load_state_tensors(tensors[MOMENTS])
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(local(part_of(weights[name], parameter)))
    return header["state"]


def latest(directory: Path) -> Path | None:
    """The newest checkpoint, None if there is none. Looks at names only: `load` refuses a damaged one, it is never
    passed over in silence for an older one."""
    if directory.is_dir():
        _clean_up(directory)
    found = _checkpoints(directory)
    return found[-1] if found else None


def _checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if NAME.fullmatch(path.name)), key=_place)


def _place(path: Path) -> tuple[int, int]:
    """(branch, step) of a checkpoint's name: the order of the run."""
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[2] or 0), int(match[1])


def step_of(path: Path) -> int:
    """Steps that a checkpoint's weights have seen."""
    return _place(path)[1]


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / STATE}: not a complete checkpoint: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise ValueError(f"{path / STATE}: found checkpoint format {found!r}, this version reads {FORMAT}")
    return header


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
