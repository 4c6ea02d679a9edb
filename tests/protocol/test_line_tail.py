"""The lines that come to a file, read as they are taken."""

from __future__ import annotations

from pathlib import Path

from protocol.rundir import LineTail, replace_file


def test_line_tail_gives_every_whole_line_once_and_reads_no_further_than_it_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = LineTail(path)
    assert [list(part) if not isinstance(part, bool) else part for part in tail.new()] == [[], False]
    path.write_bytes(b"one\ntwo\nthree\nfo")
    lines, replaced = tail.new()
    assert (next(lines), replaced) == (b"one", True)
    lines, replaced = tail.new()
    assert (list(lines), replaced) == ([b"two", b"three"], False), "what was not taken comes again"
    with open(path, "ab") as file:
        file.write(b"ur\n")
    assert list(tail.new()[0]) == [b"four"]
    replace_file(path, b"other\n")
    lines, replaced = tail.new()
    assert (list(lines), replaced) == ([b"other"], True)
