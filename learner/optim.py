"""AdamW on fp32 master weights, and the learning rate of each step.

Called by `step.py` (updates) and `checkpoint.py` (state). Knows no loss and no batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.model import PolicyModel
from learner.sharding import part_of, whole_of
from protocol.sections import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def lr_at(step: int, config: OptimConfig, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: all updates of one step share it.

    Linear warm-up over `warmup_steps` steps (the first trains at lr / warmup_steps, never at 0), then constant, or a
    cosine from lr that reaches min_lr_ratio x lr at the last step (and stays there, should steps go on).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW over a model's fp32 master weights. Weight decay falls on matrices only, never on norms and biases.

    `torch.optim.AdamW(fused=True)` takes one pass over each tensor, on the CPU as on CUDA.
    """

    def __init__(self, model: PolicyModel, config: OptimConfig) -> None:
        self.parameters = dict(model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._adamw.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self._adamw.param_groups:
            group["lr"] = lr

    def clip(self, max_grad_norm: float) -> float:
        """Scale the gradients to at most `max_grad_norm` (L2 over all parameters, and all ranks). Returns the norm
        before, which may be inf."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = whole_of(torch.nn.utils.get_total_norm(gradients, foreach=True))
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), max_grad_norm, norm, foreach=True)
        return float(norm)

    def step(self) -> None:
        """One update from the accumulated gradients, which are dropped."""
        self._adamw.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments by parameter name, e.g. "exp_avg.model.norm.weight". Views of the live state, not copies; sharded
        like the parameters."""
        return {
            f"{moment}.{name}": self._adamw.state[parameter][moment]
            for name, parameter in self.parameters.items()
            if parameter in self._adamw.state
            for moment in MOMENTS
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Parameters without an entry have not been stepped yet.

        Raises ValueError for a tensor that belongs to no parameter or has another shape.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            moment, _, name = key.partition(".")
            parameter = self.parameters.get(name)
            if moment not in MOMENTS or parameter is None:
                raise ValueError(f"optimizer state {key!r}: found no parameter of that name in the model")
            if moment != "step" and tensor.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {key!r}: found shape {list(tensor.shape)}, expected {list(parameter.shape)}"
                )
            like = tensor if moment == "step" else parameter
            states.setdefault(name, {})[moment] = part_of(tensor, like).to(parameter.device)
        self._adamw.state.clear()
        for name, state in states.items():
            if set(state) != set(MOMENTS):
                raise ValueError(f"optimizer state of {name!r}: found {sorted(state)}, expected {sorted(MOMENTS)}")
            self._adamw.state[self.parameters[name]] = state
