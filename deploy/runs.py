"""Which run a command means: by name, by directory, the only one that is running, or the newest."""

from __future__ import annotations

from pathlib import Path

from protocol.errors import RecipeError
from protocol.rundir import RunDir


def runs_of(runs: Path) -> list[RunDir]:
    """Every run under a directory, by name."""
    return [RunDir(path.resolve()) for path in sorted(runs.glob("*/")) if (path / "recipe.toml").is_file()]


def running_runs(runs: Path) -> list[RunDir]:
    """Runs whose launcher is alive, by name."""
    return [run for run in runs_of(runs) if run.is_held("launcher")]


def named_run(name: str, runs: Path) -> RunDir | None:
    """The run of a name under `runs`, or of a path."""
    return next((RunDir(path.resolve()) for path in (runs / name, Path(name)) if path.is_dir()), None)


def run_to_look_at(name: str, runs: Path) -> RunDir:
    """A run to show, whether it is running or not. Without a name: the only one that is running, or else the one that
    wrote last. Raises RecipeError where there is none, or more than one is running."""
    if name:
        run = named_run(name, runs)
        if run is None or not run.recipe.is_file():
            known = ", ".join(run.path.name for run in runs_of(runs)) or "none"
            raise RecipeError(f"found no run {name!r}; runs under {runs}: {known}")
        return run
    live, every = running_runs(runs), runs_of(runs)
    if len(live) > 1:
        raise RecipeError(f"{len(live)} runs are running, name one: {', '.join(run.path.name for run in live)}")
    if not every:
        raise RecipeError(f"found no run under {runs}; name one, or its directory")
    return live[0] if live else max(every, key=_last_written)


def _last_written(run: RunDir) -> float:
    return max((path.stat().st_mtime for path in (run.status, run.recipe) if path.exists()), default=0.0)
