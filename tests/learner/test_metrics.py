"""metrics.jsonl has one line a step, whatever happened to the processes that wrote it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from learner.metrics import MetricsLog
from protocol.rundir import RunDir, read_jsonl


def write(run: RunDir, first_step: int, *steps: int) -> None:
    log = MetricsLog(run, first_step)
    for step in steps:
        log.write(step, {"reward_mean": step / 10 + first_step})
    log.close()


def test_steps_that_a_crash_lost_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one process and second differ by a count, and are read in the order of their names: 9 behind 10.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    run = RunDir(tmp_path)
    write(run, 0, 1, 2, 3, 4)
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "rew')  # killed in mid-write
    write(run, 2, 3, 4, 5)  # resumed at a checkpoint of step 2
    assert [(row["step"], row["reward_mean"]) for row in read_jsonl(run.metrics)] == [
        (1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4), (5, 2.5),
    ]  # fmt: skip
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [event.step for event in board.Scalars("reward_mean")] == [1, 2, 3, 4, 5]


def test_the_last_line_can_be_amended(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = MetricsLog(run, 0, branch=1)
    log.write(1, {"loss": 1.0, "branch": 0})
    log.write(2, {"loss": 2.0, "branch": 1})
    log.amend({"eval_reward": 0.5})
    log.close()
    assert read_jsonl(run.metrics) == [
        {"step": 1, "loss": 1.0, "branch": 0},
        {"step": 2, "loss": 2.0, "branch": 1, "eval_reward": 0.5},
    ]
    assert not run.abandoned_metrics.exists()


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = MetricsLog(run)
    log.write(1, {"loss": math.nan, "kl": math.inf, "lr": 0.5})
    log.close()
    assert read_jsonl(run.metrics) == [{"step": 1, "loss": None, "kl": None, "lr": 0.5}]
