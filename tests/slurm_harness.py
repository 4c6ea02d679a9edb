"""Stand-ins for Slurm's commands, for `deploy/slurm/train.sbatch`. Not a test itself; see `node_harness` for nodes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"

SRUN = """#!/bin/bash
# Task 0 runs here; a harness that has a second node takes the command and the environment from these files.
while [[ $1 == --* ]]; do echo "$1" >>"$SHIM/srun.options"; shift; done
env -0 >"$SHIM/srun.env"
printf '%s\\0' "$@" >"$SHIM/argv.part" && mv "$SHIM/argv.part" "$SHIM/srun.argv"
"$@"
"""
SCONTROL = '#!/bin/bash\necho "$@" >>"$SHIM/scontrol.calls"\n'


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def slurm_environment(directory: Path, job: int, nodes: int) -> dict[str, str]:
    """Environment of a batch script: Slurm's variables, its commands as stand-ins, a home of its own."""
    shims = directory / "shims"
    write_program(shims / "srun", SRUN)
    write_program(shims / "scontrol", SCONTROL)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_", "TANDEM_"))}
    return {
        **kept,
        "PATH": f"{shims}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SHIM": str(shims),
        "HOME": str(directory),
        "TANDEM_ENV": str(directory / "env"),
        "TANDEM_RUNS": str(directory / "runs"),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": str(nodes),
    }


def wait_for(condition: Callable[[], object], what: str, timeout_s: float, alive: subprocess.Popen[str]) -> None:
    """Poll until the condition holds; AssertionError, naming it, after the deadline or when the process has ended."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert alive.poll() is None, f"the batch script ended with {alive.returncode} before {what}"
        assert time.monotonic() < end, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)
