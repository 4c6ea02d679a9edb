"""A step's figures to Weights & Biases, where the recipe asks for it. It makes no run fail, and none wait for long.

W&B's files lie in RUN/wandb. A run that is resumed writes another directory there under the same id. W&B's own count of
rows only grows, so the step is a figure like the others and the axis of the charts: after a rollback, or a crash that
lost steps, the steps come again; `branch` and the order of the rows tell which ones count. wandb is imported only here,
and only when it is asked for. `learner/metrics.py` calls it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from protocol.config import Recipe
from protocol.rundir import RunDir

log = logging.getLogger(__name__)

START_S = 30.0
FINISH_S = 30.0
"""What is not uploaded by then stays on the disk: `wandb sync` sends it."""
TAG_CHARACTERS = 64


class WandbLog:
    """Open from the start; `close` ends W&B's own process, too. For the learner's thread."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        self._run: Any = None
        self._guarded("does not start", lambda: self._start(recipe, run))

    def _start(self, recipe: Recipe, run: RunDir) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of its own errors, over the network
        import wandb

        settings = wandb.Settings(
            console="off",  # what the process prints is in the run's logs
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=START_S,
            finish_timeout=FINISH_S,
        )
        self._run = wandb.init(
            mode=recipe.metrics.wandb,  # type: ignore[arg-type]  # "off" makes none of this
            dir=str(run.path.resolve()),
            project=recipe.metrics.wandb_project,
            name=recipe.name,
            id=re.sub(r"[^A-Za-z0-9_-]", "-", run.label),
            resume="allow",
            config=recipe.model_dump(mode="json"),
            tags=[recipe.method, Path(recipe.model.path).name[:TAG_CHARACTERS]],
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        place = self._run.url if recipe.metrics.wandb == "online" else run.path / "wandb"
        log.info("Weights & Biases (%s): %s", recipe.metrics.wandb, place)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """A step's figures; those without a value are left out."""
        row = {name: value for name, value in figures.items() if value is not None}
        if self._run is not None:
            self._guarded("takes no figures", lambda: self._run.log({**row, "step": step}))

    def close(self) -> None:
        """Everything is on the disk, and uploaded if that is possible in time."""
        if self._run is not None:
            self._guarded("does not finish", self._finish)

    def _finish(self) -> None:
        import wandb

        run, self._run = self._run, None
        run.finish()
        wandb.teardown()

    def _guarded(self, fault: str, action: Callable[[], None]) -> None:
        """Do it; after an error W&B is left alone. (Its errors have no common base.)"""
        try:
            action()
        except Exception as error:
            self._run = None
            if wandb := sys.modules.get("wandb"):
                with contextlib.suppress(Exception):
                    wandb.teardown()  # its process has no more to do
            log.warning("Weights & Biases %s; the run goes on without: %s: %s", fault, type(error).__name__, error)
