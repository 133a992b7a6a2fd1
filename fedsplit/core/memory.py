"""How much memory this process may still take: what the machine has left, or its container's limit."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import psutil

_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def give_back() -> None:
    """Hand the system what was freed and lies between what is in use: without it a process grows for months. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(limits: tuple[Path, ...] = _LIMITS) -> int:
    """Bytes that are free now, at least 1. A container's limit counts whole: what it uses already is not known here."""
    found = [int(psutil.virtual_memory().available)]
    for path in limits:
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdigit() and len(text) < 20:  # else "max"
            found.append(int(text))
    return max(1, min(found))
