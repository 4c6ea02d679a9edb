"""The rollouts of a run for the browser: steps, their groups, and one group token by token. Plain values for JSON.

Three files meet here: the journal (groups as the actors sent them, and which of them became which step), metrics.jsonl
(rewards), and rollouts/ (the tokenizer, and what `learner/rollout_files.py` kept of the newest steps). It works beside
a learner that is writing them, and does without those that are not there. Knows no HTTP; called by the page's server.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from deploy.dashboard.journal_index import JournalIndex, StepRecord
from deploy.dashboard.jsonl_tail import JsonlTail
from deploy.dashboard.token_text import TokenText
from learner.intake.journal import JournalError, read_group_at
from protocol.errors import WireError
from protocol.messages import Completion, Group, TicketId
from protocol.rundir import RunDir

LISTED_STEPS = 500
"""So many of the newest are offered; others are reached one by one, or by their address."""


class RolloutReader:
    """The rollouts of one run. For any number of threads."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._lock = Lock()
        self._index = JournalIndex(run)
        self._metrics = JsonlTail(run.metrics)
        self._rewards: dict[int, float | None] = {}
        self._token_text = TokenText(run.rollouts / "tokenizer.json")

    def steps(self, asked: int | None = None) -> list[dict[str, Any]]:
        """The newest steps of the surviving branch, and one that is asked for with its neighbours, oldest first:

        {"step", "version": published after it, "groups": how many, "reward": mean of the graded completions that were
        trained on; None until it is logged}."""
        with self._lock:
            self._refresh()
            around = [] if asked is None else self._index.around(asked)
            found = {record.step: record for record in (*around, *self._index.newest(LISTED_STEPS))}
            return [
                {
                    "step": record.step,
                    "version": record.version,
                    "groups": len(record.ids),
                    "reward": self._rewards.get(record.step),
                }
                for _, record in sorted(found.items())
            ]

    def groups(self, step: int) -> list[dict[str, Any]]:
        """Groups of a step in the order of its batch: {"index", "id", "prompt", "rewards", "actor", "tokens": of each
        completion}. Raises KeyError for a step that is not there."""
        with self._lock:
            record = self._record(step)
            groups = [self._read(id_) for id_ in record.ids]
            return [
                {
                    "index": index,
                    "id": str(group.id),
                    "prompt": self._token_text.text(group.prompt_ids),
                    "rewards": list(group.rewards),
                    "actor": group.actor,
                    "tokens": [completion.num_tokens for completion in group.completions],
                }
                for index, group in enumerate(groups)
            ]

    def group(self, step: int, index: int) -> dict[str, Any]:
        """One group: {"id", "step", "index", "actor", "temperature", "prompt", "completions"}; of each completion

            "text", "reward", "scores", "finish_reason", "grader_error"
            "advantage":        None where the learner has kept none
            "tokens":           texts, see `TokenText.pieces`
            "logprobs":         of the engine
            "learner_logprobs": before the step's first update; None for tokens that were not trained on, or not kept
            "versions":         which weights drew each token
            "trained":          whether it was trained on; where nothing was kept, whether it might have been

        Raises KeyError for a step or index that is not there.
        """
        with self._lock:
            record = self._record(step)
            if not 0 <= index < len(record.ids):
                raise KeyError(f"group {index} of step {step}, which has {len(record.ids)}")
            group = self._read(record.ids[index])
            kept = kept_of(self._run.rollouts, record, index)
            ends = list(accumulate(completion.num_tokens for completion in group.completions))
            return {
                "id": str(group.id),
                "step": step,
                "index": index,
                "actor": group.actor,
                "temperature": group.temperature,
                "prompt": self._token_text.text(group.prompt_ids),
                "completions": [
                    self._completion(group, number, slice(end - completion.num_tokens, end), kept)
                    for number, (completion, end) in enumerate(zip(group.completions, ends, strict=True))
                ],
            }

    def _completion(self, group: Group, number: int, part: slice, kept: Kept | None) -> dict[str, Any]:
        completion = group.completions[number]
        trainable = np.frombuffer(group.mask, "u1")[part].astype(bool) & (not completion.grader_error)
        learner = np.full(completion.num_tokens, np.nan) if kept is None else kept.logprobs[part]
        return {
            "text": completion.text,
            "reward": completion.scores["reward"],
            "scores": {name: _finite(value) for name, value in completion.scores.items()},
            "finish_reason": completion.finish_reason,
            "grader_error": completion.grader_error,
            "advantage": None if kept is None else _finite(float(kept.advantages[number])),
            "tokens": self._token_text.pieces(np.frombuffer(group.token_ids, "<i4")[part].tolist()),
            "logprobs": _numbers(np.frombuffer(group.logprobs, "<f4")[part]),
            "learner_logprobs": _numbers(learner),
            "versions": _versions(completion),
            "trained": (trainable if kept is None else ~np.isnan(learner)).tolist(),
        }

    def _refresh(self) -> None:
        self._index.refresh()
        rows, replaced = self._metrics.new()
        if replaced:
            self._rewards.clear()
        for row in rows:
            self._rewards[row["step"]] = row.get("trained_reward_mean", row.get("reward_mean"))

    def _record(self, step: int) -> StepRecord:
        self._refresh()
        return self._index.step(step)

    def _read(self, ticket: TicketId) -> Group:
        try:
            return read_group_at(self._run.journal, self._index.offset(ticket))
        except (JournalError, WireError, FileNotFoundError) as error:
            raise KeyError(f"group {ticket}: {error}") from None


@dataclass(frozen=True)
class Kept:
    """What the learner kept of one group."""

    logprobs: NDArray[np.float32]
    """[T]; NaN where a token was not trained on."""
    advantages: NDArray[np.float32]
    """[completions]"""


def kept_of(directory: Path, record: StepRecord, index: int) -> Kept | None:
    """Of one group of a step; None where the learner kept nothing, or what lies there is of a branch given up."""
    try:
        with safe_open(directory / f"step-{record.step:08d}.safetensors", framework="numpy") as file:
            about = file.metadata()
            ids = tuple(TicketId(*id_) for id_ in json.loads(about["ids"]))
            if (int(about["step"]), int(about["version"]), ids) != (record.step, record.version, record.ids):
                return None
            completions = np.concatenate(([0], np.cumsum(file.get_tensor("completions"))))
            tokens = np.concatenate(([0], np.cumsum(file.get_tensor("tokens"))))
            first, end = completions[index : index + 2]
            return Kept(
                file.get_slice("logprobs")[tokens[first] : tokens[end]],
                file.get_slice("advantages")[first:end],
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # not there, or of another version of Tandem
        return None


def _versions(completion: Completion) -> list[int]:
    """Of each token."""
    starts = [*(start for _, start in completion.spans), completion.num_tokens]
    pairs = zip(completion.spans, pairwise(starts), strict=True)
    return [version for (version, _), (start, end) in pairs for _ in range(end - start)]


def _numbers(values: NDArray[np.floating]) -> list[float | None]:
    """For JSON, which has neither NaN nor infinity."""
    return [_finite(value) for value in values.tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
