"""Text of others made fit to be shown: sites' names, errors of peers, class names, headers of tokens.

Every edge at which foreign text enters a log, a terminal, a record or an error calls `printable` once. What comes
out has no control characters (a terminal obeys them, a log reader trusts line ends), can be encoded, and is short.
Names decide who is who, so they are not changed but refused: `checked_name`. `read_json` is the one reader of JSON files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import from_json

MAX_CHARS = 500
MAX_NAME_CHARS = 128
MAX_CLASSES = 4096
MAX_CLASS_CHARS = 200
MAX_JSON_BYTES = 64 * 2**20
_WIDE_BLANK = "\u3000"
"""The blank of Japanese text: as plain to see as any, though to Python it is not printable."""


def printable(text: object, *, limit: int = MAX_CHARS) -> str:
    """`text` on one line, at most `limit` characters: what is not printable is written as an escape."""
    # Cut before the work, for escapes only make it longer.
    raw = str(text)[: limit + 1]
    # Direction marks, which turn a line round, and separators, which break it, are not printable either.
    out = "".join(c if c.isprintable() or c == _WIDE_BLANK else _escaped(c) for c in raw)
    return out if len(out) <= limit else out[: limit - 1] + "…"


def checked_name(text: str) -> str:
    """`text` itself. Raises ValueError where it cannot be shown as it is, for then two names may look alike."""
    if printable(text, limit=len(text)) != text:
        raise ValueError(
            f"'{printable(text, limit=MAX_NAME_CHARS)}' holds characters that cannot be shown; rename it"
        )
    return text


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(checked_name)]
"""A name of a site."""
ClassName = Annotated[str, Field(max_length=MAX_CLASS_CHARS), AfterValidator(checked_name)]


def parse_json(text: bytes, *, limit: int = MAX_JSON_BYTES) -> Any:
    """What a JSON text says. Raises ValueError where it is malformed, too long or nested too deeply."""
    if len(text) > limit:
        raise ValueError(f"it has {len(text)} bytes, at most {limit} are looked at")
    # Unlike json.loads it counts how deep it is, and so never runs out of stack.
    return from_json(text)


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file says, read no further than `limit` bytes. Raises OSError and ValueError."""
    with path.open("rb") as file:
        return parse_json(file.read(limit + 1), limit=limit)


def _escaped(char: str) -> str:
    if char in "\n\r\t":
        return " "
    return char.encode("unicode_escape").decode("ascii")
