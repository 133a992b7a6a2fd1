"""Examples: labels and classes in memory, the samples themselves read when asked for.

Every source (tables.py, folder.py, arrays.py, hub.py) ends in `build`, so labels are checked and numbered
in one place. The loader and the round read `Examples`; nothing here knows file formats.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.class_names import EMPTY_WORDS, look_alikes, normal, plain, whole_numbers
from fedsplit.core.errors import ConfigError, DataError
from fedsplit.core.foreign import MAX_CLASS_CHARS, MAX_CLASSES, checked_name, printable
from fedsplit.core.scores import NUMBER, Target
from fedsplit.model.families import InputKind
from fedsplit.training.data.numbers import Numbers, read_numbers

Image = NDArray[np.uint8]
Index = NDArray[np.int64]
Digests = NDArray[np.uint64]

_SUBSAMPLE_SEED = 0
_NAMES_SHOWN = 20
_GROUPS_SHOWN = 10


class Items(Protocol):
    """What a source gives: the samples in its own order, each with a place that a person can look up."""

    def get(self, i: int) -> Image | str:
        """Sample `i`: uint8 [H, W, 3] or a text. Raises DataError when it cannot be read."""
        ...

    def origin(self, i: int) -> str:
        """Where sample `i` lies: a path, a path with a line, or an array with a position."""
        ...

    def digest(self, i: int) -> int:
        """`digest_of` what sample `i` is made of, without its label: equal samples have equal ones."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that the samples take, about."""
        ...


def digest_of(content: bytes) -> int:
    """64 bits of a sample's content. They decide on which side of the split it is."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Request:
    """What the caller of `load_source` wants; handed to every source unchanged."""

    site: str
    """Empty where the data are no site's."""
    classes: tuple[str, ...] | None = None
    max_samples: int = 0
    text_column: str = "text"
    label_column: str = "label"
    pixel_max: float = 0.0
    """The value of white in the source's images; 0: found out from all of them."""
    leave_out_broken: bool = False
    """Files that cannot be read are left out and told, and no fault."""
    target: Target = "class"
    """What the labels are."""
    listed: frozenset[str] | None = None
    """Paths of the files that were there at roll call: others are passed over unseen, those that are gone are no fault."""

    def __post_init__(self) -> None:
        if self.max_samples < 0:
            raise ConfigError(f"max-samples={self.max_samples} is negative; use 0 for all samples")
        if self.classes is not None:
            _check_classes(self.classes)

    def fault(self, where: object, problem: str) -> DataError:
        """The error for a fault in this site's data; `problem` ends with what to do."""
        # A path may hold bytes that no terminal can show.
        place = printable(where, limit=1000)
        return DataError(
            f"site {self.site!r}: {place}: {problem}" if self.site else f"{place}: {problem}"
        )


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled samples of one site. `labels` [N] are positions in `classes`; numbers are apart, and are of one class."""

    kind: InputKind
    labels: Index
    classes: tuple[str, ...]
    site: str
    items: Items
    """All samples of the source; this selection is `keys` of them."""
    keys: Index
    """[N], a sample's position in its source: stable across `subset`, so caches can name it."""
    groups: Index | None = None
    """[N], the number of the group that a sample belongs to (the board a crop was cut from); None: each
    stands for itself. A group is never on two sites, nor in both training and test."""
    notes: tuple[str, ...] = ()
    """What reading guessed, left out or found odd, a sentence each; told at roll call and by `fedsplit data`."""
    pixel_max: float = 0.0
    """The value that was read as white; 0 for texts."""
    numbers: Numbers | None = None
    """[N], the labels where they are numbers, in their own unit."""

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image:
        """Sample `i` as uint8 [H, W, 3] in RGB. Raises DataError naming site and file."""
        item = self.items.get(int(self.keys[i]))
        if isinstance(item, str):
            raise TypeError("these examples are texts; use text(i)")
        return item

    def text(self, i: int) -> str:
        """Sample `i` as a string."""
        item = self.items.get(int(self.keys[i]))
        if not isinstance(item, str):
            raise TypeError("these examples are images; use image(i)")
        return item

    def origin(self, i: int) -> str:
        """Where sample `i` comes from, for error messages."""
        return self.items.origin(int(self.keys[i]))

    def with_notes(self, items: Items, *, pixel_max: float, notes: Sequence[str]) -> Examples:
        """The same samples, read as now known: `items` have the same order."""
        told = tuple(dict.fromkeys((*self.notes, *notes)))
        return replace(self, items=items, pixel_max=pixel_max, notes=told)

    def digests(self) -> Digests:
        """[N] uint64, of what the samples are made of. Reads them all, once. Raises DataError."""
        return self._digests.copy()

    @functools.cached_property
    def _digests(self) -> Digests:
        found = (self.items.digest(int(key)) for key in self.keys)
        return np.fromiter(found, dtype=np.uint64, count=len(self.keys))

    def subset(self, indices: Sequence[int] | NDArray[np.integer]) -> Examples:
        """The samples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        groups = None if self.groups is None else self.groups[chosen]
        numbers = None if self.numbers is None else self.numbers[chosen]
        labels, keys = self.labels[chosen], self.keys[chosen]
        return replace(self, labels=labels, keys=keys, groups=groups, numbers=numbers)

    def with_classes(self, classes: tuple[str, ...]) -> Examples:
        """The same samples numbered after other classes, such as the union of all sites' classes."""
        if self.numbers is not None:
            return self
        _check_classes(classes)
        names = [self.classes[label] for label in self.labels]
        request = Request(site=self.site, classes=classes)
        labels, _ = _number(request, names, self)
        return replace(self, labels=labels, classes=classes)


class _HasOrigin(Protocol):
    def origin(self, i: int) -> str: ...


def build(
    request: Request,
    where: object,
    kind: InputKind,
    *,
    items: Items,
    names: Sequence[str],
    groups: Index | None = None,
) -> Examples:
    """Number the label `names` of all `items` and keep at most `max_samples`, chosen alike every time.

    `groups` has one number for each item, or is None where samples do not belong together.
    """
    if len(names) == 0:
        raise request.fault(where, "there is no sample in it; add labelled samples")
    numbers: Numbers | None = None
    notes: list[str] = []
    if request.target == "number":
        numbers = read_numbers(request, [name.strip() for name in names], items)
        labels, classes = np.zeros(len(names), dtype=np.int64), NUMBER
    else:
        names, notes = _spelled(request, names, items)
        labels, classes = _number(request, names, items)
        _check_names(request, where, classes)
    keys = np.arange(len(names), dtype=np.int64)
    if 0 < request.max_samples < len(keys):
        rng = np.random.default_rng(_SUBSAMPLE_SEED)
        keys = np.sort(rng.permutation(keys)[: request.max_samples])
    if len(keys) < 2:
        raise request.fault(
            where, "only one sample; training and testing need at least two, add more"
        )
    kept = None if groups is None else groups[keys]
    numbers = None if numbers is None else numbers[keys]
    return Examples(
        kind, labels[keys], classes, request.site, items, keys, kept, tuple(notes), numbers=numbers
    )


def _spelled(
    request: Request, names: Sequence[str], items: _HasOrigin
) -> tuple[list[str], list[str]]:
    """Label names in one spelling, and what there is to say of those that look alike."""
    names = [normal(name) for name in names]
    # As the task spells them, so that "1.0" here is the "1" of the others.
    ways = {plain(name): name for name in request.classes or ()}
    declared = set(map(normal, request.classes or ()))
    names = [name if name in declared else ways.get(plain(name), name) for name in names]
    if request.listed is not None:
        return names, []  # Told, and asked, at roll call.
    notes = []
    if not declared and (whole := whole_numbers(set(names))):
        first = min(whole)
        notes.append(f"labels such as {first!r} are read as {whole[first]!r}")
        names = [whole.get(name, name) for name in names]
    for i, name in enumerate(names):
        if name.casefold() in EMPTY_WORDS and name not in declared:
            raise request.fault(
                items.origin(i),
                f"the label is {name!r}, which stands for a label that is not there; label the sample, remove it, or name "
                f"{name!r} in classes if it is a class",
            )
    alike = look_alikes(set(names))
    for group in alike[:_GROUPS_SHOWN]:
        shown = ", ".join(repr(printable(name, limit=60)) for name in group)
        notes.append(f"the classes {shown} look alike; if they are one, give them one name")
    if len(alike) > _GROUPS_SHOWN:
        notes.append(f"{len(alike) - _GROUPS_SHOWN} more groups of classes look alike")
    return names, notes


def _number(
    request: Request, names: Sequence[str], items: _HasOrigin
) -> tuple[Index, tuple[str, ...]]:
    """Label names -> positions in the declared classes, or else in the sorted names that occur."""
    for i, name in enumerate(names):
        if not name:
            raise request.fault(
                items.origin(i), "the label is empty; label the sample or remove it"
            )
    classes = request.classes or tuple(sorted(set(names)))
    number = {normal(name): i for i, name in enumerate(classes)}
    labels = np.empty(len(names), dtype=np.int64)
    for i, name in enumerate(names):
        if name not in number:
            raise request.fault(
                items.origin(i),
                f"label {name[:200]!r} is not one of the task's classes: {_shown(classes)}; "
                "correct the label or declare the class in the task",
            )
        labels[i] = number[name]
    return labels, classes


def _check_names(request: Request, where: object, classes: Sequence[str]) -> None:
    """Names of classes leave the site, so what looks like free text is refused before it does."""
    longest = max(map(len, classes))
    if len(classes) > MAX_CLASSES or longest > MAX_CLASS_CHARS:
        raise request.fault(
            where,
            f"the labels are {len(classes)} different texts of up to {longest} characters; a task has at most "
            f"{MAX_CLASSES} classes with names of at most {MAX_CLASS_CHARS} characters. Is this the label? Name the "
            "right column as label-column, or shorten the names",
        )
    for name in classes:
        try:
            checked_name(name)
        except ValueError as err:
            raise request.fault(where, f"the class {err}") from err


def _shown(classes: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in classes[:_NAMES_SHOWN])
    more = len(classes) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _check_classes(classes: tuple[str, ...]) -> None:
    if not classes or not all(classes):
        raise ConfigError(
            f"classes={classes!r} is empty or has an empty name; name each class once"
        )
    if len(set(classes)) < len(classes):
        twice = sorted({name for name in classes if classes.count(name) > 1})
        raise ConfigError(f"the classes {twice} are declared more than once; name each class once")
