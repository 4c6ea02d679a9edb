"""The learner: groups in, gradient steps, new weights out. `Learner.train` is the loop; everything else prepares it.

    groups = source.take()  ->  batch  ->  train_step  ->  publish  ->  commit  ->  checkpoint, log

Evaluations before and after each measure one version with training idle. SIGTERM or SIGINT (through `StopFlag`) ends
the loop after the step in hand, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import learner.checkpoint as checkpoint
from learner.evaluate import EvalResult, eval_tickets, summarize, write_responses, write_result
from learner.intake.data import Task, load_task
from learner.intake.dispatcher import TRAIN_EPOCH, Dispatcher
from learner.intake.journal import Journal, read_failed, read_groups_with_offsets
from learner.intake.server import ActorsSeen, IntakeServer
from learner.intake.source import Interrupted, Source, StopFlag, TicketsFail
from learner.methods import grpo, sft
from learner.metrics import MetricsLog, Status
from learner.model import load_model, share_cores
from learner.optim import Optimizer
from learner.publish import Publisher, Versions
from learner.step import sft_step, train_step
from learner.summary import process_totals, run_summary
from protocol.codec import Limits
from protocol.config import Recipe
from protocol.errors import RecipeError
from protocol.messages import Sampling, Ticket, TicketId, Welcome
from protocol.rundir import RunDir, read_json, write_json
from protocol.sockets import Hub

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 20.0
RATE_WINDOW_STEPS = 5
MAX_FAILED_SHARE = 0.1
"""Share of an evaluation's problems that may fail for good; beyond it the mean would be of other problems."""


class Learner:
    """One run of the learner process."""

    def __init__(self, recipe: Recipe, run: RunDir, model_path: Path, should_stop: StopFlag) -> None:
        """Load data, model and the last checkpoint, if there is one. Raises RecipeError, ValueError, OSError."""
        from transformers import AutoTokenizer

        self.recipe, self.run, self.model_path, self.should_stop = recipe, run, model_path, should_stop
        self.began = time.monotonic()
        self.status = Status(run, recipe.steps)
        self.status.set("loading the model")
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.task: Task = load_task(recipe, self.tokenizer)
        self.model = load_model(model_path, recipe.model, recipe.learner)
        self.optimizer = Optimizer(self.model, recipe.optim)
        self.versions = Versions(run.versions)
        self.state: dict[str, Any] = {
            "step": 0, "warm_started": False, "evals": {}, "learner_tokens": 0, "train_s": 0.0, "rollout_tokens": 0,
            "training_s": 0.0, "lag_sum": 0.0, "lag_max": 0.0, "wall_s": 0.0, "rewards": [], "prompt_fingerprint": "",
            "earlier": {},
        }  # fmt: skip
        self.restored: dict[str, Any] | None = None
        self._restore()

    # --- resume ---

    def _restore(self) -> None:
        """Take up the last checkpoint of the run directory."""
        latest = checkpoint.latest(self.run.checkpoints)
        if latest is None:
            self.state["prompt_fingerprint"] = self.task.fingerprint()
            return
        self.restored = checkpoint.load(latest, self.model, self.optimizer)
        self.state |= self.restored["run"]
        if self.recipe.steps < self.state["step"]:
            raise RecipeError(f"steps: found {self.recipe.steps}, allowed: at least {self.state['step']}, already done")
        if self.state["prompt_fingerprint"] != self.task.fingerprint():
            raise ValueError(f"{self.run.path}: the task's data have changed since this run began; start a new run")
        log.info("resumed at step %d from %s", self.state["step"], latest)

    # --- the run ---

    def __call__(self) -> bool:
        """The whole run. Returns whether it went to its end (False: it was asked to stop, and can be resumed)."""
        try:
            with self._intake():
                version = self._publish()
                if not self.state["warm_started"]:
                    self._prologue(version)
                self._training()
                self._epilogue()
                self.server.drain("the run is over")
                self.source.wait_until_left(DRAIN_TIMEOUT_S)
            finished = True
        except Interrupted as where:
            log.info("stopped while waiting for %s", where)
            finished = False
        if finished:
            self.run.endpoint.unlink(missing_ok=True)  # nobody will be there again
        self.status.set("finished" if finished else "stopped")
        return finished

    @contextmanager
    def _intake(self) -> Iterator[None]:
        """Hub, dispatcher and journal in their thread; the run's address in endpoint.json."""
        recipe = self.recipe
        limits = Limits(max_frame_bytes=recipe.wire.max_frame_mib << 20)
        hub = self._bind(limits)
        dispatcher = Dispatcher(
            self._ticket,
            groups_per_step=recipe.rollout.groups_per_step,
            max_lag=recipe.rollout.max_lag,
            steps=recipe.steps,
            max_attempts=recipe.rollout.max_attempts,
        )
        journal = Journal(self.run.journal, fsync=recipe.wire.journal_fsync)
        self.server = IntakeServer(
            hub,
            dispatcher,
            journal,
            self._welcome(hub),
            recipe.wire,
            recipe.rollout.straggler_s,
            self.model.vocabulary,
        )
        self.server.newest_before = self.versions.next - 1
        self.source = Source(self.server, self.status.waiting, self.should_stop)
        self.publisher = Publisher(self.versions, self.server.reserved, self.server.offer)
        if self.restored is not None:
            self._restore_tickets()
            self.server.known = ActorsSeen(**self.state["earlier"].get("seen", {}))
        self.server.start()
        write_json(self.run.endpoint, {"work": hub.work_endpoint})
        log.info("the learner listens at %s", hub.work_endpoint)
        self.metrics = MetricsLog(self.run, self.state["step"])
        try:
            yield
        finally:
            self.publisher.close()
            self.server.drain("the learner stops")
            self.source.wait_until_left(5.0)
            self.server.stop()
            journal.close()
            self.metrics.close()

    def _bind(self, limits: Limits) -> Hub:
        """The hub on the recipe's port, or else on that of the run's earlier process, if it is free: actors that
        outlived it find this one at once. Otherwise on any: they look into endpoint.json."""
        wire, endpoint = self.recipe.wire, read_json(self.run.endpoint)
        if not wire.port and endpoint:
            with contextlib.suppress(OSError):
                return Hub(wire.host, int(endpoint["work"].rpartition(":")[2]), limits)
        return Hub(wire.host, wire.port, limits)

    def _welcome(self, hub: Hub) -> Welcome:
        recipe = self.recipe
        return Welcome(
            run=self.run.label,
            model=str(self.model_path),
            dtype=recipe.model.dtype,
            max_model_len=recipe.model.max_model_len,
            bulk=hub.bulk_endpoint,
            news=hub.news_endpoint,
            heartbeat_s=recipe.wire.heartbeat_s,
            dead_after_s=recipe.wire.dead_after_s,
            seed=recipe.seed,
            group_size=recipe.rollout.group_size,
            kv=recipe.weights.kv,
            chunk_bytes=recipe.weights.chunk_mib << 20,
            window=recipe.weights.window,
            grader_timeout_s=recipe.actor.grader_timeout_s,
            engine=recipe.actor.model_dump(exclude={"count", "cpus", "start_timeout_s", "grader_timeout_s"}),
        )

    def _ticket(self, index: int) -> Ticket:
        """The train ticket of an index; depends on the recipe alone."""
        rollout, example = self.recipe.rollout, self.task.train(index)
        return Ticket(
            id=TicketId(TRAIN_EPOCH, index),
            kind="train",
            attempt=1,
            prompt_ids=example.prompt_ids,
            answer=example.answer,
            grader=self.recipe.task.grader,
            group_size=rollout.group_size,
            sampling=Sampling(
                rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, rollout.stop
            ),
            seed=self.recipe.seed * 1_000_003 + index,
            min_version=1,
        )

    # --- before the first step ---

    def _prologue(self, version: int) -> None:
        """Evaluate the model as it came, and what the warm start made of it.

        On a CPU the warm start runs while the engine starts. (On a GPU they may share its memory, of which a starting
        engine measures what it can have.) What is evaluated first is version 1 all the same, of which the publisher
        holds a copy; the next one is published after that.
        """
        if self.recipe.warm_start.examples:
            if self.model.device.type != "cpu":
                self.source.wait_for_actor(version, self.recipe.actor.start_timeout_s)
            self._warm_start()
        self._evaluate("before", version)
        if self.recipe.warm_start.examples:
            version = self._publish()
            self._evaluate("after_warm_start", version)
        self.state["warm_started"] = True
        self._checkpoint()

    def _warm_start(self) -> None:
        """SFT on demonstrations; the optimizer begins anew afterwards."""
        warm = self.recipe.warm_start
        demonstrations = [self.task.demonstration_tokens(example) for example in self.task.demonstrations]
        optimizer = Optimizer(self.model, self.recipe.optim.model_copy(update={"lr": warm.lr}))
        batches = list(sft.batches(demonstrations, warm.batch_size, warm.epochs, self.recipe.seed))
        self.status.set("warm start")
        for number, batch in enumerate(batches):
            if self.should_stop():
                raise Interrupted("the warm start")
            self.source.check()
            figures = sft_step(self.model, optimizer, batch, self.recipe)
            self.status.set(warm_start_batch=number + 1, warm_start_batches=len(batches), loss=figures["loss"])
        self.optimizer = Optimizer(self.model, self.recipe.optim)

    def _evaluate(self, name: str, version: int) -> None:
        """Held-out reward of one version; kept in the run directory and in the checkpoint."""
        if not self.recipe.eval.prompts:
            return
        self.status.set(f"evaluation {name.replace('_', ' ')}")
        self.source.wait_for_actor(version, self.recipe.actor.start_timeout_s)
        self.status.set(f"evaluation {name.replace('_', ' ')}")
        tickets = eval_tickets(self.recipe, self.task.heldout, version)
        began = time.monotonic()
        groups, failed = self.source.evaluate(tickets, self._take_timeout())
        if len(failed) > MAX_FAILED_SHARE * len(tickets):
            cause = next(iter(failed.values()))
            raise TicketsFail(f"evaluation {name}: {len(failed)} of {len(tickets)} problems failed, e.g. {cause}")
        result: EvalResult = summarize(name, groups, len(failed), time.monotonic() - began)
        if set(result.version_tokens) - {str(version)}:
            raise RuntimeError(f"evaluation {name}: tokens of versions {result.version_tokens}, expected {version}")
        write_responses(self.run.eval / f"{name}_responses.jsonl", groups, self.task.heldout)
        write_result(self.run.eval / f"{name}.json", result)
        self.state["evals"][name] = asdict(result)
        self.status.set(evals={key: value["reward"] for key, value in self.state["evals"].items()})
        log.info("evaluation %s: reward %.3f +- %.3f", name, result.reward, result.reward_ci95)

    # --- the loop ---

    def _training(self) -> None:
        self.source.wait_for_actor(1, self.recipe.actor.start_timeout_s)
        self.source.resume_training()
        on_engine_host = self.model.device.type == "cpu" and self.recipe.rollout.max_lag > 0
        share_cores(self.recipe.learner, shared=on_engine_host)
        self.status.set("training", step=self.state["step"])
        recent: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW_STEPS)
        marked = time.monotonic()
        try:
            while self.state["step"] < self.recipe.steps and not self.should_stop():
                figures = self._step(recent)
                self.state["training_s"] += time.monotonic() - marked
                marked = time.monotonic()
                self._report(figures, recent)
                every, step = self.recipe.checkpoint.every_steps, self.state["step"]
                if every and step % every == 0 and step < self.recipe.steps:
                    self._checkpoint()
        except Interrupted:
            pass
        self.source.pause_training()
        self._checkpoint()
        if self.should_stop() and self.state["step"] < self.recipe.steps:
            raise Interrupted("the next step")

    def _step(self, recent: deque[tuple[float, float]]) -> dict[str, float]:
        """One step: wait for its groups, train on them, publish, commit."""
        step, began, waited = self.state["step"], time.monotonic(), self.source.waited_s
        groups = self.source.take(self._take_timeout())
        batch = grpo.make_batch(groups, self.recipe, self.versions.step_of, step)
        train_began = time.monotonic()
        figures = train_step(self.model, self.optimizer, batch, self.recipe)
        train_s = time.monotonic() - train_began
        self.state["step"] = step + 1
        version = self._publish()
        self.source.commit(step + 1, version)
        step_s = time.monotonic() - began
        recent.append((step_s, figures["completion_tokens"]))
        self.state["rollout_tokens"] += int(figures["completion_tokens"])
        self.state["learner_tokens"] += figures["tokens"]
        self.state["train_s"] += train_s
        self.state["rewards"].append(figures["reward_mean"])
        self.state["lag_sum"] += figures["lag_mean"]
        self.state["lag_max"] = max(self.state["lag_max"], figures["lag_max"])
        return figures | {
            "version": version,
            "step_s": step_s,
            "train_s": train_s,
            "wait_s": self.source.waited_s - waited,
            "learner_tokens_per_s": figures["tokens"] / train_s,
        }

    def _publish(self) -> int:
        return self.publisher.publish(self.model, self.state["step"])

    def _report(self, figures: dict[str, float], recent: deque[tuple[float, float]]) -> None:
        step = self.state["step"]
        seconds = sum(step_s for step_s, _ in recent)
        figures["rollout_tokens_per_s"] = self.server.totals.tokens_per_s
        figures["tokens_per_s"] = sum(tokens for _, tokens in recent) / seconds
        self.metrics.write(step, figures)
        left_s = (self.recipe.steps - step) * seconds / len(recent)
        left_s += self.state["evals"].get("after_warm_start", self.state["evals"].get("before", {})).get("seconds", 0)
        shown = {key: round(value, 4) for key, value in figures.items()}
        self.status.set(
            None,
            **shown,
            step=step,
            left_s=left_s,
            actors={peer.name: peer.hello.pid for peer in self.server.peers.values()},
            curve=self.state["rewards"][-40:],
        )
        log.info(
            "step %d/%d: reward %.3f, lag %.2f, version %d, %.1f s (train %.1f, wait %.1f)",
            *(step, self.recipe.steps, figures["reward_mean"], figures["lag_mean"], figures["version"]),
            *(figures["step_s"], figures["train_s"], figures["wait_s"]),
        )

    def _take_timeout(self) -> float:
        """Longest wait for a batch: every attempt of a straggler, and an engine's restart."""
        return self.recipe.rollout.straggler_s * self.recipe.rollout.max_attempts + self.recipe.actor.start_timeout_s

    # --- checkpoints and the end ---

    def _checkpoint(self) -> None:
        self.state["wall_s"] += time.monotonic() - self.began
        self.began = time.monotonic()
        self.server.journal.sync()
        with self.server.lock:
            tickets = self.server.dispatcher.state()
            replay_offset = self.source.replay_offset()
        state = self.state | {"earlier": process_totals(self.state, self.server)}
        checkpoint.save(
            self.run.checkpoints,
            self.state["step"],
            self.model,
            self.optimizer,
            {"run": state, "tickets": tickets, "replay_offset": replay_offset},
            self.recipe.checkpoint.keep,
        )
        write_json(self.run.summary, self._summary())

    def _restore_tickets(self) -> None:
        """Give the dispatcher what the checkpoint and the journal say of every ticket, before any actor is heard."""
        assert self.restored is not None
        start = self.restored["replay_offset"]
        found = list(read_groups_with_offsets(self.run.journal, start))
        kept = self.server.dispatcher.restore(
            self.restored["tickets"],
            [group for _, group in found],
            self.versions.next,
            read_failed(self.run.journal, start),
            self.versions.steps,
        )
        offsets = {group.id.index: offset for offset, group in found if group.id.epoch == TRAIN_EPOCH}
        self.server.offsets = {index: offsets[index] for index in kept}
        log.info("%d groups of unfinished tickets come from the journal", len(kept))

    def _epilogue(self) -> None:
        """Evaluate the trained version, export the model, write the figures."""
        version = self.server.dispatcher.step_versions[self.state["step"]]
        self._evaluate("after", version)
        self.status.set("exporting the model")
        self.model.export(self.run.model, self.tokenizer)
        self.state["wall_s"] += time.monotonic() - self.began
        self.began = time.monotonic()
        write_json(self.run.summary, self._summary())

    def _summary(self) -> dict[str, Any]:
        with self.server.lock:
            return run_summary(self.recipe, self.state, self.server, self.publisher)
