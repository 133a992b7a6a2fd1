"""What the runs measured of the values that return on investment needs: bytes, hours, machines, rates of a last test."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.core.errors import ConfigError
from fedsplit.report import roi
from fedsplit.report.costs import Costs
from fedsplit.report.page.subject import Part, Run, Subject
from fedsplit.report.roi import Quantity


def measured(subject: Subject, costs: Costs | None) -> list[Quantity]:
    """What the runs say of the values that the figures need. Raises ConfigError for a class or a task that is not there."""
    told = subject.told
    if not told:
        return []
    run, part = _of_task(told, costs)
    summary = part.summary
    moved = summary.bytes_activation + summary.bytes_module
    worked = sum(site.seconds_device for site in summary.sites)
    found = [
        roi.exact("run-gigabytes", moved / 1e9, run.name),
        roi.exact("run-device-hours", worked / 3600, run.name),
    ]
    if summary.sites:
        found.append(roi.exact("machines", len(summary.sites), run.name))
    if costs is not None and costs.good_classes and (len(told) == 1 or costs.task):
        found += _rates(run, part, costs.good_classes)
    return found


def _of_task(told: Sequence[tuple[Run, Part]], costs: Costs | None) -> tuple[Run, Part]:
    if costs is None or not costs.task:
        return told[0]
    for run, part in told:
        if part.summary.task == costs.task:
            return run, part
    tasks = ", ".join(sorted({part.summary.task for _, part in told}))
    raise ConfigError(
        f"the costs file is of task {costs.task!r}, the report has {tasks}; correct `task` there"
    )


def _rates(run: Run, part: Part, good: tuple[str, ...]) -> list[Quantity]:
    """The shares of false alarms and of escapes over the test samples of all sites."""
    if part.classes and (unknown := [name for name in good if name not in part.classes]):
        raise ConfigError(
            f"good-classes of the costs file names {', '.join(map(repr, unknown))}; the classes of task "
            f"{part.summary.task!r} are {', '.join(map(repr, part.classes[:30]))}"
        )
    if part.confusion is None:
        return []
    alarms = escapes = goods = bads = 0
    for name, counts in zip(part.confusion.classes, part.confusion.counts, strict=True):
        called_good = sum(
            n for other, n in zip(part.confusion.classes, counts, strict=True) if other in good
        )
        if name in good:
            goods += sum(counts)
            alarms += sum(counts) - called_good
        else:
            bads += sum(counts)
            escapes += called_good
    pairs = (("false-alarm-rate", alarms, goods), ("escape-rate", escapes, bads))
    return [roi.rate(key, count, of, run.name) for key, count, of in pairs if of]
