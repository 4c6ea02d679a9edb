"""The launcher's part in the number of actors: reads the wish, brings Ray up when it is needed, keeps the fleet right.

`launch.py` calls `tick` whenever it looks at the learner. What is wished stands in the run directory
(`protocol/scaling.py`), so that whoever may write there can change it; what becomes of it is written beside it.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from deploy.fleet import Fleet
from deploy.placement import RayActors, actor_arguments, check_room, cluster_nodes, own_node_id
from deploy.ray_cluster import GpuShares, ray_runtime
from protocol.config import Recipe
from protocol.rundir import RunDir
from protocol.scaling import Member, Wish, read_wish, write_members, write_wish


class Crew:
    """Context manager: the actors of a run, removed at the end, and the Ray that they run in."""

    def __init__(self, recipe: Recipe, run: RunDir, view: Any, gpus: GpuShares, ray_address: str) -> None:
        self.recipe, self.run, self.view, self.gpus, self.ray_address = recipe, run, view, gpus, ray_address
        self.fleet: Fleet[Any] | None = None
        self._stack = contextlib.ExitStack()
        self._members: list[Member] | None = None
        self._wish = Wish(recipe.actor.count, "the recipe")

    def __enter__(self) -> Crew:
        write_wish(self.run, self._wish)
        write_members(self.run, ())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self) -> None:
        """Start or join Ray. Raises RecipeError if it cannot be joined, or has no room for the recipe's actors."""
        import_note = f"joining Ray at {self.ray_address}" if self.ray_address else "starting Ray"
        self.view.note(import_note)
        if self.gpus.actors and not self.ray_address:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus.actors)
        self._stack.enter_context(ray_runtime(self.recipe, self.ray_address))
        node_id = own_node_id()
        check_room(self.recipe, [node for node in cluster_nodes(node_id) if node.here])
        arguments = actor_arguments(self.recipe, str(self.run.endpoint), self.run.logs)
        cluster = RayActors(self.recipe, self.run.label, arguments, node_id)
        self.fleet = Fleet(cluster, self.recipe.actor.drain_s, self.view.note)
        self._stack.callback(self.fleet.close)

    def tick(self) -> None:
        """Read the wish, act on it, write what became of it."""
        wish = self._read_wish()
        if self.fleet is None:
            if not wish.actors:
                return
            self.open()
        assert self.fleet is not None
        if self.fleet.reconcile(wish.actors, time.monotonic()) and self.fleet.members() != self._members:
            self._members = self.fleet.members()
            write_members(self.run, self._members)

    def _read_wish(self) -> Wish:
        """The wish as it stands; one that cannot be read changes nothing."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            wish = read_wish(self.run) or self._wish
            if wish != self._wish:
                self.view.note(f"{self._wish.actors} -> {wish.actors} actors ({wish.by})")
                self._wish = wish
        return self._wish

    def figures(self) -> dict[str, Any]:
        """For the view: how many actors are wanted, and which are not there yet, with the reason."""
        pending = {member.name: member.why for member in self._members or () if member.state == "pending"}
        return {"actors_wanted": self._wish.actors, "actors_pending": pending}
