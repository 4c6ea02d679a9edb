"""metrics.jsonl and eval/ as columns over steps. Reads files, keeps what it has read; called by `readers.py`."""

from __future__ import annotations

import math
import re
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.dashboard.jsonl_tail import JsonlTail
from protocol.rundir import RunDir, read_json

FIGURES = (
    "reward_mean", "reward_std", "eval_reward", "loss", "nll", "entropy", "kl_k3", "kl_reference", "engine_gap",
    "clipped_share", "importance_truncated_share", "completion_tokens_mean", "truncated_completions_share",
    "zero_variance_share", "trained_token_share", "grad_norm", "lr", "lag_mean", "lag_max", "publish_s", "encode_s",
    "delta_bytes", "step_s", "train_s", "wait_s", "tokens_per_s", "learner_tokens_per_s", "kept_completions",
    "dpo_accuracy", "dpo_margin", "version", "mfu",
)  # fmt: skip
"""Columns that are drawn."""
MOST_POINTS = 1000
"""The page draws means of neighbours, too: a first look at a long run needs no more."""


class StepsReader:
    """Not for several threads."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.generation = 0
        """How often the file was replaced (a rollback, an amended line): rows given out before may no longer hold."""
        self._file = JsonlTail(run.metrics)
        self._forget()
        self._evaluations: dict[str, tuple[int, dict[str, Any] | None]] = {}
        """Name -> when its file was written (ns), and what is shown of it."""

    def _forget(self) -> None:
        self._steps = array("q")
        """Of the rows, ascending."""
        self._columns = {name: array("d") for name in FIGURES}
        """NaN where a row has none."""

    def columns(self, since: int) -> dict[str, Any]:
        """{"generation", "step": [steps after `since`], "columns": figure -> values, None where there is none}.

        Figures that no row has are left out. Where there are more steps than `MOST_POINTS`, all but the first and the
        last come as means of neighbours, by the last step of each."""
        self._read()
        first = bisect_right(self._steps, since)
        steps = np.array(self._steps[first:], np.int64)
        starts = bin_starts(len(steps))
        found = {name: means(np.array(column[first:]), starts) for name, column in self._columns.items()}
        return {
            "generation": self.generation,
            "step": steps[np.append(starts[1:], len(steps))[: len(starts)] - 1].tolist(),
            "columns": {name: values for name, values in found.items() if any(value is not None for value in values)},
        }

    def _read(self) -> None:
        rows, replaced = self._file.new()
        if replaced:
            self.generation += bool(self._steps)
            self._forget()
        for row in rows:
            if isinstance(row.get("step"), int):
                self._steps.append(row["step"])
                for name, column in self._columns.items():
                    value = row.get(name)
                    column.append(value if isinstance(value, int | float) else math.nan)

    def evaluations(self) -> list[dict[str, Any]]:
        """[{"name", "step", "reward", "ci95", "problems"}] by step; those around a run at 0 and its last."""
        last = self._steps[-1] if self._steps else 0
        found = []
        for path in self.run.eval.glob("*.json"):
            result = self._evaluation(path)
            if result is not None:
                match = re.fullmatch(r"step-(\d+)", path.stem)
                at = int(match[1]) if match else last if path.stem == "after" else 0
                rank = {"before": 0, "after_warm_start": 1, "after": 3}.get(path.stem, 2)
                found.append((at, rank, result | {"name": path.stem.replace("_", " "), "step": at}))
        return [result for _, _, result in sorted(found, key=lambda entry: entry[:2])]

    def _evaluation(self, path: Path) -> dict[str, Any] | None:
        """None for a file that is no result."""
        try:
            written = path.stat().st_mtime_ns
            if self._evaluations.get(path.stem, (0, None))[0] != written:
                self._evaluations[path.stem] = (written, _result(read_json(path)))
        except (OSError, ValueError):
            return None
        return self._evaluations[path.stem][1]


def bin_starts(count: int) -> NDArray[np.int64]:
    """Indices at which pieces of `count` rows begin: the first and the last row alone, at most about `MOST_POINTS`."""
    wide = -(-count // MOST_POINTS)
    return np.unique(np.concatenate(([0], np.arange(1, count - 1, wide), [count - 1]))) if wide else np.arange(0)


def means(column: NDArray[np.float64], starts: NDArray[np.int64]) -> list[float | None]:
    """Of each piece; None where a piece has no value."""
    if not len(starts):
        return []
    known = np.isfinite(column)
    counts = np.add.reduceat(known, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(known, column, 0.0), starts)
    return [
        _number(total / count) if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


def _result(found: Any) -> dict[str, Any] | None:
    if not isinstance(found, dict) or "reward" not in found:
        return None
    figures = {"reward": _number(found["reward"]), "ci95": _number(found.get("reward_ci95"))}
    return figures | {"problems": found.get("problems")}


def _number(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, int | float) and abs(value) < float("inf") else None
