"""Files and folders that are written whole or not at all: a reader never sees half of one, nor does a power cut leave it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file in one piece. Raises OSError, and then the old file stands and nothing else is left.

    `mode` says who may read it, from its first byte on; the umask takes from it. Windows keeps its folder's own rights.
    """
    # A name of its own: two writers at once must not share a part.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        hand_over(part)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def hand_over(path: Path) -> None:
    """What root makes in somebody's folder belongs to him: a service that runs as him has to read and write it."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        owner = path.parent.stat()
        if owner.st_uid != 0:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `final` at the end, or is gone after an error."""
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def free_bytes(path: Path) -> int:
    """Bytes that may still be written below the nearest folder that is there; 0 where nobody can say."""
    there = next((p for p in (path, *path.parents) if p.exists()), None)
    try:
        return shutil.disk_usage(there).free if there else 0
    except OSError:
        return 0
