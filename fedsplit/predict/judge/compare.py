"""What differs between two modules on the same samples, and whether chance explains it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.intervals import mcnemar, paired_difference

_DRAWS, _SEED = 2000, 0


@dataclass(frozen=True)
class Comparison:
    """This module against another one. Of classes, "better" is right more often; of numbers, off by less."""

    samples: int
    this_only: int
    """Samples that this module alone has right (of numbers: is nearer to)."""
    other_only: int
    difference: float
    """Accuracy of this - accuracy of the other; of numbers the MAE of the other - the MAE of this: above 0 this is better."""
    interval: tuple[float, float]
    """95 %, of the difference."""
    p: float
    """How likely so uneven a split is by chance, where both are equally good: McNemar's exact test, or of numbers the sign test."""
    changed: tuple[int, ...]
    """Positions of the samples that they answer differently (of numbers: none listed)."""

    @property
    def told_apart(self) -> bool:
        """Is 0 outside the interval?"""
        low, high = self.interval
        return low > 0 or high < 0


def compare(
    this: NDArray[np.int64], other: NDArray[np.int64], labels: NDArray[np.int64]
) -> Comparison:
    """Answers and labels [N], all as positions in one list of classes."""
    mine, theirs = this == labels, other == labels
    both, this_only = int((mine & theirs).sum()), int((mine & ~theirs).sum())
    other_only, none = int((~mine & theirs).sum()), int((~mine & ~theirs).sum())
    return Comparison(
        samples=len(labels),
        this_only=this_only,
        other_only=other_only,
        difference=(this_only - other_only) / len(labels),
        interval=paired_difference(both, this_only, other_only, none),
        p=mcnemar(this_only, other_only),
        changed=tuple(int(i) for i in np.flatnonzero(this != other)),
    )


def compare_numbers(
    this: NDArray[np.float64], other: NDArray[np.float64], labels: NDArray[np.float64]
) -> Comparison:
    """Predictions and labels [N]. The interval is a bootstrap's over samples: 2,000 draws, always the same ones."""
    gains = np.abs(other - labels) - np.abs(this - labels)
    rng = np.random.default_rng(_SEED)
    # One draw at a time: all of them at once would be 2,000 times the samples.
    means = [gains[rng.integers(0, len(gains), len(gains))].mean() for _ in range(_DRAWS)]
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    this_only, other_only = int((gains > 0).sum()), int((gains < 0).sum())
    return Comparison(
        samples=len(labels),
        this_only=this_only,
        other_only=other_only,
        difference=float(gains.mean()),
        interval=(low, high),
        p=mcnemar(this_only, other_only),
        changed=(),
    )
