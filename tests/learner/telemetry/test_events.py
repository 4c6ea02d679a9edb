"""What becomes an event, and that several writers do not tear each other's lines."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from learner.telemetry.events import EventLog, note_event, read_events


def test_events_are_warnings_and_what_carries_a_kind(tmp_path: Path) -> None:
    path, log = tmp_path / "events.jsonl", logging.getLogger("learner.of_a_test")
    log.setLevel(logging.INFO)
    with EventLog(path):
        log.info("an ordinary line")
        log.info("checkpoint of step %d", 3, extra={"event": "checkpoint"})
        log.warning("actor-0 was silent")
        logging.getLogger("elsewhere").warning("not ours")
    log.warning("after the end")
    assert [(row["kind"], row["text"]) for row in read_events(path)] == [
        ("checkpoint", "checkpoint of step 3"),
        ("warning", "actor-0 was silent"),
    ]


def test_events_of_several_writers_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writers = [
        threading.Thread(target=lambda n=n: [note_event(path, "x", f"{n}-{i}" * 50) for i in range(200)])
        for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = read_events(path)
    assert len(rows) == 800 and {row["kind"] for row in rows} == {"x"}
    assert len(read_events(path, last=5)) == 5


def test_event_on_a_full_disk_is_lost_and_nothing_else() -> None:
    note_event(Path("/dev/full/none"), "x", "text")
