"""A grid's final accuracies as a ranked picture: a panel a problem and partition, a row a method, the best on top.

A dot is the mean over seeds, a bar goes from the least to the most; the first two are in colour,
with the interval of the difference between them. What has all data in one place is a bound: hollow,
and neither of the two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from fedsplit.experiment.results import Row
from fedsplit.report.comparison import save_figure, text_inches, texts_of
from fedsplit.report.comparison_table import (
    Columns,
    by_seed,
    global_accuracy,
    lead,
)
from fedsplit.report.fonts import style_for
from fedsplit.report.plots import STYLE
from fedsplit.report.units import human_bytes

_FIRST, _SECOND, _REST = "#0072B2", "#D55E00", "#6F6F6F"
_MAX_ACROSS = 2
"""Each panel has names of its own, for each has its own order."""
_ROW_INCHES = 0.2
_NAME_CHARS = 56


@dataclass(frozen=True)
class Place:
    """A method in a panel."""

    method: str
    percents: Mapping[int, float]
    """By seed."""
    moved: float
    """Bytes of a run, mean."""
    bound: bool
    """Its data stand in one place, so it is no rival of the others."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.percents.values())


def write_ranking(out: Path, rows: Sequence[Row], *, methods: Sequence[str]) -> tuple[Path, ...]:
    """Write `accuracy-final` as PNG and SVG into `out`; nothing where no run has an accuracy. Raises RunDirError."""
    if not any(row.accuracy_global is not None and row.outcome != "failed" for row in rows):
        return ()
    with rc_context(STYLE | style_for(texts_of(rows))):
        return tuple(save_figure(ranking(rows, methods), out / "accuracy-final"))


def ranking(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """The picture of some rows, at least one of which has a global accuracy. `methods` gives the order of equals."""
    columns = Columns(rows)
    panels = {
        f"{problem}: {name}" if problem else name: found
        for problem in dict.fromkeys(row.problem for row in rows)
        for name in columns.names(rows)
        if (found := places([r for r in rows if r.problem == problem], methods, columns, name))
    }
    across = min(_MAX_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    longest = max(map(len, panels.values()))
    seeds = max(len(place.percents) for found in panels.values() for place in found)
    labels = [_label(place, seeds) for found in panels.values() for place in found]
    width = max(7.2, 5.0 + text_inches(labels, size=8))
    height = down * (_ROW_INCHES * longest + 1.1) + 0.2
    figure = Figure(figsize=(width * across, height), layout="constrained")
    grid: Any = figure.subplots(down, across, squeeze=False)
    for axes, (title, found) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, found, title, seeds)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    return figure


def places(
    rows: Sequence[Row], methods: Sequence[str], columns: Columns, column: str
) -> list[Place]:
    """The methods of a column, the best mean first."""
    found = []
    for method in methods:
        own = [r for r in rows if r.method == method and columns.of(r) == column]
        if percents := by_seed(own, method, column, columns, global_accuracy):
            moved = statistics.fmean(
                r.bytes_up + r.bytes_down for r in own if r.outcome != "failed"
            )
            found.append(Place(method, percents, moved, any(r.gathers_data for r in own)))
    return sorted(found, key=lambda place: -place.mean)


def _panel(axes: Axes, found: Sequence[Place], title: str, seeds: int) -> None:
    rivals = [place for place in found if not place.bound]
    colours = {
        place.method: colour for place, colour in zip(rivals, (_FIRST, _SECOND), strict=False)
    }
    for y, place in enumerate(found):
        colour = colours.get(place.method, _REST)
        values = place.percents.values()
        weight = "bold" if place.method in colours else "normal"
        axes.plot([min(values), max(values)], [y, y], color=colour, lw=2.2, alpha=0.55, zorder=2)
        axes.plot(
            place.mean, y, marker="D" if place.bound else "o", ms=5.5, color=colour, zorder=3,
            mfc="white" if place.bound else colour,
        )  # fmt: skip
        for right, text in ((40, f"{place.mean:.1f} %"), (86, human_bytes(place.moved))):
            axes.annotate(
                text, (1, y), (right, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", ha="right", fontsize=8, color=colour, weight=weight, annotation_clip=False,
            )  # fmt: skip
    axes.set_yticks(range(len(found)), [_label(place, seeds) for place in found], fontsize=8)
    for tick, place in zip(axes.get_yticklabels(), found, strict=True):
        if place.method in colours:
            tick.set_color(colours[place.method])
            tick.set_fontweight("bold")
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_locator(MultipleLocator(20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.set_xlabel(_what_is_drawn(seeds), fontsize=8)
    axes.set_title(f"{title}\n", fontsize=10)
    axes.annotate(
        _between(rivals), (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
        fontsize=8, annotation_clip=False,
    )  # fmt: skip


def _label(place: Place, seeds: int) -> str:
    name = place.method
    if len(name) > _NAME_CHARS:
        name = f"{name[: _NAME_CHARS - 1]}…"
    name += " (data in one place)" if place.bound else ""
    return f"{name} (n={len(place.percents)})" if len(place.percents) < seeds else name


def _what_is_drawn(seeds: int) -> str:
    over = f"mean, least and most of {seeds} seeds" if seeds > 1 else "one seed"
    return f"global accuracy: {over}; bytes of a run, all sites"


def _between(rivals: Sequence[Place]) -> str:
    """What is known of the difference between the first two."""
    if len(rivals) < 2:
        return ""
    first, second = rivals[:2]
    found = lead(first.percents, second.percents)
    if found is None:
        return "in colour: too few seeds to tell the difference from noise"
    gap, half = found
    word = "outside" if gap > half else "inside"
    return f"in colour: {gap:.1f} points apart, {word} the noise (95 %: {gap - half:.1f} to {gap + half:.1f})"
