"""A federation's registry of modules: each change of it is in the audit log before it is in force."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import SETTINGS, FederationFolder
from fedsplit.registry.registry import Audit, ModuleRegistry


def module_registry(folder: FederationFolder, *, create: bool = False) -> ModuleRegistry:
    """The registry in DIR/modules. Raises ConfigError where there is none yet, RegistryError where it is damaged."""
    return ModuleRegistry.open(folder.modules, create=create, audit=audited(folder))


def audited(folder: FederationFolder) -> Audit:
    """Writes a change into the federation's audit log. Raises FolderError, which prevents the change."""

    def told(what: str, detail: Mapping[str, Any]) -> None:
        audit.record(folder, what, "server", **detail)

    return told


def audit_of(registry: Path) -> Audit | None:
    """The audit log that a registry's changes belong in; None where it is no federation's. Raises ConfigError."""
    folder = federation_of(registry)
    return audited(folder) if folder is not None else None


def federation_of(registry: Path) -> FederationFolder | None:
    """The federation whose registry it is, None where it is nobody's. Raises ConfigError for settings that cannot be read."""
    above = registry.expanduser().absolute().parent
    if not (above / SETTINGS).is_file():
        return None
    folder = FederationFolder.at(above)
    return folder if folder.modules.name == registry.name else None
