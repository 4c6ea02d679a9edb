"""`python -m actor ADDRESS`: one rollout actor by hand, without Ray. ADDRESS is tcp://HOST:PORT or an endpoint.json."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import signal
import sys
from collections.abc import Sequence

from actor.finding import finder
from actor.loop import ActorLoop, LearnerLost, LearnerRefused
from protocol.errors import EngineFailed


async def run_until_signalled(
    learner: str, name: str, lost_learner_s: float, user_functions: Sequence[str] = (), key_file: str = ""
) -> int:
    """Run one actor; SIGINT and SIGTERM make it leave in good order. Returns the exit code."""
    path = os.getcwd()
    try:
        find = finder(learner, key_file)
    except ValueError as error:
        sys.stderr.write(f"{name} failed: {error}\n")
        return 1
    actor = ActorLoop(find, name, lost_learner_s=lost_learner_s, user_functions=user_functions, user_path=path)
    actor.learner = learner
    task = asyncio.ensure_future(actor.run())
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    try:
        reason = await task
    except asyncio.CancelledError:
        sys.stderr.write(f"{name} leaves\n")
        return 130
    except (EngineFailed, LearnerLost, LearnerRefused, ValueError) as error:
        sys.stderr.write(f"{name} failed: {error}\n")
        return 1
    sys.stderr.write(f"{name} ends: {reason}\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m actor", description=__doc__)
    parser.add_argument("learner", help="tcp://HOST:PORT, or the run's endpoint.json")
    parser.add_argument("--key", default="", metavar="FILE", help="copy of RUN/keys/actor.json; not needed beside it")
    parser.add_argument("--name", default=f"{platform.node()}-{os.getpid()}", help="unique among the actors of the run")
    parser.add_argument("--lost-learner-s", type=float, default=120.0, help="silence after which the actor gives up")
    parser.add_argument(
        "--grader",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a function of yours that task.grader may name, also from the working directory; repeatable",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return asyncio.run(
        run_until_signalled(options.learner, options.name, options.lost_learner_s, options.grader, options.key)
    )


if __name__ == "__main__":
    sys.exit(main())
