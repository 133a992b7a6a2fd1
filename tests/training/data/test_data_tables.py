"""CSV and JSON lines: every malformation names site, file and line, and random bytes raise only DataError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.core.class_names import EMPTY_WORDS, normal
from fedsplit.core.errors import DataError
from fedsplit.core.foreign import printable
from fedsplit.training.data import Examples, load_source, tables

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Examples]:
    def load(name: str, content: str | bytes, **options: str) -> Examples:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_source(f"{path.suffix[1:]}:{path}", site="press-3", **options)

    return load


Read = Callable[..., Examples]


def test_csv_with_header_in_any_order_and_quotes(read: Read) -> None:
    content = '\ufeffid,label , text\r\n1,leak,"oil, ""hot""\nand wet"\r\n\r\n2,tear,belt\r\n'
    examples = read("a.csv", content)
    assert [examples.text(i) for i in range(2)] == ['oil, "hot"\nand wet', "belt"]
    assert examples.classes == ("leak", "tear")
    assert examples.origin(0).endswith("a.csv:2")
    assert examples.origin(1).endswith("a.csv:5")


def test_csv_with_named_columns(read: Read) -> None:
    content = "short,mode\npump,leak\nbelt,tear\n"
    examples = read("a.csv", content, text_column="short", label_column="mode")
    assert examples.text(1) == "belt"


def test_csv_of_two_columns_without_header(read: Read) -> None:
    examples = read("a.csv", "pump,leak\nbelt,tear\nseal,leak\n")
    assert [examples.text(0), examples.text(1)] == ["pump", "belt"]
    assert examples.notes == ("the file has no header: line 1 is read as text,label",)


def test_a_one_sided_header_is_not_taken_for_a_sample(read: Read) -> None:
    with pytest.raises(
        DataError, match=r"'press-3'.*a\.csv: no column 'label' in \['text', 'cat'\]"
    ):
        read("a.csv", "text,cat\npump,leak\nbelt,tear\n")


def test_a_semicolon_file_is_recognised(read: Read) -> None:
    examples = read("a.csv", "text;label\npump;leak\nbelt;tear\n")
    assert examples.classes == ("leak", "tear")
    assert examples.notes == ("columns are separated by semicolons, as the first line shows",)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", r"a\.csv: the file is empty"),
        ("\n\n", r"a\.csv: the file is empty"),
        ("text,label\n", r"a\.csv: there is no sample.*add labelled samples"),
        ("a,b,c\n1,2,3\n", r"a\.csv: no column 'text' and no column 'label' in \['a', 'b', 'c'\]"),
        ("text,label\npump,leak\nbelt\n", r"a\.csv:3: malformed CSV: 1 columns .* 2; quote"),
        ("text,label\nx, y,leak\n", r"a\.csv:2: malformed CSV: 3 columns"),
        ('text,label\n"pump"s,leak\n', r"a\.csv:2: malformed CSV .*check its quotes"),
        ('text,label\npump,leak\n"belt,tear\n', r"a\.csv:3: malformed CSV .*check its quotes"),
        ("text,label\npump,leak\nbelt, \n", r"a\.csv:3: the label is empty; label the sample"),
        ("text,label\n ,leak\n", r"a\.csv:2: the text is empty; fill it in"),
        (b"text,label\npump,leak\nb\xe4lt,tear\n", r"a\.csv:3: not UTF-8 \(byte 0xe4\); save"),
    ],
)
def test_malformed_csv(read: Read, content: str | bytes, pattern: str) -> None:
    with pytest.raises(DataError, match=r"'press-3'.*" + pattern):
        read("a.csv", content)


def test_jsonl_labels_are_strings_or_whole_numbers(read: Read) -> None:
    lines = [
        {"text": "line\u2028separator", "label": "leak"},
        {"text": "belt", "label": 7, "more": [1]},
    ]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    examples = read("a.jsonl", content)
    assert examples.text(0) == "line\u2028separator"
    assert examples.classes == ("7", "leak")
    assert examples.origin(1).endswith("a.jsonl:3")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", r"a\.jsonl: there is no sample"),
        ('{"text": "a", "label": "b"}\n{"text"\n', r"a\.jsonl:2: malformed JSON .*one JSON object"),
        ("[1]\n", r"a\.jsonl:1: a JSON list; each line"),
        ("[" * 100_000, r"a\.jsonl:1: malformed JSON"),
        ('{"text": "a"}', r"a\.jsonl:1: no column 'label' in \['text'\]; add it"),
        ('{"text": 3, "label": "b"}', r"a\.jsonl:1: 'text' is a JSON int; write it as a string"),
        ('{"text": "a", "label": true}', r"a\.jsonl:1: 'label' is a JSON bool"),
        ('{"text": "a", "label": null}', r"a\.jsonl:1: the label is empty"),
        ('{"text": "a", "label": ""}', r"a\.jsonl:1: the label is empty"),
        ('{"text": "\\ud800", "label": "b"}', r"a\.jsonl:1: 'text' holds half a surrogate"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", r"a\.jsonl:1: malformed JSON"),
        (b'\n{"text": "\xff", "label": "b"}', r"a\.jsonl:2: not UTF-8 \(byte 0xff\)"),
    ],
)
def test_malformed_jsonl(read: Read, content: str | bytes, pattern: str) -> None:
    with pytest.raises(DataError, match=r"'press-3'.*" + pattern):
        read("a.jsonl", content)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_over_the_cap_is_not_read(
    read: Read, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"'press-3'.*: 20 bytes, more than the 10 allowed"):
        read(name, "x" * 20)


def _only_data_errors(read: Read, name: str, content: bytes) -> None:
    try:
        examples = read(name, content)
    except DataError as err:
        message = str(err)
    else:
        message = f"'press-3' {name}"
        assert all(examples.text(i) for i in range(len(examples)))
    assert "'press-3'" in message
    assert name in message


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes_as_csv(read: Read, content: bytes) -> None:
    _only_data_errors(read, "a.csv", b"text,label\n" + content)
    _only_data_errors(read, "a.csv", content)


@FUZZ
@given(st.text(alphabet='ab,"\n\r\0\ufeff ;', max_size=60))
def test_almost_csv(read: Read, content: str) -> None:
    _only_data_errors(read, "a.csv", content.encode())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@FUZZ
@given(st.lists(_JSON | st.fixed_dictionaries({"text": _JSON, "label": _JSON}), max_size=4))
def test_any_json_lines(read: Read, rows: list[object]) -> None:
    _only_data_errors(read, "a.jsonl", "\n".join(json.dumps(row) for row in rows).encode())


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes_as_jsonl(read: Read, content: bytes) -> None:
    _only_data_errors(read, "a.jsonl", content)


@FUZZ
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)] * 2), min_size=2
    )
)
def test_what_json_writes_is_read_back(read: Read, rows: list[tuple[str, str]]) -> None:
    rows = [(text, label) for text, label in rows if text.strip() and normal(label)]
    rows = [row for row in rows if normal(row[1]).casefold() not in EMPTY_WORDS]
    # A class that cannot be shown is refused.
    rows = [row for row in rows if printable(normal(row[1])) == normal(row[1])]
    if len(rows) < 2:
        return
    content = "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows)
    examples = read("a.jsonl", content)
    got = [(examples.text(i), examples.classes[examples.labels[i]]) for i in range(len(examples))]
    assert got == [(text, normal(label)) for text, label in rows]


def test_real_work_orders(shared: Callable[[str], Path]) -> None:
    train = load_source(f"csv:{shared('data/work_orders/train.txt')}", site="a")
    assert (len(train), len(train.classes)) == (502, 22)
    assert (train.text(0), train.classes[train.labels[0]]) == ("falure", "Breakdown")
    test = load_source(
        f"csv:{shared('data/work_orders/test.txt')}", site="a", classes=train.classes
    )
    assert len(test) == 62


def test_real_customer_intents(shared: Callable[[str], Path]) -> None:
    spec = f"csv:{shared('data/banking77/train.csv')}"
    examples = load_source(spec, site="a", label_column="category")
    assert (len(examples), len(examples.classes)) == (10003, 77)
