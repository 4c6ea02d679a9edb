"""What the learner's process leaves in the run's status where an exception ends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.__main__ import _learn
from learner.intake.source import StopFlag
from learner.outcome import EXIT_FAILED, EXIT_GUARD, GuardStop
from protocol.rundir import RunDir, read_json


@pytest.mark.parametrize(
    ("error", "code", "phase", "text"),
    [
        (RuntimeError("CUDA error"), EXIT_FAILED, "failed", "RuntimeError: CUDA error"),
        (GuardStop("the guard ended the run"), EXIT_GUARD, "stopped by the guard", "the guard ended the run"),
    ],
    ids=["crash", "guard"],
)
def test_status_says_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, phase: str, text: str
) -> None:
    def ended(*_: object) -> bool:
        raise error

    monkeypatch.setattr("learner.loop.Learner", lambda *_: ended)
    run = RunDir(tmp_path).create()
    run.recipe.write_text('name = "made"\n')
    assert _learn(run, tmp_path, StopFlag(), None) == code
    assert read_json(run.status) == {"phase": phase, "error": text}
