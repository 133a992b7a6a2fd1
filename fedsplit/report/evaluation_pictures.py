"""Pictures of a verdict on a module, as PNG and SVG: confusion, recall, reliability, risk against coverage; residuals of numbers.

Drawn without a display. Class names are drawn as they are: formulas in them are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedsplit.core.errors import RunDirError
from fedsplit.core.foreign import printable
from fedsplit.core.intervals import wilson
from fedsplit.predict.judge import ClassVerdict
from fedsplit.predict.judge.judged import Judged
from fedsplit.report.fonts import style_for
from fedsplit.report.plots import STYLE

_BLUE, _DARK, _GREY, _ORANGE = "#2F6F9F", "#0B3C5D", "#9AA5AE", "#D9822B"
_MOST_CELLS = 16
"""Classes up to which a confusion matrix has its counts in it."""
_MOST_NAMES = 50
"""Classes up to which each has its name at the axis, and its bar."""
_NAME = 24


def draw(folder: Path, judged: Judged) -> dict[str, Path]:
    """Write the pictures into `folder`: name -> its PNG file; the SVG lies beside it. Raises RunDirError."""
    names = [printable(name, limit=_NAME) for name in judged.examples.classes]
    written = {}
    with rc_context(STYLE | {"text.parse_math": False} | style_for(names)):
        for name, figure in _figures(judged, names):
            written[name] = folder / f"{name}.png"
            for kind in ("png", "svg"):
                try:
                    figure.savefig(folder / f"{name}.{kind}", dpi=130)
                except OSError as err:
                    raise RunDirError(
                        f"{folder / name}.{kind} cannot be written ({err}); free some space or give another --out"
                    ) from err
    return written


def _figures(judged: Judged, names: list[str]) -> Iterator[tuple[str, Figure]]:
    verdict = judged.verdict
    if isinstance(verdict, ClassVerdict):
        yield "confusion", _confusion(verdict, names)
        if len(names) <= _MOST_NAMES:
            yield "recall", _recall(verdict, names)
        yield "reliability", _reliability(verdict)
        yield "risk-coverage", _risk(verdict)
    else:
        yield "residuals", _residuals(judged)


def _confusion(verdict: ClassVerdict, names: list[str]) -> Figure:
    counts = np.array(verdict.confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(names)
    side = min(11.0, max(4.6, 2.2 + 0.42 * n))
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    if n <= _MOST_NAMES:
        axes.set_xticks(range(n), names, rotation=60 if n > 4 else 0, ha="right" if n > 4 else "center", rotation_mode="anchor")  # fmt: skip
        axes.set_yticks(range(n), names)
        axes.tick_params(labelsize=9 if n <= 20 else 6)
    if n <= _MOST_CELLS:
        for i, j in zip(*np.nonzero(counts), strict=True):
            axes.text(j, i, f"{int(counts[i, j]):,}", ha="center", va="center", fontsize=9,
                      color="white" if shares[i, j] > 0.55 else "#222222")  # fmt: skip
    axes.set_xlabel("answer of the module")
    axes.set_ylabel("label")
    axes.set_title("Confusion matrix", fontsize=11)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), fraction=0.046, pad=0.03)
    bar.set_label("share of the label's samples")
    return figure


def _recall(verdict: ClassVerdict, names: list[str]) -> Figure:
    figure = Figure(figsize=(7.5, 1.4 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    for y, one in enumerate(verdict.classes):
        for offset, share, n, colour in (
            (-0.17, one.recall, one.samples, _BLUE),
            (0.17, one.precision, one.predicted, _ORANGE),
        ):
            if share is None:
                axes.text(0.01, y + offset, "none", va="center", fontsize=8, color=_GREY)
                continue
            low, high = wilson(share, n)
            axes.barh(y + offset, share, height=0.32, color=colour)
            axes.plot([low, high], [y + offset] * 2, color="#222222", lw=1.2)
    axes.set_yticks(range(len(names)), [f"{name}  ({one.samples:,})" for name, one in zip(names, verdict.classes, strict=True)])  # fmt: skip
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="y")
    axes.barh([], [], color=_BLUE, label="recall: of the class, found")
    axes.barh([], [], color=_ORANGE, label="precision: of the answers, right")
    axes.plot([], [], color="#222222", lw=1.2, label="95 % interval")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9)
    axes.set_xlabel("share (samples of the class in brackets)")
    return figure


def _reliability(verdict: ClassVerdict) -> Figure:
    figure = Figure(figsize=(6, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3.4, 1], sharex=True)
    bins = verdict.bins
    widths = [b.high - b.low for b in bins]
    upper.bar([b.low for b in bins], [b.accuracy for b in bins], widths, align="edge", color=_BLUE, edgecolor="white", lw=0.8, label="right answers")  # fmt: skip
    for one in bins:
        low, high = wilson(one.accuracy, one.samples)
        upper.plot([(one.low + one.high) / 2] * 2, [low, high], color=_DARK, lw=1.1)
    upper.plot([0, 1], [0, 1], color="#444444", ls="--", lw=1.1, label="as sure as it should be")
    upper.plot([], [], color=_DARK, lw=1.1, label="95 % interval")
    upper.set_ylim(0, 1.02)
    upper.set_xlim(0, 1)
    upper.yaxis.set_major_formatter(PercentFormatter(1.0))
    upper.set_ylabel("share of right answers")
    upper.legend(loc="upper left", framealpha=0.9, edgecolor="none", fontsize=9)
    upper.set_title(
        f"Reliability: calibration error {100 * verdict.calibration_error:.1f} points", fontsize=11
    )
    lower.bar([b.low for b in bins], [b.samples for b in bins], widths, align="edge", color=_GREY, edgecolor="white", lw=0.8)  # fmt: skip
    lower.set_ylabel("samples")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.set_xlabel("probability that the module gives")
    lower.xaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _risk(verdict: ClassVerdict) -> Figure:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    coverage, wrong = zip(*verdict.coverage, strict=True)
    axes.plot(coverage, wrong, color=_BLUE, lw=2, marker="o" if len(coverage) < 15 else None, ms=4)
    axes.axhline(verdict.risk, color=_ORANGE, ls="--", lw=1.3)
    top = max(1.25 * max(*wrong, verdict.risk), 0.01)
    axes.annotate(f"allowed: {100 * verdict.risk:g} %", (0, verdict.risk), (6, 4), textcoords="offset points", color=_ORANGE, weight="bold", fontsize=9)  # fmt: skip
    axes.set_ylim(0, top)
    axes.set_xlim(0, 1.01)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("samples that the module answers alone, the surest first")
    axes.set_ylabel("wrong answers among them")
    axes.set_title("Risk against coverage", fontsize=11)
    return figure


def _residuals(judged: Judged) -> Figure:
    numbers = np.asarray(judged.examples.numbers, np.float64)
    answers = judged.answers
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    dots: dict[str, Any] = {"s": 14, "alpha": 0.6, "color": _BLUE, "edgecolors": "none", "rasterized": len(numbers) > 2000}  # fmt: skip
    left.scatter(numbers, answers, **dots)
    ends = [min(numbers.min(), answers.min()), max(numbers.max(), answers.max())]
    left.plot(ends, ends, color="#444444", ls="--", lw=1.1)
    left.set_xlabel("label")
    left.set_ylabel("answer of the module")
    left.set_title("Answers", fontsize=11)
    right.scatter(answers, answers - numbers, **dots)
    right.axhline(0, color="#444444", ls="--", lw=1.1)
    _off_lines(right, np.abs(answers - numbers))
    right.set_xlabel("answer of the module")
    right.set_ylabel("answer - label")
    right.set_title("Residuals", fontsize=11)
    return figure


def _off_lines(axes: Axes, off: Any) -> None:
    most = float(np.quantile(off, 0.9))
    for side in (-most, most):
        axes.axhline(side, color=_ORANGE, lw=1, ls=":")
    axes.annotate(f"9 of 10 within {most:.4g}", (1, most), (-4, 4), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=_ORANGE, fontsize=9)  # fmt: skip
