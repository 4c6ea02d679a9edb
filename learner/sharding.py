"""A network whose weights are divided over the learner's ranks (FSDP2), and its tensors whole again.

Every rank holds of each tensor a part of the first dimension, as a DTensor: of the float32 masters, of the gradients
and of the optimizer's moments. A layer's weights are gathered for its forward and backward pass and dropped after it;
gradients are summed over the ranks, in float32. Called by `model.py`, `optim.py`, `checkpoint.py`, `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from learner.ranks import Ranks


class Whole(nn.Module):
    """A network with the head's arithmetic: all that one forward pass touches, so that FSDP sees it begin and end."""

    def __init__(self, network: nn.Module, forward: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.network = network
        self._compute = forward

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        return self._compute(*arguments)


def shard(whole: Whole, layers: Iterable[nn.Module], ranks: Ranks, dtype: torch.dtype) -> None:
    """Divide the weights over the ranks, in place and onto their devices: each layer for itself, all else together
    (so that tied embeddings stay tied). Forward and backward run in `dtype`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    # float32 masters are rounded once, to the compute type, before they are gathered; sums of gradients are float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(whole, mesh=mesh, mp_policy=policy)
    for module in _shards(whole):
        # The losses' denominators are those of the whole update, so gradients are summed and not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def reshard(whole: Whole) -> None:
    """Drop gathered weights: after a pass without gradients FSDP keeps the outermost ones, which may change now."""
    for module in _shards(whole):
        module.reshard()


def _shards(whole: Whole) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in whole.modules() if isinstance(module, FSDPModule))


@contextmanager
def holding(parameters: Mapping[str, Tensor], value: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within, this rank's part of every parameter holds `value(name, part)`; afterwards what it held before."""
    parts = {name: local(parameter) for name, parameter in parameters.items()}
    kept = {name: part.clone() for name, part in parts.items()}
    try:
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(value(name, kept[name]))
        yield
    finally:
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(kept[name])


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def whole_of(tensor: Tensor) -> Tensor:
    """A sharded tensor put together: all ranks call it, each gets all of it. Any other tensor as it is."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as a tensor sharded like `like` on its device; a copy on its device if that
    is not sharded. Every rank has the whole one: nothing is sent."""
    if not is_sharded(like):
        return tensor.to(like.device, copy=True)
    tensor = tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def gather(tensors: Iterable[Tensor]) -> None:
    """Take part in putting tensors together that another rank wants."""
    for tensor in tensors:
        whole_of(tensor)
