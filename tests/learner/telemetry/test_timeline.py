"""The timeline's file: what is written comes back, it stays small, and what it says survives thinning and crashes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from learner.telemetry.sample import ActorSample, Advice, Sample
from learner.telemetry.timeline import Timeline, TimelineReader


def sample(t: float) -> Sample:
    return Sample(
        t=t, process=7, step=int(t), version=2, phase="training", phases={"training": t}, tokens=int(t) * 10,
        wanted=1, actors={"actor-0": ActorSample("generating", "serving", tokens=int(t) * 10, busy_s=t)},
        advice=Advice("rollout", "more", 0.5, 1.0, 2, 1.5),
    )  # fmt: skip


def test_timeline_samples_come_back(tmp_path: Path) -> None:
    path, wanted = tmp_path / "timeline.jsonl", [sample(t) for t in (1.0, 2.0, 3.5)]
    timeline, reader = Timeline(path, 0.5), TimelineReader(path)
    assert [timeline.write(one) for one in wanted[:2]] == [True, True]
    assert list(reader.new()) == wanted[:2]
    timeline.write(wanted[2])
    assert list(reader.new()) == wanted[2:]
    assert list(reader.new()) == []
    timeline.close()


def test_timeline_leaves_out_what_is_too_near_unless_forced(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "t", 1.0)
    assert timeline.write(sample(1.0)) and not timeline.write(sample(1.5))
    assert timeline.write(sample(1.6), force=True)
    timeline.close()
    assert [one.t for one in TimelineReader(tmp_path / "t").new()] == [1.0, 1.6]


def test_timeline_is_thinned_out_evenly_and_keeps_its_ends(tmp_path: Path) -> None:
    path, size = tmp_path / "t", 20_000
    timeline, reader = Timeline(path, 1.0, max_bytes=size), TimelineReader(path)
    for t in range(1000):
        timeline.write(sample(float(t)))
        assert path.stat().st_size <= size
    times = [one.t for one in reader.new()]
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] < 2 * timeline.every_s and times[-1] >= 999 - timeline.every_s
    assert max(gaps) <= 2 * min(gaps), "coarser, but as coarse everywhere"
    assert timeline.every_s > 1.0
    timeline.close()


def test_timeline_reader_begins_anew_after_thinning(tmp_path: Path) -> None:
    path = tmp_path / "t"
    timeline, reader = Timeline(path, 1.0, max_bytes=5_000), TimelineReader(path)
    timeline.write(sample(0.0))
    assert len(list(reader.new())) == 1
    before = timeline.every_s
    t = 1.0
    while timeline.every_s == before:
        timeline.write(sample(t))
        t += 1.0
    assert [one.t for one in reader.new()] == [one.t for one in TimelineReader(path).new()]
    timeline.close()


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
