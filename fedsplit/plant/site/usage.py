"""What a site's report says of its module's answers: the sums of the last two days, bounded."""

from __future__ import annotations

import time
from collections import Counter

from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.wire import MAX_BODY_BYTES, MAX_COUNTED, Answered, DayUsage, Report
from fedsplit.predict.usage import Sums, day_of, used

_DAY_S = 86_400.0
_ROOM = 4096


def answered(sums: Sums, *, most: int = MAX_COUNTED) -> Answered:
    """The sums as they travel: the `most` frequent classes with a count of their own."""
    return Answered(
        samples=sums.samples,
        confidence=sums.confidence,
        classes=dict(Counter(sums.classes).most_common(most)),
    )


def last_days(folder: SiteFolder, module: str, *, now: float | None = None) -> tuple[DayUsage, ...]:
    """Yesterday and today of one module; days without answers are left out."""
    at = time.time() if now is None else now
    found = []
    for day in (day_of(at - _DAY_S), day_of(at)):
        if sums := used(folder.path, day).get(module):
            found.append(DayUsage(day=day, module=module, answered=answered(sums)))
    return tuple(found)


def bounded(report: Report) -> Report:
    """The report, with as many counts of classes as a body takes: their names may be long."""
    while len(report.model_dump_json().encode()) > MAX_BODY_BYTES - _ROOM and report.module:
        fewer = (
            max((len(d.answered.classes) for d in report.usage), default=0) // 2
            or len(report.module.expected.classes if report.module.expected else ()) // 2
        )
        cut = [d.model_copy(update={"answered": _fewer(d.answered, fewer)}) for d in report.usage]
        wanted = report.module.expected and _fewer(report.module.expected, fewer)
        module = report.module.model_copy(update={"expected": wanted})
        report = report.model_copy(update={"usage": tuple(cut), "module": module})
        if not fewer:
            break
    return report


def _fewer(one: Answered, most: int) -> Answered:
    kept = dict(Counter(one.classes).most_common(most))
    return one.model_copy(update={"classes": kept})
