"""Where a run keeps its files, and how a file is replaced so that nobody ever reads half of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from protocol.errors import RecipeError

OWNER_FILE = "owner.pid"
"""In a temporary directory: the process it belongs to, so that leftovers of a killed one can be told and removed."""

ASKED_S = 0.2
"""Longer than `RunDir.is_held` holds a lock."""

USERS_FILE = "users.lock"
"""In a temporary directory that several processes share: each holds a shared lock on it while it lives."""


@dataclass(frozen=True)
class RunDir:
    """The files of one run. The learner writes them, the launcher and people read them."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def endpoint(self) -> Path:
        """{"work": tcp://…, "keys": bool}: where actors find the learner, also after it was restarted."""
        return self.path / "endpoint.json"

    @property
    def scale(self) -> Path:
        """How many actors are wanted (`protocol/scaling.py`)."""
        return self.path / "scale.json"

    @property
    def actors(self) -> Path:
        """How the launcher's actors get on (`protocol/scaling.py`)."""
        return self.path / "actors.json"

    @property
    def keys(self) -> Path:
        """Who may talk to the learner (`keys.py`): private, made by the launcher."""
        return self.path / "keys"

    @property
    def actor_keys(self) -> Path:
        """What an actor of the run needs to be let in."""
        return self.keys / "actor.json"

    @property
    def status(self) -> Path:
        """What the learner is doing now, replaced about once a second."""
        return self.path / "status.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        """What the run was doing, about once a second (`learner/telemetry/sample.py`)."""
        return self.path / "timeline.jsonl"

    @property
    def events(self) -> Path:
        """One line for everything that happened once: {"t": Unix time, "kind": …, "text": …}."""
        return self.path / "events.jsonl"

    @property
    def scrape_targets(self) -> Path:
        """Where Prometheus finds the learner's metrics, as its file_sd_configs wants it; while the learner lives.

        Beside the run's directory: Prometheus takes a `*` in the last part of a path only, and is to find every run."""
        return self.path.parent / f"metrics-targets-{self.path.name}.json"

    @property
    def rollouts(self) -> Path:
        """What the rollout browser shows beside the journal: the tokenizer, and the learner's logprobs of each step."""
        return self.path / "rollouts"

    @property
    def versions(self) -> Path:
        """One line for every version number ever reserved: a number never names other bytes."""
        return self.path / "versions.jsonl"

    @property
    def journal(self) -> Path:
        return self.path / "journal" / "groups.journal"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def ranks(self) -> Path:
        """Where the learner's processes find each other, if there are several; while they live."""
        return self.path / "ranks.store"

    @property
    def reference(self) -> Path:
        """Weights of the reference policy, where the method has one."""
        return self.path / "reference.safetensors"

    @property
    def abandoned_metrics(self) -> Path:
        """Rows of metrics.jsonl whose steps a rollback has given up."""
        return self.path / "metrics-abandoned.jsonl"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def curve(self) -> Path:
        return self.path / "reward.png"

    @property
    def label(self) -> str:
        """The run's name among all runs of this machine: its directory's name and a number drawn once (`run.id`)."""
        path = self.path / "run.id"
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(secrets.token_hex(4))
        return f"{self.path.name}-{path.read_text()}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints, also of one that was cut short while it was replaced."""
        found = (re.fullmatch(r"(?:\.old-)?step-(\d{8,})(?:-b\d+)?", path.name) for path in self.checkpoints.glob("*"))
        return sorted({int(match[1]) for match in found if match})

    @contextlib.contextmanager
    def lock(self, role: Literal["learner", "launcher"]) -> Iterator[None]:
        """One learner writes the run's journal and version numbers, one launcher starts and cleans up.

        Raises RecipeError if another process has the role."""
        with open(self.path / f"{role}.lock", "a+") as file:
            deadline = time.monotonic() + ASKED_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:  # else somebody may only have asked (`is_held`)
                        file.seek(0)
                        holder = file.read() or "unknown"
                        raise RecipeError(f"{self.path}: this run is in use by process {holder}") from None
                time.sleep(0.01)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def is_held(self, role: Literal["learner", "launcher"]) -> bool:
        """Whether a process has the role now."""
        try:
            with open(self.path / f"{role}.lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def create(self) -> RunDir:
        for directory in (self.path, self.journal.parent, self.checkpoints, self.eval, self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        return self


def replace_file(path: Path, data: str | bytes, mode: int = 0o644) -> None:
    """Write a file so that readers see the old content or the new, never a part of either."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file. NaN and infinity, which JSON lacks, are refused."""
    replace_file(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None where there is none (yet)."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def read_jsonl(path: Path) -> list[Any]:
    """Rows of a JSONL file; a torn last line is left out. Raises ValueError for any other line that is no JSON."""
    rows = []
    lines = path.read_text().split("\n") if path.exists() else [""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: found {line[:60]!r}, which is no JSON ({error})") from None
    return rows


class LineTail:
    """The lines that come to a file, also where its writer replaces it. Not for several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = self._offset = 0

    def new(self) -> tuple[Iterator[bytes], bool]:
        """(lines since the last call, whether the file is another one, so that what was read before is void).

        Lines are read as they are taken: a long run's file is never in memory whole. A torn last line waits for its
        rest."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - `_whole_lines` closes it
        except FileNotFoundError:
            return iter(()), False
        found = os.fstat(file.fileno())
        replaced = found.st_ino != self._inode or found.st_size < self._offset
        if replaced:
            self._inode, self._offset = found.st_ino, 0
        return self._whole_lines(file), replaced

    def _whole_lines(self, file: BinaryIO) -> Iterator[bytes]:
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line[:-1]


def cut_torn_line(path: Path) -> None:
    """Cut what follows the last line end of a file that is to be appended to: the writer died in the middle of it."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
