"""Groups -> batches: advantages, lags, minibatches, denominators, statistics."""

import numpy as np
import pytest
from msgspec.structs import replace

from learner.methods.grpo import make_batch
from protocol.config import Recipe
from protocol.messages import Group
from tests.learner.reference import make_group

STEP_OF_VERSION = {3: 7, 4: 8, 5: 9}


def recipe(minibatches: int = 1, **grpo: object) -> Recipe:
    return Recipe.model_validate(
        {
            "rollout": {"groups_per_step": 4, "group_size": 3},
            "grpo": {"advantage": "group_mean"} | grpo,
            "optim": {"minibatches": minibatches},
        }
    )


def groups() -> list[Group]:
    spans: list[tuple[tuple[int, int], ...]] = [((3, 0), (5, 2)), ((4, 0),), ((5, 0),)]
    rewards = ([1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.5], [1.0, 1.0, 1.0])
    return [make_group(r, [4, 2, 3], spans, index=i) for i, r in enumerate(rewards)]


def make(recipe: Recipe, changed: list[Group] | None = None):
    return make_batch(changed or groups(), recipe, STEP_OF_VERSION.__getitem__, step=9)


def test_make_batch_cuts_buffers_by_recorded_lengths() -> None:
    batch, group = make(recipe(skip_zero_advantage=False)), groups()[2]
    row = batch.minibatches[0].rows[2]
    ids, logprobs = np.frombuffer(group.token_ids, "<i4"), np.frombuffer(group.logprobs, "<f4")
    assert row.prompt_ids == group.prompt_ids and row.temperature == group.temperature
    for sample, (start, end) in zip(row.samples, ((0, 4), (4, 6), (6, 9)), strict=True):
        assert sample.token_ids.tolist() == ids[start:end].tolist()
        assert sample.engine_logprobs.tolist() == logprobs[start:end].tolist()
    assert [s.advantage for s in row.samples] == pytest.approx([-0.5, 0.5, 0.0])


def test_make_batch_counts_lag_in_steps_token_by_token() -> None:
    batch = make(recipe(skip_zero_advantage=False))
    row = batch.minibatches[0].rows[0]
    assert [sample.lag.tolist() for sample in row.samples] == [[2, 2, 0, 0], [1, 1], [0, 0, 0]]
    assert batch.stats["lag_mean"] == pytest.approx(6 / 9)
    assert batch.stats["lag_max"] == 2


def test_make_batch_leaves_out_zero_advantage_but_not_from_the_denominators() -> None:
    (kept,) = make(recipe()).minibatches
    assert [len(row.samples) for row in kept.rows] == [3, 2]  # two groups are equal, one completion is the mean
    assert (kept.num_tokens, kept.num_sequences) == (36, 12)
    (whole,) = make(recipe(skip_zero_advantage=False)).minibatches
    assert [len(row.samples) for row in whole.rows] == [3, 3, 3, 3]
    assert (whole.num_tokens, whole.num_sequences) == (36, 12)


def test_make_batch_divides_whole_groups_over_minibatches() -> None:
    batch = make(recipe(minibatches=2, skip_zero_advantage=False))
    assert [[row.prompt_ids for row in m.rows] for m in batch.minibatches] == [
        [g.prompt_ids for g in groups()[:2]], [g.prompt_ids for g in groups()[2:]],
    ]  # fmt: skip
    assert [m.num_tokens for m in batch.minibatches] == [18, 18]


def test_make_batch_uses_the_standard_deviation_of_the_recipe() -> None:
    batch = make(recipe(advantage="group_mean_std", std_eps=0.5))
    deviation = np.std([1.0, 0.0, 0.0], ddof=1)
    expected = [x / (deviation + 0.5) for x in (2 / 3, -1 / 3, -1 / 3)]
    assert [s.advantage for s in batch.minibatches[0].rows[0].samples] == pytest.approx(expected)


def test_make_batch_estimates_advantages_as_the_recipe_says() -> None:
    rewards = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]
    flat = np.array(rewards)
    expected = {
        "leave_one_out": (flat - flat.mean(1, keepdims=True)) * 3 / 2,
        "batch_normalized": (flat - flat.mean()) / (flat.std(ddof=1) + 0.5),
        "none": flat,
    }
    for advantage, values in expected.items():
        loss = {"loss": "no_baseline"} if advantage == "none" else {}
        batch = make(recipe(advantage=advantage, std_eps=0.5, skip_zero_advantage=False, **loss))
        found = [[sample.advantage for sample in row.samples] for row in batch.minibatches[0].rows]
        assert np.array(found) == pytest.approx(values, abs=1e-6), advantage


def test_make_batch_describes_the_groups() -> None:
    stats = make(recipe()).stats
    rewards = [1, 0, 0, 0, 0, 0, 0, 1, 0.5, 1, 1, 1]
    assert stats["reward_mean"] == pytest.approx(np.mean(rewards))
    assert stats["reward_std"] == pytest.approx(np.std(rewards))
    assert stats["zero_variance_share"] == 0.5
    assert (stats["completion_tokens"], stats["completion_tokens_mean"]) == (36, 3)
    assert stats["truncated_completions_share"] == pytest.approx(1 / 3)


def test_make_batch_leaves_out_empty_and_wholly_masked_completions() -> None:
    group = make_group([1.0, 0.0, 0.0], [2, 0, 3], [((5, 0),), (), ((5, 0),)])
    group = replace(group, mask=bytes([1, 1, 0, 0, 0]))
    (minibatch,) = make(recipe(skip_zero_advantage=False), [group]).minibatches
    assert [s.num_tokens for s in minibatch.rows[0].samples] == [2]
    assert minibatch.rows[0].samples[0].advantage == pytest.approx(2 / 3)  # all three are the baseline
    assert (minibatch.num_tokens, minibatch.num_sequences) == (2, 3)


def test_make_batch_holds_a_failed_grader_against_nobody() -> None:
    """Three right answers and one whose grader timed out are no signal; with a wrong one, three make the baseline."""
    errors = ("", "", "", "time limit of 5 s")

    def graded(*rewards: float) -> Group:
        group = make_group([*rewards, 0.0], [2, 2, 2, 2], [((5, 0),)] * 4)
        completions = [replace(c, grader_error=error) for c, error in zip(group.completions, errors, strict=True)]
        return replace(group, completions=tuple(completions))

    (none,) = make(recipe(), [graded(1.0, 1.0, 1.0)]).minibatches
    assert none.rows == ()
    batch = make(recipe(), [graded(1.0, 1.0, 0.0)])
    (row,) = batch.minibatches[0].rows
    assert [sample.advantage for sample in row.samples] == pytest.approx([1 / 3, 1 / 3, -2 / 3])
    assert batch.stats["reward_mean"] == pytest.approx(2 / 3)
    assert batch.stats["grader_errors"] == 1
    assert batch.minibatches[0].num_tokens == 6


def test_row_has_the_temperature_of_its_group() -> None:
    group = make_group([1.0, 0.0, 0.0], [2, 2, 2], [((5, 0),)] * 3, temperature=0.7)
    assert [row.temperature for row in make(recipe(), [group]).minibatches[0].rows] == [0.7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": b"\0" * 35}, "0/0, logprobs: found 35 bytes, expected 36"),
        ({"token_ids": b""}, "0/0, token_ids: found 0 bytes"),
        ({"mask": b"\1" * 10}, "0/0, mask: found 10 bytes, expected 9"),
    ],
)
def test_make_batch_refuses_buffers_that_do_not_fit(change: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(recipe(), [replace(groups()[0], **change)])


@pytest.mark.parametrize("spans", [(), ((5, 1),), ((3, 0), (4, 0)), ((3, 0), (4, 4)), ((6, 0),)])
def test_make_batch_refuses_spans_that_make_no_sense(spans: tuple[tuple[int, int], ...]) -> None:
    group = make_group([1.0, 0.0, 0.0], [4, 2, 3], [spans, ((5, 0),), ((5, 0),)])
    with pytest.raises(ValueError, match="completion 0: found version spans"):
        make_batch([group], recipe(), {**STEP_OF_VERSION, 6: 10}.__getitem__, step=9)


def test_make_batch_refuses_rewards_that_are_not_numbers() -> None:
    with pytest.raises(ValueError, match="0/0: found rewards"):
        make(recipe(), [make_group([1.0, float("nan"), 0.0], [1, 1, 1], [((5, 0),)] * 3)])


def test_a_batch_that_nobody_could_grade_has_no_advantages_whatever_the_estimator() -> None:
    failed = [
        replace(group, completions=tuple(replace(c, grader_error="x") for c in group.completions)) for group in groups()
    ]
    for advantage in ("batch_normalized", "group_mean", "group_mean_std", "leave_one_out"):
        batch = make(recipe(advantage=advantage, skip_zero_advantage=False), failed)
        assert all(s.advantage == 0.0 for m in batch.minibatches for row in m.rows for s in row.samples), advantage
