"""Specs, labels and classes: what all sources share, on digits and small tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsplit.core.errors import ConfigError, DataError
from fedsplit.training.data import SOURCES, load_source


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    path = tmp_path / "orders.csv"
    path.write_text("text,label\npump leaks,leak\nbelt torn,tear\nvalve leaks,leak\n")
    return path


def test_digits_need_no_download() -> None:
    examples = load_source("digits", site="a")
    assert len(examples) == 1797
    assert examples.kind == "image"
    assert examples.classes == tuple("0123456789")
    assert examples.labels.dtype == np.int64
    image = examples.image(0)
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
    assert image.max() > 200
    assert examples.origin(5) == "digits[5]"


@pytest.mark.parametrize(
    "spec", ["", "digit", "digits:x", "zip:a", "csv", "csv:", "hf:", "csv:a\0b"]
)
def test_an_unknown_spec_lists_the_known_ones(spec: str) -> None:
    with pytest.raises(ConfigError, match="press-3") as caught:
        load_source(spec, site="press-3")
    assert all(known in str(caught.value) for known in SOURCES)


@pytest.mark.parametrize("kind", ["folder", "csv", "jsonl", "npz"])
def test_a_missing_path_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'press-3'.*nowhere.*does not exist.*check the path"):
        load_source(f"{kind}:{tmp_path}/nowhere", site="press-3")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "npz"])
def test_a_folder_is_not_a_file(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'press-3'.*not a file"):
        load_source(f"{kind}:{tmp_path}", site="press-3")


def test_classes_without_declaration_are_the_sorted_names(orders: Path) -> None:
    examples = load_source(f"csv:{orders}", site="a")
    assert examples.classes == ("leak", "tear")
    assert examples.labels.tolist() == [0, 1, 0]


def test_declared_classes_give_the_numbers(orders: Path) -> None:
    examples = load_source(f"csv:{orders}", site="a", classes=("tear", "hole", "leak"))
    assert examples.classes == ("tear", "hole", "leak")
    assert examples.labels.tolist() == [2, 0, 2]


def test_an_undeclared_label_names_site_file_line_and_classes(orders: Path) -> None:
    pattern = r"'press-3'.*orders\.csv:3: label 'tear' is not one of .*'hole', 'leak'; correct"
    with pytest.raises(DataError, match=pattern):
        load_source(f"csv:{orders}", site="press-3", classes=("hole", "leak"))


def test_many_declared_classes_are_not_all_listed(orders: Path) -> None:
    classes = tuple(f"c{i}" for i in range(77))
    with pytest.raises(DataError, match="'c19' and 57 more;"):
        load_source(f"csv:{orders}", site="press-3", classes=classes)


@pytest.mark.parametrize("classes", [(), ("a", ""), ("a", "b", "a")])
def test_bad_declared_classes(classes: tuple[str, ...], orders: Path) -> None:
    with pytest.raises(ConfigError, match="name each class once"):
        load_source(f"csv:{orders}", site="a", classes=classes)


def test_only_one_sample_is_refused(tmp_path: Path, orders: Path) -> None:
    single = tmp_path / "one.csv"
    single.write_text("text,label\npump leaks,leak\n")
    with pytest.raises(DataError, match=r"'press-3'.*one\.csv: only one sample.*add more"):
        load_source(f"csv:{single}", site="press-3")
    with pytest.raises(DataError, match="only one sample"):
        load_source(f"csv:{orders}", site="press-3", max_samples=1)


def test_max_samples_keeps_a_fixed_choice_and_all_classes() -> None:
    first = load_source("digits", site="a", max_samples=100)
    again = load_source("digits", site="b", max_samples=100)
    assert len(first) == 100
    assert first.keys.tolist() == again.keys.tolist()
    assert len(np.unique(first.labels)) == 10
    assert len(load_source("digits", site="a", max_samples=5000)) == 1797
    with pytest.raises(ConfigError, match="max-samples=-1"):
        load_source("digits", site="a", max_samples=-1)


def test_subsets_keep_keys_and_origins(orders: Path) -> None:
    examples = load_source(f"csv:{orders}", site="a")
    part = examples.subset([2, 1]).subset(np.array([0]))
    assert len(part) == 1
    assert part.text(0) == "valve leaks"
    assert part.labels.tolist() == [0]
    assert part.keys.tolist() == [2]
    assert part.origin(0).endswith("orders.csv:4")


def test_with_classes_numbers_anew(orders: Path) -> None:
    examples = load_source(f"csv:{orders}", site="press-3").subset([1, 2])
    wider = examples.with_classes(("crack", "leak", "tear"))
    assert wider.labels.tolist() == [2, 1]
    assert wider.classes == ("crack", "leak", "tear")
    with pytest.raises(DataError, match=r"'press-3'.*orders\.csv:3: label 'tear'"):
        examples.with_classes(("crack", "leak"))


def test_text_and_image_are_not_mixed_up(orders: Path) -> None:
    with pytest.raises(TypeError, match=r"use text\(i\)"):
        load_source(f"csv:{orders}", site="a").image(0)
    with pytest.raises(TypeError, match=r"use image\(i\)"):
        load_source("digits", site="a").text(0)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("sklearn", "datasets", "flwr_datasets", "transformers", "pandas", "pyarrow")
    code = f"import sys, fedsplit.training.data; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
