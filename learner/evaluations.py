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
from learner.state import RunState
from protocol.config import Recipe
from protocol.rundir import RunDir

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.1
"""Share of an evaluation's problems that may fail for good; beyond it the mean would be of other problems."""


class Evaluations:
    """The held-out problems of a run, measured by name."""

    def __init__(
        self, recipe: Recipe, run: RunDir, task: Task, source: Source, status: Status, state: RunState
    ) -> None:
        """`state` keeps the figures by name, and whether one is under way in the background."""
        self.recipe, self.run, self.task, self.source, self.status = recipe, run, task, source, status
        self._state = state
        self._running: tuple[str, int, float] | None = None
        """Of the one in the background: name, tickets, when it began."""

    @property
    def results(self) -> dict[str, Any]:
        """Name -> figures."""
        return self._state.evals

    def measure(self, name: str, version: int, timeout_s: float) -> EvalResult | None:
        """Held-out reward of exactly one version, with training idle; None if the recipe wants no evaluation."""
        if not self.recipe.eval.wanted:
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
        every, name = self.recipe.eval.every_steps, f"step-{step:05d}"
        due = bool(every) and (step % every == 0 or self._state.eval_pending)
        if due and self._running:
            if step % every == 0:
                log.warning("evaluation %s is left out: %s is not finished", name, self._running[0])
        elif due and name not in self.results:
            self._begin(name, publish())
        return ended

    def _begin(self, name: str, version: int) -> None:
        tickets = eval_tickets(self.recipe, self.task.heldout, version)
        self.source.start_evaluation(tickets, self.recipe.eval.share)
        self._running = (name, len(tickets), time.monotonic())
        self._state.eval_pending = True

    def finish(self, step: int, publish: Callable[[], int], timeout_s: float) -> dict[str, float] | None:
        """Wait for the one in the background: training has ended with `step`. Returns it as metrics; None if there was
        none. One that was cut short before is begun again."""
        if self._running is None and self._state.eval_pending:
            self._begin(f"step-{step:05d}", publish())
        if self._running is None:
            return None
        self.status.set(f"evaluation {self._running[0]}")
        return self._take_in(self.source.finish_evaluation(timeout_s))

    def go_back(self, branch: int, surviving: set[int]) -> None:
        """The run is on a new `branch`: what measured any but `surviving` versions is put aside."""
        self._running = None
        aside = self.run.eval / f"abandoned-by-branch-{branch}"
        for name, result in list(self.results.items()):
            if name.startswith("step-") and not {int(version) for version in result["version_tokens"]} <= surviving:
                del self.results[name]
                aside.mkdir(exist_ok=True)
                for path in (self.run.eval / f"{name}.json", self.run.eval / f"{name}_responses.jsonl"):
                    path.replace(aside / path.name)
        self._show()

    def _collect(self) -> dict[str, float]:
        groups = self.source.finished_evaluation()
        return {} if groups is None else self._take_in(groups)

    def _take_in(self, groups: EvalGroups) -> dict[str, float]:
        assert self._running is not None
        name, count, began = self._running
        self._running, self._state.eval_pending = None, False
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
        self._show()
        figures = name, result.reward, result.reward_ci95
        log.info("evaluation %s: reward %.3f +- %.3f", *figures, extra={"event": "evaluation"})
        return result

    def _show(self) -> None:
        self.status.set(evals={key: value["reward"] for key, value in self.results.items()})
