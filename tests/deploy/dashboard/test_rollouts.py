"""The reader of rollouts, on journals written by hand and growing under it, and on whole runs of the learner."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from deploy.dashboard.rollouts import RolloutReader
from learner.intake.journal import HEAD_BYTES, Journal
from protocol.messages import Completion, Group, TicketId
from protocol.rundir import RunDir
from tests.tiny_model import make_tiny_tokenizer


def group(index: int, epoch: int = 0, lengths: tuple[int, ...] = (3, 2), first_token: int = 40) -> Group:
    """Completions over versions 1 and 2, whose tokens count up from `first_token`."""
    total = sum(lengths)
    completions = tuple(
        Completion(n, ((1, 0), (2, n - 1)) if n > 1 else ((1, 0),), "stop", {"reward": float(k), "form": 0.5}, f"t{k}")
        for k, n in enumerate(lengths)
    )
    return Group(
        id=TicketId(epoch, index), kind="train", attempt=1, actor="actor-0", prompt_ids=(38, 39, index % 200 + 10),
        temperature=0.7, completions=completions,
        token_ids=np.arange(first_token, first_token + total, dtype="<i4").tobytes(),
        logprobs=(-np.arange(total, dtype="<f4")).tobytes(), mask=b"\1" * total,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path).create()
    run.rollouts.mkdir()
    return run


@pytest.fixture
def journal(run: RunDir) -> Any:
    log = Journal(run.journal)
    yield log
    log.close()


def keep(run: RunDir, step: int, version: int, groups: list[Group], other: dict[str, Any] | None = None) -> None:
    """What the learner keeps of a step: logprobs -0.5, -1.5, …; the last completion was not trained on."""
    lengths = [c.num_tokens for g in groups for c in g.completions]
    logprobs = -np.arange(sum(lengths), dtype=np.float32) - 0.5
    logprobs[-lengths[-1] :] = np.nan
    tensors = {
        "logprobs": logprobs,
        "advantages": np.arange(len(lengths), dtype=np.float32),
        "tokens": np.array(lengths, np.int32),
        "completions": np.array([len(g.completions) for g in groups], np.int32),
    }
    about = {"step": step, "version": version, "branch": 0, "ids": [[g.id.epoch, g.id.index] for g in groups]}
    about |= other or {}
    save_file(
        tensors,
        run.rollouts / f"step-{step:08d}.safetensors",
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()},
    )


def ids(*groups: Group) -> list[tuple[int, int]]:
    return [(g.id.epoch, g.id.index) for g in groups]


# --- what it shows ----------------------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun_has_no_steps(run: RunDir) -> None:
    reader = RolloutReader(run)
    assert reader.steps() == []
    with pytest.raises(KeyError):
        reader.groups(1)


def test_steps_come_with_their_versions_and_rewards_as_they_are_written(run: RunDir, journal: Journal) -> None:
    reader = RolloutReader(run)
    journal.append_group(group(0))
    journal.append_group(group(1))
    assert reader.steps() == []
    journal.append_step(1, 2, [(0, 1), (0, 0)])
    assert reader.steps() == [{"step": 1, "version": 2, "groups": 2, "reward": None}]
    run.metrics.write_text('{"step": 1, "reward_mean": 0.25}\n{"step": 2, "rew')
    assert reader.steps() == [{"step": 1, "version": 2, "groups": 2, "reward": 0.25}]
    journal.append_group(group(2))
    journal.append_step(2, 3, [(0, 2)])
    with open(run.metrics, "a") as file:
        file.write('ard_mean": 0.75, "trained_reward_mean": 0.5}\n')
    assert reader.steps()[1:] == [{"step": 2, "version": 3, "groups": 1, "reward": 0.5}]
    assert [g["id"] for g in reader.groups(1)] == ["0/1", "0/0"], "in the order of the batch"


def test_groups_of_a_step_say_who_drew_what(run: RunDir, journal: Journal) -> None:
    journal.append_group(group(7))
    journal.append_step(1, 2, [(0, 7)])
    assert RolloutReader(run).groups(1) == [
        {"index": 0, "id": "0/7", "prompt": "38 39 17", "rewards": [0.0, 1.0], "actor": "actor-0", "tokens": [3, 2]}
    ]


def test_a_group_has_every_token_with_both_logprobs_and_its_version(run: RunDir, journal: Journal) -> None:
    groups = [group(0), group(1, lengths=(2, 1, 2), first_token=60)]
    for one in groups:
        journal.append_group(one)
    journal.append_step(1, 2, ids(*groups))
    keep(run, 1, 2, groups)
    make_tiny_tokenizer().backend_tokenizer.save(str(run.rollouts / "tokenizer.json"))
    found = RolloutReader(run).group(1, 1)
    text = make_tiny_tokenizer().decode(range(60, 65))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    completions = found.pop("completions")
    assert found == {
        "id": "0/1", "step": 1, "index": 1, "actor": "actor-0", "temperature": 0.7,
        "prompt": make_tiny_tokenizer().decode([38, 39, 11]),
    }  # fmt: skip
    assert completions[0] == {
        "text": "t0", "reward": 0.0, "scores": {"reward": 0.0, "form": 0.5}, "finish_reason": "stop",
        "grader_error": "", "advantage": 2.0, "tokens": list(text[:2]), "logprobs": [0.0, -1.0],
        "learner_logprobs": [-5.5, -6.5], "versions": [1, 2], "trained": [True, True],
    }  # fmt: skip
    assert [c["learner_logprobs"] for c in completions[1:]] == [[-7.5], [None, None]]
    assert [c["advantage"] for c in completions] == [2.0, 3.0, 4.0]
    assert [c["trained"] for c in completions[1:]] == [[True], [False, False]]
    assert [c["versions"] for c in completions[1:]] == [[1], [1, 2]]


def test_without_what_the_learner_keeps_the_journal_is_shown(run: RunDir, journal: Journal) -> None:
    one = group(0)
    journal.append_group(one)
    journal.append_step(1, 2, ids(one))
    completion = RolloutReader(run).group(1, 0)["completions"][0]
    assert completion["tokens"] == ["40", "41", "42"] and completion["text"] == "t0"
    assert completion["learner_logprobs"] == [None] * 3 and completion["advantage"] is None
    assert completion["trained"] == [True] * 3


@pytest.mark.parametrize("other", [{"version": 9}, {"ids": [[0, 1]]}, {"step": 2}, {"ids": "[[0,"}, {"branch": 0}])
def test_what_was_kept_of_another_branch_is_not_shown(run: RunDir, journal: Journal, other: dict[str, Any]) -> None:
    one = group(0)
    journal.append_group(one)
    journal.append_step(1, 2, ids(one))
    keep(run, 1, 2, [one], other)
    shown = RolloutReader(run).group(1, 0)["completions"][0]["learner_logprobs"]
    assert shown == ([-0.5, -1.5, -2.5] if "branch" in other else [None] * 3)


@pytest.mark.parametrize(("step", "index"), [(2, 0), (1, 1), (1, -1), (0, 0)])
def test_what_is_not_there_is_a_key_error(run: RunDir, journal: Journal, step: int, index: int) -> None:
    journal.append_group(group(0))
    journal.append_step(1, 2, [(0, 0)])
    with pytest.raises(KeyError):
        RolloutReader(run).group(step, index)


# --- the index --------------------------------------------------------------------------------------------------------


def test_listing_steps_reads_no_tokens_and_nothing_twice(
    run: RunDir, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(20):
        journal.append_group(group(index, lengths=(5000, 5000)))
    journal.append_step(1, 2, [(0, index) for index in range(20)])
    read: list[int] = []
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counting)
    reader = RolloutReader(run)
    assert len(reader.steps()) == 1
    assert sum(read) < 21 * 100 + 500 < run.journal.stat().st_size / 500
    read.clear()
    reader.steps()
    assert sum(read) <= HEAD_BYTES, "only whether the last record is still there"
    reader.group(1, 3)
    assert max(read) < 100_000, "one group of twenty"
