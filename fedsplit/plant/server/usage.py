"""What sites' modules answered a day, and whether that has left what they answered on the sites' own test samples.

A site reports sums alone: how often each class, and how sure. They are kept a day and module in registry.db, in a table that
is made when the first such report comes: a federation folder of before has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import ValidationError
from sqlalchemy import Table, delete, inspect, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fedsplit.core.foreign import printable
from fedsplit.plant.wire import Answered, DayUsage, Report

DAYS_KEPT = 400
"""Of a site."""
LEAST = 30
"""Answers, and test samples, below which nothing is concluded."""
MAY_DIFFER = 0.1
"""Share of answers that may go to other classes than on the test samples, beyond chance; likewise the mean confidence."""
_DEVIATIONS = 2.6


class _Base(DeclarativeBase):
    pass


class UsageRow(_Base):
    """A day of a module at a site."""

    __tablename__ = "usage"
    site: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[str] = mapped_column(primary_key=True)
    module: Mapped[str] = mapped_column(primary_key=True)
    answered: Mapped[str]
    """JSON."""


def keep(session: Session, site: str, found: Iterable[DayUsage]) -> None:
    """Keep what a site reports of its days, in place of what it said of them before."""
    found = tuple(found)
    if not found:
        return
    _table().create(session.connection(), checkfirst=True)
    for one in found:
        session.merge(
            UsageRow(
                site=site, day=one.day, module=one.module, answered=one.answered.model_dump_json()
            )
        )
    session.flush()
    days = (
        select(UsageRow.day).where(UsageRow.site == site).distinct().order_by(UsageRow.day.desc())
    )
    if (oldest := session.scalar(days.offset(DAYS_KEPT - 1).limit(1))) is not None:
        session.execute(delete(UsageRow).where(UsageRow.site == site, UsageRow.day < oldest))


def kept(session: Session, site: str, *, most: int = DAYS_KEPT) -> list[DayUsage]:
    """What a site has reported of its last days, oldest first: an entry a day and module, `most` at most."""
    if not inspect(session.connection()).has_table(UsageRow.__tablename__):
        return []
    rows = select(UsageRow).where(UsageRow.site == site).order_by(UsageRow.day.desc()).limit(most)
    found = []
    for row in session.scalars(rows):
        try:
            answered = Answered.model_validate_json(row.answered)
        except ValidationError:  # another version's
            continue
        found.append(DayUsage(day=row.day, module=row.module, answered=answered))
    return found[::-1]


def drift(report: Report) -> str:
    """How the answers of a site's last days leave what its module answered on the site's test samples; empty: they do not."""
    module = report.module
    if module is None or module.expected is None:
        return ""
    seen = [day.answered for day in report.usage if day.module == module.digest]
    return _differs(module.expected, _together(seen))


def _differs(expected: Answered, seen: Answered) -> str:
    if min(expected.samples, seen.samples) < LEAST:
        return ""
    told = []
    names = expected.classes.keys() | seen.classes.keys()
    # Of a class that one side does not list, that side has it among its others: they are compared together.
    alone = {n for n in names if n in expected.classes and n in seen.classes}
    if _others(expected) == 0 and _others(seen) == 0:
        alone = set(names)
    before, now = _shares(expected, alone), _shares(seen, alone)
    moved = sum(abs(now[n] - before[n]) for n in before) / 2
    chance = _chance(before.values(), expected.samples, seen.samples)
    if moved > MAY_DIFFER + chance:
        most = max((n for n in before if n), key=lambda n: abs(now[n] - before[n]), default="")
        what = (
            f": {printable(most, limit=60)} {now[most]:.0%}, there {before[most]:.0%}"
            if most
            else ""
        )
        told.append(
            f"{moved:.0%} of the answers go to other classes than on the site's test samples{what}"
        )
    sure, sure_before = seen.confidence / seen.samples, expected.confidence / expected.samples
    # With two classes a confidence lies in [0.5, 1], so its deviation is 0.25 at most.
    noise = _DEVIATIONS * 0.25 * math.sqrt(1 / expected.samples + 1 / seen.samples)
    if abs(sure - sure_before) > MAY_DIFFER + noise:
        told.append(f"the mean confidence is {sure:.2f}, on the test samples {sure_before:.2f}")
    return "; ".join(told)


def _together(found: Iterable[Answered]) -> Answered:
    samples, confidence, classes = 0, 0.0, dict[str, int]()
    for one in found:
        samples, confidence = samples + one.samples, confidence + one.confidence
        for name, count in one.classes.items():
            classes[name] = classes.get(name, 0) + count
    return Answered.model_construct(samples=samples, confidence=confidence, classes=classes)


def _others(answered: Answered) -> int:
    return answered.samples - sum(answered.classes.values())


def _shares(answered: Answered, names: set[str]) -> dict[str, float]:
    """Of each class that counts alone; the others together stand at ""."""
    found = {name: answered.classes.get(name, 0) / answered.samples for name in names}
    return found | {"": max(0.0, 1 - sum(found.values()))}


def _chance(shares: Iterable[float], n: int, m: int) -> float:
    """What two draws of n and m answers with these shares differ by, but for about one time in two hundred.

    The mean difference of a share is sqrt(2/pi) of its deviation, sqrt(p (1 - p) (1/n + 1/m)), and half of the sum over the
    classes counts. No deviation is above that of p = 0.5.
    """
    wide = 1 / n + 1 / m
    mean = math.sqrt(2 / math.pi) / 2 * sum(math.sqrt(p * (1 - p) * wide) for p in shares)
    return mean + _DEVIATIONS * 0.5 * math.sqrt(wide)


def _table() -> Table:
    table = UsageRow.__table__
    assert isinstance(table, Table)
    return table
