"""What the view shows of actors; how it behaves in terminals and logs is in tests/test_cli.py."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deploy.progress import ProgressView, actors_line


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ({"actors": {"actor-0": 1}}, "1 actors"),
        ({"actors": {"actor-0": 1}, "actors_wanted": 1}, "1 actors"),
        ({"actors": {"actor-0": 1}, "actors_wanted": 3}, "1 of 3 actors"),
        ({"actors": {"by-hand": 1}, "actors_wanted": 0}, "1 actors"),
    ],
)
def test_actors_line_says_what_is_wanted_where_it_differs(status: dict[str, object], line: str) -> None:
    assert actors_line(status) == line


def test_panel_names_actors_without_room() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    view = ProgressView(console, "demo")
    view.update({"phase": "training", "step": 1, "steps": 2, "actors_pending": {"actor-1": "it needs 1 GPU"}})
    console.print(view._panel())
    assert "actor-1 is pending: it needs 1 GPU" in console.file.getvalue()  # type: ignore[attr-defined]
