"""Errors of child processes reach the actor as their own words, the first cause first."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pydantic
import pytest

from actor.vllm_children import ErrorRecorder, describe, die_with_parent, recorded_cause


@pytest.fixture
def errors(tmp_path: Path) -> Path:
    return tmp_path / "errors.jsonl"


@pytest.fixture
def logger(errors: Path) -> logging.Logger:
    logger = logging.Logger("child")
    logger.addHandler(ErrorRecorder(errors))
    return logger


def log_exception(logger: logging.Logger, error: Exception) -> None:
    try:
        raise error
    except Exception:
        logger.exception("failed to start")


def test_recorded_cause_is_the_first_exception(errors: Path, logger: logging.Logger) -> None:
    logger.info("not an error")
    logger.error("a message")
    log_exception(logger, ValueError("no memory for\nthe cache"))
    log_exception(logger, RuntimeError("See root cause above"))
    assert recorded_cause(errors) == "ValueError: no memory for\nthe cache"


def test_recorded_cause_is_the_death_of_a_worker_before_what_follows(errors: Path, logger: logging.Logger) -> None:
    logger.error("Worker proc %s died unexpectedly (exit code: %s)", "VllmWorker-0", -9)
    log_exception(logger, RuntimeError("cancelled"))
    assert recorded_cause(errors) == "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"


def test_recorded_cause_falls_back_to_a_message_and_to_nothing(errors: Path, logger: logging.Logger) -> None:
    assert recorded_cause(errors) is None
    logger.error("rank %s: out of luck", 7)
    assert recorded_cause(errors) == "rank 7: out of luck"


def test_recorded_cause_after_an_offset_ignores_what_is_older(errors: Path, logger: logging.Logger) -> None:
    log_exception(logger, ValueError("old"))
    seen = errors.stat().st_size
    assert recorded_cause(errors, seen) is None
    log_exception(logger, ValueError("new"))
    assert recorded_cause(errors, seen) == "ValueError: new"


def test_describe_gives_a_pydantic_error_without_its_input() -> None:
    class Model(pydantic.BaseModel):
        length: int

        @pydantic.field_validator("length")
        @classmethod
        def _short(cls, value: int) -> int:
            if value > 5:
                raise ValueError("length (9) is greater than 5")
            return value

    with pytest.raises(pydantic.ValidationError) as failure:
        Model(length=9)
    assert describe(failure.value) == "ValueError: length (9) is greater than 5"
    assert describe(KeyError("a")) == "KeyError: 'a'"
    assert describe(TimeoutError()) == "TimeoutError"


def _grandchild() -> None:
    die_with_parent()
    time.sleep(600)


def _child(pid: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    grandchild = multiprocessing.get_context("spawn").Process(target=_grandchild)
    grandchild.start()
    pid.put(grandchild.pid)
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal is Linux's")
def test_die_with_parent_survives_not_even_sigkill() -> None:
    context = multiprocessing.get_context("spawn")
    pids: multiprocessing.Queue[int] = context.Queue()
    child = context.Process(target=_child, args=(pids,))
    child.start()
    grandchild = psutil.Process(pids.get(timeout=60))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    _, alive = psutil.wait_procs([grandchild], timeout=60)
    for process in alive:
        process.kill()
    assert not alive
