"""When a run evaluates, and where the results go: before, between and after the steps, in the background or not.

`evaluate.py` knows the tickets and the figures. Called by the loop; results are kept in the run directory and, through
`results`, in the checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from learner.evaluate import EvalResult, eval_row, eval_tickets, summarize, write_responses, write_result
from learner.intake.data import Task
from learner.intake.source import EvalGroups, Source, TicketsFail
from learner.metrics import Status
from protocol.config import Recipe
from protocol.rundir import RunDir

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.1
"""Share of an evaluation's problems that may fail for good; beyond it the mean would be of other problems."""


class Evaluations:
    """The held-out problems of a run, measured by name."""

    def __init__(
        self, recipe: Recipe, run: RunDir, task: Task, source: Source, status: Status, results: dict[str, Any]
    ) -> None:
        """`results`: name -> figures so far; added to."""
        self.recipe, self.run, self.task, self.source, self.status = recipe, run, task, source, status
        self.results = results
        self._running: tuple[str, int, float] | None = None
        """Of the one in the background: name, tickets, when it began."""

    def measure(self, name: str, version: int, timeout_s: float) -> EvalResult | None:
        """Held-out reward of exactly one version, with training idle; None if the recipe wants no evaluation."""
        if not self.recipe.eval.prompts:
            return None
        phase = f"evaluation {name.replace('_', ' ')}" if name != "eval" else "evaluation"
        self.status.set(phase)
        self.source.wait_for_actor(version, self.recipe.actor.start_timeout_s)
        self.status.set(phase)
        tickets = eval_tickets(self.recipe, self.task.heldout, version)
        began = time.monotonic()
        result = self._keep(name, self.source.evaluate(tickets, timeout_s), len(tickets), began)
        if set(result.version_tokens) - {str(version)}:
            raise RuntimeError(f"evaluation {name}: tokens of versions {result.version_tokens}, expected {version}")
        return result

    # --- beside training ---

    def tick(self, step: int, publish: Callable[[], int]) -> dict[str, float]:
        """After a step that is not the last: take in the evaluation in the background if it has ended, begin one that
        is due.

        `publish` gives the version to measure, or later ones. Returns what ended, as metrics.
        """
        ended = self._collect() if self._running else {}
        every, left = self.recipe.eval.every_steps, self.recipe.eval.prompts
        name = f"step-{step:05d}"
        if every and left and step % every == 0 and not self._running and name not in self.results:
            tickets = eval_tickets(self.recipe, self.task.heldout, publish())
            self.source.start_evaluation(tickets, self.recipe.eval.share)
            self._running = (name, len(tickets), time.monotonic())
        return ended

    def finish(self, timeout_s: float) -> None:
        """Wait for the one in the background: training has ended."""
        if self._running:
            name, count, began = self._running
            self.status.set(f"evaluation {name}")
            groups = self.source.finish_evaluation(timeout_s)
            self._running = None
            self._keep(name, groups, count, began)

    def go_back(self, step: int) -> None:
        """What was measured after `step` was of a branch that is abandoned."""
        self._running = None
        for name in [name for name in self.results if name.startswith("step-") and int(name[5:]) > step]:
            del self.results[name]

    def _collect(self) -> dict[str, float]:
        assert self._running is not None
        name, count, began = self._running
        groups = self.source.finished_evaluation()
        if groups is None:
            return {}
        self._running = None
        try:
            return eval_row(self._keep(name, groups, count, began))
        except TicketsFail as error:  # training goes on; an evaluation at its end would stop the run
            log.error("%s", error)
            return {}

    def _keep(self, name: str, groups_and_failures: EvalGroups, count: int, began: float) -> EvalResult:
        groups, failed = groups_and_failures
        if len(failed) > MAX_FAILED_SHARE * count:
            cause = next(iter(failed.values()))
            raise TicketsFail(f"evaluation {name}: {len(failed)} of {count} problems failed, e.g. {cause}")
        result = summarize(name, groups, len(failed), time.monotonic() - began)
        write_responses(self.run.eval / f"{name}_responses.jsonl", groups, self.task.heldout)
        write_result(self.run.eval / f"{name}.json", result)
        self.results[name] = asdict(result)
        self.status.set(evals={key: value["reward"] for key, value in self.results.items()})
        log.info("evaluation %s: reward %.3f +- %.3f", name, result.reward, result.reward_ci95)
        return result
