"""Return on investment: the share of work hours saved, the payback time, and how far each may lie off.

The share is the index of labour saving (省力化指数) of Japan's subsidy for small firms: (hours today - hours that
remain) / hours today. The payback time is what is paid once over what a month gains. Formulas are sums of terms; a term
whose values are not all known is left out and told as such. No money value is built in.

Every figure has bounds: its least and its greatest value while each value lies anywhere between its own bounds. Each
formula is linear, or a ratio of two linear ones, in every single value, so its extremes lie at corners. Most values make
things worse (or better) whatever the others are; only the rest needs trying out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedsplit.report.costs import Costs
from fedsplit.report.units import interval

Known = Mapping[str, float]
Formula = Callable[[Known], float]

WORSE = (
    "reinspected-share", "false-alarm-rate", "false-alarm-minutes", "false-alarm-rejected-share", "escape-rate",
    "upkeep-hours-a-month", "gigabyte-cost", "kwh-cost", "runs-a-month", "machine-watts", "machine-hours-a-month",
    "machines", "machine-cost", "engineer-days", "engineer-day-cost", "other-cost-once", "run-gigabytes",
    "run-device-hours",
)  # fmt: skip
"""The more of it, the less is saved or gained, or the more is paid, whatever the other values are."""
BETTER = ("escape-rate-today", "false-reject-rate-today")


@dataclass(frozen=True)
class Quantity:
    """A value that goes into the figures, and where it comes from."""

    key: str
    value: float
    low: float
    high: float
    source: Literal["own", "assumed", "measured"]
    line: int = 0
    """Of the costs file."""
    run: str = ""
    """The run that it was measured in."""
    ranged: bool = True
    """Were bounds stated or measured?"""
    note: str = ""
    measured: float | None = None
    """What a run measured, where the costs file says another value, which counts."""


@dataclass(frozen=True)
class Term:
    """A part of a sum, such as the hours that false alarms take."""

    key: str
    needs: tuple[str, ...]
    formula: Formula


@dataclass(frozen=True)
class Figure:
    """A result with its bounds. A payback time of infinity: it is never paid back."""

    key: str
    value: float
    low: float
    high: float
    uses: tuple[str, ...]
    """Keys of the quantities that it rests on."""
    assumed: bool
    """Does any of them rest on an assumption?"""


@dataclass(frozen=True)
class Swing:
    """A figure with one value at its low and at its high bound, the others as they are."""

    key: str
    at_low: float
    at_high: float


@dataclass(frozen=True)
class Return:
    """All figures that can be had, what is missing for the others, and what was not counted."""

    quantities: dict[str, Quantity]
    figures: dict[str, Figure]
    missing: dict[str, tuple[str, ...]]
    """Figure -> keys of the values that it still needs."""
    not_counted: dict[str, tuple[str, ...]]
    """Term that a figure was made without -> keys of the values that it needs."""
    swings: dict[str, tuple[Swing, ...]]
    """Of `index` and `payback`, the widest first."""


def _alarms(v: Known) -> float:
    return v["parts-a-month"] * (1 - v["defect-rate"]) * v["false-alarm-rate"]


_PARTS = ("parts-a-month", "defect-rate")
_TODAY = Term(
    "hours-today",
    ("seconds-a-part", "parts-a-month"),
    lambda v: v["parts-a-month"] * v["seconds-a-part"] / 3600,
)
_HOURS = (
    Term(
        "reinspection", (*_TODAY.needs, "reinspected-share"),
        lambda v: v["reinspected-share"] * _TODAY.formula(v),
    ),
    Term(
        "alarms", (*_PARTS, "false-alarm-rate", "false-alarm-minutes"),
        lambda v: _alarms(v) * v["false-alarm-minutes"] / 60,
    ),
    Term("upkeep", ("upkeep-hours-a-month",), lambda v: v["upkeep-hours-a-month"]),
)  # fmt: skip
"""Hours a month that remain, or that the module brings."""
_GAINS = (
    Term(
        "escapes", (*_PARTS, "escape-rate-today", "escape-rate", "escape-cost"),
        lambda v: v["parts-a-month"] * v["defect-rate"] * (v["escape-rate-today"] - v["escape-rate"]) * v["escape-cost"],
    ),
    Term(
        "rejects",
        (*_PARTS, "false-reject-rate-today", "false-alarm-rate", "false-alarm-rejected-share", "false-reject-cost"),
        lambda v: v["false-reject-cost"] * (
            v["parts-a-month"] * (1 - v["defect-rate"]) * v["false-reject-rate-today"]
            - _alarms(v) * v["false-alarm-rejected-share"]
        ),
    ),
    Term(
        "traffic", ("runs-a-month", "run-gigabytes", "gigabyte-cost"),
        lambda v: -v["runs-a-month"] * v["run-gigabytes"] * v["gigabyte-cost"],
    ),
    Term(
        "energy",
        ("machines", "machine-watts", "machine-hours-a-month", "runs-a-month", "run-device-hours", "kwh-cost"),
        lambda v: -v["kwh-cost"] * v["machine-watts"] / 1000
        * (v["machines"] * v["machine-hours-a-month"] + v["runs-a-month"] * v["run-device-hours"]),
    ),
)  # fmt: skip
"""Money a month beside the hours; below 0 where it is paid."""
_ONCE = (
    Term("machines-bought", ("machines", "machine-cost"), lambda v: v["machines"] * v["machine-cost"]),
    Term(
        "engineers", ("engineer-days", "engineer-day-cost"),
        lambda v: v["engineer-days"] * v["engineer-day-cost"],
    ),
    Term("other-once", ("other-cost-once",), lambda v: v["other-cost-once"]),
)  # fmt: skip
_NEEDS_HOURS = (*_TODAY.needs, "reinspected-share")


def quantities(costs: Costs, measured: Sequence[Quantity]) -> dict[str, Quantity]:
    """The file's values and the runs' measurements; a value that the file gives is the one that counts."""
    found = {one.key: one for one in measured}
    for key, value in costs.values.items():
        low, high = value.bounds
        before = found.get(key)
        found[key] = Quantity(
            key=key,
            value=value.value,
            low=low,
            high=high,
            source=value.source,
            line=costs.lines.get(key, 0),
            ranged=value.low is not None or value.high is not None,
            note=value.note,
            measured=None if before is None else before.value,
        )
    return found


def rate(key: str, count: int, of: int, run: str) -> Quantity:
    """A share that a run's test measured, with its 95 % interval."""
    low, high = interval(count / of, of)
    return Quantity(key, count / of, low, high, source="measured", run=run, note=f"{count} / {of}")


def exact(key: str, value: float, run: str) -> Quantity:
    """What a run counted."""
    return Quantity(key, value, value, value, source="measured", run=run, ranged=False)


def returns(known: dict[str, Quantity]) -> Return:
    """All that follows from the quantities."""
    figures: dict[str, Figure] = {}
    missing: dict[str, tuple[str, ...]] = {}
    left: dict[str, tuple[str, ...]] = {}
    formulas: dict[str, tuple[Formula, tuple[str, ...]]] = {}

    def figure(key: str, formula: Formula, needs: Sequence[str]) -> bool:
        """Add a figure, or what it lacks."""
        if lacking := _lacking(known, needs):
            missing[key] = lacking
            return False
        uses = tuple(dict.fromkeys(needs))
        formulas[key] = formula, uses
        figures[key] = _figure(key, formula, uses, known)
        return True

    def there(terms: Sequence[Term]) -> list[Term]:
        """The terms whose values are known."""
        for term in terms:
            if lacking := _lacking(known, term.needs):
                left[term.key] = lacking
        return [term for term in terms if term.key not in left]

    figure("hours-today", _TODAY.formula, _TODAY.needs)
    after = there(_HOURS[1:])
    hours = (_HOURS[0], *after)
    hours_need = [key for term in hours for key in term.needs]
    for term in hours:
        figure(f"hours-{term.key}", term.formula, term.needs)

    def saved(v: Known) -> float:
        return _TODAY.formula(v) - _sum(hours, v)

    figure("hours-saved", saved, hours_need)
    figure("index", lambda v: saved(v) / _TODAY.formula(v), hours_need)

    gains, once = there(_GAINS), there(_ONCE)

    def net(v: Known) -> float:
        return saved(v) * v["hour-cost"] + _sum(gains, v)

    figure("gain-labour", lambda v: saved(v) * v["hour-cost"], (*hours_need, "hour-cost"))
    for term in gains:
        figure(f"gain-{term.key}", term.formula, term.needs)
    net_needs = [*hours_need, "hour-cost", *(key for term in gains for key in term.needs)]
    figure("net", net, net_needs)
    for term in once:
        figure(f"once-{term.key}", term.formula, term.needs)
    once_needs = [key for term in once for key in term.needs] or [*_ONCE[0].needs]
    figure("once", lambda v: _sum(once, v), once_needs)
    figure("payback", lambda v: _months(_sum(once, v), net(v)), [*once_needs, *net_needs])
    swings: dict[str, tuple[Swing, ...]] = {
        key: _swings(*formulas[key], known) for key in ("index", "payback") if key in figures
    }
    return Return(known, figures, missing, left, swings)


def _lacking(known: Mapping[str, Quantity], needs: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for key in needs if key not in known))


def _sum(terms: Sequence[Term], v: Known) -> float:
    return sum(term.formula(v) for term in terms)


def _months(once: float, net: float) -> float:
    """How long until a month's gain has paid it back; infinity where nothing is gained."""
    return once / net if net > 0 else math.inf


def _figure(
    key: str, formula: Formula, uses: tuple[str, ...], known: dict[str, Quantity]
) -> Figure:
    here = [known[name] for name in uses]
    values = [formula({q.key: q.value for q in here})]
    free = [q for q in here if q.key not in WORSE + BETTER and q.low < q.high]
    for worst in (False, True):
        sides = {q.key: q.high if (q.key in WORSE) == worst else q.low for q in here}
        for corner in itertools.product(*((q.low, q.high) for q in free)):
            values.append(formula(sides | {q.key: x for q, x in zip(free, corner, strict=True)}))
    assumed = any(q.source == "assumed" for q in here)
    return Figure(key, values[0], min(values), max(values), uses, assumed)


def _swings(
    formula: Formula, uses: tuple[str, ...], known: dict[str, Quantity]
) -> tuple[Swing, ...]:
    values = {key: known[key].value for key in uses}
    found = [
        Swing(
            key, formula(values | {key: known[key].low}), formula(values | {key: known[key].high})
        )
        for key in uses
        if known[key].low < known[key].high
    ]
    return tuple(sorted(found, key=_width, reverse=True))


def _width(swing: Swing) -> float:
    if math.isinf(swing.at_low) or math.isinf(swing.at_high):
        return math.inf
    return abs(swing.at_high - swing.at_low)
