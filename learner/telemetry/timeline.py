"""timeline.jsonl: the samples of a run, oldest first, in a file that stays small. The learner writes it, pages read it.

When the file reaches a limit, every other sample is dropped and only every other one is written from then on: a long
run keeps its whole length with coarser steps. Since samples hold absolute counts, rates over what is left stay exact.
The newest sample, where it is none of those, is in a file of its own beside it: readers are as close to the run as
ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from learner.telemetry.sample import Sample
from protocol.rundir import LineTail, cut_torn_line, replace_file

MAX_BYTES = 32 << 20
SHORTEST_S = 0.2
JITTER_S = 0.1
"""A sample that is due is taken so much sooner or later after the one before."""

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Sample)


def newest_path(path: Path) -> Path:
    """Where the newest sample is, if it is not in the timeline at `path`."""
    return path.with_name(f"{path.stem}-newest.json")


class Timeline:
    """The open file. One writer."""

    def __init__(
        self, path: Path, every_s: float, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`every_s`: the least time between two samples of the file; grows as it is thinned out. `clock`: seconds, of a
        clock that nobody sets; a sample's own time is that of the machine."""
        self.path, self.max_bytes = path, max_bytes
        self.every_s = max(every_s, SHORTEST_S)
        cut_torn_line(path)
        self._file = open(path, "ab")  # noqa: SIM115 - open for the life of the run
        self._size = self._file.tell()
        self._clock, self._last = clock, -float("inf")

    def write(self, sample: Sample, force: bool = False) -> bool:
        """Take in the newest sample. Returns whether it is in the file to stay: not if the last one that is was too
        near, unless with `force`."""
        now, line = self._clock(), _encoder.encode(sample) + b"\n"
        if not force and now - self._last < self.every_s - JITTER_S:
            replace_file(newest_path(self.path), line)
            return False
        if self._size + len(line) > self.max_bytes:
            self._thin_out()
        self._file.write(line)
        self._file.flush()
        self._size += len(line)
        self._last = now
        newest_path(self.path).unlink(missing_ok=True)
        return True

    def _thin_out(self) -> None:
        """Every other line stays, and every other sample is written from now on."""
        self._file.close()
        lines = self.path.read_bytes().splitlines(keepends=True)
        replace_file(self.path, b"".join(lines[::-2][::-1]))
        self.every_s *= 2
        self._file = open(self.path, "ab")  # noqa: SIM115
        self._size = self._file.tell()

    def close(self) -> None:
        self._file.close()


class TimelineReader:
    """What is in the file, and what comes to it. Not for several threads."""

    def __init__(self, path: Path) -> None:
        self._lines, self._newest_path = LineTail(path), newest_path(path)
        self._last = -float("inf")
        self.replaced = False
        """Whether the last call of `new` read another file than the call before: it was thinned out, and all that is
        left of it came again."""

    def new(self) -> Iterator[Sample]:
        """Samples since the last call, the newest one at their end also where the file will not keep it; all of them
        again after the file was replaced."""
        newest = self._newest()  # read before the file: so nothing that is in there can be older and unread
        lines, self.replaced = self._lines.new()
        for line in lines:
            if (sample := _decoded(line)) is not None:
                self._last = sample.t
                yield sample
        if newest is not None and newest.t > self._last:
            self._last = newest.t
            yield newest

    def _newest(self) -> Sample | None:
        try:
            return _decoded(self._newest_path.read_bytes())
        except FileNotFoundError:
            return None


def _decoded(line: bytes) -> Sample | None:
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError:
        return None  # of another version of Tandem, or torn by a crash
