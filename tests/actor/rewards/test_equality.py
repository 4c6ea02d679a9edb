"""Equality of answers: text, numbers, mathematics."""

import pytest

from actor.rewards.equality import answers_equal, read_reference

EQUAL = [
    ("\\sqrt{2}", ["\\sqrt2", "\\sqrt{2}", "\\frac{2}{\\sqrt{2}}", "2^{1/2}", "x=\\sqrt2", "$\\sqrt{2}$"]),
    ("(1,2)", ["(1, 2)", "\\left(1,2\\right)", "(1.0,2)"]),
    ("1,2", ["2,1", "1, 2", "1 and 2"]),
    ("x^2+2x+1", ["(x+1)^2", "1+2x+x^2", "y=(x+1)^2"]),
    ("\\text{Evelyn}", ["Evelyn", "evelyn"]),
    ("\\text{(B)}", ["B", "(B)", "\\text{B}"]),
    ("2^{10}", ["1024"]),
    ("1024", ["1024", "1,024", "1024.0"]),
    ("(-\\infty,2)\\cup(3,5)", ["(3,5)\\cup(-\\infty,2)"]),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", ["\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"]),
    ("10,000", ["10000", "10{,}000", "$10,000"]),
    ("5\\text{ cm}", ["5", "5 cm", "5\\,\\text{cm}"]),
]
DIFFERENT = [
    ("7", ["", "8", "3+4", "\\sqrt{49}", "7, 8", "7 or 8", "6 \\text{ or } 7", "\\pm 7", "|-7|", "7i", "7x", "7\x00",
           "nan",
           "9^{9^{9}}", "9**9**9", "6=7", "7=7", "1e400", "\\frac{7}{0}", "7.0000000001"]),
    ("\\sqrt{2}", ["\\sqrt{2} or \\sqrt{3}", "\\pm\\sqrt{2}", "\\sqrt{2}, \\sqrt{3}", "1=\\sqrt2", "-\\sqrt2=\\sqrt2",
                   "1.41421356", "9^{9^{9}}", "9**9**9", "nan", "\\frac{0}{0}", "}{", "\\sqrt{" * 50, "\\sqrt{2}\x00",
                   "\\sqrt{2}\ud800", "{" * 200, "(" * 200 + ")" * 200, "\\infty", "2^{99999999}", "99999!"]),
    ("(1,2)", ["(2,1)", "[1,2]", "1,2", "\\{1,2\\}", "(1,2,3)", "(1,2),(3,4)"]),
    ("(5,2)", ["(3,1)"]),
    ("\\{1,2\\}", ["\\{1,2,3\\}", "1", "2"]),
    ("\\text{Evelyn}", ["nyleve", "Evelyn or Bob", "E v e l y n"]),
    ("B", ["A", "AB", "A, B"]),
    ("\\pi", ["3.14", "3.14159265", "\\pi \\text{ or } 2"]),
    ("\\infty", ["-\\infty", "inf"]),
    ("0.5", ["50%", "0,5"]),
    ("x^2", ["x^2 or x", "x", "y^2", "x^2\\%"]),
    ("5\\text{ cm}", ["5\\text{ m}", "5 m"]),
    ("nan", ["1", "0/0"]),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "found"), [(ref, text) for ref, texts in EQUAL for text in texts])
def test_equal_answers(reference, found):
    assert answers_equal(found, reference)


@pytest.mark.parametrize(("reference", "found"), [(ref, text) for ref, texts in DIFFERENT for text in texts])
def test_different_answers(reference, found):
    assert not answers_equal(found, reference)


def test_long_answers_are_compared_as_text_alone():
    long = "x + " * 10**5 + "1"
    assert answers_equal(long, long)
    assert not answers_equal(long, "1" + " + x" * 10**5)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [(" 7\n", "7"), ("reasoning\n#### 1,234", "1,234"), ("so \\boxed{6}, no: \\boxed{\\frac12}", "\\frac12"),
     ("\\boxed{7", "\\boxed{7")],
)  # fmt: skip
def test_reference_is_the_final_answer(answer, reference):
    assert read_reference(answer) == reference
