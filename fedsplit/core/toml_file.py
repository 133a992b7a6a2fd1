"""TOML files that people write: a grid, a run file. Any bytes give tables or a ConfigError that says what to do."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable

MAX_FILE_BYTES = 1 << 20


def read_bytes(path: Path, kind: str) -> bytes:
    """A file's bytes, read no further than just beyond what `parse` takes; `kind` names it, e.g. "grid"."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise ConfigError(
            f"{kind} {printable(path)} cannot be read: {reason}; give the path of a TOML file"
        ) from err


def parse(data: bytes, kind: str, *, where: str) -> dict[str, Any]:
    """The tables in a file's bytes; `where` names it in errors."""
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{kind} {where} is larger than {MAX_FILE_BYTES} bytes; is it a {kind}?")
    try:
        # RecursionError: brackets nested a thousand deep. ValueError: bad UTF-8, bad TOML, endless numbers.
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as err:
        raise ConfigError(
            f"{kind} {where} is not TOML: {printable(err)}; correct it there"
        ) from err
