"""Two ranks do what one does: the same figures, versions and checkpoints. The second rank is a real process, over gloo.

TOLERANCE: the ranks add the same float32 numbers in another order, so sums differ in the last bits (2^-24 = 6e-8 of
their largest part), and after some updates by a little more. A wrong denominator, a lost or doubled microbatch, a mean
instead of a sum change figures by whole percents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from learner.batch import Batch, Minibatch, Row, pack
from learner.checkpoint import MOMENTS, WEIGHTS
from learner.methods import dpo, grpo, sft
from learner.methods.rollouts import group_row
from learner.publish import Publisher, Versions, flatten
from learner.trainer import Trainer
from protocol.config import Recipe
from protocol.rundir import RunDir
from protocol.weights import Snapshot
from tests.learner.reference import make_group, random_rows, tiny_directory
from tests.ranks_harness import two_ranks

TOLERANCE = 2e-5
LR = 1e-4
PREFERENCES = 3 * [((1, 2, 3), (4, 5, 2), (6, 2)), ((7,), (8,), (9, 9, 9, 9, 2)), ((3, 3), (5, 2), (5, 5, 2))]
PAIRS = 3 * [((1, 2, 3), (4, 5, 2)), ((7,), (8, 2)), ((1, 2, 9, 9), (6, 6, 6, 2)), ((5, 5), (2,))]
MICROBATCHES = {"policy": 2 * (3 + 1), "sft": 3, "dpo": 3}
"""Odd numbers for two ranks, so that one of them has to idle in a pass; and once in all passes of an update."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tied embeddings, biases, and a vocabulary that two ranks cannot divide evenly."""
    return tiny_directory(tmp_path_factory.mktemp("model"), "qwen2")


def recipe_of(dtype: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"dtype": dtype, "max_model_len": 64},
            "rollout": {"max_tokens": 16, "groups_per_step": 4},
            "optim": {"lr": LR, "max_grad_norm": 1.0, "weight_decay": 0.1},
            "grpo": {"kl_coef": 0.05},
            "learner": {"device": "cpu", "threads": 1, "processes": 2, "microbatch_tokens": 24},
        }
    )


class Pair:
    """A trainer of one process and one of two, with the same recipe and model."""

    def __init__(self, recipe: Recipe, model: Path, one: Trainer, two: Trainer, path: Path) -> None:
        self.recipe, self.model, self.one, self.two, self.path = recipe, model, one, two, path
        self.both = (one, two)
        self.published: tuple[list[Snapshot], list[Snapshot]] = ([], [])
        self._publishers = [
            Publisher(
                Versions(path / f"{name}.jsonl"), lambda *_: None, lambda snapshot, _, kept=kept: kept.append(snapshot)
            )
            for name, kept in zip(("one", "two"), self.published, strict=True)
        ]

    def publish(self, step: int) -> tuple[Snapshot, Snapshot]:
        for trainer, publisher, kept in zip(self.both, self._publishers, self.published, strict=True):
            before = len(kept)
            assert trainer.publish(publisher, step, 0) == before + 1
            publisher.wait()
            assert len(kept) == before + 1, "once"
        return self.published[0][-1], self.published[1][-1]

    def close(self) -> None:
        for publisher in self._publishers:
            publisher.close()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    recipe, path = recipe_of(request.param), tmp_path_factory.mktemp("run")
    with two_ranks(recipe, RunDir(path / "two"), model) as ranks:
        one = Trainer(recipe, RunDir(path / "one").create(), model)
        made = Pair(recipe, model, one, Trainer(recipe, RunDir(path / "two"), model, ranks), path)
        yield made
        made.close()


def minibatch(rows: tuple[Row, ...]) -> Minibatch:
    samples = [sample for row in rows for sample in row.samples]
    return Minibatch(rows, int(sum(s.mask.sum() for s in samples)), len(samples))


def batches(trainer: Trainer, step: int) -> list[Batch]:
    """Each method's batch, with a reference where it wants one; uneven numbers of microbatches."""
    rows = tuple(trainer.with_reference(random_rows(seed=step)))
    policy = Batch(step, (minibatch(rows[:3]), minibatch(rows[3:])), {"reward_mean": 0.5}, passes=2)
    preferences = dpo.make_batch(PREFERENCES, step, lambda rows: trainer.with_reference(rows, split=False))
    return [policy, sft.make_batch(PAIRS, step), preferences]


def assert_close(one: dict[str, float], two: dict[str, float], what: str) -> None:
    assert one.keys() == two.keys(), what
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), f"{what}: {name}"


def tensors_of(snapshot: Snapshot, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(snapshot.data), dtype=dtype)


def assert_same_checkpoint(one: Path, two: Path) -> None:
    for name in (WEIGHTS, MOMENTS):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_two_ranks_hold_parts_only(pair: Pair) -> None:
    whole = {name: p.numel() for name, p in pair.one.named_parameters()}
    held = {name: p.to_local().numel() for name, p in pair.two.named_parameters()}  # type: ignore[attr-defined]
    assert held.keys() == whole.keys()
    assert 0.5 <= sum(held.values()) / sum(whole.values()) < 0.55


def test_first_version_is_bit_for_bit_that_of_one_process(pair: Pair) -> None:
    one, two = pair.publish(0)
    assert one.manifest.tensors == two.manifest.tensors, "names, types, shapes and digests"
    assert one.data == two.data
    assert bytes(two.data) == flatten(pair.one.model.published_state())[1].numpy().tobytes()


def test_training_has_the_losses_and_gradient_norms_of_one_process(pair: Pair) -> None:
    """Policy (two minibatches, two passes, KL to a reference), sft and dpo, in turns, on the same weights."""
    for trainer in pair.both:
        trainer.keep_reference()
    assert (pair.path / "one" / "reference.safetensors").read_bytes() == (
        pair.path / "two" / "reference.safetensors"
    ).read_bytes()
    for step in range(3):
        for one, two in zip(*(batches(trainer, step) for trainer in pair.both), strict=True):
            found = [trainer.train(batch, LR) for trainer, batch in zip(pair.both, (one, two), strict=True)]
            assert_close(*found, what=f"step {step}, {one.loss}")
            assert found[0]["grad_norm"] > 0.01 and math.isfinite(found[0]["loss"])
            assert found[0]["microbatches"] == MICROBATCHES[one.loss]


def test_logprobs_kept_of_a_step_are_those_of_one_process(pair: Pair) -> None:
    """Two minibatches, two passes; after training, so that the ranks have the reference that the recipe asks for."""
    optim = pair.recipe.optim.model_copy(update={"minibatches": 2, "epochs": 2})
    recipe = pair.recipe.model_copy(update={"optim": optim})
    groups = [make_group([1.0, 0.0, 0.5], [4, 6, 2 + i], index=i, temperature=0.7) for i in (3, 1, 0, 2)]
    found = []
    for trainer in pair.both:
        batch = grpo.make_batch(groups, recipe, lambda version: 0, 3, trainer.with_reference)
        rows = [group_row(group, [0.0] * 3, lambda version: 0, 3) for group in groups]
        before = trainer.logprobs(pack(rows), False).logprobs
        trainer.train(batch, LR)
        assert trainer.first_logprobs is not None
        tolerance = TOLERANCE if before.dtype == pair.one.model.publish_dtype else 0.05  # bfloat16: other shapes
        torch.testing.assert_close(trainer.first_logprobs, before.float(), atol=tolerance, rtol=0)
        assert (trainer.logprobs(pack(rows), False).logprobs - before).abs().max() > 10 * TOLERANCE
        found.append(trainer.first_logprobs)
        trainer.train(sft.make_batch(PAIRS, 4), LR)
        assert trainer.first_logprobs is None, "demonstrations were not drawn"
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=0)


def test_later_version_is_that_of_one_process_but_for_the_order_of_sums(pair: Pair) -> None:
    one, two = pair.publish(1)
    dtype = pair.one.model.publish_dtype
    a, b = tensors_of(one, dtype).float(), tensors_of(two, dtype).float()
    first = tensors_of(pair.published[0][0], dtype).float()
    assert (a != first).float().mean() > 0.05, "training has moved the weights"
    apart = (a - b).abs()
    if dtype == torch.float32:
        # Adam's first updates are +-lr, whatever a gradient's size, so one that is nearly 0 may turn.
        assert (apart < 1e-6).float().mean() > 0.99
    else:
        assert (apart == 0).float().mean() > 0.99, "a bf16 step is far larger than the difference"
    assert apart.max() < 20 * LR + 2**-8 * a.abs().max()


def test_probe_of_published_weights_has_the_logprobs_of_one_process(pair: Pair) -> None:
    state = {name: p.detach().clone() for name, p in pair.one.named_parameters()}
    weights = {name: torch.sin(100 * p).to(pair.one.model.publish_dtype) for name, p in state.items()}
    packed = pack(random_rows())
    one, two = (trainer.frozen_logprobs(weights, packed) for trainer in pair.both)
    torch.testing.assert_close(two, one, rtol=TOLERANCE, atol=TOLERANCE)
    now = [trainer.logprobs(packed, False).logprobs for trainer in pair.both]
    assert (now[0] - one).abs().mean() > 0.1, "other weights"
    torch.testing.assert_close(now[1], now[0], rtol=1e-3, atol=1e-3)


def test_checkpoint_of_two_ranks_loads_into_one_bit_for_bit_and_the_reverse(pair: Pair) -> None:
    """Weights, both moments and their step; and all go on from there with the same figures."""
    written = pair.two.save(pair.path / "written", 1, {"cursor": 7}, keep=1)
    single = Trainer(pair.recipe, RunDir(pair.path / "single").create(), pair.model)
    assert single.load(written) == {"cursor": 7}
    assert_same_checkpoint(written, single.save(pair.path / "from-two", 1, {}, keep=1))
    single.train(sft.make_batch(PAIRS, 5), LR)
    later = single.save(pair.path / "later", 2, {}, keep=1)
    assert pair.two.load(later) == {}
    assert_same_checkpoint(later, pair.two.save(pair.path / "from-one", 2, {}, keep=1))
    batch = sft.make_batch(PAIRS, 6)
    assert_close(single.train(batch, LR), pair.two.train(batch, LR), "after the change")
    pair.one.load(later)
    pair.one.train(batch, LR)


def test_export_is_whole(pair: Pair) -> None:
    class NoTokenizer:
        def save_pretrained(self, directory: Path) -> None: ...

    for trainer, name in zip(pair.both, ("one", "two"), strict=True):
        trainer.load(pair.path / "later" / "step-00000002")
        trainer.export(pair.path / f"export-{name}", NoTokenizer())
    files = [(pair.path / f"export-{name}" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_what_is_not_finite_is_refused_by_all_ranks_and_training_goes_on(pair: Pair) -> None:
    """One rank alone computes the bad row."""
    before = pair.two.save(pair.path / "before", 3, {}, keep=1)
    row, *rows = random_rows()
    bad = dataclasses.replace(row.samples[0], advantage=float("nan"))
    spoilt = (dataclasses.replace(row, samples=(bad, *row.samples[1:])), *rows)
    with pytest.raises(FloatingPointError, match="step 3, update 1"):
        pair.two.train(Batch(3, (minibatch(spoilt),), {}), LR)
    assert_same_checkpoint(before, pair.two.save(pair.path / "after", 3, {}, keep=1))
    empty = pair.two.train(Batch(3, (minibatch(()),), {}), LR)
    assert (empty["skipped_updates"], empty["updates"]) == (1, 0)
    for trainer in pair.both:
        trainer.load(before)
        trainer.restart_optimizer()
    batch = sft.make_batch(PAIRS, 4)
    assert_close(*(trainer.train(batch, LR) for trainer in pair.both), what="after the refusal")  # type: ignore[arg-type]
