"""The process that runs graders: `python -m actor.grading_worker FD PARENT [DIRECTORY [MODULE:FUNCTION ...]]`.

Started and bounded by `grading.py`. Reads requests from the socket FD and answers each, in order. A frame, in both
directions, is its length (4 bytes, little-endian) and that many bytes of JSON. It imports little beyond the graders, so
it starts in a tenth of a second. The user functions that it may call are those of its command line, imported before it
says that it is ready, also from DIRECTORY; a request never makes it import one.

`python -m actor.grading_worker --check DIRECTORY MODULE:FUNCTION ...` only tries these imports, and says what is wrong.

Nothing stays behind: an idle worker sees the end of its socket, and the kernel kills a busy one when the thread that
started it ends, for whatever reason (PR_SET_PDEATHSIG, Linux).
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from actor.rewards import GRADERS, Grader, Scores, find_grader, load_user_functions, prepare_grader

HEADER_BYTES = 4
READY = "ready"
MAX_ERROR_CHARS = 500
_PR_SET_PDEATHSIG = 1


class Request(msgspec.Struct, array_like=True, frozen=True):
    """Pool -> worker."""

    grader: str
    response: str
    answer: str
    prepare: bool = False
    """Import what the grader needs, and answer when that is done; nothing is graded."""


class Reply(msgspec.Struct, array_like=True, frozen=True):
    """Worker -> pool. Scores, all finite and one of them "reward", or an error. The first reply says "ready", or
    what is wrong with a user function."""

    scores: Scores
    error: str = ""


def serve(graders: Mapping[str, Grader], arguments: Sequence[str]) -> None:
    """Answer requests on the socket `arguments[0]` until the pool, in process `arguments[1]`, closes it or is gone.

    The other arguments: where user functions are also looked for, and their names.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the pool decides when we end
    die_with_parent(int(arguments[1]))
    with socket.socket(fileno=int(arguments[0])) as connection, connection.makefile("rb") as requests:
        try:
            graders = {**graders, **load_user_functions(arguments[3:], "".join(arguments[2:3]))}
        except ValueError as error:
            connection.sendall(encode_frame(Reply({}, describe(error))))
            return
        connection.sendall(encode_frame(Reply({}, READY)))
        while len(header := requests.read(HEADER_BYTES)) == HEADER_BYTES:
            request = msgspec.json.decode(requests.read(int.from_bytes(header, "little")), type=Request)
            connection.sendall(encode_frame(grade(graders, request)))


def grade(graders: Mapping[str, Grader], request: Request) -> Reply:
    """Answer one request; whatever the grader throws becomes the reply's error."""
    try:
        if request.prepare:
            prepare_grader(request.grader, graders)
            return Reply({})
        return Reply(check_scores(find_grader(request.grader, graders)(request.response, request.answer)))
    except BaseException as error:  # SystemExit, too: the sample failed, the worker did not
        return Reply({}, describe(error))


def check_scores(scores: Any) -> Scores:
    """Scores as plain floats. Raises ValueError unless all are finite numbers with names, one of them "reward"."""
    if not isinstance(scores, Mapping) or "reward" not in scores:
        raise ValueError(f'scores: found {str(scores)[:80]}, allowed: a mapping of names to numbers with "reward"')
    checked = {str(name): float(value) for name, value in scores.items()}
    for name, value in checked.items():
        if not math.isfinite(value):
            raise ValueError(f"scores: found {name} = {value}, allowed: finite numbers")
    return checked


def encode_frame(message: Request | Reply) -> bytes:
    """Raises UnicodeEncodeError for text with a lone surrogate."""
    body = msgspec.json.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def describe(error: BaseException) -> str:
    """One short line, also where the error's text holds what cannot be encoded."""
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS].encode(errors="replace").decode()


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent's thread ends; elsewhere than on Linux the closed socket must do."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(0)


def check(arguments: Sequence[str]) -> int:
    """Try to import user functions; what is wrong goes to standard error. Returns the exit status."""
    directory, *names = arguments
    try:
        load_user_functions(names, directory)
    except ValueError as error:
        sys.stderr.write(" ".join(describe(error).split()) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        sys.exit(check(sys.argv[2:]))
    serve(GRADERS, sys.argv[1:])
