"""Losses against loops over tokens in float64."""

import math

import numpy as np
import pytest
import torch

from learner.methods import losses

LENGTHS = [3, 1, 5, 2]
N = sum(LENGTHS)
MAX_TOKENS = 6


def data(seed: int = 0) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    mask = random.random(N) < 0.75
    mask[3] = False  # the one token of the second sequence: a sequence without trainable tokens
    index = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    old = random.normal(-2, 0.5, N)
    return {
        "logprobs": torch.tensor(old + random.normal(0, 0.4, N), dtype=torch.float32, requires_grad=True),
        "old": torch.tensor(old, dtype=torch.float32),
        "engine": torch.tensor(old + random.normal(0, 0.6, N), dtype=torch.float32),
        "advantages": torch.tensor(random.normal(0, 1, len(LENGTHS))[index], dtype=torch.float32),
        "mask": torch.tensor(mask),
        "sequence_index": torch.tensor(index),
        "sequence_tokens": torch.tensor([mask[index == i].sum() for i in index]),
    }


def weights_of(d: dict[str, torch.Tensor], aggregation: losses.Aggregation) -> torch.Tensor:
    return losses.token_weights(
        aggregation, d["mask"], d["sequence_tokens"], int(d["mask"].sum()), len(LENGTHS), MAX_TOKENS
    )


def aggregate(per_token: list[float], d: dict[str, torch.Tensor], aggregation: str) -> float:
    """Sequence by sequence, token by token."""
    kept = [
        [per_token[n] for n in range(N) if int(d["sequence_index"][n]) == s and d["mask"][n]]
        for s in range(len(LENGTHS))
    ]
    if aggregation == "token_mean":
        return sum(map(sum, kept)) / sum(map(len, kept))
    if aggregation == "sequence_mean":
        return sum(sum(k) / len(k) for k in kept if k) / len(kept)
    return sum(map(sum, kept)) / MAX_TOKENS / len(kept)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.35)])
def test_grpo_clip_equals_a_loop_over_tokens(aggregation: losses.Aggregation, low: float, high: float) -> None:
    d = data()
    importance = losses.importance_weights(d["old"], d["engine"], 1.5)
    loss, metrics = losses.grpo_clip(
        d["logprobs"], d["old"], d["advantages"], importance, weights_of(d, aggregation), low, high
    )
    per_token, clipped, ratios = [], 0, []
    for n in range(N):
        advantage = float(d["advantages"][n])
        ratio = math.exp(float(d["logprobs"].detach()[n]) - float(d["old"][n]))
        bounded = min(max(ratio, 1 - low), 1 + high)
        weight = min(math.exp(float(d["old"][n]) - float(d["engine"][n])), 1.5)
        per_token.append(-weight * min(ratio * advantage, bounded * advantage))
        if d["mask"][n]:
            clipped += bounded * advantage < ratio * advantage
            ratios.append(ratio)
    assert loss.item() == pytest.approx(aggregate(per_token, d, aggregation), rel=1e-5)
    assert clipped > 0  # otherwise this says nothing of the clip
    assert metrics["clipped"].item() == clipped
    assert metrics["ratio"].item() == pytest.approx(sum(ratios), rel=1e-5)
    assert metrics["ratio_squared"].item() == pytest.approx(sum(r * r for r in ratios), rel=1e-5)


def test_grpo_clip_gradient_is_zero_where_clipped_and_outside_the_mask() -> None:
    d = data()
    loss, _ = losses.grpo_clip(
        d["logprobs"], d["old"], d["advantages"], torch.ones(N), weights_of(d, "token_mean"), 0.2, 0.2
    )
    loss.backward()
    for n in range(N):
        ratio, advantage = math.exp(float((d["logprobs"].detach() - d["old"])[n])), float(d["advantages"][n])
        clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        expected = 0.0 if clipped or not d["mask"][n] else -ratio * advantage / int(d["mask"].sum())
        assert float(d["logprobs"].grad[n]) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_reinforce_and_sft_equal_loops() -> None:
    d = data()
    importance = losses.importance_weights(d["old"], d["engine"], 2.0)
    lp = d["logprobs"].tolist()
    loss, _ = losses.reinforce(d["logprobs"], d["advantages"], importance, weights_of(d, "sequence_mean"))
    per_token = [
        -min(math.exp(float(d["old"][n]) - float(d["engine"][n])), 2.0) * float(d["advantages"][n]) * lp[n]
        for n in range(N)
    ]
    assert loss.item() == pytest.approx(aggregate(per_token, d, "sequence_mean"), rel=1e-5)
    loss, metrics = losses.sft(d["logprobs"], weights_of(d, "token_mean"))
    assert loss.item() == pytest.approx(aggregate([-x for x in lp], d, "token_mean"), rel=1e-5)
    assert metrics["nll"].item() == pytest.approx(-sum(x for x, m in zip(lp, d["mask"], strict=True) if m), rel=1e-5)


def test_importance_weights_truncate_and_carry_no_gradient() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    engine = torch.tensor([-1.0, -2.0, -0.5])
    weights = losses.importance_weights(old, engine, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, math.exp(-0.5)]))
    assert not weights.requires_grad
    assert losses.importance_weights(old, engine, 0.0).tolist() == [1.0, 1.0, 1.0]


def test_policy_metrics_equal_loops_over_the_mask() -> None:
    d = data()
    importance = losses.importance_weights(d["old"], d["engine"], 1.2)
    metrics = losses.policy_metrics(d["old"], d["engine"], importance, d["mask"], 1.2)
    differences = [float(d["old"][n]) - float(d["engine"][n]) for n in range(N) if d["mask"][n]]
    expected = {
        "tokens": len(differences),
        "engine_gap": sum(map(abs, differences)),
        "kl_k1": -sum(differences),
        "kl_k3": sum(math.exp(x) - 1 - x for x in differences),
        "importance": sum(min(math.exp(x), 1.2) for x in differences),
        "truncated": sum(math.exp(x) > 1.2 for x in differences),
    }
    assert expected["truncated"] > 0
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_losses_and_metrics_add_up_over_microbatches(aggregation: losses.Aggregation) -> None:
    d = data()
    weights = weights_of(d, aggregation)

    def part(tokens: slice) -> tuple[torch.Tensor, losses.Metrics]:
        importance = losses.importance_weights(d["old"][tokens], d["engine"][tokens], 2.0)
        own = losses.token_weights(
            aggregation, d["mask"][tokens], d["sequence_tokens"][tokens], int(d["mask"].sum()), len(LENGTHS), MAX_TOKENS
        )
        return losses.grpo_clip(
            d["logprobs"][tokens], d["old"][tokens], d["advantages"][tokens], importance, own, 0.2, 0.2
        )

    whole, first, second = part(slice(None)), part(slice(0, 4)), part(slice(4, None))
    assert weights.sum() > 0
    torch.testing.assert_close(first[0] + second[0], whole[0])
    for name, value in whole[1].items():
        torch.testing.assert_close(first[1][name] + second[1][name], value)


def test_masked_values_may_be_anything() -> None:
    values = torch.tensor([1.0, float("nan"), float("-inf"), 4.0])
    mask = torch.tensor([True, False, False, True])
    assert losses.masked_mean(values, mask).item() == 2.5
    assert losses.masked_mean(values, torch.zeros(4, dtype=torch.bool)).item() == 0.0
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights = losses.token_weights("token_mean", mask[:2], torch.tensor([1, 1]), 1, 2, 6)
    bad = torch.tensor([-1.0, float("-inf")])
    loss, metrics = losses.grpo_clip(
        logprobs, bad, torch.ones(2), losses.importance_weights(bad, bad, 2.0), weights, 0.2, 0.2
    )
    loss.backward()
    assert loss.item() == -1.0 and logprobs.grad.tolist() == [-1.0, 0.0]
    assert metrics["ratio"].item() == 1.0
    logprobs.grad = None
    losses.reinforce(logprobs, torch.ones(2), losses.importance_weights(bad, bad, 2.0), weights)[0].backward()
    assert logprobs.grad.tolist() == [-1.0, 0.0]
