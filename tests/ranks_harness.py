"""A learner of two processes: this one is rank 0, the other is what `python -m learner` starts. Not a test itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from learner.joining import joined
from learner.processes import started
from learner.ranks import Ranks
from protocol.config import Recipe
from protocol.rundir import RunDir


def write_recipe(recipe: Recipe, run: RunDir) -> None:
    run.create().recipe.write_text(tomli_w.dumps(recipe.model_dump(mode="json")))


@contextmanager
def two_ranks(recipe: Recipe, run: RunDir, model: Path, prelude: str = "") -> Iterator[Ranks]:
    """Within: rank 1 runs, and waits for orders as soon as it has loaded the model.

    `prelude`: Python that it executes first."""
    write_recipe(recipe, run)
    start = ["-c", f"{prelude}\nimport sys\nfrom learner.__main__ import main\nsys.exit(main())"]
    command = [sys.executable, *(start if prelude else ["-m", "learner"])]
    command += ["--run", str(run.path), "--model", str(model)]
    with started(2, command, run.ranks) as place, joined(place, "cpu") as ranks:
        yield ranks
