"""Taking answers apart: brackets, separators, inequalities."""

import pytest

from actor.rewards.shapes import MAX_DEPTH, Shape, is_balanced, read_inequality, take_apart


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("\\frac{1}{2}", Shape("", "", ("\\frac{1}{2}",))),
        ("f(1,2)", Shape("", "", ("f(1,2)",))),
        ("(x+1)(y,2)", Shape("", "", ("(x+1)(y,2)",))),
        ("\\begin{pmatrix}1,2\\end{pmatrix}", Shape("", "", ("\\begin{pmatrix}1,2\\end{pmatrix}",))),
        ("\\langle 1,2\\rangle", Shape("", "", ("\\langle 1,2\\rangle",))),
        ("y = 2x", Shape("", "", ("y = 2x",))),
        ("1, (2,3); 4", Shape(",", "", ("1", "(2,3)", "4"))),
        ("1, 2, \\text{ and } 3", Shape(",", "", ("1", "2", "3"))),
        ("1,,2", Shape(",", "", ("1", "", "2"))),
        ("x = \\pm 2", Shape(",", "", ("x = +2", "x = -2"))),
        ("\\pm a \\pm b", Shape("", "", ("\\pm a \\pm b",))),
        ("\\{1, \\{2,3\\}\\}", Shape(",", "", ("1", "\\{2,3\\}"))),
        ("\\{\\sqrt{2}\\}", Shape("", "", ("\\sqrt{2}",))),
        ("[1,2)", Shape("[)", "", ("1", "2"))),
        ("((1,2))", Shape("()", "", ("1", "2"))),
        ("x \\in (-\\infty, 2]", Shape("(]", "x", ("-\\infty", "2"))),
        ("(x, y) = (1,2)", Shape("()", "(x,y)", ("1", "2"))),
        ("[2,5)\\cup(7,9)", Shape("∪", "", ("[2,5)", "(7,9)"))),
    ],
)
def test_answer_is_taken_apart(text, shape):
    assert take_apart(text) == shape


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("-1 < x \\le 2", Shape("(]", "x", ("-1", "2"))),
        ("2 \\geq x > -1", Shape("(]", "x", ("-1", "2"))),
        ("1<x_1<2", Shape("<>", "x_1", ("1", "2"))),
        ("x > \\frac{\\pi}{2}", Shape("()", "x", ("\\frac{\\pi}{2}", "\\infty"))),
        ("3 \\geqslant \\theta", Shape("(]", "\\theta", ("-\\infty", "3"))),
        ("x", None),
        ("x = 2", None),
        ("x \\ne 2", None),
        ("1 < x > 2", None),
        ("2x > 4", None),
        ("x > y", None),
        ("x > 1, 2", None),
    ],
)
def test_inequality_of_one_symbol_is_an_interval(text, shape):
    assert read_inequality(text) == shape


def test_brackets_of_all_kinds_match_in_number():
    deepest = "(" * MAX_DEPTH + ")" * MAX_DEPTH
    assert all(map(is_balanced, ("", "[1,2)", "(1,2]", "\\{1\\}", "\\begin{a}\\end{a}", deepest)))
    assert not any(map(is_balanced, ("(", ")", "]1,2[", "\\{1", "\\begin{a}", f"({deepest})")))
