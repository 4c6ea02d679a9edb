"""Groups -> batches: advantages, lags, minibatches, denominators, statistics."""

import dataclasses
import math

import numpy as np
import pytest
from msgspec.structs import replace

from learner.batch import Row
from learner.methods.grpo import make_batch
from protocol.config import Recipe
from protocol.messages import Group
from tests.learner.reference import make_group

STEP_OF_VERSION = {3: 7, 4: 8, 5: 9}


def recipe(minibatches: int = 1, **grpo: object) -> Recipe:
    return Recipe.model_validate(
        {
            "rollout": {"groups_per_step": 4, "group_size": 3, "max_lag": 2},
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


def test_make_batch_counts_the_tokens_of_each_lag() -> None:
    stats = make(recipe(skip_zero_advantage=False)).stats
    assert {name: value for name, value in stats.items() if name.startswith("lag_tokens_")} == {
        "lag_tokens_0": 4 * 5, "lag_tokens_1": 4 * 2, "lag_tokens_2": 4 * 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(-1, [4, 2, 3]), (0, [2, 0, 3]), (1, [2, 2, 3])],
)
def test_tokens_of_weights_too_far_back_are_left_out_of_the_loss(limit: int, kept: list[int]) -> None:
    batch = make(recipe(skip_zero_advantage=False, max_token_lag=limit))
    row = batch.minibatches[0].rows[0]
    samples = [sample for sample in row.samples if sample.mask.any()]
    assert [int(sample.mask.sum()) for sample in samples] == [count for count in kept if count]
    assert samples[0].mask.tolist() == [limit == -1] * 2 + [True] * 2, "the part before the update, token by token"
    assert batch.minibatches[0].num_tokens == 4 * sum(kept), "they are no part of the denominator either"
    assert batch.stats["lag_max"] == 2, "what was drawn is described as it was"


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


# --- what length and a reference do ---

CUT_REWARDS = [[1.0, 0.0, 0.5, 0.1], [1.0, 0.0, 0.0, 0.0]]


def cut_groups() -> list[Group]:
    """One group whose second and last completions were cut off, and one that was cut off altogether."""
    reasons = (("stop", "length", "stop", "length"), ("length",) * 4)

    def cut(index: int, rewards: list[float]) -> Group:
        group = make_group(rewards, [3, 5, 2, 5], [((5, 0),)] * 4, index)
        pairs = zip(group.completions, reasons[index], strict=True)
        return replace(group, completions=tuple(replace(c, finish_reason=reason) for c, reason in pairs))

    return [cut(index, rewards) for index, rewards in enumerate(CUT_REWARDS)]


def long_recipe(max_tokens: int = 5, **grpo: object) -> Recipe:
    return Recipe.model_validate(
        {
            "rollout": {"groups_per_step": 2, "group_size": 4, "max_tokens": max_tokens},
            "grpo": {"advantage": "group_mean"} | grpo,
        }
    )


@pytest.mark.parametrize("advantage", ["group_mean", "batch_normalized"])
def test_overlong_mask_leaves_out_cut_completions_but_keeps_their_rewards_in_the_baseline(advantage: str) -> None:
    rewards = np.array(CUT_REWARDS)
    if advantage == "group_mean":
        expected = rewards - rewards.mean(1, keepdims=True)
    else:
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 0.5)
    settings = {"advantage": advantage, "std_eps": 0.5}
    batch = make(long_recipe(overlong="mask", **settings), cut_groups())
    (minibatch,) = batch.minibatches
    (row,) = minibatch.rows  # nothing is left of the second group
    assert [s.num_tokens for s in row.samples] == [3, 2] and all(s.mask.all() for s in row.samples)
    assert [s.advantage for s in row.samples] == pytest.approx(expected[0, [0, 2]], abs=1e-6)
    assert (minibatch.num_tokens, minibatch.num_sequences) == (5, 8)
    assert batch.stats["reward_mean"] == pytest.approx(rewards.mean())

    (untouched,) = make(long_recipe(**settings), cut_groups()).minibatches
    assert [[s.advantage for s in row.samples] for row in untouched.rows] == [
        pytest.approx(values, abs=1e-6) for values in expected
    ]
    assert (untouched.num_tokens, untouched.num_sequences) == (30, 8)


def soft_overlong(length: int, longest: int, buffer: int) -> float:
    """DAPO, eq. 13, case by case."""
    if length <= longest - buffer:
        return 0.0
    return ((longest - buffer) - length) / buffer if length <= longest else -1.0


@pytest.mark.parametrize(("max_tokens", "buffer", "penalty"), [(5, 4, 1.0), (5, 4, 0.25), (5, 2, 1.0), (7, 4, 1.0)])
def test_overlong_penalty_is_taken_off_the_rewards_before_the_advantages(
    max_tokens: int, buffer: int, penalty: float
) -> None:
    """Lengths of 3, 5, 2, 5 tokens: equal rewards differ then, and it is the length that counts, not the cut."""
    groups = [make_group(r, [3, 5, 2, 5], [((5, 0),)] * 4, i) for i, r in enumerate(([1.0, 0.0, 0.5, 1.0], [1.0] * 4))]
    settings = long_recipe(max_tokens, overlong="penalty", overlong_buffer=buffer, overlong_penalty=penalty)
    batch = make(settings, groups)
    lost = [penalty * soft_overlong(length, max_tokens, buffer) for length in (3, 5, 2, 5)]
    assert len(set(lost)) > 1
    for row, rewards in zip(batch.minibatches[0].rows, ([1.0, 0.0, 0.5, 1.0], [1.0] * 4), strict=True):
        shaped = [r + more for r, more in zip(rewards, lost, strict=True)]
        expected = [r - sum(shaped) / 4 for r in shaped]
        assert [s.advantage for s in row.samples] == pytest.approx(expected, abs=1e-6)
    assert batch.stats["reward_mean"] == pytest.approx(6.5 / 8), "the figure is what the grader said"


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_reward_is_the_estimators_sum_over_the_trained_tokens(estimator: str) -> None:
    lengths, mask = [3, 1, 2], [1, 0, 1, 1, 1, 1]
    group = replace(make_group([1.0, 0.0, 0.5], lengths, [((5, 0),)] * 3), mask=bytes(mask))
    reference = [np.array(values, np.float32) for values in ([-3.0, -9.0, -4.5], [-5.0], [-4.0, -3.2])]

    def add_reference(rows: list[Row]) -> list[Row]:
        return [
            dataclasses.replace(
                row,
                samples=tuple(
                    dataclasses.replace(s, reference_logprobs=r) for s, r in zip(row.samples, reference, strict=True)
                ),
            )
            for row in rows
        ]

    settings = recipe(kl_coef=0.3, kl_in="reward", kl_estimator=estimator)
    batch = make_batch([group], settings, STEP_OF_VERSION.__getitem__, 9, add_reference)
    differences = np.concatenate(reference).astype(float) - np.frombuffer(group.logprobs, "<f4")
    shaped, start = [], 0
    for reward, length in zip([1.0, 0.0, 0.5], lengths, strict=True):
        kept = [differences[t] for t in range(start, start + length) if mask[t]]
        shaped.append(reward - 0.3 * sum(-d if estimator == "k1" else math.exp(d) - 1 - d for d in kept))
        start += length
    expected = [r - sum(shaped) / 3 for r in shaped]
    assert [s.advantage for s in batch.minibatches[0].rows[0].samples] == pytest.approx(expected, abs=1e-5)
