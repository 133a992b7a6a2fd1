"""Interleaved measurements and what may be said of them. Machines are noisy: only ratios within one round count.

A round measures every side once, one straight after the other; the order turns round each time, so that a drift of the
machine favours nobody. Used by the benchmarks; knows nothing of what they measure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Measure = Callable[[], float]
Progress = Callable[[str], None]
"""Told what comes next; called between measurements, never inside one."""
Round = dict[str, float]


def quiet(text: str) -> None:
    """A Progress that says nothing."""


def interleave(
    measures: Mapping[str, Measure], *, rounds: int, warmup: int = 1, progress: Progress = quiet
) -> list[Round]:
    """`rounds` rounds of all measures, by name; `warmup` rounds before them are dropped."""
    names = list(measures)
    kept = []
    for number in range(warmup + rounds):
        done = f"{number - warmup + 1}/{rounds}" if number >= warmup else "warm-up"
        one: Round = {}
        for name in names if number % 2 else reversed(names):
            progress(f"{done} {name}")
            one[name] = measures[name]()
        if number >= warmup:
            kept.append({name: one[name] for name in names})
    return kept


def with_ratio(rounds: Iterable[Round], ours: str, rival: str) -> list[Round]:
    """The rounds with `ratio` = ours / rival beside what was measured."""
    return [one | {"ratio": one[ours] / one[rival]} for one in rounds]


def median(rounds: Iterable[Mapping[str, float]], name: str) -> float:
    """The median of one side over the rounds."""
    return statistics.median(one[name] for one in rounds)


def spread(values: Iterable[float]) -> dict[str, float]:
    """min, median and max of at least one value."""
    ordered = sorted(values)
    return {"min": ordered[0], "median": statistics.median(ordered), "max": ordered[-1]}


def ratio_spread(result: Mapping[str, Any]) -> dict[str, float]:
    """The spread of a benchmark's ratio over its pairs; its one ratio where pairs have none of their own."""
    ratios = [float(pair["ratio"]) for pair in result["pairs"] if "ratio" in pair]
    return spread(ratios or [float(result["ratio"])])
