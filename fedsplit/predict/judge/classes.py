"""How good a classifier is on labelled samples: accuracy, precision and recall, calibration, and when to ask a person.

Shapes: N samples, C classes. Shares are in [0, 1]; None stands where nothing can be said (no sample of a class).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.intervals import wilson
from fedsplit.predict.judge.ask import Asking, asking

Shares = NDArray[np.float64]
Index = NDArray[np.int64]

BINS = 15
"""Of equal width in probability (Guo et al., arXiv 1706.04599)."""


@dataclass(frozen=True)
class OfClass:
    """One class."""

    name: str
    samples: int
    """That have this label."""
    predicted: int
    """That the module says are of it."""
    precision: float | None
    """Of those that the module says are of this class, the share that is."""
    recall: float | None
    """Of those that are of this class, the share that the module finds."""
    asking: Asking
    """From which probability on its answer stands without a person."""


@dataclass(frozen=True)
class Bin:
    """Samples whose largest probability lies in one range."""

    low: float
    high: float
    samples: int
    confidence: float
    """The mean of the largest probability."""
    accuracy: float


@dataclass(frozen=True)
class ClassVerdict:
    """What labelled samples say of a classifier."""

    samples: int
    accuracy: float
    interval: tuple[float, float]
    """95 %, of the accuracy."""
    classes: tuple[OfClass, ...]
    confusion: tuple[tuple[int, ...], ...]
    """[C][C] samples: a row for each label, a column for each answer."""
    calibration_error: float
    """The expected calibration error over `bins`."""
    bins: tuple[Bin, ...]
    """Those that have a sample."""
    coverage: tuple[tuple[float, float], ...]
    """(share of samples answered, share of these that is wrong), the surest first; at most 200 points."""
    risk: float
    """Share of wrong answers that `asking` allows."""

    @property
    def recall(self) -> dict[str, float | None]:
        """Class -> its recall."""
        return {one.name: one.recall for one in self.classes}

    @property
    def mean_recall(self) -> float | None:
        """Over the classes that have a sample: what accuracy would be with equally many of each."""
        found = [one.recall for one in self.classes if one.recall is not None]
        return sum(found) / len(found) if found else None


def judge_classes(
    shares: Shares, labels: Index, classes: tuple[str, ...], *, risk: float = 0.01
) -> ClassVerdict:
    """`shares` [N, C] are the module's probabilities, `labels` [N] positions in `classes`; N is 1 or more."""
    answers = shares.argmax(axis=1)
    sure = shares.max(axis=1)
    right = answers == labels
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, answers), 1)
    accuracy = float(right.mean())
    bins = _bins(sure, right)
    off = sum(one.samples * abs(one.confidence - one.accuracy) for one in bins)
    return ClassVerdict(
        samples=len(labels),
        accuracy=accuracy,
        interval=wilson(accuracy, len(labels)),
        classes=tuple(
            _of_class(c, name, confusion, sure[answers == c], right[answers == c], risk)
            for c, name in enumerate(classes)
        ),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion),
        calibration_error=off / len(labels),
        bins=bins,
        coverage=_coverage(sure, right),
        risk=risk,
    )


def _of_class(
    c: int,
    name: str,
    confusion: NDArray[np.int64],
    sure: Shares,
    right: NDArray[np.bool_],
    risk: float,
) -> OfClass:
    samples, predicted, found = int(confusion[c].sum()), len(sure), int(confusion[c, c])
    return OfClass(
        name=name,
        samples=samples,
        predicted=predicted,
        precision=found / predicted if predicted else None,
        recall=found / samples if samples else None,
        asking=asking(sure, right, risk),
    )


def _bins(sure: Shares, right: NDArray[np.bool_]) -> tuple[Bin, ...]:
    # A probability on an edge belongs to the bin below, as in the source.
    place = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for i in range(BINS):
        if (inside := place == i).any():
            found.append(
                Bin(
                    low=i / BINS,
                    high=(i + 1) / BINS,
                    samples=int(inside.sum()),
                    confidence=float(sure[inside].mean()),
                    accuracy=float(right[inside].mean()),
                )
            )
    return tuple(found)


def _coverage(
    sure: Shares, right: NDArray[np.bool_], most: int = 200
) -> tuple[tuple[float, float], ...]:
    """Risk against coverage (El-Yaniv and Wiener, JMLR 11, 2010)."""
    order = np.argsort(-sure, kind="stable")
    answered = np.arange(1, len(sure) + 1)
    wrong = np.cumsum(~right[order]) / answered
    # Samples of one probability are answered together.
    last = np.append(sure[order][1:] != sure[order][:-1], True)
    points = np.flatnonzero(last)
    if len(points) > most:
        points = points[np.unique(np.linspace(0, len(points) - 1, most).round().astype(int))]
    return tuple((float(answered[i] / len(sure)), float(wrong[i])) for i in points)
