"""`python -m learner --run DIR --model DIR`: the learner process of a run whose recipe lies in DIR/recipe.toml.

Exit codes: 0 the run went to its end; 3 it was asked to stop and can be resumed; 2 something a user can mend; 4 the
actors' engines or graders cannot work; 5 the guard ended it; 1 anything else. The launcher restarts it on 1, and when
it was killed.

With `learner.processes` = K this process is rank 0 and starts the K - 1 others itself, so signals and exit codes are
its own. `torchrun --nproc-per-node=K -m learner --run-dir DIR --model DIR` does without the key: then torchrun has
started them, turns every exit code but 0 into 1, and opens ports of its own on all interfaces.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from learner.intake.source import StopFlag
from learner.outcome import EXIT_FAILED, EXIT_FINISHED, EXIT_GUARD, EXIT_STOPPED, EXIT_USER, exit_code
from learner.processes import Place, RankLost, die_with_parent, started, under_torchrun
from protocol.config import Recipe, load_recipe
from protocol.errors import EngineFailed, RecipeError
from protocol.rundir import RunDir, read_json, write_json


def raise_file_limit() -> None:
    """As many open files as the system allows this process: each connection takes one, a stranger's, too, and the
    usual limit of 1024 would leave the hub little to tell them apart from actors with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a limit of the kernel's own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m learner", description=__doc__)
    parser.add_argument(  # torchrun takes --run for one of its own, although it stands behind the module
        "--run", "--run-dir", dest="run", type=Path, required=True, help="run directory with recipe.toml"
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the model to train")
    parser.add_argument("--parent", type=int, default=0, help="process id of the launcher: end when it ends")
    parser.add_argument("--host", default="", help="address to listen at instead of wire.host, given by a launcher")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise_file_limit()
    run = RunDir(options.run).create()
    try:
        place = Place(options.rank, options.size, options.store) if options.rank else under_torchrun()
        if place is not None and place.rank:
            return _follow(run, options.model, place, options.parent)
        if options.parent or place is not None:
            die_with_parent(options.parent or os.getppid())
        stop = StopFlag()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, stop.set)  # before `_learn`'s imports, which take seconds
        with run.lock("learner"):
            return _learn(run, options.model, stop, place, options.host)
    except RecipeError as error:  # the status is the other process's
        logging.error("%s", error)
        return EXIT_USER


def _follow(run: RunDir, model: Path, place: Place, parent: int) -> int:
    """Another rank than 0: do what that one says. It alone decides when the learner stops, and hears the signals that
    are meant for it; when it dies the kernel ends this process."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    if parent:
        die_with_parent(parent, signal.SIGKILL)
    from learner.joining import joined
    from learner.trainer import Trainer

    recipe = load_recipe(run.recipe)
    try:
        with joined(place, recipe.learner.device) as ranks:
            Trainer(recipe, run, model, ranks).follow()
    except RankLost as error:
        logging.error("%s", error)
        return EXIT_FAILED
    except Exception as error:
        logging.exception("rank %d failed", place.rank)
        return exit_code(error)
    return EXIT_FINISHED


def _learn(run: RunDir, model: Path, stop: StopFlag, place: Place | None, host: str = "") -> int:
    """The run, and its outcome as an exit code. `place`: given by torchrun, which has started the other ranks.
    `host`: address to listen at instead of the recipe's."""
    from learner.joining import joined
    from learner.loop import Learner

    try:
        recipe = load_recipe(run.recipe, (f'wire.host="{host}"',) if host else ())
        with _ranks(recipe, run, model, place) as own, joined(own, recipe.learner.device) as ranks:
            finished = Learner(recipe, run, model, stop, ranks)()
    except Exception as error:
        code = exit_code(error)
        if code == EXIT_FAILED:
            logging.exception("the learner failed")
            return _fail(run, code, f"{type(error).__name__}: {error}")
        if code == EXIT_USER:
            logging.exception("the learner cannot go on")
        return _fail(run, code, f"the engine failed: {error}" if isinstance(error, EngineFailed) else str(error))
    return EXIT_FINISHED if finished else EXIT_STOPPED


@contextmanager
def _ranks(recipe: Recipe, run: RunDir, model: Path, place: Place | None) -> Iterator[Place]:
    """This process's place, and the other ranks started, unless torchrun has done so."""
    wanted = recipe.learner.processes
    if place is None:
        command = [sys.executable, "-m", "learner", "--run", str(run.path), "--model", str(model)]
        with started(wanted, command, run.ranks) as own:
            yield own
    elif wanted not in (1, place.size):
        raise RecipeError(f"learner.processes: found {wanted}, allowed: {place.size}, as torchrun has started, or 1")
    else:
        yield place


def _fail(run: RunDir, code: int, error: str) -> int:
    logging.error("%s", error)
    phase = "stopped by the guard" if code == EXIT_GUARD else "failed"
    write_json(run.status, (read_json(run.status) or {}) | {"phase": phase, "error": error})
    return code


if __name__ == "__main__":
    sys.exit(main())
