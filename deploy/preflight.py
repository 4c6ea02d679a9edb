"""Everything that can be known to be wrong before a process is started: what needs files, the model or the machine."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from actor.grading import check_user_functions
from actor.rewards import check_grader, user_functions_of
from deploy.gpu_memory import ModelShape, check_shared_gpu
from deploy.models import model_limits, resolve_model
from deploy.ray_cluster import check_ray_address
from learner.telemetry.exporter import check_address
from protocol.addresses import PORTS
from protocol.config import Recipe
from protocol.errors import RecipeError


def preflight(recipe: Recipe, progress: Callable[[str], None], ray_address: str = "") -> Path:
    """Check a recipe against this machine; returns the model's directory.

    Raises RecipeError naming the key, what was found and what is allowed.
    """
    for key, name in (("task.train", recipe.task.train), ("task.heldout", recipe.task.heldout)):
        if name and not Path(name).expanduser().is_file():
            raise RecipeError(f"{key}: found {name!r}, which is no file; allowed: an existing JSONL file")
    check_task_grader(recipe.task.grader)
    check_device(recipe)
    if recipe.needs_actors:
        check_ports(recipe.wire.address, recipe.wire.port)
    if recipe.metrics.serve:
        check_address(recipe)
    check_wandb(recipe)
    if ray_address:
        check_ray_address(ray_address)
    try:
        model = resolve_model(recipe.model.path, progress)
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from None
    limit = model_limits(model)
    if recipe.model.max_model_len > limit:
        raise RecipeError(
            f"model.max_model_len: found {recipe.model.max_model_len}, allowed: at most {limit}, the model's context"
        )
    check_task(recipe, model, progress)
    return model


def check_task_grader(spec: str) -> None:
    """Raise RecipeError unless the grader's spec is sound and its user functions can be imported in a new process."""
    try:
        check_grader(spec)
        if functions := user_functions_of(spec):
            check_user_functions(functions, os.getcwd())
    except ValueError as error:
        raise RecipeError(f"task.grader: {str(error).removeprefix('grader: ')}") from None


def check_task(recipe: Recipe, model: Path, progress: Callable[[str], None]) -> None:
    """Load the task as the learner will: data sets, splits and prompt lengths."""
    from transformers import AutoTokenizer

    from learner.intake.data import load_task

    progress("checking the task's data")
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    load_task(recipe, tokenizer)


def check_device(recipe: Recipe) -> None:
    """Raise RecipeError if the learner is to use a GPU that this machine has not."""
    if recipe.learner.device == "cuda" and not gpu_count():
        raise RecipeError('learner.device: found "cuda", but no GPU is visible here; allowed: "auto" or "cpu"')


def check_wandb(recipe: Recipe) -> None:
    """Raise RecipeError if Weights & Biases is asked for and cannot be had."""
    mode = recipe.metrics.wandb
    if mode != "off" and find_spec("wandb") is None:
        raise RecipeError(
            f'metrics.wandb: found "{mode}", but wandb is not installed; allowed: "off", or after `pip install wandb`'
        )
    if mode == "online" and (fault := _wandb_key_fault()):
        raise RecipeError(
            f'metrics.wandb: found "online", but {fault}; allowed: "offline" (`wandb sync` sends it later), or after'
            " `wandb login`, or with WANDB_API_KEY in the environment"
        )


def _wandb_key_fault() -> str:
    """What is wrong with the key that wandb finds here by itself; "" for nothing. Asks nobody."""
    import wandb

    try:
        return "" if wandb.login(prompt=False, verify=False) else "no key is known here"
    except wandb.Error as error:
        return f"its key cannot be used ({error})"


def check_gpu_memory(recipe: Recipe, model: Path, learner_gpus: Sequence[str], actor_gpus: Sequence[str]) -> None:
    """Raise RecipeError if learner and engines share this machine's only GPU and cannot fit it together."""
    if list(learner_gpus) != list(actor_gpus) or not learner_gpus or not recipe.actor.count or not gpu_count():
        return
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    check_shared_gpu(recipe, ModelShape.of(model), total)


def gpu_count() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_ports(host: str, port: int) -> None:
    """Raise RecipeError if the host is none of this machine's addresses, or one of the three ports is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in range(port, port + PORTS) if port else [0]:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, number))
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
                    raise RecipeError(
                        f"wire.host: found {host!r}, which is no address of this machine; allowed: one of its own"
                    ) from None
                which = "" if number == port else f", but {number} is needed, too (bulk and news follow work)"
                raise RecipeError(
                    f"wire.port: found {port}{which}, which cannot be bound on {host} ({error.strerror}); allowed: the"
                    f" first of {PORTS} free ports, or 0 for any"
                ) from None
