"""Every query of the dashboard and of the rules, asked of a real Prometheus that scrapes a real run.

Learner and actor are processes (fake engine), Prometheus runs by the repository's configuration and rules. What a short
run on a CPU cannot have comes from figures written into Prometheus beforehand (`ONLY_BACKFILLED`). There is no Grafana:
its variables are filled in here as Grafana would.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from deploy.grafana.build import FILE
from deploy.prometheus.expressions import ENGINE_METRICS, family, names
from protocol.rundir import RunDir, read_json
from tests.prometheus_harness import PROMETHEUS_FILES, Prometheus, Series, backfill, program
from tests.run_harness import Command
from tests.tiny_model import make_tiny_model

RECIPE = """
name = "watched"
steps = 100000
[model]
path = "MODEL"
dtype = "float32"
max_model_len = 128
[task]
max_operand = 5
grader = "coins:even"
[rollout]
groups_per_step = 4
group_size = 4
max_tokens = 8
[eval]
prompts = 2
samples = 2
[actor]
engine = "fake"
fake_token_s = 0.03
max_running = 8
[wire]
heartbeat_s = 0.2
[metrics]
sample_every_s = 0.2
engine_every_s = 0.5
"""

COINS = """
def even(response, answer):
    return {"reward": float(len(response) % 2 == 0)}
"""
"""By which the fake engine is right now and then: else no group would teach anything."""

ONLY_BACKFILLED = {
    **dict.fromkeys(map(family, ENGINE_METRICS), "the fake engine is no vLLM"),
    "tandem_learner_mfu_ratio": "no GPU",
    "tandem_actors_wanted": "a run by hand has no launcher",
    "tandem_eval_reward": "no evaluation in the background is over so soon",
    "tandem_nll_nats": "another method",
    "tandem_kept_completions_ratio": "another method",
    "tandem_preferred_ratio": "another method",
    "tandem_kl_reference_nats": "no reference",
    "tandem_parity_nats": "the fake engine answers no probes",
    "tandem_dropped_total": "nothing is dropped",
    "tandem_bottleneck": "the advisor looks at two whole steps and five seconds at least",
    "tandem_learner_waiting_ratio": "the advisor",
    "tandem_actors_busy_ratio": "the advisor",
    "tandem_advised_actors": "the advisor",
    "tandem_advised_speedup_ratio": "the advisor",
    "ALERTS": "nothing is wrong for long",
}
"""Metric -> why a run of a few seconds on a CPU does not have it."""

STEPS = 4
BACKFILLED_S = 30


@dataclass(frozen=True)
class Watched:
    """A Prometheus that has seen a run."""

    prometheus: Prometheus
    run: tuple[float, float]
    """When the run was there, Unix time."""
    backfilled: tuple[float, float]


def window_of(watched: Watched, expression: str) -> tuple[str, tuple[float, float]]:
    """(name of the run, time) that an expression can be asked of."""
    asked = {family(selector.metric) for selector in names(expression).selectors}
    return ("backfilled", watched.backfilled) if asked & ONLY_BACKFILLED.keys() else ("watched", watched.run)


def filled_in(expression: str, run: str) -> str:
    """An expression with what Grafana puts in place of its variables."""
    values = {"$run": run, "$actor": ".*", "$__rate_interval": "8s", "$__range": "20s"}
    return re.sub(r"\$\w+", lambda found: values[found[0]], expression)


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield from panel["panels"] if panel["type"] == "row" else [panel]


def unanswered(watched: Watched, dashboard: dict[str, Any]) -> list[str]:
    """Queries of panels that Prometheus refuses, that give nothing, or nothing for their legend: for people."""
    found = []
    for panel in panels(dashboard):
        for target in panel["targets"]:
            run, window = window_of(watched, target["expr"])
            what = f"{panel['title']}: {target['expr']}"
            try:
                series = watched.prometheus.series(filled_in(target["expr"], run), window)
            except ValueError as error:
                found.append(f"{what}: {error}")
                continue
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            if not series:
                found.append(f"{what}: no data")
            elif not all(wanted <= labels.keys() for labels, _ in series):
                found.append(f"{what}: no {wanted} in {series[0][0]}")
    return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    program("prometheus")
    directory = tmp_path_factory.mktemp("watched")
    recipe, run = directory / "recipe.toml", RunDir(directory / "runs" / "watched")
    recipe.write_text(RECIPE.replace("MODEL", str(make_tiny_model(directory / "tiny"))))
    (directory / "coins.py").write_text(COINS)
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH", "")]))
    run.path.parent.mkdir()
    start = int(time.time()) - 7200
    backfill(directory, start, BACKFILLED_S)
    learner = ["learner", str(recipe), "--runs", str(run.path.parent)]
    actor = ["actor", str(run.endpoint), "--name", "actor-0", "--grader", "coins:even"]
    with (
        Command(learner, directory / "learner.log", PYTHONPATH=path) as left,
        Command(actor, directory / "actor.log", PYTHONPATH=path) as right,
        Prometheus(directory, run.path.parent) as prometheus,
    ):
        began = left.until(lambda: first_time(prometheus), f"{STEPS} steps that Prometheus has seen", 60)
        began, ended = left.until(lambda: enough(prometheus, began), "some more scrapes", 60)
        targets = read_json(run.scrape_targets)
        assert [group["labels"] for group in targets] == [{"run": "watched"}]
        yield Watched(prometheus, (began, ended), (float(start), float(start + BACKFILLED_S)))
        for command in (right, left):
            command.process.send_signal(signal.SIGINT)
            command.wait(60)
    assert not run.scrape_targets.exists()


def first_time(prometheus: Prometheus) -> float:
    """When Prometheus first saw a run that has made some steps; 0 before."""
    series = prometheus.get("query", query=f'timestamp(tandem_learner_step{{run="watched"}} >= {STEPS})')["result"]
    return float(series[0]["value"][1]) if series else 0.0


def enough(prometheus: Prometheus, began: float) -> tuple[float, float] | None:
    """(Begin, end) of a time with some scrapes and evaluations of the rules."""
    late = ('tandem:weight_pause:ratio15m{run="watched"}', 'fake:requests_total{run="watched"}')
    seen = all(prometheus.get("query", query=series)["result"] for series in late)
    now = first_time(prometheus)
    return (began - 3, now) if seen and now - began > 3 else None


def test_every_panels_query_is_answered(watched: Watched) -> None:
    assert unanswered(watched, json.loads(FILE.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("rate(tandem_accepted_tokens_total", "rate(tandem_accepted_token_total", "no data"),
        ("rate(tandem_accepted_tokens_total", "rote(tandem_accepted_tokens_total", "unknown function"),
        ("[$__rate_interval]", "[$__rate_interval", "parse error"),
        ('{run="$run"}', '{runs="$run"}', "no data"),
        ('{run="$run"}', '{run="$runs"}', "KeyError"),
    ],
)
def test_a_query_with_a_typo_fails_and_is_named(watched: Watched, before: str, after: str, complaint: str) -> None:
    dashboard = json.loads(FILE.read_text("utf-8"))
    panel = next(panel for panel in panels(dashboard) if panel["title"] == "Throughput of both sides")
    target = panel["targets"][1]
    assert before in target["expr"]
    target["expr"] = target["expr"].replace(before, after)
    alone = {"panels": [panel]}
    if complaint == "KeyError":
        with pytest.raises(KeyError, match="runs"):
            unanswered(watched, alone)
        return
    (found,) = unanswered(watched, alone)
    assert found.startswith("Throughput of both sides: ")
    assert complaint in found


def test_variables_offer_the_run_and_its_actors(watched: Watched) -> None:
    offered = {}
    for variable in json.loads(FILE.read_text("utf-8"))["templating"]["list"][1:]:
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert found
        parameters = {"match[]": filled_in(found[1], "watched"), "start": str(watched.run[0]), "end": str(time.time())}
        offered[variable["name"]] = watched.prometheus.get(f"label/{found[2]}/values", **parameters)
    assert offered == {"run": ["watched"], "actor": ["actor-0"]}


def test_figures_are_the_runs_own(watched: Watched) -> None:
    """One series a run and actor, with the labels that the pages bring, whatever port the learner has."""

    def last(expression: str) -> tuple[dict[str, str], float]:
        ((labels, values),) = watched.prometheus.series(expression, watched.run)
        return labels, values[-1]

    labels, value = last('tandem_run_info{job="tandem"}')
    assert (labels["run"], labels["instance"], labels["method"], value) == ("watched", "watched", "grpo", 1.0)
    labels, value = last('tandem_actor_up{job="tandem"}')
    assert (labels["actor"], value) == ("actor-0", 1.0)
    labels, value = last("fake:requests_total")
    assert (labels["job"], labels["run"], labels["actor"]) == ("tandem-engines", "watched", "actor-0")
    assert value > 0
    assert last('sum(tandem_learner_phase{job="tandem"})')[1] == 1.0
    assert last("tandem_learner_step")[1] >= STEPS
    assert last("sum(rate(tandem_rollout_tokens_total[8s]))")[1] > 0


def test_every_rule_is_evaluated_and_asks_for_what_is_there(watched: Watched) -> None:
    prometheus = watched.prometheus
    groups = prometheus.get("rules")["groups"]
    loaded = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert [(name, rule["lastError"]) for name, rule in loaded.items() if rule["health"] != "ok"] == []
    written = yaml.safe_load((PROMETHEUS_FILES / "rules.yml").read_text("utf-8"))
    rules = {
        rule.get("alert") or rule["record"]: rule["expr"] for group in written["groups"] for rule in group["rules"]
    }
    assert loaded.keys() == rules.keys()
    for name, rule in rules.items():
        prometheus.get("query", query=rule)
        for selector in names(rule).selectors:
            _, window = window_of(watched, selector.text)
            assert prometheus.series(selector.text, window), f"{name}: no data for {selector.text}"
    firing = [rule["name"] for rule in loaded.values() if rule.get("state") == "firing"]
    assert firing == [], "nothing is wrong with this run"


def test_what_is_backfilled_only_cannot_be_had_from_the_run(watched: Watched) -> None:
    unsure = {name for name, why in ONLY_BACKFILLED.items() if "advisor" in why} | {"ALERTS"}
    for name in ONLY_BACKFILLED.keys() - unsure:
        there: Series = watched.prometheus.series(f'{{__name__=~"{name}(_bucket|_sum|_count)?"}}', watched.run)
        assert there == [], f"{name} is there: it needs no backfill"
