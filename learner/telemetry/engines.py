"""The engines' own metrics (vLLM's) on a page of their own, /engines: what each actor sent last, labelled by its name.

What actors send is not trusted: it is bounded in size (`protocol.engine_text`), and a text that is not what an engine's
metrics look like is dropped as a whole and counted. One that is keeps its lines; only the label is put into them, once
for each text, so that a page of hundreds of actors costs the learner little (docs/operations.md has the figures).
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from protocol.engine_text import unpack
from protocol.errors import MalformedFrame

if TYPE_CHECKING:
    from learner.intake.server import IntakeServer

PREFIXES = ("vllm:", "fake:")
LABEL = "actor"
OURS = frozenset({"run", "job", "instance"})
"""Labels of the target. Prometheus lets the page decide on them (`honor_labels`), so no actor may."""
MAX_LINES = 10_000
"""Of one text. vLLM 0.32 has about 400 for each of its engines."""
MAX_ACTOR_CHARACTERS = 256
"""Of a name, which stands in every line."""
MAX_LABELS_CHARACTERS = 4_096
"""Of one line. vLLM's longest one lists its configuration."""
REMEMBERED_LABELS = 2_048
"""Lines of all actors, in all of their texts, share few sets of labels: each is read once."""

KINDS = {
    "counter": ("",),
    "gauge": ("",),
    "untyped": ("",),
    "summary": ("", "_sum", "_count"),
    "histogram": ("_bucket", "_sum", "_count"),
}
"""Type -> how the names of its samples end."""

_NAME = rf"(?:{'|'.join(PREFIXES)})[a-zA-Z0-9_:]+"
_NUMBER = r"(?:[+-]?[0-9]{1,308}+(?:\.[0-9]{1,308}+)?(?:e[+-]?[0-9]{1,3}+)?|[+-]?Inf|NaN)"
_CONTROL = r"\x00-\x1f\x7f-\x9f"
_LABEL = rf'([a-zA-Z_][a-zA-Z0-9_]*+)="([^"\\{_CONTROL}]*+(?:\\[\\"n][^"\\{_CONTROL}]*+)*+)"'

NUMBER = re.compile(_NUMBER)
"""What both Python and Go write; Go refuses a page for anything that it cannot read."""
ONE_LABEL = re.compile(_LABEL)
LABELS = re.compile(rf"{_LABEL}(?:,{_LABEL})*+")
HELP = re.compile(rf"[^\\{_CONTROL}]*+(?:\\[\\n][^\\{_CONTROL}]*+)*+")
LINE = re.compile(
    rf"^(?:({_NAME})(?:\{{(.*)\}})? ({_NUMBER})|# (HELP|TYPE) ({_NAME})(?: (.*))?|(.*))$",
    re.MULTILINE,
)
"""(name, labels, value) of a sample, (HELP or TYPE, family, text) of a header, or (what is neither). A value has no
brace, so the labels end at the last one; what they are is looked at by `other_labels`."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family of one actor's text that has samples."""

    name: str
    kind: str
    help: str
    """As it is written, with its escapes."""
    names: tuple[str, ...]
    """That no other family may have: its own and those of its samples."""
    samples: bytes
    """Their lines, with the actor's name."""


class EngineMetricsPage:
    """Of all actors that are connected. Scrapes come from several threads."""

    def __init__(self) -> None:
        self.server: IntakeServer | None = None
        """Set once there is one."""
        self._read: dict[str, tuple[bytes, list[Family]]] = {}
        """Actor -> the text that it sent last, and what is in it."""
        self._lock = threading.Lock()

    def text(self) -> bytes:
        """The page, in Prometheus' text format: each family once, with the samples of all actors."""
        return merged(chain.from_iterable(self._families()))

    def _families(self) -> list[list[Family]]:
        """What each actor's text says; each text is read once. The intake's lock is taken for a copy of its list."""
        if self.server is None:
            return []
        with self._lock:
            texts = self.server.engine_texts()
            self._read = {actor: read for actor, read in self._read.items() if texts.get(actor) is read[0]}
            for actor, text in texts.items():
                if actor not in self._read:
                    try:
                        self._read[actor] = text, families_of(unpack(text), actor)
                    except MalformedFrame as error:
                        self.server.drop_engine_text(actor, str(error))
            return [self._read[actor][1] for actor in texts if actor in self._read]


def merged(families: Iterable[Family]) -> bytes:
    """One page. Of families that cannot stand on it together, such as two types under one name, the first counts."""
    pages: dict[str, list[bytes]] = {}
    kinds: dict[str, str] = {}
    taken: set[str] = set()
    for family in families:
        if family.name not in kinds:
            if not taken.isdisjoint(family.names):
                continue
            taken.update(family.names)
            kinds[family.name], pages[family.name] = family.kind, [_headers(family)]
        if kinds[family.name] == family.kind:
            pages[family.name].append(family.samples)
    return b"".join(chain.from_iterable(pages.values()))


def _headers(family: Family) -> bytes:
    said = f"# HELP {family.name} {family.help}\n" if family.help else ""
    return f"{said}# TYPE {family.name} {family.kind}\n".encode()


# --- one actor's text -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    """A family that is being read."""

    name: str
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "untyped"
    sampled: tuple[str, ...] = ()
    """Names that its samples may have."""
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampled = (self.name,)

    def header(self, what: str, said: str) -> None:
        self.headers[what] = said
        if what == "TYPE":
            if said not in KINDS:
                raise MalformedFrame(f"type {said[:40]!r} of {self.name}, allowed: {', '.join(KINDS)}")
            self.kind, self.sampled = said, tuple(self.name + end for end in KINDS[said])
        elif not HELP.fullmatch(said):
            raise MalformedFrame(f"help of {self.name}: {said[:80]!r}, allowed: text, \\\\ and \\n")

    def done(self) -> Family:
        names = tuple(dict.fromkeys((self.name, *self.sampled)))
        return Family(self.name, self.kind, self.headers.get("HELP", ""), names, "".join(self.lines).encode())


def families_of(text: str, actor: str) -> list[Family]:
    """Families of an engine in Prometheus' text format, labelled with the actor's name in place of what they say.

    Taken is what clients of Prometheus write: no blanks beyond the needed ones, no comments but HELP and TYPE, no
    timestamps, a family's lines together. Raises MalformedFrame for anything else, and for what is not an engine's."""
    if len(actor) > MAX_ACTOR_CHARACTERS:
        raise MalformedFrame(f"an actor's name of {len(actor)} characters, allowed: {MAX_ACTOR_CHARACTERS}")
    if (count := text.count("\n")) > MAX_LINES:
        raise MalformedFrame(f"{count} lines, allowed: {MAX_LINES}")
    if text and not text.endswith("\n"):
        raise MalformedFrame("the last line has no end")
    tag = f'{LABEL}="{escaped(actor)}"'
    drafts: dict[str, _Draft] = {}
    draft = _Draft("")
    for name, labels, value, header, family, said, other in LINE.findall(text):
        if name:
            if name not in draft.sampled:
                draft = _begin(drafts, name)
            if "e" in value and overflows(value):
                raise MalformedFrame(f"value {value[:40]!r} of {name}, allowed: finite ones, +Inf, -Inf and NaN")
            draft.lines.append(f"{name}{{{tag}{other_labels(labels) if labels else ''}}} {value}\n")
        elif header:
            if family != draft.name or header in draft.headers or draft.lines:
                draft = _begin(drafts, family)
            draft.header(header, said)
        elif other:
            raise MalformedFrame(f"line {other[:80]!r}, allowed: samples, HELP and TYPE of {' and '.join(PREFIXES)}")
    families = [draft.done() for draft in drafts.values()]
    names = [name for family in families for name in family.names]
    if len(set(names)) < len(names):
        raise MalformedFrame("a family has a name that belongs to another one's samples")
    return [family for family in families if family.samples]


def _begin(drafts: dict[str, _Draft], name: str) -> _Draft:
    if name in drafts:
        raise MalformedFrame(f"family {name[:80]!r} comes twice")
    drafts[name] = _Draft(name)
    return drafts[name]


@lru_cache(REMEMBERED_LABELS)
def other_labels(labels: str) -> str:
    """What stands between the braces, without the actor, to be appended to it: "" or `,a="b",…`.

    Raises MalformedFrame for what are no labels, or not an engine's."""
    if len(labels) > MAX_LABELS_CHARACTERS:
        raise MalformedFrame(f"{len(labels)} characters of labels in a line, allowed: {MAX_LABELS_CHARACTERS}")
    if not LABELS.fullmatch(labels):
        raise MalformedFrame(f'labels {labels[:80]!r}, allowed: name="value", separated by commas')
    pairs = ONE_LABEL.findall(labels)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise MalformedFrame(f"labels {labels[:80]!r}, allowed: each name once")
    for name, value in pairs:
        if name.startswith("__") or name in OURS:
            raise MalformedFrame(f"label {name[:40]!r}, which is not the engine's to give")
        if name in ("le", "quantile") and (not NUMBER.fullmatch(value) or overflows(value)):
            raise MalformedFrame(f"label {name}={value[:40]!r}, allowed: a number")
    return "".join(f',{name}="{value}"' for name, value in pairs if name != LABEL)


def overflows(number: str) -> bool:
    """Whether a finite number is too large for a float."""
    return not number.endswith("Inf") and math.isinf(float(number))


def escaped(value: str) -> str:
    """A label's value as it stands between the quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
