"""The run's keys on disk: who may talk to its learner, and whom its actors talk to. Made once by the launcher.

    RUN/keys/                0700
      learner.json           0600  the learner's pair
      actor.json             0600  all that an actor needs: the learner's public key, and a pair of its own
      allowed/NAME.pub             one public key a file: the allow-list, read again while the run goes on

Keys are CURVE's (Curve25519), in Z85: 40 characters. Secrets are in these files and in two processes' memory, never in
an argument, an environment or a log. What is done with them on sockets is in `door.py` (learner) and `link.py`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from protocol.errors import KeysError
from protocol.rundir import replace_file

log = logging.getLogger(__name__)

LEARNER_FILE, ACTOR_FILE, ALLOWED = "learner.json", "actor.json", "allowed"
RUN_ACTORS = "actors"
"""Name on the allow-list of the pair that all actors of the run share."""
REREAD_S = 0.25
"""The allow-list is looked at again when a peer knocks, at most so often."""
MAX_FILE_BYTES = 4096


@dataclass(frozen=True)
class KeyPair:
    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class LearnerKeys:
    """What a learner needs: its pair, and the directory that says which public keys are allowed."""

    own: KeyPair
    allowed: Path


@dataclass(frozen=True)
class ActorKeys:
    """What an actor needs: the learner's public key, which nobody else can answer for, and a pair."""

    learner: str
    own: KeyPair


def make_keys(directory: Path) -> None:
    """Make what is missing in a run's key directory; what is there stays, so that a resumed run keeps its actors.

    Raises KeysError for a directory or a file that others can read, or that is damaged."""
    allowed = directory / ALLOWED
    for place in (directory, allowed):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(place, os.stat(place))
    if not (directory / LEARNER_FILE).exists():
        _write(directory / LEARNER_FILE, _pair_to_json(new_pair()))
    learner = load_learner_keys(directory).own.public
    if not (directory / ACTOR_FILE).exists():
        pair = new_pair()
        allow(allowed, RUN_ACTORS, pair.public)  # first: a file that is there means that its key was allowed
        _write(directory / ACTOR_FILE, {"learner": learner, **_pair_to_json(pair)})
    if (found := load_actor_keys(directory / ACTOR_FILE).learner) != learner:
        raise KeysError(
            f"{directory / ACTOR_FILE}: found the public key {found[:8]}… of another learner, allowed: that of"
            f" {LEARNER_FILE}; remove the file to have it made again"
        )


def new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def load_learner_keys(directory: Path) -> LearnerKeys:
    """The learner's keys. Raises KeysError if there are none, if others can read them, or if they are damaged."""
    path = directory / LEARNER_FILE
    try:
        data = _read(path)
    except FileNotFoundError:
        raise KeysError(
            f"{path}: no such file; allowed: the keys that the launcher and `tandem learner` make, or"
            " wire.no_keys_on_trusted_network = true"
        ) from None
    _check_private(directory, os.stat(directory))
    return LearnerKeys(_pair_of(path, data), directory / ALLOWED)


def load_actor_keys(path: Path) -> ActorKeys:
    """An actor's keys from its file. Raises FileNotFoundError, or KeysError if others can read it or it is damaged."""
    data = _read(path)
    return ActorKeys(_key_of(path, data, "learner"), _pair_of(path, data))


def allow(allowed: Path, name: str, public: str) -> None:
    """Put a public key on an allow-list; to withdraw it, remove NAME.pub. Raises ValueError for what is no key."""
    if not is_key(public) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"allowed key: found {public!r} of {name!r}, allowed: 40 characters of Z85, and a plain name")
    replace_file(allowed / f"{name}.pub", public + "\n", mode=0o600)


def is_key(text: object) -> bool:
    """Whether a text is a key: 40 characters of Z85."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}", text):
        return False
    try:
        return len(z85.decode(text.encode())) == 32
    except (ValueError, struct.error):
        return False


class AllowList:
    """The public keys in a directory, by their file's name. Read again when the directory has changed."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._clock = directory, clock
        self._names: dict[str, str] = {}
        self._seen: object = None
        self._looked_at = -REREAD_S
        self._said = ""

    def name_of(self, public: str) -> str | None:
        """Name under which a key is allowed, None if it is not. Whatever cannot be read allows nobody."""
        now = self._clock()
        if now - self._looked_at >= REREAD_S:
            self._looked_at = now
            try:
                self._look()
            except (OSError, KeysError) as error:
                self._names, self._seen = {}, None
                self._say(f"nobody is let in: {error}")
        return self._names.get(public)

    def _look(self) -> None:
        _check_private(self._directory, os.stat(self._directory))
        with os.scandir(self._directory) as entries:
            files = sorted(
                (entry.name, entry.stat().st_mtime_ns, entry.stat().st_size, entry.inode())
                for entry in entries
                if entry.name.endswith(".pub") and not entry.name.startswith(".")
            )
        if files == self._seen:
            return
        names = {}
        for file, _, size, _ in files:
            text = (self._directory / file).read_text(errors="replace").strip() if size <= MAX_FILE_BYTES else ""
            if is_key(text):
                names[text] = file.removesuffix(".pub")
            else:
                self._say(
                    f"{self._directory / file}: found no key, allowed: 40 characters of Z85; nobody is let in by it"
                )
        if self._seen is not None or not names:
            log.info("the allow-list has changed: %s", ", ".join(sorted(names.values())) or "nobody")
        self._names, self._seen = names, files

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            log.error("%s", text)


# --- files ----------------------------------------------------------------------------------------------------------


def _write(path: Path, value: dict[str, str]) -> None:
    """Through a temporary file that nobody else can read from its first byte on."""
    replace_file(path, json.dumps(value, indent=1) + "\n", mode=0o600)


def _read(path: Path) -> Any:
    """Content of a private file. The checks are of the file that is read, not of one of its name."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        _check_private(path, status)
        text = file.read(MAX_FILE_BYTES)
    try:
        return json.loads(text)
    except ValueError:
        raise KeysError(f"{path}: found no JSON, allowed: a file that `tandem` made") from None  # without its content


def _check_private(path: Path, status: os.stat_result) -> None:
    kind = "directory" if stat.S_ISDIR(status.st_mode) else "file"
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        raise KeysError(f"{path}: found no {kind}, allowed: a regular file or a directory")
    if status.st_uid not in (os.geteuid(), 0):
        raise KeysError(
            f"{path}: found owner {status.st_uid}, allowed: the user who runs this ({os.geteuid()}), or root"
        )
    if mode := stat.S_IMODE(status.st_mode) & 0o077:
        wanted = "0700" if kind == "directory" else "0600"
        raise KeysError(
            f"{path}: found mode {stat.S_IMODE(status.st_mode):04o}, allowed: {wanted}, nothing for others (go-rwx"
            f" mends {mode:03o}; but take keys that others could read for known, and make new ones)"
        )


def _key_of(path: Path, data: Any, name: str) -> str:
    found = data.get(name) if isinstance(data, dict) else None
    if not is_key(found):
        raise KeysError(f"{path}: {name}: found no key, allowed: 40 characters of Z85")
    return str(found)


def _pair_of(path: Path, data: Any) -> KeyPair:
    pair = KeyPair(_key_of(path, data, "public"), _key_of(path, data, "secret"))
    if zmq.curve_public(pair.secret.encode()).decode() != pair.public:
        raise KeysError(f"{path}: found a public key that is not of its secret key, allowed: a pair")
    return pair


def _pair_to_json(pair: KeyPair) -> dict[str, str]:
    return {"public": pair.public, "secret": pair.secret}
