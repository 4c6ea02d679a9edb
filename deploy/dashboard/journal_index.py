"""Which groups became which step, and where they lie in a journal that may be growing and may have gigabytes.

Reads the heads of records and the compositions of steps, never the groups' tokens; nothing is read twice. Called by
`rollouts.py`. Not for several threads.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from deploy.dashboard.jsonl_tail import JsonlTail
from learner.intake.journal import HEAD_BYTES, Entry, read_index
from protocol.messages import TicketId
from protocol.rundir import RunDir


@dataclass(frozen=True)
class StepRecord:
    """One step of the surviving branch."""

    step: int
    """Steps finished with this one."""
    version: int
    """Published after it."""
    ids: tuple[TicketId, ...]
    """Of its groups, in the order of the batch."""


class JournalIndex:
    """`refresh`, then look."""

    def __init__(self, run: RunDir) -> None:
        self._path = run.journal
        self._versions = JsonlTail(run.versions)
        self._start_over()
        self._forget_versions()

    def refresh(self) -> None:
        """Take in what has been written since."""
        rows, replaced = self._versions.new()
        if replaced:
            self._forget_versions()
        for row in rows:
            self._see_version(row["version"], row["step"], row.get("branch", 0))
        try:
            with open(self._path, "rb", buffering=0) as file:
                if self._last is not None and not self._is_there(file.fileno(), self._last):
                    self._start_over()
            for entry in read_index(self._path, self._end):
                self._add(entry)
        except FileNotFoundError:
            self._start_over()

    def newest(self, count: int) -> list[StepRecord]:
        """So many steps of the surviving branch at most, oldest first."""
        return list(islice(self._surviving(range(len(self._order) - 1, -1, -1)), count))[::-1]

    def around(self, step: int) -> list[StepRecord]:
        """A step of the surviving branch, the one before it and the one after it; those of them that are there."""
        at = bisect_left(self._order, step)
        before = islice(self._surviving(range(at - 1, -1, -1)), 1)
        return [*before, *islice(self._surviving(range(at, len(self._order))), 2)]

    def _surviving(self, places: Iterable[int]) -> Iterator[StepRecord]:
        records = (self._steps[self._order[place]] for place in places)
        return (record for record in records if self._survives(record))

    def step(self, step: int) -> StepRecord:
        """Raises KeyError for a step that is not there, or given up."""
        record = self._steps[step]
        if not self._survives(record):
            raise KeyError(step)
        return record

    def offset(self, group: TicketId) -> int:
        """Where a group's record begins. Raises KeyError."""
        return self._offsets[group]

    # --- the journal ---

    def _start_over(self) -> None:
        self._end = 0
        self._last: Entry | None = None
        self._offsets: dict[TicketId, int] = {}
        self._steps: dict[int, StepRecord] = {}
        self._order: list[int] = []
        """Steps, ascending."""

    def _add(self, entry: Entry) -> None:
        self._end, self._last = entry.end, entry
        if entry.group is not None:
            self._offsets.setdefault(entry.group, entry.offset)  # the first one counts, as for the learner
        elif entry.step is not None:
            record = StepRecord(
                entry.step["step"], entry.step["version"], tuple(TicketId(*id_) for id_ in entry.step["ids"])
            )
            while self._order and self._order[-1] >= record.step:
                del self._steps[self._order.pop()]  # it was done anew, and those behind it are to come again
            self._steps[record.step] = record
            self._order.append(record.step)

    @staticmethod
    def _is_there(descriptor: int, entry: Entry) -> bool:
        """False: the journal's end was cut, and something else may stand there, or it is another journal."""
        return os.pread(descriptor, HEAD_BYTES, entry.offset) == entry.head

    # --- rollbacks ---

    def _forget_versions(self) -> None:
        self._branch = 0
        self._rollbacks: list[tuple[int, int]] = []

    def _see_version(self, version: int, step: int, branch: int) -> None:
        """The first version of a new branch carries the step that the run went back to."""
        if branch != self._branch:
            self._branch = branch
            self._rollbacks.append((version, step))

    def _survives(self, record: StepRecord) -> bool:
        """A step that was rolled back is gone before another one is journaled in its place."""
        return not any(record.version < version and record.step > step for version, step in self._rollbacks)
