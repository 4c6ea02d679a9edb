"""Version numbers: reserved on disk, never twice, whatever a crash left of the file. What is published, and as what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.model import PolicyModel, load_model
from learner.publish import Buffers, Publisher, Versions, flatten
from protocol.deltas import DeltaCoder
from protocol.messages import Delta
from protocol.sections import LearnerConfig, ModelConfig
from protocol.weights import Snapshot, check_data
from tests.tiny_model import make_tiny_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "versions.jsonl"


def test_reserved_numbers_are_on_disk_and_go_on_after_a_restart(path: Path) -> None:
    versions = Versions(path)
    assert [versions.reserve(step) for step in (0, 0, 1)] == [1, 2, 3]
    again = Versions(path)
    assert again.steps == {1: 0, 2: 0, 3: 1}
    assert (again.next, again.step_of(3), len(again)) == (4, 1, 3)


@pytest.mark.parametrize("torn", ['{"ver', '{"version": 3, "step": 1}', "\0\0\0"])
def test_torn_last_line_costs_no_later_number(path: Path, torn: str) -> None:
    """A line without its end was never announced; what is reserved after it is read back by the next process."""
    versions = Versions(path)
    versions.reserve(0)
    versions.reserve(1)
    with path.open("a") as file:
        file.write(torn)
    second = Versions(path)
    assert [second.reserve(step) for step in (1, 2, 3)] == [3, 4, 5]
    assert Versions(path).steps == {1: 0, 2: 1, 3: 1, 4: 2, 5: 3}


def test_damaged_line_is_named(path: Path) -> None:
    path.write_text('{"version": 1, "step": 0}\nnothing\n{"version": 2, "step": 0}\n')
    with pytest.raises(ValueError, match=r"versions\.jsonl, line 2: found 'nothing'"):
        Versions(path)


# --- what is published ---


Announced = list[tuple[Snapshot, tuple[Delta, bytes] | None]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(directory: Path) -> PolicyModel:
    return load_model(directory, ModelConfig(path=str(directory), max_model_len=64), LearnerConfig())


def publisher(path: Path, anchor_every: int = 0) -> tuple[Publisher, Announced]:
    announced: Announced = []
    made = Publisher(Versions(path), lambda *_: None, lambda *offer: announced.append(offer), anchor_every)
    return made, announced


def nudge(model: PolicyModel, share: float = 0.01) -> None:
    """An update after which some of the weights are rounded to other bits."""
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter += share * parameter.abs().mean() * torch.sign(parameter)


def test_versions_are_what_the_model_was_and_deltas_lead_from_one_to_the_next(path: Path, model: PolicyModel) -> None:
    made, announced = publisher(path)
    wanted = []
    for step in range(4):
        wanted.append(flatten(model.published_state())[1])
        assert made.publish(model, step) == step + 1
        nudge(model)  # while digests and delta are made
    made.close()
    coder, held = DeltaCoder(), None
    for (snapshot, delta), expected in zip(announced, wanted, strict=True):
        check_data(snapshot.manifest, snapshot.data)
        assert bytes(snapshot.data) == expected.numpy().tobytes()
        assert (delta is None) == (held is None)
        if delta is not None and held is not None:
            coder.decode(*delta, snapshot.manifest.tensors, held)
            assert held == snapshot.data
        held = memoryview(bytearray(snapshot.data))
    assert [len(made.delta_bytes), len(made.encode_s), len(made.publish_s)] == [3, 4, 4]
    assert made.bytes_dense == len(wanted[0])


def test_anchors_come_without_a_delta_and_the_chain_goes_on_behind_them(path: Path, model: PolicyModel) -> None:
    made, announced = publisher(path, anchor_every=3)
    for step in range(7):
        made.publish(model, step)
        nudge(model)
    made.close()
    assert [delta is not None for _, delta in announced] == [False, True, False, True, True, False, True]
    assert [delta[0].base for _, delta in announced if delta] == [1, 3, 4, 6]


def test_what_the_device_finds_is_published_as_what_the_host_finds(
    path: Path, model: PolicyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path for a model on a GPU, on the CPU: its tensors are compared where they are."""
    host, expected = publisher(path)
    device, announced = publisher(tmp_path / "device.jsonl")
    for step in range(3):
        host.publish(model, step)
        host.wait()
        with monkeypatch.context() as patch:
            patch.setattr(model, "device", torch.device("meta"))
            patch.setattr(model, "published_state", lambda _: PolicyModel.published_state(model))
            device.publish(model, step)
        device.wait()
        nudge(model)
    assert [snapshot.manifest for snapshot, _ in announced] == [snapshot.manifest for snapshot, _ in expected]
    assert [delta for _, delta in announced] == [delta for _, delta in expected]


def test_buffer_is_used_again_only_when_nobody_has_a_part_of_it(path: Path) -> None:
    buffers = Buffers()
    first = buffers.take(100)
    data = buffers.lend(first)
    part = data[10:20]
    del data
    assert buffers.take(100) is not first, "a part is still on its way to somebody"
    del part
    assert buffers.take(50).numel() == 50, "another model's size"
    second = buffers.take(100)
    lent = buffers.lend(second)
    del lent
    buffers.prepare(100)
    assert buffers.take(100) is second, "there was one already"
    buffers.prepare(100)
    assert len(buffers._free) == 1
