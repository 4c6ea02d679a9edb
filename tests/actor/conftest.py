from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol import shelf
from tests.hub_harness import RunningHub
from tests.staging_harness import Bench


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(shelf, "HELD_S", 0.0)  # nobody is sent to an older snapshot
    root = tmp_path / "shm"
    root.mkdir()
    with RunningHub() as running:
        bench = Bench(running, root)
        yield bench
        for link in bench.links:
            link.close()
