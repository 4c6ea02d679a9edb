"""The graders `reasoning_gym:NAME`: which part of a response is the answer, and what never reaches the scorers."""

import ast
import json
from pathlib import Path

import pytest

from actor.rewards import find_grader
from actor.rewards.gym import _EXACT, EVALUATED, find_answer

reasoning_gym = pytest.importorskip("reasoning_gym")
SUM = json.dumps({"question": "3 + 4", "answer": "7", "metadata": {}})


def problem(name: str, index: int = 0) -> tuple[str, str]:
    """(the expected answer, the whole problem as a ticket carries it)."""
    entry = reasoning_gym.create_dataset(name, size=index + 1, seed=7)[index]
    return str(entry["answer"]), json.dumps(entry, default=str)


def grade(name: str, response: str, reference: str) -> dict[str, float]:
    return find_grader(f"reasoning_gym:{name}")(response, reference)


def names() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


SELDOM_WITH_AN_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.mark.parametrize("name", sorted(set(names()) - SELDOM_WITH_AN_ANSWER))
def test_every_tasks_own_answer_survives_the_wire_and_is_right_with_and_without_tags(name):
    answer, reference = problem(name)
    tagged = grade(name, f"thoughts <answer> {answer} </answer>", reference)
    assert tagged == {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}
    assert grade(name, f"{answer}\n", reference) == {"reward": 1.0, "format_reward": 0.0, "answer_reward": 1.0}
    for hostile in (
        "",
        "nonsense",
        "\x00",
        "\ud800",
        "9**9**9",
        "__import__('os').abort()",
        "9" * 5000,
        f"not {answer}",
    ):
        assert grade(name, f"<answer>{hostile}</answer>", reference)["reward"] < 1.0, hostile
        assert grade(name, hostile, reference)["reward"] < 1.0, hostile


@pytest.mark.parametrize(
    "name", ["chain_sum", "gsm_symbolic", "countdown", "leg_counting", "time_intervals", "word_sorting"]
)
def test_a_list_with_the_right_answer_in_it_is_not_rewarded(name):
    (answer, reference), (other, _) = problem(name), problem(name, 1)
    for form in ("{0} or {1}", "{1}, {0}", "{0}, {1}", "{1}\n{0}", "{1} {0}", "It is {1}.\nIt is {0}.", "{1} = {0}"):
        text = form.format(answer, other)
        assert grade(name, text, reference)["reward"] < 0.06, text
        assert grade(name, f"<answer>{text}</answer>", reference)["reward"] < 0.06, text


@pytest.mark.parametrize(
    "response",
    ["7", " 7\n", "7.", "7.0", "+7", "3 + 4 = 7", "3+4=7", "The answer is 7.", "Answer: 7", "x = 7", "answer = 7",
     "Sure!\n7", "3 and 4 make it\nThe answer is 7", "I take 3 and 4:\n3 + 4 = 7", "<answer>7</answer>",
     "6? no. <answer>7</answer> \n", "<think>6?</think> no. <answer>7</answer>", "6?</think><answer>7</answer>"],
)  # fmt: skip
def test_short_responses_of_small_models_are_read(response):
    assert grade("chain_sum", response, SUM)["reward"] == 1.0


@pytest.mark.parametrize(
    "response",
    ["", " ", "6\n7", "7\n7 8", "6 7", "6 or 7", "7 or 6", "6, 7", "6 = 7", "not 7", "The answer is 6\nThe answer is 7",
     "3 + 4\n7", "<answer>6</answer><answer>7</answer>", "<answer>7", "7</answer>", "<answer></answer>7",
     "</answer>7<answer>", "<answer><answer>7</answer></answer>", "seven", "٧", "7\x00", "nan", "1 2 3 4 5 6 7 8 9",
     "<answer>7</answer> no wait 8", "<answer>7</answer> good", "<answer>7</answer>.", "<think><answer>7</answer>",
     "<think>6</think><think><answer>7</answer>", "<think><answer>7</answer></think>",
     "<answer>1 2 3 4 5 6 7 8 9</answer>", "7\n" * 5000 + "8", "<answer>7</answer>" * 5000,
     "7 " * 500_000, "-7", "--7"],
)  # fmt: skip
def test_other_responses_are_not_rewarded(response):
    assert grade("chain_sum", response, SUM)["reward"] == 0.0


def test_answer_without_tags_is_read_in_this_order():
    assert find_answer("7", "7") == ["7"]
    assert find_answer("3 + 4 = 7.", "7") == ["3 + 4 = 7.", "7.", "7"]
    assert find_answer("x = 7", "x = 7") == ["x = 7"]
    assert find_answer("1 2\n3 4", "1 2\n3 4") == ["1 2\n3 4"]
    assert find_answer("so:\n1 2\n3 4", "1 2\n3 4") == []


def test_format_is_the_tag_exactly_once():
    assert grade("chain_sum", "<answer>8</answer>", SUM) == {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}
    for response in ("8", "<answer>7</answer> no wait 8", "<think><answer>7</answer>"):
        assert grade("chain_sum", response, SUM)["format_reward"] == 0.0


@pytest.mark.parametrize("reference", ["", "7", "[]", "{}", '{"question": "", "answer": "7"}', "{" * 10_000])
def test_reference_must_be_a_whole_problem(reference):
    with pytest.raises((ValueError, RecursionError)):
        grade("chain_sum", "7", reference)


@pytest.mark.parametrize(
    ("name", "metadata", "answer"),
    [("number_sorting", {"direction": "ascending"}, "__import__('os').abort()"),
     ("polynomial_multiplication", {}, "__import__('os').abort()"),
     ("polynomial_multiplication", {}, "x.__class__"),
     ("simple_integration", {"integrand": "exit()", "variable": "x"}, "x"),
     ("bitwise_arithmetic", {"problem": "exit()"}, "0x1"),
     ("bitwise_arithmetic", {"problem": ["0x1"]}, "0x1")],
)  # fmt: skip
def test_no_text_of_a_problem_is_evaluated(name, metadata, answer):
    reference = json.dumps({"question": "", "answer": answer, "metadata": metadata})
    with pytest.raises(ValueError, match="must not evaluate"):
        grade(name, "<answer>[1]</answer>", reference)


def test_numbers_of_a_puzzle_are_its_own():
    _, reference = problem("puzzle24")
    assert grade("puzzle24", "8*3*1*1", reference)["reward"] == 0.0


def test_every_scorer_that_evaluates_text_is_known():
    """Fails when a new version of the package has another one: it must then be looked at, and listed."""
    root = Path(reasoning_gym.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        scoring = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                   and node.name in ("score_answer", "verify_solution")]  # fmt: skip
        for call in (node for function in scoring for node in ast.walk(function) if isinstance(node, ast.Call)):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if called in ("eval", "exec", "parse_expr", "sympify", "compile", "literal_eval", "loads") and (
                called != "loads" or "json" not in ast.unparse(call.func)
            ):
                found.add(file.stem)
    assert found == set(EVALUATED)
    assert set(_EXACT) <= set(names())


def test_unknown_task_is_named_with_those_like_it():
    with pytest.raises(ValueError, match=r"found the task 'chain_sums'.*such as chain_sum"):
        find_grader("reasoning_gym:chain_sums")
    with pytest.raises(ValueError, match="found the task 'composite'"):
        find_grader("reasoning_gym:composite")
