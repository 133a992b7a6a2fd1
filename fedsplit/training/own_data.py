"""A real site's samples: listed at roll call, split by sides that stay, and found again in every later message.

Files come and go while a run lasts; the run uses what was there at roll call.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.class_names import plain
from fedsplit.core.errors import DataError
from fedsplit.core.foreign import printable
from fedsplit.training.data.examples import Digests, Examples, Image, Index, Items
from fedsplit.training.data.sides import Listed, Record
from fedsplit.training.data.split import TEST, TRAIN, UNKNOWN, Sides, train_test_split, untested

_NAMES_SHOWN = 10


class Read(Protocol):
    """Reads the site's source."""

    def __call__(
        self,
        classes: tuple[str, ...] | None = None,
        *,
        listed: frozenset[str] | None = None,
        pixel_max: float = 0.0,
    ) -> Examples:
        """At roll call: the samples of the settings' choice, whose labels must be in `classes` where these are declared.

        Later, with what is `listed`: all that are there, of single files those of the list, with the value of white that was
        found at roll call. Raises DataError.
        """
        ...


@dataclass(frozen=True)
class Own:
    """A site's samples and their sides."""

    examples: Examples
    train: Index
    test: Index
    notes: tuple[str, ...]
    listing: str
    """A digest of the list of which the samples' numbers are places."""


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The items of a list, by their place in it; `at` [N] is where they are in the source now, -1: nowhere."""

    items: Items
    at: Index

    def get(self, i: int) -> Image | str:
        return self.items.get(int(self.at[i]))

    def origin(self, i: int) -> str:
        return self.items.origin(int(self.at[i]))

    def digest(self, i: int) -> int:
        return self.items.digest(int(self.at[i]))

    @property
    def nbytes(self) -> int:
        return self.items.nbytes + self.at.nbytes


def open_own(
    read: Read,
    record: Record,
    *,
    source: str,
    fraction: float,
    classes: tuple[str, ...] | None,
    declared: bool,
) -> Own:
    """The samples of the run's list, which is made where there is none.

    `classes`: the run's in its order, None before they are known; `declared` ones are all that labels may be, others are
    what the run has and the site may have more. Raises DataError, and RunDirError where the list cannot be kept.
    """
    listed = record.listed(source)
    if listed is None:
        with record.alone():
            return _first(read, record, source, fraction, classes, declared)
    found = read(listed=frozenset(listed.origins), pixel_max=listed.pixel_max)
    at = _places(listed, found)
    here = np.flatnonzero(at >= 0)
    notes = found.notes + _lost(listed, len(here), record.site)
    own = listed.sides[here]
    if not {TRAIN, TEST} <= set(own.tolist()):
        raise DataError(
            f"site {record.site!r}: of the {len(at)} samples that it had at roll call {len(here)} are left, not enough "
            "to train and to test; put the files back, or start a new run"
        )
    numbers, names = None, found.classes
    if found.numbers is None:
        names = classes or listed.classes
        labels = _labels(listed, names, record.site)[here]
    else:
        labels = np.zeros(len(here), np.int64)
        numbers = np.array([float(text) for text in listed.classes])[listed.labels[here]]
    examples = replace(
        found,
        labels=labels,
        classes=names,
        numbers=numbers,
        items=_Chosen(found.items, at),
        keys=here.astype(np.int64),
        groups=None,
    )
    train, test = (np.flatnonzero(own == side) for side in (TRAIN, TEST))
    return Own(examples, train, test, notes, _listing(listed.digests))


def _listing(digests: Digests) -> str:
    return hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()


def _labels(listed: Listed, names: tuple[str, ...], site: str) -> Index:
    """[N], the list's labels as positions in the run's classes. Raises DataError where these are without one."""
    number = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(listed.classes) - number.keys()):
        raise DataError(
            f"site {site!r}: it told its class {unknown[0]!r} at roll call, the run's classes are without it"
        )
    return np.array([number[name] for name in listed.classes], dtype=np.int64)[listed.labels]


def _named(examples: Examples) -> tuple[Index, tuple[str, ...]]:
    """[N] labels and their names as a list keeps them: of classes those that occur, of numbers each as text."""
    if examples.numbers is not None:
        values, places = np.unique(examples.numbers, return_inverse=True)
        return places.astype(np.int64), tuple(map(repr, values.tolist()))
    used, places = np.unique(examples.labels, return_inverse=True)
    return places.astype(np.int64), tuple(examples.classes[i] for i in used)


def _first(
    read: Read,
    record: Record,
    source: str,
    fraction: float,
    classes: tuple[str, ...] | None,
    declared: bool,
) -> Own:
    """Make the run's list, and sides for the samples that have none."""
    found = read(classes if declared else None)
    notes = list(found.notes)
    if classes is not None:
        found, more = _without_others(found, classes)
        notes += more
    stamps, digests = _stamps(found), found.digests()
    if record.damaged:
        notes.append(
            "what this site kept about which samples test cannot be read: all samples were dealt anew"
        )
    known = record.sides(digests)
    train, test = train_test_split(
        found.labels, digests, fraction, site=record.site, groups=found.groups, known=known
    )
    sides = np.full(len(digests), TRAIN, np.int8)
    sides[test] = TEST
    notes += _changes(record.last(source), digests, sides)
    notes += _fraction(fraction, sides, known)
    notes += without_test(found, test)
    record.add(digests, sides)
    labels, names = _named(found)
    files = stamps is not None
    listed = Listed(
        digests=digests,
        sides=sides,
        labels=labels,
        classes=names,
        origins=tuple(found.origin(i) for i in range(len(found))) if files else (),
        stamps=stamps if stamps is not None else np.zeros((0, 2), np.int64),
        pixel_max=found.pixel_max,
    )
    record.keep(source, listed)
    places = np.arange(len(found), dtype=np.int64)
    examples = replace(found, items=_Chosen(found.items, found.keys), keys=places)
    return Own(examples, train, test, tuple(notes), _listing(digests))


def _without_others(found: Examples, classes: tuple[str, ...]) -> tuple[Examples, list[str]]:
    """The samples of the run's classes: one that goes on takes no new classes in."""
    known = np.array([name in classes for name in found.classes])
    others = [name for name, good in zip(found.classes, known, strict=True) if not good]
    kept = found.subset(np.flatnonzero(known[found.labels]))
    if not len(kept):
        raise DataError(
            f"site {found.site!r}: no sample of the run's classes is left; it has {_names(others)} alone"
        )
    notes = [
        f"{len(found) - len(kept)} samples of {_names(others)} are not used: the run that goes on does not know these "
        "classes"
    ]
    return kept.with_classes(classes), notes if others else []


def _stamps(examples: Examples) -> NDArray[np.int64] | None:
    """Size and time of change of each sample's file; None where samples are not files of their own."""
    stamps = np.zeros((len(examples), 2), np.int64)
    for i in range(len(examples)):
        stamp = _stamp(examples.origin(i))
        if stamp is None:
            return None
        stamps[i] = stamp
    return stamps


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        info = Path(path).stat()
    except (OSError, ValueError):
        return None
    return info.st_size, info.st_mtime_ns


def _places(listed: Listed, found: Examples) -> Index:
    """[N], the key of each listed sample in the source as it is now; -1 where it is gone or changed."""
    digests = _digests(listed, found)
    free: dict[tuple[int, str], list[int]] = defaultdict(list)
    # The list has the classes as the run spells them, the source as it does itself.
    labels, told = _named(found)
    own, listed_as = [plain(c) for c in told], [plain(c) for c in listed.classes]
    names = [own[label] for label in labels]
    pairs = zip(digests.tolist(), names, found.keys.tolist(), strict=True)
    for digest, name, key in pairs:
        free[digest, name].append(key)
    for copies in free.values():
        copies.reverse()  # They are taken in their order.
    at = np.full(len(listed.digests), -1, np.int64)
    for i, (digest, label) in enumerate(
        zip(listed.digests.tolist(), listed.labels.tolist(), strict=True)
    ):
        if keys := free.get((digest, listed_as[label])):
            at[i] = keys.pop()
    return at


def _digests(listed: Listed, found: Examples) -> Digests:
    """The samples' digests; a file that has not changed since it was listed is not read for it."""
    known = (
        {
            origin: (tuple(stamp), digest)
            for origin, stamp, digest in zip(
                listed.origins, listed.stamps.tolist(), listed.digests.tolist(), strict=True
            )
        }
        if listed.origins
        else {}
    )
    digests = np.empty(len(found), np.uint64)
    for i, key in enumerate(found.keys.tolist()):
        origin = found.origin(i)
        stamp, digest = known.get(origin, (None, 0))
        same = stamp is not None and stamp == _stamp(origin)
        digests[i] = digest if same else found.items.digest(key)
    return digests


def _lost(listed: Listed, here: int, site: str) -> tuple[str, ...]:
    total = len(listed.digests)
    if here == total:
        return ()
    return (
        f"{total - here} of the {total} samples that site {printable(site)} had at roll call are gone or changed; the run "
        "goes on without them",
    )


def _changes(last: Listed | None, digests: Digests, sides: Sides) -> list[str]:
    """What came and went since the run before."""
    if last is None:
        return []
    new = ~np.isin(digests, last.digests)
    gone = int((~np.isin(last.digests, digests)).sum())
    notes = []
    if count := int(new.sum()):
        tests = int((sides[new] == TEST).sum())
        notes.append(f"{count} new samples since the last run: {count - tests} train, {tests} test")
    if gone:
        notes.append(f"{gone} samples of the last run are gone or changed")
    return ["; ".join(notes)] if notes else []


def _fraction(fraction: float, sides: Sides, known: Sides) -> list[str]:
    """That sides of earlier runs are at odds with the share that this run asks for."""
    total, tests = len(sides), int((sides == TEST).sum())
    if not (known != UNKNOWN).any() or abs(tests - fraction * total) <= max(2, 0.05 * total):
        return []
    return [
        f"{tests} of {total} samples test, test-fraction={fraction:g} asks for another share: samples keep the sides that "
        "they had in earlier runs"
    ]


def without_test(examples: Examples, test: Index) -> list[str]:
    """That classes have no test sample: nobody will see how well they are told apart."""
    if not (missing := untested(examples.labels, test)):
        return []
    names = [examples.classes[label] for label in missing]
    return [f"no sample of {_names(names)} tests: a class needs two that differ"]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, limit=60) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return (
        f"class {shown}"
        if len(names) == 1
        else f"classes {shown}" + (f" and {more} more" if more > 0 else "")
    )
