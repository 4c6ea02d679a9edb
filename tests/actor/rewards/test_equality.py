"""Equality of answers: text, numbers, mathematics."""

import re
from pathlib import Path

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
    ("(-\\infty,2)\\cup(3,5)", ["(3,5)\\cup(-\\infty,2)", "x \\in (-\\infty,2) \\cup (3,5)"]),
    ("[\\frac12,3)", ["[0.5,3)", "\\left[\\frac{1}{2}, 3\\right)", "x\\in[0.5,3)", "0.5 \\le x < 3"]),
    ("(\\frac12,3]", ["(0.5,3]", "3 \\geq x > 1/2"]),
    ("[0,\\infty)", ["[0,+\\infty)", "x \\ge 0"]),
    ("[0,+\\infty)", ["[0,\\infty)", "0 \\leqslant t"]),
    ("(-\\infty,-2)\\cup[3,\\infty)", ["(-\\infty, -2) \\cup [3, +\\infty)", "[3,\\infty)\\cup(-\\infty,-2)"]),
    ("[2,5)\\cup(7,9)", ["(7,9)\\cup[2,5)"]),
    ("-1<x<2", ["(-1,2)", "2>x>-1", "x\\in(-1,2)"]),
    ("x=1,y=2", ["y=2, x=1", "1,2", "x = 1 \\text{ and } y = 2.0"]),
    ("x=1, x=2", ["1,2", "2,1", "x=2,1", "\\{1,2\\}"]),
    ("(x,y)=(5,6)", ["(5,6)"]),
    ("(5,6)", ["(x,y) = (5,6)"]),
    ("1,2,2", ["2,1,2"]),
    ("1, 2, \\text{ and } 3", ["3,2,1", "\\{1,2,3\\}"]),
    ("\\{(1,2),(2,3)\\}", ["\\{(2,3),(1,2)\\}"]),
    ("2,-2", ["\\pm2", "\\pm 2", "x=\\pm2"]),
    ("\\pm2", ["2,-2", "-2, 2"]),
    ("\\frac{1\\pm\\sqrt5}{2}", ["\\frac{1-\\sqrt{5}}{2}, \\frac{1+\\sqrt{5}}{2}"]),
    ("\\frac13", ["0.\\overline{3}", "0.\\bar{3}", ".\\overline{3}", "0.3\\overline{3}"]),
    ("0.\\overline{09}", ["1/11"]),
    ("0.1\\overline{6}", ["\\frac16"]),
    ("\\frac{3\\pi}{2}", ["1\\frac12\\pi", "1\\frac{1}{2}\\pi", "1.5\\pi"]),
    ("\\text{5:30 PM}", ["5:30 PM", "5:30\\text{ PM}"]),
    ("5:30 PM", ["\\text{5:30 PM}"]),
    ("18", ["\\text{18}", "\\mathbf{18}", "\\text{18 cm}"]),
    ("3\\sqrt{2}\\text{ cm}", ["3\\sqrt{2}", "\\sqrt{18}\\text{ cm}", "3\\sqrt{2} cm", "3\\sqrt{2}\\mathrm{cm}"]),
    ("5\\sqrt{3}\\text{ cm}^2", ["5\\sqrt3\\text{ cm}^{2}"]),
    ("4.5\\text{ cm},3\\text{ cm}", ["3\\text{ cm}, 4.5\\text{ cm}", "4.5, 3"]),
    ("2\\pi r", ["2r\\pi"]),
    ("\\pi(R^2-r^2)", ["\\pi R^2-\\pi r^2"]),
    ("1011_2", ["1011_{2}", "1011"]),
    ("\\mathbb{R}\\setminus\\{0\\}", ["(-\\infty,0)\\cup(0,\\infty)"]),
    ("(1,2)", ["((1,2))"]),
    ("\\sqrt{2}\\text{ m}", ["\\sqrt{2}\\text{ meters}"]),
    ("3\\text{ inches}", ["3 in"]),
    ("\\log_2 3", ["\\log_{2}3"]),
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
    ("(5,6)", ["(y,x)=(5,6)", "(x,y)=(6,5)", "([5,6])", "((6,5))"]),
    ("[\\frac12,3)", ["(0.5,3)", "[0.5,3]", "(0.5,3]", "[0.5,4)", "]0.5,3[", "0.5 < x < 3", "[0.5,3)\\cup(4,5)"]),
    ("[2,5)\\cup(7,9)", ["[2,5]\\cup(7,9)", "(7,9)\\cup[2,5]", "(2,5)\\cup[7,9)", "[2,5)\\cup(9,7)",
                           "[2,5),(7,9)", "[2,5)"]),
    ("(1,2)\\cup(3,4)", ["(2,1)\\cup(3,4)", "(1,2),(3,4)", "(1,2)\\cup(1,2)"]),
    ("(-\\infty,-2)\\cup[3,\\infty)", ["(-\\infty,-2]\\cup[3,\\infty)", "(-\\infty,-2)\\cup(3,\\infty)"]),
    ("(-1,2)", ["-1<x<2"]),
    ("-1<x<2", ["-1<y<2", "-1\\le x<2", "[-1,2)", "-1<x", "-1>x>2", "(-1,3)"]),
    ("[0,\\infty)", ["x > 0", "x \\le 0", "(0,\\infty)", "[0,-\\infty)"]),
    ("x=1,y=2", ["2,1", "x=2,y=1", "x=1,z=2", "x=1,2", "a=1,b=2"]),
    ("a=1,b=2,c=3", ["3,2,1", "1,2"]),
    ("1,2", ["1,2,2", "1,1", "1", "1,2,", "1,,2", "3,4", "y=2,x=1", "1 \\text{ or } 2", "(1,2)", "1\\cup2"]),
    ("1,2,2", ["1,2", "1,1,2", "\\{1,2\\}"]),
    ("2,-2", ["\\pm3", "2", "\\mp\\pm2", "\\pm2,1"]),
    ("2", ["\\pm2", "2,-2"]),
    ("3\\sqrt{2}\\text{ cm}", ["3\\sqrt{2}\\text{ m}", "3\\sqrt{2} m", "3\\sqrt{2} km", "3\\sqrt{2}\\text{ cm}^2",
                             "3\\sqrt{2}\\text{ million}", "3\\sqrt{2}\\text{ cm or so}"]),
    ("\\sqrt{2}", ["\\sqrt{2}m", "\\sqrt{2} d", "\\sqrt{2} ab"]),
    ("2\\pi r", ["2\\pi R", "2\\pi", "2\\pi s"]),
    ("\\pi(R^2-r^2)", ["0", "\\pi(r^2-R^2)"]),
    ("1011_2", ["1011_3", "1010_2", "11"]),
    ("\\sqrt{25}", ["2 3"]),
    ("A^T", ["A"]),
    ("\\mathbb{R}\\setminus\\{0\\}", ["(-\\infty,0]\\cup(0,\\infty)", "(-\\infty,1)\\cup(1,\\infty)"]),
    ("0.\\overline{3}", ["0.3", "0.33", "0.\\overline{33}4", "0.\\overline{34}"]),
    ("\\frac{\\pi}{2}", ["1\\frac12\\pi"]),
    ("\\text{5:30 PM}", ["5:30 AM", "4:30 PM"]),
    ("18", ["\\text{18 or 19}", "\\text{19}", "\\text{about} 18", "18 ab"]),
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


def test_tables_of_the_document_hold():
    document = (Path(__file__).resolve().parents[3] / "docs" / "graders.md").read_text("utf-8")
    rows = re.findall(r"^   \| `([^`]+)` \| (.+) \| (.+) \|$", document, re.MULTILINE)
    assert len(rows) == 14
    for reference, equal, different in rows:
        for found in re.findall("`([^`]+)`", equal):
            assert answers_equal(found, reference), (found, reference)
        for found in re.findall("`([^`]+)`", different.partition(", since")[0]):
            assert not answers_equal(found, reference), (found, reference)


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
