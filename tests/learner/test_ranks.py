"""Ranks among themselves: who does what, who hears what, and what happens when one of them dies or falls silent."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from learner.joining import joined
from learner.processes import RankLost, started, under_torchrun
from learner.ranks import ALONE, Order, Ranks
from protocol.config import parse_recipe
from protocol.errors import RecipeError
from protocol.rundir import RunDir, read_json, read_jsonl
from tests.ranks_harness import write_recipe
from tests.tiny_model import make_tiny_model

DEADLINE_S = 240.0

ECHO = """
import sys
from pathlib import Path
import learner.ranks as r
from learner.joining import joined
from learner.processes import Place, RankLost
r.ORDER_S = float(sys.argv[1])
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
try:
    with joined(Place(1, 2, Path(options["--store"])), "cpu") as ranks:
        while (order := ranks.hear()).name != r.STOP:
            if order.name == "die":
                sys.exit(9)
            ranks.sum({"b": 2.0, "both": order.arguments["number"]})
            ranks.merge(order.tensors["x"] * 10)
except RankLost as error:
    print(error, flush=True)
    sys.exit(1)
"""
"""Another rank without a model: answers each order with a sum."""


def test_share_gives_every_item_to_one_rank_and_as_many_passes_to_each() -> None:
    for count in range(8):
        for size in (1, 2, 3):
            shares = [Ranks(rank, size).share(range(count)) for rank in range(size)]
            assert len({len(share) for share in shares}) == 1
            given = [item for share in shares for item in share if item is not None]
            assert sorted(given) == list(range(count))
            assert sum(share.count(None) for share in shares) < size or not count


def test_one_process_asks_nobody() -> None:
    figures = {"loss": 0.1}
    assert ALONE.sum(figures) == figures and ALONE.alone and ALONE.leads
    tensor = torch.ones(3)
    assert ALONE.merge(tensor) is tensor and ALONE.broadcast(tensor) is tensor
    ALONE.tell(Order("train"))
    ALONE.still_waiting("groups")


def test_orders_and_sums_arrive_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "x": torch.tensor([[0.1, -0.0], [float("inf"), 1e-40]]),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(5),
    }
    with started(2, [sys.executable, "-c", ECHO, "60"], tmp_path / "store") as place, joined(place, "cpu") as ranks:
        ranks.tell(Order("sum", {"number": 0.1}, tensors))
        assert ranks.sum({"a": 1.0, "both": 0.2}) == {"a": 1.0, "b": 2.0, "both": 0.2 + 0.1}
        assert torch.equal(ranks.merge(tensors["x"].clone()), tensors["x"] * 10 + tensors["x"])
    assert not (tmp_path / "store").exists()


def test_rank_that_hears_nothing_ends_and_says_for_whose_word_it_waited(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with started(2, [sys.executable, "-c", ECHO, "5"], tmp_path / "store") as place, joined(place, "cpu") as ranks:
        ranks.tell(Order("waiting", {"what": "groups of step 7"}))
        until(lambda: bool(place.ended()), "the end of rank 1")
        with pytest.raises(RankLost, match="rank 1 has ended with 1"):
            ranks.still_waiting("groups of step 7")
    assert (
        "rank 1 of 2, waiting for an order of rank 0, whose last word was 'waiting for groups of step 7'"
        in capfd.readouterr().out
    )


def test_rank_that_dies_is_named_by_the_next_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.ranks.LOST_S", 30.0)  # its connection breaks long before it has torn down torch
    with started(2, [sys.executable, "-c", ECHO, "60"], tmp_path / "store") as place, joined(place, "cpu") as ranks:
        ranks.tell(Order("die"))
        with (
            pytest.raises(RankLost, match="rank 0 of 2, waiting for sums: rank 1 has ended with 9"),
            ranks.doing("sums"),
        ):
            ranks.sum({"a": 1.0})


# --- whole processes ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("ranks") / "tiny")


def long_run(path: Path, processes: int) -> RunDir:
    """Of sft without actors, which goes on until it is stopped."""
    recipe = parse_recipe(
        {
            "method": "sft",
            "model": {"dtype": "float32", "max_model_len": 128},
            "task": {"max_operand": 9},
            "eval": {"prompts": 0},
            "sft": {"epochs": 10_000, "batch_size": 4},
            "checkpoint": {"every_steps": 2},
            "learner": {"device": "cpu", "threads": 1, "processes": processes},
        },
        "test",
    )
    run = RunDir(path)
    write_recipe(recipe, run)
    return run


@contextmanager
def running(run: RunDir, command: list[str]) -> Iterator[psutil.Popen]:
    """The command until its third step is done; nothing of it is left afterwards."""
    with open(run.logs / "learner.log", "ab") as output:
        process = psutil.Popen([sys.executable, *command], stdout=output, stderr=output)
    seen: list[psutil.Process] = []
    try:
        until(lambda: len(read_jsonl(run.metrics)) >= 3 or process.poll() is not None, "the third step")
        assert process.poll() is None, log_of(run)
        seen = process.children(recursive=True)
        yield process
        _, alive = psutil.wait_procs(seen, timeout=DEADLINE_S)
        assert alive == []
    finally:
        for left in (process, *seen):
            if left.is_running():
                left.kill()
        process.wait()


def learner(run: RunDir, model: Path) -> list[str]:
    return ["-m", "learner", "--run", str(run.path), "--model", str(model)]


def log_of(run: RunDir) -> str:
    return (run.logs / "learner.log").read_text()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {DEADLINE_S:.0f} s"
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_stop_is_agreed_by_all_ranks_that_torchrun_has_started(model: Path, tmp_path: Path) -> None:
    """SIGTERM reaches both processes at any moment: they end after the same step, with its checkpoint. From it a
    learner goes on that starts its second process itself, and takes it along when it is killed."""
    run = long_run(tmp_path, processes=1)
    arguments = ["--standalone", "--nproc-per-node=2", "-m", "learner", "--run-dir", str(run.path)]
    with running(run, ["-m", "torch.distributed.run", *arguments, "--model", str(model)]) as process:
        process.terminate()
        process.wait(DEADLINE_S)
    assert read_json(run.status)["phase"] == "stopped", log_of(run)
    stopped_at = read_jsonl(run.metrics)[-1]["step"]
    assert run.checkpoint_steps()[-1] == read_json(run.summary)["steps"] == stopped_at
    assert "rank 1 of 2 computes on cpu" in log_of(run)

    with running(long_run(tmp_path, processes=2), learner(run, model)) as process:
        until(lambda: read_jsonl(run.metrics)[-1]["step"] > stopped_at or process.poll() is not None, "another step")
        assert process.poll() is None, log_of(run)
        others = process.children()
        process.kill()
        assert len(others) == 1 and psutil.wait_procs(others, timeout=DEADLINE_S)[1] == []
    assert f"resumed at step {stopped_at}" in log_of(run)


def test_torchrun_over_several_machines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="torchrun: found 4 processes of which 2 are here, allowed: one machine"):
        under_torchrun()
