"""Labels that are numbers: read from every source, and a typing error is named with its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsplit.core.errors import DataError
from fedsplit.training.data import Examples, load_source, train_test_split
from tests.training.data.conftest import write_image


def load(spec: str, **other: object) -> Examples:
    return load_source(spec, site="press-3", target="number", **other)  # type: ignore[arg-type]


def table(path: Path, *rows: str, header: str = "text,hours") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_numbers_of_a_table(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "pump, 1.5 ", "belt,-2", "weld,3e2", "seal,.25")
    found = load(f"csv:{path}", label_column="hours")
    assert found.numbers is not None
    assert found.numbers.tolist() == [1.5, -2.0, 300.0, 0.25]
    assert found.classes == ("number",)
    assert found.subset([2, 0]).numbers.tolist() == [300.0, 1.5]  # type: ignore[union-attr]
    assert found.with_classes(("number",)).numbers is found.numbers
    train, test = train_test_split(found.labels, found.digests(), 0.25)
    assert (len(train), len(test)) == (3, 1)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ('"1,5"', "has a comma; write the number with a point"),
        ('"1.234,5"', "has a comma"),
        ("nan", "a finite number is wanted"),
        ("-inf", "a finite number is wanted"),
        ("1e400", "larger than 1e+30"),
        ("2e30", "larger than 1e+30"),
        ("leak", "'leak' is no number, target=number wants one"),
        ("1_000", "is no number"),
        ("0x1F", "is no number"),
        ("٣", "is no number"),
        ("", "the label is empty"),
    ],
)
def test_a_bad_number_is_named_with_its_line(label: str, said: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "pump,1", f"belt,{label}", "weld,2")
    with pytest.raises(DataError) as caught:
        load(f"csv:{path}", label_column="hours")
    assert f"site 'press-3': {path}:3: " in str(caught.value)
    assert said in str(caught.value)


def test_a_table_without_header_needs_no_number_twice(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "belt,2.5", header="pump,1.5")
    found = load(f"csv:{path}")
    assert found.numbers is not None
    assert found.numbers.tolist() == [1.5, 2.5]


def test_numbers_of_json_lines_and_arrays(tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "2.5"}\n')
    assert load(f"jsonl:{lines}").numbers.tolist() == [1.0, 2.5]  # type: ignore[union-attr]
    lines.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n')
    with pytest.raises(DataError, match=r"t.jsonl:2: the label is 'nan'"):
        load(f"jsonl:{lines}")
    images = np.zeros((3, 4, 4), np.uint8)
    arrays = tmp_path / "a.npz"
    np.savez(arrays, x=images, y=np.array([0.1, 2.0, 3.5], np.float64))
    assert load(f"npz:{arrays}").numbers.tolist() == [0.1, 2.0, 3.5]  # type: ignore[union-attr]
    np.savez(arrays, x=images, y=np.array([0.1, np.nan, 3.5]))
    with pytest.raises(DataError, match=r"a.npz\[x\]\[1\]: the label is 'nan'"):
        load(f"npz:{arrays}")


def pictures(folder: Path, *rows: str) -> str:
    for i in range(4):
        write_image(folder / ("deep" if i % 2 else ".") / f"{i}.png", shade=20 * i)
    table(folder / "labels.csv", *rows, header="file,wear")
    return f"folder:{folder}"


def test_images_have_their_numbers_in_a_table(tmp_path: Path) -> None:
    spec = pictures(tmp_path, "0.png,1.5", "deep/1.png,2", "deep\\3.png,7")
    found = load(spec, label_column="wear")
    assert found.numbers is not None
    assert found.numbers.tolist() == [1.5, 2.0, 7.0]
    assert found.origin(2) == str(tmp_path / "deep" / "3.png")
    assert found.image(2)[1, 1, 0] == 60
    assert any(
        "1 images are not in labels.csv and are not read, e.g. 2.png" in n for n in found.notes
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("5.png,1", "5.png is not in the folder"),
        ("../x.png,1", "is no path within the folder"),
        ("/etc/x.png,1", "is no path within the folder"),
        ("labels.csv,1", "is no image file"),
        ("0.png,1", "stands in line 2 too"),
        ("2.png,much", "'much' is no number"),
    ],
)
def test_a_bad_line_of_the_table_is_named(row: str, said: str, tmp_path: Path) -> None:
    spec = pictures(tmp_path, "0.png,1", row)
    with pytest.raises(DataError) as caught:
        load(spec, label_column="wear")
    assert f"{tmp_path / 'labels.csv'}:3: " in str(caught.value)
    assert said in str(caught.value)


def test_a_folder_without_a_table_says_what_is_wanted(parts: Path) -> None:
    with pytest.raises(DataError, match=r"there is no labels.csv; target=number wants this table"):
        load(f"folder:{parts}")
