"""K of a width, against decimal arithmetic."""

from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_qsparse.ops.counts import keep_count


@pytest.mark.parametrize(
    ("keep", "width", "expected"),
    [
        (0.7, 10, 7), (0.35, 10, 4), (0.45, 10, 5), (0.25, 10, 3), (0.05, 10, 1), (0.0001, 10, 1), (1.0, 10, 10), (1, 10, 10),
        (0.4, 32, 13), (0.4, 256, 102), (0.4, 88, 35), (0.5, 32, 16), (0.5, 1, 1), (1e-5, 300_000, 3), (Fraction(1, 3), 9, 3),
        # The float product is 0.29 * 50 = 14.499999999999998, and Python's round would take 0.5 * 5 = 2.5 to 2.
        (0.29, 50, 15), (0.5, 5, 3),
    ],
)  # fmt: skip
def test_known_values(keep, width, expected):
    assert keep_count(keep, width) == expected


@given(thousandths=st.integers(1, 1000), width=st.integers(1, 200_000))
def test_is_the_decimal_product_rounded_half_up(thousandths, width):
    exact = (Decimal(thousandths) / 1000 * width).to_integral_value(ROUND_HALF_UP)
    assert keep_count(thousandths / 1000, width) == max(1, int(exact))


@given(numerator=st.integers(1, 64), rest=st.integers(0, 64), width=st.integers(1, 10_000))
def test_accepts_exact_fractions(numerator, rest, width):
    keep = Fraction(numerator, numerator + rest)
    k = keep_count(keep, width)
    assert k == 1 or abs(k - keep * width) <= Fraction(1, 2)
    assert 1 <= k <= width


@pytest.mark.parametrize(("keep", "width"), [(0, 8), (-0.1, 8), (1.01, 8), (float("nan"), 8), (float("inf"), 8), (0.5, 0), (0.5, -1)])
def test_refuses_what_lies_outside(keep, width):
    with pytest.raises(ValueError):
        keep_count(keep, width)
