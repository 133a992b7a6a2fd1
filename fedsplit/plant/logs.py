"""Logs of what runs for years: JSON lines in files that are turned over and bounded.

`JsonLines` is one such file. The supervisor writes one a service, line by line from what the service says, and one of
its own. A disk that is full loses lines, never the service; the log says later how many.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fedsplit.core.closing import Closing

MAX_BYTES = 5 * 2**20
FILES = 5
"""A log takes at most `FILES` times `MAX_BYTES`, the file in use among them."""
MAX_LINE_CHARS = 4000
_TAIL = 20
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LEVEL = re.compile(r"\b(debug|info|notice|warn(?:ing)?|error|crit(?:ical)?|alert|emerg|fatal)\b")
_FAULT = re.compile(r"Traceback \(most recent call last\)|[\w.]*(Error|Exception)\b")
_LEVELS = {
    "debug": "debug",
    "info": "info",
    "notice": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
}
_LOOK_AT = 80
"""How far into a line a level is looked for: beyond it the word is part of what is said."""


class JsonLines(Closing):
    """A log file of one JSON object a line: `time` (UTC), `service`, `level` (guessed where not given), `text`."""

    def __init__(
        self, path: Path, service: str, *, max_bytes: int = MAX_BYTES, files: int = FILES
    ) -> None:
        self.path = path
        self.service = service
        self._file = _Rotating(path, max_bytes, files)
        self._tail: deque[str] = deque(maxlen=_TAIL)
        self._lock = threading.Lock()

    def write(self, text: str, *, level: str = "") -> None:
        """Add one line. Never raises for a disk that is full or gone."""
        text = _COLOURS.sub("", text).rstrip()
        if not text:
            return
        if len(text) > MAX_LINE_CHARS:
            text = f"{text[:MAX_LINE_CHARS]}... ({len(text)} characters)"
        self._tail.append(text)
        with self._lock:
            if lost := self._file.lost:
                self._put(f"{lost} lines before this one are lost: {self._file.why}", "warning")
                # The note itself may be lost.
                self._file.lost = 0 if self._file.lost == lost else lost
            self._put(text, level or guessed_level(text))

    def tail(self, lines: int = _TAIL) -> str:
        """The last lines, as they were said; from memory, for the disk may be full."""
        return "\n".join(list(self._tail)[-lines:])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add one line with other fields. Never raises for a disk that is full or gone."""
        with self._lock:
            self._emit(entry)

    def _put(self, text: str, level: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._emit({"time": now, "service": self.service, "level": level, "text": text})

    def _emit(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False)
        self._file.emit(logging.LogRecord("", logging.INFO, "", 0, line, None, None))


class _Rotating(RotatingFileHandler):
    """The standard library's, except that a line that cannot be written is counted and nothing is printed."""

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        super().__init__(
            path,
            maxBytes=max_bytes,
            backupCount=max(1, files - 1),
            encoding="utf-8",
            errors="backslashreplace",
            delay=True,
        )
        self.lost = 0
        self.why = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or count it as lost."""
        try:
            if self.shouldRollover(record):
                self.doRollover()
            if self.stream is None:
                self.stream = self._open()
            self.stream.write(record.getMessage() + self.terminator)
            self.stream.flush()
        except (OSError, ValueError) as err:
            self.lost += 1
            self.why = getattr(err, "strerror", None) or str(err)
            self._drop_stream()

    def _drop_stream(self) -> None:
        # What is still in its buffer would fail again with the next line.
        stream, self.stream = self.stream, None
        if stream is not None:
            try:
                stream.close()
            except (OSError, ValueError):
                return


def guessed_level(text: str) -> str:
    """The level of a line of another program: debug, info, warning or error, from the first words of it."""
    if _FAULT.match(text):
        return "error"
    found = _LEVEL.search(text[:_LOOK_AT].lower())
    return _LEVELS.get(found[1], "error") if found else "info"


def read_tail(path: Path, lines: int = _TAIL, *, max_bytes: int = 1 << 16) -> list[dict[str, str]]:
    """The last entries of a log file, oldest first. Lines that are not whole are passed over; no file gives none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - max_bytes))
            raw = file.read(max_bytes).splitlines()
    except OSError:
        return []
    return list(_entries(raw))[-lines:]


def _entries(raw: Iterable[bytes]) -> Iterable[dict[str, str]]:
    for line in raw:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield {str(k): str(v) for k, v in entry.items()}
