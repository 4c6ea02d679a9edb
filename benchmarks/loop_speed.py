"""The demo's workload as a whole: overlapped (max_lag = 1) and one side after the other (max_lag = 0), in one run.

On two shared cores both sides want the same cores, so overlap can gain little there; the overlap itself shows with an
engine that sleeps instead of computing.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.training import log_of, train
from protocol.rundir import read_json, read_jsonl

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.toml"
WORKLOAD = ("eval.prompts=0", "grpo.skip_zero_advantage=false")
"""Every completion is trained on, so that both runs do the same work whatever they earn."""
WARM = ("warm_start.examples=32", "warm_start.epochs=1")
"""A model that earns a reward now and then: a batch without any would leave the learner nothing to do."""
ASLEEP = ("warm_start.examples=0", 'task.grader="exact"', "task.max_operand=4", "rollout.max_tokens=1")
"""The sleeping engine answers with one random digit, which is right one time in ten."""
MEASURED = slice(1, -1)
"""The first step fills the pipeline, and beside the last one nothing is generated any more: both would mislead."""
RUN_LIMIT_S = 1200


def run(name: str, directory: Path, *overrides: str) -> dict[str, Any]:
    """Train by the demo's recipe with overrides; returns figures of the steps between the first and the last."""
    code, run_dir = train(RECIPE, directory, name, (*WORKLOAD, *overrides), RUN_LIMIT_S)
    if code:
        raise RuntimeError(
            f"{name} ended with {code}:\n" + log_of(directory, name).read_text("utf-8", "replace")[-2000:]
        )
    rows, summary = read_jsonl(run_dir.metrics)[MEASURED], read_json(run_dir.summary)
    seconds = sum(row["step_s"] for row in rows)
    return {
        "name": name,
        "steps": len(rows),
        "step_s": statistics.median(row["step_s"] for row in rows),
        "train_s": statistics.median(row["train_s"] for row in rows),
        "wait_s": statistics.median(row["wait_s"] for row in rows),
        "end_to_end_tokens_per_s": sum(row["completion_tokens"] for row in rows) / seconds,
        "learner_tokens_per_s": summary["learner_tokens_per_s"],
        "rollout_tokens_per_s": summary["rollout_tokens_per_s"],
        "lag_mean": summary["lag_mean"],
        "update_fetch_s": summary["weights"]["seconds_p50"],
        "update_pause_s": summary["weights"]["pause_seconds_p50"],
        "bytes_dense": summary["weights"]["bytes_dense"],
    }


def compare(kind: str, steps: int, *overrides: str) -> dict[str, Any]:
    """Overlapped, synchronous, overlapped again: the machine's drift shows as the difference of the outer two."""
    settings = (f"steps={steps}", *overrides)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as directory:
        first = run(f"{kind}-overlapped-1", Path(directory), *settings, "rollout.max_lag=1")
        synchronous = run(f"{kind}-synchronous", Path(directory), *settings, "rollout.max_lag=0")
        second = run(f"{kind}-overlapped-2", Path(directory), *settings, "rollout.max_lag=1")
    rate = statistics.mean([first["end_to_end_tokens_per_s"], second["end_to_end_tokens_per_s"]])
    return {
        "runs": [first, synchronous, second],
        "overlap_speedup": rate / synchronous["end_to_end_tokens_per_s"],
    }


def real_engine(steps: int) -> dict[str, Any]:
    """vLLM and the learner on the same cores."""
    return compare("vllm", steps, *WARM)


def sleeping_engine(steps: int, token_s: float) -> dict[str, Any]:
    """An engine that sleeps `token_s` a token beside the real learner: all that overlap can give."""
    threads = f"learner.threads={os.cpu_count()}"  # the engine leaves it all cores, overlapped or not
    return compare("sleeping", steps, *ASLEEP, threads, 'actor.engine="fake"', f"actor.fake_token_s={token_s}")
