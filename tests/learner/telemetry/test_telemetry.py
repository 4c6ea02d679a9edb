"""The learner's telemetry as a whole: its pace, where its newest sample can be had, what it leaves of a run's end."""

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
from tests.actor_harness import until
from tests.learner.test_loop import recipe_of

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


def test_sampling_keeps_its_pace_however_few_samples_the_timeline_keeps(tmp_path: Path) -> None:
    run = RunDir(tmp_path).create()
    recipe = recipe_of(metrics={"sample_every_s": 0.2, "serve": False})
    reader, took = TimelineReader(run.timeline), []
    with Telemetry(recipe, run, lambda: 3, lambda: "training") as telemetry:
        take = telemetry.sampler.take
        telemetry.sampler.take = lambda: took.append(take()) or took[-1]  # type: ignore[method-assign, func-returns-value]
        until(lambda: took, "the first sample")
        telemetry._timeline.every_s = 1e6
        first, seen = len(took), list(reader.new())
        until(lambda: len(took) >= first + 3, "three more")
        until(lambda: seen.extend(reader.new()) or seen[-1].t > took[first].t, "readers to have the newest")
    kept = len(run.timeline.read_bytes().splitlines())
    last = list(reader.new())[-1]
    assert (last.phase, last.t) == ("finished", took[-1].t) == ("finished", telemetry.newest and telemetry.newest.t)
    assert kept <= first + 1 < len(took), "the file has those of before, and the last one"
