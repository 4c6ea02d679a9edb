"""`python -m actor.rewards SPEC --answer REFERENCE [TEXT]`: try a grader on a text. Without TEXT: standard input."""

from __future__ import annotations

import argparse
import os
import sys

from actor.rewards import GRADERS, find_grader, load_user_functions, user_functions_of


def main(arguments: list[str] | None = None) -> int:
    """Print a response's scores. Returns 0, or 2 for a spec or a reference that the graders refuse."""
    parser = argparse.ArgumentParser(prog="python -m actor.rewards", description=__doc__)
    parser.add_argument("spec", help="as task.grader in a recipe; a module:function of yours is imported")
    parser.add_argument("response", nargs="?", metavar="TEXT", help="the response; default: standard input")
    parser.add_argument("--answer", required=True, help="the reference answer")
    options = parser.parse_intermixed_args(arguments)
    response = sys.stdin.read() if options.response is None else options.response
    try:
        graders = {**GRADERS, **load_user_functions(user_functions_of(options.spec), os.getcwd())}
        scores = find_grader(options.spec, graders)(response, options.answer)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for name, value in scores.items():
        sys.stdout.write(f"{name} = {value:g}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
