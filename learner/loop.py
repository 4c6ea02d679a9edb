"""The learner: batches in, gradient steps, new weights out. `Learner._training` is the loop; the rest prepares it.

    batch = feed.batch(step)  ->  train  ->  publish  ->  commit  ->  guard, evaluation, checkpoint, log

It runs on rank 0 of the learner's processes; what the others do with it is in `trainer.py`.

Evaluations before and after each measure one version with training idle. SIGTERM or SIGINT (through `StopFlag`) ends
the loop after the step in hand, with a checkpoint. What the guard finds may end it, too, or send it back to the last
good checkpoint, on a new branch.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import learner.checkpoint as checkpoint
from learner.actors import Actors, bind, welcome
from learner.batch import Batch
from learner.evaluations import Evaluations
from learner.feed import DpoFeed, Feed, RolloutFeed, SftFeed
from learner.intake.data import Task, load_task
from learner.intake.source import Interrupted, StopFlag, TicketsFail
from learner.methods import sft
from learner.methods.epochs import Epochs
from learner.methods.guard import Guard, Verdict
from learner.metrics import MetricsLog, Status, wandb_log
from learner.optim import lr_at
from learner.outcome import GuardStop
from learner.parity import ParityGate
from learner.publish import Versions
from learner.ranks import ALONE, Ranks
from learner.rollout_files import RolloutFiles
from learner.state import RunState
from learner.summary import process_totals, run_summary
from learner.telemetry.telemetry import Telemetry
from learner.trainer import Trainer
from protocol.config import ROLLOUT_METHODS, Recipe
from protocol.errors import DeadlineExceeded, EngineFailed, RecipeError
from protocol.messages import Sampling, Ticket, TicketId
from protocol.rundir import RunDir, write_json

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 20.0
PROBE_TIMEOUT_S = 60.0
"""Longest wait for the first comparison of an engine with the model."""
RATE_WINDOW_STEPS = 5
BRANCH_SEEDS = 1 << 52
"""Keeps the seeds of two branches of a run apart."""


class Learner:
    """One run of the learner process."""

    def __init__(
        self, recipe: Recipe, run: RunDir, model_path: Path, should_stop: StopFlag, ranks: Ranks = ALONE
    ) -> None:
        """Load data, model and the last checkpoint, if there is one. Raises RecipeError, ValueError, OSError."""
        from transformers import AutoTokenizer

        self.recipe, self.run, self.model_path, self.should_stop = recipe, run, model_path, should_stop
        self.began = time.monotonic()
        self.status = Status(run, recipe.steps)
        self.status.set("loading the model")
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.task: Task = load_task(recipe, self.tokenizer)
        self.trainer = Trainer(recipe, run, model_path, ranks)
        self.versions = Versions(run.versions)
        self.guard = Guard(recipe.guard)
        self.parity = ParityGate(self.trainer, recipe.weights)
        self.state = RunState()
        self.restored: dict[str, Any] | None = None
        self._restore()
        self.telemetry = Telemetry(recipe, run, lambda: self.state.step, lambda: self.status.text, self.trainer.memory)
        self.actors: Actors | None = None
        self.rollout_files: RolloutFiles | None = None

    # --- resume ---

    def _restore(self) -> None:
        """Take up the last checkpoint of the run directory."""
        latest = checkpoint.latest(self.run.checkpoints)
        if latest is None:
            self.state.prompt_fingerprint = self.task.fingerprint()
            return
        self.restored = self.trainer.load(latest)
        self.state.take_up(self.restored["run"])
        self.guard.restore(self.state.guard)
        if 0 < self.recipe.steps < self.state.step:
            raise RecipeError(f"steps: found {self.recipe.steps}, allowed: at least {self.state.step}, already done")
        if self.state.prompt_fingerprint != self.task.fingerprint():
            raise ValueError(f"{self.run.path}: the task's data have changed since this run began; start a new run")
        log.info("resumed at step %d from %s", self.state.step, latest, extra={"event": "resume"})

    # --- the run ---

    def __call__(self) -> bool:
        """The whole run. Returns whether it went to its end (False: it was asked to stop, and can be resumed)."""
        try:
            with self.telemetry, self._open():
                if self.recipe.method == "eval":
                    self._evaluate("eval", self._publish())
                else:
                    self._run()
                self._finish()
            finished = True
        except Interrupted as where:
            log.info("stopped while waiting for %s", where)
            finished = False
        self.status.set("finished" if finished else "stopped")
        return finished

    def _run(self) -> None:
        version = self._publish() if self.actors else 0
        if not self.state.ready:
            self._prologue(version)
        if self._wants_reference:
            self.trainer.load_reference(self.state.reference)
        ended_by_guard: GuardStop | None = None
        try:
            self._training()
        except GuardStop as stop:  # the model is the last good one now
            ended_by_guard = stop
        self._evaluate("after", self._publish_finished())
        self.status.set("exporting the model")
        self.trainer.export(self.run.model, self.tokenizer)
        if ended_by_guard:
            self._write_summary()
            raise ended_by_guard

    @contextmanager
    def _open(self) -> Iterator[None]:
        """The actors, if the run draws anything from the model, and the metrics' files."""
        recipe = self.recipe
        if recipe.needs_actors:
            self.actors = self._make_actors(recipe)
            self.telemetry.actors(self.actors)
            self.evaluations = Evaluations(recipe, self.run, self.task, self.actors.source, self.status, self.state)
        self.feed = self._make_feed()
        self.status.set(steps=self.feed.steps)
        self.telemetry.metrics.planned = self.feed.steps
        self.metrics = MetricsLog(self.run, self.state.step, self.state.branch, wandb_log(recipe, self.run))
        if recipe.method in ROLLOUT_METHODS and recipe.metrics.keep_logprobs:
            self.rollout_files = RolloutFiles(self.run.rollouts, self.tokenizer)
        try:
            if self.actors is None:
                yield
            else:
                with self.actors.serving():
                    yield
        finally:
            self.metrics.close()
            if self.rollout_files:
                self.rollout_files.close()

    def _make_actors(self, recipe: Recipe) -> Actors:
        """With what the journal and the last checkpoint know of them."""
        hub = bind(recipe, self.run)
        with self.status.during("reading the journal") if self.run.journal.exists() else nullcontext():
            actors = Actors(
                recipe, self.run, hub, welcome(recipe, self.run, self.model_path, hub), self.versions,
                self.trainer.model.vocabulary, self._ticket, self._waiting, self.should_stop, self._reading,
            )  # fmt: skip
            if self.restored is not None:
                actors.restore(self.restored)
        return actors

    def _reading(self, read: int, size: int) -> None:
        """Called about twice a second while the journal is read."""
        self.status.set(None, doing=f"reading the journal, {read / 1e9:.1f} of {size / 1e9:.1f} GB")
        self.trainer.ranks.still_waiting("the journal to be read")

    def _make_feed(self) -> Feed:
        if self.recipe.method == "sft":
            return SftFeed(self.recipe, self.task)
        if self.recipe.method == "dpo":
            return DpoFeed(self.recipe, self.task, lambda rows: self.trainer.with_reference(rows, split=False))
        assert self.actors is not None
        return RolloutFeed(
            self.recipe, self.actors.source, self.versions.step_of, self.trainer.with_reference, self._take_timeout(),
            self.telemetry.clock,
        )  # fmt: skip

    @property
    def _on_cpu(self) -> bool:
        return self.trainer.model.device.type == "cpu"

    def _waiting(self, what: str, seconds: float) -> None:
        """Called about twice a second during waits."""
        self.status.waiting(what, seconds)
        self.trainer.ranks.still_waiting(what)

    def _ticket(self, ticket_id: TicketId) -> Ticket:
        """The train ticket of an id; depends on the recipe alone."""
        rollout, example = self.recipe.rollout, self.task.train(ticket_id.index)
        return Ticket(
            id=ticket_id,
            kind="train",
            attempt=1,
            prompt_ids=example.prompt_ids,
            answer=example.answer,
            grader=self.recipe.task.grader,
            group_size=rollout.group_size,
            sampling=Sampling(
                rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, rollout.stop
            ),
            seed=self.recipe.seed * 1_000_003 + ticket_id.index + ticket_id.epoch * BRANCH_SEEDS,
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
            assert self.actors is not None
            if not self._on_cpu:
                self.actors.source.wait_for_actor(version, self.recipe.actor.start_timeout_s)
            self._warm_start()
        self._evaluate("before", version)
        if self.recipe.warm_start.examples:
            self._evaluate("after_warm_start", self._publish())
        if self._wants_reference:
            self.state.reference = self.trainer.keep_reference()
        self.state.ready = True
        self._checkpoint()

    @property
    def _wants_reference(self) -> bool:
        return self.recipe.method == "dpo" or (self.recipe.method == "grpo" and self.recipe.grpo.kl_coef > 0)

    def _warm_start(self) -> None:
        """SFT on demonstrations; the optimizer begins anew afterwards."""
        warm = self.recipe.warm_start
        pairs = [self.task.demonstration_tokens(example) for example in self.task.demonstrations]
        batches = Epochs(pairs, warm.batch_size, warm.epochs, self.recipe.seed)
        self.status.set("warm start")
        with self.telemetry.clock.of("training"):
            for number in range(batches.steps):
                self._warm_start_batch(batches, number)
        self.trainer.restart_optimizer()

    def _warm_start_batch(self, batches: Epochs[Any], number: int) -> None:
        self._check_interrupt("the warm start")
        batch = sft.make_batch(batches[number], number)
        figures = self.trainer.train(batch, self.recipe.warm_start.lr)
        self.status.set(warm_start_batch=number + 1, warm_start_batches=batches.steps, loss=figures["loss"])

    def _check_interrupt(self, where: str) -> None:
        """Raise what a wait would raise now, though there is nothing to wait for."""
        if self.should_stop():
            raise Interrupted(where)
        if self.actors is not None:
            self.actors.source.check()

    # --- the loop ---

    def _training(self) -> None:
        source = self.actors.source if self.actors else None
        rolls_out = self.recipe.method in ROLLOUT_METHODS
        if source and (rolls_out or not self._on_cpu):
            source.wait_for_actor(1, self.recipe.actor.start_timeout_s)
        if source and rolls_out:
            source.wait_for_probe(PROBE_TIMEOUT_S)
            self._compare_engines()
            source.resume_training()
        overlaps = self.recipe.rollout.max_lag > 0 if rolls_out else self.recipe.eval.every_steps > 0
        self.trainer.share_cores(shared=bool(source) and self._on_cpu and overlaps)
        self.status.set("training", step=self.state.step)
        self.telemetry.clock.enter("other")
        recent: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW_STEPS)
        marked = time.monotonic()
        try:
            while not self._trained() and not self.should_stop():
                verdict = self._guarded_step(recent)
                self.state.training_s += time.monotonic() - marked
                marked = time.monotonic()
                if not self._went_back(verdict):
                    self._checkpoint_if_due()
        except Interrupted:
            pass
        except (EngineFailed, DeadlineExceeded, TicketsFail):
            if not (self.actors and self.actors.server.dispatcher.in_training):  # the steps so far are done
                self._checkpoint()
            raise
        if source:
            source.pause_training(recall=self._trained())
        self._checkpoint()
        if not self._trained():
            raise Interrupted("the next step")
        if source:
            with self.telemetry.clock.of("evaluating"):
                ended = self.evaluations.finish(self.state.step, self._current_version, self._take_timeout())
            if ended is not None:
                self.metrics.amend(ended)
                self.telemetry.metrics.amend(ended)
                self._checkpoint()

    def _trained(self) -> bool:
        """Whether the steps are done, or the budget of tokens is spent."""
        budget = self.recipe.token_budget
        return self.state.step >= self.feed.steps or 0 < budget <= self.state.budget_tokens

    def _guarded_step(self, recent: deque[tuple[float, float]]) -> Verdict:
        """One step, its figures, and what the guard makes of them."""
        policy = self.recipe.guard.policy
        if self.actors:
            self.actors.source.check()
        try:
            figures = self._step(recent)
        except FloatingPointError as error:
            if policy in ("off", "warn"):
                raise
            return self.guard.broken(self.state.step + 1, str(error))
        verdict = self.guard.see(self.state.step, figures, self._trained()) if policy != "off" else Verdict()
        figures |= self._compare_engines()
        if self.actors and not self._trained():
            figures |= self.evaluations.tick(self.state.step, self._current_version)
        self._report(figures | {"suspect_signals": float(len(verdict.suspect))}, recent)
        return verdict

    def _step(self, recent: deque[tuple[float, float]]) -> dict[str, float]:
        """One step: wait for its batch, train on it, publish, commit."""
        step, began, source = self.state.step, time.monotonic(), self.actors.source if self.actors else None
        waited = source.waited_s if source else 0.0
        with self.telemetry.clock.of("training"):
            batch = self.feed.batch(step)  # a wait within is counted as one
            train_began = time.monotonic()
            figures = self.trainer.train(batch, self._lr(step))
            train_s = time.monotonic() - train_began
        self.state.step = step + 1
        if source and self.recipe.method in ROLLOUT_METHODS:
            figures["version"] = self._publish()
            figures |= self.actors.publisher.figures if self.actors else {}
            source.commit(step + 1, int(figures["version"]))
            self._keep_logprobs(batch, int(figures["version"]))
            self.state.count_lag(figures)
            self.state.rewards.append(figures["reward_mean"])
            self.state.rollout_tokens += int(figures["completion_tokens"])
        if figures.get("kept_completions") == 0.0:
            log.warning("step %d: the grader accepted none of %d completions", step + 1, figures["completions"])
        step_s = time.monotonic() - began
        recent.append((step_s, figures.get("completion_tokens", figures["tokens"])))
        self.state.learner_tokens += figures["tokens"]
        self.state.budget_tokens += int(figures.get("sampled_tokens", figures["tokens"]))
        self.state.train_s += train_s
        return figures | {
            "branch": self.state.branch,
            "step_s": step_s,
            "train_s": train_s,
            "wait_s": source.waited_s - waited if source else 0.0,
            "learner_tokens_per_s": figures["tokens"] / train_s,
            **self.trainer.mfu(figures["model_flops"], train_s),
        }

    def _keep_logprobs(self, batch: Batch, version: int) -> None:
        """For the browser of rollouts."""
        logprobs = self.trainer.first_logprobs
        if self.rollout_files and batch.drawn and logprobs is not None:
            self.rollout_files.keep(self.state.step, version, self.state.branch, batch.drawn, logprobs)

    def _lr(self, step: int) -> float:
        return self.state.lr_scale * lr_at(step, self.recipe.optim, self.feed.steps)

    def _report(self, figures: dict[str, float], recent: deque[tuple[float, float]]) -> None:
        step = self.state.step
        seconds = sum(step_s for step_s, _ in recent)
        actors = self.actors.present() if self.actors else {}
        if self.actors:
            figures |= self.actors.work_since_last()
        figures["tokens_per_s"] = sum(tokens for _, tokens in recent) / seconds
        self.metrics.write(step, figures)
        self.telemetry.step(figures)
        left_s = (self.feed.steps - step) * seconds / len(recent)
        left_s += self.state.evals.get("after_warm_start", self.state.evals.get("before", {})).get("seconds", 0)
        shown = {key: round(value, 4) for key, value in figures.items()}
        curve = self.state.rewards[-40:]
        waited = {"waiting_for": "", "waited_s": 0.0}  # for this step's batch, which is trained on now
        self.status.set(None, **shown, **waited, step=step, left_s=left_s, actors=actors, curve=curve)
        log.info("step %d/%d: %s", step, self.feed.steps, _line(figures))

    # --- what the guard's verdict brings ---

    def _went_back(self, verdict: Verdict) -> bool:
        """Warn, end the run (GuardStop), or go back, by the recipe's policy."""
        if not verdict.tripped:
            return False
        policy = self.recipe.guard.policy
        log.warning("guard, %s", verdict.tripped)
        self.state.guard_events.append(verdict.tripped)
        self.status.set(guard=verdict.tripped)
        if policy == "warn" or verdict.hopeless:
            return False
        if policy == "rollback" and self.state.rollbacks < self.recipe.guard.max_rollbacks:
            self._roll_back(verdict.tripped)
            return True
        often = f" after {self.state.rollbacks} rollbacks" if policy == "rollback" else ""
        self._go_back()
        if self.actors:
            self.actors.source.pause_training(recall=True)
        raise GuardStop(
            f"the guard ended the run{often}: {verdict.tripped}. The last good checkpoint is of step"
            f" {self.state.step}; `tandem train --resume {self.run.path}` goes on from there, best with a smaller"
            " optim.lr"
        )

    def _roll_back(self, why: str) -> None:
        """Go on from the last good checkpoint, on a new branch, with a smaller learning rate."""
        before = self.state.step
        self._go_back(self.recipe.guard.lr_factor, rollbacks=1)
        log.warning(
            "rolled back from step %d to step %d (branch %d), learning rate x %g: %s",
            *(before, self.state.step, self.state.branch, self.state.lr_scale, why),
        )
        self.status.set(rollbacks=self.state.rollbacks, step=self.state.step)

    @property
    def _observed_after(self) -> int:
        """Steps until the figures of a step are of what a checkpoint's weights have drawn."""
        return 1 + self.recipe.rollout.max_lag if self.recipe.method in ROLLOUT_METHODS else 1

    @property
    def _sound_step(self) -> int:
        """The last step whose weights have drawn nothing suspect: those shortly before the first suspect figures are
        not to be trusted either."""
        return self.state.step - max(self.guard.began_ago, 1) - self._observed_after

    @property
    def _may_go_back(self) -> bool:
        return self.recipe.guard.policy in ("stop", "rollback")

    def _go_back(self, lr_factor: float = 1.0, rollbacks: int = 0) -> None:
        """Be at the last good checkpoint again, on a new branch that nothing drawn since can reach.

        The new branch's first checkpoint is what makes it so: a run that dies before it is written resumes on the old
        branch, one that dies after it on the new one.
        """
        path = checkpoint.newest_good(self.run.checkpoints, self._sound_step)
        assert path is not None, "the prologue writes one"
        restored = self.trainer.load(path)
        self.state.go_back(restored["run"])
        branch = self.state.branch
        self.state.rollbacks += rollbacks
        self.state.lr_scale *= lr_factor
        self.guard.restore(self.state.guard)
        if self.actors:
            surviving = {version for version, step in self.versions.steps.items() if step <= self.state.step}
            self.evaluations.go_back(branch, surviving)
            self.actors.source.roll_back(restored["tickets"], branch, self.versions.next)
        self._checkpoint()
        self.metrics.roll_back(self.state.step, branch)
        if self.actors:
            self._publish()

    # --- versions and evaluations ---

    def _compare_engines(self) -> dict[str, float]:
        """Hold what actors computed against the model; figures of the last comparison. Raises ParityLost."""
        figures: dict[str, float] = {}
        for result in self.actors.probed() if self.actors else []:
            since = self.state.step - self.versions.step_of(result.probe.version)
            if (found := self.parity.check(result, max(0, since))) is not None:
                figures = found.figures
                self.state.count_parity(found.mean, found.sees is False)
        return figures

    def _publish(self) -> int:
        assert self.actors is not None
        with self.telemetry.clock.of("publishing"):
            return self.trainer.publish(self.actors.publisher, self.state.step, self.state.branch)

    def _current_version(self) -> int:
        """A version with the weights of this moment: the step's own, or one made for an evaluation."""
        assert self.actors is not None
        known = self.actors.server.dispatcher.step_versions.get(self.state.step)
        return known if known is not None else self._publish()

    def _publish_finished(self) -> int:
        return self._current_version() if self.actors and self.recipe.eval.wanted else 0

    def _evaluate(self, name: str, version: int) -> None:
        if self.actors:
            with self.telemetry.clock.of("evaluating"):
                self.evaluations.measure(name, version, self._take_timeout())
            self._compare_engines()

    def _take_timeout(self) -> float:
        """Longest wait for a batch: every attempt of a straggler, and an engine's restart."""
        return self.recipe.rollout.straggler_s * self.recipe.rollout.max_attempts + self.recipe.actor.start_timeout_s

    # --- checkpoints and the end ---

    def _checkpoint_if_due(self) -> None:
        every, step = self.recipe.checkpoint.every_steps, self.state.step
        if every and step % every == 0 and not self._trained():
            self._checkpoint()

    def _checkpoint(self) -> None:
        self._count_wall()
        self.state.guard = self.guard.state()
        tickets, replay_offset = self.actors.tickets() if self.actors else ({}, 0)
        state = self.state.as_json() | {"earlier": process_totals(self.state, self.actors)}
        with self.telemetry.clock.of("saving"), self.status.during("writing a checkpoint"):
            self._save(state, tickets, replay_offset)
        log.info("checkpoint of step %d", self.state.step, extra={"event": "checkpoint"})
        self._write_summary()

    def _save(self, state: dict[str, Any], tickets: dict[str, Any], replay_offset: int) -> None:
        self.trainer.save(
            self.run.checkpoints,
            self.state.step,
            {"run": state, "tickets": tickets, "replay_offset": replay_offset},
            keep=self.recipe.checkpoint.keep,
            good=self.recipe.guard.policy == "off" or not self.guard.suspicious,
            branch=self.state.branch,
            sound_step=self._sound_step if self._may_go_back else None,
        )

    def _finish(self) -> None:
        """The figures of the whole run, and the actors are sent home."""
        self._write_summary()
        if self.actors:
            self.actors.leave(DRAIN_TIMEOUT_S)

    def _count_wall(self) -> None:
        now = time.monotonic()
        self.state.wall_s += now - self.began
        self.began = now

    def _write_summary(self) -> None:
        self._count_wall()
        write_json(self.run.summary, run_summary(self.recipe, self.state, self.actors, self.versions))


def _line(figures: dict[str, float]) -> str:
    """A step for the log: what there is of the figures that people look at first."""
    parts = {
        "reward_mean": "reward {:.3f}", "kept_completions": "kept {:.0f}", "nll": "loss {:.3f} nats a token",
        "dpo_accuracy": "preferred {:.2f}", "filtered_groups": "filtered {:.0f}", "lag_mean": "lag {:.2f}",
        "version": "version {:.0f}", "step_s": "{:.1f} s", "train_s": "train {:.1f}", "wait_s": "wait {:.1f}",
    }  # fmt: skip
    return ", ".join(form.format(figures[name]) for name, form in parts.items() if name in figures)
