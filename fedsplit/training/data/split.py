"""One site's samples -> training and test, by a digest of each sample and never by its position.

So files that come or go move no other sample, and samples of equal content are on one side. The
sides that a site's samples once got are kept by sides.py. The test share never leaves the site
either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import ConfigError, DataError
from fedsplit.training.data.examples import Digests, Index

Sides = NDArray[np.int8]
"""[N], the side of each sample."""
UNKNOWN, TRAIN, TEST = -1, 0, 1


def train_test_split(
    labels: NDArray[np.integer],
    digests: Digests,
    test_fraction: float,
    *,
    seed: int = 0,
    site: str = "",
    groups: NDArray[np.integer] | None = None,
    known: Sides | None = None,
) -> tuple[Index, Index]:
    """Sorted positions of training and test samples, in the classes' proportions where that is possible.

    `digests` [N] decide: within a class the samples are dealt in an order that they give, another one for each `seed`.
    Equal digests are one side's; with `groups` [N] those of a group are instead. Sides that are `known` stay, and the
    others are dealt so as to bring each class near its share. A class of two tests one sample at least, a class of one
    trains; both sides get at least one sample. Raises DataError where there are fewer than two that can be told apart.
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"test-fraction={test_fraction} is not between 0 and 1")
    total = len(labels)
    if total < 2:
        raise DataError(
            f"site {site!r}: {total} samples cannot be split into training and test; "
            "at least two are needed, add more"
        )
    scores = _mixed(digests, seed)
    sides = np.full(total, UNKNOWN, np.int8) if known is None else known.copy()
    units = _units(scores if groups is None else groups, scores, labels, sides)
    if len(units) < 2:
        raise DataError(_one_unit(site, total, grouped=groups is not None))
    _deal(units, test_fraction)
    _fill(units, site)
    for unit in units:
        # A group may hold samples of both sides, from when they were not of one group: those stay.
        members = unit.members[sides[unit.members] == UNKNOWN]
        sides[members] = unit.side
    return np.flatnonzero(sides == TRAIN), np.flatnonzero(sides == TEST)


def _one_unit(site: str, total: int, *, grouped: bool) -> str:
    if grouped:
        return (
            f"site {site!r}: all {total} samples are of one group, which cannot both train and test; "
            "at least two groups are needed, add more"
        )
    return (
        f"site {site!r}: all {total} samples have the same content, which cannot both train and test; "
        "add other samples"
    )


@dataclass(slots=True)
class _Unit:
    """Samples that go to one side together."""

    members: Index
    counts: list[tuple[int, int]]
    """(class, samples of it)."""
    side: int
    fixed: bool
    """Did it have its side before?"""


def _mixed(digests: Digests, seed: int) -> Digests:
    """The digests in another order for each seed: SplitMix64's finaliser (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = digests + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _units(
    keys: NDArray[np.integer], scores: Digests, labels: NDArray[np.integer], sides: Sides
) -> list[_Unit]:
    """Samples of equal `keys`, ordered by their least score; one whose members are of both sides trains."""
    order = np.lexsort((scores, keys))
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[0]]) != 0)
    parts = np.split(order, starts)
    parts.sort(key=lambda part: int(scores[part[0]]))
    classes = labels.tolist()
    told = sides.tolist()
    units = []
    for part in parts:
        members = part.tolist()
        known = {told[i] for i in members} - {UNKNOWN}
        counts = Counter(classes[i] for i in members)
        side = min(known, default=UNKNOWN)
        units.append(_Unit(part, sorted(counts.items()), side, side != UNKNOWN))
    return units


def _deal(units: Sequence[_Unit], fraction: float) -> None:
    """In their order: a unit tests if that brings the test's class counts nearer to the wanted ones."""
    missing = _wanted(units, fraction)
    for unit in units:
        if unit.side == TEST:
            for label, count in unit.counts:
                missing[label] -= count
    for unit in units:
        if unit.fixed:
            continue
        nearer = sum(abs(missing[c] - n) - abs(missing[c]) for c, n in unit.counts) < 0
        unit.side = TEST if nearer else TRAIN
        if nearer:
            for label, count in unit.counts:
                missing[label] -= count


def _wanted(units: Sequence[_Unit], fraction: float) -> Counter[int]:
    """How many of each class test: shares rounded down, what is left goes to the largest remainders."""
    sizes: Counter[int] = Counter()
    parts: Counter[int] = Counter()
    for unit in units:
        for label, count in unit.counts:
            sizes[label] += count
            parts[label] += 1
    counts = Counter({c: math.floor(size * fraction) for c, size in sizes.items()})
    open_places = [c for c, size in sizes.items() if counts[c] < size - 1]
    open_places.sort(key=lambda c: (counts[c] - sizes[c] * fraction, c))
    missing = max(1, round(sizes.total() * fraction)) - counts.total()
    for label in open_places[: max(0, missing)]:
        counts[label] += 1
    for label, several in parts.items():
        if several > 1:
            counts[label] = max(1, counts[label])
    return counts


def _fill(units: Sequence[_Unit], site: str) -> None:
    """A test for each class that has none and can spare one, and a unit for each side. Raises DataError."""
    held = {side: Counter[int]() for side in (TRAIN, TEST)}
    parts: Counter[int] = Counter()
    for unit in units:
        held[unit.side].update(dict(unit.counts))
        parts.update(label for label, _ in unit.counts)
    for label, several in sorted(parts.items()):
        if several < 2 or held[TEST][label]:
            continue
        for unit in units:
            counts = dict(unit.counts)
            spare = all(held[TRAIN][c] > n for c, n in unit.counts)
            if not unit.fixed and unit.side == TRAIN and label in counts and spare:
                unit.side = TEST
                held[TRAIN].subtract(counts)
                held[TEST].update(counts)
                break
    for side, other in ((TEST, TRAIN), (TRAIN, TEST)):
        if held[side].total():
            continue
        free = [unit for unit in units if not unit.fixed]
        if not free:
            name = "testing" if other == TEST else "training"
            raise DataError(
                f"site {site!r}: all samples that are left were for {name} in earlier runs and stay so; add others"
            )
        smallest = min(free, key=lambda unit: sum(n for _, n in unit.counts))
        smallest.side = side
        held[side].update(dict(smallest.counts))


def untested(labels: NDArray[np.integer], test: Index) -> list[int]:
    """The labels that occur and of which no sample tests."""
    missing: list[int] = np.setdiff1d(labels, labels[test]).tolist()
    return missing
