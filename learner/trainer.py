"""Model, optimizer and reference policy, and what the learner does with them: on every rank at once.

The loop (`loop.py`, rank 0) calls the methods. Each of them tells the other ranks what is to be done and with what
data, then does it; the others are in `follow`, hear it and do the same. So this is the one place that knows which
operations are collective, and with one process it is nothing but calls. Files are written by rank 0; checkpoints and
the reference are read by every rank, which must see the run's directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learner import checkpoint
from learner.batch import Batch, PackedBatch, Row
from learner.batch_tensors import decode_batch, decode_rows, encode_batch, encode_rows
from learner.first_logprobs import FirstLogprobs
from learner.model import LogprobOutput, load_model, share_cores
from learner.optim import Optimizer
from learner.publish import Publisher
from learner.ranks import ALONE, STOP, Order, Ranks
from learner.reference import Reference
from learner.sharding import gather
from learner.step import train_step, with_reference
from protocol.config import Recipe
from protocol.rundir import RunDir

Content = tuple[dict[str, Any], dict[str, Tensor]]
"""Of an order: JSON and tensors."""


def _nothing() -> Content:
    return {}, {}


class Trainer:
    """What every rank of the learner holds. See the module's docstring."""

    def __init__(self, recipe: Recipe, run: RunDir, model_path: Path, ranks: Ranks = ALONE) -> None:
        """Load the model, on all ranks at once. Raises ValueError as `load_model` does."""
        self.recipe, self.ranks = recipe, ranks
        self.model = load_model(model_path, recipe.model, recipe.learner, ranks)
        self.optimizer = Optimizer(self.model, recipe.optim)
        self.reference = Reference(self.model, run.reference)
        self.first_logprobs: Tensor | None = None
        """Of the last step, see `FirstLogprobs.of_step`; None if it had no groups, or the recipe does not want them."""

    # --- the other ranks ---

    def follow(self) -> None:
        """Do what rank 0 does until it says stop. Raises RankLost when it is gone."""
        actions: dict[str, Callable[[Order], object]] = {
            "train": lambda order: self._train(decode_batch(order.arguments, order.tensors), order.arguments["lr"]),
            "restart the optimizer": lambda _: self._restart_optimizer(),
            "refer": lambda order: self._refer(decode_rows(order.tensors), order.arguments["split"]),
            "keep the reference": lambda _: self.reference.take_part(),
            "load the reference": lambda order: self.reference.load(order.arguments),
            "publish": lambda _: gather(tensor for _, tensor in self.model.whole_tensors()),
            "save": lambda _: checkpoint.take_part(self.model, self.optimizer),
            "load": lambda order: self._load(Path(order.arguments["path"])),
            "compare": lambda order: self._frozen_logprobs({}, PackedBatch(**order.tensors)),
            "look": lambda order: self._logprobs(PackedBatch(**order.tensors), order.arguments["with_entropy"]),
            "share cores": lambda order: self._share_cores(order.arguments["shared"]),
        }
        while (order := self.ranks.hear()).name != STOP:
            with suppress(FloatingPointError), self.ranks.doing(order.name):  # rank 0 raises it, too, and decides
                actions[order.name](order)

    @contextmanager
    def _all(self, name: str, content: Callable[[], Content] = _nothing) -> Iterator[None]:
        """Rank 0, around its own part of an order. `content` is asked for only if somebody listens."""
        if not self.ranks.alone:
            self.ranks.check()
            self.ranks.tell(Order(name, *content()))
        with self.ranks.doing(name):
            yield

    # --- training ---

    def train(self, batch: Batch, lr: float) -> dict[str, float]:
        """One step; the step's metrics. Raises FloatingPointError as `train_step` does."""

        def content() -> Content:
            head, tensors = encode_batch(batch)
            return head | {"lr": lr}, tensors

        with self._all("train", content):
            return self._train(batch, lr)

    def _train(self, batch: Batch, lr: float) -> dict[str, float]:
        kept = FirstLogprobs() if self.recipe.metrics.keep_logprobs and batch.drawn is not None else None
        figures = train_step(self.model, self.optimizer, batch, self.recipe, lr, self.ranks, kept)
        self.first_logprobs = kept.of_step(batch.drawn.num_tokens, self.ranks) if kept and batch.drawn else None
        return figures

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds on its GPU: "gpu_allocated" by tensors, "gpu_reserved" in all. {} on a CPU."""
        device = self.model.device
        if device.type != "cuda":
            return {}
        return {
            "gpu_allocated": torch.cuda.memory_allocated(device), "gpu_reserved": torch.cuda.memory_reserved(device)
        }  # fmt: skip

    def restart_optimizer(self) -> None:
        """Begin anew, without moments."""
        with self._all("restart the optimizer"):
            self._restart_optimizer()

    def _restart_optimizer(self) -> None:
        self.optimizer = Optimizer(self.model, self.recipe.optim)

    def share_cores(self, shared: bool) -> None:
        """Set the CPU threads of every rank; `shared` with busy engines."""
        with self._all("share cores", lambda: ({"shared": shared}, {})):
            self._share_cores(shared)

    def _share_cores(self, shared: bool) -> None:
        share_cores(self.recipe.learner, shared, self.ranks.size)

    # --- the reference policy ---

    def with_reference(self, rows: Sequence[Row], split: bool = True) -> list[Row]:
        """The rows with the reference's logprobs."""
        with self._all("refer", lambda: ({"split": split}, encode_rows(rows))):
            return self._refer(rows, split)

    def _refer(self, rows: Sequence[Row], split: bool) -> list[Row]:
        return with_reference(self.model, self.reference.weights, rows, self.recipe, split, self.ranks)

    def keep_reference(self) -> dict[str, Any]:
        """The model as it is now is the reference; what `load_reference` wants to know of its file."""
        with self._all("keep the reference"):
            return self.reference.keep()

    def load_reference(self, described: dict[str, Any]) -> None:
        """Take up what an earlier process kept, unless this one has kept it. Raises ValueError as `Reference.load`."""
        with self._all("load the reference", lambda: (described, {})):
            self.reference.load(described)

    # --- versions and files ---

    def publish(self, publisher: Publisher, step: int, branch: int) -> int:
        """Publish the weights of this moment, once and whole. Returns the version."""
        with self._all("publish"):
            return publisher.publish(self.model, step, branch)

    def export(self, directory: Path, tokenizer: Any) -> None:
        """Write the model as a Hugging Face directory."""
        with self._all("publish"):
            self.model.export(directory, tokenizer)

    def save(self, directory: Path, step: int, state: dict[str, Any], **options: Any) -> Path:
        """Write a checkpoint; arguments as of `checkpoint.save`."""
        with self._all("save"):
            return checkpoint.save(directory, step, self.model, self.optimizer, state, **options)

    def load(self, path: Path) -> dict[str, Any]:
        """Be as a checkpoint was, with as many ranks as there are now. Returns the loop's state."""
        with self._all("load", lambda: ({"path": str(path.resolve())}, {})):
            return self._load(path)

    def _load(self, path: Path) -> dict[str, Any]:
        return checkpoint.load(path, self.model, self.optimizer)

    # --- what the parity gate asks for ---

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def frozen_logprobs(self, weights: dict[str, Tensor], packed: PackedBatch) -> Tensor:
        """[N] logprobs of a microbatch under published weights (whole, by parameter name)."""
        with self._all("compare", lambda: ({}, _packed_tensors(packed))):
            return self._frozen_logprobs(weights, packed)

    def _frozen_logprobs(self, weights: dict[str, Tensor], packed: PackedBatch) -> Tensor:
        held = weights if self.ranks.alone else self.model.spread(weights, self.ranks)
        return self.model.frozen_logprobs(held, packed)

    def logprobs(self, packed: PackedBatch, with_entropy: bool) -> LogprobOutput:
        """Those of a microbatch under the weights of this moment, without gradient."""
        with self._all("look", lambda: ({"with_entropy": with_entropy}, _packed_tensors(packed))):
            return self._logprobs(packed, with_entropy)

    def _logprobs(self, packed: PackedBatch, with_entropy: bool) -> LogprobOutput:
        with torch.no_grad():
            return self.model.logprobs(packed, with_entropy)


def _packed_tensors(packed: PackedBatch) -> dict[str, Tensor]:
    return {field.name: getattr(packed, field.name) for field in fields(packed)}
