"""Texts from CSV and JSON lines. A file is read whole, once, and any fault names its line.

CSV: commas, UTF-8, the first line names the columns. A file of exactly two columns whose first line holds
neither declared column name has no header and is read as `text,label`. Called by source.py.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsplit.training.data.examples import Examples, Request, build, digest_of

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 256 * 2**20
"""Texts are held in memory, and a device has little of it."""


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


class _Table:
    """Collects rows and checks each text and label as it comes."""

    def __init__(self, request: Request, path: Path) -> None:
        self.request = request
        self.items = TextItems(path, [], [])
        self.names: list[str] = []

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
        return build(self.request, self.items.path, "text", items=self.items, names=self.names)


def read_csv(path: Path, request: Request) -> Examples:
    """Read `csv:PATH`. Raises DataError for a missing column, a malformed line or bytes that are not UTF-8."""
    table = _Table(request, path)
    rows = _csv_rows(path, request)
    first_line, first = next(rows, (1, []))
    if not first:
        raise request.fault(path, "the file is empty; expected a header and labelled lines")
    columns = _columns(path, request, first)
    if columns is None:
        log.warning("%s has no header; line %d is read as text,label", path, first_line)
        table.add(first_line, first[0], first[1])
    text_at, label_at = columns or (0, 1)
    for line, row in rows:
        if len(row) != len(first):
            raise request.fault(
                f"{path}:{line}",
                f"malformed CSV: {len(row)} columns where the first line has {len(first)}; "
                "quote texts that contain commas",
            )
        table.add(line, row[text_at], row[label_at])
    return table.examples()


def _csv_rows(path: Path, request: Request) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line that each starts on; blank lines are skipped."""
    reader = csv.reader(io.StringIO(_text(path, request), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
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


def _columns(path: Path, request: Request, first: list[str]) -> tuple[int, int] | None:
    """Where text and label stand in a row, or None when the file has no header."""
    names = [name.strip() for name in first]
    wanted = (request.text_column, request.label_column)
    missing = [name for name in wanted if name not in names]
    if not missing:
        return names.index(wanted[0]), names.index(wanted[1])
    if len(missing) == 2 and len(first) == 2:
        return None
    hint = "rename a column, or set text-column and label-column"
    if len(first) == 1 and ";" in first[0]:
        hint = "the file seems to be separated by ';', save it with commas"
    shown = [name[:40] for name in names[:30]]
    raise request.fault(
        path, f"no column {' and no column '.join(map(repr, missing))} in {shown}; {hint}"
    )


def read_jsonl(path: Path, request: Request) -> Examples:
    """Read `jsonl:PATH`, one object a line; labels are strings or whole numbers. Raises DataError."""
    table = _Table(request, path)
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for line, content in enumerate(_text(path, request).split("\n"), start=1):
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
    if column == request.label_column and isinstance(value, int) and not isinstance(value, bool):
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


def _text(path: Path, request: Request) -> str:
    """The file's text; a byte order mark is dropped."""
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
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = raw.count(b"\n", 0, err.start) + 1
        raise request.fault(
            f"{path}:{line}", f"not UTF-8 (byte {raw[err.start]:#04x}); save the file as UTF-8"
        ) from err
