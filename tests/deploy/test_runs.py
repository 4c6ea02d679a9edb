"""Which run a command means."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from deploy.runs import run_to_look_at
from protocol.errors import RecipeError
from protocol.rundir import RunDir

BEGAN = 1_700_000_000.0


def test_run_to_look_at_is_the_running_one_or_the_last(tmp_path: Path) -> None:
    runs = []
    for number, name in enumerate(("a", "b", "c")):
        run = RunDir(tmp_path / name).create()
        run.recipe.write_text("")
        os.utime(run.recipe, (time.time(), BEGAN + (5 if name == "b" else number)))
        runs.append(run)
    assert run_to_look_at("", tmp_path).path.name == "b"
    with runs[2].lock("launcher"):
        assert run_to_look_at("", tmp_path).path.name == "c"
        with runs[0].lock("launcher"), pytest.raises(RecipeError, match="2 runs are running, name one: a, c"):
            run_to_look_at("", tmp_path)
    assert run_to_look_at("a", tmp_path) == run_to_look_at(str(tmp_path / "a"), tmp_path)
    with pytest.raises(RecipeError, match=r"found no run .x.; runs under .*: a, b, c"):
        run_to_look_at("x", tmp_path)


def test_run_to_look_at_without_any(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found no run under"):
        run_to_look_at("", tmp_path)
