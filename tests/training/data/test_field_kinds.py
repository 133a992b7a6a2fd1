"""Files of kinds that people have: read as they mean them, or told; never silently something else."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsplit.core.class_names import look_alikes, normal, plain, whole_numbers
from fedsplit.core.errors import DataError
from fedsplit.training.data import Examples, load_source
from fedsplit.training.data.pixels import DEPTHS, white_of

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def folder(top: Path, *names: str, each: int = 2) -> Path:
    for name in names:
        (top / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            rng = np.random.default_rng([i, len(name)])
            noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(top / name / f"{i}.png")
    return top


def read(top: Path, **options: float | bool) -> Examples:
    return load_source(f"folder:{top}", site="line-1", **options)  # type: ignore[arg-type]


def table(tmp_path: Path, content: str | bytes, **columns: str) -> Examples:
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_source(f"csv:{path}", site="line-1", **columns)  # type: ignore[arg-type]


def image_of(examples: Examples, name: str) -> np.ndarray:
    (at,) = (i for i in range(len(examples)) if Path(examples.origin(i)).name == name)
    return examples.image(at)


def assert_ramp(image: np.ndarray) -> None:
    np.testing.assert_allclose(image[:, :, 0], 255 * RAMP, atol=1)
    assert (image[:, :, 0] == image[:, :, 2]).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("name", ["x.png", "x.tif", "big.tif"])
def test_a_cameras_bits_in_16_bit_files(tmp_path: Path, bits: int, name: str) -> None:
    top = folder(tmp_path, "a", "b")
    white = 2**bits - 1
    values = np.rint(RAMP * white).astype(np.uint16)
    if name == "big.tif":
        Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()).save(top / "a" / name)
    else:
        Image.fromarray(values).save(top / "a" / name)
    examples = read(top)
    assert_ramp(image_of(examples, name))
    assert examples.pixel_max == white
    assert any(f"0 to {white} is read as black to white" in note for note in examples.notes)
    # A range that is said is the one that counts.
    stated = read(top, pixel_max=4 * white)
    assert image_of(stated, name).max() == round(255 / 4)
    assert any(note.startswith(f"pixel-max={4 * white} is white, as set") for note in stated.notes)


def test_a_pgm_says_itself_what_white_is(tmp_path: Path) -> None:
    top = folder(tmp_path, "a", "b")
    values = np.rint(RAMP * 4095).astype(">u2")
    (top / "a" / "x.pgm").write_bytes(b"P5 8 8 4095\n" + values.tobytes())
    assert_ramp(image_of(read(top), "x.pgm"))


def png_of(values: np.ndarray, colour: int) -> bytes:
    """16 bits a sample: Pillow writes none of these."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # fmt: skip

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")  # fmt: skip


@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_65535_in_a_header_is_the_size_of_a_sample(tmp_path: Path, kind: str) -> None:
    top = folder(tmp_path, "a", "b")
    values = np.rint(RAMP * 4095).astype(">u2")
    pixels = values if kind == "P5" else np.repeat(values[:, :, None], 3, axis=2)
    path = top / "a" / "x.pnm"
    path.write_bytes(kind.encode() + b" 8 8 65535\n" + pixels.tobytes())
    examples = read(top)
    assert_ramp(image_of(examples, "x.pnm"))
    assert examples.pixel_max == 4095
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated"):
        read(top)


def tiff_of(values: np.ndarray, *, order: str = "<", packed: bool = False, planes: bool = False) -> bytes:  # fmt: skip
    """16 bits a colour, [H, W, C]: Pillow writes none of these."""
    import struct
    import zlib

    height, width, channels = values.shape
    parts = list(np.moveaxis(values, 2, 0)) if planes else [values]
    raw = [part.astype(f"{order}u2").tobytes() for part in parts]
    strips = [zlib.compress(one) for one in raw] if packed else raw
    body, tables, start = b"".join(strips), b"", 8
    places = [start + sum(map(len, strips[:i])) for i in range(len(strips))]
    entries = []

    def entry(tag: int, kind: str, *numbers: int) -> None:
        nonlocal tables
        content = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(content) > 4:
            at = start + len(body) + len(tables)
            tables += content + b"\0" * (len(content) % 2)
            content = struct.pack(f"{order}I", at)
        code = {"H": 3, "I": 4}[kind]
        entries.append(struct.pack(f"{order}HHI", tag, code, len(numbers)) + content.ljust(4, b"\0"))  # fmt: skip

    body += b"\0" * (len(body) % 2)
    entry(256, "H", width)
    entry(257, "H", height)
    entry(258, "H", *[16] * channels)
    entry(259, "H", 8 if packed else 1)
    entry(262, "H", 2)
    entry(273, "I", *places)
    entry(277, "H", channels)
    entry(278, "H", height)
    entry(279, "I", *map(len, strips))
    entry(284, "H", 2 if planes else 1)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", start + len(body) + len(tables))
    return head + body + tables + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + b"\0" * 4  # fmt: skip


@pytest.mark.parametrize("white", [4095, 65535])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_16_bit_colours_in_tiff_keep_their_depth(
    tmp_path: Path, white: int, order: str, packed: bool
) -> None:
    top = folder(tmp_path, "a", "b")
    values = np.repeat(np.rint(RAMP * white)[:, :, None], 3, axis=2)
    path = top / "a" / "x.tif"
    path.write_bytes(tiff_of(values, order=order, packed=packed))
    assert_ramp(image_of(read(top), "x.tif"))
    # Pillow mixes the planes up, or drops their low bytes.
    path.write_bytes(tiff_of(values, order=order, packed=packed, planes=True))
    with pytest.raises(DataError, match=r"x\.tif.*separate planes.*save it as RGB"):
        read(top)


def test_a_16_bit_tiff_in_which_0_is_white_is_named(tmp_path: Path) -> None:
    top = folder(tmp_path, "a", "b")
    grey = Image.fromarray(np.rint(RAMP * 4095).astype(np.uint16))
    grey.save(top / "a" / "x.tif", tiffinfo={262: 0})
    with pytest.raises(DataError, match=r"x\.tif.*0 is white; save it so that 0 is black"):
        read(top)


@pytest.mark.parametrize("white", [4095, 65535])
@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])  # fmt: skip
def test_16_bit_colours_keep_their_depth(
    tmp_path: Path, white: int, colour: int, channels: int
) -> None:
    top = folder(tmp_path, "a", "b")
    grey = np.rint(RAMP * white)
    values = np.repeat(grey[:, :, None], channels, axis=2)
    if channels in (2, 4):
        values[:, :, -1] = 65535
    (top / "a" / "x.png").write_bytes(png_of(values, colour))
    assert_ramp(image_of(read(top), "x.png"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_that_overshoot_one_are_not_black(tmp_path: Path, dtype: type) -> None:
    x = np.repeat(RAMP[None], 4, axis=0).astype(dtype)
    x[0, 0, 0] = 1.0000001
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 1, 0, 1]))
    examples = load_source(f"npz:{tmp_path / 'a.npz'}", site="line-1")
    assert_ramp(examples.image(1))
    assert examples.image(0)[0, 0, 0] == 255
    assert any(note.startswith("pixels are floats: 0 to 1 is read") for note in examples.notes)


def test_bytes_of_which_a_few_bits_are_used_are_told(tmp_path: Path) -> None:
    x = np.rint(RAMP * 15).astype(np.uint8)[None].repeat(4, axis=0)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 1, 0, 1]))
    examples = load_source(f"npz:{tmp_path / 'a.npz'}", site="line-1")
    assert examples.notes == (
        "pixels use 0 to 15 of 255, so the images are dark; if 15 is white, set pixel-max=15",
    )
    stated = load_source(f"npz:{tmp_path / 'a.npz'}", site="line-1", pixel_max=15)
    np.testing.assert_allclose(stated.image(0)[:, :, 0], 255 * RAMP, atol=9)


@given(st.sampled_from(DEPTHS), st.floats(0.51, 1))
def test_the_range_is_the_smallest_that_holds_all(depth: int, share: float) -> None:
    if depth > 255:
        assert white_of(round(depth * share), floats=False) == depth


def test_what_lies_elsewhere_is_told(tmp_path: Path) -> None:
    top = folder(tmp_path / "set", "a", "b")
    folder(top / "a", "2024", each=5)
    (top / "a" / "2024" / "0.png").replace(top / "stray.png")
    for name in ("x.heic", "y.heic", "z.jp2", "notes"):
        (top / "b" / name).write_bytes(b"x")
    pages = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    pages[0].save(top / "b" / "p.tif", save_all=True, append_images=pages[1:])
    notes = "\n".join(read(top).notes)
    assert "4 images lie deeper, in a/2024, and are not read" in notes
    assert "1 images lie beside the class folders and are not read: stray.png" in notes
    assert "by extension: 2 .heic, 1 .jp2, 1 no extension" in notes
    assert "1 files have more than one page or frame" in notes


def test_a_choice_without_its_broken_files_takes_no_unseen_ones_in(tmp_path: Path) -> None:
    top = folder(tmp_path, "a", "b", each=10)
    for path in sorted(top.glob("*/*.png"))[::2]:
        path.write_bytes(path.read_bytes()[:60])
    examples = read(top, leave_out_broken=True, max_samples=12)
    assert 2 <= len(examples) < 12
    assert all(examples.image(i).shape == (8, 8, 3) for i in range(len(examples)))


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    top = folder(tmp_path / "flat", "train", "test")
    with pytest.raises(
        DataError, match=r"test, train are parts of a data set and no classes; sort"
    ):
        read(top)
    folder(top, "a")
    with pytest.raises(DataError, match=r"test, train are parts of a data set and no classes"):
        read(top)
    declared = load_source(f"folder:{top}", site="line-1", classes=("a", "test", "train"))
    assert len(declared) == 6
    folder(tmp_path / "deep" / "train", "a", "b")
    folder(tmp_path / "deep" / "test", "a", "b")
    with pytest.raises(DataError, match=r"give train alone \(folder:.*deep/train\)"):
        read(tmp_path / "deep")


def test_many_folders_below_are_one_note(tmp_path: Path) -> None:
    top = folder(tmp_path, "a", "b")
    folder(top / "a", *(f"2024-{day:03}" for day in range(99)), each=1)
    assert read(top).notes == (
        "99 images lie deeper, in a/2024-000, a/2024-001, a/2024-002, a/2024-003, a/2024-004 and 94 more folders, and are "
        "not read; move them up one folder",
    )
    folder(top / "c", "2024", each=3)
    with pytest.raises(
        DataError, match="/c: the class folder has no image; its 3 images lie deeper"
    ):
        read(top)


def test_a_place_without_rights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = folder(tmp_path, "a", "b")
    real = os.stat

    def stat(path: object, **options: object) -> os.stat_result:
        if str(path).startswith(str(top)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(DataError, match="cannot be looked at \\(Permission denied\\); check path and rights"):  # fmt: skip
        read(top)


def test_folders_of_one_name_in_two_forms_are_one_class(tmp_path: Path) -> None:
    name = "ガラス割れ"
    top = folder(tmp_path, "OK", unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))  # fmt: skip
    examples = read(top)
    assert examples.classes == ("OK", name)
    assert len(examples) == 6
    assert any(note.startswith("2 folders are one class 'ガラス割れ'") for note in examples.notes)


def test_a_folder_whose_name_is_no_utf8_is_named_with_its_cure(tmp_path: Path) -> None:
    top = folder(tmp_path, "a", "b")
    raw = os.path.join(os.fsencode(top), "傷".encode("cp932"))  # noqa: PTH118 - bytes
    try:
        os.mkdir(raw)  # noqa: PTH102 - bytes
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(DataError) as caught:
        read(top)
    text = str(caught.value)
    assert text.isprintable()
    text.encode()
    assert "not UTF-8, in cp932 they are '傷'; rename the folder" in text


@pytest.mark.parametrize("name", ["a\xa0b", "a\u200bb", "a\x07b"])
def test_a_class_that_cannot_be_shown_is_named_before_it_leaves(tmp_path: Path, name: str) -> None:
    shown = name.encode("unicode_escape").decode()
    with pytest.raises(DataError, match=rf"the class '{re.escape(shown)}' holds .*; rename it"):
        read(folder(tmp_path, name, "ひび\u3000割れ"))


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    top = folder(tmp_path, "a", "b")
    (top / "c").mkdir()
    with pytest.raises(DataError, match=r"/c: the class folder has no image"):
        read(top)


@pytest.mark.parametrize("head", ["内容,区分", "sentence,class"], ids=["Japanese", "other"])
def test_a_header_of_other_names_is_no_sample(tmp_path: Path, head: str) -> None:
    rows = "ポンプ漏れ,漏れ\nモーター停止,停止\nシール摩耗,漏れ\n"
    text, label = head.split(",")
    with pytest.raises(DataError, match=f"header or a sample.*set text-column={text} and label-column={label}"):  # fmt: skip
        table(tmp_path, f"{head}\n{rows}")
    assert len(table(tmp_path, f"{head}\n{rows}", text_column=text, label_column=label)) == 3


def test_a_header_in_capitals_is_the_header(tmp_path: Path) -> None:
    examples = table(tmp_path, "Text,LABEL\npump leaks,leak\nmotor stops,stop\n")
    assert examples.classes == ("leak", "stop")
    assert examples.notes == ("the columns 'Text' and 'LABEL' are read as text and label",)


def test_a_text_of_any_length_is_read(tmp_path: Path) -> None:
    assert (
        len(table(tmp_path, f"text,label\n{'word ' * 40_000},leak\nmotor,stop\n").text(0))
        == 200_000
    )


def test_labels_in_several_spellings(tmp_path: Path) -> None:
    spelled = table(tmp_path, "text,label\na,crack\nb, crack \nc,Crack\nd,ＯＫ\ne,OK\n")
    assert spelled.classes == ("Crack", "OK", "crack", "ＯＫ")
    assert spelled.notes == (
        "the classes 'Crack', 'crack' look alike; if they are one, give them one name",
        "the classes 'OK', 'ＯＫ' look alike; if they are one, give them one name",
    )
    forms = "\n".join(
        f"{i},{unicodedata.normalize(f, 'ガス')}" for i, f in enumerate(("NFC", "NFD"))
    )
    assert table(tmp_path, f"text,label\n{forms}\nx,油\n").classes == ("ガス", "油")


def test_whole_numbers_with_decimals_are_whole_numbers(tmp_path: Path) -> None:
    examples = table(tmp_path, "text,label\npump,1.0\nmotor,0.0\nx,1.0\n")
    assert examples.classes == ("0", "1")
    assert examples.notes == ("labels such as '0.0' are read as '0'",)
    # As the run has them once all sites have answered.
    again = load_source(f"csv:{tmp_path / 't.csv'}", site="line-1", classes=("0", "1", "2"))
    assert again.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("word", ["NaN", "nan", "NULL", "#N/A"])
def test_a_word_for_no_label_is_no_class(tmp_path: Path, word: str) -> None:
    rows = f"text,label\npump,{word}\nmotor,stop\nx,leak\n"
    with pytest.raises(DataError, match=f":2: the label is '{word}', which stands for a label that is not there"):  # fmt: skip
        table(tmp_path, rows)
    declared = load_source(f"csv:{tmp_path / 't.csv'}", site="a", classes=(word, "stop", "leak"))
    assert len(declared) == 3


def test_tables_of_other_programs(tmp_path: Path) -> None:
    rows = ("text,label", "pump leaks,leak", "motor stops,stop")
    for content in (
        "\n".join(rows).replace(",", "\t"),
        "sep=,\n" + "\n".join(rows),
        "sep=;\r\n" + "\r\n".join(rows).replace(",", ";"),
        "\n".join(rows).encode("utf-16"),
    ):
        assert table(tmp_path, content).classes == ("leak", "stop")
    with pytest.raises(DataError, match=r"t\.csv:3: malformed CSV: 1 columns"):
        table(tmp_path, "sep=,\ntext,label\nonly\n")
    with pytest.raises(DataError, match=r"the header names 'label' 2 times"):
        table(tmp_path, "text,label,label\npump,leak,1\n")
    with pytest.raises(DataError, match=r"looks like Shift_JIS \(cp932\); save the file as UTF-8"):
        table(tmp_path, "text,label\nポンプから水漏れ,漏れ\n".encode("cp932"))
    for order in ("le", "be"):
        with pytest.raises(DataError, match="looks like UTF-16 without its mark; save the file as UTF-8"):  # fmt: skip
            table(tmp_path, "\n".join(rows).encode(f"utf-16-{order}"))


@given(st.text(max_size=30))
def test_normal_names_stay_as_they_are(name: str) -> None:
    assert normal(normal(name)) == normal(name)
    assert plain(plain(name)) == plain(name)
    assert look_alikes([name]) == []


def test_look_alikes_and_numbers() -> None:
    assert look_alikes(["a b", "ab", "A-B", "x", "1", "1.0", "１"]) == [
        ("1", "1.0", "１"),
        ("A-B", "a b", "ab"),
    ]
    assert whole_numbers(["1.0", "2", "-3.00"]) == {"1.0": "1", "-3.00": "-3"}
    assert whole_numbers(["1.0", "a"]) == {}
    assert whole_numbers(["1.5", "1.0"]) == {}


def test_an_image_in_memory_is_read_like_a_file() -> None:
    """As the hub's data sets give them."""
    from fedsplit.training.data.pixels import read_pixels

    grey = np.repeat(np.rint(RAMP * 4095)[:, :, None], 3, axis=2)
    for content in (png_of(grey, 2), tiff_of(grey, packed=True)):
        with Image.open(io.BytesIO(content)) as image:
            np.testing.assert_array_equal(read_pixels(image).values, grey)


def test_deep_images_of_the_hub_have_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    grey = np.repeat(np.rint(RAMP * 4095)[:, :, None], 3, axis=2)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("string")})
    rows = {"img": [{"bytes": png_of(grey // n, 2)} for n in (1, 2)], "label": ["a", "b"]}
    table = datasets.Dataset.from_dict(rows, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: table)
    examples = load_source("hf:some/set", site="line-1")
    assert examples.pixel_max == 4095
    assert_ramp(examples.image(0))
    assert examples.image(1).max() == 127
    assert any("0 to 4095 is read as black to white" in note for note in examples.notes)
