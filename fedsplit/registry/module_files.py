"""A module's folder as a registry sees it: its files, their digest, and what fedsplit.json says.

Nothing of a module is loaded here: that takes torch, and a backbone.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.core.errors import ConfigError, RegistryError
from fedsplit.core.foreign import MAX_CLASSES, printable, read_json

ABOUT_FILE, VERSION_FILE = "fedsplit.json", "version.json"
MAX_FILES, MAX_FILE_CHARS, MAX_MODULE_BYTES = 64, 100, 64 * 2**30
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_file_name(name: str) -> bool:
    """May a module's file be called so? Plain names alone: they travel in archives and addresses."""
    return bool(_FILE_NAME.fullmatch(name)) and name != VERSION_FILE


def module_files(folder: Path) -> list[Path]:
    """A module's files, by name: all plain ones but the registry's own version.json. Raises OSError and ConfigError."""
    found = sorted(
        (
            p
            for p in folder.iterdir()
            if p.name != VERSION_FILE and not p.name.startswith(".") and p.is_file()
        ),
        key=lambda p: p.name,
    )
    if odd := [p.name for p in found if not is_file_name(p.name)]:
        raise ConfigError(
            f"module {folder} has a file {printable(odd[0], limit=100)!r}; a module's files have plain names (ASCII letters, "
            f"digits, '-', '_', '.'). Remove it, or give the module folder of a run"
        )
    if len(found) > MAX_FILES:
        raise ConfigError(
            f"module {folder} has {len(found)} files, at most {MAX_FILES} are wanted; give the module folder of a run"
        )
    return found


def module_digest(folder: Path) -> str:
    """SHA-256 over the sorted (name, SHA-256) of a module's files: the same files have the same one, wherever they lie.

    Raises RegistryError where they cannot be read, ConfigError where they are no module's.
    """
    return digest_of(file_digests(folder))


def file_digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of each of a module's files. Raises as `module_digest` does."""
    found = {}
    try:
        for path in module_files(folder):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise RegistryError(
            f"module {folder} cannot be read ({err.strerror or err}); check its rights, or copy it again"
        ) from err
    return found


def digest_of(files: dict[str, str]) -> str:
    """A module's digest from its files' ones."""
    lines = (f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class About:
    """What a module's own files say."""

    classes: tuple[str, ...]
    """Empty for a module of numbers."""
    target: str
    kind: str
    backbone_sha256: str
    backbone: str
    size_bytes: int


def read_about(folder: Path) -> About:
    """What the module in `folder` says of itself. Raises ConfigError where it is none."""
    try:
        said = read_json(folder / ABOUT_FILE)
        classes, sha256 = said["classes"], said["backbone_sha256"]
        number = said.get("target") is not None
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError("backbone_sha256 is no digest")
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
            raise ValueError("classes is no list of names")
        if len(classes) > MAX_CLASSES:
            raise ValueError(f"{len(classes)} classes, at most {MAX_CLASSES} are wanted")
        return About(
            classes=() if number else tuple(classes),
            target="number" if number else "class",
            kind=_word(said["module"], "kind"),
            backbone_sha256=sha256,
            backbone=_word(said.get("backbone", {}), "name"),
            size_bytes=sum(p.stat().st_size for p in module_files(folder)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ConfigError(
            f"{folder} is no module that can be kept: {ABOUT_FILE} in it cannot be used "
            f"({type(err).__name__}: {printable(err, limit=200)}); give the module folder of a run, as fedsplit wrote it"
        ) from err


def _word(said: Any, key: str) -> str:
    value = said.get(key, "")
    return printable(value, limit=500) if isinstance(value, str) else ""


def flush(path: Path) -> None:
    """Have a file or a folder on disk, whatever happens to the power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
