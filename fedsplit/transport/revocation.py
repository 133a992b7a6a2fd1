"""The names and certificates that are no longer let in, as a file says: {"serials": [...], "names": [...]}.

The file is looked at twice a second by the server's watch (server.py), so that a revoked site's live streams end at once.
Whoever revokes writes a new file and renames it into place.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.proxied import bare_serial

log = logging.getLogger(__name__)

_MAX_BYTES = 16 << 20


class _List(BaseModel):
    # A key that is not known might be a misspelt one, and would revoke nobody.
    model_config = ConfigDict(extra="forbid", strict=True)

    serials: list[str] = Field(default=[], max_length=100_000)
    names: list[str] = Field(default=[], max_length=100_000)


class Revoked:
    """The file's last good content. Raises ConfigError at the start where there is none to begin with."""

    def __init__(self, path: Path | None) -> None:
        """Without a path nobody is revoked."""
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._names: frozenset[str] = frozenset()
        self._serials: frozenset[str] = frozenset()
        if path is not None and (fault := self._read(path)):
            raise ConfigError(
                f"the file of revoked sites {path} cannot be used: {fault}. "
                'Where nobody is revoked it says {"serials": [], "names": []}'
            )

    def look(self) -> None:
        """Read the file again where it has changed. One that cannot be read changes nothing, and the log says so once."""
        if self._path is not None and (fault := self._read(self._path)):
            log.error(
                "the file of revoked sites %s cannot be used: %s. What it said before holds: %d names and %d certificates "
                "are refused. Write it anew",
                self._path, fault, len(self._names), len(self._serials),
            )  # fmt: skip

    def covers(self, names: Collection[str], serials: Collection[str]) -> bool:
        """Is one of these names (as in certificates) or serial numbers revoked?"""
        return not self._names.isdisjoint(names) or not self._serials.isdisjoint(serials)

    def _read(self, path: Path) -> str:
        """What is wrong with the file, empty where it is good or as it was at the last look."""
        try:
            stat = path.stat()
        except OSError as error:
            gone, self._stamp = self._stamp == (), ()
            return "" if gone else f"{error.strerror}"
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamp == self._stamp:
            return ""
        self._stamp = stamp
        try:
            content = _List.model_validate(read_json(path, limit=_MAX_BYTES))
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            return printable(f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}")
        except (OSError, ValueError) as error:
            return printable(error)
        self._names = frozenset(content.names)
        self._serials = frozenset(map(bare_serial, content.serials)) - {""}
        return ""
