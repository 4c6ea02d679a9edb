"""Where a step's batch comes from, by method: groups of the actors, or a data set. Called by the loop.

The methods themselves (`methods/`) are pure; here they meet the source, the task and the reference policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from learner.batch import Batch
from learner.intake.data import Task
from learner.intake.source import Source
from learner.methods import dpo, expert_iteration, grpo, sft
from learner.methods.epochs import Epochs
from learner.methods.grpo import AddReference
from learner.telemetry.clock import PhaseClock
from protocol.config import Recipe


class Feed(Protocol):
    """Batches by step number, from 0."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        ...

    def batch(self, step: int) -> Batch:
        """What step `step` trains on; may wait for actors, and then raises as `Source.take` does."""
        ...


class RolloutFeed:
    """What the actors drew: for grpo and expert iteration."""

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        step_of_version: Callable[[int], int],
        add_reference: AddReference,
        timeout_s: float,
        clock: PhaseClock,
    ) -> None:
        """`clock` is told when groups are waited for: what is made of them is the learner's own work."""
        self.recipe, self.source, self._clock = recipe, source, clock
        self._step_of_version, self._add_reference, self._timeout_s = step_of_version, add_reference, timeout_s

    @property
    def steps(self) -> int:
        return self.recipe.steps

    def batch(self, step: int) -> Batch:
        with self._clock.of("waiting"):
            groups = self.source.take(self._timeout_s)
        if self.recipe.method == "expert_iteration":
            return expert_iteration.make_batch(groups, self.recipe, self._step_of_version, step)
        return grpo.make_batch(
            groups, self.recipe, self._step_of_version, step, self._add_reference, self.source.filtered()
        )


class SftFeed:
    """Pairs of prompt and response."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        config = recipe.sft
        self._pairs = Epochs(task.sft_pairs(), config.batch_size, config.epochs, recipe.seed)
        self.steps = at_most(self._pairs.steps, recipe.steps)

    def batch(self, step: int) -> Batch:
        return sft.make_batch(self._pairs[step], step)


class DpoFeed:
    """Preferences: prompt, chosen and rejected answer."""

    def __init__(self, recipe: Recipe, task: Task, add_reference: AddReference) -> None:
        config = recipe.dpo
        self._preferences = Epochs(task.preference_pairs(), config.batch_size, config.epochs, recipe.seed)
        self._add_reference = add_reference
        self.steps = at_most(self._preferences.steps, recipe.steps)

    def batch(self, step: int) -> Batch:
        return dpo.make_batch(self._preferences[step], step, self._add_reference)


def at_most(steps: int, limit: int) -> int:
    """`steps`, cut to `limit` unless that is 0."""
    return min(steps, limit) if limit else steps
