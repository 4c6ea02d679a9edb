"""The plain forms: from logits, over masks, per token, and whole microbatches of padded tensors."""

import math

import pytest
import torch

from learner.methods import losses, packed_losses
from tests.learner.methods.packed_data import LENGTHS, MAX_TOKENS, N, data, packed


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
    aggregation: packed_losses.Aggregation = "sequence_mean" if constant is None else "constant"
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


@pytest.mark.parametrize("kind", ["no_baseline", "reinforce_with_baseline", "grpo_clip", "gspo", "cispo"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_grpo_microbatch_step_sees_nothing_outside_the_mask(kind: losses.PolicyLoss, dtype: torch.dtype) -> None:
    """NaN and infinity in the padding, and a completion without tokens: the loss and gradient are those of zeros."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=dtype)
    results = []
    for padding in (0.0, math.nan, -math.inf):
        hole = torch.tensor([[False, False, True], [True, True, True]])
        logprobs = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]).masked_fill(hole, padding).requires_grad_()
        old = torch.tensor([[-1.5, -1.9, 0.0], [0.0, 0.0, 0.0]]).masked_fill(hole, padding)
        signal = {"raw_rewards" if kind == "no_baseline" else "advantages": torch.tensor([[2.0], [-1.0]]), "old": old}
        loss, metrics = losses.grpo_microbatch_step(logprobs, mask, 2, kind, **signal)
        results.append((loss.item(), logprobs.grad.tolist(), {n: v.item() for n, v in metrics.items()}))
    assert results[0] == results[1] == results[2]
    assert math.isfinite(results[0][0]) and results[0][1][0][2] == 0.0 and results[0][1][1] == [0.0] * 3


def test_grpo_microbatch_step_divides_by_lengths_batch_and_accumulation() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -4.0, -5.0]], requires_grad=True)
    mask, advantages = torch.tensor([[1, 1, 0], [0, 0, 1]]), torch.tensor([[2.0], [-1.0]])
    loss, _ = losses.grpo_microbatch_step(logprobs, mask, 4, "reinforce_with_baseline", advantages=advantages)
    assert loss.item() == pytest.approx((2 * (1 + 2) / 2 - 5) / 2 / 4)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]) / 8)


def test_masks_broadcast_to_the_values() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]])
    assert losses.masked_mean(values, torch.tensor([True, False, True])).item() == pytest.approx(15 / 4)
    assert losses.masked_mean(values, torch.tensor([[1], [0]]), dim=0).tolist() == [1.0, 2.0, 4.0]
    assert losses.masked_mean(torch.tensor(3.0), torch.tensor(1)).item() == 3.0
    assert losses.masked_mean(torch.tensor(math.nan), torch.tensor(False)).item() == 0.0
    assert losses.masked_mean(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).item() == 0.0


def test_masked_mean_gives_nothing_a_gradient_outside_the_mask() -> None:
    values = torch.tensor([[1.0, math.nan], [math.inf, 4.0]], requires_grad=True)
    losses.masked_mean(values, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).backward()
    assert values.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]


def test_token_entropy_of_forbidden_tokens_is_that_of_the_others_and_differentiable() -> None:
    logits = torch.tensor([0.0, math.log(3.0), -math.inf], requires_grad=True)
    entropy = losses.token_entropy(logits)
    assert entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    entropy.backward()  # dH / dlogit = -p (log p + H)
    expected = [-p * (math.log(p) + entropy.item()) for p in (0.25, 0.75)]
    assert logits.grad.tolist() == pytest.approx([*expected, 0.0], abs=1e-6)


# --- pairs ---


def test_dpo_equals_values_by_hand() -> None:
    """Margins 0.5 x ((-1 + 2) - (-3 + 2)) = 1 and 0.5 x ((-4 + 2) - (-2 + 2)) = -1."""
    policy, reference = (torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -2.0])), torch.tensor([-2.0, -2.0])
    loss, metrics = losses.dpo(*policy, reference, reference, 0.5)
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-1)), math.log1p(math.e)]))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"accuracy": 1.0, "margin": 0.0, "chosen_reward": -0.5, "rejected_reward": -0.5}
    )
    smoothed, _ = losses.dpo(*policy, reference, reference, 0.5, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * loss + 0.2 * loss.flip(0))
    equal, metrics = losses.dpo(reference, reference, reference, reference, 0.5)
    assert equal.tolist() == pytest.approx([math.log(2)] * 2) and metrics["accuracy"].item() == 0.0


def test_dpo_is_stable_for_large_margins() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    loss, _ = losses.dpo(chosen, zero, zero, zero, 1.0, label_smoothing=0.25)
    assert loss.tolist() == [2500.0, 7500.0]
    loss.sum().backward()
    assert chosen.grad.tolist() == [0.25, -0.75]


def test_dpo_gradient_is_the_papers() -> None:
    """-beta sigmoid(-margin) for the chosen, + for the rejected (section 4), and none for the reference."""
    chosen, rejected, reference = (torch.tensor([x], requires_grad=True) for x in (-1.0, -3.0, -2.0))
    losses.dpo(chosen, rejected, reference, reference, 0.5)[0].sum().backward()
    share = 1 / (1 + math.e)
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.5 * share, 0.5 * share))
    assert reference.grad is None
