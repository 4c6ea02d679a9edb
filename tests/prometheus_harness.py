"""A real Prometheus for tests: the repository's configuration, other paths, shorter intervals. Not a test itself.

Where Debian's package `prometheus` is missing, tests are skipped with a word on how to install it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from deploy.prometheus.expressions import known_series
from learner.telemetry.sample import ACTOR_STATES, LEARNER_PHASES
from learner.telemetry.values import SIDES

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS_FILES = ROOT / "deploy" / "prometheus"
EVERY = "500ms"
"""Between two scrapes, two evaluations of rules."""
DEADLINE_S = 30.0

Series = list[tuple[dict[str, str], list[float]]]
"""Labels and values, oldest first, of every series of an answer."""


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`. Skips the test without."""
    if (found := shutil.which(name)) is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return found


def adapted_config(directory: Path, runs: Path) -> Path:
    """A copy of the repository's configuration that looks for runs in `runs`, and for Ray's file nowhere."""
    text = (PROMETHEUS_FILES / "prometheus.yml").read_text()
    rules = PROMETHEUS_FILES / "rules.yml"
    for pattern, replacement, times in (
        (r"\.\./\.\./runs/", f"{runs}/", 1),
        (r"- rules\.yml", f"- {rules}", 1),
        (r"/tmp/ray/", f"{directory}/", 1),
        (r"(interval|timeout): \d+s", rf"\1: {EVERY}", 7),
    ):
        text, found = re.subn(pattern, replacement, text)
        assert found == times, f"{pattern} stands {found} times in prometheus.yml, the test expects {times}"
    path = directory / "prometheus.yml"
    path.write_text(text)
    return path


class Prometheus:
    """Context manager: a Prometheus with the data in `directory`/data, on a free port of loopback."""

    def __init__(self, directory: Path, runs: Path) -> None:
        self.directory = directory
        self.config = adapted_config(directory, runs)
        self.log = directory / "prometheus.log"
        self.address = ""

    def __enter__(self) -> Prometheus:
        command = [program("prometheus"), f"--config.file={self.config}", "--web.listen-address=127.0.0.1:0",
                   f"--storage.tsdb.path={self.directory / 'data'}"]  # fmt: skip
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=self.directory)
        try:
            self.address = self.until(self._listening, "the address it listens on")
            self.until(lambda: self._ready(), "Prometheus to be ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _listening(self) -> str:
        found = re.search(r'msg="Listening on" address=(127\.0\.0\.1:\d+)', self.log.read_text())
        return f"http://{found[1]}" if found else ""

    def _ready(self) -> bool:
        try:
            with urlopen(f"{self.address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except URLError:
            return False

    def until(self, condition: Any, what: str) -> Any:
        """Wait for a condition; its value."""
        deadline = time.monotonic() + DEADLINE_S
        while not (value := condition()):
            assert self.process.poll() is None, f"Prometheus ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s for {what}:\n{self.log.read_text()}"
            time.sleep(0.1)
        return value

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the HTTP API. Raises ValueError with Prometheus' own words where it refuses."""
        try:
            with urlopen(f"{self.address}/api/v1/{path}?{urlencode(parameters)}", timeout=DEADLINE_S) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise ValueError(json.load(error)["error"]) from None

    def series(self, expression: str, window: tuple[float, float]) -> Series:
        """What an expression gives between two Unix times, a value a second; what is not a number is left out."""
        start, end = window
        data = self.get("query_range", query=expression, start=str(start), end=str(end), step="1")
        found = [(one["metric"], [float(value) for _, value in one["values"]]) for one in data["result"]]
        numbers = [(labels, [value for value in values if not math.isnan(value)]) for labels, values in found]
        return [(labels, values) for labels, values in numbers if values]


# --- figures of a run that never was ---------------------------------------------------------------------------------

LABEL_VALUES: Mapping[str, tuple[str, ...]] = {
    "run": ("backfilled",), "job": ("tandem",), "instance": ("backfilled",), "method": ("grpo",), "model": ("tiny",),
    "actor": ("actor-0", "actor-1"), "side": SIDES, "target": ("groups",), "reason": ("malformed",),
    "kind": ("resident", "gpu_allocated"), "le": ("0.5", "1.0", "+Inf"), "model_name": ("tiny",), "engine": ("0",),
    "finished_reason": ("stop", "length"), "alertname": ("TandemNoGroups",), "alertstate": ("firing",),
    "severity": ("critical",), "phase": (*LEARNER_PHASES, "total"), "state": (*ACTOR_STATES, "failed", "queued"),
}  # fmt: skip


def backfill_lines(start: int, seconds: int) -> Iterator[str]:
    """Every series that there may be, in OpenMetrics' text: counters grow by one a second, all else is 1."""
    for name, labels in known_series().items():
        ordered = sorted(labels)
        for values in product(*(LABEL_VALUES[label] for label in ordered)):
            shown = ",".join(f'{label}="{value}"' for label, value in zip(ordered, values, strict=True))
            for second in range(seconds):
                counted = second if re.search(r"_(total|bucket|sum|count)$", name) else 1
                yield f"{name}{{{shown}}} {counted} {start + second}"
    yield "# EOF"


def backfill(directory: Path, start: int, seconds: int) -> None:
    """Put these figures where a Prometheus in `directory` will find them."""
    text = directory / "backfill.txt"
    text.write_text("\n".join(backfill_lines(start, seconds)) + "\n")
    command = [program("promtool"), "tsdb", "create-blocks-from", "openmetrics", str(text), str(directory / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
