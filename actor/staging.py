"""Brings a whole version of the weights next to the engine and checks it there, before anything is swapped.

A version is staged as one safetensors file, in shared memory where that is large enough. Until the file is complete and
every digest fits, the engine serves its old version and knows nothing of it. Called by `loop.py`.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import WeightsError
from protocol.messages import Manifest, Welcome
from protocol.rundir import OWNER_FILE
from protocol.sockets import Link
from protocol.tensors import safetensors_header
from protocol.weights import check_data

SHARED_MEMORY = Path("/dev/shm")
RUN_LABEL_CHARS = 24


def safe_name(name: str) -> str:
    """The name as one part of a path: it may have come over the wire."""
    return re.sub(r"[^\w.-]", "_", name)


def engine_prefix(run: str) -> str:
    """How the names of engines' own directories begin: the end of the run's label, which is unique, since vLLM's
    sockets lie there and the path of a socket is short."""
    return f"tandem-{safe_name(run)[-RUN_LABEL_CHARS:]}-engine-"


@dataclass(frozen=True)
class Staged:
    """A complete, checked version on this node."""

    manifest: Manifest
    path: Path
    seconds: float
    """Fetch, digest check and writing together."""


class Staging:
    """Staging directory of one actor process. Holds the version being served and the next one."""

    def __init__(self, run: str, actor: str, incarnation: str, root: Path | None = None) -> None:
        self.root = root or SHARED_MEMORY
        self.name = safe_name(f"tandem-{run}-{actor}-{incarnation}")
        self.directory: Path | None = None

    def _place(self, needed_bytes: int) -> Path:
        """Directory with room for two versions: shared memory, else a plain temporary directory."""
        if self.directory is None:
            roomy = self.root.is_dir() and shutil.disk_usage(self.root).free > 2 * needed_bytes
            self.directory = (self.root if roomy else Path(tempfile.gettempdir())) / self.name
        if not self.directory.is_dir():  # also when somebody cleaned up around us
            self.directory.mkdir(mode=0o700, parents=True)
            (self.directory / OWNER_FILE).write_text(str(os.getpid()))
        return self.directory

    async def fetch(self, link: Link, manifest: Manifest, welcome: Welcome) -> Staged:
        """Pull a version, check every digest, keep it as a safetensors file.

        Raises WeightsError (bytes wrong or gone), DeadlineExceeded, OSError (no room); nothing is left behind then.
        """
        began = time.monotonic()
        path = self._place(manifest.total_bytes) / f"v{manifest.version}.safetensors"
        head = safetensors_header(manifest.tensors)
        part = path.with_suffix(".part")
        try:
            with open(part, "w+b") as file:
                file.write(head)
                file.flush()
                file.truncate(len(head) + manifest.total_bytes)
                descriptor = file.fileno()

                def write(offset: int, data: memoryview) -> None:
                    if os.pwrite(descriptor, data, len(head) + offset) != len(data):
                        raise WeightsError(f"version {manifest.version}: short write to {part}")

                await link.fetch(manifest, welcome.chunk_bytes, welcome.window, write)
                _check_file(descriptor, len(head), manifest)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return Staged(manifest, path, time.monotonic() - began)

    def keep_only(self, staged: Staged) -> None:
        """Remove every version but the one that is served now."""
        for path in staged.path.parent.glob("*.safetensors"):
            if path != staged.path:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the directory and all that is in it."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


def _check_file(descriptor: int, head_bytes: int, manifest: Manifest) -> None:
    """Digest check of what really lies in the file, not of what came from the socket."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        data = view[head_bytes:]
        try:
            check_data(manifest, data)
        finally:
            data.release()
            view.release()
