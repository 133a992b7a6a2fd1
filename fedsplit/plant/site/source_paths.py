"""Where a source lies: all that a process without readers knows of it."""

from __future__ import annotations

from pathlib import Path

_FILES = ("folder", "csv", "jsonl", "npz")


def absolute(source: str) -> str:
    """The source with an absolute path: a service starts in another folder than the person who typed it."""
    kind, colon, path = source.partition(":")
    if not colon or kind not in _FILES or not path.strip():
        return source
    return f"{kind}:{Path(path).expanduser().absolute()}"


def gone(source: str) -> str:
    """Why the source cannot be there, in a few words; empty where its file or folder is. Reads nothing."""
    kind, colon, path = source.partition(":")
    if not colon or kind not in _FILES:
        return ""
    try:
        there = Path(path).exists()
    except OSError as err:
        return f"{path} cannot be looked at ({err.strerror or err})"
    return "" if there else f"{path} does not exist"
