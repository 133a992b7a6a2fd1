"""Scores as sums that add over sites: what a test comes to, and how good that is. Without torch.

A site sends sums over its test samples, never a mean: the sums of all sites make the scores of all. A task names its
scoring (training/task.py); guard, ledger, early stopping, tables and plots ask it and name no score themselves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedsplit.core.errors import ConfigError

Target = Literal["class", "number"]
"""What a label is."""
Scores = dict[str, float]
"""Name of a score -> its value."""

_MAX_SUMS, _MAX_NAME_CHARS = 8, 32
# Squares of sums over all sites must stay finite.
_LARGEST = 1e150
Sums = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=_MAX_NAME_CHARS)],
        Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)],
    ],
    Field(max_length=_MAX_SUMS),
]
"""Name -> sum over test samples. Foreign numbers: capped in number, length and size."""

MAX_CONFUSED = 100
"""Classes up to which a run keeps which class was taken for which: what a site sends stays small."""
_Row = Annotated[tuple[Annotated[int, Field(ge=0, le=10**12)], ...], Field(max_length=MAX_CONFUSED)]
Confusion = Annotated[tuple[_Row, ...], Field(max_length=MAX_CONFUSED)]
"""[label][answer] test samples, in the order of the run's classes. They add over sites."""

NUMBER: tuple[str, ...] = ("number",)
"""What stands for the classes where labels are numbers: the name of the one output."""
LARGEST_NUMBER = 1e30
"""The largest label of a task of numbers."""
LOST_SHARE = 0.10
# Standard errors that chance explains.
_CHANCE = 2.0


_Number = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER, allow_inf_nan=False)]
_Deviation = Annotated[float, Field(ge=0, le=2 * LARGEST_NUMBER, allow_inf_nan=False)]


class Spread(BaseModel):
    """Where a site's training numbers lie: what it says of them before the first round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: _Number
    deviation: _Deviation
    """The root of the mean squared distance from the mean."""


class Scale(BaseModel):
    """What the outputs of a model of numbers are in: number = mean + deviation * output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: _Number
    deviation: Annotated[_Deviation, Field(gt=0)]


def agreed(spreads: Iterable[tuple[Spread, float]]) -> Scale:
    """Mean and deviation of the numbers of all sites together, from (spread, weight) of each. Raises ConfigError.

    Exact where the weights are the samples: the variance of all is the mean of the variances and of the squared distances of
    the means (Chan et al., 1979).
    """
    known = list(spreads)
    total = sum(weight for _, weight in known)
    mean = sum(spread.mean * weight for spread, weight in known) / total
    squares = sum(
        (spread.deviation**2 + (spread.mean - mean) ** 2) * weight for spread, weight in known
    )
    deviation = math.sqrt(squares / total)
    if not deviation > 1e-12 * abs(mean):
        raise ConfigError(
            f"the training samples of all sites have one number, {mean:g}, so there is nothing to learn; look at "
            f"label-column"
        )
    return Scale(mean=mean, deviation=deviation)


class Tally(BaseModel):
    """What a test of a module came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sums: Sums
    samples: int = Field(ge=0, le=10**12)


def added(tests: Iterable[Tally]) -> Tally:
    """The test of all their samples together."""
    sums: dict[str, float] = {}
    samples = 0
    for test in tests:
        samples += test.samples
        for name, value in test.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    # Built unchecked: each part was checked when it came, and sums of many parts may be larger.
    return Tally.model_construct(sums=sums, samples=samples)


def fits(confusion: Confusion, test: Tally, classes: int) -> bool:
    """Can this be the confusion of that test of classes?"""
    return (
        len(confusion) == classes
        and all(len(row) == classes for row in confusion)
        and sum(map(sum, confusion)) == test.samples
        and sum(row[i] for i, row in enumerate(confusion)) == test.sums.get("correct")
    )


def together(confusions: Iterable[Confusion]) -> Confusion | None:
    """The confusion over all sites; None where there is none."""
    found = list(confusions)
    if not found:
        return None
    return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*found, strict=True))


def recall_of(
    confusion: Confusion | None, classes: Sequence[str]
) -> dict[str, float | None] | None:
    """Class -> the share of its samples that was found; None where it has no sample."""
    if confusion is None:
        return None
    rows = zip(classes, confusion, strict=True)
    return {name: row[i] / sum(row) if sum(row) else None for i, (name, row) in enumerate(rows)}


class Scoring(ABC):
    """How the sums of one kind of task become scores."""

    target: ClassVar[Target]
    main: ClassVar[str]
    """The score that modules are compared by."""
    more_is_better: ClassVar[bool]
    sums: ClassVar[tuple[str, ...]]
    """The names of the sums that a test has."""
    harm: ClassVar[str]
    """What a site that `lost` had happen to it, in words."""

    @property
    def nothing(self) -> Tally:
        """The test of no sample."""
        return Tally(sums=dict.fromkeys(self.sums, 0.0), samples=0)

    def scores(self, test: Tally) -> Scores | None:
        """The scores of a test, the main one first; None where no sample was tested."""
        return self._scores(test.sums, test.samples) if test.samples else None

    def better(self, value: float, than: float) -> bool:
        """Is one value of the main score better than another one?"""
        return value > than if self.more_is_better else value < than

    def gain(self, before: float, now: float) -> float:
        """How much better the main score has become: below 0 where it is worse."""
        return now - before if self.more_is_better else before - now

    @abstractmethod
    def _scores(self, sums: Mapping[str, float], n: int) -> Scores: ...

    @abstractmethod
    def possible(self, test: Tally) -> bool:
        """Can these be the sums of a test, by their names and by what they mean?"""

    @abstractmethod
    def lost(self, before: Tally, now: Tally) -> bool:
        """Is a site's test that much worse than an earlier one that chance does not explain it?"""

    @abstractmethod
    def shown(self, value: float) -> str:
        """A value of the main score as people read it."""


class ClassScores(Scoring):
    """Of classes: the share of right answers."""

    target = "class"
    main = "accuracy"
    more_is_better = True
    sums = ("correct",)
    harm = "lost more than 10 points"

    def _scores(self, sums: Mapping[str, float], n: int) -> Scores:
        return {"accuracy": sums["correct"] / n}

    def possible(self, test: Tally) -> bool:
        """A count of at most all samples."""
        right = test.sums.get("correct", -1.0)
        return test.sums.keys() == set(self.sums) and 0 <= right <= test.samples and right % 1 == 0

    def lost(self, before: Tally, now: Tally) -> bool:
        """More than 10 points, and than the standard error of a share."""
        if not before.samples or not now.samples:
            return False
        p, q = before.sums["correct"] / before.samples, now.sums["correct"] / now.samples
        middle = (p + q) / 2
        error = _CHANCE * math.sqrt(middle * (1 - middle) / min(before.samples, now.samples))
        return p - q > LOST_SHARE + error

    def shown(self, value: float) -> str:
        """84.5%"""
        return f"{value:.1%}"


class NumberScores(Scoring):
    """Of numbers: the mean absolute error, the root of the mean squared error, and R2, the share of variance explained.

    Sums: `abs` and `sq` of the errors, in the numbers' own unit; `y` and `yy` of the numbers and their squares, from the
    mean that the sites agreed on, so that a large mean takes no digits from the variance.
    """

    target = "number"
    main = "mae"
    more_is_better = False
    sums = ("abs", "sq", "y", "yy")
    harm = "lost more than 0.1 of R2"

    def _scores(self, sums: Mapping[str, float], n: int) -> Scores:
        found = {"mae": sums["abs"] / n, "rmse": math.sqrt(sums["sq"] / n)}
        if (spread := _variance(sums, n)) > 0:
            # Numbers that are all equal have no variance to explain.
            found["r2"] = 1 - sums["sq"] / n / spread
        return found

    def possible(self, test: Tally) -> bool:
        """No negative square, and no sum larger than its squares allow (Cauchy and Schwarz)."""
        s, n = test.sums, test.samples
        if s.keys() != set(self.sums) or min(s["abs"], s["sq"], s["yy"]) < 0:
            return False
        pairs = ((s["abs"], s["sq"]), (s["y"], s["yy"]))
        return all(total**2 <= n * squares * (1 + 1e-6) for total, squares in pairs)

    def lost(self, before: Tally, now: Tally) -> bool:
        """More than a tenth of the site's variance, and than the standard error of a mean of squares (of normal errors)."""
        if not before.samples or not now.samples:
            return False
        spread = _variance(now.sums, now.samples)
        was, is_ = before.sums["sq"] / before.samples, now.sums["sq"] / now.samples
        error = _CHANCE * math.sqrt(2 / min(before.samples, now.samples)) * max(was, spread)
        return is_ - was > LOST_SHARE * spread + error

    def shown(self, value: float) -> str:
        """0.1234"""
        return f"{value:.4g}"


def _variance(sums: Mapping[str, float], n: int) -> float:
    mean = sums["y"] / n
    # What is left of equal numbers after rounding is no variance.
    return 0.0 if (found := sums["yy"] / n - mean**2) <= 1e-12 * sums["yy"] / n else found


CLASS_SCORES = ClassScores()
NUMBER_SCORES = NumberScores()
SCORINGS: Mapping[Target, Scoring] = {"class": CLASS_SCORES, "number": NUMBER_SCORES}


def scoring_of(sums: Iterable[str]) -> Scoring:
    """The scoring whose sums have these names; that of classes where none has."""
    names = set(sums)
    return next((s for s in SCORINGS.values() if names == set(s.sums)), CLASS_SCORES)
