"""How good predicted numbers are, in the labels' own unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class NumberVerdict:
    """What labelled samples say of a model of numbers."""

    samples: int
    mae: float
    rmse: float
    r2: float | None
    """None where all labels are one number."""
    bias: float
    """The mean of prediction - label."""
    within: tuple[float, float, float]
    """Half, 90 % and 95 % of the predictions are off by at most so much."""


def judge_numbers(predicted: Numbers, labels: Numbers) -> NumberVerdict:
    """`predicted` and `labels` [N], N is 1 or more."""
    errors = predicted - labels
    squares, spread = float(np.square(errors).sum()), float(np.square(labels - labels.mean()).sum())
    half, most, nearly = np.quantile(np.abs(errors), (0.5, 0.9, 0.95)).tolist()
    return NumberVerdict(
        samples=len(labels),
        mae=float(np.abs(errors).mean()),
        rmse=float(np.sqrt(squares / len(labels))),
        r2=1 - squares / spread if spread else None,
        bias=float(errors.mean()),
        within=(half, most, nearly),
    )
