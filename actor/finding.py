"""Where an actor finds its learner, and with which keys: asked at the start, and again when the learner is silent.

A finder answers at once or raises: OSError or ValueError while there is no learner yet (it is asked again), KeysError
for keys that cannot be used (the actor ends). Called by `loop.py` in a thread of its own, since it may read files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from protocol.keys import ActorKeys, load_actor_keys
from protocol.rundir import RunDir

NAMESPACE = "tandem"
"""Ray's, of every run's desk: it is found from another driver."""
DESK_PREFIX = "tandem-desk-"


def desk_name(label: str) -> str:
    """Ray's name of a run's desk (`deploy/desk.py`), which knows where its learner is."""
    return DESK_PREFIX + label


@dataclass(frozen=True)
class Address:
    """The learner's work socket, and the keys that it asks for; None: it uses none."""

    work: str
    keys: ActorKeys | None = None


FindLearner = Callable[[], Address]


def finder(learner: str, key_file: str = "") -> FindLearner:
    """The finder for what a person writes: tcp://HOST:PORT, or the path of a run's endpoint.json."""
    return fixed(learner, key_file) if "://" in learner else file_finder(Path(learner), key_file)


def fixed(work: str, key_file: str = "") -> FindLearner:
    """A learner that does not move. Raises KeysError for a key file that cannot be used, ValueError without one."""
    address = Address(work, _load(key_file) if key_file else None)
    return lambda: address


def file_finder(path: Path, key_file: str = "") -> FindLearner:
    """A learner that keeps its address in a file; its keys lie beside it, unless a key file is named."""
    beside = RunDir(path.parent).actor_keys

    def find() -> Address:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("work"), str):
            raise ValueError(f"{path}: found no address, allowed: what a learner wrote")
        if key_file:
            return Address(found["work"], _load(key_file))
        return Address(found["work"], load_actor_keys(beside) if found.get("keys") else None)

    return find


def _load(key_file: str) -> ActorKeys:
    try:
        return load_actor_keys(Path(key_file))
    except OSError as error:
        raise ValueError(f"--key: found {key_file!r}, allowed: a copy of RUN/keys/actor.json ({error})") from None
