"""The report's pictures as SVG that stands in the page itself.

Text stays text in the font of the page: Japanese is drawn by the reader's machine, and this one needs no Japanese font.
So room for names is reckoned by their characters' widths and not by a font. matplotlib escapes all text; formulas in
names are not looked at.
"""

from __future__ import annotations

import functools
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fedsplit.report.page.subject import Confusion
from fedsplit.report.units import human_bytes, human_seconds

_P = ParamSpec("_P")
_FAMILY = re.compile(r"font-family: [^;\"]*; ?")
_NAMES = re.compile(r'<g id="[^"]*">')
_BLUE, _DARK, _GREY, _ORANGE = "#2F6F9F", "#0B3C5D", "#9AA5AE", "#D9822B"
_STACK = ("#2F6F9F", "#8FBCDB", "#D9822B", "#F0C08A")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsplit",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A949C",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E8EB",
    "xtick.color": "#3A444C",
    "ytick.color": "#3A444C",
    "patch.linewidth": 0,
}
_WIDTH = 7.2
"""Inches: what an A4 page has within its margins."""
_EM = 9 / 72
_MOST_NAMES = 60
"""Rows of a picture; the tables have all."""
NAME_CHARS = 24
MAX_CELLS = 16
"""Classes up to which a confusion matrix shows its counts."""


@dataclass(frozen=True)
class Whisker:
    """A site's score before and now, each (value, low, high)."""

    name: str
    before: tuple[float, float, float] | None
    now: tuple[float, float, float] | None


@dataclass(frozen=True)
class Line:
    """A curve: (round, value) points."""

    name: str
    points: Sequence[tuple[int, float]]
    strong: bool = False


def _picture(draw: Callable[_P, Figure]) -> Callable[_P, str]:
    """A drawing as the text of an SVG element."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> str:
        buffer = io.StringIO()
        with rc_context(_STYLE), warnings.catch_warnings():
            # Here text is only measured; the reader's machine draws it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata=none)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        # The page's font; and names that nothing refers to go, for pictures of one page share them.
        text = _FAMILY.sub("", text)
        return _NAMES.sub("<g>", text)

    return drawn


@_picture
def whiskers(rows: Sequence[Whisker], *, before: str, now: str, shares: bool, axis: str) -> Figure:
    """Each site's score before and after training, with 95 % intervals."""
    rows = rows[:_MOST_NAMES]
    figure, axes = _rows([row.name for row in rows], legend=True)
    for y, row in enumerate(rows):
        for value, colour, at, filled in (
            (row.before, _GREY, y - 0.17, False),
            (row.now, _DARK, y + 0.17, True),
        ):
            if value is None:
                continue
            axes.plot(value[1:], [at, at], color=colour, lw=2, solid_capstyle="butt")
            axes.plot(
                value[0],
                at,
                "o",
                ms=6,
                color=colour,
                mfc=colour if filled else "white",
                mew=1.6,
                clip_on=False,
                zorder=3,
            )
    if shares:
        axes.set_xlim(0, 1.005)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(axis)
    _legend(axes, [("○", _GREY, before), ("●", _DARK, now)])
    return figure


@_picture
def curves(lines: Sequence[Line], *, axis: str, rounds: str, shares: bool, others: str) -> Figure:
    """A value by round: a thick line of all sites, thin grey ones of each."""
    figure = Figure(figsize=(_WIDTH, 2.9))
    axes = figure.add_axes((0.62 / _WIDTH, 0.19, 1 - 0.9 / _WIDTH, 0.68))
    thin = [line for line in lines if not line.strong]
    for line in thin:
        axes.plot(*_xy(line), color="#B9C2C9", lw=1)
    for line in lines:
        if line.strong:
            axes.plot(*_xy(line), color=_DARK, lw=2.4, marker="o", ms=4, zorder=4)
    farthest = max((x for line in lines for x, _ in line.points), default=1)
    axes.set_xlim(-0.02 * max(1, farthest), 1.03 * max(1, farthest))
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.set_ylim(0, 1.02 if shares else None)
    if shares:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(rounds)
    strong = [("━", _DARK, line.name) for line in lines if line.strong]
    _legend(axes, [("", _DARK, axis), *strong, *([("━", "#B9C2C9", others)] if thin else [])])
    return figure


@_picture
def stacks(
    names: Sequence[str], values: Sequence[Sequence[float]], labels: Sequence[str], *, axis: str, seconds: bool = False
) -> Figure:  # fmt: skip
    """A bar a site of what it sent and received, or how long it worked and waited."""
    names, values = names[:_MOST_NAMES], values[:_MOST_NAMES]
    figure, axes = _rows(names, legend=True)
    table = np.array(values, dtype=float).reshape(len(names), len(labels))
    left = np.zeros(len(names))
    for j in range(len(labels)):
        axes.barh(range(len(names)), table[:, j], 0.62, left=left, color=_STACK[j])
        left += table[:, j]
    human = human_seconds if seconds else human_bytes
    for y, total in enumerate(left):
        axes.annotate(
            human(total), (total, y), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(0, 1.16 * max(left.max(initial=0.0), 1e-9))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x, human)))
    axes.set_xlabel(axis)
    axes.grid(visible=False, axis="y")
    _legend(axes, [("■", _STACK[j], label) for j, label in enumerate(labels)])
    return figure


@_picture
def confusion(found: Confusion, *, true: str, predicted: str) -> Figure:
    """Shades by the share of each true class; counts in the fields where there are few classes."""
    counts = np.array(found.counts, dtype=float)
    n = len(found.classes)
    few = n <= MAX_CELLS
    names = [_short(name) for name in found.classes] if n <= 40 else []
    room = max((_em(name) for name in names), default=2.0) * _EM + 0.45
    side = min(_WIDTH - room - 0.3, max(2.2, 0.36 * n))
    width, height = room + side + 0.3, side + 0.35 + room
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((room / width, room / height, side / width, side / height))
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.patch.set_facecolor("#F7FAFC")
    # Squares of vectors, not a bitmap: a page has no parts, and print stays sharp. Empty fields are the ground.
    ys, xs = np.nonzero(counts)
    squares = [
        [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y in zip(xs, ys, strict=True)
    ]
    shades = colormaps["Blues"](0.15 + 0.75 * shares[ys, xs])
    axes.add_collection(
        PolyCollection(squares, facecolors=shades, edgecolors="white", linewidths=0.6 if few else 0)
    )
    axes.set_xlim(0, n)
    axes.set_ylim(n, 0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if few:
        for i, j in np.ndindex(n, n):
            if counts[i, j]:
                colour = "white" if shares[i, j] > 0.55 else "#1C262E"
                axes.text(
                    j + 0.5,
                    i + 0.5,
                    f"{int(counts[i, j]):,}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=8,
                )
    if names:
        axes.set_yticks(np.arange(n) + 0.5, names)
        axes.set_xticks(np.arange(n) + 0.5, names, rotation=90)
    axes.set_ylabel(true, labelpad=4)
    axes.set_xlabel(predicted, labelpad=4)
    return figure


@_picture
def swings(
    names: Sequence[str], ends: Sequence[tuple[float, float]], middle: float, *, low: str, high: str, axis: str, shares: bool
) -> Figure:  # fmt: skip
    """How far a figure goes with each value at its bounds alone: the widest bar on top."""
    figure, axes = _rows(names, legend=True, chars=44)
    for y, (at_low, at_high) in enumerate(ends):
        for value, colour in ((at_low, "#8FBCDB"), (at_high, _BLUE)):
            axes.barh(y, value - middle, 0.62, left=middle, color=colour)
    axes.axvline(middle, color=_DARK, lw=1.2)
    every = [middle, *(value for pair in ends for value in pair)]
    room = 0.06 * (max(every) - min(every)) or 1.0
    axes.set_xlim(min(every) - room, max(every) + room)
    if shares:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(axis)
    axes.grid(visible=False, axis="y")
    _legend(axes, [("■", "#8FBCDB", low), ("■", _BLUE, high)])
    return figure


def _xy(line: Line) -> tuple[list[int], list[float]]:
    return [x for x, _ in line.points], [y for _, y in line.points]


def _rows(names: Sequence[str], *, legend: bool, chars: int = NAME_CHARS) -> tuple[Figure, Axes]:
    """Axes with a row a name from the top, and room at the left for the longest one."""
    shown = [_short(name, chars) for name in names]
    left = max((_em(name) for name in shown), default=1.0) * _EM + 0.15
    height = 0.26 * max(1, len(names)) + 0.2
    top, bottom = (0.32 if legend else 0.08), 0.48
    whole = height + top + bottom
    figure = Figure(figsize=(_WIDTH, whole))
    axes = figure.add_axes(
        (left / _WIDTH, bottom / whole, 1 - (left + 0.25) / _WIDTH, height / whole)
    )
    axes.set_yticks(range(len(names)), shown)
    axes.set_ylim(max(1, len(names)) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _tick(value: float, human: Callable[[float], str]) -> str:
    """A round number without the zeros behind its point."""
    number, _, unit = human(value).partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _legend(axes: Axes, entries: Sequence[tuple[str, str, str]]) -> None:
    """(sign, colour, label) beside each other above the axes: matplotlib's own would measure with another font."""
    at = 0.0
    for sign, colour, label in entries:
        for text, shade, wide in (
            (sign, colour, 13.0),
            (label, "#1C262E", 72 * _EM * _em(label) + 12),
        ):
            axes.annotate(
                text, (0, 1), (at, 6), xycoords="axes fraction", textcoords="offset points", color=shade
            )  # fmt: skip
            at += wide


def _short(name: str, chars: int = NAME_CHARS) -> str:
    return name if len(name) <= chars else name[: chars - 1] + "…"


def _em(text: str) -> float:
    """How wide a text is in most fonts, in ems; wide characters are one each."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.6 for c in text)
