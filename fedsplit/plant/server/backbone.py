"""Serves the backbone in parts: its manifest, its small files, its tensors. What the control service mounts.

A tensor is streamed from its bytes of the safetensors file (transfers.py). The backbone is described anew when its files
change. Who may ask is the control service's business; what of it a site may have is `private`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import printable
from fedsplit.model.description import Description, describe
from fedsplit.model.files import Stamp, find_backbone, is_partial, stamp
from fedsplit.model.manifest import Manifest, spans
from fedsplit.plant import paths
from fedsplit.plant.server.transfers import MAX_TRANSFERS, Blob, Turns, refused, sent


@dataclass(frozen=True)
class Parts:
    """A backbone as it is served, by one state of its files."""

    manifest: Manifest
    files: dict[str, Blob]
    tensors: dict[str, Blob]
    """By sha256."""


class ServedBackbone:
    """The backbone that a federation serves; described when first asked for, and again when its files have changed."""

    def __init__(
        self,
        find: Callable[[], str],
        private: Cut | None = None,
        *,
        description: Callable[[Path], Description] = describe,
    ) -> None:
        """`find` names the backbone: a folder, or a bundled one. `private`: the blocks a to b-1, which stay here."""
        self._find, self._describe = find, description
        self._private = frozenset(private.server_blocks()) if private else frozenset[int]()
        self._state: tuple[Path, Stamp] | None = None
        self._parts: Parts | None = None
        self._lock = threading.Lock()

    def parts(self) -> Parts:
        """Raises BackboneError. May take as long as reading all weights does."""
        with self._lock:
            path = find_backbone(self._find())
            state = (path, stamp(path))
            if self._parts is None or state != self._state:
                self._parts, self._state = self._read(path), state
            return self._parts

    def _read(self, path: Path) -> Parts:
        if is_partial(path):
            raise BackboneError(
                f"backbone {path} is partial, so not all can be served of it; give the folder with the whole backbone"
            )
        found = self._describe(path)
        where = {span.name: span for span in spans(path)}
        tensors: dict[str, Blob] = {}
        for tensor in found.manifest.tensors:
            span = where[tensor.name]
            blocks = tuple(b for b in found.blocks.get(tensor.name, ()) if b in self._private)
            blob = Blob(span.file, span.offset, tensor.bytes, tensor.sha256, blocks)
            # The same bytes may stand in a block that is not private, such as zeros: then they are no secret.
            if not blocks or tensor.sha256 not in tensors:
                tensors[tensor.sha256] = blob
        files = {f.name: Blob(path / f.name, 0, f.bytes, f.sha256) for f in found.manifest.files}
        return Parts(found.manifest, files, tensors)


def backbone_router(served: ServedBackbone, *, max_transfers: int = MAX_TRANSFERS) -> APIRouter:
    """The paths under `paths.BACKBONE`. Mount it behind what checks the site's certificate."""
    router = APIRouter()
    turns = Turns(max_transfers)

    async def blob(kind: Literal["files", "tensors"], key: str, request: Request) -> Response:
        try:
            parts = await run_in_threadpool(served.parts)
        except BackboneError as err:
            return _unreadable(err)
        found = (parts.files if kind == "files" else parts.tensors).get(key)
        if found is None:
            return refused(
                404, "not-found",
                f"the backbone {parts.manifest.sha256[:12]} has no {kind[:-1]} {printable(key, limit=100)}; it has changed, "
                f"or it is another one: ask for the manifest again",
            )  # fmt: skip
        if found.private:
            listed = ", ".join(map(str, found.private))
            return refused(
                403, "private-block",
                f"block {listed} is private: its weights stay at the server (private-blocks in federation.toml). Choose a "
                f"cut with which the server runs it",
            )  # fmt: skip
        return sent(found, request, turns)

    @router.get(paths.MANIFEST)
    async def manifest() -> Response:
        try:
            parts = await run_in_threadpool(served.parts)
        except BackboneError as err:
            return _unreadable(err)
        etag = {"etag": f'"{parts.manifest.sha256}"'}
        return Response(parts.manifest.canonical(), headers=etag, media_type="application/json")

    @router.get(paths.FILES + "/{name}")
    async def file(name: str, request: Request) -> Response:
        return await blob("files", name, request)

    @router.get(paths.TENSORS + "/{sha256}")
    async def tensor(sha256: str, request: Request) -> Response:
        return await blob("tensors", sha256, request)

    return router


def _unreadable(err: BackboneError) -> Response:
    return refused(503, "backbone", f"the server cannot read its backbone: {err}")
