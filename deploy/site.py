"""Where a run's two sides are put: this machine alone, or a Ray cluster that it belongs to.

Decided before anything of the run exists, so that a recipe that cannot be placed leaves nothing behind. The commands
open a site, `launch.py` starts the learner on it, `crew.py` the actors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from deploy.placement import Node, check_room, cluster_nodes, own_node_id, reserve_gpus
from deploy.preflight import gpu_count
from deploy.ray_cluster import ray_runtime, share_gpus, visible_gpus
from protocol.addresses import AUTO, is_loopback
from protocol.config import Recipe
from protocol.errors import RecipeError

SHARED = 0.5
"""The learner's part of an only GPU."""


@dataclass(frozen=True)
class Site:
    """A recipe with its GPUs divided, and what the launcher needs to know of the place."""

    recipe: Recipe
    learner_gpus: Sequence[str] = ()
    """As CUDA_VISIBLE_DEVICES names them; empty: the learner's environment stays as it is."""
    actor_gpus: Sequence[str] = ()
    """Those that a Ray of the run's own may hand out; joined: the only one, where the learner shares it."""
    learner_host: str = ""
    """Address that the learner binds; "": the recipe's."""
    joined: bool = False
    """Whether Ray is a cluster that others use, too."""
    node_id: str = ""
    """Joined: the only Ray node for actors; "": anywhere."""


@contextlib.contextmanager
def open_site(recipe: Recipe, ray_address: str, note: Callable[[str], None]) -> Iterator[Site]:
    """This machine, or, with an address, the cluster there, joined while the context lasts.

    Raises RecipeError for a cluster that cannot be joined or cannot hold the run, and for GPUs that are not there."""
    if not ray_address or not recipe.needs_actors:
        yield this_machine(recipe)
        return
    note(f"joining Ray at {ray_address}")
    with ray_runtime(recipe, ray_address):
        node_id = own_node_id()
        nodes = cluster_nodes(node_id)
        here = next(node for node in nodes if node.here)
        learner, each = cluster_shares(recipe, nodes)
        recipe = with_actor_gpus(recipe, each)
        host = here.address if recipe.wire.host == AUTO else recipe.wire.host
        local = is_loopback(host)  # then nobody reaches the learner from elsewhere
        check_room(recipe, [left_for_actors(node, learner) for node in nodes if node.here or not local])
        with reserve_gpus(learner, node_id) as gpus:
            shared = gpus if learner == SHARED else ()
            yield Site(recipe, gpus, shared, learner_host=host, joined=True, node_id=node_id if local else "")


def this_machine(recipe: Recipe) -> Site:
    """A Ray of the run's own, or none: GPUs are divided by CUDA_VISIBLE_DEVICES."""
    shares = share_gpus(recipe, visible_gpus(gpu_count()))
    return Site(with_actor_gpus(recipe, shares.each_actor), shares.learner, shares.actors)


def with_actor_gpus(recipe: Recipe, each: float) -> Recipe:
    return recipe.model_copy(update={"actor": recipe.actor.model_copy(update={"gpus": each})})


def cluster_shares(recipe: Recipe, nodes: Sequence[Node]) -> tuple[float, float]:
    """GPUs that the learner asks of its node, and each actor of any. Raises RecipeError if the node has too few.

    The learner has one for each of its processes if its node has any, half of one if that is the cluster's only one;
    an actor has `actor.gpus`, or else a whole one, or an equal part of what the learner leaves of the only one."""
    total, here = sum(node.gpus for node in nodes), sum(node.gpus for node in nodes if node.here)
    processes = recipe.learner.processes
    if recipe.learner.device != "cpu" and (here or processes > 1) and processes > here:
        raise RecipeError(
            f"learner.processes: found {processes}, allowed here: at most {max(1, int(here))}, the GPUs of this node"
        )
    learner = 0.0 if recipe.learner.device == "cpu" or here < 1 else SHARED if total == 1 else float(processes)
    if recipe.actor.engine == "fake" or not total:
        return learner, recipe.actor.gpus
    only = (total - learner) / max(1, recipe.actor.count)
    return learner, recipe.actor.gpus or (1.0 if total > 1 else only)


def left_for_actors(node: Node, learner: float) -> Node:
    """The node without what the learner takes there."""
    return replace(node, gpus=node.gpus - learner) if node.here else node
