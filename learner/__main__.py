"""`python -m learner --run DIR --model DIR`: the learner process of a run whose recipe lies in DIR/recipe.toml.

Exit codes: 0 the run went to its end; 3 it was asked to stop and can be resumed; 2 something a user can mend; 4 the
actors' engines or graders cannot work; 5 the guard ended it; 1 anything else. The launcher restarts it on 1, and when
it was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
from pathlib import Path

from learner.intake.source import StopFlag
from learner.outcome import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USER, exit_code
from protocol.config import load_recipe
from protocol.errors import EngineFailed, RecipeError
from protocol.rundir import RunDir, read_json, write_json

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM when the launcher dies, so that nothing is left running."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("the launcher is gone")


def raise_file_limit() -> None:
    """As many open files as the system allows this process: each connection takes one, a stranger's, too, and the
    usual limit of 1024 would leave the hub little to tell them apart from actors with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a limit of the kernel's own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m learner", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory with recipe.toml")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the model to train")
    parser.add_argument("--parent", type=int, default=0, help="process id of the launcher: end when it ends")
    parser.add_argument("--host", default="", help="address to listen at instead of wire.host, given by a launcher")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if options.parent:
        die_with_parent(options.parent)
    raise_file_limit()

    stop = StopFlag()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop.set)  # before `_learn`'s imports, which take seconds
    run = RunDir(options.run).create()
    try:
        with run.lock("learner"):
            return _learn(run, options.model, stop, options.host)
    except RecipeError as error:  # the status is the other process's
        logging.error("%s", error)
        return EXIT_USER


def _learn(run: RunDir, model: Path, stop: StopFlag, host: str = "") -> int:
    """The run, and its outcome as an exit code. `host`: address to listen at instead of the recipe's."""
    from learner.loop import Learner

    try:
        recipe = load_recipe(run.recipe, (f'wire.host="{host}"',) if host else ())
        finished = Learner(recipe, run, model, stop)()
    except Exception as error:
        code = exit_code(error)
        if code == EXIT_FAILED:
            logging.exception("the learner failed")
            return _fail(run, code, f"{type(error).__name__}: {error}")
        if code == EXIT_USER:
            logging.exception("the learner cannot go on")
        return _fail(run, code, f"the engine failed: {error}" if isinstance(error, EngineFailed) else str(error))
    return EXIT_FINISHED if finished else EXIT_STOPPED


def _fail(run: RunDir, code: int, error: str) -> int:
    logging.error("%s", error)
    write_json(run.status, (read_json(run.status) or {}) | {"phase": "failed", "error": error})
    return code


if __name__ == "__main__":
    sys.exit(main())
