"""One site's samples -> training and test. Called by the round; the test share never leaves the site either."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import ConfigError, DataError
from fedsplit.training.data.examples import Index


def train_test_split(
    labels: NDArray[np.integer],
    test_fraction: float,
    seed: int,
    *,
    site: str = "",
    groups: NDArray[np.integer] | None = None,
) -> tuple[Index, Index]:
    """Sorted positions of training and test samples, in the classes' proportions where that is possible.

    A class with a single sample trains; only where all classes are so, one of them tests. Both sides get at
    least one sample. With `groups` [N] a group goes whole to one side, chosen so that the test's classes come
    near their shares. Raises DataError for fewer than two samples, or two groups.
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
    if groups is not None:
        return _by_group(labels, groups, test_fraction, rng, site)
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    counts = _test_counts([len(m) for m in members], test_fraction, rng)
    test = np.concatenate([m[:count] for m, count in zip(members, counts, strict=True)])
    is_test = np.zeros(total, dtype=np.bool_)
    is_test[test] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _by_group(
    labels: NDArray[np.integer],
    groups: NDArray[np.integer],
    fraction: float,
    rng: np.random.Generator,
    site: str,
) -> tuple[Index, Index]:
    """Groups in random order; each tests if that brings the test's class counts nearer to the wanted ones."""
    names, number = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f"site {site!r}: all {len(labels)} samples are of one group, which cannot both train and test; "
            "at least two groups are needed, add more"
        )
    classes, label = np.unique(labels, return_inverse=True)
    table_GC = np.zeros((len(names), len(classes)))
    np.add.at(table_GC, (number, label), 1)
    missing_C = table_GC.sum(axis=0) * fraction
    tests = np.zeros(len(names), dtype=np.bool_)
    order = rng.permutation(len(names))
    for g in order[:-1]:  # the last one trains in any case
        after_C = missing_C - table_GC[g]
        if np.abs(after_C).sum() < np.abs(missing_C).sum():
            tests[g], missing_C = True, after_C
    if not tests.any():
        tests[order[np.argmin(table_GC[order].sum(axis=1))]] = True
    is_test = tests[number]
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
