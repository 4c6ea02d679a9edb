"""The page of the engines' own metrics: what actors sent last, with their names, and nothing that does not parse."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from learner.loop import Learner
from learner.telemetry.engines import EngineMetricsPage, families_of
from protocol.engine_text import MAX_PACKED_BYTES, pack
from protocol.errors import MalformedFrame
from protocol.messages import EngineMetrics, Welcome
from protocol.rundir import read_json
from tests.actor_harness import Puppet, until
from tests.intake_harness import Intake
from tests.learner.telemetry.test_exporter import Page, parse, scrape
from tests.learner.test_loop import learn, recipe_of
from tests.tiny_model import make_tiny_model

RUNNING = '# TYPE vllm:running gauge\nvllm:running{{engine="0",actor="liar"}} {}\n'
HISTOGRAM = (
    "# HELP vllm:ttft_seconds Time to the first token.\n# TYPE vllm:ttft_seconds histogram\n"
    'vllm:ttft_seconds_bucket{le="1.0"} 2.0\nvllm:ttft_seconds_bucket{le="+Inf"} 3.0\n'
    "vllm:ttft_seconds_count 3.0\nvllm:ttft_seconds_sum 4.5\n"
)


def page_of(page: EngineMetricsPage) -> Page:
    registry = CollectorRegistry()
    registry.register(page)
    return parse(generate_latest(registry).decode())


def watching(intake: Intake) -> EngineMetricsPage:
    intake.publish(0)
    page = EngineMetricsPage()
    page.server = intake.server
    return page


def tell(puppet: Puppet, text: str | bytes) -> None:
    """Said hello, and told of the engine; the intake has heard both."""
    puppet.hello()
    puppet.next(Welcome)
    puppet.send(EngineMetrics(pack(text) if isinstance(text, str) else text))
    puppet.settle()


def test_engines_of_all_actors_are_on_one_page_by_name(tmp_path: Path) -> None:
    with (
        Intake(tmp_path) as intake,
        Puppet(intake.address, "actor-1") as one,
        Puppet(intake.address, "actor-2") as two,
    ):
        page = watching(intake)
        assert page_of(page) == {}
        tell(one, RUNNING.format(3) + HISTOGRAM)
        tell(two, RUNNING.format(5) + HISTOGRAM)
        found = page_of(page)
        assert found["vllm:running"] == {
            (("actor", "actor-1"), ("engine", "0")): 3,
            (("actor", "actor-2"), ("engine", "0")): 5,
        }, "the name is the connection's, whatever the text says"
        assert found["vllm:ttft_seconds_bucket"][(("actor", "actor-1"), ("le", "1.0"))] == 2
        one.send(EngineMetrics(pack(RUNNING.format(4))))
        one.settle()
        assert page_of(page)["vllm:running"][(("actor", "actor-1"), ("engine", "0"))] == 4
        one.goodbye()
        until(lambda: len(page_of(page)["vllm:running"]) == 1, "the page without the actor that left")


@pytest.mark.parametrize(
    "text",
    [
        b"no zstandard",
        "vllm:running{ 3",
        "vllm:running three\n",
        "# TYPE vllm:running gauge\nvllm:running 1\n# TYPE tandem_reward_mean gauge\ntandem_reward_mean 9\n",
        "up 1\n",
    ],
)
def test_text_that_is_no_engines_is_dropped_and_counted(tmp_path: Path, text: str | bytes) -> None:
    with (
        Intake(tmp_path) as intake,
        Puppet(intake.address, "actor-1") as sane,
        Puppet(intake.address, "actor-2") as broken,
    ):
        page = watching(intake)
        tell(sane, RUNNING.format(3))
        tell(broken, text)
        for _ in range(2):
            assert [dict(labels)["actor"] for labels in page_of(page)["vllm:running"]] == ["actor-1"]
        assert intake.hub.faults.counts["engine metrics"] == 1, "it is forgotten, and counted once"
        assert list(intake.server.engine_texts()) == ["actor-1"]


def test_text_that_is_too_large_is_not_kept(tmp_path: Path) -> None:
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        watching(intake)
        tell(puppet, bytes(MAX_PACKED_BYTES + 1))
        assert not intake.server.engine_texts() and intake.hub.faults.counts["engine metrics"] == 1
        tell(puppet, bytes(MAX_PACKED_BYTES))
        assert len(intake.server.engine_texts()["actor-9"]) == MAX_PACKED_BYTES


def test_one_name_has_one_type(tmp_path: Path) -> None:
    with (
        Intake(tmp_path) as intake,
        Puppet(intake.address, "actor-1") as one,
        Puppet(intake.address, "actor-2") as two,
    ):
        page = watching(intake)
        tell(one, "# TYPE vllm:x gauge\nvllm:x 1\n")
        tell(two, "# TYPE vllm:x histogram\nvllm:x_sum 1\nvllm:x_count 2\n")
        assert page_of(page) == {"vllm:x": {(("actor", "actor-1"),): 1}}


@pytest.mark.parametrize("cut", range(1, len(HISTOGRAM), 7))
def test_a_text_that_was_cut_never_raises_anything_else(cut: int) -> None:
    with contextlib.suppress(MalformedFrame):
        families_of(HISTOGRAM[:cut])


def test_a_run_shows_its_engines_beside_its_own_metrics(tmp_path: Path) -> None:
    pages: list[Page] = []

    def watch(learner: Learner) -> None:
        training = learner._training

        def looking() -> None:
            training()
            place = read_json(learner.run.scrape_targets)[0]["targets"][0]
            pages.append(until(lambda: parse(scrape(place, "/engines")), "the engine's metrics"))
            pages.append(parse(scrape(place)))

        learner._training = looking  # type: ignore[method-assign]

    model = make_tiny_model(tmp_path / "tiny")
    recipe = recipe_of(steps=2, metrics={"engine_every_s": 0.1})
    assert learn(recipe, tmp_path / "run", model, watch=watch)[0]
    engines, own = pages
    assert set(engines) == {"fake:requests_total", "fake:loads"}
    assert list(engines["fake:loads"]) == [(("actor", "actor-0"), ("model_name", "fake"))]
    assert not [name for name in own if name.startswith("fake:")], "the run's own page stays small"
