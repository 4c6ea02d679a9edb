"""What a step keeps of its first passes: the logprobs that the importance weights come from, in the groups' order."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from learner.batch import Batch, Drawn, pack
from learner.first_logprobs import FirstLogprobs
from learner.methods import sft
from learner.methods.grpo import make_batch
from learner.methods.rollouts import group_row
from learner.optim import Optimizer
from learner.ranks import ALONE
from learner.step import train_step
from protocol.config import Recipe
from protocol.messages import Group
from tests.learner.reference import make_group, plain_logprobs, policy

LR = 1e-2
"""Large: logprobs after an update are far from those before it."""


def recipe(packing: bool, minibatches: int, epochs: int, budget: int, **grpo: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "rollout": {"max_tokens": 16, "groups_per_step": 6, "group_size": 3},
            "optim": {"lr": LR, "minibatches": minibatches, "epochs": epochs},
            "grpo": {"advantage": "group_mean", "overlong": "mask"} | grpo,
            "learner": {"microbatch_tokens": budget, "packing": packing},
        }
    )


def groups() -> list[Group]:
    """Five, not in the order of their tickets. The last completion of each is cut off, and so masked."""
    made = [
        make_group([1.0, 0.0, 0.5], [4, 6, 3], index=3, temperature=0.7),
        make_group([0.0, 1.0, 0.0], [1, 5, 2], index=0, temperature=0.7),
        make_group([1.0, 1.0, 1.0], [3, 3, 3], index=4, temperature=0.7),
        make_group([0.0, 1.0, 0.25], [7, 2, 5], index=1, temperature=0.7),
        make_group([0.0, 1.0, 0.5], [2, 9, 4], index=2, temperature=0.7),
    ]
    broken = msgspec.structs.replace(made[4].completions[0], grader_error="time limit")
    tool = np.ones(16, np.uint8)
    tool[6:8] = 0
    made[0] = msgspec.structs.replace(made[0], mask=tool[:13].tobytes())
    made[4] = msgspec.structs.replace(made[4], completions=(broken, *made[4].completions[1:]))
    return made


def kept_of(model: Any, batch: Batch, recipe: Recipe) -> Tensor:
    kept = FirstLogprobs()
    train_step(model, Optimizer(model, recipe.optim), batch, recipe, LR, see=kept)
    assert batch.drawn is not None
    return kept.of_step(batch.drawn.num_tokens, ALONE)


@pytest.mark.parametrize(
    ("packing", "minibatches", "epochs", "budget"),
    [(True, 1, 1, 1000), (False, 1, 1, 20), (True, 3, 1, 20), (False, 2, 2, 1000), (True, 1, 3, 20)],
)
def test_kept_logprobs_are_those_of_the_weights_before_the_step(
    packing: bool, minibatches: int, epochs: int, budget: int
) -> None:
    settings, model = recipe(packing, minibatches, epochs, budget), policy()
    expected: list[float] = []
    with torch.no_grad():
        for number, group in enumerate(groups()):
            row = group_row(group, [0.0] * 3, lambda version: 0, 0)
            for place, sample in enumerate(row.samples):
                values = plain_logprobs(model.network, row, sample)
                left_out = place == 2 or number == 2 or (number == 4 and place == 0)  # cut; equal rewards; no grade
                expected += [float("nan")] * len(values) if left_out else values.tolist()
    expected[6:8] = [float("nan")] * 2  # of a tool
    batch = make_batch(groups(), settings, lambda version: 0, step=0)
    found = kept_of(model, batch, settings)
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=0, equal_nan=True)
    assert found.isnan().sum() == 27 and len(found) == 59
    sample = batch.minibatches[0].rows[0].samples[0]
    after = plain_logprobs(model.network, batch.minibatches[0].rows[0], sample)
    assert (after - found[:4]).abs().max() > 0.01, "the step has moved the weights"


def test_completions_without_advantage_have_logprobs_where_they_are_not_skipped() -> None:
    settings = recipe(True, 1, 1, 1000, skip_zero_advantage=False, overlong="none")
    found = kept_of(policy(), make_batch(groups(), settings, lambda version: 0, step=0), settings)
    assert found[21:30].isfinite().all() and found.isnan().sum() == 4, "the tool's, and those without a grade"


def test_a_batch_says_what_it_was_made_of() -> None:
    drawn = make_batch(groups(), recipe(True, 2, 1, 1000), lambda version: 0, step=0).drawn
    assert drawn is not None and drawn.num_tokens == 59
    assert drawn.ids == ((0, 3), (0, 0), (0, 4), (0, 1), (0, 2))
    assert drawn.lengths == ((4, 6, 3), (1, 5, 2), (3, 3, 3), (7, 2, 5), (2, 9, 4))
    assert drawn.advantages[0] == pytest.approx((0.5, -0.5, 0.0)) and drawn.advantages[2] == (0.0, 0.0, 0.0)
    assert drawn.advantages[4] == pytest.approx((0.0, 0.25, -0.25)), "of those that were graded"


def test_every_update_of_a_pass_is_seen_once() -> None:
    seen: list[int] = []
    settings, model = recipe(True, 2, 3, 20), policy()
    batch = make_batch(groups(), settings, lambda version: 0, step=0)
    train_step(
        model, Optimizer(model, settings.optim), batch, settings, LR, see=lambda p, _: seen.extend(p.places.tolist())
    )
    assert len(seen) == len(set(seen)) and min(seen) == 0


def test_demonstrations_have_no_place_and_are_not_seen() -> None:
    batch = sft.make_batch([((1, 2), (3, 4, 2))], 0)
    assert batch.drawn is None and pack(batch.minibatches[0].rows).places.tolist() == [-1, -1, -1]
    model = policy()
    settings = recipe(True, 1, 1, 1000)
    train_step(model, Optimizer(model, settings.optim), batch, settings, LR, see=lambda *_: pytest.fail("seen"))


def test_a_group_of_nothing_is_kept_as_nothing() -> None:
    assert FirstLogprobs().of_step(Drawn(((0, 0),), ((0, 2),), ((0.0, 0.0),)).num_tokens, ALONE).isnan().tolist() == [
        True,
        True,
    ]
