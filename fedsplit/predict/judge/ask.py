"""From which probability on an answer may stand without a person.

A threshold that is chosen on samples looks better on them than it is. So its wrong answers are bounded as Geifman and
El-Yaniv do (Selective classification for deep neural networks, arXiv 1705.08500): the places that the search looks at
share the doubt among them, and the bound holds for later samples of the same kind with 95 % certainty, for each class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.intervals import upper_share

DOUBT = 0.05
"""How likely the bound may be wrong."""


@dataclass(frozen=True)
class Asking:
    """When to ask a person about one class."""

    threshold: float | None
    """Below this probability ask; None: these samples allow no threshold, so ask always."""
    answered: float
    """Share of the module's answers of this class that reach it."""
    wrong: int
    """Of those, in these samples."""
    bound: float | None
    """The share of wrong answers stays below this, with 95 % certainty."""


NEVER = Asking(threshold=None, answered=0.0, wrong=0, bound=None)


def answers_needed(risk: float, answers: int) -> int:
    """How many of `answers` must be right, without an error, before a threshold can be shown to keep `risk`."""
    looks = _looks(answers)
    return math.ceil(math.log(DOUBT / looks) / math.log1p(-risk))


def _looks(places: int) -> int:
    return max(1, math.ceil(math.log2(places + 1)))


def asking(sure: NDArray[np.float64], right: NDArray[np.bool_], risk: float) -> Asking:
    """The lowest threshold whose bound is at most `risk`, of answers [n] with these probabilities."""
    if not len(sure):
        return NEVER
    order = np.argsort(-sure, kind="stable")
    sure, wrong = sure[order], np.cumsum(~right[order])
    # Where a threshold can stand: behind the last of equal probabilities.
    ends = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))
    looks = _looks(len(ends))
    best = NEVER
    low, high = 0, len(ends) - 1
    for _ in range(looks):
        if low > high:
            break
        middle = (low + high + 1) // 2
        end = int(ends[middle])
        bound = upper_share(int(wrong[end]), end + 1, DOUBT / looks)
        if bound <= risk:
            best = Asking(float(sure[end]), (end + 1) / len(sure), int(wrong[end]), bound)
            low = middle + 1
        else:
            high = middle - 1
    return best
