"""A run's plots as PNG and SVG: the main score by round, and what each site sent and received.

Drawn without a display and without pyplot's global state, so the ServerApp may call it from a thread.
Colours are Okabe and Ito's, which colour-blind people can tell apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fedsplit.core.errors import RunDirError
from fedsplit.core.records import RoundMetrics, Summary
from fedsplit.core.scores import Scores
from fedsplit.report import scores as score_words
from fedsplit.report.fonts import style_for
from fedsplit.report.read import read_metrics, read_summary
from fedsplit.report.units import factor_less, human_bytes, interval

_SITE_COLOURS = (
    "#56B4E9",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#8C6D31",
    "#7F7F7F",
    "#B8A200",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GLOBAL = "#0B3C5D"
_KINDS = (
    ("bytes_activation_up", "activations sent", "#0072B2", ""),
    ("bytes_activation_down", "activations received", "#56B4E9", ""),
    ("bytes_module_up", "module sent", "#D55E00", "//"),
    ("bytes_module_down", "module received", "#F0B04A", "//"),
)
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "fedsplit",
}


def write_plots(run_dir: Path) -> tuple[Path, ...]:
    """Write the main score's `accuracy.png/.svg` and `traffic.png/.svg` into the run's folder and return their paths.

    Raises RunDirError when the run's files cannot be read or the plots cannot be written.
    """
    summary, metrics = read_summary(run_dir), read_metrics(run_dir)
    written: list[Path] = []
    names = [summary.run, *(m.site for m in metrics)]
    with rc_context(STYLE | style_for(names)):
        for name, figure in (
            (summary.scoring.main, _scores(summary, metrics)),
            ("traffic", _traffic(summary, metrics)),
        ):
            for kind in ("png", "svg"):
                path = run_dir / f"{name}.{kind}"
                try:
                    figure.savefig(path, dpi=150)
                except OSError as err:
                    raise RunDirError(f"{path} cannot be written: {err}") from err
                written.append(path)
    return tuple(written)


def _scores(summary: Summary, metrics: Sequence[RoundMetrics]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _site_lines(axes, metrics)
    scoring, curve = summary.scoring, summary.scores_by_round
    shares, name = scoring.target == "class", score_words.title(scoring.main)
    rounds = range(len(curve))
    axes.plot(
        rounds,
        [scores[scoring.main] for scores in curve],
        color=_GLOBAL,
        lw=3,
        marker="o",
        ms=6,
        label="all sites",
        zorder=5,
    )
    if curve:
        last = curve[-1][scoring.main]
        if shares and summary.tested:
            low, high = interval(last, summary.tested)
            axes.errorbar(
                len(rounds) - 1,
                last,
                [[last - low], [high - last]],
                color=_GLOBAL,
                capsize=4,
                zorder=5,
            )
        axes.annotate(
            score_words.main(curve[-1], scoring), (len(rounds) - 1, last), (8, 0), textcoords="offset points",
            va="center", color=_GLOBAL, weight="bold", annotation_clip=False,
        )  # fmt: skip
    _reference(axes, summary, summary.scores_local_only, ("each site alone", "--"))
    if not summary.untrained:
        _reference(axes, summary, summary.scores_start, ("before training", ":"))
    # From nothing: an axis that starts higher makes a small difference look large.
    axes.set_ylim(0, 1.02 if shares else None)
    axes.set_xlim(-0.15, max(1, len(rounds) - 1) + 0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if shares:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("rounds trained")
    axes.set_ylabel(f"{name} on the sites' {summary.tested:,} test samples")
    axes.set_title(_title(summary, f"{name} by round"), fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    first = labels.index("all sites")
    order = [first, *(i for i in range(len(labels)) if i != first)]
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order],
        loc="center left", bbox_to_anchor=(1.08, 0.5), frameon=False,
    )  # fmt: skip
    return figure


def _site_lines(axes: Axes, metrics: Sequence[RoundMetrics]) -> None:
    """A thin line a site; with more sites than colours all are grey, and one legend entry stands for them."""
    sites = sorted({m.site for m in metrics})
    many = len(sites) > len(_SITE_COLOURS)
    for i, site in enumerate(sites):
        # A metrics line of round r tested the module as it was after round r - 1.
        points = [
            (m.round - 1, scores[m.scoring.main])
            for m in metrics
            if m.site == site and (scores := m.scoring.scores(m.tested)) is not None
        ]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if many:
            axes.plot(xs, ys, color="#B5B5B5", lw=0.8, label="single sites" if i == 0 else None)
        else:
            axes.plot(xs, ys, color=_SITE_COLOURS[i], lw=1.2, marker=_MARKERS[i], ms=4, label=site)


def _reference(axes: Axes, summary: Summary, scores: Scores | None, look: tuple[str, str]) -> None:
    """A level line with its value; `look` is its label and its style."""
    if scores is not None:
        label = f"{look[0]}: {score_words.main(scores, summary.scoring)}"
        value = scores[summary.scoring.main]
        axes.axhline(value, color="#444444", lw=1.3, ls=look[1], label=label, zorder=1)


def _traffic(summary: Summary, metrics: Sequence[RoundMetrics]) -> Figure:
    sites = sorted({m.site for m in metrics})
    height = 3.3 + 0.42 * max(2, len(sites))
    figure = Figure(figsize=(9, height), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[max(2.0, 0.55 * len(sites)) + 0.6, 1.3])
    _site_bars(upper, summary, metrics, sites)
    _total_bars(lower, summary, metrics)
    figure.suptitle(_title(summary, "bytes moved"), x=0.01, ha="left", fontsize=11, weight="bold")
    return figure


def _site_bars(
    axes: Axes, summary: Summary, metrics: Sequence[RoundMetrics], sites: Sequence[str]
) -> None:
    """One stacked bar a site, with what full-model FedAvg would have moved for one site if that is near."""
    left = [0.0] * len(sites)
    for field, label, colour, hatch in _KINDS:
        widths = [
            float(sum(getattr(m, field) for m in metrics if m.site == site)) for site in sites
        ]
        axes.barh(
            sites,
            widths,
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            lw=0.3,
            label=label,
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    cuts = {s.name: s.cut for s in summary.sites}
    axes.set_yticks(range(len(sites)), [f"{s}  (cut {cuts[s]})" if s in cuts else s for s in sites])
    for y, total in enumerate(left):
        axes.annotate(
            human_bytes(total),
            (total, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox=_PAPER,
        )
    longest = max(left, default=0.0) or 1.0
    full = summary.bytes_full_model / max(1, len(summary.sites))
    if 0 < full <= 2.5 * longest:
        axes.axvline(
            full,
            color="#222222",
            ls="--",
            lw=1.3,
            label=f"full-model FedAvg, one site: {human_bytes(full)}",
        )
        longest = max(longest, full)
    axes.set_xlim(0, 1.14 * longest)
    axes.set_ylim(max(1, len(sites)) - 0.4, -0.6)
    axes.set_xlabel("bytes of each site, all rounds")
    _byte_axis(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def _total_bars(axes: Axes, summary: Summary, metrics: Sequence[RoundMetrics]) -> None:
    """This run's total beside the full model's, on one linear axis: the bars' lengths are the comparison."""
    left = 0.0
    for field, _, colour, hatch in _KINDS:
        width = float(sum(getattr(m, field) for m in metrics))
        axes.barh(
            "this run", width, left=left, color=colour, hatch=hatch, edgecolor="white", lw=0.3
        )
        left += width
    axes.barh("full-model FedAvg", summary.bytes_full_model, color="#9A9A9A")
    notes = (
        f"{human_bytes(left)}: {factor_less(left, summary.bytes_full_model)}",
        human_bytes(summary.bytes_full_model),
    )
    for y, (total, note) in enumerate(zip((left, summary.bytes_full_model), notes, strict=True)):
        axes.annotate(note, (total, y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.2 * max(left, summary.bytes_full_model, 1))
    axes.invert_yaxis()
    axes.set_xlabel("bytes of all sites, all rounds")
    _byte_axis(axes)


def _byte_axis(axes: Axes) -> None:
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """A round number of bytes without the zeros behind its point."""
    number, unit = human_bytes(value).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _title(summary: Summary, what: str) -> str:
    name = f"{summary.run}: {what}"
    if summary.outcome != "complete":
        name = f"{name} ({summary.outcome} run)"
    return textwrap.fill(name, 70)
