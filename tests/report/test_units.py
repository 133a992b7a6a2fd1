"""Numbers as people read them."""

from __future__ import annotations

import pytest

from fedsplit.report.units import (
    factor_less,
    human_bytes,
    human_seconds,
    interval,
    percent,
    percent_of,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (605_000, "605 kB"), (999_600, "1.00 MB"),
     (1_180_000, "1.18 MB"), (12_345_678, "12.3 MB"), (5e15, "5000 TB")],
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.00 s"), (3.14, "3.1 s"), (52.4, "52 s"), (119.6, "2 min 00 s"), (245, "4 min 05 s"),
     (7620, "2 h 07 min")],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "reference", "text"),
    [(10, 35, "3.5x less"), (10, 1000, "100x less"), (23, 10, "2.3x more"), (100, 101, "about the same"),
     (0, 10, "not comparable")],
)  # fmt: skip
def test_factor(count: float, reference: float, text: str) -> None:
    assert factor_less(count, reference) == text


def test_percent_of_nothing_is_a_dash() -> None:
    assert percent(None) == "-"


def test_an_accuracy_has_its_interval() -> None:
    """Wilson's interval, as scipy's binomtest gives it."""
    from scipy.stats import binomtest

    for right, n in ((0, 5), (5, 18), (18, 18), (980, 1000)):
        known = binomtest(right, n).proportion_ci(method="wilson")
        assert interval(right / n, n) == pytest.approx((known.low, known.high), abs=1e-4)
    for n in range(1, 300):
        assert interval(0.0, n)[0] == 0.0
        assert interval(1.0, n)[1] == 1.0
    assert percent_of(5 / 18, 18) == "27.8 % (12-51)"
    assert percent_of(0.5, 0) == "50.0 %"
    assert percent_of(None, 10) == "-"
