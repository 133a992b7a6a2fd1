"""Files that appear whole or not at all: who looks into a growing result folder never reads half a table."""

from __future__ import annotations

from pathlib import Path

from fedsplit.core.errors import RunDirError


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file in one piece, its folder too. Raises RunDirError."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        part.replace(path)
    except OSError as err:
        part.unlink(missing_ok=True)
        raise RunDirError(
            f"{path} cannot be written: {err.strerror or err}; free some space there, or choose another folder "
            f"with --out, and start the experiment again: it goes on where it stopped"
        ) from err
