"""Reading a text that is one number as a whole."""

from fractions import Fraction

import pytest

from actor.rewards.numerals import read_quantity


@pytest.mark.parametrize(
    ("text", "value", "unit", "name"),
    [
        ("1,000", "1000", "", ""),
        ("$18", "18", "$", ""),
        ("\\$1,000.50", "1000.5", "$", ""),
        ("18.00", "18", "", ""),
        (".5", "1/2", "", ""),
        ("0.\\overline{3}", "1/3", "", ""),
        ("-1.2\\bar{09}", "-133/110", "", ""),
        ("\\text{18 cm}", "18", "cm", ""),
        ("50%", "50", "%", ""),
        ("50 percent", "50", "%", ""),
        ("3/4", "3/4", "", ""),
        ("-\\frac{3}{4}", "-3/4", "", ""),
        ("\\frac{-3}{4}", "-3/4", "", ""),
        ("\\dfrac34", "3/4", "", ""),
        ("3 1/2", "7/2", "", ""),
        ("-3\\frac{1}{2}", "-7/2", "", ""),
        ("x=5", "5", "", "x"),
        ("$x_1 = 5$", "5", "", "x_1"),
        ("f(x) = 5", "5", "", "f(x)"),
        ("3 \\times 10^8", "300000000", "", ""),
        ("5 \\cdot 10^{-2}", "1/20", "", ""),
        ("18 dollars", "18", "$", ""),
        ("$18 per hour", "18", "$", ""),
        ("18\\text{ cm}^2", "18", "cm2", ""),
        ("18 cm²", "18", "cm2", ""),
        ("120^\\circ", "120", "°", ""),
        ("60 miles/hour", "60", "mile hour", ""),
        ("The answer is: $18$.", "18", "", ""),
        ("3 + 4 = 7", "7", "", ""),
        ("the 7th", None, "", ""),
        ("7th", "7", "", ""),
        ("9" * 200, "9" * 200, "", ""),
    ],
)
def test_quantity_has_value_unit_and_name(text, value, unit, name):
    quantity = read_quantity(text)
    if value is None:
        assert quantity is None
        return
    assert quantity is not None
    assert (quantity.value, quantity.unit, quantity.name) == (Fraction(value), unit, name)


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "18 or 19", "18, 19", "1,2", "1 000", "18x", "18 x", "18i", "18\\pi", "18 million", "--18", "+-18",
     "1/0",
     "9**9", "10^3", "2²", "½", "٧", "１８", "nan", "inf", "1e5", "18!", "18?", "18..", "x - 18", "x != 18",
     "x \\ne 18", "not 18",
     "17 = 18", "x = 1, y = 18", "18:00", "18\x00", "18\ud800", "9" * 201, "1" * 10**6, "(1, 18)", "\\{18\\}",
     "3 \\times 10^{999}",
     "18\\text{ or }19", "18 is wrong", "18 R 2", "\\frac{1}{0}", "\\frac{18}{", "$18%"],
)  # fmt: skip
def test_quantity_is_not_read_from_anything_else(text):
    assert read_quantity(text) is None


def test_quantities_agree_in_value_and_in_what_both_say():
    def agree(one: str, other: str) -> bool:
        return read_quantity(one).agrees_with(read_quantity(other))

    assert agree("18", "18 cm")
    assert agree("18 dollars", "$18.00")
    assert agree("x = 18", "18")
    assert not agree("18 m", "18 cm") if read_quantity("18 m") else True
    assert not agree("18 miles", "18 km")
    assert not agree("x = 18", "y = 18")
    assert not agree("50%", "0.5")
