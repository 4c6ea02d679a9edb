"""Weights & Biases in its offline mode: the same figures as metrics.jsonl, read back from its file."""

from __future__ import annotations

import builtins
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from learner.intake.source import StopFlag
from protocol.rundir import RunDir, read_jsonl
from tests.learner.test_loop import learn, recipe_of, stop_after
from tests.tiny_model import make_tiny_model

wandb = pytest.importorskip("wandb", reason="wandb is not installed (deploy/requirements/dev.txt has it)")

KEY = "0123456789abcdef" * 2 + "deadbeef"
BLOCK = 1 << 15
HEADER = struct.Struct("<IHB")
"""Of a part of a record: checksum, length, and whether it is whole (1), the first (2), a middle (3) or the last (4)."""
SFT: dict[str, Any] = {"method": "sft", "task": {"max_operand": 2}, "eval": {"prompts": 0}, "sft": {"batch_size": 4}}


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb sees a key, and nothing else of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "what the log sets is taken back")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    yield
    wandb.run = None  # the package remembers one that could not be finished


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wandb") / "tiny")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where every request of wandb's would arrive."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        yield proxy


def records(path: Path) -> Iterator[Any]:
    """Of a .wandb file: a header of 7 bytes, then LevelDB's log format, each record a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK  # a header is never cut in two
            continue
        _, length, part = HEADER.unpack_from(data, at)
        record += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if part in (1, 4):
            yield Record.FromString(record)
            record = b""


def offline_files(run: RunDir) -> list[Path]:
    return sorted(run.path.glob("wandb/offline-run-*/*.wandb"))


def history(path: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in records(path) if record.HasField("history")]
    found = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in found]


def figures(run: RunDir) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if value is not None} for row in read_jsonl(run.metrics)]


def core_processes() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "wandb" in child.name()]


def test_an_offline_run_has_the_figures_of_metrics_jsonl(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str], network: socket.socket
) -> None:
    recipe = recipe_of(**SFT, name="kept", metrics={"wandb": "offline", "wandb_project": "tests"})
    finished, run = learn(recipe, tmp_path / "run", model)
    assert finished
    (path,) = offline_files(run)
    assert history(path) == figures(run) and len(figures(run)) == 3
    (told,) = [record.run for record in records(path) if record.HasField("run")]
    assert (told.project, told.display_name, list(told.tags)) == ("tests", "kept", ["sft", "bundled"])
    config = {item.key: json.loads(item.value_json) for item in told.config.update}
    assert config["optim"]["lr"] == recipe.optim.lr and config["metrics"]["wandb"] == "offline"
    assert [record.metric.step_metric for record in records(path) if record.HasField("metric")] == ["step"]
    assert not core_processes(), "W&B's own process has ended"
    assert not list((tmp_path / "empty").iterdir()), "nothing in the working directory"
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert "wandb" not in capfd.readouterr().out
    with pytest.raises(BlockingIOError):
        network.accept()  # nobody has come


def test_a_resumed_run_goes_on_under_the_same_id(tmp_path: Path, model: Path) -> None:
    recipe, stop = recipe_of(**SFT, metrics={"wandb": "offline"}), StopFlag()
    learn(recipe, tmp_path / "run", model, stop, stop_after(2, stop))
    _, run = learn(recipe, tmp_path / "run", model)
    files = offline_files(run)
    assert len({path.name for path in files}) == 1 and len(files) == 2
    assert [row["step"] for path in files for row in history(path)] == [1, 2, 3]


def test_steps_that_come_again_after_a_rollback_are_all_there(tmp_path: Path, model: Path) -> None:
    from learner.metrics import MetricsLog, wandb_log

    run = RunDir(tmp_path / "run").create()
    log = MetricsLog(run, wandb=wandb_log(recipe_of(metrics={"wandb": "offline"}), run))
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step), "branch": 0})
    log.roll_back(1, 1)
    log.write(2, {"loss": 9.0, "branch": 1, "kl": float("nan")})
    log.amend({"eval_reward": 0.5})
    log.close()
    (path,) = offline_files(run)
    assert history(path) == [
        {"step": 1, "loss": 1.0, "branch": 0}, {"step": 2, "loss": 2.0, "branch": 0},
        {"step": 3, "loss": 3.0, "branch": 0}, {"step": 2, "loss": 9.0, "branch": 1}, {"step": 2, "eval_reward": 0.5},
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_a_fault_of_wandb_costs_figures_and_not_the_run(
    fault: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(f"{fault} is broken")

    owner = wandb if fault == "init" else wandb.Run
    monkeypatch.setattr(owner, fault, broken)
    finished, run = learn(recipe_of(**SFT, metrics={"wandb": "offline"}), tmp_path / "run", model)
    assert not core_processes(), "its process ends all the same"
    monkeypatch.undo()
    assert finished and len(figures(run)) == 3
    assert caplog.text.count(f"{fault} is broken") == 1 and "the run goes on without" in caplog.text


def test_a_run_without_wandb_does_not_import_it(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []
    real = builtins.__import__

    def watching(name: str, *rest: Any) -> Any:
        wanted.append(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", watching)
    assert learn(recipe_of(**SFT), tmp_path / "run", model)[0]
    assert not [name for name in wanted if name.startswith("wandb")]
