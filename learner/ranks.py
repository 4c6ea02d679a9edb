"""The learner's processes ("ranks") among themselves: orders of rank 0, sums over all, who has ended.

Rank 0 owns the hub, the journal, the files and every decision. The others wait for its orders on a *control group*:
gloo on the CPU, apart from the group in which FSDP moves weights and gradients, so that nobody waits for a decision
inside a GPU collective. What crosses it is JSON and raw tensors, never pickle. A learner of one process has `ALONE`:
no process group, no cost, every call a plain return.

Called by `trainer.py` (orders) and `step.py` (shares and sums); made by `joining.py`. Knows no model.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from learner.processes import LOST_S, RankLost

T = TypeVar("T")

ORDER_S = 1800.0
"""Longest wait for a word of rank 0, which may be writing a checkpoint meanwhile."""
WORD_EVERY_S = 30.0
"""While rank 0 waits for something itself, it says so this often."""
STOP, WAITING = "stop", "waiting"
COUNTS = 2
"""Numbers at the head of an order: bytes of its JSON, bytes of its tensors."""
NETWORK_WORDS = ("gloo", "nccl", "connection", "timed out", "socket", "store", "process group")


@dataclass(frozen=True)
class Order:
    """What all ranks do next, and what they need for it."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """JSON."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """On the CPU; any shapes and types."""


class Ranks:
    """This process's place among the learner's. See the module's docstring."""

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | None = None, ended: Callable[[], str] = str
    ) -> None:
        """`device`: where this rank computes. `ended`: says which other rank's process has ended, "" if none has."""
        self.rank, self.size = rank, size
        self._device, self._ended = device, ended
        self._control: Any = None
        self._word, self._word_at = "", time.monotonic()
        self.in_step = False
        """Whether an order is being carried out: then nobody listens for the next."""

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes; only where there are several."""
        assert self._device is not None
        return self._device

    def open_control(self) -> None:
        """Make the control group: all ranks at once, within `joining.joined`."""
        import torch.distributed as dist

        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=ORDER_S))

    # --- orders ---

    def tell(self, order: Order) -> None:
        """Rank 0: the next order for all others."""
        if self.alone:
            return
        listed = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in order.tensors.items()]
        head = json.dumps({"name": order.name, "arguments": order.arguments, "tensors": listed}).encode()
        parts = [_bytes(tensor) for tensor in order.tensors.values()]
        body = torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *parts])
        with self.named(f"the others to hear {order.name!r}"):
            self.broadcast(torch.tensor([len(head), body.numel() - len(head)]))
            self.broadcast(body)
        self._word_at = time.monotonic()

    def hear(self) -> Order:
        """Every other rank: rank 0's next order. Raises RankLost after ORDER_S, and when rank 0 is gone."""
        while True:
            since = f", whose last word was {self._word!r}" if self._word else ""
            with self.named(f"an order of rank 0{since}"):
                counts = self.broadcast(torch.zeros(COUNTS, dtype=torch.int64)).tolist()
                body = self.broadcast(torch.empty(sum(counts), dtype=torch.uint8))
            head = json.loads(body[: counts[0]].numpy().tobytes())
            if head["name"] != WAITING:
                self._word = head["name"]
                return Order(head["name"], head["arguments"], _tensors(head["tensors"], body[counts[0] :]))
            self._word = f"waiting for {head['arguments']['what']}"

    def still_waiting(self, what: str) -> None:
        """Rank 0, during a wait of its own: the others are told now and then, and raise RankLost if one has ended."""
        if self.alone:
            return
        self.check()
        if not self.in_step and time.monotonic() - self._word_at > WORD_EVERY_S:
            self.tell(Order(WAITING, {"what": what}))

    def check(self) -> None:
        """Raise RankLost if another rank's process has ended."""
        if lost := self._ended():
            raise RankLost(lost)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """All ranks, while they carry out an order. FloatingPointError is what all of them agree upon; any other error
        leaves the ranks at different places, so that no further order would be heard."""
        self.in_step = True
        with self.named(what):
            try:
                yield
            except FloatingPointError:
                self.in_step = False
                raise
        self.in_step = False

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Turn what torch.distributed raises when a rank is gone, or silent for too long, into RankLost."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or isinstance(error, RankLost) or not _of_network(error):
                raise
            why = self._who_ended() or f"another rank is gone, or did not answer in time ({str(error).splitlines()[0]})"
            raise RankLost(f"rank {self.rank} of {self.size}, waiting for {what}: {why}") from error

    def _who_ended(self) -> str:
        """As `ended` says, which may take a moment after a connection has broken."""
        deadline = time.monotonic() + LOST_S
        while not (lost := self._ended()) and time.monotonic() < deadline:
            time.sleep(LOST_S / 20)
        return lost

    # --- shares and sums ---

    def share(self, items: Sequence[T]) -> list[T | None]:
        """What of `items` this rank does, of every `size` neighbours one; None where there is nothing left to do.

        As long on every rank: each pass over a sharded model is a collective operation."""
        mine: list[T | None] = list(items[self.rank :: self.size])
        return mine + [None] * (-(-len(items) // self.size) - len(mine))

    def sum(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The sum of every figure over all ranks, the same bits on each of them; a rank may lack some."""
        if self.alone:
            return dict(figures)
        total: Counter[str] = Counter()
        for part in self._from_all(json.dumps(figures).encode()):
            total.update(json.loads(part))
        return dict(total)

    def merge(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a tensor on the CPU, in place."""
        if not self.alone:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self._control)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank, in place; on the CPU, of the same type and shape everywhere."""
        if not self.alone and tensor.numel():
            import torch.distributed as dist

            dist.broadcast(_bytes(tensor), 0, group=self._control)
        return tensor

    def _from_all(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in order of ranks."""
        import torch.distributed as dist

        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._control)
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._control)
        return [part.numpy().tobytes()[: int(length)] for part, length in zip(parts, lengths, strict=True)]


ALONE = Ranks()
"""The only process of a learner."""


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes, flat; a view of a contiguous one."""
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # of one element or none any stride is contiguous
    return flat.view(torch.uint8)


def _tensors(listed: Sequence[Any], body: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    start = 0
    for name, dtype_name, shape in listed:
        dtype = getattr(torch, dtype_name)
        end = start + torch.Size(shape).numel() * dtype.itemsize
        found[name] = body[start:end].clone().view(dtype).view(shape)  # a copy, since parts may not be aligned
        start = end
    return found


def _of_network(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it; gloo's errors are plain RuntimeErrors."""
    text = str(error).lower()
    return type(error).__name__.startswith("Dist") or any(word in text for word in NETWORK_WORDS)
