"""Ray for a run: one of its own on loopback, or a cluster joined with `--ray-address`; this machine's GPUs.

A Ray of our own lives in a temporary directory that is removed afterwards. In a joined cluster the actors run on the
launcher's own node, since the learner's sockets are on loopback; its Ray must accept the token of this environment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.config import Recipe
from protocol.errors import RecipeError
from protocol.rundir import OWNER_FILE

RAY_DIR_PREFIX = "tandem-ray-"
CONNECT_S = 5.0
LONGEST_TEMPORARY = 20
"""Bytes of a path in which Ray's session directories and sockets (up to 86 bytes more) can lie."""

# --- GPUs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuShares:
    """Which GPUs each side sees, as CUDA_VISIBLE_DEVICES names them, and how many (or which part) an actor gets."""

    actors: list[str]
    learner: list[str]
    each_actor: float


def share_gpus(recipe: Recipe, visible: list[str]) -> GpuShares:
    """Divide this machine's GPUs: the learner gets the last ones of several, as many as it has processes; all share the
    only one.

    With `actor.gpus` = 0 the actors divide theirs evenly, a whole one each where there are enough; half of an only one
    stays with the learner. Raises RecipeError if the recipe asks for what is not there.
    """
    count, asked = max(1, recipe.actor.count), recipe.actor.gpus
    on_gpu, processes = recipe.learner.device != "cpu", recipe.learner.processes
    _check_processes(recipe, len(visible))
    if not visible or recipe.actor.engine == "fake":
        actors: list[str] = []
        each = 0.0
    elif len(visible) == 1:
        actors, each = visible, (0.5 if on_gpu else 1.0) / count
    else:
        actors = (visible[:-processes] or visible[:1]) if on_gpu else visible
        each = 1.0 / -(-count // len(actors))  # Ray gives no actor parts of two GPUs
    if asked > 1 and asked != int(asked):
        raise RecipeError(f"actor.gpus: found {asked:g}, allowed: up to 1, or a whole number of GPUs")
    if asked and recipe.actor.count and not _fits(asked, count, len(actors)):
        raise RecipeError(
            f"actor.gpus: found {asked:g} for each of {count} actors, allowed here: what fits {len(actors)} GPUs"
            f"{' beside those of the learner' if on_gpu and len(visible) > 1 else ''} (0 divides what there is)"
        )
    return GpuShares(actors, visible[-processes:] if on_gpu else [], asked or each)


def _check_processes(recipe: Recipe, gpus: int) -> None:
    """Raise RecipeError for several learner processes without a GPU for each, or none left for actors that want one."""
    processes = recipe.learner.processes
    if processes == 1 or recipe.learner.device == "cpu":
        return
    if not gpus:
        raise RecipeError(
            f"learner.processes: found {processes}, allowed here: 1, since no GPU is visible (with learner.device ="
            ' "cpu" also more, for tests)'
        )
    beside = 1 if recipe.needs_actors and recipe.actor.engine != "fake" else 0
    if processes > gpus - beside:
        raise RecipeError(
            f"learner.processes: found {processes}, allowed here: at most {max(1, gpus - beside)} of {gpus} GPUs"
            f"{', one of which the actors want' if beside else ''}"
        )


def _fits(share: float, count: int, gpus: int) -> bool:
    return share * count <= gpus if share >= 1 else count <= gpus * int(1 / share + 1e-6)


def visible_gpus(count: int) -> list[str]:
    """Names of the `count` GPUs that this process sees, as CUDA_VISIBLE_DEVICES spells them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",") if name.strip()] if named else [str(i) for i in range(count)]
    return names[:count]  # a name may be of a GPU that is not there


# --- Ray ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_runtime(recipe: Recipe, address: str) -> Iterator[None]:
    """Ray while the run lasts: joined where an address is given, else one of our own on loopback.

    Raises RecipeError for a cluster that cannot be joined, OSError for a Ray that does not start."""
    if address:
        with join(address):
            yield
        return
    with contextlib.ExitStack() as stack:
        try:
            _init(stack, _own_ray(recipe, stack))
        except Exception as error:  # Ray raises plain ones, too
            raise OSError(f"Ray did not start on this machine (is it overloaded?): {error}") from error
        yield


@contextlib.contextmanager
def join(address: str) -> Iterator[None]:
    """A cluster that somebody else started, while the context lasts. Raises RecipeError if it cannot be joined."""
    with contextlib.ExitStack() as stack:
        try:
            _init(stack, {"address": address})
        except Exception as error:
            raise RecipeError(f"--ray-address: {address!r} cannot be joined: {error}") from None
        yield


def _init(stack: contextlib.ExitStack, options: dict[str, Any]) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # after the environment is set: Ray reads token and addresses when it is loaded

    stack.callback(ray.shutdown)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)


def check_ray_address(address: str) -> None:
    """Raise RecipeError unless somebody listens there; Ray itself would try for minutes. "auto" is left to Ray."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        raise RecipeError(f'--ray-address: found {address!r}, allowed: HOST:PORT of a cluster\'s head, or "auto"')
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"--ray-address: nobody listens at {address} ({error}); allowed: what `ray start --head` printed"
        ) from None


def _own_ray(recipe: Recipe, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Options of a Ray of this run alone, and the temporary directory that it lives in (its path must be short)."""
    directory = Path(tempfile.mkdtemp(prefix=RAY_DIR_PREFIX, dir=_short_directory()))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    (directory / OWNER_FILE).write_text(str(os.getpid()))
    _make_ray_token(directory / "token")
    # Ray's switch for a single machine, of which it makes a default on desktops only: without it, every service
    # listens on all interfaces, whatever `_node_ip_address` says.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, int(recipe.actor.count * recipe.actor.cpus) + 1),
        "include_dashboard": False,
        "object_store_memory": 100 << 20,
        "_temp_dir": str(directory),
    }


def _short_directory() -> str:
    """A temporary directory whose name leaves room for the paths of Ray's sockets, of which Unix allows 107 bytes."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= LONGEST_TEMPORARY or not os.access("/tmp", os.W_OK) else "/tmp"


def _make_ray_token(path: Path) -> None:
    """Ray's own processes talk to each other with a token of this run, in a file that only its user reads."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
