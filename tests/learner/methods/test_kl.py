"""KL estimators: values by hand, gradients against exact distributions, and what masks keep out."""

import math

import numpy as np
import pytest
import torch

from learner.methods.kl import Estimator, kl_estimate, kl_k1, kl_k3, kl_loss, sequence_kl
from learner.methods.packed_losses import token_weights
from tests.learner.methods.packed_data import N, data, weights_of


def test_estimators_equal_values_by_hand() -> None:
    logprobs, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0, -2.5])
    assert kl_k1(logprobs, reference).tolist() == [0.0, -1.0, 2.0]
    assert kl_k3(logprobs, reference).tolist() == pytest.approx([0.0, math.e - 2, math.exp(-2) + 1])
    small = kl_k3(torch.tensor(-1e-3), torch.tensor(-2e-3))
    assert small.item() == pytest.approx(0.5e-6, rel=1e-3), "half the square: exp(d) - 1 has lost it in float32"
    with pytest.raises(ValueError, match="estimator: found 'k2', allowed: k1, k3"):
        kl_estimate("k2", logprobs, reference)  # type: ignore[arg-type]


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([-0.5, 0.4, 0.2, 0.9], dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_unbiased(estimator: Estimator) -> None:
    logits, reference = distributions()
    logprobs = logits.detach().log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    torch.testing.assert_close((logprobs.exp() * kl_estimate(estimator, logprobs, reference)).sum(), exact)
    assert exact > 0.1


def gradient_of(logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits)[0]


def test_expected_gradients_of_the_losses_are_what_the_module_says() -> None:
    """Mean over the tokens of the policy: k1's gradient is 0, k3's is that of the other direction's KL."""
    logits, reference = distributions()
    logprobs = logits.log_softmax(-1)
    drawn = logprobs.detach().exp()
    k1 = gradient_of(logits, (drawn * kl_k1(logits.log_softmax(-1), reference)).sum())
    k3 = gradient_of(logits, (drawn * kl_k3(logits.log_softmax(-1), reference)).sum())
    other_way = gradient_of(logits, (reference.exp() * (reference - logits.log_softmax(-1))).sum())
    this_way = gradient_of(logits, (logprobs.exp() * (logprobs - reference)).sum())
    torch.testing.assert_close(k1, torch.zeros_like(k1), atol=1e-12, rtol=0)
    torch.testing.assert_close(k3, other_way)
    assert (k3 - this_way).abs().max() > 0.01
    in_the_reward = gradient_of(logits, (drawn * kl_k1(logprobs.detach(), reference) * logits.log_softmax(-1)).sum())
    torch.testing.assert_close(in_the_reward, this_way)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_kl_loss_equals_a_loop_and_sees_nothing_outside_the_mask(estimator: Estimator, bad: float) -> None:
    d = data()
    weights = weights_of(d, "sequence_mean")
    logprobs = d["logprobs"].detach().masked_fill(~d["mask"], bad).requires_grad_()
    reference = d["old"].masked_fill(~d["mask"], bad).requires_grad_()
    loss, metrics = kl_loss(estimator, logprobs, reference, weights)
    loss.backward()
    expected = {"k1": 0.0, "k3": 0.0}
    total = 0.0
    for n in range(N):
        if not d["mask"][n]:
            assert logprobs.grad[n].item() == 0.0
            continue
        x = float(reference.detach()[n]) - float(logprobs.detach()[n])
        values, slopes = {"k1": -x, "k3": math.exp(x) - 1 - x}, {"k1": 1.0, "k3": 1 - math.exp(x)}
        expected = {name: expected[name] + values[name] for name in expected}
        total += float(weights[n]) * values[estimator]
        assert logprobs.grad[n].item() == pytest.approx(float(weights[n]) * slopes[estimator], rel=1e-4, abs=1e-8)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {f"reference_kl_{name}": value for name, value in expected.items()}, rel=1e-4
    )
    assert reference.grad is None and not any(value.requires_grad for value in metrics.values())


def test_kl_loss_gradient_equals_finite_differences() -> None:
    d = data()
    logprobs, weights = d["logprobs"].detach().double().requires_grad_(), weights_of(d, "token_mean").double()
    assert torch.autograd.gradcheck(lambda x: kl_loss("k3", x, d["old"].double(), weights)[0], (logprobs,))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_kl_loss_adds_up_over_microbatches(aggregation) -> None:
    d = data()

    def part(tokens: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weights = token_weights(
            aggregation, d["mask"][tokens], d["sequence_tokens"][tokens], int(d["mask"].sum()), 4, 6.5
        )
        return kl_loss("k3", d["logprobs"].detach()[tokens], d["old"][tokens], weights)

    whole, first, second = part(slice(None)), part(slice(0, 4)), part(slice(4, None))
    torch.testing.assert_close(first[0] + second[0], whole[0])
    for name, value in whole[1].items():
        torch.testing.assert_close(first[1][name] + second[1][name], value)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_sequence_kl_sums_a_completions_masked_tokens(estimator: Estimator) -> None:
    engine, reference = [-1.0, -2.0, math.nan, -0.5], [-1.5, -1.0, -9.0, -0.5]
    mask = [True, True, False, True]
    expected = {"k1": 0.5 - 1.0, "k3": math.exp(-0.5) - 0.5 + math.e - 2}[estimator]
    arrays = np.array(engine, np.float32), np.array(reference, np.float32), np.array(mask)
    assert sequence_kl(estimator, *arrays) == pytest.approx(expected)
    tensors = torch.tensor(engine, requires_grad=True), torch.tensor(reference), torch.tensor(mask)
    assert sequence_kl(estimator, *tensors) == pytest.approx(expected)
    assert sequence_kl(estimator, arrays[0], arrays[1], np.zeros(4, bool)) == 0.0
