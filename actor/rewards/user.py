"""User functions: imported by module:function, at a worker's start, because its parent said so; never for a ticket."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from actor.rewards.base import Grader


def load_user_functions(names: Sequence[str], directory: str) -> dict[str, Grader]:
    """Import functions by module:function; modules are also looked for in `directory`, after all installed ones.

    Raises ValueError with the name and what is wrong with it.
    """
    if directory and directory not in sys.path:
        sys.path.append(directory)
    return {name: _load(name, directory) for name in dict.fromkeys(names)}


def _load(name: str, directory: str) -> Grader:
    module_name, colon, function_name = name.partition(":")
    if not colon or not function_name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"grader: found {name!r}, allowed: module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"grader: found {name!r}, but importing {module_name} (also from {directory or 'no directory'}) raised"
            f" {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(
            f"grader: found {name!r}, but {module_name} ({getattr(module, '__file__', None)}) has no function"
            f" {function_name!r}; allowed: {', '.join(public) or 'none'}"
        )
    return function
