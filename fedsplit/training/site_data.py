"""What one site trains and tests on: its own source, or its share of a partitioned one in simulation.

Which samples test is decided by their content, so a site sees the same ones in every round and in
every process. In simulation a process may be many sites: the source, its shares and what was
prepared of it are kept once for all of them. With `method=centralised` one node stands for all
sites and has the samples of all shares.

What is kept is kept of a state of the files: a real site's are looked at for each order, a simulation's once a run, in
which they do not change.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.bounded import Bounded
from fedsplit.core.config import RunConfig, TaskSection
from fedsplit.core.errors import DataError
from fedsplit.core.scores import Spread, Target
from fedsplit.model.backbone import Backbone
from fedsplit.training.data import (
    CachedTransform,
    Examples,
    ImageTransform,
    TextTransform,
    load_source,
    parse_partition,
    partition,
    stamp,
    train_test_split,
)
from fedsplit.training.data.loader import CACHE_BYTES
from fedsplit.training.data.sides import Record
from fedsplit.training.data.text_notes import text_facts, text_notes
from fedsplit.training.familiar import unfamiliar
from fedsplit.training.own_data import Own, open_own, without_test
from fedsplit.training.site_settings import SiteSettings

Index = NDArray[np.int64]


@dataclass(frozen=True)
class SiteData:
    """Samples of one site and what turns them into tensors."""

    examples: Examples
    train: Index
    test: Index
    test_everywhere: Index
    """Test samples of all sites where they are to be had (simulation); this site's own otherwise."""
    transform: CachedTransform
    notes: tuple[str, ...] = ()
    """What was guessed, left out or looks odd, a sentence each."""
    identity: Hashable = ""
    """What the samples' numbers belong to and what prepares them: one key for whatever is kept by these numbers."""

    @property
    def spread(self) -> Spread | None:
        """Where the numbers of the training samples lie; None where labels are classes."""
        if self.examples.numbers is None:
            return None
        numbers = self.examples.numbers[self.train]
        return Spread(mean=float(numbers.mean()), deviation=float(numbers.std()))


@dataclass(frozen=True, eq=False)
class _Shares:
    """A source dealt to all sites and split: (training, test) of each, and the test samples of all."""

    splits: tuple[tuple[Index, Index], ...]
    everywhere: Index
    notes: tuple[str, ...]

    @property
    def train(self) -> Index:
        return np.sort(np.concatenate([train for train, _ in self.splits]))


DATA_BYTES = 512 * 2**20
"""What samples that are held in memory may take, unless the one in use takes more."""
MAX_TRANSFORMS = 2
"""Backbones, or sizes of input, that samples stay prepared for."""
_MAX_STATES = 8
EVERY_SITE = "every site"
"""Who owns a source that is dealt: in errors that only show when a sample is read."""


class SiteSources:
    """Opens the samples of sites, and keeps what it read for the sites, rounds and runs that come next.

    Safe to use from several threads: of sites that open at once, one loads.
    """

    def __init__(
        self, *, data_bytes: int = DATA_BYTES, prepared_bytes: int = 2 * CACHE_BYTES
    ) -> None:
        """`data_bytes`: what samples in memory may take; `prepared_bytes`: what was made of them for the backbone."""
        self._lock = threading.Lock()
        self._data_bytes, self._prepared_bytes = data_bytes, prepared_bytes
        self.opened = Bounded(self._open, 32)
        # Of a run that is over nobody asks again; two for each that is not, as of roll call and after it.
        self.own = Bounded(self._open, 8)
        self.loaded = Bounded(_load, 4)
        self.dealt = Bounded(_deal, 4)
        self.transforms = Bounded(self._transform, MAX_TRANSFORMS)
        self._states = Bounded(lambda data, run: stamp(data), _MAX_STATES)  # noqa: ARG005
        self.full = False
        """Was there ever too little room for data sets beside the one in use?"""

    def open(
        self,
        config: RunConfig,
        site: SiteSettings,
        backbone: Backbone,
        classes: tuple[str, ...] | None,
        record: Record | None = None,
        *,
        run: str = "",
    ) -> SiteData:
        """Load, deal and split a site's samples. Raises DataError naming the site and the file.

        A real site gives the `record` of the sides that its samples have, and of those that this run uses. `run` is the
        one of a simulation, whose files are looked at once.
        """
        with self._lock:
            state = self._state(site.data or config.task.data, record, run)
            opened = self.opened if record is None else self.own
            own: SiteData = opened(config, site, backbone, classes, record, state)
            self._make_room(own.examples)
            return own

    def transform(self, config: RunConfig, backbone: Backbone) -> CachedTransform:
        """What prepares samples for this backbone. Raises BackboneError."""
        with self._lock:
            return self.transforms(backbone, config.task.image_size, config.task.max_length)

    def look(self, config: RunConfig, site: SiteSettings) -> Examples:
        """Read a real site's source as the next run's roll call does, which then finds it read. Raises DataError."""
        with self._lock:
            assert site.data
            state = self._state(site.data, None, "")
            return self.loaded(state, *_wanted(config, site, site.data, None, site.name))

    @property
    def prepared_full(self) -> bool:
        """Was there ever too little room for what was prepared?"""
        return any(transform.rows.full for transform in self.transforms.values)

    def limit(self, *, data_bytes: int, prepared_bytes: int) -> None:
        """Other bounds from now on."""
        with self._lock:
            self._data_bytes, self._prepared_bytes = data_bytes, prepared_bytes
            for transform in self.transforms.values:
                transform.rows.max_bytes = prepared_bytes // MAX_TRANSFORMS
            self._make_room(None)

    def forget(self) -> None:
        """Free all that is kept."""
        with self._lock:
            kept = (self.opened, self.own, self.loaded, self.dealt, self.transforms, self._states)
            for cached in kept:
                cached.clear()

    def _state(self, data: str, record: Record | None, run: str) -> str:
        """The state of a source's files: now, or as a simulation's first site found them."""
        if data.startswith("hf:"):
            return record.run if record else run
        if record is not None or not run:
            return stamp(data)
        return self._states(data, run)

    def _make_room(self, newest: Examples | None) -> None:
        """Let go of data sets beyond the bound, those of longest ago first and never the newest."""
        items = newest and newest.items
        while self._held() > self._data_bytes and (
            self.own.drop(lambda own: own.examples.items is not items)
            or self.opened.drop(lambda own: own.examples.items is not items)
            or self.loaded.drop(lambda one: one.items is not items)
        ):
            self.full = True

    def _held(self) -> int:
        opened = self.own.values + self.opened.values
        examples = [own.examples for own in opened] + self.loaded.values
        return sum({id(one.items): one.items.nbytes for one in examples}.values())

    def _open(
        self,
        config: RunConfig,
        site: SiteSettings,
        backbone: Backbone,
        classes: tuple[str, ...] | None,
        record: Record | None,
        state: str,
    ) -> SiteData:
        if record is not None and site.data is not None:
            own = self._open_own(config, site, site.data, classes, record, state)
            examples, train, test, everywhere = own.examples, own.train, own.test, own.test
            notes, listing = own.notes, own.listing
        else:
            examples = self._load_for(config, site, classes, state)
            train, test, everywhere, without = self._split(config, site, examples)
            notes, listing = (*examples.notes, *without), ""
        if examples.kind != backbone.family.kind:
            raise DataError(
                f"site {site.name!r}: {site.data or config.task.data} holds {examples.kind}s, backbone "
                f"{backbone.name!r} reads {backbone.family.kind}s; change data or backbone"
            )
        transform = self.transforms(backbone, config.task.image_size, config.task.max_length)
        named = replace(examples, site=site.name)
        notes = (*unfamiliar(backbone, named), *notes, *backbone.notes)
        # Sites of a simulation share the numbers of their source, whatever their names.
        source = _wanted(config, site, site.data or config.task.data, None, listing and site.name)
        identity = (
            listing, state if not listing else "", source, examples.pixel_max, backbone.sha256,
            config.task.image_size, config.task.max_length,
        )  # fmt: skip
        return SiteData(named, train, test, everywhere, transform, notes=notes, identity=identity)

    def _load_for(
        self, config: RunConfig, site: SiteSettings, classes: tuple[str, ...] | None, state: str
    ) -> Examples:
        if site.partition is None or site.data is not None:
            data = site.data or config.task.data
            wanted = _wanted(config, site, data, site.classes or classes, site.name)
            examples = self.loaded(state, *wanted)
            return examples.with_classes(classes) if classes and site.classes else examples
        try:
            wanted = _wanted(config, site, config.task.data, classes, EVERY_SITE)
            return self.loaded(state, *wanted)
        except DataError as err:
            # Loaded once for all; the fault is told by the site that met it, as with data of its own.
            raise DataError(str(err).replace(repr(EVERY_SITE), repr(site.name), 1)) from err

    def _open_own(
        self,
        config: RunConfig,
        site: SiteSettings,
        data: str,
        classes: tuple[str, ...] | None,
        record: Record,
        state: str,
    ) -> Own:
        def read(
            classes: tuple[str, ...] | None = None,
            *,
            listed: frozenset[str] | None = None,
            pixel_max: float = 0.0,
        ) -> Examples:
            if listed is None:
                wanted = _wanted(config, site, data, site.classes or classes, site.name)
                return self.loaded(state, *wanted)
            # What is on the list was of its classes; what has come since is not looked at.
            wanted = _wanted(config, site, data, None, site.name)
            told = {"max_samples": 0, "listed": listed}
            if pixel_max:
                told["pixel_max"] = pixel_max
            return load_source(**wanted._asdict() | told)

        return open_own(
            read,
            record,
            source=_source(config.task, data),
            fraction=config.task.test_fraction,
            classes=classes,
            declared=config.task.class_names is not None,
        )

    def _split(
        self, config: RunConfig, site: SiteSettings, examples: Examples
    ) -> tuple[Index, Index, Index, Sequence[str]]:
        """Training, test and everybody's test samples, and what there is to say of the classes."""
        if site.partition is None or site.data is not None:
            # Without the seed: real samples must not change sides from one run to another.
            train, test = train_test_split(
                examples.labels,
                examples.digests(),
                config.task.test_fraction,
                site=site.name,
                groups=examples.groups,
            )
            return train, test, test, without_test(examples, test)
        number, of = site.partition
        shares = self.dealt(
            examples,
            of,
            config.task.partition,
            config.task.test_fraction,
            config.run.seed,
            config.task.max_site_samples,
        )
        if config.run.method_description.gathers:
            return shares.train, shares.everywhere, shares.everywhere, shares.notes
        return (*shares.splits[number], shares.everywhere, shares.notes)

    def _transform(self, backbone: Backbone, image_size: int, max_length: int) -> CachedTransform:
        inner: ImageTransform | TextTransform
        if backbone.family.kind == "image":
            inner = ImageTransform.from_backbone(backbone.path, image_size=image_size)
        else:
            inner = TextTransform.from_backbone(backbone.path, max_length)
        return CachedTransform(inner, cache_bytes=self._prepared_bytes // MAX_TRANSFORMS)


class _Wanted(NamedTuple):
    """Arguments of `load_source`."""

    spec: str
    site: str
    classes: tuple[str, ...] | None
    max_samples: int
    text_column: str
    label_column: str
    pixel_max: float
    leave_out_broken: bool
    target: Target


def _wanted(
    config: RunConfig,
    site: SiteSettings,
    data: str,
    classes: tuple[str, ...] | None,
    name: str,
) -> _Wanted:
    return _Wanted(
        data,
        name,
        classes,
        config.task.max_samples,
        config.task.text_column,
        config.task.label_column,
        site.pixel_max or config.task.pixel_max,
        config.task.broken_files == "leave-out",
        config.task.target,
    )


def _load(state: str, *wanted: Any) -> Examples:
    del state
    return load_source(**_Wanted(*wanted)._asdict())


def _source(task: TaskSection, data: str) -> str:
    """What a site's lists are of: a source, and how it is read."""
    told = [task.name, data, task.text_column, task.label_column]
    return "\n".join(told if task.target == "class" else [*told, task.target])


def with_text_notes(own: SiteData) -> SiteData:
    """The same with what the tokenizer makes of its texts, which takes a pass over all of them; nothing for images."""
    inner = own.transform.inner
    if not isinstance(inner, TextTransform):
        return own
    notes = text_notes(text_facts(own.examples, inner), len(own.examples))
    return replace(own, notes=(*own.notes, *notes))


def _deal(
    examples: Examples, of: int, spec: str, test_fraction: float, seed: int, most: int
) -> _Shares:
    """All sites' shares at once: a process that is 1,000 sites deals once, not 1,000 times."""
    dealt = partition(examples.labels, parse_partition(spec), of, seed, examples.groups)
    splits = []
    if most:
        # After the dealing, so that partitions which deal more or less out can be compared at one size.
        rng = np.random.default_rng([seed, most])
        dealt = [np.sort(rng.permutation(share)[:most]) for share in dealt]
    digests = examples.digests()
    for i, share in enumerate(dealt):
        train, test = train_test_split(
            examples.labels[share],
            digests[share],
            test_fraction,
            seed=seed,
            site=f"site-{i}",
            groups=None if examples.groups is None else examples.groups[share],
        )
        splits.append((share[train], share[test]))
    everywhere = np.sort(np.concatenate([test for _, test in splits]))
    used = examples.subset(np.sort(np.concatenate(dealt)))
    tests = np.flatnonzero(np.isin(used.keys, examples.keys[everywhere]))
    return _Shares(tuple(splits), everywhere, tuple(without_test(used, tests)))
