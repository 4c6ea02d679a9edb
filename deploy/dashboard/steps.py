"""metrics.jsonl and eval/ as columns over steps. Reads files, keeps what it has read; called by `readers.py`."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from protocol.rundir import RunDir, read_json

FIGURES = (
    "reward_mean", "reward_std", "eval_reward", "loss", "nll", "entropy", "kl_k3", "kl_reference", "engine_gap",
    "clipped_share", "importance_truncated_share", "completion_tokens_mean", "truncated_completions_share",
    "zero_variance_share", "trained_token_share", "grad_norm", "lr", "lag_mean", "lag_max", "publish_s", "encode_s",
    "delta_bytes", "step_s", "train_s", "wait_s", "tokens_per_s", "learner_tokens_per_s", "kept_completions",
    "dpo_accuracy", "dpo_margin", "version", "mfu",
)  # fmt: skip
"""Columns that are drawn."""


class StepsReader:
    """The file grows by a line a step. After a rollback, and where a line was amended, it is another file."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.generation = 0
        """How often the file was replaced: rows that were given out before may no longer hold."""
        self._inode = self._offset = 0
        self._rows: list[dict[str, Any]] = []

    @property
    def last_step(self) -> int:
        """Of what was read; 0 before the first."""
        return int(self._rows[-1]["step"]) if self._rows else 0

    def columns(self, since: int) -> dict[str, Any]:
        """{"generation", "step": [steps after `since`], "columns": figure -> values, None where there is none}.

        Figures that no row has are left out."""
        self._read()
        rows = [row for row in self._rows if row["step"] > since]
        known = [name for name in FIGURES if any(name in row for row in rows)]
        return {
            "generation": self.generation,
            "step": [row["step"] for row in rows],
            "columns": {name: [_number(row.get(name)) for row in rows] for name in known},
        }

    def _read(self) -> None:
        try:
            with open(self.run.metrics, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self.generation += bool(self._inode)
                    self._inode, self._offset, self._rows = inode, 0, []
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn by a crash
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                self._rows.append(row)


def _number(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, int | float) and abs(value) < float("inf") else None


def evaluations(run: RunDir, steps: int) -> list[dict[str, Any]]:
    """[{"name", "step", "reward", "ci95", "problems"}] in the order of steps; those around a run are at 0 and `steps`."""
    found = []
    for path in run.eval.glob("*.json"):
        result = _result(run, path.stem)
        if result is not None:
            step = int(match[1]) if (match := re.fullmatch(r"step-(\d+)", path.stem)) else None
            at = step if step is not None else steps if path.stem == "after" else 0
            rank = {"before": 0, "after_warm_start": 1, "after": 3}.get(path.stem, 2)
            found.append((at, rank, result | {"name": path.stem.replace("_", " "), "step": at}))
    return [result for _, _, result in sorted(found, key=lambda entry: entry[:2])]


def _result(run: RunDir, name: str) -> dict[str, Any] | None:
    try:
        result = read_json(run.eval / f"{name}.json")
    except ValueError:
        return None
    if not isinstance(result, dict) or "reward" not in result:
        return None
    return {
        "reward": _number(result["reward"]), "ci95": _number(result.get("reward_ci95")), "problems": result.get("problems")
    }  # fmt: skip
