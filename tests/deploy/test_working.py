"""What is said while something takes long, on terminals and in logs."""

from __future__ import annotations

import io
import re
from contextlib import suppress

import pytest
from rich.console import Console

from deploy import working as module
from deploy.working import Working


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [10.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_working_in_a_log_says_when_something_begins(now: list[float]) -> None:
    console = Console(file=io.StringIO(), width=80)
    with Working(console) as working:
        working("reading")
        now[0] += 3
        working("writing")
    assert output(console).splitlines() == ["reading", "writing"]


def test_working_in_a_log_says_that_it_lasts(now: list[float]) -> None:
    console = Console(file=io.StringIO(), width=80)
    working = Working(console, every_s=0.001)
    working("converting")
    now[0] += 31
    with working:
        while "so far" not in output(console):
            working._ended.wait(0.001)
    assert "converting, 31 s so far" in output(console)
    assert output(console).splitlines()[-1] == "converting (31 s)"


def test_working_on_a_terminal_shows_seconds_and_leaves_what_took_long(now: list[float]) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Working(console) as working:
        working("reading")
        now[0] += 4
        assert "reading (4 s)" in str(working._line().text)  # type: ignore[union-attr]
        working("writing")
    lines = [line for line in output(console).split("\n") if line.strip()]
    assert any(line.startswith("reading (4 s)") for line in lines)


def test_working_stays_out_of_the_way_of_an_error() -> None:
    console = Console(file=io.StringIO(), width=80)
    with suppress(ValueError), Working(console) as working:
        working("reading")
        raise ValueError("bad")
    assert output(console) == "reading\n"
