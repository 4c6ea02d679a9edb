"""Whole runs of the learner in this process, with an actor on the fake engine in a thread: what each method leaves
behind, evaluations beside training, the guard and its way back, and going on after a stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.intake.journal import read_groups
from learner.intake.source import Interrupted, StopFlag
from learner.loop import Learner
from learner.outcome import GuardStop
from learner.ranks import ALONE, Ranks
from learner.telemetry.sample import ActorSample, Sample
from learner.telemetry.timeline import TimelineReader
from protocol.config import Recipe, parse_recipe
from protocol.keys import make_keys
from protocol.rundir import RunDir, read_json, read_jsonl, write_json
from tests.actor_harness import ActorThread, until
from tests.tiny_model import make_tiny_model

BASE: dict[str, Any] = {
    "steps": 4,
    "model": {"dtype": "float32", "max_model_len": 128},
    "task": {"max_operand": 5, "grader": "coins:even"},
    "rollout": {"groups_per_step": 4, "group_size": 4, "max_tokens": 6, "max_lag": 0},
    "eval": {"prompts": 3, "samples": 2},
    "actor": {"engine": "fake", "max_running": 16},
    "wire": {"heartbeat_s": 0.1, "dead_after_s": 20.0},
    "learner": {"device": "cpu"},
}
TRIPS_ON_EVERY_UPDATE = {"window": 1, "kl_max": 1e-6}
"""The fake engine's logprobs have nothing to do with the model's."""


COINS = """
def even(response, answer):
    return {"reward": float(len(response) % 2 == 0)}

def sevens(response, answer):
    return {"reward": float(response.startswith("7"))}
"""
"""Graders by which the fake engine's digits are right now and then."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("loop") / "tiny")


def recipe_of(**changes: Any) -> Recipe:
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    if changes.get("method") in ("sft", "dpo"):
        del data["steps"]
    for key, value in changes.items():
        data[key] = data.get(key, {}) | value if isinstance(value, dict) else value
    return parse_recipe(data, "test")


def learn(
    recipe: Recipe,
    directory: Path,
    model: Path,
    stop: StopFlag | None = None,
    watch: Callable[[Learner], None] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[bool, RunDir]:
    """One learner process's worth of a run; (finished, the run directory)."""
    run = RunDir(directory).create()
    learner = Learner(recipe, run, model, stop or StopFlag(), ranks)
    if watch:
        watch(learner)
    if not recipe.needs_actors:
        return learner(), run
    make_keys(run.keys)
    (directory / "coins.py").write_text(COINS)
    actor = ActorThread(str(run.endpoint))
    actor.loop.user_functions, actor.loop.user_path = ("coins:even", "coins:sevens"), str(directory)
    with actor:
        return learner(), run


def stop_after(steps: int, stop: StopFlag) -> Callable[[Learner], None]:
    """Ask the learner to stop when it has logged so many steps."""

    def watch(learner: Learner) -> None:
        step = learner._step

        def stopping(recent: Any) -> dict[str, float]:
            figures = step(recent)
            if learner.state.step >= steps:
                stop.set()
            return figures

        learner._step = stopping  # type: ignore[method-assign]

    return watch


def column(run: RunDir, name: str) -> list[Any]:
    return [row.get(name) for row in read_jsonl(run.metrics)]


# --- methods ----------------------------------------------------------------------------------------------------------


def test_sft_without_evaluation_needs_no_actor_and_learns_its_pairs(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(
        method="sft",
        task={"max_operand": 2},
        eval={"prompts": 0},
        optim={"lr": 3e-3},
        sft={"epochs": 8, "batch_size": 4},
    )
    finished, run = learn(recipe, tmp_path, model)
    losses = column(run, "nll")
    assert finished and len(losses) == 8 * 3  # 6 pairs of operands, each in both orders, by 4
    assert losses[-1] < losses[0] / 2
    assert not run.endpoint.exists() and not run.versions.exists(), "no socket, no version"
    assert not list(run.journal.parent.iterdir()) and not run.rollouts.exists()
    summary = read_json(run.summary)
    assert (summary["method"], summary["steps"], summary["tickets"]["issued"]) == ("sft", 24, 0)
    assert (run.model / "model.safetensors").exists()


def working(sample: Sample) -> list[ActorSample]:
    """Actors that were heard of more than once since they served their first version."""
    return [actor for actor in sample.actors.values() if actor.tokens and actor.serving_s]


def hold_until_sampled(learner: Learner) -> None:
    """Let no step end before a sample has seen an actor at work: a whole run may be shorter than a sample."""
    step = learner._step

    def holding(recent: Any) -> dict[str, float]:
        figures = step(recent)
        until(lambda: (newest := learner.telemetry.newest) and working(newest), "a sample with an actor at work")
        return figures

    learner._step = holding  # type: ignore[method-assign]


def test_timeline_of_a_run_adds_up(tmp_path: Path, model: Path) -> None:
    began = time.monotonic()
    finished, run = learn(recipe_of(metrics={"sample_every_s": 0.2}), tmp_path, model, watch=hold_until_sampled)
    passed, slack = time.monotonic() - began, 0.02  # figures are rounded to milliseconds
    samples = list(TimelineReader(run.timeline).new())
    last, rows, summary = samples[-1], read_jsonl(run.metrics), read_json(run.summary)
    assert finished and (last.phase, last.step, last.version) == ("finished", 4, summary["weights"]["versions"])
    assert last.tickets == summary["tickets"] and last.tickets["trained"] == 16
    assert last.groups == 16 + 2 * 3, "evaluations before and after have their groups, too"
    assert last.trained_tokens == sum(row["tokens"] for row in rows)
    assert 0 < last.waits["groups"] <= sum(row["wait_s"] for row in rows) + slack
    assert last.phases["waiting"] >= last.waits["groups"] - slack
    assert 0 < last.phases["training"] <= sum(row["step_s"] - row["wait_s"] for row in rows) + slack
    assert last.phases["waiting"] + last.phases["training"] <= sum(row["step_s"] for row in rows) + slack
    assert last.t - samples[0].t - slack <= sum(last.phases.values()) <= passed + slack, "each second in one phase"
    for count in ("groups", "tokens", "step", "weights_bytes"):
        counted = [getattr(sample, count) for sample in samples]
        assert counted == sorted(counted), f"{count} only grow"
    actor = next(actor for sample in samples for actor in working(sample))
    assert actor.version >= 1 and actor.room == 16


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_what_the_reference_makes_of_a_batch_is_no_waiting(tmp_path: Path, model: Path, method: str) -> None:
    """Its forward pass is the learner's work, however long it takes: here longer than all that is rounded."""
    batches_s, references_s, phases = [], [], []

    def with_slow_reference(learner: Learner) -> None:
        with_reference, training = learner.trainer.with_reference, learner._training

        def slowly(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic()
            phases.append(learner.telemetry.clock.phase)
            time.sleep(0.1)
            rows = with_reference(*arguments, **options)
            references_s.append(time.monotonic() - began)
            return rows

        def measured() -> None:
            batch = learner.feed.batch

            def timed(step: int) -> Any:
                began = time.monotonic()
                try:
                    return batch(step)
                finally:
                    batches_s.append(time.monotonic() - began)

            learner.feed.batch = timed  # type: ignore[method-assign]
            training()

        learner.trainer.with_reference = slowly  # type: ignore[method-assign]
        learner._training = measured  # type: ignore[method-assign]

    of_method: dict[str, Any] = {"grpo": {"grpo": {"kl_coef": 0.1}}, "dpo": {"dpo": {"batch_size": 16}, "steps": 4}}
    recipe = recipe_of(method=method, eval={"prompts": 0}, **of_method[method])
    finished, run = learn(recipe, tmp_path, model, watch=with_slow_reference)
    slack, last = 0.02, list(TimelineReader(run.timeline).new())[-1]
    assert finished and phases == ["training"] * len(column(run, "step")) != []
    assert last.phases["training"] >= sum(references_s) - slack
    if method == "dpo":
        assert "waiting" not in last.phases and not last.waits, "nobody draws anything"
    else:
        assert last.waits["groups"] - slack <= last.phases["waiting"] <= sum(batches_s) - sum(references_s) + slack


def test_sft_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(method="sft", task={"max_operand": 2}, eval={"prompts": 0}, sft={"epochs": 2, "batch_size": 4})
    _, whole = learn(recipe, tmp_path / "whole", model)
    stop = StopFlag()
    finished, cut = learn(recipe, tmp_path / "cut", model, stop, stop_after(4, stop))
    assert not finished and len(column(cut, "step")) == 4
    finished, cut = learn(recipe, tmp_path / "cut", model)
    assert finished
    assert column(cut, "nll") == column(whole, "nll"), "the same pairs in the same order, from the same weights"


def test_sft_with_evaluation_publishes_only_what_is_evaluated(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(method="sft", steps=5, eval={"every_steps": 2}, sft={"batch_size": 4})
    _, run = learn(recipe, tmp_path, model)
    versions = read_jsonl(run.versions)
    results = {path.stem: read_json(path) for path in run.eval.glob("*.json")}
    assert {"before", "step-00002", "after"} <= set(results) <= {"before", "step-00002", "step-00004", "after"}
    assert versions[0]["step"] == 0 and versions[-1]["step"] == 5
    assert {row["step"] for row in versions} <= {0, 2, 4, 5}
    assert results["after"]["version_tokens"].keys() == {str(versions[-1]["version"])}


def test_dpo_holds_on_to_the_model_as_it_came(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(
        method="dpo",
        task={"max_operand": 2},
        eval={"prompts": 0},
        optim={"lr": 1e-3},
        dpo={"epochs": 6, "batch_size": 4},
    )
    stop = StopFlag()
    learn(recipe, tmp_path, model, stop, stop_after(9, stop))
    finished, run = learn(recipe, tmp_path, model)
    losses, accuracy = column(run, "loss"), column(run, "dpo_accuracy")
    assert finished and losses[0] == pytest.approx(0.6931, abs=1e-3), "the policy is its own reference at first"
    assert losses[-1] < 0.5 and accuracy[-1] == 1.0
    assert column(run, "dpo_margin")[9] > 0.05, "after a restart it is still the first model, not the restored one"


def test_expert_iteration_learns_from_what_is_right_and_goes_on_where_nothing_is(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(method="expert_iteration", steps=6, task={"grader": "coins:sevens"})
    finished, run = learn(recipe, tmp_path, model)
    kept, updates = column(run, "kept_completions"), column(run, "updates")
    assert finished and len(kept) == 6
    assert 0 in kept and any(kept)
    assert [count > 0 for count in kept] == [count > 0 for count in updates]
    assert f"step {kept.index(0) + 1}: the grader accepted none of 16 completions" in caplog.text
    assert all(entropy > 0 for entropy in column(run, "sampled_entropy"))
    journaled = {group.id.index: group for group in read_groups(run.journal) if group.kind == "train"}
    right = sum(c.scores["reward"] == 1 for index in range(4) for c in journaled[index].completions)
    assert kept[0] <= right


def test_a_resumed_run_says_how_far_its_journal_is_read(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of days of rollouts that takes minutes, in which other ranks wait, too."""
    monkeypatch.setattr("learner.intake.journal.PROGRESS_EVERY_S", -1.0)
    said: list[str] = []
    told: list[str] = []

    def listening(learner: Learner) -> None:
        put = learner.status.set

        def heard(phase: str | None = None, /, **fields: Any) -> None:
            put(phase, **fields)
            said.append(learner.status.text)

        monkeypatch.setattr(learner.status, "set", heard)
        monkeypatch.setattr(learner.trainer.ranks, "still_waiting", told.append)

    stop = StopFlag()

    def stopping(learner: Learner) -> None:
        stop_after(2, stop)(learner)
        listening(learner)

    learn(recipe_of(), tmp_path, model, stop, stopping)
    assert not [text for text in said if "journal" in text], "there was none"
    said.clear()
    told.clear()
    assert learn(recipe_of(), tmp_path, model, watch=listening)[0]
    reading = [text for text in said if text.startswith("reading the journal")]
    assert reading[0] == "reading the journal" and reading[-1] == "reading the journal, 0.0 of 0.0 GB"
    assert said[: len(reading)] == reading and said[len(reading)] == "loading the model", "and then no more"
    assert told.count("the journal to be read") == len(reading) - 1


def test_grpo_filters_groups_without_variance_and_replaces_them(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(rollout={"group_size": 2, "dynamic_sampling": True})
    _, run = learn(recipe, tmp_path, model)
    tickets = read_json(run.summary)["tickets"]
    assert (tickets["trained"], tickets["leased"], tickets["queued"]) == (16, 0, 0)
    assert tickets["filtered"] > 0 and tickets["issued"] == 16 + tickets["filtered"]
    filtered = [count or 0 for count in column(run, "filtered_groups")]
    assert 0 < sum(filtered) <= tickets["filtered"]
    groups = column(run, "groups")
    assert groups == [4 + count for count in filtered], "figures are of what was sampled"


def test_grpo_with_a_reference_keeps_it_over_a_restart(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(grpo={"kl_coef": 0.1}, optim={"lr": 1e-3}, warm_start={"examples": 4, "batch_size": 4})
    stop = StopFlag()
    learn(recipe, tmp_path, model, stop, stop_after(2, stop))
    kept = RunDir(tmp_path).reference.read_bytes()
    finished, run = learn(recipe, tmp_path, model)
    assert finished and run.reference.read_bytes() == kept
    assert column(run, "reference_kl_k3")[0] == 0, "the reference is the model as GRPO found it"
    assert column(run, "reference_kl_k3")[-1] > 0


def test_a_run_of_before_the_references_digest_goes_on(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(grpo={"kl_coef": 0.1})
    stop = StopFlag()
    learn(recipe, tmp_path, model, stop, stop_after(2, stop))
    for path in RunDir(tmp_path).checkpoints.glob("step-*/state.json"):
        header = read_json(path)
        del header["state"]["run"]["reference"]
        write_json(path, header)
    assert learn(recipe, tmp_path, model)[0]


def test_a_reference_that_is_not_the_kept_one_is_refused(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(grpo={"kl_coef": 0.1})
    stop = StopFlag()
    learn(recipe, tmp_path, model, stop, stop_after(2, stop))
    path = RunDir(tmp_path).reference
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    with pytest.raises(
        ValueError, match=r"reference.safetensors: found .*, it was written with .*: truncated or altered"
    ):
        learn(recipe, tmp_path, model)


def test_an_evaluation_measures_one_version_and_trains_nothing(tmp_path: Path, model: Path) -> None:
    finished, run = learn(recipe_of(method="eval", steps=0), tmp_path, model)
    result = read_json(run.eval / "eval.json")
    assert finished and result["version_tokens"].keys() == {"1"}
    assert len(read_jsonl(run.eval / "eval_responses.jsonl")) == 6
    assert not list(run.checkpoints.iterdir()) and not run.model.exists()
    assert read_json(run.summary)["eval"] == result["reward"]


def test_a_budget_of_tokens_ends_training_with_the_step_that_reaches_it(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(steps=100, token_budget=150, rollout={"group_size": 2, "dynamic_sampling": True})
    finished, run = learn(recipe, tmp_path, model)
    drawn, summary = column(run, "sampled_tokens"), read_json(run.summary)
    assert finished and sum(drawn) >= 150 > sum(drawn[:-1]), "filtered groups count, too"
    assert summary["budget_tokens"] == sum(drawn) > summary["rollout_tokens"]
    assert summary["eval_after"] is not None and run.model.exists()


def test_after_an_error_of_its_own_the_learner_finds_its_actors_waiting(tmp_path: Path, model: Path) -> None:
    """The launcher starts the learner again then, but not the actors."""
    run = RunDir(tmp_path).create()
    make_keys(run.keys)
    (tmp_path / "coins.py").write_text(COINS)
    broken = Learner(recipe_of(), run, model, StopFlag())
    broken._report = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    actor = ActorThread(str(run.endpoint))
    actor.loop.user_functions, actor.loop.user_path = ("coins:even",), str(tmp_path)
    with actor:
        with pytest.raises(ZeroDivisionError):
            broken()
        assert not actor.reason, "it has not left"
        assert Learner(recipe_of(), run, model, StopFlag())()
        until(lambda: actor.reason, "the actor to leave")
    assert read_json(run.summary)["steps"] == 4


# --- evaluations beside training --------------------------------------------------------------------------------------


def test_evaluation_in_the_background_says_which_versions_it_measured(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(
        steps=8, eval={"every_steps": 2, "prompts": 6}, rollout={"max_lag": 1}, actor={"fake_token_s": 0.005}
    )
    _, run = learn(recipe, tmp_path, model)
    versions = {row["version"]: row["step"] for row in read_jsonl(run.versions)}
    results = {path.stem: read_json(path) for path in run.eval.glob("step-*.json")}
    assert results, "two steps pass between two of them"
    for name, result in results.items():
        assert versions[result["version_first"]] >= int(name.removeprefix("step-")), "nothing older than it asked for"
        assert sum(result["version_tokens"].values()) == result["tokens"]
        assert sum(result["version_shares"].values()) == pytest.approx(1)
    measured = [row for row in read_jsonl(run.metrics) if "eval_reward" in row]
    assert all(row["step"] > 2 for row in measured)
    assert len(measured) == len(results), "also the one that ends behind the last step"
    assert [row["step"] for row in read_jsonl(run.metrics)] == list(range(1, 9))
    assert read_json(run.summary)["tickets"]["trained"] == 32, "evaluation tickets have a ledger of their own"


@pytest.mark.parametrize("method", ["expert_iteration", "dpo"])
def test_every_method_is_evaluated_in_the_background(method: str, tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(
        method=method, steps=4, task={"max_operand": 2}, eval={"every_steps": 1}, dpo={"batch_size": 2},
        expert_iteration={"min_reward": 0.0},
    )  # fmt: skip
    _, run = learn(recipe, tmp_path, model)
    steps = {row["version"]: row["step"] for row in read_jsonl(run.versions)}
    result = read_json(run.eval / "step-00001.json")
    assert steps[result["version_first"]] >= 1 and result["tokens"] > 0
    assert any("eval_reward" in row for row in read_jsonl(run.metrics))
    assert {path.stem for path in run.eval.glob("*.json")} >= {"before", "after"}


def test_greedy_evaluation_draws_one_completion_of_each_problem(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(method="eval", steps=0, eval={"temperature": 0.0, "samples": 1})
    finished, run = learn(recipe, tmp_path, model)
    assert finished and read_json(run.eval / "eval.json")["samples"] == 1


def test_a_stop_while_the_last_evaluation_is_waited_for_loses_no_step(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(method="sft", steps=4, sft={"batch_size": 4}, eval={"every_steps": 3})
    stop = StopFlag()

    def stop_in_finish(learner: Learner) -> None:
        """Ctrl-C when training has ended and an evaluation in the background has not."""
        training = learner._training

        def stopping() -> None:
            finish = learner.evaluations.finish

            def stopped(*_: Any) -> None:
                stop.set()
                raise Interrupted("the evaluation in the background")

            learner.evaluations.finish = stopped  # type: ignore[method-assign]
            training()
            learner.evaluations.finish = finish  # type: ignore[method-assign]

        learner._training = stopping  # type: ignore[method-assign]

    finished, run = learn(recipe, tmp_path, model, stop, stop_in_finish)
    assert not finished and run.checkpoint_steps()[-1] == 4
    finished, run = learn(recipe, tmp_path, model)
    assert finished and len(column(run, "step")) == 4 and read_json(run.summary)["eval_after"] is not None
    assert (run.eval / "step-00004.json").exists() and "eval_reward" in read_jsonl(run.metrics)[-1], "begun again"


def test_an_evaluation_that_a_stop_cut_short_is_begun_again(tmp_path: Path, model: Path) -> None:
    """It is under way when the run stops after step 3; the resumed run begins it after its first step."""
    recipe = recipe_of(steps=8, eval={"every_steps": 3}, rollout={"max_lag": 1})
    stop = StopFlag()

    def never_ready(learner: Learner) -> None:
        stop_after(3, stop)(learner)
        training = learner._training

        def blind() -> None:
            learner.evaluations._collect = dict  # type: ignore[method-assign]
            training()

        learner._training = blind  # type: ignore[method-assign]

    finished, run = learn(recipe, tmp_path, model, stop, never_ready)
    assert not finished and not list(run.eval.glob("step-*.json"))
    finished, run = learn(recipe, tmp_path, model)
    assert finished and (run.eval / "step-00004.json").exists()


# --- the guard --------------------------------------------------------------------------------------------------------


def test_guard_warns_and_goes_on(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    finished, run = learn(recipe_of(guard={"policy": "warn", **TRIPS_ON_EVERY_UPDATE}), tmp_path, model)
    assert finished and read_json(run.summary)["rollbacks"] == 0
    assert caplog.text.count("guard, step ") == 1, "once for one episode"
    assert "guard, step 1: KL to the engine" in caplog.text
    assert column(run, "suspect_signals")[0] >= 1


def test_guard_stops_at_the_last_good_checkpoint(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(guard={"policy": "stop", **TRIPS_ON_EVERY_UPDATE}, checkpoint={"every_steps": 1})
    with pytest.raises(GuardStop, match=r"ended the run: step 1: KL to the engine .* good checkpoint is of step 0"):
        learn(recipe, tmp_path, model)
    stopped = RunDir(tmp_path)
    versions, summary = read_jsonl(stopped.versions), read_json(stopped.summary)
    assert "finished" not in {sample.phase for sample in TimelineReader(stopped.timeline).new()}
    given_up = max(row["version"] for row in versions if not row["branch"])
    measured = read_json(stopped.eval / "after.json")
    assert measured["version_tokens"].keys() == {str(versions[-1]["version"])} and versions[-1]["step"] == 0
    assert (stopped.model / "model.safetensors").exists(), "the model that is left is the last good one"
    assert summary["eval_after"] == measured["reward"] and "KL to the engine" in summary["guard"][0]
    finished, run = learn(recipe_of(guard={"policy": "off"}, checkpoint={"every_steps": 1}), tmp_path, model)
    assert finished and [(row["step"], row["branch"]) for row in read_jsonl(run.metrics)] == [
        (s, 1) for s in (1, 2, 3, 4)
    ]
    trained = [group for group in read_groups(run.journal) if group.kind == "train" and group.id.epoch == 1]
    assert {group.id.index for group in trained} == set(range(16))
    assert all(version > given_up for group in trained for c in group.completions for version, _ in c.spans)


def test_guard_goes_back_from_the_last_step_too(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(guard={"policy": "rollback", "window": 1}, checkpoint={"every_steps": 1})

    def collapse_at_the_end(learner: Learner) -> None:
        see = learner.guard.see

        def seeing(step: int, figures: dict[str, float], last: bool) -> Any:
            gap = 9.0 if last and not learner.state.rollbacks else 0.0
            return see(step, figures | {"kl_k3": gap, "updates": 1.0, "duplicate_share": 0.0}, last)

        learner.guard.see = seeing  # type: ignore[method-assign, assignment]

    finished, run = learn(recipe, tmp_path, model, watch=collapse_at_the_end)
    assert finished and read_json(run.summary)["rollbacks"] == 1
    assert [(row["step"], row["branch"]) for row in read_jsonl(run.metrics)] == [(1, 0), (2, 0), (3, 1), (4, 1)]


def test_guard_goes_back_on_a_new_branch_with_a_smaller_learning_rate(tmp_path: Path, model: Path) -> None:
    """A collapse that begins at step 4, as the guard sees it: back to step 2, and the second time it is none."""
    recipe = recipe_of(
        steps=6,
        guard={"policy": "rollback", "lr_factor": 0.5, "window": 1},
        checkpoint={"every_steps": 2},
        optim={"lr": 1e-4, "schedule": "cosine"},
        eval={"every_steps": 1},
    )

    def collapse_once(learner: Learner) -> None:
        see = learner.guard.see

        def seeing(step: int, figures: dict[str, float], last: bool) -> Any:
            collapsed = step == 4 and not learner.state.rollbacks
            assert last == (step == 6)
            return see(
                step, figures | {"kl_k3": 9.0 if collapsed else 0.0, "updates": 1.0, "duplicate_share": 0.0}, last
            )

        learner.guard.see = seeing  # type: ignore[method-assign, assignment]

    finished, run = learn(recipe, tmp_path, model, watch=collapse_once)
    summary, rows = read_json(run.summary), read_jsonl(run.metrics)
    assert finished and (summary["rollbacks"], summary["branch"], summary["lr_scale"]) == (1, 1, 0.5)
    assert [(row["step"], row["branch"]) for row in rows] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    abandoned = read_jsonl(run.abandoned_metrics)
    assert [(row["step"], row["branch"], row["abandoned_by_branch"]) for row in abandoned] == [(3, 0, 1), (4, 0, 1)]
    assert rows[2]["lr"] == pytest.approx(abandoned[0]["lr"] / 2)
    versions = read_jsonl(run.versions)
    assert [(row["step"], row["branch"]) for row in versions if row["branch"]] == [
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 1),
    ]
    tickets = summary["tickets"]
    assert tickets["trained"] == 24 and tickets["abandoned"] >= 8
    assert tickets["issued"] == 24 + tickets["abandoned"]
    trained = [group for group in read_groups(run.journal) if group.kind == "train" and group.id.epoch == 1]
    fork = next(row["version"] for row in versions if row["branch"] == 1)
    assert {group.id.index for group in trained} == set(range(8, 24)), "the steps behind the checkpoint, drawn anew"
    assert all(version >= fork for group in trained for c in group.completions for version, _ in c.spans)
    assert run.checkpoint_steps()[-1] == 6
    surviving = {row["version"] for row in versions if row["branch"] or row["step"] <= 2}
    for path in run.eval.glob("step-*.json"):
        assert {int(version) for version in read_json(path)["version_tokens"]} <= surviving, path.name


def test_a_stop_after_going_back_resumes_on_the_new_branch(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(
        steps=6,
        guard={"policy": "rollback", "max_rollbacks": 1, **TRIPS_ON_EVERY_UPDATE},
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(GuardStop, match="ended the run after 1 rollbacks"):
        learn(recipe, tmp_path, model)
    finished, run = learn(recipe_of(steps=6, checkpoint={"every_steps": 1}, guard={"policy": "off"}), tmp_path, model)
    summary = read_json(run.summary)
    assert finished and (summary["branch"], summary["lr_scale"], summary["rollbacks"]) == (2, 0.3, 1)
    assert column(run, "branch") == [2] * 6, "also the end by the guard opens one: what came after is given up"
    assert summary["tickets"]["issued"] == 24 + summary["tickets"]["abandoned"]
    assert len(read_jsonl(run.abandoned_metrics)) == 2


def test_a_gradient_that_is_not_finite_is_a_collapse_too(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(guard={"policy": "rollback", "kl_max": 0.0}, checkpoint={"every_steps": 1})

    def break_once(learner: Learner) -> None:
        step = learner._step

        def breaking(recent: Any) -> dict[str, float]:
            if learner.state.step == 2 and not learner.state.rollbacks:
                learner.feed.batch(2)
                raise FloatingPointError(
                    "step 2, update 1: found loss nan and gradient norm nan, expected finite numbers"
                )
            return step(recent)

        learner._step = breaking  # type: ignore[method-assign]

    finished, run = learn(recipe, tmp_path, model, watch=break_once)
    assert finished and read_json(run.summary)["rollbacks"] == 1
    assert column(run, "branch") == [1] * 4, "step 2 was not observed yet, step 1 hardly: back to the start"
