"""Where a registry of modules lies, and the names of what is in it. Quick to load."""

from __future__ import annotations

from pathlib import Path

from fedsplit.registry.module_files import VERSION_FILE

DATABASE, FILES, ALIASES, LOCK = "modules.db", "files", "aliases.json", ".lock"


def is_registry(folder: Path) -> bool:
    """Is there a registry in a folder, be it damaged?"""
    if (folder / DATABASE).is_file():
        return True
    files = folder / FILES
    return files.is_dir() and (
        (folder / ALIASES).is_file() or next(files.glob(f"*/{VERSION_FILE}"), None) is not None
    )


def find_registry(start: Path) -> Path | None:
    """The registry at or near a folder: itself, its modules/ (a federation's, a runs folder's), its runs/modules/."""
    for folder in (start, start / "modules", start / "runs" / "modules"):
        if is_registry(folder):
            return folder.absolute()
    return None
