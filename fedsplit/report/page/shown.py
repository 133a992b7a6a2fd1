"""Numbers and names in the language of the report, and the sentences of sources."""

from __future__ import annotations

import calendar
import math
from collections.abc import Sequence
from datetime import datetime

from fedsplit.core.scores import Scores, Scoring
from fedsplit.report import scores as score_words
from fedsplit.report.costs import UNITS
from fedsplit.report.page.blocks import Sources
from fedsplit.report.roi import Figure, Quantity
from fedsplit.report.units import NONE, interval, percent
from fedsplit.report.words import Words

_BESIDE_UNITS = {"run-gigabytes": "GB", "run-device-hours": "h"}
"""Of quantities that no costs file has."""


class Shown:
    """How one report writes what it knows. `costs`: the name of the costs file."""

    def __init__(self, say: Words, *, currency: str = "", costs: str = "") -> None:
        self.say = say
        self.currency = "円" if say.lang == "ja" and currency in {"JPY", "¥", "円"} else currency
        self.costs = costs
        self.sources = Sources()

    def date(self, at: datetime) -> str:
        """The day and the minute, in this machine's time."""
        here = at.astimezone()
        return self.say(
            "date", year=here.year, number=here.month, month=calendar.month_name[here.month], day=here.day,
            time=here.strftime("%H:%M"),
        )  # fmt: skip

    def stamp(self, at: datetime) -> str:
        """The same in a table."""
        return at.astimezone().strftime("%Y-%m-%d %H:%M")

    def share(self, value: float) -> str:
        """62.3 %"""
        return f"{100 * value:.1f} %" if abs(value) < 0.9995 else f"{100 * value:.0f} %"

    def small_share(self, value: float) -> str:
        """0.35 %: three digits."""
        return f"{float(f'{100 * value:.3g}'):g} %"

    def money(self, value: float) -> str:
        """1,234,000 JPY, without an invented precision."""
        digits = 0 if abs(value) >= 100 or float(value).is_integer() else 2
        return f"{value:,.{digits}f} {self.currency}".strip()

    def months(self, value: float) -> str:
        """8.2 months, 3.4 years, or never."""
        if math.isinf(value):
            return self.say("never")
        if value >= 36:
            return self.say("years", n=f"{value / 12:,.1f}")
        return self.say("months", n=f"{value:.1f}")

    def hours(self, value: float) -> str:
        """302 h a month."""
        return self.say(
            "hours", n=f"{value:,.0f}" if abs(value) >= 99.5 else f"{round(value, 1):g}"
        )

    def of_unit(self, key: str, value: float) -> str:
        """A quantity's value in its unit."""
        unit = UNITS.get(key) or _BESIDE_UNITS[key]
        if unit == "share":
            return self.small_share(value)
        if unit == "money":
            return self.money(value)
        number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return number if unit == "count" else f"{number} {self.say('unit.' + unit)}"

    def figure(self, figure: Figure, value: float | None = None) -> str:
        """A figure's value, or one of its bounds, in its unit."""
        value = figure.value if value is None else value
        if figure.key == "index":
            return self.share(value)
        if figure.key == "payback":
            return self.months(value)
        return self.hours(value) if figure.key.startswith("hours") else self.money(value)

    def bounds(self, figure: Figure) -> str:
        """Between what it may lie; empty where it has no bounds."""
        low, high = self.figure(figure, figure.low), self.figure(figure, figure.high)
        if low == high:
            return ""
        if self.currency:
            low = low.removesuffix(f" {self.currency}")
        return self.say("bounds", low=low, high=high)

    def score(self, scores: Scores | None, scoring: Scoring, n: int = 0) -> str:
        """The main score, and of a share its 95 % interval."""
        if scores is None:
            return NONE
        value = scores[scoring.main]
        if scoring.target != "class":
            return score_words.number(value)
        if n < 1:
            return percent(value)
        low, high = interval(value, n)
        return f"{percent(value)} ({100 * low:.0f}-{100 * high:.0f})"

    def gain(self, before: Scores | None, now: Scores | None, scoring: Scoring) -> str:
        """How much better it became: +12.3 points, or MAE -0.12."""
        if before is None or now is None:
            return NONE
        change = now[scoring.main] - before[scoring.main]
        if scoring.target == "class":
            return self.say("points", n=f"{100 * change:+.1f}")
        return f"{change:+.4g}"

    def score_name(self, scoring: Scoring) -> str:
        """accuracy, MAE"""
        return (
            self.say("accuracy") if scoring.main == "accuracy" else score_words.title(scoring.main)
        )

    def measured(self, run: str, file: str) -> str:
        """The source of what stands in a run's file."""
        return self.say("source.measured", run=run, file=file)

    def source(self, quantity: Quantity) -> str:
        """Where a quantity comes from, as a footnote."""
        label = self.say("cost." + quantity.key)
        value = self.of_unit(quantity.key, quantity.value)
        if quantity.low < quantity.high:
            low, high = (self.of_unit(quantity.key, x) for x in (quantity.low, quantity.high))
            value = f"{value} ({low} - {high})"
        if quantity.source == "measured":
            how = self.say("source.measured", run=quantity.run, file="summary.json")
        else:
            how = self.say(
                "source.given",
                file=self.costs,
                line=quantity.line,
                source=self.say(quantity.source),
            )
        note = f" {quantity.note}" if quantity.note else ""
        return self.say("source.line", label=label, value=value, how=how, note=note)

    def refs(self, figure: Figure, known: dict[str, Quantity]) -> tuple[int, ...]:
        """The numbers of all sources of a figure."""
        return self.sources.ref(*(self.source(known[key]) for key in figure.uses))

    def some(self, names: Sequence[str], most: int = 30) -> str:
        """Names in a row; of many the first ones, and how many there are more."""
        shown = self.say("comma").join(names[:most])
        more = len(names) - most
        return shown if more <= 0 else self.say("and-more", names=shown, n=more)
