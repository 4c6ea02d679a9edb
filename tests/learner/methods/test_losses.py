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


def packed(
    kind: losses.PolicyLoss, d: dict[str, torch.Tensor], importance: torch.Tensor, aggregation: losses.Aggregation,
    low: float = 0.2, high: float = 0.2,
) -> tuple[torch.Tensor, losses.Metrics]:  # fmt: skip
    return losses.packed_policy_loss(
        kind, d["logprobs"], d["old"], d["advantages"], importance, weights_of(d, aggregation), d["sequence_index"],
        low, high,
    )  # fmt: skip


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
    importance = losses.importance_weights(d["old"], d["engine"], 2.0)
    lp = d["logprobs"].tolist()
    loss, _ = packed("reinforce_with_baseline", d, importance, "sequence_mean")
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
@pytest.mark.parametrize("kind", ["grpo_clip", "gspo", "cispo", "reinforce_with_baseline"])
def test_losses_and_metrics_add_up_over_microbatches(kind: losses.PolicyLoss, aggregation: losses.Aggregation) -> None:
    d = data()
    weights = weights_of(d, aggregation)

    def part(tokens: slice) -> tuple[torch.Tensor, losses.Metrics]:
        importance = losses.importance_weights(d["old"][tokens], d["engine"][tokens], 2.0)
        own = losses.token_weights(
            aggregation, d["mask"][tokens], d["sequence_tokens"][tokens], int(d["mask"].sum()), len(LENGTHS), MAX_TOKENS
        )
        mine = [d[name][tokens] for name in ("logprobs", "old", "advantages")]
        return losses.packed_policy_loss(kind, *mine, importance, own, d["sequence_index"][tokens], 0.2, 0.2)

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
    importance, sequence = losses.importance_weights(bad, bad, 2.0), torch.zeros(2, dtype=torch.int64)
    arguments = (bad, torch.ones(2), importance, weights, sequence, 0.2, 0.2)
    loss, metrics = losses.packed_policy_loss("grpo_clip", logprobs, *arguments)
    loss.backward()
    assert loss.item() == -1.0 and logprobs.grad.tolist() == [-1.0, 0.0]
    assert metrics["ratio"].item() == 1.0
    for kind in ("reinforce_with_baseline", "gspo", "cispo"):
        logprobs.grad = None
        losses.packed_policy_loss(kind, logprobs, *arguments)[0].backward()
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


# --- the plain forms, on padded tensors ---


def padded(d: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """[sequences, longest] of a packed tensor, 0 in the padding."""
    lines = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=d[name].dtype)
    for s in range(len(LENGTHS)):
        lines[s, : LENGTHS[s]] = d[name].detach()[d["sequence_index"] == s]
    return lines


@pytest.mark.parametrize("kind", ["no_baseline", "reinforce_with_baseline", "grpo_clip", "gspo", "cispo"])
@pytest.mark.parametrize("constant", [None, float(MAX_TOKENS)])
def test_grpo_microbatch_steps_give_the_packed_gradient(kind: losses.PolicyLoss, constant: float | None) -> None:
    """Padded and in two accumulated halves, or packed and at once: the same. (No sequence without trainable tokens:
    the plain form has a mean over none then, which is 0, and so is the packed one's.)"""
    d = data()
    aggregation: losses.Aggregation = "sequence_mean" if constant is None else "constant"
    expected_loss, _ = packed(kind, d, torch.ones(N), aggregation)
    expected_loss.backward()
    logprobs = padded(d, "logprobs").requires_grad_()
    mask, old, signal = padded(d, "mask"), padded(d, "old"), padded(d, "advantages").amax(1, keepdim=True)
    signal = torch.where(signal == 0, padded(d, "advantages").amin(1, keepdim=True), signal)
    total = 0.0
    for half in (slice(0, 2), slice(2, 4)):
        name = "raw_rewards" if kind == "no_baseline" else "advantages"
        arguments = {name: signal[half], "old": old[half]}
        loss, metrics = losses.grpo_microbatch_step(
            logprobs[half], mask[half], 2, kind, normalize_constant=constant, **arguments
        )
        assert not loss.requires_grad
        assert set(metrics) == (set() if "base" in kind else {"ratio", "clipped"})
        total += loss.item()
    assert total == pytest.approx(expected_loss.item(), rel=1e-4)
    for s in range(len(LENGTHS)):
        torch.testing.assert_close(logprobs.grad[s, : LENGTHS[s]], d["logprobs"].grad[d["sequence_index"] == s])
        assert not logprobs.grad[s, LENGTHS[s] :].any()


def test_policy_loss_is_per_token_with_one_advantage_a_line() -> None:
    logprobs, old = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]]), torch.tensor([[-1.5, -2.0], [-0.5, -2.0]])
    advantages, mask = torch.tensor([[2.0], [-1.0]]), torch.ones(2, 2, dtype=torch.bool)
    loss, _ = losses.policy_loss("reinforce_with_baseline", logprobs, mask, advantages=advantages)
    assert loss.tolist() == [[2.0, 4.0], [-0.5, -3.0]]
    loss, metrics = losses.policy_loss("grpo_clip", logprobs, mask, advantages=advantages, old=old)
    torch.testing.assert_close(loss, torch.tensor([[-2.4, -2.0], [1.0, 0.8]]))  # min(-0.37, -0.8) where A < 0
    assert metrics["clipped"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("kind", "arguments", "complaint"),
    [
        ("no_baseline", {"advantages": torch.ones(1, 1)}, "raw_rewards: found nothing"),
        ("grpo_clip", {"raw_rewards": torch.ones(1, 1)}, "advantages: found nothing"),
        ("gspo", {"advantages": torch.ones(1, 1)}, "old: found nothing"),
        ("ppo", {"advantages": torch.ones(1, 1), "old": torch.ones(1, 1)}, "kind: found 'ppo'"),
    ],
)
def test_policy_loss_names_what_is_missing(kind: losses.PolicyLoss, arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        losses.policy_loss(kind, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), **arguments)


def test_sft_microbatch_steps_accumulate_to_the_mean_over_the_batch() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -4.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    loss, figures = losses.sft_microbatch_step(logprobs, mask, accumulation_steps=4, normalize_constant=10.0)
    assert loss.item() == pytest.approx((1 + 2 + 4 + 5) / 10 / 2 / 4)
    assert figures["tokens"].item() == 4
    torch.testing.assert_close(logprobs.grad, -mask.float() / 80)


def test_masked_mean_and_normalize_over_a_dimension_and_over_all() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 6.0], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    assert losses.masked_mean(values, mask).item() == pytest.approx(13 / 4)
    assert losses.masked_mean(values, mask, dim=1).tolist() == [1.5, 5.0, 0.0]
    assert losses.masked_mean(values, mask, dim=0).tolist() == [2.5, 2.0, 6.0]
    assert losses.masked_normalize(values, mask, 10.0, dim=-1).tolist() == pytest.approx([0.3, 1.0, 0.0])
    assert losses.masked_normalize(values, mask, 2.0).item() == pytest.approx(6.5)


def test_token_entropy_is_exact_and_stable_for_huge_logits() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3.0), -1e4, -1e4]], dtype=torch.float32)
    expected = [math.log(4), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]
    assert losses.token_entropy(logits).tolist() == pytest.approx(expected, rel=1e-6)
    huge = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]])
    assert losses.token_entropy(huge).tolist() == pytest.approx([0.0, math.log(2), math.log(3)], abs=1e-6)
    assert losses.token_entropy(huge.to(torch.bfloat16)).isfinite().all()


def test_response_logprobs_of_a_model_are_those_of_its_softmax() -> None:
    table = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))

    class Model:
        def __call__(self, ids: torch.Tensor) -> object:
            return type("Output", (), {"logits": table[ids]})

    ids, labels = torch.tensor([[0, 1, 4]]), torch.tensor([[6, 2, 0]])
    found = losses.response_logprobs(Model(), ids, labels, with_entropy=True)
    for t in range(3):
        row = [math.exp(x) for x in table[ids[0, t]].tolist()]
        share = [x / sum(row) for x in row]
        assert found["log_probs"][0, t].item() == pytest.approx(math.log(share[labels[0, t]]), rel=1e-5)
        assert found["token_entropy"][0, t].item() == pytest.approx(-sum(p * math.log(p) for p in share), rel=1e-5)
    assert set(losses.response_logprobs(Model(), ids, labels)) == {"log_probs"}
