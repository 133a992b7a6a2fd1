"""Intervals and tests for counts, against SciPy's and published values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedsplit.core.intervals import binomial_tail, mcnemar, paired_difference, upper_share, wilson


@given(st.integers(1, 400), st.data())
def test_as_scipy_has_them(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    test = stats.binomtest(k, n)
    found = wilson(k / n, n)
    known = test.proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((known.low, known.high), abs=1e-9)
    assert found[0] <= k / n <= found[1]
    one_sided = stats.binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact")
    assert upper_share(k, n, 0.05) == pytest.approx(one_sided.high, abs=1e-6)
    share = data.draw(st.floats(0, 1))
    assert binomial_tail(k, n, share) == pytest.approx(stats.binom.cdf(k, n, share), abs=1e-9)
    few = data.draw(st.integers(0, n))
    assert mcnemar(few, n - few) == pytest.approx(stats.binomtest(few, n).pvalue, abs=1e-9)


def test_newcombes_interval() -> None:
    # One of the tables in the paper (Statistics in Medicine 17, 1998).
    assert paired_difference(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-4)


@given(*[st.integers(0, 60)] * 4)
def test_an_interval_holds_the_difference_and_turns_with_it(a: int, b: int, c: int, d: int) -> None:
    if n := a + b + c + d:
        low, high = paired_difference(a, b, c, d)
        assert -1 <= low <= (b - c) / n <= high <= 1
        assert paired_difference(a, c, b, d) == pytest.approx((-high, -low))


def test_no_sample_differs() -> None:
    assert mcnemar(0, 0) == 1.0
    low, high = paired_difference(50, 0, 0, 50)
    assert low < 0 < high
    assert low == pytest.approx(-high)
