"""How a process becomes one of the learner's ranks, and leaves them: device, process groups, goodbye.

Called by `__main__.py`; `model.py` asks for the device of a learner of one process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from learner.processes import Place, RankLost
from learner.ranks import ALONE, STOP, Order, Ranks
from protocol.errors import RecipeError

log = logging.getLogger(__name__)

START_S = 300.0
"""Longest that the processes wait for each other at the start."""
WORK_S = 600.0
"""Longest wait for another rank within one collective operation: a forward or backward pass, or reading a checkpoint,
may lie between."""


@contextmanager
def joined(place: Place, device_name: str) -> Iterator[Ranks]:
    """This process among the learner's, for as long as the context lasts.

    Rank 0 tells the others to stop when it leaves, unless it leaves in the middle of an order. Raises RecipeError where
    there are too few GPUs, RankLost if the others do not come within START_S."""
    if place.size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    device = pick_rank_device(device_name, place)
    # What is not said to be elsewhere stays on this machine: gloo and NCCL would listen on the host's address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    ranks = Ranks(place.rank, place.size, device, place.ended)
    with ranks.named("the other ranks to start"):
        store = _meeting(place)
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=store, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=WORK_S),
            device_id=None if device.type == "cpu" else device,
        )  # fmt: skip
        ranks.open_control()
    log.info("rank %d of %d computes on %s", place.rank, place.size, device)
    sound = False
    try:
        yield ranks
        sound = True
    finally:
        if ranks.leads and not ranks.in_step:
            with suppress(RankLost):
                ranks.tell(Order(STOP))
        if sound or device.type == "cpu":  # NCCL would wait for what the lost ranks have not answered
            dist.destroy_process_group()


def _meeting(place: Place) -> Any:
    """Where the ranks find each other: a file of this machine, or what torchrun has set up."""
    import torch.distributed as dist

    if place.store is not None:
        store = dist.FileStore(str(place.store), place.size)
        store.set_timeout(timedelta(seconds=START_S))
        return store
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, place.size, is_master=False, timeout=timedelta(seconds=START_S))


def pick_rank_device(name: str, place: Place) -> torch.device:
    """The GPU of this rank, which becomes the current one; or the CPU, where there is none or the recipe wants it."""
    device = pick_device(name)
    if device.type == "cpu":
        return device
    if place.size > torch.cuda.device_count():
        raise RecipeError(
            f"learner.processes: found {place.size}, allowed: at most {torch.cuda.device_count()}, the GPUs that the"
            ' learner sees (learner.device = "cpu" is for tests)'
        )
    torch.cuda.set_device(place.rank)
    return torch.device("cuda", place.rank)


def pick_device(name: str) -> torch.device:
    """ "auto": CUDA where it exists. Raises ValueError for "cuda" where it does not."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError('learner.device: found "cuda", but torch sees no GPU; allowed here: "cpu", "auto"')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
