"""Gives sites the module that is in production for their task: its digest with each report, its files by that digest.

What is in production stands in the registry of modules (`DIR/modules/`), which `fedsplit module promote` and `rollback` change
while this service runs: it is read anew for each report. A folder without one, of before, has nothing to give.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, RegistryError
from fedsplit.core.foreign import printable
from fedsplit.plant import paths
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.registry import Shown
from fedsplit.plant.server.transfers import MAX_TRANSFERS, Blob, Turns, refused, sent
from fedsplit.plant.wire import ModuleFile, ModuleFiles
from fedsplit.registry.registry import ModuleRegistry, is_registry
from fedsplit.registry.version import PRODUCTION, Version

log = logging.getLogger(__name__)

_MOST_SERVED = 64


@dataclass(frozen=True)
class _Served:
    """A version as it is sent, by one state of its files."""

    state: tuple[tuple[str, int, int], ...]
    listed: ModuleFiles
    blobs: dict[str, Blob]


class ProductionModules(Closing):
    """The modules in production of one federation; safe in several threads."""

    def __init__(self, folder: FederationFolder) -> None:
        self._folder = folder
        self._registry: ModuleRegistry | None = None
        self._served: dict[str, _Served] = {}
        self._fault = ""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Free the registry's file."""
        with self._lock:
            if self._registry is not None:
                self._registry.close()
                self._registry = None

    def of_task(self, task: str) -> dict[str, str] | None:
        """{task: digest} of the version in production, {} where there is none; None where nobody can say now."""
        try:
            registry = self._opened()
            found = registry.aliases().get(task, {}).get(PRODUCTION) if registry else None
        except (ConfigError, RegistryError) as err:
            if str(err) != self._fault:
                self._fault = str(err)
                log.error("sites keep the modules that they have: %s", err)
            return None
        self._fault = ""
        if registry is None or not task:
            return None
        return {task: found} if found else {}

    def served(self, digest: str, task: str) -> _Served | None:
        """A version's files; None unless an alias of the task points to it. Raises RegistryError, ConfigError, OSError."""
        registry = self._opened()
        if registry is None or digest not in registry.aliases().get(task, {}).values():
            return None
        version = next(v for v in registry.versions(task) if v.digest == digest)
        folder = registry.folder(version)
        with self._lock:
            known = self._served.get(digest)
        if known is not None and known.state == _state(known.blobs):
            return known
        found = _read(version, folder, registry.files(version))
        with self._lock:
            if len(self._served) >= _MOST_SERVED:
                self._served.clear()
            self._served[digest] = found
        return found

    def _opened(self) -> ModuleRegistry | None:
        with self._lock:
            if self._registry is None and is_registry(self._folder.modules):
                self._registry = ModuleRegistry.open(self._folder.modules)
            return self._registry


def _read(version: Version, folder: Path, files: dict[str, str]) -> _Served:
    blobs = {
        name: Blob(folder / name, 0, (folder / name).stat().st_size, sha256)
        for name, sha256 in files.items()
    }
    listed = ModuleFiles(
        task=version.task,
        number=version.number,
        files=tuple(
            ModuleFile(name=name, bytes=blob.bytes, sha256=blob.sha256)
            for name, blob in blobs.items()
        ),
    )
    return _Served(_state(blobs), listed, blobs)


def _state(blobs: dict[str, Blob]) -> tuple[tuple[str, int, int], ...]:
    found = []
    for name, blob in blobs.items():
        stat = blob.file.stat()
        found.append((name, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def modules_router(
    modules: ProductionModules,
    *,
    member: Callable[[Request], Shown],
    task_of: Callable[[str], str],
    max_transfers: int = MAX_TRANSFERS,
) -> APIRouter:
    """The paths under `paths.MODULES`. `member` says who asks, or raises; `task_of` the task of a site by its name."""
    router = APIRouter()
    turns = Turns(max_transfers)

    def found(digest: str, request: Request) -> _Served | Response:
        site = member(request)
        try:
            served = modules.served(digest, task_of(site.name))
        except (ConfigError, RegistryError, OSError) as err:
            log.error("module %s cannot be sent: %s", printable(digest, limit=64), err)
            return refused(
                503,
                "registry",
                "the server cannot read its registry of modules; its log control.jsonl says why",
            )
        return served or refused(
            404,
            "not-found",
            f"module {printable(digest, limit=12)} is not in use for this site's task; the next report says which one is",
        )

    @router.get(paths.MODULES + "/{digest}", response_model=None)
    async def listed(digest: str, request: Request) -> ModuleFiles | Response:
        served = await run_in_threadpool(found, digest, request)
        return served if isinstance(served, Response) else served.listed

    @router.get(paths.MODULES + "/{digest}/files/{name}")
    async def file(digest: str, name: str, request: Request) -> Response:
        served = await run_in_threadpool(found, digest, request)
        if isinstance(served, Response):
            return served
        blob = served.blobs.get(name)
        if blob is None:
            return refused(404, "not-found", f"the module has no file {printable(name, limit=100)}")
        return sent(blob, request, turns)

    return router
