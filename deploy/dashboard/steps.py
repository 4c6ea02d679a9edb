"""metrics.jsonl and eval/ as columns over steps. Reads files, keeps what it has read; called by `readers.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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


class StepsReader:
    """Not for several threads."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.generation = 0
        """How often the file was replaced (a rollback, an amended line): rows given out before may no longer hold."""
        self._file = JsonlTail(run.metrics)
        self._rows: list[dict[str, Any]] = []
        self._evaluations: dict[str, tuple[int, dict[str, Any] | None]] = {}
        """Name -> when its file was written (ns), and what is shown of it."""

    def columns(self, since: int) -> dict[str, Any]:
        """{"generation", "step": [steps after `since`], "columns": figure -> values, None where there is none}.

        Figures that no row has are left out."""
        rows, replaced = self._file.new()
        if replaced:
            self.generation += bool(self._rows)
            self._rows = []
        self._rows += [row for row in rows if isinstance(row.get("step"), int)]
        found = [row for row in self._rows if row["step"] > since]
        known = [name for name in FIGURES if any(name in row for row in found)]
        return {
            "generation": self.generation,
            "step": [row["step"] for row in found],
            "columns": {name: [_number(row.get(name)) for row in found] for name in known},
        }

    def evaluations(self) -> list[dict[str, Any]]:
        """[{"name", "step", "reward", "ci95", "problems"}] by step; those around a run at 0 and its last."""
        last = int(self._rows[-1]["step"]) if self._rows else 0
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


def _result(found: Any) -> dict[str, Any] | None:
    if not isinstance(found, dict) or "reward" not in found:
        return None
    figures = {"reward": _number(found["reward"]), "ci95": _number(found.get("reward_ci95"))}
    return figures | {"problems": found.get("problems")}


def _number(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, int | float) and abs(value) < float("inf") else None
