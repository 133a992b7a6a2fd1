"""One site's samples -> training and test. Called by the round; the test share never leaves the site either."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import ConfigError, DataError
from fedsplit.training.data.examples import Index


def train_test_split(
    labels: NDArray[np.integer], test_fraction: float, seed: int, *, site: str = ""
) -> tuple[Index, Index]:
    """Sorted positions of training and test samples, in the classes' proportions where that is possible.

    A class with a single sample trains; only where all classes are so, one of them tests. Both sides get at
    least one sample. Raises DataError for fewer than two samples.
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"test-fraction={test_fraction} is not between 0 and 1")
    total = len(labels)
    if total < 2:
        raise DataError(
            f"site {site!r}: {total} samples cannot be split into training and test; "
            "at least two are needed, add more"
        )
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    counts = _test_counts([len(m) for m in members], test_fraction, rng)
    test = np.concatenate([m[:count] for m, count in zip(members, counts, strict=True)])
    is_test = np.zeros(total, dtype=np.bool_)
    is_test[test] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _test_counts(sizes: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    """How many of each class test: shares rounded down, what is left goes to the largest remainders."""
    if max(sizes) == 1:
        chosen = int(rng.integers(len(sizes)))
        return [int(i == chosen) for i in range(len(sizes))]
    counts = [math.floor(size * fraction) for size in sizes]
    remainder = [size * fraction - count for size, count in zip(sizes, counts, strict=True)]
    open_places = [i for i, size in enumerate(sizes) if counts[i] < size - 1]
    open_places.sort(key=lambda i: (-remainder[i], i))
    missing = max(1, round(sum(sizes) * fraction)) - sum(counts)
    for i in open_places[: max(0, missing)]:
        counts[i] += 1
    return counts
