"""Scores as sums that add over sites: what a test comes to, and how good that is. Without torch.

A site sends sums over its test samples, never a mean: the sums of all sites make the scores of all. A task names its
scoring (training/task.py); guard, ledger, early stopping, tables and plots ask it and name no score themselves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

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

LOST_SHARE = 0.10
# Standard errors that chance explains.
_CHANCE = 2.0


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


class Scoring(ABC):
    """How the sums of one kind of task become scores."""

    target: ClassVar[Target]
    main: ClassVar[str]
    """The score that modules are compared by."""
    more_is_better: ClassVar[bool]
    sums: ClassVar[frozenset[str]]
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
    sums = frozenset({"correct"})
    harm = "lost more than 10 points"

    def _scores(self, sums: Mapping[str, float], n: int) -> Scores:
        return {"accuracy": sums["correct"] / n}

    def possible(self, test: Tally) -> bool:
        """A count of at most all samples."""
        right = test.sums.get("correct", -1.0)
        return test.sums.keys() == self.sums and 0 <= right <= test.samples and right % 1 == 0

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


CLASS_SCORES = ClassScores()
SCORINGS: Mapping[Target, Scoring] = {"class": CLASS_SCORES}


def scoring_of(sums: Iterable[str]) -> Scoring:
    """The scoring whose sums have these names; that of classes where none has."""
    names = set(sums)
    return next((s for s in SCORINGS.values() if names == s.sums), CLASS_SCORES)
