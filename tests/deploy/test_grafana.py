"""deploy/grafana: the dashboard is what the generator makes, shows the whole registry, and lies well in the grid."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import yaml

from deploy.grafana.build import FILE, check, dashboard, expression, text
from deploy.grafana.panels import ROWS, WIDTHS, Panel, Row
from deploy.prometheus.expressions import family, names
from learner.telemetry.registry import BY_NAME, METRICS

GRAFANA_FILES = FILE.parents[1]
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
KINDS = {"timeseries", "stat", "state-timeline", "bargauge", "heatmap", "table"}
UNITS = {"none", "short", "s", "bytes", "Bps", "percentunit", "sci", "dateTimeFromNow"}
UNITS_OF = {"seconds": {"s", "percentunit", "suffix: actors", "dateTimeFromNow"}, "bytes": {"bytes", "Bps"},
            "ratio": {"percentunit", "none"}, "nats": {"suffix: nats", "none"},
            "tokens": {"suffix: tokens/s", "suffix: tokens"}}  # fmt: skip
"""Unit of a metric -> units of panels that show it, or its rate."""


def panels(of: dict[str, Any] = DASHBOARD) -> Iterator[dict[str, Any]]:
    """All but the rows' heads, those of collapsed rows as well."""
    for panel in of["panels"]:
        yield from panel["panels"] if panel["type"] == "row" else [panel]


def series_of(panel: dict[str, Any]) -> set[str]:
    return {selector.metric for target in panel["targets"] for selector in names(target["expr"]).selectors}


def test_file_is_what_the_generator_makes() -> None:
    assert FILE.read_text("utf-8") == text(), "run python -m deploy.grafana.build"


def test_every_metric_of_the_registry_is_shown() -> None:
    shown = {family(name) for panel in panels() for name in series_of(panel)}
    assert {metric.name for metric in METRICS} - shown == set()


def test_rows_are_those_that_people_look_for() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["title"].split(" ")[0] for row in rows] == [
        "Overview", "Actors", "Learner", "Learner:", "Weights", "Engines"
    ]  # fmt: skip
    assert [row["collapsed"] for row in rows] == [False] * 5 + [True]
    assert all(name.startswith("vllm:") for panel in rows[-1]["panels"] for name in series_of(panel))
    assert all(row["collapsed"] == bool(row["panels"]) for row in rows), "an open row's panels follow it"


def test_ids_are_unique_and_the_dashboard_has_none() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    ids = [panel["id"] for panel in [*rows, *panels()]]
    assert len(set(ids)) == len(ids)
    assert DASHBOARD["id"] is None, "Grafana gives it one; the uid is what stays"
    assert (DASHBOARD["uid"], DASHBOARD["title"], DASHBOARD["schemaVersion"]) == ("tandem", "Tandem", 42)


def overlaps(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"]
    )  # fmt: skip


def test_panels_lie_inside_the_grid_and_beside_each_other() -> None:
    for panel in panels():
        place = panel["gridPos"]
        assert set(place) == {"x", "y", "w", "h"}
        assert place["x"] >= 0 and place["w"] > 0 and place["h"] > 0 and place["x"] + place["w"] <= WIDTHS
    for group in (DASHBOARD["panels"], *(row["panels"] for row in DASHBOARD["panels"] if row["type"] == "row")):
        for one, other in combinations(group, 2):
            assert not overlaps(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    assert overlaps({"x": 0, "y": 0, "w": 8, "h": 7}, {"x": 7, "y": 6, "w": 8, "h": 7})


def test_lines_are_full_from_left_to_right() -> None:
    made = dashboard((Row("One", tuple(Panel(str(i), {"x": "tandem_loss{@run}"}, width=10) for i in range(3))),))
    assert [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels(made)] == [(0, 1), (10, 1), (0, 8)]


def test_panels_have_units_legends_and_the_registrys_help() -> None:
    for panel in panels():
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["type"] in KINDS
        assert defaults["unit"] in UNITS or defaults["unit"].startswith("suffix: "), panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for name in {family(name) for name in series_of(panel)} & set(BY_NAME):
            assert f"`{name}`: {BY_NAME[name].help}" in panel["description"], panel["title"]
            if panel["type"] not in ("state-timeline", "table"):
                assert defaults["unit"] in UNITS_OF.get(BY_NAME[name].unit, {defaults["unit"]}), (panel["title"], name)
        if panel["type"] in ("timeseries", "bargauge", "heatmap"):
            assert all(target["legendFormat"] != "__auto" for target in panel["targets"]), panel["title"]


def test_panels_ask_for_the_chosen_run_and_its_actors_from_the_chosen_source() -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["datasource"] == source
        for target in panel["targets"]:
            assert target["datasource"] == source
            for selector in names(target["expr"]).selectors:
                assert 'run="$run"' in selector.text, panel["title"]
                if ("actor" in selector.labels) or selector.metric.startswith("vllm:"):
                    assert 'actor=~"$actor"' in selector.text, panel["title"]


def test_variables_are_source_run_and_actors() -> None:
    source, run, actor = DASHBOARD["templating"]["list"]
    assert (source["type"], source["query"], source["name"]) == ("datasource", "prometheus", "datasource")
    assert run["query"]["query"] == "label_values(tandem_run_info, run)"
    assert (run["multi"], run["includeAll"]) == (False, False)
    assert actor["query"]["query"] == 'label_values(tandem_actor_up{run="$run"}, actor)'
    assert (actor["multi"], actor["includeAll"], actor["allValue"]) == (True, True, ".*")
    for variable in (run, actor):
        metric, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        assert label in BY_NAME[metric].labels
        assert label == variable["name"]


@pytest.mark.parametrize(
    ("query", "legend", "complaint"),
    [
        ("tandem_los{@run}", "x", "found tandem_los, which is no metric"),
        ('tandem_loss{@run,phase="x"}', "x", "found label 'phase', which tandem_loss does not have"),
        ("sum by (acter) (tandem_actor_up{@run})", "x", "found 'acter' to group by"),
        ("tandem_actor_up{@run}", "{{aktor}}", "found {{aktor}} in a legend"),
    ],
)
def test_a_typo_in_a_panel_is_refused_and_named(query: str, legend: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as refused:
        check(Panel("Broken", {legend: query}))
    assert "panel 'Broken'" in str(refused.value)
    with pytest.raises(ValueError, match="Broken"):
        dashboard((replace(ROWS[0], panels=(Panel("Broken", {legend: query}),)),))


def test_short_names_become_grafanas_variables() -> None:
    assert expression("rate(x{@actor}[@rate]) + y{@run}") == (
        'rate(x{run="$run",actor=~"$actor"}[$__rate_interval]) + y{run="$run"}'
    )


# --- provisioning ---------------------------------------------------------------------------------------------------


def provisioned(kind: str) -> dict[str, Any]:
    return dict(yaml.safe_load((GRAFANA_FILES / "provisioning" / kind / "tandem.yaml").read_text("utf-8")))


def test_data_source_knows_how_often_prometheus_scrapes() -> None:
    """Grafana makes $__rate_interval of it; with a longer interval than it is told, rates would have gaps."""
    (source,) = provisioned("datasources")["datasources"]
    scrapes = yaml.safe_load((GRAFANA_FILES.parent / "prometheus" / "prometheus.yml").read_text("utf-8"))
    assert source["jsonData"]["timeInterval"] == scrapes["global"]["scrape_interval"]
    assert (source["type"], source["url"]) == ("prometheus", "${TANDEM_PROMETHEUS}")


def test_provider_loads_the_directory_of_the_dashboard() -> None:
    (provider,) = provisioned("dashboards")["providers"]
    assert provider["options"] == {"path": "${TANDEM_DASHBOARDS}"}
    page = (GRAFANA_FILES.parents[1] / "docs" / "operations.md").read_text("utf-8")
    (directory,) = re.findall(r"TANDEM_DASHBOARDS=\$PWD/(\S+)", page)
    assert os.listdir(GRAFANA_FILES.parents[1] / directory) == [FILE.name]
