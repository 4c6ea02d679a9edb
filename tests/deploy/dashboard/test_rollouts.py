"""The reader of rollouts, on journals written by hand and growing under it, and on whole runs of the learner."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from deploy.dashboard.journal_index import JournalIndex
from deploy.dashboard.rollouts import LISTED_STEPS, RolloutReader
from deploy.dashboard.token_text import MOST_UNFINISHED, TokenText
from learner.intake.journal import HEAD_BYTES, Entry, Journal, read_groups, read_index
from learner.intake.source import StopFlag
from learner.loop import Learner
from learner.publish import Versions
from protocol import codec
from protocol.messages import Completion, Group, TicketId
from protocol.rundir import RunDir, read_jsonl, replace_file
from tests.learner.test_loop import learn, recipe_of, stop_after
from tests.test_imports import HEAVY, modules_loaded_by
from tests.tiny_model import make_tiny_model, make_tiny_tokenizer


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


def test_of_many_steps_the_newest_are_listed_and_one_that_is_asked_for(run: RunDir, journal: Journal) -> None:
    count = LISTED_STEPS + 100
    for step in range(1, count + 1):
        journal.append_step(step, step + 1, [(0, step)])
    reader, newest = RolloutReader(run), list(range(101, count + 1))

    def listed(asked: int | None = None) -> list[int]:
        return [row["step"] for row in reader.steps(asked)]

    assert listed() == newest
    assert listed(50) == [49, 50, 51, *newest]
    assert listed(1) == [1, 2, *newest]
    assert listed(101) == [100, *newest]
    assert listed(300) == listed(count) == newest
    replace_file(run.versions, '{"version": 9999, "step": 40, "branch": 1}\n')
    assert listed(50) == list(range(1, 41)), "the rest was rolled back"
    journal.append_step(41, 10000, [(1, 41)])
    assert listed() == list(range(1, 42))


def test_a_step_is_taken_into_the_index_without_a_look_at_the_others(run: RunDir, journal: Journal) -> None:
    """Else the index of a long run takes time that grows with the square of its steps."""
    compared = 0

    class Number(int):
        def __ge__(self, other: int) -> bool:
            nonlocal compared
            compared += 1
            return int(self) >= int(other)

    index = JournalIndex(run)
    for step in (*range(1, 201), *range(150, 301)):
        index._add(Entry(0, 0, "step", b"", None, {"step": Number(step), "version": step, "ids": []}))
    assert [record.step for record in index.newest(1000)] == list(range(1, 301))
    assert compared < 2 * 351


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


@pytest.mark.parametrize(
    "number", [0, 127, 128, 255, 256, 65535, 65536, 2**32, -1, -32, -33, -129, -40000, -(2**31) - 1]
)
def test_the_index_reads_every_ticket_as_the_codec_wrote_it(run: RunDir, journal: Journal, number: int) -> None:
    one, other = group(number), group(3, epoch=number)
    for each in (one, other):
        data = codec.join_frames(codec.encode(each))
        assert codec.joined_group_id(data[: codec.JOINED_ID_BYTES]) == each.id
        journal.append_group(each)
    assert [entry.group for entry in read_index(run.journal)] == [one.id, other.id]


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"TNDM" * 20])
def test_bytes_that_are_no_group_have_no_ticket(data: bytes) -> None:
    assert codec.joined_group_id(data) is None


def test_a_group_that_looks_otherwise_is_decoded_whole(
    run: RunDir, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append_group(group(5))
    monkeypatch.setattr(codec, "joined_group_id", lambda _: None)
    assert [entry.group for entry in read_index(run.journal)] == [TicketId(0, 5)]


def test_an_index_follows_a_journal_byte_by_byte(run: RunDir, journal: Journal) -> None:
    """Records become visible when they are whole, and not before, wherever a look falls between two writes."""
    ends = []
    for index in range(3):
        journal.append_group(group(index))
        journal.append_step(index + 1, index + 2, [(0, index)])
        ends.append(journal.end)
    data = run.journal.read_bytes()
    growing = RunDir(run.path / "growing").create()
    reader = RolloutReader(growing)
    with open(growing.journal, "wb", buffering=0) as file:
        for number in range(len(data)):
            file.write(data[number : number + 1])
            assert len(reader.steps()) == sum(end <= number + 1 for end in ends)
            assert all(entry.end <= number + 1 for entry in read_index(growing.journal))
    assert [g["id"] for step in (1, 2, 3) for g in reader.groups(step)] == ["0/0", "0/1", "0/2"]


def test_a_tail_that_was_cut_and_written_anew_is_read_anew(run: RunDir) -> None:
    """A machine went down: the last record is as long as it should be, and empty. A learner that resumes cuts it."""
    log = Journal(run.journal)
    log.append_group(group(0))
    log.append_step(1, 2, [(0, 0)])
    torn = log.append_group(group(1))
    log.close()
    with open(run.journal, "rb+") as file:
        file.seek(torn + HEAD_BYTES + 70)
        file.write(bytes(run.journal.stat().st_size - torn - HEAD_BYTES - 70))
    reader = RolloutReader(run)
    assert len(reader.steps()) == 1
    log = Journal(run.journal)
    assert log.end == torn
    log.append_group(group(2, lengths=(9, 9)))
    log.append_group(group(1))
    log.append_step(2, 3, [(0, 2), (0, 1)])
    log.close()
    assert [step["step"] for step in reader.steps()] == [1, 2]
    assert [g["id"] for g in reader.groups(2)] == ["0/2", "0/1"]


def test_a_damaged_group_is_not_there(run: RunDir, journal: Journal) -> None:
    offset = journal.append_group(group(0))
    journal.append_group(group(1))
    journal.append_step(1, 2, [(0, 1), (0, 0)])
    with open(run.journal, "rb+") as file:
        file.seek(offset + HEAD_BYTES + 100)
        file.write(b"!")
    reader = RolloutReader(run)
    with pytest.raises(KeyError, match="no sound group"):
        reader.group(1, 1)
    assert reader.group(1, 0)["id"] == "0/1"


def test_the_first_group_of_a_ticket_counts(run: RunDir, journal: Journal) -> None:
    journal.append_group(group(0))
    journal.append_group(group(0, lengths=(1, 1)))
    journal.append_step(1, 2, [(0, 0)])
    assert (
        RolloutReader(run).groups(1)[0]["tokens"]
        == [3, 2]
        == [c.num_tokens for c in next(read_groups(run.journal)).completions]
    )


def test_a_step_that_was_done_anew_is_the_later_one(run: RunDir, journal: Journal) -> None:
    """A learner that was killed goes on from its checkpoint: steps behind it are to come again."""
    reader = RolloutReader(run)
    for index in range(4):
        journal.append_group(group(index))
    for step in (1, 2, 3):
        journal.append_step(step, step + 1, [(0, step - 1)])
    assert len(reader.steps()) == 3
    journal.append_step(2, 9, [(0, 3)])
    assert [(step["step"], step["version"]) for step in reader.steps()] == [(1, 2), (2, 9)]
    assert [g["id"] for g in reader.groups(2)] == ["0/3"]
    with pytest.raises(KeyError):
        reader.groups(3)


def test_steps_that_were_rolled_back_are_gone_at_once(run: RunDir, journal: Journal) -> None:
    reader, versions = RolloutReader(run), Versions(run.versions)
    versions.reserve(0)
    for step in (1, 2, 3):
        journal.append_group(group(step))
        journal.append_step(step, versions.reserve(step), [(0, step)])
    assert [step["step"] for step in reader.steps()] == [1, 2, 3]
    versions.reserve(1, branch=1)
    assert [step["step"] for step in reader.steps()] == [1]
    with pytest.raises(KeyError):
        reader.group(2, 0)
    journal.append_group(group(2, epoch=1))
    journal.append_step(2, versions.reserve(2, branch=1), [(1, 2)])
    assert [(step["step"], step["version"]) for step in reader.steps()] == [(1, 2), (2, 6)]


def test_metrics_that_were_replaced_are_read_anew(run: RunDir, journal: Journal) -> None:
    reader = RolloutReader(run)
    for step in (1, 2):
        journal.append_step(step, step + 1, [(0, step)])
    run.metrics.write_text('{"step": 1, "reward_mean": 0.25}\n{"step": 2, "reward_mean": 0.5}\n')
    assert [step["reward"] for step in reader.steps()] == [0.25, 0.5]
    replace_file(run.metrics, '{"step": 1, "reward_mean": 0.25}\n')
    assert [step["reward"] for step in reader.steps()] == [0.25, None]
    replace_file(run.metrics, "".join(f'{{"step": {step}, "reward_mean": 0.125}}\n' for step in (1, 2, 3)))
    assert [step["reward"] for step in reader.steps()] == [0.125, 0.125], "also where the new one is longer"


# --- tokens as text ---------------------------------------------------------------------------------------------------


@pytest.fixture
def token_text(tmp_path: Path) -> TokenText:
    make_tiny_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TokenText(tmp_path / "tokenizer.json")


def test_pieces_join_to_the_text_and_characters_stay_whole(token_text: TokenText) -> None:
    ids = make_tiny_tokenizer()("aé 🙂<|im_end|>")["input_ids"]
    pieces = token_text.pieces(ids)
    assert pieces == ["a", "", "é", " ", "", "", "", "🙂", "<|im_end|>"]
    assert "".join(pieces) == token_text.text(ids)


def test_bytes_that_are_no_characters_are_shown_as_such(token_text: TokenText) -> None:
    emoji = make_tiny_tokenizer()("🙂")["input_ids"]
    assert token_text.pieces(emoji[:2]) == ["", "\ufffd"], "cut off within a character"
    pieces = token_text.pieces(emoji[:1] * 100 + make_tiny_tokenizer()("ok")["input_ids"])
    assert len(pieces) == 102 and set("".join(pieces[:-2])) == {"\ufffd"} and pieces[-1] == "k"
    assert any(pieces[:MOST_UNFINISHED]), "said soon"


def test_a_file_that_is_no_tokenizer_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    token_text = TokenText(tmp_path / "tokenizer.json")
    assert (token_text.text([1, 2]), token_text.pieces([1, 2])) == ("1 2", ["1", "2"])
    assert caplog.text.count("tokenizer.json: found no tokenizer in it") == 1 == len(caplog.records)


def test_the_reader_is_light() -> None:
    assert not modules_loaded_by("deploy.dashboard.rollouts", "tokenizers") & HEAVY


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("rollouts") / "tiny")


def check_against_the_run(run: RunDir, reader: RolloutReader) -> None:
    """What is shown of every step is what the learner trained on, and logged."""
    rows = {row["step"]: row for row in read_jsonl(run.metrics)}
    journaled = {str(one.id): one for one in read_groups(run.journal)}
    steps = reader.steps()
    assert [step["step"] for step in steps] == sorted(rows)
    for step in steps:
        row, groups = rows[step["step"]], reader.groups(step["step"])
        assert (step["version"], step["groups"]) == (row["version"], len(groups))
        rewards = [reward for one in groups for reward in one["rewards"]]
        assert step["reward"] == pytest.approx(np.mean(rewards)) == pytest.approx(row["reward_mean"])
        gaps: list[float] = []
        for number, listed in enumerate(groups):
            shown, group = reader.group(step["step"], number), journaled[listed["id"]]
            assert json.loads(json.dumps(shown, allow_nan=False)) == shown
            assert shown["prompt"] == listed["prompt"] == make_tiny_tokenizer().decode(group.prompt_ids)
            advantages = [c["advantage"] for c in shown["completions"]]
            assert advantages == pytest.approx((np.array(group.rewards) - np.mean(group.rewards)).tolist())
            ids = iter(np.frombuffer(group.token_ids, "<i4").tolist())
            for one, completion in zip(shown["completions"], group.completions, strict=True):
                drawn = list(islice(ids, completion.num_tokens))
                assert "".join(one["tokens"]) == make_tiny_tokenizer().decode(drawn)
                assert one["text"] == completion.text, "which the fake engine makes up"
                assert one["trained"] == [one["advantage"] != 0] * completion.num_tokens
                assert [value is not None for value in one["learner_logprobs"]] == one["trained"]
                pairs = zip(one["logprobs"], one["learner_logprobs"], strict=True)
                gaps += [engine - learner for engine, learner in pairs if learner is not None]
        assert len(gaps) == row["tokens"] > 0
        assert np.mean(gaps) == pytest.approx(row["kl_k1"], abs=1e-4), "what the importance weights were computed from"


def test_a_run_that_stopped_resumed_and_rolled_back_is_shown_as_it_survived(tmp_path: Path, model: Path) -> None:
    changes: dict[str, Any] = {
        "steps": 4, "checkpoint": {"every_steps": 1}, "grpo": {"advantage": "group_mean"},
        "optim": {"lr": 1e-3, "minibatches": 2},
    }  # fmt: skip
    stop, run = StopFlag(), RunDir(tmp_path)
    reader = RolloutReader(run)
    learn(recipe_of(guard={"policy": "off"}, **changes), tmp_path, model, stop, stop_after(1, stop))
    assert [step["step"] for step in reader.steps()] == [1]
    after_rollback: list[list[int]] = []

    def collapse_once(learner: Learner) -> None:
        see, publish = learner.guard.see, learner._publish

        def seeing(step: int, figures: dict[str, float], last: bool) -> Any:
            gap = 9.0 if step == 3 and not learner.state.rollbacks else 0.0
            if gap:
                after_rollback.append([step["step"] for step in reader.steps()])
            return see(step, figures | {"kl_k3": gap, "updates": 1.0, "duplicate_share": 0.0}, last)

        def publishing() -> int:
            version = publish()
            if learner.state.rollbacks and len(after_rollback) == 1:
                after_rollback.append([step["step"] for step in reader.steps()])
            return version

        learner.guard.see, learner._publish = seeing, publishing  # type: ignore[method-assign, assignment]

    recipe = recipe_of(guard={"policy": "rollback", "window": 1}, **changes)
    assert learn(recipe, tmp_path, model, watch=collapse_once)[0]
    assert after_rollback == [[1, 2, 3], [1]]
    assert reader.groups(1)[0]["id"].startswith("0/") and reader.groups(2)[0]["id"].startswith("1/")
    check_against_the_run(run, reader)
    check_against_the_run(run, RolloutReader(run))


def test_a_run_may_keep_no_logprobs(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(steps=1, eval={"prompts": 0}, metrics={"keep_logprobs": False})
    run = learn(recipe, tmp_path, model)[1]
    assert not run.rollouts.exists()
    shown = RolloutReader(run).group(1, 0)["completions"][0]
    assert shown["advantage"] is None and set(shown["trained"]) == {True} and shown["tokens"][0].isdigit()
