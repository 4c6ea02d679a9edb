"""The task "reasoning_gym": seeds apart, references that the scorer can read, errors that name near misses."""

import json

import pytest

from learner.intake.data import load_task
from learner.intake.gym import make_reasoning_gym
from protocol.config import parse_recipe
from protocol.errors import RecipeError
from tests.tiny_model import make_tiny_tokenizer


def recipe_of(dataset="chain_sum", prompts=8, seed=0, method="grpo", **task):
    task = {"name": "reasoning_gym", "dataset": dataset, "grader": f"reasoning_gym:{dataset}", "size": 40} | task
    return parse_recipe({"task": task, "eval": {"prompts": prompts}, "seed": seed, "method": method}, "")


def test_gym_problems_are_the_same_for_a_seed_and_others_for_another():
    first, again = make_reasoning_gym(recipe_of()), make_reasoning_gym(recipe_of())
    assert (first.train, first.heldout, first.digest) == (again.train, again.heldout, again.digest)
    other = make_reasoning_gym(recipe_of(seed=1))
    assert {p.text for p in first.heldout} != {p.text for p in other.heldout}
    assert first.digest != other.digest
    assert (len(first.heldout), len(first.train)) == (8, 40)


def test_gym_reference_is_the_entry_and_people_read_the_answer():
    from reasoning_gym import get_score_answer_fn

    problems = make_reasoning_gym(recipe_of())
    for problem in [*problems.heldout, *problems.train]:
        entry = json.loads(problem.answer)
        assert set(entry) == {"question", "answer", "metadata"}
        assert (entry["question"], entry["answer"]) == (problem.text, problem.answer_text)
        assert problem.solution == problem.answer_text
        assert get_score_answer_fn("chain_sum")(problem.answer_text, entry) == 1.0
    example = load_task(recipe_of(), make_tiny_tokenizer()).heldout[0]
    assert example.shown_answer == json.loads(example.answer)["answer"] == example.solution


def test_gym_trains_on_no_heldout_question(caplog):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    problems = make_reasoning_gym(recipe_of(prompts=60, size=300, options=options))
    heldout = {problem.text for problem in problems.heldout}
    assert len(heldout) == 60, "all different"
    left = 300 - len(problems.train)
    assert left > 0
    assert not heldout & {problem.text for problem in problems.train}
    assert f"chain_sum: {left} problems left out of training" in caplog.text


def test_gym_with_too_few_questions_is_refused():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(
        RecipeError, match=r"eval.prompts: found 500, allowed: at most \d+, so many different questions"
    ):
        make_reasoning_gym(recipe_of(prompts=500, options=options))


def test_gym_names_near_tasks_and_known_options():
    with pytest.raises(RecipeError, match=r"task.dataset: found 'chain_sums', allowed: .* such as chain_sum, "):
        make_reasoning_gym(recipe_of("chain_sums"))
    with pytest.raises(RecipeError, match=r"task.options.min_tems: found .* allowed: min_terms, max_terms"):
        make_reasoning_gym(recipe_of(options={"min_tems": 2}))
    with pytest.raises(RecipeError, match=r"task.options.seed: found for chain_sum"):
        make_reasoning_gym(recipe_of(options={"seed": 2}))
    with pytest.raises(RecipeError, match=r"task.options: found {'min_terms': 9, .*max_terms must be >= min_terms"):
        make_reasoning_gym(recipe_of(options={"min_terms": 9, "max_terms": 3}))


def test_gym_wrong_name_comes_before_its_grader():
    with pytest.raises(RecipeError, match=r"task.dataset: found 'chain_sums'"):
        make_reasoning_gym(recipe_of("chain_sums", grader="integer"))


def test_gym_cannot_hold_out_everything():
    with pytest.raises(RecipeError, match=r"eval.prompts: found \"all\", allowed with .*: a number"):
        make_reasoning_gym(recipe_of(prompts="all"))


@pytest.mark.parametrize("grader", ["integer", "reasoning_gym:leg_counting"])
def test_gym_needs_the_grader_of_its_task(grader):
    with pytest.raises(RecipeError, match=r"task.grader: found .* allowed .*\"reasoning_gym:chain_sum\""):
        make_reasoning_gym(recipe_of(grader=grader))


def test_gym_refuses_tasks_that_json_breaks():
    with pytest.raises(
        RecipeError, match=r"task.dataset: found 'rearc', whose scorer does not recognise its own answer"
    ):
        make_reasoning_gym(recipe_of("rearc", size=1, prompts=1))


def test_gym_without_an_answer_has_no_solution():
    problem = make_reasoning_gym(recipe_of("graph_color", size=2, prompts=1)).train[0]
    assert (problem.solution, problem.answer_text) == ("", "(any that the task's scorer accepts)")
    assert json.loads(problem.answer)["answer"] is None


def test_gym_demonstrations_take_the_recipes_format():
    problem = make_reasoning_gym(recipe_of(size=2, prompts=1, solution_format="r1_zero")).train[0]
    assert problem.solution == f"<think> </think> <answer> {problem.answer_text} </answer>"


def test_gym_evaluation_makes_no_training_problems():
    problems = make_reasoning_gym(recipe_of(method="eval", size=10**8))
    assert (len(problems.train), len(problems.heldout)) == (0, 8)
