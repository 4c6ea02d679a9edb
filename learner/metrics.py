"""What the learner says of itself: metrics.jsonl, TensorBoard and, if it is asked for, Weights & Biases once a step;
status.json about once a second."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from protocol.config import Recipe
from protocol.rundir import RunDir, read_jsonl, replace_file, write_json

if TYPE_CHECKING:
    from learner.telemetry.wandb_log import WandbLog

STATUS_EVERY_S = 0.5


class MetricsLog:
    """One line a step in metrics.jsonl, the same figures in TensorBoard, and elsewhere."""

    def __init__(self, run: RunDir, first_step: int = 0, branch: int = 0, wandb: WandbLog | None = None) -> None:
        """Go on after `first_step` steps. Rows of later ones are lost with a crash, or were given up with a branch."""
        self._run, self._wandb = run, wandb
        self._go_on_after(first_step, branch)

    def _go_on_after(self, step: int, branch: int) -> None:
        """Open the files behind the row of `step`; later rows of earlier branches go to a file of their own."""
        from torch.utils.tensorboard import SummaryWriter

        rows = read_jsonl(self._run.metrics)
        abandoned = [row for row in rows if row["step"] > step and row.get("branch", 0) < branch]
        if abandoned:
            with open(self._run.abandoned_metrics, "a") as file:
                file.writelines(json.dumps(row | {"abandoned_by_branch": branch}) + "\n" for row in abandoned)
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        replace_file(self._run.metrics, kept)
        self._file = open(self._run.metrics, "a")  # noqa: SIM115 - open for the life of the run
        self._board = SummaryWriter(str(self._run.tensorboard), purge_step=step + 1)

    def roll_back(self, step: int, branch: int) -> None:
        """Steps after `step` are no longer part of the run, which goes on on `branch`."""
        self._close_files()
        self._go_on_after(step, branch)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Log a step's figures; a figure that is not finite becomes null in the file and stays out of TensorBoard."""
        clean = {key: value if _finite(value) else None for key, value in row.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for key, value in clean.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, step)
        self._board.flush()
        if self._wandb:
            self._wandb.write(step, clean)

    def amend(self, figures: dict[str, float]) -> None:
        """Add figures to the last step's line: they were measured when there was no other step to come."""
        *rows, last = read_jsonl(self._run.metrics)
        self._file.close()
        replace_file(self._run.metrics, "".join(json.dumps(row) + "\n" for row in [*rows, last | figures]))
        self._file = open(self._run.metrics, "a")  # noqa: SIM115 - open for the life of the run
        for key, value in figures.items():
            self._board.add_scalar(key, value, last["step"])
        self._board.flush()
        if self._wandb:
            self._wandb.write(last["step"], figures)

    def close(self) -> None:
        """All of it is written."""
        self._close_files()
        if self._wandb:
            self._wandb.close()

    def _close_files(self) -> None:
        self._file.close()
        self._board.close()


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def wandb_log(recipe: Recipe, run: RunDir) -> WandbLog | None:
    """Weights & Biases, if the recipe asks for it."""
    if recipe.metrics.wandb == "off":
        return None
    from learner.telemetry.wandb_log import WandbLog

    return WandbLog(recipe, run)


class Status:
    """The learner's present state, for the launcher's progress view."""

    def __init__(self, run: RunDir, steps: int) -> None:
        self._run = run
        self._state: dict[str, Any] = {"phase": "starting", "steps": steps, "step": 0, "started_at": time.time()}
        self._written = 0.0

    def set(self, phase: str | None = None, /, **fields: Any) -> None:
        """Change fields and write them at once; a new phase ends what was waited for."""
        if phase is not None:
            self._state |= {"phase": phase, "phase_since": time.time(), "waiting_for": "", "waited_s": 0.0}
        self._state |= fields
        self._write()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Within: that is what the learner is busy with, since when; not a wait, and no phase of its own."""
        self.set(None, doing=what, doing_since=time.time())
        try:
            yield
        finally:
            self.set(None, doing="", doing_since=0.0)

    @property
    def text(self) -> str:
        """What goes on, in words."""
        state = self._state
        waiting = f", waiting for {state['waiting_for']}" if state.get("waiting_for") else ""
        return f"{state['phase']}{waiting}" if not state.get("doing") else str(state["doing"])

    def waiting(self, what: str, seconds: float) -> None:
        """Say what is being waited for; written at most twice a second."""
        self._state |= {"waiting_for": what, "waited_s": seconds}
        if time.monotonic() - self._written > STATUS_EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        write_json(self._run.status, {**self._state, "written_at": time.time()})
