"""Makes Grafana's JSON of the dashboard "Tandem" out of `panels.py` and the registry's help.

    python -m deploy.grafana.build          writes dashboards/tandem.json

Refuses a panel that names what the registry does not have. Pure but for the last function; a test compares the file
with what is made here. Panels carry no `pluginVersion`, so Grafana takes its own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deploy.grafana.panels import ROWS, WIDTHS, Panel, Row
from deploy.prometheus.expressions import family, faults, known_series, names
from learner.telemetry.registry import BY_NAME

FILE = Path(__file__).parent / "dashboards" / "tandem.json"
UID = "tandem"
SCHEMA_VERSION = 42
"""Of Grafana 12 and 13; Grafana moves older ones up itself."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GREEN, RED = "green", "red"
ROW_HEIGHT = 1


def expression(query: str) -> str:
    """A query of `panels.py` as Grafana is given it: with Grafana's variables."""
    chosen = {"@run": 'run="$run"', "@actor": 'run="$run",actor=~"$actor"', "@rate": "$__rate_interval"}
    return re.sub(r"@(run|actor|rate)\b", lambda found: chosen[found[0]], query)


def description(panel: Panel) -> str:
    """The registry's help on every metric of a panel, in the order of its queries."""
    selectors = [found for query in panel.queries.values() for found in names(expression(query)).selectors]
    metrics = dict.fromkeys(family(selector.metric) for selector in selectors)
    lines = [f"`{name}`: {BY_NAME[name].help}" for name in metrics if name in BY_NAME]
    lines += [f"`{name}`: vLLM's own." for name in metrics if name.startswith("vllm:")]
    return "\n\n".join([*([panel.note] if panel.note else []), *lines])


def check(panel: Panel) -> None:
    """Raise ValueError if a query or a legend names a metric or label that is not there."""
    series = known_series()
    for legend, query in panel.queries.items():
        found = [f"panel {panel.title!r}: {fault}" for fault in faults(expression(query), series)]
        labels = {label for selector in names(expression(query)).selectors for label in series.get(selector.metric, ())}
        found += [f"panel {panel.title!r}: found {{{{{label}}}}} in a legend, which its metrics do not have"
                  for label in re.findall(r"\{\{(\w+)\}\}", legend) if label not in labels]  # fmt: skip
        if found:
            raise ValueError("; ".join(found))


# --- one panel --------------------------------------------------------------------------------------------------------


def _targets(panel: Panel) -> list[dict[str, Any]]:
    instant = panel.kind in ("stat", "bargauge", "table")
    form = {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series")
    return [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": expression(query),
            "legendFormat": legend or "__auto",
            "instant": instant,
            "range": not instant,
            "format": form,
        }
        for number, (legend, query) in enumerate(panel.queries.items())
    ]


def _options(panel: Panel) -> dict[str, Any]:
    reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    match panel.kind:
        case "stat":
            text = "name" if panel.names_only else "value" if len(panel.queries) == 1 else "value_and_name"
            return {"reduceOptions": reduce, "textMode": text, "colorMode": "value", "graphMode": "none",
                    "justifyMode": "auto", "orientation": "auto", "wideLayout": True}  # fmt: skip
        case "bargauge":
            return {"reduceOptions": reduce, "orientation": "horizontal", "displayMode": "basic",
                    "valueMode": "color", "showUnfilled": True}  # fmt: skip
        case "state-timeline":
            return {"showValue": "auto", "mergeValues": True, "rowHeight": 0.9, "alignValue": "left",
                    "legend": legend, "tooltip": {"mode": "single", "sort": "none"}}  # fmt: skip
        case "heatmap":
            return {"calculate": False, "yAxis": {"unit": panel.unit}, "cellGap": 1, "legend": {"show": True},
                    "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "exponent": 0.5, "fill": "dark-blue",
                              "reverse": False},
                    "tooltip": {"mode": "single"}}  # fmt: skip
        case "table":
            return {"showHeader": True, "cellHeight": "sm"}
        case "timeseries":
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def _defaults(panel: Panel) -> dict[str, Any]:
    """How values are shown."""
    found: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic"}, "mappings": []}
    if panel.absent:
        found["noValue"] = panel.absent
    if panel.unit == "percentunit":
        found["min"] = 0
    if panel.kind == "timeseries":
        found["custom"] = {
            "drawStyle": "line", "lineWidth": 1, "fillOpacity": 30 if panel.stacked else 0, "showPoints": "auto",
            "spanNulls": False, "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }  # fmt: skip
    if panel.states:
        states = {str(number): {"text": state, "index": number} for number, state in enumerate(panel.states, start=1)}
        found["mappings"] = [{"type": "value", "options": states}]
        found["custom"] = {"fillOpacity": 70, "lineWidth": 0}
    if any("ALERTS" in query for query in panel.queries.values()):
        found["color"] = {"mode": "thresholds"}
        steps = [{"color": GREEN, "value": None}, {"color": RED, "value": 1}]
        found["thresholds"] = {"mode": "absolute", "steps": steps}
    return found


def _transformations(panel: Panel) -> list[dict[str, Any]]:
    """A table shows labels; time, value and what Prometheus added say nothing there."""
    hidden = dict.fromkeys(("Time", "Value", "__name__", "instance", "job"), True)
    return [{"id": "organize", "options": {"excludeByName": hidden}}] if panel.kind == "table" else []


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """One panel at its place. Raises ValueError for what `check` refuses."""
    check(panel)
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": description(panel),
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": _targets(panel),
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        "transformations": _transformations(panel),
    }


# --- the whole --------------------------------------------------------------------------------------------------------


def _lines(panels: Sequence[Panel]) -> Iterator[list[Panel]]:
    """Panels that stand side by side."""
    line: list[Panel] = []
    for panel in panels:
        if sum(other.width for other in line) + panel.width > WIDTHS:
            yield line
            line = []
        line.append(panel)
    yield line


def _row(row: Row, first: int, top: int) -> tuple[list[dict[str, Any]], int]:
    """(the row's head and its panels, where the next one begins). A collapsed row holds its panels itself."""
    inside: list[dict[str, Any]] = []
    y = top + ROW_HEIGHT
    for line in _lines(row.panels):
        x = 0
        for panel in line:
            inside.append(panel_json(panel, first + 1 + len(inside), x, y))
            x += panel.width
        y += max(panel.height for panel in line)
    head = {"id": first, "type": "row", "title": row.title, "collapsed": row.collapsed,
            "gridPos": {"x": 0, "y": top, "w": WIDTHS, "h": ROW_HEIGHT},
            "panels": inside if row.collapsed else []}  # fmt: skip
    return ([head], top + ROW_HEIGHT) if row.collapsed else ([head, *inside], y)


def _label_variable(name: str, title: str, query: str, every: bool) -> dict[str, Any]:
    """A variable whose values are those of a label. `every`: several may be chosen, all of them at first."""
    found: dict[str, Any] = {
        "name": name, "label": title, "type": "query", "datasource": DATASOURCE,
        "query": {"query": query, "refId": f"variable-{name}", "qryType": 1}, "refresh": 2, "sort": 7, "hide": 0,
        "multi": every, "includeAll": every, "options": [], "regex": "", "skipUrlSync": False,
    }  # fmt: skip
    if every:
        found |= {"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}
    return found


def variables() -> list[dict[str, Any]]:
    """What people choose at the top."""
    source = {
        "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1,
        "hide": 0, "multi": False, "includeAll": False, "options": [], "regex": "", "skipUrlSync": False,
    }  # fmt: skip
    return [
        source,
        _label_variable("run", "Run", "label_values(tandem_run_info, run)", every=False),
        _label_variable("actor", "Actors", 'label_values(tandem_actor_up{run="$run"}, actor)', every=True),
    ]


def dashboard(rows: Sequence[Row] = ROWS) -> dict[str, Any]:
    """The whole dashboard. Raises ValueError for a query that names what is not there."""
    panels: list[dict[str, Any]] = []
    number, y = 1, 0
    for row in rows:
        made, y = _row(row, number, y)
        panels += made
        number += 1 + len(row.panels)
    return {
        "uid": UID, "id": None, "title": "Tandem", "tags": ["tandem", "reinforcement-learning"], "version": 1,
        "description": "Both sides of a run: rollout actors and learner. Made by deploy/grafana/build.py.",
        "schemaVersion": SCHEMA_VERSION, "editable": True, "graphTooltip": 1, "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"}, "timepicker": {}, "timezone": "browser", "weekStart": "",
        "fiscalYearStartMonth": 0, "liveNow": False, "links": [], "annotations": {"list": []},
        "templating": {"list": variables()}, "panels": panels,
    }  # fmt: skip


def text() -> str:
    """As it stands in the file."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
    sys.stdout.write(f"{FILE}\n")
