"""Where output goes: results to stdout, everything else to stderr; with --json one object on stdout.

Lines are folded for a terminal alone: a log, a pipe and `grep` want whole ones. What the output's
encoding lacks is written as an escape, never an error. Rich is loaded here; torch, flwr and
matplotlib are not.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

_WIDE = 200
"""Columns of a table where nobody says how wide the reader's page is."""


def console(*, stderr: bool = False) -> Console:
    """Rich's console: as wide as the terminal, and without folding where there is none."""
    found = Console(stderr=stderr, highlight=False)
    if found.is_terminal:
        return found
    width = None if os.environ.get("COLUMNS") else _WIDE
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


# What tables and sentences use, at the same width, so that columns stay.
_PLAIN = str.maketrans({"…": ".", "–": "-", "—": "-", "−": "-", "×": "x", "→": ">", "’": "'"})  # noqa: RUF001
_ERRORS = "fedsplit.plain"


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's error handler: a plain character for punctuation, an escape for the rest."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def write_anything() -> None:
    """Have stdout and stderr write plain characters or escapes for what their encoding lacks. Called once, by main.py."""
    codecs.register_error(_ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


class Output:
    """One command's output channel."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.stderr = console(stderr=True)

    def note(self, message: str) -> None:
        """Say something on the way; never on stdout."""
        self.stderr.print(Text(message))

    @contextlib.contextmanager
    def if_long(self, message: str, after_s: float = 2.0) -> Iterator[None]:
        """Say something only if the block takes longer than that."""
        timer = threading.Timer(after_s, self.note, [message])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def show(self, renderable: RenderableType) -> None:
        """Show a result to a person; with --json it goes to stderr."""
        text = Text(renderable) if isinstance(renderable, str) else renderable
        (self.stderr if self.as_json else console()).print(text)

    def result(self, record: dict[str, Any]) -> None:
        """Print the command's one JSON object, if that was asked for."""
        if self.as_json:
            print_json(record)


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    # Escapes of our own in a narrow encoding: those of the stream are not JSON's.
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    sys.stdout.write(json.dumps(record, ensure_ascii=not unicode) + "\n")
    sys.stdout.flush()


def print_error(kind: str, message: str, *, as_json: bool) -> None:
    """Tell of an error: one screen on stderr, and the error object on stdout with --json."""
    if as_json:
        print_json({"error": {"kind": kind, "message": message}})
    console(stderr=True).print(Text.assemble((f"{kind}: ", "bold red"), message))
