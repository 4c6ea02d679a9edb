"""The learner's telemetry: a thread that samples the run, writes the timeline, and keeps the newest sample for others.

    clock, hub, dispatcher, publisher  ->  Sampler  ->  advice  ->  timeline.jsonl, Prometheus, status.json

`loop.py` opens it for the length of a run and tells it of every step. Whatever fails in here is logged once and costs
figures, never the run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from learner.telemetry.advisor import Advisor
from learner.telemetry.clock import PhaseClock
from learner.telemetry.engines import EngineMetricsPage
from learner.telemetry.events import EventLog
from learner.telemetry.exporter import RunMetrics, serving
from learner.telemetry.sample import Sample
from learner.telemetry.sampler import Sampler
from learner.telemetry.timeline import Timeline
from protocol.config import Recipe
from protocol.errors import RecipeError
from protocol.rundir import RunDir

if TYPE_CHECKING:
    from learner.actors import Actors

log = logging.getLogger(__name__)

STOP_S = 5.0


class Telemetry:
    """Context manager. `step` and `actors` are for the learner's thread, the rest happens in its own."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        step: Callable[[], int],
        doing: Callable[[], str],
        memory: Callable[[], dict[str, int]] = dict,
    ) -> None:
        """As of `Sampler`."""
        self.recipe, self.run = recipe, run
        self.clock = PhaseClock()
        self.sampler = Sampler(self.clock, step, doing, memory)
        self.advisor = Advisor()
        self.metrics = RunMetrics(recipe, run)
        self.engines = EngineMetricsPage()
        self.newest: Sample | None = None
        self._stack = ExitStack()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="telemetry", daemon=True)

    def __enter__(self) -> Telemetry:
        """Raises RecipeError if the recipe's `metrics.port` cannot be had."""
        with ExitStack() as opened:
            opened.enter_context(EventLog(self.run.events))
            self._serve(opened)
            self._stack = opened.pop_all()
        self._timeline = Timeline(self.run.timeline, self.recipe.metrics.sample_every_s)
        self._stack.callback(self._timeline.close)
        self._thread.start()
        return self

    def _serve(self, opened: ExitStack) -> None:
        """Let Prometheus in. A run that has got further than its first steps does not end for want of a port: it was
        started again, and somebody has taken it meanwhile."""
        if not self.recipe.metrics.serve:
            return
        try:
            opened.enter_context(serving(self.metrics, self.engines, self.recipe, self.run))
        except RecipeError as error:
            if not self.run.checkpoint_steps():
                raise
            log.warning("%s; the run goes on without Prometheus", error)

    def actors(self, actors: Actors) -> None:
        """From now on there are actors to look at."""
        self.sampler.actors = actors
        self.engines.server = actors.server

    def step(self, figures: Mapping[str, float]) -> None:
        """A step is done; its figures, as they go into metrics.jsonl."""
        self.metrics.step(figures)
        self.sampler.trained_tokens += int(figures["tokens"])

    def _sample_until_stopped(self) -> None:
        failed, every_s = False, self._timeline.every_s  # which grows: the file keeps fewer of a long run
        while not self._stop.wait(every_s):
            try:
                self._sample()
            except Exception:
                if not failed:
                    log.exception("a sample of the run could not be taken or written; the run goes on without")
                failed = True

    def _sample(self, force: bool = False) -> None:
        sample = self.sampler.take()
        self.newest = msgspec.structs.replace(sample, advice=self.advisor.see(sample))
        self.metrics.see(self.newest)
        self._timeline.write(self.newest, force)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Take a last sample, in the phase in which the run ended: "finished" only where it went to its end."""
        if kind is None:
            self.clock.enter("finished")
        self._stop.set()
        self._thread.join(STOP_S)
        if not self._thread.is_alive():
            try:
                self._sample(force=True)
            except Exception:
                log.exception("the last sample could not be written")
        self._stack.close()
