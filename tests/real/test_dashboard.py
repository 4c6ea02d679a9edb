"""A whole run with its page in a browser: data arrive, a click starts another actor, the end is said (fake engine)."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.rundir import RunDir
from protocol.scaling import Wish, read_wish
from tests.dashboard_harness import CHROMIUM, NO_BROWSER, SHOTS, browser
from tests.run_harness import Command, files_of, open_to_the_network
from tests.test_cli import write_recipe

pytest.importorskip("playwright.sync_api", reason="needs playwright: `pip install playwright`")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason=NO_BROWSER)

SLOW = ["--set", "actor.fake_token_s=0.1", "--set", "eval.prompts=0"]


def number(page: Any, tile: str) -> float:
    """The figure of a tile; 0 while it has none."""
    found = re.match(r"[\d.]+", page.text_content(f"#tile-{tile} .value") or "")
    return float(found[0]) if found else 0.0


def test_the_page_of_a_run_shows_it_and_scales_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "cli")
    arguments = ["train", str(write_recipe(tmp_path)), "--runs", str(tmp_path / "runs"), "--dashboard", *SLOW]
    with Command(arguments, tmp_path / "log") as command, browser() as chromium:
        said = command.until(lambda: re.search(r"dashboard (http://\S+#token=(\S+))", command.output()), "address", 60)
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.goto(said[1])

        def sees(condition: Any, what: str) -> None:
            def look() -> bool:
                page.wait_for_timeout(50)  # lets the browser's events through
                return bool(condition())

            command.until(look, f"{what} on the page; it says {page.inner_text('body')[:800]!r}", 90)

        sees(lambda: page.locator("#tile-rollout").count() and number(page, "rollout") > 0, "throughput")
        sees(lambda: page.locator("#chart-reward canvas").count(), "a curve of rewards")
        points = "Number(document.querySelector('#chart-throughput .plot').dataset.points)"
        before = page.evaluate(points)
        sees(lambda: page.evaluate(points) > before, "more throughput")
        assert page.locator("#actors tbody tr").count() == 1
        page.click("#scale-more")
        sees(
            lambda: re.search(r"2 actors wanted by the dashboard, all serve", page.text_content("#scale-state")),
            "2 actors",
        )
        assert read_wish(run) == Wish(2, "the dashboard")
        page.screenshot(path=_shots() / "real-run.png", full_page=True)
        page.click("#tab-rollouts")
        sees(lambda: page.locator("#group .tokens span").count() > 0, "tokens")
        page.screenshot(path=_shots() / "real-rollouts.png", full_page=True)
        assert wrong == []

        assert open_to_the_network(command.process.pid) == []
        assert token_shown(said[2], run, command.process.pid) == []
        command.process.send_signal(signal.SIGINT)
        assert command.wait(90) == 3
        page.wait_for_selector("#connection >> text=connection lost, since", timeout=20_000)


def _shots() -> Path:
    SHOTS.mkdir(parents=True, exist_ok=True)
    return SHOTS


def token_shown(token: str, run: RunDir, pid: int) -> list[str]:
    """Where the token stands outside of what the command has printed: the run's files, arguments, environments."""
    found = [path for path, text in files_of(run).items() if token.encode() in text]
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        for name in ("cmdline", "environ"):
            try:
                text = Path(f"/proc/{process.pid}/{name}").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            found += [f"{name} of {process.pid}"] if token.encode() in text else []
    return found
