"""The run's desk in a joined Ray cluster: what its actors and `tandem scale` ask for, wherever they are.

A Ray actor without a task of its own, on the launcher's node. The launcher lays out the learner's address, the actors'
keys, the model's configuration and tokenizer, and how the actors get on; rollout actors fetch the first three
(`actor/cluster.py`), `tandem scale` on any node of the cluster reads the last and leaves a wish. Whoever may talk to
this Ray, and so holds its token, may read all of it: docs/security.md.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from actor.finding import NAMESPACE, Address, desk_name
from deploy.ray_cluster import check_ray_address, join
from protocol.errors import RecipeError
from protocol.scaling import Member, Wish

log = logging.getLogger(__name__)

DESK_PREFIX = desk_name("")
ANSWER_S = 30.0
LARGEST_FILE = 64 << 20
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
"""Endings of files of a model's directory that an actor has no use for: its weights come over the wire."""


class Laid(TypedDict):
    """What lies on the desk for `tandem scale`."""

    wanted: int
    members: list[dict[str, Any]]


class Desk:
    """Memory with a name. Everything in it is laid out again when Ray has restarted it."""

    def __init__(self) -> None:
        self._address: dict[str, Any] | None = None
        self._files: dict[str, bytes] | None = None
        self._laid: Laid = {"wanted": 0, "members": []}
        self._wish: dict[str, Any] | None = None

    def lay_files(self, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)

    def exchange(self, address: dict[str, Any] | None, laid: Laid) -> tuple[dict[str, Any] | None, bool]:
        """For the launcher: lay out the present state, take the wish that somebody left. Second: whether the model's
        files are here."""
        self._address, self._laid = address, laid
        wish, self._wish = self._wish, None
        return wish, self._files is not None

    def address(self) -> dict[str, Any] | None:
        """For actors: {"work", "keys"} of the learner; None while there is no learner."""
        return self._address

    def files(self) -> dict[str, bytes] | None:
        """For actors: name -> content of the model's files that are no weights."""
        return self._files

    def leave_wish(self, wish: dict[str, Any]) -> Laid:
        """For `tandem scale`; returns what was laid out before."""
        self._wish = wish
        return self._laid

    def laid(self) -> Laid:
        return self._laid


class DeskOfRun:
    """The launcher's end: makes the desk, and exchanges with it without ever waiting."""

    def __init__(self, label: str, node_id: str, model: Path) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"name": desk_name(label), "namespace": NAMESPACE, "scheduling_strategy": strategy}
        self._handle = ray.remote(Desk).options(num_cpus=0, max_restarts=-1, **options).remote()
        self._model = model
        self._files: Any = None
        self._question: Any = None

    def exchange(self, address: Address | None, wanted: int, members: list[Member]) -> Wish | None:
        """The wish that somebody left since the last time, if any."""
        import ray

        left: dict[str, Any] | None = None
        if self._question is not None:
            if not ray.wait([self._question], timeout=0)[0]:
                return None
            try:
                left, has_files = ray.get(self._question)
            except ray.exceptions.RayError as error:
                log.warning("the run's desk does not answer: %s", error)
                has_files = True
            if not has_files:
                self._files = self._files or ray.put(model_files(self._model))
                self._handle.lay_files.remote(self._files)
        laid: Laid = {"wanted": wanted, "members": [asdict(member) for member in members]}
        ask = self._handle.exchange.options(max_task_retries=0)
        self._question = ask.remote(address and asdict(address), laid)
        return Wish(int(left["actors"]), str(left["by"])) if left else None

    def close(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self._handle, no_restart=True)


def model_files(model: Path) -> dict[str, bytes]:
    """What an actor needs of a model's directory: configuration, tokenizer, chat template; no weights, no code."""
    files = {}
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix not in (*WEIGHTS, ".py") and not path.name.startswith("."):
            if path.stat().st_size > LARGEST_FILE:
                raise RecipeError(f"{path}: {path.stat().st_size} bytes, allowed for a file beside the weights: 64 MiB")
            files[path.name] = path.read_bytes()
    return files


# --- tandem scale ---


class RemoteRun:
    """A running run of the Ray cluster that this process has joined, through its desk."""

    def __init__(self, label: str) -> None:
        import ray

        self.name = run_of(label)
        self._handle = ray.get_actor(desk_name(label), namespace=NAMESPACE)

    def leave_wish(self, wish: Wish) -> int:
        """Returns how many actors were wanted before."""
        import ray

        return int(ray.get(self._handle.leave_wish.remote(asdict(wish)), timeout=ANSWER_S)["wanted"])

    def members(self) -> list[Member] | None:
        """None when the run has ended."""
        import ray

        try:
            return [Member(**entry) for entry in ray.get(self._handle.laid.remote(), timeout=ANSWER_S)["members"]]
        except ray.exceptions.RayActorError:
            return None


def run_of(label: str) -> str:
    """The run's name in the label that `RunDir.label` gave it."""
    return label.rpartition("-")[0]


@contextlib.contextmanager
def remote_run(address: str, name: str) -> Iterator[RemoteRun]:
    """The run of a name in the cluster at an address, or the only one there.

    Raises RecipeError if that cannot be joined, or if there is not exactly one such run."""
    check_ray_address(address)
    with join(address):
        import ray

        actors = ray.util.list_named_actors(all_namespaces=True)
        desks = [a["name"].removeprefix(DESK_PREFIX) for a in actors if a["name"].startswith(DESK_PREFIX)]
        found = [label for label in desks if name in ("", run_of(label), label)]
        if len(found) != 1:
            there = ", ".join(sorted(desks)) or "none"
            raise RecipeError(
                f"scale: {len(found)} runs in the cluster at {address} are {f'called {name!r}' if name else 'running'},"
                f" expected one (running: {there})"
            )
        yield RemoteRun(found[0])
