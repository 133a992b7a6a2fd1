"""What one site trains and tests on: its own source, or its share of a partitioned one in simulation.

Called by federation/site.py with the run's settings and the site's own (Flower's node config). Split by
seed and name alone, so the same site sees the same samples in every round and in every process.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError, DataError
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

NodeConfig = Mapping[str, str | int | float | bool]
Index = NDArray[np.int64]
MAX_NAME_CHARS = 128
# What a site may say of itself; the first two are Flower's own in simulation.
NODE_KEYS = (
    "partition-id",
    "num-partitions",
    "site",
    "data",
    "cut",
    "encoder-tls-ca",
    "encoder-tls-cert",
    "encoder-tls-key",
    "threads",
)


@dataclass(frozen=True)
class SiteSettings:
    """A site's own settings, from its node config."""

    name: str
    data: str | None
    """The site's own source; None: the run's, partitioned when `partition` says so."""
    cut: Cut | None
    partition: tuple[int, int] | None
    """(this site's number, number of sites) of a partitioned source."""
    encoder_tls_ca: str
    threads: int
    """Threads for torch; 0: torch's own choice."""
    encoder_tls_cert: str = ""
    encoder_tls_key: str = ""
    """Certificate and key that this site shows to an encoder that asks for one."""

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
        name = str(node.get("site", f"site-{number}" if share else f"node-{node_id}"))
        if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
            faults.append(
                f"site={name[:50]!r}: 1 to {MAX_NAME_CHARS} printable characters are wanted"
            )
        cut = None
        try:
            cut = Cut.parse(str(node["cut"])) if "cut" in node else None
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
        )


@dataclass(frozen=True)
class SiteData:
    """Samples of one site and what turns them into tensors."""

    examples: Examples
    train: Index
    test: Index
    test_everywhere: Index
    """Test samples of all sites where they are to be had (simulation); this site's own otherwise."""
    transform: CachedTransform


@functools.lru_cache(maxsize=32)
def open_site(
    config: RunConfig, site: SiteSettings, backbone: Backbone, classes: tuple[str, ...] | None
) -> SiteData:
    """Load, deal and split a site's samples. Raises DataError naming the site and the file."""
    examples = _load(config, site.data or config.data, site.name, classes)
    if examples.kind != backbone.family.kind:
        raise DataError(
            f"site {site.name!r}: {site.data or config.data} holds {examples.kind}s, backbone "
            f"{backbone.name!r} reads {backbone.family.kind}s; change data or backbone"
        )
    train, test, everywhere = _split(config, site, examples)
    return SiteData(examples, train, test, everywhere, _transform(config, backbone))


@functools.lru_cache(maxsize=4)
def _load(config: RunConfig, spec: str, name: str, classes: tuple[str, ...] | None) -> Examples:
    return load_source(
        spec,
        site=name,
        classes=classes,
        max_samples=config.max_samples,
        text_column=config.text_column,
        label_column=config.label_column,
    )


def _split(config: RunConfig, site: SiteSettings, examples: Examples) -> tuple[Index, Index, Index]:
    if site.partition is None or site.data is not None:
        train, test = _train_test(config, site.name, examples.labels)
        return train, test, test
    number, of = site.partition
    shares = partition(examples.labels, parse_partition(config.partition), of, config.seed)
    splits = []
    for i, share in enumerate(shares):
        train, test = _train_test(config, f"site-{i}", examples.labels[share])
        splits.append((share[train], share[test]))
    everywhere = np.sort(np.concatenate([test for _, test in splits]))
    return (*splits[number], everywhere)


def _train_test(config: RunConfig, name: str, labels: Index) -> tuple[Index, Index]:
    # The name alone decides, so a site that holds its share as files of its own splits it alike.
    seed = config.seed ^ zlib.crc32(name.encode())
    return train_test_split(labels, config.test_fraction, seed, site=name)


@functools.lru_cache(maxsize=4)
def _transform(config: RunConfig, backbone: Backbone) -> CachedTransform:
    if backbone.family.kind == "image":
        image = ImageTransform.from_backbone(backbone.path, image_size=config.image_size)
        return CachedTransform(image)
    return CachedTransform(TextTransform.from_backbone(backbone.path, config.max_length))
