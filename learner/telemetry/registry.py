"""Every metric of a run, once: name, type, unit, labels, help, and where its value comes from.

From this table come the learner's Prometheus endpoint (`exporter.py`), the dashboards and alert rules in `deploy/`, and
the table of docs/metrics.md. Names follow Prometheus' conventions: base units, `_total` at the end of counters. Pure
data; imports nothing of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

STEP_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)
"""Seconds."""


@dataclass(frozen=True)
class Metric:
    """One family of time series, named as it is queried."""

    name: str
    kind: Kind
    unit: str
    """"seconds", "bytes", "tokens", "ratio" (0 to 1), "nats", …; "": a plain number."""
    help: str
    labels: tuple[str, ...] = ()
    figure: str = ""
    """Key of metrics.jsonl that holds the value, for what is known once a step; "": out of a `Sample`."""
    or_figure: str = ""
    """A key that holds it where there is no `figure`."""
    lasts: bool = False
    """The figure is not of every step: the last one is shown until there is another."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, in its unit."""


def _step(name: str, figure: str, unit: str, help: str, or_figure: str = "", lasts: bool = False) -> Metric:
    """A gauge that a step sets."""
    return Metric(name, "gauge", unit, help, figure=figure, or_figure=or_figure, lasts=lasts)


METRICS: tuple[Metric, ...] = (
    # the run
    Metric("tandem_run_info", "gauge", "", "Always 1; the run's name, method and model as labels.",
           ("run", "method", "model")),
    Metric("tandem_run_start_time_seconds", "gauge", "seconds", "When this learner process began, as Unix time."),
    Metric("tandem_sample_time_seconds", "gauge", "seconds", "When the values out of samples were taken, Unix time."),
    Metric("tandem_learner_steps_planned", "gauge", "steps", "Steps that the run is to make."),
    Metric("tandem_learner_step", "gauge", "steps", "Steps done, of the surviving branch."),
    _step("tandem_learner_branch", "branch", "", "Rollbacks that lie behind the surviving steps."),
    # the learner's time and throughput
    Metric("tandem_learner_phase", "gauge", "", "1 for what the learner does now, 0 for everything else.", ("phase",)),
    Metric("tandem_learner_phase_seconds_total", "counter", "seconds",
           "Time of the learner by what it did: waiting, training, publishing, evaluating, saving, starting, other.",
           ("phase",)),
    Metric("tandem_learner_wait_seconds_total", "counter", "seconds",
           "Time that the learner waited, by what for: groups, actors, evaluation, probe.", ("target",)),
    Metric("tandem_learner_step_seconds", "histogram", "seconds",
           "Length of a step and of its parts: total, wait, train, publish.", ("phase",), buckets=STEP_BUCKETS),
    Metric("tandem_learner_tokens_total", "counter", "tokens", "Tokens that went through forward and backward."),
    Metric("tandem_learner_mfu_ratio", "gauge", "ratio",
           "Model FLOPs utilization of the last step's training; only where the GPU's peak is known.",
           figure="mfu"),
    Metric("tandem_learner_memory_bytes", "gauge", "bytes",
           "Memory of the learner's first process: resident, and on the GPU (allocated, reserved).", ("kind",)),
    # the actors
    Metric("tandem_actors_wanted", "gauge", "actors", "How many actors are wished for; absent for a run by hand."),
    Metric("tandem_actors_connected", "gauge", "actors", "Actors that are connected."),
    Metric("tandem_actors_serving", "gauge", "actors", "Actors that serve a version and take tickets."),
    Metric("tandem_actors_started_total", "counter", "actors", "Actors that joined for the first time."),
    Metric("tandem_actor_restarts_total", "counter", "restarts", "Actors that came back as a new process."),
    Metric("tandem_actor_up", "gauge", "", "1 for a connected actor, 0 for one that is gone.", ("actor",)),
    Metric("tandem_actor_state", "gauge", "",
           "1 for what the actor does now: starting, generating, updating, waiting, draining, gone.",
           ("actor", "state")),
    Metric("tandem_actor_seconds_total", "counter", "seconds",
           "Time of an actor by what it did while it served: generating, updating, waiting.", ("actor", "state")),
    Metric("tandem_rollout_tokens_total", "counter", "tokens", "Completion tokens that an actor has drawn.",
           ("actor",)),
    Metric("tandem_actor_running_completions", "gauge", "completions", "Requests inside an actor's engine.",
           ("actor",)),
    Metric("tandem_actor_occupancy_ratio", "gauge", "ratio",
           "Requests inside an actor's engine as a share of what it takes at once, mean since the last sample.",
           ("actor",)),
    Metric("tandem_actor_tickets_held", "gauge", "tickets", "Tickets that an actor works on.", ("actor",)),
    Metric("tandem_actor_weight_version", "gauge", "", "Version that an actor serves.", ("actor",)),
    Metric("tandem_actor_memory_bytes", "gauge", "bytes", "Resident memory of an actor's process.", ("actor",)),
    Metric("tandem_grader_errors_total", "counter", "completions", "Completions that an actor's grader failed on.",
           ("actor",)),
    # groups, tickets, queue
    Metric("tandem_groups_accepted_total", "counter", "groups", "Groups journaled and acknowledged."),
    Metric("tandem_accepted_tokens_total", "counter", "tokens", "Completion tokens of accepted groups."),
    Metric("tandem_tickets", "gauge", "tickets",
           "Train tickets by state, from issued, queued and leased to trained, filtered, failed, dropped or abandoned.",
           ("state",)),
    Metric("tandem_tickets_reissued_total", "counter", "tickets", "Tickets that were issued again."),
    Metric("tandem_groups_duplicate_total", "counter", "groups", "Groups that came twice or too late."),
    Metric("tandem_queue_groups", "gauge", "groups", "Groups that are there and wait to be trained on."),
    Metric("tandem_leases", "gauge", "tickets", "Tickets in the actors' hands, or waiting to be issued again."),
    Metric("tandem_backlog_tickets", "gauge", "tickets",
           "Tickets that may be issued and that no actor has room for: more actors would begin them at once."),
    Metric("tandem_dropped_total", "counter", "events",
           "What was dropped or turned away, by reason: frames, connections, groups unlike their ticket.", ("reason",)),
    # staleness
    _step("tandem_staleness_versions", "lag_mean", "steps",
          "Mean lag of the last batch's tokens: steps between the weights that drew them and the update."),
    _step("tandem_staleness_versions_max", "lag_max", "steps", "Largest lag of a token of the last batch."),
    # weights
    Metric("tandem_weight_version", "gauge", "", "Newest version that was announced."),
    Metric("tandem_weight_versions_published_total", "counter", "versions", "Versions published by this process."),
    Metric("tandem_weight_sync_bytes_total", "counter", "bytes", "Bytes of weights given to the sockets."),
    Metric("tandem_weight_dense_bytes", "gauge", "bytes", "Bytes of one dense version."),
    _step("tandem_weight_delta_bytes", "delta_bytes", "bytes", "Payload of the newest delta."),
    _step("tandem_weight_publish_seconds", "publish_s", "seconds", "Time that training stood still for a version."),
    _step("tandem_weight_encode_seconds", "encode_s", "seconds", "Digests and delta of a version, beside training."),
    Metric("tandem_weight_fetch_seconds", "gauge", "seconds", "An actor's last fetch, check and staging.", ("actor",)),
    Metric("tandem_weight_pause_seconds", "gauge", "seconds", "Pause of generation at an actor's last update.",
           ("actor",)),
    Metric("tandem_weight_pause_seconds_total", "counter", "seconds", "Pauses of generation for updates.", ("actor",)),
    Metric("tandem_weight_swaps_total", "counter", "updates", "Versions that an actor has swapped in.", ("actor",)),
    # learning
    _step("tandem_reward_mean", "reward_mean", "", "Mean reward of the last batch's completions."),
    _step("tandem_reward_std", "reward_std", "", "Standard deviation of these rewards."),
    _step("tandem_eval_reward", "eval_reward", "", "Reward of the last evaluation in the background.", lasts=True),
    _step("tandem_loss", "loss", "", "Loss, mean over the step's updates."),
    _step("tandem_nll_nats", "nll", "nats", "Negative log-likelihood a token (SFT, expert iteration)."),
    _step("tandem_entropy_nats", "entropy", "nats", "Entropy of the policy a token, over trained tokens."),
    _step("tandem_clip_ratio", "clipped_share", "ratio", "Tokens whose ratio was clipped."),
    _step("tandem_importance_truncated_ratio", "importance_truncated_share", "ratio",
          "Tokens whose importance weight was truncated."),
    _step("tandem_kl_nats", "kl_k3", "nats", "KL of the learner to the engine's policy a token (k3)."),
    _step("tandem_kl_reference_nats", "kl_reference", "nats", "KL of the policy to the reference a token (k3).",
          or_figure="reference_kl_k3"),
    _step("tandem_logprob_mismatch_nats", "engine_gap", "nats",
          "Mean absolute difference of the engine's and the learner's logprobs a token."),
    _step("tandem_parity_nats", "parity_nats", "nats",
          "The same for a probe under the same weights: nothing but the two sides' arithmetic.", lasts=True),
    _step("tandem_completion_tokens_mean", "completion_tokens_mean", "tokens", "Mean length of a completion."),
    _step("tandem_truncated_completions_ratio", "truncated_completions_share", "ratio",
          "Completions that ended at the limit of tokens."),
    _step("tandem_zero_variance_ratio", "zero_variance_share", "ratio", "Groups whose rewards are all the same."),
    _step("tandem_trained_token_ratio", "trained_token_share", "ratio", "Tokens of the batch that have a gradient."),
    _step("tandem_kept_completions_ratio", "kept_share", "ratio",
          "Completions that expert iteration kept: the grader accepted them."),
    _step("tandem_preferred_ratio", "dpo_accuracy", "ratio", "Pairs of which DPO's policy prefers the chosen one."),
    _step("tandem_suspect_signals", "suspect_signals", "signals", "Signs of a collapse that the guard sees."),
    _step("tandem_grad_norm", "grad_norm", "", "Norm of the gradient before clipping, mean over updates."),
    _step("tandem_learning_rate", "lr", "", "Learning rate of the step."),
    # advice
    Metric("tandem_bottleneck", "gauge", "", "1 for the advisor's verdict: rollout, lag, learner, weights or balanced.",
           ("side",)),
    Metric("tandem_learner_waiting_ratio", "gauge", "ratio", "Share of its time that the learner waited for groups."),
    Metric("tandem_actors_busy_ratio", "gauge", "ratio", "Share of their time that actors had requests in the engine."),
    Metric("tandem_advised_actors", "gauge", "actors", "How many actors the advisor would have."),
    Metric("tandem_advised_speedup_ratio", "gauge", "", "Predicted throughput with as many, divided by today's."),
)  # fmt: skip
"""In the order of the docs' table."""

BY_NAME = {metric.name: metric for metric in METRICS}


def markdown() -> str:
    """The table as docs/metrics.md shows it."""
    lines = ["| Metric | Type | Unit | Labels | Figure of `metrics.jsonl` | Meaning |", "|---|---|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        figures = " or ".join(f"`{figure}`" for figure in (metric.figure, metric.or_figure) if figure)
        cells = (f"`{metric.name}`", metric.kind, metric.unit, labels, figures, metric.help)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
