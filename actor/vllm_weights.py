"""Tandem as a vLLM weight-transfer backend: one staged safetensors file becomes the engine's weights.

Runs inside vLLM's worker processes, which find it through the entry point group `vllm.general_plugins`; the actor's
side of it is `VLLMEngine.load`. It knows nothing of versions, sockets or manifests: the file is complete and checked.

vLLM replaces weights layer by layer (`model_executor/model_loader/reload/layerwise.py`): tensors are collected until a
layer has all of them, then the layer is rebuilt, repacked for its kernels, and copied over the old storage. Two things
it leaves to luck, and this backend does not: a layer that got no tensor keeps its old weights with a line in the log,
and a layer whose weight is tied to another's keeps kernels that were packed from the old weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, cast

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from actor import vllm_children

BACKEND = "tandem"

Named = Iterable[tuple[str, torch.Tensor]]


def register() -> None:
    """Entry point of `vllm.general_plugins`: vLLM calls it in every one of its processes, sometimes twice."""
    vllm_children.adopt()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, StagedFileWeights)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to set up: the file is the transport."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    path: str
    """Safetensors file with every tensor of the model, named as `save_pretrained` names them."""


class StagedFileWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads one file between `start_weight_update` and `finish_weight_update`. A failure leaves the model unusable."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    _ties: list[list[torch.nn.Module]]
    _followers: list[torch.nn.Module]

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self._ties = tied_modules(self.model)
        self._followers = []
        layerwise.initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronizes whatever accelerator there is and raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load the whole file. Raises ValueError naming what the file lacks, and what the model did not take."""
        with safe_open(update_info.path, framework="pt") as file:
            names = list(file.keys())
            untaken = load_tensors(self.model, ((name, file.get_tensor(name)) for name in names))
        missing, self._followers = unwritten(self.model, self._ties, set(names))
        faults = []
        if missing:
            faults.append(f"no tensor for {', '.join(missing)}")
        if untaken:
            faults.append(f"the model does not take {', '.join(untaken)}")
        if faults:
            raise ValueError(f"{update_info.path}: {'; '.join(faults)}")

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        with _without_warnings(layerwise.logger):  # of layers without tensors: `unwritten` judged them already
            layerwise.finalize_layerwise_reload(self.model, self.model_config)
        for module in self._followers:
            repack(module)

    def shutdown(self) -> None:
        pass


# --- what was loaded ------------------------------------------------------------------------------------------------


def load_tensors(model: torch.nn.Module, tensors: Named) -> list[str]:
    """Feed `tensors` to a model under layerwise reload; return the names that went into no parameter.

    A model drops some names silently (unexpected biases, for example), hence the count at the parameters themselves.
    """
    progress = _Progress()
    with _watched(model, progress):
        cast(Any, model).load_weights(progress.follow(tensors))  # every model of vLLM's has it, nn.Module has not
    return [name for name in progress.offered if name not in progress.taken]


def unwritten(
    model: torch.nn.Module, ties: list[list[torch.nn.Module]], given: set[str]
) -> tuple[list[str], list[torch.nn.Module]]:
    """What a model under layerwise reload still lacks, before the reload is finalized.

    Returns the names of the tensors that should have come (as in the checkpoint where the model says how it packs
    them), and the modules that got none but share the storage of a module that is complete.
    """
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    incomplete = {
        module: name
        for name, module in model.named_modules()
        if not is_deferred_attention_layer(module) and not is_written(module)
    }
    missing: list[str] = []
    followers: list[torch.nn.Module] = []
    for module, name in incomplete.items():
        info = layerwise.get_layerwise_info(module)
        leads = [other for group in ties if module in group for other in group if other not in incomplete]
        if info.load_numel == 0 and leads:
            followers.append(module)
            continue
        wanted = [
            candidate
            for parameter in loadable(module)
            for candidate in checkpoint_names(f"{name}.{parameter}" if name else parameter, packed)
        ]
        absent = [candidate for candidate in wanted if candidate not in given]
        missing += absent or [f"{name} ({info.load_numel} of {expected_numel(module)} elements)"]
    return missing, followers


def is_written(module: torch.nn.Module) -> bool:
    """Whether every element of the module's own parameters was loaded."""
    info = layerwise.get_layerwise_info(module)
    return not info.can_load() or info.load_numel >= expected_numel(module)


def expected_numel(module: torch.nn.Module) -> int:
    """Elements that a checkpoint has for the module's own parameters on this rank, padding left out."""
    return sum(_checkpoint_numel(module, parameter) for parameter in loadable(module).values())


def _checkpoint_numel(module: torch.nn.Module, parameter: torch.Tensor) -> int:
    numel = get_tensor_load_numel(parameter)
    if isinstance(module, VocabParallelEmbedding):  # vLLM pads the vocabulary to a multiple of 64
        return numel // module.num_embeddings_per_partition * module.shard_indices.num_org_elements
    return numel


def loadable(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = module._parameters.items()
    return {name: parameter for name, parameter in own if parameter is not None and name not in SKIP_LOAD_TENSORS}


def checkpoint_names(parameter: str, packed: dict[str, list[str]]) -> list[str]:
    """`a.qkv_proj.weight` -> `a.q_proj.weight`, ... for a model with {"qkv_proj": ["q_proj", ...]}."""
    parts = parameter.split(".")
    for index, part in enumerate(parts):
        if part in packed:
            return [".".join([*parts[:index], piece, *parts[index + 1 :]]) for piece in packed[part]]
    return [parameter]


@dataclass
class _Progress:
    """Which of the tensors offered to a model went into a parameter."""

    offered: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def follow(self, tensors: Named) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self.offered.append(name)
            yield name, tensor

    def watch(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(loader)  # vLLM tells its own wrapper by name and unwraps it: stay transparent
        def watching(*args: Any, **kwargs: Any) -> Any:
            self.taken.add(self.offered[-1])
            return loader(*args, **kwargs)

        return watching


@contextmanager
def _watched(model: torch.nn.Module, progress: _Progress) -> Iterator[None]:
    originals: list[tuple[Any, Callable[..., Any]]] = []
    for module in model.modules():
        for parameter in loadable(module).values():
            loader = getattr(parameter, "weight_loader", None)
            if loader is not None:
                originals.append((parameter, loader))
    try:
        for parameter, loader in originals:
            parameter.weight_loader = progress.watch(loader)
        yield
    finally:  # vLLM reuses these parameters for the next update
        for parameter, loader in originals:
            parameter.weight_loader = loader


# --- tied weights ---------------------------------------------------------------------------------------------------


def tied_modules(model: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """Groups of modules that hold one and the same parameter, such as an embedding and its tied head."""
    holders: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        for parameter in loadable(module).values():
            holders.setdefault(id(parameter), []).append(module)
    return [group for group in holders.values() if len(group) > 1]


def repack(module: torch.nn.Module) -> None:
    """Have a module prepare its kernels again from its weight (the CPU build multiplies by a packed copy of it)."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        module.__dict__.pop("_already_called_process_weights_after_loading", None)
        method.process_weights_after_loading(module)


@contextmanager
def _without_warnings(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
