"""timeline.jsonl: the samples of a run, oldest first, in a file that stays small. The learner writes it, pages read it.

When the file reaches a limit, every other sample is dropped and only every other one is written from then on: a long
run keeps its whole length with coarser steps. Since samples hold absolute counts, rates over what is left stay exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from learner.telemetry.sample import Sample
from protocol.rundir import LineTail, cut_torn_line, replace_file

MAX_BYTES = 32 << 20
SHORTEST_S = 0.2

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Sample)


class Timeline:
    """The open file. One writer."""

    def __init__(self, path: Path, every_s: float, max_bytes: int = MAX_BYTES) -> None:
        """`every_s`: the least time between two samples; grows as the file is thinned out."""
        self.path, self.max_bytes = path, max_bytes
        self.every_s = max(every_s, SHORTEST_S)
        cut_torn_line(path)
        self._file = open(path, "ab")  # noqa: SIM115 - open for the life of the run
        self._size = self._file.tell()
        self._last = -float("inf")

    def write(self, sample: Sample, force: bool = False) -> bool:
        """Append a sample, unless the last one is too near; `force`: whatever the last one was."""
        if not force and sample.t - self._last < self.every_s:
            return False
        line = _encoder.encode(sample) + b"\n"
        if self._size + len(line) > self.max_bytes:
            self._thin_out()
        self._file.write(line)
        self._file.flush()
        self._size += len(line)
        self._last = sample.t
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
        self._lines = LineTail(path)

    def new(self) -> Iterator[Sample]:
        """Samples since the last call; all of them again after the file was replaced: it was thinned out."""
        for line in self._lines.new()[0]:
            try:
                yield _decoder.decode(line)
            except msgspec.MsgspecError:
                continue  # of another version of Tandem, or torn by a crash
