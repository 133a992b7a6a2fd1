"""Texts from CSV and JSON lines. A file is read whole, once, and any fault names its line.

CSV: UTF-8, or UTF-16 with its mark; commas, or the semicolons or tabs that the first line shows;
the first line names the columns. A file of exactly two columns whose first line holds neither
declared column name, and whose label comes again below, has no header and is read as `text,label`.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.class_names import normal, plain
from fedsplit.training.data.examples import Examples, Request, build, digest_of
from fedsplit.training.data.numbers import is_number

MAX_FILE_BYTES = 256 * 2**20
"""Texts are held in memory, and a device has little of it."""
_PEEK = 4096


@dataclass(frozen=True, eq=False)
class TextItems:
    """Texts in memory and the line that each one starts on."""

    path: Path
    texts: list[str]
    lines: list[int]

    def get(self, i: int) -> str:
        """Text `i`."""
        return self.texts[i]

    def origin(self, i: int) -> str:
        """`path:line`."""
        return f"{self.path}:{self.lines[i]}"

    def digest(self, i: int) -> int:
        """Of the text."""
        return digest_of(self.texts[i].encode())

    @functools.cached_property
    def nbytes(self) -> int:
        """Of the texts."""
        return sum(map(sys.getsizeof, self.texts))


class Table:
    """Collects rows and checks each text and label as it comes."""

    def __init__(self, request: Request, path: Path) -> None:
        self.request = request
        self.items = TextItems(path, [], [])
        self.names: list[str] = []
        self.notes: list[str] = []

    def add(self, line: int, text: str, label: str) -> None:
        where = f"{self.items.path}:{line}"
        if not text.strip():
            raise self.request.fault(where, "the text is empty; fill it in or remove the line")
        if not label.strip():
            raise self.request.fault(
                where, "the label is empty; label the sample or remove the line"
            )
        self.items.texts.append(text)
        self.items.lines.append(line)
        self.names.append(label.strip())

    def examples(self) -> Examples:
        examples = build(self.request, self.items.path, "text", items=self.items, names=self.names)
        return examples.with_notes(self.items, pixel_max=0, notes=self.notes)


def read_csv(path: Path, request: Request) -> Examples:
    """Read `csv:PATH`. Raises DataError for a missing column, a malformed line or bytes that are no UTF-8."""
    return read_rows(path, request).examples()


def read_rows(path: Path, request: Request) -> Table:
    """The texts and labels of a CSV file. Raises DataError as `read_csv` does."""
    table = Table(request, path)
    delimiter, skipped, text = dialect(text_of(path, request, table.notes), table.notes)
    rows = list(csv_rows(path, request, text, delimiter, skipped))
    if not rows:
        raise request.fault(path, "the file is empty; expected a header and labelled lines")
    (first_line, first), below = rows[0], rows[1:]
    for line, row in below:
        if len(row) != len(first):
            raise request.fault(
                f"{path}:{line}",
                f"malformed CSV: {len(row)} columns where the first line has {len(first)}; "
                "quote texts that contain commas",
            )
    columns = _columns(path, request, first, table.notes)
    if columns is None:
        if request.listed is None:  # Else it was asked at roll call.
            _check_no_header(path, request, first_line, first, [row[1] for _, row in below])
        table.notes.append(f"the file has no header: line {first_line} is read as text,label")
        below, columns = rows, (0, 1)
    for line, row in below:
        table.add(line, row[columns[0]], row[columns[1]])
    return table


def _check_no_header(
    path: Path, request: Request, line: int, first: list[str], labels: list[str]
) -> None:
    """Raise DataError where a first line is rather names of columns than a sample: its label never comes again."""
    label = plain(first[1])
    if request.target == "number" and is_number(first[1]):
        return
    if label in map(plain, labels) or label in map(plain, request.classes or ()):
        return
    raise request.fault(
        f"{path}:{line}",
        f"is this line a header or a sample? {label[:60]!r} is no label of any other line. If it is a header, set "
        f"text-column={first[0].strip()[:60]} and label-column={label[:60]}; if it is a sample, put a line "
        f"{request.text_column},{request.label_column} above it",
    )


def dialect(text: str, notes: list[str]) -> tuple[str, int, str]:
    """What separates columns, how many lines were skipped, and the text from the header on."""
    first, _, rest = text.partition("\n")
    told = re.fullmatch(r"sep=(.)", first.strip("\r"))
    if told is not None:
        if told[1] != ",":
            notes.append(f"columns are separated by {told[1]!r}, as the file's first line says")
        return told[1], 1, rest
    if "," not in first:
        for delimiter, name in (("\t", "tabs"), (";", "semicolons")):
            if delimiter in first:
                notes.append(f"columns are separated by {name}, as the first line shows")
                return delimiter, 0, text
    return ",", 0, text


def csv_rows(
    path: Path, request: Request, text: str, delimiter: str, skipped: int
) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line that each starts on; blank lines are skipped."""
    csv.field_size_limit(MAX_FILE_BYTES)  # of the process; csv's own is 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    while True:
        line = reader.line_num + 1 + skipped
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as err:
            raise request.fault(
                f"{path}:{line}", f"malformed CSV ({err}); check its quotes"
            ) from err
        if row:
            yield line, row


def _columns(
    path: Path, request: Request, first: list[str], notes: list[str]
) -> tuple[int, int] | None:
    """Where text and label stand in a row, or None when the file has no header."""
    names = [normal(name) for name in first]
    wanted = (normal(request.text_column), normal(request.label_column))
    lower = [name.casefold() for name in names]
    if not set(wanted) & set(names) and all(lower.count(name.casefold()) == 1 for name in wanted):
        found = [names[lower.index(name.casefold())] for name in wanted]
        notes.append(
            f"the columns {found[0]!r} and {found[1]!r} are read as {wanted[0]} and {wanted[1]}"
        )
        wanted = (found[0], found[1])
    missing = [name for name in wanted if name not in names]
    for name in wanted:
        if names.count(name) > 1:
            raise request.fault(
                path,
                f"the header names {name!r} {names.count(name)} times; give each column its own name",
            )
    if not missing:
        return names.index(wanted[0]), names.index(wanted[1])
    if len(missing) == 2 and len(first) == 2:
        return None
    shown = [name[:40] for name in names[:30]]
    raise request.fault(
        path,
        f"no column {' and no column '.join(map(repr, missing))} in {shown}; set text-column and label-column, or rename a "
        f"column",
    )


def read_jsonl(path: Path, request: Request) -> Examples:
    """Read `jsonl:PATH`, one object a line; labels are strings or numbers. Raises DataError."""
    table = Table(request, path)
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for line, content in enumerate(text_of(path, request, table.notes).split("\n"), start=1):
        if not content.strip():
            continue
        where = f"{path}:{line}"
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as err:
            raise request.fault(
                where, f"malformed JSON ({err}); each line must be one JSON object"
            ) from err
        if not isinstance(row, dict):
            raise request.fault(
                where, f"a JSON {type(row).__name__}; each line must be one JSON object"
            )
        table.add(
            line,
            _value(request, where, row, request.text_column),
            _value(request, where, row, request.label_column),
        )
    return table.examples()


def _value(request: Request, where: str, row: dict[str, object], column: str) -> str:
    if column not in row:
        keys = [key[:40] for key in list(row)[:30]]
        raise request.fault(
            where, f"no column {column!r} in {keys}; add it, or set text-column and label-column"
        )
    value = row[column]
    if value is None:
        return ""
    if (
        column == request.label_column
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ):
        return str(value)
    if not isinstance(value, str):
        raise request.fault(
            where, f"{column!r} is a JSON {type(value).__name__}; write it as a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise request.fault(
            where, f"{column!r} holds half a surrogate pair ({err.reason}); rewrite it as UTF-8"
        ) from err
    return value


def text_of(path: Path, request: Request, notes: list[str]) -> str:
    """The file's text; a byte order mark is dropped, and what was guessed goes to the notes."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise request.fault(
                path,
                f"{size} bytes, more than the {MAX_FILE_BYTES} allowed; split or sample the file",
            )
        raw = path.read_bytes()
    except OSError as err:
        raise request.fault(
            path, f"cannot be read ({err.strerror}); check path and rights"
        ) from err
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        notes.append("the file is UTF-16, as its first bytes say")
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig"
    zeros = raw[:_PEEK].count(0)
    if encoding == "utf-8-sig" and zeros > len(raw[:_PEEK]) // 8:
        raise request.fault(
            path,
            f"{zeros} of the first {len(raw[:_PEEK])} bytes are zero: it looks like UTF-16 without its mark; save the file as "
            "UTF-8",
        )
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as err:
        line = raw.count(b"\n", 0, err.start) + 1
        raise request.fault(
            f"{path}:{line}",
            f'not UTF-8 (byte {raw[err.start]:#04x}); {likely_encoding(raw)}save the file as UTF-8 (in Excel: "CSV UTF-8")',
        ) from err


def likely_encoding(raw: bytes) -> str:
    """The encoding that a file which is no UTF-8 most likely has, if one of Japan's fits all of it."""
    for encoding, name in (("cp932", "Shift_JIS (cp932)"), ("euc_jp", "EUC-JP")):
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        # Many bytes of other encodings are kanji or halfwidth letters here, few are kana.
        if sum(0x3041 <= ord(c) <= 0x30FE for c in text) > 1:
            return f"it looks like {name}; "
    return ""
