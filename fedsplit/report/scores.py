"""Scores as people read them."""

from __future__ import annotations

from fedsplit.core.scores import Scores, Scoring
from fedsplit.report.units import NONE, percent, percent_of, points

_TITLES = {"mae": "MAE", "rmse": "RMSE", "r2": "R2"}


def title(name: str) -> str:
    """A score's name in a sentence."""
    return _TITLES.get(name, name)


def others(scores: Scores | None, scoring: Scoring) -> dict[str, str]:
    """The scores beside the main one, by their titles."""
    rest = {n: v for n, v in (scores or {}).items() if n != scoring.main}
    return {title(name): number(value) for name, value in rest.items()}


def number(value: float) -> str:
    """0.1234, 1235, 1.23e+06: four digits, no unit but the data's own."""
    return f"{value:.4g}"


def main(scores: Scores | None, scoring: Scoring, n: int = 0) -> str:
    """The main score: 84.5 % (81-88) with the 95 % interval for `n` samples, or 0.1234; a dash where nothing was tested."""
    if scores is None:
        return NONE
    value = scores[scoring.main]
    if scoring.target == "class":
        return percent_of(value, n) if n else percent(value)
    return number(value)


def whole(scores: Scores | None, scoring: Scoring, n: int = 0) -> str:
    """The main score, and the others after it."""
    rest = ", ".join(f"{name} {value}" for name, value in others(scores, scoring).items())
    return main(scores, scoring, n) + (f" ({rest})" if rest else "")


def difference(gain: float, scoring: Scoring) -> str:
    """How much the main score changed: +12.3 points, or MAE 0.12 lower."""
    if scoring.target == "class":
        return points(gain)
    higher = (gain > 0) == scoring.more_is_better
    return f"{title(scoring.main)} {number(abs(gain))} {'higher' if higher else 'lower'}"
