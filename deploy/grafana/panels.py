"""What the dashboard "Tandem" shows: rows, panels, queries. Pure data; `build.py` makes Grafana's JSON of it.

In queries `@run` stands for the chosen run, `@actor` for its chosen actors, `@rate` for the window of a rate: Grafana's
`$__rate_interval`, four scrapes at least. A panel's description is the registry's help on the metrics that it names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from learner.telemetry.sample import ACTOR_STATES

Kind = Literal["timeseries", "stat", "state-timeline", "bargauge", "heatmap", "table"]

TOKENS_PER_S = "suffix: tokens/s"
WIDTHS = 24
"""Columns of a dashboard."""


@dataclass(frozen=True)
class Panel:
    """One panel: titles and legends for people, queries in PromQL."""

    title: str
    queries: dict[str, str]
    """Legend -> expression."""
    unit: str = "short"
    """As Grafana names units."""
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 7
    stacked: bool = False
    note: str = ""
    """Beside the registry's help."""
    absent: str = ""
    """What is shown where there are no data."""
    states: tuple[str, ...] = field(default=())
    """state-timeline: names of the values 1, 2, …"""
    names_only: bool = False
    """stat: the legend is what is shown, not the value."""


@dataclass(frozen=True)
class Row:
    """Panels side by side, from left to right, until the width is full."""

    title: str
    panels: tuple[Panel, ...]
    collapsed: bool = False


def _stat(title: str, queries: dict[str, str], unit: str = "short", width: int = 4, **more: object) -> Panel:
    return Panel(title, queries, unit, "stat", width, 4, **more)  # type: ignore[arg-type]


def _rate(metric: str, labels: str = "@run") -> str:
    return f"rate({metric}{{{labels}}}[@rate])"


def _quantile(quantile: float, metric: str, labels: str) -> str:
    return f"histogram_quantile({quantile}, sum by (le) (rate({metric}_bucket{{{labels}}}[@rate])))"


def _state_numbers() -> str:
    """One series an actor: the number of its state."""
    parts = (f'tandem_actor_state{{@actor,state="{state}"}} * {i}' for i, state in enumerate(ACTOR_STATES, start=1))
    return f"max by (actor) ({' or '.join(parts)})"


OVERVIEW = Row("Overview", (
    _stat("Held up by", {"{{side}}": "tandem_bottleneck{@run} == 1"}, width=5, names_only=True,
          absent="not measured yet", note="What to do about it `tandem status` says in a sentence."),
    _stat("Learner does", {"{{phase}}": "tandem_learner_phase{@run} == 1"}, names_only=True),
    _stat("Steps", {"done": "tandem_learner_step{@run}", "planned": "tandem_learner_steps_planned{@run}"}, width=5),
    _stat("Actors", {"serving": "tandem_actors_serving{@run}", "wanted": "tandem_actors_wanted{@run}"}, width=5),
    _stat("Alerts", {"firing": 'count(ALERTS{@run,alertstate="firing"}) or vector(0)'}, width=2,
          note="Of deploy/prometheus/rules.yml, where Prometheus has these rules."),
    _stat("Last sample", {"ago": "time() - tandem_sample_time_seconds{@run}"}, "s", 3),
    Panel("Throughput of both sides", {
        "rollout": f"sum({_rate('tandem_rollout_tokens_total')})",
        "accepted": _rate("tandem_accepted_tokens_total"),
        "learner": _rate("tandem_learner_tokens_total"),
    }, TOKENS_PER_S, width=12, height=8),
    Panel("Who waits for whom", {
        "learner waits": "tandem_learner_waiting_ratio{@run}",
        "actors rest": "1 - tandem_actors_busy_ratio{@run}",
    }, "percentunit", width=12, height=8, note="Of the last two minutes. Both low: balanced."),
    Panel("Reward", {
        "batch": "tandem_reward_mean{@run}",
        "evaluation": "tandem_eval_reward{@run}",
    }, "none", width=12, height=8),
    Panel("Staleness", {
        "mean": "tandem_staleness_versions{@run}",
        "largest": "tandem_staleness_versions_max{@run}",
    }, "suffix: steps", width=12, height=8, note="`rollout.max_lag` bounds it."),
    Panel("Run", {"": "tandem_run_info{@run}"}, "none", "table", 12, 4),
    _stat("Learner began", {"": "tandem_run_start_time_seconds{@run} * 1000"}, "dateTimeFromNow"),
    _stat("Advised actors", {"actors": "tandem_advised_actors{@run}"}, absent="not measured yet"),
    _stat("Speed with these", {"times": "tandem_advised_speedup_ratio{@run}"}, "suffix: ×", absent="not measured yet"),
))  # fmt: skip

ACTORS = Row("Actors", (
    Panel("How many", {
        "wanted": "tandem_actors_wanted{@run}",
        "connected": "tandem_actors_connected{@run}",
        "serving": "tandem_actors_serving{@run}",
        "gone": "count(tandem_actor_up{@run} == 0) or vector(0)",
    }, "none", note="Gone are those that were there, also when they were sent home."),
    Panel("What each does", {"{{actor}}": _state_numbers()}, "none", "state-timeline", 16, states=ACTOR_STATES),
    Panel("Tokens of each", {"{{actor}}": _rate("tandem_rollout_tokens_total", "@actor")}, TOKENS_PER_S),
    Panel("What actors do", {"{{state}}": f"sum by (state) ({_rate('tandem_actor_seconds_total', '@actor')})"},
          "suffix: actors", stacked=True, note="So many actors generate, load weights, wait, on average."),
    Panel("Engines' occupancy", {"{{actor}}": "tandem_actor_occupancy_ratio{@actor}"}, "percentunit"),
    Panel("Requests in the engines", {"{{actor}}": "tandem_actor_running_completions{@actor}"}, "none"),
    Panel("Tickets held", {"{{actor}}": "tandem_actor_tickets_held{@actor}"}, "none"),
    Panel("Memory", {"{{actor}}": "tandem_actor_memory_bytes{@actor}"}, "bytes"),
    Panel("Joined and restarted", {
        "joined": "tandem_actors_started_total{@run}",
        "restarted": "tandem_actor_restarts_total{@run}",
    }, "none", note="Since the learner's process began."),
    Panel("Completions that graders failed on",
          {"{{actor}}": "increase(tandem_grader_errors_total{@actor}[@rate])"}, "none"),
    Panel("Groups", {
        "accepted/s": _rate("tandem_groups_accepted_total"),
        "duplicates/s": _rate("tandem_groups_duplicate_total"),
        "tickets issued again/s": _rate("tandem_tickets_reissued_total"),
    }, "none"),
    Panel("Queue, leases, backlog", {
        "wait for training": "tandem_queue_groups{@run}",
        "in actors' hands": "tandem_leases{@run}",
        "without room": "tandem_backlog_tickets{@run}",
    }, "none"),
    Panel("Tickets by state", {"{{state}}": 'tandem_tickets{@run,state!="issued"}'}, "none", stacked=True),
    Panel("Dropped and turned away", {"{{reason}}": "increase(tandem_dropped_total{@run}[@rate])"}, "none"),
))  # fmt: skip

LEARNER = Row("Learner", (
    Panel("Where its time goes", {"{{phase}}": _rate("tandem_learner_phase_seconds_total")}, "percentunit",
          stacked=True),
    Panel("What it waits for", {"{{target}}": _rate("tandem_learner_wait_seconds_total")}, "percentunit",
          stacked=True),
    Panel("Length of a step and its parts", {
        "{{phase}}": "sum by (phase) (increase(tandem_learner_step_seconds_sum{@run}[$__range]))"
                     " / sum by (phase) (increase(tandem_learner_step_seconds_count{@run}[$__range]))",
    }, "s", "bargauge", note="Mean over the time shown."),
    Panel("Lengths of steps",
          {"{{le}}": 'sum by (le) (increase(tandem_learner_step_seconds_bucket{@run,phase="total"}[@rate]))'},
          "s", "heatmap"),
    Panel("Model FLOPs utilization", {"MFU": "tandem_learner_mfu_ratio{@run}"}, "percentunit",
          absent="the peak of this machine is not known"),
    Panel("Memory", {"{{kind}}": "tandem_learner_memory_bytes{@run}"}, "bytes"),
))  # fmt: skip

LEARNING = Row("Learner: what it learns", (
    Panel("Reward", {
        "mean": "tandem_reward_mean{@run}",
        "standard deviation": "tandem_reward_std{@run}",
        "accepted by the grader": "tandem_kept_completions_ratio{@run}",
        "chosen one preferred": "tandem_preferred_ratio{@run}",
    }, "none"),
    Panel("Loss", {"loss": "tandem_loss{@run}", "negative log-likelihood": "tandem_nll_nats{@run}"}, "none"),
    Panel("Entropy", {"entropy": "tandem_entropy_nats{@run}"}, "suffix: nats"),
    Panel("KL", {
        "to the engine's policy": "tandem_kl_nats{@run}",
        "to the reference": "tandem_kl_reference_nats{@run}",
    }, "suffix: nats"),
    Panel("Both sides' logprobs apart", {
        "on the batch": "tandem_logprob_mismatch_nats{@run}",
        "same weights": "tandem_parity_nats{@run}",
    }, "suffix: nats"),
    Panel("Clipped and truncated weights", {
        "clipped": "tandem_clip_ratio{@run}",
        "importance weight truncated": "tandem_importance_truncated_ratio{@run}",
    }, "percentunit"),
    Panel("Length of completions", {"mean": "tandem_completion_tokens_mean{@run}"}, "suffix: tokens"),
    Panel("What teaches nothing", {
        "groups without variance": "tandem_zero_variance_ratio{@run}",
        "completions cut off": "tandem_truncated_completions_ratio{@run}",
        "tokens with a gradient": "tandem_trained_token_ratio{@run}",
    }, "percentunit"),
    Panel("Gradient norm", {"before clipping": "tandem_grad_norm{@run}"}, "none"),
    Panel("Learning rate", {"lr": "tandem_learning_rate{@run}"}, "sci"),
    Panel("Signs of a collapse", {
        "the guard sees": "tandem_suspect_signals{@run}",
        "rollbacks": "tandem_learner_branch{@run}",
    }, "none"),
))  # fmt: skip

WEIGHTS = Row("Weights", (
    Panel("Versions", {
        "announced": "tandem_weight_version{@run}",
        "{{actor}}": "tandem_actor_weight_version{@actor}",
    }, "none"),
    Panel("Versions behind", {
        "{{actor}}": "scalar(tandem_weight_version{@run}) - tandem_actor_weight_version{@actor}",
    }, "none"),
    Panel("Versions a minute", {
        "published": f"60 * {_rate('tandem_weight_versions_published_total')}",
        "{{actor}}": f"60 * {_rate('tandem_weight_swaps_total', '@actor')}",
    }, "none"),
    Panel("Bytes sent", {"to all actors": _rate("tandem_weight_sync_bytes_total")}, "Bps"),
    Panel("Size of a version", {
        "dense": "tandem_weight_dense_bytes{@run}",
        "newest delta": "tandem_weight_delta_bytes{@run}",
    }, "bytes"),
    Panel("Time on the learner's side", {
        "training stands still": "tandem_weight_publish_seconds{@run}",
        "digests and delta, beside it": "tandem_weight_encode_seconds{@run}",
    }, "s"),
    Panel("Time to fetch", {"{{actor}}": "tandem_weight_fetch_seconds{@actor}"}, "s"),
    Panel("Pause of generation", {"{{actor}}": "tandem_weight_pause_seconds{@actor}"}, "s"),
    Panel("Paused share of the time", {"{{actor}}": _rate("tandem_weight_pause_seconds_total", "@actor")},
          "percentunit"),
))  # fmt: skip

ENGINES = Row("Engines (vLLM's own metrics)", (
    Panel("Requests", {
        "{{actor}} running": "vllm:num_requests_running{@actor}",
        "{{actor}} waiting": "vllm:num_requests_waiting{@actor}",
    }, "none"),
    Panel("Cache of keys and values in use", {"{{actor}}": "vllm:kv_cache_usage_perc{@actor}"}, "percentunit"),
    Panel("Tokens", {
        "{{actor}} generated": _rate("vllm:generation_tokens_total", "@actor"),
        "{{actor}} prompts": _rate("vllm:prompt_tokens_total", "@actor"),
    }, TOKENS_PER_S),
    Panel("Prefix cache: tokens found", {
        "{{actor}}": f"{_rate('vllm:prefix_cache_hits_total', '@actor')}"
                     f" / {_rate('vllm:prefix_cache_queries_total', '@actor')}",
    }, "percentunit"),
    Panel("Preemptions", {"{{actor}}": "increase(vllm:num_preemptions_total{@actor}[@rate])"}, "none"),
    Panel("Requests ended, by reason", {
        "{{finished_reason}}": f"sum by (finished_reason) ({_rate('vllm:request_success_total', '@actor')})",
    }, "suffix: /s"),
    Panel("Time to the first token", {
        "half of all": _quantile(0.5, "vllm:time_to_first_token_seconds", "@actor"),
        "95 of 100": _quantile(0.95, "vllm:time_to_first_token_seconds", "@actor"),
    }, "s"),
    Panel("Time between tokens", {
        "half of all": _quantile(0.5, "vllm:inter_token_latency_seconds", "@actor"),
        "95 of 100": _quantile(0.95, "vllm:inter_token_latency_seconds", "@actor"),
    }, "s"),
    Panel("Time of a request", {
        "half of all": _quantile(0.5, "vllm:e2e_request_latency_seconds", "@actor"),
        "95 of 100": _quantile(0.95, "vllm:e2e_request_latency_seconds", "@actor"),
    }, "s"),
), collapsed=True)  # fmt: skip

ROWS = (OVERVIEW, ACTORS, LEARNER, LEARNING, WEIGHTS, ENGINES)
