"""The launcher's part in the number of actors: reads the wish, brings Ray up when it is needed, keeps the fleet right.

`launch.py` calls `tick` whenever it looks at the learner. What is wished stands in the run directory
(`protocol/scaling.py`), so that whoever may write there can change it; what becomes of it is written beside it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from actor.finding import Address, desk_name, file_finder
from deploy.autoscale import Autoscaler, StepTimes
from deploy.desk import DeskOfRun
from deploy.fleet import Fleet
from deploy.placement import RayActors, actor_arguments, own_node_id
from deploy.progress import View
from deploy.ray_cluster import ray_runtime
from deploy.site import Site
from protocol.rundir import RunDir
from protocol.scaling import Member, Wish, read_wish, write_members, write_wish

log = logging.getLogger(__name__)

PAUSE_S = 10.0
"""After a failure of Ray's, before it is asked again."""


class Crew:
    """Context manager: the actors of a run, removed at the end, and the Ray that they run in."""

    def __init__(
        self, site: Site, run: RunDir, model: Path, view: View, ray_started: Callable[[], None] = lambda: None
    ) -> None:
        """`ray_started`: called whenever a Ray of the run's own was started here, which takes signal handlers."""
        self._ray_started = ray_started
        self.site, self.run, self.model, self.view = site, run, model, view
        self.recipe = site.recipe
        self.fleet: Fleet[Any] | None = None
        self.desk: DeskOfRun | None = None
        self._stack = contextlib.ExitStack()
        self._members: list[Member] = []
        self._wish = Wish(self.recipe.actor.count, "the recipe")
        self._not_before = 0.0
        self.autoscaler = Autoscaler(self.recipe.autoscale) if self.recipe.autoscale.enabled else None

    def __enter__(self) -> Crew:
        write_wish(self.run, self._wish)
        write_members(self.run, ())
        return self

    def __exit__(self, *_: object) -> None:
        if self.fleet is None:
            self._stack.close()
            return
        with self.view.doing("ending the actors" if self.site.joined else "ending the actors and Ray"):
            self._stack.close()

    def open(self) -> None:
        """Start a Ray of the run's own, unless a cluster was joined, and make ready for actors."""
        if self.site.joined:
            learner = desk_name(self.run.label)
            self.desk = DeskOfRun(self.run.label, own_node_id(), self.model)
            self._stack.callback(self.desk.close)
        else:
            learner = str(self.run.endpoint)
            if self.site.actor_gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.site.actor_gpus)
            with self.view.doing("starting Ray"):
                self._stack.enter_context(ray_runtime(self.recipe, ""))
            self._ray_started()
        arguments = actor_arguments(self.recipe, learner, self.run.logs)
        self.fleet = Fleet(
            RayActors(self.recipe, self.run.label, arguments, self.site.node_id),
            self.recipe.actor.drain_s,
            self.view.note,
        )
        self._stack.callback(self.fleet.close)

    def tick(self, status: Mapping[str, Any]) -> None:
        """Read the wish, act on it, write what became of it. A Ray that fails is said, and asked again.

        `status`: the learner's, by whose figures the wish may change."""
        wish = self._autoscaled(self._read_wish(), status)
        if self.fleet is None and not wish.actors and not self.site.joined:
            return  # nobody needs Ray yet
        if time.monotonic() < self._not_before:
            return
        try:
            self._act(wish)
        except Exception as error:
            log.exception("Ray failed")
            self.view.note(f"Ray does not do what it should; tried again in {PAUSE_S:g} s: {error}")
            self._not_before = time.monotonic() + PAUSE_S

    def _act(self, wish: Wish) -> None:
        if self.fleet is None:
            self.open()
        assert self.fleet is not None
        if not self.fleet.reconcile(wish.actors, time.monotonic()):
            return
        if self.desk and (left := self.desk.exchange(self._address(), wish.actors, self._members)):
            write_wish(self.run, left)
        if (members := self.fleet.members()) != self._members:
            self._members = members
            write_members(self.run, members)

    def _autoscaled(self, wish: Wish, status: Mapping[str, Any]) -> Wish:
        """The wish, or what the waiting of both sides has made of it: then that is written, with its reason."""
        times = StepTimes.of(status) if self.autoscaler else None
        proposal = self.autoscaler.see(times, wish.actors) if self.autoscaler and times else None
        if proposal is None or proposal.actors == wish.actors:
            return wish
        write_wish(self.run, Wish(proposal.actors, f"autoscale: {proposal.reason}"))
        return self._read_wish()

    def _address(self) -> Address | None:
        """Where the learner is now, with the keys for its actors."""
        with contextlib.suppress(OSError, ValueError):
            return file_finder(self.run.endpoint)()
        return None

    def _read_wish(self) -> Wish:
        """The wish as it stands; one that cannot be read changes nothing."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            wish = read_wish(self.run) or self._wish
            if wish.actors != self._wish.actors:
                self.view.note(f"{self._wish.actors} -> {wish.actors} actors ({wish.by})")
            self._wish = wish
        return self._wish

    def figures(self) -> dict[str, Any]:
        """For the view: how many actors are wanted, and which are not there yet, with the reason."""
        pending = {member.name: member.why for member in self._members if member.state == "pending"}
        return {"actors_wanted": self._wish.actors, "actors_pending": pending}
