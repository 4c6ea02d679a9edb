"""Brings a whole version of the weights next to the engine and checks it there, before anything is swapped.

The actors of a node and run share one directory, in shared memory where that is large enough: two slots
(`slots.py`), the version that was staged last and the one before, which the next is written over. Who hears of a
version first stages it, the others find it. Until a slot is complete and every digest fits it is in no record, and the
engines serve their old version and know nothing of it. Locks are the kernel's, so a killed actor leaves none: what it
had staged is found again, what it was writing is written anew.

Called by `follower.py`; asks the link for bytes and knows no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actor.locks import FileLock, remove_unused
from actor.slots import SLOTS, Held, SlotFile, Slots, copy
from protocol.deltas import Changes, DeltaCoder, check_payload
from protocol.errors import WeightsError
from protocol.link import Link
from protocol.messages import Delta, Manifest, Update, Welcome
from protocol.rundir import USERS_FILE

SHARED_MEMORY = Path("/dev/shm")
RUN_LABEL_CHARS = 24
STAGE_TIMEOUT_S = 900.0
"""Longest wait for another actor of this node to stage a version, or to load one from the slot that is wanted."""
REMEMBERED_SHARE = 1 / 2
"""Of a version's bytes: what a chain of deltas changed is not remembered beyond that, and the slot is copied whole."""
MAX_HOPS = 5
"""Versions staged one after the other before one is swapped in: a snapshot, then the deltas made meanwhile."""

T = TypeVar("T")


def safe_name(name: str) -> str:
    """The name as one part of a path: it may have come over the wire."""
    return re.sub(r"[^\w.-]", "_", name)


def engine_prefix(run: str) -> str:
    """How the names of engines' own directories begin: the end of the run's label, which is unique, since vLLM's
    sockets lie there and the path of a socket is short."""
    return f"tandem-{safe_name(run)[-RUN_LABEL_CHARS:]}-engine-"


@dataclass
class Staged:
    """A complete, checked version on this node. Its slot is not written over before `release`."""

    manifest: Manifest
    path: Path
    lock: FileLock
    form: str
    """How it came here: "snapshot", "delta", or "found" where another actor, or this one's predecessor, staged it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of its stages: "fetch", "decode", "check"."""

    def release(self) -> None:
        """The engine has loaded it."""
        self.lock.release()


class Staging:
    """One actor's hold on the staging directory of its node and run."""

    def __init__(self, run: str, root: Path | None = None) -> None:
        self.root = root or SHARED_MEMORY
        self.name = safe_name(f"tandem-{run}-weights")
        self._users: FileLock | None = None
        self._slots = Slots(Path())
        self._coder = DeltaCoder()
        self._behind: tuple[str, str, Changes] | None = None
        """(digest of the older slot's version, of the newer one's, what changed between them), if this actor knows."""

    @property
    def directory(self) -> Path | None:
        """Where the slots are, once anything was staged."""
        return self._users.path.parent if self._users else None

    async def bring(
        self, link: Link, welcome: Welcome, news: Update | None, newest: int, serving: int
    ) -> Staged | None:
        """Stage the newest version, `newest` or a later one; None if the engine's own (`serving`) is the newest.

        `news`: what was published last, which may have all that is needed. Raises WeightsError (bytes wrong or gone),
        DeadlineExceeded, OSError (no room); nothing half done is in the record then.
        """
        version = 0
        for _ in range(MAX_HOPS):
            heard = news if news and news.manifest.version >= newest else None
            staged = await self._hop(link, welcome, heard, newest, serving)
            if staged is None or staged.manifest.version >= newest:
                return staged
            staged.release()
            if staged.manifest.version <= version:
                break
            version = staged.manifest.version
        raise WeightsError(f"version {newest} was announced, {version} can be had")

    async def _hop(self, link: Link, welcome: Welcome, news: Update | None, newest: int, serving: int) -> Staged | None:
        """Stage what the learner sends us to: the newest version, or an older snapshot to go on from, which may be
        older than `serving`, too, if the slots were lost. None if nothing newer is announced or to be had."""
        if self._users is None or not self._users.is_current:  # also when somebody cleaned up around us
            self.leave()
            await self._open(news.manifest if news else (await link.fetch_update()).manifest)
        async with self._writing():
            base = self._slots.newest()
            update = news if news and self._leads_on(news, base) else await self._ask(link, base)
            manifest = update.manifest
            slot, held = base or (0, Held(0, ""))
            if max(manifest.version, newest) <= serving:
                return None
            if held.digest != manifest.digest:
                return await self._bring_over(link, welcome, update, slot)
            lock = FileLock(self._slots.path(slot))
            await lock.take(True, "a staged version", STAGE_TIMEOUT_S)
        return await self._found(lock, slot, manifest)

    async def _bring_over(self, link: Link, welcome: Welcome, update: Update, base: int) -> Staged:
        """Stage what the update leads to: its chain of deltas from the slot `base` on, or a snapshot."""
        began = time.perf_counter()
        if update.chain:
            payload = update.payload or await self._pull_chain(link, welcome, update.chain)

            def decode(file: SlotFile, before: str) -> Awaitable[None]:
                return _thread(self._apply, update, payload, base, file, before)

            return await self._stage(update.manifest, "delta", began, decode)

        def pull(file: SlotFile, before: str) -> Awaitable[None]:
            return self._pull_snapshot(link, welcome, file)

        return await self._stage(update.manifest, "snapshot", began, pull)

    async def _ask(self, link: Link, base: tuple[int, Held] | None) -> Update:
        held = base[1] if base else Held(0, "")
        update = await link.fetch_update(held.version, held.digest)
        if update.chain and (base is None or update.chain[0].base_digest != held.digest):
            raise WeightsError(f"deltas from {update.chain[0].base} on, this node has version {held.version}")
        return update

    @staticmethod
    def _leads_on(news: Update, base: tuple[int, Held] | None) -> bool:
        """Whether nothing need be asked: the version is here, or its delta applies to what is."""
        if base is None:
            return False
        held = base[1].digest
        return news.manifest.digest == held or bool(news.chain and news.chain[0].base_digest == held)

    # --- one version ---

    async def _stage(
        self, manifest: Manifest, form: str, began: float, fill: Callable[[SlotFile, str], Awaitable[None]]
    ) -> Staged:
        """Fill the older slot, check it, and only then put it into the record.

        `fill(file, before)`: the latter is the digest of the version that the file holds until now, "" for none."""
        slot = self._slots.oldest()
        lock = FileLock(self._slots.path(slot))
        try:
            await lock.take(False, "an engine of this node to have loaded its weights", STAGE_TIMEOUT_S)
            before = self._slots.held().get(slot, Held(0, "")).digest
            self._slots.forget(slot)
            file = self._slots.allocate(slot, manifest)
            fetched = time.perf_counter()
            await fill(file, before)
            filled = time.perf_counter()
            try:
                await _thread(file.check)
            except WeightsError:
                if form == "delta":  # what it was made from is not to be trusted either
                    self._distrust()
                raise
            self._slots.record(slot, manifest)
            lock.try_to(share=True)
        except BaseException:
            lock.release()
            raise
        now = time.perf_counter()
        if form == "snapshot":
            fetched = filled  # its bytes go straight into the slot
        seconds = {"fetch": fetched - began, "decode": filled - fetched, "check": now - filled}
        return Staged(manifest, file.path, lock, form, seconds)

    async def _found(self, lock: FileLock, slot: int, manifest: Manifest) -> Staged:
        """What another actor has staged, its slot held by `lock`. It is checked again, since nobody knows what happened
        to it meanwhile, but not under the lock for writing: the actors of a node check at the same time."""
        began = time.perf_counter()
        try:
            file = self._slots.open(slot, manifest)
            await _thread(file.check)
        except BaseException as error:
            lock.release()  # first: whoever may write waits for it
            if isinstance(error, WeightsError):
                async with self._writing():
                    if self._slots.held().get(slot, Held(0, "")).digest == manifest.digest:
                        self._slots.forget(slot)
            raise
        return Staged(manifest, file.path, lock, "found", {"check": time.perf_counter() - began})

    def _distrust(self) -> None:
        """Nothing that lies here is what it should be: the next version comes as a snapshot."""
        self._slots.forget(*range(SLOTS))
        self._behind, self._coder = None, DeltaCoder()  # they know the wrong bytes

    async def _pull_snapshot(self, link: Link, welcome: Welcome, file: SlotFile) -> None:
        self._behind, manifest, target = None, file.manifest, file.data

        def write(offset: int, data: memoryview) -> None:
            target[offset : offset + len(data)] = data

        await link.fetch(manifest.version, manifest.total_bytes, welcome.chunk_bytes, welcome.window, write)

    async def _pull_chain(self, link: Link, welcome: Welcome, chain: tuple[Delta, ...]) -> memoryview:
        payload = bytearray(sum(delta.nbytes for delta in chain))
        start = 0
        for delta in chain:

            def write(offset: int, data: memoryview, start: int = start) -> None:
                payload[start + offset : start + offset + len(data)] = data

            await link.fetch(delta.version, delta.nbytes, welcome.chunk_bytes, welcome.window, write, "delta")
            start += delta.nbytes
        return memoryview(payload)

    def _apply(self, update: Update, payload: bytes | memoryview, base: int, file: SlotFile, before: str) -> None:
        """Make the file the base's equal, then what the chain of deltas makes of it."""
        source = self._slots.open(base, update.manifest)
        held = self._slots.held()[base]
        behind, self._behind = self._behind, None
        copy(source, file, behind[2] if behind and behind[:2] == (before, held.digest) else None)
        changes: Changes | None = []
        view = memoryview(payload)
        for delta in update.chain:
            part, view = view[: delta.nbytes], view[delta.nbytes :]
            check_payload(delta, part)
            try:
                found = self._coder.decode(delta, part, update.manifest.tensors, file.data)
            except WeightsError:  # the payload is right: the base is not
                self._distrust()
                raise
            if changes is not None:
                changes += found
                size = sum(indices.nbytes for _, indices, _ in changes if indices is not None)
                changes = changes if size <= REMEMBERED_SHARE * update.manifest.total_bytes else None
        self._behind = (held.digest, update.manifest.digest, changes) if changes is not None else None

    # --- the directory ---

    async def _open(self, manifest: Manifest) -> None:
        """Join the node's directory, or make it: where another actor has it, else where there is room for two."""
        places = [self.root, Path(tempfile.gettempdir())]
        found = [place for place in places if (place / self.name / USERS_FILE).exists()]
        needed = SLOTS * manifest.total_bytes
        roomy = [place for place in places if place.is_dir() and shutil.disk_usage(place).free > needed]
        directory = ([*found, *roomy] or places[1:])[0] / self.name
        while True:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the last one to leave has removed it meanwhile
                _check_private(directory)
                users = FileLock(directory / USERS_FILE)
                await users.take(True, "the node's staging directory", STAGE_TIMEOUT_S)
                if users.is_current:
                    break
                users.release()
        self._users, self._slots = users, Slots(directory)

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """Within, this actor alone writes slots and their record."""
        assert self._users is not None
        lock = FileLock(self._users.path.with_name("writing.lock"))
        try:
            await lock.take(False, "another actor of this node to stage a version", STAGE_TIMEOUT_S)
            yield
        finally:
            lock.release()

    def leave(self, keep: bool = False) -> None:
        """Let go of the directory; the last one removes it, unless what is in it is to be kept for a successor."""
        if self._users is not None:
            if not keep:
                remove_unused(self._users.path.parent, self._users)
            self._users.release()
            self._users, self._slots = None, Slots(Path())  # a removed file takes up its room while it is mapped


def _check_private(directory: Path) -> None:
    """Raise OSError for a directory that somebody else has made: its name can be guessed."""
    status = directory.lstat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077 or not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{directory} is not this user's alone")


async def _thread(function: Callable[..., T], *arguments: Any) -> T:
    """Result of a function that runs in a thread. Cancelled, it waits for the thread: that one may still be writing."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise
