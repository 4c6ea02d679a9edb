"""Where actors run in a Ray cluster: a placement group and a Ray actor for each, and whether there is room for them.

Implements `deploy/fleet.py`'s `Cluster`. A placement group reserves an actor's CPUs and GPUs on one node before its
process is started, waits where there is no room, and tells an autoscaling cluster what is missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.fleet import Sight
from protocol.config import Recipe
from protocol.errors import RecipeError
from protocol.scaling import actor_name

log = logging.getLogger(__name__)

NODE_ID_LABEL = "ray.io/node-id"
PLACED = "CREATED"
DEAD_AFTER = 3
RESERVE_S = 60.0


@dataclass(frozen=True)
class Node:
    """One machine of a cluster, with all that it has (not only what is free)."""

    address: str
    cpus: float
    gpus: float
    here: bool = False
    """The launcher's, and so the learner's."""

    def __str__(self) -> str:
        return f"{self.address}{' (this one)' if self.here else ''} {_size(self.cpus, self.gpus)}"


def room(node: Node, cpus: float, gpus: float) -> int:
    """Actors of that size that a node holds when it is empty. Ray gives no actor parts of two GPUs."""
    by_cpu = int(node.cpus / cpus + 1e-6)
    if not gpus:
        return by_cpu
    if gpus >= 1:
        return min(by_cpu, int(node.gpus / gpus + 1e-6))
    whole = int(node.gpus)
    return min(by_cpu, whole * int(1 / gpus + 1e-6) + int((node.gpus - whole) / gpus + 1e-6))


def check_room(recipe: Recipe, nodes: Sequence[Node]) -> None:
    """Raise RecipeError if the cluster cannot hold the recipe's actors: what was asked, what exists, what would fit."""
    actor = recipe.actor
    fits = sum(room(node, actor.cpus, actor.gpus) for node in nodes)
    if fits >= actor.count or actor.wait_for_room:
        return
    allowed = [f"actor.count of at most {fits}"] if fits else []
    largest = max((node.cpus for node in nodes), default=0.0), max((node.gpus for node in nodes), default=0.0)
    if not fits:
        allowed.append(f"actor.cpus of at most {largest[0]:g} and actor.gpus of at most {largest[1]:g}")
    raise RecipeError(
        f"actor.count: found {actor.count} actors of {_size(actor.cpus, actor.gpus)} each; this Ray cluster has"
        f" {'; '.join(str(node) for node in nodes) or 'no node'}; allowed: {', or '.join(allowed)}, or"
        " actor.wait_for_room = true for a cluster that grows"
    )


def _size(cpus: float, gpus: float) -> str:
    return _amount(cpus, "CPU") + (f" and {_amount(gpus, 'GPU')}" if gpus else "")


def _amount(count: float, kind: str) -> str:
    return f"{count:g} {kind}{'' if count == 1 else 's'}"


@contextlib.contextmanager
def reserve_gpus(count: float, node_id: str) -> Iterator[list[str]]:
    """Keep GPUs of a node from everybody else while the context lasts: a Ray actor that does nothing holds them.

    Gives their names, as CUDA_VISIBLE_DEVICES spells them; none for a count of 0. Raises RecipeError if they are taken.
    """
    if not count:
        yield []
        return
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"GPU": count}], name="tandem-learner", bundle_label_selector=[{NODE_ID_LABEL: node_id}])
    try:
        if not group.wait(RESERVE_S):
            raise RecipeError(
                f"learner.device: the learner asks for {_amount(count, 'GPU')} of this machine, all of which are taken"
                f' (waited {RESERVE_S:g} s); allowed: a free one, or learner.device = "cpu"'
            )
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        holder = ray.remote(GpuHolder).options(num_cpus=0, num_gpus=count, scheduling_strategy=strategy).remote()
        yield ray.get(holder.names.remote(), timeout=RESERVE_S)
    finally:
        with contextlib.suppress(Exception):
            remove_placement_group(group)


class GpuHolder:
    """The Ray actor of `reserve_gpus`."""

    def names(self) -> list[str]:
        import ray

        return [str(name) for name in ray.get_gpu_ids()]


def own_node_id() -> str:
    """Of the node that this process runs on, as Ray calls it."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def cluster_nodes(here: str) -> list[Node]:
    """The living nodes of the Ray cluster; `here`: the launcher's node id."""
    import ray

    return [
        Node(
            entry["NodeManagerAddress"],
            entry["Resources"].get("CPU", 0.0),
            entry["Resources"].get("GPU", 0.0),
            entry["NodeID"] == here,
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]


@dataclass
class Placed:
    """One actor: its reservation, its Ray actor, and the answer to the last question about its state."""

    group: Any
    actor: Any
    question: Any = None
    answer: Mapping[str, Any] = field(default_factory=dict)
    failures: int = 0
    """Questions in a row that failed: one does when the actor is restarted, all do when it cannot be."""
    error: str = ""


class RayActors:
    """Starts rollout actors in the Ray that this process has joined. No call waits for an actor."""

    def __init__(self, recipe: Recipe, label: str, arguments: Mapping[str, Any], node_id: str = "") -> None:
        """`arguments`: of `RolloutActor`, but for the name. `node_id`: all actors on this node; "": anywhere."""
        self.cpus, self.gpus = recipe.actor.cpus, recipe.actor.gpus
        self.label, self.arguments, self.node_id = label, dict(arguments), node_id
        self._started = 0
        self._addresses: dict[str, str] = {}

    def start(self, number: int) -> Placed:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from actor.cluster import RemoteRolloutActor

        # Ray frees a name some time after the actor that had it is gone: each start has its own.
        name = f"tandem-{self.label}-{actor_name(number)}-{self._started}"
        self._started += 1
        pinned = {"bundle_label_selector": [{NODE_ID_LABEL: self.node_id}]} if self.node_id else {}
        bundle = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        group = placement_group([bundle], strategy="STRICT_PACK", name=name, **pinned)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        options = {"name": name, "num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": strategy}
        arguments = {key: value(number) if callable(value) else value for key, value in self.arguments.items()}
        return Placed(group, RemoteRolloutActor.options(**options).remote(name=actor_name(number), **arguments))

    def look(self, handle: Placed) -> Sight:
        from ray.util.placement_group import placement_group_table

        reservation = placement_group_table(handle.group)
        if reservation.get("state") != PLACED:
            return Sight("pending", why=self._missing(), working=bool(handle.answer.get("working")))
        node = self._address(next(iter(reservation["bundles_to_node_id"].values()), ""))
        self._ask(handle)
        if handle.failures >= DEAD_AFTER:
            return Sight("failed", node, handle.error)
        if not handle.answer:
            return Sight("starting", node)
        answer = handle.answer
        return Sight(answer["state"], node, answer["why"], answer["working"], answer["phase"])

    def _ask(self, handle: Placed) -> None:
        """Take up the answer to the last question, and ask again. One that is busy, or restarted, answers later."""
        import ray

        if handle.question is not None:
            if not ray.wait([handle.question], timeout=0)[0]:
                return
            try:
                handle.answer, handle.failures = ray.get(handle.question), 0
            except ray.exceptions.RayError as error:
                handle.answer, handle.failures = {}, handle.failures + 1
                handle.error = str(error).strip().splitlines()[-1]
        handle.question = handle.actor.state.options(max_task_retries=0).remote()

    def _address(self, node_id: str) -> str:
        import ray

        if node_id not in self._addresses:
            self._addresses = {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes()}
        return self._addresses.get(node_id, "")

    def _missing(self) -> str:
        """What an actor that waits asks for, and what is free."""
        import ray

        free = ray.available_resources()
        kinds = ("CPU", "GPU") if self.gpus else ("CPU",)
        left = " and ".join(_amount(free.get(kind, 0.0), kind) for kind in kinds)
        return f"it needs {_size(self.cpus, self.gpus)} on one node, the whole cluster has {left} free"

    def remove(self, handle: Placed) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):  # the cluster may be gone already
            ray.kill(handle.actor, no_restart=True)
        with contextlib.suppress(Exception):
            remove_placement_group(handle.group)


def actor_arguments(recipe: Recipe, learner: str, logs: Any) -> dict[str, Any]:
    """Arguments of `RolloutActor` that are alike for all actors; functions of the number where they are not."""
    from actor.rewards import user_functions_of

    return {
        "learner": learner,
        "log_path": lambda number: str(logs / f"{actor_name(number)}.log"),
        "lost_learner_s": recipe.wire.lost_learner_s,
        "user_functions": user_functions_of(recipe.task.grader),
        "user_path": os.getcwd(),
    }
