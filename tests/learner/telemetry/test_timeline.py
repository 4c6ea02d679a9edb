"""The timeline's file: what is written comes back, it stays small, and what it says survives thinning and crashes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from learner.telemetry.sample import ActorSample, Advice, Sample
from learner.telemetry.timeline import MAX_BYTES, Timeline, TimelineReader, newest_path
from protocol.rundir import read_jsonl


def sample(t: float) -> Sample:
    return Sample(
        t=t, process=7, step=int(t), version=2, phase="training", phases={"training": t}, tokens=int(t) * 10,
        wanted=1, actors={"actor-0": ActorSample("generating", "serving", tokens=int(t) * 10, busy_s=t)},
        advice=Advice("rollout", "more", 0.5, 1.0, 2, 1.5),
    )  # fmt: skip


class Writer:
    """A timeline whose samples come at the times that they say."""

    def __init__(self, path: Path, every_s: float, max_bytes: int = MAX_BYTES) -> None:
        self.now = 0.0
        self.timeline = Timeline(path, every_s, max_bytes, lambda: self.now)

    def write(self, t: float, force: bool = False) -> bool:
        self.now = t
        return self.timeline.write(sample(t), force)


def lines_of(path: Path) -> list[float]:
    """Times of what is in the file."""
    return [row["t"] for row in read_jsonl(path)]


def test_timeline_samples_come_back(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    writer, reader = Writer(path, 0.5), TimelineReader(path)
    assert [writer.write(t) for t in (1.0, 2.0)] == [True, True]
    assert list(reader.new()) == [sample(1.0), sample(2.0)]
    writer.write(3.5)
    assert list(reader.new()) == [sample(3.5)]
    assert list(reader.new()) == []
    writer.timeline.close()


def test_timeline_leaves_out_what_is_too_near_unless_forced(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "t", 1.0)
    assert [writer.write(1.0), writer.write(1.5), writer.write(1.6, force=True)] == [True, False, True]
    assert [writer.write(2.4), writer.write(2.55)] == [False, True], "a thread's wait is never exact"
    assert lines_of(tmp_path / "t") == [1.0, 1.6, 2.55]
    writer.timeline.close()


def test_timeline_goes_on_where_the_clock_is_set_back(tmp_path: Path) -> None:
    """By an hour; the distance between two samples is by a clock that nobody sets."""
    writer = Writer(tmp_path / "t", 1.0)
    for passed in range(3):
        writer.now = float(passed)
        assert writer.timeline.write(sample(passed if passed < 2 else passed - 3600))
    assert lines_of(tmp_path / "t") == [0.0, 1.0, -3598.0]
    writer.timeline.close()


def test_timeline_reader_has_the_newest_sample_also_where_the_file_has_not(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    writer, reader = Writer(path, 10.0), TimelineReader(path)
    seen = []
    for t in (1.0, 2.0, 3.0, 11.0, 12.0):
        writer.write(t)
        seen.append([one.t for one in reader.new()])
    assert seen == [[1.0], [2.0], [3.0], [11.0], [12.0]]
    assert list(reader.new()) == []
    assert lines_of(path) == [1.0, 11.0]
    assert [one.t for one in TimelineReader(path).new()] == [1.0, 11.0, 12.0], "what was new once is no part of it"
    writer.write(13.0, force=True)
    assert [one.t for one in TimelineReader(path).new()] == [1.0, 11.0, 13.0]
    assert not newest_path(path).exists(), "an old one would come again if the clock was set back"
    writer.timeline.close()


def test_timeline_is_thinned_out_evenly_and_keeps_its_ends(tmp_path: Path) -> None:
    path, size = tmp_path / "t", 20_000
    writer, reader = Writer(path, 1.0, size), TimelineReader(path)
    for t in range(1000):
        writer.write(float(t))
        assert path.stat().st_size <= size
    times, every_s = lines_of(path), writer.timeline.every_s
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] < 2 * every_s and times[-1] >= 999 - every_s
    assert max(gaps) <= 2 * min(gaps), "coarser, but as coarse everywhere"
    assert every_s > 1.0
    read = [one.t for one in reader.new()]
    assert read == times + [999.0] * (times[-1] < 999), "and the newest one"
    writer.timeline.close()


def test_timeline_reader_begins_anew_after_thinning(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer, reader = Writer(path, 1.0, 5_000), TimelineReader(path)
    writer.write(0.0)
    assert len(list(reader.new())) == 1
    writer.write(1.0)
    assert len(list(reader.new())) == 1 and not reader.replaced
    before = writer.timeline.every_s
    t = 2.0
    while writer.timeline.every_s == before:
        writer.write(t)
        t += 1.0
    assert [one.t for one in reader.new()] == [one.t for one in TimelineReader(path).new()]
    assert reader.replaced
    writer.timeline.close()


def test_timeline_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "t"
    timeline = Timeline(path, 1.0)
    timeline.write(sample(1.0))
    timeline.close()
    with open(path, "ab") as file:
        file.write(b'{"t":2.0,"proc')
    assert [one.t for one in TimelineReader(path).new()] == [1.0]
    again = Timeline(path, 1.0)
    again.write(sample(3.0))
    again.close()
    assert [one.t for one in TimelineReader(path).new()] == [1.0, 3.0]


def test_timeline_reader_leaves_out_what_it_does_not_understand(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b'{"t": "then"}\n{"t":2.0,"process":1,"new_field":3}\n')
    assert [one.t for one in TimelineReader(path).new()] == [2.0]


def test_timeline_reader_without_a_file_finds_nothing(tmp_path: Path) -> None:
    assert list(TimelineReader(tmp_path / "none").new()) == []
