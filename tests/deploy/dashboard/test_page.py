"""The page in a real browser: data arrive, clicks work, its console stays empty, no request leaves the machine.

Pictures of what was seen stay in build/screenshots (TANDEM_SCREENSHOTS)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.dashboard.rollouts import LISTED_STEPS, RolloutReader
from deploy.dashboard.server import Dashboard
from protocol.rundir import RunDir
from protocol.scaling import Wish, read_wish
from tests.dashboard_harness import CHROMIUM, HOSTILE, JOURNALED, NO_BROWSER, SHOTS, MadeRun, browser, served

pytest.importorskip("playwright.sync_api", reason="needs playwright: `pip install playwright`")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason=NO_BROWSER)

PATIENCE_MS = 15_000
OFFLINE = "net::ERR_INTERNET_DISCONNECTED"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


Visit = Callable[..., Any]
Serve = Callable[[RunDir], Dashboard]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Servers and pages of a test: pages end first, none finds its server gone."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(opened: ExitStack) -> Serve:
    """serve(run) serves a run's page until the end of the test."""
    return lambda run: opened.enter_context(served(run))


@pytest.fixture
def visit(chromium: Any, opened: ExitStack) -> Visit:
    """visit(dashboard, address=…, ignore=…, **context) opens a page; at the end nothing may have gone wrong on any."""
    return lambda *args, **kwargs: opened.enter_context(visited(chromium, *args, **kwargs))


@contextmanager
def visited(
    chromium: Any, dashboard: Dashboard, address: str = "", ignore: str = "", scheme: str = "light", width: int = 1280
) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    asked: list[str] = []
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(address or dashboard.address)
    holds(page, "document.getElementById('connection').textContent !== 'connecting'")  # a first whole round
    yield page
    context.close()
    assert [text for text in wrong if not ignore or not re.search(ignore, text)] == []
    assert asked, "the check itself looks at what it should"
    assert {url for url in asked if not url.startswith(f"http://127.0.0.1:{dashboard.port}/")} == set()
    assert not [url for url in asked if dashboard.access.token in url]


@contextmanager
def made_run(path: Path, actors: int = 2, seconds: float = 60, alive: bool = True, **options: Any) -> Iterator[MadeRun]:
    made = MadeRun(path, actors, began=time.time() - seconds, **options)
    with ExitStack() as stack:
        stack.callback(made.close)
        if alive:
            stack.enter_context(made.run.lock("launcher"))
        made.advance(seconds)
        yield made


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """A run that has finished, of which nothing changes any more."""
    with made_run(tmp_path_factory.mktemp("runs") / "ended", 4, 200, alive=False) as made:
        made.hostile = True
        made.advance(20)
        made.finish()
        yield made.run


def drawn(page: Any, chart: str = "throughput") -> Any:
    """Wait until a chart shows something; its canvas."""
    return page.wait_for_selector(f"#chart-{chart} canvas")


def holds(page: Any, expression: str) -> None:
    """Wait until an expression is true. (Playwright's own wait needs `eval`, which the page's policy forbids.)"""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never: {expression}; the page says:\n{page.inner_text('body')[:1500]}"
        page.wait_for_timeout(50)


def picture(page: Any, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def fits(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def test_data_arrive_while_the_page_is_open(tmp_path: Path, serve: Serve, visit: Visit) -> None:
    with made_run(tmp_path / "live") as made:
        dashboard = serve(made.run)
        page = visit(dashboard)
        before = drawn(page).evaluate("canvas => canvas.toDataURL()")
        drawn(page, "reward")
        assert page.inner_text("#connection") == "live"
        assert page.inner_text("#advice-text")
        made.kill("actor-1")
        made.advance(30)
        holds(page, f"document.getElementById('steps-text').textContent.startsWith('step {made.step} of')")
        page.wait_for_selector('tr[data-actor="actor-1"] >> text=gone')
        page.wait_for_selector("#lanes-legend >> text=dead or gone")
        holds(page, f"document.querySelector('#chart-entropy .plot').dataset.points === '{made.step}'")
        assert drawn(page).evaluate("canvas => canvas.toDataURL()") != before
        page.wait_for_selector(f"#tile-version >> text=v{made.version}")
        picture(page, "live-light-1280")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_fits_in_both_themes(ended: RunDir, serve: Serve, visit: Visit, scheme: str, width: int) -> None:
    dashboard = serve(ended)
    page = visit(dashboard, scheme=scheme, width=width)
    drawn(page)
    drawn(page, "reward")
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(245, 246, 248)"
    assert light == (scheme == "light")
    assert fits(page)
    picture(page, f"ended-{scheme}-{width}")
    page.click("#tab-rollouts")
    page.wait_for_selector("#group .tokens span")
    assert fits(page)
    picture(page, f"rollouts-{scheme}-{width}")


@pytest.mark.parametrize("width", [1280, 400])
def test_64_actors_fit(tmp_path: Path, serve: Serve, visit: Visit, width: int) -> None:
    with made_run(tmp_path / "wide", 64, 60) as made:
        dashboard = serve(made.run)
        page = visit(dashboard, width=width)
        page.wait_for_selector('#lanes canvas[data-lanes="65"]')
        assert page.locator("#actors tbody tr").count() == 64
        assert fits(page)
        picture(page, f"64-actors-{width}")


def test_an_ended_run_says_so_and_has_no_buttons(ended: RunDir, serve: Serve, visit: Visit) -> None:
    dashboard = serve(ended)
    page = visit(dashboard)
    drawn(page)
    assert page.inner_text("#phase") == "Finished"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d, after 3:4\d min", page.inner_text("#left"))
    assert page.wait_for_selector("#lanes-legend >> text=finished")
    assert page.inner_text("#connection") == "not running"
    assert page.inner_text("#advice-side") == "last advice"
    assert not page.is_visible("#scale")
    page.click("#windows >> text=5 min")
    assert page.get_attribute("#windows >> text=5 min", "aria-pressed") == "true"
    page.hover("#lanes canvas", position={"x": 600, "y": 10})
    assert page.wait_for_selector("#tip").inner_text().startswith("learner: ")
    page.click("summary")
    page.wait_for_selector("#shares tbody tr >> text=actor-3")


ENDS = {
    "failed": ({"phase": "failed", "error": "RuntimeError: CUDA error"}, "Failed"),
    "stopped": ({"phase": "stopped"}, "Stopped; it can be resumed"),
    "guarded": ({"phase": "stopped by the guard", "error": "the guard ended the run: KL"}, "Stopped by the guard"),
    "killed": ({}, "Interrupted: its learner ended without a word"),
}


@pytest.mark.parametrize("name", list(ENDS))
def test_a_run_that_ended_early_is_not_called_finished(tmp_path: Path, serve: Serve, visit: Visit, name: str) -> None:
    end, words = ENDS[name]
    with made_run(tmp_path / name, alive=False) as made:
        made.write_status(**end)
        page = visit(serve(made.run), ignore=OFFLINE)
        drawn(page)
        assert page.inner_text("#phase") == words
        assert page.inner_text("#left") == time.strftime("%Y-%m-%d %H:%M", time.localtime(made.t))
        assert page.inner_text("#error") == end.get("error", "")
        assert "finished" not in page.inner_text("#lanes-legend")
        assert int(page.inner_text("#tile-rollout .value").split()[0].replace(".", "").replace("k", "")) > 0
        picture(page, f"ended-{name}")
        page.context.set_offline(True)
        page.click("#tab-rollouts")  # asks at once
        notice = f"The run has ended ({words.lower()})" if end else "The server does not answer"
        holds(page, f"document.getElementById('notice').textContent.startsWith('{notice}')")
        picture(page, f"ended-{name}-lost")


def test_theme_button_overrides_the_system_and_is_remembered(ended: RunDir, serve: Serve, visit: Visit) -> None:
    dashboard = serve(ended)
    page = visit(dashboard, scheme="dark")
    drawn(page)
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    assert page.evaluate(paper) == "rgb(14, 17, 21)"
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(245, 246, 248)"
    page.reload()
    drawn(page)
    assert page.evaluate(paper) == "rgb(245, 246, 248)", "remembered; and the cookie still lets in"


def test_rollouts_are_browsed_token_by_token(ended: RunDir, serve: Serve, visit: Visit) -> None:
    dashboard = serve(ended)
    page = visit(dashboard)
    page.click("#tab-rollouts")
    page.wait_for_selector("#group .tokens span")
    assert HOSTILE in page.text_content("#group .tokens"), "what a model writes never becomes markup"
    assert page.locator("#rollouts img").count() == 0
    assert page.title() == "ended · Tandem"
    newest = int(page.input_value("#rollouts select"))
    page.click("[aria-label='Step before']")
    holds(page, f"document.querySelector('#rollouts select').value === '{newest - 1}'")
    page.click("#groups li:nth-child(2) a")
    page.wait_for_selector(f"#group[data-shown='{newest - 1}/1']")
    assert page.get_attribute("#groups li:nth-child(2) a", "aria-current") == "true"
    assert page.evaluate("location.hash") == f"#rollouts/{newest - 1}/1"
    assert page.locator("#group .completion").count() == 8
    assert re.search(r"answer [01]", page.inner_text("#group .completion .scores"))

    page.click("[data-mode='version']")
    versions = "new Set([...document.querySelectorAll('.tokens span')].map(span => span.dataset.version)).size"
    assert page.evaluate(versions) >= 2
    assert page.inner_text("#token-legend").startswith("version ")
    picture(page, "rollouts-versions")

    page.click("[data-mode='ratio']")
    coloured = "[...document.querySelectorAll('.tokens span')].filter(span => span.style.backgroundColor).length"
    trained = page.evaluate("document.querySelectorAll('.tokens span:not(.untrained)').length")
    assert (page.evaluate(coloured) > 0) == (trained > 0)
    page.hover("#group .tokens span:nth-child(3)")
    tip = page.wait_for_selector("#tip").inner_text()
    assert re.search(r"^\".*\"\nengine −\d\.\d{3} nats\nlearner .*\nratio .*\nversion \d+, token 3 of \d+", tip)


def open_rollouts(page: Any, place: str) -> None:
    """Of STEP/INDEX."""
    page.evaluate("place => { location.hash = `rollouts/${place}` }", place)
    page.wait_for_selector(f"#group[data-shown='{place}']")


def test_a_step_that_is_made_anew_takes_the_place_of_the_one_given_up(
    tmp_path: Path, serve: Serve, visit: Visit
) -> None:
    with made_run(tmp_path / "rolled") as made:
        page = visit(serve(made.run))
        step = made.step
        open_rollouts(page, f"{step}/1")
        assert page.inner_text("#group .prompt h3") == f"Prompt 0/{step * JOURNALED + 1}"
        made.roll_back(step - 1)
        made.end_step()
        page.wait_for_selector(f"#step-about >> text=made version {made.version}")
        page.wait_for_selector(f"#group .prompt h3 >> text=Prompt 1/{step * JOURNALED + 1}")
        group = RolloutReader(made.run).groups(step)[1]
        reward = sum(group["rewards"]) / len(group["rewards"])
        assert float(page.inner_text("#groups li:nth-child(2) b")) == pytest.approx(reward, abs=0.001), "the list, too"
        assert page.evaluate("location.hash") == f"#rollouts/{step}/1"


def test_the_newest_step_is_followed_until_one_is_read_or_chosen(tmp_path: Path, serve: Serve, visit: Visit) -> None:
    with made_run(tmp_path / "followed") as made:
        page = visit(serve(made.run))

        def next_step() -> None:
            """One more, and the page knows of it."""
            made.end_step()
            page.wait_for_selector(f"#rollouts option[value='{made.step}']", state="attached")

        page.click("#tab-rollouts")
        page.wait_for_selector(f"#group[data-shown='{made.step}/0']")
        assert page.is_disabled("#rollouts >> text=newest")
        next_step()
        page.wait_for_selector(f"#group[data-shown='{made.step}/0']")
        page.evaluate("window.scrollTo(0, 120)")
        read = made.step
        next_step()
        assert page.input_value("#rollouts select") == str(read), "somebody has scrolled to where they read"
        assert page.get_attribute("#group", "data-shown") == f"{read}/0"
        picture(page, "rollouts-read-on")
        page.click("#rollouts >> text=newest")
        page.wait_for_selector(f"#group[data-shown='{made.step}/0']")
        assert page.evaluate("window.scrollY") == 0
        page.click("#groups li:nth-child(2) a")
        chosen = made.step
        page.wait_for_selector(f"#group[data-shown='{chosen}/1']")
        next_step()
        assert page.get_attribute("#group", "data-shown") == f"{chosen}/1", "somebody has chosen it"
        page.click("#rollouts >> text=newest")
        page.wait_for_selector(f"#group[data-shown='{made.step}/0']")
        next_step()
        page.wait_for_selector(f"#group[data-shown='{made.step}/0']")


def test_every_step_of_a_long_run_is_reached(tmp_path: Path, serve: Serve, visit: Visit) -> None:
    with made_run(tmp_path / "long") as made:
        assert made.journal is not None
        newest = RolloutReader(made.run).groups(made.step)
        ids = [(0, int(group["id"].split("/")[1])) for group in newest]
        for step in range(made.step + 1, LISTED_STEPS + 101):
            made.journal.append_step(step, step + 1, ids)
        page = visit(serve(made.run))
        open_rollouts(page, "50/0")
        assert page.locator("#rollouts option").count() == LISTED_STEPS + 3, "the newest, this one and its neighbours"
        for button, step in (("before", 49), ("before", 48), ("after", 49), ("after", 50), ("after", 51)):
            page.click(f"[aria-label='Step {button}']:enabled")
            page.wait_for_selector(f"#group[data-shown='{step}/0']")
            holds(page, f"document.querySelector('#rollouts option[value=\"{step + 1}\"]') !== null")
        open_rollouts(page, "1/0")
        assert page.is_disabled("[aria-label='Step before']")
        page.click("#rollouts >> text=newest")
        page.wait_for_selector(f"#group[data-shown='{LISTED_STEPS + 100}/0']")
        assert page.is_disabled("[aria-label='Step after']")


def test_scale_buttons_leave_wishes(tmp_path: Path, serve: Serve, visit: Visit) -> None:
    with made_run(tmp_path / "scaled") as made:
        dashboard = serve(made.run)
        page = visit(dashboard)
        page.click("#scale-more")
        holds(page, "document.getElementById('scale-state').textContent.includes('2 → 3 actors')")
        assert read_wish(made.run) == Wish(3, "the dashboard")
        made.scale(3)
        made.advance(20)
        page.wait_for_selector("#scale-state >> text=3 actors wanted by the dashboard, all serve")
        page.fill("#scale-number", "7")
        page.click("#scale-set")
        holds(page, "document.getElementById('scale-state').textContent.includes('3 → 7 actors')")
        assert read_wish(made.run) == Wish(7, "the dashboard")
        holds(page, "!document.getElementById('scale-less').disabled")
        page.click("#scale-less")
        holds(page, "document.getElementById('scale-state').textContent.includes('7 → 6 actors')")


def test_clicks_that_follow_each_other_quickly_all_count(tmp_path: Path, serve: Serve, visit: Visit) -> None:
    with made_run(tmp_path / "hurried") as made:
        page = visit(serve(made.run))
        page.evaluate("for (const _ of [1, 2, 3]) document.getElementById('scale-more').click()")
        holds(page, "document.getElementById('scale-state').textContent.includes('4 → 5 actors')")
        assert read_wish(made.run) == Wish(5, "the dashboard")
        assert page.input_value("#scale-number") == "5"


@pytest.mark.parametrize("end", ["#token=wrong", ""])
def test_without_the_right_token_nothing_is_shown(ended: RunDir, serve: Serve, visit: Visit, end: str) -> None:
    dashboard = serve(ended)
    page = visit(dashboard, address=dashboard.address.split("#")[0] + end, ignore="401")
    holds(page, "document.getElementById('connection').textContent === 'no access'")
    assert "#token=" in page.inner_text("#notice")
    assert "ended" not in page.inner_text("body")
    assert "token" not in page.evaluate("location.href")


def test_the_token_leaves_the_address_and_no_script_sees_the_cookie(ended: RunDir, serve: Serve, visit: Visit) -> None:
    dashboard = serve(ended)
    page = visit(dashboard)
    drawn(page)
    assert page.evaluate("[location.hash, document.cookie]") == ["", ""]


def test_a_lost_connection_is_said_and_found_again(tmp_path: Path, serve: Serve, visit: Visit) -> None:
    with made_run(tmp_path / "lost") as made:
        dashboard = serve(made.run)
        page = visit(dashboard, ignore=OFFLINE)
        drawn(page)
        page.context.set_offline(True)
        holds(
            page,
            "/connection lost, since \\d\\d:\\d\\d:\\d\\d/.test(document.getElementById('connection').textContent)",
        )
        picture(page, "lost")
        page.context.set_offline(False)
        holds(page, "document.getElementById('connection').textContent === 'live'")
        assert not page.is_visible("#notice")


def test_a_hidden_page_asks_for_nothing_until_it_is_seen_again(tmp_path: Path, serve: Serve, visit: Visit) -> None:
    with made_run(tmp_path / "hidden") as made:
        dashboard = serve(made.run)
        page = visit(dashboard)
        drawn(page)
        page.evaluate("Object.defineProperty(document, 'hidden', {get: () => window.unseen ?? true})")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        deadline = time.monotonic() + PATIENCE_MS / 1000
        before = -1
        while len(asked) != before:  # the round under way ends; then a pause longer than that between two rounds
            assert time.monotonic() < deadline, f"it still asks: {asked[-5:]}"
            before = len(asked)
            page.wait_for_timeout(2000)
        with page.expect_response("**/api/now"):
            page.evaluate("window.unseen = false; document.dispatchEvent(new Event('visibilitychange'))")


EMPTY = {
    "fresh": ({"seconds": 0}, "waiting for the first sample", "No step has been made yet"),
    "sft": ({"actors": 0, "seconds": 40, "method": "sft"}, None, "Method sft trains on data"),
    "old": ({"seconds": 0, "alive": False}, "older version of Tandem", "This run has no rollouts"),
}


@pytest.mark.parametrize("name", list(EMPTY))
def test_what_is_not_there_is_explained(tmp_path: Path, serve: Serve, visit: Visit, name: str) -> None:
    options, no_time, no_rollouts = EMPTY[name]
    with made_run(tmp_path / name, **options) as made:
        dashboard = serve(made.run)
        page = visit(dashboard)
        page.wait_for_selector("#tiles .tile")
        if no_time:
            assert no_time in page.inner_text("#chart-throughput")
        else:
            drawn(page, "loss")
            drawn(page)
            assert not page.is_visible("#actors-card")
            assert not page.is_visible("#chart-queue")
        assert fits(page)
        picture(page, f"empty-{name}")
        page.click("#tab-rollouts")
        holds(page, f"document.getElementById('rollouts').textContent.includes('{no_rollouts}')")
