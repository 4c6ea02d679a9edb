"""One run of `tandem train` in a process of its own, for the scripts that compare runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from protocol.rundir import RunDir


def train(recipe: Path, directory: Path, name: str, overrides: Iterable[str], limit_s: float) -> tuple[int, RunDir]:
    """(exit code, run directory DIRECTORY/NAME); what it prints goes to DIRECTORY/NAME.log.

    Raises subprocess.TimeoutExpired after `limit_s`."""
    command = [sys.executable, "-m", "deploy.cli", "train", str(recipe), "--runs", str(directory), "--name", name]
    for override in overrides:
        command += ["--set", override]
    with open(log_of(directory, name), "w") as log:
        code = subprocess.run(command, check=False, timeout=limit_s, stdout=log, stderr=subprocess.STDOUT).returncode
    return code, RunDir(directory / name)


def log_of(directory: Path, name: str) -> Path:
    """Where `train` puts what a run prints."""
    return directory / f"{name}.log"
