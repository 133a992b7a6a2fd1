"""What one site trains and tests on: its own source, or its share of a partitioned one in simulation.

Which samples test is decided by their content, so a site sees the same ones in every round and in
every process. In simulation a process may be many sites: the source, its shares and what was
prepared of it are kept once for all of them. With `method=centralised` one node stands for all
sites and has the samples of all shares.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

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
    train_test_split,
)
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


EVERY_SITE = "every site"
"""Who owns a source that is dealt: in errors that only show when a sample is read."""


class SiteSources:
    """Opens the samples of sites, and keeps what it read for the sites, rounds and runs that come next.

    Safe to use from several threads: of sites that open at once, one loads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.opened = functools.lru_cache(maxsize=32)(self._open)
        self.loaded = functools.lru_cache(maxsize=4)(_load)
        self.dealt = functools.lru_cache(maxsize=4)(_deal)
        # Keyed by the source too, for what it keeps of one source is of no use to the next; two at most, for each
        # may take loader.py's CACHE_BYTES.
        self.transforms = functools.lru_cache(maxsize=2)(_transform)

    def open(
        self,
        config: RunConfig,
        site: SiteSettings,
        backbone: Backbone,
        classes: tuple[str, ...] | None,
        record: Record | None = None,
    ) -> SiteData:
        """Load, deal and split a site's samples. Raises DataError naming the site and the file.

        A real site gives the `record` of the sides that its samples have, and of those that this run uses.
        """
        with self._lock:
            return self.opened(config, site, backbone, classes, record)

    def forget(self) -> None:
        """Free all that is kept."""
        with self._lock:
            for cached in (self.opened, self.loaded, self.dealt, self.transforms):
                cached.cache_clear()

    def _open(
        self,
        config: RunConfig,
        site: SiteSettings,
        backbone: Backbone,
        classes: tuple[str, ...] | None,
        record: Record | None,
    ) -> SiteData:
        if record is not None and site.data is not None:
            own = _open_own(config, site, site.data, classes, record)
            examples, train, test, everywhere = own.examples, own.train, own.test, own.test
            notes = own.notes
        else:
            examples = self._load_for(config, site, classes)
            train, test, everywhere, without = self._split(config, site, examples)
            notes = (*examples.notes, *without)
        if examples.kind != backbone.family.kind:
            raise DataError(
                f"site {site.name!r}: {site.data or config.task.data} holds {examples.kind}s, backbone "
                f"{backbone.name!r} reads {backbone.family.kind}s; change data or backbone"
            )
        transform = self.transforms(
            backbone, config.task.image_size, config.task.max_length, config.task.data
        )
        named = replace(examples, site=site.name)
        notes = (*unfamiliar(backbone, named), *notes, *backbone.notes)
        return SiteData(named, train, test, everywhere, transform, notes=notes)

    def _load_for(
        self, config: RunConfig, site: SiteSettings, classes: tuple[str, ...] | None
    ) -> Examples:
        rest = (
            config.task.max_samples,
            config.task.text_column,
            config.task.label_column,
            site.pixel_max or config.task.pixel_max,
            config.task.broken_files == "leave-out",
            config.task.target,
        )
        if site.partition is None or site.data is not None:
            examples = self.loaded(
                site.data or config.task.data, site.name, site.classes or classes, *rest
            )
            return examples.with_classes(classes) if classes and site.classes else examples
        try:
            return self.loaded(config.task.data, EVERY_SITE, classes, *rest)
        except DataError as err:
            # Loaded once for all; the fault is told by the site that met it, as with data of its own.
            raise DataError(str(err).replace(repr(EVERY_SITE), repr(site.name), 1)) from err

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


def _open_own(
    config: RunConfig,
    site: SiteSettings,
    data: str,
    classes: tuple[str, ...] | None,
    record: Record,
) -> Own:
    def read(
        classes: tuple[str, ...] | None = None,
        *,
        listed: frozenset[str] | None = None,
        pixel_max: float = 0.0,
    ) -> Examples:
        return load_source(
            data,
            site=site.name,
            # What is on the list was of these classes; what has come since is not looked at.
            classes=(site.classes or classes) if listed is None else None,
            max_samples=config.task.max_samples if listed is None else 0,
            text_column=config.task.text_column,
            label_column=config.task.label_column,
            pixel_max=pixel_max or site.pixel_max or config.task.pixel_max,
            leave_out_broken=config.task.broken_files == "leave-out",
            target=config.task.target,
            listed=listed,
        )

    return open_own(
        read,
        record,
        source=_source(config.task, data),
        fraction=config.task.test_fraction,
        classes=classes,
        declared=config.task.class_names is not None,
    )


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


def _load(
    spec: str,
    name: str,
    classes: tuple[str, ...] | None,
    max_samples: int,
    text_column: str,
    label_column: str,
    pixel_max: float,
    leave_out_broken: bool,
    target: Target,
) -> Examples:
    return load_source(
        spec,
        site=name,
        classes=classes,
        max_samples=max_samples,
        text_column=text_column,
        label_column=label_column,
        pixel_max=pixel_max,
        leave_out_broken=leave_out_broken,
        target=target,
    )


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


def _transform(
    backbone: Backbone,
    image_size: int,
    max_length: int,
    source: str,  # noqa: ARG001
) -> CachedTransform:
    if backbone.family.kind == "image":
        return CachedTransform(ImageTransform.from_backbone(backbone.path, image_size=image_size))
    return CachedTransform(TextTransform.from_backbone(backbone.path, max_length))
