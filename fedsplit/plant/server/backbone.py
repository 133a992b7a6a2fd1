"""Serves the backbone in parts: its manifest, its small files, its tensors. What the control service mounts.

A tensor is streamed from its bytes of the safetensors file; nothing is held but a chunk. The backbone is described anew
when its files change. Who may ask is the control service's business; what of it a site may have is `private`'s.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import printable
from fedsplit.model.description import Description, describe
from fedsplit.model.files import Stamp, find_backbone, is_partial, stamp
from fedsplit.model.manifest import Manifest, spans
from fedsplit.plant import paths
from fedsplit.plant.wire import Refusal

MAX_TRANSFERS = 32
"""At one time; more are asked to come again. Each holds a chunk, an open file, and a thread while it reads."""
_RETRY_S = 3
_CHUNK = 1 << 18
# Of RFC 9110 the forms with one range; what is none of them is answered whole, as it says.
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True)
class Blob:
    """Bytes that a site may ask for."""

    file: Path
    offset: int
    bytes: int
    sha256: str
    private: tuple[int, ...] = ()
    """The private blocks that they belong to: then nobody may have them."""


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
    turns = _Turns(max_transfers)

    async def blob(kind: Literal["files", "tensors"], key: str, request: Request) -> Response:
        try:
            parts = await run_in_threadpool(served.parts)
        except BackboneError as err:
            return _unreadable(err)
        found = (parts.files if kind == "files" else parts.tensors).get(key)
        if found is None:
            return _refused(
                404, "not-found",
                f"the backbone {parts.manifest.sha256[:12]} has no {kind[:-1]} {printable(key, limit=100)}; it has changed, "
                f"or it is another one: ask for the manifest again",
            )  # fmt: skip
        if found.private:
            listed = ", ".join(map(str, found.private))
            return _refused(
                403, "private-block",
                f"block {listed} is private: its weights stay at the server (private-blocks in federation.toml). Choose a "
                f"cut with which the server runs it",
            )  # fmt: skip
        return _sent(found, request, turns)

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


class _Turns:
    """How many transfers go on. Of one event loop, so it needs no lock."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def take(self) -> bool:
        if not self._left:
            return False
        self._left -= 1
        return True

    def give(self) -> None:
        self._left += 1


class _Transfer(StreamingResponse):
    """Gives its turn back however it ends, also where nobody listens any more."""

    turns: _Turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.turns.give()


def _sent(blob: Blob, request: Request, turns: _Turns) -> Response:
    """The bytes, or those that Range asks for."""
    etag = f'"{blob.sha256}"'
    headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, no-transform"}
    wanted = request.headers.get("range", "")
    if request.headers.get("if-range", etag) != etag:
        wanted = ""  # the beginning that the site has is of other bytes
    status, start, end = _span(wanted, blob.bytes)
    if status != 200:
        said = f"{start}-{end - 1}" if status == 206 else "*"
        headers["content-range"] = f"bytes {said}/{blob.bytes}"
    if status == 416:
        return Response(status_code=status, headers=headers)
    headers["content-length"] = str(end - start)
    if not turns.take():
        refusal = _refused(503, "busy", "too many sites fetch just now; try again in some seconds")
        refusal.headers["retry-after"] = str(_RETRY_S)
        return refusal
    answer = _Transfer(
        _chunks(blob.file, blob.offset + start, end - start),
        status_code=status,
        headers=headers,
        media_type="application/octet-stream",
    )
    answer.turns = turns
    return answer


def _span(wanted: str, size: int) -> tuple[int, int, int]:
    """(status, start, end) of what a Range header asks for: 200 all, 206 a part, 416 where there are no such bytes."""
    match = _RANGE.fullmatch(wanted)
    first, last = match.groups() if match else ("", "")
    if not first and not last:
        return 200, 0, size
    if not first:  # the last so many
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return 200, 0, size
    return (206, start, end) if start < end else (416, 0, 0)


def _chunks(file: Path, offset: int, size: int) -> Iterator[bytes]:
    with file.open("rb") as handle:
        handle.seek(offset)
        while size:
            chunk = handle.read(min(size, _CHUNK))
            if not chunk:
                raise OSError(f"{file} became shorter while it was sent")
            size -= len(chunk)
            yield chunk


def _unreadable(err: BackboneError) -> Response:
    return _refused(503, "backbone", f"the server cannot read its backbone: {err}")


def _refused(status: int, kind: str, message: str) -> Response:
    told = Refusal(kind=kind, message=printable(message, limit=2000))
    return JSONResponse({"error": told.model_dump()}, status)
