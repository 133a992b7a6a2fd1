"""What one site trains and tests on: its own source, or its share of a partitioned one in simulation.

Called by federation/site.py with the run's settings and the site's own (Flower's node config). Which
samples test is decided by their content, so a site sees the same ones in every round and in every process. In simulation
a process may be many sites: the source, its shares and what was prepared of it are kept once for all of them.
With `method=centralised` one node stands for all sites and has the samples of all shares.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError, DataError
from fedsplit.core.foreign import MAX_NAME_CHARS, printable
from fedsplit.core.tasks import parse_classes, parse_held
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

NodeConfig = Mapping[str, str | int | float | bool]
Index = NDArray[np.int64]
# What a site may say of itself; the first two are Flower's own in simulation.
NODE_KEYS = (
    "partition-id",
    "num-partitions",
    "site",
    "data",
    "text-column",
    "label-column",
    "classes",
    "pixel-max",
    "tasks",
    "cut",
    "encoder-tls-ca",
    "encoder-tls-cert",
    "encoder-tls-key",
    "threads",
    "lora-rank",
    "state-dir",
)
MAX_LORA_RANK = 1024


@dataclass(frozen=True)
class SiteSettings:
    """A site's own settings, from its node config."""

    name: str
    data: str | None
    """The site's own source; None in simulation alone: its share of the run's."""
    cut: Cut | None
    partition: tuple[int, int] | None
    """(this site's number, number of sites) of a partitioned source."""
    encoder_tls_ca: str
    threads: int
    """Threads for torch; 0: torch's own choice."""
    encoder_tls_cert: str = ""
    encoder_tls_key: str = ""
    """Certificate and key that this site shows to an encoder that asks for one."""
    lora_rank: int = 0
    """The site's own LoRA rank; 0: the run's."""
    state_dir: str = ""
    """Where the site keeps what is its own between rounds; empty: a folder in its user's home."""
    tasks: tuple[tuple[str, str], ...] = ()
    """(task, own source or "") of the tasks that the site holds; empty: all that a run has."""
    text_column: str = "text"
    label_column: str = "label"
    """The columns of its own source that the site lets runs read."""
    classes: tuple[str, ...] = ()
    """The only names of classes that leave the site; empty: those that its labels have."""
    pixel_max: float = 0.0
    """The value that is white in the site's own images; 0: the run's, or found out from them."""

    @classmethod
    def from_node(cls, node: NodeConfig, *, node_id: int) -> SiteSettings:
        """Read a node config. Raises ConfigError with every fault."""
        faults = [
            f"unknown node-config key {key!r}; known: {', '.join(NODE_KEYS)}"
            for key in node
            if key not in NODE_KEYS
        ]
        number, of = node.get("partition-id"), node.get("num-partitions")
        share = (number, of) if isinstance(number, int) and isinstance(of, int) else None
        if share and not 0 <= share[0] < share[1]:
            faults.append(f"partition-id={number} is not in 0..{share[1] - 1}")
        if share is None and (number is not None or of is not None):
            faults.append(
                f"partition-id={number!r}, num-partitions={of!r}: partition-id and num-partitions are "
                f"whole numbers and go together"
            )
        threads = node.get("threads", 0)
        if not isinstance(threads, int) or threads < 0:
            faults.append(f"threads={threads!r} is not a number of threads")
        rank = node.get("lora-rank", 0)
        if not isinstance(rank, int) or not 0 <= rank <= MAX_LORA_RANK:
            faults.append(f"lora-rank={rank!r} is not a rank in 0..{MAX_LORA_RANK}")
        white = node.get("pixel-max", 0.0)
        if not isinstance(white, int | float) or not 0 <= white <= 2**32:
            faults.append(f"pixel-max={white!r} is not the value of a pixel")
        if bool(node.get("encoder-tls-cert")) != bool(node.get("encoder-tls-key")):
            faults.append("encoder-tls-cert and encoder-tls-key go together; give both or neither")
        name = str(node.get("site", f"site-{number}" if share else f"node-{node_id}"))
        if not name or printable(name, limit=MAX_NAME_CHARS) != name:
            faults.append(
                f"site={name[:50]!r}: 1 to {MAX_NAME_CHARS} printable characters are wanted"
            )
        cut = None
        try:
            cut = Cut.parse(str(node["cut"])) if "cut" in node else None
        except ConfigError as err:
            faults.append(str(err))
        tasks: dict[str, str] = {}
        try:
            tasks = parse_held(str(node.get("tasks", "")))
        except ConfigError as err:
            faults.append(str(err))
        if faults:
            raise ConfigError(
                "the site's node config has faults:\n" + "\n".join(f"  - {f}" for f in faults)
            )
        return cls(
            name=name,
            data=str(node["data"]) if "data" in node else None,
            cut=cut,
            partition=share,
            encoder_tls_ca=str(node.get("encoder-tls-ca", "")),
            encoder_tls_cert=str(node.get("encoder-tls-cert", "")),
            encoder_tls_key=str(node.get("encoder-tls-key", "")),
            threads=int(threads) if isinstance(threads, int) else 0,
            lora_rank=int(rank) if isinstance(rank, int) else 0,
            state_dir=str(node.get("state-dir", "")),
            tasks=tuple(tasks.items()),
            text_column=str(node.get("text-column", cls.text_column)),
            label_column=str(node.get("label-column", cls.label_column)),
            classes=parse_classes(str(node.get("classes", ""))),
            pixel_max=float(white) if isinstance(white, int | float) else 0.0,
        )

    def for_task(self, config: RunConfig) -> SiteSettings | None:
        """These settings for the run's `task`, or None where the site does not hold it.

        Raises ConfigError for what a site does not do: read what only a run names, or another column than its own
        settings say.
        """
        held = dict(self.tasks)
        if held and config.task not in held:
            return None
        data = held.get(config.task) or self.data
        if len(config.sources) > 1 and data and not held.get(config.task):
            raise ConfigError(
                f"site {self.name!r}: data={data} is one source and the run has several tasks; name the source of "
                f"each in the site's node config, e.g. tasks={config.task}={data}"
            )
        share = self.partition
        holders = sorted(config.holders.get(config.task, ()))
        if share is not None and holders:
            number, of = share
            if holders[-1] >= of:
                raise ConfigError(
                    f"task-holders gives {config.task} to site {holders[-1]}, the simulation's sites are numbered "
                    f"from 0 to {of - 1}; correct it, or simulate more sites"
                )
            if number not in holders:
                return None
            # Dealt among those that hold it: nobody gets a share that is then not used.
            share = (holders.index(number), len(holders))
        if data:
            self._check_own(config)
        elif share is None:
            example = f"tasks={config.task}=" if config.tasks else "data="
            raise ConfigError(
                f"site {self.name!r}: its node config names no data for task {config.task!r}, and a site reads nothing "
                f"that only a run names; put {example}folder:/PATH into its node config"
            )
        return replace(self, data=data, partition=share)

    def _check_own(self, config: RunConfig) -> None:
        """Raise ConfigError where a run wants another column, or other names of classes, than the site lets it have."""
        faults = [
            f"the run reads {key}={asked[:100]!r}, this site's node config says {key}={own!r}; start the run with "
            f"{key}={own}, or change the node config"
            for key, asked, own in (
                ("text-column", config.text_column, self.text_column),
                ("label-column", config.label_column, self.label_column),
            )
            if asked != own
        ]
        declared = config.class_names
        if self.classes and declared and set(declared) != set(self.classes):
            faults.append(
                f"the run declares classes={','.join(declared)[:200]}, this site's node config says "
                f"classes={','.join(self.classes)[:200]}; give both the same, or leave classes out of the run"
            )
        if faults:
            raise ConfigError(f"site {self.name!r}: {'; '.join(faults)}")


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


@dataclass(frozen=True, eq=False)
class _Shares:
    """A source dealt to all sites and split: (training, test) of each, and the test samples of all."""

    splits: tuple[tuple[Index, Index], ...]
    everywhere: Index
    notes: tuple[str, ...]

    @property
    def train(self) -> Index:
        return np.sort(np.concatenate([train for train, _ in self.splits]))


CENTRALISED = "centralised"
EVERY_SITE = "every site"
"""Who owns a source that is dealt: in errors that only show when a sample is read."""
_opening = (
    threading.Lock()
)  # sites of one process may be threads; two that load at once would keep it twice


@functools.lru_cache(maxsize=32)
def open_site(
    config: RunConfig,
    site: SiteSettings,
    backbone: Backbone,
    classes: tuple[str, ...] | None,
    record: Record | None = None,
) -> SiteData:
    """Load, deal and split a site's samples. Raises DataError naming the site and the file.

    A real site gives the `record` of the sides that its samples have, and of those that this run uses.
    """
    with _opening:
        return _open(config, site, backbone, classes, record)


def _open(
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
        examples = _load_for(config, site, classes)
        train, test, everywhere, without = _split(config, site, examples)
        notes = (*examples.notes, *without)
    if examples.kind != backbone.family.kind:
        raise DataError(
            f"site {site.name!r}: {site.data or config.data} holds {examples.kind}s, backbone "
            f"{backbone.name!r} reads {backbone.family.kind}s; change data or backbone"
        )
    transform = _transform(backbone, config.image_size, config.max_length, config.data)
    named = replace(examples, site=site.name)
    notes = (*unfamiliar(backbone, named), *notes, *backbone.notes)
    return SiteData(named, train, test, everywhere, transform, notes=notes)


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
            max_samples=config.max_samples if listed is None else 0,
            text_column=config.text_column,
            label_column=config.label_column,
            pixel_max=pixel_max or site.pixel_max or config.pixel_max,
            leave_out_broken=config.broken_files == "leave-out",
            listed=listed,
        )

    return open_own(
        read,
        record,
        source=f"{config.task}\n{data}\n{config.text_column}\n{config.label_column}",
        fraction=config.test_fraction,
        classes=classes,
        declared=config.class_names is not None,
    )


def with_text_notes(own: SiteData) -> SiteData:
    """The same with what the tokenizer makes of its texts, which takes a pass over all of them; nothing for images."""
    inner = own.transform.inner
    if not isinstance(inner, TextTransform):
        return own
    notes = text_notes(text_facts(own.examples, inner), len(own.examples))
    return replace(own, notes=(*own.notes, *notes))


def forget() -> None:
    """Free all data that this process keeps: between runs that share nothing, and in tests."""
    for cached in (open_site, _load, _shares, _transform):
        cached.cache_clear()


def _load_for(config: RunConfig, site: SiteSettings, classes: tuple[str, ...] | None) -> Examples:
    rest = (
        config.max_samples,
        config.text_column,
        config.label_column,
        site.pixel_max or config.pixel_max,
        config.broken_files == "leave-out",
    )
    if site.partition is None or site.data is not None:
        examples = _load(site.data or config.data, site.name, site.classes or classes, *rest)
        return examples.with_classes(classes) if classes and site.classes else examples
    try:
        return _load(config.data, EVERY_SITE, classes, *rest)
    except DataError as err:
        # Loaded once for all; the fault is told by the site that met it, as with data of its own.
        raise DataError(str(err).replace(repr(EVERY_SITE), repr(site.name), 1)) from err


@functools.lru_cache(maxsize=4)
def _load(
    spec: str,
    name: str,
    classes: tuple[str, ...] | None,
    max_samples: int,
    text_column: str,
    label_column: str,
    pixel_max: float,
    leave_out_broken: bool,
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
    )


def _split(
    config: RunConfig, site: SiteSettings, examples: Examples
) -> tuple[Index, Index, Index, Sequence[str]]:
    """Training, test and everybody's test samples, and what there is to say of the classes."""
    if site.partition is None or site.data is not None:
        # Without the seed: real samples must not change sides from one run to another.
        train, test = train_test_split(
            examples.labels,
            examples.digests(),
            config.test_fraction,
            site=site.name,
            groups=examples.groups,
        )
        return train, test, test, without_test(examples, test)
    number, of = site.partition
    shares = _shares(
        examples, of, config.partition, config.test_fraction, config.seed, config.max_site_samples
    )
    if str(config.method) == CENTRALISED:
        return shares.train, shares.everywhere, shares.everywhere, shares.notes
    return (*shares.splits[number], shares.everywhere, shares.notes)


@functools.lru_cache(maxsize=4)
def _shares(
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


# Keyed by the source too, for what it keeps of one source is of no use to the next; two at most, for each may
# take loader.py's CACHE_BYTES.
@functools.lru_cache(maxsize=2)
def _transform(
    backbone: Backbone,
    image_size: int,
    max_length: int,
    source: str,  # noqa: ARG001
) -> CachedTransform:
    if backbone.family.kind == "image":
        return CachedTransform(ImageTransform.from_backbone(backbone.path, image_size=image_size))
    return CachedTransform(TextTransform.from_backbone(backbone.path, max_length))
