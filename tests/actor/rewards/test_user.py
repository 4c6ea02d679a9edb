"""User functions: imported for the one who starts an actor, never for a ticket."""

import re
import sys
from pathlib import Path

import pytest

from actor.grading import GraderPool, check_user_functions
from actor.rewards import load_user_functions

PATIENT_S = 60.0
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "graders.md"
MODULE = """
import pathlib
pathlib.Path(__file__).with_suffix(".imported").touch()
def style(response, answer):
    return {"reward": float(response == answer), "style": 0.5}
def broken(response, answer):
    raise KeyError("no such thing")
constant = 3
"""


@pytest.fixture
def directory(tmp_path):
    """A user's directory, whose module names are of this test alone."""
    (tmp_path / "users_graders.py").write_text(MODULE)
    (tmp_path / "users_evil.py").write_text("import pathlib; pathlib.Path(__file__).with_suffix('.imported').touch()")
    (tmp_path / "users_broken.py").write_text("import no_such_module_anywhere")
    (tmp_path / "users_exit.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "actor.py").write_text("raise RuntimeError('taken for the package')")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("users_")]:
        del sys.modules[name]
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


async def test_pool_grades_with_allowed_user_functions_and_imports_no_other(directory):
    functions = ("users_graders:style", "users_graders:broken")
    async with GraderPool(1, PATIENT_S, user_functions=functions, user_path=str(directory)) as pool:
        assert await pool.grade("users_graders:style", "a", "a") == ({"reward": 1.0, "style": 0.5}, "")
        scores, error = await pool.grade("2*users_graders:style.style + exact", "a", "b")
        assert (scores["reward"], error) == (1.0, "")
        assert (await pool.grade("users_graders:broken", "a", "a"))[1] == "KeyError: 'no such thing'"
        for name in ("users_evil:f", "users_graders:constant", "os:system", "users_graders.style", "subprocess:run"):
            scores, error = await pool.grade(name, "true", "")
            assert scores == {"reward": 0.0}
            assert error.startswith(f"ValueError: grader: found {name.partition('.')[0]!r}, allowed: "), error
    assert (directory / "users_graders.imported").exists()
    assert not (directory / "users_evil.imported").exists()


async def test_pool_without_user_functions_imports_none(directory, monkeypatch):
    monkeypatch.chdir(directory)
    async with GraderPool(1, PATIENT_S) as pool:
        assert (await pool.grade("users_graders:style", "a", "a"))[1].endswith("was given to this actor by that name")
    assert not (directory / "users_graders.imported").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "users_broken:f",
            "found 'users_broken:f', but importing users_broken .* ModuleNotFoundError: No module named 'no_s",
        ),
        ("users_exit:f", "found 'users_exit:f', but importing users_exit .* SystemExit: 3"),
        ("users_missing:f", "found 'users_missing:f', but importing users_missing .* ModuleNotFoundError"),
        ("users_graders:other", "has no function 'other'; allowed: broken, style"),
        ("users_graders:constant", "has no function 'constant'"),
        ("users_graders", "found 'users_graders', allowed: module:function"),
    ],
)
async def test_fault_of_a_user_function_is_said_at_the_start(directory, function, message):
    with pytest.raises(ValueError, match=message):
        async with GraderPool(2, PATIENT_S, user_functions=("users_graders:style", function), user_path=str(directory)):
            pass
    with pytest.raises(ValueError, match=message):
        check_user_functions([function], str(directory))
    with pytest.raises(ValueError, match=message):
        load_user_functions([function], str(directory))


def test_sound_user_function_passes_the_check(directory):
    check_user_functions(["users_graders:style"], str(directory))


async def test_complete_example_of_the_document_grades_as_it_says(tmp_path):
    section = DOCUMENT.read_text("utf-8").partition("## A function of your own")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (named,) = re.findall(r"file,\n`(\w+)\.py`:", section)
    functions = set(re.findall(rf"{named}:\w+", section))
    assert functions == {"my_graders:short_and_right"}
    # Under a name of this test alone: the grading process would take an installed my_graders first.
    (tmp_path / "users_example.py").write_text(code, "utf-8")
    function = "users_example:short_and_right"
    check_user_functions([function], str(tmp_path))
    async with GraderPool(1, PATIENT_S, user_functions=[function], user_path=str(tmp_path)) as pool:
        expected = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}
        assert await pool.grade(function, "I think.\n 7 ", "7") == (expected, "")
        expected = {"reward": 0.5, "format_reward": 0.0, "answer_reward": 1.0}
        assert await pool.grade(function, "I think. " * 30 + "\n7", "7") == (expected, "")
        expected = {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}
        assert await pool.grade(function, "", "7") == (expected, "")
        scores, error = await pool.grade(f"{function}.answer_reward - 0.1*length:500", "7" * 50, "7" * 50)
        assert (scores["reward"], error) == (pytest.approx(0.99), "")
