"""deploy/prometheus: the configuration by promtool, the rules against the registry, every alert firing and silent."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.panels import ROWS
from deploy.ports import PORTS
from deploy.prometheus.expressions import ENGINE_METRICS, Selector, faults, known_series, names
from learner.telemetry.engines import EngineMetricsPage
from learner.telemetry.exporter import RunMetrics, serving
from protocol.rundir import RunDir, read_json
from tests.learner.test_loop import recipe_of
from tests.prometheus_harness import PROMETHEUS_FILES, program


def load(name: str) -> Any:
    return yaml.safe_load((PROMETHEUS_FILES / name).read_text("utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in load("rules.yml")["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def recorded_labels() -> dict[str, frozenset[str]]:
    """Labels of the recorded series: of these rules none groups them away."""
    series = known_series()
    return {
        name: frozenset().union(*(series[selector.metric] for selector in names(expression).selectors))
        for name, expression in RECORDED.items()
    }


def metrics_of(alert: str) -> set[str]:
    """What it asks for, recorded series as what they were made of."""
    found = {selector.metric for selector in names(ALERTS[alert]["expr"]).selectors}
    made_of = {selector.metric for name in found & set(RECORDED) for selector in names(RECORDED[name]).selectors}
    return found - set(RECORDED) | made_of


def promtool(*arguments: str, directory: Path = PROMETHEUS_FILES) -> str:
    """Output of a promtool that is content; AssertionError with its words if it is not."""
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what an expression names ---------------------------------------------------------------------------------------


def test_names_are_found_among_functions_words_and_label_lists() -> None:
    found = names('sum by (le, phase) (rate(a_bucket{run="$run", x=~"b{c}"}[$__rate_interval])) / on (run) b offset 5m')
    assert found.selectors == (
        Selector("a_bucket", ("run", "x"), 'a_bucket{run="$run",x=~"b{c}"}'), Selector("b", (), "b")
    )  # fmt: skip
    assert found.grouping == ("le", "phase", "run")
    assert [selector.metric for selector in names("sum(x) by (y) or max without (z) (w) unless bool").selectors] == [
        "x", "w"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("rate(tandem_rollout_token_total[5m])", "tandem_rollout_token_total, which is no metric of the registry"),
        ('tandem_actor_up{actors="a"}', "'actors', which tandem_actor_up does not have"),
        ("sum by (phases) (tandem_learner_phase)", "'phases' to group by, which none of its metrics has"),
        ("tandem_learner_step_seconds", "tandem_learner_step_seconds, which is no metric"),
        ('tandem_learner_step{le="1"}', "'le', which tandem_learner_step does not have"),
        ("vector(0)", "names no metric"),
    ],
)
def test_a_name_that_is_not_there_is_found(expression: str, complaint: str) -> None:
    (fault,) = faults(expression, known_series())
    assert complaint in fault


def test_a_bracket_that_does_not_close_is_an_error() -> None:
    with pytest.raises(ValueError, match="found no '}' that closes"):
        names('tandem_learner_step{run="a"')


def test_vllm_has_the_metrics_that_are_shown() -> None:
    """On its source, since importing vLLM takes long. prometheus_client ends counters and buckets with a suffix."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text("utf-8")
    declared = set(re.findall(r'name="(vllm:\w+)"', source))
    assert {re.sub(r"_(total|bucket)$", "", name) for name in ENGINE_METRICS} <= declared
    assert 'labelnames = ["model_name", "engine"]' in source
    assert '"finished_reason"' in source


# --- rules ----------------------------------------------------------------------------------------------------------


def test_rules_name_metrics_and_labels_of_the_registry() -> None:
    series = known_series(recorded_labels())
    assert [fault for rule in rules() for fault in faults(str(rule["expr"]), series)] == []
    for name, rule in ALERTS.items():
        labels = {label for selector in names(rule["expr"]).selectors for label in series[selector.metric]}
        shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert shown <= labels, name
        assert "run" in shown, f"{name}: its summary says which run"


def test_every_recorded_series_is_used_by_an_alert() -> None:
    used = {selector.metric for rule in ALERTS.values() for selector in names(rule["expr"]).selectors}
    assert set(RECORDED) <= used


def test_alerts_say_what_to_do() -> None:
    assert len(ALERTS) >= 20
    for name, rule in ALERTS.items():
        assert re.fullmatch(r"Tandem[A-Z]\w+", name)
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert len(rule["annotations"]["description"]) > 80, name
        if rule["labels"]["severity"] == "critical":
            assert "for" in rule, f"{name} must last before somebody is woken"


def test_promtool_takes_configuration_and_rules(tmp_path: Path) -> None:
    promtool("check", "config", "--syntax-only", "prometheus.yml")
    assert f"{len(ALERTS) + len(RECORDED)} rules found" in promtool("check", "rules", "rules.yml")


def test_every_alert_fires_and_is_silent_when_it_should() -> None:
    tests = load("rules_test.yml")["tests"]
    for name in ALERTS:
        fires = [test for test in tests if test["name"].startswith(f"{name} fires: ")]
        silent = [test for test in tests if test["name"].startswith(f"{name} is silent: ")]
        assert fires and silent, name
        assert all(f'alertname="{name}"' in _firing(test) for test in fires), name
        assert not any(f'alertname="{name}"' in _firing(test) for test in silent), name
        asked = metrics_of(name)
        given = {selector.metric for test in silent for one in test["input_series"]
                 for selector in names(one["series"]).selectors}  # fmt: skip
        assert given & asked, f"{name} has to be silent where there is something to see"
    assert len(tests) == len([test for test in tests if test["name"].split()[0] in ALERTS])
    promtool("test", "rules", "rules_test.yml")


def _firing(test: dict[str, Any]) -> str:
    (asked,) = test["promql_expr_test"]
    assert asked["expr"] == 'ALERTS{alertstate="firing"}', "so that all other alerts are silent as well"
    return json.dumps(asked["exp_samples"]).replace('\\"', '"')


@pytest.mark.parametrize(("before", "after", "name"), [
    ("tandem_zero_variance_ratio > 0.8", "tandem_zero_variance_ratio > 0.95", "TandemZeroVarianceHigh"),
    ("changes10m == 0", "changes10m >= 0", "TandemLearnerStalled"),
])  # fmt: skip
def test_a_rule_that_changed_its_mind_fails_the_rule_tests(before: str, after: str, name: str, tmp_path: Path) -> None:
    text = (PROMETHEUS_FILES / "rules.yml").read_text("utf-8")
    assert before in text
    (tmp_path / "rules.yml").write_text(text.replace(before, after))
    tests = load("rules_test.yml")
    tests["tests"] = [test for test in tests["tests"] if test["name"].startswith(name)]
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests))
    with pytest.raises(AssertionError, match=name):
        promtool("test", "rules", "rules_test.yml", directory=tmp_path)


def test_a_run_after_another_of_its_recipe_is_not_compared_with_it(tmp_path: Path) -> None:
    """The second one begins where the first one began, within the hour: no reward has collapsed."""
    recipe = recipe_of(name="demo")
    series: dict[str, str] = {}
    for name, reward in (("demo", "0.8x60"), ("demo-2", "0.1x90")):
        run = RunDir(tmp_path / name).create()
        with serving(RunMetrics(recipe, run), EngineMetricsPage(), recipe, run):
            ((_, label),) = read_json(run.scrape_targets)[0]["labels"].items()
        before = f"{series[label]} _x5 " if label in series else "_x65 " if series else ""
        series[label] = f"{before}{reward}"
    given = [{"series": f'{metric}{{run="{label}"}}', "values": values} for label, values in series.items()
             for metric in ("tandem_reward_mean", "tandem_reward_std")]  # fmt: skip
    asked = {"expr": 'ALERTS{alertname="TandemRewardCollapsed",alertstate="firing"}', "eval_time": "1h50m"}
    test = {"interval": "1m", "input_series": given, "promql_expr_test": [asked | {"exp_samples": []}]}
    shutil.copy(PROMETHEUS_FILES / "rules.yml", tmp_path)
    (tmp_path / "rules_test.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [test]})
    )
    promtool("test", "rules", "rules_test.yml", directory=tmp_path)


# --- the scrape configuration ---------------------------------------------------------------------------------------


def jobs() -> dict[str, dict[str, Any]]:
    return {job["job_name"]: job for job in load("prometheus.yml")["scrape_configs"]}


def test_configuration_finds_every_run_where_the_learner_writes_its_targets() -> None:
    root = PROMETHEUS_FILES.parents[1]
    for name in ("tandem", "tandem-engines"):
        ((pattern,),) = [entry["files"] for entry in jobs()[name]["file_sd_configs"]]
        for run in ("demo", "my-run.2"):
            written = RunDir(root / "runs" / run).scrape_targets
            assert re.fullmatch(re.escape((PROMETHEUS_FILES / pattern).name).replace(r"\*", ".*"), written.name)
            assert (PROMETHEUS_FILES / pattern).parent.resolve() == written.parent
        assert jobs()[name]["honor_labels"] is True, "`run` and `actor` of the pages are kept"


def test_prometheus_takes_no_pattern_for_directories(tmp_path: Path) -> None:
    """Why the targets stand beside the run's directory and not in it."""
    config = (PROMETHEUS_FILES / "prometheus.yml").read_text().replace("metrics-targets-*.json", "*/targets.json")
    (tmp_path / "prometheus.yml").write_text(config)
    with pytest.raises(AssertionError, match="not valid for file discovery"):
        promtool("check", "config", "--syntax-only", "prometheus.yml", directory=tmp_path)


def test_alerts_and_rays_file_are_those_of_the_jobs() -> None:
    asked = set(re.findall(r'job="([^"]+)"', (PROMETHEUS_FILES / "rules.yml").read_text()))
    assert asked == {"tandem"} <= set(jobs())
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    ((path,),) = [entry["files"] for entry in jobs()["ray"]["file_sd_configs"]]
    assert path == f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"


def test_commented_lines_for_a_cluster_are_valid(tmp_path: Path) -> None:
    text = (PROMETHEUS_FILES / "prometheus.yml").read_text("utf-8")
    opened = re.sub(r"^    # (static_configs|  - targets|    labels)", r"    \1", text, flags=re.MULTILINE)
    (port,) = [port.numbers for port in PORTS if port.name == "tandem-metrics"]
    assert text.count(f"LEARNER:{port}") == 1
    opened = opened.replace("LEARNER:7703", "10.0.0.1:7703").replace("NAME}", "my-run}")
    (tmp_path / "prometheus.yml").write_text(opened)
    shutil.copy(PROMETHEUS_FILES / "rules.yml", tmp_path)
    promtool("check", "config", "--syntax-only", "prometheus.yml", directory=tmp_path)
    for job in yaml.safe_load(opened)["scrape_configs"][:2]:
        assert job["static_configs"] == [{"targets": ["10.0.0.1:7703"], "labels": {"run": "my-run"}}]


def test_dashboard_shows_every_alerted_metric() -> None:
    shown = {selector.metric for row in ROWS for panel in row.panels for query in panel.queries.values()
             for selector in names(query.replace("@", "")).selectors}  # fmt: skip
    assert {metric for alert in ALERTS for metric in metrics_of(alert)} - shown == {"up"}
