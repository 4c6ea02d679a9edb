"""The engines' own metrics (vLLM's) on a page of their own, /engines: what each actor sent last, labelled by its name.

What actors send is not trusted: it is bounded in size (`protocol.engine_text`), read when the page is asked for, and a
text that does not parse is dropped and counted. Only families with an engine's prefix get through.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from protocol.engine_text import unpack
from protocol.errors import MalformedFrame

if TYPE_CHECKING:
    from learner.intake.server import IntakeServer

PREFIXES = ("vllm:", "fake:")
LABEL = "actor"


class EngineMetricsPage(Collector):
    """Of all actors that are connected. Scrapes come from several threads."""

    def __init__(self) -> None:
        self.server: IntakeServer | None = None
        """Set once there is one."""
        self._read: dict[str, tuple[bytes, list[Metric]]] = {}
        """Actor -> the text that it sent last, and what is in it."""
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """Families with the samples of all actors; of two types under one name the first counts."""
        merged: dict[str, Metric] = {}
        for actor, families in self._families():
            for family in families:
                into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                if into.type == family.type:
                    for sample in family.samples:
                        into.add_sample(sample.name, {**sample.labels, LABEL: actor}, sample.value)
        yield from merged.values()

    def _families(self) -> list[tuple[str, list[Metric]]]:
        """What each actor's text says; each text is read once."""
        if self.server is None:
            return []
        with self._lock:
            texts = self.server.engine_texts()
            self._read = {actor: read for actor, read in self._read.items() if texts.get(actor) is read[0]}
            for actor, text in texts.items():
                if actor not in self._read:
                    try:
                        self._read[actor] = text, families_of(unpack(text))
                    except MalformedFrame as error:
                        self.server.drop_engine_text(actor, str(error))
            return [(actor, self._read[actor][1]) for actor in texts if actor in self._read]


def families_of(text: str) -> list[Metric]:
    """Families of an engine in Prometheus' text format. Raises MalformedFrame for what is none, or not an engine's."""
    try:
        found = list(text_string_to_metric_families(text))
    except Exception as error:  # the parser promises ValueError and raises others, too
        raise MalformedFrame(f"{type(error).__name__}: {error}") from None
    for family in found:
        if not family.name.startswith(PREFIXES) or any(not one.name.startswith(family.name) for one in family.samples):
            raise MalformedFrame(f"family {family.name!r}, allowed: names with {' or '.join(PREFIXES)}")
    return found
