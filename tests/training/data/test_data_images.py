"""Folders, npz files and the hub: lazily read images, and every fault with its site and file."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsplit.core.errors import DataError
from fedsplit.training.data import arrays, folder, image_files, load_source

from .conftest import write_image

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_a_folder_a_class(parts: Path) -> None:
    examples = load_source(f"folder:{parts}", site="a")
    assert examples.kind == "image"
    assert examples.classes == ("ok", "scratch")
    assert examples.labels.tolist() == [0, 0, 1, 1]
    image = examples.image(2)
    assert (image.shape, image.dtype) == ((4, 6, 3), np.uint8)
    assert image[1, 1].tolist() == [100, 100, 100]
    assert image[0, 0].tolist() == [255, 0, 0]
    assert examples.origin(2) == str(parts / "scratch" / "c.PNG")


def test_every_accepted_extension_is_read(tmp_path: Path) -> None:
    for extension in folder.EXTENSIONS:
        write_image(tmp_path / "set" / "ok" / f"a{extension}", shade=80)
    examples = load_source(f"folder:{tmp_path / 'set'}", site="a")
    assert len(examples) == len(folder.EXTENSIONS)
    for i in range(len(examples)):
        assert abs(int(examples.image(i)[3, 5, 1]) - 80) < 12


def test_a_relative_path_and_other_files(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parts / "ok" / "Thumbs.db").write_bytes(b"x")
    (parts / "ok" / ".hidden.png").write_bytes(b"x")
    (parts / ".cache").mkdir()
    monkeypatch.chdir(parts.parent)
    examples = load_source("folder:parts", site="a")
    assert len(examples) == 4
    assert examples.notes[0].startswith(
        "files that are not read, by extension: 1 .db; read are .png"
    )


@pytest.mark.parametrize(
    ("mode", "value", "wanted"),
    [
        ("L", 90, [90, 90, 90]),
        ("1", 1, [255, 255, 255]),
        ("LA", (90, 10), [90, 90, 90]),
        ("RGBA", (1, 2, 3, 4), [1, 2, 3]),
        ("I;16", 0x5A33, [0x5A, 0x5A, 0x5A]),
    ],
)
def test_every_colour_mode_becomes_rgb(
    parts: Path, mode: str, value: Any, wanted: list[int]
) -> None:
    Image.new(mode, (3, 2), value).save(parts / "ok" / "a.png")
    image = load_source(f"folder:{parts}", site="a").image(0)
    assert (image.shape, image.dtype) == ((2, 3, 3), np.uint8)
    assert image[1, 2].tolist() == wanted


def test_a_turned_photo_is_set_upright(parts: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(parts / "ok" / "b.jpg", exif=exif)
    assert load_source(f"folder:{parts}", site="a").image(1).shape == (8, 4, 3)


def test_a_float_tiff_has_the_range_of_its_source(tmp_path: Path) -> None:
    for name in ("ok", "scratch"):
        (tmp_path / name).mkdir()
        Image.new("F", (3, 2), 0.5).save(tmp_path / name / "e.tif")
    examples = load_source(f"folder:{tmp_path}", site="press-3")
    assert examples.image(0).tolist()[0][0] == [128] * 3
    assert any(note.startswith("pixels are floats: 0 to 1 is") for note in examples.notes)
    # 1 cannot be white in floats and in bytes.
    Image.new("L", (3, 2), 128).save(tmp_path / "ok" / "f.png")
    with pytest.raises(DataError, match=r"floats of 0 to 1 in 2 of 3 images and whole numbers in"):
        load_source(f"folder:{tmp_path}", site="press-3")
    Image.new("F", (3, 2), 3.0).save(tmp_path / "ok" / "e.tif")
    with pytest.raises(DataError, match=r"'press-3'.*pixels go up to 3, .* set pixel-max"):
        load_source(f"folder:{tmp_path}", site="press-3")
    assert load_source(f"folder:{tmp_path}", site="a", pixel_max=6).image(0)[0, 0, 0] == 128


def test_faults_of_the_folders(parts: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"'press-3'.*empty: the folder is empty; add"):
        load_source(f"folder:{empty}", site="press-3")
    write_image(empty / "a.png")
    with pytest.raises(DataError, match=r"'press-3'.*empty: 1 files but no class folder; sort"):
        load_source(f"folder:{empty}", site="press-3")
    with pytest.raises(DataError, match=r"'press-3'.*a\.png: not a folder"):
        load_source(f"folder:{empty / 'a.png'}", site="press-3")
    (parts / "dent").mkdir()
    with pytest.raises(DataError, match=r"'press-3'.*dent: the class folder has no image; add"):
        load_source(f"folder:{parts}", site="press-3")


def test_an_unknown_folder_names_a_file_and_the_classes(parts: Path) -> None:
    pattern = r"'press-3'.*scratch/c\.PNG: label 'scratch' is not one of .*'ok', 'dent'"
    with pytest.raises(DataError, match=pattern):
        load_source(f"folder:{parts}", site="press-3", classes=("ok", "dent"))


def test_a_single_image(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "ok" / "a.png")
    with pytest.raises(DataError, match=r"'press-3'.*set: only one sample"):
        load_source(f"folder:{tmp_path / 'set'}", site="press-3")


def _damage(content: bytes) -> bytes:
    middle = content.index(b"IDAT") + 6
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "change", [_damage, lambda c: c[:20], lambda c: b"", lambda c: b"%!PS-Adobe"]
)
def test_a_corrupt_png_is_found_at_load(parts: Path, change: Callable[[bytes], bytes]) -> None:
    path = parts / "ok" / "a.png"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"'press-3'.*ok/a\.png: not a readable.*replace or remove"):
        load_source(f"folder:{parts}", site="press-3")


def test_broken_files_are_all_named_before_training_or_left_out(parts: Path) -> None:
    path = parts / "ok" / "b.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"'press-3'.*ok/b\.jpg: not a readable image"):
        load_source(f"folder:{parts}", site="press-3")
    examples = load_source(f"folder:{parts}", site="press-3", leave_out_broken=True)
    assert [Path(examples.origin(i)).name for i in range(len(examples))] == [
        "a.png",
        "c.PNG",
        "d.jpeg",
    ]
    assert examples.notes[0].startswith("1 broken files are left out (broken-files=leave-out): ")
    (parts / "ok" / "c.png").write_bytes(path.read_bytes()[:60])
    with pytest.raises(
        DataError, match=r"2 files cannot be read: .*ok/b\.jpg; .*ok/c\.png; the first says"
    ):
        load_source(f"folder:{parts}", site="press-3")


def test_a_file_that_vanishes_is_named(parts: Path) -> None:
    examples = load_source(f"folder:{parts}", site="press-3")
    (parts / "ok" / "a.png").unlink()
    with pytest.raises(DataError, match=r"'press-3'.*ok/a\.png"):
        examples.image(0)


@pytest.mark.parametrize("side", [9_000, 10_000, 60_000])
def test_a_decompression_bomb_is_refused_unopened(parts: Path, side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))
    (parts / "ok" / "a.png").write_bytes(bomb + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=r"'press-3'.*ok/a\.png: .*pixels.*scale it down"):
        load_source(f"folder:{parts}", site="press-3")


def test_a_huge_file_is_refused_unopened(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"'press-3'.*ok/a\.png: \d+ bytes, more than the 10"):
        load_source(f"folder:{parts}", site="press-3")


Npz = Callable[..., Path]


def test_npz_of_every_shape_and_dtype(npz: Npz) -> None:
    grey = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    y = np.array(["ok", "bad"])
    for x in (grey, grey[..., None], np.repeat(grey[..., None], 3, axis=3)):
        examples = load_source(f"npz:{npz(x=x, y=y)}", site="a")
        assert examples.image(1).shape == (3, 4, 3)
        assert examples.image(1)[0, 1].tolist() == [13, 13, 13]
    unit = load_source(f"npz:{npz(x=(grey / 23).astype(np.float32), y=y)}", site="a")
    assert unit.image(1)[2, 3].tolist() == [255, 255, 255]
    wide = load_source(f"npz:{npz(x=grey.astype(np.float64), y=y)}", site="a")
    assert wide.image(1)[2, 3].tolist() == [23, 23, 23]
    assert wide.classes == ("bad", "ok")
    assert wide.origin(1).endswith("set.npz[x][1]")


def test_npz_labels_by_number_and_name(npz: Npz) -> None:
    x, y = np.zeros((3, 2, 2), np.uint8), np.array([1, 0, 1])
    assert load_source(f"npz:{npz(x=x, y=y)}", site="a").classes == ("0", "1")
    named = npz(x=x, y=y, classes=np.array(["ok", "bad"]), other=np.zeros(1))
    assert load_source(f"npz:{named}", site="a").labels.tolist() == [0, 1, 0]
    declared = load_source(f"npz:{named}", site="a", classes=("ok", "bad"))
    assert declared.labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"'press-3'.*set\.npz\[x\]\[0\]: label 'bad' is not one"):
        load_source(f"npz:{named}", site="press-3", classes=("ok", "dent"))


def test_npz_groups(npz: Npz) -> None:
    x, y = np.zeros((4, 2, 2), np.uint8), np.array([1, 0, 1, 0])
    by_name = load_source(f"npz:{npz(x=x, y=y, groups=np.array(['b', 'a', 'b ', 'c']))}", site="a")
    assert by_name.groups is not None
    assert by_name.groups.tolist() == [1, 0, 1, 2]
    subset = by_name.subset([3, 1])
    assert subset.groups is not None
    assert subset.groups.tolist() == [2, 0]
    named = by_name.with_classes(("0", "1", "2")).groups
    assert named is not None
    assert named.tolist() == [1, 0, 1, 2]
    numbers = load_source(f"npz:{npz(x=x, y=y, groups=np.array([9, -4, 9, 9]))}", site="a")
    assert numbers.groups is not None
    assert numbers.groups.tolist() == [1, 0, 1, 1]
    fewer = load_source(f"npz:{npz(x=x, y=y, groups=np.arange(4))}", site="a", max_samples=2)
    assert fewer.groups is not None
    assert fewer.groups.tolist() == fewer.keys.tolist()
    assert load_source(f"npz:{npz(x=x, y=y)}", site="a").groups is None


X, Y = np.zeros((2, 2, 2), np.uint8), np.array([0, 1])


@pytest.mark.parametrize(
    ("contents", "pattern"),
    [
        ({"x": X}, r"no array 'y' among \['x'\]; save it with"),
        ({"x": X[0], "y": Y}, r"x has shape \(2, 2\); it must be"),
        (
            {"x": np.zeros((2, 2, 2, 2), np.uint8), "y": Y},
            r"x has shape \(2, 2, 2, 2\); it must be",
        ),
        ({"x": np.zeros((2, 0, 2), np.uint8), "y": Y}, r"x has shape \(2, 0, 2\)"),
        ({"x": X, "y": Y[:1]}, r"y has shape \(1,\), x \(2, 2, 2\); y must hold one"),
        ({"x": X.astype(np.int64), "y": Y}, "x is int64; save it as uint8"),
        ({"x": X - 0.5, "y": Y}, r"x lies in -0\.5 .. -0\.5; pixels must not"),
        ({"x": X + 256.0, "y": Y}, r"x lies in 256 .. 256, and nothing says"),
        ({"x": X * np.nan, "y": Y}, "x lies in nan .. nan; pixels must not"),
        ({"x": X, "y": Y * 1.5}, "y is float64; save labels as"),
        ({"x": X, "y": np.array(["a", " "])}, r"\[x\]\[1\]: the label is empty"),
        ({"x": X, "y": Y, "classes": np.array(["a"])}, r"\[y\]\[1\]: label 1 has no name"),
        ({"x": X, "y": -Y, "classes": np.array(["a"])}, r"\[y\]\[1\]: label -1 has no name"),
        ({"x": X, "y": Y, "classes": Y}, "classes is int64"),
        ({"x": X, "y": Y, "groups": Y[:1]}, r"groups has shape \(1,\); it must hold one"),
        ({"x": X, "y": Y, "groups": Y * 0.5}, "groups is float64; save groups as integers"),
        ({"x": X, "y": Y, "groups": np.array(["a", " "])}, r"\[groups\]\[1\]: the group is empty"),
        ({"x": X[:1], "y": Y[:1]}, "only one sample"),
        ({"x": X[:0], "y": Y[:0]}, "there is no sample"),
        ({"x": X, "y": np.array([{}, []], dtype=object)}, "pickled objects.*without objects"),
    ],
)
def test_faulty_npz(npz: Npz, contents: dict[str, Any], pattern: str) -> None:
    with pytest.raises(DataError, match=r"'press-3'.*set\.npz.*" + pattern):
        load_source(f"npz:{npz(**contents)}", site="press-3")


def _member(shape: str, body: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize("shape", ["(2, 99999999, 99999999)", "(2, 2, 3)", "(-1, -2, 4)"])
def test_a_header_that_lies_allocates_nothing(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", _member(shape, b"\0" * 8))
    with pytest.raises(DataError, match=r"'press-3'.*set\.npz: not a usable npz"):
        load_source(f"npz:{path}", site="press-3")


def test_a_zip_bomb_is_refused(npz: Npz, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_ARRAY_BYTES", 10_000)
    path = npz(x=np.zeros((2, 100, 100), np.uint8), y=Y)
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"'press-3'.*set\.npz: 'x' takes 20\d+ bytes, more than"):
        load_source(f"npz:{path}", site="press-3")


def _whole_npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=X, y=Y)
    return stream.getvalue()


WHOLE = _whole_npz()


def _only_data_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        examples = load_source(f"npz:{path}", site="press-3")
    except DataError as err:
        message = str(err)
    else:
        message = f"'press-3' {path}"
        assert [examples.image(i).shape[2] for i in range(len(examples))] == [3] * len(examples)
    assert "'press-3'" in message
    assert path.name in message


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes_as_npz(tmp_path: Path, content: bytes) -> None:
    _only_data_errors(tmp_path / "set.npz", content)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), max_size=4))
def test_flipped_bytes_in_an_npz(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE)
    for at, bits in flips:
        content[at] ^= bits
    _only_data_errors(tmp_path / "set.npz", bytes(content))


@FUZZ
@given(header=st.text(alphabet="{}()'descrfotanshp,: |u1<i8TrueFal\n", max_size=90) | st.text())
def test_random_headers_in_an_npz(tmp_path: Path, header: str) -> None:
    raw = header.encode()
    path = tmp_path / "set.npz"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        prefix = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw))
        archive.writestr("x.npy", prefix + raw + b"\0" * 16)
        archive.writestr("y.npy", _member("(2,)", b"\0\1"))
    _only_data_errors(path, stream.getvalue())


def test_real_photos_as_npz(shared: Callable[[str], Path], npz: Npz) -> None:
    with np.load(shared("data/cifar10/cifar10_jpeg_20k_5k.npz")) as raw:
        ends, content = raw["test_offsets"], raw["test_bytes"]
        files = [content[ends[i] : ends[i + 1]].tobytes() for i in range(40)]
        x = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
        path = npz(x=x, y=raw["test_labels"][:40], classes=raw["classes"])
        classes = tuple(str(name) for name in raw["classes"])
        labels = raw["test_labels"][:40].tolist()
    examples = load_source(f"npz:{path}", site="a", classes=classes)
    assert examples.labels.tolist() == labels
    assert np.array_equal(examples.image(7), x[7])


def _serve(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    import datasets

    def load_dataset(name: str, *, split: str) -> Any:
        assert split == "train"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    _serve(monkeypatch, Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features))
    examples = load_source("hf:some/set", site="press-3")
    assert (examples.kind, examples.text(1)) == ("text", "b")
    assert examples.classes == ("no", "yes")
    assert examples.labels.tolist() == [1, 0]
    assert examples.origin(1) == "hf:some/set[train][1]"
    with pytest.raises(DataError, match=r"'press-3': hf:some/set: no column 'mode' in"):
        load_source("hf:some/set", site="press-3", label_column="mode")


def test_hub_images_and_unlabelled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as Column

    stream = io.BytesIO()
    Image.new("L", (3, 2), 90).save(stream, "png")
    features = Features({"img": Column(), "label": Value("string")})
    rows = {"img": [{"bytes": stream.getvalue()}, {"bytes": b"junk"}], "label": ["a", "b"]}
    _serve(monkeypatch, Dataset.from_dict(rows, features))
    with pytest.raises(DataError, match=r"'press-3': hf:some/set\[train\]\[1\]: cannot be read"):
        load_source("hf:some/set", site="press-3")
    with pytest.raises(DataError, match=r"all rows but 1 are broken"):
        load_source("hf:some/set", site="press-3", leave_out_broken=True)
    more = {"img": [rows["img"][0], *rows["img"]], "label": ["b", *rows["label"]]}
    _serve(monkeypatch, Dataset.from_dict(more, features))
    examples = load_source("hf:some/set", site="press-3", leave_out_broken=True)
    assert len(examples) == 2
    assert examples.image(1)[1, 2].tolist() == [90, 90, 90]
    assert examples.notes[0].startswith("1 broken rows are left out")
    _serve(monkeypatch, Dataset.from_dict(rows | {"label": ["a", None]}, features))
    with pytest.raises(DataError, match=r"hf:some/set\[train\]\[1\]: the label is empty"):
        load_source("hf:some/set", site="press-3")


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("no such split")])
def test_an_unreachable_hub_names_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _serve(monkeypatch, error)
    with pytest.raises(DataError, match=r"'press-3': hf:a/b: cannot be loaded .*network.*folder:"):
        load_source("hf:a/b", site="press-3")
