"""Consecutive versions of a real model's weights: fine-tuning on the demo's sums, one AdamW update a version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

from deploy.models import resolve_model
from learner.intake.data import load_task
from learner.methods import sft
from learner.methods.epochs import Epochs
from learner.model import load_model
from learner.optim import Optimizer
from learner.publish import flatten
from learner.step import train_step
from protocol.config import load_recipe
from protocol.messages import TensorSpec

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.toml"
BATCH_SIZE = 8
SETTLING_UPDATES = 4
"""Updates before the first version: AdamW's very first ones move every weight by the full learning rate."""


def versions(lr: float, count: int) -> Iterator[tuple[tuple[TensorSpec, ...], torch.Tensor]]:
    """(specs, flat uint8 buffer) of `count` consecutive versions in bfloat16."""
    examples = BATCH_SIZE * (SETTLING_UPDATES + count)
    recipe = load_recipe(RECIPE, (f"warm_start.examples={examples}", "task.max_operand=99"))
    path = resolve_model(recipe.model.path, lambda line: None)
    model = load_model(path, recipe.model, recipe.learner)
    task = load_task(recipe, AutoTokenizer.from_pretrained(path))
    pairs = [task.demonstration_tokens(example) for example in task.demonstrations]
    batches = Epochs(pairs, BATCH_SIZE, 1, recipe.seed)
    optimizer = Optimizer(model, recipe.optim)
    for number in range(SETTLING_UPDATES + count):
        if number >= SETTLING_UPDATES:
            yield flatten(model.published_state())
        train_step(model, optimizer, sft.make_batch(batches[number], number), recipe, lr)
