"""The grammar of specs, the lookup of names, and weighted sums."""

import subprocess
import sys
from pathlib import Path

import pytest

from actor.rewards import GRADERS, check_grader, find_grader, grade_integer, parse_spec, user_functions_of
from actor.rewards.spec import Term

ROOT = Path(__file__).resolve().parents[3]
SUM = "0.8*r1_zero.answer_reward + 0.2*r1_zero.format_reward - 0.1*length:2000"


def test_spec_is_read_into_terms():
    assert parse_spec(SUM).terms == (
        Term(0.8, "r1_zero", "answer_reward"),
        Term(0.2, "r1_zero", "format_reward"),
        Term(-0.1, "length:2000", ""),
    )
    assert parse_spec(SUM).graders == ("r1_zero",)
    assert not parse_spec(SUM).plain
    assert parse_spec("integer") == ((Term(1.0, "integer", "reward"),), True)
    assert parse_spec("-integer+.5e1*a.b:c.score").terms == (
        Term(-1.0, "integer", "reward"),
        Term(5.0, "a.b:c", "score"),
    )
    assert not parse_spec("integer.reward").plain
    assert parse_spec("reasoning_gym:chain_sum").plain


@pytest.mark.parametrize(
    "spec",
    ["", " ", "+", "0.8", "0.8*", "*integer", "integer exact", "integer + ", "integer ++ exact", "0.8 integer",
     "integer*0.8", "(integer)", "integer.", "integer:", "a:b:c", "1e999*integer", "length:10", "integer + length:0",
     "integer + length:x", "integer + length:9.reward", "integer + length", "integer\x00", "intéger", "os.system('x')",
     "a/b:c", "../m:f", "m:f()", "x" * 3000, "+" * 1500, "integer" + " " * 1500 + "!"],
)  # fmt: skip
def test_spec_that_is_none_is_refused_with_what_is_allowed(spec):
    with pytest.raises(ValueError, match=r"^grader: found .*allowed: "):
        check_grader(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "Integer",
            "found 'Integer', allowed: exact, gsm8k, integer, math, question_only, r1_zero, reasoning_gym:NAME",
        ),
        ("0.5*integer + 0.5*intger", "found 'intger', allowed: exact, gsm8k"),
        ("integer.format", "found the score 'format' of integer, allowed: answer_reward, format_reward, reward"),
        ("os.system", "found 'os', allowed: exact"),
        ("reasoning_gym", "found 'reasoning_gym', allowed"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(spec, message):
    for check in (check_grader, find_grader):
        with pytest.raises(ValueError, match=message):
            check(spec)


@pytest.mark.parametrize(
    "spec", [*GRADERS, SUM, "reasoning_gym:chain_sum", "my.module:f", "0.5*my_module:f.style + exact"]
)
def test_sound_specs_pass(spec):
    check_grader(spec)


def test_user_functions_are_found_and_may_be_limited():
    assert user_functions_of("0.5*m:f.style + n.m:g + 0.1*reasoning_gym:chain_sum - m:f + length:5") == ("m:f", "n.m:g")
    check_grader("m:f", ("m:f",))
    with pytest.raises(ValueError, match="no user function was given to this actor by that name"):
        check_grader("m:g", ("m:f",))
    with pytest.raises(ValueError, match="no user function was given to this actor by that name"):
        find_grader("m:f")


def test_plain_name_is_the_grader_itself():
    assert find_grader("integer") is grade_integer
    assert set(GRADERS) == {"exact", "gsm8k", "integer", "math", "question_only", "r1_zero"}


def test_sum_weighs_scores_and_shows_every_part():
    response = "x" * 185 + "</think> <answer>8</answer>"
    assert len(response) == 212
    assert find_grader("0.8*r1_zero.answer_reward + 0.2*r1_zero.format_reward - 0.1*length:424")(response, "7") == {
        "reward": pytest.approx(0.2 - 0.05),
        "format_reward": 1.0,
        "answer_reward": 0.0,
        "r1_zero.answer_reward": 0.0,
        "r1_zero.format_reward": 1.0,
        "length:424": 0.5,
    }


def test_sum_caps_the_length_and_takes_form_and_answer_from_the_first_grader():
    scores = find_grader("exact - 2*length:1 + 0.5*integer.format_reward")("7", "8")
    assert scores == {"reward": -1.5, "format_reward": 1.0, "answer_reward": 0.0, "exact.reward": 0.0, "length:1": 1.0,
                      "integer.format_reward": 1.0}  # fmt: skip


def test_sum_runs_each_grader_once():
    calls = []

    def count(response: str, answer: str) -> dict[str, float]:
        calls.append(response)
        return {"reward": 1.0, "style": 0.5}

    graders = {**GRADERS, "m:count": count}
    scores = find_grader("m:count + m:count.style - 0.25*m:count.style", graders)("a", "b")
    assert scores == {"reward": 1.375, "m:count.reward": 1.0, "m:count.style": 0.5}
    assert calls == ["a"]
    with pytest.raises(ValueError, match="found no score 'tone' of m:count, allowed: reward, style"):
        find_grader("m:count.tone", graders)("a", "b")


def test_nothing_heavy_is_loaded_before_it_is_used():
    code = (
        "import sys, actor.rewards as r; r.find_grader('integer')('7', '7'); r.find_grader('gsm8k')('7', '7');"
        "r.find_grader('r1_zero')('</think><answer>7</answer>', '7');"
        "print({'sympy', 'math_verify', 'reasoning_gym', 'numpy', 'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_command_line_tries_a_grader_on_a_text(tmp_path):
    (tmp_path / "my_graders.py").write_text("def short(response, answer):\n    return {'reward': len(response) / 10}\n")

    def run(*arguments: str, text: str = "") -> tuple[int, str, str]:
        command = [sys.executable, "-m", "actor.rewards", *arguments]
        done = subprocess.run(command, input=text, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    assert run("gsm8k", "--answer", "18", "It is $18.") == (0, "reward = 1\nformat_reward = 1\nanswer_reward = 1\n", "")
    assert run("my_graders:short", "--answer", "", text="seven") == (0, "reward = 0.5\n", "")
    status, out, error = run("gsm9k", "--answer", "18", "18")
    assert (status, out) == (2, "")
    assert error.startswith("grader: found 'gsm9k', allowed: exact, gsm8k")
