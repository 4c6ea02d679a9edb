"""Losses of packed microbatches against loops over tokens in float64."""

import math

import pytest
import torch

from learner.methods import losses, packed_losses
from tests.learner.methods.packed_data import LENGTHS, MAX_TOKENS, N, aggregate, data, packed, weights_of


def token_importance(d: dict[str, torch.Tensor], cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    return packed_losses.importance_weights(d["old"], d["engine"], d["mask"], d["sequence_index"], cap=cap)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.35)])
def test_grpo_clip_equals_a_loop_over_tokens(aggregation: packed_losses.Aggregation, low: float, high: float) -> None:
    d = data()
    importance, _ = token_importance(d, 1.5)
    loss, metrics = packed("grpo_clip", d, importance, aggregation, low, high)
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
    loss, _ = packed("grpo_clip", d, torch.ones(N), "token_mean")
    loss.backward()
    for n in range(N):
        ratio, advantage = math.exp(float((d["logprobs"].detach() - d["old"])[n])), float(d["advantages"][n])
        clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        expected = 0.0 if clipped or not d["mask"][n] else -ratio * advantage / int(d["mask"].sum())
        assert float(d["logprobs"].grad[n]) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_reinforce_and_sft_equal_loops() -> None:
    d = data()
    importance, _ = token_importance(d, 2.0)
    lp = d["logprobs"].tolist()
    loss, _ = packed("reinforce_with_baseline", d, importance, "sequence_mean")
    per_token = [
        -min(math.exp(float(d["old"][n]) - float(d["engine"][n])), 2.0) * float(d["advantages"][n]) * lp[n]
        for n in range(N)
    ]
    assert loss.item() == pytest.approx(aggregate(per_token, d, "sequence_mean"), rel=1e-5)
    loss, metrics = packed_losses.sft(d["logprobs"], weights_of(d, "token_mean"))
    assert loss.item() == pytest.approx(aggregate([-x for x in lp], d, "token_mean"), rel=1e-5)
    assert metrics["nll"].item() == pytest.approx(-sum(x for x, m in zip(lp, d["mask"], strict=True) if m), rel=1e-5)


def test_policy_metrics_equal_loops_over_the_mask() -> None:
    d = data()
    importance, outside = token_importance(d, 1.2)
    metrics = packed_losses.policy_metrics(d["old"], d["engine"], importance, d["mask"], outside)
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
@pytest.mark.parametrize("kind", ["grpo_clip", "gspo", "cispo", "reinforce_with_baseline"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_and_metrics_add_up_over_microbatches(
    kind: losses.PolicyLoss, aggregation: packed_losses.Aggregation, level: packed_losses.ImportanceLevel
) -> None:
    d = data()
    weights = weights_of(d, aggregation)

    def part(tokens: slice) -> tuple[torch.Tensor, losses.Metrics]:
        importance, _ = packed_losses.importance_weights(
            d["old"][tokens], d["engine"][tokens], d["mask"][tokens], d["sequence_index"][tokens],
            cap=2.0, floor=0.7, level=level, mode="mask",
        )  # fmt: skip
        own = packed_losses.token_weights(
            aggregation, d["mask"][tokens], d["sequence_tokens"][tokens], int(d["mask"].sum()), len(LENGTHS), MAX_TOKENS
        )
        mine = [d[name][tokens] for name in ("logprobs", "old", "advantages")]
        return packed_losses.packed_policy_loss(kind, *mine, importance, own, d["sequence_index"][tokens], 0.2, 0.2)

    whole, first, second = part(slice(None)), part(slice(0, 4)), part(slice(4, None))
    assert weights.sum() > 0
    torch.testing.assert_close(first[0] + second[0], whole[0])
    for name, value in whole[1].items():
        torch.testing.assert_close(first[1][name] + second[1][name], value)


def test_masked_values_may_be_anything() -> None:
    mask = torch.tensor([True, False])
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights = packed_losses.token_weights("token_mean", mask, torch.tensor([1, 1]), 1, 2, 6)
    bad = torch.tensor([-1.0, float("-inf")])
    sequence = torch.zeros(2, dtype=torch.int64)
    importance, outside = packed_losses.importance_weights(bad, bad, mask, sequence, cap=2.0)
    metrics = packed_losses.policy_metrics(bad, bad, importance, mask, outside)
    assert {name: value.item() for name, value in metrics.items()} == {
        "tokens": 1, "engine_gap": 0, "kl_k1": 0, "kl_k3": 0, "importance": 1, "truncated": 0
    }  # fmt: skip
    arguments = (bad, torch.ones(2), importance, weights, sequence, 0.2, 0.2)
    loss, metrics = packed_losses.packed_policy_loss("grpo_clip", logprobs, *arguments)
    loss.backward()
    assert loss.item() == -1.0 and logprobs.grad.tolist() == [-1.0, 0.0]
    assert metrics["ratio"].item() == 1.0
    for kind in ("reinforce_with_baseline", "gspo", "cispo"):
        logprobs.grad = None
        packed_losses.packed_policy_loss(kind, logprobs, *arguments)[0].backward()
        assert logprobs.grad.tolist() == [-1.0, 0.0], kind


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (1.0, 0.1)])
def test_cispo_equals_a_loop_and_no_token_loses_its_gradient(low: float, high: float) -> None:
    d = data()
    loss, metrics = packed("cispo", d, torch.ones(N), "token_mean", low, high)
    loss.backward()
    tokens, clipped = int(d["mask"].sum()), 0
    expected = 0.0
    for n in range(N):
        ratio = math.exp(float((d["logprobs"].detach() - d["old"])[n]))
        bounded = min(max(ratio, 1 - low), 1 + high)
        gradient = -bounded * float(d["advantages"][n]) / tokens if d["mask"][n] else 0.0
        expected += gradient * float(d["logprobs"].detach()[n])
        clipped += bool(d["mask"][n]) and bounded != ratio
        assert float(d["logprobs"].grad[n]) == pytest.approx(gradient, rel=1e-4, abs=1e-9)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["clipped"].item() == clipped > 0


@pytest.mark.parametrize("bound", [10.0, 0.05])
def test_gspo_gradient_is_that_of_the_sequence_objective(bound: float) -> None:
    """(1 / G) sum over sequences of min(s A, clip(s) A), s the geometric mean of the ratios, differentiated whole."""
    d = data()
    loss, metrics = packed("gspo", d, torch.ones(N), "sequence_mean", min(bound, 1.0), bound)
    loss.backward()
    found, d["logprobs"].grad = d["logprobs"].grad.clone(), None
    objective, clipped_tokens = torch.zeros(()), 0
    for s in range(len(LENGTHS)):
        mine = (d["sequence_index"] == s) & d["mask"]
        if not mine.any():
            continue
        ratio = (d["logprobs"] - d["old"])[mine].mean().exp()
        advantage = d["advantages"][mine][0]
        bounded = ratio.clamp(1 - min(bound, 1.0), 1 + bound)
        objective = objective + torch.minimum(ratio * advantage, bounded * advantage) / len(LENGTHS)
        clipped_tokens += int(mine.sum()) if bounded * advantage < ratio * advantage else 0
    (-objective).backward()
    torch.testing.assert_close(found, d["logprobs"].grad, atol=1e-7, rtol=1e-4)
    assert loss.item() == pytest.approx(-objective.item(), rel=1e-4)
    assert metrics["clipped"].item() == clipped_tokens
    assert (clipped_tokens > 0) == (bound < 1)


def test_constant_weights_take_a_constant_that_is_no_whole_number() -> None:
    d = data()
    weights = packed_losses.token_weights("constant", d["mask"], d["sequence_tokens"], 7, 4, 2.5)
    torch.testing.assert_close(weights, d["mask"] * 0.1)


# --- importance weights ---


def test_importance_weights_by_token_truncate_or_mask_and_carry_no_gradient() -> None:
    old = torch.full((6,), -1.0, requires_grad=True)
    engine = -1.0 - torch.tensor([0.0, 1.0, -0.5, math.log(2), -math.log(2), 3.0])
    mask, index = torch.tensor([True] * 5 + [False]), torch.zeros(6, dtype=torch.int64)
    weights, outside = packed_losses.importance_weights(old, engine, mask, index, cap=2.5)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.5, math.exp(-0.5), 2.0, 0.5, 1.0]))
    assert outside.tolist() == [False, True, False, False, False, False]
    assert not weights.requires_grad
    weights, outside = packed_losses.importance_weights(old, engine, mask, index, cap=2.5, floor=0.6, mode="mask")
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, math.exp(-0.5), 2.0, 0.0, 1.0]))
    assert outside.tolist() == [False, True, False, False, True, False]
    weights, outside = packed_losses.importance_weights(old, engine, mask, index, cap=0.0, mode="mask")
    assert weights.tolist() == [1.0] * 6 and not outside.any() and not weights.requires_grad


def test_importance_bounds_belong_to_the_range_that_is_kept() -> None:
    same, one = torch.tensor([-1.5]), torch.ones(1, dtype=torch.bool)
    weights, outside = packed_losses.importance_weights(
        same, same, one, torch.zeros(1, dtype=torch.int64), cap=1.0, floor=1.0, level="sequence", mode="mask"
    )
    assert weights.tolist() == [1.0] and not outside.any()


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_by_sequence_equal_a_loop(mode: packed_losses.ImportanceMode) -> None:
    d = data(1)
    engine = d["engine"].masked_fill(~d["mask"], float("nan"))  # nothing outside the mask is part of a product
    cap, floor = 1.5, 0.8
    weights, outside = packed_losses.importance_weights(
        d["old"], engine, d["mask"], d["sequence_index"], cap=cap, floor=floor, level="sequence", mode=mode
    )
    products = [1.0] * len(LENGTHS)
    for n in range(N):
        if d["mask"][n]:
            products[int(d["sequence_index"][n])] *= math.exp(float(d["old"][n]) - float(d["engine"][n]))
    high, low = [p > cap for p in products], [p < floor for p in products]
    assert any(high) and any(low) and not all(h or s for h, s in zip(high, low, strict=True))
    for n in range(N):
        s = int(d["sequence_index"][n])
        cut = high[s] if mode == "truncate" else high[s] or low[s]
        expected = min(products[s], cap) if mode == "truncate" else 0.0 if cut else products[s]
        assert weights[n].item() == pytest.approx(expected, rel=1e-5)
        assert outside[n].item() == (cut and bool(d["mask"][n]))


def test_importance_weights_by_sequence_neither_overflow_nor_lose_digits() -> None:
    lengths = [2000, 2000, 30_000]
    gaps = torch.cat([torch.full((n,), g) for n, g in zip(lengths, (1.0, -1.0, 1e-4), strict=True)])
    mask, index = torch.ones(len(gaps), dtype=torch.bool), torch.repeat_interleave(torch.tensor(lengths))
    edges = [0, 2000, 4000]
    for mode, first in (("truncate", 100.0), ("mask", 0.0)):
        weights, outside = packed_losses.importance_weights(
            gaps, torch.zeros_like(gaps), mask, index, cap=100.0, floor=0.01, level="sequence", mode=mode
        )
        assert [weights[i].item() for i in edges] == pytest.approx([first, 0.0, math.exp(3)], rel=1e-6)
        assert [outside[i].item() for i in edges] == [True, mode == "mask", False]


@pytest.mark.parametrize(("name", "value"), [("level", "group"), ("mode", "clip")])
def test_importance_weights_refuse_what_they_do_not_know(name: str, value: str) -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=f"{name}: found '{value}', allowed:"):
        packed_losses.importance_weights(one, one, one.bool(), one.long(), cap=1.0, **{name: value})


# --- the proximal policy ---


def ppo(d: dict[str, torch.Tensor], behaviour: torch.Tensor) -> float:
    """PPO's clipped loss with the policy that drew the tokens in the ratio: token by token, as the paper has it."""
    per_token = []
    for n in range(N):
        ratio, advantage = math.exp(float(d["logprobs"].detach()[n] - behaviour[n])), float(d["advantages"][n])
        per_token.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
    return aggregate(per_token, d, "token_mean")


def loss_with_proximal(d: dict[str, torch.Tensor], proximal: torch.Tensor) -> float:
    """What the step computes with this proximal policy, the importance weights from it to the engine included."""
    importance, _ = token_importance(d | {"old": proximal}, 1e6)
    return packed("grpo_clip", d | {"old": proximal}, importance, "token_mean")[0].item()


def test_proximal_engine_is_ppo_of_the_behaviour_policy() -> None:
    d = data()
    importance, outside = token_importance(d | {"old": d["engine"]}, 2.0)
    assert importance.tolist() == [1.0] * N and not outside.any()
    assert loss_with_proximal(d, d["engine"]) == pytest.approx(ppo(d, d["engine"]), rel=1e-5)


def test_proximal_policies_agree_without_lag_and_differ_with_it() -> None:
    """Where the engine's policy is the learner's (lag 0, the same arithmetic) decoupled PPO is PPO."""
    d = data()
    fresh = d | {"engine": d["old"]}
    expected = ppo(fresh, fresh["engine"])
    for proximal in (fresh["old"], fresh["engine"]):
        assert loss_with_proximal(fresh, proximal) == pytest.approx(expected, rel=1e-5)
    assert abs(loss_with_proximal(d, d["old"]) - ppo(d, d["engine"])) > 0.05


def test_decoupled_gradient_is_that_of_ppo_where_nothing_is_clipped() -> None:
    """w x rho = p / p_engine whatever the proximal policy is: the lag costs no clip range, and no correctness."""
    d = data()
    gradients = []
    for proximal in (d["old"], d["engine"]):
        d["logprobs"].grad = None
        importance, _ = token_importance(d | {"old": proximal}, 1e6)
        packed("grpo_clip", d | {"old": proximal}, importance, "token_mean", 1.0, 1e6)[0].backward()
        gradients.append(d["logprobs"].grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


# --- sequences and pairs ---


def test_sequence_sums_and_means_equal_loops_and_have_the_masks_gradient() -> None:
    d = data()
    values = d["logprobs"].detach().masked_fill(~d["mask"], float("nan")).requires_grad_()
    sums = packed_losses.sequence_sums(values, d["mask"], d["sequence_index"], 6)
    numbers = values.tolist()
    kept = [[numbers[n] for n in range(N) if int(d["sequence_index"][n]) == s and d["mask"][n]] for s in range(6)]
    assert sums.tolist() == pytest.approx([sum(k) for k in kept])
    (sums * torch.arange(1.0, 7.0)).sum().backward()
    torch.testing.assert_close(values.grad, (d["sequence_index"] + 1.0) * d["mask"])
    means = packed_losses.sequence_means(values.detach(), d["mask"], d["sequence_index"])
    expected = [sum(k) / len(k) if k else 0.0 for k in kept]
    assert means.tolist() == pytest.approx([expected[int(s)] for s in d["sequence_index"]])


def pairs(tokens: slice = slice(None)) -> tuple[torch.Tensor, ...]:
    """logprobs, reference, mask, sequence_index of two pairs: completions 0 and 2 are chosen, 1 and 3 rejected."""
    d = data()
    index = d["sequence_index"][tokens]
    return d["logprobs"].detach()[tokens], d["old"][tokens], d["mask"][tokens], index - index.min()


def test_packed_dpo_loss_equals_a_loop_over_pairs() -> None:
    logprobs, reference, mask, index = pairs()
    reference = reference.masked_fill(~mask, float("nan"))
    logprobs = logprobs.masked_fill(~mask, float("-inf")).requires_grad_()
    loss, metrics = packed_losses.packed_dpo_loss(logprobs, reference, mask, index, 5, 0.7, 0.1)
    rewards = [0.0] * 4
    for n in range(N):
        if mask[n]:
            rewards[int(index[n])] += 0.7 * (float(logprobs.detach()[n]) - float(reference[n]))
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3]]
    expected = sum(0.9 * math.log1p(math.exp(-m)) + 0.1 * math.log1p(math.exp(m)) for m in margins) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-5) and loss.dtype == torch.float32
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"accuracy": sum(m > 0 for m in margins), "margin": sum(margins), "chosen_reward": rewards[0] + rewards[2],
         "rejected_reward": rewards[1] + rewards[3], "pairs": 2}, rel=1e-5
    )  # fmt: skip
    assert not any(value.requires_grad for value in metrics.values())
    loss.backward()
    assert logprobs.grad[~mask].eq(0).all() and logprobs.grad[mask].ne(0).all()


def test_packed_dpo_gradient_equals_finite_differences() -> None:
    logprobs, reference, mask, index = pairs()
    logprobs = logprobs.double().requires_grad_()

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return packed_losses.packed_dpo_loss(x, reference, mask, index, 2, 0.7, 0.1)[0]

    assert torch.autograd.gradcheck(loss_of, (logprobs,))


def test_packed_dpo_loss_adds_up_over_microbatches() -> None:
    whole, first, second = (
        packed_losses.packed_dpo_loss(*pairs(tokens), 2, 0.7) for tokens in (slice(None), slice(0, 4), slice(4, None))
    )
    torch.testing.assert_close(first[0] + second[0], whole[0])
    for name, value in whole[1].items():
        torch.testing.assert_close(first[1][name] + second[1][name], value)


def test_packed_dpo_loss_refuses_half_a_pair() -> None:
    with pytest.raises(AssertionError, match="found 3 sequences, expected pairs"):
        packed_losses.packed_dpo_loss(*pairs(slice(0, 9)), 2, 0.7)
