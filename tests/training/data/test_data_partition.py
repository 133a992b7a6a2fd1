"""Partitions and splits: disjoint, complete, the same for the same seed, and as skewed as they say."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError
from fedsplit.training.data import Partition, parse_partition, partition, train_test_split

LABELS = np.random.default_rng(1).integers(0, 10, size=1200)
GOOD = ["iid", "dirichlet:0.3", "dirichlet:100", "pathological:2", "quantity:0.5"]


def test_parsing() -> None:
    assert parse_partition("iid") == Partition("iid")
    assert parse_partition("dirichlet:0.3") == Partition("dirichlet", 0.3)
    assert parse_partition("pathological:2") == Partition("pathological", 2)
    assert [str(parse_partition(text)) for text in GOOD] == GOOD
    for text in GOOD:
        assert RunConfig.of(partition=text).task.partition == text


@pytest.mark.parametrize(
    "text",
    [
        *["", "iid:1", "natural:site", "pathological:1.5", "pathological:0", "quantity:x"],
        *[
            "dirichlet",
            "dirichlet:",
            "dirichlet:0",
            "dirichlet:-1",
            "dirichlet:nan",
            "dirichlet:inf",
        ],
    ],
)
def test_an_unknown_partition_lists_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not known; use iid, dirichlet:ALPHA, pathological"):
        parse_partition(text)


@pytest.mark.parametrize("spec", [*GOOD, "dirichlet:0.1"])
@pytest.mark.parametrize("sites", [1, 5, 7])
def test_disjoint_complete_deterministic(spec: str, sites: int) -> None:
    parts = partition(LABELS, spec, sites, 3)
    assert len(parts) == sites
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    if sites > 1 or spec != "pathological:2":
        assert np.array_equal(np.sort(together), np.arange(len(LABELS)))
    assert min(len(part) for part in parts) >= 4
    again = partition(LABELS, parse_partition(spec), sites, 3)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if sites > 1:
        other = partition(LABELS, spec, sites, 4)
        assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.sampled_from([0, 2, 3, 9]), min_size=1, max_size=60),
    spec=st.sampled_from([*GOOD, "pathological:3"]),
    sites=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_labels_give_a_partition_or_a_config_error(
    labels: list[int], spec: str, sites: int, seed: int
) -> None:
    try:
        parts = partition(np.array(labels), spec, sites, seed)
    except ConfigError:
        return
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together) <= len(labels)
    assert min(len(part) for part in parts) >= 4


def _skew(parts: list[np.ndarray]) -> float:
    """Mean distance of the sites' class shares from the whole's, 0 .. 1."""
    whole = np.bincount(LABELS, minlength=10) / len(LABELS)
    shares = [np.bincount(LABELS[part], minlength=10) / len(part) for part in parts]
    return float(np.mean([np.abs(share - whole).sum() / 2 for share in shares]))


def test_the_skew_is_there() -> None:
    iid, mild, strong = (
        _skew(partition(LABELS, spec, 6, 0)) for spec in ("iid", "dirichlet:1", "dirichlet:0.1")
    )
    assert iid < 0.15 < mild < strong
    assert strong > 0.5


@pytest.mark.parametrize(("sites", "each"), [(5, 2), (10, 1), (4, 3), (10, 10)])
def test_pathological_sites_have_that_many_classes_and_use_all(sites: int, each: int) -> None:
    parts = partition(LABELS, f"pathological:{each}", sites, 0)
    assert [len(np.unique(LABELS[part])) for part in parts] == [each] * sites
    assert sum(len(part) for part in parts) == len(LABELS)


def test_classes_that_find_no_site_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parts = partition(LABELS, "pathological:2", 3, 0)
    assert "leaves out 4 of 10 classes" in caplog.text
    assert len(np.unique(LABELS[np.concatenate(parts)])) == 6


def test_quantity_skews_sizes_only() -> None:
    parts = partition(LABELS, "quantity:0.5", 4, 0)
    sizes = sorted(len(part) for part in parts)
    assert sizes[-1] > 3 * sizes[0]
    largest = max(parts, key=len)
    assert _skew([largest]) < 0.15


@pytest.mark.parametrize(
    ("labels", "spec", "sites", "pattern"),
    [
        (LABELS[:5], "iid", 6, "5 samples are too few for 6 sites.*fewer sites"),
        (LABELS, "iid", 0, "sites=0 must be at least 1"),
        (LABELS, "pathological:11", 3, "wants 11 classes a site, the data has 10"),
        (np.arange(40), "pathological:40", 2, "needs more samples of a class"),
        (LABELS[:80], "dirichlet:0.001", 20, r"fewer than 4 of 80 .*larger ALPHA"),
        (np.repeat([0, 1], [200, 5]), "pathological:1", 4, "leaves a site 2 of 205 samples"),
    ],
)
def test_what_cannot_be_done_is_explained(
    labels: np.ndarray, spec: str, sites: int, pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern):
        partition(labels, spec, sites, 0)


def some_digests(count: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 2**64, count, dtype=np.uint64)


BOARDS = np.repeat(np.arange(300), 4)
"""1,200 crops of 300 boards."""


def _groups_of(parts: list[np.ndarray], groups: np.ndarray) -> list[set[int]]:
    return [set(groups[part].tolist()) for part in parts]


@pytest.mark.parametrize("spec", [*GOOD, "dirichlet:0.1"])
@pytest.mark.parametrize("sites", [1, 5, 7])
def test_whole_groups_are_dealt(spec: str, sites: int) -> None:
    parts = partition(LABELS, spec, sites, 3, BOARDS)
    owned = _groups_of(parts, BOARDS)
    assert sum(map(len, owned)) == len(set().union(*owned))
    assert min(map(len, owned)) >= 2
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    if spec in {"iid", "quantity:0.5"}:
        assert len(together) == len(LABELS)
    assert all(np.array_equal(part, np.sort(part)) for part in parts)
    again = partition(LABELS, spec, sites, 3, BOARDS)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_groups_are_dealt_evenly() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), rng.integers(1, 12, 200))
    labels = rng.integers(0, 7, len(groups))
    sizes = [len(part) for part in partition(labels, "iid", 9, 0, groups)]
    assert max(sizes) - min(sizes) <= 11
    uneven = [len(part) for part in partition(labels, "quantity:0.5", 9, 0, groups)]
    assert max(uneven) > 3 * min(uneven)


def test_label_skew_with_groups() -> None:
    iid, mild, strong = (
        _skew(partition(LABELS, spec, 6, 0, BOARDS))
        for spec in ("iid", "dirichlet:1", "dirichlet:0.1")
    )
    assert iid < 0.2 < mild < strong
    assert strong > 0.5


def test_a_site_keeps_the_most_that_its_shares_allow() -> None:
    """A class is used up, and all others stand to it as the shares say: nothing more could stay."""
    parts = partition(LABELS, "dirichlet:1", 6, 0, BOARDS)
    dealt = partition(LABELS, "iid", 6, 0, BOARDS)
    for part, whole in zip(parts, dealt, strict=True):
        assert set(part) <= set(whole)
        kept, had = (np.bincount(LABELS[p], minlength=10) for p in (part, whole))
        assert (kept == had).any()
    assert 0.15 < sum(map(len, parts)) / len(LABELS) < 0.6


@pytest.mark.parametrize(("sites", "each"), [(5, 2), (7, 3), (10, 1)])
def test_pathological_sites_with_groups(sites: int, each: int) -> None:
    parts = partition(LABELS, f"pathological:{each}", sites, 0, BOARDS)
    assert [len(np.unique(LABELS[part])) for part in parts] == [each] * sites
    assert len(np.unique(LABELS[np.concatenate(parts)])) == 10


@pytest.mark.parametrize(
    ("spec", "sites", "groups", "pattern"),
    [
        ("iid", 6, np.arange(1200) % 11, "11 groups are too few for 6 sites with at least 2"),
        ("iid", 2, BOARDS[:-1], "1199 groups for 1200 labels"),
        ("pathological:11", 2, BOARDS, "wants 11 classes a site, the data has 10"),
        ("pathological:2", 140, BOARDS, "leaves site .*use fewer sites or more groups"),
        ("dirichlet:0.001", 140, BOARDS, "no draw of classes keeps 4 samples of 2 groups"),
    ],
)
def test_what_cannot_be_done_with_groups(
    spec: str, sites: int, groups: np.ndarray, pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern):
        partition(LABELS, spec, sites, 0, groups)


def test_classes_that_find_no_site_with_groups(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        partition(LABELS, "pathological:2", 3, 0, BOARDS)
    assert "pathological:2 over 3 sites leaves out 4 of 10 classes" in caplog.text


@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(
        st.tuples(st.sampled_from([0, 2, 9]), st.integers(0, 12)), min_size=1, max_size=60
    ),
    spec=st.sampled_from([*GOOD, "dirichlet:1e-300"]),
    sites=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_groups_give_a_partition_that_splits_or_a_config_error(
    samples: list[tuple[int, int]], spec: str, sites: int, seed: int
) -> None:
    labels, groups = (np.array(column) for column in zip(*samples, strict=True))
    try:
        parts = partition(labels, spec, sites, seed, groups)
    except ConfigError:
        return
    sides = []
    digests = some_digests(len(labels))
    for part in parts:
        train, test = train_test_split(
            labels[part], digests[part], 0.2, seed=seed, groups=groups[part]
        )
        sides += [part[train], part[test]]
    owned = _groups_of(sides, groups)
    assert min(map(len, owned)) >= 1
    assert sum(map(len, owned)) == len(set().union(*owned))
