"""The sampling thread: its pace, and where the newest sample can be had."""

from __future__ import annotations

from pathlib import Path

from learner.telemetry.telemetry import Telemetry
from learner.telemetry.timeline import TimelineReader
from protocol.rundir import RunDir
from tests.actor_harness import until
from tests.learner.test_loop import recipe_of


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
