"""Version numbers: reserved on disk, never twice, whatever a crash left of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.publish import Versions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "versions.jsonl"


def test_reserved_numbers_are_on_disk_and_go_on_after_a_restart(path: Path) -> None:
    versions = Versions(path)
    assert [versions.reserve(step) for step in (0, 0, 1)] == [1, 2, 3]
    again = Versions(path)
    assert again.steps == {1: 0, 2: 0, 3: 1}
    assert (again.next, again.step_of(3), len(again)) == (4, 1, 3)


@pytest.mark.parametrize("torn", ['{"ver', '{"version": 3, "step": 1}', "\0\0\0"])
def test_torn_last_line_costs_no_later_number(path: Path, torn: str) -> None:
    """A line without its end was never announced; what is reserved after it is read back by the next process."""
    versions = Versions(path)
    versions.reserve(0)
    versions.reserve(1)
    with path.open("a") as file:
        file.write(torn)
    second = Versions(path)
    assert [second.reserve(step) for step in (1, 2, 3)] == [3, 4, 5]
    assert Versions(path).steps == {1: 0, 2: 1, 3: 1, 4: 2, 5: 3}


def test_damaged_line_is_named(path: Path) -> None:
    path.write_text('{"version": 1, "step": 0}\nnothing\n{"version": 2, "step": 0}\n')
    with pytest.raises(ValueError, match=r"versions\.jsonl, line 2: found 'nothing'"):
        Versions(path)
