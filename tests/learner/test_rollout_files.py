"""rollouts/: what is written, how much of it stays, and that nothing there ends a run."""

from __future__ import annotations

import errno
import json
import os
import threading
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from learner import rollout_files
from learner.batch import Drawn
from learner.rollout_files import QUEUED, RolloutFiles
from tests.actor_harness import until
from tests.tiny_model import make_tiny_tokenizer

DRAWN = Drawn(((0, 4), (1, 2)), ((3, 1), (2, 0)), ((0.5, -0.5), (0.25, 0.0)))
TICKS = count(1_000_000_000)
"""Seconds: each file is written at the next."""
LOGPROBS = torch.tensor([-0.5, -1.5, -2.5, float("nan"), -3.0, -4.0])


@pytest.fixture
def tokenizer() -> Any:
    return make_tiny_tokenizer()


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in directory.glob("step-*.safetensors"))


def write(directory: Path, tokenizer: Any, steps: list[int], branch: int = 0, **bounds: int) -> int:
    """Write these steps and end; bytes of one file. Their times grow, however coarse those of the file system are."""
    files = RolloutFiles(directory, tokenizer, **bounds)
    for step in steps:
        files.keep(step, step + 1, branch, DRAWN, LOGPROBS)
        until(files._jobs.empty, "the thread to take the step")
    files.close()
    for path in (directory / f"step-{step:08d}.safetensors" for step in steps):
        if path.exists():
            os.utime(path, times=(tick := next(TICKS), tick))
    return max((path.stat().st_size for path in directory.glob("step-*")), default=0)


def test_a_file_has_a_steps_logprobs_and_what_they_belong_to(tmp_path: Path, tokenizer: Any) -> None:
    directory = tmp_path / "rollouts"
    files = RolloutFiles(directory, tokenizer)
    files.keep(12, 15, 1, DRAWN, LOGPROBS)
    files.close()
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000012.safetensors", "tokenizer.json"]
    with safe_open(directory / "step-00000012.safetensors", framework="numpy") as file:
        about = file.metadata()
        np.testing.assert_array_equal(file.get_tensor("logprobs"), LOGPROBS.numpy())
        assert file.get_tensor("advantages").tolist() == [0.5, -0.5, 0.25, 0.0]
        assert file.get_tensor("tokens").tolist() == [3, 1, 2, 0]
        assert file.get_tensor("completions").tolist() == [2, 2]
    assert (about["step"], about["version"], about["branch"]) == ("12", "15", "1")
    assert json.loads(about["ids"]) == [[0, 4], [1, 2]]
    kept = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert kept.encode("héllo").ids == tokenizer("héllo")["input_ids"]


def test_the_tokenizer_is_written_once(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, tokenizer, [])
    before = (tmp_path / "tokenizer.json").stat()
    write(tmp_path, tokenizer, [])
    after = (tmp_path / "tokenizer.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_tokenizer_without_a_fast_backend_leaves_the_steps_alone(tmp_path: Path) -> None:
    write(tmp_path, object(), [1])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_the_newest_stay_within_the_bytes_and_the_number(tmp_path: Path, tokenizer: Any) -> None:
    size = write(tmp_path / "size", tokenizer, [1])
    write(tmp_path / "bytes", tokenizer, [1, 2, 3, 4, 5], keep_bytes=3 * size + size // 2)
    assert steps_in(tmp_path / "bytes") == [3, 4, 5]
    write(tmp_path / "number", tokenizer, [1, 2, 3, 4, 5], keep_steps=2)
    assert steps_in(tmp_path / "number") == [4, 5]
    write(tmp_path / "large", tokenizer, [1, 2, 3], keep_bytes=size // 2)
    assert steps_in(tmp_path / "large") == [3], "the newest one always"


def test_after_a_rollback_what_was_written_longest_ago_goes_first(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, tokenizer, [1, 2, 3, 4], keep_steps=4)
    (tmp_path / ".step-00000004.safetensors.x").write_text("of a killed process")
    write(tmp_path, tokenizer, [2, 3, 5], branch=1, keep_steps=4)  # another process: it finds the files that are there
    assert steps_in(tmp_path) == [2, 3, 4, 5]
    assert not list(tmp_path.glob(".*"))
    write(tmp_path, tokenizer, [4, 6], branch=1, keep_steps=4)
    assert steps_in(tmp_path) == [3, 4, 5, 6]
    with safe_open(tmp_path / "step-00000004.safetensors", framework="numpy") as file:
        assert file.metadata()["branch"] == "1"
    write(tmp_path, tokenizer, [1, 2], branch=2, keep_steps=4)
    assert steps_in(tmp_path) == [1, 2, 4, 6]


def test_a_full_disk_costs_files_and_is_said_once(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, tokenizer, [1])
    replace = rollout_files.replace_file

    def full(path: Path, data: bytes) -> None:
        if path.stem < "step-00000005":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        replace(path, data)

    monkeypatch.setattr(rollout_files, "replace_file", full)
    write(tmp_path, tokenizer, [2, 3, 4, 5])
    assert steps_in(tmp_path) == [1, 5], "as soon as there is room again"
    assert caplog.text.count("No space left on device") == 1 == len(caplog.records)


def test_a_directory_that_cannot_be_made_is_no_error(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rollouts").write_text("a file")
    write(tmp_path / "rollouts", tokenizer, [1, 2])
    assert (tmp_path / "rollouts").read_text() == "a file"
    assert len(caplog.records) == 1 and "not everything is kept" in caplog.text


def test_a_slow_disk_is_not_waited_for(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, tokenizer, [])
    writing, go_on = threading.Event(), threading.Event()
    replace = rollout_files.replace_file

    def slow(path: Path, data: bytes) -> None:
        writing.set()
        assert go_on.wait(20)
        replace(path, data)

    monkeypatch.setattr(rollout_files, "replace_file", slow)
    files = RolloutFiles(tmp_path, tokenizer)
    files.keep(1, 2, 0, DRAWN, LOGPROBS)
    assert writing.wait(20)
    for step in range(2, 12):
        files.keep(step, step + 1, 0, DRAWN, LOGPROBS)  # returns at once
    go_on.set()
    files.close()
    assert steps_in(tmp_path) == list(range(1, QUEUED + 2)) and caplog.text.count("too slow") == 1


def test_a_hung_disk_does_not_hold_up_the_end(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(rollout_files, "CLOSE_S", 0.05)
    monkeypatch.setattr(rollout_files, "replace_file", lambda *_: go_on.wait(20))
    files = RolloutFiles(tmp_path, tokenizer)
    files.close()
    assert "waited for 0.05 s in vain" in caplog.text
    go_on.set()
    files._thread.join(20)
    assert not files._thread.is_alive()
