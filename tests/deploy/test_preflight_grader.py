"""The preflight's check of `task.grader`: what is wrong is said before anything starts, with the key."""

import pytest

from deploy.preflight import check_task_grader
from protocol.errors import RecipeError


@pytest.mark.parametrize("spec", ["integer", "0.8*r1_zero.answer_reward + 0.2*r1_zero.format_reward - 0.1*length:2000"])
def test_sound_spec_passes(spec):
    check_task_grader(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("intger", r"^task\.grader: found 'intger', allowed: exact, gsm8k, integer"),
        ("integer.form", r"^task\.grader: found the score 'form' of integer, allowed: answer_reward"),
        ("integer +", r"^task\.grader: found 'integer \+'.*, allowed: a grader, or a weighted sum"),
        (
            "no_such_users_module:f",
            r"^task\.grader: found 'no_such_users_module:f', but importing .*ModuleNotFoundError",
        ),
        ("json:f", r"^task\.grader: found 'json:f', but json .* has no function 'f'; allowed: "),
        ("reasoning_gym:chain_sums", r"^task\.grader: found the task 'chain_sums' .*such as chain_sum"),
    ],
)
def test_fault_is_said_with_the_key(spec, message):
    with pytest.raises(RecipeError, match=message):
        check_task_grader(spec)


def test_user_function_of_the_working_directory_passes(tmp_path, monkeypatch):
    (tmp_path / "users_preflight_grader.py").write_text("def f(response, answer):\n    return {'reward': 1.0}\n")
    monkeypatch.chdir(tmp_path)
    check_task_grader("0.5*users_preflight_grader:f - 0.1*length:10")
