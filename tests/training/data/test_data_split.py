"""Training and test by a digest of the sample: no sample changes sides when others come or go."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsplit.core.errors import ConfigError, DataError
from fedsplit.training.data import load_source, train_test_split
from fedsplit.training.data.split import TEST, TRAIN, UNKNOWN, untested

FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**32 - 1)
LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=80)


def digests(count: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).integers(0, 2**64, count, dtype=np.uint64)


def sides(count: int, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The side of each of `count` samples."""
    found = np.full(count, UNKNOWN, np.int8)
    found[train], found[test] = TRAIN, TEST
    return found


@given(labels=LABELS, fraction=FRACTIONS, seed=SEEDS)
def test_a_split_is_disjoint_complete_and_two_sided(
    labels: list[int], fraction: float, seed: int
) -> None:
    array = np.array(labels)
    train, test = train_test_split(array, digests(len(array), seed), fraction, seed=seed)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
    assert min(len(train), len(test)) >= 1
    counts = np.bincount(array)
    if counts.max() > 1:
        assert set(array[test]) <= set(array[train])
        # Whatever has two samples is tested.
        assert set(array[test]) == set(np.flatnonzero(counts > 1).tolist())
    else:
        assert len(test) == 1
    for label in np.flatnonzero(counts > 1):
        share = counts[label] * fraction
        assert math.floor(share) <= np.sum(array[test] == label) <= math.floor(share) + 1


@given(labels=LABELS, fraction=FRACTIONS, seed=SEEDS)
def test_the_order_of_the_samples_changes_nothing(
    labels: list[int], fraction: float, seed: int
) -> None:
    array, content = np.array(labels), digests(len(labels), seed)
    moved = np.random.default_rng(seed).permutation(len(array))
    _, test = train_test_split(array, content, fraction)
    _, after = train_test_split(array[moved], content[moved], fraction)
    assert set(content[test].tolist()) == set(content[moved][after].tolist())


@given(
    labels=LABELS,
    more=st.lists(st.integers(0, 6), max_size=40),
    fraction=FRACTIONS,
    gone=st.integers(0, 30),
    key=SEEDS,
)
def test_what_has_a_side_keeps_it(
    labels: list[int], more: list[int], fraction: float, gone: int, key: int
) -> None:
    """Some files go, some come, and the fraction is another one."""
    array, content = np.array(labels + more), digests(len(labels) + len(more), key)
    old = len(labels)
    before = sides(old, *train_test_split(array[:old], content[:old], 0.2))
    known = np.concatenate([before, np.full(len(more), UNKNOWN, np.int8)])
    left = np.sort(np.random.default_rng(key).permutation(len(array))[gone:])
    if len(left) < 2:
        return
    if set(known[left].tolist()) in ({TRAIN}, {TEST}):
        with pytest.raises(DataError, match="stay so; add others"):
            train_test_split(array[left], content[left], fraction, known=known[left])
        return
    split = train_test_split(array[left], content[left], fraction, known=known[left])
    after = sides(len(left), *split)
    told = known[left] != UNKNOWN
    assert np.array_equal(after[told], known[left][told])
    assert set(after.tolist()) == {TRAIN, TEST}


def test_new_samples_bring_a_class_near_its_share() -> None:
    labels, content = np.zeros(200, np.int64), digests(200)
    labels[::2] = 1
    known = np.full(200, UNKNOWN, np.int8)
    # They come one after the other, as a camera saves them.
    for count in range(4, 201):
        split = train_test_split(labels[:count], content[:count], 0.2, known=known[:count])
        known[:count] = sides(count, *split)
        shares = np.bincount(labels[split[1]], minlength=2) / np.bincount(labels[:count])
        assert np.abs(shares - 0.2).max() <= 2 / count + 0.3 * (count < 10)
    assert np.bincount(labels[known == TEST]).tolist() == [20, 20]


def test_a_new_class_of_two_is_tested() -> None:
    labels = np.array([0] * 30 + [1] * 30 + [2] * 2)
    content = digests(62)
    before = sides(60, *train_test_split(labels[:60], content[:60], 0.2))
    known = np.concatenate([before, np.full(2, UNKNOWN, np.int8)])
    _, test = train_test_split(labels, content, 0.2, known=known)
    assert np.bincount(labels[test]).tolist() == [6, 6, 1]
    assert untested(labels, test) == []


@given(labels=LABELS, kinds=st.integers(2, 9), fraction=FRACTIONS, key=SEEDS)
def test_equal_samples_are_on_one_side(
    labels: list[int], kinds: int, fraction: float, key: int
) -> None:
    """Copies, also under another label, never teach what they test."""
    array = np.array(labels)
    content = digests(kinds, key)[np.random.default_rng(key).integers(0, kinds, len(array))]
    if len(set(content.tolist())) == 1:
        with pytest.raises(DataError, match=rf"all {len(array)} samples have the same content"):
            train_test_split(array, content, fraction)
        return
    train, test = train_test_split(array, content, fraction)
    assert min(len(train), len(test)) >= 1
    assert not set(content[train].tolist()) & set(content[test].tolist())


@given(
    samples=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=80
    ).filter(lambda s: len({g for _, g in s}) > 1),
    fraction=FRACTIONS,
    seed=SEEDS,
)
def test_a_split_by_group_is_disjoint_complete_and_two_sided(
    samples: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    labels, groups = (np.array(column) for column in zip(*samples, strict=True))
    content = digests(len(labels), seed)
    train, test = train_test_split(labels, content, fraction, seed=seed, groups=groups)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
    assert min(len(train), len(test)) >= 1
    assert not set(groups[train]) & set(groups[test])


BOARDS = np.repeat(np.arange(300), 4)
"""1,200 crops of 300 boards."""


def test_a_split_by_group_comes_near_the_shares() -> None:
    labels = np.repeat(np.arange(6), 200)[np.random.default_rng(3).permutation(1200)]
    _, test = train_test_split(labels, digests(1200), 0.2, groups=BOARDS)
    shares = np.bincount(labels[test]) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.05


def test_new_crops_of_a_board_go_where_the_board_is() -> None:
    labels, content = np.arange(1200) % 5, digests(1200)
    old = np.flatnonzero(np.arange(1200) % 4 < 2)
    train, test = train_test_split(labels[old], content[old], 0.2, groups=BOARDS[old])
    known = np.full(1200, UNKNOWN, np.int8)
    known[old] = sides(len(old), train, test)
    # The boards are numbered anew, as when a board came that sorts first.
    _, all_test = train_test_split(labels, content, 0.2, groups=BOARDS[::-1], known=known)
    _, again = train_test_split(labels, content, 0.2, groups=900 - BOARDS, known=known)
    assert set(BOARDS[again].tolist()) == set(BOARDS[old][test].tolist())
    assert not set(np.flatnonzero(known == TRAIN).tolist()) & set(all_test.tolist())


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"'press-3': all 9 samples are of one group.*add more"):
        train_test_split(
            np.arange(9), digests(9), 0.2, site="press-3", groups=np.zeros(9, dtype=np.int64)
        )


def test_a_split_is_stratified_and_deterministic() -> None:
    labels, content = np.repeat([0, 1, 2, 3], [100, 50, 10, 1]), digests(161)
    train, test = train_test_split(labels, content, 0.2)
    assert np.bincount(labels[test], minlength=4).tolist() == [20, 10, 2, 0]
    assert untested(labels, test) == [3]
    again = train_test_split(labels, content, 0.2)
    assert np.array_equal(train, again[0])
    assert np.array_equal(test, again[1])


def test_each_seed_deals_otherwise() -> None:
    """By chance two seeds share a fifth of their test samples, and so do neighbouring ones."""
    labels, content = np.zeros(2000, np.int64), digests(2000)
    tests = [set(train_test_split(labels, content, 0.2, seed=s)[1].tolist()) for s in range(6)]
    shared = [len(a & b) for i, a in enumerate(tests) for b in tests[:i]]
    assert 40 < min(shared) <= max(shared) < 130


def test_what_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"'press-3': 1 samples cannot be split.*add more"):
        train_test_split(np.array([1]), digests(1), 0.2, site="press-3")
    with pytest.raises(DataError, match="0 samples"):
        train_test_split(np.array([], dtype=np.int64), digests(0), 0.2)
    with pytest.raises(ConfigError, match=r"test-fraction=1\.0"):
        train_test_split(np.array([1, 1]), digests(2), 1.0)
    only = np.full(2, TRAIN, np.int8)
    with pytest.raises(DataError, match="all samples that are left were for training"):
        train_test_split(np.array([1, 1]), digests(2), 0.2, known=only)


def test_a_samples_digest_is_its_contents_alone(tmp_path: Path) -> None:
    """Not its place, name or label: a file that is moved or relabelled is the same sample."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for name, at in {"a/x": 0, "a/y": 1, "b/z": 0, "b/w": 2}.items():
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[at]).save(path)
    (tmp_path / "t.csv").write_text("text,label\none,a\ntwo,a\none,b\nthree,b\n")
    (tmp_path / "t.jsonl").write_text(
        "".join(
            json.dumps({"text": t, "label": c}) + "\n"
            for t, c in [("one", "a"), ("two", "a"), ("one", "b"), ("three", "b")]
        )
    )
    np.savez(tmp_path / "x.npz", x=pixels[[0, 1, 0, 2]], y=np.array(["a", "a", "b", "b"]))
    for spec in ("folder:images", "csv:t.csv", "jsonl:t.jsonl", "npz:x.npz"):
        kind, _, name = spec.partition(":")
        found = load_source(f"{kind}:{tmp_path / name}", site="a").digests().tolist()
        found = [found[0], *sorted(found[1:], key=lambda d: d != found[0])]
        assert found[0] == found[1], spec
        assert len(set(found)) == 3, spec
