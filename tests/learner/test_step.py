"""A whole step against one naive padded computation with full logits, written here."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from learner.batch import Batch, Minibatch, Row
from learner.methods import dpo, sft
from learner.methods.grpo import make_batch
from learner.model import PolicyModel
from learner.optim import Optimizer, lr_at
from learner.step import train_step, with_reference
from learner.telemetry.mfu import training_flops
from protocol.config import Recipe
from tests.learner.reference import VOCABULARY, make_group, policy, random_rows

NO_CLIPPING = 1e9


def recipe(
    budget: int = 1000,
    grpo: dict[str, Any] | None = None,
    packing: bool = True,
    sections: dict[str, Any] | None = None,
    **optim: Any,
) -> Recipe:
    return Recipe.model_validate(
        {
            "rollout": {"max_tokens": 16, "groups_per_step": 4},
            "optim": {"max_grad_norm": NO_CLIPPING, "lr": 1e-3} | optim,
            "grpo": grpo or {},
            "learner": {"microbatch_tokens": budget, "packing": packing},
            **(sections or {}),
        }
    )


def batch_of(*minibatches: tuple[Row, ...]) -> Batch:
    def minibatch(rows: tuple[Row, ...]) -> Minibatch:
        samples = [sample for row in rows for sample in row.samples]
        return Minibatch(rows, int(sum(s.mask.sum() for s in samples)), len(samples))

    return Batch(step=3, minibatches=tuple(minibatch(rows) for rows in minibatches), stats={})


def train(model: PolicyModel, optimizer: Optimizer, batch: Batch, recipe: Recipe) -> dict[str, float]:
    """A step at the recipe's learning rate, with as many passes as it says."""
    batch = replace(batch, passes=recipe.optim.epochs) if batch.loss == "policy" else batch
    return train_step(model, optimizer, batch, recipe, lr_at(batch.step, recipe.optim, recipe.steps))


def keep_gradients(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Gradients as they are when the (first) update would be made; nothing moves."""
    kept: dict[str, torch.Tensor] = {}

    def step() -> None:
        kept.update({name: p.grad.clone() for name, p in optimizer.parameters.items()})
        optimizer.zero_grad()

    optimizer.step = step  # type: ignore[method-assign]
    return kept


def gradients_of(model: PolicyModel, batch: Batch, recipe: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    optimizer = Optimizer(model, recipe.optim)
    kept = keep_gradients(optimizer)
    return kept, train(model, optimizer, batch, recipe)


def naive_gradients(
    model: PolicyModel, rows: tuple[Row, ...], recipe: Recipe
) -> tuple[dict[str, torch.Tensor], float, float]:
    """(gradients, loss, mean entropy): right-padded lines, full logits, one backward pass, loops over sequences."""
    lines = [(row, sample) for row in rows for sample in row.samples]
    longest = max(len(row.prompt_ids) + s.num_tokens for row, s in lines)
    ids = torch.zeros(len(lines), longest, dtype=torch.int64)
    attention = torch.zeros(len(lines), longest, dtype=torch.int64)
    for i, (row, s) in enumerate(lines):
        tokens = [*row.prompt_ids, *s.token_ids.tolist()]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        attention[i, : len(tokens)] = 1
    logits = model.network(input_ids=ids, attention_mask=attention, use_cache=False).logits
    grpo, sequences, entropies = recipe.grpo, [], []
    for i, (row, s) in enumerate(lines):
        first = len(row.prompt_ids)
        distribution = torch.log_softmax(logits[i, first - 1 : first - 1 + s.num_tokens] / row.temperature, -1)
        logprobs = torch.stack([distribution[t, token] for t, token in enumerate(s.token_ids.tolist())])
        weight = (logprobs.detach() - torch.tensor(s.engine_logprobs)).exp().clamp(max=grpo.importance_cap)
        ratio = (logprobs - logprobs.detach()).exp()
        per_token = -weight * (ratio * s.advantage if grpo.loss == "grpo_clip" else logprobs * s.advantage)
        sequences.append(per_token[torch.from_numpy(s.mask)])
        entropies.append(-(distribution.exp() * distribution).sum(-1)[torch.from_numpy(s.mask)])
    if grpo.aggregation == "token_mean":
        loss = torch.cat(sequences).mean()
    elif grpo.aggregation == "sequence_mean":
        loss = torch.stack([s.mean() if len(s) else s.sum() for s in sequences]).mean()
    else:
        loss = torch.stack([s.sum() / recipe.rollout.max_tokens for s in sequences]).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.network.zero_grad(set_to_none=True)
    return gradients, loss.item(), torch.cat(entropies).mean().item()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(("loss", "budget"), [("grpo_clip", 14), ("reinforce_with_baseline", 1000)])
def test_train_step_gradient_equals_the_naive_padded_one(kind: str, aggregation: str, loss: str, budget: int) -> None:
    settings = recipe(budget, {"aggregation": aggregation, "loss": loss})
    model, rows = policy(kind), random_rows(temperature=0.7)
    expected, expected_loss, entropy = naive_gradients(model, rows, settings)
    found, metrics = gradients_of(model, batch_of(rows), settings)
    assert_same(found, expected)
    assert (metrics["microbatches"] > 3) == (budget == 14)
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-4)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(
        np.sqrt(sum(float(g.square().sum()) for g in expected.values())), rel=1e-3
    )


def test_groups_drawn_at_another_temperature_give_the_naive_gradient_from_the_wire_on() -> None:
    settings, model = recipe(), policy()
    group = make_group([1.0, 0.0, 0.0], [4, 2, 3], temperature=0.7)
    batch = make_batch([group], settings, {1: 0}.__getitem__, step=0)
    expected, expected_loss, _ = naive_gradients(model, batch.minibatches[0].rows, settings)
    hot = tuple(replace(row, temperature=1.0) for row in batch.minibatches[0].rows)
    _, loss_at_one, _ = naive_gradients(model, hot, settings)
    assert abs(loss_at_one - expected_loss) > 1e-3, "the temperature matters here"
    found, metrics = gradients_of(model, batch, settings)
    assert_same(found, expected)
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-4)


def test_schedule_reaches_the_optimizer() -> None:
    settings = recipe(lr=1e-3, warmup_steps=10, schedule="constant")
    model = policy()
    optimizer = Optimizer(model, settings.optim)
    metrics = train(model, optimizer, batch_of(random_rows()), settings)
    assert metrics["lr"] == pytest.approx(4e-4)  # step 3 of 10
    assert optimizer.lr == metrics["lr"]


def test_trained_token_share_says_of_how_much_the_means_are() -> None:
    groups = [make_group(r, [4, 2, 3], index=i) for i, r in enumerate([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])]
    batch = make_batch(groups, recipe(), {1: 0}.__getitem__, step=0)
    _, metrics = gradients_of(policy(), batch, recipe())
    assert metrics["trained_token_share"] == pytest.approx(0.5)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_skip_zero_advantage_leaves_the_gradient_as_it_is(aggregation: str) -> None:
    rewards = ([1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    groups = [make_group(r, [4, 2, 3], index=i) for i, r in enumerate(rewards)]
    found = []
    for skip in (True, False):
        settings = recipe(1000, {"skip_zero_advantage": skip, "aggregation": aggregation, "advantage": "group_mean"})
        batch = make_batch(groups, settings, lambda version: 0, step=0)
        found.append(gradients_of(policy(), batch, settings))
    assert found[0][1]["positions"] < found[1][1]["positions"]
    assert_same(found[0][0], found[1][0], 1e-6)


def test_train_step_takes_old_logprobs_from_before_the_first_update() -> None:
    rows = random_rows()
    model = policy()
    metrics = train(model, Optimizer(model, recipe().optim), batch_of(rows[:2], rows[2:]), recipe(epochs=2))
    assert metrics["updates"] == 4
    assert metrics["ratio_std"] > 1e-3 and metrics["clipped_share"] > 0
    once = train(model, Optimizer(model, recipe().optim), batch_of(rows), recipe())
    assert (once["updates"], once["ratio_mean"], once["ratio_std"]) == (1, 1.0, 0.0)


def test_train_step_with_several_updates_equals_clipped_updates_by_hand() -> None:
    """Two passes over one minibatch: the second one's gradient is that of the clipped ratio to the first policy."""
    rows = tuple(
        replace(row, samples=tuple(replace(s, mask=np.ones_like(s.mask)) for s in row.samples)) for row in random_rows()
    )
    settings = recipe(budget=20, epochs=2, lr=1e-2)
    packed, hand = policy(), policy()
    train(packed, Optimizer(packed, settings.optim), batch_of(rows), settings)
    optimizer = torch.optim.AdamW(hand.network.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    lines = [(row, s) for row in rows for s in row.samples]
    total, old = sum(s.num_tokens for _, s in lines), None
    for _ in range(2):
        logprobs = []
        for row, s in lines:
            ids = torch.tensor([[*row.prompt_ids, *s.token_ids.tolist()]])
            distribution = torch.log_softmax(hand.network(input_ids=ids).logits[0, :-1] / row.temperature, -1)
            logprobs.append(distribution.gather(-1, ids[0, 1:, None])[len(row.prompt_ids) - 1 :, 0])
        old = old or [x.detach() for x in logprobs]
        loss = torch.zeros(())
        for (_, s), now, before in zip(lines, logprobs, old, strict=True):
            weight = (before - torch.tensor(s.engine_logprobs)).exp().clamp(max=2.0)
            ratio = (now - before).exp()
            loss = loss - (weight * torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.2) * s.advantage)).sum()
        optimizer.zero_grad()
        (loss / total).backward()
        optimizer.step()
    moved = 0
    for (name, parameter), reference in zip(packed.named_parameters(), hand.network.parameters(), strict=True):
        close = torch.isclose(parameter, reference, atol=2e-4, rtol=0)
        moved += close.sum().item()
        assert close.float().mean() > 0.99, name  # Adam's first steps are +-lr where a gradient is nearly 0
    assert moved > 0


def test_train_step_leaves_out_updates_without_a_signal() -> None:
    rows = random_rows()
    zero = tuple(replace(row, samples=tuple(replace(s, advantage=0.0) for s in row.samples)) for row in rows)
    model = policy()
    optimizer = Optimizer(model, recipe().optim)
    train(model, optimizer, batch_of(rows), recipe())  # momentum that could move the weights
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in (batch_of(zero), batch_of(())):
        metrics = train(model, optimizer, batch, recipe(weight_decay=0.1))
        assert (metrics["skipped_updates"], metrics["updates"], metrics["tokens"]) == (1, 0, 0)
        assert metrics["model_flops"] == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    metrics = train(model, optimizer, batch_of(rows, zero), recipe())
    assert (metrics["skipped_updates"], metrics["updates"]) == (1, 1)
    assert metrics["model_flops"] == training_flops(model.shape, rows) > 0
    twice = train(model, optimizer, batch_of(rows, zero), recipe(epochs=2))
    assert twice["model_flops"] == 2 * metrics["model_flops"]


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_train_step_refuses_what_is_not_finite_and_keeps_the_weights(spoil: str) -> None:
    rows = random_rows()
    model = policy()
    optimizer = Optimizer(model, recipe().optim)
    if spoil == "loss":
        bad = replace(rows[0].samples[0], advantage=float("nan"))
        rows = (replace(rows[0], samples=(bad, *rows[0].samples[1:])), *rows[1:])
    else:
        next(model.network.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="step 3, update 1"):
        train(model, optimizer, batch_of(rows), recipe())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_train_step_clips_and_schedules() -> None:
    rows, model = random_rows(), policy()
    settings = recipe(max_grad_norm=1e-3, warmup_steps=8)
    optimizer = Optimizer(model, settings.optim)
    kept = keep_gradients(optimizer)
    metrics = train(model, optimizer, batch_of(rows), settings)
    assert metrics["grad_norm"] > 0.1
    assert np.sqrt(sum(float(g.square().sum()) for g in kept.values())) == pytest.approx(1e-3, rel=1e-2)
    assert metrics["lr"] == pytest.approx(1e-3 * 4 / 8)  # step 3, counted from 0


def test_sft_step_minimizes_the_mean_loss_of_response_tokens() -> None:
    demonstrations = [((1, 2, 3), (4, 5, 2)), ((7,), (8, 2)), ((1, 2, 9, 9), (6, 6, 6, 2))]
    model = policy("qwen2")
    total = torch.zeros(())
    for prompt, response in demonstrations:
        ids = torch.tensor([[*prompt, *response]])
        labels = torch.tensor([[-100] * len(prompt) + list(response)])
        logits = model.network(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    (total / 9).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.network.zero_grad(set_to_none=True)
    optimizer = Optimizer(model, recipe().optim)
    kept = keep_gradients(optimizer)
    metrics = train(model, optimizer, sft.make_batch(demonstrations, step=0), recipe(budget=8))
    assert_same(kept, expected)
    assert metrics["loss"] == pytest.approx(total.item() / 9, rel=1e-5)
    assert metrics["nll"] == pytest.approx(total.item() / 9, rel=1e-5)
    assert (metrics["tokens"], metrics["lr"]) == (9, 1e-3)


def sequence_logprobs(model: PolicyModel, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """[response] logprobs from the model's own forward."""
    logits = model.network(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def backward(model: PolicyModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.network.zero_grad(set_to_none=True)
    return gradients


PAIRS = [((1, 2, 3), (4, 5, 2)), ((7,), (8, 2)), ((1, 2, 9, 9), (6, 6, 6, 2)), ((5, 5), (3,))]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_sft_is_normalised_per_token_per_sequence_or_by_a_constant(aggregation: str, packing: bool) -> None:
    model = policy()
    losses = [-sequence_logprobs(model, *pair) for pair in PAIRS]
    expected = {
        "token_mean": sum(loss.sum() for loss in losses) / 10,
        "sequence_mean": sum(loss.mean() for loss in losses) / 4,
        "constant": sum(loss.sum() for loss in losses) / 4 / 32.0,
    }[aggregation]
    gradients = backward(model, expected)
    settings = recipe(budget=14, packing=packing, sections={"sft": {"aggregation": aggregation, "constant": 32.0}})
    found, metrics = gradients_of(model, sft.make_batch(PAIRS, step=0), settings)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same(found, gradients)


@pytest.mark.parametrize("budget", [1000, 9])
def test_dpo_step_has_the_gradient_of_the_pairs_written_out(budget: int) -> None:
    """Rafailov et al. 2023, eq. 7, one sequence at a time; a pair over the budget stays whole."""
    model, beta = policy(), 0.3
    weights = model.frozen_copy()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    pairs = [((1, 2, 3), (4, 5, 2), (6, 2)), ((7,), (8,), (9, 9, 9, 9, 2)), ((3, 3), (5, 2), (5, 5, 2))]
    reference = policy()  # the weights before the change

    def margin(of: PolicyModel, pair: Any) -> torch.Tensor:
        prompt, chosen, rejected = pair
        return sequence_logprobs(of, prompt, chosen).sum() - sequence_logprobs(of, prompt, rejected).sum()

    margins = torch.stack([margin(model, pair) - margin(reference, pair).detach() for pair in pairs])
    loss = -torch.nn.functional.logsigmoid(beta * margins).mean()
    gradients = backward(model, loss)
    settings = recipe(budget=budget, sections={"dpo": {"beta": beta}})
    batch = dpo.make_batch(pairs, 0, lambda rows: with_reference(model, weights, rows, settings, split=False))
    found, metrics = gradients_of(model, batch, settings)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["dpo_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert metrics["dpo_margin"] == pytest.approx(beta * margins.mean().item(), rel=1e-3)
    assert_same(found, gradients)


def groups_with_reference(
    model: PolicyModel, settings: Recipe, rewards: list[list[float]]
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """A batch whose reference differs from the model."""
    weights = {name: weight + 0.02 * torch.sin(weight * 100) for name, weight in model.frozen_copy().items()}
    groups = [make_group(r, [3, 2, 4], index=i) for i, r in enumerate(rewards)]
    batch = make_batch(
        groups, settings, lambda version: 0, 0, lambda rows: with_reference(model, weights, rows, settings)
    )
    return batch, weights


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_loss_pulls_every_token_towards_the_reference(estimator: str) -> None:
    """All advantages are 0, so the whole gradient is the KL's; no completion is left out for that."""
    model = policy()
    grpo = {"kl_coef": 0.5, "kl_estimator": estimator, "advantage": "group_mean"}
    settings = recipe(budget=12, grpo=grpo)
    batch, weights = groups_with_reference(model, settings, [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    other = policy()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    terms = []
    for row in batch.minibatches[0].rows:
        for sample in row.samples:
            ids = tuple(sample.token_ids.tolist())
            difference = sequence_logprobs(other, row.prompt_ids, ids).detach() - sequence_logprobs(
                model, row.prompt_ids, ids
            )
            terms.append(-difference if estimator == "k1" else difference.exp() - 1 - difference)
    expected = 0.5 * torch.cat(terms).mean()
    gradients = backward(model, expected)
    found, metrics = gradients_of(model, batch, settings)
    assert metrics["tokens"] == 18 and metrics["loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert_same(found, gradients)
    assert batch.stats["kl_reference"] > 0


def test_kl_in_the_reward_is_taken_off_before_the_advantages() -> None:
    model = policy()
    settings = recipe(grpo={"kl_coef": 0.25, "kl_in": "reward", "kl_estimator": "k1", "advantage": "group_mean"})
    batch, _ = groups_with_reference(model, settings, [[1.0, 1.0, 0.0]])
    (row,) = batch.minibatches[0].rows
    kl = [float((s.engine_logprobs - s.reference_logprobs).sum()) for s in row.samples]
    shaped = np.array([1.0, 1.0, 0.0]) - 0.25 * np.array(kl)
    assert [s.advantage for s in row.samples] == pytest.approx(shaped - shaped.mean(), abs=1e-5)


def test_with_the_engine_as_proximal_policy_the_ratio_is_to_what_drew_the_tokens() -> None:
    model = policy()
    settings = recipe(grpo={"proximal": "engine", "advantage": "group_mean"})
    batch = make_batch([make_group([1.0, 0.0, 0.0], [3, 2, 4])], settings, lambda version: 0, step=0)
    _, metrics = gradients_of(model, batch, settings)
    assert metrics["ratio_std"] > 0.1 and metrics["importance_mean"] == 1
    _, decoupled = gradients_of(model, batch, recipe(grpo={"advantage": "group_mean"}))
    assert decoupled["ratio_std"] == 0 and decoupled["importance_mean"] != 1
    assert metrics["engine_gap"] == pytest.approx(decoupled["engine_gap"]), "measured either way"


@pytest.mark.parametrize("budget", [1000, 40, 12])
def test_packing_changes_no_gradient(budget: int) -> None:
    model, rows = policy(), tuple(random_rows(temperature=0.7))
    packed, padded = (gradients_of(model, batch_of(rows), recipe(budget, packing=on)) for on in (True, False))
    assert_same(packed[0], padded[0])
    assert packed[1]["positions"] <= padded[1]["positions"]


def test_training_learns_the_rewarded_token() -> None:
    model = policy()
    settings = recipe(grpo={"advantage": "group_mean"}, lr=5e-3)
    optimizer = Optimizer(model, settings.optim)
    groups = [make_group([0.0] * 8, [3] * 8, index=i) for i in range(4)]
    tokens = [np.frombuffer(g.token_ids, "<i4").reshape(8, 3) for g in groups]
    rewarded = [
        make_group([float((c < VOCABULARY // 2).mean()) for c in t], [3] * 8, index=i) for i, t in enumerate(tokens)
    ]
    batch = make_batch(rewarded, settings, lambda version: 0, step=0)
    losses = [train(model, optimizer, batch, settings)["loss"] for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1
