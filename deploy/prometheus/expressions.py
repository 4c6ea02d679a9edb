"""What a PromQL expression names: metrics, labels that it matches, labels that it groups by. Pure.

Knows as much of the language as finding names takes; whether an expression is valid, only Prometheus can say. The
dashboard's generator refuses what `faults` finds, tests hold `rules.yml` against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from learner.telemetry.registry import METRICS

TARGET_LABELS = frozenset({"run", "job", "instance"})
"""What Prometheus gives every series of a target. `run` comes from the file that the learner writes."""

ENGINE_LABELS = frozenset({"actor", "model_name", "engine"})
ENGINE_METRICS: dict[str, frozenset[str]] = {
    "vllm:num_requests_running": frozenset(),
    "vllm:num_requests_waiting": frozenset(),
    "vllm:kv_cache_usage_perc": frozenset(),
    "vllm:prefix_cache_queries_total": frozenset(),
    "vllm:prefix_cache_hits_total": frozenset(),
    "vllm:num_preemptions_total": frozenset(),
    "vllm:prompt_tokens_total": frozenset(),
    "vllm:generation_tokens_total": frozenset(),
    "vllm:request_success_total": frozenset({"finished_reason"}),
    "vllm:time_to_first_token_seconds_bucket": frozenset({"le"}),
    "vllm:inter_token_latency_seconds_bucket": frozenset({"le"}),
    "vllm:e2e_request_latency_seconds_bucket": frozenset({"le"}),
}
"""vLLM's metrics that the dashboard shows, as Prometheus names them, and their labels beside ENGINE_LABELS."""

PROMETHEUS_METRICS: dict[str, frozenset[str]] = {
    "up": frozenset(),
    "ALERTS": frozenset({"alertname", "alertstate", "severity"}),
}
"""What Prometheus makes itself."""

LABEL_LISTS = ("by", "without", "on", "ignoring", "group_left", "group_right")
WORDS = frozenset({*LABEL_LISTS, "and", "or", "unless", "bool", "offset", "inf", "nan"})
AGGREGATIONS = frozenset({"sum", "avg", "min", "max", "count", "topk", "bottomk", "quantile"})
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[a-zA-Z_:][\w:]*|\$\w+|\$\{\w+\}|\d[\w.]*|=~|!~|[=!<>]=|\S')


@dataclass(frozen=True)
class Selector:
    """One vector that an expression asks for."""

    metric: str
    labels: tuple[str, ...]
    """That it matches."""
    text: str
    """As PromQL, without a range."""


@dataclass(frozen=True)
class Names:
    """All names in one expression."""

    selectors: tuple[Selector, ...]
    grouping: tuple[str, ...]
    """Labels after by, on, group_left and the like."""


def names(expression: str) -> Names:
    """Take an expression apart. Raises ValueError for brackets that do not close."""
    tokens = TOKEN.findall(expression)
    selectors: list[Selector] = []
    grouping: list[str] = []
    position = 0
    while position < len(tokens):
        token, following = tokens[position], tokens[position + 1 : position + 2]
        position += 1
        if token in LABEL_LISTS and following == ["("]:
            end = _closing(tokens, position, ")", expression)
            grouping += [word for word in tokens[position + 1 : end] if word != ","]
            position = end + 1
        elif re.match(r"[a-zA-Z_:]", token) and not _is_word(token, following):
            labels, text = [], token
            if following == ["{"]:
                end = _closing(tokens, position, "}", expression)
                labels = [word for word, sign in zip(tokens[position:end], tokens[position + 1 :], strict=False)
                          if sign in ("=", "!=", "=~", "!~")]  # fmt: skip
                text += "".join(tokens[position : end + 1])
                position = end + 1
            selectors.append(Selector(token, tuple(labels), text))
    return Names(tuple(selectors), tuple(grouping))


def _is_word(token: str, following: list[str]) -> bool:
    """Whether a name is a function, an operator or an aggregation, and no metric."""
    called = following == ["("] or (token in AGGREGATIONS and following in (["by"], ["without"]))
    return called or token.lower() in WORDS


def _closing(tokens: list[str], start: int, bracket: str, expression: str) -> int:
    try:
        return tokens.index(bracket, start)
    except ValueError:
        raise ValueError(f"{expression}: found no {bracket!r} that closes") from None


def known_series(recorded: Mapping[str, frozenset[str]] | None = None) -> dict[str, frozenset[str]]:
    """Name -> labels of every series that there may be. `recorded`: those of recording rules."""
    series = PROMETHEUS_METRICS | dict(recorded or {})
    for metric in METRICS:
        labels = frozenset(metric.labels)
        if metric.kind == "histogram":
            series |= {f"{metric.name}_bucket": labels | {"le"}}
            series |= {f"{metric.name}_sum": labels, f"{metric.name}_count": labels}
        else:
            series[metric.name] = labels
    engines = {name: labels | ENGINE_LABELS for name, labels in ENGINE_METRICS.items()}
    return {name: labels | TARGET_LABELS for name, labels in (series | engines).items()}


def faults(expression: str, series: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """What an expression names that is not there: for people. `series`: as of `known_series`."""
    found = names(expression)
    if not found.selectors:
        yield f"{expression}: names no metric"
    for selector in found.selectors:
        if selector.metric not in series:
            yield f"{expression}: found {selector.metric}, which is no metric of the registry"
        for label in selector.labels:
            if label not in series.get(selector.metric, ()):
                yield f"{expression}: found label {label!r}, which {selector.metric} does not have"
    there = {label for selector in found.selectors for label in series.get(selector.metric, ())}
    for label in found.grouping:
        if label not in there:
            yield f"{expression}: found {label!r} to group by, which none of its metrics has"


def family(name: str) -> str:
    """The registry's name for a series: without what a histogram's parts end with."""
    return re.sub(r"_(bucket|sum|count)$", "", name) if name not in {metric.name for metric in METRICS} else name
