"""The learner's end of everything that concerns actors: sockets, tickets, journal and outgoing versions of a run.

`Actors` puts the parts of `intake/` and `publish.py` together from a recipe, and takes them apart again; `loop.py` uses
it as a context. A run that draws nothing from the model has none.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from learner.intake.dispatcher import Dispatcher
from learner.intake.journal import Journal, Progress, read_failed, read_filtered, read_groups_with_offsets
from learner.intake.probes import ProbeResult, Probes
from learner.intake.scaling import ScaleWatch
from learner.intake.server import ActorsSeen, IntakeServer
from learner.intake.source import Source, WaitReporter
from learner.methods.grpo import equal_rewards
from learner.outcome import EXIT_FAILED, exit_code
from learner.publish import Publisher, Versions
from protocol.codec import Limits
from protocol.config import Recipe
from protocol.hub import Hub
from protocol.keys import load_learner_keys
from protocol.messages import Ticket, TicketId, Welcome
from protocol.rundir import RunDir, read_json, write_json

log = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 5.0
LAUNCHER_KEYS = {"count", "cpus", "drain_s", "wait_for_room", "start_timeout_s", "grader_timeout_s"}
"""Of the recipe's `[actor]`: what engines have no use for."""
RATE_STEPS = 5
"""Steps that the rate of the actors is a mean over."""
MAX_FILTERED_BATCHES = 8
"""`rollout.max_filtered_per_step`'s default, in batches of groups."""


class Actors:
    """Hub, dispatcher and journal in their thread (`server`), the learner's view of them (`source`), the publisher."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        hub: Hub,
        welcome: Welcome,
        versions: Versions,
        vocabulary: int,
        make_ticket: Callable[[TicketId], Ticket],
        report: WaitReporter,
        should_stop: Callable[[], bool],
        progress: Progress,
    ) -> None:
        """`progress`: of reading the journal, which this does."""
        rollout = recipe.rollout
        limit = rollout.max_filtered_per_step or MAX_FILTERED_BATCHES * rollout.groups_per_step
        dispatcher = Dispatcher(
            make_ticket,
            groups_per_step=rollout.groups_per_step,
            max_lag=rollout.max_lag,
            steps=recipe.steps,
            max_attempts=rollout.max_attempts,
            is_filtered=equal_rewards,
            max_filtered_per_step=limit if rollout.dynamic_sampling else 0,
        )
        self.run, self.versions = run, versions
        self._worked: deque[tuple[float, float, float]] = deque([(0.0, 0.0, 0.0)], maxlen=RATE_STEPS + 1)
        """Tokens, busy and serving seconds of all actors, as they were when they were asked for."""
        self.journal = Journal(run.journal, recipe.wire.journal_fsync, progress)
        probes = Probes(recipe.parity_every, recipe.seed, vocabulary, recipe.model.max_model_len)
        scale = ScaleWatch(run, recipe.actor.drain_s)
        self.server = IntakeServer(
            hub, dispatcher, self.journal, welcome, recipe.wire, rollout.straggler_s, vocabulary, probes, scale
        )
        self.server.newest_before = versions.next - 1
        self.source = Source(self.server, report, should_stop)
        self.publisher = Publisher(versions, self.server.reserved, self.server.offer, recipe.weights.anchor_every)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Give the dispatcher what the checkpoint and the journal say of every ticket, before any actor is heard."""
        start = checkpoint["replay_offset"]
        found = list(read_groups_with_offsets(self.run.journal, start))
        dispatcher = self.server.dispatcher
        kept = dispatcher.restore(
            checkpoint["tickets"],
            [group for _, group in found],
            self.versions.next,
            read_failed(self.run.journal, start),
            self.versions.steps,
            read_filtered(self.run.journal, start),
        )
        offsets = {group.id.index: offset for offset, group in found if group.id.epoch == dispatcher.branch}
        self.server.offsets = {index: offsets[index] for index in kept if dispatcher.holds(index)}
        self.server.known = ActorsSeen(**checkpoint["run"]["earlier"].get("seen", {}))
        log.info("%d groups of unfinished tickets come from the journal", len(kept))

    def tickets(self) -> tuple[dict[str, Any], int]:
        """For a checkpoint: the dispatcher's state, and from where on the journal has what belongs to it."""
        with self.server.lock:
            found = self.server.dispatcher.state(), self.source.replay_offset()
        self.journal.sync()
        return found

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within: actors find the learner (endpoint.json) and are served. Afterwards they are sent home, unless the
        learner will be started again after this error: then they wait for it, as after a kill."""
        hub = self.server.hub
        self.server.start()
        write_json(self.run.endpoint, {"work": hub.work_endpoint, "keys": hub.keys is not None})
        log.info("the learner listens at %s", hub.work_endpoint)
        if hub.keys is None:
            log.warning("no keys (wire.no_keys_on_trusted_network): whoever reaches it can act as an actor")
        comes_back = False
        try:
            yield
        except Exception as error:
            comes_back = exit_code(error) == EXIT_FAILED
            raise
        finally:
            self.publisher.close()
            if not comes_back:
                self.server.drain("the learner stops")
                self.source.wait_until_left(LEAVE_TIMEOUT_S)
            self.server.stop()
            self.journal.close()

    def probed(self) -> list[ProbeResult]:
        """Answers of actors to probes of their weights that nobody has looked at yet."""
        with self.server.lock:
            found = list(self.server.probes.results)
            self.server.probes.results.clear()
        return found

    def present(self) -> dict[str, int]:
        """Name -> process id of the actors that are connected."""
        with self.server.lock:
            return {peer.name: peer.hello.pid for peer in self.server.peers.values()}

    def work_since_last(self) -> dict[str, float]:
        """How many actors serve now, which share of their serving time they had requests since this was asked, and how
        many tokens a second so many draw while they have requests: over the last RATE_STEPS times, since tokens are
        told in lumps, of whole groups."""
        with self.server.lock:
            totals = self.server.totals
            now = totals.generated_tokens, totals.busy_s, totals.serving_s
            serving = self.server.serving()
        busy, served = now[1] - self._worked[-1][1], now[2] - self._worked[-1][2]
        self._worked.append(now)
        tokens, seconds = now[0] - self._worked[0][0], now[1] - self._worked[0][1]
        return {
            "rollout_tokens_per_s": serving * tokens / seconds if seconds > 0 else 0.0,
            "actors_serving": float(serving),
            "actors_busy_share": min(1.0, busy / served) if served > 0 else 0.0,
        }

    def seen(self) -> ActorsSeen:
        """A copy of what is known of actors, for a checkpoint."""
        with self.server.lock:
            return copy.deepcopy(self.server.known)

    def leave(self, timeout_s: float) -> None:
        """Send the actors home: the run is over, and nobody will be at its address again."""
        self.server.drain("the run is over")
        self.source.wait_until_left(timeout_s)
        self.run.endpoint.unlink(missing_ok=True)


def bind(recipe: Recipe, run: RunDir) -> Hub:
    """The hub on the recipe's ports, or else on the work port of the run's earlier process, if it is free: actors that
    outlived it find this one at once. Otherwise on any: they look into endpoint.json.

    Raises KeysError without the run's keys, unless the recipe says that the network is trusted."""
    wire, endpoint = recipe.wire, read_json(run.endpoint)
    limits = Limits(max_frame_bytes=wire.max_frame_mib << 20)
    trusted = wire.no_keys_on_trusted_network
    keys = None if trusted else load_learner_keys(run.keys)
    if not wire.port and endpoint:
        earlier = int(endpoint["work"].rpartition(":")[2])
        with contextlib.suppress(OSError):
            return Hub(wire.address, earlier, limits, keys, trusted=trusted)
    return Hub(wire.address, wire.port, limits, keys, trusted=trusted, consecutive=bool(wire.port))


def welcome(recipe: Recipe, run: RunDir, model_path: Path, hub: Hub) -> Welcome:
    """What an actor is told when it joins."""
    return Welcome(
        run=run.label,
        model=str(model_path),
        dtype=recipe.model.dtype,
        max_model_len=recipe.model.max_model_len,
        bulk=hub.bulk_endpoint,
        news=hub.news_endpoint,
        heartbeat_s=recipe.wire.heartbeat_s,
        dead_after_s=recipe.wire.dead_after_s,
        seed=recipe.seed,
        group_size=recipe.rollout.group_size,
        kv=recipe.weights.kv,
        prefix_cache=recipe.weights.prefix_cache,
        chunk_bytes=recipe.weights.chunk_mib << 20,
        window=recipe.weights.window,
        grader_timeout_s=recipe.actor.grader_timeout_s,
        engine=recipe.actor.model_dump(exclude=LAUNCHER_KEYS),
        engine_metrics_s=recipe.metrics.engine_every_s if recipe.metrics.serve else 0.0,
    )
