"""Staging: a version lies next to the engine whole and checked, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import namedtuple
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from actor import staging as staging_module
from actor.staging import Staged, Staging
from protocol.errors import WeightsError
from protocol.messages import Manifest, Welcome
from protocol.sockets import Link
from protocol.weights import Snapshot, layout, make_snapshot
from tests.hub_harness import RunningHub

WELCOME = Welcome(
    run="r", model="m", dtype="bfloat16", max_model_len=64, bulk="", news="", heartbeat_s=1.0, dead_after_s=15.0,
    seed=0, group_size=2, chunk_bytes=50, window=2,
)  # fmt: skip
SPECS = layout([("w", "bfloat16", (10, 20)), ("b", "float32", (7,)), ("scale", "float32", ())])
SIZE = 10 * 20 * 2 + 7 * 4 + 4


def snapshot(version: int) -> Snapshot:
    generator = torch.Generator().manual_seed(version)
    data = torch.randint(0, 128, (SIZE,), dtype=torch.uint8, generator=generator)
    return make_snapshot(version, version, SPECS, memoryview(data.numpy()))


class Bench:
    """A hub, a link to it, and a staging directory under a root of the test's own."""

    def __init__(self, running: RunningHub, link: Link, root: Path) -> None:
        self.running, self.link = running, link
        self.staging = Staging("r", "actor-0", "abc", root)

    async def fetch(self, version: Snapshot) -> Staged:
        self.running.run(lambda: self.running.hub.announce(version))
        return await self.staging.fetch(self.link, await self.link.fetch_manifest(), WELCOME)

    @property
    def files(self) -> list[str]:
        assert self.staging.directory is not None
        return sorted(path.name for path in self.staging.directory.iterdir())


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    root = tmp_path / "shm"
    root.mkdir()
    with RunningHub() as running:
        link = Link(running.hub.work_endpoint, "actor-0", "abc")
        link.open_weights(running.hub.bulk_endpoint, running.hub.news_endpoint)
        yield Bench(running, link, root)
        link.close()


async def test_staged_file_holds_the_version_bit_for_bit(bench: Bench) -> None:
    version = snapshot(1)
    staged = await bench.fetch(version)
    assert staged.manifest == version.manifest
    assert staged.path == bench.staging.root / "tandem-r-actor-0-abc" / "v1.safetensors"
    loaded = load_file(staged.path)
    assert set(loaded) == {"w", "b", "scale"}
    for spec in SPECS:
        data = loaded[spec.name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data == bytes(version.data[spec.offset : spec.offset + len(data)])
    assert bench.files == ["owner.pid", "v1.safetensors"]


async def test_directory_that_somebody_removed_is_made_again(bench: Bench) -> None:
    first = await bench.fetch(snapshot(1))
    shutil.rmtree(first.path.parent)
    second = await bench.fetch(snapshot(2))
    assert second.path.parent == first.path.parent
    assert second.path.is_file()
    assert (second.path.parent / "owner.pid").read_text() == str(os.getpid())


async def test_directory_is_private_and_names_its_owner(bench: Bench) -> None:
    staged = await bench.fetch(snapshot(1))
    assert stat.S_IMODE(staged.path.parent.stat().st_mode) == 0o700
    assert (staged.path.parent / "owner.pid").read_text() == str(os.getpid())


@pytest.mark.parametrize("run", ["../escaped", "/etc", "a/b"])
def test_name_from_the_wire_never_leads_out_of_the_root(tmp_path: Path, run: str) -> None:
    assert "/" not in Staging(run, "../actor", "abc", tmp_path).name


async def test_only_the_version_in_service_is_kept(bench: Bench) -> None:
    first = await bench.fetch(snapshot(1))
    second = await bench.fetch(snapshot(2))
    assert bench.files == ["owner.pid", "v1.safetensors", "v2.safetensors"], "the old one until the swap is done"
    bench.staging.keep_only(second)
    assert bench.files == ["owner.pid", "v2.safetensors"]
    assert not first.path.exists()
    bench.staging.remove()
    assert not second.path.parent.exists()
    bench.staging.remove()


async def test_small_shared_memory_is_left_for_a_plain_directory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * SIZE))  # two versions just do not fit
    monkeypatch.setattr(staging_module.tempfile, "gettempdir", lambda: str(tmp_path / "plain"))
    staged = await bench.fetch(snapshot(1))
    assert staged.path.parent.parent == tmp_path / "plain"
    assert list(bench.staging.root.iterdir()) == []
    assert set(load_file(staged.path)) == {"w", "b", "scale"}


async def test_missing_shared_memory_is_replaced_by_a_plain_directory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(staging_module.tempfile, "gettempdir", lambda: str(tmp_path / "plain"))
    bench.staging.root = tmp_path / "none"
    assert (await bench.fetch(snapshot(1))).path.parent.parent == tmp_path / "plain"


def full_disk(descriptor: int, data: Any, offset: int) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def short_write(descriptor: int, data: Any, offset: int) -> int:
    return len(data) - 1


@pytest.mark.parametrize(
    ("pwrite", "error", "message"),
    [(full_disk, OSError, "No space left"), (short_write, WeightsError, "version 2: short write")],
)
async def test_failed_write_leaves_the_old_version_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, pwrite: Any, error: type[Exception], message: str
) -> None:
    first = await bench.fetch(snapshot(1))
    before = first.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(staging_module.os, "pwrite", pwrite)
        with pytest.raises(error, match=message):
            await bench.fetch(snapshot(2))
    assert bench.files == ["owner.pid", "v1.safetensors"], "no part is left behind"
    assert first.path.read_bytes() == before
    assert (await bench.fetch(snapshot(2))).path.name == "v2.safetensors"


async def test_bytes_lost_on_the_way_to_the_file_are_found_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests are checked on what lies in the file: what came from the socket was right."""
    write = os.pwrite

    def forgetful(descriptor: int, data: Any, offset: int) -> int:
        return write(descriptor, data, offset) if len(data) == 50 else len(data)  # the last chunk stays a hole

    monkeypatch.setattr(staging_module.os, "pwrite", forgetful)
    with pytest.raises(WeightsError, match="wrong digest of tensor b"):
        await bench.fetch(snapshot(1))
    assert bench.files == ["owner.pid"]


async def test_corrupted_chunk_is_refused_and_the_old_version_kept(bench: Bench) -> None:
    await bench.fetch(snapshot(1))
    good = snapshot(2)
    damaged = bytearray(good.data)
    damaged[123] ^= 1
    with pytest.raises(WeightsError, match="version 2: wrong digest of tensor w"):
        await bench.fetch(Snapshot(good.manifest, memoryview(damaged)))
    assert bench.files == ["owner.pid", "v1.safetensors"]


async def test_part_of_an_earlier_try_is_overwritten(bench: Bench) -> None:
    staged = await bench.fetch(snapshot(1))
    (staged.path.parent / "v2.part").write_bytes(b"x" * 10_000)
    second = await bench.fetch(snapshot(2))
    assert bench.files == ["owner.pid", "v1.safetensors", "v2.safetensors"]
    assert set(load_file(second.path)) == {"w", "b", "scale"}


async def test_manifest_of_another_total_is_never_staged(bench: Bench) -> None:
    good = snapshot(1)
    bad: Manifest = msgspec.structs.replace(good.manifest, total_bytes=SIZE + 1)
    bench.running.run(lambda: bench.running.hub.announce(Snapshot(bad, good.data)))
    with pytest.raises(WeightsError, match="digest does not fit"):
        await bench.link.fetch_manifest()
