"""Which module is meant: a module folder, a run's folder, or a reference into a registry of modules.

`find_module` is behind every `--module`. What it finds is a folder with `fedsplit.json`; nothing of it is loaded here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable, read_json
from fedsplit.registry.module_files import ABOUT_FILE, module_digest
from fedsplit.registry.places import find_registry

REGISTRY_VARIABLE = "FEDSPLIT_REGISTRY"
_RUN_FOLDER, _RUN_CONFIG = "module", "config.json"


@dataclass(frozen=True)
class FoundModule:
    """A module's folder and what it is called."""

    folder: Path
    digest: str
    """Of its files: the same files have the same one, wherever they lie."""
    name: str
    """"TASK#3 (production)" of a registry, else the folder as it was given."""
    task: str
    """The task's name; empty where nothing beside the module says it."""


def find_module(reference: str, *, registry: Path | None = None) -> FoundModule:
    """The module of a folder (RUN/module, RUN, RUN/TASK) or of a registry (TASK, TASK@ALIAS, TASK#3, a digest).

    `registry` is the registry's folder; without it FEDSPLIT_REGISTRY's, else the one near the working directory.
    Raises ConfigError where the reference names no module, RegistryError where its files cannot be read or were changed.
    """
    folder = _folder_of(reference)
    if folder is not None:
        return FoundModule(folder, module_digest(folder), reference, _task_of(folder))
    return _registered(reference, registry)


def _folder_of(reference: str) -> Path | None:
    """The module folder of a path; None where the reference is rather one of a registry."""
    path = Path(reference).expanduser()
    shown = printable(reference, limit=300)
    try:
        there = path.is_dir()
        if there and (path / ABOUT_FILE).is_file():
            return path
        if there and (path / _RUN_FOLDER / ABOUT_FILE).is_file():
            return path / _RUN_FOLDER
        tasks = (
            sorted(p.parents[1].name for p in path.glob(f"*/{_RUN_FOLDER}/{ABOUT_FILE}"))
            if there
            else []
        )
        exists = there or path.exists()
    except (OSError, ValueError, RuntimeError) as err:
        raise ConfigError(
            f"module {shown} cannot be looked at ({printable(err, limit=100)}); check the path and its rights"
        ) from err
    if tasks:
        # A run of several tasks has settings of its own, a folder of runs has none.
        what = "a run of several tasks" if (path / _RUN_CONFIG).is_file() else "a folder of runs"
        raise ConfigError(
            f"{shown} is {what}; name one of them: "
            f"{printable(', '.join(str(path / task) for task in tasks), limit=500)}"
        )
    if there and _like_path(reference):
        raise ConfigError(
            f"the folder {shown} has no module: there is no {ABOUT_FILE} in it, nor in {_RUN_FOLDER}/ below it; give the "
            f"folder of a run that has ended, or its {_RUN_FOLDER} folder"
        )
    if exists and not there:
        raise ConfigError(
            f"{shown} is a file, a module is a folder; give the folder of a run, or its {_RUN_FOLDER} folder"
        )
    if _like_path(reference) and not there:
        raise ConfigError(
            f"there is no folder {shown}; give the folder of a run (runs/NAME), its {_RUN_FOLDER} folder, or a module of a "
            f"registry (TASK, TASK@ALIAS, TASK#NUMBER or a digest)"
        )
    return None


def _like_path(reference: str) -> bool:
    return not reference or reference.startswith((".", "~")) or any(c in reference for c in "/\\")


def _registered(reference: str, registry: Path | None) -> FoundModule:
    """The module of a registry. Raises ConfigError where it has none of that name, or there is no registry."""
    folder = registry_folder(registry)
    if folder is None:
        raise ConfigError(
            f"there is no module {printable(reference, limit=300)!r}: no such folder is here, and no registry of modules; give "
            f"the folder of a run (runs/NAME), or --registry DIR"
        )
    # SQLAlchemy: who names a folder does without it.
    from fedsplit.registry.registry import ModuleRegistry

    with ModuleRegistry.open(folder) as opened:
        version = opened.get(reference)
        opened.files(version)  # they are as they were kept
        return FoundModule(opened.folder(version), version.digest, version.shown, version.task)


def registry_folder(registry: Path | None = None) -> Path | None:
    """The registry that is named, by option or by FEDSPLIT_REGISTRY, else the one near the working directory."""
    named = os.environ.get(REGISTRY_VARIABLE, "").strip()
    return registry or (Path(named).expanduser() if named else find_registry(Path.cwd()))


def _task_of(folder: Path) -> str:
    """The task that the run's config.json beside the module names; empty where there is none."""
    try:
        said = read_json(folder.absolute().parent / _RUN_CONFIG)
        task = said["config"]["task"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return printable(task, limit=128) if isinstance(task, str) else ""
