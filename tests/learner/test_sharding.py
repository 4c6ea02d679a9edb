"""What a sharded network computes with: FSDP's own rounding, as on a GPU. The other cases are in test_trainer.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.batch import pack
from learner.trainer import Trainer
from protocol.rundir import RunDir
from tests.learner.reference import random_rows, tiny_directory
from tests.learner.test_trainer import LR, batches, recipe_of
from tests.ranks_harness import two_ranks


def test_bf16_arithmetic_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: FSDP rounds the masters as it gathers them, which must give the published bits. Logprobs of the same
    microbatch are then the same bits, too; in an update every microbatch's bf16 gradient is summed in float32."""
    as_published = "import learner.model as m\nm.pick_compute_dtype = lambda publish, device: publish"
    monkeypatch.setattr("learner.model.pick_compute_dtype", lambda publish, device: publish)
    model = tiny_directory(tmp_path / "model", "qwen2")
    recipe, run = recipe_of("bfloat16"), RunDir(tmp_path / "two")
    one = Trainer(recipe, RunDir(tmp_path / "one").create(), model)
    with two_ranks(recipe, run, model, as_published) as ranks:
        two = Trainer(recipe, run, model, ranks)
        assert one.model.compute_dtype == two.model.compute_dtype == torch.bfloat16
        packed = pack(random_rows())
        found = [trainer.logprobs(packed, True) for trainer in (one, two)]
        assert torch.equal(found[0].logprobs, found[1].logprobs)
        for trainer in (one, two):
            trainer.keep_reference()
        for a, b in zip(batches(one, 0), batches(two, 0), strict=True):
            figures = [trainer.train(batch, LR) for trainer, batch in ((one, a), (two, b))]
            for name in ("loss", "grad_norm", "tokens"):
                assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-3, abs=1e-4), (a.loss, name)
