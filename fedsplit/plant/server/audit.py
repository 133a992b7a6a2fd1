"""audit.jsonl: who was let in and who was not, what was revoked, which runs and modules there were. Only ever added to.

One JSON object a line: `time` (ISO 8601, UTC), `what`, `who`, and details. A full file becomes audit.N.jsonl, with the
next number; the lowest numbers go when all together pass `retention.audit-mb`. Several processes may write at once.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedsplit.core.errors import FolderError
from fedsplit.core.foreign import printable
from fedsplit.core.whole_files import hand_over
from fedsplit.plant.server.folder import FederationFolder

FILE_BYTES = 10 * 2**20
_MAX_DETAIL_CHARS = 1000


def record(folder: FederationFolder, what: str, who: str, **detail: object) -> None:
    """Add a line, on disk when this returns. Raises FolderError.

    `what` is a word such as "joined"; `who` a site's name, or "server". Details are shown, so foreign text is made
    printable and short.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    told = {key: _shown(value) for key, value in detail.items() if value not in ("", None)}
    line = {"time": now, "what": what, "who": printable(who), **told}
    data = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    path = folder.audit
    try:
        lock = path.with_name(f".{path.name}.lock")
        with FileLock(lock, timeout=20, mode=0o600):
            hand_over(lock)
            _make_room(folder, len(data))
            number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            hand_over(path)
            with os.fdopen(number, "ab") as file:
                if _is_torn(path):
                    # A power cut left half a line; it must not take this one with it.
                    file.write(b"\n")
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError as err:
        raise FolderError(
            f"{path} cannot be written ({err.strerror or err}); free some space there and check who owns it"
        ) from err


def read(folder: FederationFolder) -> Iterator[dict[str, Any]]:
    """The lines, oldest first; half a line is passed over. Raises FolderError."""
    for path in [*_full(folder.audit), folder.audit]:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue
        except FileNotFoundError:
            continue
        except OSError as err:
            raise FolderError(f"{path} cannot be read ({err.strerror}); check who owns it") from err


def _make_room(folder: FederationFolder, size: int) -> None:
    """Put a full file aside, and the oldest ones away."""
    path = folder.audit
    most = folder.settings.retention.audit_mb * 2**20
    one = min(FILE_BYTES, most // 4)
    if not path.exists() or path.stat().st_size + size <= one:
        return
    full = _full(path)
    number = _number(full[-1]) + 1 if full else 1
    path.rename(path.with_name(f"{path.stem}.{number}{path.suffix}"))
    full = _full(path)
    while full and sum(p.stat().st_size for p in full) + one > most:
        full.pop(0).unlink()


def _full(path: Path) -> list[Path]:
    """The files that were put aside, oldest first."""
    return sorted(
        (p for p in path.parent.glob(f"{path.stem}.*{path.suffix}") if _number(p)), key=_number
    )


def _number(path: Path) -> int:
    found = re.fullmatch(r".+\.([1-9][0-9]{0,9})\.jsonl", path.name)
    return int(found[1]) if found else 0


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _shown(value: object) -> object:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value[:100]]
    return printable(value, limit=_MAX_DETAIL_CHARS)
