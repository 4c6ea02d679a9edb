"""What a run has done so far, as far as no file of its own says it: the loop's part of every checkpoint.

The loop counts in it, evaluations keep their figures in it, `summary.py` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from learner.methods.rollouts import LAG_TOKENS

SURVIVE_GOING_BACK = ("wall_s", "rollbacks", "lr_scale", "earlier", "evals", "budget_tokens", "guard_events")


@dataclass
class RunState:
    """All of it is JSON."""

    step: int = 0
    """Steps done, of those that survive."""
    ready: bool = False
    """The warm start and the evaluations before the first step are done."""
    prompt_fingerprint: str = ""
    """Of the task: a run goes on with the data that it began with."""
    reference: dict[str, Any] = field(default_factory=dict)
    """Size and digest of the reference policy's file."""

    branch: int = 0
    """Rollbacks and guarded ends that lie behind the surviving steps."""
    rollbacks: int = 0
    lr_scale: float = 1.0
    """What rollbacks have made of the learning rate."""
    guard: dict[str, Any] = field(default_factory=dict)
    """The guard's memory."""
    guard_events: list[str] = field(default_factory=list)

    evals: dict[str, Any] = field(default_factory=dict)
    """Name -> figures (`EvalResult`)."""
    eval_pending: bool = False
    """An evaluation is under way in the background: if it is cut short, it is begun again."""

    rewards: list[float] = field(default_factory=list)
    """Mean reward of each step."""
    rollout_tokens: int = 0
    """Completion tokens of the groups that became steps."""
    budget_tokens: int = 0
    """What counts against `token_budget`, also of steps that were given up."""
    learner_tokens: float = 0.0
    """What went through forward and backward."""
    lag_sum: float = 0.0
    lag_max: float = 0.0
    lag_tokens: dict[str, int] = field(default_factory=dict)
    """Lag in steps -> tokens that were trained on with it."""
    parity: dict[str, float] = field(default_factory=lambda: {"checks": 0, "blind": 0, "worst_nats": 0.0})
    """Comparisons of engines with the model, how many of them could not have seen an update, the largest mean."""
    train_s: float = 0.0
    """Seconds inside gradient steps."""
    training_s: float = 0.0
    """Seconds of the steps, waiting and everything else included."""
    wall_s: float = 0.0
    earlier: dict[str, Any] = field(default_factory=dict)
    """What the hub counted in the processes before this one (`summary.process_totals`)."""

    def count_lag(self, figures: Mapping[str, float]) -> None:
        """The lags of one more step's tokens."""
        self.lag_sum += figures["lag_mean"]
        self.lag_max = max(self.lag_max, figures["lag_max"])
        for name, count in figures.items():
            if name.startswith(LAG_TOKENS):
                lag = name.removeprefix(LAG_TOKENS)
                self.lag_tokens[lag] = self.lag_tokens.get(lag, 0) + int(count)

    def count_parity(self, nats: float, blind: bool) -> None:
        """One more comparison of an engine with the model."""
        before = self.parity
        self.parity = {
            "checks": before["checks"] + 1,
            "blind": before["blind"] + blind,
            "worst_nats": max(before["worst_nats"], nats),
        }

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Be as a checkpoint was. Raises ValueError for a field that this version does not know."""
        known = vars(RunState())
        if unknown := saved.keys() - known.keys():
            raise ValueError(f"the checkpoint's state: found {', '.join(sorted(unknown))}, unknown to this version")
        vars(self).update(saved)

    def go_back(self, saved: Mapping[str, Any]) -> None:
        """Be as an earlier checkpoint was, but for what was spent and seen since, on a new branch."""
        kept = {name: getattr(self, name) for name in SURVIVE_GOING_BACK}
        branch = self.branch + 1
        self.take_up(saved)
        vars(self).update(kept, branch=branch)
