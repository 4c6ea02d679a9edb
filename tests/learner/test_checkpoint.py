"""Restored training goes on bit for bit; damaged checkpoints are refused by name."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from learner import checkpoint
from learner.batch import Batch, Minibatch
from learner.model import PolicyModel
from learner.optim import Optimizer
from learner.step import train_step
from protocol.config import Recipe
from tests.learner.reference import policy, random_rows

RECIPE = Recipe.model_validate({"optim": {"lr": 1e-3, "weight_decay": 0.01}})


def train(model: PolicyModel, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        rows = random_rows(seed=step)
        tokens = int(sum(s.mask.sum() for row in rows for s in row.samples))
        train_step(model, optimizer, Batch(step, (Minibatch(rows, tokens, 10),), {}), RECIPE, RECIPE.optim.lr)


def fresh(kind: str = "qwen2") -> tuple[PolicyModel, Optimizer]:
    model = policy(kind, dtype="bfloat16")
    return model, Optimizer(model, RECIPE.optim)


def saved(directory: Path, step: int = 2, keep: int = 2) -> Path:
    model, optimizer = fresh()
    train(model, optimizer, range(1))
    return checkpoint.save(directory, step, model, optimizer, {"cursor": [1, 2], "branch": 0}, keep)


def test_restored_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    model, optimizer = fresh()
    train(model, optimizer, range(3))
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"cursor": 7}, keep=1)
    train(model, optimizer, range(3, 5))

    restored, its_optimizer = fresh()
    train(restored, its_optimizer, range(1))  # a state that must vanish
    assert checkpoint.load(path, restored, its_optimizer) == {"cursor": 7}
    train(restored, its_optimizer, range(3, 5))
    for (name, expected), (_, found) in zip(model.named_parameters(), restored.named_parameters(), strict=True):
        assert torch.equal(found, expected), name
    expected_state = optimizer.state_tensors()
    assert len(expected_state) == 3 * len(optimizer.parameters)
    assert all(torch.equal(found, expected_state[key]) for key, found in its_optimizer.state_tensors().items())


def test_restoring_an_optimizer_that_never_stepped(tmp_path: Path) -> None:
    model, optimizer = fresh()
    path = checkpoint.save(tmp_path, 0, model, optimizer, {}, keep=1)
    other, its_optimizer = fresh()
    train(other, its_optimizer, range(1))
    checkpoint.load(path, other, its_optimizer)
    assert its_optimizer.state_tensors() == {}


def test_save_keeps_the_newest_and_latest_finds_it(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nothing") is None
    (tmp_path / ".step-00000009").mkdir()  # what a killed process left behind
    for step in (2, 10, 9):
        saved(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"


def test_save_replaces_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    first = (saved(tmp_path) / "weights.safetensors").stat().st_ino
    assert (saved(tmp_path) / "weights.safetensors").stat().st_ino != first
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("survived", range(6))
def test_process_killed_while_it_replaces_a_checkpoint_always_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, survived: int
) -> None:
    """Killed at each of the first renames and removals of a `save`, the newest step is there and loads."""
    saved(tmp_path, 1, keep)
    saved(tmp_path, 2, keep)
    done = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done > survived:
                raise Killed
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree))
        with contextlib.suppress(Killed):
            saved(tmp_path, 2, keep)
    latest = checkpoint.latest(tmp_path)
    assert latest == tmp_path / "step-00000002"
    assert checkpoint.load(latest, *fresh()) == {"cursor": [1, 2], "branch": 0}
    assert not list(tmp_path.glob(".*")), "nothing half-finished is left"


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "altered"])
def test_load_refuses_a_damaged_checkpoint_and_changes_nothing(tmp_path: Path, name: str, damage: str) -> None:
    path = saved(tmp_path)
    file, data = path / name, (path / name).read_bytes()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        file.unlink()
    elif name == "state.json":
        file.write_text(json.dumps(json.loads(data) | {"format": 99}))
    else:
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    model, optimizer = fresh()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        checkpoint.load(path, model, optimizer)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.state_tensors() == {}


def test_load_refuses_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model, optimizer = fresh("llama")
    with pytest.raises(ValueError, match="holds another model"):
        checkpoint.load(path, model, optimizer)


def test_the_newest_good_checkpoint_outlives_newer_doubtful_ones(tmp_path: Path) -> None:
    model, optimizer = fresh()
    for step, good in ((2, True), (4, True), (6, False), (8, False), (10, False)):
        checkpoint.save(tmp_path, step, model, optimizer, {}, keep=2, good=good)
    assert [checkpoint.step_of(path) for path in sorted(tmp_path.iterdir())] == [4, 8, 10]
    good_one = checkpoint.newest_good(tmp_path)
    assert good_one is not None and checkpoint.step_of(good_one) == 4


def test_the_newest_is_that_of_the_newest_branch(tmp_path: Path) -> None:
    model, optimizer = fresh()
    for step, branch, good in ((2, 0, True), (4, 0, True), (6, 0, False), (4, 1, True)):
        path = checkpoint.save(tmp_path, step, model, optimizer, {"branch": branch}, keep=3, good=good, branch=branch)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000004-b1"], "step 6 was given up, no other"
    assert checkpoint.latest(tmp_path) == checkpoint.newest_good(tmp_path) == path
    assert checkpoint.step_of(path) == 4
    checkpoint.save(tmp_path, 6, model, optimizer, {}, keep=2, branch=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004-b1", "step-00000006-b1"]


def test_no_way_back_leads_to_what_a_branch_has_given_up(tmp_path: Path) -> None:
    model, optimizer = fresh()
    for step, branch in ((0, 0), (2, 0), (4, 0), (2, 1), (4, 1), (6, 1), (4, 2)):
        checkpoint.save(tmp_path, step, model, optimizer, {}, keep=9, branch=branch)
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == [
        "step-00000000",
        "step-00000002",
        "step-00000002-b1",
        "step-00000004-b1",
        "step-00000004-b2",
    ]
    assert getattr(checkpoint.newest_good(tmp_path, 3), "name", "") == "step-00000002-b1"
    assert getattr(checkpoint.newest_good(tmp_path, -1), "name", "") == "step-00000000"


def test_full_disk_is_said_so_and_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("learner.tensor_files.save_file", full)
    with pytest.raises(OSError, match=r"cannot be written, \d+ MiB needed, \d+ MiB free: .*No space"):
        checkpoint.save(tmp_path, 99, *fresh(), {}, keep=2)
    assert checkpoint.latest(tmp_path) == path


def test_a_checkpoint_without_a_mark_is_a_good_one(tmp_path: Path) -> None:
    """As the versions before the guard wrote them."""
    path = saved(tmp_path)
    header = json.loads((path / "state.json").read_text())
    del header["good"]
    (path / "state.json").write_text(json.dumps(header))
    assert checkpoint.newest_good(tmp_path) == path


def test_of_the_good_ones_that_is_kept_which_has_been_observed(tmp_path: Path) -> None:
    model, optimizer = fresh()
    for step in range(0, 9, 2):
        checkpoint.save(tmp_path, step, model, optimizer, {}, keep=2, sound_step=step - 5)
    assert [checkpoint.step_of(path) for path in sorted(tmp_path.iterdir())] == [2, 4, 6, 8]
    for at_most, step in ((7, 6), (5, 4), (1, 2)):
        found = checkpoint.newest_good(tmp_path, at_most)
        assert found is not None and checkpoint.step_of(found) == step, "the oldest, where none is old enough"
