"""How a learner process may end, and what each end means to the launcher: exit codes by exception.

The launcher restarts the learner after EXIT_FAILED, and after a kill; every other code is an end of the run.
"""

from __future__ import annotations

from learner.intake.source import Interrupted, TicketsFail
from protocol.errors import DeadlineExceeded, EngineFailed, RecipeError

EXIT_FINISHED, EXIT_FAILED, EXIT_USER, EXIT_STOPPED, EXIT_ENGINE, EXIT_GUARD = 0, 1, 2, 3, 4, 5


class GuardStop(Exception):
    """The guard saw a collapse, and the recipe says that the run ends then (or has gone back too often)."""


def exit_code(error: BaseException) -> int:
    """Exit code of a learner that an exception ends."""
    if isinstance(error, Interrupted):
        return EXIT_STOPPED
    if isinstance(error, EngineFailed | DeadlineExceeded | TicketsFail):
        return EXIT_ENGINE
    if isinstance(error, GuardStop):
        return EXIT_GUARD
    return EXIT_USER if isinstance(error, RecipeError | ValueError | OSError) else EXIT_FAILED
