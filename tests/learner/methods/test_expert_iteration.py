"""What expert iteration keeps of the groups, and the updates it makes of that."""

import numpy as np
from msgspec.structs import replace

from learner.methods.expert_iteration import make_batch
from protocol.config import Recipe
from protocol.messages import Group
from tests.learner.reference import make_group


def recipe(**config: object) -> Recipe:
    return Recipe.model_validate({"method": "expert_iteration", "expert_iteration": config})


def groups() -> list[Group]:
    rewards = ([1.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0])
    return [whole(make_group(r, [4, 2, 3, 5], index=i)) for i, r in enumerate(rewards)]


def whole(group: Group) -> Group:
    """The group with all completions ended by the model."""
    return replace(group, completions=tuple(replace(c, finish_reason="stop") for c in group.completions))


def kept(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return sorted(
        (row.prompt_ids, tuple(s.token_ids.tolist()))
        for minibatch in batch.minibatches
        for row in minibatch.rows
        for s in row.samples
    )


def tokens(group: Group, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = sum(c.num_tokens for c in group.completions[:index])
    ids = np.frombuffer(group.token_ids, "<i4")[start : start + group.completions[index].num_tokens]
    return group.prompt_ids, tuple(ids.tolist())


def make(config: Recipe, changed: list[Group] | None = None):
    return make_batch(changed or groups(), config, lambda version: 0, step=0)


def test_what_the_grader_accepts_is_kept_and_nothing_else() -> None:
    batch, (a, _, c) = make(recipe()), groups()
    assert kept(batch) == sorted([tokens(a, 0), tokens(a, 2), tokens(a, 3), tokens(c, 2)])
    assert batch.loss == "sft" and batch.passes == 1
    assert batch.stats["kept_completions"] == 4
    assert batch.stats["kept_questions"] == 2
    assert batch.stats["kept_share"] == 4 / 12
    assert len(kept(make(recipe(min_reward=0.5)))) == 5
    assert len(kept(make(recipe(min_reward=1.0 + 1e-9)))) == 4, "a weighted sum of scores may round"


def test_at_most_so_many_of_one_question_the_first_ones() -> None:
    a, _, c = groups()
    assert kept(make(recipe(max_per_question=2))) == sorted([tokens(a, 0), tokens(a, 2), tokens(c, 2)])


def test_equal_completions_of_a_question_are_kept_once() -> None:
    group = whole(make_group([1.0, 1.0, 1.0], [3, 3, 2]))
    ids = group.token_ids[:12] * 2 + group.token_ids[24:]
    repeated = replace(group, token_ids=ids)
    assert len(kept(make(recipe(), [repeated]))) == 2
    assert len(kept(make(recipe(deduplicate=False), [repeated]))) == 3


def test_a_completion_that_was_cut_off_or_not_graded_is_not_kept() -> None:
    group = groups()[0]
    first, second, third, fourth = group.completions
    changed = replace(
        group, completions=(replace(first, finish_reason="length"), second, replace(third, grader_error="x"), fourth)
    )
    assert kept(make(recipe(), [changed])) == [tokens(group, 3)]


def test_updates_go_over_what_was_kept_as_often_as_asked() -> None:
    batch = make(recipe(batch_size=3, epochs=2))
    assert [minibatch.num_sequences for minibatch in batch.minibatches] == [3, 1, 3, 1]
    first, second = batch.minibatches[:2], batch.minibatches[2:]
    assert sum(m.num_tokens for m in first) == sum(m.num_tokens for m in second) == 4 + 3 + 5 + 3
    assert len(kept(batch)) == 8 and len(set(kept(batch))) == 4


def test_a_step_that_keeps_nothing_has_no_update() -> None:
    batch = make(recipe(), [groups()[1]])
    assert batch.minibatches == () and batch.stats["kept_completions"] == 0


def test_limits_are_a_questions_also_where_it_was_drawn_twice() -> None:
    first, second = whole(make_group([1.0] * 3, [3, 2, 4])), whole(make_group([1.0] * 3, [3, 2, 4], seed=1))
    second = replace(second, prompt_ids=first.prompt_ids)
    batch = make(recipe(max_per_question=4), [first, second])
    assert kept(batch) == sorted([tokens(first, 0), tokens(first, 1), tokens(first, 2), tokens(second, 0)])
    assert batch.stats["kept_questions"] == 1
    assert len(kept(make(recipe(), [first, first]))) == 3, "the same texts again are repetitions"
