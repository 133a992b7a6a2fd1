"""Files that go with a transaction: written under another name before it, put in their place after it."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from fedsplit.core.errors import RegistryError
from fedsplit.core.whole_files import hand_over
from fedsplit.registry.module_files import VERSION_FILE, file_digests, flush, module_files


class Prepared:
    """The files of one change. `settle` after the transaction, `undo` where it failed."""

    def __init__(self) -> None:
        self._texts: list[tuple[Path, Path]] = []
        self._folders: list[Path] = []

    def text(self, final: Path, text: str) -> None:
        """A file that will stand at `final`. Raises OSError where there is no room for it."""
        part = _part(final)
        self._texts.append((part, final))
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        hand_over(part)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def module(self, source: Path, final: Path, *, files: dict[str, str]) -> None:
        """A copy of a module's folder, at `final` from now on; gone again after `undo`.

        Raises OSError where there is no room, RegistryError where the source's `files` (name -> SHA-256) are others by now.
        """
        part = _part(final)
        self._folders.append(part)
        part.mkdir(mode=0o700)
        hand_over(part)
        for path in module_files(source):
            shutil.copyfile(path, part / path.name)
            hand_over(part / path.name)
            flush(part / path.name)
        if file_digests(part) != files:
            raise RegistryError(
                f"module {source} changed while it was copied; wait until nobody writes there, and try again"
            )
        if (final / VERSION_FILE).is_file():
            # Its files are damaged: the good ones take their place, also where the change itself fails.
            shutil.copyfile(final / VERSION_FILE, part / VERSION_FILE)
        else:
            self._folders.append(final)
        flush(part)
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)

    def settle(self) -> None:
        """Put the files in their places."""
        for part, final in self._texts:
            part.replace(final)

    def undo(self) -> None:
        """Leave nothing behind."""
        for part, _ in self._texts:
            part.unlink(missing_ok=True)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def _part(final: Path) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
