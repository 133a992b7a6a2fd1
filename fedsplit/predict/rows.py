"""Inputs from tables and lines: texts, or paths of images, one a row, without labels. Read by training's own readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedsplit.core.class_names import normal, plain
from fedsplit.core.errors import DataError
from fedsplit.core.foreign import printable
from fedsplit.predict.images import fault
from fedsplit.predict.source import Input, Reading, Source
from fedsplit.training.data.examples import Request
from fedsplit.training.data.image_table import FILE_COLUMN
from fedsplit.training.data.tables import csv_rows, dialect, likely_encoding, text_of

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
TEXT_COLUMN = "text"
MAX_LINE_BYTES = 2**20
_JSON = TABLES[2:]


def table(path: Path, reading: Reading) -> Source:
    """The rows of a CSV or JSON lines file. Raises DataError where it cannot be read or has no such column."""
    column = reading.column or (TEXT_COLUMN if reading.kind == "text" else FILE_COLUMN)
    request = Request(site="", text_column=column)
    notes: list[str] = []
    text = text_of(path, request, notes)
    if path.suffix.lower() in _JSON:
        found = _Json(path, text, column)
        source = Source(found.count(), lambda: found.rows(reading))
    else:
        csv = _Csv(path, text, column, reading, notes)
        source = Source(csv.count(), csv.rows)
    if not source.total:
        raise fault(path, "there is no row in it; give a file with rows")
    source.notes = [f"{printable(path, limit=200)}: {note}" for note in notes]
    return source


class _Csv:
    """A CSV file and the place of the column in it."""

    def __init__(
        self, path: Path, text: str, column: str, reading: Reading, notes: list[str]
    ) -> None:
        self._path, self._reading = path, reading
        self._request = Request(site="", text_column=column)
        self._delimiter, self._skipped, self._text = dialect(text, notes)
        first = next(self._all(), None)
        if first is None:
            raise fault(
                path, f"the file is empty; give a header with the column {column!r}, and rows"
            )
        self._width = len(first[1])
        self._place, self._header = self._find(column, *first, notes)

    def _all(self) -> Iterator[tuple[int, list[str]]]:
        return csv_rows(self._path, self._request, self._text, self._delimiter, self._skipped)

    def _find(self, column: str, line: int, first: list[str], notes: list[str]) -> tuple[int, bool]:
        """(position of the column, is the first line a header). Raises DataError where nothing tells."""
        names = [normal(name) for name in first]
        for spelled in (names, [name.casefold() for name in names]):
            wanted = column if spelled is names else normal(column).casefold()
            if spelled.count(wanted) > 1:
                raise fault(
                    self._path,
                    f"the header names {wanted!r} {spelled.count(wanted)} times; give each column its own name",
                )
            if wanted in spelled:
                place = spelled.index(wanted)
                if names[place] != column:
                    notes.append(f"the column {names[place]!r} is read as {column}")
                return place, True
        if not self._reading.column and len(first) == 2 and self._labelled():
            notes.append(f"the file has no header: line {line} is read as {column},label")
            return 0, False
        shown = [printable(name, limit=40) for name in names[:30]]
        raise fault(
            f"{self._path}:{line}",
            f"no column {column!r} in {shown}; if this line is a header, name the column as --column; if it is none, put a "
            f"header above it",
        )

    def _labelled(self) -> bool:
        """Is the second field of the first line a label, known to the module or there again in the lines below?"""
        rows = self._all()
        label = plain(next(rows)[1][1])
        if label in map(plain, self._reading.classes):
            return True
        return any(len(row) == 2 and plain(row[1]) == label for _, row in rows)

    def count(self) -> int:
        """Rows; those after malformed quotes are none."""
        count = 0
        try:
            for _ in self._all():
                count += 1
        except DataError:
            count += 1
        return count - self._header

    def rows(self) -> Iterator[Input]:
        """The inputs, each row's fault in its place."""
        rows = self._all()
        if self._header:
            next(rows)
        while True:
            try:
                line, row = next(rows)
            except StopIteration:
                return
            except DataError as err:
                yield Input(str(self._path), fault=f"{err}; the rest of the file is not read")
                return
            where = f"{self._path}:{line}"
            if len(row) != self._width:
                yield Input(
                    where,
                    fault=f"{printable(where, limit=1000)}: malformed CSV: {len(row)} columns where the first line has "
                    f"{self._width}; quote texts that contain commas",
                )
            else:
                yield _input(row[self._place], where, self._path, self._reading)


class _Json:
    """A file of one JSON object a line."""

    def __init__(self, path: Path, text: str, column: str) -> None:
        # Not splitlines(): U+2028 and its like may stand inside a JSON string.
        self._path, self._column = path, column
        self._lines = text.split("\n")

    def count(self) -> int:
        return sum(1 for line in self._lines if line.strip())

    def rows(self, reading: Reading) -> Iterator[Input]:
        for number, content in enumerate(self._lines, start=1):
            if not content.strip():
                continue
            where = f"{self._path}:{number}"
            try:
                value = self._value(content)
                value.encode()
            except (ValueError, RecursionError) as err:
                yield Input(
                    where, fault=f"{printable(where, limit=1000)}: {printable(err, limit=300)}"
                )
            else:
                yield _input(value, where, self._path, reading)

    def _value(self, content: str) -> str:
        """Raises ValueError."""
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as err:
            raise ValueError(f"malformed JSON ({err}); each line must be one JSON object") from err
        if not isinstance(row, dict):
            raise ValueError(f"a JSON {type(row).__name__}; each line must be one JSON object")
        if self._column not in row:
            keys = [printable(key, limit=40) for key in list(row)[:30]]
            raise ValueError(f"no column {self._column!r} in {keys}; name the column as --column")
        value = row[self._column]
        if not isinstance(value, str):
            raise ValueError(
                f"{self._column!r} is a JSON {type(value).__name__}; write it as a string"
            )
        return value


def _input(value: str, where: str, file: Path, reading: Reading) -> Input:
    """Of one field: a text as it is, or an image's path, relative to the table's folder."""
    if not value.strip():
        what = "text" if reading.kind == "text" else "path"
        return Input(
            where,
            fault=f"{printable(where, limit=1000)}: the {what} is empty; fill it in or remove the line",
        )
    if reading.kind == "text":
        return Input(value, value, where)
    name = value.strip()
    path = file.parent / Path(name).expanduser()
    if "\\" in name and not _there(path):
        path = file.parent / name.replace("\\", "/")
    return Input(name, path, where)


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def text_file(path: Path) -> Source:
    """A file of texts, one a line. Raises DataError where it cannot be opened or has none."""
    count = 0
    try:
        with path.open("rb") as file:
            count = sum(1 for line in file if line.strip())
    except OSError as err:
        raise fault(path, f"cannot be read ({err.strerror}); check path and rights") from err
    if not count:
        raise fault(path, "there is no text in it; give one text a line")

    def read() -> Iterator[Input]:
        with path.open("rb") as file:
            yield from lines(file, str(path))

    return Source(count, read)


def lines(stream: BinaryIO, where: str) -> Iterator[Input]:
    """One text a line, UTF-8; blank lines are passed over. No line is held that is longer than MAX_LINE_BYTES."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{where}:{number}"
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            yield Input(
                place, fault=f"{place}: more than {MAX_LINE_BYTES} bytes; a text is one line"
            )
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            text = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as err:
            likely = likely_encoding(raw)
            yield Input(
                place,
                fault=f"{place}: not UTF-8 (byte {raw[err.start]:#04x}); {likely}save the texts as UTF-8",
            )
            continue
        if text.strip():
            yield Input(text, text, place)
