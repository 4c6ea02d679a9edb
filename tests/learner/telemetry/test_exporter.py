"""The learner's Prometheus endpoint: the whole registry and nothing else, over HTTP, in the middle of a run."""

from __future__ import annotations

import http.client
import math
import shutil
import socket
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from learner.loop import Learner
from learner.telemetry.engines import EngineMetricsPage
from learner.telemetry.exporter import MAX_CLIENTS, RunMetrics, serving
from learner.telemetry.registry import BY_NAME, METRICS, Metric
from learner.telemetry.sample import ActorSample, Advice, Sample
from protocol.errors import RecipeError
from protocol.rundir import RunDir, read_json, read_jsonl
from tests.actor_harness import until
from tests.learner.test_loop import learn, recipe_of
from tests.tiny_model import make_tiny_model

Page = dict[str, dict[tuple[tuple[str, str], ...], float]]
"""Name of a time series -> its labels, sorted -> value."""

ACTOR = ActorSample(
    "generating", "serving", version=3, held=2, running=5, room=8, tokens=100, serving_s=10.0, busy_s=8.0,
    running_s=40.0, paused_s=1.0, pause_s=0.5, fetch_s=0.25, swaps=2, grader_errors=1, rss_bytes=1 << 20,
    incarnation="p1",
)  # fmt: skip


RUN = RunDir(Path("runs/full"))
TICKETS = {"issued": 9, "trained": 4, "queued": 2, "leased": 3, "duplicates": 6, "reissued": 7}
SAMPLE = Sample(
    t=1000.0, process=1, step=2, version=3, phase="training", phases={"training": 5.0, "waiting": 2.0},
    waits={"groups": 1.5}, groups=5, tokens=90, trained_tokens=70, tickets=TICKETS, backlog=4, versions=3,
    reissued=5, duplicates=3, weights_bytes=500, dense_bytes=200, wanted=2, started=2, restarted=1,
    actors={"actor-0": ACTOR, "actor-1": ActorSample("gone")}, dropped={"malformed": 8}, memory={"resident": 10},
    advice=Advice("rollout", "rollout-bound", 0.6, 0.9, 3, 1.5),
)  # fmt: skip
LENGTHS = {"step_s": 3.0, "wait_s": 0.05, "train_s": 2.5, "publish_s": 5000.0}
FIGURES = LENGTHS | {metric.figure: 0.5 for metric in METRICS if metric.figure and metric.figure not in LENGTHS}


def parse(text: str) -> Page:
    page: Page = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            page.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return page


def text_of(metrics: RunMetrics) -> str:
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry).decode()


def page_of(metrics: RunMetrics) -> Page:
    return parse(text_of(metrics))


def full() -> RunMetrics:
    metrics = RunMetrics(recipe_of(), RUN)
    metrics.see(SAMPLE)
    metrics.see(
        Sample(**{name: getattr(SAMPLE, name) for name in SAMPLE.__struct_fields__} | {"actors": later(SAMPLE)})
    )
    metrics.step(FIGURES)
    return metrics


def later(sample: Sample) -> dict[str, ActorSample]:
    """The actors a second later."""
    now = {name: getattr(ACTOR, name) for name in ACTOR.__struct_fields__}
    return sample.actors | {"actor-0": ActorSample(**now | {"serving_s": 11.0, "running_s": 44.0})}


def scrape(place: str, path: str = "/metrics") -> str:
    """A page as Prometheus 2.42 asks for it, in the plain format."""
    accepted = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    with urlopen(Request(f"http://{place}{path}", headers={"Accept": accepted}), timeout=10) as answer:
        assert answer.status == 200
        return answer.read().decode()


def series(metric: Metric) -> set[str]:
    """Names of its time series."""
    parts = ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",)
    return {metric.name + part for part in parts}


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_metric_of_the_registry_is_exported_and_no_other() -> None:
    page = page_of(full())
    assert set(page) == {name for metric in METRICS for name in series(metric)}
    for metric in METRICS:
        for name in series(metric):
            for labels in page[name]:
                bucket = {"le"} if name.endswith("_bucket") else set()
                assert {key for key, _ in labels} == set(metric.labels) | bucket, name


def test_page_is_what_promtool_accepts() -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    checked = subprocess.run([promtool, "check", "metrics"], input=text_of(full()), text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr


def test_names_follow_prometheus_conventions() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("tandem_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".") and bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        if metric.unit in ("seconds", "bytes", "ratio", "nats"):
            assert metric.unit in metric.name, metric.name


def test_values_come_from_sample_and_step() -> None:
    page = page_of(full())
    actor = (("actor", "actor-0"),)
    assert page["tandem_rollout_tokens_total"] == {actor: 100}
    assert page["tandem_actor_up"] == {actor: 1, (("actor", "actor-1"),): 0}
    assert page["tandem_actor_occupancy_ratio"] == {actor: pytest.approx(4.0 / 8)}
    seconds = page["tandem_actor_seconds_total"]
    assert {dict(labels)["state"]: value for labels, value in seconds.items()} == {
        "generating": 7.0, "updating": 1.0, "waiting": 3.0,
    }  # fmt: skip
    assert page["tandem_tickets_reissued_total"] == {(): 5}, "those of this process: counters begin at zero with it"
    assert page["tandem_groups_duplicate_total"] == {(): 3}
    assert {dict(labels)["state"] for labels in page["tandem_tickets"]} == set(TICKETS) - {"duplicates", "reissued"}
    assert page["tandem_bottleneck"][(("side", "rollout"),)] == 1 and sum(page["tandem_bottleneck"].values()) == 1
    assert page["tandem_reward_mean"] == {(): 0.5}


def test_advice_that_is_still_measured_is_no_figure() -> None:
    metrics = RunMetrics(recipe_of(), RUN)
    metrics.see(msgspec.structs.replace(SAMPLE, advice=Advice("unknown", "measuring")))
    advised = ("tandem_bottleneck", "tandem_advised", "tandem_learner_waiting_ratio", "tandem_actors_busy_ratio")
    assert [name for name in page_of(metrics) if name.startswith(advised)] == []


def test_lengths_of_steps_are_counted_into_buckets() -> None:
    page = page_of(full())

    def at_most(phase: str) -> dict[str, float]:
        rows = page["tandem_learner_step_seconds_bucket"].items()
        return {dict(labels)["le"]: value for labels, value in rows if dict(labels)["phase"] == phase}

    assert (at_most("total")["2.5"], at_most("total")["5.0"]) == (0, 1)
    assert (at_most("train")["1.0"], at_most("train")["2.5"]) == (0, 1), "an upper bound belongs to its bucket"
    assert at_most("wait")["0.1"] == 1
    assert (at_most("publish")["1000.0"], at_most("publish")["+Inf"]) == (0, 1)
    assert page["tandem_learner_step_seconds_sum"][(("phase", "total"),)] == 3.0


def test_what_has_no_value_is_left_out() -> None:
    metrics = RunMetrics(recipe_of(method="sft"), RUN)
    assert set(page_of(metrics)) == {"tandem_run_info", "tandem_run_start_time_seconds"}
    metrics.see(Sample(t=1.0, process=1))
    metrics.step({"step_s": 1.0, "loss": math.nan, "nll": 2.0})
    page = page_of(metrics)
    assert page["tandem_nll_nats"] == {(): 2.0} and "tandem_loss" not in page
    assert not [name for name in page if "actor" in name or "ticket" in name], "a run without actors has no hub"


def test_a_figure_that_not_every_step_has_stays() -> None:
    metrics = RunMetrics(recipe_of(), RUN)
    metrics.step({"eval_reward": 0.25, "delta_bytes": 7.0})
    metrics.step({"reference_kl_k3": 0.125})
    page = page_of(metrics)
    assert page["tandem_eval_reward"] == {(): 0.25} and "tandem_weight_delta_bytes" not in page
    assert page["tandem_kl_reference_nats"] == {(): 0.125}
    metrics.amend({"eval_reward": 0.75})
    assert page_of(metrics)["tandem_eval_reward"] == {(): 0.75}


# --- counters ---------------------------------------------------------------------------------------------------------


def seen(metrics: RunMetrics, **changes: Any) -> Page:
    """The page after a sample with these changes to its actor."""
    fields = {name: getattr(ACTOR, name) for name in ACTOR.__struct_fields__} | changes
    metrics.see(Sample(t=1.0, process=1, tickets=TICKETS, actors={"actor-0": ActorSample(**fields)}))
    return page_of(metrics)


def generated(page: Page) -> float:
    return page["tandem_actor_seconds_total"][(("actor", "actor-0"), ("state", "generating"))]


def waited(page: Page) -> float:
    return page["tandem_actor_seconds_total"][(("actor", "actor-0"), ("state", "waiting"))]


def test_a_counter_out_of_differences_does_not_go_back() -> None:
    metrics = RunMetrics(recipe_of(), RUN)
    assert generated(seen(metrics, serving_s=10.0, busy_s=8.0, paused_s=1.0)) == 7.0
    assert generated(seen(metrics, serving_s=10.5, busy_s=8.5, paused_s=3.0)) == 7.0, "a pause is told at its end"
    assert generated(seen(metrics, serving_s=13.0, busy_s=11.0, paused_s=3.0)) == 8.0


def test_counters_of_a_restarted_actor_begin_anew() -> None:
    metrics = RunMetrics(recipe_of(), RUN)
    seen(metrics, tokens=100, busy_s=8.0)
    page = seen(metrics, tokens=3, busy_s=0.1, serving_s=0.2, paused_s=0.0, incarnation="p2")
    assert page["tandem_rollout_tokens_total"] == {(("actor", "actor-0"),): 3}
    assert waited(page) == pytest.approx(0.1)
    page = seen(metrics, tokens=200, busy_s=9.0, serving_s=50.0, paused_s=0.0, incarnation="p3")
    assert (generated(page), waited(page)) == (9.0, 41.0)


@pytest.mark.parametrize("silent", [{"state": "gone"}, {"state": "starting", "phase": "connecting"}])
def test_an_actor_without_a_heartbeat_shows_no_counts_and_goes_on_with_them(silent: dict[str, str]) -> None:
    metrics = RunMetrics(recipe_of(), RUN)
    seen(metrics)
    metrics.see(Sample(t=1.0, process=1, tickets=TICKETS, actors={"actor-0": ActorSample(**silent)}))  # type: ignore[arg-type]
    page = page_of(metrics)
    assert "tandem_rollout_tokens_total" not in page and "tandem_actor_seconds_total" not in page
    assert page["tandem_actor_up"] == {(("actor", "actor-0"),): float(silent["state"] != "gone")}
    assert waited(seen(metrics, serving_s=70.0, busy_s=9.0)) == 61.0, "the same process, a minute later"


def test_occupancy_is_of_one_process() -> None:
    metrics = RunMetrics(recipe_of(), RUN)
    seen(metrics, serving_s=10.0, running_s=40.0)
    assert "tandem_actor_occupancy_ratio" not in seen(metrics, serving_s=20.0, running_s=50.0, incarnation="p2")
    page = seen(metrics, serving_s=30.0, running_s=90.0, incarnation="p2")
    assert page["tandem_actor_occupancy_ratio"] == {(("actor", "actor-0"),): 0.5}


# --- HTTP -------------------------------------------------------------------------------------------------------------


def test_prometheus_finds_the_endpoint_while_it_is_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "hand-2").create()
    with serving(full(), EngineMetricsPage(), recipe_of(name="hand"), run) as place:
        assert place.startswith("127.0.0.1:")
        assert read_json(run.scrape_targets) == [{"targets": [place], "labels": {"run": "hand-2"}}]
        assert scrape(place) == scrape(place, "/")
        assert "python_info" not in scrape(place) and "process_" not in scrape(place), "nothing of the process's own"
    assert not run.scrape_targets.exists()
    with pytest.raises(OSError):
        scrape(place)


def test_runs_of_one_recipe_are_told_apart_by_their_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [RunDir(tmp_path / name).create() for name in ("demo", "demo-2")]
    monkeypatch.chdir(runs[0].path)
    runs[0] = RunDir(Path())
    for run, name in zip(runs, ("demo", "demo-2"), strict=True):
        with serving(
            RunMetrics(recipe_of(name="demo"), run), EngineMetricsPage(), recipe_of(name="demo"), run
        ) as place:
            (target,) = read_json(run.scrape_targets)
            assert target["labels"] == {"run": name}
            (info,) = parse(scrape(place))["tandem_run_info"]
            assert dict(info)["run"] == name, "the page and its target say the same"


def test_endpoint_listens_on_ipv6(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with serving(full(), EngineMetricsPage(), recipe_of(metrics={"host": "::1"}), RunDir(tmp_path)) as place:
        assert place.startswith("[::1]:") and "tandem_run_info" in scrape(place)


def test_nothing_but_reading_is_allowed(tmp_path: Path) -> None:
    with serving(full(), EngineMetricsPage(), recipe_of(), RunDir(tmp_path)) as place:
        for method in ("POST", "PUT", "DELETE"):
            connection = http.client.HTTPConnection(place, timeout=10)
            connection.request(method, "/metrics", body=b"x")
            assert connection.getresponse().status == 405
            connection.close()


def test_another_page_is_not_found(tmp_path: Path) -> None:
    with serving(full(), EngineMetricsPage(), recipe_of(), RunDir(tmp_path)) as place:
        assert scrape(place, "/engines") == ""
        with pytest.raises(HTTPError, match="404") as caught:
            scrape(place, "/keys/actor.json")
        assert b"allowed: /metrics, /engines, /" in caught.value.read()


def test_idle_clients_are_few(tmp_path: Path) -> None:
    """Who only connects takes one of the threads, and there are never more of them."""
    with serving(full(), EngineMetricsPage(), recipe_of(), RunDir(tmp_path)) as place:
        host, port = place.split(":")
        idle = [socket.create_connection((host, int(port)), 10) for _ in range(MAX_CLIENTS + 1)]
        assert idle[-1].recv(1) == b"", "closed at once"
        for client in idle:
            client.close()
        until(lambda: answers(place), "a free thread")


def answers(place: str) -> bool:
    try:
        return "tandem_run_info" in scrape(place)
    except OSError:
        return False


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(RecipeError, match=rf"metrics.port: found {port}, .*in use.*allowed: a free port, 0 for any"),
            serving(full(), EngineMetricsPage(), recipe_of(metrics={"port": port}), RunDir(tmp_path)),
        ):
            pass
    assert not RunDir(tmp_path).scrape_targets.exists()


def test_a_foreign_address_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(RecipeError, match=r"metrics.host: found '192.0.2.1', .*allowed: one of this machine's own"),
        serving(full(), EngineMetricsPage(), recipe_of(metrics={"host": "192.0.2.1"}), RunDir(tmp_path)),
    ):
        pass


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("exporter") / "tiny")


def scraped_run(directory: Path, model: Path, **changes: Any) -> tuple[RunDir, list[Page]]:
    """A run whose page is read after every step, when the sampler has seen the step."""
    pages: list[Page] = []

    def watch(learner: Learner) -> None:
        report = learner._report

        def reporting(figures: dict[str, float], recent: Any) -> None:
            report(figures, recent)
            place = read_json(learner.run.scrape_targets)[0]["targets"][0]

            def shown() -> Page | None:
                page = parse(scrape(place))
                drawn = sum(page.get("tandem_rollout_tokens_total", {}).values())
                whole = page.get("tandem_accepted_tokens_total") == {(): drawn}  # else the heartbeat is still to come
                trained = {(): learner.telemetry.sampler.trained_tokens}  # counted a moment after the step
                whole = whole and page["tandem_learner_tokens_total"] == trained
                tickets = learner.state.step * learner.recipe.rollout.groups_per_step  # copied before the step's number
                whole = whole and page["tandem_tickets"][(("state", "trained"),)] == tickets
                return page if whole and page["tandem_learner_step"] == {(): learner.state.step} else None

            pages.append(until(shown, "a sample of the step"))

        learner._report = reporting  # type: ignore[method-assign]

    recipe = recipe_of(name="scraped", metrics={"sample_every_s": 0.2}, **changes)
    finished, run = learn(recipe, directory, model, watch=watch)
    assert finished
    return run, pages


def test_a_run_exports_what_its_files_say(tmp_path: Path, model: Path) -> None:
    run, pages = scraped_run(tmp_path, model)
    rows, summary = read_jsonl(run.metrics), read_json(run.summary)
    assert len(pages) == len(rows) == 4
    for page, row in zip(pages, rows, strict=True):
        for metric in METRICS:
            if metric.figure in row:
                assert page[metric.name] == {(): pytest.approx(row[metric.figure])}, metric.name
    last = pages[-1]
    assert last["tandem_run_info"] == {(("method", "grpo"), ("model", "bundled"), ("run", tmp_path.name)): 1}
    assert last["tandem_learner_tokens_total"] == {(): summary["learner_tokens"]}
    assert last["tandem_tickets"][(("state", "trained"),)] == summary["tickets"]["trained"] == 16
    assert last["tandem_actors_started_total"] == {(): summary["actors"]["started"]}
    assert last["tandem_learner_step_seconds_count"] == {
        (("phase", name),): 4 for name in ("total", "wait", "train", "publish")
    }
    assert last["tandem_learner_step_seconds_sum"][(("phase", "train"),)] == pytest.approx(
        sum(row["train_s"] for row in rows)
    )
    assert not run.scrape_targets.exists()
    for earlier, now in pairwise(pages):
        for metric in (metric for metric in METRICS if metric.kind != "gauge"):
            for name in series(metric):
                for labels, value in earlier.get(name, {}).items():
                    assert now[name][labels] >= value, f"{name}{labels}"
    grown = ("tandem_learner_tokens_total", "tandem_weight_sync_bytes_total", "tandem_groups_accepted_total")
    assert all(last[name][()] > pages[0][name][()] for name in grown)


def test_a_run_does_not_begin_without_its_port_but_goes_on_without(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sft = {"method": "sft", "task": {"max_operand": 1}, "eval": {"prompts": 0}, "sft": {"batch_size": 4}}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        recipe = recipe_of(**sft, metrics={"port": taken.getsockname()[1]})
        with pytest.raises(RecipeError, match=r"metrics\.port"):
            learn(recipe, tmp_path, model)
        assert learn(recipe_of(**sft), tmp_path, model)[0]
        assert learn(recipe, tmp_path, model)[0], "started again, and somebody took the port meanwhile"
    assert "the run goes on without Prometheus" in caplog.text


def test_no_socket_is_opened_where_none_is_wanted(tmp_path: Path, model: Path) -> None:
    found: list[bool] = []

    def watch(learner: Learner) -> None:
        learner._report = lambda *_: found.append(learner.run.scrape_targets.exists())  # type: ignore[method-assign]

    sft = recipe_of(method="sft", task={"max_operand": 1}, eval={"prompts": 0}, metrics={"serve": False})
    assert learn(sft, tmp_path, model, watch=watch)[0]
    assert found and not any(found)
