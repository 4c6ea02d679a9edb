"""The page of the engines' own metrics: what actors sent last, with their names, and nothing that does not parse."""

from __future__ import annotations

import contextlib
import math
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric, UntypedMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from learner.loop import Learner
from learner.telemetry import engines
from learner.telemetry.engines import (
    LABEL,
    MAX_ACTOR_CHARACTERS,
    MAX_LABELS_CHARACTERS,
    MAX_LINES,
    EngineMetricsPage,
    families_of,
    merged,
)
from protocol.engine_text import MAX_PACKED_BYTES, pack
from protocol.errors import MalformedFrame
from protocol.messages import EngineMetrics, Welcome
from protocol.rundir import read_json
from tests.actor_harness import Puppet, until
from tests.intake_harness import Intake
from tests.learner.telemetry.test_exporter import Page, parse, scrape
from tests.learner.test_loop import learn, recipe_of
from tests.prometheus_harness import program
from tests.tiny_model import make_tiny_model

RUNNING = '# TYPE vllm:running gauge\nvllm:running{{engine="0",actor="liar"}} {}\n'
HISTOGRAM = (
    "# HELP vllm:ttft_seconds Time to the first token.\n# TYPE vllm:ttft_seconds histogram\n"
    'vllm:ttft_seconds_bucket{le="1.0"} 2.0\nvllm:ttft_seconds_bucket{le="+Inf"} 3.0\n'
    "vllm:ttft_seconds_count 3.0\nvllm:ttft_seconds_sum 4.5\n"
)


def page_of(page: EngineMetricsPage) -> Page:
    return parse(page.text().decode())


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
        "vllm:running 1\n" * (MAX_LINES + 1),
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
        families_of(HISTOGRAM[:cut], "actor-1")


def test_a_text_is_read_once_and_outside_the_intakes_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, free = engines.unpack, []

    def unpacking(text: bytes) -> str:
        def look() -> None:
            free.append(intake.server.lock.acquire(timeout=10))
            intake.server.lock.release()

        looking = threading.Thread(target=look)
        looking.start()
        looking.join()
        return unpack(text)

    monkeypatch.setattr(engines, "unpack", unpacking)
    with Intake(tmp_path) as intake, Puppet(intake.address) as puppet:
        page = watching(intake)
        tell(puppet, RUNNING.format(3))
        assert page.text() == page.text() and free == [True]
        tell(puppet, RUNNING.format(3))
        assert page.text() and free == [True, True], "another text, if with the same words"


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "vllm:x 1 1700000000000",
        'vllm:x 1 # {trace_id="a"} 2',
        'vllm:x{a="b"} 1 # {trace_id="}"} 2',
        'vllm:x{a="b"',
        'vllm:x{a="b} 1',
        'vllm:x{a="b\ttab"} 1',
        'vllm:x{a="b\rline"} 1',
        'vllm:x{a="b\x00"} 1',
        'vllm:x{a="b\x9b31m"} 1',
        'vllm:x{a="b\n"} 1',
        'vllm:x{a="\\q"} 1',
        'vllm:x{a="1",a="2"} 1',
        'vllm:x{actor="1",actor="2"} 1',
        'vllm:x{a="1",} 1',
        'vllm:x{a="1" b="2"} 1',
        'vllm:x{"a"="1"} 1',
        'vllm:x{é="1"} 1',
        'vllm:x{__name__="up"} 1',
        'vllm:x{run="another"} 1',
        'vllm:x{instance="another"} 1',
        f'vllm:x{{a="{MAX_LABELS_CHARACTERS * "a"}"}} 1',
        '{"vllm:x",a="b"} 1',
        '{__name__="vllm:x"} 1',
        "vllm:x  1",
        " vllm:x 1",
        "vllm:x\t1",
        "vllm:x 0x10",
        "vllm:x 1_000",
        "vllm:x 1e999",
        "vllm:x -1e999",
        f"vllm:x {'9' * 400}",
        "vllm:x infinity",
        "vllm:x \u0661",
        "vllm:\u00e9 1",
        "vllm: 1",
        "vllm:x 1\rup 1",
        "vllm:x 1\u2028up 1",
        "vllm:x 1\n\n up 1",
        "# EOF",
        "#  HELP up Another.\nvllm:x 1",
        "# HELP up Another.\nvllm:x 1",
        "# HELP vllm:x A \\q.\nvllm:x 1",
        "# HELP vllm:x A\rline.\nvllm:x 1",
        "# TYPE vllm:x",
        "# TYPE vllm:x heap\nvllm:x 1",
        "# TYPE vllm:x gauge\n# TYPE vllm:x counter\nvllm:x 1",
        "# TYPE vllm:x gauge\nvllm:x 1\n# HELP vllm:x Late.",
        "vllm:x 1\n# TYPE vllm:x gauge",
        'vllm:x 1\nvllm:y 1\nvllm:x{a="b"} 1',
        "# TYPE vllm:x histogram\nvllm:x_sum 1\n# TYPE vllm:x_count gauge\nvllm:x_count 1",
        "# TYPE vllm:x histogram\nvllm:x 1",
        '# TYPE vllm:x histogram\nvllm:x_bucket{le="few"} 1',
        '# TYPE vllm:x histogram\nvllm:x_bucket{le="1e999"} 1',
        '# TYPE vllm:x summary\nvllm:x{quantile=""} 1',
    ],
)
def test_a_text_unlike_an_engines_is_refused_as_a_whole(text: str) -> None:
    sound = "# TYPE vllm:sound gauge\nvllm:sound 1\n"
    assert families_of(sound, "actor-1")
    for around in (f"{sound}{text}\n", f"{text}\n{sound}"):
        with pytest.raises(MalformedFrame):
            families_of(around, "actor-1")


def test_a_text_without_its_last_line_end_is_refused() -> None:
    with pytest.raises(MalformedFrame, match="the last line has no end"):
        families_of("vllm:x 12", "actor-1")


def test_a_name_that_would_swell_every_line_is_refused() -> None:
    assert families_of("vllm:x 1\n", "a" * MAX_ACTOR_CHARACTERS)
    with pytest.raises(MalformedFrame, match="257 characters"):
        families_of("vllm:x 1\n", "a" * (MAX_ACTOR_CHARACTERS + 1))


def test_labels_that_look_like_lines_are_labels() -> None:
    value = 'a\\"} 1\\nup{b=\\"\\\\'
    (family,) = families_of(f'vllm:x{{actor="{value}",model_name="{value}"}} +Inf\n', 'ac"tor\\\n}} 2')
    assert family.samples.decode() == f'vllm:x{{actor="ac\\"tor\\\\\\n}}}} 2",model_name="{value}"}} +Inf\n'
    assert parse(family.samples.decode()) == {
        "vllm:x": {((LABEL, 'ac"tor\\\n}} 2'), ("model_name", 'a"} 1\nup{b="\\')): math.inf}
    }


def test_a_family_that_has_anothers_names_is_left_out() -> None:
    one = families_of("# TYPE vllm:x histogram\nvllm:x_sum 1\nvllm:x_count 2\n", "actor-1")
    two = families_of("# TYPE vllm:x_sum gauge\nvllm:x_sum 3\n# TYPE vllm:y gauge\nvllm:y 4\n", "actor-2")
    actors = [((LABEL, f"actor-{number}"),) for number in (1, 2)]
    assert parse(merged([*one, *two]).decode()) == {
        "vllm:x_sum": {actors[0]: 1}, "vllm:x_count": {actors[0]: 2}, "vllm:y": {actors[1]: 4}
    }  # fmt: skip
    assert parse(merged([*two, *one]).decode()) == {"vllm:x_sum": {actors[1]: 3}, "vllm:y": {actors[1]: 4}}


# --- against prometheus_client ----------------------------------------------------------------------------------------

PRINTABLE = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=12) | st.text('a"\\{}=, #', max_size=12)
LABEL_NAMES = st.lists(st.sampled_from(("actor", "engine", "model_name", "_x", "z9")), unique=True, max_size=4)
VALUES = st.floats() | st.integers(-(2**53), 2**53).map(float)


class Told(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterable[Metric]:
        return self.families


@st.composite
def family(draw: st.DrawFn) -> Metric:
    """One as a client of Prometheus keeps it. Its name ends with its type, so that actors agree about it."""
    kind = draw(st.sampled_from(("counter", "gauge", "untyped", "summary", "histogram")))
    name, text = f"vllm:{draw(st.text('ab_9', min_size=1, max_size=3))}_{kind}", draw(PRINTABLE)
    labels = draw(LABEL_NAMES)
    rows = draw(st.lists(st.tuples(*(PRINTABLE for _ in labels)), unique=True, max_size=3))
    make: dict[str, Callable[..., Metric]] = {
        "counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "untyped": UntypedMetricFamily,
        "summary": SummaryMetricFamily, "histogram": HistogramMetricFamily,
    }  # fmt: skip
    made = make[kind](name, text, labels=labels)
    for row in rows:
        if kind == "histogram":
            bounds = sorted(draw(st.sets(st.floats(0, 1e9), max_size=3)))
            made.add_metric(row, [(str(bound), draw(VALUES)) for bound in [*bounds, "+Inf"]], draw(VALUES))  # type: ignore[attr-defined]
        elif kind == "summary":
            made.add_metric(row, draw(st.integers(0, 99)), draw(VALUES))  # type: ignore[attr-defined]
        else:
            made.add_metric(row, draw(VALUES))  # type: ignore[attr-defined]
    return made


def written(families: Iterable[Metric]) -> str:
    registry = CollectorRegistry()
    registry.register(Told(families))
    return generate_latest(registry).decode()


TEXTS = st.lists(family(), unique_by=lambda one: one.name, max_size=5).map(written)

Rows = list[tuple[str, str, tuple[tuple[str, str], ...], str]]
"""Type of the family, name of the series, labels, value: of every sample, sorted."""


def rows_of(text: str, actor: str | None = None) -> Rows:
    """What prometheus_client's parser finds, with the label that an actor's text is to get."""
    label = {} if actor is None else {LABEL: actor}
    return sorted(
        (family.type, sample.name, tuple(sorted((sample.labels | label).items())), repr(float(sample.value)))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=8), TEXTS, max_size=3))
def test_a_page_has_the_samples_of_all_texts_with_their_actors(texts: dict[str, str]) -> None:
    page = merged(one for actor, text in texts.items() for one in families_of(text, actor)).decode()
    assert rows_of(page) == sorted(row for actor, text in texts.items() for row in rows_of(text, actor))
    types = [line.split(" ")[2] for line in page.split("\n") if line.startswith("# TYPE ")]
    assert len(types) == len(set(types)), "each family once"


PIECES = st.sampled_from(
    (*'"\\{}=,# \n\t\r_1e', "vllm:", "# TYPE ", "# HELP ", "gauge", "Inf", 'le="1"', "\\n")
) | st.text(max_size=2)


@settings(deadline=None, max_examples=300)
@given(TEXTS.filter(bool), st.lists(st.tuples(st.integers(0), st.integers(0, 4), PIECES), min_size=1, max_size=3))
def test_whatever_is_taken_means_the_same_to_prometheus(text: str, changes: list[tuple[int, int, str]]) -> None:
    for at, length, piece in changes:
        start = at % (len(text) + 1)
        text = text[:start] + piece + text[start + length :]
    try:
        page = merged(families_of(text, "actor-1")).decode()
    except MalformedFrame:
        return
    assert rows_of(page) == rows_of(text, "actor-1")


def test_page_is_what_promtool_reads() -> None:
    """It finds fault with names: with every colon, for one. A page that it cannot read is another exit code."""
    one = RUNNING.format(3) + HISTOGRAM + "# TYPE vllm:z_total counter\nvllm:z_total 1e+06\nvllm:untyped NaN\n"
    page = merged([*families_of(one, "actor-1"), *families_of(one, 'ac"tor\\\n}')])

    def checked(text: bytes) -> int:
        return subprocess.run([program("promtool"), "check", "metrics"], input=text, capture_output=True).returncode

    assert checked(page) == 3 and checked(page + b"vllm:x 1e999\n") == 1


# --- a whole run ------------------------------------------------------------------------------------------------------


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
