"""The figures of a grid as PNG and SVG: accuracy against bytes and rounds, how labels fall to sites.

A panel a problem and partition, a line a method: the mean over seeds, and a band from the least to
the most. Drawn without a display, like plots.py.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from fedsplit.experiment.check import Dealt
from fedsplit.experiment.files import write_whole
from fedsplit.experiment.results import Row
from fedsplit.report.comparison_table import DATA_NOT_COUNTED, Columns
from fedsplit.report.fonts import style_for
from fedsplit.report.plots import STYLE, _tick

Counts = Sequence[Sequence[int]]
"""[site][class]"""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")
_MAX_ACROSS = 4
"""Panels beside each other: what a page is wide enough for."""
_NAME_CHARS = 20
_MAX_BUBBLES = 40
"""More sites or classes than this are a picture of shades."""


def write_figures(out: Path, rows: Sequence[Row], *, methods: Sequence[str]) -> tuple[Path, ...]:
    """Write `accuracy-bytes` and `accuracy-rounds` as PNG and SVG into `out`. Raises RunDirError."""
    drawn = [row for row in rows if row.accuracy_by_round and row.outcome != "failed"]
    if not drawn:
        return ()
    written: list[Path] = []
    with rc_context(STYLE | style_for(texts_of(drawn))):
        for name, against_bytes in (("accuracy-bytes", True), ("accuracy-rounds", False)):
            figure = _curves(drawn, methods, against_bytes=against_bytes)
            written += save_figure(figure, out / name)
    return tuple(written)


def write_labels(out: Path, dealt: Mapping[str, Mapping[str, Dealt]]) -> tuple[Path, ...]:
    """Write `labels-PROBLEM` as PNG and SVG: problem -> partition -> samples of each site and class."""
    written: list[Path] = []
    names = [c for partitions in dealt.values() for one in partitions.values() for c in one.classes]
    with rc_context(STYLE | {"axes.grid": False} | style_for([*dealt, *names])):
        for problem, partitions in dealt.items():
            name = f"labels-{_file_name(problem)}" if problem else "labels"
            written += save_figure(_labels(problem, partitions), out / name)
    return tuple(written)


def texts_of(rows: Sequence[Row]) -> list[str]:
    """All names that a figure of these rows may show."""
    return [
        text for row in rows for text in (row.method, row.problem, *(str(v) for _, v in row.axes))
    ]


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG beside each other. Raises RunDirError."""
    written = []
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150)
        path = stem.with_name(f"{stem.name}.{kind}")
        write_whole(path, buffer.getvalue())
        written.append(path)
    return written


def _curves(rows: Sequence[Row], methods: Sequence[str], *, against_bytes: bool) -> Figure:
    columns = Columns(rows)
    problems = list(dict.fromkeys(row.problem for row in rows))
    names = columns.names(rows)
    known = [m for m in methods if any(row.method == m for row in rows)]
    gathered = {row.method for row in rows if row.gathers_data}
    labels = [f"{m} ({DATA_NOT_COUNTED})" if against_bytes and m in gathered else m for m in known]
    # A line and its gaps stand before each text.
    entry = 0.85 + text_inches(labels, size=9)
    across = min(_MAX_ACROSS, len(names))
    down = math.ceil(len(names) / across)
    width = max(6.4, 3.3 * across + 0.8, entry)
    legend_columns = max(1, min(4, len(known), int(width / entry)))
    legend_rows = -(-len(known) // legend_columns)
    height = 3.0 * len(problems) * down + 0.7 + 0.26 * legend_rows
    figure = Figure(figsize=(width, height), layout="constrained")
    grid: Any = figure.subplots(len(problems) * down, across, squeeze=False, sharey="row")
    for i, problem in enumerate(problems):
        for axes in grid[i * down : (i + 1) * down].flat[len(names) :]:
            axes.set_visible(False)
        for j, name in enumerate(names):
            axes = grid[i * down + j // across, j % across]
            here = [r for r in rows if r.problem == problem and columns.of(r) == name]
            _panel(axes, here, known, against_bytes=against_bytes)
            axes.set_title(f"{problem}: {name}" if problem else name, fontsize=10)
            if j % across == 0:
                axes.set_ylabel("global accuracy")
            if i == len(problems) - 1 and j + across >= len(names):
                axes.set_xlabel("bytes moved, all sites" if against_bytes else "rounds trained")
    handles = [_handle(k, label) for k, label in enumerate(labels)]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        fontsize=9,
        handlelength=3,
    )
    return figure


def text_inches(texts: Sequence[str], *, size: float) -> float:
    """Width of the widest text at a size in points."""
    from matplotlib.textpath import TextPath

    widest = max((TextPath((0, 0), x, size=size).get_extents().width for x in texts), default=0.0)
    return float(widest) / 72


def _look(place: int) -> dict[str, Any]:
    """Colour, line and marker of the method at a place: no two of 32 look the same."""
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "ls": _LINES[place // len(_COLOURS) % len(_LINES)],
        "marker": _MARKERS[(place + place // len(_COLOURS)) % len(_MARKERS)],
    }


def _handle(place: int, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], lw=1.8, ms=5, label=label, **_look(place))


def _panel(axes: Axes, rows: Sequence[Row], methods: Sequence[str], *, against_bytes: bool) -> None:
    farthest = 1
    for place, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        if not own:
            continue
        points = min(len(row.accuracy_by_round) for row in own)
        accuracy = np.array([row.accuracy_by_round[:points] for row in own])
        if against_bytes:
            xs = np.array([row.bytes_by_round[:points] for row in own], dtype=float).mean(axis=0)
        else:
            xs = np.arange(points, dtype=float)
        farthest = max(farthest, points - 1)
        # A log axis has no place for the start, at which nothing has been moved.
        shown = xs > 0 if against_bytes else np.ones(points, dtype=bool)
        look = _look(place)
        # Methods may coincide: the first lies below, and is the thickest. A lone point has no line to be seen by.
        thick = 1.0 - place / max(1, len(methods) - 1)
        size = 4 + 5 * thick if points > 1 else 9
        axes.plot(
            xs[shown], accuracy.mean(axis=0)[shown], lw=1.4 + 2 * thick, ms=size, **look,
            markevery=max(1, points // 6), zorder=3,
        )  # fmt: skip
        if len(own) > 1:
            low, high = accuracy.min(axis=0)[shown], accuracy.max(axis=0)[shown]
            axes.fill_between(xs[shown], low, high, color=look["color"], alpha=0.15, lw=0)
    # From nothing: an axis that starts higher makes a point of difference look like a half.
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if against_bytes:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        # Within a decade or two there are hardly any powers of ten to write a number at.
        subs = (1.0,) if high > 100 * low else (1.0, 3.0) if high > 10 * low else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        if high < 2.5 * low:
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(-0.02 * farthest, 1.02 * farthest)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _labels(problem: str, partitions: Mapping[str, Dealt]) -> Figure:
    sites = max(len(one.counts) for one in partitions.values())
    classes = max(len(one.classes) for one in partitions.values())
    across = min(_MAX_ACROSS, len(partitions))
    down = math.ceil(len(partitions) / across)
    tall = min(6.0, max(2.2, 0.24 * sites))
    wide = min(5.0, max(2.6, 0.26 * classes))
    figure = Figure(figsize=(wide * across + 1.2, tall * down + 1.1), layout="constrained")
    grid: Any = figure.subplots(down, across, squeeze=False)
    most = max(n for one in partitions.values() for site in one.counts for n in site)
    for place, (name, one) in enumerate(partitions.items()):
        axes: Axes = grid[place // across, place % across]
        if max(sites, classes) <= _MAX_BUBBLES:
            _bubbles(axes, one.counts, most, side=min(tall / sites, wide / classes))
            _name_classes(axes, one.classes)
        else:
            _shades(figure, axes, one.counts)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("class")
        if place % across == 0:
            axes.set_ylabel("site")
    for axes in grid.flat[len(partitions) :]:
        axes.set_visible(False)
    title = f"{problem}: samples" if problem else "Samples"
    title += " of each class at each site"
    if max(sites, classes) <= _MAX_BUBBLES:
        title += f" (largest disc: {most})"
    # About nine characters an inch.
    title = textwrap.fill(title, int(9 * figure.get_figwidth()))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    return figure


def _bubbles(axes: Axes, counts: Counts, most: int, *, side: float) -> None:
    """A disc a site and class, whose area is the number of samples."""
    table = np.asarray(counts, dtype=float)
    ys, xs = np.nonzero(table)
    # The largest disc just fits its place: `side` inches are 72 points each.
    largest = (60 * side) ** 2
    axes.scatter(xs, ys, s=largest * table[ys, xs] / most, color="#0072B2", alpha=0.8, lw=0)
    axes.set_xlim(-0.7, table.shape[1] - 0.3)
    axes.set_ylim(table.shape[0] - 0.3, -0.7)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))


def _name_classes(axes: Axes, classes: Sequence[str]) -> None:
    """Names under the columns, upright where they are long."""
    shown = [
        name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…" for name in classes
    ]
    turn = 90 if max(map(len, shown)) > 2 else 0
    axes.set_xticks(range(len(shown)), shown, rotation=turn, fontsize=8)


def _shades(figure: Figure, axes: Axes, counts: Counts) -> None:
    """The same as shades, where there is no room for discs."""
    table = np.asarray(counts, dtype=float)
    image = axes.imshow(
        np.sqrt(table), aspect="auto", cmap="Blues", interpolation="nearest", vmin=0
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    most = table.max()
    ticks = [t for t in MaxNLocator(5, integer=True).tick_values(0, most) if 0 <= t <= most]
    bar.set_ticks([math.sqrt(t) for t in ticks], labels=[f"{t:.0f}" for t in ticks])
    bar.set_label("samples", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)
