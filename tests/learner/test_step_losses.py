"""Every key of `[grpo]` that the step's loss knows, against the papers' equations, one completion at a time in float64.

The policy here is a table of bigrams, the optimizer moves it by known amounts: a step of several updates, where ratios
leave 1 and clips bind, has exact values then. The network's own gradients are compared in `test_step.py`.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.batch import Batch, Minibatch, PackedBatch, Row, Sample
from learner.methods.grpo import make_batch
from learner.methods.rollouts import group_row
from learner.model import LogprobOutput
from learner.optim import Optimizer
from learner.step import train_step
from learner.telemetry.mfu import MatmulShape
from protocol.config import Recipe
from protocol.messages import Group
from protocol.sections import GrpoConfig
from tests.learner.reference import VOCABULARY, make_group, random_rows

MAX_TOKENS = 12
DRIFT = 0.25
SEED = 8
"""Of data in which every key of the cases below, and every bound, shows in the loss."""
DEFAULTS = GrpoConfig()


class Bigrams(torch.nn.Module):
    """What `train_step` asks of a policy. A token's logits depend on the token before it alone."""

    device = torch.device("cpu")
    shape = MatmulShape(parameters=1, layers=0, attention_width=0)

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(noise(0))

    def compute(self) -> nullcontext[None]:
        return nullcontext()

    def logprobs(self, packed: PackedBatch, with_entropy: bool) -> LogprobOutput:
        logits = self.table[packed.input_ids.flatten()[packed.predict_index]]
        distribution = (logits / packed.temperature[:, None]).log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1).detach()
        return LogprobOutput(distribution.gather(-1, packed.target_ids[:, None])[:, 0], entropy)


def noise(seed: int) -> Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def tables(updates: int) -> list[Tensor]:
    """The policy at each update of a step, from the first on: far enough apart for ratios of 0.5 and 2."""
    return [sum((DRIFT * noise(1 + i) for i in range(update)), noise(0)).double() for update in range(updates)]


def step(batch: Batch, settings: Recipe) -> tuple[list[Tensor], dict[str, float]]:
    """The gradient at every update of a step that goes through `tables`, and the step's metrics."""
    model, gradients = Bigrams(), []
    optimizer = Optimizer(model, settings.optim)  # type: ignore[arg-type]

    def move() -> None:
        gradients.append(model.table.grad.double())
        with torch.no_grad():
            model.table += DRIFT * noise(len(gradients))
        optimizer.zero_grad()

    optimizer.step = move  # type: ignore[method-assign]
    return gradients, train_step(model, optimizer, batch, settings, lr=1e-3)  # type: ignore[arg-type]


def recipe(grpo: dict[str, Any], **optim: int) -> Recipe:
    return Recipe.model_validate(
        {
            "rollout": {"max_tokens": MAX_TOKENS, "groups_per_step": 4, "group_size": 3},
            "optim": {"max_grad_norm": 1e9} | optim,
            "grpo": grpo,
            "learner": {"microbatch_tokens": 14},
        }
    )


# --- the slow mathematics ---------------------------------------------------------------------------------------------


def token_logprobs(table: Tensor, row: Row, sample: Sample) -> Tensor:
    tokens = sample.token_ids.tolist()
    before = [row.prompt_ids[-1], *tokens[:-1]]
    logits = table[before] / row.temperature
    return logits[range(len(tokens)), tokens] - logits.exp().sum(-1).log()


def importance(old: Tensor, engine: Tensor, grpo: GrpoConfig) -> Tensor:
    """w of every trained token of one completion."""
    if grpo.proximal == "engine" or grpo.importance_cap == 0:
        return torch.ones_like(old)
    weights = [math.exp(a - b) for a, b in zip(old.tolist(), engine.tolist(), strict=True)]
    if grpo.importance_level == "sequence":
        weights = [math.prod(weights)] * len(weights)
    if grpo.importance_mode == "truncate":
        return old.new_tensor([min(w, grpo.importance_cap) for w in weights])
    return old.new_tensor([w if grpo.importance_floor <= w <= grpo.importance_cap else 0.0 for w in weights])


def token_losses(now: Tensor, proximal: Tensor, advantage: float, grpo: GrpoConfig) -> Tensor:
    """Of the trained tokens of one completion, at least one."""
    if grpo.loss in ("no_baseline", "reinforce_with_baseline"):
        return -advantage * now
    low, high = 1 - grpo.clip_low, 1 + grpo.clip_high
    ratio = (now - proximal).exp()
    if grpo.loss == "cispo":
        return -ratio.detach().clamp(low, high) * advantage * now
    if grpo.loss == "gspo":  # the paper's objective of whole sequences, differentiated whole
        ratio = ratio.prod().pow(1 / len(now)).expand_as(now)
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def slow_loss(table: Tensor, start: Tensor, rows: Sequence[Row], grpo: GrpoConfig) -> Tensor:
    """Loss of an update at `table`, of a step that began at `start`, one completion at a time."""
    sequences = []
    for row, sample in [(r, s) for r in rows for s in r.samples if s.mask.any()]:
        now, old, engine = (
            x[sample.mask]
            for x in (
                token_logprobs(table, row, sample),
                token_logprobs(start, row, sample),
                torch.tensor(sample.engine_logprobs).double(),
            )
        )
        proximal = engine if grpo.proximal == "engine" else old
        terms = importance(old, engine, grpo) * token_losses(now, proximal, sample.advantage, grpo)
        if grpo.kl_coef and grpo.kl_in == "loss":
            d = torch.tensor(sample.reference_logprobs).double()[sample.mask] - now
            terms = terms + grpo.kl_coef * (-d if grpo.kl_estimator == "k1" else d.exp() - 1 - d)
        sequences.append(terms)
    if grpo.aggregation == "token_mean":
        return torch.cat(sequences).mean()
    lengths = [MAX_TOKENS if grpo.aggregation == "constant" else len(terms) for terms in sequences]
    total = sum(terms.sum() / length for terms, length in zip(sequences, lengths, strict=True))
    return total / sum(len(row.samples) for row in rows)


# --- a step of four updates -------------------------------------------------------------------------------------------


def near_rows() -> tuple[Row, ...]:
    """Completions drawn by a policy near the table, whose reference is near it too."""
    random, table = np.random.default_rng(SEED), noise(0)

    def near(row: Row, sample: Sample) -> Sample:
        own = token_logprobs(table, row, sample).numpy()
        engine, reference = ((own + random.normal(0, s, len(own))).astype(np.float32) for s in (0.3, 0.7))
        return replace(sample, engine_logprobs=engine, reference_logprobs=reference)

    return tuple(replace(row, samples=tuple(near(row, s) for s in row.samples)) for row in random_rows(seed=SEED))


def minibatch_of(rows: tuple[Row, ...]) -> Minibatch:
    samples = [sample for row in rows for sample in row.samples]
    return Minibatch(rows, int(sum(sample.mask.sum() for sample in samples)), len(samples))


CASES: dict[str, dict[str, Any]] = {
    "grpo_clip with a wider upper bound": {"clip_low": 0.05, "clip_high": 0.4},
    "grpo_clip with a wider lower bound": {"clip_low": 0.5, "clip_high": 0.05},
    "cispo": {"loss": "cispo", "clip_low": 0.05, "clip_high": 0.4},
    "cispo without a lower bound": {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.35},
    "gspo per sequence": {
        "loss": "gspo", "clip_low": 0.02, "clip_high": 0.08, "importance_level": "sequence",
        "aggregation": "sequence_mean",
    },
    "gspo per token, uncorrected": {"loss": "gspo", "clip_low": 0.4, "clip_high": 0.05, "importance_cap": 0.0},
    "mean of each sequence": {"aggregation": "sequence_mean"},
    "constant denominator": {"aggregation": "constant"},
    "proximal policy is the engine's": {"proximal": "engine"},
    "no importance weights": {"importance_cap": 0.0},
    "truncated by token": {"importance_cap": 1.1},
    "truncated by sequence": {"importance_cap": 1.1, "importance_level": "sequence"},
    "masked by token": {"importance_mode": "mask", "importance_cap": 1.25, "importance_floor": 0.8},
    "masked by sequence": {
        "importance_mode": "mask", "importance_cap": 1.4, "importance_floor": 0.7, "importance_level": "sequence",
    },
    "masked above alone": {"importance_mode": "mask", "importance_cap": 1.25},
    "k1 in the loss": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "k3 in the loss, per sequence": {"kl_coef": 0.3, "aggregation": "sequence_mean"},
}  # fmt: skip


@pytest.mark.parametrize("grpo", CASES.values(), ids=CASES.keys())
def test_every_update_of_a_step_has_the_loss_and_gradient_of_the_equations(grpo: dict[str, Any]) -> None:
    """Two passes over two minibatches; and a key that was not heeded would show in the loss."""
    rows, settings = near_rows(), recipe(grpo, epochs=2, minibatches=2)
    halves = (rows[:2], rows[2:])
    batch = Batch(step=0, minibatches=tuple(minibatch_of(half) for half in halves), stats={}, passes=2)
    found, metrics = step(batch, settings)
    start, *_ = path = tables(4)

    def loss_with(config: GrpoConfig) -> float:
        return sum(slow_loss(path[i], start, halves[i % 2], config).item() for i in range(4)) / 4

    assert (metrics["updates"], len(found)) == (4, 4)
    for i, gradient in enumerate(found):
        table = path[i].clone().requires_grad_()
        (expected,) = torch.autograd.grad(slow_loss(table, start, halves[i % 2], settings.grpo), table)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3, msg=lambda m, n=i: f"update {n + 1}: {m}")
    assert metrics["loss"] == pytest.approx(loss_with(settings.grpo), rel=1e-4, abs=1e-6)

    ignored = [{name: getattr(DEFAULTS, name)} for name, value in grpo.items() if value != getattr(DEFAULTS, name)]
    swapped = [{"clip_low": grpo["clip_high"], "clip_high": grpo["clip_low"]}] if "clip_low" in grpo else []
    for other in (*ignored, *swapped):
        assert abs(loss_with(settings.grpo.model_copy(update=other)) - metrics["loss"]) > 1e-3, f"{other} shows nowhere"


def test_a_kl_in_the_reward_adds_nothing_to_the_loss() -> None:
    batch = Batch(step=0, minibatches=(minibatch_of(near_rows()),), stats={}, passes=2)
    found = {}
    for where in ("reward", "loss"):
        found[where] = step(batch, recipe({"kl_coef": 0.3, "kl_in": where}, epochs=2))
    without = step(batch, recipe({}, epochs=2))
    assert found["reward"][1] == without[1]
    assert all(torch.equal(a, b) for a, b in zip(found["reward"][0], without[0], strict=True))
    assert found["loss"][1]["loss"] > without[1]["loss"] + 0.01


# --- from groups on, one update ---------------------------------------------------------------------------------------


def step_of_groups(groups: list[Group], settings: Recipe) -> tuple[Tensor, dict[str, float]]:
    (gradient,), metrics = step(make_batch(groups, settings, lambda version: 0, step=0), settings)
    return gradient, metrics


def assert_equations(groups: list[Group], advantages: list[list[float]], cut: list[list[int]], grpo: Any) -> None:
    """A step over the groups has the loss and gradient of these advantages, without the tokens of the `cut` ones."""
    settings, table = recipe(grpo), tables(1)[0].requires_grad_()
    rows = []
    for group, values, masked in zip(groups, advantages, cut, strict=True):
        row = group_row(group, values, lambda version: 0, 0)
        samples = [replace(s, mask=s.mask & (i not in masked)) for i, s in enumerate(row.samples)]
        rows.append(replace(row, samples=tuple(samples)))
    loss = slow_loss(table, table.detach(), rows, settings.grpo)
    (expected,) = torch.autograd.grad(loss, table)
    gradient, metrics = step_of_groups(groups, settings)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert expected.abs().max() > 0.005


REWARDS = [[1.0, 0.0, 0.8], [0.0, 0.4, 0.5]]


def two_groups() -> list[Group]:
    """Groups of three, the last completion of each cut off."""
    return [make_group(rewards, [4, 2, 7], index=i) for i, rewards in enumerate(REWARDS)]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(
    ("loss", "advantage"),
    [("no_baseline", "none"), ("reinforce_with_baseline", "group_mean"), ("grpo_clip", "group_mean")],
)
def test_losses_of_one_update_multiply_by_the_reward_or_by_the_advantage(
    loss: str, advantage: str, aggregation: str
) -> None:
    expected = [[r - (0.0 if advantage == "none" else sum(rewards) / 3) for r in rewards] for rewards in REWARDS]
    settings = {"loss": loss, "advantage": advantage, "aggregation": aggregation}
    assert_equations(two_groups(), expected, [[], []], settings)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_completions_cut_off_leave_the_loss_but_neither_the_baseline_nor_the_count_of_sequences(
    aggregation: str,
) -> None:
    expected = [[r - sum(rewards) / 3 for r in rewards] for rewards in REWARDS]
    settings = {"advantage": "group_mean", "aggregation": aggregation, "overlong": "mask"}
    assert_equations(two_groups(), expected, [[2], [2]], settings)
    _, metrics = step_of_groups(two_groups(), recipe(settings))
    assert metrics["tokens"] == 2 * (4 + 2)
    assert metrics["reward_mean"] == pytest.approx(np.mean(REWARDS)), "the figures are of everything sampled"


def test_the_overlong_penalty_reaches_the_loss() -> None:
    """Buffer of 8 before 12 tokens, so it begins at 4: the 7 tokens lose 3 / 8 of 0.5."""
    shaped = [[a, b, c - 0.5 * 3 / 8] for a, b, c in REWARDS]
    expected = [[r - sum(rewards) / 3 for r in rewards] for rewards in shaped]
    settings = {"advantage": "group_mean", "overlong": "penalty", "overlong_buffer": 8, "overlong_penalty": 0.5}
    assert_equations(two_groups(), expected, [[], []], settings)
