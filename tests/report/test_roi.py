"""Return on investment: the formulas by hand, bounds that nothing leaves, and costs files of all kinds."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.core.errors import ConfigError, FedsplitError
from fedsplit.report import roi
from fedsplit.report.costs import UNITS, Costs, template
from fedsplit.report.roi import Quantity, Return

FILE = """
format = 1
currency = "JPY"
good-classes = ["ok"]
seconds-a-part = { value = 9, low = 6, high = 12, source = "own", note = "time study" }
parts-a-month = { value = 40000, low = 30000, high = 50000, source = "own" }
[reinspected-share]
value = 0.2
low = 0.1
high = 0.3
source = "assumed"
"""
MONEY = """
[hour-cost]
value = 3000
source = "own"
[machine-cost]
value = 100000
source = "own"
[machines]
value = 3
source = "own"
"""


def read(tmp_path: Path, text: str) -> Costs:
    path = tmp_path / "costs.toml"
    path.write_text(text, encoding="utf-8")
    return Costs.read(path)


def found(tmp_path: Path, text: str, measured: list[Quantity] | None = None) -> Return:
    return roi.returns(roi.quantities(read(tmp_path, text), measured or []))


def test_the_two_figures_by_hand(tmp_path: Path) -> None:
    got = found(tmp_path, FILE + MONEY)
    assert got.figures["hours-today"].value == pytest.approx(100)
    index = got.figures["index"]
    assert (index.value, index.low, index.high) == pytest.approx((0.8, 0.7, 0.9))
    assert index.assumed
    payback = got.figures["payback"]
    # 300,000 once; 80 hours of 3,000 a month.
    assert payback.value == pytest.approx(300_000 / 240_000)
    assert payback.high == pytest.approx(300_000 / (3000 * 30_000 * 6 / 3600 * 0.7))
    assert not got.figures["hours-today"].assumed
    assert not got.figures["once"].assumed
    assert set(got.not_counted) >= {"alarms", "upkeep", "escapes", "energy"}


def test_without_money_there_are_hours_and_no_money(tmp_path: Path) -> None:
    got = found(tmp_path, FILE)
    assert "index" in got.figures
    assert not {"net", "once", "payback"} & set(got.figures)
    assert "hour-cost" in got.missing["payback"]
    empty = found(tmp_path, "")
    assert not empty.figures
    assert empty.missing["index"] == ("seconds-a-part", "parts-a-month", "reinspected-share")


def test_every_figure_stays_within_its_bounds(tmp_path: Path) -> None:
    """Whatever the values are between their own bounds; all keys at once."""
    chance = random.Random(4)
    known = {}
    for key in [*UNITS, "run-gigabytes", "run-device-hours"]:
        share = UNITS.get(key) == "share"
        low, middle, high = sorted(chance.uniform(0.001, 0.4 if share else 50) for _ in range(3))
        known[key] = Quantity(key, middle, low, high, source="own")
    whole = roi.returns(known)
    assert not whole.missing
    assert not whole.not_counted
    for _ in range(200):
        here = {}
        for key, one in known.items():
            value = chance.choice([one.low, one.high, chance.uniform(one.low, one.high)])
            here[key] = Quantity(key, value, value, value, source="own")
        for key, figure in roi.returns(here).figures.items():
            bounds = whole.figures[key]
            margin = 1e-9 * max(1.0, abs(figure.value)) if math.isfinite(figure.value) else 0.0
            assert bounds.low - margin <= figure.value <= bounds.high + margin, key


def test_what_costs_more_than_it_gains_is_never_paid_back(tmp_path: Path) -> None:
    got = found(
        tmp_path, FILE + MONEY + '[upkeep-hours-a-month]\nvalue=500\nlow=10\nhigh=600\nsource="own"'
    )
    assert got.figures["hours-saved"].value < 0
    assert math.isinf(got.figures["payback"].value)
    assert math.isfinite(got.figures["payback"].low)


def test_the_file_overrules_what_a_run_measured_and_says_so(tmp_path: Path) -> None:
    text = FILE + '[false-alarm-rate]\nvalue=0.5\nsource="assumed"'
    known = roi.quantities(read(tmp_path, text), [roi.rate("false-alarm-rate", 3, 100, "r1")])
    one = known["false-alarm-rate"]
    assert (one.value, one.source, one.measured) == (0.5, "assumed", 0.03)
    assert known["seconds-a-part"].line == 5
    assert known["reinspected-share"].line == 7
    measured = roi.quantities(read(tmp_path, FILE), [roi.rate("false-alarm-rate", 3, 100, "r1")])
    low, high = measured["false-alarm-rate"].low, measured["false-alarm-rate"].high
    assert 0.01 < low < 0.03 < high < 0.09


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seconds-a-part = 9", 'source = "own"'),
        ("seconds-a-part = { value = 9 }", "source is missing"),
        ("secondsapart = { value = 9, source = 'own' }", "did you mean 'seconds-a-part'"),
        ("defect-rate = { value = 3, source = 'own' }", "3 % is 0.03"),
        ("hour-cost = { value = 3, low = 4, high = 5, source = 'own' }", "not in order"),
        ("hour-cost = { value = -3, source = 'own' }", "greater than or equal to 0"),
        ("hour-cost = { value = nan, source = 'own' }", "finite"),
        ("hour-cost = { value = 1, source = 'guess' }", "'own' or 'assumed'"),
        ("parts-a-month = { value = 0, source = 'own' }", "more than 0"),
        ("# x = ,\nhour-cost = { value = 3, low = , source = 'own' }", "line 2, has an empty place"),
        ("hour-cost = { value = 3", "is not TOML"),
        ("currency = 5", "currency"),
    ],
)  # fmt: skip
def test_bad_costs(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as told:
        read(tmp_path, text)
    assert said in str(told.value)


def test_all_faults_at_once_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        read(tmp_path, "hour-cost = 1\nx = 2\ndefect-rate = { value = 2, source = 'own' }")
    assert str(told.value).count("\n  - ") == 3
    with pytest.raises(ConfigError, match="cannot be read"):
        Costs.read(tmp_path / "none.toml")


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_the_template_is_a_costs_file_without_a_value(tmp_path: Path, lang: str) -> None:
    text = template(lang)
    assert not read(tmp_path, text).values
    filled = text
    for key in UNITS:
        assert f"# {key} = " in text
        filled = filled.replace(
            f'# {key} = {{ value = , low = , high = , source = "" }}',
            f'{key} = {{ value = 0.5, low = 0.2, high = 0.7, source = "own" }}',
        )
    got = read(tmp_path, filled)
    assert set(got.values) == set(UNITS)
    assert len(set(got.lines.values())) == len(UNITS)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    try:
        Costs.read(path)
    except FedsplitError:
        return
