"""The schedule's values, who is decayed, and AdamW's first steps by hand."""

import math

import pytest
import torch

from learner.optim import Optimizer, lr_at
from protocol.sections import OptimConfig
from tests.learner.reference import policy


def test_lr_warms_up_then_stays_constant() -> None:
    config = OptimConfig(lr=1e-4, warmup_steps=4)
    found = [lr_at(step, config, 10) for step in range(7)]
    assert found == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4, 1e-4])


def test_lr_cosine_reaches_its_floor_at_the_last_step() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="cosine", min_lr_ratio=0.2)
    found = [lr_at(step, config, 7) for step in range(9)]
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert found == pytest.approx([0.5, 1.0, *cosine, 0.2, 0.2])
    assert found[2] == 1.0 and found[6] == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 2])
def test_lr_of_very_short_runs_is_defined(steps: int) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="cosine")
    assert all(0 < lr_at(step, config, steps) <= 1 for step in range(steps))


def test_optimizer_moves_by_adamw_and_decays_matrices_only() -> None:
    model = policy("qwen2")
    config = OptimConfig(lr=0.01, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8)
    optimizer = Optimizer(model, config)
    before = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in before.items()}
    generator = torch.Generator().manual_seed(0)
    for t, lr in ((1, 0.01), (2, 0.003)):
        optimizer.set_lr(lr)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient, (m, v) = parameter.grad.double(), moments[name]
            m.mul_(0.9).add_(0.1 * gradient)
            v.mul_(0.95).add_(0.05 * gradient**2)
            decay = 0.5 if parameter.ndim == 2 else 0.0
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            before[name] = before[name] * (1 - lr * decay) - lr * step
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), before[name], atol=1e-6, rtol=1e-5)
        assert parameter.grad is None


def test_optimizer_clip_returns_the_norm_before() -> None:
    model = policy()
    optimizer = Optimizer(model, OptimConfig())
    total = 0.0
    for _, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
        total += 0.01 * parameter.numel()
    assert optimizer.clip(0.5) == pytest.approx(math.sqrt(total), rel=1e-4)
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for _, p in model.named_parameters()))
    assert clipped == pytest.approx(0.5, rel=1e-3)


def test_optimizer_refuses_moments_of_another_model() -> None:
    optimizer = Optimizer(policy(), OptimConfig())
    with pytest.raises(ValueError, match=r"exp_avg\.nothing"):
        optimizer.load_state_tensors({"exp_avg.nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"found shape \[3\], expected \[32\]"):
        optimizer.load_state_tensors({"exp_avg.model.norm.weight": torch.zeros(3)})
