"""The learner's telemetry as a whole: what it leaves of a run's end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from learner.intake.source import Interrupted
from learner.outcome import GuardStop
from learner.telemetry.sample import Sample
from learner.telemetry.telemetry import Telemetry
from learner.telemetry.timeline import TimelineReader
from protocol.config import Recipe, parse_recipe
from protocol.rundir import RunDir

RECIPE: Recipe = parse_recipe({"metrics": {"serve": False}}, "")


def last_sample(path: Path, error: BaseException | None = None) -> Sample:
    """Of a run that trained, and that ended with an error, or well."""
    run = RunDir(path).create()
    telemetry = Telemetry(RECIPE, run, lambda: 3, lambda: "training")
    with suppress(RuntimeError, GuardStop, Interrupted), telemetry:
        telemetry.clock.enter("other")
        with telemetry.clock.of("training"):
            if error is not None:
                raise error
    return list(TimelineReader(run.timeline).new())[-1]


def test_a_run_that_went_to_its_end_is_finished(tmp_path: Path) -> None:
    assert last_sample(tmp_path).phase == "finished"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), GuardStop("KL"), Interrupted("groups")], ids=repr)
def test_a_run_that_ended_otherwise_is_not_finished(tmp_path: Path, error: BaseException) -> None:
    last = last_sample(tmp_path, error)
    assert (last.phase, last.step) == ("other", 3)
    assert "finished" not in last.phases
